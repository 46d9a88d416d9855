/* Devices that are not here, as a layer fakes them: right numbers, or a refusal that names what is
 * missing; and nothing that such a device would refuse. */
#include "fake_device.h"
#include "support.h"
#include "support_variants.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SKIPPED = 77 };

static fake_device *fake;

static bool load_layer(void) {
    void *library = dlopen(FAKE_LAYER, RTLD_NOW | RTLD_LOCAL);
    cl_uint platforms = 0;
    if (library)
        fake = (fake_device *)dlsym(library, FAKE_DEVICE_SYMBOL);
    setenv("OPENCL_LAYERS", FAKE_LAYER, 1);
    clGetPlatformIDs(0, NULL, &platforms);
    return fake != NULL && fake->loaded;
}

/* From here on the device is this one. */
static void pretend(const char *what, fake_device device) {
    test_case("a device with %s", what);
    *fake = device;
}

#define PRETEND(what, ...) pretend((what), (fake_device){__VA_ARGS__})

static int be_yourself(void **state) {
    *fake = (fake_device){0};
    return support_clean(state);
}

#define TEST_DEVICE(function) cmocka_unit_test_teardown(function, be_yourself)

/* ---- A layer on the faked device ---------------------------------------------------------------
 */

static void destroy_context(void *context) {
    clmoe_context_destroy(context);
}

static void destroy_layer(void *layer) {
    clmoe_layer_destroy(layer);
}

static clmoe_context *context_of(const clmoe_context_options *options) {
    clmoe_context *context = NULL;
    OK(clmoe_context_create(test.context, test.device, options, &context));
    clean_later(destroy_context, context);
    return context;
}

static clmoe_layer *layer_of(clmoe_context *context, const clmoe_layer_desc *desc) {
    clmoe_layer *layer = NULL;
    OK(clmoe_layer_create(context, desc, &layer));
    clean_later(destroy_layer, layer);
    return layer;
}

static const shape small = {33, 21, 12, 0, 3, 19};

static clmoe_layer_desc small_desc(const char *engine) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.engine = engine;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    return desc;
}

/* A forward against the oracle, and nothing that the device refuses. */
static void check_batch(clmoe_layer *layer, const clmoe_layer_desc *desc) {
    batch b;
    device_batch d;
    seed_set(3);
    batch_make(&b, desc, small.tokens);
    batch_run(layer, &b, &d);
    batch_compare(&b, &d, batch_reference(&b));
    CHECK(fake->refused == 0, "%u things that the device refuses\n", fake->refused);
}

/* The same by a layer of its own; the layer that ran. */
static clmoe_layer *check_forward(const clmoe_layer_desc *desc, uint32_t group_size) {
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    options.group_size = group_size;
    clmoe_layer *layer = layer_of(context_of(&options), desc);
    check_batch(layer, desc);
    return layer;
}

static void check_says(clmoe_status status, clmoe_status want, const char *what) {
    CHECK(status == want, "status %d\n", status);
    CHECK(strstr(clmoe_last_error(), what) != NULL, "it says: %s\n", clmoe_last_error());
}

/* ---- Work-groups -------------------------------------------------------------------------------
 */

/* As OpenCL on Apple's CPUs. */
static void items_along_one_dimension(void **state) {
    (void)state;
    clmoe_layer *layer = NULL;
    const clmoe_layer_desc desc = small_desc("tiled");
    PRETEND("groups of 1024 x 1 x 1", .max_group = 1024, .max_items = {1024, 1, 1});
    check_says(clmoe_layer_create(context_of(NULL), &desc, &layer), CLMOE_UNSUPPORTED, "1024 x 1");
}

/* As a phone's GPU: small groups, smaller ones for kernels with many registers. */
static void small_groups(void **state) {
    (void)state;
    clmoe_layer_desc desc = small_desc(NULL);
    desc.capacity.factor = 1.0;
    desc.capacity.overflow = CLMOE_OVERFLOW_REROUTE;
    PRETEND("groups of 64, and of 16 for one kernel", .type = CL_DEVICE_TYPE_GPU, .max_group = 64,
            .max_items = {64, 64, 64}, .kernel = "plan_scatter", .kernel_group = 16);
    assert_string_equal(clmoe_layer_engine(check_forward(&desc, 0)), "tiled");
}

static void one_item(void **state) {
    (void)state;
    clmoe_layer_desc desc = small_desc(NULL);
    PRETEND("groups of 1", .type = CL_DEVICE_TYPE_GPU, .max_group = 1, .max_items = {1, 1, 1});
    assert_string_equal(clmoe_layer_engine(check_forward(&desc, 0)), "ref");
}

/* The engine's kernels shrink, or another engine is taken. */
static void kernels_that_do_not_fit(void **state) {
    (void)state;
    clmoe_layer_desc desc = small_desc(NULL);
    PRETEND("groups of 64 for gemm_*", .type = CL_DEVICE_TYPE_GPU, .kernel = "gemm_",
            .kernel_group = 64);
    assert_string_equal(clmoe_layer_engine(check_forward(&desc, 1)), "tiled");
    PRETEND("groups of 8 for gemm_*", .type = CL_DEVICE_TYPE_GPU, .kernel = "gemm_",
            .kernel_group = 8);
    assert_string_equal(clmoe_layer_engine(check_forward(&desc, 1)), "ref");
    clmoe_layer *layer = NULL;
    desc.engine = "tiled";
    check_says(clmoe_layer_create(context_of(NULL), &desc, &layer), CLMOE_UNSUPPORTED,
               "gemm_tiled");
}

/* ---- Every engine and policy -------------------------------------------------------------------
 */

static void keep_by_weight(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->capacity.factor = 0.75;
    d->capacity.keep = CLMOE_KEEP_WEIGHT;
    d->router.renorm.after_drop = 1;
    d->shared.hidden_dim = 9;
}

static void two_level(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->top_k = 6;
    d->router.groups.two_level = 1;
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
    d->normalize_experts = 1;
}

static void sinkhorn(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.policy = CLMOE_POLICY_SINKHORN;
    d->router.rebalance.iterations = 3;
}

static const layer_variant policies[] = {
    {"reroute", NULL},
    {"keep by weight, renorm after drop, shared", keep_by_weight},
    {"two levels, normalized experts", two_level},
    {"expert choice", NULL},
    {"token rounding", NULL},
    {"Sinkhorn, rebalance", sinkhorn},
    {"all experts", NULL},
    {"Soft MoE", NULL},
};

static const struct {
    const char *name;
    uint32_t group_size; /* of the context's options */
    fake_device device;
} others[] = {
    {"groups of 1024 x 1 x 1", 0, {.max_group = 1024, .max_items = {1024, 1, 1}}},
    {"groups of 64, and of 16 for one kernel",
     0,
     {.type = CL_DEVICE_TYPE_GPU,
      .max_group = 64,
      .max_items = {64, 64, 64},
      .kernel = "plan_scatter",
      .kernel_group = 16}},
    {"groups of 16 for all kernels",
     0,
     {.type = CL_DEVICE_TYPE_GPU, .kernel = "", .kernel_group = 16}},
    {"groups of 1", 0, {.type = CL_DEVICE_TYPE_GPU, .max_group = 1, .max_items = {1, 1, 1}}},
    {"groups of 64 for gemm_*",
     1,
     {.type = CL_DEVICE_TYPE_GPU, .kernel = "gemm_", .kernel_group = 64}},
    {"16 KiB of local memory", 0, {.type = CL_DEVICE_TYPE_GPU, .local_mem = 16384}},
    {"Intel's name and option",
     1,
     {.type = CL_DEVICE_TYPE_GPU,
      .vendor = 0x8086,
      .build_option = "-cl-intel-greater-than-4GB-buffer-required"}},
};

/* CLBlast asks devices for itself, and only for their largest group. */
static bool is_refusal(const char *engine, clmoe_status status) {
    if (strcmp(engine, "clblast") == 0 && status == CLMOE_ENGINE_FAILED) {
        fake->refused = 0;
        return strstr(clmoe_last_error(), "CLBlast") != NULL;
    }
    return strcmp(engine, "ref") != 0 && status == CLMOE_UNSUPPORTED &&
           strstr(clmoe_last_error(), engine) != NULL;
}

/* ref runs everywhere; another engine may refuse the device, by name and before any batch. */
static void check_policies(clmoe_context *context, const char *device, const char *engine) {
    for (size_t i = 0; i < COUNT_OF(policies); i++) {
        clmoe_layer *layer = NULL;
        clmoe_layer_desc desc = desc_of(&small);
        variant_set(&desc, policies[i].name, policies[i].set);
        desc.engine = engine;
        test_note("a device with %s, engine %s, %s", device, engine, policies[i].name);
        const clmoe_status status = clmoe_layer_create(context, &desc, &layer);
        if (is_refusal(engine, status))
            continue;
        OK(status);
        clean_later(destroy_layer, layer);
        check_batch(layer, &desc);
    }
}

static void every_engine_and_policy(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t i = 0; i < COUNT_OF(others); i++) {
        clmoe_context_options options;
        pretend(others[i].name, others[i].device);
        clmoe_context_options_init(&options);
        options.group_size = others[i].group_size;
        clmoe_context *context = context_of(&options);
        for (size_t n = 0; engines[n]; n++)
            check_policies(context, others[i].name, engines[n]);
    }
}

/* ---- Parts of a device -------------------------------------------------------------------------
 */

static void check_part(cl_device_id part, cl_device_id context_of_device) {
    const test_device whole = test;
    const clmoe_layer_desc desc = small_desc(NULL);
    cl_int code = CL_SUCCESS;
    test.device = part;
    test.context = clCreateContext(NULL, 1, &context_of_device, NULL, NULL, &code);
    CL_OK(code);
    test.queue = clCreateCommandQueue(test.context, part, 0, &code);
    CL_OK(code);
    check_forward(&desc, 0);
    assert_int_equal(support_clean(NULL), 0);
    clReleaseCommandQueue(test.queue);
    clReleaseContext(test.context);
    test = whole;
}

static void sub_devices(void **state) {
    (void)state;
    static const cl_device_partition_property ways[][4] = {
        {CL_DEVICE_PARTITION_EQUALLY, 1, 0},
        {CL_DEVICE_PARTITION_BY_COUNTS, 1, CL_DEVICE_PARTITION_BY_COUNTS_LIST_END, 0},
    };
    for (size_t i = 0; i < COUNT_OF(ways); i++) {
        cl_device_id parts[64];
        cl_uint count = 0;
        if (clCreateSubDevices(test.device, ways[i], COUNT_OF(parts), parts, &count) != CL_SUCCESS)
            continue;
        test_case("%u sub-devices, way %zu", count, i);
        check_part(parts[0], parts[0]);
        check_part(parts[count - 1], test.device);
        for (cl_uint part = 0; part < count; part++)
            clReleaseDevice(parts[part]);
    }
}

/* A device that is no part of the context's stays refused. */
static void foreign_device(void **state) {
    (void)state;
    cl_device_id devices[2];
    cl_uint count = 0;
    clmoe_context *context = NULL;
    test_case("a device of another context");
    if (clGetDeviceIDs(test.platform, CL_DEVICE_TYPE_ALL, 2, devices, &count) == CL_SUCCESS &&
        count > 1)
        check_says(
            clmoe_context_create(test.context, devices[devices[0] == test.device], NULL, &context),
            CLMOE_INVALID_ARGUMENT, "not one of");
}

/* ---- Memory ------------------------------------------------------------------------------------
 */

static void small_buffers(void **state) {
    (void)state;
    size_t saved = 0, scratch = 0;
    char limit[64];
    clmoe_layer_desc desc = small_desc("ref");
    PRETEND("buffers of 64 KiB", .max_buffer = 65536);
    clmoe_layer *layer = check_forward(&desc, 0);
    check_says(clmoe_layer_memory(layer, 5000, &saved, &scratch), CLMOE_UNSUPPORTED, "65536");
    CHECK(scratch > 65536, "%zu bytes\n", scratch);
    snprintf(limit, sizeof limit, "scratch needs %zu bytes", scratch);
    check_says(clmoe_layer_memory(layer, 5000, &saved, &scratch), CLMOE_UNSUPPORTED, limit);
}

static void weights_beyond_a_buffer(void **state) {
    (void)state;
    clmoe_checkpoint *checkpoint = NULL;
    clmoe_layer_desc desc;
    clmoe_weights weights;
    PRETEND("buffers of 2000 bytes", .max_buffer = 2000);
    OK(clmoe_checkpoint_open(TEST_DATA "/checkpoints/qwen2_moe", NULL, &checkpoint));
    OK(clmoe_checkpoint_layer(checkpoint, 0, &desc));
    const clmoe_status status =
        clmoe_checkpoint_upload(checkpoint, 0, &desc, test.context, test.queue, &weights);
    clmoe_checkpoint_close(checkpoint);
    check_says(status, CLMOE_UNSUPPORTED, "experts.gate");
    check_says(status, CLMOE_UNSUPPORTED, "2000");
    CHECK(fake->refused == 0, "a buffer was asked for\n");
}

static void intel_gpu(void **state) {
    (void)state;
    clmoe_layer_desc desc = small_desc("ref");
    PRETEND("Intel's name and option", .type = CL_DEVICE_TYPE_GPU, .vendor = 0x8086,
            .build_option = "-cl-intel-greater-than-4GB-buffer-required");
    check_forward(&desc, 1);
    CHECK(fake->option_builds > 10, "only %u programs\n", fake->option_builds);
    PRETEND("Intel's name, not its option", .type = CL_DEVICE_TYPE_GPU, .vendor = 0x8086);
    check_forward(&desc, 1);
}

/* ---- Names and refusals ------------------------------------------------------------------------
 */

static void long_name(void **state) {
    (void)state;
    static char name[400];
    memset(name, 'x', sizeof name - 1);
    const clmoe_layer_desc desc = small_desc("ref");
    PRETEND("a name of 399 characters", .name = name);
    check_forward(&desc, 0);
}

static void refusals(void **state) {
    (void)state;
    clmoe_context *context = NULL;
    const struct {
        const char *says;
        fake_device device;
    } devices[] = {
        {"EMBEDDED_PROFILE", {.profile = "EMBEDDED_PROFILE"}},
        {"big-endian", {.big_endian = CL_TRUE}},
        {"compiler", {.no_compiler = CL_TRUE}},
        {"not available", {.unavailable = CL_TRUE}},
        {"OpenCL C 1.1", {.c_version = "OpenCL C 1.1 vendor"}},
        {"1.2 is needed", {.c_version = "something else"}},
    };
    for (size_t i = 0; i < COUNT_OF(devices); i++) {
        pretend(devices[i].says, devices[i].device);
        fake->name = "Thing 7";
        const clmoe_status status = clmoe_context_create(test.context, test.device, NULL, &context);
        check_says(status, CLMOE_UNSUPPORTED, devices[i].says);
        check_says(status, CLMOE_UNSUPPORTED, "Thing 7");
        assert_null(context);
    }
    PRETEND("OpenCL C 3.0", .c_version = "OpenCL C 3.0 vendor");
    context_of(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST_DEVICE(refusals),
        TEST_DEVICE(long_name),
        TEST_DEVICE(items_along_one_dimension),
        TEST_DEVICE(one_item),
        TEST_DEVICE(small_groups),
        TEST_DEVICE(kernels_that_do_not_fit),
        TEST_DEVICE(every_engine_and_policy),
        TEST_DEVICE(sub_devices),
        TEST_DEVICE(foreign_device),
        TEST_DEVICE(small_buffers),
        TEST_DEVICE(weights_beyond_a_buffer),
        TEST_DEVICE(intel_gpu),
    };
    if (!load_layer()) {
        printf("skipped: this OpenCL loader takes no layers\n");
        return SKIPPED;
    }
    return RUN(tests);
}
