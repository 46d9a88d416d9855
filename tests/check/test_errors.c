/* Bad input: its status, a sentence with the field's name and its value, and nothing enqueued. */
#include "support.h"

#include <stdio.h>
#include <string.h>

static const shape small = {6, 5, 8, 0, 2, 3};

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

/* A buffer of an argument struct. */
typedef struct buf_field {
    const char *name;
    size_t offset;
    bool required;
    size_t element;
} buf_field;

typedef clmoe_status (*call)(clmoe_layer *layer, cl_command_queue queue, const void *args,
                             cl_uint num_wait, const cl_event *wait, cl_event *event);

/* One public call with arguments that are right, and the buffers in them. */
typedef struct call_case {
    const char *name;
    call call;
    void *args;
    const buf_field *fields;
    size_t num_fields;
    const clmoe_weights **weights; /* in args */
    const buf_field *weight_fields;
    size_t num_weight_fields;
} call_case;

#define DEFINE_CALL(function)                                                                      \
    static clmoe_status call_##function(clmoe_layer *layer, cl_command_queue queue,                \
                                        const void *args, cl_uint num_wait, const cl_event *wait,  \
                                        cl_event *event) {                                         \
        return function(layer, queue, args, num_wait, wait, event);                                \
    }

DEFINE_CALL(clmoe_forward)
DEFINE_CALL(clmoe_score)
DEFINE_CALL(clmoe_topk)
DEFINE_CALL(clmoe_plan)
DEFINE_CALL(clmoe_renorm_after_drop)
DEFINE_CALL(clmoe_jitter)
DEFINE_CALL(clmoe_dispatch)
DEFINE_CALL(clmoe_experts)
DEFINE_CALL(clmoe_shared_expert)
DEFINE_CALL(clmoe_combine)
DEFINE_CALL(clmoe_stats_compute)

#define B(type, field, required)                                                                   \
    { #field, offsetof(type, field), required, 4 }
#define M(type, field)                                                                             \
    { #field, offsetof(type, field), false, 1 }

static const buf_field forward_fields[] = {
    B(clmoe_forward_args, x, true),
    M(clmoe_forward_args, token_mask),
    B(clmoe_forward_args, residual, false),
    B(clmoe_forward_args, saved, true),
    B(clmoe_forward_args, scratch, true),
    B(clmoe_forward_args, y, true),
    B(clmoe_forward_args, logits, false),
    B(clmoe_forward_args, ids, false),
    B(clmoe_forward_args, pair_weights, false),
    B(clmoe_forward_args, stats, false),
};
static const buf_field score_fields[] = {
    B(clmoe_score_args, x, true),
    B(clmoe_score_args, logits, true),
    B(clmoe_score_args, scores, true),
};
static const buf_field topk_fields[] = {
    B(clmoe_topk_args, scores, true),
    B(clmoe_topk_args, ids, true),
    B(clmoe_topk_args, pair_weights, true),
    B(clmoe_topk_args, live, true),
};
static const buf_field plan_fields[] = {
    B(clmoe_plan_args, ids, true),   B(clmoe_plan_args, pair_weights, true),
    B(clmoe_plan_args, live, false), M(clmoe_plan_args, token_mask),
    B(clmoe_plan_args, plan, true),  B(clmoe_plan_args, scratch, true),
};
static const buf_field renorm_fields[] = {
    B(clmoe_renorm_after_drop_args, ids, true),
    B(clmoe_renorm_after_drop_args, pair_weights, true),
    B(clmoe_renorm_after_drop_args, plan, true),
};
static const buf_field jitter_fields[] = {
    B(clmoe_jitter_args, x, true),
    B(clmoe_jitter_args, state, true),
    B(clmoe_jitter_args, jittered, true),
};
static const buf_field dispatch_fields[] = {
    B(clmoe_dispatch_args, x, true),
    B(clmoe_dispatch_args, plan, true),
    B(clmoe_dispatch_args, xe, true),
};
static const buf_field experts_fields[] = {
    B(clmoe_experts_args, x, true),    B(clmoe_experts_args, pair_weights, true),
    B(clmoe_experts_args, plan, true), B(clmoe_experts_args, scratch, true),
    B(clmoe_experts_args, ye, true),
};
static const buf_field shared_fields[] = {
    B(clmoe_shared_expert_args, x, true),
    B(clmoe_shared_expert_args, scratch, true),
    B(clmoe_shared_expert_args, shared, true),
    B(clmoe_shared_expert_args, shared_gate, true),
};
static const buf_field combine_fields[] = {
    B(clmoe_combine_args, x, true),
    B(clmoe_combine_args, ye, true),
    B(clmoe_combine_args, pair_weights, true),
    B(clmoe_combine_args, plan, true),
    M(clmoe_combine_args, token_mask),
    B(clmoe_combine_args, shared, true),
    B(clmoe_combine_args, shared_gate, true),
    B(clmoe_combine_args, residual, false),
    B(clmoe_combine_args, y, true),
};
static const buf_field stats_fields[] = {
    B(clmoe_stats_args, logits, false),       B(clmoe_stats_args, ids, true),
    B(clmoe_stats_args, pair_weights, false), B(clmoe_stats_args, scratch, true),
    B(clmoe_stats_args, plan, true),          B(clmoe_stats_args, live, false),
    M(clmoe_stats_args, token_mask),          B(clmoe_stats_args, stats, true),
};
/* Each call needs a run of these. */
static const buf_field all_weights[] = {
    B(clmoe_weights, router, true),           B(clmoe_weights, router_bias, true),
    B(clmoe_weights, select_bias, true),      B(clmoe_weights, expert_scale, true),
    B(clmoe_weights, experts.gate, true),     B(clmoe_weights, experts.up, true),
    B(clmoe_weights, experts.down, true),     B(clmoe_weights, experts.gate_bias, true),
    B(clmoe_weights, experts.up_bias, true),  B(clmoe_weights, experts.down_bias, true),
    B(clmoe_weights, shared.gate, true),      B(clmoe_weights, shared.down, true),
    B(clmoe_weights, shared.gate_bias, true), B(clmoe_weights, shared.down_bias, true),
    B(clmoe_weights, shared_gate, true),      B(clmoe_weights, output_bias, true),
};

/* A layer that needs every buffer there is. */
static clmoe_layer_desc full_desc(void) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.num_identity_experts = 2;
    desc.training = 1;
    desc.router.bias = desc.router.select_bias = desc.router.expert_scale = 1;
    desc.router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    desc.router.renorm.after_drop = 1;
    desc.router.noise.jitter = 0.1f;
    desc.capacity.factor = 1.0;
    desc.capacity.keep = CLMOE_KEEP_WEIGHT;
    desc.experts.gate_layout = CLMOE_GATE_SEPARATE;
    desc.experts.gate_up_bias = desc.experts.down_bias = 1;
    desc.shared.hidden_dim = 3;
    desc.shared.gate_up_bias = desc.shared.down_bias = 1;
    desc.shared_gate = desc.output_bias = 1;
    return desc;
}

/* Everything the calls below share: right arguments for each. */
typedef struct fixture {
    clmoe_layer_desc desc;
    clmoe_layer *layer;
    batch b;
    device_batch d;
    clmoe_weights weights; /* a copy that may be spoilt */
    clmoe_score_args score;
    clmoe_topk_args topk;
    clmoe_plan_args plan;
    clmoe_renorm_after_drop_args renorm;
    clmoe_jitter_args jitter;
    clmoe_dispatch_args dispatch;
    clmoe_experts_args experts;
    clmoe_shared_expert_args shared;
    clmoe_combine_args combine;
    clmoe_stats_args stats;
} fixture;

static void step_arguments(fixture *f) {
    const clmoe_forward_args *a = &f->d.args;
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(f->layer, small.tokens, &layout));
    size_t T = small.tokens, R = ref_columns(&f->desc), D = small.dim, state = 0;
    OK(clmoe_state_size(f->layer, &state));
    clmoe_buf scores = buf_new(T * R * 4), live = buf_new(T * 4), plan = buf_new(layout.bytes);
    clmoe_buf xe = buf_new(layout.slots * D * 4), ye = buf_new(layout.slots * D * 4);
    clmoe_buf none = {NULL, 0};
    f->score = (clmoe_score_args){.struct_size = sizeof f->score,
                                  .tokens = small.tokens,
                                  .weights = &f->weights,
                                  .x = a->x,
                                  .logits = a->logits,
                                  .scores = scores};
    f->topk = (clmoe_topk_args){.struct_size = sizeof f->topk,
                                .tokens = small.tokens,
                                .weights = &f->weights,
                                .scores = scores,
                                .ids = a->ids,
                                .pair_weights = a->pair_weights,
                                .live = live};
    f->plan = (clmoe_plan_args){.struct_size = sizeof f->plan,
                                .tokens = small.tokens,
                                .ids = a->ids,
                                .pair_weights = a->pair_weights,
                                .live = live,
                                .token_mask = a->token_mask,
                                .scratch = a->scratch,
                                .plan = plan};
    f->renorm = (clmoe_renorm_after_drop_args){sizeof f->renorm, small.tokens,    &f->weights,
                                               a->ids,           a->pair_weights, plan};
    f->jitter = (clmoe_jitter_args){sizeof f->jitter, small.tokens, a->x, buf_new(state),
                                    buf_new(T * D * 4)};
    f->dispatch = (clmoe_dispatch_args){sizeof f->dispatch, small.tokens, a->x, plan, xe};
    f->experts = (clmoe_experts_args){
        sizeof f->experts, small.tokens, &f->weights, a->x, none, a->pair_weights, plan,
        a->scratch,        ye,           1,           0};
    f->shared =
        (clmoe_shared_expert_args){sizeof f->shared, small.tokens,       &f->weights,   a->x,
                                   a->scratch,       buf_new(T * D * 4), buf_new(T * 4)};
    f->combine = (clmoe_combine_args){
        sizeof f->combine, small.tokens, &f->weights,   a->x, ye,
        a->pair_weights,   plan,         a->token_mask, none, buf_new(T * D * 4),
        buf_new(T * 4),    a->residual,  a->y,          1,    0};
    f->stats = (clmoe_stats_args){.struct_size = sizeof f->stats,
                                  .tokens = small.tokens,
                                  .logits = a->logits,
                                  .ids = a->ids,
                                  .pair_weights = a->pair_weights,
                                  .plan = plan,
                                  .live = live,
                                  .token_mask = a->token_mask,
                                  .scratch = a->scratch,
                                  .stats = a->stats};
}

static void fixture_make(fixture *f) {
    f->desc = full_desc();
    f->layer = test_layer(0, &f->desc);
    seed_set(1);
    batch_make(&f->b, &f->desc, small.tokens);
    f->b.in.token_mask = random_mask(small.tokens);
    f->b.in.residual = random_floats((size_t)small.tokens * small.dim, 1.0);
    batch_upload(f->layer, &f->b, &f->d);
    f->weights = f->d.weights;
    f->d.args.weights = &f->weights;
    step_arguments(f);
}

#define CASE(function, arguments, fields)                                                          \
#function, call_##function, &(arguments), fields, COUNT_OF(fields)

enum { CALLS = 11 };

static void calls_of(fixture *f, call_case calls[CALLS]) {
    const call_case all[CALLS] = {
        {CASE(clmoe_forward, f->d.args, forward_fields), &f->d.args.weights, all_weights, 16},
        {CASE(clmoe_score, f->score, score_fields), &f->score.weights, all_weights, 2},
        {CASE(clmoe_topk, f->topk, topk_fields), &f->topk.weights, all_weights + 2, 2},
        {CASE(clmoe_plan, f->plan, plan_fields), NULL, NULL, 0},
        {CASE(clmoe_renorm_after_drop, f->renorm, renorm_fields), &f->renorm.weights,
         all_weights + 3, 1},
        {CASE(clmoe_jitter, f->jitter, jitter_fields), NULL, NULL, 0},
        {CASE(clmoe_dispatch, f->dispatch, dispatch_fields), NULL, NULL, 0},
        {CASE(clmoe_experts, f->experts, experts_fields), &f->experts.weights, all_weights + 4, 6},
        {CASE(clmoe_shared_expert, f->shared, shared_fields), &f->shared.weights, all_weights + 10,
         5},
        {CASE(clmoe_combine, f->combine, combine_fields), &f->combine.weights, all_weights + 15, 1},
        {CASE(clmoe_stats_compute, f->stats, stats_fields), NULL, NULL, 0},
    };
    memcpy(calls, all, sizeof all);
}

/* Calls with what is now in the arguments; expects an error, no event and no work. */
static void expect_refusal(const fixture *f, const call_case *c, const char *field,
                           const char *value) {
    cl_event event = (cl_event)f;
    clmoe_status status = c->call(f->layer, test.queue, c->args, 0, NULL, &event);
    check_error(status, CLMOE_INVALID_ARGUMENT, field, value);
    CHECK(event == NULL, "%s, %s: the event is not NULL\n", c->name, field);
}

/* Spoils one buffer in every way. `foreign` belongs to another OpenCL context. */
static void spoil_buffer(const fixture *f, const call_case *c, const buf_field *field,
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

static void spoil_call(fixture *f, const call_case *c, cl_mem foreign) {
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
    fixture f;
    call_case calls[CALLS];
    cl_int code = CL_SUCCESS;
    test_case("every bad buffer");
    fixture_make(&f);
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
    fixture f;
    call_case calls[CALLS];
    cl_int code = CL_SUCCESS;
    test_case("every bad call");
    fixture_make(&f);
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
static clmoe_status outcome(const fixture *f, const call_case *c, const void *args,
                            char sentence[256]) {
    clmoe_status status = c->call(f->layer, test.queue, args, 0, NULL, NULL);
    snprintf(sentence, 256, "%s", status == CLMOE_SUCCESS ? "" : clmoe_last_error());
    return status;
}

/* `args` of an older program, which end after `size` bytes: as if the others were 0. */
static void check_older(const fixture *f, const call_case *c, size_t size) {
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
static void check_newer(const fixture *f, const call_case *c) {
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
    fixture f;
    call_case calls[CALLS];
    test_case("sizes of other versions");
    fixture_make(&f);
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
    fixture f;
    call_case calls[CALLS];
    test_case("external routing");
    fixture_make(&f);
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
    const buf_field more[] = {B(clmoe_forward_args, ids_in, false),
                              B(clmoe_forward_args, pair_weights_in, false)};
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
