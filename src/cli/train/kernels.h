/* The kernels of `clmoe train` that are not clmoe's, on an in-order queue. */
#ifndef CLMOE_CLI_TRAIN_KERNELS_H
#define CLMOE_CLI_TRAIN_KERNELS_H

#include "../session.h"

typedef enum train_kernel {
    KERNEL_EMBED,
    KERNEL_EMBED_BACKWARD,
    KERNEL_NORM,
    KERNEL_NORM_BACKWARD,
    KERNEL_NORM_GAIN,
    KERNEL_SUM_ROWS,
    KERNEL_CROSS_ENTROPY,
    KERNEL_ADAMW,
    KERNEL_SUM_VALUES,
    TRAIN_KERNELS
} train_kernel;

/* Start from {0}. */
typedef struct train_kernels {
    cl_command_queue queue;
    cl_program program;
    cl_kernel kernels[TRAIN_KERNELS];
    size_t group; /* GROUP of types.clh: 1 on CPUs, where barriers are slow */
} train_kernels;

/* Compiles them for rows of `type`, f32 or bf16. */
clmoe_status train_kernels_create(train_kernels *k, const device_session *device, clmoe_type type);
void train_kernels_release(train_kernels *k);

/* An argument of a kernel. */
typedef struct kernel_argument {
    const void *value;
    size_t size;
} kernel_argument;

#define ARGUMENT(variable)                                                                         \
    { &(variable), sizeof(variable) }

enum { MOST_ARGUMENTS = 10 };

/* One launch; arguments in the kernel's order, as many as have a size. */
typedef struct kernel_launch {
    train_kernel kernel;
    size_t columns, rows; /* work-items; rows 0: one */
    bool grouped;         /* k->group work-items for each column, which are a group */
    kernel_argument arguments[MOST_ARGUMENTS];
} kernel_launch;

clmoe_status train_kernels_run(train_kernels *k, const kernel_launch *launch);

#endif
