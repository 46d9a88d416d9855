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
#include "routing/topk.clh"

#ifdef BITONIC

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
    TOPK_LOCAL(space);
    const uint first = get_group_id(0) * TOKENS;
    const choice_buffers at = {AT(scores) + (ulong)first * r.columns,
                               AT(select_bias),
                               AT(expert_scale),
                               AT(ids) + (ulong)first * r.top_k,
                               AT(pair_weights) + (ulong)first * r.top_k,
                               AT(live) + first,
                               (int)min((uint)TOKENS, num_tokens - first)};
    choose_best(&r, &at, &space);
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
