/* Dropout of the activations between gate and up, and down. */
#include "runtime/random.clh"
#include "steps.h"

bool mlp_drops_out(const batch *b, clmoe_mlp which) {
    return b->state.mem && layer_mlp(b->layer, which)->hidden_dropout > 0;
}

uint32_t dropout_use(clmoe_mlp which) {
    return which == CLMOE_MLP_SHARED ? RANDOM_SHARED_HIDDEN : RANDOM_HIDDEN;
}

clmoe_status dropout_create(clmoe_layer *layer) {
    if (layer->desc.experts.hidden_dropout == 0 && layer->desc.shared.hidden_dropout == 0)
        return CLMOE_SUCCESS;
    return layer_kernel(layer, KERNEL_HIDDEN_DROPOUT, "experts/dropout", "hidden_dropout");
}

clmoe_status step_hidden_dropout(const batch *b, launch *chain, clmoe_mlp which, clmoe_buf hidden) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_mlp_desc *mlp = layer_mlp(layer, which);
    const clmoe_buf none = {0};
    const bool shared = which == CLMOE_MLP_SHARED;
    cl_kernel kernel = layer->kernels[KERNEL_HIDDEN_DROPOUT];
    if (!mlp_drops_out(b, which))
        return CLMOE_SUCCESS;
    TRY(KERNEL_SET(kernel, ARG_TYPE(hidden, layer->desc.type),
                   ARG_AS(pair_of, ARG_F32(shared ? none : PLAN_ARRAY(b, pair_of))),
                   ARG_F32(b->state), ARG_UINT(mlp->hidden_dim),
                   ARG_AS(use, ARG_UINT(dropout_use(which))),
                   ARG_AS(p, ARG_FLOAT(mlp->hidden_dropout))));
    TRY(launch_1d(chain, kernel, shared ? b->tokens : b->ws.plan.slots, layer->group));
done:
    return status;
}
