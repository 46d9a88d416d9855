#include "types.h"

#include <math.h>
#include <string.h>

size_t type_bytes(clmoe_type type) {
    return type == CLMOE_F32 ? sizeof(cl_float) : sizeof(cl_half);
}

size_t clmoe_type_size(clmoe_type type) {
    return type <= CLMOE_BF16 ? type_bytes(type) : 0;
}

const char *type_name(clmoe_type type) {
    switch (type) {
    case CLMOE_F16:
        return "f16";
    case CLMOE_BF16:
        return "bf16";
    case CLMOE_F32:
        break;
    }
    return "f32";
}

static uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* bits / 2^shift to nearest even. */
static uint32_t shift_to_even(uint32_t bits, uint32_t shift) {
    uint32_t half = (1u << (shift - 1)) - 1, odd = bits >> shift & 1;
    return (bits + half + odd) >> shift;
}

static uint16_t bf16_of_f32(float value) {
    uint32_t bits = bits_of(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)shift_to_even(bits, 16);
}

static uint16_t f16_of_f32(float value) {
    const uint32_t smallest_normal = 113u << 23, bias = 112u << 23, too_large = 0x477FF000u;
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u)
        return (uint16_t)(sign | 0x7E00u);
    if (size >= too_large)
        return (uint16_t)(sign | 0x7C00u);
    if (size >= smallest_normal)
        return (uint16_t)(sign | shift_to_even(size - bias, 13));
    /* Adding 1/2 puts the last bit of a subnormal half into the last bit of the float. */
    return (uint16_t)(sign | (bits_of(float_of(size) + 0.5F) - bits_of(0.5F)));
}

float f32_of_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31)
        return float_of(sign | 0x7F800000u | fraction << 13);
    if (exponent == 0)
        return ldexpf(sign ? -(float)fraction : (float)fraction, -24);
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

void clmoe_type_encode(clmoe_type type, const float *values, size_t n, void *out) {
    uint16_t *codes = out;
    if (type == CLMOE_F32) {
        memmove(out, values, n * sizeof *values);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        uint16_t code = type == CLMOE_BF16 ? bf16_of_f32(values[i]) : f16_of_f32(values[i]);
        memcpy(&codes[i], &code, sizeof code);
    }
}

void clmoe_type_decode(clmoe_type type, const void *elements, size_t n, float *out) {
    const uint16_t *codes = elements;
    if (type == CLMOE_F32) {
        memmove(out, elements, n * sizeof *out);
        return;
    }
    for (size_t i = 0; i < n; i++)
        out[i] = type == CLMOE_BF16 ? float_of((uint32_t)codes[i] << 16) : f32_of_f16(codes[i]);
}
