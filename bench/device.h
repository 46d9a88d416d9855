/* The device under test, and the bench's own kernels on it. */
#ifndef BENCH_DEVICE_H
#define BENCH_DEVICE_H

#include "bench.h"

typedef struct bench_device {
    cl_device_id id;
    cl_context cl;
    cl_command_queue queue; /* in order; with profiling where time is taken on the device */
    clmoe_context *clmoe;
    bool cpu;
    char name[128], driver[128];
    cl_uint units;                /* compute units */
    cl_ulong memory, buffer_most; /* bytes of the device, and of one buffer */
    /* Of device_prepare(): */
    cl_kernel delay; /* NULL on CPUs */
    cl_mem delay_out, other;
    size_t other_bytes;
    /* The roofline, once measured. */
    double read_gbs, copy_gbs, fma_gflops;
} bench_device;

/*
 * The device that `wanted` means: a number, as clmoe devices counts, or part of a name; NULL: the
 * first GPU, else the first device.
 */
clmoe_status device_open(const char *wanted, bench_device *device);
void device_close(bench_device *device);

/* A buffer of at least `bytes`, or a sentence that names the device's limit. */
clmoe_status device_buffer(const bench_device *device, size_t bytes, cl_mem *buffer);
void buffer_release(cl_mem *buffer);

/* One full of NaN, so that nothing passes a check that was not written. */
clmoe_status device_poisoned(const bench_device *device, size_t bytes, cl_mem *buffer);

/* The same of a buffer that is there. */
clmoe_status buffer_poison(const bench_device *device, cl_mem buffer);

/* The kernel `name` of bench/FILE. */
clmoe_status device_kernel(const bench_device *device, const char *file, const char *options,
                           const char *name, cl_kernel *kernel);

/* Enqueues `groups` groups of `group` work-items. */
clmoe_status device_launch(const bench_device *device, cl_kernel kernel, size_t groups,
                           size_t group);

/* What timing needs: device_delay() and device_forget() work after it. */
clmoe_status device_prepare(bench_device *device);

/* Keeps a GPU busy for a fraction of a millisecond, while the host enqueues what comes next. */
clmoe_status device_delay(const bench_device *device);

/* Fills the caches with other data, as the weights of a model's other layers do. */
clmoe_status device_forget(const bench_device *device);

/* Milliseconds of the host's clock. */
double host_ms(void);

#endif
