/*
 * safetensors files: a JSON header of names, types, shapes and byte ranges, then the bytes.
 * Nothing in a file is trusted: sizes are capped, ranges checked, reads go through pread().
 */
#ifndef CLMOE_SAFETENSORS_H
#define CLMOE_SAFETENSORS_H

#include "runtime/status.h"

#include <stdbool.h>

#define ST_MAX_RANK 8

typedef enum st_type { ST_F64, ST_F32, ST_F16, ST_BF16, ST_I64, ST_I32, ST_U8, ST_OTHER } st_type;

typedef struct st_tensor {
    const char *name;
    st_type type;
    const char *type_name; /* as in the file: "BF16" */
    uint32_t rank;
    uint64_t shape[ST_MAX_RANK];
    uint64_t elements;
    uint64_t begin, bytes; /* byte range in the file */
} st_tensor;

typedef clmoe_tensors safetensors;

/* Opens and checks `path`. Errors: CLMOE_IO, CLMOE_BAD_FILE, naming file and tensor. */
clmoe_status safetensors_open(const char *path, safetensors **out);
void safetensors_close(safetensors *file);

const char *safetensors_path(const safetensors *file);
size_t safetensors_count(const safetensors *file);
const st_tensor *safetensors_at(const safetensors *file, size_t index);
const st_tensor *safetensors_find(const safetensors *file, const char *name); /* or NULL */

/* For sentences: "a, b, c and 12 more", as many names as fit, or "no tensors". */
void safetensors_names(const safetensors *file, char *text, size_t size);

/* Elements [first, first + count) as f32; F32, F16, BF16 and F64 tensors, else CLMOE_UNSUPPORTED.
 */
clmoe_status safetensors_read_f32(const safetensors *file, const st_tensor *tensor, uint64_t first,
                                  size_t count, float *out);

/* Bytes [first, first + count) of a tensor of any type. */
clmoe_status safetensors_read_bytes(const safetensors *file, const st_tensor *tensor,
                                    uint64_t first, size_t count, void *out);

/* "2, 3" of [2,3], as far as `size` bytes hold it. */
void safetensors_print_shape(uint32_t rank, const uint64_t *shape, char *text, size_t size);

#endif
