/* Expert outputs v -> v / |v|, in place: geometric MoE. */
#include "steps.h"

clmoe_status normalize_create(clmoe_layer *layer) {
    if (!layer->desc.normalize_experts)
        return CLMOE_SUCCESS;
    return layer_kernel(layer, KERNEL_NORMALIZE, "experts/normalize", "normalize_rows");
}

clmoe_status step_normalize(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_NORMALIZE];
    TRY(KERNEL_SET(kernel, ARG_F32(PLAN_ARRAY(b, pair_of)), ARG_TYPE(b->ye, layer->desc.type),
                   ARG_UINT(layer->desc.dim)));
    TRY(launch_1d(chain, kernel, b->ws.plan.slots, layer->group));
done:
    return status;
}
