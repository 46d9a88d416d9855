/*
 * Purpose: balancing losses: their values, and their gradient on the logits.
 * Formula: see balance.h. loss_values: each loss, and g = dL/dF (or dL/dP), with weight / T folded
 *          in, added up by source of P. loss_gradient: through p, softcap and temperature to the
 *          logits, and through learned noise to x Wn^T; for P = combine weights see
 *          loss_weights.cl.
 * Arrays: sums [Q, batch] records, load [R] u32 of the plan, state, load_target [E], load_supplied
 *          [E] or NULL -> values [losses,Q] f32, grads [GRAD_SOURCES,Q,R] f32. logits [T,R] noisy,
 *          clean [T,R], noise_raw [T,R] or NULL, rows [T] token_row, grads -> dlogits, dnoise [T,R]
 *          f32 or NULL, added to.
 * NDRange: loss_values: one group per sequence. loss_mean: one group. loss_gradient: one group per
 *          token, V columns a work-item.
 * Limits: at most MAX_LOSSES losses; E a multiple of the device groups.
 * Repeatability: fixed orders; sums over experts and columns depend on GROUP alone.
 */
#include "balance/gradient.clh"

#define UNROLL _Pragma("unroll")

/* One loss of one sequence or batch, over n cells: experts, or device groups of `each`. */
typedef struct cells {
    loss_item item;
    uint n, each;
    __global const uint *counts;   /* or */
    __global const float *shares;  /* F unnormalised */
    __global const float *targets; /* NULL: uniform */
    __global const float *sums;    /* of P over the tokens, or the smooth load */
    float tokens;                  /* what sums are divided by */
    uint total;                    /* of counts */
    float share_total, target_total, eps, beta, reach, places;
    uint capacity;
    /* Found on the way. */
    float mean, best, first, sum, variance;
} cells;

static inline uint cell_count(const cells *c, uint d) {
    uint sum = 0;
    for (uint i = 0; i < c->each; i++)
        sum += c->counts[d * c->each + i];
    return sum;
}

static inline float cell_sum(__global const float *values, uint each, uint d) {
    float sum = 0.0f;
    for (uint i = 0; i < each; i++)
        sum += values[d * each + i];
    return sum;
}

static inline float cell_share(const cells *c, uint d) {
    if (c->counts)
        return c->total ? (float)cell_count(c, d) / (float)c->total : 0.0f;
    return c->share_total > 0.0f ? cell_sum(c->shares, c->each, d) / c->share_total : 0.0f;
}

static inline float cell_target(const cells *c, uint d) {
    return c->targets ? cell_sum(c->targets, c->each, d) / c->target_total : 1.0f / (float)c->n;
}

/* F - 1/n, in integers where F counts: exactly 0 when balanced. */
static inline float cell_excess(const cells *c, uint d) {
    if (!c->counts)
        return cell_share(c, d) - 1.0f / (float)c->n;
    long over = (long)cell_count(c, d) * c->n - (long)c->total;
    return c->total ? (float)over / (float)c->total / (float)c->n : 0.0f;
}

static inline float cell_away(const cells *c, uint d) {
    return c->targets ? cell_share(c, d) - cell_target(c, d) : cell_excess(c, d);
}

/* P, or the smooth load. */
static inline float cell_p(const cells *c, uint d) {
    return cell_sum(c->sums, c->each, d) / c->tokens;
}

static inline float cell_overflow(const cells *c, uint d) {
    uint count = cell_count(c, d);
    return count > c->capacity ? (float)count - (float)c->capacity : 0.0f;
}

static inline bool is_importance(int kind) {
    return kind == LOSS_IMPORTANCE_VARIANCE || kind == LOSS_IMPORTANCE_CV2 ||
           kind == LOSS_SMOOTH_LOAD;
}

/* What a loss adds up over its cells. */
static inline float cell_term(const cells *c, uint d) {
    float share;
    switch (c->item.kind) {
    case LOSS_SWITCH:
        return cell_share(c, d) * cell_p(c, d);
    case LOSS_SQUARED:
        return 0.5f * squared(cell_away(c, d));
    case LOSS_ENTROPY:
        share = cell_share(c, d);
        if (c->targets)
            return divergence_term(share, cell_target(c, d), cell_away(c, d));
        return share > 0.0f ? share * log(share) : 0.0f;
    case LOSS_L1:
        return fabs(cell_away(c, d));
    case LOSS_MINIMAX:
        return exp(c->beta * (cell_share(c, d) - c->best));
    case LOSS_LOAD_CV2:
        return squared(cell_excess(c, d));
    case LOSS_COMMUNICATION:
        return cell_p(c, d) * (float)c->counts[d];
    case LOSS_OVERFLOW:
        return cell_overflow(c, d);
    default:
        return is_importance(c->item.kind) ? squared(cell_p(c, d) - c->mean) : 0.0f;
    }
}

/* The loss from its sum of terms. */
static inline float loss_value(const cells *c) {
    float n = (float)c->n;
    switch (c->item.kind) {
    case LOSS_SWITCH:
        return n * c->sum;
    case LOSS_MAX:
        return c->best;
    case LOSS_MINIMAX:
        return c->best + log(c->sum) / c->beta;
    case LOSS_IMPORTANCE_VARIANCE:
        return c->variance;
    case LOSS_IMPORTANCE_CV2:
    case LOSS_SMOOTH_LOAD:
        return c->variance / (c->mean * c->mean + 1e-10f);
    case LOSS_LOAD_CV2:
        return n * c->sum;
    case LOSS_COMMUNICATION:
        return c->sum * n / (c->reach * c->tokens);
    case LOSS_OVERFLOW:
        return c->sum / c->places;
    default:
        return c->sum;
    }
}

/* dL/dF or dL/dP of a cell, in the units of its expert's P. */
static inline float cell_gradient(const cells *c, uint d) {
    float n = (float)c->n, square = c->mean * c->mean + 1e-10f, away;
    switch (c->item.kind) {
    case LOSS_SWITCH:
        return n * cell_share(c, d);
    case LOSS_SQUARED:
        return cell_away(c, d);
    case LOSS_ENTROPY:
        return log(fmax(cell_share(c, d), c->eps) / cell_target(c, d)) + 1.0f;
    case LOSS_L1:
        away = cell_away(c, d);
        return away > 0.0f ? 1.0f : (away < 0.0f ? -1.0f : 0.0f);
    case LOSS_MAX:
        return (float)d == c->first ? 1.0f : 0.0f;
    case LOSS_MINIMAX:
        return exp(c->beta * (cell_share(c, d) - c->best)) / c->sum;
    case LOSS_IMPORTANCE_VARIANCE:
        return 2.0f * (cell_p(c, d) - c->mean) / n;
    case LOSS_IMPORTANCE_CV2:
    case LOSS_SMOOTH_LOAD:
        away = 2.0f * (cell_p(c, d) - c->mean) / n;
        return away / square - c->variance / square * (2.0f * c->mean / n / square);
    case LOSS_LOAD_CV2:
        return 2.0f * n * (cell_excess(c, d) - c->sum);
    case LOSS_COMMUNICATION:
        return (float)c->counts[d] * n / (c->reach * c->tokens);
    default: /* LOSS_OVERFLOW */
        return cell_count(c, d) > c->capacity ? 1.0f : 0.0f;
    }
}

/* Whether the loss has something to go by. */
static inline bool is_known(const cells *c, float tokens) {
    int kind = c->item.kind;
    bool has_load = c->counts ? c->total > 0 : c->share_total > 0.0f;
    int by_tokens = is_importance(kind) | (kind == LOSS_Z) | (kind == LOSS_TOKEN_ENTROPY) |
                    (kind == LOSS_COMMUNICATION) | (kind == LOSS_OVERFLOW);
    return (tokens > 0.0f) & (by_tokens | has_load);
}

/* Where the loss reads, and what it knows before the sums. */
static inline void cells_of(const sums_shape *s, const loss_item *item, __global const uint *record,
                            bool whole, float tokens, __global const uint *load,
                            __global const state_header *state, __global const float *target,
                            __global const float *supplied, cells *c) {
    c->item = *item;
    uint groups =
        c->item.by_device || c->item.kind == LOSS_COMMUNICATION ? s->device_groups : s->experts;
    c->n = groups;
    c->each = s->experts / groups;
    c->counts = 0;
    c->shares = 0;
    if (c->item.kind == LOSS_COMMUNICATION)
        c->counts = record + devices_at(s);
    else if (c->item.load == LOAD_EMA)
        c->shares = (__global const float *)(state + 1) + s->columns;
    else if (c->item.load == LOAD_SUPPLIED)
        c->shares = supplied;
    else if (c->item.load == COUNT_ASSIGNED && whole)
        c->counts = load;
    else
        c->counts = record + count_at(s, (uint)c->item.load);
    c->targets = target;
    c->sums = (__global const float *)record + min(c->item.source, (int)SUM_SMOOTH) * s->columns;
    c->tokens = c->item.source == SUM_SMOOTH ? 1.0f : tokens;
    c->places = tokens * (float)s->top_k;
    c->eps = 0.5f / c->places;
    c->beta = c->item.beta > 0.0f ? c->item.beta : 10.0f * (float)c->n;
    c->reach = (float)item->reach;
    c->capacity = effective_capacity(state, item->capacity);
    c->total = 0;
    c->share_total = c->target_total = c->mean = c->best = c->first = c->sum = c->variance = 0.0f;
}

/* The totals that shares and targets are divided by. */
void measure_totals(cells *c, __local float *tmp, __local uint *uint_tmp) {
    uint total = 0;
    uint counted = c->counts && c->item.kind != LOSS_COMMUNICATION ? c->n : 0;
    float shares = 0.0f, shares_lost = 0.0f, targets = 0.0f, targets_lost = 0.0f;
    for (uint d = get_local_id(0); d < counted; d += GROUP)
        total += cell_count(c, d);
    for (uint d = get_local_id(0); d < c->n && c->shares; d += GROUP)
        ADD_CAREFULLY(float, shares, shares_lost, cell_sum(c->shares, c->each, d));
    for (uint d = get_local_id(0); d < c->n && c->targets; d += GROUP)
        ADD_CAREFULLY(float, targets, targets_lost, cell_sum(c->targets, c->each, d));
    c->total = group_total(total, uint_tmp);
    c->share_total = group_sum(shares, tmp);
    c->target_total = group_sum(targets, tmp);
}

/* Mean, best and sum: what else loss_value() and cell_gradient() need. */
void measure_terms(cells *c, bool known, __local float *tmp) {
    uint n = known ? c->n : 0;
    bool by_p = is_importance(c->item.kind);
    bool by_load = c->item.kind == LOSS_MAX || c->item.kind == LOSS_MINIMAX;
    float mean = 0.0f, best = -INFINITY, first = -INFINITY, sum = 0.0f, lost = 0.0f;
    for (uint d = get_local_id(0); d < n && by_p; d += GROUP)
        ADD_CAREFULLY(float, mean, lost, cell_p(c, d));
    for (uint d = get_local_id(0); d < n && by_load; d += GROUP)
        best = fmax(best, cell_share(c, d));
    c->mean = group_sum(mean, tmp) / (float)c->n;
    c->best = group_max(best, tmp);
    for (uint d = get_local_id(0); d < n && by_load; d += GROUP)
        first = fmax(first, cell_share(c, d) == c->best ? -(float)d : -INFINITY);
    c->first = -group_max(first, tmp);
    lost = 0.0f;
    for (uint d = get_local_id(0); d < n; d += GROUP)
        ADD_CAREFULLY(float, sum, lost, cell_term(c, d));
    c->sum = group_sum(sum, tmp);
    c->variance = c->sum / (float)c->n;
}

/* A loss of terms of each token is their mean; the others come from the cells. */
static inline float whole_value(const cells *c, __global const uint *scalars, float tokens) {
    switch (c->item.source) {
    case GRAD_Z:
        return as_float(scalars[SCALAR_LSE_SQUARED]) / tokens;
    case GRAD_ENTROPY:
        return -as_float(scalars[SCALAR_ENTROPY]) / tokens;
    case GRAD_SOFT_ENTROPY:
        return -as_float(scalars[SCALAR_SOFT_ENTROPY]) / tokens;
    default:
        return loss_value(c);
    }
}

KERNEL(GROUP, 1, 1)
void loss_values(IN(uint, sums), IN(uint, load), IN(uint, state), IN(float, load_target),
                 IN(float, load_supplied), OUT(float, values), OUT(float, grads), sums_shape s,
                 loss_table table, uint count) {
    __local float tmp[GROUP];
    __local uint uint_tmp[GROUP];
    /* Where an index may vary: of a value, the table would fill the registers and spill. */
    __local loss_item items[MAX_LOSSES];
    __global const state_header *header = STATE_OF(state);
    uint q = get_group_id(0), R = s.columns;
    if (get_local_id(0) == 0)
        UNROLL for (uint i = 0; i < MAX_LOSSES; i++) items[i] = table.items[i];
    group_barrier(CLK_LOCAL_MEM_FENCE);
    sums = AT(sums);
    values = AT(values);
    grads = AT(grads);
    __global const uint *batch = sums + (ulong)batch_record(&s) * record_words(&s);
    for (uint i = 0; i < count; i++) {
        const loss_item item = items[i];
        /* The capacity is each sequence's; what passes it adds up to the batch's. */
        bool whole = (!item.each && item.kind != LOSS_OVERFLOW) || s.sequences == 1;
        __global const uint *record = whole ? batch : sums + (ulong)q * record_words(&s);
        __global const uint *scalars = (item.each ? record : batch) + scalars_at(&s);
        float tokens = (float)scalars[SCALAR_TOKENS];
        cells c;
        cells_of(&s, &item, record, whole, tokens, AT(load), header,
                 GIVEN(load_target),
                 GIVEN(load_supplied), &c);
        float sequences =
            whole || !item.each ? 1.0f : (float)batch[scalars_at(&s) + SCALAR_SEQUENCES];
        measure_totals(&c, tmp, uint_tmp);
        bool known = is_known(&c, tokens);
        measure_terms(&c, known, tmp);
        float factor = known ? item.weight : 0.0f;
        if (item.controlled)
            factor *= header->loss_weight;
        factor /= (item.source == SUM_SMOOTH ? 1.0f : fmax(tokens, 1.0f)) * fmax(sequences, 1.0f);
        if (get_local_id(0) == 0)
            values[(ulong)i * s.sequences + q] = known ? whole_value(&c, scalars, tokens) : 0.0f;
        __global float *to = grads + ((ulong)item.source * s.sequences + q) * R;
        uint written = item.source >= GRAD_Z ? 1 : R;
        for (uint e = get_local_id(0); e < written; e += GROUP) {
            float g = item.source >= GRAD_Z ? 1.0f : 0.0f;
            if (item.source < GRAD_Z && e < s.experts && known)
                g = cell_gradient(&c, e / c.each);
            g = known ? g * factor : 0.0f;
            to[e] = item.adds ? to[e] + g : g;
        }
    }
}

/* values [losses,Q] -> [losses]: the mean over the live sequences, their sum, or the batch's. */
KERNEL(GROUP, 1, 1)
void loss_mean(IN(float, values), IN(uint, sums), OUT(float, out), sums_shape s, uint count,
               uint each, uint summed) {
    uint live = AT(sums)[(ulong)batch_record(&s) * record_words(&s) + scalars_at(&s) +
                         SCALAR_SEQUENCES];
    for (uint i = get_local_id(0); i < count; i += GROUP) {
        __global const float *of = AT(values) + (ulong)i * s.sequences;
        float sum = 0.0f, lost = 0.0f;
        for (uint q = 0; q < s.sequences; q++)
            ADD_CAREFULLY(float, sum, lost, of[q]);
        if (each >> i & 1u)
            sum /= fmax((float)live, 1.0f);
        AT(out)[i] = ((each | summed) >> i & 1u) ? sum : of[0];
    }
}

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
    uint token = get_group_id(0), R = s.columns;
    token_row t = ((__global const token_row *)AT(rows))[token];
    uint columns = (t.flags & TOKEN_LIVE) && t.best != -INFINITY ? R : 0;
    gradient_row row;
    row_at(AT(logits), AT(clean), GIVEN(noise_raw), GIVEN(dlogits), GIVEN(dnoise), token, R, &row);
    gradient_view g;
    for (uint i = 0; i < GRAD_SOURCES; i++)
        g.of[i] = sources & (1u << i)
                      ? AT(grads) + ((ulong)i * s.sequences + token / s.sequence) * R
                      : 0;

    float dot_p = 0.0f, dot_softmax = 0.0f;
    for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
        FLOATV l = prepared_columns(&r, temperature, load_columns(row.logits, e, R, -INFINITY));
        if (g.of[SUM_NORMALISED] && t.scores != 0.0f)
            dot_p += sum_columns(score_columns(&r, t.best, l) / t.scores *
                                 relative_grad(g.of[SUM_NORMALISED], &t, e, R));
        if (g.of[SUM_SOFTMAX])
            dot_softmax += sum_columns((l == -INFINITY ? (FLOATV)(0.0f) : exp(l - t.best)) /
                                       t.total * relative_grad(g.of[SUM_SOFTMAX], &t, e, R));
    }
    dot_p = group_sum(dot_p, tmp);
    dot_softmax = group_sum(dot_softmax, tmp);
    for (uint e = get_local_id(0) * V; e < columns; e += GROUP * V) {
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
