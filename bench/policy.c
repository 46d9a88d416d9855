#include "policy.h"

static clmoe_buf place(const bench_policy *p, policy_buffer which) {
    return (clmoe_buf){p->buffers[which], 0};
}

static clmoe_layer_desc policy_desc(const inputs *in, const char *engine, policy_kind kind) {
    clmoe_layer_desc desc = inputs_desc(in, engine);
    switch (kind) {
    case POLICY_EXPERT_CHOICE:
        desc.router.policy = CLMOE_POLICY_EXPERT_CHOICE;
        desc.router.renorm.kind = CLMOE_RENORM_NONE;
        desc.capacity.factor = 1;
        break;
    case POLICY_SINKHORN:
        desc.router.policy = CLMOE_POLICY_SINKHORN;
        break;
    case POLICY_REROUTE:
    case POLICY_KINDS:
        desc.capacity.factor = 1;
        desc.capacity.overflow = CLMOE_OVERFLOW_REROUTE;
        break;
    }
    return desc;
}

static clmoe_status enqueue_topk(bench_policy *p) {
    clmoe_topk_args args = {.struct_size = sizeof args,
                            .tokens = p->in->of.tokens,
                            .weights = &p->in->weights,
                            .scores = place(p, POLICY_SCORES),
                            .ids = place(p, POLICY_IDS),
                            .pair_weights = place(p, POLICY_WEIGHTS),
                            .scratch = place(p, POLICY_SCRATCH)};
    if (p->kind == POLICY_EXPERT_CHOICE)
        args.token_offsets = place(p, POLICY_OFFSETS);
    else
        args.live = place(p, POLICY_LIVE);
    return LIB(clmoe_topk(p->layer, p->device->queue, &args, 0, NULL, NULL));
}

clmoe_status policy_enqueue(bench_policy *p, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_plan_args args = {.struct_size = sizeof args,
                            .tokens = p->in->of.tokens,
                            .ids = place(p, POLICY_IDS),
                            .pair_weights = place(p, POLICY_WEIGHTS),
                            .scores = place(p, POLICY_SCORES),
                            .weights = &p->in->weights,
                            .scratch = place(p, POLICY_SCRATCH),
                            .plan = place(p, POLICY_PLAN)};
    if (p->kind == POLICY_EXPERT_CHOICE)
        args.token_offsets = place(p, POLICY_OFFSETS);
    else
        args.live = place(p, POLICY_LIVE);
    TRY(enqueue_topk(p));
    TRY(LIB(clmoe_plan(p->layer, p->device->queue, &args, 0, NULL, event)));
done:
    return status;
}

static clmoe_status create_buffers(bench_policy *p) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t tokens = p->in->of.tokens, word = 4;
    size_t sizes[POLICY_BUFFERS] = {0}, saved = 0;
    sizes[POLICY_SCORES] = tokens * p->in->of.experts * word;
    sizes[POLICY_IDS] = sizes[POLICY_WEIGHTS] = p->plan.pairs * word;
    sizes[POLICY_LIVE] = tokens * word;
    sizes[POLICY_OFFSETS] = (tokens + 1) * word;
    sizes[POLICY_PLAN] = p->plan.bytes;
    TRY(LIB(clmoe_layer_memory(p->layer, p->in->of.tokens, &saved, &sizes[POLICY_SCRATCH])));
    for (int i = 0; i < POLICY_BUFFERS; i++)
        TRY(device_poisoned(p->device, sizes[i], &p->buffers[i]));
done:
    return status;
}

static clmoe_status make_scores(bench_policy *p) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_mem logits = NULL;
    TRY(device_buffer(p->device, (size_t)p->in->of.tokens * p->in->of.experts * 4, &logits));
    clmoe_score_args args = {.struct_size = sizeof args,
                             .tokens = p->in->of.tokens,
                             .weights = &p->in->weights,
                             .x = p->in->x_buf,
                             .logits = {logits, 0},
                             .scores = place(p, POLICY_SCORES)};
    TRY(LIB(clmoe_score(p->layer, p->device->queue, &args, 0, NULL, NULL)));
    TRY(CL(clFinish(p->device->queue)));
done:
    buffer_release(&logits);
    return status;
}

clmoe_status policy_create(const bench_device *device, const inputs *in, const char *engine,
                           policy_kind kind, bench_policy *p) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc desc = policy_desc(in, engine, kind);
    *p = (bench_policy){.device = device, .in = in, .kind = kind};
    TRY(LIB(clmoe_layer_create(device->clmoe, &desc, &p->layer)));
    TRY(LIB(clmoe_plan_layout_get(p->layer, in->of.tokens, &p->plan)));
    TRY(create_buffers(p));
    TRY(make_scores(p));
done:
    if (status != CLMOE_SUCCESS)
        policy_release(p);
    return status;
}

void policy_release(bench_policy *p) {
    for (int i = 0; i < POLICY_BUFFERS; i++)
        buffer_release(&p->buffers[i]);
    clmoe_layer_destroy(p->layer);
    *p = (bench_policy){0};
}
