/* Arguments of the steps that only Soft MoE has. */
#include "check_buffers.h"

/* The head of a step that only Soft MoE has. */
static clmoe_status check_soft_head(const clmoe_layer *layer, uint32_t tokens,
                                    workspace_layout *ws) {
    clmoe_status status = check_head(layer, tokens, ws);
    if (status == CLMOE_SUCCESS && !layer_is_soft_moe(layer))
        return fail(CLMOE_INVALID_ARGUMENT, "router.policy is not Soft MoE, which has this step");
    return status;
}

clmoe_status check_soft_dispatch(const clmoe_layer *layer, const clmoe_soft_dispatch_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_soft_head(layer, args->tokens, &ws));
    size_t element = type_bytes(layer->desc.type), tokens = args->tokens;
    size_t dim = layer->desc.dim, slots = ws.plan.slots;
    const buffer_need needs[] = {
        READS("x", &args->x, bytes_of(tokens, dim, element), element, true),
        READS("token_mask", &args->token_mask, tokens, 1, false),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("plan", &args->plan, ws.plan.bytes, 4, true),
        WRITES("pair_weights", &args->pair_weights, bytes_of(tokens, 1, 4), 4, true),
        UPDATES("mix", &args->mix, bytes_of(tokens, slots, 4), 4, true),
        UPDATES("xe", &args->xe, bytes_of(slots, dim, element), element, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_weights_given(args->weights));
    TRY(check_router(&call, args->weights));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_soft_combine(const clmoe_layer *layer, const clmoe_soft_combine_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_soft_head(layer, args->tokens, &ws));
    size_t element = type_bytes(layer->desc.type), tokens = args->tokens;
    size_t dim = layer->desc.dim, slots = ws.plan.slots;
    const buffer_need needs[] = {
        UPDATES("ye", &args->ye, bytes_of(slots, dim, element), element, true),
        READS("mix", &args->mix, bytes_of(tokens, slots, 4), 4, true),
        UPDATES("mixed", &args->mixed, bytes_of(tokens, dim, element), element, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_overlaps(&call));
done:
    return status;
}
