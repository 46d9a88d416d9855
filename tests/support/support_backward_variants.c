/* Layers that a backward pass tells apart and a forward does not. */
#include "support_variants.h"

static void two_levels_scaled(clmoe_layer_desc *d) {
    d->top_k = 4;
    d->router.groups.count = 3;
    d->router.groups.topk = 2;
    d->router.groups.two_level = 1;
    d->router.bias = d->router.select_bias = d->router.expert_scale = 1;
    d->router.temperature = 0.8f;
    d->router.softcap = 3.0f;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.eps = 0.01f;
    d->capacity.factor = 0.8;
}

static void rebalance_identity_experts(clmoe_layer_desc *d) {
    d->num_identity_experts = 2;
    d->top_k = 4;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.rebalance.iterations = 3;
    d->router.rebalance.mu = 0.3f;
    d->router.expert_scale = 1;
    d->capacity.factor = 0.8;
}

static void rebalance_to_zero(clmoe_layer_desc *d) {
    d->top_k = 5;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.rebalance.iterations = 9;
    d->router.rebalance.mu = 0.0f;
    d->router.scale = 3.0f;
}

static void soft_moe_normalized(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SOFT_MOE;
    d->top_k = 1;
    d->router.soft_moe.slots = 2;
    d->router.soft_moe.scale = 3.0f;
    d->normalize_experts = 1;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->experts.down_transposed = 1;
    d->shared.hidden_dim = 5;
    d->shared_gate = d->output_bias = 1;
}

static void all_experts_at_activation(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_ALL_EXPERTS;
    d->num_identity_experts = 1;
    d->top_k = d->num_experts + 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->normalize_experts = 1;
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 3.0f;
    d->experts.down_bias = 1;
}

static void expert_choice_at_input(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->router.scale = 2.0f;
    d->capacity.factor = 1.5;
}

static void rounding_after_drop(clmoe_layer_desc *d) {
    d->capacity.keep = CLMOE_KEEP_ROUND;
    d->capacity.multiple = 5;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->router.expert_scale = 1;
    d->router.scale = 2.5f;
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
}

static void rounding_topk_softmax(clmoe_layer_desc *d) {
    d->capacity.keep = CLMOE_KEEP_ROUND;
    d->capacity.multiple = 4;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.bias = 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->shared.hidden_dim = 5;
}

static void sinkhorn_after_drop(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SINKHORN;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.expert_scale = 1;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 2.0f;
    d->router.renorm.after_drop = 1;
    d->capacity.factor = 0.7;
}

static void topk_after_drop(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.eps = 0.1f;
    d->router.renorm.after_drop = 1;
    d->router.expert_scale = d->router.bias = 1;
    d->router.temperature = 1.3f;
    d->router.softcap = 2.0f;
    d->capacity.factor = 0.7;
    d->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
}

static void sparsemixer_renorm(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SPARSEMIXER;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.sparsemixer_eps = 0.3217f;
    d->router.temperature = 0.7f;
    d->router.softcap = 5.0f;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.eps = 0.2f;
    d->router.expert_scale = 1;
}

static void separate_gelu_transposed(clmoe_layer_desc *d) {
    d->experts.gate_layout = CLMOE_GATE_SEPARATE;
    d->experts.activation = CLMOE_ACT_GELU_ERF;
    d->experts.gate_up_transposed = d->experts.down_transposed = 1;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->experts.limit = 0.5f;
    d->experts.up_shift = -0.5f;
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
}

static void plain_gelu_transposed(clmoe_layer_desc *d) {
    d->experts.gate_layout = CLMOE_GATE_NONE;
    d->experts.activation = CLMOE_ACT_GELU_TANH;
    d->experts.gate_up_transposed = 1;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->normalize_experts = 1;
}

static void concat_relu(clmoe_layer_desc *d) {
    d->experts.activation = CLMOE_ACT_RELU;
    d->experts.gate_up_bias = 1;
    d->experts.limit = 0.6f;
    d->shared.hidden_dim = 6;
    d->shared.activation = CLMOE_ACT_RELU2;
    d->shared.down_transposed = 1;
}

static void dropout(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.25f;
    d->shared.hidden_dim = 9;
    d->shared.hidden_dropout = 0.5f;
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
}

static void dropout_normalized(clmoe_layer_desc *d) {
    d->experts.hidden_dropout = 0.3f;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->normalize_experts = 1;
    d->shared.hidden_dim = 6;
    d->shared.hidden_dropout = 0.4f;
    d->shared.gate_layout = CLMOE_GATE_NONE;
    d->shared.down_bias = d->shared_gate = 1;
    d->capacity.factor = 0.8;
}

static void expert_choice_dropout(clmoe_layer_desc *d) {
    expert_choice_at_input(d);
    d->experts.hidden_dropout = 0.4f;
    d->experts.gate_layout = CLMOE_GATE_NONE;
}

static void soft_moe_dropout(clmoe_layer_desc *d) {
    soft_moe_normalized(d);
    d->experts.hidden_dropout = 0.2f;
    d->shared.hidden_dropout = 0.3f;
}

const layer_variant backward_variants[] = {
    {"two levels, scaled", two_levels_scaled},
    {"rebalance, identity experts", rebalance_identity_experts},
    {"rebalance to zero", rebalance_to_zero},
    {"Soft MoE, normalized", soft_moe_normalized},
    {"all experts, weight at activation", all_experts_at_activation},
    {"expert choice, weight at input", expert_choice_at_input},
    {"token rounding, renorm", rounding_after_drop},
    {"token rounding, top-k then softmax, weight at input", rounding_topk_softmax},
    {"Sinkhorn, renorm after drop", sinkhorn_after_drop},
    {"top-k then softmax, renorm after drop", topk_after_drop},
    {"sparsemixer, renorm", sparsemixer_renorm},
    {"separate gelu, transposed", separate_gelu_transposed},
    {"plain gelu, transposed", plain_gelu_transposed},
    {"concat relu, limit", concat_relu},
    {"dropout of activations", dropout},
    {"dropout, normalized experts", dropout_normalized},
    {"dropout, expert choice", expert_choice_dropout},
    {"dropout, Soft MoE", soft_moe_dropout},
};
const size_t num_backward_variants = sizeof backward_variants / sizeof backward_variants[0];
