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

struct clmoe_gradients; /* see backward.h */

/*
 * Whether coded matrices of experts (FP8, MXFP4) may be decoded at upload, and to what. A layer
 * that has some is then described with that weight_type; one that has none is as without.
 */
typedef uint32_t clmoe_decode;
enum {
    CLMOE_DECODE_NO = 0, /* such a layer is refused, by the name of the tensor */
    CLMOE_DECODE_F32 = 1,
    CLMOE_DECODE_F16 = 2,
    CLMOE_DECODE_BF16 = 3,
};

typedef struct clmoe_checkpoint_options {
    size_t struct_size; /* set by clmoe_checkpoint_options_init() */
    /*
     * For a model_type that is not known, and refused without: one that is, whose rules are taken,
     * or "pattern": those that the names of tensors and fields point to. NULL (default): none.
     */
    const char *assume;
    clmoe_decode decode; /* default CLMOE_DECODE_NO */
    uint32_t reserved;   /* 0 */
} clmoe_checkpoint_options;

/* Sets the defaults, all of which are 0, and struct_size. */
static inline void clmoe_checkpoint_options_init(clmoe_checkpoint_options *options) {
    memset(options, 0, sizeof *options);
    options->struct_size = sizeof *options;
}

/*
 * Opens a directory; reads config.json and all headers, no tensor data. `options` may be NULL.
 * Errors: CLMOE_IO, CLMOE_BAD_FILE, with a sentence that names the file and the field;
 * CLMOE_UNSUPPORTED for a model_type that is not known;
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
 * How matrices of layer `layer` are coded in the files: "FP8" or "MXFP4", that of the first. NULL
 * if none is, or the layer cannot be described with the checkpoint's options.
 */
CLMOE_API const char *clmoe_checkpoint_coded(const clmoe_checkpoint *checkpoint, uint32_t layer);

/*
 * clmoe_checkpoint_layer() for a struct of `struct_size` bytes; CLMOE_UNSUPPORTED too if the block
 * needs a field that it does not have.
 */
CLMOE_API clmoe_status clmoe_checkpoint_layer_sized(const clmoe_checkpoint *checkpoint,
                                                    uint32_t layer, clmoe_layer_desc *desc,
                                                    size_t struct_size);

/*
 * Fills `desc` with the MoE block of layer `layer` (0-based). Callers may then set engine,
 * capacity, training and the storage types, but for the weight_type of a coded layer. Errors:
 * CLMOE_BAD_FILE, CLMOE_UNSUPPORTED for a feature clmoe lacks, by name, and for coded weights
 * unless options.decode allows to decode them.
 */
static inline clmoe_status clmoe_checkpoint_layer(const clmoe_checkpoint *checkpoint,
                                                  uint32_t layer, clmoe_layer_desc *desc) {
    return clmoe_checkpoint_layer_sized(checkpoint, layer, desc, sizeof *desc);
}

/*
 * Creates the weight buffers of the block in `context` and writes them through `queue`; returns
 * when they are written, decoded and rounded to desc's types. `desc` is what
 * clmoe_checkpoint_layer() filled. The buffers are yours: release them with
 * clmoe_weights_release(). On error nothing is left allocated.
 *
 * Errors: CLMOE_INVALID_ARGUMENT for a desc of other sizes, layouts or biases, for coded weights
 * with another weight_type than options.decode allows, and for a queue of another context than
 * `context`; CLMOE_INVALID_DESC for types that do not exist; those of
 * clmoe_checkpoint_layer(); CLMOE_IO; and, before any buffer is made, CLMOE_UNSUPPORTED with
 * weight, size and limit where one is more than the queue's device allows per buffer
 * (CL_DEVICE_MAX_MEM_ALLOC_SIZE), or all of them more than it has. A field of clmoe_weights is one
 * buffer, with the matrices of all experts; several buffers for one field are not supported yet.
 */
CLMOE_API clmoe_status clmoe_checkpoint_upload(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                               const clmoe_layer_desc *desc, cl_context context,
                                               cl_command_queue queue, clmoe_weights *weights);

/* A tensor of the block that gets a gradient, or a piece of its gradient. */
typedef struct clmoe_parameter {
    const char *name; /* in the model's files; valid as long as the checkpoint */
    uint32_t rank;
    const uint64_t *shape; /* [rank], as in the file; of a coded matrix that of its numbers */
    uint64_t elements;     /* the product of the shape */
    /* Elements [first, first + count) of the gradient, row-major; NULL: no values were asked for.
     */
    uint64_t first;
    size_t count;
    const float *values;
} clmoe_parameter;

/*
 * Called with one piece after another: those of a tensor come together and in order. `parameter` is
 * valid during the call. Anything but CLMOE_SUCCESS ends the walk.
 */
typedef clmoe_status (*clmoe_parameter_visitor)(void *user, const clmoe_parameter *parameter);

/*
 * The counterpart of clmoe_checkpoint_upload(): reads gradients back through `queue`, after what
 * was enqueued if it is in-order, and hands them out tensor by tensor, under the names, in the
 * shapes and in the layouts of the model's files, as f32. Blocks until the last call of `visit`.
 * `desc` is that of the layer, from clmoe_checkpoint_layer(). Gradients that are {NULL, 0} are left
 * out, and so are tensors that never get one: selection biases. `gradients` NULL: names and shapes
 * of all that can get one, each once; `queue` may then be NULL too.
 *
 * Errors: CLMOE_INVALID_ARGUMENT for a desc of other sizes, layouts or biases, and for a buffer
 * that is too small; CLMOE_INVALID_DESC for types that do not exist; those of
 * clmoe_checkpoint_layer(); and what `visit` returned.
 */
CLMOE_API clmoe_status clmoe_checkpoint_gradients(const clmoe_checkpoint *checkpoint,
                                                  uint32_t layer, const clmoe_layer_desc *desc,
                                                  cl_command_queue queue,
                                                  const struct clmoe_gradients *gradients,
                                                  clmoe_parameter_visitor visit, void *user);

#ifdef __cplusplus
}
#endif

#endif
