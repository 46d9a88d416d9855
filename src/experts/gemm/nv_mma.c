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

typedef enum product { PRODUCT_FIRST, PRODUCT_DOWN, PRODUCTS } product;

typedef struct nv_state {
    cl_kernel kernels[PRODUCTS][TILES];
} nv_state;

static clmoe_status nv_supports(clmoe_context *context) {
    if (context->info.nv_capability < MIN_CAPABILITY)
        return fail(
            CLMOE_UNSUPPORTED,
            "engine nv_mma needs an NVIDIA GPU of compute capability 8.0, but %.64s is none",
            context->info.name);
    return nv_probe(context);
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
    for (int i = 0; i < PRODUCTS; i++)
        for (int j = 0; j < TILES; j++)
            kernel_release(&state->kernels[i][j]);
    free(state);
}

static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, nv_state *state,
                            product which) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool down = which == PRODUCT_DOWN;
    const bool gated = !down && shape->form == GEMM_GATED;
    const bool transposed = down ? shape->down_transposed : shape->gate_up_transposed;
    for (int i = 0; i < TILES; i++) {
        char options[64];
        snprintf(options, sizeof options, "-DGATED=%d -DTRANSPOSED=%d -DROWS=%u", gated, transposed,
                 tiles[i].rows);
        TRY(gemm_kernel_create(context, shape, "experts/gemm/nv_mma", options, "gemm_nv_mma",
                               &state->kernels[which][i]));
    }
done:
    return status;
}

static clmoe_status nv_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    nv_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the nv_mma engine");
    TRY(nv_takes(shape));
    TRY(compile(context, shape, state, PRODUCT_FIRST));
    TRY(compile(context, shape, state, PRODUCT_DOWN));
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
    const nv_state *state = opaque;
    int tile = 0;
    TRY(choose_tile(problem, &tile));
    const product which = problem->form == GEMM_LINEAR ? PRODUCT_DOWN : PRODUCT_FIRST;
    const uint32_t columns = tiles[tile].columns / (problem->form == GEMM_GATED ? 2 : 1);
    const size_t groups =
        gemm_tiles(problem->slots, tiles[tile].rows) * gemm_tiles(problem->n, columns);
    cl_kernel kernel = state->kernels[which][tile];
    TRY(gemm_kernel_set(kernel, problem, problem->row_tile));
    TRY(launch_bounded(chain, kernel, 1, &groups, (const size_t[]){ITEMS},
                       gemm_work(problem, tiles[tile].rows, columns)));
done:
    return status;
}

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
};
