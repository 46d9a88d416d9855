#include "tune.h"
#include "check.h"
#include "rows.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_SIZES = 3, MAX_VALUES = 4 };

/* A challenger must be this much faster in most rounds, so that noise does not choose. */
#define BETTER 0.97

/* An engine and what it can be given, see context.h; the first value is where the search begins. */
typedef struct tunable {
    bench_engine engine;
    struct {
        const char *name;
        uint32_t values[MAX_VALUES]; /* ended by 0, or full */
    } sizes[MAX_SIZES];
} tunable;

static const tunable tunables[] = {
    {{"cpu-packed", "cpu", true}, {{"rows", {160, 40, 80, 320}}, {"depth", {128, 256, 512}}}},
    {{"tiled", "tiled", false},
     {{"rows", {64, 32, 128}}, {"columns", {64, 32}}, {"depth", {16, 8, 32}}}},
};

/* What an engine is measured on, unless a case is named: many rows per expert. */
static const struct {
    const char *name;
    uint32_t tokens;
} usual_case[] = {{"olmoe", 8192}, {"scaling-tokens", 4096}}; /* on GPUs, on CPUs */

/* An engine with some sizes, ready to run. */
typedef struct candidate {
    uint32_t values[MAX_SIZES];
    bench_device device; /* the device with a clmoe context of its own */
    subject subject;
    double *samples;
    bench_row times;
} candidate;

typedef struct search {
    const bench_options *options;
    json_t *root; /* the tuning file */
    FILE *log;    /* what was measured is told here */
    bench_device *device;
    const tunable *of;
    inputs inputs;
    reference reference;
} search;

/* ---- Tuning files ---------------------------------------------------------------------------- */

static const char *type_of(const bench_device *device) {
    cl_device_type type = 0;
    clGetDeviceInfo(device->id, CL_DEVICE_TYPE, sizeof type, &type, NULL);
    return type & CL_DEVICE_TYPE_CPU ? "cpu" : type & CL_DEVICE_TYPE_GPU ? "gpu" : "other";
}

static json_t *entry_of(const search *s, const uint32_t *sizes) {
    json_t *entry = json_object();
    json_object_set_new(entry, "device", json_string(s->device->name));
    json_object_set_new(entry, "type", json_string(type_of(s->device)));
    json_object_set_new(entry, "engine", json_string(s->of->engine.library));
    for (size_t i = 0; i < MAX_SIZES && s->of->sizes[i].name; i++)
        json_object_set_new(entry, s->of->sizes[i].name, json_integer(sizes[i]));
    return entry;
}

/* What the entry was measured with: for the reader, the library ignores it. */
static void describe(const search *s, const candidate *best, json_t *entry) {
    char date[16] = "", what[96];
    const time_t now = time(NULL);
    struct tm utc;
    if (gmtime_r(&now, &utc))
        strftime(date, sizeof date, "%Y-%m-%d", &utc);
    snprintf(what, sizeof what, "%s, %u tokens, %s: %.3f ms", s->inputs.of.name,
             (unsigned)s->inputs.of.tokens, type_names[s->inputs.type], best->times.median_ms);
    json_object_set_new(entry, "driver", json_string(s->device->driver));
    json_object_set_new(entry, "measured", json_string(what));
    json_object_set_new(entry, "date", json_string(date));
}

static bool same_text(const json_t *a, const json_t *b, const char *field) {
    return json_equal(json_object_get(a, field), json_object_get(b, field)) != 0;
}

/* The tuning file as it is, or an empty one. */
static clmoe_status read_file(const output *file, json_t **root) {
    json_error_t error;
    *root = file->exists ? json_load_file(file->path, 0, &error) : json_pack("{s:[]}", "tuning");
    if (json_is_array(json_object_get(*root, "tuning")))
        return CLMOE_SUCCESS;
    return cli_fail(CLMOE_BAD_FILE, "%s is not a tuning file", file->path);
}

/* Puts the entry, which it takes over, in the place of an older one of its device and engine. */
static void keep_entry(json_t *root, json_t *entry) {
    json_t *entries = json_object_get(root, "tuning");
    for (size_t i = json_array_size(entries); i-- > 0;) {
        const json_t *other = json_array_get(entries, i);
        if (same_text(other, entry, "device") && same_text(other, entry, "engine"))
            json_array_remove(entries, i);
    }
    json_array_append_new(entries, entry);
}

/* ---- Candidates ------------------------------------------------------------------------------ */

static clmoe_status open_context(const search *s, candidate *c) {
    clmoe_status status = CLMOE_SUCCESS;
    char path[] = "/tmp/clmoe-tune-XXXXXX";
    const int file = mkstemp(path);
    json_t *root = json_pack("{s:[o]}", "tuning", entry_of(s, c->values));
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    options.tuning_file = path;
    c->device = *s->device;
    c->device.clmoe = NULL;
    if (file < 0)
        TRY(cli_fail(CLMOE_IO, "cannot create %s", path));
    if (json_dumpfd(root, file, 0) != 0)
        TRY(cli_fail(CLMOE_IO, "cannot write %s", path));
    TRY(LIB(clmoe_context_create(s->device->cl, s->device->id, &options, &c->device.clmoe)));
done:
    if (file >= 0) {
        close(file);
        unlink(path);
    }
    json_decref(root);
    return status;
}

static void candidate_release(candidate *c) {
    subject_release(&c->subject);
    clmoe_context_destroy(c->device.clmoe);
    free(c->samples);
    *c = (candidate){0};
}

/* c->values are set. */
static clmoe_status candidate_create(const search *s, candidate *c) {
    clmoe_status status = CLMOE_SUCCESS;
    check_result result = {""};
    TRY(open_context(s, c));
    c->samples = calloc(s->options->repeat, sizeof *c->samples);
    if (!c->samples)
        TRY(bench_no_memory("times"));
    TRY(subject_create(&c->device, &s->inputs, &s->of->engine, &c->subject));
    TRY(check_step(&c->subject, &s->reference, STEP_EXPERTS, &result));
    if (result.wrong[0] != '\0')
        TRY(cli_fail(CLMOE_ENGINE_FAILED, "%s is wrong: %s", s->of->engine.name, result.wrong));
done:
    return status;
}

/* Both in turns; the first round warms up. *ratio: the median over the rounds of b's time by a's.
 */
static clmoe_status compare(const search *s, candidate *a, candidate *b, double *ratio) {
    clmoe_status status = CLMOE_SUCCESS;
    candidate *const both[] = {a, b};
    const uint32_t repeat = s->options->repeat;
    bench_row ratios = {0};
    double *each = calloc(repeat, sizeof *each);
    if (!each)
        TRY(bench_no_memory("times"));
    for (uint32_t round = 0; round <= repeat; round++)
        for (size_t i = 0; i < COUNT_OF(both); i++) {
            double ms = 0;
            TRY(bench_go_on());
            TRY(device_forget(s->device));
            TRY(CL(clFinish(s->device->queue)));
            TRY(subject_time(&both[i]->subject, STEP_EXPERTS, &ms));
            if (round > 0)
                both[i]->samples[round - 1] = ms;
        }
    for (uint32_t i = 0; i < repeat; i++)
        each[i] = b->samples[i] / a->samples[i];
    row_set_times(&ratios, each, repeat);
    *ratio = ratios.median_ms;
    for (size_t i = 0; i < COUNT_OF(both); i++)
        row_set_times(&both[i]->times, both[i]->samples, repeat);
done:
    free(each);
    return status;
}

/* ---- The search ------------------------------------------------------------------------------ */

/* Takes one value of one size against the best so far. */
static clmoe_status challenge(const search *s, size_t size, uint32_t value, candidate *best) {
    clmoe_status status = CLMOE_SUCCESS;
    double ratio = 1;
    candidate *other = calloc(1, sizeof *other);
    if (!other)
        return bench_no_memory("a candidate");
    memcpy(other->values, best->values, sizeof other->values);
    other->values[size] = value;
    TRY(candidate_create(s, other));
    TRY(compare(s, best, other, &ratio));
    fprintf(s->log, "%-6s %-7s %3u: %9.3f ms, %3u: %9.3f ms, ratio %.3f\n", s->of->engine.library,
            s->of->sizes[size].name, (unsigned)best->values[size], best->times.median_ms,
            (unsigned)value, other->times.median_ms, ratio);
    fflush(s->log);
    if (ratio < BETTER) {
        const candidate loser = *best;
        *best = *other;
        *other = loser;
        best->subject.device = &best->device;
        other->subject.device = &other->device;
    }
done:
    candidate_release(other);
    free(other);
    return status;
}

/* One size after another, each with what the ones before it have found. */
static clmoe_status search_sizes(const search *s) {
    clmoe_status status = CLMOE_SUCCESS;
    candidate best = {0};
    json_t *entry = NULL;
    for (size_t i = 0; i < MAX_SIZES; i++)
        best.values[i] = s->of->sizes[i].values[0];
    TRY(candidate_create(s, &best));
    for (size_t i = 0; i < MAX_SIZES && s->of->sizes[i].name; i++)
        for (size_t j = 1; j < MAX_VALUES && s->of->sizes[i].values[j]; j++)
            TRY(challenge(s, i, s->of->sizes[i].values[j], &best));
    entry = entry_of(s, best.values);
    describe(s, &best, entry);
    keep_entry(s->root, entry);
done:
    candidate_release(&best);
    return status;
}

static bool engine_runs(const search *s, const tunable *of) {
    const char *name;
    uint32_t supported = 0;
    const char *engines = s->options->engines;
    if (!list_is_all(engines) && !list_has(engines, of->engine.library))
        return false;
    for (uint32_t i = 0; (name = clmoe_engine_name(s->device->clmoe, i, &supported)) != NULL; i++)
        if (supported && strcmp(name, of->engine.library) == 0)
            return true;
    return false;
}

static const bench_case *choose_case(const bench_options *options, bool cpu) {
    const bool usual = list_is_all(options->cases);
    const bench_case *c = bench_cases;
    while (c->name && (usual ? strcmp(c->name, usual_case[cpu].name) != 0 ||
                                   c->tokens != usual_case[cpu].tokens
                             : !options_choose(options, c, cpu)))
        c++;
    return c->name && !c->routing_only ? c : NULL;
}

/* *tuned: how many engines were. */
static clmoe_status search_engines(search *s, size_t *tuned) {
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t i = 0; i < COUNT_OF(tunables); i++) {
        s->of = &tunables[i];
        if (!engine_runs(s, s->of))
            continue;
        TRY(search_sizes(s));
        ++*tuned;
    }
    if (*tuned == 0)
        TRY(cli_fail(CLMOE_UNSUPPORTED, "nothing to tune: only cpu and tiled have sizes"));
done:
    return status;
}

/* Errors and signals too leave the engines tuned so far. */
clmoe_status tune(bench_options *options) {
    clmoe_status status = CLMOE_SUCCESS;
    bench_device device = {0};
    search s = {.options = options, .device = &device};
    size_t tuned = 0;
    s.log = options->file.to_stdout ? stderr : stdout;
    TRY(read_file(&options->file, &s.root));
    TRY(device_open(options->device, &device));
    TRY(options_check_cases(options, device.cpu));
    const bench_case *c = choose_case(options, device.cpu);
    if (!c)
        TRY(cli_fail(CLMOE_INVALID_ARGUMENT, "--tune needs a case with experts"));
    TRY(device_prepare(&device));
    TRY(inputs_set(&s.inputs, &device, c, options->pattern, options->type));
    TRY(reference_make(&s.inputs, &s.reference));
    TRY(search_engines(&s, &tuned));
done:
    if (tuned > 0) {
        const clmoe_status written = write_json(s.root, &options->file);
        status = status == CLMOE_SUCCESS ? written : status;
    }
    json_decref(s.root);
    reference_free(&s.reference);
    inputs_release(&s.inputs);
    device_close(&device);
    return status;
}
