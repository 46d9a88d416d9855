/*
 * Purpose: what a batch did to the load.
 * Formula: see clmoe_stats in balance.h.
 * Arrays: load, kept [R] u32, rerouted_in, rerouted_out [R] u32 or NULL, sums [Q, batch] records
 *          (see balance.clh), state or NULL, load_target [E] f32 or NULL -> the header,
 *          clmoe_stats, then eight arrays [R] and device_tokens.
 * NDRange: one group; its lanes stride over experts.
 * Limits: none.
 * Repeatability: integers; sums carry their rounding error per lane, then a tree.
 */
#include "balance/balance.clh"

/* What the sums over the experts read. */
typedef struct load_view {
    __global const uint *load;
    __global const float *target;   /* [E] or NULL */
    __global const float *previous; /* [E] or NULL */
    uint experts, sum;
    float target_sum;
} load_view;

static inline float share_of(const load_view *v, uint e) {
    return v->sum ? (float)v->load[e] / (float)v->sum : 0.0f;
}

static inline float target_of(const load_view *v, uint e) {
    return v->target ? v->target[e] / v->target_sum : 1.0f / (float)v->experts;
}

/* F - 1/n, in integers: a balanced batch gives 0 on every device. */
static inline float excess_of(const load_view *v, uint e) {
    long over = (long)v->load[e] * v->experts - (long)v->sum;
    return v->sum ? (float)over / (float)v->sum / (float)v->experts : 0.0f;
}

enum {
    TERM_ENTROPY,
    TERM_VARIANCE,
    TERM_DIVERGENCE,
    TERM_DISTANCE,
    TERM_PREVIOUS_DISTANCE,
    TERM_FLUCTUATION,
    TERM_COUNT
};

static inline float term_of(const load_view *v, int term, uint e) {
    float share = share_of(v, e), target = target_of(v, e), excess = excess_of(v, e);
    float away = v->target ? share - target : excess;
    float before = v->previous ? v->previous[e] : 0.0f;
    switch (term) {
    case TERM_ENTROPY:
        return share > 0.0f ? -share * log(share) : 0.0f;
    case TERM_VARIANCE:
        return excess * excess;
    case TERM_DIVERGENCE:
        return divergence_term(share, target, away);
    case TERM_DISTANCE:
        return 0.5f * away * away;
    case TERM_PREVIOUS_DISTANCE:
        return v->previous ? 0.5f * (before - target) * (before - target) : 0.0f;
    default:
        return v->previous ? fabs(share - before) : 0.0f;
    }
}

float sum_terms(const load_view *v, int term, __local float *tmp) {
    float sum = 0.0f, lost = 0.0f;
    for (uint e = get_local_id(0); e < v->experts && v->sum; e += GROUP)
        ADD_CAREFULLY(float, sum, lost, term_of(v, term, e));
    return group_sum(sum, tmp);
}

float sum_floats(__global const float *values, uint count, __local float *tmp) {
    float sum = 0.0f, lost = 0.0f;
    for (uint e = get_local_id(0); e < count; e += GROUP)
        ADD_CAREFULLY(float, sum, lost, values[e]);
    return group_sum(sum, tmp);
}

/* sum (v / sum v - 1/n)^2; 0 if the values sum to 0. */
float share_variance(__global const float *values, uint count, __local float *tmp) {
    float total = sum_floats(values, count, tmp), mean = total / (float)count, sum = 0.0f,
          lost = 0.0f;
    for (uint e = get_local_id(0); e < count; e += GROUP) {
        float away = total == 0.0f ? 0.0f : (values[e] - mean) / total;
        ADD_CAREFULLY(float, sum, lost, away *away);
    }
    return group_sum(sum, tmp);
}

/* sum over sequences and experts of min(c, C). */
static inline uint lane_used(const load_view *v, const sums_shape *s, __global const uint *sums,
                             uint capacity) {
    bool by_sequence = s->sequences > 1 && (s->asked & COUNT_BIT(COUNT_ASSIGNED));
    uint used = 0, sequences = by_sequence ? s->sequences : 1;
    for (uint q = 0; q < sequences; q++)
        for (uint e = get_local_id(0); e < s->experts; e += GROUP) {
            __global const uint *record = sums + (ulong)q * record_words(s);
            uint load = by_sequence ? record[count_at(s, COUNT_ASSIGNED) + e] : v->load[e];
            used += capacity ? min(load, capacity) : load;
        }
    return used;
}

/* What a lane counts over its columns; the group, after add_up(). `smallest` is inverted before. */
typedef struct lane_counts {
    uint pairs, kept, dropped, expert_pairs, idle, largest, smallest, rerouted, dead;
} lane_counts;

/* Writes the integer arrays and counts. */
static inline void write_columns(const sums_shape *s, __global const uint *load,
                                 __global const uint *kept, __global const uint *in,
                                 __global const uint *out, __global const uint *idle_before,
                                 uint tokens, uint dead_window, __global uint *arrays,
                                 lane_counts *counts) {
    lane_counts c = {0, 0, 0, 0, 0, 0, 0, 0, 0};
    uint R = s->columns;
    for (uint e = get_local_id(0); e < R; e += GROUP) {
        uint came = in ? in[e] : 0, left = out ? out[e] : 0;
        uint dropped = load[e] + came - kept[e] - left;
        uint idle = load[e] ? 0 : add_sat(tokens, idle_before ? idle_before[e] : 0u);
        arrays[STATS_LOAD * R + e] = load[e];
        arrays[STATS_KEPT * R + e] = kept[e];
        arrays[STATS_DROPPED * R + e] = dropped;
        arrays[STATS_REROUTED * R + e] = came;
        arrays[STATS_IDLE_TOKENS * R + e] = idle;
        c.pairs += load[e];
        c.kept += kept[e];
        c.dropped += dropped;
        c.rerouted += came;
        if (e < s->experts) {
            c.expert_pairs += load[e];
            c.idle += load[e] == 0;
            c.largest = max(c.largest, load[e]);
            c.smallest = max(c.smallest, ~load[e]);
            c.dead += idle >= dead_window;
        }
    }
    *counts = c;
}

/* From the counts of the lanes to those of the group. */
void add_up(lane_counts *c, __local uint *tmp) {
    c->pairs = group_total(c->pairs, tmp);
    c->kept = group_total(c->kept, tmp);
    c->dropped = group_total(c->dropped, tmp);
    c->expert_pairs = group_total(c->expert_pairs, tmp);
    c->idle = group_total(c->idle, tmp);
    c->rerouted = group_total(c->rerouted, tmp);
    c->dead = group_total(c->dead, tmp);
    c->largest = group_largest(c->largest, tmp);
    c->smallest = ~group_largest(c->smallest, tmp);
}

/* Writes the other arrays; the most tokens of the lane's devices. */
static inline uint write_sums(const sums_shape *s, __global const uint *batch,
                              __global const float *moving_load, __global uint *arrays) {
    uint R = s->columns, most = 0;
    for (uint e = get_local_id(0); e < R; e += GROUP) {
        arrays[STATS_IMPORTANCE * R + e] = batch[SUM_NORMALISED * R + e];
        arrays[STATS_WEIGHT_SUMS * R + e] = batch[SUM_WEIGHTS * R + e];
        arrays[STATS_EMA * R + e] = moving_load ? as_uint(moving_load[e]) : 0;
    }
    for (uint d = get_local_id(0); d < s->device_groups; d += GROUP) {
        uint distinct = batch[devices_at(s) + d];
        arrays[STATS_ARRAY_COUNT * R + d] = distinct;
        most = max(most, distinct);
    }
    return most;
}

static inline float per(float sum, float count) {
    return count > 0.0f ? sum / count : 0.0f;
}

/* The fields that count. */
static inline void write_counts(__global stats_header *stats, const sums_shape *s,
                                const lane_counts *c, __global const uint *scalars, uint used,
                                uint device_tokens) {
    stats->tokens = scalars[SCALAR_TOKENS];
    stats->columns = s->columns;
    stats->pairs = c->pairs;
    stats->kept = c->kept;
    stats->dropped = c->dropped;
    stats->identity_pairs = c->pairs - c->expert_pairs;
    stats->nonfinite_tokens = scalars[SCALAR_NONFINITE];
    stats->idle_experts = c->idle;
    stats->max_load = c->largest;
    stats->min_load = c->smallest;
    stats->rerouted = c->rerouted;
    stats->used_capacity = used;
    stats->dead_experts = c->dead;
    stats->device_groups = s->device_groups;
    stats->max_device_tokens = device_tokens;
    stats->invalid_ids = scalars[SCALAR_INVALID];
}

/* The fields that measure; `importance` and `weights` are variances of shares. */
static inline void write_measures(__global stats_header *stats, const sums_shape *s,
                                  const lane_counts *c, __global const uint *scalars,
                                  const float *terms, bool has_previous, float importance,
                                  float weights) {
    /* In integers, so that a balanced batch gives 0 on every device: largest / mean - 1. */
    ulong over = (ulong)c->largest * s->experts - c->expert_pairs;
    float n = (float)s->experts, tokens = (float)scalars[SCALAR_TOKENS];
    stats->max_violation = per((float)over, (float)c->expert_pairs);
    stats->load_entropy = terms[TERM_ENTROPY];
    stats->drop_rate = per((float)c->dropped, (float)c->pairs);
    stats->load_variance = terms[TERM_VARIANCE];
    stats->load_cv2 = n * terms[TERM_VARIANCE];
    stats->importance_variance = importance;
    stats->importance_cv2 = n * importance;
    stats->weights_cv2 = n * weights;
    stats->load_divergence = terms[TERM_DIVERGENCE];
    stats->target_distance = terms[TERM_DISTANCE];
    stats->target_change =
        has_previous ? terms[TERM_DISTANCE] - terms[TERM_PREVIOUS_DISTANCE] : 0.0f;
    stats->fluctuation = terms[TERM_FLUCTUATION];
    stats->token_entropy = per(as_float(scalars[SCALAR_ENTROPY]), tokens);
    stats->confidence = per(as_float(scalars[SCALAR_CONFIDENCE]), tokens);
    stats->mean_logsumexp = ldexp(per(as_float(scalars[SCALAR_LSE]), tokens), LOGIT_POWER);
    stats->dead_parameter_share = (float)c->dead / n;
}

KERNEL(GROUP, 1, 1)
void stats_finish(IN(uint, load), IN(uint, kept), IN(uint, rerouted_in), IN(uint, rerouted_out),
                  IN(uint, sums), IN(uint, state), IN(float, load_target), OUT(uint, stats),
                  sums_shape s, uint capacity, uint dead_window) {
    __local uint tmp[GROUP];
    __local float float_tmp[GROUP];
    __global const state_header *header = STATE_OF(state);
    __global const float *history = header ? (__global const float *)(header + 1) : 0;
    uint R = s.columns;
    sums = AT(sums);
    load = AT(load);
    __global const uint *batch = sums + (ulong)batch_record(&s) * record_words(&s);
    __global const uint *scalars = batch + scalars_at(&s);
    __global stats_header *out = (__global stats_header *)AT(stats);
    __global uint *arrays = (__global uint *)(out + 1);

    lane_counts c;
    write_columns(&s, load, AT(kept), GIVEN(rerouted_in),
                  GIVEN(rerouted_out),
                  header ? (__global const uint *)(history + 3 * R) : 0, scalars[SCALAR_TOKENS],
                  dead_window, arrays, &c);
    uint device_tokens = write_sums(&s, batch, header ? history + R : 0, arrays);
    add_up(&c, tmp);
    device_tokens = group_largest(device_tokens, tmp);

    load_view view = {load,
                      GIVEN(load_target),
                      header && header->updates ? history + 2 * R : 0,
                      s.experts,
                      c.expert_pairs,
                      1.0f};
    view.target_sum = sum_floats(view.target, view.target ? s.experts : 0, float_tmp);
    view.target = is_divisor(view.target_sum) ? view.target : 0;
    uint used = group_total(lane_used(&view, &s, sums, effective_capacity(header, capacity)), tmp);
    float terms[TERM_COUNT];
    for (int term = 0; term < TERM_COUNT; term++)
        terms[term] = sum_terms(&view, term, float_tmp);
    __global const float *floats = (__global const float *)batch;
    float importance = share_variance(floats + SUM_NORMALISED * R, s.experts, float_tmp);
    float weights = share_variance(floats + SUM_WEIGHTS * R, s.experts, float_tmp);
    if (get_local_id(0) != 0)
        return;
    out->version = STATS_VERSION;
    for (int i = 0; i < STATS_RESERVED; i++)
        out->reserved[i] = 0;
    write_counts(out, &s, &c, scalars, used, device_tokens);
    write_measures(out, &s, &c, scalars, terms, view.previous != 0, importance, weights);
}
