/* What the library knows of a device. */
#include "context.h"

#include <CL/cl_ext.h>
#include <string.h>

enum { VENDOR_NVIDIA = 0x10DE, MAX_EXTENSIONS = 8192 };

static clmoe_status get(cl_device_id device, cl_device_info name, size_t bytes, void *value) {
    return CL(clGetDeviceInfo(device, name, bytes, value, NULL));
}

/* Asked only of NVIDIA's devices. */
static clmoe_status read_nv_capability(cl_device_id device, cl_uint *capability) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_uint vendor = 0, major = 0, minor = 0;
    char extensions[MAX_EXTENSIONS] = "";
    *capability = 0;
    TRY(get(device, CL_DEVICE_VENDOR_ID, sizeof vendor, &vendor));
    if (vendor != VENDOR_NVIDIA)
        return CLMOE_SUCCESS;
    TRY(get(device, CL_DEVICE_EXTENSIONS, sizeof extensions - 1, extensions));
    if (!strstr(extensions, "cl_nv_device_attribute_query"))
        return CLMOE_SUCCESS;
    TRY(get(device, CL_DEVICE_COMPUTE_CAPABILITY_MAJOR_NV, sizeof major, &major));
    TRY(get(device, CL_DEVICE_COMPUTE_CAPABILITY_MINOR_NV, sizeof minor, &minor));
    *capability = 10 * major + minor;
done:
    return status;
}

clmoe_status device_info_read(cl_device_id device, device_info *info) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_bool compiler = CL_FALSE;
    TRY(get(device, CL_DEVICE_COMPILER_AVAILABLE, sizeof compiler, &compiler));
    if (!compiler)
        return fail(CLMOE_INVALID_ARGUMENT, "device has no OpenCL C compiler");
    TRY(get(device, CL_DEVICE_TYPE, sizeof info->type, &info->type));
    TRY(get(device, CL_DEVICE_NAME, sizeof info->name, info->name));
    TRY(get(device, CL_DEVICE_LOCAL_MEM_SIZE, sizeof info->local_mem_bytes,
            &info->local_mem_bytes));
    TRY(get(device, CL_DEVICE_MAX_WORK_GROUP_SIZE, sizeof info->max_group, &info->max_group));
    TRY(get(device, CL_DEVICE_NATIVE_VECTOR_WIDTH_FLOAT, sizeof info->vector_width,
            &info->vector_width));
    TRY(get(device, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof info->compute_units, &info->compute_units));
    TRY(read_nv_capability(device, &info->nv_capability));
    if (info->vector_width == 0)
        info->vector_width = 1;
done:
    return status;
}
