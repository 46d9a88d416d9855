/*
 * Purpose: Grouped GEMM on NVIDIA's tensor cores: a work-group computes ROWS rows by COLUMNS
 *          columns through local memory. All experts in one launch.
 * Formula: as ref.cl. Gated: COLUMNS / 2 columns of gate and the same ones of up.
 * Arrays: as in gemm.clh; A, W and C are of one type, f16 or bf16.
 * NDRange: ceil(slots / ROWS) * ceil(n / OUTPUTS) groups of four warps.
 * Limits: compute capability 8.0; row_tile is a multiple of ROWS; 48 KiB of local memory.
 *          TRANSPOSED says whether w_col is not 1; then w_row is 1, or gated 1 or 2. ACCUMULATES:
 *          whether C may be added to.
 * Repeatability: every sum runs over k in steps of 16 in ascending order, whatever the tile.
 */
#define ACT_T float8
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"
#define MMA_TYPE A
#include "experts/gemm/nv_mma.clh"

/* DEPTH: of k per stage. WARPS_DOWN: warps that share the rows; the others share the columns. */
#if ROWS == 16
#define COLUMNS    64
#define DEPTH      64
#define STAGES     4
#define WARPS_DOWN 1
#elif ROWS == 64
#define COLUMNS    128
#define DEPTH      32
#define STAGES     4
#define WARPS_DOWN 2
#else
#define COLUMNS    128
#define DEPTH      32
#define STAGES     3
#define WARPS_DOWN 2
#endif

#define WARP          32
#define WARPS         4
#define ITEMS         (WARP * WARPS)
#define OUTPUTS       (GATED ? COLUMNS / 2 : COLUMNS) /* columns of C per group */
#define WARP_ROWS     (ROWS / WARPS_DOWN)
#define WARP_COLUMNS  (COLUMNS / (WARPS / WARPS_DOWN))
#define BLOCKS_DOWN   (WARP_ROWS / 16)
#define BLOCKS_ACROSS (WARP_COLUMNS / 8)
#ifndef WALK
#define WALK          16 /* tiles of rows whose groups run side by side, to share W in the cache */
#endif

/*
 * A stage in local memory: rows of A with DEPTH elements, then rows of W: a row per column of the
 * tile with DEPTH elements, or, transposed, a row per k with COLUMNS elements. They are moved in
 * chunks of 16 bytes; per stage a work-item carries a chunk of every A_STEP-th row, or W_STEP-th.
 */
#define CHUNK       8 /* elements */
#define A_CHUNKS    (DEPTH / CHUNK)
#define A_STEP      (ITEMS / A_CHUNKS)
#define A_LOADS     (ROWS / A_STEP)
#define W_ROWS      (TRANSPOSED ? DEPTH : COLUMNS)
#define W_CHUNKS    (COLUMNS * DEPTH / CHUNK / W_ROWS)
#define W_STEP      (ITEMS / W_CHUNKS)
#define W_LOADS     (W_ROWS / W_STEP)
#define A_BYTES     (ROWS * A_CHUNKS * CHUNK_BYTES)
#define STAGE_BYTES (A_BYTES + W_ROWS * W_CHUNKS * CHUNK_BYTES)

/* The sums go to local memory in passes of so many blocks of 16 rows per warp. */
#define PASS_BLOCKS (BLOCKS_DOWN < 2 ? BLOCKS_DOWN : 2)
#define PASS_ROWS   (PASS_BLOCKS * 16)
#define SUM_STRIDE  (COLUMNS + 8) /* floats; the padding is against bank conflicts */

#define NOUNROLL _Pragma("unroll 1")

/* What a work-item carries. */
typedef struct carrier {
    bool whole; /* all chunks are aligned, and none is in use in part */
    uint a_row, a_chunk, w_row, w_chunk;
    uint a_to, w_to;                      /* places in a stage of its first chunks */
    int w_left;                           /* transposed: elements in use from its first one on */
    __global const ushort *a[A_LOADS];    /* its chunks of the first stage */
    __global const ushort *w[W_LOADS];
} carrier;

/* Rows and columns past the last one repeat it: what they give is not stored. A tile may have
 * none. */
static inline void find_rows(const problem *p, const rows *r, uint first, carrier *c) {
#if TRANSPOSED
    /* Gate and up: chunks of both take turns; with w_row 2, so do their elements. */
    const bool taking_turns = GATED && p->w_row == 1;
    const uint width = GATED && p->w_row == 2 ? CHUNK / 2 : CHUNK;
    const uint column = first + (taking_turns ? c->w_chunk / 2 : c->w_chunk) * width;
    __global const ushort *w = !GATED || (taking_turns && c->w_chunk % 2 == 1) ? p->up : p->gate;
    c->w_left = ((int)p->n - (int)column) * (int)p->w_row;
    UNROLL for (uint i = 0; i < W_LOADS; ++i)
        c->w[i] = fixed(weight_at(p, w, r->expert, column) + (c->w_row + i * W_STEP) * p->w_col);
#else
    /* Gate and up: eight columns of both take turns. */
    UNROLL for (uint i = 0; i < W_LOADS; ++i) {
        const uint row = c->w_row + i * W_STEP;
        const uint column = first + (GATED ? row / 16 * 8 + row % 8 : row);
        __global const ushort *w = GATED && row / 8 % 2 == 0 ? p->gate : p->up;
        c->w[i] = fixed(weight_at(p, w, r->expert, min(column, p->n - 1)) + c->w_chunk * CHUNK);
    }
#endif
    UNROLL for (uint i = 0; i < A_LOADS; ++i) {
        const uint slot = min(r->first + c->a_row + i * A_STEP, max(r->end, 1u) - 1);
        c->a[i] = fixed(row_of_a(p, slot) + c->a_chunk * CHUNK);
    }
}

static inline carrier carrier_of(const problem *p, const rows *r, uint first, uint item) {
    carrier c;
    const ulong places = (ulong)p->a | (ulong)p->gate | (ulong)p->up;
    const ulong strides = p->k | p->w_expert | (TRANSPOSED ? p->w_col | p->n * p->w_row : p->w_row);
    c.whole = places % CHUNK_BYTES == 0 && strides % CHUNK == 0;
    c.a_row = item / A_CHUNKS;
    c.a_chunk = item % A_CHUNKS;
    c.w_row = item / W_CHUNKS;
    c.w_chunk = item % W_CHUNKS;
    c.a_to = place(c.a_row, c.a_chunk, A_CHUNKS);
    c.w_to = A_BYTES + place(c.w_row, c.w_chunk, W_CHUNKS);
    find_rows(p, r, first, &c);
    return c;
}

/* One chunk, with zeros for what is not among the `left` elements in use. */
static inline void carry(__local uchar *tiles, bool whole, uint to, __global const ushort *from,
                         int left) {
    if (whole) {
        copy_start(tiles, to, from, left > 0 ? CHUNK_BYTES : 0);
    } else {
        ushort elements[CHUNK];
        UNROLL for (int i = 0; i < CHUNK; ++i)
            elements[i] = i < left ? from[i] : (ushort)0;
        *(__local ushort8 *)(tiles + to) = vload8(0, elements);
    }
}

/* The i-th chunks of A and of W; of A there may be fewer. */
static inline void load_chunk(const problem *p, const carrier *c, __local uchar *tiles, uint stage,
                              bool whole, uint k, uint i) {
    const uint to = stage + c->w_to + i * W_STEP * W_CHUNKS * CHUNK_BYTES;
    if (i < A_LOADS)
        carry(tiles, whole, stage + c->a_to + i * A_STEP * A_CHUNKS * CHUNK_BYTES, c->a[i] + k,
              (int)p->k - (int)(k + c->a_chunk * CHUNK));
#if TRANSPOSED
    carry(tiles, whole, to, c->w[i] + k * p->w_col,
          k + c->w_row + i * W_STEP < p->k ? c->w_left : 0);
#else
    carry(tiles, whole, to, c->w[i] + k, (int)p->k - (int)(k + c->w_chunk * CHUNK));
#endif
}

static inline void load_chunks(const problem *p, const carrier *c, __local uchar *tiles, uint stage,
                               bool whole, uint k) {
    UNROLL for (uint i = 0; i < W_LOADS; ++i)
        load_chunk(p, c, tiles, stage, whole, k, i);
}

/* Fills a stage with k from `k` on: one batch of copies, empty past the end. */
static inline void load_stage(const problem *p, const carrier *c, __local uchar *tiles, uint stage,
                              uint k) {
    if (k < p->k) {
        if (c->whole)
            load_chunks(p, c, tiles, stage, true, k);
        else
            load_chunks(p, c, tiles, stage, false, k);
    }
    copy_batch();
}

/* A warp's part of the tile: its first row and column, and where its matrices are in a stage. */
typedef struct warp_part {
    uint lane, down, row, column, a_from, w_from;
} warp_part;

static inline warp_part warp_part_of(uint item) {
    warp_part at;
    const uint warp = item / WARP, lane = item % WARP;
    at.lane = lane;
    at.down = warp % WARPS_DOWN;
    at.row = at.down * WARP_ROWS;
    at.column = warp / WARPS_DOWN * WARP_COLUMNS;
    at.a_from = place(at.row + lane % 16, lane / 16, A_CHUNKS);
#if TRANSPOSED
    at.w_from = A_BYTES + place(lane % 16, at.column / CHUNK + lane / 16, W_CHUNKS);
#else
    at.w_from = A_BYTES + place(at.column + lane / 16 * 8 + lane % 8, lane / 8 % 2, W_CHUNKS);
#endif
    return at;
}

/* The factors of a warp's part of a stage, 16 of k. */
typedef struct factors {
    uint a[BLOCKS_DOWN][4], w[BLOCKS_ACROSS][2];
} factors;

static inline void load_factors(__local const uchar *tiles, uint stage, uint k, const warp_part *at,
                                factors *f) {
    const uint chunk = k * 2 * CHUNK_BYTES;
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        load_matrices(tiles, stage + (at->a_from ^ chunk) + i * 16 * A_CHUNKS * CHUNK_BYTES,
                      f->a[i]);
    UNROLL for (uint j = 0; j < BLOCKS_ACROSS; j += 2)
#if TRANSPOSED
        load_transposed(
            tiles, stage + (at->w_from ^ (j * CHUNK_BYTES)) + k * 16 * W_CHUNKS * CHUNK_BYTES,
            f->w[j]);
#else
        load_matrices(tiles, stage + (at->w_from ^ chunk) + j * 8 * W_CHUNKS * CHUNK_BYTES,
                      f->w[j]);
#endif
}

/* A block of rows. */
static inline void multiply_block(const factors *f, uint i, float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
        multiply_add(sums[i][j], f->a[i], f->w[j]);
}

static inline void multiply(const factors *f, float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        multiply_block(f, i, sums);
}

/* The same while a stage is filled with whole chunks: what stands between products costs no time
 * of its own. */
static inline void multiply_and_load(const factors *f, const problem *p, const carrier *c,
                                     __local uchar *tiles, uint stage, uint k,
                                     float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint i = 0; i < W_LOADS; ++i) {
        if (i < BLOCKS_DOWN)
            multiply_block(f, i, sums);
        load_chunk(p, c, tiles, stage, true, k, i);
    }
    copy_batch();
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

/* Eight columns of C that a work-item stores. */
typedef struct outputs {
    uint row, column; /* in the tile */
    uint count;       /* how many columns are in use */
    float8 gate_bias, up_bias;
} outputs;

#define OUTPUT_CHUNKS (OUTPUTS / CHUNK)

static inline float8 biases_of(const problem *p, __global const STORAGE(BIAS) *bias, int expert,
                               uint column) {
    float values[CHUNK];
    UNROLL for (uint i = 0; i < CHUNK; ++i)
        values[i] = bias_at(p, bias, expert, min(column + i, p->n - 1));
    return vload8(0, values);
}

static inline outputs outputs_of(const problem *p, int expert, uint first, uint item) {
    outputs o;
    o.row = item / OUTPUT_CHUNKS;
    o.column = item % OUTPUT_CHUNKS * CHUNK;
    o.count = first + o.column < p->n ? min(p->n - first - o.column, (uint)CHUNK) : 0;
    o.gate_bias = 0.0f;
#if GATED
    o.gate_bias = biases_of(p, p->gate_bias, expert, first + o.column);
#endif
    o.up_bias = biases_of(p, p->up_bias, expert, first + o.column);
    return o;
}

/* Eight columns, of which the first `count` are in use. */
static inline void store_columns(__global ushort *to, float8 v, uint count) {
    const uint4 packed =
        (uint4)(pack(v.s0, v.s1), pack(v.s2, v.s3), pack(v.s4, v.s5), pack(v.s6, v.s7));
    if ((ulong)to % CHUNK_BYTES == 0 && count == CHUNK) {
        *(__global uint4 *)to = packed;
    } else {
        ushort elements[CHUNK];
        vstore8(as_ushort8(packed), 0, elements);
        UNROLL for (uint i = 0; i < CHUNK; ++i)
            if (i < count)
                to[i] = elements[i];
    }
}

#if ACCUMULATES
/* The first `count` of eight columns; the others: 0. */
static inline float8 load_columns(__global const ushort *from, uint count) {
    float values[CHUNK];
    UNROLL for (uint i = 0; i < CHUNK; ++i)
        values[i] = i < count ? LOAD(C, from + i) : 0.0f;
    return vload8(0, values);
}
#endif

#if KEEP_Z
/* The linear outputs of `count` columns from `column` on, in the order of z. */
static inline void store_z(const problem *p, uint slot, uint column, float8 gate, float8 up,
                           uint count) {
    __global ushort *z = row_of_z(p, slot) + column * p->z_at.step;
#if GATED
    if (p->z_at.step == 2) {
        const uint low = min(count, (uint)CHUNK / 2), high = count - low;
        store_columns(z, (float8)(gate.s0, up.s0, gate.s1, up.s1, gate.s2, up.s2, gate.s3, up.s3),
                      2 * low);
        store_columns(z + CHUNK,
                      (float8)(gate.s4, up.s4, gate.s5, up.s5, gate.s6, up.s6, gate.s7, up.s7),
                      2 * high);
        return;
    }
    store_columns(z, gate, count);
#endif
    store_columns(z + z_up(&p->z_at), up, count);
}
#endif

/* `sums` of one row of the tile -> a chunk of C, and of z. */
static inline void store_chunk(const problem *p, const outputs *o, uint slot, uint first,
                               __local const float *sums) {
    const float weight = row_weight_of(p, slot);
    const uint column = first + o->column;
    __global ushort *to = p->c + (ulong)slot * p->n + column;
#if GATED
    /* Gate's and up's sums take turns as find_rows() has it: by element, or by chunk. */
    __local const float4 *both = (__local const float4 *)(sums + 2 * o->column);
    const float4 s0 = both[0], s1 = both[1], s2 = both[2], s3 = both[3];
    const bool by_element = TRANSPOSED && p->w_row == 2;
    const float8 gate_sum =
        by_element ? (float8)(s0.even, s1.even, s2.even, s3.even) : (float8)(s0, s1);
    const float8 up_sum = by_element ? (float8)(s0.odd, s1.odd, s2.odd, s3.odd) : (float8)(s2, s3);
    const float8 gate = gemm_linear_output(p, gate_sum, o->gate_bias, weight);
#else
    __local const float4 *both = (__local const float4 *)(sums + o->column);
    const float8 gate = 0.0f, up_sum = (float8)(both[0], both[1]);
#endif
    const float8 up = gemm_linear_output(p, up_sum, o->up_bias, weight);
#if KEEP_Z
    if (p->z)
        store_z(p, slot, column, gate, up, o->count);
#endif
    float8 y = gemm_activation(p, gate, up, weight);
#if ACCUMULATES
    if (p->accumulate)
        y += load_columns(to, o->count);
#endif
    store_columns(to, y, o->count);
}

/* Stores a pass that begins at row `from` of each warp's part. */
static inline void store_pass(const problem *p, const rows *r, const outputs *o, uint first,
                              uint from, __local const float *kept) {
    NOUNROLL for (uint row = o->row; row < WARPS_DOWN * PASS_ROWS; row += ITEMS / OUTPUT_CHUNKS) {
        const uint slot = r->first + row / PASS_ROWS * WARP_ROWS + from + row % PASS_ROWS;
        if (slot < r->end && o->count > 0)
            store_chunk(p, o, slot, first, kept + row * SUM_STRIDE);
    }
}

KERNEL(ITEMS, 1, 1)
void gemm_nv_mma(GEMM_PARAMETERS) {
    __local uchar tiles[STAGES * STAGE_BYTES] __attribute__((aligned(128)));
    const problem p = GEMM_PROBLEM;
    /* Groups walk down WALK tiles of rows, then one tile of columns across. */
    const uint group = GROUP_INDEX(0, ITEMS), across = divide_up(n, OUTPUTS);
    const uint top = group / (WALK * across) * WALK, within = group % (WALK * across);
    const uint high = min(divide_up(slots, ROWS) - top, (uint)WALK);
    const uint first = within / high * OUTPUTS;
    const rows r = rows_in_use(&p, (top + within % high) * ROWS, ROWS);
    /* A tile without rows begins where k ends: it passes by the barriers and stores nothing. */
    const uint begin = r.first < r.end ? 0 : k, end_row = r.first < r.end ? WARP_ROWS : 0;
    const uint item = (uint)get_local_id(0);
    const warp_part at = warp_part_of(item);
    const carrier mine = carrier_of(&p, &r, first, item);
    float sums[BLOCKS_DOWN][BLOCKS_ACROSS][4];
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
            UNROLL for (uint v = 0; v < 4; ++v)
                sums[i][j][v] = 0.0f;
    /*
     * While products of 16 of k are under way, the factors of the next are read. Past the barrier
     * nobody reads this stage again: it is filled anew; in a loop without branches where it can be.
     */
    factors f[2];
    NOUNROLL for (uint i = 0; i < STAGES; ++i)
        load_stage(&p, &mine, tiles, i * STAGE_BYTES, begin + i * DEPTH);
    COPY_WAIT(STAGES - 1);
    barrier(CLK_LOCAL_MEM_FENCE);
    load_factors(tiles, 0, 0, &at, &f[0]);
    uint stage = 0, done = begin;
    const uint whole = ROWS == 128 && mine.whole ? k : begin;
    NOUNROLL for (; done < whole; done += DEPTH) {
        const uint next = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        UNROLL for (uint i = 0; i < DEPTH / 16 - 1; ++i) {
            load_factors(tiles, stage, i + 1, &at, &f[(i + 1) % 2]);
            multiply(&f[i % 2], sums);
        }
        COPY_WAIT(STAGES - 2);
        barrier(CLK_LOCAL_MEM_FENCE);
        load_factors(tiles, next, 0, &at, &f[0]);
        multiply_and_load(&f[1], &p, &mine, tiles, stage, done + STAGES * DEPTH, sums);
        stage = next;
    }
    NOUNROLL for (; done < k; done += DEPTH) {
        const uint next = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        UNROLL for (uint i = 0; i < DEPTH / 16 - 1; ++i) {
            load_factors(tiles, stage, i + 1, &at, &f[(i + 1) % 2]);
            multiply(&f[i % 2], sums);
        }
        COPY_WAIT(STAGES - 2);
        barrier(CLK_LOCAL_MEM_FENCE);
        load_factors(tiles, next, 0, &at, &f[0]);
        multiply(&f[1], sums);
        load_stage(&p, &mine, tiles, stage, done + STAGES * DEPTH);
        stage = next;
    }
    COPY_WAIT(0);
    const outputs o = outputs_of(&p, r.expert, first, item);
    __local float *shared = (__local float *)tiles;
    NOUNROLL for (uint from = 0; from < end_row; from += PASS_ROWS) {
        barrier(CLK_LOCAL_MEM_FENCE);
        if (from == 0)
            keep_sums(shared, &at, sums);
        else
            keep_sums(shared, &at, sums + BLOCKS_DOWN - PASS_BLOCKS);
        barrier(CLK_LOCAL_MEM_FENCE);
        store_pass(&p, &r, &o, first, from, shared);
    }
}
