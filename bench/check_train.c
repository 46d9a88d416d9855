/* The layer as it is trained: y, and of the balance what has a plain formula. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BALANCE_TOLERANCE 1e-4

/* The z loss alone gives the sum of |dlogits| more than this. */
#define NO_GRADIENT 1e-6

static clmoe_status read_back(const bench_train *t, train_buffer which, size_t offset, size_t bytes,
                              void *to) {
    return CL(clEnqueueReadBuffer(t->device->queue, t->buffers[which], CL_TRUE, offset, bytes, to,
                                  0, NULL, NULL));
}

/* ---- y ------------------------------------------------------------------------------------- */

/* Where `id` is among the K ids of a token; K if it is not. */
static uint32_t find_id(const int32_t *ids, uint32_t top_k, int32_t id) {
    uint32_t k = 0;
    while (k < top_k && ids[k] != id)
        k++;
    return k;
}

/* The choice of a token that is looked at. */
typedef struct token_choice {
    int32_t *ids, *slots; /* [K] */
    float *weights;       /* [K] */
    float *y;             /* [D] */
    double *want;         /* [D] */
} token_choice;

/* y from the reference's experts, unless the noise chose one that it does not have. */
static bool want_y(const bench_case *c, const reference *ref, uint32_t n, token_choice *choice) {
    memset(choice->want, 0, c->dim * sizeof *choice->want);
    for (uint32_t k = 0; k < c->top_k; k++) {
        const uint32_t known = find_id(ref->ids + (size_t)n * c->top_k, c->top_k, choice->ids[k]);
        if (choice->slots[k] < 0)
            continue;
        if (known == c->top_k)
            return false;
        const double *expert = ref->experts + ((size_t)n * c->top_k + known) * c->dim;
        for (uint32_t d = 0; d < c->dim; d++)
            choice->want[d] += (double)choice->weights[k] * expert[d];
    }
    return true;
}

static clmoe_status check_tokens(const bench_train *t, const reference *ref, token_choice *choice,
                                 check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &t->in->of;
    const size_t bytes = c->top_k * sizeof(int32_t);
    for (uint32_t n = 0; n < ref->count; n++) {
        const size_t token = ref->token[n];
        TRY(read_back(t, TRAIN_IDS, token * bytes, bytes, choice->ids));
        TRY(read_back(t, TRAIN_WEIGHTS, token * bytes, bytes, choice->weights));
        TRY(read_back(t, TRAIN_PLAN, t->plan.slot_of + token * bytes, bytes, choice->slots));
        TRY(check_read_row(t->device, t->in->type, t->buffers[TRAIN_Y], token, c->dim, choice->y));
        if (want_y(c, ref, n, choice))
            check_row("y", choice->y, choice->want, c->dim, ref->tolerance, result);
        for (uint32_t d = 0; d < c->dim; d++)
            if (!isfinite(choice->y[d]))
                complain(result, "y of token %u is %g", (unsigned)token, (double)choice->y[d]);
    }
done:
    return status;
}

static clmoe_status check_y(const bench_train *t, const reference *ref, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &t->in->of;
    token_choice choice = {.ids = calloc(c->top_k, sizeof *choice.ids),
                           .slots = calloc(c->top_k, sizeof *choice.slots),
                           .weights = calloc(c->top_k, sizeof *choice.weights),
                           .y = calloc(c->dim, sizeof *choice.y),
                           .want = calloc(c->dim, sizeof *choice.want)};
    if (!choice.ids || !choice.slots || !choice.weights || !choice.y || !choice.want)
        TRY(bench_no_memory("a token's choice"));
    TRY(check_tokens(t, ref, &choice, result));
done:
    free(choice.ids);
    free(choice.slots);
    free(choice.weights);
    free(choice.y);
    free(choice.want);
    return status;
}

/* ---- Balance ------------------------------------------------------------------------------- */

/* The inputs and outputs on the host, and what the outputs must be. */
typedef struct balance {
    float *logits, *dlogits; /* [T,E] */
    int32_t *ids;            /* [T,K] */
    char *stats;
    float values[TRAIN_LOSSES];
    uint32_t *load;               /* [E], counted from ids */
    double *row, *p_sum;          /* [E]: of one token; over all tokens */
    double logsumexp, z, entropy; /* sums over the tokens */
} balance;

/* Philox4x32-10, as balance.h says. */
static void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)counter[0] * 0xD2511F53U;
        const uint64_t b = (uint64_t)counter[2] * 0xCD9E8D57U;
        counter[0] = (uint32_t)(b >> 32) ^ counter[1] ^ key0;
        counter[1] = (uint32_t)b;
        counter[2] = (uint32_t)(a >> 32) ^ counter[3] ^ key1;
        counter[3] = (uint32_t)a;
        key0 += 0x9E3779B9U;
        key1 += 0xBB67AE85U;
    }
}

static double uniform(uint32_t bits) {
    return (bits / 512 + 0.5) / 8388608;
}

/* The noise of step 0. */
static double normal(uint32_t token, uint32_t column) {
    uint32_t counter[4] = {token, column, 0, 1};
    philox(counter, TRAIN_SEED, 0);
    return sqrt(-2 * log(uniform(counter[0]))) * cos(2 * acos(-1) * uniform(counter[1]));
}

/* Adds a token's part to the sums. */
static void add_token(const bench_train *t, uint32_t token, balance *b) {
    const uint32_t experts = t->in->of.experts;
    double most = -INFINITY, sum = 0;
    for (uint32_t e = 0; e < experts; e++) {
        b->row[e] = (double)b->logits[(size_t)token * experts + e] +
                    (double)train_noise(t->in) * normal(token, e);
        most = fmax(most, b->row[e]);
    }
    for (uint32_t e = 0; e < experts; e++)
        sum += exp(b->row[e] - most);
    const double logsumexp = most + log(sum);
    for (uint32_t e = 0; e < experts; e++) {
        const double p = exp(b->row[e] - logsumexp);
        b->p_sum[e] += p;
        b->entropy -= p * (b->row[e] - logsumexp);
    }
    b->logsumexp += logsumexp;
    b->z += logsumexp * logsumexp;
}

static void check_near(const char *what, double got, double want, check_result *result) {
    if (!(fabs(got - want) <= BALANCE_TOLERANCE * (1e-3 + fabs(want))))
        complain(result, "%s is %.7g, but must be %.7g", what, got, want);
}

static void check_count(const char *what, uint32_t got, uint32_t want, check_result *result) {
    if (got != want)
        complain(result, "%s is %u, but must be %u", what, (unsigned)got, (unsigned)want);
}

static void check_load(const bench_train *t, const balance *b, check_result *result) {
    const uint32_t experts = t->in->of.experts, pairs = t->in->of.tokens * t->in->of.top_k;
    const clmoe_stats *stats = (const clmoe_stats *)b->stats;
    const uint32_t *load = (const uint32_t *)(b->stats + sizeof *stats), *kept = load + experts;
    uint32_t most = 0, least = UINT32_MAX, total = 0;
    double entropy = 0, variance = 0;
    for (uint32_t e = 0; e < experts; e++) {
        const uint32_t c = b->load[e], room = c < t->plan.capacity ? c : t->plan.capacity;
        const double share = (double)c / pairs;
        check_count("load", load[e], c, result);
        check_count("kept", kept[e], room, result);
        most = c > most ? c : most;
        least = c < least ? c : least;
        total += room;
        entropy -= c > 0 ? share * log(share) : 0;
        variance += (share - 1.0 / experts) * (share - 1.0 / experts);
    }
    check_count("stats.tokens", stats->tokens, t->in->of.tokens, result);
    check_count("stats.pairs", stats->pairs, pairs, result);
    check_count("stats.kept", stats->kept, total, result);
    check_count("stats.dropped", stats->dropped, pairs - total, result);
    check_count("stats.max_load", stats->max_load, most, result);
    check_count("stats.min_load", stats->min_load, least, result);
    check_near("stats.load_entropy", (double)stats->load_entropy, entropy, result);
    check_near("stats.load_variance", (double)stats->load_variance, variance, result);
    check_near("stats.max_violation", (double)stats->max_violation,
               (double)most * experts / pairs - 1, result);
}

/* Of the values those of the switch and z losses and the entropy; all must be finite. */
static void check_values(const bench_train *t, const balance *b, check_result *result) {
    const uint32_t experts = t->in->of.experts, tokens = t->in->of.tokens;
    const clmoe_stats *stats = (const clmoe_stats *)b->stats;
    double product = 0;
    for (uint32_t e = 0; e < experts; e++)
        product += (double)b->load[e] * b->p_sum[e];
    product *= (double)experts / tokens / ((double)tokens * t->in->of.top_k);
    check_near("the loss switch", (double)b->values[CLMOE_LOSS_SWITCH], product, result);
    check_near("the loss z", (double)b->values[CLMOE_LOSS_Z], b->z / tokens, result);
    check_near("the loss token-entropy", (double)b->values[CLMOE_LOSS_TOKEN_ENTROPY],
               -b->entropy / tokens, result);
    check_near("stats.mean_logsumexp", (double)stats->mean_logsumexp, b->logsumexp / tokens,
               result);
    for (int kind = 0; kind < TRAIN_LOSSES; kind++)
        if (!isfinite(b->values[kind]))
            complain(result, "the loss %s is %g", clmoe_loss_name((clmoe_loss_kind)kind),
                     (double)b->values[kind]);
}

static void check_dlogits(const bench_train *t, const balance *b, check_result *result) {
    const size_t count = (size_t)t->in->of.tokens * t->in->of.experts;
    double sum = 0;
    for (size_t i = 0; i < count; i++) {
        if (!isfinite(b->dlogits[i]))
            complain(result, "dlogits[%zu] is %g", i, (double)b->dlogits[i]);
        sum += fabs((double)b->dlogits[i]);
    }
    if (sum < NO_GRADIENT)
        complain(result, "dlogits are 0");
}

static clmoe_status read_balance(const bench_train *t, balance *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &t->in->of;
    const size_t matrix = (size_t)c->tokens * c->experts, pairs = (size_t)c->tokens * c->top_k;
    TRY(read_back(t, TRAIN_LOGITS, 0, matrix * sizeof(float), b->logits));
    TRY(read_back(t, TRAIN_DLOGITS, 0, matrix * sizeof(float), b->dlogits));
    TRY(read_back(t, TRAIN_IDS, 0, pairs * sizeof *b->ids, b->ids));
    TRY(read_back(t, TRAIN_STATS, 0, clmoe_stats_size(t->layer), b->stats));
    TRY(read_back(t, TRAIN_VALUES, 0, sizeof b->values, b->values));
done:
    return status;
}

static clmoe_status check_balance(const bench_train *t, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &t->in->of;
    const size_t matrix = (size_t)c->tokens * c->experts, pairs = (size_t)c->tokens * c->top_k;
    balance b = {.logits = calloc(matrix, sizeof *b.logits),
                 .dlogits = calloc(matrix, sizeof *b.dlogits),
                 .ids = calloc(pairs, sizeof *b.ids),
                 .stats = calloc(clmoe_stats_size(t->layer), 1),
                 .load = calloc(c->experts, sizeof *b.load),
                 .row = calloc(c->experts, sizeof *b.row),
                 .p_sum = calloc(c->experts, sizeof *b.p_sum)};
    if (!b.logits || !b.dlogits || !b.ids || !b.stats || !b.load || !b.row || !b.p_sum)
        TRY(bench_no_memory("the balance"));
    TRY(read_balance(t, &b));
    count_load(b.ids, pairs, c->experts, b.load);
    for (uint32_t token = 0; token < c->tokens; token++)
        add_token(t, token, &b);
    check_load(t, &b, result);
    check_values(t, &b, result);
    check_dlogits(t, &b, result);
done:
    free(b.logits);
    free(b.dlogits);
    free(b.ids);
    free(b.stats);
    free(b.load);
    free(b.row);
    free(b.p_sum);
    return status;
}

clmoe_status check_train(const bench_train *t, const reference *ref, bench_step step,
                         check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    if (step != STEP_BALANCE)
        TRY(check_y(t, ref, result));
    if (step != STEP_TRAIN)
        TRY(check_balance(t, result));
done:
    return status;
}
