/*
 * Purpose: the quantile rule: how far each expert is from each token's cutoff, counted in bins,
 *          and the bias that makes K/E of the tokens choose it.
 * Formula: see CLMOE_BIAS_QUANTILE in balance.h: r_te = cutoff_t - s_te, BIAS_BINS uniform bins
 *          over [min b - 1, max b + 1].
 * Arrays: scores [T,E], cutoffs [T] (NaN: the token is not counted), token_mask [T] or NULL,
 *          state -> bias_counts [E,BIAS_BINS] u32, added to; state, bias_counts -> momentum [E] of
 *          the state, the new bias before its mean is taken off.
 * NDRange: quantile_count: a group per `each` tokens; with GROUP 1 a work-item per `each` experts,
 *          over all tokens. quantile_bias: one group per expert.
 * Limits: GROUP a power of two.
 * Repeatability: counts are integers, whose sum has no order; with GROUP 1 each has one owner.
 */
#include "balance/state.clh"

/* The bins: of values from `low` on, `width` each. */
typedef struct bias_bins {
    float low, width, per_unit;
} bias_bins;

void bins_of(__global const float *bias, uint experts, bias_bins *bins, __local float *tmp) {
    float least = INFINITY, most = -INFINITY;
    for (uint e = get_local_id(0); e < experts; e += GROUP) {
        least = fmin(least, bias[e]);
        most = fmax(most, bias[e]);
    }
    least = -group_max(-least, tmp);
    most = group_max(most, tmp);
    bins->low = least - 1.0f;
    bins->width = (most + 1.0f - bins->low) / BIAS_BINS;
    bins->per_unit = BIAS_BINS / (most + 1.0f - bins->low);
}

/* What lies outside, as masked experts do, is in the last bin. */
static inline uint bin_of(const bias_bins *bins, float r) {
    return (uint)clamp((r - bins->low) * bins->per_unit, 0.0f, BIAS_BINS - 1.0f);
}

#if GROUP == 1
/* The bins of a token's experts by vectors, then the counts one by one. */
static inline void count_row(const bias_bins *bins, float cutoff, __global const float *row,
                             uint begin, uint end, __global uint *bias_counts) {
    float at[16];
    uint e = begin;
    for (; e + 16 <= end; e += 16) {
        const float16 r = (cutoff - vload16(0, row + e) - bins->low) * bins->per_unit;
        vstore16(fmin(fmax(r, (float16)(0.0f)), (float16)(BIAS_BINS - 1.0f)), 0, at);
        for (uint i = 0; i < 16; i++)
            bias_counts[(e + i) * BIAS_BINS + (uint)at[i]]++;
    }
    for (; e < end; e++)
        bias_counts[e * BIAS_BINS + bin_of(bins, cutoff - row[e])]++;
}
#endif

KERNEL(GROUP, 1, 1)
void quantile_count(IN(float, scores), IN(float, cutoffs), IN(uchar, token_mask), IN(uint, state),
                    OUT(uint, bias_counts), uint tokens, uint experts, uint each) {
    __local float tmp[GROUP];
    __global const float *bias = (__global const float *)(STATE_OF(state) + 1);
    bias_bins bins;
    scores = AT(scores);
    cutoffs = AT(cutoffs);
    token_mask = GIVEN(token_mask);
    bias_counts = AT(bias_counts);
    bins_of(bias, experts, &bins, tmp);
#if GROUP == 1
    const uint begin = get_global_id(0) * each, end = min(begin + each, experts);
    for (uint t = 0; t < tokens; t++)
        if (!isnan(cutoffs[t]) && (!token_mask || token_mask[t]))
            count_row(&bins, cutoffs[t], scores + (ulong)t * experts, begin, end, bias_counts);
#else
    const uint begin = get_group_id(0) * each, end = min(begin + each, tokens);
    for (uint t = begin; t < end; t++)
        if (!isnan(cutoffs[t]) && (!token_mask || token_mask[t]))
            for (uint e = get_local_id(0); e < experts; e += GROUP) {
                const float r = cutoffs[t] - scores[(ulong)t * experts + e];
                atomic_inc(&bias_counts[e * BIAS_BINS + bin_of(&bins, r)]);
            }
#endif
}

KERNEL(GROUP, 1, 1)
void quantile_bias(OUT(uint, state), IN(uint, bias_counts), uint columns, uint experts,
                   uint top_k) {
    __local float float_tmp[GROUP];
    __local uint tmp[GROUP];
    __global state_header *s = (__global state_header *)AT(state);
    __global float *arrays = (__global float *)(s + 1);
    const uint e = get_group_id(0), lane = get_local_id(0), part = divide_up(BIAS_BINS, GROUP);
    const uint begin = min(lane * part, (uint)BIAS_BINS), end = min(begin + part, (uint)BIAS_BINS);
    bool known = s->version == STATE_VERSION && s->columns == columns;
    bias_bins bins;
    uint total, mine = 0;
    bias_counts = AT(bias_counts) + (ulong)e * BIAS_BINS;
    bins_of(arrays, experts, &bins, float_tmp);
    for (uint i = begin; i < end; i++)
        mine += bias_counts[i];
    uint before = group_scan(mine, &total, tmp);
    const uint rank = (uint)(((ulong)total * top_k + experts - 1) / experts);
    if (known && total == 0 && lane == 0)
        arrays[STATE_MOMENTUM * columns + e] = arrays[e];
    if (!known || total == 0 || rank <= before || rank > before + mine)
        return;
    uint i = begin;
    for (; before + bias_counts[i] < rank; i++)
        before += bias_counts[i];
    const float inside = (float)(rank - before) / (float)bias_counts[i];
    arrays[STATE_MOMENTUM * columns + e] = bins.low + bins.width * ((float)i + inside);
}
