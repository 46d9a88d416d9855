/* Two levels as one softmax, for statistics and losses, and the gradient's way back from it. */
#include "steps.h"

clmoe_status joint_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!layer->desc.router.two_level)
        return CLMOE_SUCCESS;
    TRY(balance_kernel(layer, KERNEL_JOINT_ROWS, "balance/joint", "joint_rows"));
    TRY(balance_kernel(layer, KERNEL_JOINT_GRADIENT, "balance/joint", "joint_gradient"));
done:
    return status;
}

static clmoe_buf scratch_region(const workspace_layout *ws, region_id id, clmoe_buf scratch) {
    return workspace_region(ws, id, (clmoe_buf){0}, scratch);
}

clmoe_status step_joint(const clmoe_layer *layer, launch *chain, const sums_args *args,
                        clmoe_buf joint) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_JOINT_ROWS];
    workspace_layout ws;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    TRY(KERNEL_SET(kernel, ARG_F32(args->noisy),
                   ARG_F32(scratch_region(&ws, REGION_GROUP_LOGITS, args->scratch)),
                   ARG_F32(args->state), ARG_F32(joint),
                   ARG_F32(scratch_region(&ws, REGION_JOINT_GRADIENT, args->scratch)),
                   arg_u32(args->tokens), arg_u32(layer->desc.router.num_groups),
                   arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(args->tokens, layer->balance_group),
                  layer->balance_group));
done:
    return status;
}

clmoe_status step_joint_gradient(const clmoe_layer *layer, launch *chain,
                                 const clmoe_loss_args *args, const sums_args *sums,
                                 clmoe_buf dnoise) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_JOINT_GRADIENT];
    workspace_layout ws;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    TRY(KERNEL_SET(
        kernel, ARG_F32(sums->noisy), ARG_F32(args->logits), ARG_F32(sums->noise_raw),
        ARG_F32(scratch_region(&ws, REGION_GROUP_LOGITS, args->scratch)), ARG_F32(args->state),
        ARG_F32(scratch_region(&ws, REGION_SUMS_ROWS, args->scratch)),
        ARG_F32(scratch_region(&ws, REGION_JOINT_GRADIENT, args->scratch)), ARG_F32(args->dlogits),
        ARG_F32(dnoise), ARG_F32(args->dgroup_logits), arg_u32(args->tokens),
        arg_u32(layer->desc.router.num_groups), arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(args->tokens, layer->balance_group),
                  layer->balance_group));
done:
    return status;
}
