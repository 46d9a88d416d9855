/*
 * Purpose: The tiles of slots of all experts, close together: what the persistent work-groups of
 *          nv_wgmma_*.cl share among them.
 * Formula: expert e's bucket [offsets[e], offsets[e] + kept[e]) in tiles of `rows` slots, experts
 *          ascending; the last tile of a bucket may be shorter. Without offsets: one bucket of
 *          `slots`.
 *          buckets, where given: those with slots, close together, each with its first tile, how
 *          many, and its slots.
 * Arrays: offsets [E+1], kept [E] u32 -> list, buckets [LIST_HEADER + LIST_TILE * tiles] i32.
 * NDRange: one group of GROUP work-items, an expert each at a time.
 * Limits: none.
 * Repeatability: integers.
 */
#include "experts/gemm/nv_wgmma_own.clh"

KERNEL(GROUP, 1, 1)
void nv_wgmma_list(IN(uint, offsets), IN(uint, kept), uint experts, uint slots, uint rows,
                   OUT(int, list), OUT(int, buckets)) {
    __local uint tmp[GROUP];
    __global const uint *starts = GIVEN(offsets), *counts = GIVEN(kept);
    __global int *to = AT(list);
    uint done = 0, done_buckets = 0;
    for (uint begin = 0; begin < experts; begin += GROUP) {
        const uint e = begin + (uint)get_local_id(0);
        const uint count = e >= experts ? 0 : counts ? counts[e] : slots;
        const uint tiles = divide_up(count, rows);
        uint all;
        const uint before = done + group_scan(tiles, &all, tmp);
        for (uint i = 0; i < tiles; ++i) {
            __global int *tile = to + LIST_HEADER + (before + i) * LIST_TILE;
            tile[0] = (int)e;
            tile[1] = (int)((starts ? starts[e] : 0) + i * rows);
            tile[2] = (int)min(count - i * rows, rows);
            tile[3] = 0;
        }
        done += all;
        const uint bucket = done_buckets + group_scan(count > 0, &all, tmp);
        if (buckets && count > 0) {
            __global int *to_bucket = AT(buckets) + LIST_HEADER + bucket * LIST_TILE;
            to_bucket[0] = (int)e;
            to_bucket[1] = (int)before;
            to_bucket[2] = (int)tiles;
            to_bucket[3] = (int)count;
        }
        done_buckets += all;
    }
    if (get_local_id(0) == 0) {
        to[0] = (int)done;
        to[LIST_TAKEN_FIRST] = to[LIST_TAKEN_SECOND] = 0;
        if (buckets)
            AT(buckets)[0] = (int)done_buckets;
    }
}
