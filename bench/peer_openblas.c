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

/* silu(gate) * up, into gate's place, or into `hidden`, when gate and up are needed again. */
static void *activate_rows(void *opaque) {
    const pair_range *range = opaque;
    const size_t hidden = range->peer->of->hidden_dim;
    for (uint32_t i = range->begin; i < range->end; i++) {
        float *gate = range->peer->gate_up + i * 2 * hidden;
        const float *up = gate + hidden;
        float *to = range->peer->training ? range->peer->backward.hidden + i * hidden : gate;
        for (size_t h = 0; h < hidden; h++)
            to[h] = gate[h] / (1.0F + expf(-gate[h])) * up[h];
    }
    return NULL;
}

/* Rows of dy times the weights of the pairs. */
static void *gather_gradients(void *opaque) {
    const pair_range *range = opaque;
    const peer_openblas_backward *b = &range->peer->backward;
    const size_t dim = range->peer->of->dim, top_k = range->peer->of->top_k;
    for (uint32_t i = range->begin; i < range->end; i++) {
        const float *dy = b->dy + range->peer->pair_of[i] / top_k * dim;
        for (size_t d = 0; d < dim; d++)
            b->dye[i * dim + d] = b->weight[i] * dy[d];
    }
    return NULL;
}

/* The slopes of silu(gate) * up. */
static void *activate_back(void *opaque) {
    const pair_range *range = opaque;
    const peer_openblas_backward *b = &range->peer->backward;
    const size_t hidden = range->peer->of->hidden_dim;
    for (uint32_t i = range->begin; i < range->end; i++) {
        const float *gate = range->peer->gate_up + i * 2 * hidden, *up = gate + hidden;
        const float *dhidden = b->dhidden + i * hidden;
        float *dgate = b->dz + i * 2 * hidden, *dup = dgate + hidden;
        for (size_t h = 0; h < hidden; h++) {
            const float s = 1.0F / (1.0F + expf(-gate[h]));
            dgate[h] = dhidden[h] * up[h] * s * (1.0F + gate[h] * (1.0F - s));
            dup[h] = dhidden[h] * gate[h] * s;
        }
    }
    return NULL;
}

/* dx from the rows of its pairs; a range that begins inside a token leaves it to the one before. */
static void *sum_rows(void *opaque) {
    const pair_range *range = opaque;
    const peer_openblas_backward *b = &range->peer->backward;
    const size_t dim = range->peer->of->dim, top_k = range->peer->of->top_k;
    for (size_t t = (range->begin + top_k - 1) / top_k; t * top_k < range->end; t++) {
        float *dx = b->dx + t * dim;
        memset(dx, 0, dim * sizeof *dx);
        for (size_t k = 0; k < top_k; k++) {
            const float *dxe = b->dxe + b->place_of[t * top_k + k] * dim;
            for (size_t d = 0; d < dim; d++)
                dx[d] += dxe[d];
        }
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

static void run_forward(peer_openblas *peer) {
    const uint32_t dim = peer->of->dim, hidden = peer->of->hidden_dim;
    const size_t matrix = (size_t)dim * hidden;
    for_all_pairs(peer, gather_rows);
    for (uint32_t e = 0; e < peer->of->experts; e++)
        if (peer->load[e] > 0)
            gemm(peer->load[e], 2 * hidden, dim, peer->xe + (size_t)peer->offset[e] * dim, dim,
                 peer->gate + e * 2 * matrix, peer->gate_up + (size_t)peer->offset[e] * 2 * hidden);
    for_all_pairs(peer, activate_rows);
    const float *in = peer->training ? peer->backward.hidden : peer->gate_up;
    const uint32_t stride = peer->training ? hidden : 2 * hidden;
    for (uint32_t e = 0; e < peer->of->experts; e++)
        if (peer->load[e] > 0)
            gemm(peer->load[e], dim, hidden, in + (size_t)peer->offset[e] * stride, stride,
                 peer->down + e * matrix, peer->out + (size_t)peer->offset[e] * dim);
}

/* c [rows, n] = a [rows, k] w, w [k, n] */
static void gemm_back(uint32_t rows, uint32_t n, uint32_t k, const float *a, const float *w,
                      float *c) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (int)rows, (int)n, (int)k, 1, a, (int)k,
                w, (int)n, 0, c, (int)n);
}

/* c [m, n] = a^T b, a [rows, m], b [rows, n]; zeros without rows. */
static void gemm_outer(uint32_t rows, uint32_t m, uint32_t n, const float *a, const float *b,
                       float *c) {
    if (rows == 0)
        memset(c, 0, (size_t)m * n * sizeof *c);
    else
        cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (int)m, (int)n, (int)rows, 1, a,
                    (int)m, b, (int)n, 0, c, (int)n);
}

/* dy -> dx */
static void run_data(peer_openblas *peer) {
    const uint32_t dim = peer->of->dim, hidden = peer->of->hidden_dim;
    const size_t matrix = (size_t)dim * hidden;
    const peer_openblas_backward *b = &peer->backward;
    for_all_pairs(peer, gather_gradients);
    for (uint32_t e = 0; e < peer->of->experts; e++)
        if (peer->load[e] > 0)
            gemm_back(peer->load[e], hidden, dim, b->dye + (size_t)peer->offset[e] * dim,
                      peer->down + e * matrix, b->dhidden + (size_t)peer->offset[e] * hidden);
    for_all_pairs(peer, activate_back);
    for (uint32_t e = 0; e < peer->of->experts; e++)
        if (peer->load[e] > 0)
            gemm_back(peer->load[e], dim, 2 * hidden, b->dz + (size_t)peer->offset[e] * 2 * hidden,
                      peer->gate + e * 2 * matrix, b->dxe + (size_t)peer->offset[e] * dim);
    for_all_pairs(peer, sum_rows);
}

static void run_weights(peer_openblas *peer) {
    const uint32_t dim = peer->of->dim, hidden = peer->of->hidden_dim;
    const size_t matrix = (size_t)dim * hidden;
    const peer_openblas_backward *b = &peer->backward;
    for (uint32_t e = 0; e < peer->of->experts; e++) {
        const size_t first = peer->offset[e];
        gemm_outer(peer->load[e], 2 * hidden, dim, b->dz + first * 2 * hidden,
                   peer->xe + first * dim, b->dgate + e * 2 * matrix);
        gemm_outer(peer->load[e], dim, hidden, b->dye + first * dim, b->hidden + first * hidden,
                   b->ddown + e * matrix);
    }
}

void peer_openblas_run(peer_openblas *peer, bench_step step) {
    peer->training = step != STEP_EXPERTS;
    if (step == STEP_EXPERTS || step == STEP_FORWARD_BACKWARD)
        run_forward(peer);
    if (step == STEP_BACKWARD || step == STEP_BACKWARD_DATA || step == STEP_FORWARD_BACKWARD)
        run_data(peer);
    if (step == STEP_BACKWARD || step == STEP_BACKWARD_WEIGHTS || step == STEP_FORWARD_BACKWARD)
        run_weights(peer);
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

/* The weights of the pairs, and where they are. */
static clmoe_status place_pairs(peer_openblas *peer, const float *weights) {
    const size_t pairs = (size_t)peer->of->tokens * peer->of->top_k;
    peer_openblas_backward *b = &peer->backward;
    b->weight = malloc(pairs * sizeof *b->weight);
    b->place_of = malloc(pairs * sizeof *b->place_of);
    if (!b->weight || !b->place_of)
        return bench_no_memory(PEER_OPENBLAS);
    for (uint32_t i = 0; i < pairs; i++) {
        b->weight[i] = weights[peer->pair_of[i]];
        b->place_of[peer->pair_of[i]] = i;
    }
    return CLMOE_SUCCESS;
}

static float *allocate_floats(size_t rows, size_t columns) {
    return malloc(rows * columns * sizeof(float));
}

static clmoe_status allocate_backward(peer_openblas *peer) {
    const bench_case *c = peer->of;
    const size_t pairs = (size_t)c->tokens * c->top_k,
                 matrices = (size_t)c->experts * c->hidden_dim;
    peer_openblas_backward *b = &peer->backward;
    b->dy = allocate_floats(c->tokens, c->dim);
    b->dye = allocate_floats(pairs, c->dim);
    b->hidden = allocate_floats(pairs, c->hidden_dim);
    b->dhidden = allocate_floats(pairs, c->hidden_dim);
    b->dz = allocate_floats(pairs, (size_t)2 * c->hidden_dim);
    b->dxe = allocate_floats(pairs, c->dim);
    b->dx = allocate_floats(c->tokens, c->dim);
    b->dgate = allocate_floats(2 * matrices, c->dim);
    b->ddown = allocate_floats(matrices, c->dim);
    if (!b->dy || !b->dye || !b->hidden || !b->dhidden || !b->dz || !b->dxe || !b->dx ||
        !b->dgate || !b->ddown)
        return bench_no_memory(PEER_OPENBLAS);
    values_fill(&peer->in->dy, 0, (size_t)c->tokens * c->dim, b->dy);
    return CLMOE_SUCCESS;
}

/* What the check compares with, from the choice as it was given. */
static clmoe_status make_samples(peer_openblas *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t pairs = (size_t)peer->of->tokens * peer->of->top_k;
    const peer_openblas_backward *b = &peer->backward;
    int32_t *ids = malloc(pairs * sizeof *ids);
    float *weights = malloc(pairs * sizeof *weights);
    if (!ids || !weights)
        TRY(bench_no_memory(PEER_OPENBLAS));
    for (uint32_t e = 0; e < peer->of->experts; e++)
        for (uint32_t i = peer->offset[e]; i < peer->offset[e] + peer->load[e]; i++) {
            ids[peer->pair_of[i]] = (int32_t)e;
            weights[peer->pair_of[i]] = b->weight[i];
        }
    TRY(gradient_samples_make(peer->in, ids, weights, &peer->backward.samples));
done:
    free(ids);
    free(weights);
    return status;
}

clmoe_status peer_openblas_prepare(peer_openblas *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = peer->of;
    const size_t matrices = (size_t)c->experts * c->hidden_dim;
    peer_openblas_backward *b = &peer->backward;
    if (!b->samples.made) {
        TRY(allocate_backward(peer));
        TRY(make_samples(peer));
    }
    peer_openblas_run(peer, STEP_FORWARD_BACKWARD);
    memset(b->dx, 0xff, (size_t)c->tokens * c->dim * sizeof *b->dx);
    memset(b->dgate, 0xff, 2 * matrices * c->dim * sizeof *b->dgate);
    memset(b->ddown, 0xff, matrices * c->dim * sizeof *b->ddown);
done:
    return status;
}

static void release_backward(peer_openblas_backward *b) {
    float *const arrays[] = {b->dy, b->weight, b->dye, b->hidden, b->dhidden,
                             b->dz, b->dxe,    b->dx,  b->dgate,  b->ddown};
    for (size_t i = 0; i < COUNT_OF(arrays); i++)
        free(arrays[i]);
    free(b->place_of);
    gradient_samples_free(&b->samples);
}

clmoe_status peer_openblas_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                  const float *weights, peer_openblas *peer) {
    clmoe_status status = CLMOE_SUCCESS;
    const int threads = openblas_get_num_procs();
    *peer = (peer_openblas){.device = device, .of = &in->of, .in = in};
    if (!device->cpu || in->type != CLMOE_F32)
        return cli_fail(CLMOE_UNSUPPORTED, PEER_OPENBLAS " needs f32 on a CPU device");
    peer->threads = threads < MAX_THREADS ? (unsigned)threads : MAX_THREADS;
    openblas_set_num_threads(threads);
    TRY(allocate(peer));
    TRY(map_all(in, peer));
    sort_pairs(ids, &in->of, peer->load, peer->offset, peer->pair_of);
    TRY(place_pairs(peer, weights));
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
    release_backward(&peer->backward);
    *peer = (peer_openblas){0};
}

static void check_dx(const peer_openblas *peer, const reference *ref, check_result *result) {
    const size_t dim = peer->of->dim;
    for (uint32_t n = 0; n < ref->count; n++)
        check_row(PEER_OPENBLAS ": dx", peer->backward.dx + ref->token[n] * dim,
                  ref->experts_dx + n * dim, dim, ref->tolerance, result);
}

static clmoe_status check_weights(const peer_openblas *peer, const reference *ref,
                                  check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t dim = peer->of->dim, hidden = peer->of->hidden_dim;
    const peer_openblas_backward *b = &peer->backward;
    float *column = malloc(dim * sizeof *column);
    if (!column)
        TRY(bench_no_memory(PEER_OPENBLAS));
    for (uint32_t i = 0; i < GRADIENT_SAMPLES; i++) {
        const size_t expert = b->samples.expert[i], unit = b->samples.unit[i];
        const float *gate = b->dgate + (expert * 2 * hidden + unit) * dim;
        const float *const rows[3] = {gate, gate + hidden * dim, column};
        for (size_t d = 0; d < dim; d++)
            column[d] = b->ddown[(expert * dim + d) * hidden + unit];
        check_sample(PEER_OPENBLAS ": ", dim, &b->samples, i, rows, ref->tolerance, result);
    }
done:
    free(column);
    return status;
}

clmoe_status peer_openblas_check(const peer_openblas *peer, bench_step step, const reference *ref,
                                 check_result *result) {
    result->wrong[0] = '\0';
    if (step == STEP_EXPERTS || step == STEP_FORWARD_BACKWARD)
        check_pairs(PEER_OPENBLAS, peer->of, ref, peer->pair_of, peer->out, result);
    if (step == STEP_BACKWARD || step == STEP_BACKWARD_DATA || step == STEP_FORWARD_BACKWARD)
        check_dx(peer, ref, result);
    if (step == STEP_BACKWARD || step == STEP_BACKWARD_WEIGHTS || step == STEP_FORWARD_BACKWARD)
        return check_weights(peer, ref, result);
    return CLMOE_SUCCESS;
}

#else

bool peer_openblas_built(void) {
    return false;
}

void peer_openblas_name(char *text, size_t size) {
    snprintf(text, size, "not built");
}

clmoe_status peer_openblas_create(const bench_device *device, const inputs *in, const int32_t *ids,
                                  const float *weights, peer_openblas *peer) {
    (void)device, (void)in, (void)ids, (void)weights;
    *peer = (peer_openblas){0};
    return cli_fail(CLMOE_UNSUPPORTED, "this build has no " PEER_OPENBLAS);
}

void peer_openblas_release(peer_openblas *peer) {
    (void)peer;
}

clmoe_status peer_openblas_prepare(peer_openblas *peer) {
    (void)peer;
    return CLMOE_UNSUPPORTED;
}

void peer_openblas_run(peer_openblas *peer, bench_step step) {
    (void)peer, (void)step;
}

clmoe_status peer_openblas_check(const peer_openblas *peer, bench_step step, const reference *ref,
                                 check_result *result) {
    (void)peer, (void)step, (void)ref, (void)result;
    return CLMOE_UNSUPPORTED;
}

#endif
