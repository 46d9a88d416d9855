#include "tensors.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* "[2, 32, 48]" */
static void shape_text(const st_tensor *tensor, char *text, size_t size) {
    size_t used = 0;
    for (uint32_t i = 0; i < tensor->rank && used < size; i++) {
        const char *before = i == 0 ? "[" : ", ";
        int n = snprintf(text + used, size - used, "%s%llu", before,
                         (unsigned long long)tensor->shape[i]);
        used += n > 0 ? (size_t)n : 0;
    }
    if (used < size)
        snprintf(text + used, size - used, tensor->rank == 0 ? "[]" : "]");
}

clmoe_status rows_read(const safetensors *file, const char *name, uint32_t dim, uint32_t *tokens,
                       float **rows) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *path = safetensors_path(file);
    const st_tensor *tensor = safetensors_find(file, name);
    *rows = NULL;
    char shape[200], names[200];
    if (tensor == NULL) {
        safetensors_names(file, names, sizeof names);
        return fail(CLMOE_BAD_FILE, "%s has no tensor '%s'; it has %s", path, name, names);
    }
    shape_text(tensor, shape, sizeof shape);
    bool fits = (tensor->rank == 2 || tensor->rank == 3) && tensor->shape[tensor->rank - 1] == dim;
    if (!fits)
        return fail(CLMOE_BAD_FILE, "%s: tensor '%s' is %s, not [T, %u] or [B, S, %u]", path, name,
                    shape, (unsigned)dim, (unsigned)dim);
    if (tensor->elements / dim > UINT32_MAX)
        return fail(CLMOE_BAD_FILE, "%s: tensor '%s' is %s, more than 2^32 - 1 tokens", path, name,
                    shape);
    float *values = malloc(tensor->elements > 0 ? tensor->elements * sizeof(float) : 1);
    if (values == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "%s: no memory for tensor '%s', %s", path, name, shape));
    TRY(safetensors_read_f32(file, tensor, 0, (size_t)tensor->elements, values));
    *tokens = (uint32_t)(tensor->elements / dim);
    *rows = values;
    values = NULL;
done:
    free(values);
    return status;
}

double relative_error(const float *y, const float *expect, size_t count) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < count; i++) {
        double d = (double)y[i] - (double)expect[i];
        difference += d * d;
        size += (double)expect[i] * (double)expect[i];
    }
    return difference == 0 && size == 0 ? 0 : sqrt(difference / size);
}
