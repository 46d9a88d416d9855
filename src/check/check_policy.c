/* The descriptor's policy of choice: its ranges, and what it cannot be together with. */
#include "check.h"

#include <math.h>

#define MAX_SLOTS (1u << 20)

/* A field that a policy has no use for. */
typedef struct unused_field {
    const char *name;
    uint32_t value, must_be;
} unused_field;

static clmoe_status check_unused(const char *policy, const unused_field *fields, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (fields[i].value != fields[i].must_be)
            return fail(CLMOE_INVALID_DESC, "%s is %u, but with %s it must be %u", fields[i].name,
                        fields[i].value, policy, fields[i].must_be);
    return CLMOE_SUCCESS;
}

#define CHECK_UNUSED(policy, fields)                                                               \
    check_unused((policy), (fields), sizeof(fields) / sizeof(fields)[0])

/* What only plain token choice has. */
static clmoe_status check_token_choice_only(const clmoe_layer_desc *desc, const char *policy) {
    const clmoe_router_desc *router = &desc->router;
    const unused_field fields[] = {
        {"router.groups.two_level", router->groups.two_level, 0},
        {"router.select_bias", router->select_bias, 0},
        {"router.groups.count", router->groups.count > 1 ? router->groups.count : 0, 0},
        {"capacity.overflow", desc->capacity.overflow, CLMOE_OVERFLOW_DROP},
    };
    if (router->score == CLMOE_SCORE_SPARSEMIXER)
        return fail(CLMOE_INVALID_DESC, "router.score is sparsemixer, but the policy is %s",
                    policy);
    return CHECK_UNUSED(policy, fields);
}

static clmoe_status check_expert_choice(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
    const unused_field fields[] = {
        {"num_identity_experts", desc->num_identity_experts, 0},
        {"router.order", router->order, CLMOE_ORDER_SCORE_THEN_TOPK},
        {"router.renorm.kind", router->renorm.kind, CLMOE_RENORM_NONE},
        {"router.renorm.after_drop", router->renorm.after_drop, 0},
        {"router.rebalance.iterations", router->rebalance.iterations, 0},
        {"capacity.keep", desc->capacity.keep, CLMOE_KEEP_POSITION},
        {"capacity.tokens_per_sequence", desc->capacity.tokens_per_sequence, 0},
    };
    if (desc->capacity.rows == 0 && desc->capacity.factor == 0)
        return fail(CLMOE_INVALID_DESC, "capacity.rows and capacity.factor are 0, but expert "
                                        "choice needs a capacity");
    return CHECK_UNUSED("expert choice", fields);
}

static clmoe_status check_sinkhorn(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
    const unused_field fields[] = {
        {"router.order", router->order, CLMOE_ORDER_SCORE_THEN_TOPK},
    };
    if (router->sinkhorn.iterations < 1 || router->sinkhorn.iterations > 1000)
        return fail(CLMOE_INVALID_DESC,
                    "router.sinkhorn.iterations is %u, but must be from 1 to 1000",
                    router->sinkhorn.iterations);
    if (!isfinite(router->sinkhorn.tolerance) || router->sinkhorn.tolerance < 0)
        return fail(CLMOE_INVALID_DESC,
                    "router.sinkhorn.tolerance is %g, but must be finite and at least 0",
                    (double)router->sinkhorn.tolerance);
    return CHECK_UNUSED("Sinkhorn", fields);
}

static clmoe_status check_all_experts(const clmoe_layer_desc *desc) {
    uint32_t columns = desc->num_experts + desc->num_identity_experts;
    if (desc->top_k != columns)
        return fail(CLMOE_INVALID_DESC,
                    "top_k is %u, but with the policy all experts it must be %u", desc->top_k,
                    columns);
    return CLMOE_SUCCESS;
}

static clmoe_status check_soft_moe(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
    const unused_field fields[] = {
        {"top_k", desc->top_k, 1},
        {"num_identity_experts", desc->num_identity_experts, 0},
        {"router.score", router->score, CLMOE_SCORE_SOFTMAX},
        {"router.order", router->order, CLMOE_ORDER_SCORE_THEN_TOPK},
        {"router.bias", router->bias, 0},
        {"router.renorm.kind", router->renorm.kind, CLMOE_RENORM_NONE},
        {"router.renorm.after_drop", router->renorm.after_drop, 0},
        {"router.expert_scale", router->expert_scale, 0},
        {"router.weight_at", router->weight_at, CLMOE_WEIGHT_AT_OUTPUT},
        {"router.noise.kind", router->noise.kind, CLMOE_NOISE_NONE},
        {"router.rebalance.iterations", router->rebalance.iterations, 0},
        {"router.noise.jitter", router->noise.jitter > 0, 0},
        {"router.dropout.experts", router->dropout.experts > 0, 0},
        {"router.dropout.logits", router->dropout.logits > 0, 0},
        {"capacity.rows", desc->capacity.rows, 0},
        {"capacity.factor", desc->capacity.factor > 0, 0},
        {"capacity.keep", desc->capacity.keep, CLMOE_KEEP_POSITION},
        {"capacity.tokens_per_sequence", desc->capacity.tokens_per_sequence, 0},
    };
    if (router->soft_moe.slots < 1 || router->soft_moe.slots > MAX_SLOTS / desc->num_experts)
        return fail(CLMOE_INVALID_DESC,
                    "router.soft_moe.slots is %u, but with %u experts must be from 1 to %u",
                    router->soft_moe.slots, desc->num_experts, MAX_SLOTS / desc->num_experts);
    if (!isfinite(router->soft_moe.scale))
        return fail(CLMOE_INVALID_DESC, "router.soft_moe.scale is %g, but must be finite",
                    (double)router->soft_moe.scale);
    if (router->softcap != 0 || router->temperature != 1 || router->scale != 1)
        return fail(CLMOE_INVALID_DESC, "router.%s is %g, but Soft MoE has soft_moe.scale instead",
                    router->softcap != 0       ? "softcap"
                    : router->temperature != 1 ? "temperature"
                                               : "scale",
                    (double)(router->softcap != 0       ? router->softcap
                             : router->temperature != 1 ? router->temperature
                                                        : router->scale));
    return CHECK_UNUSED("Soft MoE", fields);
}

static clmoe_status check_two_level(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
    const unused_field fields[] = {
        {"router.score", router->score, CLMOE_SCORE_SOFTMAX},
        {"router.order", router->order, CLMOE_ORDER_SCORE_THEN_TOPK},
    };
    if (router->groups.count <= 1)
        return fail(CLMOE_INVALID_DESC,
                    "router.groups.count is %u, but groups.two_level needs at least 2",
                    router->groups.count);
    if (desc->top_k % router->groups.topk != 0)
        return fail(CLMOE_INVALID_DESC, "router.groups.topk is %u, but does not divide top_k %u",
                    router->groups.topk, desc->top_k);
    return CHECK_UNUSED("two_level", fields);
}

static clmoe_status check_token_choice(const clmoe_layer_desc *desc) {
    return desc->router.groups.two_level ? check_two_level(desc) : CLMOE_SUCCESS;
}

/* Rounding takes tokens from all that did not choose, and changes how many pairs a token has. */
static clmoe_status check_token_rounding(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
    const struct {
        bool is;
        const char *why;
    } reasons[] = {
        {router->policy != CLMOE_POLICY_TOKEN_CHOICE, "router.policy is not token choice"},
        {router->groups.two_level, "router.groups.two_level is 1"},
        {router->groups.count > 1, "there are router.groups"},
        {router->score == CLMOE_SCORE_SPARSEMIXER, "router.score is sparsemixer"},
        {router->renorm.kind != CLMOE_RENORM_NONE && !router->renorm.after_drop,
         "router.renorm.after_drop is 0, with a router.renorm.kind: weights are of the experts a "
         "token ends with"},
        {router->rebalance.iterations > 0, "router.rebalance.iterations is given"},
        {desc->num_identity_experts > 0, "there are identity experts"},
        {desc->capacity.rows > 0 || desc->capacity.factor > 0,
         "capacity.rows or capacity.factor is given: it rounds without a capacity"},
        {desc->capacity.tokens_per_sequence > 0, "capacity.tokens_per_sequence is given"},
    };
    if (desc->capacity.keep != CLMOE_KEEP_ROUND)
        return CLMOE_SUCCESS;
    for (size_t i = 0; i < sizeof reasons / sizeof reasons[0]; i++)
        if (reasons[i].is)
            return fail(CLMOE_INVALID_DESC, "capacity.keep is round, but %s", reasons[i].why);
    return CLMOE_SUCCESS;
}

/* By clmoe_policy. */
static const struct policy_rule {
    const char *name;
    clmoe_status (*check)(const clmoe_layer_desc *desc);
} policies[] = {
    [CLMOE_POLICY_TOKEN_CHOICE] = {"token choice", check_token_choice},
    [CLMOE_POLICY_EXPERT_CHOICE] = {"expert choice", check_expert_choice},
    [CLMOE_POLICY_SINKHORN] = {"Sinkhorn", check_sinkhorn},
    [CLMOE_POLICY_ALL_EXPERTS] = {"all experts", check_all_experts},
    [CLMOE_POLICY_SOFT_MOE] = {"Soft MoE", check_soft_moe},
};
enum { POLICIES = sizeof policies / sizeof policies[0] };

clmoe_status check_policy(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &desc->router;
    uint32_t policy = router->policy;
    if (policy >= POLICIES)
        return fail(CLMOE_INVALID_DESC, "router.policy is %u, but must be from 0 to %d", policy,
                    POLICIES - 1);
    if (router->groups.two_level > 1)
        return fail(CLMOE_INVALID_DESC, "router.groups.two_level is %u, but must be from 0 to 1",
                    router->groups.two_level);
    if (policy != CLMOE_POLICY_TOKEN_CHOICE)
        TRY(check_token_choice_only(desc, policies[policy].name));
    TRY(policies[policy].check(desc));
    TRY(check_token_rounding(desc));
done:
    return status;
}
