/* The layer's calls: each either fails or goes on to the driver. */
#include "layer.h"

#include <CL/cl_icd.h>
#include <CL/cl_layer.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Signatures are OpenCL's, with the names shortened. */
#define WAIT_PARAMETERS cl_uint num_wait, const cl_event *wait, cl_event *event
#define WAIT_ARGUMENTS  num_wait, wait, event

static const cl_icd_dispatch *next;
static atomic_uint calls, failing_call;
static atomic_int failing_code;
static atomic_bool lasting;
static atomic_long live;
static _Atomic(const char *) failed = "";
static atomic_uint heavy_calls;
static _Atomic(const char *) heavy = "";

/* ---- Faults --------------------------------------------------------------------------------- */

/* What a call that only enqueues kernels does not make. */
static bool is_heavy(const char *name) {
    static const char *const others[] = {"clBuildProgram", "clFinish", "clWaitForEvents",
                                         "clEnqueueReadBuffer", "clEnqueueWriteBuffer"};
    if (strncmp(name, "clCreate", strlen("clCreate")) == 0)
        return true;
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++)
        if (strcmp(name, others[i]) == 0)
            return true;
    return false;
}

/* The code this call is to return instead of being made; CL_SUCCESS: none. */
static cl_int fault(const char *name) {
    unsigned call = atomic_fetch_add(&calls, 1) + 1, nth = atomic_load(&failing_call);
    if (is_heavy(name)) {
        atomic_fetch_add(&heavy_calls, 1);
        atomic_store(&heavy, name);
    }
    if (nth == 0 || call < nth || (call > nth && !atomic_load(&lasting)))
        return CL_SUCCESS;
    if (call == nth)
        atomic_store(&failed, name);
    return atomic_load(&failing_code);
}

static void set_code(cl_int *to, cl_int code) {
    if (to)
        *to = code;
}

/* A call that returns a code. */
#define PASS(name, parameters, arguments)                                                          \
    static cl_int CL_API_CALL layer_##name parameters {                                            \
        cl_int code = fault(#name);                                                                \
        return code == CL_SUCCESS ? next->name arguments : code;                                   \
    }

/* A call that returns a new object and a code in *code_ret. */
#define CREATE(name, type, parameters, arguments)                                                  \
    static type CL_API_CALL layer_##name parameters {                                              \
        cl_int code = fault(#name);                                                                \
        if (code != CL_SUCCESS) {                                                                  \
            set_code(code_ret, code);                                                              \
            return NULL;                                                                           \
        }                                                                                          \
        type object = next->name arguments;                                                        \
        live += object != NULL;                                                                    \
        return object;                                                                             \
    }

/* A command, which may make an event. */
#define ENQUEUE(name, parameters, arguments)                                                       \
    static cl_int CL_API_CALL layer_##name parameters {                                            \
        cl_int code = fault(#name);                                                                \
        if (code == CL_SUCCESS)                                                                    \
            code = next->name arguments;                                                           \
        live += code == CL_SUCCESS && event != NULL;                                               \
        return code;                                                                               \
    }

/* References: releases never fail, or there would be nothing to count. */
#define COUNT_REFERENCES(retain, release, type)                                                    \
    static cl_int CL_API_CALL layer_##retain(type object) {                                        \
        cl_int code = next->retain(object);                                                        \
        live += code == CL_SUCCESS;                                                                \
        return code;                                                                               \
    }                                                                                              \
    static cl_int CL_API_CALL layer_##release(type object) {                                       \
        cl_int code = next->release(object);                                                       \
        live -= code == CL_SUCCESS;                                                                \
        return code;                                                                               \
    }

/* ---- Calls ---------------------------------------------------------------------------------- */

#define INFO_PARAMETERS(type, info) type object, info name, size_t size, void *value, size_t *bytes
#define INFO_ARGUMENTS              object, name, size, value, bytes

PASS(clGetPlatformInfo, (INFO_PARAMETERS(cl_platform_id, cl_platform_info)), (INFO_ARGUMENTS))
PASS(clGetDeviceInfo, (INFO_PARAMETERS(cl_device_id, cl_device_info)), (INFO_ARGUMENTS))
PASS(clGetContextInfo, (INFO_PARAMETERS(cl_context, cl_context_info)), (INFO_ARGUMENTS))
PASS(clGetCommandQueueInfo, (INFO_PARAMETERS(cl_command_queue, cl_command_queue_info)),
     (INFO_ARGUMENTS))
PASS(clGetMemObjectInfo, (INFO_PARAMETERS(cl_mem, cl_mem_info)), (INFO_ARGUMENTS))
PASS(clGetProgramInfo, (INFO_PARAMETERS(cl_program, cl_program_info)), (INFO_ARGUMENTS))
PASS(clGetProgramBuildInfo,
     (cl_program program, cl_device_id device, cl_program_build_info name, size_t size, void *value,
      size_t *bytes),
     (program, device, name, size, value, bytes))
PASS(clGetKernelInfo, (INFO_PARAMETERS(cl_kernel, cl_kernel_info)), (INFO_ARGUMENTS))
PASS(clGetKernelWorkGroupInfo,
     (cl_kernel kernel, cl_device_id device, cl_kernel_work_group_info name, size_t size,
      void *value, size_t *bytes),
     (kernel, device, name, size, value, bytes))
PASS(clGetEventInfo, (INFO_PARAMETERS(cl_event, cl_event_info)), (INFO_ARGUMENTS))
PASS(clGetEventProfilingInfo, (INFO_PARAMETERS(cl_event, cl_profiling_info)), (INFO_ARGUMENTS))

CREATE(clCreateContext, cl_context,
       (const cl_context_properties *properties, cl_uint count, const cl_device_id *devices,
        void(CL_CALLBACK *notify)(const char *, const void *, size_t, void *), void *user,
        cl_int *code_ret),
       (properties, count, devices, notify, user, code_ret))
CREATE(clCreateCommandQueue, cl_command_queue,
       (cl_context context, cl_device_id device, cl_command_queue_properties properties,
        cl_int *code_ret),
       (context, device, properties, code_ret))
CREATE(clCreateBuffer, cl_mem,
       (cl_context context, cl_mem_flags flags, size_t bytes, void *host, cl_int *code_ret),
       (context, flags, bytes, host, code_ret))
CREATE(clCreateSubBuffer, cl_mem,
       (cl_mem buffer, cl_mem_flags flags, cl_buffer_create_type type, const void *info,
        cl_int *code_ret),
       (buffer, flags, type, info, code_ret))
CREATE(clCreateProgramWithSource, cl_program,
       (cl_context context, cl_uint count, const char **strings, const size_t *lengths,
        cl_int *code_ret),
       (context, count, strings, lengths, code_ret))
CREATE(clCreateProgramWithBinary, cl_program,
       (cl_context context, cl_uint count, const cl_device_id *devices, const size_t *lengths,
        const unsigned char **binaries, cl_int *states, cl_int *code_ret),
       (context, count, devices, lengths, binaries, states, code_ret))
CREATE(clCreateKernel, cl_kernel, (cl_program program, const char *name, cl_int *code_ret),
       (program, name, code_ret))
CREATE(clCreateUserEvent, cl_event, (cl_context context, cl_int *code_ret), (context, code_ret))

PASS(clBuildProgram,
     (cl_program program, cl_uint count, const cl_device_id *devices, const char *options,
      void(CL_CALLBACK *notify)(cl_program, void *), void *user),
     (program, count, devices, options, notify, user))
PASS(clSetKernelArg, (cl_kernel kernel, cl_uint index, size_t size, const void *value),
     (kernel, index, size, value))
PASS(clFlush, (cl_command_queue queue), (queue))
PASS(clFinish, (cl_command_queue queue), (queue))
PASS(clWaitForEvents, (cl_uint count, const cl_event *events), (count, events))

ENQUEUE(clEnqueueNDRangeKernel,
        (cl_command_queue queue, cl_kernel kernel, cl_uint dims, const size_t *offset,
         const size_t *global, const size_t *local, WAIT_PARAMETERS),
        (queue, kernel, dims, offset, global, local, WAIT_ARGUMENTS))
ENQUEUE(clEnqueueReadBuffer,
        (cl_command_queue queue, cl_mem buffer, cl_bool blocks, size_t offset, size_t bytes,
         void *to, WAIT_PARAMETERS),
        (queue, buffer, blocks, offset, bytes, to, WAIT_ARGUMENTS))
ENQUEUE(clEnqueueWriteBuffer,
        (cl_command_queue queue, cl_mem buffer, cl_bool blocks, size_t offset, size_t bytes,
         const void *from, WAIT_PARAMETERS),
        (queue, buffer, blocks, offset, bytes, from, WAIT_ARGUMENTS))
ENQUEUE(clEnqueueCopyBuffer,
        (cl_command_queue queue, cl_mem from, cl_mem to, size_t from_offset, size_t to_offset,
         size_t bytes, WAIT_PARAMETERS),
        (queue, from, to, from_offset, to_offset, bytes, WAIT_ARGUMENTS))
ENQUEUE(clEnqueueFillBuffer,
        (cl_command_queue queue, cl_mem buffer, const void *pattern, size_t pattern_bytes,
         size_t offset, size_t bytes, WAIT_PARAMETERS),
        (queue, buffer, pattern, pattern_bytes, offset, bytes, WAIT_ARGUMENTS))
ENQUEUE(clEnqueueMarkerWithWaitList, (cl_command_queue queue, WAIT_PARAMETERS),
        (queue, WAIT_ARGUMENTS))
ENQUEUE(clEnqueueBarrierWithWaitList, (cl_command_queue queue, WAIT_PARAMETERS),
        (queue, WAIT_ARGUMENTS))

COUNT_REFERENCES(clRetainCommandQueue, clReleaseCommandQueue, cl_command_queue)
COUNT_REFERENCES(clRetainMemObject, clReleaseMemObject, cl_mem)
COUNT_REFERENCES(clRetainProgram, clReleaseProgram, cl_program)
COUNT_REFERENCES(clRetainKernel, clReleaseKernel, cl_kernel)
COUNT_REFERENCES(clRetainEvent, clReleaseEvent, cl_event)

/* The one retain the library makes: it must see it fail. */
static cl_int CL_API_CALL layer_clRetainContext(cl_context context) {
    cl_int code = fault("clRetainContext");
    if (code == CL_SUCCESS)
        code = next->clRetainContext(context);
    live += code == CL_SUCCESS;
    return code;
}

static cl_int CL_API_CALL layer_clReleaseContext(cl_context context) {
    cl_int code = next->clReleaseContext(context);
    live -= code == CL_SUCCESS;
    return code;
}

/* ---- The loader's side ---------------------------------------------------------------------- */

static cl_icd_dispatch table;

#define PUT(name) table.name = layer_##name

static void put_queries(void) {
    PUT(clGetPlatformInfo);
    PUT(clGetDeviceInfo);
    PUT(clGetContextInfo);
    PUT(clGetCommandQueueInfo);
    PUT(clGetMemObjectInfo);
    PUT(clGetProgramInfo);
    PUT(clGetProgramBuildInfo);
    PUT(clGetKernelInfo);
    PUT(clGetKernelWorkGroupInfo);
    PUT(clGetEventInfo);
    PUT(clGetEventProfilingInfo);
}

static void put_objects(void) {
    PUT(clCreateContext);
    PUT(clRetainContext);
    PUT(clReleaseContext);
    PUT(clCreateCommandQueue);
    PUT(clRetainCommandQueue);
    PUT(clReleaseCommandQueue);
    PUT(clCreateBuffer);
    PUT(clCreateSubBuffer);
    PUT(clRetainMemObject);
    PUT(clReleaseMemObject);
    PUT(clCreateProgramWithSource);
    PUT(clCreateProgramWithBinary);
    PUT(clRetainProgram);
    PUT(clReleaseProgram);
    PUT(clCreateKernel);
    PUT(clRetainKernel);
    PUT(clReleaseKernel);
    PUT(clCreateUserEvent);
    PUT(clRetainEvent);
    PUT(clReleaseEvent);
}

static void put_commands(void) {
    PUT(clBuildProgram);
    PUT(clSetKernelArg);
    PUT(clFlush);
    PUT(clFinish);
    PUT(clWaitForEvents);
    PUT(clEnqueueNDRangeKernel);
    PUT(clEnqueueReadBuffer);
    PUT(clEnqueueWriteBuffer);
    PUT(clEnqueueCopyBuffer);
    PUT(clEnqueueFillBuffer);
    PUT(clEnqueueMarkerWithWaitList);
    PUT(clEnqueueBarrierWithWaitList);
}

CL_API_ENTRY cl_int CL_API_CALL clGetLayerInfo(cl_layer_info name, size_t size, void *value,
                                               size_t *bytes) {
    const cl_layer_api_version version = CL_LAYER_API_VERSION_100;
    static const char layer_name[] = "clmoe faults";
    const void *from = name == CL_LAYER_API_VERSION ? (const void *)&version : layer_name;
    size_t need = name == CL_LAYER_API_VERSION ? sizeof version : sizeof layer_name;
    if (name != CL_LAYER_API_VERSION && name != CL_LAYER_NAME)
        return CL_INVALID_VALUE;
    if (value && size < need)
        return CL_INVALID_VALUE;
    if (value)
        memcpy(value, from, need);
    if (bytes)
        *bytes = need;
    return CL_SUCCESS;
}

static void arm(unsigned nth, cl_int code, bool lasts);

/* For a program that knows nothing of the layer. */
static void arm_by_environment(void) {
    const char *call = getenv("CLMOE_FAULT_CALL"), *lasts = getenv("CLMOE_FAULT_LASTING");
    if (call)
        arm((unsigned)atoi(call), CL_OUT_OF_RESOURCES, lasts && atoi(lasts) != 0);
}

CL_API_ENTRY cl_int CL_API_CALL clInitLayer(cl_uint num_entries, const cl_icd_dispatch *target,
                                            cl_uint *num_entries_ret,
                                            const cl_icd_dispatch **table_ret) {
    const cl_uint known = sizeof table / sizeof table.clGetPlatformIDs;
    if (!target || !num_entries_ret || !table_ret || num_entries < known)
        return CL_INVALID_VALUE;
    next = target;
    table = *target;
    put_queries();
    put_objects();
    put_commands();
    arm_by_environment();
    *num_entries_ret = known;
    *table_ret = &table;
    return CL_SUCCESS;
}

/* ---- The test's side ------------------------------------------------------------------------ */

static void arm(unsigned nth, cl_int code, bool lasts) {
    atomic_store(&failing_call, nth);
    atomic_store(&failing_code, code);
    atomic_store(&lasting, lasts);
    atomic_store(&calls, 0);
    atomic_store(&heavy_calls, 0);
    atomic_store(&failed, "");
}

static unsigned count_calls(void) {
    return atomic_load(&calls);
}

static const char *failed_call(void) {
    return atomic_load(&failed);
}

static unsigned count_heavy(void) {
    return atomic_load(&heavy_calls);
}

static const char *last_heavy(void) {
    return atomic_load(&heavy);
}

static long live_objects(void) {
    return atomic_load(&live);
}

static bool is_loaded(void) {
    return next != NULL;
}

CL_API_ENTRY const fault_layer clmoe_fault_layer = {
    arm, count_calls, failed_call, count_heavy, last_heavy, live_objects, is_loaded};
