#include "tensors.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { LENGTH_BYTES = 8 };

const char *dtype_name(clmoe_type type) {
    static const char *const names[] = {
        [CLMOE_F32] = "f32", [CLMOE_F16] = "f16", [CLMOE_BF16] = "bf16"};
    return names[type];
}

/* ---- Reading --------------------------------------------------------------------------------- */

/* What a file says of a tensor. */
typedef struct tensor_shape {
    uint32_t rank;
    uint64_t dims[CLMOE_TENSOR_RANK];
} tensor_shape;

/* "[2, 32, 48]" */
static void shape_text(const tensor_shape *shape, char *text, size_t size) {
    size_t used = 0;
    for (uint32_t i = 0; i < shape->rank && used < size; i++) {
        const char *before = i == 0 ? "[" : ", ";
        int n = snprintf(text + used, size - used, "%s%" PRIu64, before, shape->dims[i]);
        used += n > 0 ? (size_t)n : 0;
    }
    if (used < size)
        snprintf(text + used, size - used, shape->rank == 0 ? "[]" : "]");
}

clmoe_status rows_read(const clmoe_tensors *file, const char *name, uint32_t dim, uint32_t *tokens,
                       float **rows) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *path = clmoe_tensors_path(file);
    float *values = NULL;
    uint64_t count = 1;
    char text[200];
    tensor_shape shape;
    *rows = NULL;
    TRY(LIB(clmoe_tensors_shape(file, name, &shape.rank, shape.dims)));
    shape_text(&shape, text, sizeof text);
    const bool fits = (shape.rank == 2 || shape.rank == 3) && shape.dims[shape.rank - 1] == dim;
    if (!fits)
        TRY(cli_fail(CLMOE_BAD_FILE, "%s: tensor '%s' is %s, not [T, %u] or [B, S, %u]", path, name,
                     text, (unsigned)dim, (unsigned)dim));
    for (uint32_t i = 0; i + 1 < shape.rank; i++)
        count *= shape.dims[i];
    if (count > UINT32_MAX)
        TRY(cli_fail(CLMOE_BAD_FILE, "%s: tensor '%s' is %s, more than 2^32 - 1 tokens", path, name,
                     text));
    values = count > 0 ? malloc((size_t)count * dim * sizeof *values) : malloc(1);
    if (values == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "%s: no memory for tensor '%s', %s", path, name, text));
    TRY(LIB(clmoe_tensors_read(file, name, 0, (size_t)count * dim, values)));
    *tokens = (uint32_t)count;
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

/* ---- Writing --------------------------------------------------------------------------------- */

/* The header of one F32 tensor, padded with spaces so that the data is aligned; NULL: no memory. */
static char *make_header(const char *name, uint64_t rows, uint64_t cols, size_t bytes) {
    json_t *root =
        json_pack("{s:{s:s,s:[I,I],s:[i,I]}}", name, "dtype", "F32", "shape", (json_int_t)rows,
                  (json_int_t)cols, "data_offsets", 0, (json_int_t)bytes);
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    if (text == NULL)
        return NULL;
    size_t length = strlen(text), padded = (length + 7) / 8 * 8;
    char *header = malloc(padded + 1);
    if (header != NULL) {
        memcpy(header, text, length);
        memset(header + length, ' ', padded - length);
        header[padded] = '\0';
    }
    free(text);
    return header;
}

static bool write_floats(FILE *stream, const float *values, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        unsigned char bytes[4];
        for (uint32_t b = 0; b < 4; b++)
            bytes[b] = (unsigned char)(bits >> (8 * b) & 255);
        if (fwrite(bytes, 1, 4, stream) != 4)
            return false;
    }
    return true;
}

static bool write_file(FILE *stream, const char *header, const float *values, size_t count) {
    unsigned char length[LENGTH_BYTES];
    size_t header_bytes = strlen(header);
    for (uint32_t i = 0; i < LENGTH_BYTES; i++)
        length[i] = (unsigned char)((uint64_t)header_bytes >> (8 * i) & 255);
    return fwrite(length, 1, LENGTH_BYTES, stream) == LENGTH_BYTES &&
           fwrite(header, 1, header_bytes, stream) == header_bytes &&
           write_floats(stream, values, count) && fflush(stream) == 0;
}

clmoe_status tensor_write(FILE *stream, const char *path, const char *name, uint64_t rows,
                          uint64_t cols, const float *values) {
    clmoe_status status = CLMOE_SUCCESS;
    if (cols > 0 && rows > SIZE_MAX / sizeof *values / cols)
        return cli_fail(CLMOE_INVALID_ARGUMENT,
                        "%s: [%" PRIu64 ", %" PRIu64 "] floats are too many", path, rows, cols);
    size_t count = (size_t)(rows * cols), bytes = count * sizeof *values;
    char *header = make_header(name, rows, cols, bytes);
    if (header == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to write tensor '%s'", path, name);
    if (!write_file(stream, header, values, count))
        status = cli_fail(CLMOE_IO, "%s: cannot be written: %s", path, strerror(errno));
    free(header);
    return status;
}
