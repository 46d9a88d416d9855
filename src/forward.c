/* The pipeline: read this first. Each step reads and writes the regions of workspace.c. */
#include "check/check.h"
#include "measure.h"

/* Every array of one batch. */
typedef struct batch {
    const clmoe_forward_args *in;
    workspace_layout ws;
    clmoe_buf logits, scores, ids, pair_weights, live, token_offsets, plan, xe, ye;
    clmoe_buf shared_y, shared_gate;
    bool jitter_experts;
    clmoe_buf experts_x; /* x, or with jitter_experts what jitter made of it */
} batch;

static clmoe_buf region(const batch *b, region_id id) {
    return workspace_region(&b->ws, id, b->in->saved, b->in->scratch);
}

static clmoe_status bind(const clmoe_layer *layer, const clmoe_forward_args *args, batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf none = {0};
    bool external = args->ids_in.mem != NULL;
    b->in = args;
    TRY(workspace_layout_get(layer, args->tokens, &b->ws));
    b->logits = args->logits_in.mem ? args->logits_in : region(b, REGION_LOGITS);
    b->scores = region(b, REGION_SCORES);
    b->ids = external ? args->ids_in : region(b, REGION_IDS);
    b->pair_weights = external ? args->weights_in : region(b, REGION_WEIGHTS);
    b->live = external || layer_is_expert_choice(layer) ? none : region(b, REGION_LIVE);
    b->token_offsets = region(b, REGION_TOKEN_OFFSETS);
    b->plan = region(b, REGION_PLAN);
    b->xe = region(b, REGION_XE);
    b->ye = region(b, REGION_YE);
    b->shared_y = region(b, REGION_SHARED_Y);
    b->shared_gate = region(b, REGION_SHARED_GATE);
    b->jitter_experts = args->state.mem && layer->desc.router.jitter_experts;
    b->experts_x = b->jitter_experts ? region(b, REGION_JITTERED) : args->x;
done:
    return status;
}

/* x -> ids and weights, unless the caller brought them. */
static clmoe_status route(const clmoe_layer *layer, launch *chain, const batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_forward_args *in = b->in;
    if (in->ids_in.mem)
        return CLMOE_SUCCESS;
    clmoe_score_args score = {.tokens = in->tokens,
                              .weights = in->weights,
                              .x = in->x,
                              .logits_in = in->logits_in,
                              .logits = b->logits,
                              .scores = b->scores,
                              .state = in->state,
                              .scratch = in->scratch};
    launch_step(chain, "score");
    TRY(step_score(layer, chain, &score));
    clmoe_topk_args topk = {.tokens = in->tokens,
                            .weights = in->weights,
                            .scores = b->scores,
                            .ids = b->ids,
                            .weights_out = b->pair_weights,
                            .live = b->live,
                            .token_offsets = b->token_offsets,
                            .token_mask = in->token_mask,
                            .state = in->state,
                            .scratch = in->scratch};
    launch_step(chain, "topk");
    TRY(step_topk(layer, chain, &topk));
done:
    return status;
}

static clmoe_status plan(const clmoe_layer *layer, launch *chain, const batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_forward_args *in = b->in;
    clmoe_plan_args args = {.tokens = in->tokens,
                            .ids = b->ids,
                            .pair_weights = b->pair_weights,
                            .live = b->live,
                            .token_mask = in->token_mask,
                            .token_offsets = b->token_offsets,
                            .state = in->state,
                            .scores = in->ids_in.mem ? (clmoe_buf){0} : b->scores,
                            .weights = in->weights,
                            .scratch = in->scratch,
                            .plan = b->plan};
    launch_step(chain, "plan");
    TRY(step_plan(layer, chain, &args));
    if (layer->desc.router.renorm_after_drop && !in->ids_in.mem)
        TRY(step_plan_renorm(layer, chain, in->tokens, in->weights, b->ids, b->plan,
                             b->pair_weights));
done:
    return status;
}

static clmoe_status experts(const clmoe_layer *layer, launch *chain, const batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_forward_args *in = b->in;
    launch_step(chain, "dispatch"); /* jitter included */
    if (b->jitter_experts && (in->logits_in.mem || in->ids_in.mem))
        TRY(step_jitter(layer, chain, in->tokens, in->x, in->state, in->scratch));
    if (b->xe.mem) {
        clmoe_dispatch_args dispatch = {
            .tokens = in->tokens, .x = b->experts_x, .plan = b->plan, .xe = b->xe};
        TRY(step_dispatch(layer, chain, &dispatch));
    }
    clmoe_experts_args args = {.tokens = in->tokens,
                               .weights = in->weights,
                               .x = b->experts_x,
                               .xe = b->xe,
                               .pair_weights = b->pair_weights,
                               .plan = b->plan,
                               .scratch = in->scratch,
                               .ye = b->ye};
    launch_step(chain, "experts");
    TRY(step_experts(layer, chain, &args));
done:
    return status;
}

static clmoe_status shared(const clmoe_layer *layer, launch *chain, const batch *b) {
    const clmoe_forward_args *in = b->in;
    shared_args args = {.tokens = in->tokens,
                        .weights = in->weights,
                        .x = b->experts_x,
                        .hidden = region(b, REGION_SHARED_HIDDEN),
                        .engine = region(b, REGION_ENGINE),
                        .y = b->shared_y,
                        .gate = b->shared_gate};
    launch_step(chain, "shared");
    return layer->desc.shared.hidden_dim ? step_shared(layer, chain, &args) : CLMOE_SUCCESS;
}

/* Soft MoE instead of routing and experts: afterwards each token has one pair, ye's row of its own.
 */
static clmoe_status soft_moe(const clmoe_layer *layer, launch *chain, batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_forward_args *in = b->in;
    const soft_moe_args args = {.tokens = in->tokens,
                                .weights = in->weights,
                                .x = in->x,
                                .token_mask = in->token_mask,
                                .clean = region(b, REGION_SOFT_X),
                                .plan = b->plan,
                                .ones = b->pair_weights,
                                .token_norms = region(b, REGION_TOKEN_NORMS),
                                .slot_norms = region(b, REGION_SLOT_NORMS),
                                .logits = b->logits,
                                .tops = region(b, REGION_TOPS),
                                .partials = region(b, REGION_SOFT_PARTIALS),
                                .columns = region(b, REGION_SOFT_COLUMNS),
                                .dispatch = region(b, REGION_SOFT_DISPATCH),
                                .combine = region(b, REGION_SOFT_COMBINE),
                                .xe = b->xe,
                                .ye = b->ye,
                                .mixed = region(b, REGION_MIXED)};
    const clmoe_experts_args rows = {.tokens = in->tokens,
                                     .weights = in->weights,
                                     .xe = b->xe,
                                     .plan = b->plan,
                                     .scratch = in->scratch,
                                     .ye = b->ye};
    if (in->tokens == 0)
        return CLMOE_SUCCESS;
    launch_step(chain, "dispatch");
    TRY(step_soft_moe_dispatch(layer, chain, &args));
    launch_step(chain, "experts");
    TRY(step_experts(layer, chain, &rows));
    launch_step(chain, "mix");
    TRY(step_soft_moe_combine(layer, chain, &args));
    b->ye = args.mixed;
done:
    return status;
}

static clmoe_status routed(const clmoe_layer *layer, launch *chain, const batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(route(layer, chain, b));
    TRY(plan(layer, chain, b));
    TRY(experts(layer, chain, b));
done:
    return status;
}

static clmoe_status combine(const clmoe_layer *layer, launch *chain, const batch *b) {
    const clmoe_forward_args *in = b->in;
    clmoe_combine_args args = {.tokens = in->tokens,
                               .weights = in->weights,
                               .x = b->experts_x,
                               .ye = b->ye,
                               .pair_weights = b->pair_weights,
                               .plan = b->plan,
                               .token_mask = in->token_mask,
                               .token_offsets = b->token_offsets,
                               .shared = b->shared_y,
                               .shared_gate = b->shared_gate,
                               .residual = in->residual,
                               .y = in->y};
    launch_step(chain, "combine");
    return step_combine(layer, chain, &args);
}

/* What the caller asked to see of the way. */
static clmoe_status report(const clmoe_layer *layer, launch *chain, const batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_forward_args *in = b->in;
    size_t pairs_bytes = b->ws.plan.pairs * sizeof(cl_int);
    size_t logits_bytes = (size_t)in->tokens * layer->columns * sizeof(cl_float);
    launch_step(chain, "copy");
    if (!in->ids_in.mem)
        TRY(launch_copy(chain, b->logits, in->logits, logits_bytes));
    TRY(launch_copy(chain, b->ids, in->ids, pairs_bytes));
    TRY(launch_copy(chain, b->pair_weights, in->weights_out, pairs_bytes));
    TRY(launch_copy(chain, b->token_offsets, in->token_offsets,
                    ((size_t)in->tokens + 1) * sizeof(cl_int)));
done:
    return status;
}

/* Statistics and losses, from one pass over the batch. */
static clmoe_status balance(const clmoe_layer *layer, launch *chain, const batch *b) {
    const clmoe_forward_args *in = b->in;
    clmoe_buf none = {0}, logits = in->ids_in.mem ? none : b->logits;
    clmoe_stats_args stats = {.tokens = in->tokens,
                              .logits = logits,
                              .ids = b->ids,
                              .pair_weights = b->pair_weights,
                              .plan = b->plan,
                              .live = b->live,
                              .token_mask = in->token_mask,
                              .token_offsets = b->token_offsets,
                              .state = in->state,
                              .load_target = in->load_target,
                              .scratch = in->scratch,
                              .stats = in->stats};
    clmoe_loss_args loss = {.tokens = in->tokens,
                            .losses = in->losses,
                            .num_losses = in->num_losses,
                            .weights = in->weights,
                            .logits = logits,
                            .ids = b->ids,
                            .pair_weights = b->pair_weights,
                            .plan = b->plan,
                            .live = b->live,
                            .token_mask = in->token_mask,
                            .token_offsets = b->token_offsets,
                            .state = in->state,
                            .load_target = in->load_target,
                            .load_supplied = in->load_supplied,
                            .scratch = in->scratch,
                            .values = in->loss_values,
                            .dlogits = in->dlogits,
                            .dnoise = in->dnoise,
                            .dgroup_logits = in->dgroup_logits};
    launch_step(chain, "balance");
    return measure(layer, chain, in->stats.mem ? &stats : NULL, in->num_losses > 0 ? &loss : NULL,
                   in->ids_in.mem ? none : b->scores);
}

clmoe_status clmoe_forward(clmoe_layer *layer, cl_command_queue queue,
                           const clmoe_forward_args *args, cl_uint num_wait, const cl_event *wait,
                           cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    batch b = {0};
    TRY(check_forward(layer, args));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(launch_profile(&chain, args->profile));
    TRY(bind(layer, args, &b));
    TRY(layer_is_soft_moe(layer) ? soft_moe(layer, &chain, &b) : routed(layer, &chain, &b));
    TRY(shared(layer, &chain, &b));
    TRY(combine(layer, &chain, &b));
    TRY(report(layer, &chain, &b));
    TRY(balance(layer, &chain, &b));
done:
    return launch_end(&chain, status, event);
}
