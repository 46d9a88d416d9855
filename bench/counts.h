/* The quantile rule's counts of a case: its layer with a selection bias, logits -> counts. */
#ifndef BENCH_COUNTS_H
#define BENCH_COUNTS_H

#include "inputs.h"

typedef enum counts_buffer {
    COUNTS_STATE,
    COUNTS_SCRATCH,
    COUNTS_BIAS_COUNTS, /* [E,CLMOE_BIAS_BINS] u32 */
    COUNTS_BUFFERS
} counts_buffer;

typedef struct bench_counts {
    const bench_device *device;
    const inputs *in;
    clmoe_layer *layer;
    cl_mem logits; /* [T,E] f32, the caller's */
    cl_mem buffers[COUNTS_BUFFERS];
} bench_counts;

/* Creates the layer, and its state with counts_bias(). */
clmoe_status counts_create(const bench_device *device, const inputs *in, const char *engine,
                           cl_mem logits, bench_counts *c);
void counts_release(bench_counts *c);

clmoe_status counts_enqueue(bench_counts *c, cl_event *event);

clmoe_layer_desc counts_desc(const inputs *in, const char *engine);

/* The bias of expert e: of the size of a score. */
float counts_bias(const bench_case *c, uint32_t e);

#endif
