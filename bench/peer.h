/* What the library's engines are compared with in the step experts. */
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

/* Takes the choices ids [T,K]. */
clmoe_status peer_create(const char *name, const bench_device *device, const inputs *in,
                         const int32_t *ids, bench_peer *p);
void peer_release(bench_peer *p);

/* Returns when all is done. */
clmoe_status peer_run(bench_peer *p);

clmoe_status peer_check(const bench_peer *p, const reference *ref, check_result *result);

#endif
