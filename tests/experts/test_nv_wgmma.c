/*
 * The kernels of the engine nv_wgmma without NVIDIA's assembly, which any device runs: lists of
 * tiles, rows in tiles, packed weights. They copy, so everything is compared exactly, with what
 * their banners say; the products themselves are test_gemm's, on a device that has them.
 */
#include "runtime/launch.h" /* before support.h: cmocka has a macro fail() */
#include "runtime/program.h"

#include "support.h"

#include <stdio.h>
#include <string.h>

/* As the banners have them. */
enum { HEADER = 4, PER_TILE = 4, BLOCK = 32, CHUNK = 8, GROUP_ITEMS = 256, WEIGHT_ROWS = 256 };

static cl_kernel kernel_of(const char *step, const char *options, const char *name) {
    cl_kernel kernel = NULL;
    OK(program_kernel(test_context(0), step, options, name, &kernel));
    return kernel;
}

/* Runs what was set, and waits. */
static void run(cl_kernel kernel, size_t columns, size_t rows, size_t items) {
    cl_event event = NULL;
    launch chain;
    OK(launch_begin(&chain, test_context(0), test.queue, 0, NULL));
    clmoe_status status = launch_kernel(&chain, kernel, 2, (const size_t[]){columns, rows},
                                        (const size_t[]){items, 1});
    OK(launch_end(&chain, status, &event));
    CL_OK(clWaitForEvents(1, &event));
    clReleaseEvent(event);
    kernel_release(&kernel);
}

/* ---- Buckets -------------------------------------------------------------------------------- */

typedef struct buckets {
    uint32_t experts, rows, slots; /* rows: of a tile */
    uint32_t *offsets, *kept;      /* NULL: dense */
} buckets;

/* Ragged ones, many empty, with gaps between them; of one expert now and then. */
static buckets random_buckets(uint32_t experts, uint32_t rows) {
    buckets b = {.experts = experts, .rows = rows};
    b.offsets = HOST(uint32_t, experts + 1);
    b.kept = HOST(uint32_t, experts);
    const uint32_t only = random_below(4) == 0 ? random_below(experts) : experts;
    for (uint32_t e = 0; e < experts; e++) {
        const bool empty = only < experts ? e != only : random_below(3) == 0;
        b.kept[e] = empty ? 0 : random_below(3 * rows + 2);
        const uint32_t tiles = (b.kept[e] + rows - 1) / rows + random_below(3);
        b.offsets[e + 1] = b.offsets[e] + tiles * rows;
    }
    b.slots = b.offsets[experts] + random_below(2) * rows;
    return b;
}

static buckets dense_buckets(uint32_t rows) {
    return (buckets){.experts = 1, .rows = rows, .slots = random_below(4 * rows)};
}

/* The list [HEADER + PER_TILE * tiles] that should come out; where nothing is written, -1. */
static int32_t *list_of(const buckets *b, size_t *ints) {
    const size_t most = b->slots / b->rows + 1;
    int32_t *list = HOST(int32_t, HEADER + PER_TILE * most), *to = list + HEADER;
    for (uint32_t e = 0; e < b->experts; e++) {
        const uint32_t first = b->kept ? b->offsets[e] : 0, count = b->kept ? b->kept[e] : b->slots;
        for (uint32_t done = 0; done < count; done += b->rows, to += PER_TILE) {
            to[0] = (int32_t)e;
            to[1] = (int32_t)(first + done);
            to[2] = (int32_t)(count - done < b->rows ? count - done : b->rows);
            list[0]++;
        }
    }
    list[1] = list[2] = list[3] = -1;
    *ints = (size_t)(to - list);
    return list;
}

/* Buckets that have slots: expert, first tile of the list, tiles, slots. */
static int32_t *buckets_of(const buckets *b, size_t *ints) {
    int32_t *want = HOST(int32_t, HEADER + PER_TILE * (size_t)b->experts), *to = want + HEADER;
    int32_t tile = 0;
    for (uint32_t e = 0; e < b->experts; e++) {
        const uint32_t count = b->kept ? b->kept[e] : b->slots;
        const int32_t tiles = (int32_t)((count + b->rows - 1) / b->rows);
        if (count == 0)
            continue;
        memcpy(to, (const int32_t[]){(int32_t)e, tile, tiles, (int32_t)count}, PER_TILE * 4);
        to += PER_TILE;
        tile += tiles;
        want[0]++;
    }
    *ints = (size_t)(to - want);
    return want;
}

static void compare_lists(const char *what, const int32_t *got, const int32_t *before,
                          const int32_t *want, size_t ints) {
    assert_int_equal(got[0], want[0]);
    compare_ints("padding", got + 1, before + 1, HEADER - 1);
    compare_ints(what, got + HEADER, want + HEADER, ints - HEADER);
}

static void check_list(const buckets *b, uint32_t group, bool with_buckets) {
    char options[32];
    size_t ints = 0, bucket_ints = 0;
    const int32_t *want = list_of(b, &ints), *want_buckets = buckets_of(b, &bucket_ints);
    const clmoe_buf list = buf_new(ints * 4), none = {0};
    const clmoe_buf in_use = with_buckets ? buf_new(bucket_ints * 4) : none;
    const clmoe_buf offsets = buf_of(b->offsets, 4 * ((size_t)b->experts + 1));
    const clmoe_buf kept = buf_of(b->kept, 4 * (size_t)b->experts);
    snprintf(options, sizeof options, "-DGROUP=%u", group);
    cl_kernel kernel = kernel_of("experts/gemm/nv_wgmma_list", options, "nv_wgmma_list");
    int32_t *before = buf_get(list), *before_buckets = with_buckets ? buf_get(in_use) : NULL;
    before[1] = before[2] = 0; /* tiles that groups took */
    OK(KERNEL_SET(kernel, ARG_F32(offsets), ARG_F32(kept), ARG_UINT(b->experts), ARG_UINT(b->slots),
                  ARG_UINT(b->rows), ARG_F32(list), ARG_AS(buckets, ARG_F32(in_use))));
    run(kernel, 1, 1, group);
    compare_lists("list", buf_get(list), before, want, ints);
    if (with_buckets)
        compare_lists("buckets", buf_get(in_use), before_buckets, want_buckets, bucket_ints);
}

static const uint32_t tile_rows[] = {16, 64, 128};

static void some_lists(uint64_t seeds) {
    static const uint32_t groups[] = {16, 64}; /* fewer than experts, and more */
    for (uint64_t seed = 1; seed <= seeds; seed++) {
        seed_set(seed);
        test_case("lists");
        const uint32_t rows = tile_rows[seed % COUNT_OF(tile_rows)];
        const uint32_t group = groups[seed / 3 % COUNT_OF(groups)];
        const buckets b =
            seed % 5 == 0 ? dense_buckets(rows) : random_buckets(1 + random_below(70), rows);
        test_note("%u experts, tiles of %u, %u slots, groups of %u", b.experts, rows, b.slots,
                  group);
        check_list(&b, group, seed % 2 == 0);
    }
}

/* ---- Rows in tiles -------------------------------------------------------------------------- */

static uint16_t *random_codes(size_t n) {
    uint16_t *codes = HOST(uint16_t, n);
    for (size_t i = 0; i < n; i++)
        codes[i] = (uint16_t)random_below(65536);
    return codes;
}

/* At a multiple of two bytes and of nothing more, or of 256. */
static clmoe_buf codes_on_device(const uint16_t *codes, size_t n, bool aligned) {
    support_aligned = aligned;
    const clmoe_buf buf = buf_new_type(CLMOE_BF16, n);
    support_aligned = false;
    if (codes)
        buf_write(buf, codes, 2 * n);
    return buf;
}

typedef struct rows_case {
    buckets b;
    uint32_t k, blocks, tokens, parts;
    bool gather, aligned;
} rows_case;

static rows_case random_rows_case(uint64_t seed) {
    static const uint32_t depths[] = {1, 7, 8, 31, 32, 33, 40, 63, 64, 72, 100, 128, 129, 200};
    rows_case c = {.k = depths[random_below(COUNT_OF(depths))],
                   .parts = 1 + random_below(4),
                   .gather = random_below(2) == 0,
                   .aligned = random_below(3) != 0};
    const uint32_t rows = tile_rows[seed % COUNT_OF(tile_rows)];
    c.b = seed % 5 == 0 ? dense_buckets(rows) : random_buckets(1 + random_below(5), rows);
    c.blocks = (c.k + BLOCK - 1) / BLOCK + random_below(4);
    c.tokens = c.gather ? 1 + random_below(50) : c.b.slots;
    return c;
}

/* Tokens of the slots in use; far outside elsewhere. */
static int32_t *random_tokens(const rows_case *c, const int32_t *list) {
    int32_t *tokens = HOST(int32_t, c->b.slots + 1);
    for (uint32_t s = 0; s < c->b.slots; s++)
        tokens[s] = -1;
    for (int t = 0; t < list[0]; t++)
        for (int i = 0; i < list[HEADER + t * PER_TILE + 2]; i++)
            tokens[list[HEADER + t * PER_TILE + 1] + i] = (int32_t)random_below(c->tokens);
    return tokens;
}

/* A tile over what was there: its rows, the last one again to its end, zeros past k. */
static void put_tile(const rows_case *c, const int32_t *tile, const int32_t *tokens,
                     const uint16_t *a, uint16_t *to) {
    to += (size_t)tile[1] / c->b.rows * c->blocks * c->b.rows * BLOCK;
    for (uint32_t row = 0; row < c->b.rows; row++) {
        const int used = (int)row < tile[2] ? (int)row : tile[2] - 1, slot = tile[1] + used;
        const size_t from = (size_t)(tokens ? tokens[slot] : slot) * c->k;
        for (uint32_t i = 0; i < c->blocks * BLOCK; i++) {
            const size_t line = ((size_t)i / BLOCK * c->b.rows + row) * BLOCK;
            const uint32_t chunk = (i % BLOCK / CHUNK) ^ (row / 2 % 4);
            to[line + chunk * CHUNK + i % CHUNK] = i < c->k ? a[from + i] : 0;
        }
    }
}

static void check_rows(const rows_case *c) {
    size_t ints = 0;
    const int32_t *host_list = list_of(&c->b, &ints);
    const int32_t *tokens = c->gather ? random_tokens(c, host_list) : NULL;
    const size_t all = (size_t)c->tokens * c->k;
    const size_t groups = (c->b.slots + c->b.rows - 1) / c->b.rows;
    const size_t room = groups * c->b.rows * c->blocks * BLOCK;
    const uint16_t *host_a = random_codes(all);
    const clmoe_buf a = codes_on_device(host_a, all, c->aligned);
    const clmoe_buf token_of = buf_of(tokens, 4 * (size_t)c->b.slots);
    const clmoe_buf list = buf_of(host_list, ints * 4), tiles = codes_on_device(NULL, room, true);
    cl_kernel kernel = kernel_of("experts/gemm/nv_wgmma_rows", NULL, "nv_wgmma_rows");
    uint16_t *want = buf_get(tiles);
    OK(KERNEL_SET(kernel, ARG_U16(a), ARG_F32(token_of), ARG_F32(list), ARG_UINT(c->k),
                  ARG_UINT(c->blocks), ARG_AS(rows, ARG_UINT(c->b.rows)), ARG_U16(tiles)));
    run(kernel, groups, c->parts, GROUP_ITEMS);
    for (int t = 0; t < host_list[0]; t++)
        put_tile(c, host_list + HEADER + t * PER_TILE, tokens, host_a, want);
    compare_bits("tiles", buf_get(tiles), want, 2 * room);
}

static void some_rows(uint64_t seeds) {
    for (uint64_t seed = 1; seed <= seeds; seed++) {
        seed_set(seed);
        test_case("rows in tiles");
        const rows_case c = random_rows_case(seed);
        test_note("k %u in %u blocks, tiles of %u, %u slots, gather %d, aligned %d", c.k, c.blocks,
                  c.b.rows, c.b.slots, c.gather, c.aligned);
        if (c.b.slots > 0)
            check_rows(&c);
    }
}

/* ---- Factors of gradients ---------------------------------------------------------------------
 */

enum { SLOT_TILE = 128, FACTOR_WIDTH = 256, TILE_COLUMNS = 128 };

typedef struct factor_case {
    buckets b;
    uint32_t columns, row, tokens;
    bool gather, aligned, fragments;
} factor_case;

static factor_case random_factor_case(uint64_t seed) {
    static const uint32_t widths[] = {1, 7, 8, 40, 127, 128, 129, 136, 255, 256, 257, 264, 300};
    factor_case c = {.columns = widths[random_below(COUNT_OF(widths))],
                     .gather = random_below(2) == 0,
                     .aligned = random_below(3) != 0,
                     .fragments = seed % 2 == 0};
    c.row = c.columns + (random_below(2) == 0 ? 0 : 1 + random_below(16));
    c.b = seed % 5 == 0 ? dense_buckets(SLOT_TILE) : random_buckets(1 + random_below(4), SLOT_TILE);
    for (uint32_t e = 0; c.b.kept && e <= c.b.experts; e++)
        c.b.offsets[e] = c.b.offsets[e] / 8 * 3; /* buckets at any slot, which may overlap */
    c.tokens = c.gather ? 1 + random_below(50) : c.b.slots + SLOT_TILE;
    return c;
}

/* Element (slot, column) of a factor, of 32 * `blocks` slots. */
static size_t factor_at(const factor_case *c, uint32_t blocks, uint32_t slot, uint32_t column) {
    const uint32_t s = slot % BLOCK, in = column % FACTOR_WIDTH;
    if (c->fragments) { /* [256 columns][32 slots][16 columns][16 slots][lane][8] */
        const size_t unit = (size_t)(column / FACTOR_WIDTH) * blocks + slot / BLOCK;
        const uint32_t lane = in % 8 * 4 + s % 8 / 2;
        const uint32_t element = s % 16 / 8 * 4 + in % 16 / 8 * 2 + s % 2;
        return unit * FACTOR_WIDTH * BLOCK + ((in / 16 * 2 + s / 16) * 32 + lane) * 8 + element;
    }
    /* [32 slots][128 columns][32 columns][slot][32], chunks swizzled */
    const uint32_t across = (c->columns + TILE_COLUMNS - 1) / TILE_COLUMNS, of = column % BLOCK;
    const size_t unit = (size_t)(slot / BLOCK) * across + column / TILE_COLUMNS;
    const uint32_t chunk = (of / CHUNK) ^ (s / 2 % 4);
    return unit * TILE_COLUMNS * BLOCK + (column % TILE_COLUMNS / BLOCK * BLOCK + s) * BLOCK +
           chunk * CHUNK + of % CHUNK;
}

/* All that the list's tiles have over what was there, zeros where a tile has no slot or column. */
static void put_factor(const factor_case *c, const int32_t *list, uint32_t blocks,
                       const int32_t *tokens, const uint16_t *rows, uint16_t *to) {
    const uint32_t unit = c->fragments ? FACTOR_WIDTH : TILE_COLUMNS;
    const uint32_t width = (c->columns + unit - 1) / unit * unit;
    for (uint32_t slot = 0; slot < (uint32_t)list[0] * SLOT_TILE; slot++) {
        const int32_t *tile = list + HEADER + slot / SLOT_TILE * PER_TILE;
        const int32_t in = (int32_t)(slot % SLOT_TILE), place = tile[1] + in;
        const size_t from = in < tile[2] ? (size_t)(tokens ? tokens[place] : place) * c->row : 0;
        for (uint32_t column = 0; column < width; column++)
            to[factor_at(c, blocks, slot, column)] =
                in < tile[2] && column < c->columns ? rows[from + column] : 0;
    }
}

static void check_factor(const factor_case *c) {
    size_t ints = 0;
    const int32_t *host_list = list_of(&c->b, &ints);
    const uint32_t blocks = ((uint32_t)host_list[0] + random_below(2)) * (SLOT_TILE / BLOCK);
    const uint32_t across = (c->columns + FACTOR_WIDTH - 1) / FACTOR_WIDTH;
    const size_t all = (size_t)c->tokens * c->row - (c->row - c->columns);
    const size_t room = (size_t)blocks * BLOCK * across * FACTOR_WIDTH;
    int32_t *tokens = c->gather ? HOST(int32_t, c->b.slots + SLOT_TILE) : NULL;
    for (uint32_t s = 0; c->gather && s < c->b.slots + SLOT_TILE; s++)
        tokens[s] = (int32_t)random_below(c->tokens);
    const uint16_t *host_rows = random_codes(all);
    const clmoe_buf rows = codes_on_device(host_rows, all, c->aligned);
    const clmoe_buf token_of = buf_of(tokens, 4 * ((size_t)c->b.slots + SLOT_TILE));
    const clmoe_buf list = buf_of(host_list, ints * 4), to = codes_on_device(NULL, room, true);
    cl_kernel kernel =
        kernel_of("experts/gemm/nv_wgmma_factor", c->fragments ? "-DFRAGMENTS=1" : "-DFRAGMENTS=0",
                  "nv_wgmma_factor");
    uint16_t *want = buf_get(to);
    OK(KERNEL_SET(kernel, ARG_U16(rows), ARG_F32(token_of), ARG_F32(list), ARG_UINT(c->row),
                  ARG_AS(gathered, ARG_UINT(c->gather)), ARG_UINT(c->columns), ARG_UINT(blocks),
                  ARG_U16(to)));
    run(kernel, blocks, across, GROUP_ITEMS);
    put_factor(c, host_list, blocks, tokens, host_rows, want);
    compare_bits("factor", buf_get(to), want, 2 * room);
}

static void some_factors(uint64_t seeds) {
    for (uint64_t seed = 1; seed <= seeds; seed++) {
        seed_set(seed);
        test_case("factors");
        const factor_case c = random_factor_case(seed);
        test_note("fragments %d, %u columns of %u, %u slots, gather %d, aligned %d", c.fragments,
                  c.columns, c.row, c.b.slots, c.gather, c.aligned);
        if (c.b.slots > 0)
            check_factor(&c);
    }
}

/* Experts without slots get zeros, the others and what lies between keep theirs. */
static void check_empty(bool dense, uint32_t slots) {
    enum { EXPERTS = 5, ROWS = 21, COLUMNS = 300, ROW = 303, EXPERT = ROWS * ROW + 2, PARTS = 4 };
    const uint32_t host_kept[EXPERTS] = {0, 3, 0, 0, 1}, experts = dense ? 1 : EXPERTS;
    const uint64_t expert = EXPERT, row = ROW;
    const clmoe_buf kept = buf_of(dense ? NULL : host_kept, sizeof host_kept);
    const clmoe_buf c = codes_on_device(NULL, (size_t)experts * EXPERT, false);
    uint16_t *want = buf_get(c);
    cl_kernel kernel = kernel_of("experts/gemm/nv_wgmma_empty", "-DC=bf16", "nv_wgmma_empty");
    OK(KERNEL_SET(kernel, ARG_F32(kept), ARG_UINT(slots), ARG_AS(m, ARG_UINT(ROWS)),
                  ARG_AS(n, ARG_UINT(COLUMNS)), ARG_U16(c), ARG_AS(c_expert, ARG_ULONG(expert)),
                  ARG_AS(c_row, ARG_ULONG(row))));
    run(kernel, PARTS, experts, GROUP_ITEMS);
    for (size_t e = 0; e < experts; e++)
        for (size_t i = 0; (dense ? slots : host_kept[e]) == 0 && i < ROWS; i++)
            memset(want + e * EXPERT + i * ROW, 0, 2 * (size_t)COLUMNS);
    compare_bits("C", buf_get(c), want, 2 * (size_t)experts * EXPERT);
}

/* ---- Packed weights ------------------------------------------------------------------------- */

typedef struct pack_case {
    bool gated, transposed, interleaved, separate;
    clmoe_type type;
    uint32_t experts, n, k, blocks;
    uint64_t expert, row, col, up; /* strides, and the first element of up; gate's is 0 */
    size_t elements, tiles;        /* of the buffer, and of an expert */
} pack_case;

static uint32_t outputs_of(const pack_case *c) {
    return c->gated ? WEIGHT_ROWS / 2 : WEIGHT_ROWS;
}

/* In the ways of the layouts: along rows or columns, gate and up in turn, one behind the other, or
 * in buffers of their own. */
static void place_matrices(pack_case *c) {
    const uint64_t sides = c->gated && !c->separate ? 2 : 1, rows = sides * c->n;
    c->expert = rows * c->k;
    c->elements = c->experts * rows * c->k;
    c->row = c->transposed ? 1 : c->k;
    c->col = c->transposed ? rows : 1;
    c->up = sides == 1 ? 0 : c->interleaved ? c->row : c->n * c->row;
    if (sides == 2 && c->interleaved)
        c->row *= 2;
}

static pack_case random_pack_case(uint64_t seed) {
    static const uint32_t columns[] = {1, 3, 16, 63, 64, 127, 128, 129, 200, 255, 256, 257, 300};
    static const uint32_t depths[] = {1, 2, 15, 16, 31, 32, 33, 47, 64, 77, 100, 129};
    pack_case c = {.gated = seed % 2,
                   .transposed = seed / 2 % 2,
                   .interleaved = seed / 4 % 3 == 1,
                   .separate = seed / 4 % 3 == 2,
                   .type = random_below(2) ? CLMOE_F16 : CLMOE_BF16,
                   .experts = 1 + random_below(3),
                   .n = columns[random_below(COUNT_OF(columns))],
                   .k = depths[random_below(COUNT_OF(depths))]};
    c.blocks = ((c.k + BLOCK - 1) / BLOCK + 3) / 4 * 4;
    c.tiles = (c.n + outputs_of(&c) - 1) / outputs_of(&c);
    place_matrices(&c);
    return c;
}

/*
 * Where a weight lies, from what a wgmma's sums become when they are transposed: a lane has rows 2
 * q and 2 q + 1, q its number modulo 4, of each eight rows of both blocks of 64, and these are
 * neighbouring columns of C, the blocks' in turn; gated, a block has one side's columns alone.
 */
static size_t place_of(const pack_case *c, uint32_t expert, bool up, uint32_t column, uint32_t k) {
    const uint32_t run_of = c->gated ? 4 : 8, of_warp = 4 * run_of;
    const uint32_t tile = column / outputs_of(c), in_tile = column % outputs_of(c);
    const uint32_t warpgroup = in_tile / (4 * of_warp), warp = in_tile / of_warp % 4;
    const uint32_t q = in_tile % of_warp / run_of, i = in_tile % run_of;
    const uint32_t block = c->gated ? up : i / 4, row = 8 * (i / 2 % 2) + 2 * q + i % 2;
    /* A lane's part of 16 rows by 16 k: rows lane / 4 and 8 more, k lane % 4 * 2, 1 and 8 more. */
    const uint32_t lane = row % 8 * 4 + k % 8 / 2, at = k % 16 / 8 * 4 + row / 8 * 2 + k % 2;
    const size_t blocks_before = ((expert * c->tiles + tile) * 2 + warpgroup) * 2 + block;
    return (((blocks_before * 4 + warp) * 2 * c->blocks + k / 16) * 32 + lane) * 8 + at;
}

static void put_side(const pack_case *c, bool up, const uint16_t *w, uint16_t *to) {
    for (uint32_t e = 0; e < c->experts; e++)
        for (uint32_t column = 0; column < c->n; column++)
            for (uint32_t k = 0; k < c->k; k++)
                to[place_of(c, e, up, column, k)] = w[e * c->expert + column * c->row + k * c->col];
}

static void check_packed(const pack_case *c) {
    char options[64];
    const size_t bytes = 2 * c->experts * c->tiles * WEIGHT_ROWS * c->blocks * BLOCK;
    const uint16_t *host[2] = {random_codes(c->elements), NULL};
    host[1] = c->gated && c->separate ? random_codes(c->elements) : host[0];
    const clmoe_buf first = codes_on_device(host[0], c->elements, random_below(2) == 0);
    clmoe_buf up = c->separate ? codes_on_device(host[1], c->elements, false) : first;
    const clmoe_buf gate = c->gated ? first : (clmoe_buf){0};
    const clmoe_buf packed = codes_on_device(NULL, bytes / 2, true);
    uint16_t *want = HOST(uint16_t, bytes / 2);
    up.offset += 2 * c->up;
    snprintf(options, sizeof options, "-DGATED=%d -DBLOCKS=%u -DW=%s", c->gated, c->blocks,
             c->type == CLMOE_F16 ? "f16" : "bf16");
    cl_kernel kernel = kernel_of("experts/gemm/nv_wgmma_pack", options, "pack_nv_wgmma");
    OK(KERNEL_SET(kernel, ARG_U16(gate), ARG_U16(up), ARG_AS(w_expert, ARG_ULONG(c->expert)),
                  ARG_AS(w_row, ARG_ULONG(c->row)), ARG_AS(w_col, ARG_ULONG(c->col)),
                  ARG_UINT(c->n), ARG_UINT(c->k), ARG_U16(packed)));
    run(kernel, 16 * c->tiles, c->experts, GROUP_ITEMS);
    if (c->gated)
        put_side(c, false, host[0], want);
    put_side(c, true, host[1] + c->up, want);
    compare_bits("packed", buf_get(packed), want, bytes);
}

static void some_packed(uint64_t seeds) {
    for (uint64_t seed = 0; seed < seeds; seed++) {
        seed_set(seed);
        test_case("packed weights");
        const pack_case c = random_pack_case(seed);
        test_note("gated %d, transposed %d, interleaved %d, separate %d, %u experts, n %u, k %u",
                  c.gated, c.transposed, c.interleaved, c.separate, c.experts, c.n, c.k);
        check_packed(&c);
    }
}

/* ---- Tests ---------------------------------------------------------------------------------- */

static void lists(void **state) {
    (void)state;
    some_lists(60);
}

static void rows_in_tiles(void **state) {
    (void)state;
    some_rows(40);
}

static void factors_of_gradients(void **state) {
    (void)state;
    some_factors(40);
}

static void experts_without_slots(void **state) {
    (void)state;
    test_case("experts without slots");
    check_empty(false, 4);
    check_empty(true, 0);
    check_empty(true, 2);
}

static void packed_weights(void **state) {
    (void)state;
    some_packed(24);
}

/* For Oclgrind, which interprets: in buffers without a spare byte. */
static void small_cases(void **state) {
    (void)state;
    char name[64] = "";
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_NAME, sizeof name, name, NULL));
    support_bare = strstr(name, "Oclgrind") != NULL;
    some_lists(6);
    some_rows(5);
    some_factors(4);
    check_empty(false, 4);
    some_packed(2);
    support_bare = false;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(lists),          TEST(rows_in_tiles),         TEST(factors_of_gradients),
        TEST(packed_weights), TEST(experts_without_slots), TEST(small_cases),
    };
    return RUN(tests);
}
