/* x -> rows of the buckets. */
#include "dispatch/dispatch.clh"
#include "steps.h"

clmoe_status dispatch_create(clmoe_layer *layer) {
    return layer_kernel(layer, KERNEL_DISPATCH, "dispatch/dispatch", "dispatch_rows");
}

clmoe_status step_dispatch(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_DISPATCH];
    TRY(KERNEL_SET(kernel, ARG_TYPE(b->experts_x, layer->desc.type),
                   ARG_F32(PLAN_ARRAY(b, token_of)), ARG_TYPE(b->xe, layer->desc.type),
                   ARG_UINT(layer->desc.dim)));
    size_t groups[] = {divide_up(layer->desc.dim, DISPATCH_SEGMENT), b->ws.plan.slots};
    TRY(launch_kernel(chain, kernel, 2, groups, (size_t[]){layer->group, 1}));
done:
    return status;
}
