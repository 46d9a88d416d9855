/*
 * Purpose: The tiles of slots of all experts, close together: what the persistent work-groups of
 *          nv_wgmma_*.cl share among them.
 * Formula: expert e's bucket [offsets[e], offsets[e] + kept[e]) in tiles of `rows` slots, experts
 *          ascending; the last tile of a bucket may be shorter: with `tail` slots or fewer it is in
 *          the list of tails. Without offsets one bucket, `slots`.
 * Arrays: offsets [E+1], kept [E] u32 -> list, tails [LIST_HEADER + LIST_TILE * tiles] i32; tails
 *         NULL: none, and tail is 0.
 * NDRange: one group of GROUP work-items, an expert each at a time.
 * Limits: none.
 * Repeatability: integers.
 */
#include "experts/gemm/nv_wgmma_own.clh"

static inline void put_tile(__global int *tile, uint expert, uint first, uint count) {
    tile[0] = (int)expert;
    tile[1] = (int)first;
    tile[2] = (int)count;
    tile[3] = 0;
}

KERNEL(GROUP, 1, 1)
void nv_wgmma_list(IN(uint, offsets), IN(uint, kept), uint experts, uint slots, uint rows,
                   uint tail, OUT(int, list), OUT(int, tails)) {
    __local uint tmp[GROUP];
    __global const uint *starts = GIVEN(offsets), *counts = GIVEN(kept);
    __global int *to = AT(list), *tails_to = GIVEN(tails);
    uint done = 0, tails_done = 0;
    for (uint begin = 0; begin < experts; begin += GROUP) {
        const uint e = begin + (uint)get_local_id(0);
        const uint count = e >= experts ? 0 : counts ? counts[e] : slots;
        const uint start = starts && e < experts ? starts[e] : 0;
        const uint last = count % rows, has_tail = last > 0 && last <= tail;
        const uint tiles = divide_up(count, rows) - has_tail;
        uint all, all_tails;
        const uint before = done + group_scan(tiles, &all, tmp);
        const uint tails_before = tails_done + group_scan(has_tail, &all_tails, tmp);
        for (uint i = 0; i < tiles; ++i)
            put_tile(to + LIST_HEADER + (before + i) * LIST_TILE, e, start + i * rows,
                     min(count - i * rows, rows));
        if (has_tail)
            put_tile(tails_to + LIST_HEADER + tails_before * LIST_TILE, e, start + tiles * rows,
                     last);
        done += all;
        tails_done += all_tails;
    }
    if (get_local_id(0) == 0) {
        to[0] = (int)done;
        if (tails_to)
            tails_to[0] = (int)tails_done;
    }
}
