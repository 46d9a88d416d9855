/* Arguments of the public calls. */
#include "check_buffers.h"
#include "runtime/structs.h"

/* Room of later headers. */
static clmoe_status is_unused(const char *name, const clmoe_buf *room, size_t bytes) {
    if (struct_is_zero(room, 0, bytes))
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "%s is not 0", name);
}

clmoe_status check_weights_given(const clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!weights)
        return fail(CLMOE_INVALID_ARGUMENT, "weights is NULL");
    TRY(is_unused("weights.reserved", weights->reserved, sizeof weights->reserved));
    TRY(is_unused("weights.experts.reserved", weights->experts.reserved,
                  sizeof weights->experts.reserved));
    TRY(is_unused("weights.shared.reserved", weights->shared.reserved,
                  sizeof weights->shared.reserved));
done:
    return status;
}

clmoe_status check_router(call_check *call, const clmoe_weights *weights) {
    const clmoe_layer *layer = call->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    size_t element = type_bytes(router->weight_type);
    const buffer_need needs[] = {
        READS("weights.router", &weights->router,
              bytes_of(layer_router_rows(layer), layer->desc.dim, element), element, true),
        READS("weights.router_bias", &weights->router_bias,
              router->bias ? bytes_of(layer->columns, 1, 4) : 0, 4, true),
    };
    return CHECK_BUFFERS(call, needs);
}

/* With a state. */
static clmoe_status check_noise_router(call_check *call, const clmoe_weights *weights) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    size_t element = type_bytes(layer->desc.router.weight_type);
    if (layer->desc.router.noise.kind != CLMOE_NOISE_LEARNED)
        return CLMOE_SUCCESS;
    TRY(check_weights_given(weights));
    const buffer_need need =
        READS("weights.noise_router", &weights->noise_router,
              bytes_of(layer->columns, layer->desc.dim, element), element, true);
    TRY(check_buffer(call, &need));
done:
    return status;
}

clmoe_status check_state(call_check *call, const clmoe_buf *state) {
    const clmoe_layer *layer = call->layer;
    const buffer_need need = READS("state", state, layer_state_bytes(layer), 4, false);
    return check_buffer(call, &need);
}

clmoe_status check_plan_state(call_check *call, const clmoe_buf *state) {
    const clmoe_layer *layer = call->layer;
    if (layer_keep(layer) == CLMOE_KEEP_RANDOM && !state->mem)
        return fail(CLMOE_INVALID_ARGUMENT, "state is not given, but capacity.keep is random");
    return check_state(call, state);
}

/* weights.group_router; also needed with external logits. */
static clmoe_status check_group_router(call_check *call, const clmoe_weights *weights) {
    const clmoe_layer *layer = call->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    size_t element = type_bytes(router->weight_type);
    const buffer_need need = READS(
        "weights.group_router", &weights->group_router,
        router->groups.two_level ? bytes_of(router->groups.count, layer->desc.dim, element) : 0,
        element, true);
    return check_buffer(call, &need);
}

clmoe_status check_expert_scale(call_check *call, const clmoe_weights *weights) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    if (!layer->desc.router.expert_scale)
        return CLMOE_SUCCESS;
    TRY(check_weights_given(weights));
    const buffer_need need = READS("weights.expert_scale", &weights->expert_scale,
                                   bytes_of(layer->columns, 1, 4), 4, true);
    TRY(check_buffer(call, &need));
done:
    return status;
}

/* Where weights has no select_bias, that of the state is used. */
static clmoe_status check_choice(call_check *call, const clmoe_weights *weights, clmoe_buf state) {
    const clmoe_layer *layer = call->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    size_t bytes = bytes_of(layer->columns, 1, 4);
    bool own_bias = router->select_bias && !state.mem;
    if (!own_bias && !router->expert_scale && !weights)
        return CLMOE_SUCCESS;
    if (!weights)
        return check_weights_given(weights);
    if (own_bias && !weights->select_bias.mem)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "weights.select_bias is not given, and there is no state to take it from");
    const buffer_need needs[] = {
        READS("weights.select_bias", &weights->select_bias, router->select_bias ? bytes : 0, 4,
              false),
        READS("weights.expert_scale", &weights->expert_scale, router->expert_scale ? bytes : 0, 4,
              true),
    };
    return CHECK_BUFFERS(call, needs);
}

/* Names of an MLP's buffers in messages. */
typedef struct mlp_names {
    const char *gate, *up, *down, *packed, *gate_bias, *up_bias, *down_bias;
} mlp_names;

#define MLP_NAMES(of)                                                                              \
    {                                                                                              \
        of ".gate", of ".up", of ".down", of ".packed", of ".gate_bias", of ".up_bias",            \
            of ".down_bias"                                                                        \
    }

static const mlp_names weights_names[] = {MLP_NAMES("weights.experts"),
                                          MLP_NAMES("weights.shared")}; /* by clmoe_mlp */
static const mlp_names raw_names = MLP_NAMES("raw");

mlp_rows check_mlp_rows(const clmoe_mlp_desc *mlp, size_t experts) {
    size_t rows = experts * mlp->hidden_dim;
    switch (mlp->gate_layout) {
    case CLMOE_GATE_CONCAT:
    case CLMOE_GATE_INTERLEAVED:
        return (mlp_rows){2 * rows, 0};
    case CLMOE_GATE_SEPARATE:
        return (mlp_rows){rows, rows};
    case CLMOE_GATE_NONE:
        break;
    }
    return (mlp_rows){0, rows};
}

static clmoe_status check_matrices(call_check *call, clmoe_mlp which,
                                   const clmoe_mlp_weights *weights, const mlp_names *names) {
    const clmoe_layer *layer = call->layer;
    const clmoe_mlp_desc *mlp = layer_mlp(layer, which);
    size_t experts = layer_mlp_use(layer, which)->shape.experts, dim = layer->desc.dim;
    size_t element = type_bytes(layer->desc.weight_type);
    mlp_rows rows = check_mlp_rows(mlp, experts);
    const buffer_need needs[] = {
        READS(names->gate, &weights->gate, bytes_of(rows.gate, dim, element), element, true),
        READS(names->up, &weights->up, bytes_of(rows.up, dim, element), element, true),
        READS(names->down, &weights->down, bytes_of(experts * mlp->hidden_dim, dim, element),
              element, true),
    };
    return CHECK_BUFFERS(call, needs);
}

static clmoe_status check_packed(call_check *call, clmoe_mlp which, const clmoe_buf *packed,
                                 const char *name, buffer_use use) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    buffer_need need = {name, packed, 0, type_bytes(layer->desc.weight_type), true, use};
    TRY(gemm_mlp_packed_bytes(layer_mlp_use(layer, which), layer_mlp(layer, which), layer->desc.dim,
                              &need.bytes));
    TRY(check_buffer(call, &need));
done:
    return status;
}

static clmoe_status check_mlp(call_check *call, clmoe_mlp which, const clmoe_mlp_weights *weights) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_mlp_desc *mlp = layer_mlp(layer, which);
    const mlp_names *names = &weights_names[which];
    size_t experts = layer_mlp_use(layer, which)->shape.experts;
    size_t element = type_bytes(layer->desc.weight_type);
    mlp_rows rows = check_mlp_rows(mlp, experts);
    const buffer_need biases[] = {
        READS(names->gate_bias, &weights->gate_bias, mlp->gate_up_bias ? rows.gate * element : 0,
              element, true),
        READS(names->up_bias, &weights->up_bias, mlp->gate_up_bias ? rows.up * element : 0, element,
              true),
        READS(names->down_bias, &weights->down_bias,
              mlp->down_bias ? bytes_of(experts, layer->desc.dim, element) : 0, element, true),
    };
    if (weights->packed.mem)
        TRY(check_packed(call, which, &weights->packed, names->packed, BUFFER_READ));
    else
        TRY(check_matrices(call, which, weights, names));
    TRY(CHECK_BUFFERS(call, biases));
done:
    return status;
}

static clmoe_status check_experts_weights(call_check *call, const clmoe_weights *weights) {
    return check_mlp(call, CLMOE_MLP_EXPERTS, &weights->experts);
}

static clmoe_status check_shared_weights(call_check *call, const clmoe_weights *weights) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    size_t element = type_bytes(layer->desc.router.weight_type);
    const buffer_need gate =
        READS("weights.shared_gate", &weights->shared_gate,
              layer->desc.shared_gate ? layer->desc.dim * element : 0, element, true);
    TRY(check_mlp(call, CLMOE_MLP_SHARED, &weights->shared));
    TRY(check_buffer(call, &gate));
done:
    return status;
}

static clmoe_status check_output_bias(call_check *call, const clmoe_weights *weights) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    size_t element = type_bytes(layer->desc.weight_type);
    if (!layer->desc.output_bias)
        return CLMOE_SUCCESS;
    TRY(check_weights_given(weights));
    const buffer_need bias = READS("weights.output_bias", &weights->output_bias,
                                   layer->desc.dim * element, element, true);
    TRY(check_buffer(call, &bias));
done:
    return status;
}

clmoe_status check_forward_weights(call_check *call, const clmoe_forward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_weights_given(args->weights));
    if (!args->ids_in.mem) {
        if (!args->logits_in.mem)
            TRY(check_router(call, args->weights));
        if (args->state.mem)
            TRY(check_noise_router(call, args->weights));
        TRY(check_group_router(call, args->weights));
        TRY(check_choice(call, args->weights, args->state));
    }
    TRY(check_experts_weights(call, args->weights));
    if (call->layer->desc.shared.hidden_dim)
        TRY(check_shared_weights(call, args->weights));
    TRY(check_output_bias(call, args->weights));
done:
    return status;
}

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
    if (layer_is_expert_choice(layer) && args->ids_in.mem)
        return fail(CLMOE_INVALID_ARGUMENT, "ids_in is given, but the policy is expert choice");
    if (!layer_is_expert_choice(layer) && args->token_offsets.mem)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "token_offsets is given, but the policy is not expert choice");
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
    };
    TRY(CHECK_BUFFERS(&call, needs));
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
    if (final_weights == 1 || !layer->desc.router.renorm.after_drop)
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
    bool expert_choice = layer_is_expert_choice(layer);
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4), tokens = args->tokens;
    const buffer_need needs[] = {
        READS("scores", &args->scores, bytes_of(tokens, layer->columns, 4), 4, true),
        UPDATES("ids", &args->ids, pairs, 4, true),
        UPDATES("pair_weights", &args->pair_weights, pairs, 4, true),
        WRITES("live", &args->live, bytes_of(tokens, 1, 4), 4, !expert_choice),
        UPDATES("token_offsets", &args->token_offsets,
                expert_choice ? bytes_of(tokens + 1, 1, 4) : 0, 4, true),
        READS("token_mask", &args->token_mask, tokens, 1, false),
        UPDATES("scratch", &args->scratch,
                policy == CLMOE_POLICY_TOKEN_CHOICE && !layer_rebalances(layer) ? 0
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
              layer_is_expert_choice(layer)),
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
    };
    TRY(CHECK_BUFFERS(&call, needs));
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
    };
    TRY(CHECK_BUFFERS(&call, needs));
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
              layer_is_expert_choice(layer)),
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

clmoe_status check_mlp_exists(const clmoe_layer *layer, clmoe_mlp mlp) {
    if (!layer)
        return fail(CLMOE_INVALID_ARGUMENT, "layer is NULL");
    if (mlp != CLMOE_MLP_EXPERTS && mlp != CLMOE_MLP_SHARED)
        return fail(CLMOE_INVALID_ARGUMENT, "mlp is %u, but must be 0 or 1", mlp);
    if (layer_mlp(layer, mlp)->hidden_dim == 0)
        return fail(CLMOE_INVALID_ARGUMENT, "mlp is CLMOE_MLP_SHARED, but the layer has none");
    return CLMOE_SUCCESS;
}

clmoe_status check_pack(const clmoe_layer *layer, const clmoe_pack_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_mlp_exists(layer, args->mlp));
    if (!args->raw)
        return fail(CLMOE_INVALID_ARGUMENT, "raw is NULL");
    TRY(is_unused("raw.reserved", args->raw->reserved, sizeof args->raw->reserved));
    TRY(check_packed(&call, args->mlp, &args->packed, "packed", BUFFER_WRITE));
    TRY(check_matrices(&call, args->mlp, args->raw, &raw_names));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_packed_read(const clmoe_layer *layer, clmoe_mlp mlp, clmoe_buf packed) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_mlp_exists(layer, mlp));
    TRY(check_packed(&call, mlp, &packed, "packed", BUFFER_READ));
    TRY(check_host_reads("packed", &packed));
done:
    return status;
}
