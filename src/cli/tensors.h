/* The tensors a run reads and compares. */
#ifndef CLMOE_CLI_TENSORS_H
#define CLMOE_CLI_TENSORS_H

#include "error.h"

#include <stdio.h>

/*
 * Reads tensor `name`, [T,D] or [B,S,D] with T = B*S, as f32 to be freed. Errors name the file, the
 * tensor and the shape.
 */
clmoe_status rows_read(const clmoe_tensors *file, const char *name, uint32_t dim, uint32_t *tokens,
                       float **rows);

/* ||y - expect|| / ||expect|| in double; 0 if both are zero. NaN if a value is. */
double relative_error(const float *y, const float *expect, size_t count);

/* Writes one F32 tensor [rows, cols] as a safetensors file to `stream`; `path` is for sentences. */
clmoe_status tensor_write(FILE *stream, const char *path, const char *name, uint64_t rows,
                          uint64_t cols, const float *values);

/* "f32", "f16", "bf16" */
const char *dtype_name(clmoe_type type);

#endif
