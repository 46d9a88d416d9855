/* Expert outputs -> y. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

enum { SERIAL_SEGMENT = 1024 };

/* Work-items that walk a row alone take wide vectors; lanes side by side, 16 bytes each. */
clmoe_status combine_create(clmoe_layer *layer) {
    char options[64];
    uint32_t group = layer->group;
    uint32_t width = group == 1 ? 16 : 16 / (uint32_t)type_bytes(layer->desc.type);
    layer->combine_segment = group == 1 ? SERIAL_SEGMENT : group * width;
    snprintf(options, sizeof options, "-DGROUP=%u -DSEGMENT=%u -DV=%u -DX=%s -DW=%s", group,
             layer->combine_segment, width, type_name(layer->desc.type),
             type_name(layer->desc.weight_type));
    return program_kernel(layer->context, "dispatch/combine", options, "combine_rows",
                          &layer->kernels[KERNEL_COMBINE]);
}

clmoe_status step_combine(const clmoe_layer *layer, launch *chain, const clmoe_combine_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_COMBINE];
    bool weight_in_expert = layer->desc.router.weight_at != CLMOE_WEIGHT_AT_OUTPUT;
    clmoe_type type = layer->desc.type;
    clmoe_buf none = {0};
    workspace_layout ws;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    TRY(KERNEL_SET(kernel, ARG_TYPE(args->ye, type), ARG_F32(args->pair_weights),
                   ARG_F32(plan_array(args->plan, ws.plan.slot_of)), ARG_TYPE(args->x, type),
                   ARG_U8(args->token_mask), ARG_F32(args->token_offsets),
                   ARG_TYPE(args->shared, type),
                   ARG_F32(layer->desc.shared_gate ? args->shared_gate : none),
                   ARG_TYPE(layer->desc.output_bias ? args->weights->output_bias : none,
                            layer->desc.weight_type),
                   ARG_TYPE(args->residual, type), ARG_TYPE(args->y, type),
                   arg_u32(layer->desc.dim), arg_u32(layer->desc.top_k), arg_u32(ws.plan.pairs),
                   arg_u32(layer_token_pairs(layer)), arg_u32(weight_in_expert)));
    uint32_t segment = layer->combine_segment, dim = layer->desc.dim;
    size_t groups[] = {divide_up(dim, segment), args->tokens};
    TRY(launch_kernel(chain, kernel, 2, groups, (size_t[]){layer->group, 1}));
done:
    return status;
}
