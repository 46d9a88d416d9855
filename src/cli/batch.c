#include "batch.h"
#include "interrupt.h"

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
}

/* x -> BATCH_X, rounded to the layer's type. */
static clmoe_status write_x(batch *b, const float *x, size_t bytes) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_type type = b->desc->type;
    void *elements = NULL;
    if (bytes == 0)
        return CLMOE_SUCCESS;
    elements = malloc(bytes);
    if (elements == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %zu bytes of input", bytes);
    clmoe_type_encode(type, x, bytes / clmoe_type_size(type), elements);
    TRY(CL(clEnqueueWriteBuffer(b->queue, b->buffers[BATCH_X], CL_TRUE, 0, bytes, elements, 0, NULL,
                                NULL)));
done:
    free(elements);
    return status;
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
    TRY(write_x(b, x, sizes[BATCH_X]));
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

static clmoe_status enqueue_forward(batch *b, clmoe_profile *profile, cl_event *event) {
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = b->tokens;
    args.weights = b->weights;
    args.x = place(b, BATCH_X);
    args.saved = place(b, BATCH_SAVED);
    args.scratch = place(b, BATCH_SCRATCH);
    args.y = place(b, BATCH_Y);
    args.stats = place(b, BATCH_STATS);
    if (b->num_losses > 0) {
        args.losses = b->losses;
        args.num_losses = b->num_losses;
        args.loss_values = place(b, BATCH_LOSSES);
    }
    args.profile = profile;
    return LIB(clmoe_forward(b->layer, b->queue, &args, 0, NULL, event));
}

/* BATCH_Y -> y as floats, after `event`. */
static clmoe_status read_y(batch *b, cl_event event, float *y) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_type type = b->desc->type;
    size_t count = (size_t)b->tokens * b->desc->dim, bytes = count * clmoe_type_size(type);
    void *elements = NULL;
    if (bytes == 0)
        return CLMOE_SUCCESS;
    elements = malloc(bytes);
    if (elements == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %zu bytes of output", bytes);
    TRY(CL(clEnqueueReadBuffer(b->queue, b->buffers[BATCH_Y], CL_TRUE, 0, bytes, elements, 1,
                               &event, NULL)));
    clmoe_type_decode(type, elements, count, y);
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
    TRY(read_y(b, event, y));
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

static step_id step_of(const char *name) {
    int step = 0;
    while (step < STEP_COUNT && strcmp(step_names[step], name) != 0)
        step++;
    return (step_id)step;
}

/* One run: the times of its steps, and in times[STEP_COUNT] of all of it. */
static clmoe_status time_run(batch *b, double times[STEP_COUNT + 1]) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_profile profile = {.struct_size = sizeof profile};
    cl_event event = NULL;
    for (int i = 0; i < STEP_COUNT; i++)
        times[i] = -1;
    times[STEP_COUNT] = 0;
    TRY(enqueue_forward(b, &profile, &event));
    TRY(CL(clWaitForEvents(1, &event)));
    for (uint32_t i = 0; i < profile.num_steps; i++) {
        const step_id step = step_of(profile.steps[i].name);
        double ms = 0;
        TRY(LIB(clmoe_profile_time(&profile, i, &ms)));
        times[STEP_COUNT] += ms;
        if (step < STEP_COUNT)
            times[step] = ms;
    }
done:
    if (event != NULL)
        clReleaseEvent(event);
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
