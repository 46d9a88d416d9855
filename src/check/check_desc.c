/* The layer descriptor: every field's range, and the pairs of fields that contradict each other. */
#include "check.h"
#include "runtime/structs.h"

#include <math.h>

enum { MAX_TOP_K = 256, MAX_GROUPS = 256, MAX_DIM = 1 << 24, MAX_ITERATIONS = 1000 };

static clmoe_status in_range(const char *name, uint32_t value, uint32_t low, uint32_t high) {
    if (value >= low && value <= high)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_DESC, "%s is %u, but must be from %u to %u", name, value, low, high);
}

static clmoe_status is_flag(const char *name, uint32_t value) {
    return in_range(name, value, 0, 1);
}

static clmoe_status is_at_least(const char *name, double value, double low) {
    if (isfinite(value) && value >= low)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_DESC, "%s is %g, but must be finite and at least %g", name, value,
                low);
}

static clmoe_status check_sizes(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t experts = desc->num_experts, identity = desc->num_identity_experts;
    TRY(in_range("dim", desc->dim, 1, MAX_DIM));
    TRY(in_range("num_experts", experts, 1, MAX_COLUMNS));
    TRY(in_range("num_identity_experts", identity, 0, MAX_COLUMNS));
    if (experts + identity > MAX_COLUMNS)
        return fail(CLMOE_INVALID_DESC,
                    "num_experts %u and num_identity_experts %u are together more than %d", experts,
                    identity, MAX_COLUMNS);
    TRY(in_range("top_k", desc->top_k, 1,
                 desc->router.policy == CLMOE_POLICY_ALL_EXPERTS ? MAX_COLUMNS : MAX_TOP_K));
    if (desc->top_k > experts + identity)
        return fail(CLMOE_INVALID_DESC, "top_k is %u, but num_experts%s is %u", desc->top_k,
                    identity > 0 ? " + num_identity_experts" : "", experts + identity);
    TRY(in_range("type", desc->type, 0, CLMOE_BF16));
    TRY(in_range("weight_type", desc->weight_type, 0, CLMOE_BF16));
    TRY(is_flag("training", desc->training));
    TRY(is_flag("normalize_experts", desc->normalize_experts));
    TRY(is_flag("shared_gate", desc->shared_gate));
    TRY(is_flag("output_bias", desc->output_bias));
    if (desc->shared_gate && desc->shared.hidden_dim == 0)
        return fail(CLMOE_INVALID_DESC, "shared_gate is 1, but shared.hidden_dim is 0");
done:
    return status;
}

static clmoe_status check_groups(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &desc->router;
    uint32_t columns = desc->num_experts + desc->num_identity_experts;
    TRY(in_range("router.groups.score", router->groups.score, 0, CLMOE_GROUP_TOP2_SUM));
    TRY(in_range("router.groups.count", router->groups.count, 0, MAX_GROUPS));
    if (router->groups.count <= 1)
        return CLMOE_SUCCESS;
    if (columns % router->groups.count != 0)
        return fail(CLMOE_INVALID_DESC, "router.groups.count is %u, but does not divide %u experts",
                    router->groups.count, columns);
    TRY(in_range("router.groups.topk", router->groups.topk, 1, router->groups.count));
    uint32_t choices = router->groups.topk * (columns / router->groups.count);
    if (choices < desc->top_k)
        return fail(CLMOE_INVALID_DESC,
                    "router.groups.topk is %u: its groups hold %u experts, but top_k is %u",
                    router->groups.topk, choices, desc->top_k);
done:
    return status;
}

/* A probability, or the width of an interval, that may not reach 1. */
static clmoe_status is_below_one(const char *name, float value) {
    if (value >= 0 && value < 1)
        return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_DESC, "%s is %g, but must be at least 0 and less than 1", name,
                (double)value);
}

static clmoe_status check_noise(const clmoe_router_desc *router) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(in_range("router.noise.kind", router->noise.kind, 0, CLMOE_NOISE_GUMBEL));
    TRY(is_at_least("router.noise.scale", router->noise.scale, 0));
    TRY(is_below_one("router.noise.jitter", router->noise.jitter));
    TRY(is_flag("router.noise.jitter_experts", router->noise.jitter_experts));
    TRY(is_below_one("router.dropout.experts", router->dropout.experts));
    TRY(is_below_one("router.dropout.logits", router->dropout.logits));
    if (router->noise.jitter_experts && router->noise.jitter <= 0)
        return fail(CLMOE_INVALID_DESC,
                    "router.noise.jitter_experts is 1, but router.noise.jitter is 0");
done:
    return status;
}

/* Rebalancing needs K pairs per token, and nothing that changes the weights after it. */
static clmoe_status check_rebalance(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &desc->router;
    const char *why = NULL;
    TRY(in_range("router.rebalance.iterations", router->rebalance.iterations, 0, MAX_ITERATIONS));
    TRY(is_at_least("router.rebalance.mu", router->rebalance.mu, 0));
    if (router->rebalance.iterations == 0)
        return CLMOE_SUCCESS;
    if (router->renorm.after_drop)
        why = "router.renorm.after_drop is 1";
    else if (desc->capacity.overflow == CLMOE_OVERFLOW_REROUTE)
        why = "capacity.overflow is reroute";
    else if (router->policy != CLMOE_POLICY_TOKEN_CHOICE && router->policy != CLMOE_POLICY_SINKHORN)
        why = "router.policy is neither token choice nor sinkhorn";
    if (why)
        return fail(CLMOE_INVALID_DESC, "router.rebalance.iterations is %u, but %s",
                    router->rebalance.iterations, why);
done:
    return status;
}

static clmoe_status check_router(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &desc->router;
    TRY(in_range("router.score", router->score, 0, SCORE_COUNT - 1));
    TRY(in_range("router.order", router->order, 0, CLMOE_ORDER_TOPK_THEN_SCORE));
    TRY(in_range("router.renorm.kind", router->renorm.kind, 0, CLMOE_RENORM_PNORM));
    TRY(in_range("router.weight_at", router->weight_at, 0, CLMOE_WEIGHT_AT_ACTIVATION));
    TRY(in_range("router.weight_type", router->weight_type, 0, CLMOE_BF16));
    if (router->weight_type != CLMOE_F32 && router->weight_type != desc->type)
        return fail(CLMOE_INVALID_DESC, "router.weight_type is %s, but must be f32 or type, %s",
                    type_name(router->weight_type), type_name(desc->type));
    TRY(is_flag("router.bias", router->bias));
    TRY(is_flag("router.select_bias", router->select_bias));
    TRY(is_flag("router.renorm.after_drop", router->renorm.after_drop));
    TRY(is_flag("router.expert_scale", router->expert_scale));
    TRY(is_at_least("router.softcap", router->softcap, 0));
    TRY(is_at_least("router.renorm.eps", router->renorm.eps, 0));
    TRY(is_at_least("router.renorm.p", router->renorm.p, 1));
    TRY(is_at_least("router.sparsemixer_eps", router->sparsemixer_eps, 0));
    TRY(is_at_least("router.temperature", router->temperature, 0));
    if (router->temperature == 0)
        return fail(CLMOE_INVALID_DESC, "router.temperature is 0, but must be more");
    if (!isfinite(router->scale))
        return fail(CLMOE_INVALID_DESC, "router.scale is %g, but must be finite",
                    (double)router->scale);
    if (router->score == CLMOE_SCORE_SPARSEMIXER && router->order != CLMOE_ORDER_TOPK_THEN_SCORE)
        return fail(CLMOE_INVALID_DESC, "router.order is %u, but sparsemixer needs topk-then-score",
                    router->order);
    TRY(check_groups(desc));
    TRY(check_noise(router));
    TRY(check_rebalance(desc));
done:
    return status;
}

/* Reroute has one room per expert and the token's scores of all of them. */
static clmoe_status check_overflow(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_capacity_desc *capacity = &desc->capacity;
    TRY(in_range("capacity.overflow", capacity->overflow, 0, CLMOE_OVERFLOW_REROUTE));
    if (capacity->overflow != CLMOE_OVERFLOW_REROUTE)
        return CLMOE_SUCCESS;
    const char *why = NULL;
    if (capacity->rows == 0 && capacity->factor == 0)
        why = "there is no capacity";
    else if (desc->router.policy != CLMOE_POLICY_TOKEN_CHOICE)
        why = "router.policy is not token choice";
    else if (desc->num_identity_experts)
        why = "there are identity experts";
    else if (desc->router.groups.two_level)
        why = "router.groups.two_level is 1";
    else if (capacity->tokens_per_sequence)
        why = "capacity.tokens_per_sequence is given";
    if (why)
        return fail(CLMOE_INVALID_DESC, "capacity.overflow is reroute, but %s", why);
done:
    return status;
}

static clmoe_status check_capacity(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_capacity_desc *capacity = &desc->capacity;
    TRY(is_at_least("capacity.factor", capacity->factor, 0));
    TRY(in_range("capacity.rounding", capacity->rounding, 0, CLMOE_ROUND_NEAREST));
    TRY(in_range("capacity.keep", capacity->keep, 0, CLMOE_KEEP_ROUND));
    if (capacity->rows > 0 && capacity->factor > 0)
        return fail(CLMOE_INVALID_DESC, "capacity.rows is %u and capacity.factor is %g: give one",
                    capacity->rows, capacity->factor);
    TRY(check_overflow(desc));
done:
    return status;
}

static clmoe_status check_balance_desc(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t groups = desc->balance.device_groups;
    TRY(is_flag("balance.enabled", desc->balance.enabled));
    TRY(is_flag("balance.router_orthogonality", desc->balance.router_orthogonality));
    TRY(in_range("balance.device_groups", groups, 0, MAX_GROUPS));
    if (groups > 0 && desc->num_experts % groups != 0)
        return fail(CLMOE_INVALID_DESC,
                    "balance.device_groups is %u, but does not divide %u experts", groups,
                    desc->num_experts);
done:
    return status;
}

/* Names of an MLP's fields in messages. */
typedef struct mlp_fields {
    const char *hidden_dim, *activation, *gate_layout, *gate_up_transposed, *down_transposed;
    const char *gate_up_bias, *down_bias, *limit, *alpha, *up_shift, *hidden_dropout;
} mlp_fields;

#define MLP_FIELDS(of)                                                                             \
    {                                                                                              \
        of ".hidden_dim", of ".activation", of ".gate_layout", of ".gate_up_transposed",           \
            of ".down_transposed", of ".gate_up_bias", of ".down_bias", of ".limit", of ".alpha",  \
            of ".up_shift", of ".hidden_dropout"                                                   \
    }

static const mlp_fields experts_fields = MLP_FIELDS("experts");
static const mlp_fields shared_fields = MLP_FIELDS("shared");

static clmoe_status check_mlp(const clmoe_mlp_desc *mlp, const mlp_fields *fields) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(in_range(fields->hidden_dim, mlp->hidden_dim, 1, MAX_DIM));
    TRY(in_range(fields->activation, mlp->activation, 0, CLMOE_ACT_RELU2));
    TRY(in_range(fields->gate_layout, mlp->gate_layout, 0, CLMOE_GATE_NONE));
    TRY(is_flag(fields->gate_up_transposed, mlp->gate_up_transposed));
    TRY(is_flag(fields->down_transposed, mlp->down_transposed));
    TRY(is_flag(fields->gate_up_bias, mlp->gate_up_bias));
    TRY(is_flag(fields->down_bias, mlp->down_bias));
    TRY(is_at_least(fields->limit, mlp->limit, 0));
    if (!isfinite(mlp->alpha))
        return fail(CLMOE_INVALID_DESC, "%s is %g, but must be finite", fields->alpha,
                    (double)mlp->alpha);
    if (!isfinite(mlp->up_shift))
        return fail(CLMOE_INVALID_DESC, "%s is %g, but must be finite", fields->up_shift,
                    (double)mlp->up_shift);
    TRY(is_below_one(fields->hidden_dropout, mlp->hidden_dropout));
done:
    return status;
}

/* What is said of the backward pass. */
static clmoe_status check_training(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(in_range("gradient_type", desc->gradient_type, 0, CLMOE_GRADIENT_OF_WEIGHT));
    TRY(is_flag("recompute", desc->recompute));
    TRY(is_flag("dye", desc->dye));
done:
    return status;
}

clmoe_status check_layer_desc(const clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(struct_desc_unused(desc, ""));
    TRY(check_sizes(desc));
    TRY(check_router(desc));
    TRY(check_capacity(desc));
    TRY(check_balance_desc(desc));
    TRY(check_policy(desc));
    TRY(check_training(desc));
    TRY(check_mlp(&desc->experts, &experts_fields));
    if (desc->shared.hidden_dim)
        TRY(check_mlp(&desc->shared, &shared_fields));
done:
    return status;
}
