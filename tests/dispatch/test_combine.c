/* combine: ye, weights, plan -> y; rows of ye without a pair are NaN here and must not be read. */
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Which optional inputs take part: bits, and their names in that order. */
enum { RESIDUAL = 1, MASK = 2, SHARED = 4, GATE = 8, OUTPUT_BIAS = 16, OFFSETS = 32, ALL = 63 };

static const char *names_of(uint32_t inputs) {
    static const char *const names[] = {"residual", "mask",        "shared",
                                        "gate",     "output bias", "offsets"};
    static char text[64];
    int end = snprintf(text, sizeof text, "with");
    for (size_t i = 0; i < COUNT_OF(names); i++)
        if (inputs & 1u << i)
            end += snprintf(text + end, sizeof text - (size_t)end, " %s", names[i]);
    return text;
}

typedef struct combine_case {
    clmoe_layer_desc desc;
    uint32_t tokens, inputs;
    ref_plan_in in;
    const ref_plan *plan;
    float *x, *ye, *residual, *shared, *gate;
    ref_weights w;
} combine_case;

/* Random inputs of a case, ye but for the rows in use. */
static void fill_case(combine_case *c, pattern kind) {
    size_t T = c->tokens, D = c->desc.dim;
    c->w = weights_make(&c->desc);
    route_random(&c->desc, c->tokens, kind, &c->in);
    c->in.token_mask = c->inputs & MASK ? random_mask(c->tokens) : NULL;
    if (c->inputs & OFFSETS) {
        int32_t *offsets = HOST(int32_t, T + 1);
        for (size_t t = 0; t < T; t++)
            offsets[t + 1] = offsets[t] + (int32_t)random_below(c->desc.top_k + 1);
        c->in.token_offsets = offsets;
        c->in.live = NULL;
    }
    c->x = random_floats(T * D, 1.0);
    c->residual = c->inputs & RESIDUAL ? random_floats(T * D, 1.0) : NULL;
    c->shared = c->inputs & SHARED ? random_floats(T * D, 1.0) : NULL;
    c->gate = c->inputs & GATE ? random_floats(T, 2.0) : NULL;
}

static double term(const combine_case *c, size_t pair, size_t token, size_t d) {
    size_t D = c->desc.dim;
    int32_t slot = c->plan->slot_of[pair];
    double weight = (double)c->in.pair_weights[pair];
    if (slot == -2)
        return weight * (double)c->x[token * D + d];
    if (slot < 0)
        return 0.0;
    bool inside = c->desc.router.weight_at != CLMOE_WEIGHT_AT_OUTPUT;
    return (inside ? 1.0 : weight) * (double)c->ye[(size_t)slot * D + d];
}

static double expected(const combine_case *c, size_t t, size_t d) {
    size_t i = t * c->desc.dim + d, K = c->desc.top_k;
    double y = c->residual ? (double)c->residual[i] : 0.0;
    if (c->in.token_mask && c->in.token_mask[t] == 0)
        return y;
    y += c->desc.output_bias ? (double)c->w.output_bias[d] : 0.0;
    double gate = c->gate ? 1.0 / (1.0 + exp(-(double)c->gate[t])) : 1.0;
    y += c->shared ? gate * (double)c->shared[i] : 0.0;
    size_t first = c->in.token_offsets ? (size_t)c->in.token_offsets[t] : t * K;
    size_t end = c->in.token_offsets ? (size_t)c->in.token_offsets[t + 1] : first + K;
    for (size_t p = first; p < end; p++)
        y += term(c, p, t, d);
    return y;
}

static void run_and_compare(uint32_t group_size, combine_case *c) {
    size_t T = c->tokens, D = c->desc.dim;
    clmoe_layer *layer = test_layer(group_size, &c->desc);
    clmoe_weights weights = weights_upload(&c->desc, &c->w);
    clmoe_plan_layout layout;
    clmoe_buf plan = plan_run(layer, &c->desc, &c->in, &layout);
    c->plan = plan_reference(&c->desc, &c->in);
    c->ye = random_floats(layout.slots * D, 1.0);
    for (size_t i = 0; i < layout.slots * D; i++)
        c->ye[i] = c->plan->pair_of[i / D] < 0 ? NAN : c->ye[i];
    clmoe_combine_args args = {
        .struct_size = sizeof args,
        .tokens = c->tokens,
        .weights = &weights,
        .x = buf_of(c->x, T * D * 4),
        .ye = buf_of(c->ye, layout.slots * D * 4),
        .pair_weights = buf_of(c->in.pair_weights, T * c->desc.top_k * 4),
        .plan = plan,
        .token_mask = buf_of(c->in.token_mask, T),
        .token_offsets = buf_of(c->in.token_offsets, (T + 1) * 4),
        .shared = buf_of(c->shared, T * D * 4),
        .shared_gate = buf_of(c->gate, T * 4),
        .residual = buf_of(c->residual, T * D * 4),
        .y = buf_new(T * D * 4),
    };
    OK(clmoe_combine(layer, test.queue, &args, 0, NULL, NULL));
    double *want = HOST(double, T *D);
    for (size_t i = 0; i < T * D; i++)
        want[i] = expected(c, i / D, i % D);
    compare_floats("y", buf_get(args.y), want, T * D, STEP_TOLERANCE);
}

static void check_combine(uint32_t group_size, const shape *s, uint32_t inputs, clmoe_weight_at at,
                          pattern kind) {
    combine_case c = {.desc = desc_of(s), .tokens = s->tokens, .inputs = inputs};
    c.desc.router.weight_at = at;
    c.desc.capacity.factor = s->tokens < 64 ? 0.7 : 0.0; /* small batches drop pairs */
    c.desc.output_bias = inputs & OUTPUT_BIAS ? 1 : 0;
    c.desc.shared.hidden_dim = inputs & SHARED ? 3 : 0;
    c.desc.shared_gate = inputs & GATE ? 1 : 0;
    fill_case(&c, kind);
    run_and_compare(group_size, &c);
}

static void every_input(void **state) {
    (void)state;
    const shape s = {41, 27, 12, 2, 3, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (uint32_t inputs = 0; inputs <= ALL; inputs++) {
            if ((inputs & GATE) && !(inputs & SHARED))
                continue;
            for (int at = CLMOE_WEIGHT_AT_OUTPUT; at <= CLMOE_WEIGHT_AT_ACTIVATION; at++) {
                test_case("group size %u, %s, weight at %d", group_sizes[g], names_of(inputs), at);
                seed_set(inputs + 1);
                check_combine(group_sizes[g], &s, inputs, (clmoe_weight_at)at, PATTERN_UNIFORM);
            }
        }
}

static void every_dim(void **state) {
    (void)state;
    static const uint32_t dims[] = {1,  2,   3,   5,    7,    15,   16,  17,
                                    64, 255, 257, 1023, 1024, 1025, 2050};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(dims); i++) {
            const shape s = {9, dims[i], 5, 1, 2, 3};
            test_case("group size %u, D %u", group_sizes[g], s.dim);
            seed_set(i + 1);
            check_combine(group_sizes[g], &s, RESIDUAL | OUTPUT_BIAS | SHARED | GATE,
                          CLMOE_WEIGHT_AT_OUTPUT, PATTERN_UNIFORM);
        }
}

static void every_size(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(routing_shapes); i++)
        for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
            const shape *s = &routing_shapes[i];
            if (s->experts > 1000 && kind > 1)
                continue;
            test_case("T %u, E %u, K %u, %s", s->tokens, s->experts, s->top_k, pattern_name(kind));
            seed_set(i + 1);
            check_combine(0, s, 0, CLMOE_WEIGHT_AT_OUTPUT, kind);
        }
}

/* Small integers: the sum must be exact. */
static void exact_integers(void **state) {
    (void)state;
    const shape s = {64, 33, 8, 1, 3, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        combine_case c = {.desc = desc_of(&s), .tokens = s.tokens, .inputs = RESIDUAL};
        test_case("group size %u", group_sizes[g]);
        seed_set(1);
        fill_case(&c, PATTERN_UNIFORM);
        size_t n = (size_t)s.tokens * s.dim, pairs = (size_t)s.tokens * s.top_k;
        float *weights = HOST(float, pairs);
        for (size_t p = 0; p < pairs; p++)
            weights[p] = (float)((int)random_below(9) - 4);
        for (size_t i = 0; i < n; i++) {
            c.x[i] = (float)((int)random_below(9) - 4);
            c.residual[i] = (float)random_below(100);
        }
        c.in.pair_weights = weights;
        clmoe_layer *layer = test_layer(group_sizes[g], &c.desc);
        clmoe_plan_layout layout;
        clmoe_buf plan = plan_run(layer, &c.desc, &c.in, &layout);
        c.plan = plan_reference(&c.desc, &c.in);
        c.ye = HOST(float, layout.slots *s.dim);
        for (size_t i = 0; i < layout.slots * s.dim; i++)
            c.ye[i] = (float)((int)random_below(99) - 49);
        clmoe_weights none = {0};
        clmoe_combine_args args = {.struct_size = sizeof args, .tokens = s.tokens, .plan = plan};
        args.weights = &none;
        args.x = buf_of(c.x, n * 4);
        args.ye = buf_of(c.ye, layout.slots * s.dim * 4);
        args.pair_weights = buf_of(weights, pairs * 4);
        args.residual = buf_of(c.residual, n * 4);
        args.y = buf_new(n * 4);
        OK(clmoe_combine(layer, test.queue, &args, 0, NULL, NULL));
        const float *y = buf_get(args.y);
        for (size_t i = 0; i < n; i++)
            CHECK((double)y[i] == expected(&c, i / s.dim, i % s.dim), "y[%zu] is %g\n", i,
                  (double)y[i]);
    }
}

/* y may be residual. */
static void y_is_residual(void **state) {
    (void)state;
    const shape s = {50, 19, 8, 0, 2, 3};
    combine_case c = {.desc = desc_of(&s), .tokens = s.tokens, .inputs = RESIDUAL | MASK};
    test_case("y is residual");
    seed_set(1);
    fill_case(&c, PATTERN_UNIFORM);
    size_t n = (size_t)s.tokens * s.dim;
    clmoe_layer *layer = test_layer(0, &c.desc);
    clmoe_plan_layout layout;
    clmoe_buf plan = plan_run(layer, &c.desc, &c.in, &layout);
    c.plan = plan_reference(&c.desc, &c.in);
    c.ye = random_floats(layout.slots * s.dim, 1.0);
    clmoe_weights none = {0};
    clmoe_combine_args args = {.struct_size = sizeof args, .tokens = s.tokens, .plan = plan};
    args.weights = &none;
    args.ye = buf_of(c.ye, layout.slots * s.dim * 4);
    args.pair_weights = buf_of(c.in.pair_weights, (size_t)s.tokens * s.top_k * 4);
    args.token_mask = buf_of(c.in.token_mask, s.tokens);
    args.residual = args.y = buf_of(c.residual, n * 4);
    OK(clmoe_combine(layer, test.queue, &args, 0, NULL, NULL));
    double *want = HOST(double, n);
    for (size_t i = 0; i < n; i++)
        want[i] = expected(&c, i / s.dim, i % s.dim);
    compare_floats("y", buf_get(args.y), want, n, STEP_TOLERANCE);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_input),    TEST(every_dim),     TEST(every_size),
        TEST(exact_integers), TEST(y_is_residual),
    };
    return RUN(tests);
}
