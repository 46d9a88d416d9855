/* Arguments of clmoe_backward(). */
#include "check_buffers.h"
#include "gradient_fields.h"
#include "runtime/structs.h"

clmoe_status check_training_layer(const clmoe_layer *layer) {
    if (layer->desc.training)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT,
                "the layer was made with training 0, and has no backward pass");
}

clmoe_status check_parts(clmoe_backward_parts parts, uint32_t accumulate) {
    if (parts > CLMOE_BACKWARD_WEIGHTS)
        return fail(CLMOE_INVALID_ARGUMENT, "parts is %u, but must be from 0 to %d", parts,
                    CLMOE_BACKWARD_WEIGHTS);
    if (accumulate > 1)
        return fail(CLMOE_INVALID_ARGUMENT, "accumulate is %u, but must be 0 or 1", accumulate);
    return CLMOE_SUCCESS;
}

clmoe_status check_dye(const clmoe_layer *layer, clmoe_buf dye) {
    if (dye.mem && !layer->desc.dye)
        return fail(CLMOE_INVALID_ARGUMENT, "dye is given, but the layer was made with dye 0");
    return CLMOE_SUCCESS;
}

/* What goes with ids of another router: no logits, and nothing of this layer's router. */
static clmoe_status check_choice_given(const clmoe_backward_args *args) {
    if (!args->ids_in.mem != !args->pair_weights_in.mem)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is given without %s",
                    args->ids_in.mem ? "ids_in" : "pair_weights_in",
                    args->ids_in.mem ? "pair_weights_in" : "ids_in");
    const struct {
        const char *name;
        cl_mem mem;
    } others[] = {
        {"logits_in", args->logits_in.mem},     {"dlogits", args->dlogits.mem},
        {"dnoise", args->dnoise.mem},           {"dgroup_logits", args->dgroup_logits.mem},
        {"dlogits_out", args->dlogits_out.mem},
    };
    for (size_t i = 0; args->ids_in.mem && i < sizeof others / sizeof others[0]; i++)
        if (others[i].mem)
            return fail(CLMOE_INVALID_ARGUMENT, "%s is given together with ids_in", others[i].name);
    return CLMOE_SUCCESS;
}

clmoe_status check_gradients(call_check *call, const clmoe_gradients *to, uint32_t accumulate) {
    clmoe_status status = CLMOE_SUCCESS;
    gradient_field fields[GRADIENT_FIELDS];
    if (!to)
        return CLMOE_SUCCESS;
    if (!struct_is_zero(to->reserved, 0, sizeof to->reserved))
        return fail(CLMOE_INVALID_ARGUMENT, "gradients.reserved is not 0");
    if (!struct_is_zero(to->experts.reserved, 0, sizeof to->experts.reserved))
        return fail(CLMOE_INVALID_ARGUMENT, "gradients.experts.reserved is not 0");
    if (!struct_is_zero(to->shared.reserved, 0, sizeof to->shared.reserved))
        return fail(CLMOE_INVALID_ARGUMENT, "gradients.shared.reserved is not 0");
    const size_t count = gradient_fields(call->layer, fields);
    for (size_t i = 0; i < count; i++) {
        const gradient_field *f = &fields[i];
        const buffer_need need = {
            .name = f->name,
            .buf = (const clmoe_buf *)(const void *)((const char *)to + f->offset),
            .bytes = bytes_of(f->elements, 1, f->element),
            .element = f->element,
            .use = accumulate ? BUFFER_UPDATE : BUFFER_WRITE};
        TRY(check_buffer(call, &need));
    }
done:
    return status;
}

/* Which of the batch's arrays go with the layer's policy. */
static clmoe_status check_backward_policy(const clmoe_layer *layer,
                                          const clmoe_backward_args *args) {
    const struct {
        const char *name;
        cl_mem mem;
    } unused[] = {
        {"logits_in", args->logits_in.mem},
        {"ids_in", args->ids_in.mem},
        {"pair_weights_in", args->pair_weights_in.mem},
        {"dlogits", args->dlogits.mem},
        {"dlogits_out", args->dlogits_out.mem},
        {"dpair_weights", args->dpair_weights.mem},
    };
    for (size_t i = 0; layer_is_soft_moe(layer) && i < sizeof unused / sizeof unused[0]; i++)
        if (unused[i].mem)
            return fail(CLMOE_INVALID_ARGUMENT, "%s is given, but the policy is Soft MoE",
                        unused[i].name);
    return CLMOE_SUCCESS;
}

/* That no gradient is asked for of what the forward did not use. */
static clmoe_status check_used(const clmoe_backward_args *args) {
    const clmoe_gradients *to = args->gradients;
    const bool ids = args->ids_in.mem != NULL, logits = ids || args->logits_in.mem != NULL;
    if (!to)
        return CLMOE_SUCCESS;
    const struct {
        const char *name;
        cl_mem mem;
        bool unused;
    } routers[] = {
        {"gradients.router", to->router.mem, logits},
        {"gradients.router_bias", to->router_bias.mem, logits},
        {"gradients.expert_scale", to->expert_scale.mem, ids},
        {"gradients.group_router", to->group_router.mem, ids},
        {"gradients.noise_router", to->noise_router.mem, ids || !args->state.mem},
    };
    for (size_t i = 0; i < sizeof routers / sizeof routers[0]; i++)
        if (routers[i].mem && routers[i].unused)
            return fail(CLMOE_INVALID_ARGUMENT, "%s is given, but %s", routers[i].name,
                        ids               ? "the ids are of another router"
                        : logits && i < 2 ? "the logits are of another router"
                                          : "there is no state, and so no noise");
    return CLMOE_SUCCESS;
}

/* Weights as forward reads them, but not packed: both GEMMs go through them the other way. */
static clmoe_status check_weights(call_check *call, const clmoe_backward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_forward_args forward = {.weights = args->weights ? &call->raw : NULL,
                                        .logits_in = args->logits_in,
                                        .ids_in = args->ids_in,
                                        .state = args->state};
    if (args->weights) {
        call->raw = *args->weights;
        call->raw.experts.packed = call->raw.shared.packed = (clmoe_buf){0};
    }
    TRY(check_forward_weights(call, &forward));
done:
    return status;
}

clmoe_status check_backward(const clmoe_layer *layer, const clmoe_backward_args *args) {
    call_check call = {.layer = layer, .in_place = {&args->dlogits, &args->dlogits_out}};
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws;
    TRY(check_head(layer, args->tokens, &ws));
    TRY(check_training_layer(layer));
    TRY(check_parts(args->parts, args->accumulate));
    TRY(check_dye(layer, args->dye));
    TRY(check_unused(args->reserved));
    TRY(check_backward_policy(layer, args));
    TRY(check_choice_given(args));
    TRY(check_used(args));
    const clmoe_router_desc *router = &layer->desc.router;
    const size_t element = type_bytes(layer->desc.type), tokens = args->tokens;
    const size_t rows = bytes_of(tokens, layer->desc.dim, element);
    const size_t columns = bytes_of(tokens, layer->columns, 4);
    const size_t pairs = bytes_of(ws.plan.pairs, 1, 4);
    const bool learned = router->noise.kind == CLMOE_NOISE_LEARNED;
    const size_t groups = router->groups.two_level ? router->groups.count : 0;
    const buffer_need needs[] = {
        READS("x", &args->x, rows, element, true),
        READS("token_mask", &args->token_mask, tokens, 1, false),
        READS("logits_in", &args->logits_in, columns, 4, false),
        READS("ids_in", &args->ids_in, pairs, 4, false),
        READS("pair_weights_in", &args->pair_weights_in, pairs, 4, false),
        READS("saved", &args->saved, ws.saved_bytes, 4, true),
        UPDATES("scratch", &args->scratch, ws.scratch_bytes, 4, true),
        READS("dy", &args->dy, rows, element, true),
        READS("dlogits", &args->dlogits, columns, 4, false),
        READS("dnoise", &args->dnoise, learned ? columns : 0, 4, false),
        READS("dgroup_logits", &args->dgroup_logits, bytes_of(tokens, groups, 4), 4, false),
        READS("dye", &args->dye, bytes_of(ws.plan.slots, layer->desc.dim, element), element, false),
        WRITES("dx", &args->dx, rows, element, false),
        UPDATES("dlogits_out", &args->dlogits_out, columns, 4, false),
        UPDATES("dpair_weights", &args->dpair_weights, pairs, 4, false),
    };
    TRY(CHECK_BUFFERS(&call, needs));
    TRY(check_plan_state(&call, &args->state));
    TRY(check_weights(&call, args));
    TRY(check_gradients(&call, args->gradients, args->accumulate));
    if (layer->experts.engine->blocks)
        TRY(check_host_reads("saved", &args->saved));
    TRY(check_overlaps(&call));
done:
    return status;
}
