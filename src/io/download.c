/* clmoe_checkpoint_gradients(): device buffers -> the block's tensors, a piece at a time. */
#include "places.h"
#include "runtime/structs.h"
#include "runtime/types.h"

#include <stdlib.h>
#include <string.h>

#define STAGING_FLOATS 1048576u

typedef struct download {
    uint32_t layer;
    cl_command_queue queue;
    const clmoe_weights *gradients; /* in the fields of the weights */
    bool given;                     /* else names and shapes alone are handed out */
    float *staging, *values;        /* a piece as it is stored, and as floats */
    clmoe_parameter_visitor visit;
    void *user;
} download;

/* The gradients in the fields of the weights that they are of. */
static clmoe_weights by_weight(const clmoe_gradients *from) {
#define MLP(of)                                                                                    \
    .of = {                                                                                        \
        .gate = from->of.gate,                                                                     \
        .up = from->of.up,                                                                         \
        .down = from->of.down,                                                                     \
        .gate_bias = from->of.gate_bias,                                                           \
        .up_bias = from->of.up_bias,                                                               \
        .down_bias = from->of.down_bias                                                            \
    }
    return (clmoe_weights){.router = from->router,
                           .router_bias = from->router_bias,
                           .shared_gate = from->shared_gate,
                           .output_bias = from->output_bias,
                           MLP(experts),
                           MLP(shared)};
#undef MLP
}

/* That a buffer is as large as it must be. */
static clmoe_status check_buffer(void *user, clmoe_type type, uint64_t elements, clmoe_buf *buf) {
    clmoe_status status = CLMOE_SUCCESS;
    const download *d = user;
    size_t bytes = 0;
    if (buf->mem == NULL)
        return CLMOE_SUCCESS;
    TRY(CL(clGetMemObjectInfo(buf->mem, CL_MEM_SIZE, sizeof bytes, &bytes, NULL)));
    const size_t left = buf->offset < bytes ? bytes - buf->offset : 0;
    if (left / type_bytes(type) < elements)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "layer %u: gradients.%s has %zu bytes, but must have %llu elements of %zu",
                    d->layer, place_name(d->gradients, buf), left, (unsigned long long)elements,
                    type_bytes(type));
done:
    return status;
}

static clmoe_status read_piece(const download *d, const tensor_place *place, uint64_t first,
                               size_t count) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t element = type_bytes(place->type);
    TRY(CL(clEnqueueReadBuffer(d->queue, place->buf->mem, CL_TRUE,
                               place->buf->offset + (size_t)(place->at + first) * element,
                               count * element, d->staging, 0, NULL, NULL)));
    clmoe_type_decode(place->type, d->staging, count, d->values);
done:
    return status;
}

static clmoe_status hand_out(void *user, const tensor_place *place) {
    clmoe_status status = CLMOE_SUCCESS;
    const download *d = user;
    const st_tensor *t = place->tensor->tensor;
    clmoe_parameter out = {
        .name = t->name, .rank = t->rank, .shape = t->shape, .elements = t->elements};
    if (place->buf == &d->gradients->select_bias)
        return CLMOE_SUCCESS;
    if (!d->given)
        return d->visit(d->user, &out);
    if (place->buf->mem == NULL)
        return CLMOE_SUCCESS;
    for (; out.first < t->elements; out.first += out.count) {
        const uint64_t left = t->elements - out.first;
        out.count = left < STAGING_FLOATS ? (size_t)left : STAGING_FLOATS;
        TRY(read_piece(d, place, out.first, out.count));
        out.values = d->values;
        TRY(d->visit(d->user, &out));
    }
done:
    return status;
}

/* The types that gradients are stored in: see clmoe_gradients. */
static clmoe_status gradient_types(clmoe_layer_desc *desc) {
    if (desc->gradient_type > CLMOE_GRADIENT_OF_WEIGHT)
        return fail(CLMOE_INVALID_DESC, "desc.gradient_type is %u, which is no clmoe_gradient_type",
                    desc->gradient_type);
    if (desc->gradient_type == CLMOE_GRADIENT_F32)
        desc->weight_type = desc->router.weight_type = CLMOE_F32;
    return CLMOE_SUCCESS;
}

static clmoe_status check_arguments(const download *d, const clmoe_checkpoint *checkpoint,
                                    const clmoe_layer_desc *desc,
                                    const clmoe_gradients *gradients) {
    if (checkpoint == NULL || desc == NULL || d->visit == NULL)
        return fail(CLMOE_INVALID_ARGUMENT, "one of checkpoint, desc and visit is NULL");
    if (gradients != NULL && d->queue == NULL)
        return fail(CLMOE_INVALID_ARGUMENT, "queue is NULL, but gradients is not");
    return CLMOE_SUCCESS;
}

clmoe_status clmoe_checkpoint_gradients(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                        const clmoe_layer_desc *desc, cl_command_queue queue,
                                        const clmoe_gradients *gradients,
                                        clmoe_parameter_visitor visit, void *user) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc own;
    block b;
    clmoe_weights by_name = gradients ? by_weight(gradients) : (clmoe_weights){0};
    download d = {.layer = layer,
                  .queue = queue,
                  .gradients = &by_name,
                  .given = gradients != NULL,
                  .visit = visit,
                  .user = user};
    const place_visitor visitor = {.buffer = check_buffer, .tensor = hand_out, .user = &d};
    memset(&b, 0, sizeof b);
    TRY(check_arguments(&d, checkpoint, desc, gradients));
    TRY(block_open(checkpoint, layer, desc, &own, &b));
    TRY(gradient_types(&own));
    d.staging = malloc(STAGING_FLOATS * sizeof(float));
    d.values = malloc(STAGING_FLOATS * sizeof(float));
    if (d.staging == NULL || d.values == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "no memory to stage the gradients of layer %u", layer));
    TRY(block_places(&b, &own, &by_name, &visitor));
done:
    free(d.staging);
    free(d.values);
    block_release(&b);
    return status;
}
