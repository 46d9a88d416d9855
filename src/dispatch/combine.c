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

clmoe_status step_combine(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_COMBINE];
    bool weight_in_expert = layer->desc.router.weight_at != CLMOE_WEIGHT_AT_OUTPUT;
    clmoe_type type = layer->desc.type;
    clmoe_buf none = {0};
    TRY(KERNEL_SET(
        kernel, ARG_TYPE(b->ye, type), ARG_F32(b->pair_weights), ARG_F32(PLAN_ARRAY(b, slot_of)),
        ARG_TYPE(b->experts_x, type), ARG_U8(b->token_mask), ARG_F32(b->token_offsets),
        ARG_AS(shared, ARG_TYPE(b->shared_y, type)),
        ARG_F32(layer->desc.shared_gate ? b->shared_gate : none),
        ARG_TYPE(layer->desc.output_bias ? b->weights->output_bias : none, layer->desc.weight_type),
        ARG_TYPE(b->residual, type), ARG_TYPE(b->y, type), ARG_UINT(layer->desc.dim),
        ARG_UINT(layer->desc.top_k), ARG_UINT(b->ws.plan.pairs),
        ARG_AS(most, ARG_UINT(layer_token_pairs(layer))), ARG_UINT(weight_in_expert)));
    uint32_t segment = layer->combine_segment, dim = layer->desc.dim;
    size_t groups[] = {divide_up(dim, segment), b->tokens};
    TRY(launch_kernel(chain, kernel, 2, groups, (size_t[]){layer->group, 1}));
done:
    return status;
}
