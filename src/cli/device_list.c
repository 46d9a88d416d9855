#include "device_list.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static clmoe_status no_device(const char *what) {
    return cli_fail(CLMOE_UNSUPPORTED,
                    "no OpenCL %s found: install a driver, for example the package pocl-opencl-icd "
                    "(CPUs) or the OpenCL driver of the GPU's vendor",
                    what);
}

static clmoe_status platforms_get(cl_platform_id **platforms, cl_uint *count) {
    *count = 0;
    *platforms = NULL;
    /* Without any platform the loader gives an error, not a count of 0. */
    if (clGetPlatformIDs(0, NULL, count) != CL_SUCCESS || *count == 0)
        return no_device("platform");
    *platforms = calloc(*count, sizeof **platforms);
    if (*platforms == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u OpenCL platforms", (unsigned)*count);
    return CL(clGetPlatformIDs(*count, *platforms, NULL));
}

/* Appends the devices of a platform; a platform that cannot list any has none. */
static clmoe_status platform_append(device_list *list, cl_platform_id platform) {
    cl_uint count = 0;
    clmoe_status status = CLMOE_SUCCESS;
    cl_device_id *devices = NULL;
    if (clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 0, NULL, &count) != CL_SUCCESS || count == 0)
        return CLMOE_SUCCESS;
    devices = calloc(count, sizeof *devices);
    device_entry *entries = realloc(list->entries, (list->count + count) * sizeof *entries);
    if (entries != NULL)
        list->entries = entries;
    if (devices == NULL || entries == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u OpenCL devices", (unsigned)count));
    TRY(CL(clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, count, devices, NULL)));
    for (cl_uint i = 0; i < count; i++) {
        device_entry entry = {platform, devices[i], 0};
        TRY(CL(clGetDeviceInfo(devices[i], CL_DEVICE_TYPE, sizeof entry.type, &entry.type, NULL)));
        list->entries[list->count++] = entry;
    }
done:
    free(devices);
    return status;
}

clmoe_status device_list_get(device_list *list) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_platform_id *platforms = NULL;
    cl_uint count = 0;
    *list = (device_list){0};
    TRY(platforms_get(&platforms, &count));
    for (cl_uint i = 0; i < count; i++)
        TRY(platform_append(list, platforms[i]));
    if (list->count == 0)
        TRY(no_device("device"));
    for (uint32_t i = list->count; i-- > 0;)
        if (list->entries[i].type & CL_DEVICE_TYPE_GPU)
            list->preferred = i;
done:
    free(platforms);
    if (status != CLMOE_SUCCESS)
        device_list_free(list);
    return status;
}

void device_list_free(device_list *list) {
    free(list->entries);
    *list = (device_list){0};
}

/* A driver gives a text to a buffer that holds all of it, or not at all. */
void platform_text(cl_platform_id platform, cl_platform_info what, char *text, size_t size) {
    size_t bytes = 0;
    text[0] = '\0';
    if (clGetPlatformInfo(platform, what, 0, NULL, &bytes) != CL_SUCCESS)
        return;
    char *all = calloc(1, bytes + 1);
    if (all && clGetPlatformInfo(platform, what, bytes, all, NULL) == CL_SUCCESS)
        snprintf(text, size, "%s", all);
    free(all);
}

void device_text(cl_device_id device, cl_device_info what, char *text, size_t size) {
    size_t bytes = 0;
    text[0] = '\0';
    if (clGetDeviceInfo(device, what, 0, NULL, &bytes) != CL_SUCCESS)
        return;
    char *all = calloc(1, bytes + 1);
    if (all && clGetDeviceInfo(device, what, bytes, all, NULL) == CL_SUCCESS)
        snprintf(text, size, "%s", all);
    free(all);
}

const char *device_type_name(cl_device_type type) {
    if (type & CL_DEVICE_TYPE_GPU)
        return "GPU";
    if (type & CL_DEVICE_TYPE_CPU)
        return "CPU";
    return type & CL_DEVICE_TYPE_ACCELERATOR ? "accelerator" : "other";
}
