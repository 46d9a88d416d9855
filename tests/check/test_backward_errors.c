/* Bad arguments of the backward pass that are no buffers, and of layers that have none. */
#include "call_cases.h"

#include <string.h>

/* A number of some arguments. */
typedef struct number {
    size_t call;
    const char *name;
    size_t offset; /* in the call's args */
    uint32_t bad;
    const char *says;
} number;

#define N(call, type, field, bad, says)                                                            \
    { CALL_##call, #field, offsetof(type, field), bad, says }

static const number numbers[] = {
    N(EXPERTS, clmoe_experts_args, reserved, 1, "1"),
    N(BACKWARD, clmoe_backward_args, parts, 3, "3"),
    N(BACKWARD, clmoe_backward_args, accumulate, 2, "2"),
    N(BACKWARD, clmoe_backward_args, reserved, 1, "1"),
    N(EXPERTS_BACK, clmoe_experts_backward_args, parts, 3, "3"),
    N(EXPERTS_BACK, clmoe_experts_backward_args, accumulate, 7, "7"),
    N(EXPERTS_BACK, clmoe_experts_backward_args, reserved, 5, "5"),
    N(COMBINE_BACK, clmoe_combine_backward_args, accumulate, 2, "2"),
    N(SHARED_BACK, clmoe_shared_expert_backward_args, parts, 4294967295u, "4294967295"),
    N(SHARED_BACK, clmoe_shared_expert_backward_args, accumulate, 2, "2"),
    N(SHARED_BACK, clmoe_shared_expert_backward_args, reserved, 1, "1"),
    N(TOPK_BACK, clmoe_topk_backward_args, accumulate, 2, "2"),
    N(SCORE_BACK, clmoe_score_backward_args, parts, 3, "3"),
    N(SCORE_BACK, clmoe_score_backward_args, accumulate, 2, "2"),
    N(SCORE_BACK, clmoe_score_backward_args, logits_given, 2, "2"),
    N(DISPATCH_BACK, clmoe_dispatch_backward_args, reserved, 1, "1"),
};

static void bad_numbers(void **state) {
    (void)state;
    call_fixture f;
    call_case calls[CALLS];
    test_case("numbers");
    call_fixture_make(&f);
    calls_of(&f, calls);
    for (size_t i = 0; i < COUNT_OF(numbers); i++) {
        const number *n = &numbers[i];
        uint32_t *at = (uint32_t *)(void *)((char *)calls[n->call].args + n->offset), right = *at;
        test_note("%s, %s", calls[n->call].name, n->name);
        *at = n->bad;
        expect_refusal(&f, &calls[n->call], n->name, n->says);
        *at = right;
    }
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
}

/* Room of later headers in the gradients. */
static void room_of_gradients(void **state) {
    (void)state;
    static const size_t with_gradients[] = {CALL_BACKWARD,    CALL_EXPERTS_BACK, CALL_COMBINE_BACK,
                                            CALL_SHARED_BACK, CALL_TOPK_BACK,    CALL_SCORE_BACK};
    call_fixture f;
    call_case calls[CALLS];
    test_case("room of gradients");
    call_fixture_make(&f);
    calls_of(&f, calls);
    const struct {
        const char *name;
        clmoe_buf *at;
    } rooms[] = {
        {"gradients.reserved", &f.gradients.reserved[6]},
        {"gradients.experts.reserved", &f.gradients.experts.reserved[0]},
        {"gradients.shared.reserved", &f.gradients.shared.reserved[9]},
    };
    for (size_t c = 0; c < COUNT_OF(with_gradients); c++)
        for (size_t i = 0; i < COUNT_OF(rooms); i++) {
            rooms[i].at->offset = 4;
            expect_refusal(&f, &calls[with_gradients[c]], rooms[i].name, "not 0");
            rooms[i].at->offset = 0;
        }
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
}

/* Another router's choice leaves this one's logits nothing to do. */
static void external_choice(void **state) {
    (void)state;
    call_fixture f;
    call_case calls[CALLS];
    test_case("external choice");
    call_fixture_make(&f);
    calls_of(&f, calls);
    const call_case *c = &calls[CALL_BACKWARD];
    clmoe_backward_args *args = &f.backward;
    const size_t pairs = (size_t)small.tokens * small.top_k * 4;
    const clmoe_buf ids = buf_of(HOST(char, pairs), pairs), none = {NULL, 0};
    const clmoe_buf weights = buf_of(HOST(char, pairs), pairs);
    clmoe_buf *const others[] = {&args->dlogits, &args->dlogits_out, &args->logits_in,
                                 &args->dnoise, &args->dgroup_logits};
    const char *const names[] = {"dlogits", "dlogits_out", "logits_in", "dnoise", "dgroup_logits"};
    const clmoe_buf columns = args->dlogits;
    for (size_t i = 0; i < COUNT_OF(others); i++)
        *others[i] = none;
    args->ids_in = ids;
    expect_refusal(&f, c, "pair_weights_in", "ids_in");
    args->ids_in = none;
    args->pair_weights_in = weights;
    expect_refusal(&f, c, "ids_in", "pair_weights_in");
    args->ids_in = ids;
    for (size_t i = 0; i < COUNT_OF(others); i++) {
        *others[i] = columns;
        expect_refusal(&f, c, names[i], "ids_in");
        *others[i] = none;
    }
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
    /* The router's weights are not needed then. */
    f.weights.router = f.weights.router_bias = none;
    f.weights.select_bias = f.weights.expert_scale = none;
    f.d.args.logits = none;
    f.d.args.ids_in = ids;
    f.d.args.pair_weights_in = weights;
    OK(clmoe_forward(f.layer, test.queue, &f.d.args, 0, NULL, NULL));
    OK(c->call(f.layer, test.queue, args, 0, NULL, NULL));
}

/* Both products go the other way through the weights: packed ones do not do. */
static void packed_weights_alone(void **state) {
    (void)state;
    static const size_t with_matrices[] = {CALL_BACKWARD, CALL_EXPERTS_BACK};
    call_fixture f;
    call_case calls[CALLS];
    test_case("packed weights");
    call_fixture_make(&f);
    calls_of(&f, calls);
    f.weights.experts.packed = f.weights.experts.gate;
    f.weights.experts.gate = (clmoe_buf){NULL, 0};
    for (size_t i = 0; i < COUNT_OF(with_matrices); i++)
        expect_refusal(&f, &calls[with_matrices[i]], "weights.experts.gate", "not given");
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
}

/* The same calls on a layer that lacks something. */
static void refused_on(const clmoe_layer_desc *desc, size_t first, size_t last, clmoe_status status,
                       const char *field, const char *value) {
    call_fixture f;
    call_case calls[CALLS];
    call_fixture_make(&f);
    calls_of(&f, calls);
    clmoe_layer *layer = test_layer(0, desc);
    for (size_t i = first; i <= last; i++) {
        cl_event event = (cl_event)(void *)&f;
        test_note("%s, %s %s", calls[i].name, field, value);
        check_error(calls[i].call(layer, test.queue, calls[i].args, 0, NULL, &event), status, field,
                    value);
        CHECK(event == NULL, "the event is not NULL\n");
    }
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
}

static void other_layers(void **state) {
    (void)state;
    call_fixture f;
    test_case("other layers");
    call_fixture_make(&f);
    clmoe_layer_desc desc = f.desc;
    desc.training = 0;
    refused_on(&desc, CALL_BACKWARD, CALL_DISPATCH_BACK, CLMOE_INVALID_ARGUMENT, "training", "0");
    desc = f.desc;
    desc.dye = 0;
    refused_on(&desc, CALL_BACKWARD, CALL_COMBINE_BACK, CLMOE_INVALID_ARGUMENT, "dye", "0");
    desc = f.desc;
    desc.shared.hidden_dim = desc.shared_gate = 0;
    refused_on(&desc, CALL_SHARED_BACK, CALL_SHARED_BACK, CLMOE_INVALID_ARGUMENT, "SHARED", "none");
    desc = desc_of(&small);
    desc.router.policy = CLMOE_POLICY_SOFT_MOE;
    desc.top_k = 1;
    desc.training = desc.dye = 1;
    refused_on(&desc, CALL_EXPERTS_BACK, CALL_COMBINE_BACK, CLMOE_UNSUPPORTED, "Soft MoE", "step");
    refused_on(&desc, CALL_TOPK_BACK, CALL_DISPATCH_BACK, CLMOE_UNSUPPORTED, "Soft MoE", "step");
    refused_on(&desc, CALL_BACKWARD, CALL_BACKWARD, CLMOE_INVALID_ARGUMENT, "dlogits", "Soft MoE");
}

static void sizes_of_z(void **state) {
    (void)state;
    call_fixture f;
    size_t bytes = 7;
    test_case("clmoe_z_size()");
    call_fixture_make(&f);
    check_error(clmoe_z_size(NULL, 1, CLMOE_MLP_EXPERTS, &bytes), CLMOE_INVALID_ARGUMENT, "layer",
                "NULL");
    check_error(clmoe_z_size(f.layer, 1, CLMOE_MLP_EXPERTS, NULL), CLMOE_INVALID_ARGUMENT, "bytes",
                "NULL");
    check_error(clmoe_z_size(f.layer, 1, 2, &bytes), CLMOE_INVALID_ARGUMENT, "mlp", "2");
    check_error(clmoe_z_size(f.layer, 3000000000u, CLMOE_MLP_EXPERTS, &bytes), CLMOE_UNSUPPORTED,
                "tokens", "3000000000");
    assert_int_equal(bytes, 0);
    f.desc.shared.hidden_dim = f.desc.shared_gate = 0;
    check_error(clmoe_z_size(test_layer(0, &f.desc), 1, CLMOE_MLP_SHARED, &bytes),
                CLMOE_INVALID_ARGUMENT, "mlp", "none");
    f.desc.training = 0;
    check_error(clmoe_z_size(test_layer(0, &f.desc), 1, CLMOE_MLP_EXPERTS, &bytes),
                CLMOE_INVALID_ARGUMENT, "training", "0");
}

static void creating_gradients(void **state) {
    (void)state;
    static const clmoe_gradients none;
    call_fixture f;
    clmoe_gradients gradients;
    test_case("clmoe_gradients_create()");
    call_fixture_make(&f);
    check_error(clmoe_gradients_create(NULL, &gradients), CLMOE_INVALID_ARGUMENT, "layer", "NULL");
    check_error(clmoe_gradients_create(f.layer, NULL), CLMOE_INVALID_ARGUMENT, "gradients", "NULL");
    f.desc.training = 0;
    memset(&gradients, 0xa5, sizeof gradients);
    check_error(clmoe_gradients_create(test_layer(0, &f.desc), &gradients), CLMOE_INVALID_ARGUMENT,
                "training", "0");
    assert_memory_equal(&gradients, &none, sizeof none);
    OK(clmoe_gradients_create(f.layer, &gradients));
    CHECK(gradients.router.mem && gradients.experts.up.mem && gradients.output_bias.mem,
          "a gradient is not there\n");
    CHECK(!gradients.noise_router.mem && !gradients.shared.up.mem, "a gradient of nothing\n");
    clmoe_gradients_release(&gradients);
    assert_memory_equal(&gradients, &none, sizeof none);
    clmoe_gradients_release(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(bad_numbers),          TEST(room_of_gradients), TEST(external_choice),
        TEST(packed_weights_alone), TEST(other_layers),      TEST(sizes_of_z),
        TEST(creating_gradients),
    };
    return RUN(tests);
}
