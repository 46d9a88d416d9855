/* The steps of the backward pass as public calls; calls.c has those of forward. */
#include "back.h"
#include "check/check.h"
#include "runtime/structs.h"

/* What calls with gradients have in common. */
#define BIND_GRADIENTS(b, args)                                                                    \
    ((b)->accumulate = (args)->accumulate != 0,                                                    \
     (b)->gradients = (args)->gradients ? *(args)->gradients : (clmoe_gradients){0})

static clmoe_status experts_backward(batch *b, launch *chain,
                                     const clmoe_experts_backward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    bind_raw_weights(b, args->weights);
    BIND_GRADIENTS(b, args);
    b->scratch = args->scratch;
    b->experts_x = args->x;
    b->pair_weights = args->pair_weights;
    b->plan = args->plan;
    b->z = args->z;
    b->z_again = args->z.mem == NULL;
    b->state = args->state;
    b->dy = args->dy;
    b->dye = args->dye;
    b->dxe = args->dxe;
    b->dots = args->dots;
    if (b->z_again)
        b->z = region(b, REGION_Z);
    if (back_has_data(args->parts))
        TRY(back_experts(b, chain));
    if (back_has_weights(args->parts, args->gradients))
        TRY(back_experts_gradients(b, chain));
done:
    return status;
}

static clmoe_status combine_backward(batch *b, launch *chain,
                                     const clmoe_combine_backward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    bind_raw_weights(b, args->weights);
    BIND_GRADIENTS(b, args);
    b->experts_x = args->x;
    b->ids = args->ids;
    b->plan = args->plan;
    b->token_mask = args->token_mask;
    b->token_offsets = args->token_offsets;
    b->dy = args->dy;
    b->dye = args->dye;
    b->dxe = args->dxe;
    b->dots = args->dots;
    b->dpair_weights = args->dpair_weights;
    TRY(step_combine_backward(b, chain));
    if (b->layer->desc.output_bias)
        TRY(step_output_bias_gradient(b, chain));
done:
    return status;
}

static clmoe_status shared_expert_backward(batch *b, launch *chain,
                                           const clmoe_shared_expert_backward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    bind_raw_weights(b, args->weights);
    BIND_GRADIENTS(b, args);
    b->scratch = args->scratch;
    b->experts_x = args->x;
    b->token_mask = args->token_mask;
    b->shared_gate = args->shared_gate;
    b->shared_z = args->z;
    b->z_again = args->z.mem == NULL;
    b->state = args->state;
    b->dy = args->dy;
    b->shared_dx = args->shared_dx;
    if (b->z_again)
        b->shared_z = region(b, REGION_SHARED_Z);
    TRY(back_unmasked(b, chain));
    if (back_has_data(args->parts))
        TRY(step_shared_backward(b, chain));
    if (back_has_weights(args->parts, args->gradients))
        TRY(step_shared_gradients(b, chain));
done:
    return status;
}

/* Noise and group logits as forward made them. */
static clmoe_status logits_again(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    if (b->state.mem && layer_is_noisy(b->layer))
        TRY(step_noise(b, chain, false));
    if (b->layer->desc.router.groups.two_level)
        TRY(step_group_logits(b, chain));
done:
    return status;
}

static clmoe_status topk_backward(batch *b, launch *chain, const clmoe_topk_backward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    bind_raw_weights(b, args->weights);
    BIND_GRADIENTS(b, args);
    b->scratch = args->scratch;
    b->x = args->x;
    b->jittered = region(b, REGION_JITTERED);
    b->logits = args->logits;
    b->ids = args->ids;
    b->live = layer_live(b->layer, args->live);
    b->plan = args->plan;
    b->token_mask = args->token_mask;
    b->token_offsets = args->token_offsets;
    b->routed = true;
    b->state = args->state;
    b->dpair_weights = args->dpair_weights;
    b->dlogits = args->dlogits;
    b->dnoise = args->dnoise;
    b->dgroup_logits = args->dgroup_logits;
    b->dlogits_out = args->dlogits_out;
    b->dnoise_out = args->dnoise_out;
    b->dgroup_out = args->dgroup_logits_out;
    TRY(logits_again(b, chain));
    TRY(step_topk_backward(b, chain));
    if (b->layer->desc.router.expert_scale)
        TRY(step_expert_scale_gradient(b, chain));
done:
    return status;
}

/* Of [T,D]. */
static size_t rows_bytes(const batch *b) {
    return (size_t)b->tokens * b->layer->desc.dim * type_bytes(b->layer->desc.type);
}

static clmoe_status score_backward(batch *b, launch *chain, const clmoe_score_backward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    bind_raw_weights(b, args->weights);
    BIND_GRADIENTS(b, args);
    b->scratch = args->scratch;
    b->x = args->x;
    b->token_mask = args->token_mask;
    b->state = args->state;
    b->routed = true;
    b->logits_given = args->logits_given != 0;
    b->dlogits_out = args->dlogits;
    b->dnoise_out = args->dnoise;
    b->dgroup_out = args->dgroup_logits;
    b->router_dx = args->router_dx;
    b->jittered = region(b, REGION_JITTERED);
    TRY(back_prepare(b, chain));
    if (back_has_data(args->parts))
        TRY(step_score_backward(b, chain));
    if (back_has_data(args->parts) && !b->router_dx_begun)
        TRY(launch_zero(chain, b->router_dx, rows_bytes(b)));
    if (back_has_weights(args->parts, args->gradients))
        TRY(back_routers_gradients(b, chain));
done:
    return status;
}

static clmoe_status dispatch_backward(batch *b, launch *chain,
                                      const clmoe_dispatch_backward_args *args) {
    b->pair_weights = args->pair_weights;
    b->plan = args->plan;
    b->token_mask = args->token_mask;
    b->token_offsets = args->token_offsets;
    b->state = args->state;
    b->dy = args->dy;
    b->dxe = args->dxe;
    b->shared_dx = args->shared_dx;
    b->router_dx = args->router_dx;
    b->router_dx_begun = args->router_dx.mem != NULL;
    b->dx = args->dx;
    return back_dispatch(b, chain);
}

#define DEFINE_CALL(name)                                                                          \
    clmoe_status clmoe_##name(clmoe_layer *layer, cl_command_queue queue,                          \
                              const clmoe_##name##_args *args, cl_uint num_wait,                   \
                              const cl_event *wait, cl_event *event) {                             \
        clmoe_status status = CLMOE_SUCCESS;                                                       \
        launch chain = {0};                                                                        \
        batch b = {.layer = layer};                                                                \
        clmoe_##name##_args own = {0};                                                             \
        TRY(STRUCT_TAKE_ARGS(args, &own));                                                         \
        TRY(check_##name(layer, &own));                                                            \
        TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));                          \
        b.tokens = own.tokens;                                                                     \
        TRY(workspace_layout_get(layer, own.tokens, &b.ws));                                       \
        TRY(name(&b, &chain, &own));                                                               \
    done:                                                                                          \
        return launch_end(&chain, status, event);                                                  \
    }

DEFINE_CALL(experts_backward)
DEFINE_CALL(combine_backward)
DEFINE_CALL(shared_expert_backward)
DEFINE_CALL(topk_backward)
DEFINE_CALL(score_backward)
DEFINE_CALL(dispatch_backward)

clmoe_status clmoe_z_size(const clmoe_layer *layer, uint32_t tokens, clmoe_mlp mlp, size_t *bytes) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout most;
    if (!bytes)
        return fail(CLMOE_INVALID_ARGUMENT, "bytes is NULL");
    *bytes = 0;
    TRY(check_mlp_exists(layer, mlp));
    if (!layer->desc.training)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "the layer was made with training 0, and has no backward pass");
    TRY(workspace_most(layer, tokens, &most));
    *bytes = most.bytes[mlp == CLMOE_MLP_SHARED ? REGION_SHARED_Z : REGION_Z];
done:
    return status;
}
