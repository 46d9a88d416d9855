/*
 * Purpose: Gradients of weights for GPUs: a work-group computes ROWS rows by 2 * COLUMNS columns of
 *          an expert's gradient through local memory. All experts in one launch.
 * Formula: as ref_gradient.cl. SLICED: one dense problem, whose slots are cut into slices of
 *          gradient_slice(slots); the partial sum of slice i is "expert" i of C, to be added by
 *          slices_add.cl.
 * Arrays: as in gradient.clh. SLICED: no offsets.
 * NDRange: (ceil(n / (2 * COLUMNS)), ceil(m / ROWS), E, or slices) groups of (COLUMNS / 4) x
 *          (ROWS / ITEM_ROWS) work-items; each owns ITEM_ROWS rows, 4, or 8 if LARGE, by 2 x 4
 *          columns.
 * Limits: ROWS, COLUMNS and DEPTH, of slots per step, are powers of two, ROWS at least 16, DEPTH at
 *         least ROWS / 16 and COLUMNS / 16; local memory 4 * DEPTH * (ROWS + 2 * COLUMNS) bytes.
 *         LARGE: twice that; ROWS and COLUMNS are at least 32; m and n are multiples of 4.
 * Repeatability: one work-item sums over an expert's slots, or a slice, in ascending order.
 */
#include "experts/gemm/gradient.clh"
#include "experts/gemm/slices.clh"
#include "experts/gemm/tiled.clh"
#include "experts/gemm/tiled_items.clh"

#define LINE (ROWS + 2 * COLUMNS) /* floats of a slot in local memory: P, then Q */

/* Parts of WIDTH elements that a work-item carries to local memory per step: work-items side by
 * side have neighbours of a slot, the next part is STEP slots on. */
#define P_ALL   (ROWS * DEPTH)
#define Q_ALL   (2 * COLUMNS * DEPTH)
#define P_WIDTH WIDTH_OF(P_ALL)
#define Q_WIDTH WIDTH_OF(Q_ALL)
#define P_LANES (ROWS / P_WIDTH)
#define Q_LANES (2 * COLUMNS / Q_WIDTH)
#define P_STEP  (ITEMS / P_LANES)
#define Q_STEP  (ITEMS / Q_LANES)
#define P_PARTS (DEPTH / P_STEP)
#define Q_PARTS (DEPTH / Q_STEP)

/* What a work-item carries of P, and of Q. */
typedef struct p_parts {
    __global const STORAGE(P) *from; /* its columns in row 0; past the last one some others */
    uint rows[P_PARTS];
    float values[P_PARTS][P_WIDTH];
    uint slot;    /* of the first part in the step */
    uint last;    /* the element of a part that is the last column */
    bool aligned; /* each part is one access */
} p_parts;

typedef struct q_parts {
    __global const STORAGE(Q) *from;
    uint rows[Q_PARTS];
    float values[Q_PARTS][Q_WIDTH];
    uint slot, last;
    bool aligned;
} q_parts;

static inline void find_p(const gradient *g, uint first, uint item, p_parts *p) {
    const uint column = min(first + item % P_LANES * P_WIDTH, (g->m - 1) / P_WIDTH * P_WIDTH);
    p->from = g->p + column;
    p->slot = item / P_LANES;
    p->last = g->m - 1 - column;
    p->aligned = ALIGNED_FOURS(P, g->p, g->p_row | g->m);
}

static inline void find_q(const gradient *g, uint first, uint item, q_parts *q) {
    const uint column = min(first + item % Q_LANES * Q_WIDTH, (g->n - 1) / Q_WIDTH * Q_WIDTH);
    q->from = g->q + column;
    q->slot = item / Q_LANES;
    q->last = g->n - 1 - column;
    q->aligned = ALIGNED_FOURS(Q, g->q, g->q_row | g->n);
}

/* The rows of the step that begins with `slot`: before its elements, which wait for them. */
static inline void find_rows(const gradient *g, uint slot, uint end, p_parts *p, q_parts *q) {
    UNROLL for (uint i = 0; i < P_PARTS; ++i) {
        const uint at = slot + p->slot + i * P_STEP;
        p->rows[i] = g->p_gathered && at < end ? (uint)g->token_of[at] : at;
    }
    UNROLL for (uint i = 0; i < Q_PARTS; ++i) {
        const uint at = slot + q->slot + i * Q_STEP;
        q->rows[i] = g->q_gathered && at < end ? (uint)g->token_of[at] : at;
    }
}

/* The step's elements; 0 behind the last slot. */
static inline void load_p(const gradient *g, uint slot, uint end, p_parts *p) {
    UNROLL for (uint i = 0; i < P_PARTS; ++i) {
        __global const STORAGE(P) *const from = p->from + (ulong)p->rows[i] * g->p_row;
        const bool in = slot + p->slot + i * P_STEP < end;
        UNROLL for (uint j = 0; j < P_WIDTH; ++j)
            p->values[i][j] = 0.0f;
#if HAS_FOURS(P_ALL)
        if (p->aligned && in)
            vstore4(LOADA(P, 4, from), 0, p->values[i]);
        else
#endif
        if (in) {
            UNROLL for (uint j = 0; j < P_WIDTH; ++j)
                p->values[i][j] = LOAD(P, from + (LARGE ? j : min(j, p->last)));
        }
    }
}

static inline void load_q(const gradient *g, uint slot, uint end, q_parts *q) {
    UNROLL for (uint i = 0; i < Q_PARTS; ++i) {
        __global const STORAGE(Q) *const from = q->from + (ulong)q->rows[i] * g->q_row;
        const bool in = slot + q->slot + i * Q_STEP < end;
        UNROLL for (uint j = 0; j < Q_WIDTH; ++j)
            q->values[i][j] = 0.0f;
#if HAS_FOURS(Q_ALL)
        if (q->aligned && in)
            vstore4(LOADA(Q, 4, from), 0, q->values[i]);
        else
#endif
        if (in) {
            UNROLL for (uint j = 0; j < Q_WIDTH; ++j)
                q->values[i][j] = LOAD(Q, from + (LARGE ? j : min(j, q->last)));
        }
    }
}

static inline void keep(__local float *tile, uint item, const p_parts *p, const q_parts *q) {
    __local float *const p_to = tile + p->slot * LINE + item % P_LANES * P_WIDTH;
    __local float *const q_to = tile + q->slot * LINE + ROWS + item % Q_LANES * Q_WIDTH;
    UNROLL for (uint i = 0; i < P_PARTS; ++i)
#if HAS_FOURS(P_ALL)
        *(__local float4 *)(p_to + i * P_STEP * LINE) = vload4(0, p->values[i]);
#else
        p_to[i * P_STEP * LINE] = p->values[i][0];
#endif
    UNROLL for (uint i = 0; i < Q_PARTS; ++i)
#if HAS_FOURS(Q_ALL)
        *(__local float4 *)(q_to + i * Q_STEP * LINE) = vload4(0, q->values[i]);
#else
        q_to[i * Q_STEP * LINE] = q->values[i][0];
#endif
}

/* Stores TILED_ITEM columns of one row of C. */
static inline void store(const gradient *g, uint matrix, uint row, uint column, float4 sums) {
    float each[TILED_ITEM];
    vstore4(sums, 0, each);
    for (uint i = 0; i < TILED_ITEM && column + i < g->n; ++i)
        gradient_store(g, matrix, row, column + i, each[i]);
}

KERNEL(ITEMS_X, ITEMS_Y, 1)
void gradient_tiled(GRADIENT_PARAMETERS) {
    __local float4 tile[BUFFERS * DEPTH * LINE / TILED_ITEM];
    const gradient g = GRADIENT_PROBLEM;
    const uint item = (uint)get_local_id(1) * ITEMS_X + (uint)get_local_id(0);
    const uint2 place = place_of(item);
    const uint matrix = (uint)get_global_id(2);
    const uint first_row = (uint)get_global_id(1) / ITEMS_Y * ROWS;
    const uint first_column = (uint)get_global_id(0) / ITEMS_X * (2 * COLUMNS);
#if SLICED
    const uint2 slots_in_use = slots_of_slice(slots, matrix);
#else
    const uint2 slots_in_use = slots_of(&g, matrix);
#endif
    const uint begin = slots_in_use.x, end = slots_in_use.y;
    /* A step's elements are loaded while those of the one before are used. */
    const uint behind = begin < end ? end + DEPTH : begin;
    p_parts next_p;
    q_parts next_q;
    sums s;
    find_p(&g, first_row, item, &next_p);
    find_q(&g, first_column, item, &next_q);
    find_rows(&g, begin, end, &next_p, &next_q);
    clear(&s);
    uint now = 0; /* first float of the step's buffer */
    for (uint step = begin; step < behind; step += DEPTH) {
        load_p(&g, step, end, &next_p);
        load_q(&g, step, end, &next_q);
        find_rows(&g, step + DEPTH, end, &next_p, &next_q);
        if (step > begin) {
            __local const float4 *const lines = tile + now / TILED_ITEM;
            UNROLL_8 for (uint depth = 0; depth < DEPTH; ++depth)
                add_line(lines + depth * (LINE / TILED_ITEM) + place.y,
                         lines + (depth * LINE + ROWS) / TILED_ITEM + place.x, &s);
        }
#if BUFFERS == 2
        now = now ? 0 : DEPTH * LINE;
#else
        barrier(CLK_LOCAL_MEM_FENCE);
#endif
        keep((__local float *)tile + now, item, &next_p, &next_q);
        barrier(CLK_LOCAL_MEM_FENCE);
    }

    UNROLL for (uint i = 0; i < ITEM_ROWS; ++i) {
        const uint row = first_row + row_in_tile(place.y, i);
        const uint column = first_column + place.x * TILED_ITEM;
        if (row >= m)
            continue;
        store(&g, matrix, row, column, s.of[0][i]);
        store(&g, matrix, row, column + COLUMNS, s.of[1][i]);
    }
}
