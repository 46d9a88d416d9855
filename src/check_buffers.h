/* What the argument checks of the public calls share. */
#ifndef CLMOE_CHECK_BUFFERS_H
#define CLMOE_CHECK_BUFFERS_H

#include "check.h"
#include "workspace.h"

/* Bytes of rows x columns elements; saturates, and no buffer is that large. */
size_t bytes_of(size_t rows, size_t columns, size_t element);

/* One buffer argument: what it must hold. */
typedef struct buffer_need {
    const char *name;
    const clmoe_buf *buf;
    size_t bytes;
    size_t element;
    bool required;
} buffer_need;

clmoe_status check_buffer(const clmoe_layer *layer, const buffer_need *need);
clmoe_status check_buffers(const clmoe_layer *layer, const buffer_need *needs, size_t count);

#define CHECK_BUFFERS(layer, needs)                                                                \
    check_buffers((layer), (needs), sizeof(needs) / sizeof(needs)[0])

/* What every argument struct of a batch begins with, and the sizes that follow from its tokens. */
clmoe_status check_head(const clmoe_layer *layer, const void *args, size_t expected,
                        workspace_layout *ws);

/* The same for a step of its own, which Soft MoE does not have. */
clmoe_status check_step(const clmoe_layer *layer, const void *args, size_t expected,
                        workspace_layout *ws);

clmoe_status check_weights_given(const clmoe_weights *weights);

/* Of a step that reads it where the layer has one. */
clmoe_status check_expert_scale(const clmoe_layer *layer, const clmoe_weights *weights);

/* The size of a state, where one is given. */
clmoe_status check_state(const clmoe_layer *layer, const clmoe_buf *state);

#endif
