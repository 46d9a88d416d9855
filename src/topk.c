/* scores -> ids, weights. */
#include "steps.h"

clmoe_status step_topk(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel kernel = layer->kernels[KERNEL_TOPK];
    clmoe_buf none = {0};
    uint32_t each = layer->topk_tokens;
    TRY(KERNEL_SET(kernel, ARG_F32(args->scores),
                   ARG_F32(router->select_bias ? args->weights->select_bias : none),
                   ARG_F32(router->expert_scale ? args->weights->expert_scale : none),
                   ARG_F32(args->ids), ARG_F32(args->weights_out), ARG_F32(args->live),
                   arg_u32(args->tokens), arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, args->tokens / each + (args->tokens % each != 0),
                  layer->context->group));
    if (layer_rebalances(layer))
        TRY(step_rebalance(layer, chain, args));
done:
    return status;
}
