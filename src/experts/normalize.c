/* Expert outputs v -> v / |v|, in place: geometric MoE; and the gradient on what down gave. */
#include "steps.h"

clmoe_status normalize_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    if (layer->desc.normalize_experts)
        TRY(layer_kernel(layer, KERNEL_NORMALIZE, "experts/normalize", "normalize_rows"));
    if (layer_has_output_rows(layer))
        TRY(layer_kernel(layer, KERNEL_OUTPUT_BACKWARD, "experts/normalize", "output_backward"));
done:
    return status;
}

clmoe_status step_normalize(const batch *b, launch *chain, clmoe_buf ye) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_NORMALIZE];
    TRY(KERNEL_SET(kernel, ARG_F32(PLAN_ARRAY(b, pair_of)), ARG_TYPE(ye, layer->desc.type),
                   ARG_UINT(layer->desc.dim)));
    TRY(launch_1d(chain, kernel, b->ws.plan.slots, layer->group));
done:
    return status;
}

clmoe_status step_output_backward(const batch *b, launch *chain, clmoe_buf ye, clmoe_buf rows) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_type type = layer->desc.type;
    const clmoe_buf none = {0};
    const bool soft_moe = layer_is_soft_moe(layer);
    const bool at_output = layer->desc.router.weight_at == CLMOE_WEIGHT_AT_OUTPUT && !soft_moe;
    const clmoe_buf dy = soft_moe ? rows : b->dy; /* of slots, in place */
    cl_kernel kernel = layer->kernels[KERNEL_OUTPUT_BACKWARD];
    TRY(KERNEL_SET(kernel, ARG_TYPE(dy, type), ARG_F32(PLAN_ARRAY(b, token_of)),
                   ARG_F32(PLAN_ARRAY(b, pair_of)),
                   ARG_AS(pair_weights, ARG_F32(at_output ? b->pair_weights : none)),
                   ARG_TYPE(b->dye, type), ARG_TYPE(ye, type), ARG_TYPE(rows, type),
                   ARG_F32(b->dots), ARG_UINT(layer->desc.dim),
                   ARG_AS(normalized, ARG_UINT(layer->desc.normalize_experts))));
    TRY(launch_1d(chain, kernel, b->ws.plan.slots, layer->group));
done:
    return status;
}
