#include "measure.h"
#include "../src/cli/interrupt.h"
#include "check.h"
#include "peer.h"
#include "roofline.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* A row has enough samples after this long, but never fewer than the least. */
#define ENOUGH_MS 20000.0
enum { LEAST_SAMPLES = 3 };

/* Most steps that take turns with one another. */
enum { TOGETHER = 2 };

/* An engine that takes part in the case. */
typedef struct contender {
    const bench_engine *engine;
    subject subject;
    bench_peer peer;
} contender;

/* A contender on a step: what takes turns with others. */
typedef struct turn {
    contender *contender;
    bench_step step;
    double *samples, spent_ms;
    uint32_t count;
} turn;

typedef struct contest {
    measurement *m;
    const bench_case *of;
    contender contenders[MAX_ENGINES];
    size_t count;
    turn turns[TOGETHER * MAX_ENGINES]; /* of the current steps */
    size_t turn_count;
    double *samples; /* [TOGETHER * MAX_ENGINES, repeat] */
    reference reference;
    case_sizes sizes;
    int32_t *ids;   /* [T,K] */
    float *weights; /* [T,K] */
} contest;

static void skip(const measurement *m, const bench_case *c, const char *what) {
    (void)m;
    progress_clear();
    fprintf(stderr, "clmoe-bench: skipped %s T=%u%s%s: %s\n", c->name, (unsigned)c->tokens,
            what[0] ? ", " : "", what, cli_error());
}

/* ---- Setting up ------------------------------------------------------------------------------ */

/* The choices and how many experts they touch, from the first engine. */
static clmoe_status read_choices(contest *t, const subject *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t pairs = (size_t)t->of->tokens * t->of->top_k;
    uint32_t *load = calloc(t->of->experts, sizeof *load);
    if (!t->ids)
        t->ids = malloc(pairs * sizeof *t->ids);
    if (!t->weights)
        t->weights = malloc(pairs * sizeof *t->weights);
    if (!load || !t->ids || !t->weights)
        TRY(bench_no_memory("the choices"));
    TRY(subject_read(s, SUBJECT_IDS, 0, pairs * sizeof *t->ids, t->ids));
    TRY(subject_read(s, SUBJECT_WEIGHTS, 0, pairs * sizeof *t->weights, t->weights));
    t->sizes = (case_sizes){.element = type_bytes(t->m->inputs.type),
                            .weight = type_bytes(t->m->inputs.type),
                            .gradient = type_bytes(inputs_gradient_type(&t->m->inputs)),
                            .touched = count_load(t->ids, pairs, t->of->experts, load)};
done:
    free(load);
    return status;
}

/* Peers come last in the list: they take the choices of an engine. */
static clmoe_status enter_peer(contest *t, contender *c) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!t->ids) {
        subject router;
        TRY(subject_create(t->m->device, &t->m->inputs, NULL, &router));
        status = read_choices(t, &router);
        subject_release(&router);
        TRY(status);
    }
    TRY(peer_create(c->engine->name, t->m->device, &t->m->inputs, t->ids, t->weights, &c->peer));
done:
    return status;
}

static clmoe_status enter_engine(contest *t, contender *c) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(subject_create(t->m->device, &t->m->inputs, c->engine, &c->subject));
    if (!t->ids)
        TRY(read_choices(t, &c->subject));
done:
    return status;
}

static bool refused(clmoe_status status) {
    return status == CLMOE_UNSUPPORTED || status == CLMOE_INVALID_DESC ||
           status == CL_OUT_OF_RESOURCES || status == CL_MEM_OBJECT_ALLOCATION_FAILURE;
}

/* Routing does not depend on the engine: one stands for all, unless they were named. */
static bool takes_part(const contest *t, const bench_engine *engine) {
    const bool named = !list_is_all(t->m->options->engines);
    if (engine_is_peer(engine))
        return !t->of->routing_only;
    return !t->of->routing_only || named || t->count == 0;
}

static clmoe_status enter_all(contest *t) {
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t i = 0; i < t->m->engines.count; i++) {
        const bench_engine *engine = &t->m->engines.engines[i];
        contender *c = &t->contenders[t->count];
        if (!takes_part(t, engine))
            continue;
        c->engine = engine;
        progress_show(&t->m->progress, t->of->name, t->of->tokens, engine->name);
        status = engine_is_peer(engine) ? enter_peer(t, c) : enter_engine(t, c);
        if (refused(status))
            skip(t->m, t->of, engine->name);
        else if (status != CLMOE_SUCCESS)
            return status;
        else
            t->count++;
    }
    return CLMOE_SUCCESS;
}

static void leave_all(contest *t) {
    for (size_t i = 0; i < t->count; i++) {
        if (engine_is_peer(t->contenders[i].engine))
            peer_release(&t->contenders[i].peer);
        else
            subject_release(&t->contenders[i].subject);
    }
    free(t->samples);
    reference_free(&t->reference);
    free(t->ids);
    free(t->weights);
}

/* ---- Rows ------------------------------------------------------------------------------------ */

static bench_row row_of(const contest *t, const contender *c, bench_step step) {
    const measurement *m = t->m;
    bench_row row = {.case_name = t->of->name,
                     .pattern = pattern_names[m->inputs.pattern],
                     .dtype = type_names[m->inputs.type],
                     .step = step_names[step],
                     .tokens = t->of->tokens,
                     .dim = t->of->dim,
                     .hidden_dim = t->of->hidden_dim,
                     .experts = t->of->experts,
                     .top_k = t->of->top_k};
    snprintf(row.engine, sizeof row.engine, "%s", c->engine->name);
    snprintf(row.device, sizeof row.device, "%s", m->device->name);
    snprintf(row.driver, sizeof row.driver, "%s", m->device->driver);
    if (step_makes_gradients(step))
        row.gradient_type = gradient_names[m->inputs.gradient_type];
    if (strcmp(c->engine->name, PEER_OPENBLAS) == 0)
        peer_openblas_name(row.driver, sizeof row.driver);
    return row;
}

static clmoe_status add_wrong(contest *t, const contender *c, bench_step step,
                              const check_result *result) {
    bench_row row = row_of(t, c, step);
    snprintf(row.error, sizeof row.error, "%s", result->wrong);
    return rows_add(&t->m->rows, &row);
}

/* The device's roofline is of memory and of f32 multiply-adds. */
static bool has_roofline(const bench_engine *engine, bench_step step) {
    return !step_runs_experts(step) || !engine_has_matrix_units(engine);
}

/* A layer whose choice is given has no scores. */
static double flops_of(const contest *t, bench_step step) {
    const bool scores = step != STEP_LAYER || !pattern_is_forced(t->m->inputs.pattern);
    return case_flops(t->of, step) - (scores ? 0 : case_flops(t->of, STEP_SCORE));
}

static clmoe_status add_timed(contest *t, turn *u) {
    const double bytes = case_bytes(t->of, u->step, &t->sizes), flops = flops_of(t, u->step);
    bench_row row = row_of(t, u->contender, u->step);
    row.checked = true;
    row_set_times(&row, u->samples, u->count);
    row.gbytes_per_s = bytes / row.median_ms * 1e-6;
    row.gflops = flops / row.median_ms * 1e-6;
    row.percent_of_peak = has_roofline(u->contender->engine, u->step)
                              ? 100 * roofline_ms(t->m->device, bytes, flops) / row.median_ms
                              : NAN;
    return rows_add(&t->m->rows, &row);
}

/* ---- Steps ----------------------------------------------------------------------------------- */

/*
 * Engines that gather have no dispatch in the layer; it is timed if it was named. The backward pass
 * reads no packed weights.
 */
static bool has_step(const contest *t, const contender *c, bench_step step) {
    if (engine_is_peer(c->engine))
        return peer_has_step(c->engine->name, step);
    if (step_is_backward(step) && c->engine->packed)
        return false;
    return step != STEP_DISPATCH || c->subject.dispatches || !list_is_all(t->m->options->steps);
}

static clmoe_status check_contender(contest *t, contender *c, bench_step step,
                                    check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!engine_is_peer(c->engine))
        return check_step(&c->subject, &t->reference, step, result);
    TRY(peer_prepare(&c->peer, step));
    TRY(peer_run(&c->peer, step));
    TRY(peer_check(&c->peer, step, &t->reference, result));
done:
    return status;
}

/* Runs the step once and looks at the result: what is right will be timed. */
static clmoe_status add_turn(contest *t, contender *c, bench_step step) {
    clmoe_status status = CLMOE_SUCCESS;
    check_result result = {""};
    if (!has_step(t, c, step))
        return CLMOE_SUCCESS;
    status = check_contender(t, c, step, &result);
    if (refused(status)) {
        skip(t->m, t->of, step_names[step]);
        return CLMOE_SUCCESS;
    }
    TRY(status);
    if (result.wrong[0] != '\0')
        return add_wrong(t, c, step, &result);
    t->turns[t->turn_count] = (turn){.contender = c, .step = step};
    t->turns[t->turn_count].samples = t->samples + t->turn_count * t->m->options->repeat;
    t->turn_count++;
done:
    return status;
}

static void pause_ms(long milliseconds) {
    const struct timespec time = {.tv_sec = 0, .tv_nsec = milliseconds * 1000000};
    nanosleep(&time, NULL);
}

/* Expert weights come from memory, not from a cache that an earlier run left. */
static clmoe_status time_once(const contest *t, contender *c, bench_step step, double *ms) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!engine_is_peer(c->engine))
        TRY(subject_prepare(&c->subject, step));
    if (step_runs_experts(step))
        TRY(device_forget(t->m->device));
    TRY(CL(clFinish(t->m->device->queue)));
    if (!engine_is_peer(c->engine))
        return subject_time(&c->subject, step, ms);
    const double begin = host_ms();
    TRY(peer_run(&c->peer, step));
    *ms = host_ms() - begin;
    if (!c->peer.is_clblast)
        pause_ms(PEER_PAUSE_MS);
done:
    return status;
}

static bool enough(const turn *u, uint32_t repeat) {
    return u->count == repeat || (u->count >= LEAST_SAMPLES && u->spent_ms > ENOUGH_MS);
}

/*
 * In turns, so that what disturbs the machine disturbs all; the first round warms up. After a
 * signal what was timed often enough counts.
 */
static clmoe_status time_in_turns(contest *t) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t repeat = t->m->options->repeat;
    for (uint32_t round = 0; round <= repeat; round++)
        for (size_t i = 0; i < t->turn_count; i++) {
            turn *u = &t->turns[i];
            double ms = 0;
            if (enough(u, repeat) || interrupt_signal() != 0)
                continue;
            TRY(time_once(t, u->contender, u->step, &ms));
            u->spent_ms += ms;
            if (round > 0)
                u->samples[u->count++] = ms;
        }
done:
    return status;
}

static bool step_chosen(const measurement *m, const bench_case *c, bench_step step) {
    const char *steps = m->options->steps;
    return case_has_step(c, step) && pattern_has_step(m->options->pattern, step) &&
           (list_has(steps, step_names[step]) || (list_is_all(steps) && !step_is_by_name(step)));
}

/* Those of `count` steps from `first` on that are chosen. */
static clmoe_status measure_together(contest *t, bench_step first, int count) {
    clmoe_status status = CLMOE_SUCCESS;
    t->turn_count = 0;
    for (int step = (int)first; step < (int)first + count; step++) {
        if (!step_chosen(t->m, t->of, (bench_step)step))
            continue;
        progress_show(&t->m->progress, t->of->name, t->of->tokens, step_names[step]);
        for (size_t i = 0; i < t->count; i++) {
            TRY(bench_go_on());
            TRY(add_turn(t, &t->contenders[i], (bench_step)step));
        }
        t->m->progress.done++;
    }
    TRY(time_in_turns(t));
    for (size_t i = 0; i < t->turn_count; i++)
        if (t->turns[i].count >= LEAST_SAMPLES || t->turns[i].count == t->m->options->repeat)
            TRY(add_timed(t, &t->turns[i]));
    TRY(bench_go_on());
done:
    return status;
}

size_t measure_steps(const measurement *m, const bench_case *c) {
    size_t steps = 0;
    for (int step = 0; step < STEP_COUNT; step++)
        steps += step_chosen(m, c, (bench_step)step);
    return steps;
}

static bool has_backward(const measurement *m, const bench_case *c) {
    for (int step = 0; step < STEP_COUNT; step++)
        if (step_is_backward((bench_step)step) && step_chosen(m, c, (bench_step)step))
            return true;
    return false;
}

/* The layer without balance and the layer with it take turns: their difference is what counts. */
static clmoe_status measure_all(contest *t) {
    clmoe_status status = CLMOE_SUCCESS;
    int together = 1;
    t->samples = calloc((size_t)TOGETHER * MAX_ENGINES * t->m->options->repeat, sizeof(double));
    if (!t->samples)
        TRY(bench_no_memory("times"));
    for (int step = 0; step < STEP_COUNT; step += together) {
        together = step == STEP_TRAIN ? TOGETHER : 1;
        TRY(measure_together(t, (bench_step)step, together));
    }
done:
    return status;
}

clmoe_status measure_case(measurement *m, const bench_case *c) {
    clmoe_status status = CLMOE_SUCCESS;
    contest *t = calloc(1, sizeof *t);
    const size_t done_after = m->progress.done + measure_steps(m, c);
    if (!t)
        return bench_no_memory("a case");
    t->m = m;
    t->of = c;
    progress_show(&m->progress, c->name, c->tokens, "inputs");
    TRY(bench_go_on());
    status = inputs_set(&m->inputs, m->device, c, m->options->pattern, m->options->type);
    m->inputs.gradient_type = m->options->gradient_type;
    if (refused(status)) {
        skip(m, c, "");
        status = CLMOE_SUCCESS;
        goto done;
    }
    TRY(status);
    TRY(enter_all(t));
    if (t->count > 0) {
        progress_show(&m->progress, c->name, c->tokens, "reference");
        TRY(reference_make(&m->inputs, &t->reference));
        if (has_backward(m, c))
            TRY(reference_backward(&m->inputs, &t->reference));
        TRY(measure_all(t));
    }
done:
    m->progress.done = done_after;
    leave_all(t);
    free(t);
    return status;
}
