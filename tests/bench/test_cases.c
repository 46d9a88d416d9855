/* The bench's table of cases: complete, its costs counted anew, its layers right by the oracle. */
#include "../../bench/cases.h"
#include "support.h"

#include <string.h>

static const bench_case *find(const char *name, uint32_t tokens) {
    for (const bench_case *c = bench_cases; c->name; c++)
        if (strcmp(c->name, name) == 0 && c->tokens == tokens)
            return c;
    CHECK(false, "no case %s of %u tokens\n", name, (unsigned)tokens);
    return NULL;
}

static void test_table(void **state) {
    (void)state;
    for (const bench_case *c = bench_cases; c->name; c++) {
        test_case("%s T=%u", c->name, (unsigned)c->tokens);
        CHECK(c->tokens > 0 && c->dim > 0 && c->hidden_dim > 0, "a size is 0\n");
        CHECK(c->top_k >= 1 && c->top_k <= c->experts && c->top_k <= 256,
              "top_k is out of range\n");
        CHECK(c->experts <= 4096, "experts is out of range\n");
    }
}

/* Sizes that figures elsewhere refer to by name. */
static void test_named_shapes(void **state) {
    static const struct {
        const char *name;
        uint32_t tokens, dim, hidden_dim, experts, top_k;
    } shapes[] = {
        {"olmoe-cpu", 512, 1024, 512, 64, 8},      {"mixtral-cpu", 256, 1024, 3584, 8, 2},
        {"decode-cpu", 1, 1024, 512, 64, 8},       {"decode-cpu", 8, 1024, 512, 64, 8},
        {"mixtral-8x7b", 8192, 4096, 14336, 8, 2}, {"qwen3-30b-a3b", 1024, 2048, 768, 128, 8},
        {"olmoe", 64, 2048, 1024, 64, 8},          {"deepseek-v3", 1, 7168, 2048, 256, 8},
        {"router-wide", 16384, 32, 16, 512, 10},   {"router-256", 8192, 32, 16, 256, 8},
    };
    (void)state;
    for (size_t i = 0; i < COUNT_OF(shapes); i++) {
        const bench_case *c = find(shapes[i].name, shapes[i].tokens);
        CHECK(c->dim == shapes[i].dim && c->hidden_dim == shapes[i].hidden_dim &&
                  c->experts == shapes[i].experts && c->top_k == shapes[i].top_k,
              "%s has other sizes\n", shapes[i].name);
    }
}

/* The sweep keeps the rows per expert, the work and the weights. */
static void test_scaling_experts(void **state) {
    const bench_case *first = NULL;
    (void)state;
    for (const bench_case *c = bench_cases; c->name; c++) {
        if (strcmp(c->name, "scaling-experts") != 0)
            continue;
        first = first ? first : c;
        CHECK(c->tokens * c->top_k == 128 * c->experts, "E=%u: not 128 rows\n", c->experts);
        CHECK(case_flops(c, STEP_EXPERTS) == case_flops(first, STEP_EXPERTS), "E=%u: other work\n",
              c->experts);
        CHECK(case_weight_bytes(c, 4) == case_weight_bytes(first, 4), "E=%u: other weights\n",
              c->experts);
    }
}

static void test_steps_of_cases(void **state) {
    const bench_case *layer = find("olmoe-cpu", 512), *router = find("router-wide", 16384);
    (void)state;
    for (int step = 0; step < STEP_COUNT; step++) {
        const bool policy = strncmp(step_names[step], "routing:", strlen("routing:")) == 0;
        CHECK(case_has_step(layer, (bench_step)step) == !policy, "olmoe-cpu and %s\n",
              step_names[step]);
        CHECK(!policy || case_has_step(router, (bench_step)step), "router-wide lacks %s\n",
              step_names[step]);
    }
    CHECK(case_has_step(router, STEP_BALANCE) && !case_has_step(router, STEP_TRAIN),
          "router-wide has experts, or no balance\n");
}

static void test_costs(void **state) {
    const bench_case *c = find("olmoe-cpu", 512);
    const case_sizes f32 = {.element = 4, .weight = 4, .gradient = 4, .touched = 64};
    const case_sizes half = {.element = 2, .weight = 2, .gradient = 2, .touched = 32};
    const double pairs = 512 * 8, weights = 3.0 * 64 * 512 * 1024, rows = 512 * 1024;
    (void)state;
    CHECK(case_flops(c, STEP_EXPERTS) == pairs * 3 * 2 * 512 * 1024, "flops of experts\n");
    CHECK(case_flops(c, STEP_SCORE) == 2.0 * 512 * 1024 * 64, "flops of score\n");
    CHECK(case_flops(c, STEP_LAYER) > case_flops(c, STEP_EXPERTS), "flops of the layer\n");
    CHECK(case_flops(c, STEP_PLAN) == 0, "flops of plan\n");
    CHECK(case_flops(c, STEP_BACKWARD) == 2 * (pairs * 3 * 2 * 512 * 1024 + 2.0 * 512 * 1024 * 64),
          "flops of backward\n");
    CHECK(case_flops(c, STEP_BACKWARD) ==
              case_flops(c, STEP_BACKWARD_DATA) + case_flops(c, STEP_BACKWARD_WEIGHTS),
          "flops of its parts\n");
    CHECK(case_flops(c, STEP_FORWARD_BACKWARD) ==
              case_flops(c, STEP_LAYER) + case_flops(c, STEP_BACKWARD),
          "flops of train\n");
    CHECK(case_bytes(c, STEP_BACKWARD_WEIGHTS, &f32) ==
              4 * (2 * rows + pairs * 2 * 512 + weights + 64 * 1024),
          "bytes of backward:weights\n");
    CHECK(case_bytes(c, STEP_BACKWARD_WEIGHTS, &half) ==
              2 * (2 * rows + pairs * 2 * 512 + weights) + 4 * 64 * 1024,
          "bytes of backward:weights in 16 bits\n");
    CHECK(case_bytes(c, STEP_EXPERTS, &f32) == 4 * (weights + rows + pairs * 1024),
          "bytes of experts\n");
    CHECK(case_bytes(c, STEP_EXPERTS, &half) == 2 * (weights / 2 + rows + pairs * 1024),
          "bytes of experts in 16 bits\n");
    CHECK(case_bytes(c, STEP_BIAS_COUNTS, &f32) == 4.0 * (512 * 64 + 64 * CLMOE_BIAS_BINS),
          "bytes of bias_counts\n");
    for (int step = 0; step < STEP_COUNT; step++)
        CHECK(case_bytes(c, (bench_step)step, &f32) > 0, "%s has no bytes\n", step_names[step]);
}

/* The cases that are small enough, through every engine and against the oracle. */
static void test_small_cases(void **state) {
    (void)state;
    for (const bench_case *c = bench_cases; c->name; c++) {
        const shape sizes = {.tokens = c->tokens,
                             .dim = c->dim,
                             .experts = c->experts,
                             .top_k = c->top_k,
                             .hidden_dim = c->hidden_dim};
        if (strncmp(c->name, "tiny", 4) != 0)
            continue;
        for (const char *const *engine = test_engines(); *engine; engine++) {
            batch b;
            device_batch d;
            test_case("%s T=%u, engine %s", c->name, (unsigned)c->tokens, *engine);
            clmoe_layer_desc desc = desc_of(&sizes);
            desc.engine = *engine;
            desc.router.renorm.kind = CLMOE_RENORM_SUM;
            batch_make(&b, &desc, c->tokens);
            batch_run(test_layer(0, &desc), &b, &d);
            batch_compare(&b, &d, batch_reference(&b));
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_table),          TEST(test_named_shapes), TEST(test_scaling_experts),
        TEST(test_steps_of_cases), TEST(test_costs),        TEST(test_small_cases),
    };
    return RUN(tests);
}
