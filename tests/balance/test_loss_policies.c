/*
 * Losses and statistics of every policy as clmoe_forward() computes them: of the choice before
 * overflow reroute, of first choices that do not come first, of two levels with both gradients.
 */
#include "balance/loss_function.clh"
#include "support_loss.h"

#include <math.h>
#include <string.h>

enum { TOKENS = 22, DIM = 5, EXPERTS = 12 };

/* A batch, what clmoe_forward() gave for it, and the losses it was asked for. */
typedef struct policy_case {
    balance_batch b;
    ref_weights host;
    clmoe_weights weights;
    clmoe_forward_args args;
    clmoe_loss_desc losses[16];
    size_t group_logits; /* elements of dgroup_logits */
} policy_case;

static clmoe_layer_desc plain_desc(uint32_t top_k) {
    const shape s = {TOKENS, DIM, EXPERTS, 0, top_k, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.balance.device_groups = 4;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    return desc;
}

/* x Wg^T [T,groups.count]. */
static double *group_logits(const clmoe_layer_desc *desc, const float *x, const float *matrix) {
    size_t G = desc->router.groups.count;
    double *to = HOST(double, TOKENS *G);
    for (size_t t = 0; t < TOKENS; t++)
        for (size_t g = 0; g < G; g++)
            for (size_t d = 0; d < DIM; d++)
                to[t * G + g] += (double)x[t * DIM + d] * (double)matrix[g * DIM + d];
    return to;
}

static void case_make(policy_case *c, const clmoe_layer_desc *desc, uint32_t group_size) {
    const balance_options options = {
        .kind = PATTERN_ZIPF, .mask = true, .state = true, .target = true, .supplied = true};
    bool choice = ref_lists_pairs(desc);
    size_t n = TOKENS * EXPERTS, pairs = ref_pairs(desc, TOKENS);
    balance_batch *b = &c->b;
    clmoe_layer_desc plain = *desc;
    plain.router.groups.two_level = 0;
    memset(c, 0, sizeof *c);
    balance_make(b, &plain, TOKENS, &options);
    b->desc = *desc;
    b->layer = test_layer(group_size, desc);
    c->host = weights_make(desc);
    c->host.select_bias = b->select_bias;
    c->host.expert_scale = b->in.expert_scale;
    c->weights = weights_upload(desc, &c->host);
    float *x = random_eighths(TOKENS * DIM, 1.0);
    c->group_logits = desc->router.groups.two_level ? TOKENS * desc->router.groups.count : 0;
    if (desc->router.groups.two_level)
        b->in.group_logits = group_logits(desc, x, c->host.group_router);
    clmoe_forward_args_init(&c->args);
    c->args.tokens = TOKENS;
    c->args.weights = &c->weights;
    c->args.x = buf_of(x, TOKENS * DIM * 4);
    c->args.logits_in = buf_of(b->logits, n * 4);
    c->args.token_mask = buf_of(b->in.token_mask, TOKENS);
    c->args.state = buf_of(b->in.state, sizeof(clmoe_state) + 20 * EXPERTS);
    c->args.load_target = buf_of(b->in.load_target, EXPERTS * 4);
    c->args.load_supplied = buf_of(b->in.load_supplied, EXPERTS * 4);
    c->args.scratch = scratch_of(b->layer, TOKENS);
    c->args.y = buf_new(TOKENS * DIM * 4);
    c->args.ids = buf_new(pairs * 4);
    c->args.pair_weights = buf_new(pairs * 4);
    c->args.token_offsets = choice ? buf_new((TOKENS + 1) * 4) : (clmoe_buf){NULL, 0};
    c->args.stats = buf_new(stats_size(b->layer));
    c->args.losses = c->losses;
    c->args.loss_values = buf_new(16 * 4);
}

/* Forward with the losses that are set, and outputs that begin at 0. */
static void run(policy_case *c, uint32_t count) {
    size_t n = TOKENS * EXPERTS;
    c->args.num_losses = count;
    c->args.dlogits = buf_of(HOST(float, n), n * 4);
    c->args.dgroup_logits = (clmoe_buf){NULL, 0};
    if (c->group_logits > 0)
        c->args.dgroup_logits = buf_of(HOST(float, c->group_logits), c->group_logits * 4);
    OK(clmoe_forward(c->b.layer, test.queue, &c->args, 0, NULL, NULL));
}

/*
 * What forward chose, as the oracle's input. Plain token choice is the oracle's own, so that what
 * overflow reroute made of it is not taken for the choice.
 */
static void take_choice(policy_case *c) {
    balance_batch *b = &c->b;
    const clmoe_router_desc *router = &b->desc.router;
    const uint32_t *words = (const uint32_t *)buf_get(c->args.stats) + sizeof(clmoe_stats) / 4;
    uint32_t *out = HOST(uint32_t, EXPERTS);
    b->in.live = NULL;
    if (router->policy != CLMOE_POLICY_TOKEN_CHOICE || router->groups.two_level ||
        ref_lists_pairs(&b->desc)) {
        b->in.ids = buf_get(c->args.ids);
        b->in.pair_weights = buf_get(c->args.pair_weights);
    }
    if (c->args.token_offsets.mem) {
        b->in.token_offsets = buf_get(c->args.token_offsets);
        b->in.slot_of = HOST(int32_t, ref_pairs(&b->desc, TOKENS)); /* all have a place */
    }
    /* Places are the plan's business and tested with it. */
    b->in.kept = words + EXPERTS;
    b->in.rerouted_in = words + 3 * EXPERTS;
    for (size_t e = 0; e < EXPERTS; e++)
        out[e] = words[e] - words[2 * EXPERTS + e] - words[EXPERTS + e] + words[3 * EXPERTS + e];
    b->in.rerouted_out = out;
}

/* d weight * surrogate by one of `values` [n], which `in` reads. */
static void differences(const policy_case *c, const ref_balance_in *in, const clmoe_loss_desc *loss,
                        const ref_loss *fixed, double *values, double *to, size_t n) {
    const double step = 1e-5;
    for (size_t i = 0; i < n; i++) {
        double was = values[i];
        values[i] = was + step;
        double above = ref_loss_surrogate(&c->b.desc, in, loss, fixed);
        values[i] = was - step;
        double below = ref_loss_surrogate(&c->b.desc, in, loss, fixed);
        values[i] = was;
        to[i] += (double)loss->weight * (above - below) / (2.0 * step);
    }
}

/* The values, and the sum of the gradients, against the oracle's; those against differences. */
static void check(policy_case *c, uint32_t count) {
    size_t n = TOKENS * EXPERTS, m = c->group_logits;
    double *want = HOST(double, n + m), *numeric = HOST(double, n + m);
    double *logits = HOST(double, n), *groups = HOST(double, m), difference = 0.0, norm = 0.0;
    ref_balance_in in = c->b.in;
    const float *values = buf_get(c->args.loss_values);
    memcpy(logits, in.logits, n * sizeof *logits);
    if (m > 0)
        memcpy(groups, in.group_logits, m * sizeof *groups);
    in.logits = logits;
    in.group_logits = groups;
    for (uint32_t i = 0; i < count; i++) {
        const clmoe_loss_desc *loss = &c->losses[i];
        ref_loss fixed;
        ref_loss_make(&c->b.desc, &in, loss, &fixed);
        ref_loss_gradient(&c->b.desc, &in, loss, &fixed, want, NULL, m > 0 ? want + n : NULL);
        if (m > 0) { /* those of one level are test_loss.c's */
            differences(c, &in, loss, &fixed, logits, numeric, n);
            differences(c, &in, loss, &fixed, groups, numeric + n, m);
        }
        double error = fabs((double)values[i] - fixed.value) / fmax(fabs(fixed.value), 1e-2);
        worst_note("values by policy", error);
        CHECK(error <= LOSS_TOLERANCE, "%s is %.9g, not %.9g\n", loss_label(loss),
              (double)values[i], fixed.value);
        ref_loss_free(&fixed);
    }
    for (size_t i = 0; i < n + m; i++) {
        difference += (want[i] - numeric[i]) * (want[i] - numeric[i]);
        norm += want[i] * want[i];
    }
    CHECK(m == 0 || sqrt(difference / norm) <= 1e-6, "the oracle is off by %g\n",
          sqrt(difference / norm));
    compare_floats("dlogits", buf_get(c->args.dlogits), want, n, LOSS_TOLERANCE);
    if (m > 0)
        compare_floats("dgroup_logits", buf_get(c->args.dgroup_logits), want + n, m,
                       LOSS_TOLERANCE);
}

/* clmoe_loss() and clmoe_stats_compute() of the same batch give the same bits. */
static void check_steps(policy_case *c, uint32_t group_size, uint32_t count) {
    size_t n = TOKENS * EXPERTS;
    balance_batch *b = &c->b;
    const uint32_t *kept = b->in.kept;
    balance_upload(b, group_size);
    b->dev.x = c->args.x;
    b->weights.group_router = c->weights.group_router;
    loss_result alone = loss_run(b, c->losses, count, NULL);
    compare_bits("values of clmoe_loss()", alone.values, buf_get(c->args.loss_values), count * 4);
    compare_bits("dlogits of clmoe_loss()", alone.dlogits, buf_get(c->args.dlogits), n * 4);
    compare_bits("clmoe_stats_compute()", buf_get(balance_stats(b)), buf_get(c->args.stats),
                 stats_size(b->layer));
    b->in.kept = kept;
}

static bool has_loss(const clmoe_layer_desc *desc, const clmoe_loss_desc *loss) {
    if (loss->kind == CLMOE_LOSS_SMOOTH_LOAD || !loss_is_defined(desc, loss))
        return false;
    return loss->p_source != CLMOE_P_WEIGHTS || !desc->router.groups.two_level;
}

enum { MOST_LOSSES = LOSS_KINDS * 4 * 5 * 2, AT_A_TIME = 16 };

/* Those of all kinds, sources of P and F and devices that the layer has; how many. */
static uint32_t list_losses(const clmoe_layer_desc *desc, clmoe_loss_desc *to) {
    uint32_t count = 0;
    clmoe_loss_desc loss = {.kind = 0};
    for (loss.kind = 0; loss.kind < LOSS_KINDS; loss.kind++)
        for (loss.p_source = 0; loss.p_source <= CLMOE_P_WEIGHTS; loss.p_source++)
            for (loss.f_source = 0; loss.f_source <= CLMOE_F_SUPPLIED; loss.f_source++)
                for (loss.per_device = 0; loss.per_device < 2; loss.per_device++) {
                    loss.weight = 0.5f + 0.02f * (float)(count % AT_A_TIME); /* no two alike */
                    if (has_loss(desc, &loss))
                        to[count++] = loss;
                }
    return count;
}

/* All losses of one layer, as many at a time as a call takes. */
static void every_loss(const clmoe_layer_desc *desc, uint32_t group_size, uint64_t seed) {
    policy_case *c = HOST(policy_case, 1);
    clmoe_loss_desc losses[MOST_LOSSES];
    const uint32_t all = list_losses(desc, losses);
    seed_set(seed);
    case_make(c, desc, group_size);
    for (uint32_t at = 0; at < all; at += AT_A_TIME) {
        const uint32_t count = all - at < AT_A_TIME ? all - at : AT_A_TIME;
        memcpy(c->losses, losses + at, count * sizeof *losses);
        run(c, count);
        take_choice(c);
        balance_compare_stats(&c->b, c->args.stats);
        check(c, count);
        if (desc->capacity.overflow != CLMOE_OVERFLOW_REROUTE)
            check_steps(c, group_size, count);
    }
}

/* A layer without a policy of its own. */
typedef struct layer_case {
    const char *name;
    uint32_t top_k;
    clmoe_score_function score;
    clmoe_order order;
    clmoe_overflow overflow;
    uint32_t groups, topk_groups, two_level, select_bias, expert_scale;
    double factor; /* of capacity; 0: dropless */
    float softcap, temperature;
} layer_case;

static void check_layers(const layer_case *cases, size_t count) {
    for (size_t i = 0; i < count; i++) {
        const layer_case *c = &cases[i];
        clmoe_layer_desc desc = plain_desc(c->top_k);
        desc.router.score = c->score;
        desc.router.order = c->order;
        desc.router.select_bias = c->select_bias;
        desc.router.expert_scale = c->expert_scale;
        desc.router.groups.count = c->groups;
        desc.router.groups.topk = c->topk_groups;
        desc.router.groups.two_level = c->two_level;
        desc.router.softcap = c->softcap;
        desc.router.temperature = c->temperature > 0.0f ? c->temperature : 1.0f;
        desc.capacity.factor = c->factor;
        desc.capacity.overflow = c->overflow;
        test_case("%s", c->name);
        every_loss(&desc, group_sizes[i % COUNT_OF(group_sizes)], i + 1);
    }
}

/* Statistics and losses are of the choice as it was before rerouting. */
static void rerouted(void **state) {
    (void)state;
    enum { REROUTE = CLMOE_OVERFLOW_REROUTE, SIGMOID = CLMOE_SCORE_SIGMOID };
    static const layer_case cases[] = {
        {"bias", .top_k = 2, .score = SIGMOID, .select_bias = 1, .factor = 0.75,
         .overflow = REROUTE},
        {"experts' scale", .top_k = 3, .expert_scale = 1, .factor = 0.75, .overflow = REROUTE},
        {"dropped, not rerouted", .top_k = 1, .score = SIGMOID, .factor = 0.75},
        {"softmax of the chosen", .top_k = 2, .order = CLMOE_ORDER_TOPK_THEN_SCORE, .factor = 0.75,
         .overflow = REROUTE},
        {"group limits, bias", .top_k = 3, .score = SIGMOID, .select_bias = 1, .groups = 4,
         .topk_groups = 2, .factor = 0.75, .overflow = REROUTE},
    };
    check_layers(cases, COUNT_OF(cases));
}

static void two_levels(void **state) {
    (void)state;
    static const layer_case cases[] = {
        {"two of four groups", .top_k = 4, .groups = 4, .topk_groups = 2, .two_level = 1},
        {"two of six groups, drops", .top_k = 2, .groups = 6, .topk_groups = 2, .two_level = 1,
         .factor = 0.75},
        {"temperature", .top_k = 4, .groups = 4, .topk_groups = 2, .two_level = 1,
         .temperature = 0.7f},
        {"softcap, drops", .top_k = 2, .groups = 4, .topk_groups = 2, .two_level = 1,
         .softcap = 2.5f, .factor = 0.75},
    };
    check_layers(cases, COUNT_OF(cases));
}

static void other_policies(void **state) {
    (void)state;
    static const clmoe_policy policies[] = {CLMOE_POLICY_EXPERT_CHOICE, CLMOE_POLICY_SINKHORN,
                                            CLMOE_POLICY_ALL_EXPERTS};
    for (size_t i = 0; i < COUNT_OF(policies); i++)
        for (uint32_t scaled = 0; scaled < 2; scaled++) {
            clmoe_layer_desc desc =
                plain_desc(policies[i] == CLMOE_POLICY_ALL_EXPERTS ? EXPERTS : 6);
            desc.router.policy = policies[i];
            desc.router.score = scaled ? CLMOE_SCORE_SIGMOID : CLMOE_SCORE_SOFTMAX;
            desc.router.expert_scale = scaled;
            if (policies[i] == CLMOE_POLICY_EXPERT_CHOICE) {
                desc.router.renorm.kind = CLMOE_RENORM_NONE;
                desc.capacity.rows = 11; /* E C = T K */
            }
            test_case("policy %d, %s", policies[i], scaled ? "sigmoid, experts' scale" : "softmax");
            every_loss(&desc, group_sizes[(i + scaled) % COUNT_OF(group_sizes)], i + scaled + 1);
        }
}

static void token_rounding(void **state) {
    (void)state;
    for (uint32_t scaled = 0; scaled < 2; scaled++) {
        clmoe_layer_desc desc = plain_desc(6);
        desc.router.score = scaled ? CLMOE_SCORE_SIGMOID : CLMOE_SCORE_SOFTMAX;
        desc.router.expert_scale = scaled;
        desc.router.renorm.after_drop = 1;
        desc.capacity.keep = CLMOE_KEEP_ROUND;
        desc.capacity.multiple = 8;
        test_case("token rounding, %s", scaled ? "sigmoid, experts' scale" : "softmax");
        every_loss(&desc, group_sizes[scaled], scaled + 1);
    }
}

/* Scores that are all the same float: a fresh choice takes the lower ids, as the router does. */
static void saturated_scores(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = plain_desc(3);
        desc.router.score = CLMOE_SCORE_SIGMOID;
        test_case("group size %u", group_sizes[g]);
        policy_case *c = HOST(policy_case, 1);
        seed_set(g + 1);
        case_make(c, &desc, group_sizes[g]);
        for (size_t i = 0; i < TOKENS * EXPERTS; i++)
            c->b.logits[i] = (random_below(2) ? 40.0f : -40.0f) + c->b.logits[i];
        balance_set_logits(&c->b, c->b.logits);
        balance_choose(&c->b);
        c->args.logits_in = buf_of(c->b.logits, TOKENS * EXPERTS * 4);
        for (uint32_t i = 0; i < 3; i++)
            c->losses[i] = (clmoe_loss_desc){
                .kind = CLMOE_LOSS_SQUARED, .weight = 1.0f, .f_source = (clmoe_f_source)i};
        run(c, 3);
        take_choice(c);
        check_steps(c, group_sizes[g], 3);
        const float *values = buf_get(c->args.loss_values);
        compare_bits("fresh", &values[CLMOE_F_FRESH], &values[CLMOE_F_ASSIGNED], 4);
    }
}

/* Statistics, values and gradients without NaN; every token has its K choices. */
static void check_finite(policy_case *c, uint32_t count) {
    const clmoe_stats *stats = buf_get(c->args.stats);
    const float *values = buf_get(c->args.loss_values), *d = buf_get(c->args.dlogits);
    assert_int_equal(stats->pairs, stats->tokens * c->b.desc.top_k);
#define FIELD(name) CHECK(isfinite(stats->name), #name " is %g\n", (double)stats->name);
    REF_STATS_FLOATS(FIELD)
#undef FIELD
    for (uint32_t i = 0; i < count; i++)
        CHECK(!isnan(values[i]), "%s is NaN\n", loss_label(&c->losses[i]));
    for (size_t i = 0; i < TOKENS * EXPERTS; i++)
        CHECK(!isnan(d[i]), "dlogits[%zu] is NaN\n", i);
}

/* Some logits as large as floats get; others overflow by the temperature, where that is small. */
static float *huge_values(const float *logits) {
    float *huge = HOST(float, TOKENS *EXPERTS);
    for (size_t t = 0; t < TOKENS; t++)
        for (size_t e = 0; e < EXPERTS; e++) {
            const float largest = e % 2 ? -3e38f : 3e38f;
            huge[t * EXPERTS + e] = t % 5 == 2 ? largest : 1e3f * logits[t * EXPERTS + e];
        }
    return huge;
}

static void huge_logits(void **state) {
    (void)state;
    static const struct {
        const char *name;
        float temperature, scale; /* the layer's and the state's */
    } cases[] = {
        {"as they are", 1.0f, 1.0f},
        {"a small temperature", 1e-36f, 1.0f},
        {"a small temperature of the state", 1.0f, 1e-38f},
    };
    static const clmoe_score_function scores[] = {CLMOE_SCORE_SOFTMAX, CLMOE_SCORE_SIGMOID,
                                                  CLMOE_SCORE_SQRT_SOFTPLUS};
    static const clmoe_loss_kind kinds[] = {CLMOE_LOSS_SWITCH, CLMOE_LOSS_IMPORTANCE_CV2,
                                            CLMOE_LOSS_Z, CLMOE_LOSS_TOKEN_ENTROPY};
    for (size_t i = 0; i < COUNT_OF(cases) * COUNT_OF(scores); i++) {
        const size_t which = i / COUNT_OF(scores);
        clmoe_layer_desc desc = plain_desc(3);
        desc.router.score = scores[i % COUNT_OF(scores)];
        desc.router.temperature = cases[which].temperature;
        test_case("score %d, %s", desc.router.score, cases[which].name);
        policy_case *c = HOST(policy_case, 1);
        seed_set(i + 1);
        case_make(c, &desc, group_sizes[which % COUNT_OF(group_sizes)]);
        ((clmoe_state *)(uintptr_t)c->b.in.state)->temperature_scale = cases[which].scale;
        c->args.state = buf_of(c->b.in.state, sizeof(clmoe_state) + 20 * EXPERTS);
        c->args.logits_in = buf_of(huge_values(c->b.logits), TOKENS * EXPERTS * 4);
        for (uint32_t k = 0; k < COUNT_OF(kinds); k++)
            c->losses[k] = (clmoe_loss_desc){.kind = kinds[k], .weight = 1.0f};
        run(c, COUNT_OF(kinds));
        check_finite(c, COUNT_OF(kinds));
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(rerouted),       TEST(two_levels),       TEST(other_policies),
        TEST(token_rounding), TEST(saturated_scores), TEST(huge_logits),
    };
    return RUN(tests);
}
