/* The plan -> what the batch did to the load. */
#include "steps.h"

size_t clmoe_stats_size(const clmoe_layer *layer) {
    return layer ? sizeof(clmoe_stats) + sizeof(cl_uint) * (8 * (size_t)layer->columns +
                                                            layer->desc.balance.device_groups)
                 : 0;
}

clmoe_status step_stats(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_STATS];
    workspace_layout ws;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    TRY(KERNEL_SET(kernel, ARG_F32(plan_array(args->plan, ws.plan.load)),
                   ARG_F32(plan_array(args->plan, ws.plan.kept)), ARG_F32(args->live),
                   ARG_U8(args->token_mask), ARG_F32(args->stats), arg_u32(args->tokens),
                   arg_u32(layer->desc.num_experts), arg_u32(layer->columns),
                   arg_u32(layer->desc.top_k)));
    TRY(launch_1d(chain, kernel, 1, layer->context->group));
done:
    return status;
}
