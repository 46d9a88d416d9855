/*
 * A dense gradient of weights of few elements fills a device only if its slots are cut into slices:
 * an engine makes a partial sum of each, and they are added here.
 */
#ifndef CLMOE_SLICES_H
#define CLMOE_SLICES_H

#include "kernel.h"

typedef struct gradient_slices {
    cl_kernel add;
    size_t group; /* work-items per group of it */
} gradient_slices;

clmoe_status slices_create(clmoe_context *context, const gemm_gradient_shape *shape,
                           gradient_slices *slices);
void slices_release(gradient_slices *slices);

/* gemm_gradient_engine.scratch: of dense problems, the partial sums. */
size_t slices_scratch(const void *state, uint32_t experts, size_t slots, uint32_t m, uint32_t n);

/* Whether this one is to be cut. */
bool slices_take(const gemm_gradient *g);

/* The problem of its partial sums, [slices,m,n] f32 in g->scratch: a slice for an expert. */
gemm_gradient slices_of(const gemm_gradient *g);

/* The sums, once they are there, become the gradient. */
clmoe_status slices_add(const gradient_slices *slices, launch *chain, const gemm_gradient *g);

#endif
