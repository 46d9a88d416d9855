/* orthogonality: the loss of the router's rows, and its gradient. */
#include "support_balance.h"

#include <math.h>
#include <string.h>

/* ---- One router ------------------------------------------------------------------------------ */

typedef struct orthogonality_case {
    const char *name;
    shape sizes;
    clmoe_type type; /* of x and of the router */
    bool f32_router;
    clmoe_gradient_type gradient_type;
    uint32_t slots; /* with Soft MoE */
    uint32_t group;
    double deviation; /* of the weights */
    bool zero_row;
} orthogonality_case;

/* The sizes of a router alone: R = E + Z. */
#define ROUTER(rows, identity, dim)                                                                \
    { 4, dim, (rows) - (identity), identity, 1, 3 }

static const orthogonality_case cases[] = {
    {"odd", ROUTER(7, 0, 45), .deviation = 0.3},
    {"a zero row", ROUTER(7, 0, 45), .deviation = 0.3, .zero_row = true, .group = 64},
    {"one row", ROUTER(1, 0, 5), .deviation = 1.0},
    {"two rows of one element", ROUTER(2, 0, 1), .deviation = 1.0},
    {"more rows than columns", ROUTER(67, 0, 9), .deviation = 0.02},
    {"identity experts", ROUTER(12, 5, 33), .deviation = 0.3, .group = 256},
    {"many rows", ROUTER(300, 1, 130), .deviation = 0.1},
    {"large values", ROUTER(7, 0, 45), .deviation = 1e30},
    {"small values", ROUTER(7, 0, 45), .deviation = 1e-30},
    {"slots", ROUTER(5, 0, 19), .deviation = 0.3, .slots = 3},
    {"f16", ROUTER(19, 0, 45), CLMOE_F16, .deviation = 0.3},
    {"bf16", ROUTER(19, 0, 45), CLMOE_BF16, .deviation = 0.3, .zero_row = true},
    {"f16, a gradient of that type", ROUTER(19, 0, 45), CLMOE_F16,
     .gradient_type = CLMOE_GRADIENT_OF_WEIGHT, .deviation = 0.3},
    {"bf16, a gradient of that type", ROUTER(19, 0, 45), CLMOE_BF16,
     .gradient_type = CLMOE_GRADIENT_OF_WEIGHT, .deviation = 0.3},
    {"bf16, but an f32 router", ROUTER(19, 0, 45), CLMOE_BF16, .f32_router = true,
     .gradient_type = CLMOE_GRADIENT_OF_WEIGHT, .deviation = 0.3},
};

/* A layer that can be asked, its router and what the call takes. */
typedef struct rig {
    clmoe_layer *layer;
    clmoe_type type, gradient_type; /* of the router */
    size_t rows, dim, count;
    float *router, *start;
    clmoe_weights weights;
    clmoe_router_orthogonality_args args;
} rig;

static clmoe_layer_desc desc_of_case(const orthogonality_case *c) {
    clmoe_layer_desc desc = desc_of(&c->sizes);
    desc.type = desc.weight_type = c->type;
    desc.router.weight_type = c->f32_router ? CLMOE_F32 : c->type;
    desc.gradient_type = c->gradient_type;
    desc.balance.router_orthogonality = 1;
    if (c->slots) {
        desc.router.policy = CLMOE_POLICY_SOFT_MOE;
        desc.router.soft_moe.slots = c->slots;
    }
    return desc;
}

static void make_rig(rig *r, const orthogonality_case *c) {
    const clmoe_layer_desc desc = desc_of_case(c);
    memset(r, 0, sizeof *r);
    seed_set(1);
    r->layer = test_layer(c->group, &desc);
    r->type = desc.router.weight_type;
    r->gradient_type = c->gradient_type == CLMOE_GRADIENT_OF_WEIGHT ? r->type : CLMOE_F32;
    r->rows = ref_router_rows(&desc);
    r->dim = desc.dim;
    r->count = r->rows * r->dim;
    r->router = random_floats(r->count, c->deviation);
    if (c->zero_row)
        memset(r->router + r->dim, 0, r->dim * sizeof(float));
    round_all(r->type, r->router, r->count);
    r->start = random_floats(r->count, 1.0 / c->deviation);
    round_all(r->gradient_type, r->start, r->count);
    r->weights.router = buf_of_type(r->type, r->router, r->count);
    r->args = (clmoe_router_orthogonality_args){
        .struct_size = sizeof r->args,
        .weights = &r->weights,
        .weight = 0.75f,
        .scratch = scratch_of(r->layer, 0),
        .value = buf_new(sizeof(float)),
        .drouter = buf_of_type(r->gradient_type, r->start, r->count)};
}

static void run(rig *r) {
    OK(clmoe_router_orthogonality(r->layer, test.queue, &r->args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
}

static double *doubles(const float *values, size_t n) {
    double *out = HOST(double, n);
    for (size_t i = 0; i < n; i++)
        out[i] = (double)values[i];
    return out;
}

/* ---- Tests ----------------------------------------------------------------------------------- */

/* The oracle's gradient is the slope of its value. */
static void oracle_by_differences(void **state) {
    (void)state;
    enum { ROWS = 6, DIM = 11 };
    double gradient[ROWS * DIM], largest = 0.0;
    seed_set(3);
    double *router = doubles(random_floats(ROWS * DIM, 0.4), ROWS * DIM);
    memset(router + 2 * DIM, 0, DIM * sizeof *router);
    ref_orthogonality_gradient(router, ROWS, DIM, gradient);
    for (size_t i = 0; i < ROWS * DIM; i++)
        largest = fmax(largest, fabs(gradient[i]));
    for (size_t i = 0; i < ROWS * DIM; i++) {
        const double at = router[i], step = 1e-5;
        if (i / DIM == 2) { /* of the zero row there is no slope */
            CHECK(gradient[i] == 0.0, "a zero row has gradient %g\n", gradient[i]);
            continue;
        }
        router[i] = at + step;
        const double above = ref_orthogonality(router, ROWS, DIM);
        router[i] = at - step;
        const double slope = (above - ref_orthogonality(router, ROWS, DIM)) / (2 * step);
        router[i] = at;
        CHECK(fabs(slope - gradient[i]) <= 1e-8 * largest, "[%zu] is %g, not %g\n", i, gradient[i],
              slope);
    }
}

static void value_and_gradient(void **state) {
    (void)state;
    for (size_t n = 0; n < COUNT_OF(cases); n++) {
        rig r;
        test_case("%s", cases[n].name);
        make_rig(&r, &cases[n]);
        const double *router = doubles(r.router, r.count);
        const double value = ref_orthogonality(router, r.rows, r.dim);
        double *want = HOST(double, r.count);
        ref_orthogonality_gradient(router, r.rows, r.dim, want);
        for (size_t i = 0; i < r.count; i++)
            want[i] = (double)r.start[i] + (double)r.args.weight * want[i];
        run(&r);
        compare_floats("value", buf_get(r.args.value), &value, 1, 2e-6);
        compare_floats("drouter", buf_get_type(r.args.drouter, r.gradient_type, r.count), want,
                       r.count, r.gradient_type == CLMOE_F32 ? 3e-6 : type_tolerance(r.type));
    }
}

/* Each output is what it is with the other; without a start the gradient alone is seen. */
static void outputs_alone(void **state) {
    (void)state;
    const float *zeros = NULL;
    const clmoe_buf none = {NULL, 0};
    rig r;
    make_rig(&r, &cases[0]);
    zeros = HOST(float, r.count);
    double *want = HOST(double, r.count);
    ref_orthogonality_gradient(doubles(r.router, r.count), r.rows, r.dim, want);
    for (size_t i = 0; i < r.count; i++)
        want[i] *= (double)r.args.weight;
    run(&r);
    const void *value = buf_get(r.args.value);
    buf_write(r.args.drouter, zeros, r.count * 4);
    const clmoe_buf drouter = r.args.drouter;
    r.args.drouter = none;
    buf_poison(r.args.value);
    run(&r);
    compare_bits("value alone", buf_get(r.args.value), value, 4);
    compare_bits("drouter", buf_get(drouter), zeros, r.count * 4);
    r.args.value = none;
    r.args.drouter = drouter;
    run(&r);
    compare_floats("drouter alone", buf_get(drouter), want, r.count, 3e-6);
}

/* A second call adds the same again; each of 50 gives the same bits. */
static void calls_again(void **state) {
    (void)state;
    enum { RUNS = 50 };
    rig r;
    make_rig(&r, &cases[6]);
    const float *zeros = HOST(float, r.count);
    buf_write(r.args.drouter, zeros, r.count * 4);
    run(&r);
    const float *value = buf_get(r.args.value), *once = buf_get(r.args.drouter);
    float *twice = HOST(float, r.count);
    for (size_t i = 0; i < r.count; i++)
        twice[i] = 2 * once[i];
    run(&r);
    compare_bits("twice", buf_get(r.args.drouter), twice, r.count * 4);
    for (int i = 2; i < RUNS; i++) {
        buf_write(r.args.drouter, zeros, r.count * 4);
        buf_poison(r.args.value);
        buf_poison(r.args.scratch);
        run(&r);
        compare_bits("value", buf_get(r.args.value), value, 4);
        compare_bits("drouter", buf_get(r.args.drouter), once, r.count * 4);
    }
}

static double mean_cosine(const rig *r) {
    const double *w = doubles(r->router, r->count);
    double sum = 0.0;
    for (size_t i = 0; i < r->rows; i++)
        for (size_t j = 0; j < i; j++) {
            double pair[2 * 64];
            memcpy(pair, w + i * r->dim, r->dim * sizeof *w);
            memcpy(pair + r->dim, w + j * r->dim, r->dim * sizeof *w);
            sum += sqrt(ref_orthogonality(pair, 2, r->dim) / 2); /* both c_ij and c_ji */
        }
    return sum / (double)(r->rows * (r->rows - 1) / 2);
}

/* Down the gradient rows become orthogonal; the mean over the matrix, as ERNIE's code has it. */
static void descent(void **state) {
    (void)state;
    enum { STEPS = 100 };
    static const orthogonality_case router = {"descent", ROUTER(24, 0, 40), .deviation = 0.3};
    rig r;
    make_rig(&r, &router);
    r.args.weight = 1.0f / (24 * 24);
    for (size_t i = 0; i < r.count; i++)
        r.router[i] += i % r.dim == 0 ? 1.0f : 0.0f; /* rows that lean to one side */
    const double before = mean_cosine(&r);
    float *zeros = HOST(float, r.count), value = INFINITY;
    for (int step = 0; step < STEPS; step++) {
        buf_write(r.weights.router, r.router, r.count * 4);
        buf_write(r.args.drouter, zeros, r.count * 4);
        run(&r);
        const float *now = buf_get(r.args.value), *gradient = buf_get(r.args.drouter);
        CHECK(*now < value, "step %d: %g after %g\n", step, (double)*now, (double)value);
        value = *now;
        for (size_t i = 0; i < r.count; i++)
            r.router[i] -= 20.0f * gradient[i];
    }
    const double after = mean_cosine(&r);
    CHECK(after < before / 10, "mean |cos| was %g, and is %g\n", before, after);
}

/* Beside what the backward pass wrote, whose sum is kept. */
static void with_backward(void **state) {
    (void)state;
    const shape sizes = {9, 21, 6, 1, 2, 5};
    clmoe_layer_desc desc = desc_of(&sizes);
    batch b;
    device_batch d;
    clmoe_gradients gradients = {0};
    desc.training = desc.balance.router_orthogonality = 1;
    const size_t rows = ref_columns(&desc), count = rows * desc.dim;
    seed_set(5);
    batch_make(&b, &desc, sizes.tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_upload(layer, &b, &d);
    const clmoe_buf drouter = gradients.router = buf_new(count * 4);
    clmoe_backward_args back;
    clmoe_backward_args_init(&back);
    back.tokens = sizes.tokens;
    back.weights = d.args.weights;
    back.x = d.args.x;
    back.saved = d.args.saved;
    back.scratch = d.args.scratch;
    back.dy = buf_of(random_floats((size_t)sizes.tokens * desc.dim, 1.0),
                     (size_t)sizes.tokens * desc.dim * 4);
    back.gradients = &gradients;
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    OK(clmoe_backward(layer, test.queue, &back, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    const float *of_batch = buf_get(drouter);
    const clmoe_router_orthogonality_args args = {.struct_size = sizeof args,
                                                  .weights = d.args.weights,
                                                  .weight = -2.0f,
                                                  .scratch = d.args.scratch,
                                                  .drouter = drouter};
    OK(clmoe_router_orthogonality(layer, test.queue, &args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    double *want = HOST(double, count);
    ref_orthogonality_gradient(doubles(b.weights.router, count), rows, desc.dim, want);
    for (size_t i = 0; i < count; i++)
        want[i] = (double)of_batch[i] - 2.0 * want[i];
    compare_floats("drouter", buf_get(drouter), want, count, 3e-6);
}

static void values_that_are_not_finite(void **state) {
    (void)state;
    static const float values[] = {NAN, INFINITY};
    for (size_t n = 0; n < COUNT_OF(values); n++) {
        rig r;
        test_case("%g", (double)values[n]);
        make_rig(&r, &cases[0]);
        r.router[3 * r.dim + 1] = values[n];
        buf_write(r.weights.router, r.router, r.count * 4);
        run(&r);
        CHECK(isnan(*(float *)buf_get(r.args.value)), "the value is %g\n",
              (double)*(float *)buf_get(r.args.value));
        CHECK(isnan(((float *)buf_get(r.args.drouter))[0]), "no NaN reaches row 0\n");
    }
}

/* ---- Errors ---------------------------------------------------------------------------------- */

static void refused(rig *r, clmoe_status want, const char *field, const char *value) {
    cl_event event = (cl_event)(void *)r;
    test_note("%s", field);
    buf_poison(r->args.value);
    const clmoe_status status =
        clmoe_router_orthogonality(r->layer, test.queue, &r->args, 0, NULL, &event);
    check_error(status, want, field, value);
    CHECK(event == NULL, "%s: the event is not NULL\n", field);
}

static void bad_arguments(void **state) {
    (void)state;
    const shape sizes = ROUTER(7, 0, 45);
    const clmoe_layer_desc without = desc_of(&sizes);
    const clmoe_buf none = {NULL, 0};
    rig r;
    make_rig(&r, &cases[0]);
    const rig right = r;
#define REFUSED(change, field, value)                                                              \
    do {                                                                                           \
        r.args = right.args;                                                                       \
        change;                                                                                    \
        refused(&r, CLMOE_INVALID_ARGUMENT, field, value);                                         \
    } while (0)
    r.args.weights = &r.weights;
    REFUSED(r.args.struct_size = 4, "struct_size", "4");
    REFUSED(r.args.weight = NAN, "weight", "nan");
    REFUSED(r.args.weight = INFINITY, "weight", "inf");
    REFUSED(r.args.reserved = 3, "reserved", "3");
    REFUSED(r.args.weights = NULL, "weights", "NULL");
    REFUSED(r.args.scratch = none, "scratch", "given");
    REFUSED(r.args.scratch = right.args.value, "scratch", "needs");
    REFUSED(r.args.drouter = right.args.value, "drouter", "needs");
    REFUSED(r.args.drouter = r.weights.router, "drouter", "overlaps");
    REFUSED((r.args.drouter = none, r.args.value = right.args.drouter,
             r.args.scratch = right.args.drouter),
            "scratch", "needs");
    r.args = right.args;
    r.args.value = r.args.drouter = none;
    check_error(clmoe_router_orthogonality(r.layer, test.queue, &r.args, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "value", "drouter");
    r.args = right.args;
    check_error(clmoe_router_orthogonality(NULL, test.queue, &r.args, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "layer", "NULL");
    check_error(clmoe_router_orthogonality(r.layer, test.queue, NULL, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "args", "NULL");
    r.layer = test_layer(0, &without);
    refused(&r, CLMOE_UNSUPPORTED, "balance.router_orthogonality", "0");
    CHECK(buf_untouched(right.args.value), "something was enqueued\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(oracle_by_differences),
        TEST(value_and_gradient),
        TEST(outputs_alone),
        TEST(calls_again),
        TEST(descent),
        TEST(with_backward),
        TEST(values_that_are_not_finite),
        TEST(bad_arguments),
    };
    return RUN(tests);
}
