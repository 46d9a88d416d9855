/* Losses of logits and targets at the ends of what a float can hold. */
#include "support_loss.h"

#include <float.h>
#include <math.h>

/* Columns that another router masked by the largest float: P is 1e38, and its square no float. */
static void masked_by_the_largest_float(void **state) {
    (void)state;
    enum { T = 16, E = 8 };
    const shape s = {T, 5, E, 0, 2, 3};
    const clmoe_loss_desc loss = {
        .kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.5f, .p_source = CLMOE_P_RAW};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        const clmoe_layer_desc desc = desc_of(&s);
        const balance_options plain = {.kind = PATTERN_UNIFORM};
        balance_batch b;
        double p[E] = {0.0}, mean = 0.0, variance = 0.0;
        test_case("group size %u", group_sizes[g]);
        seed_set(1);
        balance_make(&b, &desc, T, &plain);
        for (size_t t = 0; t < T; t++)
            b.logits[t * E + 3] = b.logits[t * E + 5 * (t % 2)] = -FLT_MAX;
        balance_set_logits(&b, b.logits);
        balance_upload(&b, group_sizes[g]);
        const loss_result got = loss_run(&b, &loss, 1, NULL);
        for (size_t i = 0; i < T * E; i++)
            p[i % E] += (double)b.logits[i] / T;
        for (size_t e = 0; e < E; e++)
            mean += p[e] / E;
        for (size_t e = 0; e < E; e++)
            variance += (p[e] - mean) * (p[e] - mean) / E;
        const double square = mean * mean + 1e-10, want = variance / square;
        CHECK(fabs((double)got.values[0] / want - 1) < 1e-5, "%g, not %g\n", (double)got.values[0],
              want);
        for (size_t i = 0; i < T * E; i++) {
            const double of_p =
                2 * (p[i % E] - mean) / E / square - variance / square * (2 * mean / E / square);
            CHECK(fabs((double)got.dlogits[i] - 1.5 * of_p / T) < 1e-38 + 1e-5 * fabs(of_p),
                  "dlogits[%zu] is %g, not %g\n", i, (double)got.dlogits[i], 1.5 * of_p / T);
        }
    }
}

/* A target that has no shares counts as none. */
static void targets_without_a_sum(void **state) {
    (void)state;
    const shape s = {22, 5, 12, 2, 3, 3};
    static const struct {
        const char *name;
        float value;
    } targets[] = {{"of zeros", 0.0f}, {"too large for a sum", 3e38f}, {"of NaN", (float)NAN}};
    static const clmoe_loss_desc losses[] = {
        {.kind = CLMOE_LOSS_ENTROPY, .weight = 1.0f},
        {.kind = CLMOE_LOSS_SQUARED, .weight = 1.0f},
        {.kind = CLMOE_LOSS_L1, .weight = 1.0f, .p_source = CLMOE_P_SOFTMAX},
    };
    for (size_t i = 0; i < COUNT_OF(targets); i++) {
        const clmoe_layer_desc desc = desc_of(&s);
        balance_options options = {.kind = PATTERN_ZIPF, .mask = true, .state = true};
        balance_batch b;
        test_case("targets %s", targets[i].name);
        seed_set(1);
        balance_make(&b, &desc, s.tokens, &options);
        balance_upload(&b, group_sizes[i % COUNT_OF(group_sizes)]);
        const size_t n = (size_t)b.tokens * ref_columns(&desc) * 4;
        const loss_result uniform = loss_run(&b, losses, COUNT_OF(losses), NULL);
        const clmoe_buf uniform_stats = balance_stats(&b);
        float *target = HOST(float, desc.num_experts);
        for (size_t e = 0; e < desc.num_experts; e++)
            target[e] = targets[i].value;
        b.dev.load_target = buf_of(target, desc.num_experts * 4);
        const loss_result got = loss_run(&b, losses, COUNT_OF(losses), NULL);
        compare_bits("values", got.values, uniform.values, sizeof losses / sizeof losses[0] * 4);
        compare_bits("dlogits", got.dlogits, uniform.dlogits, n);
        compare_bits("stats", buf_get(balance_stats(&b)), buf_get(uniform_stats),
                     stats_size(b.layer));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(masked_by_the_largest_float),
        TEST(targets_without_a_sum),
    };
    return RUN(tests);
}
