/* clmoe_backward(): every layer of the table, on every engine, against the oracle. */
#include "support.h"
#include "support_backward.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

static const shape small = {33, 21, 12, 0, 3, 19};

static const struct {
    const layer_variant *variants;
    const size_t *count;
} tables[] = {{layer_variants, &num_layer_variants},
              {routing_variants, &num_routing_variants},
              {backward_variants, &num_backward_variants}};

typedef struct input_set {
    const char *name;
    uint32_t inputs;
} input_set;

static const input_set input_sets[] = {
    {"from x", 0},
    {"a mask over NaN", WITH_MASK | WITH_NAN_ROWS},
    {"losses", WITH_DLOGITS},
    {"a mask, more gradient on ye", WITH_MASK | WITH_DLOGITS | WITH_DYE},
    {"logits_in", WITH_LOGITS_IN | WITH_DLOGITS},
    {"logits_in, a mask over NaN", WITH_LOGITS_IN | WITH_MASK | WITH_NAN_ROWS},
    {"ids_in", WITH_IDS_IN},
    {"ids_in, a mask over NaN", WITH_IDS_IN | WITH_MASK | WITH_NAN_ROWS},
};

/* Whether the layer takes these inputs. */
static bool takes(const clmoe_layer_desc *desc, uint32_t inputs) {
    if (desc->router.policy == CLMOE_POLICY_SOFT_MOE)
        return (inputs & (WITH_LOGITS_IN | WITH_IDS_IN)) == 0;
    return !ref_lists_pairs(desc) || !(inputs & WITH_IDS_IN);
}

static void check_backward(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                           uint32_t inputs, const char *name) {
    training_batch *t = training_make(desc, tokens, inputs);
    training_forward(t, group_size);
    training_backward(t);
    training_compare(t, name);
}

/* ---- Tests ------------------------------------------------------------------------------------
 */

static void check_engine(const char *engine, const layer_variant *variant, const input_set *set,
                         uint32_t group_size) {
    clmoe_layer_desc desc = desc_of(&small);
    variant->set(&desc);
    desc.engine = engine;
    if (needs_a_state(&desc) || !takes(&desc, set->inputs))
        return;
    test_case("engine %s, group size %u, %s, %s", engine, group_size, variant->name, set->name);
    check_backward(group_size, &desc, small.tokens, set->inputs, variant->name);
}

/* With two of the inputs in turn, one of them from x. */
static void every_switch_and_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t table = 0; table < COUNT_OF(tables); table++)
            for (size_t i = 0; i < *tables[table].count; i++) {
                check_engine(engines[n], &tables[table].variants[i], &input_sets[0], 0);
                check_engine(engines[n], &tables[table].variants[i], &input_sets[1 + (n + i) % 3],
                             0);
            }
}

/* One engine is enough, with the group sizes in turn. */
static void every_switch_and_input(void **state) {
    (void)state;
    for (size_t table = 0; table < COUNT_OF(tables); table++)
        for (size_t i = 0; i < *tables[table].count; i++)
            for (size_t s = 0; s < COUNT_OF(input_sets); s++)
                check_engine("ref", &tables[table].variants[i], &input_sets[s],
                             group_sizes[(i + s) % COUNT_OF(group_sizes)]);
}

static void every_number_of_tokens(void **state) {
    (void)state;
    static const uint32_t counts[] = {0, 1, 7, 64};
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(counts); i++) {
            clmoe_layer_desc desc = desc_of(&small);
            desc.engine = engines[n];
            desc.experts.gate_up_bias = desc.experts.down_bias = desc.output_bias = 1;
            desc.shared.hidden_dim = 5;
            desc.router.bias = 1;
            test_case("engine %s, T %u", engines[n], counts[i]);
            check_backward(0, &desc, counts[i], WITH_DLOGITS, NULL);
        }
}

static void every_shape_and_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(layer_shapes); i++) {
            clmoe_layer_desc desc = desc_of(&layer_shapes[i]);
            desc.engine = engines[n];
            desc.capacity.factor = layer_factors[i];
            desc.experts.gate_up_bias = desc.experts.down_bias = 1;
            test_case("engine %s, T %u, D %u, E %u, K %u, H %u, capacity factor %g", engines[n],
                      layer_shapes[i].tokens, desc.dim, desc.num_experts, desc.top_k,
                      desc.experts.hidden_dim, desc.capacity.factor);
            check_backward(0, &desc, layer_shapes[i].tokens, WITH_MASK, NULL);
        }
}

/* Loads of every kind, through external logits; non-finite ones among them. */
static void every_pattern(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {200, 11, 16, 0, 4, 7};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
            clmoe_layer_desc desc = desc_of(&s);
            desc.engine = engines[n];
            desc.router.renorm.kind = CLMOE_RENORM_SUM;
            desc.capacity.factor = kind % 2 ? 1.0 : 0.0;
            test_case("engine %s, %s", engines[n], pattern_name(kind));
            training_batch *t = training_make(&desc, s.tokens, 0);
            t->b.in.logits_in = pattern_logits(kind, s.tokens, s.experts);
            training_update(t);
            training_forward(t, 0);
            training_backward(t);
            training_compare(t, NULL);
        }
}

/* Gate and up of one expert are the two values of x. */
static training_batch *kink_batch(const clmoe_layer_desc *desc, const float *x, uint32_t tokens) {
    static const float one[] = {1.0f, 0.0f, 0.0f, 1.0f}, down[] = {1.0f, 1.0f};
    training_batch *t = training_make(desc, tokens, 0);
    const bool gated = desc->experts.gate_layout != CLMOE_GATE_NONE;
    t->b.in.x = x;
    t->b.weights.router = HOST(float, 2);
    t->b.weights.experts =
        (ref_mlp_weights){.gate = gated ? one : NULL, .up = gated ? NULL : one, .down = down};
    training_update(t);
    return t;
}

/* Values at, beside and beyond the limit of the clamps, and at 0. */
static void kinks(void **state) {
    (void)state;
    static const float x[] = {2.0f,  1.0f,  2.5f, 1.0f, 1.0f, 2.0f, 1.0f, -2.0f, 1.0f, 2.5f, 1.0f,
                              -2.5f, -2.0f, 1.0f, 0.0f, 1.0f, 1.0f, 0.0f, -0.0f, 2.0f, 0.0f, 0.0f};
    static const clmoe_activation activations[] = {CLMOE_ACT_SILU, CLMOE_ACT_RELU, CLMOE_ACT_RELU2};
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(activations); i++)
            for (uint32_t plain = 0; plain < 2; plain++) {
                clmoe_layer_desc desc = desc_of(&(shape){11, 2, 1, 0, 1, 1});
                desc.engine = engines[n];
                desc.experts.activation = activations[i];
                desc.experts.limit = plain ? 0.0f : 2.0f;
                desc.experts.up_shift = plain ? 0.0f : 3.0f;
                desc.experts.gate_layout = plain ? CLMOE_GATE_NONE : CLMOE_GATE_CONCAT;
                desc.experts.hidden_dim = plain ? 2 : 1;
                test_case("engine %s, activation %u, plain %u", engines[n], activations[i], plain);
                training_batch *t = kink_batch(&desc, x, COUNT_OF(x) / 2);
                training_forward(t, 0);
                training_backward(t);
                training_compare(t, NULL);
            }
}

static const struct {
    clmoe_type type, weight_type, router_type;
    const char *name;
} types[] = {
    {CLMOE_F32, CLMOE_BF16, CLMOE_F32, "f32 over bf16"},
    {CLMOE_F32, CLMOE_F16, CLMOE_F32, "f32 over f16"},
    {CLMOE_BF16, CLMOE_BF16, CLMOE_BF16, "bf16"},
    {CLMOE_F16, CLMOE_F16, CLMOE_F32, "f16"},
};

/* Without clamps in 16 bits, where rounding moves values onto the limit, which has another slope.
 */
static void check_type(size_t type, const char *engine, const layer_variant *variant) {
    for (clmoe_gradient_type g = 0; g <= CLMOE_GRADIENT_OF_WEIGHT; g++) {
        clmoe_layer_desc desc = desc_of(&small);
        variant->set(&desc);
        desc.engine = engine;
        desc.type = types[type].type;
        desc.weight_type = types[type].weight_type;
        desc.router.weight_type = types[type].router_type;
        desc.gradient_type = g;
        if (desc.type != CLMOE_F32)
            desc.experts.limit = desc.shared.limit = 0.0f;
        test_case("engine %s, %s, gradients of %s, %s", engine, types[type].name,
                  g ? "their weights' type" : "f32", variant->name);
        check_backward(0, &desc, small.tokens, WITH_MASK, types[type].name);
    }
}

static void every_array(clmoe_layer_desc *d) {
    d->experts.gate_up_bias = d->experts.down_bias = d->output_bias = 1;
    d->shared.hidden_dim = 9;
    d->shared_gate = d->router.bias = d->router.expert_scale = 1;
}

static void every_type(void **state) {
    (void)state;
    static const layer_variant every = {"every array", every_array};
    for (size_t i = 0; i < COUNT_OF(types); i++) {
        const char *const *engines = test_engines_of(types[i].type, types[i].weight_type);
        for (size_t n = 0; engines[n] != NULL; n++)
            check_type(i, engines[n], &every);
    }
}

/* One engine is enough. */
static void every_type_and_switch(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(types); i++)
        for (size_t table = 0; table < COUNT_OF(tables); table++)
            for (size_t v = 0; v < *tables[table].count; v++) {
                clmoe_layer_desc desc = desc_of(&small);
                tables[table].variants[v].set(&desc);
                if (!needs_a_state(&desc))
                    check_type(i, "ref", &tables[table].variants[v]);
            }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_switch_and_engine),
        TEST(every_switch_and_input),
        TEST(every_number_of_tokens),
        TEST(every_shape_and_engine),
        TEST(every_pattern),
        TEST(kinks),
        TEST(every_type),
        TEST(every_type_and_switch),
    };
    return RUN(tests);
}
