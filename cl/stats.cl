/*
 * Purpose: what a batch did to the load.
 * Formula: see clmoe_stats in balance.h.
 * Arrays: load, kept [R] u32, rerouted_in, rerouted_out [R] u32 or NULL, sums [Q, batch] records
 * (see balance.clh), state or NULL, load_target [E] f32 or NULL -> the header, the words of
 *         clmoe_stats in order, then eight arrays [R] and device_tokens.
 * NDRange: one group; its lanes stride over experts.
 * Limits: none.
 * Repeatability: integers; sums carry their rounding error per lane, then a tree.
 */
#include "balance.clh"

#define HEADER_WORDS 32

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

/* What the lanes count over the columns, in the order of the fields. */
typedef struct lane_counts {
    uint pairs, kept, dropped, expert_pairs, idle, largest, smallest, rerouted, dead;
} lane_counts;

/* Writes the integer arrays and counts. */
static inline lane_counts write_columns(const sums_shape *s, __global const uint *load,
                                        __global const uint *kept, __global const uint *in,
                                        __global const uint *out, __global const uint *idle_before,
                                        uint tokens, uint dead_window, __global uint *arrays) {
    lane_counts c = {0, 0, 0, 0, 0, 0, 0, 0, 0};
    uint R = s->columns;
    for (uint e = get_local_id(0); e < R; e += GROUP) {
        uint came = in ? in[e] : 0, left = out ? out[e] : 0;
        uint dropped = load[e] + came - kept[e] - left;
        uint idle = load[e] ? 0 : tokens + (idle_before ? idle_before[e] : 0);
        arrays[e] = load[e];
        arrays[R + e] = kept[e];
        arrays[2 * R + e] = dropped;
        arrays[3 * R + e] = came;
        arrays[7 * R + e] = idle;
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
    return c;
}

static inline float per(float sum, float count) {
    return count > 0.0f ? sum / count : 0.0f;
}

KERNEL(GROUP, 1, 1)
void stats_finish(__global const uint *load, ulong load_off, __global const uint *kept,
                  ulong kept_off, __global const uint *rerouted_in, ulong rerouted_in_off,
                  __global const uint *rerouted_out, ulong rerouted_out_off,
                  __global const uint *sums, ulong sums_off, __global const uint *state,
                  ulong state_off, __global const float *load_target, ulong load_target_off,
                  __global uint *stats, ulong stats_off, sums_shape s, uint capacity,
                  uint dead_window) {
    __local uint tmp[GROUP];
    __local float float_tmp[GROUP];
    __global const state_header *header = state_of(state, state_off);
    __global const float *history = header ? (__global const float *)(header + 1) : 0;
    uint R = s.columns;
    sums += sums_off;
    stats += stats_off;
    load += load_off;
    __global const uint *batch = sums + (ulong)batch_record(&s) * record_words(&s);
    __global const uint *scalars = batch + scalars_at(&s);
    __global uint *arrays = stats + HEADER_WORDS;
    uint tokens = scalars[SCALAR_TOKENS];
    float count = (float)tokens;

    lane_counts c = write_columns(
        &s, load, kept + kept_off, rerouted_in ? rerouted_in + rerouted_in_off : 0,
        rerouted_out ? rerouted_out + rerouted_out_off : 0,
        header ? (__global const uint *)(history + 3 * R) : 0, tokens, dead_window, arrays);
    for (uint e = get_local_id(0); e < R; e += GROUP) {
        arrays[4 * R + e] = batch[SUM_NORMALISED * R + e];
        arrays[5 * R + e] = batch[SUM_WEIGHTS * R + e];
        arrays[6 * R + e] = header ? as_uint(history[R + e]) : 0;
    }
    uint device_tokens = 0;
    for (uint d = get_local_id(0); d < s.device_groups; d += GROUP) {
        uint distinct = batch[devices_at(&s) + d];
        arrays[8 * R + d] = distinct;
        device_tokens = max(device_tokens, distinct);
    }
    uint pairs = group_total(c.pairs, tmp), places = group_total(c.kept, tmp);
    uint dropped = group_total(c.dropped, tmp), expert_pairs = group_total(c.expert_pairs, tmp);
    uint idle = group_total(c.idle, tmp), rerouted = group_total(c.rerouted, tmp);
    uint dead = group_total(c.dead, tmp);
    uint largest = group_largest(c.largest, tmp), smallest = ~group_largest(c.smallest, tmp);
    device_tokens = group_largest(device_tokens, tmp);

    load_view view = {load,
                      load_target ? load_target + load_target_off : 0,
                      header && header->updates ? history + 2 * R : 0,
                      s.experts,
                      expert_pairs,
                      1.0f};
    view.target_sum = sum_floats(view.target, view.target ? s.experts : 0, float_tmp);
    uint used = group_total(lane_used(&view, &s, sums, effective_capacity(header, capacity)), tmp);
    float terms[TERM_COUNT];
    for (int term = 0; term < TERM_COUNT; term++)
        terms[term] = sum_terms(&view, term, float_tmp);
    __global const float *floats = (__global const float *)batch;
    float importance = share_variance(floats + SUM_NORMALISED * R, s.experts, float_tmp);
    float weights = share_variance(floats + SUM_WEIGHTS * R, s.experts, float_tmp);
    if (get_local_id(0) != 0)
        return;

    /* In integers, so that a balanced batch gives 0 on every device: largest / mean - 1. */
    ulong over = (ulong)largest * s.experts - expert_pairs;
    float n = (float)s.experts;
    stats[0] = tokens;
    stats[1] = R;
    stats[2] = pairs;
    stats[3] = places;
    stats[4] = dropped;
    stats[5] = pairs - expert_pairs;
    stats[6] = scalars[SCALAR_NONFINITE];
    stats[7] = idle;
    stats[8] = largest;
    stats[9] = smallest;
    stats[10] = as_uint(per((float)over, (float)expert_pairs));
    stats[11] = as_uint(terms[TERM_ENTROPY]);
    stats[12] = rerouted;
    stats[13] = used;
    stats[14] = as_uint(per((float)dropped, (float)pairs));
    stats[15] = as_uint(terms[TERM_VARIANCE]);
    stats[16] = as_uint(n * terms[TERM_VARIANCE]);
    stats[17] = as_uint(importance);
    stats[18] = as_uint(n * importance);
    stats[19] = as_uint(n * weights);
    stats[20] = as_uint(terms[TERM_DIVERGENCE]);
    stats[21] = as_uint(terms[TERM_DISTANCE]);
    stats[22] =
        as_uint(view.previous ? terms[TERM_DISTANCE] - terms[TERM_PREVIOUS_DISTANCE] : 0.0f);
    stats[23] = as_uint(terms[TERM_FLUCTUATION]);
    stats[24] = as_uint(per(as_float(scalars[SCALAR_ENTROPY]), count));
    stats[25] = as_uint(per(as_float(scalars[SCALAR_CONFIDENCE]), count));
    stats[26] = as_uint(per(as_float(scalars[SCALAR_LSE]), count));
    stats[27] = dead;
    stats[28] = as_uint((float)dead / n);
    stats[29] = s.device_groups;
    stats[30] = device_tokens;
    stats[31] = 0;
}
