/*
 * The engines, driven directly: random buckets, every layout of the weights, sizes around the edges
 * of tiles. `test_gemm small` runs a few small cases, for checkers that interpret kernels.
 */
#include "gemm/gemm.h" /* before support.h: cmocka has a macro fail() */

#include "support.h"

#ifdef CLMOE_WITH_CLBLAST
#include <clblast_c.h>
#endif
#include <math.h>
#include <string.h>

#define TOLERANCE 1e-6

/* Which matrices: gate and up (n = H, k = D), or down (n = D, k = H). */
typedef struct storage {
    const char *name;
    clmoe_gate_layout layout;
    bool transposed, down;
} storage;

static const storage storages[] = {
    {"concatenated", CLMOE_GATE_CONCAT, false, false},
    {"concatenated, transposed", CLMOE_GATE_CONCAT, true, false},
    {"interleaved", CLMOE_GATE_INTERLEAVED, false, false},
    {"interleaved, transposed", CLMOE_GATE_INTERLEAVED, true, false},
    {"separate", CLMOE_GATE_SEPARATE, false, false},
    {"separate, transposed", CLMOE_GATE_SEPARATE, true, false},
    {"plain", CLMOE_GATE_NONE, false, false},
    {"plain, transposed", CLMOE_GATE_NONE, true, false},
    {"down", CLMOE_GATE_NONE, false, true},
    {"down, transposed", CLMOE_GATE_NONE, true, true},
};

/* How rows are spread over the experts. */
typedef enum spread { SPREAD_RANDOM, SPREAD_ONE_EXPERT, SPREAD_NONE, SPREAD_DENSE } spread;

typedef struct gemm_case {
    const gemm_engine *engine;
    const storage *store;
    spread spread;
    uint32_t experts, rows, n, k; /* rows: of the fullest expert */
    clmoe_activation activation;
    float limit, alpha, up_shift;
    bool bias, gather, exact, packed;
    gemm_row_weight row_weight;
} gemm_case;

/* The host's side of a case. Arrays of slots as in clmoe_plan_layout. */
typedef struct gemm_data {
    uint32_t row_tile, slots, tokens, pairs;
    uint32_t *offsets, *kept;
    int32_t *tile_expert, *token_of, *row_of;
    float *a, *pair_weights;
    float *matrices[2], *biases[2]; /* gate (or both) and up, or down in [1] */
} gemm_data;

static bool gated(const gemm_case *c) {
    return !c->store->down && c->store->layout != CLMOE_GATE_NONE;
}

/* Whether one buffer holds gate and up. */
static bool together(const gemm_case *c) {
    return gated(c) && c->store->layout != CLMOE_GATE_SEPARATE;
}

/* ---- Making a case ------------------------------------------------------------------------- */

static uint32_t random_kept(const gemm_case *c, uint32_t expert) {
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

/* Buckets start at multiples of the tile, with an empty tile here and there and one at the end. */
static void make_buckets(const gemm_case *c, gemm_data *d) {
    d->row_tile = c->engine->row_tile(test_context(0), c->rows);
    d->offsets = HOST(uint32_t, c->experts + 1);
    d->kept = HOST(uint32_t, c->experts);
    for (uint32_t e = 0; e < c->experts; e++) {
        d->kept[e] = random_kept(c, e);
        uint32_t tiles = (d->kept[e] + d->row_tile - 1) / d->row_tile + random_below(2);
        d->offsets[e + 1] = d->offsets[e] + tiles * d->row_tile;
        d->pairs += d->kept[e];
    }
    d->slots = c->spread == SPREAD_DENSE ? c->rows : d->offsets[c->experts] + d->row_tile;
}

static void make_rows(const gemm_case *c, gemm_data *d) {
    uint32_t pair = 0;
    d->tokens = d->pairs + 1;
    d->tile_expert = HOST(int32_t, d->slots / d->row_tile + 1);
    d->token_of = HOST(int32_t, d->slots);
    d->row_of = HOST(int32_t, d->slots);
    for (uint32_t tile = 0; tile < d->slots / d->row_tile; tile++)
        d->tile_expert[tile] = -1;
    for (uint32_t s = 0; s < d->slots; s++)
        d->token_of[s] = d->row_of[s] = -1;
    for (uint32_t e = 0; e < c->experts; e++)
        for (uint32_t s = d->offsets[e]; s < d->offsets[e] + d->kept[e]; s++) {
            d->tile_expert[s / d->row_tile] = (int32_t)e;
            d->token_of[s] = (int32_t)random_below(d->tokens);
            d->row_of[s] = (int32_t)(d->pairs - ++pair);
        }
}

static float *random_values(const gemm_case *c, size_t n, double deviation) {
    return c->exact ? random_eighths(n, deviation) : random_floats(n, deviation);
}

static void make_floats(const gemm_case *c, gemm_data *d) {
    const size_t matrix = (size_t)c->experts * c->n * c->k, bias = (size_t)c->experts * c->n;
    const size_t rows = c->gather ? d->tokens : d->slots;
    const double deviation = c->exact ? 1.0 : 1.0 / sqrt(c->k);
    d->a = random_values(c, rows * c->k, 1.0);
    if (!c->gather)
        for (uint32_t s = 0; s < d->slots; s++)
            if (d->row_of[s] < 0)
                for (uint32_t i = 0; i < c->k; i++)
                    d->a[(size_t)s * c->k + i] = NAN;
    d->pair_weights = random_values(c, d->pairs, 1.0);
    for (int m = gated(c) ? 0 : 1; m < 2; m++) {
        d->matrices[m] = random_values(c, together(c) ? 2 * matrix : matrix, deviation);
        d->biases[m] = random_values(c, together(c) ? 2 * bias : bias, deviation);
    }
}

static void make_data(const gemm_case *c, gemm_data *d) {
    memset(d, 0, sizeof *d);
    make_buckets(c, d);
    make_rows(c, d);
    make_floats(c, d);
}

/* ---- What should come out ------------------------------------------------------------------ */

/* Row of the stored matrix of an expert, and how many it has, for column n of gate (0) or up (1).
 */
static size_t stored_row(const gemm_case *c, int m, size_t n, size_t *rows) {
    *rows = together(c) ? 2 * (size_t)c->n : c->n;
    if (!together(c))
        return n;
    return c->store->layout == CLMOE_GATE_INTERLEAVED ? 2 * n + (size_t)m : (size_t)m * c->n + n;
}

static double linear(const gemm_case *c, const gemm_data *d, int m, size_t expert, uint32_t s,
                     size_t n, double weight) {
    size_t rows = 0;
    const size_t row = stored_row(c, m, n, &rows), from = c->gather ? (size_t)d->token_of[s] : s;
    const float *w = d->matrices[together(c) ? 0 : m] + expert * rows * c->k;
    double sum = 0.0;
    for (size_t k = 0; k < c->k; k++)
        sum += (double)d->a[from * c->k + k] *
               (double)(c->store->transposed ? w[k * rows + row] : w[row * c->k + k]);
    if (c->row_weight == GEMM_ROW_WEIGHT_INPUT)
        sum *= weight;
    if (c->bias)
        sum += (double)d->biases[together(c) ? 0 : m][expert * rows + row];
    return sum;
}

static double activated(const gemm_case *c, double v) {
    const double pi = 3.14159265358979323846;
    switch (c->activation) {
    case CLMOE_ACT_SILU:
        return v / (1.0 + exp(-(double)c->alpha * v));
    case CLMOE_ACT_GELU_ERF:
        return v / 2.0 * (1.0 + erf(v / sqrt(2.0)));
    case CLMOE_ACT_GELU_TANH:
        return v / 2.0 * (1.0 + tanh(sqrt(2.0 / pi) * (v + 0.044715 * v * v * v)));
    case CLMOE_ACT_RELU:
        return fmax(v, 0.0);
    case CLMOE_ACT_RELU2:
        return fmax(v, 0.0) * fmax(v, 0.0);
    }
    return NAN;
}

static double expected(const gemm_case *c, const gemm_data *d, size_t expert, uint32_t s,
                       size_t n) {
    const double weight = c->row_weight ? (double)d->pair_weights[d->row_of[s]] : 1.0;
    const double at_output = c->row_weight == GEMM_ROW_WEIGHT_OUTPUT ? weight : 1.0;
    double up = linear(c, d, 1, expert, s, n, weight);
    if (c->store->down)
        return up * at_output;
    if (!gated(c))
        return activated(c, up) * at_output;
    double gate = linear(c, d, 0, expert, s, n, weight);
    if (c->limit > 0.0F) {
        gate = fmin(gate, (double)c->limit);
        up = fmin(fmax(up, -(double)c->limit), (double)c->limit);
    }
    return activated(c, gate) * (up + (double)c->up_shift) * at_output;
}

/* ---- Running ------------------------------------------------------------------------------- */

typedef struct gemm_run {
    void *state;
    gemm_problem problem;
} gemm_run;

static void set_weights(const gemm_case *c, const gemm_data *d, gemm_problem *p) {
    const size_t matrix = 4 * (size_t)c->experts * c->n * c->k;
    const size_t bias = 4 * (size_t)c->experts * c->n, both = together(c) ? 2 : 1;
    const bool down = c->store->down;
    gemm_weight unused = {0};
    const clmoe_mlp_desc desc = {
        .hidden_dim = down ? c->k : c->n,
        .gate_layout = c->store->layout,
        .gate_up_transposed = c->store->transposed && !down,
        .down_transposed = c->store->transposed && down,
        .gate_up_bias = c->bias,
        .down_bias = c->bias,
    };
    const clmoe_mlp_weights weights = {
        .gate = buf_of(d->matrices[0], matrix * both),
        .up = together(c) || down ? (clmoe_buf){0} : buf_of(d->matrices[1], matrix),
        .down = down ? buf_of(d->matrices[1], matrix) : (clmoe_buf){0},
        .gate_bias = buf_of(d->biases[0], bias * both),
        .up_bias = together(c) || down ? (clmoe_buf){0} : buf_of(d->biases[1], bias),
        .down_bias = down ? buf_of(d->biases[1], bias) : (clmoe_buf){0},
    };
    gemm_mlp_weights(&desc, &weights, down ? c->n : c->k, CLMOE_F32, &p->gate,
                     down ? &unused : &p->up, down ? &p->up : &unused);
}

static gemm_shape shape_of(const gemm_case *c) {
    const bool down = c->store->down;
    return (gemm_shape){
        .experts = c->experts,
        .dim = down ? c->n : c->k,
        .hidden_dim = down ? c->k : c->n,
        .form = gated(c) ? GEMM_GATED : GEMM_PLAIN,
        .gate_up_transposed = c->store->transposed && !down,
        .down_transposed = c->store->transposed && down,
        .interleaved = c->store->layout == CLMOE_GATE_INTERLEAVED,
    };
}

/* Hands the weights over in the engine's own form; the raw ones are out of reach from then on. */
static void pack(const gemm_case *c, gemm_run *run) {
    gemm_problem *p = &run->problem;
    launch chain;
    cl_event event = NULL;
    clmoe_buf packed = buf_new(4 * c->engine->packed_elements(run->state, p));
    OK(launch_begin(&chain, test_context(0), test.queue, 0, NULL));
    clmoe_status status = c->engine->pack(run->state, &chain, p, packed);
    OK(launch_end(&chain, status, &event));
    CL_OK(clWaitForEvents(1, &event));
    clReleaseEvent(event);
    p->packed = true;
    p->gate.buf = (clmoe_buf){0};
    p->up.buf = packed;
}

static void prepare(const gemm_case *c, const gemm_data *d, gemm_run *run) {
    const gemm_shape layer = shape_of(c);
    gemm_problem *p = &run->problem;
    *p = (gemm_problem){
        .slots = d->slots,
        .row_tile = d->row_tile,
        .experts = c->experts,
        .a = buf_of(d->a, 4 * (size_t)(c->gather ? d->tokens : d->slots) * c->k),
        .form = c->store->down ? GEMM_LINEAR
                : gated(c)     ? GEMM_GATED
                               : GEMM_PLAIN,
        .n = c->n,
        .k = c->k,
        .activation = c->activation,
        .limit = c->limit,
        .alpha = c->alpha,
        .up_shift = c->up_shift,
        .row_weight = c->row_weight,
        .row_of = buf_of(d->row_of, 4 * (size_t)d->slots),
        .pair_weights = buf_of(d->pair_weights, 4 * (size_t)d->pairs),
        .c = buf_new(4 * (size_t)d->slots * c->n),
    };
    if (c->gather)
        p->token_of = buf_of(d->token_of, 4 * (size_t)d->slots);
    if (c->spread != SPREAD_DENSE) {
        p->tile_expert = buf_of(d->tile_expert, 4 * (size_t)(d->slots / d->row_tile));
        p->offsets = buf_of(d->offsets, 4 * (size_t)(c->experts + 1));
        p->kept = buf_of(d->kept, 4 * (size_t)c->experts);
    }
    p->scratch = buf_new(c->engine->scratch(&layer, d->slots, c->n, p->form));
    set_weights(c, d, p);
    OK(c->engine->create(test_context(0), &layer, &run->state));
    clean_later(c->engine->destroy, run->state);
    if (c->packed)
        pack(c, run);
}

static float *run_on(const gemm_case *c, gemm_run *run, cl_command_queue queue) {
    launch chain;
    cl_event event = NULL;
    buf_poison(run->problem.c);
    OK(launch_begin(&chain, test_context(0), queue, 0, NULL));
    clmoe_status status = c->engine->run(run->state, &chain, &run->problem);
    OK(launch_end(&chain, status, &event));
    CL_OK(clWaitForEvents(1, &event));
    clReleaseEvent(event);
    return buf_get(run->problem.c);
}

static bool in_use(const gemm_data *d, uint32_t s) {
    return d->row_of[s] >= 0;
}

/* Rows of padding are left as they were, or finite. */
static void check_padding(const gemm_case *c, const gemm_data *d, const float *got) {
    const uint32_t *bits = (const uint32_t *)(const void *)got;
    for (uint32_t s = 0; s < d->slots; s++)
        for (size_t i = (size_t)s * c->n; !in_use(d, s) && i < (size_t)(s + 1) * c->n; i++)
            CHECK(isfinite(got[i]) || bits[i] == 0x7FC0DEADu, "padding in row %u became %g\n", s,
                  (double)got[i]);
}

static void check_output(const gemm_case *c, const gemm_data *d, const float *got) {
    const size_t size = (size_t)d->pairs * c->n;
    float *rows = HOST(float, size);
    double *want = HOST(double, size);
    size_t row = 0;
    for (uint32_t e = 0; e < c->experts; e++)
        for (uint32_t s = d->offsets[e]; s < d->offsets[e] + d->kept[e]; s++, row++)
            for (size_t n = 0; n < c->n; n++) {
                rows[row * c->n + n] = got[(size_t)s * c->n + n];
                want[row * c->n + n] = expected(c, d, e, s, n);
            }
    for (size_t i = 0; c->exact && i < size; i++)
        CHECK((double)rows[i] == want[i], "element %zu is %g, not %g\n", i, (double)rows[i],
              want[i]);
    /* A square doubles the relative error of what it is taken of. */
    double squares = c->activation == CLMOE_ACT_RELU2 ? 2 : 1;
    compare_floats("C", rows, want, size, squares * TOLERANCE);
    check_padding(c, d, got);
}

static void check_case(const gemm_case *c, uint64_t seed) {
    gemm_data d;
    gemm_run run;
    test_case("%s: %s, %u experts, %u rows, n %u, k %u, spread %d, activation %d, bias %d, "
              "gather %d, row weight %d, packed %d",
              c->engine->name, c->store->name, c->experts, c->rows, c->n, c->k, c->spread,
              c->activation, c->bias, c->gather, c->row_weight, c->packed);
    seed_set(seed);
    make_data(c, &d);
    prepare(c, &d, &run);
    check_output(c, &d, run_on(c, &run, seed % 2 ? test.queue : test.out_of_order));
}

/* ---- Cases --------------------------------------------------------------------------------- */

static uint32_t pick(const uint32_t *from, size_t count) {
    return from[random_below((uint32_t)count)];
}

#define PICK(array) pick((array), COUNT_OF(array))

/* Everything random but the engine and the storage. */
static gemm_case random_case(const gemm_engine *engine, const storage *store, uint32_t most) {
    static const uint32_t edges[] = {1,  2,  3,  5,  8,  15, 16,  17,  31,  32, 33,
                                     47, 48, 63, 64, 65, 96, 100, 129, 160, 257};
    const bool clamped = random_below(2) == 0;
    gemm_case c = {
        .engine = engine,
        .store = store,
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

static bool runs_here(const gemm_engine *engine) {
    return engine->supports(test_context(0)) == CLMOE_SUCCESS;
}

static void random_cases(uint64_t count, uint32_t most) {
    uint64_t seed = 1;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < COUNT_OF(storages) && runs_here(gemm_engines[i]); s++)
            for (uint64_t n = 0; n < count; n++) {
                seed_set(seed * 1000);
                const gemm_case c = random_case(gemm_engines[i], &storages[s], most);
                check_case(&c, seed++);
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

/* Integers in, exact sums out: linear, and relu of gate times up. */
static void exact_values(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < COUNT_OF(storages) && runs_here(gemm_engines[i]); s++) {
            gemm_case c = {.engine = gemm_engines[i],
                           .store = &storages[s],
                           .experts = 3,
                           .rows = 70,
                           .n = 45,
                           .k = 77,
                           .activation = CLMOE_ACT_RELU,
                           .bias = true,
                           .exact = true};
            check_case(&c, s);
            c.packed = c.engine->pack;
            if (c.packed)
                check_case(&c, s);
        }
}

/* Twenty runs, the same bits. */
static void check_repeatable(const gemm_engine *engine, const storage *store, bool packed) {
    const gemm_case c = {.engine = engine,
                         .store = store,
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
    make_data(&c, &d);
    prepare(&c, &d, &run);
    const float *first = run_on(&c, &run, test.queue);
    for (int n = 1; n < 20; n++)
        compare_bits("C", run_on(&c, &run, n % 2 ? test.queue : test.out_of_order), first,
                     4 * (size_t)d.slots * c.n);
}

static void repeatable(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < 2 && runs_here(gemm_engines[i]); s++)
            for (int packed = 0; packed <= (gemm_engines[i]->pack != NULL); packed++)
                check_repeatable(gemm_engines[i], &storages[s], packed);
}

/* Rows of a dense problem that are all the same one. */
static const float *equal_rows(const gemm_engine *engine, const storage *store, bool packed,
                               uint32_t rows) {
    const gemm_case c = {.engine = engine,
                         .store = store,
                         .spread = SPREAD_DENSE,
                         .experts = 1,
                         .rows = rows,
                         .n = 67,
                         .k = 283,
                         .alpha = 1.0F,
                         .packed = packed};
    gemm_data d;
    gemm_run run;
    seed_set(11);
    make_data(&c, &d);
    seed_set(12);
    float *row = random_floats(c.k, 1.0);
    for (size_t m = 0; m < 2; m++)
        if (d.matrices[m])
            memcpy(d.matrices[m], random_floats((size_t)c.n * c.k, 1.0), 4 * (size_t)c.n * c.k);
    for (uint32_t s = 0; s < rows; s++)
        memcpy(d.a + (size_t)s * c.k, row, 4 * (size_t)c.k);
    prepare(&c, &d, &run);
    return run_on(&c, &run, test.queue);
}

/* An engine with kernels of its own: a row's bits depend on neither its place nor its neighbours.
 */
static void rows_are_independent(void **state) {
    (void)state;
    static const storage kinds[] = {
        {"separate", CLMOE_GATE_SEPARATE, false, false},
        {"separate, transposed", CLMOE_GATE_SEPARATE, true, false},
    };
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t s = 0; s < COUNT_OF(kinds) && runs_here(gemm_engines[i]); s++) {
            const gemm_engine *engine = gemm_engines[i];
            for (int packed = 0; packed <= (engine->pack != NULL) && !engine->blocks; packed++) {
                test_case("%s: %s, packed %d", engine->name, kinds[s].name, packed);
                const float *one = equal_rows(engine, &kinds[s], packed, 1);
                const float *many = equal_rows(engine, &kinds[s], packed, 71);
                for (size_t row = 0; row < 71; row++)
                    compare_bits("row", many + row * 67, one, 4 * 67);
            }
        }
}

static void check_nan(const gemm_engine *engine, const storage *store, clmoe_activation act,
                      bool packed) {
    const gemm_case c = {.engine = engine,
                         .store = store,
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
    make_data(&c, &d);
    d.a[4 * c.k + 17] = NAN;
    prepare(&c, &d, &run);
    const float *got = run_on(&c, &run, test.queue);
    for (size_t e = 0; e < (size_t)c.rows * c.n; e++)
        CHECK(!isnan(got[e]) == (e / c.n != 4), "element %zu is %g\n", e, (double)got[e]);
}

/* A NaN in a row reaches that row's outputs, through every activation, and no other row. */
static void nan_stays_in_its_row(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (int act = 0; act <= CLMOE_ACT_RELU2 && runs_here(gemm_engines[i]); act++)
            for (int packed = 0; packed <= (gemm_engines[i]->pack != NULL); packed++) {
                check_nan(gemm_engines[i], &storages[0], (clmoe_activation)act, packed);
                check_nan(gemm_engines[i], &storages[6], (clmoe_activation)act, packed);
            }
}

static void no_rows(void **state) {
    (void)state;
    for (size_t i = 0; gemm_engines[i]; i++) {
        if (!runs_here(gemm_engines[i]))
            continue;
        const gemm_case c = {.engine = gemm_engines[i],
                             .store = &storages[0],
                             .spread = SPREAD_DENSE,
                             .experts = 1,
                             .rows = 0,
                             .n = 3,
                             .k = 3};
        gemm_data d;
        gemm_run run;
        test_case("%s: no rows", c.engine->name);
        make_data(&c, &d);
        prepare(&c, &d, &run);
        run_on(&c, &run, test.queue);
    }
}

static void choice_of_engine(void **state) {
    (void)state;
    const gemm_engine *engine = NULL;
    cl_device_type type = 0;
    test_case("the engines' names");
    CL_OK(clGetDeviceInfo(test.device, CL_DEVICE_TYPE, sizeof type, &type, NULL));
    OK(gemm_engine_pick(test_context(0), NULL, &engine));
    if (type & CL_DEVICE_TYPE_CPU)
        assert_ptr_equal(engine, &gemm_cpu);
    if (type & CL_DEVICE_TYPE_GPU)
        assert_ptr_equal(engine, &gemm_tiled);
    OK(gemm_engine_pick(test_context(0), "ref", &engine));
    assert_ptr_equal(engine, &gemm_ref);
    assert_int_equal(gemm_engine_pick(test_context(0), "fast", &engine), CLMOE_INVALID_DESC);
    assert_non_null(strstr(clmoe_last_error(), "fast"));
    assert_non_null(strstr(clmoe_last_error(), "cpu, tiled, ref"));
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
    assert_int_equal(gemm_engine_pick(&small, "tiled", &engine), CLMOE_UNSUPPORTED);
    OK(gemm_engine_pick(&small, NULL, &engine));
    assert_ptr_equal(engine, &gemm_ref);
}

static void check_storages(const gemm_engine *engine) {
    for (size_t s = 0; s < COUNT_OF(storages) && runs_here(engine); s++) {
        gemm_case c = {.engine = engine,
                       .store = &storages[s],
                       .experts = 3,
                       .rows = 70,
                       .n = 75,
                       .k = 37,
                       .alpha = 1.0F};
        check_case(&c, s);
        c.packed = c.engine->pack;
        if (c.packed)
            check_case(&c, s);
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
/* CLBlast's offsets are ints. */
static void too_large_for_clblast(void **state) {
    (void)state;
    void *engine = NULL;
    test_case("too large for clblast");
    const gemm_shape layer = {.experts = 128, .dim = 4096, .hidden_dim = 4096, .form = GEMM_GATED};
    assert_int_equal(gemm_clblast.create(test_context(0), &layer, &engine), CLMOE_UNSUPPORTED);
    assert_non_null(strstr(clmoe_last_error(), "2147483647"));
    assert_null(engine);
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
        TEST(every_storage),         TEST(exact_values),         TEST(repeatable),
        TEST(rows_are_independent),  TEST(nan_stays_in_its_row), TEST(no_rows),
        TEST(choice_of_engine),      TEST(devices_with_less),    TEST(variants_of_other_devices),
#ifdef CLMOE_WITH_CLBLAST
        TEST(too_large_for_clblast),
#endif
    };
    if (argc > 1 && strcmp(argv[1], "small") == 0)
        return cmocka_run_group_tests(small, support_setup, teardown);
    return cmocka_run_group_tests(tests, support_setup, teardown);
}
