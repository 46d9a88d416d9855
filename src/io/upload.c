/* clmoe_checkpoint_upload(): the block's tensors -> device buffers, in the descriptor's types, a
 * piece at a time. */
#include "places.h"
#include "runtime/device.h"
#include "runtime/types.h"

#include <stdlib.h>
#include <string.h>

#define STAGING_FLOATS 1048576u

typedef struct upload {
    const block *block;
    cl_context context;
    cl_command_queue queue;
    cl_device_id device;
    const clmoe_weights *weights; /* what is filled */
    float *staging;               /* where pieces pass through; NULL: sizes are only checked */
    cl_ulong most, all;           /* bytes that the device allows per buffer, and has */
    cl_ulong total;               /* bytes asked for so far */
} upload;

/* ---- Whether the device can hold them, before anything is made ------------------------------ */

static clmoe_status refuse_size(const upload *u, const char *what, cl_ulong bytes,
                                const char *limit, cl_ulong most) {
    clmoe_status status = CLMOE_SUCCESS;
    char *device = NULL;
    TRY(device_info_text(u->device, CL_DEVICE_NAME, &device));
    status = fail(CLMOE_UNSUPPORTED, "layer %u: %s needs %llu bytes, but device %.64s %s %llu",
                  u->block->layer, what, (unsigned long long)bytes, device, limit,
                  (unsigned long long)most);
done:
    free(device);
    return status;
}

static clmoe_status check_size(upload *u, const clmoe_buf *buf, size_t bytes) {
    if (bytes > u->most)
        return refuse_size(u, place_name(u->weights, buf), bytes, "allows per buffer", u->most);
    u->total += bytes;
    if (u->total > u->all)
        return refuse_size(u, "what it has of weights", u->total, "has", u->all);
    return CLMOE_SUCCESS;
}

/* That the buffers will be ones the queue can write. */
static clmoe_status check_queue(const upload *u) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_context context = NULL;
    TRY(CL(
        clGetCommandQueueInfo(u->queue, CL_QUEUE_CONTEXT, sizeof context, (void *)&context, NULL)));
    if (context != u->context)
        return fail(CLMOE_INVALID_ARGUMENT, "queue is of another cl_context than `context`");
done:
    return status;
}

static clmoe_status read_limits(upload *u) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(CL(clGetCommandQueueInfo(u->queue, CL_QUEUE_DEVICE, sizeof u->device, (void *)&u->device,
                                 NULL)));
    TRY(CL(
        clGetDeviceInfo(u->device, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof u->most, &u->most, NULL)));
    TRY(CL(clGetDeviceInfo(u->device, CL_DEVICE_GLOBAL_MEM_SIZE, sizeof u->all, &u->all, NULL)));
done:
    return status;
}

/* ---- Buffers ----------------------------------------------------------------------------------
 */

static clmoe_status create_buffer(void *user, clmoe_type type, uint64_t elements, clmoe_buf *buf) {
    upload *u = user;
    cl_int code;
    size_t bytes;
    if (elements > SIZE_MAX || !size_mul((size_t)elements, type_bytes(type), &bytes))
        return fail(CLMOE_UNSUPPORTED, "layer %u: %llu weights are too many for one buffer",
                    u->block->layer, (unsigned long long)elements);
    if (!u->staging)
        return check_size(u, buf, bytes);
    buf->mem = clCreateBuffer(u->context, CL_MEM_READ_WRITE, bytes, NULL, &code);
    buf->offset = 0;
    if (code == CL_SUCCESS)
        return CLMOE_SUCCESS;
    buf->mem = NULL;
    return fail(code, "layer %u: clCreateBuffer of %zu bytes failed: %s", u->block->layer, bytes,
                clmoe_status_string(code));
}

static clmoe_status copy_tensor(void *user, const tensor_place *place) {
    clmoe_status status = CLMOE_SUCCESS;
    const upload *u = user;
    const file_tensor *t = place->tensor;
    const uint64_t count = t->tensor->elements;
    const size_t element = type_bytes(place->type);
    if (!u->staging)
        return CLMOE_SUCCESS;
    for (uint64_t done = 0; done < count;) {
        uint64_t left = count - done;
        size_t now = left < STAGING_FLOATS ? (size_t)left : STAGING_FLOATS;
        TRY(block_read_f32(t, done, now, u->staging));
        clmoe_type_encode(place->type, u->staging, now, u->staging);
        TRY(CL(clEnqueueWriteBuffer(u->queue, place->buf->mem, CL_TRUE,
                                    (size_t)(place->at + done) * element, now * element, u->staging,
                                    0, NULL, NULL)));
        done += now;
    }
done:
    return status;
}

/* Twice: sizes are checked, then buffers are made and filled. */
static clmoe_status upload_all(upload *u, const clmoe_layer_desc *desc, clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    const place_visitor visitor = {.buffer = create_buffer, .tensor = copy_tensor, .user = u};
    TRY(block_places(u->block, desc, weights, &visitor));
    u->staging = malloc(STAGING_FLOATS * sizeof(float));
    if (u->staging == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "no memory to stage the weights of layer %u",
                 u->block->layer));
    TRY(block_places(u->block, desc, weights, &visitor));
done:
    free(u->staging);
    return status;
}

clmoe_status clmoe_checkpoint_upload(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                     const clmoe_layer_desc *desc, cl_context context,
                                     cl_command_queue queue, clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc own;
    block b;
    upload u = {.block = &b, .context = context, .queue = queue, .weights = weights};
    if (checkpoint == NULL || desc == NULL || context == NULL || queue == NULL || weights == NULL)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "one of checkpoint, desc, context, queue and weights is NULL");
    memset(weights, 0, sizeof *weights);
    memset(&b, 0, sizeof b);
    TRY(check_queue(&u));
    TRY(block_open(checkpoint, layer, desc, &own, &b));
    if (b.coded != NULL && own.weight_type + 1 != checkpoint->decode)
        TRY(fail(
            CLMOE_INVALID_ARGUMENT,
            "desc.weight_type is %s, but layer %u is %s, which options.decode allows to decode "
            "to %s",
            type_name(own.weight_type), layer, b.coded, type_name(checkpoint->decode - 1)));
    TRY(read_limits(&u));
    TRY(upload_all(&u, &own, weights));
done:
    if (status != CLMOE_SUCCESS)
        clmoe_weights_release(weights);
    block_release(&b);
    return status;
}

/* ---- Releasing ------------------------------------------------------------------------------ */

static void release(clmoe_buf *buf) {
    if (buf->mem != NULL)
        clReleaseMemObject(buf->mem);
}

static void release_mlp(clmoe_mlp_weights *w) {
    release(&w->gate);
    release(&w->up);
    release(&w->down);
    release(&w->gate_bias);
    release(&w->up_bias);
    release(&w->down_bias);
    release(&w->packed);
}

void clmoe_weights_release(clmoe_weights *weights) {
    if (weights == NULL)
        return;
    release(&weights->router);
    release(&weights->router_bias);
    release(&weights->select_bias);
    release(&weights->expert_scale);
    release_mlp(&weights->experts);
    release_mlp(&weights->shared);
    release(&weights->shared_gate);
    release(&weights->output_bias);
    release(&weights->group_router);
    release(&weights->noise_router);
    memset(weights, 0, sizeof *weights);
}
