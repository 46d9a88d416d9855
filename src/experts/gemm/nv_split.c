/*
 * The engine that multiplies f32, or types that differ, on NVIDIA's tensor cores, by parts of bf16:
 * cl/experts/gemm/nv_split.clh. Routers are its, and layers of f32.
 */
#include "experts/gemm/gemm.clh"
#include "kernel.h"
#include "nv_probe.h"
#include "runtime/program.h"
#include "slices.h"

#include <stdio.h>
#include <stdlib.h>

/* As in cl/experts/gemm/nv_split_tile.clh and nv_split_slices.cl. */
enum { WARP = 32, ITEMS = 4 * WARP, SIDE = 16, MIN_CAPABILITY = 80 };

static const uint32_t tile_rows[] = {16, 64};
/* COLUMNS: gate's and up's together. */
enum { TILES = sizeof tile_rows / sizeof tile_rows[0], COLUMNS = 64 };
_Static_assert((int)TILES <= (int)GEMM_TILES, "more tiles than kernels have room for");

/* Slices side by side as long as tiles would leave so much of the device idle. */
enum { IDLE = 4 };

typedef struct split_state {
    gemm_tile_kernels kernels;
    cl_kernel slices; /* NULL where not asked for */
    uint32_t compute_units;
} split_state;

static clmoe_status split_supports(clmoe_context *context) {
    if (context->info.nv_capability < MIN_CAPABILITY)
        return fail(
            CLMOE_UNSUPPORTED,
            "engine nv_split needs an NVIDIA GPU of compute capability 8.0, but %.64s is none",
            context->info.name);
    return nv_probe(context, NV_PROBE_MMA);
}

static void split_destroy(void *opaque) {
    split_state *state = opaque;
    if (!state)
        return;
    gemm_tile_kernels_release(&state->kernels);
    kernel_release(&state->slices);
    free(state);
}

static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, gemm_variant variant,
                            bool transposed, split_state *state) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel *kernels = state->kernels.of[variant][transposed];
    for (int i = 0; i < TILES && !kernels[i]; i++) {
        const bool linear = shape->form == GEMM_LINEAR;
        char options[96];
        snprintf(options, sizeof options, "-DTRANSPOSED=%d -DROWS=%u -DONLY_LINEAR=%d -DLINEAR=%d",
                 transposed, tile_rows[i], linear, linear && !transposed);
        TRY(gemm_kernel_create(context, shape, variant, "experts/gemm/nv_split", options,
                               "gemm_nv_split", &kernels[i]));
    }
done:
    return status;
}

static clmoe_status compile_all(clmoe_context *context, const gemm_shape *shape,
                                split_state *state) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_variant first = gemm_variant_of(shape->form);
    TRY(compile(context, shape, first, shape->gate_up_transposed, state));
    for (int transposed = 0; transposed < 2; transposed++)
        if (shape->training || (transposed != 0) == shape->down_transposed)
            TRY(compile(context, shape, GEMM_UNGATED, transposed != 0, state));
    if (shape->form == GEMM_LINEAR && !shape->gate_up_transposed)
        TRY(gemm_kernel_create(context, shape, GEMM_UNGATED, "experts/gemm/nv_split_slices", "",
                               "gemm_nv_slices", &state->slices));
done:
    return status;
}

static clmoe_status split_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    split_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the nv_split engine");
    state->compute_units = context->info.compute_units;
    TRY(compile_all(context, shape, state));
    *out = state;
    state = NULL;
done:
    split_destroy(state);
    return status;
}

static uint32_t split_row_tile(const clmoe_context *context, uint32_t rows_per_expert) {
    (void)context;
    return tile_rows[rows_per_expert > tile_rows[0] ? 1 : 0];
}

/* The larger tile that divides the plan's; a dense problem has no plan. */
static clmoe_status choose_tile(const gemm_problem *problem, int *tile) {
    const uint32_t rows =
        problem->tile_expert.mem ? problem->row_tile : split_row_tile(NULL, problem->slots);
    for (*tile = TILES - 1; *tile >= 0; --*tile)
        if (rows % tile_rows[*tile] == 0)
            return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "row_tile is %u, but engine nv_split needs multiples of %u",
                rows, tile_rows[0]);
}

/* Whether slices side by side are done first. */
static bool takes_slices(const split_state *state, const gemm_problem *problem) {
    const size_t tiles =
        gemm_tiles(problem->slots, tile_rows[TILES - 1]) * gemm_tiles(problem->n, COLUMNS);
    return state->slices && problem->form == GEMM_LINEAR && !problem->tile_expert.mem &&
           !problem->token_of.mem && problem->up.col == 1 &&
           (problem->slots <= SIDE || problem->n <= SIDE || tiles * IDLE < state->compute_units);
}

static clmoe_status run_slices(const split_state *state, launch *chain,
                               const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t groups[] = {gemm_tiles(problem->slots, SIDE), gemm_tiles(problem->n, SIDE)};
    const size_t local[] = {WARP, LINEAR_SLICES};
    TRY(gemm_kernel_set(state->slices, problem, problem->row_tile));
    TRY(launch_bounded(chain, state->slices, 2, groups, local, gemm_work(problem, SIDE, SIDE)));
done:
    return status;
}

static clmoe_status split_run(void *opaque, launch *chain, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const split_state *state = opaque;
    int tile = 0;
    if (takes_slices(state, problem))
        return run_slices(state, chain, problem);
    TRY(choose_tile(problem, &tile));
    const uint32_t columns = problem->form == GEMM_GATED ? COLUMNS / 2 : COLUMNS;
    const size_t groups[] = {gemm_tiles(problem->slots, tile_rows[tile]),
                             gemm_tiles(problem->n, columns)};
    cl_kernel kernel = gemm_tile_kernel(&state->kernels, problem, tile);
    TRY(gemm_kernel_set(kernel, problem, problem->row_tile));
    TRY(launch_bounded(chain, kernel, 2, groups, (const size_t[]){ITEMS, 1},
                       gemm_work(problem, tile_rows[tile], columns)));
done:
    return status;
}

/* As in cl/experts/gemm/nv_split_gradient.cl: a tile of a gradient. */
enum { GRADIENT_ROWS = 64, GRADIENT_COLUMNS = 64 };

typedef struct split_gradient {
    cl_kernel tiles, slices;
    gradient_slices added;
} split_gradient;

static void gradient_destroy(void *opaque) {
    split_gradient *state = opaque;
    if (!state)
        return;
    kernel_release(&state->tiles);
    kernel_release(&state->slices);
    slices_release(&state->added);
    free(state);
}

static clmoe_status gradient_create(clmoe_context *context, const gemm_gradient_shape *shape,
                                    void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    gemm_gradient_shape partial = *shape;
    split_gradient *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the nv_split engine");
    partial.c_type = CLMOE_F32;
    TRY(gemm_gradient_kernel(context, shape, "experts/gemm/nv_split_gradient", "-DSLICED=0",
                             "gradient_nv_split", &state->tiles));
    TRY(gemm_gradient_kernel(context, &partial, "experts/gemm/nv_split_gradient", "-DSLICED=1",
                             "gradient_nv_split", &state->slices));
    TRY(slices_create(context, shape, &state->added));
    *out = state;
    state = NULL;
done:
    gradient_destroy(state);
    return status;
}

static clmoe_status run_gradient_tiles(cl_kernel kernel, launch *chain, const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t groups[] = {gemm_tiles(g->n, GRADIENT_COLUMNS), gemm_tiles(g->m, GRADIENT_ROWS),
                             g->experts};
    TRY(gemm_gradient_set(kernel, g));
    TRY(launch_bounded(chain, kernel, 3, groups, (const size_t[]){ITEMS, 1, 1},
                       (uint64_t)g->slots * GRADIENT_ROWS * GRADIENT_COLUMNS));
done:
    return status;
}

static clmoe_status gradient_run(void *opaque, launch *chain, const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const split_gradient *state = opaque;
    if (!slices_take(g))
        return run_gradient_tiles(state->tiles, chain, g);
    const gemm_gradient partial = slices_of(g);
    TRY(run_gradient_tiles(state->slices, chain, &partial));
    TRY(slices_add(&state->added, chain, g));
done:
    return status;
}

static const gemm_gradient_engine split_gradient_engine = {
    .gathers = true,
    .create = gradient_create,
    .destroy = gradient_destroy,
    .scratch = slices_scratch,
    .run = gradient_run,
};

const gemm_engine gemm_nv_split = {
    .name = "nv_split",
    .gathers = true,
    .supports = split_supports,
    .create = split_create,
    .destroy = split_destroy,
    .row_tile = split_row_tile,
    .scratch = gemm_no_scratch,
    .run = split_run,
    .gradient = &split_gradient_engine,
};
