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

typedef struct defect {
    const char *from, *to; /* every `from` in a source becomes `to` */
    const char *layer, *engine, *array;
} defect;

static const defect *broken; /* those that are in; `broken_sources` has the sources of each */
static size_t num_broken;
static unsigned broken_sources[32];
static cl_program broken_program; /* the last */

static struct {
    unsigned calls, nth; /* 0: none */
    bool fails;          /* else it flips the lowest bit of its first byte */
} reads;

cl_program __real_clCreateProgramWithSource(cl_context context, cl_uint count, const char **strings,
                                            const size_t *lengths, cl_int *code);
cl_program __wrap_clCreateProgramWithSource(cl_context context, cl_uint count, const char **strings,
                                            const size_t *lengths, cl_int *code);
cl_int __real_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user), void *user);
cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user), void *user);
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
    char *source = NULL;
    for (size_t i = 0; i < num_broken; i++) {
        const char *text = source ? source : strings[0];
        if (strstr(text, broken[i].from) == NULL)
            continue;
        char *next = replace(text, broken[i].from, broken[i].to);
        free(source);
        source = next;
        broken_sources[i]++;
    }
    const char *used = source;
    cl_program program = __real_clCreateProgramWithSource(
        context, source ? 1 : count, source ? &used : strings, source ? NULL : lengths, code);
    broken_program = source ? program : NULL;
    free(source);
    return program;
}

/* What is wrong on purpose is wrong without optimization too, and compiles in half the time. */
cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user),
                             void *user) {
    char all[1024];
    snprintf(all, sizeof all, "%s%s", options, program == broken_program ? " -cl-opt-disable" : "");
    return __real_clBuildProgram(program, count, devices, all, notify, user);
}

static void break_kernels(const defect *defects, size_t count) {
    broken = defects;
    num_broken = count;
    memset(broken_sources, 0, sizeof broken_sources);
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

enum { ENGINES = 16, LAYERS = 32 };

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
    const char *wanted;         /* its engine; NULL: any */
    bool logits;                /* batches that are given them count alone */
    bool stops;                 /* at the first that is not passed or skipped */
    char of_layers[LAYERS][64]; /* the array of each layer's first such result */
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

static size_t layer_index(const char *name) {
    size_t i = 0;
    while (strcmp(selftest_layers[i].name, name) != 0)
        i++;
    return i;
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
    char *of_layer = t->of_layers[layer_index(r->layer)];
    if (bad && of_layer[0] == '\0')
        snprintf(of_layer, sizeof t->of_layers[0], "%s", r->array);
    if (bad && wanted && t->first[0] == '\0') {
        snprintf(t->first, sizeof t->first, "%s", r->message);
        snprintf(t->array, sizeof t->array, "%s", r->array);
        snprintf(t->against, sizeof t->against, "%s", r->against);
    }
    return ++t->count == t->stop_after || (t->stops && bad);
}

/* Programs stay in a context: broken ones get one of their own. */
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
    if (num_broken > 0)
        OK(clmoe_context_create(test.context, test.device, &context_options, &context));
    OK(clmoe_selftest(context ? context : test_context(0), &options, &summary));
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

/* Each in kernels of its layer alone: one run finds all of them, and no other layer differs. */
static const defect of_one_layer[] = {
    {"exp(group_logits[g] - top) / total", "exp(group_logits[g]) / total", "two levels", NULL,
     "pair_weights"},
    {"is_live ? scores[e] : 0.0f", "is_live ? 1.1f * scores[e] : 0.0f", "all of 6", NULL,
     "pair_weights"},
    {"choices[e] = c;", "choices[e] = c * c;", "Sinkhorn", NULL, "ids"},
    {"pair_weights[i] *= factor;", "pair_weights[i] = factor;", "expert choice", NULL,
     "pair_weights"},
    {"float norm = unit * length;", "float norm = 2.0f * unit * length;", "Soft MoE", NULL, "y"},
    {"/ best / norm, ye + d)", "/ best, ye + d)", "shared expert", NULL, "y"},
    {"bool choice_major = (KEEP_RULE == KEEP_CHOICE_MAJOR) |",
     "bool choice_major =", "keep by choice", NULL, "y"},
    {"int end = keep == KEEP_PRIORITY ? top_k", "int end = keep == KEEP_PRIORITY ? first",
     "keep by priority", NULL, "y"},
    {"(KEEP_RULE == KEEP_WEIGHT) |", "", "keep by weight", NULL, "y"},
    {"(uint)k, RANDOM_KEEP", "0u, RANDOM_KEEP", "keep at random", NULL, "y"},
    {"found = found || r->ids[pair] == e;", "", "reroute", NULL, "ids"},
    {"(count + multiple / 2) / multiple", "count / multiple", "token rounding", NULL, "ids"},
    {"(ulong)total * top_k + experts", "(ulong)total * top_k + 2 * experts", "biases", NULL,
     "state"},
    {"n = noise == NOISE_GUMBEL", "n = noise == NOISE_GAUSSIAN ? 0.0f : noise == NOISE_GUMBEL",
     "gaussian", NULL, "ids"},
    {"n *= NOISE_DEVIATION(learned);", "n *= learned;", "learned", NULL, "ids"},
};

/*
 * Each in one kernel file; engine: the only one that is broken, or NULL: all are, and ref is run.
 * Then only batches count that are given logits, as the router has the device's best engine.
 */
static const defect defects[] = {
    {"*weight = row->weights[k];", "*weight = 1.5f * row->weights[k];", "two levels", NULL, "y"},
    {"0xFFFFFFFFu - ", "", "sigmoid", NULL, "ids"}, /* ties to the higher id */
    {"total += l > -INFINITY ? exp(l - best)", "total += l > -INFINITY ? 1.5f * exp(l - best)",
     "all of 6", NULL, "dx"},
    {"uint room = effective_capacity(STATE_OF(state), capacity);",
     "uint room = effective_capacity(STATE_OF(state), capacity) - 1;", "sigmoid", NULL, "y"},
    {"-share * log(share)", "-share", "gaussian", NULL, "stats"},
    {"2.0f * t->lse * exp", "t->lse * exp", "gaussian", NULL, "dx"},
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

static void check_layer(const tally *t, size_t layer) {
    const char *array = "";
    for (size_t i = 0; i < COUNT_OF(of_one_layer); i++)
        if (strstr(selftest_layers[layer].name, of_one_layer[i].layer))
            array = of_one_layer[i].array;
    CHECK(strcmp(t->of_layers[layer], array) == 0, "%s: '%s' differs, not '%s'\n",
          selftest_layers[layer].name, t->of_layers[layer], array);
}

static void every_layer_finds(void **state) {
    (void)state;
    tally t = {0};
    test_case("a defect in each of many layers");
    break_kernels(of_one_layer, COUNT_OF(of_one_layer));
    const clmoe_selftest_summary s = run("ref", NULL, &t);
    num_broken = 0;
    CHECK(s.failed == 0, "%u failed: %s\n", s.failed, t.first);
    for (size_t i = 0; i < COUNT_OF(of_one_layer); i++)
        CHECK(broken_sources[i] > 0, "no source has '%s'\n", of_one_layer[i].from);
    for (size_t i = 0; i < selftest_num_layers; i++)
        check_layer(&t, i);
}

static void broken_kernels_are_found(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(defects); i++) {
        const char *engine = defects[i].engine;
        if (!runs_here(engine))
            continue;
        tally t = {.wanted = engine, .logits = engine != NULL, .stops = engine == NULL};
        test_case("\"%s\" in the place of \"%s\"", defects[i].to, defects[i].from);
        break_kernels(&defects[i], 1);
        const clmoe_selftest_summary s = run(engine ? NULL : "ref", defects[i].layer, &t);
        num_broken = 0;
        if (broken_sources[0] == 0 && engine) /* the engine has another form here */
            continue;
        CHECK(broken_sources[0] > 0, "no source has it\n");
        CHECK(s.differs > 0 && s.failed == 0, "%u differ, %u failed\n", s.differs, s.failed);
        if (engine)
            check_engines(&t, engine);
        CHECK(!defects[i].array || strcmp(t.array, defects[i].array) == 0, "%s\n", t.first);
        print_message("%s: %s\n", defects[i].layer, t.first);
    }
}

static void broken_builds_are_reported(void **state) {
    (void)state;
    tally t = {0};
    /* Of an engine whose kernels no other one's router uses. */
    static const defect unknown_name = {"const float up_sum = dot_product(",
                                        "const float up_sum = this_is_no_name(", NULL, NULL, NULL};
    test_case("a kernel that does not build");
    break_kernels(&unknown_name, 1);
    const clmoe_selftest_summary s = run(NULL, "two levels", &t);
    num_broken = 0;
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
        TEST(every_layer_finds),
        TEST(broken_kernels_are_found),
        TEST(everything_passes),
    };
    return RUN(tests);
}
