/* score: x [T,D], router [R,D] -> logits [T,R], scores [T,R]. */
#include "routing/score_function.clh"
#include "support.h"

#include <math.h>

/* Runs the step on x, or on logits_in if given; checks logits and scores. */
static void check_score(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                        const float *x, const float *logits_in, bool exact) {
    size_t n = (size_t)tokens * ref_columns(desc);
    ref_weights w = weights_make(desc);
    clmoe_weights weights = weights_upload(desc, &w);
    clmoe_layer *layer = test_layer(group_size, desc);
    clmoe_score_args args = {
        .struct_size = sizeof args,
        .tokens = tokens,
        .weights = &weights,
        .x = buf_of(x, (size_t)tokens * desc->dim * 4),
        .logits_in = buf_of(logits_in, n * 4),
        .logits = logits_in ? (clmoe_buf){NULL, 0} : buf_new(n * 4),
        .scores = buf_new(n * 4),
    };
    OK(clmoe_score(layer, test.queue, &args, 0, NULL, NULL));

    double *logits = HOST(double, n), *scores = HOST(double, n);
    const float *used = logits_in;
    if (!logits_in) {
        used = buf_get(args.logits);
        ref_logits(desc, tokens, x, &w, logits);
        for (size_t i = 0; i < n && exact; i++)
            CHECK((double)used[i] == logits[i], "logits[%zu] is %g, not %g\n", i, (double)used[i],
                  logits[i]);
        compare_floats("logits", used, logits, n, STEP_TOLERANCE);
    }
    for (size_t i = 0; i < n; i++)
        logits[i] = (double)used[i];
    ref_scores(desc, tokens, logits, scores);
    compare_floats("scores", buf_get(args.scores), scores, n, STEP_TOLERANCE);
}

/* The first one; sparsemixer has no other. */
static clmoe_order order_of(int score) {
    return score == CLMOE_SCORE_SPARSEMIXER ? CLMOE_ORDER_TOPK_THEN_SCORE
                                            : CLMOE_ORDER_SCORE_THEN_TOPK;
}

/* Between the product and the score. */
static const struct {
    const char *name;
    float softcap, temperature;
    uint32_t bias;
} switches[] = {
    {"no switch", 0.0f, 1.0f, 0},
    {"softcap", 2.5f, 1.0f, 0},
    {"temperature", 0.0f, 0.7f, 0},
    {"softcap, temperature", 2.5f, 0.7f, 0},
    {"bias", 0.0f, 1.0f, 1},
    {"softcap, bias", 2.5f, 1.0f, 1},
    {"temperature, bias", 0.0f, 0.7f, 1},
    {"softcap, temperature, bias", 2.5f, 0.7f, 1},
};

static void check_switches(uint32_t group_size, clmoe_score_function score, clmoe_order order) {
    const shape s = {64, 33, 60, 0, 4, 3};
    for (size_t i = 0; i < COUNT_OF(switches); i++) {
        clmoe_layer_desc desc = desc_of(&s);
        desc.router.score = score;
        desc.router.order = order;
        desc.router.softcap = switches[i].softcap;
        desc.router.temperature = switches[i].temperature;
        desc.router.bias = switches[i].bias;
        test_case("group size %u, score %d, order %d, %s", group_size, score, order,
                  switches[i].name);
        seed_set(i + 1);
        const float *x = random_floats((size_t)s.tokens * s.dim, 0.5);
        check_score(group_size, &desc, s.tokens, x, NULL, false);
    }
}

static void every_switch(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int f = CLMOE_SCORE_SOFTMAX; f < SCORE_COUNT; f++)
            for (clmoe_order order = order_of(f); order <= CLMOE_ORDER_TOPK_THEN_SCORE; order++)
                check_switches(group_sizes[g], (clmoe_score_function)f, order);
}

static void every_size(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(routing_shapes); i++) {
            const shape *s = &routing_shapes[i];
            clmoe_layer_desc desc = desc_of(s);
            test_case("group size %u, T %u, E %u", group_sizes[g], s->tokens, s->experts);
            seed_set(i);
            const float *x = random_floats((size_t)s->tokens * s->dim, 1.0);
            check_score(group_sizes[g], &desc, s->tokens, x, NULL, false);
        }
}

/* Sums that are exact in f32 in any order must be exact. */
static void exact_logits(void **state) {
    (void)state;
    const shape shapes[] = {{64, 97, 60, 3, 4, 3}, {1000, 31, 8, 0, 2, 3}, {1, 257, 205, 0, 7, 3}};
    for (size_t i = 0; i < COUNT_OF(shapes); i++) {
        const shape *s = &shapes[i];
        clmoe_layer_desc desc = desc_of(s);
        desc.router.bias = 1;
        desc.router.score = CLMOE_SCORE_IDENTITY;
        test_case("T %u, D %u, E %u", s->tokens, s->dim, s->experts);
        seed_set(i);
        check_score(0, &desc, s->tokens, random_eighths((size_t)s->tokens * s->dim, 1.0), NULL,
                    true);
    }
}

static void external_logits(void **state) {
    (void)state;
    const shape s = {64, 5, 205, 0, 7, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (pattern kind = 0; kind < PATTERN_COUNT; kind++)
            for (int f = CLMOE_SCORE_SOFTMAX; f < SCORE_COUNT; f++) {
                clmoe_layer_desc desc = desc_of(&s);
                desc.router.score = (clmoe_score_function)f;
                desc.router.order = order_of(f);
                desc.router.softcap = f == 1 ? 3.0f : 0.0f;
                test_case("group size %u, %s, score %d", group_sizes[g], pattern_name(kind), f);
                seed_set((uint64_t)kind + 1);
                const float *logits = pattern_logits(kind, s.tokens, s.experts);
                check_score(group_sizes[g], &desc, s.tokens, NULL, logits, false);
            }
}

/* Logits at the ends of the range of exp() give scores, never NaN. */
static void extreme_logits(void **state) {
    (void)state;
    const shape s = {5, 5, 4, 0, 2, 3};
    const float logits[] = {100.0f,   -100.0f, 89.0f,  -89.0f,    /* T 0 */
                            3e38f,    -3e38f,  1e30f,  0.0f,      /* T 1 */
                            -3e38f,   -3e38f,  -3e38f, -3e38f,    /* T 2 */
                            INFINITY, 3e38f,   NAN,    -INFINITY, /* T 3 */
                            NAN,      NAN,     NAN,    NAN};      /* T 4 */
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int f = CLMOE_SCORE_SOFTMAX; f < SCORE_COUNT; f++) {
            clmoe_layer_desc desc = desc_of(&s);
            desc.router.score = (clmoe_score_function)f;
            desc.router.order = order_of(f);
            test_case("group size %u, score %d", group_sizes[g], f);
            check_score(group_sizes[g], &desc, s.tokens, NULL, logits, false);
        }
}

/* A token whose x is not finite has no finite logit; the others are as without it. */
/* Where exp(l) is 0 and its root is not; each score by its own size. */
static void far_negative_logits(void **state) {
    (void)state;
    const shape s = {1, 5, 8, 0, 2, 3};
    const float logits[8] = {-10.0f, -19.9f, -20.1f, -60.0f, -90.0f, -110.0f, -140.0f, -170.0f};
    double want[8];
    clmoe_layer_desc desc = desc_of(&s);
    desc.router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    for (size_t i = 0; i < 8; i++)
        want[i] = sqrt(log1p(exp((double)logits[i])));
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        test_case("group size %u", group_sizes[g]);
        clmoe_score_args args = {
            .struct_size = sizeof args,
            .tokens = 1,
            .logits_in = buf_of(logits, sizeof logits),
            .scores = buf_new(sizeof logits),
        };
        OK(clmoe_score(test_layer(group_sizes[g], &desc), test.queue, &args, 0, NULL, NULL));
        const float *got = buf_get(args.scores);
        for (size_t i = 0; i < 8; i++)
            CHECK(fabs((double)got[i] / want[i] - 1) < 1e-5, "of %g it is %g, not %g\n",
                  (double)logits[i], (double)got[i], want[i]);
    }
}

static void nonfinite_rows(void **state) {
    (void)state;
    const shape s = {64, 13, 60, 0, 4, 3};
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = desc_of(&s);
        test_case("group size %u", group_sizes[g]);
        seed_set(1);
        float *x = random_floats((size_t)s.tokens * s.dim, 1.0);
        for (size_t t = 5; t < s.tokens; t += 9)
            x[t * s.dim + t % s.dim] = bad[t % 3];
        clmoe_layer *layer = test_layer(group_sizes[g], &desc);
        ref_weights w = weights_make(&desc);
        clmoe_weights weights = weights_upload(&desc, &w);
        size_t R = s.experts, n = s.tokens * R;
        clmoe_score_args args = {.struct_size = sizeof args, .tokens = s.tokens};
        args.weights = &weights;
        args.x = buf_of(x, (size_t)s.tokens * s.dim * 4);
        args.logits = buf_new(n * 4);
        args.scores = buf_new(n * 4);
        OK(clmoe_score(layer, test.queue, &args, 0, NULL, NULL));
        const float *logits = buf_get(args.logits), *scores = buf_get(args.scores);
        for (size_t i = 0; i < n; i++) {
            bool poor = i / R >= 5 && (i / R - 5) % 9 == 0;
            CHECK(!poor || !isfinite(logits[i]) || w.router[i % R * s.dim + i / R % s.dim] == 0.0f,
                  "logits[%zu] is %g\n", i, (double)logits[i]);
            CHECK(!poor || isfinite(logits[i]) || scores[i] == -INFINITY, "scores[%zu] is %g\n", i,
                  (double)scores[i]);
            CHECK(poor || (isfinite(logits[i]) && scores[i] >= 0.0f), "scores[%zu] is %g\n", i,
                  (double)scores[i]);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_switch),        TEST(every_size),     TEST(exact_logits),
        TEST(external_logits),     TEST(extreme_logits), TEST(nonfinite_rows),
        TEST(far_negative_logits),
    };
    return RUN(tests);
}
