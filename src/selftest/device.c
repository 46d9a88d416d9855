/* One batch of the self-test on the device, through the public API. */
#include "trial.h"

#include <stdlib.h>
#include <string.h>

enum { SAVED = TRIAL_ARRAYS, SCRATCH, PACKED, BUFFERS };

typedef struct device_batch {
    cl_mem mem[BUFFERS];
    clmoe_weights weights;
    clmoe_gradients gradients;
} device_batch;

static size_t element_size(uint32_t type) {
    if (type == TRIAL_U8)
        return 1;
    return type == TRIAL_I32 ? sizeof(int32_t) : clmoe_type_size(type);
}

static clmoe_buf place(const device_batch *b, int which) {
    return (clmoe_buf){b->mem[which], 0};
}

/* ---- Copies ---------------------------------------------------------------------------------- */

static void encode(uint32_t type, const double *values, size_t count, void *elements) {
    uint8_t *to = elements;
    for (size_t i = 0; i < count; i++) {
        const float number = (float)values[i];
        if (type == TRIAL_U8)
            to[i] = values[i] != 0;
        else
            clmoe_type_encode(type, &number, 1, to + i * element_size(type));
    }
}

static void decode(uint32_t type, const void *elements, size_t count, double *values) {
    for (size_t i = 0; i < count; i++) {
        float number = 0;
        if (type == TRIAL_I32) {
            values[i] = ((const int32_t *)elements)[i];
        } else {
            clmoe_type_decode(type, (const uint8_t *)elements + i * element_size(type), 1, &number);
            values[i] = (double)number;
        }
    }
}

/* A buffer of these bytes; OpenCL has no empty ones. */
static clmoe_status buffer_create(cl_context context, size_t bytes, void *contents, cl_mem *out) {
    cl_int code = CL_SUCCESS;
    cl_mem_flags flags = CL_MEM_READ_WRITE;
    if (contents)
        flags |= CL_MEM_COPY_HOST_PTR;
    *out = clCreateBuffer(context, flags, bytes > 0 ? bytes : 1, contents, &code);
    return clmoe_cl_check(code, "clCreateBuffer");
}

/* What is given, or what no kernel would write. */
static clmoe_status array_create(const trial *t, trial_array array, cl_context context,
                                 cl_mem *out) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t bytes = t->counts[array] * element_size(t->types[array]);
    void *elements = malloc(bytes);
    if (!elements)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for %s", trial_array_name(array));
    if (array < TRIAL_GIVEN)
        encode(t->types[array], t->given.of[array], t->counts[array], elements);
    else
        memset(elements, 0xFF, bytes);
    TRY(buffer_create(context, bytes, elements, out));
done:
    free(elements);
    return status;
}

static clmoe_status array_read(const trial *t, trial_array array, cl_command_queue queue,
                               cl_mem from, double *values) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t bytes = t->counts[array] * element_size(t->types[array]);
    void *elements = malloc(bytes);
    if (!elements)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for %s", trial_array_name(array));
    TRY(CL(clEnqueueReadBuffer(queue, from, CL_TRUE, 0, bytes, elements, 0, NULL, NULL)));
    decode(t->types[array], elements, t->counts[array], values);
done:
    free(elements);
    return status;
}

/* ---- The batch ------------------------------------------------------------------------------- */

static void bind_weights(device_batch *b) {
    b->weights.router = place(b, TRIAL_ROUTER);
    b->weights.group_router = place(b, TRIAL_GROUP_ROUTER);
    b->weights.experts.gate = place(b, TRIAL_GATE);
    b->weights.experts.down = place(b, TRIAL_DOWN);
    b->gradients.router = place(b, TRIAL_DROUTER);
    b->gradients.group_router = place(b, TRIAL_DGROUP_ROUTER);
    b->gradients.experts.gate = place(b, TRIAL_DGATE);
    b->gradients.experts.down = place(b, TRIAL_DDOWN);
}

static clmoe_status create(clmoe_context *context, const clmoe_layer *layer, const trial *t,
                           device_batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t saved = 0, scratch = 0;
    for (int i = 0; i < TRIAL_ARRAYS; i++)
        if (t->counts[i] > 0)
            TRY(array_create(t, (trial_array)i, context->cl, &b->mem[i]));
    TRY(clmoe_layer_memory(layer, t->tokens, &saved, &scratch));
    TRY(buffer_create(context->cl, saved, NULL, &b->mem[SAVED]));
    TRY(buffer_create(context->cl, scratch, NULL, &b->mem[SCRATCH]));
    bind_weights(b);
done:
    return status;
}

/* The experts' weights in the engine's own form. */
static clmoe_status pack(clmoe_context *context, cl_command_queue queue, clmoe_layer *layer,
                         device_batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t bytes = 0;
    clmoe_pack_args args = {
        .struct_size = sizeof args, .mlp = CLMOE_MLP_EXPERTS, .raw = &b->weights.experts};
    TRY(clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes));
    TRY(buffer_create(context->cl, bytes, NULL, &b->mem[PACKED]));
    args.packed = place(b, PACKED);
    TRY(clmoe_pack_weights(layer, queue, &args, 0, NULL, NULL));
    b->weights.experts.packed = args.packed;
done:
    return status;
}

static void release(device_batch *b) {
    for (int i = 0; i < BUFFERS; i++)
        if (b->mem[i])
            clReleaseMemObject(b->mem[i]);
}

static clmoe_status forward(clmoe_layer *layer, cl_command_queue queue, const trial *t,
                            const device_batch *b) {
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = t->tokens;
    args.weights = &b->weights;
    args.x = place(b, TRIAL_X);
    args.token_mask = place(b, TRIAL_MASK);
    args.logits_in = place(b, TRIAL_LOGITS);
    args.saved = place(b, SAVED);
    args.scratch = place(b, SCRATCH);
    args.y = place(b, TRIAL_Y);
    args.ids = place(b, TRIAL_IDS);
    args.pair_weights = place(b, TRIAL_WEIGHTS);
    args.token_offsets = place(b, TRIAL_OFFSETS);
    return clmoe_forward(layer, queue, &args, 0, NULL, NULL);
}

static clmoe_status backward(clmoe_layer *layer, cl_command_queue queue, const trial *t,
                             const device_batch *b) {
    clmoe_backward_args args;
    clmoe_backward_args_init(&args);
    args.tokens = t->tokens;
    args.weights = &b->weights;
    args.x = place(b, TRIAL_X);
    args.token_mask = place(b, TRIAL_MASK);
    args.logits_in = place(b, TRIAL_LOGITS);
    args.saved = place(b, SAVED);
    args.scratch = place(b, SCRATCH);
    args.dy = place(b, TRIAL_DY);
    args.dx = place(b, TRIAL_DX);
    args.gradients = &b->gradients;
    return clmoe_backward(layer, queue, &args, 0, NULL, NULL);
}

clmoe_status device_run(clmoe_context *context, cl_command_queue queue, clmoe_layer *layer,
                        const trial *t, bool packed, trial_values *out) {
    clmoe_status status = CLMOE_SUCCESS;
    device_batch b = {0};
    TRY(create(context, layer, t, &b));
    if (packed)
        TRY(pack(context, queue, layer, &b));
    TRY(forward(layer, queue, t, &b));
    if (t->desc.training)
        TRY(backward(layer, queue, t, &b));
    TRY(CL(clFinish(queue)));
    for (int i = TRIAL_GIVEN; i < TRIAL_ARRAYS; i++)
        if (t->counts[i] > 0)
            TRY(array_read(t, (trial_array)i, queue, b.mem[i], out->of[i]));
done:
    if (status != CLMOE_SUCCESS)
        clFinish(queue); /* what was enqueued before the error may still run */
    release(&b);
    return status;
}
