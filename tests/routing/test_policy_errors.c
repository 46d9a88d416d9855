/* What the policies of choice refuse: descriptors that contradict themselves, and wrong arguments.
 */
#include "support.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

typedef struct refusal {
    const char *base; /* a variant */
    void (*spoil)(clmoe_layer_desc *desc);
    const char *says;
} refusal;

/* clang-format off */
static void below_policy(clmoe_layer_desc *d) { d->router.policy = (clmoe_policy)-1; }
static void no_policy(clmoe_layer_desc *d)    { d->router.policy = (clmoe_policy)5; }
static void no_capacity(clmoe_layer_desc *d)  { d->capacity.factor = 0; }
static void by_logit(clmoe_layer_desc *d)     { d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE; }
static void renorm(clmoe_layer_desc *d)       { d->router.renorm.kind = CLMOE_RENORM_SUM; }
static void late(clmoe_layer_desc *d)         { d->router.renorm.after_drop = 1; }
static void identity(clmoe_layer_desc *d)     { d->num_identity_experts = 1; }
static void keep(clmoe_layer_desc *d)         { d->capacity.keep = CLMOE_KEEP_WEIGHT; }
static void reroute(clmoe_layer_desc *d)      { d->capacity.overflow = CLMOE_OVERFLOW_REROUTE; }
static void sequences(clmoe_layer_desc *d)    { d->capacity.tokens_per_sequence = 4; }
static void groups(clmoe_layer_desc *d)       { d->router.groups.count = 2; d->router.groups.topk = 2; }
static void select_bias(clmoe_layer_desc *d)  { d->router.select_bias = 1; }
static void rebalance(clmoe_layer_desc *d)    { d->router.rebalance.iterations = 1; }
static void in_levels(clmoe_layer_desc *d)    { d->router.groups.two_level = 1; }
static void level_two(clmoe_layer_desc *d)    { d->router.groups.two_level = 2; }
static void no_rounds(clmoe_layer_desc *d)    { d->router.sinkhorn.iterations = 0; }
static void many_rounds(clmoe_layer_desc *d)  { d->router.sinkhorn.iterations = 1001; }
static void below_zero(clmoe_layer_desc *d)   { d->router.sinkhorn.tolerance = -1; }
static void no_number(clmoe_layer_desc *d)    { d->router.sinkhorn.tolerance = NAN; }
static void one_less(clmoe_layer_desc *d)     { d->top_k--; }
static void one_group(clmoe_layer_desc *d)    { d->router.groups.count = 1; }
static void no_slots(clmoe_layer_desc *d)     { d->router.soft_moe.slots = 0; }
static void two_choices(clmoe_layer_desc *d)  { d->top_k = 2; }
static void many_slots(clmoe_layer_desc *d)   { d->router.soft_moe.slots = UINT32_MAX; }
static void no_scale(clmoe_layer_desc *d)     { d->router.soft_moe.scale = INFINITY; }
static void warm(clmoe_layer_desc *d)         { d->router.temperature = 2; }
static void scale(clmoe_layer_desc *d)        { d->router.scale = 3; }
static void softcap(clmoe_layer_desc *d)      { d->router.softcap = 1; }
static void capacity(clmoe_layer_desc *d)     { d->capacity.rows = 9; }
static void weight_in(clmoe_layer_desc *d)    { d->router.weight_at = CLMOE_WEIGHT_AT_INPUT; }
static void sigmoid(clmoe_layer_desc *d)      { d->router.score = CLMOE_SCORE_SIGMOID; }
static void odd(clmoe_layer_desc *d)          { d->top_k = 5; }
static void too_many(clmoe_layer_desc *d)     { d->top_k = 8; }
static void full_reroute(clmoe_layer_desc *d) {
    d->capacity.rows = 2;
    d->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
}
static void mixer(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SPARSEMIXER;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

static const refusal refusals[] = {
    {"expert choice", no_policy, "router.policy is 5"},
    {"expert choice", below_policy, "router.policy is 4294967295"},
    {"expert choice", no_capacity, "needs a capacity"},
    {"expert choice", by_logit, "router.order is 1"},
    {"expert choice", mixer, "sparsemixer"},
    {"expert choice", renorm, "router.renorm.kind is 1"},
    {"expert choice", late, "router.renorm.after_drop is 1"},
    {"expert choice", identity, "num_identity_experts is 1"},
    {"expert choice", keep, "capacity.keep is 3"},
    {"expert choice", reroute, "capacity.overflow is reroute"},
    {"expert choice", sequences, "capacity.tokens_per_sequence is 4"},
    {"expert choice", groups, "router.groups.count is 2"},
    {"expert choice", select_bias, "router.select_bias is 1"},
    {"expert choice", rebalance, "router.rebalance.iterations is 1"},
    {"expert choice", in_levels, "router.groups.two_level is 1"},
    {"Sinkhorn", no_rounds, "router.sinkhorn.iterations is 0"},
    {"Sinkhorn", many_rounds, "router.sinkhorn.iterations is 1001"},
    {"Sinkhorn", below_zero, "router.sinkhorn.tolerance is -1"},
    {"Sinkhorn", no_number, "router.sinkhorn.tolerance is nan"},
    {"Sinkhorn", full_reroute, "router.policy is not token choice"},
    {"Sinkhorn", by_logit, "router.order is 1"},
    {"Sinkhorn", mixer, "sparsemixer"},
    {"Sinkhorn", groups, "router.groups.count is 2"},
    {"Sinkhorn", select_bias, "router.select_bias is 1"},
    {"all experts", one_less, "top_k is 11"},
    {"all experts", groups, "router.groups.count is 2"},
    {"all experts", mixer, "sparsemixer"},
    {"all experts", rebalance, "router.policy is neither token choice nor sinkhorn"},
    {"Soft MoE", no_slots, "router.soft_moe.slots is 0"},
    {"Soft MoE", two_choices, "top_k is 2"},
    {"Soft MoE", identity, "num_identity_experts is 1"},
    {"Soft MoE", renorm, "router.renorm.kind is 1"},
    {"Soft MoE", many_slots, "router.soft_moe.slots is 4294967295"},
    {"Soft MoE", no_scale, "router.soft_moe.scale is inf"},
    {"Soft MoE", warm, "router.temperature is 2"},
    {"Soft MoE", scale, "router.scale is 3"},
    {"Soft MoE", softcap, "router.softcap is 1"},
    {"Soft MoE", capacity, "capacity.rows is 9"},
    {"Soft MoE", weight_in, "router.weight_at is 1"},
    {"two levels", level_two, "router.groups.two_level is 2"},
    {"two levels", one_group, "router.groups.count is 1"},
    {"two levels", sigmoid, "router.score is 1"},
    {"two levels", by_logit, "router.order is 1"},
    {"two levels", full_reroute, "router.groups.two_level is 1"},
    {"two levels", odd, "does not divide top_k 5"},
    {"two levels", too_many, "its groups hold 6 experts"},
};
/* clang-format on */

static void contradictions(void **state) {
    (void)state;
    const shape s = {1, 5, 12, 0, 3, 3};
    for (size_t i = 0; i < COUNT_OF(refusals); i++) {
        clmoe_layer *layer = NULL;
        clmoe_layer_desc desc = desc_of(&s);
        test_case("%s, %s", refusals[i].base, refusals[i].says);
        variant_set(&desc, refusals[i].base, NULL);
        refusals[i].spoil(&desc);
        clmoe_status status = clmoe_layer_create(test_context(0), &desc, &layer);
        CHECK(status == CLMOE_INVALID_DESC && layer == NULL, "the status is %d\n", (int)status);
        CHECK(strstr(clmoe_last_error(), refusals[i].says), "it says: %s\n", clmoe_last_error());
    }
}

/* A small batch of a policy, ready to run, with one argument to spoil. */
static clmoe_forward_args *small_batch(const char *policy, batch *b, device_batch *d,
                                       clmoe_layer **layer) {
    const shape s = {7, 5, 12, 0, 3, 3};
    clmoe_layer_desc desc = desc_of(&s);
    variant_set(&desc, policy, NULL);
    batch_make(b, &desc, s.tokens);
    *layer = test_layer(0, &desc);
    batch_upload(*layer, b, d);
    return &d->args;
}

static void check_refused(clmoe_layer *layer, const clmoe_forward_args *args, const char *says) {
    clmoe_status status = clmoe_forward(layer, test.queue, args, 0, NULL, NULL);
    CHECK(status == CLMOE_INVALID_ARGUMENT, "the status is %d\n", (int)status);
    CHECK(strstr(clmoe_last_error(), says), "it says: %s\n", clmoe_last_error());
    CHECK(all_untouched(), "something was written\n");
}

static void wrong_arguments(void **state) {
    (void)state;
    batch b;
    device_batch d;
    clmoe_layer *layer;
    test_case("external ids for expert choice");
    clmoe_forward_args *args = small_batch("expert choice", &b, &d, &layer);
    args->ids_in = args->pair_weights_in = buf_new(1024);
    check_refused(layer, args, "ids_in is given, but the policy is expert choice");
    test_case("token_offsets for token choice");
    args = small_batch("Sinkhorn", &b, &d, &layer);
    args->token_offsets = buf_new(1024);
    check_refused(layer, args, "token_offsets is given, but the policy is not expert choice");
    test_case("two levels without a group router");
    args = small_batch("two levels", &b, &d, &layer);
    d.weights.group_router = (clmoe_buf){NULL, 0};
    check_refused(layer, args, "weights.group_router is not given");
    test_case("ids of Soft MoE");
    args = small_batch("Soft MoE", &b, &d, &layer);
    args->ids = buf_new(1024);
    check_refused(layer, args, "ids is given, but the policy is Soft MoE");
    test_case("a loss of Soft MoE");
    const clmoe_loss_desc loss = {.kind = CLMOE_LOSS_Z, .weight = 1.0f};
    args = small_batch("Soft MoE", &b, &d, &layer);
    args->losses = &loss;
    args->num_losses = 1;
    check_refused(layer, args, "num_losses is 1, but the policy is Soft MoE");
}

/* The steps of their own ask for what the policy needs. */
static void wrong_steps(void **state) {
    (void)state;
    batch b;
    device_batch d;
    clmoe_layer *layer;
    test_case("Sinkhorn without scratch");
    small_batch("Sinkhorn", &b, &d, &layer);
    clmoe_topk_args topk = {.struct_size = sizeof topk, .tokens = 7};
    topk.scores = buf_new(7 * 12 * 4);
    topk.ids = topk.pair_weights = topk.live = buf_new(7 * 3 * 4);
    CHECK(clmoe_topk(layer, test.queue, &topk, 0, NULL, NULL) == CLMOE_INVALID_ARGUMENT &&
              strstr(clmoe_last_error(), "scratch is not given"),
          "it says: %s\n", clmoe_last_error());
    test_case("expert choice without token_offsets");
    small_batch("expert choice", &b, &d, &layer);
    topk = (clmoe_topk_args){.struct_size = sizeof topk, .tokens = 7};
    topk.scores = topk.ids = topk.pair_weights = topk.scratch = buf_new(1 << 20);
    CHECK(clmoe_topk(layer, test.queue, &topk, 0, NULL, NULL) == CLMOE_INVALID_ARGUMENT &&
              strstr(clmoe_last_error(), "token_offsets is not given"),
          "it says: %s\n", clmoe_last_error());
    test_case("a step of Soft MoE");
    small_batch("Soft MoE", &b, &d, &layer);
    CHECK(clmoe_topk(layer, test.queue, &topk, 0, NULL, NULL) == CLMOE_UNSUPPORTED &&
              strstr(clmoe_last_error(), "Soft MoE, which has no such step"),
          "it says: %s\n", clmoe_last_error());
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(contradictions),
        TEST(wrong_arguments),
        TEST(wrong_steps),
    };
    return RUN(tests);
}
