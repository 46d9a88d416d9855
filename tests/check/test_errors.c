/* Bad input: its status, a sentence with the field's name and its value, and nothing enqueued. */
#include "call_cases.h"

#include <stdio.h>
#include <string.h>

static void layer_arguments(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    clmoe_layer *layer = NULL;
    test_case("layer arguments");
    check_error(clmoe_layer_create(NULL, &desc, &layer), CLMOE_INVALID_ARGUMENT, "context", "NULL");
    check_error(clmoe_layer_create(test_context(0), NULL, &layer), CLMOE_INVALID_ARGUMENT, "desc",
                "NULL");
    check_error(clmoe_layer_create(test_context(0), &desc, NULL), CLMOE_INVALID_ARGUMENT, "out",
                "NULL");
    desc.engine = "warp";
    check_error(clmoe_layer_create(test_context(0), &desc, &layer), CLMOE_INVALID_DESC, "engine",
                "warp");
    desc.engine = "";
    check_error(clmoe_layer_create(test_context(0), &desc, &layer), CLMOE_INVALID_DESC, "engine",
                "\"\"");
    clmoe_layer_destroy(NULL);

    layer = test_layer(0, (desc = desc_of(&small), &desc));
    size_t saved, scratch;
    clmoe_plan_layout layout;
    check_error(clmoe_layer_memory(NULL, 1, &saved, &scratch), CLMOE_INVALID_ARGUMENT, "layer",
                "NULL");
    OK(clmoe_layer_memory(layer, 1, NULL, NULL));
    check_error(clmoe_plan_layout_get(NULL, 1, &layout), CLMOE_INVALID_ARGUMENT, "layer", "NULL");
    check_error(clmoe_plan_layout_get(layer, 1, NULL), CLMOE_INVALID_ARGUMENT, "layout", "NULL");
    check_error(clmoe_layer_memory(layer, 3000000000u, &saved, &scratch), CLMOE_UNSUPPORTED,
                "tokens", "3000000000");
}

static void context_arguments(void **state) {
    (void)state;
    clmoe_context *context = NULL;
    clmoe_context_options options;
    const uint32_t bad[] = {3, 65, 257, 512, 1u << 31};
    test_case("context arguments");
    for (size_t i = 0; i < COUNT_OF(bad); i++) {
        char text[16];
        snprintf(text, sizeof text, "%u", bad[i]);
        clmoe_context_options_init(&options);
        options.group_size = bad[i];
        check_error(clmoe_context_create(test.context, test.device, &options, &context),
                    CLMOE_INVALID_ARGUMENT, "group_size", text);
        assert_null(context);
    }
    options = (clmoe_context_options){.struct_size = 5};
    check_error(clmoe_context_create(test.context, test.device, &options, &context),
                CLMOE_INVALID_ARGUMENT, "struct_size", "5");
    check_error(clmoe_context_create(NULL, test.device, NULL, &context), CLMOE_INVALID_ARGUMENT,
                "context", "NULL");
    check_error(clmoe_context_create(test.context, NULL, NULL, &context), CLMOE_INVALID_ARGUMENT,
                "device", "NULL");
    check_error(clmoe_context_create(test.context, test.device, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                "out", "NULL");
    /* An older program's, and a newer one's. */
    clmoe_context_options_init(&options);
    options.struct_size = offsetof(clmoe_context_options, group_size);
    options.group_size = 3;
    OK(clmoe_context_create(test.context, test.device, &options, &context));
    clmoe_context_destroy(context);
    struct {
        clmoe_context_options known;
        uint64_t more[2];
    } newer = {.known.struct_size = sizeof newer};
    OK(clmoe_context_create(test.context, test.device, &newer.known, &context));
    clmoe_context_destroy(context);
    newer.more[1] = 1;
    check_error(clmoe_context_create(test.context, test.device, &newer.known, &context),
                CLMOE_INVALID_ARGUMENT, "options.struct_size", "not 0");
    clmoe_context_destroy(NULL);
}

/* ---- Calls --------------------------------------------------------------------------------- */

/* Spoils one buffer in every way. `foreign` belongs to another OpenCL context. */
static void spoil_buffer(const call_fixture *f, const call_case *c, const buf_field *field,
                         clmoe_buf *buf, cl_mem foreign) {
    const clmoe_buf right = *buf;
    char value[32];
    size_t size = 0;
    test_note("%s, %s", c->name, field->name);
    CHECK(right.mem != NULL, "%s is not in the fixture\n", field->name);
    if (field->required) {
        *buf = (clmoe_buf){NULL, 0};
        expect_refusal(f, c, field->name, "not given");
    }
    CL_OK(clGetMemObjectInfo(right.mem, CL_MEM_SIZE, sizeof size, &size, NULL));
    snprintf(value, sizeof value, "%zu", size);
    buf->mem = right.mem;
    buf->offset = size;
    expect_refusal(f, c, field->name, value);
    buf->offset = SIZE_MAX - SIZE_MAX % 4;
    expect_refusal(f, c, field->name, value);
    if (field->element > 1) {
        buf->offset = right.offset + 2;
        snprintf(value, sizeof value, "%zu", buf->offset);
        expect_refusal(f, c, field->name, value);
    }
    *buf = (clmoe_buf){foreign, 0};
    expect_refusal(f, c, field->name, "context");
    *buf = right;
}

static void spoil_call(call_fixture *f, const call_case *c, cl_mem foreign) {
    for (size_t i = 0; i < c->num_fields; i++)
        spoil_buffer(f, c, &c->fields[i], (clmoe_buf *)((char *)c->args + c->fields[i].offset),
                     foreign);
    for (size_t i = 0; i < c->num_weight_fields; i++)
        spoil_buffer(f, c, &c->weight_fields[i],
                     (clmoe_buf *)((char *)&f->weights + c->weight_fields[i].offset), foreign);
    if (c->weights) {
        const clmoe_weights *right = *c->weights;
        test_note("%s, weights", c->name);
        *c->weights = NULL;
        expect_refusal(f, c, "weights", "NULL");
        *c->weights = right;
    }
    size_t *struct_size = c->args, right_size = *struct_size;
    test_note("%s, struct_size", c->name);
    *struct_size = 12345;
    expect_refusal(f, c, "struct_size", "12345");
    *struct_size = right_size;
}

static void every_bad_buffer(void **state) {
    (void)state;
    call_fixture f;
    call_case calls[CALLS];
    cl_int code = CL_SUCCESS;
    test_case("every bad buffer");
    call_fixture_make(&f);
    calls_of(&f, calls);
    cl_context other = clCreateContext(NULL, 1, &test.device, NULL, NULL, &code);
    CL_OK(code);
    cl_mem foreign = clCreateBuffer(other, CL_MEM_READ_WRITE, 1 << 20, NULL, &code);
    CL_OK(code);
    for (size_t i = 0; i < CALLS; i++)
        spoil_call(&f, &calls[i], foreign);
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
    /* The arguments were right but for what was spoilt. */
    for (size_t i = 0; i < CALLS; i++)
        OK(calls[i].call(f.layer, test.queue, calls[i].args, 0, NULL, NULL));
    CHECK(!all_untouched(), "nothing was enqueued\n");
    clReleaseMemObject(foreign);
    clReleaseContext(other);
}

/* Layer, arguments, queue and wait list of every call. */
static void every_bad_call(void **state) {
    (void)state;
    call_fixture f;
    call_case calls[CALLS];
    cl_int code = CL_SUCCESS;
    test_case("every bad call");
    call_fixture_make(&f);
    calls_of(&f, calls);
    cl_context other = clCreateContext(NULL, 1, &test.device, NULL, NULL, &code);
    CL_OK(code);
    cl_command_queue foreign = clCreateCommandQueue(other, test.device, 0, &code);
    CL_OK(code);
    cl_event gate = clCreateUserEvent(test.context, &code);
    CL_OK(code);
    cl_event strange = clCreateUserEvent(other, &code);
    CL_OK(code);
    const cl_event hole[] = {gate, NULL};
    for (size_t i = 0; i < CALLS; i++) {
        const call_case *c = &calls[i];
        test_note("%s", c->name);
        check_error(c->call(NULL, test.queue, c->args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                    "layer", "NULL");
        check_error(c->call(f.layer, test.queue, NULL, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                    "args", "NULL");
        check_error(c->call(f.layer, NULL, c->args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT, "queue",
                    "NULL");
        check_error(c->call(f.layer, foreign, c->args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                    "queue", "context");
        check_error(c->call(f.layer, test.queue, c->args, 3, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                    "num_wait", "3");
        check_error(c->call(f.layer, test.queue, c->args, 0, &gate, NULL), CLMOE_INVALID_ARGUMENT,
                    "num_wait", "0");
        check_error(c->call(f.layer, test.queue, c->args, 2, hole, NULL), CLMOE_INVALID_ARGUMENT,
                    "wait[1]", "NULL");
        check_error(c->call(f.layer, test.queue, c->args, 1, &strange, NULL),
                    CLMOE_INVALID_ARGUMENT, "wait[0]", "context");
    }
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
    /* Some drivers wait for it when the context goes. */
    clSetUserEventStatus(gate, CL_COMPLETE);
    clSetUserEventStatus(strange, CL_COMPLETE);
    clReleaseEvent(strange);
    clReleaseEvent(gate);
    clReleaseCommandQueue(foreign);
    clReleaseContext(other);
}

/* The status and the sentence of a call with `args`; "" for success. */
static clmoe_status outcome(const call_fixture *f, const call_case *c, const void *args,
                            char sentence[256]) {
    clmoe_status status = c->call(f->layer, test.queue, args, 0, NULL, NULL);
    snprintf(sentence, 256, "%s", status == CLMOE_SUCCESS ? "" : clmoe_last_error());
    return status;
}

/* `args` of an older program, which end after `size` bytes: as if the others were 0. */
static void check_older(const call_fixture *f, const call_case *c, size_t size) {
    size_t whole;
    char got[256], want[256];
    memcpy(&whole, c->args, sizeof whole);
    char *older = HOST(char, whole), *zeroed = HOST(char, whole);
    memset(older, 0xa5, whole);
    memcpy(older, c->args, size);
    memcpy(older, &size, sizeof size);
    memcpy(zeroed, c->args, size);
    test_note("%s, %zu bytes of %zu", c->name, size, whole);
    const clmoe_status status = outcome(f, c, older, got);
    CHECK(status == outcome(f, c, zeroed, want), "status %d: \"%s\", not \"%s\"\n", status, got,
          want);
    assert_string_equal(got, want);
}

/* `args` of a newer program, with 32 bytes more. */
static void check_newer(const call_fixture *f, const call_case *c) {
    size_t whole;
    char sentence[256];
    memcpy(&whole, c->args, sizeof whole);
    const size_t size = whole + 32;
    char *newer = HOST(char, size);
    memcpy(newer, c->args, whole);
    memcpy(newer, &size, sizeof size);
    test_note("%s, 32 bytes more", c->name);
    OK(outcome(f, c, newer, sentence));
    newer[size - 1] = 1;
    check_error(outcome(f, c, newer, sentence), CLMOE_INVALID_ARGUMENT, "args.struct_size",
                "not 0");
}

static void other_versions(void **state) {
    (void)state;
    call_fixture f;
    call_case calls[CALLS];
    test_case("sizes of other versions");
    call_fixture_make(&f);
    calls_of(&f, calls);
    for (size_t i = 0; i < CALLS; i++) {
        for (size_t field = 0; field < calls[i].num_fields; field++)
            check_older(&f, &calls[i], calls[i].fields[field].offset);
        check_newer(&f, &calls[i]);
    }
    CL_OK(clFinish(test.queue));
}

/* External ids and logits: what goes together and what does not. */
static void external_routing(void **state) {
    (void)state;
    call_fixture f;
    call_case calls[CALLS];
    test_case("external routing");
    call_fixture_make(&f);
    calls_of(&f, calls);
    const call_case *c = &calls[0];
    clmoe_forward_args *args = &f.d.args;
    size_t pairs = (size_t)small.tokens * small.top_k, R = ref_columns(&f.desc);
    clmoe_buf ids = buf_of(HOST(int32_t, pairs), pairs * 4);
    clmoe_buf weights = buf_of(HOST(float, pairs), pairs * 4), none = {NULL, 0};
    args->logits = none;
    args->ids_in = ids;
    expect_refusal(&f, c, "pair_weights_in", "ids_in");
    args->ids_in = none;
    args->pair_weights_in = weights;
    expect_refusal(&f, c, "pair_weights_in", "ids_in");
    args->ids_in = ids;
    args->logits_in = buf_of(random_floats(small.tokens * R, 1.0), small.tokens * R * 4);
    expect_refusal(&f, c, "logits_in", "ids_in");
    args->logits_in = none;
    const buf_field more[] = {
        {"ids_in", offsetof(clmoe_forward_args, ids_in), false, 4},
        {"pair_weights_in", offsetof(clmoe_forward_args, pair_weights_in), false, 4}};
    for (size_t i = 0; i < COUNT_OF(more); i++) {
        clmoe_buf *buf = (clmoe_buf *)((char *)args + more[i].offset), right = *buf;
        buf->offset += 4096;
        expect_refusal(&f, c, more[i].name, "bytes");
        *buf = right;
    }
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
    /* Neither needs the router's weights. */
    f.weights.router = f.weights.router_bias = none;
    f.weights.select_bias = f.weights.expert_scale = none;
    OK(clmoe_forward(f.layer, test.queue, args, 0, NULL, NULL));
}

static void status_names(void **state) {
    (void)state;
    assert_string_equal(clmoe_status_string(CLMOE_SUCCESS), "CLMOE_SUCCESS");
    assert_string_equal(clmoe_status_string(CLMOE_BAD_FILE), "CLMOE_BAD_FILE");
    assert_string_equal(clmoe_status_string(CL_OUT_OF_RESOURCES), "CL_OUT_OF_RESOURCES");
    assert_non_null(clmoe_status_string(123456));
    assert_string_equal(clmoe_version(), "0.2.0");
    assert_non_null(clmoe_engine_name(test_context(0), 0, NULL));
    assert_null(clmoe_engine_name(test_context(0), 1000, NULL));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(layer_arguments), TEST(context_arguments), TEST(every_bad_buffer),
        TEST(every_bad_call),  TEST(other_versions),    TEST(external_routing),
        TEST(status_names),
    };
    return RUN(tests);
}
