/* The plan and the sums of the batch -> what the batch did to the load. */
#include "balance/state.clh"
#include "steps.h"

clmoe_status clmoe_stats_size(const clmoe_layer *layer, size_t *bytes) {
    if (!layer || !bytes)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", layer ? "bytes" : "layer");
    *bytes = layer_stats_bytes(layer);
    return CLMOE_SUCCESS;
}

clmoe_status stats_create(clmoe_layer *layer) {
    return balance_kernel(layer, KERNEL_STATS, "balance/stats", "stats_finish");
}

uint32_t stats_asks(const batch *b) {
    const clmoe_layer *layer = b->layer;
    uint32_t asked = layer->desc.balance.device_groups ? DEVICE_BIT : 0;
    if (b->logits.mem)
        asked |= SUM_BIT(SUM_NORMALISED);
    if (!b->routed)
        asked |= INVALID_BIT;
    if (b->pair_weights.mem)
        asked |= SUM_BIT(SUM_WEIGHTS);
    if (layer_has_sequences(layer))
        asked |= COUNT_BIT(COUNT_ASSIGNED);
    return asked;
}

clmoe_status stats_finish(const batch *b, launch *chain, const sums *in) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_STATS];
    clmoe_buf none = {0};
    bool reroutes = layer->desc.capacity.overflow == CLMOE_OVERFLOW_REROUTE;
    clmoe_buf moved_in = reroutes ? PLAN_ARRAY(b, rerouted_in) : none;
    clmoe_buf moved_out = reroutes ? PLAN_ARRAY(b, rerouted_out) : none;
    TRY(KERNEL_SET(kernel, ARG_F32(PLAN_ARRAY(b, load)), ARG_F32(PLAN_ARRAY(b, kept)),
                   ARG_AS(rerouted_in, ARG_F32(moved_in)), ARG_AS(rerouted_out, ARG_F32(moved_out)),
                   ARG_F32(region(b, REGION_SUMS)), ARG_F32(b->state), ARG_F32(b->load_target),
                   ARG_F32(b->stats), ARG_STRUCT(in->shape), ARG_UINT(b->ws.plan.capacity),
                   ARG_UINT(layer->desc.balance.dead_window)));
    TRY(launch_1d(chain, kernel, 1, layer->balance_group));
done:
    return status;
}
