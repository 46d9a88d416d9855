/* Back through the activation of the experts and of the shared expert. */
#include "runtime/program.h"
#include "experts/gemm/kernel.h"
#include "steps.h"

#include <stdio.h>

static clmoe_status create(clmoe_layer *layer, kernel_id id, const clmoe_mlp_desc *mlp,
                           bool gates) {
    char options[160];
    const char *type = type_name(layer->desc.type);
    const uint32_t width = layer->group == 1 ? 16 : 4;
    snprintf(options, sizeof options,
             "-DGROUP=%u -DV=%u -DGATED=%d -DINTERLEAVED=%d -DGATES=%d -DX=%s -DA=%s -DW=%s "
             "-DBIAS=%s -DC=%s",
             layer->group, width, mlp->gate_layout != CLMOE_GATE_NONE,
             mlp->gate_layout == CLMOE_GATE_INTERLEAVED, gates, type, type, type, type, type);
    return program_kernel(layer->context, "experts/activation", options, "activation_backward",
                          &layer->kernels[id]);
}

clmoe_status activation_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc *desc = &layer->desc;
    TRY(create(layer, KERNEL_ACTIVATION_BACKWARD, &desc->experts, false));
    if (desc->shared.hidden_dim)
        TRY(create(layer, KERNEL_SHARED_ACTIVATION_BACKWARD, &desc->shared, desc->shared_gate));
done:
    return status;
}

/* What is the same for both. */
static clmoe_status set(cl_kernel kernel, const clmoe_layer *layer, const clmoe_mlp_desc *mlp,
                        const activation_rows *rows) {
    const clmoe_type type = layer->desc.type;
    const z_place z_at = gemm_z_place(&rows->z_at), dz_at = gemm_z_place(&rows->dz_at);
    return KERNEL_SET(kernel, ARG_TYPE(rows->z, type), ARG_TYPE(rows->dh, type),
                      ARG_F32(rows->pair_of), ARG_F32(rows->pair_weights),
                      ARG_U8(rows->token_mask), ARG_TYPE(rows->dz, type), ARG_F32(rows->dots),
                      ARG_STRUCT(z_at), ARG_STRUCT(dz_at), ARG_UINT(mlp->hidden_dim),
                      ARG_UINT((uint32_t)mlp->activation), ARG_FLOAT(mlp->limit),
                      ARG_FLOAT(mlp->alpha), ARG_FLOAT(mlp->up_shift));
}

clmoe_status step_activation_backward(const batch *b, launch *chain, clmoe_mlp which,
                                      const activation_rows *rows) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const bool shared = which == CLMOE_MLP_SHARED;
    cl_kernel kernel = layer->kernels[shared ? KERNEL_SHARED_ACTIVATION_BACKWARD
                                             : KERNEL_ACTIVATION_BACKWARD];
    TRY(set(kernel, layer, layer_mlp(layer, which), rows));
    TRY(launch_1d(chain, kernel, shared ? b->tokens : b->ws.plan.slots, layer->group));
done:
    return status;
}
