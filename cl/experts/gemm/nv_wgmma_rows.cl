/*
 * Purpose: Rows of tokens in the tiles that nv_wgmma_packed.cl copies to local memory as they are.
 * Formula: tiles[t][block][row][32 k], chunks of 8 k swizzled: chunk c of a row is at c ^ row / 2 %
 *          4. Rows past a tile's last repeat it; zeros past k.
 * Arrays: a [., k] X, token_of [slots] or NULL, list of nv_wgmma_list.cl -> tiles [slots / rows,
 *         blocks, rows, 32] X, a tile at its first slot / rows.
 * NDRange: (tiles, PARTS) groups of 256; those past the list's end return.
 * Limits: X is f16 or bf16.
 * Repeatability: a copy.
 */
#include "experts/gemm/nv_wgmma_own.clh"
#include "experts/gemm/nv_wgmma_chunk.clh"

#define GROUP_ITEMS 256
#define CHUNK       8
#define PAIR        (2 * WGMMA_BLOCK / CHUNK) /* chunks of a line of 128 bytes: two blocks */

KERNEL(GROUP_ITEMS, 1, 1)
void nv_wgmma_rows(IN(ushort, a), IN(int, token_of), IN(int, list), uint k, uint blocks, uint rows,
                   OUT(ushort, tiles)) {
    __global const int *tile = AT(list) + LIST_HEADER + get_group_id(0) * LIST_TILE;
    __global const int *tokens = GIVEN(token_of);
    if ((int)get_group_id(0) >= AT(list)[0])
        return;
    const uint first = (uint)tile[1], count = (uint)tile[2], chunk = get_local_id(0) % PAIR;
    const bool whole = (ulong)AT(a) % 16 == 0 && k % CHUNK == 0;
    for (uint row = get_local_id(0) / PAIR; row < rows; row += GROUP_ITEMS / PAIR) {
        const uint slot = first + min(row, count - 1);
        __global const ushort *from = AT(a) + (ulong)(tokens ? (uint)tokens[slot] : slot) * k;
        const uint place = chunk % 4 ^ row / 2 % 4;
        for (uint b = 2 * (uint)get_group_id(1) + chunk / 4; b < blocks;
             b += 2 * (uint)get_num_groups(1)) {
            const uint at = b * WGMMA_BLOCK + chunk % 4 * CHUNK;
            __global ushort *to =
                AT(tiles) + (((ulong)(first / rows) * blocks + b) * rows + row) * WGMMA_BLOCK;
            *(__global uint4 *)(to + place * CHUNK) = chunk_of(from + at, (int)k - (int)at, whole);
        }
    }
}
