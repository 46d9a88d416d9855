/*
 * Purpose: RMSNorm of the rows before a block or the head, and its gradients.
 * Formula: r = 1 / sqrt(mean of x^2 + 1e-5); h = r gain x;
 *          dx = dy + r (gain dh - x r^2 mean of (gain dh x)), dy the gradient that passes by on the
 *          residual; dgain_d = sum over t of dh_td x_td r_t.
 * Arrays: x, h, dh, dy, dx [T,D], gain [D] f32, inverse [T] f32: r; partial [slices,D] f32: dgain of
 *         a slice of the tokens each, summed by sum_rows. dy and dx may be the same; without dy 0.
 * NDRange: norm, norm_backward: a group of GROUP work-items per token. norm_gain: {D / 16, slices}.
 *          sum_rows: {D / 16}.
 * Limits: D is a multiple of 16.
 * Repeatability: sums of a token in the order of its chunks and group_reduce(), those over tokens in
 *                ascending order within a slice, then slice by slice.
 */
#define NORM_EPS 1e-5f

__kernel __attribute__((reqd_work_group_size(GROUP, 1, 1)))
void norm(__global const stored *x, __global const float *gain, __global stored *h,
          __global float *inverse, uint chunks) {
    GROUP_TMP;
    const size_t token = get_group_id(0);
    x += token * chunks * 16;
    h += token * chunks * 16;
    float16 squares = 0.0f;
    for (uint c = get_local_id(0); c < chunks; c += GROUP) {
        const float16 v = row_load(c, x);
        squares += v * v;
    }
    const float sum = group_reduce(sum16(squares), 0, tmp);
    const float r = 1.0f / sqrt(sum / (float)(chunks * 16) + NORM_EPS);
    for (uint c = get_local_id(0); c < chunks; c += GROUP)
        row_store(row_load(c, x) * vload16(c, gain) * r, c, h);
    if (get_local_id(0) == 0)
        inverse[token] = r;
}

__kernel __attribute__((reqd_work_group_size(GROUP, 1, 1)))
void norm_backward(__global const stored *x, __global const float *gain,
                   __global const stored *dh, __global const float *inverse,
                   __global const stored *dy, __global stored *dx, uint chunks, uint has_dy) {
    GROUP_TMP;
    const size_t token = get_group_id(0), row = token * chunks;
    const float r = inverse[token];
    float16 products = 0.0f;
    for (uint c = get_local_id(0); c < chunks; c += GROUP)
        products += row_load(row + c, dh) * vload16(c, gain) * row_load(row + c, x);
    const float sum = group_reduce(sum16(products), 0, tmp);
    const float share = sum * r * r / (float)(chunks * 16);
    for (uint c = get_local_id(0); c < chunks; c += GROUP) {
        const float16 passed = has_dy ? row_load(row + c, dy) : (float16)(0.0f);
        const float16 scaled = row_load(row + c, dh) * vload16(c, gain);
        row_store(passed + r * (scaled - share * row_load(row + c, x)), row + c, dx);
    }
}

__kernel void norm_gain(__global const stored *x, __global const stored *dh,
                        __global const float *inverse, __global float *partial, uint tokens) {
    const size_t chunk = get_global_id(0), chunks = get_global_size(0), slice = get_global_id(1);
    const size_t slices = get_global_size(1);
    const size_t begin = slice * tokens / slices, end = (slice + 1) * tokens / slices;
    float16 sum = 0.0f;
    for (size_t t = begin; t < end; t++)
        sum += row_load(t * chunks + chunk, dh) * row_load(t * chunks + chunk, x) * inverse[t];
    vstore16(sum, slice * chunks + chunk, partial);
}

__kernel void sum_rows(__global const float *partial, __global float *sums, uint slices) {
    const size_t chunk = get_global_id(0), chunks = get_global_size(0);
    float16 sum = 0.0f;
    for (uint slice = 0; slice < slices; slice++)
        sum += vload16(slice * chunks + chunk, partial);
    vstore16(sum, chunk, sums);
}
