/*
 * Purpose        Grouped GEMM for CPUs: one work-item computes a tile of rows by COLUMNS columns
 *                with sums in vector registers. No local memory, no barriers, nothing packed.
 * Formula        as gemm_ref.cl. Two inner loops, by how W lies in memory:
 *                TRANSPOSED=0, W contiguous along k: dot products of vectors along k, their lanes
 *                added at the end; TRANSPOSED=1, W contiguous along n: one element of A times a
 *                vector of W.
 * Arrays         as in gemm.clh. TRANSPOSED=1 with w_row 2 (interleaved gate and up): read as 2n
 *                plain columns and taken apart at the end.
 * NDRange        (ceil(slots / row_tile), ceil(n / COLUMNS)), one work-item per group.
 * Limits         TRANSPOSED=0 needs w_col 1; TRANSPOSED=1 needs w_row 1 or 2.
 * Repeatability  the order of a sum depends on k alone: the same for every row, tile and neighbour.
 *
 * WIDTH floats per vector: 4, 8 or 16.
 */
#define VEC           JOIN(float, WIDTH)
#define VLOAD(p)      JOIN(vload, WIDTH)(0, p)
#define VSTORE(v, p)  JOIN(vstore, WIDTH)(v, 0, p)

#define ACT_T VEC
#include "act.clh"
#include "gemm.clh"

#define MATRICES (1 + GATED)
#define COLUMNS  32 /* of C per work-item: a multiple of WIDTH */
#define UNROLL   _Pragma("unroll")

/*
 * A block is what fits the registers: its sums, its elements of A and a vector of W. The compiler
 * keeps sums in registers only if the loops over them are unrolled where the array is declared.
 */
#if TRANSPOSED
#define ROWS    (WIDTH == 16 ? 8 : 4)
#define VECTORS 2 /* of columns */
#else
#define ROWS        4
#define DOT_COLUMNS (WIDTH == 16 ? 4 : 2)
#endif

/* Sums over k of one block of rows: gate's COLUMNS, then up's; or gate and up taking turns. */
typedef struct sums {
    float at[ROWS][MATRICES * COLUMNS];
} sums;

#if !TRANSPOSED

static inline float add_lanes(VEC v) {
#if WIDTH == 16
    const float8 v8 = v.lo + v.hi;
    const float4 v4 = v8.lo + v8.hi;
#elif WIDTH == 8
    const float4 v4 = v.lo + v.hi;
#else
    const float4 v4 = v;
#endif
    return dot(v4.lo + v4.hi, (float2)1.0f);
}

/* ROWS x DOT_COLUMNS dot products of rows of A with rows of W. */
static inline void dot_block(__global const STORAGE(A) *const *a, __global const STORAGE(W) *const *w, uint k,
                             sums *out, uint at) {
    VEC sum[ROWS][DOT_COLUMNS], x[ROWS];
    uint i = 0;
    UNROLL for (uint r = 0; r < ROWS; ++r)
        UNROLL for (uint c = 0; c < DOT_COLUMNS; ++c)
            sum[r][c] = 0.0f;
    for (; i + WIDTH <= k; i += WIDTH) {
        UNROLL for (uint r = 0; r < ROWS; ++r)
            x[r] = LOADN(A, WIDTH, a[r] + i);
        UNROLL for (uint c = 0; c < DOT_COLUMNS; ++c) {
            const VEC wc = LOADN(W, WIDTH, w[c] + i);
            UNROLL for (uint r = 0; r < ROWS; ++r)
                sum[r][c] = fma(x[r], wc, sum[r][c]);
        }
    }
    UNROLL for (uint r = 0; r < ROWS; ++r)
        UNROLL for (uint c = 0; c < DOT_COLUMNS; ++c) {
            float total = add_lanes(sum[r][c]);
            for (uint j = i; j < k; ++j)
                total = fma(LOAD(A, a[r] + j), LOAD(W, w[c] + j), total);
            out->at[r][at + c] = total;
        }
}

/* Sums of `columns` columns of W from `w` on. Columns past the last repeat it, never stored. */
static inline void sum_columns(const problem *p, __global const STORAGE(A) *const *a,
                               __global const STORAGE(W) *w, uint columns, sums *out, uint at) {
    for (uint column = 0; column < columns; column += DOT_COLUMNS) {
        __global const STORAGE(W) *wc[DOT_COLUMNS];
        UNROLL for (uint c = 0; c < DOT_COLUMNS; ++c)
            wc[c] = w + (ulong)min(column + c, columns - 1) * p->w_row;
        dot_block(a, wc, p->k, out, at + column);
    }
}

#else

/* Sums of VECTORS vectors of columns. */
static inline void axpy_block(const problem *p, __global const STORAGE(A) *const *a,
                              __global const STORAGE(W) *w, sums *out, uint at) {
    VEC sum[ROWS][VECTORS], wv[VECTORS];
    UNROLL for (uint r = 0; r < ROWS; ++r)
        UNROLL for (uint v = 0; v < VECTORS; ++v)
            sum[r][v] = 0.0f;
    for (uint i = 0; i < p->k; ++i, w += p->w_col) {
        UNROLL for (uint v = 0; v < VECTORS; ++v)
            wv[v] = LOADN(W, WIDTH, w + v * WIDTH);
        UNROLL for (uint r = 0; r < ROWS; ++r) {
            const VEC x = LOAD(A, a[r] + i);
            UNROLL for (uint v = 0; v < VECTORS; ++v)
                sum[r][v] = fma(x, wv[v], sum[r][v]);
        }
    }
    UNROLL for (uint r = 0; r < ROWS; ++r)
        UNROLL for (uint v = 0; v < VECTORS; ++v)
            VSTORE(sum[r][v], out->at[r] + at + v * WIDTH);
}

/* The first `count` <= WIDTH elements, then zeros: nothing behind them is read. */
static inline VEC load_w_part(__global const STORAGE(W) *p, uint count) {
    float part[WIDTH];
    if (count == WIDTH)
        return LOADN(W, WIDTH, p);
    for (uint i = 0; i < WIDTH; ++i)
        part[i] = i < count ? LOAD(W, p + i) : 0.0f;
    return VLOAD(part);
}

/* Sums of `count` <= WIDTH columns. */
static inline void axpy_part(const problem *p, __global const STORAGE(A) *const *a,
                             __global const STORAGE(W) *w, uint count, sums *out, uint at) {
    VEC sum[ROWS];
    UNROLL for (uint r = 0; r < ROWS; ++r)
        sum[r] = 0.0f;
    for (uint i = 0; i < p->k; ++i, w += p->w_col) {
        const VEC wv = load_w_part(w, count);
        UNROLL for (uint r = 0; r < ROWS; ++r)
            sum[r] = fma((VEC)LOAD(A, a[r] + i), wv, sum[r]);
    }
    UNROLL for (uint r = 0; r < ROWS; ++r)
        VSTORE(sum[r], out->at[r] + at);
}

/* Sums of `columns` columns of W from `w` on. */
static inline void sum_columns(const problem *p, __global const STORAGE(A) *const *a,
                               __global const STORAGE(W) *w, uint columns, sums *out, uint at) {
    uint column = 0;
    for (; column + VECTORS * WIDTH <= columns; column += VECTORS * WIDTH)
        axpy_block(p, a, w + column, out, at + column);
    for (; column < columns; column += WIDTH)
        axpy_part(p, a, w + column, min((uint)WIDTH, columns - column), out, at + column);
}

#endif

/* Gate and up lie together, taking turns, and are summed as one matrix. */
static inline bool taking_turns(const problem *p) {
    return GATED && TRANSPOSED && p->w_row == 2;
}

static inline void sum_block(const problem *p, const rows *tile, uint row, uint first,
                             uint columns, sums *out) {
    __global const STORAGE(A) *a[ROWS];
    UNROLL for (uint r = 0; r < ROWS; ++r)
        a[r] = row_of_a(p, min(row + r, tile->end - 1));
#if GATED
    __global const STORAGE(W) *gate = weight_at(p, p->gate, tile->expert, first);
    if (taking_turns(p)) {
        sum_columns(p, a, gate, 2 * columns, out, 0);
        return;
    }
    sum_columns(p, a, gate, columns, out, 0);
#endif
    sum_columns(p, a, weight_at(p, p->up, tile->expert, first), columns, out, GATED * COLUMNS);
}

/* A vector of gate's (0) or up's sums of a row, from `column` on. */
static inline VEC row_sums(const problem *p, const float *row, uint matrix, uint column) {
    if (!taking_turns(p))
        return VLOAD(row + matrix * COLUMNS + column);
    const VEC left = VLOAD(row + 2 * column);
    const VEC right = VLOAD(row + 2 * column + WIDTH);
    return matrix ? (VEC)(left.odd, right.odd) : (VEC)(left.even, right.even);
}

/* The end of a row: WIDTH columns at a time, the last ones through `part`. */
static inline void store_row(const problem *p, const float *row, const float *gate_bias,
                             const float *up_bias, float weight, uint columns,
                             __global STORAGE(C) *c) {
    for (uint column = 0; column < columns; column += WIDTH) {
        const VEC y = gemm_output(p, row_sums(p, row, 0, column), VLOAD(gate_bias + column),
                                  row_sums(p, row, GATED, column), VLOAD(up_bias + column), weight);
        if (column + WIDTH <= columns) {
            STOREN(C, WIDTH, y, c + column);
        } else {
            float part[WIDTH];
            VSTORE(y, part);
            for (uint i = 0; column + i < columns; ++i)
                STORE(C, part[i], c + column + i);
        }
    }
}

KERNEL(1, 1, 1)
void gemm_cpu(GEMM_PARAMETERS) {
    const problem p = GEMM_PROBLEM;
    const rows tile = rows_in_use(&p, (uint)get_group_id(0) * row_tile, row_tile);
    if (tile.first >= tile.end)
        return;
    const uint first = (uint)get_group_id(1) * COLUMNS;
    const uint columns = min((uint)COLUMNS, n - first);

    float gate_biases[COLUMNS], up_biases[COLUMNS];
    for (uint column = 0; column < COLUMNS; ++column) {
        const uint from = first + min(column, columns - 1);
        gate_biases[column] = bias_at(&p, p.gate_bias, tile.expert, from);
        up_biases[column] = bias_at(&p, p.up_bias, tile.expert, from);
    }
    sums s = {{{0.0f}}}; /* lanes past the last column stay 0 */
    for (uint row = tile.first; row < tile.end; row += ROWS) {
        sum_block(&p, &tile, row, first, columns, &s);
        for (uint r = 0; r < ROWS && row + r < tile.end; ++r)
            store_row(&p, s.at[r], gate_biases, up_biases, row_weight_of(&p, row + r), columns,
                      p.c + (ulong)(row + r) * n + first);
    }
}
