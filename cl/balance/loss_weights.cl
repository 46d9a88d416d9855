/*
 * Purpose: the gradient of losses of the combine weights, on the logits.
 * Formula: see balance.h, p_source weights: through scale, renormalisation (see router.clh) and the
 *          score of the chosen, softcap and temperature to the logits, and through learned noise to
 *          x Wn^T.
 * Arrays: logits [T,R] noisy, clean [T,R], noise_raw [T,R] or NULL, rows [T] token_row, grads
 *          [GRAD_SOURCES,Q,R] f32 (g with weight / T folded in), ids [pairs], live, token_mask,
 *          token_offsets, slot_of [pairs], expert_scale [R] or NULL -> dlogits, dnoise [T,R] f32 or
 *          NULL, added to.
 * NDRange: one group per token; its lanes stride over the columns.
 * Limits: GROUP a power of two.
 * Repeatability: each number has one owner, the choices of a token come in order.
 */
#include "balance/gradient.clh"
#include "dispatch/pairs.clh"
#include "routing/weights.clh"

KERNEL(GROUP, 1, 1)
void loss_weights(IN(float, logits), IN(float, clean), IN(float, noise_raw), IN(uint, state),
                  IN(float, rows), IN(float, grads), OUT(float, dlogits), OUT(float, dnoise),
                  IN(int, ids), IN(int, live), IN(uchar, token_mask), IN(int, token_offsets),
                  IN(int, slot_of), IN(float, expert_scale), sums_shape s, router_switches r) {
    token_owner owner = OWNER_INIT(s.top_k, s.pairs, s.token_pairs);
    uint token = get_group_id(0), R = s.columns;
    token_row t = ((__global const token_row *)AT(rows))[token];
    pair_range pairs = owned_pairs(&owner, token);
    gradient_row row;
    row_at(AT(logits), AT(clean), GIVEN(noise_raw), GIVEN(dlogits), GIVEN(dnoise), token, R, &row);
    weight_view v = {AT(ids) + pairs.begin,
                     0,
                     row.logits,
                     0,
                     0,
                     0,
                     false,
                     pairs.end - pairs.begin,
                     R,
                     temperature_of(&r, STATE_OF(state)),
                     t.best,
                     0.0f,
                     0.0f};
    bool over_row = r.score == SCORE_SOFTMAX && !r.topk_first;
    if (r.renorm_late)
        v.slot_of = AT(slot_of) + pairs.begin;
    if (expert_scale)
        v.expert_scale = AT(expert_scale);
    v.grads = AT(grads) + ((ulong)SUM_WEIGHTS * s.sequences + token / s.sequence) * R;
    chosen_softmax(&r, &v);
    renorm_sums sums;
    renorm_back(&r, &v, t.total, &sums);

    float dot = weights_dot(&r, &v, &sums, t.total, 0, 1);
    for (uint e = get_local_id(0); e < R && over_row && v.count > 0; e += GROUP)
        if (isfinite(row.logits[e]))
            add_one(&row, &r, v.temperature, e, row_gradient(&r, &v, t.total, dot, e));
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint k = 0; k < v.count && get_local_id(0) == 0; k++)
        if (prepared_choice(&r, &v, k) > -INFINITY)
            add_one(&row, &r, v.temperature, (uint)v.ids[k],
                    choice_gradient(&r, &v, &sums, t.total, dot, k));
}
