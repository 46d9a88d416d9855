/* Packed weights: the same layer, the same results, and what the calls refuse. */
#include "support.h"

#include <string.h>

static const shape odd = {65, 45, 12, 2, 3, 29};
static const shape wide = {33, 261, 8, 0, 2, 96};
static const shape tiny = {5, 3, 4, 0, 2, 1};

typedef struct layout {
    const char *name;
    clmoe_gate_layout gate;
    uint32_t gate_up_transposed, down_transposed;
} layout;

static const layout layouts[] = {
    {"concatenated", CLMOE_GATE_CONCAT, 0, 0},
    {"concatenated, transposed", CLMOE_GATE_CONCAT, 1, 1},
    {"interleaved", CLMOE_GATE_INTERLEAVED, 0, 1},
    {"interleaved, transposed", CLMOE_GATE_INTERLEAVED, 1, 0},
    {"separate", CLMOE_GATE_SEPARATE, 0, 0},
    {"separate, transposed", CLMOE_GATE_SEPARATE, 1, 1},
    {"plain", CLMOE_GATE_NONE, 0, 0},
    {"plain, transposed", CLMOE_GATE_NONE, 1, 1},
};

static clmoe_layer_desc packed_desc(const shape *s, const layout *l) {
    clmoe_layer_desc desc = desc_of(s);
    clmoe_mlp_desc *mlps[] = {&desc.experts, &desc.shared};
    desc.engine = "cpu";
    desc.shared.hidden_dim = s->hidden_dim + 2;
    desc.shared_gate = 1;
    for (size_t i = 0; i < COUNT_OF(mlps); i++) {
        mlps[i]->gate_layout = l->gate;
        mlps[i]->gate_up_transposed = l->gate_up_transposed;
        mlps[i]->down_transposed = l->down_transposed;
        mlps[i]->gate_up_bias = mlps[i]->down_bias = i == 0;
    }
    return desc;
}

static bool engine_runs_here(const char *name) {
    const char *const *engines = test_engines();
    while (*engines && strcmp(*engines, name) != 0)
        engines++;
    return *engines != NULL;
}

/* A batch of the descriptor whose weights are all packed. */
static void upload_packed(clmoe_layer *layer, const batch *b, device_batch *d) {
    batch_upload(layer, b, d);
    weights_pack(layer, CLMOE_MLP_EXPERTS, &d->weights.experts);
    weights_pack(layer, CLMOE_MLP_SHARED, &d->weights.shared);
}

static void check_layout(const shape *s, const layout *l, clmoe_type type) {
    batch b;
    device_batch d;
    clmoe_layer_desc desc = packed_desc(s, l);
    desc.type = desc.weight_type = type;
    test_case("%s, dim %u, type %d", l->name, s->dim, type);
    seed_set(s->dim);
    batch_make(&b, &desc, s->tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    upload_packed(layer, &b, &d);
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    batch_compare(&b, &d, batch_reference(&b));
}

static void every_layout_and_type(void **state) {
    (void)state;
    if (!engine_runs_here("cpu"))
        skip();
    for (size_t i = 0; i < COUNT_OF(layouts); i++)
        for (clmoe_type type = CLMOE_F32; type <= CLMOE_BF16; type++) {
            check_layout(&odd, &layouts[i], type);
            check_layout(&wide, &layouts[i], type);
            check_layout(&tiny, &layouts[i], type);
        }
}

static void repeatable(void **state) {
    (void)state;
    batch b;
    device_batch d;
    if (!engine_runs_here("cpu"))
        skip();
    clmoe_layer_desc desc = packed_desc(&wide, &layouts[0]);
    test_case("repeatable");
    seed_set(1);
    batch_make(&b, &desc, wide.tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    upload_packed(layer, &b, &d);
    const size_t bytes = (size_t)wide.tokens * wide.dim * sizeof(float);
    const void *first = NULL;
    for (int n = 0; n < 20; n++) {
        cl_event event = NULL;
        buf_poison(d.args.y);
        OK(clmoe_forward(layer, n % 2 ? test.out_of_order : test.queue, &d.args, 0, NULL, &event));
        CL_OK(clWaitForEvents(1, &event));
        clReleaseEvent(event);
        const void *y = buf_get(d.args.y);
        first = first ? first : y;
        compare_bits("y", y, first, bytes);
    }
}

/* Packed twice: the same bytes, the padding included. */
static void packing_is_a_function(void **state) {
    (void)state;
    batch b;
    device_batch d[2];
    size_t bytes = 0;
    if (!engine_runs_here("cpu"))
        skip();
    clmoe_layer_desc desc = packed_desc(&odd, &layouts[0]);
    test_case("packing twice");
    seed_set(1);
    batch_make(&b, &desc, odd.tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    OK(clmoe_packed_size(layer, CLMOE_MLP_SHARED, &bytes));
    for (int n = 0; n < 2; n++)
        upload_packed(layer, &b, &d[n]);
    void *first = buf_get(d[0].weights.shared.packed),
         *second = buf_get(d[1].weights.shared.packed);
    CHECK(bytes % 4 == 0, "the size is %zu\n", bytes);
    compare_bits("packed", second, first, bytes);
}

/* The packed form is read even where raw weights are given too. */
static void packed_comes_first(void **state) {
    (void)state;
    batch b;
    device_batch d;
    if (!engine_runs_here("cpu"))
        skip();
    clmoe_layer_desc desc = packed_desc(&odd, &layouts[0]);
    test_case("raw and packed");
    seed_set(1);
    batch_make(&b, &desc, odd.tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_upload(layer, &b, &d);
    const clmoe_mlp_weights raw = d.weights.experts;
    weights_pack(layer, CLMOE_MLP_EXPERTS, &d.weights.experts);
    d.weights.experts.gate = raw.gate;
    d.weights.experts.down = raw.down;
    buf_poison(raw.gate);
    buf_poison(raw.down);
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    batch_compare(&b, &d, batch_reference(&b));
}

/* ---- The header ------------------------------------------------------------------------------ */

static void refused(clmoe_status status, clmoe_status want, const char *word) {
    CHECK(status == want, "status %s, not %s: %s\n", clmoe_status_string(status),
          clmoe_status_string(want), clmoe_last_error());
    CHECK(strstr(clmoe_last_error(), word) != NULL, "\"%s\" lacks \"%s\"\n", clmoe_last_error(),
          word);
}

static void plain(clmoe_layer_desc *d) {
    d->experts.gate_layout = CLMOE_GATE_NONE;
}

static void other_experts(clmoe_layer_desc *d) {
    d->num_experts = 11;
}

static void other_dim(clmoe_layer_desc *d) {
    d->dim = 44;
}

static void other_hidden_dim(clmoe_layer_desc *d) {
    d->experts.hidden_dim = 28;
}

static void f16(clmoe_layer_desc *d) {
    d->type = d->weight_type = CLMOE_F16;
}

static const struct {
    void (*set)(clmoe_layer_desc *desc);
    const char *says;
} other_layers[] = {
    {plain, "the MLP's gate is 1, but the layer has 0"},
    {other_experts, "experts is 12, but the layer has 11"},
    {other_dim, "dim is 45, but the layer has 44"},
    {other_hidden_dim, "hidden_dim is 29, but the layer has 28"},
    {f16, "weight_type is 0, but the layer has 1"},
};

/* Words of the header that no other layer on this device gives. */
static const struct {
    size_t word;
    const char *says;
} other_words[] = {
    {0, "holds no weights"},
    {1, "version is"},
    {2, "is of engine x"},
    {6, "the engine's layout is"},
};

static clmoe_status ask(clmoe_layer *layer, clmoe_buf packed) {
    return clmoe_packed_check(layer, test.queue, CLMOE_MLP_EXPERTS, packed);
}

static void headers(void **state) {
    (void)state;
    batch b;
    device_batch d;
    size_t bytes = 0;
    if (!engine_runs_here("cpu"))
        skip();
    clmoe_layer_desc desc = packed_desc(&odd, &layouts[0]);
    test_case("headers");
    seed_set(1);
    batch_make(&b, &desc, odd.tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_upload(layer, &b, &d);
    OK(clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes));
    const clmoe_pack_args args = {
        .struct_size = sizeof args, .raw = &d.weights.experts, .packed = buf_new(bytes)};
    refused(ask(layer, args.packed), CLMOE_INVALID_ARGUMENT, "holds no weights");
    OK(clmoe_pack_weights(layer, test.queue, &args, 0, NULL, NULL));
    OK(ask(layer, args.packed));
    for (size_t i = 0; i < COUNT_OF(other_layers); i++) {
        clmoe_layer_desc other = desc;
        other_layers[i].set(&other);
        refused(ask(test_layer(0, &other), args.packed), CLMOE_INVALID_ARGUMENT,
                other_layers[i].says);
    }
    for (size_t i = 0; i < COUNT_OF(other_words); i++) {
        uint32_t *words = buf_get(args.packed);
        words[other_words[i].word] ^= i == 2 ? 'c' ^ 'x' : 64;
        refused(ask(layer, buf_of(words, bytes)), CLMOE_INVALID_ARGUMENT, other_words[i].says);
    }
    /* The raw layout does not matter. */
    clmoe_layer_desc transposed = packed_desc(&odd, &layouts[1]);
    OK(ask(test_layer(0, &transposed), args.packed));
}

/* ---- Refusals ------------------------------------------------------------------------------ */

static void engines_without_a_packed_form(void **state) {
    (void)state;
    batch b;
    device_batch d;
    const char *const *engines = test_engines();
    for (size_t i = 0; engines[i] != NULL; i++) {
        size_t bytes = 7;
        if (strcmp(engines[i], "cpu") == 0)
            continue;
        clmoe_layer_desc desc = desc_of(&odd);
        desc.engine = engines[i];
        test_case("engine %s", engines[i]);
        seed_set(1);
        batch_make(&b, &desc, odd.tokens);
        clmoe_layer *layer = test_layer(0, &desc);
        batch_upload(layer, &b, &d);
        refused(clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes), CLMOE_UNSUPPORTED, engines[i]);
        CHECK(bytes == 0, "%zu bytes\n", bytes);
        clmoe_buf packed = buf_new(1 << 20);
        const clmoe_pack_args args = {
            .struct_size = sizeof args, .raw = &d.weights.experts, .packed = packed};
        refused(clmoe_pack_weights(layer, test.queue, &args, 0, NULL, NULL), CLMOE_UNSUPPORTED,
                engines[i]);
        refused(clmoe_packed_check(layer, test.queue, CLMOE_MLP_EXPERTS, packed), CLMOE_UNSUPPORTED,
                engines[i]);
        d.weights.experts.packed = packed;
        refused(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL), CLMOE_UNSUPPORTED,
                engines[i]);
        CHECK(all_untouched(), "something was written\n");
    }
}

static void bad_arguments(void **state) {
    (void)state;
    batch b;
    device_batch d;
    size_t bytes = 7;
    cl_event event = NULL;
    if (!engine_runs_here("cpu"))
        skip();
    clmoe_layer_desc desc = packed_desc(&odd, &layouts[4]);
    desc.shared.hidden_dim = desc.shared_gate = 0;
    test_case("bad arguments");
    seed_set(1);
    batch_make(&b, &desc, odd.tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_upload(layer, &b, &d);

    refused(clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, NULL), CLMOE_INVALID_ARGUMENT, "bytes");
    refused(clmoe_packed_size(NULL, CLMOE_MLP_EXPERTS, &bytes), CLMOE_INVALID_ARGUMENT, "layer");
    refused(clmoe_packed_size(layer, (clmoe_mlp)2, &bytes), CLMOE_INVALID_ARGUMENT, "mlp is 2");
    refused(clmoe_packed_size(layer, CLMOE_MLP_SHARED, &bytes), CLMOE_INVALID_ARGUMENT, "SHARED");
    CHECK(bytes == 0, "%zu bytes\n", bytes);
    OK(clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes));

    const clmoe_buf packed = buf_new(bytes), small = buf_new(64), none = {NULL, 0};
    const clmoe_buf crooked = {packed.mem, packed.offset + 1};
    const clmoe_mlp_weights *raw = &d.weights.experts;
    clmoe_mlp_weights no_down = *raw, short_up = *raw;
    no_down.down = none;
    short_up.up = buf_new(8);
#define PACK(mlp, weights, to)                                                                     \
    clmoe_pack_weights(layer, test.queue,                                                          \
                       &(clmoe_pack_args){sizeof(clmoe_pack_args), mlp, weights, to}, 0, NULL,     \
                       &event)
    refused(PACK(CLMOE_MLP_SHARED, raw, packed), CLMOE_INVALID_ARGUMENT, "SHARED");
    refused(PACK(CLMOE_MLP_EXPERTS, NULL, packed), CLMOE_INVALID_ARGUMENT, "raw");
    refused(PACK(CLMOE_MLP_EXPERTS, raw, none), CLMOE_INVALID_ARGUMENT, "packed");
    refused(PACK(CLMOE_MLP_EXPERTS, raw, small), CLMOE_INVALID_ARGUMENT, "packed");
    refused(PACK(CLMOE_MLP_EXPERTS, raw, crooked), CLMOE_INVALID_ARGUMENT, "packed.offset");
    refused(PACK(CLMOE_MLP_EXPERTS, &no_down, packed), CLMOE_INVALID_ARGUMENT, "raw.down");
    refused(PACK(CLMOE_MLP_EXPERTS, &short_up, packed), CLMOE_INVALID_ARGUMENT, "raw.up");
#undef PACK
    CHECK(event == NULL, "an event after an error\n");
    clmoe_pack_args args = {sizeof args, CLMOE_MLP_EXPERTS, raw, packed};
    refused(clmoe_pack_weights(layer, NULL, &args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT, "queue");
    args.struct_size = 5;
    refused(clmoe_pack_weights(layer, test.queue, &args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
            "struct_size is 5");
    refused(clmoe_pack_weights(layer, test.queue, NULL, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
            "args is NULL");
    refused(clmoe_packed_check(layer, NULL, CLMOE_MLP_EXPERTS, packed), CLMOE_INVALID_ARGUMENT,
            "queue");
    refused(clmoe_packed_check(layer, test.queue, CLMOE_MLP_EXPERTS, small), CLMOE_INVALID_ARGUMENT,
            "packed");

    d.weights.experts.packed = small;
    refused(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
            "weights.experts.packed");
    d.weights.experts.packed = packed;
    d.weights.experts.down_bias = none;
    refused(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
            "weights.experts.down_bias");
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was written\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_layout_and_type), TEST(repeatable), TEST(packing_is_a_function),
        TEST(packed_comes_first),    TEST(headers),    TEST(engines_without_a_packed_form),
        TEST(bad_arguments),
    };
    return RUN(tests);
}
