#include "gemm_case.h"

#include <math.h>
#include <string.h>

/*
 * Roundings of f32, by its unit. A sum of k terms rounds what it has k times, and that is never
 * more than its largest partial sum: of either sign, the errors add up like sqrt(k). An activation
 * may be off by so many units of its argument: OpenCL allows erf 16 that are half as large.
 */
#define UNIT          (1.0 / 16777216)
#define SUM_ROUNDINGS 3.0
#define ACT_ROUNDINGS 10.0

const storage gemm_storages[GEMM_STORAGES] = {
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

bool gemm_runs_here(const gemm_engine *engine) {
    return engine->supports(test_context(0)) == CLMOE_SUCCESS;
}

bool gemm_is_nv(const gemm_engine *engine) {
    return engine == &gemm_nv_mma || engine == &gemm_nv_wgmma;
}

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
    d->pair_of = HOST(int32_t, d->slots);
    for (uint32_t tile = 0; tile < d->slots / d->row_tile; tile++)
        d->tile_expert[tile] = -1;
    for (uint32_t s = 0; s < d->slots; s++)
        d->token_of[s] = d->pair_of[s] = -1;
    for (uint32_t e = 0; e < c->experts; e++)
        for (uint32_t s = d->offsets[e]; s < d->offsets[e] + d->kept[e]; s++) {
            d->tile_expert[s / d->row_tile] = (int32_t)e;
            d->token_of[s] = (int32_t)random_below(d->tokens);
            d->pair_of[s] = (int32_t)(d->pairs - ++pair);
        }
}

static float *random_values(const gemm_case *c, size_t n, double deviation) {
    return c->exact ? random_eighths(n, deviation) : random_floats(n, deviation);
}

static float *random_elements(const gemm_case *c, size_t n, double deviation) {
    float *values = random_values(c, n, deviation);
    round_all(c->type, values, n);
    return values;
}

static void make_floats(const gemm_case *c, gemm_data *d) {
    const size_t matrix = (size_t)c->experts * c->n * c->k, bias = (size_t)c->experts * c->n;
    const size_t rows = c->gather ? d->tokens : d->slots;
    const double deviation = c->exact ? 1.0 : 1.0 / sqrt(c->k);
    d->a = random_elements(c, rows * c->k, 1.0);
    if (!c->gather)
        for (uint32_t s = 0; s < d->slots; s++)
            if (d->pair_of[s] < 0)
                for (uint32_t i = 0; i < c->k; i++)
                    d->a[(size_t)s * c->k + i] = NAN;
    d->pair_weights = random_values(c, d->pairs, 1.0);
    if (c->accumulate)
        d->c = random_elements(c, (size_t)d->slots * c->n, 1.0);
    for (int m = gated(c) ? 0 : 1; m < 2; m++) {
        d->matrices[m] = random_elements(c, together(c) ? 2 * matrix : matrix, deviation);
        d->biases[m] = random_elements(c, together(c) ? 2 * bias : bias, deviation);
    }
}

void gemm_make_data(const gemm_case *c, gemm_data *d) {
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

/* A value, and how far off f32 may be before it is stored. */
typedef struct approximate {
    double value, error;
} approximate;

/* Matrix units cut off where they add: as much as a unit, where a rounding takes half of one. */
static double roundings(const gemm_case *c) {
    return c->engine == &gemm_nv_split ? 2.0 * SUM_ROUNDINGS : SUM_ROUNDINGS;
}

static approximate linear(const gemm_case *c, const gemm_data *d, int m, size_t expert, uint32_t s,
                          size_t n, double weight) {
    size_t rows = 0;
    const size_t row = stored_row(c, m, n, &rows), from = c->gather ? (size_t)d->token_of[s] : s;
    const float *w = d->matrices[together(c) ? 0 : m] + expert * rows * c->k;
    const double at_input = c->row_weight == GEMM_ROW_WEIGHT_INPUT ? weight : 1.0;
    const double bias = c->bias ? (double)d->biases[together(c) ? 0 : m][expert * rows + row] : 0.0;
    double sum = 0.0, squares = bias * bias, most = fabs(bias);
    for (size_t k = 0; k < c->k; k++) {
        const double term = (double)d->a[from * c->k + k] *
                            (double)(c->store->transposed ? w[k * rows + row] : w[row * c->k + k]) *
                            at_input;
        sum += term;
        squares += term * term;
        most = fmax(most, fabs(sum));
    }
    sum += bias;
    most = fmax(fmax(most, fabs(sum)), sqrt(squares)); /* in whatever order */
    return (approximate){sum, roundings(c) * UNIT * sqrt((double)c->k + 2.0) * most};
}

static double activated(const gemm_case *c, double v) {
    const clmoe_mlp_desc mlp = {.activation = c->activation, .alpha = c->alpha};
    return ref_activate(&mlp, v);
}

static double weight_of(const gemm_case *c, const gemm_data *d, uint32_t s) {
    return c->row_weight ? (double)d->pair_weights[d->pair_of[s]] : 1.0;
}

static double clamped_gate(const gemm_case *c, double gate) {
    return c->limit > 0.0F ? fmin(gate, (double)c->limit) : gate;
}

static double shifted_up(const gemm_case *c, double up) {
    const double limit = (double)c->limit;
    return (limit > 0.0 ? fmin(fmax(up, -limit), limit) : up) + (double)c->up_shift;
}

/* What linear outputs become; gate of a gated form alone. */
static double outcome(const gemm_case *c, double gate, double up) {
    if (c->store->down)
        return up;
    return gated(c) ? activated(c, clamped_gate(c, gate)) * shifted_up(c, up) : activated(c, up);
}

/* How far the errors of linear outputs take what they become, and what it adds to that. */
static double error_of_outcome(const gemm_case *c, approximate gate, approximate up) {
    const double value = outcome(c, gate.value, up.value);
    const double v = gated(c) ? clamped_gate(c, gate.value) : up.value;
    const double factor = gated(c) ? shifted_up(c, up.value) : 1.0;
    double error = 0.0;
    for (int corner = 0; corner < 4; corner++) {
        const double g = gate.value + (corner & 1 ? gate.error : -gate.error);
        const double u = up.value + (corner & 2 ? up.error : -up.error);
        error = fmax(error, fabs(outcome(c, g, u) - value));
    }
    if (!c->store->down && c->activation < CLMOE_ACT_RELU)
        error += ACT_ROUNDINGS * UNIT * fabs(v * factor);
    return error + 3.0 * UNIT * fabs(value); /* a square, the factor, and its shift */
}

static approximate expected(const gemm_case *c, const gemm_data *d, size_t expert, uint32_t s,
                            size_t n) {
    const double weight = weight_of(c, d, s);
    const double at_output = c->row_weight == GEMM_ROW_WEIGHT_OUTPUT ? weight : 1.0;
    const double before = d->c ? (double)d->c[(size_t)s * c->n + n] : 0.0;
    const approximate up = linear(c, d, 1, expert, s, n, weight);
    const approximate gate =
        gated(c) ? linear(c, d, 0, expert, s, n, weight) : (approximate){0.0, 0.0};
    const double added = outcome(c, gate.value, up.value) * at_output;
    return (approximate){added + before, error_of_outcome(c, gate, up) * fabs(at_output) +
                                             UNIT * (fabs(added) + fabs(added + before))};
}

/* z's rows are in the order of the weights'. */
static gemm_z place_of_z(const gemm_case *c) {
    const bool interleaved = c->store->layout == CLMOE_GATE_INTERLEAVED;
    return (gemm_z){.row = gated(c) ? 2 * c->n : c->n,
                    .up = !gated(c)     ? 0
                          : interleaved ? 1
                                        : c->n,
                    .step = interleaved ? 2 : 1,
                    .by_pair = c->z == Z_BY_PAIR};
}

/* ---- Running ------------------------------------------------------------------------------- */

/* As a layer has it for its router: one matrix, without a plan. */
static bool like_router(const gemm_case *c) {
    return c->store->down && !c->store->transposed && c->spread == SPREAD_DENSE && !c->gather &&
           !c->packed && !c->for_gradient;
}

static clmoe_type bias_type(const gemm_case *c) {
    return like_router(c) ? CLMOE_F32 : c->type;
}

static void set_weights(const gemm_case *c, const gemm_data *d, gemm_problem *p) {
    const size_t matrix = (size_t)c->experts * c->n * c->k, bias = (size_t)c->experts * c->n;
    const size_t both = together(c) ? 2 : 1;
    const clmoe_type type = c->type;
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
        .gate = buf_of_type(type, d->matrices[0], matrix * both),
        .up = together(c) || down ? (clmoe_buf){0} : buf_of_type(type, d->matrices[1], matrix),
        .down = down ? buf_of_type(type, d->matrices[1], matrix) : (clmoe_buf){0},
        .gate_bias = buf_of_type(bias_type(c), d->biases[0], bias * both),
        .up_bias =
            together(c) || down ? (clmoe_buf){0} : buf_of_type(bias_type(c), d->biases[1], bias),
        .down_bias = down ? buf_of_type(bias_type(c), d->biases[1], bias) : (clmoe_buf){0},
    };
    gemm_mlp_weights(&desc, &weights, down ? c->n : c->k, type, &p->gate, down ? &unused : &p->up,
                     down ? &p->up : &unused);
}

/* The form of the layer's first GEMM; of a router, also where its gradient passes through. */
static gemm_form form_of_layer(const gemm_case *c) {
    if (like_router(c) || (c->for_gradient && c->spread == SPREAD_DENSE))
        return GEMM_LINEAR;
    return gated(c) ? GEMM_GATED : GEMM_PLAIN;
}

static gemm_shape shape_of(const gemm_case *c) {
    const bool down = c->store->down && !like_router(c);
    const bool transposed = c->store->transposed != c->for_gradient;
    return (gemm_shape){
        .a_type = c->type,
        .w_type = c->type,
        .bias_type = bias_type(c),
        .c_type = c->type,
        .experts = c->experts,
        .dim = down ? c->n : c->k,
        .hidden_dim = down ? c->k : c->n,
        .form = form_of_layer(c),
        .gate_up_transposed = transposed && (!down || c->for_gradient),
        .down_transposed = transposed && (down || c->for_gradient),
        .interleaved = c->store->layout == CLMOE_GATE_INTERLEAVED,
        .activation = c->activation,
        .row_weight = c->row_weight,
        .rows_between = true, /* each problem stands alone */
        .separate = c->store->layout == CLMOE_GATE_SEPARATE,
        .biased = {true, true},
        .training = c->training,
    };
}

/* Hands the weights over in the engine's own form; the raw ones are out of reach from then on. */
static void pack(const gemm_case *c, gemm_run *run) {
    gemm_problem *p = &run->problem;
    launch chain;
    cl_event event = NULL;
    const bool aligned = support_aligned;
    support_aligned = aligned || c->engine == &gemm_nv_wgmma; /* which wants multiples of 16 */
    clmoe_buf packed = buf_new(4 * c->engine->packed_elements(run->state, p));
    support_aligned = aligned;
    OK(launch_begin(&chain, test_context(0), test.queue, 0, NULL));
    clmoe_status status = c->engine->pack(run->state, &chain, p, packed);
    OK(launch_end(&chain, status, &event));
    CL_OK(clWaitForEvents(1, &event));
    clReleaseEvent(event);
    p->packed = true;
    p->gate.buf = (clmoe_buf){0};
    p->up.buf = packed;
}

void gemm_prepare(const gemm_case *c, const gemm_data *d, gemm_run *run) {
    const gemm_shape layer = shape_of(c);
    gemm_problem *p = &run->problem;
    *p = (gemm_problem){
        .a_type = c->type,
        .w_type = c->type,
        .bias_type = bias_type(c),
        .c_type = c->type,
        .slots = d->slots,
        .row_tile = d->row_tile,
        .experts = c->experts,
        .a = buf_of_type(c->type, d->a, (size_t)(c->gather ? d->tokens : d->slots) * c->k),
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
        .pair_of = buf_of(d->pair_of, 4 * (size_t)d->slots),
        .pair_weights = buf_of(d->pair_weights, 4 * (size_t)d->pairs),
        .c = buf_new(type_size(c->type) * d->slots * c->n),
        .accumulate = c->accumulate,
        .z_at = place_of_z(c),
    };
    const size_t z_rows = c->z == Z_BY_PAIR ? d->pairs : d->slots;
    run->before = (clmoe_buf){0};
    if (c->accumulate)
        run->before = buf_of_type(c->type, d->c, (size_t)d->slots * c->n);
    if (c->z != Z_NOT_KEPT)
        p->z = buf_new(type_size(c->type) * z_rows * p->z_at.row);
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
    if (c->engine->check)
        OK(c->engine->check(run->state, p));
}

float *gemm_run_on(const gemm_case *c, gemm_run *run, cl_command_queue queue) {
    launch chain;
    cl_event event = NULL;
    buf_poison(run->problem.c);
    if (run->before.mem)
        buf_write(run->problem.c, buf_get(run->before),
                  type_size(c->type) * run->problem.slots * c->n);
    if (run->problem.z.mem)
        buf_poison(run->problem.z);
    OK(launch_begin(&chain, test_context(0), queue, 0, NULL));
    clmoe_status status = c->engine->run(run->state, &chain, &run->problem);
    OK(launch_end(&chain, status, &event));
    CL_OK(clWaitForEvents(1, &event));
    clReleaseEvent(event);
    return buf_get_type(run->problem.c, c->type, (size_t)run->problem.slots * c->n);
}

static bool in_use(const gemm_data *d, uint32_t s) {
    return d->pair_of[s] >= 0;
}

/* An element that was left as it was, or is finite; 16-bit elements are halves of the poison. */
static bool finite_or_poison(const gemm_case *c, float value) {
    uint32_t bits = 0;
    memcpy(&bits, &value, sizeof bits);
    return isfinite(value) || (c->type == CLMOE_F32 ? bits == 0x7FC0DEADu : value != value);
}

static void check_padding(const gemm_case *c, const gemm_data *d, const float *got) {
    for (uint32_t s = 0; s < d->slots; s++)
        for (size_t i = (size_t)s * c->n; !in_use(d, s) && i < (size_t)(s + 1) * c->n; i++)
            CHECK(finite_or_poison(c, got[i]), "padding in row %u became %g\n", s, (double)got[i]);
}

/* What was off, in parts of what may be, of values that f32 stores. */
typedef struct tally {
    double squares;
    size_t count;
} tally;

/* Storing keeps the order of values: what may be stored lies between the ends, both stored. */
static void check_element(const gemm_case *c, const char *what, const size_t at[2], float got,
                          approximate want, tally *off) {
    const float low = type_round(c->type, (float)(want.value - want.error));
    const float high = type_round(c->type, (float)(want.value + want.error));
    CHECK(low <= got && got <= high, "%s[%zu][%zu] is %.9g, not %.9g, nor in [%.9g, %.9g]\n", what,
          at[0], at[1], (double)got, want.value, (double)low, (double)high);
    CHECK(!c->exact || got == type_round(c->type, (float)want.value),
          "%s[%zu][%zu] is %.9g, not %.9g\n", what, at[0], at[1], (double)got, want.value);
    if (c->type != CLMOE_F32 || want.error == 0.0)
        return;
    off->squares += pow(((double)got - want.value) / want.error, 2.0);
    off->count++;
}

/* One may be off by what is allowed, of many few are by half. */
static void check_tally(const char *what, const tally *off) {
    const double count = (double)off->count, mean = off->count ? sqrt(off->squares / count) : 0.0;
    CHECK(mean <= 0.2 + 1.0 / sqrt(fmax(count, 1.0)), "%s: %zu are off by %g of what one may be\n",
          what, off->count, mean);
}

static void check_output(const gemm_case *c, const gemm_data *d, const float *got) {
    tally off = {0};
    for (uint32_t e = 0; e < c->experts; e++)
        for (uint32_t s = d->offsets[e]; s < d->offsets[e] + d->kept[e]; s++)
            for (size_t n = 0; n < c->n; n++)
                check_element(c, "C", (size_t[]){s, n}, got[(size_t)s * c->n + n],
                              expected(c, d, e, s, n), &off);
    check_tally("C", &off);
    check_padding(c, d, got);
}

/* The linear outputs where they are to lie. */
static void check_z(const gemm_case *c, const gemm_data *d, const gemm_run *run) {
    const gemm_z at = run->problem.z_at;
    const size_t sides = gated(c) ? 2 : 1;
    const size_t rows = c->z == Z_BY_PAIR ? d->pairs : d->slots;
    const float *z = buf_get_type(run->problem.z, c->type, rows * at.row);
    tally off = {0};
    for (uint32_t e = 0; e < c->experts; e++)
        for (uint32_t s = d->offsets[e]; s < d->offsets[e] + d->kept[e]; s++)
            for (size_t n = 0; n < c->n * sides; n++) {
                const size_t column = n / sides;
                const int m = gated(c) ? (int)(n % sides) : 1;
                const size_t row = at.by_pair ? (size_t)d->pair_of[s] : s;
                check_element(c, m ? "z of up" : "z of gate", (size_t[]){row, column},
                              z[row * at.row + column * at.step + (m ? at.up : 0)],
                              linear(c, d, m, e, s, column, weight_of(c, d, s)), &off);
            }
    check_tally("z", &off);
}

bool gemm_is_taken(const gemm_case *c) {
    const gemm_shape layer = shape_of(c);
    const clmoe_status status = c->engine->takes ? c->engine->takes(&layer) : CLMOE_SUCCESS;
    if (status == CLMOE_UNSUPPORTED && c->engine == &gemm_nv_wgmma && layer.form == GEMM_LINEAR)
        return false;
    OK(status);
    return true;
}

void gemm_check_case(const gemm_case *c, uint64_t seed) {
    gemm_data d;
    gemm_run run;
    test_case(
        "%s: %s, %u experts, %u rows, n %u, k %u, type %d, spread %d, activation %d, bias %d, "
        "gather %d, row weight %d, packed %d, training %d, z %d, accumulate %d, for gradient %d",
        c->engine->name, c->store->name, c->experts, c->rows, c->n, c->k, c->type, c->spread,
        c->activation, c->bias, c->gather, c->row_weight, c->packed, c->training, c->z,
        c->accumulate, c->for_gradient);
    if (!gemm_is_taken(c))
        return;
    seed_set(seed);
    support_aligned = seed % 2;
    gemm_make_data(c, &d);
    gemm_prepare(c, &d, &run);
    check_output(c, &d, gemm_run_on(c, &run, seed % 4 < 2 ? test.queue : test.out_of_order));
    if (c->z != Z_NOT_KEPT)
        check_z(c, &d, &run);
    support_aligned = false;
}
