/* An immutable layer: the checked descriptor, derived sizes, the engine, compiled kernels. */
#ifndef CLMOE_LAYER_H
#define CLMOE_LAYER_H

#include "../cl/router.clh"
#include "context.h"
#include "gemm/mlp.h"

/* Every kernel of the routing steps, by index; the file and its name are in layer.c's table. */
typedef enum kernel_id {
    KERNEL_SCORE,
    KERNEL_JITTER,
    KERNEL_NOISE_EXPERTS,
    KERNEL_NOISE,
    KERNEL_TOPK,
    KERNEL_SINKHORN_START,
    KERNEL_SINKHORN_EXP,
    KERNEL_SINKHORN_ROWS,
    KERNEL_SINKHORN_COLUMNS,
    KERNEL_SINKHORN_CHOICES,
    KERNEL_SINKHORN_WEIGHTS,
    KERNEL_SOFT,
    KERNEL_TWO_LEVEL_SCORES,
    KERNEL_TWO_LEVEL_TOPK,
    KERNEL_CHOICE_KEYS,
    KERNEL_CHOICE_THRESHOLDS,
    KERNEL_CHOICE_COUNTS,
    KERNEL_CHOICE_OFFSETS,
    KERNEL_CHOICE_PAIRS,
    KERNEL_SOFT_MOE_NORMS,
    KERNEL_SOFT_MOE_SLOT_NORMS,
    KERNEL_SOFT_MOE_LOGITS,
    KERNEL_SOFT_MOE_PARTIALS,
    KERNEL_SOFT_MOE_COLUMNS,
    KERNEL_SOFT_MOE_DISPATCH,
    KERNEL_SOFT_MOE_COMBINE,
    KERNEL_SOFT_MOE_PLAN,
    KERNEL_SOFT_MOE_CLEAR,
    KERNEL_SORT_KEYS,
    KERNEL_SORT_HISTOGRAM,
    KERNEL_SORT_SCAN,
    KERNEL_SORT_SCATTER,
    KERNEL_PLAN_HISTOGRAM,
    KERNEL_PLAN_SCAN,
    KERNEL_PLAN_OFFSETS,
    KERNEL_PLAN_SCATTER,
    KERNEL_PLAN_RENORM,
    KERNEL_DISPATCH,
    KERNEL_NORMALIZE,
    KERNEL_COMBINE,
    KERNEL_STATS,
    KERNEL_STATE_INIT,
    KERNEL_CONTROL,
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
    gemm_use mix;   /* of Soft MoE: f32 weights times rows of x or ye, by device */
    cl_kernel kernels[KERNEL_COUNT]; /* NULL where the switches do not need one */
};

/* One of the layer's MLPs; its hidden_dim is 0 if the layer has none. */
static inline const clmoe_mlp_desc *layer_mlp(const clmoe_layer *layer, clmoe_mlp mlp) {
    return mlp == CLMOE_MLP_SHARED ? &layer->desc.shared : &layer->desc.experts;
}

static inline const gemm_use *layer_mlp_use(const clmoe_layer *layer, clmoe_mlp mlp) {
    return mlp == CLMOE_MLP_SHARED ? &layer->shared : &layer->experts;
}

/* C for a batch of T tokens; only for layers with a capacity. */
uint32_t layer_capacity(const clmoe_layer *layer, uint32_t tokens);

static inline bool layer_is_dropless(const clmoe_layer *layer) {
    return layer->desc.capacity.rows == 0 && layer->desc.capacity.factor == 0;
}

/* The order in which pairs compete for places: KEEP_POSITION when none can lose. */
static inline clmoe_keep layer_keep(const clmoe_layer *layer) {
    return layer_is_dropless(layer) ? CLMOE_KEEP_POSITION : layer->desc.capacity.keep;
}

/* Whether plan.cl walks in an order that sort.cl makes. */
static inline bool layer_sorts(const clmoe_layer *layer) {
    clmoe_keep keep = layer_keep(layer);
    return keep == CLMOE_KEEP_PRIORITY || keep == CLMOE_KEEP_WEIGHT || keep == CLMOE_KEEP_RANDOM;
}

/* Whether logits change when a state is given: by noise, expert dropout or logit dropout. */
static inline bool layer_is_noisy(const clmoe_layer *layer) {
    const clmoe_router_desc *router = &layer->desc.router;
    return router->noise != CLMOE_NOISE_NONE || router->expert_dropout > 0 ||
           router->logit_dropout > 0;
}

static inline size_t layer_state_bytes(const clmoe_layer *layer) {
    return sizeof(clmoe_state) + 16 * (size_t)layer->columns;
}

/*
 * Steps that create their own kernels, in the step's file; here because layer.c lies below them.
 * Each looks at the descriptor for what is needed.
 */
clmoe_status noise_kernels_create(clmoe_layer *layer);
clmoe_status state_kernels_create(clmoe_layer *layer);
clmoe_status control_kernels_create(clmoe_layer *layer);

static inline bool layer_is_expert_choice(const clmoe_layer *layer) {
    return layer->desc.router.policy == CLMOE_POLICY_EXPERT_CHOICE;
}

static inline bool layer_is_soft_moe(const clmoe_layer *layer) {
    return layer->desc.router.policy == CLMOE_POLICY_SOFT_MOE;
}

/* Rows of weights.router. */
static inline uint32_t layer_router_rows(const clmoe_layer *layer) {
    return layer_is_soft_moe(layer) ? layer->columns * layer->desc.router.slots_per_expert
                                    : layer->columns;
}

/* Whether the policy makes its own scores of l, after softcap and temperature. */
static inline bool layer_chooses_by_logit(const clmoe_layer *layer) {
    return layer->desc.router.policy == CLMOE_POLICY_SINKHORN || layer->desc.router.two_level;
}

/* Whether topk.cl chooses; the other policies have kernels of their own. */
static inline bool layer_has_topk(const clmoe_layer *layer) {
    clmoe_policy policy = layer->desc.router.policy;
    return policy == CLMOE_POLICY_SINKHORN ||
           (policy == CLMOE_POLICY_TOKEN_CHOICE && !layer->desc.router.two_level);
}

/* Kernels of the policies, made where the descriptor asks for them. */
clmoe_status sinkhorn_kernels_create(clmoe_layer *layer);
clmoe_status soft_kernels_create(clmoe_layer *layer);
clmoe_status two_level_kernels_create(clmoe_layer *layer);
clmoe_status expert_choice_kernels_create(clmoe_layer *layer);
clmoe_status soft_moe_kernels_create(clmoe_layer *layer);

#endif
