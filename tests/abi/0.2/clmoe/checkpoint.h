/*
 * clmoe, checkpoints: a layer and its weights from a model directory. Part of clmoe.h, which
 * includes it.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef CLMOE_PUBLIC_CHECKPOINT_H
#define CLMOE_PUBLIC_CHECKPOINT_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/*
 * A model directory: config.json and model.safetensors, or model.safetensors.index.json and its
 * shards. The index alone says which tensors there are, and where; a model.safetensors beside
 * an index that does not name it is an error. Nothing is guessed silently: a tensor under the
 * block, or a field of config.json that may be of it, that nothing consumed is an error that names
 * it, and so are a field that the file has twice, and one beside the text model's object that says
 * something else; a model_type that clmoe has no rules for needs the caller's assumption.
 */
typedef struct clmoe_checkpoint clmoe_checkpoint;

typedef struct clmoe_checkpoint_options {
    size_t struct_size; /* set by clmoe_checkpoint_options_init() */
    /*
     * For a model_type that is not known, and refused without: one that is, whose rules are taken,
     * or "pattern": those that the names of tensors and fields point to. NULL (default): none.
     */
    const char *assume;
} clmoe_checkpoint_options;

/* Sets the defaults, all of which are 0, and struct_size. */
static inline void clmoe_checkpoint_options_init(clmoe_checkpoint_options *options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/*
 * Opens a directory; reads config.json and all headers, no tensor data. `options` may be NULL.
 * Errors: CLMOE_IO, CLMOE_BAD_FILE, with a sentence that names the file and the field;
 * CLMOE_UNSUPPORTED for a model_type that is not known, or a quantised model;
 * CLMOE_INVALID_ARGUMENT for an assumption that names no family, or another than a known one, and
 * for a directory of no name.
 */
CLMOE_API clmoe_status clmoe_checkpoint_open(const char *directory,
                                             const clmoe_checkpoint_options *options,
                                             clmoe_checkpoint **out);

CLMOE_API void clmoe_checkpoint_close(clmoe_checkpoint *checkpoint);

/* config.json's model_type. Valid as long as the checkpoint. */
CLMOE_API const char *clmoe_checkpoint_model_type(const clmoe_checkpoint *checkpoint);

/*
 * What the block of layer `layer` is taken for, if the model_type is not known: one that is, or
 * "pattern" where only the fields decide. NULL if it is known, or the layer has no block.
 */
CLMOE_API const char *clmoe_checkpoint_assumed(const clmoe_checkpoint *checkpoint, uint32_t layer);

/*
 * clmoe_checkpoint_layer() for a struct of `struct_size` bytes; CLMOE_UNSUPPORTED too if the block
 * needs a field that it does not have.
 */
CLMOE_API clmoe_status clmoe_checkpoint_layer_sized(const clmoe_checkpoint *checkpoint,
                                                    uint32_t layer, clmoe_layer_desc *desc,
                                                    size_t struct_size);

/*
 * Fills `desc` with the MoE block of layer `layer` (0-based). Callers may then set engine,
 * capacity, training and the storage types. Errors: CLMOE_BAD_FILE, CLMOE_UNSUPPORTED for a feature
 * clmoe lacks, by name.
 */
static inline clmoe_status clmoe_checkpoint_layer(const clmoe_checkpoint *checkpoint,
                                                  uint32_t layer, clmoe_layer_desc *desc) {
    return clmoe_checkpoint_layer_sized(checkpoint, layer, desc, sizeof *desc);
}

/*
 * Creates the weight buffers of the block in `context` and writes them through `queue`; returns
 * when they are written, rounded to desc's types. `desc` is what clmoe_checkpoint_layer() filled.
 * The buffers are yours: release them with clmoe_weights_release(). On error nothing is left
 * allocated.
 *
 * Errors: CLMOE_INVALID_ARGUMENT for a desc of other sizes, layouts or biases, and for a queue of
 * another context than `context`; CLMOE_INVALID_DESC for types that do not exist; those of
 * clmoe_checkpoint_layer(); CLMOE_IO; and, before any buffer is made, CLMOE_UNSUPPORTED with
 * weight, size and limit where one is more than the queue's device allows per buffer
 * (CL_DEVICE_MAX_MEM_ALLOC_SIZE), or all of them more than it has. A field of clmoe_weights is one
 * buffer, with the matrices of all experts; several buffers for one field are not supported yet.
 */
CLMOE_API clmoe_status clmoe_checkpoint_upload(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                               const clmoe_layer_desc *desc, cl_context context,
                                               cl_command_queue queue, clmoe_weights *weights);

#ifdef __cplusplus
}
#endif

#endif
