#include "reference.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Tokens looked at, fewer where their experts are expensive: multiply-adds of a token. */
enum { MANY_TOKENS = 16, FEW_TOKENS = 3 };
#define EXPENSIVE_TOKEN 2e7

/* A token is looked at if no two of its K+1 best logits are closer. */
#define CHOICE_GAP 1e-4

void choose(const double *scores, uint32_t experts, uint32_t top_k, int32_t *ids) {
    for (uint32_t k = 0; k < top_k; k++) {
        double best = -INFINITY;
        ids[k] = -1;
        for (uint32_t e = 0; e < experts; e++) {
            bool after = k == 0 || scores[e] < scores[ids[k - 1]] ||
                         (scores[e] == scores[ids[k - 1]] && (int32_t)e > ids[k - 1]);
            if (after && (ids[k] < 0 || scores[e] > best)) {
                best = scores[e];
                ids[k] = (int32_t)e;
            }
        }
    }
}

/* A row of an array as plain floats. */
static void row_of(const values *v, uint64_t row, uint32_t columns, float *to) {
    for (uint32_t i = 0; i < columns; i++)
        to[i] = value_at(v, row * columns + i);
}

static double dot(const float *a, const float *b, uint32_t n) {
    double sum[4] = {0};
    for (uint32_t i = 0; i < n; i++)
        sum[i % 4] += (double)a[i] * (double)b[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

static void token_logits(const inputs *in, const float *router, const float *x, double *logits) {
    const uint32_t dim = in->of.dim;
    for (uint32_t e = 0; e < in->of.experts; e++)
        logits[e] = dot(x, router + (size_t)e * dim, dim) + (double)pattern_bias(in->pattern, e);
}

/* The smallest distance between neighbours among the K+1 best; `ids` has room for K+1. */
static double choice_gap(const bench_case *c, const double *logits, int32_t *ids) {
    const uint32_t best = c->top_k < c->experts ? c->top_k + 1 : c->experts;
    double gap = INFINITY;
    choose(logits, c->experts, best, ids);
    for (uint32_t k = 1; k < best; k++)
        gap = fmin(gap, logits[ids[k - 1]] - logits[ids[k]]);
    return gap;
}

/* Softmax over all experts, renormalised over the chosen. */
static void token_weights(const bench_case *c, const double *logits, const int32_t *ids,
                          double *weights) {
    double sum = 0;
    for (uint32_t k = 0; k < c->top_k; k++)
        sum += weights[k] = exp(logits[ids[k]] - logits[ids[0]]);
    for (uint32_t k = 0; k < c->top_k; k++)
        weights[k] /= sum;
}

/* Routes up to `wanted` tokens, spread over the batch; x gets their rows [N,D]. */
static void route(const inputs *in, reference *ref, uint32_t wanted, const float *router,
                  int32_t *ids, float *x) {
    const bench_case *c = &in->of;
    const uint32_t stride = c->tokens > wanted ? c->tokens / wanted : 1;
    uint32_t next = 0;
    for (uint32_t t = 0; t < c->tokens && ref->count < wanted; t++) {
        const uint32_t n = ref->count;
        double *logits = ref->logits + (size_t)n * c->experts;
        if (t < next)
            continue;
        row_of(&in->x, t, c->dim, x + (size_t)n * c->dim);
        token_logits(in, router, x + (size_t)n * c->dim, logits);
        if (choice_gap(c, logits, ids) < CHOICE_GAP)
            continue;
        memcpy(ref->ids + (size_t)n * c->top_k, ids, c->top_k * sizeof *ids);
        token_weights(c, logits, ids, ref->weights + (size_t)n * c->top_k);
        ref->token[n] = t;
        ref->count++;
        next += stride;
    }
}

/* The pairs (n * K + k) of the tokens looked at that chose an expert. */
typedef struct expert_pairs {
    uint32_t count;
    uint32_t *pair; /* [N*K] */
    float *row;     /* [max(D, H)], a row of weights */
    float *hidden;  /* [N*K, H] of the pairs, as stored between the GEMMs */
} expert_pairs;

static void find_pairs(const bench_case *c, const reference *ref, uint32_t expert,
                       expert_pairs *pairs) {
    pairs->count = 0;
    for (uint32_t p = 0; p < ref->count * c->top_k; p++)
        if (ref->ids[p] == (int32_t)expert)
            pairs->pair[pairs->count++] = p;
}

/* Hidden rows of the pairs of one expert, from their tokens' rows x [N,D]. */
static void hidden_rows(const inputs *in, uint32_t expert, const float *x, double *gate,
                        expert_pairs *pairs) {
    const bench_case *c = &in->of;
    for (uint32_t h = 0; h < c->hidden_dim; h++) {
        const uint64_t gate_row = (uint64_t)expert * 2 * c->hidden_dim + h;
        row_of(&in->gate, gate_row, c->dim, pairs->row);
        for (uint32_t i = 0; i < pairs->count; i++)
            gate[i] = dot(x + (size_t)(pairs->pair[i] / c->top_k) * c->dim, pairs->row, c->dim);
        row_of(&in->gate, gate_row + c->hidden_dim, c->dim, pairs->row);
        for (uint32_t i = 0; i < pairs->count; i++) {
            double up = dot(x + (size_t)(pairs->pair[i] / c->top_k) * c->dim, pairs->row, c->dim);
            pairs->hidden[(size_t)i * c->hidden_dim + h] =
                (float)(gate[i] / (1 + exp(-gate[i])) * up);
        }
    }
}

static void output_rows(const inputs *in, uint32_t expert, const expert_pairs *pairs,
                        reference *ref) {
    const bench_case *c = &in->of;
    for (uint32_t d = 0; d < c->dim; d++) {
        row_of(&in->down, (uint64_t)expert * c->dim + d, c->hidden_dim, pairs->row);
        for (uint32_t i = 0; i < pairs->count; i++)
            ref->experts[(size_t)pairs->pair[i] * c->dim + d] =
                dot(pairs->hidden + (size_t)i * c->hidden_dim, pairs->row, c->hidden_dim);
    }
}

static void combine(const bench_case *c, reference *ref) {
    for (uint32_t p = 0; p < ref->count * c->top_k; p++) {
        double *y = ref->y + (size_t)(p / c->top_k) * c->dim;
        for (uint32_t d = 0; d < c->dim; d++)
            y[d] += ref->weights[p] * ref->experts[(size_t)p * c->dim + d];
    }
}

static clmoe_status compute_experts(const inputs *in, const float *x, reference *ref) {
    const bench_case *c = &in->of;
    const size_t pairs = (size_t)ref->count * c->top_k;
    const size_t longest = c->dim > c->hidden_dim ? c->dim : c->hidden_dim;
    expert_pairs found = {.pair = calloc(pairs, sizeof *found.pair),
                          .row = calloc(longest, sizeof *found.row),
                          .hidden = calloc(pairs * c->hidden_dim, sizeof *found.hidden)};
    double *gate = calloc(pairs, sizeof *gate);
    ref->experts = calloc(pairs * c->dim, sizeof *ref->experts);
    ref->y = calloc((size_t)ref->count * c->dim, sizeof *ref->y);
    bool ready = found.pair && found.row && found.hidden && gate && ref->experts && ref->y;
    for (uint32_t e = 0; ready && e < c->experts; e++) {
        find_pairs(c, ref, e, &found);
        if (found.count == 0)
            continue;
        hidden_rows(in, e, x, gate, &found);
        output_rows(in, e, &found, ref);
    }
    if (ready)
        combine(c, ref);
    free(found.pair);
    free(found.row);
    free(found.hidden);
    free(gate);
    return ready ? CLMOE_SUCCESS : bench_no_memory("the reference");
}

static uint32_t tokens_wanted(const bench_case *c) {
    const double cost = 3.0 * c->top_k * c->hidden_dim * c->dim;
    const uint32_t most = cost > EXPENSIVE_TOKEN ? FEW_TOKENS : MANY_TOKENS;
    return c->tokens < most ? c->tokens : most;
}

static double tolerance_of(clmoe_type type) {
    static const double tolerances[] = {1e-5, 1.5e-3, 8e-3};
    return tolerances[type];
}

clmoe_status reference_make(const inputs *in, reference *ref) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &in->of;
    const size_t wanted = tokens_wanted(c);
    float *router = calloc((size_t)c->experts * c->dim, sizeof *router);
    float *x = calloc(wanted * c->dim, sizeof *x);
    int32_t *ids = calloc((size_t)c->top_k + 1, sizeof *ids);
    *ref = (reference){.tolerance = tolerance_of(in->type)};
    ref->token = calloc(wanted, sizeof *ref->token);
    ref->logits = calloc(wanted * c->experts, sizeof *ref->logits);
    ref->ids = calloc(wanted * c->top_k, sizeof *ref->ids);
    ref->weights = calloc(wanted * c->top_k, sizeof *ref->weights);
    if (!router || !x || !ids || !ref->token || !ref->logits || !ref->ids || !ref->weights)
        TRY(bench_no_memory("the reference"));
    for (uint32_t e = 0; e < c->experts; e++)
        row_of(&in->router, e, c->dim, router + (size_t)e * c->dim);
    route(in, ref, (uint32_t)wanted, router, ids, x);
    if (ref->count == 0)
        TRY(bench_fail(CLMOE_UNSUPPORTED, "every token has a choice too close to check"));
    if (!c->routing_only)
        TRY(compute_experts(in, x, ref));
done:
    free(router);
    free(x);
    free(ids);
    if (status != CLMOE_SUCCESS)
        reference_free(ref);
    return status;
}

void reference_free(reference *ref) {
    free(ref->token);
    free(ref->logits);
    free(ref->ids);
    free(ref->weights);
    free(ref->experts);
    free(ref->y);
    *ref = (reference){0};
}
