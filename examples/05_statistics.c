/*
 * Statistics, a loss with its gradient, and a controller: a router that prefers the first experts
 * is balanced by the selection bias that clmoe_balance_update() moves between the batches.
 */
#include "common.h"

enum { TOKENS = 512, DIM = 32, EXPERTS = 8, TOP_K = 2, HIDDEN = 32, STEPS = 30 };
enum { LOGITS = TOKENS * EXPERTS };

static clmoe_layer *create_layer(const gpu *g) {
    clmoe_layer *layer;
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = DIM;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    desc.router.score = CLMOE_SCORE_SIGMOID;
    desc.router.bias = 1;
    desc.router.select_bias = 1; /* weights.select_bias is not given: the state's */
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.experts.hidden_dim = HIDDEN;
    desc.balance.enabled = 1;
    check(clmoe_layer_create(g->context, &desc, &layer));
    return layer;
}

/* sqrt of the sum of squares of dlogits [T,R]. */
static double gradient_norm(const gpu *g, clmoe_buf dlogits) {
    static float values[LOGITS];
    double sum = 0;
    read_back(g, dlogits, sizeof values, values, NULL);
    for (int i = 0; i < LOGITS; i++)
        sum += (double)values[i] * (double)values[i];
    return sqrt(sum);
}

int main(void) {
    static const float router_bias[EXPERTS] = {0.5f, 0.3f, 0.1f};
    static const clmoe_loss_desc losses[] = {{.kind = CLMOE_LOSS_SWITCH, .weight = 0.01f}};
    gpu g = gpu_open(0); /* in order: each command waits for the one before */
    clmoe_layer *layer = create_layer(&g);
    clmoe_weights weights = {.router = random_buffer(&g, EXPERTS * DIM, 1.0f),
                             .router_bias = buffer(&g, sizeof router_bias, router_bias),
                             .experts.gate = random_buffer(&g, EXPERTS * 2 * HIDDEN * DIM, 0.2f),
                             .experts.down = random_buffer(&g, EXPERTS * DIM * HIDDEN, 0.2f)};
    size_t state_bytes, stats_bytes;
    check(clmoe_stats_size(layer, &stats_bytes));
    check(clmoe_state_size(layer, &state_bytes));
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = TOKENS;
    args.weights = &weights;
    args.x = random_buffer(&g, TOKENS * DIM, 1.0f);
    args.state = buffer(&g, state_bytes, NULL);
    args.stats = buffer(&g, stats_bytes, NULL);
    args.losses = losses;
    args.num_losses = sizeof losses / sizeof losses[0];
    args.loss_values = buffer(&g, sizeof(float), NULL);
    args.dlogits = buffer(&g, LOGITS * sizeof(float), NULL);
    batch_buffers(&g, layer, &args, TOKENS * DIM * sizeof(float));
    check(clmoe_state_init(layer, g.queue, args.state, 1234, 0, NULL, NULL));

    clmoe_balance_args balance;
    clmoe_balance_args_init(&balance);
    balance.state = args.state;
    balance.stats = args.stats;
    balance.bias_rule = CLMOE_BIAS_SIGN;
    balance.bias_rate = 0.003f;

    clmoe_stats *stats = allocate(stats_bytes); /* the header, then arrays */
    float first = 0, loss, zero = 0;
    for (int step = 0; step < STEPS; step++) {
        check(clEnqueueFillBuffer(g.queue, args.dlogits.mem, &zero, sizeof zero, 0,
                                  LOGITS * sizeof(float), 0, NULL, NULL)); /* it is added to */
        check(clmoe_forward(layer, g.queue, &args, 0, NULL, NULL));
        check(clmoe_balance_update(layer, g.queue, &balance, 0, NULL, NULL));
        read_back(&g, args.stats, stats_bytes, stats, NULL); /* to print; nothing needs it */
        read_back(&g, args.loss_values, sizeof loss, &loss, NULL);
        if (step == 0)
            first = stats->max_violation;
        if (step % 10 == 0)
            printf("step %2d: MaxVio %.3f, switch loss %.3f, |dlogits| %.2e\n", step,
                   (double)stats->max_violation, (double)loss, gradient_norm(&g, args.dlogits));
    }
    printf("after %d steps:\n", STEPS);
    size_t length;
    check(clmoe_stats_format(stats, stats_bytes, NULL, 0, &length));
    char *text = allocate(length + 1);
    check(clmoe_stats_format(stats, stats_bytes, text, length + 1, NULL));
    printf("%s", text);
    fail_unless(stats->max_violation < first / 2, "the controller does not balance");

    clmoe_buf *buffers[] = {&args.x,       &args.state, &args.stats,   &args.loss_values,
                            &args.dlogits, &args.saved, &args.scratch, &args.y};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        buffer_free(buffers[i]);
    free(text);
    free(stats);
    clmoe_weights_release(&weights);
    clmoe_layer_destroy(layer);
    gpu_close(&g);
    return 0;
}
