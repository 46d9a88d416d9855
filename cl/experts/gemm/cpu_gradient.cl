/*
 * Purpose: Gradients of weights for CPUs: one work-item computes COLUMNS columns of some rows of an
 *          expert's gradient, with sums in vector registers. No local memory, no barriers.
 * Formula: as ref_gradient.cl.
 * Arrays: as in gradient.clh.
 * NDRange: (ceil(n / COLUMNS), ceil(m / MAX_ROWS), E), one work-item per group: neighbours share
 *          columns of P.
 * Limits: MAX_ROWS is a multiple of 8.
 * Repeatability: an expert's slots are cut into pieces of DEPTH, each summed in ascending order and
 *          then added in order: the order depends on the number of slots alone.
 *
 * WIDTH floats per vector: 4, 8 or 16. COLUMNS are PANELS panels of two vectors.
 */
#include "experts/gemm/cpu_vectors.clh"
#include "experts/gemm/gradient.clh"

#define PANEL   (2 * WIDTH)
#define COLUMNS (PANELS * PANEL)

/* Rows of C whose sums of one panel fit the registers. */
#if WIDTH == 16
#define BLOCK 8
#else
#define BLOCK 4
#endif

/*
 * The elements of up to DEPTH slots that a work-item needs, by block and by panel: their rows in P
 * and Q lie far apart, and every block meets every panel. A cache line between blocks keeps the
 * elements of a slot from falling into one set of the cache.
 */
typedef struct piece {
    uint depth;
    float p[MAX_ROWS / BLOCK][DEPTH + 16 / BLOCK][BLOCK];
    VEC q[PANELS][DEPTH][2];
} piece;

/* `rows` elements of a row of P, then zeros up to a whole block. */
static inline void copy_p(__global const STORAGE(P) *p, uint rows, uint i, piece *to) {
    uint block = 0;
    for (; (block + 1) * BLOCK <= rows; ++block)
        JOIN(vstore, BLOCK)(LOADN(P, BLOCK, p + block * BLOCK), 0, to->p[block][i]);
    if (block * BLOCK < rows)
        for (uint r = 0; r < BLOCK; ++r)
            to->p[block][i][r] =
                block * BLOCK + r < rows ? LOAD(P, p + block * BLOCK + r) : 0.0f;
}

/* `columns` elements of a row of Q, then zeros. */
static inline void copy_q(__global const STORAGE(Q) *q, uint columns, uint i, piece *to) {
    UNROLL for (uint v = 0; v < 2 * PANELS; ++v) {
        const uint first = v * WIDTH;
        to->q[v / 2][i][v % 2] =
            columns >= first + WIDTH ? LOADN(Q, WIDTH, q + first)
                                     : LOAD_PART(Q, q + first, columns - min(first, columns));
    }
}

/* sums [BLOCK][2] += the products of `depth` slots. */
static inline void add_block(const float (*p)[BLOCK], const VEC (*q)[2], uint depth,
                             VEC (*sums)[2]) {
    VEC sum[BLOCK][2];
    UNROLL for (uint r = 0; r < BLOCK; ++r)
        sum[r][0] = sum[r][1] = 0.0f;
    for (uint i = 0; i < depth; ++i) {
        const VEC q0 = q[i][0], q1 = q[i][1];
        UNROLL for (uint r = 0; r < BLOCK; ++r) {
            const VEC x = p[i][r];
            sum[r][0] = fma(x, q0, sum[r][0]);
            sum[r][1] = fma(x, q1, sum[r][1]);
        }
    }
    UNROLL for (uint r = 0; r < BLOCK; ++r) {
        sums[r][0] += sum[r][0];
        sums[r][1] += sum[r][1];
    }
}

/* A work-item's part of C. */
typedef struct part {
    __global STORAGE(C) *c;
    ulong c_row;
    uint rows, columns;
} part;

static inline uint columns_of(const part *to, uint panel) {
    return min(to->columns - min(panel * PANEL, to->columns), (uint)PANEL);
}

/* Where a block will be stored. */
static inline void fetch_block(const part *to, uint row, uint panel) {
    const uint end = min(row + BLOCK, to->rows);
    for (; row < end; ++row)
        for (uint column = 0; column < columns_of(to, panel); column += 64 / sizeof(STORAGE(C)))
            FETCH_OUTPUT(to->c + row * to->c_row + panel * PANEL + column);
}

static inline void store_row(VEC *sums, uint columns, uint accumulate, __global STORAGE(C) *c) {
    for (uint column = 0; column < columns; column += WIDTH) {
        const uint count = min(columns - column, (uint)WIDTH);
        VEC sum = sums[column / WIDTH];
        if (accumulate)
            sum += count == WIDTH ? LOADN(C, WIDTH, c + column) : LOAD_PART(C, c + column, count);
        store_vector(sum, count, c + column);
    }
}

/* Rows of C per work-item: about as many for each, in whole blocks. */
static inline uint tile_rows(uint m) {
    return divide_up(m, divide_up(m, MAX_ROWS) * BLOCK) * BLOCK;
}

KERNEL(1, 1, 1)
void gradient_cpu(GRADIENT_PARAMETERS) {
    const gradient g = GRADIENT_PROBLEM;
    const uint expert = (uint)get_global_id(2);
    const uint2 slots_in_use = slots_of(&g, expert);
    const uint column = (uint)get_global_id(0) * COLUMNS;
    const uint row = (uint)get_global_id(1) * tile_rows(m);
    if (row >= m || (accumulate && slots_in_use.x == slots_in_use.y))
        return;

    const part to = {g.c + expert * c_expert + row * c_row + column, c_row,
                     min(tile_rows(m), m - row), min((uint)COLUMNS, n - column)};
    VEC sums[PANELS][MAX_ROWS][2];
    piece now;
    for (uint panel = 0; panel < PANELS; ++panel)
        for (uint r = 0; r < MAX_ROWS; ++r)
            sums[panel][r][0] = sums[panel][r][1] = 0.0f;
    for (uint slot = slots_in_use.x; slot < slots_in_use.y; slot += DEPTH) {
        now.depth = min((uint)DEPTH, slots_in_use.y - slot);
        for (uint i = 0; i < now.depth; ++i) {
            copy_p(row_of_p(&g, slot + i) + row, to.rows, i, &now);
            copy_q(row_of_q(&g, slot + i) + column, to.columns, i, &now);
        }
        for (uint panel = 0; panel * PANEL < to.columns; ++panel)
            for (uint r = 0; r < to.rows; r += BLOCK) {
                if (slot == slots_in_use.x)
                    fetch_block(&to, r, panel);
                add_block(now.p[r / BLOCK], now.q[panel], now.depth, &sums[panel][r]);
            }
    }
    for (uint panel = 0; panel * PANEL < to.columns; ++panel)
        for (uint r = 0; r < to.rows; ++r)
            store_row(sums[panel][r], columns_of(&to, panel), accumulate,
                      to.c + r * c_row + panel * PANEL);
}
