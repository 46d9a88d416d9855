#include "gradient_case.h"

#include <math.h>
#include <string.h>

#define TOLERANCE 1e-6

/* ---- Making a case ------------------------------------------------------------------------- */

static uint32_t random_kept(const gradient_case *c, uint32_t expert) {
    switch (c->spread) {
    case SPREAD_RANDOM:
        return random_below(3) == 0 ? 0 : random_below(c->rows + 1);
    case SPREAD_ONE_EXPERT:
        return expert == c->experts / 2 ? c->rows : 0;
    case SPREAD_DENSE:
        return c->rows;
    case SPREAD_NONE:
        break;
    }
    return 0;
}

/* Buckets with an empty tile here and there, and one at the end. */
static void make_buckets(const gradient_case *c, gradient_data *d) {
    uint32_t pairs = 0;
    d->offsets = HOST(uint32_t, c->experts + 1);
    d->kept = HOST(uint32_t, c->experts);
    for (uint32_t e = 0; e < c->experts; e++) {
        d->kept[e] = random_kept(c, e);
        const uint32_t tiles = (d->kept[e] + c->row_tile - 1) / c->row_tile + random_below(2);
        d->offsets[e + 1] = d->offsets[e] + tiles * c->row_tile;
        pairs += d->kept[e];
    }
    d->slots = c->spread == SPREAD_DENSE ? c->rows : d->offsets[c->experts] + c->row_tile;
    d->tokens = pairs + 2;
    d->token_of = HOST(int32_t, d->slots);
    for (uint32_t s = 0; s < d->slots; s++)
        d->token_of[s] = -1;
    for (uint32_t e = 0; e < c->experts; e++)
        for (uint32_t s = d->offsets[e]; s < d->offsets[e] + d->kept[e]; s++)
            d->token_of[s] = (int32_t)random_below(d->tokens);
}

static float *random_values(const gradient_case *c, clmoe_type type, size_t n) {
    float *values = c->exact ? random_eighths(n, 1.0) : random_floats(n, 1.0);
    round_all(type, values, n);
    return values;
}

static float *all_nan(size_t n) {
    float *values = HOST(float, n);
    for (size_t i = 0; i < n; i++)
        values[i] = NAN;
    return values;
}

/* `rows` rows of `width` values, NaN in those that are not used and behind each `columns`. */
static float *make_operand(const gradient_case *c, const gradient_data *d, clmoe_type type,
                           bool gathered, uint32_t columns, uint32_t width) {
    const size_t rows = gathered ? d->tokens : d->slots;
    const float *values = random_values(c, type, rows * width);
    float *operand = all_nan(rows * width);
    for (uint32_t s = 0; s < d->slots; s++) {
        const size_t row = gathered ? (size_t)d->token_of[s] : s;
        if (d->token_of[s] >= 0)
            memcpy(operand + row * width, values + row * width, columns * sizeof *values);
    }
    return operand;
}

void gradient_make_data(const gradient_case *c, gradient_data *d) {
    memset(d, 0, sizeof *d);
    make_buckets(c, d);
    d->p_row = c->m + (c->parts ? 3 : 0);
    d->q_row = c->n + (c->parts ? 5 : 0);
    d->c_row = c->n + (c->parts ? 7 : 0);
    d->c_expert = (size_t)c->m * d->c_row + (c->parts ? 2 : 0);
    d->c_elements = c->experts * d->c_expert;
    d->p = make_operand(c, d, c->types.p_type, c->gather_p, c->m, d->p_row);
    d->q = make_operand(c, d, c->types.q_type, c->gather_q, c->n, d->q_row);
    d->c = all_nan(d->c_elements);
    const float *values = random_values(c, c->types.c_type, d->c_elements);
    for (size_t e = 0; e < c->experts && c->accumulate; e++)
        for (size_t m = 0; m < c->m; m++) {
            const size_t at = e * d->c_expert + m * d->c_row;
            memcpy(d->c + at, values + at, c->n * sizeof *values);
        }
}

/* ---- What should come out ------------------------------------------------------------------ */

/* want [n]: row m of an expert's gradient. */
static void expected_row(const gradient_case *c, const gradient_data *d, size_t e, size_t m,
                         double *want) {
    for (size_t n = 0; n < c->n; n++)
        want[n] = c->accumulate ? (double)d->c[e * d->c_expert + m * d->c_row + n] : 0.0;
    for (size_t s = d->offsets[e]; s < d->offsets[e] + d->kept[e]; s++) {
        const size_t token = (size_t)d->token_of[s];
        const double p = (double)d->p[(c->gather_p ? token : s) * d->p_row + m];
        const float *q = d->q + (c->gather_q ? token : s) * d->q_row;
        for (size_t n = 0; n < c->n; n++)
            want[n] += p * (double)q[n];
    }
}

/*
 * Matrix units cut bits off where they add a step of rows to a sum, always downwards in magnitude:
 * that error grows with the rows, where those of roundings largely cancel.
 */
static double tolerance(const gradient_case *c) {
    if (c->types.c_type != CLMOE_F32)
        return type_tolerance(c->types.c_type);
    const bool units = c->engine == &gemm_nv_mma || c->engine == &gemm_nv_wgmma;
    return units && c->rows > 512 ? TOLERANCE * c->rows / 512 : TOLERANCE;
}

static void check_gradient(const gradient_case *c, const gradient_data *d, const float *got) {
    const size_t size = (size_t)c->experts * c->m * c->n;
    float *elements = HOST(float, size);
    double *want = HOST(double, size);
    for (size_t row = 0; row < (size_t)c->experts * c->m; row++) {
        const size_t e = row / c->m, m = row % c->m;
        expected_row(c, d, e, m, want + row * c->n);
        memcpy(elements + row * c->n, got + e * d->c_expert + m * d->c_row, c->n * sizeof *got);
    }
    for (size_t i = 0; c->exact && i < size; i++)
        CHECK(elements[i] == type_round(c->types.c_type, (float)want[i]),
              "element %zu is %g, not %g\n", i, (double)elements[i], want[i]);
    compare_floats("C", elements, want, size, tolerance(c));
}

/* Elements between C's rows and experts have the bits that they had. */
static void check_gaps(const gradient_case *c, const gradient_data *d, const char *before,
                       const char *after) {
    const size_t bytes = type_size(c->types.c_type);
    for (size_t i = 0; i < d->c_elements; i++) {
        const size_t in_expert = i % d->c_expert;
        if (in_expert % d->c_row >= c->n || in_expert >= (size_t)c->m * d->c_row)
            CHECK(memcmp(before + i * bytes, after + i * bytes, bytes) == 0,
                  "element %zu, between the rows, was written\n", i);
    }
}

/* ---- Running ------------------------------------------------------------------------------- */

static bool takes_all(const gemm_engine *engine) {
    return strcmp(engine->name, "ref") == 0 || strcmp(engine->name, "cpu") == 0 ||
           strcmp(engine->name, "tiled") == 0;
}

bool gradient_takes(const gemm_engine *engine, const gemm_gradient_shape *types) {
    void *state = NULL;
    clmoe_status status = CLMOE_UNSUPPORTED;
    if (engine->gradient && engine->supports(test_context(0)) == CLMOE_SUCCESS)
        status = engine->gradient->create(test_context(0), types, &state);
    else
        return false;
    if (status == CLMOE_SUCCESS)
        engine->gradient->destroy(state);
    if (takes_all(engine) || status != CLMOE_UNSUPPORTED)
        OK(status);
    return status == CLMOE_SUCCESS;
}

void gradient_prepare(const gradient_case *c, const gradient_data *d, gradient_run *run) {
    const gemm_gradient_engine *engine = c->engine->gradient;
    const gemm_gradient_shape *types = &c->types;
    const size_t p_rows = c->gather_p ? d->tokens : d->slots;
    const size_t q_rows = c->gather_q ? d->tokens : d->slots;
    gemm_gradient *g = &run->problem;
    OK(engine->create(test_context(0), types, &run->state));
    clean_later(engine->destroy, run->state);
    *g = (gemm_gradient){
        .types = *types,
        .slots = d->slots,
        .experts = c->experts,
        .p = {buf_of_type(types->p_type, d->p, p_rows * d->p_row), d->p_row, c->gather_p},
        .q = {buf_of_type(types->q_type, d->q, q_rows * d->q_row), d->q_row, c->gather_q},
        .m = c->m,
        .n = c->n,
        .c = buf_new_type(types->c_type, d->c_elements),
        .expert = d->c_expert,
        .row = d->c_row,
        .accumulate = c->accumulate,
        .scratch = buf_new(engine->scratch(run->state, c->experts, d->slots, c->m, c->n)),
    };
    if (c->gather_p || c->gather_q)
        g->token_of = buf_of(d->token_of, 4 * (size_t)d->slots);
    if (c->spread != SPREAD_DENSE) {
        g->offsets = buf_of(d->offsets, 4 * (size_t)(c->experts + 1));
        g->kept = buf_of(d->kept, 4 * (size_t)c->experts);
    }
    run->elements = d->c_elements;
    run->before = buf_of_type(types->c_type, d->c, d->c_elements);
}

void *gradient_run_on(const gradient_case *c, gradient_run *run, cl_command_queue queue) {
    launch chain;
    cl_event event = NULL;
    buf_write(run->problem.c, buf_get(run->before), run->elements * type_size(c->types.c_type));
    OK(launch_begin(&chain, test_context(0), queue, 0, NULL));
    clmoe_status status = c->engine->gradient->run(run->state, &chain, &run->problem);
    OK(launch_end(&chain, status, &event));
    CL_OK(clWaitForEvents(1, &event));
    clReleaseEvent(event);
    return buf_get(run->problem.c);
}

void gradient_check_case(const gradient_case *c, uint64_t seed) {
    gradient_data d;
    gradient_run run;
    test_case("%s: %u experts, %u rows, m %u, n %u, types %d, %d, %d, spread %d, row tile %u, "
              "gather %d, %d, parts %d, accumulate %d",
              c->engine->name, c->experts, c->rows, c->m, c->n, c->types.p_type, c->types.q_type,
              c->types.c_type, c->spread, c->row_tile, c->gather_p, c->gather_q, c->parts,
              c->accumulate);
    seed_set(seed);
    support_aligned = seed % 2;
    gradient_make_data(c, &d);
    gradient_prepare(c, &d, &run);
    const void *got = gradient_run_on(c, &run, seed % 4 < 2 ? test.queue : test.out_of_order);
    check_gaps(c, &d, buf_get(run.before), got);
    check_gradient(c, &d, type_values(c->types.c_type, got, d.c_elements));
    support_aligned = false;
}
