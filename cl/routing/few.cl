/*
 * Purpose: scores, choice and plan of a few tokens by one group: one launch for those of score.cl,
 *          topk.cl and plan.cl.
 * Formula: theirs, from the same functions.
 * Arrays: logits [T,R] f32, state, select_bias [R], expert_scale [R], token_mask [T] or NULL ->
 *          scores [T,R], ids, pair_weights [T,K], live [T], and the arrays of the plan.
 * NDRange: one group. SCORE_LANES work-items a row of logits, then as topk_bitonic and plan_few.
 * Limits: T <= TOKENS, R <= FEW_COLUMNS; those of topk.cl. KEEP_RULE is position or choice-major;
 *          each token has K pairs, and nothing is rerouted.
 * Repeatability: the bits of the three: the same sums in the same order, and integers.
 */
#include "routing/topk.clh"
#include "routing/score.clh"
#include "dispatch/plan.clh"

KERNEL(GROUP, 1, 1)
void route_few(IN(float, logits), IN(uint, state), IN(float, select_bias), IN(float, expert_scale),
               IN(uchar, token_mask), OUT(float, scores), OUT(int, ids), OUT(float, pair_weights),
               OUT(int, live), PLAN_ARRAYS, uint tokens, int experts, int dropless, uint capacity,
               uint bucket, uint slots, uint row_tile, router_switches r) {
    TOPK_LOCAL(space);
    __local float tmp[GROUP];
    __local uint uint_tmp[GROUP], counts[FEW_COLUMNS], places[TOKENS * KEEP];
    const float temperature = temperature_of(&r, STATE_OF(state));
    const int columns = r.columns, top_k = r.top_k;
    const uint pairs = tokens * (uint)top_k;
    for (uint first = 0; first < tokens; first += GROUP / SCORE_LANES) {
        const uint token = first + get_local_id(0) / SCORE_LANES;
        const ulong row = (ulong)token * columns;
        score_row(&r, temperature, AT(logits) + row, AT(scores) + row,
                  token < tokens ? columns : 0, tmp);
    }
    group_barrier(CLK_GLOBAL_MEM_FENCE);

    const choice_buffers at = {AT(scores), GIVEN(select_bias), GIVEN(expert_scale), AT(ids),
                               AT(pair_weights), AT(live), (int)tokens};
    choose_best(&r, &at, &space);
    group_barrier(CLK_GLOBAL_MEM_FENCE);

    __global const int *token_offsets = 0;
    __global const uint *order = 0;
    const ulong token_offsets_off = 0, order_off = 0;
    const pair_walk w = WALK_INIT;
    const plan_arrays to = PLAN_ARRAYS_INIT;
    const uint room = effective_capacity(STATE_OF(state), capacity);
    const plan_sizes s = {columns, experts, dropless, dropless ? UINT_MAX : room,
                          bucket,  slots,   row_tile};
    plan_in_group(&w, pairs, &to, &s, counts, places, uint_tmp);
}
