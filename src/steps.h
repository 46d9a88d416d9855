/*
 * The host side of one step each: sets arguments and launches. Nothing here checks its input; the
 * public calls (calls.c) and forward.c do.
 */
#ifndef CLMOE_STEPS_H
#define CLMOE_STEPS_H

#include "layer.h"
#include "workspace.h"

clmoe_status step_score(const clmoe_layer *layer, launch *chain, const clmoe_score_args *args);
clmoe_status step_topk(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args);
/* What is added for the choice: the caller's bias, or the one the controllers keep in the state. */
clmoe_buf select_bias_of(const clmoe_layer *layer, const clmoe_topk_args *args);

/* What step_topk() does by the layer's policy. */
clmoe_status step_token_choice(const clmoe_layer *layer, launch *chain,
                               const clmoe_topk_args *args);
clmoe_status step_sinkhorn(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args);
clmoe_status step_soft(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args);
clmoe_status step_expert_choice(const clmoe_layer *layer, launch *chain,
                                const clmoe_topk_args *args);
/* Jitters *x, where the layer has jitter and there is a state. */
clmoe_status router_input(const clmoe_layer *layer, launch *chain, uint32_t tokens, clmoe_buf *x,
                          clmoe_buf state, clmoe_buf scratch);
/* Noisy logits [T,R] -> scores [T,R], as topk chooses by them; of two levels l. */
clmoe_status step_score_rows(const clmoe_layer *layer, launch *chain, uint32_t tokens,
                             clmoe_buf noisy, clmoe_buf state, clmoe_buf scores);
/* x [T,D] -> x Wg^T [T,num_groups] in REGION_GROUP_LOGITS. */
clmoe_status step_group_logits(const clmoe_layer *layer, launch *chain, uint32_t tokens,
                               const clmoe_weights *weights, clmoe_buf x, clmoe_buf state,
                               clmoe_buf scratch);
/* scores, l at first, become those of two levels; the group logits stay in their region. */
clmoe_status step_two_level_scores(const clmoe_layer *layer, launch *chain,
                                   const clmoe_score_args *args);
clmoe_status step_two_level_topk(const clmoe_layer *layer, launch *chain,
                                 const clmoe_topk_args *args);

/* Buffers of a Soft MoE batch: N = E p columns, S slots. */
typedef struct soft_moe_args {
    uint32_t tokens;
    const clmoe_weights *weights;
    clmoe_buf x;          /* [T,D] */
    clmoe_buf token_mask; /* optional [T] u8 */
    clmoe_buf clean;      /* [T,D]: x, 0 where a token takes no part */
    clmoe_buf plan;
    clmoe_buf ones;              /* [T] f32 */
    clmoe_buf token_norms;       /* [T] f32 */
    clmoe_buf slot_norms;        /* [N] f32 */
    clmoe_buf logits;            /* [T,N] f32 */
    clmoe_buf tops;              /* [T,2] f32 */
    clmoe_buf partials;          /* [blocks,N,2] f32 */
    clmoe_buf columns;           /* [N,2] f32 */
    clmoe_buf dispatch, combine; /* [S,T] and [T,S] f32 */
    clmoe_buf xe, ye, mixed;     /* [S,D], [S,D], [T,D] */
} soft_moe_args;

/* x -> xe, combine and a plan of constant buckets. */
clmoe_status step_soft_moe_dispatch(const clmoe_layer *layer, launch *chain,
                                    const soft_moe_args *args);
/* ye -> mixed: what step_combine() takes as one pair per token, of weight 1. */
clmoe_status step_soft_moe_combine(const clmoe_layer *layer, launch *chain,
                                   const soft_moe_args *args);

/* For layers that sort (layer_sorts()): the order of plan.cl's walk, in a region of scratch. */
clmoe_status step_sort(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args,
                       clmoe_buf *order);
clmoe_status step_plan(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args);
clmoe_status step_dispatch(const clmoe_layer *layer, launch *chain,
                           const clmoe_dispatch_args *args);
clmoe_status step_experts(const clmoe_layer *layer, launch *chain, const clmoe_experts_args *args);
/* ye [slots,D] in place; rows of no pair (row_of [slots]) are left alone. */
clmoe_status step_normalize(const clmoe_layer *layer, launch *chain, clmoe_buf row_of,
                            uint32_t slots, clmoe_buf ye);
clmoe_status step_combine(const clmoe_layer *layer, launch *chain, const clmoe_combine_args *args);

/* Weight rebalancing: the end of step_topk(), on its weights. */
clmoe_status step_rebalance(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args);

/* Overflow reroute: the end of step_plan(). The choice is kept; where there are scores, moved. */
clmoe_status step_reroute_begin(const clmoe_layer *layer, launch *chain,
                                const clmoe_plan_args *args, const clmoe_plan_layout *plan);
clmoe_status step_reroute(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args);

/* weights [T,K] in place, after the plan: what renorm_after_drop asks for. */
clmoe_status step_plan_renorm(const clmoe_layer *layer, launch *chain, uint32_t tokens,
                              const clmoe_weights *weights, clmoe_buf ids, clmoe_buf plan,
                              clmoe_buf pair_weights);

/* Buffers of the shared expert's MLP. */
typedef struct shared_args {
    uint32_t tokens;
    const clmoe_weights *weights;
    clmoe_buf x;      /* [T,D] */
    clmoe_buf hidden; /* [T,Hs] */
    clmoe_buf engine; /* the engine's scratch */
    clmoe_buf y;      /* [T,D] */
    clmoe_buf gate;   /* [T], if the layer has a shared gate */
} shared_args;

clmoe_status step_shared(const clmoe_layer *layer, launch *chain, const shared_args *args);

/*
 * Noise and dropout of the logits. Everything random follows from the state, so that the same clean
 * logits and the same state give the same noisy logits again: in score, stats and loss.
 */
typedef struct noise_args {
    uint32_t tokens;
    const clmoe_weights *weights; /* noise_router, if the noise is learned; else not read */
    clmoe_buf x;                  /* [T,D] as the application gave it, likewise */
    bool x_is_jittered;           /* x is what step_jitter() made of it */
    clmoe_buf logits;             /* [T,R] f32, clean */
    clmoe_buf state;
    clmoe_buf scratch; /* of the layer */
} noise_args;

/*
 * For noisy layers (layer_is_noisy()), with a state: leaves the noisy logits [T,R] in REGION_NOISY,
 * -infinity where dropout masked one, and with learned noise x Wn^T [T,R] in REGION_NOISE_RAW.
 * args->logits may not be one of the two.
 */
clmoe_status step_noise(const clmoe_layer *layer, launch *chain, const noise_args *args);

/* x [T,D] -> jittered x [T,D] in REGION_JITTERED, for layers with jitter, with a state. */
clmoe_status step_jitter(const clmoe_layer *layer, launch *chain, uint32_t tokens, clmoe_buf x,
                         clmoe_buf state, clmoe_buf scratch);

/*
 * The balance pass: what the tokens, the sequences or the batch add up to, in REGION_SUMS.
 * Statistics and losses of one batch share one pass.
 */
typedef struct sums_args {
    uint32_t tokens;
    const clmoe_weights *weights; /* noise_router, group_router */
    clmoe_buf x;                  /* [T,D], with learned noise and a state, or two levels */
    bool routed;                  /* by this call: ids, noise and group logits are its own */
    clmoe_buf logits;             /* [T,R] f32, clean; without them nothing is known of p */
    clmoe_buf scores;             /* [T,R] f32 of a call that routed */
    clmoe_buf ids, pair_weights, plan, live, token_mask, token_offsets, state, scratch;
    uint32_t asked; /* SUM_BIT, COUNT_BIT, DEVICE_BIT, INVALID_BIT of balance.clh */
    /* Written by the step. */
    sums_shape shape;
    clmoe_buf noisy, noise_raw;
    clmoe_buf p_logits; /* [T,R] f32: p is made of them; noisy, or with two levels the joint ones */
} sums_args;

/* The softcap and temperature from p_logits to l': those of two levels are l' already. */
router_switches p_switches(const clmoe_layer *layer);
static inline clmoe_buf p_state(const clmoe_layer *layer, clmoe_buf state) {
    return layer->desc.router.two_level ? (clmoe_buf){0} : state;
}

clmoe_status step_sums(const clmoe_layer *layer, launch *chain, sums_args *args);

/* Two levels: the noisy logits and the group logits -> joint, and a gradient on it of 0. */
clmoe_status step_joint(const clmoe_layer *layer, launch *chain, const sums_args *args,
                        clmoe_buf joint);
/* The gradient in REGION_JOINT_GRADIENT is added to dlogits, dnoise and dgroup_logits. */
clmoe_status step_joint_gradient(const clmoe_layer *layer, launch *chain,
                                 const clmoe_loss_args *args, const sums_args *sums,
                                 clmoe_buf dnoise);

/* What statistics and losses ask of the sums, and do with them. */
uint32_t stats_asks(const clmoe_layer *layer, const clmoe_stats_args *args, bool routed);
clmoe_status stats_finish(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *args,
                          const sums_shape *shape);
uint32_t loss_asks(const clmoe_layer *layer, const clmoe_loss_args *args, bool routed);
clmoe_status loss_finish(const clmoe_layer *layer, launch *chain, const clmoe_loss_args *args,
                         const sums_args *sums);

#endif
