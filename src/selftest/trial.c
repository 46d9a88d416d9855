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

/* Drops pairs, by a rule. */
static void set_keep(clmoe_layer_desc *desc, clmoe_keep keep) {
    desc->router.score = CLMOE_SCORE_SIGMOID;
    desc->capacity.rows = 7;
    desc->capacity.keep = keep;
}

static void set_choice_major(clmoe_layer_desc *desc) {
    set_keep(desc, CLMOE_KEEP_CHOICE_MAJOR);
}

static void set_priority(clmoe_layer_desc *desc) {
    set_keep(desc, CLMOE_KEEP_PRIORITY);
}

static void set_by_weight(clmoe_layer_desc *desc) {
    set_keep(desc, CLMOE_KEEP_WEIGHT);
}

/* So many that the K largest numbers decide who stays. */
static void set_at_random(clmoe_layer_desc *desc) {
    set_keep(desc, CLMOE_KEEP_RANDOM);
    desc->router.dropout.experts = 0.9F;
}

static void set_reroute(clmoe_layer_desc *desc) {
    set_keep(desc, CLMOE_KEEP_POSITION);
    desc->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
    desc->capacity.rows = 60;
}

static void set_rounding(clmoe_layer_desc *desc) {
    set_keep(desc, CLMOE_KEEP_ROUND);
    desc->capacity.rows = 0;
    desc->capacity.multiple = 8;
    desc->router.renorm.kind = CLMOE_RENORM_SUM;
    desc->router.renorm.after_drop = 1;
}

static void set_biases(clmoe_layer_desc *desc) {
    set_keep(desc, CLMOE_KEEP_POSITION);
    desc->router.bias = 1;
    desc->router.select_bias = 1;
}

/* So much noise that it decides. */
static void set_gaussian(clmoe_layer_desc *desc) {
    desc->router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    desc->router.noise.scale = 0.75F;
    desc->router.dropout.experts = 0.3F;
}

static void set_learned(clmoe_layer_desc *desc) {
    desc->router.score = CLMOE_SCORE_SIGMOID;
    desc->router.noise.kind = CLMOE_NOISE_LEARNED;
    desc->router.dropout.logits = 0.1F;
}

static void set_shared(clmoe_layer_desc *desc) {
    desc->normalize_experts = 1;
    desc->shared.hidden_dim = 20;
    desc->shared_gate = 1;
}

/*
 * Few, as each costs the compilation of kernels: sizes that fit no tile and those that several
 * tiles make, forms of top-k by E and K, and every policy.
 */
const selftest_layer selftest_layers[] = {
    {"token choice 2 of 5", 5, 2, 19, 13, NULL, true, true, true, false},
    {"token choice 1 of 5", 5, 1, 72, 136, set_topk_first, true, true, true, false},
    {"sigmoid 8 of 64 with capacity", 64, 8, 24, 16, set_sigmoid, false, true, true, false},
    {"token choice 1 of 1500", 1500, 1, 8, 4, NULL, false, false, true, false},
    {"token choice 200 of 300", 300, 200, 8, 4, NULL, false, false, true, false},
    {"expert choice", 6, 1, 24, 16, set_expert_choice, false, true, true, false},
    {"Sinkhorn 2 of 6", 6, 2, 24, 16, set_sinkhorn, false, true, true, false},
    {"all of 6 experts", 6, 6, 24, 16, set_all_experts, false, true, true, false},
    {"Soft MoE", 5, 1, 24, 16, set_soft_moe, true, true, false, false},
    {"two levels 4 of 8", 8, 4, 24, 16, set_two_levels, false, true, false, false},
    {"shared expert, normalised", 6, 2, 24, 16, set_shared, false, true, true, false},
    {"keep by choice", 6, 2, 24, 16, set_choice_major, false, true, true, true},
    {"keep by priority", 6, 2, 24, 16, set_priority, false, true, true, true},
    {"keep by weight", 6, 2, 24, 16, set_by_weight, false, true, true, true},
    {"keep at random, experts masked", 6, 2, 24, 16, set_at_random, false, true, true, true},
    {"reroute", 6, 2, 24, 16, set_reroute, false, true, true, true},
    {"token rounding", 6, 2, 24, 16, set_rounding, false, true, true, true},
    {"biases and their rules", 6, 2, 24, 16, set_biases, false, true, true, true},
    {"gaussian noise, expert dropout", 6, 2, 24, 16, set_gaussian, false, true, true, true},
    {"learned noise, logit dropout", 6, 2, 24, 16, set_learned, false, true, true, true},
};
const size_t selftest_num_layers = sizeof selftest_layers / sizeof selftest_layers[0];

const selftest_batch selftest_batches[] = {
    {"1 token", BATCH_X, 1, CLMOE_BIAS_SIGN},
    {"13 tokens, masked", BATCH_MASKED, 13, CLMOE_BIAS_QUANTILE},
    {"150 tokens, most to one expert", BATCH_ONE, 150, CLMOE_BIAS_SMEBU},
    {"9 tokens, ties", BATCH_TIES, 9, CLMOE_BIAS_DEVICE},
    {"9 tokens, NaN and infinity", BATCH_NONFINITE, 9, CLMOE_BIAS_PROPORTIONAL},
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
    if (layer->state) {
        desc->balance.device_groups = 3;
        desc->balance.dead_window = 20;
    }
    if (layer->set)
        layer->set(desc);
}

/* ---- Balance --------------------------------------------------------------------------------- */

const clmoe_state trial_state = {.version = 2,
                                 .seed = {0x5EED, 77},
                                 .step = 3,
                                 .updates = 2,
                                 .noise_scale = 1.25F,
                                 .temperature_scale = 1.5F,
                                 .loss_weight = 0.75F,
                                 .capacity_scale = 0.75F};

/* Each kind that the layer can have; sources of P, and over what, take turns. */
static void set_losses(trial *t) {
    size_t *count = &t->counts[TRIAL_LOSSES];
    for (clmoe_loss_kind kind = CLMOE_LOSS_SWITCH; clmoe_loss_name(kind); kind++) {
        clmoe_loss_desc loss = {.kind = kind, .weight = 1};
        if ((kind == CLMOE_LOSS_OVERFLOW && t->desc.capacity.rows == 0) ||
            (kind == CLMOE_LOSS_SMOOTH_LOAD && t->desc.router.noise.kind == CLMOE_NOISE_NONE) ||
            *count == TRIAL_MOST_LOSSES)
            continue;
        loss.p_source = kind == CLMOE_LOSS_MAX  ? CLMOE_P_SOFTMAX
                        : kind == CLMOE_LOSS_L1 ? CLMOE_P_RAW
                                                : CLMOE_P_NORMALISED;
        loss.per_device = kind == CLMOE_LOSS_SQUARED;
        loss.controlled = kind == CLMOE_LOSS_LOAD_CV2;
        t->losses[(*count)++] = loss;
    }
}

/* Scales that move, each to another side in some batch. */
void trial_update_args(const trial *t, clmoe_balance_args *args) {
    clmoe_balance_args_init(args);
    args->bias_rule = t->desc.router.select_bias ? t->batch->rule : CLMOE_BIAS_NONE;
    args->bias_rate = 0.125F;
    args->target_violation = 0.5F;
    args->target_drop_rate = 0.25F;
    args->noise = (clmoe_schedule){
        .shape = CLMOE_SCHEDULE_LINEAR, .start = 1, .end = 0.5F, .first = 2, .steps = 8};
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
        [TRIAL_NOISE_ROUTER] = "noise_router",
        [TRIAL_ROUTER_BIAS] = "router_bias",
        [TRIAL_GATE] = "experts.gate",
        [TRIAL_DOWN] = "experts.down",
        [TRIAL_SHARED_UP] = "shared.gate",
        [TRIAL_SHARED_DOWN] = "shared.down",
        [TRIAL_SHARED_GATE] = "shared_gate",
        [TRIAL_STATE] = "state",
        [TRIAL_IDS] = "ids",
        [TRIAL_OFFSETS] = "token_offsets",
        [TRIAL_WEIGHTS] = "pair_weights",
        [TRIAL_BIAS_COUNTS] = "bias_counts",
        [TRIAL_COUNTS] = "stats",
        [TRIAL_STATS] = "stats",
        [TRIAL_LOSSES] = "loss_values",
        [TRIAL_Y] = "y",
        [TRIAL_DLOGITS] = "dlogits",
        [TRIAL_DNOISE] = "dnoise",
        [TRIAL_DX] = "dx",
        [TRIAL_DROUTER] = "gradients.router",
        [TRIAL_DGROUP_ROUTER] = "gradients.group_router",
        [TRIAL_DNOISE_ROUTER] = "gradients.noise_router",
        [TRIAL_DROUTER_BIAS] = "gradients.router_bias",
        [TRIAL_DGATE] = "gradients.experts.gate",
        [TRIAL_DDOWN] = "gradients.experts.down",
        [TRIAL_DSHARED_UP] = "gradients.shared.gate",
        [TRIAL_DSHARED_DOWN] = "gradients.shared.down",
        [TRIAL_DSHARED_GATE] = "gradients.shared_gate",
        [TRIAL_NEXT_COUNTS] = "state",
        [TRIAL_NEXT_STATE] = "state",
    };
    return names[array];
}

bool trial_lists_pairs(const trial *t) {
    return t->desc.router.policy == CLMOE_POLICY_EXPERT_CHOICE ||
           t->desc.capacity.keep == CLMOE_KEEP_ROUND;
}

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

/* The most pairs that there may be. */
static size_t find_pairs(const trial *t) {
    const clmoe_layer_desc *desc = &t->desc;
    const size_t T = t->tokens, E = desc->num_experts;
    if (desc->router.policy == CLMOE_POLICY_EXPERT_CHOICE)
        return E * least(desc->capacity.rows, T);
    if (desc->capacity.keep == CLMOE_KEEP_ROUND)
        return least(T * desc->top_k + E * least(desc->capacity.multiple / 2, T), T * E);
    return T * desc->top_k;
}

static void set_choice_sizes(trial *t) {
    if (t->desc.router.policy == CLMOE_POLICY_SOFT_MOE)
        return;
    t->pairs = (uint32_t)find_pairs(t);
    t->counts[TRIAL_IDS] = t->counts[TRIAL_WEIGHTS] = t->pairs;
    t->counts[TRIAL_OFFSETS] = trial_lists_pairs(t) ? t->tokens + 1 : 0;
}

static void set_gradient_sizes(trial *t) {
    size_t *n = t->counts;
    n[TRIAL_DY] = n[TRIAL_DX] = n[TRIAL_X];
    n[TRIAL_DROUTER] = n[TRIAL_ROUTER];
    n[TRIAL_DGROUP_ROUTER] = n[TRIAL_GROUP_ROUTER];
    n[TRIAL_DNOISE_ROUTER] = n[TRIAL_NOISE_ROUTER];
    n[TRIAL_DROUTER_BIAS] = n[TRIAL_ROUTER_BIAS];
    n[TRIAL_DGATE] = n[TRIAL_GATE];
    n[TRIAL_DDOWN] = n[TRIAL_DOWN];
    n[TRIAL_DSHARED_UP] = n[TRIAL_SHARED_UP];
    n[TRIAL_DSHARED_DOWN] = n[TRIAL_SHARED_DOWN];
    n[TRIAL_DSHARED_GATE] = n[TRIAL_SHARED_GATE];
}

/* Sizes in words as balance.h says. */
static void set_balance_sizes(trial *t) {
    const size_t E = t->desc.num_experts;
    size_t *n = t->counts;
    n[TRIAL_STATE] = 5 * E;
    n[TRIAL_NEXT_COUNTS] = n[TRIAL_NEXT_STATE] = sizeof(clmoe_state) / 4 + 5 * E;
    n[TRIAL_COUNTS] = n[TRIAL_STATS] =
        sizeof(clmoe_stats) / 4 + 8 * E + t->desc.balance.device_groups;
    n[TRIAL_BIAS_COUNTS] = t->desc.router.select_bias ? E * CLMOE_BIAS_BINS : 0;
    n[TRIAL_DLOGITS] = t->tokens * E;
    n[TRIAL_DNOISE] = t->desc.router.noise.kind == CLMOE_NOISE_LEARNED ? t->tokens * E : 0;
    set_losses(t);
}

static void set_weight_sizes(trial *t) {
    const clmoe_layer_desc *desc = &t->desc;
    const clmoe_router_desc *router = &desc->router;
    const size_t D = desc->dim, E = desc->num_experts, H = desc->experts.hidden_dim;
    const size_t p = router->policy == CLMOE_POLICY_SOFT_MOE ? router->soft_moe.slots : 1;
    size_t *n = t->counts;
    n[TRIAL_ROUTER] = E * p * D;
    n[TRIAL_GROUP_ROUTER] = router->groups.two_level ? router->groups.count * D : 0;
    n[TRIAL_NOISE_ROUTER] = router->noise.kind == CLMOE_NOISE_LEARNED ? E * D : 0;
    n[TRIAL_ROUTER_BIAS] = router->bias ? E : 0;
    n[TRIAL_GATE] = E * 2 * H * D;
    n[TRIAL_DOWN] = E * D * H;
    n[TRIAL_SHARED_UP] = 2 * D * desc->shared.hidden_dim;
    n[TRIAL_SHARED_DOWN] = D * desc->shared.hidden_dim;
    n[TRIAL_SHARED_GATE] = desc->shared_gate ? D : 0;
}

static void set_sizes(trial *t) {
    const size_t T = t->tokens, E = t->desc.num_experts;
    size_t *n = t->counts;
    n[TRIAL_X] = n[TRIAL_Y] = T * t->desc.dim;
    n[TRIAL_MASK] = t->batch->kind == BATCH_MASKED ? T : 0;
    n[TRIAL_LOGITS] = t->batch->kind > BATCH_MASKED ? T * E : 0;
    set_weight_sizes(t);
    set_choice_sizes(t);
    if (t->state)
        set_balance_sizes(t);
    if (t->desc.training)
        set_gradient_sizes(t);
}

static void set_types(trial *t) {
    static const trial_array of_layer[] = {
        TRIAL_X,    TRIAL_DY,   TRIAL_Y,         TRIAL_DX,
        TRIAL_GATE, TRIAL_DOWN, TRIAL_SHARED_UP, TRIAL_SHARED_DOWN,
    };
    for (size_t i = 0; i < sizeof of_layer / sizeof of_layer[0]; i++)
        t->types[of_layer[i]] = t->desc.type;
    t->types[TRIAL_MASK] = TRIAL_U8;
    t->types[TRIAL_BIAS_COUNTS] = t->types[TRIAL_COUNTS] = t->types[TRIAL_NEXT_COUNTS] = TRIAL_U32;
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

/* Of the arrays select_bias, ema, previous, idle_tokens and momentum. */
static double state_value(size_t array, uint64_t *seed) {
    const double value = trial_random(seed);
    if (array == 3)
        return floor(value * 24);
    return array == 1 || array == 2 ? value / 3 : (value - 0.5) / 4;
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
    case TRIAL_NOISE_ROUTER:
    case TRIAL_ROUTER_BIAS:
        return eighths(seed, 3);
    case TRIAL_STATE:
        return state_value(at / t->desc.num_experts, seed);
    case TRIAL_GATE:
    case TRIAL_SHARED_UP:
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
