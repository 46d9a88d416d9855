/* Where the tensors of a block lie in the buffers of clmoe_weights, whichever way they are copied.
 */
#ifndef CLMOE_PLACES_H
#define CLMOE_PLACES_H

#include "checkpoint.h"

/* A tensor's place: its elements, from the first, lie in `buf` from element `at`. */
typedef struct tensor_place {
    const file_tensor *tensor;
    clmoe_type type; /* of the buffer's elements */
    const clmoe_buf *buf;
    uint64_t at;
} tensor_place;

/* What is done with them. An error ends the walk. */
typedef struct place_visitor {
    /* A buffer that the block has, of so many elements, before its tensors. */
    clmoe_status (*buffer)(void *user, clmoe_type type, uint64_t elements, clmoe_buf *buf);
    clmoe_status (*tensor)(void *user, const tensor_place *place);
    void *user;
} place_visitor;

/* All tensors of a block, buffer by buffer. `desc` has the types; the buffers are those of `w`. */
clmoe_status block_places(const block *b, const clmoe_layer_desc *desc, clmoe_weights *w,
                          const place_visitor *visitor);

/* The name of a buffer of `w`: "experts.gate". */
const char *place_name(const clmoe_weights *w, const clmoe_buf *buf);

/*
 * Takes the caller's descriptor into `own` and finds the block of `layer`, to be released also on
 * an error. CLMOE_INVALID_ARGUMENT if that descriptor is of other buffers than the file's,
 * CLMOE_INVALID_DESC for types that weights are not stored in.
 */
clmoe_status block_open(const clmoe_checkpoint *checkpoint, uint32_t layer,
                        const clmoe_layer_desc *desc, clmoe_layer_desc *own, block *b);

#endif
