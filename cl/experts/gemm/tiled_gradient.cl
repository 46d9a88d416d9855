/*
 * Purpose: Gradients of weights for GPUs: a work-group computes ROWS rows by 2 * COLUMNS columns of
 *          an expert's gradient through local memory. All experts in one launch.
 * Formula: as ref_gradient.cl. SPLIT: one dense problem, whose slots are cut into slices of
 *          gradient_slice(slots); the partial sum of slice i is "expert" i of C, to be added by
 *          slices_add.cl.
 * Arrays: as in gradient.clh. SPLIT: no offsets.
 * NDRange: (ceil(n / (2 * COLUMNS)), ceil(m / ROWS), E, or slices) groups of (COLUMNS / 4) x
 *          (ROWS / 4) work-items; each owns 4 rows by 2 x 4 columns.
 * Limits: ROWS is a multiple of 16; COLUMNS and DEPTH, of slots per step, are powers of two, DEPTH
 *         at least ROWS / 16 and COLUMNS / 4; local memory 4 * DEPTH * (ROWS + 2 * COLUMNS) bytes.
 * Repeatability: one work-item sums over an expert's slots, or a slice, in ascending order.
 */
#include "experts/gemm/gradient.clh"
#include "experts/gemm/slices.clh"
#include "experts/gemm/tiled.clh"

#define ITEMS_X (COLUMNS / TILED_ITEM)
#define ITEMS_Y (ROWS / TILED_ITEM)
#define ITEMS   (ITEMS_X * ITEMS_Y)

/* Float4s of a slot in local memory. */
#define P_STRIDE (ROWS / TILED_ITEM)
#define Q_STRIDE (COLUMNS / TILED_ITEM)

/* Work-items side by side read neighbouring elements of a slot, and those of the slots so far apart
 * in each of several loads. */
#define P_STEP  (ITEMS / ROWS)
#define Q_STEP  (ITEMS / COLUMNS)
#define P_LOADS (DEPTH / P_STEP)
#define Q_LOADS (DEPTH / Q_STEP)

/* What a work-item carries to local memory per step. */
typedef struct carried {
    float p[P_LOADS], q0[Q_LOADS], q1[Q_LOADS];
} carried;

/* Elements behind the last slot, row or column are 0. */
static inline void load_p(const gradient *g, uint slot, uint end, uint row, float *values) {
    UNROLL for (uint i = 0; i < P_LOADS; ++i) {
        const uint from = slot + i * P_STEP;
        values[i] = from < end && row < g->m ? LOAD(P, row_of_p(g, from) + row) : 0.0f;
    }
}

static inline void load_q(const gradient *g, uint slot, uint end, uint column, float *values) {
    UNROLL for (uint i = 0; i < Q_LOADS; ++i) {
        const uint from = slot + i * Q_STEP;
        values[i] = from < end && column < g->n ? LOAD(Q, row_of_q(g, from) + column) : 0.0f;
    }
}

static inline void keep(__local float *tile, const carried *next, uint item) {
    __local float *const q0 = tile + ROWS * DEPTH, *const q1 = q0 + COLUMNS * DEPTH;
    UNROLL for (uint i = 0; i < P_LOADS; ++i)
        tile[item + i * ITEMS] = next->p[i];
    UNROLL for (uint i = 0; i < Q_LOADS; ++i) {
        q0[item + i * ITEMS] = next->q0[i];
        q1[item + i * ITEMS] = next->q1[i];
    }
}

/* Sums of 4 rows by 4 columns, one slot further. */
static inline void add_products(float4 *sum, float4 p, float4 q) {
    sum[0] = fma((float4)p.x, q, sum[0]);
    sum[1] = fma((float4)p.y, q, sum[1]);
    sum[2] = fma((float4)p.z, q, sum[2]);
    sum[3] = fma((float4)p.w, q, sum[3]);
}

/* Stores TILED_ITEM columns of one row of C. */
static inline void store(const gradient *g, uint matrix, uint row, uint column, float4 sums) {
    float each[TILED_ITEM];
    vstore4(sums, 0, each);
    for (uint i = 0; i < TILED_ITEM && column + i < g->n; ++i)
        gradient_store(g, matrix, row, column + i, each[i]);
}

KERNEL(ITEMS_X, ITEMS_Y, 1)
void gradient_tiled(GRADIENT_PARAMETERS) {
    __local float4 tile[DEPTH * (P_STRIDE + 2 * Q_STRIDE)];
    const gradient g = GRADIENT_PROBLEM;
    const uint x = (uint)get_local_id(0), y = (uint)get_local_id(1), item = y * ITEMS_X + x;
    const uint matrix = (uint)get_global_id(2);
    const uint first_row = (uint)get_global_id(1) / ITEMS_Y * ROWS;
    const uint first_column = (uint)get_global_id(0) / ITEMS_X * (2 * COLUMNS);
#if SPLIT
    const uint begin = matrix * gradient_slice(slots);
    const uint end = min(begin + gradient_slice(slots), slots);
#else
    const uint2 slots_in_use = slots_of(&g, matrix);
    const uint begin = slots_in_use.x, end = slots_in_use.y;
#endif
    const uint p_slot = item / ROWS, p_row_here = first_row + item % ROWS;
    const uint q_slot = item / COLUMNS, q0_column = first_column + item % COLUMNS;

    __local const float4 *const p_tile = tile;
    __local const float4 *const q0_tile = tile + DEPTH * P_STRIDE;
    __local const float4 *const q1_tile = q0_tile + DEPTH * Q_STRIDE;
    carried next;
    float4 sum0[TILED_ITEM], sum1[TILED_ITEM];
    UNROLL for (uint i = 0; i < TILED_ITEM; ++i)
        sum0[i] = sum1[i] = 0.0f;
    load_p(&g, begin + p_slot, end, p_row_here, next.p);
    load_q(&g, begin + q_slot, end, q0_column, next.q0);
    load_q(&g, begin + q_slot, end, q0_column + COLUMNS, next.q1);
    for (uint step = begin; step < end; step += DEPTH) {
        keep((__local float *)tile, &next, item);
        barrier(CLK_LOCAL_MEM_FENCE);
        load_p(&g, step + DEPTH + p_slot, end, p_row_here, next.p);
        load_q(&g, step + DEPTH + q_slot, end, q0_column, next.q0);
        load_q(&g, step + DEPTH + q_slot, end, q0_column + COLUMNS, next.q1);
        UNROLL_8 for (uint depth = 0; depth < DEPTH; ++depth) {
            const float4 p_now = p_tile[depth * P_STRIDE + y];
            add_products(sum0, p_now, q0_tile[depth * Q_STRIDE + x]);
            add_products(sum1, p_now, q1_tile[depth * Q_STRIDE + x]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }

    UNROLL for (uint i = 0; i < TILED_ITEM; ++i) {
        const uint row = first_row + y * TILED_ITEM + i;
        const uint column = first_column + x * TILED_ITEM;
        if (row >= m)
            continue;
        store(&g, matrix, row, column, sum0[i]);
        store(&g, matrix, row, column + COLUMNS, sum1[i]);
    }
}
