/* The plan and the sums of the batch -> what the batch did to the load. */
#include "steps.h"

size_t clmoe_stats_size(const clmoe_layer *layer) {
    return layer ? sizeof(clmoe_stats) + sizeof(cl_uint) * (8 * (size_t)layer->columns +
                                                            layer->desc.balance.device_groups)
                 : 0;
}

clmoe_status stats_create(clmoe_layer *layer) {
    return balance_kernel(layer, KERNEL_STATS, "balance/stats", "stats_finish");
}

uint32_t stats_asks(const clmoe_layer *layer, const clmoe_stats_args *args, bool routed) {
    uint32_t asked = layer->desc.balance.device_groups ? DEVICE_BIT : 0;
    if (args->logits.mem)
        asked |= SUM_BIT(SUM_NORMALISED);
    if (!routed)
        asked |= INVALID_BIT;
    if (args->pair_weights.mem)
        asked |= SUM_BIT(SUM_WEIGHTS);
    if (layer_has_sequences(layer))
        asked |= COUNT_BIT(COUNT_ASSIGNED);
    return asked;
}

clmoe_status stats_finish(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *args,
                          const sums_shape *shape) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_STATS];
    workspace_layout ws;
    clmoe_buf none = {0};
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    bool reroutes = layer->desc.capacity.overflow == CLMOE_OVERFLOW_REROUTE;
    clmoe_buf in = plan_array(args->plan, ws.plan.rerouted_in);
    clmoe_buf out = plan_array(args->plan, ws.plan.rerouted_out);
    TRY(KERNEL_SET(kernel, ARG_F32(plan_array(args->plan, ws.plan.load)),
                   ARG_F32(plan_array(args->plan, ws.plan.kept)), ARG_F32(reroutes ? in : none),
                   ARG_F32(reroutes ? out : none),
                   ARG_F32(workspace_region(&ws, REGION_SUMS, none, args->scratch)),
                   ARG_F32(args->state), ARG_F32(args->load_target), ARG_F32(args->stats),
                   arg_struct(shape, sizeof *shape), arg_u32(ws.plan.capacity),
                   arg_u32(layer->desc.balance.dead_window)));
    TRY(launch_1d(chain, kernel, 1, layer->balance_group));
done:
    return status;
}
