#include "kernels.h"
#include "../sources.h"

#include <stdio.h>

enum { MOST_SOURCES = 8, GPU_GROUP = 16 };

static const char *const names[TRAIN_KERNELS] = {
    [KERNEL_EMBED] = "embed",
    [KERNEL_EMBED_BACKWARD] = "embed_backward",
    [KERNEL_NORM] = "norm",
    [KERNEL_NORM_BACKWARD] = "norm_backward",
    [KERNEL_NORM_GAIN] = "norm_gain",
    [KERNEL_SUM_ROWS] = "sum_rows",
    [KERNEL_CROSS_ENTROPY] = "cross_entropy",
    [KERNEL_ADAMW] = "adamw",
    [KERNEL_SUM_VALUES] = "sum_values",
};

static clmoe_status build(train_kernels *k, const device_session *device, cl_device_id id,
                          const char *options) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *texts[MOST_SOURCES];
    cl_uint count = 0;
    cl_int code = CL_SUCCESS;
    for (; count < MOST_SOURCES && train_sources[count].name != NULL; count++)
        texts[count] = train_sources[count].text;
    k->program = clCreateProgramWithSource(device->cl, count, texts, NULL, &code);
    TRY(cli_cl(code, "clCreateProgramWithSource"));
    TRY(CL(clBuildProgram(k->program, 1, &id, options, NULL, NULL)));
    for (int i = 0; i < TRAIN_KERNELS; i++) {
        k->kernels[i] = clCreateKernel(k->program, names[i], &code);
        TRY(cli_cl(code, "clCreateKernel"));
    }
done:
    return status;
}

clmoe_status train_kernels_create(train_kernels *k, const device_session *device, clmoe_type type) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_device_id id = NULL;
    cl_device_type kind = 0;
    char options[80];
    TRY(CL(clGetCommandQueueInfo(device->queue, CL_QUEUE_DEVICE, sizeof(cl_device_id), (void *)&id,
                                 NULL)));
    TRY(CL(clGetDeviceInfo(id, CL_DEVICE_TYPE, sizeof kind, &kind, NULL)));
    k->queue = device->queue;
    k->group = (kind & CL_DEVICE_TYPE_CPU) != 0 ? 1 : GPU_GROUP;
    snprintf(options, sizeof options, "-cl-std=CL1.2 -DGROUP=%u%s", (unsigned)k->group,
             type == CLMOE_BF16 ? " -DX_BF16" : "");
    TRY(build(k, device, id, options));
done:
    return status;
}

void train_kernels_release(train_kernels *k) {
    for (int i = 0; i < TRAIN_KERNELS; i++)
        if (k->kernels[i] != NULL)
            clReleaseKernel(k->kernels[i]);
    if (k->program != NULL)
        clReleaseProgram(k->program);
    *k = (train_kernels){0};
}

clmoe_status train_kernels_run(train_kernels *k, const kernel_launch *launch) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_kernel kernel = k->kernels[launch->kernel];
    const size_t columns = launch->columns * (launch->grouped ? k->group : 1);
    const size_t items[2] = {columns, launch->rows > 0 ? launch->rows : 1};
    const size_t group[2] = {k->group, 1};
    for (cl_uint i = 0; i < MOST_ARGUMENTS && launch->arguments[i].size > 0; i++)
        TRY(CL(clSetKernelArg(kernel, i, launch->arguments[i].size, launch->arguments[i].value)));
    TRY(CL(clEnqueueNDRangeKernel(k->queue, kernel, 2, NULL, items, launch->grouped ? group : NULL,
                                  0, NULL, NULL)));
done:
    return status;
}
