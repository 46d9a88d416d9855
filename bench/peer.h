/* What the library's engines are compared with in the step experts, and in the backward pass. */
#ifndef BENCH_PEER_H
#define BENCH_PEER_H

#include "peer_clblast.h"
#include "peer_openblas.h"

/* One of the two. */
typedef struct bench_peer {
    bool is_clblast;
    peer_openblas openblas;
    peer_clblast clblast;
} bench_peer;

/* Whether a peer takes part: CLBlast in the step experts alone. */
bool peer_has_step(const char *name, bench_step step);

/* Takes the choices ids [T,K] and their weights [T,K]. */
clmoe_status peer_create(const char *name, const bench_device *device, const inputs *in,
                         const int32_t *ids, const float *weights, bench_peer *p);
void peer_release(bench_peer *p);

/* Before the first run of a step: what it reads besides, which is not timed. */
clmoe_status peer_prepare(bench_peer *p, bench_step step);

/* Returns when all is done. */
clmoe_status peer_run(bench_peer *p, bench_step step);

clmoe_status peer_check(const bench_peer *p, bench_step step, const reference *ref,
                        check_result *result);

#endif
