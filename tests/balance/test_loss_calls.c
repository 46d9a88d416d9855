/* Losses and statistics as clmoe_forward() computes them, and calls that are refused. */
#include "balance/loss_function.clh"
#include "support_loss.h"

#include <math.h>
#include <string.h>

/* ---- clmoe_forward -----------------------------------------------------------------------------
 */

static const clmoe_loss_desc losses[] = {
    {.kind = CLMOE_LOSS_SWITCH, .weight = 0.5f, .controlled = 1},
    {.kind = CLMOE_LOSS_SWITCH,
     .weight = 1.0f,
     .p_source = CLMOE_P_SOFTMAX,
     .f_source = CLMOE_F_FRESH},
    {.kind = CLMOE_LOSS_ENTROPY, .weight = 1.0f, .f_source = CLMOE_F_EMA},
    {.kind = CLMOE_LOSS_SQUARED, .weight = 1.0f, .f_source = CLMOE_F_SUPPLIED},
    {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS},
    {.kind = CLMOE_LOSS_COMMUNICATION, .weight = 1.0f},
    {.kind = CLMOE_LOSS_OVERFLOW, .weight = 1.0f},
    {.kind = CLMOE_LOSS_Z, .weight = 0.01f},
    {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .weight = 1.0f},
    {.kind = CLMOE_LOSS_SMOOTH_LOAD, .weight = 1.0f},
};

/* What forward gave is put into `b`, as if it had been its input. */
static void take_outputs(balance_batch *b, const clmoe_forward_args *args) {
    size_t R = ref_columns(&b->desc), E = b->desc.num_experts, K = b->desc.top_k, e;
    const float *weights = buf_get(args->pair_weights);
    uint32_t *kept = HOST(uint32_t, R), C = ref_capacity(&b->desc, b->tokens);
    balance_set_logits(b, buf_get(args->logits));
    b->in.ids = buf_get(args->ids);
    b->in.live = NULL;
    b->in.pair_weights = weights;
    for (size_t t = 0; t < b->tokens; t++)
        for (size_t p = t * K; p < t * K + K && !ref_is_masked(&b->in, t); p++)
            kept[ref_pair_column(&b->desc, &b->in, p, &e) ? e : 0]++;
    for (e = 0; e < E; e++)
        kept[e] = C > 0 && kept[e] > C ? C : kept[e];
    b->in.kept = kept;
}

static void compare_losses(const balance_batch *b, const clmoe_forward_args *args) {
    size_t n = (size_t)b->tokens * ref_columns(&b->desc);
    const float *values = buf_get(args->loss_values);
    double *dlogits = HOST(double, n), *dnoise = HOST(double, n);
    bool learned = b->in.noise_input != NULL;
    for (size_t i = 0; i < COUNT_OF(losses); i++) {
        ref_loss fixed;
        ref_loss_make(&b->desc, &b->in, &losses[i], &fixed);
        ref_loss_gradient(&b->desc, &b->in, &losses[i], &fixed, dlogits, learned ? dnoise : NULL,
                          NULL);
        double error = fabs((double)values[i] - fixed.value) / fabs(fixed.value);
        worst_note("forward: values", error);
        CHECK(error <= LOSS_TOLERANCE, "%s is %.9g, not %.9g\n", loss_label(&losses[i]),
              (double)values[i], fixed.value);
        ref_loss_free(&fixed);
    }
    compare_floats("dlogits", buf_get(args->dlogits), dlogits, n, LOSS_TOLERANCE);
    if (learned)
        compare_floats("dnoise", buf_get(args->dnoise), dnoise, n, LOSS_TOLERANCE);
}

/* A loss of supplied loads without them, or with too few. */
static void needs_supplied(balance_batch *b, const clmoe_forward_args *good) {
    clmoe_forward_args args = *good;
    args.load_supplied = (clmoe_buf){NULL, 0};
    assert_int_equal(clmoe_forward(b->layer, test.queue, &args, 0, NULL, NULL),
                     CLMOE_INVALID_ARGUMENT);
    assert_non_null(strstr(clmoe_last_error(), "load_supplied is not given"));
    args.load_supplied = b->dev.load_supplied;
    args.load_supplied.offset += support_bare ? 4 : 256 + 4;
    assert_int_equal(clmoe_forward(b->layer, test.queue, &args, 0, NULL, NULL),
                     CLMOE_INVALID_ARGUMENT);
    assert_non_null(strstr(clmoe_last_error(), "load_supplied has "));
}

/* Forward on the inputs of `b`, which has noise, a state, a target and loads; everything is asked
 * for. */
static void run_forward(balance_batch *b) {
    size_t T = b->tokens, R = ref_columns(&b->desc), D = b->desc.dim, pairs = T * b->desc.top_k;
    ref_weights host = weights_make(&b->desc);
    clmoe_weights weights = weights_upload(&b->desc, &host);
    weights.router = b->weights.router;
    weights.noise_router = b->weights.noise_router;
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = b->tokens;
    args.weights = &weights;
    args.x = b->dev.x;
    args.token_mask = b->dev.token_mask;
    args.state = b->dev.state;
    args.load_target = b->dev.load_target;
    args.load_supplied = b->dev.load_supplied;
    args.scratch = b->dev.scratch;
    args.y = buf_new(T * D * 4);
    args.logits = buf_new(T * R * 4);
    args.ids = buf_new(pairs * 4);
    args.pair_weights = buf_new(pairs * 4);
    args.stats = buf_new(stats_size(b->layer));
    args.losses = losses;
    args.num_losses = COUNT_OF(losses);
    args.loss_values = buf_new(COUNT_OF(losses) * 4);
    args.dlogits = buf_of(HOST(float, T *R), T * R * 4);
    if (b->in.noise_input)
        args.dnoise = buf_of(HOST(float, T *R), T * R * 4);
    cl_event event = NULL;
    OK(clmoe_forward(b->layer, test.out_of_order, &args, 0, NULL, &event));
    CL_OK(clWaitForEvents(1, &event));
    clReleaseEvent(event);
    take_outputs(b, &args);
    balance_compare_stats(b, args.stats);
    compare_losses(b, &args);
    needs_supplied(b, &args);
}

static void forward(void **state) {
    (void)state;
    const shape s = {50, 7, 12, 0, 3, 5};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int kind = CLMOE_NOISE_GAUSSIAN; kind <= CLMOE_NOISE_LEARNED; kind++) {
            clmoe_layer_desc desc = desc_of(&s);
            desc.router.noise.kind = (clmoe_noise)kind;
            desc.router.renorm.kind = CLMOE_RENORM_SUM;
            desc.router.scale = 1.5f;
            desc.balance.device_groups = 4;
            desc.capacity.factor = 0.8;
            balance_options options = {.kind = PATTERN_UNIFORM,
                                       .mask = true,
                                       .state = true,
                                       .target = true,
                                       .supplied = true};
            test_case("group size %u, noise %d", group_sizes[g], kind);
            seed_set(g + 31);
            balance_batch b;
            balance_make(&b, &desc, s.tokens, &options);
            ((clmoe_state *)(uintptr_t)b.in.state)->loss_weight = 3.0f;
            loss_draw_noise(&b);
            balance_upload(&b, group_sizes[g]);
            run_forward(&b);
        }
}

/* ---- Small shapes ------------------------------------------------------------------------------
 */

#define LOSS(of) .kind = CLMOE_LOSS_##of, .weight = 1.0f

static const clmoe_loss_desc every_kind[] = {
    {LOSS(SWITCH), .f_source = CLMOE_F_SUPPLIED},
    {LOSS(SQUARED), .f_source = CLMOE_F_FRESH, .per_sequence = 1},
    {LOSS(ENTROPY), .f_source = CLMOE_F_SUPPLIED},
    {LOSS(L1), .f_source = CLMOE_F_FRESH, .per_sequence = 1},
    {LOSS(MAX)},
    {LOSS(MINIMAX), .per_sequence = 1},
    {LOSS(IMPORTANCE_VARIANCE), .p_source = CLMOE_P_WEIGHTS},
    {LOSS(IMPORTANCE_CV2), .per_sequence = 1},
    {LOSS(LOAD_CV2)},
    {LOSS(SMOOTH_LOAD), .per_sequence = 1},
    {LOSS(COMMUNICATION)},
    {LOSS(OVERFLOW), .per_sequence = 1},
    {LOSS(Z)},
    {LOSS(TOKEN_ENTROPY), .per_sequence = 1},
};
_Static_assert(COUNT_OF(every_kind) == LOSS_KINDS, "a row for every kind");

/* Which pairs are whose. */
static const struct {
    const char *name;
    bool offsets;
    clmoe_score_function score;
} choices[] = {
    {"the K best, softmax", false, CLMOE_SCORE_SOFTMAX},
    {"0 to K by offsets, sigmoid", true, CLMOE_SCORE_SIGMOID},
};

/* Statistics and every kind of loss, with learned noise, sequences and device groups. */
static void balance_case(uint32_t form, bool offsets, clmoe_score_function score) {
    const shape small = {9, 10, 12, 2, 3, 7};
    clmoe_layer_desc desc = desc_of(&small);
    desc.router.noise.kind = CLMOE_NOISE_LEARNED;
    desc.router.score = score;
    desc.balance.device_groups = 4;
    desc.capacity.tokens_per_sequence = 4;
    desc.capacity.rows = 2;
    balance_options options = {.kind = PATTERN_UNIFORM,
                               .mask = true,
                               .state = true,
                               .target = true,
                               .supplied = true,
                               .offsets = offsets};
    balance_batch b;
    seed_set(3);
    balance_make(&b, &desc, small.tokens, &options);
    loss_draw_noise(&b);
    balance_upload(&b, form);
    balance_compare_stats(&b, balance_stats(&b));
    for (size_t i = 0; i < LOSS_KINDS; i++)
        /* smooth load takes the K best for the chosen */
        if (every_kind[i].kind != CLMOE_LOSS_SMOOTH_LOAD || !offsets)
            loss_check(&b, &every_kind[i]);
    loss_run(&b, every_kind, LOSS_KINDS, NULL);
}

static void small_shapes(void **state) {
    (void)state;
    static const uint32_t forms[] = {1, 16};
    for (size_t form = 0; form < COUNT_OF(forms); form++)
        for (size_t i = 0; i < COUNT_OF(choices); i++) {
            test_case("balance, groups of %u, %s", forms[form], choices[i].name);
            balance_case(forms[form], choices[i].offsets, choices[i].score);
        }
}

/* ---- Refusals ----------------------------------------------------------------------------------
 */

/* A layer with sequences, devices, a capacity and no noise. */
static clmoe_layer_desc full_desc(void) {
    const shape s = {22, 5, 12, 0, 3, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.balance.device_groups = 4;
    desc.capacity.tokens_per_sequence = 7;
    desc.capacity.rows = 2;
    return desc;
}

static clmoe_loss_args args_of(balance_batch *b, const clmoe_loss_desc *loss, uint32_t count) {
    return (clmoe_loss_args){.struct_size = sizeof(clmoe_loss_args),
                             .tokens = b->tokens,
                             .losses = loss,
                             .num_losses = count,
                             .weights = &b->weights,
                             .logits = b->dev.logits,
                             .ids = b->dev.ids,
                             .pair_weights = b->dev.pair_weights,
                             .plan = b->dev.plan,
                             .live = b->dev.live,
                             .token_mask = b->dev.token_mask,
                             .state = b->dev.state,
                             .load_target = b->dev.load_target,
                             .load_supplied = b->dev.load_supplied,
                             .scratch = b->dev.scratch,
                             .values = buf_new(count * 4)};
}

/* A loss that is refused, and a part of the sentence. */
typedef struct refusal {
    clmoe_loss_desc loss;
    const char *says;
} refusal;

static void check_refused(balance_batch *b, const clmoe_loss_args *args, const char *says) {
    clmoe_status status = clmoe_loss(b->layer, test.queue, args, 0, NULL, NULL);
    CHECK(status == CLMOE_INVALID_ARGUMENT, "%s: the status is %s\n", says,
          clmoe_status_string(status));
    CHECK(strstr(clmoe_last_error(), says), "\"%s\" is not in: %s\n", says, clmoe_last_error());
    CHECK(!args->values.mem || buf_untouched(args->values), "%s: values were written\n", says);
}

static void refused(balance_batch *b, const clmoe_loss_desc *loss, uint32_t count,
                    const char *says) {
    clmoe_loss_args args = args_of(b, loss, count);
    check_refused(b, &args, says);
}

/* Losses that have no meaning, whatever the layer. */
static void descriptors(void **state) {
    (void)state;
    static const refusal wrong[] = {
        {{.kind = LOSS_KINDS, .weight = 1.0f}, "losses[0].kind is "},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = NAN}, "losses[0].weight is nan"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = INFINITY}, "losses[0].weight is inf"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS},
         "p_source weights is for the importance kinds"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS + 1},
         "losses[0].p_source is 4"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .f_source = CLMOE_F_SUPPLIED + 1},
         "losses[0].f_source is 5"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .f_source = CLMOE_F_EMA, .per_sequence = 1},
         "per_sequence, but f_source is of all sequences"},
        {{.kind = CLMOE_LOSS_ENTROPY,
          .weight = 1.0f,
          .f_source = CLMOE_F_SUPPLIED,
          .per_sequence = 1},
         "losses[0] is entropy, per_sequence, but f_source"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .per_sequence = 2},
         "losses[0].per_sequence is 2"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .per_device = 2}, "losses[0].per_device is 2"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .controlled = 2}, "losses[0].controlled is 2"},
        {{.kind = CLMOE_LOSS_MINIMAX, .weight = 1.0f, .beta = -1.0f}, "losses[0].beta is -1"},
        {{.kind = CLMOE_LOSS_MINIMAX, .weight = 1.0f, .beta = NAN}, "losses[0].beta is nan"},
        {{.kind = CLMOE_LOSS_SMOOTH_LOAD, .weight = 1.0f}, "needs router.noise.kind"},
    };
    clmoe_layer_desc desc = full_desc();
    balance_options options = {.kind = PATTERN_UNIFORM, .state = true, .supplied = true};
    balance_batch b;
    balance_make(&b, &desc, 22, &options);
    balance_upload(&b, 0);
    for (size_t i = 0; i < COUNT_OF(wrong); i++)
        refused(&b, &wrong[i].loss, 1, wrong[i].says);
    clmoe_loss_desc good[17];
    for (size_t i = 0; i < 17; i++)
        good[i] = (clmoe_loss_desc){.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f};
    refused(&b, good, 17, "num_losses is 17");
    refused(&b, good, 0, "num_losses is 0");
    refused(&b, NULL, 1, "losses is NULL");
}

/* Losses that need what the layer or the call does not have. */
static void needs(void **state) {
    (void)state;
    clmoe_layer_desc desc = full_desc();
    static const refusal with_state[] = {
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .f_source = CLMOE_F_EMA},
         "losses[0] is switch, which reads the state"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .f_source = CLMOE_F_SUPPLIED},
         "load_supplied is not given"},
        {{.kind = CLMOE_LOSS_MAX, .weight = 1.0f, .controlled = 1},
         "losses[0] is max, which reads the state"},
    };
    balance_options plain = {.kind = PATTERN_UNIFORM};
    balance_batch b;
    balance_make(&b, &desc, 22, &plain);
    balance_upload(&b, 0);
    for (size_t i = 0; i < COUNT_OF(with_state); i++)
        refused(&b, &with_state[i].loss, 1, with_state[i].says);
    test_case("no pair weights");
    balance_make(&b, &desc, 22, &plain);
    balance_upload(&b, 0);
    b.dev.pair_weights = (clmoe_buf){NULL, 0};
    clmoe_loss_desc loss = {
        .kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS};
    refused(&b, &loss, 1, "pair_weights is not given");
    test_case("no sequences, no devices");
    desc.capacity.tokens_per_sequence = 0;
    desc.balance.device_groups = 0;
    static const refusal with_groups[] = {
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .per_sequence = 1},
         "capacity.tokens_per_sequence is 0"},
        {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f, .per_device = 1},
         "losses[0] is switch, by device groups, but balance.device_groups is 0"},
        {{.kind = CLMOE_LOSS_COMMUNICATION, .weight = 1.0f},
         "losses[0] is communication, by device groups"},
    };
    balance_make(&b, &desc, 22, &plain);
    balance_upload(&b, 0);
    for (size_t i = 0; i < COUNT_OF(with_groups); i++)
        refused(&b, &with_groups[i].loss, 1, with_groups[i].says);
}

static void dropless(clmoe_layer_desc *d) {
    d->capacity.rows = 0;
    d->capacity.tokens_per_sequence = 0;
}

static void noise(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_GAUSSIAN;
}

static void noise_all(clmoe_layer_desc *d) {
    noise(d);
    d->top_k = d->num_experts;
}

static void noise_groups(clmoe_layer_desc *d) {
    noise(d);
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
}

static void noise_bias(clmoe_layer_desc *d) {
    noise(d);
    d->router.select_bias = 1;
}

static void noise_sinkhorn(clmoe_layer_desc *d) {
    noise(d);
    d->router.policy = CLMOE_POLICY_SINKHORN;
}

static void sparsemixer(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SPARSEMIXER;
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

static void two_level(clmoe_layer_desc *d) {
    d->router.groups.two_level = 1;
    d->router.groups.count = 6;
    d->router.groups.topk = 3;
}

static void rebalance(clmoe_layer_desc *d) {
    d->router.rebalance.iterations = 2;
}

static const struct {
    void (*set)(clmoe_layer_desc *desc); /* NULL: nothing */
    clmoe_loss_desc loss;
    const char *says;
} contradictory[] = {
    {NULL, {.kind = (clmoe_loss_kind)-1}, "losses[0].kind is 4294967295"},
    {NULL, {.kind = CLMOE_LOSS_Z, .per_device = 1}, "z, which has no form per_device"},
    {NULL, {.kind = CLMOE_LOSS_OVERFLOW, .per_device = 1}, "overflow, which has no form"},
    {NULL, {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .per_device = 1}, "token_entropy, which has no form"},
    {NULL, {.kind = CLMOE_LOSS_TOKEN_ENTROPY, .p_source = CLMOE_P_RAW}, "no distribution"},
    {NULL, {.kind = CLMOE_LOSS_OVERFLOW, .f_source = CLMOE_F_EMA}, "needs counts"},
    {NULL, {.kind = CLMOE_LOSS_COMMUNICATION, .f_source = CLMOE_F_FIRST}, "f_source is another"},
    {dropless, {.kind = CLMOE_LOSS_OVERFLOW}, "the layer has no capacity"},
    {noise_all, {.kind = CLMOE_LOSS_SMOOTH_LOAD}, "needs top_k < num_experts"},
    {noise_groups, {.kind = CLMOE_LOSS_SMOOTH_LOAD}, "no groups and no select_bias"},
    {noise_bias, {.kind = CLMOE_LOSS_SMOOTH_LOAD}, "no groups and no select_bias"},
    {noise_sinkhorn, {.kind = CLMOE_LOSS_SMOOTH_LOAD}, "needs plain token choice"},
    {noise, {.kind = CLMOE_LOSS_SMOOTH_LOAD}, "state is not given"},
    {sparsemixer,
     {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .p_source = CLMOE_P_WEIGHTS},
     "router.score sparsemixer does not have yet"},
    {two_level,
     {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .p_source = CLMOE_P_WEIGHTS},
     "router.groups.two_level does not have yet"},
    {rebalance,
     {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .p_source = CLMOE_P_WEIGHTS},
     "router.rebalance.iterations does not have yet"},
};

/* Losses that contradict themselves or the layer: each with its own sentence. */
static void contradictions(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(contradictory); i++) {
        clmoe_layer_desc desc = full_desc();
        if (contradictory[i].set)
            contradictory[i].set(&desc);
        test_case("%s", contradictory[i].says);
        clmoe_loss_args args = {.struct_size = sizeof args,
                                .tokens = 22,
                                .losses = &contradictory[i].loss,
                                .num_losses = 1,
                                .pair_weights = buf_new(22 * 3 * 4)};
        clmoe_status status = clmoe_loss(test_layer(0, &desc), test.queue, &args, 0, NULL, NULL);
        bool later = strstr(contradictory[i].says, "yet") != NULL;
        CHECK(status == (later ? CLMOE_UNSUPPORTED : CLMOE_INVALID_ARGUMENT), "it gave %s\n",
              clmoe_status_string(status));
        CHECK(strstr(clmoe_last_error(), contradictory[i].says), "it says: %s\n",
              clmoe_last_error());
    }
}

/* Learned noise reads x and a matrix again. */
static void noise_weights(void **state) {
    (void)state;
    clmoe_layer_desc desc = full_desc();
    desc.router.noise.kind = CLMOE_NOISE_LEARNED;
    balance_options options = {.kind = PATTERN_UNIFORM, .state = true};
    const clmoe_loss_desc loss = {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f};
    balance_batch b;
    test_case("learned noise");
    balance_make(&b, &desc, 22, &options);
    loss_draw_noise(&b);
    balance_upload(&b, 0);
    const clmoe_loss_args good = args_of(&b, &loss, 1);
    clmoe_weights weights = b.weights;
    weights.noise_router = (clmoe_buf){NULL, 0};
    const struct {
        const clmoe_weights *weights;
        clmoe_buf x;
        const char *says;
    } without[] = {{NULL, b.dev.x, "weights is NULL"},
                   {&b.weights, {NULL, 0}, "x is not given"},
                   {&weights, b.dev.x, "weights.noise_router is not given"}};
    for (size_t i = 0; i < COUNT_OF(without); i++) {
        clmoe_loss_args args = good;
        args.weights = without[i].weights;
        args.x = without[i].x;
        check_refused(&b, &args, without[i].says);
    }
}

static void check_forward_says(const device_batch *d, clmoe_layer *layer, const char *says) {
    clmoe_status status = clmoe_forward(layer, test.queue, &d->args, 0, NULL, NULL);
    CHECK(status == CLMOE_INVALID_ARGUMENT, "it gave %s\n", clmoe_status_string(status));
    CHECK(strstr(clmoe_last_error(), says), "it says: %s\n", clmoe_last_error());
    CHECK(buf_untouched(d->args.y), "y was written\n");
}

/* clmoe_forward() refuses the same, and losses of ids that no logits belong to. */
static void forward_refuses(void **state) {
    (void)state;
    batch b;
    device_batch d;
    clmoe_layer_desc desc = full_desc();
    clmoe_loss_desc loss = {.kind = CLMOE_LOSS_SWITCH, .weight = NAN};
    test_case("losses of clmoe_forward");
    batch_make(&b, &desc, 22);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_upload(layer, &b, &d);
    d.args.losses = &loss;
    d.args.num_losses = 1;
    check_forward_says(&d, layer, "losses[0].weight is nan");
    loss.weight = 1.0f;
    d.args.losses = NULL;
    check_forward_says(&d, layer, "losses is NULL");
    d.args.losses = &loss;
    check_forward_says(&d, layer, "num_losses is 1, but neither loss_values nor dlogits");
    d.args.num_losses = 0;
    check_forward_says(&d, layer, "losses is given, but num_losses is 0");
    d.args.losses = NULL;
    d.args.dlogits = buf_new(22 * ref_columns(&desc) * 4);
    check_forward_says(&d, layer, "dlogits is given, but num_losses is 0");
    b.in.ids_in = HOST(int32_t, 22 * 3);
    b.in.pair_weights_in = HOST(float, 22 * 3);
    batch_upload(layer, &b, &d);
    d.args.losses = &loss;
    d.args.num_losses = 1;
    check_forward_says(&d, layer, "with ids_in there are no logits");
}

/* Buffers that must be there. */
static void buffers(void **state) {
    (void)state;
    clmoe_layer_desc desc = full_desc();
    balance_options plain = {.kind = PATTERN_UNIFORM};
    balance_batch b;
    balance_make(&b, &desc, 22, &plain);
    balance_upload(&b, 0);
    const clmoe_loss_desc loss = {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f};
    const clmoe_loss_args good = args_of(&b, &loss, 1);
    static const struct {
        size_t offset;
        const char *says;
    } required[] = {{offsetof(clmoe_loss_args, logits), "logits is not given"},
                    {offsetof(clmoe_loss_args, ids), "ids is not given"},
                    {offsetof(clmoe_loss_args, plan), "plan is not given"},
                    {offsetof(clmoe_loss_args, scratch), "scratch is not given"}};
    for (size_t i = 0; i < COUNT_OF(required); i++) {
        clmoe_loss_args args = good;
        memset((char *)&args + required[i].offset, 0, sizeof(clmoe_buf));
        check_refused(&b, &args, required[i].says);
    }
    clmoe_loss_args args = good;
    args.dlogits = buf_new(22 * 12 * 4 - 4);
    args.dlogits.offset += support_bare ? 0 : 256 + 8;
    check_refused(&b, &args, "dlogits has ");
    OK(clmoe_loss(b.layer, test.queue, &good, 0, NULL, NULL));
}

/* The pairs of expert choice are a bound of the layer's; token_offsets say whose they are. */
static void expert_choice(void **state) {
    (void)state;
    const shape s = {32, 5, 8, 0, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    desc.capacity.rows = 16;
    clmoe_layer *layer = test_layer(0, &desc);
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(layer, s.tokens, &layout));
    const size_t pairs = (size_t)layout.pairs * 4;
    assert_int_equal(layout.pairs, 128);
    const clmoe_loss_desc importance = {
        .kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS};
    clmoe_loss_args loss = {.struct_size = sizeof loss,
                            .tokens = s.tokens,
                            .losses = &importance,
                            .num_losses = 1,
                            .logits = buf_of(random_floats(32 * 8, 1.0), 32 * 8 * 4),
                            .plan = buf_new(layout.bytes),
                            .scratch = scratch_of(layer, s.tokens),
                            .values = buf_new(4)};
    clmoe_stats_args stats = {.struct_size = sizeof stats, .tokens = s.tokens};
    stats.plan = loss.plan;
    stats.scratch = loss.scratch;
    stats.stats = buf_new(stats_size(layer));
    const clmoe_buf none = {NULL, 0}, enough = buf_new(pairs);
    clmoe_buf small = buf_new(4);
    small.offset += support_bare ? 0 : 256; /* behind the canary */
    const clmoe_buf offsets = buf_new(33 * 4);
    const struct {
        clmoe_buf ids, pair_weights, token_offsets;
        const char *says;
    } wrong[] = {{small, enough, offsets, "ids has "},
                 {enough, small, offsets, "pair_weights has "},
                 {enough, enough, none, "token_offsets is not given"},
                 {enough, enough, small, "token_offsets has "}};
    for (size_t i = 0; i < COUNT_OF(wrong); i++) {
        loss.ids = stats.ids = wrong[i].ids;
        loss.pair_weights = stats.pair_weights = wrong[i].pair_weights;
        loss.token_offsets = stats.token_offsets = wrong[i].token_offsets;
        CHECK(clmoe_loss(layer, test.queue, &loss, 0, NULL, NULL) == CLMOE_INVALID_ARGUMENT &&
                  strstr(clmoe_last_error(), wrong[i].says),
              "loss, %s: it says: %s\n", wrong[i].says, clmoe_last_error());
        CHECK(clmoe_stats_compute(layer, test.queue, &stats, 0, NULL, NULL) ==
                      CLMOE_INVALID_ARGUMENT &&
                  strstr(clmoe_last_error(), wrong[i].says),
              "stats, %s: it says: %s\n", wrong[i].says, clmoe_last_error());
    }
}

/* The gradient through the combine weights reads expert_scale; the value alone does not. */
static void expert_scale(void **state) {
    (void)state;
    clmoe_layer_desc desc = full_desc();
    desc.router.expert_scale = 1;
    balance_options plain = {.kind = PATTERN_UNIFORM};
    balance_batch b;
    balance_make(&b, &desc, 22, &plain);
    balance_upload(&b, 0);
    const clmoe_loss_desc loss = {
        .kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS};
    clmoe_loss_args args = args_of(&b, &loss, 1);
    args.weights = NULL;
    args.dlogits = buf_of(HOST(float, 22 * 12), 22 * 12 * 4);
    check_refused(&b, &args, "weights is NULL");
    clmoe_weights weights = b.weights;
    args.weights = &weights;
    weights.expert_scale = (clmoe_buf){NULL, 0};
    check_refused(&b, &args, "weights.expert_scale is not given");
    weights.expert_scale = b.weights.expert_scale;
    weights.expert_scale.offset += support_bare ? 12 * 4 : 256 + 4;
    check_refused(&b, &args, "weights.expert_scale has ");
    args.weights = &b.weights;
    OK(clmoe_loss(b.layer, test.queue, &args, 0, NULL, NULL));
    args.weights = NULL;
    args.dlogits = (clmoe_buf){NULL, 0};
    OK(clmoe_loss(b.layer, test.queue, &args, 0, NULL, NULL));
}

/* Losses of another version's size: further apart, with what this one does not know behind them. */
static void sizes_of_a_loss(void **state) {
    (void)state;
    enum { COUNT = 3 };
    struct {
        clmoe_loss_desc known;
        uint32_t more[2];
    } longer[COUNT];
    clmoe_loss_desc known[COUNT];
    clmoe_layer_desc desc = full_desc();
    balance_options options = {.kind = PATTERN_UNIFORM};
    balance_batch b;
    test_case("loss_size");
    balance_make(&b, &desc, 22, &options);
    balance_upload(&b, 0);
    memset(longer, 0, sizeof longer);
    for (size_t i = 0; i < COUNT; i++)
        longer[i].known = known[i] =
            (clmoe_loss_desc){.kind = (uint32_t)i, .weight = 1.0f, .beta = 2.0f};
    clmoe_loss_args first = args_of(&b, known, COUNT), same = args_of(&b, known, COUNT);
    clmoe_loss_args more = args_of(&b, &longer[0].known, COUNT);
    same.loss_size = sizeof *known;
    more.loss_size = sizeof *longer;
    OK(clmoe_loss(b.layer, test.queue, &first, 0, NULL, NULL));
    OK(clmoe_loss(b.layer, test.queue, &same, 0, NULL, NULL));
    OK(clmoe_loss(b.layer, test.queue, &more, 0, NULL, NULL));
    compare_bits("sizeof(clmoe_loss_desc)", buf_get(same.values), buf_get(first.values), COUNT * 4);
    compare_bits("8 bytes more", buf_get(more.values), buf_get(first.values), COUNT * 4);
    more.values = buf_new(COUNT * 4);
    more.loss_size = sizeof *known - 4;
    check_refused(&b, &more, "loss_size is 28");
    more.loss_size = 1 << 20;
    check_refused(&b, &more, "loss_size is 1048576");
    more.loss_size = sizeof *longer;
    longer[1].more[1] = 1;
    check_refused(&b, &more, "losses[1] is not 0");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(forward),        TEST(small_shapes),  TEST(descriptors),     TEST(needs),
        TEST(contradictions), TEST(noise_weights), TEST(forward_refuses), TEST(buffers),
        TEST(expert_scale),   TEST(expert_choice), TEST(sizes_of_a_loss)};
    return RUN(tests);
}
