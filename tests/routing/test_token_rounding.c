/* Token rounding: the choice exactly, whole layers forward and backward, and what it promises. */
#include "ref_policy.h"
#include "support.h"
#include "support_backward.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

static double *widened(const float *values, size_t n) {
    double *wide = HOST(double, n);
    for (size_t i = 0; i < n; i++)
        wide[i] = (double)values[i];
    return wide;
}

static clmoe_layer_desc rounding_desc(const shape *s, uint32_t multiple) {
    clmoe_layer_desc desc = desc_of(s);
    desc.capacity.keep = CLMOE_KEEP_ROUND;
    desc.capacity.multiple = multiple;
    return desc;
}

/* ---- The choice ------------------------------------------------------------------------------ */

/* The choice by scores [T,R] on the device. */
static clmoe_topk_args choose(clmoe_layer *layer, const clmoe_layer_desc *desc, uint32_t tokens,
                              const float *scores, const uint8_t *mask,
                              const ref_weights *weights) {
    const size_t T = tokens, R = ref_columns(desc), pairs = ref_pairs(desc, tokens);
    const clmoe_weights uploaded = {.select_bias = buf_of(weights->select_bias, R * 4)};
    const clmoe_topk_args args = {
        .struct_size = sizeof args,
        .tokens = tokens,
        .weights = &uploaded,
        .scores = buf_of(scores, T * R * 4),
        .ids = buf_new(pairs * 4),
        .pair_weights = buf_new(pairs * 4),
        .token_offsets = buf_new((T + 1) * 4),
        .token_mask = buf_of(mask, T),
        .scratch = scratch_of(layer, tokens),
    };
    OK(clmoe_topk(layer, test.queue, &args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    return args;
}

/* What the oracle makes of the same scores. */
typedef struct rounded {
    int32_t *offsets, *ids, *chose; /* chose: [R], pairs of top-k */
    double *weights;
} rounded;

static rounded reference(const clmoe_layer_desc *desc, uint32_t tokens, const float *scores,
                         const uint8_t *mask, const ref_weights *weights) {
    const size_t T = tokens, K = desc->top_k, R = ref_columns(desc);
    const size_t pairs = ref_pairs(desc, tokens);
    rounded r = {HOST(int32_t, T + 1), HOST(int32_t, pairs), HOST(int32_t, R), HOST(double, pairs)};
    int32_t *ids = HOST(int32_t, T * K), *live = HOST(int32_t, T);
    double *top_weights = HOST(double, T *K);
    ref_topk(desc, tokens, scores, weights, ids, top_weights, live);
    for (size_t t = 0; t < T; t++)
        for (size_t k = 0; k < (size_t)live[t] && (mask == NULL || mask[t]); k++)
            r.chose[ids[t * K + k]]++;
    const ref_rounding_in in = {tokens, widened(scores, T * R), ids, live, top_weights, mask,
                                weights};
    ref_token_rounding(desc, &in, r.offsets, r.ids, r.weights);
    return r;
}

/* Counts are the nearest multiple of those that chose, or the one below; the plan drops nothing. */
static void check_counts(const clmoe_layer_desc *desc, const rounded *r, const uint32_t *load,
                         const uint32_t *kept) {
    const int32_t M = (int32_t)desc->capacity.multiple;
    for (uint32_t e = 0; e < desc->num_experts; e++) {
        const int32_t c = r->chose[e], m = (int32_t)load[e];
        CHECK(m % M == 0 && (2 * abs(m - c) <= M || m == c - c % M), "expert %u: %d of %d\n", e, m,
              c);
        CHECK(kept[e] == load[e], "expert %u keeps %u of %u\n", e, kept[e], load[e]);
    }
}

static void check_choice(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                         const float *scores, const uint8_t *mask) {
    const size_t R = ref_columns(desc), T = tokens, pairs = ref_pairs(desc, tokens);
    const ref_weights weights = {.select_bias =
                                     desc->router.select_bias ? random_eighths(R, 0.5) : NULL};
    clmoe_layer *layer = test_layer(group_size, desc);
    const clmoe_topk_args args = choose(layer, desc, tokens, scores, mask, &weights);
    const rounded want = reference(desc, tokens, scores, mask, &weights);
    compare_ints("token_offsets", buf_get(args.token_offsets), want.offsets, T + 1);
    compare_ints("ids", buf_get(args.ids), want.ids, pairs);
    compare_floats("weights", buf_get(args.pair_weights), want.weights, pairs, STEP_TOLERANCE);

    clmoe_plan_layout layout;
    ref_plan_in in = {
        .tokens = tokens, .ids = want.ids, .token_mask = mask, .token_offsets = want.offsets};
    const clmoe_buf plan = plan_run(layer, desc, &in, &layout);
    const ref_plan *places = plan_reference(desc, &in);
    const char *bytes = buf_get(plan);
    CHECK(layout.pairs == pairs, "pairs is %u\n", layout.pairs);
    compare_ints("load", bytes + layout.load, places->load, R);
    compare_ints("slot_of", bytes + layout.slot_of, places->slot_of, pairs);
    compare_ints("pair_of", bytes + layout.pair_of, places->pair_of, layout.slots);
    check_counts(desc, &want, (const uint32_t *)(const void *)(bytes + layout.load),
                 (const uint32_t *)(const void *)(bytes + layout.kept));
}

static const shape choice_shapes[] = {
    /* T     D  E     Z  K  H */
    {64, 5, 4, 0, 2, 3},   {7, 5, 8, 0, 2, 3}, {61, 5, 12, 0, 3, 3},
    {0, 5, 8, 0, 2, 3},    {1, 5, 1, 0, 1, 3}, {601, 5, 33, 0, 4, 3},
    {65, 5, 205, 0, 7, 3}, {9, 5, 9, 0, 9, 3}, {150, 5, 17, 0, 16, 3},
};

static const uint32_t multiples[] = {8, 1, 3, 16, 40};

/* With the group sizes in turn: every pattern, ties and rows that are not finite among them. */
static void rounds_exactly(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(choice_shapes); i++)
        for (size_t n = 0; n < COUNT_OF(multiples); n++)
            for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
                const shape *s = &choice_shapes[i];
                const uint32_t group_size = group_sizes[(i + n + kind) % COUNT_OF(group_sizes)];
                const bool mask = (n + kind) % 2;
                clmoe_layer_desc desc = rounding_desc(s, multiples[n]);
                desc.router.select_bias = kind % 2;
                test_case("group size %u, T %u, E %u, K %u, M %u, %s, mask %d", group_size,
                          s->tokens, s->experts, s->top_k, multiples[n], pattern_name(kind), mask);
                seed_set(i * 10 + n);
                const float *scores = pattern_scores(kind, s->tokens, s->experts);
                check_choice(group_size, &desc, s->tokens, scores,
                             mask ? random_mask(s->tokens) : NULL);
            }
}

/* Eight tokens, two experts, one choice each, M = 4: by hand from the text of CLMOE_KEEP_ROUND. */
typedef struct hand_case {
    const char *name;
    float scores[8][2];
    uint8_t mask[8];
    int32_t offsets[9], ids[8];
} hand_case;

#define ALL_IN                                                                                     \
    { 1, 1, 1, 1, 1, 1, 1, 1 }
#define IN_FIRST                                                                                   \
    { 1, 0.125f }
#define IN_LAST                                                                                    \
    { 0.125f, 1 }

static const hand_case hand_cases[] = {
    {"5 -> 4, the higher of equal tokens goes; 3 -> 4, the lower of equal tokens comes",
     {IN_FIRST, {0.5f, 0.125f}, {1, 0.25f}, {0.5f, 0.125f}, {1, 0.25f}, IN_LAST, IN_LAST, IN_LAST},
     ALL_IN,
     {0, 1, 2, 4, 4, 5, 6, 7, 8},
     {0, 0, 0, 1, 0, 1, 1, 1}},
    {"6 -> 8, halves up; 2 -> 4",
     {IN_FIRST, IN_FIRST, {1, 0.5f}, IN_FIRST, IN_FIRST, {1, 0.5f}, IN_LAST, IN_LAST},
     ALL_IN,
     {0, 1, 2, 4, 5, 6, 8, 10, 12},
     {0, 0, 0, 1, 0, 0, 0, 1}},
    {"7 -> 8; 1 -> 0",
     {IN_FIRST, IN_FIRST, IN_FIRST, IN_FIRST, IN_FIRST, IN_FIRST, IN_FIRST, IN_LAST},
     ALL_IN,
     {0, 1, 2, 3, 4, 5, 6, 7, 8},
     {0, 0, 0, 0, 0, 0, 0, 0}},
    {"7 unmasked: 6 -> 4, as 8 are not there",
     {{1, 0.25f}, IN_FIRST, {0.5f, 0}, {0.75f, 0}, IN_FIRST, IN_FIRST, IN_LAST, IN_LAST},
     {1, 1, 1, 1, 1, 1, 1, 0},
     {0, 1, 2, 2, 2, 3, 4, 4, 4},
     {0, 0, 0, 0, -1, -1, -1, -1}},
    {"a score that is not finite is none: 6 -> 4",
     {{1, 0.25f}, IN_FIRST, {0.5f, 0}, {0.75f, 0}, IN_FIRST, IN_FIRST, {-INFINITY, 1}, IN_LAST},
     ALL_IN,
     {0, 2, 4, 4, 4, 5, 6, 7, 8},
     {0, 1, 0, 1, 0, 0, 1, 1}},
};

static void by_hand(void **state) {
    (void)state;
    const shape s = {8, 5, 2, 0, 1, 3};
    const ref_weights weights = {0};
    const clmoe_layer_desc desc = rounding_desc(&s, 4);
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(hand_cases); i++) {
            const hand_case *c = &hand_cases[i];
            test_case("group size %u, %s", group_sizes[g], c->name);
            const clmoe_topk_args args = choose(test_layer(group_sizes[g], &desc), &desc, 8,
                                                &c->scores[0][0], c->mask, &weights);
            compare_ints("token_offsets", buf_get(args.token_offsets), c->offsets, 9);
            compare_ints("ids", buf_get(args.ids), c->ids, 8);
        }
}

/* ---- Whole layers ---------------------------------------------------------------------------- */

static void softmax(clmoe_layer_desc *d) {
    d->router.expert_scale = 1;
}

static void sigmoid_renorm(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->router.select_bias = 1;
    d->router.scale = 2.5f;
    d->shared.hidden_dim = 9;
}

static void topk_softmax(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->output_bias = 1;
}

static void softplus_pnorm(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 2;
    d->router.renorm.after_drop = 1;
    d->normalize_experts = 1;
}

static const layer_variant layers[] = {
    {"softmax", softmax},
    {"sigmoid, renorm", sigmoid_renorm},
    {"top-k then softmax", topk_softmax},
    {"sqrt softplus, p-norm", softplus_pnorm},
};

static clmoe_layer_desc layer_desc(const layer_variant *v, const shape *s, const char *engine,
                                   clmoe_type type) {
    clmoe_layer_desc desc = rounding_desc(s, 0);
    v->set(&desc);
    desc.engine = engine;
    desc.type = desc.weight_type = type;
    return desc;
}

/* The oracle knows no engine: M, where it is the tile's, is made plain in *b. */
static void check_forward(const layer_variant *v, const shape *s, const char *engine,
                          clmoe_type type) {
    const clmoe_layer_desc desc = layer_desc(v, s, engine, type);
    clmoe_layer *layer = test_layer(0, &desc);
    const ref_result *want = NULL;
    clmoe_plan_layout layout;
    device_batch d;
    batch b;
    OK(clmoe_plan_layout_get(layer, s->tokens, &layout));
    for (uint64_t seed = 1; seed < 60 && want == NULL; seed++) {
        seed_set(seed);
        batch_make(&b, &desc, s->tokens);
        b.desc.capacity.multiple = layout.row_tile;
        b.in.residual = random_floats((size_t)s->tokens * desc.dim, 1.0);
        b.in.token_mask = random_mask(s->tokens);
        want = batch_reference(&b);
        want = want->choice_gap > 1e-5 ? want : NULL;
    }
    CHECK(want != NULL, "no seed without near ties\n");
    batch_run(layer, &b, &d);
    batch_compare(&b, &d, want);
}

static void every_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {64, 45, 12, 0, 3, 29};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(layers); i++) {
            test_case("%s, engine %s", layers[i].name, engines[n]);
            check_forward(&layers[i], &s, engines[n], CLMOE_F32);
        }
}

static void every_type(void **state) {
    (void)state;
    const shape s = {64, 45, 12, 0, 3, 29};
    for (clmoe_type type = CLMOE_F16; type <= CLMOE_BF16; type++) {
        test_case("type %d", (int)type);
        check_forward(&layers[0], &s, NULL, type);
    }
}

/* M is the engine's tile: a bucket is full tiles, and the plan's bound has no room for padding. */
static void no_padding(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {1003, 9, 8, 0, 2, 7};
    for (size_t n = 0; engines[n] != NULL; n++) {
        batch b;
        device_batch d;
        clmoe_plan_layout layout;
        test_case("engine %s", engines[n]);
        seed_set(3);
        const clmoe_layer_desc desc = layer_desc(&layers[0], &s, engines[n], CLMOE_F32);
        clmoe_layer *layer = test_layer(0, &desc);
        OK(clmoe_plan_layout_get(layer, s.tokens, &layout));
        batch_make(&b, &desc, s.tokens);
        b.desc.capacity.multiple = layout.row_tile;
        batch_upload(layer, &b, &d);
        OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
        ref_plan_in in = {.tokens = s.tokens,
                          .ids = buf_get(d.args.ids),
                          .token_offsets = buf_get(d.args.token_offsets)};
        const clmoe_buf plan = plan_run(layer, &b.desc, &in, &layout);
        const char *bytes = buf_get(plan);
        const uint32_t *offsets = (const uint32_t *)(const void *)(bytes + layout.offsets);
        const int32_t *pair_of = (const int32_t *)(const void *)(bytes + layout.pair_of);
        const uint32_t used = offsets[s.experts];
        CHECK(used == (uint32_t)in.token_offsets[s.tokens] && used > 0, "%u slots for %d pairs\n",
              used, in.token_offsets[s.tokens]);
        for (uint32_t slot = 0; slot < used; slot++)
            CHECK(pair_of[slot] >= 0, "slot %u is padding\n", slot);
        CHECK(layout.slots - layout.pairs < layout.row_tile, "%u slots, %u pairs\n", layout.slots,
              layout.pairs);
    }
}

/* ---- Backward -------------------------------------------------------------------------------- */

static void backward(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {61, 13, 8, 0, 3, 11};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(layers); i++) {
            test_case("%s, engine %s", layers[i].name, engines[n]);
            clmoe_layer_desc desc = layer_desc(&layers[i], &s, engines[n], CLMOE_F32);
            desc.capacity.multiple = 8;
            training_batch *t = training_make(&desc, s.tokens, WITH_MASK | WITH_DLOGITS);
            training_forward(t, 0);
            training_backward(t);
            training_compare(t, layers[i].name);
        }
}

/* ---- Promises -------------------------------------------------------------------------------- */

static void same_bits_again(void **state) {
    (void)state;
    const shape s = {300, 11, 12, 0, 3, 9};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        test_case("group size %u", group_sizes[g]);
        clmoe_layer_desc desc = rounding_desc(&s, 16);
        sigmoid_renorm(&desc);
        training_batch *t = training_make(&desc, s.tokens, WITH_MASK);
        training_forward(t, group_sizes[g]);
        training_backward(t);
        const training_outputs first = training_read(t);
        const clmoe_forward_args *args = &t->d.args;
        const size_t bytes = (size_t)s.tokens * s.dim * 4, pairs = ref_pairs(&desc, s.tokens) * 4;
        const void *y = buf_get(args->y), *ids = buf_get(args->ids);
        const void *weights = buf_get(args->pair_weights);
        for (int run = 0; run < 50; run++) {
            buf_poison(args->scratch);
            buf_poison(args->saved);
            buf_poison(args->y);
            OK(clmoe_forward(t->layer, test.queue, args, 0, NULL, NULL));
            compare_bits("y", buf_get(args->y), y, bytes);
            compare_bits("ids", buf_get(args->ids), ids, pairs);
            compare_bits("weights", buf_get(args->pair_weights), weights, pairs);
        }
        training_new_outputs(t);
        training_backward(t);
        const training_outputs again = training_read(t);
        compare_outputs(&again, &first);
    }
}

/* ---- Refusals -------------------------------------------------------------------------------- */

static void no_late_renorm(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}
static void rows(clmoe_layer_desc *d) {
    d->capacity.rows = 9;
}
static void factor(clmoe_layer_desc *d) {
    d->capacity.factor = 1.0;
}
static void groups(clmoe_layer_desc *d) {
    d->router.groups.count = d->router.groups.topk = 2;
}
static void two_level(clmoe_layer_desc *d) {
    groups(d);
    d->top_k = 2;
    d->router.groups.two_level = 1;
}
static void sparsemixer(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SPARSEMIXER;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}
static void rebalance(clmoe_layer_desc *d) {
    d->router.rebalance.iterations = 1;
}
static void identity_experts(clmoe_layer_desc *d) {
    d->num_identity_experts = 1;
}
static void sequences(clmoe_layer_desc *d) {
    d->capacity.tokens_per_sequence = 8;
}
static void sinkhorn(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SINKHORN;
}
static void all_experts(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_ALL_EXPERTS;
    d->top_k = d->num_experts;
}
static void reroute(clmoe_layer_desc *d) {
    d->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
    d->capacity.rows = 9;
}
static void expert_choice(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    d->capacity.rows = 9;
}
static void soft_moe(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SOFT_MOE;
    d->top_k = 1;
}

static const struct {
    void (*spoil)(clmoe_layer_desc *desc);
    const char *says;
} refusals[] = {
    {no_late_renorm, "capacity.keep is round, but router.renorm.after_drop is 0"},
    {rows, "capacity.keep is round, but capacity.rows"},
    {factor, "capacity.keep is round, but capacity.rows or capacity.factor is given"},
    {groups, "capacity.keep is round, but there are router.groups"},
    {two_level, "capacity.keep is round, but router.groups.two_level is 1"},
    {sparsemixer, "capacity.keep is round, but router.score is sparsemixer"},
    {rebalance, "capacity.keep is round, but router.rebalance.iterations"},
    {identity_experts, "capacity.keep is round, but there are identity experts"},
    {sequences, "capacity.keep is round, but capacity.tokens_per_sequence"},
    {sinkhorn, "capacity.keep is round, but router.policy is not token choice"},
    {all_experts, "capacity.keep is round, but router.policy is not token choice"},
    {reroute, "capacity.keep is round"},
    {expert_choice, "capacity.keep is 5"},
    {soft_moe, "capacity.keep is 5"},
};

static void contradictions(void **state) {
    (void)state;
    const shape s = {64, 5, 4, 0, 2, 3};
    for (size_t i = 0; i < COUNT_OF(refusals); i++) {
        test_case("%s", refusals[i].says);
        clmoe_layer_desc desc = rounding_desc(&s, 8);
        clmoe_layer *layer = NULL;
        refusals[i].spoil(&desc);
        const clmoe_status status = clmoe_layer_create(test_context(0), &desc, &layer);
        CHECK(status == CLMOE_INVALID_DESC && layer == NULL, "the status is %d\n", (int)status);
        CHECK(strstr(clmoe_last_error(), refusals[i].says), "it says: %s\n", clmoe_last_error());
    }
}

static void wrong_arguments(void **state) {
    (void)state;
    const shape s = {16, 5, 4, 0, 2, 3};
    batch b;
    device_batch d;
    test_case("external ids");
    clmoe_layer_desc desc = rounding_desc(&s, 8);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_make(&b, &desc, s.tokens);
    batch_upload(layer, &b, &d);
    d.args.ids_in = d.args.pair_weights_in = buf_new(1024);
    check_error(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                "ids_in", "capacity.keep is round");
    test_note("renorm after drop");
    sigmoid_renorm(&desc);
    layer = test_layer(0, &desc);
    const clmoe_renorm_after_drop_args renorm = {.struct_size = sizeof renorm, .tokens = s.tokens};
    check_error(clmoe_renorm_after_drop(layer, test.queue, &renorm, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "capacity.keep is round", "clmoe_topk()");
    test_note("no token_offsets");
    clmoe_topk_args topk = {.struct_size = sizeof topk, .tokens = s.tokens};
    topk.scores = topk.ids = topk.pair_weights = topk.scratch = buf_new(1 << 18);
    check_error(clmoe_topk(layer, test.queue, &topk, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                "token_offsets", "is not given");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(by_hand),         TEST(rounds_exactly), TEST(every_engine),
        TEST(every_type),      TEST(no_padding),     TEST(backward),
        TEST(same_bits_again), TEST(contradictions), TEST(wrong_arguments),
    };
    return RUN(tests);
}
