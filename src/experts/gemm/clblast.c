/*
 * The engine that calls CLBlast, once or twice per expert with rows. It must know the rows on the
 * host, so it reads them back; biases, activation and row weights follow in
 * cl/experts/gemm/clblast.cl. For gradients of weights it calls it once per expert with rows.
 */
#include "kernel.h"
#include "runtime/program.h"

#include <clblast_c.h>
#include <limits.h>
#include <stdlib.h>

/* Buckets on the host, as read back. */
typedef struct host_rows {
    uint32_t experts;         /* at most */
    uint32_t *kept, *offsets; /* [E], [E+1] */
} host_rows;

typedef struct clblast_state {
    size_t group;           /* work-items per group of cl/experts/gemm/clblast.cl */
    cl_command_queue queue; /* in order: CLBlast chains its kernels by nothing else */
    cl_kernel kernels[GEMM_VARIANTS];
    host_rows rows;
} clblast_state;

/* How gate and up lie: two matrices, or as the rows of one matrix of 2n. */
typedef enum gate_place { GATE_APART, GATE_FIRST, GATE_TAKES_TURNS } gate_place;

/*
 * CLBlast's caches are the process's and are filled without a lock in its first calls: one call at
 * a time, in the whole process.
 */
static pthread_mutex_t one_call = PTHREAD_MUTEX_INITIALIZER;
static unsigned contexts; /* that have used the engine and live, guarded by one_call */

/*
 * CLBlast keeps the programs of every OpenCL context it has seen, released or not. It can forget
 * them only for the whole process: done when nobody here is left to miss them. An application that
 * calls CLBlast itself compiles once more.
 */
static void forget_context(void) {
    pthread_mutex_lock(&one_call);
    if (--contexts == 0)
        CLBlastClearCache();
    pthread_mutex_unlock(&one_call);
}

static void remember_context(clmoe_context *context) {
    pthread_mutex_lock(&context->lock);
    const bool known = context->forget != NULL;
    context->forget = forget_context;
    pthread_mutex_unlock(&context->lock);
    pthread_mutex_lock(&one_call);
    contexts += !known;
    pthread_mutex_unlock(&one_call);
}

static clmoe_status clblast_supports(clmoe_context *context) {
    (void)context;
    return CLMOE_SUCCESS;
}

/* A row-major matrix in a buffer, in elements. */
typedef struct matrix {
    cl_mem mem;
    size_t offset, ld;
} matrix;

/* C[m,n] = A[m,k] W^T, each of A and W as it lies, or that added to C. */
typedef struct product {
    size_t m, n, k;
    matrix a, w, c;
    bool a_along_m, w_along_k;
    bool accumulate;
} product;

static clmoe_status sgemm(cl_command_queue queue, const product *p) {
    const CLBlastTranspose a_as = p->a_along_m ? CLBlastTransposeYes : CLBlastTransposeNo;
    const CLBlastTranspose w_as = p->w_along_k ? CLBlastTransposeYes : CLBlastTransposeNo;
    pthread_mutex_lock(&one_call);
    const CLBlastStatusCode code =
        CLBlastSgemm(CLBlastLayoutRowMajor, a_as, w_as, p->m, p->n, p->k, 1.0f, p->a.mem,
                     p->a.offset, p->a.ld, p->w.mem, p->w.offset, p->w.ld,
                     p->accumulate ? 1.0f : 0.0f, p->c.mem, p->c.offset, p->c.ld, &queue, NULL);
    pthread_mutex_unlock(&one_call);
    if (code == CLBlastSuccess)
        return CLMOE_SUCCESS;
    return fail(CLMOE_ENGINE_FAILED, "CLBlastSgemm failed with %d for m %zu, n %zu, k %zu",
                (int)code, p->m, p->n, p->k);
}

/* Compiles CLBlast's kernels for the context, so that the first real call does not. */
static clmoe_status warm_up(const clmoe_context *context, cl_command_queue queue) {
    clmoe_status status = CLMOE_SUCCESS;
    float ones[3] = {1.0f, 1.0f, 1.0f};
    cl_int code = CL_SUCCESS;
    cl_mem mem = clCreateBuffer(context->cl, CL_MEM_READ_WRITE | CL_MEM_COPY_HOST_PTR, sizeof ones,
                                ones, &code);
    TRY(clmoe_cl_check(code, "clCreateBuffer"));
    const product one = {.m = 1,
                         .n = 1,
                         .k = 1,
                         .a = {mem, 0, 1},
                         .w = {mem, 1, 1},
                         .c = {mem, 2, 1},
                         .w_along_k = true};
    TRY(sgemm(queue, &one));
    TRY(CL(clFinish(queue)));
done:
    if (mem)
        clReleaseMemObject(mem);
    return status;
}

/* Creates the engine's own queue and makes CLBlast ready for the context. */
static clmoe_status open_queue(clmoe_context *context, cl_command_queue *queue) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_int code = CL_SUCCESS;
    *queue = clCreateCommandQueue(context->cl, context->device, 0, &code);
    TRY(clmoe_cl_check(code, "clCreateCommandQueue"));
    remember_context(context);
    TRY(warm_up(context, *queue));
done:
    return status;
}

static void rows_release(host_rows *rows) {
    free(rows->kept);
    free(rows->offsets);
    *rows = (host_rows){0};
}

/* Room for the rows of `experts`. */
static clmoe_status rows_reserve(host_rows *rows, uint32_t experts) {
    if (experts <= rows->experts)
        return CLMOE_SUCCESS;
    rows_release(rows);
    rows->kept = calloc(experts, sizeof *rows->kept);
    rows->offsets = calloc((size_t)experts + 1, sizeof *rows->offsets);
    if (!rows->kept || !rows->offsets)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the clblast engine");
    rows->experts = experts;
    return CLMOE_SUCCESS;
}

/* Waits for the chain. */
static clmoe_status rows_read(host_rows *rows, launch *chain, clmoe_buf offsets, clmoe_buf kept,
                              uint32_t experts) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(launch_read(chain, kept, experts * sizeof(uint32_t), rows->kept));
    TRY(launch_read(chain, offsets, (experts + 1) * sizeof(uint32_t), rows->offsets));
done:
    return status;
}

static void clblast_destroy(void *opaque) {
    clblast_state *state = opaque;
    if (!state)
        return;
    for (int i = 0; i < GEMM_VARIANTS; i++)
        kernel_release(&state->kernels[i]);
    if (state->queue)
        clReleaseCommandQueue(state->queue);
    rows_release(&state->rows);
    free(state);
}

/* CLBlast holds offsets in an int. */
static clmoe_status check_extent(const char *what, uint64_t first, uint64_t rows, uint64_t row) {
    const uint64_t most = INT_MAX;
    if (first <= most && (rows == 0 || row <= (most - first) / rows))
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED,
                "engine clblast cannot address %s: %llu x %llu elements from element %llu on, but "
                "CLBlast's offsets end at %d",
                what, (unsigned long long)rows, (unsigned long long)row, (unsigned long long)first,
                INT_MAX);
}

static clmoe_status clblast_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    if (shape->a_type != CLMOE_F32 || shape->w_type != CLMOE_F32)
        return fail(CLMOE_UNSUPPORTED,
                    "engine clblast computes in f32, but type is %s and weight_type %s",
                    type_name(shape->a_type), type_name(shape->w_type));
    clblast_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the clblast engine");
    TRY(check_extent("a matrix of all experts", 0, shape->experts,
                     (uint64_t)shape->dim * shape->hidden_dim));
    TRY(rows_reserve(&state->rows, shape->experts));
    TRY(gemm_kernels_by_column(context, shape, "experts/gemm/clblast", "act_rows", state->kernels,
                               &state->group));
    TRY(open_queue(context, &state->queue));
    *out = state;
    state = NULL;
done:
    clblast_destroy(state);
    return status;
}

static uint32_t clblast_row_tile(const clmoe_context *context, uint32_t rows_per_expert) {
    (void)context;
    (void)rows_per_expert;
    return 1;
}

/*
 * The sums of gate and up, [slots, 2n]; those of one matrix are made in C, unless C holds what a
 * bias or row weight must not touch.
 */
static size_t clblast_scratch(const gemm_shape *shape, size_t slots, uint32_t n, gemm_form form) {
    size_t bytes = 0;
    if (form == GEMM_PLAIN || (form == GEMM_LINEAR && !shape->training))
        return 0;
    if (!size_mul(slots, (form == GEMM_GATED ? 2 : 1) * sizeof(float), &bytes) ||
        !size_mul(bytes, n, &bytes))
        return SIZE_MAX;
    return bytes;
}

static gate_place place_of_gate(const gemm_problem *problem) {
    const gemm_weight *gate = &problem->gate, *up = &problem->up;
    if (gate->buf.mem != up->buf.mem || gate->buf.offset >= up->buf.offset)
        return GATE_APART;
    const uint64_t distance = (up->buf.offset - gate->buf.offset) / sizeof(float);
    if (2 * distance == gate->row)
        return GATE_TAKES_TURNS;
    return distance == problem->n * gate->row ? GATE_FIRST : GATE_APART;
}

/* Whether the sums are not C yet. */
static bool must_finish(const gemm_problem *problem) {
    return problem->form != GEMM_LINEAR || problem->up.bias.mem || problem->row_weight;
}

static bool sums_in_scratch(const gemm_problem *problem) {
    return problem->form == GEMM_GATED || (problem->accumulate && must_finish(problem));
}

/* The rows of one expert, and where its sums go. */
typedef struct bucket {
    const gemm_problem *problem;
    cl_command_queue queue;
    gate_place place;
    matrix sums;
    uint32_t expert;
    size_t first, rows;
} bucket;

/* All rows through `n` columns of `w`, to column `column` of the sums. */
static clmoe_status run_matrix(const bucket *b, const gemm_weight *w, uint32_t n, size_t column) {
    const gemm_problem *problem = b->problem;
    const bool along_k = w->col == 1 && w->row >= problem->k;
    const product p = {
        .m = b->rows,
        .n = n,
        .k = problem->k,
        .a = {problem->a.mem, problem->a.offset / sizeof(float) + b->first * problem->k,
              problem->k},
        .w = {w->buf.mem, w->buf.offset / sizeof(float) + b->expert * w->expert,
              along_k ? w->row : w->col},
        .c = {b->sums.mem, b->sums.offset + b->first * b->sums.ld + column, b->sums.ld},
        .w_along_k = along_k,
        .accumulate = problem->accumulate && !must_finish(problem),
    };
    return sgemm(b->queue, &p);
}

static clmoe_status run_expert(const bucket *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_problem *problem = b->problem;
    const uint32_t n = problem->n;
    if (problem->form != GEMM_GATED)
        return run_matrix(b, &problem->up, n, 0);
    if (b->place != GATE_APART) {
        gemm_weight both = problem->gate;
        both.row /= b->place == GATE_TAKES_TURNS ? 2 : 1;
        return run_matrix(b, &both, 2 * n, 0);
    }
    TRY(run_matrix(b, &problem->gate, n, 0));
    TRY(run_matrix(b, &problem->up, n, n));
done:
    return status;
}

/* Where the sums of gate and up, or of the one matrix, are made. */
static matrix sums_of(const gemm_problem *problem) {
    const bool gated = problem->form == GEMM_GATED;
    const clmoe_buf buf = sums_in_scratch(problem) ? problem->scratch : problem->c;
    return (matrix){buf.mem, buf.offset / sizeof(float),
                    gated ? 2 * (size_t)problem->n : problem->n};
}

static clmoe_status clblast_check(const void *opaque, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const clblast_state *state = opaque;
    const gemm_weight *gate = &problem->gate, *up = &problem->up;
    const matrix sums = sums_of(problem);
    if (problem->token_of.mem)
        return fail(CLMOE_UNSUPPORTED, "engine clblast does not gather rows");
    if (problem->experts > state->rows.experts)
        return fail(CLMOE_INVALID_ARGUMENT, "engine clblast was created for %u experts, not %u",
                    state->rows.experts, problem->experts);
    TRY(check_extent("the rows", problem->a.offset / sizeof(float), problem->slots, problem->k));
    TRY(check_extent("the sums", sums.offset, problem->slots, sums.ld));
    TRY(check_extent("the weights", up->buf.offset / sizeof(float), problem->experts, up->expert));
    if (problem->form == GEMM_GATED)
        TRY(check_extent("the gate's weights", gate->buf.offset / sizeof(float), problem->experts,
                         gate->expert));
done:
    return status;
}

static clmoe_status run_experts(clblast_state *state, launch *chain, const gemm_problem *problem,
                                gate_place place, matrix sums) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_command_queue queue = chain->out_of_order ? state->queue : chain->queue;
    bool left = false;
    const bool dense = !problem->tile_expert.mem;
    if (!dense)
        TRY(rows_read(&state->rows, chain, problem->offsets, problem->kept, problem->experts));
    TRY(launch_leave(chain, queue));
    left = true;
    for (uint32_t expert = 0; expert < problem->experts; expert++) {
        const bucket b = {.problem = problem,
                          .queue = queue,
                          .place = place,
                          .sums = sums,
                          .expert = expert,
                          .first = dense ? 0 : state->rows.offsets[expert],
                          .rows = dense ? problem->slots : state->rows.kept[expert]};
        if (b.rows > 0)
            TRY(run_expert(&b));
    }
    TRY(launch_return(chain, queue));
done:
    /* The caller, who may finish the chain's queue alone, is to have the buffers back. */
    if (left && status != CLMOE_SUCCESS && queue == state->queue)
        clFinish(queue);
    return status;
}

/* Biases, row weights and activation, from the sums to C. */
static clmoe_status finish(const clblast_state *state, launch *chain, const gemm_problem *problem,
                           gate_place place, clmoe_buf sums, size_t sums_ld) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = state->kernels[gemm_variant_of(problem->form)];
    const size_t groups[] = {problem->slots, gemm_tiles(problem->n, state->group)};
    const size_t local[] = {1, state->group};
    gemm_problem rest = *problem;
    rest.a = sums;
    rest.k = (uint32_t)sums_ld;
    rest.gate.row = rest.up.row = place == GATE_TAKES_TURNS ? 2 : 1;
    TRY(gemm_kernel_set(kernel, &rest, problem->row_tile));
    TRY(launch_kernel(chain, kernel, 2, groups, local));
done:
    return status;
}

static clmoe_status clblast_run(void *opaque, launch *chain, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    clblast_state *state = opaque;
    const bool gated = problem->form == GEMM_GATED;
    const gate_place place = gated ? place_of_gate(problem) : GATE_APART;
    const clmoe_buf buf = sums_in_scratch(problem) ? problem->scratch : problem->c;
    const matrix sums = sums_of(problem);
    if (problem->slots == 0)
        return CLMOE_SUCCESS;
    TRY(run_experts(state, chain, problem, place, sums));
    if (must_finish(problem))
        TRY(finish(state, chain, problem, place, buf, sums.ld));
done:
    return status;
}

/* ---- Gradients of weights ------------------------------------------------------------------ */

typedef struct clblast_gradient {
    cl_command_queue queue;
    host_rows rows;
} clblast_gradient;

static void gradient_destroy(void *opaque) {
    clblast_gradient *state = opaque;
    if (!state)
        return;
    if (state->queue)
        clReleaseCommandQueue(state->queue);
    rows_release(&state->rows);
    free(state);
}

static clmoe_status gradient_create(clmoe_context *context, const gemm_gradient_shape *shape,
                                    void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    if (shape->p_type != CLMOE_F32 || shape->q_type != CLMOE_F32 || shape->c_type != CLMOE_F32)
        return fail(CLMOE_UNSUPPORTED,
                    "engine clblast makes gradients of %s from %s, not of %s from %s and %s",
                    type_name(CLMOE_F32), type_name(CLMOE_F32), type_name(shape->c_type),
                    type_name(shape->p_type), type_name(shape->q_type));
    clblast_gradient *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the clblast engine");
    TRY(open_queue(context, &state->queue));
    *out = state;
    state = NULL;
done:
    gradient_destroy(state);
    return status;
}

static clmoe_status gradient_check(const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint64_t elements = (uint64_t)g->m * g->row;
    if (g->p.gathered || g->q.gathered)
        return fail(CLMOE_UNSUPPORTED, "engine clblast does not gather rows");
    TRY(check_extent("the rows of P", g->p.buf.offset / sizeof(float), g->slots, g->p.row));
    TRY(check_extent("the rows of Q", g->q.buf.offset / sizeof(float), g->slots, g->q.row));
    TRY(check_extent("the gradients", g->c.offset / sizeof(float), g->experts,
                     g->expert > elements ? g->expert : elements));
done:
    return status;
}

/* Rows of an expert; of a dense problem, of all. */
static size_t rows_of(const clblast_gradient *state, const gemm_gradient *g, uint32_t expert) {
    return g->offsets.mem ? state->rows.kept[expert] : g->slots;
}

/* The gradient of an expert whose rows are slots [first, first + rows). */
static clmoe_status gradient_of_expert(cl_command_queue queue, const gemm_gradient *g,
                                       uint32_t expert, size_t first, size_t rows) {
    const gemm_rows *p = &g->p, *q = &g->q;
    const product one = {
        .m = g->m,
        .n = g->n,
        .k = rows,
        .a = {p->buf.mem, p->buf.offset / sizeof(float) + first * p->row, p->row},
        .w = {q->buf.mem, q->buf.offset / sizeof(float) + first * q->row, q->row},
        .c = {g->c.mem, g->c.offset / sizeof(float) + expert * g->expert, g->row},
        .a_along_m = true,
        .accumulate = g->accumulate,
    };
    return sgemm(queue, &one);
}

/* CLBlast refuses sums of nothing: zeros where an expert has no rows. */
static clmoe_status fill_zeros(const clblast_gradient *state, launch *chain,
                               const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool apart = g->row != g->n; /* rows of C */
    const size_t pieces = apart ? g->m : 1, piece = apart ? g->n : (size_t)g->m * g->n;
    for (uint32_t expert = 0; expert < g->experts; expert++)
        for (size_t i = 0; i < pieces && rows_of(state, g, expert) == 0; i++) {
            const size_t first = (size_t)expert * g->expert + i * g->row;
            const clmoe_buf to = {g->c.mem, g->c.offset + first * sizeof(float)};
            TRY(launch_zero(chain, to, piece * sizeof(float)));
        }
done:
    return status;
}

static clmoe_status gradient_run(void *opaque, launch *chain, const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    clblast_gradient *state = opaque;
    cl_command_queue queue = chain->out_of_order ? state->queue : chain->queue;
    const bool dense = !g->offsets.mem;
    bool left = false;
    TRY(gradient_check(g));
    TRY(rows_reserve(&state->rows, g->experts));
    if (!dense)
        TRY(rows_read(&state->rows, chain, g->offsets, g->kept, g->experts));
    if (!g->accumulate)
        TRY(fill_zeros(state, chain, g));
    TRY(launch_leave(chain, queue));
    left = true;
    for (uint32_t expert = 0; expert < g->experts; expert++) {
        const size_t first = dense ? 0 : state->rows.offsets[expert];
        const size_t rows = rows_of(state, g, expert);
        if (rows > 0)
            TRY(gradient_of_expert(queue, g, expert, first, rows));
    }
    TRY(launch_return(chain, queue));
done:
    /* As in run_experts(). */
    if (left && status != CLMOE_SUCCESS && queue == state->queue)
        clFinish(queue);
    return status;
}

static const gemm_gradient_engine clblast_gradient_engine = {
    .blocks = true,
    .create = gradient_create,
    .destroy = gradient_destroy,
    .scratch = gemm_gradient_no_scratch,
    .run = gradient_run,
};

const gemm_engine gemm_clblast = {
    .name = "clblast",
    .blocks = true,
    .supports = clblast_supports,
    .create = clblast_create,
    .destroy = clblast_destroy,
    .row_tile = clblast_row_tile,
    .scratch = clblast_scratch,
    .check = clblast_check,
    .run = clblast_run,
    .gradient = &clblast_gradient_engine,
};
