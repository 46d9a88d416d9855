#include "phases.h"
#include "parameters.h"

enum { REBALANCE_ITERATIONS = 10 };

/* ---- Descriptors -------------------------------------------------------------------------------
 */

static void describe_noise(const train_settings *s, clmoe_router_desc *router) {
    router->noise.kind = s->noise;
    router->noise.scale = (float)s->noise_scale;
    router->dropout.experts = (float)s->expert_dropout;
    router->dropout.logits = (float)s->router_dropout;
}

static void describe_capacity(const train_settings *s, clmoe_capacity_desc *capacity) {
    capacity->factor = s->capacity_factor;
    capacity->keep = s->keep;
    capacity->overflow = s->overflow;
    if (s->per_sequence)
        capacity->tokens_per_sequence = s->sequence;
}

static void describe_policy(const train_settings *s, const balance_method *policy,
                            clmoe_layer_desc *desc) {
    desc->router.policy = policy->row->which;
    switch (policy->row->which) {
    case CLMOE_POLICY_EXPERT_CHOICE:
        desc->router.renorm.kind = CLMOE_RENORM_NONE;
        if (desc->capacity.factor == 0)
            desc->capacity.factor = policy->value;
        break;
    case CLMOE_POLICY_SINKHORN:
        desc->router.sinkhorn.iterations = (uint32_t)policy->value;
        break;
    case CLMOE_POLICY_ALL_EXPERTS:
        desc->top_k = s->experts;
        break;
    default: /* Soft MoE */
        desc->top_k = 1;
        desc->router.renorm.kind = CLMOE_RENORM_NONE;
        desc->router.soft_moe.slots = router_rows(s) / s->experts;
        desc->balance.enabled = 0;
        break;
    }
}

/* What acts from --balance-from on. */
static void describe_methods(const train_settings *s, clmoe_layer_desc *desc) {
    const balance_method *policy = methods_find(&s->methods, METHOD_POLICY);
    const balance_method *rebalance = methods_find(&s->methods, METHOD_REBALANCE);
    if (policy != NULL)
        describe_policy(s, policy, desc);
    if (rebalance != NULL) {
        desc->router.rebalance.iterations = REBALANCE_ITERATIONS;
        desc->router.rebalance.mu = (float)rebalance->value;
    }
}

static uint32_t top_k_at(const train_settings *s, uint32_t step) {
    uint32_t top_k = s->top_k;
    for (uint32_t i = 0; i < s->num_top_k_phases; i++)
        if (step >= s->top_k_phases[i].first)
            top_k = s->top_k_phases[i].top_k;
    return top_k;
}

/* All experts, weighted: nothing is chosen. */
static void describe_soft(const train_settings *s, clmoe_layer_desc *desc) {
    desc->top_k = s->experts;
    desc->router.policy = CLMOE_POLICY_ALL_EXPERTS;
    desc->router.select_bias = 0;
    desc->capacity =
        (clmoe_capacity_desc){.tokens_per_sequence = desc->capacity.tokens_per_sequence};
}

/*
 * Softmax, then the K best, as Mixtral has it: weights are divided by their sum, but for K = 1,
 * where they would all be 1 and the router learn nothing.
 */
static void describe(const train_settings *s, uint32_t step, clmoe_layer_desc *desc) {
    clmoe_layer_desc_init(desc);
    desc->dim = s->dim;
    desc->num_experts = s->experts;
    desc->top_k = top_k_at(s, step);
    desc->type = desc->weight_type = s->type;
    desc->training = 1;
    desc->engine = s->engine;
    desc->experts.hidden_dim = s->hidden;
    desc->experts.hidden_dropout = (float)s->hidden_dropout;
    desc->shared.hidden_dim = s->shared;
    desc->balance.enabled = 1;
    desc->balance.router_orthogonality =
        methods_find(&s->methods, METHOD_ORTHOGONALITY) != NULL ? 1 : 0;
    desc->router.renorm.kind = desc->top_k > 1 ? CLMOE_RENORM_SUM : CLMOE_RENORM_NONE;
    desc->router.renorm.after_drop = s->keep == CLMOE_KEEP_ROUND && desc->top_k > 1;
    desc->router.select_bias = methods_find(&s->methods, METHOD_RULE) != NULL ? 1 : 0;
    describe_noise(s, &desc->router);
    describe_capacity(s, &desc->capacity);
    if (step >= s->balance_from)
        describe_methods(s, desc);
    if (step < s->soft_steps)
        describe_soft(s, desc);
}

/* The same layer as it is used after training. */
static void describe_validation(clmoe_layer_desc *desc) {
    desc->training = 0;
    desc->router.noise = (clmoe_noise_desc){.scale = 1};
    desc->router.dropout = (clmoe_dropout_desc){0};
    desc->experts.hidden_dropout = 0;
    if (desc->capacity.keep == CLMOE_KEEP_ROUND)
        desc->router.renorm.after_drop = 0;
    if (desc->capacity.keep == CLMOE_KEEP_ROUND || desc->capacity.keep == CLMOE_KEEP_RANDOM)
        desc->capacity.keep = CLMOE_KEEP_POSITION;
}

void phases_describe(const train_settings *s, uint32_t step, clmoe_layer_desc *desc) {
    describe(s, step, desc);
    describe_validation(desc);
}

/* ---- Phases ------------------------------------------------------------------------------------
 */

static void add_phase(train_phases *p, uint32_t first) {
    uint32_t at = p->count;
    for (uint32_t i = 0; i < p->count; i++)
        if (p->rows[i].first == first)
            return;
    for (; at > 0 && p->rows[at - 1].first > first; at--)
        p->rows[at] = p->rows[at - 1];
    p->rows[at] = (train_phase){.first = first};
    p->count++;
}

static clmoe_status create_phase(train_phases *p, const train_settings *s, clmoe_context *context,
                                 train_phase *phase) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc desc;
    size_t saved = 0, scratch = 0, other = 0;
    describe(s, phase->first, &desc);
    TRY(LIB(clmoe_layer_create(context, &desc, &phase->layer)));
    TRY(LIB(clmoe_layer_memory(phase->layer, s->batch, &saved, &scratch)));
    phase->policy = desc.router.policy;
    p->counted = desc.balance.enabled != 0;
    p->biased |= desc.router.select_bias != 0;
    describe_validation(&desc);
    TRY(LIB(clmoe_layer_create(context, &desc, &phase->validation)));
    TRY(LIB(clmoe_layer_memory(phase->validation, s->batch, NULL, &other)));
    p->saved = saved > p->saved ? saved : p->saved;
    p->scratch = scratch > p->scratch ? scratch : p->scratch;
    p->scratch = other > p->scratch ? other : p->scratch;
done:
    return status;
}

clmoe_status phases_create(train_phases *p, const train_settings *s, clmoe_context *context) {
    clmoe_status status = CLMOE_SUCCESS;
    add_phase(p, 0);
    if (s->soft_steps > 0)
        add_phase(p, s->soft_steps);
    if (methods_find(&s->methods, METHOD_POLICY) || methods_find(&s->methods, METHOD_REBALANCE))
        add_phase(p, s->balance_from);
    for (uint32_t i = 0; i < s->num_top_k_phases; i++)
        add_phase(p, s->top_k_phases[i].first);
    for (uint32_t i = 0; i < p->count; i++)
        TRY(create_phase(p, s, context, &p->rows[i]));
done:
    return status;
}

void phases_destroy(train_phases *p) {
    for (uint32_t i = 0; i < p->count; i++) {
        clmoe_layer_destroy(p->rows[i].layer);
        clmoe_layer_destroy(p->rows[i].validation);
    }
    *p = (train_phases){0};
}

const train_phase *phases_at(const train_phases *p, uint32_t step) {
    uint32_t at = 0;
    while (at + 1 < p->count && p->rows[at + 1].first <= step)
        at++;
    return &p->rows[at];
}
