/*
 * Purpose: Gradients of weights on Hopper: columns of P are the factor in registers, columns of Q
 *          the one in local memory, k an expert's slots. All experts in one launch.
 * Formula: as ref_gradient.cl. A tile is 256 by 128 of an expert's C.
 * Arrays: p: P in fragments, with `blocks` blocks of 32 slots a group of 256 columns, and q: Q in
 *         tiles, both of nv_wgmma_factor.cl; buckets: of nv_wgmma_list.cl, in tiles of 128 slots ->
 *         C_e[m,n] at element e * c_expert + m * c_row + n.
 * NDRange: groups of 384; they share tiles [begin, begin + most) of the experts that have slots.
 * Limits: compute capability 9.0; 48 KiB of local memory. P is f16 or bf16, C of it or f32;
 *         OUTPUTS: elements of C in 16 bytes. Experts without slots: nv_wgmma_empty.cl.
 * Repeatability: every sum runs over the expert's slots in steps of 16 from its first one on.
 */
#include "experts/gemm/nv_wgmma_own.clh"
#define TYPE           P
#define GRADIENT       1
#define TRANSPOSED     1 /* of a factor in local memory, k runs down */
#define COLUMNS        GRADIENT_COLUMNS
#define PARTS          (GRADIENT_SLOTS / WGMMA_BLOCK) /* blocks of a tile of slots */
#define FAR            (GRADIENT_ROWS * BLOCK)        /* of 128 columns of P, 2 bytes each */
#define K_BYTES        (GRADIENT_ROWS * BLOCK * 2)
#define K_BLOCKS       blocks_of_tile
#define TASK_BLOCKS(t) ((t).count * PARTS)
#define FRAGMENTS_OF(w, t, f)                                                                      \
    (((ulong)((f) / (w)->down) * (w)->blocks + (ulong)((t).first * PARTS)) * (K_BYTES / 2))
#define NEXT_FRAGMENTS (p + (p_off + next->start + lane_columns(fresh_item())))
#if LONG > 1
#define ALL_ROUNDS(B) ROUNDS(B, LONG) ROUNDS(B, 1)
#else
#define ALL_ROUNDS(B) ROUNDS(B, 1)
#endif
#include "experts/gemm/nv_wgmma.clh"
#include "experts/gemm/nv_wgmma_store.clh"

/* A lane's part of a block of fragments; a warp has 16 columns of each 128. */
static inline ulong lane_columns(int item) {
    return (ulong)(item >> 5) * 2 * FRAGMENT_ELEMENTS + (item & 31) * 8;
}

/* Slots of Q, by one work-item. */
INLINE void copy_columns(const work *w, elements q) {
    ring r = {0, 0};
    NOUNROLL for (uint i = 0; w->tasks[i % TASKS].count > 0; ++i) {
        const task t = w->tasks[i % TASKS];
        elements from =
            q + ((ulong)(t.first * PARTS) * w->down + t.f % w->down) * (SLOT_BYTES / 2);
        NOUNROLL for (int b = 0; b < t.count * PARTS; ++b) {
            const uint bar = w->full + 8 * r.slot;
            bar_wait(w->empty + 8 * r.slot, r.phase ^ 1);
            bar_expect(bar, SLOT_BYTES);
            copy_bulk(w->slots + r.slot * SLOT_BYTES, from, SLOT_BYTES, bar);
            from += (ulong)w->down * (SLOT_BYTES / 2);
            ring_next(&r);
        }
    }
}

/* ---- Storing ------------------------------------------------------------------------------ */

/*
 * Where a lane's sums go: its first row and column, and C there. inside: all of the tile is C's, at
 * multiples of 16 bytes, and nothing is added; then there is not a branch between the stores.
 */
typedef struct target {
    __global STORAGE(C) *c;
    ulong c_row;
    int rows, columns; /* left from there on */
    bool accumulate, inside;
} target;

/* C's elements of a quad are added: of rows g and g + 8 two columns each. */
INLINE void add_quad(const target *t, int column, float *v, bool inside) {
    if (!inside && t->accumulate)
        UNROLL for (int i = 0; i < 4; ++i)
            if (i / 2 * 8 < t->rows && column + i % 2 < t->columns)
                v[i] += LOAD(C, t->c + i / 2 * 8 * t->c_row + column + i % 2);
}

#if OUTPUTS == 4
/* Of a row of two quads, two columns each, `low` and `high` -> four columns of one of them: of the
 * first in even lanes, of the second in odd ones, lanes 0 and 1 the left half. */
INLINE float4 own_four(float2 low, float2 high, int q) {
    const bool odd = (q & 1) != 0;
    uint x = as_uint(odd ? low.x : high.x), y = as_uint(odd ? low.y : high.y);
    EXCHANGE(x, 1);
    EXCHANGE(y, 1);
    const float2 other = (float2)(as_float(x), as_float(y));
    return odd ? (float4)(other, high) : (float4)(low, other);
}

/* Four columns of row g + `row`. */
INLINE void store_columns(const target *t, int row, int column, float4 v, bool inside) {
    __global float *c = t->c + row * t->c_row + column;
    if (inside) {
        *(__global float4 *)c = v;
    } else if (row < t->rows) {
        const float each[4] = {v.s0, v.s1, v.s2, v.s3};
        UNROLL for (int i = 0; i < 4; ++i)
            if (column + i < t->columns)
                c[i] = each[i];
    }
}

/* Two quads: a lane stores 4 columns of both rows. */
#define STORE_16(b, j, k, inside)                                                                  \
    {                                                                                              \
        float v[4], w[4];                                                                          \
        SUMS(v, b, j);                                                                             \
        add_quad(&t, 8 * (j), v, inside);                                                          \
        SUMS(w, b, k);                                                                             \
        add_quad(&t, 8 * (k), w, inside);                                                          \
        const int column = 8 * (j) + (q & 1) * 8 + (q >> 1) * 4 - 2 * q;                           \
        store_columns(&t, 0, column, own_four((float2)(v[0], v[1]), (float2)(w[0], w[1]), q),      \
                      inside);                                                                     \
        store_columns(&t, 8, column, own_four((float2)(v[2], v[3]), (float2)(w[2], w[3]), q),      \
                      inside);                                                                     \
    }
#define STORE_32(b, j0, j1, j2, j3, inside)                                                        \
    STORE_16(b, j0, j1, inside) STORE_16(b, j2, j3, inside)
#else
/* Eight columns of row g + `row`. */
INLINE void store_columns(const target *t, int row, int column, uint4 v, bool inside) {
    __global ushort *c = t->c + row * t->c_row + column;
    if (inside)
        *(__global uint4 *)c = v;
    else if (row < t->rows)
        store_eight(c, v, t->columns - column, false);
}

#define WORDS_OF(b, i, j, inside)                                                                  \
    {                                                                                              \
        float v[4];                                                                                \
        SUMS(v, b, j);                                                                             \
        add_quad(&t, 8 * (j), v, inside);                                                          \
        low[i] = pack(v[0], v[1]);                                                                 \
        high[i] = pack(v[2], v[3]);                                                                \
    }
/* Four quads: a lane stores 8 columns of both rows. */
#define STORE_32(b, j0, j1, j2, j3, inside)                                                        \
    {                                                                                              \
        uint low[4], high[4];                                                                      \
        const int column = 8 * (j0) + 6 * q;                                                       \
        WORDS_OF(b, 0, j0, inside)                                                                 \
        WORDS_OF(b, 1, j1, inside)                                                                 \
        WORDS_OF(b, 2, j2, inside)                                                                 \
        WORDS_OF(b, 3, j3, inside)                                                                 \
        store_columns(&t, 0, column, own_quad(low, q), inside);                                    \
        store_columns(&t, 8, column, own_quad(high, q), inside);                                   \
    }
#endif
#define STORE_SUMS(b, inside)                                                                      \
    STORE_32(b, 0, 1, 2, 3, inside)                                                                \
    STORE_32(b, 4, 5, 6, 7, inside)                                                                \
    STORE_32(b, 8, 9, 10, 11, inside)                                                              \
    STORE_32(b, 12, 13, 14, 15, inside)

/* A block of sums, 128 rows of both warpgroups; a lane's columns begin at 2 * q. */
#define STORE_BLOCK(b)                                                                             \
    {                                                                                              \
        const int item_now = fresh_item(), q = item_now & 3;                                       \
        const uint top = (uint)(me->f / down) * GRADIENT_ROWS + 128 * (b);                         \
        const uint left = (uint)(me->f % down) * COLUMNS;                                          \
        const uint row = top + (item_now >> 5) * 16 + ((item_now & 31) >> 2);                      \
        __global STORAGE(C) *const corner =                                                        \
            c + (c_off + fresh_zero()) + (ulong)me->expert * c_expert + left;                      \
        target t;                                                                                  \
        t.c = corner + row * c_row + 2 * q;                                                        \
        t.c_row = c_row;                                                                           \
        t.rows = (int)m - (int)row;                                                                \
        t.columns = (int)n - (int)(left + 2 * q);                                                  \
        t.accumulate = accumulate;                                                                 \
        t.inside = ((uint)(ulong)corner % 16 | (uint)c_row % OUTPUTS | accumulate) == 0 &&         \
                   top + 128 <= m && left + COLUMNS <= n;                                          \
        if (t.inside) {                                                                            \
            STORE_SUMS(b, true)                                                                    \
        } else {                                                                                   \
            STORE_SUMS(b, false)                                                                   \
        }                                                                                          \
    }

KERNEL(ITEMS, 1, 1)
void gradient_nv_wgmma(IN(int, buckets), IN(ushort, p), IN(ushort, q), uint blocks, uint m, uint n,
                       OUT(STORAGE(C), c), ulong c_expert, ulong c_row, uint accumulate, uint begin,
                       uint most) {
    LOCAL_MEMORY
    DECLARE;
    const int item = (int)get_local_id(0), lane = item & 31;
    const int down = (int)divide_up(n, COLUMNS), across = (int)divide_up(m, GRADIENT_ROWS);
    const work w = WORK(AT(buckets), NULL, across * down, across, down, blocks);
    begin_work(&w, item, 1);
    barrier(CLK_LOCAL_MEM_FENCE);
    if (item >= MULTIPLIERS) {
        FEWER_REGISTERS;
        const int warp = (item - MULTIPLIERS) >> 5;
        if (warp == LOADERS)
            tell(&w, lane, false);
        else if (warp == 0 && lane == 0)
            copy_columns(&w, AT(q));
    } else {
        MORE_REGISTERS;
        const int warpgroup = item >> 7;
        int slot = 0;
        CLEAR;
        elements from = AT(p);
        if (tasks[0].count > 0)
            from += tasks[0].start + lane_columns(item);
        LOAD_PLACE(0, from, 0);
        LOAD_PLACE(1, from, 1);
        LOAD_PLACE(2, from, 2);
        NOUNROLL for (uint i = 0; tasks[i % TASKS].count > 0; ++i) {
            __local const task *me = &tasks[i % TASKS], *next = &tasks[(i + 1) % TASKS];
            const int blocks_of_tile = TASK_BLOCKS(*me);
            PRODUCT(2)
            STORE_BLOCK(0)
            STORE_BLOCK(1)
        }
    }
}
