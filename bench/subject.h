/* One of the library's engines on a case: its layer, its buffers, and every step of it. */
#ifndef BENCH_SUBJECT_H
#define BENCH_SUBJECT_H

#include "backward.h"
#include "counts.h"
#include "policy.h"
#include "reference.h"
#include "train.h"

/* An engine as the bench names it: a library's engine on weights as they are, or a peer. */
typedef struct bench_engine {
    char name[32];    /* "cpu-raw", "cpu-packed", "tiled", "peer:openblas" */
    char library[32]; /* the library's name of it; empty for a peer */
    bool packed;      /* on weights that clmoe_pack_weights() made */
} bench_engine;

typedef enum subject_buffer {
    SUBJECT_SAVED,
    SUBJECT_SCRATCH,
    SUBJECT_LOGITS,  /* [T,E] f32 */
    SUBJECT_SCORES,  /* [T,E] f32 */
    SUBJECT_IDS,     /* [T,K] i32 */
    SUBJECT_WEIGHTS, /* [T,K] f32 */
    SUBJECT_LIVE,    /* [T] i32 */
    SUBJECT_PLAN,
    SUBJECT_XE,     /* [S,D] */
    SUBJECT_YE,     /* [S,D] */
    SUBJECT_STEP_Y, /* [T,D], of the step combine */
    SUBJECT_Y,      /* [T,D], of the whole layer */
    SUBJECT_STATS,
    SUBJECT_PACKED, /* the experts' weights */
    SUBJECT_COUNT
} subject_buffer;

typedef struct subject {
    const bench_device *device;
    const inputs *in;
    clmoe_layer *layer;
    clmoe_weights weights; /* the inputs', packed where the engine is */
    clmoe_plan_layout plan;
    cl_mem buffers[SUBJECT_COUNT];
    bench_policy policies[POLICY_KINDS]; /* made when one of their steps is first enqueued */
    bench_train train;
    bench_counts counts;
    bench_backward backward;
    bool packed;     /* the engine reads packed weights */
    bool dispatches; /* the engine reads xe, not x through the plan */
} subject;

/* Creates the layer and its buffers, and runs every step of the case once in order. Without an
 * engine, the library picks one by device. */
clmoe_status subject_create(const bench_device *device, const inputs *in,
                            const bench_engine *engine, subject *s);
void subject_release(subject *s);

/* The policy of STEP_EXPERT_CHOICE, STEP_SINKHORN or STEP_REROUTE. */
policy_kind step_policy(bench_step step);

/* Before each subject_enqueue() of a step: what it reads besides, which is not timed. */
clmoe_status subject_prepare(subject *s, bench_step step);

/* Fills what the backward pass gives with NaN, so that nothing passes a check that is old. */
clmoe_status subject_forget_gradients(subject *s);

/* Enqueues a step; its inputs are what subject_create() left. */
clmoe_status subject_enqueue(subject *s, bench_step step, cl_event *event);

/* Runs a step on a queue that is done, and times it: on the clock of the device, or of the host if
 * the device is a CPU. */
clmoe_status subject_time(subject *s, bench_step step, double *ms);

/* Reads `bytes` at `offset` of a buffer. */
clmoe_status subject_read(const subject *s, subject_buffer which, size_t offset, size_t bytes,
                          void *to);

#endif
