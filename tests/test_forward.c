/* The whole layer: every switch of the descriptor and every optional input, on every engine. */
#include "support.h"
#include "support_balance.h"

#include <math.h>
#include <string.h>

/* Below this relative distance f32 may choose otherwise than the oracle; see ref_choice_gap(). */
#define MIN_GAP 1e-5

/* Optional inputs, as bits. */
enum { MASK = 1, RESIDUAL = 2, LOGITS_IN = 4, IDS_IN = 8, ONLY_Y = 16, ALL_INPUTS = 31 };

/* ---- The switches, mostly as model families combine them ------------------------------------- */

static void softmax(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_NONE;
}

static void softmax_renorm_separate(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->experts.gate_layout = CLMOE_GATE_SEPARATE;
}

static void sigmoid_groups_shared(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.select_bias = 1;
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
    d->router.groups.score = CLMOE_GROUP_TOP2_SUM;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.eps = 1e-20f;
    d->router.scale = 2.5f;
    d->shared.hidden_dim = 13;
}

static void softmax_groups_by_max(clmoe_layer_desc *d) {
    d->router.groups.count = 3;
    d->router.groups.topk = 1;
    d->router.groups.score = CLMOE_GROUP_MAX;
    d->router.scale = 16.0f;
}

static void topk_softmax_gpt_oss(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.bias = 1;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.gate_up_transposed = d->experts.down_transposed = 1;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->experts.limit = 1.5f;
    d->experts.alpha = 1.702f;
    d->experts.up_shift = 1.0f;
}

static void topk_sigmoid_at_input(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->experts.gate_up_transposed = 1;
    d->experts.gate_up_bias = 1;
    d->shared.hidden_dim = 7;
    d->shared.gate_layout = CLMOE_GATE_SEPARATE;
}

static void sqrt_softplus_limit(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.select_bias = 1;
    d->experts.limit = 0.75f;
}

static void topk_sqrt_softplus(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

static void geometric(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_IDENTITY;
    d->normalize_experts = 1;
    d->experts.down_bias = 1;
}

static void topk_identity(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_IDENTITY;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 2.0f;
}

static void sparsemixer(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SPARSEMIXER;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.sparsemixer_eps = 0.1371f;
}

static void temperature_softcap(clmoe_layer_desc *d) {
    d->router.temperature = 0.6f;
    d->router.softcap = 4.0f;
    d->router.bias = 1;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.eps = 0.01f;
}

static void pnorm_expert_scale(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.expert_scale = 1;
    d->experts.activation = CLMOE_ACT_GELU_TANH;
}

static void renorm_after_drop(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->router.scale = 1.5f;
    d->router.expert_scale = 1;
    d->capacity.factor = 0.7;
    d->num_identity_experts = 2;
}

static void scale_after_drop(clmoe_layer_desc *d) {
    d->router.renorm.after_drop = 1;
    d->router.scale = 0.5f;
    d->capacity.factor = 0.7;
}

static void at_activation_keep_weight(clmoe_layer_desc *d) {
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->capacity.factor = 0.8;
    d->capacity.keep = CLMOE_KEEP_WEIGHT;
    d->experts.down_bias = 1;
}

static void keep_position(clmoe_layer_desc *d) {
    d->capacity.factor = 0.5;
    d->capacity.rounding = CLMOE_ROUND_DOWN;
}

static void keep_choice_major(clmoe_layer_desc *d) {
    d->capacity.rows = 5;
    d->capacity.keep = CLMOE_KEEP_CHOICE_MAJOR;
}

static void keep_priority(clmoe_layer_desc *d) {
    d->capacity.factor = 1.0;
    d->capacity.multiple = 4;
    d->capacity.keep = CLMOE_KEEP_PRIORITY;
}

static void no_room_at_all(clmoe_layer_desc *d) {
    d->capacity.factor = 1e-6;
    d->capacity.rounding = CLMOE_ROUND_DOWN;
    d->output_bias = 1;
}

static void identity_experts(clmoe_layer_desc *d) {
    d->num_identity_experts = 5;
    d->router.select_bias = 1;
    d->router.scale = 6.0f;
}

static void identity_experts_at_input(clmoe_layer_desc *d) {
    d->num_identity_experts = 5;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->normalize_experts = 1;
}

static void shared_gate(clmoe_layer_desc *d) {
    d->shared.hidden_dim = 25;
    d->shared_gate = 1;
}

static void shared_every_switch(clmoe_layer_desc *d) {
    d->shared.hidden_dim = 9;
    d->shared.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->shared.activation = CLMOE_ACT_GELU_ERF;
    d->shared.gate_up_transposed = d->shared.down_transposed = 1;
    d->shared.gate_up_bias = d->shared.down_bias = 1;
    d->shared.limit = 1.0f;
    d->shared.up_shift = 0.5f;
    d->shared_gate = 1;
    d->output_bias = 1;
}

static void plain_relu2(clmoe_layer_desc *d) {
    d->experts.gate_layout = CLMOE_GATE_NONE;
    d->experts.activation = CLMOE_ACT_RELU2;
    d->shared.hidden_dim = 11;
    d->shared.gate_layout = CLMOE_GATE_NONE;
    d->shared.activation = CLMOE_ACT_RELU;
}

static void output_bias_training(clmoe_layer_desc *d) {
    d->output_bias = 1;
    d->training = 1;
}

static void every_expert_chosen(clmoe_layer_desc *d) {
    d->top_k = d->num_experts;
}

static const struct {
    const char *name;
    void (*set)(clmoe_layer_desc *desc);
} variants[] = {
    {"softmax", softmax},
    {"softmax, renorm, separate", softmax_renorm_separate},
    {"sigmoid, groups, shared", sigmoid_groups_shared},
    {"softmax, groups by max", softmax_groups_by_max},
    {"top-k then softmax, interleaved, biases", topk_softmax_gpt_oss},
    {"top-k then sigmoid, weight at input", topk_sigmoid_at_input},
    {"sqrt softplus, limit", sqrt_softplus_limit},
    {"top-k then sqrt softplus", topk_sqrt_softplus},
    {"identity score, normalized experts", geometric},
    {"top-k then identity", topk_identity},
    {"sparsemixer", sparsemixer},
    {"temperature, softcap", temperature_softcap},
    {"p-norm, expert scale", pnorm_expert_scale},
    {"renorm after drop", renorm_after_drop},
    {"scale after drop", scale_after_drop},
    {"weight at activation, keep weight", at_activation_keep_weight},
    {"keep position", keep_position},
    {"keep choice-major", keep_choice_major},
    {"keep priority", keep_priority},
    {"no room at all", no_room_at_all},
    {"identity experts", identity_experts},
    {"identity experts, weight at input", identity_experts_at_input},
    {"shared gate", shared_gate},
    {"shared, every switch", shared_every_switch},
    {"plain relu2", plain_relu2},
    {"output bias, training", output_bias_training},
    {"every expert chosen", every_expert_chosen},
};

/* ---- Batches ------------------------------------------------------------------------------- */

/* Ids of another router: repeated ones, and some out of range. */
static const int32_t *foreign_ids(size_t pairs, uint32_t columns) {
    int32_t *ids = HOST(int32_t, pairs);
    for (size_t p = 0; p < pairs; p++)
        ids[p] = (int32_t)random_below(columns + 2) - 1;
    return ids;
}

static void add_inputs(batch *b, uint32_t inputs) {
    size_t T = b->in.tokens, R = ref_columns(&b->desc), pairs = T * b->desc.top_k;
    if (inputs & MASK)
        b->in.token_mask = random_mask(b->in.tokens);
    if (inputs & RESIDUAL)
        b->in.residual = random_floats(T * b->desc.dim, 1.0);
    if (inputs & LOGITS_IN)
        b->in.logits_in = random_eighths(T * R, 2.0);
    if (inputs & IDS_IN) {
        b->in.ids_in = foreign_ids(pairs, (uint32_t)R);
        b->in.pair_weights_in = random_floats(pairs, 1.0);
    }
    b->no_outputs = (inputs & ONLY_Y) != 0;
}

/* A batch whose choices and order do not hang on the last bits, and its oracle. */
static const ref_result *clear_batch(batch *b, const clmoe_layer_desc *desc, uint32_t tokens,
                                     uint32_t inputs) {
    for (uint64_t seed = 1; seed < 200; seed++) {
        seed_set(seed);
        batch_make(b, desc, tokens);
        add_inputs(b, inputs);
        const ref_result *want = batch_reference(b);
        if (want->choice_gap > MIN_GAP && want->order_gap > MIN_GAP)
            return want;
    }
    CHECK(false, "no seed without near ties\n");
    return NULL;
}

static void check_forward(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                          uint32_t inputs) {
    batch b;
    device_batch d;
    const ref_result *want = clear_batch(&b, desc, tokens, inputs);
    batch_run(test_layer(group_size, desc), &b, &d);
    batch_compare(&b, &d, want);
}

/* Whether every combination is wanted, not a selection. */
static bool sweep;

/* ---- Tests --------------------------------------------------------------------------------- */

static const shape small = {33, 21, 12, 0, 3, 19};

static void every_switch_and_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(variants); i++) {
            clmoe_layer_desc desc = desc_of(&small);
            variants[i].set(&desc);
            desc.engine = engines[n];
            test_case("engine %s, %s", engines[n], variants[i].name);
            check_forward(0, &desc, small.tokens, i % 2 ? RESIDUAL : 0);
        }
}

static bool is_selected(uint32_t inputs, size_t variant, size_t group) {
    bool contradicts = (inputs & LOGITS_IN) && (inputs & IDS_IN);
    return !contradicts && (sweep || (inputs + variant + group) % 3 == 0);
}

static void check_inputs(const char *engine, size_t variant, size_t group) {
    for (uint32_t inputs = 0; inputs <= ALL_INPUTS; inputs++) {
        clmoe_layer_desc desc = desc_of(&small);
        variants[variant].set(&desc);
        desc.engine = engine;
        if (!is_selected(inputs, variant, group))
            continue;
        test_case("engine %s, group size %u, %s, inputs %u", engine, group_sizes[group],
                  variants[variant].name, inputs);
        check_forward(group_sizes[group], &desc, small.tokens, inputs);
    }
}

static void every_switch_and_input(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(variants); i++) {
            check_inputs("ref", i, g);
            for (size_t n = 0; sweep && engines[n] != NULL; n++)
                check_inputs(engines[n], i, g);
        }
}

static void every_shape_and_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(layer_shapes); i++) {
            clmoe_layer_desc desc = desc_of(&layer_shapes[i]);
            desc.engine = engines[n];
            desc.router.renorm.kind = CLMOE_RENORM_SUM;
            desc.capacity.factor = i % 3 == 1 ? 1.0 : 0.0;
            test_case("engine %s, T %u, D %u, E %u, K %u, H %u", engines[n], layer_shapes[i].tokens,
                      desc.dim, desc.num_experts, desc.top_k, desc.experts.hidden_dim);
            check_forward(0, &desc, layer_shapes[i].tokens, MASK | RESIDUAL);
        }
}

/* The default engine, by device. */
static void default_engine(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    desc.engine = NULL;
    test_case("default engine");
    check_forward(0, &desc, small.tokens, 0);
    assert_non_null(clmoe_layer_engine(test_layer(0, &desc)));
}

/* Loads of every kind, through external logits; non-finite ones among them. */
static void every_pattern(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {200, 11, 16, 0, 4, 7};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (pattern kind = 0; kind < PATTERN_COUNT; kind++)
            for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_CHOICE_MAJOR; keep++) {
                clmoe_layer_desc desc = desc_of(&s);
                desc.engine = engines[n];
                desc.router.renorm.kind = CLMOE_RENORM_SUM;
                desc.capacity.factor = kind % 2 ? 1.0 : 0.0;
                desc.capacity.keep = (clmoe_keep)keep;
                test_case("engine %s, %s, keep %d", engines[n], pattern_name(kind), keep);
                batch b;
                device_batch d;
                seed_set(kind + 1);
                batch_make(&b, &desc, s.tokens);
                float *logits = pattern_logits(kind, s.tokens, s.experts);
                for (size_t i = 0; i < (size_t)s.tokens * s.experts; i++)
                    logits[i] = roundf(logits[i] * 64.0f) / 64.0f;
                b.in.logits_in = logits;
                const ref_result *want = batch_reference(&b);
                batch_run(test_layer(0, &desc), &b, &d);
                batch_compare(&b, &d, want);
            }
}

/* A token that is not finite stays alone with it: the others' rows of y are as ever. */
static void nonfinite_token(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        clmoe_layer_desc desc = desc_of(&small);
        desc.engine = engines[n];
        test_case("engine %s", engines[n]);
        batch b;
        device_batch d;
        const ref_result *want = clear_batch(&b, &desc, small.tokens, 0);
        float *x = HOST(float, small.tokens *small.dim);
        memcpy(x, b.in.x, sizeof(float) * small.tokens * small.dim);
        const size_t bad = 4 * (size_t)small.dim;
        for (size_t i = 0; i < small.dim; i++)
            x[bad + i] = i % 2 ? NAN : INFINITY;
        b.in.x = x;
        batch_run(test_layer(0, &desc), &b, &d);
        const float *y = buf_get(d.args.y);
        const clmoe_stats *stats = buf_get(d.args.stats);
        assert_int_equal(stats->nonfinite_tokens, 1);
        assert_int_equal(stats->pairs, (small.tokens - 1) * small.top_k);
        compare_floats("y before", y, want->y, bad, FORWARD_TOLERANCE);
        compare_floats("y behind", y + bad + small.dim, want->y + bad + small.dim,
                       (size_t)small.tokens * small.dim - bad - small.dim, FORWARD_TOLERANCE);
        for (size_t i = 0; i < small.dim; i++)
            CHECK(y[bad + i] == 0.0f, "y of the token is %g\n", (double)y[bad + i]);
    }
}

/* ---- The steps one by one ------------------------------------------------------------------ */

static void expert_choice(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    d->router.expert_scale = 1;
    d->capacity.factor = 1.5;
}

static void sinkhorn(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SINKHORN;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}

static void soft(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SOFT;
    d->top_k = d->num_experts;
}

static void soft_moe(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SOFT_MOE;
    d->top_k = 1;
}

static void two_levels(clmoe_layer_desc *d) {
    d->top_k = 4;
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
    d->router.groups.two_level = 1;
}

static void reroute_scaled(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.expert_scale = 1;
    d->capacity.factor = 1.0;
    d->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
}

static void rebalance(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.rebalance.iterations = 5;
}

static void sequences_by_priority(clmoe_layer_desc *d) {
    d->capacity.factor = 0.7;
    d->capacity.tokens_per_sequence = 10;
    d->capacity.keep = CLMOE_KEEP_PRIORITY;
}

static void learned_noise(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
    d->router.dropout.experts = 0.2f;
    d->router.noise.jitter = 0.1f;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

static void gumbel_noise(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_GUMBEL;
    d->router.dropout.logits = 0.2f;
    d->router.select_bias = 1;
}

static void jitter_of_experts(clmoe_layer_desc *d) {
    d->router.noise.jitter = 0.1f;
    d->router.noise.jitter_experts = 1;
}

static void keep_random(clmoe_layer_desc *d) {
    d->capacity.factor = 0.8;
    d->capacity.keep = CLMOE_KEEP_RANDOM;
}

static void (*const policies[])(clmoe_layer_desc *) = {
    expert_choice, sinkhorn,          soft,        soft_moe,
    two_levels,    reroute_scaled,    rebalance,   learned_noise,
    gumbel_noise,  jitter_of_experts, keep_random, sequences_by_priority};

/* The word that the step which leaves something out refuses with; NULL: none does. */
static const char *left_out(const clmoe_layer_desc *desc, bool has_state) {
    if (desc->router.policy == CLMOE_POLICY_SOFT_MOE)
        return "Soft MoE";
    if (desc->router.noise.jitter_experts && has_state)
        return "noise.jitter_experts";
    if (desc->router.renorm.after_drop)
        return "renorm.after_drop";
    return desc->shared.hidden_dim ? "shared is not given" : NULL;
}

/* All steps of a batch, with outputs of their own. */
typedef struct steps {
    clmoe_layer *layer;
    clmoe_score_args score;
    clmoe_topk_args topk;
    clmoe_plan_args plan;
    clmoe_dispatch_args dispatch;
    clmoe_experts_args experts;
    clmoe_combine_args combine;
    clmoe_stats_args stats;
} steps;

#define STEP(type, ...)                                                                            \
    (type) {                                                                                       \
        .struct_size = sizeof(type), .tokens = a->tokens, __VA_ARGS__                              \
    }

/* The routing's arguments, from those of a forward. */
static void routing_steps(clmoe_layer *layer, const clmoe_layer_desc *desc,
                          const clmoe_forward_args *a, steps *s) {
    clmoe_plan_layout plan;
    OK(clmoe_plan_layout_get(layer, a->tokens, &plan));
    const size_t T = a->tokens, logits = T * ref_columns(desc) * 4, pairs = (size_t)plan.pairs * 4;
    const bool choice = desc->router.policy == CLMOE_POLICY_EXPERT_CHOICE;
    s->layer = layer;
    s->score = STEP(clmoe_score_args, .weights = a->weights, .x = a->x, .logits = buf_new(logits),
                    .scores = buf_new(logits), .state = a->state, .scratch = a->scratch);
    s->topk = STEP(clmoe_topk_args, .weights = a->weights, .scores = s->score.scores,
                   .ids = buf_new(pairs), .pair_weights = buf_new(pairs),
                   .token_mask = a->token_mask, .state = a->state, .scratch = a->scratch);
    s->topk.live = choice ? (clmoe_buf){NULL, 0} : buf_new(T * 4);
    s->topk.token_offsets = choice ? buf_new((T + 1) * 4) : (clmoe_buf){NULL, 0};
    s->plan =
        STEP(clmoe_plan_args, .weights = a->weights, .ids = s->topk.ids,
             .pair_weights = s->topk.pair_weights, .live = s->topk.live,
             .token_mask = a->token_mask, .token_offsets = s->topk.token_offsets, .state = a->state,
             .scores = s->score.scores, .scratch = a->scratch, .plan = buf_new(plan.bytes));
}

static void expert_steps(const clmoe_layer_desc *desc, const clmoe_forward_args *a, steps *s) {
    clmoe_plan_layout plan;
    OK(clmoe_plan_layout_get(s->layer, a->tokens, &plan));
    const size_t rows = plan.slots * (size_t)desc->dim * 4;
    s->dispatch = STEP(clmoe_dispatch_args, .x = a->x, .plan = s->plan.plan, .xe = buf_new(rows));
    s->experts = STEP(clmoe_experts_args, .weights = a->weights, .xe = s->dispatch.xe,
                      .pair_weights = s->topk.pair_weights, .plan = s->plan.plan,
                      .scratch = a->scratch, .ye = buf_new(rows));
    s->combine = STEP(clmoe_combine_args, .weights = a->weights, .x = a->x, .ye = s->experts.ye,
                      .pair_weights = s->topk.pair_weights, .plan = s->plan.plan,
                      .token_mask = a->token_mask, .token_offsets = s->topk.token_offsets,
                      .residual = a->residual, .y = buf_new((size_t)a->tokens * desc->dim * 4));
    s->stats = STEP(clmoe_stats_args, .weights = a->weights, .x = a->x, .logits = s->score.logits,
                    .ids = s->topk.ids, .pair_weights = s->topk.pair_weights, .plan = s->plan.plan,
                    .live = s->topk.live, .token_mask = a->token_mask,
                    .token_offsets = s->topk.token_offsets, .state = a->state,
                    .scratch = a->scratch, .stats = buf_new(clmoe_stats_size(s->layer)));
}

/* Runs them until one refuses. */
static clmoe_status run_steps(const steps *s) {
    clmoe_status status = clmoe_score(s->layer, test.queue, &s->score, 0, NULL, NULL);
    status = status ? status : clmoe_topk(s->layer, test.queue, &s->topk, 0, NULL, NULL);
    status = status ? status : clmoe_plan(s->layer, test.queue, &s->plan, 0, NULL, NULL);
    status = status ? status : clmoe_dispatch(s->layer, test.queue, &s->dispatch, 0, NULL, NULL);
    status = status ? status : clmoe_experts(s->layer, test.queue, &s->experts, 0, NULL, NULL);
    status = status ? status : clmoe_combine(s->layer, test.queue, &s->combine, 0, NULL, NULL);
    return status ? status : clmoe_stats_compute(s->layer, test.queue, &s->stats, 0, NULL, NULL);
}

static void same_bits(const char *what, clmoe_buf steps_wrote, clmoe_buf forward_wrote,
                      size_t bytes) {
    compare_bits(what, buf_get(steps_wrote), buf_get(forward_wrote), bytes);
}

static void check_steps(const clmoe_layer_desc *desc, bool has_state) {
    batch b;
    device_batch d;
    steps s;
    size_t bytes = 0, T = small.tokens;
    const char *says = left_out(desc, has_state);
    clmoe_layer *layer = test_layer(0, desc);
    seed_set(3);
    batch_make(&b, desc, small.tokens);
    add_inputs(&b, MASK | RESIDUAL);
    batch_upload(layer, &b, &d);
    d.weights.noise_router = d.weights.router;
    OK(clmoe_state_size(layer, &bytes));
    if (has_state)
        d.args.state = buf_of(random_state_of(desc), bytes);
    routing_steps(layer, desc, &d.args, &s);
    expert_steps(desc, &d.args, &s);
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    clmoe_status status = run_steps(&s);
    CHECK((status == CLMOE_SUCCESS) == !says, "%s: %s\n", clmoe_status_string(status),
          clmoe_last_error());
    CL_OK(clFinish(test.queue));
    if (says) {
        CHECK(strstr(clmoe_last_error(), says) != NULL, "it says: %s\n", clmoe_last_error());
        return;
    }
    same_bits("logits", s.score.logits, d.args.logits, T * ref_columns(desc) * 4);
    same_bits("ids", s.topk.ids, d.args.ids, ref_pairs(desc, small.tokens) * 4);
    same_bits("weights", s.topk.pair_weights, d.args.pair_weights,
              ref_pairs(desc, small.tokens) * 4);
    same_bits("y", s.combine.y, d.args.y, T * desc->dim * 4);
    same_bits("stats", s.stats.stats, d.args.stats, clmoe_stats_size(layer));
}

/* Every switch: the steps give the forward's bits, or one of them says what none of them does. */
static void single_steps(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(variants) + COUNT_OF(policies); i++)
        for (int has_state = 0; has_state < 2; has_state++) {
            clmoe_layer_desc desc = desc_of(&small);
            const bool is_variant = i < COUNT_OF(variants);
            if (is_variant)
                variants[i].set(&desc);
            else
                policies[i - COUNT_OF(variants)](&desc);
            desc.training = 0;
            if (desc.capacity.keep == CLMOE_KEEP_RANDOM && !has_state)
                continue;
            test_case("%s %zu, state %d", is_variant ? variants[i].name : "policy", i, has_state);
            check_steps(&desc, has_state);
        }
}

/* With the argument "all", every combination: minutes. */
int main(int argc, char **argv) {
    sweep = argc > 1 && strcmp(argv[1], "all") == 0;
    const struct CMUnitTest tests[] = {
        TEST(every_switch_and_engine),
        TEST(every_switch_and_input),
        TEST(every_shape_and_engine),
        TEST(default_engine),
        TEST(every_pattern),
        TEST(nonfinite_token),
        TEST(single_steps),
    };
    return RUN(tests);
}
