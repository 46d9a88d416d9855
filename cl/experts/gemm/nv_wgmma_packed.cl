/*
 * Purpose: Grouped GEMM on Hopper with packed weights: they are the factor in registers, tokens the
 *          one in local memory, so a tile of C is computed as its transpose. All experts in one
 *          launch.
 * Formula: as ref.cl. Gated: 128 columns of C a tile, from 128 of gate and 128 of up; else 256.
 * Arrays: as in gemm.clh; A, W, C of one type, f16 or bf16. up: weights as nv_wgmma_pack.cl makes
 *          them. list: of nv_wgmma_list.cl. GATHER 1: a are rows, found through token_of; 0: tiles
 *          of tokens [slots / COLUMNS, BLOCKS, COLUMNS, 32]. next_blocks: C is such tiles with so
 *          many blocks, zeros from n on; 0: C is rows.
 *          maps: none.
 * NDRange: any number of groups of 12 warps; group g computes tiles begin + g, begin + g + groups,
 *          .., all groups together at most `most`.
 * Limits: compute capability 9.0; 48 KiB of local memory; ACTIVATION and ROW_WEIGHT are the
 *          problem's; not accumulate; BLOCKS * 32 >= k. BIASED: whether biases may be given.
 * Repeatability: every sum runs over k in steps of 16 in ascending order, whatever the tile.
 */
#include "experts/gemm/nv_fast.clh"
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"
#define TYPE           A
#define FAR            (BLOCKS * 4 * 2 * FRAGMENT_ELEMENTS * 2)
#define NEXT_FRAGMENTS (up + (up_off + next->start + lane_weights(fresh_item())))
#define OUTPUTS        (GATED ? 128 : 256) /* columns of C a tile */
#include "experts/gemm/nv_wgmma_own.clh"
#define FRAGMENTS_OF(w, t, f) \
    (((ulong)(t).expert * (w)->down + (f)) * WGMMA_ROWS * BLOCKS * WGMMA_BLOCK)

#include "experts/gemm/nv_wgmma.clh"
#include "experts/gemm/nv_wgmma_store.clh"

#define RUN     (GATED ? 4 : 8)     /* neighbouring columns of a lane */
#if !GATHER
#define FILLERS 1 /* warps that fill local memory */
#elif COLUMNS < 8 * LOADERS
#define FILLERS (COLUMNS / 8)
#else
#define FILLERS LOADERS
#endif
#define TIMES   ((COLUMNS / 8 + FILLERS - 1) / FILLERS)  /* eight rows, of a slot, of a warp */

/* A lane's fragments in a tile of weights: [warpgroup][block][warp][16 k][lane][8]. */
static inline ulong lane_weights(int item) {
    return ((ulong)(item >> 7) * 8 + (item >> 5 & 3)) * BLOCKS * 2 * FRAGMENT_ELEMENTS +
           (item & 31) * 8;
}

/* ---- Filling local memory ----------------------------------------------------------------- */

#if GATHER
/* Rows of k, and which of them a slot has; NULL: its own number. */
typedef struct gathered {
    elements a;
    __global const int *token_of;
    uint k;
} gathered;

/* Row j of a lane of a loading warp: rows past the last one repeat it. */
INLINE uint row_at(const gathered *x, __local const task *t, int warp, int lane, int j) {
    const int slot = t->first + min((warp + FILLERS * j) * 8 + (lane >> 2), t->count - 1);
    return (uint)(x->token_of ? x->token_of[slot] : slot);
}

/* Eight elements of a row of k from `from` on, zeros past its end. */
INLINE uint4 chunk_at(const gathered *x, uint row, uint from) {
    __global const ushort *from_row = x->a + (ulong)row * x->k;
    uint words[4];
    UNROLL for (uint i = 0; i < 4; ++i) {
        const uint low = from + 2 * i, high = low + 1;
        words[i] = (low < x->k ? from_row[low] : 0u) |
                   (high < x->k ? (uint)from_row[high] << 16 : 0u);
    }
    return (uint4)(words[0], words[1], words[2], words[3]);
}

/* A warp's rows of every slot, copied as they lie in memory. */
INLINE void gather_chunks(const work *w, const gathered *x, int warp, int lane) {
    const uint chunk = lane & 3;
    const uint to = w->slots + warp * 512 + (lane >> 2) * 64 + (swizzled(lane >> 2, chunk) << 4);
    ring r = {0, 0};
    NOUNROLL for (uint i = 0; w->tasks[i % TASKS].count > 0; ++i) {
        uint rows[TIMES]; /* in chunks, which a uint counts up to 64 GiB */
        UNROLL for (int j = 0; j < TIMES; ++j)
            rows[j] = row_at(x, &w->tasks[i % TASKS], warp, lane, j) * (x->k / CHUNK) + chunk;
        elements from = x->a;
        NOUNROLL for (uint k = chunk * CHUNK; k < BLOCKS * BLOCK; k += BLOCK, from += BLOCK) {
            bar_wait(w->empty + 8 * r.slot, r.phase ^ 1);
            UNROLL for (int j = 0; j < TIMES; ++j)
                if (warp + FILLERS * j < COLUMNS / 8)
                    copy_chunk(to + r.slot * SLOT_BYTES + j * FILLERS * 512,
                               from + (ulong)rows[j] * CHUNK, k < x->k ? 16 : 0);
            bar_copied(w->full + 8 * r.slot);
            ring_next(&r);
        }
    }
}

/* The same of rows that are not whole chunks at multiples of 16 bytes. */
INLINE void gather_elements(const work *w, const gathered *x, int warp, int lane) {
    const uint chunk = lane & 3;
    const uint to = w->slots + warp * 512 + (lane >> 2) * 64 + (swizzled(lane >> 2, chunk) << 4);
    ring r = {0, 0};
    NOUNROLL for (uint i = 0; w->tasks[i % TASKS].count > 0; ++i)
        NOUNROLL for (uint k = chunk * CHUNK; k < BLOCKS * BLOCK; k += BLOCK) {
            bar_wait(w->empty + 8 * r.slot, r.phase ^ 1);
            NOUNROLL for (int j = 0; warp + FILLERS * j < COLUMNS / 8; ++j)
                put_chunk(to + r.slot * SLOT_BYTES + j * FILLERS * 512,
                          chunk_at(x, row_at(x, &w->tasks[i % TASKS], warp, lane, j), k));
            FENCE_LOCAL;
            bar_arrive(w->full + 8 * r.slot);
            ring_next(&r);
        }
}
#else
/* Slots as they are in tiles of tokens, by one work-item. */
INLINE void copy_tiles(const work *w, elements a) {
    ring r = {0, 0};
    NOUNROLL for (uint i = 0; w->tasks[i % TASKS].count > 0; ++i) {
        __global const uchar *from =
            (__global const uchar *)a +
            (ulong)(w->tasks[i % TASKS].first / COLUMNS) * BLOCKS * SLOT_BYTES;
        NOUNROLL for (int b = 0; b < BLOCKS; ++b, from += SLOT_BYTES) {
            bar_wait(w->empty + 8 * r.slot, r.phase ^ 1);
            bar_expect(w->full + 8 * r.slot, SLOT_BYTES);
            copy_bulk(w->slots + r.slot * SLOT_BYTES, from, SLOT_BYTES, w->full + 8 * r.slot);
            ring_next(&r);
        }
    }
}
#endif

/* ---- Storing ------------------------------------------------------------------------------ */

/* A lane's columns of the tile, the first of RUN. */
static inline int lane_column(int item) {
    return GATED ? (item >> 5) * 16 + (item & 3) * 4 : (item >> 5) * 32 + (item & 3) * 8;
}

/* Before it is transposed, a lane's sum (block, half) is of this column: nv_wgmma_pack.cl. */
static inline int sum_column(int item, int block, int side) {
    const int warp = item >> 5, g = (item & 31) >> 2;
    return GATED ? warp * 16 + 4 * (g >> 1) + (g & 1) + 2 * side
                 : warp * 32 + 8 * (g >> 1) + 2 * (2 * block + side) + (g & 1);
}

/* Biases of a lane's sums: [block or matrix][side]. */
static inline void load_biases(const problem *p, __local const task *t, int item, float *bias) {
#if BIASED
    UNROLL for (int i = 0; i < 4; ++i) {
        const int of = t->f * OUTPUTS + sum_column(item, GATED ? 0 : i / 2, i % 2);
        bias[i] = bias_at(p, GATED && i < 2 ? p->gate_bias : p->up_bias, t->expert,
                          min((uint)of, p->n - 1));
    }
#endif
}

/* Weights of tokens 2 q and 2 q + 1 of eight, 1 past the last. */
static inline void token_weights(const problem *p, __local const task *t, int j, float *weight) {
    UNROLL for (int i = 0; i < 2; ++i) {
        const int row = 8 * j + (fresh_item() & 3) * 2 + i;
        weight[i] = row < t->count ? row_weight_of(p, (uint)(t->first + row)) : 1.0f;
    }
}

#if GATED
#define TRANSPOSED_4(v) (uint2)(transpose(pack((v)[0], (v)[1])), transpose(pack((v)[2], (v)[3])))
#if KEEP_Z && INTERLEAVED
#define KEEP(j)                                                                                    \
    if (p.z) {                                                                                     \
        const uint2 gates = TRANSPOSED_4(gate), ups = TRANSPOSED_4(up);                            \
        if (8 * j + g < count)                                                                     \
            store_turns(&p, z_row_of(&p, (uint)(me->first + 8 * j + g)), column, gates, ups);      \
    }
#elif KEEP_Z
#define KEEP(j)                                                                                    \
    if (p.z) {                                                                                     \
        const uint2 gates = TRANSPOSED_4(gate), ups = TRANSPOSED_4(up);                            \
        const uint row = 8 * j + g < count ? z_row_of(&p, (uint)(me->first + 8 * j + g)) : 0;      \
        __global ushort *z = p.z + (ulong)row * p.z_at.row + column;                               \
        if (8 * j + g < count) {                                                                   \
            store_four(z, gates, (int)p.n - column, z_is_whole(&p));                               \
            store_four(z + z_up(&p.z_at), ups, (int)p.n - column, z_is_whole(&p));                 \
        }                                                                                          \
    }
#else
#define KEEP(j)
#endif
#define STORE_QUAD(b, j)                                                                           \
    {                                                                                              \
        float gate[4], up[4], weight[2] = {1.0f, 1.0f};                                            \
        SUMS(gate, 0, j);                                                                          \
        SUMS(up, 1, j);                                                                            \
        if (ROW_WEIGHT)                                                                            \
            token_weights(&p, me, j, weight);                                                      \
        UNROLL for (int i = 0; i < 4; ++i) {                                                       \
            gate[i] = gemm_linear_output(&p, gate[i], bias[i / 2], weight[i % 2]);                 \
            up[i] = gemm_linear_output(&p, up[i], bias[2 + i / 2], weight[i % 2]);                 \
        }                                                                                          \
        KEEP(j)                                                                                    \
        UNROLL for (int i = 0; i < 4; ++i)                                                         \
            gate[i] = gemm_activation(&p, gate[i], up[i], weight[i % 2]);                          \
        const uint2 y = TRANSPOSED_4(gate);                                                        \
        if (8 * j + g < count)                                                                     \
            store_four(to + j * step, y, left, whole);                                             \
    }
#else
#define TRANSPOSED_8(v, w)                                                                         \
    (uint4)(transpose(pack((v)[0], (v)[1])), transpose(pack((v)[2], (v)[3])),                      \
            transpose(pack((w)[0], (w)[1])), transpose(pack((w)[2], (w)[3])))
#if KEEP_Z
#define KEEP(j)                                                                                    \
    if (p.z) {                                                                                     \
        const uint4 z = TRANSPOSED_8(up, more);                                                    \
        if (8 * j + g < count)                                                                     \
            store_z(&p, z_row_of(&p, (uint)(me->first + 8 * j + g)), column, z,                    \
                    (int)p.n - column);                                                            \
    }
#else
#define KEEP(j)
#endif
#define STORE_QUAD(b, j)                                                                           \
    {                                                                                              \
        float up[4], more[4], weight[2] = {1.0f, 1.0f};                                            \
        SUMS(up, 0, j);                                                                            \
        SUMS(more, 1, j);                                                                          \
        if (ROW_WEIGHT)                                                                            \
            token_weights(&p, me, j, weight);                                                      \
        UNROLL for (int i = 0; i < 4; ++i) {                                                       \
            up[i] = gemm_linear_output(&p, up[i], bias[i / 2], weight[i % 2]);                     \
            more[i] = gemm_linear_output(&p, more[i], bias[2 + i / 2], weight[i % 2]);             \
        }                                                                                          \
        KEEP(j)                                                                                    \
        UNROLL for (int i = 0; i < 4; ++i) {                                                       \
            up[i] = gemm_activation(&p, 0.0f, up[i], weight[i % 2]);                               \
            more[i] = gemm_activation(&p, 0.0f, more[i], weight[i % 2]);                           \
        }                                                                                          \
        const uint4 y = TRANSPOSED_8(up, more);                                                    \
        if (8 * j + g < count)                                                                     \
            store_eight(to + j * step, y, left, whole);                                            \
    }
#endif

/* Ends a tile: columns of C are rows of the sums, tokens their columns. */
#define STORE_TILE                                                                                 \
    {                                                                                              \
        PROBLEM_LATE                                                                               \
        const int t = fresh_item(), g = (t & 31) >> 2;                                             \
        const int column = me->f * OUTPUTS + lane_column(t);                                       \
        const bool own = next_blocks > 0;                                                          \
        const int left = (own ? (int)next_blocks * BLOCK : (int)p.n) - column;                     \
        const int count = left > 0 ? me->count : 0;                                                \
        float bias[4] = {0.0f, 0.0f, 0.0f, 0.0f};                                                  \
        load_biases(&p, me, t, bias);                                                              \
        __global ushort *to =                                                                      \
            p.c + (own ? own_place(me->first, column, next_blocks) + g * BLOCK +                   \
                             swizzled(g, column >> 3 & 3) * CHUNK + (column & 4)                   \
                       : (ulong)(me->first + g) * p.n + column);                                   \
        const ulong step = own ? 8 * BLOCK : 8 * p.n;                                              \
        const bool whole = own || (p.n % CHUNK == 0 && (ulong)p.c % 16 == 0);                      \
        EACH_QUAD(STORE_QUAD, 0)                                                                   \
        if (own && me->f == w.down - 1)                                                            \
            clear_own(p.c, me->first, w.down * OUTPUTS, next_blocks, t);                           \
    }

KERNEL(ITEMS, 1, 1)
void gemm_nv_wgmma_packed(GEMM_PARAMETERS, IN(int, list), IN(ulong, maps), uint next_blocks,
                          uint begin, uint most) {
    LOCAL_MEMORY
    DECLARE;
    const int item = (int)get_local_id(0), lane = item & 31, down = (int)divide_up(n, OUTPUTS);
    const work w = WORK(AT(list), NULL, down, AT(list)[0], down, 0);
    begin_work(&w, item, GATHER ? WARP * FILLERS : 1);
    barrier(CLK_LOCAL_MEM_FENCE);
    if (item >= MULTIPLIERS) {
        FEWER_REGISTERS;
        const int warp = (item - MULTIPLIERS) >> 5;
        if (warp == LOADERS) {
            tell(&w, lane, GATHER);
        } else if (warp < FILLERS) {
#if GATHER
            const gathered x = {AT(a), GIVEN(token_of), k};
            if (k % CHUNK == 0 && (ulong)x.a % 16 == 0)
                gather_chunks(&w, &x, warp, lane);
            else
                gather_elements(&w, &x, warp, lane);
#else
            if (lane == 0)
                copy_tiles(&w, AT(a));
#endif
        }
    } else {
        MORE_REGISTERS;
        const int warpgroup = item >> 7;
        int slot = 0;
        CLEAR;
        elements from = AT(up);
        if (tasks[0].count > 0)
            from += tasks[0].start + lane_weights(item);
        LOAD_PLACE(0, from, 0);
        LOAD_PLACE(1, from, 1);
        LOAD_PLACE(2, from, 2);
        NOUNROLL for (uint i = 0; tasks[i % TASKS].count > 0; ++i) {
            __local const task *me = &tasks[i % TASKS], *next = &tasks[(i + 1) % TASKS];
            PRODUCT(2)
            STORE_TILE
        }
    }
}
