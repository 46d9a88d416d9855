/* The device's objects and calls; see device.h. */
#include "device.h"

#include <CL/cl_ext.h>
#include <CL/cl_icd.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static cl_icd_dispatch table;

/* What every object begins with. Counts take no lock, which could hide a race of the library's. */
typedef struct object_head {
    const cl_icd_dispatch *dispatch;
    atomic_int references;
} object_head;

struct _cl_platform_id {
    object_head head;
};

struct _cl_device_id {
    object_head head;
};

struct _cl_context {
    object_head head;
};

struct _cl_command_queue {
    object_head head;
    cl_context context;
    cl_command_queue_properties properties;
};

struct _cl_mem {
    object_head head;
    cl_context context;
    cl_mem_flags flags;
    size_t bytes;
    char *host;
};

struct _cl_program {
    object_head head;
    cl_context context;
    native_program *native;
    char *text; /* the binary behind its mark: a line of the target, if NVIDIA's, and the source */
    char *source; /* in the text */
    bool loaded;  /* from a binary */
    int bf16;     /* of the probes of tensor cores */
    char log[4096];
};

struct _cl_kernel {
    object_head head;
    cl_program program;
    char name[64];
    char values[MAX_ARGUMENTS][MAX_ARGUMENT];
};

struct _cl_event {
    object_head head;
    cl_command_queue queue;
};

static struct _cl_platform_id platform = {{&table, 1}};
static struct _cl_device_id device = {{&table, 1}};

static void *make(size_t bytes, cl_int *code_ret) {
    object_head *made = calloc(1, bytes);
    if (made) {
        made->dispatch = &table;
        atomic_init(&made->references, 1);
    }
    if (code_ret)
        *code_ret = made ? CL_SUCCESS : CL_OUT_OF_HOST_MEMORY;
    return made;
}

/* Retain and release of a type; `destroy` frees what the object holds. */
#define REFERENCES(type, retain, release, destroy)                                                 \
    static cl_int CL_API_CALL retain(type object) {                                                \
        atomic_fetch_add_explicit(&object->head.references, 1, memory_order_relaxed);              \
        return CL_SUCCESS;                                                                         \
    }                                                                                              \
    static cl_int CL_API_CALL release(type object) {                                               \
        if (atomic_fetch_sub(&object->head.references, 1) == 1) {                                  \
            destroy(object);                                                                       \
            free(object);                                                                          \
        }                                                                                          \
        return CL_SUCCESS;                                                                         \
    }

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

static cl_int give_text(const char *text, size_t size, void *value, size_t *bytes) {
    return give(text, strlen(text) + 1, size, value, bytes);
}

/* ---- Platform and device -------------------------------------------------------------------- */

static cl_int CL_API_CALL get_platforms(cl_uint room, cl_platform_id *platforms, cl_uint *count) {
    if (platforms && room > 0)
        platforms[0] = &platform;
    if (count)
        *count = 1;
    return CL_SUCCESS;
}

static cl_int CL_API_CALL platform_info(cl_platform_id of, cl_platform_info name, size_t size,
                                        void *value, size_t *bytes) {
    (void)of;
    switch (name) {
    case CL_PLATFORM_PROFILE:
        return give_text("FULL_PROFILE", size, value, bytes);
    case CL_PLATFORM_VERSION:
        return give_text("OpenCL 1.2 clmoe", size, value, bytes);
    case CL_PLATFORM_NAME:
    case CL_PLATFORM_VENDOR:
        return give_text("clmoe test device", size, value, bytes);
    case CL_PLATFORM_EXTENSIONS:
        return give_text("cl_khr_icd", size, value, bytes);
    case CL_PLATFORM_ICD_SUFFIX_KHR:
        return give_text("CLMOE", size, value, bytes);
    default:
        return CL_INVALID_VALUE;
    }
}

static cl_int CL_API_CALL get_devices(cl_platform_id of, cl_device_type type, cl_uint room,
                                      cl_device_id *devices, cl_uint *count) {
    (void)of;
    (void)type;
    if (devices && room > 0)
        devices[0] = &device;
    if (count)
        *count = 1;
    return CL_SUCCESS;
}

static cl_device_type device_type(void) {
    const char *type = getenv("CLMOE_NATIVE_TYPE");
    return type && strcmp(type, "gpu") == 0 ? CL_DEVICE_TYPE_GPU : CL_DEVICE_TYPE_CPU;
}

static cl_int device_number(cl_device_info name, size_t size, void *value, size_t *bytes) {
    const cl_ulong local = 48 << 10, memory = (cl_ulong)1 << 46;
    const size_t group = 1024, items[] = {1024, 1024, 64};
    const cl_uint major = (cl_uint)nvidia_major(), minor = 0, vendor = major ? 0x10DE : 0;
    const cl_uint vector = 8, units = 2, align = 1024;
    const cl_bool yes = CL_TRUE;
    const cl_device_type type = device_type();
    const cl_command_queue_properties queue =
        CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE | CL_QUEUE_PROFILING_ENABLE;
    const cl_platform_id of = &platform;
    switch (name) {
    case CL_DEVICE_VENDOR_ID:
        return GIVE(vendor);
    case CL_DEVICE_COMPUTE_CAPABILITY_MAJOR_NV:
        return GIVE(major);
    case CL_DEVICE_COMPUTE_CAPABILITY_MINOR_NV:
        return GIVE(minor);
    case CL_DEVICE_TYPE:
        return GIVE(type);
    case CL_DEVICE_AVAILABLE:
    case CL_DEVICE_COMPILER_AVAILABLE:
    case CL_DEVICE_ENDIAN_LITTLE:
        return GIVE(yes);
    case CL_DEVICE_LOCAL_MEM_SIZE:
        return GIVE(local);
    case CL_DEVICE_GLOBAL_MEM_SIZE:
    case CL_DEVICE_MAX_MEM_ALLOC_SIZE:
        return GIVE(memory);
    case CL_DEVICE_MAX_WORK_GROUP_SIZE:
        return GIVE(group);
    case CL_DEVICE_MAX_WORK_ITEM_SIZES:
        return GIVE(items);
    case CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT:
    case CL_DEVICE_PREFERRED_VECTOR_WIDTH_FLOAT:
        return GIVE(vector);
    case CL_DEVICE_MAX_COMPUTE_UNITS:
        return GIVE(units);
    case CL_DEVICE_MEM_BASE_ADDR_ALIGN:
        return GIVE(align);
    case CL_DEVICE_QUEUE_PROPERTIES:
        return GIVE(queue);
    case CL_DEVICE_PLATFORM:
        return GIVE(of);
    default:
        return CL_INVALID_VALUE;
    }
}

static cl_int CL_API_CALL device_info(cl_device_id of, cl_device_info name, size_t size,
                                      void *value, size_t *bytes) {
    (void)of;
    switch (name) {
    case CL_DEVICE_NAME:
    case CL_DEVICE_VENDOR:
        return give_text("clmoe native code", size, value, bytes);
    case CL_DEVICE_VERSION:
        return give_text("OpenCL 1.2 clmoe", size, value, bytes);
    case CL_DEVICE_OPENCL_C_VERSION:
        return give_text("OpenCL C 1.2 clmoe", size, value, bytes);
    case CL_DRIVER_VERSION:
        return give_text("1", size, value, bytes);
    case CL_DEVICE_PROFILE:
        return give_text("FULL_PROFILE", size, value, bytes);
    case CL_DEVICE_EXTENSIONS:
        return give_text(nvidia_major() ? "cl_nv_device_attribute_query" : "", size, value, bytes);
    default:
        return device_number(name, size, value, bytes);
    }
}

/* ---- Context and queue ---------------------------------------------------------------------- */

static cl_context CL_API_CALL create_context(const cl_context_properties *properties, cl_uint count,
                                             const cl_device_id *devices,
                                             void(CL_CALLBACK *notify)(const char *, const void *,
                                                                       size_t, void *),
                                             void *user, cl_int *code_ret) {
    (void)properties;
    (void)count;
    (void)devices;
    (void)notify;
    (void)user;
    return make(sizeof(struct _cl_context), code_ret);
}

static void destroy_context(cl_context context) {
    (void)context;
}

REFERENCES(cl_context, retain_context, release_context, destroy_context)

static cl_int CL_API_CALL context_info(cl_context context, cl_context_info name, size_t size,
                                       void *value, size_t *bytes) {
    const cl_device_id only = &device;
    const cl_uint one = 1;
    (void)context;
    if (name == CL_CONTEXT_DEVICES)
        return GIVE(only);
    return name == CL_CONTEXT_NUM_DEVICES ? GIVE(one) : CL_INVALID_VALUE;
}

static cl_command_queue CL_API_CALL create_queue(cl_context context, cl_device_id on,
                                                 cl_command_queue_properties properties,
                                                 cl_int *code_ret) {
    cl_command_queue queue = make(sizeof *queue, code_ret);
    (void)on;
    if (queue) {
        queue->context = context;
        queue->properties = properties;
        retain_context(context);
    }
    return queue;
}

static void destroy_queue(cl_command_queue queue) {
    release_context(queue->context);
}

REFERENCES(cl_command_queue, retain_queue, release_queue, destroy_queue)

static cl_int CL_API_CALL queue_info(cl_command_queue queue, cl_command_queue_info name,
                                     size_t size, void *value, size_t *bytes) {
    const cl_device_id on = &device;
    if (name == CL_QUEUE_CONTEXT)
        return GIVE(queue->context);
    if (name == CL_QUEUE_DEVICE)
        return GIVE(on);
    return name == CL_QUEUE_PROPERTIES ? GIVE(queue->properties) : CL_INVALID_VALUE;
}

static cl_int CL_API_CALL flush_queue(cl_command_queue queue) {
    (void)queue;
    return CL_SUCCESS;
}

/* ---- Buffers -------------------------------------------------------------------------------- */

static cl_mem CL_API_CALL create_buffer(cl_context context, cl_mem_flags flags, size_t bytes,
                                        void *host, cl_int *code_ret) {
    enum { JUNK = 0xCB };
    cl_mem buffer = make(sizeof *buffer, code_ret);
    if (!buffer)
        return NULL;
    /* A block of its own and of no byte more, for AddressSanitizer. */
    buffer->host = malloc(bytes);
    if (!buffer->host) {
        free(buffer);
        if (code_ret)
            *code_ret = CL_MEM_OBJECT_ALLOCATION_FAILURE;
        return NULL;
    }
    if (flags & (CL_MEM_COPY_HOST_PTR | CL_MEM_USE_HOST_PTR))
        memcpy(buffer->host, host, bytes);
    else if (getenv("CLMOE_NATIVE_RUN"))
        memset(buffer->host, JUNK, bytes);
    buffer->flags = flags;
    buffer->bytes = bytes;
    buffer->context = context;
    retain_context(context);
    return buffer;
}

static void destroy_buffer(cl_mem buffer) {
    release_context(buffer->context);
    free(buffer->host);
}

REFERENCES(cl_mem, retain_buffer, release_buffer, destroy_buffer)

static cl_int CL_API_CALL buffer_info(cl_mem buffer, cl_mem_info name, size_t size, void *value,
                                      size_t *bytes) {
    const cl_mem_object_type type = CL_MEM_OBJECT_BUFFER;
    const cl_mem parent = NULL;
    switch (name) {
    case CL_MEM_SIZE:
        return GIVE(buffer->bytes);
    case CL_MEM_CONTEXT:
        return GIVE(buffer->context);
    case CL_MEM_TYPE:
        return GIVE(type);
    case CL_MEM_FLAGS:
        return GIVE(buffer->flags);
    case CL_MEM_ASSOCIATED_MEMOBJECT:
        return GIVE(parent);
    default:
        return CL_INVALID_VALUE;
    }
}

/* ---- Programs and kernels ------------------------------------------------------------------- */

/* The program of a text, which is its own. */
static cl_program program_of(cl_context context, char *text, bool loaded, cl_int *code_ret) {
    cl_program program = make(sizeof *program, code_ret);
    if (!program)
        return NULL;
    program->context = context;
    retain_context(context);
    program->text = text;
    program->source = text + nvidia_head(text);
    program->loaded = loaded;
    return program;
}

static cl_program CL_API_CALL create_program(cl_context context, cl_uint count,
                                             const char **strings, const size_t *lengths,
                                             cl_int *code_ret) {
    const char *line = nvidia_target();
    const size_t bytes = strlen(line) + strlen(strings[0]) + 1;
    char *text = count == 1 ? malloc(bytes) : NULL;
    (void)lengths;
    if (!text)
        return NULL;
    snprintf(text, bytes, "%s%s", line, strings[0]);
    return program_of(context, text, false, code_ret);
}

static void destroy_program(cl_program program) {
    release_context(program->context);
    native_free(program->native);
    free(program->text);
}

REFERENCES(cl_program, retain_program, release_program, destroy_program)

static cl_int CL_API_CALL build_program(cl_program program, cl_uint count,
                                        const cl_device_id *devices, const char *options,
                                        void(CL_CALLBACK *notify)(cl_program, void *), void *user) {
    (void)count;
    (void)devices;
    (void)notify;
    (void)user;
    program->bf16 = strstr(options, "-DX=bf16") != NULL;
    program->native =
        native_build(program->source, options, program->loaded, program->log, sizeof program->log);
    return program->native ? CL_SUCCESS : CL_BUILD_PROGRAM_FAILURE;
}

static cl_int CL_API_CALL build_info(cl_program program, cl_device_id on,
                                     cl_program_build_info name, size_t size, void *value,
                                     size_t *bytes) {
    (void)on;
    return name == CL_PROGRAM_BUILD_LOG ? give_text(program->log, size, value, bytes)
                                        : CL_INVALID_VALUE;
}

/* A program's binary is this and its text. */
static const char binary_mark[] = "clmoe native code\n";
enum { MARK = sizeof binary_mark - 1 };

static void write_binary(cl_program program, char *binary) {
    memcpy(binary, binary_mark, MARK);
    memcpy(binary + MARK, program->text, strlen(program->text));
}

static cl_int CL_API_CALL program_info(cl_program program, cl_program_info name, size_t size,
                                       void *value, size_t *bytes) {
    const size_t length = MARK + strlen(program->text);
    switch (name) {
    case CL_PROGRAM_SOURCE:
        return give_text(program->loaded ? "" : program->source, size, value, bytes);
    case CL_PROGRAM_BINARY_SIZES:
        return GIVE(length);
    case CL_PROGRAM_BINARIES:
        if (value && size >= sizeof(char *))
            write_binary(program, *(char **)value);
        if (bytes)
            *bytes = sizeof(char *);
        return CL_SUCCESS;
    default:
        return CL_INVALID_VALUE;
    }
}

static cl_program CL_API_CALL create_from_binary(cl_context context, cl_uint count,
                                                 const cl_device_id *devices, const size_t *lengths,
                                                 const unsigned char **binaries, cl_int *states,
                                                 cl_int *code_ret) {
    const char *binary = (const char *)binaries[0];
    const bool right = count == 1 && lengths[0] >= MARK && memcmp(binary, binary_mark, MARK) == 0;
    (void)devices;
    if (states)
        states[0] = right ? CL_SUCCESS : CL_INVALID_BINARY;
    if (!right) {
        if (code_ret)
            *code_ret = CL_INVALID_BINARY;
        return NULL;
    }
    return program_of(context, strndup(binary + MARK, lengths[0] - MARK), true, code_ret);
}

static cl_kernel CL_API_CALL create_kernel(cl_program program, const char *name, cl_int *code_ret) {
    if (!native_has_kernel(program->native, name)) {
        if (code_ret)
            *code_ret = CL_INVALID_KERNEL_NAME;
        return NULL;
    }
    cl_kernel kernel = make(sizeof *kernel, code_ret);
    if (!kernel)
        return NULL;
    kernel->program = program;
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    retain_program(program);
    return kernel;
}

static void destroy_kernel(cl_kernel kernel) {
    release_program(kernel->program);
}

REFERENCES(cl_kernel, retain_kernel, release_kernel, destroy_kernel)

static cl_int CL_API_CALL kernel_info(cl_kernel kernel, cl_kernel_info name, size_t size,
                                      void *value, size_t *bytes) {
    return name == CL_KERNEL_PROGRAM ? GIVE(kernel->program) : CL_INVALID_VALUE;
}

/* Kernels take any group and no local memory of the device's. */
static cl_int CL_API_CALL kernel_group_info(cl_kernel kernel, cl_device_id of,
                                            cl_kernel_work_group_info name, size_t size,
                                            void *value, size_t *bytes) {
    const size_t most = 1024, compiled[3] = {0};
    const cl_ulong local = 0;
    (void)kernel;
    (void)of;
    switch (name) {
    case CL_KERNEL_WORK_GROUP_SIZE:
        return GIVE(most);
    case CL_KERNEL_COMPILE_WORK_GROUP_SIZE:
        return GIVE(compiled);
    case CL_KERNEL_LOCAL_MEM_SIZE:
        return GIVE(local);
    default:
        return CL_INVALID_VALUE;
    }
}

/* A buffer's value is the place of its bytes. */
static cl_int CL_API_CALL set_argument(cl_kernel kernel, cl_uint index, size_t size,
                                       const void *value) {
    static const char none[sizeof(void *)];
    if (index >= MAX_ARGUMENTS || size > MAX_ARGUMENT)
        return CL_INVALID_ARG_INDEX;
    memcpy(kernel->values[index], value ? value : none, value ? size : sizeof none);
    if (value && size == sizeof(cl_mem)) {
        cl_mem buffer;
        memcpy(&buffer, value, sizeof buffer);
        object_head *maybe = (object_head *)(void *)buffer;
        /* A ulong has the same size; no offset is as large as an address. */
        if ((size_t)buffer >= (size_t)1 << 40 && maybe->dispatch == &table)
            memcpy(kernel->values[index], &buffer->host, sizeof buffer->host);
    }
    return CL_SUCCESS;
}

/* ---- Commands ------------------------------------------------------------------------------- */

static cl_int finish(cl_command_queue queue, cl_event *event) {
    cl_int code = CL_SUCCESS;
    if (event) {
        *event = make(sizeof **event, &code);
        if (*event) {
            (*event)->queue = queue;
            retain_queue(queue);
        }
    }
    return code;
}

static void destroy_event(cl_event event) {
    release_queue(event->queue);
}

REFERENCES(cl_event, retain_event, release_event, destroy_event)

static cl_int CL_API_CALL launch(cl_command_queue queue, cl_kernel kernel, cl_uint dims,
                                 const size_t *offset, const size_t *global, const size_t *local,
                                 cl_uint num_wait, const cl_event *wait, cl_event *event) {
    void *arguments[MAX_ARGUMENTS];
    size_t groups[3] = {1, 1, 1}, items[3] = {1, 1, 1}, offsets[3] = {0, 0, 0};
    (void)num_wait;
    (void)wait;
    if (!local)
        return CL_INVALID_VALUE;
    for (cl_uint d = 0; d < dims; d++) {
        groups[d] = global[d] / local[d];
        items[d] = local[d];
        offsets[d] = offset ? offset[d] : 0;
    }
    for (size_t i = 0; i < MAX_ARGUMENTS; i++)
        arguments[i] = kernel->values[i];
    nvidia_probe(kernel->name, arguments, kernel->program->bf16);
    native_launch(kernel->program->native, kernel->name, arguments, groups, items, offsets);
    return finish(queue, event);
}

static cl_int CL_API_CALL read_buffer(cl_command_queue queue, cl_mem buffer, cl_bool blocks,
                                      size_t offset, size_t bytes, void *to, cl_uint num_wait,
                                      const cl_event *wait, cl_event *event) {
    (void)blocks;
    (void)num_wait;
    (void)wait;
    memcpy(to, buffer->host + offset, bytes);
    return finish(queue, event);
}

static cl_int CL_API_CALL write_buffer(cl_command_queue queue, cl_mem buffer, cl_bool blocks,
                                       size_t offset, size_t bytes, const void *from,
                                       cl_uint num_wait, const cl_event *wait, cl_event *event) {
    (void)blocks;
    (void)num_wait;
    (void)wait;
    memcpy(buffer->host + offset, from, bytes);
    return finish(queue, event);
}

static cl_int CL_API_CALL copy_buffer(cl_command_queue queue, cl_mem from, cl_mem to,
                                      size_t from_offset, size_t to_offset, size_t bytes,
                                      cl_uint num_wait, const cl_event *wait, cl_event *event) {
    (void)num_wait;
    (void)wait;
    memmove(to->host + to_offset, from->host + from_offset, bytes);
    return finish(queue, event);
}

static cl_int CL_API_CALL fill_buffer(cl_command_queue queue, cl_mem buffer, const void *pattern,
                                      size_t pattern_bytes, size_t offset, size_t bytes,
                                      cl_uint num_wait, const cl_event *wait, cl_event *event) {
    (void)num_wait;
    (void)wait;
    for (size_t i = 0; i < bytes; i += pattern_bytes)
        memcpy(buffer->host + offset + i, pattern, pattern_bytes);
    return finish(queue, event);
}

static cl_int CL_API_CALL marker(cl_command_queue queue, cl_uint num_wait, const cl_event *wait,
                                 cl_event *event) {
    (void)num_wait;
    (void)wait;
    return finish(queue, event);
}

static cl_int CL_API_CALL wait_for_events(cl_uint count, const cl_event *events) {
    (void)events;
    return count > 0 ? CL_SUCCESS : CL_INVALID_VALUE;
}

static cl_int CL_API_CALL event_info(cl_event event, cl_event_info name, size_t size, void *value,
                                     size_t *bytes) {
    const cl_int complete = CL_COMPLETE;
    switch (name) {
    case CL_EVENT_CONTEXT:
        return GIVE(event->queue->context);
    case CL_EVENT_COMMAND_EXECUTION_STATUS:
        return GIVE(complete);
    default:
        return CL_INVALID_VALUE;
    }
}

/* No time passes. */
static cl_int CL_API_CALL event_profile(cl_event event, cl_profiling_info name, size_t size,
                                        void *value, size_t *bytes) {
    const cl_ulong time = 0;
    (void)name;
    if (!(event->queue->properties & CL_QUEUE_PROFILING_ENABLE))
        return CL_PROFILING_INFO_NOT_AVAILABLE;
    return GIVE(time);
}

/* ---- The loader's side ---------------------------------------------------------------------- */

/* What is not here is NULL: no test may need it. */
static cl_icd_dispatch table = {
    .clGetPlatformIDs = get_platforms,
    .clGetPlatformInfo = platform_info,
    .clGetDeviceIDs = get_devices,
    .clGetDeviceInfo = device_info,
    .clCreateContext = create_context,
    .clRetainContext = retain_context,
    .clReleaseContext = release_context,
    .clGetContextInfo = context_info,
    .clCreateCommandQueue = create_queue,
    .clRetainCommandQueue = retain_queue,
    .clReleaseCommandQueue = release_queue,
    .clGetCommandQueueInfo = queue_info,
    .clCreateBuffer = create_buffer,
    .clRetainMemObject = retain_buffer,
    .clReleaseMemObject = release_buffer,
    .clGetMemObjectInfo = buffer_info,
    .clCreateProgramWithSource = create_program,
    .clRetainProgram = retain_program,
    .clReleaseProgram = release_program,
    .clCreateProgramWithBinary = create_from_binary,
    .clGetProgramInfo = program_info,
    .clBuildProgram = build_program,
    .clGetProgramBuildInfo = build_info,
    .clCreateKernel = create_kernel,
    .clGetKernelInfo = kernel_info,
    .clGetKernelWorkGroupInfo = kernel_group_info,
    .clRetainKernel = retain_kernel,
    .clReleaseKernel = release_kernel,
    .clSetKernelArg = set_argument,
    .clWaitForEvents = wait_for_events,
    .clGetEventInfo = event_info,
    .clGetEventProfilingInfo = event_profile,
    .clRetainEvent = retain_event,
    .clReleaseEvent = release_event,
    .clFlush = flush_queue,
    .clFinish = flush_queue,
    .clEnqueueNDRangeKernel = launch,
    .clEnqueueReadBuffer = read_buffer,
    .clEnqueueWriteBuffer = write_buffer,
    .clEnqueueCopyBuffer = copy_buffer,
    .clEnqueueFillBuffer = fill_buffer,
    .clEnqueueMarkerWithWaitList = marker,
    .clEnqueueBarrierWithWaitList = marker,
};

CL_API_ENTRY cl_int CL_API_CALL clIcdGetPlatformIDsKHR(cl_uint room, cl_platform_id *platforms,
                                                       cl_uint *count) {
    return get_platforms(room, platforms, count);
}

CL_API_ENTRY cl_int CL_API_CALL clGetPlatformInfo(cl_platform_id of, cl_platform_info name,
                                                  size_t size, void *value, size_t *bytes) {
    return platform_info(of, name, size, value, bytes);
}

typedef void (*any_function)(void);

CL_API_ENTRY void *CL_API_CALL clGetExtensionFunctionAddress(const char *name) {
    any_function found = NULL;
    void *address;
    if (strcmp(name, "clIcdGetPlatformIDsKHR") == 0)
        found = (any_function)clIcdGetPlatformIDsKHR;
    if (strcmp(name, "clGetPlatformInfo") == 0)
        found = (any_function)clGetPlatformInfo;
    memcpy(&address, &found, sizeof address);
    return address;
}
