/* Arguments of the public calls. */
#include "check_buffers.h"

size_t bytes_of(size_t rows, size_t columns, size_t element) {
    size_t elements, bytes;
    return size_mul(rows, columns, &elements) && size_mul(elements, element, &bytes) ? bytes
                                                                                     : SIZE_MAX;
}

clmoe_status check_buffer(const clmoe_layer *layer, const buffer_need *need) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t size = 0, end;
    cl_context context = NULL;
    const clmoe_buf *buf = need->buf;
    if (need->bytes == 0)
        return CLMOE_SUCCESS;
    if (!buf->mem) {
        if (need->required)
            return fail(CLMOE_INVALID_ARGUMENT, "%s is not given, but needs %zu bytes", need->name,
                        need->bytes);
        return CLMOE_SUCCESS;
    }
    TRY(CL(clGetMemObjectInfo(buf->mem, CL_MEM_SIZE, sizeof size, &size, NULL)));
    TRY(CL(clGetMemObjectInfo(buf->mem, CL_MEM_CONTEXT, sizeof context, (void *)&context, NULL)));
    if (context != layer->context->cl)
        return fail(CLMOE_INVALID_ARGUMENT, "%s belongs to another OpenCL context", need->name);
    if (buf->offset % need->element != 0)
        return fail(CLMOE_INVALID_ARGUMENT, "%s.offset is %zu, but must be a multiple of %zu",
                    need->name, buf->offset, need->element);
    if (!size_add(buf->offset, need->bytes, &end) || end > size)
        return fail(CLMOE_INVALID_ARGUMENT, "%s has %zu bytes, but needs %zu from offset %zu",
                    need->name, size, need->bytes, buf->offset);
done:
    if (status == CL_INVALID_MEM_OBJECT)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is not a valid OpenCL buffer: %s", need->name,
                    clmoe_status_string(status));
    return status;
}

clmoe_status check_buffers(const clmoe_layer *layer, const buffer_need *needs, size_t count) {
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t i = 0; i < count; i++)
        TRY(check_buffer(layer, &needs[i]));
done:
    return status;
}

clmoe_status check_head(const clmoe_layer *layer, const void *args, size_t expected,
                        workspace_layout *ws) {
    if (!layer || !args)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", layer ? "args" : "layer");
    const struct {
        size_t struct_size;
        uint32_t tokens;
    } *head = args;
    if (head->struct_size != expected)
        return fail(CLMOE_INVALID_ARGUMENT, "args.struct_size is %zu, but this library knows %zu",
                    head->struct_size, expected);
    return workspace_layout_get(layer, head->tokens, ws);
}

clmoe_status check_step(const clmoe_layer *layer, const void *args, size_t expected,
                        workspace_layout *ws) {
    clmoe_status status = check_head(layer, args, expected, ws);
    if (status == CLMOE_SUCCESS && layer_is_soft_moe(layer))
        return fail(CLMOE_UNSUPPORTED, "router.policy is Soft MoE, which has no such step");
    return status;
}

clmoe_status check_weights_given(const clmoe_weights *weights) {
    return weights ? CLMOE_SUCCESS : fail(CLMOE_INVALID_ARGUMENT, "weights is NULL");
}

static clmoe_status check_router(const clmoe_layer *layer, const clmoe_weights *weights) {
    const clmoe_router_desc *router = &layer->desc.router;
    size_t element = type_bytes(router->weight_type);
    const buffer_need needs[] = {
        {"weights.router", &weights->router,
         bytes_of(layer_router_rows(layer), layer->desc.dim, element), element, true},
        {"weights.router_bias", &weights->router_bias,
         router->bias ? bytes_of(layer->columns, 1, 4) : 0, 4, true},
    };
    return CHECK_BUFFERS(layer, needs);
}

/* With a state. */
static clmoe_status check_noise_router(const clmoe_layer *layer, const clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t element = type_bytes(layer->desc.router.weight_type);
    if (layer->desc.router.noise != CLMOE_NOISE_LEARNED)
        return CLMOE_SUCCESS;
    TRY(check_weights_given(weights));
    const buffer_need need = {"weights.noise_router", &weights->noise_router,
                              bytes_of(layer->columns, layer->desc.dim, element), element, true};
    TRY(check_buffer(layer, &need));
done:
    return status;
}

clmoe_status check_state(const clmoe_layer *layer, const clmoe_buf *state) {
    const buffer_need need = {"state", state, layer_state_bytes(layer), 4, false};
    return check_buffer(layer, &need);
}

/* The state of a step that gives places to pairs. */
static clmoe_status check_plan_state(const clmoe_layer *layer, const clmoe_buf *state) {
    if (layer_keep(layer) == CLMOE_KEEP_RANDOM && !state->mem)
        return fail(CLMOE_INVALID_ARGUMENT, "state is not given, but capacity.keep is random");
    return check_state(layer, state);
}

/* weights.group_router; also needed with external logits. */
static clmoe_status check_group_router(const clmoe_layer *layer, const clmoe_weights *weights) {
    const clmoe_router_desc *router = &layer->desc.router;
    size_t element = type_bytes(router->weight_type);
    const buffer_need need = {
        "weights.group_router", &weights->group_router,
        router->two_level ? bytes_of(router->num_groups, layer->desc.dim, element) : 0, element,
        true};
    return check_buffer(layer, &need);
}

clmoe_status check_expert_scale(const clmoe_layer *layer, const clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!layer->desc.router.expert_scale)
        return CLMOE_SUCCESS;
    TRY(check_weights_given(weights));
    const buffer_need need = {"weights.expert_scale", &weights->expert_scale,
                              bytes_of(layer->columns, 1, 4), 4, true};
    TRY(check_buffer(layer, &need));
done:
    return status;
}

/* Where weights has no select_bias, that of the state is used. */
static clmoe_status check_choice(const clmoe_layer *layer, const clmoe_weights *weights,
                                 clmoe_buf state) {
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
        {"weights.select_bias", &weights->select_bias, router->select_bias ? bytes : 0, 4, false},
        {"weights.expert_scale", &weights->expert_scale, router->expert_scale ? bytes : 0, 4, true},
    };
    return CHECK_BUFFERS(layer, needs);
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

/* Rows of the stored matrices gate and up, of all experts; one buffer may hold both. */
typedef struct mlp_rows {
    size_t gate, up;
} mlp_rows;

static mlp_rows rows_of(const clmoe_mlp_desc *mlp, size_t experts) {
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

static clmoe_status check_matrices(const clmoe_layer *layer, clmoe_mlp which,
                                   const clmoe_mlp_weights *weights, const mlp_names *names) {
    const clmoe_mlp_desc *mlp = layer_mlp(layer, which);
    size_t experts = layer_mlp_use(layer, which)->shape.experts, dim = layer->desc.dim;
    size_t element = type_bytes(layer->desc.weight_type);
    mlp_rows rows = rows_of(mlp, experts);
    const buffer_need needs[] = {
        {names->gate, &weights->gate, bytes_of(rows.gate, dim, element), element, true},
        {names->up, &weights->up, bytes_of(rows.up, dim, element), element, true},
        {names->down, &weights->down, bytes_of(experts * mlp->hidden_dim, dim, element), element,
         true},
    };
    return CHECK_BUFFERS(layer, needs);
}

static clmoe_status check_packed(const clmoe_layer *layer, clmoe_mlp which, const clmoe_buf *packed,
                                 const char *name) {
    clmoe_status status = CLMOE_SUCCESS;
    buffer_need need = {name, packed, 0, type_bytes(layer->desc.weight_type), true};
    TRY(gemm_mlp_packed_bytes(layer_mlp_use(layer, which), layer_mlp(layer, which), layer->desc.dim,
                              &need.bytes));
    TRY(check_buffer(layer, &need));
done:
    return status;
}

static clmoe_status check_mlp(const clmoe_layer *layer, clmoe_mlp which,
                              const clmoe_mlp_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_mlp_desc *mlp = layer_mlp(layer, which);
    const mlp_names *names = &weights_names[which];
    size_t experts = layer_mlp_use(layer, which)->shape.experts;
    size_t element = type_bytes(layer->desc.weight_type);
    mlp_rows rows = rows_of(mlp, experts);
    const buffer_need biases[] = {
        {names->gate_bias, &weights->gate_bias, mlp->gate_up_bias ? rows.gate * element : 0,
         element, true},
        {names->up_bias, &weights->up_bias, mlp->gate_up_bias ? rows.up * element : 0, element,
         true},
        {names->down_bias, &weights->down_bias,
         mlp->down_bias ? bytes_of(experts, layer->desc.dim, element) : 0, element, true},
    };
    if (weights->packed.mem)
        TRY(check_packed(layer, which, &weights->packed, names->packed));
    else
        TRY(check_matrices(layer, which, weights, names));
    TRY(CHECK_BUFFERS(layer, biases));
done:
    return status;
}

static clmoe_status check_experts_weights(const clmoe_layer *layer, const clmoe_weights *weights) {
    return check_mlp(layer, CLMOE_MLP_EXPERTS, &weights->experts);
}

static clmoe_status check_dense_weights(const clmoe_layer *layer, const clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t dim = layer->desc.dim, router = type_bytes(layer->desc.router.weight_type);
    size_t weight = type_bytes(layer->desc.weight_type);
    if (layer->desc.shared.hidden_dim)
        TRY(check_mlp(layer, CLMOE_MLP_SHARED, &weights->shared));
    const buffer_need needs[] = {
        {"weights.shared_gate", &weights->shared_gate, layer->desc.shared_gate ? dim * router : 0,
         router, true},
        {"weights.output_bias", &weights->output_bias, layer->desc.output_bias ? dim * weight : 0,
         weight, true},
    };
    TRY(CHECK_BUFFERS(layer, needs));
done:
    return status;
}

static clmoe_status check_forward_weights(const clmoe_layer *layer,
                                          const clmoe_forward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_weights_given(args->weights));
    if (!args->ids_in.mem) {
        if (!args->logits_in.mem)
            TRY(check_router(layer, args->weights));
        if (args->state.mem)
            TRY(check_noise_router(layer, args->weights));
        TRY(check_group_router(layer, args->weights));
        TRY(check_choice(layer, args->weights, args->state));
    }
    TRY(check_experts_weights(layer, args->weights));
    TRY(check_dense_weights(layer, args->weights));
done:
    return status;
}

/* Whether the engine can address the rows xe, or x, of all experts, and what it makes of them. */
static clmoe_status check_experts_rows(const clmoe_layer *layer, const workspace_layout *ws,
                                       const clmoe_weights *weights, clmoe_buf rows,
                                       clmoe_buf scratch, clmoe_buf ye) {
    const clmoe_buf none = {0};
    const gemm_problem problem = {
        .slots = ws->plan.slots, .experts = layer->desc.num_experts, .a = rows};
    return gemm_mlp_check(&layer->experts, &layer->desc.experts, &weights->experts, layer->desc.dim,
                          &problem, workspace_region(ws, REGION_HIDDEN, none, scratch),
                          workspace_region(ws, REGION_ENGINE, none, scratch), ye);
}

/* The same for a forward, with the shared expert. */
static clmoe_status check_forward_engine(const clmoe_layer *layer, const workspace_layout *ws,
                                         const clmoe_forward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool jittered = args->state.mem && layer->desc.router.jitter_experts;
    const clmoe_buf saved = args->saved, scratch = args->scratch;
    const clmoe_buf x = jittered ? workspace_region(ws, REGION_JITTERED, saved, scratch) : args->x;
    const clmoe_buf xe = workspace_region(ws, REGION_XE, saved, scratch);
    const gemm_problem tokens = {.slots = args->tokens, .experts = 1, .a = x};
    TRY(check_experts_rows(layer, ws, args->weights, xe.mem ? xe : x, scratch,
                           workspace_region(ws, REGION_YE, saved, scratch)));
    if (layer->desc.shared.hidden_dim)
        TRY(gemm_mlp_check(&layer->shared, &layer->desc.shared, &args->weights->shared,
                           layer->desc.dim, &tokens,
                           workspace_region(ws, REGION_SHARED_HIDDEN, saved, scratch),
                           workspace_region(ws, REGION_ENGINE, saved, scratch),
                           workspace_region(ws, REGION_SHARED_Y, saved, scratch)));
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
        {"logits_in", args->logits_in.mem},     {"ids_in", args->ids_in.mem},
        {"logits", args->logits.mem},           {"ids", args->ids.mem},
        {"weights_out", args->weights_out.mem}, {"stats", args->stats.mem},
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
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_head(layer, args, sizeof *args, &ws));
    TRY(check_forward_policy(layer, args));
    if (!args->ids_in.mem != !args->weights_in.mem)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is given without %s",
                    args->ids_in.mem ? "ids_in" : "weights_in",
                    args->ids_in.mem ? "weights_in" : "ids_in");
    if (args->ids_in.mem && (args->logits_in.mem || args->logits.mem))
        return fail(CLMOE_INVALID_ARGUMENT, "%s is given together with ids_in",
                    args->logits_in.mem ? "logits_in" : "logits");
    size_t element = type_bytes(layer->desc.type);
    size_t rows = bytes_of(args->tokens, layer->desc.dim, element);
    size_t columns = bytes_of(args->tokens, layer->columns, 4);
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4);
    const buffer_need needs[] = {
        {"x", &args->x, rows, element, true},
        {"token_mask", &args->token_mask, args->tokens, 1, false},
        {"residual", &args->residual, rows, element, false},
        {"logits_in", &args->logits_in, columns, 4, false},
        {"ids_in", &args->ids_in, pairs, 4, false},
        {"weights_in", &args->weights_in, pairs, 4, false},
        {"saved", &args->saved, ws.saved_bytes, 4, true},
        {"scratch", &args->scratch, ws.scratch_bytes, 4, true},
        {"y", &args->y, rows, element, true},
        {"logits", &args->logits, columns, 4, false},
        {"ids", &args->ids, pairs, 4, false},
        {"weights_out", &args->weights_out, pairs, 4, false},
        {"token_offsets", &args->token_offsets, bytes_of((size_t)args->tokens + 1, 1, 4), 4, false},
        {"stats", &args->stats, clmoe_stats_size(layer), 4, false},
    };
    TRY(CHECK_BUFFERS(layer, needs));
    TRY(check_plan_state(layer, &args->state));
    TRY(check_forward_weights(layer, args));
    TRY(check_forward_losses(layer, args));
    TRY(check_forward_engine(layer, &ws, args));
done:
    return status;
}

clmoe_status check_score(const clmoe_layer *layer, const clmoe_score_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args, sizeof *args, &ws));
    const clmoe_router_desc *router = &layer->desc.router;
    bool external = args->logits_in.mem != NULL, two_level = router->two_level;
    bool noisy = args->state.mem && layer_is_noisy(layer);
    bool jittered = args->state.mem && router->jitter > 0 && !external;
    bool reads_x = !external || two_level || (noisy && router->noise == CLMOE_NOISE_LEARNED);
    size_t element = type_bytes(layer->desc.type);
    size_t columns = bytes_of(args->tokens, layer->columns, 4);
    const buffer_need needs[] = {
        {"x", &args->x, bytes_of(args->tokens, layer->desc.dim, element), element, reads_x},
        {"logits_in", &args->logits_in, columns, 4, false},
        {"logits", &args->logits, columns, 4, !external},
        {"scores", &args->scores, columns, 4, true},
        {"scratch", &args->scratch, ws.scratch_bytes, 4, noisy || jittered || two_level},
    };
    TRY(CHECK_BUFFERS(layer, needs));
    TRY(check_state(layer, &args->state));
    if (!external || two_level)
        TRY(check_weights_given(args->weights));
    if (!external)
        TRY(check_router(layer, args->weights));
    if (noisy)
        TRY(check_noise_router(layer, args->weights));
    if (two_level)
        TRY(check_group_router(layer, args->weights));
done:
    return status;
}

clmoe_status check_topk(const clmoe_layer *layer, const clmoe_topk_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args, sizeof *args, &ws));
    clmoe_policy policy = layer->desc.router.policy;
    bool expert_choice = layer_is_expert_choice(layer);
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4), tokens = args->tokens;
    const buffer_need needs[] = {
        {"scores", &args->scores, bytes_of(tokens, layer->columns, 4), 4, true},
        {"ids", &args->ids, pairs, 4, true},
        {"weights_out", &args->weights_out, pairs, 4, true},
        {"live", &args->live, bytes_of(tokens, 1, 4), 4, !expert_choice},
        {"token_offsets", &args->token_offsets, expert_choice ? bytes_of(tokens + 1, 1, 4) : 0, 4,
         true},
        {"token_mask", &args->token_mask, tokens, 1, false},
        {"scratch", &args->scratch,
         policy == CLMOE_POLICY_TOKEN_CHOICE && !layer_rebalances(layer) ? 0 : ws.scratch_bytes, 4,
         true},
    };
    TRY(CHECK_BUFFERS(layer, needs));
    TRY(check_state(layer, &args->state));
    if (layer->desc.router.select_bias || layer->desc.router.expert_scale)
        TRY(check_choice(layer, args->weights, args->state));
done:
    return status;
}

/* What overflow reroute reads and writes besides. */
static clmoe_status check_reroute(const clmoe_layer *layer, const clmoe_plan_args *args,
                                  size_t pairs) {
    clmoe_status status = CLMOE_SUCCESS;
    const buffer_need needs[] = {
        {"scores", &args->scores, bytes_of(args->tokens, layer->columns, 4), 4, true},
        {"pair_weights", &args->pair_weights, pairs, 4, true},
    };
    TRY(CHECK_BUFFERS(layer, needs));
    TRY(check_expert_scale(layer, args->weights));
done:
    return status;
}

clmoe_status check_plan(const clmoe_layer *layer, const clmoe_plan_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args, sizeof *args, &ws));
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4), tokens = args->tokens;
    const buffer_need needs[] = {
        {"ids", &args->ids, pairs, 4, true},
        {"pair_weights", &args->pair_weights, pairs, 4, false},
        {"live", &args->live, bytes_of(tokens, 1, 4), 4, false},
        {"token_mask", &args->token_mask, tokens, 1, false},
        {"token_offsets", &args->token_offsets, bytes_of(tokens + 1, 1, 4), 4,
         layer_is_expert_choice(layer)},
        {"scratch", &args->scratch, ws.scratch_bytes, 4, true},
        {"plan", &args->plan, ws.plan.bytes, 4, true},
    };
    TRY(CHECK_BUFFERS(layer, needs));
    TRY(check_plan_state(layer, &args->state));
    bool by_weight = layer_sorts(layer) && layer_keep(layer) != CLMOE_KEEP_RANDOM;
    if (by_weight && !args->pair_weights.mem && pairs > 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "pair_weights is not given, but the capacity's keep rule ranks by weight");
    if (layer_reroutes(layer))
        TRY(check_reroute(layer, args, pairs));
done:
    return status;
}

clmoe_status check_dispatch(const clmoe_layer *layer, const clmoe_dispatch_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args, sizeof *args, &ws));
    size_t element = type_bytes(layer->desc.type);
    const buffer_need needs[] = {
        {"x", &args->x, bytes_of(args->tokens, layer->desc.dim, element), element, true},
        {"plan", &args->plan, ws.plan.bytes, 4, true},
        {"xe", &args->xe, bytes_of(ws.plan.slots, layer->desc.dim, element), element, true},
    };
    TRY(CHECK_BUFFERS(layer, needs));
done:
    return status;
}

clmoe_status check_experts(const clmoe_layer *layer, const clmoe_experts_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args, sizeof *args, &ws));
    bool gathers = layer->experts.engine->gathers;
    bool weighted = layer->desc.router.weight_at != CLMOE_WEIGHT_AT_OUTPUT;
    size_t element = type_bytes(layer->desc.type);
    size_t slot_rows = bytes_of(ws.plan.slots, layer->desc.dim, element);
    const buffer_need needs[] = {
        {"x", &args->x, bytes_of(args->tokens, layer->desc.dim, element), element,
         gathers && !args->xe.mem},
        {"xe", &args->xe, slot_rows, element, !gathers},
        {"pair_weights", &args->pair_weights, bytes_of(ws.plan.pairs, 1, 4), 4, weighted},
        {"plan", &args->plan, ws.plan.bytes, 4, true},
        {"scratch", &args->scratch, ws.scratch_bytes, 4, true},
        {"ye", &args->ye, slot_rows, element, true},
    };
    TRY(CHECK_BUFFERS(layer, needs));
    TRY(check_weights_given(args->weights));
    TRY(check_experts_weights(layer, args->weights));
    TRY(check_experts_rows(layer, &ws, args->weights, args->xe.mem ? args->xe : args->x,
                           args->scratch, args->ye));
done:
    return status;
}

clmoe_status check_combine(const clmoe_layer *layer, const clmoe_combine_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args, sizeof *args, &ws));
    size_t element = type_bytes(layer->desc.type), tokens = args->tokens;
    size_t rows = bytes_of(tokens, layer->desc.dim, element);
    bool gated = layer->desc.shared_gate && args->shared.mem;
    const buffer_need needs[] = {
        {"x", &args->x, rows, element, layer->desc.num_identity_experts > 0},
        {"ye", &args->ye, bytes_of(ws.plan.slots, layer->desc.dim, element), element, true},
        {"pair_weights", &args->pair_weights, bytes_of(ws.plan.pairs, 1, 4), 4, true},
        {"plan", &args->plan, ws.plan.bytes, 4, true},
        {"token_mask", &args->token_mask, tokens, 1, false},
        {"token_offsets", &args->token_offsets, bytes_of(tokens + 1, 1, 4), 4,
         layer_is_expert_choice(layer)},
        {"shared", &args->shared, rows, element, false},
        {"shared_gate", &args->shared_gate, bytes_of(tokens, 1, 4), 4, gated},
        {"residual", &args->residual, rows, element, false},
        {"y", &args->y, rows, element, true},
    };
    TRY(CHECK_BUFFERS(layer, needs));
    if (layer->desc.output_bias) {
        TRY(check_weights_given(args->weights));
        const buffer_need bias = {"weights.output_bias", &args->weights->output_bias,
                                  bytes_of(layer->desc.dim, 1, type_bytes(layer->desc.weight_type)),
                                  type_bytes(layer->desc.weight_type), true};
        TRY(check_buffer(layer, &bias));
    }
done:
    return status;
}

clmoe_status check_mlp_exists(const clmoe_layer *layer, clmoe_mlp mlp) {
    if (!layer)
        return fail(CLMOE_INVALID_ARGUMENT, "layer is NULL");
    if ((int)mlp != CLMOE_MLP_EXPERTS && (int)mlp != CLMOE_MLP_SHARED)
        return fail(CLMOE_INVALID_ARGUMENT, "mlp is %d, but must be 0 or 1", (int)mlp);
    if (layer_mlp(layer, mlp)->hidden_dim == 0)
        return fail(CLMOE_INVALID_ARGUMENT, "mlp is CLMOE_MLP_SHARED, but the layer has none");
    return CLMOE_SUCCESS;
}

clmoe_status check_pack(const clmoe_layer *layer, clmoe_mlp mlp, const clmoe_mlp_weights *raw,
                        clmoe_buf packed) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_mlp_exists(layer, mlp));
    if (!raw)
        return fail(CLMOE_INVALID_ARGUMENT, "raw is NULL");
    TRY(check_packed(layer, mlp, &packed, "packed"));
    TRY(check_matrices(layer, mlp, raw, &raw_names));
done:
    return status;
}
