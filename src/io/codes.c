#include "codes.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GROUP         32    /* columns that share a scale in GRID_GROUPS */
#define PIECE         65536 /* numbers that are decoded at once */
#define COUNT(array)  (sizeof(array) / sizeof(array)[0])
#define MAX_DIMENSION INT32_MAX

/* ---- Single codes --------------------------------------------------------------------------- */

static float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

float code_e4m3(unsigned char code) {
    const uint32_t sign = (uint32_t)(code & 0x80) << 24, exponent = code >> 3 & 15,
                   mantissa = code & 7;
    if (exponent == 15 && mantissa == 7)
        return float_of_bits(sign | 0x7FC00000u);
    if (exponent > 0)
        return float_of_bits(sign | (exponent + 120) << 23 | mantissa << 20);
    const float small = (float)mantissa * 0x1p-9F;
    return sign ? -small : small;
}

float code_e8m0(unsigned char code) {
    if (code == 255)
        return float_of_bits(0x7FC00000u);
    return float_of_bits(code > 0 ? (uint32_t)code << 23 : 0x00400000u);
}

float code_e2m1(unsigned char code) {
    static const float values[16] = {0,     0.5F,  1,     1.5F,  2,     3,     4,     6,
                                     -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F};
    return values[code & 15];
}

static void decode_e4m3(const unsigned char *codes, size_t first, size_t count, float *out) {
    for (size_t i = 0; i < count; i++)
        out[i] = code_e4m3(codes[first + i]);
}

/* Two in a byte, the low half first. */
static void decode_e2m1(const unsigned char *codes, size_t first, size_t count, float *out) {
    for (size_t i = first; i < first + count; i++)
        *out++ = code_e2m1((unsigned char)(i % 2 ? codes[i / 2] >> 4 : codes[i / 2]));
}

/* ---- The table ------------------------------------------------------------------------------ */

static const code_format formats[] = {
    {"FP8", ".weight", ".weight_scale_inv", ".weight", "F8_E4M3", "F32 BF16 F8_E8M0", "fp8", true,
     CODES_BYTES, GRID_BLOCKS, decode_e4m3},
    {"FP8", ".weight", ".weight_scale", ".weight", "F8_E4M3", "F32 BF16 F16",
     "fp8 compressed-tensors", true, CODES_BYTES, GRID_ANY, decode_e4m3},
    {"FP8", ".weight", ".scale", ".weight", "F8_E4M3", "F8_E8M0", "fp8", true, CODES_BYTES,
     GRID_BLOCKS, decode_e4m3},
    {"MXFP4", "_blocks", "_scales", "", "U8", "U8", "mxfp4", true, CODES_BLOCKS, GRID_GROUPS,
     decode_e2m1},
    {"MXFP4", ".weight_packed", ".weight_scale", ".weight", "U8", "U8 F8_E8M0",
     "compressed-tensors", true, CODES_PAIRS, GRID_GROUPS, decode_e2m1},
    {"MXFP4", ".weight", ".scale", ".weight", "I8", "F8_E8M0", "fp8", false, CODES_PAIRS,
     GRID_GROUPS, decode_e2m1},
};

const code_format *code_format_at(size_t index) {
    return index < COUNT(formats) ? &formats[index] : NULL;
}

bool code_list_has(const char *list, const char *word) {
    const size_t length = strchr(word, ' ') ? 0 : strlen(word);
    for (const char *at = list; length > 0 && (at = strstr(at, word)) != NULL; at++)
        if ((at == list || at[-1] == ' ') && (at[length] == ' ' || at[length] == '\0'))
            return true;
    return false;
}

/* ---- Shapes --------------------------------------------------------------------------------- */

static clmoe_status fail_shape(const coded *c, const safetensors *file, const st_tensor *t,
                               const char *should) {
    char is[192];
    safetensors_print_shape(t->rank, t->shape, is, sizeof is);
    return fail(CLMOE_BAD_FILE, "%s: tensor '%s' of %s has shape [%s], but must have %s",
                safetensors_path(file), t->name, c->format->name, is, should);
}

/* The shape of the numbers from that of the codes. */
static clmoe_status find_plain(coded *c) {
    static const char *const should[] = {
        [CODES_BYTES] = "[N, K]",
        [CODES_PAIRS] = "[N, K/2], K being a multiple of 32",
        [CODES_BLOCKS] = "[E, N, K/32, 16]",
    };
    const st_tensor *t = c->codes;
    const code_layout layout = c->format->layout;
    bool right = t->rank == (layout == CODES_BLOCKS ? 4 : 2);
    for (uint32_t i = 0; i < t->rank; i++)
        right = right && t->shape[i] > 0 && t->shape[i] <= MAX_DIMENSION;
    if (right && layout == CODES_PAIRS)
        right = t->shape[1] % (GROUP / 2) == 0;
    if (right && layout == CODES_BLOCKS)
        right = t->shape[3] == GROUP / 2;
    if (!right)
        return fail_shape(c, c->codes_file, t, should[layout]);
    const uint64_t per[] = {[CODES_BYTES] = 1, [CODES_PAIRS] = 2, [CODES_BLOCKS] = GROUP};
    c->plain = *t;
    c->plain.type = ST_OTHER;
    c->plain.rank = layout == CODES_BLOCKS ? 3 : 2;
    c->columns = c->plain.shape[c->plain.rank - 1] *= per[layout];
    /* The file has that many bytes, which therefore fit 63 bits. */
    c->plain.elements = t->elements * (layout == CODES_BYTES ? 1 : 2);
    c->rows = c->plain.elements / c->columns;
    return CLMOE_SUCCESS;
}

static uint64_t blocks_of(uint64_t size, uint64_t block) {
    return size / block + (size % block > 0);
}

/* Whether one scale is for all, or for a row each. */
static bool find_rows(coded *c) {
    const st_tensor *s = c->scales;
    const bool one = s->rank == 0 || (s->rank == 1 && s->shape[0] == 1);
    const bool row = s->rank > 0 && s->shape[0] == c->rows &&
                     (s->rank == 1 || (s->rank == 2 && s->shape[1] == 1));
    if (!one && !row)
        return false;
    c->block_rows = one ? c->rows : 1;
    c->block_columns = c->columns;
    return true;
}

static clmoe_status check_scales(coded *c, const uint32_t block[2]) {
    const st_tensor *s = c->scales;
    const code_grid grid = c->format->grid;
    char should[320], shape[192];
    uint64_t want[ST_MAX_RANK] = {0};
    if (!code_list_has(c->format->scale_types, s->type_name))
        return fail(CLMOE_BAD_FILE,
                    "%s: tensor '%s' has dtype %s, but clmoe takes scales of %s with one of: %s",
                    safetensors_path(c->scales_file), s->name, s->type_name, c->format->name,
                    c->format->scale_types);
    if (grid == GRID_ANY && find_rows(c))
        return CLMOE_SUCCESS;
    c->block_rows = grid == GRID_GROUPS ? 1 : block[0];
    c->block_columns = grid == GRID_GROUPS ? GROUP : block[1];
    for (uint32_t i = 0; i < c->plain.rank; i++)
        want[i] = c->plain.shape[i];
    if (grid != GRID_GROUPS)
        want[0] = blocks_of(c->rows, c->block_rows);
    want[c->plain.rank - 1] = blocks_of(c->columns, c->block_columns);
    if (s->rank == c->plain.rank && memcmp(s->shape, want, s->rank * sizeof want[0]) == 0)
        return CLMOE_SUCCESS;
    safetensors_print_shape(c->plain.rank, want, shape, sizeof shape);
    snprintf(should, sizeof should, "[%s], a scale for %" PRIu64 " x %" PRIu64 " weights%s", shape,
             c->block_rows, c->block_columns,
             grid == GRID_ANY ? ", or one for each row, or one for all" : "");
    return fail_shape(c, c->scales_file, s, should);
}

clmoe_status coded_check(coded *c, const uint32_t block[2]) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(find_plain(c));
    TRY(check_scales(c, block));
done:
    return status;
}

/* ---- Reading -------------------------------------------------------------------------------- */

/* Where a piece passes through. */
typedef struct room {
    unsigned char bytes[PIECE + 1];
    float scales[PIECE];
} room;

/* Whole rows, or a part of one. */
typedef struct piece {
    uint64_t row, column;
    size_t rows, columns;
} piece;

/* Scales [first, first + count). */
static clmoe_status read_scales(const coded *c, uint64_t first, size_t count, room *r) {
    const st_tensor *s = c->scales;
    if (s->type <= ST_BF16)
        return safetensors_read_f32(c->scales_file, s, first, count, r->scales);
    clmoe_status status = safetensors_read_bytes(c->scales_file, s, first, count, r->bytes);
    for (size_t i = 0; i < count && status == CLMOE_SUCCESS; i++)
        r->scales[i] = code_e8m0(r->bytes[i]);
    return status;
}

/* Row `row`'s part of a piece: `codes` is the index of its first code behind r->bytes. */
static void decode_row(const coded *c, const piece *p, size_t codes, const float *scales,
                       const room *r, float *out) {
    const uint64_t first = p->column / c->block_columns;
    for (size_t done = 0; done < p->columns;) {
        const uint64_t column = p->column + done, block = column / c->block_columns;
        const uint64_t left = (block + 1) * c->block_columns - column;
        const size_t now = left < p->columns - done ? (size_t)left : p->columns - done;
        const float scale = scales[block - first];
        c->format->decode(r->bytes, codes + done, now, out + done);
        for (size_t i = 0; i < now; i++)
            out[done + i] *= scale;
        done += now;
    }
}

/*
 * A piece has no more blocks of scales than numbers. Those of whole rows follow each other in the
 * file, as do those of a part of a row.
 */
static clmoe_status read_piece(const coded *c, const piece *p, room *r, float *out) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint64_t all = blocks_of(c->columns, c->block_columns);
    const uint64_t left = p->column / c->block_columns, top = p->row / c->block_rows;
    const size_t across = (size_t)((p->column + p->columns - 1) / c->block_columns - left + 1);
    const size_t down = (size_t)((p->row + p->rows - 1) / c->block_rows - top + 1);
    const uint64_t begin = p->row * c->columns + p->column,
                   end = begin + (uint64_t)p->rows * p->columns;
    const uint64_t per = c->format->layout == CODES_BYTES ? 1 : 2, byte = begin / per;
    TRY(read_scales(c, top * all + left, across * down, r));
    TRY(safetensors_read_bytes(c->codes_file, c->codes, byte, (size_t)(blocks_of(end, per) - byte),
                               r->bytes));
    for (size_t i = 0; i < p->rows; i++) {
        const size_t below = (size_t)((p->row + i) / c->block_rows - top);
        decode_row(c, p, (size_t)(begin % per) + i * p->columns, r->scales + below * across, r,
                   out + i * p->columns);
    }
done:
    return status;
}

clmoe_status coded_read_f32(const coded *c, uint64_t first, size_t count, float *out) {
    clmoe_status status = CLMOE_SUCCESS;
    if (first > c->plain.elements || count > c->plain.elements - first)
        return fail(
            CLMOE_INVALID_ARGUMENT,
            "%s: tensor '%s' has %" PRIu64 " elements, but %zu were asked for from %" PRIu64,
            safetensors_path(c->codes_file), c->codes->name, c->plain.elements, count, first);
    room *r = malloc(sizeof *r);
    if (r == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "no memory to decode tensor '%s'", c->codes->name);
    while (count > 0) {
        piece p = {.row = first / c->columns, .column = first % c->columns, .rows = 1};
        size_t most = count < PIECE ? count : PIECE;
        uint64_t left = c->columns - p.column;
        p.columns = left < most ? (size_t)left : most;
        if (p.columns == c->columns)
            p.rows = most / p.columns;
        TRY(read_piece(c, &p, r, out));
        first += p.rows * p.columns;
        out += p.rows * p.columns;
        count -= p.rows * p.columns;
    }
done:
    free(r);
    return status;
}
