/*
 * The layer of a case with training, forward and backward: the gradients of sum(dy * y) by x and by
 * all weights. No packed weights, which the backward pass does not read.
 */
#ifndef BENCH_BACKWARD_H
#define BENCH_BACKWARD_H

#include "samples.h"

typedef enum backward_buffer {
    BACKWARD_SAVED,
    BACKWARD_SCRATCH,
    BACKWARD_Y,       /* [T,D] */
    BACKWARD_DY,      /* [T,D] */
    BACKWARD_DX,      /* [T,D] */
    BACKWARD_DLOGITS, /* [T,E] f32 */
    BACKWARD_BUFFERS
} backward_buffer;

typedef struct bench_backward {
    const bench_device *device;
    const inputs *in;
    clmoe_layer *layer;
    clmoe_gradients gradients;
    cl_mem buffers[BACKWARD_BUFFERS];
    gradient_samples samples; /* of the check; made by the first one */
} bench_backward;

/* Creates the layer and its buffers, and runs it forward and backward once. */
clmoe_status backward_create(const bench_device *device, const inputs *in, const char *engine,
                             bench_backward *b);
void backward_release(bench_backward *b);

/* Fills what a backward pass gives with NaN. */
clmoe_status backward_forget(bench_backward *b);

/* Before each STEP_BACKWARD_WEIGHTS: what it finds in `scratch`. Nothing for other steps. */
clmoe_status backward_prepare(bench_backward *b, bench_step step);

/* Enqueues one of the steps that step_is_backward() has. */
clmoe_status backward_enqueue(bench_backward *b, bench_step step, cl_event *event);

#endif
