/*
 * The peer of the step experts on CPUs: a loop over the experts with OpenBLAS's sgemm, on the same
 * weights and the same choices. Only in builds that found OpenBLAS.
 */
#ifndef BENCH_PEER_OPENBLAS_H
#define BENCH_PEER_OPENBLAS_H

#include "check.h"

#define PEER_OPENBLAS "peer:openblas"

/* Its threads spin for a while after a call, and would disturb whoever runs next. */
enum { PEER_PAUSE_MS = 60 };

typedef struct peer_openblas {
    const bench_device *device;
    const bench_case *of;
    const float *x, *gate, *down; /* mapped from the device's buffers */
    cl_mem mapped[3];
    uint32_t *load, *offset;   /* [E] */
    uint32_t *pair_of;         /* [pairs], by expert */
    float *xe, *gate_up, *out; /* [pairs,D], [pairs,2H], [pairs,D], by expert */
    unsigned threads;
} peer_openblas;

/* Whether this build has it. */
bool peer_openblas_built(void);

/* "OpenBLAS 0.3.21 SKYLAKEX, 2 threads" */
void peer_openblas_name(char *text, size_t size);

/* Takes the choices ids [T,K]. Needs f32 on a CPU device. */
clmoe_status peer_openblas_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                  peer_openblas *peer);
void peer_openblas_release(peer_openblas *peer);

/* Gathers the rows, then per expert gate and up, silu, down. */
void peer_openblas_run(peer_openblas *peer);

void peer_openblas_check(const peer_openblas *peer, const reference *ref, check_result *result);

#endif
