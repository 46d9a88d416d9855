/*
 * Purpose: the quantile rule: how far each expert is from each token's cutoff, counted in bins,
 *          and the bias that makes K/E of the tokens choose it.
 * Formula: see CLMOE_BIAS_QUANTILE in balance.h: the way d_te = cutoff_t - s_te - b_e, in BIAS_BINS
 *          bins that are the narrower the nearer to 0.
 * Arrays: scores [T,E], cutoffs [T] (NaN: the token is not counted), token_mask [T] or NULL,
 *          state -> bias_counts [E,BIAS_BINS] u32, added to; state, bias_counts, stats, load [R]
 *          or NULL -> momentum [E] of the state, the new bias before its mean is taken off; as it
 *          is where the batch has no load.
 * NDRange: quantile_count: a group per `each` tokens; with GROUP 1 a work-item per `each` experts,
 *          over all tokens. quantile_bias: one group per expert.
 * Limits: GROUP a power of two.
 * Repeatability: counts are integers, whose sum has no order; with GROUP 1 each has one owner.
 */
#include "balance/state.clh"

/* Bins on each side of the bias: so many to each power of two, from 2^-18 to 4. */
#define HALF_BINS  (BIAS_BINS / 2)
#define PER_OCTAVE (HALF_BINS / OCTAVES)
#define LEAST      0x1p-18f
enum { OCTAVES = 20, LEAST_EXPONENT = -18, MANTISSA_BITS = 23 };

/* By the bits of |way|, which are its logarithm, with lines between the powers of two. */
#define SIDE_BIN(type, way)                                                                        \
    ((min(max(as_##type(way) & 0x7fffffffu, as_uint(LEAST)), as_uint(4.0f) - 1u) -                 \
      as_uint(LEAST)) *                                                                            \
         (uint)PER_OCTAVE >> MANTISSA_BITS)

static inline uint bin_of(float way) {
    const uint side = SIDE_BIN(uint, way);
    return way < 0.0f ? HALF_BINS - 1 - side : HALF_BINS + side;
}

/* Where bin HALF_BINS + side begins. */
static inline float side_edge(uint side) {
    const float within = 1.0f + (float)(side % PER_OCTAVE) / PER_OCTAVE;
    return side > 0 ? ldexp(within, (int)(side / PER_OCTAVE) + LEAST_EXPONENT) : 0.0f;
}

static inline float way_in(uint bin, float inside) {
    const bool up = bin >= HALF_BINS;
    const uint side = up ? bin - HALF_BINS : HALF_BINS - 1 - bin;
    const float near = side_edge(side), far = side_edge(side + 1);
    return up ? near + (far - near) * inside : (far - near) * inside - far;
}

#if GROUP == 1
/* The bins of a token's experts by vectors, then the counts one by one. */
static inline void count_row(__global const float *bias, float cutoff, __global const float *row,
                             uint begin, uint end, __global uint *bias_counts) {
    uint at[16];
    uint e = begin;
    for (; e + 16 <= end; e += 16) {
        const float16 way = cutoff - vload16(0, row + e) - vload16(0, bias + e);
        /* HALF_BINS + side, or where the way is down + ~side. */
        vstore16(HALF_BINS + (SIDE_BIN(uint16, way) ^ as_uint16(way < 0.0f)), 0, at);
        for (uint i = 0; i < 16; i++)
            bias_counts[(e + i) * BIAS_BINS + at[i]]++;
    }
    for (; e < end; e++)
        bias_counts[e * BIAS_BINS + bin_of(cutoff - row[e] - bias[e])]++;
}
#endif

KERNEL(GROUP, 1, 1)
void quantile_count(IN(float, scores), IN(float, cutoffs), IN(uchar, token_mask), IN(uint, state),
                    OUT(uint, bias_counts), uint tokens, uint experts, uint each) {
    __global const float *bias = (__global const float *)(STATE_OF(state) + 1);
    scores = AT(scores);
    cutoffs = AT(cutoffs);
    token_mask = GIVEN(token_mask);
    bias_counts = AT(bias_counts);
#if GROUP == 1
    const uint begin = get_global_id(0) * each, end = min(begin + each, experts);
    for (uint t = 0; t < tokens; t++)
        if (!isnan(cutoffs[t]) && (!token_mask || token_mask[t]))
            count_row(bias, cutoffs[t], scores + (ulong)t * experts, begin, end, bias_counts);
#else
    const uint begin = get_group_id(0) * each, end = min(begin + each, tokens);
    for (uint e = get_local_id(0); e < experts; e += GROUP) {
        const float own = bias[e];
        for (uint t = begin; t < end; t++)
            if (!isnan(cutoffs[t]) && (!token_mask || token_mask[t])) {
                const float way = cutoffs[t] - scores[(ulong)t * experts + e] - own;
                atomic_inc(&bias_counts[e * BIAS_BINS + bin_of(way)]);
            }
    }
#endif
}

KERNEL(GROUP, 1, 1)
void quantile_bias(OUT(uint, state), IN(uint, bias_counts), IN(uint, stats), IN(uint, load),
                   uint columns, uint experts, uint top_k) {
    __local uint tmp[GROUP];
    __global state_header *s = (__global state_header *)AT(state);
    __global float *arrays = (__global float *)(s + 1);
    const uint e = get_group_id(0), lane = get_local_id(0), part = divide_up(BIAS_BINS, GROUP);
    const uint begin = min(lane * part, (uint)BIAS_BINS), end = min(begin + part, (uint)BIAS_BINS);
    __global const uint *c = load_of(AT(stats), GIVEN(load));
    bool known = state_is_known(s, columns) &&
                 stats_are_known((__global const stats_header *)AT(stats), columns);
    uint total, mine = 0, loaded = 0;
    bias_counts = AT(bias_counts) + (ulong)e * BIAS_BINS;
    for (uint other = lane; other < experts; other += GROUP)
        loaded |= c[other];
    known = group_largest(loaded, tmp) > 0 && known;
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
    arrays[STATE_MOMENTUM * columns + e] = arrays[e] + way_in(i, inside);
}
