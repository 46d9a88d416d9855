/* plan: ids -> load, kept, offsets and the slot of every pair; all integers, all exact. */
#include "support.h"

static void check_plan(clmoe_layer *layer, const clmoe_layer_desc *desc, ref_plan_in *in) {
    clmoe_plan_layout layout;
    clmoe_buf buf = plan_run(layer, desc, in, &layout);
    const ref_plan *want = plan_reference(desc, in);
    const char *plan = buf_get(buf);
    size_t E = desc->num_experts, R = ref_columns(desc);
    CHECK(layout.pairs == want->pairs, "pairs %u, not %u\n", layout.pairs, want->pairs);
    CHECK(layout.capacity == want->capacity, "C %u, not %u\n", layout.capacity, want->capacity);
    CHECK(layout.slots % layout.row_tile == 0 && want->offsets[E] <= layout.slots,
          "%u slots in tiles of %u, and %u in use\n", layout.slots, layout.row_tile,
          want->offsets[E]);
    compare_ints("load", plan + layout.load, want->load, R);
    compare_ints("kept", plan + layout.kept, want->kept, R);
    compare_ints("offsets", plan + layout.offsets, want->offsets, E + 1);
    compare_ints("slot_of", plan + layout.slot_of, want->slot_of, want->pairs);
    compare_ints("pair_of", plan + layout.pair_of, want->pair_of, want->slots);
    compare_ints("token_of", plan + layout.token_of, want->token_of, want->slots);
    compare_ints("tile_expert", plan + layout.tile_expert, want->tile_expert,
                 want->slots / want->row_tile);
}

static const struct {
    const char *name;
    clmoe_capacity_desc desc;
} capacities[] = {
    {"dropless", {.rows = 0}},
    {"factor 1", {.factor = 1.0}},
    {"factor 0.5, at least 2", {.factor = 0.5, .rounding = CLMOE_ROUND_DOWN, .min_rows = 2}},
    {"factor 1.3, in eights", {.factor = 1.3, .rounding = CLMOE_ROUND_NEAREST, .multiple = 8}},
    {"3 rows", {.rows = 3}},
};

/* A sweep: sizes and patterns take the capacities in turn. */
static void every_size(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(routing_shapes); i++)
            for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
                const shape *s = &routing_shapes[i];
                const size_t c = (i + (size_t)kind) % COUNT_OF(capacities);
                clmoe_layer_desc desc = desc_of(s);
                desc.capacity = capacities[c].desc;
                test_case("group size %u, T %u, E %u, K %u, %s, %s", group_sizes[g], s->tokens,
                          s->experts, s->top_k, pattern_name(kind), capacities[c].name);
                seed_set(i + 1);
                ref_plan_in in;
                route_random(&desc, s->tokens, kind, &in);
                check_plan(test_layer(group_sizes[g], &desc), &desc, &in);
            }
}

/* Which pairs keep their place, under each rule, with and without mask and surplus pairs. */
static void every_keep_rule(void **state) {
    (void)state;
    static const struct {
        shape s;
        bool mask;
    } batches[] = {{{64, 5, 8, 0, 2, 3}, true},
                   {{1000, 5, 60, 4, 4, 3}, true},
                   {{7, 5, 3, 0, 3, 3}, false},
                   {{333, 5, 205, 0, 16, 3}, false}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(batches); i++)
            for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_WEIGHT; keep++)
                for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
                    const shape *s = &batches[i].s;
                    clmoe_layer_desc desc = desc_of(s);
                    desc.capacity.factor = 0.6;
                    desc.capacity.keep = (clmoe_keep)keep;
                    test_case("group size %u, T %u, E %u, keep %d, %s", group_sizes[g], s->tokens,
                              s->experts, keep, pattern_name(kind));
                    seed_set(i + 1);
                    ref_plan_in in;
                    route_random(&desc, s->tokens, kind, &in);
                    in.token_mask = batches[i].mask ? random_mask(s->tokens) : NULL;
                    check_plan(test_layer(group_sizes[g], &desc), &desc, &in);
                }
}

/* The plan is the same for every engine but for the row tile, which the layout tells. */
static void every_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(capacities); i++) {
            const shape s = {333, 5, 60, 3, 4, 3};
            clmoe_layer_desc desc = desc_of(&s);
            desc.capacity = capacities[i].desc;
            desc.engine = engines[n];
            test_case("engine %s, %s", engines[n], capacities[i].name);
            seed_set(i + 1);
            ref_plan_in in;
            route_random(&desc, s.tokens, PATTERN_ZIPF, &in);
            check_plan(test_layer(0, &desc), &desc, &in);
        }
}

/* Tokens with any number of pairs up to K, none included. */
static void token_offsets(void **state) {
    (void)state;
    const shape s = {500, 5, 12, 2, 5, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_WEIGHT; keep++) {
            clmoe_layer_desc desc = desc_of(&s);
            const uint32_t tokens =
                (g + (size_t)keep) % 2 ? 200 : s.tokens; /* one group, or more */
            desc.capacity.rows = keep == CLMOE_KEEP_POSITION && g == 0 ? 0 : 30;
            desc.capacity.keep = (clmoe_keep)keep;
            test_case("group size %u, keep %d", group_sizes[g], keep);
            seed_set((uint64_t)keep + 1);
            ref_plan_in in;
            route_random(&desc, tokens, PATTERN_UNIFORM, &in);
            int32_t *offsets = HOST(int32_t, tokens + 1);
            for (uint32_t t = 0; t < tokens; t++)
                offsets[t + 1] = offsets[t] + (int32_t)random_below(s.top_k + 1);
            in.token_offsets = offsets;
            in.live = NULL;
            in.token_mask = g == 1 ? random_mask(tokens) : NULL;
            check_plan(test_layer(group_sizes[g], &desc), &desc, &in);
        }
}

/* Any ids: out of range, negative, the same one twice in a token. */
static void foreign_ids(void **state) {
    (void)state;
    const shape s = {333, 5, 12, 2, 3, 3};
    static const int32_t bad[] = {-1, -2, 14, 15, INT32_MAX, INT32_MIN};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_WEIGHT; keep++) {
            clmoe_layer_desc desc = desc_of(&s);
            desc.capacity.rows = 40;
            desc.capacity.keep = (clmoe_keep)keep;
            test_case("group size %u, keep %d", group_sizes[g], keep);
            seed_set(5);
            size_t pairs = (size_t)s.tokens * s.top_k;
            int32_t *ids = HOST(int32_t, pairs);
            for (size_t p = 0; p < pairs; p++)
                ids[p] = random_below(4) == 0 ? bad[random_below(COUNT_OF(bad))]
                                              : (int32_t)random_below(14);
            ref_plan_in in = {.tokens = s.tokens, .ids = ids};
            in.pair_weights = random_floats(pairs, 1.0);
            check_plan(test_layer(group_sizes[g], &desc), &desc, &in);
        }
}

/* Weights that tie, both zeros and negative ones among them, under the rules that sort by them. */
static void tied_weights(void **state) {
    (void)state;
    const shape s = {700, 5, 4, 0, 3, 3};
    static const float few[] = {-2.0f, -0.0f, 0.0f, 0.25f, 0.5f};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int keep = CLMOE_KEEP_PRIORITY; keep <= CLMOE_KEEP_WEIGHT; keep++) {
            clmoe_layer_desc desc = desc_of(&s);
            desc.capacity.factor = 0.5;
            desc.capacity.keep = (clmoe_keep)keep;
            test_case("group size %u, keep %d", group_sizes[g], keep);
            seed_set(7);
            ref_plan_in in;
            route_random(&desc, s.tokens, PATTERN_UNIFORM, &in);
            float *weights = HOST(float, s.tokens *s.top_k);
            for (size_t p = 0; p < (size_t)s.tokens * s.top_k; p++)
                weights[p] = few[random_below(COUNT_OF(few))];
            in.pair_weights = weights;
            check_plan(test_layer(group_sizes[g], &desc), &desc, &in);
        }
}

/* C by its definition, in numbers worked out by hand. */
static void worked_capacities(void **state) {
    (void)state;
    static const struct {
        uint32_t tokens, experts, top_k;
        clmoe_capacity_desc capacity;
        uint32_t rows;
    } cases[] = {
        {100, 8, 2, {.factor = 1.0}, 25},
        {101, 8, 2, {.factor = 1.0}, 26}, /* 25.25 */
        {101, 8, 2, {.factor = 1.0, .rounding = CLMOE_ROUND_DOWN}, 25},
        {101, 8, 2, {.factor = 1.0, .rounding = CLMOE_ROUND_NEAREST}, 25},
        {102, 8, 2, {.factor = 1.0, .rounding = CLMOE_ROUND_NEAREST}, 26}, /* 25.5 */
        {100, 8, 2, {.factor = 1.25, .multiple = 8}, 32},                  /* 31.25 */
        {100, 8, 2, {.factor = 0.1, .min_rows = 4}, 4},
        {100, 8, 2, {.factor = 0.1, .min_rows = 5, .multiple = 4}, 8},
        {100, 8, 2, {.factor = 100.0}, 100},
        {10, 8, 2, {.factor = 1.0, .min_rows = 64}, 10},
        {100, 8, 2, {.rows = 7}, 7},
        {100, 8, 2, {.rows = 7, .multiple = 5}, 10},
        {5, 8, 2, {.rows = 7}, 5},
        {100, 8, 2, {.factor = 0.0}, 0},
        {4, 8, 1, {.factor = 1.0, .rounding = CLMOE_ROUND_DOWN}, 1},    /* 0.5 */
        {3, 8, 1, {.factor = 1.0, .rounding = CLMOE_ROUND_NEAREST}, 1}, /* 0.375 */
        {3, 8, 1, {.factor = 1e-300, .rounding = CLMOE_ROUND_DOWN}, 1},
        {100, 8, 2, {.factor = 0.01, .rounding = CLMOE_ROUND_DOWN, .multiple = 4}, 4},
        {100, 8, 1, {.factor = 1, .rounding = CLMOE_ROUND_DOWN, .tokens_per_sequence = 7}, 1},
        {0, 8, 2, {.factor = 1.0}, 0},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        const shape s = {cases[i].tokens, 5, cases[i].experts, 0, cases[i].top_k, 3};
        clmoe_layer_desc desc = desc_of(&s);
        desc.capacity = cases[i].capacity;
        test_case("capacity case %zu", i);
        clmoe_plan_layout layout;
        OK(clmoe_plan_layout_get(test_layer(0, &desc), s.tokens, &layout));
        CHECK(layout.capacity == cases[i].rows, "C is %u, not %u\n", layout.capacity,
              cases[i].rows);
        CHECK(ref_capacity(&desc, s.tokens) == cases[i].rows, "the oracle's C is wrong\n");
    }
}

/* Who keeps a place, in an example worked out by hand: 4 tokens, 2 experts, C = 2. */
static void worked_keep_rules(void **state) {
    (void)state;
    static const int32_t ids[] = {0, 1, /**/ 1, 0, /**/ 0, 1, /**/ 0, 1};
    static const float weights[] = {0.3f, 0.1f, /**/ 0.6f, 0.2f, /**/ 0.5f, 0.4f, /**/ 0.9f, 0.7f};
    static const int32_t slot_of[][8] = {
        [CLMOE_KEEP_POSITION] = {0, 2, 3, 1, -1, -1, -1, -1},
        [CLMOE_KEEP_CHOICE_MAJOR] = {0, 3, 2, -1, 1, -1, -1, -1},
        [CLMOE_KEEP_PRIORITY] = {-1, -1, 2, -1, 1, -1, 0, 3},
        [CLMOE_KEEP_WEIGHT] = {-1, -1, 3, -1, 1, -1, 0, 2},
    };
    for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_WEIGHT; keep++) {
        const shape s = {4, 5, 2, 0, 2, 3};
        clmoe_layer_desc desc = desc_of(&s);
        desc.capacity.rows = 2;
        desc.capacity.keep = (clmoe_keep)keep;
        test_case("keep %d", keep);
        ref_plan_in in = {.tokens = 4, .ids = ids, .pair_weights = weights};
        clmoe_plan_layout layout;
        clmoe_layer *layer = test_layer(0, &desc);
        const char *plan = buf_get(plan_run(layer, &desc, &in, &layout));
        compare_ints("slot_of", plan + layout.slot_of, slot_of[keep], 8);
        check_plan(layer, &desc, &in);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_size),  TEST(every_keep_rule), TEST(every_engine),      TEST(token_offsets),
        TEST(foreign_ids), TEST(tied_weights),    TEST(worked_capacities), TEST(worked_keep_rules),
    };
    return RUN(tests);
}
