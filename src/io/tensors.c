/* safetensors files as public calls. */
#include "safetensors.h"

_Static_assert(CLMOE_TENSOR_RANK == ST_MAX_RANK, "the public header has another rank");

clmoe_status clmoe_tensors_open(const char *path, clmoe_tensors **out) {
    if (out)
        *out = NULL;
    if (!path || !out)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", path ? "out" : "path");
    if (path[0] == '\0')
        return fail(CLMOE_INVALID_ARGUMENT, "path is '', which names no file");
    return safetensors_open(path, out);
}

void clmoe_tensors_close(clmoe_tensors *tensors) {
    safetensors_close(tensors);
}

const char *clmoe_tensors_path(const clmoe_tensors *tensors) {
    return safetensors_path(tensors);
}

static clmoe_status find(const clmoe_tensors *tensors, const char *name, const st_tensor **tensor) {
    char names[200];
    if (!tensors || !name)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", tensors ? "name" : "tensors");
    *tensor = safetensors_find(tensors, name);
    if (*tensor)
        return CLMOE_SUCCESS;
    safetensors_names(tensors, names, sizeof names);
    return fail(CLMOE_BAD_FILE, "%s has no tensor '%s'; it has %s", safetensors_path(tensors), name,
                names);
}

clmoe_status clmoe_tensors_shape(const clmoe_tensors *tensors, const char *name, uint32_t *rank,
                                 uint64_t shape[CLMOE_TENSOR_RANK]) {
    clmoe_status status = CLMOE_SUCCESS;
    const st_tensor *tensor = NULL;
    if (!rank || !shape)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", rank ? "shape" : "rank");
    TRY(find(tensors, name, &tensor));
    *rank = tensor->rank;
    for (uint32_t i = 0; i < tensor->rank; i++)
        shape[i] = tensor->shape[i];
done:
    return status;
}

clmoe_status clmoe_tensors_read(const clmoe_tensors *tensors, const char *name, uint64_t first,
                                size_t count, float *out) {
    clmoe_status status = CLMOE_SUCCESS;
    const st_tensor *tensor = NULL;
    TRY(find(tensors, name, &tensor));
    if (!out && count > 0)
        return fail(CLMOE_INVALID_ARGUMENT, "out is NULL");
    TRY(safetensors_read_f32(tensors, tensor, first, count, out));
done:
    return status;
}
