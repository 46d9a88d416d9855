/*
 * A router of one's own: the program chooses experts and weights, clmoe does the rest. Here it is a
 * hash of the token's id (Roller et al. 2021, Hash Layers): no router weights, the same experts for
 * the same word, each with weight 1/K. Any router will do that can fill ids_in and pair_weights_in.
 */
#include "common.h"

enum { TOKENS = 64, DIM = 96, EXPERTS = 8, TOP_K = 2, HIDDEN = 160, PAIRS = TOKENS * TOP_K };

/* Which expert is choice k of a token with this id; the choices of one token differ. */
static int32_t hash_expert(uint32_t token_id, uint32_t k) {
    uint32_t hash = token_id * 2654435761u;
    return (int32_t)((hash >> 16) + k * (1 + hash % (EXPERTS / TOP_K))) % EXPERTS;
}

static clmoe_layer *create_layer(const gpu *g) {
    clmoe_layer *layer;
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = DIM;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    desc.experts.hidden_dim = HIDDEN;
    desc.balance.enabled = 1; /* for args.stats */
    check(clmoe_layer_create(g->context, &desc, &layer));
    return layer;
}

/* Runs the batch with this choice; y [T,D] goes to the host. */
static void forward(const gpu *g, clmoe_layer *layer, clmoe_forward_args *args, const int32_t *ids,
                    const float *pair_weights, float *y) {
    args->ids_in = buffer(g, PAIRS * sizeof *ids, ids);
    args->pair_weights_in = buffer(g, PAIRS * sizeof *pair_weights, pair_weights);
    check(clmoe_forward(layer, g->queue, args, 0, NULL, NULL));
    read_back(g, args->y, TOKENS * DIM * sizeof *y, y, NULL);
    buffer_free(&args->ids_in);
    buffer_free(&args->pair_weights_in);
}

int main(void) {
    static int32_t ids[PAIRS], other_order[PAIRS];
    static float pair_weights[PAIRS], y[TOKENS * DIM], again[TOKENS * DIM];
    for (uint32_t t = 0; t < TOKENS; t++) {
        uint32_t token_id = t * t % 37; /* of a vocabulary of 37 words */
        for (uint32_t k = 0; k < TOP_K; k++) {
            ids[t * TOP_K + k] = other_order[t * TOP_K + TOP_K - 1 - k] = hash_expert(token_id, k);
            pair_weights[t * TOP_K + k] = 1.0f / TOP_K;
        }
    }

    gpu g = gpu_open(0);
    clmoe_layer *layer = create_layer(&g);
    clmoe_weights weights = {/* no router */
                             .experts.gate = random_buffer(&g, EXPERTS * 2 * HIDDEN * DIM, 0.2f),
                             .experts.down = random_buffer(&g, EXPERTS * DIM * HIDDEN, 0.2f)};
    size_t stats_bytes;
    check(clmoe_stats_size(layer, &stats_bytes));
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = TOKENS;
    args.weights = &weights;
    args.x = random_buffer(&g, TOKENS * DIM, 2.0f);
    args.stats = buffer(&g, stats_bytes, NULL);
    batch_buffers(&g, layer, &args, sizeof y);

    clmoe_stats stats;
    forward(&g, layer, &args, ids, pair_weights, y);
    read_back(&g, args.stats, sizeof stats, &stats, NULL);
    printf("%u tokens, %u pairs, %u invalid ids, MaxVio %.2f\n", stats.tokens, stats.pairs,
           stats.invalid_ids, (double)stats.max_violation);
    fail_unless(stats.pairs == PAIRS && stats.invalid_ids == 0, "not every pair has an expert");

    forward(&g, layer, &args, other_order, pair_weights, again);
    double error = relative_error(again, y, TOKENS * DIM);
    printf("a token's experts in the other order: relative difference %.1e\n", error);
    fail_unless(error < 1e-5, "with equal weights the order of a token's experts matters");

    clmoe_buf *buffers[] = {&args.x, &args.stats, &args.saved, &args.scratch, &args.y};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        buffer_free(buffers[i]);
    clmoe_weights_release(&weights);
    clmoe_layer_destroy(layer);
    gpu_close(&g);
    return 0;
}
