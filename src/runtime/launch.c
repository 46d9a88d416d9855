/* Kernel arguments and the chain of commands. */
#include "launch.h"
#include "profile.h"

#include <string.h>

enum { MAX_DIMS = 3 };

kernel_arg arg_buf(const char *text, clmoe_buf buf, size_t element_bytes) {
    return (kernel_arg){.text = text,
                        .is_buffer = true,
                        .mem = buf.mem,
                        .number = buf.mem ? buf.offset / element_bytes : 0};
}

kernel_arg arg_number(const char *text, size_t size, uint64_t value) {
    return (kernel_arg){.text = text, .size = size, .number = value};
}

kernel_arg arg_float(const char *text, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return arg_number(text, sizeof bits, bits);
}

kernel_arg arg_struct(const char *text, const void *value, size_t bytes) {
    return (kernel_arg){.text = text, .size = bytes, .bytes = value};
}

static clmoe_status set_buffer(cl_kernel kernel, cl_uint index, const kernel_arg *arg) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_ulong offset = arg->number;
    TRY(CL(clSetKernelArg(kernel, index, sizeof arg->mem, arg->mem ? &arg->mem : NULL)));
    TRY(CL(clSetKernelArg(kernel, index + 1, sizeof offset, &offset)));
done:
    return status;
}

static clmoe_status set_number(cl_kernel kernel, cl_uint index, const kernel_arg *arg) {
    cl_uint u32 = (cl_uint)arg->number;
    cl_ulong u64 = arg->number;
    const void *value = arg->size == sizeof u64 ? (const void *)&u64 : (const void *)&u32;
    if (arg->bytes)
        value = arg->bytes;
    return CL(clSetKernelArg(kernel, index, arg->size, value));
}

clmoe_status kernel_set(cl_kernel kernel, size_t count, const kernel_arg *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_uint index = 0;
    for (size_t i = 0; i < count; i++) {
        if (args[i].is_buffer) {
            TRY(set_buffer(kernel, index, &args[i]));
            index += 2;
        } else {
            TRY(set_number(kernel, index, &args[i]));
            index += 1;
        }
    }
done:
    return status;
}

static clmoe_status check_queue(const clmoe_context *context, cl_command_queue queue) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_context cl = NULL;
    cl_device_id device = NULL;
    if (!queue)
        return fail(CLMOE_INVALID_ARGUMENT, "queue is NULL");
    TRY(CL(clGetCommandQueueInfo(queue, CL_QUEUE_CONTEXT, sizeof cl, &cl, NULL)));
    TRY(CL(clGetCommandQueueInfo(queue, CL_QUEUE_DEVICE, sizeof device, &device, NULL)));
    if (cl != context->cl || device != context->device)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "queue is of another %s than the one given to clmoe_context_create()",
                    cl != context->cl ? "cl_context" : "cl_device_id");
done:
    return status;
}

static clmoe_status check_wait(const clmoe_context *context, cl_uint num_wait,
                               const cl_event *wait) {
    clmoe_status status = CLMOE_SUCCESS;
    if ((num_wait == 0) != (wait == NULL))
        return fail(CLMOE_INVALID_ARGUMENT, "num_wait is %u, but wait is %s", num_wait,
                    wait ? "given" : "NULL");
    for (cl_uint i = 0; i < num_wait; i++) {
        cl_context cl = NULL;
        if (!wait[i])
            return fail(CLMOE_INVALID_ARGUMENT, "wait[%u] is NULL", i);
        TRY(CL(clGetEventInfo(wait[i], CL_EVENT_CONTEXT, sizeof cl, (void *)&cl, NULL)));
        if (cl != context->cl)
            return fail(CLMOE_INVALID_ARGUMENT, "wait[%u] is of another cl_context than the queue",
                        i);
    }
done:
    return status;
}

clmoe_status launch_begin(launch *chain, const clmoe_context *context, cl_command_queue queue,
                          cl_uint num_wait, const cl_event *wait) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_command_queue_properties properties = 0;
    *chain = (launch){.queue = queue,
                      .max_work = context->options.max_launch_work,
                      .num_wait = num_wait,
                      .wait = wait};
    TRY(check_queue(context, queue));
    TRY(check_wait(context, num_wait, wait));
    TRY(CL(
        clGetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties, NULL)));
    chain->out_of_order = (properties & CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE) != 0;
done:
    return status;
}

clmoe_status launch_profile(launch *chain, clmoe_profile *profile) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_command_queue_properties properties = 0;
    if (!profile)
        return CLMOE_SUCCESS;
    TRY(CL(clGetCommandQueueInfo(chain->queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties,
                                 NULL)));
    TRY(profile_check(profile, properties));
    chain->profile = profile;
done:
    return status;
}

void launch_step(launch *chain, const char *name) {
    chain->step = name;
    chain->step_begins = true;
}

/* What the next command waits for: the caller's list first, then on any queue the one before. */
static cl_uint wait_count(const launch *chain) {
    if (!chain->begun)
        return chain->num_wait;
    return chain->out_of_order ? 1 : 0;
}

static const cl_event *wait_list(const launch *chain) {
    if (wait_count(chain) == 0)
        return NULL;
    return chain->begun ? &chain->last : chain->wait;
}

/* Where a command puts its event; NULL: nobody asks for it. */
static cl_event *event_of_command(const launch *chain, cl_event *event) {
    return chain->out_of_order || chain->profile ? event : NULL;
}

static void advance(launch *chain, cl_event event) {
    if (chain->last)
        clReleaseEvent(chain->last);
    chain->last = event;
    chain->begun = true;
    if (!chain->profile || !chain->step)
        return;
    profile_add(chain->profile, chain->step, chain->step_begins, event);
    chain->step_begins = false;
}

static size_t smaller(size_t a, size_t b) {
    return a < b ? a : b;
}

/* The groups from `first` on, `most` of them in each dimension where there are as many. */
static clmoe_status enqueue_part(launch *chain, cl_kernel kernel, cl_uint dims,
                                 const size_t *groups, const size_t *local, const size_t *first,
                                 const size_t *most) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t offset[MAX_DIMS], global[MAX_DIMS];
    cl_event event = NULL;
    for (cl_uint i = 0; i < dims; i++) {
        offset[i] = first[i] * local[i];
        global[i] = smaller(most[i], groups[i] - first[i]) * local[i];
    }
    TRY(CL(clEnqueueNDRangeKernel(chain->queue, kernel, dims, offset, global, local,
                                  wait_count(chain), wait_list(chain),
                                  event_of_command(chain, &event))));
    advance(chain, event);
done:
    return status;
}

/* Moves `first` to the next part; past the end in the last dimension behind the last. */
static void next_part(cl_uint dims, const size_t *groups, const size_t *most, size_t *first) {
    for (cl_uint i = 0; i < dims; i++) {
        first[i] += most[i];
        if (first[i] < groups[i] || i == dims - 1)
            return;
        first[i] = 0;
    }
}

uint64_t launch_share(const launch *chain, uint64_t work) {
    if (chain->max_work == 0 || work == 0)
        return UINT64_MAX;
    return chain->max_work > work ? chain->max_work / work : 1;
}

clmoe_status launch_bounded(launch *chain, cl_kernel kernel, cl_uint dims, const size_t *groups,
                            const size_t *local, uint64_t work) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint64_t share = launch_share(chain, work);
    size_t left = share < SIZE_MAX ? (size_t)share : SIZE_MAX;
    size_t most[MAX_DIMS], first[MAX_DIMS] = {0};
    for (cl_uint i = 0; i < dims; i++) {
        if (groups[i] == 0)
            return CLMOE_SUCCESS;
        most[i] = smaller(groups[i], left);
        left = most[i] == groups[i] ? left / groups[i] : 1;
    }
    for (; first[dims - 1] < groups[dims - 1]; next_part(dims, groups, most, first))
        TRY(enqueue_part(chain, kernel, dims, groups, local, first, most));
done:
    return status;
}

clmoe_status launch_kernel(launch *chain, cl_kernel kernel, cl_uint dims, const size_t *groups,
                           const size_t *local) {
    return launch_bounded(chain, kernel, dims, groups, local, 0);
}

clmoe_status launch_1d(launch *chain, cl_kernel kernel, size_t groups, size_t local) {
    return launch_kernel(chain, kernel, 1, &groups, &local);
}

clmoe_status launch_copy(launch *chain, clmoe_buf from, clmoe_buf to, size_t bytes) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event event = NULL;
    if (!to.mem || bytes == 0)
        return CLMOE_SUCCESS;
    TRY(CL(clEnqueueCopyBuffer(chain->queue, from.mem, to.mem, from.offset, to.offset, bytes,
                               wait_count(chain), wait_list(chain),
                               event_of_command(chain, &event))));
    advance(chain, event);
done:
    return status;
}

clmoe_status launch_zero(launch *chain, clmoe_buf to, size_t bytes) {
    clmoe_status status = CLMOE_SUCCESS;
    const unsigned char zero = 0;
    cl_event event = NULL;
    if (bytes == 0)
        return CLMOE_SUCCESS;
    TRY(CL(clEnqueueFillBuffer(chain->queue, to.mem, &zero, sizeof zero, to.offset, bytes,
                               wait_count(chain), wait_list(chain),
                               event_of_command(chain, &event))));
    advance(chain, event);
done:
    return status;
}

clmoe_status launch_read(launch *chain, clmoe_buf from, size_t bytes, void *to) {
    return CL(clEnqueueReadBuffer(chain->queue, from.mem, CL_TRUE, from.offset, bytes, to,
                                  wait_count(chain), wait_list(chain), NULL));
}

static clmoe_status launch_marker(launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event event = NULL;
    TRY(CL(clEnqueueMarkerWithWaitList(chain->queue, wait_count(chain), wait_list(chain), &event)));
    advance(chain, event);
done:
    return status;
}

clmoe_status launch_leave(launch *chain, cl_command_queue queue) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool profiled = chain->profile && chain->step_begins;
    if (!chain->begun || profiled || (queue != chain->queue && !chain->last))
        TRY(launch_marker(chain));
    if (queue == chain->queue)
        return CLMOE_SUCCESS;
    TRY(CL(clEnqueueBarrierWithWaitList(queue, 1, &chain->last, NULL)));
    TRY(CL(clFlush(chain->queue)));
done:
    return status;
}

clmoe_status launch_return(launch *chain, cl_command_queue queue) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event event = NULL;
    TRY(CL(clEnqueueMarkerWithWaitList(queue, 0, NULL, &event)));
    advance(chain, event);
    TRY(CL(clFlush(queue)));
    if (!chain->out_of_order && queue != chain->queue)
        TRY(CL(clEnqueueBarrierWithWaitList(chain->queue, 1, &chain->last, NULL)));
    if (chain->profile && queue != chain->queue) /* which need not have profiling */
        TRY(launch_marker(chain));
done:
    return status;
}

clmoe_status launch_end(launch *chain, clmoe_status status, cl_event *event) {
    if (event)
        *event = NULL;
    chain->step = NULL;
    if (status == CLMOE_SUCCESS && (!chain->begun || (event && !chain->last)))
        status = launch_marker(chain);
    if (status != CLMOE_SUCCESS)
        clmoe_profile_release(chain->profile);
    if (status == CLMOE_SUCCESS && event) {
        *event = chain->last;
        chain->last = NULL;
    }
    if (chain->last)
        clReleaseEvent(chain->last);
    chain->last = NULL;
    return status;
}
