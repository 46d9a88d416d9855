/* Who chooses whom: expert choice, Sinkhorn, all experts, two levels, and the limit of devices. */
#include "workspace.h" /* before cmocka, whose fail is a macro */

#include "ref_policy.h"
#include "support.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

static double *widened(const float *values, size_t n) {
    double *wide = HOST(double, n);
    for (size_t i = 0; i < n; i++)
        wide[i] = (double)values[i];
    return wide;
}

static const clmoe_buf none = {NULL, 0};

/* The choice by scores, or logits, [T,R]: its buffers. `weights` and `state` may be none. */
static clmoe_topk_args choose(clmoe_layer *layer, const clmoe_layer_desc *desc, uint32_t tokens,
                              const float *scores, const uint8_t *mask,
                              const clmoe_weights *weights, clmoe_buf state) {
    const bool by_expert = desc->router.policy == CLMOE_POLICY_EXPERT_CHOICE;
    const size_t T = tokens, pairs = ref_pairs(desc, tokens);
    const clmoe_topk_args args = {
        .struct_size = sizeof args,
        .tokens = tokens,
        .weights = weights,
        .scores = buf_of(scores, T * ref_columns(desc) * 4),
        .ids = buf_new(pairs * 4),
        .pair_weights = buf_new(pairs * 4),
        .live = by_expert ? none : buf_new(T * 4),
        .token_offsets = by_expert ? buf_new((T + 1) * 4) : none,
        .token_mask = buf_of(mask, T),
        .state = state,
        .scratch = scratch_of(layer, tokens),
    };
    OK(clmoe_topk(layer, test.queue, &args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    return args;
}

/* ---- Expert choice --------------------------------------------------------------------------- */

static const shape choice_shapes[] = {
    /* T     D  E    Z  K  H */
    {1, 5, 1, 0, 1, 3},     {7, 5, 8, 0, 2, 3},    {64, 5, 12, 0, 3, 3},  {0, 5, 8, 0, 2, 3},
    {1000, 5, 60, 0, 4, 3}, {300, 5, 33, 0, 2, 3}, {65, 5, 205, 0, 7, 3}, {7, 5, 4096, 0, 16, 3},
};

static clmoe_layer_desc choice_desc(const shape *s, double factor) {
    clmoe_layer_desc desc = desc_of(s);
    desc.router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    desc.router.scale = 1.5f;
    desc.router.expert_scale = 1;
    desc.capacity.factor = factor;
    return desc;
}

/* Every bucket holds C rows, or all there are to take. */
static void check_full(const clmoe_layer_desc *desc, uint32_t tokens, const float *scores,
                       const uint8_t *mask, const int32_t *ids, int32_t pairs) {
    uint32_t C = ref_capacity(desc, tokens), E = desc->num_experts;
    for (uint32_t e = 0; e < E; e++) {
        uint32_t taken = 0, there = 0;
        for (int32_t p = 0; p < pairs; p++)
            taken += ids[p] == (int32_t)e;
        for (uint32_t t = 0; t < tokens; t++)
            there += isfinite(scores[t * E + e]) && (mask == NULL || mask[t] != 0);
        CHECK(taken == (there < C ? there : C), "expert %u took %u of %u, C is %u\n", e, taken,
              there, C);
    }
}

static void check_choice(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                         const float *scores, const uint8_t *mask) {
    size_t E = desc->num_experts, T = tokens, pairs = ref_pairs(desc, tokens);
    clmoe_layer *layer = test_layer(group_size, desc);
    ref_weights w = {.expert_scale = random_floats(E, 1.0)};
    clmoe_weights weights = {.expert_scale = buf_of(w.expert_scale, E * 4)};
    const clmoe_topk_args args = choose(layer, desc, tokens, scores, mask, &weights, none);
    int32_t *offsets = HOST(int32_t, T + 1), *ids = HOST(int32_t, pairs);
    double *pair_weights = HOST(double, pairs);
    ref_expert_choice(desc, tokens, widened(scores, T * E), mask, &w, offsets, ids, pair_weights);
    const int32_t *got = buf_get(args.ids);
    compare_ints("token_offsets", buf_get(args.token_offsets), offsets, T + 1);
    compare_ints("ids", got, ids, pairs);
    compare_floats("weights", buf_get(args.pair_weights), pair_weights, pairs, STEP_TOLERANCE);
    check_full(desc, tokens, scores, mask, got, offsets[T]);

    /* The plan over these pairs, in token order. */
    clmoe_plan_layout layout;
    ref_plan_in in = {.tokens = tokens, .ids = ids, .token_mask = mask, .token_offsets = offsets};
    clmoe_buf plan = plan_run(layer, desc, &in, &layout);
    const ref_plan *want = plan_reference(desc, &in);
    const char *bytes = buf_get(plan);
    CHECK(layout.pairs == pairs, "pairs is %u\n", layout.pairs);
    compare_ints("load", bytes + layout.load, want->load, E);
    compare_ints("kept", bytes + layout.kept, want->load, E);
    compare_ints("slot_of", bytes + layout.slot_of, want->slot_of, pairs);
    compare_ints("pair_of", bytes + layout.pair_of, want->pair_of, layout.slots);
    compare_ints("token_of", bytes + layout.token_of, want->token_of, layout.slots);
    compare_ints("tile_expert", bytes + layout.tile_expert, want->tile_expert,
                 layout.slots / layout.row_tile);
}

/* How many an expert takes, and of which tokens. */
static const struct {
    const char *name;
    double factor;
    bool mask;
} takes[] = {
    {"as many as there are choices", 1.0, false},
    {"fewer, of unmasked tokens", 0.3, true},
    {"more", 2.5, false},
    {"all unmasked tokens", 1e6, true},
};

/* With the group sizes in turn. */
static void experts_take_their_best(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(choice_shapes); i++)
        for (size_t n = 0; n < COUNT_OF(takes); n++)
            for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
                const shape *s = &choice_shapes[i];
                const uint32_t group_size = group_sizes[(i + n + kind) % COUNT_OF(group_sizes)];
                clmoe_layer_desc desc = choice_desc(s, takes[n].factor);
                test_case("group size %u, T %u, E %u, %s, %s", group_size, s->tokens, s->experts,
                          takes[n].name, pattern_name(kind));
                seed_set(i * 10 + n);
                const float *scores = pattern_scores(kind, s->tokens, s->experts);
                check_choice(group_size, &desc, s->tokens, scores,
                             takes[n].mask ? random_mask(s->tokens) : NULL);
            }
}

/* With a capacity_scale in the state, experts take their best as if C were that much smaller. */
static void experts_take_fewer(void **state) {
    (void)state;
    const shape s = {64, 5, 12, 0, 3, 3};
    size_t E = s.experts, T = s.tokens, pairs = E * 10;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        test_case("group size %u", group_sizes[g]);
        seed_set(6);
        clmoe_layer_desc desc = choice_desc(&s, 0.0);
        desc.router.expert_scale = 0;
        desc.capacity.rows = 10;
        clmoe_layer *layer = test_layer(group_sizes[g], &desc);
        const float *scores = pattern_scores(PATTERN_TIES, s.tokens, s.experts);
        size_t state_bytes = 0;
        OK(clmoe_state_size(layer, &state_bytes));
        clmoe_state *head = host_alloc(state_bytes, 1);
        *head = (clmoe_state){.version = 2, .columns = s.experts, .capacity_scale = 0.45f};
        const clmoe_topk_args args =
            choose(layer, &desc, s.tokens, scores, NULL, NULL, buf_of(head, state_bytes));
        int32_t *offsets = HOST(int32_t, T + 1), *ids = HOST(int32_t, pairs);
        double *weights = HOST(double, pairs);
        desc.capacity.rows = 5;
        ref_expert_choice(&desc, s.tokens, widened(scores, T * E), NULL, NULL, offsets, ids,
                          weights);
        for (size_t p = E * 5; p < pairs; p++)
            ids[p] = -1;
        compare_ints("token_offsets", buf_get(args.token_offsets), offsets, T + 1);
        compare_ints("ids", buf_get(args.ids), ids, pairs);
    }
}

/* ---- Sinkhorn -------------------------------------------------------------------------------- */

static clmoe_layer_desc sinkhorn_desc(const shape *s, uint32_t iterations, float tolerance) {
    clmoe_layer_desc desc = desc_of(s);
    desc.router.policy = CLMOE_POLICY_SINKHORN;
    desc.router.sinkhorn.iterations = iterations;
    desc.router.sinkhorn.tolerance = tolerance;
    return desc;
}

/* A choice without near ties is compared with the oracle's; returns whether it was. */
static bool check_sinkhorn(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                           const float *l, const uint8_t *mask) {
    size_t R = ref_columns(desc), T = tokens, pairs = T * desc->top_k;
    double *wide = HOST(double, T *R), *scores = HOST(double, T *R), *w = HOST(double, pairs);
    int32_t *ids = HOST(int32_t, pairs), *live = HOST(int32_t, T);
    for (size_t i = 0; i < T * R; i++)
        wide[i] = isfinite(l[i]) ? (double)l[i] : -INFINITY;
    ref_scores(desc, tokens, wide, scores);
    if (ref_sinkhorn_topk(desc, tokens, wide, scores, mask, NULL, ids, w, live) < 1e-5)
        return false;
    clmoe_topk_args args = choose(test_layer(group_size, desc), desc, tokens, l, mask, NULL, none);
    compare_ints("live", buf_get(args.live), live, T);
    compare_ids(desc, tokens, buf_get(args.ids), ids, live);
    compare_floats("weights", buf_get(args.pair_weights), w, pairs, STEP_TOLERANCE);
    return true;
}

/* When the iteration ends, and what is around it. */
typedef struct sinkhorn_case {
    const char *name;
    uint32_t iterations;
    float tolerance;
    clmoe_score_function score;
    clmoe_renorm renorm;
    pattern kind;
    bool mask;
} sinkhorn_case;

/* clang-format off */
enum { SOFTMAX = CLMOE_SCORE_SOFTMAX, SIGMOID = CLMOE_SCORE_SIGMOID };
enum { NONE = CLMOE_RENORM_NONE, SUM = CLMOE_RENORM_SUM };
static const sinkhorn_case sinkhorn_cases[] = {
    {"three rounds",                          3,   0,     SOFTMAX, NONE, PATTERN_UNIFORM,   0},
    {"tolerance, renorm, a mask",             100, 1e-2f, SOFTMAX, SUM,  PATTERN_UNIFORM,   1},
    {"tolerance, sigmoid",                    100, 1e-2f, SIGMOID, NONE, PATTERN_ZIPF,      0},
    {"three rounds, sigmoid, renorm, a mask", 3,   0,     SIGMOID, SUM,  PATTERN_ZIPF,      1},
    {"three rounds, not finite",              3,   0,     SOFTMAX, NONE, PATTERN_NONFINITE, 0},
    {"tolerance, renorm, a mask, not finite", 100, 1e-2f, SOFTMAX, SUM,  PATTERN_NONFINITE, 1},
};
/* clang-format on */

static void find_sinkhorn(uint32_t group_size, const shape *s, const sinkhorn_case *c) {
    clmoe_layer_desc desc = sinkhorn_desc(s, c->iterations, c->tolerance);
    desc.router.score = c->score;
    desc.router.renorm.kind = c->renorm;
    for (uint64_t seed = 1; seed < 40; seed++) {
        test_case("group size %u, T %u, E %u, %s, seed %d", group_size, s->tokens, s->experts,
                  c->name, (int)seed);
        seed_set(seed);
        const float *l = pattern_scores(c->kind, s->tokens, ref_columns(&desc));
        const uint8_t *mask = c->mask ? random_mask(s->tokens) : NULL;
        if (check_sinkhorn(group_size, &desc, s->tokens, l, mask))
            return;
    }
    CHECK(false, "no seed without near ties\n");
}

/* With the group sizes in turn. */
static void sinkhorn_chooses_balanced(void **state) {
    (void)state;
    const shape shapes[] = {{7, 5, 8, 0, 2, 3},   {64, 5, 12, 3, 3, 3},  {100, 5, 60, 0, 1, 3},
                            {300, 5, 9, 0, 2, 3}, {13, 5, 205, 0, 5, 3}, {1, 5, 1, 0, 1, 3}};
    for (size_t i = 0; i < COUNT_OF(shapes); i++)
        for (size_t n = 0; n < COUNT_OF(sinkhorn_cases); n++)
            find_sinkhorn(group_sizes[(i + n) % COUNT_OF(group_sizes)], &shapes[i],
                          &sinkhorn_cases[n]);
}

/* d0 d1 C sums to 1/T in every row and to 1/R in every column. */
static void sinkhorn_has_its_marginals(void **state) {
    (void)state;
    const shape s = {200, 5, 24, 0, 2, 3};
    double worst = 0.0;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        test_case("group size %u", group_sizes[g]);
        seed_set(5);
        clmoe_layer_desc desc = sinkhorn_desc(&s, 1000, 0.0f);
        clmoe_layer *layer = test_layer(group_sizes[g], &desc);
        const float *l = random_floats((size_t)s.tokens * s.experts, 1.0);
        clmoe_topk_args args = choose(layer, &desc, s.tokens, l, NULL, NULL, none);
        workspace_layout ws;
        OK(workspace_layout_get(layer, s.tokens, &ws));
        const float *c = (const float *)((const char *)buf_get(args.scratch) +
                                         ws.offset[REGION_SINKHORN_CHOICES]);
        double *columns = HOST(double, s.experts);
        for (size_t t = 0; t < s.tokens; t++) {
            double sum = 0.0;
            for (size_t e = 0; e < s.experts; e++)
                sum += (double)c[t * s.experts + e];
            for (size_t e = 0; e < s.experts; e++)
                columns[e] += (double)c[t * s.experts + e] / sum / s.tokens;
        }
        for (size_t e = 0; e < s.experts; e++) {
            worst = fmax(worst, fabs(columns[e] * s.experts - 1.0));
            CHECK(fabs(columns[e] * s.experts - 1.0) < 1e-5, "column %zu sums to %g / R\n", e,
                  columns[e] * s.experts);
        }
    }
    print_message("worst marginal: %.2g off\n", worst);
}

/* ---- Whole layers ---------------------------------------------------------------------------- */

static void expert_choice(clmoe_layer_desc *d) {
    d->num_experts += d->num_identity_experts;
    d->num_identity_experts = 0;
    d->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    d->capacity.factor = 1.0;
}

static void expert_choice_weight_in(clmoe_layer_desc *d) {
    expert_choice(d);
    d->capacity.factor = 1.6;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.expert_scale = 1;
    d->output_bias = 1;
}

static void expert_choice_activation(clmoe_layer_desc *d) {
    expert_choice(d);
    d->capacity.factor = 0.5;
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->shared.hidden_dim = 9;
    d->shared_gate = 1;
}

static void sinkhorn(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SINKHORN;
    d->router.sinkhorn.tolerance = 1e-3f;
    d->router.softcap = 4.0f;
    d->router.rebalance.iterations = 4;
}

static void sinkhorn_capacity(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SINKHORN;
    d->router.sinkhorn.iterations = 4;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->router.expert_scale = 1;
    d->capacity.factor = 1.0;
}

static void all_experts(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_ALL_EXPERTS;
    d->top_k = d->num_experts + d->num_identity_experts;
}

static void all_experts_scored(clmoe_layer_desc *d) {
    all_experts(d);
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 2.0f;
    d->router.scale = 0.5f;
    d->router.expert_scale = 1;
}

static void two_level(clmoe_layer_desc *d) {
    d->num_experts = 12;
    d->num_identity_experts = 0;
    d->top_k = 6;
    d->router.groups.two_level = 1;
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
}

static void two_level_biased(clmoe_layer_desc *d) {
    two_level(d);
    d->num_identity_experts = 2;
    d->num_experts = 58;
    d->top_k = 3;
    d->router.groups.count = 6;
    d->router.groups.topk = 3;
    d->router.bias = 1;
    d->router.select_bias = 1;
    d->router.temperature = 0.7f;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->capacity.factor = 0.8;
    d->router.rebalance.iterations = 2;
}

static void soft_moe(clmoe_layer_desc *d) {
    d->num_experts += d->num_identity_experts;
    d->num_identity_experts = 0;
    d->top_k = 1;
    d->router.policy = CLMOE_POLICY_SOFT_MOE;
    d->router.soft_moe.scale = 3.0f;
}

static void soft_moe_slots(clmoe_layer_desc *d) {
    soft_moe(d);
    d->router.soft_moe.slots = 3;
    d->normalize_experts = 1;
    d->experts.down_bias = 1;
    d->shared.hidden_dim = 9;
    d->shared_gate = 1;
    d->output_bias = 1;
}

static const layer_variant policy_cases[] = {
    {"expert choice", expert_choice},
    {"expert choice, weight at input", expert_choice_weight_in},
    {"expert choice, weight at activation", expert_choice_activation},
    {"Sinkhorn", sinkhorn},
    {"Sinkhorn with a capacity", sinkhorn_capacity},
    {"all experts", all_experts},
    {"all experts, scored", all_experts_scored},
    {"two levels", two_level},
    {"two levels, biased", two_level_biased},
    {"Soft MoE", soft_moe},
    {"Soft MoE, three slots", soft_moe_slots},
};

/* A batch without near ties, with residual and mask. */
static const ref_result *policy_batch(batch *b, const layer_variant *c, const shape *s,
                                      const char *engine, clmoe_type type) {
    clmoe_layer_desc desc = desc_of(s);
    c->set(&desc);
    desc.engine = engine;
    desc.type = desc.weight_type = type;
    for (uint64_t seed = 1; seed < 60; seed++) {
        seed_set(seed);
        batch_make(b, &desc, s->tokens);
        b->in.residual = random_floats((size_t)s->tokens * desc.dim, 1.0);
        b->in.token_mask = random_mask(s->tokens);
        const ref_result *want = batch_reference(b);
        if (want->choice_gap > 1e-5)
            return want;
    }
    CHECK(false, "no seed without near ties\n");
    return NULL;
}

static void check_policy(uint32_t group_size, const layer_variant *c, const shape *s,
                         const char *engine, clmoe_type type) {
    batch b;
    device_batch d;
    const ref_result *want = policy_batch(&b, c, s, engine, type);
    batch_run(test_layer(group_size, &b.desc), &b, &d);
    batch_compare(&b, &d, want);
}

static void every_policy(void **state) {
    (void)state;
    const shape shapes[] = {
        {7, 33, 8, 0, 2, 21}, {64, 45, 12, 2, 3, 29}, {0, 17, 8, 0, 2, 11}, {1, 37, 8, 0, 2, 19}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(policy_cases); i++)
            for (size_t n = 0; n < COUNT_OF(shapes); n++) {
                test_case("%s, group size %u, T %u", policy_cases[i].name, group_sizes[g],
                          shapes[n].tokens);
                check_policy(group_sizes[g], &policy_cases[i], &shapes[n], "ref", CLMOE_F32);
            }
}

static void every_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {64, 45, 12, 0, 3, 29};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(policy_cases); i++) {
            test_case("%s, engine %s", policy_cases[i].name, engines[n]);
            check_policy(0, &policy_cases[i], &s, engines[n], CLMOE_F32);
        }
}

static void every_type(void **state) {
    (void)state;
    const shape s = {64, 45, 12, 0, 3, 29};
    for (clmoe_type type = CLMOE_F16; type <= CLMOE_BF16; type++)
        for (size_t i = 0; i < COUNT_OF(policy_cases); i++) {
            test_case("%s, type %d", policy_cases[i].name, (int)type);
            check_policy(0, &policy_cases[i], &s, NULL, type);
        }
}

/* Soft routing is token choice with K = E, but for the order of the sums. */
static void soft_is_all_experts(void **state) {
    (void)state;
    const shape s = {64, 45, 12, 0, 12, 29};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        batch b;
        device_batch dense, sparse;
        test_case("group size %u", group_sizes[g]);
        seed_set(9);
        clmoe_layer_desc desc = desc_of(&s);
        batch_make(&b, &desc, s.tokens);
        batch_run(test_layer(group_sizes[g], &desc), &b, &sparse);
        b.desc.router.policy = CLMOE_POLICY_ALL_EXPERTS;
        batch_run(test_layer(group_sizes[g], &b.desc), &b, &dense);
        size_t n = (size_t)s.tokens * s.dim;
        compare_floats("y", buf_get(dense.args.y), widened(buf_get(sparse.args.y), n), n,
                       STEP_TOLERANCE);
    }
}

/* More experts per token than token choice allows. */
static void soft_passes_256(void **state) {
    (void)state;
    const shape s = {3, 5, 300, 0, 300, 4};
    test_case("R 300");
    check_policy(0, &(layer_variant){"all experts", all_experts}, &s, "ref", CLMOE_F32);
}

/* Logits that are not finite are never chosen, whoever chooses. */
static void bad_logits(void **state) {
    (void)state;
    const shape s = {64, 9, 12, 0, 4, 5};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(policy_cases); i++) {
            batch b;
            device_batch d;
            const ref_result *want = NULL;
            clmoe_layer_desc desc = desc_of(&s);
            policy_cases[i].set(&desc);
            if (desc.router.policy == CLMOE_POLICY_SOFT_MOE)
                continue;
            for (uint64_t seed = 1; seed < 60 && want == NULL; seed++) {
                test_case("%s, group size %u", policy_cases[i].name, group_sizes[g]);
                seed_set(seed);
                batch_make(&b, &desc, s.tokens);
                b.in.logits_in = pattern_logits(PATTERN_NONFINITE, s.tokens, ref_columns(&desc));
                want = batch_reference(&b);
                want = want->choice_gap > 1e-5 ? want : NULL;
            }
            CHECK(want != NULL, "no seed without near ties\n");
            batch_run(test_layer(group_sizes[g], &desc), &b, &d);
            batch_compare(&b, &d, want);
        }
}

/*
 * Padding and rows that are not finite enter no slot: the other tokens' outputs are those of the
 * batch in which such rows are masked zeros.
 */
static void soft_moe_bad_rows(void **state) {
    (void)state;
    const shape s = {40, 13, 6, 0, 1, 7};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        batch b;
        device_batch d;
        test_case("group size %u", group_sizes[g]);
        seed_set(7);
        clmoe_layer_desc desc = desc_of(&s);
        soft_moe(&desc);
        batch_make(&b, &desc, s.tokens);
        uint8_t *mask = random_mask(s.tokens);
        float *x = HOST(float, s.tokens *s.dim), *clean = HOST(float, s.tokens *s.dim);
        memcpy(x, b.in.x, s.tokens * s.dim * sizeof *x);
        mask[3] = mask[5] = mask[8] = 1;
        x[3 * s.dim + 2] = NAN;
        x[5 * s.dim] = INFINITY;
        memset(x + 8 * s.dim, 0, s.dim * sizeof *x);
        for (size_t t = 0; t < s.tokens; t++)
            for (size_t i = 0; i < s.dim && mask[t] == 0; i++)
                x[t * s.dim + i] = NAN;
        b.in.x = x;
        b.in.token_mask = mask;
        batch_run(test_layer(group_sizes[g], &desc), &b, &d);
        const float *y = buf_get(d.args.y);

        uint8_t *stricter = HOST(uint8_t, s.tokens);
        memcpy(stricter, mask, s.tokens);
        stricter[3] = stricter[5] = 0;
        for (size_t i = 0; i < s.tokens * s.dim; i++)
            clean[i] = stricter[i / s.dim] ? x[i] : 0.0f;
        b.in.x = clean;
        b.in.token_mask = stricter;
        const ref_result *want = batch_reference(&b);
        compare_floats("y", y, want->y, s.tokens * s.dim, FORWARD_TOLERANCE);
    }
}

/* ---- Promises -------------------------------------------------------------------------------- */

static void same_bits_again(void **state) {
    (void)state;
    const shape s = {300, 21, 12, 0, 3, 19};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(policy_cases); i++) {
            batch b;
            device_batch d;
            clmoe_layer_desc desc = desc_of(&s);
            policy_cases[i].set(&desc);
            test_case("%s, group size %u", policy_cases[i].name, group_sizes[g]);
            seed_set(4);
            batch_make(&b, &desc, s.tokens);
            b.in.token_mask = random_mask(s.tokens);
            clmoe_layer *layer = test_layer(group_sizes[g], &desc);
            batch_run(layer, &b, &d);
            size_t bytes = (size_t)s.tokens * s.dim * 4, pairs = ref_pairs(&desc, s.tokens) * 4;
            bool routed = d.args.ids.mem != NULL;
            const void *y = buf_get(d.args.y), *ids = routed ? buf_get(d.args.ids) : NULL;
            const void *weights = routed ? buf_get(d.args.pair_weights) : NULL;
            for (int run = 0; run < 20; run++) {
                buf_poison(d.args.scratch);
                buf_poison(d.args.y);
                OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
                compare_bits("y", buf_get(d.args.y), y, bytes);
                if (!routed)
                    continue;
                compare_bits("ids", buf_get(d.args.ids), ids, pairs);
                compare_bits("weights", buf_get(d.args.pair_weights), weights, pairs);
            }
        }
}

/* A call that blocked would never return: its wait list completes after it. */
static void never_blocks(void **state) {
    (void)state;
    const shape s = {64, 21, 12, 0, 3, 19};
    for (size_t i = 0; i < COUNT_OF(policy_cases); i++)
        for (int q = 0; q < 2; q++) {
            batch b;
            device_batch d;
            cl_int code = CL_SUCCESS, status = -1;
            cl_event event = NULL;
            test_case("%s, queue %d", policy_cases[i].name, q);
            const ref_result *want = policy_batch(&b, &policy_cases[i], &s, "ref", CLMOE_F32);
            clmoe_layer *layer = test_layer(0, &b.desc);
            batch_upload(layer, &b, &d);
            cl_event gate = clCreateUserEvent(test.context, &code);
            CL_OK(code);
            cl_command_queue queue = q ? test.out_of_order : test.queue;
            OK(clmoe_forward(layer, queue, &d.args, 1, &gate, &event));
            CL_OK(clFlush(queue));
            CL_OK(clGetEventInfo(event, CL_EVENT_COMMAND_EXECUTION_STATUS, sizeof status, &status,
                                 NULL));
            CHECK(status != CL_COMPLETE, "it ran before its wait list\n");
            CL_OK(clSetUserEventStatus(gate, CL_COMPLETE));
            CL_OK(clWaitForEvents(1, &event));
            clReleaseEvent(event);
            clReleaseEvent(gate);
            batch_compare(&b, &d, want);
        }
}

/* Groups of experts as devices: no token goes to more than groups.topk of them. */
static void device_limit(void **state) {
    (void)state;
    const shape s = {300, 17, 32, 0, 6, 5};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (uint32_t limit = 2; limit <= 4; limit++) {
            batch b;
            device_batch d;
            test_case("group size %u, at most %u devices", group_sizes[g], limit);
            seed_set(limit);
            clmoe_layer_desc desc = desc_of(&s);
            desc.router.groups.count = 8;
            desc.router.groups.topk = limit;
            batch_make(&b, &desc, s.tokens);
            batch_run(test_layer(group_sizes[g], &desc), &b, &d);
            const int32_t *ids = buf_get(d.args.ids);
            for (size_t t = 0; t < s.tokens; t++) {
                uint32_t devices = 0, count = 0;
                for (size_t k = 0; k < s.top_k; k++)
                    devices |= 1u << (ids[t * s.top_k + k] / 4);
                for (; devices; devices &= devices - 1)
                    count++;
                CHECK(count <= limit, "token %zu goes to %u devices\n", t, count);
            }
        }
}

enum { E = 64, K = 8, T = 5 };

/* The one unmasked token of a batch, which is that of `tokens` that is `alone`. */
static void check_alone(uint32_t group_size, uint32_t tokens, uint32_t alone) {
    const shape s = {T, 5, E, 0, K, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.router.policy = CLMOE_POLICY_SINKHORN;
    desc.router.score = CLMOE_SCORE_SIGMOID;
    const float *l = random_floats(T * E, 3.0), *row = l + alone * E;
    uint8_t *mask = HOST(uint8_t, T);
    mask[alone] = 1;
    const clmoe_topk_args args =
        choose(test_layer(group_size, &desc), &desc, tokens, l, mask, NULL, none);
    const int32_t *ids = (const int32_t *)buf_get(args.ids) + alone * K;
    for (size_t k = 0; k < K; k++) {
        size_t better = 0;
        for (size_t e = 0; e < E; e++)
            better += row[e] > row[ids[k]];
        CHECK(better == k, "choice %zu has %zu better ones\n", k, better);
    }
}

/* With one unmasked token nothing is to balance: its best logits win. */
static void sinkhorn_alone(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        test_case("group size %u, a batch of one token", group_sizes[g]);
        seed_set(1);
        check_alone(group_sizes[g], 1, 0);
        for (uint32_t alone = 0; alone < T; alone++) {
            test_case("group size %u, unmasked token %u of %d", group_sizes[g], alone, T);
            seed_set(alone + 2);
            check_alone(group_sizes[g], T, alone);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(experts_take_their_best),
                                       TEST(experts_take_fewer),
                                       TEST(sinkhorn_chooses_balanced),
                                       TEST(sinkhorn_has_its_marginals),
                                       TEST(every_policy),
                                       TEST(every_engine),
                                       TEST(every_type),
                                       TEST(soft_is_all_experts),
                                       TEST(soft_passes_256),
                                       TEST(bad_logits),
                                       TEST(soft_moe_bad_rows),
                                       TEST(same_bits_again),
                                       TEST(never_blocks),
                                       TEST(device_limit),
                                       TEST(sinkhorn_alone)};
    return RUN(tests);
}
