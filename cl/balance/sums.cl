/*
 * Purpose: what a batch adds up to, for statistics and losses: importance, weights and counts by
 *          expert, entropy, confidence and logsumexp of the tokens; per sequence if asked.
 * Formula: see balance.h: p = s(l) / sum s(l) over R, from the noisy logits. Which sums are asked
 *          for is a bit each in shape.asked.
 * Arrays: logits [T,R] that p is made of, noisy [T,R] (the same but for two levels), ranks [T,R]
 *          or NULL: what fresh and first choices are the best of, clean [T,R], noise_raw [T,R] (the
 *          last two for the smooth load alone), token_mask, live, token_offsets, state or NULL;
 *          ids, weight_ids, pair_weights [pairs], rows [T] token_row, see sums_rows.cl -> partial
 *          [blocks] and sums [Q, and one of the batch if Q > 1] records, see balance.clh.
 * NDRange: sums_blocks: (groups by what they sum, blocks), V columns a work-item, or of the tokens
 *          one group per device group, one for invalid ids, one for the scalars. sums_reduce:
 *          (words of a record, records), a word a work-item.
 * Limits: GROUP a power of two; with GROUP 1 V is 16.
 * Repeatability: a work-item owns what it sums, and adds in the order of tokens and blocks, with
 *          the rounding error carried along; blocks follow from the tokens alone.
 * Structs come back through pointers: of returned ones LLVM makes what Oclgrind does not know.
 */
#include "balance/balance.clh"
#include "dispatch/pairs.clh"

/* Whether columns e ... e + V - 1 are among the chosen, from their ordered values. */
static inline INTV is_chosen(UINTV order, uint kth, uint last_tie, uint e) {
    INTV first_ties = AS_INTV((UINTV)(e)) + LANE_COLUMNS <= (INTV)((int)last_tie);
    return ((order > kth) | ((order == kth) & first_ties)) & (order > 0u);
}

typedef struct token_range {
    uint begin, end;
} token_range;

/* The tokens of a block. */
static inline void block_tokens(const sums_shape *s, uint block, token_range *range) {
    uint sequence = block / s->blocks_each;
    uint begin = sequence * s->sequence + (block - sequence * s->blocks_each) * s->block;
    range->begin = begin;
    range->end = min(min(begin + s->block, (sequence + 1) * s->sequence), s->tokens);
}

/* Phi((l - thr) / sigma), sigma 0 included: the smooth load of a token. */
static inline FLOATV smooth_load(FLOATV clean, FLOATV threshold, FLOATV sigma) {
    FLOATV z = (clean - threshold) / sigma;
    FLOATV hard = clean > threshold ? (FLOATV)(1.0f) : (FLOATV)(0.0f);
    return sigma > 0.0f ? 0.5f * erfc(-0.70710678118654752f * z) : hard;
}

/* Tokens, and pairs of a token, that are read before the first of them is added. */
#if GROUP == 1
#define AHEAD 1
#else
#define AHEAD 8
#endif

/* What sums over the columns are made of. */
typedef struct column_view {
    __global const float *logits, *noisy, *clean, *noise_raw, *ranks;
    __global const token_row *rows;
    __global const state_header *state;
    float temperature;
} column_view;

/* Sums over the tokens of a block, of one work-item's columns. */
typedef struct block_sums {
    FLOATV normalised, raw, softmax, smooth;                     /* by source */
    FLOATV normalised_lost, raw_lost, softmax_lost, smooth_lost; /* see ADD_CAREFULLY */
    UINTV fresh;
} block_sums;

/* The smooth loads of AHEAD tokens from `first` on, up to `last`. */
static inline void add_smooth(const sums_shape *s, const column_view *in, uint first, uint last,
                              const bool *known, uint e, block_sums *b) {
    const uint R = s->columns;
    FLOATV noisy[AHEAD], clean[AHEAD];
    UNROLL for (uint i = 0; i < AHEAD; i++) {
        const ulong at = (ulong)min(first + i, last) * R;
        noisy[i] = load_columns(in->noisy + at, e, R, -INFINITY);
        clean[i] = load_columns(in->clean + at, e, R, -INFINITY);
    }
    UNROLL for (uint i = 0; i < AHEAD; i++) {
        const uint token = min(first + i, last);
        __global const token_row *t = in->rows + token;
        const UINTV order = ordered_columns(noisy[i]);
        const FLOATV threshold = is_chosen(order, t->kth, t->last_tie, e)
                                     ? (FLOATV)(float_of_order(t->next))
                                     : (FLOATV)(float_of_order(t->kth));
        __global const float *raw = in->noise_raw ? in->noise_raw + (ulong)token * R : 0;
        const FLOATV value =
            smooth_load(clean[i], threshold, noise_deviation(s, in->state, raw, e));
        if (known[i])
            ADD_CAREFULLY(FLOATV, b->smooth, b->smooth_lost,
                          order > 0u ? value : (FLOATV)(0.0f));
    }
}

static inline void add_fresh(const sums_shape *s, const column_view *in, uint first, uint last,
                             const bool *known, uint e, block_sums *b) {
    const uint R = s->columns;
    UNROLL for (uint i = 0; i < AHEAD; i++) {
        const uint token = min(first + i, last);
        __global const token_row *t = in->rows + token;
        const UINTV order =
            ordered_columns(load_columns(in->ranks + (ulong)token * R, e, R, -INFINITY));
        const INTV chosen = is_chosen(order, t->fresh_kth, t->fresh_last_tie, e);
        if (known[i])
            b->fresh += chosen ? (UINTV)(1u) : (UINTV)(0u);
    }
}

/* The same of what is made of l'. */
static inline void add_probabilities(const sums_shape *s, const router_switches *r,
                                     const column_view *in, uint first, uint last,
                                     const bool *known, uint e, block_sums *b) {
    const uint R = s->columns;
    const FLOATV none = (FLOATV)(0.0f);
    FLOATV l[AHEAD], score[AHEAD];
    float best[AHEAD], scores[AHEAD], total[AHEAD];
    UNROLL for (uint i = 0; i < AHEAD; i++) {
        const uint token = min(first + i, last);
        best[i] = in->rows[token].best;
        scores[i] = in->rows[token].scores;
        total[i] = in->rows[token].total;
        l[i] = load_columns(in->logits + (ulong)token * R, e, R, -INFINITY);
    }
    UNROLL for (uint i = 0; i < AHEAD; i++) {
        l[i] = prepared_columns(r, in->temperature, l[i]);
        score[i] = score_columns(r, best[i], l[i]);
    }
    if (s->asked & SUM_BIT(SUM_NORMALISED))
        UNROLL for (uint i = 0; i < AHEAD; i++)
            if (known[i] && scores[i] != 0.0f)
                ADD_CAREFULLY(FLOATV, b->normalised, b->normalised_lost, score[i] / scores[i]);
    if (s->asked & SUM_BIT(SUM_RAW))
        UNROLL for (uint i = 0; i < AHEAD; i++) {
            const FLOATV value = is_softmax(r) ? l[i] : score[i];
            if (known[i])
                ADD_CAREFULLY(FLOATV, b->raw, b->raw_lost,
                              l[i] == -INFINITY ? none : value * s->raw_scale);
        }
    if (s->asked & SUM_BIT(SUM_SOFTMAX))
        UNROLL for (uint i = 0; i < AHEAD; i++)
            if (known[i])
                ADD_CAREFULLY(FLOATV, b->softmax, b->softmax_lost,
                              l[i] == -INFINITY ? none : exp(l[i] - best[i]) / total[i]);
}

/* The sums over a block's tokens of columns e ... e + V - 1 -> its record. */
static inline void sum_block_columns(const sums_shape *s, const router_switches *r,
                                     const column_view *in, token_range range, uint e,
                                     __global uint *record) {
    const uint R = s->columns;
    const FLOATV none = (FLOATV)(0.0f);
    __global float *sums = (__global float *)record;
    block_sums b = {none, none, none, none, none, none, none, none, (UINTV)(0u)};
    if (e >= R)
        return;
    for (uint first = range.begin; first < range.end; first += AHEAD) {
        const uint last = range.end - 1;
        bool known[AHEAD];
        UNROLL for (uint i = 0; i < AHEAD; i++) {
            __global const token_row *t = in->rows + min(first + i, last);
            known[i] = first + i <= last && (t->flags & TOKEN_UNMASKED) && t->best != -INFINITY;
        }
        add_probabilities(s, r, in, first, last, known, e, &b);
        if (s->asked & COUNT_BIT(COUNT_FRESH))
            add_fresh(s, in, first, last, known, e, &b);
        if (s->asked & SUM_BIT(SUM_SMOOTH))
            add_smooth(s, in, first, last, known, e, &b);
    }
    store_columns(sums + SUM_NORMALISED * R, e, R, b.normalised);
    store_columns(sums + SUM_RAW * R, e, R, b.raw);
    store_columns(sums + SUM_SOFTMAX * R, e, R, b.softmax);
    store_columns(sums + SUM_SMOOTH * R, e, R, b.smooth);
    store_counts(record + count_at(s, COUNT_FRESH), e, R, b.fresh);
}

/* What sums over the pairs are made of. */
typedef struct pair_view {
    __global const int *ids, *weight_ids;
    __global const float *pair_weights;
    __global const token_row *rows;
} pair_view;

/* The same of the pairs. */
static inline void sum_block_pairs(const sums_shape *s, const token_owner *owner,
                                   const pair_view *in, token_range range, uint e,
                                   __global uint *record) {
    const uint R = s->columns;
    const INTV column = (INTV)((int)e) + LANE_COLUMNS;
    const FLOATV none = (FLOATV)(0.0f);
    const bool weighs = s->asked & SUM_BIT(SUM_WEIGHTS);
    FLOATV sum = none, lost = none;
    UINTV assigned = (UINTV)(0u), firsts = (UINTV)(0u);
    if (e >= R)
        return;
    for (uint token = range.begin; token < range.end; token++) {
        const uint2 pairs = real_pairs(owner, token);
        for (uint first = pairs.x; first < pairs.y; first += AHEAD) {
            int ids[AHEAD], weight_ids[AHEAD];
            float weights[AHEAD];
            UNROLL for (uint i = 0; i < AHEAD; i++) {
                const uint pair = min(first + i, pairs.y - 1);
                ids[i] = in->ids[pair];
                weight_ids[i] = weighs ? in->weight_ids[pair] : 0;
                weights[i] = weighs ? in->pair_weights[pair] : 0.0f;
            }
            UNROLL for (uint i = 0; i < AHEAD; i++) {
                const INTV match = column == (INTV)(ids[i]);
                const INTV weighed = column == (INTV)(weight_ids[i]);
                if (first + i < pairs.y)
                    assigned += match ? (UINTV)(1u) : (UINTV)(0u);
                if (first + i < pairs.y && weighs)
                    ADD_CAREFULLY(FLOATV, sum, lost, weighed ? (FLOATV)(weights[i]) : none);
            }
        }
        if (s->asked & COUNT_BIT(COUNT_FIRST) && pairs.x < pairs.y)
            firsts += column == (INTV)(in->rows[token].first) ? (UINTV)(1u) : (UINTV)(0u);
    }
    store_columns((__global float *)record + SUM_WEIGHTS * R, e, R, sum);
    store_counts(record + count_at(s, COUNT_ASSIGNED), e, R, assigned);
    store_counts(record + count_at(s, COUNT_FIRST), e, R, firsts);
}

/* This lane's part of the tokens of the range with a pair in device group [low, high). */
static inline uint tokens_in_group(const token_owner *owner, __global const int *ids,
                                   token_range range, int low, int high) {
    uint count = 0;
    for (uint token = range.begin + get_local_id(0); token < range.end; token += GROUP) {
        uint2 pairs = real_pairs(owner, token);
        bool in = false;
        for (uint pair = pairs.x; pair < pairs.y; pair++)
            in = in || (ids[pair] >= low && ids[pair] < high);
        count += in;
    }
    return count;
}

/* This lane's part of the pairs of the range whose id is no column. */
static inline uint invalid_ids(const token_owner *owner, __global const int *ids, token_range range,
                               uint columns) {
    uint count = 0;
    for (uint token = range.begin + get_local_id(0); token < range.end; token += GROUP) {
        uint2 pairs = real_pairs(owner, token);
        for (uint pair = pairs.x; pair < pairs.y; pair++)
            count += (uint)ids[pair] >= columns;
    }
    return count;
}

/* What the scalars are sums of: fetched is [SCALAR_TERMS,GROUP]. */
#define SCALAR_TERMS 5
#define SCALAR_TERMS_OF(t)                                                                         \
    (float4)(fetched[t], fetched[GROUP + (t)], fetched[2 * GROUP + (t)], fetched[3 * GROUP + (t)])

/*
 * Each lane fetches a token, then one lane adds them up, in the order of tokens. `scalars`
 * may be NULL: nothing is written.
 */
void sum_scalars(__global const token_row *rows, token_range range, __local float *fetched,
                 __local uint *tmp, __global uint *scalars) {
    uint lane = get_local_id(0), tokens = 0, nonfinite = 0;
    float4 sum = (float4)(0.0f), lost = (float4)(0.0f);
    float soft = 0.0f, soft_lost = 0.0f;
    for (uint first = range.begin; first < range.end; first += GROUP) {
        if (first + lane < range.end) {
            token_row row = rows[first + lane];
            tokens += (row.flags & TOKEN_UNMASKED) != 0;
            nonfinite += (row.flags & TOKEN_NONFINITE) != 0;
            fetched[lane] = row.entropy;
            fetched[GROUP + lane] = row.confidence;
            fetched[2 * GROUP + lane] = ldexp(row.lse, -LOGIT_POWER);
            fetched[3 * GROUP + lane] = row.lse * row.lse;
            fetched[4 * GROUP + lane] = row.soft_entropy;
        }
        group_barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = 0; lane == 0 && i < min((uint)GROUP, range.end - first); i++) {
            ADD_CAREFULLY(float4, sum, lost, SCALAR_TERMS_OF(i));
            ADD_CAREFULLY(float, soft, soft_lost, fetched[4 * GROUP + i]);
        }
        group_barrier(CLK_LOCAL_MEM_FENCE);
    }
    tokens = group_total(tokens, tmp);
    nonfinite = group_total(nonfinite, tmp);
    if (lane > 0 || !scalars)
        return;
    scalars[SCALAR_TOKENS] = tokens;
    scalars[SCALAR_NONFINITE] = nonfinite;
    scalars[SCALAR_SEQUENCES] = 0;
    scalars[SCALAR_ENTROPY] = as_uint(sum.x);
    scalars[SCALAR_SOFT_ENTROPY] = as_uint(soft);
    scalars[SCALAR_CONFIDENCE] = as_uint(sum.y);
    scalars[SCALAR_LSE] = as_uint(sum.z);
    scalars[SCALAR_LSE_SQUARED] = as_uint(sum.w);
}

/* The part of a group: a count of a device group or of invalid ids, or the scalars; or none. */
void sum_block_tokens(const sums_shape *s, const token_owner *owner, __global const int *ids,
                      __global const token_row *rows, token_range range, uint part,
                      __local float *fetched, __local uint *tmp, __global uint *record) {
    const uint groups = s->asked & DEVICE_BIT ? s->device_groups : 0;
    const token_range mine = {range.begin, part == groups + 1 ? range.end : range.begin};
    uint count = 0, place = scalars_at(s) + SCALAR_INVALID;
    if (part < groups) {
        int each = (int)(s->experts / groups), low = (int)part * each;
        count = tokens_in_group(owner, ids, range, low, low + each);
        place = devices_at(s) + part;
    } else if (part == groups && s->asked & INVALID_BIT) {
        count = invalid_ids(owner, ids, range, s->columns);
    }
    count = group_total(count, tmp);
    if (get_local_id(0) == 0 && part <= groups)
        record[place] = count;
    __global uint *scalars = part == groups + 1 ? record + scalars_at(s) : 0;
    sum_scalars(rows, mine, fetched, tmp, scalars);
}

/*
 * Groups along a block's columns, first column_groups for what is made of logits, then pair_groups
 * for pairs, then those of the tokens. All at once, as each alone waits for memory.
 */
KERNEL(GROUP, 1, 1)
void sums_blocks(IN(float, logits), IN(float, noisy), IN(float, clean), IN(float, noise_raw),
                 IN(float, ranks), IN(int, ids), IN(int, weight_ids), IN(float, pair_weights),
                 IN(int, live), IN(uchar, token_mask), IN(int, token_offsets), IN(uint, state),
                 IN(float, rows), OUT(uint, partial), sums_shape s, router_switches r,
                 uint column_groups, uint pair_groups) {
    __local float fetched[SCALAR_TERMS * GROUP];
    __local uint tmp[GROUP];
    __global const token_row *row = (__global const token_row *)AT(rows);
    __global const state_header *header = STATE_OF(state);
    const token_owner owner = OWNER_INIT(s.top_k, s.pairs, s.token_pairs);
    const uint group = get_group_id(0), behind = column_groups + pair_groups;
    const uint first = group < column_groups ? group : group - column_groups;
    const uint e = (first * GROUP + get_local_id(0)) * V;
    token_range range;
    __global uint *record = AT(partial) + (ulong)get_group_id(1) * record_words(&s);
    const column_view columns = {AT(logits), AT(noisy), AT(clean), GIVEN(noise_raw), AT(ranks),
                                 row,        header,    temperature_of(&r, header)};
    const pair_view pairs = {AT(ids), AT(weight_ids), AT(pair_weights), row};
    block_tokens(&s, get_group_id(1), &range);
    if (group < column_groups)
        sum_block_columns(&s, &r, &columns, range, e, record);
    else if (group < behind)
        sum_block_pairs(&s, &owner, &pairs, range, e, record);
    sum_block_tokens(&s, &owner, AT(ids), row, range, group < behind ? UINT_MAX : group - behind,
                     fetched, tmp, record);
}

/* Sequences of [first, end) with an unmasked token. */
static inline uint unmasked_sequences(const sums_shape *s, __global const uint *partial, uint first,
                                  uint end) {
    uint count = 0;
    for (uint sequence = first; sequence < end; sequence++) {
        uint tokens = 0;
        UNROLL_8 for (uint i = 0; i < s->blocks_each; i++)
            tokens += partial[(ulong)(sequence * s->blocks_each + i) * record_words(s) +
                              scalars_at(s) + SCALAR_TOKENS];
        count += tokens > 0;
    }
    return count;
}

KERNEL(GROUP, 1, 1)
void sums_reduce(IN(uint, partial), OUT(uint, sums), sums_shape s) {
    uint word = get_group_id(0) * GROUP + get_local_id(0), record = get_group_id(1);
    uint words = record_words(&s), whole = batch_record(&s);
    uint first = record == whole ? 0 : record, end = record == whole ? s.sequences : record + 1;
    if (word >= words)
        return;
    uint kind = min(word / s.columns, (uint)(SUM_SOURCES + COUNT_SOURCES));
    bool asked = word >= scalars_at(&s) || (s.asked & (1u << kind));
    bool is_float = word < SUM_SOURCES * s.columns || word >= scalars_at(&s) + SCALAR_ENTROPY;
    uint count = 0, last = end * s.blocks_each;
    float sum = 0.0f, lost = 0.0f;
    partial = AT(partial);
    for (uint block = first * s.blocks_each; asked && block < last; block += AHEAD) {
        uint values[AHEAD];
        UNROLL for (uint i = 0; i < AHEAD; i++)
            values[i] = partial[(ulong)min(block + i, last - 1) * words + word];
        UNROLL for (uint i = 0; i < AHEAD; i++) {
            if (block + i < last && is_float)
                ADD_CAREFULLY(float, sum, lost, as_float(values[i]));
            else if (block + i < last)
                count += values[i];
        }
    }
    if (word == scalars_at(&s) + SCALAR_SEQUENCES)
        count = unmasked_sequences(&s, partial, first, end);
    AT(sums)[(ulong)record * words + word] = is_float ? as_uint(sum) : count;
}
