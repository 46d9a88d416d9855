/* The only place that enqueues kernels: a chain of commands on the caller's queue, in order on any
 * queue.
 */
#ifndef CLMOE_LAUNCH_H
#define CLMOE_LAUNCH_H

#include "context.h"

/*
 * A chain of commands. On an out-of-order queue each command waits for the one before. On another
 * one only a profile needs events of the commands: each costs time between them.
 */
typedef struct launch {
    cl_command_queue queue;
    bool out_of_order;
    uint64_t max_work; /* clmoe_context_options.max_launch_work */
    cl_uint num_wait;  /* the caller's wait list, for the first command */
    const cl_event *wait;
    bool begun;             /* there is a command */
    cl_event last;          /* of the newest command, if it has one */
    clmoe_profile *profile; /* the caller's, or NULL */
    const char *step;       /* of the profile, that the next command belongs to, or NULL */
    bool step_begins;       /* it has no command yet */
} launch;

/* How many parts of `by` cover `value`: groups, blocks, sequences. */
static inline uint32_t divide_up(uint32_t value, uint32_t by) {
    return value / by + (value % by != 0);
}

/* The smallest power of two of at least `at_least`, or the first of at least `at_most`. */
static inline uint32_t power_of_two(uint32_t at_least, uint32_t at_most) {
    uint32_t power = 1;
    while (power < at_least && power < at_most)
        power *= 2;
    return power;
}

/* One kernel argument. */
typedef struct kernel_arg {
    const char *text; /* the host's expression: tests compare it with the kernel's name */
    bool is_buffer;
    cl_mem mem;
    size_t size;       /* of a number or struct, in bytes */
    uint64_t number;   /* an integer, a float's bits, or a buffer's offset in elements */
    const void *bytes; /* a struct by value, or NULL */
} kernel_arg;

kernel_arg arg_buf(const char *text, clmoe_buf buf, size_t element_bytes);
kernel_arg arg_number(const char *text, size_t size, uint64_t value);
kernel_arg arg_float(const char *text, float value);
kernel_arg arg_struct(const char *text, const void *value, size_t bytes);

/*
 * A buffer takes two kernel arguments, IN(T, p) or OUT(T, p) of types.clh: a pointer and an offset
 * in elements of sizeof(T). One that is not given arrives as a NULL pointer and 0.
 */
#define ARG_F32(buf)        arg_buf(#buf, (buf), 4) /* any four-byte element: float, int, uint */
#define ARG_U16(buf)        arg_buf(#buf, (buf), 2)
#define ARG_U8(buf)         arg_buf(#buf, (buf), 1)
#define ARG_TYPE(buf, type) arg_buf(#buf, (buf), type_bytes(type))

#define ARG_UINT(value)  arg_number(#value, sizeof(cl_uint), (value)) /* `uint`, or `int` */
#define ARG_ULONG(value) arg_number(#value, sizeof(cl_ulong), (value))
#define ARG_FLOAT(value) arg_float(#value, (value))
#define ARG_STRUCT(value)                                                                          \
    arg_struct(#value, &(value), sizeof(value)) /* lives until kernel_set()                        \
                                                 */

/*
 * The kernel's name of an argument ends a word of the host's expression: `scores` is b->scores, or
 * region(b, REGION_SCORES). Where it does not: ARG_AS(scores, ARG_F32(b->choices)).
 */
#define ARG_AS(name, arg) arg_as(#name, (arg))
static inline kernel_arg arg_as(const char *name, kernel_arg arg) {
    arg.text = name;
    return arg;
}

/* Sets all arguments of `kernel` in order: kernel_set(k, 3, (kernel_arg[]){...}). */
clmoe_status kernel_set(cl_kernel kernel, size_t count, const kernel_arg *args);

#define KERNEL_SET(kernel, ...)                                                                    \
    kernel_set((kernel), sizeof((kernel_arg[]){__VA_ARGS__}) / sizeof(kernel_arg),                 \
               (const kernel_arg[]){__VA_ARGS__})

/* Starts a chain. Checks the queue (its context and device) and the wait list. */
clmoe_status launch_begin(launch *chain, const clmoe_context *context, cl_command_queue queue,
                          cl_uint num_wait, const cl_event *wait);

/* From now on the chain fills `profile`; NULL: none. Checks it, and the queue for it. */
clmoe_status launch_profile(launch *chain, clmoe_profile *profile);

/* The commands that follow are step `name`, a static string, of the profile. */
void launch_step(launch *chain, const char *name);

/* Enqueues `groups` work-groups of `local` work-items per dimension; no groups: nothing to do. */
clmoe_status launch_kernel(launch *chain, cl_kernel kernel, cl_uint dims, const size_t *groups,
                           const size_t *local);

/*
 * The same in as many launches as the context's bound asks for, where a group is `work`
 * multiply-adds. The kernel must know its place by get_global_id(), or get_global_offset(), as
 * group ids begin at 0 in each launch.
 */
clmoe_status launch_bounded(launch *chain, cl_kernel kernel, cl_uint dims, const size_t *groups,
                            const size_t *local, uint64_t work);

/* How many units of `work` multiply-adds a launch may have, at least 1. */
uint64_t launch_share(const launch *chain, uint64_t work);

/* One-dimensional launch. */
clmoe_status launch_1d(launch *chain, cl_kernel kernel, size_t groups, size_t local);

/* Copies `bytes`; without a destination, or with nothing to copy, it does nothing. */
clmoe_status launch_copy(launch *chain, clmoe_buf from, clmoe_buf to, size_t bytes);

/* Zeroes `bytes`. */
clmoe_status launch_zero(launch *chain, clmoe_buf to, size_t bytes);

/* Waits on the host for the chain so far, then reads `bytes`: for the clblast engine only. */
clmoe_status launch_read(launch *chain, clmoe_buf from, size_t bytes, void *to);

/*
 * For commands a library enqueues itself: makes `queue` (in-order) wait for the chain, and
 * afterwards the chain wait for `queue`, which is flushed. With the chain's own in-order queue
 * there is only a marker: before the library's commands where they are the first, which the wait
 * list holds back, and behind them, for the chain's event. A step of a profile that begins there
 * begins with a marker.
 */
clmoe_status launch_leave(launch *chain, cl_command_queue queue);
clmoe_status launch_return(launch *chain, cl_command_queue queue);

/*
 * Ends a chain: on success *event (if asked for) completes with the chain, also when nothing was
 * enqueued, by a marker where the newest command has none; on an error it is NULL. Passes `status`
 * on.
 */
clmoe_status launch_end(launch *chain, clmoe_status status, cl_event *event);

#endif
