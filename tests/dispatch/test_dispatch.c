/* dispatch: x [T,D] -> xe [S,D], a copy of rows; padding is 0. */
#include "support.h"

#include <string.h>

static void check_dispatch(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                           pattern kind) {
    size_t D = desc->dim, row = D * sizeof(float);
    clmoe_layer *layer = test_layer(group_size, desc);
    ref_plan_in in;
    route_random(desc, tokens, kind, &in);
    in.token_mask = random_mask(tokens);
    clmoe_plan_layout layout;
    clmoe_buf plan = plan_run(layer, desc, &in, &layout);
    const float *x = random_floats(tokens * D, 1.0);
    clmoe_dispatch_args args = {
        .struct_size = sizeof args,
        .tokens = tokens,
        .x = buf_of(x, tokens * row),
        .plan = plan,
        .xe = buf_new(layout.slots * row),
    };
    OK(clmoe_dispatch(layer, test.queue, &args, 0, NULL, NULL));
    const ref_plan *want_plan = plan_reference(desc, &in);
    float *want = HOST(float, layout.slots *D);
    for (size_t s = 0; s < layout.slots; s++)
        if (want_plan->token_of[s] >= 0)
            memcpy(want + s * D, x + (size_t)want_plan->token_of[s] * D, row);
    compare_bits("xe", buf_get(args.xe), want, layout.slots * row);
}

static void every_dim(void **state) {
    (void)state;
    static const struct {
        uint32_t dim, capacity_rows;
    } cases[] = {{1, 0},  {2, 9},   {3, 0},   {5, 9},   {15, 0},   {16, 9},  {17, 0},
                 {64, 9}, {127, 0}, {255, 9}, {257, 0}, {1023, 9}, {1025, 0}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(cases); i++) {
            const shape s = {64, cases[i].dim, 12, 0, 3, 3};
            clmoe_layer_desc desc = desc_of(&s);
            desc.capacity.rows = cases[i].capacity_rows;
            test_case("group size %u, D %u, capacity %u", group_sizes[g], s.dim,
                      desc.capacity.rows);
            seed_set(i + 1);
            check_dispatch(group_sizes[g], &desc, s.tokens, PATTERN_UNIFORM);
        }
}

static void every_size_and_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(layer_shapes); i++) {
            clmoe_layer_desc desc = desc_of(&layer_shapes[i]);
            desc.engine = engines[n];
            desc.capacity.factor = layer_factors[i];
            test_case("engine %s, shape %zu", engines[n], i);
            seed_set(i + 1);
            check_dispatch(0, &desc, layer_shapes[i].tokens, (pattern)(i % PATTERN_COUNT));
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_dim), TEST(every_size_and_engine)};
    return RUN(tests);
}
