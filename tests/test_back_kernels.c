/*
 * Every kernel of the backward pass on small shapes, in both forms: as test_kernels.c, on buffers
 * without a spare byte, for Oclgrind and the native device.
 */
#include "support.h"
#include "support_backward.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

static const shape small = {9, 10, 12, 0, 3, 7};

static void dropless(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.bias = 1;
    d->shared.hidden_dim = 5;
    d->shared_gate = d->output_bias = 1;
    d->shared.gate_up_bias = d->shared.down_bias = 1;
}

static void interleaved(clmoe_layer_desc *d) {
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.gate_up_transposed = d->experts.down_transposed = 1;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->experts.limit = 0.75f;
    d->num_identity_experts = 2;
}

static void separate(clmoe_layer_desc *d) {
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->experts.gate_layout = CLMOE_GATE_SEPARATE;
    d->experts.activation = CLMOE_ACT_GELU_TANH;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->shared.hidden_dim = 5;
    d->shared.activation = CLMOE_ACT_GELU_ERF;
}

static void plain(clmoe_layer_desc *d) {
    d->experts.gate_layout = CLMOE_GATE_NONE;
    d->experts.activation = CLMOE_ACT_RELU2;
    d->experts.gate_up_bias = 1;
    d->shared.hidden_dim = 5;
    d->shared.gate_layout = CLMOE_GATE_NONE;
    d->shared.activation = CLMOE_ACT_RELU;
}

static void computed_again(clmoe_layer_desc *d) {
    d->recompute = 1;
    d->normalize_experts = 1;
    d->capacity.rows = 2;
    d->experts.down_bias = 1;
    d->shared.hidden_dim = 5;
}

static void identity_score(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_IDENTITY;
    d->router.softcap = 2.5f;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 2.0f;
    d->router.expert_scale = 1;
}

static void sigmoid_after_drop(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->router.expert_scale = 1;
    d->capacity.rows = 2;
}

static void topk_sqrt_softplus(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

static void rebalanced_groups(clmoe_layer_desc *d) {
    d->top_k = 4;
    d->router.groups.two_level = 1;
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
    d->router.rebalance.iterations = 2;
}

static void rebalanced_softmax(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.rebalance.iterations = 2;
}

typedef struct kernel_case {
    const char *name;
    void (*set)(clmoe_layer_desc *desc); /* NULL: the shared one of that name */
    uint32_t inputs;
    bool routing; /* alone is of interest: one engine is enough */
} kernel_case;

static const kernel_case cases[] = {
    {"dropless", dropless, WITH_MASK | WITH_DLOGITS, false},
    {"interleaved", interleaved, WITH_DYE, false},
    {"separate", separate, WITH_MASK, false},
    {"plain", plain, 0, false},
    {"computed again", computed_again, WITH_DYE | WITH_MASK, false},
    {"Soft MoE, normalized", NULL, WITH_MASK, false},
    {"Soft MoE", NULL, 0, true},
    {"identity score", identity_score, WITH_DLOGITS, true},
    {"sigmoid, renorm after drop", sigmoid_after_drop, WITH_MASK, true},
    {"top-k then sqrt softplus", topk_sqrt_softplus, WITH_LOGITS_IN, true},
    {"top-k then softmax, renorm after drop", NULL, WITH_IDS_IN, true},
    {"sparsemixer, renorm", NULL, WITH_MASK, true},
    {"expert choice, weight at input", NULL, WITH_MASK | WITH_DLOGITS, true},
    {"token rounding, renorm", NULL, WITH_MASK, true},
    {"Sinkhorn, renorm after drop", NULL, 0, true},
    {"all experts, weight at activation", NULL, 0, true},
    {"two levels, scaled", NULL, WITH_MASK | WITH_DLOGITS, true},
    {"reroute, renorm after drop", NULL, 0, true},
    {"rebalance, identity experts", NULL, WITH_MASK, true},
    {"rebalance to zero", NULL, 0, true},
    {"rebalance of two levels", rebalanced_groups, 0, true},
    {"rebalance of a softmax", rebalanced_softmax, 0, true},
};

/* The parts one after another. */
static void run_parts(training_batch *t) {
    const training_outputs want = training_read(t);
    training_new_outputs(t);
    t->args.parts = CLMOE_BACKWARD_DATA;
    training_backward(t);
    t->args.parts = CLMOE_BACKWARD_WEIGHTS;
    training_backward(t);
    const training_outputs got = training_read(t);
    compare_outputs(&got, &want);
}

static void add_again(training_batch *t) {
    t->args.parts = CLMOE_BACKWARD_BOTH;
    t->args.accumulate = 1;
    training_backward(t);
}

static void run_case(const kernel_case *c, const char *engine, uint32_t form, bool parts) {
    clmoe_layer_desc desc = desc_of(&small);
    variant_set(&desc, c->name, c->set);
    desc.engine = engine;
    training_batch *t = training_make(&desc, small.tokens, c->inputs);
    training_forward(t, form);
    training_backward(t);
    training_compare(t, NULL);
    if (!c->routing && parts)
        run_parts(t);
    if (!c->routing)
        add_again(t);
}

/*
 * Under Oclgrind, which takes its time, the forms take turns, the parts are not run apart, and
 * cases of routing have the engine that is soonest done there. Engines but ref take one form each
 * everywhere, as the forms are of the steps around them; tiled, which takes longest there, runs
 * every third case, and under Oclgrind the first: oclgrind_gradient and oclgrind_training have its
 * kernels by themselves. With one form that is every second case.
 */
static void kernels_on_small_shapes(void **state) {
    (void)state;
    uint32_t forms[2];
    const size_t num_forms = test_forms(forms);
    const char *const *engines = test_engines();
    const bool turns = on_oclgrind();
    const char *routing = turns ? "cpu" : "ref";
    const size_t tiled_every = turns ? COUNT_OF(cases) : 3;
    support_bare = true;
    for (size_t i = 0; i < COUNT_OF(cases); i++)
        for (size_t n = 0; engines[n] != NULL; n++)
            for (size_t form = 0; form < num_forms; form++) {
                const bool ref = strcmp(engines[n], "ref") == 0;
                const bool tiled = strcmp(engines[n], "tiled") == 0;
                if (strcmp(engines[n], "clblast") == 0 ||
                    (cases[i].routing && strcmp(engines[n], routing) != 0) ||
                    ((!ref || turns) && (i + form) % 2 != 0) || (tiled && i % tiled_every != 0))
                    continue;
                test_case("%s, engine %s, groups of %u", cases[i].name, engines[n], forms[form]);
                run_case(&cases[i], engines[n], forms[form], !turns);
            }
}

/* ---- With a state ------------------------------------------------------------------------------
 */

static void learned_noise(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
    d->router.noise.jitter = 0.1f;
    d->router.dropout.experts = 0.5f;
    d->router.dropout.logits = 0.1f;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->experts.hidden_dropout = 0.25f;
    d->shared.hidden_dim = 5;
    d->shared.hidden_dropout = 0.5f;
    d->shared_gate = 1;
}

static void noisy_groups(clmoe_layer_desc *d) {
    learned_noise(d);
    d->router.noise.jitter_experts = 1;
    d->router.dropout.experts = 0.0f;
    d->router.groups.two_level = 1;
    d->router.groups.count = 4;
    d->router.groups.topk = 3;
    d->recompute = 1;
    d->experts.gate_layout = CLMOE_GATE_SEPARATE;
    d->shared.gate_layout = CLMOE_GATE_NONE;
}

static const layer_variant state_variants[] = {
    {"learned noise, dropout", learned_noise},
    {"noisy groups, dropout", noisy_groups},
};

static void check_finite(const char *name, clmoe_buf buf, size_t n) {
    const float *values = buf_get(buf);
    double size = 0.0;
    for (size_t i = 0; i < n; i++)
        size += fabs((double)values[i]);
    CHECK(size > 0.0 && isfinite(size), "%s has size %g\n", name, size);
}

static void run_with_state(const layer_variant *variant, uint32_t form) {
    clmoe_layer_desc desc = desc_of(&small);
    variant->set(&desc);
    training_batch *t = training_make(&desc, small.tokens, 0);
    training_forward(t, form);
    size_t bytes = 0;
    const size_t rows = (size_t)small.tokens * small.dim;
    OK(clmoe_state_size(t->layer, &bytes));
    t->d.weights.noise_router = t->d.weights.router;
    t->args.state = t->d.args.state = buf_new(bytes);
    t->gradients.noise_router = buf_new((size_t)small.experts * small.dim * sizeof(float));
    OK(clmoe_state_init(t->layer, test.queue, t->args.state, 5, 0, NULL, NULL));
    OK(clmoe_forward(t->layer, test.queue, &t->d.args, 0, NULL, NULL));
    training_backward(t);
    check_finite("dx", t->args.dx, rows);
    check_finite("gradients.experts.down", t->gradients.experts.down,
                 (size_t)small.experts * small.dim * small.hidden_dim);
    check_finite("gradients.noise_router", t->gradients.noise_router,
                 (size_t)small.experts * small.dim);
}

static void kernels_with_a_state(void **state) {
    (void)state;
    uint32_t forms[2];
    const size_t num_forms = test_forms(forms);
    support_bare = true;
    for (size_t i = 0; i < COUNT_OF(state_variants); i++)
        for (size_t form = 0; form < num_forms; form++) {
            test_case("%s, groups of %u", state_variants[i].name, forms[form]);
            run_with_state(&state_variants[i], forms[form]);
        }
}

/* Gradients of 16 bits, and rows of them. */
static void storage_types(void **state) {
    (void)state;
    static const clmoe_type types[] = {CLMOE_F16, CLMOE_BF16};
    support_bare = true;
    for (size_t i = 0; i < COUNT_OF(types); i++)
        for (uint32_t kind = 0; kind < 2; kind++) {
            clmoe_layer_desc desc = desc_of(&small);
            dropless(&desc);
            desc.engine = NULL;
            desc.type = kind ? CLMOE_F32 : types[i];
            desc.weight_type = types[i];
            desc.gradient_type = CLMOE_GRADIENT_OF_WEIGHT;
            test_case("type %u, rows of %u", types[i], desc.type);
            training_batch *t = training_make(&desc, small.tokens, 0);
            training_forward(t, 0);
            training_backward(t);
            training_compare(t, NULL);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(kernels_on_small_shapes), TEST(kernels_with_a_state),
                                       TEST(storage_types)};
    return RUN(tests);
}
