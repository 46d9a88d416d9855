/* scores -> all experts of every token, weighted. */
#include "steps.h"

static clmoe_status create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {{KERNEL_POLICY, "all_experts_rows"}};
    return GROUP_KERNELS(layer, "routing/all_experts", kernels);
}

static clmoe_status choose(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_POLICY];
    uint32_t group = layer->group;
    TRY(KERNEL_SET(kernel, ARG_F32(b->scores), ARG_F32(expert_scale_of(b)), ARG_F32(b->ids),
                   ARG_F32(b->pair_weights), ARG_F32(b->live), ARG_UINT(b->tokens),
                   ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}

const routing_policy all_experts_policy = {.create = create, .step = choose};
