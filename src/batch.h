/* What flows through the chain: a layer, and every buffer of one call. */
#ifndef CLMOE_BATCH_H
#define CLMOE_BATCH_H

#include "workspace.h"

/*
 * Bound once from the public arguments of a call (batch.c, calls.c); a step reads what it needs.
 * Buffers that the call does not have are {NULL, 0}.
 */
typedef struct batch {
    const clmoe_layer *layer;
    uint32_t tokens;
    workspace_layout ws;
    clmoe_buf saved, scratch;
    const clmoe_weights *weights;
    clmoe_buf x;          /* [T,D], as the router sees it before jitter */
    clmoe_buf token_mask; /* [T] u8 */
    clmoe_buf state;

    bool logits_given;       /* score makes none */
    clmoe_buf logits;        /* [T,R] f32, clean; [T,N] with Soft MoE */
    clmoe_buf scores;        /* [T,R] f32, of a call that chose by them */
    clmoe_buf ids;           /* [pairs] i32 */
    clmoe_buf pair_weights;  /* [pairs] f32 */
    clmoe_buf live;          /* [T] i32 */
    clmoe_buf token_offsets; /* [T+1] i32 */
    clmoe_buf plan;          /* clmoe_plan_layout */
    /* Of placement: [E], [E,max_copies] and [pairs] i32. */
    clmoe_buf copies, logical_to_physical, physical_ids;
    uint32_t replicas, max_copies;

    clmoe_buf jittered;  /* [T,D]: what jitter makes of x */
    clmoe_buf experts_x; /* [T,D]: x, or with jitter_experts the jittered one */
    clmoe_buf xe, ye;    /* [S,D] */
    clmoe_buf mix;       /* [T,S] f32, with Soft MoE: a token's shares of the slots */
    clmoe_buf mixed;     /* [T,D], with Soft MoE: ye by them */
    clmoe_buf shared_y;  /* [T,D] */
    clmoe_buf shared_gate;
    clmoe_buf residual, y; /* [T,D] */

    bool routed; /* by this call: noise and group logits of the batch are in their regions */
    clmoe_buf stats, load_target, load_supplied;
    clmoe_buf bias_counts; /* of the quantile rule */
    bool counts_added;     /* to what is in them */
    clmoe_loss_desc losses[MAX_LOSSES];
    uint32_t num_losses;
    clmoe_buf loss_values, dlogits, dnoise, dgroup_logits;

    /* Training: z of forward. */
    clmoe_buf z, shared_z;
    bool z_again; /* backward: it was not kept, and is made again there */
    /* Backward alone; dlogits, dnoise and dgroup_logits are then what losses left. */
    clmoe_buf dy, dye, dx;
    clmoe_buf dxe, dots;                              /* [S,D], [S] f32 */
    clmoe_buf dpair_weights, dlogits_out, dnoise_out; /* [pairs], [T,R], [T,R] f32 */
    clmoe_buf dgroup_out;                             /* [T,groups.count] f32 */
    clmoe_buf shared_dx, router_dx;                   /* [T,D]: the parts of dx */
    bool router_dx_begun;                             /* something lies in router_dx */
    clmoe_weights raw; /* *weights, of backward: without packed ones */
    clmoe_gradients gradients;
    bool accumulate;
} batch;

/* What the caller gave, and for the rest the regions of workspace.c. */
clmoe_status bind_forward(batch *b, const clmoe_layer *layer, const clmoe_forward_args *args);

/* The same of a backward pass. */
clmoe_status bind_backward(batch *b, const clmoe_layer *layer, const clmoe_backward_args *args);

/* Weights of a backward pass: as given, but never packed. NULL: none. */
void bind_raw_weights(batch *b, const clmoe_weights *weights);

/* The losses of a call, `loss_size` bytes apart. */
void bind_losses(batch *b, const clmoe_loss_desc *losses, size_t loss_size, uint32_t num_losses);

/* Where the parts of REGION_UNMASKED lie: see dispatch/unmasked.c. */
typedef enum unmasked_part {
    UNMASKED_LIST,    /* [T] i32 */
    UNMASKED_OFFSETS, /* [2] u32 */
    UNMASKED_KEPT,    /* [1] u32 */
} unmasked_part;

clmoe_buf unmasked_at(const batch *b, unmasked_part part);

/* All tokens of the batch, or with a mask those that are not masked, as one expert's bucket. */
gemm_gradient batch_rows(const batch *b);

/* Whether the experts see the jittered x. */
static inline bool batch_jitters_experts(const batch *b) {
    return b->state.mem && b->layer->desc.router.noise.jitter_experts;
}

/* The place of a region; {NULL, 0} for an empty one. */
static inline clmoe_buf region(const batch *b, region_id id) {
    return workspace_region(&b->ws, id, b->saved, b->scratch);
}

/* The place of an array of the plan: PLAN_ARRAY(b, kept). */
#define PLAN_ARRAY(b, array) buf_at((b)->plan, (b)->ws.plan.array)

/* [E] f32, what weights of an expert are multiplied by, or none. */
static inline clmoe_buf expert_scale_of(const batch *b) {
    return b->layer->desc.router.expert_scale ? b->weights->expert_scale : (clmoe_buf){0};
}

#endif
