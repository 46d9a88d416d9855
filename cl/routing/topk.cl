/*
 * Purpose: the K best experts of each token, and their combine weights.
 * Formula: choice = score + select_bias; a key is (choice as ordered bits, inverted id), so that
 *          the order is by choice, ties to the lower id. With group limits, only experts of the
 *          best topk_groups groups keep their choice; the others count as -infinity. Weights come
 *          from the unbiased scores, see router.clh.
 *          With CUTOFF instead: the (K+1)-th best choice, NaN where that is not finite.
 * Arrays: scores [T,R], select_bias [R] or NULL, expert_scale [R] or NULL -> ids [T,K], weights
 *          [T,K], live [T] (leading pairs with a finite choice; the rest have weight 0).
 *          CUTOFF: scores [T,R], select_bias [R] -> cutoffs [T] f32.
 * NDRange: topk_bitonic, cutoff_bitonic: TOKENS tokens per group of GROUP work-items. With LANES,
 *          each token has LANES work-items that sort KEEP columns at a time in registers and merge
 *          their runs pairwise; without, CHUNK keys at a time are sorted in local memory.
 *          topk_select, cutoff_select, for CPUs: one work-item per token bisects for the K-th best
 *          choice and ranks what is not below it, both by vectors.
 * Limits: CHUNK, KEEP, LANES powers of two, K <= KEEP <= CHUNK, K < KEEP for cutoffs, KEEP <
 *          CHUNK if R > CHUNK; COLUMNS a multiple of 16, R <= COLUMNS; GROUPS is the number of
 *          groups, 0 without group limits. Local memory: see topk_bytes() in topk.c.
 * Repeatability: integer keys; weights are summed in the order of choice by one work-item.
 */
#ifdef BITONIC
#define WEIGHTS_SPACE __local
#endif
#include "routing/router.clh"

#define FINITE_CHOICE 0x00800000u /* ordered_bits(-INFINITY) + 1 */

static inline uint choice_bits(float choice) {
    return ordered_bits(isnan(choice) ? -INFINITY : choice);
}

static inline ulong key_of(uint bits, uint id) {
    return ((ulong)bits << 32) | (0xFFFFFFFFu - id);
}

static inline uint key_id(ulong key) {
    return 0xFFFFFFFFu - (uint)key;
}

static inline bool key_is_live(ulong key) {
    return (uint)(key >> 32) >= FINITE_CHOICE;
}

static inline float choice_of(__global const float *scores, __global const float *select_bias,
                              int e) {
    return select_bias ? scores[e] + select_bias[e] : scores[e];
}

/* Best, or sum of the two best, choices of group g of one token. */
static inline float group_choice(const router_switches *r, __global const float *scores,
                          __global const float *select_bias, int g) {
    int size = r->columns / r->num_groups;
    float first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; e++) {
        float choice = choice_of(scores, select_bias, e);
        if (choice > first) {
            second = first;
            first = choice;
        } else if (choice > second) {
            second = choice;
        }
    }
    return r->group_top2 && size > 1 ? first + second : first;
}

/* Whether group g is among the topk_groups best of choices [num_groups], ties to the lower one. */
#define DEFINE_GROUP_IS_IN(name, space)                                                            \
    static inline bool name(const router_switches *r, space const float *choices, int g) {         \
        int better = 0;                                                                            \
        for (int other = 0; other < r->num_groups; other++)                                        \
            better += choices[other] > choices[g] || (choices[other] == choices[g] && other < g);  \
        return better < r->topk_groups;                                                            \
    }

/* The weight of a choice before renorm and scale. */
static inline float chosen_weight(__global const float *scores, ulong key) {
    return key_is_live(key) ? scores[key_id(key)] : 0.0f;
}

/* The choice of the (K+1)-th best key. */
static inline float cutoff_of(__global const float *scores, __global const float *select_bias,
                              ulong key) {
    return key_is_live(key) ? choice_of(scores, select_bias, (int)key_id(key)) : NAN;
}

#ifdef BITONIC

DEFINE_GROUP_IS_IN(group_is_in, __local)

#define ITEMS (GROUP / TOKENS) /* work-items of a token */

#if GROUPS > 0
/* Fills taking_part [TOKENS, GROUPS] with whether a group takes part; choices is such scratch. */
void choose_groups(const router_switches *r, __global const float *scores,
                                 __global const float *select_bias, int tokens,
                                 __local float *choices, __local uchar *taking_part) {
    const uint item = get_local_id(0), part = item % ITEMS;
    const int token = item / ITEMS;
    scores += (ulong)token * r->columns;
    choices += token * GROUPS;
    for (int g = part; token < tokens && g < GROUPS; g += ITEMS)
        choices[g] = group_choice(r, scores, select_bias, g);
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (int g = part; token < tokens && g < GROUPS; g += ITEMS)
        taking_part[token * GROUPS + g] = group_is_in(r, choices, g);
    group_barrier(CLK_LOCAL_MEM_FENCE);
}
#endif

/* The tokens of a group, and what their keys are made of. */
typedef struct token_keys {
    __global const float *scores, *select_bias;
    __local const uchar *taking_part;
    int tokens, columns;
} token_keys;

/* The key of column e of a token; past the last token or column, one below all others. */
static inline ulong key_at(const token_keys *of, int token, int e) {
    if (token >= of->tokens || e >= of->columns)
        return 0;
    float choice = choice_of(of->scores + (ulong)token * of->columns, of->select_bias, e);
#if GROUPS > 0
    if (!of->taking_part[token * GROUPS + e / (of->columns / GROUPS)])
        choice = -INFINITY;
#endif
    return key_of(choice_bits(choice), (uint)e);
}

#ifdef LANES

#define TMP_SLOTS (TOKENS * LANES / 2)
#define TMP_KEYS  (TMP_SLOTS > 0 ? KEEP * TMP_SLOTS : 1)

/* Without min() and max(): Intel's compiler for CPUs crashes on 16 keys that are sorted by them. */
static inline void order(ulong *better, ulong *other) {
    const ulong a = *better, b = *other;
    *better = a > b ? a : b;
    *other = a > b ? b : a;
}

/* Bitonic to descending. */
static inline void merge_keys(ulong *x) {
    UNROLL for (int stride = KEEP / 2; stride > 0; stride /= 2)
        UNROLL for (int i = 0; i < KEEP; i++)
            if ((i & stride) == 0)
                order(&x[i], &x[i + stride]);
}

static inline void sort_keys(ulong *x) {
    UNROLL for (int size = 2; size <= KEEP; size *= 2)
        UNROLL for (int stride = size / 2; stride > 0; stride /= 2)
            UNROLL for (int i = 0; i < KEEP; i++)
                if ((i & stride) == 0 && (i & size) == 0)
                    order(&x[i], &x[i + stride]);
                else if ((i & stride) == 0)
                    order(&x[i + stride], &x[i]);
}

/* The better half of two descending runs, descending. */
static inline void keep_better(ulong *x, const ulong *other) {
    UNROLL for (int i = 0; i < KEEP; i++)
        x[i] = max(x[i], other[KEEP - 1 - i]);
    merge_keys(x);
}

/* LANES work-items a token: each keeps the best KEEP of its columns, then one run of two stays. */
void choose(const token_keys *of, __local ulong *tmp, __local ulong *best) {
    const uint lane = get_local_id(0), token = lane / LANES;
    const uint part = token < TOKENS ? lane % LANES : LANES;
    ulong mine[KEEP], other[KEEP];
    UNROLL for (int i = 0; i < KEEP; i++)
        mine[i] = part < LANES ? key_at(of, token, part + i * LANES) : 0;
    sort_keys(mine);
    for (int next = LANES * KEEP; next < of->columns; next += LANES * KEEP) {
        UNROLL for (int i = 0; i < KEEP; i++)
            other[i] = part < LANES ? key_at(of, token, next + part + i * LANES) : 0;
        sort_keys(other);
        keep_better(mine, other);
    }
    for (uint width = LANES / 2; width > 0; width /= 2) {
        const uint slot = token * (LANES / 2) + part % width;
        if (part >= width && part < 2 * width)
            UNROLL for (int i = 0; i < KEEP; i++)
                tmp[i * TMP_SLOTS + slot] = mine[i];
        group_barrier(CLK_LOCAL_MEM_FENCE);
        if (part < width) {
            UNROLL for (int i = 0; i < KEEP; i++)
                other[i] = tmp[i * TMP_SLOTS + slot];
            keep_better(mine, other);
        }
        group_barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (part == 0)
        UNROLL for (int i = 0; i < KEEP; i++)
            best[token * KEEP + i] = mine[i];
    group_barrier(CLK_LOCAL_MEM_FENCE);
}

#else

#define TMP_KEYS (TOKENS * CHUNK)

/* Sorts TOKENS independent runs of CHUNK keys, descending. */
void sort_keys(__local ulong *keys) {
    for (int size = 2; size <= CHUNK; size *= 2)
        for (int stride = size / 2; stride > 0; stride /= 2) {
            for (uint i = get_local_id(0); i < TOKENS * CHUNK / 2; i += GROUP) {
                uint low = 2 * i - (i & (stride - 1));
                ulong a = keys[low], b = keys[low + stride];
                bool descending = ((low & (CHUNK - 1)) & size) == 0;
                if (descending ? a < b : a > b) {
                    keys[low] = b;
                    keys[low + stride] = a;
                }
            }
            group_barrier(CLK_LOCAL_MEM_FENCE);
        }
}

/* CHUNK columns at a time, of which the best KEEP stay. */
void choose(const token_keys *of, __local ulong *tmp, __local ulong *best) {
    for (int next = 0, kept = 0; next < of->columns; next += CHUNK - kept, kept = KEEP) {
        for (uint i = get_local_id(0); i < TOKENS * CHUNK; i += GROUP)
            if (i % CHUNK >= (uint)kept)
                tmp[i] = key_at(of, i / CHUNK, next + i % CHUNK - kept);
        group_barrier(CLK_LOCAL_MEM_FENCE);
        sort_keys(tmp);
    }
    for (uint i = get_local_id(0); i < TOKENS * KEEP; i += GROUP)
        best[i] = tmp[i / KEEP * CHUNK + i % KEEP];
    group_barrier(CLK_LOCAL_MEM_FENCE);
}

#endif

#ifdef CUTOFF

KERNEL(GROUP, 1, 1)
void cutoff_bitonic(IN(float, scores), IN(float, select_bias), OUT(float, cutoffs),
                    uint num_tokens, router_switches r) {
    __local ulong tmp[TMP_KEYS], best[TOKENS * KEEP];
    uint first = get_group_id(0) * TOKENS;
    int tokens = (int)min((uint)TOKENS, num_tokens - first);
    scores = AT(scores) + (ulong)first * r.columns;
    select_bias = AT(select_bias);
    cutoffs = AT(cutoffs) + first;
    token_keys of = {scores, select_bias, 0, tokens, r.columns};
    choose(&of, tmp, best);
    for (int token = get_local_id(0); token < tokens; token += GROUP)
        cutoffs[token] = cutoff_of(scores + (ulong)token * r.columns, select_bias,
                                   best[token * KEEP + r.top_k]);
}

#else

KERNEL(GROUP, 1, 1)
void topk_bitonic(IN(float, scores), IN(float, select_bias), IN(float, expert_scale), OUT(int, ids),
                  OUT(float, pair_weights), OUT(int, live), uint num_tokens, router_switches r) {
    __local ulong tmp[TMP_KEYS], best[TOKENS * KEEP];
    __local int chosen[TOKENS * KEEP];
    __local float raw[TOKENS * KEEP];
    uint first = get_group_id(0) * TOKENS;
    int tokens = (int)min((uint)TOKENS, num_tokens - first);
    scores = AT(scores) + (ulong)first * r.columns;
    select_bias = AT(select_bias);
    expert_scale = AT(expert_scale);
    ids = AT(ids) + (ulong)first * r.top_k;
    pair_weights = AT(pair_weights) + (ulong)first * r.top_k;
    live = AT(live) + first;

    token_keys of = {scores, select_bias, 0, tokens, r.columns};
#if GROUPS > 0
    __local float choices[TOKENS * GROUPS];
    __local uchar taking_part[TOKENS * GROUPS];
    choose_groups(&r, scores, select_bias, tokens, choices, taking_part);
    of.taking_part = taking_part;
#endif
    choose(&of, tmp, best);

    for (uint i = get_local_id(0); i < (uint)tokens * KEEP; i += GROUP) {
        const int token = i / KEEP, k = i % KEEP;
        if (k >= r.top_k)
            continue;
        chosen[token * r.top_k + k] = (int)key_id(best[i]);
        raw[token * r.top_k + k] = chosen_weight(scores + (ulong)token * r.columns, best[i]);
    }
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (int token = get_local_id(0); token < tokens; token += GROUP) {
        int count = 0;
        while (count < r.top_k && key_is_live(best[token * KEEP + count]))
            count++;
        live[token] = count;
        token_weights(&r, scores + (ulong)token * r.columns, expert_scale,
                      chosen + token * r.top_k, raw + token * r.top_k, count);
    }
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (int i = get_local_id(0); i < tokens * r.top_k; i += GROUP) {
        ids[i] = chosen[i];
        pair_weights[i] = raw[i];
    }
}

#endif

#else

DEFINE_GROUP_IS_IN(group_is_in, __private)

#define BITS_VECTORS (COLUMNS / 16)
#define KEY_VECTORS  (KEEP / 8 + 1) /* with room for one key more */

/* Bits of all choices of a token -> bits [COLUMNS]; those behind R are below all others. */
static inline void read_choices(const router_switches *r, __global const float *scores,
                                __global const float *select_bias, uint *bits) {
    float group_choices[COLUMNS], choices[COLUMNS];
    const int columns = r->columns, groups = r->num_groups;
    const int size = groups > 0 ? columns / groups : 0;
    for (int e = 0; e < columns; e++)
        choices[e] = scores[e];
    if (select_bias) /* outside of the loop: masked vectors of loads from NULL are slow */
        for (int e = 0; e < columns; e++)
            choices[e] += select_bias[e];
    for (int g = 0; g < groups; g++)
        group_choices[g] = group_choice(r, scores, select_bias, g);
    for (int g = 0; g < groups; g++)
        if (!group_is_in(r, group_choices, g))
            for (int e = g * size; e < (g + 1) * size; e++)
                choices[e] = -INFINITY;
    for (int e = 0; e < columns; e++)
        bits[e] = choice_bits(choices[e]);
    for (int e = columns; e < COLUMNS; e++)
        bits[e] = 0;
}

/* How many of `vectors` of bits are not below `bound`. */
static inline int count_from(const uint16 *bits, int vectors, uint bound) {
    int16 negative = 0; /* true is -1 in a vector */
    int lanes[16], count = 0;
    for (int i = 0; i < vectors; i++)
        negative += bits[i] >= bound;
    vstore16(negative, 0, lanes);
    for (int j = 0; j < 16; j++)
        count -= lanes[j];
    return count;
}

/* The K best of bits [COLUMNS], by ascending id -> keys. */
static inline void find_keys(int top_k, const uint16 *vectors, ulong *keys) {
    /* Not below `low` are at least K, not below `high` are `above` < K, until one bound parts K. */
    uint low = ordered_bits(-INFINITY), high = UINT_MAX;
    int above = 0;
    while (above < top_k && high - low > 1) {
        const uint middle = low + (high - low) / 2;
        const int count = count_from(vectors, BITS_VECTORS, middle);
        if (count > top_k) {
            low = middle;
        } else {
            high = middle;
            above = count;
        }
    }
    int found = 0, equals = top_k - above; /* of those at `low`, the first */
    for (int i = 0; i < BITS_VECTORS; i++) {
        if (count_from(&vectors[i], 1, above < top_k ? low : high) == 0)
            continue;
        const uint *bits = (const uint *)&vectors[i];
        for (int j = 0; j < 16; j++) {
            const bool equal = bits[j] == low && equals > 0;
            keys[found] = key_of(bits[j], (uint)(16 * i + j));
            found += equal || bits[j] >= high;
            equals -= equal;
        }
    }
}

#ifdef CUTOFF

KERNEL(1, 1, 1)
void cutoff_select(IN(float, scores), IN(float, select_bias), OUT(float, cutoffs), uint num_tokens,
                   router_switches r) {
    uint16 bits[BITS_VECTORS];
    ulong8 vectors[KEY_VECTORS];
    const ulong *keys = (const ulong *)vectors;
    ulong token = get_global_id(0), last = ULONG_MAX;
    if (token >= num_tokens) return; /* never, as in topk_select */
    scores = AT(scores) + token * r.columns;
    select_bias = AT(select_bias);
    for (int i = 0; i < KEY_VECTORS; i++)
        vectors[i] = 0;
    read_choices(&r, scores, select_bias, (uint *)bits);
    find_keys(r.top_k + 1, bits, (ulong *)vectors);
    for (int k = 0; k <= r.top_k; k++)
        last = min(last, keys[k]);
    AT(cutoffs)[token] = cutoff_of(scores, select_bias, last);
}

#else

/* Keys [K] -> best [K], descending. */
static inline void rank_keys(int top_k, const ulong8 *vectors, ulong *best) {
    const ulong *keys = (const ulong *)vectors;
    long8 negative[KEY_VECTORS]; /* ranks: how many keys are above */
    for (int i = 0; i < KEY_VECTORS; i++) {
        negative[i] = 0;
        for (int k = 0; k < top_k; k++)
            negative[i] += keys[k] > vectors[i];
    }
    for (int k = 0; k < top_k; k++)
        best[-((const long *)negative)[k]] = keys[k];
}

KERNEL(1, 1, 1)
void topk_select(IN(float, scores), IN(float, select_bias), IN(float, expert_scale), OUT(int, ids),
                 OUT(float, pair_weights), OUT(int, live), uint num_tokens, router_switches r) {
    uint16 bits[BITS_VECTORS];
    ulong8 keys[KEY_VECTORS];
    ulong best[KEEP];
    ulong token = get_global_id(0);
    /*
     * Never taken. Without a branch on its id, PoCL 7.1 puts barriers into a lone work-item's loops
     * and then runs what is behind them twice.
     */
    if (token >= num_tokens) return;
    scores = AT(scores) + token * r.columns;
    select_bias = AT(select_bias);
    expert_scale = AT(expert_scale);
    ids = AT(ids) + token * r.top_k;
    pair_weights = AT(pair_weights) + token * r.top_k;

    for (int i = 0; i < KEY_VECTORS; i++)
        keys[i] = 0;
    read_choices(&r, scores, select_bias, (uint *)bits);
    find_keys(r.top_k, bits, (ulong *)keys);
    rank_keys(r.top_k, keys, best);

    int count = 0;
    for (int k = 0; k < r.top_k; k++) {
        ids[k] = (int)key_id(best[k]);
        pair_weights[k] = chosen_weight(scores, best[k]);
        count += key_is_live(best[k]);
    }
    AT(live)[token] = count;
    token_weights(&r, scores, expert_scale, ids, pair_weights, count);
}

#endif

#endif
