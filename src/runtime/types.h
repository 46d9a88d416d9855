/* Storage types: sizes, names, and conversion on the host. */
#ifndef CLMOE_TYPES_H
#define CLMOE_TYPES_H

#include "clmoe/clmoe.h"

/* Bytes of an element. */
size_t type_bytes(clmoe_type type);

/* The type's name, as kernels and messages have it: "bf16". */
const char *type_name(clmoe_type type);

float f32_of_f16(uint16_t half);

/* n floats -> n elements, to nearest even. `out` may be `values`. */
void type_encode(clmoe_type type, const float *values, size_t n, void *out);

/* n elements -> n floats. */
void type_decode(clmoe_type type, const void *elements, size_t n, float *out);

#endif
