/* From the arguments of clmoe_forward() to a batch; calls.c has those of the single steps. */
#include "batch.h"
#include "check/check.h"

void bind_losses(batch *b, const clmoe_loss_desc *losses, size_t loss_size, uint32_t num_losses) {
    b->num_losses = num_losses;
    for (uint32_t i = 0; i < num_losses; i++)
        b->losses[i] = loss_at(losses, loss_size, i);
}

clmoe_status bind_forward(batch *b, const clmoe_layer *layer, const clmoe_forward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf none = {0};
    const bool chosen = args->ids_in.mem != NULL; /* by the caller */
    *b = (batch){.layer = layer,
                 .tokens = args->tokens,
                 .saved = args->saved,
                 .scratch = args->scratch,
                 .weights = args->weights,
                 .x = args->x,
                 .token_mask = args->token_mask,
                 .state = args->state,
                 .logits_given = args->logits_in.mem != NULL,
                 .residual = args->residual,
                 .y = args->y,
                 .routed = !chosen,
                 .stats = args->stats,
                 .load_target = args->load_target,
                 .load_supplied = args->load_supplied,
                 .bias_counts = args->bias_counts,
                 .counts_added = true,
                 .loss_values = args->loss_values,
                 .dlogits = args->dlogits,
                 .dnoise = args->dnoise,
                 .dgroup_logits = args->dgroup_logits};
    bind_losses(b, args->losses, args->loss_size, args->num_losses);
    TRY(workspace_layout_get(layer, args->tokens, &b->ws));
    if (!chosen) {
        b->logits = b->logits_given ? args->logits_in : region(b, REGION_LOGITS);
        b->scores = region(b, REGION_SCORES);
    }
    b->ids = chosen ? args->ids_in : region(b, REGION_IDS);
    b->pair_weights = chosen ? args->pair_weights_in : region(b, REGION_WEIGHTS);
    b->live = chosen ? none : layer_live(layer, region(b, REGION_LIVE));
    b->token_offsets = region(b, REGION_TOKEN_OFFSETS);
    b->plan = region(b, REGION_PLAN);
    b->xe = region(b, REGION_XE);
    b->ye = region(b, REGION_YE);
    b->shared_y = region(b, REGION_SHARED_Y);
    b->shared_gate = region(b, REGION_SHARED_GATE);
    b->mix = region(b, REGION_SOFT_MOE_COMBINE);
    b->mixed = region(b, REGION_MIXED);
    b->jittered = region(b, REGION_JITTERED);
    b->experts_x = batch_jitters_experts(b) ? b->jittered : args->x;
    if (!layer->desc.recompute) {
        b->z = region(b, REGION_Z);
        b->shared_z = region(b, REGION_SHARED_Z);
    }
done:
    return status;
}

/* The first that is given. */
static clmoe_buf either(clmoe_buf given, clmoe_buf own) {
    return given.mem ? given : own;
}

/* What forward had, or left in `saved`. */
static void bind_saved(batch *b, const clmoe_backward_args *args) {
    const clmoe_layer *layer = b->layer;
    const clmoe_buf none = {0};
    const bool chosen = args->ids_in.mem != NULL;
    b->logits_given = args->logits_in.mem != NULL;
    b->routed = !chosen;
    b->logits = either(args->logits_in, region(b, REGION_LOGITS));
    b->ids = either(args->ids_in, region(b, REGION_IDS));
    b->pair_weights = either(args->pair_weights_in, region(b, REGION_WEIGHTS));
    b->live = chosen ? none : layer_live(layer, region(b, REGION_LIVE));
    b->token_offsets = region(b, REGION_TOKEN_OFFSETS);
    b->plan = region(b, REGION_PLAN);
    b->shared_gate = region(b, REGION_SHARED_GATE);
    b->z = region(b, REGION_Z);
    b->shared_z = region(b, REGION_SHARED_Z);
    b->z_again = layer->desc.recompute != 0;
    b->jittered = region(b, REGION_JITTERED);
    b->experts_x = batch_jitters_experts(b) ? b->jittered : args->x;
}

void bind_raw_weights(batch *b, const clmoe_weights *weights) {
    if (!weights)
        return;
    b->raw = *weights;
    b->raw.experts.packed = b->raw.shared.packed = (clmoe_buf){0};
    b->weights = &b->raw;
}

clmoe_status bind_backward(batch *b, const clmoe_layer *layer, const clmoe_backward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    *b = (batch){.layer = layer,
                 .tokens = args->tokens,
                 .saved = args->saved,
                 .scratch = args->scratch,
                 .x = args->x,
                 .token_mask = args->token_mask,
                 .state = args->state,
                 .dlogits = args->dlogits,
                 .dnoise = args->dnoise,
                 .dgroup_logits = args->dgroup_logits,
                 .dy = args->dy,
                 .dye = args->dye,
                 .dx = args->dx,
                 .accumulate = args->accumulate != 0};
    bind_raw_weights(b, args->weights);
    TRY(workspace_layout_get(layer, args->tokens, &b->ws));
    bind_saved(b, args);
    b->dpair_weights = either(args->dpair_weights, region(b, REGION_DPAIR_WEIGHTS));
    b->dlogits_out = either(args->dlogits_out, region(b, REGION_DLOGITS));
    b->dnoise_out = region(b, REGION_DNOISE);
    b->dgroup_out = region(b, REGION_DGROUP_LOGITS);
    b->dxe = region(b, REGION_DXE);
    b->dots = region(b, REGION_DOTS);
    b->shared_dx = region(b, REGION_SHARED_DX);
    b->router_dx = region(b, REGION_ROUTER_DX);
    if (args->gradients)
        b->gradients = *args->gradients;
done:
    return status;
}

clmoe_buf unmasked_at(const batch *b, unmasked_part part) {
    const size_t words[] = {[UNMASKED_LIST] = 0,
                            [UNMASKED_OFFSETS] = b->tokens,
                            [UNMASKED_KEPT] = (size_t)b->tokens + 2};
    return buf_at(region(b, REGION_UNMASKED), words[part] * sizeof(cl_uint));
}

gemm_gradient batch_rows(const batch *b) {
    gemm_gradient rows = {.slots = b->tokens,
                          .experts = 1,
                          .accumulate = b->accumulate,
                          .scratch = region(b, REGION_GRADIENT)};
    if (!b->token_mask.mem)
        return rows;
    rows.token_of = unmasked_at(b, UNMASKED_LIST);
    rows.offsets = unmasked_at(b, UNMASKED_OFFSETS);
    rows.kept = unmasked_at(b, UNMASKED_KEPT);
    return rows;
}
