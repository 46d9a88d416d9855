/*
 * The peer of the step experts on CPUs, and of the backward pass: a loop over the experts with
 * OpenBLAS's sgemm, on the same weights and the same choices. What the router adds is not in it.
 * Only in builds that found OpenBLAS.
 */
#ifndef BENCH_PEER_OPENBLAS_H
#define BENCH_PEER_OPENBLAS_H

#include "check.h"

#define PEER_OPENBLAS "peer:openblas"

/* Its threads spin for a while after a call, and would disturb whoever runs next. */
enum { PEER_PAUSE_MS = 60 };

/* Of the backward pass; rows of pairs are by expert. */
typedef struct peer_openblas_backward {
    float *dy;                /* [T,D] */
    float *weight;            /* [pairs] */
    uint32_t *place_of;       /* [T,K]: where a pair is */
    float *dye, *hidden;      /* [pairs,D], [pairs,H] */
    float *dhidden, *dz;      /* [pairs,H], [pairs,2H] */
    float *dxe, *dx;          /* [pairs,D], [T,D] */
    float *dgate, *ddown;     /* [E,2H,D], [E,D,H] */
    gradient_samples samples; /* of the check */
} peer_openblas_backward;

typedef struct peer_openblas {
    const bench_device *device;
    const bench_case *of;
    const float *x, *gate, *down; /* mapped from the device's buffers */
    cl_mem mapped[3];
    uint32_t *load, *offset;   /* [E] */
    uint32_t *pair_of;         /* [pairs], by expert */
    float *xe, *gate_up, *out; /* [pairs,D], [pairs,2H], [pairs,D], by expert */
    unsigned threads;
    const inputs *in;
    bool training; /* gate and up are kept */
    peer_openblas_backward backward;
} peer_openblas;

/* Whether this build has it. */
bool peer_openblas_built(void);

/* "OpenBLAS 0.3.21 SKYLAKEX, 2 threads" */
void peer_openblas_name(char *text, size_t size);

/* Takes the choices ids [T,K] and their weights [T,K]. Needs f32 on a CPU device. */
clmoe_status peer_openblas_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                  const float *weights, peer_openblas *peer);
void peer_openblas_release(peer_openblas *peer);

/* Before a step of the backward pass: makes what it needs, and gives its outputs up as NaN. */
clmoe_status peer_openblas_prepare(peer_openblas *peer);

/* STEP_EXPERTS: gathers the rows, then per expert gate and up, silu, down. */
void peer_openblas_run(peer_openblas *peer, bench_step step);

clmoe_status peer_openblas_check(const peer_openblas *peer, bench_step step, const reference *ref,
                                 check_result *result);

#endif
