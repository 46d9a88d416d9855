/* A capacity per sequence: each sequence of a batch has its own places at every expert. */
#include "ref_places.h"
#include "support.h"

#include <string.h>

static const int32_t *plan_ints(const char *plan, size_t offset) {
    return (const int32_t *)(const void *)(plan + offset);
}

static void check_plan(clmoe_layer *layer, const clmoe_layer_desc *desc, ref_plan_in *in) {
    clmoe_plan_layout layout;
    const char *plan = buf_get(plan_run(layer, desc, in, &layout));
    const ref_plan *want = plan_reference(desc, in);
    size_t E = desc->num_experts, R = ref_columns(desc);
    CHECK(layout.capacity == want->capacity, "C %u, not %u\n", layout.capacity, want->capacity);
    CHECK(want->offsets[E] <= layout.slots, "%u slots, %u in use\n", layout.slots,
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

static clmoe_layer_desc desc_in_sequences(const shape *s, uint32_t length, int keep) {
    static const clmoe_capacity_desc capacities[] = {
        {.factor = 0.7},
        {.factor = 1.0, .rounding = CLMOE_ROUND_DOWN, .min_rows = 1},
        {.rows = 2},
        {.factor = 0.4, .multiple = 4},
        {.factor = 1e-9, .rounding = CLMOE_ROUND_DOWN},
    };
    clmoe_layer_desc desc = desc_of(s);
    desc.capacity = capacities[(length + (uint32_t)keep) % COUNT_OF(capacities)];
    desc.capacity.keep = (clmoe_keep)keep;
    desc.capacity.tokens_per_sequence = length;
    return desc;
}

static void every_keep_rule(void **state) {
    (void)state;
    static const shape shapes[] = {
        {64, 5, 8, 0, 2, 3}, {700, 5, 60, 4, 4, 3}, {7, 5, 3, 0, 3, 3}, {0, 5, 8, 0, 2, 3}};
    static const struct {
        uint32_t length;
        bool mask;
    } sequences[] = {{1, false}, {3, true}, {16, false}, {100, true}, {350, false}, {5000, true}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(shapes); i++)
            for (size_t n = 0; n < COUNT_OF(sequences); n++)
                for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_WEIGHT; keep++) {
                    const shape *s = &shapes[i];
                    pattern kind = (pattern)((n + i + (size_t)keep) % PATTERN_COUNT);
                    clmoe_layer_desc desc = desc_in_sequences(s, sequences[n].length, keep);
                    test_case("group size %u, T %u, E %u, L %u, keep %d, %s", group_sizes[g],
                              s->tokens, s->experts, sequences[n].length, keep, pattern_name(kind));
                    seed_set(i + 1);
                    ref_plan_in in;
                    route_random(&desc, s->tokens, kind, &in);
                    in.token_mask = sequences[n].mask ? random_mask(s->tokens) : NULL;
                    check_plan(test_layer(group_sizes[g], &desc), &desc, &in);
                }
}

/* More sequences than a radix digit holds, and than the blocks of a walk. */
static void many_sequences(void **state) {
    (void)state;
    const shape s = {1500, 5, 8, 0, 2, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_WEIGHT; keep++) {
            clmoe_layer_desc desc = desc_in_sequences(&s, 4, keep);
            desc.capacity = (clmoe_capacity_desc){
                .rows = 1, .keep = (clmoe_keep)keep, .tokens_per_sequence = 4};
            test_case("group size %u, keep %d", group_sizes[g], keep);
            seed_set(3);
            ref_plan_in in;
            route_random(&desc, s.tokens, PATTERN_ZIPF, &in);
            check_plan(test_layer(group_sizes[g], &desc), &desc, &in);
        }
}

/* Tokens with any number of pairs, and ids out of range. */
static void foreign_choices(void **state) {
    (void)state;
    const shape s = {200, 5, 12, 2, 5, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_WEIGHT; keep++) {
            clmoe_layer_desc desc = desc_of(&s);
            desc.capacity = (clmoe_capacity_desc){
                .rows = 6, .keep = (clmoe_keep)keep, .tokens_per_sequence = 50};
            test_case("group size %u, keep %d", group_sizes[g], keep);
            seed_set((uint64_t)keep + 1);
            ref_plan_in in;
            route_random(&desc, s.tokens, PATTERN_UNIFORM, &in);
            size_t pairs = (size_t)s.tokens * s.top_k;
            int32_t *offsets = HOST(int32_t, s.tokens + 1), *ids = HOST(int32_t, pairs);
            for (uint32_t t = 0; t < s.tokens; t++)
                offsets[t + 1] = offsets[t] + (int32_t)random_below(s.top_k + 1);
            for (size_t p = 0; p < pairs; p++)
                ids[p] = random_below(4) ? (int32_t)random_below(14) : -1 - (int32_t)(p % 2);
            in.token_offsets = offsets;
            in.ids = ids;
            in.live = NULL;
            check_plan(test_layer(group_sizes[g], &desc), &desc, &in);
        }
}

/* Places within the sequence, -1 if dropped, of the pairs of `in`. */
static int32_t *places(clmoe_layer *layer, const clmoe_layer_desc *desc, ref_plan_in *in) {
    clmoe_plan_layout layout;
    const char *plan = buf_get(plan_run(layer, desc, in, &layout));
    const int32_t *slot_of = plan_ints(plan, layout.slot_of);
    const int32_t *offsets = plan_ints(plan, layout.offsets);
    size_t E = desc->num_experts, K = desc->top_k, L = desc->capacity.tokens_per_sequence;
    int32_t *place = HOST(int32_t, layout.pairs), *first = HOST(int32_t, E);
    for (size_t t = 0; t < in->tokens; t++) {
        for (size_t e = 0; e < E && L > 0 && t % L == 0; e++)
            for (size_t p = t > L ? (t - L) * K : 0; p < t * K; p++)
                first[e] += slot_of[p] >= 0 && in->ids[p] == (int32_t)e;
        for (size_t p = t * K; p < t * K + K; p++)
            place[p] =
                slot_of[p] < 0 ? slot_of[p] : slot_of[p] - offsets[in->ids[p]] - first[in->ids[p]];
    }
    return place;
}

/* A sequence's places are those of a batch of it alone, whatever the others do. */
static void sequences_stay_apart(void **state) {
    (void)state;
    const shape s = {240, 5, 12, 0, 3, 3};
    const uint32_t L = 60;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int keep = CLMOE_KEEP_POSITION; keep <= CLMOE_KEEP_WEIGHT; keep++) {
            clmoe_layer_desc desc = desc_of(&s), alone = desc;
            alone.capacity = (clmoe_capacity_desc){.factor = 0.8, .keep = (clmoe_keep)keep};
            desc.capacity = alone.capacity;
            desc.capacity.tokens_per_sequence = L;
            test_case("group size %u, keep %d", group_sizes[g], keep);
            seed_set(5);
            ref_plan_in in, other;
            route_random(&desc, s.tokens, PATTERN_ZIPF, &in);
            route_random(&desc, s.tokens, PATTERN_ALL_TO_ONE, &other);
            clmoe_layer *layer = test_layer(group_sizes[g], &desc);
            clmoe_layer *single = test_layer(group_sizes[g], &alone);
            size_t pairs = (size_t)L * s.top_k;
            const int32_t *all = places(layer, &desc, &in);
            for (uint32_t n = 0; n < s.tokens / L; n++) {
                ref_plan_in part = {.tokens = L,
                                    .ids = in.ids + n * pairs,
                                    .pair_weights = in.pair_weights + n * pairs,
                                    .live = in.live + n * L};
                compare_ints("alone", all + n * pairs, places(single, &alone, &part), pairs);
            }
            int32_t *ids = HOST(int32_t, s.tokens * s.top_k);
            memcpy(ids, in.ids, s.tokens * s.top_k * 4);
            memcpy(ids + pairs, other.ids + pairs, pairs * 4);
            in.ids = ids;
            const int32_t *changed = places(layer, &desc, &in);
            compare_ints("before", changed, all, pairs);
            compare_ints("behind", changed + 2 * pairs, all + 2 * pairs, 2 * pairs);
        }
}

/* A layer whose sequences have places of their own. */
typedef struct layer_case {
    const char *name;
    uint32_t tokens_per_sequence; /* of 50 tokens */
    clmoe_keep keep;
    uint32_t after_drop;
    bool mask;
} layer_case;

static const layer_case layer_cases[] = {
    {"by position", 12, CLMOE_KEEP_POSITION, 0, false},
    {"by position, renorm after drop, a mask", 13, CLMOE_KEEP_POSITION, 1, true},
    {"choice-major, a mask", 14, CLMOE_KEEP_CHOICE_MAJOR, 0, true},
    {"choice-major, renorm after drop, a mask", 15, CLMOE_KEEP_CHOICE_MAJOR, 1, true},
    {"whole sequences, renorm after drop", 25, CLMOE_KEEP_CHOICE_MAJOR, 1, false},
};

static void check_layer(const char *engine, uint32_t group_size, const layer_case *c) {
    const shape s = {50, 11, 12, 2, 3, 7};
    clmoe_layer_desc desc = desc_of(&s);
    desc.engine = engine;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.router.renorm.after_drop = c->after_drop;
    desc.capacity.factor = 0.8;
    desc.capacity.keep = c->keep;
    desc.capacity.tokens_per_sequence = c->tokens_per_sequence;
    test_case("engine %s, group size %u, %s", engine, group_size, c->name);
    seed_set((uint64_t)(c - layer_cases) + 1);
    batch b;
    device_batch d;
    batch_make(&b, &desc, s.tokens);
    b.in.logits_in = random_eighths((size_t)s.tokens * ref_columns(&desc), 2.0);
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
    const shape s = {2000, 5, 64, 0, 6, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = desc_in_sequences(&s, 300, CLMOE_KEEP_PRIORITY);
        test_case("group size %u", group_sizes[g]);
        seed_set(11);
        ref_plan_in in;
        route_random(&desc, s.tokens, PATTERN_ZIPF, &in);
        clmoe_layer *layer = test_layer(group_sizes[g], &desc);
        clmoe_plan_layout layout;
        const char *first = buf_get(plan_run(layer, &desc, &in, &layout));
        for (int i = 0; i < 20; i++) {
            const char *again = buf_get(plan_run(layer, &desc, &in, &layout));
            compare_bits("slot_of", again + layout.slot_of, first + layout.slot_of,
                         (size_t)layout.pairs * 4);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_keep_rule),      TEST(many_sequences), TEST(foreign_choices),
        TEST(sequences_stay_apart), TEST(whole_layer),    TEST(same_bits_every_time),
    };
    return RUN(tests);
}
