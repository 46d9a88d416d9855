/* The bench's checks pass right results and find every kind of wrong one. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "../../bench/check.h"
#include "../../bench/peer_clblast.h"
#include "../../bench/peer_openblas.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const bench_case layer_case = {"check", CASE_ANY, 21, 40, 24, 7, 3, false};

typedef struct fixture {
    bench_device device;
    inputs in;
    reference ref;
    subject subject;
} fixture;

static void ok(clmoe_status status) {
    if (status != CLMOE_SUCCESS)
        print_error("%s\n", cli_error());
    assert_int_equal(status, CLMOE_SUCCESS);
}

static const char *wanted_device(void) {
    const char *text = getenv("CLMOE_TEST_DEVICE");
    return text && text[0] != '\0' ? text : NULL;
}

static void set_up(fixture *f, case_pattern pattern, clmoe_type type) {
    *f = (fixture){0};
    ok(device_open(wanted_device(), &f->device));
    ok(inputs_set(&f->in, &f->device, &layer_case, pattern, type));
    ok(reference_make(&f->in, &f->ref));
    ok(reference_backward(&f->in, &f->ref));
    ok(subject_create(&f->device, &f->in, &(bench_engine){.library = "ref"}, &f->subject));
}

static void tear_down(fixture *f) {
    subject_release(&f->subject);
    reference_free(&f->ref);
    inputs_release(&f->in);
    device_close(&f->device);
}

static void expect_right(fixture *f, bench_step step) {
    check_result result;
    ok(check_step(&f->subject, &f->ref, step, &result));
    assert_string_equal(result.wrong, "");
}

static void test_right_results_pass(void **state) {
    static const clmoe_type types[] = {CLMOE_F32, CLMOE_F16, CLMOE_BF16};
    (void)state;
    for (size_t type = 0; type < COUNT_OF(types); type++)
        for (int pattern = 0; pattern < ROUTE_PATTERNS; pattern++) {
            fixture f;
            set_up(&f, (case_pattern)pattern, types[type]);
            for (int step = 0; step < STEP_COUNT; step++)
                if (pattern_has_step((case_pattern)pattern, (bench_step)step))
                    expect_right(&f, (bench_step)step);
            tear_down(&f);
        }
}

/* Overwrites a buffer with ones, which are small integers and denormal floats. */
static void spoil(fixture *f, cl_mem buffer) {
    const cl_uint one = 1;
    size_t bytes = 0;
    ok(CL(clGetMemObjectInfo(buffer, CL_MEM_SIZE, sizeof bytes, &bytes, NULL)));
    ok(CL(clEnqueueFillBuffer(f->device.queue, buffer, &one, sizeof one, 0, bytes / 4 * 4, 0, NULL,
                              NULL)));
    ok(CL(clFinish(f->device.queue)));
}

/* Adds to the word at `offset` of a plan. */
static void spoil_word(fixture *f, cl_mem plan, size_t offset) {
    cl_uint word = 0;
    ok(CL(clEnqueueReadBuffer(f->device.queue, plan, CL_TRUE, offset, sizeof word, &word, 0, NULL,
                              NULL)));
    word += 7;
    ok(CL(clEnqueueWriteBuffer(f->device.queue, plan, CL_TRUE, offset, sizeof word, &word, 0, NULL,
                               NULL)));
}

static void expect_wrong(fixture *f, bench_step step, const char *name) {
    check_result result;
    ok(check_outputs(&f->subject, &f->ref, step, &result));
    if (result.wrong[0] == '\0')
        print_error("%s was spoilt, and %s passed\n", name, step_names[step]);
    assert_string_not_equal(result.wrong, "");
}

static void test_wrong_results_are_found(void **state) {
    static const struct {
        bench_step step;
        subject_buffer buffer;
        const char *name;
    } cases[] = {
        {STEP_LAYER, SUBJECT_Y, "y"},
        {STEP_SCORE, SUBJECT_LOGITS, "logits"},
        {STEP_SCORE, SUBJECT_SCORES, "scores"},
        {STEP_TOPK, SUBJECT_IDS, "ids"},
        {STEP_TOPK, SUBJECT_WEIGHTS, "weights"},
        {STEP_ROUTING, SUBJECT_IDS, "ids"},
        {STEP_TOPK_TO_PLAN, SUBJECT_WEIGHTS, "weights"},
        {STEP_DISPATCH, SUBJECT_XE, "xe"},
        {STEP_EXPERTS, SUBJECT_YE, "ye"},
        {STEP_COMBINE, SUBJECT_STEP_Y, "y"},
        {STEP_STATS, SUBJECT_STATS, "stats"},
    };
    fixture f;
    (void)state;
    set_up(&f, ROUTE_UNIFORM, CLMOE_F32);
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        expect_right(&f, cases[i].step);
        spoil(&f, f.subject.buffers[cases[i].buffer]);
        expect_wrong(&f, cases[i].step, cases[i].name);
        expect_right(&f, cases[i].step);
    }
    tear_down(&f);
}

/* One word of each array of the plan. */
static void test_wrong_plans_are_found(void **state) {
    fixture f;
    (void)state;
    set_up(&f, ROUTE_UNIFORM, CLMOE_F32);
    const clmoe_plan_layout *plan = &f.subject.plan;
    const size_t places[] = {plan->load,        plan->kept,    plan->offsets + 4,
                             plan->slot_of + 4, plan->pair_of, plan->token_of + 4,
                             plan->tile_expert};
    for (size_t i = 0; i < COUNT_OF(places); i++) {
        expect_right(&f, STEP_PLAN);
        spoil_word(&f, f.subject.buffers[SUBJECT_PLAN], places[i]);
        expect_wrong(&f, STEP_PLAN, "the plan");
    }
    tear_down(&f);
}

static void test_wrong_policies_are_found(void **state) {
    static const bench_step steps[] = {STEP_EXPERT_CHOICE, STEP_SINKHORN, STEP_REROUTE};
    fixture f;
    (void)state;
    set_up(&f, ROUTE_ZIPF, CLMOE_F32);
    for (size_t i = 0; i < COUNT_OF(steps); i++) {
        const bench_policy *p = &f.subject.policies[step_policy(steps[i])];
        expect_right(&f, steps[i]);
        const size_t places[] = {p->plan.kept, p->plan.slot_of + 4, p->plan.pair_of,
                                 p->plan.token_of};
        for (size_t n = 0; n < COUNT_OF(places); n++) {
            spoil_word(&f, p->buffers[POLICY_PLAN], places[n]);
            expect_wrong(&f, steps[i], "the plan");
            expect_right(&f, steps[i]);
        }
        spoil(&f, p->buffers[POLICY_IDS]);
        expect_wrong(&f, steps[i], "ids");
        expect_right(&f, steps[i]);
    }
    spoil(&f, f.subject.policies[POLICY_EXPERT_CHOICE].buffers[POLICY_OFFSETS]);
    expect_wrong(&f, STEP_EXPERT_CHOICE, "token_offsets");
    tear_down(&f);
}

/* A pair that loses its place, and its expert the row, although there was room. */
static void test_dropped_next_to_room_is_found(void **state) {
    fixture f;
    const int32_t none = -1;
    const uint32_t fewer = 0;
    const bench_policy *p = &f.subject.policies[POLICY_REROUTE];
    (void)state;
    set_up(&f, ROUTE_UNIFORM, CLMOE_F32);
    expect_right(&f, STEP_REROUTE);
    const size_t slots = p->plan.pairs * sizeof none, loads = layer_case.experts * sizeof fewer;
    ok(CL(clEnqueueFillBuffer(f.device.queue, p->buffers[POLICY_PLAN], &none, sizeof none,
                              p->plan.slot_of, slots, 0, NULL, NULL)));
    ok(CL(clEnqueueFillBuffer(f.device.queue, p->buffers[POLICY_PLAN], &fewer, sizeof fewer,
                              p->plan.kept, loads, 0, NULL, NULL)));
    expect_wrong(&f, STEP_REROUTE, "the plan");
    tear_down(&f);
}

static void test_wrong_balance_is_found(void **state) {
    static const struct {
        bench_step step;
        train_buffer buffer;
        const char *name;
    } cases[] = {
        {STEP_TRAIN, TRAIN_Y, "y"},
        {STEP_TRAIN_BALANCE, TRAIN_Y, "y"},
        {STEP_TRAIN_BALANCE, TRAIN_STATS, "stats"},
        {STEP_TRAIN_BALANCE, TRAIN_VALUES, "values"},
        {STEP_TRAIN_BALANCE, TRAIN_DLOGITS, "dlogits"},
        {STEP_BALANCE, TRAIN_STATS, "stats"},
        {STEP_BALANCE, TRAIN_VALUES, "values"},
        {STEP_BALANCE, TRAIN_DLOGITS, "dlogits"},
    };
    fixture f;
    (void)state;
    set_up(&f, ROUTE_ZIPF, CLMOE_F32);
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        expect_right(&f, cases[i].step);
        spoil(&f, f.subject.train.buffers[cases[i].buffer]);
        expect_wrong(&f, cases[i].step, cases[i].name);
        expect_right(&f, cases[i].step);
    }
    tear_down(&f);
}

static void test_wrong_counts_are_found(void **state) {
    fixture f;
    (void)state;
    set_up(&f, ROUTE_UNIFORM, CLMOE_F32);
    expect_right(&f, STEP_BIAS_COUNTS);
    const cl_mem counts = f.subject.counts.buffers[COUNTS_BIAS_COUNTS];
    spoil_word(&f, counts, 0);
    expect_wrong(&f, STEP_BIAS_COUNTS, "the first count");
    expect_right(&f, STEP_BIAS_COUNTS);
    spoil_word(&f, counts, (layer_case.experts * CLMOE_BIAS_BINS - 1) * 4);
    expect_wrong(&f, STEP_BIAS_COUNTS, "the last count");
    tear_down(&f);
}

/* Each output of the backward pass, in every step whose check looks at it. */
static void test_wrong_gradients_are_found(void **state) {
    static const bench_step steps[] = {STEP_BACKWARD, STEP_BACKWARD_DATA, STEP_BACKWARD_WEIGHTS,
                                       STEP_FORWARD_BACKWARD};
    fixture f;
    (void)state;
    set_up(&f, ROUTE_ZIPF, CLMOE_F32);
    expect_right(&f, STEP_BACKWARD);
    const bench_backward *b = &f.subject.backward;
    const struct {
        cl_mem buffer;
        const char *name;
        bool found[COUNT_OF(steps)];
    } cases[] = {
        {b->buffers[BACKWARD_Y], "y", {false, false, false, true}},
        {b->buffers[BACKWARD_DX], "dx", {true, true, false, true}},
        {b->buffers[BACKWARD_DLOGITS], "dlogits", {true, true, true, true}},
        {b->gradients.router.mem, "router", {true, false, true, true}},
        {b->gradients.router_bias.mem, "router_bias", {true, false, true, true}},
        {b->gradients.experts.gate.mem, "experts.gate", {true, false, true, true}},
        {b->gradients.experts.down.mem, "experts.down", {true, false, true, true}},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++)
        for (size_t s = 0; s < COUNT_OF(steps); s++) {
            expect_right(&f, steps[s]);
            spoil(&f, cases[i].buffer);
            if (cases[i].found[s])
                expect_wrong(&f, steps[s], cases[i].name);
        }
    tear_down(&f);
}

static void test_rows(void **state) {
    const double want[] = {1, 2, 2};
    const float near[] = {1, 2, 2.00002F}, far[] = {1, 2, 2.0001F}, bad[] = {1, NAN, 2};
    check_result result = {""};
    (void)state;
    check_row("row", near, want, 3, 1e-5, &result);
    assert_string_equal(result.wrong, "");
    check_row("row", far, want, 3, 1e-5, &result);
    assert_string_not_equal(result.wrong, "");
    result.wrong[0] = '\0';
    check_row("row", bad, want, 3, 1e-5, &result);
    assert_string_not_equal(result.wrong, "");
}

static void expect_peer(fixture *f, const peer_openblas *peer, bench_step step, bool right) {
    check_result result;
    ok(peer_openblas_check(peer, step, &f->ref, &result));
    if ((result.wrong[0] == '\0') != right)
        print_error("%s: '%s'\n", step_names[step], result.wrong);
    assert_true((result.wrong[0] == '\0') == right);
}

static void test_peer(void **state) {
    fixture f;
    peer_openblas peer;
    int32_t ids[21 * 3];
    float weights[21 * 3];
    (void)state;
    set_up(&f, ROUTE_ZIPF, CLMOE_F32);
    if (!peer_openblas_built() || !f.device.cpu) {
        tear_down(&f);
        skip();
    }
    ok(subject_read(&f.subject, SUBJECT_IDS, 0, sizeof ids, ids));
    ok(subject_read(&f.subject, SUBJECT_WEIGHTS, 0, sizeof weights, weights));
    ok(peer_openblas_create(&f.device, &f.in, ids, weights, &peer));
    peer_openblas_run(&peer, STEP_EXPERTS);
    expect_peer(&f, &peer, STEP_EXPERTS, true);
    memset(peer.out, 0, sizeof ids * layer_case.dim);
    expect_peer(&f, &peer, STEP_EXPERTS, false);
    for (bench_step step = STEP_BACKWARD; step <= STEP_FORWARD_BACKWARD; step++) {
        ok(peer_openblas_prepare(&peer));
        expect_peer(&f, &peer, step, false);
        peer_openblas_run(&peer, step);
        expect_peer(&f, &peer, step, true);
    }
    /* Each output of the training step. */
    const struct {
        float *values;
        size_t count;
    } outputs[] = {{peer.out, 21 * 3 * 40},
                   {peer.backward.dx, 21 * 40},
                   {peer.backward.dgate, 7 * 2 * 24 * 40},
                   {peer.backward.ddown, 7 * 24 * 40}};
    for (size_t i = 0; i < COUNT_OF(outputs); i++) {
        memset(outputs[i].values, 0, outputs[i].count * sizeof(float));
        expect_peer(&f, &peer, STEP_FORWARD_BACKWARD, false);
        peer_openblas_run(&peer, STEP_FORWARD_BACKWARD);
        expect_peer(&f, &peer, STEP_FORWARD_BACKWARD, true);
    }
    peer_openblas_release(&peer);
    tear_down(&f);
}

static void test_peer_clblast(void **state) {
    fixture f;
    peer_clblast peer;
    check_result result;
    int32_t ids[21 * 3];
    const cl_uint zero = 0;
    (void)state;
    set_up(&f, ROUTE_ZIPF, CLMOE_F32);
    if (!peer_clblast_built()) {
        tear_down(&f);
        skip();
    }
    ok(subject_read(&f.subject, SUBJECT_IDS, 0, sizeof ids, ids));
    ok(peer_clblast_create(&f.device, &f.in, ids, &peer));
    ok(peer_clblast_run(&peer));
    ok(peer_clblast_check(&peer, &f.ref, &result));
    assert_string_equal(result.wrong, "");
    ok(CL(clEnqueueFillBuffer(f.device.queue, peer.out, &zero, sizeof zero, 0,
                              sizeof ids * layer_case.dim, 0, NULL, NULL)));
    ok(peer_clblast_check(&peer, &f.ref, &result));
    assert_string_not_equal(result.wrong, "");
    peer_clblast_release(&peer);
    tear_down(&f);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_right_results_pass),
        cmocka_unit_test(test_rows),
        cmocka_unit_test(test_wrong_results_are_found),
        cmocka_unit_test(test_wrong_plans_are_found),
        cmocka_unit_test(test_wrong_policies_are_found),
        cmocka_unit_test(test_dropped_next_to_room_is_found),
        cmocka_unit_test(test_wrong_balance_is_found),
        cmocka_unit_test(test_wrong_counts_are_found),
        cmocka_unit_test(test_wrong_gradients_are_found),
        cmocka_unit_test(test_peer),
        cmocka_unit_test(test_peer_clblast),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
