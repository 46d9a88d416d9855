#include "device.h"
#include "../src/cli/device_name.h"
#include "../src/cli/sources.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_PLATFORMS = 32, MAX_DEVICES = 256 };

/* Of the buffer that empties the caches: some times their size, within these limits. */
#define LEAST_OTHER ((size_t)64 << 20)
#define MOST_OTHER  ((size_t)512 << 20)

/* One small group, multiplying for about 0.2 ms on a GPU. */
enum { DELAY_GROUP = 32, DELAY_COUNT = 8000 };

/* All devices of all platforms, in the platforms' order. */
typedef struct device_list {
    cl_device_id ids[MAX_DEVICES];
    cl_uint count;
} device_list;

static bool is_type(cl_device_id id, cl_device_type wanted) {
    cl_device_type type = 0;
    return clGetDeviceInfo(id, CL_DEVICE_TYPE, sizeof type, &type, NULL) == CL_SUCCESS &&
           (type & wanted) != 0;
}

static clmoe_status list_devices(device_list *list) {
    cl_platform_id platforms[MAX_PLATFORMS];
    cl_uint platform_count = 0;
    list->count = 0;
    if (clGetPlatformIDs(MAX_PLATFORMS, platforms, &platform_count) != CL_SUCCESS)
        platform_count = 0;
    if (platform_count > MAX_PLATFORMS)
        platform_count = MAX_PLATFORMS;
    for (cl_uint i = 0; i < platform_count; i++) {
        cl_uint room = MAX_DEVICES - list->count, found = 0;
        if (room > 0 && clGetDeviceIDs(platforms[i], CL_DEVICE_TYPE_ALL, room,
                                       list->ids + list->count, &found) == CL_SUCCESS)
            list->count += found < room ? found : room;
    }
    return list->count > 0 ? CLMOE_SUCCESS : cli_fail(CLMOE_UNSUPPORTED, "no OpenCL device found");
}

static bool is_meant(const device_list *list, cl_uint index, const char *wanted) {
    return wanted ? device_is_meant(list->ids[index], index, wanted)
                  : is_type(list->ids[index], CL_DEVICE_TYPE_GPU);
}

static clmoe_status pick_device(const char *wanted, cl_device_id *id) {
    clmoe_status status = CLMOE_SUCCESS;
    device_list list;
    problem why;
    cl_uint index = 0;
    TRY(list_devices(&list));
    while (index < list.count && !is_meant(&list, index, wanted))
        index++;
    if (index == list.count && wanted)
        TRY(checked(device_not_found(wanted, list.count, &why), &why));
    *id = list.ids[index < list.count ? index : 0];
done:
    return status;
}

/* Its first size - 1 characters. */
static clmoe_status read_text(cl_device_id id, cl_device_info what, char *text, size_t size) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t bytes = 0;
    char *all = NULL;
    TRY(CL(clGetDeviceInfo(id, what, 0, NULL, &bytes)));
    all = calloc(1, bytes + 1);
    if (!all)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "out of memory for the device's name");
    TRY(CL(clGetDeviceInfo(id, what, bytes, all, NULL)));
    snprintf(text, size, "%s", all);
done:
    free(all);
    return status;
}

static clmoe_status read_facts(bench_device *d) {
    clmoe_status status = CLMOE_SUCCESS;
    d->cpu = is_type(d->id, CL_DEVICE_TYPE_CPU);
    TRY(read_text(d->id, CL_DEVICE_NAME, d->name, sizeof d->name));
    TRY(read_text(d->id, CL_DRIVER_VERSION, d->driver, sizeof d->driver));
    TRY(CL(clGetDeviceInfo(d->id, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof d->units, &d->units, NULL)));
    TRY(CL(clGetDeviceInfo(d->id, CL_DEVICE_GLOBAL_MEM_SIZE, sizeof d->memory, &d->memory, NULL)));
    TRY(CL(clGetDeviceInfo(d->id, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof d->buffer_most,
                           &d->buffer_most, NULL)));
done:
    return status;
}

/* The kernels' warnings and errors. */
clmoe_status device_open(const char *wanted, bench_device *d) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    *d = (bench_device){0};
    TRY(pick_device(wanted, &d->id));
    TRY(read_facts(d));
    d->cl = clCreateContext(NULL, 1, &d->id, NULL, NULL, &code);
    TRY(cli_cl(code, "clCreateContext"));
    d->queue = clCreateCommandQueue(d->cl, d->id, d->cpu ? 0 : CL_QUEUE_PROFILING_ENABLE, &code);
    TRY(cli_cl(code, "clCreateCommandQueue"));
    TRY(LIB(clmoe_context_create(d->cl, d->id, NULL, &d->clmoe)));
done:
    if (status != CLMOE_SUCCESS)
        device_close(d);
    return status;
}

void device_close(bench_device *d) {
    clmoe_context_destroy(d->clmoe);
    buffer_release(&d->delay_out);
    buffer_release(&d->other);
    if (d->delay)
        clReleaseKernel(d->delay);
    if (d->queue)
        clReleaseCommandQueue(d->queue);
    if (d->cl)
        clReleaseContext(d->cl);
    *d = (bench_device){0};
}

clmoe_status device_buffer(const bench_device *d, size_t bytes, cl_mem *buffer) {
    cl_int code = CL_SUCCESS;
    if (bytes > d->buffer_most)
        return cli_fail(CLMOE_UNSUPPORTED,
                        "a buffer needs %.1f GB, but the device allows %.1f GB in one",
                        (double)bytes * 1e-9, (double)d->buffer_most * 1e-9);
    *buffer = clCreateBuffer(d->cl, CL_MEM_READ_WRITE, bytes > 0 ? bytes : 4, NULL, &code);
    return cli_cl(code, "clCreateBuffer");
}

clmoe_status buffer_poison(const bench_device *d, cl_mem buffer) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_uint poison = UINT32_MAX;
    size_t bytes = 0;
    TRY(CL(clGetMemObjectInfo(buffer, CL_MEM_SIZE, sizeof bytes, &bytes, NULL)));
    const size_t whole = bytes / sizeof poison * sizeof poison;
    if (whole > 0)
        TRY(CL(clEnqueueFillBuffer(d->queue, buffer, &poison, sizeof poison, 0, whole, 0, NULL,
                                   NULL)));
done:
    return status;
}

clmoe_status device_poisoned(const bench_device *d, size_t bytes, cl_mem *buffer) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(device_buffer(d, bytes, buffer));
    TRY(buffer_poison(d, *buffer));
done:
    return status;
}

void buffer_release(cl_mem *buffer) {
    if (*buffer)
        clReleaseMemObject(*buffer);
    *buffer = NULL;
}

static const char *source_of(const char *file) {
    for (const kernel_source *source = bench_sources; source->name; source++)
        if (strcmp(source->name, file) == 0)
            return source->text;
    return "";
}

static clmoe_status build_failed(const bench_device *d, cl_program program, const char *file,
                                 cl_int code) {
    char log[512] = "";
    clGetProgramBuildInfo(program, d->id, CL_PROGRAM_BUILD_LOG, sizeof log - 1, log, NULL);
    return cli_fail(code, "bench/%s did not build: %s: %s", file, clmoe_status_string(code), log);
}

clmoe_status device_kernel(const bench_device *d, const char *file, const char *options,
                           const char *name, cl_kernel *kernel) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    char flags[256];
    const char *sources[] = {source_of("../src/cli/random.clh"), source_of(file)};
    cl_program program = clCreateProgramWithSource(d->cl, COUNT_OF(sources), sources, NULL, &code);
    TRY(cli_cl(code, "clCreateProgramWithSource"));
    snprintf(flags, sizeof flags, "-cl-std=CL1.2 %s", options);
    code = clBuildProgram(program, 1, &d->id, flags, NULL, NULL);
    if (code != CL_SUCCESS)
        TRY(build_failed(d, program, file, code));
    *kernel = clCreateKernel(program, name, &code);
    TRY(cli_cl(code, "clCreateKernel"));
done:
    if (program)
        clReleaseProgram(program);
    return status;
}

clmoe_status device_launch(const bench_device *d, cl_kernel kernel, size_t groups, size_t group) {
    const size_t global = groups * group;
    return CL(clEnqueueNDRangeKernel(d->queue, kernel, 1, NULL, &global, &group, 0, NULL, NULL));
}

static clmoe_status create_delay(bench_device *d) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_float b = 0.999F, c = 0.001F;
    const cl_uint count = DELAY_COUNT;
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%d -DV=4", DELAY_GROUP);
    TRY(device_kernel(d, "roofline.cl", options, "roofline_fma", &d->delay));
    TRY(device_buffer(d, DELAY_GROUP * 4 * sizeof(float), &d->delay_out));
    TRY(CL(clSetKernelArg(d->delay, 0, sizeof d->delay_out, &d->delay_out)));
    TRY(CL(clSetKernelArg(d->delay, 1, sizeof b, &b)));
    TRY(CL(clSetKernelArg(d->delay, 2, sizeof c, &c)));
    TRY(CL(clSetKernelArg(d->delay, 3, sizeof count, &count)));
done:
    return status;
}

clmoe_status device_prepare(bench_device *d) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_ulong cache = 0;
    if (!d->cpu)
        TRY(create_delay(d));
    TRY(CL(clGetDeviceInfo(d->id, CL_DEVICE_GLOBAL_MEM_CACHE_SIZE, sizeof cache, &cache, NULL)));
    d->other_bytes = cache < LEAST_OTHER / 4 ? LEAST_OTHER : 4 * (size_t)cache;
    d->other_bytes = d->other_bytes < MOST_OTHER ? d->other_bytes : MOST_OTHER;
    TRY(device_buffer(d, d->other_bytes, &d->other));
done:
    return status;
}

clmoe_status device_delay(const bench_device *d) {
    return d->delay ? device_launch(d, d->delay, 1, DELAY_GROUP) : CLMOE_SUCCESS;
}

clmoe_status device_forget(const bench_device *d) {
    /* PoCL 3.1 stores one pattern at a time: a wide one takes a fraction of a word's time. */
    const cl_uint16 words = {{1}};
    return CL(clEnqueueFillBuffer(d->queue, d->other, &words, sizeof words, 0,
                                  d->other_bytes / sizeof words * sizeof words, 0, NULL, NULL));
}

double host_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}
