/* clmoe run: the MoE block of a checkpoint on a tensor, checked against another and reported. */
#include "batch.h"
#include "cli.h"
#include "report.h"
#include "session.h"
#include "tensors.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static const char usage[] =
    "Usage: clmoe run MODEL_DIR --layer N --input FILE --tensor NAME [OPTION]...\n"
    "Runs the MoE block of layer N of a checkpoint on a tensor and reports the routing: load and\n"
    "drops per expert, balance, time per step.\n"
    "\n"
    "  MODEL_DIR            holds config.json and model.safetensors, or shards with their index\n"
    "  --layer N            the layer, counted from 0\n"
    "  --input FILE         a safetensors file\n"
    "  --tensor NAME        its tensor to run on, [T,D] or [B,S,D]\n"
    "\n"
    "Options:\n"
    "  --assume FAMILY      for a model_type that clmoe does not know: the one whose rules it\n"
    "                       follows, or pattern: what the names of its tensors point to\n"
    "  --output FILE        writes the result to a new safetensors file as tensor y [T,D]\n"
    "  --expect NAME        compares the result with this tensor of the input file\n"
    "  --tolerance R        most ||y - expect|| / ||expect|| that passes (default 1e-5; f16 2e-3,\n"
    "                       bf16 2e-2)\n"
    "  --dtype T            f32 (default), f16 or bf16: x and the expert weights are rounded to it\n"
    "  --device I           the device, as clmoe devices counts (default: the first GPU, else 0)\n"
    "  --engine E           the engine of the experts (default: by device)\n"
    "  --capacity-factor F  rows per expert are T*K*F/E rounded up; 0 drops nothing\n"
    "  --stats              prints all statistics too, not with --json\n"
    "  --loss NAME[:W]      prints the value of a balancing loss; repeatable\n"
    "  --repeat R           times are medians of R runs (default 1)\n"
    "  --no-cache           compiles anew: no program is read from or written to the user's cache\n"
    "  --json               prints one JSON object instead of the report\n"
    "  --help               this text\n"
    "  --version            the version\n"
    "\n"
    "Exit status: 0 success, 1 the result is off its expectation, 2 bad input.\n";

enum { MAX_RUN_LOSSES = 16 }; /* as many as clmoe_forward() takes */

typedef struct run_options {
    const char *model, *assume, *input, *tensor, *output, *expect, *engine;
    uint32_t layer, device, repeat;
    clmoe_type dtype;
    double tolerance, capacity_factor;
    clmoe_loss_desc losses[MAX_RUN_LOSSES];
    uint32_t num_losses;
    bool stats, layer_given, device_given, tolerance_given, capacity_given, json, no_cache;
} run_options;

typedef struct run_session {
    clmoe_checkpoint *checkpoint;
    safetensors *input;
    clmoe_layer_desc desc;
    device_session device;
    clmoe_layer *layer;
    clmoe_weights weights;
    batch batch;
    float *x, *y, *expect; /* [T,D] */
    clmoe_stats *stats;
    float loss_values[MAX_RUN_LOSSES];
    run_report report;
} run_session;

/* Where to stop without running: after --help and --version, or a bad option. */
typedef enum parse_result { PARSE_RUN, PARSE_STOP, PARSE_BAD } parse_result;

enum {
    OPT_LAYER = 256,
    OPT_ASSUME,
    OPT_INPUT,
    OPT_TENSOR,
    OPT_OUTPUT,
    OPT_EXPECT,
    OPT_TOLERANCE,
    OPT_DTYPE,
    OPT_DEVICE,
    OPT_ENGINE,
    OPT_CAPACITY,
    OPT_REPEAT,
    OPT_STATS,
    OPT_LOSS,
    OPT_JSON,
    OPT_NO_CACHE,
    OPT_VERSION,
};

static const struct option long_options[] = {
    {"layer", required_argument, NULL, OPT_LAYER},
    {"assume", required_argument, NULL, OPT_ASSUME},
    {"input", required_argument, NULL, OPT_INPUT},
    {"tensor", required_argument, NULL, OPT_TENSOR},
    {"output", required_argument, NULL, OPT_OUTPUT},
    {"expect", required_argument, NULL, OPT_EXPECT},
    {"tolerance", required_argument, NULL, OPT_TOLERANCE},
    {"dtype", required_argument, NULL, OPT_DTYPE},
    {"device", required_argument, NULL, OPT_DEVICE},
    {"engine", required_argument, NULL, OPT_ENGINE},
    {"capacity-factor", required_argument, NULL, OPT_CAPACITY},
    {"repeat", required_argument, NULL, OPT_REPEAT},
    {"stats", no_argument, NULL, OPT_STATS},
    {"loss", required_argument, NULL, OPT_LOSS},
    {"json", no_argument, NULL, OPT_JSON},
    {"no-cache", no_argument, NULL, OPT_NO_CACHE},
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, OPT_VERSION},
    {NULL, 0, NULL, 0},
};

static clmoe_status parse_number(run_options *o, int option, const char *text) {
    switch (option) {
    case OPT_LAYER:
        o->layer_given = true;
        return parse_u32("--layer", text, 0, UINT32_MAX, &o->layer);
    case OPT_DEVICE:
        o->device_given = true;
        return parse_u32("--device", text, 0, UINT32_MAX, &o->device);
    case OPT_REPEAT:
        return parse_u32("--repeat", text, 1, 1000000, &o->repeat);
    case OPT_TOLERANCE:
        o->tolerance_given = true;
        return parse_real("--tolerance", text, &o->tolerance);
    default:
        o->capacity_given = true;
        return parse_real("--capacity-factor", text, &o->capacity_factor);
    }
}

static clmoe_status parse_type(const char *text, clmoe_type *type) {
    const clmoe_type types[] = {CLMOE_F32, CLMOE_F16, CLMOE_BF16};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(text, type_name(types[i])) == 0) {
            *type = types[i];
            return CLMOE_SUCCESS;
        }
    return fail(CLMOE_INVALID_ARGUMENT, "--dtype is '%s', but must be f32, f16 or bf16", text);
}

/* NAME[:WEIGHT] */
static clmoe_status parse_loss(run_options *o, const char *text) {
    const char *colon = strchr(text, ':');
    size_t length = colon ? (size_t)(colon - text) : strlen(text);
    double weight = 1.0;
    if (o->num_losses == MAX_RUN_LOSSES)
        return fail(CLMOE_INVALID_ARGUMENT, "--loss is given more than %d times", MAX_RUN_LOSSES);
    for (clmoe_loss_kind kind = 0; clmoe_loss_name(kind); kind++) {
        const char *name = clmoe_loss_name(kind);
        if (strlen(name) != length || strncmp(name, text, length) != 0)
            continue;
        if (colon && parse_real("--loss", colon + 1, &weight) != CLMOE_SUCCESS)
            return CLMOE_INVALID_ARGUMENT;
        o->losses[o->num_losses++] = (clmoe_loss_desc){.kind = kind, .weight = (float)weight};
        return CLMOE_SUCCESS;
    }
    return fail(CLMOE_INVALID_ARGUMENT, "--loss is '%s', which names no loss", text);
}

/* What rounding x and the weights costs, with room. */
static double default_tolerance(clmoe_type type) {
    return type == CLMOE_F32 ? 1e-5 : type == CLMOE_F16 ? 2e-3 : 2e-2;
}

static clmoe_status parse_option(run_options *o, int option, char **argv) {
    switch (option) {
    case OPT_ASSUME:
        o->assume = optarg;
        return CLMOE_SUCCESS;
    case OPT_INPUT:
        o->input = optarg;
        return CLMOE_SUCCESS;
    case OPT_TENSOR:
        o->tensor = optarg;
        return CLMOE_SUCCESS;
    case OPT_OUTPUT:
        o->output = optarg;
        return CLMOE_SUCCESS;
    case OPT_EXPECT:
        o->expect = optarg;
        return CLMOE_SUCCESS;
    case OPT_ENGINE:
        o->engine = optarg;
        return CLMOE_SUCCESS;
    case OPT_DTYPE:
        return parse_type(optarg, &o->dtype);
    case OPT_STATS:
        o->stats = true;
        return CLMOE_SUCCESS;
    case OPT_LOSS:
        return parse_loss(o, optarg);
    case OPT_JSON:
        o->json = true;
        return CLMOE_SUCCESS;
    case OPT_NO_CACHE:
        o->no_cache = true;
        return CLMOE_SUCCESS;
    case ':':
    case '?':
        return option_refused(argv, option);
    default:
        return parse_number(o, option, optarg);
    }
}

static bool same_file(const char *a, const char *b) {
    struct stat first, second;
    return stat(a, &first) == 0 && stat(b, &second) == 0 && first.st_dev == second.st_dev &&
           first.st_ino == second.st_ino;
}

static clmoe_status check_options(const run_options *o) {
    const char *missing = o->model == NULL    ? "MODEL_DIR"
                          : !o->layer_given   ? "--layer"
                          : o->input == NULL  ? "--input"
                          : o->tensor == NULL ? "--tensor"
                                              : NULL;
    if (missing != NULL)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is missing; see --help", missing);
    if (o->tolerance_given && o->expect == NULL)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "--tolerance needs --expect, the tensor to compare with");
    if (o->stats && o->json)
        return fail(CLMOE_INVALID_ARGUMENT, "--stats is text, and does not go with --json");
    if (o->output != NULL && same_file(o->output, o->input))
        return fail(CLMOE_INVALID_ARGUMENT, "--output %s is the same file as --input", o->output);
    return CLMOE_SUCCESS;
}

static parse_result parse_options(run_options *o, int argc, char **argv) {
    int option;
    opterr = 0;
    while ((option = getopt_long(argc, argv, ":h", long_options, NULL)) != -1) {
        if (option == 'h') {
            fputs(usage, stdout);
            return PARSE_STOP;
        }
        if (option == OPT_VERSION) {
            print_version();
            return PARSE_STOP;
        }
        if (parse_option(o, option, argv) != CLMOE_SUCCESS)
            return PARSE_BAD;
    }
    if (!o->tolerance_given)
        o->tolerance = default_tolerance(o->dtype);
    o->model = optind < argc ? argv[optind] : NULL;
    if (optind + 1 < argc) {
        fail(CLMOE_INVALID_ARGUMENT, "unexpected argument '%s'; see --help", argv[optind + 1]);
        return PARSE_BAD;
    }
    return check_options(o) == CLMOE_SUCCESS ? PARSE_RUN : PARSE_BAD;
}

static clmoe_status read_files(const run_options *o, run_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t expected = 0;
    TRY(open_model(o->model, o->assume, &s->checkpoint));
    TRY(clmoe_checkpoint_layer(s->checkpoint, o->layer, &s->desc));
    s->desc.engine = o->engine;
    s->desc.type = s->desc.weight_type = o->dtype;
    if (o->capacity_given) {
        s->desc.capacity.rows = 0;
        s->desc.capacity.factor = o->capacity_factor;
    }
    TRY(safetensors_open(o->input, &s->input));
    TRY(rows_read(s->input, o->tensor, s->desc.dim, &s->batch.tokens, &s->x));
    if (o->expect != NULL) {
        TRY(rows_read(s->input, o->expect, s->desc.dim, &expected, &s->expect));
        if (expected != s->batch.tokens)
            TRY(fail(CLMOE_BAD_FILE, "%s: tensor '%s' has %u tokens, but '%s' has %u", o->input,
                     o->expect, (unsigned)expected, o->tensor, (unsigned)s->batch.tokens));
    }
done:
    return status;
}

static clmoe_status open_device(const run_options *o, run_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(session_open(&s->device, o->device_given ? &o->device : NULL, !o->no_cache));
    snprintf(s->report.device, sizeof s->report.device, "%s", s->device.name);
done:
    return status;
}

static clmoe_status run_layer(const run_options *o, run_session *s) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t count = (size_t)s->batch.tokens * s->desc.dim;
    TRY(clmoe_layer_create(s->device.context, &s->desc, &s->layer));
    TRY(clmoe_checkpoint_upload(s->checkpoint, o->layer, &s->desc, s->device.cl, s->device.queue,
                                &s->weights));
    s->y = malloc(count > 0 ? count * sizeof(float) : 1);
    if (s->y == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "no memory for the result"));
    s->batch.layer = s->layer;
    s->batch.weights = &s->weights;
    s->batch.queue = s->device.queue;
    s->batch.losses = o->losses;
    s->batch.num_losses = o->num_losses;
    TRY(batch_create(&s->batch, s->device.cl, s->x));
    TRY(batch_forward(&s->batch, s->y, &s->stats));
    TRY(batch_losses(&s->batch, s->loss_values));
    TRY(batch_time(&s->batch, o->repeat, &s->report.times));
    if (o->output != NULL)
        TRY(safetensors_write_f32(o->output, "y", s->batch.tokens, s->desc.dim, s->y));
done:
    return status;
}

static clmoe_status print_report(const run_options *o, run_session *s) {
    run_report *report = &s->report;
    report->model_type = clmoe_checkpoint_model_type(s->checkpoint);
    report->assumed = clmoe_checkpoint_assumed(s->checkpoint, o->layer);
    report->layer = o->layer;
    report->engine = clmoe_layer_engine(s->layer);
    report->desc = &s->desc;
    report->tokens = s->batch.tokens;
    report->capacity = s->batch.capacity;
    report->stats = s->stats;
    report->stats_bytes = clmoe_stats_size(s->layer);
    report->all_stats = o->stats;
    report->losses = o->losses;
    report->num_losses = o->num_losses;
    report->loss_values = s->loss_values;
    report->repeat = o->repeat;
    report->checked = o->expect != NULL;
    report->tolerance = o->tolerance;
    if (report->checked)
        report->relative_error =
            relative_error(s->y, s->expect, (size_t)s->batch.tokens * s->desc.dim);
    /* Written so that NaN does not pass. */
    report->pass = report->relative_error <= report->tolerance;
    if (o->json)
        return report_json(report);
    return report_text(report);
}

static void release(run_session *s) {
    if (s->device.queue != NULL)
        clFinish(s->device.queue);
    batch_release(&s->batch);
    clmoe_weights_release(&s->weights);
    clmoe_layer_destroy(s->layer);
    session_close(&s->device);
    safetensors_close(s->input);
    clmoe_checkpoint_close(s->checkpoint);
    free(s->x);
    free(s->y);
    free(s->expect);
    free(s->stats);
}

int run_main(int argc, char **argv) {
    clmoe_status status = CLMOE_SUCCESS;
    run_options options = {.repeat = 1};
    run_session session = {0};
    parse_result parsed = parse_options(&options, argc, argv);
    if (parsed != PARSE_RUN)
        return parsed == PARSE_STOP ? EXIT_OK : exit_with_error("run");
    TRY(read_files(&options, &session));
    TRY(open_device(&options, &session));
    TRY(run_layer(&options, &session));
    TRY(print_report(&options, &session));
done:
    if (status != CLMOE_SUCCESS)
        exit_with_error("run");
    if (status == CLMOE_BUILD_FAILED && session.device.log != NULL)
        fputs(session.device.log, stderr);
    bool pass = !session.report.checked || session.report.pass;
    release(&session);
    return status != CLMOE_SUCCESS ? EXIT_BAD_INPUT : pass ? EXIT_OK : EXIT_MISMATCH;
}
