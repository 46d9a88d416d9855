/* What the library knows of an OpenCL device. */
#ifndef CLMOE_DEVICE_H
#define CLMOE_DEVICE_H

#include "status.h"

#include <stdbool.h>

/* Facts read once from the device. */
typedef struct device_info {
    cl_device_type type;
    char *name; /* of any length; in sentences the first 64 characters will do: "%.64s" */
    cl_ulong local_mem_bytes;
    cl_ulong max_buffer_bytes;
    size_t max_group;     /* work-items per group */
    size_t max_items[2];  /* of them along the first two dimensions */
    cl_uint vector_width; /* native floats per vector register, at least 1 */
    cl_uint compute_units;
    cl_uint nv_capability; /* NVIDIA's compute capability, 90 for 9.0; 0: not NVIDIA's */
    bool is_intel_gpu;
} device_info;

/* Errors: CLMOE_UNSUPPORTED, naming the device and what it lacks. */
clmoe_status device_info_read(cl_device_id device, device_info *info);
void device_info_release(device_info *info);

/* A text of any length about a device, to be freed. */
clmoe_status device_info_text(cl_device_id device, cl_device_info what, char **text);

/* Whether the device is `ancestor`, or a sub-device of it or of its sub-devices. */
clmoe_status device_descends(cl_device_id device, cl_device_id ancestor, bool *descends);

static inline bool device_is_cpu(const device_info *info) {
    return (info->type & CL_DEVICE_TYPE_CPU) != 0;
}

/* Whether the device takes groups of that many work-items along its first two dimensions. */
static inline bool device_takes_group(const device_info *info, size_t x, size_t y) {
    return x * y <= info->max_group && x <= info->max_items[0] && y <= info->max_items[1];
}

#endif
