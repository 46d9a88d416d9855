/* The layer's calls: those that ask about the device, and those that it might refuse. */
#include "fake_device.h"

#include <CL/cl_icd.h>
#include <CL/cl_layer.h>
#include <stdlib.h>
#include <string.h>

static const cl_icd_dispatch *next;
static cl_icd_dispatch table;

CL_API_ENTRY fake_device clmoe_fake_device;
#define FAKE clmoe_fake_device

/* ---- Questions ------------------------------------------------------------------------------- */

static cl_int give(const void *from, size_t need, size_t size, void *value, size_t *bytes) {
    if (value && size < need)
        return CL_INVALID_VALUE;
    if (value)
        memcpy(value, from, need);
    if (bytes)
        *bytes = need;
    return CL_SUCCESS;
}

#define GIVE(variable) give(&(variable), sizeof(variable), size, value, bytes)

/* The text that is faked for a question, or NULL. */
static const char *fake_text(cl_device_info what) {
    switch (what) {
    case CL_DEVICE_NAME:
        return FAKE.name;
    case CL_DEVICE_PROFILE:
        return FAKE.profile;
    case CL_DEVICE_OPENCL_C_VERSION:
        return FAKE.c_version;
    default:
        return NULL;
    }
}

/* Whether the answer to a question about an ability is no. */
static bool is_denied(cl_device_info what) {
    return (what == CL_DEVICE_AVAILABLE && FAKE.unavailable) ||
           (what == CL_DEVICE_COMPILER_AVAILABLE && FAKE.no_compiler) ||
           (what == CL_DEVICE_ENDIAN_LITTLE && FAKE.big_endian);
}

static cl_int CL_API_CALL get_device_info(cl_device_id device, cl_device_info what, size_t size,
                                          void *value, size_t *bytes) {
    const cl_bool no = CL_FALSE;
    if (fake_text(what))
        return give(fake_text(what), strlen(fake_text(what)) + 1, size, value, bytes);
    if (is_denied(what))
        return GIVE(no);
    if (what == CL_DEVICE_TYPE && FAKE.type)
        return GIVE(FAKE.type);
    if (what == CL_DEVICE_VENDOR_ID && FAKE.vendor)
        return GIVE(FAKE.vendor);
    if (what == CL_DEVICE_MAX_WORK_GROUP_SIZE && FAKE.max_group)
        return GIVE(FAKE.max_group);
    if (what == CL_DEVICE_MAX_WORK_ITEM_SIZES && FAKE.max_items[0])
        return GIVE(FAKE.max_items);
    if (what == CL_DEVICE_LOCAL_MEM_SIZE && FAKE.local_mem)
        return GIVE(FAKE.local_mem);
    if (what == CL_DEVICE_MAX_MEM_ALLOC_SIZE && FAKE.max_buffer)
        return GIVE(FAKE.max_buffer);
    return next->clGetDeviceInfo(device, what, size, value, bytes);
}

/* Work-items that a group of the kernel may have. */
static size_t most_items(cl_kernel kernel) {
    char name[128] = "";
    next->clGetKernelInfo(kernel, CL_KERNEL_FUNCTION_NAME, sizeof name, name, NULL);
    if (FAKE.kernel_group && strncmp(name, FAKE.kernel, strlen(FAKE.kernel)) == 0)
        return FAKE.kernel_group;
    return FAKE.max_group ? FAKE.max_group : SIZE_MAX;
}

static cl_int CL_API_CALL get_kernel_group_info(cl_kernel kernel, cl_device_id device,
                                                cl_kernel_work_group_info what, size_t size,
                                                void *value, size_t *bytes) {
    const size_t most = most_items(kernel);
    if (what == CL_KERNEL_WORK_GROUP_SIZE && most != SIZE_MAX)
        return GIVE(most);
    return next->clGetKernelWorkGroupInfo(kernel, device, what, size, value, bytes);
}

/* ---- Refusals -------------------------------------------------------------------------------- */

static cl_int refuse(cl_int code) {
    FAKE.refused++;
    return code;
}

static cl_mem CL_API_CALL create_buffer(cl_context context, cl_mem_flags flags, size_t bytes,
                                        void *host, cl_int *code_ret) {
    if (!FAKE.max_buffer || bytes <= FAKE.max_buffer)
        return next->clCreateBuffer(context, flags, bytes, host, code_ret);
    if (code_ret)
        *code_ret = refuse(CL_INVALID_BUFFER_SIZE);
    return NULL;
}

/* The options without FAKE.build_option. */
static char *known_options(const char *options) {
    char *known = strdup(options ? options : "");
    char *at = known && FAKE.build_option ? strstr(known, FAKE.build_option) : NULL;
    if (at) {
        memset(at, ' ', strlen(FAKE.build_option));
        FAKE.option_builds++;
    }
    return known;
}

static cl_int CL_API_CALL build_program(cl_program program, cl_uint count,
                                        const cl_device_id *devices, const char *options,
                                        void(CL_CALLBACK *notify)(cl_program, void *), void *user) {
    char *known = known_options(options);
    const cl_int code = known ? next->clBuildProgram(program, count, devices, known, notify, user)
                              : CL_OUT_OF_HOST_MEMORY;
    free(known);
    return code;
}

static cl_int check_launch(cl_command_queue queue, cl_kernel kernel, cl_uint dims,
                           const size_t *local) {
    cl_device_id device = NULL;
    cl_ulong local_mem = 0;
    size_t items = 1;
    for (cl_uint i = 0; i < dims; i++) {
        items *= local[i];
        if (FAKE.max_items[i] && local[i] > FAKE.max_items[i])
            return refuse(CL_INVALID_WORK_ITEM_SIZE);
    }
    if (items > most_items(kernel))
        return refuse(CL_INVALID_WORK_GROUP_SIZE);
    next->clGetCommandQueueInfo(queue, CL_QUEUE_DEVICE, sizeof device, (void *)&device, NULL);
    next->clGetKernelWorkGroupInfo(kernel, device, CL_KERNEL_LOCAL_MEM_SIZE, sizeof local_mem,
                                   &local_mem, NULL);
    if (FAKE.local_mem && local_mem > FAKE.local_mem)
        return refuse(CL_OUT_OF_RESOURCES);
    return CL_SUCCESS;
}

static cl_int CL_API_CALL enqueue_kernel(cl_command_queue queue, cl_kernel kernel, cl_uint dims,
                                         const size_t *offset, const size_t *global,
                                         const size_t *local, cl_uint num_wait,
                                         const cl_event *wait, cl_event *event) {
    size_t groups = 1;
    const cl_int code = local ? check_launch(queue, kernel, dims, local) : CL_SUCCESS;
    if (code != CL_SUCCESS)
        return code;
    for (cl_uint i = 0; i < dims && local; i++)
        groups *= global[i] / local[i];
    FAKE.launches++;
    FAKE.largest_launch = groups > FAKE.largest_launch ? groups : FAKE.largest_launch;
    return next->clEnqueueNDRangeKernel(queue, kernel, dims, offset, global, local, num_wait, wait,
                                        event);
}

/* ---- The loader's side ----------------------------------------------------------------------- */

CL_API_ENTRY cl_int CL_API_CALL clGetLayerInfo(cl_layer_info name, size_t size, void *value,
                                               size_t *bytes) {
    const cl_layer_api_version version = CL_LAYER_API_VERSION_100;
    static const char layer_name[] = "clmoe's other device";
    if (name == CL_LAYER_API_VERSION)
        return GIVE(version);
    return name == CL_LAYER_NAME ? GIVE(layer_name) : CL_INVALID_VALUE;
}

CL_API_ENTRY cl_int CL_API_CALL clInitLayer(cl_uint num_entries, const cl_icd_dispatch *target,
                                            cl_uint *num_entries_ret,
                                            const cl_icd_dispatch **table_ret) {
    const cl_uint known = sizeof table / sizeof table.clGetPlatformIDs;
    if (!target || !num_entries_ret || !table_ret || num_entries < known)
        return CL_INVALID_VALUE;
    next = target;
    FAKE.loaded = true;
    table = *target;
    table.clGetDeviceInfo = get_device_info;
    table.clGetKernelWorkGroupInfo = get_kernel_group_info;
    table.clCreateBuffer = create_buffer;
    table.clBuildProgram = build_program;
    table.clEnqueueNDRangeKernel = enqueue_kernel;
    *num_entries_ret = known;
    *table_ret = &table;
    return CL_SUCCESS;
}
