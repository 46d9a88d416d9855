/*
 * The engine for Hopper's tensor cores: many rows of an expert by wgmma, few too where weights are
 * packed; what is left is nv_mma's. Its kernels are in cl/experts/gemm/nv_wgmma_*.cl:
 *   packed weights: list, (rows,) packed; raw weights: list, map, tokens, raw
 */
#include "nv_wgmma.h"
#include "experts/gemm/act.clh"
#include "nv_probe.h"
#include "nv_ptx.h"

#include <stdio.h>
#include <stdlib.h>

/* wgmma is of sm_90a, which later devices do not run. */
enum { CAPABILITY = 90 };

enum { CHUNK = 8 };

/* Slots of a tile of packed weights, as nv_mma has them; raw weights take two of the largest. */
static const uint32_t tiles[] = {16, 64, WGMMA_TOKENS};

enum { TILES = sizeof tiles / sizeof tiles[0], MANY = TILES - 1, RAW_TOKENS = 2 * WGMMA_TOKENS };

/* Groups that share the k of a tile of rows, and rows of a fragment. */
enum { ROWS_PARTS = 4, FRAGMENT_ROWS = 16 };

/*
 * Below so many columns of the first product a tile of tokens is read too seldom to pay for a pass
 * that makes tiles of them: the product gathers rows.
 */
enum { GATHER_HIDDEN = 1400 };

/* Immediate offsets of 24 bits reach so far, and a round further: FAR of nv_wgmma_raw.cl. */
enum { MAX_K = 30720 };

/* Rows of weights in half a slot of local memory. */
enum { BOX_ROWS = 64 };

/* k in blocks, unrolled in rounds of 4 * fours. */
typedef struct depth {
    uint32_t blocks, fours;
} depth;

/* A kernel for raw weights. */
typedef struct raw_kernel {
    bool first; /* of an MLP's first problem; else of a LINEAR one */
    bool transposed;
    uint32_t k;
    cl_kernel kernel;
} raw_kernel;

/* First, second, and of a backward pass back through down and through gate and up. */
enum { RAW_FIRST, RAW_SECOND, RAW_BACK_DOWN, RAW_BACK_UP, RAW_KERNELS };

typedef struct wgmma_state {
    void *narrow; /* of nv_mma */
    uint32_t units;
    bool gathers; /* products[0][MANY] reads rows itself */
    depth depths[2];
    cl_kernel products[2][TILES], pack[2]; /* of an MLP's first problem and its second */
    cl_kernel list, rows, tokens, map;
    raw_kernel raw[RAW_KERNELS]; /* NULL where they are not needed, or cannot be */
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
    if (shape->a_type == CLMOE_F32 || shape->w_type != shape->a_type ||
        shape->c_type != shape->a_type)
        return fail(CLMOE_UNSUPPORTED,
                    "engine nv_wgmma needs f16 or bf16 throughout, but type is %s and weight_type "
                    "%s",
                    type_name(shape->a_type), type_name(shape->w_type));
    if (shape->form == GEMM_LINEAR || shape->dim > MAX_K || shape->hidden_dim > MAX_K)
        return fail(CLMOE_UNSUPPORTED, "engine nv_wgmma is for MLPs of up to %d columns", MAX_K);
    return CLMOE_SUCCESS;
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
    for (int i = 0; i < RAW_KERNELS; i++)
        kernel_release(&state->raw[i].kernel);
    kernel_release(&state->list);
    kernel_release(&state->rows);
    kernel_release(&state->tokens);
    kernel_release(&state->map);
    gemm_nv_mma.destroy(state->narrow);
    free(state);
}

/*
 * Rounds are of up to 48 steps. The least padding of k, but a round costs a wait at its end: of 4
 * steps a quarter of the time, of 16 next to nothing; and a long one costs time to compile.
 */
static depth depth_of(uint32_t k) {
    static const uint32_t cost[] = {0, 126, 118, 106, 100, 99, 99, 99, 98, 99, 99, 99, 99};
    const uint32_t blocks = divide_up(k, WGMMA_BLOCK);
    depth best = {0};
    uint64_t least = UINT64_MAX;
    for (uint32_t fours = 1; fours < sizeof cost / sizeof cost[0]; fours++) {
        const uint32_t padded = divide_up(blocks, 4 * fours) * 4 * fours;
        const uint64_t time = (uint64_t)padded * cost[fours];
        if (time < least || (time == least && fours <= 8)) {
            least = time;
            best = (depth){padded, fours};
        }
    }
    return best;
}

/* ---- Compiling --------------------------------------------------------------------------------
 */

static clmoe_status product_kernel(clmoe_context *context, const gemm_shape *shape,
                                   wgmma_state *state, bool second, int tile) {
    const depth k = state->depths[second];
    char options[224];
    snprintf(options, sizeof options,
             "-DGATED=%d -DGATHER=%d -DCOLUMNS=%u -DFOURS=%u -DBLOCKS=%u -DACTIVATION=%d "
             "-DROW_WEIGHT=%d -DBIASED=%d -DKEEP_Z=%d -DINTERLEAVED=%d",
             !second && shape->form == GEMM_GATED, !second && (tile != MANY || state->gathers),
             tiles[tile], k.fours, k.blocks, second ? ACT_NONE : (int)shape->activation,
             second ? (int)GEMM_ROW_WEIGHT_NONE : (int)shape->row_weight, shape->biased[second],
             shape->training && !second, shape->interleaved);
    return gemm_kernel_create_edited(context, shape, "experts/gemm/nv_wgmma_packed", options,
                                     &nv_ptx_sm90a, "gemm_nv_wgmma_packed",
                                     &state->products[second][tile]);
}

static clmoe_status pack_kernel(clmoe_context *context, const gemm_shape *shape, wgmma_state *state,
                                bool second) {
    char options[64];
    snprintf(options, sizeof options, "-DGATED=%d -DBLOCKS=%u",
             !second && shape->form == GEMM_GATED, state->depths[second].blocks);
    return gemm_kernel_create_edited(context, shape, "experts/gemm/nv_wgmma_pack", options, NULL,
                                     "pack_nv_wgmma", &state->pack[second]);
}

static clmoe_status compile_raw(clmoe_context *context, const gemm_shape *shape, raw_kernel *raw,
                                bool back) {
    const depth k = depth_of(raw->k);
    char options[224];
    snprintf(options, sizeof options,
             "-DGATED=%d -DTRANSPOSED=%d -DACCUMULATES=%d -DFOURS=%u -DBLOCKS=%u "
             "-DACTIVATION=%d -DROW_WEIGHT=%d -DBIASED=%d -DKEEP_Z=%d -DINTERLEAVED=%d",
             raw->first && shape->form == GEMM_GATED, raw->transposed, back, k.fours, k.blocks,
             raw->first ? (int)shape->activation : ACT_NONE,
             raw->first ? (int)shape->row_weight : (int)GEMM_ROW_WEIGHT_NONE,
             !back && shape->biased[!raw->first], shape->training && raw->first,
             shape->interleaved);
    return gemm_kernel_create_edited(context, shape, "experts/gemm/nv_wgmma_raw", options,
                                     &nv_ptx_sm90a, "gemm_nv_wgmma_raw", &raw->kernel);
}

/* Tensor maps need rows of whole chunks; no box has every other element. */
static bool raw_is_possible(const gemm_shape *shape) {
    return shape->dim % CHUNK == 0 && shape->hidden_dim % CHUNK == 0 &&
           !(shape->interleaved && shape->gate_up_transposed);
}

static clmoe_status raw_kernels(clmoe_context *context, const gemm_shape *shape,
                                wgmma_state *state) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool together = shape->form == GEMM_GATED && !shape->separate;
    raw_kernel *raw = state->raw;
    if (!raw_is_possible(shape))
        return CLMOE_SUCCESS;
    raw[RAW_FIRST] = (raw_kernel){true, shape->gate_up_transposed, shape->dim, NULL};
    raw[RAW_SECOND] = (raw_kernel){false, shape->down_transposed, shape->hidden_dim, NULL};
    raw[RAW_BACK_DOWN] = (raw_kernel){false, !shape->down_transposed, shape->dim, NULL};
    raw[RAW_BACK_UP] = (raw_kernel){false, !shape->gate_up_transposed,
                                    (together ? 2 : 1) * shape->hidden_dim, NULL};
    for (int i = 0; i < RAW_KERNELS; i++)
        if (i <= RAW_SECOND || (shape->training && raw[i].k <= MAX_K))
            TRY(compile_raw(context, shape, &raw[i], i > RAW_SECOND));
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_tokens", NULL, "nv_wgmma_tokens",
                       &state->tokens));
    TRY(gemm_kernel_create_edited(context, shape, "experts/gemm/nv_wgmma_map", "", &nv_ptx_sm90a,
                                  "nv_wgmma_map", &state->map));
done:
    return status;
}

static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, wgmma_state *state) {
    clmoe_status status = CLMOE_SUCCESS;
    char options[32];
    snprintf(options, sizeof options, "-DGROUP=%d", WGMMA_HELPER_ITEMS);
    for (int second = 0; second < 2; second++) {
        for (int tile = 0; tile < TILES; tile++)
            TRY(product_kernel(context, shape, state, second != 0, tile));
        TRY(pack_kernel(context, shape, state, second != 0));
    }
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_list", options, "nv_wgmma_list",
                       &state->list));
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_rows", NULL, "nv_wgmma_rows", &state->rows));
    TRY(raw_kernels(context, shape, state));
done:
    return status;
}

static clmoe_status wgmma_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    wgmma_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the nv_wgmma engine");
    TRY(wgmma_takes(shape));
    state->units = context->info.compute_units;
    state->depths[0] = depth_of(shape->dim);
    state->depths[1] = depth_of(shape->hidden_dim);
    state->gathers = shape->hidden_dim < GATHER_HIDDEN && shape->dim % CHUNK == 0;
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

/* ---- Scratch ----------------------------------------------------------------------------------
 */

/* The parts of a problem's scratch. */
typedef struct scratch_parts {
    clmoe_buf maps, list, tokens;
} scratch_parts;

enum { MAPS_BYTES = 2 * MAP_WORDS * sizeof(cl_ulong) };

static size_t list_bytes(size_t slots) {
    return wgmma_list_bytes(gemm_tiles(slots, tiles[0]));
}

static scratch_parts parts_of(const gemm_problem *problem) {
    scratch_parts parts = {.maps = wgmma_aligned(problem->scratch)};
    parts.list = (clmoe_buf){parts.maps.mem, parts.maps.offset + MAPS_BYTES};
    parts.tokens = (clmoe_buf){parts.maps.mem, parts.list.offset + list_bytes(problem->slots)};
    return parts;
}

/* Rows of k in the order of either form; products read up to a tile past the last one. */
static size_t rows_bytes(size_t slots, uint32_t k) {
    const size_t rows = wgmma_round_up(slots, tiles[MANY]) + RAW_TOKENS;
    return rows * depth_of(k).blocks * WGMMA_BLOCK * sizeof(cl_ushort) + WGMMA_ALIGNMENT;
}

static size_t wgmma_between(const gemm_shape *shape, size_t slots) {
    return rows_bytes(slots, shape->hidden_dim);
}

/* A list, maps, and rows of A: in a backward pass those of dz too. */
static size_t wgmma_scratch(const gemm_shape *shape, size_t slots, uint32_t n, gemm_form form) {
    const size_t lists = MAPS_BYTES + list_bytes(slots) + WGMMA_ALIGNMENT;
    const uint32_t dz = shape->hidden_dim * (shape->form == GEMM_GATED && !shape->separate ? 2 : 1);
    const size_t first = rows_bytes(slots, shape->dim), back = rows_bytes(slots, dz);
    (void)n;
    if (form != GEMM_LINEAR)
        return lists + first;
    if (shape->training)
        return lists + (first > back ? first : back);
    return lists + (shape->rows_between ? rows_bytes(slots, shape->hidden_dim) : 0);
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

static uint32_t slots_of_tile(const gemm_problem *problem) {
    return problem->packed ? tiles[tile_of(problem)] : RAW_TOKENS;
}

/* The bound of tiles: those of raw weights begin at the plan's. */
static size_t most_tiles(const gemm_problem *problem) {
    return gemm_tiles(problem->slots, tiles[tile_of(problem)]);
}

/* Columns of C of a tile. */
static uint32_t columns_of(const gemm_problem *problem) {
    const uint32_t rows = problem->packed ? WGMMA_ROWS : 2 * BOX_ROWS;
    return problem->form == GEMM_GATED ? rows / 2 : rows;
}

static clmoe_status make_list(const wgmma_state *state, launch *chain, const gemm_problem *problem,
                              clmoe_buf list) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool dense = !problem->tile_expert.mem;
    const clmoe_buf none = {0};
    TRY(KERNEL_SET(state->list, ARG_AS(offsets, ARG_F32(dense ? none : problem->offsets)),
                   ARG_AS(kept, ARG_F32(dense ? none : problem->kept)), ARG_UINT(problem->experts),
                   ARG_UINT(problem->slots), ARG_AS(rows, ARG_UINT(slots_of_tile(problem))),
                   ARG_F32(list), ARG_AS(buckets, ARG_F32(none))));
    TRY(launch_1d(chain, state->list, 1, WGMMA_HELPER_ITEMS));
done:
    return status;
}

/* A in tiles, in place of its rows. */
static clmoe_status make_tiles(const wgmma_state *state, launch *chain, gemm_problem *problem,
                               const scratch_parts *parts) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t rows = slots_of_tile(problem), blocks = depth_of(problem->k).blocks;
    const size_t groups[] = {most_tiles(problem), ROWS_PARTS};
    const clmoe_buf list = parts->list;
    TRY(KERNEL_SET(state->rows, ARG_TYPE(problem->a, problem->a_type), ARG_F32(problem->token_of),
                   ARG_F32(list), ARG_UINT(problem->k), ARG_UINT(blocks), ARG_UINT(rows),
                   ARG_AS(tiles, ARG_U16(parts->tokens))));
    TRY(launch_kernel(chain, state->rows, 2, groups, (const size_t[]){WGMMA_HELPER_ITEMS, 1}));
    problem->a = parts->tokens;
done:
    return status;
}

/* A in fragments, in place of its rows. */
static clmoe_status make_fragments(const wgmma_state *state, launch *chain, gemm_problem *problem,
                                   const scratch_parts *parts) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t blocks = depth_of(problem->k).blocks;
    const size_t groups[] = {most_tiles(problem), RAW_TOKENS / FRAGMENT_ROWS};
    const clmoe_buf list = parts->list;
    TRY(KERNEL_SET(state->tokens, ARG_TYPE(problem->a, problem->a_type), ARG_F32(problem->token_of),
                   ARG_F32(list), ARG_UINT(problem->k), ARG_UINT(blocks),
                   ARG_AS(packed, ARG_U16(parts->tokens))));
    TRY(launch_kernel(chain, state->tokens, 2, groups, (const size_t[]){WGMMA_HELPER_ITEMS, 1}));
    problem->a = parts->tokens;
done:
    return status;
}

/*
 * As many groups as run at once share the tiles; a bounded launch has so many products. Tiles of
 * raw weights take different times: groups take them as they get free, where one launch has all.
 */
static clmoe_status multiply(const wgmma_state *state, launch *chain, cl_kernel kernel,
                             const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const scratch_parts parts = parts_of(problem);
    const clmoe_buf list = parts.list, maps = parts.maps;
    const uint32_t columns = columns_of(problem);
    const uint64_t products = most_tiles(problem) * gemm_tiles(problem->n, columns);
    const uint64_t share = launch_share(chain, gemm_work(problem, slots_of_tile(problem), columns));
    const uint64_t most = share < products ? share : products;
    const bool second = problem->form == GEMM_LINEAR, own = !second && problem->between;
    const uint32_t next_blocks = own ? state->depths[1].blocks : 0;
    const uint32_t counter = second ? LIST_TAKEN_SECOND : LIST_TAKEN_FIRST;
    const uint32_t taken = most == products ? counter : 0;
    for (uint64_t begin = 0; begin < products; begin += most) {
        const kernel_arg more[] = {ARG_F32(list),         arg_as("maps", arg_buf("maps", maps, 8)),
                                   ARG_UINT(next_blocks), ARG_UINT(begin),
                                   ARG_UINT(most),        ARG_UINT(taken)};
        const size_t count = sizeof more / sizeof more[0] - (problem->packed ? 1 : 0);
        TRY(gemm_kernel_set_more(kernel, problem, problem->row_tile, count, more));
        TRY(launch_1d(chain, kernel, wgmma_groups(most, state->units), WGMMA_ITEMS));
    }
done:
    return status;
}

static clmoe_status run_packed(const wgmma_state *state, launch *chain, gemm_problem problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool second = problem.form == GEMM_LINEAR;
    const int tile = tile_of(&problem);
    const scratch_parts parts = parts_of(&problem);
    const bool tiled = second || (tile == MANY && !state->gathers);
    if (problem.between && second) { /* behind the first, whose list is there, and C in tiles */
        problem.a = wgmma_aligned(problem.a);
    } else {
        TRY(make_list(state, chain, &problem, parts.list));
        if (tiled)
            TRY(make_tiles(state, chain, &problem, &parts));
        problem.c = problem.between ? wgmma_aligned(problem.c) : problem.c;
    }
    TRY(multiply(state, chain, state->products[second][tile], &problem));
done:
    return status;
}

/* ---- Raw weights ------------------------------------------------------------------------------
 */

/* Whether a tensor map can be made of the matrix. */
static bool map_fits(const gemm_weight *w, clmoe_type type) {
    const uint64_t stride = w->col == 1 ? w->row : w->col;
    return (w->col == 1 || w->row == 1) && stride % CHUNK == 0 && w->expert % CHUNK == 0 &&
           w->buf.offset % (CHUNK * type_bytes(type)) == 0;
}

/* The kernel for a problem of raw weights with many rows, or NULL: it is nv_mma's. */
static cl_kernel raw_kernel_for(const wgmma_state *state, const gemm_problem *problem) {
    const bool first = problem->form != GEMM_LINEAR, transposed = problem->up.col != 1;
    if (tile_of(problem) != MANY || !map_fits(&problem->up, problem->w_type) ||
        (problem->form == GEMM_GATED && !map_fits(&problem->gate, problem->w_type)))
        return NULL;
    for (int i = 0; i < RAW_KERNELS; i++) {
        const raw_kernel *raw = &state->raw[i];
        if (raw->kernel && raw->first == first && raw->transposed == transposed &&
            raw->k == problem->k && (i > RAW_SECOND || !problem->accumulate))
            return raw->kernel;
    }
    return NULL;
}

static clmoe_status make_maps(const wgmma_state *state, launch *chain, const gemm_problem *problem,
                              clmoe_buf maps) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_weight *w = &problem->up;
    const bool transposed = w->col != 1;
    const clmoe_buf none = {0}, gate = problem->form == GEMM_GATED ? problem->gate.buf : none;
    const uint64_t bytes = type_bytes(problem->w_type), rows = transposed ? problem->k : problem->n;
    const uint64_t y_bytes = (transposed ? w->col : w->row) * bytes;
    const uint64_t z_bytes = problem->experts > 1 ? w->expert * bytes : y_bytes * rows;
    TRY(KERNEL_SET(state->map, ARG_U16(gate), ARG_AS(up, ARG_U16(w->buf)),
                   ARG_AS(x, ARG_UINT(transposed ? problem->n : problem->k)),
                   ARG_AS(y, ARG_UINT(rows)), ARG_UINT(problem->experts),
                   ARG_AS(box, ARG_UINT(transposed ? WGMMA_BLOCK : BOX_ROWS)), ARG_ULONG(y_bytes),
                   ARG_ULONG(z_bytes), arg_as("maps", arg_buf("maps", maps, sizeof(cl_ulong)))));
    TRY(launch_1d(chain, state->map, 1, 1));
done:
    return status;
}

static clmoe_status run_raw(const wgmma_state *state, launch *chain, cl_kernel kernel,
                            gemm_problem problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const scratch_parts parts = parts_of(&problem);
    TRY(make_maps(state, chain, &problem, parts.maps));
    if (problem.between && problem.form == GEMM_LINEAR) {
        problem.a = wgmma_aligned(problem.a);
    } else {
        TRY(make_list(state, chain, &problem, parts.list));
        TRY(make_fragments(state, chain, &problem, &parts));
        problem.c = problem.between ? wgmma_aligned(problem.c) : problem.c;
    }
    TRY(multiply(state, chain, kernel, &problem));
done:
    return status;
}

static clmoe_status wgmma_check(const void *opaque, const gemm_problem *problem) {
    (void)opaque;
    if (!problem->packed || problem->up.buf.offset % (CHUNK * type_bytes(problem->w_type)) == 0)
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED,
                "packed weights are at offset %zu, but engine nv_wgmma needs multiples of %zu",
                problem->up.buf.offset, CHUNK * type_bytes(problem->w_type));
}

static bool wgmma_joins(const void *opaque, const gemm_problem *first, const gemm_problem *second) {
    return first->packed || (raw_kernel_for(opaque, first) && raw_kernel_for(opaque, second));
}

static clmoe_status wgmma_run(void *opaque, launch *chain, const gemm_problem *problem) {
    const wgmma_state *state = opaque;
    if (problem->packed)
        return run_packed(state, chain, *problem);
    cl_kernel kernel = raw_kernel_for(state, problem);
    return kernel ? run_raw(state, chain, kernel, *problem)
                  : gemm_nv_mma.run(state->narrow, chain, problem);
}

/* ---- Packed weights ---------------------------------------------------------------------------
 */

static size_t wgmma_packed_elements(const void *opaque, const gemm_problem *problem) {
    const wgmma_state *state = opaque;
    gemm_problem packed = *problem;
    packed.packed = true;
    size_t elements = gemm_tiles(problem->n, columns_of(&packed));
    if (size_mul(elements, problem->experts, &elements) &&
        size_mul(elements, (size_t)WGMMA_ROWS * WGMMA_BLOCK, &elements) &&
        size_mul(elements, state->depths[problem->form == GEMM_LINEAR].blocks, &elements))
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
    const uint32_t columns = problem->form == GEMM_GATED ? WGMMA_ROWS / 2 : WGMMA_ROWS;
    const size_t groups[] = {16 * gemm_tiles(problem->n, columns), problem->experts};
    cl_kernel kernel = state->pack[problem->form == GEMM_LINEAR];
    TRY(KERNEL_SET(kernel, ARG_TYPE(gate, type), ARG_AS(up, ARG_TYPE(up->buf, type)),
                   ARG_AS(w_expert, ARG_ULONG(up->expert)), ARG_AS(w_row, ARG_ULONG(up->row)),
                   ARG_AS(w_col, ARG_ULONG(up->col)), ARG_UINT(problem->n), ARG_UINT(problem->k),
                   ARG_TYPE(packed, type)));
    TRY(launch_kernel(chain, kernel, 2, groups, (const size_t[]){WGMMA_HELPER_ITEMS, 1}));
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
    .joins = wgmma_joins,
    .scratch = wgmma_scratch,
    .check = wgmma_check,
    .run = wgmma_run,
    .packed_elements = wgmma_packed_elements,
    .packed_layout = wgmma_packed_layout,
    .pack = wgmma_pack,
    .gradient = &nv_wgmma_gradient_engine,
};
