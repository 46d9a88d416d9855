#include "train.h"

enum { MOST_GROUPS = 8 };

#define LOSS_WEIGHT 0.01F

static clmoe_buf place(const bench_train *t, train_buffer which) {
    return (clmoe_buf){t->buffers[which], 0};
}

clmoe_layer_desc train_desc(const inputs *in, const char *engine) {
    clmoe_layer_desc desc = inputs_desc(in, engine);
    desc.router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    desc.router.noise.scale = 1.0F / (float)in->of.experts;
    desc.capacity.factor = 2;
    desc.balance.enabled = 1;
    desc.balance.device_groups = MOST_GROUPS;
    while (in->of.experts % desc.balance.device_groups != 0)
        desc.balance.device_groups--;
    return desc;
}

void train_losses(clmoe_loss_desc losses[TRAIN_LOSSES]) {
    for (int kind = 0; kind < TRAIN_LOSSES; kind++)
        losses[kind] = (clmoe_loss_desc){.kind = (clmoe_loss_kind)kind, .weight = LOSS_WEIGHT};
}

/* ---- Steps --------------------------------------------------------------------------------- */

static clmoe_status clear_dlogits(bench_train *t) {
    const cl_float zero = 0;
    const size_t bytes = (size_t)t->in->of.tokens * t->in->of.experts * sizeof zero;
    return CL(clEnqueueFillBuffer(t->device->queue, t->buffers[TRAIN_DLOGITS], &zero, sizeof zero,
                                  0, bytes, 0, NULL, NULL));
}

static clmoe_status enqueue_forward(bench_train *t, bool balance, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_loss_desc losses[TRAIN_LOSSES];
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = t->in->of.tokens;
    args.weights = t->weights;
    args.x = t->in->x_buf;
    args.state = place(t, TRAIN_STATE);
    args.scratch = place(t, TRAIN_SCRATCH);
    args.y = place(t, TRAIN_Y);
    if (balance) {
        TRY(clear_dlogits(t));
        train_losses(losses);
        args.stats = place(t, TRAIN_STATS);
        args.losses = losses;
        args.num_losses = TRAIN_LOSSES;
        args.loss_values = place(t, TRAIN_VALUES);
        args.dlogits = place(t, TRAIN_DLOGITS);
    }
    TRY(LIB(clmoe_forward(t->layer, t->device->queue, &args, 0, NULL, event)));
done:
    return status;
}

static clmoe_status enqueue_stats(bench_train *t) {
    clmoe_stats_args args = {.struct_size = sizeof args,
                             .tokens = t->in->of.tokens,
                             .logits = place(t, TRAIN_LOGITS),
                             .ids = place(t, TRAIN_IDS),
                             .pair_weights = place(t, TRAIN_WEIGHTS),
                             .plan = place(t, TRAIN_PLAN),
                             .live = place(t, TRAIN_LIVE),
                             .state = place(t, TRAIN_STATE),
                             .scratch = place(t, TRAIN_SCRATCH),
                             .stats = place(t, TRAIN_STATS)};
    return LIB(clmoe_stats_compute(t->layer, t->device->queue, &args, 0, NULL, NULL));
}

/* The queue is in order: the last event stands for all. */
static clmoe_status enqueue_balance(bench_train *t, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_loss_desc losses[TRAIN_LOSSES];
    clmoe_loss_args args = {.struct_size = sizeof args,
                            .tokens = t->in->of.tokens,
                            .losses = losses,
                            .num_losses = TRAIN_LOSSES,
                            .weights = t->weights,
                            .logits = place(t, TRAIN_LOGITS),
                            .ids = place(t, TRAIN_IDS),
                            .pair_weights = place(t, TRAIN_WEIGHTS),
                            .plan = place(t, TRAIN_PLAN),
                            .live = place(t, TRAIN_LIVE),
                            .state = place(t, TRAIN_STATE),
                            .scratch = place(t, TRAIN_SCRATCH),
                            .values = place(t, TRAIN_VALUES),
                            .dlogits = place(t, TRAIN_DLOGITS)};
    train_losses(losses);
    TRY(clear_dlogits(t));
    TRY(enqueue_stats(t));
    TRY(LIB(clmoe_loss(t->layer, t->device->queue, &args, 0, NULL, event)));
done:
    return status;
}

clmoe_status train_enqueue(bench_train *t, bench_step step, cl_event *event) {
    if (step == STEP_BALANCE)
        return enqueue_balance(t, event);
    return enqueue_forward(t, step == STEP_TRAIN_BALANCE, event);
}

/* ---- Creation ------------------------------------------------------------------------------ */

static clmoe_status create_buffers(bench_train *t) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &t->in->of;
    const size_t tokens = c->tokens, word = 4;
    size_t sizes[TRAIN_BUFFERS] = {0}, saved = 0;
    sizes[TRAIN_LOGITS] = sizes[TRAIN_SCORES] = sizes[TRAIN_DLOGITS] = tokens * c->experts * word;
    sizes[TRAIN_IDS] = sizes[TRAIN_WEIGHTS] = tokens * c->top_k * word;
    sizes[TRAIN_LIVE] = tokens * word;
    sizes[TRAIN_PLAN] = t->plan.bytes;
    sizes[TRAIN_Y] = tokens * c->dim * type_bytes(t->in->type);
    TRY(LIB(clmoe_stats_size(t->layer, &sizes[TRAIN_STATS])));
    sizes[TRAIN_VALUES] = TRAIN_LOSSES * word;
    TRY(LIB(clmoe_state_size(t->layer, &sizes[TRAIN_STATE])));
    TRY(LIB(clmoe_layer_memory(t->layer, c->tokens, &saved, &sizes[TRAIN_SCRATCH])));
    for (int i = 0; i < TRAIN_BUFFERS; i++)
        TRY(device_poisoned(t->device, sizes[i], &t->buffers[i]));
done:
    return status;
}

static clmoe_status run_score(bench_train *t) {
    clmoe_score_args args = {.struct_size = sizeof args,
                             .tokens = t->in->of.tokens,
                             .weights = t->weights,
                             .x = t->in->x_buf,
                             .logits = place(t, TRAIN_LOGITS),
                             .scores = place(t, TRAIN_SCORES),
                             .state = place(t, TRAIN_STATE),
                             .scratch = place(t, TRAIN_SCRATCH)};
    return LIB(clmoe_score(t->layer, t->device->queue, &args, 0, NULL, NULL));
}

static clmoe_status run_topk(bench_train *t) {
    clmoe_topk_args args = {.struct_size = sizeof args,
                            .tokens = t->in->of.tokens,
                            .weights = t->weights,
                            .scores = place(t, TRAIN_SCORES),
                            .ids = place(t, TRAIN_IDS),
                            .pair_weights = place(t, TRAIN_WEIGHTS),
                            .live = place(t, TRAIN_LIVE),
                            .state = place(t, TRAIN_STATE)};
    return LIB(clmoe_topk(t->layer, t->device->queue, &args, 0, NULL, NULL));
}

static clmoe_status run_plan(bench_train *t) {
    clmoe_plan_args args = {.struct_size = sizeof args,
                            .tokens = t->in->of.tokens,
                            .ids = place(t, TRAIN_IDS),
                            .pair_weights = place(t, TRAIN_WEIGHTS),
                            .live = place(t, TRAIN_LIVE),
                            .state = place(t, TRAIN_STATE),
                            .scratch = place(t, TRAIN_SCRATCH),
                            .plan = place(t, TRAIN_PLAN)};
    return LIB(clmoe_plan(t->layer, t->device->queue, &args, 0, NULL, NULL));
}

clmoe_status train_create(const bench_device *device, const inputs *in,
                          const clmoe_weights *weights, const char *engine, bench_train *t) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc desc = train_desc(in, engine);
    *t = (bench_train){.device = device, .in = in, .weights = weights};
    TRY(LIB(clmoe_layer_create(device->clmoe, &desc, &t->layer)));
    TRY(LIB(clmoe_plan_layout_get(t->layer, in->of.tokens, &t->plan)));
    TRY(create_buffers(t));
    TRY(LIB(clmoe_state_init(t->layer, device->queue, place(t, TRAIN_STATE), TRAIN_SEED, 0, NULL,
                             NULL)));
    TRY(run_score(t));
    TRY(run_topk(t));
    TRY(run_plan(t));
    TRY(CL(clFinish(device->queue)));
done:
    if (status != CLMOE_SUCCESS)
        train_release(t);
    return status;
}

void train_release(bench_train *t) {
    for (int i = 0; i < TRAIN_BUFFERS; i++)
        buffer_release(&t->buffers[i]);
    clmoe_layer_destroy(t->layer);
    *t = (bench_train){0};
}
