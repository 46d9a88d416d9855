#include "counts.h"

#include <stdlib.h>

clmoe_layer_desc counts_desc(const inputs *in, const char *engine) {
    clmoe_layer_desc desc = inputs_desc(in, engine);
    desc.router.select_bias = 1;
    desc.balance.enabled = 1;
    return desc;
}

float counts_bias(const bench_case *c, uint32_t e) {
    return (float)(e % 7) / (8 * (float)c->experts);
}

clmoe_status counts_enqueue(bench_counts *c, cl_event *event) {
    const clmoe_bias_counts_args args = {.struct_size = sizeof args,
                                         .tokens = c->in->of.tokens,
                                         .logits = {c->logits, 0},
                                         .state = {c->buffers[COUNTS_STATE], 0},
                                         .scratch = {c->buffers[COUNTS_SCRATCH], 0},
                                         .bias_counts = {c->buffers[COUNTS_BIAS_COUNTS], 0}};
    return LIB(clmoe_bias_counts(c->layer, c->device->queue, &args, 0, NULL, event));
}

static clmoe_status create_buffers(bench_counts *c) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t sizes[COUNTS_BUFFERS] = {0}, saved = 0;
    TRY(LIB(clmoe_state_size(c->layer, &sizes[COUNTS_STATE])));
    TRY(LIB(clmoe_layer_memory(c->layer, c->in->of.tokens, &saved, &sizes[COUNTS_SCRATCH])));
    TRY(LIB(clmoe_bias_counts_size(c->layer, &sizes[COUNTS_BIAS_COUNTS])));
    for (int i = 0; i < COUNTS_BUFFERS; i++)
        TRY(device_poisoned(c->device, sizes[i], &c->buffers[i]));
done:
    return status;
}

static clmoe_status make_state(bench_counts *c) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t experts = c->in->of.experts;
    const clmoe_buf state = {c->buffers[COUNTS_STATE], 0};
    float *bias = malloc(experts * sizeof *bias);
    if (!bias)
        TRY(bench_no_memory("a bias"));
    for (uint32_t e = 0; e < experts; e++)
        bias[e] = counts_bias(&c->in->of, e);
    TRY(LIB(clmoe_state_init(c->layer, c->device->queue, state, 0, 0, NULL, NULL)));
    TRY(CL(clEnqueueWriteBuffer(c->device->queue, state.mem, CL_TRUE, sizeof(clmoe_state),
                                experts * sizeof *bias, bias, 0, NULL, NULL)));
done:
    free(bias);
    return status;
}

clmoe_status counts_create(const bench_device *device, const inputs *in, const char *engine,
                           cl_mem logits, bench_counts *c) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc desc = counts_desc(in, engine);
    *c = (bench_counts){.device = device, .in = in, .logits = logits};
    TRY(LIB(clmoe_layer_create(device->clmoe, &desc, &c->layer)));
    TRY(create_buffers(c));
    TRY(make_state(c));
done:
    if (status != CLMOE_SUCCESS)
        counts_release(c);
    return status;
}

void counts_release(bench_counts *c) {
    for (int i = 0; i < COUNTS_BUFFERS; i++)
        buffer_release(&c->buffers[i]);
    clmoe_layer_destroy(c->layer);
    *c = (bench_counts){0};
}
