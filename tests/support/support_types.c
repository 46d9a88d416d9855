/* Sixteen-bit storage on the host's side: rounding, and buffers of f16 and bf16. */
#include "support.h"

#include <math.h>
#include <string.h>

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

/* Nearest even in steps of 2^exponent. */
static float round_to_step(float value, int exponent) {
    return (float)ldexp(rint(ldexp((double)value, -exponent)), exponent);
}

float type_round(clmoe_type type, float value) {
    int exponent = 0;
    if (type == CLMOE_F32 || value == 0.0F || !isfinite(value))
        return value;
    frexp((double)value, &exponent);
    if (type == CLMOE_BF16)
        return round_to_step(value, exponent < -125 ? -133 : exponent - 8);
    return round_to_step(value, exponent < -13 ? -24 : exponent - 11);
}

/* `value` is representable. */
static uint16_t encode(clmoe_type type, float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    if (type == CLMOE_BF16)
        return (uint16_t)(bits >> 16);
    if (isnan(value))
        return (uint16_t)(sign | 0x7E00);
    if (fabsf(value) >= 65520.0F)
        return (uint16_t)(sign | 0x7C00);
    if (fabsf(value) < 6.103515625e-5F)
        return (uint16_t)(sign | (uint32_t)(fabsf(value) * 16777216.0F));
    return (uint16_t)(sign | (((bits & 0x7FFFFFFF) >> 13) - (112u << 10)));
}

float type_value(clmoe_type type, uint16_t code) {
    uint32_t sign = (uint32_t)(code & 0x8000) << 16, rest = code & 0x7FFF;
    if (type == CLMOE_BF16)
        return float_of((uint32_t)code << 16);
    if (rest >= 0x7C00)
        return float_of(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    if (rest < 0x400)
        return (sign ? -1.0F : 1.0F) * (float)rest / 16777216.0F;
    return float_of(sign | ((rest + (112u << 10)) << 13));
}

size_t type_size(clmoe_type type) {
    return type == CLMOE_F32 ? 4 : 2;
}

void round_all(clmoe_type type, float *values, size_t n) {
    for (size_t i = 0; i < n; i++)
        values[i] = type_round(type, values[i]);
}

clmoe_buf buf_of_type(clmoe_type type, const float *values, size_t n) {
    if (type == CLMOE_F32 || !values)
        return buf_of(values, n * sizeof *values);
    uint16_t *codes = HOST(uint16_t, n);
    for (size_t i = 0; i < n; i++)
        codes[i] = encode(type, type_round(type, values[i]));
    clmoe_buf buf = buf_new_type(type, n);
    buf_write(buf, codes, n * sizeof *codes);
    return buf;
}

float *type_values(clmoe_type type, const void *elements, size_t n) {
    float *values = HOST(float, n);
    if (type == CLMOE_F32)
        memcpy(values, elements, n * sizeof *values);
    else
        for (size_t i = 0; i < n; i++)
            values[i] = type_value(type, ((const uint16_t *)elements)[i]);
    return values;
}

float *buf_get_type(clmoe_buf buf, clmoe_type type, size_t n) {
    return type_values(type, buf_get(buf), n);
}

double type_tolerance(clmoe_type type) {
    return type == CLMOE_F32 ? FORWARD_TOLERANCE : (type == CLMOE_F16 ? 1e-3 : 8e-3);
}
