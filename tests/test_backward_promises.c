/* What clmoe_backward() promises beside its values, on every engine. */
#include "support.h"
#include "support_backward.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const shape small = {33, 21, 12, 0, 3, 19};

/* Every kind of array, and pairs that are dropped. */
static clmoe_layer_desc desc_with_everything(const char *engine) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.engine = engine;
    desc.router.bias = desc.router.expert_scale = 1;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.experts.gate_up_bias = desc.experts.down_bias = 1;
    desc.shared.hidden_dim = 9;
    desc.shared.gate_layout = CLMOE_GATE_SEPARATE;
    desc.shared.gate_up_bias = desc.shared.down_bias = 1;
    desc.shared_gate = desc.output_bias = 1;
    desc.capacity.factor = 0.9;
    return desc;
}

/* Calls check(engine) for every engine, as a case of its own. */
static void on_every_engine(void (*check)(const char *engine)) {
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        test_case("engine %s", engines[n]);
        check(engines[n]);
    }
}

/* A batch of that layer, with mask and losses, that went forward. */
static training_batch *some_batch(const char *engine) {
    clmoe_layer_desc desc = desc_with_everything(engine);
    training_batch *t = training_make(&desc, small.tokens, WITH_MASK | WITH_DLOGITS | WITH_DYE);
    training_forward(t, 0);
    return t;
}

static training_outputs backward_of(training_batch *t) {
    training_backward(t);
    return training_read(t);
}

/* ---- The same bits ----------------------------------------------------------------------------
 */

static void check_repeats(const char *engine) {
    training_batch *t = some_batch(engine);
    const training_outputs first = backward_of(t);
    for (int i = 0; i < 2; i++) {
        training_new_outputs(t);
        buf_poison(t->args.scratch);
        const training_outputs again = backward_of(t);
        compare_outputs(&again, &first);
    }
}

static void same_bits_again(void **state) {
    (void)state;
    on_every_engine(check_repeats);
}

static void check_parts(const char *engine) {
    training_batch *t = some_batch(engine);
    const training_outputs both = backward_of(t);
    training_new_outputs(t);
    buf_poison(t->args.scratch);
    t->args.parts = CLMOE_BACKWARD_DATA;
    training_backward(t);
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++) {
        const clmoe_buf gradient = *gradients_field(&t->gradients, i);
        CHECK(gradient.mem == NULL || buf_untouched(gradient), "%s is written\n",
              ref_gradient_fields[i].name);
    }
    const training_outputs data = training_read(t);
    t->args.parts = CLMOE_BACKWARD_WEIGHTS;
    training_backward(t);
    const training_outputs weights = training_read(t);
    for (size_t i = 0; i < TRAINING_OUTPUTS - REF_GRADIENT_FIELDS; i++)
        compare_bits(data.name[i], data.data[i], weights.data[i], data.bytes[i]);
    compare_outputs(&weights, &both);
}

/* Data, then weights: the bits of both at once. */
static void parts(void **state) {
    (void)state;
    on_every_engine(check_parts);
}

static void check_recompute(const char *engine) {
    training_outputs of[2];
    for (uint32_t recompute = 0; recompute < 2; recompute++) {
        clmoe_layer_desc desc = desc_with_everything(engine);
        desc.recompute = recompute;
        training_batch *t = training_make(&desc, small.tokens, WITH_MASK | WITH_DLOGITS);
        training_forward(t, 0);
        of[recompute] = backward_of(t);
    }
    compare_outputs(&of[1], &of[0]);
}

static void recompute(void **state) {
    (void)state;
    on_every_engine(check_recompute);
}

/* recompute leaves z out of `saved`, which is the larger part of it. */
static void recompute_saves_memory(void **state) {
    (void)state;
    size_t saved[2], scratch;
    for (uint32_t recompute = 0; recompute < 2; recompute++) {
        clmoe_layer_desc desc = desc_with_everything("ref");
        desc.training = 1;
        desc.recompute = recompute;
        OK(clmoe_layer_memory(test_layer(0, &desc), small.tokens, &saved[recompute], &scratch));
    }
    const size_t z = (size_t)small.tokens * small.top_k * 2 * small.hidden_dim * sizeof(float);
    CHECK(saved[0] >= saved[1] + z * 8 / 10, "saved is %zu and %zu bytes\n", saved[0], saved[1]);
}

/* `saved` is as it was: the batch can go backward again. */
static void check_saved(const char *engine) {
    training_batch *t = some_batch(engine);
    size_t bytes = 0, scratch = 0;
    OK(clmoe_layer_memory(t->layer, small.tokens, &bytes, &scratch));
    const void *before = buf_get(t->args.saved);
    training_backward(t);
    compare_bits("saved", buf_get(t->args.saved), before, bytes);
}

static void saved_is_only_read(void **state) {
    (void)state;
    on_every_engine(check_saved);
}

/* On a queue out of order, with the waits that order the calls. */
static void check_out_of_order(const char *engine) {
    training_batch *t = some_batch(engine);
    const training_outputs want = backward_of(t);
    training_new_outputs(t);
    buf_poison(t->args.saved);
    cl_event forward = NULL, backward = NULL;
    OK(clmoe_forward(t->layer, test.out_of_order, &t->d.args, 0, NULL, &forward));
    OK(clmoe_backward(t->layer, test.out_of_order, &t->args, 1, &forward, &backward));
    CL_OK(clWaitForEvents(1, &backward));
    clReleaseEvent(forward);
    clReleaseEvent(backward);
    const training_outputs got = training_read(t);
    compare_outputs(&got, &want);
}

static void out_of_order_queue(void **state) {
    (void)state;
    on_every_engine(check_out_of_order);
}

/* ---- Events ------------------------------------------------------------------------------------
 */

static cl_int status_of(cl_event event) {
    cl_int status = -1;
    CL_OK(clGetEventInfo(event, CL_EVENT_COMMAND_EXECUTION_STATUS, sizeof status, &status, NULL));
    return status;
}

static void check_event(training_batch *t, cl_command_queue queue) {
    cl_event event = NULL;
    OK(clmoe_backward(t->layer, queue, &t->args, 0, NULL, &event));
    CHECK(event != NULL, "no event\n");
    CL_OK(clFlush(queue));
    CL_OK(clWaitForEvents(1, &event));
    CHECK(status_of(event) == CL_COMPLETE, "the event's status is %d\n", status_of(event));
    clReleaseEvent(event);
}

static void check_nothing_asked(training_batch *t) {
    t->args.dx = t->args.dlogits_out = t->args.dpair_weights = (clmoe_buf){NULL, 0};
    t->args.gradients = NULL;
    check_event(t, test.out_of_order);
}

/* On both kinds of queue, also for 0 tokens, and where nothing at all is asked for. */
static void check_events(const char *engine) {
    static const uint32_t tokens[] = {0, 1, 33};
    for (size_t i = 0; i < COUNT_OF(tokens); i++) {
        clmoe_layer_desc desc = desc_with_everything(engine);
        training_batch *t = training_make(&desc, tokens[i], WITH_MASK);
        training_forward(t, 0);
        check_event(t, test.queue);
        training_compare(t, NULL);
        training_new_outputs(t);
        check_event(t, test.out_of_order);
        training_compare(t, NULL);
        check_nothing_asked(t);
    }
}

static void events_are_valid(void **state) {
    (void)state;
    on_every_engine(check_events);
}

/* A call that blocked would never return, and nothing may have run when it does. */
static void check_waits(const char *engine) {
    cl_int code = CL_SUCCESS;
    cl_event event = NULL;
    if (strcmp(engine, "clblast") == 0)
        return;
    training_batch *t = some_batch(engine);
    for (int q = 0; q < 2; q++) {
        cl_command_queue queue = q ? test.out_of_order : test.queue;
        training_new_outputs(t);
        cl_event gate = clCreateUserEvent(test.context, &code);
        CL_OK(code);
        OK(clmoe_backward(t->layer, queue, &t->args, 1, &gate, &event));
        CL_OK(clFlush(queue));
        const cl_int status = status_of(event);
        CL_OK(clSetUserEventStatus(gate, CL_COMPLETE));
        CHECK(status == CL_QUEUED || status == CL_SUBMITTED,
              "the event's status is %d before its wait list\n", status);
        CL_OK(clWaitForEvents(1, &event));
        clReleaseEvent(event);
        clReleaseEvent(gate);
        training_compare(t, NULL);
    }
}

static void never_blocks(void **state) {
    (void)state;
    on_every_engine(check_waits);
}

/* "experts combine ", the steps of a profile. */
static void check_profile(training_batch *t, cl_command_queue queue, const char *names) {
    char got[256] = "";
    clmoe_profile profile = {.struct_size = sizeof profile};
    cl_event event = NULL;
    t->args.profile = &profile;
    OK(clmoe_backward(t->layer, queue, &t->args, 0, NULL, &event));
    CL_OK(clWaitForEvents(1, &event));
    for (uint32_t i = 0; i < profile.num_steps; i++) {
        double ms = -1.0;
        OK(clmoe_profile_time(&profile, i, &ms));
        CHECK(ms >= 0.0, "%s takes %g ms\n", profile.steps[i].name, ms);
        snprintf(got + strlen(got), sizeof got - strlen(got), "%s,", profile.steps[i].name);
    }
    CHECK(strcmp(got, names) == 0, "the steps are '%s', not '%s'\n", got, names);
    CHECK(profile.steps[profile.num_steps - 1].last == event,
          "the last step ends before the call\n");
    clmoe_profile_release(&profile);
    clReleaseEvent(event);
}

static void check_profiles(const char *engine) {
    cl_int code = CL_SUCCESS;
    training_batch *t = some_batch(engine);
    for (int q = 0; q < 2; q++) {
        cl_command_queue queue = clCreateCommandQueue(
            test.context, test.device,
            CL_QUEUE_PROFILING_ENABLE | (q ? CL_QUEUE_OUT_OF_ORDER_EXEC_MODE_ENABLE : 0), &code);
        CL_OK(code);
        t->args.parts = CLMOE_BACKWARD_BOTH;
        check_profile(t, queue,
                      "prepare,experts,combine,shared,topk,score,dispatch,experts gradients,"
                      "shared gradients,other gradients,");
        t->args.parts = CLMOE_BACKWARD_DATA;
        check_profile(t, queue, "prepare,experts,combine,shared,topk,score,dispatch,");
        t->args.parts = CLMOE_BACKWARD_WEIGHTS;
        check_profile(t, queue, "prepare,experts gradients,shared gradients,other gradients,");
        clReleaseCommandQueue(queue);
    }
}

static void profiles(void **state) {
    (void)state;
    on_every_engine(check_profiles);
}

/* ---- What is asked for ------------------------------------------------------------------------
 */

/* The arguments of t with one output alone. */
static void check_output_alone(training_batch *t, size_t i, const training_outputs *all) {
    const clmoe_backward_args args = t->args;
    const clmoe_gradients gradients = t->gradients;
    test_note("engine %s, %s alone", clmoe_layer_engine(t->layer), all->name[i]);
    t->args.dx = t->args.dlogits_out = t->args.dpair_weights = (clmoe_buf){NULL, 0};
    memset(&t->gradients, 0, sizeof t->gradients);
    clmoe_buf *const data[] = {&t->args.dx, &t->args.dlogits_out, &t->args.dpair_weights};
    const clmoe_buf of_data[] = {args.dx, args.dlogits_out, args.dpair_weights};
    clmoe_gradients from = gradients;
    clmoe_buf *to = i < 3 ? data[i] : gradients_field(&t->gradients, i - 3);
    *to = i < 3 ? of_data[i] : *gradients_field(&from, i - 3);
    buf_poison(*to);
    if (i < 3)
        t->args.gradients = NULL;
    const training_outputs alone = backward_of(t);
    compare_outputs(&alone, all);
    t->args = args;
    t->gradients = gradients;
}

static void check_each_alone(const char *engine) {
    training_batch *t = some_batch(engine);
    const training_outputs all = backward_of(t);
    for (size_t i = 0; i < TRAINING_OUTPUTS; i++)
        if (all.data[i])
            check_output_alone(t, i, &all);
}

/* Every output is optional, and has the same bits without the others. */
static void each_output_alone(void **state) {
    (void)state;
    on_every_engine(check_each_alone);
}

static void check_in_place(const char *engine) {
    training_batch *t = some_batch(engine);
    const training_outputs want = backward_of(t);
    training_new_outputs(t);
    t->args.dlogits_out = t->args.dlogits;
    const training_outputs got = backward_of(t);
    compare_outputs(&got, &want);
}

static void dlogits_in_place(void **state) {
    (void)state;
    on_every_engine(check_in_place);
}

/* ---- Accumulation ------------------------------------------------------------------------------
 */

/* Writes `value` + i to element i of every gradient, or 0. */
static void fill_gradients(training_batch *t, float value) {
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++) {
        const clmoe_buf buf = *gradients_field(&t->gradients, i);
        const size_t n = ref_gradient_count(&t->b.desc, i);
        float *values = HOST(float, n);
        for (size_t k = 0; k < n && value != 0.0f; k++)
            values[k] = value + (float)(k % 7);
        if (buf.mem)
            buf_write(buf, values, n * sizeof *values);
    }
}

/* first * times + what fill_gradients(value) wrote. */
static void compare_accumulated(const training_batch *t, const training_outputs *first,
                                double times, double value) {
    const training_outputs got = training_read(t);
    for (size_t i = 3; i < TRAINING_OUTPUTS; i++) {
        const size_t n = got.bytes[i] / sizeof(float);
        const float *one = first->data[i];
        double *want = HOST(double, n);
        for (size_t k = 0; k < n && one; k++)
            want[k] = times * (double)one[k] + (value != 0.0 ? value + (double)(k % 7) : 0.0);
        if (one)
            compare_floats(got.name[i], got.data[i], want, n, 1e-6);
    }
}

static void check_accumulation(const char *engine) {
    training_batch *t = some_batch(engine);
    const training_outputs first = backward_of(t);
    t->args.accumulate = 1;
    fill_gradients(t, 0.0f);
    const training_outputs once = backward_of(t);
    compare_outputs(&once, &first);
    training_backward(t);
    compare_accumulated(t, &first, 2.0, 0.0);
    fill_gradients(t, 3.0f);
    training_backward(t);
    compare_accumulated(t, &first, 1.0, 3.0);
}

static void accumulation(void **state) {
    (void)state;
    on_every_engine(check_accumulation);
}

/* Gradients of experts that nobody chose: exactly 0, or what was there. */
static void compare_empty_experts(const training_batch *t, float value) {
    const training_outputs got = training_read(t);
    size_t empty = 0;
    for (uint32_t e = 0; e < t->b.desc.num_experts; e++) {
        if (t->forward->plan.kept[e] > 0)
            continue;
        empty++;
        for (size_t i = REF_EXPERTS; i < REF_SHARED; i++) {
            const float *values = got.data[3 + i];
            const size_t n = ref_gradient_count(&t->b.desc, i) / t->b.desc.num_experts;
            for (size_t k = e * n; k < (e + 1) * n; k++)
                CHECK(values[k] == (value == 0.0f ? 0.0f : value + (float)(k % 7)),
                      "%s[%zu] of expert %u is %g\n", got.name[3 + i], k, e, (double)values[k]);
        }
    }
    CHECK(empty > 0, "no expert is empty\n");
}

static void check_empty_experts(const char *engine) {
    clmoe_layer_desc desc = desc_with_everything(engine);
    training_batch *t = training_make(&desc, 2, 0);
    training_forward(t, 0);
    training_backward(t);
    compare_empty_experts(t, 0.0f);
    fill_gradients(t, 3.0f);
    t->args.accumulate = 1;
    training_backward(t);
    compare_empty_experts(t, 3.0f);
}

static void empty_experts(void **state) {
    (void)state;
    on_every_engine(check_empty_experts);
}

/* No tokens: gradients of 0, or what was there. */
static void check_no_tokens(const char *engine) {
    clmoe_layer_desc desc = desc_with_everything(engine);
    training_batch *t = training_make(&desc, 0, 0);
    training_forward(t, 0);
    training_backward(t);
    training_compare(t, NULL);
    fill_gradients(t, 3.0f);
    const training_outputs before = training_read(t);
    t->args.accumulate = 1;
    const training_outputs after = backward_of(t);
    compare_outputs(&after, &before);
}

static void no_tokens(void **state) {
    (void)state;
    on_every_engine(check_no_tokens);
}

/* ---- Values that are not finite -----------------------------------------------------------------
 */

/* A row of dy with NaN and infinities reaches the dx and dlogits of its own token alone. */
static void check_nan_row(const char *engine) {
    training_batch *t = some_batch(engine);
    const training_outputs want = backward_of(t);
    const size_t D = small.dim, R = small.experts, K = small.top_k;
    size_t bad = 5;
    while (t->b.in.token_mask[bad] == 0)
        bad++;
    float *dy = HOST(float, small.tokens *D);
    memcpy(dy, t->dy, sizeof(float) * small.tokens * D);
    for (size_t d = 0; d < D; d++)
        dy[bad * D + d] = d % 2 ? NAN : INFINITY;
    buf_write(t->args.dy, dy, sizeof(float) * small.tokens * D);
    training_new_outputs(t);
    const training_outputs got = backward_of(t);
    const size_t rows[] = {D * sizeof(float), R * sizeof(float), K * sizeof(float)};
    for (size_t i = 0; i < COUNT_OF(rows); i++) {
        const size_t behind = (bad + 1) * rows[i];
        const char *is = got.data[i], *was = want.data[i];
        compare_bits(got.name[i], is, was, bad * rows[i]);
        compare_bits(got.name[i], is + behind, was + behind, got.bytes[i] - behind);
    }
    const float *dx = got.data[0];
    CHECK(isnan(dx[bad * D]), "dx of the token is %g\n", (double)dx[bad * D]);
}

static void nan_in_one_row(void **state) {
    (void)state;
    on_every_engine(check_nan_row);
}

/* ---- Errors -------------------------------------------------------------------------------------
 */

static void layer_without_training(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_with_everything("ref");
    training_batch *t = training_make(&desc, small.tokens, 0);
    t->b.desc.training = 0;
    training_forward(t, 0);
    check_error(clmoe_backward(t->layer, test.queue, &t->args, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "training", "0");
    CHECK(buf_untouched(t->args.dx), "dx is written\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(same_bits_again),    TEST(parts),
        TEST(recompute),          TEST(recompute_saves_memory),
        TEST(saved_is_only_read), TEST(out_of_order_queue),
        TEST(events_are_valid),   TEST(never_blocks),
        TEST(profiles),           TEST(each_output_alone),
        TEST(dlogits_in_place),   TEST(accumulation),
        TEST(empty_experts),      TEST(no_tokens),
        TEST(nan_in_one_row),     TEST(layer_without_training),
    };
    return RUN(tests);
}
