/* scores -> ids, weights. */
#include "steps.h"

clmoe_buf select_bias_of(const clmoe_layer *layer, const clmoe_topk_args *args) {
    clmoe_buf none = {0};
    if (!layer->desc.router.select_bias)
        return none;
    if (args->weights && args->weights->select_bias.mem)
        return args->weights->select_bias;
    return (clmoe_buf){args->state.mem, args->state.offset + sizeof(clmoe_state)};
}

clmoe_status step_token_choice(const clmoe_layer *layer, launch *chain,
                               const clmoe_topk_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel kernel = layer->kernels[KERNEL_TOPK];
    clmoe_buf none = {0};
    uint32_t each = layer->topk_tokens;
    TRY(KERNEL_SET(kernel, ARG_F32(args->scores), ARG_F32(select_bias_of(layer, args)),
                   ARG_F32(router->expert_scale ? args->weights->expert_scale : none),
                   ARG_F32(args->ids), ARG_F32(args->weights_out), ARG_F32(args->live),
                   arg_u32(args->tokens), arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(args->tokens, each), layer->group));
done:
    return status;
}

static clmoe_status choose(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args) {
    const clmoe_router_desc *router = &layer->desc.router;
    switch (router->policy) {
    case CLMOE_POLICY_EXPERT_CHOICE:
        return step_expert_choice(layer, chain, args);
    case CLMOE_POLICY_SINKHORN:
        return step_sinkhorn(layer, chain, args);
    case CLMOE_POLICY_SOFT:
        return step_soft(layer, chain, args);
    case CLMOE_POLICY_TOKEN_CHOICE:
    case CLMOE_POLICY_SOFT_MOE:
        break;
    }
    return router->two_level ? step_two_level_topk(layer, chain, args)
                             : step_token_choice(layer, chain, args);
}

clmoe_status step_topk(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(choose(layer, chain, args));
    if (layer_rebalances(layer))
        TRY(step_rebalance(layer, chain, args));
done:
    return status;
}
