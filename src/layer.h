/* An immutable layer: the checked descriptor, derived sizes, the engine, compiled kernels. */
#ifndef CLMOE_LAYER_H
#define CLMOE_LAYER_H

#include "../cl/router.clh"
#include "context.h"
#include "gemm/mlp.h"

/* Every kernel of the routing steps, by index; the file and its name are in layer.c's table. */
typedef enum kernel_id {
    KERNEL_SCORE,
    KERNEL_TOPK,
    KERNEL_SORT_KEYS,
    KERNEL_SORT_HISTOGRAM,
    KERNEL_SORT_SCAN,
    KERNEL_SORT_SCATTER,
    KERNEL_SORT_SEQUENCES,
    KERNEL_PLAN_HISTOGRAM,
    KERNEL_PLAN_SCAN,
    KERNEL_PLAN_SCAN_SEQUENCES,
    KERNEL_PLAN_OFFSETS,
    KERNEL_PLAN_SCATTER,
    KERNEL_PLAN_RENORM,
    KERNEL_REBALANCE_BEGIN,
    KERNEL_REBALANCE_COLUMNS,
    KERNEL_REBALANCE_TARGET,
    KERNEL_REBALANCE_ROWS,
    KERNEL_REROUTE_ASK,
    KERNEL_REROUTE_ACCEPT,
    KERNEL_REROUTE_FINISH,
    KERNEL_REROUTE_WEIGHTS,
    KERNEL_DISPATCH,
    KERNEL_NORMALIZE,
    KERNEL_COMBINE,
    KERNEL_STATS,
    KERNEL_COUNT
} kernel_id;

struct clmoe_layer {
    clmoe_context *context;
    clmoe_layer_desc desc; /* desc.engine is NULL here; see experts.engine */
    uint32_t columns;      /* R = E + Z */
    router_switches router;
    uint32_t score_group; /* work-items per token in score.cl */
    uint32_t topk_tokens; /* tokens per group in topk.cl */
    gemm_use experts, shared;
    gemm_use dense; /* router and shared gate: by device, so that ids do not depend on the engine */
    cl_kernel kernels[KERNEL_COUNT]; /* NULL where the switches do not need one */
};

/* One of the layer's MLPs; its hidden_dim is 0 if the layer has none. */
static inline const clmoe_mlp_desc *layer_mlp(const clmoe_layer *layer, clmoe_mlp mlp) {
    return mlp == CLMOE_MLP_SHARED ? &layer->desc.shared : &layer->desc.experts;
}

static inline const gemm_use *layer_mlp_use(const clmoe_layer *layer, clmoe_mlp mlp) {
    return mlp == CLMOE_MLP_SHARED ? &layer->shared : &layer->experts;
}

/* C for a batch of T tokens, or for each of its sequences; only for layers with a capacity. */
uint32_t layer_capacity(const clmoe_layer *layer, uint32_t tokens);

static inline bool layer_is_dropless(const clmoe_layer *layer) {
    return layer->desc.capacity.rows == 0 && layer->desc.capacity.factor == 0;
}

/* Whether each sequence of the batch has a capacity of its own. */
static inline bool layer_has_sequences(const clmoe_layer *layer) {
    return !layer_is_dropless(layer) && layer->desc.capacity.tokens_per_sequence > 0;
}

/* Tokens of a sequence, all of them without sequences; at least 1. */
static inline uint32_t layer_sequence_tokens(const clmoe_layer *layer, uint32_t tokens) {
    uint32_t each = layer_has_sequences(layer) ? layer->desc.capacity.tokens_per_sequence : tokens;
    each = each < tokens ? each : tokens;
    return each > 0 ? each : 1;
}

/* At least 1. */
static inline uint32_t layer_sequences(const clmoe_layer *layer, uint32_t tokens) {
    uint32_t each = layer_sequence_tokens(layer, tokens);
    return tokens > 0 ? tokens / each + (tokens % each != 0) : 1;
}

/* The order in which pairs compete for places: KEEP_POSITION when none can lose. */
static inline clmoe_keep layer_keep(const clmoe_layer *layer) {
    return layer_is_dropless(layer) ? CLMOE_KEEP_POSITION : layer->desc.capacity.keep;
}

/* Whether dropped pairs go to other experts. */
static inline bool layer_reroutes(const clmoe_layer *layer) {
    return !layer_is_dropless(layer) && layer->desc.capacity.overflow == CLMOE_OVERFLOW_REROUTE;
}

/* Whether weights are rebalanced; a token's only weight cannot be. */
static inline bool layer_rebalances(const clmoe_layer *layer) {
    return layer->desc.router.rebalance_iterations > 0 && layer->desc.top_k > 1;
}

/* The kernels of a step of its own, into layer->kernels; in the step's file. */
clmoe_status rebalance_kernels_create(clmoe_layer *layer);
clmoe_status reroute_kernels_create(clmoe_layer *layer);

/* Whether plan.cl walks in an order that sort.cl makes. */
static inline bool layer_sorts(const clmoe_layer *layer) {
    return layer_keep(layer) == CLMOE_KEEP_PRIORITY || layer_keep(layer) == CLMOE_KEEP_WEIGHT;
}

#endif
