/*
 * The lines of kernels that test_kernels.c does not reach, in few programs: made for the native
 * device, where each program is compiled anew, and right on any other.
 */
#include "ref_random.h"
#include "support_loss.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

static const shape small = {19, 21, 12, 2, 3, 13};

static void softcap_pnorm(clmoe_layer_desc *d) {
    d->router.temperature = 0.6f;
    d->router.softcap = 4.0f;
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 2.0f;
    d->experts.activation = CLMOE_ACT_GELU_ERF;
    d->experts.gate_up_bias = 1;
}

static void topk_sigmoid(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->experts.activation = CLMOE_ACT_GELU_TANH;
    d->experts.limit = 0.75f;
}

static void topk_sqrt_softplus(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->experts.activation = CLMOE_ACT_RELU;
}

static void topk_softmax(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.activation = CLMOE_ACT_RELU2;
}

static const layer_variant switches[] = {
    {"softcap, sqrt softplus, p-norm, GELU", softcap_pnorm},
    {"top-k then sigmoid, GELU by tanh", topk_sigmoid},
    {"top-k then sqrt softplus, ReLU", topk_sqrt_softplus},
    {"top-k then softmax, interleaved, ReLU^2", topk_softmax},
};

static void run(const clmoe_layer_desc *desc, bool nonfinite) {
    batch b;
    device_batch d;
    seed_set(7);
    batch_make(&b, desc, small.tokens);
    if (nonfinite)
        b.in.logits_in = pattern_logits(PATTERN_NONFINITE, small.tokens, ref_columns(desc));
    batch_run(test_layer(0, desc), &b, &d);
    batch_compare(&b, &d, batch_reference(&b));
}

/* The engine that needs dispatch.cl and clblast.cl, or another where it is not built in. */
static const char *engine_without_gather(void) {
    const char *const *engines = test_engines();
    size_t last = 0;
    while (engines[last + 1] != NULL)
        last++;
    return engines[last];
}

static void every_score_and_activation(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(switches); i++) {
        clmoe_layer_desc desc = desc_of(&small);
        switches[i].set(&desc);
        desc.engine = engine_without_gather();
        test_case("engine %s, %s", desc.engine, switches[i].name);
        run(&desc, false);
    }
}

static void every_storage_type(void **state) {
    (void)state;
    const clmoe_type types[] = {CLMOE_F16, CLMOE_BF16};
    for (size_t i = 0; i < COUNT_OF(types); i++) {
        clmoe_layer_desc desc = desc_of(&small);
        desc.dim = 140; /* more than one step of the linear GEMM, too */
        desc.type = desc.weight_type = types[i];
        desc.experts.gate_layout = CLMOE_GATE_INTERLEAVED;
        desc.experts.gate_up_transposed = desc.experts.down_transposed = 1;
        desc.engine = NULL;
        test_case("type %d", types[i]);
        run(&desc, false);
    }
}

/* More tokens than one group reroutes alone. */
static void rerouted_tokens(void **state) {
    (void)state;
    const shape many = {1030, 5, 8, 0, 2, 3};
    clmoe_layer_desc desc = desc_of(&many);
    batch b;
    device_batch d;
    desc.capacity.factor = 0.6;
    desc.capacity.overflow = CLMOE_OVERFLOW_REROUTE;
    test_case("rerouting");
    seed_set(7);
    batch_make(&b, &desc, many.tokens);
    batch_run(test_layer(0, &desc), &b, &d);
    batch_compare(&b, &d, batch_reference(&b));
}

/* Also more than one step of the tiled engine. */
static void nonfinite_logits(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    desc.router.score = CLMOE_SCORE_IDENTITY;
    desc.engine = "tiled";
    test_case("logits that are not finite");
    run(&desc, true);
}

/* Pairs where they would be anyway, the last left out: the same plan and the same output. */
static void token_offsets(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    size_t T = small.tokens, D = small.dim, K = small.top_k;
    test_case("token offsets");
    seed_set(1);
    ref_plan_in in;
    clmoe_plan_layout layout;
    clmoe_layer *layer = test_layer(0, &desc);
    route_random(&desc, small.tokens, PATTERN_UNIFORM, &in);
    int32_t *offsets = HOST(int32_t, T + 1), *live = HOST(int32_t, T);
    for (size_t t = 0; t <= T; t++)
        offsets[t] = (int32_t)(t * K);
    memcpy(live, in.live, T * 4);
    in.live = live;
    live[T - 1] = (int32_t)K - 1;
    offsets[T]--;
    clmoe_weights none = {0};
    clmoe_combine_args args = {.struct_size = sizeof args, .tokens = small.tokens};
    args.weights = &none;
    args.x = buf_of(random_floats(T * D, 1.0), T * D * 4);
    args.pair_weights = buf_of(in.pair_weights, T * K * 4);
    void *plans[2], *outputs[2];
    for (int with = 0; with < 2; with++) {
        in.token_offsets = with ? offsets : NULL;
        args.plan = plan_run(layer, &desc, &in, &layout);
        if (!with)
            args.ye = buf_of(random_floats(layout.slots * D, 1.0), layout.slots * D * 4);
        args.token_offsets = buf_of(in.token_offsets, (T + 1) * 4);
        args.y = buf_new(T * D * 4);
        OK(clmoe_combine(layer, test.queue, &args, 0, NULL, NULL));
        plans[with] = buf_get(args.plan);
        outputs[with] = buf_get(args.y);
    }
    compare_bits("pair_of", (char *)plans[1] + layout.pair_of, (char *)plans[0] + layout.pair_of,
                 layout.slots * 4);
    compare_bits("y", outputs[1], outputs[0], T * D * 4);
}

/* Two levels with several choices a group; one token picks no group, one finds too few experts. */
static void two_levels(void **state) {
    (void)state;
    batch b;
    device_batch d;
    clmoe_layer_desc desc = desc_of(&small);
    desc.num_identity_experts = 0;
    desc.top_k = 6;
    desc.router.groups.two_level = 1;
    desc.router.groups.count = 3;
    desc.router.groups.topk = 2;
    test_case("two levels");
    seed_set(2);
    batch_make(&b, &desc, small.tokens);
    float *x = HOST(float, small.tokens *small.dim);
    memcpy(x, b.in.x, (size_t)small.tokens * small.dim * sizeof *x);
    x[4 * small.dim + 1] = INFINITY;
    b.in.x = x;
    float *logits = pattern_logits(PATTERN_UNIFORM, small.tokens, small.experts);
    for (size_t e = 1; e < small.experts; e += 2)
        logits[6 * small.experts + e] = NAN;
    b.in.logits_in = logits;
    batch_run(test_layer(0, &desc), &b, &d);
    batch_compare(&b, &d, batch_reference(&b));
}

/* With the identity as score, the scores are the noisy logits. */
static void gumbel_noise(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    size_t R = ref_columns(&desc), n = small.tokens * R;
    desc.router.score = CLMOE_SCORE_IDENTITY;
    desc.router.noise.kind = CLMOE_NOISE_GUMBEL;
    test_case("Gumbel noise");
    seed_set(4);
    clmoe_layer *layer = test_layer(0, &desc);
    const clmoe_state *header = random_state_of(&desc);
    const float *logits = random_floats(n, 1.0);
    clmoe_weights none = {0};
    double *want = HOST(double, n);
    clmoe_score_args args = {.struct_size = sizeof args,
                             .tokens = small.tokens,
                             .weights = &none,
                             .logits_in = buf_of(logits, n * 4),
                             .scores = buf_new(n * 4),
                             .state = buf_of(header, sizeof *header + 20 * R),
                             .scratch = scratch_of(layer, small.tokens)};
    OK(clmoe_score(layer, test.queue, &args, 0, NULL, NULL));
    ref_noisy(&desc, header, small.tokens, logits, NULL, want);
    compare_floats("noisy", buf_get(args.scores), want, n, STEP_TOLERANCE);
}

/* ---- Losses ------------------------------------------------------------------------------------
 */

#define WEIGHTS                                                                                    \
    { .kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.5f, .p_source = CLMOE_P_WEIGHTS }

static void identity(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_IDENTITY;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 2.0f;
    d->router.softcap = 2.5f;
}

static void sqrt_softplus(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.expert_scale = 1;
}

static void over_chosen(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.eps = 0.25f;
    d->router.renorm.after_drop = 1;
    d->capacity.rows = 2;
}

static void over_row(clmoe_layer_desc *d) {
    d->router.softcap = 2.5f;
}

static void sigmoid(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}

static void gaussian(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    d->router.dropout.logits = 0.5f;
    d->num_experts = 5;
    d->num_identity_experts = 0;
}

static const struct {
    void (*set)(clmoe_layer_desc *desc);
    pattern kind;
    clmoe_loss_desc losses[4];
} loss_cases[] = {
    {identity,
     PATTERN_UNIFORM,
     {WEIGHTS,
      {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f},
      {.kind = CLMOE_LOSS_ENTROPY, .weight = 1.0f},
      {.kind = CLMOE_LOSS_LOAD_CV2, .weight = 1.0f, .f_source = CLMOE_F_SUPPLIED}}},
    {sqrt_softplus, PATTERN_UNIFORM, {WEIGHTS, {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f}}},
    {over_chosen, PATTERN_UNIFORM, {WEIGHTS}},
    {over_row, PATTERN_NONFINITE, {WEIGHTS}},
    {sigmoid, PATTERN_UNIFORM, {WEIGHTS, {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f}}},
    {gaussian, PATTERN_UNIFORM, {{.kind = CLMOE_LOSS_SMOOTH_LOAD, .weight = 1.0f}}},
};

/*
 * What no router makes: a choice out of range, one whose logit is not finite, and a token whose
 * scores all are 0.
 */
static void odd_tokens(balance_batch *b) {
    size_t R = ref_columns(&b->desc), K = b->desc.top_k;
    int32_t *ids = HOST(int32_t, b->tokens * K);
    for (size_t e = 0; e < R; e++)
        b->logits[3 * R + e] = -1e4f;
    b->logits[7 * R + 2] = NAN;
    balance_set_logits(b, b->logits);
    balance_choose(b);
    memcpy(ids, b->in.ids, b->tokens * K * 4);
    ids[5 * K] = -1;
    ids[7 * K] = 2;
    b->in.ids = ids;
}

static void losses(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(loss_cases); i++) {
        balance_batch b;
        clmoe_layer_desc desc = desc_of(&small);
        loss_cases[i].set(&desc);
        balance_options options = {.kind = loss_cases[i].kind,
                                   .supplied = true,
                                   .state = desc.router.noise.kind != CLMOE_NOISE_NONE,
                                   .positive = desc.router.score == CLMOE_SCORE_IDENTITY};
        test_case("losses %zu", i);
        seed_set(5);
        balance_make(&b, &desc, small.tokens, &options);
        if (options.state)
            loss_draw_noise(&b);
        if (loss_cases[i].set == sigmoid)
            odd_tokens(&b);
        balance_upload(&b, 0);
        if (desc.router.renorm.after_drop)
            loss_renorm_after_drop(&b);
        for (size_t k = 0; k < 4 && loss_cases[i].losses[k].weight != 0.0f; k++)
            loss_check(&b, &loss_cases[i].losses[k]);
    }
}

/* A fresh choice among equal logits: the lower expert, as the choice made. */
static void fresh_ties(void **state) {
    (void)state;
    balance_batch b;
    clmoe_layer_desc desc = desc_of(&small);
    const balance_options options = {.kind = PATTERN_TIES};
    const clmoe_loss_desc loss = {
        .kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .f_source = CLMOE_F_FRESH};
    desc.router.select_bias = 1;
    test_case("fresh ties");
    seed_set(5);
    balance_make(&b, &desc, small.tokens, &options);
    balance_upload(&b, 0);
    loss_check(&b, &loss);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_score_and_activation),
                                       TEST(every_storage_type),
                                       TEST(rerouted_tokens),
                                       TEST(nonfinite_logits),
                                       TEST(token_offsets),
                                       TEST(two_levels),
                                       TEST(gumbel_noise),
                                       TEST(losses),
                                       TEST(fresh_ties)};
    return RUN(tests);
}
