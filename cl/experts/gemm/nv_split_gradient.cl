/*
 * Purpose: Gradients of weights of factors of any type on NVIDIA's tensor cores, as exact as in
 *          f32: a work-group computes ROWS rows by COLUMNS columns of an expert's gradient.
 * Formula: as ref_gradient.cl, from parts of factors: nv_split.clh. SLICED: one dense problem,
 *          whose slots are cut into slices of gradient_slice(slots); the partial sum of slice i is
 *          "expert" i of C, to be added by slices_add.cl.
 * Arrays: as in gradient.clh. SLICED: no offsets.
 * NDRange: (ceil(n / COLUMNS), ceil(m / ROWS), E, or slices) groups of four warps.
 * Limits: compute capability 8.0; 48 KiB of local memory.
 * Repeatability: steps of 32 slots are summed apart, and added in ascending order; an expert's bits
 *                depend on its slots alone.
 */
#include "experts/gemm/gradient.clh"
#include "experts/gemm/slices.clh"
#define F          P
#define S          Q
#define ROWS       64
#define WARPS_DOWN 2
#include "experts/gemm/nv_split_tile.clh"

/* Two neighbouring elements at once, where they are aligned and `row` elements are pairs. */
typedef float2 pair_f32;
typedef ushort2 pair_f16, pair_bf16;
#define PAIR(type)               JOIN(pair_, type)
#define IS_PAIR(type, from, row) ((ulong)(from) % sizeof(PAIR(type)) == 0 && (row) % 2 == 0)

/*
 * name(g, pairs, slot, left, column, columns, to): CHUNK slots of columns `column` and the next of
 * a factor; 0 for what is not among the `left` slots or the `columns`.
 */
#define LOAD_COLUMNS(name, type, row_of)                                                           \
    static inline void name(const gradient *g, bool pairs, uint slot, int left, uint column,       \
                            uint columns, EIGHT(type) *to) {                                       \
        STORAGE(type) elements[2][CHUNK];                                                          \
        if (pairs && left >= CHUNK) {                                                              \
            UNROLL for (int s = 0; s < CHUNK; ++s) {                                               \
                const PAIR(type) both =                                                            \
                    *(__global const PAIR(type) *)(row_of(g, slot + s) + column);                  \
                elements[0][s] = both.x;                                                           \
                elements[1][s] = both.y;                                                           \
            }                                                                                      \
        } else {                                                                                   \
            UNROLL for (int s = 0; s < CHUNK; ++s)                                                 \
                UNROLL for (uint i = 0; i < 2; ++i)                                                \
                    elements[i][s] = s < left && column + i < columns                              \
                                         ? row_of(g, slot + s)[column + i]                         \
                                         : (STORAGE(type))0;                                       \
        }                                                                                          \
        to[0] = vload8(0, elements[0]);                                                            \
        to[1] = vload8(0, elements[1]);                                                            \
    }

/* What a work-item carries per step: of two neighbouring columns of P, and of Q, which are rows of
 * the tile, CHUNK slots. */
typedef struct carrier {
    uint slot, p_column, q_column;
    uint to[2];            /* places of its chunks in local memory */
    bool p_pairs, q_pairs; /* both columns are in use, and aligned */
} carrier;

typedef struct carried {
    EIGHT(P) p[2];
    EIGHT(Q) q[2];
} carried;

#define PAIRS (ROWS / 2)

/* Work-items side by side read neighbouring columns. */
static inline carrier carrier_of(const gradient *g, uint first_row, uint first_column, uint item) {
    carrier c;
    const uint row = item % PAIRS * 2, chunk = item / PAIRS;
    c.slot = chunk * CHUNK;
    c.p_column = first_row + row;
    c.q_column = first_column + row;
    c.to[0] = place(row, chunk, ROW_CHUNKS);
    c.to[1] = place(row + 1, chunk, ROW_CHUNKS);
    c.p_pairs = IS_PAIR(P, g->p, g->p_row) && c.p_column + 1 < g->m;
    c.q_pairs = IS_PAIR(Q, g->q, g->q_row) && c.q_column + 1 < g->n;
    return c;
}

LOAD_COLUMNS(load_p, P, row_of_p)
LOAD_COLUMNS(load_q, Q, row_of_q)

static inline void load(const gradient *g, const carrier *c, uint slot, uint end, carried *next) {
    const int left = (int)end - (int)(slot + c->slot);
    load_p(g, c->p_pairs, slot + c->slot, left, c->p_column, g->m, next->p);
    load_q(g, c->q_pairs, slot + c->slot, left, c->q_column, g->n, next->q);
}

static inline void keep(__local uchar *stage, const carrier *c, const carried *next) {
    UNROLL for (uint i = 0; i < 2; ++i) {
        KEEP_PARTS(P, F_PARTS, stage, c->to[i], F_PLANE, next->p[i]);
        KEEP_PARTS(Q, S_PARTS, stage, S_AT + c->to[i], S_PLANE, next->q[i]);
    }
}

KERNEL(ITEMS, 1, 1)
void gradient_nv_split(GRADIENT_PARAMETERS) {
    __local uchar tiles[TILE_BYTES] __attribute__((aligned(128)));
    const gradient g = GRADIENT_PROBLEM;
    const uint item = (uint)get_local_id(0), matrix = (uint)get_global_id(2);
    const uint first_row = (uint)get_global_id(1) * ROWS;
    const uint first_column = (uint)get_global_id(0) / ITEMS * COLUMNS;
#if SLICED
    const uint2 slots_in_use = slots_of_slice(slots, matrix);
#else
    const uint2 slots_in_use = slots_of(&g, matrix);
#endif
    const uint begin = slots_in_use.x, end = slots_in_use.y;
    const carrier mine = carrier_of(&g, first_row, first_column, item);
    const warp_part at = warp_part_of(item);
    float totals[BLOCKS_DOWN][BLOCKS_ACROSS][4];
    carried next;
    uint stage_at = 0;
    clear(totals);
    load(&g, &mine, begin, end, &next);
    keep(tiles, &mine, &next);
    barrier(CLK_LOCAL_MEM_FENCE);
    _Pragma("unroll 1") for (uint step = begin; step < end; step += DEPTH) {
        load(&g, &mine, step + DEPTH, end, &next);
        multiply(tiles + stage_at, &at, totals);
        stage_at = STAGE_BYTES - stage_at;
        keep(tiles + stage_at, &mine, &next);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
            UNROLL for (uint n = 0; n < 4; ++n) {
                const uint row = first_row + row_of_sum(&at, i, n);
                const uint column = first_column + column_of_sum(&at, j, n);
                if (row < g.m && column < g.n)
                    gradient_store(&g, matrix, row, column, totals[i][j][n]);
            }
}
