/* Expert outputs -> y; and backward, which for dispatch is the same sum over a token's pairs. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

enum { SERIAL_SEGMENT = 1024 };

/* Work-items that walk a row alone take wide vectors; lanes side by side, 16 bytes each. */
clmoe_status combine_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    char options[64];
    uint32_t group = layer->group;
    uint32_t width = group == 1 ? 16 : 16 / (uint32_t)type_bytes(layer->desc.type);
    layer->combine_segment = group == 1 ? SERIAL_SEGMENT : group * width;
    snprintf(options, sizeof options, "-DGROUP=%u -DSEGMENT=%u -DV=%u -DX=%s -DW=%s", group,
             layer->combine_segment, width, type_name(layer->desc.type),
             type_name(layer->desc.weight_type));
    TRY(program_kernel(layer->context, "dispatch/combine", options, "combine_rows",
                       &layer->kernels[KERNEL_COMBINE]));
    if (layer->desc.training)
        TRY(program_kernel(layer->context, "dispatch/combine", options, "combine_backward",
                           &layer->kernels[KERNEL_COMBINE_BACKWARD]));
done:
    return status;
}

/* What a token's row is made of: residual + bias + gate * shared + sum of w * rows, or w * x. */
typedef struct combine_rows {
    clmoe_buf rows, x, shared, shared_gate, output_bias, residual, y;
    bool weighted;
} combine_rows;

static clmoe_status combine(const batch *b, launch *chain, const combine_rows *of) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_COMBINE];
    clmoe_type type = layer->desc.type;
    TRY(KERNEL_SET(kernel, ARG_AS(ye, ARG_TYPE(of->rows, type)), ARG_F32(b->pair_weights),
                   ARG_F32(PLAN_ARRAY(b, slot_of)), ARG_TYPE(of->x, type), ARG_U8(b->token_mask),
                   ARG_F32(b->token_offsets), ARG_TYPE(of->shared, type), ARG_F32(of->shared_gate),
                   ARG_TYPE(of->output_bias, layer->desc.weight_type), ARG_TYPE(of->residual, type),
                   ARG_TYPE(of->y, type), ARG_UINT(layer->desc.dim), ARG_UINT(layer->desc.top_k),
                   ARG_UINT(b->ws.plan.pairs), ARG_AS(most, ARG_UINT(layer_token_pairs(layer))),
                   ARG_AS(weight_in_expert, ARG_UINT(!of->weighted))));
    uint32_t segment = layer->combine_segment, dim = layer->desc.dim;
    size_t groups[] = {divide_up(dim, segment), b->tokens};
    TRY(launch_kernel(chain, kernel, 2, groups, (size_t[]){layer->group, 1}));
done:
    return status;
}

clmoe_status step_combine(const batch *b, launch *chain) {
    const clmoe_layer_desc *desc = &b->layer->desc;
    const clmoe_buf none = {0};
    const combine_rows of = {.rows = b->ye,
                             .x = b->experts_x,
                             .shared = b->shared_y,
                             .shared_gate = desc->shared_gate ? b->shared_gate : none,
                             .output_bias = desc->output_bias ? b->weights->output_bias : none,
                             .residual = b->residual,
                             .y = b->y,
                             .weighted = desc->router.weight_at == CLMOE_WEIGHT_AT_OUTPUT};
    return combine(b, chain, &of);
}

clmoe_status step_combine_backward(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_layer_desc *desc = &layer->desc;
    const clmoe_type type = desc->type;
    const clmoe_buf none = {0};
    const clmoe_weight_at at = desc->router.weight_at;
    const bool biased = desc->experts.down_bias && at == CLMOE_WEIGHT_AT_OUTPUT &&
                        !desc->normalize_experts && !b->dye.mem;
    const bool products = biased || at == CLMOE_WEIGHT_AT_INPUT || desc->num_identity_experts > 0;
    cl_kernel kernel = layer->kernels[KERNEL_COMBINE_BACKWARD];
    TRY(KERNEL_SET(kernel, ARG_TYPE(b->dy, type), ARG_AS(x, ARG_TYPE(b->experts_x, type)),
                   ARG_AS(dxe, ARG_TYPE(at == CLMOE_WEIGHT_AT_INPUT ? b->dxe : none, type)),
                   ARG_F32(b->dots),
                   ARG_AS(down_bias, ARG_TYPE(biased ? b->weights->experts.down_bias : none,
                                              desc->weight_type)),
                   ARG_F32(b->ids), ARG_F32(PLAN_ARRAY(b, slot_of)), ARG_U8(b->token_mask),
                   ARG_F32(b->token_offsets), ARG_F32(b->dpair_weights), ARG_UINT(desc->dim),
                   ARG_UINT(b->tokens), ARG_UINT(desc->top_k), ARG_UINT(b->ws.plan.pairs),
                   ARG_AS(most, ARG_UINT(layer_token_pairs(layer))), ARG_UINT(products)));
    TRY(launch_1d(chain, kernel, (size_t)b->tokens + 1, layer->group));
done:
    return status;
}

clmoe_status step_dispatch_backward(const batch *b, launch *chain) {
    const clmoe_layer_desc *desc = &b->layer->desc;
    const clmoe_buf none = {0};
    const combine_rows of = {.rows = b->dxe,
                             .x = b->dy,
                             .shared = b->shared_dx,
                             .residual = b->router_dx_begun ? b->router_dx : none,
                             .y = b->dx,
                             .weighted = desc->router.weight_at == CLMOE_WEIGHT_AT_INPUT};
    return combine(b, chain, &of);
}
