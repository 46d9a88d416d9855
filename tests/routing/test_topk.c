/* topk: scores [T,R] -> ids [T,K], weights [T,K], live [T]; ids exact, ties to the lower id. */
#include "routing/score_function.clh"
#include "support.h"

#include <math.h>

static const uint32_t every_group[] = {0, 64, 256};

static void check_topk(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                       const float *scores, const ref_weights *w) {
    size_t R = ref_columns(desc), T = tokens, pairs = T * desc->top_k;
    clmoe_weights weights = {
        .select_bias = buf_of(w->select_bias, R * 4),
        .expert_scale = buf_of(w->expert_scale, R * 4),
    };
    clmoe_layer *layer = test_layer(group_size, desc);
    clmoe_topk_args args = {
        .struct_size = sizeof args,
        .tokens = tokens,
        .weights = &weights,
        .scores = buf_of(scores, T * R * 4),
        .ids = buf_new(pairs * 4),
        .pair_weights = buf_new(pairs * 4),
        .live = buf_new(T * 4),
    };
    OK(clmoe_topk(layer, test.queue, &args, 0, NULL, NULL));

    int32_t *ids = HOST(int32_t, pairs), *live = HOST(int32_t, T);
    double *pair_weights = HOST(double, pairs);
    ref_topk(desc, tokens, scores, w, ids, pair_weights, live);
    compare_ints("live", buf_get(args.live), live, T);
    compare_ids(desc, tokens, buf_get(args.ids), ids, live);
    compare_floats("weights", buf_get(args.pair_weights), pair_weights, pairs, STEP_TOLERANCE);
}

/* Positive scores, as a score function gives them; patterns keep their ties and bad values. */
static float *scores_of(const clmoe_layer_desc *desc, uint32_t tokens, pattern kind) {
    float *scores = pattern_scores(kind, tokens, ref_columns(desc));
    bool logits = desc->router.order == CLMOE_ORDER_TOPK_THEN_SCORE ||
                  desc->router.score == CLMOE_SCORE_IDENTITY;
    for (size_t i = 0; i < (size_t)tokens * ref_columns(desc) && !logits; i++)
        if (isfinite(scores[i]) && kind != PATTERN_TIES)
            scores[i] = 1.0f / (1.0f + expf(-scores[i]));
    return scores;
}

/*
 * Each size is a program to compile: all with the default group size, one of two with the second
 * and one of four with the third.
 */
static bool takes_turn(size_t group, size_t i) {
    return group == 0 || (group == 1 ? i % 2 == 1 : i % 4 == 0);
}

static void every_size(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(every_group); g++)
        for (size_t i = 0; i < COUNT_OF(routing_shapes); i++)
            for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
                const shape *s = &routing_shapes[i];
                if (!takes_turn(g, i))
                    continue;
                clmoe_layer_desc desc = desc_of(s);
                ref_weights none = {0};
                test_case("group size %u, T %u, R %u, K %u, %s", every_group[g], s->tokens,
                          s->experts + s->identity, s->top_k, pattern_name(kind));
                seed_set(i + 1);
                check_topk(every_group[g], &desc, s->tokens, scores_of(&desc, s->tokens, kind),
                           &none);
            }
}

static void every_small_top_k(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(every_group); g++)
        for (size_t i = 0; i < COUNT_OF(small_top_k); i++) {
            const shape s = {64, 5, 60, 0, small_top_k[i], 3};
            clmoe_layer_desc desc = desc_of(&s);
            ref_weights none = {0};
            if (!takes_turn(g, i))
                continue;
            test_case("group size %u, K %u", every_group[g], s.top_k);
            seed_set(i + 1);
            check_topk(every_group[g], &desc, s.tokens, scores_of(&desc, s.tokens, PATTERN_TIES),
                       &none);
        }
}

/* What happens to the weights of a choice. */
typedef struct weight_case {
    const char *name;
    clmoe_renorm renorm;
    float eps, p, scale;
    uint32_t expert_scale, select_bias, after_drop;
    bool not_finite; /* infinite and NaN among the scores */
} weight_case;

/* clang-format off */

enum { NONE = CLMOE_RENORM_NONE, SUM = CLMOE_RENORM_SUM, PNORM = CLMOE_RENORM_PNORM };

static const weight_case weight_cases[] = {
    /* name                             renorm  eps     p  scale, and the switches in their order */
    {"as they are",                      NONE,  0,      1, 1,     0, 0, 0, 0},
    {"as they are, not finite",          NONE,  0,      1, 1,     0, 0, 0, 1},
    {"scale",                            NONE,  0,      1, 2.5f,  0, 0, 0, 0},
    {"expert scale, bias",               NONE,  0,      1, 1,     1, 1, 0, 0},
    {"both scales, bias, not finite",    NONE,  0,      1, 2.5f,  1, 1, 0, 1},
    {"no renorm after drop",             NONE,  0.125f, 3, 2.5f,  0, 0, 1, 0},
    {"sum",                              SUM,   0,      1, 1,     0, 0, 0, 0},
    {"sum, bias, not finite",            SUM,   0,      1, 1,     0, 1, 0, 1},
    {"sum with eps, scale",              SUM,   0.125f, 1, 2.5f,  0, 0, 0, 0},
    {"sum with eps, both scales, bias",  SUM,   0.125f, 1, 2.5f,  1, 1, 0, 0},
    {"sum after drop",                   SUM,   0,      1, 1,     0, 0, 1, 0},
    {"sum after drop, everything",       SUM,   0.125f, 1, 2.5f,  1, 1, 1, 1},
    {"1-norm",                           PNORM, 0,      1, 1,     0, 0, 0, 0},
    {"1-norm, scale, not finite",        PNORM, 0,      1, 2.5f,  0, 0, 0, 1},
    {"3-norm",                           PNORM, 0,      3, 1,     0, 0, 0, 0},
    {"3-norm, bias, not finite",         PNORM, 0,      3, 1,     0, 1, 0, 1},
    {"3-norm, both scales, bias",        PNORM, 0,      3, 2.5f,  1, 1, 0, 0},
    {"3-norm after drop, expert scale",  PNORM, 0,      3, 1,     1, 0, 1, 0},
};

/* clang-format on */

static void check_weights(uint32_t group_size, clmoe_score_function score, clmoe_order order,
                          const weight_case *c) {
    const shape s = {64, 5, 60, 4, 5, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.router.score = score;
    desc.router.order = order;
    desc.router.renorm.kind = c->renorm;
    desc.router.renorm.eps = c->eps;
    desc.router.renorm.p = c->p;
    desc.router.renorm.after_drop = c->after_drop;
    desc.router.scale = c->scale;
    desc.router.expert_scale = c->expert_scale;
    desc.router.select_bias = c->select_bias;
    const pattern kind = c->not_finite ? PATTERN_NONFINITE : PATTERN_UNIFORM;
    test_case("group size %u, score %d, order %d, weights: %s", group_size, score, order, c->name);
    seed_set((uint64_t)(c - weight_cases) + 1);
    ref_weights w = weights_make(&desc);
    check_topk(group_size, &desc, s.tokens, scores_of(&desc, s.tokens, kind), &w);
}

static void every_weight_rule(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(every_group); g++)
        for (size_t i = 0; i < COUNT_OF(weight_cases); i++) {
            for (int f = CLMOE_SCORE_SOFTMAX; f < SCORE_COUNT; f++)
                check_weights(every_group[g], (clmoe_score_function)f, CLMOE_ORDER_TOPK_THEN_SCORE,
                              &weight_cases[i]);
            check_weights(every_group[g], CLMOE_SCORE_SIGMOID, CLMOE_ORDER_SCORE_THEN_TOPK,
                          &weight_cases[i]);
        }
}

static void group_limits(void **state) {
    (void)state;
    static const struct {
        uint32_t experts, groups, topk_groups, top_k, select_bias;
    } cases[] = {{8, 4, 2, 3, 1},    {8, 8, 5, 5, 0},    {60, 6, 3, 8, 1},     {256, 8, 4, 8, 0},
                 {205, 5, 1, 41, 1}, {384, 2, 1, 10, 0}, {512, 256, 9, 16, 1}, {4096, 64, 8, 16, 0},
                 {64, 1, 1, 6, 1},   {64, 8, 8, 6, 0},   {160, 8, 3, 6, 1}};
    for (size_t g = 0; g < COUNT_OF(every_group); g++)
        for (size_t i = 0; i < COUNT_OF(cases); i++)
            for (pattern kind = 0; kind < PATTERN_COUNT; kind++)
                for (int top2 = 0; top2 < 2; top2++) {
                    if (!takes_turn(g, i))
                        continue;
                    const shape s = {33, 5, cases[i].experts, 0, cases[i].top_k, 3};
                    clmoe_layer_desc desc = desc_of(&s);
                    desc.router.score = CLMOE_SCORE_SIGMOID;
                    desc.router.groups.count = cases[i].groups;
                    desc.router.groups.topk = cases[i].topk_groups;
                    desc.router.groups.score = top2 ? CLMOE_GROUP_TOP2_SUM : CLMOE_GROUP_MAX;
                    desc.router.select_bias = cases[i].select_bias;
                    desc.router.renorm.kind = CLMOE_RENORM_SUM;
                    test_case("group size %u, E %u, %u of %u groups by %s, bias %u, %s",
                              every_group[g], s.experts, cases[i].topk_groups, cases[i].groups,
                              top2 ? "top 2" : "max", cases[i].select_bias, pattern_name(kind));
                    seed_set(i + 1);
                    ref_weights w = weights_make(&desc);
                    check_topk(every_group[g], &desc, s.tokens, scores_of(&desc, s.tokens, kind),
                               &w);
                }
}

/* A bias of -infinity or NaN takes an expert out; the weights stay unbiased. */
static void experts_biased_out(void **state) {
    (void)state;
    const shape s = {64, 5, 12, 0, 5, 3};
    for (size_t g = 0; g < COUNT_OF(every_group); g++) {
        clmoe_layer_desc desc = desc_of(&s);
        desc.router.score = CLMOE_SCORE_SIGMOID;
        desc.router.select_bias = 1;
        test_case("group size %u", every_group[g]);
        seed_set(3);
        float *bias = random_floats(s.experts, 1.0);
        for (uint32_t e = 0; e < s.experts; e++)
            bias[e] = e % 3 == 0 ? bias[e] : e % 3 == 1 ? -INFINITY : NAN;
        ref_weights w = {.select_bias = bias};
        check_topk(every_group[g], &desc, s.tokens, scores_of(&desc, s.tokens, PATTERN_UNIFORM),
                   &w);
    }
}

/* Scores that sum to 0 give weights of 0. */
static void zero_sum(void **state) {
    (void)state;
    const shape s = {3, 5, 8, 0, 2, 3};
    for (int renorm = CLMOE_RENORM_SUM; renorm <= CLMOE_RENORM_PNORM; renorm++) {
        clmoe_layer_desc desc = desc_of(&s);
        desc.router.renorm.kind = (clmoe_renorm)renorm;
        test_case("renorm %d", renorm);
        ref_weights none = {0};
        check_topk(0, &desc, s.tokens, HOST(float, s.tokens *s.experts), &none);
    }
}

/* Sums and p-norms of weights of any size, for any p: nothing vanishes, nothing overflows. */
static void norms_of_any_size(void **state) {
    (void)state;
    static const clmoe_renorm_desc norms[] = {
        {.kind = SUM, .p = 1.0f},     {.kind = PNORM, .p = 2.0f},   {.kind = PNORM, .p = 16.0f},
        {.kind = PNORM, .p = 64.0f},  {.kind = PNORM, .p = 100.0f}, {.kind = PNORM, .p = 300.0f},
        {.kind = PNORM, .p = 1000.0f}};
    static const double sizes[] = {1.0, 1e-3, 1e-12, 1e-36, 1e12, 1e38};
    const shape s = {16, 5, 12, 0, 4, 3};
    for (size_t g = 0; g < COUNT_OF(every_group); g++)
        for (size_t i = 0; i < COUNT_OF(sizes); i++)
            for (size_t p = 0; p < COUNT_OF(norms); p++) {
                clmoe_layer_desc desc = desc_of(&s);
                desc.router.score = CLMOE_SCORE_IDENTITY;
                desc.router.renorm = norms[p];
                test_case("group size %u, renorm %d, p %g, size %g", every_group[g], norms[p].kind,
                          (double)norms[p].p, sizes[i]);
                seed_set(i + p + 1);
                float *scores = HOST(float, s.tokens *s.experts);
                for (size_t j = 0; j < (size_t)s.tokens * s.experts; j++)
                    scores[j] = (float)(sizes[i] * (0.5 + 2.5 * random_unit()));
                ref_weights none = {0};
                check_topk(every_group[g], &desc, s.tokens, scores, &none);
            }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_size),        TEST(every_small_top_k),  TEST(every_weight_rule),
        TEST(group_limits),      TEST(experts_biased_out), TEST(zero_sum),
        TEST(norms_of_any_size),
    };
    return RUN(tests);
}
