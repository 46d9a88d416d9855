/* What the library knows of a device. */
#include "device.h"

#include <CL/cl_ext.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VENDOR_NVIDIA = 0x10DE, VENDOR_INTEL = 0x8086, MIN_DIMS = 3 };

static clmoe_status get(cl_device_id device, cl_device_info name, size_t bytes, void *value) {
    return CL(clGetDeviceInfo(device, name, bytes, value, NULL));
}

clmoe_status device_info_text(cl_device_id device, cl_device_info what, char **text) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t bytes = 0;
    TRY(CL(clGetDeviceInfo(device, what, 0, NULL, &bytes)));
    *text = calloc(1, bytes + 1);
    if (!*text)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a device's description");
    TRY(get(device, what, bytes, *text));
done:
    return status;
}

clmoe_status device_descends(cl_device_id device, cl_device_id ancestor, bool *descends) {
    clmoe_status status = CLMOE_SUCCESS;
    while (device && device != ancestor)
        TRY(get(device, CL_DEVICE_PARENT_DEVICE, sizeof device, (void *)&device));
    *descends = device != NULL;
done:
    return status;
}

/* ---- What no kernel could do without --------------------------------------------------------- */

static clmoe_status check_abilities(cl_device_id device, const char *name) {
    clmoe_status status = CLMOE_SUCCESS;
    static const struct {
        cl_device_info what;
        const char *lacks;
    } needs[] = {
        {CL_DEVICE_AVAILABLE, "is not available"},
        {CL_DEVICE_COMPILER_AVAILABLE, "has no OpenCL C compiler"},
        {CL_DEVICE_ENDIAN_LITTLE, "is big-endian"},
    };
    for (size_t i = 0; i < sizeof needs / sizeof needs[0]; i++) {
        cl_bool yes = CL_FALSE;
        TRY(get(device, needs[i].what, sizeof yes, &yes));
        if (!yes)
            return fail(CLMOE_UNSUPPORTED, "device %.64s %s", name, needs[i].lacks);
    }
done:
    return status;
}

static clmoe_status check_language(cl_device_id device, const char *name) {
    clmoe_status status = CLMOE_SUCCESS;
    char *profile = NULL, *version = NULL;
    unsigned major = 0, minor = 0;
    TRY(device_info_text(device, CL_DEVICE_PROFILE, &profile));
    TRY(device_info_text(device, CL_DEVICE_OPENCL_C_VERSION, &version));
    if (strcmp(profile, "FULL_PROFILE") != 0)
        status = fail(CLMOE_UNSUPPORTED, "device %.64s has OpenCL's %.32s, not FULL_PROFILE", name,
                      profile);
    else if (sscanf(version, "OpenCL C %u.%u", &major, &minor) != 2 || major < 1 ||
             (major == 1 && minor < 2))
        status = fail(CLMOE_UNSUPPORTED, "device %.64s has \"%.32s\", but OpenCL C 1.2 is needed",
                      name, version);
done:
    free(profile);
    free(version);
    return status;
}

/* ---- Facts ----------------------------------------------------------------------------------- */

/* Asked only of NVIDIA's devices. */
static clmoe_status read_nv_capability(cl_device_id device, cl_uint *capability) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_uint major = 0, minor = 0;
    char *extensions = NULL;
    TRY(device_info_text(device, CL_DEVICE_EXTENSIONS, &extensions));
    if (strstr(extensions, "cl_nv_device_attribute_query")) {
        TRY(get(device, CL_DEVICE_COMPUTE_CAPABILITY_MAJOR_NV, sizeof major, &major));
        TRY(get(device, CL_DEVICE_COMPUTE_CAPABILITY_MINOR_NV, sizeof minor, &minor));
    }
    *capability = 10 * major + minor;
done:
    free(extensions);
    return status;
}

static clmoe_status read_vendor(cl_device_id device, device_info *info) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_uint vendor = 0;
    TRY(get(device, CL_DEVICE_VENDOR_ID, sizeof vendor, &vendor));
    info->is_intel_gpu = vendor == VENDOR_INTEL && (info->type & CL_DEVICE_TYPE_GPU) != 0;
    if (vendor == VENDOR_NVIDIA)
        TRY(read_nv_capability(device, &info->nv_capability));
done:
    return status;
}

static clmoe_status read_max_items(cl_device_id device, size_t max_items[2]) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t bytes = 0, *items = NULL;
    TRY(CL(clGetDeviceInfo(device, CL_DEVICE_MAX_WORK_ITEM_SIZES, 0, NULL, &bytes)));
    items = calloc(MIN_DIMS, bytes + sizeof *items);
    if (!items)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for a device's description");
    TRY(get(device, CL_DEVICE_MAX_WORK_ITEM_SIZES, bytes, items));
    memcpy(max_items, items, 2 * sizeof *items);
done:
    free(items);
    return status;
}

static clmoe_status read_facts(cl_device_id device, device_info *info) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(get(device, CL_DEVICE_TYPE, sizeof info->type, &info->type));
    TRY(get(device, CL_DEVICE_LOCAL_MEM_SIZE, sizeof info->local_mem_bytes,
            &info->local_mem_bytes));
    TRY(get(device, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof info->max_buffer_bytes,
            &info->max_buffer_bytes));
    TRY(get(device, CL_DEVICE_MAX_WORK_GROUP_SIZE, sizeof info->max_group, &info->max_group));
    TRY(read_max_items(device, info->max_items));
    TRY(get(device, CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, sizeof info->vector_width,
            &info->vector_width));
    TRY(get(device, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof info->compute_units, &info->compute_units));
    TRY(read_vendor(device, info));
    if (info->vector_width == 0)
        info->vector_width = 1;
done:
    return status;
}

clmoe_status device_info_read(cl_device_id device, device_info *info) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(device_info_text(device, CL_DEVICE_NAME, &info->name));
    TRY(check_abilities(device, info->name));
    TRY(check_language(device, info->name));
    TRY(read_facts(device, info));
done:
    return status;
}

void device_info_release(device_info *info) {
    free(info->name);
    info->name = NULL;
}
