/* The OpenCL floor: an OpenCL context and device, what we know of the device, compiled programs. */
#ifndef CLMOE_CONTEXT_H
#define CLMOE_CONTEXT_H

#include "status.h"
#include "tuning.h"
#include "types.h"

#include <pthread.h>
#include <stdbool.h>

/* Facts read once from the device; see device.c. */
typedef struct device_info {
    cl_device_type type;
    char name[128];
    cl_ulong local_mem_bytes;
    size_t max_group;     /* work-items per group */
    cl_uint vector_width; /* native floats per vector register, at least 1 */
    cl_uint compute_units;
    cl_uint nv_capability; /* NVIDIA's compute capability, 90 for 9.0; 0: not NVIDIA's */
} device_info;

clmoe_status device_info_read(cl_device_id device, device_info *info);

static inline bool device_is_cpu(const device_info *info) {
    return (info->type & CL_DEVICE_TYPE_CPU) != 0;
}

typedef struct program_entry program_entry; /* program.c */

/* What gemm/nv_probe.c found out. */
typedef enum nv_probe_result { NV_PROBE_NONE, NV_PROBE_PASSED, NV_PROBE_FAILED } nv_probe_result;

struct clmoe_context {
    cl_context cl;
    cl_device_id device;
    device_info info;
    clmoe_context_options options;
    tuning tuning;
    char *cache_dir;      /* options.cache_dir is this copy */
    uint32_t group;       /* work-items per group of the routing kernels: 1, or a power of two */
    pthread_mutex_t lock; /* guards what follows */
    program_entry *programs;
    bool cache_warned;
    nv_probe_result nv_probe;
};

#endif
