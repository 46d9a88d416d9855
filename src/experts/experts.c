/* Rows of the buckets -> expert outputs, and backward. The shared expert is in shared.c. */
#include "steps.h"

/* The buckets, with rows of x: gathered, unless they are rows of slots. */
static gemm_problem expert_rows(const batch *b, clmoe_buf rows, bool gather) {
    const clmoe_plan_layout *plan = &b->ws.plan;
    const clmoe_buf none = {0};
    return (gemm_problem){.tile_expert = PLAN_ARRAY(b, tile_expert),
                          .offsets = PLAN_ARRAY(b, offsets),
                          .kept = PLAN_ARRAY(b, kept),
                          .slots = plan->slots,
                          .row_tile = plan->row_tile,
                          .experts = b->layer->desc.num_experts,
                          .a = rows,
                          .token_of = gather ? PLAN_ARRAY(b, token_of) : none,
                          .row_weight = layer_row_weight(&b->layer->desc),
                          .pair_of = PLAN_ARRAY(b, pair_of),
                          .pair_weights = b->pair_weights};
}

static mlp_call experts_call(const batch *b, clmoe_buf rows, bool gather) {
    const clmoe_layer *layer = b->layer;
    return (mlp_call){.use = &layer->experts,
                      .mlp = &layer->desc.experts,
                      .weights = &b->weights->experts,
                      .dim = layer->desc.dim,
                      .rows = expert_rows(b, rows, gather),
                      .hidden = region(b, REGION_HIDDEN),
                      .engine = region(b, REGION_ENGINE),
                      .z = b->z,
                      .z_rows = layer_z_rows(layer, &b->ws.plan),
                      .z_by_pair = layer_z_by_pair(layer, &b->ws.plan),
                      .out = b->ye};
}

static clmoe_status run_mlp(const batch *b, launch *chain, const mlp_call *call) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(gemm_mlp_first(call, chain));
    TRY(step_hidden_dropout(b, chain, CLMOE_MLP_EXPERTS, call->hidden));
    TRY(gemm_mlp_second(call, chain));
done:
    return status;
}

clmoe_status step_experts(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const bool gather = b->xe.mem == NULL;
    const mlp_call call = experts_call(b, gather ? b->experts_x : b->xe, gather);
    if (b->ws.plan.slots == 0)
        return CLMOE_SUCCESS;
    TRY(run_mlp(b, chain, &call));
    if (layer->desc.normalize_experts)
        TRY(step_normalize(b, chain, b->ye));
done:
    return status;
}

bool experts_have_output_rows(const batch *b) {
    return b->layer->desc.normalize_experts || b->dye.mem || layer_is_soft_moe(b->layer);
}

gemm_rows experts_dy_rows(const batch *b) {
    const clmoe_layer *layer = b->layer;
    const bool gathered = layer->experts.engine->gathers && layer->mlp_gradient.engine->gathers &&
                          !experts_have_output_rows(b);
    return (gemm_rows){gathered ? b->dy : region(b, REGION_DY_ROWS), layer->desc.dim, gathered};
}

gemm_rows experts_x_rows(const batch *b) {
    const clmoe_layer *layer = b->layer;
    const bool gathered = layer->mlp_gradient.engine->gathers && !layer_is_soft_moe(layer) &&
                          layer->desc.router.weight_at != CLMOE_WEIGHT_AT_INPUT;
    return (gemm_rows){gathered ? b->experts_x : region(b, REGION_X_ROWS), layer->desc.dim,
                       gathered};
}

clmoe_status step_experts_again(const batch *b, launch *chain) {
    const bool gather = !layer_dispatches(b->layer);
    mlp_call call = experts_call(b, gather ? b->experts_x : region(b, REGION_X_ROWS), gather);
    call.hidden = region(b, REGION_DH);
    call.out = b->dxe;
    if (!b->z_again)
        call.z = (clmoe_buf){0};
    return experts_have_output_rows(b) ? run_mlp(b, chain, &call) : gemm_mlp_first(&call, chain);
}

static activation_rows experts_activation(const batch *b) {
    const clmoe_layer *layer = b->layer;
    const clmoe_mlp_desc *mlp = &layer->desc.experts;
    const clmoe_plan_layout *plan = &b->ws.plan;
    const clmoe_buf none = {0};
    const clmoe_weight_at at = layer->desc.router.weight_at;
    /* Weights that are in the rows already, and their gradients from there. */
    const bool done = at == CLMOE_WEIGHT_AT_OUTPUT && experts_have_output_rows(b);
    return (activation_rows){
        .z = b->z,
        .dh = region(b, REGION_DH),
        .dz = region(b, REGION_DZ),
        .dots = done ? none : b->dots,
        .z_at = mlp_z(mlp, layer_z_rows(layer, plan), layer_z_by_pair(layer, plan)),
        .dz_at = mlp_z(mlp, plan->slots, false),
        .pair_of = PLAN_ARRAY(b, pair_of),
        .pair_weights = done || at == CLMOE_WEIGHT_AT_INPUT ? none : b->pair_weights};
}

clmoe_status step_experts_backward(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_rows rows = experts_dy_rows(b);
    const activation_rows activation = experts_activation(b);
    mlp_call call = experts_call(b, rows.buf, rows.gathered);
    call.hidden = activation.dh;
    call.out = b->dxe;
    TRY(gemm_mlp_back_down(&call, chain));
    TRY(step_activation_backward(b, chain, CLMOE_MLP_EXPERTS, &activation));
    TRY(gemm_mlp_back_up(&call, chain, activation.dz));
done:
    return status;
}

clmoe_status step_experts_gradients(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_buf none = {0};
    const bool at_output =
        layer->desc.router.weight_at == CLMOE_WEIGHT_AT_OUTPUT && !experts_have_output_rows(b);
    const mlp_gradient_call call = {.use = &layer->mlp_gradient,
                                    .mlp = &layer->desc.experts,
                                    .gradients = &b->gradients.experts,
                                    .dim = layer->desc.dim,
                                    .rows = {.offsets = PLAN_ARRAY(b, offsets),
                                             .kept = PLAN_ARRAY(b, kept),
                                             .token_of = PLAN_ARRAY(b, token_of),
                                             .slots = b->ws.plan.slots,
                                             .experts = layer->desc.num_experts,
                                             .accumulate = b->accumulate,
                                             .scratch = region(b, REGION_GRADIENT)},
                                    .x = experts_x_rows(b),
                                    .dy = experts_dy_rows(b),
                                    .dz = region(b, REGION_DZ),
                                    .hidden = region(b, REGION_DH)};
    const bias_call biases = {.offsets = call.rows.offsets,
                              .kept = call.rows.kept,
                              .token_of = call.rows.token_of,
                              .slots = call.rows.slots,
                              .experts = call.rows.experts,
                              .n = layer->desc.dim,
                              .rows = call.dy,
                              .pair_of = PLAN_ARRAY(b, pair_of),
                              .pair_weights = at_output ? b->pair_weights : none,
                              .to = b->gradients.experts.down_bias};
    TRY(gemm_mlp_gradients(&call, chain));
    TRY(step_mlp_bias_gradients(b, chain, CLMOE_MLP_EXPERTS, &biases, call.dz));
done:
    return status;
}
