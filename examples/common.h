/* What the examples share: errors end the program; the first OpenCL device; buffers. */
#ifndef EXAMPLES_COMMON_H
#define EXAMPLES_COMMON_H

#define CL_TARGET_OPENCL_VERSION 120
#include <clmoe/clmoe.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static inline void check(clmoe_status status) {
    if (status == CLMOE_SUCCESS)
        return;
    fprintf(stderr, "%s: %s\n", clmoe_status_string(status), clmoe_last_error());
    exit(1);
}

static inline void fail_unless(int holds, const char *sentence) {
    if (holds)
        return;
    fprintf(stderr, "wrong: %s\n", sentence);
    exit(1);
}

static inline void *allocate(size_t bytes) {
    void *memory = malloc(bytes > 0 ? bytes : 1);
    fail_unless(memory != NULL, "out of memory");
    return memory;
}

typedef struct gpu {
    cl_context cl;
    cl_device_id device;
    cl_command_queue queue;
    clmoe_context *context;
} gpu;

/* The first device of the first platform, with a queue of these properties. */
static inline gpu gpu_open(cl_command_queue_properties properties) {
    gpu g;
    cl_platform_id platform;
    cl_int code;
    check(clGetPlatformIDs(1, &platform, NULL));
    check(clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 1, &g.device, NULL));
    g.cl = clCreateContext(NULL, 1, &g.device, NULL, NULL, &code);
    check(code);
    g.queue = clCreateCommandQueue(g.cl, g.device, properties, &code);
    check(code);
    check(clmoe_context_create(g.cl, g.device, NULL, &g.context));
    return g;
}

static inline void gpu_close(gpu *g) {
    clmoe_context_destroy(g->context);
    clReleaseCommandQueue(g->queue);
    clReleaseContext(g->cl);
}

/* A buffer of `bytes`, with what `values` has, or undefined. */
static inline clmoe_buf buffer(const gpu *g, size_t bytes, const void *values) {
    cl_int code;
    cl_mem mem = clCreateBuffer(g->cl, CL_MEM_READ_WRITE, bytes > 0 ? bytes : 1, NULL, &code);
    check(code);
    if (values && bytes > 0)
        check(clEnqueueWriteBuffer(g->queue, mem, CL_TRUE, 0, bytes, values, 0, NULL, NULL));
    return (clmoe_buf){mem, 0};
}

/* `count` floats in [-0.5, 0.5) times `scale`. */
static inline clmoe_buf random_buffer(const gpu *g, size_t count, float scale) {
    float *values = allocate(count * sizeof *values);
    for (size_t i = 0; i < count; i++)
        values[i] = scale * ((float)(rand() % 65536) / 65536.0f - 0.5f);
    clmoe_buf filled = buffer(g, count * sizeof *values, values);
    free(values);
    return filled;
}

/* Waits for `after`, if there is one, and reads. */
static inline void read_back(const gpu *g, clmoe_buf from, size_t bytes, void *to, cl_event after) {
    check(clEnqueueReadBuffer(g->queue, from.mem, CL_TRUE, from.offset, bytes, to, after ? 1 : 0,
                              after ? &after : NULL, NULL));
}

static inline void buffer_free(clmoe_buf *b) {
    if (b->mem)
        clReleaseMemObject(b->mem);
    b->mem = NULL;
}

/* Buffers that every batch needs: saved, scratch and y. */
static inline void batch_buffers(const gpu *g, const clmoe_layer *layer, clmoe_forward_args *args,
                                 size_t y_bytes) {
    size_t saved, scratch;
    check(clmoe_layer_memory(layer, args->tokens, &saved, &scratch));
    args->saved = buffer(g, saved, NULL);
    args->scratch = buffer(g, scratch, NULL);
    args->y = buffer(g, y_bytes, NULL);
}

/* ||a - b|| / ||b||. */
static inline double relative_error(const float *a, const float *b, size_t count) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < count; i++) {
        difference += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)b[i] * (double)b[i];
    }
    return sqrt(difference / norm);
}

#endif
