/* The whole layer: every switch of the descriptor and every optional input, on every engine. */
#include "support.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

/* Below this relative distance f32 may choose otherwise than the oracle; see ref_choice_gap(). */
#define MIN_GAP 1e-5

/* The optional inputs, and whether y alone is asked for. */
enum { MASK = 1, RESIDUAL = 2, LOGITS_IN = 4, IDS_IN = 8, ONLY_Y = 16 };

typedef struct input_set {
    const char *name;
    uint32_t inputs;
} input_set;

static const input_set routes[] = {
    {"from x", 0},
    {"from logits_in", LOGITS_IN},
    {"from ids_in", IDS_IN},
    {"from x to y alone", ONLY_Y},
    {"from logits_in to y alone", LOGITS_IN | ONLY_Y},
    {"from ids_in to y alone", IDS_IN | ONLY_Y},
};

static const input_set additions[] = {
    {"nothing else", 0},
    {"a mask", MASK},
    {"a residual", RESIDUAL},
    {"a mask and a residual", MASK | RESIDUAL},
};

/* ---- Batches ------------------------------------------------------------------------------- */

/* Ids of another router: repeated ones, and some out of range. */
static const int32_t *foreign_ids(size_t pairs, uint32_t columns) {
    int32_t *ids = HOST(int32_t, pairs);
    for (size_t p = 0; p < pairs; p++)
        ids[p] = (int32_t)random_below(columns + 2) - 1;
    return ids;
}

static void add_inputs(batch *b, uint32_t inputs) {
    size_t T = b->in.tokens, R = ref_columns(&b->desc), pairs = T * b->desc.top_k;
    if (inputs & MASK)
        b->in.token_mask = random_mask(b->in.tokens);
    if (inputs & RESIDUAL)
        b->in.residual = random_floats(T * b->desc.dim, 1.0);
    if (inputs & LOGITS_IN)
        b->in.logits_in = random_eighths(T * R, 2.0);
    if (inputs & IDS_IN) {
        b->in.ids_in = foreign_ids(pairs, (uint32_t)R);
        b->in.pair_weights_in = random_floats(pairs, 1.0);
    }
    b->no_outputs = (inputs & ONLY_Y) != 0;
}

/* A batch whose choices and order do not hang on the last bits, and its oracle. */
static const ref_result *clear_batch(batch *b, const clmoe_layer_desc *desc, uint32_t tokens,
                                     uint32_t inputs) {
    for (uint64_t seed = 1; seed < 200; seed++) {
        seed_set(seed);
        batch_make(b, desc, tokens);
        add_inputs(b, inputs);
        const ref_result *want = batch_reference(b);
        if (want->choice_gap > MIN_GAP && want->order_gap > MIN_GAP)
            return want;
    }
    CHECK(false, "no seed without near ties\n");
    return NULL;
}

static void check_forward(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                          uint32_t inputs) {
    batch b;
    device_batch d;
    const ref_result *want = clear_batch(&b, desc, tokens, inputs);
    batch_run(test_layer(group_size, desc), &b, &d);
    batch_compare(&b, &d, want);
}

/* Whether every combination is wanted, not a selection. */
static bool sweep;

/* ---- Tests --------------------------------------------------------------------------------- */

static const shape small = {33, 21, 12, 0, 3, 19};

static void every_switch_and_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < num_layer_variants; i++) {
            clmoe_layer_desc desc = desc_of(&small);
            layer_variants[i].set(&desc);
            desc.engine = engines[n];
            test_case("engine %s, %s", engines[n], layer_variants[i].name);
            check_forward(0, &desc, small.tokens, RESIDUAL);
        }
}

static void check_inputs(const char *engine, const layer_variant *variant, size_t turn) {
    for (size_t r = 0; r < COUNT_OF(routes); r++)
        for (size_t a = 0; a < COUNT_OF(additions); a++)
            for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
                if (!sweep && g != (turn + r + a) % COUNT_OF(group_sizes))
                    continue;
                clmoe_layer_desc desc = desc_of(&small);
                variant->set(&desc);
                desc.engine = engine;
                test_case("engine %s, group size %u, %s, %s, %s", engine, group_sizes[g],
                          variant->name, routes[r].name, additions[a].name);
                check_forward(group_sizes[g], &desc, small.tokens,
                              routes[r].inputs | additions[a].inputs);
            }
}

/* One engine is enough, with the group sizes in turn, where not every combination is wanted. */
static void every_switch_and_input(void **state) {
    (void)state;
    static const char *const ref[] = {"ref", NULL};
    const char *const *engines = sweep ? test_engines() : ref;
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < num_layer_variants; i++)
            check_inputs(engines[n], &layer_variants[i], i);
}

static void every_shape_and_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(layer_shapes); i++) {
            clmoe_layer_desc desc = desc_of(&layer_shapes[i]);
            desc.engine = engines[n];
            desc.router.renorm.kind = CLMOE_RENORM_SUM;
            desc.capacity.factor = layer_factors[i];
            test_case("engine %s, T %u, D %u, E %u, K %u, H %u, capacity factor %g", engines[n],
                      layer_shapes[i].tokens, desc.dim, desc.num_experts, desc.top_k,
                      desc.experts.hidden_dim, desc.capacity.factor);
            check_forward(0, &desc, layer_shapes[i].tokens, MASK | RESIDUAL);
        }
}

/* The default engine, by device. */
static void default_engine(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    desc.engine = NULL;
    test_case("default engine");
    check_forward(0, &desc, small.tokens, 0);
    assert_non_null(clmoe_layer_engine(test_layer(0, &desc)));
}

static const struct {
    const char *name;
    clmoe_capacity_desc capacity;
} capacities[] = {
    {"dropless", {.factor = 0.0}},
    {"places by position", {.factor = 1.0, .keep = CLMOE_KEEP_POSITION}},
    {"places by choice", {.factor = 1.0, .keep = CLMOE_KEEP_CHOICE_MAJOR}},
};

/* Loads of every kind, through external logits; non-finite ones among them. */
static void every_pattern(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {200, 11, 16, 0, 4, 7};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (pattern kind = 0; kind < PATTERN_COUNT; kind++)
            for (size_t c = 0; c < COUNT_OF(capacities); c++) {
                clmoe_layer_desc desc = desc_of(&s);
                desc.engine = engines[n];
                desc.router.renorm.kind = CLMOE_RENORM_SUM;
                desc.capacity = capacities[c].capacity;
                test_case("engine %s, %s, %s", engines[n], pattern_name(kind), capacities[c].name);
                batch b;
                device_batch d;
                seed_set(kind + 1);
                batch_make(&b, &desc, s.tokens);
                float *logits = pattern_logits(kind, s.tokens, s.experts);
                for (size_t i = 0; i < (size_t)s.tokens * s.experts; i++)
                    logits[i] = roundf(logits[i] * 64.0f) / 64.0f;
                b.in.logits_in = logits;
                const ref_result *want = batch_reference(&b);
                batch_run(test_layer(0, &desc), &b, &d);
                batch_compare(&b, &d, want);
            }
}

/* A token that is not finite stays alone with it: the others' rows of y are as ever. */
static void nonfinite_token(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        clmoe_layer_desc desc = desc_of(&small);
        desc.engine = engines[n];
        test_case("engine %s", engines[n]);
        batch b;
        device_batch d;
        const ref_result *want = clear_batch(&b, &desc, small.tokens, 0);
        float *x = HOST(float, small.tokens *small.dim);
        memcpy(x, b.in.x, sizeof(float) * small.tokens * small.dim);
        const size_t bad = 4 * (size_t)small.dim;
        for (size_t i = 0; i < small.dim; i++)
            x[bad + i] = i % 2 ? NAN : INFINITY;
        b.in.x = x;
        batch_run(test_layer(0, &desc), &b, &d);
        const float *y = buf_get(d.args.y);
        const clmoe_stats *stats = buf_get(d.args.stats);
        assert_int_equal(stats->nonfinite_tokens, 1);
        assert_int_equal(stats->pairs, (small.tokens - 1) * small.top_k);
        compare_floats("y before", y, want->y, bad, FORWARD_TOLERANCE);
        compare_floats("y behind", y + bad + small.dim, want->y + bad + small.dim,
                       (size_t)small.tokens * small.dim - bad - small.dim, FORWARD_TOLERANCE);
        for (size_t i = 0; i < small.dim; i++)
            CHECK(y[bad + i] == 0.0f, "y of the token is %g\n", (double)y[bad + i]);
    }
}

/* With the argument "all", every combination: minutes. */
int main(int argc, char **argv) {
    sweep = argc > 1 && strcmp(argv[1], "all") == 0;
    const struct CMUnitTest tests[] = {
        TEST(every_switch_and_engine), TEST(every_switch_and_input), TEST(every_shape_and_engine),
        TEST(default_engine),          TEST(every_pattern),          TEST(nonfinite_token),
    };
    return RUN(tests);
}
