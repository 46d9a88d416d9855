/* Arguments of the steps of the backward pass. */
#include "check_buffers.h"

/* The head of a step that only layers in training have. */
static clmoe_status check_back_head(const clmoe_layer *layer, uint32_t tokens,
                                    workspace_layout *ws) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_step(layer, tokens, ws));
    TRY(check_training_layer(layer));
done:
    return status;
}

/* The sizes that most buffers have. */
typedef struct sizes {
    size_t element, tokens, rows, slots, pairs, columns, groups;
} sizes;

static sizes sizes_of(const clmoe_layer *layer, uint32_t tokens, const workspace_layout *ws) {
    const clmoe_router_desc *router = &layer->desc.router;
    const size_t element = type_bytes(layer->desc.type), dim = layer->desc.dim;
    return (sizes){.element = element,
                   .tokens = tokens,
                   .rows = bytes_of(tokens, dim, element),
                   .slots = bytes_of(ws->plan.slots, dim, element),
                   .pairs = bytes_of(ws->plan.pairs, 1, 4),
                   .columns = bytes_of(tokens, layer->columns, 4),
                   .groups =
                       router->groups.two_level ? bytes_of(tokens, router->groups.count, 4) : 0};
}

clmoe_status check_experts_backward(const clmoe_layer *layer,
                                    const clmoe_experts_backward_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_back_head(layer, args->tokens, &ws));
    TRY(check_unused(args->reserved));
    TRY(check_parts(args->parts, args->accumulate));
    TRY(check_dye(layer, args->dye));
    const sizes s = sizes_of(layer, args->tokens, &ws);
    const buffer_need needs[] = {
        READS("x", &args->x, s.rows, s.element, true),
        READS("pair_weights", &args->pair_weights, s.pairs, 4, true),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        READS("z", &args->z, ws.bytes[REGION_Z], s.element, !layer->desc.recompute),
        READS("dy", &args->dy, s.rows, s.element, true),
        READS("dye", &args->dye, s.slots, s.element, false),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("dxe", &args->dxe, s.slots, s.element, true),
        UPDATES("dots", &args->dots, bytes_of(ws.plan.slots, 1, 4), 4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    TRY(check_raw_mlp(&call, CLMOE_MLP_EXPERTS, args->weights));
    TRY(check_gradients(&call, args->gradients, args->accumulate));
    if (layer->experts.engine->blocks)
        TRY(check_host_reads("plan", &args->plan));
    TRY(check_overlaps(&call));
done:
    return status;
}

/* token_offsets, which lists of pairs need and others may not have. */
static buffer_need offsets_need(const clmoe_layer *layer, const clmoe_buf *buf, size_t tokens) {
    return (buffer_need){"token_offsets",          buf,        bytes_of(tokens + 1, 1, 4), 4,
                         layer_lists_pairs(layer), BUFFER_READ};
}

clmoe_status check_combine_backward(const clmoe_layer *layer,
                                    const clmoe_combine_backward_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_back_head(layer, args->tokens, &ws));
    TRY(check_parts(CLMOE_BACKWARD_BOTH, args->accumulate));
    TRY(check_dye(layer, args->dye));
    const sizes s = sizes_of(layer, args->tokens, &ws);
    const bool at_input = layer->desc.router.weight_at == CLMOE_WEIGHT_AT_INPUT;
    const buffer_need needs[] = {
        READS("x", &args->x, s.rows, s.element, at_input || layer->desc.num_identity_experts > 0),
        READS("ids", &args->ids, s.pairs, 4, true),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        READS("token_mask", &args->token_mask, s.tokens, 1, false),
        offsets_need(layer, &args->token_offsets, s.tokens),
        READS("dy", &args->dy, s.rows, s.element, true),
        READS("dye", &args->dye, s.slots, s.element, false),
        READS("dxe", &args->dxe, s.slots, s.element, at_input),
        READS("dots", &args->dots, bytes_of(ws.plan.slots, 1, 4), 4, true),
        WRITES("dpair_weights", &args->dpair_weights, s.pairs, 4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_down_bias(&call, args->weights));
    TRY(check_gradients(&call, args->gradients, args->accumulate));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_shared_expert_backward(const clmoe_layer *layer,
                                          const clmoe_shared_expert_backward_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_head(layer, args->tokens, &ws));
    TRY(check_training_layer(layer));
    TRY(check_mlp_exists(layer, CLMOE_MLP_SHARED));
    TRY(check_unused(args->reserved));
    TRY(check_parts(args->parts, args->accumulate));
    const sizes s = sizes_of(layer, args->tokens, &ws);
    const buffer_need needs[] = {
        READS("x", &args->x, s.rows, s.element, true),
        READS("token_mask", &args->token_mask, s.tokens, 1, false),
        READS("shared_gate", &args->shared_gate, bytes_of(s.tokens, 1, 4), 4,
              layer->desc.shared_gate != 0),
        READS("z", &args->z, ws.bytes[REGION_SHARED_Z], s.element, !layer->desc.recompute),
        READS("dy", &args->dy, s.rows, s.element, true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("shared_dx", &args->shared_dx, s.rows, s.element, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    TRY(check_raw_mlp(&call, CLMOE_MLP_SHARED, args->weights));
    TRY(check_gradients(&call, args->gradients, args->accumulate));
    TRY(check_overlaps(&call));
done:
    return status;
}

/* What the way back through noise, dropout and groups makes again. */
static clmoe_status check_routers(call_check *call, const clmoe_weights *weights,
                                  const clmoe_buf *state, bool router) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_state(call, state));
    if (router)
        TRY(check_weights_given(weights));
    if (router)
        TRY(check_router(call, weights));
    TRY(check_other_routers(call, weights, state));
done:
    return status;
}

clmoe_status check_topk_backward(const clmoe_layer *layer, const clmoe_topk_backward_args *args) {
    call_check call = {.layer = layer, .in_place = {&args->dlogits, &args->dlogits_out}};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_back_head(layer, args->tokens, &ws));
    TRY(check_parts(CLMOE_BACKWARD_BOTH, args->accumulate));
    const sizes s = sizes_of(layer, args->tokens, &ws);
    const bool learned = args->state.mem && layer->desc.router.noise.kind == CLMOE_NOISE_LEARNED;
    const size_t noise = learned ? s.columns : 0;
    const buffer_need needs[] = {
        READS("x", &args->x, s.rows, s.element, learned || s.groups > 0),
        READS("logits", &args->logits, s.columns, 4, true),
        READS("ids", &args->ids, s.pairs, 4, true),
        READS("live", &args->live, bytes_of(s.tokens, 1, 4), 4, !layer_lists_pairs(layer)),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        READS("token_mask", &args->token_mask, s.tokens, 1, false),
        offsets_need(layer, &args->token_offsets, s.tokens),
        READS("dpair_weights", &args->dpair_weights, s.pairs, 4, true),
        READS("dlogits", &args->dlogits, s.columns, 4, false),
        READS("dnoise", &args->dnoise, noise, 4, false),
        READS("dgroup_logits", &args->dgroup_logits, s.groups, 4, false),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("dlogits_out", &args->dlogits_out, s.columns, 4, true),
        UPDATES("dnoise_out", &args->dnoise_out, noise, 4, true),
        UPDATES("dgroup_logits_out", &args->dgroup_logits_out, s.groups, 4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_routers(&call, args->weights, &args->state, false));
    TRY(check_expert_scale(&call, args->weights));
    TRY(check_gradients(&call, args->gradients, args->accumulate));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_score_backward(const clmoe_layer *layer, const clmoe_score_backward_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_back_head(layer, args->tokens, &ws));
    TRY(check_parts(args->parts, args->accumulate));
    if (args->logits_given > 1)
        return fail(CLMOE_INVALID_ARGUMENT, "logits_given is %u, but must be 0 or 1",
                    args->logits_given);
    const sizes s = sizes_of(layer, args->tokens, &ws);
    const bool learned = args->state.mem && layer->desc.router.noise.kind == CLMOE_NOISE_LEARNED;
    const buffer_need needs[] = {
        READS("x", &args->x, s.rows, s.element, true),
        READS("token_mask", &args->token_mask, s.tokens, 1, false),
        READS("dlogits", &args->dlogits, s.columns, 4, !args->logits_given),
        READS("dnoise", &args->dnoise, learned ? s.columns : 0, 4, true),
        READS("dgroup_logits", &args->dgroup_logits, s.groups, 4, true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("router_dx", &args->router_dx, s.rows, s.element, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_routers(&call, args->weights, &args->state, !args->logits_given));
    TRY(check_gradients(&call, args->gradients, args->accumulate));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_dispatch_backward(const clmoe_layer *layer,
                                     const clmoe_dispatch_backward_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_back_head(layer, args->tokens, &ws));
    TRY(check_unused(args->reserved));
    const sizes s = sizes_of(layer, args->tokens, &ws);
    const bool identity = layer->desc.num_identity_experts > 0;
    const bool at_input = layer->desc.router.weight_at == CLMOE_WEIGHT_AT_INPUT;
    const buffer_need needs[] = {
        READS("pair_weights", &args->pair_weights, s.pairs, 4, identity || at_input),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        READS("token_mask", &args->token_mask, s.tokens, 1, false),
        offsets_need(layer, &args->token_offsets, s.tokens),
        READS("dy", &args->dy, s.rows, s.element, identity),
        READS("dxe", &args->dxe, s.slots, s.element, true),
        READS("shared_dx", &args->shared_dx, s.rows, s.element, false),
        READS("router_dx", &args->router_dx, s.rows, s.element, false),
        UPDATES("dx", &args->dx, s.rows, s.element, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    TRY(check_overlaps(&call));
done:
    return status;
}
