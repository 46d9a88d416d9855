/* experts: xe [S,D], or x [T,D] through the plan -> ye [S,D], on every engine. */
#include "layer.h" /* before support.h: cmocka has a macro fail() */

#include "support.h"

#include <string.h>

/* How the rows reach the experts. */
typedef enum rows_from { FROM_X, FROM_XE } rows_from;

typedef struct experts_case {
    clmoe_layer_desc desc;
    uint32_t tokens;
    pattern kind;
    ref_weights w;
    const float *x;
} experts_case;

static void default_case(experts_case *c, const shape *s, const char *engine) {
    memset(c, 0, sizeof *c);
    c->desc = desc_of(s);
    c->desc.engine = engine;
    c->tokens = s->tokens;
}

/* Random weights and x; the descriptor is complete. */
static void fill_case(experts_case *c) {
    c->w = weights_make(&c->desc);
    c->x = random_floats((size_t)c->tokens * c->desc.dim, 1.0);
}

/* Runs dispatch if asked to, then the experts; gives ye. */
static clmoe_buf run_experts(clmoe_layer *layer, const experts_case *c, rows_from from,
                             ref_plan_in *in) {
    size_t D = c->desc.dim;
    clmoe_weights weights = weights_upload(&c->desc, &c->w);
    clmoe_plan_layout layout;
    clmoe_buf plan = plan_run(layer, &c->desc, in, &layout);
    clmoe_experts_args args = {
        .struct_size = sizeof args,
        .tokens = c->tokens,
        .weights = &weights,
        .x = buf_of(c->x, c->tokens * D * 4),
        .pair_weights = buf_of(in->pair_weights, (size_t)c->tokens * c->desc.top_k * 4),
        .plan = plan,
        .scratch = scratch_of(layer, c->tokens),
        .ye = buf_new(layout.slots * D * 4),
    };
    if (from == FROM_XE) {
        clmoe_dispatch_args dispatch = {.struct_size = sizeof dispatch, .tokens = c->tokens};
        dispatch.x = args.x;
        dispatch.plan = plan;
        dispatch.xe = args.xe = buf_new(layout.slots * D * 4);
        OK(clmoe_dispatch(layer, test.queue, &dispatch, 0, NULL, NULL));
        args.x = (clmoe_buf){NULL, 0};
    }
    OK(clmoe_experts(layer, test.queue, &args, 0, NULL, NULL));
    return args.ye;
}

/* Compares the rows in use. */
static void compare_rows(const experts_case *c, const ref_plan_in *in, const float *ye,
                         bool exact) {
    size_t D = c->desc.dim, n = 0;
    const ref_plan *plan = plan_reference(&c->desc, in);
    float *got = HOST(float, plan->slots *D);
    double *want = HOST(double, plan->slots *D);
    for (size_t s = 0; s < plan->slots; s++) {
        if (plan->pair_of[s] < 0)
            continue;
        uint32_t expert = (uint32_t)in->ids[plan->pair_of[s]];
        const ref_scale scale = {.weight = (double)in->pair_weights[plan->pair_of[s]]};
        memcpy(got + n, ye + s * D, D * sizeof *got);
        ref_expert(&c->desc, &c->w, expert, c->x + (size_t)plan->token_of[s] * D, &scale, want + n);
        n += D;
    }
    for (size_t i = 0; i < n && exact; i++)
        CHECK((double)got[i] == want[i], "ye[%zu] is %g, not %g\n", i, (double)got[i], want[i]);
    compare_floats("ye", got, want, n, STEP_TOLERANCE);
}

static void check_experts(const experts_case *c, rows_from from, bool exact) {
    clmoe_layer *layer = test_layer(0, &c->desc);
    ref_plan_in in;
    route_random(&c->desc, c->tokens, c->kind, &in);
    clmoe_buf ye = run_experts(layer, c, from, &in);
    compare_rows(c, &in, buf_get(ye), exact);
}

/* Both ways in turn; engines that cannot gather take xe alone. */
static rows_from rows_for(const char *engine, size_t turn) {
    return turn % 2 == 0 || strcmp(engine, "clblast") == 0 ? FROM_XE : FROM_X;
}

/* Which matrices, or which of their biases. */
static const struct {
    const char *name;
    uint32_t gate_up, down;
} sides[] = {{"neither", 0, 0}, {"gate_up", 1, 0}, {"down", 0, 1}, {"both", 1, 1}};

static void check_layouts(const char *engine, size_t transposed, size_t biased) {
    const shape s = {23, 37, 5, 0, 2, 19};
    for (int layout = CLMOE_GATE_CONCAT; layout <= CLMOE_GATE_NONE; layout++) {
        experts_case c;
        test_case("engine %s, layout %d, transposed: %s, biases: %s", engine, layout,
                  sides[transposed].name, sides[biased].name);
        default_case(&c, &s, engine);
        c.desc.experts.gate_layout = (clmoe_gate_layout)layout;
        c.desc.experts.gate_up_transposed = sides[transposed].gate_up;
        c.desc.experts.down_transposed = sides[transposed].down;
        c.desc.experts.gate_up_bias = sides[biased].gate_up;
        c.desc.experts.down_bias = sides[biased].down;
        seed_set(transposed + biased + 1);
        fill_case(&c);
        check_experts(&c, rows_for(engine, transposed), false);
    }
}

static void every_layout(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t transposed = 0; transposed < COUNT_OF(sides); transposed++)
            for (size_t biased = 0; biased < COUNT_OF(sides); biased++)
                check_layouts(engines[n], transposed, biased);
}

static const struct {
    const char *name;
    clmoe_gate_layout layout;
    float limit, alpha /* of SiLU */, up_shift;
} bounds[] = {
    {"no switch", CLMOE_GATE_CONCAT, 0.0f, 1.0f, 0.0f},
    {"limit", CLMOE_GATE_CONCAT, 0.75f, 1.0f, 0.0f},
    {"alpha", CLMOE_GATE_CONCAT, 0.0f, 1.702f, 0.0f},
    {"limit, alpha", CLMOE_GATE_CONCAT, 0.75f, 1.702f, 0.0f},
    {"up shift", CLMOE_GATE_CONCAT, 0.0f, 1.0f, 1.0f},
    {"limit, up shift", CLMOE_GATE_CONCAT, 0.75f, 1.0f, 1.0f},
    {"alpha, up shift", CLMOE_GATE_CONCAT, 0.0f, 1.702f, 1.0f},
    {"no gate, alpha", CLMOE_GATE_NONE, 0.0f, 1.702f, 0.0f},
};

static void every_activation(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {41, 21, 4, 0, 2, 35};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(bounds); i++)
            for (int act = CLMOE_ACT_SILU; act <= CLMOE_ACT_RELU2; act++) {
                experts_case c;
                test_case("engine %s, activation %d, %s", engines[n], act, bounds[i].name);
                default_case(&c, &s, engines[n]);
                c.desc.experts.activation = (clmoe_activation)act;
                c.desc.experts.gate_layout = bounds[i].layout;
                c.desc.experts.limit = bounds[i].limit;
                c.desc.experts.alpha = act == CLMOE_ACT_SILU ? bounds[i].alpha : 1.0f;
                c.desc.experts.up_shift = bounds[i].up_shift;
                c.desc.experts.gate_up_bias = 1;
                seed_set(i + 1);
                fill_case(&c);
                check_experts(&c, rows_for(engines[n], i), false);
            }
}

static const struct {
    const char *name;
    uint32_t normalized, biases;
} outputs[] = {{"as they are", 0, 0},
               {"normalized", 1, 0},
               {"with biases", 0, 1},
               {"normalized, with biases", 1, 1}};

static void weights_inside_and_directions(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {33, 29, 6, 2, 3, 17};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (int at = CLMOE_WEIGHT_AT_OUTPUT; at <= CLMOE_WEIGHT_AT_ACTIVATION; at++)
            for (size_t i = 0; i < COUNT_OF(outputs); i++) {
                experts_case c;
                test_case("engine %s, weight at %d, %s", engines[n], at, outputs[i].name);
                default_case(&c, &s, engines[n]);
                c.desc.router.weight_at = (clmoe_weight_at)at;
                c.desc.normalize_experts = outputs[i].normalized;
                c.desc.experts.gate_up_bias = c.desc.experts.down_bias = outputs[i].biases;
                c.desc.capacity.factor = 0.8;
                seed_set(i + 1);
                fill_case(&c);
                check_experts(&c, rows_for(engines[n], i), false);
            }
}

/* Around the edges of every tile: rows, D and H. */
static void every_edge(void **state) {
    (void)state;
    static const uint32_t edges[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 129};
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(edges); i++)
            for (int which = 0; which < 3; which++) {
                shape s = {19, 18, 2, 0, 1, 20};
                uint32_t *size = which == 0 ? &s.tokens : which == 1 ? &s.dim : &s.hidden_dim;
                *size = edges[i];
                experts_case c;
                test_case("engine %s, T %u, D %u, H %u", engines[n], s.tokens, s.dim, s.hidden_dim);
                default_case(&c, &s, engines[n]);
                c.kind = which == 0 ? PATTERN_ALL_TO_ONE : PATTERN_UNIFORM;
                seed_set(i + 1);
                fill_case(&c);
                check_experts(&c, rows_for(engines[n], i), false);
            }
}

static void every_shape(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(layer_shapes); i++) {
            experts_case c;
            test_case("engine %s, shape %zu", engines[n], i);
            default_case(&c, &layer_shapes[i], engines[n]);
            c.kind = (pattern)(i % PATTERN_TIES);
            c.desc.capacity.factor = layer_factors[i];
            seed_set(i + 1);
            fill_case(&c);
            check_experts(&c, rows_for(engines[n], i), false);
        }
}

/* A zero row has no direction: it stays zero. */
static void zero_rows_stay_zero(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {33, 29, 6, 0, 3, 17};
    for (size_t n = 0; engines[n] != NULL; n++) {
        experts_case c;
        test_case("engine %s", engines[n]);
        default_case(&c, &s, engines[n]);
        c.desc.normalize_experts = 1;
        seed_set(1);
        fill_case(&c);
        float *x = random_floats((size_t)s.tokens * s.dim, 1.0);
        for (size_t i = 0; i < (size_t)s.tokens * s.dim; i++)
            x[i] = i / s.dim % 2 ? 0.0f : x[i];
        c.x = x;
        check_experts(&c, FROM_XE, false);
    }
}

static const float *small_integers(size_t n) {
    float *values = HOST(float, n);
    for (size_t i = 0; i < n; i++)
        values[i] = (float)((int)random_below(7) - 3);
    return values;
}

/* Integers whose sums fit in 24 bits must come out exactly, in any order of summation. */
static void exact_integers(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const shape s = {67, 75, 5, 0, 2, 83};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (int layout = CLMOE_GATE_CONCAT; layout <= CLMOE_GATE_NONE; layout++) {
            experts_case c;
            test_case("engine %s, layout %d", engines[n], layout);
            default_case(&c, &s, engines[n]);
            c.desc.experts.activation = CLMOE_ACT_RELU;
            c.desc.experts.gate_layout = (clmoe_gate_layout)layout;
            seed_set((uint64_t)layout + 1);
            fill_case(&c);
            size_t matrix = (size_t)s.experts * s.dim * s.hidden_dim;
            c.x = small_integers((size_t)s.tokens * s.dim);
            c.w.experts.gate = c.w.experts.gate ? small_integers(2 * matrix) : NULL;
            c.w.experts.up = c.w.experts.up ? small_integers(matrix) : NULL;
            c.w.experts.down = small_integers(matrix);
            check_experts(&c, rows_for(engines[n], (size_t)layout), true);
        }
}

static clmoe_status refuse_all(const void *state, const gemm_problem *problem) {
    (void)state;
    (void)problem;
    return CLMOE_UNSUPPORTED;
}

/* A problem that the engine cannot address is refused before anything is enqueued. */
static void engine_is_asked_first(void **state) {
    (void)state;
    const shape s = {7, 5, 12, 0, 3, 3};
    clmoe_layer_desc desc = desc_of(&s);
    batch b;
    device_batch d;
    test_case("an engine that refuses");
    desc.engine = "ref";
    batch_make(&b, &desc, s.tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    gemm_engine strict = *layer->experts.engine;
    strict.check = refuse_all;
    batch_upload(layer, &b, &d);
    const gemm_engine *usual = layer->experts.engine;
    layer->experts.engine = &strict;
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(layer, s.tokens, &layout));
    const clmoe_experts_args experts = {.struct_size = sizeof experts,
                                        .tokens = s.tokens,
                                        .weights = &d.weights,
                                        .x = d.args.x,
                                        .xe = buf_new((size_t)layout.slots * s.dim * 4),
                                        .plan = buf_new(layout.bytes),
                                        .scratch = d.args.scratch,
                                        .ye = buf_new((size_t)layout.slots * s.dim * 4)};
    clmoe_status forward = clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL);
    clmoe_status step = clmoe_experts(layer, test.queue, &experts, 0, NULL, NULL);
    layer->experts.engine = usual;
    CHECK(forward == CLMOE_UNSUPPORTED, "forward gave %s\n", clmoe_status_string(forward));
    CHECK(step == CLMOE_UNSUPPORTED, "experts gave %s\n", clmoe_status_string(step));
    CHECK(all_untouched(), "something was written\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_layout),        TEST(every_activation),      TEST(weights_inside_and_directions),
        TEST(every_edge),          TEST(every_shape),           TEST(exact_integers),
        TEST(zero_rows_stay_zero), TEST(engine_is_asked_first),
    };
    return RUN(tests);
}
