/*
 * Purpose: routing in two levels: groups of experts first, experts within each group then.
 * Formula: a group is picked if its logit is among the topk_groups best finite ones, ties to the
 *          lower group. score = softmax of the group logits * softmax of l within the group,
 *          -infinity in the groups that were not picked. Choice: of each picked group the K /
 *          topk_groups best scores + select_bias, ties to the lower id.
 * Arrays: group_logits [T,groups], scores [T,R] in place: l, -infinity where not finite. Then
 *          scores, select_bias [R] or NULL, expert_scale [R] or NULL -> ids [T,K], pair_weights
 *          [T,K], live [T]: group by group in ascending order, the best of a group first; the pairs
 *          past live have weight 0 and ids that the token did not choose.
 * NDRange: a work-item per token.
 * Limits: topk_groups divides K, and K / topk_groups <= R / groups.
 * Repeatability: one work-item does a token, in the order of columns.
 */
#include "routing/router.clh"

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
