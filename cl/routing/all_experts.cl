/*
 * Purpose: the pairs of a token that passes all experts.
 * Formula: the ids with a finite score in ascending order, then the others; weights are the scores,
 *          renormalised and scaled, see router.clh.
 * Arrays: scores [T,R], expert_scale [R] or NULL -> ids [T,R], pair_weights [T,R], live [T] (pairs
 *          with a finite score; the rest have weight 0).
 * NDRange: a work-item per token.
 * Limits: K = R.
 * Repeatability: weights are summed in the order of ids by one work-item.
 */
#include "routing/router.clh"

KERNEL(GROUP, 1, 1)
void all_experts_rows(IN(float, scores), IN(float, expert_scale), OUT(int, ids),
                      OUT(float, pair_weights), OUT(int, live), uint tokens, router_switches r) {
    ulong token = get_global_id(0), row = token * r.columns;
    if (token >= tokens)
        return;
    scores = AT(scores) + row;
    ids = AT(ids) + row;
    pair_weights = AT(pair_weights) + row;
    int count = 0, rest = r.columns;
    for (int e = 0; e < r.columns; e++) {
        bool is_live = scores[e] > -INFINITY;
        int k = is_live ? count++ : --rest;
        ids[k] = e;
        pair_weights[k] = is_live ? scores[e] : 0.0f;
    }
    AT(live)[token] = count;
    token_weights(&r, scores, GIVEN(expert_scale), ids, pair_weights,
                  count);
}
