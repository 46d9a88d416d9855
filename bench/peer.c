#include "peer.h"

#include <string.h>

bool peer_has_step(const char *name, bench_step step) {
    return step == STEP_EXPERTS || (step_is_backward(step) && strcmp(name, PEER_OPENBLAS) == 0);
}

clmoe_status peer_create(const char *name, const bench_device *device, const inputs *in,
                         const int32_t *ids, const float *weights, bench_peer *p) {
    *p = (bench_peer){.is_clblast = strcmp(name, PEER_CLBLAST) == 0};
    return p->is_clblast ? peer_clblast_create(device, in, ids, &p->clblast)
                         : peer_openblas_create(device, in, ids, weights, &p->openblas);
}

void peer_release(bench_peer *p) {
    if (p->is_clblast)
        peer_clblast_release(&p->clblast);
    else
        peer_openblas_release(&p->openblas);
}

clmoe_status peer_prepare(bench_peer *p, bench_step step) {
    if (!step_is_backward(step))
        return CLMOE_SUCCESS;
    return peer_openblas_prepare(&p->openblas);
}

clmoe_status peer_run(bench_peer *p, bench_step step) {
    if (p->is_clblast)
        return peer_clblast_run(&p->clblast);
    peer_openblas_run(&p->openblas, step);
    return CLMOE_SUCCESS;
}

clmoe_status peer_check(const bench_peer *p, bench_step step, const reference *ref,
                        check_result *result) {
    if (p->is_clblast)
        return peer_clblast_check(&p->clblast, ref, result);
    return peer_openblas_check(&p->openblas, step, ref, result);
}
