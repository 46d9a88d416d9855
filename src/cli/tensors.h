/* The tensors a run reads and compares. */
#ifndef CLMOE_CLI_TENSORS_H
#define CLMOE_CLI_TENSORS_H

#include "io/safetensors.h"

/*
 * Reads tensor `name`, [T,D] or [B,S,D] with T = B*S, as f32 to be freed. Errors name the file, the
 * tensor and the shape.
 */
clmoe_status rows_read(const safetensors *file, const char *name, uint32_t dim, uint32_t *tokens,
                       float **rows);

/* ||y - expect|| / ||expect|| in double; 0 if both are zero. NaN if a value is. */
double relative_error(const float *y, const float *expect, size_t count);

#endif
