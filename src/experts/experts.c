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
    const clmoe_plan_layout *plan = &b->ws.plan;
    const clmoe_buf none = {0};
    const bool gather = b->xe.mem == NULL;
    const mlp_call call = {
        .use = &layer->experts,
        .mlp = &layer->desc.experts,
        .weights = &b->weights->experts,
        .dim = layer->desc.dim,
        .rows = {.tile_expert = PLAN_ARRAY(b, tile_expert),
                 .offsets = PLAN_ARRAY(b, offsets),
                 .kept = PLAN_ARRAY(b, kept),
                 .slots = plan->slots,
                 .row_tile = plan->row_tile,
                 .experts = layer->desc.num_experts,
                 .a = gather ? b->experts_x : b->xe,
                 .token_of = gather ? PLAN_ARRAY(b, token_of) : none,
                 .row_weight = row_weight(layer),
                 .pair_of = PLAN_ARRAY(b, pair_of),
                 .pair_weights = b->pair_weights},
        .hidden = region(b, REGION_HIDDEN),
        .engine = region(b, REGION_ENGINE),
        .out = b->ye,
    };
    if (plan->slots == 0)
        return CLMOE_SUCCESS;
    TRY(gemm_mlp(&call, chain));
    if (layer->desc.normalize_experts)
        TRY(step_normalize(b, chain));
done:
    return status;
}

clmoe_status step_shared(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const mlp_call call = {
        .use = &layer->shared,
        .mlp = &layer->desc.shared,
        .weights = &b->weights->shared,
        .dim = layer->desc.dim,
        .rows = {.slots = b->tokens, .row_tile = 1, .experts = 1, .a = b->experts_x},
        .hidden = region(b, REGION_SHARED_HIDDEN),
        .engine = region(b, REGION_ENGINE),
        .out = b->shared_y,
    };
    const dense_map gate = {.rows = b->tokens,
                            .n = 1,
                            .k = layer->desc.dim,
                            .a = b->experts_x,
                            .weight = b->weights->shared_gate,
                            .out = b->shared_gate};
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(gemm_mlp(&call, chain));
    if (layer->desc.shared_gate)
        TRY(gemm_dense(&layer->dense, chain, &gate));
done:
    return status;
}
