/*
 * Test support: the device under test, guarded buffers, seeded inputs, comparisons, and runners
 * that take a descriptor and give host arrays. Everything made here is released by support_clean().
 */
#ifndef SUPPORT_H
#define SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cases.h"
#include "clmoe/clmoe.h"
#include "ref.h"

/* ---- Running ------------------------------------------------------------------------------- */

/* A cmocka test that cleans up and checks all canaries afterwards. */
#define TEST(function) cmocka_unit_test_teardown(function, support_clean)

/*
 * main() of a test program: picks the device, prints it, runs the tests; CLMOE_TEST_FILTER, a
 * pattern like "every_*", picks some of them.
 */
#define RUN(tests)                                                                                 \
    (support_filter(), cmocka_run_group_tests((tests), support_setup, support_teardown))

void support_filter(void);
int support_setup(void **state);
int support_teardown(void **state);
int support_clean(void **state);

/* Says what is being tested; printed, with the seed, when a check fails. Starts with a clean-up. */
void test_case(const char *format, ...);

/* The same text alone, without the clean-up. */
void test_note(const char *format, ...);

/* Fails the test with a sentence. */
#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            print_error("%s: ", #condition);                                                       \
            print_error(__VA_ARGS__);                                                              \
            check_failed(__FILE__, __LINE__);                                                      \
        }                                                                                          \
    } while (0)

/* Fails unless the call succeeded; prints clmoe's sentence. */
#define OK(call) check_ok((call), #call, __FILE__, __LINE__)

/* The same for an OpenCL call. */
#define CL_OK(call) CHECK((call) == CL_SUCCESS, "an OpenCL call failed\n")

/* Fails unless `status` is `want` and clmoe's sentence holds both texts. */
void check_error(clmoe_status status, clmoe_status want, const char *field, const char *value);

void check_failed(const char *file, int line);
void check_ok(clmoe_status status, const char *call, const char *file, int line);

/* ---- Device -------------------------------------------------------------------------------- */

/* CLMOE_TEST_DEVICE picks it: an index into all devices of all platforms, or part of a name. */
typedef struct test_device {
    cl_platform_id platform;
    cl_device_id device;
    cl_context context;
    cl_command_queue queue; /* in-order */
    cl_command_queue out_of_order;
} test_device;

extern test_device test;

/*
 * The clmoe context whose routing kernels use `group_size`, or CLMOE_TEST_MOST_GROUP if that is
 * less; 0: the library's choice. Kept.
 */
clmoe_context *test_context(uint32_t group_size);

/*
 * Sizes of groups for tests of every kernel; returns how many. A small device's is the largest it
 * takes: what is the same on all devices need not be run on it again.
 */
size_t test_forms(uint32_t forms[2]);

/*
 * More options for a program: PoCL is to build those for groups of more than one work-item without
 * optimization. On a CPU the library makes no such groups by itself: they stand for other devices,
 * which have compilers of their own.
 */
const char *build_quickly(const char *options);
/* Of the program created last, set by --wrap: its kernels take longer than to optimize them. */
extern _Thread_local bool program_runs_long;

/* Whether the device is Oclgrind's, which takes its time. */
bool on_oclgrind(void);

/*
 * Group sizes that most tests run with: the library's choice, and 256 on a CPU, where that is 1, or
 * 64 elsewhere. Steps but top-k ask only whether a group is of one; test_topk has every size, and
 * Oclgrind's tests have groups of 16 and of 64.
 */
extern uint32_t group_sizes[2];

/*
 * The engines that run layers of these types on the device, NULL at the end; CLMOE_TEST_ENGINE
 * names one of them alone. test_engines(): those for f32.
 */
const char *const *test_engines_of(clmoe_type type, clmoe_type weight_type);
const char *const *test_engines(void);

/* Creates a layer on test_context(group_size). */
clmoe_layer *test_layer(uint32_t group_size, const clmoe_layer_desc *desc);

/* ---- Memory -------------------------------------------------------------------------------- */

/* Calls release(object) in the next clean-up, before host memory goes. */
void clean_later(void (*release)(void *object), void *object);

/* Zeroed host memory. */
void *host_alloc(size_t count, size_t size);
#define HOST(type, count) ((type *)host_alloc((count), sizeof(type)))

/*
 * Device buffers with canaries before and behind, at an offset that is a multiple of 4 and of
 * nothing more. New buffers are poisoned: NaN as floats, far out of range as integers.
 */
clmoe_buf buf_new(size_t bytes);
size_t stats_size(const clmoe_layer *layer); /* clmoe_stats_size() of a layer that has one */
/*
 * Set: new buffers have neither canaries nor poison, so that a tool that watches memory sees every
 * access past the end and every read of what nothing wrote. They are kept until the program ends:
 * Oclgrind 21.10 takes a new buffer for a released one and forgets what was written to it.
 */
extern bool support_bare;
extern bool support_aligned;                      /* set: the offset is a multiple of 256 */
clmoe_buf buf_of(const void *data, size_t bytes); /* {NULL, 0} if data is NULL */
clmoe_buf buf_short(size_t bytes);                /* one byte too small; no canaries */
void buf_write(clmoe_buf buf, const void *data, size_t bytes);
void buf_poison(clmoe_buf buf);
void buf_read(clmoe_buf buf, void *to, size_t bytes);
void *buf_get(clmoe_buf buf); /* the whole payload, on the host */
bool buf_untouched(clmoe_buf buf);
bool all_untouched(void); /* every buffer made by buf_new() and not written by the host since */

/* ---- Inputs -------------------------------------------------------------------------------- */

void seed_set(uint64_t seed);
uint32_t random_below(uint32_t n);
double random_unit(void);   /* [0, 1) */
double random_normal(void); /* mean 0, deviation 1 */
float *random_floats(size_t n, double deviation);
/* Multiples of 1/8: sums of their products are exact in f32 in any order. */
float *random_eighths(size_t n, double deviation);

/* How scores or logits are spread over the experts. */
typedef enum pattern {
    PATTERN_UNIFORM,
    PATTERN_ZIPF,
    PATTERN_ALL_TO_ONE,
    PATTERN_EMPTY_EXPERTS,
    PATTERN_TIES,      /* few distinct values, both zeros among them */
    PATTERN_NONFINITE, /* NaN and infinities: single values and whole rows */
    PATTERN_COUNT
} pattern;

const char *pattern_name(pattern kind);
float *pattern_logits(pattern kind, uint32_t tokens, uint32_t columns);
/* The same without +infinity, which the score step never makes. */
float *pattern_scores(pattern kind, uint32_t tokens, uint32_t columns);
uint8_t *random_mask(uint32_t tokens); /* about one token in four is padding */

/* ---- Comparisons --------------------------------------------------------------------------- */

#define STEP_TOLERANCE    2e-6
#define FORWARD_TOLERANCE 1e-5

void compare_ints(const char *what, const void *got, const void *want, size_t n);
void compare_bits(const char *what, const void *got, const void *want, size_t bytes);
/*
 * ||got - want|| <= tolerance * ||want||, and no element off by more than 32 times the tolerance of
 * its own size plus the mean size. Infinities must be equal.
 */
void compare_floats(const char *what, const float *got, const double *want, size_t n,
                    double tolerance);
/* Live choices equal; surplus ones distinct from all others of the token and in range. */
void compare_ids(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *got,
                 const int32_t *want, const int32_t *live);

/* got: clmoe_stats and its three arrays. */
void compare_stats(const uint32_t *got, const clmoe_stats *want, const ref_plan *plan);

/* ---- Storage types ------------------------------------------------------------------------- */

size_t type_size(clmoe_type type);
/* To nearest even; what the device's stores do. */
float type_round(clmoe_type type, float value);
/* What a code of f16 or bf16 means. */
float type_value(clmoe_type type, uint16_t code);
void round_all(clmoe_type type, float *values, size_t n);
/* For n elements, like buf_new(); those of 16 bits begin at a multiple of 2 and of nothing more. */
clmoe_buf buf_new_type(clmoe_type type, size_t n);
clmoe_buf buf_of_type(clmoe_type type, const float *values, size_t n);
/* n elements -> floats. */
float *type_values(clmoe_type type, const void *elements, size_t n);
float *buf_get_type(clmoe_buf buf, clmoe_type type, size_t n);
/* Relative norm allowed for y. */
double type_tolerance(clmoe_type type);

/* ---- Layers -------------------------------------------------------------------------------- */

/* Defaults with the sizes of `s`; engine "ref". */
clmoe_layer_desc desc_of(const shape *s);

/* Random weights for everything the descriptor asks for. */
ref_weights weights_make(const clmoe_layer_desc *desc);
clmoe_weights weights_upload(const clmoe_layer_desc *desc, const ref_weights *weights);

/*
 * Runs clmoe_plan() on the arrays of `in` and fills in->slots, in->row_tile and *layout as the
 * layer has them.
 */
clmoe_buf plan_run(clmoe_layer *layer, const clmoe_layer_desc *desc, ref_plan_in *in,
                   clmoe_plan_layout *layout);
/* The oracle's plan, kept until support_clean(). */
const ref_plan *plan_reference(const clmoe_layer_desc *desc, const ref_plan_in *in);
/* ids, weights and live of `tokens` random tokens. */
void route_random(const clmoe_layer_desc *desc, uint32_t tokens, pattern kind, ref_plan_in *in);
/* A scratch buffer of the layer. */
clmoe_buf scratch_of(clmoe_layer *layer, uint32_t tokens);

/* One batch: a descriptor, inputs and their oracle. */
typedef struct batch {
    clmoe_layer_desc desc;
    ref_weights weights;
    ref_forward_in in;
    bool no_outputs; /* ask for y alone */
} batch;

/* Random weights and x for `desc`; optional inputs are then set by the caller. */
void batch_make(batch *b, const clmoe_layer_desc *desc, uint32_t tokens);
/* The oracle's result, kept until support_clean(). */
const ref_result *batch_reference(const batch *b);

/* The device side of a batch: clmoe_forward_args over guarded buffers. */
typedef struct device_batch {
    clmoe_weights weights;
    clmoe_forward_args args;
} device_batch;

/* Uploads the batch and makes poisoned outputs. `d` must stay where it is: args points into it. */
void batch_upload(clmoe_layer *layer, const batch *b, device_batch *d);
/* Compares all outputs of a finished forward with the oracle. */
void batch_compare(const batch *b, const device_batch *d, const ref_result *want);
/* Upload, forward on the in-order queue, wait. */
void batch_run(clmoe_layer *layer, const batch *b, device_batch *d);
/* Replaces the matrices of one of the layer's MLPs by their packed form; the biases stay. */
void weights_pack(clmoe_layer *layer, clmoe_mlp mlp, clmoe_mlp_weights *weights);

#endif
