/* The portable engine for GPUs: tiles through local memory, in sizes that fit the device. */
#include "../program.h"
#include "kernel.h"

#include <stdio.h>
#include <stdlib.h>

enum {
    ITEM = 4, /* rows, and columns of each matrix, per work-item, as in cl/gemm_tiled.cl */
    FEW_ROWS = 16,
};

/* As in cl/gemm_narrow.cl, whose sums have the same bits as those of the tiles. */
enum {
    NARROW_ROWS = 16,
    NARROW_COLUMNS = 8,
    NARROW_ITEMS = NARROW_ROWS * NARROW_COLUMNS,
    NARROW_LOCAL_BYTES = 4 * (NARROW_ROWS + NARROW_COLUMNS) * (NARROW_ITEMS + 4),
    NARROW_PER_TILE = 24, /* groups a compute unit does in the time of a tile; on an H200 */
};

/* Without a measurement. columns: of each of two matrices per work-group. */
static const tile_sizes usual = {.rows = 64, .columns = 64, .depth = 16};

typedef enum tile_size { TILE_FEW_ROWS, TILE_MANY_ROWS, TILE_SIZES } tile_size;

typedef struct tiled_state {
    uint32_t rows[TILE_SIZES], columns, depth;
    cl_kernel kernels[GEMM_VARIANTS][TILE_SIZES]; /* by form; NULL where not asked for */
    cl_kernel narrow;                             /* NULL where not asked for, or too large */
    uint32_t compute_units;
} tiled_state;

static size_t items(const tile_sizes *tile, uint32_t rows) {
    return (size_t)(tile->columns / ITEM) * (rows / ITEM);
}

static size_t local_bytes(const tile_sizes *tile, uint32_t rows) {
    return sizeof(float) * tile->depth * (rows + 2 * tile->columns + 3 * ITEM);
}

static bool fits(const device_info *info, const tile_sizes *tile, uint32_t rows) {
    return items(tile, rows) <= info->max_group && local_bytes(tile, rows) <= info->local_mem_bytes;
}

/* The largest tile the device can hold, of the sizes measured if any. */
static tile_sizes large_tile(const clmoe_context *context) {
    tile_sizes tile = context->tuning.sizes[TUNED_TILED];
    if (tile.rows == 0 || !fits(&context->info, &tile, FEW_ROWS))
        tile = usual;
    while (tile.rows > FEW_ROWS && !fits(&context->info, &tile, tile.rows))
        tile.rows /= 2;
    return tile;
}

static clmoe_status tiled_supports(clmoe_context *context) {
    const device_info *info = &context->info;
    if (fits(info, &usual, FEW_ROWS))
        return CLMOE_SUCCESS;
    return fail(
        CLMOE_UNSUPPORTED,
        "engine tiled needs groups of %zu work-items and %zu bytes of local memory, but the "
        "device has %zu and %llu",
        items(&usual, FEW_ROWS), local_bytes(&usual, FEW_ROWS), info->max_group,
        (unsigned long long)info->local_mem_bytes);
}

static void tiled_destroy(void *opaque) {
    tiled_state *state = opaque;
    if (!state)
        return;
    for (int i = 0; i < GEMM_VARIANTS; i++)
        for (int j = 0; j < TILE_SIZES; j++)
            kernel_release(&state->kernels[i][j]);
    kernel_release(&state->narrow);
    free(state);
}

static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, tiled_state *state,
                            gemm_variant variant) {
    clmoe_status status = CLMOE_SUCCESS;
    for (int size = 0; size < TILE_SIZES; size++) {
        char options[96];
        snprintf(options, sizeof options, "-DGATED=%d -DROWS=%u -DCOLUMNS=%u -DDEPTH=%u",
                 variant == GEMM_GATE_AND_UP, state->rows[size], state->columns, state->depth);
        TRY(gemm_kernel_create(context, shape, "gemm_tiled", options, "gemm_tiled",
                               &state->kernels[variant][size]));
    }
done:
    return status;
}

static clmoe_status tiled_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    tiled_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the tiled engine");
    const tile_sizes tile = large_tile(context);
    state->compute_units = context->info.compute_units;
    state->rows[TILE_FEW_ROWS] = FEW_ROWS;
    state->rows[TILE_MANY_ROWS] = tile.rows;
    state->columns = tile.columns;
    state->depth = tile.depth;
    TRY(compile(context, shape, state, GEMM_UNGATED));
    if (shape->form == GEMM_GATED)
        TRY(compile(context, shape, state, GEMM_GATE_AND_UP));
    if (shape->form == GEMM_LINEAR && context->info.max_group >= NARROW_ITEMS &&
        context->info.local_mem_bytes >= NARROW_LOCAL_BYTES)
        TRY(gemm_kernel_create(context, shape, "gemm_narrow", "-DGATED=0", "gemm_narrow",
                               &state->narrow));
    *out = state;
    state = NULL;
done:
    tiled_destroy(state);
    return status;
}

static uint32_t tiled_row_tile(const clmoe_context *context, uint32_t rows_per_expert) {
    return rows_per_expert > FEW_ROWS ? large_tile(context).rows : FEW_ROWS;
}

/* The larger tile that divides the plan's; a dense problem has no plan. */
static clmoe_status choose_size(const tiled_state *state, const gemm_problem *problem,
                                tile_size *size) {
    *size = TILE_MANY_ROWS;
    if (problem->tile_expert.mem ? problem->row_tile % state->rows[TILE_MANY_ROWS] != 0
                                 : problem->slots <= FEW_ROWS)
        *size = TILE_FEW_ROWS;
    if (problem->tile_expert.mem && problem->row_tile % state->rows[*size] != 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "row_tile is %u, but engine tiled needs multiples of %d", problem->row_tile,
                    FEW_ROWS);
    return CLMOE_SUCCESS;
}

static size_t narrow_groups(const gemm_problem *problem) {
    return gemm_tiles(problem->slots, NARROW_ROWS) * gemm_tiles(problem->n, NARROW_COLUMNS);
}

/* Whether the narrow form can do it, and is done before all compute units are done with tiles. */
static bool is_narrow(const tiled_state *state, const gemm_problem *problem) {
    const size_t tiles = gemm_tiles(problem->slots, state->rows[TILE_MANY_ROWS]) *
                         gemm_tiles(problem->n, 2 * state->columns);
    const size_t rounds = gemm_tiles(tiles, state->compute_units);
    return state->narrow && problem->form == GEMM_LINEAR && !problem->tile_expert.mem &&
           !problem->token_of.mem && problem->up.col == 1 &&
           narrow_groups(problem) / NARROW_PER_TILE < rounds * state->compute_units;
}

static clmoe_status run_narrow(const tiled_state *state, launch *chain,
                               const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t groups[] = {gemm_tiles(problem->slots, NARROW_ROWS),
                             gemm_tiles(problem->n, NARROW_COLUMNS)};
    TRY(gemm_kernel_set(state->narrow, problem, problem->row_tile));
    TRY(launch_kernel(chain, state->narrow, 2, groups, (size_t[]){NARROW_ITEMS, 1}));
done:
    return status;
}

static clmoe_status tiled_run(void *opaque, launch *chain, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const tiled_state *state = opaque;
    const gemm_variant variant = gemm_variant_of(problem->form);
    const size_t columns = variant == GEMM_GATE_AND_UP ? state->columns : 2 * state->columns;
    tile_size size = TILE_FEW_ROWS;
    if (is_narrow(state, problem))
        return run_narrow(state, chain, problem);
    TRY(choose_size(state, problem, &size));
    const uint32_t rows = state->rows[size];
    const size_t groups[] = {gemm_tiles(problem->slots, rows), gemm_tiles(problem->n, columns)};
    const size_t local[] = {state->columns / ITEM, rows / ITEM};
    TRY(gemm_kernel_set(state->kernels[variant][size], problem, problem->row_tile));
    TRY(launch_kernel(chain, state->kernels[variant][size], 2, groups, local));
done:
    return status;
}

const gemm_engine gemm_tiled = {
    .name = "tiled",
    .gathers = true,
    .supports = tiled_supports,
    .create = tiled_create,
    .destroy = tiled_destroy,
    .row_tile = tiled_row_tile,
    .scratch = gemm_no_scratch,
    .run = tiled_run,
};
