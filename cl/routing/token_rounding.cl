/*
 * Purpose: token rounding: after top-k each expert's pairs become a multiple of M.
 * Formula: c pairs chose the expert; m is the nearest multiple of M, halves up, or the one below c
 *          where fewer than m tokens have a finite score. The m first tokens are kept: those that
 *          chose before the others, those by descending weight, these by descending score, ties to
 *          the lower token. So m <= c drops pairs of the smallest weights and m > c adds tokens of
 *          the best scores. A key is a weight or a score as ordered bits; the threshold of an
 *          expert is (bits, limit, whose): `whose` is 1 where those that chose compete and no other
 *          is kept, 0 where the others compete and all that chose are kept; see select.clh. Weights
 *          are those of the experts a token ends with, see router.clh.
 * Arrays: scores [T,R], token_mask [T] or NULL, top_ids, top_weights [T,K], top_live [T] of top-k
 *          -> keys [R,T], chosen [R,T/32] bits -> thresholds [R,3] -> token_offsets [T+1] (at first
 *          counts in [0,T)), and with expert_scale [R] or NULL ids [pairs], pair_weights [pairs],
 *          in the order of tokens, then ids; those past token_offsets[T] get id -1 and weight 0.
 * NDRange: rounding_keys: (tiles of CHOICE_SIDE tokens, tiles of CHOICE_SIDE experts).
 *          rounding_thresholds: a group per expert. rounding_counts, rounding_pairs: SPAN tokens
 *          per work-item. rounding_offsets: one group.
 * Limits: GROUP a power of two, at most 256; CHOICE_SIDE is CHOSEN_BITS.
 * Repeatability: integers; the local atomics only count and set bits. A token's weights are made
 *          by one work-item, in the order of its ids.
 */
#include "routing/select.clh"
#include "routing/token_rounding.clh"

KERNEL(GROUP, 1, 1)
void rounding_keys(IN(float, scores), IN(uchar, token_mask), IN(int, top_ids),
                   IN(float, top_weights), IN(int, top_live), OUT(uint, keys), OUT(uint, chosen),
                   uint tokens, uint columns, uint top_k) {
    __local uint tile[TILE_KEYS], bits[CHOICE_SIDE];
    key_tile at;
    tile_of(&at, tokens, columns);
    token_mask = GIVEN(token_mask);
    read_tile(&at, AT(scores), token_mask, columns, tile);
    for (uint column = get_local_id(0); column < CHOICE_SIDE; column += GROUP)
        bits[column] = 0;
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = get_local_id(0); i < at.rows * top_k; i += GROUP) {
        uint row = i / top_k, token = at.first_token + row;
        ulong pair = (ulong)at.first_token * top_k + i;
        uint column = (uint)AT(top_ids)[pair] - at.first_column;
        bool real = (int)(i - row * top_k) < AT(top_live)[token] &&
                    (!token_mask || token_mask[token]);
        if (!real || column >= at.wide)
            continue;
        tile[tile_place(row, column)] = ordered_bits(AT(top_weights)[pair]);
        atomic_or(&bits[column], 1u << row);
    }
    group_barrier(CLK_LOCAL_MEM_FENCE);
    write_tile(&at, tile, AT(keys), tokens);
    chosen = AT(chosen) + (ulong)at.first_column * CHOSEN_WORDS(tokens) + get_group_id(0);
    for (uint column = get_local_id(0); column < at.wide; column += GROUP)
        chosen[(ulong)column * CHOSEN_WORDS(tokens)] = bits[column];
}

KERNEL(GROUP, 1, 1)
void rounding_thresholds(IN(uint, keys), IN(uint, chosen), OUT(uint, thresholds), uint tokens,
                         uint multiple) {
    __local uint histogram[BINS], tmp[GROUP], found[2];
    const uint words = CHOSEN_WORDS(tokens), e = get_group_id(0);
    key_column column = {AT(keys) + (ulong)e * tokens, AT(chosen) + (ulong)e * words, 0, tokens};
    uint mine = 0, finite = 0;
    for (uint i = get_local_id(0); i < words; i += GROUP)
        mine += popcount(column.chosen[i]);
    for (uint t = get_local_id(0); t < tokens; t += GROUP)
        finite += column.keys[t] != 0;
    const uint count = group_total(mine, tmp), most = group_total(finite, tmp);
    uint target = (count + multiple / 2) / multiple * multiple;
    if (target > most)
        target = count / multiple * multiple;
    column.bit = target <= count;
    thresholds = AT(thresholds) + 3 * e;
    find_threshold(&column, column.bit ? target : target - count, thresholds, histogram, tmp,
                   found);
    if (get_local_id(0) == 0)
        thresholds[2] = column.bit;
}

/* Whether a token is kept by an expert of this key, chosen bit and threshold. */
static inline bool is_kept(uint key, uint bit, __global const uint *threshold, uint token) {
    bool taken = is_taken(key, threshold[0], threshold[1], token);
    return bit == threshold[2] ? taken : bit;
}

KERNEL(GROUP, 1, 1)
void rounding_counts(IN(uint, keys), IN(uint, chosen), IN(uint, thresholds), OUT(int, counts),
                     uint tokens, uint columns) {
    uint first = get_global_id(0) * SPAN,
         span = first < tokens ? min((uint)SPAN, tokens - first) : 0;
    int count[SPAN];
    for (uint i = 0; i < SPAN; i++)
        count[i] = 0;
    for (uint e = 0; e < columns; e++) {
        __global const uint *column = AT(keys) + (ulong)e * tokens;
        __global const uint *bits = AT(chosen) + (ulong)e * CHOSEN_WORDS(tokens);
        for (uint i = 0; i < span; i++)
            count[i] += is_kept(column[first + i], chosen_bit(bits, first + i),
                                AT(thresholds) + 3 * e, first + i);
    }
    for (uint i = 0; i < span; i++)
        AT(counts)[first + i] = count[i];
}

KERNEL(GROUP, 1, 1)
void rounding_offsets(OUT(int, offsets), uint tokens) {
    __local uint tmp[GROUP];
    counts_to_offsets(AT(offsets), tokens, tmp);
}

KERNEL(GROUP, 1, 1)
void rounding_pairs(IN(uint, keys), IN(uint, chosen), IN(uint, thresholds), IN(int, offsets),
                    IN(float, scores), IN(float, expert_scale), OUT(int, ids),
                    OUT(float, pair_weights), uint tokens, uint pairs, router_switches r) {
    uint first = get_global_id(0) * SPAN, R = (uint)r.columns,
         span = first < tokens ? min((uint)SPAN, tokens - first) : 0;
    uint next[SPAN];
    offsets = AT(offsets);
    ids = AT(ids);
    pair_weights = AT(pair_weights);
    r.renorm_late = 0; /* the experts a token ends with are known */
    clear_surplus_pairs(ids, pair_weights, (uint)offsets[tokens], pairs);
    for (uint i = 0; i < span; i++)
        next[i] = (uint)offsets[first + i];
    for (uint e = 0; e < R; e++) {
        __global const uint *column = AT(keys) + (ulong)e * tokens;
        __global const uint *bits = AT(chosen) + (ulong)e * CHOSEN_WORDS(tokens);
        for (uint i = 0; i < span; i++) {
            if (!is_kept(column[first + i], chosen_bit(bits, first + i), AT(thresholds) + 3 * e,
                         first + i))
                continue;
            ids[next[i]] = (int)e;
            pair_weights[next[i]] = AT(scores)[(ulong)(first + i) * R + e];
            next[i]++;
        }
    }
    for (uint i = 0; i < span; i++) {
        const uint begin = (uint)offsets[first + i];
        token_weights(&r, AT(scores) + (ulong)(first + i) * R, GIVEN(expert_scale), ids + begin,
                      pair_weights + begin, (int)(next[i] - begin));
    }
}
