/*
 * Purpose: router logits to scores.
 * Formula: l' = l; softcap: c * tanh(l / c); / temperature; s(l'), see score_of(); softmax over the
 *          row without its non-finite logits. With topk-then-score order, l' itself.
 * Arrays: logits [T,R] f32, state or NULL (its scale multiplies the temperature) -> scores [T,R] f32, -infinity where the logit is not finite.
 * NDRange: one group per token; its lanes stride over the R columns.
 * Limits: GROUP a power of two.
 * Repeatability: sums in lane order, then a tree; the same for the same GROUP.
 */
#include "router.clh"
#include "state.clh"

/* l' of one logit, -infinity if it was not finite. */
static inline float prepared_logit(const router_switches *r, float temperature, float logit) {
    if (!isfinite(logit))
        return -INFINITY;
    if (r->softcap > 0.0f)
        logit = r->softcap * tanh(logit / r->softcap);
    return logit / temperature;
}

KERNEL(GROUP, 1, 1)
void score_rows(__global const float *logits, ulong logits_off, __global float *scores,
                ulong scores_off, __global const uint *state, ulong state_off,
                router_switches r) {
    __local float tmp[GROUP];
    /* Not written back to r: PoCL shares a struct argument among the work-items of a group. */
    const float temperature =
        state ? r.temperature * state_of(state, state_off)->temperature_scale : r.temperature;
    int lane = get_local_id(0);
    ulong row = (ulong)get_group_id(0) * r.columns;
    logits += logits_off + row;
    scores += scores_off + row;

    bool as_is = r.topk_first || r.score == SCORE_SPARSEMIXER;
    bool softmax = !as_is && r.score == SCORE_SOFTMAX;
    float best = -INFINITY, sum = 0.0f;
    for (int e = lane; e < r.columns; e += GROUP) {
        float logit = prepared_logit(&r, temperature, logits[e]);
        best = fmax(best, logit);
        bool done = as_is || softmax || logit == -INFINITY;
        scores[e] = done ? logit : score_of(r.score, logit);
    }
    best = group_max(best, tmp);
    for (int e = lane; e < r.columns; e += GROUP)
        sum += scores[e] == -INFINITY ? 0.0f : exp(scores[e] - best);
    sum = group_sum(sum, tmp);
    for (int e = lane; e < r.columns; e += GROUP)
        if (softmax && scores[e] != -INFINITY)
            scores[e] = exp(scores[e] - best) / sum;
}
