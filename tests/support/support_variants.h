/* The table of layers: every switch of the descriptor in one of them. */
#ifndef SUPPORT_VARIANTS_H
#define SUPPORT_VARIANTS_H

#include "clmoe/clmoe.h"

/* Set on a descriptor that has sizes: 12 experts or another multiple of 12, top_k 3 or more. */
typedef struct layer_variant {
    const char *name;
    void (*set)(clmoe_layer_desc *desc);
} layer_variant;

/* Token choice without a state: the oracle of clmoe_forward() has all of them. */
extern const layer_variant layer_variants[];
extern const size_t num_layer_variants;

/* The other policies, and what a state or the places of a batch do. */
extern const layer_variant routing_variants[];
extern const size_t num_routing_variants;

/* Layers that a backward pass tells apart and a forward does not. */
extern const layer_variant backward_variants[];
extern const size_t num_backward_variants;

/* Sets the variant of that name, of any table; a test's `own` that is not NULL instead of it. */
void variant_set(clmoe_layer_desc *desc, const char *name, void (*own)(clmoe_layer_desc *desc));

#endif
