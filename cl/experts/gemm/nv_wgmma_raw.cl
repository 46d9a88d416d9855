/*
 * Purpose: Grouped GEMM on Hopper with weights as they lie: tokens are the factor in registers,
 *          weights the one in local memory, found through tensor maps. All experts in one launch.
 * Formula: as ref.cl. A tile is up to 256 slots by 128 rows of weights; gated, 64 of gate and 64 of
 *          up.
 * Arrays: as in gemm.clh; A, W, C of one type, f16 or bf16. a: rows of nv_wgmma_tokens.cl. list: of
 *          nv_wgmma_list.cl. maps: gate's and up's, of nv_wgmma_map.cl. next_blocks: C is in the
 *          order of a with so many blocks, zeros from n on; 0: C is rows.
 *          taken: where in list the tiles are counted that groups take as they get free, 0 before;
 *          0: nowhere.
 * NDRange: as nv_wgmma_packed.cl; one launch for all tiles where `taken` is not 0.
 * Limits: compute capability 9.0; 48 KiB of local memory; ACTIVATION and ROW_WEIGHT are the
 *          problem's; BLOCKS * 32 >= k. TRANSPOSED: whether w_col is not 1; then w_row is 1.
 *          ACCUMULATES: whether C may be added to. BIASED: whether biases may be given.
 * Repeatability: every sum runs over k in steps of 16 in ascending order, whatever the tile.
 */
#include "experts/gemm/nv_fast.clh"
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"
#include "experts/gemm/nv_wgmma_own.clh"
#define TYPE           A
#define COLUMNS        128
#define SIDE           4 /* more rows side by side than the cache holds are read again and again */
#define FAR            (BLOCKS * 8 * 2 * FRAGMENT_ELEMENTS * 2)
#define NEXT_FRAGMENTS (a + (a_off + next->start + lane_tokens(fresh_item())))
#define FRAGMENTS_OF(w, t, f) ((ulong)((t).first / 16) * BLOCKS * 2 * FRAGMENT_ELEMENTS)
#include "experts/gemm/nv_wgmma.clh"
#include "experts/gemm/nv_wgmma_store.clh"

#define OUTPUTS (GATED ? 64 : 128) /* columns of C a tile */
#define HALF    128                /* slots of a block of both warpgroups */

/* A lane's fragments of a tile: [16 slots][16 k][lane][8]; a warp has 16 slots of each half. */
static inline ulong lane_tokens(int item) {
    return (ulong)(item >> 5) * BLOCKS * 2 * FRAGMENT_ELEMENTS + (item & 31) * 8;
}

/* Half a slot of local memory, 64 rows of weights, from `row` on. */
INLINE void copy_half(uint to, __global const ulong *map, int k, int row, int expert, uint bar) {
#if TRANSPOSED
    copy_box(to, map, row, k, expert, bar);
    copy_box(to + SLOT_BYTES / 4, map, row + BLOCK, k, expert, bar);
#else
    copy_box(to, map, k, row, expert, bar);
#endif
}

/* Slots of weights, by one work-item. */
INLINE void copy_weights(const work *w, __global const ulong *maps) {
    __global const ulong *up = maps + MAP_WORDS, *first = GATED ? maps : up;
    ring r = {0, 0};
    FENCE_MAP(first);
    FENCE_MAP(up);
    NOUNROLL for (uint i = 0; w->tasks[i % TASKS].count > 0; ++i) {
        const int row = w->tasks[i % TASKS].f * OUTPUTS, expert = w->tasks[i % TASKS].expert;
        NOUNROLL for (int k = 0; k < BLOCKS * BLOCK; k += BLOCK) {
            const uint to = w->slots + r.slot * SLOT_BYTES, bar = w->full + 8 * r.slot;
            bar_wait(w->empty + 8 * r.slot, r.phase ^ 1);
            bar_expect(bar, SLOT_BYTES);
            copy_half(to, first, k, row, expert, bar);
            copy_half(to + SLOT_BYTES / 2, up, k, GATED ? row : row + 64, expert, bar);
            ring_next(&r);
        }
    }
}

/* ---- Storing ------------------------------------------------------------------------------ */

/* What a lane stores: rows g and g + 8 of 16 slots, of every quad two columns. */
typedef struct lane_rows {
    uint slot; /* the first of both */
    int count; /* how many of the 16 rows are in use */
    float weight[2];
#if KEEP_Z
    uint z[2]; /* rows of z */
#endif
} lane_rows;

static inline lane_rows rows_of(const problem *p, __local const task *t, int block, int item) {
    lane_rows r;
    const int first = HALF * block + (item >> 5) * 16;
    r.count = t->count - first;
    r.slot = (uint)(t->first + first + ((item & 31) >> 2));
    UNROLL for (int i = 0; i < 2; ++i)
        r.weight[i] = ROW_WEIGHT && ((item & 31) >> 2) + 8 * i < r.count
                          ? row_weight_of(p, r.slot + 8 * i)
                          : 1.0f;
#if KEEP_Z
    UNROLL for (int i = 0; i < 2; ++i)
        r.z[i] = ((item & 31) >> 2) + 8 * i < r.count ? z_row_of(p, r.slot + 8 * i) : 0;
#endif
    return r;
}

/* Linear outputs of a quad, of two rows. */
static inline void linear_quad(const problem *p, const lane_rows *r,
                               __global const STORAGE(BIAS) *bias, int expert, int column,
                               float *v) {
    float b[2] = {0.0f, 0.0f};
#if BIASED
    UNROLL for (int i = 0; i < 2; ++i)
        b[i] = bias_at(p, bias, expert, min((uint)(column + i), p->n - 1));
#endif
    UNROLL for (int i = 0; i < 4; ++i)
        v[i] = gemm_linear_output(p, v[i], b[i % 2], r->weight[i / 2]);
}

#if ACCUMULATES
/* What C holds of a quad is added. */
static inline void add_quad(const problem *p, const lane_rows *r, int g, int column, float *v) {
    UNROLL for (int i = 0; i < 4; ++i)
        if (g + i / 2 * 8 < r->count && (uint)(column + i % 2) < p->n)
            v[i] += LOAD(C, p->c + (ulong)(r->slot + i / 2 * 8) * p->n + column + i % 2);
}
#endif

/* 32 columns of both rows, from `column` on, into rows of C. */
static inline void store_rows(const problem *p, const lane_rows *r, int g, int q, int column,
                              const uint *low, const uint *high) {
    const uint4 first = own_quad(low, q), second = own_quad(high, q);
    const bool whole = p->n % CHUNK == 0 && (ulong)p->c % 16 == 0;
    const int mine = column + q * CHUNK, left = (int)p->n - mine;
    __global ushort *to = p->c + (ulong)r->slot * p->n + mine;
    if (g < r->count)
        store_eight(to, first, left, whole);
    if (g + 8 < r->count)
        store_eight(to + 8 * (ulong)p->n, second, left, whole);
}

/* The same in the order of a: of 16 columns a lane's words of both quads. */
static inline void store_own(__global ushort *to, int column, const uint *low, const uint *high) {
    __global uint4 *at = (__global uint4 *)(to + (ulong)(column / 16) * FRAGMENT_ELEMENTS);
    at[0] = (uint4)(low[0], high[0], low[1], high[1]);
    at[FRAGMENT_ELEMENTS / CHUNK] = (uint4)(low[2], high[2], low[3], high[3]);
}

#if KEEP_Z
/* Linear outputs of four quads, as words of rows g and g + 8. */
#define Z_QUAD(i, j, b, bias)                                                                      \
    {                                                                                              \
        float v[4];                                                                                \
        SUMS(v, b, j);                                                                             \
        linear_quad(&p, &r, bias, me->expert, from_column + 8 * (i) + 2 * q, v);                   \
        low[i] = pack(v[0], v[1]);                                                                 \
        high[i] = pack(v[2], v[3]);                                                                \
    }
#define Z_QUADS(b, j0, j1, j2, j3, bias)                                                           \
    Z_QUAD(0, j0, b, bias) Z_QUAD(1, j1, b, bias) Z_QUAD(2, j2, b, bias) Z_QUAD(3, j3, b, bias)
#if GATED && INTERLEAVED
#define KEEP_Z_32(b, j0, j1, j2, j3, k0, k1, k2, k3)                                               \
    if (p.z) {                                                                                     \
        uint low[4], high[4];                                                                      \
        const int column = from_column + q * CHUNK;                                                \
        Z_QUADS(b, j0, j1, j2, j3, p.gate_bias)                                                    \
        const uint4 gates[2] = {own_quad(low, q), own_quad(high, q)};                              \
        Z_QUADS(b, k0, k1, k2, k3, p.up_bias)                                                      \
        const uint4 ups[2] = {own_quad(low, q), own_quad(high, q)};                                \
        UNROLL for (int i = 0; i < 2; ++i)                                                         \
            if (g + 8 * i < r.count) {                                                             \
                store_turns(&p, r.z[i], column, gates[i].lo, ups[i].lo);                           \
                store_turns(&p, r.z[i], column + 4, gates[i].hi, ups[i].hi);                       \
            }                                                                                      \
    }
#else
/* Four quads of gate or up, whose row begins `from` behind the row of z. */
#define KEEP_SIDE(b, j0, j1, j2, j3, bias, from)                                                   \
    {                                                                                              \
        uint low[4], high[4];                                                                      \
        const int column = from_column + q * CHUNK;                                                \
        Z_QUADS(b, j0, j1, j2, j3, bias)                                                           \
        const uint4 first = own_quad(low, q), second = own_quad(high, q);                          \
        if (g < r.count)                                                                           \
            store_z(&p, r.z[0], (from) + column, first, (int)p.n - column);                        \
        if (g + 8 < r.count)                                                                       \
            store_z(&p, r.z[1], (from) + column, second, (int)p.n - column);                       \
    }
#if GATED
#define KEEP_Z_32(b, j0, j1, j2, j3, k0, k1, k2, k3)                                               \
    if (p.z) {                                                                                     \
        KEEP_SIDE(b, j0, j1, j2, j3, p.gate_bias, 0)                                               \
        KEEP_SIDE(b, k0, k1, k2, k3, p.up_bias, z_up(&p.z_at))                                     \
    }
#else
#define KEEP_Z_32(b, j0, j1, j2, j3, k0, k1, k2, k3)                                               \
    if (p.z)                                                                                       \
        KEEP_SIDE(b, j0, j1, j2, j3, p.up_bias, 0)
#endif
#endif
#else
#define KEEP_Z_32(b, j0, j1, j2, j3, k0, k1, k2, k3)
#endif

/* Outputs of quad i of four, as words of rows g and g + 8. */
#if GATED
#define QUAD_OF(b, i, j, k)                                                                        \
    {                                                                                              \
        float gate[4], up[4];                                                                      \
        SUMS(gate, b, j);                                                                          \
        SUMS(up, b, k);                                                                            \
        linear_quad(&p, &r, p.gate_bias, me->expert, from_column + 8 * (i) + 2 * q, gate);         \
        linear_quad(&p, &r, p.up_bias, me->expert, from_column + 8 * (i) + 2 * q, up);             \
        UNROLL for (int v = 0; v < 4; ++v)                                                         \
            gate[v] = gemm_activation(&p, gate[v], up[v], r.weight[v / 2]);                        \
        low[i] = pack(gate[0], gate[1]);                                                           \
        high[i] = pack(gate[2], gate[3]);                                                          \
    }
#else
#define QUAD_OF(b, i, j, k)                                                                        \
    {                                                                                              \
        float up[4];                                                                               \
        SUMS(up, b, j);                                                                            \
        linear_quad(&p, &r, p.up_bias, me->expert, from_column + 8 * (i) + 2 * q, up);             \
        UNROLL for (int v = 0; v < 4; ++v)                                                         \
            up[v] = gemm_activation(&p, 0.0f, up[v], r.weight[v / 2]);                             \
        ADD_QUAD(i)                                                                                \
        low[i] = pack(up[0], up[1]);                                                               \
        high[i] = pack(up[2], up[3]);                                                              \
    }
#if ACCUMULATES
#define ADD_QUAD(i)                                                                                \
    if (p.accumulate)                                                                              \
        add_quad(&p, &r, g, from_column + 8 * (i) + 2 * q, up);
#else
#define ADD_QUAD(i)
#endif
#endif
/* Four quads: 32 columns of C, the m-th of the tile. */
#define STORE_32(b, m, j0, j1, j2, j3, k0, k1, k2, k3)                                             \
    {                                                                                              \
        const int from_column = me->f * OUTPUTS + 32 * (m);                                        \
        KEEP_Z_32(b, j0, j1, j2, j3, k0, k1, k2, k3)                                               \
        uint low[4], high[4];                                                                      \
        QUAD_OF(b, 0, j0, k0)                                                                      \
        QUAD_OF(b, 1, j1, k1)                                                                      \
        QUAD_OF(b, 2, j2, k2)                                                                      \
        QUAD_OF(b, 3, j3, k3)                                                                      \
        if (!own)                                                                                  \
            store_rows(&p, &r, g, q, from_column, low, high);                                      \
        else if (from_column < (int)next_blocks * BLOCK && r.count > 0)                            \
            store_own(to, from_column, low, high);                                                 \
    }

#if GATED
#define STORE_COLUMNS(b)                                                                           \
    STORE_32(b, 0, 0, 1, 2, 3, 8, 9, 10, 11)                                                       \
    STORE_32(b, 1, 4, 5, 6, 7, 12, 13, 14, 15)
#else
#define STORE_COLUMNS(b)                                                                           \
    STORE_32(b, 0, 0, 1, 2, 3, 0, 0, 0, 0)                                                         \
    STORE_32(b, 1, 4, 5, 6, 7, 0, 0, 0, 0)                                                         \
    STORE_32(b, 2, 8, 9, 10, 11, 0, 0, 0, 0)                                                       \
    STORE_32(b, 3, 12, 13, 14, 15, 0, 0, 0, 0)
#endif

/* All of a block of sums; in C's own order zeros behind the last columns. */
#define STORE_BLOCK(b)                                                                             \
    {                                                                                              \
        const int t = fresh_item(), g = (t & 31) >> 2, q = t & 3;                                  \
        const lane_rows r = rows_of(&p, me, b, t);                                                 \
        const bool own = next_blocks > 0;                                                          \
        __global ushort *to = p.c +                                                                \
                              ((ulong)((me->first + HALF * (b)) / 16 + (t >> 5)) * next_blocks *   \
                               2 * FRAGMENT_ELEMENTS) +                                            \
                              (t & 31) * 8;                                                        \
        STORE_COLUMNS(b)                                                                           \
        if (own && me->f == down - 1 && r.count > 0)                                               \
            NOUNROLL for (int k16 = down * (OUTPUTS / 16); k16 < 2 * (int)next_blocks; ++k16)      \
                *(__global uint4 *)(to + k16 * FRAGMENT_ELEMENTS) = (uint4)(0);                    \
    }

/* A tile of which a warpgroup has no row: it only lets its slots go. */
#define PASS_BY                                                                                    \
    NOUNROLL for (int b = 0; b < BLOCKS; ++b) {                                                    \
        WAIT(FULL(slot, warpgroup));                                                               \
        if (lane == 0)                                                                             \
            bar_arrive(empty + 8 * slot);                                                          \
        if (++slot == SLOTS)                                                                       \
            slot = 0;                                                                              \
    }                                                                                              \
    from = NEXT_FRAGMENTS;                                                                         \
    LOAD_PLACE(0, from, 0);                                                                        \
    LOAD_PLACE(1, from, 1);                                                                        \
    LOAD_PLACE(2, from, 2);

KERNEL(ITEMS, 1, 1)
void gemm_nv_wgmma_raw(GEMM_PARAMETERS, OUT(int, list), IN(ulong, maps), uint next_blocks,
                       uint begin, uint most, uint taken) {
    LOCAL_MEMORY
    DECLARE;
    const int item = (int)get_local_id(0), lane = item & 31, down = (int)divide_up(n, OUTPUTS);
    const work w =
        WORK(AT(list), taken ? AT(list) + taken : NULL, down, AT(list)[0], down, 0);
    begin_work(&w, item, 1);
    barrier(CLK_LOCAL_MEM_FENCE);
    if (item >= MULTIPLIERS) {
        FEWER_REGISTERS;
        const int warp = (item - MULTIPLIERS) >> 5;
        if (warp == LOADERS)
            tell(&w, lane, false);
        else if (warp == 0 && lane == 0)
            copy_weights(&w, AT(maps));
    } else {
        MORE_REGISTERS;
        const int warpgroup = item >> 7;
        int slot = 0;
        CLEAR;
        elements from = AT(a);
        if (tasks[0].count > 0)
            from += tasks[0].start + lane_tokens(item);
        LOAD_PLACE(0, from, 0);
        LOAD_PLACE(1, from, 1);
        LOAD_PLACE(2, from, 2);
        NOUNROLL for (uint i = 0; tasks[i % TASKS].count > 0; ++i) {
            __local const task *me = &tasks[i % TASKS], *next = &tasks[(i + 1) % TASKS];
            const int mine = me->count - HALF / 2 * warpgroup; /* behind its first row */
            if (mine <= 0) {
                PASS_BY
            } else if (mine <= HALF) {
                PRODUCT(1)
                PROBLEM_LATE
                STORE_BLOCK(0)
            } else {
                PRODUCT(2)
                PROBLEM_LATE
                STORE_BLOCK(0)
                STORE_BLOCK(1)
            }
        }
    }
}
