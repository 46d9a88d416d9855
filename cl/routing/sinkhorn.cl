/*
 * Purpose: balanced choices by Sinkhorn's iteration, and the weights of what was chosen by them.
 * Formula: C = exp(l - largest l of the row), 0 where l is not finite; d1 = 1; repeat d0_t = 1/T /
 *          (sum_e C d1 + 1e-8), d1_e = 1/R / (sum_t d0 C + 1e-8), T and the sums over t without
 *          masked tokens, until the mean |change of d1| <= tolerance. The choice is d1 C: d0 is the
 *          same for a whole row. With T = 1, where d1 C is 1/R but for its rounding, it is l.
 *          Weights are s(l), softmax over the whole row.
 * Arrays: logits [T,R], l of every column, token_mask [T] or NULL -> choices [T,R], first C; tops
 *          [T,2]: the row's largest logit and sum of C. d1 [copies,R+2]: itself, whether the
 *          iteration is done, 1/T. partials [blocks,R], of sinkhorn_rounds [2,blocks,R]: sums over
 *          a block's tokens. ids [T,K], live [T] -> pair_weights [T,K]. All f32 but token_mask u8,
 *          ids and live i32.
 * NDRange: sinkhorn_start: one group. sinkhorn_exp, sinkhorn_choices: a group per token.
 *          sinkhorn_weights: a work-item per token. An iteration is sinkhorn_rows, a group per
 *          block of block_size tokens, and sinkhorn_columns, one group; or it is one launch of
 *          sinkhorn_rounds, a group per block, that begins with the end of the iteration before:
 *          each group makes d1 of all partials for itself, in a copy of its own.
 * Limits: GROUP a power of two. Once the iteration is done, later rounds change nothing.
 * Repeatability: every sum has a fixed order that depends on GROUP alone.
 */
#include "routing/router.clh"

/* Columns a work-item takes at a time. */
#if GROUP == 1
#define V 8
#else
#define V 4
#endif
/* Lanes that sum a row together, rows summed at a time, and rows between two barriers. */
#if GROUP < 32
#define LANES GROUP
#else
#define LANES 32
#endif
#define ROWS    (GROUP / LANES)
#define TILE    32
#define EPSILON 1e-8f
#define FLOATV  JOIN(float, V)

/* V logits of a row, or one; what is not finite counts as -infinity. */
static inline FLOATV finite_logits(__global const float *p) {
    FLOATV v = LOADN(f32, V, p);
    return select((FLOATV)(-INFINITY), v, isfinite(v));
}

static inline float finite_logit(float logit) {
    return isfinite(logit) ? logit : -INFINITY;
}

static inline float sum_of(FLOATV v) {
    float parts[V], sum = 0.0f;
    STOREN(f32, V, v, parts);
    for (int i = 0; i < V; i++)
        sum += parts[i];
    return sum;
}

static inline float largest_of(FLOATV v) {
    float parts[V], best = -INFINITY;
    STOREN(f32, V, v, parts);
    for (int i = 0; i < V; i++)
        best = fmax(best, parts[i]);
    return best;
}

KERNEL(GROUP, 1, 1)
void sinkhorn_start(IN(uchar, token_mask), OUT(float, d1), uint tokens, uint columns, uint copies) {
    __local uint tmp[GROUP];
    uint count = 0, all;
    d1 = AT(d1);
    for (uint t = get_local_id(0); t < tokens; t += GROUP)
        count += !token_mask || AT(token_mask)[t];
    group_scan(count, &all, tmp);
    for (uint i = get_local_id(0); i < copies * (columns + 2); i += GROUP) {
        const uint e = i % (columns + 2);
        const float per_token = 1.0f / (float)max(all, 1u);
        d1[i] = e < columns ? 1.0f : (e == columns ? 0.0f : per_token);
    }
}

KERNEL(GROUP, 1, 1)
void sinkhorn_exp(IN(float, logits), OUT(float, choices), OUT(float, tops), uint columns) {
    __local float tmp[GROUP];
    uint lane = get_local_id(0), whole = columns / V * V;
    ulong token = get_group_id(0);
    logits = AT(logits) + token * columns;
    choices = AT(choices) + token * columns;
    tops = AT(tops) + 2 * token;

    FLOATV bests = -INFINITY, sums = 0.0f;
    float best = -INFINITY, sum = 0.0f;
    for (uint e = lane * V; e < whole; e += GROUP * V)
        bests = fmax(bests, finite_logits(logits + e));
    for (uint e = whole + lane; e < columns; e += GROUP)
        best = fmax(best, finite_logit(logits[e]));
    best = group_max(fmax(best, largest_of(bests)), tmp);
    float shift = best == -INFINITY ? 0.0f : best;
    for (uint e = lane * V; e < whole; e += GROUP * V) {
        FLOATV c = exp(finite_logits(logits + e) - shift);
        sums += c;
        STOREN(f32, V, c, choices + e);
    }
    for (uint e = whole + lane; e < columns; e += GROUP) {
        float c = exp(finite_logit(logits[e]) - shift);
        sum += c;
        choices[e] = c;
    }
    sum = group_sum(sum + sum_of(sums), tmp);
    if (lane == 0) {
        tops[0] = shift;
        tops[1] = sum;
    }
}

/* This lane's part of sum C d1 over one row. */
static inline float lane_row_sum(__global const float *row, __global const float *d1, uint lane,
                                 uint columns) {
    uint whole = columns / V * V;
    FLOATV sums = 0.0f;
    float sum = 0.0f;
    for (uint e = lane * V; e < whole; e += LANES * V)
        sums += LOADN(f32, V, row + e) * LOADN(f32, V, d1 + e);
    for (uint e = whole + lane; e < columns; e += LANES)
        sum += row[e] * d1[e];
    return sum + sum_of(sums);
}

/* partials += d0 C over `rows` rows, each column by one lane. */
static inline void add_columns(__global const float *c, __local const float *d0,
                               __global float *partials, uint rows, uint columns) {
    uint lane = get_local_id(0), whole = columns / V * V;
    for (uint e = lane * V; e < whole; e += GROUP * V) {
        FLOATV sums = LOADN(f32, V, partials + e);
        for (uint row = 0; row < rows; row++)
            sums += d0[row] * LOADN(f32, V, c + (ulong)row * columns + e);
        STOREN(f32, V, sums, partials + e);
    }
    for (uint e = whole + lane; e < columns; e += GROUP) {
        float sum = partials[e];
        for (uint row = 0; row < rows; row++)
            sum += d0[row] * c[(ulong)row * columns + e];
        partials[e] = sum;
    }
}

/* The tokens of a block -> its partials [R]; nothing where the iteration is done. */
ALWAYS_INLINE void sum_block(__global const float *c, __global const uchar *token_mask,
                             __global const float *d1, __global float *partials, uint tokens,
                             uint columns, uint block_size, __local float *parts,
                             __local float *d0) {
    uint lane = get_local_id(0);
    bool done = d1[columns] != 0.0f;
    float per_token = d1[columns + 1];
    uint begin = get_group_id(0) * block_size;
    uint end = done ? begin : min(begin + block_size, tokens);

    /* The same owners as in add_columns(). */
    uint whole = done ? 0 : columns / V * V, last = done ? 0 : columns;
    for (uint e = lane * V; e < whole; e += GROUP * V)
        STOREN(f32, V, (FLOATV)(0.0f), partials + e);
    for (uint e = whole + lane; e < last; e += GROUP)
        partials[e] = 0.0f;

    for (uint tile = begin; tile < end; tile += TILE) {
        uint rows = min((uint)TILE, end - tile);
        for (uint first = 0; first < TILE; first += ROWS) {
            uint row = first + lane / LANES;
            parts[lane] = row < rows ? lane_row_sum(c + (ulong)(tile + row) * columns, d1,
                                                    lane % LANES, columns)
                                     : 0.0f;
            group_barrier(CLK_LOCAL_MEM_FENCE);
            if (lane % LANES == 0) {
                float sum = 0.0f;
                for (uint i = 0; i < LANES; i++)
                    sum += parts[lane + i];
                bool in = row < rows && (!token_mask || token_mask[tile + row]);
                d0[row] = in ? per_token / (sum + EPSILON) : 0.0f;
            }
            group_barrier(CLK_LOCAL_MEM_FENCE);
        }
        add_columns(c + (ulong)tile * columns, d0, partials, rows, columns);
        group_barrier(CLK_LOCAL_MEM_FENCE);
    }
}

/*
 * The sums of columns e on over all blocks, for work-items by vectors or, where many wait for
 * memory at once, one column each and AHEAD blocks before the first is added.
 */
#if GROUP == 1
#define AHEAD         1
#define SUM_V         V
#define SUMS          FLOATV
#define LOAD_V(p)     LOADN(f32, V, p)
#define STORE_V(v, p) STOREN(f32, V, v, p)
#else
#define AHEAD         32
#define SUM_V         1
#define SUMS          float
#define LOAD_V(p)     (*(p))
#define STORE_V(v, p) (*(p) = (v))
#endif

#define DEFINE_COLUMN_SUM(name, type, load)                                                        \
    static inline type name(__global const float *partials, uint blocks, uint columns, uint e) {   \
        type sum = 0.0f;                                                                           \
        for (uint block = 0; block < blocks; block += AHEAD) {                                     \
            type values[AHEAD];                                                                    \
            UNROLL for (uint i = 0; i < AHEAD; i++)                                                \
                values[i] = load(partials + (ulong)min(block + i, blocks - 1) * columns + e);      \
            UNROLL for (uint i = 0; i < AHEAD; i++)                                                \
                sum = block + i < blocks ? sum + values[i] : sum;                                  \
        }                                                                                          \
        return sum;                                                                                \
    }
#define LOAD_1(p) (*(p))
DEFINE_COLUMN_SUM(column_sums, SUMS, LOAD_V)
DEFINE_COLUMN_SUM(column_sum, float, LOAD_1)

/*
 * partials [blocks,R] -> d1 [R], and whether it is done; nothing where it was, or without blocks.
 * next [R] is scratch, or the first of the partials.
 */
ALWAYS_INLINE void next_columns(__global const float *partials, __global float *d1,
                                __global float *next, uint blocks, uint columns, float tolerance,
                                __local float *tmp) {
    const uint lane = get_local_id(0);
    const bool done = d1[columns] != 0.0f || blocks == 0;
    const uint last = done ? 0 : columns, summed = last / SUM_V * SUM_V, whole = last / V * V;
    const float per_column = 1.0f / (float)columns;
    float change = 0.0f;
    for (uint e = lane * SUM_V; e < summed; e += GROUP * SUM_V) {
        const SUMS d = per_column / (column_sums(partials, blocks, columns, e) + EPSILON);
        STORE_V(d, next + e);
    }
    for (uint e = summed + lane; e < last; e += GROUP)
        next[e] = per_column / (column_sum(partials, blocks, columns, e) + EPSILON);
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint e = lane * V; e < whole; e += GROUP * V) {
        const FLOATV d = LOADN(f32, V, next + e);
        change += sum_of(fabs(d - LOADN(f32, V, d1 + e)));
        STOREN(f32, V, d, d1 + e);
    }
    for (uint e = whole + lane; e < last; e += GROUP) {
        change += fabs(next[e] - d1[e]);
        d1[e] = next[e];
    }
    change = group_sum(change, tmp);
    if (lane == 0 && !done)
        d1[columns] = change / (float)columns <= tolerance ? 1.0f : 0.0f;
    group_barrier(CLK_GLOBAL_MEM_FENCE);
}

KERNEL(GROUP, 1, 1)
void sinkhorn_rows(IN(float, c), IN(uchar, token_mask), IN(float, d1), OUT(float, partials),
                   uint tokens, uint columns, uint block_size) {
    __local float parts[GROUP], d0[TILE];
    partials = AT(partials) + (ulong)get_group_id(0) * columns;
    sum_block(AT(c), GIVEN(token_mask), AT(d1), partials, tokens, columns, block_size, parts, d0);
}

KERNEL(GROUP, 1, 1)
void sinkhorn_columns(OUT(float, partials), OUT(float, d1), uint blocks, uint columns,
                      float tolerance) {
    __local float tmp[GROUP];
    next_columns(AT(partials), AT(d1), AT(partials), blocks, columns, tolerance, tmp);
}

/*
 * Rounds first ... first + rounds - 1, several of one block alone. Even and odd ones have partials
 * of their own, as groups of a round still read those of the round before.
 */
KERNEL(GROUP, 1, 1)
void sinkhorn_rounds(IN(float, c), IN(uchar, token_mask), OUT(float, d1), OUT(float, partials),
                     uint tokens, uint columns, uint block_size, uint blocks, float tolerance,
                     uint first, uint rounds) {
    __local float parts[GROUP], d0[TILE];
    const ulong all = (ulong)blocks * columns, mine = (ulong)get_group_id(0) * columns;
    d1 = AT(d1) + (ulong)get_group_id(0) * (columns + 2);
    partials = AT(partials);
    for (uint round = first; round < first + rounds; round++) {
        __global const float *before = partials + (round % 2 ? 0 : all);
        __global float *to = partials + (round % 2 ? all : 0) + mine;
        next_columns(before, d1, to, round > 0 ? blocks : 0, columns, tolerance, parts);
        sum_block(AT(c), GIVEN(token_mask), d1, to, tokens, columns, block_size, parts, d0);
        group_barrier(CLK_GLOBAL_MEM_FENCE);
    }
}

KERNEL(GROUP, 1, 1)
void sinkhorn_choices(IN(float, logits), IN(float, d1), OUT(float, choices), uint columns) {
    ulong row = (ulong)get_group_id(0) * columns;
    logits = AT(logits) + row;
    choices = AT(choices) + row;
    d1 = AT(d1);
    const bool alone = d1[columns + 1] == 1.0f; /* 1/T */
    for (uint e = get_local_id(0); e < columns; e += GROUP) {
        float choice = alone ? logits[e] : choices[e] * d1[e];
        choices[e] = isfinite(logits[e]) ? choice : -INFINITY;
    }
}

KERNEL(GROUP, 1, 1)
void sinkhorn_weights(IN(float, logits), IN(float, tops), IN(float, expert_scale), IN(int, ids),
                      IN(int, live), OUT(float, pair_weights), uint tokens, router_switches r) {
    ulong token = get_global_id(0);
    if (token >= tokens)
        return;
    logits = AT(logits) + token * r.columns;
    ids = AT(ids) + token * r.top_k;
    pair_weights = AT(pair_weights) + token * r.top_k;
    tops = AT(tops) + 2 * token;
    int count = AT(live)[token];
    for (int k = 0; k < count; k++) {
        float logit = logits[ids[k]];
        pair_weights[k] =
            r.score == SCORE_SOFTMAX ? exp(logit - tops[0]) / tops[1] : score_of(r.score, logit);
    }
    if (!r.renorm_late)
        renorm_and_scale(&r, GIVEN(expert_scale), ids, pair_weights,
                         count);
}
