/*
 * Purpose: Rows of tokens in the order in which nv_wgmma_raw.cl reads them: a lane's 16 bytes are its
 *          part of wgmma's factor of 16 rows by 16 k.
 * Formula: packed[slot / 16][16 k][lane][8]; element 4 h + 2 half + j is row lane / 4 + 8 half of
 *          the 16, k 8 h + lane % 4 * 2 + j. Rows past a tile's last repeat it; zeros past k.
 * Arrays: a [., k] X, token_of [slots] or NULL, list of nv_wgmma_list.cl -> packed [slots / 16, 2 *
 *         blocks, 32, 8] X.
 * NDRange: (tiles, slots of a tile / 16) groups of 256; those past a tile's or the list's end return.
 * Limits: X is f16 or bf16.
 * Repeatability: a copy.
 */
#include "experts/gemm/nv_wgmma_own.clh"

#define GROUP_ITEMS 256
#define WARP        32

/* Two elements of a row from `at` on, zeros past its end. */
static inline uint two_of(__global const ushort *row, uint at, uint k, bool whole) {
    if (whole && at + 1 < k)
        return *(__global const uint *)(row + at);
    return (at < k ? row[at] : 0u) | (at + 1 < k ? (uint)row[at + 1] << 16 : 0u);
}

KERNEL(GROUP_ITEMS, 1, 1)
void nv_wgmma_tokens(IN(ushort, a), IN(int, token_of), IN(int, list), uint k, uint blocks,
                     OUT(ushort, packed)) {
    __global const int *tile = AT(list) + LIST_HEADER + get_group_id(0) * LIST_TILE;
    __global const int *tokens = GIVEN(token_of);
    const int part = (int)get_group_id(1) * 16;
    if ((int)get_group_id(0) >= AT(list)[0] || part >= tile[2])
        return;
    const uint item = (uint)get_local_id(0), lane = item % WARP, g = lane / 4, q = lane % 4;
    const bool whole = ((ulong)AT(a) % 4 | k % 2) == 0;
    __global const ushort *rows[2];
    for (int i = 0; i < 2; ++i) {
        const int slot = tile[1] + min(part + (int)g + 8 * i, tile[2] - 1);
        rows[i] = AT(a) + (ulong)(uint)(tokens ? tokens[slot] : slot) * k;
    }
    __global uint4 *to = (__global uint4 *)(AT(packed) + (ulong)((tile[1] + part) / 16) * blocks * 512) + lane;
    for (uint k16 = item / WARP; k16 < 2 * blocks; k16 += GROUP_ITEMS / WARP) {
        const uint at = k16 * 16 + q * 2;
        to[k16 * WARP] = (uint4)(two_of(rows[0], at, k, whole), two_of(rows[1], at, k, whole),
                                 two_of(rows[0], at + 8, k, whole),
                                 two_of(rows[1], at + 8, k, whole));
    }
}
