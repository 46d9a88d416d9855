/* Gradients of biases: sums over the rows of a bucket, or of a batch. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

/* Columns of a work-item: 16 bytes, or of one that is a group by itself a vector. */
static uint32_t width_of(const clmoe_layer *layer, clmoe_type rows) {
    return layer->group == 1 ? 16 : 16 / (uint32_t)type_bytes(rows);
}

static clmoe_status create(clmoe_layer *layer, kernel_id id, clmoe_type rows, clmoe_type gradient) {
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DV=%u -DQ=%s -DC=%s", layer->group,
             width_of(layer, rows), type_name(rows), type_name(gradient));
    return program_kernel(layer->context, "experts/bias", options, "bias_gradient",
                          &layer->kernels[id]);
}

clmoe_status bias_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc *desc = &layer->desc;
    const clmoe_type gradient = layer_gradient_type(layer, desc->weight_type);
    TRY(create(layer, KERNEL_BIAS_GRADIENT, desc->type, gradient));
    TRY(create(layer, KERNEL_ROUTER_BIAS_GRADIENT, CLMOE_F32, CLMOE_F32));
done:
    return status;
}

clmoe_status step_bias_gradient(const batch *b, launch *chain, kernel_id id,
                                const bias_call *call) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const uint32_t group = layer->group, across = group < 4 ? group : 4;
    const clmoe_buf none = {0};
    const bool router = id == KERNEL_ROUTER_BIAS_GRADIENT;
    const clmoe_type row_type = router ? CLMOE_F32 : layer->desc.type;
    const clmoe_type type =
        router ? CLMOE_F32 : layer_gradient_type(layer, layer->desc.weight_type);
    cl_kernel kernel = layer->kernels[id];
    if (!call->to.mem)
        return CLMOE_SUCCESS;
    TRY(KERNEL_SET(kernel, ARG_F32(call->offsets), ARG_F32(call->kept), ARG_F32(call->token_of),
                   ARG_UINT(call->slots), ARG_AS(p, ARG_F32(none)),
                   ARG_AS(q, ARG_TYPE(call->rows.buf, row_type)), ARG_AS(p_row, ARG_UINT(0)),
                   ARG_AS(q_row, ARG_UINT(call->rows.row)), ARG_AS(p_gathered, ARG_UINT(0)),
                   ARG_AS(q_gathered, ARG_UINT(call->rows.gathered)), ARG_AS(m, ARG_UINT(1)),
                   ARG_UINT(call->n), ARG_AS(c, ARG_TYPE(call->to, type)),
                   ARG_AS(c_expert, ARG_ULONG(call->n)), ARG_AS(c_row, ARG_ULONG(call->n)),
                   ARG_AS(accumulate, ARG_UINT(b->accumulate)), ARG_F32(call->pair_of),
                   ARG_F32(call->pair_weights), ARG_U8(call->token_mask), ARG_UINT(call->gates)));
    const size_t groups[] = {divide_up(call->n, across * width_of(layer, row_type)), call->experts};
    TRY(launch_kernel(chain, kernel, 2, groups, (const size_t[]){group, 1}));
done:
    return status;
}

clmoe_status step_mlp_bias_gradients(const batch *b, launch *chain, clmoe_mlp which,
                                     const bias_call *down, clmoe_buf dz) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_mlp_desc *mlp = layer_mlp(layer, which);
    const bool shared = which == CLMOE_MLP_SHARED, gated = mlp->gate_layout != CLMOE_GATE_NONE;
    const clmoe_mlp_gradients *to = shared ? &b->gradients.shared : &b->gradients.experts;
    const gemm_z at = mlp_z(mlp, down->slots, false);
    bias_call gate = *down, up;
    gate.rows = (gemm_rows){dz, at.row, false};
    gate.n = at.row;
    gate.pair_weights = (clmoe_buf){0};
    gate.gates = false;
    gate.to = to->gate_bias;
    up = gate;
    up.rows.buf = buf_at(dz, at.up * type_bytes(layer->desc.type));
    up.to = to->up_bias;
    if (mlp->gate_up_bias && gated)
        TRY(step_bias_gradient(b, chain, KERNEL_BIAS_GRADIENT, &gate));
    if (mlp->gate_up_bias && (!gated || mlp->gate_layout == CLMOE_GATE_SEPARATE))
        TRY(step_bias_gradient(b, chain, KERNEL_BIAS_GRADIENT, &up));
    if (mlp->down_bias)
        TRY(step_bias_gradient(b, chain, KERNEL_BIAS_GRADIENT, down));
done:
    return status;
}

clmoe_status step_output_bias_gradient(const batch *b, launch *chain) {
    const uint32_t dim = b->layer->desc.dim;
    const bias_call call = {.slots = b->tokens,
                            .experts = 1,
                            .n = dim,
                            .rows = {b->dy, dim, false},
                            .token_mask = b->token_mask,
                            .to = b->gradients.output_bias};
    return step_bias_gradient(b, chain, KERNEL_BIAS_GRADIENT, &call);
}

clmoe_status step_router_bias_gradient(const batch *b, launch *chain) {
    const uint32_t columns = b->layer->columns;
    const bool used = b->routed && !b->logits_given; /* else no rows: 0 */
    const bias_call call = {.slots = used ? b->tokens : 0,
                            .experts = 1,
                            .n = columns,
                            .rows = {b->dlogits_out, columns, false},
                            .token_mask = b->token_mask,
                            .to = b->gradients.router_bias};
    return step_bias_gradient(b, chain, KERNEL_ROUTER_BIAS_GRADIENT, &call);
}
