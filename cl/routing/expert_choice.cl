/*
 * Purpose: each expert takes its C best tokens.
 * Formula: a key is the score as ordered bits, 0 for a masked token or a score that is not finite.
 *          The threshold of an expert is (bits, limit): a token is taken if its key is larger than
 *          bits, or equal and the token is below limit. It is the C-th best key, or 1 if there are
 *          fewer, by radix select from the high digit down; limit follows from how many of the
 *          equal ones are still wanted, so that ties go to the lower token.
 * Arrays: scores [T,R], token_mask [T] or NULL -> keys [R,T]; keys, state or NULL (its
 *          capacity_scale makes C smaller) -> thresholds [R,2]; both -> token_offsets [T+1] (at
 *          first counts in [0,T)), and with expert_scale [R] or NULL ids [pairs], pair_weights
 *          [pairs] = score * scale * expert_scale, in the order of tokens, then ids; the pairs past
 *          token_offsets[T] get id -1 and weight 0.
 * NDRange: choice_keys: (tiles of CHOICE_SIDE tokens, tiles of CHOICE_SIDE experts).
 *          choice_thresholds: a group per expert. choice_counts, choice_pairs: SPAN tokens per
 *          work-item. choice_offsets: one group.
 * Limits: GROUP a power of two, at most 256.
 * Repeatability: integers; the local atomics only count.
 */
#include "routing/expert_choice.clh"
#include "routing/router.clh"
#include "balance/state.clh"

#define ACROSS     (GROUP < CHOICE_SIDE ? GROUP : CHOICE_SIDE) /* lanes along a row of a tile */
#define DIGIT_BITS 8
#define BINS       256
/* Tokens that a work-item counts side by side: enough to read columns in long pieces on CPUs. */
#if GROUP == 1
#define SPAN CHOICE_SERIAL_SPAN
#else
#define SPAN 1
#endif

static inline float score_of_key(uint key) {
    return as_float((key & 0x80000000u) ? key & 0x7FFFFFFFu : ~key);
}

KERNEL(GROUP, 1, 1)
void choice_keys(IN(float, scores), IN(uchar, token_mask), OUT(uint, keys), uint tokens,
                 uint columns) {
    __local uint tile[CHOICE_SIDE * (CHOICE_SIDE + 1)];
    uint first_token = get_group_id(0) * CHOICE_SIDE, first_column = get_group_id(1) * CHOICE_SIDE;
    uint rows = min((uint)CHOICE_SIDE, tokens - first_token);
    uint wide = min((uint)CHOICE_SIDE, columns - first_column);
    uint across = get_local_id(0) % ACROSS, down = get_local_id(0) / ACROSS;
    scores = AT(scores) + (ulong)first_token * columns + first_column;
    keys = AT(keys) + (ulong)first_column * tokens + first_token;
    for (uint row = down; row < rows; row += GROUP / ACROSS) {
        bool in = !token_mask || AT(token_mask)[first_token + row];
        for (uint column = across; column < wide; column += ACROSS) {
            float score = scores[(ulong)row * columns + column];
            tile[row * (CHOICE_SIDE + 1) + column] =
                in && isfinite(score) ? ordered_bits(score) : 0;
        }
    }
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (uint column = down; column < wide; column += GROUP / ACROSS)
        for (uint row = across; row < rows; row += ACROSS)
            keys[(ulong)column * tokens + row] = tile[row * (CHOICE_SIDE + 1) + column];
}

/* Counts the digits at `shift` of the keys whose higher bits are those of `prefix`. */
void count_digits(__global const uint *keys, uint tokens, uint prefix, uint known, int shift,
                  __local uint *histogram) {
    uint lane = get_local_id(0);
    for (uint bin = lane; bin < BINS; bin += GROUP)
        histogram[bin] = 0;
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (uint t = lane; t < tokens; t += GROUP)
        if ((keys[t] & known) == prefix && keys[t] != 0) {
#if GROUP == 1
            histogram[keys[t] >> shift & (BINS - 1)]++;
#else
            atomic_inc(&histogram[keys[t] >> shift & (BINS - 1)]);
#endif
        }
    group_barrier(CLK_LOCAL_MEM_FENCE);
}

KERNEL(GROUP, 1, 1)
void choice_thresholds(IN(uint, keys), OUT(uint, thresholds), IN(uint, state), uint tokens,
                       uint capacity) {
    __local uint histogram[BINS], tmp[GROUP], found[2];
    capacity = effective_capacity(STATE_OF(state), capacity);
    uint lane = get_local_id(0), prefix = 0, known = 0, wanted = capacity, all;
    keys = AT(keys) + (ulong)get_group_id(0) * tokens;
    thresholds = AT(thresholds) + 2 * get_group_id(0);
    for (int shift = 32 - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        /* The bin of the wanted-th best: counted from the top, by lanes that own bins in a row. */
        const uint each = BINS / GROUP;
        uint top = BINS - lane * each, mine = 0;
        count_digits(keys, tokens, prefix, known, shift, histogram);
        for (uint i = 1; i <= each; i++)
            mine += histogram[top - i];
        uint above = group_scan(mine, &all, tmp);
        if (lane == 0) {
            found[0] = 0;
            found[1] = 0xFFFFFFFFu; /* fewer keys than wanted: none is ever found */
        }
        group_barrier(CLK_LOCAL_MEM_FENCE);
        for (uint i = 1; i <= each; i++) {
            uint here = histogram[top - i];
            if (above < wanted && wanted <= above + here) {
                found[0] = top - i;
                found[1] = wanted - above;
            }
            above += here;
        }
        group_barrier(CLK_LOCAL_MEM_FENCE);
        prefix |= READ_ONCE(__local uint, found[0]) << shift;
        wanted = READ_ONCE(__local uint, found[1]);
        known |= (uint)(BINS - 1) << shift;
        group_barrier(CLK_LOCAL_MEM_FENCE);
    }

    /* `wanted` of the tokens with this key are taken: up to where? */
    uint each = divide_up(tokens, GROUP), begin = min(lane * each, tokens);
    uint end = min(begin + each, tokens), mine = 0;
    for (uint t = begin; t < end; t++)
        mine += keys[t] == prefix;
    uint before = group_scan(mine, &all, tmp);
    /* Fewer tokens than places: the digits ended at 0, which no key is, and all keys are above. */
    if (lane == 0) {
        thresholds[0] = capacity == 0 ? 0xFFFFFFFFu : prefix;
        thresholds[1] = 0;
    }
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint t = begin; t < end; t++) {
        if (keys[t] != prefix)
            continue;
        before++;
        if (before == wanted && prefix != 0 && capacity != 0)
            thresholds[1] = t + 1;
    }
}

static inline bool is_taken(uint key, uint bits, uint limit, uint token) {
    return (key > bits) | ((key == bits) & (token < limit));
}

KERNEL(GROUP, 1, 1)
void choice_counts(IN(uint, keys), IN(uint, thresholds), OUT(int, counts), uint tokens,
                   uint columns) {
    uint first = get_global_id(0) * SPAN,
         span = first < tokens ? min((uint)SPAN, tokens - first) : 0;
    int count[SPAN];
    keys = AT(keys);
    thresholds = AT(thresholds);
    for (uint i = 0; i < SPAN; i++)
        count[i] = 0;
    for (uint e = 0; e < columns; e++) {
        __global const uint *column = keys + (ulong)e * tokens;
        uint bits = thresholds[2 * e], limit = thresholds[2 * e + 1];
        for (uint i = 0; i < span; i++)
            count[i] += is_taken(column[first + i], bits, limit, first + i);
    }
    for (uint i = 0; i < span; i++)
        AT(counts)[first + i] = count[i];
}

/* Counts [0,T) -> where each token's pairs begin, [T+1]. */
KERNEL(GROUP, 1, 1)
void choice_offsets(OUT(int, offsets), uint tokens) {
    __local uint tmp[GROUP];
    uint each = divide_up(tokens, GROUP), begin = min((uint)get_local_id(0) * each, tokens);
    uint end = min(begin + each, tokens), mine = 0, all;
    offsets = AT(offsets);
    for (uint t = begin; t < end; t++)
        mine += (uint)offsets[t];
    uint offset = group_scan(mine, &all, tmp);
    for (uint t = begin; t < end; t++) {
        uint count = (uint)offsets[t];
        offsets[t] = (int)offset;
        offset += count;
    }
    if (get_local_id(0) == 0)
        offsets[tokens] = (int)all;
}

KERNEL(GROUP, 1, 1)
void choice_pairs(IN(uint, keys), IN(uint, thresholds), IN(int, offsets), IN(float, expert_scale),
                  OUT(int, ids), OUT(float, pair_weights), uint tokens, uint columns, uint pairs,
                  float scale) {
    uint first = get_global_id(0) * SPAN,
         span = first < tokens ? min((uint)SPAN, tokens - first) : 0;
    uint next[SPAN];
    keys = AT(keys);
    thresholds = AT(thresholds);
    offsets = AT(offsets);
    ids = AT(ids);
    pair_weights = AT(pair_weights);
    for (uint i = (uint)offsets[tokens] + get_global_id(0); i < pairs; i += get_global_size(0)) {
        ids[i] = -1;
        pair_weights[i] = 0.0f;
    }
    for (uint i = 0; i < span; i++)
        next[i] = (uint)offsets[first + i];
    for (uint e = 0; e < columns; e++) {
        __global const uint *column = keys + (ulong)e * tokens;
        uint bits = thresholds[2 * e], limit = thresholds[2 * e + 1];
        float factor = expert_scale ? scale * AT(expert_scale)[e] : scale;
        for (uint i = 0; i < span; i++) {
            uint key = column[first + i];
            if (!is_taken(key, bits, limit, first + i))
                continue;
            ids[next[i]] = (int)e;
            pair_weights[next[i]] = score_of_key(key) * factor;
            next[i]++;
        }
    }
}
