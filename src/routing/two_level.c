/* Groups first, experts within them then: logits -> scores -> ids, weights. */
#include "steps.h"

enum { KERNEL_SCORES = KERNEL_POLICY, KERNEL_CHOICE, KERNEL_BACKWARD, KERNEL_WEIGHTS };

static clmoe_status create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    static const kernel_entry kernels[] = {
        {KERNEL_SCORES, "two_level_scores"},
        {KERNEL_CHOICE, "two_level_topk"},
    };
    static const kernel_entry backward[] = {
        {KERNEL_BACKWARD, "two_level_backward"},
        {KERNEL_WEIGHTS, "two_level_weights"},
    };
    TRY(GROUP_KERNELS(layer, "routing/two_level", kernels));
    if (layer->desc.training)
        TRY(GROUP_KERNELS(layer, "routing/two_level", backward));
done:
    return status;
}

clmoe_status step_group_logits(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    dense_map map = {.rows = b->tokens,
                     .n = layer->desc.router.groups.count,
                     .k = layer->desc.dim,
                     .weight = b->weights->group_router,
                     .out = region(b, REGION_GROUP_LOGITS)};
    TRY(router_input(b, chain, &map.a));
    TRY(gemm_dense(&layer->dense, chain, &map));
done:
    return status;
}

clmoe_status step_two_level_scores(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_SCORES];
    uint32_t group = layer->group, groups = layer->desc.router.groups.count;
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    clmoe_buf logits = region(b, REGION_GROUP_LOGITS);
    TRY(step_group_logits(b, chain));
    TRY(KERNEL_SET(kernel, ARG_AS(group_logits, ARG_F32(logits)), ARG_F32(b->scores),
                   ARG_UINT(b->tokens), ARG_UINT(groups), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}

static clmoe_status choose(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel kernel = layer->kernels[KERNEL_CHOICE];
    uint32_t group = layer->group;
    TRY(KERNEL_SET(kernel, ARG_F32(b->scores), ARG_F32(select_bias_of(b)),
                   ARG_F32(expert_scale_of(b)), ARG_F32(b->ids), ARG_F32(b->pair_weights),
                   ARG_F32(b->live), ARG_UINT(b->tokens),
                   ARG_AS(groups, ARG_UINT(router->groups.count)), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}

static clmoe_status backward(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_BACKWARD];
    const uint32_t group = layer->group, groups = layer->desc.router.groups.count;
    const chosen_logits of = chosen_logits_of(b);
    TRY(KERNEL_SET(kernel, ARG_AS(logits, ARG_F32(of.noisy)), ARG_F32(of.clean),
                   ARG_F32(of.noise_raw),
                   ARG_AS(group_logits, ARG_F32(region(b, REGION_GROUP_LOGITS))), ARG_F32(b->state),
                   ARG_F32(b->ids), ARG_F32(b->live), ARG_U8(b->token_mask),
                   ARG_F32(PLAN_ARRAY(b, slot_of)), ARG_F32(expert_scale_of(b)),
                   ARG_F32(b->dpair_weights), ARG_F32(b->dlogits), ARG_F32(of.dnoise),
                   ARG_F32(b->dgroup_logits), ARG_F32(b->dlogits_out), ARG_F32(of.dnoise_out),
                   ARG_F32(b->dgroup_out), ARG_AS(dscale, ARG_F32(region(b, REGION_DSCALE))),
                   ARG_AS(raw, ARG_F32(region(b, REGION_RAW_WEIGHTS))),
                   ARG_AS(d, ARG_F32(region(b, REGION_DJOINT))), ARG_UINT(b->tokens),
                   ARG_UINT(groups), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}

static clmoe_status weights(const batch *b, launch *chain, clmoe_buf to) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_WEIGHTS];
    const uint32_t group = layer->group, groups = layer->desc.router.groups.count;
    TRY(KERNEL_SET(kernel, ARG_AS(logits, ARG_F32(chosen_logits_of(b).noisy)),
                   ARG_AS(group_logits, ARG_F32(region(b, REGION_GROUP_LOGITS))), ARG_F32(b->state),
                   ARG_F32(b->ids), ARG_F32(b->live), ARG_U8(b->token_mask),
                   ARG_F32(expert_scale_of(b)), ARG_AS(chosen, ARG_F32(to)), ARG_UINT(b->tokens),
                   ARG_UINT(groups), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}

const routing_policy two_level_policy = {
    .create = create, .step = choose, .backward = backward, .weights = weights, .by_logit = true};
