/*
 * Purpose: Fills an array with random values that every storage type represents exactly.
 * Formula: out[i] = random_int(stream, i, bits) * scale
 * Arrays: out [count] of f32 (TYPE 0), f16 (1) or bf16 (2)
 * NDRange: any number of groups of GROUP work-items, which stride over i
 * Limits: scale is a power of two; bits is at most the type's significand: 24, 11, 8
 * Repeatability: a value depends on its index alone
 */
__kernel __attribute__((reqd_work_group_size(GROUP, 1, 1))) void
fill_random(__global void *out, ulong count, uint stream, uint bits, float scale) {
    for (ulong i = get_global_id(0); i < count; i += get_global_size(0)) {
        const float value = (float)random_int(stream, i, bits) * scale;
#if TYPE == 0
        ((__global float *)out)[i] = value;
#elif TYPE == 1
        vstore_half(value, i, (__global half *)out);
#else
        ((__global ushort *)out)[i] = (ushort)(as_uint(value) >> 16);
#endif
    }
}
