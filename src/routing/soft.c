/* scores -> all experts of every token, weighted. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

clmoe_status soft_create(clmoe_layer *layer) {
    char options[32];
    if (layer->desc.router.policy != CLMOE_POLICY_SOFT)
        return CLMOE_SUCCESS;
    snprintf(options, sizeof options, "-DGROUP=%u", layer->group);
    return program_kernel(layer->context, "routing/soft", options, "soft_rows",
                          &layer->kernels[KERNEL_SOFT]);
}

clmoe_status step_soft(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_SOFT];
    uint32_t group = layer->group;
    clmoe_buf none = {0};
    TRY(KERNEL_SET(kernel, ARG_F32(args->scores),
                   ARG_F32(layer->desc.router.expert_scale ? args->weights->expert_scale : none),
                   ARG_F32(args->ids), ARG_F32(args->weights_out), ARG_F32(args->live),
                   arg_u32(args->tokens), arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(args->tokens, group), group));
done:
    return status;
}
