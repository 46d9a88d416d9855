/*
 * Gradients of weights by every engine that has them: random buckets, operands that are gathered or
 * parts of wider rows, sizes around the edges of tiles, every mix of types.
 */
#include "gradient_case.h"

#ifdef CLMOE_WITH_CLBLAST
#include <clblast_c.h>
#endif
#include <stdio.h>
#include <string.h>

static const gemm_gradient_shape type_mixes[] = {
    {CLMOE_F32, CLMOE_F32, CLMOE_F32},    {CLMOE_BF16, CLMOE_BF16, CLMOE_F32},
    {CLMOE_BF16, CLMOE_BF16, CLMOE_BF16}, {CLMOE_F16, CLMOE_F16, CLMOE_F32},
    {CLMOE_F16, CLMOE_F16, CLMOE_F16},    {CLMOE_F32, CLMOE_BF16, CLMOE_F32},
};

/* Calls check() for every engine and mix of types that the device and the engine take. */
static void for_all(void (*check)(const gemm_engine *engine, const gemm_gradient_shape *types)) {
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t t = 0; t < COUNT_OF(type_mixes); t++)
            if (gradient_takes(gemm_engines[i], &type_mixes[t]))
                check(gemm_engines[i], &type_mixes[t]);
}

/* ---- Cases --------------------------------------------------------------------------------- */

static uint32_t pick(const uint32_t *from, size_t count) {
    return from[random_below((uint32_t)count)];
}

#define PICK(array) pick((array), COUNT_OF(array))

/* Everything random but the engine and the types. */
static gradient_case random_case(const gemm_engine *engine, const gemm_gradient_shape *types) {
    static const uint32_t edges[] = {1,  2,  3,  5,  7,  8,  9,   15,  16,  17,
                                     31, 32, 33, 63, 64, 65, 100, 129, 160, 161};
    static const uint32_t rows[] = {1, 2, 3, 8, 16, 17, 64, 65, 127, 128, 129, 300};
    static const uint32_t tiles[] = {1, 8, 16, 40, 64};
    const bool gathers = engine->gradient->gathers;
    gradient_case c = {
        .engine = engine,
        .types = *types,
        .spread = (spread)random_below(SPREAD_DENSE + 1),
        .rows = PICK(rows),
        .m = PICK(edges),
        .n = PICK(edges),
        .row_tile = PICK(tiles),
        .gather_p = gathers && random_below(2) == 0,
        .gather_q = gathers && random_below(2) == 0,
        .parts = random_below(2) == 0,
        .accumulate = random_below(2) == 0,
    };
    c.experts = c.spread == SPREAD_DENSE ? 1 : 1 + random_below(6);
    return c;
}

static void check_random_cases(const gemm_engine *engine, const gemm_gradient_shape *types) {
    for (uint64_t seed = 0; seed < 40; seed++) {
        seed_set(1000 * seed + 1);
        const gradient_case c = random_case(engine, types);
        gradient_check_case(&c, seed);
    }
}

static void random_cases(void **state) {
    (void)state;
    for_all(check_random_cases);
}

/* Integers in, exact sums out. */
static void check_exact(const gemm_engine *engine, const gemm_gradient_shape *types) {
    for (uint64_t seed = 0; seed < 4; seed++) {
        const gradient_case c = {.engine = engine,
                                 .types = *types,
                                 .spread = seed / 2 ? SPREAD_DENSE : SPREAD_RANDOM,
                                 .experts = seed / 2 ? 1 : 4,
                                 .rows = 200,
                                 .m = 45,
                                 .n = 77,
                                 .row_tile = 16,
                                 .gather_p = engine->gradient->gathers,
                                 .accumulate = seed % 2,
                                 .exact = true};
        gradient_check_case(&c, seed);
    }
}

static void exact_values(void **state) {
    (void)state;
    for_all(check_exact);
}

/* A router's: few elements of C, many rows. */
static void check_many_rows(const gemm_engine *engine, const gemm_gradient_shape *types) {
    static const uint32_t rows[] = {1023, 1024, 2500};
    for (size_t i = 0; i < COUNT_OF(rows); i++) {
        const gradient_case c = {.engine = engine,
                                 .types = *types,
                                 .spread = SPREAD_DENSE,
                                 .experts = 1,
                                 .rows = rows[i],
                                 .m = i ? 33 : 3,
                                 .n = 70,
                                 .row_tile = 1,
                                 .parts = i == 1,
                                 .accumulate = i == 2};
        gradient_check_case(&c, i);
    }
}

static void many_rows(void **state) {
    (void)state;
    for_all(check_many_rows);
}

/* More than one tile of the widest kernels, and of their rounds of slots, with parts of all. */
static void check_wide(const gemm_engine *engine, const gemm_gradient_shape *types) {
    const uint64_t step = engine == &gemm_nv_wgmma ? 1 : 3;
    for (uint64_t seed = 0; seed < 4; seed += step) {
        const bool gathers = engine->gradient->gathers;
        const gradient_case c = {.engine = engine,
                                 .types = *types,
                                 .spread = seed == 2 ? SPREAD_ONE_EXPERT : SPREAD_RANDOM,
                                 .experts = 4,
                                 .rows = 800,
                                 .m = seed % 2 ? 296 : 131,
                                 .n = seed % 2 ? 136 : 258,
                                 .row_tile = seed % 2 ? 128 : 9,
                                 .gather_p = gathers && seed == 3,
                                 .gather_q = gathers && seed != 3,
                                 .parts = seed == 0,
                                 .accumulate = seed >= 2,
                                 .exact = seed != 3};
        gradient_check_case(&c, 20 + seed);
    }
}

static void wide_cases(void **state) {
    (void)state;
    for_all(check_wide);
}

/* No slots at all: zeros, or C as it was. */
static void check_no_rows(const gemm_engine *engine, const gemm_gradient_shape *types) {
    for (uint64_t accumulate = 0; accumulate < 2; accumulate++) {
        const gradient_case c = {.engine = engine,
                                 .types = *types,
                                 .spread = SPREAD_DENSE,
                                 .experts = 1,
                                 .m = 5,
                                 .n = 9,
                                 .row_tile = 1,
                                 .parts = true,
                                 .accumulate = accumulate};
        gradient_check_case(&c, 1);
    }
}

static void no_rows(void **state) {
    (void)state;
    for_all(check_no_rows);
}

/* Small enough for tools that interpret kernels, who are given buffers without a spare byte. */
static void check_small(const gemm_engine *engine, const gemm_gradient_shape *types) {
    gradient_case c = {.engine = engine,
                       .types = *types,
                       .experts = 3,
                       .rows = 9,
                       .m = 13,
                       .n = 19,
                       .row_tile = 4,
                       .gather_p = engine->gradient->gathers,
                       .gather_q = engine->gradient->gathers,
                       .accumulate = true};
    if (engine->gradient->blocks && support_bare) /* CLBlast's own kernels are not ours to check */
        return;
    c.spread = SPREAD_ONE_EXPERT;
    gradient_check_case(&c, 1);
    c.gather_p = c.gather_q = c.accumulate = false;
    c.parts = true;
    gradient_check_case(&c, 2);
    c.spread = SPREAD_DENSE;
    c.experts = 1;
    c.rows = 261;
    c.m = 3;
    gradient_check_case(&c, 3);
}

static void small_shapes(void **state) {
    (void)state;
    char name[64] = "";
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_NAME, sizeof name, name, NULL));
    support_bare = strstr(name, "Oclgrind") != NULL;
    for_all(check_small);
    support_bare = false;
}

/* ---- Bits ---------------------------------------------------------------------------------- */

/* A case in which every expert has rows, gathered where the engine can. */
static gradient_case full_case(const gemm_engine *engine, const gemm_gradient_shape *types) {
    return (gradient_case){.engine = engine,
                           .types = *types,
                           .spread = SPREAD_RANDOM,
                           .experts = 5,
                           .rows = 400,
                           .m = 141,
                           .n = 75,
                           .row_tile = 8,
                           .gather_p = engine->gradient->gathers};
}

static void check_repeatable(const gemm_engine *engine, const gemm_gradient_shape *types) {
    for (int dense = 0; dense < 2; dense++) {
        gradient_case c = full_case(engine, types);
        gradient_data d;
        gradient_run run;
        if (dense) {
            c.spread = SPREAD_DENSE;
            c.experts = 1;
            c.rows = 1500;
        }
        test_case("%s: the same bits, dense %d", engine->name, dense);
        seed_set(7);
        gradient_make_data(&c, &d);
        gradient_prepare(&c, &d, &run);
        const void *first = gradient_run_on(&c, &run, test.queue);
        for (int n = 1; n < 12; n++)
            compare_bits("C", gradient_run_on(&c, &run, n % 2 ? test.queue : test.out_of_order),
                         first, d.c_elements * type_size(types->c_type));
    }
}

static void repeatable(void **state) {
    (void)state;
    for_all(check_repeatable);
}

/* `rows` of `width` of an operand, as the slots of expert e have them. */
static float *rows_of_expert(const gradient_data *d, uint32_t e, const float *operand,
                             bool gathered, uint32_t width) {
    float *rows = HOST(float, (size_t)d->kept[e] * width);
    for (uint32_t i = 0; i < d->kept[e]; i++) {
        const uint32_t slot = d->offsets[e] + i;
        const size_t from = gathered ? (size_t)d->token_of[slot] : slot;
        memcpy(rows + (size_t)i * width, operand + from * width, width * sizeof *rows);
    }
    return rows;
}

/* The bits of expert e alone, in the first slots, its rows gathered beforehand. */
static const void *alone(const gradient_case *all, const gradient_data *d, uint32_t e) {
    gradient_case c = *all;
    gradient_run run;
    uint32_t offsets[] = {0, d->kept[e]};
    gradient_data one = {.slots = d->kept[e],
                         .offsets = offsets,
                         .kept = &d->kept[e],
                         .p_row = d->p_row,
                         .q_row = d->q_row,
                         .c_row = d->c_row,
                         .c_expert = d->c_expert,
                         .c_elements = d->c_expert,
                         .c = d->c};
    c.experts = 1;
    c.gather_p = c.gather_q = false;
    one.p = rows_of_expert(d, e, d->p, all->gather_p, d->p_row);
    one.q = rows_of_expert(d, e, d->q, all->gather_q, d->q_row);
    gradient_prepare(&c, &one, &run);
    return gradient_run_on(&c, &run, test.queue);
}

/*
 * An expert's gradient has the same bits whatever its place, the row tile and the other experts.
 * What a library does with other offsets is not known.
 */
static void check_independent(const gemm_engine *engine, const gemm_gradient_shape *types) {
    if (engine->gradient->blocks)
        return;
    for (uint32_t row_tile = 1; row_tile <= 40; row_tile += 13) {
        gradient_case c = full_case(engine, types);
        gradient_data d;
        gradient_run run;
        test_case("%s: experts by themselves, row tile %u", engine->name, row_tile);
        seed_set(row_tile);
        c.row_tile = row_tile;
        gradient_make_data(&c, &d);
        gradient_prepare(&c, &d, &run);
        const size_t bytes = d.c_expert * type_size(types->c_type);
        const char *together = gradient_run_on(&c, &run, test.queue);
        for (uint32_t e = 0; e < c.experts; e++)
            if (d.kept[e] > 0)
                compare_bits("the expert's", together + e * bytes, alone(&c, &d, e), bytes);
    }
}

static void experts_are_independent(void **state) {
    (void)state;
    for_all(check_independent);
}

/* ---- Devices ------------------------------------------------------------------------------- */

/* In many launches: the same results. */
static void bounded_launches(void **state) {
    (void)state;
    clmoe_context *context = test_context(0);
    context->options.max_launch_work = 10000;
    for_all(check_exact);
    context->options.max_launch_work = 0;
}

/* Variants for other devices: groups of 64 work-items, and shorter vectors. */
static void variants_of_other_devices(void **state) {
    (void)state;
    device_info *info = &test_context(0)->info;
    const device_info real = *info;
    if (info->max_group > 64)
        info->max_group = 64;
    for (size_t t = 0; t < COUNT_OF(type_mixes); t += 2)
        if (gradient_takes(&gemm_tiled, &type_mixes[t]))
            check_exact(&gemm_tiled, &type_mixes[t]);
    *info = real;
    for (info->vector_width = 4; info->vector_width <= 8; info->vector_width *= 2)
        for (size_t t = 0; t < COUNT_OF(type_mixes); t += 2)
            if (gradient_takes(&gemm_cpu, &type_mixes[t]))
                check_random_cases(&gemm_cpu, &type_mixes[t]);
    *info = real;
}

/* Large tiles where there are few compute units; buffers that begin anywhere, or not. */
static const void *in_tiles(const gradient_case *c, const gradient_data *d, cl_uint units,
                            bool aligned) {
    gradient_run run;
    test_context(0)->info.compute_units = units;
    support_aligned = aligned;
    gradient_prepare(c, d, &run);
    support_aligned = false;
    return gradient_run_on(c, &run, test.queue);
}

static void check_large(const gemm_gradient_shape *types, bool dense) {
    gradient_case c = full_case(&gemm_tiled, types);
    gradient_data d;
    c.m = 252;
    c.n = 132;
    c.gather_p = c.gather_q = !dense;
    if (dense) {
        c.spread = SPREAD_DENSE;
        c.experts = 1;
        c.rows = 1500;
    }
    test_case("large tiles: dense %d", dense);
    test_context(0)->info.compute_units = 1;
    seed_set(3);
    gradient_check_case(&c, 3);
    seed_set(3);
    gradient_make_data(&c, &d);
    const void *want = in_tiles(&c, &d, UINT32_MAX, true);
    for (int aligned = 0; aligned < 2; aligned++)
        compare_bits("C", in_tiles(&c, &d, 1, aligned), want,
                     d.c_elements * type_size(types->c_type));
}

/* As on a large GPU: tiled's large tiles have the same bits as those for problems of few groups. */
static void large_tiles(void **state) {
    (void)state;
    device_info *info = &test_context(0)->info;
    const device_info real = *info;
    test_case("large tiles");
    if (real.max_group < 1024 || real.local_mem_bytes < 20000)
        skip();
    info->type = CL_DEVICE_TYPE_GPU;
    for (size_t t = 0; t < COUNT_OF(type_mixes); t++)
        if (gradient_takes(&gemm_tiled, &type_mixes[t]))
            check_large(&type_mixes[t], t % 2);
    *info = real;
}

#ifdef CLMOE_WITH_CLBLAST
static void check_refused(void *engine, const gemm_gradient *problem, const char *says) {
    launch chain;
    OK(launch_begin(&chain, test_context(0), test.queue, 0, NULL));
    clmoe_status status = gemm_clblast.gradient->run(engine, &chain, problem);
    assert_int_equal(launch_end(&chain, status, NULL), CLMOE_UNSUPPORTED);
    CHECK(strstr(clmoe_last_error(), says), "it says: %s\n", clmoe_last_error());
}

/* CLBlast's offsets are ints, it knows one type, and gathers nothing. */
static void limits_of_clblast(void **state) {
    (void)state;
    void *engine = NULL;
    const size_t far = (size_t)INT32_MAX * 4;
    test_case("too large for clblast");
    assert_int_equal(gemm_clblast.gradient->create(test_context(0), &type_mixes[1], &engine),
                     CLMOE_UNSUPPORTED);
    assert_non_null(strstr(clmoe_last_error(), "bf16"));
    assert_null(engine);
    OK(gemm_clblast.gradient->create(test_context(0), &type_mixes[0], &engine));
    clean_later(gemm_clblast.gradient->destroy, engine);
    gemm_gradient problem = {.slots = 1000,
                             .experts = 2,
                             .p = {.row = 64},
                             .q = {.row = 32},
                             .m = 64,
                             .n = 32,
                             .expert = 64 * 32,
                             .row = 32};
    problem.p.buf.offset = far;
    check_refused(engine, &problem, "cannot address the rows of P: 1000 x 64");
    problem.p.buf.offset = 0;
    problem.q.buf.offset = far;
    check_refused(engine, &problem, "cannot address the rows of Q: 1000 x 32");
    problem.q.buf.offset = 0;
    problem.c.offset = far;
    check_refused(engine, &problem, "cannot address the gradients: 2 x 2048");
    problem.c.offset = 0;
    problem.q.gathered = true;
    check_refused(engine, &problem, "gather");
}
#endif

/* CLBlast's caches live until exit, where some OpenCL drivers are gone already. */
static int teardown(void **state) {
#ifdef CLMOE_WITH_CLBLAST
    CLBlastClearCache();
#endif
    return support_teardown(state);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(random_cases),      TEST(exact_values),
        TEST(many_rows),         TEST(wide_cases),
        TEST(no_rows),           TEST(small_shapes),
        TEST(repeatable),        TEST(experts_are_independent),
        TEST(bounded_launches),  TEST(variants_of_other_devices),
        TEST(large_tiles),
#ifdef CLMOE_WITH_CLBLAST
        TEST(limits_of_clblast),
#endif
    };
    support_filter();
    return cmocka_run_group_tests(tests, support_setup, teardown);
}
