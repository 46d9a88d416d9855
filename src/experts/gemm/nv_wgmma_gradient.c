/*
 * Gradients of weights by the engine nv_wgmma. P and Q are first brought into the orders of wgmma's
 * factors, buckets close together and filled up with zeros: list, factor twice, gradient; experts
 * without slots get their zeros from empty.
 */
#include "nv_ptx.h"
#include "nv_wgmma.h"

#include <stdio.h>
#include <stdlib.h>

/* Up to so many columns of P fill less than half of a tile: those are nv_mma's. */
enum { NARROW = GRADIENT_ROWS / 2 };

/* Rounds of 4 * LONG blocks of slots, and what is left by fours: 512 slots, and 128. */
enum { LONG = 4 };

/* Columns of P or Q that a group of nv_wgmma_factor.cl brings along. */
enum { FACTOR_COLUMNS = 256, STORE_BYTES = 16, ZERO_PARTS = 16 };

typedef struct wgmma_gradient {
    cl_kernel list, fragments, tiles, product, empty;
    uint32_t units;
    void *narrow; /* of nv_mma */
} wgmma_gradient;

static void gradient_destroy(void *opaque) {
    wgmma_gradient *state = opaque;
    if (!state)
        return;
    kernel_release(&state->list);
    kernel_release(&state->fragments);
    kernel_release(&state->tiles);
    kernel_release(&state->product);
    kernel_release(&state->empty);
    gemm_nv_mma.gradient->destroy(state->narrow);
    free(state);
}

static clmoe_status compile(clmoe_context *context, const gemm_gradient_shape *shape,
                            wgmma_gradient *state) {
    clmoe_status status = CLMOE_SUCCESS;
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%d", WGMMA_HELPER_ITEMS);
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_list", options, "nv_wgmma_list",
                       &state->list));
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_factor", "-DFRAGMENTS=1", "nv_wgmma_factor",
                       &state->fragments));
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_factor", "-DFRAGMENTS=0", "nv_wgmma_factor",
                       &state->tiles));
    snprintf(options, sizeof options, "-DC=%s", type_name(shape->c_type));
    TRY(program_kernel(context, "experts/gemm/nv_wgmma_empty", options, "nv_wgmma_empty",
                       &state->empty));
    snprintf(options, sizeof options, "-DLONG=%d -DOUTPUTS=%zu", LONG,
             STORE_BYTES / type_bytes(shape->c_type));
    TRY(gemm_gradient_kernel_edited(context, shape, "experts/gemm/nv_wgmma_gradient", options,
                                    &nv_ptx_sm90a, "gradient_nv_wgmma", &state->product));
done:
    return status;
}

/* What nv_mma takes this engine does, and no other types. */
static clmoe_status gradient_create(clmoe_context *context, const gemm_gradient_shape *shape,
                                    void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    wgmma_gradient *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the nv_wgmma engine");
    TRY(gemm_nv_mma.gradient->create(context, shape, &state->narrow));
    TRY(compile(context, shape, state));
    state->units = context->info.compute_units;
    *out = state;
    state = NULL;
done:
    gradient_destroy(state);
    return status;
}

/* ---- Scratch ----------------------------------------------------------------------------------
 */

/* The bound of tiles of slots. */
static size_t most_tiles(uint32_t experts, size_t slots) {
    return gemm_tiles(slots, GRADIENT_SLOTS) + experts;
}

static size_t factor_bytes(size_t tiles, uint32_t columns, size_t unit) {
    return tiles * GRADIENT_SLOTS * wgmma_round_up(columns, unit) * sizeof(cl_ushort);
}

static size_t gradient_scratch(const void *opaque, uint32_t experts, size_t slots, uint32_t m,
                               uint32_t n) {
    const size_t tiles = most_tiles(experts, slots);
    (void)opaque;
    return WGMMA_ALIGNMENT + 2 * wgmma_list_bytes(tiles) + factor_bytes(tiles, m, GRADIENT_ROWS) +
           factor_bytes(tiles, n, GRADIENT_COLUMNS);
}

/* The parts of a problem's scratch. */
typedef struct scratch_parts {
    clmoe_buf list, buckets, p, q;
} scratch_parts;

static scratch_parts parts_of(const gemm_gradient *g) {
    const size_t tiles = most_tiles(g->experts, g->slots);
    scratch_parts parts = {.list = wgmma_aligned(g->scratch)};
    cl_mem mem = parts.list.mem;
    parts.buckets = (clmoe_buf){mem, parts.list.offset + wgmma_list_bytes(tiles)};
    parts.p = (clmoe_buf){mem, parts.buckets.offset + wgmma_list_bytes(tiles)};
    parts.q = (clmoe_buf){mem, parts.p.offset + factor_bytes(tiles, g->m, GRADIENT_ROWS)};
    return parts;
}

/* ---- Running ----------------------------------------------------------------------------------
 */

static clmoe_status make_list(const wgmma_gradient *state, launch *chain, const gemm_gradient *g,
                              const scratch_parts *parts) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf list = parts->list, buckets = parts->buckets;
    TRY(KERNEL_SET(state->list, ARG_F32(g->offsets), ARG_F32(g->kept), ARG_UINT(g->experts),
                   ARG_UINT(g->slots), ARG_AS(rows, ARG_UINT(GRADIENT_SLOTS)), ARG_F32(list),
                   ARG_F32(buckets)));
    TRY(launch_1d(chain, state->list, 1, WGMMA_HELPER_ITEMS));
done:
    return status;
}

/* `columns` of P or Q into `to`. */
static clmoe_status make_factor(launch *chain, cl_kernel kernel, const gemm_gradient *g,
                                const gemm_rows *from, uint32_t columns, clmoe_buf to) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf list = parts_of(g).list;
    const size_t blocks = most_tiles(g->experts, g->slots) * (GRADIENT_SLOTS / WGMMA_BLOCK);
    const size_t groups[] = {blocks, gemm_tiles(columns, FACTOR_COLUMNS)};
    TRY(KERNEL_SET(kernel, ARG_AS(rows, ARG_U16(from->buf)), ARG_F32(g->token_of), ARG_F32(list),
                   ARG_UINT(from->row), ARG_UINT(from->gathered), ARG_UINT(columns),
                   ARG_UINT(blocks), ARG_U16(to)));
    TRY(launch_kernel(chain, kernel, 2, groups, (const size_t[]){WGMMA_HELPER_ITEMS, 1}));
done:
    return status;
}

/* As many groups as run at once share the tiles; a bounded launch has so many. */
static clmoe_status multiply(const wgmma_gradient *state, launch *chain, const gemm_gradient *g,
                             const scratch_parts *parts) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf buckets = parts->buckets, p = parts->p, q = parts->q;
    const size_t blocks = most_tiles(g->experts, g->slots) * (GRADIENT_SLOTS / WGMMA_BLOCK);
    const uint64_t products =
        gemm_tiles(g->m, GRADIENT_ROWS) * gemm_tiles(g->n, GRADIENT_COLUMNS) * g->experts;
    const uint64_t share =
        launch_share(chain, (uint64_t)g->slots * GRADIENT_ROWS * GRADIENT_COLUMNS);
    const uint64_t most = share < products ? share : products;
    for (uint64_t begin = 0; begin < products; begin += most) {
        TRY(KERNEL_SET(state->product, ARG_F32(buckets), ARG_U16(p), ARG_U16(q), ARG_UINT(blocks),
                       ARG_UINT(g->m), ARG_UINT(g->n), ARG_TYPE(g->c, g->types.c_type),
                       ARG_AS(c_expert, ARG_ULONG(g->expert)), ARG_AS(c_row, ARG_ULONG(g->row)),
                       ARG_UINT(g->accumulate), ARG_UINT(begin), ARG_UINT(most)));
        TRY(launch_1d(chain, state->product, wgmma_groups(most, state->units), WGMMA_ITEMS));
    }
done:
    return status;
}

static clmoe_status clear_empty(const wgmma_gradient *state, launch *chain,
                                const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t groups[] = {ZERO_PARTS, g->experts};
    TRY(KERNEL_SET(state->empty, ARG_F32(g->kept), ARG_UINT(g->slots), ARG_UINT(g->m),
                   ARG_UINT(g->n), ARG_TYPE(g->c, g->types.c_type),
                   ARG_AS(c_expert, ARG_ULONG(g->expert)), ARG_AS(c_row, ARG_ULONG(g->row))));
    TRY(launch_kernel(chain, state->empty, 2, groups, (const size_t[]){WGMMA_HELPER_ITEMS, 1}));
done:
    return status;
}

static clmoe_status gradient_run(void *opaque, launch *chain, const gemm_gradient *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const wgmma_gradient *state = opaque;
    const scratch_parts parts = parts_of(problem);
    if (problem->m <= NARROW)
        return gemm_nv_mma.gradient->run(state->narrow, chain, problem);
    if (problem->slots > 0) {
        TRY(make_list(state, chain, problem, &parts));
        TRY(make_factor(chain, state->fragments, problem, &problem->p, problem->m, parts.p));
        TRY(make_factor(chain, state->tiles, problem, &problem->q, problem->n, parts.q));
        TRY(multiply(state, chain, problem, &parts));
    }
    if (!problem->accumulate)
        TRY(clear_empty(state, chain, problem));
done:
    return status;
}

const gemm_gradient_engine nv_wgmma_gradient_engine = {
    .gathers = true,
    .create = gradient_create,
    .destroy = gradient_destroy,
    .scratch = gradient_scratch,
    .run = gradient_run,
};
