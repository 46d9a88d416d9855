/* The tensors a run reads and compares. */
#ifndef CLMOE_CLI_TENSORS_H
#define CLMOE_CLI_TENSORS_H

#include "error.h"

#include <stdbool.h>
#include <stdio.h>

/* Dimensions, the last one contiguous. */
typedef struct tensor_shape {
    uint32_t rank;
    uint64_t dims[CLMOE_TENSOR_RANK];
} tensor_shape;

/* The product of the dimensions, which must fit. */
uint64_t shape_elements(const tensor_shape *shape);

/*
 * Reads tensor `name`, [T,D] or [B,S,D] with T = B*S, as f32 to be freed. Errors name the file, the
 * tensor and the shape.
 */
clmoe_status rows_read(const clmoe_tensors *file, const char *name, uint32_t dim, uint32_t *tokens,
                       float **rows);

/* Sums over the pieces of a tensor, from {0}; error_of() is relative_error() of all of it. */
typedef struct error_sums {
    double difference, size;
} error_sums;

void error_add(error_sums *sums, const float *y, const float *expect, size_t count);
double error_of(const error_sums *sums);

/* ||y - expect|| / ||expect|| in double; 0 if both are zero. NaN if a value is. */
double relative_error(const float *y, const float *expect, size_t count);

/* *has: whether the file has a tensor of that name; an error if it has another shape. */
clmoe_status tensor_find(const clmoe_tensors *file, const char *name, const tensor_shape *shape,
                         bool *has);

/* What a safetensors file says of an F32 tensor. */
typedef struct tensor_entry {
    const char *name;
    tensor_shape shape;
} tensor_entry;

/*
 * Writes the head of a safetensors file of these tensors to `stream`; their values follow in that
 * order by tensors_append(). `path` is for sentences.
 */
clmoe_status tensors_begin(FILE *stream, const char *path, const tensor_entry *entries,
                           size_t count);
clmoe_status tensors_append(FILE *stream, const char *path, const float *values, size_t count);

/* Writes one F32 tensor [rows, cols] as a safetensors file to `stream`; `path` is for sentences. */
clmoe_status tensor_write(FILE *stream, const char *path, const char *name, uint64_t rows,
                          uint64_t cols, const float *values);

/* "f32", "f16", "bf16" */
const char *dtype_name(clmoe_type type);

#endif
