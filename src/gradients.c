/* Buffers for the gradients of a layer's weights. */
#include "check/gradient_fields.h"

#include <string.h>

static clmoe_buf *buf_of(clmoe_gradients *gradients, const gradient_field *field) {
    return (clmoe_buf *)(void *)((char *)gradients + field->offset);
}

static clmoe_status create(const clmoe_layer *layer, const gradient_field *field, clmoe_buf *buf) {
    cl_int code;
    const size_t bytes = bytes_of(field->elements, 1, field->element);
    if (bytes == 0)
        return CLMOE_SUCCESS;
    buf->mem = clCreateBuffer(layer->context->cl, CL_MEM_READ_WRITE, bytes, NULL, &code);
    if (code == CL_SUCCESS)
        return CLMOE_SUCCESS;
    buf->mem = NULL;
    return fail(code, "%s: clCreateBuffer of %zu bytes failed: %s", field->name, bytes,
                clmoe_status_string(code));
}

clmoe_status clmoe_gradients_create(const clmoe_layer *layer, clmoe_gradients *gradients) {
    clmoe_status status = CLMOE_SUCCESS;
    gradient_field fields[GRADIENT_FIELDS];
    if (layer == NULL || gradients == NULL)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", layer ? "gradients" : "layer");
    memset(gradients, 0, sizeof *gradients);
    if (!layer->desc.training)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "the layer was made with training 0, and has no gradients");
    const size_t count = gradient_fields(layer, fields);
    for (size_t i = 0; i < count; i++)
        TRY(create(layer, &fields[i], buf_of(gradients, &fields[i])));
done:
    if (status != CLMOE_SUCCESS)
        clmoe_gradients_release(gradients);
    return status;
}

static void release(clmoe_buf *buf) {
    if (buf->mem != NULL)
        clReleaseMemObject(buf->mem);
}

static void release_mlp(clmoe_mlp_gradients *g) {
    release(&g->gate);
    release(&g->up);
    release(&g->down);
    release(&g->gate_bias);
    release(&g->up_bias);
    release(&g->down_bias);
}

void clmoe_gradients_release(clmoe_gradients *gradients) {
    if (gradients == NULL)
        return;
    release(&gradients->router);
    release(&gradients->router_bias);
    release(&gradients->expert_scale);
    release_mlp(&gradients->experts);
    release_mlp(&gradients->shared);
    release(&gradients->shared_gate);
    release(&gradients->output_bias);
    release(&gradients->group_router);
    release(&gradients->noise_router);
    memset(gradients, 0, sizeof *gradients);
}
