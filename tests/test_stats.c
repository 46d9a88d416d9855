/* stats: plan -> clmoe_stats and the arrays load, kept, dropped. */
#include "support.h"

static void check_stats(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                        pattern kind, bool with_live, bool with_mask) {
    clmoe_layer *layer = test_layer(group_size, desc);
    ref_plan_in in;
    route_random(desc, tokens, kind, &in);
    in.token_mask = with_mask ? random_mask(tokens) : NULL;
    in.live = with_live ? in.live : NULL;
    clmoe_plan_layout layout;
    clmoe_stats_args args = {
        .struct_size = sizeof args,
        .tokens = tokens,
        .plan = plan_run(layer, desc, &in, &layout),
        .live = buf_of(in.live, tokens * 4),
        .token_mask = buf_of(in.token_mask, tokens),
        .stats = buf_new(clmoe_stats_size(layer)),
    };
    OK(clmoe_stats_compute(layer, test.queue, &args, 0, NULL, NULL));
    const ref_plan *plan = plan_reference(desc, &in);
    clmoe_stats want;
    ref_stats(desc, tokens, plan, in.live, in.token_mask, &want);
    compare_stats(buf_get(args.stats), &want, plan);
}

static void every_size(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(routing_shapes); i++)
            for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
                const shape *s = &routing_shapes[i];
                clmoe_layer_desc desc = desc_of(s);
                desc.capacity.factor = kind % 2 ? 0.8 : 0.0;
                test_case("group size %u, T %u, E %u, K %u, %s", group_sizes[g], s->tokens,
                          s->experts, s->top_k, pattern_name(kind));
                seed_set(i + 1);
                check_stats(group_sizes[g], &desc, s->tokens, kind, kind != 1, (i + kind) % 2 == 0);
            }
}

static void size_in_bytes(void **state) {
    (void)state;
    const shape s = {1, 5, 8, 3, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    assert_int_equal(clmoe_stats_size(test_layer(0, &desc)), sizeof(clmoe_stats) + 8 * 11 * 4);
    assert_int_equal(clmoe_stats_size(NULL), 0);
    assert_int_equal(sizeof(clmoe_stats), 128);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_size), TEST(size_in_bytes)};
    return RUN(tests);
}
