/*
 * Purpose: a stable sort by descending weight, or by random numbers, for the keep rules that rank
 *          tokens or pairs.
 * Formula: least significant digit first, 8 bits a pass: histogram per block, scan, scatter.
 * Arrays: sort_keys: pair_weights [pairs], live, token_mask, token_offsets -> keys [n] (ascending
 *          for descending weights, dead entries last), order [n] = 0 ... n-1. With KEEP_PRIORITY n
 *          = T and the key is the token's best weight; with KEEP_WEIGHT n = T*K, an entry (t, k) is
 *          t*K + k; with KEEP_RANDOM too, and its key is random instead of its weight. The passes:
 *          keys, order -> keys, order; histogram [blocks, 256] u32.
 * NDRange: sort_keys, sort_sequences: one work-item per entry, GROUP per group. sort_histogram,
 *          sort_scatter: a group per block of block_size entries. sort_scan: one group.
 * Limits: n <= 2^30; GROUP divides 256.
 * Repeatability: integers only; equal keys keep their order.
 */
#include "routing/router.clh"
#include "dispatch/pairs.clh"
#include "runtime/random.clh"

#define BINS 256

KERNEL(GROUP, 1, 1)
void sort_keys(IN(float, pair_weights), IN(int, live), IN(uchar, token_mask),
               IN(int, token_offsets), OUT(uint, keys), OUT(uint, order), IN(uint, state),
               uint count, uint pairs, int keep, int top_k) {
    token_owner owner = OWNER_INIT(top_k, pairs, top_k);
    uint i = get_global_id(0);
    pair_weights = AT(pair_weights);
    if (i >= count)
        return;
    uint token = keep == KEEP_PRIORITY ? i : i / (uint)top_k;
    int first = keep == KEEP_PRIORITY ? 0 : (int)(i - token * (uint)top_k);
    int end = keep == KEEP_PRIORITY ? top_k : first + 1;
    uint best = 0;
    for (int k = first; k < end; k++) {
        long pair = owned_pair(&owner, token, k);
        if (pair >= 0 && keep == KEEP_RANDOM)
            best = random_bits(STATE_OF(state), token, (uint)k, RANDOM_KEEP).x;
        else if (pair >= 0)
            best = max(best, ordered_bits(pair_weights[pair]));
    }
    AT(keys)[i] = ~best;
    AT(order)[i] = i;
}

/* keys: the sequence of each entry of the order, `sequence` entries long; sorted last, it rules. */
KERNEL(GROUP, 1, 1)
void sort_sequences(OUT(uint, keys), IN(uint, order), uint count, uint sequence) {
    uint i = get_global_id(0);
    if (i < count)
        AT(keys)[i] = AT(order)[i] / sequence;
}

static inline int digit_of(uint key, int shift) {
    return (int)((key >> shift) & (BINS - 1));
}

KERNEL(GROUP, 1, 1)
void sort_histogram(IN(uint, keys), OUT(uint, histogram), uint count, uint block_size, int shift) {
    __local int tmp[GROUP];
    uint begin = get_group_id(0) * block_size, end = min(begin + block_size, count);
    keys = AT(keys);
    histogram = AT(histogram) + (ulong)get_group_id(0) * BINS;
    for (uint bin = get_local_id(0); bin < BINS; bin += GROUP)
        histogram[bin] = 0;
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint chunk = begin; chunk < end; chunk += GROUP) {
        uint i = chunk + get_local_id(0);
        int bin = i < end ? digit_of(keys[i], shift) : -1;
        bool last;
        uint rank = group_rank(bin, &last, tmp);
        if (bin >= 0 && last)
            histogram[bin] += rank + 1;
        group_barrier(CLK_GLOBAL_MEM_FENCE);
    }
}

/* histogram [blocks, 256]: counts -> the position of each block's first entry of each bin. */
KERNEL(GROUP, 1, 1)
void sort_scan(OUT(uint, histogram), uint blocks) {
    __local uint tmp[GROUP];
    const uint lane_bins = BINS / GROUP;
    uint first = get_local_id(0) * lane_bins, mine = 0, all;
    histogram = AT(histogram);
    for (uint bin = first; bin < first + lane_bins; bin++)
        for (uint block = 0; block < blocks; block++)
            mine += histogram[(ulong)block * BINS + bin];
    uint position = group_scan(mine, &all, tmp);
    for (uint bin = first; bin < first + lane_bins; bin++)
        for (uint block = 0; block < blocks; block++) {
            ulong cell = (ulong)block * BINS + bin;
            uint size = histogram[cell];
            histogram[cell] = position;
            position += size;
        }
}

KERNEL(GROUP, 1, 1)
void sort_scatter(IN(uint, keys), IN(uint, order), OUT(uint, histogram), OUT(uint, keys_out),
                  OUT(uint, order_out), uint count, uint block_size, int shift) {
    __local int tmp[GROUP];
    uint begin = get_group_id(0) * block_size, end = min(begin + block_size, count);
    keys = AT(keys);
    order = AT(order);
    keys_out = AT(keys_out);
    order_out = AT(order_out);
    histogram = AT(histogram) + (ulong)get_group_id(0) * BINS;
    for (uint chunk = begin; chunk < end; chunk += GROUP) {
        uint i = chunk + get_local_id(0), to = 0;
        int bin = i < end ? digit_of(keys[i], shift) : -1;
        bool last;
        uint rank = group_rank(bin, &last, tmp);
        if (bin >= 0) {
            to = histogram[bin] + rank;
            keys_out[to] = keys[i];
            order_out[to] = order[i];
        }
        group_barrier(CLK_GLOBAL_MEM_FENCE);
        if (bin >= 0 && last)
            histogram[bin] = to + 1;
        group_barrier(CLK_GLOBAL_MEM_FENCE);
    }
}
