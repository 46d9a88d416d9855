/*
 * Purpose: Rows of tokens in the order in which nv_wgmma_raw.cl reads them: a lane's 16 bytes are
 *          its part of wgmma's factor of 16 rows by 16 k.
 * Formula: packed[slot / 16][16 k][lane][8]; element 4 h + 2 half + j is row lane / 4 + 8 half of
 *          the 16, k 8 h + lane % 4 * 2 + j. Rows past a tile's last repeat it; zeros past k.
 * Arrays: a [., k] X, token_of [slots] or NULL, list of nv_wgmma_list.cl -> packed [slots / 16, 2 *
 *         blocks, 32, 8] X.
 * NDRange: (tiles, slots of a tile / 16) groups of 256; those past a tile's end, or the list's,
 *          return.
 * Limits: X is f16 or bf16.
 * Repeatability: a copy.
 */
#include "experts/gemm/nv_wgmma_own.clh"

#define TYPE    f16
#define COLUMNS 128
#define FOURS   1
#define BLOCKS  4
#define FAR     0
#define FRAGMENTS_OF(w, t, f) ((ulong)0) /* no product */
#include "experts/gemm/nv_wgmma.clh"
#include "experts/gemm/nv_wgmma_chunk.clh"

#define GROUP_ITEMS 256

/* A lane's chunk of a line of four -> its two columns of each. */
static inline uint4 spread(uint4 chunk, int q) {
    const uint words[4] = {chunk.s0, chunk.s1, chunk.s2, chunk.s3};
    return own_quad(words, q);
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
    const bool whole = (ulong)AT(a) % 16 == 0 && k % CHUNK == 0;
    __global const ushort *rows[2];
    for (int i = 0; i < 2; ++i) {
        const int slot = tile[1] + min(part + (int)g + 8 * i, tile[2] - 1);
        rows[i] = AT(a) + (ulong)(uint)(tokens ? tokens[slot] : slot) * k;
    }
    __global uint4 *to =
        (__global uint4 *)(AT(packed) + (ulong)((tile[1] + part) / 16) * blocks * 512) + lane;
    for (uint b = item / WARP * 2; b < blocks; b += GROUP_ITEMS / WARP * 2) {
        const uint at = b * BLOCK + q * CHUNK;
        uint4 low[2], high[2];
        if (whole && (b + 2) * BLOCK <= k) { /* no branch between the loads */
            UNROLL for (int i = 0; i < 2; ++i) {
                low[i] = *(__global const uint4 *)(rows[0] + at + i * BLOCK);
                high[i] = *(__global const uint4 *)(rows[1] + at + i * BLOCK);
            }
        } else {
            UNROLL for (int i = 0; i < 2; ++i) {
                const int left = (int)k - (int)at - i * BLOCK;
                low[i] = chunk_of(rows[0] + at + i * BLOCK, left, whole);
                high[i] = chunk_of(rows[1] + at + i * BLOCK, left, whole);
            }
        }
        UNROLL for (int i = 0; i < 2; ++i) {
            const uint4 x = spread(low[i], q), y = spread(high[i], q);
            to[2 * (b + i) * WARP] = (uint4)(x.s0, y.s0, x.s1, y.s1);
            to[(2 * (b + i) + 1) * WARP] = (uint4)(x.s2, y.s2, x.s3, y.s3);
        }
    }
}
