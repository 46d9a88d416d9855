/* The switches of a layer, mostly as model families combine them. */
#include "support_variants.h"

#include "support.h"

#include <string.h>

/* ---- Token choice without a state: what clmoe_forward() has an oracle for ----------------------
 */

static void softmax(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_NONE;
}

static void softmax_renorm_separate(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->experts.gate_layout = CLMOE_GATE_SEPARATE;
}

static void sigmoid_groups_shared(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.select_bias = 1;
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
    d->router.groups.score = CLMOE_GROUP_TOP2_SUM;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.eps = 1e-20f;
    d->router.scale = 2.5f;
    d->shared.hidden_dim = 13;
}

static void softmax_groups_by_max(clmoe_layer_desc *d) {
    d->router.groups.count = 3;
    d->router.groups.topk = 1;
    d->router.groups.score = CLMOE_GROUP_MAX;
    d->router.scale = 16.0f;
}

static void topk_softmax_gpt_oss(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.bias = 1;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.gate_up_transposed = d->experts.down_transposed = 1;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->experts.limit = 1.5f;
    d->experts.alpha = 1.702f;
    d->experts.up_shift = 1.0f;
}

static void topk_sigmoid_at_input(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->experts.gate_up_transposed = 1;
    d->experts.gate_up_bias = 1;
    d->shared.hidden_dim = 7;
    d->shared.gate_layout = CLMOE_GATE_SEPARATE;
}

static void sqrt_softplus_limit(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.select_bias = 1;
    d->experts.limit = 0.75f;
}

static void topk_sqrt_softplus(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

static void geometric(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_IDENTITY;
    d->normalize_experts = 1;
    d->experts.down_bias = 1;
}

static void topk_identity(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_IDENTITY;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.renorm.p = 2.0f;
}

static void sparsemixer(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SPARSEMIXER;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.sparsemixer_eps = 0.1371f;
}

static void temperature_softcap(clmoe_layer_desc *d) {
    d->router.temperature = 0.6f;
    d->router.softcap = 4.0f;
    d->router.bias = 1;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.eps = 0.01f;
}

static void pnorm_expert_scale(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_PNORM;
    d->router.expert_scale = 1;
    d->experts.activation = CLMOE_ACT_GELU_TANH;
}

static void renorm_after_drop(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->router.scale = 1.5f;
    d->router.expert_scale = 1;
    d->capacity.factor = 0.7;
    d->num_identity_experts = 2;
}

static void scale_after_drop(clmoe_layer_desc *d) {
    d->router.renorm.after_drop = 1;
    d->router.scale = 0.5f;
    d->capacity.factor = 0.7;
}

static void at_activation_keep_weight(clmoe_layer_desc *d) {
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->capacity.factor = 0.8;
    d->capacity.keep = CLMOE_KEEP_WEIGHT;
    d->experts.down_bias = 1;
}

static void keep_position(clmoe_layer_desc *d) {
    d->capacity.factor = 0.5;
    d->capacity.rounding = CLMOE_ROUND_DOWN;
}

static void keep_choice_major(clmoe_layer_desc *d) {
    d->capacity.rows = 5;
    d->capacity.keep = CLMOE_KEEP_CHOICE_MAJOR;
}

static void keep_priority(clmoe_layer_desc *d) {
    d->capacity.factor = 1.0;
    d->capacity.multiple = 4;
    d->capacity.keep = CLMOE_KEEP_PRIORITY;
}

static void no_room_at_all(clmoe_layer_desc *d) {
    d->capacity.factor = 1e-6;
    d->capacity.rounding = CLMOE_ROUND_DOWN;
    d->output_bias = 1;
}

static void identity_experts(clmoe_layer_desc *d) {
    d->num_identity_experts = 5;
    d->router.select_bias = 1;
    d->router.scale = 6.0f;
}

static void identity_experts_at_input(clmoe_layer_desc *d) {
    d->num_identity_experts = 5;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->normalize_experts = 1;
}

static void shared_gate(clmoe_layer_desc *d) {
    d->shared.hidden_dim = 25;
    d->shared_gate = 1;
}

static void shared_every_switch(clmoe_layer_desc *d) {
    d->shared.hidden_dim = 9;
    d->shared.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->shared.activation = CLMOE_ACT_GELU_ERF;
    d->shared.gate_up_transposed = d->shared.down_transposed = 1;
    d->shared.gate_up_bias = d->shared.down_bias = 1;
    d->shared.limit = 1.0f;
    d->shared.up_shift = 0.5f;
    d->shared_gate = 1;
    d->output_bias = 1;
}

static void plain_relu2(clmoe_layer_desc *d) {
    d->experts.gate_layout = CLMOE_GATE_NONE;
    d->experts.activation = CLMOE_ACT_RELU2;
    d->shared.hidden_dim = 11;
    d->shared.gate_layout = CLMOE_GATE_NONE;
    d->shared.activation = CLMOE_ACT_RELU;
}

static void output_bias_training(clmoe_layer_desc *d) {
    d->output_bias = 1;
    d->training = 1;
}

static void every_expert_chosen(clmoe_layer_desc *d) {
    d->top_k = d->num_experts;
}

const layer_variant layer_variants[] = {
    {"softmax", softmax},
    {"softmax, renorm, separate", softmax_renorm_separate},
    {"sigmoid, groups, shared", sigmoid_groups_shared},
    {"softmax, groups by max", softmax_groups_by_max},
    {"top-k then softmax, interleaved, biases", topk_softmax_gpt_oss},
    {"top-k then sigmoid, weight at input", topk_sigmoid_at_input},
    {"sqrt softplus, limit", sqrt_softplus_limit},
    {"top-k then sqrt softplus", topk_sqrt_softplus},
    {"identity score, normalized experts", geometric},
    {"top-k then identity", topk_identity},
    {"sparsemixer", sparsemixer},
    {"temperature, softcap", temperature_softcap},
    {"p-norm, expert scale", pnorm_expert_scale},
    {"renorm after drop", renorm_after_drop},
    {"scale after drop", scale_after_drop},
    {"weight at activation, keep weight", at_activation_keep_weight},
    {"keep position", keep_position},
    {"keep choice-major", keep_choice_major},
    {"keep priority", keep_priority},
    {"no room at all", no_room_at_all},
    {"identity experts", identity_experts},
    {"identity experts, weight at input", identity_experts_at_input},
    {"shared gate", shared_gate},
    {"shared, every switch", shared_every_switch},
    {"plain relu2", plain_relu2},
    {"output bias, training", output_bias_training},
    {"every expert chosen", every_expert_chosen},
};
const size_t num_layer_variants = sizeof layer_variants / sizeof layer_variants[0];

/* ---- The other policies, and what goes on between and behind the steps -------------------------
 */

static void expert_choice(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    d->router.expert_scale = 1;
    d->capacity.factor = 1.5;
}

static void token_rounding(clmoe_layer_desc *d) {
    d->capacity.keep = CLMOE_KEEP_ROUND;
    d->capacity.multiple = 4;
    d->router.expert_scale = d->router.select_bias = 1;
}

static void sinkhorn(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SINKHORN;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}

static void all_experts(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_ALL_EXPERTS;
    d->top_k = d->num_experts;
}

static void soft_moe(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SOFT_MOE;
    d->top_k = 1;
    d->router.soft_moe.slots = 3;
}

static void two_levels(clmoe_layer_desc *d) {
    d->top_k = 4;
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
    d->router.groups.two_level = 1;
}

static void reroute_scaled(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.expert_scale = 1;
    d->capacity.factor = 1.0;
    d->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
}

static void rebalance(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.rebalance.iterations = 5;
}

static void sequences_by_priority(clmoe_layer_desc *d) {
    d->capacity.factor = 0.7;
    d->capacity.tokens_per_sequence = 10;
    d->capacity.keep = CLMOE_KEEP_PRIORITY;
}

static void learned_noise(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
    d->router.dropout.experts = 0.2f;
    d->router.noise.jitter = 0.1f;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

static void gumbel_noise(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_GUMBEL;
    d->router.dropout.logits = 0.2f;
    d->router.select_bias = 1;
}

static void jitter_of_experts(clmoe_layer_desc *d) {
    d->router.noise.jitter = 0.1f;
    d->router.noise.jitter_experts = 1;
}

static void keep_random(clmoe_layer_desc *d) {
    d->capacity.factor = 0.8;
    d->capacity.keep = CLMOE_KEEP_RANDOM;
}

static void reroute_renorm_late(clmoe_layer_desc *d) {
    reroute_scaled(d);
    d->router.renorm.after_drop = 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
}

static void jitter_of_every_expert(clmoe_layer_desc *d) {
    jitter_of_experts(d);
    d->num_identity_experts = 3;
    d->shared.hidden_dim = 9;
    d->shared_gate = 1;
    d->router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->capacity.factor = 0.6;
}

static void device_groups(clmoe_layer_desc *d) {
    d->balance.device_groups = 4;
    d->capacity.factor = 1.0;
}

const layer_variant routing_variants[] = {
    {"expert choice", expert_choice},
    {"token rounding", token_rounding},
    {"Sinkhorn", sinkhorn},
    {"all experts", all_experts},
    {"Soft MoE", soft_moe},
    {"two levels", two_levels},
    {"reroute", reroute_scaled},
    {"reroute, renorm after drop", reroute_renorm_late},
    {"rebalance", rebalance},
    {"learned noise", learned_noise},
    {"Gumbel noise", gumbel_noise},
    {"jitter of experts", jitter_of_experts},
    {"jitter of identity and shared experts", jitter_of_every_expert},
    {"keep random", keep_random},
    {"sequences by priority", sequences_by_priority},
    {"device groups", device_groups},
};
const size_t num_routing_variants = sizeof routing_variants / sizeof routing_variants[0];

static bool set_one_of(const layer_variant *variants, size_t count, clmoe_layer_desc *desc,
                       const char *name) {
    for (size_t i = 0; i < count; i++)
        if (strcmp(variants[i].name, name) == 0) {
            variants[i].set(desc);
            return true;
        }
    return false;
}

void variant_set(clmoe_layer_desc *desc, const char *name, void (*own)(clmoe_layer_desc *desc)) {
    if (own) {
        own(desc);
        return;
    }
    CHECK(set_one_of(layer_variants, num_layer_variants, desc, name) ||
              set_one_of(routing_variants, num_routing_variants, desc, name) ||
              set_one_of(backward_variants, num_backward_variants, desc, name),
          "no variant is named %s\n", name);
}
