/*
 * Purpose: The factors of gradients of weights, P or Q, in the orders in which nv_wgmma_gradient.cl
 *          reads them. Buckets stand close together there, in tiles of 128 slots that are zeros
 *          behind a bucket's last.
 * Formula: FRAGMENTS, of P: to[256 columns][32 slots][16 columns][16 slots][lane][8]; element 4 h +
 *          2 half + j of a lane is column lane / 4 + 8 half of the 16, slot 8 h + lane % 4 * 2 + j.
 *          Else, of Q: to[32 slots][128 columns][32 columns][slot][32], chunks of 8 columns
 *          swizzled: chunk c of a slot is at c ^ slot / 2 % 4. Zeros past the last column.
 * Arrays: rows X of `row` elements, token_of [slots], list of nv_wgmma_list.cl in tiles of 128 ->
 *         to X; of P with `blocks` blocks of 32 slots a group of columns.
 * NDRange: (blocks of 32 slots, blocks of 256 columns) groups of 256; those past the list's end
 *          write nothing.
 * Limits: X is f16 or bf16; FRAGMENTS 0 or 1.
 * Repeatability: a copy.
 */
#include "experts/gemm/nv_wgmma_own.clh"
#include "experts/gemm/nv_wgmma_chunk.clh"

#define GROUP_ITEMS 256
#define CHUNK       8
#define WIDTH       256 /* columns of a group */
#define CHUNKS      (WIDTH / CHUNK)
#define PARTS       (GRADIENT_SLOTS / WGMMA_BLOCK)
#define LOADS       (WGMMA_BLOCK * CHUNKS / GROUP_ITEMS) /* of a work-item */
#define LINE        (WIDTH + 4) /* elements of a slot in local memory, for the banks */

/* A group's 32 slots of a tile of the list; count: of those in use. */
typedef struct part {
    int first, count;
} part;

static inline part part_of(__global const int *list, uint block) {
    __global const int *tile = list + LIST_HEADER + block / PARTS * LIST_TILE;
    const int begin = (int)(block % PARTS) * WGMMA_BLOCK;
    if ((int)(block / PARTS) >= list[0])
        return (part){0, 0};
    return (part){tile[1] + begin, tile[2] - begin};
}

#if FRAGMENTS
/* A lane's 16 bytes, chunk i of a block of 256 columns and 32 slots. */
static inline uint4 fragment_of(__local const ushort *slots, uint i) {
    const uint lane = i % 32, k = i / 32 % 2 * 16 + lane % 4 * 2, column = i / 64 * 16 + lane / 4;
    __local const ushort *even = slots + k * LINE + column, *odd = even + LINE;
    const uint4 low = (uint4)(even[0], even[8], even[8 * LINE], even[8 * LINE + 8]);
    const uint4 high = (uint4)(odd[0], odd[8], odd[8 * LINE], odd[8 * LINE + 8]);
    return low | high << 16;
}
#endif

/* Where chunk c of slot s of a group's 32 goes, in chunks from the first of the group's columns. */
static inline uint place_in_tile(uint s, uint c) {
    return (c / 4 * WGMMA_BLOCK + s) * 4 + (c % 4 ^ s / 2 % 4);
}

KERNEL(GROUP_ITEMS, 1, 1)
void nv_wgmma_factor(IN(ushort, rows), IN(int, token_of), IN(int, list), uint row, uint gathered,
                     uint columns, uint blocks, OUT(ushort, to)) {
    const uint block = (uint)get_group_id(0), item = (uint)get_local_id(0);
    const uint column = (uint)get_group_id(1) * WIDTH;
    const part slots = part_of(AT(list), block);
    const bool whole = (ulong)AT(rows) % 16 == 0 && row % CHUNK == 0;
    const bool listed = (int)(block / PARTS) < AT(list)[0];
#if FRAGMENTS
    __local ushort in_slots[WGMMA_BLOCK * LINE] __attribute__((aligned(16)));
#else
    const uint across = divide_up(columns, GRADIENT_COLUMNS), halves = WIDTH / GRADIENT_COLUMNS;
    __global uint4 *tiles = (__global uint4 *)AT(to) +
                            ((ulong)block * across + get_group_id(1) * halves) *
                                (GRADIENT_COLUMNS * WGMMA_BLOCK / CHUNK);
#endif
    UNROLL for (uint i = 0; i < LOADS; ++i) {
        const uint s = (item + i * GROUP_ITEMS) / CHUNKS, c = item % CHUNKS;
        const int left = (int)s < slots.count ? (int)columns - (int)(column + c * CHUNK) : 0;
        const uint slot = (uint)slots.first + s;
        const uint from = left > 0 && gathered ? (uint)AT(token_of)[slot] : slot;
        __global const ushort *begin = AT(rows) + (ulong)from * row + column + c * CHUNK;
        const uint4 chunk = chunk_of(begin, left, whole);
#if FRAGMENTS
        __local uint2 *at = (__local uint2 *)(in_slots + s * LINE + c * CHUNK);
        at[0] = chunk.lo;
        at[1] = chunk.hi;
#else
        if (listed && column + c / 16 * GRADIENT_COLUMNS < columns)
            tiles[place_in_tile(s, c)] = chunk;
#endif
    }
#if FRAGMENTS
    barrier(CLK_LOCAL_MEM_FENCE);
    __global uint4 *fragments = (__global uint4 *)AT(to) +
                                ((ulong)get_group_id(1) * blocks + block) *
                                    (WIDTH * WGMMA_BLOCK / CHUNK);
    if (listed)
        UNROLL for (uint i = 0; i < LOADS; ++i)
            fragments[item + i * GROUP_ITEMS] = fragment_of(in_slots, item + i * GROUP_ITEMS);
#endif
}
