/*
 * Purpose: dense linear GEMM of few outputs, as a router's: the slices of a sum over k are made
 *          side by side, so that they fill a device.
 * Formula: as ref.cl; the sum is (slice 0 + slice 1) + ...
 * Arrays: as in gemm.clh; tile_expert and token_of are NULL, w_col is 1.
 * NDRange: (ceil(slots / ROWS), ceil(n / COLUMNS)) groups of ITEMS x LINEAR_SLICES work-items; each
 *          sums TILE rows by TILE columns over its slice of k.
 * Limits: DEPTH, of k per step, divides LINEAR_UNIT and is a multiple of 4; TILE divides ROWS and
 *         COLUMNS; ITEMS is a multiple of DEPTH and divides DEPTH * ROWS and DEPTH * COLUMNS; local
 *         memory 4 * LINEAR_SLICES * max((ROWS + COLUMNS) * (DEPTH + 4), ROWS * COLUMNS) bytes.
 * Repeatability: a slice is summed by one work-item, slices are added in order: the same bits for
 *                every ROWS, COLUMNS, TILE and DEPTH, and as tiled.cl's.
 */
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"

#define ITEMS_X (COLUMNS / TILE)
#define ITEMS_Y (ROWS / TILE)
#define ITEMS   (ITEMS_X * ITEMS_Y)
#define STRIDE  (DEPTH + 4) /* floats of a row in local memory; padded against bank conflicts */

/* Elements that a work-item carries to local memory per step: of rows STEP apart. */
#define STEP    (ITEMS / DEPTH)
#define A_LOADS (ROWS / STEP)
#define W_LOADS (COLUMNS / STEP)

#define TILES    ((ROWS + COLUMNS) * STRIDE)
#define PARTIALS (ROWS * COLUMNS)
#define SCRATCH  (TILES > PARTIALS ? TILES : PARTIALS) /* floats per slice; a multiple of 4 */

typedef struct carried {
    float a[A_LOADS], w[W_LOADS];
} carried;

/* Rows past the last one are that one again; k past the end of the slice is 0. */
static inline void load(const problem *p, uint row, uint column, uint k, uint end, carried *next) {
    const bool in = k < end;
    UNROLL for (uint i = 0; i < A_LOADS; ++i)
        next->a[i] =
            in ? LOAD(A, p->a + (ulong)min(row + i * STEP, p->slots - 1) * p->k + k) : 0.0f;
    UNROLL for (uint i = 0; i < W_LOADS; ++i)
        next->w[i] =
            in ? LOAD(W, weight_at(p, p->up, 0, min(column + i * STEP, p->n - 1)) + k) : 0.0f;
}

static inline void keep(__local float *a_tile, __local float *w_tile, const carried *next) {
    UNROLL for (uint i = 0; i < A_LOADS; ++i)
        a_tile[i * STEP * STRIDE] = next->a[i];
    UNROLL for (uint i = 0; i < W_LOADS; ++i)
        w_tile[i * STEP * STRIDE] = next->w[i];
}

/* sums [TILE][TILE] += rows ITEMS_Y apart times columns ITEMS_X apart, over DEPTH of k. */
static inline void add_products(__local const float4 *a, __local const float4 *w,
                                float (*sums)[TILE]) {
    UNROLL for (uint i = 0; i < DEPTH / 4; ++i) {
        float4 y[TILE];
        UNROLL for (uint c = 0; c < TILE; ++c)
            y[c] = w[c * ITEMS_X * STRIDE / 4 + i];
        UNROLL for (uint r = 0; r < TILE; ++r) {
            const float4 x = a[r * ITEMS_Y * STRIDE / 4 + i];
            UNROLL for (uint c = 0; c < TILE; ++c) {
                sums[r][c] = fma(x.s0, y[c].s0, sums[r][c]);
                sums[r][c] = fma(x.s1, y[c].s1, sums[r][c]);
                sums[r][c] = fma(x.s2, y[c].s2, sums[r][c]);
                sums[r][c] = fma(x.s3, y[c].s3, sums[r][c]);
            }
        }
    }
}

static inline void store(const problem *p, uint slot, uint column, float sum) {
    if (slot < p->slots && column < p->n)
        gemm_store(p, 0, slot, column, 0.0f, sum);
}

KERNEL(ITEMS, LINEAR_SLICES, 1)
void gemm_linear(GEMM_PARAMETERS) {
    __local float4 scratch[LINEAR_SLICES * SCRATCH / 4];
    const problem p = GEMM_PROBLEM;
    const uint item = (uint)get_local_id(0), slice = (uint)get_local_id(1);
    const uint x = item % ITEMS_X, y = item / ITEMS_X;
    const uint row = GROUP_INDEX(0, ITEMS) * ROWS;
    const uint column = GROUP_INDEX(1, LINEAR_SLICES) * COLUMNS;
    const uint length = linear_slice(k);
    const uint begin = slice * length, end = min(begin + length, k);
    const uint carried_row = item / DEPTH, carried_k = begin + item % DEPTH;

    __local float *a_tile = (__local float *)scratch + slice * SCRATCH;
    __local float *w_tile = a_tile + ROWS * STRIDE;
    __local float *my_place = a_tile + carried_row * STRIDE + item % DEPTH;
    carried next;
    float sums[TILE][TILE];
    UNROLL for (uint r = 0; r < TILE; ++r)
        UNROLL for (uint c = 0; c < TILE; ++c)
            sums[r][c] = 0.0f;
    load(&p, row + carried_row, column + carried_row, carried_k, end, &next);
    for (uint step = 0; step < length; step += DEPTH) {
        keep(my_place, my_place + ROWS * STRIDE, &next);
        barrier(CLK_LOCAL_MEM_FENCE);
        load(&p, row + carried_row, column + carried_row, carried_k + step + DEPTH,
             step + DEPTH < length ? end : 0, &next);
        add_products((__local const float4 *)(a_tile + y * STRIDE),
                     (__local const float4 *)(w_tile + x * STRIDE), sums);
        barrier(CLK_LOCAL_MEM_FENCE);
    }

    __local float *partials = (__local float *)scratch;
    UNROLL for (uint r = 0; r < TILE; ++r)
        UNROLL for (uint c = 0; c < TILE; ++c)
            partials[slice * PARTIALS + (y + r * ITEMS_Y) * COLUMNS + x + c * ITEMS_X] = sums[r][c];
    barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = slice * ITEMS + item; i < PARTIALS; i += LINEAR_SLICES * ITEMS) {
        float sum = 0.0f;
        for (uint other = 0; other < LINEAR_SLICES; ++other)
            sum += partials[other * PARTIALS + i];
        store(&p, row + i / COLUMNS, column + i % COLUMNS, sum);
    }
}
