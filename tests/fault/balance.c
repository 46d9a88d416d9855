/* Faults in layers that balance: their policies, states, statistics, losses and updates. */
#include "support_variants.h"
#include "sweep.h"

#include <stdlib.h>
#include <string.h>

static const shape small = {TOKENS, 16, 8, 0, 2, 12};

/* All that a state makes random, and what its controllers turn. */
static void with_state(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
    d->router.noise.jitter = 0.1f;
    d->router.dropout.experts = 0.1f;
    d->router.dropout.logits = 0.1f;
    d->router.select_bias = 1;
    d->capacity.rows = 4;
    d->capacity.keep = CLMOE_KEEP_RANDOM;
    d->balance.device_groups = 4;
    d->balance.router_orthogonality = 1;
}

static void sequences(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    d->capacity.rows = 2;
    d->capacity.keep = CLMOE_KEEP_WEIGHT;
    d->capacity.tokens_per_sequence = 5;
    d->balance.device_groups = 2;
}

/* Its bias follows from counts. */
static void quantile(clmoe_layer_desc *d) {
    d->router.select_bias = 1;
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
}

static void expert_choice(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    d->router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    d->capacity.rows = 3;
}

static void sinkhorn(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SINKHORN;
    d->router.sinkhorn.iterations = 3;
    d->router.sinkhorn.tolerance = 1e-3f;
}

static void rebalance(clmoe_layer_desc *d) {
    d->router.rebalance.iterations = 3;
}

/* What comes between the usual steps: renorm after drop, and jitter of the experts. */
static void between_steps(clmoe_layer_desc *d) {
    d->router.noise.jitter = 0.1f;
    d->router.noise.jitter_experts = 1;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->capacity.rows = 4;
}

/* Its layers begin with a probe of the device. */
static void tensor_cores(clmoe_layer_desc *d) {
    d->type = d->weight_type = CLMOE_BF16;
    d->balance.device_groups = 2;
    d->capacity.rows = 4;
}

#define LOSS(of) .kind = CLMOE_LOSS_##of, .weight = 0.5f

static const clmoe_loss_desc any_layer[] = {
    {LOSS(SWITCH), .f_source = CLMOE_F_FRESH}, {LOSS(MINIMAX), .p_source = CLMOE_P_SOFTMAX},
    {LOSS(L1), .f_source = CLMOE_F_EMA},       {LOSS(Z)},
    {LOSS(TOKEN_ENTROPY), .controlled = 1},
};
static const clmoe_loss_desc by_device[] = {
    {LOSS(OVERFLOW)},
    {LOSS(COMMUNICATION)},
    {LOSS(IMPORTANCE_CV2), .p_source = CLMOE_P_WEIGHTS},
    {LOSS(SQUARED), .p_source = CLMOE_P_RAW, .per_device = 1},
};
static const clmoe_loss_desc by_sequence[] = {
    {LOSS(SMOOTH_LOAD), .per_sequence = 1},
    {LOSS(ENTROPY), .f_source = CLMOE_F_FIRST, .per_sequence = 1},
    {LOSS(LOAD_CV2)},
};

typedef struct variant {
    const char *name;
    void (*set)(clmoe_layer_desc *desc); /* NULL: the shared one of that name */
    const clmoe_loss_desc *losses;
    uint32_t num_losses;
    const char *engine; /* NULL: "ref" */
} variant;

#define LOSSES(of) (of), COUNT_OF(of)

static const variant variants[] = {
    {"state", with_state, LOSSES(by_device), NULL},
    {"sequences", sequences, LOSSES(by_sequence), NULL},
    {"quantile", quantile, LOSSES(any_layer), NULL},
    {"expert choice", expert_choice, LOSSES(any_layer), NULL},
    {"token rounding", NULL, LOSSES(any_layer), NULL},
    {"Sinkhorn", sinkhorn, LOSSES(any_layer), NULL},
    {"all experts", NULL, LOSSES(any_layer), NULL},
    {"two levels", NULL, LOSSES(any_layer), NULL},
    {"Soft MoE", NULL, NULL, 0, NULL},
    {"reroute", NULL, LOSSES(any_layer), NULL},
    {"rebalance", rebalance, LOSSES(any_layer), NULL},
    {"between steps", between_steps, NULL, 0, NULL},
    {"tensor cores", tensor_cores, LOSSES(by_device), "nv_mma"},
    {"tensor cores", tensor_cores, LOSSES(by_device), "nv_wgmma"},
};

/* ---- What is done --------------------------------------------------------------------------- */

static clmoe_status run_forward(rig *r) {
    cl_event event = (cl_event)(void *)r;
    clmoe_status status = clmoe_forward(r->layer, r->queue, &r->args, 0, NULL, &event);
    return event_is_right(status, event);
}

/* Packs, and runs on what came out; where the engine has such a form. */
static clmoe_status run_packed(rig *r) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event last = NULL;
    if (!r->packed.mem)
        return CLMOE_SUCCESS;
    const clmoe_pack_args pack = {.struct_size = sizeof pack,
                                  .mlp = CLMOE_MLP_EXPERTS,
                                  .raw = &r->weights.experts,
                                  .packed = r->packed};
    STEP(clmoe_pack_weights, &pack);
    clReleaseEvent(last);
    r->weights.experts.packed = r->packed;
    status = run_forward(r);
    r->weights.experts.packed = (clmoe_buf){NULL, 0};
    return status;
}

static clmoe_status run_backward(rig *r) {
    cl_event event = (cl_event)(void *)r;
    clmoe_status status = clmoe_backward(r->layer, r->queue, &r->back, 0, NULL, &event);
    return event_is_right(status, event);
}

static clmoe_status run_state_init(rig *r) {
    cl_event event = (cl_event)(void *)r;
    clmoe_status status =
        clmoe_state_init(r->layer, r->queue, r->balance.state, 5, 0, NULL, &event);
    return event_is_right(status, event);
}

static clmoe_status run_update(rig *r) {
    cl_event event = (cl_event)(void *)r;
    clmoe_status status = clmoe_balance_update(r->layer, r->queue, &r->balance, 0, NULL, &event);
    return event_is_right(status, event);
}

/* The choice by single steps, then statistics and losses of it. */
static clmoe_status run_calls(rig *r) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event last = NULL;
    STEP(clmoe_score, &r->steps.score);
    STEP(clmoe_topk, &r->steps.topk);
    STEP(clmoe_plan, &r->steps.plan);
    STEP(clmoe_stats_compute, &r->steps.stats);
    STEP(clmoe_loss, &r->steps.loss);
    if (r->desc.balance.router_orthogonality)
        STEP(clmoe_router_orthogonality, &r->steps.orthogonality);
    if (r->steps.counts.bias_counts.mem)
        STEP(clmoe_bias_counts, &r->steps.counts);
    clReleaseEvent(last);
    return status;
}

static size_t groups_bytes(const rig *r) {
    return (size_t)TOKENS * r->desc.router.groups.count * 4;
}

/* Gradients are added to what is there. */
static void reset_outputs(rig *r) {
    static const float zeros[TOKENS * 8];
    for (size_t i = 0; i < OUTPUTS; i++)
        if (r->outputs[i].buf.mem)
            buf_poison(r->outputs[i].buf);
    if (r->args.dlogits.mem)
        buf_write(r->args.dlogits, zeros, sizeof zeros);
    if (r->args.dnoise.mem)
        buf_write(r->args.dnoise, zeros, sizeof zeros);
    if (r->args.dgroup_logits.mem)
        buf_write(r->args.dgroup_logits, zeros, groups_bytes(r));
}

static void reset_state(rig *r) {
    buf_write(r->balance.state, r->first_state, r->state_bytes);
}

static void compare_outputs(rig *r) {
    bool watched = memory_watch(false);
    for (size_t i = 0; i < OUTPUTS; i++) {
        void *got = r->outputs[i].buf.mem ? malloc(r->outputs[i].bytes) : NULL;
        if (!got)
            continue;
        buf_read(r->outputs[i].buf, got, r->outputs[i].bytes);
        compare_bits(r->outputs[i].name, got, r->outputs[i].want, r->outputs[i].bytes);
        free(got);
    }
    memory_watch(watched);
}

static void compare_state(const rig *r, const void *want) {
    bool watched = memory_watch(false);
    void *got = malloc(r->state_bytes);
    assert_non_null(got);
    buf_read(r->balance.state, got, r->state_bytes);
    compare_bits("state", got, want, r->state_bytes);
    free(got);
    memory_watch(watched);
}

static void compare_first_state(rig *r) {
    compare_state(r, r->first_state);
}

static void compare_next_state(rig *r) {
    compare_state(r, r->next_state);
    reset_state(r);
}

static void poison_dx(rig *r) {
    buf_poison(r->back.dx);
}

static void compare_dx(rig *r) {
    const size_t bytes = (size_t)TOKENS * r->desc.dim * type_size(r->desc.type);
    bool watched = memory_watch(false);
    void *got = malloc(bytes);
    assert_non_null(got);
    buf_read(r->back.dx, got, bytes);
    compare_bits("dx", got, r->dx, bytes);
    free(got);
    memory_watch(watched);
}

static const phase phases[] = {
    {"layer", NO_QUEUE, fresh_context, run_layer, NULL, undo_layer, NULL},
    {"forward", NO_BLOCKS | LIGHT, reset_outputs, run_forward, compare_outputs, NULL,
     reset_outputs},
    {"packed", 0, reset_outputs, run_packed, NULL, NULL, reset_outputs},
    {"backward", NO_BLOCKS | LIGHT, poison_dx, run_backward, compare_dx, NULL, NULL},
    {"calls", NO_BLOCKS | LIGHT, reset_outputs, run_calls, NULL, NULL, reset_outputs},
    {"state_init", NO_BLOCKS | LIGHT, NULL, run_state_init, compare_first_state, NULL, NULL},
    {"balance_update", NO_BLOCKS | LIGHT, reset_state, run_update, compare_next_state, NULL,
     reset_state},
};

/* ---- A rig ---------------------------------------------------------------------------------- */

static void add_output(rig *r, const char *name, clmoe_buf buf, size_t bytes) {
    size_t i = 0;
    while (r->outputs[i].buf.mem)
        i++;
    if (!buf.mem)
        return;
    assert_true(i < OUTPUTS);
    r->outputs[i].name = name;
    r->outputs[i].buf = buf;
    r->outputs[i].bytes = bytes;
}

/* A state, statistics and losses for the batch. */
static void make_balance(rig *r, const variant *v) {
    const size_t logits = (size_t)TOKENS * r->desc.num_experts * 4;
    OK(clmoe_state_size(r->layer, &r->state_bytes));
    clmoe_balance_args_init(&r->balance);
    r->balance.state = buf_new(r->state_bytes);
    r->balance.bias_rule = CLMOE_BIAS_PROPORTIONAL;
    r->balance.bias_centred = 1;
    r->balance.target_violation = 0.5f;
    r->balance.target_drop_rate = 0.1f;
    r->args.state = r->balance.state;
    if (v->num_losses == 0)
        return;
    r->balance.stats = r->args.stats;
    r->args.losses = v->losses;
    r->args.num_losses = v->num_losses;
    r->args.loss_values = buf_new(v->num_losses * 4);
    r->args.dlogits = buf_new(logits);
    if (r->desc.router.noise.kind == CLMOE_NOISE_LEARNED)
        r->args.dnoise = buf_new(logits);
    if (r->desc.router.groups.two_level)
        r->args.dgroup_logits = buf_new(groups_bytes(r));
}

/* Forward adds to counts of its own, so that those of the update stay the same. */
static void make_counts(rig *r) {
    size_t bytes = 0;
    OK(clmoe_bias_counts_size(r->layer, &bytes));
    r->balance.bias_rule = CLMOE_BIAS_QUANTILE;
    r->balance.bias_counts = buf_new(bytes);
    r->args.bias_counts = buf_of(HOST(char, bytes), bytes);
    r->steps.counts = (clmoe_bias_counts_args){.struct_size = sizeof r->steps.counts,
                                               .tokens = TOKENS,
                                               .weights = &r->weights,
                                               .x = r->args.x,
                                               .logits = r->args.logits,
                                               .token_mask = r->args.token_mask,
                                               .state = r->args.state,
                                               .scratch = r->args.scratch,
                                               .bias_counts = r->balance.bias_counts};
}

static void make_outputs(rig *r) {
    const size_t logits = (size_t)TOKENS * r->desc.num_experts * 4;
    add_output(r, "y", r->args.y, (size_t)TOKENS * r->desc.dim * type_size(r->desc.type));
    add_output(r, "stats", r->args.stats, stats_size(r->layer));
    add_output(r, "loss_values", r->args.loss_values, r->args.num_losses * 4);
    add_output(r, "dlogits", r->args.dlogits, logits);
    add_output(r, "dnoise", r->args.dnoise, logits);
    add_output(r, "dgroup_logits", r->args.dgroup_logits, groups_bytes(r));
}

/* The calls on what forward is given, with buffers of their own between them. */
static void make_calls(rig *r) {
    const clmoe_forward_args *in = &r->args;
    const size_t logits = (size_t)TOKENS * r->desc.num_experts * 4;
    const bool by_expert = ref_lists_pairs(&r->desc);
    const clmoe_buf none = {0};
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(r->layer, TOKENS, &layout));
    const clmoe_buf scores = buf_new(logits), ids = buf_new(layout.pairs * 4);
    const clmoe_buf weights = buf_new(layout.pairs * 4), plan = buf_new(layout.bytes);
    const clmoe_buf live = by_expert ? none : buf_new(TOKENS * 4);
    const clmoe_buf offsets = by_expert ? buf_new((TOKENS + 1) * 4) : none;
#define HEAD(type)                                                                                 \
    .struct_size = sizeof(type), .tokens = TOKENS, .state = in->state, .scratch = in->scratch
#define CHOICE                                                                                     \
    .ids = ids, .pair_weights = weights, .live = live, .token_mask = in->token_mask,               \
    .token_offsets = offsets, .plan = plan, .weights = &r->weights
    r->steps.score = (clmoe_score_args){HEAD(clmoe_score_args), .weights = &r->weights, .x = in->x,
                                        .logits = in->logits, .scores = scores};
    r->steps.topk = (clmoe_topk_args){HEAD(clmoe_topk_args),    .weights = &r->weights,
                                      .scores = scores,         .ids = ids,
                                      .pair_weights = weights,  .live = live,
                                      .token_offsets = offsets, .token_mask = in->token_mask};
    r->steps.plan = (clmoe_plan_args){HEAD(clmoe_plan_args), CHOICE, .scores = scores};
    r->steps.stats = (clmoe_stats_args){HEAD(clmoe_stats_args), CHOICE, .x = in->x,
                                        .logits = in->logits, .stats = in->stats};
    r->steps.loss = (clmoe_loss_args){HEAD(clmoe_loss_args),
                                      CHOICE,
                                      .x = in->x,
                                      .logits = in->logits,
                                      .losses = in->losses,
                                      .num_losses = in->num_losses,
                                      .values = in->loss_values,
                                      .dlogits = in->dlogits,
                                      .dnoise = in->dnoise};
    r->steps.orthogonality = (clmoe_router_orthogonality_args){
        .struct_size = sizeof r->steps.orthogonality,
        .weights = &r->weights,
        .scratch = in->scratch,
        .value = buf_new(4),
        .drouter = buf_new((size_t)r->desc.num_experts * r->desc.dim * 4)};
}

static void *bytes_now(rig *r, clmoe_buf buf, size_t bytes) {
    void *data = host_alloc(bytes, 1);
    CL_OK(clFinish(r->queue));
    buf_read(buf, data, bytes);
    return data;
}

/* Everything once without a fault: what must come out of it. */
static void run_once(rig *r) {
    OK(run_state_init(r));
    r->first_state = bytes_now(r, r->balance.state, r->state_bytes);
    reset_outputs(r);
    OK(run_forward(r));
    for (size_t i = 0; i < OUTPUTS; i++)
        if (r->outputs[i].buf.mem)
            r->outputs[i].want = bytes_now(r, r->outputs[i].buf, r->outputs[i].bytes);
    OK(run_backward(r));
    r->dx = bytes_now(r, r->back.dx, (size_t)TOKENS * r->desc.dim * type_size(r->desc.type));
    if (r->args.num_losses == 0)
        return;
    if (r->steps.counts.bias_counts.mem)
        OK(clmoe_bias_counts(r->layer, r->queue, &r->steps.counts, 0, NULL, NULL));
    OK(run_update(r));
    r->next_state = bytes_now(r, r->balance.state, r->state_bytes);
    reset_state(r);
}

/* z is made again, unlike in test_fault.c. */
static void make_backward(rig *r) {
    const size_t n = (size_t)TOKENS * r->desc.dim;
    clmoe_backward_args_init(&r->back);
    r->back.tokens = TOKENS;
    r->back.weights = &r->weights;
    r->back.x = r->args.x;
    r->back.token_mask = r->args.token_mask;
    r->back.state = r->args.state;
    r->back.saved = r->args.saved;
    r->back.scratch = r->args.scratch;
    r->back.dy = buf_of_type(r->desc.type, random_floats(n, 1.0), n);
    r->back.dx = buf_new_type(r->desc.type, n);
    OK(clmoe_gradients_create(r->layer, &r->gradients));
    r->back.gradients = &r->gradients;
}

/* At a multiple of what any engine asks for. */
static void make_packed(rig *r) {
    size_t bytes = 0;
    if (clmoe_packed_size(r->layer, CLMOE_MLP_EXPERTS, &bytes) != CLMOE_SUCCESS)
        return;
    support_aligned = true;
    r->packed = buf_new(bytes);
    support_aligned = false;
}

static void make_rig(rig *r, const variant *v, cl_command_queue queue) {
    batch b;
    device_batch d;
    *r = (rig){.engine = v->engine ? v->engine : "ref",
               .model = v->name,
               .queue = queue,
               .desc = desc_of(&small)};
    variant_set(&r->desc, v->name, v->set);
    r->desc.engine = r->engine;
    r->desc.training = r->desc.recompute = 1;
    seed_set(5);
    batch_make(&b, &r->desc, TOKENS);
    b.in.token_mask = random_mask(TOKENS);
    OK(run_context(r));
    OK(run_layer(r));
    batch_upload(r->layer, &b, &d);
    r->weights = d.weights;
    r->weights.select_bias = (clmoe_buf){0};
    r->weights.noise_router = d.weights.router;
    r->args = d.args;
    r->args.weights = &r->weights;
    make_packed(r);
    make_balance(r, v);
    make_backward(r);
    make_outputs(r);
    if (v->num_losses > 0)
        make_calls(r);
    if (v->set == quantile)
        make_counts(r);
    run_once(r);
}

static void sweep_variant(const variant *v, const source *from, cl_command_queue queue) {
    rig r;
    test_case("balance, %s, without faults", v->name);
    make_rig(&r, v, queue);
    for (size_t i = 0; i < COUNT_OF(phases); i++) {
        const phase *p = &phases[i];
        if ((p->run == run_layer && !everything) || !phase_has_queue(&r, p) ||
            ((p->run == run_calls || p->run == run_update) && v->num_losses == 0))
            continue;
        rig own = r;
        if (p->undo == undo_layer) {
            own.context = NULL;
            own.layer = NULL;
        }
        sweep(&own, p, from);
        if (p->run == run_state_init)
            reset_state(&r);
    }
    clmoe_gradients_release(&r.gradients);
    undo_layer(&r);
}

static bool has_engine(const char *name) {
    const char *const *engines = test_engines_of(CLMOE_BF16, CLMOE_BF16);
    for (size_t n = 0; engines[n] != NULL; n++)
        if (strcmp(engines[n], name) == 0)
            return true;
    return false;
}

void sweep_balance(const source *from, cl_command_queue queue) {
    for (size_t i = 0; i < (everything ? COUNT_OF(variants) : 1); i++)
        if (!variants[i].engine || has_engine(variants[i].engine))
            sweep_variant(&variants[i], from, queue);
}
