/* Kernels of one engine that must give the same bits: which of them runs is not seen in a result.
 */
#include "gemm_case.h"

static const float *run_once(gemm_case c, bool packed, gemm_data *d) {
    gemm_run run;
    c.packed = packed;
    seed_set(c.rows);
    gemm_make_data(&c, d);
    gemm_prepare(&c, d, &run);
    return gemm_run_on(&c, &run, test.queue);
}

static void compare_packed_and_raw(size_t kind, uint32_t rows) {
    const gemm_case c = {.engine = &gemm_nv_wgmma,
                         .store = &gemm_storages[kind],
                         .type = CLMOE_BF16,
                         .experts = 5,
                         .rows = rows,
                         .n = 200,
                         .k = 296,
                         .alpha = 1.0F};
    gemm_data d;
    test_case("%s, %u rows", c.store->name, c.rows);
    const float *packed = run_once(c, true, &d), *raw = run_once(c, false, &d);
    for (uint32_t e = 0; e < c.experts; e++)
        compare_bits("C", raw + (size_t)d.offsets[e] * c.n, packed + (size_t)d.offsets[e] * c.n,
                     4 * (size_t)d.kept[e] * c.n);
}

/*
 * The engine whose packed weights and raw ones are other factors of the products: the same bits,
 * for experts of one tile, of several and of none. k is a multiple of 8, as raw weights want it.
 */
static void packed_as_raw(void **state) {
    (void)state;
    for (int i = 0; i < 2 && gemm_runs_here(&gemm_nv_wgmma); i++) {
        compare_packed_and_raw(i ? 8 : 0, 300);
        compare_packed_and_raw(i ? 8 : 0, 700);
    }
}

/* The same with so few rows an expert that nv_mma has the raw ones. */
static void packed_as_raw_of_few_rows(void **state) {
    (void)state;
    for (int i = 0; i < 2 && gemm_runs_here(&gemm_nv_wgmma); i++) {
        compare_packed_and_raw(i ? 8 : 0, 9);
        compare_packed_and_raw(i ? 8 : 0, 100);
    }
}

/* Large tiles where there are few compute units; buffers that begin anywhere, or not. */
static const float *in_tiles(const gemm_case *c, const gemm_data *d, cl_uint units, bool aligned) {
    const bool before = support_aligned;
    gemm_run run;
    test_context(0)->info.compute_units = units;
    support_aligned = aligned;
    gemm_prepare(c, d, &run);
    support_aligned = before;
    return gemm_run_on(c, &run, test.queue);
}

static void check_large(const storage *store, clmoe_type type, spread how) {
    const gemm_case c = {.engine = &gemm_tiled,
                         .store = store,
                         .type = type,
                         .spread = how,
                         .experts = how == SPREAD_DENSE ? 1 : 2,
                         .rows = 520,
                         .n = 132,
                         .k = 44,
                         .alpha = 1.0F,
                         .bias = true,
                         .gather = store->transposed,
                         .training = !store->transposed,
                         .z = store->down || store->transposed ? Z_NOT_KEPT : Z_BY_SLOT,
                         .row_weight = GEMM_ROW_WEIGHT_OUTPUT};
    gemm_data d;
    const uint64_t seed = (uint64_t)(store - gemm_storages);
    test_case("large tiles: %s, type %d, spread %d", store->name, type, how);
    test_context(0)->info.compute_units = 1;
    seed_set(seed);
    gemm_check_case(&c, seed);
    seed_set(seed);
    gemm_make_data(&c, &d);
    assert_int_equal(d.row_tile, 128);
    const float *want = in_tiles(&c, &d, UINT32_MAX, true);
    for (int aligned = 0; aligned < 2; aligned++)
        compare_bits("C", in_tiles(&c, &d, 1, aligned), want, 4 * (size_t)d.slots * c.n);
}

/* As on a large GPU: tiled's large tiles have the same bits as those for problems of few groups. */
static void large_tiles(void **state) {
    (void)state;
    clmoe_context *context = test_context(0);
    const device_info real = context->info;
    const tuning tuned = context->tuning;
    test_case("large tiles");
    if (real.max_group < 1024 || real.local_mem_bytes < 20000)
        skip();
    context->info.type = CL_DEVICE_TYPE_GPU;
    context->tuning = (tuning){0};
    assert_int_equal(gemm_tiled.row_tile(context, 1000), 128);
    assert_int_equal(gemm_tiled.row_tile(context, 100), 64);
    for (size_t s = 0; s < GEMM_STORAGES; s++)
        check_large(&gemm_storages[s], s % 3 ? CLMOE_F32 : CLMOE_BF16, SPREAD_RANDOM);
    check_large(&gemm_storages[1], CLMOE_F16, SPREAD_DENSE);
    context->info = real;
    context->tuning = tuned;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(packed_as_raw),
        TEST(packed_as_raw_of_few_rows),
        TEST(large_tiles),
    };
    support_filter();
    return cmocka_run_group_tests(tests, support_setup, support_teardown);
}
