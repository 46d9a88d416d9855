/* From combine weights back to the logits: the backward pass of choice and score. */
#include "steps.h"

#include <stdio.h>

clmoe_status weights_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_WEIGHTS_BACKWARD, "weights_backward"},
        {KERNEL_EXPERT_SCALE_BACKWARD, "expert_scale_backward"},
        {KERNEL_CHOSEN_WEIGHTS, "chosen_weights"},
    };
    char options[32];
    snprintf(options, sizeof options, "-DGROUP=%u", layer->score_group);
    return layer_kernels(layer, "routing/weights", options, kernels,
                         sizeof kernels / sizeof kernels[0]);
}

chosen_logits chosen_logits_of(const batch *b) {
    chosen_logits of = {.noisy = b->logits, .clean = b->logits};
    if (!b->state.mem || !layer_is_noisy(b->layer))
        return of;
    of.noisy = region(b, REGION_NOISY);
    of.noise_raw = region(b, REGION_NOISE_RAW);
    if (of.noise_raw.mem) {
        of.dnoise = b->dnoise;
        of.dnoise_out = b->dnoise_out;
    }
    return of;
}

static clmoe_status weights_backward(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_WEIGHTS_BACKWARD];
    const chosen_logits of = chosen_logits_of(b);
    TRY(KERNEL_SET(
        kernel, ARG_AS(logits, ARG_F32(of.noisy)), ARG_F32(of.clean), ARG_F32(of.noise_raw),
        ARG_F32(b->state), ARG_F32(b->ids), ARG_F32(b->live), ARG_U8(b->token_mask),
        ARG_F32(b->token_offsets), ARG_F32(PLAN_ARRAY(b, slot_of)), ARG_F32(expert_scale_of(b)),
        ARG_F32(b->dpair_weights), ARG_F32(b->dlogits), ARG_F32(of.dnoise), ARG_F32(b->dlogits_out),
        ARG_F32(of.dnoise_out), ARG_AS(dscale, ARG_F32(region(b, REGION_DSCALE))),
        ARG_AS(raw, ARG_F32(region(b, REGION_RAW_WEIGHTS))), ARG_UINT(b->ws.plan.pairs),
        ARG_AS(most, ARG_UINT(layer_token_pairs(layer))), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, b->tokens, layer->score_group));
done:
    return status;
}

static clmoe_status weights_again(const batch *b, launch *chain, clmoe_buf to) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_CHOSEN_WEIGHTS];
    TRY(KERNEL_SET(kernel, ARG_AS(logits, ARG_F32(chosen_logits_of(b).noisy)), ARG_F32(b->state),
                   ARG_F32(b->ids), ARG_F32(b->live), ARG_U8(b->token_mask),
                   ARG_F32(b->token_offsets), ARG_F32(expert_scale_of(b)),
                   ARG_AS(chosen, ARG_F32(to)), ARG_UINT(b->ws.plan.pairs),
                   ARG_AS(most, ARG_UINT(layer_token_pairs(layer))), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, b->tokens, layer->score_group));
done:
    return status;
}

clmoe_status step_chosen_weights(const batch *b, launch *chain, clmoe_buf to) {
    const routing_policy *policy = b->layer->policy;
    return policy->weights ? policy->weights(b, chain, to) : weights_again(b, chain, to);
}

clmoe_status step_topk_backward(batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const routing_policy *policy = b->layer->policy;
    if (layer_rebalances(b->layer))
        TRY(step_rebalance_backward(b, chain));
    TRY(policy->backward ? policy->backward(b, chain) : weights_backward(b, chain));
done:
    return status;
}

clmoe_status step_expert_scale_gradient(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_EXPERT_SCALE_BACKWARD];
    if (!b->gradients.expert_scale.mem)
        return CLMOE_SUCCESS;
    TRY(KERNEL_SET(kernel, ARG_F32(b->ids), ARG_AS(dscale, ARG_F32(region(b, REGION_DSCALE))),
                   ARG_AS(scale_gradient, ARG_F32(b->gradients.expert_scale)),
                   ARG_AS(pairs, ARG_UINT(b->routed ? b->ws.plan.pairs : 0)),
                   ARG_UINT(b->accumulate)));
    TRY(launch_1d(chain, kernel, layer->columns, layer->score_group));
done:
    return status;
}
