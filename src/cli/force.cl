/*
 * Purpose: a choice of experts that no router made: round robin, or by Zipf's law.
 * Formula: round robin: pair i takes expert (first + i) mod E. Zipf: K different experts, expert e
 *          being drawn with a chance in proportion to 1 / (e+1)^s among those not drawn yet: the K
 *          that come first when e comes at the time -log(u) (e+1)^s, u uniform in (0, 1) by seed,
 *          token and expert.
 * Arrays: ids [T,K] i32, weights [T,K] f32: 1/K; while zipf draws, the logarithms of the times.
 * NDRange: force_round_robin: one work-item per pair. force_zipf: one per token.
 * Limits: 1 <= K <= E; s (log E) is finite.
 * Repeatability: the same seed gives the same ids on a device; zipf's logarithms are the device's.
 */
__kernel void force_round_robin(__global int *ids, __global float *weights, uint top_k,
                                uint experts, uint first) {
    const ulong pair = get_global_id(0);
    ids[pair] = (int)((first + pair) % experts);
    weights[pair] = 1.0f / (float)top_k;
}

/* In (0, 1): 23 bits and a half. */
static inline float uniform(uint seed, ulong index) {
    return ((float)(random_int(seed, index, 23) + (1 << 22)) + 0.5f) * 0x1p-23f;
}

__kernel void force_zipf(__global int *ids, __global float *weights, uint top_k, uint experts,
                         uint seed, float exponent) {
    const ulong token = get_global_id(0);
    __global float *times = weights + token * top_k;
    uint drawn = 0;
    ids += token * top_k;
    for (uint e = 0; e < experts; e++) {
        const float u = uniform(seed, token * experts + e);
        const float time = log(-log(u)) + exponent * log((float)(e + 1));
        if (drawn == top_k && !(time < times[top_k - 1]))
            continue;
        uint at = drawn < top_k ? drawn++ : top_k - 1;
        for (; at > 0 && time < times[at - 1]; at--) {
            times[at] = times[at - 1];
            ids[at] = ids[at - 1];
        }
        times[at] = time;
        ids[at] = (int)e;
    }
    for (uint k = 0; k < top_k; k++)
        times[k] = 1.0f / (float)top_k;
}
