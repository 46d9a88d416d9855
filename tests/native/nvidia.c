/* A device that says it is NVIDIA's: what it is, and the probes of its tensor cores. */
#include "device.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SIDE = 16 };
enum { ROWS = 64, COLUMNS = 16, DEPTH = 32, CHUNK = 8 }; /* of wgmma's */

int nvidia_major(void) {
    const char *capability = getenv("CLMOE_NATIVE_NVIDIA");
    if (!capability)
        return 0;
    return strcmp(capability, "9.0") == 0 ? 9 : 8;
}

/* src/experts/gemm/nv_ptx.c makes the second of the first. */
static const char target_line[] = ".target sm_90\n", edited_line[] = ".target sm_90a\n";

const char *nvidia_target(void) {
    return nvidia_major() == 9 ? target_line : "";
}

size_t nvidia_head(const char *text) {
    const char *const lines[] = {target_line, edited_line};
    for (int i = 0; i < 2; i++)
        if (strncmp(text, lines[i], strlen(lines[i])) == 0)
            return strlen(lines[i]);
    return 0;
}

/* Of small integers only. */
static float value_of(uint16_t code, int bf16) {
    uint32_t sign = (uint32_t)(code & 0x8000) << 16, rest = code & 0x7FFF, bits = sign;
    float value;
    if (rest)
        bits |= bf16 ? rest << 16 : (rest << 13) + (112u << 23);
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t code_of(float value, int bf16) {
    uint32_t bits, rest;
    memcpy(&bits, &value, sizeof bits);
    rest = bits & 0x7FFFFFFF;
    if (rest)
        rest = bf16 ? rest >> 16 : (rest - (112u << 23)) >> 13;
    return (uint16_t)(bits >> 16 & 0x8000) | (uint16_t)rest;
}

/* Arguments of both probes: a buffer and its offset in turn. */
static uint16_t *elements(void **arguments, int buffer) {
    uint16_t *p;
    uint64_t offset;
    memcpy(&p, arguments[2 * buffer], sizeof p);
    memcpy(&offset, arguments[2 * buffer + 1], sizeof offset);
    return p + offset;
}

static void mma_probe(void **arguments, int bf16) {
    const uint16_t *a = elements(arguments, 0), *b = elements(arguments, 1);
    const uint16_t *bt = elements(arguments, 2);
    uint16_t *c = elements(arguments, 3);
    for (int row = 0; row < SIDE; row++)
        for (int column = 0; column < SIDE; column++) {
            float sums[2] = {0.0f, 0.0f};
            int used = row == SIDE - 1 ? SIDE / 2 : SIDE;
            for (int k = 0; k < used; k++) {
                float factor = value_of(a[row * SIDE + k], bf16);
                sums[0] += factor * value_of(b[column * SIDE + k], bf16);
                sums[1] += factor * value_of(bt[k * SIDE + column], bf16);
            }
            c[row * SIDE + column] = code_of(sums[0], bf16);
            c[(SIDE + row) * SIDE + column] = code_of(sums[1], bf16);
        }
}

/* The factor in local memory: chunks of a row are swizzled by its number. */
static uint16_t in_tile(const uint16_t *tile, int row, int k) {
    const int chunk = (k / CHUNK) ^ (row / 2 % 4);
    return tile[row * DEPTH + chunk * CHUNK + k % CHUNK];
}

static void wgmma_probe(void **arguments, int bf16) {
    const uint16_t *a = elements(arguments, 0), *b = elements(arguments, 1);
    uint16_t *c = elements(arguments, 2), *transposed = elements(arguments, 3);
    for (int row = 0; row < ROWS; row++)
        for (int column = 0; column < COLUMNS; column++) {
            float sum = 0.0f;
            for (int k = 0; k < DEPTH; k++)
                sum += value_of(a[row * DEPTH + k], bf16) * value_of(in_tile(b, column, k), bf16);
            c[row * COLUMNS + column] = transposed[column * ROWS + row] = code_of(sum, bf16);
        }
}

void nvidia_probe(const char *kernel, void **arguments, int bf16) {
    if (nvidia_major() >= 8 && strcmp(kernel, "nv_mma_probe") == 0)
        mma_probe(arguments, bf16);
    if (nvidia_major() == 9 && strcmp(kernel, "nv_wgmma_probe") == 0)
        wgmma_probe(arguments, bf16);
}
