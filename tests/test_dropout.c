/*
 * Dropout of activations: forward and backward against the oracle, which has the same mask; without
 * a state, or with probability 0, nothing is masked.
 */
#include "support.h"
#include "support_backward.h"
#include "support_balance.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

static const shape small = {33, 21, 12, 0, 3, 19};

/* ---- Layers ---------------------------------------------------------------------------------- */

static void concat(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.25f;
}

static void concat_at_activation(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.5f;
    d->experts.down_bias = 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->num_identity_experts = 2;
    d->capacity.factor = 0.7;
}

static void concat_at_input(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.1f;
    d->experts.hidden_dim = 18;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
}

static void interleaved(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.4f;
    d->experts.hidden_dim = 37;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.gate_up_transposed = 1;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->experts.limit = 0.5f;
    d->experts.up_shift = 1.0f;
}

static void separate(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.9f;
    d->experts.hidden_dim = 64;
    d->experts.gate_layout = CLMOE_GATE_SEPARATE;
    d->experts.down_transposed = d->experts.down_bias = 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->normalize_experts = 1;
}

static void plain(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.25f;
    d->experts.hidden_dim = 131;
    d->experts.gate_layout = CLMOE_GATE_NONE;
    d->experts.activation = CLMOE_ACT_GELU_TANH;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->normalize_experts = 1;
}

static void one_column(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.5f;
    d->experts.hidden_dim = 1;
}

static void shared_alone(clmoe_layer_desc *d) {
    d->shared.hidden_dim = 45;
    d->shared.hidden_dropout = 0.25f;
    d->shared.gate_up_bias = d->shared.down_bias = 1;
    d->shared_gate = 1;
}

static void shared_interleaved(clmoe_layer_desc *d) {
    d->shared.hidden_dim = 8;
    d->shared.hidden_dropout = 0.75f;
    d->shared.gate_layout = CLMOE_GATE_INTERLEAVED;
}

static void rerouted(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.25f;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->capacity.factor = 1.0;
    d->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
}

static const layer_variant own_variants[] = {
    {"concat", concat},
    {"concat, weight at activation", concat_at_activation},
    {"concat, weight at input", concat_at_input},
    {"interleaved", interleaved},
    {"separate, normalized", separate},
    {"plain, normalized", plain},
    {"one column", one_column},
    {"shared alone", shared_alone},
    {"shared, interleaved", shared_interleaved},
    {"reroute", rerouted},
};

typedef void variant_check(const clmoe_layer_desc *desc, const char *name);

static size_t count_engines(const char *const *engines) {
    size_t count = 0;
    while (engines[count] != NULL)
        count++;
    return count;
}

/*
 * Every layer with dropout, on the first engine of the type and on one of the others: masks are
 * made by none of them.
 */
static void for_each(clmoe_type type, variant_check *check) {
    const char *const *engines = test_engines_of(type, type);
    const size_t count = count_engines(engines);
    for (size_t n = 0; n < count; n++)
        for (size_t i = 0; i < COUNT_OF(own_variants) + num_backward_variants; i++) {
            if (n > 0 && 1 + i % (count - 1) != n)
                continue;
            const layer_variant *variant = i < COUNT_OF(own_variants)
                                               ? &own_variants[i]
                                               : &backward_variants[i - COUNT_OF(own_variants)];
            clmoe_layer_desc desc = desc_of(&small);
            variant->set(&desc);
            desc.engine = engines[n];
            desc.type = desc.weight_type = type;
            if (drops_out(&desc))
                check(&desc, variant->name);
        }
}

/* ---- Against the oracle ---------------------------------------------------------------------- */

/* With a state whose scales are 1, so that activations alone are random. */
static training_batch *make_batch(const clmoe_layer_desc *desc, uint32_t inputs) {
    training_batch *t = training_make(desc, small.tokens, inputs);
    t->state = t->b.in.state = random_state_of(desc);
    training_update(t);
    return t;
}

static void check_forward(const clmoe_layer_desc *desc, const char *name) {
    for (int masked = 0; masked < 2; masked++) {
        test_case("engine %s, %s, mask %d", desc->engine, name, masked);
        training_batch *t = make_batch(desc, masked ? WITH_MASK : 0);
        t->b.desc.training = 0;
        training_forward(t, 0);
        batch_compare(&t->b, &t->d, t->forward);
    }
}

static void forward(void **state) {
    (void)state;
    for_each(CLMOE_F32, check_forward);
}

static void check_backward(const clmoe_layer_desc *desc, const char *name) {
    static const uint32_t inputs[] = {0, WITH_MASK | WITH_NAN_ROWS, WITH_MASK | WITH_DYE,
                                      WITH_DLOGITS};
    for (size_t i = 0; i < COUNT_OF(inputs); i++)
        for (uint32_t recompute = 0; recompute < (desc->type == CLMOE_F32 ? 2U : 1U); recompute++) {
            clmoe_layer_desc training = *desc;
            training.recompute = recompute;
            test_case("engine %s, %s, inputs %u, recompute %u", desc->engine, name, inputs[i],
                      recompute);
            training_batch *t = make_batch(&training, inputs[i]);
            training_forward(t, group_sizes[i % COUNT_OF(group_sizes)]);
            if (!(inputs[i] & WITH_NAN_ROWS))
                batch_compare(&t->b, &t->d, t->forward);
            training_backward(t);
            training_compare(t, desc->type == CLMOE_F32 ? name : "bf16");
        }
}

static void backward(void **state) {
    (void)state;
    for_each(CLMOE_F32, check_backward);
}

/* Without clamps: rounding moves values onto the limit, which has another slope. */
static void check_backward_16(const clmoe_layer_desc *desc, const char *name) {
    clmoe_layer_desc unclamped = *desc;
    unclamped.experts.limit = 0.0f;
    check_backward(&unclamped, name);
}

static void backward_bf16(void **state) {
    (void)state;
    for_each(CLMOE_BF16, check_backward_16);
}

/* ---- No effect ------------------------------------------------------------------------------- */

static training_outputs run(training_batch *t, const clmoe_layer_desc *desc,
                            const clmoe_state *state, const void **y) {
    t->b.desc = *desc;
    t->b.desc.training = 1;
    t->state = state;
    training_forward(t, 0);
    training_backward(t);
    *y = buf_get(t->d.args.y);
    return training_read(t);
}

/* The bits of a layer without dropout, and without a state. */
static void check_no_effect(const clmoe_layer_desc *desc, const char *name) {
    clmoe_layer_desc without = *desc;
    without.experts.hidden_dropout = without.shared.hidden_dropout = 0.0f;
    test_case("engine %s, %s", desc->engine, name);
    training_batch *t = training_make(&without, small.tokens, WITH_MASK);
    const size_t bytes = small.tokens * small.dim * sizeof(float);
    const void *y, *want_y;
    const training_outputs want = run(t, &without, NULL, &want_y);
    const training_outputs no_state = run(t, desc, NULL, &y);
    compare_outputs(&no_state, &want);
    compare_bits("y without a state", y, want_y, bytes);
    const training_outputs zero = run(t, &without, random_state_of(desc), &y);
    compare_outputs(&zero, &want);
    compare_bits("y of probability 0", y, want_y, bytes);
}

static void no_effect(void **state) {
    (void)state;
    for_each(CLMOE_F32, check_no_effect);
}

/* ---- The mask -------------------------------------------------------------------------------- */

enum { TOKENS = 300, WIDE = 62 };

/* Both MLPs are the identity, of 1: a y is the sum of what the elements of h are multiplied by. */
static void identity_mlp(ref_mlp_weights *w) {
    float *one = HOST(float, WIDE *WIDE);
    for (size_t i = 0; i < WIDE; i++)
        one[i * WIDE + i] = 1.0f;
    *w = (ref_mlp_weights){.up = one, .down = one};
}

static const float *masks_of(clmoe_layer_desc *desc, uint32_t step) {
    batch b;
    device_batch d;
    batch_make(&b, desc, TOKENS);
    float *x = HOST(float, TOKENS *WIDE);
    for (size_t i = 0; i < TOKENS * WIDE; i++)
        x[i] = 1.0f;
    b.in.x = x;
    identity_mlp(&b.weights.experts);
    if (desc->shared.hidden_dim)
        identity_mlp(&b.weights.shared);
    clmoe_state *state = random_state_of(desc);
    state->step = step;
    clmoe_layer *layer = test_layer(0, desc);
    batch_upload(layer, &b, &d);
    d.args.state = buf_of(state, sizeof *state + 20 * ref_columns(desc));
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    return buf_get(d.args.y);
}

/* Of n values the share that `is` is near p: within 5 standard deviations. */
static void check_share(const char *what, size_t is, size_t n, double p) {
    const double share = (double)is / (double)n;
    CHECK(fabs(share - p) < 5.0 * sqrt(p * (1.0 - p) / (double)n), "%s: %g, not near %g\n", what,
          share, p);
}

static void check_mask(const char *engine, float p) {
    const shape s = {TOKENS, WIDE, 1, 0, 1, WIDE};
    clmoe_layer_desc desc = desc_of(&s);
    desc.engine = engine;
    desc.experts.gate_layout = CLMOE_GATE_NONE;
    desc.experts.activation = CLMOE_ACT_RELU;
    desc.experts.hidden_dropout = p;
    test_case("engine %s, p %g", engine, (double)p);
    const float *first = masks_of(&desc, 5), *next = masks_of(&desc, 6);
    desc.shared = desc.experts;
    const float *both = masks_of(&desc, 5);
    const double kept = 1.0 / (1.0 - (double)p), n = TOKENS * WIDE;
    size_t zeros = 0, same = 0, shared_zeros = 0, shared_same = 0;
    for (size_t i = 0; i < TOKENS * WIDE; i++) {
        const bool is_zero = first[i] == 0.0f, of_shared = both[i] - first[i] == 0.0f;
        CHECK(is_zero || fabs((double)first[i] - kept) < 1e-6 * kept, "y[%zu] is %g\n", i,
              (double)first[i]);
        zeros += is_zero;
        same += is_zero == (next[i] == 0.0f);
        shared_zeros += of_shared;
        shared_same += is_zero == of_shared;
    }
    const double equal = (double)p * (double)p + (1.0 - (double)p) * (1.0 - (double)p);
    check_share("zeros", zeros, (size_t)n, (double)p);
    check_share("zeros of the shared expert", shared_zeros, (size_t)n, (double)p);
    check_share("the same in another step", same, (size_t)n, equal);
    check_share("the same in the shared expert", shared_same, (size_t)n, equal);
}

static void mask(void **state) {
    (void)state;
    static const float ps[] = {0.05f, 0.5f, 0.8f};
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(ps); i++)
            check_mask(engines[n], ps[i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(forward), TEST(backward), TEST(backward_bf16), TEST(no_effect), TEST(mask),
    };
    return RUN(tests);
}
