/* The OpenCL floor: an OpenCL context and device, what we know of the device, compiled programs. */
#ifndef CLMOE_CONTEXT_H
#define CLMOE_CONTEXT_H

#include "device.h"
#include "tuning.h"
#include "types.h"

#include <pthread.h>
#include <stdbool.h>

typedef struct program_entry program_entry; /* program.c */

/* What experts/gemm/nv_probe.c found out, of each of the two. */
typedef enum nv_probe_kind { NV_PROBE_MMA, NV_PROBE_WGMMA, NV_PROBES } nv_probe_kind;
typedef enum nv_probe_result { NV_PROBE_NONE, NV_PROBE_PASSED, NV_PROBE_FAILED } nv_probe_result;

/* Whether the compiler of an Intel GPU takes the option for buffers above 4 GiB. */
typedef enum large_buffers {
    LARGE_BUFFERS_UNKNOWN,
    LARGE_BUFFERS_ASK,
    LARGE_BUFFERS_ANYWAY
} large_buffers;

struct clmoe_context {
    cl_context cl;
    cl_device_id device;
    device_info info;
    clmoe_context_options options;
    tuning tuning;
    char *cache_dir;        /* options.cache_dir is this copy */
    uint32_t largest_group; /* where layer.group begins: smaller if a kernel needs it */
    pthread_mutex_t lock;   /* guards what follows */
    program_entry *programs;
    bool cache_warned;
    nv_probe_result nv_probe[NV_PROBES];
    large_buffers large_buffers;
    void (*forget)(void); /* NULL, or what an engine does when the context goes */
};

#endif
