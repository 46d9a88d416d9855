/* The portable engine for GPUs: tiles through local memory, in sizes that fit the device. */
#include "experts/gemm/tiled.clh"
#include "experts/gemm/gemm.clh"
#include "kernel.h"
#include "runtime/program.h"
#include "slices.h"

#include <stdio.h>
#include <stdlib.h>

enum { FEW_ROWS = 16 };

/* Sizes of cl/experts/gemm/tiled_linear.cl; the sums have the same bits in all, and in tiles. */
typedef struct linear_size {
    uint32_t rows, columns, tile, depth;
} linear_size;
enum { LINEAR_SMALL, LINEAR_LARGE, LINEAR_SIZES };
static const linear_size linear_sizes[LINEAR_SIZES] = {
    [LINEAR_SMALL] = {.rows = 4, .columns = 8, .tile = 1, .depth = 32},
    [LINEAR_LARGE] = {.rows = 32, .columns = 32, .tile = 4, .depth = 16},
};

/* A group's share of a compute unit's time, in groups of the small size, on an H200; a tile of 64
 * by 128. */
enum { LARGE_COST = 12, TILE_COST = 70, TILE_AREA = 64 * 64 };

/* Without a measurement. columns: of each of two matrices per work-group. */
static const tile_sizes usual = {.rows = 64, .columns = 64, .depth = 16};

typedef enum tile_size { TILE_FEW_ROWS, TILE_MANY_ROWS, TILE_SIZES } tile_size;

typedef struct tiled_state {
    uint32_t rows[TILE_SIZES], columns, depth;
    bool slices;                                  /* tiles sum in slices */
    cl_kernel kernels[GEMM_VARIANTS][TILE_SIZES]; /* by form; NULL where not asked for */
    cl_kernel linear[LINEAR_SIZES];               /* NULL where not asked for, or too large */
    uint32_t compute_units;
} tiled_state;

static size_t items(const tile_sizes *tile, uint32_t rows) {
    return (size_t)(tile->columns / TILED_ITEM) * (rows / TILED_ITEM);
}

static size_t local_bytes(const tile_sizes *tile, uint32_t rows) {
    return sizeof(float) * tile->depth * (rows + 2 * tile->columns + 3 * TILED_ITEM);
}

static bool fits(const device_info *info, const tile_sizes *tile, uint32_t rows) {
    return device_takes_group(info, tile->columns / TILED_ITEM, rows / TILED_ITEM) &&
           local_bytes(tile, rows) <= info->local_mem_bytes;
}

/* Whether tiles can sum in slices, which they keep in local memory. */
static bool slices_fit(const device_info *info, const tile_sizes *tile, uint32_t rows) {
    const size_t totals = sizeof(float) * 2 * rows * tile->columns;
    return local_bytes(tile, rows) + totals <= info->local_mem_bytes;
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
        "device has %zu (%zu x %zu) and %llu",
        items(&usual, FEW_ROWS), local_bytes(&usual, FEW_ROWS), info->max_group, info->max_items[0],
        info->max_items[1], (unsigned long long)info->local_mem_bytes);
}

static void tiled_destroy(void *opaque) {
    tiled_state *state = opaque;
    if (!state)
        return;
    for (int i = 0; i < GEMM_VARIANTS; i++)
        for (int j = 0; j < TILE_SIZES; j++)
            kernel_release(&state->kernels[i][j]);
    for (int i = 0; i < LINEAR_SIZES; i++)
        kernel_release(&state->linear[i]);
    free(state);
}

static clmoe_status compile_tiles(clmoe_context *context, const gemm_shape *shape,
                                  tiled_state *state, gemm_variant variant) {
    clmoe_status status = CLMOE_SUCCESS;
    for (int size = 0; size < TILE_SIZES; size++) {
        char options[96];
        kernel_release(&state->kernels[variant][size]);
        snprintf(options, sizeof options, "-DLINEAR=%d -DROWS=%u -DCOLUMNS=%u -DDEPTH=%u",
                 state->slices, state->rows[size], state->columns, state->depth);
        TRY(gemm_kernel_create(context, shape, variant, "experts/gemm/tiled", options, "gemm_tiled",
                               &state->kernels[variant][size]));
    }
done:
    return status;
}

/* In fewer rows where the kernel takes more of the device than it has; these divide the plan's. */
static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, tiled_state *state) {
    const error_sentence kept = error_keep();
    clmoe_status status = CLMOE_UNSUPPORTED;
    uint32_t rows = 2 * state->rows[TILE_MANY_ROWS];
    while (status == CLMOE_UNSUPPORTED && rows > FEW_ROWS) {
        rows /= 2;
        state->rows[TILE_MANY_ROWS] = rows;
        status = compile_tiles(context, shape, state, GEMM_UNGATED);
        if (status == CLMOE_SUCCESS && shape->form == GEMM_GATED)
            status = compile_tiles(context, shape, state, GEMM_GATE_AND_UP);
    }
    if (status == CLMOE_SUCCESS)
        error_put_back(&kept);
    return status;
}

static size_t linear_items(const linear_size *size) {
    return (size_t)LINEAR_SLICES * (size->rows / size->tile) * (size->columns / size->tile);
}

static size_t linear_local_bytes(const linear_size *size) {
    const size_t tiles = (size_t)(size->rows + size->columns) * (size->depth + 4);
    const size_t partials = (size_t)size->rows * size->columns;
    return sizeof(float) * LINEAR_SLICES * (tiles > partials ? tiles : partials);
}

static clmoe_status compile_linear(clmoe_context *context, const gemm_shape *shape,
                                   tiled_state *state) {
    const error_sentence kept = error_keep();
    clmoe_status status = CLMOE_SUCCESS;
    for (int i = 0; i < LINEAR_SIZES; i++) {
        const linear_size *size = &linear_sizes[i];
        char options[96];
        if (!device_takes_group(&context->info, linear_items(size) / LINEAR_SLICES,
                                LINEAR_SLICES) ||
            context->info.local_mem_bytes < linear_local_bytes(size))
            continue;
        snprintf(options, sizeof options, "-DROWS=%u -DCOLUMNS=%u -DTILE=%u -DDEPTH=%u", size->rows,
                 size->columns, size->tile, size->depth);
        status = gemm_kernel_create(context, shape, GEMM_UNGATED, "experts/gemm/tiled_linear",
                                    options, "gemm_linear", &state->linear[i]);
        if (status != CLMOE_UNSUPPORTED)
            TRY(status);
    }
    status = CLMOE_SUCCESS;
done:
    if (status == CLMOE_SUCCESS)
        error_put_back(&kept);
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
    state->slices = shape->form == GEMM_LINEAR && slices_fit(&context->info, &tile, tile.rows);
    TRY(compile(context, shape, state));
    if (shape->form == GEMM_LINEAR)
        TRY(compile_linear(context, shape, state));
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

/* Whether cl/experts/gemm/tiled_linear.cl can do it. */
static bool is_linear(const tiled_state *state, const gemm_problem *problem) {
    return state->linear[LINEAR_SMALL] && problem->form == GEMM_LINEAR &&
           !problem->tile_expert.mem && !problem->token_of.mem && problem->up.col == 1;
}

static size_t linear_groups(const gemm_problem *problem, const linear_size *size) {
    return gemm_tiles(problem->slots, size->rows) * gemm_tiles(problem->n, size->columns);
}

/* A size of cl/experts/gemm/tiled_linear.cl, or LINEAR_SIZES for tiles: what all compute units are
 * done with first. */
static int choose_linear(const tiled_state *state, const gemm_problem *problem) {
    const size_t units = state->compute_units;
    const size_t small = linear_groups(problem, &linear_sizes[LINEAR_SMALL]);
    const size_t large = linear_groups(problem, &linear_sizes[LINEAR_LARGE]);
    const size_t tiles = gemm_tiles(problem->slots, state->rows[TILE_MANY_ROWS]) *
                         gemm_tiles(problem->n, 2 * state->columns);
    const size_t small_cost = gemm_tiles(small, units);
    const size_t large_cost = gemm_tiles(large, units) * LARGE_COST;
    const size_t area = (size_t)state->rows[TILE_MANY_ROWS] * state->columns;
    const size_t tiles_cost = gemm_tiles(tiles, units) * TILE_COST * area / TILE_AREA;
    size_t least = small_cost;
    int best = LINEAR_SMALL;
    if (state->linear[LINEAR_LARGE] && large_cost < least) {
        least = large_cost;
        best = LINEAR_LARGE;
    }
    return state->slices && tiles_cost < least ? LINEAR_SIZES : best;
}

static clmoe_status run_linear(const tiled_state *state, launch *chain, const gemm_problem *problem,
                               int which) {
    clmoe_status status = CLMOE_SUCCESS;
    const linear_size *size = &linear_sizes[which];
    const size_t groups[] = {gemm_tiles(problem->slots, size->rows),
                             gemm_tiles(problem->n, size->columns)};
    const size_t local[] = {linear_items(size) / LINEAR_SLICES, LINEAR_SLICES};
    TRY(gemm_kernel_set(state->linear[which], problem, problem->row_tile));
    TRY(launch_bounded(chain, state->linear[which], 2, groups, local,
                       gemm_work(problem, size->rows, size->columns)));
done:
    return status;
}

static clmoe_status tiled_run(void *opaque, launch *chain, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const tiled_state *state = opaque;
    const gemm_variant variant = gemm_variant_of(problem->form);
    const size_t columns = variant == GEMM_GATE_AND_UP ? state->columns : 2 * state->columns;
    tile_size size = TILE_FEW_ROWS;
    const int linear = is_linear(state, problem) ? choose_linear(state, problem) : LINEAR_SIZES;
    if (linear != LINEAR_SIZES)
        return run_linear(state, chain, problem, linear);
    TRY(choose_size(state, problem, &size));
    const uint32_t rows = state->rows[size];
    const size_t groups[] = {gemm_tiles(problem->slots, rows), gemm_tiles(problem->n, columns)};
    const size_t local[] = {state->columns / TILED_ITEM, rows / TILED_ITEM};
    TRY(gemm_kernel_set(state->kernels[variant][size], problem, problem->row_tile));
    TRY(launch_bounded(chain, state->kernels[variant][size], 2, groups, local,
                       gemm_work(problem, rows, columns)));
done:
    return status;
}

/* ---- Gradients of weights ------------------------------------------------------------------ */

/* In tiles, or, dense ones of few elements, in tiles of slices that are then added. */
typedef struct tiled_gradient {
    uint32_t rows; /* of a tile; its columns are those of `usual` */
    cl_kernel tiles, slices;
    gradient_slices added;
} tiled_gradient;

static void gradient_destroy(void *opaque) {
    tiled_gradient *state = opaque;
    if (!state)
        return;
    kernel_release(&state->tiles);
    kernel_release(&state->slices);
    slices_release(&state->added);
    free(state);
}

/* Both kernels, for tiles of `rows`. */
static clmoe_status compile_gradients(clmoe_context *context, const gemm_gradient_shape *shape,
                                      tiled_gradient *state, uint32_t rows) {
    clmoe_status status = CLMOE_SUCCESS;
    gemm_gradient_shape partial = *shape;
    char options[96];
    partial.c_type = CLMOE_F32;
    state->rows = rows;
    kernel_release(&state->tiles);
    snprintf(options, sizeof options, "-DSPLIT=0 -DROWS=%u -DCOLUMNS=%u -DDEPTH=%u", rows,
             usual.columns, usual.depth);
    TRY(gemm_gradient_kernel(context, shape, "experts/gemm/tiled_gradient", options,
                             "gradient_tiled", &state->tiles));
    snprintf(options, sizeof options, "-DSPLIT=1 -DROWS=%u -DCOLUMNS=%u -DDEPTH=%u", rows,
             usual.columns, usual.depth);
    TRY(gemm_gradient_kernel(context, &partial, "experts/gemm/tiled_gradient", options,
                             "gradient_tiled", &state->slices));
done:
    return status;
}

static clmoe_status gradient_create(clmoe_context *context, const gemm_gradient_shape *shape,
                                    void **out) {
    const error_sentence kept = error_keep();
    clmoe_status status = CLMOE_UNSUPPORTED;
    tiled_gradient *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the tiled engine");
    for (uint32_t rows = usual.rows; status == CLMOE_UNSUPPORTED && rows >= FEW_ROWS; rows /= 2)
        if (fits(&context->info, &usual, rows))
            status = compile_gradients(context, shape, state, rows);
    TRY(status);
    TRY(slices_create(context, shape, &state->added));
    error_put_back(&kept);
    *out = state;
    state = NULL;
done:
    gradient_destroy(state);
    return status;
}

static clmoe_status run_gradient_tiles(const tiled_gradient *state, launch *chain, cl_kernel kernel,
                                       const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t columns = 2 * (size_t)usual.columns;
    const size_t groups[] = {gemm_tiles(g->n, columns), gemm_tiles(g->m, state->rows), g->experts};
    const size_t local[] = {usual.columns / TILED_ITEM, state->rows / TILED_ITEM, 1};
    TRY(gemm_gradient_set(kernel, g));
    TRY(launch_bounded(chain, kernel, 3, groups, local,
                       (uint64_t)g->slots * state->rows * columns));
done:
    return status;
}

static clmoe_status run_slices(const tiled_gradient *state, launch *chain, const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_gradient partial = slices_of(g);
    TRY(run_gradient_tiles(state, chain, state->slices, &partial));
    TRY(slices_add(&state->added, chain, g));
done:
    return status;
}

static clmoe_status gradient_run(void *opaque, launch *chain, const gemm_gradient *g) {
    const tiled_gradient *state = opaque;
    if (slices_take(g))
        return run_slices(state, chain, g);
    return run_gradient_tiles(state, chain, state->tiles, g);
}

static const gemm_gradient_engine tiled_gradient_engine = {
    .gathers = true,
    .create = gradient_create,
    .destroy = gradient_destroy,
    .scratch = slices_scratch,
    .run = gradient_run,
};

const gemm_engine gemm_tiled = {
    .name = "tiled",
    .gathers = true,
    .supports = tiled_supports,
    .create = tiled_create,
    .destroy = tiled_destroy,
    .row_tile = tiled_row_tile,
    .scratch = gemm_no_scratch,
    .run = tiled_run,
    .gradient = &tiled_gradient_engine,
};
