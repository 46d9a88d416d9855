/*
 * Purpose: the header before packed weights; the panels behind it are the engine's.
 * Formula: the words of `header`, low half first, then zeros.
 * Arrays: packed [PACKED_HEADER_BYTES / 2] u16, as weights may begin at a multiple of 2.
 * NDRange: one work-item per element of packed.
 * Limits: none.
 * Repeatability: a copy.
 */
#include "experts/pack.clh"

KERNEL(GROUP, 1, 1)
void pack_header(const packed_header header, OUT(ushort, packed)) {
    uint i = get_global_id(0);
    if (i >= PACKED_HEADER_BYTES / 2)
        return;
    uint word = i / 2 < PACKED_WORDS ? header.word[i / 2] : 0;
    AT(packed)[i] = (ushort)(i % 2 ? word >> 16 : word);
}
