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

/* Weight rebalancing: the end of step_topk(), on its weights. */
clmoe_status step_rebalance(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args);

/* Overflow reroute: the end of step_plan(), where there are scores. */
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

#endif
