#include "batch.h"
#include "interrupt.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

const char *const step_names[STEP_COUNT] = {"score",   "topk",   "plan",    "dispatch",
                                            "experts", "shared", "combine", "measure"};

static clmoe_buf place(const batch *b, batch_buffer which) {
    return (clmoe_buf){b->buffers[which], 0};
}

static void sizes_get(const batch *b, size_t sizes[BATCH_COUNT]) {
    const clmoe_layer_desc *desc = b->desc;
    sizes[BATCH_X] = sizes[BATCH_Y] = (size_t)b->tokens * desc->dim * clmoe_type_size(desc->type);
    sizes[BATCH_LOSSES] = b->num_losses * sizeof(float);
    if (b->forced.kind != FORCE_NONE)
        sizes[BATCH_IDS] = sizes[BATCH_WEIGHTS] = (size_t)b->tokens * desc->top_k * sizeof(float);
    if (b->dy == NULL)
        return;
    sizes[BATCH_DY] = sizes[BATCH_DX] = sizes[BATCH_X];
    if (b->num_losses > 0)
        sizes[BATCH_DLOGITS] = (size_t)b->tokens * clmoe_layer_columns(b->layer) * sizeof(float);
}

/* Rows [T,D] -> a buffer, rounded to the layer's type. */
static clmoe_status write_rows(batch *b, batch_buffer to, const float *rows) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_type type = b->desc->type;
    const size_t count = (size_t)b->tokens * b->desc->dim, bytes = count * clmoe_type_size(type);
    void *elements = NULL;
    if (bytes == 0)
        return CLMOE_SUCCESS;
    elements = malloc(bytes);
    if (elements == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %zu bytes of input", bytes);
    clmoe_type_encode(type, rows, count, elements);
    TRY(CL(clEnqueueWriteBuffer(b->queue, b->buffers[to], CL_TRUE, 0, bytes, elements, 0, NULL,
                                NULL)));
done:
    free(elements);
    return status;
}

static clmoe_status force_routing(const batch *b) {
    const forced_batch filled = {.tokens = b->tokens,
                                 .experts = b->desc->num_experts,
                                 .top_k = b->desc->top_k,
                                 .ids = b->buffers[BATCH_IDS],
                                 .pair_weights = b->buffers[BATCH_WEIGHTS]};
    return b->forced.kind == FORCE_NONE ? CLMOE_SUCCESS : force_fill(&b->forced, b->queue, &filled);
}

clmoe_status batch_create(batch *b, cl_context context, const float *x) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_plan_layout plan;
    size_t sizes[BATCH_COUNT] = {0};
    TRY(LIB(clmoe_layer_memory(b->layer, b->tokens, &sizes[BATCH_SAVED], &sizes[BATCH_SCRATCH])));
    TRY(LIB(clmoe_stats_size(b->layer, &sizes[BATCH_STATS])));
    TRY(LIB(clmoe_plan_layout_get(b->layer, b->tokens, &plan)));
    b->capacity = plan.capacity;
    sizes_get(b, sizes);
    for (int i = 0; i < BATCH_COUNT; i++) {
        cl_int code;
        size_t bytes = sizes[i] > 0 ? sizes[i] : sizeof(float); /* OpenCL has no empty buffers */
        b->buffers[i] = clCreateBuffer(context, CL_MEM_READ_WRITE, bytes, NULL, &code);
        TRY(cli_cl(code, "clCreateBuffer"));
    }
    TRY(write_rows(b, BATCH_X, x));
    if (b->dy != NULL)
        TRY(write_rows(b, BATCH_DY, b->dy));
    TRY(force_routing(b));
done:
    if (status != CLMOE_SUCCESS)
        batch_release(b);
    return status;
}

void batch_release(batch *b) {
    for (int i = 0; i < BATCH_COUNT; i++) {
        if (b->buffers[i] != NULL)
            clReleaseMemObject(b->buffers[i]);
        b->buffers[i] = NULL;
    }
}

/* Whether the losses' gradient is asked for. */
static bool has_dlogits(const batch *b) {
    return b->dy != NULL && b->num_losses > 0 && b->tokens > 0;
}

/* The forward adds to it. */
static clmoe_status clear_dlogits(batch *b) {
    const float zero = 0;
    const size_t bytes = (size_t)b->tokens * clmoe_layer_columns(b->layer) * sizeof zero;
    if (!has_dlogits(b))
        return CLMOE_SUCCESS;
    return CL(clEnqueueFillBuffer(b->queue, b->buffers[BATCH_DLOGITS], &zero, sizeof zero, 0, bytes,
                                  0, NULL, NULL));
}

static clmoe_status enqueue_forward(batch *b, clmoe_profile *profile, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_forward_args args;
    TRY(clear_dlogits(b));
    clmoe_forward_args_init(&args);
    args.tokens = b->tokens;
    args.weights = b->weights;
    args.x = place(b, BATCH_X);
    args.saved = place(b, BATCH_SAVED);
    args.scratch = place(b, BATCH_SCRATCH);
    args.y = place(b, BATCH_Y);
    args.stats = place(b, BATCH_STATS);
    if (b->forced.kind != FORCE_NONE) {
        args.ids_in = place(b, BATCH_IDS);
        args.pair_weights_in = place(b, BATCH_WEIGHTS);
    }
    if (b->num_losses > 0) {
        args.losses = b->losses;
        args.num_losses = b->num_losses;
        args.loss_values = place(b, BATCH_LOSSES);
    }
    if (has_dlogits(b))
        args.dlogits = place(b, BATCH_DLOGITS);
    args.profile = profile;
    TRY(LIB(clmoe_forward(b->layer, b->queue, &args, 0, NULL, event)));
done:
    return status;
}

static clmoe_status enqueue_backward(batch *b, clmoe_profile *profile, cl_event *event) {
    clmoe_backward_args args;
    clmoe_backward_args_init(&args);
    args.tokens = b->tokens;
    args.weights = b->weights;
    args.x = place(b, BATCH_X);
    args.saved = place(b, BATCH_SAVED);
    args.scratch = place(b, BATCH_SCRATCH);
    args.dy = place(b, BATCH_DY);
    args.dx = place(b, BATCH_DX);
    if (b->forced.kind != FORCE_NONE) {
        args.ids_in = place(b, BATCH_IDS);
        args.pair_weights_in = place(b, BATCH_WEIGHTS);
    }
    if (has_dlogits(b))
        args.dlogits = place(b, BATCH_DLOGITS);
    args.gradients = &b->gradients;
    args.profile = profile;
    return LIB(clmoe_backward(b->layer, b->queue, &args, 0, NULL, event));
}

/* A buffer of rows [T,D] -> floats, after `event`. */
static clmoe_status read_rows(batch *b, batch_buffer from, cl_event event, float *rows) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_type type = b->desc->type;
    size_t count = (size_t)b->tokens * b->desc->dim, bytes = count * clmoe_type_size(type);
    void *elements = NULL;
    if (bytes == 0)
        return CLMOE_SUCCESS;
    elements = malloc(bytes);
    if (elements == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %zu bytes of output", bytes);
    TRY(CL(clEnqueueReadBuffer(b->queue, b->buffers[from], CL_TRUE, 0, bytes, elements, 1, &event,
                               NULL)));
    clmoe_type_decode(type, elements, count, rows);
done:
    free(elements);
    return status;
}

clmoe_status batch_forward(batch *b, float *y, clmoe_stats **stats) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t stats_bytes = 0;
    cl_event event = NULL;
    *stats = NULL;
    TRY(LIB(clmoe_stats_size(b->layer, &stats_bytes)));
    *stats = malloc(stats_bytes);
    if (*stats == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the statistics"));
    TRY(enqueue_forward(b, NULL, &event));
    TRY(CL(clEnqueueReadBuffer(b->queue, b->buffers[BATCH_STATS], CL_TRUE, 0, stats_bytes, *stats,
                               1, &event, NULL)));
    /* Bounds for readers, whatever a faulty device wrote. */
    (*stats)->columns = clmoe_layer_columns(b->layer);
    (*stats)->device_groups = b->desc->balance.device_groups;
    TRY(read_rows(b, BATCH_Y, event, y));
done:
    if (event != NULL)
        clReleaseEvent(event);
    return status;
}

clmoe_status batch_losses(batch *b, float *values) {
    if (b->num_losses == 0)
        return CLMOE_SUCCESS;
    return CL(clEnqueueReadBuffer(b->queue, b->buffers[BATCH_LOSSES], CL_TRUE, 0,
                                  b->num_losses * sizeof *values, values, 0, NULL, NULL));
}

clmoe_status batch_backward(batch *b, float *dx) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event event = NULL;
    TRY(enqueue_backward(b, NULL, &event));
    TRY(CL(clWaitForEvents(1, &event)));
    TRY(read_rows(b, BATCH_DX, event, dx));
done:
    if (event != NULL)
        clReleaseEvent(event);
    return status;
}

static step_id step_of(const char *name) {
    int step = 0;
    while (step < STEP_COUNT && strcmp(step_names[step], name) != 0)
        step++;
    return (step_id)step;
}

/* A call that is timed, and what it left. */
typedef clmoe_status (*timed_call)(batch *b, clmoe_profile *profile, cl_event *event);

static clmoe_status profile_call(batch *b, timed_call call, clmoe_profile *profile,
                                 double ms[CLMOE_PROFILE_STEPS]) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event event = NULL;
    TRY(call(b, profile, &event));
    TRY(CL(clWaitForEvents(1, &event)));
    for (uint32_t i = 0; i < profile->num_steps; i++)
        TRY(LIB(clmoe_profile_time(profile, i, &ms[i])));
done:
    if (event != NULL)
        clReleaseEvent(event);
    return status;
}

/* One run: the times of its steps, and in times[STEP_COUNT] of all of it. */
static clmoe_status time_run(batch *b, double times[STEP_COUNT + 1]) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_profile profile = {.struct_size = sizeof profile};
    double ms[CLMOE_PROFILE_STEPS];
    for (int i = 0; i < STEP_COUNT; i++)
        times[i] = -1;
    times[STEP_COUNT] = 0;
    TRY(profile_call(b, enqueue_forward, &profile, ms));
    for (uint32_t i = 0; i < profile.num_steps; i++) {
        const step_id step = step_of(profile.steps[i].name);
        times[STEP_COUNT] += ms[i];
        if (step < STEP_COUNT)
            times[step] = ms[i];
    }
done:
    clmoe_profile_release(&profile);
    return status;
}

/* The same of a backward pass: samples[i * stride], all of it last. */
static clmoe_status time_backward(batch *b, double *samples, size_t stride, backward_times *times) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_profile profile = {.struct_size = sizeof profile};
    double ms[CLMOE_PROFILE_STEPS], all = 0;
    TRY(profile_call(b, enqueue_backward, &profile, ms));
    times->num_steps = profile.num_steps;
    for (uint32_t i = 0; i < profile.num_steps; i++) {
        times->names[i] = profile.steps[i].name;
        samples[i * stride] = ms[i];
        all += ms[i];
    }
    samples[CLMOE_PROFILE_STEPS * stride] = all;
done:
    clmoe_profile_release(&profile);
    return status;
}

static int compare_double(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *samples, uint32_t count) {
    qsort(samples, count, sizeof *samples, compare_double);
    return (samples[(count - 1) / 2] + samples[count / 2]) / 2;
}

clmoe_status batch_time(batch *b, uint32_t repeat, batch_times *times) {
    clmoe_status status = CLMOE_SUCCESS;
    double run[STEP_COUNT + 1],
        *samples = calloc((STEP_COUNT + 1) * (size_t)repeat, sizeof *samples);
    times->runs = 0;
    if (samples == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u times", (unsigned)repeat));
    while (times->runs < repeat && (times->runs == 0 || interrupt_signal() == 0)) {
        TRY(time_run(b, run));
        for (size_t i = 0; i <= STEP_COUNT; i++)
            samples[i * repeat + times->runs] = run[i];
        times->runs++;
    }
    for (size_t i = 0; i < STEP_COUNT; i++)
        times->steps[i] = median(samples + i * repeat, times->runs);
    times->forward = median(samples + (size_t)STEP_COUNT * repeat, times->runs);
done:
    free(samples);
    return status;
}

clmoe_status batch_time_backward(batch *b, uint32_t repeat, backward_times *times) {
    clmoe_status status = CLMOE_SUCCESS;
    double *samples = calloc((CLMOE_PROFILE_STEPS + 1) * (size_t)repeat, sizeof *samples);
    *times = (backward_times){0};
    if (samples == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u times", (unsigned)repeat));
    while (times->runs < repeat && (times->runs == 0 || interrupt_signal() == 0)) {
        TRY(time_backward(b, samples + times->runs, repeat, times));
        times->runs++;
    }
    for (size_t i = 0; i < times->num_steps; i++)
        times->steps[i] = median(samples + i * repeat, times->runs);
    times->backward = median(samples + (size_t)CLMOE_PROFILE_STEPS * repeat, times->runs);
done:
    free(samples);
    return status;
}
