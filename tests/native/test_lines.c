/*
 * The lines of kernels that test_kernels.c does not reach, in few programs: made for the native
 * device, where each program is compiled anew, and right on any other.
 */
#include "support.h"

#include <string.h>

static const shape small = {19, 21, 12, 2, 3, 13};

static void softcap_pnorm(clmoe_layer_desc *d) {
    d->router.temperature = 0.6f;
    d->router.softcap = 4.0f;
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.renorm = CLMOE_RENORM_PNORM;
    d->router.renorm_p = 2.0f;
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

static void (*const switches[])(clmoe_layer_desc *desc) = {softcap_pnorm, topk_sigmoid,
                                                           topk_sqrt_softplus, topk_softmax};

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

/* The engine that needs dispatch.cl and act.cl, or another where it is not built in. */
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
        switches[i](&desc);
        desc.engine = engine_without_gather();
        test_case("engine %s, switches %zu", desc.engine, i);
        run(&desc, false);
    }
}

static void every_storage_type(void **state) {
    (void)state;
    const clmoe_type types[] = {CLMOE_F16, CLMOE_BF16};
    for (size_t i = 0; i < COUNT_OF(types); i++) {
        clmoe_layer_desc desc = desc_of(&small);
        desc.type = desc.weight_type = types[i];
        desc.experts.gate_layout = CLMOE_GATE_INTERLEAVED;
        desc.experts.gate_up_transposed = desc.experts.down_transposed = 1;
        desc.engine = NULL;
        test_case("type %d", types[i]);
        run(&desc, false);
    }
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
    compare_bits("row_of", (char *)plans[1] + layout.row_of, (char *)plans[0] + layout.row_of,
                 layout.slots * 4);
    compare_bits("y", outputs[1], outputs[0], T * D * 4);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_score_and_activation), TEST(every_storage_type),
                                       TEST(nonfinite_logits), TEST(token_offsets)};
    return RUN(tests);
}
