/*
 * Purpose: the backward pass of choice and score: from the gradient on the combine weights to that
 *          on the logits. One file for both steps, as weights and their softmax over the row meet
 *          here, whatever policy chose.
 * Formula: see weights.clh; added to the gradient that losses left on the logits. With learned
 *          noise that on x Wn^T too. dscale: on the weight over expert_scale, of a pair;
 *          expert_scale_backward sums it over the pairs of an expert. chosen_weights: the combine
 *          weights again, before they were rebalanced.
 * Arrays: logits [T,R] noisy, clean [T,R], noise_raw [T,R] or NULL, state or NULL, ids [pairs],
 *          live, token_mask, token_offsets, slot_of [pairs], expert_scale [R] or NULL,
 *          dpair_weights [pairs], dlogits, dnoise [T,R] or NULL -> dlogits_out [T,R], dnoise_out
 *          [T,R] with noise_raw, dscale [pairs] or NULL; scratch raw [pairs]. dscale ->
 *          scale_gradient [R], written or added to. chosen [pairs], 0 for surplus pairs.
 * NDRange: weights_backward, chosen_weights: one group per token; its lanes stride over the
 *          columns.
 *          expert_scale_backward: one group per column; its lanes stride over the pairs.
 * Limits: GROUP a power of two.
 * Repeatability: each number has one owner, as the ids of a token differ; sums over pairs are in
 *          lane order, then a tree.
 */
#include "dispatch/pairs.clh"
#include "routing/weights.clh"

/* Of softmax over the row: the sum; v->best is set. Columns are 0 where there is none. */
ALWAYS_INLINE float row_softmax(const router_switches *r, weight_view *v, uint columns,
                                __local float *tmp) {
    float highest = -INFINITY, total = 0.0f;
    for (uint e = get_local_id(0); e < columns; e += GROUP)
        highest = fmax(highest, prepared_logit(r, v->temperature, v->logits[e]));
    const float best = group_max(highest, tmp);
    for (uint e = get_local_id(0); e < columns; e += GROUP) {
        const float l = prepared_logit(r, v->temperature, v->logits[e]);
        total += l > -INFINITY ? exp(l - best) : 0.0f;
    }
    v->best = best;
    return group_sum(total, tmp);
}

/* renorm_back(), by the group. */
ALWAYS_INLINE void group_renorm_back(const router_switches *r, const weight_view *v, float total,
                                     renorm_sums *sums, __local float *tmp) {
    const uint lane = get_local_id(0);
    sums->unit = renorm_unit_of(r, group_max(renorm_largest(r, v, total, lane, GROUP), tmp));
    const float sum = group_sum(renorm_sum(r, v, &sums->unit, total, lane, GROUP), tmp);
    sums->norm = renorm_norm_of(r, &sums->unit, sum);
    sums->dot = group_sum(renorm_dot(r, v, sums, total, lane, GROUP), tmp);
}

KERNEL(GROUP, 1, 1)
void weights_backward(IN(float, logits), IN(float, clean), IN(float, noise_raw), IN(uint, state),
                      IN(int, ids), IN(int, live), IN(uchar, token_mask), IN(int, token_offsets),
                      IN(int, slot_of), IN(float, expert_scale), IN(float, dpair_weights),
                      IN(float, dlogits), IN(float, dnoise), OUT(float, dlogits_out),
                      OUT(float, dnoise_out), OUT(float, dscale), OUT(float, raw), int pairs,
                      int most, router_switches r) {
    __local float tmp[GROUP];
    token_owner owner = OWNER_INIT(r.top_k, pairs, most);
    const uint token = get_group_id(0), R = (uint)r.columns;
    const ulong at = (ulong)token * R;
    const pair_range range = owned_pairs(&owner, token);
    const uint2 all = token_pairs(&owner, token);
    const bool masked = token_mask && !AT(token_mask)[token];
    const bool over_row = r.score == SCORE_SOFTMAX && !r.topk_first;
    weights_row row = {AT(logits) + at,        AT(clean) + at,
                       noise_raw ? AT(noise_raw) + at : 0,
                       AT(dlogits_out) + at,
                       dnoise_out ? AT(dnoise_out) + at : 0,
                       temperature_of(&r, STATE_OF(state))};
    weight_view v = {AT(ids) + range.begin,
                     r.renorm_late ? AT(slot_of) + range.begin : 0,
                     row.logits,
                     GIVEN(expert_scale),
                     0,
                     AT(dpair_weights) + range.begin,
                     true,
                     range.end - range.begin,
                     R,
                     row.temperature,
                     -INFINITY,
                     0.0f,
                     0.0f};
    const uint columns = over_row && v.count > 0 ? R : 0;
    const float total = row_softmax(&r, &v, columns, tmp);
    if (r.score == SCORE_SOFTMAX && r.topk_first)
        chosen_softmax(&r, &v);
    raw = AT(raw) + range.begin;
    for (uint k = get_local_id(0); k < v.count; k += GROUP)
        raw[k] = plain_weight(&r, &v, total, k);
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    v.raw = raw;
    renorm_sums sums;
    group_renorm_back(&r, &v, total, &sums, tmp);
    const float own = weights_dot(&r, &v, &sums, total, get_local_id(0), GROUP);
    const float dot = group_sum(own, tmp);

    for (uint e = get_local_id(0); e < R; e += GROUP) {
        row.dlogits[e] = dlogits && !masked ? AT(dlogits)[at + e] : 0.0f;
        if (row.dnoise)
            row.dnoise[e] = dnoise && !masked ? AT(dnoise)[at + e] : 0.0f;
        if (columns > 0)
            add_to_row(&r, &row, e, row_gradient(&r, &v, total, dot, e));
    }
    for (uint k = 0; k < v.count && r.score == SCORE_SPARSEMIXER; k++) {
        const float w = v.raw[k];
        const float d = plain_gradient(&r, &v, &sums, total, k) * w * w;
        for (uint e = get_local_id(0); e < R; e += GROUP)
            add_to_row(&r, &row, e, -d * sparsemixer_term(&r, &v, k, e));
    }
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint k = get_local_id(0); k < v.count; k += GROUP)
        if (prepared_choice(&r, &v, k) > -INFINITY)
            add_to_row(&r, &row, (uint)v.ids[k],
                       choice_gradient(&r, &v, &sums, total, dot, k));
    for (uint pair = all.x + get_local_id(0); pair < all.y && dscale; pair += GROUP)
        AT(dscale)[pair] = pair < range.end ? AT(dpair_weights)[pair] * r.scale *
                                                  renormed_weight(&r, &v, &sums, total,
                                                                  pair - range.begin)
                                            : 0.0f;
}

KERNEL(GROUP, 1, 1)
void chosen_weights(IN(float, logits), IN(uint, state), IN(int, ids), IN(int, live),
                    IN(uchar, token_mask), IN(int, token_offsets), IN(float, expert_scale),
                    OUT(float, chosen), int pairs, int most, router_switches r) {
    __local float tmp[GROUP];
    token_owner owner = OWNER_INIT(r.top_k, pairs, most);
    const uint token = get_group_id(0), R = (uint)r.columns;
    const pair_range range = owned_pairs(&owner, token);
    const uint2 all = token_pairs(&owner, token);
    weight_view v = {AT(ids) + range.begin,
                     0,
                     AT(logits) + (ulong)token * R,
                     GIVEN(expert_scale),
                     0,
                     0,
                     true,
                     range.end - range.begin,
                     R,
                     temperature_of(&r, STATE_OF(state)),
                     -INFINITY,
                     0.0f,
                     0.0f};
    const bool over_row = r.score == SCORE_SOFTMAX && !r.topk_first;
    const float total = row_softmax(&r, &v, over_row && v.count > 0 ? R : 0, tmp);
    renorm_sums sums;
    chosen_softmax(&r, &v);
    group_renorm_back(&r, &v, total, &sums, tmp);
    for (uint pair = all.x + get_local_id(0); pair < all.y; pair += GROUP)
        AT(chosen)[pair] = pair < range.end
                               ? chosen_weight(&r, &v, &sums, total, pair - range.begin)
                               : 0.0f;
}

KERNEL(GROUP, 1, 1)
void expert_scale_backward(IN(int, ids), IN(float, dscale), OUT(float, scale_gradient), uint pairs,
                           uint accumulate) {
    __local float tmp[GROUP];
    const int e = (int)get_group_id(0);
    float sum = 0.0f;
    for (uint pair = get_local_id(0); pair < pairs; pair += GROUP)
        sum += AT(ids)[pair] == e ? AT(dscale)[pair] : 0.0f;
    sum = group_sum(sum, tmp);
    if (get_local_id(0) == 0)
        AT(scale_gradient)[e] = accumulate ? AT(scale_gradient)[e] + sum : sum;
}
