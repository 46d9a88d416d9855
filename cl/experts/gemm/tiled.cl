/*
 * Purpose: Grouped GEMM for GPUs: a work-group computes ROWS rows by COLUMNS columns of two
 *          matrices of W through local memory. All experts in one launch.
 * Formula: as ref.cl. Gated: the two matrices are gate and up of the same columns. Else:
 *          COLUMNS neighbouring columns each of the one matrix. LINEAR: slices as tiled_linear.cl.
 * Arrays: as in gemm.clh.
 * NDRange: (ceil(slots / ROWS), ceil(n / (GATED ? COLUMNS : 2 * COLUMNS))) groups of
 *          (COLUMNS / 4) x (ROWS / 4) work-items; each owns 4 rows by 2 x 4 columns.
 * Limits: row_tile is a multiple of ROWS, ROWS of 16; COLUMNS and DEPTH, of k per step, are powers
 *         of two, DEPTH at least ROWS / 16 and COLUMNS / 16, at most LINEAR_UNIT if LINEAR; local
 *         memory 4 * DEPTH * (ROWS + 2 * COLUMNS + 12) bytes, 8 * ROWS * COLUMNS more if LINEAR.
 * Repeatability: every sum runs over k in ascending order in one work-item, by slices if LINEAR.
 */
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"
#include "experts/gemm/tiled.clh"

#define ITEMS_X (COLUMNS / TILED_ITEM)
#define ITEMS_Y (ROWS / TILED_ITEM)
#define ITEMS   (ITEMS_X * ITEMS_Y)

/* One float4 of padding per row of k, against bank conflicts when tiles are stored. */
#define A_STRIDE (ROWS / TILED_ITEM + 1)
#define W_STRIDE (COLUMNS / TILED_ITEM + 1)

/* With slices the loop around it is longer, and all steps at once are 3 % faster on an H200. */
#if LINEAR
#define UNROLL_DEPTH UNROLL
#else
#define UNROLL_DEPTH UNROLL_8
#endif

/* Elements that a work-item carries to local memory per step, per matrix. */
#define A_LOADS (ROWS * DEPTH / ITEMS)
#define W_LOADS (COLUMNS * DEPTH / ITEMS)

/* The part of a matrix of W a work-group reads, and which elements of it a work-item carries. */
typedef struct w_part {
    __global const STORAGE(W) *at; /* element (column, depth) of the first step */
    uint first;             /* column of C of the group's first one */
    uint column, column_step, depth, depth_step;
    ulong step; /* between two elements in memory */
} w_part;

/* Neighbouring work-items read neighbouring addresses: along k, or along n for transposed W. */
static inline w_part w_part_of(const problem *p, __global const STORAGE(W) *w, int expert,
                               uint first, uint item) {
    w_part part;
    const bool along_k = p->w_col == 1;
    part.first = first;
    part.column = along_k ? item / DEPTH : item % COLUMNS;
    part.column_step = along_k ? ITEMS / DEPTH : 0;
    part.depth = along_k ? item % DEPTH : item / COLUMNS;
    part.depth_step = along_k ? 0 : ITEMS / COLUMNS;
    part.step = part.column_step * p->w_row + part.depth_step * p->w_col;
    part.at = weight_at(p, w, expert, first + part.column) + part.depth * p->w_col;
    return part;
}

static inline void load_w(const problem *p, const w_part *part, uint k, float *values) {
    UNROLL for (uint i = 0; i < W_LOADS; ++i) {
        const uint column = part->first + part->column + i * part->column_step;
        const uint depth = k + part->depth + i * part->depth_step;
        values[i] = column < p->n && depth < p->k
                        ? LOAD(W, part->at + k * p->w_col + i * part->step)
                        : 0.0f;
    }
}

static inline void keep_w(__local float *tile, const w_part *part, const float *values) {
    UNROLL for (uint i = 0; i < W_LOADS; ++i)
        tile[(part->depth + i * part->depth_step) * W_STRIDE * TILED_ITEM + part->column +
             i * part->column_step] = values[i];
}

/* Rows of A: a work-item carries one element each of A_LOADS rows; NULL behind the last row. */
static inline void find_a(const problem *p, const rows *r, uint item,
                          __global const STORAGE(A) **a_rows) {
    UNROLL for (uint i = 0; i < A_LOADS; ++i) {
        const uint slot = r->first + item / DEPTH + i * (ITEMS / DEPTH);
        a_rows[i] = slot < r->end ? row_of_a(p, slot) + item % DEPTH : 0;
    }
}

static inline void load_a(const problem *p, __global const STORAGE(A) *const *a_rows, uint item,
                          uint k, float *values) {
    UNROLL for (uint i = 0; i < A_LOADS; ++i)
        values[i] = a_rows[i] && k + item % DEPTH < p->k ? LOAD(A, a_rows[i] + k) : 0.0f;
}

static inline void keep_a(__local float *tile, uint item, const float *values) {
    UNROLL for (uint i = 0; i < A_LOADS; ++i)
        tile[(item % DEPTH) * A_STRIDE * TILED_ITEM + item / DEPTH + i * (ITEMS / DEPTH)] =
            values[i];
}

/* Sums of 4 rows by 4 columns, one k further. */
static inline void add_products(float4 *sum, float4 a, float4 w) {
    sum[0] = fma((float4)a.x, w, sum[0]);
    sum[1] = fma((float4)a.y, w, sum[1]);
    sum[2] = fma((float4)a.z, w, sum[2]);
    sum[3] = fma((float4)a.w, w, sum[3]);
}

static inline void clear(float4 *sum) {
    UNROLL for (uint i = 0; i < TILED_ITEM; ++i)
        sum[i] = 0.0f;
}

#if LINEAR
/* A work-item's sums of the slices before, in local memory: registers are for the current one. */
static inline void clear_totals(__local float4 *totals) {
    for (uint i = 0; i < 2 * TILED_ITEM; ++i)
        totals[i * ITEMS] = 0.0f;
}

static inline void add_slice(__local float4 *total, float4 *sum) {
    UNROLL for (uint i = 0; i < TILED_ITEM; ++i)
        total[i * ITEMS] += sum[i];
    clear(sum);
}

static inline void read_total(__local const float4 *total, float4 *sum) {
    UNROLL for (uint i = 0; i < TILED_ITEM; ++i)
        sum[i] = total[i * ITEMS];
}
#endif

/* Stores TILED_ITEM columns of C of one row, from `column` on. */
static inline void store(const problem *p, int expert, uint slot, uint column, float4 gate_sums,
                         float4 up_sums) {
    float gate[TILED_ITEM], up[TILED_ITEM];
    vstore4(gate_sums, 0, gate);
    vstore4(up_sums, 0, up);
    for (uint i = 0; i < TILED_ITEM && column + i < p->n; ++i)
        gemm_store(p, expert, slot, column + i, gate[i], up[i]);
}

KERNEL(ITEMS_X, ITEMS_Y, 1)
void gemm_tiled(GEMM_PARAMETERS) {
    __local float4 a_tile[DEPTH * A_STRIDE];
    __local float4 w_tile[2][DEPTH * W_STRIDE];
#if LINEAR
    __local float4 totals[2 * TILED_ITEM * ITEMS];
#endif
    const problem p = GEMM_PROBLEM;
    const rows r = rows_in_use(&p, GROUP_INDEX(0, ITEMS_X) * ROWS, ROWS);
    /* A tile without rows begins where k ends: it passes by the barriers and stores nothing. */
    const uint begin = r.first < r.end ? 0 : k;
    const uint x = (uint)get_local_id(0), y = (uint)get_local_id(1), item = y * ITEMS_X + x;
    const uint first = GROUP_INDEX(1, ITEMS_Y) * (GATED ? COLUMNS : 2 * COLUMNS);
    const uint second = GATED ? first : first + COLUMNS;
    const w_part part0 = w_part_of(&p, GATED ? p.gate : p.up, r.expert, first, item);
    const w_part part1 = w_part_of(&p, p.up, r.expert, second, item);
    __global const STORAGE(A) *a_rows[A_LOADS];
    find_a(&p, &r, item, a_rows);

    float4 sum0[TILED_ITEM], sum1[TILED_ITEM];
    clear(sum0);
    clear(sum1);
#if LINEAR
    __local float4 *const total0 = totals + item, *const total1 = total0 + TILED_ITEM * ITEMS;
    const uint slice = linear_slice(k);
    clear_totals(total0);
#endif
    float next_a[A_LOADS], next_w0[W_LOADS], next_w1[W_LOADS];
    load_a(&p, a_rows, item, begin, next_a);
    load_w(&p, &part0, begin, next_w0);
    load_w(&p, &part1, begin, next_w1);
    for (uint step = begin; step < k; step += DEPTH) {
        keep_a((__local float *)a_tile, item, next_a);
        keep_w((__local float *)w_tile[0], &part0, next_w0);
        keep_w((__local float *)w_tile[1], &part1, next_w1);
        barrier(CLK_LOCAL_MEM_FENCE);
        if (step + DEPTH < k) {
            load_a(&p, a_rows, item, step + DEPTH, next_a);
            load_w(&p, &part0, step + DEPTH, next_w0);
            load_w(&p, &part1, step + DEPTH, next_w1);
        }
        UNROLL_DEPTH for (uint depth = 0; depth < DEPTH; ++depth) {
            const float4 av = a_tile[depth * A_STRIDE + y];
            add_products(sum0, av, w_tile[0][depth * W_STRIDE + x]);
            add_products(sum1, av, w_tile[1][depth * W_STRIDE + x]);
        }
        barrier(CLK_LOCAL_MEM_FENCE);
#if LINEAR
        if ((step + DEPTH) % slice == 0 || step + DEPTH >= k) {
            add_slice(total0, sum0);
            add_slice(total1, sum1);
        }
#endif
    }

#if LINEAR
    read_total(total0, sum0);
    read_total(total1, sum1);
#endif
    UNROLL for (uint i = 0; i < TILED_ITEM; ++i) {
        const uint slot = r.first + y * TILED_ITEM + i;
        if (slot >= r.end)
            continue;
#if GATED
        store(&p, r.expert, slot, first + x * TILED_ITEM, sum0[i], sum1[i]);
#else
        store(&p, r.expert, slot, first + x * TILED_ITEM, 0.0f, sum0[i]);
        store(&p, r.expert, slot, second + x * TILED_ITEM, 0.0f, sum1[i]);
#endif
    }
}
