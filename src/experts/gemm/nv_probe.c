/* The probes of the engines for NVIDIA: exact integers through every instruction they use. */
#include "nv_probe.h"
#include "nv_ptx.h"
#include "runtime/launch.h"
#include "runtime/program.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SIDE = 16, SIZE = SIDE * SIDE, WARP = 32, WARPGROUP = 128 };
enum { WG_ROWS = 64, WG_COLUMNS = 16, WG_DEPTH = 32, CHUNK = 8 };

/* Factors [16,16] and both products, as cl/experts/gemm/nv_probe.cl has them, in one buffer. */
typedef struct mma_data {
    uint16_t a[SIZE], b[SIZE], bt[SIZE], c[2 * SIZE];
} mma_data;

/* As cl/experts/gemm/nv_wgmma_probe.cl has them; copies begin at multiples of 16 bytes. */
typedef struct wgmma_data {
    uint16_t a[WG_ROWS * WG_DEPTH], b[WG_COLUMNS * WG_DEPTH];
    uint16_t c[WG_ROWS * WG_COLUMNS], transposed[WG_ROWS * WG_COLUMNS];
} wgmma_data;

static int a_at(int row, int k) {
    return (3 * row + 5 * k) % 7 - 3;
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

/* Whether mma's probe takes this part of `a` for 0. */
static bool is_left_out(int row, int k) {
    return row == SIDE - 1 && k >= SIDE / 2;
}

/* The products are the expected ones; the part of `a` that counts as 0 is not. */
static void fill_mma(clmoe_type type, void *opaque) {
    mma_data *data = opaque;
    for (int row = 0; row < SIDE; row++)
        for (int column = 0; column < SIDE; column++) {
            int at = row * SIDE + column, sum = 0;
            for (int k = 0; k < SIDE; k++)
                sum += is_left_out(row, k) ? 0 : a_at(row, k) * b_at(column, k);
            data->a[at] = code_of(type, is_left_out(row, column) ? 1 : a_at(row, column));
            data->b[at] = code_of(type, b_at(row, column));
            data->bt[at] = code_of(type, b_at(column, row));
            data->c[at] = data->c[SIZE + at] = code_of(type, sum);
        }
}

static void fill_wgmma(clmoe_type type, void *opaque) {
    wgmma_data *data = opaque;
    for (int row = 0; row < WG_ROWS; row++)
        for (int k = 0; k < WG_DEPTH; k++)
            data->a[row * WG_DEPTH + k] = code_of(type, a_at(row, k));
    for (int column = 0; column < WG_COLUMNS; column++)
        for (int k = 0; k < WG_DEPTH; k++) {
            const int chunk = k / CHUNK ^ column / 2 % 4;
            data->b[column * WG_DEPTH + chunk * CHUNK + k % CHUNK] = code_of(type, b_at(column, k));
        }
    for (int row = 0; row < WG_ROWS; row++)
        for (int column = 0; column < WG_COLUMNS; column++) {
            int sum = 0;
            for (int k = 0; k < WG_DEPTH; k++)
                sum += a_at(row, k) * b_at(column, k);
            data->c[row * WG_COLUMNS + column] = code_of(type, sum);
            data->transposed[column * WG_ROWS + row] = code_of(type, sum);
        }
}

static clmoe_status set_mma(cl_kernel kernel, cl_mem mem, clmoe_type type) {
    return KERNEL_SET(kernel, ARG_TYPE(((clmoe_buf){mem, offsetof(mma_data, a)}), type),
                      ARG_TYPE(((clmoe_buf){mem, offsetof(mma_data, b)}), type),
                      ARG_TYPE(((clmoe_buf){mem, offsetof(mma_data, bt)}), type),
                      ARG_TYPE(((clmoe_buf){mem, offsetof(mma_data, c)}), type));
}

static clmoe_status set_wgmma(cl_kernel kernel, cl_mem mem, clmoe_type type) {
    return KERNEL_SET(kernel, ARG_TYPE(((clmoe_buf){mem, offsetof(wgmma_data, a)}), type),
                      ARG_TYPE(((clmoe_buf){mem, offsetof(wgmma_data, b)}), type),
                      ARG_TYPE(((clmoe_buf){mem, offsetof(wgmma_data, c)}), type),
                      ARG_TYPE(((clmoe_buf){mem, offsetof(wgmma_data, transposed)}), type));
}

/* A probe's data are its factors, then from `products` on what comes out. */
static const struct probe {
    const char *engine, *step, *kernel;
    const program_edit *edit;
    size_t bytes, products, items;
    void (*fill)(clmoe_type type, void *data);
    clmoe_status (*set)(cl_kernel kernel, cl_mem mem, clmoe_type type);
} probes[NV_PROBES] = {
    [NV_PROBE_MMA] = {"nv_mma", "experts/gemm/nv_probe", "nv_mma_probe", NULL, sizeof(mma_data),
                      offsetof(mma_data, c), WARP, fill_mma, set_mma},
    [NV_PROBE_WGMMA] = {"nv_wgmma", "experts/gemm/nv_wgmma_probe", "nv_wgmma_probe", &nv_ptx_sm90a,
                        sizeof(wgmma_data), offsetof(wgmma_data, c), WARPGROUP, fill_wgmma,
                        set_wgmma},
};

static clmoe_status run(clmoe_context *context, cl_command_queue queue, const struct probe *probe,
                        clmoe_type type, cl_mem mem, void *result) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = NULL;
    launch chain = {0};
    char options[32];
    snprintf(options, sizeof options, "-DX=%s", type_name(type));
    TRY(program_kernel_edited(context, probe->step, options, probe->edit, probe->kernel, &kernel));
    TRY(launch_begin(&chain, context, queue, 0, NULL));
    TRY(probe->set(kernel, mem, type));
    TRY(launch_1d(&chain, kernel, 1, probe->items));
    TRY(launch_read(&chain, (clmoe_buf){mem, 0}, probe->bytes, result));
done:
    status = launch_end(&chain, status, NULL);
    kernel_release(&kernel);
    return status;
}

static clmoe_status probe_type(clmoe_context *context, cl_command_queue queue,
                               const struct probe *probe, clmoe_type type) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    cl_mem mem = NULL;
    unsigned char *expected = malloc(2 * probe->bytes);
    if (!expected)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a probe");
    unsigned char *data = expected + probe->bytes;
    probe->fill(type, expected);
    memcpy(data, expected, probe->bytes);
    memset(data + probe->products, 0xFF, probe->bytes - probe->products);
    mem = clCreateBuffer(context->cl, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR, probe->bytes, data,
                         &code);
    TRY(clmoe_cl_check(code, "clCreateBuffer"));
    TRY(run(context, queue, probe, type, mem, data));
    if (memcmp(data, expected, probe->bytes) != 0)
        status = fail(CLMOE_UNSUPPORTED, "the tensor cores of %.64s gave wrong numbers in %s",
                      context->info.name, type_name(type));
done:
    if (mem)
        clReleaseMemObject(mem);
    free(expected);
    return status;
}

static clmoe_status probe_both(clmoe_context *context, const struct probe *probe) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    cl_command_queue queue = clCreateCommandQueue(context->cl, context->device, 0, &code);
    TRY(clmoe_cl_check(code, "clCreateCommandQueue"));
    TRY(probe_type(context, queue, probe, CLMOE_F16));
    TRY(probe_type(context, queue, probe, CLMOE_BF16));
done:
    if (queue)
        clReleaseCommandQueue(queue);
    return status;
}

static nv_probe_result recall(clmoe_context *context, nv_probe_kind kind) {
    pthread_mutex_lock(&context->lock);
    const nv_probe_result result = context->nv_probe[kind];
    pthread_mutex_unlock(&context->lock);
    return result;
}

static void remember(clmoe_context *context, nv_probe_kind kind, nv_probe_result result) {
    pthread_mutex_lock(&context->lock);
    context->nv_probe[kind] = result;
    pthread_mutex_unlock(&context->lock);
}

clmoe_status nv_probe(clmoe_context *context, nv_probe_kind kind) {
    const struct probe *probe = &probes[kind];
    const nv_probe_result known = recall(context, kind);
    if (known == NV_PROBE_PASSED)
        return CLMOE_SUCCESS;
    if (known == NV_PROBE_FAILED)
        return fail(CLMOE_UNSUPPORTED, "the tensor cores of %.64s failed the probe of engine %s",
                    context->info.name, probe->engine);
    const clmoe_status status = probe_both(context, probe);
    if (status == CLMOE_SUCCESS)
        remember(context, kind, NV_PROBE_PASSED);
    if (status != CLMOE_BUILD_FAILED && status != CLMOE_UNSUPPORTED)
        return status;
    remember(context, kind, NV_PROBE_FAILED);
    return CLMOE_UNSUPPORTED;
}
