/* clmoe_checkpoint_upload(): the block's tensors -> device buffers, in the descriptor's types, a
 * piece at a time. */
#include "checkpoint.h"
#include "runtime/device.h"
#include "runtime/structs.h"
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

/* The name of a buffer among the weights. */
static const char *name_of(const upload *u, const clmoe_buf *buf) {
#define WEIGHT(field)                                                                              \
    { #field, offsetof(clmoe_weights, field) }
#define WEIGHTS_OF_MLP(mlp)                                                                        \
    WEIGHT(mlp.gate), WEIGHT(mlp.up), WEIGHT(mlp.down), WEIGHT(mlp.gate_bias),                     \
        WEIGHT(mlp.up_bias), WEIGHT(mlp.down_bias)
    static const struct {
        const char *name;
        size_t offset;
    } names[] = {WEIGHT(router),        WEIGHT(router_bias), WEIGHT(select_bias),
                 WEIGHT(shared_gate),   WEIGHT(output_bias), WEIGHTS_OF_MLP(experts),
                 WEIGHTS_OF_MLP(shared)};
#undef WEIGHTS_OF_MLP
#undef WEIGHT
    const size_t offset = (size_t)((const char *)buf - (const char *)u->weights);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (names[i].offset == offset)
            return names[i].name;
    return "a weight";
}

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
        return refuse_size(u, name_of(u, buf), bytes, "allows per buffer", u->most);
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

static clmoe_status create_buffer(upload *u, clmoe_type type, uint64_t elements, clmoe_buf *buf) {
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

/* Writes a tensor's first `count` elements to `buf` from element `at`. */
static clmoe_status copy_tensor(const upload *u, clmoe_type type, const file_tensor *t,
                                uint64_t count, const clmoe_buf *buf, uint64_t at) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t element = type_bytes(type);
    if (!u->staging)
        return CLMOE_SUCCESS;
    for (uint64_t done = 0; done < count;) {
        uint64_t left = count - done;
        size_t now = left < STAGING_FLOATS ? (size_t)left : STAGING_FLOATS;
        TRY(safetensors_read_f32(t->file, t->tensor, done, now, u->staging));
        clmoe_type_encode(type, u->staging, now, u->staging);
        TRY(CL(clEnqueueWriteBuffer(u->queue, buf->mem, CL_TRUE, (size_t)(at + done) * element,
                                    now * element, u->staging, 0, NULL, NULL)));
        done += now;
    }
done:
    return status;
}

/* A role with one tensor -> a buffer of its own; nothing if the block has no such tensor. */
static clmoe_status upload_single(upload *u, clmoe_type type, int role, clmoe_buf *buf) {
    if (!block_has(u->block, role))
        return CLMOE_SUCCESS;
    const file_tensor *t = u->block->roles[role].tensors;
    clmoe_status status = create_buffer(u, type, t->tensor->elements, buf);
    return status == CLMOE_SUCCESS ? copy_tensor(u, type, t, t->tensor->elements, buf, 0) : status;
}

/*
 * Two roles -> one buffer: for each of their tensors, first's elements and then second's. With
 * second -1, or absent, first alone.
 */
static clmoe_status upload_pair(upload *u, clmoe_type type, int first, int second, clmoe_buf *buf) {
    clmoe_status status = CLMOE_SUCCESS;
    const block_role *a = &u->block->roles[first];
    const block_role *b =
        second >= 0 && block_has(u->block, second) ? &u->block->roles[second] : NULL;
    if (a->pattern == NULL)
        return CLMOE_SUCCESS;
    uint64_t size = a->tensors[0].tensor->elements, stride = b ? 2 * size : size;
    TRY(create_buffer(u, type, a->count * stride, buf));
    for (uint32_t e = 0; e < a->count; e++) {
        TRY(copy_tensor(u, type, &a->tensors[e], size, buf, e * stride));
        if (b != NULL)
            TRY(copy_tensor(u, type, &b->tensors[e], size, buf, e * stride + size));
    }
done:
    return status;
}

static clmoe_status upload_mlp(upload *u, clmoe_type type, int base, const clmoe_mlp_desc *desc,
                               clmoe_mlp_weights *w) {
    clmoe_status status = CLMOE_SUCCESS;
    if (block_has(u->block, base + PART_GATE_UP)) {
        TRY(upload_pair(u, type, base + PART_GATE_UP, -1, &w->gate));
        TRY(upload_pair(u, type, base + PART_GATE_UP_BIAS, -1, &w->gate_bias));
    } else if (desc->gate_layout == CLMOE_GATE_CONCAT) {
        TRY(upload_pair(u, type, base + PART_GATE, base + PART_UP, &w->gate));
        TRY(upload_pair(u, type, base + PART_GATE_BIAS, base + PART_UP_BIAS, &w->gate_bias));
    } else {
        TRY(upload_pair(u, type, base + PART_GATE, -1, &w->gate));
        TRY(upload_pair(u, type, base + PART_GATE_BIAS, -1, &w->gate_bias));
        TRY(upload_pair(u, type, base + PART_UP, -1, &w->up));
        TRY(upload_pair(u, type, base + PART_UP_BIAS, -1, &w->up_bias));
    }
    TRY(upload_pair(u, type, base + PART_DOWN, -1, &w->down));
    TRY(upload_pair(u, type, base + PART_DOWN_BIAS, -1, &w->down_bias));
done:
    return status;
}

static clmoe_status upload_all(upload *u, const clmoe_layer_desc *desc, clmoe_weights *w) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_type type = desc->weight_type, router = desc->router.weight_type;
    TRY(upload_single(u, router, ROLE_ROUTER, &w->router));
    TRY(upload_single(u, CLMOE_F32, ROLE_ROUTER_BIAS, &w->router_bias));
    TRY(upload_single(u, CLMOE_F32, ROLE_SELECT_BIAS, &w->select_bias));
    TRY(upload_single(u, router, ROLE_SHARED_GATE, &w->shared_gate));
    TRY(upload_single(u, type, ROLE_OUTPUT_BIAS, &w->output_bias));
    TRY(upload_mlp(u, type, ROLE_EXPERTS, &desc->experts, &w->experts));
    if (desc->shared.hidden_dim > 0)
        TRY(upload_mlp(u, type, ROLE_SHARED, &desc->shared, &w->shared));
done:
    return status;
}

/* ---- The caller's descriptor ----------------------------------------------------------------- */

/* CLMOE_INVALID_DESC for types that weights are not stored in. */
static clmoe_status check_types(const clmoe_layer_desc *desc) {
    if (desc->weight_type > CLMOE_BF16)
        return fail(CLMOE_INVALID_DESC, "desc.weight_type is %u, which is no clmoe_type",
                    desc->weight_type);
    if (desc->router.weight_type > CLMOE_BF16)
        return fail(CLMOE_INVALID_DESC, "desc.router.weight_type is %u, which is no clmoe_type",
                    desc->router.weight_type);
    return CLMOE_SUCCESS;
}

/*
 * CLMOE_INVALID_ARGUMENT if the caller's descriptor is of other buffers than the file's. A
 * router.select_bias may be the state's, and is not compared.
 */
static clmoe_status check_desc(const clmoe_layer_desc *given, const clmoe_layer_desc *file) {
#define SAME(field)                                                                                \
    { #field, given->field, file->field }
#define SAME_MLP(mlp)                                                                              \
    SAME(mlp.hidden_dim), SAME(mlp.gate_layout), SAME(mlp.gate_up_transposed),                     \
        SAME(mlp.down_transposed), SAME(mlp.gate_up_bias), SAME(mlp.down_bias)
    const struct {
        const char *field;
        uint32_t given, file;
    } same[] = {
        SAME(dim),         SAME(num_experts), SAME(num_identity_experts), SAME(router.bias),
        SAME_MLP(experts), SAME_MLP(shared),  SAME(shared_gate),          SAME(output_bias),
    };
#undef SAME_MLP
#undef SAME
    for (size_t i = 0; i < sizeof same / sizeof same[0]; i++)
        if (same[i].given != same[i].file)
            return fail(CLMOE_INVALID_ARGUMENT,
                        "desc.%s is %u, but clmoe_checkpoint_layer() fills %u", same[i].field,
                        same[i].given, same[i].file);
    return CLMOE_SUCCESS;
}

clmoe_status clmoe_checkpoint_upload(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                     const clmoe_layer_desc *desc, cl_context context,
                                     cl_command_queue queue, clmoe_weights *weights) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc file_desc, own;
    block b;
    memset(&b, 0, sizeof b);
    upload u = {.block = &b, .context = context, .queue = queue, .weights = weights};
    if (checkpoint == NULL || desc == NULL || context == NULL || queue == NULL || weights == NULL)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "one of checkpoint, desc, context, queue and weights is NULL");
    memset(weights, 0, sizeof *weights);
    clmoe_layer_desc_init(&own);
    TRY(struct_take(CLMOE_INVALID_DESC, "desc", desc, &own, sizeof own));
    TRY(struct_desc_unused(&own, "desc."));
    TRY(check_types(&own));
    TRY(check_queue(&u));
    TRY(checkpoint_describe(checkpoint, layer, &file_desc, &b));
    TRY(check_desc(&own, &file_desc));
    TRY(read_limits(&u));
    TRY(upload_all(&u, &own, weights));
    u.staging = malloc(STAGING_FLOATS * sizeof(float));
    if (u.staging == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "no memory to stage the weights of layer %u", layer));
    TRY(upload_all(&u, &own, weights));
done:
    if (status != CLMOE_SUCCESS)
        clmoe_weights_release(weights);
    free(u.staging);
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
