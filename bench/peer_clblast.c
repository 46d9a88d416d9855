#include "peer_clblast.h"

#include <stdlib.h>

#ifdef CLMOE_WITH_CLBLAST

#include <clblast_c.h>

enum { GROUP = 64, GROUPS = 256 };

bool peer_clblast_built(void) {
    return true;
}

static size_t pairs_of(const peer_clblast *peer) {
    return (size_t)peer->in->of.tokens * peer->in->of.top_k;
}

/* The rows of expert e: c [rows, n] = a [rows, k] w[e]^T, w [E,n,k]. */
static clmoe_status gemm(peer_clblast *peer, uint32_t e, size_t n, size_t k, cl_mem a, cl_mem w,
                         cl_mem c) {
    cl_command_queue queue = peer->device->queue;
    if (peer->load[e] == 0)
        return CLMOE_SUCCESS;
    const CLBlastStatusCode code = CLBlastSgemm(
        CLBlastLayoutRowMajor, CLBlastTransposeNo, CLBlastTransposeYes, peer->load[e], n, k, 1, a,
        peer->offset[e] * k, k, w, e * n * k, k, 0, c, peer->offset[e] * n, n, &queue, NULL);
    return code == CLBlastSuccess
               ? CLMOE_SUCCESS
               : cli_fail(CLMOE_ENGINE_FAILED, "CLBlastSgemm failed with %d", (int)code);
}

clmoe_status peer_clblast_run(peer_clblast *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &peer->in->of;
    const clmoe_mlp_weights *weights = &peer->in->weights.experts;
    for (uint32_t e = 0; e < c->experts; e++)
        TRY(gemm(peer, e, (size_t)2 * c->hidden_dim, c->dim, peer->xe, weights->gate.mem,
                 peer->gate_up));
    TRY(device_launch(peer->device, peer->silu, GROUPS, GROUP));
    for (uint32_t e = 0; e < c->experts; e++)
        TRY(gemm(peer, e, c->dim, c->hidden_dim, peer->hidden, weights->down.mem, peer->out));
    TRY(CL(clFinish(peer->device->queue)));
done:
    return status;
}

static clmoe_status create_buffers(peer_clblast *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &peer->in->of;
    const size_t row = pairs_of(peer) * sizeof(float);
    TRY(device_buffer(peer->device, row * c->dim, &peer->xe));
    TRY(device_buffer(peer->device, row * 2 * c->hidden_dim, &peer->gate_up));
    TRY(device_buffer(peer->device, row * c->hidden_dim, &peer->hidden));
    TRY(device_buffer(peer->device, row * c->dim, &peer->out));
done:
    return status;
}

/* The rows of x that each expert gets. */
static clmoe_status gather_rows(peer_clblast *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &peer->in->of;
    const size_t pairs = pairs_of(peer), bytes = pairs * c->dim * sizeof(float);
    float *xe = malloc(bytes);
    if (!xe)
        TRY(bench_no_memory(PEER_CLBLAST));
    for (size_t i = 0; i < pairs; i++)
        for (size_t d = 0; d < c->dim; d++)
            xe[i * c->dim + d] =
                value_at(&peer->in->x, (uint64_t)(peer->pair_of[i] / c->top_k) * c->dim + d);
    TRY(CL(
        clEnqueueWriteBuffer(peer->device->queue, peer->xe, CL_TRUE, 0, bytes, xe, 0, NULL, NULL)));
done:
    free(xe);
    return status;
}

static clmoe_status create_silu(peer_clblast *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_ulong rows = pairs_of(peer), columns = peer->in->of.hidden_dim;
    TRY(device_kernel(peer->device, "silu.cl", "-DGROUP=64", "silu_rows", &peer->silu));
    TRY(CL(clSetKernelArg(peer->silu, 0, sizeof peer->gate_up, &peer->gate_up)));
    TRY(CL(clSetKernelArg(peer->silu, 1, sizeof peer->hidden, &peer->hidden)));
    TRY(CL(clSetKernelArg(peer->silu, 2, sizeof rows, &rows)));
    TRY(CL(clSetKernelArg(peer->silu, 3, sizeof columns, &columns)));
done:
    return status;
}

clmoe_status peer_clblast_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                 peer_clblast *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    *peer = (peer_clblast){.device = device, .in = in};
    if (in->type != CLMOE_F32)
        return cli_fail(CLMOE_UNSUPPORTED, PEER_CLBLAST " needs f32");
    peer->load = malloc(in->of.experts * sizeof *peer->load);
    peer->offset = malloc(in->of.experts * sizeof *peer->offset);
    peer->pair_of = malloc(pairs_of(peer) * sizeof *peer->pair_of);
    if (!peer->load || !peer->offset || !peer->pair_of)
        TRY(bench_no_memory(PEER_CLBLAST));
    sort_pairs(ids, &in->of, peer->load, peer->offset, peer->pair_of);
    TRY(create_buffers(peer));
    TRY(gather_rows(peer));
    TRY(create_silu(peer));
done:
    if (status != CLMOE_SUCCESS)
        peer_clblast_release(peer);
    return status;
}

void peer_clblast_release(peer_clblast *peer) {
    buffer_release(&peer->xe);
    buffer_release(&peer->gate_up);
    buffer_release(&peer->hidden);
    buffer_release(&peer->out);
    if (peer->silu)
        clReleaseKernel(peer->silu);
    free(peer->load);
    free(peer->offset);
    free(peer->pair_of);
    *peer = (peer_clblast){0};
}

clmoe_status peer_clblast_check(const peer_clblast *peer, const reference *ref,
                                check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t bytes = pairs_of(peer) * peer->in->of.dim * sizeof(float);
    float *out = malloc(bytes);
    if (!out)
        TRY(bench_no_memory(PEER_CLBLAST));
    TRY(CL(clEnqueueReadBuffer(peer->device->queue, peer->out, CL_TRUE, 0, bytes, out, 0, NULL,
                               NULL)));
    check_pairs(PEER_CLBLAST, &peer->in->of, ref, peer->pair_of, out, result);
done:
    free(out);
    return status;
}

#else

bool peer_clblast_built(void) {
    return false;
}

clmoe_status peer_clblast_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                 peer_clblast *peer) {
    (void)device, (void)in, (void)ids;
    *peer = (peer_clblast){0};
    return cli_fail(CLMOE_UNSUPPORTED, "this build has no " PEER_CLBLAST);
}

void peer_clblast_release(peer_clblast *peer) {
    (void)peer;
}

clmoe_status peer_clblast_run(peer_clblast *peer) {
    (void)peer;
    return CLMOE_UNSUPPORTED;
}

clmoe_status peer_clblast_check(const peer_clblast *peer, const reference *ref,
                                check_result *result) {
    (void)peer, (void)ref, (void)result;
    return CLMOE_UNSUPPORTED;
}

#endif
