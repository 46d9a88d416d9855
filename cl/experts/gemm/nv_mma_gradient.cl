/*
 * Purpose: Gradients of weights on NVIDIA's tensor cores: a work-group computes ROWS by COLUMNS of
 *          one expert's gradient through local memory. All experts in one launch.
 * Formula: as ref_gradient.cl.
 * Arrays: as in gradient.clh; P and Q are of one type, f16 or bf16, C is of it or f32.
 * NDRange: ceil(m / ROWS) * ceil(n / COLUMNS) * E groups of four warps.
 * Limits: compute capability 8.0; 48 KiB of local memory. OUTPUTS: elements of C in 16 bytes.
 * Repeatability: every sum runs over the expert's slots in steps of 16 from its first one on.
 */
#include "experts/gemm/gradient.clh"
#define MMA_TYPE P
#include "experts/gemm/nv_mma.clh"

#define ROWS        128 /* of C: columns of P */
#define COLUMNS     128 /* of C, and of Q */
#define DEPTH       32  /* slots per stage */
#define STAGES      3
#define WARPS_DOWN  2   /* warps that share the rows; the others share the columns */

#define WARP          32
#define WARPS         4
#define ITEMS         (WARP * WARPS)
#define WARP_ROWS     (ROWS / WARPS_DOWN)
#define WARP_COLUMNS  (COLUMNS / (WARPS / WARPS_DOWN))
#define BLOCKS_DOWN   (WARP_ROWS / 16)
#define BLOCKS_ACROSS (WARP_COLUMNS / 8)
#define WALK          16 /* tiles of rows whose groups run side by side, to share Q in the cache */

/*
 * A stage in local memory: a row per slot of P with ROWS elements, then one of Q with COLUMNS
 * elements. They are moved in chunks of 16 bytes; per stage a work-item carries the same chunk of
 * every P_STEP-th row of P, and of every Q_STEP-th of Q.
 */
#define CHUNK       8 /* elements */
#define P_CHUNKS    (ROWS / CHUNK)
#define P_STEP      (ITEMS / P_CHUNKS)
#define P_LOADS     (DEPTH / P_STEP)
#define Q_CHUNKS    (COLUMNS / CHUNK)
#define Q_STEP      (ITEMS / Q_CHUNKS)
#define Q_LOADS     (DEPTH / Q_STEP)
#define P_BYTES     (DEPTH * P_CHUNKS * CHUNK_BYTES)
#define STAGE_BYTES (P_BYTES + DEPTH * Q_CHUNKS * CHUNK_BYTES)

/* The sums go to local memory in passes of so many blocks of 16 rows per warp. */
#define PASS_BLOCKS 2
#define PASS_ROWS   (PASS_BLOCKS * 16)
#define SUM_STRIDE  (COLUMNS + 8) /* floats; the padding is against bank conflicts */

#define NOUNROLL _Pragma("unroll 1")

/* What a work-item carries. */
typedef struct carrier {
    bool whole;           /* all chunks are aligned */
    uint end;             /* of the expert's slots */
    uint p_first, q_first;        /* its first slots in a stage */
    uint p_to, q_to;              /* places in a stage of its first chunks */
    int p_left, q_left;           /* elements in use from its chunk's first one on */
    __global const ushort *p, *q; /* its chunk of row 0 */
    uint p_rows[P_LOADS], q_rows[Q_LOADS]; /* rows that it carries into the next stage */
} carrier;

/* Rows that hold `slot`; where none does, row 0, of which nothing is carried. */
static inline uint row_of(const gradient *g, uint gathered, uint slot, uint end) {
    const uint known = slot < end ? slot : 0;
    return gathered && slot < end ? (uint)g->token_of[slot] : known;
}

/* The rows of the stage that begins at `slot`. */
static inline void find_rows(const gradient *g, carrier *c, uint slot) {
    UNROLL for (uint i = 0; i < P_LOADS; ++i)
        c->p_rows[i] = row_of(g, g->p_gathered, slot + c->p_first + i * P_STEP, c->end);
    UNROLL for (uint i = 0; i < Q_LOADS; ++i)
        c->q_rows[i] = row_of(g, g->q_gathered, slot + c->q_first + i * Q_STEP, c->end);
}

static inline carrier carrier_of(const gradient *g, uint2 slots, uint row, uint column, uint item) {
    carrier c;
    const uint p_column = row + item % P_CHUNKS * CHUNK;
    const uint q_column = column + item % Q_CHUNKS * CHUNK;
    const ulong places = (ulong)g->p | (ulong)g->q;
    c.whole = places % CHUNK_BYTES == 0 && (g->p_row | g->q_row) % CHUNK == 0;
    c.end = slots.y;
    c.p_first = item / P_CHUNKS;
    c.q_first = item / Q_CHUNKS;
    c.p_to = place(c.p_first, item % P_CHUNKS, P_CHUNKS);
    c.q_to = P_BYTES + place(c.q_first, item % Q_CHUNKS, Q_CHUNKS);
    c.p_left = clamp((int)g->m - (int)p_column, 0, CHUNK);
    c.q_left = clamp((int)g->n - (int)q_column, 0, CHUNK);
    c.p = fixed(g->p + p_column);
    c.q = fixed(g->q + q_column);
    find_rows(g, &c, slots.x);
    return c;
}

/* One chunk, with zeros for what is not among the `left` elements in use. */
static inline void carry(__local uchar *tiles, bool whole, uint to, __global const ushort *from,
                         int left) {
    if (whole) {
        copy_start(tiles, to, from, (uint)left * 2);
    } else {
        ushort elements[CHUNK];
        UNROLL for (int i = 0; i < CHUNK; ++i)
            elements[i] = i < left ? from[i] : (ushort)0;
        *(__local ushort8 *)(tiles + to) = vload8(0, elements);
    }
}

static inline void load_chunks(const gradient *g, const carrier *c, __local uchar *tiles,
                               uint stage, bool whole, uint slot) {
    UNROLL for (uint i = 0; i < P_LOADS; ++i)
        carry(tiles, whole, stage + c->p_to + i * P_STEP * P_CHUNKS * CHUNK_BYTES,
              c->p + (ulong)c->p_rows[i] * g->p_row,
              slot + c->p_first + i * P_STEP < c->end ? c->p_left : 0);
    UNROLL for (uint i = 0; i < Q_LOADS; ++i)
        carry(tiles, whole, stage + c->q_to + i * Q_STEP * Q_CHUNKS * CHUNK_BYTES,
              c->q + (ulong)c->q_rows[i] * g->q_row,
              slot + c->q_first + i * Q_STEP < c->end ? c->q_left : 0);
}

/* Fills a stage from `slot` on, one batch of copies, empty past the end; then finds the next's. */
static inline void load_stage(const gradient *g, carrier *c, __local uchar *tiles, uint stage,
                              uint slot) {
    if (slot < c->end) {
        if (c->whole)
            load_chunks(g, c, tiles, stage, true, slot);
        else
            load_chunks(g, c, tiles, stage, false, slot);
    }
    copy_batch();
    find_rows(g, c, slot + DEPTH);
}

/* A warp's part of the tile: its first row and column, and where its matrices are in a stage. */
typedef struct warp_part {
    uint lane, down, column, p_from, q_from;
} warp_part;

static inline warp_part warp_part_of(uint item) {
    warp_part at;
    const uint warp = item / WARP, lane = item % WARP;
    at.lane = lane;
    at.down = warp % WARPS_DOWN;
    at.column = warp / WARPS_DOWN * WARP_COLUMNS;
    at.p_from = place(lane / 16 * 8 + lane % 8, at.down * WARP_ROWS / CHUNK + lane / 8 % 2,
                      P_CHUNKS);
    at.q_from = P_BYTES + place(lane % 16, at.column / CHUNK + lane / 16, Q_CHUNKS);
    return at;
}

/* The factors of a warp's part of a stage, 16 slots. */
typedef struct factors {
    uint p[BLOCKS_DOWN][4], q[BLOCKS_ACROSS][2];
} factors;

static inline void load_factors(__local const uchar *tiles, uint stage, uint k, const warp_part *at,
                                factors *f) {
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        load_transposed(
            tiles, stage + (at->p_from ^ (i * 2 * CHUNK_BYTES)) + k * 16 * P_CHUNKS * CHUNK_BYTES,
            f->p[i]);
    UNROLL for (uint j = 0; j < BLOCKS_ACROSS; j += 2)
        load_transposed(
            tiles, stage + (at->q_from ^ (j * CHUNK_BYTES)) + k * 16 * Q_CHUNKS * CHUNK_BYTES,
            f->q[j]);
}

static inline void multiply(const factors *f, float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
            multiply_add(sums[i][j], f->p[i], f->q[j]);
}

/* Sums of a pass of all warps -> local memory [WARPS_DOWN * PASS_ROWS, SUM_STRIDE]. */
static inline void keep_sums(__local float *kept, const warp_part *at,
                             float (*sums)[BLOCKS_ACROSS][4]) {
    const uint row = at->down * PASS_ROWS + at->lane / 4, column = at->column + at->lane % 4 * 2;
    UNROLL for (uint i = 0; i < PASS_BLOCKS; ++i)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j) {
            __local float *to = kept + (row + i * 16) * SUM_STRIDE + column + j * 8;
            *(__local float2 *)to = (float2)(sums[i][j][0], sums[i][j][1]);
            *(__local float2 *)(to + 8 * SUM_STRIDE) = (float2)(sums[i][j][2], sums[i][j][3]);
        }
}

/* OUTPUTS sums -> C, of which `count` are in use. */
static inline void store_outputs(const gradient *g, __global STORAGE(C) *to,
                                 __local const float *sums, uint count) {
    if ((ulong)to % CHUNK_BYTES == 0 && count >= OUTPUTS) {
#if OUTPUTS == 4
        float4 v = *(__local const float4 *)sums;
        if (g->accumulate)
            v += *(__global const float4 *)to;
        *(__global float4 *)to = v;
#else
        const float4 low = ((__local const float4 *)sums)[0];
        const float4 high = ((__local const float4 *)sums)[1];
        float8 v = (float8)(low, high);
        if (g->accumulate)
            v += LOADN(C, 8, to);
        *(__global uint4 *)to =
            (uint4)(pack(v.s0, v.s1), pack(v.s2, v.s3), pack(v.s4, v.s5), pack(v.s6, v.s7));
#endif
    } else {
        NOUNROLL for (uint i = 0; i < min(count, (uint)OUTPUTS); ++i)
            STORE(C, g->accumulate ? LOAD(C, to + i) + sums[i] : sums[i], to + i);
    }
}

#define OUTPUT_CHUNKS (COLUMNS / OUTPUTS)

/* Stores a pass that begins at row `from` of each warp's part. */
static inline void store_pass(const gradient *g, uint expert, uint first_row, uint first_column,
                              uint from, __local const float *kept) {
    const uint item = (uint)get_local_id(0);
    const uint within = item % OUTPUT_CHUNKS * OUTPUTS, column = first_column + within;
    NOUNROLL for (uint row = item / OUTPUT_CHUNKS; row < WARPS_DOWN * PASS_ROWS;
                  row += ITEMS / OUTPUT_CHUNKS) {
        const uint to = first_row + row / PASS_ROWS * WARP_ROWS + from + row % PASS_ROWS;
        if (to < g->m && column < g->n)
            store_outputs(g, g->c + expert * g->c_expert + to * g->c_row + column,
                          kept + row * SUM_STRIDE + within, g->n - column);
    }
}

KERNEL(ITEMS, 1, 1)
void gradient_nv_mma(GRADIENT_PARAMETERS) {
    __local uchar tiles[STAGES * STAGE_BYTES] __attribute__((aligned(128)));
    const gradient g = GRADIENT_PROBLEM;
    /* In an expert, groups walk down WALK tiles of rows, then one tile of columns across. */
    const uint down = divide_up(m, ROWS), across = divide_up(n, COLUMNS);
    const uint group = (uint)(get_global_id(0) / ITEMS);
    const uint expert = group / (down * across), tile = group % (down * across);
    const uint top = tile / (WALK * across) * WALK, within = tile % (WALK * across);
    const uint high = min(down - top, (uint)WALK);
    const uint row = (top + within % high) * ROWS, column = within / high * COLUMNS;
    const uint2 slots_in_use = slots_of(&g, expert);
    const uint item = (uint)get_local_id(0);
    const warp_part at = warp_part_of(item);
    carrier mine = carrier_of(&g, slots_in_use, row, column, item);
    float sums[BLOCKS_DOWN][BLOCKS_ACROSS][4];
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
            UNROLL for (uint v = 0; v < 4; ++v)
                sums[i][j][v] = 0.0f;

    /*
     * While the products of 16 slots are under way, the factors of the next are read. Past the
     * barrier nobody reads this stage again: it is filled anew.
     */
    factors f[2];
    NOUNROLL for (uint i = 0; i < STAGES; ++i)
        load_stage(&g, &mine, tiles, i * STAGE_BYTES, slots_in_use.x + i * DEPTH);
    COPY_WAIT(STAGES - 1);
    barrier(CLK_LOCAL_MEM_FENCE);
    load_factors(tiles, 0, 0, &at, &f[0]);
    uint stage = 0;
    NOUNROLL for (uint slot = slots_in_use.x; slot < slots_in_use.y; slot += DEPTH) {
        const uint next = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        load_factors(tiles, stage, 1, &at, &f[1]);
        multiply(&f[0], sums);
        COPY_WAIT(STAGES - 2);
        barrier(CLK_LOCAL_MEM_FENCE);
        load_factors(tiles, next, 0, &at, &f[0]);
        multiply(&f[1], sums);
        load_stage(&g, &mine, tiles, stage, slot + STAGES * DEPTH);
        stage = next;
    }
    COPY_WAIT(0);
    __local float *shared = (__local float *)tiles;
    const bool nothing_to_add = accumulate && slots_in_use.x >= slots_in_use.y;
    const uint end_row = nothing_to_add ? 0 : WARP_ROWS;
    NOUNROLL for (uint from = 0; from < end_row; from += PASS_ROWS) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (from == 0)
            keep_sums(shared, &at, sums);
        else
            keep_sums(shared, &at, sums + BLOCKS_DOWN - PASS_BLOCKS);
        barrier(CLK_LOCAL_MEM_FENCE);
        store_pass(&g, expert, row, column, from, shared);
    }
}
