/*
 * Purpose: linear dense GEMM of few rows or few columns, as a router's: the slices of a sum over k
 *          are made side by side, by a warp each, so that they fill a device.
 * Formula: as ref.cl, from parts of factors: nv_split.clh.
 * Arrays: as in gemm.clh; tile_expert and token_of are NULL, w_col is 1.
 * NDRange: (ceil(slots / 16), ceil(n / 16)) groups of LINEAR_SLICES warps.
 * Limits: compute capability 8.0.
 * Repeatability: the bits of nv_split.cl: the same products in the same order, added in the same
 *                order.
 */
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"
#define F A
#define S W
#include "experts/gemm/nv_split.clh"

#define SIDE   16 /* rows, and columns, of a group */
#define BLOCKS (SIDE / 8)
#define AHEAD  4 /* steps whose factors are loaded together */

/* A lane's eights of a step: of two rows, and of two columns. */
typedef struct factors {
    EIGHT(A) a[BLOCKS];
    EIGHT(W) w[BLOCKS];
} factors;

typedef struct reader {
    __global const STORAGE(A) *a[BLOCKS];
    __global const STORAGE(W) *w[BLOCKS];
    bool a_whole, w_whole;
} reader;

/* Rows and columns past the last one repeat it: what they give is not stored. */
static inline reader reader_of(const problem *p, uint row, uint column, uint k) {
    reader at;
    at.a_whole = are_whole((ulong)p->a, p->k, p->k);
    at.w_whole = are_whole((ulong)p->up, p->w_row, p->k);
    UNROLL for (uint i = 0; i < BLOCKS; ++i) {
        at.a[i] = row_of_a(p, min(row + i * 8, p->slots - 1)) + k;
        at.w[i] = weight_at(p, p->up, 0, min(column + i * 8, p->n - 1)) + k;
    }
    return at;
}

static inline void load(const reader *at, uint k, int left, factors *f) {
    UNROLL for (uint i = 0; i < BLOCKS; ++i) {
        f->a[i] = LOAD_EIGHT(A, at->a_whole, at->a[i] + k, 1, left);
        f->w[i] = LOAD_EIGHT(W, at->w_whole, at->w[i] + k, 1, left);
    }
}

/* sums += the products of a step. */
static inline void multiply(const factors *f, float (*sums)[4]) {
    uint4 a[BLOCKS][F_PARTS], w[BLOCKS][S_PARTS];
    UNROLL for (uint i = 0; i < BLOCKS; ++i) {
        TAKE_APART(A, f->a[i], a[i], F_PARTS);
        TAKE_APART(W, f->w[i], w[i], S_PARTS);
    }
    float step[BLOCKS][4];
    UNROLL for (int level = TOP_LEVEL; level >= 0; --level)
        UNROLL for (int p = 0; p < F_PARTS; ++p)
            UNROLL for (uint j = 0; j < BLOCKS; ++j)
                if (ARE_PARTS(level, p))
                    multiply_eights(IS_FIRST(level, p), step[j], a[0][p], a[1][p], w[j][level - p]);
    UNROLL for (uint j = 0; j < BLOCKS; ++j)
        UNROLL for (uint n = 0; n < 4; ++n)
            sums[j][n] += step[j][n];
}

KERNEL(WARP, LINEAR_SLICES, 1)
void gemm_nv_slices(GEMM_PARAMETERS) {
    __local float partials[LINEAR_SLICES][SIDE][SIDE];
    const problem p = GEMM_PROBLEM;
    const uint lane = (uint)get_local_id(0), slice = (uint)get_local_id(1);
    const uint row = GROUP_INDEX(0, WARP) * SIDE, column = GROUP_INDEX(1, LINEAR_SLICES) * SIDE;
    const uint length = linear_slice(k), begin = slice * length, end = min(begin + length, k);
    const int left = (int)end - (int)(lane % 4 * CHUNK); /* this lane's, from k 0 on */
    const reader at = reader_of(&p, row + lane / 4, column + lane / 4, lane % 4 * CHUNK);
    float sums[BLOCKS][4];
    UNROLL for (uint j = 0; j < BLOCKS; ++j)
        UNROLL for (uint n = 0; n < 4; ++n)
            sums[j][n] = 0.0f;
    _Pragma("unroll 1") for (uint step = begin; step < end; step += AHEAD * DEPTH) {
        factors f[AHEAD];
        UNROLL for (uint i = 0; i < AHEAD; ++i)
            load(&at, step + i * DEPTH, left - (int)(step + i * DEPTH), &f[i]);
        UNROLL for (uint i = 0; i < AHEAD; ++i)
            multiply(&f[i], sums);
    }

    UNROLL for (uint j = 0; j < BLOCKS; ++j)
        UNROLL for (uint n = 0; n < 4; ++n)
            partials[slice][lane / 4 + n / 2 * 8][j * 8 + lane % 4 * 2 + n % 2] = sums[j][n];
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint item = slice * WARP + lane, y = item / SIDE, x = item % SIDE;
    float sum = 0.0f;
    for (uint other = 0; other < LINEAR_SLICES; ++other)
        sum += partials[other][y][x];
    if (row + y < slots && column + x < n)
        gemm_store(&p, 0, row + y, column + x, 0.0f, sum);
}
