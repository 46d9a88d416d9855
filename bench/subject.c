#include "subject.h"
#include "../src/cli/force.h"

static clmoe_buf place(const subject *s, subject_buffer which) {
    return (clmoe_buf){s->buffers[which], 0};
}

static clmoe_status enqueue_layer(subject *s, cl_event *event) {
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = s->in->of.tokens;
    args.weights = &s->weights;
    args.x = s->in->x_buf;
    args.saved = place(s, SUBJECT_SAVED);
    args.scratch = place(s, SUBJECT_SCRATCH);
    args.y = place(s, SUBJECT_Y);
    if (pattern_is_forced(s->in->pattern)) {
        args.ids_in = place(s, SUBJECT_IDS);
        args.pair_weights_in = place(s, SUBJECT_WEIGHTS);
    }
    return LIB(clmoe_forward(s->layer, s->device->queue, &args, 0, NULL, event));
}

/* From x, or from the logits that are there. */
static clmoe_status enqueue_score(subject *s, bool from_logits, cl_event *event) {
    clmoe_score_args args = {.struct_size = sizeof args,
                             .tokens = s->in->of.tokens,
                             .weights = &s->weights,
                             .x = s->in->x_buf,
                             .scores = place(s, SUBJECT_SCORES)};
    if (from_logits)
        args.logits_in = place(s, SUBJECT_LOGITS);
    else
        args.logits = place(s, SUBJECT_LOGITS);
    return LIB(clmoe_score(s->layer, s->device->queue, &args, 0, NULL, event));
}

static clmoe_status enqueue_topk(subject *s, cl_event *event) {
    clmoe_topk_args args = {.struct_size = sizeof args,
                            .tokens = s->in->of.tokens,
                            .weights = &s->weights,
                            .scores = place(s, SUBJECT_SCORES),
                            .ids = place(s, SUBJECT_IDS),
                            .pair_weights = place(s, SUBJECT_WEIGHTS),
                            .live = place(s, SUBJECT_LIVE)};
    return LIB(clmoe_topk(s->layer, s->device->queue, &args, 0, NULL, event));
}

static clmoe_status enqueue_plan(subject *s, cl_event *event) {
    clmoe_plan_args args = {.struct_size = sizeof args,
                            .tokens = s->in->of.tokens,
                            .ids = place(s, SUBJECT_IDS),
                            .pair_weights = place(s, SUBJECT_WEIGHTS),
                            .live = place(s, SUBJECT_LIVE),
                            .scratch = place(s, SUBJECT_SCRATCH),
                            .plan = place(s, SUBJECT_PLAN)};
    return LIB(clmoe_plan(s->layer, s->device->queue, &args, 0, NULL, event));
}

/* The queue is in order: the last event stands for all. */
static clmoe_status enqueue_routing(subject *s, bool from_logits, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    if (from_logits)
        TRY(enqueue_score(s, true, NULL));
    TRY(enqueue_topk(s, NULL));
    TRY(enqueue_plan(s, event));
done:
    return status;
}

static clmoe_status enqueue_dispatch(subject *s, cl_event *event) {
    clmoe_dispatch_args args = {.struct_size = sizeof args,
                                .tokens = s->in->of.tokens,
                                .x = s->in->x_buf,
                                .plan = place(s, SUBJECT_PLAN),
                                .xe = place(s, SUBJECT_XE)};
    return LIB(clmoe_dispatch(s->layer, s->device->queue, &args, 0, NULL, event));
}

static clmoe_status enqueue_experts(subject *s, cl_event *event) {
    clmoe_experts_args args = {.struct_size = sizeof args,
                               .tokens = s->in->of.tokens,
                               .weights = &s->weights,
                               .pair_weights = place(s, SUBJECT_WEIGHTS),
                               .plan = place(s, SUBJECT_PLAN),
                               .scratch = place(s, SUBJECT_SCRATCH),
                               .ye = place(s, SUBJECT_YE)};
    if (s->dispatches)
        args.xe = place(s, SUBJECT_XE);
    else
        args.x = s->in->x_buf;
    return LIB(clmoe_experts(s->layer, s->device->queue, &args, 0, NULL, event));
}

static clmoe_status enqueue_combine(subject *s, cl_event *event) {
    clmoe_combine_args args = {.struct_size = sizeof args,
                               .tokens = s->in->of.tokens,
                               .weights = &s->weights,
                               .x = s->in->x_buf,
                               .ye = place(s, SUBJECT_YE),
                               .pair_weights = place(s, SUBJECT_WEIGHTS),
                               .plan = place(s, SUBJECT_PLAN),
                               .y = place(s, SUBJECT_STEP_Y)};
    return LIB(clmoe_combine(s->layer, s->device->queue, &args, 0, NULL, event));
}

static clmoe_status enqueue_stats(subject *s, cl_event *event) {
    clmoe_stats_args args = {.struct_size = sizeof args,
                             .tokens = s->in->of.tokens,
                             .logits = place(s, SUBJECT_LOGITS),
                             .ids = place(s, SUBJECT_IDS),
                             .pair_weights = place(s, SUBJECT_WEIGHTS),
                             .plan = place(s, SUBJECT_PLAN),
                             .live = place(s, SUBJECT_LIVE),
                             .scratch = place(s, SUBJECT_SCRATCH),
                             .stats = place(s, SUBJECT_STATS)};
    return LIB(clmoe_stats_compute(s->layer, s->device->queue, &args, 0, NULL, event));
}

policy_kind step_policy(bench_step step) {
    return (policy_kind)(step - STEP_EXPERT_CHOICE);
}

static clmoe_status enqueue_policy(subject *s, policy_kind kind, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    bench_policy *p = &s->policies[kind];
    if (!p->layer)
        TRY(policy_create(s->device, s->in, clmoe_layer_engine(s->layer), kind, p));
    TRY(policy_enqueue(p, event));
done:
    return status;
}

static clmoe_status enqueue_train(subject *s, bench_step step, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    bench_train *t = &s->train;
    if (!t->layer)
        TRY(train_create(s->device, s->in, &s->weights, clmoe_layer_engine(s->layer), t));
    TRY(train_enqueue(t, step, event));
done:
    return status;
}

static clmoe_status enqueue_counts(subject *s, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    bench_counts *c = &s->counts;
    if (!c->layer)
        TRY(counts_create(s->device, s->in, clmoe_layer_engine(s->layer),
                          s->buffers[SUBJECT_LOGITS], c));
    TRY(counts_enqueue(c, event));
done:
    return status;
}

static clmoe_status need_backward(subject *s) {
    if (s->backward.layer)
        return CLMOE_SUCCESS;
    return backward_create(s->device, s->in, clmoe_layer_engine(s->layer), &s->backward);
}

clmoe_status subject_prepare(subject *s, bench_step step) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!step_is_backward(step))
        return CLMOE_SUCCESS;
    TRY(need_backward(s));
    TRY(backward_prepare(&s->backward, step));
done:
    return status;
}

clmoe_status subject_forget_gradients(subject *s) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(need_backward(s));
    TRY(backward_forget(&s->backward));
done:
    return status;
}

clmoe_status subject_enqueue(subject *s, bench_step step, cl_event *event) {
    switch (step) {
    case STEP_LAYER:
        return enqueue_layer(s, event);
    case STEP_SCORE:
        return enqueue_score(s, false, event);
    case STEP_TOPK:
        return enqueue_topk(s, event);
    case STEP_PLAN:
        return enqueue_plan(s, event);
    case STEP_ROUTING:
        return enqueue_routing(s, false, event);
    case STEP_TOPK_TO_PLAN:
        return enqueue_routing(s, true, event);
    case STEP_DISPATCH:
        return enqueue_dispatch(s, event);
    case STEP_EXPERTS:
        return enqueue_experts(s, event);
    case STEP_COMBINE:
        return enqueue_combine(s, event);
    case STEP_EXPERT_CHOICE:
    case STEP_SINKHORN:
    case STEP_REROUTE:
        return enqueue_policy(s, step_policy(step), event);
    case STEP_TRAIN:
    case STEP_TRAIN_BALANCE:
    case STEP_BALANCE:
        return enqueue_train(s, step, event);
    case STEP_BIAS_COUNTS:
        return enqueue_counts(s, event);
    case STEP_BACKWARD:
    case STEP_BACKWARD_DATA:
    case STEP_BACKWARD_WEIGHTS:
    case STEP_FORWARD_BACKWARD:
        return backward_enqueue(&s->backward, step, event);
    case STEP_STATS:
    case STEP_COUNT:
        break;
    }
    return enqueue_stats(s, event);
}

/* ---- Creation ------------------------------------------------------------------------------ */

static clmoe_status buffer_sizes(const subject *s, size_t sizes[SUBJECT_COUNT]) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &s->in->of;
    const size_t tokens = c->tokens, word = 4, element = type_bytes(s->in->type);
    const bool rows = !c->routing_only;
    sizes[SUBJECT_LOGITS] = sizes[SUBJECT_SCORES] = tokens * c->experts * word;
    sizes[SUBJECT_IDS] = sizes[SUBJECT_WEIGHTS] = tokens * c->top_k * word;
    sizes[SUBJECT_LIVE] = tokens * word;
    sizes[SUBJECT_PLAN] = s->plan.bytes;
    sizes[SUBJECT_XE] = sizes[SUBJECT_YE] = rows ? (size_t)s->plan.slots * c->dim * element : 0;
    sizes[SUBJECT_Y] = sizes[SUBJECT_STEP_Y] = rows ? tokens * c->dim * element : 0;
    TRY(LIB(clmoe_stats_size(s->layer, &sizes[SUBJECT_STATS])));
    if (s->packed)
        TRY(LIB(clmoe_packed_size(s->layer, CLMOE_MLP_EXPERTS, &sizes[SUBJECT_PACKED])));
    TRY(LIB(
        clmoe_layer_memory(s->layer, c->tokens, &sizes[SUBJECT_SAVED], &sizes[SUBJECT_SCRATCH])));
done:
    return status;
}

static clmoe_status create_buffers(subject *s) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t sizes[SUBJECT_COUNT] = {0};
    TRY(buffer_sizes(s, sizes));
    for (int i = 0; i < SUBJECT_COUNT; i++)
        TRY(device_poisoned(s->device, sizes[i], &s->buffers[i]));
done:
    return status;
}

/* What takes the place of top-k. */
static clmoe_status force_choices(subject *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &s->in->of;
    const forced_routing round_robin = {.kind = FORCE_ROUND_ROBIN};
    const forced_batch batch = {.tokens = c->tokens,
                                .experts = c->experts,
                                .top_k = c->top_k,
                                .ids = s->buffers[SUBJECT_IDS],
                                .pair_weights = s->buffers[SUBJECT_WEIGHTS]};
    if (!pattern_is_forced(s->in->pattern))
        return CLMOE_SUCCESS;
    TRY(force_fill(&round_robin, s->device->queue, &batch));
    TRY(CL(clEnqueueFillBuffer(s->device->queue, s->buffers[SUBJECT_LIVE], &c->top_k,
                               sizeof c->top_k, 0, c->tokens * sizeof c->top_k, 0, NULL, NULL)));
done:
    return status;
}

static clmoe_status pack_weights(subject *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf packed = place(s, SUBJECT_PACKED);
    const clmoe_pack_args args = {.struct_size = sizeof args,
                                  .mlp = CLMOE_MLP_EXPERTS,
                                  .raw = &s->weights.experts,
                                  .packed = packed};
    TRY(LIB(clmoe_pack_weights(s->layer, s->device->queue, &args, 0, NULL, NULL)));
    s->weights.experts = (clmoe_mlp_weights){.packed = packed};
done:
    return status;
}

static clmoe_status first_run(subject *s) {
    static const bench_step order[] = {STEP_SCORE,   STEP_TOPK,    STEP_PLAN,  STEP_DISPATCH,
                                       STEP_EXPERTS, STEP_COMBINE, STEP_STATS, STEP_LAYER};
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t i = 0; i < COUNT_OF(order); i++) {
        if (!case_has_step(&s->in->of, order[i]) ||
            (order[i] == STEP_TOPK && pattern_is_forced(s->in->pattern)))
            continue;
        TRY(subject_enqueue(s, order[i], NULL));
        TRY(CL(clFinish(s->device->queue)));
    }
done:
    return status;
}

clmoe_status subject_create(const bench_device *device, const inputs *in,
                            const bench_engine *engine, subject *s) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc desc = inputs_desc(in, engine ? engine->library : NULL);
    desc.balance.enabled = 1;
    *s = (subject){.device = device, .in = in, .weights = in->weights};
    s->packed = engine && engine->packed && !in->of.routing_only;
    TRY(LIB(clmoe_layer_create(device->clmoe, &desc, &s->layer)));
    s->dispatches = clmoe_layer_dispatches(s->layer);
    TRY(LIB(clmoe_plan_layout_get(s->layer, in->of.tokens, &s->plan)));
    TRY(create_buffers(s));
    TRY(force_choices(s));
    if (s->packed)
        TRY(pack_weights(s));
    TRY(first_run(s));
done:
    if (status != CLMOE_SUCCESS)
        subject_release(s);
    return status;
}

void subject_release(subject *s) {
    if (s->device)
        clFinish(s->device->queue);
    for (int kind = 0; kind < POLICY_KINDS; kind++)
        policy_release(&s->policies[kind]);
    train_release(&s->train);
    counts_release(&s->counts);
    backward_release(&s->backward);
    for (int i = 0; i < SUBJECT_COUNT; i++)
        buffer_release(&s->buffers[i]);
    clmoe_layer_destroy(s->layer);
    *s = (subject){0};
}

/* ---- Times --------------------------------------------------------------------------------- */

/* Between the ends of two events on the device's clock, or `wall` where it has none. */
static double device_ms(cl_event from, cl_event to, double wall) {
    cl_ulong begin = 0, end = 0;
    if (clGetEventProfilingInfo(from, CL_PROFILING_COMMAND_END, sizeof begin, &begin, NULL) ||
        clGetEventProfilingInfo(to, CL_PROFILING_COMMAND_END, sizeof end, &end, NULL))
        return wall;
    return begin == 0 || end <= begin ? wall : (double)(end - begin) * 1e-6;
}

/* From when the device is through with a delay, so that enqueueing does not count. */
static clmoe_status time_on_device(subject *s, bench_step step, double *ms) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event from = NULL, to = NULL;
    const double begin = host_ms();
    TRY(device_delay(s->device));
    TRY(CL(clEnqueueMarkerWithWaitList(s->device->queue, 0, NULL, &from)));
    TRY(subject_enqueue(s, step, &to));
    TRY(CL(clWaitForEvents(1, &to)));
    *ms = device_ms(from, to, host_ms() - begin);
done:
    if (from)
        clReleaseEvent(from);
    if (to)
        clReleaseEvent(to);
    return status;
}

clmoe_status subject_time(subject *s, bench_step step, double *ms) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!s->device->cpu)
        return time_on_device(s, step, ms);
    const double begin = host_ms();
    TRY(subject_enqueue(s, step, NULL));
    TRY(CL(clFinish(s->device->queue)));
    *ms = host_ms() - begin;
done:
    return status;
}

clmoe_status subject_read(const subject *s, subject_buffer which, size_t offset, size_t bytes,
                          void *to) {
    return CL(clEnqueueReadBuffer(s->device->queue, s->buffers[which], CL_TRUE, offset, bytes, to,
                                  0, NULL, NULL));
}
