/*
 * Queues and events: two batches in flight at once on an out-of-order queue. Nothing waits on the
 * host until the end: the layer waits for the copy of x, the copy of y for the layer. A profile
 * tells where the time of a batch went.
 */
#include "common.h"
#include <string.h>

enum { BATCHES = 2, TOKENS = 64, DIM = 96, EXPERTS = 8, TOP_K = 2, HIDDEN = 160 };
enum { COUNT = TOKENS * DIM, BYTES = COUNT * sizeof(float) };

/* Each batch in flight has its own buffers; the weights are shared. */
typedef struct flight {
    clmoe_forward_args args;
    clmoe_profile profile;
    float y[COUNT];
    cl_event copied, done, read;
} flight;

static clmoe_layer *create_layer(const gpu *g) {
    clmoe_layer *layer;
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = DIM;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    desc.experts.hidden_dim = HIDDEN;
    check(clmoe_layer_create(g->context, &desc, &layer));
    return layer;
}

/* Enqueues copy, layer and read of one batch; x must stay until the copy is done. */
static void start(const gpu *g, clmoe_layer *layer, const clmoe_weights *weights, const float *x,
                  flight *f) {
    clmoe_forward_args_init(&f->args);
    f->profile = (clmoe_profile){.struct_size = sizeof f->profile};
    f->args.tokens = TOKENS;
    f->args.weights = weights;
    f->args.profile = &f->profile;
    f->args.x = buffer(g, BYTES, NULL);
    batch_buffers(g, layer, &f->args, BYTES);
    check(
        clEnqueueWriteBuffer(g->queue, f->args.x.mem, CL_FALSE, 0, BYTES, x, 0, NULL, &f->copied));
    check(clmoe_forward(layer, g->queue, &f->args, 1, &f->copied, &f->done));
    check(clEnqueueReadBuffer(g->queue, f->args.y.mem, CL_FALSE, 0, BYTES, f->y, 1, &f->done,
                              &f->read));
}

static void print_profile(const clmoe_profile *profile) {
    for (uint32_t i = 0; i < profile->num_steps; i++) {
        double ms;
        check(clmoe_profile_time(profile, i, &ms));
        printf("  %-9s %.3f ms\n", profile->steps[i].name, ms);
    }
}

static void finish(flight *f) {
    clmoe_buf *buffers[] = {&f->args.x, &f->args.saved, &f->args.scratch, &f->args.y};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        buffer_free(buffers[i]);
    clmoe_profile_release(&f->profile);
    clReleaseEvent(f->copied);
    clReleaseEvent(f->done);
    clReleaseEvent(f->read);
}

int main(void) {
    static float x[COUNT];
    static flight flights[BATCHES];
    gpu g = gpu_open(CL_QUEUE_PROFILING_ENABLE | CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE);
    clmoe_layer *layer = create_layer(&g);
    clmoe_weights weights = {.router = random_buffer(&g, EXPERTS * DIM, 1.0f),
                             .experts.gate = random_buffer(&g, EXPERTS * 2 * HIDDEN * DIM, 0.2f),
                             .experts.down = random_buffer(&g, EXPERTS * DIM * HIDDEN, 0.2f)};
    for (int i = 0; i < COUNT; i++)
        x[i] = sinf((float)i);

    for (int i = 0; i < BATCHES; i++)
        start(&g, layer, &weights, x, &flights[i]);
    cl_event read[BATCHES] = {flights[0].read, flights[1].read};
    check(clWaitForEvents(BATCHES, read));
    for (int i = 0; i < BATCHES; i++) {
        printf("batch %d: y[0] %.4f\n", i, (double)flights[i].y[0]);
        print_profile(&flights[i].profile);
    }
    fail_unless(memcmp(flights[0].y, flights[1].y, BYTES) == 0, "the same x gave other bits");

    for (int i = 0; i < BATCHES; i++)
        finish(&flights[i]);
    clmoe_weights_release(&weights);
    clmoe_layer_destroy(layer);
    gpu_close(&g);
    return 0;
}
