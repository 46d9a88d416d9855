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
 *          choice_thresholds: a group per expert. select_counts, choice_pairs: SPAN tokens per
 *          work-item. select_offsets: one group.
 * Limits: GROUP a power of two, at most 256.
 * Repeatability: integers; the local atomics only count.
 */
#include "routing/select.clh"
#include "balance/state.clh"

KERNEL(GROUP, 1, 1)
void choice_keys(IN(float, scores), IN(uchar, token_mask), OUT(uint, keys), uint tokens,
                 uint columns) {
    __local uint tile[TILE_KEYS];
    key_tile at;
    tile_of(&at, tokens, columns);
    read_tile(&at, AT(scores), GIVEN(token_mask), columns, tile);
    group_barrier(CLK_LOCAL_MEM_FENCE);
    write_tile(&at, tile, AT(keys), tokens);
}

KERNEL(GROUP, 1, 1)
void choice_thresholds(IN(uint, keys), OUT(uint, thresholds), IN(uint, state), uint tokens,
                       uint capacity) {
    __local uint histogram[BINS], tmp[GROUP], found[2];
    capacity = effective_capacity(STATE_OF(state), capacity);
    find_threshold(AT(keys) + (ulong)get_group_id(0) * tokens, tokens, capacity,
                   AT(thresholds) + 2 * get_group_id(0), histogram, tmp, found);
}

KERNEL(GROUP, 1, 1)
void choice_pairs(IN(uint, keys), IN(uint, thresholds), IN(int, offsets), IN(float, expert_scale),
                  OUT(int, ids), OUT(float, pair_weights), uint tokens, uint columns, uint pairs,
                  float scale) {
    uint first = min((uint)get_global_id(0) * SPAN, tokens), end = min(first + SPAN, tokens);
    offsets = AT(offsets);
    ids = AT(ids);
    pair_weights = AT(pair_weights);
    clear_surplus_pairs(ids, pair_weights, (uint)offsets[tokens], pairs);
    list_taken(AT(keys), AT(thresholds), offsets, ids, pair_weights, tokens, columns);
    for (int i = offsets[first]; i < offsets[end]; i++) {
        float factor = expert_scale ? scale * AT(expert_scale)[ids[i]] : scale;
        pair_weights[i] *= factor;
    }
}
