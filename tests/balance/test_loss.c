/* loss: values and gradients of every balancing loss against the oracle. */
#include "balance/loss_function.clh"
#include "ref_policy.h"
#include "routing/score_function.clh"
#include "support_loss.h"

#include <math.h>
#include <string.h>

/* 22 tokens, four sequences of which the last is short, two identity experts, four devices. */
static clmoe_layer_desc small_desc(void) {
    const shape s = {22, 5, 12, 2, 3, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.balance.device_groups = 4;
    desc.capacity.tokens_per_sequence = 7;
    desc.capacity.rows = 2;
    return desc;
}

/* Everything a loss may need. */
static const balance_options everything = {
    .kind = PATTERN_ZIPF, .mask = true, .state = true, .target = true, .supplied = true};

/* ---- Every combination ----------------------------------------------------------------------- */

/* Over what a loss sums, and the group size that it meets with a target; both without one. */
typedef struct scope_case {
    const char *name;
    uint32_t per_sequence, per_device;
    size_t group_with_target; /* of group_sizes */
} scope_case;

static const scope_case scopes[] = {
    {"experts of the batch", 0, 0, 0},
    {"experts of sequences", 1, 0, 1},
    {"devices of the batch", 0, 1, 1},
    {"devices of sequences", 1, 1, 0},
};

static uint32_t check_sources(balance_batch *b, clmoe_loss_kind kind, const scope_case *scope) {
    uint32_t count = 0;
    for (int p = CLMOE_P_NORMALISED; p <= CLMOE_P_WEIGHTS; p++)
        for (int f = CLMOE_F_ASSIGNED; f <= CLMOE_F_SUPPLIED; f++) {
            clmoe_loss_desc loss = {.kind = kind,
                                    .weight = 1.25f,
                                    .p_source = (clmoe_p_source)p,
                                    .f_source = (clmoe_f_source)f,
                                    .per_sequence = scope->per_sequence,
                                    .per_device = scope->per_device};
            if (kind == CLMOE_LOSS_SMOOTH_LOAD || !loss_is_defined(&b->desc, &loss))
                continue;
            test_note("%s", loss_label(&loss));
            loss_check(b, &loss);
            count++;
        }
    return count;
}

static uint32_t check_scope(const scope_case *scope, size_t group, bool target) {
    test_case("group size %u, %s%s", group_sizes[group], scope->name, target ? ", a target" : "");
    seed_set((uint64_t)(scope - scopes) + 1);
    clmoe_layer_desc desc = small_desc();
    if (!target) { /* a choice that a fresh top-k would not make */
        desc.router.select_bias = 1;
        desc.router.groups.count = 7;
        desc.router.groups.topk = 3;
    }
    balance_options options = everything;
    options.target = options.offsets = target;
    balance_batch b;
    balance_make(&b, &desc, 22, &options);
    balance_upload(&b, group_sizes[group]);
    uint32_t count = 0;
    for (clmoe_loss_kind kind = 0; kind < LOSS_KINDS; kind++)
        count += check_sources(&b, kind, scope);
    return count;
}

static void every_combination(void **state) {
    (void)state;
    uint32_t count = 0;
    for (size_t i = 0; i < COUNT_OF(scopes); i++) {
        for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
            count += check_scope(&scopes[i], g, false);
        count += check_scope(&scopes[i], scopes[i].group_with_target, true);
    }
    print_message("%u combinations\n", count);
}

/* ---- Every score ----------------------------------------------------------------------------- */

/* Losses of every way from g to the logits. */
static const clmoe_loss_desc ways[] = {
    {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f},
    {.kind = CLMOE_LOSS_ENTROPY, .weight = 0.5f, .per_sequence = 1},
    {.kind = CLMOE_LOSS_SQUARED, .weight = -2.0f, .p_source = CLMOE_P_RAW},
    {.kind = CLMOE_LOSS_MINIMAX, .weight = 1.0f, .p_source = CLMOE_P_SOFTMAX, .beta = 3.0f},
    {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .p_source = CLMOE_P_SOFTMAX, .per_device = 1},
    {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .f_source = CLMOE_F_FRESH, .per_sequence = 1},
    {.kind = CLMOE_LOSS_COMMUNICATION, .weight = 1.0f},
    {.kind = CLMOE_LOSS_IMPORTANCE_VARIANCE, .weight = 1.0f, .p_source = CLMOE_P_RAW},
    {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f},
    {.kind = CLMOE_LOSS_Z, .weight = 1.0f},
    {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f},
    {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f, .p_source = CLMOE_P_SOFTMAX},
    {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f, .per_sequence = 1},
};

/* From the logits to the scores; of the scores that can be negative, none, one column or all are.
 */
typedef struct score_case {
    const char *name;
    float softcap, temperature, temperature_scale;
    clmoe_order order;
    enum { POSITIVE, ONE_NEGATIVE, NEGATIVE } sign;
} score_case;

/* clang-format off */

enum { FIRST = CLMOE_ORDER_SCORE_THEN_TOPK, LAST = CLMOE_ORDER_TOPK_THEN_SCORE }; /* the score */
enum { NONE = CLMOE_RENORM_NONE, SUM = CLMOE_RENORM_SUM, PNORM = CLMOE_RENORM_PNORM };

static const score_case score_cases[] = {
    /* name                              softcap, temperature, its scale, order, sign */
    {"the state's temperature",          0,    1,    1.5f, FIRST, POSITIVE},
    {"score last, negative",             0,    1,    1,    LAST,  NEGATIVE},
    {"softcap, one negative",            2.5f, 1,    1,    FIRST, ONE_NEGATIVE},
    {"softcap, both temperatures, last", 2.5f, 0.7f, 1.5f, LAST,  POSITIVE},
    {"temperature",                      0,    0.7f, 1,    FIRST, POSITIVE},
    {"temperature, last, negative",      0,    0.7f, 1,    LAST,  NEGATIVE},
    {"everything, one negative",         2.5f, 0.7f, 1.5f, FIRST, ONE_NEGATIVE},
    {"softcap, temperature, last",       2.5f, 0.7f, 1,    LAST,  POSITIVE},
};

/* clang-format on */

static void set_signs(balance_batch *b, const score_case *c) {
    for (size_t i = 0; i < 22 * 14; i++)
        if (c->sign == NEGATIVE || (c->sign == ONE_NEGATIVE && i % 14 == 5))
            b->logits[i] = -b->logits[i];
    balance_set_logits(b, b->logits);
}

static void check_score(uint32_t group_size, clmoe_score_function score, const score_case *c) {
    clmoe_layer_desc desc = small_desc();
    desc.router.score = score;
    desc.router.order = score == CLMOE_SCORE_SPARSEMIXER ? CLMOE_ORDER_TOPK_THEN_SCORE : c->order;
    desc.router.softcap = c->softcap;
    desc.router.temperature = c->temperature;
    balance_options options = everything;
    options.positive = score == CLMOE_SCORE_IDENTITY;
    test_case("group size %u, score %d, %s", group_size, score, c->name);
    seed_set((uint64_t)(c - score_cases) + 1);
    balance_batch b;
    balance_make(&b, &desc, 22, &options);
    if (score == CLMOE_SCORE_IDENTITY)
        set_signs(&b, c);
    ((clmoe_state *)(uintptr_t)b.in.state)->temperature_scale = c->temperature_scale;
    balance_upload(&b, group_size);
    for (size_t i = 0; i < COUNT_OF(ways); i++) {
        test_note("score %d, %s, %s", score, c->name, loss_label(&ways[i]));
        loss_check(&b, &ways[i]);
    }
}

/* With the group sizes in turn. */
static void every_score(void **state) {
    (void)state;
    for (int score = CLMOE_SCORE_SOFTMAX; score < SCORE_COUNT; score++)
        for (size_t i = 0; i < COUNT_OF(score_cases); i++)
            check_score(group_sizes[i % COUNT_OF(group_sizes)], (clmoe_score_function)score,
                        &score_cases[i]);
}

/* From the scores to the combine weights. */
typedef struct weight_case {
    const char *name;
    clmoe_order order;
    clmoe_renorm renorm;
    float p, eps, scale;
    uint32_t expert_scale;
    float softcap, temperature;
} weight_case;

/* clang-format off */

static const weight_case weight_cases[] = {
    /* name                                   order renorm p eps scale experts' softcap, temperature */
    {"softcap, temperature",                  FIRST, NONE,  1, 0,    1,    0, 2.5f, 0.8f},
    {"score last",                            LAST,  NONE,  2, 0,    1,    0, 0,    1},
    {"sum",                                   FIRST, SUM,   2, 0,    1,    0, 0,    1},
    {"sum, score last, temperature",          LAST,  SUM,   2, 0,    1,    0, 0,    0.8f},
    {"1-norm",                                FIRST, PNORM, 1, 0,    1,    0, 0,    1},
    {"2-norm, score last, softcap",           LAST,  PNORM, 2, 0,    1,    0, 2.5f, 1},
    {"experts' scale, temperature",           FIRST, NONE,  2, 0,    1,    1, 0,    0.8f},
    {"score last, all scales",                LAST,  NONE,  2, 0.1f, 2.5f, 1, 0,    1},
    {"sum with eps, all scales",              FIRST, SUM,   1, 0.1f, 2.5f, 1, 0,    1},
    {"sum with eps, score last, all scales",  LAST,  SUM,   2, 0.1f, 2.5f, 1, 0,    0.8f},
    {"2-norm, all scales, softcap",           FIRST, PNORM, 2, 0.1f, 2.5f, 1, 2.5f, 1},
    {"2-norm, score last, all scales",        LAST,  PNORM, 2, 0.1f, 2.5f, 1, 0,    1},
};

/* clang-format on */

#define OF_WEIGHTS(which, ...)                                                                     \
    {                                                                                              \
        .kind = CLMOE_LOSS_IMPORTANCE_##which, .weight = 1.5f, .p_source = CLMOE_P_WEIGHTS,        \
        __VA_ARGS__                                                                                \
    }
static const clmoe_loss_desc weight_losses[] = {
    OF_WEIGHTS(VARIANCE, .per_sequence = 0), OF_WEIGHTS(CV2, .per_sequence = 0),
    OF_WEIGHTS(VARIANCE, .per_sequence = 1), OF_WEIGHTS(CV2, .per_sequence = 1),
    OF_WEIGHTS(VARIANCE, .per_device = 1),   OF_WEIGHTS(CV2, .per_device = 1),
};

/* The batch of a score and a rule for weights, uploaded. */
static void make_weighted(uint32_t group_size, clmoe_score_function score, const weight_case *c,
                          uint32_t after_drop, balance_batch *b) {
    clmoe_layer_desc desc = small_desc();
    clmoe_router_desc *router = &desc.router;
    router->score = score;
    router->order = c->order;
    router->renorm.kind = c->renorm;
    router->renorm.p = c->p;
    router->renorm.eps = c->eps;
    router->renorm.after_drop = after_drop;
    router->scale = c->scale;
    router->expert_scale = c->expert_scale;
    router->softcap = c->softcap;
    router->temperature = c->temperature;
    balance_options options = everything;
    options.positive = score == CLMOE_SCORE_IDENTITY;
    test_case("group size %u, score %d, weights: %s", group_size, score, c->name);
    balance_make(b, &desc, 22, &options);
    balance_upload(b, group_size);
}

/* P from the combine weights: through the score, the renormalisation and the scales. */
static void combine_weights(void **state) {
    (void)state;
    for (int score = CLMOE_SCORE_SOFTMAX; score < SCORE_COUNT; score++)
        for (size_t i = 0; score != CLMOE_SCORE_SPARSEMIXER && i < COUNT_OF(weight_cases); i++) {
            balance_batch b;
            seed_set(i + 1);
            make_weighted(group_sizes[i % COUNT_OF(group_sizes)], (clmoe_score_function)score,
                          &weight_cases[i], 0, &b);
            for (size_t l = 0; l < COUNT_OF(weight_losses); l++)
                loss_check(&b, &weight_losses[l]);
        }
}

/* The same where weights are renormalised over the pairs that kept a place. */
static void renorm_after_drop(void **state) {
    (void)state;
    static const weight_case cases[] = {
        {"as they are", FIRST, NONE, 2, 0.25f, 1, 0, 0, 1},
        {"score last", LAST, NONE, 2, 0.25f, 1, 0, 0, 1},
        {"sum with eps", FIRST, SUM, 2, 0.25f, 1, 0, 0, 1},
        {"sum with eps, score last, experts' scale", LAST, SUM, 2, 0.25f, 1, 1, 0, 1},
        {"2-norm", FIRST, PNORM, 2, 0.25f, 1, 0, 0, 1},
        {"2-norm, score last", LAST, PNORM, 2, 0.25f, 1, 0, 0, 1},
    };
    for (int score = CLMOE_SCORE_SOFTMAX; score < SCORE_COUNT; score++)
        for (size_t i = 0; score != CLMOE_SCORE_SPARSEMIXER && i < COUNT_OF(cases); i++) {
            balance_batch b;
            seed_set(i + 1);
            make_weighted(group_sizes[i % COUNT_OF(group_sizes)], (clmoe_score_function)score,
                          &cases[i], 1, &b);
            loss_renorm_after_drop(&b);
            loss_check(&b, &weight_losses[0]);
            loss_check(&b, &weight_losses[1]);
        }
}

/* Experts that take their best 6 of 24 tokens: any number of pairs per token, T K = E C of all. */
static void expert_choice(void **state) {
    (void)state;
    static const clmoe_loss_desc losses[] = {
        {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.5f, .p_source = CLMOE_P_WEIGHTS},
        {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .f_source = CLMOE_F_FRESH},
        {.kind = CLMOE_LOSS_L1, .weight = 1.0f, .f_source = CLMOE_F_FIRST},
        {.kind = CLMOE_LOSS_COMMUNICATION, .weight = 1.0f},
    };
    const shape s = {24, 5, 12, 0, 3, 3};
    for (int score = CLMOE_SCORE_SOFTMAX; score < SCORE_COUNT; score++) {
        if (score == CLMOE_SCORE_SPARSEMIXER)
            continue;
        clmoe_layer_desc desc = desc_of(&s), plain = desc;
        size_t n = (size_t)s.tokens * s.experts, pairs = (size_t)s.tokens * s.top_k;
        plain.router.score = desc.router.score = (clmoe_score_function)score;
        desc.router.policy = CLMOE_POLICY_EXPERT_CHOICE;
        desc.router.expert_scale = 1;
        desc.capacity.rows = 6;
        desc.balance.device_groups = 4;
        balance_options options = {.kind = PATTERN_ZIPF, .positive = score == CLMOE_SCORE_IDENTITY};
        test_case("score %d", score);
        seed_set((uint64_t)score + 1);
        balance_batch b;
        balance_make(&b, &plain, s.tokens, &options);
        b.desc = desc;
        b.in.expert_scale = random_floats(s.experts, 1.0);
        int32_t *offsets = HOST(int32_t, s.tokens + 1), *ids = HOST(int32_t, pairs);
        double *scores = HOST(double, n), *wide = HOST(double, pairs);
        float *weights = HOST(float, pairs);
        const ref_weights scale = {.expert_scale = b.in.expert_scale};
        ref_scores(&desc, s.tokens, b.in.logits, scores);
        ref_expert_choice(&desc, s.tokens, scores, NULL, &scale, offsets, ids, wide);
        for (size_t p = 0; p < pairs; p++)
            weights[p] = (float)wide[p];
        b.in.live = NULL;
        b.in.token_offsets = offsets;
        b.in.ids = ids;
        b.in.pair_weights = weights;
        balance_upload(&b, group_sizes[(size_t)score % COUNT_OF(group_sizes)]);
        balance_compare_stats(&b, balance_stats(&b));
        for (size_t i = 0; i < COUNT_OF(losses); i++)
            loss_check(&b, &losses[i]);
    }
}

/* ---- Noise ----------------------------------------------------------------------------------- */

/* Smooth load, and other losses of noisy logits: both gradients. */
static void noise(void **state) {
    (void)state;
    static const clmoe_loss_desc losses[] = {
        {.kind = CLMOE_LOSS_SMOOTH_LOAD, .weight = 0.75f},
        {.kind = CLMOE_LOSS_SMOOTH_LOAD, .weight = 0.75f, .per_sequence = 1},
        {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f},
        {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .p_source = CLMOE_P_RAW},
        {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS},
        {.kind = CLMOE_LOSS_Z, .weight = 1.0f},
        {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f},
    };
    static const struct {
        const char *name;
        float scale, state_scale, softcap;
    } cases[] = {
        {"of deviation 1", 1.0f, 1.0f, 0.0f},
        {"of deviation 0.5", 0.5f, 1.0f, 0.0f},
        {"scaled by the state, softcap", 1.0f, 0.7f, 3.0f},
        {"scaled twice, softcap", 0.5f, 0.7f, 3.0f},
    };
    for (int kind = CLMOE_NOISE_GAUSSIAN; kind <= CLMOE_NOISE_LEARNED; kind++)
        for (size_t n = 0; n < COUNT_OF(cases); n++) {
            clmoe_layer_desc desc = small_desc();
            desc.router.noise.kind = (clmoe_noise)kind;
            desc.router.noise.scale = cases[n].scale;
            desc.router.softcap = cases[n].softcap;
            test_case("noise %d, %s", kind, cases[n].name);
            seed_set(n + 1);
            balance_batch b;
            balance_make(&b, &desc, 22, &everything);
            ((clmoe_state *)(uintptr_t)b.in.state)->noise_scale = cases[n].state_scale;
            loss_draw_noise(&b);
            balance_upload(&b, group_sizes[n % COUNT_OF(group_sizes)]);
            for (size_t i = 0; i < COUNT_OF(losses); i++) {
                test_note("noise %d, %s, %s", kind, cases[n].name, loss_label(&losses[i]));
                loss_check(&b, &losses[i]);
            }
        }
}

/* ---- Sizes and patterns ---------------------------------------------------------------------- */

/* Larger batches: values and gradients against the formulas alone. */
static void check_formulas(balance_batch *b, const clmoe_loss_desc *loss) {
    size_t n = (size_t)b->tokens * ref_columns(&b->desc);
    double *want = HOST(double, n);
    loss_result got = loss_run(b, loss, 1, NULL);
    ref_loss fixed;
    ref_loss_make(&b->desc, &b->in, loss, &fixed);
    ref_loss_gradient(&b->desc, &b->in, loss, &fixed, want, NULL, NULL);
    double value = fixed.value, size = 1.0, T = b->tokens;
    for (size_t e = 0; e < ref_columns(&b->desc) && T > 0.0; e++)
        size = fmax(size, fabs(fixed.scopes[0].g[e]));
    ref_loss_free(&fixed);
    double error = fabs((double)got.values[0] - value) / fmax(fabs(value), loss_floor(loss));
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)got.dlogits[i] - want[i]) * ((double)got.dlogits[i] - want[i]);
        norm += want[i] * want[i];
    }
    worst_note("every size, values", error);
    CHECK(error <= LOSS_TOLERANCE, "%s is %.9g, not %.9g\n", loss_label(loss),
          (double)got.values[0], value);
    /* Where nothing is left of g's size but its rounding, there are no digits to compare. */
    norm = fmax(sqrt(norm), T > 0.0 ? 1e-3 * size / sqrt(T) : 1.0);
    difference = sqrt(difference) / norm;
    worst_note("every size, dlogits", difference);
    CHECK(difference <= LOSS_TOLERANCE, "%s: dlogits are off by %g of %g\n", loss_label(loss),
          difference, norm);
}

static const struct {
    const char *name;
    bool mask, target;
} tokens_and_loads[] = {{"all tokens", false, false},
                        {"a mask", true, false},
                        {"a target", false, true},
                        {"a mask and a target", true, true}};

/* Sizes and patterns take those, the group sizes, and each third of the losses in turn. */
static void every_size(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(routing_shapes); i++)
        for (pattern kind = 0; kind < PATTERN_COUNT; kind++) {
            const shape *s = &routing_shapes[i];
            const size_t turn = i + kind, c = turn % COUNT_OF(tokens_and_loads);
            clmoe_layer_desc desc = desc_of(s);
            desc.capacity.factor = 0.8;
            balance_options options = {.kind = kind,
                                       .mask = tokens_and_loads[c].mask,
                                       .target = tokens_and_loads[c].target};
            test_case("T %u, E %u, Z %u, K %u, %s, %s", s->tokens, s->experts, s->identity,
                      s->top_k, pattern_name(kind), tokens_and_loads[c].name);
            seed_set(i + 1);
            balance_batch b;
            balance_make(&b, &desc, s->tokens, &options);
            balance_upload(&b, group_sizes[turn % COUNT_OF(group_sizes)]);
            for (clmoe_loss_kind k = (clmoe_loss_kind)(turn % 3); k < LOSS_KINDS; k += 3) {
                clmoe_loss_desc loss = {.kind = k, .weight = 1.0f};
                if (loss_is_defined(&desc, &loss))
                    check_formulas(&b, &loss);
            }
        }
}

/* ---- Rules ----------------------------------------------------------------------------------- */

static const clmoe_loss_desc many[] = {
    {.kind = CLMOE_LOSS_SWITCH, .weight = 0.5f},
    {.kind = CLMOE_LOSS_SWITCH, .weight = 2.0f, .f_source = CLMOE_F_FRESH, .per_sequence = 1},
    {.kind = CLMOE_LOSS_SQUARED, .weight = -1.0f, .f_source = CLMOE_F_SUPPLIED},
    {.kind = CLMOE_LOSS_ENTROPY, .weight = 1.0f, .p_source = CLMOE_P_RAW},
    {.kind = CLMOE_LOSS_L1, .weight = 1.0f, .per_sequence = 1},
    {.kind = CLMOE_LOSS_MAX, .weight = 1.0f, .p_source = CLMOE_P_SOFTMAX},
    {.kind = CLMOE_LOSS_MINIMAX, .weight = 1.0f, .f_source = CLMOE_F_EMA},
    {.kind = CLMOE_LOSS_IMPORTANCE_VARIANCE, .weight = 3.0f},
    {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS},
    {.kind = CLMOE_LOSS_LOAD_CV2, .weight = 1.0f, .f_source = CLMOE_F_FIRST},
    {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .per_device = 1, .per_sequence = 1},
    {.kind = CLMOE_LOSS_COMMUNICATION, .weight = 1.0f, .per_sequence = 1},
    {.kind = CLMOE_LOSS_OVERFLOW, .weight = 1.0f, .per_sequence = 1},
    {.kind = CLMOE_LOSS_Z, .weight = 0.01f},
    {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 0.1f, .per_sequence = 1},
    {.kind = CLMOE_LOSS_SQUARED, .weight = 1.5f, .controlled = 1},
};

/* Sixteen losses together equal the sum of each alone; a second run has the same bits. */
static void sum_of_losses(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = small_desc();
        test_case("group size %u", group_sizes[g]);
        seed_set(9);
        balance_batch b;
        balance_make(&b, &desc, 22, &everything);
        ((clmoe_state *)(uintptr_t)b.in.state)->loss_weight = 0.25f;
        balance_upload(&b, group_sizes[g]);
        size_t n = 22 * 14;
        double *sum = HOST(double, n), *want = HOST(double, n);
        for (size_t i = 0; i < COUNT_OF(many); i++) {
            loss_result one = loss_run(&b, &many[i], 1, NULL);
            for (size_t j = 0; j < n; j++)
                sum[j] += (double)one.dlogits[j];
            ref_loss fixed;
            ref_loss_make(&b.desc, &b.in, &many[i], &fixed);
            ref_loss_gradient(&b.desc, &b.in, &many[i], &fixed, want, NULL, NULL);
            ref_loss_free(&fixed);
        }
        loss_result all = loss_run(&b, many, COUNT_OF(many), NULL);
        compare_floats("the sum of dlogits", all.dlogits, sum, n, LOSS_TOLERANCE);
        compare_floats("dlogits", all.dlogits, want, n, LOSS_TOLERANCE);
        for (uint32_t i = 0; i < COUNT_OF(many); i++) {
            loss_result one = loss_run(&b, &many[i], 1, NULL);
            double value = (double)one.values[0];
            compare_floats("a value among others", &all.values[i], &value, 1, STEP_TOLERANCE);
        }
        loss_result again = loss_run(&b, many, COUNT_OF(many), NULL);
        compare_bits("dlogits again", again.dlogits, all.dlogits, n * 4);
    }
}

/* The gradient is added to what is there; rows of masked tokens keep their bits. */
static void adds(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = small_desc();
        test_case("group size %u", group_sizes[g]);
        seed_set(10);
        balance_batch b;
        balance_make(&b, &desc, 22, &everything);
        balance_upload(&b, group_sizes[g]);
        float *start = random_floats(22 * 14, 1.0);
        for (size_t i = 0; i < 22; i++)
            for (size_t j = 0; j < 14; j++)
                if (b.in.token_mask[i] == 0)
                    start[i * 14 + j] = j % 2 ? NAN : -0.0f;
        loss_result zero = loss_run(&b, many, COUNT_OF(many), NULL);
        loss_result some = loss_run(&b, many, COUNT_OF(many), start);
        for (size_t i = 0; i < 22 * 14; i++) {
            if (b.in.token_mask[i / 14] == 0) {
                compare_bits("a masked row", &some.dlogits[i], &start[i], 4);
                assert_true(zero.dlogits[i] == 0.0f);
                continue;
            }
            double want = (double)start[i] + (double)zero.dlogits[i];
            double size = fabs((double)start[i]) + fabs((double)zero.dlogits[i]);
            CHECK(fabs((double)some.dlogits[i] - want) <= 2e-7 * size, "[%zu] is %g, not %g\n", i,
                  (double)some.dlogits[i], want);
        }
    }
}

/* Outputs are optional, and the values alone do not touch anything else. */
static void outputs_are_optional(void **state) {
    (void)state;
    clmoe_layer_desc desc = small_desc();
    balance_batch b;
    balance_make(&b, &desc, 22, &everything);
    balance_upload(&b, 0);
    loss_result both = loss_run(&b, many, COUNT_OF(many), NULL);
    for (int only = 0; only < 2; only++) {
        clmoe_loss_args args = {.struct_size = sizeof args,
                                .tokens = 22,
                                .losses = many,
                                .num_losses = COUNT_OF(many),
                                .weights = &b.weights,
                                .logits = b.dev.logits,
                                .ids = b.dev.ids,
                                .pair_weights = b.dev.pair_weights,
                                .plan = b.dev.plan,
                                .live = b.dev.live,
                                .token_mask = b.dev.token_mask,
                                .state = b.dev.state,
                                .load_target = b.dev.load_target,
                                .load_supplied = b.dev.load_supplied,
                                .scratch = b.dev.scratch};
        if (only == 0)
            args.values = buf_new(COUNT_OF(many) * 4);
        else
            args.dlogits = buf_of(HOST(float, 22 * 14), 22 * 14 * 4);
        OK(clmoe_loss(b.layer, test.queue, &args, 0, NULL, NULL));
        if (only == 0)
            compare_bits("values", buf_get(args.values), both.values, COUNT_OF(many) * 4);
        else
            compare_bits("dlogits", buf_get(args.dlogits), both.dlogits, 22 * 14 * 4);
    }
}

/* A logit that is not finite has p = 0 and no gradient; nothing becomes NaN. */
static void nonfinite(void **state) {
    (void)state;
    for (int score = CLMOE_SCORE_SOFTMAX; score < SCORE_COUNT; score++)
        for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
            clmoe_layer_desc desc = small_desc();
            desc.router.score = (clmoe_score_function)score;
            if (score == CLMOE_SCORE_SPARSEMIXER)
                desc.router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
            desc.router.softcap = g == 1 ? 4.0f : 0.0f;
            balance_options options = everything;
            options.kind = PATTERN_NONFINITE;
            options.positive = score == CLMOE_SCORE_IDENTITY;
            test_case("score %d, group size %u", score, group_sizes[g]);
            seed_set((uint64_t)score + 20);
            balance_batch b;
            balance_make(&b, &desc, 22, &options);
            balance_upload(&b, group_sizes[g]);
            for (size_t i = 0; i < COUNT_OF(many); i++) {
                if (score == CLMOE_SCORE_SPARSEMIXER && many[i].p_source == CLMOE_P_WEIGHTS)
                    continue;
                test_note("score %d, group size %u, %s", score, group_sizes[g],
                          loss_label(&many[i]));
                loss_check(&b, &many[i]);
                loss_result got = loss_run(&b, &many[i], 1, NULL);
                for (size_t j = 0; j < 22 * 14; j++)
                    assert_true(isfinite(b.logits[j]) || got.dlogits[j] == 0.0f);
            }
        }
}

/* All tokens masked, or none: values of 0 where there is nothing to average, and no NaN. */
static void nothing(void **state) {
    (void)state;
    for (uint32_t tokens = 0; tokens < 10; tokens += 9) {
        clmoe_layer_desc desc = small_desc();
        balance_options options = everything;
        test_case("%u tokens", tokens);
        balance_batch b;
        balance_make(&b, &desc, tokens, &options);
        b.in.token_mask = HOST(uint8_t, tokens);
        balance_upload(&b, 0);
        loss_result got = loss_run(&b, many, COUNT_OF(many), NULL);
        for (size_t i = 0; i < COUNT_OF(many); i++)
            assert_true(isfinite(got.values[i]));
        for (size_t j = 0; j < tokens * 14; j++)
            assert_true(got.dlogits[j] == 0.0f);
    }
}

/* ---- Identities ------------------------------------------------------------------------------ */

/* Balanced F and P: switch 1, squared 0, entropy -log n, CV^2 0. */
static void balanced(void **state) {
    (void)state;
    const shape s = {32, 5, 16, 0, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    static const clmoe_loss_desc losses[] = {
        {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f},
        {.kind = CLMOE_LOSS_SQUARED, .weight = 1.0f},
        {.kind = CLMOE_LOSS_ENTROPY, .weight = 1.0f},
        {.kind = CLMOE_LOSS_LOAD_CV2, .weight = 1.0f},
        {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f},
        {.kind = CLMOE_LOSS_L1, .weight = 1.0f},
        {.kind = CLMOE_LOSS_MAX, .weight = 1.0f},
        {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f},
        {.kind = CLMOE_LOSS_Z, .weight = 1.0f},
    };
    const double n = 16.0;
    const double want[] = {1.0, 0.0, -log(n), 0.0, 0.0, 0.0, 1.0 / n, -log(n), log(n) * log(n)};
    balance_options options = {.kind = PATTERN_UNIFORM};
    balance_batch b;
    balance_make(&b, &desc, 32, &options);
    int32_t *ids = HOST(int32_t, 64);
    for (int32_t p = 0; p < 64; p++)
        ids[p] = p % 16;
    b.in.ids = ids;
    b.in.live = NULL;
    balance_set_logits(&b, HOST(float, 32 * 16));
    balance_upload(&b, 0);
    loss_result got = loss_run(&b, losses, COUNT_OF(losses), NULL);
    for (size_t i = 0; i < COUNT_OF(losses); i++)
        CHECK(fabs((double)got.values[i] - want[i]) <= 1e-6 * fmax(1.0, fabs(want[i])),
              "%s is %g, not %g\n", loss_label(&losses[i]), (double)got.values[i], want[i]);
}

/* The gradient of switch is n times that of squared with uniform Q; constants in g do not count. */
static void switch_and_squared(void **state) {
    (void)state;
    clmoe_layer_desc desc = small_desc();
    desc.num_identity_experts = 0; /* so that the p of the experts sum to 1 */
    balance_options options = {.kind = PATTERN_ZIPF, .mask = true};
    balance_batch b;
    seed_set(12);
    balance_make(&b, &desc, 22, &options);
    balance_upload(&b, 0);
    clmoe_loss_desc loss = {.kind = CLMOE_LOSS_SQUARED, .weight = 12.0f};
    loss_result squared = loss_run(&b, &loss, 1, NULL);
    loss = (clmoe_loss_desc){.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f};
    loss_result switched = loss_run(&b, &loss, 1, NULL);
    double *want = HOST(double, 22 * 12);
    for (size_t i = 0; i < 22 * 12; i++)
        want[i] = (double)squared.dlogits[i];
    compare_floats("n times squared", switched.dlogits, want, 22 * 12, LOSS_TOLERANCE);
}

static void names(void **state) {
    (void)state;
    assert_string_equal(clmoe_loss_name(CLMOE_LOSS_SWITCH), "switch");
    assert_string_equal(clmoe_loss_name(CLMOE_LOSS_SQUARED), "squared");
    for (clmoe_loss_kind a = 0; a < LOSS_KINDS; a++)
        for (clmoe_loss_kind b = 0; b < a; b++)
            assert_string_not_equal(clmoe_loss_name(a), clmoe_loss_name(b));
    assert_null(clmoe_loss_name(LOSS_KINDS));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_combination),
        TEST(every_score),
        TEST(combine_weights),
        TEST(renorm_after_drop),
        TEST(expert_choice),
        TEST(noise),
        TEST(every_size),
        TEST(sum_of_losses),
        TEST(adds),
        TEST(nonfinite),
        TEST(nothing),
        TEST(outputs_are_optional),
        TEST(balanced),
        TEST(switch_and_squared),
        TEST(names),
    };
    return RUN(tests);
}
