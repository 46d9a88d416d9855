/* The gradients that clmoe_backward() can give, as a list. */
#ifndef CLMOE_GRADIENT_FIELDS_H
#define CLMOE_GRADIENT_FIELDS_H

#include "check_buffers.h"

/* One of clmoe_gradients; elements 0: the layer has no such weight. */
typedef struct gradient_field {
    const char *name; /* in messages */
    size_t offset;    /* in clmoe_gradients */
    size_t elements, element;
} gradient_field;

enum { GRADIENT_FIELDS = 19 };

/* Writes one entry for each; returns how many. */
size_t gradient_fields(const clmoe_layer *layer, gradient_field fields[GRADIENT_FIELDS]);

#endif
