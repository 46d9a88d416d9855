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

uint64_t shape_elements(const tensor_shape *shape) {
    uint64_t count = 1;
    for (uint32_t i = 0; i < shape->rank; i++)
        count *= shape->dims[i];
    return count;
}

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

clmoe_status tensor_find(const clmoe_tensors *file, const char *name, const tensor_shape *shape,
                         bool *has) {
    tensor_shape found;
    char is[200], should[200];
    const clmoe_status status = clmoe_tensors_shape(file, name, &found.rank, found.dims);
    *has = status == CLMOE_SUCCESS;
    if (status == CLMOE_BAD_FILE)
        return CLMOE_SUCCESS;
    if (status != CLMOE_SUCCESS)
        return LIB(status);
    if (found.rank == shape->rank &&
        memcmp(found.dims, shape->dims, found.rank * sizeof found.dims[0]) == 0)
        return CLMOE_SUCCESS;
    shape_text(&found, is, sizeof is);
    shape_text(shape, should, sizeof should);
    return cli_fail(CLMOE_BAD_FILE, "%s: tensor '%s' is %s, but must be %s",
                    clmoe_tensors_path(file), name, is, should);
}

void error_add(error_sums *sums, const float *y, const float *expect, size_t count) {
    for (size_t i = 0; i < count; i++) {
        double d = (double)y[i] - (double)expect[i];
        sums->difference += d * d;
        sums->size += (double)expect[i] * (double)expect[i];
    }
}

double error_of(const error_sums *sums) {
    if (sums->difference == 0 && sums->size == 0)
        return 0;
    return sqrt(sums->difference / sums->size);
}

double relative_error(const float *y, const float *expect, size_t count) {
    error_sums sums = {0};
    error_add(&sums, y, expect, count);
    return error_of(&sums);
}

/* ---- Writing --------------------------------------------------------------------------------- */

/* The header as JSON. */
static json_t *header_json(const tensor_entry *entries, size_t count) {
    json_t *root = json_object();
    uint64_t begin = 0;
    for (size_t i = 0; i < count; i++) {
        const tensor_shape *shape = &entries[i].shape;
        const uint64_t end = begin + shape_elements(shape) * sizeof(float);
        json_t *dims = json_array();
        for (uint32_t d = 0; d < shape->rank; d++)
            json_array_append_new(dims, json_integer((json_int_t)shape->dims[d]));
        json_t *entry = json_pack("{s:s,s:o,s:[I,I]}", "dtype", "F32", "shape", dims,
                                  "data_offsets", (json_int_t)begin, (json_int_t)end);
        if (json_object_set_new(root, entries[i].name, entry) != 0) {
            json_decref(root);
            return NULL;
        }
        begin = end;
    }
    return root;
}

/* The header, padded with spaces so that the data is aligned; NULL: no memory. */
static char *make_header(const tensor_entry *entries, size_t count) {
    json_t *root = header_json(entries, count);
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
    enum { ROOM = 4096 };
    unsigned char bytes[4 * ROOM];
    for (size_t begin = 0; begin < count; begin += ROOM) {
        const size_t here = count - begin < ROOM ? count - begin : ROOM;
        for (size_t i = 0; i < here; i++) {
            uint32_t bits;
            memcpy(&bits, &values[begin + i], sizeof bits);
            for (uint32_t b = 0; b < 4; b++)
                bytes[4 * i + b] = (unsigned char)(bits >> (8 * b) & 255);
        }
        if (fwrite(bytes, 4, here, stream) != here)
            return false;
    }
    return true;
}

static bool write_header(FILE *stream, const char *header) {
    unsigned char length[LENGTH_BYTES];
    size_t header_bytes = strlen(header);
    for (uint32_t i = 0; i < LENGTH_BYTES; i++)
        length[i] = (unsigned char)((uint64_t)header_bytes >> (8 * i) & 255);
    return fwrite(length, 1, LENGTH_BYTES, stream) == LENGTH_BYTES &&
           fwrite(header, 1, header_bytes, stream) == header_bytes;
}

static clmoe_status checked_write(bool written, const char *path) {
    if (written)
        return CLMOE_SUCCESS;
    return cli_fail(CLMOE_IO, "%s: cannot be written: %s", path, strerror(errno));
}

clmoe_status tensors_begin(FILE *stream, const char *path, const tensor_entry *entries,
                           size_t count) {
    char *header = make_header(entries, count);
    if (header == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to write tensor '%s'", path,
                        entries[0].name);
    const clmoe_status status = checked_write(write_header(stream, header), path);
    free(header);
    return status;
}

clmoe_status tensors_append(FILE *stream, const char *path, const float *values, size_t count) {
    return checked_write(write_floats(stream, values, count), path);
}

clmoe_status tensor_write(FILE *stream, const char *path, const char *name, uint64_t rows,
                          uint64_t cols, const float *values) {
    clmoe_status status = CLMOE_SUCCESS;
    if (cols > 0 && rows > SIZE_MAX / sizeof *values / cols)
        return cli_fail(CLMOE_INVALID_ARGUMENT,
                        "%s: [%" PRIu64 ", %" PRIu64 "] floats are too many", path, rows, cols);
    const tensor_entry entry = {name, {.rank = 2, .dims = {rows, cols}}};
    TRY(tensors_begin(stream, path, &entry, 1));
    TRY(tensors_append(stream, path, values, (size_t)(rows * cols)));
    TRY(checked_write(fflush(stream) == 0, path));
done:
    return status;
}
