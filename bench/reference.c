#include "reference.h"

#include "ref.h"

#include <stdlib.h>

/* Tokens looked at, fewer where their experts are expensive: multiply-adds of a token. */
enum { MANY_TOKENS = 16, FEW_TOKENS = 3 };
#define EXPENSIVE_TOKEN 2e7

/* A token is looked at if no two neighbours among its K+1 best scores are relatively closer. */
#define CHOICE_GAP 1e-4

/* The oracle's arrays of a case, one expert or token at a time: no host holds all weights. */
typedef struct workbench {
    clmoe_layer_desc desc;
    float *router, *bias; /* [E,D], [E] */
    float *x;             /* [N,D] */
    float *scores;        /* [E], of a token as the layer has them */
    float *gate, *down;   /* [2H,D], [D,H] of one expert */
} workbench;

static void workbench_free(workbench *w) {
    free(w->router);
    free(w->bias);
    free(w->x);
    free(w->scores);
    free(w->gate);
    free(w->down);
}

static clmoe_status workbench_make(const inputs *in, size_t wanted, workbench *w) {
    const bench_case *c = &in->of;
    const size_t matrix = (size_t)c->hidden_dim * c->dim, router = (size_t)c->experts * c->dim;
    *w = (workbench){.desc = inputs_desc(in, NULL),
                     .router = malloc(router * sizeof *w->router),
                     .bias = malloc(c->experts * sizeof *w->bias),
                     .x = malloc(wanted * c->dim * sizeof *w->x),
                     .scores = malloc(c->experts * sizeof *w->scores),
                     .gate = malloc(2 * matrix * sizeof *w->gate),
                     .down = malloc(matrix * sizeof *w->down)};
    if (!w->router || !w->bias || !w->x || !w->scores || !w->gate || !w->down)
        return bench_no_memory("the reference");
    values_fill(&in->router, 0, router, w->router);
    for (uint32_t e = 0; e < c->experts; e++)
        w->bias[e] = pattern_bias(in->pattern, e);
    return CLMOE_SUCCESS;
}

/* Row n of the reference from token t; false if its choice is too close. */
static bool route_token(const inputs *in, workbench *w, uint32_t n, uint32_t t, reference *ref) {
    const bench_case *c = &in->of;
    const ref_weights weights = {.router = w->router, .router_bias = w->bias};
    double *logits = ref->logits + (size_t)n * c->experts;
    double *scores = ref->scores + (size_t)n * c->experts;
    float *x = w->x + (size_t)n * c->dim;
    int32_t live = 0;
    values_fill(&in->x, (uint64_t)t * c->dim, c->dim, x);
    ref_logits(&w->desc, 1, x, &weights, logits);
    ref_scores(&w->desc, 1, logits, scores);
    if (pattern_is_forced(in->pattern)) {
        for (uint32_t k = 0; k < c->top_k; k++) {
            const size_t pair = (size_t)t * c->top_k + k, at = (size_t)n * c->top_k + k;
            ref->ids[at] = (int32_t)(pair % c->experts);
            ref->weights[at] = 1.0 / c->top_k;
        }
        return true;
    }
    if (ref_choice_gap(&w->desc, 1, scores, &weights) < CHOICE_GAP)
        return false;
    for (uint32_t e = 0; e < c->experts; e++)
        w->scores[e] = (float)scores[e];
    ref_topk(&w->desc, 1, w->scores, &weights, ref->ids + (size_t)n * c->top_k,
             ref->weights + (size_t)n * c->top_k, &live);
    return true;
}

/* Routes up to `wanted` tokens, spread over the batch. */
static void route(const inputs *in, workbench *w, uint32_t wanted, reference *ref) {
    const bench_case *c = &in->of;
    const uint32_t stride = c->tokens > wanted ? c->tokens / wanted : 1;
    uint32_t next = 0;
    for (uint32_t t = 0; t < c->tokens && ref->count < wanted; t++) {
        if (t < next || !route_token(in, w, ref->count, t, ref))
            continue;
        ref->token[ref->count++] = t;
        next += stride;
    }
}

/* The pairs of one expert: their outputs, and what they add to y. */
static void run_expert(const inputs *in, workbench *w, uint32_t expert, reference *ref) {
    const bench_case *c = &in->of;
    const size_t matrix = (size_t)c->hidden_dim * c->dim;
    const ref_weights weights = {.experts = {.gate = w->gate, .down = w->down}};
    bool filled = false;
    for (size_t p = 0; p < (size_t)ref->count * c->top_k; p++) {
        const size_t n = p / c->top_k;
        double *out = ref->experts + p * c->dim;
        if (ref->ids[p] != (int32_t)expert)
            continue;
        if (!filled) {
            values_fill(&in->gate, 2 * matrix * expert, 2 * matrix, w->gate);
            values_fill(&in->down, matrix * expert, matrix, w->down);
            filled = true;
        }
        ref_expert(&w->desc, &weights, 0, w->x + n * c->dim, &(ref_scale){.weight = 1.0}, out);
        for (size_t d = 0; d < c->dim; d++)
            ref->y[n * c->dim + d] += ref->weights[p] * out[d];
    }
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

static clmoe_status allocate(const inputs *in, size_t wanted, reference *ref) {
    const bench_case *c = &in->of;
    const size_t pairs = wanted * c->top_k, dim = c->dim;
    *ref = (reference){.tolerance = tolerance_of(in->type),
                       .token = calloc(wanted, sizeof *ref->token),
                       .logits = calloc(wanted * c->experts, sizeof *ref->logits),
                       .scores = calloc(wanted * c->experts, sizeof *ref->scores),
                       .ids = calloc(pairs, sizeof *ref->ids),
                       .weights = calloc(pairs, sizeof *ref->weights)};
    if (!c->routing_only) {
        ref->experts = calloc(pairs * dim, sizeof *ref->experts);
        ref->y = calloc(wanted * dim, sizeof *ref->y);
    }
    const bool ready = ref->token && ref->logits && ref->scores && ref->ids && ref->weights &&
                       (c->routing_only || (ref->experts && ref->y));
    return ready ? CLMOE_SUCCESS : bench_no_memory("the reference");
}

clmoe_status reference_make(const inputs *in, reference *ref) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t wanted = tokens_wanted(&in->of);
    workbench w = {.router = NULL};
    TRY(allocate(in, wanted, ref));
    TRY(workbench_make(in, wanted, &w));
    route(in, &w, wanted, ref);
    if (ref->count == 0)
        TRY(cli_fail(CLMOE_UNSUPPORTED, "every token has a choice too close to check"));
    for (uint32_t e = 0; e < in->of.experts && !in->of.routing_only; e++)
        run_expert(in, &w, e, ref);
done:
    workbench_free(&w);
    if (status != CLMOE_SUCCESS)
        reference_free(ref);
    return status;
}

void reference_free(reference *ref) {
    free(ref->token);
    free(ref->logits);
    free(ref->scores);
    free(ref->ids);
    free(ref->weights);
    free(ref->experts);
    free(ref->y);
    free(ref->experts_dx);
    free(ref->dx);
    free(ref->dlogits);
    free(ref->dlogits_blur);
    *ref = (reference){0};
}
