/* The engine for NVIDIA's tensor cores: f16 and bf16, by inline PTX in cl/experts/gemm/nv_mma.cl.
 */
#include "kernel.h"
#include "nv_probe.h"
#include "runtime/program.h"

#include <stdio.h>
#include <stdlib.h>

enum { ITEMS = 128, MIN_CAPABILITY = 80 };

/* As in cl/experts/gemm/nv_mma.cl: rows and columns of a tile, gate's and up's together. */
static const struct { uint32_t rows, columns; } tiles[] = {{16, 64}, {64, 128}, {128, 128}};

enum { TILES = sizeof tiles / sizeof tiles[0] };
_Static_assert((int)TILES <= (int)GEMM_TILES, "more tiles than kernels have room for");

typedef struct nv_state {
    gemm_tile_kernels kernels;
} nv_state;

static clmoe_status nv_supports(clmoe_context *context) {
    if (context->info.nv_capability < MIN_CAPABILITY)
        return fail(
            CLMOE_UNSUPPORTED,
            "engine nv_mma needs an NVIDIA GPU of compute capability 8.0, but %.64s is none",
            context->info.name);
    return nv_probe(context, NV_PROBE_MMA);
}

static clmoe_status nv_takes(const gemm_shape *shape) {
    if (shape->a_type != CLMOE_F32 && shape->w_type == shape->a_type &&
        shape->c_type == shape->a_type)
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED,
                "engine nv_mma needs f16 or bf16 throughout, but type is %s and weight_type %s",
                type_name(shape->a_type), type_name(shape->w_type));
}

static void nv_destroy(void *opaque) {
    nv_state *state = opaque;
    if (!state)
        return;
    gemm_tile_kernels_release(&state->kernels);
    free(state);
}

static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, gemm_variant variant,
                            bool transposed, cl_kernel kernels[TILES]) {
    clmoe_status status = CLMOE_SUCCESS;
    for (int i = 0; i < TILES && !kernels[i]; i++) {
        char options[64];
        snprintf(options, sizeof options, "-DTRANSPOSED=%d -DROWS=%u -DACCUMULATES=%d", transposed,
                 tiles[i].rows, shape->training && variant == GEMM_UNGATED);
        TRY(gemm_kernel_create(context, shape, variant, "experts/gemm/nv_mma", options,
                               "gemm_nv_mma", &kernels[i]));
    }
done:
    return status;
}

static clmoe_status compile_all(clmoe_context *context, const gemm_shape *shape, nv_state *state) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_variant first = gemm_variant_of(shape->form);
    const bool orders[] = {shape->gate_up_transposed, shape->down_transposed};
    TRY(compile(context, shape, first, orders[0], state->kernels.of[first][orders[0]]));
    for (int transposed = 0; transposed < 2; transposed++)
        if (shape->training || transposed == orders[1])
            TRY(compile(context, shape, GEMM_UNGATED, transposed != 0,
                        state->kernels.of[GEMM_UNGATED][transposed]));
done:
    return status;
}

static clmoe_status nv_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    nv_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the nv_mma engine");
    TRY(nv_takes(shape));
    TRY(compile_all(context, shape, state));
    *out = state;
    state = NULL;
done:
    nv_destroy(state);
    return status;
}

/* Few rows: the time is that of reading W; many: that of the tensor cores. */
static uint32_t nv_row_tile(const clmoe_context *context, uint32_t rows_per_expert) {
    (void)context;
    return rows_per_expert <= 16 ? 16 : rows_per_expert <= 128 ? 64 : 128;
}

/* The largest tile that divides the plan's; a dense problem has no plan. */
static clmoe_status choose_tile(const gemm_problem *problem, int *tile) {
    const uint32_t rows =
        problem->tile_expert.mem ? problem->row_tile : nv_row_tile(NULL, problem->slots);
    for (*tile = TILES - 1; *tile >= 0; --*tile)
        if (rows % tiles[*tile].rows == 0)
            return CLMOE_SUCCESS;
    return fail(CLMOE_INVALID_ARGUMENT, "row_tile is %u, but engine nv_mma needs multiples of %u",
                rows, tiles[0].rows);
}

static clmoe_status nv_run(void *opaque, launch *chain, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    int tile = 0;
    TRY(choose_tile(problem, &tile));
    const uint32_t columns = tiles[tile].columns / (problem->form == GEMM_GATED ? 2 : 1);
    const size_t groups =
        gemm_tiles(problem->slots, tiles[tile].rows) * gemm_tiles(problem->n, columns);
    const nv_state *state = opaque;
    cl_kernel kernel = gemm_tile_kernel(&state->kernels, problem, tile);
    TRY(gemm_kernel_set(kernel, problem, problem->row_tile));
    TRY(launch_bounded(chain, kernel, 1, &groups, (const size_t[]){ITEMS},
                       gemm_work(problem, tiles[tile].rows, columns)));
done:
    return status;
}

/* As in cl/experts/gemm/nv_mma_gradient.cl: a tile of a gradient. */
enum { GRADIENT_ROWS = 128, GRADIENT_COLUMNS = 128, STORE_BYTES = 16 };

typedef struct nv_gradient {
    cl_kernel kernel;
} nv_gradient;

static clmoe_status gradient_takes(const gemm_gradient_shape *shape) {
    if (shape->p_type != CLMOE_F32 && shape->q_type == shape->p_type &&
        (shape->c_type == CLMOE_F32 || shape->c_type == shape->p_type))
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED,
                "engine nv_mma needs f16 or bf16 for gradients of weights, but they are of %s, %s "
                "and %s",
                type_name(shape->p_type), type_name(shape->q_type), type_name(shape->c_type));
}

static void gradient_destroy(void *opaque) {
    nv_gradient *state = opaque;
    if (!state)
        return;
    kernel_release(&state->kernel);
    free(state);
}

static clmoe_status gradient_create(clmoe_context *context, const gemm_gradient_shape *shape,
                                    void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    char options[32];
    nv_gradient *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the nv_mma engine");
    TRY(gradient_takes(shape));
    snprintf(options, sizeof options, "-DOUTPUTS=%zu", STORE_BYTES / type_bytes(shape->c_type));
    TRY(gemm_gradient_kernel(context, shape, "experts/gemm/nv_mma_gradient", options,
                             "gradient_nv_mma", &state->kernel));
    *out = state;
    state = NULL;
done:
    gradient_destroy(state);
    return status;
}

static clmoe_status gradient_run(void *opaque, launch *chain, const gemm_gradient *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const nv_gradient *state = opaque;
    const size_t groups = gemm_tiles(problem->m, GRADIENT_ROWS) *
                          gemm_tiles(problem->n, GRADIENT_COLUMNS) * problem->experts;
    TRY(gemm_gradient_set(state->kernel, problem));
    TRY(launch_bounded(chain, state->kernel, 1, &groups, (const size_t[]){ITEMS},
                       (uint64_t)problem->slots * GRADIENT_ROWS * GRADIENT_COLUMNS));
done:
    return status;
}

static const gemm_gradient_engine nv_gradient_engine = {
    .gathers = true,
    .create = gradient_create,
    .destroy = gradient_destroy,
    .scratch = gemm_gradient_no_scratch,
    .run = gradient_run,
};

const gemm_engine gemm_nv_mma = {
    .name = "nv_mma",
    .gathers = true,
    .supports = nv_supports,
    .takes = nv_takes,
    .create = nv_create,
    .destroy = nv_destroy,
    .row_tile = nv_row_tile,
    .scratch = gemm_no_scratch,
    .run = nv_run,
    .gradient = &nv_gradient_engine,
};
