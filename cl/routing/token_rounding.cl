/*
 * Purpose: token rounding: after top-k each expert's pairs become a multiple of M.
 * Formula: c pairs chose the expert; m is the nearest multiple of M, halves up, or the one below c
 *          where fewer than m tokens have a finite score. The m first tokens are kept: those that
 *          chose before the others, those by descending weight, these by descending score, ties to
 *          the lower token. So m <= c drops pairs of the smallest weights and m > c adds tokens of
 *          the best scores. A key is a weight or a score as ordered bits, see select.clh; where m
 *          <= c those that did not choose get 0, else those that did get the best key. Then the m
 *          best keys are kept. Weights are those of the experts a token ends with, see router.clh.
 * Arrays: scores [T,R], token_mask [T] or NULL, top_ids, top_weights [T,K], top_live [T] of top-k
 *          -> keys [R,T], chosen [R,T/32] bits -> keys again, thresholds [R,2] -> token_offsets
 *          [T+1] (at first counts in [0,T)), and with expert_scale [R] or NULL ids [pairs],
 *          pair_weights [pairs], in the order of tokens, then ids; those past token_offsets[T] get
 *          id -1 and weight 0.
 * NDRange: rounding_keys: (tiles of CHOICE_SIDE tokens, tiles of CHOICE_SIDE experts).
 *          rounding_thresholds: a group per expert. select_counts, rounding_pairs: SPAN tokens per
 *          work-item. select_offsets: one group.
 * Limits: GROUP a power of two, at most 256; CHOICE_SIDE is CHOSEN_BITS.
 * Repeatability: integers; the local atomics only count and set bits. A token's weights are made
 *          by one work-item, in the order of its ids.
 */
#include "routing/select.clh"
#include "routing/token_rounding.clh"

#define BEST_KEY 0xFFFFFFFFu /* of no float */

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

/* Only those that chose compete for places (`drops`), or the others after all of those. */
static inline void compete(__global uint *keys, __global const uint *chosen, uint tokens,
                           bool drops) {
    for (uint t = get_local_id(0); t < tokens; t += GROUP) {
        bool chose = chosen[t / CHOSEN_BITS] >> (t % CHOSEN_BITS) & 1;
        if (chose != drops)
            keys[t] = drops ? 0 : BEST_KEY;
    }
}

KERNEL(GROUP, 1, 1)
void rounding_thresholds(OUT(uint, keys), IN(uint, chosen), OUT(uint, thresholds), uint tokens,
                         uint multiple) {
    __local uint histogram[BINS], tmp[GROUP], found[2];
    const uint words = CHOSEN_WORDS(tokens), e = get_group_id(0);
    uint mine = 0, finite = 0;
    keys = AT(keys) + (ulong)e * tokens;
    chosen = AT(chosen) + (ulong)e * words;
    for (uint i = get_local_id(0); i < words; i += GROUP)
        mine += popcount(chosen[i]);
    for (uint t = get_local_id(0); t < tokens; t += GROUP)
        finite += keys[t] != 0;
    const uint count = group_total(mine, tmp), most = group_total(finite, tmp);
    uint target = (count + multiple / 2) / multiple * multiple;
    if (target > most)
        target = count / multiple * multiple;
    compete(keys, chosen, tokens, target <= count);
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    find_threshold(keys, tokens, target, AT(thresholds) + 2 * e, histogram, tmp, found);
}

KERNEL(GROUP, 1, 1)
void rounding_pairs(IN(uint, keys), IN(uint, thresholds), IN(int, offsets), IN(float, scores),
                    IN(float, expert_scale), OUT(int, ids), OUT(float, pair_weights), uint tokens,
                    uint pairs, router_switches r) {
    uint first = min((uint)get_global_id(0) * SPAN, tokens), end = min(first + SPAN, tokens);
    offsets = AT(offsets);
    ids = AT(ids);
    pair_weights = AT(pair_weights);
    r.renorm_late = 0; /* the experts a token ends with are known */
    clear_surplus_pairs(ids, pair_weights, (uint)offsets[tokens], pairs);
    list_taken(AT(keys), AT(thresholds), offsets, ids, pair_weights, tokens, (uint)r.columns);
    for (uint t = first; t < end; t++) {
        __global const float *row = AT(scores) + (ulong)t * (uint)r.columns;
        const int begin = offsets[t], count = offsets[t + 1] - begin;
        for (int i = begin; i < begin + count; i++)
            pair_weights[i] = row[ids[i]];
        token_weights(&r, row, GIVEN(expert_scale), ids + begin, pair_weights + begin, count);
    }
}
