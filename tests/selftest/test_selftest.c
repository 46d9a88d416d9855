/*
 * The self-test: it passes here, and it finds what is broken on purpose: a number in a kernel's
 * source, a kernel that does not build, a bit that differs in the second run, a call that fails.
 */
#include "selftest/trial.h" /* before cmocka, whose fail is a macro */

#include "support.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Between the library and the driver ------------------------------------------------------ */

static const char *breaks, *broken; /* every `breaks` in a source becomes `broken`; NULL: none */
static unsigned broken_sources;

static struct {
    unsigned calls, nth; /* 0: none */
    bool fails;          /* else it flips the lowest bit of its first byte */
} reads;

cl_program __real_clCreateProgramWithSource(cl_context context, cl_uint count, const char **strings,
                                            const size_t *lengths, cl_int *code);
cl_program __wrap_clCreateProgramWithSource(cl_context context, cl_uint count, const char **strings,
                                            const size_t *lengths, cl_int *code);
cl_int __real_clEnqueueReadBuffer(cl_command_queue queue, cl_mem from, cl_bool blocks,
                                  size_t offset, size_t bytes, void *to, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event);
cl_int __wrap_clEnqueueReadBuffer(cl_command_queue queue, cl_mem from, cl_bool blocks,
                                  size_t offset, size_t bytes, void *to, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event);

static char *replace(const char *text, const char *from, const char *to) {
    size_t used = 0, count = 0;
    for (const char *at = text; (at = strstr(at, from)) != NULL; at += strlen(from))
        count++;
    char *result = malloc(strlen(text) + count * strlen(to) + 1);
    assert_non_null(result);
    for (const char *at; (at = strstr(text, from)) != NULL; text = at + strlen(from))
        used += (size_t)sprintf(result + used, "%.*s%s", (int)(at - text), text, to);
    strcpy(result + used, text);
    return result;
}

cl_program __wrap_clCreateProgramWithSource(cl_context context, cl_uint count, const char **strings,
                                            const size_t *lengths, cl_int *code) {
    if (breaks == NULL || strstr(strings[0], breaks) == NULL)
        return __real_clCreateProgramWithSource(context, count, strings, lengths, code);
    char *source = replace(strings[0], breaks, broken);
    broken_sources++;
    cl_program program =
        __real_clCreateProgramWithSource(context, 1, (const char **)&source, NULL, code);
    free(source);
    return program;
}

cl_int __wrap_clEnqueueReadBuffer(cl_command_queue queue, cl_mem from, cl_bool blocks,
                                  size_t offset, size_t bytes, void *to, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event) {
    const bool hit = ++reads.calls == reads.nth;
    if (hit && reads.fails)
        return CL_OUT_OF_RESOURCES;
    cl_int code =
        __real_clEnqueueReadBuffer(queue, from, blocks, offset, bytes, to, num_wait, wait, event);
    if (hit)
        *(uint8_t *)to ^= 1;
    return code;
}

/* ---- What is reported ------------------------------------------------------------------------ */

enum { MOST_RESULTS = 1024, ENGINES = 16 };

typedef struct tally {
    unsigned count, stop_after; /* results; 0: never */
    struct {
        const char *name;
        unsigned of[4]; /* by clmoe_selftest_status */
    } engines[ENGINES];
    unsigned types[3], layers;  /* passed; how many layers there are */
    char last_layer[64];        /* of the table */
    char first[512], array[64]; /* of the first result that is not passed or skipped */
    char against[32];
    const char *wanted; /* its engine; NULL: any */
    bool logits;        /* batches that are given them count alone */
} tally;

static unsigned *engine_counts(tally *t, const char *engine) {
    size_t i = 0;
    while (i < ENGINES - 1 && t->engines[i].name && strcmp(t->engines[i].name, engine) != 0)
        i++;
    /* Names are the library's, and stay. */
    t->engines[i].name = t->engines[i].name ? t->engines[i].name : engine;
    return t->engines[i].of;
}

static void check_result(const clmoe_selftest_result *r) {
    test_note("self-test: %s, %s, engine %s, type %u: %s", r->layer, r->batch, r->engine, r->type,
              r->message);
    const bool compared = r->status <= CLMOE_SELFTEST_DIFFERS;
    const bool within = r->norm_error <= r->norm_tolerance && r->worst_error <= r->worst_tolerance;
    CHECK(r->struct_size == sizeof *r, "%zu bytes\n", r->struct_size);
    CHECK(compared == (r->array[0] != '\0'), "array '%s'\n", r->array);
    CHECK(within == (r->status != CLMOE_SELFTEST_DIFFERS), "errors do not fit the status\n");
    CHECK((r->message[0] == '\0') == (r->status == CLMOE_SELFTEST_PASSED), "the message\n");
}

static bool has_logits(const clmoe_selftest_result *r) {
    size_t i = 0;
    while (strcmp(selftest_batches[i].name, r->batch) != 0)
        i++;
    return selftest_batches[i].kind > BATCH_MASKED;
}

static int take_result(void *user, const clmoe_selftest_result *r) {
    tally *t = user;
    const bool wanted = !t->wanted || strcmp(t->wanted, r->engine) == 0;
    const bool bad = r->status == CLMOE_SELFTEST_DIFFERS || r->status == CLMOE_SELFTEST_FAILED;
    check_result(r);
    if (!t->logits || has_logits(r))
        engine_counts(t, r->engine)[r->status]++;
    t->types[r->type] += r->status == CLMOE_SELFTEST_PASSED;
    t->layers += strcmp(t->last_layer, r->layer) != 0;
    snprintf(t->last_layer, sizeof t->last_layer, "%s", r->layer);
    if (bad && wanted && t->first[0] == '\0') {
        snprintf(t->first, sizeof t->first, "%s", r->message);
        snprintf(t->array, sizeof t->array, "%s", r->array);
        snprintf(t->against, sizeof t->against, "%s", r->against);
    }
    return ++t->count == t->stop_after;
}

/* With a context of its own: programs stay in one. */
static clmoe_selftest_summary run(const char *engine, const char *layer, tally *t) {
    clmoe_context *context = NULL;
    clmoe_context_options context_options;
    clmoe_selftest_options options;
    clmoe_selftest_summary summary = {.struct_size = sizeof summary};
    clmoe_context_options_init(&context_options);
    clmoe_selftest_options_init(&options);
    options.engine = engine;
    options.layer = layer;
    options.report = take_result;
    options.user = t;
    reads.calls = 0;
    OK(clmoe_context_create(test.context, test.device, &context_options, &context));
    OK(clmoe_selftest(context, &options, &summary));
    clmoe_context_destroy(context);
    CHECK(summary.passed + summary.differs + summary.skipped + summary.failed == t->count,
          "%u results\n", t->count);
    return summary;
}

/* ---- It passes ------------------------------------------------------------------------------- */

static void everything_passes(void **state) {
    (void)state;
    tally t = {0};
    const clmoe_selftest_summary s = run(NULL, NULL, &t);
    CHECK(s.differs == 0 && s.failed == 0 && s.stopped == 0, "%u differ, %u failed: %s\n",
          s.differs, s.failed, t.first);
    CHECK(t.layers == selftest_num_layers, "%u layers\n", t.layers);
    for (clmoe_type type = CLMOE_F32; type <= CLMOE_BF16; type++)
        CHECK(t.types[type] > 0, "nothing of type %u passed\n", type);
    const char *const *engines = test_engines();
    for (size_t i = 0; engines[i]; i++)
        CHECK(engine_counts(&t, engines[i])[CLMOE_SELFTEST_PASSED] >= 40, "engine %s\n",
              engines[i]);
    print_message("%u passed, %u skipped\n", s.passed, s.skipped);
}

/* ---- It finds -------------------------------------------------------------------------------- */

/*
 * Each in one kernel file; engine: the only one that is broken, or NULL: all are, and ref is run.
 * Then only batches count that are given logits, as the router has the device's best engine.
 */
static const struct {
    const char *from, *to, *layer, *engine, *array;
} defects[] = {
    {"1.0f : row->weights[k]) *", "1.0f : row->weights[k] * 1.5f) *", "two levels", NULL, "y"},
    {"exp(group_logits[g] - top) / total", "exp(group_logits[g]) / total", "two levels", NULL,
     "pair_weights"},
    {"0xFFFFFFFFu - ", "", "sigmoid", NULL, "ids"}, /* ties to the higher id */
    {"total += l > -INFINITY ? exp(l - best)", "total += l > -INFINITY ? 1.5f * exp(l - best)",
     "all of 6", NULL, "dx"},
    {"is_live ? scores[e] : 0.0f", "is_live ? 1.1f * scores[e] : 0.0f", "all of 6", NULL,
     "pair_weights"},
    {"choices[e] = c;", "choices[e] = c * c;", "Sinkhorn", NULL, "ids"},
    {"score_of_key(key) * factor", "factor", "expert choice", NULL, "pair_weights"},
    {": min(sum, capacity);", ": min(sum, capacity - 1);", "sigmoid", NULL, "y"},
    {"float norm = unit * sqrt(", "float norm = unit * 2.0f * sqrt(", "Soft MoE", NULL, "y"},
    {"LOAD(W, w + i * p->w_col), sum);", "LOAD(W, w + i * p->w_col), sum) + 1e-3f;",
     "expert choice", "ref", NULL},
    {"sum[1] = fma((float4)a.y,", "sum[1] = fma((float4)a.x,", "expert choice", "tiled", NULL},
    {"sum[r][1] = fma(x, w1,", "sum[r][1] = fma(x, w0,", "expert choice", "cpu", NULL},
    {"column < n ? w[i * w_col] : 0;", "column + 1 < n ? w[i * w_col] : 0;", "expert choice", "cpu",
     "y"},
};

static bool runs_here(const char *engine) {
    const char *const *engines = test_engines();
    for (size_t i = 0; engine && engines[i]; i++)
        if (strcmp(engines[i], engine) == 0)
            return true;
    return engine == NULL;
}

/* Where ref is broken, the others are not compared with it. */
static void check_engines(tally *t, const char *broken_one) {
    const char *const *engines = test_engines();
    for (size_t i = 0; engines[i]; i++) {
        const unsigned *of = engine_counts(t, engines[i]);
        const bool right = strcmp(broken_one, engines[i]) != 0;
        CHECK((of[CLMOE_SELFTEST_DIFFERS] == 0) == right, "engine %s: %u differ, %u passed\n",
              engines[i], of[CLMOE_SELFTEST_DIFFERS], of[CLMOE_SELFTEST_PASSED]);
        CHECK(of[CLMOE_SELFTEST_FAILED] == 0, "engine %s: %u failed\n", engines[i],
              of[CLMOE_SELFTEST_FAILED]);
    }
}

static void broken_kernels_are_found(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(defects); i++) {
        if (!runs_here(defects[i].engine))
            continue;
        tally t = {.wanted = defects[i].engine, .logits = defects[i].engine != NULL};
        test_case("\"%s\" in the place of \"%s\"", defects[i].to, defects[i].from);
        breaks = defects[i].from;
        broken = defects[i].to;
        broken_sources = 0;
        const char *engine = defects[i].engine ? NULL : "ref";
        const clmoe_selftest_summary s = run(engine, defects[i].layer, &t);
        breaks = NULL;
        if (broken_sources == 0 && defects[i].engine) /* the engine has another form here */
            continue;
        CHECK(broken_sources > 0, "no source has it\n");
        CHECK(s.differs > 0 && s.failed == 0, "%u differ, %u failed\n", s.differs, s.failed);
        if (defects[i].engine)
            check_engines(&t, defects[i].engine);
        CHECK(!defects[i].array || strcmp(t.array, defects[i].array) == 0, "%s\n", t.first);
        print_message("%s: %s\n", defects[i].layer, t.first);
    }
}

static void broken_builds_are_reported(void **state) {
    (void)state;
    tally t = {0};
    test_case("a kernel that does not build");
    /* Of an engine whose kernels no other one's router uses. */
    breaks = "const float up_sum = dot_product(";
    broken = "const float up_sum = this_is_no_name(";
    const clmoe_selftest_summary s = run(NULL, "two levels", &t);
    breaks = NULL;
    CHECK(s.failed > 0 && s.differs == 0 && s.passed > 0, "%u failed\n", s.failed);
    CHECK(engine_counts(&t, "ref")[CLMOE_SELFTEST_FAILED] == s.failed, "other engines failed\n");
    CHECK(strstr(t.first, "did not build") && strstr(t.first, "this_is_no_name"), "%s\n", t.first);
}

/*
 * Arrays of the batch of one token: ids, pair_weights, y, dx and four gradients. Some devices'
 * probes of engines read one more before, which makes it another array of the second run.
 */
enum { ARRAYS = 8, Y_OF_THE_SECOND = ARRAYS + 3 };

static void other_bits_are_found(void **state) {
    (void)state;
    tally t = {0};
    test_case("a bit of y in the second run");
    reads.nth = Y_OF_THE_SECOND;
    const clmoe_selftest_summary s = run("ref", "two levels", &t);
    reads.nth = 0;
    CHECK(s.differs == 1 && s.failed == 0 && s.passed == 1, "%u differ\n", s.differs);
    CHECK(strcmp(t.against, "repeat") == 0, "%s\n", t.first);
}

static void failed_calls_are_reported(void **state) {
    (void)state;
    tally t = {0};
    test_case("a read that fails");
    reads.nth = 3;
    reads.fails = true;
    const clmoe_selftest_summary s = run("ref", "two levels", &t);
    reads.nth = 0;
    reads.fails = false;
    CHECK(s.failed == 1 && s.differs == 0 && s.passed == 1, "%u failed\n", s.failed);
    CHECK(strstr(t.first, "CL_OUT_OF_RESOURCES"), "%s\n", t.first);
}

/* ---- Comparisons ----------------------------------------------------------------------------- */

static void comparisons(void **state) {
    (void)state;
    double want[] = {1, -2, NAN, 4}, got[] = {1, -2, 77, 4};
    trial t = {.counts = {[TRIAL_Y] = 4}};
    const trial_values a = {.of = {[TRIAL_Y] = got}}, b = {.of = {[TRIAL_Y] = want}};
    trial_verdict v = {0};
    test_case("comparisons of 4 numbers");
    trial_compare(&t, "host", &a, &b, &v);
    CHECK(v.compared && !trial_differs(&v) && v.norm == 0, "what may be anything counts\n");
    got[3] = 4.00004; /* 1e-5 of it */
    trial_compare(&t, "host", &a, &b, &v);
    CHECK(!trial_differs(&v) && v.norm > 8e-6 && v.norm < 1e-5, "norm %g\n", v.norm);
    got[3] = 4.0004;
    trial_compare(&t, "host", &a, &b, &v);
    CHECK(trial_differs(&v) && v.at == 3, "4.0004 is 4\n");
    got[3] = NAN;
    v = (trial_verdict){0};
    trial_compare(&t, "host", &a, &b, &v);
    CHECK(trial_differs(&v) && isinf(v.norm), "NaN is 4\n");
    v = (trial_verdict){0};
    want[2] = got[2];
    got[3] = want[3];
    got[0] = nextafter(1, 2);
    trial_compare_bits(&t, &a, &b, &v);
    CHECK(trial_differs(&v) && v.at == 0, "other bits are the same\n");
}

/* ---- Arguments ------------------------------------------------------------------------------- */

static clmoe_status call(const clmoe_selftest_options *options, clmoe_selftest_summary *summary) {
    return clmoe_selftest(test_context(0), options, summary);
}

static void bad_arguments(void **state) {
    (void)state;
    clmoe_selftest_summary s = {.struct_size = sizeof s}, none = {0};
    clmoe_selftest_options o, big[2] = {{0}};
    test_case("bad arguments");
    clmoe_selftest_options_init(&o);
    check_error(clmoe_selftest(NULL, &o, &s), CLMOE_INVALID_ARGUMENT, "context", "NULL");
    check_error(call(&o, NULL), CLMOE_INVALID_ARGUMENT, "summary", "NULL");
    check_error(call(&o, &none), CLMOE_INVALID_ARGUMENT, "summary.struct_size", "0");
    o.engine = "warp";
    check_error(call(&o, &s), CLMOE_INVALID_ARGUMENT, "options.engine", "warp");
    o.engine = NULL;
    o.layer = "no such";
    check_error(call(&o, &s), CLMOE_INVALID_ARGUMENT, "options.layer", "no such");
    o.struct_size = 0;
    check_error(call(&o, &s), CLMOE_INVALID_ARGUMENT, "options.struct_size", "0");
    big[0].struct_size = sizeof big;
    big[1].struct_size = 1;
    check_error(call(&big[0], &s), CLMOE_INVALID_ARGUMENT, "options.struct_size", "not 0");
}

/* The sentence of the last failed call stays, though cases were skipped. */
static void callback_stops(void **state) {
    (void)state;
    char before[512];
    tally t = {.stop_after = 3};
    test_case("a callback that stops");
    assert_int_not_equal(clmoe_selftest(NULL, NULL, NULL), CLMOE_SUCCESS);
    snprintf(before, sizeof before, "%s", clmoe_last_error());
    const clmoe_selftest_summary s = run(NULL, "two levels", &t);
    CHECK(s.stopped == 1 && t.count == 3, "%u results\n", t.count);
    CHECK(strcmp(before, clmoe_last_error()) == 0, "%s\n", clmoe_last_error());
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(comparisons),
        TEST(bad_arguments),
        TEST(callback_stops),
        TEST(other_bits_are_found),
        TEST(failed_calls_are_reported),
        TEST(broken_builds_are_reported),
        TEST(broken_kernels_are_found),
        TEST(everything_passes),
    };
    return RUN(tests);
}
