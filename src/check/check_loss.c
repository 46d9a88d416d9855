/* Arguments of statistics and losses: buffers, and descriptors that contradict each other. */
#include "check_buffers.h"
#include "runtime/structs.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

/* What p of noisy logits, or of two levels, reads besides the logits: x again, and its routers. */
clmoe_status check_router_weights(call_check *call, const clmoe_weights *weights,
                                  const clmoe_buf *x, clmoe_buf state, uint32_t tokens) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &layer->desc.router;
    size_t type = type_bytes(router->weight_type), D = layer->desc.dim;
    size_t element = type_bytes(layer->desc.type);
    bool learned = state.mem && router->noise.kind == CLMOE_NOISE_LEARNED;
    if (!learned && !router->groups.two_level)
        return CLMOE_SUCCESS;
    TRY(check_weights_given(weights));
    const buffer_need needs[] = {
        READS("weights.noise_router", &weights->noise_router,
              learned ? bytes_of(layer->columns, D, type) : 0, type, learned),
        READS("weights.group_router", &weights->group_router,
              router->groups.two_level ? bytes_of(router->groups.count, D, type) : 0, type,
              router->groups.two_level),
        READS("x", x, bytes_of(tokens, D, element), element, true),
    };
    TRY(CHECK_BUFFERS(call, needs));
done:
    return status;
}

clmoe_status check_stats(const clmoe_layer *layer, const clmoe_stats_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    TRY(check_measures(layer, "stats"));
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4), tokens = args->tokens;
    const buffer_need needs[] = {
        READS("logits", &args->logits, bytes_of(tokens, layer->columns, 4), 4, false),
        READS("ids", &args->ids, pairs, 4, true),
        READS("pair_weights", &args->pair_weights, pairs, 4, false),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        READS("live", &args->live, bytes_of(tokens, 1, 4), 4, false),
        READS("token_mask", &args->token_mask, tokens, 1, false),
        READS("token_offsets", &args->token_offsets, bytes_of(tokens + 1, 1, 4), 4,
              layer_lists_pairs(layer)),
        READS("load_target", &args->load_target, bytes_of(layer->desc.num_experts, 1, 4), 4, false),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        WRITES("stats", &args->stats, layer_stats_bytes(layer), 4, true),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    if (args->logits.mem)
        TRY(check_router_weights(&call, args->weights, &args->x, args->state, args->tokens));
    TRY(check_overlaps(&call));
done:
    return status;
}

static clmoe_status refuse(uint32_t i, const clmoe_loss_desc *loss, const char *why) {
    return fail(CLMOE_INVALID_ARGUMENT, "losses[%u] is %s, %s", i, clmoe_loss_name(loss->kind),
                why);
}

static clmoe_status check_number(uint32_t i, const char *field, uint32_t value, uint32_t last) {
    if (value <= last)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "losses[%u].%s is %u, but must be from 0 to %u", i, field,
                value, last);
}

static clmoe_status check_fields(uint32_t i, const clmoe_loss_desc *loss) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_number(i, "kind", loss->kind, LOSS_KINDS - 1));
    TRY(check_number(i, "p_source", loss->p_source, CLMOE_P_WEIGHTS));
    TRY(check_number(i, "f_source", loss->f_source, CLMOE_F_SUPPLIED));
    TRY(check_number(i, "per_sequence", loss->per_sequence, 1));
    TRY(check_number(i, "per_device", loss->per_device, 1));
    TRY(check_number(i, "controlled", loss->controlled, 1));
    if (!isfinite(loss->weight))
        return fail(CLMOE_INVALID_ARGUMENT, "losses[%u].weight is %g, but must be finite", i,
                    (double)loss->weight);
    if (!isfinite(loss->beta) || loss->beta < 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "losses[%u].beta is %g, but must be finite and at least 0", i,
                    (double)loss->beta);
done:
    return status;
}

static bool is_importance(clmoe_loss_kind kind) {
    return kind == CLMOE_LOSS_IMPORTANCE_VARIANCE || kind == CLMOE_LOSS_IMPORTANCE_CV2;
}

/* Switches that a kind has no meaning for, or that the layer does not have. */
static clmoe_status check_kind(const clmoe_layer *layer, uint32_t i, const clmoe_loss_desc *loss) {
    const clmoe_layer_desc *desc = &layer->desc;
    bool totals = loss->f_source == CLMOE_F_EMA || loss->f_source == CLMOE_F_SUPPLIED;
    bool by_device = loss->per_device || loss->kind == CLMOE_LOSS_COMMUNICATION;
    if (loss->per_sequence && desc->capacity.tokens_per_sequence == 0)
        return refuse(i, loss, "per_sequence, but capacity.tokens_per_sequence is 0");
    if (loss->per_sequence && totals)
        return refuse(i, loss, "per_sequence, but f_source is of all sequences");
    if (by_device && desc->balance.device_groups == 0)
        return refuse(i, loss, "by device groups, but balance.device_groups is 0");
    if (loss->per_device && (loss->kind == CLMOE_LOSS_Z || loss->kind == CLMOE_LOSS_OVERFLOW ||
                             loss->kind == CLMOE_LOSS_TOKEN_ENTROPY))
        return refuse(i, loss, "which has no form per_device");
    if (loss->p_source == CLMOE_P_WEIGHTS && !is_importance(loss->kind))
        return refuse(i, loss, "but p_source weights is for the importance kinds only");
    if (loss->p_source == CLMOE_P_RAW && loss->kind == CLMOE_LOSS_TOKEN_ENTROPY)
        return refuse(i, loss, "but p_source raw is no distribution");
    if (loss->kind == CLMOE_LOSS_OVERFLOW && layer_is_dropless(layer))
        return refuse(i, loss, "but the layer has no capacity");
    if (loss->kind == CLMOE_LOSS_OVERFLOW && totals)
        return refuse(i, loss, "which needs counts, but f_source is a share");
    if (loss->kind == CLMOE_LOSS_COMMUNICATION && loss->f_source != CLMOE_F_ASSIGNED)
        return refuse(i, loss, "which counts the tokens sent, but f_source is another");
    return CLMOE_SUCCESS;
}

static clmoe_status check_smooth_load(const clmoe_layer *layer, uint32_t i,
                                      const clmoe_loss_desc *loss) {
    const clmoe_router_desc *router = &layer->desc.router;
    if (loss->kind != CLMOE_LOSS_SMOOTH_LOAD)
        return CLMOE_SUCCESS;
    if (router->noise.kind != CLMOE_NOISE_GAUSSIAN && router->noise.kind != CLMOE_NOISE_LEARNED)
        return refuse(i, loss, "which needs router.noise.kind gaussian or learned");
    if (layer->desc.top_k >= layer->desc.num_experts)
        return refuse(i, loss, "which needs top_k < num_experts");
    if (router->groups.count > 1 || router->select_bias)
        return refuse(i, loss, "which allows no groups and no select_bias");
    if (router->policy != CLMOE_POLICY_TOKEN_CHOICE)
        return refuse(i, loss, "which needs plain token choice");
    return CLMOE_SUCCESS;
}

/* What the gradient through the combine weights does not know. */
static clmoe_status check_weights_source(const clmoe_layer *layer, uint32_t i,
                                         const clmoe_loss_desc *loss) {
    const clmoe_router_desc *router = &layer->desc.router;
    const char *what = NULL;
    if (loss->p_source != CLMOE_P_WEIGHTS)
        return CLMOE_SUCCESS;
    if (router->score == CLMOE_SCORE_SPARSEMIXER)
        what = "router.score sparsemixer";
    if (router->groups.two_level)
        what = "router.groups.two_level";
    if (router->rebalance.iterations > 0)
        what = "router.rebalance.iterations";
    if (!what)
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED, "losses[%u].p_source is weights, which %s does not have yet", i,
                what);
}

/* What the descriptors need beside the layer. */
typedef struct loss_inputs {
    const clmoe_loss_desc *losses;
    size_t loss_size;
    uint32_t num_losses;
    bool has_state, has_weights, has_supplied;
} loss_inputs;

static clmoe_status check_inputs(uint32_t i, const clmoe_loss_desc *loss, const loss_inputs *in) {
    bool reads_state = loss->controlled || loss->kind == CLMOE_LOSS_SMOOTH_LOAD ||
                       (loss_reads_load(loss->kind) && loss->f_source == CLMOE_F_EMA);
    bool supplied = loss_reads_load(loss->kind) && loss->f_source == CLMOE_F_SUPPLIED;
    if (reads_state && !in->has_state)
        return refuse(i, loss, "which reads the state, but state is not given");
    if (supplied && !in->has_supplied)
        return refuse(i, loss, "f_source is supplied, but load_supplied is not given");
    if (loss->p_source == CLMOE_P_WEIGHTS && !in->has_weights)
        return refuse(i, loss, "p_source is weights, but pair_weights is not given");
    return CLMOE_SUCCESS;
}

enum { FIRST_LOSS_SIZE = 32, MOST_LOSS_SIZE = 1024 };
_Static_assert(FIRST_LOSS_SIZE == offsetof(clmoe_loss_desc, beta) + sizeof(float),
               "version 0.2 ends with beta");

clmoe_loss_desc loss_at(const clmoe_loss_desc *losses, size_t loss_size, uint32_t i) {
    const size_t size = loss_size ? loss_size : FIRST_LOSS_SIZE;
    clmoe_loss_desc loss = {0};
    memcpy(&loss, (const char *)losses + i * size, size < sizeof loss ? size : sizeof loss);
    return loss;
}

static clmoe_status check_loss_size(const loss_inputs *in) {
    const size_t size = in->loss_size;
    if (size == 0)
        return CLMOE_SUCCESS;
    if (size < FIRST_LOSS_SIZE || size > MOST_LOSS_SIZE || size % sizeof(uint32_t) != 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "loss_size is %zu, but must be 0, or a multiple of 4 from %d to %d", size,
                    FIRST_LOSS_SIZE, MOST_LOSS_SIZE);
    for (uint32_t i = 0; i < in->num_losses; i++)
        if (!struct_is_zero((const char *)in->losses + i * size, sizeof(clmoe_loss_desc), size))
            return fail(CLMOE_INVALID_ARGUMENT,
                        "loss_size is %zu, but this library knows %zu, and what follows in "
                        "losses[%u] is not 0",
                        size, sizeof(clmoe_loss_desc), i);
    return CLMOE_SUCCESS;
}

static clmoe_status check_descs(const clmoe_layer *layer, const loss_inputs *in) {
    clmoe_status status = CLMOE_SUCCESS;
    if (in->num_losses < 1 || in->num_losses > MAX_LOSSES)
        return fail(CLMOE_INVALID_ARGUMENT, "num_losses is %u, but must be from 1 to %d",
                    in->num_losses, MAX_LOSSES);
    if (!in->losses)
        return fail(CLMOE_INVALID_ARGUMENT, "losses is NULL");
    TRY(check_loss_size(in));
    for (uint32_t i = 0; i < in->num_losses; i++) {
        const clmoe_loss_desc loss = loss_at(in->losses, in->loss_size, i);
        TRY(check_fields(i, &loss));
        TRY(check_kind(layer, i, &loss));
        TRY(check_smooth_load(layer, i, &loss));
        TRY(check_weights_source(layer, i, &loss));
        TRY(check_inputs(i, &loss, in));
    }
done:
    return status;
}

enum { LOSS_OUTPUTS = 4 };

/* An output of losses. */
typedef struct loss_output {
    const char *name;
    cl_mem mem;
} loss_output;

/* That losses are asked for something, and something for losses; outputs[0] holds the values. */
static clmoe_status check_outputs(const loss_inputs *in, const loss_output outputs[LOSS_OUTPUTS]) {
    bool any = outputs[0].mem || outputs[1].mem || outputs[2].mem || outputs[3].mem;
    if (in->num_losses > 0 && !any)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "num_losses is %u, but neither %s nor %s nor %s nor %s is given",
                    in->num_losses, outputs[0].name, outputs[1].name, outputs[2].name,
                    outputs[3].name);
    for (int i = 0; in->num_losses == 0 && i < LOSS_OUTPUTS; i++)
        if (outputs[i].mem)
            return fail(CLMOE_INVALID_ARGUMENT, "%s is given, but num_losses is 0",
                        outputs[i].name);
    if (in->num_losses == 0 && in->losses)
        return fail(CLMOE_INVALID_ARGUMENT, "losses is given, but num_losses is 0");
    return CLMOE_SUCCESS;
}

/* Whether there is a gradient through the combine weights. */
static bool goes_through_weights(const clmoe_loss_args *args) {
    bool any = false;
    for (uint32_t i = 0; i < args->num_losses; i++)
        any = any || loss_at(args->losses, args->loss_size, i).p_source == CLMOE_P_WEIGHTS;
    return any && (args->dlogits.mem || args->dnoise.mem);
}

/* [T,groups.count] f32 of two levels; other layers do not write it. */
static size_t group_logits_bytes(const clmoe_layer *layer, size_t tokens) {
    const clmoe_router_desc *router = &layer->desc.router;
    return router->groups.two_level ? bytes_of(tokens, router->groups.count, 4) : 0;
}

clmoe_status check_loss(const clmoe_layer *layer, const clmoe_loss_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_step(layer, args->tokens, &ws));
    TRY(check_measures(layer, "loss"));
    const loss_inputs in = {args->losses,
                            args->loss_size,
                            args->num_losses,
                            args->state.mem != NULL,
                            args->pair_weights.mem != NULL,
                            args->load_supplied.mem != NULL};
    size_t pairs = bytes_of(ws.plan.pairs, 1, 4), tokens = args->tokens;
    size_t logits = bytes_of(tokens, layer->columns, 4);
    size_t experts = bytes_of(layer->desc.num_experts, 1, 4);
    const buffer_need needs[] = {
        READS("logits", &args->logits, logits, 4, true),
        READS("ids", &args->ids, pairs, 4, true),
        READS("pair_weights", &args->pair_weights, pairs, 4, false),
        READS("plan", &args->plan, ws.plan.bytes, 4, true),
        READS("live", &args->live, bytes_of(tokens, 1, 4), 4, false),
        READS("token_mask", &args->token_mask, tokens, 1, false),
        READS("token_offsets", &args->token_offsets, bytes_of(tokens + 1, 1, 4), 4,
              layer_lists_pairs(layer)),
        READS("load_target", &args->load_target, experts, 4, false),
        READS("load_supplied", &args->load_supplied, experts, 4, false),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        WRITES("values", &args->values, bytes_of(args->num_losses, 1, 4), 4, false),
        UPDATES("dlogits", &args->dlogits, logits, 4, false),
        UPDATES("dnoise", &args->dnoise, logits, 4, false),
        UPDATES("dgroup_logits", &args->dgroup_logits, group_logits_bytes(layer, tokens), 4, false),
    };
    const loss_output outputs[LOSS_OUTPUTS] = {{"values", args->values.mem},
                                               {"dlogits", args->dlogits.mem},
                                               {"dnoise", args->dnoise.mem},
                                               {"dgroup_logits", args->dgroup_logits.mem}};
    TRY(check_descs(layer, &in));
    TRY(check_outputs(&in, outputs));
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_state(&call, &args->state));
    TRY(check_router_weights(&call, args->weights, &args->x, args->state, args->tokens));
    if (goes_through_weights(args))
        TRY(check_expert_scale(&call, args->weights));
    TRY(check_overlaps(&call));
done:
    return status;
}

clmoe_status check_forward_losses(call_check *call, const clmoe_forward_args *args) {
    const clmoe_layer *layer = call->layer;
    clmoe_status status = CLMOE_SUCCESS;
    const loss_inputs in = {args->losses,
                            args->loss_size,
                            args->num_losses,
                            args->state.mem != NULL,
                            true,
                            args->load_supplied.mem != NULL};
    size_t logits = bytes_of(args->tokens, layer->columns, 4);
    size_t experts = bytes_of(layer->desc.num_experts, 1, 4);
    const buffer_need needs[] = {
        READS("load_target", &args->load_target, experts, 4, false),
        READS("load_supplied", &args->load_supplied, experts, 4, false),
        WRITES("loss_values", &args->loss_values, bytes_of(args->num_losses, 1, 4), 4, false),
        UPDATES("dlogits", &args->dlogits, logits, 4, false),
        UPDATES("dnoise", &args->dnoise, logits, 4, false),
        UPDATES("dgroup_logits", &args->dgroup_logits, group_logits_bytes(layer, args->tokens), 4,
                false),
    };
    const loss_output outputs[LOSS_OUTPUTS] = {{"loss_values", args->loss_values.mem},
                                               {"dlogits", args->dlogits.mem},
                                               {"dnoise", args->dnoise.mem},
                                               {"dgroup_logits", args->dgroup_logits.mem}};
    if (args->stats.mem)
        TRY(check_measures(layer, "stats"));
    if (args->num_losses > 0) {
        TRY(check_measures(layer, "loss"));
        TRY(check_descs(layer, &in));
        if (args->ids_in.mem)
            return fail(CLMOE_INVALID_ARGUMENT,
                        "num_losses is %u, but with ids_in there are no logits", args->num_losses);
    }
    TRY(check_outputs(&in, outputs));
    TRY(CHECK_BUFFERS(call, needs));
done:
    return status;
}

clmoe_status check_router_orthogonality(const clmoe_layer *layer,
                                        const clmoe_router_orthogonality_args *args) {
    call_check call = {.layer = layer};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_head(layer, 0, &ws));
    if (!layer->desc.balance.router_orthogonality)
        return fail(CLMOE_UNSUPPORTED, "the layer was made with balance.router_orthogonality 0");
    TRY(check_unused(args->reserved));
    TRY(check_weights_given(args->weights));
    if (!isfinite(args->weight))
        return fail(CLMOE_INVALID_ARGUMENT, "weight is %g, but must be finite",
                    (double)args->weight);
    if (!args->value.mem && !args->drouter.mem)
        return fail(CLMOE_INVALID_ARGUMENT, "neither value nor drouter is given");
    const clmoe_type type = layer->desc.router.weight_type;
    const size_t element = type_bytes(type), sum = type_bytes(layer_gradient_type(layer, type));
    const size_t rows = layer_router_rows(layer), dim = layer->desc.dim;
    const buffer_need needs[] = {
        READS("weights.router", &args->weights->router, bytes_of(rows, dim, element), element,
              true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        WRITES("value", &args->value, sizeof(cl_float), 4, false),
        UPDATES("drouter", &args->drouter, bytes_of(rows, dim, sum), sum, false),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_overlaps(&call));
done:
    return status;
}
