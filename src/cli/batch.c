#include "batch.h"

#include <stdlib.h>
#include <time.h>

const char *const step_names[STEP_COUNT] = {"score",   "topk",    "plan", "dispatch",
                                            "experts", "combine", "stats"};

static clmoe_buf place(const batch *b, batch_buffer which) {
    return (clmoe_buf){b->buffers[which], 0};
}

/* Whether the engine needs no dispatch. */
static bool gathers(const batch *b) {
    return b->layer->experts.engine->gathers;
}

static void sizes_get(const batch *b, const clmoe_plan_layout *plan, size_t sizes[BATCH_COUNT]) {
    const clmoe_layer_desc *desc = &b->layer->desc;
    size_t tokens = b->tokens, f32 = sizeof(float), element = type_bytes(desc->type);
    size_t rows = tokens * desc->dim * element, columns = tokens * b->layer->columns * f32;
    size_t pairs = tokens * desc->top_k * f32, slots = (size_t)plan->slots * desc->dim * element;
    sizes[BATCH_X] = sizes[BATCH_Y] = sizes[BATCH_STEP_Y] = rows;
    sizes[BATCH_SHARED] = desc->shared.hidden_dim > 0 ? rows : 0;
    sizes[BATCH_LOGITS] = sizes[BATCH_SCORES] = columns;
    sizes[BATCH_IDS] = sizes[BATCH_WEIGHTS] = pairs;
    sizes[BATCH_LIVE] = tokens * f32;
    sizes[BATCH_SHARED_GATE] = desc->shared_gate ? tokens * f32 : 0;
    sizes[BATCH_XE] = gathers(b) ? 0 : slots;
    sizes[BATCH_YE] = slots;
    sizes[BATCH_PLAN] = plan->bytes;
    sizes[BATCH_STATS] = clmoe_stats_size(b->layer);
    sizes[BATCH_LOSSES] = b->num_losses * f32;
}

static clmoe_status fill_zero(batch *b, batch_buffer which, size_t bytes) {
    const cl_uint zero = 0;
    if (bytes == 0)
        return CLMOE_SUCCESS;
    return CL(clEnqueueFillBuffer(b->queue, b->buffers[which], &zero, sizeof zero, 0, bytes, 0,
                                  NULL, NULL));
}

/* x -> BATCH_X, rounded to the layer's type. */
static clmoe_status write_x(batch *b, const float *x, size_t bytes) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_type type = b->layer->desc.type;
    void *elements = NULL;
    if (bytes == 0)
        return CLMOE_SUCCESS;
    elements = malloc(bytes);
    if (elements == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "no memory for %zu bytes of input", bytes);
    type_encode(type, x, bytes / type_bytes(type), elements);
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
    TRY(clmoe_layer_memory(b->layer, b->tokens, &sizes[BATCH_SAVED], &sizes[BATCH_SCRATCH]));
    TRY(clmoe_plan_layout_get(b->layer, b->tokens, &plan));
    b->capacity = plan.capacity;
    sizes_get(b, &plan, sizes);
    for (int i = 0; i < BATCH_COUNT; i++) {
        cl_int code;
        size_t bytes = sizes[i] > 0 ? sizes[i] : sizeof(float); /* OpenCL has no empty buffers */
        b->buffers[i] = clCreateBuffer(context, CL_MEM_READ_WRITE, bytes, NULL, &code);
        TRY(clmoe_cl_check(code, "clCreateBuffer"));
    }
    TRY(write_x(b, x, sizes[BATCH_X]));
    TRY(fill_zero(b, BATCH_SHARED, sizes[BATCH_SHARED]));
    TRY(fill_zero(b, BATCH_SHARED_GATE, sizes[BATCH_SHARED_GATE]));
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

static clmoe_status enqueue_forward(batch *b, cl_event *event) {
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
    return clmoe_forward(b->layer, b->queue, &args, 0, NULL, event);
}

/* BATCH_Y -> y as floats, after `event`. */
static clmoe_status read_y(batch *b, cl_event event, float *y) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_type type = b->layer->desc.type;
    size_t count = (size_t)b->tokens * b->layer->desc.dim, bytes = count * type_bytes(type);
    void *elements = NULL;
    if (bytes == 0)
        return CLMOE_SUCCESS;
    elements = malloc(bytes);
    if (elements == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "no memory for %zu bytes of output", bytes);
    TRY(CL(clEnqueueReadBuffer(b->queue, b->buffers[BATCH_Y], CL_TRUE, 0, bytes, elements, 1,
                               &event, NULL)));
    type_decode(type, elements, count, y);
done:
    free(elements);
    return status;
}

clmoe_status batch_forward(batch *b, float *y, clmoe_stats **stats) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t stats_bytes = clmoe_stats_size(b->layer);
    cl_event event = NULL;
    *stats = malloc(stats_bytes);
    if (*stats == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "no memory for the statistics"));
    TRY(enqueue_forward(b, &event));
    TRY(CL(clEnqueueReadBuffer(b->queue, b->buffers[BATCH_STATS], CL_TRUE, 0, stats_bytes, *stats,
                               1, &event, NULL)));
    (*stats)->columns = b->layer->columns; /* a bound for readers, whatever a faulty device wrote */
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

static clmoe_status enqueue_routing(batch *b, step_id step, cl_event *event) {
    clmoe_layer *layer = b->layer;
    clmoe_buf ids = place(b, BATCH_IDS), weights = place(b, BATCH_WEIGHTS);
    clmoe_buf scores = place(b, BATCH_SCORES), live = place(b, BATCH_LIVE);
    if (step == STEP_SCORE) {
        clmoe_score_args args = {.struct_size = sizeof args,
                                 .tokens = b->tokens,
                                 .weights = b->weights,
                                 .x = place(b, BATCH_X),
                                 .logits = place(b, BATCH_LOGITS),
                                 .scores = scores};
        return clmoe_score(layer, b->queue, &args, 0, NULL, event);
    }
    if (step == STEP_TOPK) {
        clmoe_topk_args args = {.struct_size = sizeof args,
                                .tokens = b->tokens,
                                .weights = b->weights,
                                .scores = scores,
                                .ids = ids,
                                .weights_out = weights,
                                .live = live};
        return clmoe_topk(layer, b->queue, &args, 0, NULL, event);
    }
    clmoe_plan_args args = {.struct_size = sizeof args,
                            .tokens = b->tokens,
                            .ids = ids,
                            .pair_weights = weights,
                            .live = live,
                            .scratch = place(b, BATCH_SCRATCH),
                            .plan = place(b, BATCH_PLAN)};
    return clmoe_plan(layer, b->queue, &args, 0, NULL, event);
}

static clmoe_status enqueue_experts(batch *b, step_id step, cl_event *event) {
    clmoe_buf plan = place(b, BATCH_PLAN), xe = place(b, BATCH_XE);
    if (step == STEP_DISPATCH) {
        clmoe_dispatch_args args = {.struct_size = sizeof args,
                                    .tokens = b->tokens,
                                    .x = place(b, BATCH_X),
                                    .plan = plan,
                                    .xe = xe};
        return clmoe_dispatch(b->layer, b->queue, &args, 0, NULL, event);
    }
    clmoe_experts_args args = {.struct_size = sizeof args,
                               .tokens = b->tokens,
                               .weights = b->weights,
                               .pair_weights = place(b, BATCH_WEIGHTS),
                               .plan = plan,
                               .scratch = place(b, BATCH_SCRATCH),
                               .ye = place(b, BATCH_YE)};
    if (gathers(b))
        args.x = place(b, BATCH_X);
    else
        args.xe = xe;
    return clmoe_experts(b->layer, b->queue, &args, 0, NULL, event);
}

static clmoe_status enqueue_result(batch *b, step_id step, cl_event *event) {
    clmoe_buf plan = place(b, BATCH_PLAN);
    if (step == STEP_STATS) {
        clmoe_stats_args args = {.struct_size = sizeof args,
                                 .tokens = b->tokens,
                                 .logits = place(b, BATCH_LOGITS),
                                 .ids = place(b, BATCH_IDS),
                                 .pair_weights = place(b, BATCH_WEIGHTS),
                                 .plan = plan,
                                 .live = place(b, BATCH_LIVE),
                                 .scratch = place(b, BATCH_SCRATCH),
                                 .stats = place(b, BATCH_STATS)};
        return clmoe_stats_compute(b->layer, b->queue, &args, 0, NULL, event);
    }
    clmoe_combine_args args = {.struct_size = sizeof args,
                               .tokens = b->tokens,
                               .weights = b->weights,
                               .x = place(b, BATCH_X),
                               .ye = place(b, BATCH_YE),
                               .pair_weights = place(b, BATCH_WEIGHTS),
                               .plan = plan,
                               .y = place(b, BATCH_STEP_Y)};
    if (b->layer->desc.shared.hidden_dim > 0)
        args.shared = place(b, BATCH_SHARED);
    if (b->layer->desc.shared_gate)
        args.shared_gate = place(b, BATCH_SHARED_GATE);
    return clmoe_combine(b->layer, b->queue, &args, 0, NULL, event);
}

/* STEP_COUNT stands for the whole layer. */
static clmoe_status enqueue_step(batch *b, step_id step, cl_event *event) {
    if (step == STEP_COUNT)
        return enqueue_forward(b, event);
    if (step <= STEP_PLAN)
        return enqueue_routing(b, step, event);
    return step <= STEP_EXPERTS ? enqueue_experts(b, step, event) : enqueue_result(b, step, event);
}

static double wall_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e3 + (double)now.tv_nsec * 1e-6;
}

/* Between the ends of two events on the device's clock, or `wall` where it has no such clock. */
static double device_ms(cl_event from, cl_event to, double wall) {
    cl_ulong begin = 0, end = 0;
    if (clGetEventProfilingInfo(from, CL_PROFILING_COMMAND_END, sizeof begin, &begin, NULL) ||
        clGetEventProfilingInfo(to, CL_PROFILING_COMMAND_END, sizeof end, &end, NULL))
        return wall;
    return begin == 0 || end < begin ? wall : (double)(end - begin) * 1e-6;
}

static clmoe_status time_step(batch *b, step_id step, double *ms) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event from = NULL, to = NULL;
    TRY(CL(clFinish(b->queue)));
    double begin = wall_ms();
    TRY(CL(clEnqueueMarkerWithWaitList(b->queue, 0, NULL, &from)));
    TRY(enqueue_step(b, step, &to));
    TRY(CL(clWaitForEvents(1, &to)));
    *ms = device_ms(from, to, wall_ms() - begin);
done:
    if (from != NULL)
        clReleaseEvent(from);
    if (to != NULL)
        clReleaseEvent(to);
    return status;
}

static int compare_double(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static clmoe_status time_median(batch *b, step_id step, uint32_t repeat, double *samples,
                                double *median) {
    clmoe_status status = CLMOE_SUCCESS;
    for (uint32_t i = 0; i < repeat; i++)
        TRY(time_step(b, step, &samples[i]));
    qsort(samples, repeat, sizeof *samples, compare_double);
    *median = (samples[(repeat - 1) / 2] + samples[repeat / 2]) / 2;
done:
    return status;
}

clmoe_status batch_time(batch *b, uint32_t repeat, batch_times *times) {
    clmoe_status status = CLMOE_SUCCESS;
    double *samples = calloc(repeat, sizeof *samples);
    if (samples == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "no memory for %u times", (unsigned)repeat));
    TRY(time_median(b, STEP_COUNT, repeat, samples, &times->forward));
    for (int step = 0; step < STEP_COUNT; step++) {
        times->steps[step] = -1;
        if (step != STEP_DISPATCH || !gathers(b))
            TRY(time_median(b, (step_id)step, repeat, samples, &times->steps[step]));
    }
done:
    free(samples);
    return status;
}
