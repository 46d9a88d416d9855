/*
 * Purpose: Weights in the order in which nv_wgmma_packed.cl reads them: a lane's 16 bytes are its
 *          part of a wgmma's factor of 16 rows by 16 k.
 * Formula: packed[e][tile][warpgroup][block][warp][16 k][lane][8]; element 4 h + 2 half + j is row
 *          lane / 4 + 8 half of the 16, k 8 h + lane % 4 * 2 + j. Which column of W that row is:
 *          row_of(), so that after a transposition a lane has neighbouring columns of C. Gated,
 *          block 0 is gate's, block 1 up's. Zeros past the last column and k.
 * Arrays: gate, up as in gemm.clh, gate NULL if ungated -> packed W, 256 columns and BLOCKS * 32 k
 *         a tile.
 * NDRange: (tiles * 16, E) groups of 256.
 * Limits: W is f16 or bf16.
 * Repeatability: a copy.
 */
#include "experts/gemm/nv_wgmma_own.clh"

#define GROUP_ITEMS 256
#define WARP        32
#define OUTPUTS     (GATED ? WGMMA_ROWS / 2 : WGMMA_ROWS) /* columns of C a tile */

/* Column within the tile. */
static inline uint row_of(uint warpgroup, uint block, uint warp, uint row) {
    const uint g = row % 8, side = row / 8;
    return GATED ? warpgroup * 64 + warp * 16 + 4 * (g / 2) + g % 2 + 2 * side
                 : warpgroup * 128 + warp * 32 + 8 * (g / 2) + 2 * (2 * block + side) + g % 2;
}

KERNEL(GROUP_ITEMS, 1, 1)
void pack_nv_wgmma(IN(STORAGE(W), gate), IN(STORAGE(W), up), ulong w_expert, ulong w_row,
                   ulong w_col, uint n, uint k, OUT(STORAGE(W), packed)) {
    const uint part = (uint)get_group_id(0), item = (uint)get_local_id(0), lane = item % WARP;
    const uint warp = part % 4, block = part / 4 % 2, warpgroup = part / 8 % 2, tile = part / 16;
    const ulong expert = get_group_id(1), parts = get_num_groups(0);
    __global const STORAGE(W) *w = (GATED && block == 0 ? AT(gate) : AT(up)) + expert * w_expert;
    __global STORAGE(W) *to = AT(packed) + (expert * parts + part) * (2 * BLOCKS) * 256 + lane * 8;
    for (uint k16 = item / WARP; k16 < 2 * BLOCKS; k16 += GROUP_ITEMS / WARP)
        for (uint i = 0; i < 8; ++i) {
            const uint row = lane / 4 + 8 * (i / 2 % 2);
            const uint column = tile * OUTPUTS + row_of(warpgroup, block, warp, row);
            const uint at = k16 * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
            to[k16 * 256 + i] = column < n && at < k ? w[column * w_row + at * w_col] : 0;
        }
}
