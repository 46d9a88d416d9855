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

static inline void copy_block(__global const STORAGE(P) *p, uint block, uint i, piece *to) {
    JOIN(vstore, BLOCK)(LOADN(P, BLOCK, p + block * BLOCK), 0, to->p[block][i]);
}

/* `rows` elements of a row of P, then zeros up to a whole block. */
static inline void copy_p(__global const STORAGE(P) *p, uint rows, uint i, piece *to) {
    uint block = 0;
    if (rows == MAX_ROWS) {
        UNROLL for (; block < MAX_ROWS / BLOCK; ++block)
            copy_block(p, block, i, to);
        return;
    }
    for (; (block + 1) * BLOCK <= rows; ++block)
        copy_block(p, block, i, to);
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

/* sums [BLOCK][2] += the products of `depth` slots, or = those of the first ones. */
static inline void add_block(const float (*p)[BLOCK], const VEC (*q)[2], uint depth, bool first,
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
        sums[r][0] = first ? sum[r][0] : sums[r][0] + sum[r][0];
        sums[r][1] = first ? sum[r][1] : sums[r][1] + sum[r][1];
    }
}

/* A work-item's part of C. */
typedef struct part {
    __global STORAGE(C) *c;
    ulong c_row;
    uint rows, columns;
    bool accumulate, streams; /* streams: whole vectors go past the caches */
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

static inline void store_row(const part *to, uint row, uint panel, const VEC *sums) {
    __global STORAGE(C) *const c = to->c + row * to->c_row + panel * PANEL;
    const uint columns = columns_of(to, panel);
    for (uint column = 0; column < columns; column += WIDTH) {
        const uint count = min(columns - column, (uint)WIDTH);
        VEC sum = sums[column / WIDTH];
        if (to->accumulate)
            sum += count == WIDTH ? LOADN(C, WIDTH, c + column) : LOAD_PART(C, c + column, count);
        if (to->streams && count == WIDTH)
            STREAM(sum, (__global float *)(c + column));
        else
            store_vector(sum, count, c + column);
    }
}

/* As soon as its sums are done: memory is busy while the next block is summed. */
static inline void store_block(const part *to, uint row, uint panel, VEC (*sums)[2]) {
    const uint end = min(row + BLOCK, to->rows);
    for (; row < end; ++row, ++sums)
        store_row(to, row, panel, *sums);
}

/* Whether `c` and the rows after it are floats that may be streamed: aligned vectors. */
static inline bool streamable(__global const STORAGE(C) *c, ulong c_row) {
    return sizeof(*c) == sizeof(float) &&
           ((size_t)c % sizeof(VEC) | c_row * sizeof(*c) % sizeof(VEC)) == 0;
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

    __global STORAGE(C) *const first = g.c + expert * c_expert + row * c_row + column;
    const part to = {first, c_row, min(tile_rows(m), m - row), min((uint)COLUMNS, n - column),
                     accumulate != 0, !accumulate && streamable(first, c_row)};
    VEC sums[PANELS][MAX_ROWS][2];
    piece now;
    uint slot = slots_in_use.x;
    do { /* once without slots: zeros */
        const bool first_piece = slot == slots_in_use.x;
        now.depth = min((uint)DEPTH, slots_in_use.y - slot);
        for (uint i = 0; i < now.depth; ++i, ++slot) {
            copy_p(row_of_p(&g, slot) + row, to.rows, i, &now);
            copy_q(row_of_q(&g, slot) + column, to.columns, i, &now);
        }
        for (uint panel = 0; panel * PANEL < to.columns; ++panel)
            for (uint r = 0; r < to.rows; r += BLOCK) {
                if (first_piece && !to.streams)
                    fetch_block(&to, r, panel);
                add_block(now.p[r / BLOCK], now.q[panel], now.depth, first_piece, &sums[panel][r]);
                if (slot == slots_in_use.y)
                    store_block(&to, r, panel, &sums[panel][r]);
            }
    } while (slot < slots_in_use.y);
    if (to.streams)
        STREAM_END();
}
