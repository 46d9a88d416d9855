/*
 * Every kernel of ours on small shapes, in both forms, on buffers without a spare byte and without
 * a first value: made to be run under Oclgrind (see oclgrind.sh), where an access out of bounds, a
 * race or a read of memory that nothing wrote is reported.
 */
#include "ref_balance.h"
#include "support.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

static const shape small = {9, 10, 12, 2, 3, 7};

static void dropless(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}

static void capacity_by_priority(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.select_bias = 1;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.renorm.after_drop = 1;
    d->capacity.factor = 0.7;
    d->capacity.keep = CLMOE_KEEP_PRIORITY;
    d->shared.hidden_dim = 5;
    d->shared_gate = 1;
}

static void capacity_by_weight(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SPARSEMIXER;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->capacity.rows = 2;
    d->capacity.keep = CLMOE_KEEP_WEIGHT;
    d->normalize_experts = 1;
    d->output_bias = 1;
}

static void groups_and_biases(clmoe_layer_desc *d) {
    d->router.groups.count = 7;
    d->router.groups.topk = 3;
    d->router.groups.score = CLMOE_GROUP_TOP2_SUM;
    d->router.bias = 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.gate_up_transposed = d->experts.down_transposed = 1;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
}

static void plain_mlp(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    d->router.expert_scale = 1;
    d->experts.gate_layout = CLMOE_GATE_NONE;
    d->experts.activation = CLMOE_ACT_RELU2;
}

/* More columns than one bitonic chunk. */
static void many_columns(clmoe_layer_desc *d) {
    d->num_experts = 1030;
    d->dim = 3;
    d->experts.hidden_dim = 2;
}

static void expert_choice(clmoe_layer_desc *d) {
    d->num_experts = 14;
    d->num_identity_experts = 0;
    d->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    d->router.expert_scale = 1;
    d->capacity.rows = 3;
}

static void token_rounding(clmoe_layer_desc *d) {
    d->num_experts = 14;
    d->num_identity_experts = 0;
    d->router.expert_scale = 1;
    d->capacity.keep = CLMOE_KEEP_ROUND;
    d->capacity.multiple = 3;
}

static void sinkhorn(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_SINKHORN;
    d->router.sinkhorn.iterations = 3;
    d->router.expert_scale = 1;
}

static void all_experts(clmoe_layer_desc *d) {
    d->top_k = d->num_experts + d->num_identity_experts;
    d->router.policy = CLMOE_POLICY_ALL_EXPERTS;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}

static void two_level(clmoe_layer_desc *d) {
    d->top_k = 4;
    d->router.groups.two_level = 1;
    d->router.groups.count = 7;
    d->router.groups.topk = 4;
    d->router.select_bias = 1;
}

static void soft_moe(clmoe_layer_desc *d) {
    d->top_k = 1;
    d->num_identity_experts = 0;
    d->router.policy = CLMOE_POLICY_SOFT_MOE;
    d->router.soft_moe.slots = 3;
}

static void reroute(clmoe_layer_desc *d) {
    d->num_identity_experts = 0;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.expert_scale = 1;
    d->capacity.factor = 1.0;
    d->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
}

static void sequences_by_weight(clmoe_layer_desc *d) {
    d->capacity.rows = 1;
    d->capacity.keep = CLMOE_KEEP_WEIGHT;
    d->capacity.tokens_per_sequence = 4;
}

static void sequences_by_priority(clmoe_layer_desc *d) {
    sequences_by_weight(d);
    d->capacity.keep = CLMOE_KEEP_PRIORITY;
    d->capacity.tokens_per_sequence = 3;
}

typedef struct kernel_case {
    const char *name;
    uint32_t tokens;
    void (*set)(clmoe_layer_desc *desc); /* NULL: the shared one of that name */
    bool routing;                        /* alone is of interest: one engine is enough */
} kernel_case;

static const kernel_case cases[] = {
    {"dropless", 9, dropless, false},
    {"capacity by priority", 9, capacity_by_priority, true},
    {"capacity by weight", 9, capacity_by_weight, true},
    {"groups and biases", 9, groups_and_biases, false},
    {"plain MLP", 9, plain_mlp, false},
    {"many columns", 2, many_columns, false},
    {"expert choice", 9, expert_choice, true},
    {"token rounding", 9, token_rounding, true},
    {"Sinkhorn", 9, sinkhorn, true},
    {"all experts", 9, all_experts, true},
    {"two levels", 9, two_level, true},
    {"Soft MoE", 9, soft_moe, false},
    {"reroute", 9, reroute, true},
    {"rebalance", 9, NULL, true},
    {"sequences by weight", 9, sequences_by_weight, true},
    {"sequences by priority", 9, sequences_by_priority, true},
};

/* The batch again, with the weights in the engine's own form. */
static void run_packed(clmoe_layer *layer, const batch *b, device_batch *d) {
    batch_upload(layer, b, d);
    weights_pack(layer, CLMOE_MLP_EXPERTS, &d->weights.experts);
    if (b->desc.shared.hidden_dim)
        weights_pack(layer, CLMOE_MLP_SHARED, &d->weights.shared);
    OK(clmoe_forward(layer, test.queue, &d->args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
}

static void run_case(const kernel_case *c, const char *engine, uint32_t form) {
    batch b;
    device_batch d;
    size_t bytes = 0;
    clmoe_layer_desc desc = desc_of(&small);
    variant_set(&desc, c->name, c->set);
    desc.engine = engine;
    seed_set(3);
    batch_make(&b, &desc, c->tokens);
    b.in.residual = random_floats((size_t)c->tokens * desc.dim, 1.0);
    b.in.token_mask = random_mask(c->tokens);
    clmoe_layer *layer = test_layer(form, &desc);
    const ref_result *want = batch_reference(&b);
    batch_upload(layer, &b, &d);
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    batch_compare(&b, &d, want);
    if (c->routing || clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes) != CLMOE_SUCCESS)
        return;
    run_packed(layer, &b, &d);
    batch_compare(&b, &d, want);
}

/* Losses of every source of P and of F, by sequence and by device group. */
static const clmoe_loss_desc losses[] = {
    {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .per_sequence = 1, .f_source = CLMOE_F_FRESH},
    {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .p_source = CLMOE_P_RAW, .per_device = 1},
    {.kind = CLMOE_LOSS_MAX, .weight = 1.0f, .p_source = CLMOE_P_SOFTMAX},
    {.kind = CLMOE_LOSS_MINIMAX, .weight = 1.0f, .f_source = CLMOE_F_FIRST},
    {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS},
    {.kind = CLMOE_LOSS_COMMUNICATION, .weight = 1.0f, .per_sequence = 1},
    {.kind = CLMOE_LOSS_Z, .weight = 1.0f},
    {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f, .p_source = CLMOE_P_SOFTMAX},
    {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f, .controlled = 1},
    {.kind = CLMOE_LOSS_L1, .weight = 1.0f, .f_source = CLMOE_F_EMA},
    {.kind = CLMOE_LOSS_SMOOTH_LOAD, .weight = 1.0f},
};

static void biased_choice(clmoe_layer_desc *d) {
    d->router.select_bias = 1;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}

static void learned_noise(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}

static const layer_variant loss_variants[] = {
    {"losses", biased_choice},
    {"losses with noise and a state", learned_noise},
    {"losses of two levels", two_level},
};

/* The losses that a layer has; those with a state are the last ones. */
static uint32_t losses_of(const clmoe_layer_desc *desc, clmoe_loss_desc *list) {
    const size_t all = COUNT_OF(losses) - (desc->router.noise.kind == CLMOE_NOISE_NONE ? 3 : 0);
    uint32_t count = 0;
    for (size_t i = 0; i < all; i++)
        if (losses[i].p_source != CLMOE_P_WEIGHTS || !desc->router.groups.two_level)
            list[count++] = losses[i];
    return count;
}

static void run_losses(uint32_t form, const layer_variant *variant) {
    batch b;
    device_batch d;
    size_t bytes = 0;
    clmoe_loss_desc list[COUNT_OF(losses)];
    clmoe_layer_desc desc = desc_of(&small);
    variant->set(&desc);
    desc.capacity.rows = 2;
    desc.capacity.tokens_per_sequence = 4;
    desc.balance.device_groups = 6;
    seed_set(3);
    batch_make(&b, &desc, small.tokens);
    clmoe_layer *layer = test_layer(form, &desc);
    batch_upload(layer, &b, &d);
    d.weights.noise_router = d.weights.router;
    OK(clmoe_state_size(layer, &bytes));
    const uint32_t count = losses_of(&desc, list);
    if (desc.router.noise.kind != CLMOE_NOISE_NONE) {
        d.args.state = buf_new(bytes);
        OK(clmoe_state_init(layer, test.queue, d.args.state, 5, 0, NULL, NULL));
    }
    bytes = (size_t)small.tokens * ref_columns(&desc) * sizeof(float);
    d.args.losses = list;
    d.args.num_losses = count;
    d.args.loss_values = buf_new(count * sizeof(float));
    d.args.dlogits = buf_of(HOST(char, bytes), bytes);
    d.args.dnoise = buf_of(HOST(char, bytes), bytes);
    d.args.dgroup_logits = buf_of(HOST(char, bytes), bytes);
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    const float *values = buf_get(d.args.loss_values), *slopes = buf_get(d.args.dlogits);
    for (size_t i = 0; i < count; i++)
        CHECK(isfinite(values[i]), "%s\n", clmoe_loss_name(list[i].kind));
    for (size_t i = 0; i < bytes / sizeof(float); i++)
        CHECK(isfinite(slopes[i]), "dlogits[%zu]\n", i);
}

/* Router orthogonality of every type of router and of gradient. */
static void run_orthogonality(uint32_t form, clmoe_type type) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.type = desc.weight_type = desc.router.weight_type = type;
    desc.gradient_type =
        type == CLMOE_F16 ? CLMOE_GRADIENT_F32 : (clmoe_gradient_type)CLMOE_GRADIENT_OF_WEIGHT;
    desc.balance.router_orthogonality = 1;
    const clmoe_type sum = type == CLMOE_F16 ? CLMOE_F32 : type;
    const size_t rows = ref_columns(&desc), n = rows * desc.dim;
    seed_set(3);
    clmoe_layer *layer = test_layer(form, &desc);
    float *router = random_floats(n, 0.4), *start = random_floats(n, 1.0);
    double *doubles = HOST(double, n), *want = HOST(double, n);
    round_all(type, router, n);
    round_all(sum, start, n);
    for (size_t i = 0; i < n; i++)
        doubles[i] = (double)router[i];
    ref_orthogonality_gradient(doubles, rows, desc.dim, want);
    for (size_t i = 0; i < n; i++)
        want[i] += (double)start[i];
    const clmoe_weights weights = {.router = buf_of_type(type, router, n)};
    const clmoe_router_orthogonality_args args = {.struct_size = sizeof args,
                                                  .weights = &weights,
                                                  .weight = 1.0f,
                                                  .scratch = scratch_of(layer, 0),
                                                  .value = buf_new(4),
                                                  .drouter = buf_of_type(sum, start, n)};
    const double value = ref_orthogonality(doubles, rows, desc.dim);
    OK(clmoe_router_orthogonality(layer, test.queue, &args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    compare_floats("value", buf_get(args.value), &value, 1, 2e-6);
    compare_floats("drouter", buf_get_type(args.drouter, sum, n), want, n, type_tolerance(sum));
}

/* Everything that a state makes random, and its update. */
static void with_state(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
    d->router.noise.jitter = 0.1f;
    d->router.noise.jitter_experts = 1;
    d->router.dropout.experts = 0.9f;
    d->router.dropout.logits = 0.1f;
    d->router.select_bias = 1;
    d->capacity.rows = 2;
    d->capacity.keep = CLMOE_KEEP_RANDOM;
}

static void run_state(uint32_t form, bool quantile) {
    batch b;
    device_batch d;
    size_t bytes = 0;
    clmoe_balance_args balance;
    clmoe_layer_desc desc = desc_of(&small);
    with_state(&desc);
    desc.num_identity_experts = quantile ? 0 : desc.num_identity_experts;
    seed_set(3);
    batch_make(&b, &desc, small.tokens);
    clmoe_layer *layer = test_layer(form, &desc);
    batch_upload(layer, &b, &d);
    d.weights.noise_router = d.weights.router;
    d.weights.select_bias = (clmoe_buf){NULL, 0};
    OK(clmoe_state_size(layer, &bytes));
    d.args.state = buf_new(bytes);
    clmoe_balance_args_init(&balance);
    balance.state = d.args.state;
    balance.stats = d.args.stats;
    balance.bias_rule = CLMOE_BIAS_PROPORTIONAL;
    balance.bias_centred = 1;
    balance.target_violation = 1.0f;
    balance.target_drop_rate = 0.1f;
    if (quantile) {
        OK(clmoe_bias_counts_size(layer, &bytes));
        balance.bias_rule = CLMOE_BIAS_QUANTILE;
        balance.bias_counts = d.args.bias_counts = buf_of(HOST(char, bytes), bytes);
    }
    OK(clmoe_state_init(layer, test.queue, d.args.state, 5, 0, NULL, NULL));
    for (int step = 0; step < 2; step++) {
        OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
        OK(clmoe_balance_update(layer, test.queue, &balance, 0, NULL, NULL));
    }
    const clmoe_state *s = buf_get(d.args.state);
    CHECK(s->step == 2 && s->updates == 2, "step %u, updates %u\n", s->step, s->updates);
}

static void kernels_with_a_state(void **state) {
    (void)state;
    uint32_t forms[2];
    const size_t num_forms = test_forms(forms);
    support_bare = true;
    for (size_t form = 0; form < num_forms; form++) {
        test_case("state, groups of %u", forms[form]);
        run_state(forms[form], false);
        run_state(forms[form], true);
        for (size_t i = 0; i < COUNT_OF(loss_variants); i++) {
            test_case("%s, groups of %u", loss_variants[i].name, forms[form]);
            run_losses(forms[form], &loss_variants[i]);
        }
        for (clmoe_type type = 0; type <= CLMOE_BF16; type++) {
            test_case("router orthogonality, type %u, groups of %u", type, forms[form]);
            run_orthogonality(forms[form], type);
        }
    }
}

/*
 * The forms are of the steps around the engines, which take one each; tiled, which takes longest
 * under Oclgrind, runs every third case. Cases of routing have one engine with both forms, under
 * Oclgrind the one that is soonest done there.
 */
static void kernels_on_small_shapes(void **state) {
    (void)state;
    uint32_t forms[2];
    const size_t num_forms = test_forms(forms);
    const char *const *engines = test_engines();
    const char *routing = on_oclgrind() ? "cpu" : "ref";
    support_bare = true;
    for (size_t i = 0; i < COUNT_OF(cases); i++)
        for (size_t n = 0; engines[n] != NULL; n++)
            for (size_t form = 0; form < num_forms; form++) {
                const char *both = cases[i].routing ? routing : "ref";
                const bool takes_both = strcmp(engines[n], both) == 0;
                const bool tiled = strcmp(engines[n], "tiled") == 0;
                if (strcmp(engines[n], "clblast") == 0 || (cases[i].routing && !takes_both) ||
                    (!takes_both && (i + form) % num_forms != 0) || (tiled && i % 3 != 0))
                    continue;
                test_case("%s, engine %s, groups of %u", cases[i].name, engines[n], forms[form]);
                run_case(&cases[i], engines[n], forms[form]);
            }
}

/* ---- Copies of experts --------------------------------------------------------------------- */

/* Two copies of each, the ids of the plan's own pairs. */
static void run_replicate(uint32_t form) {
    ref_plan_in in;
    clmoe_plan_layout layout;
    const uint32_t tokens = 700; /* of more pairs than one group plans */
    const clmoe_layer_desc desc = desc_of(&small);
    const uint32_t E = desc.num_experts, Z = desc.num_identity_experts;
    clmoe_layer *layer = test_layer(form, &desc);
    int32_t *copies = HOST(int32_t, E), *slots = HOST(int32_t, 2 * E);
    for (uint32_t e = 0; e < E; e++) {
        copies[e] = 2;
        slots[2 * e] = (int32_t)e;
        slots[2 * e + 1] = (int32_t)(E + e);
    }
    seed_set(3);
    route_random(&desc, tokens, PATTERN_ZIPF, &in);
    const clmoe_buf plan = plan_run(layer, &desc, &in, &layout);
    const clmoe_replicate_args args = {.struct_size = sizeof args,
                                       .tokens = tokens,
                                       .replicas = 2 * E,
                                       .max_copies = 2,
                                       .ids = buf_of(in.ids, layout.pairs * 4),
                                       .plan = plan,
                                       .copies = buf_of(copies, E * 4),
                                       .logical_to_physical = buf_of(slots, E * 8),
                                       .physical_ids = buf_new(layout.pairs * 4)};
    OK(clmoe_replicate(layer, test.queue, &args, 0, NULL, NULL));
    const int32_t *got = buf_get(args.physical_ids);
    for (uint32_t p = 0; p < layout.pairs; p++) {
        const int32_t id = in.ids[p];
        CHECK(got[p] < (int32_t)(2 * E + Z) && got[p] % (int32_t)E == id % (int32_t)E,
              "pair %u of %d goes to %d\n", p, (int)id, (int)got[p]);
    }
}

static void kernels_of_copies(void **state) {
    (void)state;
    uint32_t forms[2];
    const size_t num_forms = test_forms(forms);
    support_bare = true;
    for (size_t form = 0; form < num_forms; form++) {
        test_case("copies, groups of %u", forms[form]);
        run_replicate(forms[form]);
    }
}

/* ---- Offsets of any values ----------------------------------------------------------------- */

static void reroute_by_offsets(clmoe_layer_desc *d) {
    reroute(d);
    d->router.renorm.kind = CLMOE_RENORM_NONE;
    d->balance.device_groups = 4;
}

static void few_sequences(clmoe_layer_desc *d) {
    d->capacity.rows = 2;
    d->capacity.tokens_per_sequence = 4;
    d->capacity.keep = CLMOE_KEEP_CHOICE_MAJOR;
}

static const layer_variant offset_layers[] = {
    {"dropless", dropless},
    {"capacity by weight", capacity_by_weight},
    {"reroute", reroute_by_offsets},
    {"expert choice", expert_choice},
    {"token rounding", token_rounding},
    {"sequences, choice-major", few_sequences},
};

typedef enum bad_kind { WILD, NEAR, DOWNWARDS, SHARED, TOO_MANY, BAD_KINDS } bad_kind;

static const char *const bad_names[BAD_KINDS] = {"wild", "anywhere near", "downwards",
                                                 "of two tokens at once", "of too many pairs"};

/* offsets [T+1]. */
static int32_t *bad_offsets(bad_kind kind, uint32_t tokens, int32_t pairs) {
    const int32_t wild[] = {INT32_MIN, -1, 0, pairs - 1, pairs, pairs + 1, INT32_MAX};
    int32_t *offsets = HOST(int32_t, tokens + 1);
    for (uint32_t t = 0; t <= tokens; t++) {
        const int32_t of_kind[BAD_KINDS] = {
            [WILD] = wild[random_below(COUNT_OF(wild))],
            [NEAR] = (int32_t)random_below((uint32_t)pairs + 9) - 4,
            [DOWNWARDS] = pairs - (int32_t)t,
            [SHARED] = t % 2 ? 3 : 0,
            [TOO_MANY] = 1000 * (int32_t)t,
        };
        offsets[t] = of_kind[kind];
    }
    return offsets;
}

/* The arrays of one batch, for all steps that read token_offsets. */
typedef struct offset_batch {
    clmoe_layer *layer;
    clmoe_layer_desc desc;
    clmoe_plan_layout layout;
    clmoe_weights weights;
    clmoe_buf x, scores, ids, pair_weights, live, offsets, plan, scratch;
} offset_batch;

static void make_offset_batch(offset_batch *b, uint32_t form, size_t which, bad_kind kind) {
    static const int32_t lives[] = {INT32_MIN, -1, 0, 1, 2, 3, INT32_MAX};
    b->desc = desc_of(&small);
    b->desc.num_identity_experts = 0;
    offset_layers[which].set(&b->desc);
    b->layer = test_layer(form, &b->desc);
    OK(clmoe_plan_layout_get(b->layer, small.tokens, &b->layout));
    const size_t T = small.tokens, P = b->layout.pairs, R = ref_columns(&b->desc);
    ref_weights weights = weights_make(&b->desc);
    int32_t *ids = HOST(int32_t, P), *live = HOST(int32_t, T);
    for (size_t p = 0; p < P; p++)
        ids[p] = (int32_t)random_below(random_below(2) ? 3 : (uint32_t)R);
    for (size_t t = 0; t < T; t++)
        live[t] = lives[random_below(COUNT_OF(lives))];
    b->weights = weights_upload(&b->desc, &weights);
    b->x = buf_of(random_floats(T * b->desc.dim, 1.0), T * b->desc.dim * 4);
    b->scores = buf_of(random_floats(T * R, 1.0), T * R * 4);
    b->ids = buf_of(ids, P * 4);
    b->pair_weights = buf_of(random_floats(P, 1.0), P * 4);
    b->live = random_below(2) ? buf_of(live, T * 4) : (clmoe_buf){NULL, 0};
    b->offsets = buf_of(bad_offsets(kind, small.tokens, (int32_t)P), (T + 1) * 4);
    b->plan = buf_new(b->layout.bytes);
    b->scratch = scratch_of(b->layer, small.tokens);
}

/*
 * Every row in use is a pair's and a token's, no token has more than K, and no pair's slot is out
 * of range.
 */
static void check_rows(const offset_batch *b) {
    const uint32_t most = ref_lists_pairs(&b->desc) ? b->layout.pairs : b->desc.top_k;
    uint32_t *rows = HOST(uint32_t, small.tokens);
    const char *plan = buf_get(b->plan);
    const clmoe_plan_layout *at = &b->layout;
    const uint32_t *kept = (const uint32_t *)(const void *)(plan + at->kept);
    const uint32_t *offsets = (const uint32_t *)(const void *)(plan + at->offsets);
    const int32_t *slot_of = (const int32_t *)(const void *)(plan + at->slot_of);
    const int32_t *pair_of = (const int32_t *)(const void *)(plan + at->pair_of);
    const int32_t *token_of = (const int32_t *)(const void *)(plan + at->token_of);
    for (uint32_t e = 0; e < b->desc.num_experts; e++)
        for (uint32_t slot = offsets[e]; slot < offsets[e] + kept[e]; slot++) {
            CHECK(slot < at->slots && pair_of[slot] >= 0 && (uint32_t)pair_of[slot] < at->pairs &&
                      token_of[slot] >= 0 && (uint32_t)token_of[slot] < small.tokens,
                  "slot %u of expert %u\n", slot, e);
            CHECK(++rows[token_of[slot]] <= most, "token %d has more rows\n", token_of[slot]);
        }
    for (uint32_t p = 0; p < at->pairs; p++)
        CHECK(slot_of[p] >= -2 && slot_of[p] < (int32_t)at->slots, "slot_of[%u] is %d\n", p,
              slot_of[p]);
}

static void run_plan_and_combine(const offset_batch *b) {
    const size_t T = small.tokens, D = b->desc.dim;
    clmoe_buf ye = buf_new(b->layout.slots * D * 4);
    clmoe_plan_args plan = {.struct_size = sizeof plan,
                            .tokens = small.tokens,
                            .ids = b->ids,
                            .pair_weights = b->pair_weights,
                            .live = b->live,
                            .token_offsets = b->offsets,
                            .scores = b->scores,
                            .weights = &b->weights,
                            .scratch = b->scratch,
                            .plan = b->plan};
    clmoe_experts_args experts = {.struct_size = sizeof experts,
                                  .tokens = small.tokens,
                                  .weights = &b->weights,
                                  .x = b->x,
                                  .pair_weights = b->pair_weights,
                                  .plan = b->plan,
                                  .scratch = b->scratch,
                                  .ye = ye};
    clmoe_combine_args combine = {.struct_size = sizeof combine,
                                  .tokens = small.tokens,
                                  .weights = &b->weights,
                                  .x = b->x,
                                  .ye = ye,
                                  .pair_weights = b->pair_weights,
                                  .plan = b->plan,
                                  .token_offsets = b->offsets,
                                  .y = buf_new(T * D * 4)};
    OK(clmoe_plan(b->layer, test.queue, &plan, 0, NULL, NULL));
    OK(clmoe_experts(b->layer, test.queue, &experts, 0, NULL, NULL));
    OK(clmoe_combine(b->layer, test.queue, &combine, 0, NULL, NULL));
    check_rows(b);
    const float *y = buf_get(combine.y);
    for (size_t i = 0; i < T * D; i++)
        CHECK(isfinite(y[i]), "y[%zu] is %g\n", i, (double)y[i]);
}

/* The weights of a token's first K pairs, of its live ones; where pairs are listed, of R. */
static double weights_of(const offset_batch *b, uint32_t token) {
    const bool choice = ref_lists_pairs(&b->desc);
    const int32_t *offsets = buf_get(b->offsets);
    const int32_t *live = b->live.mem && !choice ? buf_get(b->live) : NULL;
    const float *weights = buf_get(b->pair_weights);
    const int64_t pairs = b->layout.pairs;
    const int64_t most = choice ? ref_columns(&b->desc) : b->desc.top_k;
    const int64_t begin = offsets[token] < 0 ? 0 : offsets[token];
    double sum = 0;
    for (int64_t p = begin; p < pairs && p < offsets[token + 1] && p < begin + most; p++)
        if (!live || p - begin < live[token])
            sum += (double)weights[p];
    return sum;
}

/* Whatever the offsets, statistics are of the pairs that the header says count. */
static void check_weight_sums(const offset_batch *b, clmoe_buf stats) {
    const size_t R = ref_columns(&b->desc);
    const char *bytes = buf_get(stats);
    const float *sums = (const float *)(const void *)(bytes + sizeof(clmoe_stats)) + 5 * R;
    double got = 0, want = 0;
    for (size_t e = 0; e < R; e++)
        got += (double)sums[e];
    for (uint32_t t = 0; t < small.tokens; t++)
        want += weights_of(b, t);
    CHECK(fabs(got - want) < 1e-4, "weights of %g, not %g\n", got, want);
}

static void run_balance(const offset_batch *b) {
    static const clmoe_loss_desc by_pairs[] = {
        {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .f_source = CLMOE_F_FIRST},
        {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS}};
    const size_t logits = (size_t)small.tokens * ref_columns(&b->desc) * 4;
    const bool weights = b->desc.router.score != CLMOE_SCORE_SPARSEMIXER;
    clmoe_stats_args stats = {.struct_size = sizeof stats,
                              .tokens = small.tokens,
                              .logits = b->scores,
                              .ids = b->ids,
                              .pair_weights = b->pair_weights,
                              .plan = b->plan,
                              .live = b->live,
                              .token_offsets = b->offsets,
                              .scratch = b->scratch,
                              .stats = buf_new(stats_size(b->layer))};
    clmoe_loss_args loss = {.struct_size = sizeof loss,
                            .tokens = small.tokens,
                            .losses = by_pairs,
                            .num_losses = weights ? 2 : 1,
                            .weights = &b->weights,
                            .logits = b->scores,
                            .ids = b->ids,
                            .pair_weights = b->pair_weights,
                            .plan = b->plan,
                            .live = b->live,
                            .token_offsets = b->offsets,
                            .scratch = b->scratch,
                            .values = buf_new(8),
                            .dlogits = buf_of(HOST(char, logits), logits)};
    OK(clmoe_stats_compute(b->layer, test.queue, &stats, 0, NULL, NULL));
    OK(clmoe_loss(b->layer, test.queue, &loss, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    if (b->desc.capacity.overflow != CLMOE_OVERFLOW_REROUTE) /* which makes other weights */
        check_weight_sums(b, stats.stats);
}

static void run_offsets(size_t which, bad_kind kind, uint32_t form) {
    offset_batch b;
    test_case("%s, offsets %s, groups of %u", offset_layers[which].name, bad_names[kind], form);
    seed_set(kind + 1);
    make_offset_batch(&b, form, which, kind);
    run_plan_and_combine(&b);
    run_balance(&b);
}

/*
 * Without canaries for a tool that watches: what gives no pair to two tokens, who would race for
 * its place. The forms take turns.
 */
static void offsets_of_any_values(void **state) {
    (void)state;
    uint32_t forms[2];
    const size_t num_forms = test_forms(forms);
    support_bare = true;
    for (size_t which = 0; which < COUNT_OF(offset_layers); which++) {
        run_offsets(which, DOWNWARDS, forms[which % num_forms]);
        run_offsets(which, TOO_MANY, forms[which % num_forms]);
    }
}

/* With canaries for a device that runs. */
static void offsets_between_canaries(void **state) {
    (void)state;
    uint32_t forms[2];
    const size_t num_forms = test_forms(forms);
    char name[64] = "";
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_NAME, sizeof name, name, NULL));
    if (strstr(name, "Oclgrind"))
        skip();
    support_bare = false;
    for (size_t which = 0; which < COUNT_OF(offset_layers); which++)
        for (bad_kind kind = 0; kind < BAD_KINDS; kind++)
            for (size_t form = 0; form < num_forms; form++)
                run_offsets(which, kind, forms[form]);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(kernels_on_small_shapes), TEST(kernels_with_a_state),
                                       TEST(kernels_of_copies), TEST(offsets_of_any_values),
                                       TEST(offsets_between_canaries)};
    return RUN(tests);
}
