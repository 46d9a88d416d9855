/* The OpenCL devices of this machine, in the order that --device counts. */
#ifndef CLMOE_DEVICE_LIST_H
#define CLMOE_DEVICE_LIST_H

#include "cli.h"

typedef struct device_entry {
    cl_platform_id platform;
    cl_device_id device;
    cl_device_type type;
} device_entry;

typedef struct device_list {
    device_entry *entries;
    uint32_t count;
    uint32_t preferred; /* the first GPU, else 0 */
} device_list;

/* Errors: CLMOE_UNSUPPORTED, with a sentence that says what to install, when there is no device. */
clmoe_status device_list_get(device_list *list);
void device_list_free(device_list *list);

/* Texts of a platform or device; empty where the driver gives none. */
void platform_text(cl_platform_id platform, cl_platform_info what, char *text, size_t size);
void device_text(cl_device_id device, cl_device_info what, char *text, size_t size);

enum { CACHE_PATH_SIZE = 4096 };

/*
 * Where this user's compiled programs are kept: $XDG_CACHE_HOME/clmoe or $HOME/.cache/clmoe. NULL
 * if neither is set, or if the platform is better off with the cache it has.
 */
const char *user_cache_dir(cl_platform_id platform, char path[CACHE_PATH_SIZE]);

/* "CPU", "GPU", "accelerator" or "other". */
const char *device_type_name(cl_device_type type);

#endif
