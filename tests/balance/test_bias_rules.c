/*
 * bias_rules: what the rules of the selection bias do to routers that prefer some experts, batch
 * after batch: how soon the load is even, that it stays so, and who follows a preference that
 * moves. With the argument "all" for thousands of steps, and side by side.
 */
#include "support.h"

#include <math.h>
#include <string.h>

enum { TOKENS = 4096, EXPERTS = 64, TOP_K = 8, VALUES = TOKENS * EXPERTS, DRIFT = 200 };

static bool at_length;

/* One layer, its router's logits, and what a step of training would call. */
typedef struct lab {
    clmoe_layer *layer;
    float *lean[2], *noise; /* [E], [T,E]: logits are lean + noise, between two leans */
    size_t counts_bytes;
    clmoe_score_args score;
    clmoe_topk_args topk;
    clmoe_plan_args plan;
    clmoe_stats_args stats;
    clmoe_bias_counts_args counts;
    clmoe_balance_args args;
} lab;

static void calls_make(lab *l) {
    clmoe_plan_layout layout;
    const size_t pairs = TOKENS * TOP_K;
    OK(clmoe_plan_layout_get(l->layer, TOKENS, &layout));
    l->score = (clmoe_score_args){.struct_size = sizeof l->score,
                                  .tokens = TOKENS,
                                  .logits_in = buf_new(VALUES * 4),
                                  .scores = buf_new(VALUES * 4)};
    l->topk = (clmoe_topk_args){.struct_size = sizeof l->topk,
                                .tokens = TOKENS,
                                .scores = l->score.scores,
                                .ids = buf_new(pairs * 4),
                                .pair_weights = buf_new(pairs * 4),
                                .live = buf_new(TOKENS * 4),
                                .state = l->args.state};
    l->plan = (clmoe_plan_args){.struct_size = sizeof l->plan,
                                .tokens = TOKENS,
                                .ids = l->topk.ids,
                                .scratch = scratch_of(l->layer, TOKENS),
                                .plan = buf_new(layout.bytes)};
    l->stats = (clmoe_stats_args){.struct_size = sizeof l->stats,
                                  .tokens = TOKENS,
                                  .ids = l->topk.ids,
                                  .plan = l->plan.plan,
                                  .live = l->topk.live,
                                  .state = l->args.state,
                                  .scratch = l->plan.scratch,
                                  .stats = l->args.stats};
    l->counts = (clmoe_bias_counts_args){.struct_size = sizeof l->counts,
                                         .tokens = TOKENS,
                                         .logits = l->score.logits_in,
                                         .state = l->args.state,
                                         .scratch = l->plan.scratch,
                                         .bias_counts = buf_new(l->counts_bytes)};
}

/* The router of test_control.c: sigmoid, MaxVio above 1 without a bias. */
static void lab_make(lab *l, clmoe_bias_rule rule) {
    clmoe_layer_desc desc = desc_of(&(shape){TOKENS, 1, EXPERTS, 0, TOP_K, 1});
    size_t bytes = 0;
    desc.router.score = CLMOE_SCORE_SIGMOID;
    desc.router.select_bias = 1;
    *l = (lab){.layer = test_layer(0, &desc)};
    seed_set(1);
    for (int i = 0; i < 2; i++) {
        l->lean[i] = random_floats(EXPERTS, 0.4);
        l->noise = i == 0 ? random_floats(VALUES, 1.0) : l->noise;
    }
    clmoe_balance_args_init(&l->args);
    OK(clmoe_state_size(l->layer, &bytes));
    OK(clmoe_bias_counts_size(l->layer, &l->counts_bytes));
    l->args.state = buf_new(bytes);
    l->args.stats = buf_new(stats_size(l->layer));
    calls_make(l);
    l->args.bias_rule = rule;
    if (rule == CLMOE_BIAS_QUANTILE)
        l->args.bias_counts = l->counts.bias_counts;
    OK(clmoe_state_init(l->layer, test.queue, l->args.state, 1, 0, NULL, NULL));
}

/* The router a part `way` of the way from one lean to the other. */
static void set_router(const lab *l, float way) {
    float *logits = HOST(float, VALUES);
    for (size_t i = 0; i < VALUES; i++)
        logits[i] =
            l->noise[i] + (1.0f - way) * l->lean[0][i % EXPERTS] + way * l->lean[1][i % EXPERTS];
    buf_write(l->score.logits_in, logits, VALUES * 4);
    OK(clmoe_score(l->layer, test.queue, &l->score, 0, NULL, NULL));
}

/* A batch and the rule's answer. */
static clmoe_stats step(const lab *l) {
    clmoe_stats seen;
    OK(clmoe_topk(l->layer, test.queue, &l->topk, 0, NULL, NULL));
    OK(clmoe_plan(l->layer, test.queue, &l->plan, 0, NULL, NULL));
    OK(clmoe_stats_compute(l->layer, test.queue, &l->stats, 0, NULL, NULL));
    if (l->args.bias_rule == CLMOE_BIAS_QUANTILE)
        OK(clmoe_bias_counts(l->layer, test.queue, &l->counts, 0, NULL, NULL));
    OK(clmoe_balance_update(l->layer, test.queue, &l->args, 0, NULL, NULL));
    buf_read(l->args.stats, &seen, sizeof seen);
    return seen;
}

/* Quantile, without a rate: even within 20 steps, and no step after that is less so. */
static void quantile_balances(void **state) {
    (void)state;
    const int steps = at_length ? 1000 : 100;
    float first = 0, worst = 0;
    int even = 0;
    lab l;
    test_case("quantile");
    lab_make(&l, CLMOE_BIAS_QUANTILE);
    set_router(&l, 0);
    for (int i = 0; i < 20; i++) {
        const float seen = step(&l).max_violation;
        first = i == 0 ? seen : first;
        even = seen < 0.05f ? even : i + 1;
    }
    for (int i = 0; i < steps; i++)
        worst = fmaxf(worst, step(&l).max_violation);
    print_message("MaxVio %.3f at first, under 0.05 from step %d, at most %.4f later\n",
                  (double)first, even, (double)worst);
    CHECK(first > 0.5f, "MaxVio is %g at first\n", (double)first);
    CHECK(even < 20 && worst < 0.05f, "MaxVio is %g after %d steps\n", (double)worst, even);
}

static const struct {
    const char *name;
    clmoe_bias_rule rule;
    float rate;
} rules[] = {
    {"sign, 1e-3", CLMOE_BIAS_SIGN, 1e-3f},
    {"proportional, 1e-2", CLMOE_BIAS_PROPORTIONAL, 1e-2f},
    {"SMEBU, 1e-3", CLMOE_BIAS_SMEBU, 1e-3f},
    {"SMEBU, 1e-2", CLMOE_BIAS_SMEBU, 1e-2f},
    {"quantile", CLMOE_BIAS_QUANTILE, 0.0f},
};

static double bias_norm(const lab *l) {
    const char *bytes = buf_get(l->args.state);
    const float *bias = (const float *)(const void *)(bytes + sizeof(clmoe_state));
    double sum = 0;
    for (size_t e = 0; e < EXPERTS; e++)
        sum += (double)bias[e] * (double)bias[e];
    return sqrt(sum);
}

/* Every rule on the same router: when, how far, and how restless. */
static void side_by_side(void **state) {
    (void)state;
    const int steps = 5000, last = 100;
    for (size_t i = 0; i < COUNT_OF(rules); i++) {
        double fluctuation = 0, violation = 0;
        int even = 0;
        lab l;
        test_case("%s", rules[i].name);
        lab_make(&l, rules[i].rule);
        l.args.bias_rate = rules[i].rate;
        set_router(&l, 0);
        for (int n = 0; n < steps; n++) {
            const clmoe_stats seen = step(&l);
            even = even == 0 && seen.max_violation < 0.1f ? n + 1 : even;
            fluctuation += n < steps - last ? 0 : (double)seen.fluctuation / last;
            violation += n < steps - last ? 0 : (double)seen.max_violation / last;
        }
        print_message("%-20s MaxVio under 0.1 at step %d; after %d: MaxVio %.4f, norm of the bias "
                      "%.4f, fluctuation %.5f\n",
                      rules[i].name, even, steps, violation, bias_norm(&l), fluctuation);
        CHECK(even > 0 && violation < 0.1, "%s: MaxVio %g\n", rules[i].name, violation);
    }
}

/* The preference moves: who follows. */
static void drifting(void **state) {
    (void)state;
    double means[COUNT_OF(rules)];
    for (size_t i = 0; i < COUNT_OF(rules); i++) {
        double mean = 0, worst = 0, end = 0;
        lab l;
        test_case("%s", rules[i].name);
        lab_make(&l, rules[i].rule);
        l.args.bias_rate = rules[i].rate;
        set_router(&l, 0);
        for (int n = 0; n < 400; n++)
            step(&l);
        for (int n = 0; n < DRIFT; n++) {
            set_router(&l, (float)(n + 1) / DRIFT);
            end = (double)step(&l).max_violation;
            mean += end / DRIFT;
            worst = fmax(worst, end);
        }
        means[i] = mean;
        print_message("%-20s MaxVio while the router moves: mean %.4f, at most %.4f, %.4f at the "
                      "end\n",
                      rules[i].name, mean, worst, end);
    }
    CHECK(means[COUNT_OF(rules) - 1] < means[0], "quantile %g, sign %g\n",
          means[COUNT_OF(rules) - 1], means[0]);
}

int main(int argc, char **argv) {
    const struct CMUnitTest few[] = {TEST(quantile_balances)};
    const struct CMUnitTest all[] = {TEST(quantile_balances), TEST(side_by_side), TEST(drifting)};
    at_length = argc > 1 && strcmp(argv[1], "all") == 0;
    return at_length ? RUN(all) : RUN(few);
}
