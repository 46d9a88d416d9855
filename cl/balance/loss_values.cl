/*
 * Purpose: balancing losses: their values, and where their gradient starts.
 * Formula: see balance.h and loss_function.clh. loss_values: each loss, and g = dL/dF (or dL/dP),
 *          with weight / T folded in. loss_gather: those added up by source of P, in the order of
 *          losses, and the values' mean over the sequences.
 * Arrays: sums [Q, batch] records, load [R] u32 of the plan, state, load_target [E], load_supplied
 *          [E] or NULL -> values [losses,Q], parts [losses,Q,R] f32; then values, parts and sums ->
 *          grads [GRAD_SOURCES,Q,R], out [losses] f32 or NULL.
 * NDRange: loss_values: one group per (sequence, loss). loss_gather: one group per sequence, and
 *          one for the values.
 * Limits: at most MAX_LOSSES losses; E a multiple of the device groups.
 * Repeatability: fixed orders; sums over experts and columns depend on GROUP alone.
 */
#include "balance/balance.clh"

/* One loss of one sequence or batch, over n cells: experts, or device groups of `span`. */
typedef struct cells {
    loss_item item;
    uint n, span;
    __global const uint *counts;   /* or */
    __global const float *shares;  /* F unnormalised */
    __global const float *targets; /* NULL: uniform */
    __global const float *sums;    /* of P over the tokens, or the smooth load */
    float tokens, scale;           /* what sums are divided by */
    uint total;                    /* of counts */
    float share_total, target_total, eps, beta, reach, places;
    uint capacity;
    /* Found on the way; mean, and sum and variance of importance kinds, in units of `unit`. */
    float mean, best, first, sum, variance, unit;
} cells;

static inline uint cell_count(const cells *c, uint d) {
    uint sum = 0;
    for (uint i = 0; i < c->span; i++)
        sum += c->counts[d * c->span + i];
    return sum;
}

static inline float cell_sum(__global const float *values, uint span, uint d) {
    float sum = 0.0f;
    for (uint i = 0; i < span; i++)
        sum += values[d * span + i];
    return sum;
}

static inline float cell_share(const cells *c, uint d) {
    if (c->counts)
        return c->total ? (float)cell_count(c, d) / (float)c->total : 0.0f;
    return is_divisor(c->share_total) ? cell_sum(c->shares, c->span, d) / c->share_total : 0.0f;
}

static inline float cell_target(const cells *c, uint d) {
    return c->targets ? cell_sum(c->targets, c->span, d) / c->target_total : 1.0f / (float)c->n;
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
    return cell_sum(c->sums, c->span, d) / c->tokens / c->scale;
}

/* Its distance from the mean. */
static inline float cell_off(const cells *c, uint d) {
    return cell_p(c, d) / c->unit - c->mean;
}

static inline float cell_overflow(const cells *c, uint d) {
    uint count = cell_count(c, d);
    return count > c->capacity ? (float)count - (float)c->capacity : 0.0f;
}

static inline bool is_importance(int kind) {
    return kind == LOSS_IMPORTANCE_VARIANCE || kind == LOSS_IMPORTANCE_CV2 ||
           kind == LOSS_SMOOTH_LOAD;
}

/* A term of sum F log(F / Q), or of sum F log F. */
static inline float cell_entropy(const cells *c, uint d) {
    float share = cell_share(c, d);
    if (c->targets)
        return divergence_term(share, cell_target(c, d), cell_away(c, d));
    return share > 0.0f ? share * log(share) : 0.0f;
}

static inline float sign_of(float away) {
    return away > 0.0f ? 1.0f : (away < 0.0f ? -1.0f : 0.0f);
}

/* m^2 + 1e-10, what divides the variance. */
static inline float cv2_square(const cells *c) {
    return c->mean * c->mean + 1e-10f / c->unit / c->unit;
}

/* d(v / (m^2 + 1e-10)) of a cell, v and m variance and mean over n cells. */
static inline float cv2_slope(const cells *c, uint d) {
    float n = (float)c->n, square = cv2_square(c);
    float away = 2.0f * cell_off(c, d) / n;
    return (away / square - c->variance / square * (2.0f * c->mean / n / square)) / c->unit;
}

#define LOSS_TERM(NAME, name, reads_load, term, value, gradient)                                   \
    case LOSS_##NAME:                                                                              \
        return term;
#define LOSS_VALUE(NAME, name, reads_load, term, value, gradient)                                  \
    case LOSS_##NAME:                                                                              \
        return value;
#define LOSS_GRADIENT(NAME, name, reads_load, term, value, gradient)                               \
    case LOSS_##NAME:                                                                              \
        return gradient;

/* What a loss adds up over its cells. */
static inline float cell_term(const cells *c, uint d) {
    switch (c->item.kind) { LOSS_LIST(LOSS_TERM) }
    return 0.0f;
}

/* The loss from its sum of terms. */
static inline float loss_value(const cells *c) {
    float n = (float)c->n;
    switch (c->item.kind) { LOSS_LIST(LOSS_VALUE) }
    return c->sum;
}

/* dL/dF or dL/dP of a cell, in the units of its expert's P. */
static inline float cell_gradient(const cells *c, uint d) {
    float n = (float)c->n;
    switch (c->item.kind) { LOSS_LIST(LOSS_GRADIENT) }
    return 0.0f;
}

/* Whether the loss has something to go by. */
static inline bool is_known(const cells *c, float tokens) {
    int kind = c->item.kind;
    bool has_load = c->counts ? c->total > 0 : is_divisor(c->share_total);
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
    c->span = s->experts / groups;
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
    c->scale = c->item.source == SUM_RAW ? s->raw_scale : 1.0f;
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
        ADD_CAREFULLY(float, shares, shares_lost, cell_sum(c->shares, c->span, d));
    for (uint d = get_local_id(0); d < c->n && c->targets; d += GROUP)
        ADD_CAREFULLY(float, targets, targets_lost, cell_sum(c->targets, c->span, d));
    c->total = group_total(total, uint_tmp);
    c->share_total = group_sum(shares, tmp);
    c->target_total = group_sum(targets, tmp);
    c->targets = is_divisor(c->target_total) ? c->targets : 0;
}

/* Mean, best and sum: what else loss_value() and cell_gradient() need. */
void measure_terms(cells *c, bool known, __local float *tmp) {
    uint n = known ? c->n : 0;
    bool by_p = is_importance(c->item.kind);
    bool by_load = c->item.kind == LOSS_MAX || c->item.kind == LOSS_MINIMAX;
    float mean = 0.0f, best = -INFINITY, first = -INFINITY, sum = 0.0f, lost = 0.0f, most = 0.0f;
    for (uint d = get_local_id(0); d < n && by_p; d += GROUP)
        most = fmax(most, fabs(cell_p(c, d)));
    /* Of logits near FLT_MAX, the usual mask, the squares would be infinite. */
    c->unit = group_max(most, tmp) > 0x1p60f ? 0x1p100f : 1.0f;
    for (uint d = get_local_id(0); d < n && by_p; d += GROUP)
        ADD_CAREFULLY(float, mean, lost, cell_p(c, d) / c->unit);
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

/* Where an index may vary: of a value, the table would fill the registers and spill. */
void copy_items(const loss_table *table, __local loss_item *items) {
    if (get_local_id(0) == 0)
        UNROLL for (uint i = 0; i < MAX_LOSSES; i++) items[i] = table->items[i];
    group_barrier(CLK_LOCAL_MEM_FENCE);
}

KERNEL(GROUP, 1, 1)
void loss_values(IN(uint, sums), IN(uint, load), IN(uint, state), IN(float, load_target),
                 IN(float, load_supplied), OUT(float, values), OUT(float, parts), sums_shape s,
                 loss_table table) {
    __local float tmp[GROUP];
    __local uint uint_tmp[GROUP];
    __local loss_item items[MAX_LOSSES];
    __global const state_header *header = STATE_OF(state);
    const uint q = get_group_id(0), i = get_group_id(1), R = s.columns;
    copy_items(&table, items);
    sums = AT(sums);
    __global const uint *batch = sums + (ulong)batch_record(&s) * record_words(&s);
    const loss_item item = items[i];
    /* The capacity is each sequence's; what passes it adds up to the batch's. */
    bool whole = (!item.per_sequence && item.kind != LOSS_OVERFLOW) || s.sequences == 1;
    __global const uint *record = whole ? batch : sums + (ulong)q * record_words(&s);
    __global const uint *scalars = (item.per_sequence ? record : batch) + scalars_at(&s);
    float tokens = (float)scalars[SCALAR_TOKENS];
    cells c;
    cells_of(&s, &item, record, whole, tokens, AT(load), header, GIVEN(load_target),
             GIVEN(load_supplied), &c);
    float sequences =
        whole || !item.per_sequence ? 1.0f : (float)batch[scalars_at(&s) + SCALAR_SEQUENCES];
    measure_totals(&c, tmp, uint_tmp);
    bool known = is_known(&c, tokens);
    measure_terms(&c, known, tmp);
    float factor = known ? item.weight : 0.0f;
    if (item.controlled)
        factor *= header->loss_weight;
    factor /= (item.source == SUM_SMOOTH ? 1.0f : fmax(tokens, 1.0f)) * fmax(sequences, 1.0f);
    if (get_local_id(0) == 0)
        AT(values)[(ulong)i * s.sequences + q] = known ? whole_value(&c, scalars, tokens) : 0.0f;
    __global float *to = AT(parts) + ((ulong)i * s.sequences + q) * R;
    uint written = item.source >= GRAD_Z ? 1 : R;
    for (uint e = get_local_id(0); e < written; e += GROUP) {
        float g = item.source >= GRAD_Z ? 1.0f : 0.0f;
        if (item.source < GRAD_Z && e < s.experts && known)
            g = cell_gradient(&c, e / c.span);
        to[e] = known ? g * factor : 0.0f;
    }
}

/* values [losses,Q] -> out [losses]: means over the live sequences, their sum, or the batch's. */
static inline void mean_values(__global const float *values, __global const uint *sums,
                               const sums_shape *s, uint count, uint per_sequence, uint summed,
                               __global float *out) {
    uint live = sums[(ulong)batch_record(s) * record_words(s) + scalars_at(s) + SCALAR_SEQUENCES];
    for (uint i = get_local_id(0); i < count; i += GROUP) {
        __global const float *of = values + (ulong)i * s->sequences;
        float sum = 0.0f, lost = 0.0f;
        for (uint q = 0; q < s->sequences; q++)
            ADD_CAREFULLY(float, sum, lost, of[q]);
        if (per_sequence >> i & 1u)
            sum /= fmax((float)live, 1.0f);
        out[i] = ((per_sequence | summed) >> i & 1u) ? sum : of[0];
    }
}

KERNEL(GROUP, 1, 1)
void loss_gather(IN(float, values), IN(float, parts), IN(uint, sums), OUT(float, grads),
                 OUT(float, out), sums_shape s, loss_table table, uint count, uint per_sequence,
                 uint summed) {
    __local loss_item items[MAX_LOSSES];
    const uint q = get_group_id(0), R = s.columns;
    copy_items(&table, items);
    if (q == s.sequences) {
        mean_values(AT(values), AT(sums), &s, out ? count : 0, per_sequence, summed, AT(out));
        return;
    }
    parts = AT(parts);
    grads = AT(grads);
    for (uint i = 0; i < count; i++) {
        const uint source = (uint)items[i].source, written = source >= GRAD_Z ? 1 : R;
        for (uint e = get_local_id(0); e < written; e += GROUP) {
            __global float *to = grads + ((ulong)source * s.sequences + q) * R + e;
            const float g = parts[((ulong)i * s.sequences + q) * R + e];
            *to = items[i].adds ? *to + g : g;
        }
    }
}
