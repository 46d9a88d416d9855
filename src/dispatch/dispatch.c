/* x -> rows of the buckets. */
#include "steps.h"

clmoe_status dispatch_create(clmoe_layer *layer) {
    return layer_kernel(layer, KERNEL_DISPATCH, "dispatch/dispatch", "dispatch_rows");
}

enum { SEGMENT = 1024 }; /* columns per group, as in dispatch.cl */

clmoe_status step_dispatch(const clmoe_layer *layer, launch *chain,
                           const clmoe_dispatch_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_DISPATCH];
    workspace_layout ws;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    TRY(KERNEL_SET(kernel, ARG_TYPE(args->x, layer->desc.type),
                   ARG_F32(plan_array(args->plan, ws.plan.token_of)),
                   ARG_TYPE(args->xe, layer->desc.type), arg_u32(layer->desc.dim)));
    size_t groups[] = {(layer->desc.dim + SEGMENT - 1) / SEGMENT, ws.plan.slots};
    TRY(launch_kernel(chain, kernel, 2, groups, (size_t[]){layer->group, 1}));
done:
    return status;
}
