/*
 * clmoe, the backward pass: gradients of a batch that clmoe_forward() has run. Part of clmoe.h,
 * which includes it.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * For a layer with desc.training 1. With L the loss, dy = dL/dy comes from what follows the layer,
 * and clmoe_backward() gives dL/dx and dL/dW of every weight: docs/training.md has the loop. The
 * promises of clmoe_forward() hold: nothing blocks, nothing is allocated, compiled or read back,
 * and the same inputs give the same bits. The engine "clblast" is exempt as there.
 *
 * `saved` is what the forward of the same batch left: the choice, the plan and z, the values of
 * gate and up before the activation. It is only read, so that a batch can go backward twice.
 * The activation, the gathered x and the experts' outputs are made again or not needed: the
 * gradient of a pair's weight is <W_down^T dy, activation>, plus <dy, down_bias>.
 *
 * What is held fixed: the choice of experts and places, the largest logit and its like. Gradients
 * flow through the weights of the chosen pairs, not through the choice; a select_bias gets none.
 * At 0 relu has slope 0, at its limit a clamp slope 1, as frameworks have it.
 * Dropped, surplus and masked pairs give exactly 0. A row of dy with NaN reaches the dx of its own
 * token alone, but with Soft MoE, whose slots all tokens share, and with weight rebalancing, whose
 * loads they share; the gradients of the weights that token used get it.
 *
 * Soft MoE takes neither logits_in, ids_in, dlogits nor what is of pairs; dye is on the slots'
 * outputs. A token that enters no slot gets its dx from the shared expert alone.
 *
 * router.score sparsemixer: the derivative of what clmoe_forward() computes, the logits that count
 * held fixed. The paper trains with another rule, which samples and is no derivative.
 */
#ifndef CLMOE_BACKWARD_H
#define CLMOE_BACKWARD_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * Gradients of an MLP's weights: shapes and layouts of clmoe_mlp_weights, elements of
 * desc.gradient_type. What is {NULL, 0} is not computed.
 */
typedef struct clmoe_mlp_gradients {
    clmoe_buf gate, up, down;
    clmoe_buf gate_bias, up_bias, down_bias;
    clmoe_buf reserved[10];
} clmoe_mlp_gradients;

/*
 * Gradients of a layer's weights, each optional, in the shapes and layouts of clmoe_weights. Those
 * of matrices, of their biases and of output_bias have elements of desc.gradient_type; router_bias
 * and expert_scale are f32.
 */
typedef struct clmoe_gradients {
    clmoe_buf router;       /* [R,D] */
    clmoe_buf router_bias;  /* [R] f32 */
    clmoe_buf expert_scale; /* [R] f32 */
    clmoe_mlp_gradients experts;
    clmoe_mlp_gradients shared;
    clmoe_buf shared_gate;  /* [D] */
    clmoe_buf output_bias;  /* [D] */
    clmoe_buf group_router; /* [groups.count,D] */
    clmoe_buf noise_router; /* [R,D] */
    clmoe_buf reserved[7];
} clmoe_gradients;

/*
 * Creates a buffer for the gradient of every weight that the layer has, in the layer's OpenCL
 * context; the contents are undefined. The buffers are yours: release them with
 * clmoe_gradients_release(). On error nothing is left allocated. Errors: CLMOE_INVALID_ARGUMENT for
 * a layer with training 0; OpenCL's, with the name of the gradient and its size.
 */
CLMOE_API clmoe_status clmoe_gradients_create(const clmoe_layer *layer, clmoe_gradients *gradients);

/* Releases every buffer of `gradients` and clears it. NULL is allowed. */
CLMOE_API void clmoe_gradients_release(clmoe_gradients *gradients);

/* Which gradients a call computes. */
typedef uint32_t clmoe_backward_parts;
enum {
    CLMOE_BACKWARD_BOTH = 0,
    CLMOE_BACKWARD_DATA = 1, /* dx, dlogits_out, dpair_weights */
    /*
     * `gradients` alone, after a call for data of the same batch with the same arguments, whose
     * `scratch` is as it left it: a pipeline may send dx on first. Both calls together give the
     * bits of one for both.
     */
    CLMOE_BACKWARD_WEIGHTS = 2,
};

/*
 * One batch. Start with clmoe_backward_args_init(). Fields of the same name are those the forward
 * was given, with the same contents; a field left 0 is not given. The residual needs nothing: its
 * gradient is dy.
 */
typedef struct clmoe_backward_args {
    size_t struct_size; /* set by clmoe_backward_args_init() */
    uint32_t tokens;    /* T, 0 allowed */
    clmoe_backward_parts parts;
    const clmoe_weights *weights;
    clmoe_buf x;          /* [T,D] */
    clmoe_buf token_mask; /* optional [T] u8 */
    clmoe_buf logits_in;  /* if the forward had it: [T,R] f32 */
    /* If the forward had them: [T,K] i32 and f32. Then the router gets no gradient. */
    clmoe_buf ids_in, pair_weights_in;
    clmoe_buf state; /* if the forward had it, before clmoe_balance_update() changes it */
    clmoe_buf saved; /* of the forward; read only */
    clmoe_buf scratch;
    clmoe_buf dy; /* [T,D] of the layer's type: dL/dy */
    /*
     * Optional [T,R], [T,R] and [T,groups.count] f32: gradients of the balancing losses that the
     * forward added to its arguments of these names. They are added on the way to dx and to the
     * routers' gradients.
     */
    clmoe_buf dlogits, dnoise, dgroup_logits;
    /*
     * Optional [S,D] of the layer's type, with desc.dye: more gradient, on ye as clmoe_experts()
     * gives it; rows of padding are not read.
     */
    clmoe_buf dye;
    /* Outputs. */
    clmoe_buf dx;            /* optional [T,D] of the layer's type */
    clmoe_buf dlogits_out;   /* optional [T,R] f32: on the logits, may be dlogits */
    clmoe_buf dpair_weights; /* optional [pairs] f32: on the combine weights; 0 without a place */
    /*
     * Optional. What the forward did not use gets 0: routers and expert_scale with ids_in, router
     * and router_bias with logits_in, noise_router without a state.
     */
    const clmoe_gradients *gradients;
    /* 0: gradients are written; 1: they are added to what is there, as over micro-batches. */
    uint32_t accumulate;
    uint32_t reserved;             /* 0 */
    struct clmoe_profile *profile; /* optional, see profile.h */
} clmoe_backward_args;

static inline void clmoe_backward_args_init(clmoe_backward_args *args) {
    memset(args, 0, sizeof *args);
    args->struct_size = sizeof *args;
}

/*
 * Enqueues the backward pass of one batch on `queue` after the `num_wait` events of `wait`. Events
 * and errors are as with clmoe_forward(). Errors besides: CLMOE_INVALID_ARGUMENT for a layer with
 * training 0.
 */
CLMOE_API clmoe_status clmoe_backward(clmoe_layer *layer, cl_command_queue queue,
                                      const clmoe_backward_args *args, cl_uint num_wait,
                                      const cl_event *wait, cl_event *event);

#ifdef __cplusplus
}
#endif

#endif
