#include "peer_openblas.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef BENCH_WITH_OPENBLAS

#include <cblas.h>
#include <math.h>
#include <pthread.h>

enum { MAX_THREADS = 64 };

bool peer_openblas_built(void) {
    return true;
}

void peer_openblas_name(char *text, size_t size) {
    const char *config = openblas_get_config(); /* "OpenBLAS 0.3.21 ..." */
    const size_t name = strcspn(config, " "), version = strcspn(config + name + 1, " ");
    snprintf(text, size, "%.*s %s, %d threads", (int)(name + 1 + version), config,
             openblas_get_corename(), openblas_get_num_procs());
}

/* ---- The parts that are not GEMMs, over pairs, on as many threads ---------------------------- */

typedef struct pair_range {
    const peer_openblas *peer;
    uint32_t begin, end;
} pair_range;

static void *gather_rows(void *opaque) {
    const pair_range *range = opaque;
    const peer_openblas *peer = range->peer;
    const size_t dim = peer->of->dim;
    for (uint32_t i = range->begin; i < range->end; i++)
        memcpy(peer->xe + i * dim, peer->x + peer->pair_of[i] / peer->of->top_k * dim,
               dim * sizeof *peer->xe);
    return NULL;
}

/* silu(gate) * up, into gate's place. */
static void *activate_rows(void *opaque) {
    const pair_range *range = opaque;
    const size_t hidden = range->peer->of->hidden_dim;
    for (uint32_t i = range->begin; i < range->end; i++) {
        float *gate = range->peer->gate_up + i * 2 * hidden;
        const float *up = gate + hidden;
        for (size_t h = 0; h < hidden; h++)
            gate[h] = gate[h] / (1.0F + expf(-gate[h])) * up[h];
    }
    return NULL;
}

static void for_all_pairs(const peer_openblas *peer, void *(*work)(void *)) {
    pthread_t threads[MAX_THREADS];
    pair_range ranges[MAX_THREADS];
    bool started[MAX_THREADS] = {false};
    const uint32_t pairs = peer->of->tokens * peer->of->top_k, count = peer->threads;
    for (uint32_t i = 0; i < count; i++) {
        ranges[i] = (pair_range){peer, (uint32_t)((uint64_t)pairs * i / count),
                                 (uint32_t)((uint64_t)pairs * (i + 1) / count)};
        if (i > 0 && ranges[i].end > ranges[i].begin)
            started[i] = pthread_create(&threads[i], NULL, work, &ranges[i]) == 0;
    }
    for (uint32_t i = 0; i < count; i++) {
        if (started[i])
            pthread_join(threads[i], NULL);
        else
            work(&ranges[i]);
    }
}

/* c [rows, n] = a [rows, k] w^T, w [n, k]; rows of a are `stride` apart. */
static void gemm(uint32_t rows, uint32_t n, uint32_t k, const float *a, uint32_t stride,
                 const float *w, float *c) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (int)rows, (int)n, (int)k, 1, a,
                (int)stride, w, (int)k, 0, c, (int)n);
}

void peer_openblas_run(peer_openblas *peer) {
    const uint32_t dim = peer->of->dim, hidden = peer->of->hidden_dim;
    const size_t matrix = (size_t)dim * hidden;
    for_all_pairs(peer, gather_rows);
    for (uint32_t e = 0; e < peer->of->experts; e++)
        if (peer->load[e] > 0)
            gemm(peer->load[e], 2 * hidden, dim, peer->xe + (size_t)peer->offset[e] * dim, dim,
                 peer->gate + e * 2 * matrix, peer->gate_up + (size_t)peer->offset[e] * 2 * hidden);
    for_all_pairs(peer, activate_rows);
    for (uint32_t e = 0; e < peer->of->experts; e++)
        if (peer->load[e] > 0)
            gemm(peer->load[e], dim, hidden, peer->gate_up + (size_t)peer->offset[e] * 2 * hidden,
                 2 * hidden, peer->down + e * matrix, peer->out + (size_t)peer->offset[e] * dim);
}

/* ---- Creation ------------------------------------------------------------------------------ */

static clmoe_status map_all(const inputs *in, peer_openblas *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_mem buffers[] = {in->x_buf.mem, in->weights.experts.gate.mem,
                              in->weights.experts.down.mem};
    const float **places[] = {&peer->x, &peer->gate, &peer->down};
    for (size_t i = 0; i < COUNT_OF(buffers); i++) {
        cl_int code = CL_SUCCESS;
        size_t bytes = 0;
        TRY(CL(clGetMemObjectInfo(buffers[i], CL_MEM_SIZE, sizeof bytes, &bytes, NULL)));
        *places[i] = clEnqueueMapBuffer(peer->device->queue, buffers[i], CL_TRUE, CL_MAP_READ, 0,
                                        bytes, 0, NULL, NULL, &code);
        TRY(cli_cl(code, "clEnqueueMapBuffer"));
        peer->mapped[i] = buffers[i];
    }
done:
    return status;
}

static clmoe_status allocate(peer_openblas *peer) {
    const size_t experts = peer->of->experts, dim = peer->of->dim, hidden = peer->of->hidden_dim;
    const size_t pairs = (size_t)peer->of->tokens * peer->of->top_k;
    peer->pair_of = malloc(pairs * sizeof *peer->pair_of);
    peer->load = malloc(experts * sizeof *peer->load);
    peer->offset = malloc(experts * sizeof *peer->offset);
    peer->xe = malloc(pairs * dim * sizeof *peer->xe);
    peer->gate_up = malloc(pairs * 2 * hidden * sizeof *peer->gate_up);
    peer->out = malloc(pairs * dim * sizeof *peer->out);
    bool ready =
        peer->pair_of && peer->load && peer->offset && peer->xe && peer->gate_up && peer->out;
    return ready ? CLMOE_SUCCESS : bench_no_memory(PEER_OPENBLAS);
}

clmoe_status peer_openblas_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                  peer_openblas *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const int threads = openblas_get_num_procs();
    *peer = (peer_openblas){.device = device, .of = &in->of};
    if (!device->cpu || in->type != CLMOE_F32)
        return cli_fail(CLMOE_UNSUPPORTED, PEER_OPENBLAS " needs f32 on a CPU device");
    peer->threads = threads < MAX_THREADS ? (unsigned)threads : MAX_THREADS;
    openblas_set_num_threads(threads);
    TRY(allocate(peer));
    TRY(map_all(in, peer));
    sort_pairs(ids, &in->of, peer->load, peer->offset, peer->pair_of);
done:
    if (status != CLMOE_SUCCESS)
        peer_openblas_release(peer);
    return status;
}

void peer_openblas_release(peer_openblas *peer) {
    const float *places[] = {peer->x, peer->gate, peer->down};
    for (size_t i = 0; i < COUNT_OF(places); i++)
        if (peer->mapped[i])
            clEnqueueUnmapMemObject(peer->device->queue, peer->mapped[i],
                                    (void *)(uintptr_t)places[i], 0, NULL, NULL);
    if (peer->device)
        clFinish(peer->device->queue);
    free(peer->pair_of);
    free(peer->load);
    free(peer->offset);
    free(peer->xe);
    free(peer->gate_up);
    free(peer->out);
    *peer = (peer_openblas){0};
}

void peer_openblas_check(const peer_openblas *peer, const reference *ref, check_result *result) {
    check_pairs(PEER_OPENBLAS, peer->of, ref, peer->pair_of, peer->out, result);
}

#else

bool peer_openblas_built(void) {
    return false;
}

void peer_openblas_name(char *text, size_t size) {
    snprintf(text, size, "not built");
}

clmoe_status peer_openblas_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                  peer_openblas *peer) {
    (void)device, (void)in, (void)ids;
    *peer = (peer_openblas){0};
    return cli_fail(CLMOE_UNSUPPORTED, "this build has no " PEER_OPENBLAS);
}

void peer_openblas_release(peer_openblas *peer) {
    (void)peer;
}

void peer_openblas_run(peer_openblas *peer) {
    (void)peer;
}

void peer_openblas_check(const peer_openblas *peer, const reference *ref, check_result *result) {
    (void)peer, (void)ref, (void)result;
}

#endif
