/*
 * matrix: every storage type of x, of weights and of the router, with every engine, layout and
 * bias, against the oracle on the same rounded inputs.
 */
#include "ref_random.h"
#include "support.h"
#include "support_variants.h"

#include <string.h>

static const shape small = {9, 11, 6, 1, 2, 5};

static const clmoe_type types[] = {CLMOE_F32, CLMOE_F16, CLMOE_BF16};

/* Of x, of weights and of the router's: f32, or that of x. */
typedef struct type_triple {
    clmoe_type x, weights, router;
} type_triple;

enum { TRIPLES = 15 };

/* triples [TRIPLES] */
static void every_triple(type_triple *triples) {
    size_t n = 0;
    for (size_t x = 0; x < COUNT_OF(types); x++)
        for (size_t w = 0; w < COUNT_OF(types); w++)
            for (int of_x = 0; of_x < (types[x] == CLMOE_F32 ? 1 : 2); of_x++)
                triples[n++] = (type_triple){types[x], types[w], of_x ? types[x] : CLMOE_F32};
    assert_int_equal(n, TRIPLES);
}

static clmoe_layer_desc desc_with(const type_triple *t) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.type = t->x;
    desc.weight_type = t->weights;
    desc.router.weight_type = t->router;
    return desc;
}

/* Everything that is added or multiplied and has a buffer of its own. */
static void all_biases(clmoe_layer_desc *desc) {
    desc->router.bias = desc->router.select_bias = desc->router.expert_scale = 1;
    desc->experts.gate_up_bias = desc->experts.down_bias = 1;
    desc->shared.gate_up_bias = desc->shared.down_bias = 1;
    desc->shared_gate = desc->output_bias = 1;
}

typedef struct transposition {
    const char *name;
    uint32_t gate_up, down;
} transposition;

static const transposition transpositions[] = {
    {"nothing", 0, 0}, {"gate_up", 1, 0}, {"down", 0, 1}, {"both", 1, 1}};

static void lay_out(clmoe_mlp_desc *mlp, clmoe_gate_layout layout, const transposition *t) {
    mlp->gate_layout = layout;
    mlp->gate_up_transposed = t->gate_up;
    mlp->down_transposed = t->down;
}

static void run(const clmoe_layer_desc *desc, bool packed, uint64_t seed) {
    batch b;
    device_batch d;
    clmoe_layer *layer = test_layer(0, desc);
    seed_set(seed);
    batch_make(&b, desc, small.tokens);
    batch_upload(layer, &b, &d);
    if (packed)
        weights_pack(layer, CLMOE_MLP_EXPERTS, &d.weights.experts);
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    const ref_result *want = batch_reference(&b);
    CHECK(want->choice_gap > 1e-5, "a choice too close to call\n");
    batch_compare(&b, &d, want);
}

/* Transpositions take turns, so that each triple meets all of them and compiles no more; and so
 * does the layout that is packed. */
static void run_layouts(const char *engine, const type_triple *t, uint32_t turn) {
    for (clmoe_gate_layout layout = 0; layout <= CLMOE_GATE_NONE; layout++)
        for (int biases = 0; biases < 2; biases++) {
            clmoe_layer_desc desc = desc_with(t);
            const transposition *form = &transpositions[(turn + layout) % COUNT_OF(transpositions)];
            bool packed = biases && strcmp(engine, "cpu") == 0 && layout == turn % 4;
            test_case("engine %s, types %d %d %d, layout %d, %s transposed, biases %d, packed %d",
                      engine, t->x, t->weights, t->router, layout, form->name, biases, packed);
            desc.engine = engine;
            desc.shared.hidden_dim = 4;
            lay_out(&desc.experts, layout, form);
            lay_out(&desc.shared, layout, form);
            if (biases)
                all_biases(&desc);
            run(&desc, packed, 100 * turn + 2 * layout + (uint64_t)biases + 1);
        }
}

/*
 * Programs take long to compile: the engine ref does every pair of types, and the others, where the
 * program is not asked for `all`, those of test_types.c.
 */
static bool all;

static bool takes_turn(const char *engine, const type_triple *t) {
    static const clmoe_type pairs[][2] = {{CLMOE_F32, CLMOE_F32},
                                          {CLMOE_F32, CLMOE_BF16},
                                          {CLMOE_F16, CLMOE_F32},
                                          {CLMOE_F16, CLMOE_F16},
                                          {CLMOE_BF16, CLMOE_BF16}};
    bool known = all || strcmp(engine, "ref") == 0;
    for (size_t i = 0; i < COUNT_OF(pairs); i++)
        known = known || (t->x == pairs[i][0] && t->weights == pairs[i][1]);
    return known;
}

static void types_biases_engines_layouts(void **state) {
    (void)state;
    type_triple triples[TRIPLES];
    every_triple(triples);
    for (uint32_t i = 0; i < TRIPLES; i++) {
        const char *const *engines = test_engines_of(triples[i].x, triples[i].weights);
        for (size_t n = 0; engines[n]; n++)
            if (takes_turn(engines[n], &triples[i]))
                run_layouts(engines[n], &triples[i], i);
    }
}

/* Policies with weights of their own. */
static void two_levels(clmoe_layer_desc *desc) {
    desc->num_identity_experts = 0;
    desc->router.groups.count = 3;
    desc->router.groups.topk = 2;
    desc->router.groups.two_level = 1;
    desc->router.bias = desc->router.expert_scale = 1;
}

static void soft_moe(clmoe_layer_desc *desc) {
    desc->num_identity_experts = 0;
    desc->top_k = 1;
    desc->router.policy = CLMOE_POLICY_SOFT_MOE;
    desc->experts.down_bias = 1;
}

static void types_and_policies(void **state) {
    (void)state;
    static const layer_variant policies[] = {{"two levels", two_levels}, {"Soft MoE", soft_moe}};
    type_triple triples[TRIPLES];
    every_triple(triples);
    for (size_t i = 0; i < TRIPLES; i++)
        for (size_t p = 0; p < COUNT_OF(policies) && triples[i].weights == triples[i].x; p++) {
            clmoe_layer_desc desc = desc_with(&triples[i]);
            test_case("types %d, router %d, %s", triples[i].x, triples[i].router, policies[p].name);
            policies[p].set(&desc);
            run(&desc, false, i + 1);
        }
}

/* noise_router [R,D]: the noisy logits of one call, which with score identity are the scores. */
static void types_of_noise_router(void **state) {
    (void)state;
    type_triple triples[TRIPLES];
    every_triple(triples);
    for (size_t i = 0; i < TRIPLES; i++) {
        clmoe_layer_desc desc = desc_with(&triples[i]);
        size_t R = ref_columns(&desc), T = small.tokens, D = small.dim;
        test_case("types %d, router %d", triples[i].x, triples[i].router);
        seed_set(i + 1);
        desc.router.score = CLMOE_SCORE_IDENTITY;
        desc.router.noise.kind = CLMOE_NOISE_LEARNED;
        float *x = random_eighths(T * D, 1.0), *wn = random_eighths(R * D, 0.3);
        float *logits = random_floats(T * R, 1.0);
        round_all(desc.type, x, T * D);
        round_all(desc.router.weight_type, wn, R * D);
        clmoe_layer *layer = test_layer(0, &desc);
        clmoe_weights weights = {.noise_router = buf_of_type(desc.router.weight_type, wn, R * D)};
        clmoe_buf at = buf_new(sizeof(clmoe_state) + 20 * R);
        OK(clmoe_state_init(layer, test.queue, at, 7, 0, NULL, NULL));
        clmoe_score_args args = {.struct_size = sizeof args,
                                 .tokens = small.tokens,
                                 .weights = &weights,
                                 .x = buf_of_type(desc.type, x, T * D),
                                 .logits_in = buf_of(logits, T * R * 4),
                                 .scores = buf_new(T * R * 4),
                                 .state = at,
                                 .scratch = scratch_of(layer, small.tokens)};
        OK(clmoe_score(layer, test.queue, &args, 0, NULL, NULL));
        const ref_weights raw_weights = {.router = wn};
        double *raw = HOST(double, T *R), *want = HOST(double, T *R);
        ref_logits(&desc, small.tokens, x, &raw_weights, raw);
        ref_noisy(&desc, buf_get(at), small.tokens, logits, raw, want);
        compare_floats("noisy", buf_get(args.scores), want, T * R, 1e-5);
    }
}

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {TEST(types_biases_engines_layouts), TEST(types_and_policies),
                                       TEST(types_of_noise_router)};
    all = argc > 1 && strcmp(argv[1], "all") == 0;
    return RUN(tests);
}
