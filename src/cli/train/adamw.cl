/*
 * Purpose: AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with clipping by the norm of all
 *          gradients; and sums, of which the norm and the mean loss are made.
 * Formula: g = dw min(1, clip / |dw|), clip 0: dw; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
 *          w -= rate (m / (1 - b1^step) / (sqrt(v / (1 - b2^step)) + eps) + decay w).
 * Arrays: w, dw, m, v [N] f32; copy: the first `copied` chunks of w in the model's type; the first
 *         `decayed` chunks have weight decay; squared [1] f32: |dw|^2. values [N] f32, sums
 *         [work-items] f32.
 * NDRange: adamw: {N / 16}. sum_values: each work-item adds every S-th chunk of 16, S work-items.
 * Limits: N is a multiple of 16.
 * Repeatability: element by element; sums in ascending order within a work-item.
 */
typedef struct adamw_rates {
    float rate, decay, clip, beta1, beta2, eps;
    float correction1, correction2; /* 1 - b^step */
} adamw_rates;

__kernel void adamw(__global float *w, __global const float *dw, __global float *m,
                    __global float *v, __global stored *copy, __global const float *squared,
                    const adamw_rates r, uint copied, uint decayed) {
    const size_t chunk = get_global_id(0);
    const float decay = chunk < decayed ? r.decay : 0.0f;
    const float norm = sqrt(squared[0]);
    const float clipped = r.clip > 0.0f && norm > r.clip ? r.clip / norm : 1.0f;
    const float16 g = vload16(chunk, dw) * clipped, old = vload16(chunk, w);
    const float16 mean = r.beta1 * vload16(chunk, m) + (1.0f - r.beta1) * g;
    const float16 square = r.beta2 * vload16(chunk, v) + (1.0f - r.beta2) * g * g;
    const float16 step = mean / r.correction1 / (sqrt(square / r.correction2) + r.eps);
    const float16 value = old - r.rate * (step + decay * old);
    vstore16(mean, chunk, m);
    vstore16(square, chunk, v);
    vstore16(value, chunk, w);
    if (chunk < copied)
        row_store(value, chunk, copy);
}

__kernel void sum_values(__global const float *values, __global float *sums, uint chunks,
                         uint squares) {
    float16 sum = 0.0f;
    for (size_t c = get_global_id(0); c < chunks; c += get_global_size(0)) {
        const float16 v = vload16(c, values);
        sum += squares ? v * v : v;
    }
    sums[get_global_id(0)] = sum16(sum);
}
