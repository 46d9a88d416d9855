/* Storage types: sizes and names; host.h has the conversions. */
#ifndef CLMOE_TYPES_H
#define CLMOE_TYPES_H

#include "clmoe/clmoe.h"

/* Bytes of an element. */
size_t type_bytes(clmoe_type type);

/* The type's name, as kernels and messages have it: "bf16". */
const char *type_name(clmoe_type type);

float f32_of_f16(uint16_t half);

#endif
