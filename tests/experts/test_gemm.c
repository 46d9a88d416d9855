/*
 * The engines, driven directly: random buckets, every layout of the weights, sizes around the edges
 * of tiles. `test_gemm small` runs a few small cases, for checkers that interpret kernels.
 */
#include "gemm_case.h"

#ifdef CLMOE_WITH_CLBLAST
#include <clblast_c.h>
#endif
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- Cases --------------------------------------------------------------------------------- */

static uint32_t pick(const uint32_t *from, size_t count) {
    return from[random_below((uint32_t)count)];
}

#define PICK(array) pick((array), COUNT_OF(array))

/* Types an engine can be asked for: NVIDIA's have no f32, clblast nothing else. */
static clmoe_type only_type(const gemm_engine *engine) {
    return gemm_is_nv(engine) ? CLMOE_BF16 : CLMOE_F32;
}

static clmoe_type random_type(const gemm_engine *engine) {
    static const uint32_t all[] = {CLMOE_F32, CLMOE_F32, CLMOE_BF16, CLMOE_F16};
    if (engine->blocks)
        return CLMOE_F32;
    return (clmoe_type)(gemm_is_nv(engine) ? pick(all + 2, 2) : PICK(all));
}

/* Everything random but the engine and the storage. */
static gemm_case random_case(const gemm_engine *engine, const storage *store, uint32_t most) {
    static const uint32_t edges[] = {1,  2,  3,  5,  8,  15, 16,  17,  31,  32, 33,
                                     47, 48, 63, 64, 65, 96, 100, 129, 160, 257};
    const bool clamped = random_below(2) == 0;
    gemm_case c = {
        .engine = engine,
        .store = store,
        .type = random_type(engine),
        .spread = (spread)random_below(SPREAD_DENSE + 1),
        .rows = PICK(edges),
        .n = PICK(edges),
        .k = PICK(edges),
        .activation = (clmoe_activation)random_below(CLMOE_ACT_RELU2 + 1),
        .limit = clamped ? 0.5F : 0.0F,
        .alpha = clamped ? 1.702F : 1.0F,
        .up_shift = clamped ? 1.0F : 0.0F,
        .bias = random_below(2) == 0,
        .gather = engine->gathers && random_below(2) == 0,
        .packed = engine->pack && random_below(2) == 0,
        .row_weight = (gemm_row_weight)random_below(GEMM_ROW_WEIGHT_OUTPUT + 1),
    };
    c.experts = c.spread == SPREAD_DENSE ? 1 : 1 + random_below(6);
    c.rows = c.rows > most ? 1 + c.rows % most : c.rows;
    c.n = c.n > most ? 1 + c.n % most : c.n;
    c.k = c.k > most ? 1 + c.k % most : c.k;
    return c;
}

/* A shape's kernels are compiled for it alone, and for long. */
static bool is_slow(const gemm_engine *engine) {
    return engine == &gemm_nv_wgmma;
}

/* All but those whose kernels take long to compile: few_cases() has these. */
static bool has_all_cases(const gemm_engine *engine) {
    return !is_slow(engine) && gemm_runs_here(engine);
}

static void random_cases(uint64_t count, uint32_t most) {
    uint64_t seed = 1;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < GEMM_STORAGES && has_all_cases(gemm_engines[i]); s++)
            for (uint64_t n = 0; n < count; n++) {
                seed_set(seed * 1000);
                const gemm_case c = random_case(gemm_engines[i], &gemm_storages[s], most);
                gemm_check_case(&c, seed++);
            }
}

static void every_storage(void **state) {
    (void)state;
    random_cases(20, 1000);
}

static void every_storage_small(void **state) {
    (void)state;
    random_cases(8, 20);
}

/* ---- Training ------------------------------------------------------------------------------ */

/*
 * Keeping z changes nothing of C; without a z a shape in training keeps none. Of a linear problem
 * C may grow, and the weights may lie in the order that the layer's own do not have.
 */
static gemm_case training_case(const gemm_engine *engine, const storage *store, uint64_t n) {
    gemm_case c = random_case(engine, store, 1000);
    c.training = true;
    if (store->down) {
        c.accumulate = n % 2;
        c.for_gradient = n / 2 % 2;
        c.packed = c.packed && !c.for_gradient; /* a router has none */
    } else {
        c.z = (z_kept)(n % 3);
    }
    return c;
}

static void check_training(const gemm_engine *engine, const storage *store) {
    for (uint64_t n = 0; n < 12; n++) {
        seed_set(n * 777 + (uint64_t)(store - gemm_storages));
        const gemm_case c = training_case(engine, store, n);
        gemm_check_case(&c, n);
    }
}

static void training(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < GEMM_STORAGES && has_all_cases(gemm_engines[i]); s++)
            check_training(gemm_engines[i], &gemm_storages[s]);
}

/*
 * Every form, activation, row weight and tile of slots; k a multiple of 8 and not, in one block and
 * in several rounds; one dense problem, one of raw weights. Down is packed, without what a layer's
 * second GEMM has not: row weights, and sums that are added to.
 */
static gemm_case slow_case(const gemm_engine *engine, uint32_t n, bool train) {
    static const uint32_t rows[] = {9, 70, 257}, depths[] = {104, 63, 257, 96, 8, 160};
    const storage *store = &gemm_storages[n * 3 % GEMM_STORAGES];
    gemm_case c = train ? training_case(engine, store, n) : random_case(engine, store, 1000);
    c.spread = n == 4 ? SPREAD_DENSE : SPREAD_RANDOM;
    c.experts = n == 4 ? 1 : 3;
    c.rows = rows[(n + train) % COUNT_OF(rows)];
    c.k = depths[n];
    c.activation = (clmoe_activation)((n + train) % (CLMOE_ACT_RELU2 + 1));
    c.row_weight = store->down ? GEMM_ROW_WEIGHT_NONE : (gemm_row_weight)((n + train) % 3);
    c.packed = n != 5;
    c.for_gradient = false; /* nv_mma's kernels */
    c.accumulate = false;
    return c;
}

static void few_cases(void **state) {
    (void)state;
    enum { CASES = 6 };
    for (size_t i = 0; gemm_engines[i]; i++)
        for (uint32_t n = 0; n < 2 * CASES && is_slow(gemm_engines[i]); n++) {
            if (!gemm_runs_here(gemm_engines[i]))
                break;
            seed_set(n * 31 + 5);
            const gemm_case c = slow_case(gemm_engines[i], n % CASES, n >= CASES);
            gemm_check_case(&c, n);
        }
}

/* Small enough for tools that interpret kernels, who are given buffers without a spare byte. */
static void small_training(void **state) {
    (void)state;
    static const size_t kinds[] = {0, 2, 7, 8, 9};
    char name[64] = "";
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_NAME, sizeof name, name, NULL));
    support_bare = strstr(name, "Oclgrind") != NULL;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < COUNT_OF(kinds) && gemm_runs_here(gemm_engines[i]); s++) {
            const bool down = gemm_storages[kinds[s]].down;
            const gemm_case c = {.engine = gemm_engines[i],
                                 .store = &gemm_storages[kinds[s]],
                                 .type = only_type(gemm_engines[i]),
                                 .experts = 2,
                                 .rows = 5,
                                 .n = 19,
                                 .k = 7,
                                 .alpha = 1.0F,
                                 .training = true,
                                 .z = down    ? Z_NOT_KEPT
                                      : s < 1 ? Z_BY_PAIR
                                              : Z_BY_SLOT,
                                 .accumulate = down,
                                 .for_gradient = down};
            if (!c.engine->blocks || !support_bare) /* CLBlast's own kernels are not ours */
                gemm_check_case(&c, s);
        }
    support_bare = false;
}

/* ---- Bits ---------------------------------------------------------------------------------- */

/* Integers in, exact sums out: linear, and relu of gate times up. */
static void exact_values(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < GEMM_STORAGES && gemm_runs_here(gemm_engines[i]); s++) {
            gemm_case c = {.engine = gemm_engines[i],
                           .store = &gemm_storages[s],
                           .type = only_type(gemm_engines[i]),
                           .experts = 3,
                           .rows = 70,
                           .n = 45,
                           .k = 77,
                           .activation = CLMOE_ACT_RELU,
                           .bias = true,
                           .exact = true};
            gemm_check_case(&c, s);
            c.training = true;
            c.accumulate =
                gemm_storages[s].down && !is_slow(c.engine); /* of which packed ones do not */
            c.z = gemm_storages[s].down ? Z_NOT_KEPT : Z_BY_SLOT;
            gemm_check_case(&c, s);
            c.packed = c.engine->pack;
            if (c.packed)
                gemm_check_case(&c, s);
        }
}

/* Twenty runs, the same bits. */
static void check_repeatable(const gemm_engine *engine, const storage *store, bool packed) {
    const gemm_case c = {.engine = engine,
                         .store = store,
                         .type = only_type(engine),
                         .experts = 3,
                         .rows = 70,
                         .n = 45,
                         .k = 277,
                         .alpha = 1.0F,
                         .packed = packed};
    gemm_data d;
    gemm_run run;
    test_case("%s: %s, packed %d", engine->name, store->name, packed);
    seed_set(7);
    gemm_make_data(&c, &d);
    gemm_prepare(&c, &d, &run);
    const float *first = gemm_run_on(&c, &run, test.queue);
    for (int n = 1; n < 20; n++)
        compare_bits("C", gemm_run_on(&c, &run, n % 2 ? test.queue : test.out_of_order), first,
                     4 * (size_t)d.slots * c.n);
}

static void repeatable(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < 2 && gemm_runs_here(gemm_engines[i]); s++)
            for (int packed = 0; packed <= (gemm_engines[i]->pack != NULL); packed++)
                check_repeatable(gemm_engines[i], &gemm_storages[s], packed);
}

static gemm_case dense_case(const gemm_engine *engine, const storage *store, bool packed) {
    return (gemm_case){.engine = engine,
                       .store = store,
                       .type = only_type(engine),
                       .spread = SPREAD_DENSE,
                       .experts = 1,
                       .n = 67,
                       .k = 283,
                       .alpha = 1.0F,
                       .packed = packed};
}

/* Rows of a dense problem that are all the same one. */
static const float *equal_rows(gemm_case c, uint32_t rows) {
    c.rows = rows;
    gemm_data d;
    gemm_run run;
    seed_set(11);
    gemm_make_data(&c, &d);
    seed_set(12);
    float *row = random_floats(c.k, 1.0);
    for (size_t m = 0; m < 2; m++)
        if (d.matrices[m])
            memcpy(d.matrices[m], random_floats((size_t)c.n * c.k, 1.0), 4 * (size_t)c.n * c.k);
    for (uint32_t s = 0; s < rows; s++)
        memcpy(d.a + (size_t)s * c.k, row, 4 * (size_t)c.k);
    gemm_prepare(&c, &d, &run);
    return gemm_run_on(&c, &run, test.queue);
}

/*
 * An engine with kernels of its own: a row's bits depend on neither its place nor its neighbours.
 * With one compute unit, an engine that has several forms changes over at few rows: tiled's linear
 * one takes small groups for 1 row, large ones for 140 and tiles for 192.
 */
static void rows_are_independent(void **state) {
    (void)state;
    static const storage kinds[] = {
        {"separate", CLMOE_GATE_SEPARATE, false, false},
        {"separate, transposed", CLMOE_GATE_SEPARATE, true, false},
        {"down", CLMOE_GATE_NONE, false, true},
    };
    device_info *info = &test_context(0)->info;
    const device_info real = *info;
    info->compute_units = 1;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < COUNT_OF(kinds) && gemm_runs_here(gemm_engines[i]); s++) {
            const gemm_engine *engine = gemm_engines[i];
            for (int packed = 0; packed <= (engine->pack != NULL) && !engine->blocks; packed++) {
                test_case("%s: %s, packed %d", engine->name, kinds[s].name, packed);
                const gemm_case c = dense_case(engine, &kinds[s], packed);
                if (!gemm_is_taken(&c))
                    continue;
                const float *one = equal_rows(c, 1);
                for (uint32_t rows = 140; rows <= 192; rows += 52) {
                    const float *many = equal_rows(c, rows);
                    for (size_t row = 0; row < rows; row++)
                        compare_bits("row", many + row * 67, one, 4 * 67);
                }
            }
        }
    *info = real;
}

static void check_nan(const gemm_engine *engine, const storage *store, clmoe_activation act,
                      bool packed) {
    const gemm_case c = {.engine = engine,
                         .store = store,
                         .type = only_type(engine),
                         .spread = SPREAD_DENSE,
                         .experts = 1,
                         .rows = 9,
                         .n = 33,
                         .k = 18,
                         .activation = act,
                         .limit = 1.0F,
                         .alpha = 1.0F,
                         .packed = packed};
    gemm_data d;
    gemm_run run;
    test_case("%s: %s, activation %d, packed %d", engine->name, store->name, act, packed);
    seed_set(5);
    gemm_make_data(&c, &d);
    d.a[4 * c.k + 17] = NAN;
    gemm_prepare(&c, &d, &run);
    const float *got = gemm_run_on(&c, &run, test.queue);
    for (size_t e = 0; e < (size_t)c.rows * c.n; e++)
        CHECK(!isnan(got[e]) == (e / c.n != 4), "element %zu is %g\n", e, (double)got[e]);
}

/* A NaN in a row reaches that row's outputs, through every activation, and no other row. */
static void nan_stays_in_its_row(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (int act = 0; act <= CLMOE_ACT_RELU2 && gemm_runs_here(gemm_engines[i]); act++)
            for (int packed = 0; packed <= (gemm_engines[i]->pack != NULL); packed++)
                for (int plain = 0; plain < 2; plain++)
                    if (!is_slow(gemm_engines[i]) || (act % 2 == plain && packed))
                        check_nan(gemm_engines[i], &gemm_storages[plain ? 6 : 0],
                                  (clmoe_activation)act, packed);
}

static void no_rows(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++) {
        if (!gemm_runs_here(gemm_engines[i]))
            continue;
        const gemm_case c = {.engine = gemm_engines[i],
                             .store = &gemm_storages[0],
                             .type = only_type(gemm_engines[i]),
                             .spread = SPREAD_DENSE,
                             .experts = 1,
                             .rows = 0,
                             .n = 3,
                             .k = 3};
        gemm_data d;
        gemm_run run;
        test_case("%s: no rows", c.engine->name);
        gemm_make_data(&c, &d);
        gemm_prepare(&c, &d, &run);
        gemm_run_on(&c, &run, test.queue);
    }
}

static clmoe_status pick_engine(clmoe_context *context, const char *name, const gemm_shape *of,
                                const gemm_engine **engine) {
    void *state = NULL;
    clmoe_status status = gemm_engine_create(context, name, of, engine, &state);
    if (status == CLMOE_SUCCESS)
        (*engine)->destroy(state);
    return status;
}

/* Of columns that nv_wgmma does not reach nv_mma has the layer. */
static void check_widest(const gemm_shape *of) {
    const gemm_engine *engine = NULL;
    gemm_shape wide = *of;
    wide.hidden_dim = 30721;
    OK(pick_engine(test_context(0), NULL, &wide, &engine));
    assert_true((engine == &gemm_nv_mma) == gemm_runs_here(&gemm_nv_mma));
    assert_int_equal(pick_engine(test_context(0), "nv_wgmma", &wide, &engine), CLMOE_UNSUPPORTED);
    assert_non_null(strstr(clmoe_last_error(), "30720"));
}

static void choice_of_engine(void **state) {
    (void)state;
    const gemm_engine *engine = NULL;
    const gemm_shape f32 = {.experts = 1, .dim = 1, .hidden_dim = 1};
    gemm_shape bf16 = f32;
    cl_device_type type = 0;
    test_case("the engines' names");
    bf16.a_type = bf16.w_type = bf16.c_type = CLMOE_BF16;
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_TYPE, sizeof type, &type, NULL));
    OK(pick_engine(test_context(0), NULL, &bf16, &engine));
    assert_true((engine == &gemm_nv_mma) == gemm_runs_here(&gemm_nv_mma)); /* a router's */
    bf16.form = GEMM_GATED;
    OK(pick_engine(test_context(0), NULL, &bf16, &engine));
    if (gemm_runs_here(&gemm_nv_wgmma))
        assert_ptr_equal(engine, &gemm_nv_wgmma);
    else
        assert_true((engine == &gemm_nv_mma) == gemm_runs_here(&gemm_nv_mma));
    check_widest(&bf16);
    OK(pick_engine(test_context(0), NULL, &f32, &engine));
    if (type & CL_DEVICE_TYPE_CPU)
        assert_ptr_equal(engine, &gemm_cpu);
    if (type & CL_DEVICE_TYPE_GPU)
        assert_ptr_equal(engine, gemm_runs_here(&gemm_nv_split) ? &gemm_nv_split : &gemm_tiled);
    OK(pick_engine(test_context(0), "ref", &f32, &engine));
    assert_ptr_equal(engine, &gemm_ref);
    assert_int_equal(pick_engine(test_context(0), "fast", &f32, &engine), CLMOE_INVALID_DESC);
    assert_non_null(strstr(clmoe_last_error(), "fast"));
    assert_non_null(strstr(clmoe_last_error(), "cpu, nv_wgmma, nv_mma, nv_split, tiled, ref"));
    assert_null(engine);
}

/* Small devices: the engine shrinks its tile, or says what it lacks. */
static void devices_with_less(void **state) {
    (void)state;
    test_case("small devices");
    clmoe_context small = *test_context(0);
    small.info.type = CL_DEVICE_TYPE_GPU;
    small.tuning = (tuning){0};
    small.info.local_mem_bytes = 16384;
    small.info.max_group = 256;
    assert_int_equal(gemm_tiled.row_tile(&small, 1000), 64);
    small.info.max_group = 128;
    assert_int_equal(gemm_tiled.row_tile(&small, 1000), 32);
    small.info.max_group = 64;
    assert_int_equal(gemm_tiled.row_tile(&small, 1000), 16);
    assert_int_equal(gemm_tiled.supports(&small), CLMOE_SUCCESS);
    assert_int_equal(gemm_cpu.supports(&small), CLMOE_UNSUPPORTED);
    small.info.max_group = 32;
    assert_int_equal(gemm_tiled.supports(&small), CLMOE_UNSUPPORTED);
    assert_non_null(strstr(clmoe_last_error(), "32"));
    const gemm_engine *engine = NULL;
    const gemm_shape f32 = {.experts = 1, .dim = 1, .hidden_dim = 1};
    assert_int_equal(pick_engine(&small, "tiled", &f32, &engine), CLMOE_UNSUPPORTED);
    char before[512];
    assert_int_equal(pick_engine(&small, "fast", &f32, &engine), CLMOE_INVALID_DESC);
    snprintf(before, sizeof before, "%s", clmoe_last_error());
    OK(pick_engine(&small, NULL, &f32, &engine));
    CHECK(strcmp(clmoe_last_error(), before) == 0, "it says: %s\n", clmoe_last_error());
    assert_ptr_equal(engine, &gemm_ref);
}

static void check_storages(const gemm_engine *engine) {
    for (size_t s = 0; s < GEMM_STORAGES && gemm_runs_here(engine); s++) {
        gemm_case c = {.engine = engine,
                       .store = &gemm_storages[s],
                       .experts = 3,
                       .rows = 70,
                       .n = 75,
                       .k = 37,
                       .alpha = 1.0F};
        gemm_check_case(&c, s);
        c.packed = c.engine->pack;
        if (c.packed)
            gemm_check_case(&c, s);
    }
}

/* Variants for other devices: groups of 128 work-items, and shorter vectors. */
static void variants_of_other_devices(void **state) {
    (void)state;
    device_info *info = &test_context(0)->info;
    const device_info real = *info;
    if (info->max_group > 128)
        info->max_group = 128;
    check_storages(&gemm_tiled);
    for (info->vector_width = 4; info->vector_width <= 8; info->vector_width *= 2)
        check_storages(&gemm_cpu);
    *info = real;
}

#ifdef CLMOE_WITH_CLBLAST
static void check_refused(const void *engine, const gemm_problem *problem, const char *says) {
    assert_int_equal(gemm_clblast.check(engine, problem), CLMOE_UNSUPPORTED);
    CHECK(strstr(clmoe_last_error(), says), "it says: %s\n", clmoe_last_error());
}

/* CLBlast's offsets are ints. */
static void too_large_for_clblast(void **state) {
    (void)state;
    void *engine = NULL;
    test_case("too large for clblast");
    const gemm_shape layer = {.experts = 128, .dim = 4096, .hidden_dim = 4096, .form = GEMM_GATED};
    assert_int_equal(gemm_clblast.create(test_context(0), &layer, &engine), CLMOE_UNSUPPORTED);
    assert_non_null(strstr(clmoe_last_error(), "2147483647"));
    assert_null(engine);
    const gemm_shape small = {.experts = 2, .dim = 64, .hidden_dim = 64, .form = GEMM_GATED};
    OK(gemm_clblast.create(test_context(0), &small, &engine));
    clean_later(gemm_clblast.destroy, engine);
    gemm_problem problem = {.slots = 1000, .experts = 2, .form = GEMM_LINEAR, .n = 64, .k = 64};
    problem.up.expert = 64 * 64;
    OK(gemm_clblast.check(engine, &problem));
    const size_t far = (size_t)INT32_MAX * 4;
    problem.a.offset = far;
    check_refused(engine, &problem, "cannot address the rows: 1000 x 64");
    problem.a.offset = 0;
    problem.c.offset = far;
    check_refused(engine, &problem, "cannot address the sums");
    problem.c.offset = 0;
    problem.up.buf.offset = far;
    check_refused(engine, &problem, "cannot address the weights: 2 x 4096");
    problem.up.buf.offset = 0;
    problem.form = GEMM_GATED;
    problem.gate.expert = (uint64_t)INT32_MAX;
    check_refused(engine, &problem, "cannot address the gate's weights");
    problem.gate.expert = 64 * 64;
    problem.scratch.offset = far;
    check_refused(engine, &problem, "cannot address the sums: 1000 x 128");
}

/*
 * The second expert's weights are missing: CLBlast refuses them, when the first expert's product is
 * on its way on a queue that the caller does not know. It is done when the call returns.
 */
static void clblast_leaves_nothing_behind(void **state) {
    (void)state;
    enum { SIDE = 700 };
    const uint32_t kept[] = {SIDE, 1}, offsets[] = {0, SIDE, SIDE + 1};
    const gemm_shape layer = {.experts = 2, .dim = SIDE, .hidden_dim = SIDE, .form = GEMM_PLAIN};
    const size_t rows = SIDE + 1, matrix = (size_t)SIDE * SIDE;
    void *engine = NULL;
    launch chain;
    test_case("clblast fails midway");
    float *ones = HOST(float, rows *SIDE);
    for (size_t i = 0; i < rows * SIDE; i++)
        ones[i] = 1.0F;
    OK(gemm_clblast.create(test_context(0), &layer, &engine));
    clean_later(gemm_clblast.destroy, engine);
    const gemm_problem problem = {
        .tile_expert = buf_new(rows * 4),
        .offsets = buf_of(offsets, sizeof offsets),
        .kept = buf_of(kept, sizeof kept),
        .slots = SIDE + 1,
        .row_tile = 1,
        .experts = 2,
        .a = buf_of(ones, rows * SIDE * 4),
        .form = GEMM_LINEAR,
        .n = SIDE,
        .k = SIDE,
        .up = {.buf = buf_of(ones, matrix * 4), .expert = matrix, .row = SIDE, .col = 1},
        .c = buf_new(rows * SIDE * 4)};
    OK(launch_begin(&chain, test_context(0), test.out_of_order, 0, NULL));
    clmoe_status status = gemm_clblast.run(engine, &chain, &problem);
    assert_int_equal(launch_end(&chain, status, NULL), CLMOE_ENGINE_FAILED);
    const float *c = buf_get(problem.c);
    for (size_t i = 0; i < matrix; i++)
        CHECK(c[i] == (float)SIDE, "c[%zu] is %g when the call has returned\n", i, (double)c[i]);
}
#endif

/* CLBlast's caches live until exit, where some OpenCL drivers are gone already. */
static int teardown(void **state) {
#ifdef CLMOE_WITH_CLBLAST
    CLBlastClearCache();
#endif
    return support_teardown(state);
}

int main(int argc, char **argv) {
    const struct CMUnitTest small[] = {
        TEST(every_storage_small),
        TEST(nan_stays_in_its_row),
        TEST(no_rows),
    };
    const struct CMUnitTest tests[] = {
        TEST(every_storage),
        TEST(training),
        TEST(few_cases),
        TEST(small_training),
        TEST(exact_values),
        TEST(repeatable),
        TEST(rows_are_independent),
        TEST(nan_stays_in_its_row),
        TEST(no_rows),
        TEST(choice_of_engine),
        TEST(devices_with_less),
        TEST(variants_of_other_devices),
#ifdef CLMOE_WITH_CLBLAST
        TEST(too_large_for_clblast),
        TEST(clblast_leaves_nothing_behind),
#endif
    };
    support_filter();
    if (argc > 1 && strcmp(argv[1], "small") == 0)
        return cmocka_run_group_tests(small, support_setup, teardown);
    return cmocka_run_group_tests(tests, support_setup, teardown);
}
