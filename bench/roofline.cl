/*
 * Purpose: What the device can do at most: memory bandwidth and multiply-add rate.
 * Formula: read: one sum per work-item; copy: out = in; fma: CHAINS independent a = a*b + c
 * Arrays: in, out [work-items * count] vectors of V floats; sums [work-items]
 * NDRange: groups of GROUP work-items; work-item i takes the `count` vectors from i * first on,
 *          `stride` apart: neighbours on GPUs, a run of its own on CPUs
 * Limits: none
 * Repeatability: results do not depend on the order of work-items
 */
#define CONCAT_(a, b) a##b
#define CONCAT(a, b)  CONCAT_(a, b)
#define VEC           CONCAT(float, V)
#define UNROLL        _Pragma("unroll")
#define ROOFLINE      __kernel __attribute__((reqd_work_group_size(GROUP, 1, 1))) void

enum { CHAINS = 12 };

ROOFLINE roofline_copy(__global const VEC *in, __global VEC *out, ulong first, ulong stride,
                       ulong count) {
    ulong at = get_global_id(0) * first;
    for (ulong i = 0; i < count; i++, at += stride)
        out[at] = in[at];
}

ROOFLINE roofline_read(__global const VEC *in, __global VEC *sums, ulong first, ulong stride,
                       ulong count) {
    ulong at = get_global_id(0) * first;
    VEC sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f, sum3 = 0.0f;
    for (ulong i = 0; i < count; i += 4, at += 4 * stride) {
        sum0 += in[at];
        sum1 += in[at + stride];
        sum2 += in[at + 2 * stride];
        sum3 += in[at + 3 * stride];
    }
    sums[get_global_id(0)] = (sum0 + sum1) + (sum2 + sum3);
}

ROOFLINE roofline_fma(__global VEC *sums, float b, float c, uint count) {
    VEC a[CHAINS];
    UNROLL for (int k = 0; k < CHAINS; k++)
        a[k] = (float)(get_global_id(0) + k);
    for (uint i = 0; i < count; i++)
        UNROLL for (int k = 0; k < CHAINS; k++)
            a[k] = fma(a[k], (VEC)b, (VEC)c);
    VEC sum = 0.0f;
    UNROLL for (int k = 0; k < CHAINS; k++)
        sum += a[k];
    sums[get_global_id(0)] = sum;
}
