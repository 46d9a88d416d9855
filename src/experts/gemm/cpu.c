/* The engine for CPU devices: a register tile per work-item, weights as they lie or packed. */
#include "kernel.h"
#include "runtime/program.h"

#include <stdio.h>
#include <stdlib.h>

/* Without a measurement; what the sizes are is in context.h. */
enum { ROWS = 160, DEPTH = 128, ROW_UNIT = 8 };
/* Of raw weights, which are copied in pieces of it. */
enum { RAW_DEPTH = 128 };

/* How a kernel reads W: PACKED of cl/experts/gemm/cpu.cl. */
typedef enum weights { RAW, PACKED, WEIGHTS_COUNT } weights;

typedef struct cpu_state {
    unsigned width;                                  /* floats per vector */
    uint32_t max_rows;                               /* of a tile */
    cl_kernel kernels[GEMM_VARIANTS][WEIGHTS_COUNT]; /* NULL where not asked for */
    cl_kernel pack;
} cpu_state;

static clmoe_status cpu_supports(clmoe_context *context) {
    if (device_is_cpu(&context->info))
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED, "engine cpu needs a CPU device, but %.64s is none",
                context->info.name);
}

static uint32_t max_rows(const clmoe_context *context) {
    const uint32_t tuned = context->tuning.sizes[TUNED_CPU].rows;
    return tuned ? tuned : ROWS;
}

static uint32_t depth(const clmoe_context *context) {
    const uint32_t tuned = context->tuning.sizes[TUNED_CPU].depth;
    return tuned ? tuned : DEPTH;
}

static void cpu_destroy(void *opaque) {
    cpu_state *state = opaque;
    if (!state)
        return;
    for (int i = 0; i < GEMM_VARIANTS; i++)
        for (int j = 0; j < WEIGHTS_COUNT; j++)
            kernel_release(&state->kernels[i][j]);
    kernel_release(&state->pack);
    free(state);
}

static unsigned vector_width(const clmoe_context *context) {
    const cl_uint native = context->info.vector_width;
    return native >= 16 ? 16 : native >= 8 ? 8 : 4;
}

/* Whether some problem of `shape` needs a kernel. Only MLPs are packed. */
static bool needs(const gemm_shape *shape, gemm_variant variant, weights order) {
    const bool used = variant == GEMM_UNGATED || variant == gemm_variant_of(shape->form);
    return used && (order == RAW || shape->form != GEMM_LINEAR);
}

/* Panels that a work-item computes at most: of raw weights RAW_DEPTH columns of each side. */
static unsigned most_panels(const cpu_state *state, weights order) {
    return order == PACKED ? 1 : RAW_DEPTH / state->width;
}

static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, cpu_state *state,
                            gemm_variant variant, weights order) {
    clmoe_status status = CLMOE_SUCCESS;
    char options[96];
    snprintf(options, sizeof options, "-DWIDTH=%u -DPACKED=%d -DPANELS=%u -DMAX_ROWS=%u -DDEPTH=%u",
             state->width, (int)order, most_panels(state, order), state->max_rows,
             order == PACKED ? depth(context) : RAW_DEPTH);
    TRY(gemm_kernel_create(context, shape, variant, "experts/gemm/cpu", options, "gemm_cpu",
                           &state->kernels[variant][order]));
done:
    return status;
}

static clmoe_status compile_pack(clmoe_context *context, const gemm_shape *shape,
                                 cpu_state *state) {
    char options[32];
    if (shape->form == GEMM_LINEAR)
        return CLMOE_SUCCESS;
    snprintf(options, sizeof options, "-DWIDTH=%u -DW=%s", state->width, type_name(shape->w_type));
    return program_kernel(context, "experts/gemm/cpu_pack", options, "pack_panels", &state->pack);
}

static clmoe_status cpu_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    cpu_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the cpu engine");
    state->width = vector_width(context);
    state->max_rows = max_rows(context);
    for (int variant = 0; variant < GEMM_VARIANTS; variant++)
        for (int order = 0; order < WEIGHTS_COUNT; order++)
            if (needs(shape, (gemm_variant)variant, (weights)order))
                TRY(compile(context, shape, state, (gemm_variant)variant, (weights)order));
    TRY(compile_pack(context, shape, state));
    *out = state;
    state = NULL;
done:
    cpu_destroy(state);
    return status;
}

/*
 * Long tiles read each weight less often. A quarter more rows than the average fit, so that few
 * experts need another tile for the rest.
 */
static uint32_t row_tile(uint32_t most, uint32_t rows_per_expert) {
    const size_t rows = (size_t)rows_per_expert + rows_per_expert / 4;
    const size_t tiles = gemm_tiles(rows > 0 ? rows : 1, most);
    return (uint32_t)gemm_tiles(rows > 0 ? rows : 1, tiles * ROW_UNIT) * ROW_UNIT;
}

static uint32_t cpu_row_tile(const clmoe_context *context, uint32_t rows_per_expert) {
    return row_tile(max_rows(context), rows_per_expert);
}

/* Columns of C in a panel. */
static size_t panel_columns(const cpu_state *state, gemm_form form) {
    return form == GEMM_GATED ? state->width : 2 * state->width;
}

/* Panels of n columns of C; also those of a packed matrix. */
static size_t panels_of(const cpu_state *state, gemm_form form, uint32_t n) {
    return gemm_tiles(n, panel_columns(state, form));
}

/*
 * Panels that a work-item computes. Where W is contiguous along n, each of its rows is another page
 * of memory, and finding one takes longer than reading few columns of it.
 */
static size_t panels_at_once(const cpu_state *state, const gemm_problem *problem) {
    return problem->packed || problem->up.col == 1 ? 1 : most_panels(state, RAW);
}

/* Strides that a kernel takes: see cl/experts/gemm/cpu.cl. */
static bool strides_fit(const gemm_problem *problem) {
    return problem->packed || problem->up.col == 1 ||
           problem->up.row <= (problem->form == GEMM_GATED ? 2 : 1);
}

static clmoe_status cpu_run(void *opaque, launch *chain, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const cpu_state *state = opaque;
    const uint32_t rows =
        problem->tile_expert.mem ? problem->row_tile : row_tile(state->max_rows, problem->slots);
    const size_t columns = panels_at_once(state, problem) * panel_columns(state, problem->form);
    const size_t groups[] = {gemm_tiles(problem->n, columns), gemm_tiles(problem->slots, rows)};
    const size_t local[] = {1, 1};
    cl_kernel kernel =
        state->kernels[gemm_variant_of(problem->form)][problem->packed ? PACKED : RAW];
    if (!kernel || !strides_fit(problem))
        return fail(CLMOE_UNSUPPORTED,
                    "engine cpu was not created for weights of stride %llu, %llu",
                    (unsigned long long)problem->up.row, (unsigned long long)problem->up.col);
    TRY(gemm_kernel_set(kernel, problem, rows));
    TRY(launch_bounded(chain, kernel, 2, groups, local, gemm_work(problem, rows, columns)));
done:
    return status;
}

/* Gate and up take turns vector by vector in one panel, so that their activation is at hand. */
static size_t cpu_packed_elements(const void *opaque, const gemm_problem *problem) {
    const cpu_state *state = opaque;
    size_t panels = 0, elements = 0;
    if (size_mul(panels_of(state, problem->form, problem->n), problem->experts, &panels) &&
        size_mul(panels, problem->k, &elements) &&
        size_mul(elements, (size_t)2 * state->width, &elements))
        return elements;
    return SIZE_MAX;
}

static uint32_t cpu_packed_layout(const void *opaque) {
    const cpu_state *state = opaque;
    return state->width;
}

static clmoe_status cpu_pack(void *opaque, launch *chain, const gemm_problem *problem,
                             clmoe_buf packed) {
    clmoe_status status = CLMOE_SUCCESS;
    const cpu_state *state = opaque;
    const gemm_weight *up = &problem->up;
    const clmoe_type type = problem->w_type;
    const clmoe_buf gate = problem->form == GEMM_GATED ? problem->gate.buf : (clmoe_buf){0};
    const size_t groups[] = {panels_of(state, problem->form, problem->n), problem->experts};
    const size_t local[] = {1, 1};
    TRY(KERNEL_SET(state->pack, ARG_TYPE(gate, type), ARG_AS(up, ARG_TYPE(up->buf, type)),
                   ARG_AS(w_expert, ARG_ULONG(up->expert)), ARG_AS(w_row, ARG_ULONG(up->row)),
                   ARG_AS(w_col, ARG_ULONG(up->col)), ARG_UINT(problem->n), ARG_UINT(problem->k),
                   ARG_TYPE(packed, type)));
    TRY(launch_kernel(chain, state->pack, 2, groups, local));
done:
    return status;
}

/* ---- Gradients of weights ------------------------------------------------------------------ */

/* See cl/experts/gemm/cpu_gradient.cl: what a core's caches hold. */
enum { GRADIENT_PANELS = 4, GRADIENT_ROWS = 128, GRADIENT_DEPTH = 128 };

typedef struct cpu_gradient {
    unsigned width; /* floats per vector */
    cl_kernel kernel;
} cpu_gradient;

static void gradient_destroy(void *opaque) {
    cpu_gradient *state = opaque;
    if (!state)
        return;
    kernel_release(&state->kernel);
    free(state);
}

static clmoe_status gradient_create(clmoe_context *context, const gemm_gradient_shape *shape,
                                    void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    char options[64];
    cpu_gradient *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the cpu engine");
    state->width = vector_width(context);
    snprintf(options, sizeof options, "-DWIDTH=%u -DPANELS=%d -DMAX_ROWS=%d -DDEPTH=%d",
             state->width, GRADIENT_PANELS, GRADIENT_ROWS, GRADIENT_DEPTH);
    TRY(gemm_gradient_kernel(context, shape, "experts/gemm/cpu_gradient", options, "gradient_cpu",
                             &state->kernel));
    *out = state;
    state = NULL;
done:
    gradient_destroy(state);
    return status;
}

static clmoe_status gradient_run(void *opaque, launch *chain, const gemm_gradient *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const cpu_gradient *state = opaque;
    const size_t columns = (size_t)GRADIENT_PANELS * 2 * state->width;
    const size_t groups[] = {gemm_tiles(problem->n, columns), gemm_tiles(problem->m, GRADIENT_ROWS),
                             problem->experts};
    const size_t local[] = {1, 1, 1};
    const uint64_t rows = problem->m < GRADIENT_ROWS ? problem->m : GRADIENT_ROWS;
    TRY(gemm_gradient_set(state->kernel, problem));
    TRY(launch_bounded(chain, state->kernel, 3, groups, local, problem->slots * rows * columns));
done:
    return status;
}

static const gemm_gradient_engine cpu_gradient_engine = {
    .gathers = true,
    .create = gradient_create,
    .destroy = gradient_destroy,
    .scratch = gemm_gradient_no_scratch,
    .run = gradient_run,
};

const gemm_engine gemm_cpu = {
    .name = "cpu",
    .gathers = true,
    .supports = cpu_supports,
    .create = cpu_create,
    .destroy = cpu_destroy,
    .row_tile = cpu_row_tile,
    .scratch = gemm_no_scratch,
    .run = cpu_run,
    .packed_elements = cpu_packed_elements,
    .packed_layout = cpu_packed_layout,
    .pack = cpu_pack,
    .gradient = &cpu_gradient_engine,
};
