/* stats: every field and array of clmoe_stats against the oracle, and the identities they obey. */
#include "routing/score_function.clh"
#include "support_balance.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static void check(balance_batch *b, uint32_t group_size) {
    balance_upload(b, group_size);
    balance_compare_stats(b, balance_stats(b));
}

/* The largest divisor of E up to `most`. */
static uint32_t divisor_of(uint32_t E, uint32_t most) {
    uint32_t d = most;
    while (E % d != 0)
        d--;
    return d;
}

/* What a batch and its layer have besides logits. */
typedef struct batch_case {
    const char *name;
    bool mask, state, target, external, offsets; /* as in balance_options */
    double factor;                               /* of capacity; 0: dropless */
    bool devices;
    uint32_t dead_window; /* 0: the default */
} batch_case;

static const batch_case batch_cases[] = {
    {.name = "logits alone"},
    {"a mask, drops, devices", .mask = true, .factor = 0.8, .devices = true},
    {"a state, a short window", .state = true, .devices = true, .dead_window = 64},
    {"a mask, a state, external ids", .mask = true, .state = true, .external = true},
    {"a target, offsets, drops", .target = true, .offsets = true, .factor = 0.8},
    {"a mask, a target, devices", .mask = true, .target = true, .devices = true},
    {"a state, a target, a short window", .state = true, .target = true, .dead_window = 64},
    {"everything, drops", .mask = true, .state = true, .target = true, .factor = 0.8,
     .devices = true},
    {"external ids, devices", .external = true, .devices = true},
    {"a mask, offsets, devices", .mask = true, .offsets = true, .devices = true},
    {"a state, external ids, drops, a short window", .state = true, .external = true, .factor = 0.8,
     .devices = true, .dead_window = 64},
    {"a state, offsets", .state = true, .offsets = true},
    {"external ids, offsets, a target, drops", .target = true, .external = true, .offsets = true,
     .factor = 0.8},
};

static void check_batch(uint32_t group_size, const shape *s, pattern kind, const batch_case *c) {
    clmoe_layer_desc desc = desc_of(s);
    balance_options options = {.kind = kind,
                               .mask = c->mask,
                               .state = c->state,
                               .target = c->target,
                               .external = c->external,
                               .offsets = c->offsets};
    desc.capacity.factor = c->factor;
    desc.balance.device_groups = c->devices ? divisor_of(s->experts, 8) : 0;
    if (c->dead_window)
        desc.balance.dead_window = c->dead_window;
    test_case("group size %u, T %u, E %u, Z %u, K %u, %s, %s", group_size, s->tokens, s->experts,
              s->identity, s->top_k, pattern_name(kind), c->name);
    seed_set((uint64_t)(c - batch_cases) + 1);
    balance_batch b;
    balance_make(&b, &desc, s->tokens, &options);
    check(&b, group_size);
}

/* Sizes and patterns take the batches in turn. */
static void every_size(void **state) {
    (void)state;
    size_t turn = 0;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(routing_shapes); i++)
            for (pattern kind = 0; kind < PATTERN_COUNT; kind++)
                check_batch(group_sizes[g], &routing_shapes[i], kind,
                            &batch_cases[turn++ % COUNT_OF(batch_cases)]);
}

/* From the logits to the probabilities. */
typedef struct score_case {
    const char *name;
    float softcap, temperature;
    clmoe_order order;
    clmoe_renorm renorm;
    bool mask, state, not_finite;
} score_case;

/* clang-format off */

enum { FIRST = CLMOE_ORDER_SCORE_THEN_TOPK, LAST = CLMOE_ORDER_TOPK_THEN_SCORE }; /* the score */
enum { NONE = CLMOE_RENORM_NONE, SUM = CLMOE_RENORM_SUM };

static const score_case score_cases[] = {
    /* name                        softcap, temperature, order, renorm; mask, state, not finite */
    {"a mask",                                       0,    1,    FIRST, NONE, 1, 0, 0},
    {"score last",                                   0,    1,    LAST,  SUM,  0, 0, 0},
    {"softcap",                                      2.5f, 1,    FIRST, SUM,  0, 0, 0},
    {"softcap, score last, a mask",                  2.5f, 1,    LAST,  NONE, 1, 0, 0},
    {"temperature, a state",                         0,    0.7f, FIRST, SUM,  0, 1, 0},
    {"temperature, score last, a state, not finite", 0,    0.7f, LAST,  SUM,  0, 1, 1},
    {"softcap, temperature, a state, a mask",        2.5f, 0.7f, FIRST, NONE, 1, 1, 0},
    {"softcap, temperature, score last, a state",    2.5f, 0.7f, LAST,  SUM,  0, 1, 0},
};

/* clang-format on */

static void check_score(uint32_t group_size, clmoe_score_function score, const score_case *c) {
    const shape s = {64, 5, 24, 3, 4, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.router.score = score;
    desc.router.order = score == CLMOE_SCORE_SPARSEMIXER ? CLMOE_ORDER_TOPK_THEN_SCORE : c->order;
    desc.router.softcap = c->softcap;
    desc.router.temperature = c->temperature;
    desc.router.renorm.kind = c->renorm;
    desc.balance.device_groups = 8;
    balance_options options = {.kind = c->not_finite ? PATTERN_NONFINITE : PATTERN_UNIFORM,
                               .mask = c->mask,
                               .state = c->state,
                               .positive = score == CLMOE_SCORE_IDENTITY};
    test_case("group size %u, score %d, %s", group_size, score, c->name);
    seed_set((uint64_t)(c - score_cases) + 1);
    balance_batch b;
    balance_make(&b, &desc, s.tokens, &options);
    check(&b, group_size);
}

/* With the group sizes in turn. */
static void every_score(void **state) {
    (void)state;
    for (int score = CLMOE_SCORE_SOFTMAX; score < SCORE_COUNT; score++)
        for (size_t i = 0; i < COUNT_OF(score_cases); i++)
            check_score(group_sizes[i % COUNT_OF(group_sizes)], (clmoe_score_function)score,
                        &score_cases[i]);
}

/* The state's scales: the temperature of the scores. */
static void state_scales(void **state) {
    (void)state;
    const shape s = {50, 5, 12, 0, 3, 3};
    clmoe_layer_desc desc = desc_of(&s);
    balance_options options = {.kind = PATTERN_ZIPF, .state = true};
    balance_batch b;
    seed_set(4);
    balance_make(&b, &desc, s.tokens, &options);
    clmoe_state *header = host_alloc(1, sizeof *header + 20 * 12);
    memcpy(header, b.in.state, sizeof *header + 20 * 12);
    header->temperature_scale = 2.0f;
    b.in.state = header;
    check(&b, 0);
    /* A state that has seen no batch has no previous F. */
    test_case("the first batch");
    seed_set(5);
    balance_make(&b, &desc, s.tokens, &options);
    memcpy(header = host_alloc(1, sizeof *header + 20 * 12), b.in.state, sizeof *header + 20 * 12);
    header->updates = 0;
    b.in.state = header;
    check(&b, 0);
    clmoe_stats got;
    memcpy(&got, buf_get(balance_stats(&b)), sizeof got);
    assert_true(got.fluctuation == 0.0f && got.target_change == 0.0f);
}

static void masked_whole(void **state) {
    (void)state;
    const shape s = {9, 5, 8, 0, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.balance.device_groups = 4;
    balance_options options = {.kind = PATTERN_UNIFORM, .state = true};
    balance_batch b;
    seed_set(1);
    balance_make(&b, &desc, s.tokens, &options);
    b.in.token_mask = HOST(uint8_t, s.tokens);
    check(&b, 0);
}

/* The tokens since a choice stop at the largest number: a dead expert stays dead. */
static void idle_for_ever(void **state) {
    (void)state;
    const shape s = {40, 5, 12, 2, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    balance_options options = {.kind = PATTERN_EMPTY_EXPERTS, .state = true};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        balance_batch b;
        test_case("group size %u", group_sizes[g]);
        seed_set(g + 1);
        balance_make(&b, &desc, s.tokens, &options);
        float *arrays = (float *)((clmoe_state *)(uintptr_t)b.in.state + 1);
        uint32_t *idle = (uint32_t *)(arrays + 3 * 14);
        for (uint32_t e = 0; e < 14; e++)
            idle[e] = UINT32_MAX - 7 * e;
        check(&b, group_sizes[g]);
    }
}

/* Ids that are no column, among external ones: counted where the token is not masked. */
static void invalid_ids(void **state) {
    (void)state;
    static const struct {
        const char *name;
        balance_options options;
    } cases[] = {
        {"external ids", {.external = true}},
        {"external ids, a mask", {.external = true, .mask = true}},
        {"external ids, offsets", {.external = true, .offsets = true}},
        {"external ids, a mask, offsets", {.external = true, .mask = true, .offsets = true}},
        {"ids of the router", {.mask = false}},
        {"ids of the router, a mask", {.mask = true}},
    };
    static const int32_t wild[] = {-1, -7, INT32_MIN, INT32_MAX, 15, 14};
    const shape s = {100, 5, 12, 2, 3, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.capacity.factor = 1.0;
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        balance_batch b;
        test_case("%s", cases[i].name);
        seed_set(i + 1);
        balance_make(&b, &desc, s.tokens, &cases[i].options);
        int32_t *ids = (int32_t *)(uintptr_t)b.in.ids;
        for (size_t p = 0; p < 300; p += 1 + random_below(4))
            ids[p] = wild[random_below(COUNT_OF(wild))];
        check(&b, group_sizes[i % COUNT_OF(group_sizes)]);
        clmoe_stats got;
        memcpy(&got, buf_get(balance_stats(&b)), sizeof got);
        assert_true(got.invalid_ids > 10);
    }
}

/* ---- Identities ------------------------------------------------------------------------------ */

/* Runs a batch whose pairs are given: token t chooses ids [t*K, t*K + K). */
static clmoe_stats stats_of_ids(clmoe_layer_desc *desc, uint32_t tokens, int32_t *ids,
                                float *logits) {
    balance_batch b;
    balance_options options = {.kind = PATTERN_UNIFORM};
    balance_make(&b, desc, tokens, &options);
    b.in.ids = ids;
    b.in.live = NULL;
    if (logits)
        balance_set_logits(&b, logits);
    check(&b, 0);
    clmoe_stats got;
    memcpy(&got, buf_get(balance_stats(&b)), sizeof got);
    return got;
}

/* Balanced F and P: entropy log n, no variance, no violation, no distance. */
static void balanced(void **state) {
    (void)state;
    const shape s = {32, 5, 16, 0, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    int32_t *ids = HOST(int32_t, 64);
    for (int32_t p = 0; p < 64; p++)
        ids[p] = p % 16;
    clmoe_stats got = stats_of_ids(&desc, s.tokens, ids, HOST(float, 32 * 16));
    assert_true(got.max_violation == 0.0f && got.load_variance == 0.0f && got.load_cv2 == 0.0f);
    assert_true(got.importance_variance < 1e-12f && got.importance_cv2 < 1e-12f);
    assert_true(fabs((double)got.load_entropy - log(16.0)) < 1e-6);
    assert_true(fabs((double)got.token_entropy - log(16.0)) < 1e-6);
    assert_true(fabs((double)got.load_divergence) < 1e-6 && got.target_distance == 0.0f);
    assert_true(fabs((double)got.mean_logsumexp - log(16.0)) < 1e-6);
}

/* F = (1/2, 1/2, 0, ...) with C = T/n uses 2 T/n of the capacity; K = 1. */
static void half_and_half(void **state) {
    (void)state;
    const shape s = {64, 5, 16, 0, 1, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.capacity.rows = 4;
    int32_t *ids = HOST(int32_t, 64);
    for (int32_t t = 0; t < 64; t++)
        ids[t] = t % 2;
    clmoe_stats got = stats_of_ids(&desc, s.tokens, ids, NULL);
    assert_int_equal(got.used_capacity, 2 * 64 / 16);
    assert_int_equal(got.dropped, 64 - 8);
    assert_true(fabs((double)got.load_entropy - log(2.0)) < 1e-6);
    assert_true(got.max_violation == 7.0f && got.load_cv2 == 7.0f);
}

/* P -> F as the temperature goes to 0, with K = 1. */
static void cold(void **state) {
    (void)state;
    const shape s = {200, 5, 12, 0, 1, 3};
    double away[3];
    const float temperatures[] = {1.0f, 0.1f, 1e-4f};
    for (size_t i = 0; i < 3; i++) {
        clmoe_layer_desc desc = desc_of(&s);
        desc.router.temperature = temperatures[i];
        test_case("temperature %g", (double)temperatures[i]);
        seed_set(6);
        balance_batch b;
        balance_options options = {.kind = PATTERN_ZIPF};
        balance_make(&b, &desc, s.tokens, &options);
        balance_upload(&b, 0);
        const uint32_t *words = buf_get(balance_stats(&b));
        const uint32_t *load = words + sizeof(clmoe_stats) / 4;
        const float *importance = (const float *)(load + 4 * 12);
        away[i] = 0.0;
        for (size_t e = 0; e < 12; e++)
            away[i] += fabs((double)importance[e] - load[e]) / 200.0;
    }
    assert_true(away[0] > away[1] && away[1] > away[2] && away[2] < 1e-3);
}

/* The average of F that a state keeps: of independent F its variance is (1-b)/(1+b) of theirs. */
static void average_of_load(void **state) {
    (void)state;
    enum { E = 64, STEPS = 500, BURN_IN = 50 };
    const shape s = {1, 5, E, 0, 1, 3};
    clmoe_layer_desc desc = desc_of(&s);
    clmoe_layer *layer = test_layer(0, &desc);
    size_t bytes = 0;
    clmoe_balance_args args;
    clmoe_balance_args_init(&args);
    OK(clmoe_state_size(layer, &bytes));
    args.state = buf_new(bytes);
    clmoe_stats *stats = host_alloc(1, stats_size(layer));
    stats->version = 1;
    stats->columns = E;
    args.stats = buf_of(stats, stats_size(layer));
    args.load = buf_new(E * 4);
    args.ema_decay = 0.8f;
    OK(clmoe_state_init(layer, test.queue, args.state, 1, 0, NULL, NULL));
    clmoe_state *copy = host_alloc(1, bytes);
    const float *ema = (const float *)(copy + 1) + E, *previous = ema + E;
    double sums[2][E] = {0}, squares[2][E] = {0}, variance[2] = {0.0, 0.0};
    seed_set(8);
    for (uint32_t step = 0; step < STEPS; step++) {
        uint32_t load[E];
        for (size_t e = 0; e < E; e++)
            load[e] = 400 + random_below(200);
        buf_write(args.load, load, sizeof load);
        OK(clmoe_balance_update(layer, test.queue, &args, 0, NULL, NULL));
        buf_read(args.state, copy, bytes);
        for (size_t e = 0; e < E && step >= BURN_IN; e++)
            for (int i = 0; i < 2; i++) {
                double v = (double)(i ? ema[e] : previous[e]);
                sums[i][e] += v / (STEPS - BURN_IN);
                squares[i][e] += v * v / (STEPS - BURN_IN);
            }
    }
    for (int i = 0; i < 2; i++)
        for (size_t e = 0; e < E; e++)
            variance[i] += squares[i][e] - sums[i][e] * sums[i][e];
    double ratio = variance[1] / variance[0];
    CHECK(fabs(ratio * 9.0 - 1.0) < 0.1, "the variance is %g of the input's, not 1/9\n", ratio);
    print_message("variance of the average: %.4f of the input's, 1/9 = 0.1111\n", ratio);
}

/* ---- The rest -------------------------------------------------------------------------------- */

static void size_in_bytes(void **state) {
    (void)state;
    const shape s = {1, 5, 8, 3, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.balance.device_groups = 4;
    assert_int_equal(stats_size(test_layer(0, &desc)), sizeof(clmoe_stats) + (8 * 11 + 4) * 4);
    size_t bytes;
    assert_int_equal(clmoe_stats_size(NULL, &bytes), CLMOE_INVALID_ARGUMENT);
    assert_int_equal(clmoe_stats_size(test_layer(0, &desc), NULL), CLMOE_INVALID_ARGUMENT);
    assert_int_equal(sizeof(clmoe_stats), 192);
}

/* As text: every field by its name, a row per expert, and refusal of bytes that do not fit. */
static void format(void **state) {
    (void)state;
    const shape s = {20, 5, 6, 0, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.balance.device_groups = 3;
    balance_options options = {.kind = PATTERN_ZIPF, .state = true};
    balance_batch b;
    balance_make(&b, &desc, s.tokens, &options);
    balance_upload(&b, 0);
    size_t bytes = stats_size(b.layer);
    clmoe_stats *stats = buf_get(balance_stats(&b));
    assert_int_equal(stats->invalid_ids, 0);
    stats->invalid_ids = 5; /* of 0 the name is left out */
    char text[8192], part[100];
    size_t length = 0, all = 0;
    OK(clmoe_stats_format(stats, bytes, text, sizeof text, &length));
    assert_int_equal(length, strlen(text));
    OK(clmoe_stats_format(stats, bytes, NULL, 0, &all));
    assert_int_equal(all, length);
    memset(part, '?', sizeof part);
    OK(clmoe_stats_format(stats, bytes, part, 61, &all));
    assert_int_equal(all, length);
    assert_memory_equal(part, text, 60);
    assert_true(part[60] == '\0' && part[61] == '?');
#define FIELD(name) CHECK(strstr(text, #name), "%s is not printed\n", #name);
    REF_STATS_INTS(FIELD)
    REF_STATS_FLOATS(FIELD)
#undef FIELD
    const clmoe_status bad = CLMOE_INVALID_ARGUMENT;
    assert_int_equal(clmoe_stats_format(stats, bytes - 4, text, sizeof text, NULL), bad);
    assert_int_equal(clmoe_stats_format(stats, 8, text, sizeof text, NULL), bad);
    assert_int_equal(clmoe_stats_format(stats, bytes, NULL, 5, NULL), bad);
    assert_int_equal(clmoe_stats_format(NULL, bytes, text, sizeof text, NULL), bad);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_size),    TEST(every_score),   TEST(state_scales),  TEST(masked_whole),
        TEST(balanced),      TEST(half_and_half), TEST(cold),          TEST(average_of_load),
        TEST(size_in_bytes), TEST(format),        TEST(idle_for_ever), TEST(invalid_ids),
    };
    return RUN(tests);
}
