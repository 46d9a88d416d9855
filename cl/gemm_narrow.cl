/*
 * Purpose        Dense linear GEMM where gemm_tiled.cl has too few tiles to fill a device: one output
 *                per work-item, long steps along k. A router of few columns, or of few tokens.
 * Formula        as gemm_ref.cl.
 * Arrays         as in gemm.clh; tile_expert and token_of are NULL, w_col is 1.
 * NDRange        (ceil(slots / ROWS), ceil(n / COLUMNS)) groups.
 * Limits         4 * (ROWS + COLUMNS) * STRIDE bytes of local memory.
 * Repeatability  every sum runs over k in ascending order in one work-item, as in gemm_tiled.cl: the
 *                same bits.
 */
#include "act.clh"
#include "gemm.clh"

#define ROWS    16
#define COLUMNS 8
#define ITEMS   (ROWS * COLUMNS)
#define DEPTH   ITEMS       /* of k per step: every work-item carries one of each row */
#define STRIDE  (DEPTH + 4) /* floats; the padding is against bank conflicts */

#define UNROLL _Pragma("unroll")

/* What a work-item carries: its k of all rows of A and W; past the last row that one again. */
typedef struct carried {
    float a[ROWS], w[COLUMNS];
} carried;

static inline void load(const problem *p, uint row, uint column, uint k, carried *next) {
    const bool in = k < p->k;
    UNROLL for (uint i = 0; i < ROWS; ++i)
        next->a[i] = in ? LOAD(A, p->a + (ulong)min(row + i, p->slots - 1) * p->k + k) : 0.0f;
    UNROLL for (uint i = 0; i < COLUMNS; ++i)
        next->w[i] = in ? LOAD(W, weight_at(p, p->up, 0, min(column + i, p->n - 1)) + k) : 0.0f;
}

static inline void keep(__local float *a_tile, __local float *w_tile, uint item,
                        const carried *next) {
    UNROLL for (uint i = 0; i < ROWS; ++i)
        a_tile[i * STRIDE + item] = next->a[i];
    UNROLL for (uint i = 0; i < COLUMNS; ++i)
        w_tile[i * STRIDE + item] = next->w[i];
}

static inline float add_products(__local const float4 *a, __local const float4 *w, float sum) {
    UNROLL for (uint i = 0; i < DEPTH / 4; ++i) {
        const float4 x = a[i], y = w[i];
        sum = fma(x.s0, y.s0, sum);
        sum = fma(x.s1, y.s1, sum);
        sum = fma(x.s2, y.s2, sum);
        sum = fma(x.s3, y.s3, sum);
    }
    return sum;
}

KERNEL(ITEMS, 1, 1)
void gemm_narrow(GEMM_PARAMETERS) {
    __local float4 a_tile[ROWS * STRIDE / 4], w_tile[COLUMNS * STRIDE / 4];
    const problem p = GEMM_PROBLEM;
    const uint item = (uint)get_local_id(0);
    const uint first_row = (uint)get_group_id(0) * ROWS, row = item / COLUMNS;
    const uint first_column = (uint)get_group_id(1) * COLUMNS, column = item % COLUMNS;
    carried next;
    float sum = 0.0f;
    load(&p, first_row, first_column, item, &next);
    for (uint step = 0; step < k; step += DEPTH) {
        keep((__local float *)a_tile, (__local float *)w_tile, item, &next);
        barrier(CLK_LOCAL_MEM_FENCE);
        if (step + DEPTH < k)
            load(&p, first_row, first_column, step + DEPTH + item, &next);
        sum = add_products(a_tile + row * STRIDE / 4, w_tile + column * STRIDE / 4, sum);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    const uint slot = first_row + row, n_of = first_column + column;
    if (slot < slots && n_of < n)
        STORE(C,
              gemm_output(&p, 0.0f, 0.0f, sum, bias_at(&p, p.up_bias, 0, n_of),
                          row_weight_of(&p, slot)),
              p.c + (ulong)slot * n + n_of);
}
