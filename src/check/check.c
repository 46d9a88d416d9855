/* Arguments of the public calls. */
#include "check_buffers.h"
#include "runtime/structs.h"

/* Whether the engine can address the rows xe, or x, of all experts, and what it makes of them. */
static clmoe_status check_experts_rows(const clmoe_layer *layer, const workspace_layout *ws,
                                       const clmoe_weights *weights, clmoe_buf rows,
                                       clmoe_buf scratch, clmoe_buf ye) {
    const clmoe_buf none = {0};
    const mlp_call call = {
        .use = &layer->experts,
        .mlp = &layer->desc.experts,
        .weights = &weights->experts,
        .dim = layer->desc.dim,
        .rows = {.slots = ws->plan.slots, .experts = layer->desc.num_experts, .a = rows},
        .hidden = workspace_region(ws, REGION_HIDDEN, none, scratch),
        .engine = workspace_region(ws, REGION_ENGINE, none, scratch),
        .out = ye};
    return gemm_mlp_check(&call);
}

/* The same for x of the shared expert. */
static clmoe_status check_shared_rows(const clmoe_layer *layer, const workspace_layout *ws,
                                      const clmoe_shared_expert_args *args) {
    const clmoe_buf none = {0};
    const mlp_call call = {.use = &layer->shared,
                           .mlp = &layer->desc.shared,
                           .weights = &args->weights->shared,
                           .dim = layer->desc.dim,
                           .rows = {.slots = args->tokens, .experts = 1, .a = args->x},
                           .hidden =
                               workspace_region(ws, REGION_SHARED_HIDDEN, none, args->scratch),
                           .engine = workspace_region(ws, REGION_ENGINE, none, args->scratch),
                           .out = args->shared};
    return gemm_mlp_check(&call);
}

/* Both for a forward. */
static clmoe_status check_forward_engine(const clmoe_layer *layer, const workspace_layout *ws,
                                         const clmoe_forward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool jittered = args->state.mem && layer->desc.router.noise.jitter_experts;
    const clmoe_buf saved = args->saved, scratch = args->scratch;
    const clmoe_buf x = jittered ? workspace_region(ws, REGION_JITTERED, saved, scratch) : args->x;
    const clmoe_buf xe = workspace_region(ws, REGION_XE, saved, scratch);
    const clmoe_shared_expert_args shared = {
        .tokens = args->tokens,
        .weights = args->weights,
        .x = x,
        .scratch = scratch,
        .shared = workspace_region(ws, REGION_SHARED_Y, saved, scratch)};
    TRY(check_experts_rows(layer, ws, args->weights, xe.mem ? xe : x, scratch,
                           workspace_region(ws, REGION_YE, saved, scratch)));
    if (layer->desc.shared.hidden_dim)
        TRY(check_shared_rows(layer, ws, &shared));
done:
    return status;
}

/* Which of the batch's arrays go with the layer's policy. */
static clmoe_status check_forward_policy(const clmoe_layer *layer, const clmoe_forward_args *args) {
    if (layer_lists_pairs(layer) && args->ids_in.mem)
        return fail(CLMOE_INVALID_ARGUMENT, "ids_in is given, but %s",
                    layer_rounds(layer) ? "capacity.keep is round" : "the policy is expert choice");
    if (!layer_lists_pairs(layer) && args->token_offsets.mem)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "token_offsets is given, but the policy is not expert choice, nor is "
                    "capacity.keep round");
    if (!layer_is_soft_moe(layer))
        return CLMOE_SUCCESS;
    const struct {
        const char *name;
        cl_mem mem;
    } unused[] = {
        {"logits_in", args->logits_in.mem},
        {"ids_in", args->ids_in.mem},
        {"logits", args->logits.mem},
        {"ids", args->ids.mem},
        {"pair_weights", args->pair_weights.mem},
        {"stats", args->stats.mem},
    };
    if (args->num_losses > 0)
        return fail(CLMOE_INVALID_ARGUMENT, "num_losses is %u, but the policy is Soft MoE",
                    args->num_losses);
    for (size_t i = 0; i < sizeof unused / sizeof unused[0]; i++)
        if (unused[i].mem)
            return fail(CLMOE_INVALID_ARGUMENT, "%s is given, but the policy is Soft MoE",
                        unused[i].name);
    return CLMOE_SUCCESS;
}

/* Counts are of the router's own choice, by the bias of the state. */
static clmoe_status check_forward_counts(const clmoe_layer *layer, const clmoe_forward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_quantile(layer, "bias_counts"));
    if (args->ids_in.mem)
        return fail(CLMOE_INVALID_ARGUMENT, "bias_counts is given together with ids_in");
    if (!args->state.mem)
        return fail(CLMOE_INVALID_ARGUMENT, "bias_counts is given without state");
    if (args->weights && args->weights->select_bias.mem)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "bias_counts is given together with weights.select_bias, but the counts are by "
                    "the state's");
done:
    return status;
}

clmoe_status check_forward(const clmoe_layer *layer, const clmoe_forward_args *args) {
    call_check call = {.layer = layer, .in_place = {&args->y, &args->residual}};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_head(layer, args->tokens, &ws));
    TRY(check_forward_policy(layer, args));
    if (!args->ids_in.mem != !args->pair_weights_in.mem)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is given without %s",
                    args->ids_in.mem ? "ids_in" : "pair_weights_in",
                    args->ids_in.mem ? "pair_weights_in" : "ids_in");
    if (args->ids_in.mem && (args->logits_in.mem || args->logits.mem))
        return fail(CLMOE_INVALID_ARGUMENT, "%s is given together with ids_in",
                    args->logits_in.mem ? "logits_in" : "logits");
    size_t element = type_bytes(layer->desc.type);
    size_t rows = bytes_of(args->tokens, layer->desc.dim, element);
    size_t columns = bytes_of(args->tokens, layer->columns, 4);
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4);
    const buffer_need needs[] = {
        READS("x", &args->x, rows, element, true),
        READS("token_mask", &args->token_mask, args->tokens, 1, false),
        READS("residual", &args->residual, rows, element, false),
        READS("logits_in", &args->logits_in, columns, 4, false),
        READS("ids_in", &args->ids_in, pairs, 4, false),
        READS("pair_weights_in", &args->pair_weights_in, pairs, 4, false),
        UPDATES("saved", &args->saved, ws.saved_bytes, 4, true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        WRITES("y", &args->y, rows, element, true),
        WRITES("logits", &args->logits, columns, 4, false),
        WRITES("ids", &args->ids, pairs, 4, false),
        WRITES("pair_weights", &args->pair_weights, pairs, 4, false),
        WRITES("token_offsets", &args->token_offsets, bytes_of((size_t)args->tokens + 1, 1, 4), 4,
               false),
        WRITES("stats", &args->stats, layer_stats_bytes(layer), 4, false),
        UPDATES("bias_counts", &args->bias_counts, layer_bias_counts_bytes(layer), 4, false),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    if (args->bias_counts.mem)
        TRY(check_forward_counts(layer, args));
    TRY(check_plan_state(&call, &args->state));
    TRY(check_forward_weights(&call, args));
    TRY(check_forward_losses(&call, args));
    if (layer->experts.engine->blocks)
        TRY(layer->desc.training ? check_host_reads("saved", &args->saved)
                                 : check_host_reads("scratch", &args->scratch));
    TRY(check_forward_engine(layer, &ws, args));
    TRY(check_overlaps(&call));
done:
    return status;
}

/* What a step cannot see of others that belong between them, its caller says. */
static clmoe_status check_jitter_follows(const clmoe_layer *layer, const clmoe_score_args *args) {
    if (args->experts_jittered == 1 || !args->state.mem || !layer->desc.router.noise.jitter_experts)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT,
                "experts_jittered is %u, but with a state and router.noise.jitter_experts the "
                "experts get what clmoe_jitter() makes: set it to 1",
                args->experts_jittered);
}

static clmoe_status check_final_weights(const clmoe_layer *layer, uint32_t final_weights) {
    if (final_weights == 1 || !layer_renorms_late(layer))
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT,
                "final_weights is %u, but with router.renorm.after_drop pair_weights are final "
                "after clmoe_renorm_after_drop(), or from another router: set it to 1",
                final_weights);
}

clmoe_status check_score(const clmoe_layer *layer, const clmoe_score_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    TRY(check_unused(args->reserved));
    TRY(check_jitter_follows(layer, args));
    const clmoe_router_desc *router = &layer->desc.router;
    bool external = args->logits_in.mem != NULL, two_level = router->groups.two_level;
    bool noisy = args->state.mem && layer_is_noisy(layer);
    bool jittered = args->state.mem && router->noise.jitter > 0 && !external;
    bool reads_x = !external || two_level || (noisy && router->noise.kind == CLMOE_NOISE_LEARNED);
    size_t element = type_bytes(layer->desc.type);
    size_t columns = bytes_of(args->tokens, layer->columns, 4);
    const buffer_need needs[] = {
        READS("x", &args->x, bytes_of(args->tokens, layer->desc.dim, element), element, reads_x),
        READS("logits_in", &args->logits_in, columns, 4, false),
        WRITES("logits", &args->logits, external ? 0 : columns, 4, true),
        UPDATES("scores", &args->scores, columns, 4, true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, noisy || jittered || two_level),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    if (!external || two_level)
        TRY(check_weights_given(args->weights));
    if (!external)
        TRY(check_router(&call, args->weights));
    if (noisy)
        TRY(check_noise_router(&call, args->weights));
    if (two_level)
        TRY(check_group_router(&call, args->weights));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_topk(const clmoe_layer *layer, const clmoe_topk_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    clmoe_policy policy = layer->desc.router.policy;
    bool lists = layer_lists_pairs(layer);
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4), tokens = args->tokens;
    const buffer_need needs[] = {
        READS("scores", &args->scores, bytes_of(tokens, layer->columns, 4), 4, true),
        UPDATES("ids", &args->ids, pairs, 4, true),
        UPDATES("pair_weights", &args->pair_weights, pairs, 4, true),
        WRITES("live", &args->live, bytes_of(tokens, 1, 4), 4, !lists),
        UPDATES("token_offsets", &args->token_offsets, lists ? bytes_of(tokens + 1, 1, 4) : 0, 4,
                true),
        READS("token_mask", &args->token_mask, tokens, 1, false),
        UPDATES("scratch", &args->scratch,
                policy == CLMOE_POLICY_TOKEN_CHOICE && !layer_rebalances(layer) && !lists
                    ? 0
                    : ws.scratch_bytes,
                4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    if (layer->desc.router.select_bias || layer->desc.router.expert_scale)
        TRY(check_choice(&call, args->weights, args->state));
    TRY(check_overlaps(&call));
done:
    return status;
}

/* What overflow reroute reads and writes besides; without scores it moves nothing. */
static clmoe_status check_reroute(call_check *call, const clmoe_plan_args *args, size_t pairs) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    if (!args->scores.mem)
        return CLMOE_SUCCESS;
    const buffer_need needs[] = {
        READS("scores", &args->scores, bytes_of(args->tokens, layer->columns, 4), 4, true),
        UPDATES("pair_weights", &args->pair_weights, pairs, 4, true),
        UPDATES("ids", &args->ids, pairs, 4, true),
    };
    TRY(CHECK_BUFFERS(call, needs));
    TRY(check_expert_scale(call, args->weights));
done:
    return status;
}

clmoe_status check_plan(const clmoe_layer *layer, const clmoe_plan_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4), tokens = args->tokens;
    const buffer_need needs[] = {
        READS("ids", &args->ids, pairs, 4, true),
        READS("pair_weights", &args->pair_weights, pairs, 4, layer_reroutes(layer)),
        READS("live", &args->live, bytes_of(tokens, 1, 4), 4, false),
        READS("token_mask", &args->token_mask, tokens, 1, false),
        READS("token_offsets", &args->token_offsets, bytes_of(tokens + 1, 1, 4), 4,
              layer_lists_pairs(layer)),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("plan", &args->plan, ws.plan.bytes, 4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_plan_state(&call, &args->state));
    bool by_weight = layer_sorts(layer) && layer_keep(layer) != CLMOE_KEEP_RANDOM;
    if (by_weight && !args->pair_weights.mem && pairs > 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "pair_weights is not given, but the capacity's keep rule ranks by weight");
    if (layer_reroutes(layer))
        TRY(check_reroute(&call, args, pairs));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_renorm_after_drop(const clmoe_layer *layer,
                                     const clmoe_renorm_after_drop_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    if (!layer->desc.router.renorm.after_drop)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "router.renorm.after_drop is 0: clmoe_topk() gives the weights as they are");
    if (layer_rounds(layer))
        return fail(CLMOE_INVALID_ARGUMENT,
                    "capacity.keep is round: clmoe_topk() gives the weights as they are");
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4);
    const buffer_need needs[] = {
        READS("ids", &args->ids, pairs, 4, true),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        UPDATES("pair_weights", &args->pair_weights, pairs, 4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_expert_scale(&call, args->weights));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_replicate(const clmoe_layer *layer, const clmoe_replicate_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    const uint32_t experts = layer->desc.num_experts;
    const uint32_t most = (uint32_t)MAX_COLUMNS - layer->desc.num_identity_experts;
    if (args->replicas < experts || args->replicas > most)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "replicas is %u, but must be from %u, the experts, to %u", args->replicas,
                    experts, most);
    if (args->max_copies == 0 || args->max_copies > args->replicas)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "max_copies is %u, but must be from 1 to %u, the replicas", args->max_copies,
                    args->replicas);
    TRY(check_unused(args->reserved));
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4);
    const buffer_need needs[] = {
        READS("ids", &args->ids, pairs, 4, true),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        READS("copies", &args->copies, bytes_of(experts, 1, 4), 4, true),
        READS("logical_to_physical", &args->logical_to_physical,
              bytes_of(experts, args->max_copies, 4), 4, true),
        WRITES("physical_ids", &args->physical_ids, pairs, 4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_jitter(const clmoe_layer *layer, const clmoe_jitter_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    if (layer->desc.router.noise.jitter <= 0)
        return fail(CLMOE_INVALID_ARGUMENT, "router.noise.jitter is 0: the layer has no jitter");
    size_t element = type_bytes(layer->desc.type);
    size_t rows = bytes_of(args->tokens, layer->desc.dim, element);
    const buffer_need needs[] = {
        READS("x", &args->x, rows, element, true),
        READS("state", &args->state, layer_state_bytes(layer), 4, true),
        WRITES("jittered", &args->jittered, rows, element, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_dispatch(const clmoe_layer *layer, const clmoe_dispatch_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    size_t element = type_bytes(layer->desc.type);
    const buffer_need needs[] = {
        READS("x", &args->x, bytes_of(args->tokens, layer->desc.dim, element), element, true),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        WRITES("xe", &args->xe, bytes_of(ws.plan.slots, layer->desc.dim, element), element, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_experts(const clmoe_layer *layer, const clmoe_experts_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_head(layer, args->tokens, &ws));
    TRY(check_unused(args->reserved));
    bool gathers = !layer_dispatches(layer);
    bool weighted = layer->desc.router.weight_at != CLMOE_WEIGHT_AT_OUTPUT;
    if (weighted)
        TRY(check_final_weights(layer, args->final_weights));
    if (layer->experts.engine->blocks)
        TRY(check_host_reads("plan", &args->plan));
    size_t element = type_bytes(layer->desc.type);
    size_t slot_rows = bytes_of(ws.plan.slots, layer->desc.dim, element);
    const buffer_need needs[] = {
        READS("x", &args->x, bytes_of(args->tokens, layer->desc.dim, element), element,
              gathers && !args->xe.mem),
        READS("xe", &args->xe, slot_rows, element, !gathers),
        READS("pair_weights", &args->pair_weights, bytes_of(ws.plan.pairs, 1, 4), 4, weighted),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("ye", &args->ye, slot_rows, element, true),
        WRITES("z", &args->z, ws.bytes[REGION_Z], element, false),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    TRY(check_weights_given(args->weights));
    TRY(check_experts_weights(&call, args->weights));
    TRY(check_experts_rows(layer, &ws, args->weights, args->xe.mem ? args->xe : args->x,
                           args->scratch, args->ye));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_shared_expert(const clmoe_layer *layer, const clmoe_shared_expert_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_head(layer, args->tokens, &ws));
    if (layer->desc.shared.hidden_dim == 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "shared.hidden_dim is 0: the layer has no shared expert");
    size_t element = type_bytes(layer->desc.type), tokens = args->tokens;
    size_t rows = bytes_of(tokens, layer->desc.dim, element);
    const buffer_need needs[] = {
        READS("x", &args->x, rows, element, true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        UPDATES("shared", &args->shared, rows, element, true),
        WRITES("shared_gate", &args->shared_gate,
               layer->desc.shared_gate ? bytes_of(tokens, 1, 4) : 0, 4, true),
        WRITES("z", &args->z, ws.bytes[REGION_SHARED_Z], element, false),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    TRY(check_weights_given(args->weights));
    TRY(check_shared_weights(&call, args->weights));
    TRY(check_shared_rows(layer, &ws, args));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_combine(const clmoe_layer *layer, const clmoe_combine_args *args) {
    call_check call = {.layer = layer, .in_place = {&args->y, &args->residual}};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_head(layer, args->tokens, &ws));
    TRY(check_unused(args->reserved));
    TRY(check_final_weights(layer, args->final_weights));
    size_t element = type_bytes(layer->desc.type), tokens = args->tokens;
    size_t rows = bytes_of(tokens, layer->desc.dim, element);
    size_t ye_rows = layer_is_soft_moe(layer) ? tokens : ws.plan.slots;
    bool shared = layer->desc.shared.hidden_dim > 0;
    bool gated = layer->desc.shared_gate && args->shared.mem;
    const buffer_need needs[] = {
        READS("x", &args->x, rows, element, layer->desc.num_identity_experts > 0),
        READS("ye", &args->ye, bytes_of(ye_rows, layer->desc.dim, element), element, true),
        READS("pair_weights", &args->pair_weights, bytes_of(ws.plan.pairs, 1, 4), 4, true),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        READS("token_mask", &args->token_mask, tokens, 1, false),
        READS("token_offsets", &args->token_offsets, bytes_of(tokens + 1, 1, 4), 4,
              layer_lists_pairs(layer)),
        READS("shared", &args->shared, rows, element, shared),
        READS("shared_gate", &args->shared_gate, bytes_of(tokens, 1, 4), 4, gated),
        READS("residual", &args->residual, rows, element, false),
        WRITES("y", &args->y, rows, element, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_output_bias(&call, args->weights));
    TRY(check_overlaps(&call));
done:
    return status;
}
