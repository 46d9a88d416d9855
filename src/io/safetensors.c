#include "safetensors.h"
#include "runtime/file.h"
#include "runtime/json.h"
#include "runtime/types.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define LENGTH_BYTES 8 /* the file begins with the header's length, little-endian */
#define MAX_HEADER   100000000u
#define MAX_TENSORS  1000000u
#define CHUNK_BYTES  32768u

struct clmoe_tensors {
    char *path;
    /* The file is opened anew for each call: a model may have more of them than a process may. */
    dev_t device;
    ino_t inode;
    uint64_t file_bytes, data_begin;
    st_tensor
        *tensors; /* sorted by name; each name is a block of its own with the type's name behind */
    size_t count;
};

/* Element sizes of the types of the format; a type not listed here has a size we do not know. */
static const struct {
    const char *name;
    st_type type;
    uint32_t bytes;
} types[] = {{"F64", ST_F64, 8},      {"F32", ST_F32, 4},       {"F16", ST_F16, 2},
             {"BF16", ST_BF16, 2},    {"I64", ST_I64, 8},       {"I32", ST_I32, 4},
             {"U8", ST_U8, 1},        {"I16", ST_OTHER, 2},     {"I8", ST_OTHER, 1},
             {"U16", ST_OTHER, 2},    {"U32", ST_OTHER, 4},     {"U64", ST_OTHER, 8},
             {"BOOL", ST_OTHER, 1},   {"F8_E4M3", ST_OTHER, 1}, {"F8_E5M2", ST_OTHER, 1},
             {"F8_E8M0", ST_OTHER, 1}};

static uint32_t dtype_bytes(const char *name, st_type *type) {
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (strcmp(types[i].name, name) == 0) {
            *type = types[i].type;
            return types[i].bytes;
        }
    *type = ST_OTHER;
    return 0;
}

/* ---- Reading ------------------------------------------------------------------------------- */

/* Reads exactly `count` bytes at `offset`, which the file had when it was opened. */
static clmoe_status read_at(const safetensors *file, int fd, uint64_t offset, size_t count,
                            void *out) {
    char *at = out;
    while (count > 0) {
        ssize_t got = pread(fd, at, count, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return fail(CLMOE_IO, "%s: cannot be read: %s", file->path, strerror(errno));
        if (got == 0)
            return fail(CLMOE_BAD_FILE,
                        "%s: ends at byte %" PRIu64 ", but had %" PRIu64
                        " bytes when it was opened",
                        file->path, offset, file->file_bytes);
        at += got;
        offset += (uint64_t)got;
        count -= (size_t)got;
    }
    return CLMOE_SUCCESS;
}

static uint64_t little_endian(const unsigned char *bytes, uint32_t count) {
    uint64_t value = 0;
    for (uint32_t i = 0; i < count; i++)
        value |= (uint64_t)bytes[i] << (8 * i);
    return value;
}

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float element_as_f32(st_type type, const unsigned char *bytes) {
    if (type == ST_F32)
        return float_of_bits((uint32_t)little_endian(bytes, 4));
    if (type == ST_F16)
        return f32_of_f16((uint16_t)little_endian(bytes, 2));
    if (type == ST_BF16)
        return float_of_bits((uint32_t)little_endian(bytes, 2) << 16);
    uint64_t bits = little_endian(bytes, 8);
    double value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

static clmoe_status read_elements(const safetensors *file, int fd, const st_tensor *tensor,
                                  uint64_t first, size_t count, float *out) {
    st_type type;
    uint32_t size = dtype_bytes(tensor->type_name, &type);
    uint64_t at = tensor->begin + first * size;
    unsigned char chunk[CHUNK_BYTES];
    while (count > 0) {
        size_t now = count < CHUNK_BYTES / size ? count : CHUNK_BYTES / size;
        clmoe_status status = read_at(file, fd, at, now * size, chunk);
        if (status != CLMOE_SUCCESS)
            return status;
        for (size_t i = 0; i < now; i++)
            *out++ = element_as_f32(type, chunk + i * size);
        at += now * size;
        count -= now;
    }
    return CLMOE_SUCCESS;
}

/* CLMOE_BAD_FILE if the path leads to another file than when its header was read. */
static clmoe_status open_again(const safetensors *file, int *fd) {
    struct stat info;
    clmoe_status status = file_open(file->path, fd, &info);
    if (status != CLMOE_SUCCESS)
        return status;
    if (info.st_dev != file->device || info.st_ino != file->inode)
        return fail(CLMOE_BAD_FILE, "%s: is another file than when it was opened", file->path);
    return CLMOE_SUCCESS;
}

clmoe_status safetensors_read_f32(const safetensors *file, const st_tensor *tensor, uint64_t first,
                                  size_t count, float *out) {
    if (tensor->type > ST_BF16)
        return fail(
            CLMOE_UNSUPPORTED,
            "%s: tensor '%s' has dtype %s; only F32, F16, BF16 and F64 can be read as floats",
            file->path, tensor->name, tensor->type_name);
    if (first > tensor->elements || count > tensor->elements - first)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "%s: tensor '%s' has %" PRIu64
                    " elements, but %zu were asked for from %" PRIu64,
                    file->path, tensor->name, tensor->elements, count, first);
    clmoe_status status = CLMOE_SUCCESS;
    int fd;
    TRY(open_again(file, &fd));
    TRY(read_elements(file, fd, tensor, first, count, out));
done:
    if (fd >= 0)
        close(fd);
    return status;
}

clmoe_status safetensors_read_bytes(const safetensors *file, const st_tensor *tensor,
                                    uint64_t first, size_t count, void *out) {
    if (first > tensor->bytes || count > tensor->bytes - first)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "%s: tensor '%s' has %" PRIu64 " bytes, but %zu were asked for from %" PRIu64,
                    file->path, tensor->name, tensor->bytes, count, first);
    clmoe_status status = CLMOE_SUCCESS;
    int fd;
    TRY(open_again(file, &fd));
    TRY(read_at(file, fd, tensor->begin + first, count, out));
done:
    if (fd >= 0)
        close(fd);
    return status;
}

/* ---- The header ---------------------------------------------------------------------------- */

/* A non-negative integer of the header; -1 for anything else. */
static int64_t natural(const json_t *value) {
    return json_is_integer(value) && json_integer_value(value) >= 0 ? json_integer_value(value)
                                                                    : -1;
}

static clmoe_status parse_shape(const safetensors *file, const json_t *shape, st_tensor *tensor) {
    if (!json_is_array(shape))
        return fail(CLMOE_BAD_FILE, "%s: tensor '%s' has no shape, or one that is not an array",
                    file->path, tensor->name);
    if (json_array_size(shape) > ST_MAX_RANK)
        return fail(CLMOE_BAD_FILE,
                    "%s: tensor '%s': its shape has %zu dimensions, at most %d are allowed",
                    file->path, tensor->name, json_array_size(shape), ST_MAX_RANK);
    tensor->rank = (uint32_t)json_array_size(shape);
    size_t elements = 1;
    for (uint32_t i = 0; i < tensor->rank; i++) {
        int64_t dim = natural(json_array_get(shape, i));
        if (dim < 0)
            return fail(CLMOE_BAD_FILE,
                        "%s: tensor '%s': dimension %u of its shape is not a natural number",
                        file->path, tensor->name, i);
        tensor->shape[i] = (uint64_t)dim;
        if (!size_mul(elements, (size_t)dim, &elements))
            return fail(CLMOE_BAD_FILE,
                        "%s: tensor '%s': its shape has more elements than fit 64 bits", file->path,
                        tensor->name);
    }
    tensor->elements = elements;
    return CLMOE_SUCCESS;
}

static clmoe_status parse_offsets(const safetensors *file, const json_t *offsets,
                                  st_tensor *tensor) {
    int64_t begin = natural(json_array_get(offsets, 0)), end = natural(json_array_get(offsets, 1));
    if (json_array_size(offsets) != 2 || begin < 0 || end < 0)
        return fail(CLMOE_BAD_FILE,
                    "%s: tensor '%s': data_offsets is not a pair of natural numbers", file->path,
                    tensor->name);
    if (begin > end)
        return fail(CLMOE_BAD_FILE,
                    "%s: tensor '%s': data_offsets begin at %" PRId64 ", after their end %" PRId64,
                    file->path, tensor->name, begin, end);
    uint64_t data_bytes = file->file_bytes - file->data_begin;
    if ((uint64_t)end > data_bytes)
        return fail(CLMOE_BAD_FILE,
                    "%s: tensor '%s': bytes [%" PRId64 ", %" PRId64
                    ") pass the end of the data (%" PRIu64 ")",
                    file->path, tensor->name, begin, end, data_bytes);
    tensor->begin = file->data_begin + (uint64_t)begin;
    tensor->bytes = (uint64_t)(end - begin);
    return CLMOE_SUCCESS;
}

/* Stores name and type name in one block, which tensor->name owns. */
static clmoe_status copy_names(const char *name, const char *type, st_tensor *tensor) {
    size_t name_bytes = strlen(name) + 1, type_name_bytes = strlen(type) + 1;
    char *names = malloc(name_bytes + type_name_bytes);
    if (names == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "no memory for the name of tensor '%s'", name);
    memcpy(names, name, name_bytes);
    memcpy(names + name_bytes, type, type_name_bytes);
    tensor->name = names;
    tensor->type_name = names + name_bytes;
    return CLMOE_SUCCESS;
}

static clmoe_status parse_tensor(const safetensors *file, const char *name, const json_t *entry,
                                 st_tensor *tensor) {
    clmoe_status status = CLMOE_SUCCESS;
    const json_t *dtype = json_object_get(entry, "dtype");
    const char *type = json_string_value(dtype);
    if (type == NULL || strlen(type) != json_string_length(dtype))
        return fail(CLMOE_BAD_FILE, "%s: tensor '%s' has no dtype", file->path, name);
    TRY(copy_names(name, type, tensor));
    TRY(parse_shape(file, json_object_get(entry, "shape"), tensor));
    TRY(parse_offsets(file, json_object_get(entry, "data_offsets"), tensor));
    size_t bytes, element = dtype_bytes(type, &tensor->type);
    if (element == 0)
        goto done;
    if (!size_mul((size_t)tensor->elements, element, &bytes) || bytes != tensor->bytes)
        TRY(fail(CLMOE_BAD_FILE,
                 "%s: tensor '%s': %" PRIu64 " elements of %s do not fill its %" PRIu64 " bytes",
                 file->path, name, tensor->elements, type, tensor->bytes));
done:
    return status;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const st_tensor *)a)->name, ((const st_tensor *)b)->name);
}

static int by_begin(const void *a, const void *b) {
    const st_tensor *left = a, *right = b;
    if (left->begin != right->begin)
        return left->begin < right->begin ? -1 : 1;
    return (left->bytes > right->bytes) - (left->bytes < right->bytes);
}

/* Sorts by place and finds tensors that share bytes; ends sorted by name. */
static clmoe_status check_overlaps(const safetensors *file) {
    st_tensor *tensors = file->tensors;
    if (file->count == 0)
        return CLMOE_SUCCESS;
    qsort(tensors, file->count, sizeof tensors[0], by_begin);
    const st_tensor *last = &tensors[0]; /* the one that reaches furthest so far */
    for (size_t i = 1; i < file->count; i++) {
        if (tensors[i].bytes > 0 && last->begin + last->bytes > tensors[i].begin)
            return fail(CLMOE_BAD_FILE, "%s: tensors '%s' and '%s' overlap", file->path, last->name,
                        tensors[i].name);
        if (tensors[i].bytes > 0)
            last = &tensors[i];
    }
    qsort(tensors, file->count, sizeof tensors[0], by_name);
    return CLMOE_SUCCESS;
}

static clmoe_status parse_header(safetensors *file, json_t *header) {
    if (!json_is_object(header))
        return fail(CLMOE_BAD_FILE, "%s: the header is not a JSON object", file->path);
    if (json_object_size(header) > MAX_TENSORS)
        return fail(CLMOE_BAD_FILE, "%s: the header has %zu entries, at most %u are allowed",
                    file->path, json_object_size(header), MAX_TENSORS);
    file->tensors = calloc(json_object_size(header) + 1, sizeof file->tensors[0]);
    if (file->tensors == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "%s: no memory for its list of tensors", file->path);
    const char *name;
    json_t *entry;
    json_object_foreach(header, name, entry) {
        bool metadata = strcmp(name, "__metadata__") == 0;
        if (!json_is_object(entry) && !(metadata && json_is_null(entry)))
            return fail(CLMOE_BAD_FILE, "%s: the header's entry '%s' is not an object", file->path,
                        name);
        if (metadata)
            continue;
        clmoe_status status = parse_tensor(file, name, entry, &file->tensors[file->count++]);
        if (status != CLMOE_SUCCESS)
            return status;
    }
    return check_overlaps(file);
}

/* Reads the header's length and checks it against the file and the limit. */
static clmoe_status header_length(safetensors *file, int fd, size_t *length) {
    unsigned char bytes[LENGTH_BYTES];
    if (file->file_bytes < LENGTH_BYTES)
        return fail(CLMOE_BAD_FILE,
                    "%s: has %" PRIu64 " bytes, fewer than the 8 of a header's length", file->path,
                    file->file_bytes);
    clmoe_status status = read_at(file, fd, 0, LENGTH_BYTES, bytes);
    if (status != CLMOE_SUCCESS)
        return status;
    uint64_t value = little_endian(bytes, LENGTH_BYTES);
    if (value > MAX_HEADER)
        return fail(CLMOE_BAD_FILE,
                    "%s: the header's length %" PRIu64 " is over the limit of %u bytes", file->path,
                    value, MAX_HEADER);
    if (value > file->file_bytes - LENGTH_BYTES)
        return fail(CLMOE_BAD_FILE,
                    "%s: the header's length %" PRIu64 " passes the end of the file (%" PRIu64
                    " bytes)",
                    file->path, value, file->file_bytes);
    *length = (size_t)value;
    file->data_begin = LENGTH_BYTES + value;
    return CLMOE_SUCCESS;
}

static clmoe_status read_header(safetensors *file, int fd) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t length = 0;
    char *text = NULL;
    json_t *header = NULL;
    json_error_t error;
    TRY(header_length(file, fd, &length));
    text = malloc(length + 1);
    if (text == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "%s: no memory for a header of %zu bytes", file->path,
                 length));
    TRY(read_at(file, fd, LENGTH_BYTES, length, text));
    header = json_loadb(text, length, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    if (header == NULL)
        TRY(json_out_of_memory(&error)
                ? fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to read its header", file->path)
                : fail(CLMOE_BAD_FILE, "%s: the header is not JSON: %s", file->path, error.text));
    TRY(parse_header(file, header));
done:
    json_decref(header);
    free(text);
    return status;
}

/* ---- Opening ------------------------------------------------------------------------------- */

clmoe_status safetensors_open(const char *path, safetensors **out) {
    clmoe_status status = CLMOE_SUCCESS;
    struct stat info;
    int fd = -1;
    *out = NULL;
    safetensors *file = calloc(1, sizeof *file);
    if (file == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to open it", path);
    file->path = malloc(strlen(path) + 1);
    if (file->path == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to open it", path));
    strcpy(file->path, path);
    TRY(file_open(file->path, &fd, &info));
    file->device = info.st_dev;
    file->inode = info.st_ino;
    file->file_bytes = (uint64_t)info.st_size;
    TRY(read_header(file, fd));
    *out = file;
    file = NULL;
done:
    if (fd >= 0)
        close(fd);
    safetensors_close(file);
    return status;
}

void safetensors_close(safetensors *file) {
    if (file == NULL)
        return;
    for (size_t i = 0; i < file->count; i++)
        free((char *)file->tensors[i].name);
    free(file->tensors);
    free(file->path);
    free(file);
}

const char *safetensors_path(const safetensors *file) {
    return file->path;
}

size_t safetensors_count(const safetensors *file) {
    return file->count;
}

const st_tensor *safetensors_at(const safetensors *file, size_t index) {
    return &file->tensors[index];
}

const st_tensor *safetensors_find(const safetensors *file, const char *name) {
    st_tensor key = {.name = name};
    return bsearch(&key, file->tensors, file->count, sizeof key, by_name);
}

void safetensors_names(const safetensors *file, char *text, size_t size) {
    const size_t tail = sizeof " and 1000000 more";
    size_t used = 0, i = 0;
    snprintf(text, size, "no tensors");
    for (; i < file->count; i++) {
        size_t length = strlen(file->tensors[i].name) + 2;
        if (used + length + tail > size)
            break;
        used += (size_t)snprintf(text + used, size - used, "%s%s", i ? ", " : "",
                                 file->tensors[i].name);
    }
    if (i < file->count)
        snprintf(text + used, size - used, "%s%zu %s", i ? " and " : "", file->count - i,
                 i ? "more" : "tensors");
}

void safetensors_print_shape(uint32_t rank, const uint64_t *shape, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (uint32_t i = 0; i < rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRIu64, i ? ", " : "", shape[i]);
}
