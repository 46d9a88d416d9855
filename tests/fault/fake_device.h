/*
 * An OpenCL layer, loaded by the ICD loader through OPENCL_LAYERS, that makes the device look like
 * another and holds the program to it: what such a device refuses, it refuses.
 */
#ifndef FAKE_DEVICE_H
#define FAKE_DEVICE_H

#include "clmoe/clmoe.h"

#include <stdbool.h>

/* What is faked; 0 or NULL: as the device has it. */
typedef struct fake_device {
    cl_device_type type;
    cl_uint vendor;
    const char *name, *profile, *c_version;
    cl_bool unavailable, no_compiler, big_endian;
    size_t max_group, max_items[3];
    cl_ulong local_mem, max_buffer;
    /* Of kernels whose names begin so, all with "": the work-items that a group may have. */
    const char *kernel;
    size_t kernel_group;
    const char *build_option; /* the compiler takes it, and it is not passed on to the device's */
    /* Whether the loader has put the layer in, and what the program did. */
    bool loaded;
    unsigned refused;       /* launches and buffers beyond the device */
    unsigned option_builds; /* programs built with build_option */
    unsigned launches;
    size_t largest_launch; /* work-groups */
} fake_device;

/* The symbol to look up: a `fake_device`, to be set between calls. */
#define FAKE_DEVICE_SYMBOL "clmoe_fake_device"

#endif
