/*
 * The engine for Hopper's tensor cores: packed weights by cl/experts/gemm/nv_wgmma_packed.cl. Raw
 * weights are nv_mma's.
 */
#include "experts/gemm/act.clh"
#include "experts/gemm/nv_wgmma_own.clh"
#include "kernel.h"
#include "nv_probe.h"
#include "nv_ptx.h"
#include "runtime/program.h"

#include <stdio.h>
#include <stdlib.h>

/* wgmma is of sm_90a, which later devices do not run. */
enum { CAPABILITY = 90 };

enum { ITEMS = 384, HELPER_ITEMS = 256, VECTOR = 16 };

/* Slots of a tile, as nv_mma has them. */
static const uint32_t tiles[] = {16, 64, WGMMA_TOKENS};

enum { TILES = sizeof tiles / sizeof tiles[0], MANY = TILES - 1 };

/* Groups that share the k of a tile of rows. */
enum { ROWS_PARTS = 4 };

/*
 * Below so many columns of the first product a tile of tokens is read too seldom to pay for a pass
 * that makes tiles of them: the product gathers rows.
 */
enum { GATHER_HIDDEN = 1400 };

/* Immediate offsets of PTX reach so far: FAR of nv_wgmma_packed.cl. */
enum { MAX_K = 32768 };

/* k in blocks, unrolled in rounds of 4 * fours. */
typedef struct depth {
    uint32_t blocks, fours;
} depth;

typedef struct wgmma_state {
    void *narrow; /* of nv_mma */
    uint32_t units;
    bool gathers; /* first[MANY] reads rows itself */
    depth depths[2];
    cl_kernel products[2][TILES], pack[2]; /* of an MLP's first problem and its second */
    cl_kernel list, rows;
} wgmma_state;

static clmoe_status wgmma_supports(clmoe_context *context) {
    if (context->info.nv_capability != CAPABILITY)
        return fail(CLMOE_UNSUPPORTED,
                    "engine nv_wgmma needs an NVIDIA GPU of compute capability 9.0, but %.64s is "
                    "none",
                    context->info.name);
    return nv_probe(context, NV_PROBE_WGMMA);
}

static clmoe_status wgmma_takes(const gemm_shape *shape) {
    if (shape->form == GEMM_LINEAR || shape->dim > MAX_K || shape->hidden_dim > MAX_K)
        return fail(CLMOE_UNSUPPORTED, "engine nv_wgmma is for MLPs of up to %d columns", MAX_K);
    return gemm_nv_mma.takes(shape);
}

static void wgmma_destroy(void *opaque) {
    wgmma_state *state = opaque;
    if (!state)
        return;
    for (int second = 0; second < 2; second++) {
        for (int i = 0; i < TILES; i++)
            kernel_release(&state->products[second][i]);
        kernel_release(&state->pack[second]);
    }
    kernel_release(&state->list);
    kernel_release(&state->rows);
    gemm_nv_mma.destroy(state->narrow);
    free(state);
}

/*
 * Rounds are of up to 32 steps. The least padding of k, but a round costs a wait at its end: of 4
 * steps a quarter of the time, of 16 next to nothing.
 */
static depth depth_of(uint32_t k) {
    static const uint32_t cost[] = {0, 126, 118, 106, 100, 99, 99, 99, 98};
    const uint32_t blocks = divide_up(k, WGMMA_BLOCK);
    depth best = {0};
    uint64_t least = UINT64_MAX;
    for (uint32_t fours = 1; fours < sizeof cost / sizeof cost[0]; fours++) {
        const uint32_t padded = divide_up(blocks, 4 * fours) * 4 * fours;
        const uint64_t time = (uint64_t)padded * cost[fours];
        if (time <= least) {
            least = time;
            best = (depth){padded, fours};
        }
    }
    return best;
}

static clmoe_status product_kernel(clmoe_context *context, const gemm_shape *shape,
                                   wgmma_state *state, bool second, int tile) {
    const depth k = state->depths[second];
    char options[192];
    gemm_shape own = *shape;
    own.training = shape->training && !second;
    snprintf(options, sizeof options,
             "-DGATED=%d -DGATHER=%d -DCOLUMNS=%u -DFOURS=%u -DBLOCKS=%u -DACTIVATION=%d "
             "-DROW_WEIGHT=%d",
             !second && shape->form == GEMM_GATED, !second && (tile != MANY || state->gathers),
             tiles[tile], k.fours, k.blocks, second ? ACT_NONE : (int)shape->activation,
             second ? (int)GEMM_ROW_WEIGHT_NONE : (int)shape->row_weight);
    return gemm_kernel_create_edited(context, &own, "experts/gemm/nv_wgmma_packed", options,
                                     &nv_ptx_sm90a, "gemm_nv_wgmma_packed",
                                     &state->products[second][tile]);
}

static clmoe_status pack_kernel(clmoe_context *context, const gemm_shape *shape, wgmma_state *state,
                                bool second) {
    char options[64];
    snprintf(options, sizeof options, "-DGATED=%d -DBLOCKS=%u",
             !second && shape->form == GEMM_GATED, state->depths[second].blocks);
    return gemm_kernel_create(context, shape, "experts/gemm/nv_wgmma_pack", options,
                              "pack_nv_wgmma", &state->pack[second]);
}

static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, wgmma_state *state) {
    clmoe_status status = CLMOE_SUCCESS;
    char options[32];
    snprintf(options, sizeof options, "-DGROUP=%d", HELPER_ITEMS);
    for (int second = 0; second < 2; second++) {
        for (int tile = 0; tile < TILES; tile++)
            TRY(product_kernel(context, shape, state, second != 0, tile));
        TRY(pack_kernel(context, shape, state, second != 0));
    }
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_list", options, "nv_wgmma_list",
                       &state->list));
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_rows", NULL, "nv_wgmma_rows", &state->rows));
done:
    return status;
}

static clmoe_status wgmma_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    wgmma_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the nv_wgmma engine");
    state->units = context->info.compute_units;
    state->depths[0] = depth_of(shape->dim);
    state->depths[1] = depth_of(shape->hidden_dim);
    state->gathers = shape->hidden_dim < GATHER_HIDDEN && shape->dim % 8 == 0;
    TRY(compile(context, shape, state));
    TRY(gemm_nv_mma.create(context, shape, &state->narrow));
    *out = state;
    state = NULL;
done:
    wgmma_destroy(state);
    return status;
}

static uint32_t wgmma_row_tile(const clmoe_context *context, uint32_t rows_per_expert) {
    return gemm_nv_mma.row_tile(context, rows_per_expert);
}

/* ---- Sizes ------------------------------------------------------------------------------------
 */

static size_t round_up(size_t value, size_t unit) {
    return gemm_tiles(value, unit) * unit;
}

/* Scratch and C may begin at any element; vectors of theirs are at multiples of 16 bytes. */
static clmoe_buf aligned(clmoe_buf buf) {
    buf.offset = round_up(buf.offset, VECTOR);
    return buf;
}

static size_t list_bytes(size_t slots) {
    const size_t most = gemm_tiles(slots, tiles[0]);
    return round_up((LIST_HEADER + LIST_TILE * most) * sizeof(cl_int), VECTOR);
}

/* Rows of k in tiles of slots. */
static size_t tiles_bytes(size_t slots, uint32_t blocks) {
    return round_up(slots, tiles[MANY]) * blocks * WGMMA_BLOCK * sizeof(cl_ushort);
}

static size_t wgmma_between(const gemm_shape *shape, size_t slots) {
    return tiles_bytes(slots, depth_of(shape->hidden_dim).blocks) + VECTOR;
}

/* A list, and tiles of A: of the first problem, and of the second where that has rows. */
static size_t wgmma_scratch(const gemm_shape *shape, size_t slots, uint32_t n, gemm_form form) {
    const uint32_t k = form == GEMM_LINEAR ? shape->hidden_dim : shape->dim;
    (void)n;
    if (form == GEMM_LINEAR && !shape->rows_between)
        return 0;
    return list_bytes(slots) + tiles_bytes(slots, depth_of(k).blocks) + VECTOR;
}

/* ---- Running ----------------------------------------------------------------------------------
 */

/* The largest tile that divides the plan's; a dense problem has no plan. */
static int tile_of(const gemm_problem *problem) {
    const uint32_t rows =
        problem->tile_expert.mem ? problem->row_tile : wgmma_row_tile(NULL, problem->slots);
    int tile = MANY;
    while (tile > 0 && rows % tiles[tile] != 0)
        tile--;
    return tile;
}

static uint32_t columns_of(const gemm_problem *problem) {
    return problem->form == GEMM_GATED ? WGMMA_ROWS / 2 : WGMMA_ROWS;
}

static clmoe_status make_list(const wgmma_state *state, launch *chain, const gemm_problem *problem,
                              clmoe_buf list) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool dense = !problem->tile_expert.mem;
    const clmoe_buf none = {0};
    cl_kernel kernel = state->list;
    TRY(KERNEL_SET(kernel, ARG_AS(offsets, ARG_F32(dense ? none : problem->offsets)),
                   ARG_AS(kept, ARG_F32(dense ? none : problem->kept)), ARG_UINT(problem->experts),
                   ARG_UINT(problem->slots), ARG_AS(rows, ARG_UINT(tiles[tile_of(problem)])),
                   ARG_F32(list)));
    TRY(launch_1d(chain, kernel, 1, HELPER_ITEMS));
done:
    return status;
}

/* A as tiles, in place of its rows. */
static clmoe_status make_tiles(const wgmma_state *state, launch *chain, gemm_problem *problem,
                               clmoe_buf list, clmoe_buf to) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t rows = tiles[tile_of(problem)];
    const uint32_t blocks = state->depths[problem->form == GEMM_LINEAR].blocks;
    const size_t groups[] = {gemm_tiles(problem->slots, rows), ROWS_PARTS};
    cl_kernel kernel = state->rows;
    TRY(KERNEL_SET(kernel, ARG_TYPE(problem->a, problem->a_type), ARG_F32(problem->token_of),
                   ARG_F32(list), ARG_UINT(problem->k), ARG_UINT(blocks), ARG_UINT(rows),
                   ARG_AS(tiles, ARG_U16(to))));
    TRY(launch_kernel(chain, kernel, 2, groups, (const size_t[]){HELPER_ITEMS, 1}));
    problem->a = to;
done:
    return status;
}

/* As many groups as run at once share the tiles; a bounded launch has so many products. */
static clmoe_status multiply(const wgmma_state *state, launch *chain, const gemm_problem *problem,
                             clmoe_buf list) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool second = problem->form == GEMM_LINEAR;
    const int tile = tile_of(problem);
    const uint32_t rows = tiles[tile], columns = columns_of(problem);
    const uint64_t products = gemm_tiles(problem->slots, rows) * gemm_tiles(problem->n, columns);
    const uint64_t share = launch_share(chain, gemm_work(problem, rows, columns));
    const uint64_t most = share < products ? share : products;
    const uint32_t next_blocks = !second && problem->between ? state->depths[1].blocks : 0;
    cl_kernel kernel = state->products[second][tile];
    for (uint64_t begin = 0; begin < products; begin += most) {
        const kernel_arg more[] = {ARG_F32(list), ARG_UINT(next_blocks), ARG_UINT(begin),
                                   ARG_UINT(most)};
        TRY(gemm_kernel_set_more(kernel, problem, problem->row_tile, sizeof more / sizeof more[0],
                                 more));
        TRY(launch_1d(chain, kernel, most < state->units ? (size_t)most : state->units, ITEMS));
    }
done:
    return status;
}

static clmoe_status run_first(const wgmma_state *state, launch *chain, gemm_problem problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf list = aligned(problem.scratch);
    const clmoe_buf to = {list.mem, list.offset + list_bytes(problem.slots)};
    if (problem.between)
        problem.c = aligned(problem.c);
    TRY(make_list(state, chain, &problem, list));
    if (tile_of(&problem) == MANY && !state->gathers)
        TRY(make_tiles(state, chain, &problem, list, to));
    TRY(multiply(state, chain, &problem, list));
done:
    return status;
}

/* Behind the first, whose list is there, and C in tiles. */
static clmoe_status run_second(const wgmma_state *state, launch *chain, gemm_problem problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf list = aligned(problem.scratch);
    const clmoe_buf to = {list.mem, list.offset + list_bytes(problem.slots)};
    if (problem.between) {
        problem.a = aligned(problem.a);
    } else {
        TRY(make_list(state, chain, &problem, list));
        TRY(make_tiles(state, chain, &problem, list, to));
    }
    TRY(multiply(state, chain, &problem, list));
done:
    return status;
}

static clmoe_status wgmma_check(const void *opaque, const gemm_problem *problem) {
    (void)opaque;
    if (!problem->packed || problem->up.buf.offset % VECTOR == 0)
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED,
                "packed weights are at offset %zu, but engine nv_wgmma needs multiples of %d",
                problem->up.buf.offset, VECTOR);
}

static clmoe_status wgmma_run(void *opaque, launch *chain, const gemm_problem *problem) {
    const wgmma_state *state = opaque;
    if (!problem->packed)
        return gemm_nv_mma.run(state->narrow, chain, problem);
    return problem->form == GEMM_LINEAR ? run_second(state, chain, *problem)
                                        : run_first(state, chain, *problem);
}

/* ---- Packed weights ---------------------------------------------------------------------------
 */

static uint32_t blocks_of(const wgmma_state *state, const gemm_problem *problem) {
    return state->depths[problem->form == GEMM_LINEAR].blocks;
}

static size_t wgmma_packed_elements(const void *opaque, const gemm_problem *problem) {
    size_t elements = gemm_tiles(problem->n, columns_of(problem));
    if (size_mul(elements, problem->experts, &elements) &&
        size_mul(elements, (size_t)WGMMA_ROWS * WGMMA_BLOCK, &elements) &&
        size_mul(elements, blocks_of(opaque, problem), &elements))
        return elements;
    return SIZE_MAX;
}

/* The rest of the order follows from the shape: it changes with the library's version alone. */
static uint32_t wgmma_packed_layout(const void *opaque) {
    (void)opaque;
    return WGMMA_ROWS;
}

static clmoe_status wgmma_pack(void *opaque, launch *chain, const gemm_problem *problem,
                               clmoe_buf packed) {
    clmoe_status status = CLMOE_SUCCESS;
    const wgmma_state *state = opaque;
    const gemm_weight *up = &problem->up;
    const clmoe_type type = problem->w_type;
    const clmoe_buf gate = problem->form == GEMM_GATED ? problem->gate.buf : (clmoe_buf){0};
    const size_t parts = 16 * gemm_tiles(problem->n, columns_of(problem));
    const size_t groups[] = {parts, problem->experts};
    cl_kernel kernel = state->pack[problem->form == GEMM_LINEAR];
    TRY(KERNEL_SET(kernel, ARG_TYPE(gate, type), ARG_AS(up, ARG_TYPE(up->buf, type)),
                   ARG_AS(w_expert, ARG_ULONG(up->expert)), ARG_AS(w_row, ARG_ULONG(up->row)),
                   ARG_AS(w_col, ARG_ULONG(up->col)), ARG_UINT(problem->n), ARG_UINT(problem->k),
                   ARG_TYPE(packed, type)));
    TRY(launch_kernel(chain, kernel, 2, groups, (const size_t[]){HELPER_ITEMS, 1}));
done:
    return status;
}

const gemm_engine gemm_nv_wgmma = {
    .name = "nv_wgmma",
    .gathers = true,
    .supports = wgmma_supports,
    .takes = wgmma_takes,
    .create = wgmma_create,
    .destroy = wgmma_destroy,
    .row_tile = wgmma_row_tile,
    .between = wgmma_between,
    .scratch = wgmma_scratch,
    .check = wgmma_check,
    .run = wgmma_run,
    .packed_elements = wgmma_packed_elements,
    .packed_layout = wgmma_packed_layout,
    .pack = wgmma_pack,
};
