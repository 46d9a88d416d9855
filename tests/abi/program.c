/*
 * A program of version 0.2, compiled with the headers as they were then: it uses every kind of
 * struct, and what it gets from the library of today must be what it would have got.
 */
#include "../../examples/common.h"

#include <string.h>

#if CLMOE_VERSION_MAJOR != 0 || CLMOE_VERSION_MINOR != 2
#error "compiled with other headers than those of version 0.2"
#endif

enum { TOKENS = 24, DIM = 16, EXPERTS = 8, TOP_K = 2, HIDDEN = 12, ROWS = TOKENS * DIM };

/* A switch of each part of the descriptor. */
static void describe(clmoe_layer_desc *desc) {
    clmoe_layer_desc_init(desc);
    fail_unless(desc->struct_size == sizeof *desc, "struct_size");
    fail_unless(desc->router.sinkhorn.iterations == 100, "router.sinkhorn.iterations");
    fail_unless(desc->router.rebalance.mu == 1 && desc->shared.alpha == 1, "defaults");
    fail_unless(desc->balance.dead_window == 32768, "balance.dead_window");
    desc->dim = DIM;
    desc->num_experts = EXPERTS;
    desc->top_k = TOP_K;
    desc->router.score = CLMOE_SCORE_SIGMOID;
    desc->router.bias = 1;
    desc->router.select_bias = 1;
    desc->router.groups.count = 4;
    desc->router.groups.topk = 2;
    desc->router.groups.score = CLMOE_GROUP_TOP2_SUM;
    desc->router.renorm.kind = CLMOE_RENORM_SUM;
    desc->router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    desc->router.noise.scale = 0;
    desc->router.dropout.logits = 0;
    desc->capacity.rows = 20;
    desc->experts.hidden_dim = HIDDEN;
    desc->experts.up_shift = 1;
    desc->shared.hidden_dim = HIDDEN;
    desc->shared.gate_layout = CLMOE_GATE_SEPARATE;
    desc->output_bias = 1;
    desc->balance.enabled = 1;
    desc->balance.device_groups = 2;
    desc->training = 1;
}

/* One wrong field at a time: the sentence names it, so it lies where it did. */
static void expect(clmoe_status status, clmoe_status want, const char *field) {
    fail_unless(status == want, field);
    fail_unless(strstr(clmoe_last_error(), field) != NULL, clmoe_last_error());
}

static void check_fields(const gpu *g) {
#define WRONG(field, value)                                                                        \
    do {                                                                                           \
        clmoe_layer_desc desc;                                                                     \
        clmoe_layer *layer;                                                                        \
        describe(&desc);                                                                           \
        desc.field = value;                                                                        \
        expect(clmoe_layer_create(g->context, &desc, &layer), CLMOE_INVALID_DESC, #field);         \
    } while (0)
    WRONG(dim, 0);
    WRONG(weight_type, 9);
    WRONG(training, 2);
    WRONG(router.temperature, 0);
    WRONG(router.weight_at, 9);
    WRONG(router.groups.topk, 5);
    WRONG(router.renorm.p, 0);
    WRONG(router.noise.jitter, 2);
    WRONG(router.dropout.experts, 2);
    WRONG(router.rebalance.iterations, 2000);
    WRONG(router.policy, 9);
    WRONG(capacity.overflow, 9);
    WRONG(experts.activation, 9);
    WRONG(experts.limit, -1);
    WRONG(normalize_experts, 2);
    WRONG(shared.down_bias, 2);
    WRONG(shared_gate, 2);
    WRONG(output_bias, 2);
    WRONG(balance.device_groups, 3);
    WRONG(experts.hidden_dropout, 2);
    WRONG(gradient_type, 9);
    WRONG(recompute, 2);
    WRONG(dye, 2);
}

static clmoe_weights weights_of(const gpu *g) {
    clmoe_weights weights = {0};
    weights.router = random_buffer(g, EXPERTS * DIM, 1.0f);
    weights.router_bias = random_buffer(g, EXPERTS, 1.0f);
    weights.experts.gate = random_buffer(g, EXPERTS * 2 * HIDDEN * DIM, 0.5f);
    weights.experts.down = random_buffer(g, EXPERTS * DIM * HIDDEN, 0.5f);
    weights.shared.gate = random_buffer(g, HIDDEN * DIM, 0.5f);
    weights.shared.up = random_buffer(g, HIDDEN * DIM, 0.5f);
    weights.shared.down = random_buffer(g, DIM * HIDDEN, 0.5f);
    weights.output_bias = random_buffer(g, DIM, 0.5f);
    return weights;
}

/* The routing of the batch by single steps; the ids must be those of clmoe_forward(). */
static void check_steps(const gpu *g, clmoe_layer *layer, const clmoe_forward_args *args) {
    clmoe_plan_layout plan;
    check(clmoe_plan_layout_get(layer, TOKENS, &plan));
    fail_unless(plan.pairs == TOKENS * TOP_K && plan.capacity == 20, "the plan's layout");
    clmoe_score_args score = {.struct_size = sizeof score, .tokens = TOKENS};
    score.weights = args->weights;
    score.x = args->x;
    score.logits = buffer(g, TOKENS * EXPERTS * 4, NULL);
    score.scores = buffer(g, TOKENS * EXPERTS * 4, NULL);
    check(clmoe_score(layer, g->queue, &score, 0, NULL, NULL));
    clmoe_topk_args topk = {.struct_size = sizeof topk, .tokens = TOKENS};
    topk.weights = args->weights;
    topk.scores = score.scores;
    topk.ids = buffer(g, TOKENS * TOP_K * 4, NULL);
    topk.pair_weights = buffer(g, TOKENS * TOP_K * 4, NULL);
    topk.live = buffer(g, TOKENS * 4, NULL);
    topk.state = args->state;
    check(clmoe_topk(layer, g->queue, &topk, 0, NULL, NULL));
    clmoe_plan_args planned = {.struct_size = sizeof planned, .tokens = TOKENS};
    planned.ids = topk.ids;
    planned.pair_weights = topk.pair_weights;
    planned.live = topk.live;
    planned.scratch = args->scratch;
    planned.plan = buffer(g, plan.bytes, NULL);
    check(clmoe_plan(layer, g->queue, &planned, 0, NULL, NULL));
    int32_t ids[TOKENS * TOP_K], want[TOKENS * TOP_K];
    uint32_t load[EXPERTS], sum = 0;
    clmoe_buf at_load = {planned.plan.mem, plan.load};
    read_back(g, topk.ids, sizeof ids, ids, NULL);
    read_back(g, args->ids, sizeof want, want, NULL);
    read_back(g, at_load, sizeof load, load, NULL);
    fail_unless(memcmp(ids, want, sizeof ids) == 0, "the steps choose otherwise");
    for (int e = 0; e < EXPERTS; e++)
        sum += load[e];
    fail_unless(sum == TOKENS * TOP_K, "the plan's load");
    clmoe_buf *made[] = {&score.logits,      &score.scores, &topk.ids,
                         &topk.pair_weights, &topk.live,    &planned.plan};
    for (size_t i = 0; i < sizeof made / sizeof made[0]; i++)
        buffer_free(made[i]);
}

/* Some of `n` values, and all of them finite. */
static void check_values(const gpu *g, clmoe_buf buf, size_t n, const char *what) {
    float *values = allocate(n * sizeof *values);
    double size = 0;
    read_back(g, buf, n * sizeof *values, values, NULL);
    for (size_t i = 0; i < n; i++)
        size += (double)values[i] * (double)values[i];
    fail_unless(size > 0 && size < 1e30, what);
    free(values);
}

/* dy is y. */
static void check_backward(const gpu *g, clmoe_layer *layer, const clmoe_forward_args *args) {
    clmoe_gradients gradients;
    clmoe_backward_args back;
    size_t z;
    check(clmoe_z_size(layer, TOKENS, CLMOE_MLP_EXPERTS, &z));
    fail_unless(z >= (size_t)TOKENS * TOP_K * 2 * HIDDEN * sizeof(float), "clmoe_z_size()");
    check(clmoe_gradients_create(layer, &gradients));
    clmoe_backward_args_init(&back);
    back.tokens = TOKENS;
    back.weights = args->weights;
    back.x = args->x;
    back.state = args->state;
    back.saved = args->saved;
    back.scratch = args->scratch;
    back.dy = args->y;
    back.dx = buffer(g, ROWS * sizeof(float), NULL);
    back.gradients = &gradients;
    check(clmoe_backward(layer, g->queue, &back, 0, NULL, NULL));
    check_values(g, back.dx, ROWS, "dx");
    check_values(g, gradients.router, EXPERTS * DIM, "gradients.router");
    check_values(g, gradients.shared.up, HIDDEN * DIM, "gradients.shared.up");
    check_values(g, gradients.output_bias, DIM, "gradients.output_bias");
    buffer_free(&back.dx);
    clmoe_gradients_release(&gradients);
}

static void check_stats(const gpu *g, const clmoe_layer *layer, clmoe_buf buf) {
    size_t length, bytes;
    check(clmoe_stats_size(layer, &bytes));
    clmoe_stats *stats = allocate(bytes);
    read_back(g, buf, bytes, stats, NULL);
    fail_unless(stats->version == 1, "clmoe_stats.version");
    fail_unless(stats->tokens == TOKENS && stats->columns == EXPERTS, "clmoe_stats.tokens");
    fail_unless(stats->kept + stats->dropped == stats->pairs, "clmoe_stats.pairs");
    fail_unless(stats->device_groups == 2, "clmoe_stats.device_groups");
    check(clmoe_stats_format(stats, bytes, NULL, 0, &length));
    fail_unless(length > 0, "the statistics' text");
    free(stats);
}

static void check_state(const gpu *g, clmoe_buf buf) {
    clmoe_state state;
    read_back(g, buf, sizeof state, &state, NULL);
    fail_unless(state.version == 2 && state.columns == EXPERTS, "clmoe_state.version");
    fail_unless(state.seed[0] == 7 && state.step == 1, "clmoe_state.step");
    fail_unless(state.noise_scale == 0.25f, "the schedule of the noise");
}

/* Losses without loss_size are those of version 0.2. */
static void set_losses(const gpu *g, clmoe_forward_args *args) {
    static const clmoe_loss_desc losses[] = {{.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f},
                                             {.kind = CLMOE_LOSS_MINIMAX, .beta = 1e-6f},
                                             {.kind = CLMOE_LOSS_Z}};
    args->losses = losses;
    args->num_losses = 3;
    args->loss_values = buffer(g, 3 * sizeof(float), NULL);
}

static void check_losses(const gpu *g, clmoe_buf buf) {
    float values[3];
    read_back(g, buf, sizeof values, values, NULL);
    fail_unless(values[0] > 0.5f && values[0] < 8, "the first loss");
    fail_unless(values[1] > 1e5f, "the second loss: log(n) / beta");
    fail_unless(values[2] > 0 && values[2] < 100, "the third loss");
}

static void check_batch(const gpu *g, clmoe_layer *layer) {
    clmoe_weights weights = weights_of(g);
    size_t state_bytes, stats_bytes;
    check(clmoe_stats_size(layer, &stats_bytes));
    check(clmoe_state_size(layer, &state_bytes));
    clmoe_profile profile = {.struct_size = sizeof profile};
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = TOKENS;
    args.weights = &weights;
    args.x = random_buffer(g, ROWS, 1.0f);
    args.state = buffer(g, state_bytes, NULL);
    args.ids = buffer(g, TOKENS * TOP_K * 4, NULL);
    args.stats = buffer(g, stats_bytes, NULL);
    args.profile = &profile;
    set_losses(g, &args);
    batch_buffers(g, layer, &args, ROWS * sizeof(float));
    check(clmoe_state_init(layer, g->queue, args.state, 7, 0, NULL, NULL));
    check(clmoe_forward(layer, g->queue, &args, 0, NULL, NULL));
    clmoe_balance_args balance;
    clmoe_balance_args_init(&balance);
    balance.state = args.state;
    balance.stats = args.stats;
    balance.noise.shape = CLMOE_SCHEDULE_LINEAR;
    balance.noise.start = balance.noise.end = 0.25f;
    balance.noise.steps = 1;
    check_steps(g, layer, &args);
    check_backward(g, layer, &args);
    check(clmoe_balance_update(layer, g->queue, &balance, 0, NULL, NULL));
    check(clFinish(g->queue));
    fail_unless(profile.num_steps > 5 && strcmp(profile.steps[0].name, "score") == 0, "profile");
    clmoe_profile_release(&profile);
    check_stats(g, layer, args.stats);
    check_state(g, args.state);
    check_losses(g, args.loss_values);
    clmoe_buf *made[] = {&args.x,           &args.state, &args.ids,     &args.stats,
                         &args.loss_values, &args.saved, &args.scratch, &args.y};
    for (size_t i = 0; i < sizeof made / sizeof made[0]; i++)
        buffer_free(made[i]);
    clmoe_weights_release(&weights);
}

int main(int argc, char **argv) {
    gpu g = gpu_open(CL_QUEUE_PROFILING_ENABLE);
    clmoe_layer_desc desc;
    clmoe_layer *layer;
    clmoe_checkpoint *checkpoint;
    fail_unless(argc == 2, "usage: abi_0_2 CHECKPOINT");
    printf("headers of 0.2, library %s\n", clmoe_version());
    check_fields(&g);
    describe(&desc);
    check(clmoe_layer_create(g.context, &desc, &layer));
    check_batch(&g, layer);
    clmoe_layer_destroy(layer);
    check(clmoe_checkpoint_open(argv[1], NULL, &checkpoint));
    check(clmoe_checkpoint_layer(checkpoint, 0, &desc));
    fail_unless(desc.struct_size == sizeof desc && desc.num_experts == 8 && desc.top_k == 2,
                "the checkpoint's descriptor");
    check(clmoe_layer_create(g.context, &desc, &layer));
    clmoe_layer_destroy(layer);
    clmoe_checkpoint_close(checkpoint);
    gpu_close(&g);
    return 0;
}
