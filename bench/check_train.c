/* The layer as it is trained: y of some tokens, and its balance. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

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

static clmoe_status check_measured(const bench_train *t, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    measured m = {.device = t->device,
                  .of = &t->in->of,
                  .desc = train_desc(t->in, NULL),
                  .logits = t->buffers[TRAIN_LOGITS],
                  .ids = t->buffers[TRAIN_IDS],
                  .weights = t->buffers[TRAIN_WEIGHTS],
                  .state = t->buffers[TRAIN_STATE],
                  .stats = t->buffers[TRAIN_STATS],
                  .values = t->buffers[TRAIN_VALUES],
                  .dlogits = t->buffers[TRAIN_DLOGITS]};
    TRY(LIB(clmoe_stats_size(t->layer, &m.stats_bytes)));
    TRY(LIB(clmoe_state_size(t->layer, &m.state_bytes)));
    TRY(check_balance(&m, result));
done:
    return status;
}

clmoe_status check_train(const bench_train *t, const reference *ref, bench_step step,
                         check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    if (step != STEP_BALANCE)
        TRY(check_y(t, ref, result));
    if (step != STEP_TRAIN)
        TRY(check_measured(t, result));
done:
    return status;
}
