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

/* Of one token, what the way from combine weights back to its logits needs. */
typedef struct weight_view {
    __global const int *ids;      /* [count] */
    __global const int *slot_of;  /* [count], NULL unless weights are renormalised after dropping */
    __global const float *logits; /* [R] noisy */
    __global const float *expert_scale; /* [R] or NULL */
    __global const float *grads;        /* [R] dL/dw */
    uint count, columns;
    float temperature, best, chosen_best, chosen_total; /* of softmax over the chosen */
} weight_view;

/* Whether the choice has weight 0 because of its place; softmax over the chosen counts it. */
static inline bool is_dropped(const weight_view *v, uint k) {
    return v->slot_of && v->slot_of[k] == SLOT_NONE;
}

static inline float prepared_choice(const router_switches *r, const weight_view *v, uint k) {
    uint id = (uint)v->ids[k];
    float logit = id < v->columns ? v->logits[id] : -INFINITY;
    return prepared_logit(r, v->temperature, logit);
}

/*
 * The weight of choice k before dropping and renormalisation. `total` is that of softmax over the
 * row.
 */
static inline float plain_weight(const router_switches *r, const weight_view *v, float total,
                                 uint k) {
    float l = prepared_choice(r, v, k);
    if (l == -INFINITY)
        return 0.0f;
    if (r->score != SCORE_SOFTMAX)
        return score_of(r->score, l);
    return r->topk_first ? exp(l - v->chosen_best) / v->chosen_total : exp(l - v->best) / total;
}

/* dL/d(weight of choice k after renormalisation). */
static inline float renormed_gradient(const router_switches *r, const weight_view *v, uint k) {
    uint id = (uint)v->ids[k];
    if (id >= v->columns)
        return 0.0f;
    return v->grads[id] * r->scale * (v->expert_scale ? v->expert_scale[id] : 1.0f);
}

/* What all choices of a token share on the way back. */
typedef struct renorm_sums {
    renorm_unit unit;
    float norm; /* what shares are divided by; 0: the sum is 0, and nothing comes back */
    float dot;  /* sum of gradient * renormalised weight */
} renorm_sums;

/* The weight of choice k that is renormalised. */
static inline float placed_weight(const router_switches *r, const weight_view *v, float total,
                                  uint k) {
    return is_dropped(v, k) ? 0.0f : plain_weight(r, v, total, k);
}

static inline void renorm_back(const router_switches *r, const weight_view *v, float total,
                               renorm_sums *sums) {
    float largest = 0.0f, sum = 0.0f;
    sums->norm = 1.0f;
    sums->dot = 0.0f;
    if (r->renorm == RENORM_NONE)
        return;
    for (uint k = 0; k < v->count; k++)
        largest = fmax(largest, fabs(placed_weight(r, v, total, k)));
    sums->unit = renorm_unit_of(r, largest);
    for (uint k = 0; k < v->count; k++) {
        float share = renorm_share(&sums->unit, placed_weight(r, v, total, k));
        sum += renorm_term(r, share);
        sums->dot += renormed_gradient(r, v, k) * share;
    }
    sums->norm = renorm_norm(r, &sums->unit, sum);
    sums->dot = sums->norm == 0.0f ? 0.0f : sums->dot / sums->norm;
}

/* dL/d(weight of choice k before renormalisation). */
static inline float plain_gradient(const router_switches *r, const weight_view *v,
                                   const renorm_sums *sums, float total, uint k) {
    float g = renormed_gradient(r, v, k);
    if (is_dropped(v, k) || prepared_choice(r, v, k) == -INFINITY)
        return 0.0f;
    if (r->renorm == RENORM_NONE)
        return g;
    if (sums->norm == 0.0f)
        return 0.0f;
    float share = renorm_share(&sums->unit, plain_weight(r, v, total, k));
    float d_share = (g - sums->dot * renorm_slope(r, share, sums->norm)) / sums->norm;
    return clamp(renorm_share(&sums->unit, d_share), -FLT_MAX, FLT_MAX);
}

/* The largest and the sum of exp of the chosen logits. */
static inline void chosen_softmax(const router_switches *r, weight_view *v) {
    v->chosen_best = -INFINITY;
    v->chosen_total = 0.0f;
    for (uint k = 0; k < v->count; k++)
        v->chosen_best = fmax(v->chosen_best, prepared_choice(r, v, k));
    for (uint k = 0; k < v->count; k++) {
        float l = prepared_choice(r, v, k);
        v->chosen_total += l == -INFINITY ? 0.0f : exp(l - v->chosen_best);
    }
}

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
                     pairs.end - pairs.begin,
                     R,
                     temperature_of(&r, STATE_OF(state)),
                     t.best,
                     0.0f,
                     0.0f};
    bool over_row = r.score == SCORE_SOFTMAX && !r.topk_first;
    bool over_chosen = r.score == SCORE_SOFTMAX && r.topk_first;
    if (r.renorm_late)
        v.slot_of = AT(slot_of) + pairs.begin;
    if (expert_scale)
        v.expert_scale = AT(expert_scale);
    v.grads = AT(grads) + ((ulong)SUM_WEIGHTS * s.sequences + token / s.sequence) * R;
    chosen_softmax(&r, &v);
    renorm_sums sums;
    renorm_back(&r, &v, t.total, &sums);

    float dot = 0.0f;
    for (uint k = 0; k < v.count; k++)
        dot += plain_gradient(&r, &v, &sums, t.total, k) * plain_weight(&r, &v, t.total, k);
    for (uint e = get_local_id(0); e < R && over_row && v.count > 0; e += GROUP)
        if (isfinite(row.logits[e])) {
            float l = prepared_logit(&r, v.temperature, row.logits[e]);
            add_one(&row, &r, v.temperature, e, -dot * exp(l - t.best) / t.total);
        }
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint k = 0; k < v.count && get_local_id(0) == 0; k++) {
        float d = plain_gradient(&r, &v, &sums, t.total, k), l = prepared_choice(&r, &v, k);
        if (l == -INFINITY)
            continue;
        if (over_row)
            d *= plain_weight(&r, &v, t.total, k);
        else if (over_chosen)
            d = (d - dot) * plain_weight(&r, &v, t.total, k);
        else
            d *= score_slope(r.score, l, score_of(r.score, l));
        add_one(&row, &r, v.temperature, (uint)v.ids[k], d);
    }
}
