/*
 * Purpose: Tensor maps of weights as they lie, for the bulk copies of nv_wgmma_raw.cl.
 * Formula: three dimensions, the last experts; boxes of 32 elements by `box` rows, swizzled by 64
 *          bytes; zeros past the end of each.
 * Arrays: gate, up W -> maps [2, MAP_WORDS] u64 at a multiple of 64 bytes: gate's, up's. gate NULL:
 *         up's alone.
 * NDRange: one work-item.
 * Limits: compute capability 9.0; strides, in bytes, and addresses are multiples of 16; W is f16 or
 *         bf16.
 * Repeatability: integers.
 */
#include "experts/gemm/nv_wgmma_own.clh"

#define SM90A "//@SM90A "

/* Numbers of tensormap.replace. */
#define ELEMENT_f16  6
#define ELEMENT_bf16 10
#define SWIZZLE_64   2

/* What tensormap.replace does not reach, and the host's call that makes a map does: the second
 * cache brings 256 bytes, so the next boxes of 64 bytes a row are there already. */
#define CACHE_WORD 1
#define CACHE_256  ((ulong)3 << 17)

#define REPLACE(field, bits, value)                                                                \
    __asm__ volatile(SM90A "tensormap.replace.tile." field ".global.b1024." bits " [%0], " value   \
                           "%1;"                                                                   \
                     :

#define REPLACE_32(field, at, value)                                                               \
    REPLACE(field, "b32", at) : "l"(map), "r"(value) : "memory")
#define REPLACE_64(field, at, value)                                                               \
    REPLACE(field, "b64", at) : "l"(map), "l"(value) : "memory")
#define REPLACE_NUMBER(field, value)                                                               \
    __asm__ volatile(SM90A "tensormap.replace.tile." field ".global.b1024.b32 [%0], %1;"           \
                     :                                                                             \
                     : "l"(map), "n"(value)                                                        \
                     : "memory")

/* Elements of x, y, z; from one of y, and of z, to the next; rows of a box. */
typedef struct map_shape {
    uint x, y, z, box;
    ulong y_bytes, z_bytes;
} map_shape;

static inline void write_map(__global ulong *map, __global const ushort *w, map_shape s) {
    const ulong at = (ulong)w;
    for (int i = 0; i < MAP_WORDS; ++i)
        map[i] = 0;
    map[CACHE_WORD] = CACHE_256;
    REPLACE_64("global_address", "", at);
    REPLACE_NUMBER("rank", 2);
    REPLACE_32("box_dim", "0, ", WGMMA_BLOCK);
    REPLACE_32("box_dim", "1, ", s.box);
    REPLACE_32("box_dim", "2, ", 1);
    REPLACE_32("global_dim", "0, ", s.x);
    REPLACE_32("global_dim", "1, ", s.y);
    REPLACE_32("global_dim", "2, ", s.z);
    REPLACE_64("global_stride", "0, ", s.y_bytes);
    REPLACE_64("global_stride", "1, ", s.z_bytes);
    REPLACE_32("element_stride", "0, ", 1);
    REPLACE_32("element_stride", "1, ", 1);
    REPLACE_32("element_stride", "2, ", 1);
    REPLACE_NUMBER("elemtype", JOIN(ELEMENT_, W));
    REPLACE_NUMBER("interleave_layout", 0);
    REPLACE_NUMBER("swizzle_mode", SWIZZLE_64);
    REPLACE_NUMBER("fill_mode", 0);
}

KERNEL(1, 1, 1)
void nv_wgmma_map(IN(ushort, gate), IN(ushort, up), uint x, uint y, uint experts, uint box,
                  ulong y_bytes, ulong z_bytes, OUT(ulong, maps)) {
    const map_shape s = {x, y, experts, box, y_bytes, z_bytes};
    if (gate)
        write_map(AT(maps), AT(gate), s);
    write_map(AT(maps) + MAP_WORDS, AT(up), s);
    __asm__ volatile("fence.proxy.tensormap::generic.release.gpu;" : : : "memory");
}
