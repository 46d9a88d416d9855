#include "roofline.h"

#include <stdio.h>

enum { LEAST_RUNS = 8, GPU_GROUP = 256, GROUPS_PER_UNIT = 16, GPU_VECTOR = 4, MAX_VECTOR = 16 };
enum { CHAINS = 12 }; /* of roofline.cl */

/* Launches in a row: on a GPU one alone is too short for the host's clock. */
enum { GPU_LAUNCHES = 10 };

/* Long enough to meet a quiet moment, where rows are measured often enough for one, too. */
#define RATE_MS 500.0
enum { RATE_RUNS = 5 };

/* Well over any cache. */
#define GPU_BYTES ((size_t)1 << 30)
#define CPU_BYTES ((size_t)1 << 28)

/* Multiply-adds per chain and work-item: some milliseconds. */
enum { FMA_COUNT = 1 << 16, FMA_COUNT_CPU = 1 << 19 };

typedef struct roofline {
    const bench_device *device;
    size_t group, groups, vector; /* work-items; groups; floats per vector */
    size_t bytes;                 /* of each array */
    double rate_ms;               /* that a rate is measured for */
    int least_runs;               /* however long they take */
    cl_mem in, out;
    cl_kernel copy, read, fma;
} roofline;

static clmoe_status choose_sizes(roofline *r) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_device *d = r->device;
    cl_uint width = 0;
    TRY(CL(
        clGetDeviceInfo(d->id, CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, sizeof width, &width, NULL)));
    r->group = d->cpu ? 1 : GPU_GROUP;
    r->groups = (size_t)d->units * GROUPS_PER_UNIT;
    r->vector = GPU_VECTOR;
    while (d->cpu && r->vector < MAX_VECTOR && r->vector < width)
        r->vector *= 2;
    r->bytes = d->cpu ? CPU_BYTES : GPU_BYTES;
    while (r->bytes > d->buffer_most || 4 * r->bytes > d->memory)
        r->bytes /= 2;
    /* Every work-item gets as many vectors, a multiple of four. */
    const size_t step = r->group * r->groups * r->vector * sizeof(float) * 4;
    r->bytes = r->bytes / step * step;
done:
    return status;
}

static clmoe_status create(roofline *r) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_float16 zero = {{0}}; /* a short pattern takes PoCL long */
    char options[64];
    TRY(choose_sizes(r));
    snprintf(options, sizeof options, "-DGROUP=%zu -DV=%zu", r->group, r->vector);
    TRY(device_kernel(r->device, "roofline.cl", options, "roofline_copy", &r->copy));
    TRY(device_kernel(r->device, "roofline.cl", options, "roofline_read", &r->read));
    TRY(device_kernel(r->device, "roofline.cl", options, "roofline_fma", &r->fma));
    TRY(device_buffer(r->device, r->bytes, &r->in));
    TRY(device_buffer(r->device, r->bytes, &r->out));
    TRY(CL(clEnqueueFillBuffer(r->device->queue, r->in, &zero, sizeof zero, 0, r->bytes, 0, NULL,
                               NULL)));
done:
    return status;
}

static void release(roofline *r) {
    cl_kernel kernels[] = {r->copy, r->read, r->fma};
    for (size_t i = 0; i < COUNT_OF(kernels); i++)
        if (kernels[i])
            clReleaseKernel(kernels[i]);
    buffer_release(&r->in);
    buffer_release(&r->out);
}

static clmoe_status set_stream(roofline *r, cl_kernel kernel) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_ulong items = r->group * r->groups;
    const cl_ulong count = r->bytes / (items * r->vector * sizeof(float));
    const cl_ulong first = r->device->cpu ? count : 1, stride = r->device->cpu ? 1 : items;
    TRY(CL(clSetKernelArg(kernel, 0, sizeof r->in, &r->in)));
    TRY(CL(clSetKernelArg(kernel, 1, sizeof r->out, &r->out)));
    TRY(CL(clSetKernelArg(kernel, 2, sizeof first, &first)));
    TRY(CL(clSetKernelArg(kernel, 3, sizeof stride, &stride)));
    TRY(CL(clSetKernelArg(kernel, 4, sizeof count, &count)));
done:
    return status;
}

static clmoe_status set_fma(roofline *r, cl_uint count) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_float b = 0.999F, c = 0.001F;
    TRY(CL(clSetKernelArg(r->fma, 0, sizeof r->out, &r->out)));
    TRY(CL(clSetKernelArg(r->fma, 1, sizeof b, &b)));
    TRY(CL(clSetKernelArg(r->fma, 2, sizeof c, &c)));
    TRY(CL(clSetKernelArg(r->fma, 3, sizeof count, &count)));
done:
    return status;
}

/* The best of some runs: `work` per second, in units of 1e9. */
static clmoe_status best_rate(roofline *r, cl_kernel kernel, double work, double *rate) {
    clmoe_status status = CLMOE_SUCCESS;
    const int launches = r->device->cpu ? 1 : GPU_LAUNCHES;
    const double start = host_ms();
    *rate = 0;
    for (int i = 0; i <= r->least_runs || host_ms() - start < r->rate_ms; i++) {
        TRY(CL(clFinish(r->device->queue)));
        const double begin = host_ms();
        for (int j = 0; j < launches; j++)
            TRY(device_launch(r->device, kernel, r->groups, r->group));
        TRY(CL(clFinish(r->device->queue)));
        /* The first one warms up. */
        const double now = launches * work / (host_ms() - begin) * 1e-6;
        *rate = i > 0 && now > *rate ? now : *rate;
    }
done:
    return status;
}

clmoe_status roofline_measure(bench_device *device, uint32_t repeat) {
    clmoe_status status = CLMOE_SUCCESS;
    const double runs = repeat < RATE_RUNS ? repeat : RATE_RUNS;
    roofline r = {.device = device,
                  .rate_ms = RATE_MS * runs / RATE_RUNS,
                  .least_runs = repeat < LEAST_RUNS ? (int)repeat : LEAST_RUNS};
    const cl_uint count = device->cpu ? FMA_COUNT_CPU : FMA_COUNT;
    TRY(create(&r));
    TRY(set_stream(&r, r.copy));
    TRY(set_stream(&r, r.read));
    TRY(set_fma(&r, count));
    TRY(best_rate(&r, r.copy, 2.0 * (double)r.bytes, &device->copy_gbs));
    TRY(best_rate(&r, r.read, (double)r.bytes, &device->read_gbs));
    TRY(best_rate(&r, r.fma, 2.0 * CHAINS * count * (double)(r.group * r.groups * r.vector),
                  &device->fma_gflops));
done:
    release(&r);
    return status;
}

double roofline_ms(const bench_device *device, double bytes, double flops) {
    const double gbs = device->read_gbs > device->copy_gbs ? device->read_gbs : device->copy_gbs;
    const double memory = bytes / gbs * 1e-6, compute = flops / device->fma_gflops * 1e-6;
    return memory > compute ? memory : compute;
}
