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
 * A stage in local memory: a row per slot of P with ROWS elements, then one of Q with as many. They
 * are moved in chunks of 16 bytes; per stage a work-item carries the same chunk of every STEP-th
 * row of both, which are as many as its warp has blocks of rows of C.
 */
#define CHUNK       8 /* elements */
#define CHUNKS      (ROWS / CHUNK)
#define STEP        (ITEMS / CHUNKS)
#define LOADS       (DEPTH / STEP)
#define SIDE_BYTES  (DEPTH * CHUNKS * CHUNK_BYTES)
#define STAGE_BYTES (2 * SIDE_BYTES)

#define NOUNROLL _Pragma("unroll 1")

/* In an expert, groups walk down WALK tiles of rows, then one tile of columns across. */
static inline uint2 place_of_tile(const gradient *g, uint tile) {
    const uint down = divide_up(g->m, ROWS), across = divide_up(g->n, COLUMNS);
    const uint top = tile / (WALK * across) * WALK, within = tile % (WALK * across);
    const uint high = min(down - top, (uint)WALK);
    return (uint2)((top + within % high) * ROWS, within / high * COLUMNS);
}

/* What a work-item carries. */
typedef struct carrier {
    bool whole;                   /* all chunks are aligned, and none is in use in part */
    uint slot, end;               /* its first slot of the next stage, the end of the expert's */
    uint to;                      /* place in a stage of its first chunk of P */
    int p_left, q_left;           /* elements in use from its chunk's first one on */
    __global const ushort *p, *q; /* its chunk of row 0 */
    uint rows[LOADS];             /* gathered rows of the next stage */
} carrier;

/* The gathered rows of the next stage; past the end again the last one. */
static inline void find_rows(const gradient *g, carrier *c) {
    if (g->p_gathered | g->q_gathered) {
        UNROLL for (uint i = 0; i < LOADS; ++i)
            c->rows[i] = (uint)g->token_of[min(c->slot + i * STEP, c->end - 1)];
    }
}

static inline carrier carrier_of(const gradient *g, uint2 slots, uint2 tile, uint item) {
    carrier c;
    const ulong places = (ulong)g->p | (ulong)g->q;
    const uint2 column = tile + item % CHUNKS * CHUNK;
    c.whole = places % CHUNK_BYTES == 0 && (g->p_row | g->q_row | g->m | g->n) % CHUNK == 0;
    c.slot = slots.x + item / CHUNKS;
    c.end = slots.y;
    c.to = place(item / CHUNKS, item % CHUNKS, CHUNKS);
    c.p_left = (int)g->m - (int)column.x;
    c.q_left = (int)g->n - (int)column.y;
    c.p = fixed(g->p + column.x);
    c.q = fixed(g->q + column.y);
    UNROLL for (uint i = 0; i < LOADS; ++i)
        c.rows[i] = 0;
    if (slots.x < slots.y)
        find_rows(g, &c);
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

/* Where the chunks of a stage are, and how many of their elements are in use. */
typedef struct sources {
    __global const ushort *p[LOADS], *q[LOADS];
    int p_left[LOADS], q_left[LOADS];
} sources;

/* Row `row` of `bytes` each, in one instruction. */
static inline __global const ushort *row_from(__global const ushort *first, uint row, uint bytes) {
    return (__global const ushort *)((__global const uchar *)first + (ulong)row * bytes);
}

/* Those of the next stage, which then is the one after it. */
static inline sources next_sources(const gradient *g, carrier *c) {
    sources s;
    UNROLL for (uint i = 0; i < LOADS; ++i) {
        const uint slot = c->slot + i * STEP;
        s.p[i] = row_from(c->p, g->p_gathered ? c->rows[i] : slot, 2 * g->p_row);
        s.q[i] = row_from(c->q, g->q_gathered ? c->rows[i] : slot, 2 * g->q_row);
        s.p_left[i] = slot < c->end ? c->p_left : 0;
        s.q_left[i] = slot < c->end ? c->q_left : 0;
    }
    c->slot += DEPTH;
    find_rows(g, c);
    return s;
}

/* The i-th chunks of P and of Q. */
static inline void load_chunks(const sources *s, uint i, __local uchar *tiles, uint to,
                               bool whole) {
    carry(tiles, whole, to + i * STEP * CHUNKS * CHUNK_BYTES, s->p[i], s->p_left[i]);
    carry(tiles, whole, to + i * STEP * CHUNKS * CHUNK_BYTES + SIDE_BYTES, s->q[i], s->q_left[i]);
}

/* Fills a stage, with zeros past the end: one batch of copies. */
static inline void load_stage(const carrier *c, const sources *s, __local uchar *tiles,
                              uint stage) {
    if (c->whole) {
        UNROLL for (uint i = 0; i < LOADS; ++i)
            load_chunks(s, i, tiles, stage + c->to, true);
    } else {
        UNROLL for (uint i = 0; i < LOADS; ++i)
            load_chunks(s, i, tiles, stage + c->to, false);
    }
    copy_batch();
}

/* A warp's part of the tile: its first row and column, and where its matrices are in a stage. */
typedef struct warp_part {
    uint lane, row, column, p_from, q_from;
} warp_part;

static inline warp_part warp_part_of(uint item) {
    warp_part at;
    const uint warp = item / WARP, lane = item % WARP;
    at.lane = lane;
    at.row = warp % WARPS_DOWN * WARP_ROWS;
    at.column = warp / WARPS_DOWN * WARP_COLUMNS;
    at.p_from = place(lane / 16 * 8 + lane % 8, at.row / CHUNK + lane / 8 % 2, CHUNKS);
    at.q_from = SIDE_BYTES + place(lane % 16, at.column / CHUNK + lane / 16, CHUNKS);
    return at;
}

/* The factors of a warp's part of a stage, 16 slots. */
typedef struct factors {
    uint p[BLOCKS_DOWN][4], q[BLOCKS_ACROSS][2];
} factors;

static inline void load_factors(__local const uchar *tiles, uint stage, uint k, const warp_part *at,
                                factors *f) {
    const uint from = stage + k * 16 * CHUNKS * CHUNK_BYTES;
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        load_transposed(tiles, from + (at->p_from ^ (i * 2 * CHUNK_BYTES)), f->p[i]);
    UNROLL for (uint j = 0; j < BLOCKS_ACROSS; j += 2)
        load_transposed(tiles, from + (at->q_from ^ (j * CHUNK_BYTES)), f->q[j]);
}

/* A block of rows. */
static inline void multiply(const factors *f, uint i, float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
        multiply_add(sums[i][j], f->p[i], f->q[j]);
}

static inline void multiply_all(const factors *f, float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        multiply(f, i, sums);
}

/*
 * Products of 16 slots, while the sources of the next stage are found, or while chunks of it are
 * loaded: what stands between products costs no time of its own.
 */
static inline sources multiply_and_find(const factors *f, const gradient *g, carrier *c,
                                        float (*sums)[BLOCKS_ACROSS][4]) {
    multiply(f, 0, sums);
    const sources s = next_sources(g, c);
    UNROLL for (uint i = 1; i < BLOCKS_DOWN; ++i)
        multiply(f, i, sums);
    return s;
}

static inline void multiply_and_load(const factors *f, const sources *s, __local uchar *tiles,
                                     uint to, float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i) {
        multiply(f, i, sums);
        load_chunks(s, i, tiles, to, true);
    }
    copy_batch();
}

/*
 * How a lane's sums become 16 bytes of a row of C: those of TOGETHER blocks of 8 columns, of which
 * four lanes hold two columns each, are exchanged among the four.
 */
#define WORDS    4
#define TOGETHER (OUTPUTS / 2)

/* Exchanges *low of the lanes with `bit` for *high of those without. */
static inline void exchange(uint *low, uint *high, uint lane, uint bit) {
    const bool with = (lane & bit) != 0;
    const uint got = of_other_lane(with ? *low : *high, bit);
    *low = with ? got : *low;
    *high = with ? *high : got;
}

/* Its own inverse. Words of f32 are two per block, and of a block a lane gets half. */
static inline void exchange_all(uint *words, uint lane) {
#if OUTPUTS == 4
    exchange(words, words + 2, lane, 1);
    exchange(words + 1, words + 3, lane, 1);
#else
    exchange(words, words + 1, lane, 1);
    exchange(words + 2, words + 3, lane, 1);
    exchange(words, words + 2, lane, 2);
    exchange(words + 1, words + 3, lane, 2);
#endif
}

/* The column that a lane's 16 bytes begin with. */
static inline uint column_of_lane(uint lane) {
    return OUTPUTS == 4 ? lane % 2 * 8 + lane % 4 / 2 * 4 : lane % 4 * 8;
}

/* Words of TOGETHER blocks, of the lane's upper row with `low` 0, of the lower one with 2. */
static inline void add_words(const uint *words, float (*sums)[4], uint low) {
    UNROLL for (uint b = 0; b < TOGETHER; ++b) {
#if OUTPUTS == 4
        const float2 v = (float2)(as_float(words[2 * b]), as_float(words[2 * b + 1]));
#else
        const float2 v = unpack(words[b]);
#endif
        sums[b][low] += v.x;
        sums[b][low + 1] += v.y;
    }
}

static inline void words_of(float (*sums)[4], uint low, uint *words) {
    UNROLL for (uint b = 0; b < TOGETHER; ++b) {
#if OUTPUTS == 4
        words[2 * b] = as_uint(sums[b][low]);
        words[2 * b + 1] = as_uint(sums[b][low + 1]);
#else
        words[b] = pack(sums[b][low], sums[b][low + 1]);
#endif
    }
}

/* Adds to a block of rows what C, from a lane's first place on, holds. */
static inline void add_old(const gradient *g, __global const STORAGE(C) *c, uint lane,
                           float (*sums)[4]) {
    uint4 old[2][BLOCKS_ACROSS / TOGETHER];
    UNROLL for (uint side = 0; side < 2; ++side)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS / TOGETHER; ++j)
            old[side][j] =
                *(__global const uint4 *)(c + side * 8 * g->c_row + j * TOGETHER * 8);
    UNROLL for (uint side = 0; side < 2; ++side)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS / TOGETHER; ++j) {
            const uint4 v = old[side][j];
            uint words[WORDS] = {v.x, v.y, v.z, v.w};
            exchange_all(words, lane);
            add_words(words, sums + j * TOGETHER, 2 * side);
        }
}

/* A warp's part that is aligned and all in use. */
static inline void store_whole(const gradient *g, __global STORAGE(C) *c, uint lane,
                               float (*sums)[BLOCKS_ACROSS][4]) {
    c += lane / 4 * g->c_row + column_of_lane(lane);
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i) {
        __global STORAGE(C) *const block = c + i * 16 * g->c_row;
        if (g->accumulate)
            add_old(g, block, lane, sums[i]);
        UNROLL for (uint side = 0; side < 2; ++side)
            UNROLL for (uint j = 0; j < BLOCKS_ACROSS / TOGETHER; ++j) {
                uint words[WORDS];
                words_of(sums[i] + j * TOGETHER, 2 * side, words);
                exchange_all(words, lane);
                *(__global uint4 *)(block + side * 8 * g->c_row + j * TOGETHER * 8) =
                    (uint4)(words[0], words[1], words[2], words[3]);
            }
    }
}

/* Two neighbouring elements, the second only if it is in use. */
static inline void store_pair(const gradient *g, __global STORAGE(C) *c, float2 v, bool both) {
#if OUTPUTS == 4
    if (g->accumulate)
        v += (float2)(c[0], both ? c[1] : 0.0f);
    c[0] = v.x;
    if (both)
        c[1] = v.y;
#else
    if (g->accumulate)
        v += unpack((uint)c[0] | (both ? (uint)c[1] << 16 : 0u));
    const uint packed = pack(v.x, v.y);
    c[0] = (ushort)packed;
    if (both)
        c[1] = (ushort)(packed >> 16);
#endif
}

/* Any part: `row` and `column` are those of the lane's first sum. */
static inline void store_pairs(const gradient *g, __global STORAGE(C) *c, uint row, uint column,
                               float (*sums)[BLOCKS_ACROSS][4]) {
    UNROLL for (uint i = 0; i < 2 * BLOCKS_DOWN; ++i)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
            if (row + i * 8 < g->m && column + j * 8 < g->n) {
                const float *v = sums[i / 2][j] + i % 2 * 2;
                store_pair(g, c + i * 8 * g->c_row + j * 8, (float2)(v[0], v[1]),
                           column + j * 8 + 1 < g->n);
            }
}

static inline void store_part(const gradient *g, uint expert, uint2 tile, const warp_part *at,
                              float (*sums)[BLOCKS_ACROSS][4]) {
    const uint row = tile.x + at->row, column = tile.y + at->column, lane = at->lane;
    __global STORAGE(C) *const c = g->c + expert * g->c_expert + row * g->c_row + column;
    if ((ulong)c % CHUNK_BYTES == 0 && g->c_row % OUTPUTS == 0 && row + WARP_ROWS <= g->m &&
        column + WARP_COLUMNS <= g->n)
        store_whole(g, c, lane, sums);
    else
        store_pairs(g, c + lane / 4 * g->c_row + lane % 4 * 2, row + lane / 4,
                    column + lane % 4 * 2, sums);
}

KERNEL(ITEMS, 1, 1)
void gradient_nv_mma(GRADIENT_PARAMETERS) {
    __local uchar tiles[STAGES * STAGE_BYTES] __attribute__((aligned(128)));
    const gradient g = GRADIENT_PROBLEM;
    const uint count = divide_up(m, ROWS) * divide_up(n, COLUMNS);
    const uint group = (uint)(get_global_id(0) / ITEMS), expert = group / count;
    const uint2 tile = place_of_tile(&g, group % count), slots_in_use = slots_of(&g, expert);
    const uint item = (uint)get_local_id(0), begin = slots_in_use.x, end = slots_in_use.y;
    const warp_part at = warp_part_of(item);
    carrier mine = carrier_of(&g, slots_in_use, tile, item);
    float sums[BLOCKS_DOWN][BLOCKS_ACROSS][4];
    UNROLL for (uint i = 0; i < BLOCKS_DOWN; ++i)
        UNROLL for (uint j = 0; j < BLOCKS_ACROSS; ++j)
            UNROLL for (uint v = 0; v < 4; ++v)
                sums[i][j][v] = 0.0f;

    /*
     * While the products of 16 slots are under way, the factors of the next are read. Past the
     * barrier nobody reads this stage again: it is filled anew. The loop of whole chunks has no
     * branches. An expert without slots passes by both.
     */
    factors f[2];
    NOUNROLL for (uint i = 0; i < (begin < end ? STAGES : 0); ++i) {
        const sources from = next_sources(&g, &mine);
        load_stage(&mine, &from, tiles, i * STAGE_BYTES);
    }
    COPY_WAIT(STAGES - 1);
    barrier(CLK_LOCAL_MEM_FENCE);
    load_factors(tiles, 0, 0, &at, &f[0]);
    uint stage = 0, slot = begin;
    NOUNROLL for (const uint whole = mine.whole ? end : begin; slot < whole; slot += DEPTH) {
        const uint next = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        load_factors(tiles, stage, 1, &at, &f[1]);
        const sources from = multiply_and_find(&f[0], &g, &mine, sums);
        COPY_WAIT(STAGES - 2);
        barrier(CLK_LOCAL_MEM_FENCE);
        load_factors(tiles, next, 0, &at, &f[0]);
        multiply_and_load(&f[1], &from, tiles, stage + mine.to, sums);
        stage = next;
    }
    NOUNROLL for (; slot < end; slot += DEPTH) {
        const uint next = stage == (STAGES - 1) * STAGE_BYTES ? 0 : stage + STAGE_BYTES;
        load_factors(tiles, stage, 1, &at, &f[1]);
        const sources from = multiply_and_find(&f[0], &g, &mine, sums);
        COPY_WAIT(STAGES - 2);
        barrier(CLK_LOCAL_MEM_FENCE);
        load_factors(tiles, next, 0, &at, &f[0]);
        multiply_all(&f[1], sums);
        load_stage(&mine, &from, tiles, stage);
        stage = next;
    }
    COPY_WAIT(0);
    if (!accumulate || begin < end)
        store_part(&g, expert, tile, &at, sums);
}
