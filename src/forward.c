/* The pipeline: read this first. Each step reads and writes the regions of workspace.c. */
#include "check.h"
#include "steps.h"

/* Every array of one batch. */
typedef struct batch {
    const clmoe_forward_args *in;
    workspace_layout ws;
    clmoe_buf logits, scores, ids, pair_weights, live, plan, xe, ye;
    clmoe_buf shared_y, shared_gate;
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
    b->live = external ? none : region(b, REGION_LIVE);
    b->plan = region(b, REGION_PLAN);
    b->xe = region(b, REGION_XE);
    b->ye = region(b, REGION_YE);
    b->shared_y = region(b, REGION_SHARED_Y);
    b->shared_gate = region(b, REGION_SHARED_GATE);
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
                              .scores = b->scores};
    TRY(step_score(layer, chain, &score));
    clmoe_topk_args topk = {.tokens = in->tokens,
                            .weights = in->weights,
                            .scores = b->scores,
                            .ids = b->ids,
                            .weights_out = b->pair_weights,
                            .live = b->live,
                            .token_mask = in->token_mask,
                            .scratch = in->scratch};
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
                            .scores = in->ids_in.mem ? (clmoe_buf){0} : b->scores,
                            .weights = in->weights,
                            .scratch = in->scratch,
                            .plan = b->plan};
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
    if (b->xe.mem) {
        clmoe_dispatch_args dispatch = {
            .tokens = in->tokens, .x = in->x, .plan = b->plan, .xe = b->xe};
        TRY(step_dispatch(layer, chain, &dispatch));
    }
    clmoe_experts_args args = {.tokens = in->tokens,
                               .weights = in->weights,
                               .x = in->x,
                               .xe = b->xe,
                               .pair_weights = b->pair_weights,
                               .plan = b->plan,
                               .scratch = in->scratch,
                               .ye = b->ye};
    TRY(step_experts(layer, chain, &args));
    if (layer->desc.shared.hidden_dim) {
        shared_args shared = {.tokens = in->tokens,
                              .weights = in->weights,
                              .x = in->x,
                              .hidden = region(b, REGION_SHARED_HIDDEN),
                              .engine = region(b, REGION_ENGINE),
                              .y = b->shared_y,
                              .gate = b->shared_gate};
        TRY(step_shared(layer, chain, &shared));
    }
done:
    return status;
}

static clmoe_status combine(const clmoe_layer *layer, launch *chain, const batch *b) {
    const clmoe_forward_args *in = b->in;
    clmoe_combine_args args = {.tokens = in->tokens,
                               .weights = in->weights,
                               .x = in->x,
                               .ye = b->ye,
                               .pair_weights = b->pair_weights,
                               .plan = b->plan,
                               .token_mask = in->token_mask,
                               .shared = b->shared_y,
                               .shared_gate = b->shared_gate,
                               .residual = in->residual,
                               .y = in->y};
    return step_combine(layer, chain, &args);
}

/* What the caller asked to see of the way. */
static clmoe_status report(const clmoe_layer *layer, launch *chain, const batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_forward_args *in = b->in;
    size_t pairs_bytes = b->ws.plan.pairs * sizeof(cl_int);
    size_t logits_bytes = (size_t)in->tokens * layer->columns * sizeof(cl_float);
    if (!in->ids_in.mem)
        TRY(launch_copy(chain, b->logits, in->logits, logits_bytes));
    TRY(launch_copy(chain, b->ids, in->ids, pairs_bytes));
    TRY(launch_copy(chain, b->pair_weights, in->weights_out, pairs_bytes));
    if (in->stats.mem) {
        clmoe_stats_args stats = {.tokens = in->tokens,
                                  .plan = b->plan,
                                  .live = b->live,
                                  .token_mask = in->token_mask,
                                  .stats = in->stats};
        TRY(step_stats(layer, chain, &stats));
    }
done:
    return status;
}

clmoe_status clmoe_forward(clmoe_layer *layer, cl_command_queue queue,
                           const clmoe_forward_args *args, cl_uint num_wait, const cl_event *wait,
                           cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    batch b = {0};
    TRY(check_forward(layer, args));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(bind(layer, args, &b));
    TRY(route(layer, &chain, &b));
    TRY(plan(layer, &chain, &b));
    TRY(experts(layer, &chain, &b));
    TRY(combine(layer, &chain, &b));
    TRY(report(layer, &chain, &b));
done:
    return launch_end(&chain, status, event);
}
