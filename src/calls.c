/* The steps as public calls: check, bind the batch, launch one step, end. */
#include "check/check.h"
#include "measure.h"
#include "runtime/structs.h"

/* ---- What each call gives to the batch ------------------------------------------------------- */

static void bind_score(batch *b, const clmoe_score_args *args) {
    b->weights = args->weights;
    b->x = args->x;
    b->logits_given = args->logits_in.mem != NULL;
    b->logits = b->logits_given ? args->logits_in : args->logits;
    b->scores = args->scores;
    b->state = args->state;
    b->scratch = args->scratch;
    b->jittered = region(b, REGION_JITTERED);
}

static void bind_topk(batch *b, const clmoe_topk_args *args) {
    b->weights = args->weights;
    b->scores = args->scores;
    b->ids = args->ids;
    b->pair_weights = args->pair_weights;
    b->live = args->live;
    b->token_offsets = args->token_offsets;
    b->token_mask = args->token_mask;
    b->state = args->state;
    b->scratch = args->scratch;
}

static void bind_plan(batch *b, const clmoe_plan_args *args) {
    b->weights = args->weights;
    b->ids = args->ids;
    b->pair_weights = args->pair_weights;
    b->live = layer_live(b->layer, args->live);
    b->token_mask = args->token_mask;
    b->token_offsets = args->token_offsets;
    b->state = args->state;
    b->scores = args->scores;
    b->scratch = args->scratch;
    b->plan = args->plan;
}

static void bind_renorm_after_drop(batch *b, const clmoe_renorm_after_drop_args *args) {
    b->weights = args->weights;
    b->ids = args->ids;
    b->pair_weights = args->pair_weights;
    b->plan = args->plan;
}

static void bind_replicate(batch *b, const clmoe_replicate_args *args) {
    b->ids = args->ids;
    b->plan = args->plan;
    b->copies = args->copies;
    b->logical_to_physical = args->logical_to_physical;
    b->physical_ids = args->physical_ids;
    b->replicas = args->replicas;
    b->max_copies = args->max_copies;
}

static void bind_jitter(batch *b, const clmoe_jitter_args *args) {
    b->x = args->x;
    b->state = args->state;
    b->jittered = args->jittered;
}

static void bind_dispatch(batch *b, const clmoe_dispatch_args *args) {
    b->experts_x = args->x;
    b->plan = args->plan;
    b->xe = args->xe;
}

static void bind_soft_dispatch(batch *b, const clmoe_soft_dispatch_args *args) {
    b->weights = args->weights;
    b->x = args->x;
    b->token_mask = args->token_mask;
    b->scratch = args->scratch;
    b->logits = region(b, REGION_LOGITS);
    b->plan = args->plan;
    b->pair_weights = args->pair_weights;
    b->mix = args->mix;
    b->xe = args->xe;
}

static void bind_soft_combine(batch *b, const clmoe_soft_combine_args *args) {
    b->ye = args->ye;
    b->mix = args->mix;
    b->mixed = args->mixed;
}

static void bind_experts(batch *b, const clmoe_experts_args *args) {
    b->weights = args->weights;
    b->experts_x = args->x;
    b->xe = args->xe;
    b->pair_weights = args->pair_weights;
    b->plan = args->plan;
    b->scratch = args->scratch;
    b->ye = args->ye;
    b->z = args->z;
    b->state = args->state;
}

static void bind_shared_expert(batch *b, const clmoe_shared_expert_args *args) {
    b->weights = args->weights;
    b->experts_x = args->x;
    b->scratch = args->scratch;
    b->shared_y = args->shared;
    b->shared_gate = args->shared_gate;
    b->shared_z = args->z;
    b->state = args->state;
}

static void bind_combine(batch *b, const clmoe_combine_args *args) {
    b->weights = args->weights;
    b->experts_x = args->x;
    b->ye = args->ye;
    b->pair_weights = args->pair_weights;
    b->plan = args->plan;
    b->token_mask = args->token_mask;
    b->token_offsets = args->token_offsets;
    b->shared_y = args->shared;
    b->shared_gate = args->shared_gate;
    b->residual = args->residual;
    b->y = args->y;
}

/* What statistics and losses both look at. */
#define BIND_MEASURED(b, args)                                                                     \
    ((b)->weights = (args)->weights, (b)->x = (args)->x, (b)->logits = (args)->logits,             \
     (b)->ids = (args)->ids, (b)->pair_weights = (args)->pair_weights, (b)->plan = (args)->plan,   \
     (b)->live = layer_live((b)->layer, (args)->live), (b)->token_mask = (args)->token_mask,       \
     (b)->token_offsets = (args)->token_offsets, (b)->state = (args)->state,                       \
     (b)->load_target = (args)->load_target, (b)->scratch = (args)->scratch,                       \
     (b)->jittered = region((b), REGION_JITTERED))

static void bind_stats(batch *b, const clmoe_stats_args *args) {
    BIND_MEASURED(b, args);
    b->stats = args->stats;
}

static void bind_loss(batch *b, const clmoe_loss_args *args) {
    BIND_MEASURED(b, args);
    bind_losses(b, args->losses, args->loss_size, args->num_losses);
    b->load_supplied = args->load_supplied;
    b->loss_values = args->values;
    b->dlogits = args->dlogits;
    b->dnoise = args->dnoise;
    b->dgroup_logits = args->dgroup_logits;
}

static void bind_bias_counts(batch *b, const clmoe_bias_counts_args *args) {
    b->weights = args->weights;
    b->x = args->x;
    b->logits = args->logits;
    b->token_mask = args->token_mask;
    b->state = args->state;
    b->scratch = args->scratch;
    b->jittered = region(b, REGION_JITTERED);
    b->bias_counts = args->bias_counts;
    b->counts_added = args->accumulate != 0;
}

/* ---- The calls ------------------------------------------------------------------------------- */

#define DEFINE_CALL(call, name, step)                                                              \
    clmoe_status call(clmoe_layer *layer, cl_command_queue queue, const clmoe_##name##_args *args, \
                      cl_uint num_wait, const cl_event *wait, cl_event *event) {                   \
        clmoe_status status = CLMOE_SUCCESS;                                                       \
        launch chain = {0};                                                                        \
        batch b = {.layer = layer};                                                                \
        clmoe_##name##_args own = {0};                                                             \
        TRY(STRUCT_TAKE_ARGS(args, &own));                                                         \
        TRY(check_##name(layer, &own));                                                            \
        TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));                          \
        b.tokens = own.tokens;                                                                     \
        TRY(workspace_layout_get(layer, own.tokens, &b.ws));                                       \
        bind_##name(&b, &own);                                                                     \
        TRY(step(&b, &chain));                                                                     \
    done:                                                                                          \
        return launch_end(&chain, status, event);                                                  \
    }

DEFINE_CALL(clmoe_score, score, step_score)
DEFINE_CALL(clmoe_topk, topk, step_topk)
DEFINE_CALL(clmoe_plan, plan, step_plan)
DEFINE_CALL(clmoe_renorm_after_drop, renorm_after_drop, step_plan_renorm)
DEFINE_CALL(clmoe_replicate, replicate, step_plan_replicate)
DEFINE_CALL(clmoe_jitter, jitter, step_jitter)
DEFINE_CALL(clmoe_dispatch, dispatch, step_dispatch)
DEFINE_CALL(clmoe_soft_dispatch, soft_dispatch, step_soft_moe_dispatch)
DEFINE_CALL(clmoe_soft_combine, soft_combine, step_soft_moe_combine)
DEFINE_CALL(clmoe_experts, experts, step_experts)
DEFINE_CALL(clmoe_shared_expert, shared_expert, step_shared)
DEFINE_CALL(clmoe_combine, combine, step_combine)
DEFINE_CALL(clmoe_stats_compute, stats, measure)
DEFINE_CALL(clmoe_loss, loss, measure)
DEFINE_CALL(clmoe_bias_counts, bias_counts, measure)

clmoe_status clmoe_plan_layout_get(const clmoe_layer *layer, uint32_t tokens,
                                   clmoe_plan_layout *layout) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws, most;
    if (!layer || !layout)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", layer ? "layout" : "layer");
    TRY(workspace_layout_get(layer, tokens, &ws));
    TRY(workspace_most(layer, tokens, &most));
    *layout = ws.plan;
    layout->bytes = most.plan.bytes;
    layout->most_slots = most.plan.slots;
done:
    return status;
}

static clmoe_status check_one_buffer(const clmoe_layer *layer, const char *what, uint32_t tokens,
                                     size_t bytes) {
    const device_info *device = &layer->context->info;
    if (bytes <= device->max_buffer_bytes)
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED,
                "tokens is %u: %s needs %zu bytes, but device %.64s allows %llu per buffer", tokens,
                what, bytes, device->name, (unsigned long long)device->max_buffer_bytes);
}

clmoe_status clmoe_layer_memory(const clmoe_layer *layer, uint32_t tokens, size_t *saved,
                                size_t *scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout most;
    if (!layer)
        return fail(CLMOE_INVALID_ARGUMENT, "layer is NULL");
    TRY(workspace_most(layer, tokens, &most));
    if (saved)
        *saved = most.saved_bytes;
    if (scratch)
        *scratch = most.scratch_bytes;
    TRY(check_one_buffer(layer, "saved", tokens, most.saved_bytes));
    TRY(check_one_buffer(layer, "scratch", tokens, most.scratch_bytes));
done:
    return status;
}
