/* One batch on the device: its buffers, the layer's output, and the time of each step. */
#ifndef CLMOE_CLI_BATCH_H
#define CLMOE_CLI_BATCH_H

#include "error.h"
#include "force.h"

/* The steps of a profile that a table of times has, in its order. */
typedef enum step_id {
    STEP_SCORE,
    STEP_TOPK,
    STEP_PLAN,
    STEP_DISPATCH, /* only for engines that do not gather by themselves */
    STEP_EXPERTS,
    STEP_SHARED,
    STEP_COMBINE,
    STEP_BALANCE,
    STEP_COUNT
} step_id;

extern const char *const step_names[STEP_COUNT];

typedef enum batch_buffer {
    BATCH_X,       /* [T,D], of the layer's type, like the other rows of D */
    BATCH_Y,       /* [T,D], of the layer's type, like the other rows of D */
    BATCH_SAVED,   /* clmoe_layer_memory() */
    BATCH_SCRATCH, /* clmoe_layer_memory() */
    BATCH_STATS,   /* clmoe_stats_size() */
    BATCH_LOSSES,  /* [num_losses] f32 */
    BATCH_DY,      /* [T,D], of the layer's type, with `dy` */
    BATCH_DX,      /* [T,D], of the layer's type, with `dy` */
    BATCH_DLOGITS, /* [T,R] f32: the losses' gradient, with `dy` */
    BATCH_IDS,     /* [T,K] i32, with forced routing; as the next */
    BATCH_WEIGHTS, /* [T,K] f32 */
    BATCH_COUNT
} batch_buffer;

typedef struct batch {
    clmoe_layer *layer;
    const clmoe_layer_desc *desc; /* the layer's */
    const clmoe_weights *weights;
    cl_command_queue queue; /* with profiling; not owned */
    uint32_t tokens;
    uint32_t capacity; /* C, 0 when dropless */
    const clmoe_loss_desc *losses;
    uint32_t num_losses;
    forced_routing forced;     /* instead of the router's choice, if of a kind */
    const float *dy;           /* [T,D]: of batch_backward(); NULL: there is none */
    clmoe_gradients gradients; /* what it writes; not owned */
    cl_mem buffers[BATCH_COUNT];
} batch;

/* Milliseconds; a step that the layer does not have has a negative time. */
typedef struct batch_times {
    uint32_t runs; /* whose medians they are */
    double forward;
    double steps[STEP_COUNT];
} batch_times;

/* The same of a backward pass: its steps as its profile names them. */
typedef struct backward_times {
    uint32_t runs;
    double backward;
    uint32_t num_steps;
    const char *names[CLMOE_PROFILE_STEPS];
    double steps[CLMOE_PROFILE_STEPS];
} backward_times;

/* Creates the buffers and writes `x` [T,D] and b->dy. On error nothing is left allocated. */
clmoe_status batch_create(batch *b, cl_context context, const float *x);
void batch_release(batch *b);

/* Runs the layer; reads y [T,D] and the statistics, to be freed: clmoe_stats and its arrays. */
clmoe_status batch_forward(batch *b, float *y, clmoe_stats **stats);

/* Reads the values [num_losses] of the last batch_forward(). */
clmoe_status batch_losses(batch *b, float *values);

/*
 * After batch_forward(): the gradients of sum(dy * y) plus the weighted losses; reads dx [T,D].
 */
clmoe_status batch_backward(batch *b, float *dx);

/* Medians of the layer and its steps over `repeat` runs, or as many as there were until a signal.
 */
clmoe_status batch_time(batch *b, uint32_t repeat, batch_times *times);

/* The same of batch_backward(). */
clmoe_status batch_time_backward(batch *b, uint32_t repeat, backward_times *times);

#endif
