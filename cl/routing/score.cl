/*
 * Purpose: router logits to scores.
 * Formula: l' and s(l'), see score_function.clh; softmax over the row without its non-finite
 *          logits. With topk-then-score order, l' itself.
 * Arrays: logits [T,R] f32, state or NULL (its scale multiplies the temperature) -> scores [T,R]
 *          f32, -infinity where the logit is not finite.
 * NDRange: one group per token; its lanes stride over the R columns. A group of one work-item, the
 *          form for CPUs, takes a vector of columns at a time.
 * Limits: GROUP a power of two.
 * Repeatability: sums in lane order, then a tree; the same for the same GROUP.
 */
#define SCORE_LANES GROUP
#include "routing/score.clh"

KERNEL(GROUP, 1, 1)
void score_rows(IN(float, logits), OUT(float, scores), IN(uint, state), router_switches r) {
    __local float tmp[GROUP];
    /* Not written back to r: PoCL shares a struct argument among the work-items of a group. */
    const float temperature = temperature_of(&r, STATE_OF(state));
    const ulong row = (ulong)get_group_id(0) * r.columns;
    score_row(&r, temperature, AT(logits) + row, AT(scores) + row, r.columns, tmp);
}
