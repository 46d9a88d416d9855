/*
 * Purpose: AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with clipping by the norm of all
 *          gradients; and sums, of which the norm and the mean loss are made.
 * Formula: g = dw min(1, clip / |dw|), clip 0: dw; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
 *          w -= rate (m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps) + decay w).
 * Arrays: w, dw, m, v [N] f32; copy: the first `copied` elements of w in the model's type; the first
 *         `decayed` elements have weight decay; squared [1] f32: |dw|^2. values [4 quads] f32, sums
 *         [work-items] f32.
 * NDRange: adamw: {N}. sum_values: {S}, of which item i adds quads i, i + S, i + 2 S, ...
 * Limits: N below 2^32.
 * Repeatability: element by element; sums in ascending order within a work-item.
 */
typedef struct adamw_rates {
    float rate, decay, clip, beta1, beta2, eps;
    float correction1, correction2; /* 1 - b^step */
} adamw_rates;

__kernel void adamw(__global float *w, __global const float *dw, __global float *m,
                    __global float *v, __global stored *copy, __global const float *squared,
                    const adamw_rates r, uint copied, uint decayed) {
    const size_t i = get_global_id(0);
    const float norm = sqrt(squared[0]), decay = i < decayed ? r.decay : 0.0f;
    const float g = r.clip > 0.0f && norm > r.clip ? dw[i] * (r.clip / norm) : dw[i];
    const float mean = r.beta1 * m[i] + (1.0f - r.beta1) * g;
    const float square = r.beta2 * v[i] + (1.0f - r.beta2) * g * g;
    const float step = mean / r.correction1 / (sqrt(square / r.correction2) + r.eps);
    const float value = w[i] - r.rate * (step + decay * w[i]);
    m[i] = mean;
    v[i] = square;
    w[i] = value;
    if (i < copied)
        copy[i] = to_stored(value);
}

__kernel void sum_values(__global const float *values, __global float *sums, uint quads,
                         uint squares) {
    float4 sum = 0.0f;
    for (size_t q = get_global_id(0); q < quads; q += get_global_size(0)) {
        const float4 v = vload4(q, values);
        sum += squares ? v * v : v;
    }
    sums[get_global_id(0)] = (sum.x + sum.y) + (sum.z + sum.w);
}
