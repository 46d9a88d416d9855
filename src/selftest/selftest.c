/* clmoe_selftest(): layers, types, batches and engines, one after the other. */
#include "runtime/structs.h"
#include "runtime/types.h"
#include "trial.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_ENGINES = 16, MESSAGE_SIZE = 512 };

static const char reference[] = "ref";

/* One layer of the table with elements of one type, on each engine. */
typedef struct engine_layer {
    const char *name;
    clmoe_layer *layer; /* NULL: `status` and `message` say why */
    clmoe_status status;
    char message[MESSAGE_SIZE];
} engine_layer;

typedef struct run {
    clmoe_context *context;
    cl_command_queue queue;
    clmoe_selftest_options options;
    clmoe_selftest_summary summary;
    const selftest_layer *layer; /* at hand */
    clmoe_layer_desc desc;
    engine_layer engines[MOST_ENGINES]; /* ref is the first */
    size_t num_engines;
} run;

/* ---- Results --------------------------------------------------------------------------------- */

static uint32_t *counter(clmoe_selftest_summary *summary, clmoe_selftest_status status) {
    uint32_t *const counters[] = {[CLMOE_SELFTEST_PASSED] = &summary->passed,
                                  [CLMOE_SELFTEST_DIFFERS] = &summary->differs,
                                  [CLMOE_SELFTEST_SKIPPED] = &summary->skipped,
                                  [CLMOE_SELFTEST_FAILED] = &summary->failed};
    return counters[status];
}

/* Whether results of this engine are wanted; ref is also run for the others. */
static bool wanted(const run *r, const char *engine) {
    return !r->options.engine || strcmp(r->options.engine, engine) == 0;
}

/* Rows with a state are of the router, which the engines share: the first that is wanted. */
static bool runs(const run *r, const engine_layer *engine) {
    return !r->layer->state || engine == &r->engines[wanted(r, reference) ? 0 : 1];
}

static void report(run *r, const selftest_batch *batch, const engine_layer *engine,
                   clmoe_selftest_result *result) {
    if (!wanted(r, engine->name) || r->summary.stopped)
        return;
    result->struct_size = sizeof *result;
    result->layer = r->layer->name;
    result->batch = batch->name;
    result->engine = engine->name;
    result->type = r->desc.type;
    ++*counter(&r->summary, result->status);
    if (r->options.report && r->options.report(r->options.user, result) != 0)
        r->summary.stopped = 1;
}

/* What a failed call says. */
static void report_failure(run *r, const selftest_batch *batch, const engine_layer *engine,
                           clmoe_status status, const char *message) {
    clmoe_selftest_result result = {.status = status == CLMOE_UNSUPPORTED ? CLMOE_SELFTEST_SKIPPED
                                                                          : CLMOE_SELFTEST_FAILED,
                                    .array = "",
                                    .against = "",
                                    .message = message};
    report(r, batch, engine, &result);
}

static void report_verdict(run *r, const trial *t, const engine_layer *engine,
                           const trial_verdict *v) {
    char message[MESSAGE_SIZE] = "";
    const bool differs = trial_differs(v);
    if (differs)
        snprintf(message, sizeof message,
                 "%s against %s: norm %.3g of %.3g allowed, worst %.3g of %.3g; [%zu] is %.9g, not "
                 "%.9g",
                 trial_array_name(v->array), v->against, v->norm, v->norm_tolerance, v->worst,
                 v->worst_tolerance, v->at, v->got, v->want);
    clmoe_selftest_result result = {.status =
                                        differs ? CLMOE_SELFTEST_DIFFERS : CLMOE_SELFTEST_PASSED,
                                    .array = trial_array_name(v->array),
                                    .against = v->against,
                                    .norm_error = v->norm,
                                    .norm_tolerance = v->norm_tolerance,
                                    .worst_error = v->worst,
                                    .worst_tolerance = v->worst_tolerance,
                                    .message = message};
    report(r, t->batch, engine, &result);
}

/* ---- One batch ------------------------------------------------------------------------------- */

/* What one batch should give, and what it gives. */
typedef struct outcomes {
    trial_values host, ref, got, again;
    bool has_ref; /* ref ran, and agrees with the host */
} outcomes;

static clmoe_status outcomes_create(const trial *t, outcomes *o) {
    clmoe_status status = CLMOE_SUCCESS;
    trial_values *const all[] = {&o->host, &o->ref, &o->got, &o->again};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        TRY(trial_values_create(t, all[i]));
done:
    return status;
}

static void outcomes_release(outcomes *o) {
    trial_values_release(&o->host);
    trial_values_release(&o->ref);
    trial_values_release(&o->got);
    trial_values_release(&o->again);
}

/* Once more with packed weights, where the engine has such a form. */
static clmoe_status run_packed(run *r, const trial *t, engine_layer *engine, trial_values *got,
                               const trial_values *want, trial_verdict *worst) {
    const clmoe_status status = device_run(r->context, r->queue, engine->layer, t, true, got);
    if (status == CLMOE_SUCCESS)
        trial_compare(t, "host, packed weights", got, want, worst);
    return status == CLMOE_UNSUPPORTED ? CLMOE_SUCCESS : status;
}

/* The first engine is the one that the others are compared with. */
static void run_engine(run *r, const trial *t, engine_layer *engine, outcomes *o) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool is_ref = engine == &r->engines[0];
    trial_values *got = is_ref ? &o->ref : &o->got;
    trial_verdict verdict = {0};
    TRY(device_run(r->context, r->queue, engine->layer, t, false, got));
    TRY(device_run(r->context, r->queue, engine->layer, t, false, &o->again));
    trial_compare(t, "host", got, &o->host, &verdict);
    if (o->has_ref)
        trial_compare(t, reference, got, &o->ref, &verdict);
    o->has_ref = o->has_ref || (is_ref && !trial_differs(&verdict));
    trial_compare_bits(t, &o->again, got, &verdict);
    TRY(run_packed(r, t, engine, &o->again, &o->host, &verdict));
    report_verdict(r, t, engine, &verdict);
done:
    if (status != CLMOE_SUCCESS)
        report_failure(r, t->batch, engine, status, clmoe_last_error());
}

static void run_engines(run *r, const trial *t, outcomes *o) {
    for (size_t i = 0; i < r->num_engines && !r->summary.stopped; i++) {
        engine_layer *engine = &r->engines[i];
        if (!runs(r, engine))
            continue;
        if (engine->layer)
            run_engine(r, t, engine, o);
        else
            report_failure(r, t->batch, engine, engine->status, engine->message);
    }
}

static void run_batch(run *r, const selftest_batch *batch) {
    clmoe_status status = CLMOE_SUCCESS;
    trial t = {.batch = batch, .state = r->layer->state, .desc = r->desc};
    outcomes o = {0};
    TRY(trial_make(&t));
    TRY(outcomes_create(&t, &o));
    TRY(host_run(&t, &o.host));
    run_engines(r, &t, &o);
done:
    if (status != CLMOE_SUCCESS)
        for (size_t i = 0; i < r->num_engines; i++)
            if (runs(r, &r->engines[i]))
                report_failure(r, batch, &r->engines[i], status, clmoe_last_error());
    outcomes_release(&o);
    trial_release(&t);
}

/* ---- Layers ---------------------------------------------------------------------------------- */

static void create_layers(run *r) {
    for (size_t i = 0; i < r->num_engines; i++) {
        engine_layer *engine = &r->engines[i];
        clmoe_layer_desc desc = r->desc;
        if (!runs(r, engine))
            continue;
        desc.engine = engine->name;
        engine->message[0] = '\0';
        engine->status = clmoe_layer_create(r->context, &desc, &engine->layer);
        if (engine->status != CLMOE_SUCCESS)
            snprintf(engine->message, sizeof engine->message, "%s", clmoe_last_error());
    }
}

static void destroy_layers(run *r) {
    for (size_t i = 0; i < r->num_engines; i++) {
        clmoe_layer_destroy(r->engines[i].layer);
        r->engines[i].layer = NULL;
    }
}

static void run_layer(run *r, const selftest_layer *layer, clmoe_type type) {
    r->layer = layer;
    trial_desc(layer, type, &r->desc);
    create_layers(r);
    for (size_t i = 0; i < selftest_num_batches && !r->summary.stopped; i++)
        if (layer->logits || selftest_batches[i].kind <= BATCH_MASKED)
            run_batch(r, &selftest_batches[i]);
    destroy_layers(r);
}

static bool layer_wanted(const run *r, const selftest_layer *layer) {
    return !r->options.layer || strstr(layer->name, r->options.layer);
}

static void run_all(run *r) {
    for (size_t i = 0; i < selftest_num_layers; i++)
        for (clmoe_type type = CLMOE_F32; type <= CLMOE_BF16; type++)
            if (layer_wanted(r, &selftest_layers[i]) && !r->summary.stopped &&
                (type == CLMOE_F32 || selftest_layers[i].every_type))
                run_layer(r, &selftest_layers[i], type);
}

/* ---- The call -------------------------------------------------------------------------------- */

/* ref, then those that are wanted; an engine that there is not is an error. */
static clmoe_status list_engines(run *r) {
    const char *name = NULL;
    bool found = false;
    r->engines[r->num_engines++].name = reference;
    for (uint32_t i = 0; (name = clmoe_engine_name(r->context, i, NULL)) != NULL; i++) {
        found = found || wanted(r, name);
        if (strcmp(name, reference) != 0 && wanted(r, name) && r->num_engines < MOST_ENGINES)
            r->engines[r->num_engines++].name = name;
    }
    if (!found)
        return fail(CLMOE_INVALID_ARGUMENT, "options.engine is \"%.64s\", which is no engine",
                    r->options.engine);
    return CLMOE_SUCCESS;
}

static clmoe_status check_layer(const run *r) {
    for (size_t i = 0; i < selftest_num_layers; i++)
        if (layer_wanted(r, &selftest_layers[i]))
            return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "options.layer is \"%.64s\", which is part of no layer",
                r->options.layer);
}

static clmoe_status take_arguments(run *r, clmoe_context *context,
                                   const clmoe_selftest_options *options,
                                   const clmoe_selftest_summary *summary) {
    clmoe_status status = CLMOE_SUCCESS;
    r->context = context;
    if (!context)
        return fail(CLMOE_INVALID_ARGUMENT, "context is NULL");
    TRY(struct_take(CLMOE_INVALID_ARGUMENT, "summary", summary, &r->summary, sizeof r->summary));
    if (options)
        TRY(struct_take(CLMOE_INVALID_ARGUMENT, "options", options, &r->options,
                        sizeof r->options));
    r->summary = (clmoe_selftest_summary){.struct_size = summary->struct_size};
    TRY(list_engines(r));
    TRY(check_layer(r));
done:
    return status;
}

clmoe_status clmoe_selftest(clmoe_context *context, const clmoe_selftest_options *options,
                            clmoe_selftest_summary *summary) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    const error_sentence kept = error_keep();
    run *r = calloc(1, sizeof *r);
    if (!r)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the self-test");
    TRY(take_arguments(r, context, options, summary));
    r->queue = clCreateCommandQueue(context->cl, context->device, 0, &code);
    TRY(clmoe_cl_check(code, "clCreateCommandQueue"));
    run_all(r);
    struct_give(&r->summary, sizeof r->summary, summary, summary->struct_size);
    error_put_back(&kept);
done:
    if (r->queue)
        clReleaseCommandQueue(r->queue);
    free(r);
    return status;
}
