#include "check.h"

#include "ref.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Routing weights and logits are f32 whatever the storage type. */
#define ROUTING_TOLERANCE 1e-5

void complain(check_result *result, const char *format, ...) {
    va_list list;
    if (result->wrong[0] != '\0')
        return;
    va_start(list, format);
    vsnprintf(result->wrong, sizeof result->wrong, format, list);
    va_end(list);
}

void check_row(const char *what, const float *got, const double *want, size_t n, double tolerance,
               check_result *result) {
    double error = 0, size = 0;
    for (size_t i = 0; i < n; i++) {
        const double difference = (double)got[i] - want[i];
        error += difference * difference;
        size += want[i] * want[i];
    }
    if (!(sqrt(error) <= tolerance * sqrt(size)))
        complain(result, "%s: relative error %.2e, tolerance %.1e", what, sqrt(error / size),
                 tolerance);
}

void check_words(const char *what, const void *got, const void *want, size_t n,
                 check_result *result) {
    const int32_t *words = got, *wanted = want;
    for (size_t i = 0; i < n; i++)
        if (words[i] != wanted[i])
            complain(result, "%s[%zu] is %d, but must be %d", what, i, (int)words[i],
                     (int)wanted[i]);
}

void check_pairs(const char *what, const bench_case *c, const reference *ref,
                 const uint32_t *pair_of, const float *out, check_result *result) {
    const uint32_t pairs = c->tokens * c->top_k;
    result->wrong[0] = '\0';
    for (uint32_t i = 0; i < pairs; i++)
        for (uint32_t n = 0; n < ref->count; n++)
            if (pair_of[i] / c->top_k == ref->token[n])
                check_row(what, out + (size_t)i * c->dim,
                          ref->experts + ((size_t)n * c->top_k + pair_of[i] % c->top_k) * c->dim,
                          c->dim, ref->tolerance, result);
}

uint32_t count_load(const int32_t *ids, size_t pairs, uint32_t experts, uint32_t *load) {
    uint32_t touched = 0;
    memset(load, 0, experts * sizeof *load);
    for (size_t p = 0; p < pairs; p++)
        if (ids[p] >= 0 && ids[p] < (int32_t)experts && load[ids[p]]++ == 0)
            touched++;
    return touched;
}

void sort_pairs(const int32_t *ids, const bench_case *c, uint32_t *load, uint32_t *offset,
                uint32_t *pair_of) {
    const size_t pairs = (size_t)c->tokens * c->top_k;
    uint32_t place = 0;
    count_load(ids, pairs, c->experts, load);
    for (uint32_t e = 0; e < c->experts; e++) {
        offset[e] = place;
        place += load[e];
    }
    for (uint32_t p = 0; p < pairs; p++)
        pair_of[offset[ids[p]]++] = p;
    for (uint32_t e = 0; e < c->experts; e++)
        offset[e] -= load[e];
}

/* ---- Rows ---------------------------------------------------------------------------------- */

/* An f16 or bf16 value as f32. */
static float from_half(uint16_t half, clmoe_type type) {
    const uint32_t sign = (uint32_t)(half & 0x8000U) << 16, exponent = (half >> 10) & 31U;
    const uint32_t mantissa = half & 0x3ffU;
    uint32_t bits = (uint32_t)half << 16;
    float value;
    if (type == CLMOE_F16 && exponent == 0)
        return (sign ? -1.0F : 1.0F) * (float)mantissa * 0x1p-24F;
    if (type == CLMOE_F16)
        bits = sign | (exponent == 31 ? 0x7f800000U : (exponent + 112) << 23) | mantissa << 13;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void check_widen(clmoe_type type, const uint16_t *halves, size_t n, float *to) {
    for (size_t i = 0; i < n; i++)
        to[i] = from_half(halves[i], type);
}

clmoe_status check_read_row(const bench_device *device, clmoe_type type, cl_mem buffer, size_t row,
                            size_t n, float *to) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t bytes = n * type_bytes(type);
    uint16_t *halves = calloc(n, sizeof *halves);
    if (!halves)
        TRY(bench_no_memory("a row"));
    TRY(CL(clEnqueueReadBuffer(device->queue, buffer, CL_TRUE, row * bytes, bytes,
                               type == CLMOE_F32 ? (void *)to : halves, 0, NULL, NULL)));
    if (type != CLMOE_F32)
        check_widen(type, halves, n, to);
done:
    free(halves);
    return status;
}

/* A row of a buffer of the layer's type. */
static clmoe_status read_row(const subject *s, subject_buffer which, size_t row, size_t n,
                             float *to) {
    return check_read_row(s->device, s->in->type, s->buffers[which], row, n, to);
}

/* y of the step combine or of the whole layer. */
static clmoe_status check_y(const subject *s, const reference *ref, subject_buffer which,
                            check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t dim = s->in->of.dim;
    float *row = calloc(dim, sizeof *row);
    if (!row)
        TRY(bench_no_memory("a row"));
    for (uint32_t n = 0; n < ref->count; n++) {
        TRY(read_row(s, which, ref->token[n], dim, row));
        check_row("y", row, ref->y + n * dim, dim, ref->tolerance, result);
    }
done:
    free(row);
    return status;
}

/* The slot of a pair; -1 if the plan gives it none, or one out of range. */
static clmoe_status read_slot(const subject *s, size_t pair, int32_t *slot) {
    clmoe_status status =
        subject_read(s, SUBJECT_PLAN, s->plan.slot_of + pair * sizeof *slot, sizeof *slot, slot);
    if (*slot < 0 || (uint32_t)*slot >= s->plan.slots)
        *slot = -1;
    return status;
}

/* xe: the tokens' rows of x; ye: the experts' outputs. */
static clmoe_status check_slots(const subject *s, const reference *ref, subject_buffer which,
                                check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &s->in->of;
    float *row = calloc(c->dim, sizeof *row);
    double *x = calloc(c->dim, sizeof *x);
    if (!row || !x)
        TRY(bench_no_memory("a row"));
    for (uint32_t p = 0; p < ref->count * c->top_k; p++) {
        const size_t token = ref->token[p / c->top_k];
        int32_t slot = -1;
        TRY(read_slot(s, token * c->top_k + p % c->top_k, &slot));
        if (slot < 0) {
            complain(result, "a pair of token %zu has no slot", token);
            continue;
        }
        TRY(read_row(s, which, (size_t)slot, c->dim, row));
        for (uint32_t d = 0; which == SUBJECT_XE && d < c->dim; d++)
            x[d] = (double)value_at(&s->in->x, token * c->dim + d);
        if (which == SUBJECT_XE)
            check_row("xe", row, x, c->dim, 0, result);
        else
            check_row("ye", row, ref->experts + (size_t)p * c->dim, c->dim, ref->tolerance, result);
    }
done:
    free(row);
    free(x);
    return status;
}

/* ---- Routing ------------------------------------------------------------------------------- */

static clmoe_status check_scores(const subject *s, const reference *ref, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t experts = s->in->of.experts;
    float *row = calloc(experts, sizeof *row);
    if (!row)
        TRY(bench_no_memory("a row of scores"));
    for (uint32_t n = 0; n < ref->count; n++) {
        const size_t first = (size_t)n * experts;
        const size_t bytes = experts * sizeof *row, offset = ref->token[n] * bytes;
        TRY(subject_read(s, SUBJECT_LOGITS, offset, bytes, row));
        check_row("logits", row, ref->logits + first, experts, ROUTING_TOLERANCE, result);
        TRY(subject_read(s, SUBJECT_SCORES, offset, bytes, row));
        check_row("scores", row, ref->scores + first, experts, ROUTING_TOLERANCE, result);
    }
done:
    free(row);
    return status;
}

static clmoe_status check_choice(const subject *s, const reference *ref, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t top_k = s->in->of.top_k;
    const size_t bytes = top_k * sizeof(float);
    int32_t *ids = calloc(top_k, sizeof *ids);
    float *weights = calloc(top_k, sizeof *weights);
    if (!ids || !weights)
        TRY(bench_no_memory("a token's choice"));
    for (uint32_t n = 0; n < ref->count; n++) {
        TRY(subject_read(s, SUBJECT_IDS, ref->token[n] * bytes, bytes, ids));
        TRY(subject_read(s, SUBJECT_WEIGHTS, ref->token[n] * bytes, bytes, weights));
        for (uint32_t k = 0; k < top_k; k++)
            if (ids[k] != ref->ids[n * top_k + k])
                complain(result, "choice %u of token %u is expert %d, but must be %d", (unsigned)k,
                         (unsigned)ref->token[n], (int)ids[k], (int)ref->ids[n * top_k + k]);
        check_row("weights", weights, ref->weights + (size_t)n * top_k, top_k, ROUTING_TOLERANCE,
                  result);
    }
done:
    free(ids);
    free(weights);
    return status;
}

static void compare_plans(const subject *s, const char *got, const ref_plan *want,
                          check_result *result) {
    const clmoe_plan_layout *at = &s->plan;
    const size_t experts = s->in->of.experts;
    check_words("load", got + at->load, want->load, experts, result);
    check_words("kept", got + at->kept, want->kept, experts, result);
    check_words("offsets", got + at->offsets, want->offsets, experts + 1, result);
    check_words("slot_of", got + at->slot_of, want->slot_of, at->pairs, result);
    check_words("pair_of", got + at->pair_of, want->pair_of, at->slots, result);
    check_words("token_of", got + at->token_of, want->token_of, at->slots, result);
    check_words("tile_expert", got + at->tile_expert, want->tile_expert, at->slots / at->row_tile,
                result);
}

/* The plan of a dropless layer, read back whole, for the ids that are there. */
static clmoe_status check_plan(const subject *s, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc desc = inputs_desc(s->in, NULL);
    const size_t bytes = s->plan.pairs * sizeof(int32_t);
    char *got = malloc(s->plan.bytes);
    int32_t *ids = malloc(bytes);
    ref_plan want = {.pairs = 0};
    if (!got || !ids)
        TRY(bench_no_memory("a plan"));
    TRY(subject_read(s, SUBJECT_PLAN, 0, s->plan.bytes, got));
    TRY(subject_read(s, SUBJECT_IDS, 0, bytes, ids));
    for (uint32_t p = 0; p < s->plan.pairs; p++)
        if (ids[p] < 0 || (uint32_t)ids[p] >= s->in->of.experts)
            complain(result, "the id of pair %u is %d", (unsigned)p, (int)ids[p]);
    ref_plan_make(&desc,
                  &(ref_plan_in){.tokens = s->in->of.tokens,
                                 .slots = s->plan.slots,
                                 .row_tile = s->plan.row_tile,
                                 .ids = ids},
                  &want);
    compare_plans(s, got, &want, result);
done:
    free(got);
    free(ids);
    ref_plan_free(&want);
    return status;
}

static clmoe_status check_stats(const subject *s, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    measured m = {.device = s->device,
                  .of = &s->in->of,
                  .desc = inputs_desc(s->in, NULL),
                  .logits = s->buffers[SUBJECT_LOGITS],
                  .ids = s->buffers[SUBJECT_IDS],
                  .weights = s->buffers[SUBJECT_WEIGHTS],
                  .stats = s->buffers[SUBJECT_STATS]};
    TRY(LIB(clmoe_stats_size(s->layer, &m.stats_bytes)));
    TRY(check_balance(&m, result));
done:
    return status;
}

static clmoe_status check_routing(const subject *s, const reference *ref, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_choice(s, ref, result));
    TRY(check_plan(s, result));
done:
    return status;
}

clmoe_status check_outputs(subject *s, const reference *ref, bench_step step,
                           check_result *result) {
    result->wrong[0] = '\0';
    switch (step) {
    case STEP_LAYER:
        return check_y(s, ref, SUBJECT_Y, result);
    case STEP_SCORE:
        return check_scores(s, ref, result);
    case STEP_TOPK:
        return check_choice(s, ref, result);
    case STEP_PLAN:
        return check_plan(s, result);
    case STEP_ROUTING:
    case STEP_TOPK_TO_PLAN:
        return check_routing(s, ref, result);
    case STEP_DISPATCH:
        return check_slots(s, ref, SUBJECT_XE, result);
    case STEP_EXPERTS:
        return check_slots(s, ref, SUBJECT_YE, result);
    case STEP_COMBINE:
        return check_y(s, ref, SUBJECT_STEP_Y, result);
    case STEP_EXPERT_CHOICE:
    case STEP_SINKHORN:
    case STEP_REROUTE:
        return check_policy(&s->policies[step_policy(step)], result);
    case STEP_TRAIN:
    case STEP_TRAIN_BALANCE:
    case STEP_BALANCE:
        return check_train(&s->train, ref, step, result);
    case STEP_BIAS_COUNTS:
        return check_counts(&s->counts, result);
    case STEP_BACKWARD:
    case STEP_BACKWARD_DATA:
    case STEP_BACKWARD_WEIGHTS:
    case STEP_FORWARD_BACKWARD:
        return check_backward(s, ref, step, result);
    case STEP_STATS:
    case STEP_COUNT:
        break;
    }
    return check_stats(s, result);
}

clmoe_status check_step(subject *s, const reference *ref, bench_step step, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    if (step_is_backward(step))
        TRY(subject_forget_gradients(s));
    TRY(subject_prepare(s, step));
    TRY(subject_enqueue(s, step, NULL));
    TRY(CL(clFinish(s->device->queue)));
    TRY(check_outputs(s, ref, step, result));
done:
    return status;
}
