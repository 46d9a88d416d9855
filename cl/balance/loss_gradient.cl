/*
 * Purpose: the gradient of balancing losses on the logits.
 * Formula: see balance.h: from g through p, softcap and temperature to the logits, and through
 *          learned noise to x Wn^T; for P = combine weights see loss_weights.cl.
 * Arrays: logits [T,R] noisy, clean [T,R], noise_raw [T,R] or NULL, state or NULL, rows [T]
 *          token_row, grads [GRAD_SOURCES,Q,R] f32 -> dlogits, dnoise [T,R] f32 or NULL, added to.
 * NDRange: a token per team of TEAM work-items, GROUP / TEAM teams a group.
 * Limits: GROUP and TEAM powers of two; with GROUP 1 V is 16.
 * Repeatability: sums over columns depend on TEAM * V alone, or with GROUP 1 on V.
 */
#include "balance/gradient.clh"
#include "balance/team.clh"

/* Gradients by source of one token's sequence; NULL where no loss has it. */
typedef struct gradient_view {
    __global const float *of[GRAD_SOURCES];
} gradient_view;

static inline FLOATV grad_at(__global const float *g, uint e, uint columns) {
    return load_columns(g, e, columns, 0.0f);
}

/* On the smooth load: dL/dl and dL/dsigma of one token's columns. */
static inline FLOATV smooth_slope(const token_row *t, FLOATV noisy, FLOATV clean, FLOATV sigma,
                                  uint e, FLOATV *d_sigma) {
    const FLOATV none = (FLOATV)(0.0f);
    UINTV order = ordered_columns(noisy);
    INTV in = (order > t->kth) | ((order == t->kth) &
                                  (AS_INTV((UINTV)(e)) + LANE_COLUMNS <= (INTV)((int)t->last_tie)));
    FLOATV threshold = in ? (FLOATV)(float_of_order(t->next)) : (FLOATV)(float_of_order(t->kth));
    FLOATV z = (clean - threshold) / sigma;
    FLOATV slope = 0.3989422804014327f * exp(-0.5f * z * z) / sigma;
    INTV known = (order > 0u) & (sigma > 0.0f) & isfinite(z);
    *d_sigma = known ? -z * slope : none;
    return known ? slope : none;
}

/*
 * G less that of the token's best column: p does not see the difference, and where p of that column
 * is almost 1 nothing cancels.
 */
static inline FLOATV relative_grad(__global const float *g, const token_row *t, uint e,
                                   uint columns) {
    return grad_at(g, e, columns) - g[t->first_best];
}

/* dL/ds_j of -H, times S. */
static inline FLOATV entropy_slope(const router_switches *r, const token_row *t, FLOATV l,
                                   FLOATV s) {
    const FLOATV none = (FLOATV)(0.0f);
    FLOATV p = s / t->scores;
    if (r->score == SCORE_IDENTITY)
        return (p > 0.0f ? log(p) + 1.0f : none) + t->entropy - t->positive;
    FLOATV log_p = (is_softmax(r) ? below_best(l, t->best) : log(s)) - t->log_scores;
    return s > 0.0f ? log_p + t->entropy : none;
}

/* Gradient of the sums of p by source and of the token's own terms, on the noisy logits. */
static inline FLOATV chain(const router_switches *r, const token_row *t, const gradient_view *g,
                           float temperature, float dot_p, float dot_softmax, uint e, uint columns,
                           FLOATV noisy) {
    FLOATV l = prepared_columns(r, temperature, noisy), d = (FLOATV)(0.0f);
    FLOATV s = score_columns(r, t->best, l), slope = score_slope_of_each(r->score, l, s);
    bool has_p = t->scores != 0.0f;
    if (g->of[SUM_NORMALISED] && has_p)
        d += slope * (relative_grad(g->of[SUM_NORMALISED], t, e, columns) - dot_p) / t->scores;
    if (g->of[SUM_SOFTMAX])
        d += exp(l - t->best) / t->total *
             (relative_grad(g->of[SUM_SOFTMAX], t, e, columns) - dot_softmax);
    if (g->of[SUM_RAW])
        d += (is_softmax(r) ? (FLOATV)(1.0f) : slope) * grad_at(g->of[SUM_RAW], e, columns);
    if (g->of[GRAD_ENTROPY] && has_p)
        d += g->of[GRAD_ENTROPY][0] * slope * entropy_slope(r, t, l, s) / t->scores;
    if (g->of[GRAD_SOFT_ENTROPY])
        d += g->of[GRAD_SOFT_ENTROPY][0] * exp(l - t->best) / t->total *
             (below_best(l, t->best) - t->log_total + t->soft_entropy);
    d *= prepared_columns_slope(r, temperature, noisy);
    if (g->of[GRAD_Z])
        d += g->of[GRAD_Z][0] * 2.0f * t->lse * exp(noisy - t->lse);
    return d;
}

KERNEL(GROUP, 1, 1)
void loss_gradient(IN(float, logits), IN(float, clean), IN(float, noise_raw), IN(uint, state),
                   IN(float, rows), IN(float, grads), OUT(float, dlogits), OUT(float, dnoise),
                   sums_shape s, router_switches r, uint sources) {
    __local float tmp[GROUP];
    __global const state_header *header = STATE_OF(state);
    float temperature = temperature_of(&r, header);
    uint at = get_group_id(0) * (GROUP / TEAM) + get_local_id(0) / TEAM, R = s.columns;
    bool there = at < s.tokens;
    uint token = there ? at : 0;
    token_row t = ((__global const token_row *)AT(rows))[token];
    uint columns = there && (t.flags & TOKEN_UNMASKED) && t.best != -INFINITY ? R : 0;
    gradient_row row;
    row_at(AT(logits), AT(clean), GIVEN(noise_raw), GIVEN(dlogits), GIVEN(dnoise), token, R, &row);
    gradient_view g;
    for (uint i = 0; i < GRAD_SOURCES; i++)
        g.of[i] = sources & (1u << i)
                      ? AT(grads) + ((ulong)i * s.sequences + token / s.sequence) * R
                      : 0;

    column_sums p_sums = 0.0f, softmax_sums = 0.0f;
    for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
        FLOATV l = prepared_columns(&r, temperature, load_columns(row.logits, e, R, -INFINITY));
        if (g.of[SUM_NORMALISED] && t.scores != 0.0f)
            ADD_COLUMNS(p_sums, score_columns(&r, t.best, l) / t.scores *
                                    relative_grad(g.of[SUM_NORMALISED], &t, e, R));
        if (g.of[SUM_SOFTMAX])
            ADD_COLUMNS(softmax_sums, (l == -INFINITY ? (FLOATV)(0.0f) : exp(l - t.best)) /
                                          t.total * relative_grad(g.of[SUM_SOFTMAX], &t, e, R));
    }
    const float dot_p = team_sum(fold_columns(p_sums), tmp);
    const float dot_softmax = team_sum(fold_columns(softmax_sums), tmp);
    for (uint e = FIRST_COLUMN; e < columns; e += NEXT_COLUMNS) {
        FLOATV noisy = load_columns(row.logits, e, R, -INFINITY);
        FLOATV d = chain(&r, &t, &g, temperature, dot_p, dot_softmax, e, R, noisy);
        FLOATV d_clean = (FLOATV)(0.0f), d_raw = (FLOATV)(0.0f);
        if (g.of[SUM_SMOOTH]) {
            FLOATV sigma = noise_deviation(&s, header, row.noise_raw, e), d_sigma;
            FLOATV slope =
                smooth_slope(&t, noisy, load_columns(row.clean, e, R, 0.0f), sigma, e, &d_sigma);
            d_clean = grad_at(g.of[SUM_SMOOTH], e, R) * slope;
            d_raw = grad_at(g.of[SUM_SMOOTH], e, R) * d_sigma * s.noise_scale * header->noise_scale;
        }
        add_gradient(&row, &s, e, noisy, d, d_clean, d_raw);
    }
}
