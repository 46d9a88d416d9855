/* What the engine nv_wgmma's products and its gradients of weights share. */
#ifndef CLMOE_NV_WGMMA_H
#define CLMOE_NV_WGMMA_H

#include "experts/gemm/nv_wgmma_own.clh"
#include "kernel.h"

/* Work-items of a product, and of what prepares one. */
enum { WGMMA_ITEMS = 384, WGMMA_HELPER_ITEMS = 256 };

/* What the engine lays out itself begins at such a multiple, wherever a buffer does. */
enum { WGMMA_ALIGNMENT = 128 };

static inline size_t wgmma_round_up(size_t value, size_t unit) {
    return gemm_tiles(value, unit) * unit;
}

static inline clmoe_buf wgmma_aligned(clmoe_buf buf) {
    buf.offset = wgmma_round_up(buf.offset, WGMMA_ALIGNMENT);
    return buf;
}

/* A list of up to that many tiles. */
static inline size_t wgmma_list_bytes(size_t tiles) {
    return wgmma_round_up((LIST_HEADER + LIST_TILE * tiles) * sizeof(cl_int), WGMMA_ALIGNMENT);
}

/* As many groups as run at once share `products`: so many. */
static inline size_t wgmma_groups(uint64_t products, uint32_t units) {
    return products < units ? (size_t)products : units;
}

extern const gemm_gradient_engine nv_wgmma_gradient_engine;

#endif
