/* Overflow reroute: dropped pairs find another expert of their token's liking, in rounds. */
#include "ref_places.h"
#include "support.h"

#include <math.h>
#include <string.h>

/* What a plan with rerouting starts from. */
typedef struct routing {
    ref_plan_in plan;
    ref_reroute_in reroute;
    ref_weights weights;
} routing;

/* Positive scores where weights are scores; patterns keep their ties and bad values. */
static const float *scores_of(const clmoe_layer_desc *desc, uint32_t tokens, pattern kind) {
    float *scores = pattern_scores(kind, tokens, desc->num_experts);
    bool logits = desc->router.order == CLMOE_ORDER_TOPK_THEN_SCORE;
    for (size_t i = 0; i < (size_t)tokens * desc->num_experts && !logits; i++)
        if (isfinite(scores[i]))
            scores[i] = 1.0f / (1.0f + expf(-scores[i]));
    return scores;
}

static void route(const clmoe_layer_desc *desc, uint32_t tokens, pattern kind, routing *r) {
    size_t pairs = (size_t)tokens * desc->top_k;
    int32_t *ids = HOST(int32_t, pairs), *live = HOST(int32_t, tokens);
    double *wide = HOST(double, pairs);
    float *weights = HOST(float, pairs);
    memset(r, 0, sizeof *r);
    r->weights = weights_make(desc);
    const float *scores = scores_of(desc, tokens, kind);
    ref_topk(desc, tokens, scores, &r->weights, ids, wide, live);
    for (size_t p = 0; p < pairs; p++)
        weights[p] = (float)wide[p];
    r->plan = (ref_plan_in){.tokens = tokens, .ids = ids, .pair_weights = weights, .live = live};
    r->reroute = (ref_reroute_in){.scores = scores};
}

/* The device's answer, on the host. */
typedef struct answer {
    clmoe_plan_layout layout;
    const char *plan;
    const int32_t *ids;
    const float *weights;
} answer;

static answer run(clmoe_layer *layer, const clmoe_layer_desc *desc, const routing *r) {
    answer a;
    const ref_plan_in *in = &r->plan;
    size_t T = in->tokens, E = desc->num_experts, pairs = T * desc->top_k;
    clmoe_weights weights = {.expert_scale = buf_of(r->weights.expert_scale, E * 4)};
    OK(clmoe_plan_layout_get(layer, in->tokens, &a.layout));
    clmoe_plan_args args = {
        .struct_size = sizeof args,
        .tokens = in->tokens,
        .ids = buf_of(in->ids, pairs * 4),
        .pair_weights = buf_of(in->pair_weights, pairs * 4),
        .live = buf_of(in->live, T * 4),
        .token_mask = buf_of(in->token_mask, T),
        .token_offsets = buf_of(in->token_offsets, (T + 1) * 4),
        .scores = buf_of(r->reroute.scores, T * E * 4),
        .weights = &weights,
        .scratch = scratch_of(layer, in->tokens),
        .plan = buf_new(a.layout.bytes),
    };
    OK(clmoe_plan(layer, test.queue, &args, 0, NULL, NULL));
    a.plan = buf_get(args.plan);
    a.ids = buf_get(args.ids);
    a.weights = buf_get(args.pair_weights);
    return a;
}

static void compare_plan(const clmoe_layer_desc *desc, const answer *a, const ref_plan *want,
                         const ref_rerouted *counts) {
    size_t E = desc->num_experts;
    compare_ints("load", a->plan + a->layout.load, want->load, E);
    compare_ints("kept", a->plan + a->layout.kept, want->kept, E);
    compare_ints("rerouted_in", a->plan + a->layout.rerouted_in, counts->in, E);
    compare_ints("rerouted_out", a->plan + a->layout.rerouted_out, counts->out, E);
    compare_ints("offsets", a->plan + a->layout.offsets, want->offsets, E + 1);
    compare_ints("slot_of", a->plan + a->layout.slot_of, want->slot_of, want->pairs);
    compare_ints("pair_of", a->plan + a->layout.pair_of, want->pair_of, want->slots);
    compare_ints("token_of", a->plan + a->layout.token_of, want->token_of, want->slots);
    compare_ints("tile_expert", a->plan + a->layout.tile_expert, want->tile_expert,
                 want->slots / want->row_tile);
}

/* Afterwards no dropped pair could still go somewhere, and no token has an expert twice. */
static void check_nobody_waits(const clmoe_layer_desc *desc, const routing *r, const answer *a) {
    const int32_t *slot_of = (const int32_t *)(const void *)(a->plan + a->layout.slot_of);
    const uint32_t *kept = (const uint32_t *)(const void *)(a->plan + a->layout.kept);
    size_t K = desc->top_k;
    for (size_t t = 0; t < r->plan.tokens; t++) {
        bool waits = false;
        size_t live = r->plan.live ? (size_t)r->plan.live[t] : K;
        for (size_t p = t * K; p < t * K + live; p++)
            waits = waits || slot_of[p] == -1;
        if (waits && (!r->plan.token_mask || r->plan.token_mask[t]))
            CHECK(ref_roomy_expert(desc, &r->reroute, t, a->ids, kept, a->layout.capacity) < 0,
                  "token %zu has a dropped pair and somewhere to go\n", t);
        for (size_t k = 0; k < K; k++)
            for (size_t j = 0; j < k; j++)
                CHECK(a->ids[t * K + k] != a->ids[t * K + j], "token %zu has %d twice\n", t,
                      a->ids[t * K + k]);
    }
}

static uint32_t moved, most_rounds;

/* Runs, compares everything with the oracle; `ours`: ids as the library makes them. */
static void check_reroute(uint32_t group_size, const clmoe_layer_desc *desc, routing *r,
                          bool ours) {
    clmoe_layer *layer = test_layer(group_size, desc);
    answer a = run(layer, desc, r);
    size_t pairs = (size_t)r->plan.tokens * desc->top_k, E = desc->num_experts;
    int32_t *ids = HOST(int32_t, pairs);
    double *weights = HOST(double, pairs);
    ref_rerouted counts = {0, HOST(uint32_t, E), HOST(uint32_t, E)};
    r->plan.slots = a.layout.slots;
    r->plan.row_tile = a.layout.row_tile;
    r->reroute.live = r->plan.live;
    r->reroute.token_mask = r->plan.token_mask;
    r->reroute.token_offsets = r->plan.token_offsets;
    r->reroute.weights = &r->weights;
    memcpy(ids, r->plan.ids, pairs * 4);
    for (size_t p = 0; p < pairs; p++)
        weights[p] = (double)r->plan.pair_weights[p];
    ref_plan *want = HOST(ref_plan, 1);
    *want = *plan_reference(desc, &r->plan);
    ref_reroute(desc, r->plan.tokens, &r->reroute, ids, weights, want, &counts);
    compare_ints("ids", a.ids, ids, pairs);
    compare_floats("weights", a.weights, weights, pairs, STEP_TOLERANCE);
    compare_plan(desc, &a, want, &counts);
    CHECK(counts.rounds <= E + desc->top_k, "%u rounds\n", counts.rounds);
    if (ours)
        check_nobody_waits(desc, r, &a);
    for (size_t e = 0; e < E; e++)
        moved += counts.in[e];
    most_rounds = counts.rounds > most_rounds ? counts.rounds : most_rounds;
}

static clmoe_layer_desc desc_rerouting(const shape *s, double factor) {
    clmoe_layer_desc desc = desc_of(s);
    desc.capacity.factor = factor;
    desc.capacity.overflow = CLMOE_OVERFLOW_REROUTE;
    return desc;
}

static const struct {
    const char *name;
    clmoe_keep keep;
    bool mask;
} keep_rules[] = {
    {"by position", CLMOE_KEEP_POSITION, false},
    {"choice-major, a mask", CLMOE_KEEP_CHOICE_MAJOR, true},
    {"by priority", CLMOE_KEEP_PRIORITY, false},
    {"by weight, a mask", CLMOE_KEEP_WEIGHT, true},
};

/* Sizes, rules and patterns take the factors in turn. */
static void every_keep_rule(void **state) {
    (void)state;
    static const shape shapes[] = {{64, 5, 8, 0, 2, 3}, {700, 5, 60, 0, 4, 3},
                                   {7, 5, 3, 0, 3, 3},  {150, 5, 205, 0, 16, 3},
                                   {1, 5, 4, 0, 2, 3},  {0, 5, 4, 0, 2, 3}};
    static const double factors[] = {0.5, 1.0, 1.1};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(shapes); i++)
            for (size_t k = 0; k < COUNT_OF(keep_rules); k++)
                for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
                    const shape *s = &shapes[i];
                    double factor = factors[(kind + i + k) % COUNT_OF(factors)];
                    clmoe_layer_desc desc = desc_rerouting(s, factor);
                    routing r;
                    test_case("group size %u, T %u, E %u, %s, factor %g, %s", group_sizes[g],
                              s->tokens, s->experts, keep_rules[k].name, factor,
                              pattern_name(kind));
                    seed_set(i + 1);
                    route(&desc, s->tokens, kind, &r);
                    desc.capacity.keep = keep_rules[k].keep;
                    r.plan.token_mask = keep_rules[k].mask ? random_mask(s->tokens) : NULL;
                    check_reroute(group_sizes[g], &desc, &r, true);
                }
    CHECK(moved > 1000, "only %u pairs were rerouted\n", moved);
}

/* How the weights of the new choice come about. */
typedef struct weight_case {
    const char *name;
    clmoe_score_function score;
    clmoe_order order;
    clmoe_renorm renorm;
    uint32_t after_drop, expert_scale, select_bias;
    float scale;
} weight_case;

/* clang-format off */

enum { SOFTMAX = CLMOE_SCORE_SOFTMAX, SIGMOID = CLMOE_SCORE_SIGMOID };
enum { MIXER = CLMOE_SCORE_SPARSEMIXER };
enum { FIRST = CLMOE_ORDER_SCORE_THEN_TOPK, LAST = CLMOE_ORDER_TOPK_THEN_SCORE }; /* the score */
enum { NONE = CLMOE_RENORM_NONE, SUM = CLMOE_RENORM_SUM, PNORM = CLMOE_RENORM_PNORM };

static const weight_case weight_cases[] = {
    /* name                                   score    order  renorm, the switches, scale */
    {"softmax",                               SOFTMAX, FIRST, NONE,  0, 0, 0, 1},
    {"softmax, sum, bias",                    SOFTMAX, FIRST, SUM,   0, 0, 1, 1},
    {"softmax, p-norm",                       SOFTMAX, FIRST, PNORM, 0, 0, 0, 1},
    {"softmax, sum after drop",               SOFTMAX, FIRST, SUM,   1, 0, 0, 1},
    {"softmax, p-norm after drop, bias",      SOFTMAX, FIRST, PNORM, 1, 0, 1, 1},
    {"softmax of the chosen, both scales",    SOFTMAX, LAST,  NONE,  0, 1, 0, 2.5f},
    {"softmax of the chosen, sum, bias",      SOFTMAX, LAST,  SUM,   0, 1, 1, 2.5f},
    {"softmax of the chosen, scale, drop",    SOFTMAX, LAST,  NONE,  1, 0, 0, 2.5f},
    {"softmax of the chosen, p-norm, drop",   SOFTMAX, LAST,  PNORM, 1, 1, 0, 2.5f},
    {"sigmoid, sum, both scales",             SIGMOID, FIRST, SUM,   0, 1, 0, 2.5f},
    {"sigmoid of the chosen, p-norm, scale",  SIGMOID, LAST,  PNORM, 0, 1, 0, 2.5f},
    {"sigmoid of the chosen, sum, bias",      SIGMOID, LAST,  SUM,   0, 1, 1, 2.5f},
    {"sparsemixer, scale",                    MIXER,   LAST,  NONE,  0, 0, 0, 2.5f},
    {"sparsemixer, sum, bias",                MIXER,   LAST,  SUM,   0, 0, 1, 2.5f},
    {"sparsemixer, sum after drop",           MIXER,   LAST,  SUM,   1, 1, 0, 1},
};

/* clang-format on */

static void check_weights(uint32_t group_size, pattern kind, const weight_case *c) {
    const shape s = {100, 5, 24, 0, 4, 3};
    clmoe_layer_desc desc = desc_rerouting(&s, 0.9);
    desc.router.score = c->score;
    desc.router.order = c->order;
    desc.router.renorm.kind = c->renorm;
    desc.router.renorm.after_drop = c->after_drop;
    desc.router.scale = c->scale;
    desc.router.expert_scale = c->expert_scale;
    desc.router.select_bias = c->select_bias;
    test_case("group size %u, %s, weights: %s", group_size, pattern_name(kind), c->name);
    seed_set((uint64_t)(c - weight_cases) + 1);
    routing r;
    route(&desc, s.tokens, kind, &r);
    check_reroute(group_size, &desc, &r, true);
}

static void every_weight_rule(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(weight_cases); i++) {
            check_weights(group_sizes[g], PATTERN_ZIPF, &weight_cases[i]);
            check_weights(group_sizes[g], PATTERN_UNIFORM, &weight_cases[i]);
        }
}

/* Any ids: out of range, twice in a token; tokens with any number of pairs. */
static void foreign_choices(void **state) {
    (void)state;
    const shape s = {333, 5, 12, 0, 3, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int with_offsets = 0; with_offsets < 2; with_offsets++) {
            clmoe_layer_desc desc = desc_rerouting(&s, 0.8);
            test_case("group size %u, offsets %d", group_sizes[g], with_offsets);
            seed_set(5);
            routing r;
            route(&desc, s.tokens, PATTERN_ZIPF, &r);
            size_t pairs = (size_t)s.tokens * s.top_k;
            int32_t *ids = HOST(int32_t, pairs), *offsets = HOST(int32_t, s.tokens + 1);
            for (size_t p = 0; p < pairs; p++)
                ids[p] = (int32_t)random_below(random_below(3) ? 4 : 15) - 1;
            for (uint32_t t = 0; t < s.tokens; t++)
                offsets[t + 1] = offsets[t] + (int32_t)random_below(s.top_k + 1);
            r.plan.ids = ids;
            r.plan.live = NULL;
            r.plan.token_offsets = with_offsets ? offsets : NULL;
            desc.router.renorm.kind = CLMOE_RENORM_SUM;
            check_reroute(group_sizes[g], &desc, &r, false);
        }
}

/* Everybody likes the experts in the same order: as many rounds as experts. */
static void many_rounds(void **state) {
    (void)state;
    static const shape shapes[] = {{600, 5, 64, 0, 3, 3}, {1024, 5, 512, 0, 2, 3}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(shapes); i++) {
            const shape *s = &shapes[i];
            clmoe_layer_desc desc = desc_rerouting(s, 1.0);
            test_case("group size %u, E %u", group_sizes[g], s->experts);
            seed_set(9);
            routing r;
            route(&desc, s->tokens, PATTERN_UNIFORM, &r);
            float *scores = HOST(float, s->tokens * s->experts);
            int32_t *ids = HOST(int32_t, s->tokens * s->top_k);
            for (uint32_t t = 0; t < s->tokens; t++) {
                for (uint32_t e = 0; e < s->experts; e++)
                    scores[t * s->experts + e] = 1.0f / (float)(e + 1);
                for (uint32_t k = 0; k < s->top_k; k++)
                    ids[t * s->top_k + k] = (int32_t)k;
            }
            r.reroute.scores = scores;
            r.plan.ids = ids;
            most_rounds = 0;
            check_reroute(group_sizes[g], &desc, &r, true);
            CHECK(most_rounds > s->experts / 2, "only %u rounds\n", most_rounds);
        }
}

/* A layer that reroutes. */
typedef struct layer_case {
    const char *name;
    double factor;
    clmoe_keep keep;
    uint32_t after_drop, training;
    bool mask, external; /* padding; ids from outside, which are dropped, not rerouted */
} layer_case;

static const layer_case layer_cases[] = {
    {"little room", .factor = 0.7},
    {"room for all", .factor = 1.0},
    {"little room, choice-major", .factor = 0.7, .keep = CLMOE_KEEP_CHOICE_MAJOR},
    {"choice-major, a mask", .factor = 1.0, .keep = CLMOE_KEEP_CHOICE_MAJOR, .mask = true},
    {"a mask", .factor = 0.7, .mask = true},
    {"training, a mask", .factor = 0.7, .training = 1, .mask = true},
    {"renorm after drop", .factor = 1.0, .after_drop = 1},
    {"renorm after drop, little room, a mask", .factor = 0.7, .after_drop = 1, .mask = true},
    {"renorm after drop, training", .factor = 0.7, .after_drop = 1, .training = 1},
    {"external ids, choice-major, a mask", .factor = 1.0, .keep = CLMOE_KEEP_CHOICE_MAJOR,
     .mask = true, .external = true},
};

static void check_layer(const char *engine, uint32_t group_size, const layer_case *c) {
    const shape s = {60, 11, 12, 0, 3, 7};
    clmoe_layer_desc desc = desc_rerouting(&s, c->factor);
    desc.engine = engine;
    desc.capacity.keep = c->keep;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.router.renorm.after_drop = c->after_drop;
    desc.training = c->training;
    test_case("engine %s, group size %u, %s", engine, group_size, c->name);
    seed_set((uint64_t)(c - layer_cases) + 1);
    batch b;
    device_batch d;
    batch_make(&b, &desc, s.tokens);
    b.in.logits_in = random_eighths((size_t)s.tokens * s.experts, 2.0);
    b.in.token_mask = c->mask ? random_mask(s.tokens) : NULL;
    if (c->external) {
        routing r;
        route(&desc, s.tokens, PATTERN_ZIPF, &r);
        b.in.logits_in = NULL;
        b.in.ids_in = r.plan.ids;
        b.in.pair_weights_in = r.plan.pair_weights;
    }
    const ref_result *want = batch_reference(&b);
    clmoe_layer *layer = test_layer(group_size, &desc);
    batch_upload(layer, &b, &d);
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
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
        clmoe_layer_desc desc = desc_rerouting(&s, 1.0);
        desc.router.renorm.kind = CLMOE_RENORM_SUM;
        test_case("group size %u", group_sizes[g]);
        seed_set(11);
        routing r;
        route(&desc, s.tokens, PATTERN_ZIPF, &r);
        clmoe_layer *layer = test_layer(group_sizes[g], &desc);
        answer first = run(layer, &desc, &r);
        for (int i = 0; i < 20; i++) {
            answer again = run(layer, &desc, &r);
            size_t pairs = (size_t)s.tokens * s.top_k * 4;
            compare_bits("slot_of", again.plan + again.layout.slot_of,
                         first.plan + first.layout.slot_of, pairs);
            compare_bits("ids", again.ids, first.ids, pairs);
            compare_bits("weights", again.weights, first.weights, pairs);
        }
    }
}

/* Weights are needed, and with scores the experts' scale; nothing is written without them. */
static void missing_buffers(void **state) {
    (void)state;
    const shape s = {9, 5, 6, 0, 2, 3};
    clmoe_layer_desc desc = desc_rerouting(&s, 1.0);
    desc.router.expert_scale = 1;
    test_case("missing buffers");
    clmoe_layer *layer = test_layer(0, &desc);
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(layer, s.tokens, &layout));
    clmoe_weights weights = {.expert_scale = buf_new(6 * 4)};
    const clmoe_plan_args all = {
        .struct_size = sizeof all,
        .tokens = s.tokens,
        .ids = buf_new(18 * 4),
        .pair_weights = buf_new(18 * 4),
        .scores = buf_new(54 * 4),
        .weights = &weights,
        .scratch = scratch_of(layer, s.tokens),
        .plan = buf_new(layout.bytes),
    };
    const clmoe_buf none = {NULL, 0};
    clmoe_weights empty = {.expert_scale = none};
    clmoe_plan_args args[3] = {all, all, all};
    args[0].pair_weights = none;
    args[1].weights = NULL;
    args[2].weights = &empty;
    static const char *const named[] = {"pair_weights", "weights", "expert_scale"};
    for (size_t i = 0; i < COUNT_OF(args); i++) {
        clmoe_status status = clmoe_plan(layer, test.queue, &args[i], 0, NULL, NULL);
        CHECK(status == CLMOE_INVALID_ARGUMENT, "case %zu: status %d\n", i, status);
        CHECK(strstr(clmoe_last_error(), named[i]), "case %zu: %s\n", i, clmoe_last_error());
    }
    CHECK(all_untouched(), "something was written\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_keep_rule), TEST(every_weight_rule),    TEST(foreign_choices), TEST(many_rounds),
        TEST(whole_layer),     TEST(same_bits_every_time), TEST(missing_buffers),
    };
    return RUN(tests);
}
