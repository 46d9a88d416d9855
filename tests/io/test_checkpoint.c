/* Checkpoints of 17 families: descriptors, uploaded weights and the layer they make. */
#include "io/safetensors.h"
#include "support_files.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- What the families are ------------------------------------------------------------------ */

/* Names of tensors below the block; '#' is an expert's number. */
typedef struct mlp_names {
    const char *gate, *up, *down; /* gate alone: gate and up in one */
    const char *gate_bias, *down_bias;
} mlp_names;

typedef struct expected {
    const char *family;
    const char *block;
    const char *router, *router_bias, *select_bias, *shared_gate;
    mlp_names experts, shared;
    clmoe_layer_desc desc; /* sizes and switches that are not 0 or the default */
} expected;

#define MLP(g, u, d)                                                                               \
    { .gate = g, .up = u, .down = d }
#define PROJ(prefix)                                                                               \
    MLP(prefix "gate_proj.weight", prefix "up_proj.weight", prefix "down_proj.weight")
#define W123(prefix)  MLP(prefix "w1.weight", prefix "w3.weight", prefix "w2.weight")
#define PROJ_EXPERTS  .experts = PROJ("experts.#.")
#define W123_EXPERTS  .experts = W123("experts.#.")
#define SIZES(e, k)   .dim = 48, .num_experts = e, .top_k = k
#define EXPERTS       .experts = {.hidden_dim = 32}
#define SHARED(width) .shared = {.hidden_dim = width}
#define TOPK_SOFTMAX  .router = {.order = CLMOE_ORDER_TOPK_THEN_SCORE}
#define RENORM_ONE    .renorm.kind = CLMOE_RENORM_SUM

static const expected families[] = {
    {"deepseek_v2", "mlp", "gate.weight", PROJ_EXPERTS, .shared = PROJ("shared_experts."),
     .desc = {SIZES(16, 4), EXPERTS, SHARED(64), .router = {.scale = 1.5F}}},
    {"deepseek_v3", "mlp", "gate.weight", PROJ_EXPERTS, .shared = PROJ("shared_experts."),
     .select_bias = "gate.e_score_correction_bias",
     .desc = {SIZES(16, 4), EXPERTS, SHARED(32),
              .router = {.score = CLMOE_SCORE_SIGMOID,
                         .select_bias = 1,
                         RENORM_ONE,
                         .renorm.eps = 1e-20F,
                         .scale = 2.5F,
                         .groups.count = 4,
                         .groups.topk = 2,
                         .groups.score = CLMOE_GROUP_TOP2_SUM}}},
    {"ernie4_5_moe", "mlp", "gate.weight", PROJ_EXPERTS, .shared = PROJ("shared_experts."),
     .select_bias = "moe_statics.e_score_correction_bias",
     .desc = {SIZES(16, 4), EXPERTS, SHARED(64), .router = {.select_bias = 1, RENORM_ONE}}},
    {"glm4_moe", "mlp", "gate.weight", PROJ_EXPERTS, .shared = PROJ("shared_experts."),
     .select_bias = "gate.e_score_correction_bias",
     .desc = {SIZES(16, 4), EXPERTS, SHARED(32),
              .router = {.score = CLMOE_SCORE_SIGMOID,
                         .select_bias = 1,
                         RENORM_ONE,
                         .renorm.eps = 1e-20F,
                         .scale = 1.5F}}},
    {"gpt_oss", "mlp", "router.weight", .router_bias = "router.bias",
     .experts = {"experts.gate_up_proj", NULL, "experts.down_proj", "experts.gate_up_proj_bias",
                 "experts.down_proj_bias"},
     .desc = {SIZES(8, 2), .router = {.order = CLMOE_ORDER_TOPK_THEN_SCORE, .bias = 1},
              .experts = {.hidden_dim = 32,
                          .gate_layout = CLMOE_GATE_INTERLEAVED,
                          .gate_up_transposed = 1,
                          .down_transposed = 1,
                          .gate_up_bias = 1,
                          .down_bias = 1,
                          .limit = 7,
                          .alpha = 1.702F,
                          .up_shift = 1}}},
    {"granitemoe", "block_sparse_moe", "router.layer.weight",
     .experts = MLP("input_linear.weight", NULL, "output_linear.weight"),
     .desc = {SIZES(8, 2), EXPERTS, TOPK_SOFTMAX}},
    {"hunyuan_v1_moe", "mlp", "gate.wg.weight", PROJ_EXPERTS, .shared = PROJ("shared_mlp."),
     .desc = {SIZES(8, 2), EXPERTS, SHARED(32), .router = {RENORM_ONE}}},
    {"jamba", "feed_forward", "router.weight", PROJ_EXPERTS, .desc = {SIZES(8, 2), EXPERTS}},
    {"lfm2_moe", "feed_forward", "gate.weight", W123_EXPERTS, .select_bias = "expert_bias",
     .desc = {SIZES(8, 2), EXPERTS,
              .router = {.score = CLMOE_SCORE_SIGMOID,
                         .select_bias = 1,
                         RENORM_ONE,
                         .renorm.eps = 1e-6F}}},
    {"llama4_text", "feed_forward", "router.weight", .shared = PROJ("shared_expert."),
     .experts = MLP("experts.gate_up_proj", NULL, "experts.down_proj"),
     .desc = {SIZES(8, 1), SHARED(32),
              .router = {.score = CLMOE_SCORE_SIGMOID,
                         .order = CLMOE_ORDER_TOPK_THEN_SCORE,
                         .weight_at = CLMOE_WEIGHT_AT_INPUT},
              .experts = {.hidden_dim = 32, .gate_up_transposed = 1, .down_transposed = 1}}},
    {"longcat_flash", "mlp", "router.classifier.weight", PROJ_EXPERTS,
     .select_bias = "router.e_score_correction_bias",
     .desc = {SIZES(12, 4), .num_identity_experts = 4, EXPERTS,
              .router = {.select_bias = 1, .scale = 6}}},
    {"minimax_m2", "block_sparse_moe", "gate.weight", W123_EXPERTS,
     .select_bias = "e_score_correction_bias",
     .desc = {SIZES(8, 2), EXPERTS,
              .router = {.score = CLMOE_SCORE_SIGMOID, .select_bias = 1, RENORM_ONE}}},
    {"mixtral", "block_sparse_moe", "gate.weight", W123_EXPERTS,
     .desc = {SIZES(8, 2), EXPERTS, .router = {RENORM_ONE}}},
    {"olmoe", "mlp", "gate.weight", PROJ_EXPERTS, .desc = {SIZES(16, 4), EXPERTS}},
    {"phimoe", "block_sparse_moe", "gate.weight", W123_EXPERTS,
     .desc = {SIZES(8, 2), EXPERTS,
              .router = {.score = CLMOE_SCORE_SPARSEMIXER, .order = CLMOE_ORDER_TOPK_THEN_SCORE}}},
    {"qwen2_moe", "mlp", "gate.weight", PROJ_EXPERTS, .shared = PROJ("shared_expert."),
     .shared_gate = "shared_expert_gate.weight",
     .desc = {SIZES(8, 2), EXPERTS, SHARED(40), .shared_gate = 1}},
    {"qwen3_moe", "mlp", "gate.weight", PROJ_EXPERTS,
     .desc = {SIZES(16, 4), EXPERTS, .router = {RENORM_ONE}}},
};

#define NUM_FAMILIES (sizeof families / sizeof families[0])

static const char *family_directory(const char *family) {
    static char path[512];
    snprintf(path, sizeof path, "%s/checkpoints/%s", TEST_DATA, family);
    return path;
}

static void close_checkpoint(void *checkpoint) {
    clmoe_checkpoint_close(checkpoint);
}

static void close_file(void *file) {
    safetensors_close(file);
}

static void release_weights(void *weights) {
    clmoe_weights_release(weights);
}

static clmoe_checkpoint *open_family(const char *family) {
    clmoe_checkpoint *checkpoint;
    OK(clmoe_checkpoint_open(family_directory(family), NULL, &checkpoint));
    clean_later(close_checkpoint, checkpoint);
    return checkpoint;
}

/* ---- Descriptors ---------------------------------------------------------------------------- */

#define SAME(field)                                                                                \
    CHECK(got->field == want->field, #field " is %g, not %g\n", (double)got->field,                \
          (double)want->field)

static void check_mlp(const clmoe_mlp_desc *got, const clmoe_mlp_desc *want) {
    SAME(hidden_dim);
    SAME(activation);
    SAME(gate_layout);
    SAME(gate_up_transposed);
    SAME(down_transposed);
    SAME(gate_up_bias);
    SAME(down_bias);
    SAME(limit);
    SAME(alpha);
    SAME(up_shift);
}

static void check_router(const clmoe_router_desc *got, const clmoe_router_desc *want) {
    SAME(score);
    SAME(order);
    SAME(temperature);
    SAME(softcap);
    SAME(bias);
    SAME(select_bias);
    SAME(groups.count);
    SAME(groups.topk);
    SAME(groups.score);
    SAME(renorm.kind);
    SAME(renorm.eps);
    SAME(renorm.p);
    SAME(renorm.after_drop);
    SAME(scale);
    SAME(expert_scale);
    SAME(sparsemixer_eps);
    SAME(weight_at);
    SAME(weight_type);
}

static void check_desc(const clmoe_layer_desc *got, const clmoe_layer_desc *want) {
    SAME(struct_size);
    SAME(dim);
    SAME(num_experts);
    SAME(num_identity_experts);
    SAME(top_k);
    SAME(type);
    SAME(weight_type);
    SAME(training);
    SAME(capacity.rows);
    SAME(capacity.factor);
    SAME(normalize_experts);
    SAME(shared_gate);
    SAME(output_bias);
    check_router(&got->router, &want->router);
    check_mlp(&got->experts, &want->experts);
    check_mlp(&got->shared, &want->shared);
}

/* The expected descriptor with its defaults. */
static clmoe_layer_desc desc_expected(const expected *e) {
    clmoe_layer_desc desc = e->desc, defaults;
    clmoe_layer_desc_init(&defaults);
    desc.struct_size = defaults.struct_size;
    desc.router.temperature = defaults.router.temperature;
    desc.router.renorm.p = defaults.router.renorm.p;
    desc.router.sparsemixer_eps = defaults.router.sparsemixer_eps;
    desc.router.scale = desc.router.scale != 0 ? desc.router.scale : defaults.router.scale;
    desc.experts.alpha = desc.experts.alpha != 0 ? desc.experts.alpha : defaults.experts.alpha;
    desc.shared.alpha = defaults.shared.alpha;
    return desc;
}

static void test_descriptors(void **state) {
    (void)state;
    for (size_t f = 0; f < NUM_FAMILIES; f++) {
        test_case("%s", families[f].family);
        clmoe_checkpoint *checkpoint = open_family(families[f].family);
        assert_string_equal(clmoe_checkpoint_model_type(checkpoint), families[f].family);
        clmoe_layer_desc got, want = desc_expected(&families[f]);
        OK(clmoe_checkpoint_layer(checkpoint, 0, &got));
        check_desc(&got, &want);
        REFUSED(clmoe_checkpoint_layer(checkpoint, 1, &got), CLMOE_BAD_FILE,
                "layer 1 has no MoE block");
        REFUSED(clmoe_checkpoint_layer(checkpoint, 4000000000, &got), CLMOE_BAD_FILE,
                "layer 4000000000 has no MoE block", "num_");
    }
}

/* ---- Uploaded weights ----------------------------------------------------------------------- */

/* Reads a tensor of layer 0 through the file itself, from whichever file has it. */
static const float *file_tensor(const expected *e, const char *below, uint32_t expert,
                                size_t *elements) {
    static const char *const files[] = {"model.safetensors", "model-00001-of-00002.safetensors",
                                        "model-00002-of-00002.safetensors"};
    char name[256], path[600];
    const char *number = strchr(below, '#');
    snprintf(name, sizeof name, "model.layers.0.%s.%.*s", e->block,
             number ? (int)(number - below) : 200, below);
    if (number != NULL)
        snprintf(name + strlen(name), 100, "%u%s", expert, number + 1);
    for (size_t i = 0; i < 3; i++) {
        safetensors *file;
        snprintf(path, sizeof path, "%s/%s", family_directory(e->family), files[i]);
        if (safetensors_open(path, &file) != CLMOE_SUCCESS)
            continue;
        const st_tensor *t = safetensors_find(file, name);
        *elements = t ? (size_t)t->elements : 0;
        float *values = t ? HOST(float, *elements) : NULL;
        if (t != NULL)
            OK(safetensors_read_f32(file, t, 0, *elements, values));
        safetensors_close(file);
        if (t != NULL)
            return values;
    }
    CHECK(false, "no file has %s\n", name);
    return NULL;
}

/* The whole of a buffer, and its size in floats; NULL for a buffer that is not there. */
static float *buffer_floats(clmoe_buf buf, size_t *floats) {
    size_t bytes = 0;
    *floats = 0;
    if (buf.mem == NULL)
        return NULL;
    CHECK(buf.offset == 0, "offset %zu\n", buf.offset);
    CL_OK(clGetMemObjectInfo(buf.mem, CL_MEM_SIZE, sizeof bytes, &bytes, NULL));
    float *values = HOST(float, bytes / 4);
    CL_OK(clEnqueueReadBuffer(test.queue, buf.mem, CL_TRUE, 0, bytes, values, 0, NULL, NULL));
    *floats = bytes / 4;
    return values;
}

/*
 * A buffer must hold, for each expert, the tensors `first` and then `second`; a name without a
 * number is of all experts. Without `first`, there must be no buffer. Returns the contents.
 */
static const float *check_buffer(const expected *e, clmoe_buf buf, uint32_t experts,
                                 const char *first, const char *second) {
    size_t floats, at = 0, elements;
    float *got = buffer_floats(buf, &floats);
    CHECK((got != NULL) == (first != NULL), "buffer of %s\n", first ? first : "nothing");
    uint32_t count = first && strchr(first, '#') ? experts : 1;
    for (uint32_t x = 0; first != NULL && x < count; x++)
        for (int part = 0; part < 2; part++) {
            const char *name = part ? second : first;
            if (name == NULL)
                continue;
            const float *want = file_tensor(e, name, x, &elements);
            CHECK(at + elements <= floats, "%s: the buffer has %zu floats\n", name, floats);
            compare_bits(name, got + at, want, elements * 4);
            at += elements;
        }
    CHECK(at == floats, "the buffer has %zu floats, not %zu\n", floats, at);
    return got;
}

static ref_mlp_weights check_mlp_buffers(const expected *e, const clmoe_mlp_weights *w,
                                         const mlp_names *names, uint32_t experts) {
    ref_mlp_weights ref = {0};
    ref.gate = check_buffer(e, w->gate, experts, names->gate, names->up);
    ref.up = check_buffer(e, w->up, experts, NULL, NULL);
    ref.down = check_buffer(e, w->down, experts, names->down, NULL);
    ref.gate_bias = check_buffer(e, w->gate_bias, experts, names->gate_bias, NULL);
    ref.up_bias = check_buffer(e, w->up_bias, experts, NULL, NULL);
    ref.down_bias = check_buffer(e, w->down_bias, experts, names->down_bias, NULL);
    return ref;
}

static ref_weights check_buffers(const expected *e, const clmoe_weights *w) {
    ref_weights ref = {0};
    ref.router = check_buffer(e, w->router, 1, e->router, NULL);
    ref.router_bias = check_buffer(e, w->router_bias, 1, e->router_bias, NULL);
    ref.select_bias = check_buffer(e, w->select_bias, 1, e->select_bias, NULL);
    ref.expert_scale = check_buffer(e, w->expert_scale, 1, NULL, NULL);
    ref.shared_gate = check_buffer(e, w->shared_gate, 1, e->shared_gate, NULL);
    ref.output_bias = check_buffer(e, w->output_bias, 1, NULL, NULL);
    ref.experts = check_mlp_buffers(e, &w->experts, &e->experts, e->desc.num_experts);
    ref.shared = check_mlp_buffers(e, &w->shared, &e->shared, 1);
    return ref;
}

/* A recorded tensor whose name ends in `end`; *rows is T. */
static float *recorded(const expected *e, const char *end, uint32_t *rows) {
    char path[600];
    safetensors *file;
    snprintf(path, sizeof path, "%s/activations.safetensors", family_directory(e->family));
    OK(safetensors_open(path, &file));
    clean_later(close_file, file);
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const st_tensor *t = safetensors_at(file, i);
        if (strcmp(t->name + strlen(t->name) - strlen(end), end) != 0)
            continue;
        float *values = HOST(float, (size_t)t->elements);
        OK(safetensors_read_f32(file, t, 0, (size_t)t->elements, values));
        *rows = (uint32_t)t->shape[0];
        return values;
    }
    CHECK(false, "no tensor ends in %s\n", end);
    return NULL;
}

/* The oracle with the descriptor and the weights as uploaded gives what the framework recorded. */
static void check_output(const expected *e, const clmoe_layer_desc *desc,
                         const ref_weights *weights) {
    uint32_t tokens;
    float *x = recorded(e, ".x", &tokens), *want = recorded(e, ".y", &tokens);
    ref_forward_in in = {.tokens = tokens, .weights = weights, .x = x};
    ref_result result;
    ref_forward(desc, &in, &result);
    double difference = 0, norm = 0;
    for (size_t i = 0; i < (size_t)tokens * desc->dim; i++) {
        difference += (result.y[i] - (double)want[i]) * (result.y[i] - (double)want[i]);
        norm += (double)want[i] * (double)want[i];
    }
    ref_result_free(&result);
    CHECK(sqrt(difference / norm) < 1e-6, "off by %g\n", sqrt(difference / norm));
}

static void test_uploads(void **state) {
    (void)state;
    static clmoe_weights weights; /* lives until the clean-up */
    const clmoe_weights none = {0};
    for (size_t f = 0; f < NUM_FAMILIES; f++) {
        test_case("%s", families[f].family);
        clmoe_checkpoint *checkpoint = open_family(families[f].family);
        clmoe_layer_desc desc;
        OK(clmoe_checkpoint_layer(checkpoint, 0, &desc));
        desc.capacity.factor = 1.25;
        desc.engine = "ref";
        OK(clmoe_checkpoint_upload(checkpoint, 0, &desc, test.context,
                                   f % 2 ? test.queue : test.out_of_order, &weights));
        clean_later(release_weights, &weights);
        ref_weights ref = check_buffers(&families[f], &weights);
        desc.capacity.factor = 0;
        check_output(&families[f], &desc, &ref);
        clmoe_weights_release(&weights);
        assert_memory_equal(&weights, &none, sizeof none);
    }
    clmoe_weights_release(NULL);
}

/* Whether buffer i of clmoe_weights is room for later fields. */
static bool is_reserved(size_t i) {
    static const clmoe_weights *const w = NULL;
    const size_t at = i * sizeof(clmoe_buf);
    return at >= offsetof(clmoe_weights, reserved) ||
           (at - offsetof(clmoe_weights, experts.reserved)) < sizeof w->experts.reserved ||
           (at - offsetof(clmoe_weights, shared.reserved)) < sizeof w->shared.reserved;
}

/* Every buffer there is a field for is released, and the struct is cleared. */
static void test_release(void **state) {
    (void)state;
    enum { FIELDS = sizeof(clmoe_weights) / sizeof(clmoe_buf) };
    _Static_assert(sizeof(clmoe_weights) == FIELDS * sizeof(clmoe_buf), "not of buffers alone");
    clmoe_buf bufs[FIELDS] = {{NULL, 0}};
    clmoe_weights weights;
    const clmoe_weights none = {.router = {NULL, 0}};
    cl_int code = CL_SUCCESS;
    /* Not buf_new(), whose command may hold a reference a little longer. */
    for (size_t i = 0; i < FIELDS; i++) {
        if (is_reserved(i))
            continue;
        bufs[i] = (clmoe_buf){clCreateBuffer(test.context, CL_MEM_READ_WRITE, 4, NULL, &code), 0};
        CL_OK(code);
        CL_OK(clRetainMemObject(bufs[i].mem));
    }
    memcpy(&weights, bufs, sizeof weights);
    clmoe_weights_release(&weights);
    for (size_t i = 0; i < FIELDS; i++) {
        cl_uint count = 0;
        if (is_reserved(i))
            continue;
        CL_OK(clGetMemObjectInfo(bufs[i].mem, CL_MEM_REFERENCE_COUNT, sizeof count, &count, NULL));
        CHECK(count == 1, "buffer %zu has %u references\n", i, count);
        clReleaseMemObject(bufs[i].mem);
    }
    CHECK(memcmp(&weights, &none, sizeof none) == 0, "the weights are not cleared\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_descriptors),
        TEST(test_uploads),
        TEST(test_release),
    };
    return RUN(tests);
}
