/* Two levels as one softmax, for statistics and losses, and the gradient's way back from it. */
#include "steps.h"

clmoe_status joint_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!layer->desc.router.groups.two_level)
        return CLMOE_SUCCESS;
    TRY(balance_kernel(layer, KERNEL_JOINT_ROWS, "balance/joint", "joint_rows"));
    TRY(balance_kernel(layer, KERNEL_JOINT_GRADIENT, "balance/joint", "joint_gradient"));
done:
    return status;
}

clmoe_status step_joint(const batch *b, launch *chain, const sums *in) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_JOINT_ROWS];
    TRY(KERNEL_SET(
        kernel, ARG_AS(logits, ARG_F32(in->noisy)), ARG_F32(region(b, REGION_GROUP_LOGITS)),
        ARG_F32(b->state), ARG_AS(joint, ARG_F32(in->p_logits)),
        ARG_AS(d, ARG_F32(region(b, REGION_JOINT_GRADIENT))), ARG_UINT(b->tokens),
        ARG_AS(groups, ARG_UINT(layer->desc.router.groups.count)), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, layer->balance_group), layer->balance_group));
done:
    return status;
}

clmoe_status step_joint_gradient(const batch *b, launch *chain, const sums *in, clmoe_buf dnoise) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_JOINT_GRADIENT];
    TRY(KERNEL_SET(
        kernel, ARG_AS(logits, ARG_F32(in->noisy)), ARG_AS(clean, ARG_F32(b->logits)),
        ARG_F32(in->noise_raw), ARG_F32(region(b, REGION_GROUP_LOGITS)), ARG_F32(b->state),
        ARG_F32(region(b, REGION_SUMS_ROWS)), ARG_AS(d, ARG_F32(region(b, REGION_JOINT_GRADIENT))),
        ARG_F32(b->dlogits), ARG_F32(dnoise), ARG_F32(b->dgroup_logits), ARG_UINT(b->tokens),
        ARG_AS(groups, ARG_UINT(layer->desc.router.groups.count)), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, layer->balance_group), layer->balance_group));
done:
    return status;
}
