/* Soft MoE backwards: both softmaxes, both norms, and tokens that take no part. */
#include "support.h"
#include "support_backward.h"

#include <math.h>
#include <string.h>

/* More slots than tokens, and fewer; more than one block of tokens. */
static const shape shapes[] = {{7, 13, 5, 0, 1, 9}, {33, 21, 6, 0, 1, 19}, {600, 9, 3, 0, 1, 5}};

static clmoe_layer_desc soft_desc(const shape *s, uint32_t slots) {
    clmoe_layer_desc desc = desc_of(s);
    desc.router.policy = CLMOE_POLICY_SOFT_MOE;
    desc.router.soft_moe.slots = slots;
    desc.router.soft_moe.scale = 3.0f;
    desc.experts.gate_up_bias = desc.experts.down_bias = 1;
    desc.training = 1;
    return desc;
}

static training_batch *run(const clmoe_layer_desc *desc, uint32_t tokens, uint32_t inputs,
                           uint32_t group_size) {
    training_batch *t = training_make(desc, tokens, inputs);
    training_forward(t, group_size);
    training_backward(t);
    return t;
}

static void every_engine_and_size(void **state) {
    (void)state;
    static const uint32_t slots[] = {1, 3}, inputs[] = {0, WITH_MASK | WITH_NAN_ROWS};
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(shapes); i++)
            for (size_t p = 0; p < COUNT_OF(slots); p++) {
                clmoe_layer_desc desc = soft_desc(&shapes[i], slots[p]);
                desc.engine = engines[n];
                desc.recompute = p == i % 2;
                test_case("engine %s, T %u, p %u", engines[n], shapes[i].tokens, slots[p]);
                const uint32_t in = inputs[(i + p + n) % COUNT_OF(inputs)];
                training_compare(run(&desc, shapes[i].tokens, in, 0), "Soft MoE");
            }
}

static void every_group_size(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(shapes); i++) {
            const clmoe_layer_desc desc = soft_desc(&shapes[i], 2);
            test_case("group size %u, T %u", group_sizes[g], shapes[i].tokens);
            training_compare(run(&desc, shapes[i].tokens, WITH_MASK, group_sizes[g]), NULL);
        }
}

/* Without tokens gradients are 0; one token has no other to share slots with. */
static void few_tokens(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (uint32_t tokens = 0; tokens < 3; tokens++) {
            clmoe_layer_desc desc = soft_desc(&shapes[0], 2);
            desc.engine = engines[n];
            desc.shared.hidden_dim = 4;
            test_case("engine %s, T %u", engines[n], tokens);
            training_compare(run(&desc, tokens, 0, 0), NULL);
        }
}

typedef struct type_case {
    clmoe_type type, router;
    clmoe_gradient_type gradient;
} type_case;

static void every_type(void **state) {
    (void)state;
    static const type_case cases[] = {
        {CLMOE_BF16, CLMOE_BF16, CLMOE_GRADIENT_F32},
        {CLMOE_BF16, CLMOE_F32, CLMOE_GRADIENT_OF_WEIGHT},
        {CLMOE_BF16, CLMOE_BF16, CLMOE_GRADIENT_OF_WEIGHT},
        {CLMOE_F16, CLMOE_F16, CLMOE_GRADIENT_OF_WEIGHT},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        clmoe_layer_desc desc = soft_desc(&shapes[1], 2);
        desc.type = desc.weight_type = cases[i].type;
        desc.router.weight_type = cases[i].router;
        desc.gradient_type = cases[i].gradient;
        test_case("type %u, router %u, gradients %u", desc.type, desc.router.weight_type,
                  desc.gradient_type);
        training_compare(run(&desc, shapes[1].tokens, 0, 0),
                         desc.type == CLMOE_F16 ? "f16" : "bf16");
    }
}

/* ---- Odd values -------------------------------------------------------------------------------
 */

/* Rows of x and of the router that are 0, whose logits are 0, and tokens that are not finite. */
static void odd_rows(void **state) {
    (void)state;
    const shape *s = &shapes[1];
    const clmoe_layer_desc desc = soft_desc(s, 2);
    test_case("zeros and infinities");
    training_batch *t = training_make(&desc, s->tokens, 0);
    float *x = HOST(float, (size_t)s->tokens * s->dim);
    float *router = HOST(float, (size_t)ref_router_rows(&desc) * s->dim);
    memcpy(x, t->b.in.x, (size_t)s->tokens * s->dim * sizeof *x);
    memcpy(router, t->b.weights.router, (size_t)ref_router_rows(&desc) * s->dim * sizeof *router);
    memset(x + 4 * s->dim, 0, s->dim * sizeof *x);
    memset(router + 3 * s->dim, 0, s->dim * sizeof *router);
    x[6 * s->dim + 1] = INFINITY;
    x[9 * s->dim] = NAN;
    t->dy[9 * s->dim] = NAN;
    t->b.in.x = x;
    t->b.weights.router = router;
    training_update(t);
    training_forward(t, 0);
    training_backward(t);
    training_compare(t, NULL);
    const float *dx = buf_get(t->args.dx);
    for (size_t d = 0; d < s->dim; d++)
        CHECK(dx[6 * s->dim + d] == 0.0f && dx[9 * s->dim + d] == 0.0f, "dx[%zu] is not 0\n", d);
}

/* The gradient on x has nothing along x by the logits alone: rows of any length have it. */
static void rows_of_any_length(void **state) {
    (void)state;
    static const float lengths[] = {1e-15f, 1e-3f, 1e15f};
    const shape *s = &shapes[1];
    for (size_t i = 0; i < COUNT_OF(lengths); i++) {
        const clmoe_layer_desc desc = soft_desc(s, 2);
        const size_t n = (size_t)ref_router_rows(&desc) * s->dim;
        test_case("rows of the router times %g", (double)lengths[i]);
        training_batch *t = training_make(&desc, s->tokens, 0);
        float *router = HOST(float, n);
        for (size_t j = 0; j < n; j++)
            router[j] = t->b.weights.router[j] * lengths[i];
        t->b.weights.router = router;
        training_update(t);
        training_forward(t, 0);
        training_backward(t);
        training_compare(t, NULL);
    }
}

/* ---- Calls ------------------------------------------------------------------------------------
 */

static void more_gradient_on_ye(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (uint32_t normalize = 0; normalize < 2; normalize++) {
            clmoe_layer_desc desc = soft_desc(&shapes[1], 3);
            desc.engine = engines[n];
            desc.normalize_experts = normalize;
            test_case("engine %s, normalize_experts %u", engines[n], normalize);
            training_compare(run(&desc, shapes[1].tokens, WITH_DYE | WITH_MASK, 0), NULL);
        }
}

/* Data first, weights later, which are added: twice what both at once give, of the first bits. */
static void parts_and_sums(void **state) {
    (void)state;
    const clmoe_layer_desc desc = soft_desc(&shapes[1], 2);
    test_case("parts");
    training_batch *t = run(&desc, shapes[1].tokens, WITH_MASK, 0);
    const training_outputs both = training_read(t);
    training_new_outputs(t);
    buf_poison(t->args.scratch);
    t->args.parts = CLMOE_BACKWARD_DATA;
    training_backward(t);
    t->args.parts = CLMOE_BACKWARD_WEIGHTS;
    training_backward(t);
    const training_outputs apart = training_read(t);
    compare_outputs(&apart, &both);
    t->args.accumulate = 1;
    training_backward(t);
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++)
        for (size_t j = 0; j < ref_gradient_count(&desc, i); j++)
            ref_gradients_field(&t->want.gradients, i)[j] *= 2.0;
    training_compare(t, NULL);
}

static void refused(void **state) {
    (void)state;
    const clmoe_layer_desc desc = soft_desc(&shapes[0], 2);
    test_case("arrays of a choice");
    training_batch *t = training_make(&desc, shapes[0].tokens, 0);
    training_forward(t, 0);
    const struct {
        const char *name;
        clmoe_buf *buf;
    } fields[] = {
        {"logits_in", &t->args.logits_in},
        {"ids_in", &t->args.ids_in},
        {"pair_weights_in", &t->args.pair_weights_in},
        {"dlogits", &t->args.dlogits},
        {"dlogits_out", &t->args.dlogits_out},
        {"dpair_weights", &t->args.dpair_weights},
    };
    for (size_t i = 0; i < COUNT_OF(fields); i++) {
        *fields[i].buf = buf_new(1 << 14);
        check_error(clmoe_backward(t->layer, test.queue, &t->args, 0, NULL, NULL),
                    CLMOE_INVALID_ARGUMENT, fields[i].name, "Soft MoE");
        *fields[i].buf = (clmoe_buf){0};
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_engine_and_size),
        TEST(every_group_size),
        TEST(few_tokens),
        TEST(every_type),
        TEST(odd_rows),
        TEST(rows_of_any_length),
        TEST(more_gradient_on_ye),
        TEST(parts_and_sums),
        TEST(refused),
    };
    return RUN(tests);
}
