/* Logits of a few tokens -> scores, ids, weights and the plan, in one launch. */
#include "dispatch/plan.clh"
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

/* Whether each token has K pairs that are chosen by their scores and find a place alone. */
static bool is_plain(const clmoe_layer *layer) {
    return layer->policy == &token_choice_policy && !layer_rebalances(layer) &&
           !layer_renorms_late(layer) && !layer_has_sequences(layer) && !layer_sorts(layer) &&
           !layer_reroutes(layer);
}

/* Local memory beside the choice's own. */
static size_t few_bytes(const clmoe_layer *layer) {
    const size_t places = (size_t)layer->topk_tokens * power_of_two(layer->desc.top_k, FEW_COLUMNS);
    return 4 * (FEW_COLUMNS + places + 2 * (size_t)layer->group);
}

clmoe_status few_create(clmoe_layer *layer) {
    char options[192], topk[128];
    const size_t most = layer->context->info.local_mem_bytes;
    if (layer->group == 1 || layer->columns > FEW_COLUMNS || !is_plain(layer))
        return CLMOE_SUCCESS;
    if (topk_options(layer, topk, sizeof topk) + few_bytes(layer) > most)
        return CLMOE_SUCCESS;
    snprintf(options, sizeof options, "%s -DSCORE_LANES=%u -DKEEP_RULE=%d -DPAIR_GRID=0", topk,
             layer->score_group, (int)layer_keep(layer));
    return program_kernel(layer->context, "routing/few", options, "route_few",
                          &layer->kernels[KERNEL_FEW]);
}

bool few_takes(const batch *b) {
    const clmoe_layer *layer = b->layer;
    return layer->kernels[KERNEL_FEW] && b->routed && b->tokens > 0 &&
           b->tokens <= layer->topk_tokens && b->ws.plan.slots <= FEW_SLOTS;
}

clmoe_status step_few(const batch *b, launch *chain, clmoe_buf noisy) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_FEW];
    TRY(KERNEL_SET(kernel, ARG_AS(logits, ARG_F32(noisy)), ARG_F32(b->state),
                   ARG_F32(select_bias_of(b)), ARG_F32(expert_scale_of(b)), ARG_U8(b->token_mask),
                   ARG_F32(b->scores), ARG_F32(b->ids), ARG_F32(b->pair_weights), ARG_F32(b->live),
                   PLAN_ARRAYS(b), ARG_UINT(b->tokens), PLAN_SIZES(b), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, 1, layer->group));
done:
    return status;
}
