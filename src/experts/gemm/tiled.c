/* The portable engine for GPUs: tiles through local memory, in sizes that fit the device. */
#include "experts/gemm/tiled.clh"
#include "experts/gemm/gemm.clh"
#include "kernel.h"
#include "runtime/program.h"
#include "slices.h"

#include <stdio.h>
#include <stdlib.h>

enum { FEW_ROWS = 16, LARGE_ROWS = 128 };

/* Rows per expert from which large tiles are no slower, though more of their rows are empty: by the
 * times for 1024 on an H200. */
enum { LARGE_FROM = 512 };

/* Time of large tiles of a gradient by that of others of as many elements, on an H200. */
enum { LARGE_SPEED = 4, MANY_SPEED = 5 };

/* Devices with groups of so many work-items have the registers for large tiles. */
enum { LARGE_GROUP = 1024 };

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
static const tile_sizes usual_large = {.rows = LARGE_ROWS, .columns = 64, .depth = 8};

/* TILE_LARGE: see cl/experts/gemm/tiled_items.clh. */
typedef enum tile_size { TILE_FEW_ROWS, TILE_MANY_ROWS, TILE_LARGE, TILE_SIZES } tile_size;

typedef struct tiled_state {
    tile_sizes tiles[TILE_SIZES];
    bool slices;                                  /* tiles sum in slices */
    cl_kernel kernels[GEMM_VARIANTS][TILE_SIZES]; /* by form; NULL where not asked for */
    cl_kernel linear[LINEAR_SIZES];               /* NULL where not asked for, or too large */
    uint32_t compute_units;
} tiled_state;

static size_t items(const tile_sizes *tile, uint32_t rows) {
    return (size_t)(tile->columns / TILED_ITEM) * (rows / TILED_ITEM);
}

static size_t local_bytes(const tile_sizes *tile, uint32_t rows) {
    return sizeof(float) * tile->depth * (rows + 2 * tile->columns + TILED_ITEM);
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

/* Whether the device is one for large tiles of these sizes. */
static bool takes_large(const device_info *info, const tile_sizes *tile) {
    return !device_is_cpu(info) && !info->is_intel_gpu && info->max_group >= LARGE_GROUP &&
           device_takes_group(info, tile->columns / TILED_ITEM, tile->rows / TILED_LARGE_ROWS) &&
           2 * local_bytes(tile, tile->rows) <= info->local_mem_bytes;
}

/* The large tile, of the sizes measured if any; rows 0: none. */
static tile_sizes large_tile(const clmoe_context *context) {
    const tile_sizes *tuned = &context->tuning.sizes[TUNED_TILED];
    const tile_sizes *tile = tuned->rows == 0 ? &usual_large : tuned;
    return tile->rows == LARGE_ROWS && takes_large(&context->info, tile) ? *tile : (tile_sizes){0};
}

/* The largest other tile the device can hold. */
static tile_sizes many_tile(const clmoe_context *context) {
    tile_sizes tile = context->tuning.sizes[TUNED_TILED];
    if (tile.rows == 0 || large_tile(context).rows != 0 || !fits(&context->info, &tile, FEW_ROWS))
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

static clmoe_status compile_tile(clmoe_context *context, const gemm_shape *shape,
                                 tiled_state *state, gemm_variant variant, tile_size size) {
    const tile_sizes *tile = &state->tiles[size];
    char options[96];
    kernel_release(&state->kernels[variant][size]);
    snprintf(options, sizeof options, "-DLINEAR=%d -DLARGE=%d -DROWS=%u -DCOLUMNS=%u -DDEPTH=%u",
             state->slices, size == TILE_LARGE, tile->rows, tile->columns, tile->depth);
    return gemm_kernel_create(context, shape, variant, "experts/gemm/tiled", options, "gemm_tiled",
                              &state->kernels[variant][size]);
}

/* One size for all forms of the shape. */
static clmoe_status compile_size(clmoe_context *context, const gemm_shape *shape,
                                 tiled_state *state, tile_size size) {
    clmoe_status status = compile_tile(context, shape, state, GEMM_UNGATED, size);
    if (status == CLMOE_SUCCESS && shape->form == GEMM_GATED)
        status = compile_tile(context, shape, state, GEMM_GATE_AND_UP, size);
    return status;
}

/* In fewer rows where the kernel takes more of the device than it has; these divide the plan's. The
 * large tile is left out then. */
static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, tiled_state *state) {
    const error_sentence kept = error_keep();
    clmoe_status status = CLMOE_UNSUPPORTED;
    uint32_t *rows = &state->tiles[TILE_MANY_ROWS].rows;
    for (*rows *= 2; status == CLMOE_UNSUPPORTED && *rows > FEW_ROWS;) {
        *rows /= 2;
        status = compile_size(context, shape, state, TILE_FEW_ROWS);
        if (status == CLMOE_SUCCESS)
            status = compile_size(context, shape, state, TILE_MANY_ROWS);
    }
    TRY(status);
    if (state->tiles[TILE_LARGE].rows != 0)
        status = compile_size(context, shape, state, TILE_LARGE);
    if (status == CLMOE_UNSUPPORTED) {
        state->tiles[TILE_LARGE].rows = 0;
        status = CLMOE_SUCCESS;
    }
    if (status == CLMOE_SUCCESS)
        error_put_back(&kept);
done:
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
    const tile_sizes tile = many_tile(context);
    state->compute_units = context->info.compute_units;
    state->tiles[TILE_FEW_ROWS] = state->tiles[TILE_MANY_ROWS] = tile;
    state->tiles[TILE_FEW_ROWS].rows = FEW_ROWS;
    if (shape->form != GEMM_LINEAR)
        state->tiles[TILE_LARGE] = large_tile(context);
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
    const uint32_t large = large_tile(context).rows;
    if (large != 0 && rows_per_expert >= LARGE_FROM)
        return large;
    return rows_per_expert > FEW_ROWS ? many_tile(context).rows : FEW_ROWS;
}

/* Columns of C that a tile has. */
static size_t tile_columns(const tile_sizes *tile, const gemm_problem *problem) {
    return (problem->form == GEMM_GATED ? 1 : 2) * (size_t)tile->columns;
}

/* Whether rows of A and of W, along k or along n, are multiples of TILED_ITEM elements. */
static bool has_fours(const gemm_problem *problem) {
    return problem->k % TILED_ITEM == 0 &&
           (problem->up.col == 1 || (problem->up.row == 1 && problem->n % TILED_ITEM == 0));
}

/* Large tiles are for problems that have some for every compute unit. */
static bool goes_large(const tiled_state *state, const gemm_problem *problem) {
    const tile_sizes *tile = &state->tiles[TILE_LARGE];
    if (tile->rows == 0 || !has_fours(problem) ||
        (problem->tile_expert.mem && problem->row_tile % tile->rows != 0))
        return false;
    return gemm_tiles(problem->slots, tile->rows) *
               gemm_tiles(problem->n, tile_columns(tile, problem)) >=
           state->compute_units;
}

/* The largest tile that divides the plan's; a dense problem has no plan. */
static clmoe_status choose_size(const tiled_state *state, const gemm_problem *problem,
                                tile_size *size) {
    *size = goes_large(state, problem) ? TILE_LARGE : TILE_MANY_ROWS;
    if (problem->tile_expert.mem ? problem->row_tile % state->tiles[*size].rows != 0
                                 : problem->slots <= FEW_ROWS)
        *size = TILE_FEW_ROWS;
    if (problem->tile_expert.mem && problem->row_tile % state->tiles[*size].rows != 0)
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
    const tile_sizes *tile = &state->tiles[TILE_MANY_ROWS];
    const size_t tiles =
        gemm_tiles(problem->slots, tile->rows) * gemm_tiles(problem->n, 2 * tile->columns);
    const size_t small_cost = gemm_tiles(small, units);
    const size_t large_cost = gemm_tiles(large, units) * LARGE_COST;
    const size_t area = (size_t)tile->rows * tile->columns;
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
    tile_size size = TILE_FEW_ROWS;
    const int linear = is_linear(state, problem) ? choose_linear(state, problem) : LINEAR_SIZES;
    if (linear != LINEAR_SIZES)
        return run_linear(state, chain, problem, linear);
    TRY(choose_size(state, problem, &size));
    const tile_sizes *tile = &state->tiles[size];
    const size_t columns = tile_columns(tile, problem);
    const size_t groups[] = {gemm_tiles(problem->slots, tile->rows),
                             gemm_tiles(problem->n, columns)};
    const size_t local[] = {tile->columns / TILED_ITEM,
                            tile->rows / (size == TILE_LARGE ? TILED_LARGE_ROWS : TILED_ITEM)};
    TRY(gemm_kernel_set(state->kernels[variant][size], problem, problem->row_tile));
    TRY(launch_bounded(chain, state->kernels[variant][size], 2, groups, local,
                       gemm_work(problem, tile->rows, columns)));
done:
    return status;
}

/* ---- Gradients of weights ------------------------------------------------------------------ */

/* Kernels of one size: in tiles, or, dense ones of few elements, in tiles of slices that are then
 * added. */
typedef struct gradient_kernels {
    tile_sizes tile; /* rows 0: none */
    cl_kernel tiles, slices;
} gradient_kernels;

typedef struct tiled_gradient {
    gradient_kernels many, large;
    gradient_slices added;
    uint32_t compute_units;
} tiled_gradient;

static void kernels_release(gradient_kernels *kernels) {
    kernel_release(&kernels->tiles);
    kernel_release(&kernels->slices);
    kernels->tile.rows = 0;
}

static void gradient_destroy(void *opaque) {
    tiled_gradient *state = opaque;
    if (!state)
        return;
    kernels_release(&state->many);
    kernels_release(&state->large);
    slices_release(&state->added);
    free(state);
}

static clmoe_status compile_gradients(clmoe_context *context, const gemm_gradient_shape *shape,
                                      gradient_kernels *kernels, const tile_sizes *tile,
                                      bool large) {
    clmoe_status status = CLMOE_SUCCESS;
    gemm_gradient_shape partial = *shape;
    partial.c_type = CLMOE_F32;
    kernels_release(kernels);
    for (int sliced = 0; sliced < 2; sliced++) {
        char options[96];
        snprintf(options, sizeof options,
                 "-DSLICED=%d -DLARGE=%d -DROWS=%u -DCOLUMNS=%u -DDEPTH=%u", sliced, large,
                 tile->rows, tile->columns, tile->depth);
        TRY(gemm_gradient_kernel(context, sliced ? &partial : shape, "experts/gemm/tiled_gradient",
                                 options, "gradient_tiled",
                                 sliced ? &kernels->slices : &kernels->tiles));
    }
    kernels->tile = *tile;
done:
    return status;
}

/* Large tiles are left out where the kernels take more of the device than it has. */
static clmoe_status gradient_create(clmoe_context *context, const gemm_gradient_shape *shape,
                                    void **out) {
    const error_sentence kept = error_keep();
    clmoe_status status = CLMOE_UNSUPPORTED;
    tile_sizes tile = usual;
    tiled_gradient *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the tiled engine");
    for (; status == CLMOE_UNSUPPORTED && tile.rows >= FEW_ROWS; tile.rows /= 2)
        if (fits(&context->info, &tile, tile.rows))
            status = compile_gradients(context, shape, &state->many, &tile, false);
    TRY(status);
    if (takes_large(&context->info, &usual_large))
        status = compile_gradients(context, shape, &state->large, &usual_large, true);
    if (status != CLMOE_UNSUPPORTED)
        TRY(status);
    TRY(slices_create(context, shape, &state->added));
    state->compute_units = context->info.compute_units;
    error_put_back(&kept);
    *out = state;
    state = NULL;
done:
    gradient_destroy(state);
    return status;
}

static size_t gradient_groups(const tile_sizes *tile, const gemm_gradient *g) {
    return gemm_tiles(g->n, 2 * (size_t)tile->columns) * gemm_tiles(g->m, tile->rows) * g->experts;
}

/* Large tiles are for problems that have some for every compute unit; with more rows past the last
 * one they still have to be faster. */
static const gradient_kernels *choose_gradient(const tiled_gradient *state,
                                               const gemm_gradient *g) {
    const gradient_kernels *many = &state->many, *large = &state->large;
    const size_t groups = large->tile.rows ? gradient_groups(&large->tile, g) : 0;
    const bool has_fours = g->m % TILED_ITEM == 0 && g->n % TILED_ITEM == 0;
    const uint64_t few = gradient_groups(&many->tile, g) * (uint64_t)many->tile.rows;
    return has_fours && groups >= state->compute_units &&
                   groups * (uint64_t)large->tile.rows * LARGE_SPEED <= few * MANY_SPEED
               ? large
               : many;
}

static clmoe_status run_gradient_tiles(const tiled_gradient *state, launch *chain, bool sliced,
                                       const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const gradient_kernels *kernels = choose_gradient(state, g);
    const tile_sizes *tile = &kernels->tile;
    const size_t columns = 2 * (size_t)tile->columns;
    const size_t groups[] = {gemm_tiles(g->n, columns), gemm_tiles(g->m, tile->rows), g->experts};
    const size_t local[] = {tile->columns / TILED_ITEM,
                            tile->rows / (kernels == &state->large ? TILED_LARGE_ROWS : TILED_ITEM),
                            1};
    const cl_kernel kernel = sliced ? kernels->slices : kernels->tiles;
    TRY(gemm_gradient_set(kernel, g));
    TRY(launch_bounded(chain, kernel, 3, groups, local, (uint64_t)g->slots * tile->rows * columns));
done:
    return status;
}

static clmoe_status run_slices(const tiled_gradient *state, launch *chain, const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_gradient partial = slices_of(g);
    TRY(run_gradient_tiles(state, chain, true, &partial));
    TRY(slices_add(&state->added, chain, g));
done:
    return status;
}

static clmoe_status gradient_run(void *opaque, launch *chain, const gemm_gradient *g) {
    const tiled_gradient *state = opaque;
    if (slices_take(g))
        return run_slices(state, chain, g);
    return run_gradient_tiles(state, chain, false, g);
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
