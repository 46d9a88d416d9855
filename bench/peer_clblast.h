/*
 * The peer of the engine clblast in the step experts: CLBlast's GEMM called directly, with the rows
 * gathered beforehand and their number known to the host. Only in builds with CLBlast.
 */
#ifndef BENCH_PEER_CLBLAST_H
#define BENCH_PEER_CLBLAST_H

#include "check.h"

#define PEER_CLBLAST "peer:clblast"

typedef struct peer_clblast {
    const bench_device *device;
    const inputs *in;
    uint32_t *load, *offset;         /* [E] */
    uint32_t *pair_of;               /* [pairs], by expert */
    cl_mem xe, gate_up, hidden, out; /* [pairs,D], [pairs,2H], [pairs,H], [pairs,D], by expert */
    cl_kernel silu;
} peer_clblast;

/* Whether this build has it. */
bool peer_clblast_built(void);

/* Takes the choices ids [T,K]. Needs f32. */
clmoe_status peer_clblast_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                 peer_clblast *peer);
void peer_clblast_release(peer_clblast *peer);

/* Per expert gate and up, silu, per expert down; returns when all is done. */
clmoe_status peer_clblast_run(peer_clblast *peer);

clmoe_status peer_clblast_check(const peer_clblast *peer, const reference *ref,
                                check_result *result);

#endif
