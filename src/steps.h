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
clmoe_status step_plan(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args);
clmoe_status step_dispatch(const clmoe_layer *layer, launch *chain,
                           const clmoe_dispatch_args *args);
clmoe_status step_experts(const clmoe_layer *layer, launch *chain, const clmoe_experts_args *args);
clmoe_status step_combine(const clmoe_layer *layer, launch *chain, const clmoe_combine_args *args);
clmoe_status step_stats(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *args);

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
    const clmoe_weights *weights; /* noise_router */
    clmoe_buf x;                  /* [T,D], with learned noise and a state */
    bool routed;                  /* by this call: the ids and the noise's regions are its own */
    clmoe_buf logits;             /* [T,R] f32, clean; without them nothing is known of p */
    clmoe_buf ids, pair_weights, live, token_mask, token_offsets, state, scratch;
    uint32_t asked; /* SUM_BIT, COUNT_BIT, DEVICE_BIT of balance.clh */
    /* Written by the step. */
    sums_shape shape;
    clmoe_buf noisy, noise_raw;
} sums_args;

clmoe_status step_sums(const clmoe_layer *layer, launch *chain, sums_args *args);

/*
 * Statistics and losses of a batch, either of which may be NULL. `routed`: the ids were chosen from
 * the logits by this call, and the noise of the batch is already in its regions.
 */
clmoe_status step_balance(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *stats,
                          const clmoe_loss_args *loss, bool routed);
clmoe_status step_loss(const clmoe_layer *layer, launch *chain, const clmoe_loss_args *args);

/* What each of the two asks of the sums, and does with them. */
uint32_t stats_asks(const clmoe_layer *layer, const clmoe_stats_args *args);
clmoe_status stats_finish(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *args,
                          const sums_shape *shape);
uint32_t loss_asks(const clmoe_layer *layer, const clmoe_loss_args *args, bool routed);
clmoe_status loss_finish(const clmoe_layer *layer, launch *chain, const clmoe_loss_args *args,
                         const sums_args *sums);

#endif
