/*
 * Purpose: whether a device's tensor cores do what nv_mma.clh says of them.
 * Formula: c = a b^T; the last 8 elements of a's last row count as 0.
 * Arrays: a, b [16,16] and bt, b transposed; c [2,16,16]: from b, and from bt. All X.
 * NDRange: one group of a warp.
 * Limits: X is f16 or bf16.
 * Repeatability: as nv_mma.cl.
 */
#define MMA_TYPE X
#include "experts/gemm/nv_mma.clh"

#define SIDE       16
#define TILE_BYTES (SIDE * SIDE * 2)
#define B          TILE_BYTES
#define BT         (2 * TILE_BYTES)

/* Every work-item carries half a row. */
static inline void carry(__local uchar *tiles, uint tile, __global const ushort *from, uint bytes) {
    const uint lane = (uint)get_local_id(0);
    copy_start(tiles, tile + lane * CHUNK_BYTES, from + lane * CHUNK_BYTES / 2, bytes);
}

/* Rounded, as floats again, and what those round to. */
static inline uint rounded_twice(float low, float high) {
    const float2 v = unpack(pack(low, high));
    return pack(v.x, v.y);
}

/*
 * Columns 0-7 from b [0], b [1], columns 8-15 from b [2], b [3]. A lane writes its neighbour's part
 * of the upper rows.
 */
static inline void write_product(__global ushort *c, const uint *a, const uint *b) {
    const uint lane = (uint)get_local_id(0), row = lane / 4;
    for (uint side = 0; side < 2; ++side) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        multiply_add(sums, a, b + side * 2);
        const uint upper = of_other_lane(rounded_twice(sums[0], sums[1]), 1);
        __global uint *to = (__global uint *)(c + row * SIDE + side * 8);
        to[(lane ^ 1) % 4] = upper;
        to[8 * SIDE / 2 + lane % 4] = rounded_twice(sums[2], sums[3]);
    }
}

KERNEL(32, 1, 1)
void nv_mma_probe(IN(ushort, a), IN(ushort, b), IN(ushort, bt), OUT(ushort, c)) {
    __local uchar tiles[3 * TILE_BYTES] __attribute__((aligned(128)));
    const uint lane = (uint)get_local_id(0);
    uint part[3][4];
    carry(tiles, 0, AT(a), lane == 31 ? 0 : CHUNK_BYTES);
    carry(tiles, B, AT(b), CHUNK_BYTES);
    carry(tiles, BT, AT(bt), CHUNK_BYTES);
    copy_batch();
    COPY_WAIT(0);
    barrier(CLK_LOCAL_MEM_FENCE);
    const uint row = lane % 16, side = lane / 16;
    load_matrices(tiles, (row * 2 + side) * CHUNK_BYTES, part[0]);
    load_matrices(tiles, B + ((side * 8 + lane % 8) * 2 + lane / 8 % 2) * CHUNK_BYTES, part[1]);
    load_transposed(tiles, BT + (row * 2 + side) * CHUNK_BYTES, part[2]);
    write_product(AT(c), part[0], part[1]);
    write_product(AT(c) + SIDE * SIDE, part[0], part[2]);
}
