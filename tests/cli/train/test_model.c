/*
 * cli.train_model: the loss of the model of `clmoe train`, its gradients against differences of a
 * model in double precision, and the steps of its optimiser.
 */
#include "../../../src/cli/train/metrics.h"
#include "reference.h"
#include "support.h"

#include <math.h>
#include <string.h>

enum {
    TOKENS = 48,
    MOST_TOKENS = 2048,
    SEQUENCE = 16,
    TEXT = 4000,
    SAMPLES = 12,
    STEPS = 3,
    WARMUP = 2
};

#define AUX_WEIGHT 0.5

static train_settings settings_of(clmoe_type type, const char *balance) {
    problem why;
    train_settings s = {.context = REF_CONTEXT,
                        .layers = REF_LAYERS,
                        .dim = REF_DIM,
                        .hidden = REF_HIDDEN,
                        .experts = REF_EXPERTS,
                        .top_k = REF_TOP_K,
                        .type = type,
                        .batch = TOKENS,
                        .sequence = SEQUENCE,
                        .steps = 10,
                        .warmup = WARMUP,
                        .seed = 5,
                        .rate = 0.01,
                        .decay = 0.3,
                        .clip = 0.25};
    CHECK(methods_parse(balance, &s.methods, &why), "%s\n", why.text);
    return s;
}

/* A text of few different bytes, so that all of them are met. */
static corpus text_of(const train_settings *s) {
    corpus c = {.bytes = HOST(unsigned char, TEXT),
                .size = TEXT,
                .num_files = 1,
                .context = s->context,
                .sequence = s->sequence};
    c.files[0] = (text_file){.held_out = TEXT - 200, .end = TEXT};
    for (uint32_t i = 0; i < TEXT; i++)
        c.bytes[i] = (unsigned char)(random_below(6) * 51);
    return c;
}

typedef struct fixture {
    train_settings settings;
    corpus text;
    device_session device;
    train_model model;
    uint32_t positions[MOST_TOKENS];
    double *values; /* [elements], of ref */
    ref_model ref;
} fixture;

static void release(void *object) {
    model_release(object);
}

static double *in(const fixture *f, parameter_kind kind, uint32_t block) {
    return f->values + parameters_find(&f->model.parameters, kind, block)->first;
}

static void bind_reference(fixture *f) {
    for (uint32_t l = 0; l < REF_LAYERS; l++) {
        f->ref.router[l] = in(f, PARAMETER_ROUTER, l);
        f->ref.gate_up[l] = in(f, PARAMETER_GATE_UP, l);
        f->ref.down[l] = in(f, PARAMETER_DOWN, l);
    }
    for (uint32_t l = 0; l <= REF_LAYERS; l++)
        f->ref.gain[l] = in(f, PARAMETER_GAIN, l);
    f->ref.table = in(f, PARAMETER_TABLE, 0);
    f->ref.head = in(f, PARAMETER_HEAD, 0);
}

static float *array(fixture *f, cl_mem mem) {
    const size_t count = f->model.parameters.elements;
    float *values = HOST(float, count);
    OK(model_read(&f->model, mem, count * sizeof *values, values));
    return values;
}

/* Gains other than 1, or a wrong one would not show. */
static void vary_gains(fixture *f) {
    float *values = array(f, f->model.values);
    for (uint32_t l = 0; l <= REF_LAYERS; l++) {
        const parameter *gain = parameters_find(&f->model.parameters, PARAMETER_GAIN, l);
        for (size_t i = 0; i < gain->count; i++)
            values[gain->first + i] = (float)(1 + 0.3 * random_normal());
    }
    OK(model_write(&f->model, f->model.values, f->model.parameters.elements * sizeof *values,
                   values));
}

static fixture *start_with(train_settings s) {
    fixture *f = HOST(fixture, 1);
    f->settings = s;
    f->text = text_of(&s);
    f->device =
        (device_session){.cl = test.context, .queue = test.queue, .context = test_context(0)};
    clean_later(release, &f->model);
    OK(model_create(&f->model, &f->settings, &f->text, &f->device));
    OK(model_init(&f->model));
    corpus_draw(&f->text, 3, 0, s.batch / SEQUENCE, f->positions);
    return f;
}

static fixture *start(clmoe_type type, const char *balance) {
    fixture *f = HOST(fixture, 1);
    f->settings = settings_of(type, balance);
    f->text = text_of(&f->settings);
    f->device =
        (device_session){.cl = test.context, .queue = test.queue, .context = test_context(0)};
    clean_later(release, &f->model);
    OK(model_create(&f->model, &f->settings, &f->text, &f->device));
    OK(model_init(&f->model));
    vary_gains(f);
    corpus_draw(&f->text, 3, 0, TOKENS / SEQUENCE, f->positions);
    f->values = HOST(double, f->model.parameters.elements);
    const float *values = array(f, f->model.values);
    for (size_t i = 0; i < f->model.parameters.elements; i++)
        f->values[i] = (double)values[i];
    bind_reference(f);
    return f;
}

static double run(fixture *f, uint32_t step) {
    double loss = NAN;
    OK(model_batch(&f->model, &f->text, f->positions, true));
    OK(model_forward(&f->model, step, true));
    OK(model_loss(&f->model, &loss));
    return loss;
}

/* The loss, and with `shares` what the switch loss adds: its F are held fixed. */
static double reference(const fixture *f, const ref_balance *fixed) {
    ref_balance balance;
    double loss = ref_loss(&f->ref, f->text.bytes, f->positions, TOKENS, &balance);
    for (int l = 0; fixed != NULL && l < REF_LAYERS; l++)
        for (int e = 0; e < REF_EXPERTS; e++)
            loss += AUX_WEIGHT * REF_EXPERTS * fixed->share[l][e] * balance.score[l][e];
    return loss;
}

static double difference(fixture *f, size_t index, const ref_balance *fixed) {
    const double before = f->values[index], step = 1e-5;
    f->values[index] = before + step;
    const double more = reference(f, fixed);
    f->values[index] = before - step;
    const double less = reference(f, fixed);
    f->values[index] = before;
    return (more - less) / (2 * step);
}

/* Some elements of each parameter, those of the largest gradients among them. */
static size_t sample(const parameter *row, const float *gradient, int i) {
    size_t best = row->first + random_below((uint32_t)row->count);
    for (int tries = 0; i % 2 == 0 && tries < 30; tries++) {
        const size_t other = row->first + random_below((uint32_t)row->count);
        if (fabsf(gradient[other]) > fabsf(gradient[best]))
            best = other;
    }
    return best;
}

static void check_gradients(fixture *f, const ref_balance *fixed) {
    const float *gradient = array(f, f->model.gradients);
    for (uint32_t r = 0; r < f->model.parameters.count; r++) {
        const parameter *row = &f->model.parameters.rows[r];
        double size = 0;
        for (size_t i = 0; i < row->count; i++)
            size = fmax(size, (double)fabsf(gradient[row->first + i]));
        CHECK(size > 0, "parameter %u of block %u has no gradient\n", row->kind, row->block);
        for (int i = 0; i < SAMPLES; i++) {
            const size_t index = sample(row, gradient, i);
            const double want = difference(f, index, fixed), got = (double)gradient[index];
            CHECK(fabs(got - want) <= 2e-5 * size + 1e-4 * fabs(want),
                  "parameter %u of block %u, element %zu: %g, not %g\n", row->kind, row->block,
                  index - row->first, got, want);
        }
    }
}

static void gradients(void **state) {
    (void)state;
    static const char *const methods[] = {"none", "switch:0.5"};
    for (int i = 0; i < 2; i++) {
        test_case("--balance %s", methods[i]);
        fixture *f = start(CLMOE_F32, methods[i]);
        ref_balance fixed;
        const double loss = run(f, 0);
        const double want = ref_loss(&f->ref, f->text.bytes, f->positions, TOKENS, &fixed);
        CHECK(fabs(loss - want) <= 1e-6 * want, "loss %.9g, not %.9g\n", loss, want);
        OK(model_backward(&f->model, 0));
        check_gradients(f, i == 1 ? &fixed : NULL);
    }
}

/* Rows of 8 bits: the loss is near, and a gradient is where and as large as that of f32. */
static void rounded(void **state) {
    (void)state;
    ref_balance balance;
    seed_set(7); /* the same text and gains twice */
    fixture *f = start(CLMOE_BF16, "none");
    const double want = ref_loss(&f->ref, f->text.bytes, f->positions, TOKENS, &balance);
    CHECK(fabs(run(f, 0) - want) <= 0.01 * want, "loss is not near %g\n", want);
    OK(model_backward(&f->model, 0));
    const float *got = array(f, f->model.gradients);
    seed_set(7);
    f = start(CLMOE_F32, "none");
    run(f, 0);
    OK(model_backward(&f->model, 0));
    const float *exact = array(f, f->model.gradients);
    const parameter *table = parameters_find(&f->model.parameters, PARAMETER_TABLE, 0);
    double size = 0, off = 0;
    for (size_t i = table->first; i < table->first + table->count; i++) {
        size += (double)exact[i] * (double)exact[i];
        off += pow((double)got[i] - (double)exact[i], 2);
    }
    CHECK(off <= 0.01 * size, "gradient of the tables is %g off\n", sqrt(off / size));
}

/* ---- AdamW
 * --------------------------------------------------------------------------------------- */

/* Warm-up over WARMUP steps, then a cosine to a tenth at the last step. */
static double rate(const train_settings *s, uint32_t step) {
    if (step < WARMUP)
        return s->rate * (step + 1) / WARMUP;
    const double way = (double)(step - WARMUP) / (s->steps - WARMUP);
    return s->rate * (0.55 + 0.45 * cos(3.14159265358979 * way));
}

static bool decays(const fixture *f, size_t index) {
    for (uint32_t r = 0; r < f->model.parameters.count; r++) {
        const parameter *row = &f->model.parameters.rows[r];
        if (index >= row->first && index < row->first + row->count)
            return row->kind != PARAMETER_TABLE && row->kind != PARAMETER_GAIN;
    }
    return false;
}

static void optimiser(void **state) {
    (void)state;
    fixture *f = start(CLMOE_F32, "bias:0.01");
    const size_t count = f->model.parameters.elements;
    double *m = HOST(double, count), *v = HOST(double, count), *w = f->values;
    for (uint32_t step = 0; step < STEPS; step++) {
        run(f, step);
        OK(model_backward(&f->model, step));
        const float *gradient = array(f, f->model.gradients);
        double squares = 0;
        for (size_t i = 0; i < count; i++)
            squares += (double)gradient[i] * (double)gradient[i];
        CHECK(sqrt(squares) > f->settings.clip, "nothing is clipped\n");
        OK(model_update(&f->model, step));
        const float *values = array(f, f->model.values);
        for (size_t i = 0; i < count; i++) {
            const double g = (double)gradient[i] * f->settings.clip / sqrt(squares);
            m[i] = 0.9 * m[i] + 0.1 * g;
            v[i] = 0.99 * v[i] + 0.01 * g * g;
            const double moved =
                m[i] / (1 - pow(0.9, step + 1)) / (sqrt(v[i] / (1 - pow(0.99, step + 1))) + 1e-8);
            const double decay = decays(f, i) ? f->settings.decay * w[i] : 0;
            w[i] -= rate(&f->settings, step) * (moved + decay);
            CHECK(fabs((double)values[i] - w[i]) <= 3e-6 + 1e-5 * fabs(w[i]),
                  "step %u, element %zu: %.9g, not %.9g\n", step, i, (double)values[i], w[i]);
            w[i] = (double)values[i];
        }
    }
}

/* Values half way between two of bf16, which go to the even one. */
static void write_ties(fixture *f) {
    float *values = array(f, f->model.values);
    for (size_t i = 0; i < f->model.parameters.copied; i += 3) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        bits = (bits & 0xffff0000U) | 0x8000U;
        memcpy(&values[i], &bits, sizeof bits);
    }
    OK(model_write(&f->model, f->model.values, f->model.parameters.elements * sizeof *values,
                   values));
}

/* The copies that the layers read are the master weights, rounded, after each step. */
static void copies(void **state) {
    (void)state;
    fixture *f = start(CLMOE_BF16, "quantile");
    const size_t count = f->model.parameters.copied;
    uint16_t *copy = HOST(uint16_t, count), *want = HOST(uint16_t, count);
    for (int i = 0; i < 2; i++) {
        f->settings.rate = i == 0 ? 0.01 : 0; /* at rate 0 the ties stay */
        if (i == 1)
            write_ties(f);
        run(f, 0);
        OK(model_backward(&f->model, 0));
        OK(model_update(&f->model, 0));
        clmoe_type_encode(CLMOE_BF16, array(f, f->model.values), count, want);
        OK(model_read(&f->model, f->model.copy, count * sizeof *copy, copy));
        compare_bits("copy", copy, want, count * sizeof *copy);
    }
}

/* ---- Switches
 * ------------------------------------------------------------------------------------ */

/* Steps with what was asked for; the parameters stay finite, and all of them move. */
static void train(fixture *f, uint32_t steps) {
    const size_t count = f->model.parameters.elements;
    const float *before = array(f, f->model.values);
    for (uint32_t step = 0; step < steps; step++) {
        run(f, step);
        OK(model_backward(&f->model, step));
        OK(model_update(&f->model, step));
    }
    const float *after = array(f, f->model.values);
    for (size_t i = 0; i < count; i++)
        CHECK(isfinite(after[i]), "element %zu is %g\n", i, (double)after[i]);
    for (uint32_t r = 0; r < f->model.parameters.count; r++) {
        const parameter *row = &f->model.parameters.rows[r];
        CHECK(memcmp(before + row->first, after + row->first, row->count * sizeof *after) != 0,
              "parameter %u of block %u stands still\n", row->kind, row->block);
    }
    CHECK(isfinite(run(f, steps)), "no loss\n");
    OK(model_forward(&f->model, steps, false));
}

static void every_method(void **state) {
    (void)state;
    for (uint32_t i = 0; method_at(i) != NULL; i++) {
        const method_row *row = method_at(i);
        test_case("--balance %s", row->name);
        train_settings s = settings_of(CLMOE_F32, row->name);
        if (row->kind == METHOD_LOSS && row->which == CLMOE_LOSS_SMOOTH_LOAD)
            s.noise = CLMOE_NOISE_GAUSSIAN;
        s.noise_scale = 0.25;
        train(start_with(s), 2);
    }
}

static void every_switch(void **state) {
    (void)state;
    train_settings s[8];
    for (size_t i = 0; i < COUNT_OF(s); i++)
        s[i] = settings_of(CLMOE_F32, i % 2 ? "bias" : "switch");
    s[0].noise = CLMOE_NOISE_LEARNED;
    s[0].noise_scale = 1;
    s[0].anneal = 2;
    s[1].capacity_factor = 1;
    s[1].overflow = CLMOE_OVERFLOW_REROUTE;
    s[2].keep = CLMOE_KEEP_ROUND;
    s[2].batch = MOST_TOKENS; /* some row tiles for each expert, whatever the device's */
    s[3].soft_steps = 1;
    s[3].shared = 4;
    s[4].num_top_k_phases = 2;
    s[4].top_k_phases[0] = (top_k_phase){0, 1};
    s[4].top_k_phases[1] = (top_k_phase){1, 3};
    s[5].hidden_dropout = s[5].expert_dropout = s[5].router_dropout = 0.2;
    s[6].per_sequence = true;
    s[6].z_loss = 1e-3;
    s[6].token_entropy = 1e-3;
    s[7].capacity_factor = 1;
    s[7].keep = CLMOE_KEEP_RANDOM;
    s[7].skewed = true;
    for (size_t i = 0; i < COUNT_OF(s); i++) {
        test_case("switches, row %zu", i);
        train(start_with(s[i]), 2);
    }
}

/* SplitMix64's output after `count` steps from a seed. */
static uint64_t split_mix(uint64_t seed, uint64_t count) {
    uint64_t z = seed + count * 0x9e3779b97f4a7c15U;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9U;
    z = (z ^ z >> 27) * 0x94d049bb133111ebU;
    return z ^ z >> 31;
}

static uint64_t ref_bits(uint64_t key, uint64_t counter) {
    return split_mix(split_mix(key, 1), counter + 1);
}

/* Box and Muller, of the 2 numbers of a key from 2 `index` on. */
static double ref_normal(uint64_t key, uint64_t index) {
    const double u = ((double)(ref_bits(key, 2 * index) >> 11) + 0.5) / 9007199254740992.0;
    const double v = ((double)(ref_bits(key, 2 * index + 1) >> 11) + 0.5) / 9007199254740992.0;
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

static float ref_first_value(const train_settings *s, const parameter *row, size_t i) {
    const uint64_t key = ref_bits(s->seed, ((uint64_t)row->kind << 32) + row->block);
    const double length = row->kind == PARAMETER_TABLE ? s->context : row->shape[2];
    const bool longer = s->skewed && row->kind == PARAMETER_ROUTER;
    const double skew = longer ? 1 + 3.0 * (double)(i / s->dim) / s->experts : 1;
    return row->kind == PARAMETER_GAIN ? 1
                                       : (float)(ref_normal(key, i) * (1 / sqrt(length)) * skew);
}

/* Bit for bit, for they are a part of every figure; several threads make them. */
static void first_values(void **state) {
    (void)state;
    train_settings s = settings_of(CLMOE_F32, "none");
    s.dim = 16 * (1 + random_below(4));
    s.hidden = 500 + random_below(1000);
    s.shared = random_below(50);
    s.experts = 8 + random_below(8);
    s.seed = random_below(UINT32_MAX);
    s.skewed = true;
    parameters p;
    OK(parameters_create(&p, &s));
    float *values = HOST(float, p.elements);
    memset(values, 0xff, p.elements * sizeof *values);
    parameters_init(&p, &s, values);
    size_t at = 0;
    for (uint32_t r = 0; r < p.count; r++) {
        const parameter *row = &p.rows[r];
        for (; at < row->first; at++)
            CHECK(values[at] == 0, "element %zu between parameters is %g\n", at,
                  (double)values[at]);
        for (size_t i = 0; i < row->count; i++, at++)
            CHECK(values[at] == ref_first_value(&s, row, i),
                  "parameter %u of block %u, element %zu is %g\n", row->kind, row->block, i,
                  (double)values[at]);
    }
    parameters_free(&p);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(gradients),   TEST(rounded),      TEST(optimiser),
                                       TEST(copies),      TEST(every_method), TEST(every_switch),
                                       TEST(first_values)};
    return RUN(tests);
}
