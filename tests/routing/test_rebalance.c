/* Weight rebalancing: projected gradient on the weights of the fixed choice. */
#include "ref_places.h"
#include "support.h"

#include <math.h>
#include <string.h>

#define TOLERANCE 1e-5

/* One call of clmoe_topk(), and its host copies. */
typedef struct choice {
    const int32_t *ids, *live;
    const float *weights;
} choice;

static choice run(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                  const float *scores, const ref_weights *w, const uint8_t *mask) {
    size_t T = tokens, R = ref_columns(desc), pairs = T * desc->top_k;
    clmoe_layer *layer = test_layer(group_size, desc);
    clmoe_weights weights = {.select_bias = buf_of(w->select_bias, R * 4),
                             .expert_scale = buf_of(w->expert_scale, R * 4)};
    clmoe_topk_args args = {
        .struct_size = sizeof args,
        .tokens = tokens,
        .weights = &weights,
        .scores = buf_of(scores, T * R * 4),
        .ids = buf_new(pairs * 4),
        .pair_weights = buf_new(pairs * 4),
        .live = buf_new(T * 4),
        .token_mask = buf_of(mask, T),
        .scratch = scratch_of(layer, tokens),
    };
    OK(clmoe_topk(layer, test.queue, &args, 0, NULL, NULL));
    return (choice){buf_get(args.ids), buf_get(args.live), buf_get(args.pair_weights)};
}

static const float *scores_of(const clmoe_layer_desc *desc, uint32_t tokens, pattern kind) {
    float *scores = pattern_scores(kind, tokens, ref_columns(desc));
    for (size_t i = 0; i < (size_t)tokens * ref_columns(desc); i++)
        if (isfinite(scores[i]) && desc->router.score != CLMOE_SCORE_IDENTITY)
            scores[i] = 1.0f / (1.0f + expf(-scores[i]));
    return scores;
}

static double *wide_of(const float *values, size_t n) {
    double *wide = HOST(double, n);
    for (size_t i = 0; i < n; i++)
        wide[i] = (double)values[i];
    return wide;
}

/* Rows keep their sums and have no negative element, where they are rebalanced at all. */
static void check_rows(const clmoe_layer_desc *desc, uint32_t tokens, const choice *was,
                       const choice *now) {
    size_t K = desc->top_k;
    for (size_t t = 0; t < tokens; t++) {
        double before = 0.0, after = 0.0, size = 0.0;
        bool changed = memcmp(was->weights + t * K, now->weights + t * K, K * 4) != 0;
        for (size_t k = 0; k < K; k++) {
            before += (double)was->weights[t * K + k];
            after += (double)now->weights[t * K + k];
            size += fabs((double)was->weights[t * K + k]);
            bool identity = (uint32_t)now->ids[t * K + k] >= desc->num_experts;
            CHECK(!changed || identity || now->weights[t * K + k] >= 0.0f,
                  "weights[%zu][%zu] is %g\n", t, k, (double)now->weights[t * K + k]);
        }
        CHECK(fabs(before - after) <= TOLERANCE * size, "row %zu sums to %g, not %g\n", t, after,
              before);
    }
}

static void check_rebalance(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                            const float *scores, const uint8_t *mask) {
    size_t pairs = (size_t)tokens * desc->top_k;
    clmoe_layer_desc plain = *desc;
    plain.router.rebalance.iterations = 0;
    ref_weights w = weights_make(desc);
    choice was = run(group_size, &plain, tokens, scores, &w, mask);
    choice now = run(group_size, desc, tokens, scores, &w, mask);
    compare_ints("ids", now.ids, was.ids, pairs);
    compare_ints("live", now.live, was.live, tokens);
    double *want = wide_of(was.weights, pairs);
    if (desc->top_k == 1) {
        compare_bits("weights", now.weights, was.weights, pairs * 4);
        return;
    }
    ref_rebalance(desc, tokens, desc->router.rebalance.iterations, was.ids, was.live, mask, want);
    compare_floats("weights", now.weights, want, pairs, TOLERANCE);
    check_rows(desc, tokens, &was, &now);
    for (size_t t = 0; mask && t < tokens; t++)
        if (!mask[t])
            compare_bits("weights of padding", now.weights + t * desc->top_k,
                         was.weights + t * desc->top_k, desc->top_k * 4);
}

typedef struct rebalance_case {
    const char *name;
    uint32_t iterations;
    float mu;
    clmoe_renorm renorm;
    bool mask;
} rebalance_case;

/* clang-format off */

enum { NONE = CLMOE_RENORM_NONE, SUM = CLMOE_RENORM_SUM };

static const rebalance_case rebalance_cases[] = {
    {"once",                            1,  1.0f,  NONE, 0},
    {"once, mu 0, a mask",              1,  0.0f,  NONE, 1},
    {"once, mu 10, renorm, a mask",     1,  10.0f, SUM,  1},
    {"5 times, renorm",                 5,  1.0f,  SUM,  0},
    {"5 times, mu 0, renorm, a mask",   5,  0.0f,  SUM,  1},
    {"5 times, mu 10",                  5,  10.0f, NONE, 0},
    {"40 times, a mask",                40, 1.0f,  NONE, 1},
    {"40 times, mu 0, renorm",          40, 0.0f,  SUM,  0},
    {"40 times, mu 10, renorm, a mask", 40, 10.0f, SUM,  1},
};

/* clang-format on */

/* Group sizes, sizes and patterns take the cases in turn, each pattern all of them. */
static void every_pattern(void **state) {
    (void)state;
    static const shape shapes[] = {
        {64, 5, 8, 0, 2, 3}, {700, 5, 60, 0, 4, 3}, {7, 5, 3, 0, 3, 3},    {150, 5, 205, 3, 16, 3},
        {1, 5, 4, 0, 2, 3},  {0, 5, 4, 0, 2, 3},    {100, 5, 12, 0, 1, 3}, {3, 5, 300, 0, 256, 3}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(shapes); i++)
            for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
                const shape *s = &shapes[i];
                const rebalance_case *c =
                    &rebalance_cases[(i + kind + g) % COUNT_OF(rebalance_cases)];
                clmoe_layer_desc desc = desc_of(s);
                desc.router.score = CLMOE_SCORE_SIGMOID;
                desc.router.renorm.kind = c->renorm;
                desc.router.rebalance.iterations = c->iterations;
                desc.router.rebalance.mu = c->mu;
                test_case("group size %u, T %u, R %u, K %u, %s, %s", group_sizes[g], s->tokens,
                          s->experts + s->identity, s->top_k, pattern_name(kind), c->name);
                seed_set(i + 1);
                const float *scores = scores_of(&desc, s->tokens, kind);
                check_rebalance(group_sizes[g], &desc, s->tokens, scores,
                                c->mask ? random_mask(s->tokens) : NULL);
            }
}

/* Negative weights, rows without a positive sum, and scales per expert. */
static void odd_weights(void **state) {
    (void)state;
    static const struct {
        const char *name;
        clmoe_score_function score;
        float scale;
        uint32_t expert_scale;
    } cases[] = {
        {"scale", CLMOE_SCORE_SIGMOID, 2.5f, 0},
        {"weights of both signs, scale", CLMOE_SCORE_IDENTITY, 2.5f, 0},
        {"negative scale, experts' scales", CLMOE_SCORE_SIGMOID, -2.5f, 1},
        {"weights of both signs, both scales", CLMOE_SCORE_IDENTITY, 2.5f, 1},
    };
    const shape s = {300, 5, 24, 2, 4, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(cases); i++) {
            clmoe_layer_desc desc = desc_of(&s);
            desc.router.score = cases[i].score;
            desc.router.expert_scale = cases[i].expert_scale;
            desc.router.scale = cases[i].scale;
            desc.router.rebalance.iterations = 7;
            test_case("group size %u, %s", group_sizes[g], cases[i].name);
            seed_set(i + 1);
            const float *scores = scores_of(&desc, s.tokens, PATTERN_ZIPF);
            check_rebalance(group_sizes[g], &desc, s.tokens, scores, NULL);
        }
}

/* More iterations never make the objective worse, and in the end the load is more even. */
static void objective_falls(void **state) {
    (void)state;
    const shape s = {500, 5, 16, 0, 4, 3};
    static const uint32_t iterations[] = {0, 1, 2, 3, 5, 10, 30, 100, 1000};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int number = 0; number < 3; number++) {
            clmoe_layer_desc desc = desc_of(&s);
            desc.router.score = CLMOE_SCORE_SIGMOID;
            desc.router.renorm.kind = CLMOE_RENORM_SUM;
            desc.router.rebalance.mu = number == 0 ? 0.0f : number == 1 ? 0.5f : 3.0f;
            double first = 0.0, last = 0.0;
            const double *before = NULL;
            for (size_t i = 0; i < COUNT_OF(iterations); i++) {
                desc.router.rebalance.iterations = iterations[i];
                if (i == 0)
                    test_case("group size %u, mu %g", group_sizes[g],
                              (double)desc.router.rebalance.mu);
                seed_set(4);
                const float *scores = scores_of(&desc, s.tokens, PATTERN_ZIPF);
                ref_weights none = {0};
                choice c = run(group_sizes[g], &desc, s.tokens, scores, &none, NULL);
                const double *now = wide_of(c.weights, (size_t)s.tokens * s.top_k);
                before = i == 0 ? now : before;
                double value =
                    ref_rebalance_objective(&desc, s.tokens, c.ids, c.live, NULL, before, now);
                first = i == 0 ? value : first;
                CHECK(i == 0 || value <= last + 1e-6 * first, "%u iterations: %g after %g\n",
                      iterations[i], value, last);
                last = value;
            }
            CHECK(last < 0.9 * first, "the objective went from %g to %g only\n", first, last);
        }
}

/* A layer that rebalances. */
typedef struct layer_case {
    const char *name;
    uint32_t iterations;
    double factor; /* of capacity; 0: dropless */
    uint32_t training;
    bool mask;
} layer_case;

static const layer_case layer_cases[] = {
    {"one iteration, training", .iterations = 1, .training = 1},
    {"a mask, drops", .iterations = 4, .factor = 0.9, .mask = true},
    {"a mask", .iterations = 7, .mask = true},
    {"training, drops", .iterations = 10, .factor = 0.9, .training = 1},
    {"training, a mask", .iterations = 13, .training = 1, .mask = true},
    {"many iterations, a mask, drops", .iterations = 16, .factor = 0.9, .mask = true},
};

static void check_layer(const char *engine, uint32_t group_size, const layer_case *c) {
    const shape s = {40, 11, 12, 2, 3, 7};
    clmoe_layer_desc desc = desc_of(&s);
    desc.engine = engine;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.router.rebalance.iterations = c->iterations;
    desc.capacity.factor = c->factor;
    desc.training = c->training;
    test_case("engine %s, group size %u, %s", engine, group_size, c->name);
    seed_set((uint64_t)(c - layer_cases) + 1);
    batch b;
    device_batch d;
    batch_make(&b, &desc, s.tokens);
    b.in.logits_in = random_eighths((size_t)s.tokens * ref_columns(&desc), 1.0);
    b.in.token_mask = c->mask ? random_mask(s.tokens) : NULL;
    const ref_result *want = batch_reference(&b);
    batch_run(test_layer(group_size, &desc), &b, &d);
    batch_compare(&b, &d, want);
}

static void whole_layer(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
            for (size_t i = 0; i < COUNT_OF(layer_cases); i++)
                check_layer(engines[n], group_sizes[g], &layer_cases[i]);
}

static void same_bits_every_time(void **state) {
    (void)state;
    const shape s = {3000, 5, 64, 0, 6, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = desc_of(&s);
        desc.router.score = CLMOE_SCORE_SIGMOID;
        desc.router.rebalance.iterations = 5;
        test_case("group size %u", group_sizes[g]);
        seed_set(11);
        ref_weights none = {0};
        const float *scores = scores_of(&desc, s.tokens, PATTERN_ZIPF);
        choice first = run(group_sizes[g], &desc, s.tokens, scores, &none, NULL);
        for (int i = 0; i < 20; i++) {
            choice again = run(group_sizes[g], &desc, s.tokens, scores, &none, NULL);
            compare_bits("weights", again.weights, first.weights, (size_t)s.tokens * s.top_k * 4);
        }
    }
}

static void missing_scratch(void **state) {
    (void)state;
    const shape s = {9, 5, 6, 0, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.router.rebalance.iterations = 2;
    test_case("missing scratch");
    clmoe_topk_args args = {
        .struct_size = sizeof args,
        .tokens = s.tokens,
        .scores = buf_new(54 * 4),
        .ids = buf_new(18 * 4),
        .pair_weights = buf_new(18 * 4),
        .live = buf_new(9 * 4),
    };
    clmoe_status status = clmoe_topk(test_layer(0, &desc), test.queue, &args, 0, NULL, NULL);
    CHECK(status == CLMOE_INVALID_ARGUMENT, "status %d\n", status);
    CHECK(strstr(clmoe_last_error(), "scratch"), "%s\n", clmoe_last_error());
    CHECK(all_untouched(), "something was written\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_pattern), TEST(odd_weights),          TEST(objective_falls),
        TEST(whole_layer),   TEST(same_bits_every_time), TEST(missing_scratch),
    };
    return RUN(tests);
}
