/* Rows of the buckets -> expert outputs; and the shared expert, the same over all tokens. */
#include "steps.h"

static gemm_row_weight row_weight(const clmoe_layer *layer) {
    switch (layer->desc.router.weight_at) {
    case CLMOE_WEIGHT_AT_INPUT:
        return GEMM_ROW_WEIGHT_INPUT;
    case CLMOE_WEIGHT_AT_ACTIVATION:
        return GEMM_ROW_WEIGHT_OUTPUT;
    case CLMOE_WEIGHT_AT_OUTPUT:
        break;
    }
    return GEMM_ROW_WEIGHT_NONE;
}

clmoe_status step_experts(const clmoe_layer *layer, launch *chain, const clmoe_experts_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    clmoe_buf none = {0};
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    const clmoe_plan_layout *plan = &ws.plan;
    bool gather = args->xe.mem == NULL;
    gemm_problem rows = {
        .tile_expert = plan_array(args->plan, plan->tile_expert),
        .offsets = plan_array(args->plan, plan->offsets),
        .kept = plan_array(args->plan, plan->kept),
        .slots = plan->slots,
        .row_tile = plan->row_tile,
        .experts = layer->desc.num_experts,
        .a = gather ? args->x : args->xe,
        .token_of = gather ? plan_array(args->plan, plan->token_of) : none,
        .row_weight = row_weight(layer),
        .row_of = plan_array(args->plan, plan->row_of),
        .pair_weights = args->pair_weights,
    };
    if (plan->slots == 0)
        return CLMOE_SUCCESS;
    TRY(gemm_mlp(&layer->experts, chain, &layer->desc.experts, &args->weights->experts,
                 layer->desc.dim, &rows, workspace_region(&ws, REGION_HIDDEN, none, args->scratch),
                 workspace_region(&ws, REGION_ENGINE, none, args->scratch), args->ye));
    if (layer->desc.normalize_experts)
        TRY(step_normalize(layer, chain, rows.row_of, plan->slots, args->ye));
done:
    return status;
}

clmoe_status step_shared(const clmoe_layer *layer, launch *chain, const shared_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    gemm_problem rows = {.slots = args->tokens, .row_tile = 1, .experts = 1, .a = args->x};
    if (args->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(gemm_mlp(&layer->shared, chain, &layer->desc.shared, &args->weights->shared,
                 layer->desc.dim, &rows, args->hidden, args->engine, args->y));
    if (layer->desc.shared_gate)
        TRY(gemm_dense(&layer->dense, chain, args->tokens, args->x, args->weights->shared_gate,
                       (clmoe_buf){0}, 1, layer->desc.dim, args->gate));
done:
    return status;
}
