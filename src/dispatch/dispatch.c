/* x -> rows of the buckets, and backward their gradient -> dx. */
#include "dispatch/dispatch.clh"
#include "steps.h"

clmoe_status dispatch_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(layer_kernel(layer, KERNEL_DISPATCH, "dispatch/dispatch", "dispatch_rows"));
    if (layer->desc.training && layer->desc.router.weight_at == CLMOE_WEIGHT_AT_INPUT)
        TRY(layer_kernel(layer, KERNEL_WEIGHTED_ROWS, "dispatch/dispatch", "weighted_rows"));
done:
    return status;
}

static clmoe_status launch_rows(const batch *b, launch *chain, cl_kernel kernel) {
    const size_t groups[] = {divide_up(b->layer->desc.dim, DISPATCH_SEGMENT), b->ws.plan.slots};
    return launch_kernel(chain, kernel, 2, groups, (size_t[]){b->layer->group, 1});
}

clmoe_status step_dispatch_rows(const batch *b, launch *chain, clmoe_buf x, clmoe_buf xe) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_DISPATCH];
    TRY(KERNEL_SET(kernel, ARG_TYPE(x, layer->desc.type), ARG_F32(PLAN_ARRAY(b, token_of)),
                   ARG_TYPE(xe, layer->desc.type), ARG_UINT(layer->desc.dim)));
    TRY(launch_rows(b, chain, kernel));
done:
    return status;
}

clmoe_status step_dispatch(const batch *b, launch *chain) {
    return step_dispatch_rows(b, chain, b->experts_x, b->xe);
}

clmoe_status step_weighted_rows(const batch *b, launch *chain, clmoe_buf xe) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_type type = layer->desc.type;
    cl_kernel kernel = layer->kernels[KERNEL_WEIGHTED_ROWS];
    TRY(KERNEL_SET(kernel, ARG_AS(x, ARG_TYPE(b->experts_x, type)),
                   ARG_F32(PLAN_ARRAY(b, token_of)), ARG_F32(PLAN_ARRAY(b, pair_of)),
                   ARG_F32(b->pair_weights), ARG_TYPE(xe, type), ARG_UINT(layer->desc.dim)));
    TRY(launch_rows(b, chain, kernel));
done:
    return status;
}
