/* clmoe selftest: whether a device computes what it should, and what a report of a defect needs. */
#include "device_list.h"
#include "interrupt.h"
#include "output.h"
#include "session.h"
#include "tensors.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char usage[] =
    "Usage: clmoe selftest [OPTION]...\n"
    "Runs small layers of every policy and storage type on every engine of a device, forward\n"
    "and backward, and compares them with the host in double precision, with the engine ref\n"
    "and with a second run. Attach what --json - prints to a report of a defect.\n"
    "\n"
    "Options:\n"
    "  --device DEVICE  a number of clmoe devices, or part of a device's or platform's name\n"
    "  --engine NAME    this engine alone\n"
    "  --layer TEXT     layers whose names have this in them alone\n"
    "  --json FILE      writes device, results and summary as JSON; -: instead of the table\n"
    "  --force          replaces a FILE that exists\n"
    "  --no-cache       compiles anew: no program is read from or written to the user's cache\n"
    "  --help           this text\n"
    "  --version        the version\n"
    "\n"
    "Exit status: 0 all passed, 1 something differs or failed, 2 bad input or no usable device.\n";

enum { OPT_DEVICE, OPT_ENGINE, OPT_LAYER, OPT_JSON, OPT_FORCE, OPT_NO_CACHE };

static const cli_option table[] = {
    [OPT_DEVICE] = {.name = "device", .has_value = true},
    [OPT_ENGINE] = {.name = "engine", .has_value = true},
    [OPT_LAYER] = {.name = "layer", .has_value = true},
    [OPT_JSON] = {.name = "json", .has_value = true},
    [OPT_FORCE] = {.name = "force", .needs = "json"},
    [OPT_NO_CACHE] = {.name = "no-cache"},
};

enum { MOST_ENGINES = 16, MOST_PRINTED = 20, LOG_SIZE = 2000, TEXT_SIZE = 256 };

/* Results of a layer and a type on one engine. */
typedef struct cell {
    unsigned passed, differs, skipped, failed;
} cell;

typedef struct selftest_run {
    const char *device, *json_path;
    clmoe_selftest_options options;
    bool force, no_cache;
    output json_output;
    device_session session;
    const char *engines[MOST_ENGINES]; /* columns of the table */
    size_t num_engines;
    bool quiet; /* the table goes nowhere */
    char layer[64];
    clmoe_type type;
    cell cells[MOST_ENGINES]; /* of the row at hand */
    bool has_row;
    json_t *results;
    clmoe_selftest_summary summary;
    double seconds;
} selftest_run;

/* ---- The device ------------------------------------------------------------------------------ */

static void set_text(json_t *object, const char *key, const char *text) {
    char printable[TEXT_SIZE];
    clmoe_printable(text, printable, sizeof printable);
    json_object_set_new(object, key, json_string(printable));
}

static void set_device_text(json_t *object, const char *key, cl_device_id device,
                            cl_device_info what) {
    char text[TEXT_SIZE] = "";
    device_text(device, what, text, sizeof text);
    set_text(object, key, text);
}

static void set_platform_text(json_t *object, const char *key, cl_platform_id platform,
                              cl_platform_info what) {
    char text[TEXT_SIZE] = "";
    platform_text(platform, what, text, sizeof text);
    set_text(object, key, text);
}

static void set_device_number(json_t *object, const char *key, cl_device_id device,
                              cl_device_info what) {
    cl_ulong number = 0; /* little-endian, or the device would have been refused */
    clGetDeviceInfo(device, what, sizeof number, &number, NULL);
    json_object_set_new(object, key, json_integer((json_int_t)number));
}

static json_t *device_json(const device_session *s) {
    cl_device_id device = NULL;
    cl_platform_id platform = NULL;
    cl_device_type type = 0;
    json_t *object = json_object();
    clGetCommandQueueInfo(s->queue, CL_QUEUE_DEVICE, sizeof device, (void *)&device, NULL);
    clGetDeviceInfo(device, CL_DEVICE_PLATFORM, sizeof platform, (void *)&platform, NULL);
    clGetDeviceInfo(device, CL_DEVICE_TYPE, sizeof type, &type, NULL);
    set_text(object, "name", s->name);
    json_object_set_new(object, "type", json_string(device_type_name(type)));
    set_device_text(object, "vendor", device, CL_DEVICE_VENDOR);
    set_device_text(object, "driver", device, CL_DRIVER_VERSION);
    set_device_text(object, "opencl", device, CL_DEVICE_VERSION);
    set_device_text(object, "opencl_c", device, CL_DEVICE_OPENCL_C_VERSION);
    set_platform_text(object, "platform", platform, CL_PLATFORM_NAME);
    set_platform_text(object, "platform_version", platform, CL_PLATFORM_VERSION);
    set_device_number(object, "compute_units", device, CL_DEVICE_MAX_COMPUTE_UNITS);
    set_device_number(object, "memory", device, CL_DEVICE_GLOBAL_MEM_SIZE);
    set_device_number(object, "local_memory", device, CL_DEVICE_LOCAL_MEM_SIZE);
    set_device_number(object, "largest_buffer", device, CL_DEVICE_MAX_MEM_ALLOC_SIZE);
    set_device_number(object, "work_group", device, CL_DEVICE_MAX_WORK_GROUP_SIZE);
    return object;
}

/* "0.2": programs run with libraries of the same. */
static void abi_text(char text[TEXT_SIZE]) {
    snprintf(text, TEXT_SIZE, "%s", clmoe_version());
    char *patch = strrchr(text, '.');
    if (patch != NULL)
        *patch = '\0';
}

static const char *text_of(const json_t *object, const char *key) {
    const char *text = json_string_value(json_object_get(object, key));
    return text != NULL ? text : "";
}

static void print_device(const json_t *device) {
    char abi[TEXT_SIZE];
    abi_text(abi);
    printf("clmoe     %s, ABI %s\n", clmoe_version(), abi);
    printf("device    %s (%s), %s\n", text_of(device, "name"), text_of(device, "type"),
           text_of(device, "vendor"));
    printf("driver    %s, %s, compiler %s\n", text_of(device, "driver"), text_of(device, "opencl"),
           text_of(device, "opencl_c"));
    printf("platform  %s, %s\n", text_of(device, "platform"), text_of(device, "platform_version"));
}

/* ---- The table ------------------------------------------------------------------------------- */

static void print_columns(const selftest_run *r) {
    printf("\n  %-30s %-5s", "batches passed", "type");
    for (size_t i = 0; i < r->num_engines; i++)
        printf(" %9s", r->engines[i]);
    putchar('\n');
}

static void print_cell(const cell *c) {
    char text[32];
    const unsigned run = c->passed + c->differs + c->failed;
    if (c->differs > 0)
        snprintf(text, sizeof text, "DIFFERS");
    else if (c->failed > 0)
        snprintf(text, sizeof text, "FAILED");
    else if (run == 0)
        snprintf(text, sizeof text, "-");
    else
        snprintf(text, sizeof text, "%u", c->passed);
    printf(" %9s", text);
}

static void end_row(selftest_run *r) {
    if (r->has_row && !r->quiet) {
        printf("  %-30s %-5s", r->layer, dtype_name(r->type));
        for (size_t i = 0; i < r->num_engines; i++)
            print_cell(&r->cells[i]);
        putchar('\n');
        fflush(stdout);
    }
    memset(r->cells, 0, sizeof r->cells);
    r->has_row = false;
}

static void count_result(selftest_run *r, const clmoe_selftest_result *result) {
    if (r->has_row && (strcmp(r->layer, result->layer) != 0 || r->type != result->type))
        end_row(r);
    snprintf(r->layer, sizeof r->layer, "%s", result->layer);
    r->type = result->type;
    r->has_row = true;
    for (size_t i = 0; i < r->num_engines; i++) {
        cell *c = &r->cells[i];
        if (strcmp(r->engines[i], result->engine) != 0)
            continue;
        c->passed += result->status == CLMOE_SELFTEST_PASSED;
        c->differs += result->status == CLMOE_SELFTEST_DIFFERS;
        c->skipped += result->status == CLMOE_SELFTEST_SKIPPED;
        c->failed += result->status == CLMOE_SELFTEST_FAILED;
    }
}

/* ---- Results --------------------------------------------------------------------------------- */

static const char *status_name(clmoe_selftest_status status) {
    static const char *const names[] = {[CLMOE_SELFTEST_PASSED] = "passed",
                                        [CLMOE_SELFTEST_DIFFERS] = "differs",
                                        [CLMOE_SELFTEST_SKIPPED] = "skipped",
                                        [CLMOE_SELFTEST_FAILED] = "failed"};
    return names[status];
}

/* JSON has no infinity: that is null. */
static json_t *number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *result_json(const clmoe_selftest_result *result) {
    return json_pack("{ss ss ss ss ss ss ss so so so so ss}", "layer", result->layer, "batch",
                     result->batch, "engine", result->engine, "dtype", dtype_name(result->type),
                     "status", status_name(result->status), "array", result->array, "against",
                     result->against, "norm_error", number(result->norm_error), "norm_tolerance",
                     number(result->norm_tolerance), "worst_error", number(result->worst_error),
                     "worst_tolerance", number(result->worst_tolerance), "message",
                     result->message);
}

/* The compiler's words about a kernel that did not build: the first lines. */
static void add_log(selftest_run *r, json_t *object) {
    char text[LOG_SIZE];
    if (r->session.log == NULL)
        return;
    clmoe_printable(r->session.log, text, sizeof text);
    json_object_set_new(object, "log", json_string(text));
}

static int take_result(void *user, const clmoe_selftest_result *result) {
    selftest_run *r = user;
    json_t *object = result_json(result);
    if (result->status == CLMOE_SELFTEST_FAILED)
        add_log(r, object);
    json_array_append_new(r->results, object);
    count_result(r, result);
    return interrupt_signal() != 0;
}

static void print_result(const json_t *result) {
    printf("  %s, %s, %s, engine %s:\n    %s\n", text_of(result, "layer"), text_of(result, "dtype"),
           text_of(result, "batch"), text_of(result, "engine"), text_of(result, "message"));
}

static void print_all_of(const selftest_run *r, clmoe_selftest_status status, unsigned count) {
    size_t i;
    json_t *result;
    unsigned printed = 0;
    if (count == 0)
        return;
    printf("\n%s\n", status_name(status));
    json_array_foreach(r->results, i,
                       result) if (strcmp(text_of(result, "status"), status_name(status)) == 0 &&
                                   printed++ < MOST_PRINTED) print_result(result);
    if (printed > MOST_PRINTED)
        printf("  and %u more: see --json\n", printed - MOST_PRINTED);
}

/* Why engines were skipped: each sentence once for an engine. */
static void print_skipped(const selftest_run *r) {
    size_t i;
    json_t *result;
    json_t *seen = json_object();
    if (r->summary.skipped > 0)
        printf("\nskipped\n");
    json_array_foreach(r->results, i, result) {
        char line[1024];
        if (strcmp(text_of(result, "status"), "skipped") != 0)
            continue;
        snprintf(line, sizeof line, "%s: %s", text_of(result, "engine"),
                 text_of(result, "message"));
        if (json_object_get(seen, line) == NULL)
            printf("  %s\n", line);
        json_object_set_new(seen, line, json_true());
    }
    json_decref(seen);
}

static void print_end(const selftest_run *r) {
    const clmoe_selftest_summary *s = &r->summary;
    print_all_of(r, CLMOE_SELFTEST_DIFFERS, s->differs);
    print_all_of(r, CLMOE_SELFTEST_FAILED, s->failed);
    print_skipped(r);
    printf("\n%u passed, %u differ, %u failed, %u skipped, in %.1f s\n", (unsigned)s->passed,
           (unsigned)s->differs, (unsigned)s->failed, (unsigned)s->skipped, r->seconds);
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static json_t *report_json(const selftest_run *r, const json_t *device) {
    char abi[TEXT_SIZE];
    const clmoe_selftest_summary *s = &r->summary;
    abi_text(abi);
    return json_pack("{ss ss sO sO s{sI sI sI sI sb sf}}", "version", clmoe_version(), "abi", abi,
                     "device", device, "results", r->results, "summary", "passed",
                     (json_int_t)s->passed, "differs", (json_int_t)s->differs, "failed",
                     (json_int_t)s->failed, "skipped", (json_int_t)s->skipped, "stopped",
                     (int)s->stopped, "seconds", r->seconds);
}

static clmoe_status write_json(selftest_run *r, const json_t *device) {
    clmoe_status status = CLMOE_SUCCESS;
    problem why;
    json_t *object = NULL;
    if (r->json_path == NULL)
        return CLMOE_SUCCESS;
    object = report_json(r, device);
    if (object == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the report"));
    FILE *stream = output_open(&r->json_output, &why);
    if (stream == NULL)
        TRY(cli_fail(CLMOE_IO, "%s", why.text));
    json_dumpf(object, stream, JSON_INDENT(2) | JSON_ENSURE_ASCII);
    putc('\n', stream);
    if (!output_close(&r->json_output, &why))
        TRY(cli_fail(CLMOE_IO, "%s", why.text));
done:
    output_drop(&r->json_output);
    json_decref(object);
    return status;
}

/* ---- The command ----------------------------------------------------------------------------- */

static bool set_value(void *to, int option, const char *value, problem *why) {
    selftest_run *r = to;
    (void)why;
    if (option == OPT_DEVICE)
        r->device = value;
    else if (option == OPT_ENGINE)
        r->options.engine = value;
    else if (option == OPT_LAYER)
        r->options.layer = value;
    else if (option == OPT_JSON)
        r->json_path = value;
    return true;
}

static clmoe_status parse_options(selftest_run *r, int argc, char **argv, bool *stop) {
    clmoe_status status = CLMOE_SUCCESS;
    cli_parser parser = {
        .options = table, .count = sizeof table / sizeof table[0], .set_value = set_value};
    problem why;
    TRY(parse_command(&parser, argc, argv, r, usage, stop));
    if (*stop)
        return status;
    r->force = parser.given[OPT_FORCE] > 0;
    r->no_cache = parser.given[OPT_NO_CACHE] > 0;
    if (r->json_path != NULL)
        TRY(checked(output_check(&r->json_output, "--json", r->json_path, r->force, &why), &why));
    r->quiet = r->json_output.to_stdout;
done:
    return status;
}

/* Columns: the engines that there are and that are wanted. */
static void list_engines(selftest_run *r) {
    const char *name;
    for (uint32_t i = 0; (name = clmoe_engine_name(r->session.context, i, NULL)) != NULL; i++)
        if ((r->options.engine == NULL || strcmp(name, r->options.engine) == 0) &&
            r->num_engines < MOST_ENGINES)
            r->engines[r->num_engines++] = name;
}

static double seconds_now(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static clmoe_status run_test(selftest_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    const double begin = seconds_now();
    r->options.struct_size = sizeof r->options;
    r->options.report = take_result;
    r->options.user = r;
    r->summary.struct_size = sizeof r->summary;
    TRY(LIB(clmoe_selftest(r->session.context, &r->options, &r->summary)));
    end_row(r);
    r->seconds = seconds_now() - begin;
done:
    return status;
}

static clmoe_status run_and_print(selftest_run *r) {
    clmoe_status status = CLMOE_SUCCESS;
    json_t *device = NULL;
    TRY(session_open(&r->session, r->device, !r->no_cache));
    list_engines(r);
    device = device_json(&r->session);
    r->results = json_array();
    if (!r->quiet) {
        print_device(device);
        print_columns(r);
    }
    TRY(run_test(r));
    if (!r->quiet)
        print_end(r);
    TRY(write_json(r, device));
done:
    json_decref(device);
    return status;
}

static int exit_code(const selftest_run *r, clmoe_status status) {
    if (status != CLMOE_SUCCESS)
        return exit_with_error("selftest");
    if (r->summary.stopped)
        return exit_interrupted("selftest", "the rest was not run");
    return r->summary.differs + r->summary.failed > 0 ? EXIT_MISMATCH : EXIT_OK;
}

int selftest_main(int argc, char **argv) {
    clmoe_status status = CLMOE_SUCCESS;
    selftest_run run = {0};
    bool stop = false;
    TRY(parse_options(&run, argc, argv, &stop));
    if (stop)
        return EXIT_OK;
    TRY(run_and_print(&run));
done:;
    const int code = exit_code(&run, status);
    json_decref(run.results);
    session_close(&run.session);
    return code;
}
