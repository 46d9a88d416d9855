/*
 * Purpose: Grouped GEMM for GPUs: a work-group computes ROWS rows by COLUMNS columns of two
 *          matrices of W through local memory. All experts in one launch.
 * Formula: as ref.cl. Gated: the two matrices are gate and up of the same columns. Else:
 *          COLUMNS neighbouring columns each of the one matrix. LINEAR: slices as tiled_linear.cl.
 * Arrays: as in gemm.clh.
 * NDRange: (ceil(slots / ROWS), ceil(n / (GATED ? COLUMNS : 2 * COLUMNS))) groups of
 *          (COLUMNS / 4) x (ROWS / ITEM_ROWS) work-items; each owns ITEM_ROWS rows, 4, or 8 if
 *          LARGE, by 2 x 4 columns.
 * Limits: row_tile is a multiple of ROWS; ROWS, COLUMNS and DEPTH, of k per step, are powers of
 *         two, ROWS at least 16, DEPTH at least ROWS / 16 and COLUMNS / 16, at most LINEAR_UNIT if
 *         LINEAR; local memory 4 * DEPTH * (ROWS + 2 * COLUMNS + 4) bytes, 8 * ROWS * COLUMNS more
 *         if LINEAR. LARGE: twice that; not LINEAR; ROWS and COLUMNS are at least 32; k, and where
 *         W lies along n also n, is a multiple of 4.
 * Repeatability: every sum runs over k in ascending order in one work-item, by slices if LINEAR.
 */
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"
#include "experts/gemm/tiled.clh"
#include "experts/gemm/tiled_items.clh"

/* Floats per k in local memory: A, then both matrices of W. Padded against bank conflicts when
 * elements along k are stored. */
#define LINE (ROWS + 2 * COLUMNS + TILED_ITEM)

/* With slices the loop around it is longer, and all steps at once are 3 % faster on an H200. */
#if LINEAR
#define UNROLL_DEPTH UNROLL
#else
#define UNROLL_DEPTH UNROLL_8
#endif

/* Parts of WIDTH elements that a work-item carries to local memory per step. */
#define A_ALL   (ROWS * DEPTH)
#define W_ALL   (2 * COLUMNS * DEPTH)
#define A_WIDTH WIDTH_OF(A_ALL)
#define W_WIDTH WIDTH_OF(W_ALL)
#define A_PARTS (A_ALL / ITEMS / A_WIDTH)
#define W_PARTS (W_ALL / ITEMS / W_WIDTH)

/* Along k: work-items side by side, and rows of A, or columns, from one part to the next. */
#define A_LANES (DEPTH / A_WIDTH)
#define W_LANES (DEPTH / W_WIDTH)
#define A_STEP  (ITEMS / A_LANES)
#define W_STEP  (ITEMS / W_LANES)
/* Along n: work-items side by side, and k from one part to the next. */
#define N_LANES (2 * COLUMNS / W_WIDTH)
#define N_STEP  (ITEMS / N_LANES)

/* What a work-item carries: A along k; rows past the last one are that one again. */
typedef struct a_parts {
    __global const STORAGE(A) *from[A_PARTS];
    float values[A_PARTS][A_WIDTH];
    uint depth;   /* of k in the step */
    bool aligned; /* each part is one access */
    uint to;      /* place in the tile of the first one */
} a_parts;

/* W along k, or along n for transposed W; columns past the last one are some of the others. */
typedef struct w_parts {
    __global const STORAGE(W) *from[W_PARTS];
    float values[W_PARTS][W_WIDTH];
    uint depth;
    bool aligned;
    uint to;
    bool along_k;
    uint last; /* along n: the element of a part that is the last column */
} w_parts;

static inline void find_a(const problem *p, const rows *r, uint item, a_parts *a) {
    a->depth = item % A_LANES * A_WIDTH;
    a->aligned = ALIGNED_FOURS(A, p->a, p->k);
    a->to = a->depth * LINE + item / A_LANES;
    UNROLL for (uint i = 0; i < A_PARTS; ++i) {
        const uint slot = min(r->first + item / A_LANES + i * A_STEP, r->end - 1);
        a->from[i] = r->first < r->end ? row_of_a(p, slot) + a->depth : p->a;
    }
}

static inline void find_w(const problem *p, int expert, uint first, uint item, w_parts *w) {
    const uint along = item % N_LANES * W_WIDTH;
    w->along_k = p->w_col == 1;
    w->depth = w->along_k ? item % W_LANES * W_WIDTH : item / N_LANES;
    w->aligned = ALIGNED_FOURS(W, p->up, p->w_expert) &&
                 (w->along_k ? (p->w_row | p->k) % TILED_ITEM == 0
                             : p->w_row == 1 && (p->w_col | p->n) % TILED_ITEM == 0);
#if GATED
    w->aligned = w->aligned && ALIGNED_FOURS(W, p->gate, 0);
#endif
    w->to = w->depth * LINE + ROWS + (w->along_k ? item / W_LANES : along);
    UNROLL for (uint i = 0; i < W_PARTS; ++i) {
        const uint at = w->along_k ? item / W_LANES + i * W_STEP : along;
        const uint column = first + (GATED ? at % COLUMNS : at);
        const uint depth = w->depth + (w->along_k ? 0 : i * N_STEP);
        const uint most = w->along_k ? p->n - 1 : (p->n - 1) / W_WIDTH * W_WIDTH;
        const uint here = min(column, most);
        w->last = p->n - 1 - here;
        w->from[i] = weight_at(p, GATED && at < COLUMNS ? p->gate : p->up, expert, here) +
                     depth * p->w_col;
    }
}

/* The step's elements; 0 past k. */
static inline void load_a(const problem *p, uint step, a_parts *a) {
    const uint depth = step + a->depth;
    UNROLL for (uint i = 0; i < A_PARTS; ++i) {
        UNROLL for (uint j = 0; j < A_WIDTH; ++j)
            a->values[i][j] = 0.0f;
#if HAS_FOURS(A_ALL)
        if (a->aligned && depth < p->k)
            vstore4(LOADA(A, 4, a->from[i]), 0, a->values[i]);
        else
#endif
            UNROLL for (uint j = 0; j < A_WIDTH; ++j)
                if (depth + (LARGE ? 0 : j) < p->k)
                    a->values[i][j] = LOAD(A, a->from[i] + j);
        a->from[i] += DEPTH;
    }
}

static inline void load_w(const problem *p, uint step, w_parts *w) {
    UNROLL for (uint i = 0; i < W_PARTS; ++i) {
        const uint depth = step + w->depth + (w->along_k ? 0 : i * N_STEP);
        UNROLL for (uint j = 0; j < W_WIDTH; ++j)
            w->values[i][j] = 0.0f;
#if HAS_FOURS(W_ALL)
        if (w->aligned && depth < p->k)
            vstore4(LOADA(W, 4, w->from[i]), 0, w->values[i]);
        else
#endif
        if (LARGE || w->along_k) {
            UNROLL for (uint j = 0; j < W_WIDTH; ++j)
                if (depth + (LARGE ? 0 : j) < p->k)
                    w->values[i][j] = LOAD(W, w->from[i] + j);
        } else if (depth < p->k) {
            UNROLL for (uint j = 0; j < W_WIDTH; ++j)
                w->values[i][j] = LOAD(W, w->from[i] + min(j, w->last) * p->w_row);
        }
        w->from[i] += DEPTH * p->w_col;
    }
}

static inline void keep_a(__local float *tile, const a_parts *a) {
    UNROLL for (uint i = 0; i < A_PARTS; ++i)
        UNROLL for (uint j = 0; j < A_WIDTH; ++j)
            tile[a->to + j * LINE + i * A_STEP] = a->values[i][j];
}

static inline void keep_w(__local float *tile, const w_parts *w) {
    __local float *const to = tile + w->to;
    if (w->along_k) {
        UNROLL for (uint i = 0; i < W_PARTS; ++i)
            UNROLL for (uint j = 0; j < W_WIDTH; ++j)
                to[j * LINE + i * W_STEP] = w->values[i][j];
    } else {
        UNROLL for (uint i = 0; i < W_PARTS; ++i)
#if HAS_FOURS(W_ALL)
            *(__local float4 *)(to + i * N_STEP * LINE) = vload4(0, w->values[i]);
#else
            to[i * N_STEP * LINE] = w->values[i][0];
#endif
    }
}

#if LINEAR
/* A work-item's sums of the slices before, in local memory: registers are for the current one. */
static inline void clear_totals(__local float4 *totals) {
    for (uint i = 0; i < 2 * ITEM_ROWS; ++i)
        totals[i * ITEMS] = 0.0f;
}

static inline void add_slice(__local float4 *totals, sums *s) {
    UNROLL for (uint i = 0; i < ITEM_ROWS; ++i) {
        totals[i * ITEMS] += s->of[0][i];
        totals[(ITEM_ROWS + i) * ITEMS] += s->of[1][i];
    }
    clear(s);
}

static inline void read_totals(__local const float4 *totals, sums *s) {
    UNROLL for (uint i = 0; i < ITEM_ROWS; ++i) {
        s->of[0][i] = totals[i * ITEMS];
        s->of[1][i] = totals[(ITEM_ROWS + i) * ITEMS];
    }
}
#endif

/* Stores TILED_ITEM columns of each matrix of one row, of the first from `column` on. */
static inline void store(const problem *p, int expert, uint slot, uint column, float4 sums0,
                         float4 sums1) {
    for (uint i = 0; i < TILED_ITEM; ++i, ++column) {
#if GATED
        if (column < p->n)
            gemm_store(p, expert, slot, column, sums0.x, sums1.x);
#else
        if (column < p->n)
            gemm_store(p, expert, slot, column, 0.0f, sums0.x);
        if (column + COLUMNS < p->n)
            gemm_store(p, expert, slot, column + COLUMNS, 0.0f, sums1.x);
#endif
        sums0 = sums0.yzwx;
        sums1 = sums1.yzwx;
    }
}

KERNEL(ITEMS_X, ITEMS_Y, 1)
void gemm_tiled(GEMM_PARAMETERS) {
    __local float4 tile[BUFFERS * DEPTH * LINE / TILED_ITEM];
#if LINEAR
    __local float4 totals_of_all[2 * ITEM_ROWS * ITEMS];
#endif
    const problem p = GEMM_PROBLEM;
    const rows r = rows_in_use(&p, GROUP_INDEX(0, ITEMS_X) * ROWS, ROWS);
    /* A step's elements are loaded while those of the one before are used; a tile without rows
     * passes by the barriers and stores nothing. */
    const uint end = r.first < r.end ? k + DEPTH : 0;
    const uint item = (uint)get_local_id(1) * ITEMS_X + (uint)get_local_id(0);
    const uint2 place = place_of(item);
    const uint first = GROUP_INDEX(1, ITEMS_Y) * (GATED ? COLUMNS : 2 * COLUMNS);
    a_parts next_a;
    w_parts next_w;
    sums s;
    find_a(&p, &r, item, &next_a);
    find_w(&p, r.expert, first, item, &next_w);
    clear(&s);
#if LINEAR
    __local float4 *const totals = totals_of_all + item;
    const uint slice = linear_slice(k);
    clear_totals(totals);
#endif
    uint now = 0; /* first float of the step's buffer */
    for (uint step = 0; step < end; step += DEPTH) {
        load_a(&p, step, &next_a);
        load_w(&p, step, &next_w);
        if (step > 0) {
            __local const float4 *const lines = tile + now / TILED_ITEM;
            UNROLL_DEPTH for (uint depth = 0; depth < DEPTH; ++depth)
                add_line(lines + depth * (LINE / TILED_ITEM) + place.y,
                         lines + (depth * LINE + ROWS) / TILED_ITEM + place.x, &s);
#if LINEAR
            if (step % slice == 0 || step >= k)
                add_slice(totals, &s);
#endif
        }
#if BUFFERS == 2
        now = now ? 0 : DEPTH * LINE;
#else
        barrier(CLK_LOCAL_MEM_FENCE);
#endif
        keep_a((__local float *)tile + now, &next_a);
        keep_w((__local float *)tile + now, &next_w);
        barrier(CLK_LOCAL_MEM_FENCE);
    }

#if LINEAR
    read_totals(totals, &s);
#endif
    /* By loops: few copies of the activations' code. */
    for (uint i = 0; i < ITEM_ROWS; ++i) {
        const uint slot = r.first + row_in_tile(place.y, i);
        if (slot < r.end)
            store(&p, r.expert, slot, first + place.x * TILED_ITEM, s.of[0][0], s.of[1][0]);
        next_row(&s);
    }
}
