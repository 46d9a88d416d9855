/*
 * clmoe, what programs around a layer need on the host: storage types, safetensors files, text of
 * files. Part of clmoe.h, which includes it. No device is needed.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef CLMOE_HOST_H
#define CLMOE_HOST_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Storage types ------------------------------------------------------------------------- */

/* Bytes of an element: 4 or 2; 0 for what is no type. */
CLMOE_API size_t clmoe_type_size(clmoe_type type);

/* n floats -> n elements, to nearest even. `out` may be `values`. */
CLMOE_API void clmoe_type_encode(clmoe_type type, const float *values, size_t n, void *out);

/* n elements -> n floats. */
CLMOE_API void clmoe_type_decode(clmoe_type type, const void *elements, size_t n, float *out);

/* ---- Files --------------------------------------------------------------------------------- */

/*
 * A safetensors file, opened for reading. Nothing in it is trusted: sizes are capped and ranges
 * checked. Tensors may be read by several threads at once.
 */
typedef struct clmoe_tensors clmoe_tensors;

/*
 * Opens and checks the header. Errors: CLMOE_IO, CLMOE_BAD_FILE, naming file and tensor;
 * CLMOE_INVALID_ARGUMENT for a path of no name.
 */
CLMOE_API clmoe_status clmoe_tensors_open(const char *path, clmoe_tensors **out);

/* NULL is allowed. */
CLMOE_API void clmoe_tensors_close(clmoe_tensors *tensors);

/* The path it was opened by. Valid until it is closed. */
CLMOE_API const char *clmoe_tensors_path(const clmoe_tensors *tensors);

#define CLMOE_TENSOR_RANK 8 /* the most */

/*
 * The shape of tensor `name`: shape[0] to shape[*rank - 1]. Their product fits uint64_t. Errors:
 * CLMOE_BAD_FILE if there is no such tensor; the sentence has names of those that there are.
 */
CLMOE_API clmoe_status clmoe_tensors_shape(const clmoe_tensors *tensors, const char *name,
                                           uint32_t *rank, uint64_t shape[CLMOE_TENSOR_RANK]);

/*
 * Elements [first, first + count) of tensor `name`, row-major, as f32. Errors: those of
 * clmoe_tensors_shape(); CLMOE_INVALID_ARGUMENT past its end; CLMOE_UNSUPPORTED for a type other
 * than F32, F16, BF16 and F64; CLMOE_IO.
 */
CLMOE_API clmoe_status clmoe_tensors_read(const clmoe_tensors *tensors, const char *name,
                                          uint64_t first, size_t count, float *out);

/* ---- Text ---------------------------------------------------------------------------------- */

/*
 * Copies text of a file, such as clmoe_checkpoint_model_type(), as much as fits in `size` bytes, to
 * be printed: each byte of control characters, of marks that turn the direction of text, and of
 * what is not UTF-8 becomes \xNN, so that a name can neither move the cursor nor fake lines.
 * clmoe_last_error() is made so.
 */
CLMOE_API void clmoe_printable(const char *text, char *out, size_t size);

#ifdef __cplusplus
}
#endif

#endif
