/*
 * A Mixture-of-Experts layer with random weights on the first OpenCL device:
 *   cc 00_forward.c $(pkg-config --cflags --libs clmoe) -o forward && ./forward
 */
#define CL_TARGET_OPENCL_VERSION 120
#include <clmoe/clmoe.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 64, DIM = 96, EXPERTS = 8, TOP_K = 2, HIDDEN = 160 };

static void check(clmoe_status status) {
    if (status == CLMOE_SUCCESS)
        return;
    fprintf(stderr, "%s: %s\n", clmoe_status_string(status), clmoe_last_error());
    exit(1);
}

/* A device buffer of `count` floats in [-0.1, 0.1). */
static clmoe_buf random_buffer(cl_context cl, size_t count) {
    cl_int code;
    float *values = malloc(count * sizeof *values);
    for (size_t i = 0; i < count; i++)
        values[i] = 0.2f * (float)rand() / (float)RAND_MAX - 0.1f;
    cl_mem mem = clCreateBuffer(cl, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR,
                                count * sizeof *values, values, &code);
    check(code);
    free(values);
    return (clmoe_buf){mem, 0};
}

static clmoe_buf buffer(cl_context cl, size_t bytes) {
    cl_int code;
    cl_mem mem = clCreateBuffer(cl, CL_MEM_READ_WRITE, bytes > 0 ? bytes : 1, NULL, &code);
    check(code);
    return (clmoe_buf){mem, 0};
}

int main(void) {
    cl_platform_id platform;
    cl_device_id device;
    cl_int code;
    check(clGetPlatformIDs(1, &platform, NULL));
    check(clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 1, &device, NULL));
    cl_context cl = clCreateContext(NULL, 1, &device, NULL, NULL, &code);
    check(code);
    cl_command_queue queue = clCreateCommandQueue(cl, device, 0, &code);
    check(code);

    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = DIM;
    desc.num_experts = EXPERTS;
    desc.top_k = TOP_K;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.experts.hidden_dim = HIDDEN; /* gated silu, gate and up in one matrix */
    desc.balance.enabled = 1;         /* for args.stats */

    clmoe_context *context;
    clmoe_layer *layer;
    size_t saved, scratch, stats_bytes;
    check(clmoe_context_create(cl, device, NULL, &context));
    check(clmoe_layer_create(context, &desc, &layer));
    check(clmoe_layer_memory(layer, TOKENS, &saved, &scratch));
    check(clmoe_stats_size(layer, &stats_bytes));

    clmoe_weights weights = {.router = random_buffer(cl, EXPERTS * DIM),
                             .experts.gate = random_buffer(cl, EXPERTS * 2 * HIDDEN * DIM),
                             .experts.down = random_buffer(cl, EXPERTS * DIM * HIDDEN)};
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = TOKENS;
    args.weights = &weights;
    args.x = random_buffer(cl, TOKENS * DIM);
    args.saved = buffer(cl, saved);
    args.scratch = buffer(cl, scratch);
    args.y = buffer(cl, TOKENS * DIM * sizeof(float));
    args.stats = buffer(cl, stats_bytes);

    cl_event done;
    clmoe_stats stats;
    check(clmoe_forward(layer, queue, &args, 0, NULL, &done));
    check(clEnqueueReadBuffer(queue, args.stats.mem, CL_TRUE, 0, sizeof stats, &stats, 1, &done,
                              NULL));
    printf("engine %s: %u tokens, %u pairs kept, MaxVio %.2f\n", clmoe_layer_engine(layer),
           stats.tokens, stats.kept, stats.max_violation);

    clReleaseEvent(done);
    clmoe_buf buffers[] = {args.x, args.saved, args.scratch, args.y, args.stats};
    for (size_t i = 0; i < sizeof buffers / sizeof buffers[0]; i++)
        clReleaseMemObject(buffers[i].mem);
    clmoe_weights_release(&weights);
    clmoe_layer_destroy(layer);
    clmoe_context_destroy(context);
    clReleaseCommandQueue(queue);
    clReleaseContext(cl);
    return 0;
}
