/*
 * The layer of a case as it is trained, so that every statistic and every loss has a meaning:
 * gaussian noise of deviation 1/E on the logits, capacity factor 2, up to eight device groups.
 */
#ifndef BENCH_TRAIN_H
#define BENCH_TRAIN_H

#include "inputs.h"

/* One loss of each kind. */
enum { TRAIN_LOSSES = CLMOE_LOSS_TOKEN_ENTROPY + 1, TRAIN_SEED = 20 };

typedef enum train_buffer {
    TRAIN_STATE,
    TRAIN_SCRATCH,
    TRAIN_LOGITS,  /* [T,E] f32, without the noise */
    TRAIN_SCORES,  /* [T,E] f32 */
    TRAIN_IDS,     /* [T,K] i32 */
    TRAIN_WEIGHTS, /* [T,K] f32 */
    TRAIN_LIVE,    /* [T] i32 */
    TRAIN_PLAN,
    TRAIN_Y, /* [T,D] */
    TRAIN_STATS,
    TRAIN_VALUES,  /* [losses] f32 */
    TRAIN_DLOGITS, /* [T,E] f32 */
    TRAIN_BUFFERS
} train_buffer;

typedef struct bench_train {
    const bench_device *device;
    const inputs *in;
    const clmoe_weights *weights;
    clmoe_layer *layer;
    clmoe_plan_layout plan;
    cl_mem buffers[TRAIN_BUFFERS];
} bench_train;

/* Creates the layer, its state and its buffers, and runs the routing once, up to the plan. */
clmoe_status train_create(const bench_device *device, const inputs *in,
                          const clmoe_weights *weights, const char *engine, bench_train *t);
void train_release(bench_train *t);

/* STEP_TRAIN, STEP_TRAIN_BALANCE or STEP_BALANCE. The latter two clear dlogits first. */
clmoe_status train_enqueue(bench_train *t, bench_step step, cl_event *event);

/* The layer, for `engine`, and its losses. */
clmoe_layer_desc train_desc(const inputs *in, const char *engine);
void train_losses(clmoe_loss_desc losses[TRAIN_LOSSES]);

#endif
