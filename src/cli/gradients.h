/* The gradients of a block, as tensors under the names of the model's files. */
#ifndef CLMOE_CLI_GRADIENTS_H
#define CLMOE_CLI_GRADIENTS_H

#include "output.h"
#include "tensors.h"

/* What clmoe_backward() gave. */
typedef struct gradient_source {
    const clmoe_checkpoint *checkpoint;
    uint32_t layer;
    const clmoe_layer_desc *desc;
    cl_command_queue queue;
    const clmoe_gradients *gradients;
    const char *dx_name;
    const float *dx; /* [tokens,D] */
    uint32_t tokens;
} gradient_source;

/* dx, then "grad.NAME" of every tensor NAME that has a gradient. Start from {0}. */
typedef struct gradient_list {
    tensor_entry *entries;
    size_t count;
} gradient_list;

clmoe_status gradient_list_make(const gradient_source *source, gradient_list *list);
void gradient_list_free(gradient_list *list);

/* Writes all of them to a safetensors file. */
clmoe_status gradients_write(const gradient_source *source, const gradient_list *list, output *to);

/* How they differ from those of a file. */
typedef struct gradient_errors {
    size_t tensors, compared; /* of the list, and those that the file has too */
    const char *worst;        /* the name of the one furthest off; of the list */
    double error;             /* its: see relative_error() */
} gradient_errors;

/* Compares with the tensors of `file`, which must have dx and at least one more. */
clmoe_status gradients_compare(const gradient_source *source, const gradient_list *list,
                               const clmoe_tensors *file, gradient_errors *errors);

/*
 * The name of dx where dy has the name `dy`: "block.dx" for "block.dy", "dx" for "dy"; to be freed.
 * NULL if `dy` does not end so, or without memory.
 */
char *dx_name_for(const char *dy);

#endif
