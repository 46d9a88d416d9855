/* One batch of the self-test on the device, through the public API. */
#include "trial.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { SAVED = TRIAL_ARRAYS, SCRATCH, PACKED, BUFFERS };

typedef struct device_batch {
    cl_mem mem[BUFFERS];
    clmoe_weights weights;
    clmoe_gradients gradients;
    clmoe_forward_args forward;
    clmoe_backward_args backward;
} device_batch;

static size_t element_size(uint32_t type) {
    if (type == TRIAL_U8)
        return 1;
    return type >= TRIAL_I32 ? sizeof(int32_t) : clmoe_type_size(type);
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
        } else if (type == TRIAL_U32) {
            values[i] = ((const uint32_t *)elements)[i];
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

/* The state as its bytes: idle_tokens, the fourth array, is u32. */
static clmoe_status state_create(const trial *t, cl_context context, cl_mem *out) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t E = t->desc.num_experts, bytes = sizeof(clmoe_state) + 5 * E * sizeof(uint32_t);
    clmoe_state *state = malloc(bytes);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for state");
    *state = trial_state;
    state->columns = (uint32_t)E;
    for (size_t i = 0; i < 5 * E; i++) {
        const double value = t->given.of[TRIAL_STATE][i];
        const uint32_t count = (uint32_t)value;
        uint8_t *to = (uint8_t *)(state + 1) + i * sizeof count;
        if (i / E == 3)
            memcpy(to, &count, sizeof count);
        else
            encode(CLMOE_F32, &value, 1, to);
    }
    TRY(buffer_create(context, bytes, state, out));
done:
    free(state);
    return status;
}

/* What the layer adds to. */
static bool begins_at_zero(trial_array array) {
    return array == TRIAL_BIAS_COUNTS || array == TRIAL_DLOGITS || array == TRIAL_DNOISE;
}

/* What is given, zeros where the layer adds, or what no kernel would write. */
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
        memset(elements, begins_at_zero(array) ? 0 : 0xFF, bytes);
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

#define FIELD_OF_BOTH(which, name)                                                                 \
    { which, offsetof(clmoe_forward_args, name), offsetof(clmoe_backward_args, name) }
#define FIELD_OF_FORWARD(which, name)                                                              \
    { which, offsetof(clmoe_forward_args, name), 0 }
#define FIELD_OF_BACKWARD(which, name)                                                             \
    { which, 0, offsetof(clmoe_backward_args, name) }

/* Where the arguments have a buffer of the batch; 0: nowhere. */
static const struct {
    int which;
    size_t in_forward, in_backward;
} of_args[] = {
    FIELD_OF_BOTH(TRIAL_X, x),
    FIELD_OF_BOTH(TRIAL_MASK, token_mask),
    FIELD_OF_BOTH(TRIAL_LOGITS, logits_in),
    FIELD_OF_BOTH(TRIAL_STATE, state),
    FIELD_OF_BOTH(TRIAL_DLOGITS, dlogits),
    FIELD_OF_BOTH(TRIAL_DNOISE, dnoise),
    FIELD_OF_BOTH(SAVED, saved),
    FIELD_OF_BOTH(SCRATCH, scratch),
    FIELD_OF_FORWARD(TRIAL_Y, y),
    FIELD_OF_FORWARD(TRIAL_IDS, ids),
    FIELD_OF_FORWARD(TRIAL_WEIGHTS, pair_weights),
    FIELD_OF_FORWARD(TRIAL_OFFSETS, token_offsets),
    FIELD_OF_FORWARD(TRIAL_COUNTS, stats),
    FIELD_OF_FORWARD(TRIAL_LOSSES, loss_values),
    FIELD_OF_FORWARD(TRIAL_BIAS_COUNTS, bias_counts),
    FIELD_OF_BACKWARD(TRIAL_DY, dy),
    FIELD_OF_BACKWARD(TRIAL_DX, dx),
    FIELD_OF_BACKWARD(TRIAL_DLOGITS, dlogits_out),
};

/* Weights, and the gradients on them. */
static const struct {
    int weight, gradient;
    size_t in_weights, in_gradients;
} of_weights[] = {
#define WEIGHT(array, name)                                                                        \
    {                                                                                              \
        TRIAL_##array, TRIAL_D##array, offsetof(clmoe_weights, name),                              \
            offsetof(clmoe_gradients, name)                                                        \
    }
    WEIGHT(ROUTER, router),
    WEIGHT(GROUP_ROUTER, group_router),
    WEIGHT(NOISE_ROUTER, noise_router),
    WEIGHT(ROUTER_BIAS, router_bias),
    WEIGHT(GATE, experts.gate),
    WEIGHT(DOWN, experts.down),
    WEIGHT(SHARED_UP, shared.gate),
    WEIGHT(SHARED_DOWN, shared.down),
    WEIGHT(SHARED_GATE, shared_gate),
#undef WEIGHT
};

static void set_place(const device_batch *b, int which, void *to, size_t offset) {
    const clmoe_buf at = place(b, which);
    memcpy((uint8_t *)to + offset, &at, sizeof at);
}

static void bind(const trial *t, device_batch *b) {
    for (size_t i = 0; i < sizeof of_weights / sizeof of_weights[0]; i++) {
        set_place(b, of_weights[i].weight, &b->weights, of_weights[i].in_weights);
        set_place(b, of_weights[i].gradient, &b->gradients, of_weights[i].in_gradients);
    }
    clmoe_forward_args_init(&b->forward);
    clmoe_backward_args_init(&b->backward);
    b->forward.tokens = b->backward.tokens = t->tokens;
    b->forward.weights = b->backward.weights = &b->weights;
    b->forward.losses = t->state ? t->losses : NULL;
    b->forward.num_losses = (uint32_t)t->counts[TRIAL_LOSSES];
    b->backward.gradients = &b->gradients;
    for (size_t i = 0; i < sizeof of_args / sizeof of_args[0]; i++) {
        if (of_args[i].in_forward)
            set_place(b, of_args[i].which, &b->forward, of_args[i].in_forward);
        if (of_args[i].in_backward)
            set_place(b, of_args[i].which, &b->backward, of_args[i].in_backward);
    }
}

/* The array whose buffer this one is read from: words of both kinds lie in one. */
static int shared_with(int array) {
    if (array == TRIAL_STATS)
        return TRIAL_COUNTS;
    return array == TRIAL_NEXT_COUNTS || array == TRIAL_NEXT_STATE ? TRIAL_STATE : array;
}

static clmoe_status create(clmoe_context *context, const clmoe_layer *layer, const trial *t,
                           device_batch *b) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t saved = 0, scratch = 0;
    for (int i = 0; i < TRIAL_ARRAYS; i++)
        if (t->counts[i] > 0 && i != TRIAL_STATE && shared_with(i) == i)
            TRY(array_create(t, (trial_array)i, context->cl, &b->mem[i]));
    if (t->state)
        TRY(state_create(t, context->cl, &b->mem[TRIAL_STATE]));
    TRY(clmoe_layer_memory(layer, t->tokens, &saved, &scratch));
    TRY(buffer_create(context->cl, saved, NULL, &b->mem[SAVED]));
    TRY(buffer_create(context->cl, scratch, NULL, &b->mem[SCRATCH]));
    bind(t, b);
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

/* The end of the step. */
static clmoe_status update(clmoe_layer *layer, cl_command_queue queue, const trial *t,
                           const device_batch *b) {
    clmoe_balance_args args;
    trial_update_args(t, &args);
    args.state = place(b, TRIAL_STATE);
    args.stats = place(b, TRIAL_COUNTS);
    if (args.bias_rule == CLMOE_BIAS_QUANTILE)
        args.bias_counts = place(b, TRIAL_BIAS_COUNTS);
    return clmoe_balance_update(layer, queue, &args, 0, NULL, NULL);
}

clmoe_status device_run(clmoe_context *context, cl_command_queue queue, clmoe_layer *layer,
                        const trial *t, bool packed, trial_values *out) {
    clmoe_status status = CLMOE_SUCCESS;
    device_batch b = {0};
    TRY(create(context, layer, t, &b));
    if (packed)
        TRY(pack(context, queue, layer, &b));
    TRY(clmoe_forward(layer, queue, &b.forward, 0, NULL, NULL));
    if (t->desc.training)
        TRY(clmoe_backward(layer, queue, &b.backward, 0, NULL, NULL));
    if (t->state)
        TRY(update(layer, queue, t, &b));
    TRY(CL(clFinish(queue)));
    for (int i = TRIAL_GIVEN; i < TRIAL_ARRAYS; i++)
        if (t->counts[i] > 0)
            TRY(array_read(t, (trial_array)i, queue, b.mem[shared_with(i)], out->of[i]));
done:
    if (status != CLMOE_SUCCESS)
        clFinish(queue); /* what was enqueued before the error may still run */
    release(&b);
    return status;
}
