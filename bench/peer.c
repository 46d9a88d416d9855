#include "peer.h"

#include <string.h>

clmoe_status peer_create(const char *name, const bench_device *device, const inputs *in,
                         const int32_t *ids, bench_peer *p) {
    *p = (bench_peer){.is_clblast = strcmp(name, PEER_CLBLAST) == 0};
    return p->is_clblast ? peer_clblast_create(device, in, ids, &p->clblast)
                         : peer_openblas_create(device, in, ids, &p->openblas);
}

void peer_release(bench_peer *p) {
    if (p->is_clblast)
        peer_clblast_release(&p->clblast);
    else
        peer_openblas_release(&p->openblas);
}

clmoe_status peer_run(bench_peer *p) {
    if (p->is_clblast)
        return peer_clblast_run(&p->clblast);
    peer_openblas_run(&p->openblas);
    return CLMOE_SUCCESS;
}

clmoe_status peer_check(const bench_peer *p, const reference *ref, check_result *result) {
    if (p->is_clblast)
        return peer_clblast_check(&p->clblast, ref, result);
    peer_openblas_check(&p->openblas, ref, result);
    return CLMOE_SUCCESS;
}
