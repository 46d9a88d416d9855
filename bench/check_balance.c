/* Statistics, losses and their gradient, by the oracle from what the layer measured. */
#include "check.h"

#include "ref_balance.h"
#include "ref_random.h"

#include <math.h>
#include <stdlib.h>

#define BALANCE_TOLERANCE 1e-4

/* The batch on the host. */
typedef struct host_batch {
    float *logits, *weights; /* [T,E], [pairs] */
    int32_t *ids;            /* [pairs] */
    double *clean, *noise;   /* [T,E], of the oracle */
    clmoe_state *state;      /* its arrays behind it */
    ref_plan plan;
    ref_balance_in in;
} host_batch;

static clmoe_status read_back(const measured *m, cl_mem buffer, size_t bytes, void *to) {
    return CL(clEnqueueReadBuffer(m->device->queue, buffer, CL_TRUE, 0, bytes, to, 0, NULL, NULL));
}

static void free_batch(host_batch *b) {
    free(b->logits);
    free(b->weights);
    free(b->ids);
    free(b->clean);
    free(b->noise);
    free(b->state);
    ref_plan_free(&b->plan);
}

/* What each expert keeps. */
static void plan_batch(const measured *m, host_batch *b) {
    const uint32_t capacity = ref_capacity(&m->desc, m->of->tokens);
    const uint32_t pairs = m->of->tokens * m->of->top_k;
    ref_plan_make(&m->desc,
                  &(ref_plan_in){.tokens = m->of->tokens,
                                 .slots = capacity ? m->of->experts * capacity : pairs,
                                 .row_tile = 1,
                                 .ids = b->ids},
                  &b->plan);
}

static void widen(const measured *m, host_batch *b) {
    const size_t count = (size_t)m->of->tokens * m->of->experts;
    for (size_t i = 0; i < count; i++)
        b->clean[i] = (double)b->logits[i];
    if (!m->state)
        return;
    ref_noisy(&m->desc, b->state, m->of->tokens, b->logits, NULL, b->noise);
    for (size_t i = 0; i < count; i++)
        b->noise[i] -= b->clean[i];
}

static clmoe_status make_batch(const measured *m, host_batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t count = (size_t)m->of->tokens * m->of->experts;
    const size_t pairs = (size_t)m->of->tokens * m->of->top_k;
    *b = (host_batch){.logits = malloc(count * sizeof *b->logits),
                      .weights = malloc(pairs * sizeof *b->weights),
                      .ids = malloc(pairs * sizeof *b->ids),
                      .clean = malloc(count * sizeof *b->clean),
                      .noise = malloc(count * sizeof *b->noise),
                      .state = calloc(m->state_bytes + 1, 1)};
    if (!b->logits || !b->weights || !b->ids || !b->clean || !b->noise || !b->state)
        TRY(bench_no_memory("the balance"));
    TRY(read_back(m, m->logits, count * sizeof *b->logits, b->logits));
    TRY(read_back(m, m->weights, pairs * sizeof *b->weights, b->weights));
    TRY(read_back(m, m->ids, pairs * sizeof *b->ids, b->ids));
    if (m->state)
        TRY(read_back(m, m->state, m->state_bytes, b->state));
    widen(m, b);
    plan_batch(m, b);
    b->in = (ref_balance_in){.tokens = m->of->tokens,
                             .logits = b->clean,
                             .noise = m->state ? b->noise : NULL,
                             .ids = b->ids,
                             .pair_weights = b->weights,
                             .kept = b->plan.kept,
                             .state = m->state ? b->state : NULL};
done:
    return status;
}

/* ---- Statistics ---------------------------------------------------------------------------- */

static void check_near(const char *what, double got, double want, check_result *result) {
    if (!(fabs(got - want) <= BALANCE_TOLERANCE * (1e-3 + fabs(want))))
        complain(result, "%s is %.7g, but must be %.7g", what, got, want);
}

static void compare_header(const clmoe_stats *got, const ref_statistics *want,
                           check_result *result) {
#define FIELD(name) check_words("stats." #name, &got->name, &want->name, 1, result);
    REF_STATS_INTS(FIELD)
#undef FIELD
#define FIELD(name) check_near("stats." #name, (double)got->name, want->name, result);
    REF_STATS_FLOATS(FIELD)
#undef FIELD
}

/* The arrays behind the header, as balance.h lists them. */
static void compare_arrays(const clmoe_stats *got, const ref_statistics *want,
                           check_result *result) {
    const size_t n = want->columns;
    const uint32_t *words = (const uint32_t *)(got + 1);
    const float *floats = (const float *)(got + 1);
    check_words("load", words, want->of.load, n, result);
    check_words("kept", words + n, want->of.kept, n, result);
    check_words("dropped", words + 2 * n, want->of.dropped, n, result);
    check_words("rerouted", words + 3 * n, want->of.rerouted, n, result);
    check_row("importance", floats + 4 * n, want->of.importance, n, BALANCE_TOLERANCE, result);
    check_row("weight_sums", floats + 5 * n, want->of.weight_sums, n, BALANCE_TOLERANCE, result);
    check_row("ema", floats + 6 * n, want->of.ema, n, BALANCE_TOLERANCE, result);
    check_words("idle_tokens", words + 7 * n, want->of.idle_tokens, n, result);
    check_words("device_tokens", words + 8 * n, want->of.device_tokens, want->device_groups,
                result);
}

static clmoe_status check_statistics(const measured *m, const host_batch *b, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    ref_statistics want;
    clmoe_stats *got = malloc(m->stats_bytes);
    if (!got)
        TRY(bench_no_memory("the statistics"));
    TRY(read_back(m, m->stats, m->stats_bytes, got));
    ref_statistics_make(&m->desc, &b->in, &want);
    compare_header(got, &want, result);
    compare_arrays(got, &want, result);
    ref_statistics_free(&want);
done:
    free(got);
    return status;
}

/* ---- Losses -------------------------------------------------------------------------------- */

/* The values, each without its weight; `gradient` [T,E] gets the sum of all gradients. */
static clmoe_status check_values(const measured *m, const host_batch *b, double *gradient,
                                 check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_loss_desc losses[TRAIN_LOSSES];
    float got[TRAIN_LOSSES];
    train_losses(losses);
    TRY(read_back(m, m->values, sizeof got, got));
    for (int i = 0; i < TRAIN_LOSSES; i++) {
        ref_loss fixed;
        ref_loss_make(&m->desc, &b->in, &losses[i], &fixed);
        check_near(clmoe_loss_name(losses[i].kind), (double)got[i], fixed.value, result);
        ref_loss_gradient(&m->desc, &b->in, &losses[i], &fixed, gradient, NULL, NULL);
        ref_loss_free(&fixed);
    }
done:
    return status;
}

static clmoe_status check_losses(const measured *m, const host_batch *b, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t count = (size_t)m->of->tokens * m->of->experts;
    float *got = malloc(count * sizeof *got);
    double *want = calloc(count, sizeof *want);
    if (!got || !want)
        TRY(bench_no_memory("a gradient"));
    TRY(check_values(m, b, want, result));
    TRY(read_back(m, m->dlogits, count * sizeof *got, got));
    check_row("dlogits", got, want, count, BALANCE_TOLERANCE, result);
done:
    free(got);
    free(want);
    return status;
}

clmoe_status check_balance(const measured *m, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    host_batch b;
    TRY(make_batch(m, &b));
    TRY(check_statistics(m, &b, result));
    if (m->values)
        TRY(check_losses(m, &b, result));
done:
    free_batch(&b);
    return status;
}
