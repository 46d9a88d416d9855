/*
 * Packed weights: the experts' weights once in the order in which the engine reads them fastest,
 * for weights that do not change. Afterwards the raw ones may be released.
 */
#include "common.h"

enum { TOKENS = 48, DIM = 128, EXPERTS = 8, TOP_K = 2, HIDDEN = 256, COUNT = TOKENS * DIM };

static clmoe_layer *create_layer(const gpu *g) {
    clmoe_layer *layer;
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = DIM;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.experts.hidden_dim = HIDDEN;
    check(clmoe_layer_create(g->context, &desc, &layer));
    return layer;
}

/* Packs the experts' weights and releases the raw ones; 0 where the engine has no such form. */
static int pack(const gpu *g, clmoe_layer *layer, clmoe_weights *weights) {
    size_t bytes;
    cl_event packed;
    clmoe_status status = clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes);
    if (status == CLMOE_UNSUPPORTED)
        return 0;
    check(status);
    clmoe_buf to = buffer(g, bytes, NULL);
    clmoe_pack_args args = {.struct_size = sizeof args,
                            .mlp = CLMOE_MLP_EXPERTS,
                            .raw = &weights->experts,
                            .packed = to};
    check(clmoe_pack_weights(layer, g->queue, &args, 0, NULL, &packed));
    check(clWaitForEvents(1, &packed));
    clReleaseEvent(packed);
    check(clmoe_packed_check(layer, g->queue, CLMOE_MLP_EXPERTS, to));
    buffer_free(&weights->experts.gate); /* gate and up in one, the layer's default */
    buffer_free(&weights->experts.down);
    weights->experts.packed = to;
    printf("packed: %zu bytes\n", bytes);
    return 1;
}

int main(void) {
    static float raw_y[COUNT], packed_y[COUNT];
    gpu g = gpu_open(0);
    clmoe_layer *layer = create_layer(&g);
    clmoe_weights weights = {.router = random_buffer(&g, EXPERTS * DIM, 1.0f),
                             .experts.gate = random_buffer(&g, EXPERTS * 2 * HIDDEN * DIM, 0.2f),
                             .experts.down = random_buffer(&g, EXPERTS * DIM * HIDDEN, 0.2f)};
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = TOKENS;
    args.weights = &weights;
    args.x = random_buffer(&g, COUNT, 2.0f);
    batch_buffers(&g, layer, &args, sizeof raw_y);

    printf("engine %s, raw: %zu bytes\n", clmoe_layer_engine(layer),
           (size_t)EXPERTS * 3 * HIDDEN * DIM * sizeof(float));
    check(clmoe_forward(layer, g.queue, &args, 0, NULL, NULL));
    read_back(&g, args.y, sizeof raw_y, raw_y, NULL);
    if (pack(&g, layer, &weights)) {
        check(clmoe_forward(layer, g.queue, &args, 0, NULL, NULL));
        read_back(&g, args.y, sizeof packed_y, packed_y, NULL);
        double error = relative_error(packed_y, raw_y, COUNT);
        printf("packed against raw: relative difference %.1e\n", error);
        fail_unless(error < 1e-5, "packed weights give another y");
    } else {
        printf("%s\n", clmoe_last_error());
    }

    clmoe_buf *buffers[] = {&args.x, &args.saved, &args.scratch, &args.y};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        buffer_free(buffers[i]);
    clmoe_weights_release(&weights);
    clmoe_layer_destroy(layer);
    gpu_close(&g);
    return 0;
}
