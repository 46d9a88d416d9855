/* The probe of engine nv_mma: exact integers through every instruction it uses. */
#include "nv_probe.h"
#include "runtime/launch.h"
#include "runtime/program.h"

#include <stdio.h>
#include <string.h>

enum { SIDE = 16, SIZE = SIDE * SIDE, WARP = 32 };

/* Factors [16,16] and both products, as cl/experts/gemm/nv_probe.cl has them, in one buffer. */
typedef struct probe_data {
    uint16_t a[SIZE], b[SIZE], bt[SIZE], c[2 * SIZE];
} probe_data;

static int a_at(int row, int k) {
    return row == SIDE - 1 && k >= SIDE / 2 ? 0 : (3 * row + 5 * k) % 7 - 3;
}

static int b_at(int column, int k) {
    return (2 * column + 3 * k) % 5 - 2;
}

static uint16_t code_of(clmoe_type type, int value) {
    const float number = (float)value;
    uint16_t code = 0;
    clmoe_type_encode(type, &number, 1, &code);
    return code;
}

/* The products are the expected ones; the part of `a` that counts as 0 is not. */
static void fill(clmoe_type type, probe_data *data) {
    for (int row = 0; row < SIDE; row++)
        for (int column = 0; column < SIDE; column++) {
            int at = row * SIDE + column, sum = 0;
            for (int k = 0; k < SIDE; k++)
                sum += a_at(row, k) * b_at(column, k);
            data->a[at] =
                code_of(type, row == SIDE - 1 && column >= SIDE / 2 ? 1 : a_at(row, column));
            data->b[at] = code_of(type, b_at(row, column));
            data->bt[at] = code_of(type, b_at(column, row));
            data->c[at] = data->c[SIZE + at] = code_of(type, sum);
        }
}

static clmoe_status run(clmoe_context *context, cl_command_queue queue, cl_mem mem, clmoe_type type,
                        probe_data *result) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = NULL;
    launch chain = {0};
    char options[32];
    snprintf(options, sizeof options, "-DX=%s", type_name(type));
    TRY(program_kernel(context, "experts/gemm/nv_probe", options, "nv_mma_probe", &kernel));
    TRY(launch_begin(&chain, context, queue, 0, NULL));
    TRY(KERNEL_SET(kernel, ARG_TYPE(((clmoe_buf){mem, offsetof(probe_data, a)}), type),
                   ARG_TYPE(((clmoe_buf){mem, offsetof(probe_data, b)}), type),
                   ARG_TYPE(((clmoe_buf){mem, offsetof(probe_data, bt)}), type),
                   ARG_TYPE(((clmoe_buf){mem, offsetof(probe_data, c)}), type)));
    TRY(launch_1d(&chain, kernel, 1, WARP));
    TRY(launch_read(&chain, (clmoe_buf){mem, 0}, sizeof *result, result));
done:
    status = launch_end(&chain, status, NULL);
    kernel_release(&kernel);
    return status;
}

static clmoe_status probe_type(clmoe_context *context, cl_command_queue queue, clmoe_type type) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    probe_data expected, data;
    fill(type, &expected);
    data = expected;
    memset(data.c, 0xFF, sizeof data.c);
    cl_mem mem = clCreateBuffer(context->cl, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR, sizeof data,
                                &data, &code);
    TRY(clmoe_cl_check(code, "clCreateBuffer"));
    TRY(run(context, queue, mem, type, &data));
    if (memcmp(&data, &expected, sizeof data) != 0)
        status = fail(CLMOE_UNSUPPORTED, "the tensor cores of %.64s gave wrong numbers in %s",
                      context->info.name, type_name(type));
done:
    if (mem)
        clReleaseMemObject(mem);
    return status;
}

static clmoe_status probe(clmoe_context *context) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    cl_command_queue queue = clCreateCommandQueue(context->cl, context->device, 0, &code);
    TRY(clmoe_cl_check(code, "clCreateCommandQueue"));
    TRY(probe_type(context, queue, CLMOE_F16));
    TRY(probe_type(context, queue, CLMOE_BF16));
done:
    if (queue)
        clReleaseCommandQueue(queue);
    return status;
}

static nv_probe_result recall(clmoe_context *context) {
    pthread_mutex_lock(&context->lock);
    const nv_probe_result result = context->nv_probe;
    pthread_mutex_unlock(&context->lock);
    return result;
}

static void remember(clmoe_context *context, nv_probe_result result) {
    pthread_mutex_lock(&context->lock);
    context->nv_probe = result;
    pthread_mutex_unlock(&context->lock);
}

clmoe_status nv_probe(clmoe_context *context) {
    const nv_probe_result known = recall(context);
    if (known == NV_PROBE_PASSED)
        return CLMOE_SUCCESS;
    if (known == NV_PROBE_FAILED)
        return fail(CLMOE_UNSUPPORTED,
                    "the tensor cores of %.64s failed the probe of engine nv_mma",
                    context->info.name);
    const clmoe_status status = probe(context);
    if (status == CLMOE_SUCCESS)
        remember(context, NV_PROBE_PASSED);
    if (status != CLMOE_BUILD_FAILED && status != CLMOE_UNSUPPORTED)
        return status;
    remember(context, NV_PROBE_FAILED);
    return CLMOE_UNSUPPORTED;
}
