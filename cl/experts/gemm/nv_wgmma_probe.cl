/*
 * Purpose: whether a device, its driver and the edit of its PTX do what nv_wgmma.clh says.
 * Formula: c = a b^T.
 * Arrays: a [64,32], b [16,32] in one slot of local memory, as nv_wgmma_rows.cl makes it, c [64,16]
 *         and c transposed. All X.
 * NDRange: one group, a warpgroup.
 * Limits: X is f16 or bf16.
 * Repeatability: as nv_wgmma_packed.cl.
 */
#define TYPE    X
#define COLUMNS 16
#define FOURS   1
#define BLOCKS  4
#define FAR     0
#define FRAGMENTS_OF(w, t, f) ((ulong)0) /* no product */
#include "experts/gemm/nv_wgmma.clh"

#define ROWS 64

/* Sums [8] of a lane: += a [64,16] b^T, of a a warp's 16 rows in fragments. */
#define MULTIPLY_PROBE(f, at)                                                                      \
    PTX(SM90A "wgmma.mma_async.sync.aligned.m64n16k16.f32." TEXT(TYPE) "." TEXT(                   \
            TYPE) " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, 1, 1, 1, 0;"        \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]),               \
          "+f"(sums[5]), "+f"(sums[6]), "+f"(sums[7])                                              \
        : "r"((f)[0]), "r"((f)[1]), "r"((f)[2]), "r"((f)[3]), "l"(at)                              \
        : "memory")

KERNEL(4 * WARP, 1, 1)
void nv_wgmma_probe(IN(ushort, a), IN(ushort, b), OUT(ushort, c), OUT(ushort, transposed)) {
    __local uchar tile[SLOT_BYTES] __attribute__((aligned(1024)));
    __local ulong bars[1];
    const uint item = (uint)get_local_id(0), lane = item % WARP, g = lane / 4, q = lane % 4;
    const uint row = item / WARP * 16 + g, full = place_of((__local uchar *)bars);
    float sums[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    uint f[2][4];
    UNROLL for (uint j = 0; j < 2; ++j)
        UNROLL for (uint i = 0; i < 4; ++i)
            f[j][i] = *(__global const uint *)(AT(a) + (row + i % 2 * 8) * BLOCK + j * 16 +
                                               i / 2 * 8 + q * 2);
    if (item == 0) {
        bar_init(full, 1);
        FENCE_LOCAL;
    }
    barrier(CLK_LOCAL_MEM_FENCE);
    if (item == 0) {
        bar_expect(full, SLOT_BYTES);
        copy_bulk(place_of(tile), AT(b), SLOT_BYTES, full);
    }
    bar_wait(full, 0);
    const ulong rows = descriptor(place_of(tile));
    PTX(SM90A "wgmma.fence.sync.aligned;" : : : "memory");
    MULTIPLY_PROBE(f[0], rows);
    MULTIPLY_PROBE(f[1], rows + 2);
    PTX(SM90A "wgmma.commit_group.sync.aligned;" : : : "memory");
    PTX(SM90A "wgmma.wait_group.sync.aligned 0;"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]), "+f"(sums[4]), "+f"(sums[5]),
          "+f"(sums[6]), "+f"(sums[7])
        :
        : "memory");
    UNROLL for (uint j = 0; j < 2; ++j)
        UNROLL for (uint side = 0; side < 2; ++side) {
            const uint both = pack(sums[4 * j + 2 * side], sums[4 * j + 2 * side + 1]);
            *(__global uint *)(AT(c) + (row + side * 8) * COLUMNS + j * 8 + q * 2) = both;
            *(__global uint *)(AT(transposed) + (j * 8 + g) * ROWS + (row - g) + side * 8 +
                               q * 2) = transpose(both);
        }
}
