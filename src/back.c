/* Steps of several rooms that the chain backwards and its single steps share. */
#include "back.h"

clmoe_status back_unmasked(const batch *b, launch *chain) {
    return b->token_mask.mem ? step_unmasked(b, chain) : CLMOE_SUCCESS;
}

clmoe_status back_prepare(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    if (b->state.mem && b->layer->desc.router.noise.jitter > 0)
        TRY(step_jitter(b, chain));
    TRY(back_unmasked(b, chain));
done:
    return status;
}

/* z and ye as forward made them, where they are asked for. */
static clmoe_status forward_again(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!b->z_again && !experts_have_output_rows(b))
        return CLMOE_SUCCESS;
    if (layer_dispatches(b->layer))
        TRY(step_dispatch_rows(b, chain, b->experts_x, region(b, REGION_X_ROWS)));
    TRY(step_experts_again(b, chain));
done:
    return status;
}

/* dy as rows of slots, where it is not gathered. */
static clmoe_status output_rows(const batch *b, launch *chain) {
    const gemm_rows rows = experts_dy_rows(b);
    if (experts_have_output_rows(b))
        return step_output_backward(b, chain, b->dxe, rows.buf);
    return rows.gathered ? CLMOE_SUCCESS : step_dispatch_rows(b, chain, b->dy, rows.buf);
}

clmoe_status back_experts(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    if (b->ws.plan.slots == 0)
        return CLMOE_SUCCESS;
    TRY(forward_again(b, chain));
    TRY(output_rows(b, chain));
    TRY(step_experts_backward(b, chain));
done:
    return status;
}

/* x as rows of slots, where the gradient takes it so. Those of Soft MoE are made. */
static clmoe_status x_rows(const batch *b, launch *chain) {
    const gemm_rows rows = experts_x_rows(b);
    if (rows.gathered || layer_is_soft_moe(b->layer) || b->ws.plan.slots == 0)
        return CLMOE_SUCCESS;
    if (b->layer->desc.router.weight_at == CLMOE_WEIGHT_AT_INPUT)
        return step_weighted_rows(b, chain, rows.buf);
    return step_dispatch_rows(b, chain, b->experts_x, rows.buf);
}

clmoe_status back_experts_gradients(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(x_rows(b, chain));
    TRY(step_experts_gradients(b, chain));
done:
    return status;
}

clmoe_status back_routers_gradients(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(step_score_gradients(b, chain));
    if (b->layer->desc.router.bias)
        TRY(step_router_bias_gradient(b, chain));
done:
    return status;
}

clmoe_status back_dispatch(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(step_dispatch_backward(b, chain));
    if (batch_jitters_experts(b))
        TRY(step_jitter_rows(b, chain, b->dx, b->dx));
done:
    return status;
}
