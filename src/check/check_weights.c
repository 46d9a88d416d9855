/* Weights of the public calls, packed ones too. */
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
clmoe_status check_noise_router(call_check *call, const clmoe_weights *weights) {
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
clmoe_status check_group_router(call_check *call, const clmoe_weights *weights) {
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
clmoe_status check_choice(call_check *call, const clmoe_weights *weights, clmoe_buf state) {
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

clmoe_status check_experts_weights(call_check *call, const clmoe_weights *weights) {
    return check_mlp(call, CLMOE_MLP_EXPERTS, &weights->experts);
}

clmoe_status check_shared_weights(call_check *call, const clmoe_weights *weights) {
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

clmoe_status check_output_bias(call_check *call, const clmoe_weights *weights) {
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

clmoe_status check_other_routers(call_check *call, const clmoe_weights *weights,
                                 const clmoe_buf *state) {
    clmoe_status status = CLMOE_SUCCESS;
    if (state->mem)
        TRY(check_noise_router(call, weights));
    if (call->layer->desc.router.groups.two_level)
        TRY(check_weights_given(weights));
    if (call->layer->desc.router.groups.two_level)
        TRY(check_group_router(call, weights));
done:
    return status;
}

clmoe_status check_raw_mlp(call_check *call, clmoe_mlp which, const clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_weights_given(weights));
    call->raw = *weights;
    call->raw.experts.packed = call->raw.shared.packed = (clmoe_buf){0};
    TRY(which == CLMOE_MLP_SHARED ? check_shared_weights(call, &call->raw)
                                  : check_experts_weights(call, &call->raw));
done:
    return status;
}

clmoe_status check_down_bias(call_check *call, const clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc *desc = &call->layer->desc;
    const size_t element = type_bytes(desc->weight_type);
    if (!desc->experts.down_bias)
        return CLMOE_SUCCESS;
    TRY(check_weights_given(weights));
    const buffer_need bias = READS("weights.experts.down_bias", &weights->experts.down_bias,
                                   bytes_of(desc->num_experts, desc->dim, element), element, true);
    TRY(check_buffer(call, &bias));
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
