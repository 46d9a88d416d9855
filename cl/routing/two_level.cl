/*
 * Purpose: routing in two levels: groups of experts first, experts within each group then.
 * Formula: a group is picked if its logit is among the topk_groups best finite ones, ties to the
 *          lower group. score = softmax of the group logits * softmax of l within the group,
 *          -infinity in the groups that were not picked. Choice: of each picked group the K /
 *          topk_groups best scores + select_bias, ties to the lower id.
 *          Backward: with D on log w of a choice (its gradient times w), D_g = sum of D over group
 *          g, q and G the softmaxes within the group and over groups: dl_e = D_e - q_e D_g,
 *          du_g = D_g - G_g sum D; through renormalisation as weights.clh has it.
 *          two_level_weights -> chosen [T,K], 0 for surplus pairs.
 * Arrays: group_logits [T,groups], scores [T,R] in place: l, -infinity where not finite. Then
 *          scores, select_bias [R] or NULL, expert_scale [R] or NULL -> ids [T,K], pair_weights
 *          [T,K], live [T]: group by group in ascending order, the best of a group first; the pairs
 *          past live have weight 0 and ids that the token did not choose. two_level_backward: as
 *          weights.cl, and dgroup_logits [T,groups] or NULL -> dgroup_out; scratch raw [pairs] and
 *          d [T,R].
 * NDRange: a work-item per token.
 * Limits: topk_groups divides K, and K / topk_groups <= R / groups.
 * Repeatability: one work-item does a token, in the order of columns.
 */
#include "dispatch/pairs.clh"
#include "routing/two_level.clh"
#include "routing/weights.clh"

/* Whether group g is among the topk_groups best. */
static inline bool group_is_picked(const router_switches *r, __global const float *logits,
                                   int groups, int g) {
    int better = 0;
    if (!isfinite(logits[g]))
        return false;
    for (int other = 0; other < groups; other++)
        better += isfinite(logits[other]) &&
                  (logits[other] > logits[g] || (logits[other] == logits[g] && other < g));
    return better < r->topk_groups;
}

/* The largest of n finite values, and the sum of exp of their distances to it. */
static inline float softmax_sum(__global const float *values, int n, float *best) {
    float sum = 0.0f;
    *best = -INFINITY;
    for (int i = 0; i < n; i++)
        *best = isfinite(values[i]) ? fmax(*best, values[i]) : *best;
    for (int i = 0; i < n; i++)
        sum += isfinite(values[i]) ? exp(values[i] - *best) : 0.0f;
    return sum;
}

KERNEL(GROUP, 1, 1)
void two_level_scores(IN(float, group_logits), OUT(float, scores), uint tokens, int groups,
                      router_switches r) {
    ulong token = get_global_id(0);
    if (token >= tokens)
        return;
    group_logits = AT(group_logits) + token * groups;
    scores = AT(scores) + token * r.columns;
    int size = r.columns / groups;
    float top, best, total = softmax_sum(group_logits, groups, &top);
    for (int g = 0; g < groups; g++) {
        __global float *group = scores + g * size;
        bool picked = group_is_picked(&r, group_logits, groups, g);
        float share = picked ? exp(group_logits[g] - top) / total : 0.0f;
        float sum = softmax_sum(group, size, &best);
        for (int e = 0; e < size; e++)
            group[e] =
                picked && isfinite(group[e]) ? share * (exp(group[e] - best) / sum) : -INFINITY;
    }
}

static inline float biased(__global const float *scores, __global const float *select_bias, int e) {
    return select_bias ? scores[e] + select_bias[e] : scores[e];
}

/* The `keep` best of the experts [first, end) into ids, best first; returns how many are live. */
static inline int choose_in_group(__global const float *scores, __global const float *select_bias,
                                  int first, int end, int keep, __global int *ids) {
    int count = 0;
    for (int e = first; e < end; e++) {
        float choice = biased(scores, select_bias, e);
        if (!(choice > -INFINITY))
            continue;
        int k = count < keep ? count++ : keep;
        if (k == keep && !(choice > biased(scores, select_bias, ids[keep - 1])))
            continue;
        k = min(k, keep - 1);
        for (; k > 0 && choice > biased(scores, select_bias, ids[k - 1]); k--)
            ids[k] = ids[k - 1];
        ids[k] = e;
    }
    return count;
}

/* Fills ids [from, top_k) with the lowest experts that are not among the first `from`. */
static inline void fill_surplus(__global int *ids, __global float *weights, int from, int top_k) {
    for (int k = from, e = 0; k < top_k; e++) {
        bool chosen = false;
        for (int i = 0; i < from; i++)
            chosen = chosen || ids[i] == e;
        if (chosen)
            continue;
        ids[k] = e;
        weights[k] = 0.0f;
        k++;
    }
}

KERNEL(GROUP, 1, 1)
void two_level_topk(IN(float, scores), IN(float, select_bias), IN(float, expert_scale),
                    OUT(int, ids), OUT(float, pair_weights), OUT(int, live), uint tokens,
                    int groups, router_switches r) {
    ulong token = get_global_id(0);
    if (token >= tokens)
        return;
    if (select_bias)
        select_bias = AT(select_bias);
    scores = AT(scores) + token * r.columns;
    ids = AT(ids) + token * r.top_k;
    pair_weights = AT(pair_weights) + token * r.top_k;
    int size = r.columns / groups, keep = r.top_k / r.topk_groups, count = 0;
    for (int g = 0; g < groups && count + keep <= r.top_k; g++)
        count += choose_in_group(scores, select_bias, g * size, (g + 1) * size, keep, ids + count);
    for (int k = 0; k < count; k++)
        pair_weights[k] = scores[ids[k]];
    fill_surplus(ids, pair_weights, count, r.top_k);
    AT(live)[token] = count;
    if (!r.renorm_late)
        renorm_and_scale(&r, GIVEN(expert_scale), ids, pair_weights,
                         count);
}

/* Raw weights of a token's choices: the products of both gates. */
static inline void raw_weights(const router_switches *r, const weight_view *v,
                               __global const float *group_logits, int groups,
                               __global float *raw) {
    const uint size = (uint)(r->columns / groups);
    const float all = finite_logsumexp(group_logits, (uint)groups);
    for (uint k = 0; k < v->count; k++) {
        const uint g = (uint)v->ids[k] / size;
        const float l = prepared_choice(r, v, k);
        const float within = prepared_logsumexp(r, v->temperature, v->logits + g * size, size);
        raw[k] = l > -INFINITY ? exp(group_logits[g] - all) * exp(l - within) : 0.0f;
    }
}

/* d of one group -> the logits of its experts. */
static inline void back_within(const router_switches *r, const weights_row *row,
                               __global const float *d, uint begin, uint end) {
    const float total = sum_values(d + begin, end - begin);
    const float within =
        prepared_logsumexp(r, row->temperature, row->logits + begin, end - begin);
    for (uint e = begin; e < end && total != 0.0f; e++)
        if (isfinite(row->logits[e])) {
            const float q = exp(prepared_logit(r, row->temperature, row->logits[e]) - within);
            add_to_row(r, row, e, d[e] - q * total);
        }
}

KERNEL(GROUP, 1, 1)
void two_level_backward(IN(float, logits), IN(float, clean), IN(float, noise_raw),
                        IN(float, group_logits), IN(uint, state), IN(int, ids), IN(int, live),
                        IN(uchar, token_mask), IN(int, slot_of), IN(float, expert_scale),
                        IN(float, dpair_weights), IN(float, dlogits), IN(float, dnoise),
                        IN(float, dgroup_logits), OUT(float, dlogits_out), OUT(float, dnoise_out),
                        OUT(float, dgroup_out), OUT(float, dscale), OUT(float, raw),
                        OUT(float, d), uint tokens, int groups, router_switches r) {
    __global const int *token_offsets = 0;
    const ulong token_offsets_off = 0;
    token_owner owner = OWNER_INIT(r.top_k, tokens * (uint)r.top_k, r.top_k);
    const uint token = get_global_id(0), R = (uint)r.columns, size = R / (uint)groups;
    if (token >= tokens)
        return;
    const ulong at = (ulong)token * R;
    const pair_range range = owned_pairs(&owner, token);
    const uint2 all = token_pairs(&owner, token);
    const bool masked = token_mask && !AT(token_mask)[token];
    weights_row row = {AT(logits) + at,
                       AT(clean) + at,
                       noise_raw ? AT(noise_raw) + at : 0,
                       AT(dlogits_out) + at,
                       dnoise_out ? AT(dnoise_out) + at : 0,
                       temperature_of(&r, STATE_OF(state))};
    weight_view v = {AT(ids) + range.begin,
                     r.renorm_late ? AT(slot_of) + range.begin : 0,
                     row.logits,
                     GIVEN(expert_scale),
                     AT(raw) + range.begin,
                     AT(dpair_weights) + range.begin,
                     true,
                     range.end - range.begin,
                     R,
                     row.temperature,
                     0.0f,
                     0.0f,
                     0.0f};
    renorm_sums sums;
    group_logits = AT(group_logits) + (ulong)token * groups;
    dgroup_out = AT(dgroup_out) + (ulong)token * groups;
    d = AT(d) + at;
    raw_weights(&r, &v, group_logits, groups, AT(raw) + range.begin);
    renorm_back(&r, &v, 0.0f, &sums);
    for (uint e = 0; e < R; e++) {
        row.dlogits[e] = dlogits && !masked ? AT(dlogits)[at + e] : 0.0f;
        if (row.dnoise)
            row.dnoise[e] = dnoise && !masked ? AT(dnoise)[at + e] : 0.0f;
        d[e] = 0.0f;
    }
    for (uint k = 0; k < v.count; k++)
        d[v.ids[k]] += plain_gradient(&r, &v, &sums, 0.0f, k) * v.raw[k];
    const float total = sum_values(d, R);
    const float group_sum_log = finite_logsumexp(group_logits, (uint)groups);
    for (int g = 0; g < groups; g++) {
        const float share = isfinite(group_logits[g]) ? exp(group_logits[g] - group_sum_log) : 0.0f;
        const float given =
            dgroup_logits && !masked ? AT(dgroup_logits)[(ulong)token * groups + g] : 0.0f;
        dgroup_out[g] = given + sum_values(d + g * size, size) - share * total;
        back_within(&r, &row, d, g * size, (g + 1) * size);
    }
    for (uint pair = all.x; pair < all.y && dscale; pair++)
        AT(dscale)[pair] = pair < range.end ? AT(dpair_weights)[pair] * r.scale *
                                                  renormed_weight(&r, &v, &sums, 0.0f,
                                                                  pair - range.begin)
                                            : 0.0f;
}

/* The combine weights again, before they were rebalanced. */
KERNEL(GROUP, 1, 1)
void two_level_weights(IN(float, logits), IN(float, group_logits), IN(uint, state), IN(int, ids),
                       IN(int, live), IN(uchar, token_mask), IN(float, expert_scale),
                       OUT(float, chosen), uint tokens, int groups, router_switches r) {
    __global const int *token_offsets = 0;
    const ulong token_offsets_off = 0;
    token_owner owner = OWNER_INIT(r.top_k, tokens * (uint)r.top_k, r.top_k);
    const uint token = get_global_id(0), R = (uint)r.columns;
    if (token >= tokens)
        return;
    const pair_range range = owned_pairs(&owner, token);
    const uint2 all = token_pairs(&owner, token);
    weight_view v = {AT(ids) + range.begin,
                     0,
                     AT(logits) + (ulong)token * R,
                     GIVEN(expert_scale),
                     AT(chosen) + range.begin,
                     0,
                     true,
                     range.end - range.begin,
                     R,
                     temperature_of(&r, STATE_OF(state)),
                     0.0f,
                     0.0f,
                     0.0f};
    renorm_sums sums;
    raw_weights(&r, &v, AT(group_logits) + (ulong)token * groups, groups,
                AT(chosen) + range.begin);
    renorm_back(&r, &v, 0.0f, &sums);
    for (uint pair = all.x; pair < all.y; pair++)
        AT(chosen)[pair] = pair < range.end
                               ? chosen_weight(&r, &v, &sums, 0.0f, pair - range.begin)
                               : 0.0f;
}
