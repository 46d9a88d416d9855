/*
 * clmoe, the steps of clmoe_forward() one by one, for applications that replace one. Part of
 * clmoe.h, which includes it.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Each call takes the layer, a queue, its arguments, a wait list and an event, with the promises of
 * clmoe_forward(). `scratch` is a buffer of the size clmoe_layer_memory() gives; `state` is as in
 * clmoe_forward_args. Every args struct begins with its size, and a field left 0 is not given:
 *
 *   clmoe_score_args args = {.struct_size = sizeof args, .tokens = T, ...};
 *
 * In this order the calls are clmoe_forward(), bit for bit:
 *
 *   clmoe_score               x -> logits, scores
 *   clmoe_topk                scores -> ids, pair_weights
 *   clmoe_plan                ids -> plan
 *   clmoe_renorm_after_drop   pair_weights, where router.renorm.after_drop is 1
 *   clmoe_jitter              x -> jittered, with a state and noise.jitter_experts; then it is x of
 *                             the four calls below
 *   clmoe_dispatch            x -> xe, unless clmoe_experts() gathers x itself
 *   clmoe_experts             xe, or x -> ye, normalized where normalize_experts is 1
 *   clmoe_shared_expert       x -> shared, shared_gate, where the layer has one
 *   clmoe_combine             ye, shared, residual -> y
 *   clmoe_stats_compute, clmoe_loss (balance.h)
 *
 * The others cannot see that clmoe_renorm_after_drop() or clmoe_jitter() was left out, and y would
 * be wrong: final_weights and experts_jittered say that they were not, and are needed where the
 * layer has such a step. With ids of another router weights are final as they are.
 *
 * Soft MoE mixes instead of choosing: clmoe_soft_dispatch(), clmoe_experts() of its xe,
 * clmoe_soft_combine(), clmoe_shared_expert(), clmoe_combine() of what was mixed. The other steps
 * refuse it with CLMOE_UNSUPPORTED.
 *
 * Buffers, of every call, clmoe_forward() too; all of this is checked:
 *   - The object is a buffer of the context, no image. CL_MEM_READ_WRITE serves everything; what a
 *     call only reads may be CL_MEM_READ_ONLY, and what it only writes CL_MEM_WRITE_ONLY. Read and
 *     written are saved, scratch, plan, ye and shared where they are made, scores by clmoe_score(),
 *     ids, pair_weights and token_offsets by clmoe_topk(), ids and pair_weights by clmoe_plan()
 *     with overflow reroute, pair_weights by clmoe_renorm_after_drop(), what gradients are added
 *     to, and a state by clmoe_balance_...().
 *   - Flags about access by the host matter to the engine "clblast" alone, which reads the plan on
 *     the host: scratch, saved in training, and clmoe_experts_args.plan must allow that.
 *   - An offset, and a sub-buffer's origin, is a multiple of the element's size; that is enough:
 *     4 for f32, i32, u32, plan, state, stats, saved and scratch; 2 for f16 and bf16; 1 for u8.
 *   - What a call writes overlaps nothing else that it is given, parts of one buffer included; but
 *     y may be the same place as residual.
 *   - The args struct, and what it points to on the host, is read during the call alone.
 */
#ifndef CLMOE_PUBLIC_STEPS_H
#define CLMOE_PUBLIC_STEPS_H

#include "backward.h"
#include "clmoe.h"
#include "pack.h"

#ifdef __cplusplus
extern "C" {
#endif

/* score: x [T,D] -> logits [T,R] f32 and scores [T,R] f32. */
typedef struct clmoe_score_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* router, router_bias, noise_router, group_router */
    clmoe_buf x;                  /* [T,D]; with logits_in only read for learned noise */
    clmoe_buf logits_in;          /* optional [T,R] */
    clmoe_buf logits;             /* [T,R]; not written with logits_in */
    /*
     * [T,R]: what topk chooses by, without the selection bias: s(l), or with topk-then-score order
     * or Sinkhorn l itself after softcap and temperature. -infinity where the logit was not finite
     * or dropout masked it, and with two levels in the groups that were not picked.
     */
    clmoe_buf scores;
    clmoe_buf state; /* optional: noise, jitter, dropout, temperature_scale */
    /* Needed with a state if the layer has noise, jitter or dropout; and with two levels. */
    clmoe_buf scratch;
    /* 1, with a state and noise.jitter_experts: the experts will get what clmoe_jitter() makes. */
    uint32_t experts_jittered;
    uint32_t reserved; /* 0 */
} clmoe_score_args;

/* topk: scores [T,R] -> ids [T,K], weights [T,K], live [T]. */
typedef struct clmoe_topk_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* select_bias, expert_scale */
    clmoe_buf scores;             /* [T,R] f32 */
    clmoe_buf ids;                /* [T,K] i32 */
    /* [T,K] f32, after renorm and scale; before both with renorm.after_drop, unless it rounds. */
    clmoe_buf pair_weights;
    /*
     * [T] i32: how many leading pairs of the token are real, K or fewer; not with expert choice and
     * keep rule round
     */
    clmoe_buf live;
    /*
     * Expert choice and keep rule round: [T+1] i32, whose pairs are whose; ids and pair_weights are
     * then [pairs].
     */
    clmoe_buf token_offsets;
    clmoe_buf token_mask; /* optional [T] u8, for the policies and rebalancing that see the batch */
    clmoe_buf state;      /* optional: select_bias where weights has none */
    clmoe_buf scratch;    /* needed but for plain token choice */
} clmoe_topk_args;

/*
 * The routing plan is one buffer; this says where its arrays lie, in bytes from its start. A pair
 * is (token, choice k), pair = token * K + k, or token_offsets[token] + k with token_offsets. The
 * rows of expert e are the slots [offsets[e], offsets[e] + kept[e]), offsets are multiples of
 * row_tile; with a capacity, offsets[e] = e * (C rounded up to row_tile). With tokens_per_sequence
 * C is that of one sequence: the rows of an expert come sequence by sequence, up to C of each, and
 * offsets[e] = e * (sequences * C rounded up to row_tile).
 */
typedef struct clmoe_plan_layout {
    size_t bytes;        /* of the whole plan, for `tokens` and every smaller batch */
    uint32_t pairs;      /* T*K; else a bound, see clmoe_policy, CLMOE_KEEP_ROUND */
    uint32_t slots;      /* S: bound of the slots in use, a multiple of row_tile */
    uint32_t capacity;   /* C, of each sequence; 0 when dropless or T = 0 */
    uint32_t row_tile;   /* rows an engine computes together */
    size_t load;         /* [R] u32: pairs per expert before dropping */
    size_t kept;         /* [R] u32: rows of the bucket in use */
    size_t rerouted_in;  /* [R] u32: of these, those that came from another choice */
    size_t rerouted_out; /* [R] u32: pairs that chose the expert and were sent to another */
    size_t offsets;      /* [E+1] u32: first slot of each bucket */
    size_t slot_of;      /* [pairs] i32: slot of a pair; -1 no place, -2 identity expert */
    size_t pair_of;      /* [S] i32: pair of a slot, with Soft MoE a router row; -1 padding */
    size_t token_of;     /* [S] i32: token of a slot, -1 padding */
    size_t tile_expert;  /* [S/row_tile] i32: expert of a tile of rows, -1 no rows */
    uint32_t most_slots; /* the largest S of `tokens` and every smaller batch: for xe and ye */
    /*
     * With overflow reroute alone, which changes ids and pair_weights: what they were before, the
     * choice that statistics and losses are of. Real pairs only.
     */
    size_t chosen_ids;     /* [pairs] i32 */
    size_t chosen_weights; /* [pairs] f32 */
    size_t reserved[8];    /* 0 */
} clmoe_plan_layout;

CLMOE_API clmoe_status clmoe_plan_layout_get(const clmoe_layer *layer, uint32_t tokens,
                                             clmoe_plan_layout *layout);

/* plan: ids -> plan. */
typedef struct clmoe_plan_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_buf ids;          /* [pairs] i32 */
    clmoe_buf pair_weights; /* [pairs] f32; needed by keep priority and weight, and by reroute */
    clmoe_buf live;         /* optional [T] i32; not read with expert choice and keep rule round */
    clmoe_buf token_mask;   /* optional [T] u8 */
    /*
     * Optional [T+1] i32, ascending from 0: token t owns the pairs [token_offsets[t],
     * token_offsets[t+1]), at most K of them (any number with expert choice and keep rule round,
     * which need it). Without it, pairs [t*K, t*K + K). Arrays of pairs have room for all `pairs`
     * of the layout either way. Offsets are brought into [0, pairs], a range that ends before it
     * begins is empty, of one that is longer the first K count: whatever the values, nothing is
     * read or written outside the arrays, but pairs of two tokens may get two places or none.
     */
    clmoe_buf token_offsets;
    clmoe_buf state; /* optional: capacity_scale, and the seed of the keep rule random */
    /*
     * Overflow reroute: the scores, and ids and pair_weights are changed; a token with an id out of
     * range stays as it is. Without them, as with ids of another router, nothing is changed: pairs
     * that found no place are dropped.
     */
    clmoe_buf scores;             /* optional [T,R] f32 */
    const clmoe_weights *weights; /* expert_scale */
    clmoe_buf scratch;
    clmoe_buf plan;
} clmoe_plan_args;

/*
 * renorm_after_drop: the weights that clmoe_topk() gave, in place, after the plan: renorm over the
 * pairs of a token that have a place, then scale and expert_scale. With overflow reroute ids and
 * pair_weights are what clmoe_plan() made of them. Call it once. Errors: CLMOE_INVALID_ARGUMENT for
 * a layer without router.renorm.after_drop, or with capacity.keep round.
 */
typedef struct clmoe_renorm_after_drop_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* expert_scale */
    clmoe_buf ids;                /* [T,K] i32 */
    clmoe_buf pair_weights;       /* [T,K] f32, read and written */
    clmoe_buf plan;
} clmoe_renorm_after_drop_args;

/*
 * jitter: x [T,D] -> jittered [T,D], by the random numbers of the state's step: what the router
 * sees, and with jitter_experts the experts too. clmoe_score() takes x itself and jitters it in its
 * scratch. Errors: CLMOE_INVALID_ARGUMENT for a layer with router.noise.jitter 0.
 */
typedef struct clmoe_jitter_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_buf x;        /* [T,D] */
    clmoe_buf state;    /* seed, step, noise_scale */
    clmoe_buf jittered; /* [T,D], of the layer's type */
} clmoe_jitter_args;

/* dispatch: x [T,D] -> xe [S,D]; rows of padding become 0. */
typedef struct clmoe_dispatch_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_buf x;
    clmoe_buf plan;
    clmoe_buf xe;
} clmoe_dispatch_args;

/*
 * Soft MoE instead of score to dispatch: x -> xe, the tokens mixed into the slots. Errors:
 * CLMOE_INVALID_ARGUMENT for another policy; as of clmoe_soft_combine().
 */
typedef struct clmoe_soft_dispatch_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* router */
    clmoe_buf x;                  /* [T,D] */
    clmoe_buf token_mask;         /* optional [T] u8 */
    clmoe_buf scratch;
    clmoe_buf plan;         /* of slots that never change; each token has one pair */
    clmoe_buf pair_weights; /* [T] f32: 1, for clmoe_combine() */
    clmoe_buf mix;          /* [T,S] f32, read and written: a token's shares of the slots */
    clmoe_buf xe;           /* [S,D], read and written */
} clmoe_soft_dispatch_args;

/* Soft MoE between experts and combine: ye -> mixed, which clmoe_combine() takes as its ye. */
typedef struct clmoe_soft_combine_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_buf ye;    /* [S,D]; rows of padding become 0 */
    clmoe_buf mix;   /* [T,S] f32, of clmoe_soft_dispatch() */
    clmoe_buf mixed; /* [T,D], read and written */
} clmoe_soft_combine_args;

/* experts: xe [S,D], or x [T,D] gathered through the plan -> ye [S,D]. */
typedef struct clmoe_experts_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* experts */
    clmoe_buf x;                  /* [T,D], if xe is not given */
    clmoe_buf xe;                 /* [S,D], as dispatch made it; S is `slots` of the layout */
    clmoe_buf pair_weights;       /* [pairs] f32, needed unless weight_at is output */
    clmoe_buf plan;
    clmoe_buf scratch;
    clmoe_buf ye;           /* [S,D]; rows of padding are undefined */
    uint32_t final_weights; /* as in clmoe_combine_args, unless weight_at is output */
    uint32_t reserved;      /* 0 */
    clmoe_buf z;            /* optional, in training: clmoe_z_size() bytes, for the way back */
    clmoe_buf state;        /* optional: dropout of the activations */
} clmoe_experts_args;

/*
 * shared expert: x [T,D] -> shared [T,D], and with desc.shared_gate its gate [T] before the
 * sigmoid; clmoe_combine() multiplies both and adds. Errors: CLMOE_INVALID_ARGUMENT for a layer
 * without a shared expert.
 */
typedef struct clmoe_shared_expert_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* shared, shared_gate */
    clmoe_buf x;                  /* [T,D] */
    clmoe_buf scratch;
    clmoe_buf shared;      /* [T,D] */
    clmoe_buf shared_gate; /* [T] f32: x . weights.shared_gate; with desc.shared_gate alone */
    clmoe_buf z;           /* optional, in training: clmoe_z_size() bytes, for the way back */
    clmoe_buf state;       /* optional: dropout of the activations */
} clmoe_shared_expert_args;

/*
 * Bytes of z of an MLP for a batch of `tokens` and every smaller one: the values of gate and up
 * before the activation, of the layer's type, in the order of the weights' rows; of the experts
 * [min(S, pairs), 2H], by pair where those are fewer, else by slot. Errors: CLMOE_INVALID_ARGUMENT
 * for a layer with training 0 or without this MLP.
 */
CLMOE_API clmoe_status clmoe_z_size(const clmoe_layer *layer, uint32_t tokens, clmoe_mlp mlp,
                                    size_t *bytes);

/* combine: y = residual + output_bias + sum of w * ye[slot] over a token's pairs, k ascending. */
typedef struct clmoe_combine_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* output_bias */
    clmoe_buf x;                  /* [T,D], needed with identity experts */
    clmoe_buf ye;                 /* [S,D]; with Soft MoE `mixed` [T,D] */
    clmoe_buf pair_weights;       /* [pairs] f32 */
    clmoe_buf plan;
    clmoe_buf token_mask;    /* optional [T] u8 */
    clmoe_buf token_offsets; /* optional [T+1] i32, as in plan */
    clmoe_buf shared;        /* [T,D] of clmoe_shared_expert(), needed if there is one */
    clmoe_buf shared_gate;   /* [T] f32 of the same, needed with desc.shared_gate */
    clmoe_buf residual;      /* optional [T,D] */
    clmoe_buf y;             /* [T,D] */
    /*
     * 1, with renorm.after_drop: pair_weights are those of clmoe_renorm_after_drop(), or of another
     * router.
     */
    uint32_t final_weights;
    uint32_t reserved; /* 0 */
} clmoe_combine_args;

/* ---- Backward ------------------------------------------------------------------------------ */

/*
 * The steps of clmoe_backward() one by one, for layers with training 1; fields of the same name are
 * those of the steps above, with the same contents. In this order they are clmoe_backward(), bit
 * for bit; those of an MLP take `parts` and `gradients` as it does. Not with Soft MoE, whose
 * mixing has no steps backward.
 *
 *   clmoe_experts_backward         dy -> dxe, dots; gradients.experts
 *   clmoe_combine_backward         dy, dots -> dpair_weights; gradients.output_bias
 *   clmoe_shared_expert_backward   dy -> shared_dx; gradients.shared and .shared_gate
 *   clmoe_topk_backward            dpair_weights -> dlogits_out; gradients.expert_scale
 *   clmoe_score_backward           dlogits -> router_dx; gradients of the routers
 *   clmoe_dispatch_backward        dxe, shared_dx, router_dx -> dx
 */
typedef struct clmoe_experts_backward_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_backward_parts parts;
    const clmoe_weights *weights; /* experts, not packed */
    clmoe_buf x;                  /* [T,D] */
    clmoe_buf pair_weights;       /* [pairs] f32 */
    clmoe_buf plan;
    clmoe_buf z;     /* of clmoe_experts(); with desc.recompute optional: made again from x */
    clmoe_buf state; /* if clmoe_experts() had it */
    clmoe_buf dy;    /* [T,D] */
    clmoe_buf dye;   /* optional [S,D], with desc.dye */
    clmoe_buf scratch;
    clmoe_buf dxe;  /* [S,D], read and written: the gradient on xe; rows of padding are undefined */
    clmoe_buf dots; /* [S] f32, read and written: a pair's part of clmoe_combine_backward() */
    const clmoe_gradients *gradients; /* optional: experts */
    uint32_t accumulate;
    uint32_t reserved; /* 0 */
} clmoe_experts_backward_args;

typedef struct clmoe_combine_backward_args {
    size_t struct_size;
    uint32_t tokens;
    uint32_t accumulate;
    const clmoe_weights *weights; /* experts.down_bias */
    clmoe_buf x;                  /* [T,D], needed with identity experts or weight_at input */
    clmoe_buf ids;                /* [pairs] i32 */
    clmoe_buf plan;
    clmoe_buf token_mask, token_offsets;
    clmoe_buf dy;                     /* [T,D] */
    clmoe_buf dye;                    /* if clmoe_experts_backward() had it */
    clmoe_buf dxe, dots;              /* of clmoe_experts_backward() */
    clmoe_buf dpair_weights;          /* [pairs] f32 */
    const clmoe_gradients *gradients; /* optional: output_bias */
} clmoe_combine_backward_args;

typedef struct clmoe_shared_expert_backward_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_backward_parts parts;
    const clmoe_weights *weights; /* shared, not packed; shared_gate */
    clmoe_buf x;                  /* [T,D] */
    clmoe_buf token_mask;
    clmoe_buf shared_gate; /* [T] f32 of clmoe_shared_expert() */
    clmoe_buf z;           /* of clmoe_shared_expert(); with desc.recompute optional */
    clmoe_buf state;       /* if clmoe_shared_expert() had it */
    clmoe_buf dy;          /* [T,D] */
    clmoe_buf scratch;
    clmoe_buf shared_dx;              /* [T,D], read and written */
    const clmoe_gradients *gradients; /* optional: shared, shared_gate */
    uint32_t accumulate;
    uint32_t reserved; /* 0 */
} clmoe_shared_expert_backward_args;

/* dnoise_out and dgroup_logits_out: with learned noise and a state, and with two levels. */
typedef struct clmoe_topk_backward_args {
    size_t struct_size;
    uint32_t tokens;
    uint32_t accumulate;
    const clmoe_weights *weights; /* expert_scale, noise_router, group_router */
    clmoe_buf x;                  /* [T,D], for learned noise and two levels */
    clmoe_buf logits;             /* [T,R] f32, of clmoe_score(), or the external ones */
    clmoe_buf ids;                /* [pairs] i32, as clmoe_plan() left them */
    clmoe_buf live;               /* [T] i32; not read with expert choice and keep rule round */
    clmoe_buf plan;
    clmoe_buf token_mask, token_offsets;
    clmoe_buf state;                          /* if clmoe_score() had it */
    clmoe_buf dpair_weights;                  /* [pairs] f32 */
    clmoe_buf dlogits, dnoise, dgroup_logits; /* optional, of losses: added */
    clmoe_buf scratch;
    clmoe_buf dlogits_out;                   /* [T,R] f32, read and written; may be dlogits */
    clmoe_buf dnoise_out, dgroup_logits_out; /* [T,R], [T,groups.count] f32, read and written */
    const clmoe_gradients *gradients;        /* optional: expert_scale */
} clmoe_topk_backward_args;

typedef struct clmoe_score_backward_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_backward_parts parts;
    const clmoe_weights *weights; /* router, noise_router, group_router */
    clmoe_buf x;                  /* [T,D] */
    clmoe_buf token_mask;
    clmoe_buf state;                          /* if clmoe_score() had it */
    clmoe_buf dlogits, dnoise, dgroup_logits; /* of clmoe_topk_backward() */
    clmoe_buf scratch;
    clmoe_buf router_dx;              /* [T,D], read and written */
    const clmoe_gradients *gradients; /* optional: router, router_bias, and the other routers */
    uint32_t accumulate;
    /* 1: the logits were external: nothing of dlogits reaches router_dx and gradients.router. */
    uint32_t logits_given;
} clmoe_score_backward_args;

typedef struct clmoe_dispatch_backward_args {
    size_t struct_size;
    uint32_t tokens;
    uint32_t reserved;      /* 0 */
    clmoe_buf pair_weights; /* [pairs] f32, needed with identity experts or weight_at input */
    clmoe_buf plan;
    clmoe_buf token_mask, token_offsets;
    clmoe_buf state;                /* with noise.jitter_experts: the one of clmoe_jitter() */
    clmoe_buf dy;                   /* [T,D], needed with identity experts */
    clmoe_buf dxe;                  /* [S,D] of clmoe_experts_backward() */
    clmoe_buf shared_dx, router_dx; /* [T,D], optional */
    clmoe_buf dx;                   /* [T,D], read and written */
} clmoe_dispatch_backward_args;

CLMOE_API clmoe_status clmoe_score(clmoe_layer *layer, cl_command_queue queue,
                                   const clmoe_score_args *args, cl_uint num_wait,
                                   const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_topk(clmoe_layer *layer, cl_command_queue queue,
                                  const clmoe_topk_args *args, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_plan(clmoe_layer *layer, cl_command_queue queue,
                                  const clmoe_plan_args *args, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_renorm_after_drop(clmoe_layer *layer, cl_command_queue queue,
                                               const clmoe_renorm_after_drop_args *args,
                                               cl_uint num_wait, const cl_event *wait,
                                               cl_event *event);
CLMOE_API clmoe_status clmoe_jitter(clmoe_layer *layer, cl_command_queue queue,
                                    const clmoe_jitter_args *args, cl_uint num_wait,
                                    const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_dispatch(clmoe_layer *layer, cl_command_queue queue,
                                      const clmoe_dispatch_args *args, cl_uint num_wait,
                                      const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_soft_dispatch(clmoe_layer *layer, cl_command_queue queue,
                                           const clmoe_soft_dispatch_args *args, cl_uint num_wait,
                                           const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_soft_combine(clmoe_layer *layer, cl_command_queue queue,
                                          const clmoe_soft_combine_args *args, cl_uint num_wait,
                                          const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_experts(clmoe_layer *layer, cl_command_queue queue,
                                     const clmoe_experts_args *args, cl_uint num_wait,
                                     const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_shared_expert(clmoe_layer *layer, cl_command_queue queue,
                                           const clmoe_shared_expert_args *args, cl_uint num_wait,
                                           const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_combine(clmoe_layer *layer, cl_command_queue queue,
                                     const clmoe_combine_args *args, cl_uint num_wait,
                                     const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_experts_backward(clmoe_layer *layer, cl_command_queue queue,
                                              const clmoe_experts_backward_args *args,
                                              cl_uint num_wait, const cl_event *wait,
                                              cl_event *event);
CLMOE_API clmoe_status clmoe_combine_backward(clmoe_layer *layer, cl_command_queue queue,
                                              const clmoe_combine_backward_args *args,
                                              cl_uint num_wait, const cl_event *wait,
                                              cl_event *event);
CLMOE_API clmoe_status clmoe_shared_expert_backward(clmoe_layer *layer, cl_command_queue queue,
                                                    const clmoe_shared_expert_backward_args *args,
                                                    cl_uint num_wait, const cl_event *wait,
                                                    cl_event *event);
CLMOE_API clmoe_status clmoe_topk_backward(clmoe_layer *layer, cl_command_queue queue,
                                           const clmoe_topk_backward_args *args, cl_uint num_wait,
                                           const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_score_backward(clmoe_layer *layer, cl_command_queue queue,
                                            const clmoe_score_backward_args *args, cl_uint num_wait,
                                            const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_dispatch_backward(clmoe_layer *layer, cl_command_queue queue,
                                               const clmoe_dispatch_backward_args *args,
                                               cl_uint num_wait, const cl_event *wait,
                                               cl_event *event);

#ifdef __cplusplus
}
#endif

#endif
