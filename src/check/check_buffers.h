/* What the argument checks of the public calls share. */
#ifndef CLMOE_CHECK_BUFFERS_H
#define CLMOE_CHECK_BUFFERS_H

#include "check.h"
#include "workspace.h"

/* Bytes of rows x columns elements; saturates, and no buffer is that large. */
size_t bytes_of(size_t rows, size_t columns, size_t element);

/* What the commands of the call do with a buffer. */
typedef enum buffer_use { BUFFER_READ, BUFFER_WRITE, BUFFER_UPDATE /* both */ } buffer_use;

/* One buffer argument: what it must hold. */
typedef struct buffer_need {
    const char *name;
    const clmoe_buf *buf;
    size_t bytes;
    size_t element;
    bool required;
    buffer_use use;
} buffer_need;

/* A need by its use: WRITES("y", &args->y, bytes, element, required). */
#define READS(...)                                                                                 \
    { __VA_ARGS__, BUFFER_READ }
#define WRITES(...)                                                                                \
    { __VA_ARGS__, BUFFER_WRITE }
#define UPDATES(...)                                                                               \
    { __VA_ARGS__, BUFFER_UPDATE }

/* Bytes of a buffer, or of the one that it is a part of, that a call uses. */
typedef struct used_range {
    const char *name;
    const clmoe_buf *buf;
    cl_mem root;
    size_t begin, end;
    bool written;
} used_range;

enum { MAX_CALL_BUFFERS = 128 };

/* One call under check. The first check of a buffer that fails ends it. */
typedef struct call_check {
    const clmoe_layer *layer;
    const clmoe_buf *in_place[2]; /* two that may be the same place, or NULL */
    clmoe_weights raw;            /* those of backward, without packed ones */
    size_t count;
    used_range ranges[MAX_CALL_BUFFERS]; /* those checked so far */
} call_check;

clmoe_status check_buffer(call_check *call, const buffer_need *need);
clmoe_status check_buffers(call_check *call, const buffer_need *needs, size_t count);

#define CHECK_BUFFERS(call, needs) check_buffers((call), (needs), sizeof(needs) / sizeof(needs)[0])

/* That nothing written overlaps anything else; the last check of a call. */
clmoe_status check_overlaps(const call_check *call);

/* That the host may read it: what engines with `blocks` do, and clmoe_packed_check(). */
clmoe_status check_host_reads(const char *name, const clmoe_buf *buf);

/* That `reserved` of an args struct, room for a later field, is 0. */
clmoe_status check_unused(uint32_t reserved);

/* What every call of a batch has, and the sizes that follow from its tokens. */
clmoe_status check_head(const clmoe_layer *layer, uint32_t tokens, workspace_layout *ws);

/* The same for a step of its own, which Soft MoE does not have. */
clmoe_status check_step(const clmoe_layer *layer, uint32_t tokens, workspace_layout *ws);

/* That the layer has statistics, losses and controllers, for which `asked` asks. */
clmoe_status check_measures(const clmoe_layer *layer, const char *asked);

clmoe_status check_weights_given(const clmoe_weights *weights);

/* weights.router, and its bias. */
clmoe_status check_router(call_check *call, const clmoe_weights *weights);

/* Of a step that reads it where the layer has one. */
clmoe_status check_expert_scale(call_check *call, const clmoe_weights *weights);

/* The size of a state, where one is given. */
clmoe_status check_state(call_check *call, const clmoe_buf *state);

/* The same of a call that gives places to pairs. */
clmoe_status check_plan_state(call_check *call, const clmoe_buf *state);

/* Rows of the stored matrices gate and up, of all experts; one buffer may hold both. */
typedef struct mlp_rows {
    size_t gate, up;
} mlp_rows;

mlp_rows check_mlp_rows(const clmoe_mlp_desc *mlp, size_t experts);

/* All weights that a forward reads. */
clmoe_status check_forward_weights(call_check *call, const clmoe_forward_args *args);

clmoe_status check_noise_router(call_check *call, const clmoe_weights *weights);
clmoe_status check_group_router(call_check *call, const clmoe_weights *weights);
/* What a choice reads: select_bias and expert_scale. */
clmoe_status check_choice(call_check *call, const clmoe_weights *weights, clmoe_buf state);
clmoe_status check_experts_weights(call_check *call, const clmoe_weights *weights);
clmoe_status check_shared_weights(call_check *call, const clmoe_weights *weights);
clmoe_status check_output_bias(call_check *call, const clmoe_weights *weights);

/* noise_router with a state, and group_router, where the layer has them. */
clmoe_status check_other_routers(call_check *call, const clmoe_weights *weights,
                                 const clmoe_buf *state);

/* An MLP's weights, not packed, and what its step reads besides; down_bias alone. */
clmoe_status check_raw_mlp(call_check *call, clmoe_mlp which, const clmoe_weights *weights);
clmoe_status check_down_bias(call_check *call, const clmoe_weights *weights);

/* What calls of the backward pass share. */
clmoe_status check_training_layer(const clmoe_layer *layer);
clmoe_status check_parts(clmoe_backward_parts parts, uint32_t accumulate);
clmoe_status check_dye(const clmoe_layer *layer, clmoe_buf dye);

/* All gradients that are given; `accumulate`: read and written. */
clmoe_status check_gradients(call_check *call, const clmoe_gradients *to, uint32_t accumulate);

/* x and the routers that noisy logits, or those of two levels, are made of. */
clmoe_status check_router_weights(call_check *call, const clmoe_weights *weights,
                                  const clmoe_buf *x, clmoe_buf state, uint32_t tokens);

/* What only the quantile rule has; `name` is the field that asks for it. */
clmoe_status check_quantile(const clmoe_layer *layer, const char *name);

/* The losses of a forward: the descriptors, what they need, and their outputs. */
clmoe_status check_forward_losses(call_check *call, const clmoe_forward_args *args);

#endif
