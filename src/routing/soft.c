/* scores -> all experts of every token, weighted. */
#include "steps.h"

clmoe_status soft_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {{KERNEL_SOFT, "soft_rows"}};
    if (layer->desc.router.policy != CLMOE_POLICY_SOFT)
        return CLMOE_SUCCESS;
    return GROUP_KERNELS(layer, "routing/soft", kernels);
}

clmoe_status step_soft(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_SOFT];
    uint32_t group = layer->group;
    TRY(KERNEL_SET(kernel, ARG_F32(b->scores), ARG_F32(expert_scale_of(b)), ARG_F32(b->ids),
                   ARG_F32(b->pair_weights), ARG_F32(b->live), arg_u32(b->tokens),
                   arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}
