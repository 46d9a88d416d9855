/* One batch on the device: its buffers, the layer's output, and the time of each step. */
#ifndef CLMOE_CLI_BATCH_H
#define CLMOE_CLI_BATCH_H

#include "../layer.h"

typedef enum step_id {
    STEP_SCORE,
    STEP_TOPK,
    STEP_PLAN,
    STEP_DISPATCH, /* only for engines that do not gather by themselves */
    STEP_EXPERTS,
    STEP_COMBINE,
    STEP_STATS,
    STEP_COUNT
} step_id;

extern const char *const step_names[STEP_COUNT];

typedef enum batch_buffer {
    BATCH_X,           /* [T,D], of the layer's type, like the other rows of D */
    BATCH_Y,           /* [T,D], of the layer's type, like the other rows of D */
    BATCH_SAVED,       /* clmoe_layer_memory() */
    BATCH_SCRATCH,     /* clmoe_layer_memory() */
    BATCH_STATS,       /* clmoe_stats_size() */
    BATCH_LOSSES,      /* [num_losses] f32 */
    BATCH_LOGITS,      /* [T,R] f32; this and the rest for the single steps */
    BATCH_SCORES,      /* [T,R] f32 */
    BATCH_IDS,         /* [T,K] i32 */
    BATCH_WEIGHTS,     /* [T,K] f32 */
    BATCH_LIVE,        /* [T] i32 */
    BATCH_PLAN,        /* clmoe_plan_layout */
    BATCH_XE,          /* [S,D] */
    BATCH_YE,          /* [S,D] */
    BATCH_SHARED,      /* [T,D], a stand-in for the shared expert's output */
    BATCH_SHARED_GATE, /* [T] f32, likewise */
    BATCH_STEP_Y,      /* [T,D] */
    BATCH_COUNT
} batch_buffer;

typedef struct batch {
    clmoe_layer *layer;
    const clmoe_weights *weights;
    cl_command_queue queue; /* with profiling; not owned */
    uint32_t tokens;
    uint32_t capacity; /* C, 0 when dropless */
    const clmoe_loss_desc *losses;
    uint32_t num_losses;
    cl_mem buffers[BATCH_COUNT];
} batch;

/* Milliseconds; a step that does not run has a negative time. */
typedef struct batch_times {
    double forward;
    double steps[STEP_COUNT];
} batch_times;

/* Creates the buffers and writes `x` [T,D]. On error nothing is left allocated. */
clmoe_status batch_create(batch *b, cl_context context, const float *x);
void batch_release(batch *b);

/* Runs the layer; reads y [T,D] and the statistics, to be freed: clmoe_stats and its arrays. */
clmoe_status batch_forward(batch *b, float *y, clmoe_stats **stats);

/* Reads the values [num_losses] of the last batch_forward(). */
clmoe_status batch_losses(batch *b, float *values);

/* Medians over `repeat` runs of the whole layer and of its steps one by one. */
clmoe_status batch_time(batch *b, uint32_t repeat, batch_times *times);

#endif
