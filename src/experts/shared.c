/* The shared expert, which every token passes, and its gate; forward and backward. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

clmoe_status shared_create(clmoe_layer *layer) {
    char options[64];
    if (!layer->desc.shared_gate)
        return CLMOE_SUCCESS;
    snprintf(options, sizeof options, "-DGROUP=%u -DX=%s -DW=%s", layer->group,
             type_name(layer->desc.type), type_name(layer->desc.weight_type));
    return program_kernel(layer->context, "experts/shared", options, "shared_gate_backward",
                          &layer->kernels[KERNEL_SHARED_GATE_BACKWARD]);
}

static mlp_call shared_call(const batch *b, clmoe_buf rows) {
    const clmoe_layer *layer = b->layer;
    return (mlp_call){.use = &layer->shared,
                      .mlp = &layer->desc.shared,
                      .weights = &b->weights->shared,
                      .dim = layer->desc.dim,
                      .rows = {.slots = b->tokens, .row_tile = 1, .experts = 1, .a = rows},
                      .hidden = region(b, REGION_SHARED_HIDDEN),
                      .engine = region(b, REGION_ENGINE),
                      .z = b->shared_z,
                      .z_rows = b->tokens,
                      .out = b->shared_y};
}

clmoe_status step_shared(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const mlp_call call = shared_call(b, b->experts_x);
    const dense_map gate = {.rows = b->tokens,
                            .n = 1,
                            .k = layer->desc.dim,
                            .a = b->experts_x,
                            .weight = b->weights->shared_gate,
                            .out = b->shared_gate};
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(gemm_mlp_first(&call, chain));
    TRY(step_hidden_dropout(b, chain, CLMOE_MLP_SHARED, call.hidden));
    TRY(gemm_mlp_second(&call, chain));
    if (layer->desc.shared_gate)
        TRY(gemm_dense(&layer->dense, chain, &gate));
done:
    return status;
}

static activation_rows shared_activation(const batch *b) {
    const clmoe_mlp_desc *mlp = &b->layer->desc.shared;
    const clmoe_buf none = {0};
    return (activation_rows){.z = b->shared_z,
                             .dh = region(b, REGION_SHARED_DH),
                             .dz = region(b, REGION_SHARED_DZ),
                             .dots = region(b, REGION_SHARED_DOTS),
                             .z_at = mlp_z(mlp, b->tokens, false),
                             .dz_at = mlp_z(mlp, b->tokens, false),
                             .pair_weights = b->layer->desc.shared_gate ? b->shared_gate : none,
                             .token_mask = b->token_mask,
                             .gates = b->layer->desc.shared_gate};
}

/* dots -> dgate, and what of it goes on to x. */
static clmoe_status gate_backward(const batch *b, launch *chain, clmoe_buf shared_dx) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_layer_desc *desc = &layer->desc;
    cl_kernel kernel = layer->kernels[KERNEL_SHARED_GATE_BACKWARD];
    const clmoe_buf dgate = region(b, REGION_DGATE), none = {0};
    const dense_map to_x = {.rows = b->tokens,
                            .n = desc->dim,
                            .k = 1,
                            .a = dgate,
                            .weight = b->weights->shared_gate,
                            .out = shared_dx,
                            .accumulate = true};
    TRY(KERNEL_SET(
        kernel, ARG_TYPE(b->dy, desc->type),
        ARG_AS(down_bias, ARG_TYPE(desc->shared.down_bias ? b->weights->shared.down_bias : none,
                                   desc->weight_type)),
        ARG_F32(b->shared_gate), ARG_AS(dots, ARG_F32(region(b, REGION_SHARED_DOTS))),
        ARG_U8(b->token_mask), ARG_F32(dgate), ARG_UINT(desc->dim)));
    TRY(launch_1d(chain, kernel, b->tokens, layer->group));
    TRY(gemm_dense(&layer->dense_back, chain, &to_x));
done:
    return status;
}

clmoe_status step_shared_backward(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const activation_rows activation = shared_activation(b);
    mlp_call call = shared_call(b, b->experts_x);
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    call.hidden = activation.dh;
    if (b->z_again)
        TRY(gemm_mlp_first(&call, chain));
    call.rows.a = b->dy;
    call.out = b->shared_dx;
    TRY(gemm_mlp_back_down(&call, chain));
    TRY(step_activation_backward(b, chain, CLMOE_MLP_SHARED, &activation));
    TRY(gemm_mlp_back_up(&call, chain, activation.dz));
    if (layer->desc.shared_gate)
        TRY(gate_backward(b, chain, call.out));
done:
    return status;
}

static clmoe_status gate_gradient(const batch *b, launch *chain) {
    const clmoe_layer *layer = b->layer;
    const dense_gradient gradient = {.m = 1,
                                     .n = layer->desc.dim,
                                     .p = region(b, REGION_DGATE),
                                     .q = b->experts_x,
                                     .to = b->gradients.shared_gate};
    const gemm_gradient rows = batch_rows(b);
    return gemm_dense_gradient(&b->layer->dense_gradient, chain, &rows, &gradient);
}

clmoe_status step_shared_gradients(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_layer_desc *desc = &layer->desc;
    const clmoe_buf none = {0};
    const bool listed = b->token_mask.mem != NULL;
    const mlp_gradient_call call = {.use = &layer->shared_gradient,
                                    .mlp = &desc->shared,
                                    .gradients = &b->gradients.shared,
                                    .dim = desc->dim,
                                    .rows = batch_rows(b),
                                    .x = {b->experts_x, desc->dim, listed},
                                    .dy = {b->dy, desc->dim, listed},
                                    .dz = region(b, REGION_SHARED_DZ),
                                    .hidden = region(b, REGION_SHARED_DH),
                                    .listed = listed};
    const bias_call biases = {.slots = b->tokens,
                              .experts = 1,
                              .n = desc->dim,
                              .rows = {b->dy, desc->dim, false},
                              .pair_weights = desc->shared_gate ? b->shared_gate : none,
                              .token_mask = b->token_mask,
                              .gates = desc->shared_gate,
                              .to = b->gradients.shared.down_bias};
    TRY(gemm_mlp_gradients(&call, chain));
    TRY(step_mlp_bias_gradients(b, chain, CLMOE_MLP_SHARED, &biases, call.dz));
    if (desc->shared_gate)
        TRY(gate_gradient(b, chain));
done:
    return status;
}
