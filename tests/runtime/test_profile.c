/* The events of each step of a forward: which there are, whose they are, and what they say. */
#include "layer.h"
#include "support.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const shape small = {33, 20, 12, 2, 3, 19};

static cl_command_queue new_queue(bool out_of_order, bool profiling) {
    cl_int code = CL_SUCCESS;
    cl_command_queue_properties properties = profiling ? CL_QUEUE_PROFILING_ENABLE : 0;
    if (out_of_order)
        properties |= CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE;
    cl_command_queue queue = clCreateCommandQueue(test.context, test.device, properties, &code);
    if (code == CL_INVALID_QUEUE_PROPERTIES && out_of_order)
        return new_queue(false, profiling);
    CL_OK(code);
    return queue;
}

/* A layer with a shared expert, on a batch that asks for all outputs. */
static clmoe_layer *make(const char *engine, uint32_t tokens, batch *b, device_batch *d) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.engine = engine;
    desc.shared.hidden_dim = 9;
    batch_make(b, &desc, tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_upload(layer, b, d);
    return layer;
}

/* The call's event is the last one of its last step. */
static void run_into(clmoe_layer *layer, device_batch *d, cl_command_queue queue,
                     clmoe_profile *profile) {
    cl_event event = NULL;
    d->args.profile = profile;
    OK(clmoe_forward(layer, queue, &d->args, 0, NULL, &event));
    CL_OK(clWaitForEvents(1, &event));
    CHECK(profile->num_steps == 0 || profile->steps[profile->num_steps - 1].last == event,
          "%s ends before the call\n", profile->steps[profile->num_steps - 1].name);
    clReleaseEvent(event);
    CL_OK(clFinish(queue));
}

static void run(clmoe_layer *layer, device_batch *d, cl_command_queue queue,
                clmoe_profile *profile) {
    *profile = (clmoe_profile){.struct_size = sizeof *profile};
    run_into(layer, d, queue, profile);
}

/* The steps are those of `names`, with spaces between them. */
static void check_names(const clmoe_profile *profile, const char *names) {
    char got[256] = "";
    for (uint32_t i = 0; i < profile->num_steps; i++)
        snprintf(got + strlen(got), sizeof got - strlen(got), "%s%s", i ? " " : "",
                 profile->steps[i].name);
    CHECK(strcmp(got, names) == 0, "the steps are '%s', not '%s'\n", got, names);
}

/* Steps of a call that routes, then `names`: few tokens are planned as they are chosen. */
static void check_routed(const clmoe_layer *layer, uint32_t tokens, const clmoe_profile *profile,
                         const char *names) {
    char all[256];
    const bool few = layer->kernels[KERNEL_FEW] && tokens <= layer->topk_tokens;
    snprintf(all, sizeof all, "score topk %s%s", few ? "" : "plan ", names);
    check_names(profile, all);
}

static cl_ulong time_of(cl_event event, cl_profiling_info what) {
    cl_ulong time = 0;
    CL_OK(clGetEventProfilingInfo(event, what, sizeof time, &time, NULL));
    return time;
}

/* Steps follow one another, and their times add up to all of the call. */
static void check_times(const clmoe_profile *profile) {
    cl_ulong before = time_of(profile->steps[0].first, CL_PROFILING_COMMAND_START);
    const cl_ulong begin = before;
    double sum = 0;
    for (uint32_t i = 0; i < profile->num_steps; i++) {
        const clmoe_profile_step *step = &profile->steps[i];
        const cl_ulong first_end = time_of(step->first, CL_PROFILING_COMMAND_END);
        const cl_ulong end = time_of(step->last, CL_PROFILING_COMMAND_END);
        double ms = -1;
        CHECK(first_end >= before && end >= first_end, "%s ends before it begins\n", step->name);
        OK(clmoe_profile_time(profile, i, &ms));
        CHECK(ms >= 0, "%s takes %g ms\n", step->name, ms);
        sum += ms;
        before = end;
    }
    const double all = (double)(before - begin) * 1e-6;
    /* NVIDIA's driver places its ticks on the host's clock anew for each question: 160 ns off. */
    CHECK(fabs(sum - all) < 0.001 * all + 0.001, "%g ms add up to %g\n", all, sum);
}

/* An MLP is more than one command. */
static void check_commands(const clmoe_profile *profile) {
    static const char *const several[] = {"experts", "shared", "copy"};
    for (uint32_t i = 0; i < profile->num_steps; i++)
        for (size_t n = 0; n < COUNT_OF(several); n++)
            CHECK(strcmp(profile->steps[i].name, several[n]) != 0 ||
                      profile->steps[i].first != profile->steps[i].last,
                  "%s is one command\n", several[n]);
}

static cl_uint references_of(cl_event event) {
    cl_uint count = 0;
    CL_OK(clGetEventInfo(event, CL_EVENT_REFERENCE_COUNT, sizeof count, &count, NULL));
    return count;
}

/* The profile lets go of each event as often as it has it; drivers may hold some themselves. */
static void release(clmoe_profile *profile) {
    cl_event events[2 * CLMOE_PROFILE_STEPS];
    cl_uint before[2 * CLMOE_PROFILE_STEPS], count = 0;
    for (uint32_t i = 0; i < profile->num_steps; i++) {
        events[count++] = profile->steps[i].first;
        events[count++] = profile->steps[i].last;
    }
    for (cl_uint i = 0; i < count; i++)
        CL_OK(clRetainEvent(events[i]));
    for (cl_uint i = 0; i < count; i++)
        before[i] = references_of(events[i]);
    clmoe_profile_release(profile);
    assert_int_equal(profile->num_steps, 0);
    assert_null(profile->steps[0].first);
    for (cl_uint i = 0; i < count; i++) {
        const cl_uint slots = events[i] == events[i ^ 1] ? 2 : 1;
        CHECK(references_of(events[i]) == before[i] - slots, "event %u keeps a reference\n", i);
    }
    for (cl_uint i = 0; i < count; i++)
        clReleaseEvent(events[i]);
}

/* Every engine, on both kinds of queue; and y is what it is without a profile. */
static void steps_have_their_events(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (int q = 0; q < 2; q++) {
            batch b;
            device_batch d;
            clmoe_profile profile;
            test_case("engine %s, queue %d", engines[n], q);
            seed_set(3);
            clmoe_layer *layer = make(engines[n], small.tokens, &b, &d);
            cl_command_queue queue = new_queue(q != 0, true);
            run(layer, &d, queue, &profile);
            batch_compare(&b, &d, batch_reference(&b));
            check_routed(layer, b.in.tokens, &profile,
                         layer->experts.engine->gathers
                             ? "experts shared combine copy measure"
                             : "dispatch experts shared combine copy measure");
            check_times(&profile);
            check_commands(&profile);
            release(&profile);
            clReleaseCommandQueue(queue);
        }
}

/* What a call does not do has no events. */
static void steps_left_out(void **state) {
    (void)state;
    batch b;
    device_batch d;
    clmoe_profile profile;
    cl_command_queue queue = new_queue(false, true);
    test_case("no outputs");
    seed_set(4);
    clmoe_layer *layer = make("tiled", small.tokens, &b, &d);
    const clmoe_buf none = {0}, ids = d.args.ids, weights = d.args.pair_weights;
    run(layer, &d, queue, &profile);
    clmoe_profile_release(&profile);
    d.args.logits = d.args.ids = d.args.pair_weights = d.args.stats = none;
    run(layer, &d, queue, &profile);
    check_routed(layer, b.in.tokens, &profile, "experts shared combine");
    clmoe_profile_release(&profile);
    d.args.ids_in = ids;
    d.args.pair_weights_in = weights;
    run(layer, &d, queue, &profile);
    check_names(&profile, "plan experts shared combine");
    check_times(&profile);
    clmoe_profile_release(&profile);
    test_case("no tokens");
    layer = make("tiled", 0, &b, &d);
    d.args.stats = none;
    run(layer, &d, queue, &profile);
    check_names(&profile, "plan"); /* its counts are 0 */
    clmoe_profile_release(&profile);
    clReleaseCommandQueue(queue);
}

/* Soft MoE has no routing, and a step of its own; without tokens there is nothing to do. */
static void steps_of_soft_moe(void **state) {
    (void)state;
    batch b;
    device_batch d;
    clmoe_profile profile;
    cl_command_queue queue = new_queue(false, true);
    for (uint32_t tokens = 0; tokens <= small.tokens; tokens += small.tokens) {
        clmoe_layer_desc desc = desc_of(&small);
        test_case("Soft MoE, %u tokens", tokens);
        seed_set(5);
        desc.top_k = 1;
        desc.num_identity_experts = 0;
        desc.router.policy = CLMOE_POLICY_SOFT_MOE;
        batch_make(&b, &desc, tokens);
        b.no_outputs = true;
        clmoe_layer *layer = test_layer(0, &desc);
        batch_upload(layer, &b, &d);
        run(layer, &d, queue, &profile);
        check_names(&profile, tokens ? "dispatch experts mix combine" : "");
        if (tokens)
            check_times(&profile);
        release(&profile);
    }
    clReleaseCommandQueue(queue);
}

static void refused(clmoe_layer *layer, device_batch *d, cl_command_queue queue, const char *word) {
    cl_event event = NULL;
    CHECK(clmoe_forward(layer, queue, &d->args, 0, NULL, &event) == CLMOE_INVALID_ARGUMENT,
          "%s is accepted\n", word);
    CHECK(event == NULL, "an event of a refused call\n");
    CHECK(strstr(clmoe_last_error(), word) != NULL, "no '%s' in: %s\n", word, clmoe_last_error());
    CL_OK(clFinish(queue));
    CHECK(buf_untouched(d->args.y), "y was written\n");
}

/* A program of an older header has room for fewer steps: its last one has the rest. */
static void few_steps(void **state) {
    (void)state;
    enum { ROOM = 3 };
    batch b;
    device_batch d;
    clmoe_profile whole = {.struct_size = sizeof whole}, cut = whole;
    cl_command_queue queue = new_queue(false, true);
    test_case("room for %d steps", ROOM);
    seed_set(7);
    clmoe_layer *layer = make("tiled", small.tokens, &b, &d);
    cut.struct_size = offsetof(clmoe_profile, steps) + ROOM * sizeof(clmoe_profile_step);
    memset(&cut.steps[ROOM], 0xa5, (CLMOE_PROFILE_STEPS - ROOM) * sizeof(clmoe_profile_step));
    const clmoe_profile_step poison = cut.steps[ROOM];
    run(layer, &d, queue, &whole);
    run_into(layer, &d, queue, &cut);
    assert_true(whole.num_steps > ROOM);
    assert_int_equal(cut.num_steps, ROOM);
    assert_memory_equal(&cut.steps[ROOM], &poison, sizeof poison);
    for (uint32_t i = 0; i < ROOM; i++)
        assert_string_equal(cut.steps[i].name, whole.steps[i].name);
    cl_ulong end = 0, last = 0;
    CL_OK(clGetEventProfilingInfo(cut.steps[ROOM - 1].last, CL_PROFILING_COMMAND_END, sizeof last,
                                  &last, NULL));
    CL_OK(clGetEventProfilingInfo(cut.steps[ROOM - 1].first, CL_PROFILING_COMMAND_END, sizeof end,
                                  &end, NULL));
    CHECK(last > end, "the last step has one command\n");
    clmoe_profile_release(&whole);
    clmoe_profile_release(&cut);
    clReleaseCommandQueue(queue);
}

static void bad_profiles_are_refused(void **state) {
    (void)state;
    batch b;
    device_batch d;
    double ms;
    clmoe_profile profile = {.struct_size = sizeof profile};
    cl_command_queue plain = new_queue(false, false), queue = new_queue(false, true);
    test_case("refused");
    seed_set(6);
    clmoe_layer *layer = make("tiled", small.tokens, &b, &d);
    d.args.profile = &profile;
    refused(layer, &d, plain, "CL_QUEUE_PROFILING_ENABLE");
    profile.struct_size = offsetof(clmoe_profile, steps) + sizeof(clmoe_profile_step) - 1;
    refused(layer, &d, queue, "profile.struct_size");
    profile.struct_size = sizeof profile;
    profile.num_steps = 2;
    refused(layer, &d, queue, "2 steps");
    profile.num_steps = 0;
    assert_int_equal(clmoe_profile_time(&profile, 0, &ms), CLMOE_INVALID_ARGUMENT);
    assert_int_equal(clmoe_profile_time(NULL, 0, &ms), CLMOE_INVALID_ARGUMENT);
    clmoe_profile_release(NULL);
    run(layer, &d, queue, &profile);
    assert_int_equal(clmoe_profile_time(&profile, profile.num_steps, &ms), CLMOE_INVALID_ARGUMENT);
    assert_int_equal(clmoe_profile_time(&profile, 0, NULL), CLMOE_INVALID_ARGUMENT);
    clmoe_profile_release(&profile);
    clReleaseCommandQueue(plain);
    clReleaseCommandQueue(queue);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(steps_have_their_events), TEST(steps_left_out),
                                       TEST(steps_of_soft_moe), TEST(few_steps),
                                       TEST(bad_profiles_are_refused)};
    return RUN(tests);
}
