/* Back through the activation of the experts and of the shared expert. */
#include "experts/gemm/kernel.h"
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

enum { MOST_ITEMS = 128, MOST_TURNS = 4 };

/* Columns that a work-item takes at a time: 16 bytes, or a vector where it walks a row alone. */
static uint32_t width_of(const clmoe_layer *layer) {
    return layer->group == 1 ? 16 : 16 / (uint32_t)type_bytes(layer->desc.type);
}

static uint32_t group_of(const clmoe_layer *layer) {
    return layer->group < MOST_ITEMS ? layer->group : MOST_ITEMS;
}

/* Work-items per row: each has a few turns, and short rows do not keep many busy. */
static uint32_t lanes_of(const clmoe_layer *layer, const clmoe_mlp_desc *mlp) {
    const uint32_t turns = divide_up(mlp->hidden_dim, width_of(layer));
    return power_of_two(divide_up(turns, MOST_TURNS), group_of(layer));
}

/* Two kernels: without dropout, and with it. */
static clmoe_status create_one(clmoe_layer *layer, int id, const clmoe_mlp_desc *mlp,
                               bool dropout) {
    char options[160];
    snprintf(options, sizeof options,
             "-DGROUP=%u -DLANES=%u -DV=%u -DACTIVATION=%d -DGATED=%d -DINTERLEAVED=%d "
             "-DDROPOUT=%d -DX=%s",
             group_of(layer), lanes_of(layer, mlp), width_of(layer), (int)mlp->activation,
             mlp->gate_layout != CLMOE_GATE_NONE, mlp->gate_layout == CLMOE_GATE_INTERLEAVED,
             dropout, type_name(layer->desc.type));
    return program_kernel(layer->context, "experts/activation", options, "activation_backward",
                          &layer->kernels[id]);
}

static clmoe_status create(clmoe_layer *layer, int id, const clmoe_mlp_desc *mlp) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(create_one(layer, id, mlp, false));
    if (mlp->hidden_dropout > 0)
        TRY(create_one(layer, id + 1, mlp, true));
done:
    return status;
}

clmoe_status activation_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc *desc = &layer->desc;
    TRY(create(layer, KERNEL_ACTIVATION_BACKWARD, &desc->experts));
    if (desc->shared.hidden_dim)
        TRY(create(layer, KERNEL_SHARED_ACTIVATION_BACKWARD, &desc->shared));
done:
    return status;
}

/* What is the same for both. */
static clmoe_status set(const batch *b, cl_kernel kernel, clmoe_mlp which, uint32_t slots,
                        const activation_rows *rows) {
    const clmoe_layer *layer = b->layer;
    const clmoe_mlp_desc *mlp = layer_mlp(layer, which);
    const clmoe_type type = layer->desc.type;
    const z_place z_at = gemm_z_place(&rows->z_at), dz_at = gemm_z_place(&rows->dz_at);
    return KERNEL_SET(
        kernel, ARG_TYPE(rows->z, type), ARG_TYPE(rows->dh, type), ARG_F32(rows->pair_of),
        ARG_F32(rows->pair_weights), ARG_U8(rows->token_mask), ARG_TYPE(rows->dz, type),
        ARG_F32(rows->dots), ARG_F32(b->state), ARG_STRUCT(z_at), ARG_STRUCT(dz_at),
        ARG_UINT(slots), ARG_UINT(mlp->hidden_dim), ARG_AS(gates, ARG_UINT(rows->gates)),
        ARG_FLOAT(mlp->limit), ARG_FLOAT(mlp->alpha), ARG_FLOAT(mlp->up_shift),
        ARG_AS(use, ARG_UINT(dropout_use(which))), ARG_AS(p, ARG_FLOAT(mlp->hidden_dropout)));
}

clmoe_status step_activation_backward(const batch *b, launch *chain, clmoe_mlp which,
                                      const activation_rows *rows) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const bool shared = which == CLMOE_MLP_SHARED;
    const int id = shared ? KERNEL_SHARED_ACTIVATION_BACKWARD : KERNEL_ACTIVATION_BACKWARD;
    cl_kernel kernel = layer->kernels[id + mlp_drops_out(b, which)];
    const uint32_t slots = shared ? b->tokens : b->ws.plan.slots;
    const uint32_t group = group_of(layer), lanes = lanes_of(layer, layer_mlp(layer, which));
    TRY(set(b, kernel, which, slots, rows));
    TRY(launch_1d(chain, kernel, divide_up(slots, group / lanes), group));
done:
    return status;
}
