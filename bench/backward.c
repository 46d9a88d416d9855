#include "backward.h"

static clmoe_buf place(const bench_backward *b, backward_buffer which) {
    return (clmoe_buf){b->buffers[which], 0};
}

static clmoe_status enqueue_forward(bench_backward *b) {
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = b->in->of.tokens;
    args.weights = &b->in->weights;
    args.x = b->in->x_buf;
    args.saved = place(b, BACKWARD_SAVED);
    args.scratch = place(b, BACKWARD_SCRATCH);
    args.y = place(b, BACKWARD_Y);
    return LIB(clmoe_forward(b->layer, b->device->queue, &args, 0, NULL, NULL));
}

static clmoe_status enqueue_backward(bench_backward *b, clmoe_backward_parts parts,
                                     cl_event *event) {
    clmoe_backward_args args;
    clmoe_backward_args_init(&args);
    args.tokens = b->in->of.tokens;
    args.parts = parts;
    args.weights = &b->in->weights;
    args.x = b->in->x_buf;
    args.saved = place(b, BACKWARD_SAVED);
    args.scratch = place(b, BACKWARD_SCRATCH);
    args.dy = place(b, BACKWARD_DY);
    args.dx = place(b, BACKWARD_DX);
    args.dlogits_out = place(b, BACKWARD_DLOGITS);
    args.gradients = &b->gradients;
    return LIB(clmoe_backward(b->layer, b->device->queue, &args, 0, NULL, event));
}

clmoe_status backward_forget(bench_backward *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_mem outputs[] = {b->buffers[BACKWARD_Y],       b->buffers[BACKWARD_DX],
                              b->buffers[BACKWARD_DLOGITS], b->gradients.router.mem,
                              b->gradients.router_bias.mem, b->gradients.experts.gate.mem,
                              b->gradients.experts.down.mem};
    for (size_t i = 0; i < COUNT_OF(outputs); i++)
        TRY(buffer_poison(b->device, outputs[i]));
done:
    return status;
}

clmoe_status backward_prepare(bench_backward *b, bench_step step) {
    if (step != STEP_BACKWARD_WEIGHTS)
        return CLMOE_SUCCESS;
    return enqueue_backward(b, CLMOE_BACKWARD_DATA, NULL);
}

/* The queue is in order: the last event stands for all. */
clmoe_status backward_enqueue(bench_backward *b, bench_step step, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_backward_parts parts = step == STEP_BACKWARD_DATA      ? CLMOE_BACKWARD_DATA
                                       : step == STEP_BACKWARD_WEIGHTS ? CLMOE_BACKWARD_WEIGHTS
                                                                       : CLMOE_BACKWARD_BOTH;
    if (step == STEP_FORWARD_BACKWARD)
        TRY(enqueue_forward(b));
    TRY(enqueue_backward(b, parts, event));
done:
    return status;
}

static clmoe_status create_buffers(bench_backward *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &b->in->of;
    size_t sizes[BACKWARD_BUFFERS] = {0};
    sizes[BACKWARD_Y] = (size_t)c->tokens * c->dim * type_bytes(b->in->type);
    sizes[BACKWARD_DY] = sizes[BACKWARD_DX] = sizes[BACKWARD_Y];
    sizes[BACKWARD_DLOGITS] = (size_t)c->tokens * c->experts * sizeof(float);
    TRY(LIB(
        clmoe_layer_memory(b->layer, c->tokens, &sizes[BACKWARD_SAVED], &sizes[BACKWARD_SCRATCH])));
    for (int i = 0; i < BACKWARD_BUFFERS; i++)
        TRY(device_poisoned(b->device, sizes[i], &b->buffers[i]));
    TRY(values_write(b->device, &b->in->dy, b->buffers[BACKWARD_DY], (size_t)c->tokens * c->dim));
    TRY(LIB(clmoe_gradients_create(b->layer, &b->gradients)));
done:
    return status;
}

clmoe_status backward_create(const bench_device *device, const inputs *in, const char *engine,
                             bench_backward *b) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc desc = inputs_desc(in, engine);
    desc.training = 1;
    desc.gradient_type = in->gradient_type;
    *b = (bench_backward){.device = device, .in = in};
    TRY(LIB(clmoe_layer_create(device->clmoe, &desc, &b->layer)));
    TRY(create_buffers(b));
    TRY(backward_enqueue(b, STEP_FORWARD_BACKWARD, NULL));
    TRY(CL(clFinish(device->queue)));
done:
    if (status != CLMOE_SUCCESS)
        backward_release(b);
    return status;
}

void backward_release(bench_backward *b) {
    for (int i = 0; i < BACKWARD_BUFFERS; i++)
        buffer_release(&b->buffers[i]);
    clmoe_gradients_release(&b->gradients);
    clmoe_layer_destroy(b->layer);
    gradient_samples_free(&b->samples);
    *b = (bench_backward){0};
}
