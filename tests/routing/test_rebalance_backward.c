/* Weight rebalancing backwards: iteration by iteration, with tokens that take no part. */
#include "support.h"
#include "support_backward.h"

#include <math.h>

typedef struct rebalance_case {
    uint32_t iterations;
    float mu;
    clmoe_score_function score;
    clmoe_renorm renorm;
} rebalance_case;

/* With mu 0 most weights become 0; 40 iterations are more than a word has bits. */
static const rebalance_case rebalance_cases[] = {
    {1, 1.0f, CLMOE_SCORE_SOFTMAX, CLMOE_RENORM_NONE},
    {1, 0.0f, CLMOE_SCORE_SIGMOID, CLMOE_RENORM_SUM},
    {5, 1.0f, CLMOE_SCORE_SIGMOID, CLMOE_RENORM_NONE},
    {9, 0.0f, CLMOE_SCORE_SOFTMAX, CLMOE_RENORM_SUM},
    {40, 0.1f, CLMOE_SCORE_SIGMOID, CLMOE_RENORM_SUM},
    {40, 10.0f, CLMOE_SCORE_SOFTMAX, CLMOE_RENORM_NONE},
};

/* Tokens, D, E, identity experts, K, H; many blocks of tokens in the last. */
static const shape shapes[] = {
    {33, 21, 12, 0, 3, 19}, {7, 13, 5, 2, 4, 9}, {1, 13, 5, 0, 2, 9}, {1500, 5, 9, 1, 3, 4}};

static clmoe_layer_desc desc_of_case(const shape *s, const rebalance_case *c) {
    clmoe_layer_desc desc = desc_of(s);
    desc.router.score = c->score;
    desc.router.renorm.kind = c->renorm;
    desc.router.rebalance.iterations = c->iterations;
    desc.router.rebalance.mu = c->mu;
    desc.training = 1;
    return desc;
}

static void check(const clmoe_layer_desc *desc, uint32_t tokens, uint32_t inputs,
                  uint32_t group_size, const char *name) {
    training_batch *t = training_make(desc, tokens, inputs);
    training_forward(t, group_size);
    training_backward(t);
    training_compare(t, name);
}

static void every_case(void **state) {
    (void)state;
    static const uint32_t inputs[] = {0, WITH_MASK | WITH_NAN_ROWS, WITH_LOGITS_IN | WITH_MASK,
                                      WITH_DLOGITS};
    for (size_t i = 0; i < COUNT_OF(shapes); i++)
        for (size_t c = 0; c < COUNT_OF(rebalance_cases); c++) {
            const clmoe_layer_desc desc = desc_of_case(&shapes[i], &rebalance_cases[c]);
            const uint32_t group = group_sizes[(i + c) % COUNT_OF(group_sizes)];
            test_case("T %u, case %zu, group size %u", shapes[i].tokens, c, group);
            check(&desc, shapes[i].tokens, inputs[(i + c) % COUNT_OF(inputs)], group,
                  "rebalancing");
        }
}

static void every_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (uint32_t tokens = 0; tokens <= 33; tokens += 33) {
            clmoe_layer_desc desc = desc_of_case(&shapes[0], &rebalance_cases[2]);
            desc.engine = engines[n];
            desc.capacity.factor = 0.8;
            desc.router.expert_scale = 1;
            test_case("engine %s, T %u", engines[n], tokens);
            check(&desc, tokens, WITH_MASK, 0, NULL);
        }
}

static void sinkhorn(clmoe_layer_desc *desc) {
    desc->router.policy = CLMOE_POLICY_SINKHORN;
}

static void two_levels(clmoe_layer_desc *desc) {
    desc->router.groups.count = 3;
    desc->router.groups.topk = 2;
    desc->router.groups.two_level = 1;
    desc->router.temperature = 0.8f;
    desc->router.softcap = 3.0f;
    desc->router.scale = 2.0f;
}

static void sparsemixer(clmoe_layer_desc *desc) {
    desc->top_k = 2;
    desc->router.score = CLMOE_SCORE_SPARSEMIXER;
    desc->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    desc->router.sparsemixer_eps = 0.5f;
}

static void softmax_of_chosen(clmoe_layer_desc *desc) {
    desc->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    desc->router.renorm.kind = CLMOE_RENORM_PNORM;
    desc->router.renorm.p = 2.0f;
}

/* Who chose, and how the weights before follow from the logits. */
static void every_choice(void **state) {
    (void)state;
    static const struct {
        const char *name;
        void (*set)(clmoe_layer_desc *desc);
    } choices[] = {{"Sinkhorn", sinkhorn},
                   {"two levels", two_levels},
                   {"sparsemixer", sparsemixer},
                   {"softmax of the chosen", softmax_of_chosen}};
    static const shape s = {33, 21, 12, 0, 4, 19};
    for (size_t i = 0; i < COUNT_OF(choices); i++)
        for (uint32_t scaled = 0; scaled < 2; scaled++) {
            clmoe_layer_desc desc = desc_of_case(&s, &rebalance_cases[0]);
            desc.router.rebalance.iterations = 6;
            desc.router.expert_scale = scaled;
            choices[i].set(&desc);
            test_case("%s, expert_scale %u", choices[i].name, scaled);
            check(&desc, s.tokens, WITH_MASK, 0, "rebalancing, policies");
        }
}

/* Rows without a positive sum keep their weights. */
static void weights_of_any_sign(void **state) {
    (void)state;
    for (size_t c = 0; c < COUNT_OF(rebalance_cases); c++) {
        clmoe_layer_desc desc = desc_of_case(&shapes[0], &rebalance_cases[c]);
        desc.router.score = CLMOE_SCORE_IDENTITY;
        desc.router.renorm.kind = CLMOE_RENORM_NONE;
        desc.router.expert_scale = 1; /* of both signs */
        test_case("case %zu", c);
        check(&desc, shapes[0].tokens, 0, 0, NULL);
    }
}

/* With ids from the caller nothing is rebalanced. */
static void choice_of_the_caller(void **state) {
    (void)state;
    const clmoe_layer_desc desc = desc_of_case(&shapes[0], &rebalance_cases[2]);
    test_case("ids_in");
    check(&desc, shapes[0].tokens, WITH_IDS_IN, 0, NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_case),          TEST(every_engine),         TEST(every_choice),
        TEST(weights_of_any_sign), TEST(choice_of_the_caller),
    };
    return RUN(tests);
}
