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

clmoe_status step_experts(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    clmoe_buf none = {0};
    const clmoe_plan_layout *plan = &b->ws.plan;
    bool gather = b->xe.mem == NULL;
    gemm_problem rows = {
        .tile_expert = PLAN_ARRAY(b, tile_expert),
        .offsets = PLAN_ARRAY(b, offsets),
        .kept = PLAN_ARRAY(b, kept),
        .slots = plan->slots,
        .row_tile = plan->row_tile,
        .experts = layer->desc.num_experts,
        .a = gather ? b->experts_x : b->xe,
        .token_of = gather ? PLAN_ARRAY(b, token_of) : none,
        .row_weight = row_weight(layer),
        .pair_of = PLAN_ARRAY(b, pair_of),
        .pair_weights = b->pair_weights,
    };
    if (plan->slots == 0)
        return CLMOE_SUCCESS;
    TRY(gemm_mlp(&layer->experts, chain, &layer->desc.experts, &b->weights->experts,
                 layer->desc.dim, &rows, region(b, REGION_HIDDEN), region(b, REGION_ENGINE),
                 b->ye));
    if (layer->desc.normalize_experts)
        TRY(step_normalize(b, chain));
done:
    return status;
}

clmoe_status step_shared(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    gemm_problem rows = {.slots = b->tokens, .row_tile = 1, .experts = 1, .a = b->experts_x};
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(gemm_mlp(&layer->shared, chain, &layer->desc.shared, &b->weights->shared, layer->desc.dim,
                 &rows, region(b, REGION_SHARED_HIDDEN), region(b, REGION_ENGINE), b->shared_y));
    if (layer->desc.shared_gate)
        TRY(gemm_dense(&layer->dense, chain, b->tokens, b->experts_x, b->weights->shared_gate,
                       (clmoe_buf){0}, 1, layer->desc.dim, b->shared_gate));
done:
    return status;
}
