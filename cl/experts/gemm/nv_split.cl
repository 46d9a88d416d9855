/*
 * Purpose: Grouped GEMM of factors of any type on NVIDIA's tensor cores, as exact as in f32: a
 *          work-group computes ROWS rows by COLUMNS columns. All experts in one launch.
 * Formula: as ref.cl, from parts of factors: nv_split.clh. Gated: COLUMNS / 2 columns of gate and
 *          the same ones of up.
 * Arrays: as in gemm.clh.
 * NDRange: (ceil(slots / ROWS), ceil(n / OUTPUTS)) groups of four warps.
 * Limits: compute capability 8.0; row_tile is a multiple of ROWS, 16 or 64; 48 KiB of local memory.
 *         TRANSPOSED says whether w_col is not 1, ONLY_LINEAR whether all problems are linear,
 *         LINEAR whether they share bits with nv_split_slices.cl.
 * Repeatability: steps of 32 of k are summed apart and added in ascending order, whatever the tile;
 *                if LINEAR, in slices as in gemm.clh, which are then added in order.
 */
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"
#define F A
#define S W
#define WARPS_DOWN (ROWS == 16 ? 1 : 2)
#include "experts/gemm/nv_split_tile.clh"

#define OUTPUTS    (GATED ? COLUMNS / 2 : COLUMNS) /* columns of C per group */
#define SUM_STRIDE (COLUMNS + 8)                   /* floats; padded against bank conflicts */
#define SUM_BYTES  (ROWS * SUM_STRIDE * 4)

/* What a work-item carries per step. */
typedef struct carrier {
    uint a_to[F_CARRIED], w_to[S_CARRIED]; /* its places in local memory */
    uint a_chunk[F_CARRIED], w_chunk[S_CARRIED]; /* its first elements along k */
    __global const STORAGE(A) *a[F_CARRIED]; /* NULL: carries none */
    __global const STORAGE(W) *w[S_CARRIED];
    bool a_whole, w_whole;
    ulong w_step; /* between two elements along k */
} carrier;

typedef struct carried {
    EIGHT(A) a[F_CARRIED];
    EIGHT(W) w[S_CARRIED];
} carried;

/* Row `row` of the tile's columns: eight columns of gate and of up take turns. Columns past the
 * last one repeat it: what they give is not stored. */
static inline __global const STORAGE(W) *column_at(const problem *p, int expert, uint first,
                                                   uint row) {
    const uint column = first + (GATED ? row / 16 * 8 + row % 8 : row);
    __global const STORAGE(W) *w = GATED && row / 8 % 2 == 0 ? p->gate : p->up;
    return weight_at(p, w, expert, min(column, p->n - 1));
}

/* Work-items side by side read neighbouring addresses: along k, or along n for transposed W. */
static inline carrier carrier_of(const problem *p, const rows *r, uint first, uint item) {
    const uint k = p->k;
    carrier c;
    c.w_step = p->w_col;
    c.a_whole = are_whole((ulong)p->a, k, k);
    c.w_whole = !TRANSPOSED && are_whole((ulong)p->gate | (ulong)p->up, p->w_row | p->w_expert, k);
    UNROLL for (uint i = 0; i < F_CARRIED; ++i) {
        const uint at = item + i * ITEMS, row = at / ROW_CHUNKS, chunk = at % ROW_CHUNKS;
        const uint slot = min(r->first + row, max(r->end, 1u) - 1);
        c.a_chunk[i] = chunk * CHUNK;
        c.a_to[i] = place(row, chunk, ROW_CHUNKS);
        c.a[i] = row < ROWS && r->first < r->end ? row_of_a(p, slot) + chunk * CHUNK : 0;
    }
    UNROLL for (uint i = 0; i < S_CARRIED; ++i) {
        const uint at = item + i * ITEMS;
        const uint row = TRANSPOSED ? at % COLUMNS : at / ROW_CHUNKS;
        const uint chunk = TRANSPOSED ? at / COLUMNS : at % ROW_CHUNKS;
        c.w_chunk[i] = chunk * CHUNK;
        c.w_to[i] = S_AT + place(row, chunk, ROW_CHUNKS);
        c.w[i] = column_at(p, r->expert, first, row) + chunk * CHUNK * p->w_col;
    }
    return c;
}

static inline void load(const problem *p, const carrier *c, uint k, carried *next) {
    UNROLL for (uint i = 0; i < F_CARRIED; ++i)
        if (c->a[i])
            next->a[i] = LOAD_EIGHT(A, c->a_whole, c->a[i] + k, 1,
                                    (int)p->k - (int)(k + c->a_chunk[i]));
    UNROLL for (uint i = 0; i < S_CARRIED; ++i)
        next->w[i] = LOAD_EIGHT(W, c->w_whole, c->w[i] + k * c->w_step, c->w_step,
                                (int)p->k - (int)(k + c->w_chunk[i]));
}

static inline void keep(__local uchar *tiles, const carrier *c, const carried *next) {
    UNROLL for (uint i = 0; i < F_CARRIED; ++i)
        if (c->a[i])
            KEEP_PARTS(A, F_PARTS, tiles, c->a_to[i], F_PLANE, next->a[i]);
    UNROLL for (uint i = 0; i < S_CARRIED; ++i)
        KEEP_PARTS(W, S_PARTS, tiles, c->w_to[i], S_PLANE, next->w[i]);
}

#if ONLY_LINEAR
/* Two neighbouring columns of C from their sums over k; the second may be past the last. */
static inline void store_pair(const problem *p, const rows *r, uint slot, uint column,
                              const float *sums) {
    const float weight = row_weight_of(p, slot);
    UNROLL for (uint n = 0; n < 2; ++n)
        if (column + n < p->n) {
            __global STORAGE(C) *const c = p->c + (ulong)slot * p->n + column + n;
            const float bias = bias_at(p, p->up_bias, r->expert, column + n);
            const float y = gemm_linear_output(p, sums[n], bias, weight);
            STORE(C, p->accumulate ? LOAD(C, c) + y : y, c);
        }
}

/* Each lane stores what it has. */
static inline void store_all(const problem *p, const rows *r, uint first, const warp_part *at,
                             float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        UNROLL for (uint n = 0; n < 4; n += 2) {
            const uint slot = r->first + row_of_sum(at, i, n);
            UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
                if (slot < r->end)
                    store_pair(p, r, slot, first + column_of_sum(at, j, n), &sums[i][j][n]);
        }
}
#else
static inline void keep_sums(__local float *kept, const warp_part *at,
                             float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
            UNROLL for (uint n = 0; n < 4; n += 2)
                *(__local float2 *)(kept + row_of_sum(at, i, n) * SUM_STRIDE +
                                    column_of_sum(at, j, n)) =
                    (float2)(sums[i][j][n], sums[i][j][n + 1]);
}

/* Work-items side by side store neighbouring columns; activations are long, and stand once. */
static inline void store(const problem *p, const rows *r, uint first, uint item,
                         __local const float *kept) {
    _Pragma("unroll 1") for (uint i = item; i < ROWS * OUTPUTS; i += ITEMS) {
        const uint slot = r->first + i / OUTPUTS, column = i % OUTPUTS;
        __local const float *sums =
            kept + i / OUTPUTS * SUM_STRIDE + (GATED ? column / 8 * 16 + column % 8 : column);
        if (slot < r->end && first + column < p->n)
            gemm_store(p, r->expert, slot, first + column, sums[0], sums[GATED ? 8 : 0]);
    }
}
#endif

/* A slice whose end is `step` is added to those before it. */
#if LINEAR
#define END_SLICE(step)                                                                            \
    if ((step) % slice == 0 || (step) >= k) {                                                      \
        add_step(totals, sums);                                                                    \
        clear(sums);                                                                               \
    }
#else
#define END_SLICE(step)
#endif

KERNEL(ITEMS, 1, 1)
void gemm_nv_split(GEMM_PARAMETERS) {
    __local uchar tiles[TILE_BYTES > SUM_BYTES ? TILE_BYTES : SUM_BYTES]
        __attribute__((aligned(128)));
    const problem p = GEMM_PROBLEM;
    const uint item = (uint)get_local_id(0);
    const rows r = rows_in_use(&p, GROUP_INDEX(0, ITEMS) * ROWS, ROWS);
    const uint first = GROUP_INDEX(1, 1) * OUTPUTS;
    /* A tile without rows begins where k ends: it passes by the barriers and stores nothing. */
    const uint begin = r.first < r.end ? 0 : k;
    const carrier mine = carrier_of(&p, &r, first, item);
    const warp_part at = warp_part_of(item);
    float sums[BLOCKS_DOWN][BLOCKS_ACROSS][4];
    carried even, odd; /* of steps that are loaded: the one that is next, and the one behind it */
    clear(sums);
#if LINEAR
    const uint slice = linear_slice(k);
    float totals[BLOCKS_DOWN][BLOCKS_ACROSS][4];
    clear(totals);
#endif
    load(&p, &mine, begin, &even);
    load(&p, &mine, begin + DEPTH, &odd);
    keep(tiles, &mine, &even);
    barrier(CLK_LOCAL_MEM_FENCE);
    _Pragma("unroll 1") for (uint step = begin; step < k; step += 2 * DEPTH) {
        load(&p, &mine, step + 2 * DEPTH, &even);
        multiply(tiles, &at, sums);
        END_SLICE(step + DEPTH);
        keep(tiles + STAGE_BYTES, &mine, &odd);
        barrier(CLK_LOCAL_MEM_FENCE);
        load(&p, &mine, step + 3 * DEPTH, &odd);
        multiply(tiles + STAGE_BYTES, &at, sums); /* zeros, past the last step */
        END_SLICE(step + 2 * DEPTH);
        keep(tiles, &mine, &even);
        barrier(CLK_LOCAL_MEM_FENCE);
    }
#if LINEAR
    store_all(&p, &r, first, &at, totals);
#elif ONLY_LINEAR
    store_all(&p, &r, first, &at, sums);
#else
    keep_sums((__local float *)tiles, &at, sums);
    barrier(CLK_LOCAL_MEM_FENCE);
    store(&p, &r, first, item, (__local const float *)tiles);
#endif
}
