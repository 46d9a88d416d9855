/* The layers and batches of the self-test, and what they are given. */
#include "trial.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- Layers ---------------------------------------------------------------------------------- */

static void set_topk_first(clmoe_layer_desc *desc) {
    desc->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

/* Drops pairs. */
static void set_sigmoid(clmoe_layer_desc *desc) {
    desc->router.score = CLMOE_SCORE_SIGMOID;
    desc->router.renorm.kind = CLMOE_RENORM_SUM;
    desc->router.scale = 2.5F;
    desc->capacity.rows = 7;
}

/* Sigmoid, so that tokens with the same logit tie: the sum of softmax is rounded row by row. */
static void set_expert_choice(clmoe_layer_desc *desc) {
    desc->router.score = CLMOE_SCORE_SIGMOID;
    desc->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    desc->capacity.rows = 5;
}

/* All rounds, as host and device may stop at another one. */
static void set_sinkhorn(clmoe_layer_desc *desc) {
    desc->router.policy = CLMOE_POLICY_SINKHORN;
    desc->router.sinkhorn.iterations = 12;
    desc->router.sinkhorn.tolerance = 0;
}

static void set_all_experts(clmoe_layer_desc *desc) {
    desc->router.policy = CLMOE_POLICY_ALL_EXPERTS;
}

static void set_soft_moe(clmoe_layer_desc *desc) {
    desc->router.policy = CLMOE_POLICY_SOFT_MOE;
    desc->router.soft_moe.slots = 2;
}

static void set_two_levels(clmoe_layer_desc *desc) {
    desc->router.groups.count = 4;
    desc->router.groups.topk = 2;
    desc->router.groups.two_level = 1;
}

/*
 * Few, as each costs the compilation of kernels: sizes that fit no tile and those that several
 * tiles make, forms of top-k by E and K, and every policy.
 */
const selftest_layer selftest_layers[] = {
    {"token choice 2 of 5", 5, 2, 19, 13, NULL, true, true, true},
    {"token choice 1 of 5", 5, 1, 72, 136, set_topk_first, true, true, true},
    {"sigmoid 8 of 64 with capacity", 64, 8, 24, 16, set_sigmoid, false, true, true},
    {"token choice 1 of 1500", 1500, 1, 8, 4, NULL, false, false, true},
    {"token choice 200 of 300", 300, 200, 8, 4, NULL, false, false, true},
    {"expert choice", 6, 1, 24, 16, set_expert_choice, false, true, true},
    {"Sinkhorn 2 of 6", 6, 2, 24, 16, set_sinkhorn, false, true, true},
    {"all of 6 experts", 6, 6, 24, 16, set_all_experts, false, true, true},
    {"Soft MoE", 5, 1, 24, 16, set_soft_moe, true, true, false},
    {"two levels 4 of 8", 8, 4, 24, 16, set_two_levels, false, true, false},
};
const size_t selftest_num_layers = sizeof selftest_layers / sizeof selftest_layers[0];

const selftest_batch selftest_batches[] = {
    {"1 token", BATCH_X, 1},
    {"13 tokens, masked", BATCH_MASKED, 13},
    {"150 tokens, most to one expert", BATCH_ONE, 150},
    {"9 tokens, ties", BATCH_TIES, 9},
    {"9 tokens, NaN and infinity", BATCH_NONFINITE, 9},
};
const size_t selftest_num_batches = sizeof selftest_batches / sizeof selftest_batches[0];

void trial_desc(const selftest_layer *layer, clmoe_type type, clmoe_layer_desc *desc) {
    clmoe_layer_desc_init(desc);
    desc->dim = layer->dim;
    desc->num_experts = layer->experts;
    desc->top_k = layer->top_k;
    desc->type = desc->weight_type = type;
    desc->experts.hidden_dim = layer->hidden;
    desc->training = layer->training;
    if (layer->set)
        layer->set(desc);
}

/* ---- Sizes ----------------------------------------------------------------------------------- */

const char *trial_array_name(trial_array array) {
    static const char *const names[TRIAL_ARRAYS] = {
        [TRIAL_X] = "x",
        [TRIAL_MASK] = "token_mask",
        [TRIAL_LOGITS] = "logits_in",
        [TRIAL_DY] = "dy",
        [TRIAL_ROUTER] = "router",
        [TRIAL_GROUP_ROUTER] = "group_router",
        [TRIAL_GATE] = "experts.gate",
        [TRIAL_DOWN] = "experts.down",
        [TRIAL_IDS] = "ids",
        [TRIAL_OFFSETS] = "token_offsets",
        [TRIAL_WEIGHTS] = "pair_weights",
        [TRIAL_Y] = "y",
        [TRIAL_DX] = "dx",
        [TRIAL_DROUTER] = "gradients.router",
        [TRIAL_DGROUP_ROUTER] = "gradients.group_router",
        [TRIAL_DGATE] = "gradients.experts.gate",
        [TRIAL_DDOWN] = "gradients.experts.down",
    };
    return names[array];
}

static void set_choice_sizes(trial *t) {
    const clmoe_layer_desc *desc = &t->desc;
    const bool by_expert = desc->router.policy == CLMOE_POLICY_EXPERT_CHOICE;
    const size_t T = t->tokens, C = desc->capacity.rows;
    if (desc->router.policy == CLMOE_POLICY_SOFT_MOE)
        return;
    t->pairs = (uint32_t)(by_expert ? desc->num_experts * (C < T ? C : T) : T * desc->top_k);
    t->counts[TRIAL_IDS] = t->counts[TRIAL_WEIGHTS] = t->pairs;
    t->counts[TRIAL_OFFSETS] = by_expert ? T + 1 : 0;
}

static void set_gradient_sizes(trial *t) {
    size_t *n = t->counts;
    n[TRIAL_DY] = n[TRIAL_DX] = n[TRIAL_X];
    n[TRIAL_DROUTER] = n[TRIAL_ROUTER];
    n[TRIAL_DGROUP_ROUTER] = n[TRIAL_GROUP_ROUTER];
    n[TRIAL_DGATE] = n[TRIAL_GATE];
    n[TRIAL_DDOWN] = n[TRIAL_DOWN];
}

static void set_sizes(trial *t) {
    const clmoe_layer_desc *desc = &t->desc;
    const clmoe_router_desc *router = &desc->router;
    const size_t T = t->tokens, D = desc->dim, E = desc->num_experts, H = desc->experts.hidden_dim;
    const size_t p = router->policy == CLMOE_POLICY_SOFT_MOE ? router->soft_moe.slots : 1;
    size_t *n = t->counts;
    n[TRIAL_X] = n[TRIAL_Y] = T * D;
    n[TRIAL_MASK] = t->batch->kind == BATCH_MASKED ? T : 0;
    n[TRIAL_LOGITS] = t->batch->kind > BATCH_MASKED ? T * E : 0;
    n[TRIAL_ROUTER] = E * p * D;
    n[TRIAL_GROUP_ROUTER] = router->groups.two_level ? router->groups.count * D : 0;
    n[TRIAL_GATE] = E * 2 * H * D;
    n[TRIAL_DOWN] = E * D * H;
    set_choice_sizes(t);
    if (desc->training)
        set_gradient_sizes(t);
}

static void set_types(trial *t) {
    static const trial_array of_layer[] = {TRIAL_X,  TRIAL_DY,   TRIAL_Y,
                                           TRIAL_DX, TRIAL_GATE, TRIAL_DOWN};
    for (size_t i = 0; i < sizeof of_layer / sizeof of_layer[0]; i++)
        t->types[of_layer[i]] = t->desc.type;
    t->types[TRIAL_MASK] = TRIAL_U8;
    t->types[TRIAL_IDS] = t->types[TRIAL_OFFSETS] = TRIAL_I32;
}

/* ---- Inputs ---------------------------------------------------------------------------------- */

double trial_random(uint64_t *seed) {
    *seed = *seed * 6364136223846793005U + 1442695040888963407U;
    return (double)(*seed >> 40) / 16777216;
}

/* Multiples of 1/8 from -most/8 to most/8: the logits are exact in f32, whatever the order. */
static double eighths(uint64_t *seed, int most) {
    return (floor(trial_random(seed) * (2 * most + 1)) - most) / 8;
}

static double centred(uint64_t *seed, double size) {
    return (2 * trial_random(seed) - 1) * size;
}

static double logit(const trial *t, size_t at, uint64_t *seed) {
    static const double odd[] = {NAN, INFINITY, -INFINITY};
    const size_t E = t->desc.num_experts, token = at / E;
    const double value = eighths(seed, 24), choice = trial_random(seed);
    switch (t->batch->kind) {
    case BATCH_ONE:
        return at % E == E - 1 && token % 16 != 0 ? 4 : value;
    case BATCH_TIES:
        return token == 0 ? 0 : floor(choice * 3) - 1;
    case BATCH_NONFINITE:
        return token == 3 || choice < 0.2 ? odd[at % 3] : value;
    default:
        return value;
    }
}

static double input(const trial *t, trial_array array, size_t at, uint64_t *seed) {
    const double D = t->desc.dim, H = t->desc.experts.hidden_dim;
    switch (array) {
    case TRIAL_X:
        return eighths(seed, 12);
    case TRIAL_MASK:
        return at == 0 || trial_random(seed) < 0.7;
    case TRIAL_LOGITS:
        return logit(t, at, seed);
    case TRIAL_ROUTER:
    case TRIAL_GROUP_ROUTER:
        return eighths(seed, 3);
    case TRIAL_GATE:
        return centred(seed, sqrt(3 / D));
    case TRIAL_DOWN:
        return centred(seed, sqrt(3 / H));
    default:
        return centred(seed, 1);
    }
}

/* As the device will have it. */
static double rounded(uint32_t type, double value) {
    uint32_t element = 0;
    float number = (float)value;
    clmoe_type_encode(type, &number, 1, &element);
    clmoe_type_decode(type, &element, 1, &number);
    return (double)number;
}

static void fill(const trial *t, trial_array array, double *to) {
    uint64_t seed = (uint64_t)array + 1;
    for (size_t i = 0; i < t->counts[array]; i++) {
        to[i] = input(t, array, i, &seed);
        if (t->types[array] <= CLMOE_BF16)
            to[i] = rounded(t->types[array], to[i]);
    }
}

/* ---- Memory ---------------------------------------------------------------------------------- */

static clmoe_status create(const trial *t, int begin, int end, trial_values *values) {
    *values = (trial_values){0};
    for (int i = begin; i < end; i++) {
        if (t->counts[i] == 0)
            continue;
        values->of[i] = calloc(t->counts[i], sizeof *values->of[i]);
        if (!values->of[i]) {
            trial_values_release(values);
            return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a batch of the self-test");
        }
    }
    return CLMOE_SUCCESS;
}

clmoe_status trial_values_create(const trial *t, trial_values *values) {
    return create(t, TRIAL_GIVEN, TRIAL_ARRAYS, values);
}

void trial_values_release(trial_values *values) {
    for (int i = 0; i < TRIAL_ARRAYS; i++)
        free(values->of[i]);
    *values = (trial_values){0};
}

clmoe_status trial_make(trial *t) {
    clmoe_status status = CLMOE_SUCCESS;
    t->tokens = t->batch->tokens;
    set_sizes(t);
    set_types(t);
    TRY(create(t, 0, TRIAL_GIVEN, &t->given));
    for (int i = 0; i < TRIAL_GIVEN; i++)
        fill(t, (trial_array)i, t->given.of[i]);
done:
    return status;
}

void trial_release(trial *t) {
    trial_values_release(&t->given);
}
