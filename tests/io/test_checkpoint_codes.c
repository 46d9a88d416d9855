/*
 * Coded checkpoints, decoded at upload: files of an independent writer, single codes against their
 * formulas, blocks with short edges, and files that contradict themselves.
 */
#include "io/codes.h"
#include "io/safetensors.h"
#include "support_checkpoint.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Single codes --------------------------------------------------------------------------- */

/* Compares by bits, but for NaN, of which there are many. */
static void check_code(const char *what, int code, float got, double want) {
    if (isnan(want)) {
        CHECK(isnan(got), "%s %d is %g, not NaN\n", what, code, (double)got);
        return;
    }
    CHECK((double)got == want && !signbit(got) == !signbit(want), "%s %d is %g, not %g\n", what,
          code, (double)got, want);
}

static void every_code(void **state) {
    (void)state;
    static const double fp4[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    test_case("codes");
    for (int code = 0; code < 256; code++) {
        const double sign = code & 128 ? -1 : 1;
        const int e = code >> 3 & 15, m = code & 7;
        const double e4m3 = (code & 127) == 127 ? (double)NAN
                            : e == 0            ? sign * m / 512
                                                : sign * (1 + m / 8.0) * pow(2, e - 7);
        check_code("e4m3", code, code_e4m3((unsigned char)code), e4m3);
        check_code("e8m0", code, code_e8m0((unsigned char)code),
                   code == 255 ? (double)NAN : pow(2, code - 127));
        check_code("e2m1", code, code_e2m1((unsigned char)code),
                   (code & 8 ? -1 : 1) * fp4[code & 7]);
    }
}

/* ---- Files of another writer ---------------------------------------------------------------- */

static const struct {
    const char *name, *format;
} written[] = {
    {"fp8_f32", "FP8"},        {"fp8_bf16", "FP8"},       {"fp8_e8m0", "FP8"},
    {"fp8_scale", "FP8"},      {"fp8_channel", "FP8"},    {"fp8_tensor", "FP8"},
    {"mxfp4_blocks", "MXFP4"}, {"mxfp4_packed", "MXFP4"}, {"mxfp4_pairs", "MXFP4"},
};

static const char *directory_of(size_t i) {
    static char path[512];
    snprintf(path, sizeof path, "%s/coded/%s", TEST_DATA, written[i].name);
    return path;
}

static safetensors *open_file(size_t i, const char *name) {
    char path[600];
    safetensors *file = NULL;
    snprintf(path, sizeof path, "%s/%s", directory_of(i), name);
    OK(safetensors_open(path, &file));
    return file;
}

static float *read_tensor(const safetensors *file, const char *name) {
    const st_tensor *t = safetensors_find(file, name);
    CHECK(t != NULL, "no tensor %s\n", name);
    float *values = HOST(float, t->elements);
    OK(safetensors_read_f32(file, t, 0, (size_t)t->elements, values));
    return values;
}

static clmoe_checkpoint *open_decoding(const char *directory, clmoe_decode decode) {
    clmoe_checkpoint *checkpoint = NULL;
    clmoe_checkpoint_options options;
    clmoe_checkpoint_options_init(&options);
    options.decode = decode;
    OK(clmoe_checkpoint_open(directory, &options, &checkpoint));
    return checkpoint;
}

static void release_weights(void *weights) {
    clmoe_weights_release(weights);
}

/* Uploads layer 0 and returns its weights, which are released when the test ends. */
static clmoe_weights *upload(const char *directory, clmoe_decode decode, const char *engine,
                             clmoe_layer_desc *desc) {
    clmoe_weights *weights = HOST(clmoe_weights, 1);
    clmoe_checkpoint *checkpoint = open_decoding(directory, decode);
    OK(clmoe_checkpoint_layer(checkpoint, 0, desc));
    CHECK(desc->weight_type + 1 == decode, "weight_type %u\n", desc->weight_type);
    desc->engine = engine;
    clean_later(release_weights, weights);
    OK(clmoe_checkpoint_upload(checkpoint, 0, desc, test.context, test.queue, weights));
    clmoe_checkpoint_close(checkpoint);
    return weights;
}

/* A buffer's elements as floats, and how many; NULL if there is none. */
static float *back(clmoe_buf buf, clmoe_type type, size_t *count) {
    size_t bytes = 0;
    *count = 0;
    if (buf.mem == NULL)
        return NULL;
    CL_OK(clGetMemObjectInfo(buf.mem, CL_MEM_SIZE, sizeof bytes, &bytes, NULL));
    void *elements = host_alloc(bytes, 1);
    CL_OK(clEnqueueReadBuffer(test.queue, buf.mem, CL_TRUE, 0, bytes, elements, 0, NULL, NULL));
    *count = bytes / type_size(type);
    return type_values(type, elements, *count);
}

static ref_mlp_weights mlp_back(const clmoe_mlp_weights *w) {
    size_t n;
    return (ref_mlp_weights){.gate = back(w->gate, CLMOE_F32, &n),
                             .up = back(w->up, CLMOE_F32, &n),
                             .down = back(w->down, CLMOE_F32, &n),
                             .gate_bias = back(w->gate_bias, CLMOE_F32, &n),
                             .up_bias = back(w->up_bias, CLMOE_F32, &n),
                             .down_bias = back(w->down_bias, CLMOE_F32, &n)};
}

static void check_output(size_t i, const char *engine) {
    batch b = {0};
    device_batch d = {0};
    size_t n;
    const clmoe_weights *w = upload(directory_of(i), CLMOE_DECODE_F32, engine, &b.desc);
    b.weights = (ref_weights){.router = back(w->router, CLMOE_F32, &n),
                              .router_bias = back(w->router_bias, CLMOE_F32, &n),
                              .select_bias = back(w->select_bias, CLMOE_F32, &n),
                              .experts = mlp_back(&w->experts),
                              .shared = mlp_back(&w->shared)};
    safetensors *file = open_file(i, "expected.safetensors");
    const float *y = read_tensor(file, "y");
    b.in.x = read_tensor(file, "x");
    b.in.tokens = (uint32_t)safetensors_find(file, "x")->shape[0];
    b.in.weights = &b.weights;
    safetensors_close(file);
    b.desc.balance.enabled = 1;
    batch_run(test_layer(0, &b.desc), &b, &d);
    const float *got = buf_get(d.args.y);
    double off = 0, norm = 0;
    for (size_t k = 0; k < (size_t)b.in.tokens * b.desc.dim; k++) {
        off += ((double)got[k] - (double)y[k]) * ((double)got[k] - (double)y[k]);
        norm += (double)y[k] * (double)y[k];
    }
    CHECK(sqrt(off / norm) < 1e-5, "off by %g\n", sqrt(off / norm));
}

static void outputs(void **state) {
    (void)state;
    static const char *const engines[] = {"ref", "cpu"};
    for (size_t i = 0; i < COUNT_OF(written); i++)
        for (size_t e = 0; e < COUNT_OF(engines); e++) {
            test_case("%s, %s", written[i].name, engines[e]);
            check_output(i, engines[e]);
        }
}

/* ---- Their bits ----------------------------------------------------------------------------- */

/* FNV-1a 64 of the floats' bytes must be what the writer has kept under the tensor's name. */
static void check_bits(const safetensors *expected, const char *name, const float *values,
                       size_t count) {
    char kept[256];
    unsigned char want[8];
    uint64_t hash = 0xCBF29CE484222325u;
    for (size_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        for (int byte = 0; byte < 4; byte++)
            hash = (hash ^ (bits >> 8 * byte & 255)) * 0x100000001B3u;
    }
    snprintf(kept, sizeof kept, "fnv.%s", name);
    const st_tensor *t = safetensors_find(expected, kept);
    CHECK(t != NULL, "no tensor %s\n", kept);
    OK(safetensors_read_bytes(expected, t, 0, 8, want));
    for (int byte = 0; byte < 8; byte++)
        CHECK(want[byte] == (hash >> 8 * byte & 255), "%s has other bits\n", name);
}

/* The name of a part's codes, of whichever family: those that `model` has. */
static const char *codes_name(const safetensors *model, const char *below, int part) {
    static const char *const prefixes[] = {"mlp", "block_sparse_moe"};
    static const char *const parts[][3] = {{"gate_proj", "up_proj", "down_proj"},
                                           {"w1", "w3", "w2"}};
    static const char *const ends[] = {"weight_packed", "weight"};
    static char name[256];
    for (int family = 0; family < 2; family++)
        for (int end = 0; end < 2; end++) {
            snprintf(name, sizeof name, "model.layers.0.%s.%s.%s.%s", prefixes[family], below,
                     parts[family][part], ends[end]);
            if (safetensors_find(model, name) != NULL)
                return name;
        }
    CHECK(false, "no codes of %s\n", below);
    return NULL;
}

/* Of an MLP with matrices of their own: gate and up lie together, expert by expert. */
static void check_mlp_bits(size_t i, const clmoe_mlp_weights *w, size_t experts, bool shared) {
    size_t both, down;
    const float *first = back(w->gate, CLMOE_F32, &both), *second = back(w->down, CLMOE_F32, &down);
    safetensors *model = open_file(i, "model.safetensors"),
                *expected = open_file(i, "expected.safetensors");
    const size_t one = down / experts;
    CHECK(both == 2 * down, "%zu and %zu\n", both, down);
    for (size_t e = 0; e < experts; e++) {
        char below[64];
        snprintf(below, sizeof below, shared ? "shared_experts" : "experts.%zu", e);
        check_bits(expected, codes_name(model, below, 0), first + 2 * e * one, one);
        check_bits(expected, codes_name(model, below, 1), first + (2 * e + 1) * one, one);
        check_bits(expected, codes_name(model, below, 2), second + e * one, one);
    }
    safetensors_close(model);
    safetensors_close(expected);
}

static void decoded_bits(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(written); i++) {
        clmoe_layer_desc desc;
        size_t n;
        test_case("%s", written[i].name);
        const clmoe_weights *w = upload(directory_of(i), CLMOE_DECODE_F32, "ref", &desc);
        if (strcmp(written[i].name, "mxfp4_blocks") == 0) {
            safetensors *expected = open_file(i, "expected.safetensors");
            const float *gate_up = back(w->experts.gate, CLMOE_F32, &n);
            check_bits(expected, "model.layers.0.mlp.experts.gate_up_proj_blocks", gate_up, n);
            const float *down = back(w->experts.down, CLMOE_F32, &n);
            check_bits(expected, "model.layers.0.mlp.experts.down_proj_blocks", down, n);
            safetensors_close(expected);
            continue;
        }
        check_mlp_bits(i, &w->experts, desc.num_experts, false);
        if (desc.shared.hidden_dim > 0)
            check_mlp_bits(i, &w->shared, 1, true);
    }
}

/* To f16 and bf16: the f32 values, rounded. */
static void decoded_rounded(void **state) {
    (void)state;
    const clmoe_type types[] = {CLMOE_F16, CLMOE_BF16};
    for (size_t i = 0; i < COUNT_OF(written); i++)
        for (size_t t = 0; t < COUNT_OF(types); t++) {
            clmoe_layer_desc desc;
            size_t n, count;
            test_case("%s, type %u", written[i].name, types[t]);
            const clmoe_weights *w = upload(directory_of(i), CLMOE_DECODE_F32, "ref", &desc);
            float *want = back(w->experts.down, CLMOE_F32, &n);
            w = upload(directory_of(i), types[t] + 1, "ref", &desc);
            const float *got = back(w->experts.down, types[t], &count);
            CHECK(count == n, "%zu elements, not %zu\n", count, n);
            round_all(types[t], want, n);
            compare_bits("down", got, want, n * sizeof *want);
        }
}

/* ---- Pieces and edges ----------------------------------------------------------------------- */

/* A file of codes [N,K] and e8m0 scales whose bytes count up, read from any place on. */
static const struct {
    size_t row; /* of the table of formats */
    uint64_t N, K;
    uint32_t block[2];
    uint64_t first, count;
} pieces[] = {
    {0, 600, 300, {128, 128}, 0, 180000},  {0, 600, 300, {128, 128}, 299, 90001},
    {0, 3, 70001, {128, 128}, 0, 210003},  {0, 3, 70001, {128, 128}, 65535, 70003},
    {0, 129, 257, {128, 128}, 33000, 153}, {0, 65, 33, {32, 32}, 0, 2145},
    {0, 1, 1, {128, 128}, 0, 1},           {0, 140000, 1, {1, 1}, 1, 139999},
    {5, 3, 70016, {128, 128}, 1, 210047},  {5, 700, 96, {128, 128}, 95, 67001},
    {5, 2, 32, {128, 128}, 31, 33},
};

static unsigned char byte_of(uint64_t index) {
    return (unsigned char)index;
}

/* Number [n,k] in double. */
static double number_of(size_t i, uint64_t n, uint64_t k) {
    static const double fp4[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    const bool four = pieces[i].row == 5;
    const uint64_t N = four ? 1 : pieces[i].block[0], B = four ? 32 : pieces[i].block[1];
    const uint64_t K = pieces[i].K, across = (K + B - 1) / B, per = four ? 2 : 1;
    const uint64_t codes = pieces[i].N * K / per, at = n * K + k;
    const int scale = byte_of(codes + n / N * across + k / B), byte = byte_of(at / per);
    const int code = four && at % 2 ? byte >> 4 : byte;
    double value;
    if (four)
        value = (code & 8 ? -1 : 1) * fp4[code & 7];
    else if ((code & 127) == 127)
        value = (double)NAN;
    else
        value = (code & 128 ? -1 : 1) *
                (code & 120 ? ldexp(8 + (code & 7), (code >> 3 & 15) - 10) : ldexp(code & 7, -9));
    return scale == 255 ? (double)NAN : ldexp(value, scale - 127);
}

static void in_pieces(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(pieces); i++) {
        const uint64_t N = pieces[i].N, K = pieces[i].K, first = pieces[i].first;
        const bool four = pieces[i].row == 5;
        const uint64_t B0 = four ? 1 : pieces[i].block[0], B1 = four ? 32 : pieces[i].block[1];
        const unsigned long long n = N, k = four ? K / 2 : K, down = (N + B0 - 1) / B0,
                                 across = (K + B1 - 1) / B1;
        char header[512];
        test_case("%llu x %llu from %llu", n, (unsigned long long)K, (unsigned long long)first);
        snprintf(
            header, sizeof header,
            "{\"w\":{\"dtype\":\"%s\",\"shape\":[%llu,%llu],\"data_offsets\":[0,%llu]},"
            "\"s\":{\"dtype\":\"F8_E8M0\",\"shape\":[%llu,%llu],\"data_offsets\":[%llu,%llu]}}",
            four ? "I8" : "F8_E4M3", n, k, n * k, down, across, n * k, n * k + down * across);
        write_safetensors(temp_path("pieces"), header, (size_t)(n * k + down * across));
        safetensors *file = NULL;
        OK(safetensors_open(temp_path("pieces"), &file));
        coded c = {.format = code_format_at(pieces[i].row),
                   .codes_file = file,
                   .scales_file = file,
                   .codes = safetensors_find(file, "w"),
                   .scales = safetensors_find(file, "s")};
        OK(coded_check(&c, pieces[i].block));
        const size_t count = (size_t)pieces[i].count;
        float *got = HOST(float, count);
        OK(coded_read_f32(&c, first, count, got));
        REFUSED(coded_read_f32(&c, first + 1, (size_t)(N * K - first), got), CLMOE_INVALID_ARGUMENT,
                "'w' has", "elements");
        safetensors_close(file);
        for (size_t e = 0; e < count; e++) {
            const float want = (float)number_of(i, (first + e) / K, (first + e) % K);
            CHECK(isnan(want) ? isnan(got[e]) : memcmp(&got[e], &want, sizeof want) == 0,
                  "element %zu is %g, not %g\n", e, (double)got[e], (double)want);
        }
    }
}

/* ---- What is refused ------------------------------------------------------------------------ */

#define UP        "model.layers.0.mlp.experts.0.up_proj."
#define STACK     "model.layers.0.mlp.experts."
#define Q(text)   "\"qwen3_moe\", \"quantization_config\": {" text "}"
#define FP8_BLOCK "\"quant_method\": \"fp8\", \"weight_block_size\": "

/* With decoding allowed: the model_type and more of the config, what replaces expert 0's up. */
static const struct {
    const char *config, *add;
    clmoe_status status; /* CLMOE_SUCCESS: right */
    const char *says[2];
} cases[] = {
    {"\"qwen3_moe\"", UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,1;", CLMOE_SUCCESS, {0}},
    {"\"qwen3_moe\"", UP "weight F8_E4M3 3,4;" UP "weight_scale F32 3;", CLMOE_SUCCESS, {0}},
    {"\"qwen3_moe\"", UP "weight F8_E4M3 3,4;" UP "weight_scale BF16 1;", CLMOE_SUCCESS, {0}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,1;" UP "input_scale F32 1;",
     CLMOE_SUCCESS,
     {0}},
    {Q(FP8_BLOCK "[2,2]"),
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 2,2;",
     CLMOE_SUCCESS,
     {0}},
    {Q(FP8_BLOCK "[2,2]"),
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,1;",
     CLMOE_BAD_FILE,
     {"weight_scale_inv' of FP8 has shape [1, 1], but must have [2, 2]", "2 x 2 weights"}},
    {Q(FP8_BLOCK "[0,2]"),
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,1;",
     CLMOE_BAD_FILE,
     {"quantization_config.weight_block_size must be two positive numbers", "config.json"}},
    {Q(FP8_BLOCK "[128]"),
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,1;",
     CLMOE_BAD_FILE,
     {"weight_block_size must be two positive numbers", "config.json"}},
    {Q("\"quant_method\": \"gptq\""),
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,1;",
     CLMOE_UNSUPPORTED,
     {"quant_method 'gptq', but tensor", "up_proj.weight' is FP8"}},
    {Q("\"quant_method\": \"fp8 compressed-tensors\""),
     UP "weight F8_E4M3 3,4;" UP "weight_scale F32 1;",
     CLMOE_UNSUPPORTED,
     {"quant_method 'fp8 compressed-tensors'", "is FP8"}},
    {Q("\"bits\": 4"),
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,1;",
     CLMOE_UNSUPPORTED,
     {"quant_method 'not given', but tensor", "is FP8"}},
    {Q("\"quant_method\": \"fp8\""),
     UP "weight F32 3,4;",
     CLMOE_UNSUPPORTED,
     {"quant_method 'fp8', but layer 0 has no matrices of codes", "config.json"}},
    {Q("\"quant_method\": \"fp8\", \"modules_to_not_convert\": [\"x\"]"),
     UP "weight F32 3,4;",
     CLMOE_SUCCESS,
     {0}},
    {Q("\"quant_method\": \"hqq\", \"ignore\": [\"x\"]"),
     UP "weight F32 3,4;",
     CLMOE_UNSUPPORTED,
     {"quant_method 'hqq'", "FP8 or MXFP4"}},
    {"\"qwen3_moe\", \"quantization_config\": {}, \"quantization\": {\"bits\": 4}",
     UP "weight F32 3,4;",
     CLMOE_UNSUPPORTED,
     {"quantization_config", "they differ"}},
    /* Scales: shape, dtype, missing, twice. */
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,2;",
     CLMOE_BAD_FILE,
     {"weight_scale_inv' of FP8 has shape [1, 2], but must have [1, 1]", "128 x 128"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1;",
     CLMOE_BAD_FILE,
     {"weight_scale_inv' of FP8 has shape [1], but must have [1, 1]", "128 x 128"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,4;" UP "weight_scale F32 4;",
     CLMOE_BAD_FILE,
     {"weight_scale' of FP8 has shape [4]", "or one for each row, or one for all"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,4;" UP "weight_scale F32 3,4;",
     CLMOE_BAD_FILE,
     {"weight_scale' of FP8 has shape [3, 4]", "or one for each row, or one for all"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv I32 1,1;",
     CLMOE_BAD_FILE,
     {"weight_scale_inv' has dtype I32", "one of: F32 BF16 F8_E8M0"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,4;",
     CLMOE_BAD_FILE,
     {"up_proj.weight' has dtype F8_E4M3, as FP8 weights, whose scales (....weight_scale_inv or",
      "are missing"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,4;" UP "weight_scale_inv F32 1,1;" UP "weight_scale F32 1;",
     CLMOE_BAD_FILE,
     {"has scales twice", "weight_scale_inv' and"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 12;" UP "weight_scale_inv F32 1,1;",
     CLMOE_BAD_FILE,
     {"up_proj.weight' of FP8 has shape [12], but must have [N, K]", "safetensors"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E4M3 3,5;" UP "weight_scale_inv F32 1,1;",
     CLMOE_BAD_FILE,
     {"up_proj.weight' has shape [3, 5], but must have [3, 4]", "safetensors"}},
    {"\"qwen3_moe\"",
     UP "weight F8_E5M2 3,4;" UP "weight_scale_inv F32 1,1;",
     CLMOE_UNSUPPORTED,
     {"up_proj.weight' has dtype F8_E5M2; clmoe takes", "F32"}},
    {"\"qwen3_moe\"",
     UP "weight F32 3,4;" UP "weight_scale_inv F32 1,1;",
     CLMOE_UNSUPPORTED,
     {"weight_scale_inv' means FP8 weights that are not beside it", "safetensors"}},
    {"\"qwen3_moe\"",
     UP "weight F32 3,4;" UP "weight_packed U8 3,16;" UP "weight_scale U8 3,1;",
     CLMOE_BAD_FILE,
     {"weight_packed' has the role that", "has already"}},
    /* MXFP4. */
    {"\"qwen3_moe\"",
     UP "weight_packed U8 3,16;" UP "weight_scale U8 3,2;",
     CLMOE_BAD_FILE,
     {"weight_scale' of MXFP4 has shape [3, 2], but must have [3, 1]", "1 x 32 weights"}},
    {"\"qwen3_moe\"",
     UP "weight_packed U8 3,2;" UP "weight_scale U8 3,1;",
     CLMOE_BAD_FILE,
     {"weight_packed' of MXFP4 has shape [3, 2], but must have [N, K/2]", "multiple of 32"}},
    {"\"qwen3_moe\"",
     UP "weight_packed U8 3,16;" UP "weight_scale F8_E4M3 3,1;",
     CLMOE_BAD_FILE,
     {"weight_scale' has dtype F8_E4M3", "one of: U8 F8_E8M0"}},
    {"\"qwen3_moe\"",
     UP "weight_packed I32 3,1;" UP "weight_scale BF16 3,1;",
     CLMOE_UNSUPPORTED,
     {"weight_packed' means quantised weights of another dtype", "clmoe does not have"}},
    {"\"qwen3_moe\"",
     UP "weight I8 3,16;" UP "weight_scale F32 3,1;",
     CLMOE_UNSUPPORTED,
     {"up_proj.weight' has dtype I8", "F32, F16, BF16"}},
    {"\"qwen3_moe\"",
     UP "weight F32 3,4;" STACK "down_proj_blocks U8 2,4,1,15;" STACK "down_proj_scales U8 2,4,1;",
     CLMOE_BAD_FILE,
     {"has the role that", "already"}},
    /* The router is never coded. */
    {"\"qwen3_moe\"",
     UP "weight F32 3,4;model.layers.0.mlp.router.weight F8_E4M3 2,4;"
        "model.layers.0.mlp.router.weight_scale_inv F32 1,1;",
     CLMOE_BAD_FILE,
     {"router.weight' has the role that", "already"}},
};

static clmoe_status describe_decoding(const char *directory, clmoe_decode decode) {
    clmoe_checkpoint *checkpoint = NULL;
    clmoe_layer_desc desc;
    clmoe_checkpoint_options options;
    clmoe_checkpoint_options_init(&options);
    options.decode = decode;
    clmoe_status status = clmoe_checkpoint_open(directory, &options, &checkpoint);
    if (status == CLMOE_SUCCESS)
        status = clmoe_checkpoint_layer(checkpoint, 0, &desc);
    clmoe_checkpoint_close(checkpoint);
    return status;
}

static void contradictions(void **state) {
    (void)state;
    const char *directory = write_checkpoint("codes", CONFIG, TENSORS);
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        test_case("%s with %s", cases[i].config, cases[i].add);
        char *config = replaced(CONFIG, "\"qwen3_moe\"", cases[i].config);
        write_text(temp_path("codes/config.json"), config);
        free(config);
        write_tensors(temp_path("codes/model.safetensors"), TENSORS, "experts.0.up_proj.weight",
                      cases[i].add);
        const clmoe_status status = describe_decoding(directory, CLMOE_DECODE_F32);
        if (cases[i].status == CLMOE_SUCCESS)
            OK(status);
        else
            REFUSED(status, cases[i].status, cases[i].says[0], cases[i].says[1]);
    }
}

/* Headers by hand: shapes that no file can fill, and a last dimension of blocks that is not 16. */
static const struct {
    const char *header, *says[2];
} shapes[] = {
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[2,3,4,15],\"data_offsets\":[0,360]}",
     {"'w' of MXFP4 has shape [2, 3, 4, 15], but must have [E, N, K/32, 16]", "pieces"}},
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[2,3,64],\"data_offsets\":[0,384]}",
     {"'w' of MXFP4 has shape [2, 3, 64], but must have [E, N, K/32, 16]", "pieces"}},
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[0,4611686018427387904,4611686018427387904,16],"
     "\"data_offsets\":[0,0]}",
     {"'w' of MXFP4 has shape [0, 4611686018427387904", "must have [E, N, K/32, 16]"}},
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[1,1,4294967296,16],\"data_offsets\":[0,0]}",
     {"'w': 68719476736 elements of U8 do not fill its 0 bytes", "pieces"}},
    {"{\"w\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296,4,16],\"data_offsets\":[0,0]}",
     {"its shape has more elements than fit 64 bits", "pieces"}},
};

static void wrong_shapes(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(shapes); i++) {
        const uint32_t block[2] = {128, 128};
        char header[512];
        test_case("%s", shapes[i].header);
        snprintf(header, sizeof header,
                 "%s,\"s\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[400,401]}}",
                 shapes[i].header);
        write_safetensors(temp_path("pieces"), header, 401);
        safetensors *file = NULL;
        clmoe_status status = safetensors_open(temp_path("pieces"), &file);
        if (status == CLMOE_SUCCESS) {
            coded c = {.format = code_format_at(3),
                       .codes_file = file,
                       .scales_file = file,
                       .codes = safetensors_find(file, "w"),
                       .scales = safetensors_find(file, "s")};
            status = coded_check(&c, block);
        }
        REFUSED(status, CLMOE_BAD_FILE, shapes[i].says[0], shapes[i].says[1]);
        safetensors_close(file);
    }
}

/* ---- Permission ----------------------------------------------------------------------------- */

static void only_if_allowed(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(written); i++) {
        char is[64];
        test_case("%s", written[i].name);
        snprintf(is, sizeof is, "' is %s, which", written[i].format);
        REFUSED(describe_decoding(directory_of(i), CLMOE_DECODE_NO), CLMOE_UNSUPPORTED, is,
                "model.layers.0.", "options.decode", "--decode f32, f16 or bf16");
        clmoe_checkpoint *checkpoint = open_decoding(directory_of(i), CLMOE_DECODE_BF16);
        clmoe_layer_desc desc;
        clmoe_weights weights;
        const clmoe_weights none = {0};
        assert_string_equal(clmoe_checkpoint_coded(checkpoint, 0), written[i].format);
        assert_null(clmoe_checkpoint_coded(checkpoint, 1));
        OK(clmoe_checkpoint_layer(checkpoint, 0, &desc));
        desc.weight_type = CLMOE_F16;
        REFUSED(clmoe_checkpoint_upload(checkpoint, 0, &desc, test.context, test.queue, &weights),
                CLMOE_INVALID_ARGUMENT, "desc.weight_type is f16", "decode to bf16");
        assert_memory_equal(&weights, &none, sizeof none);
        clmoe_checkpoint_close(checkpoint);
    }
    test_case("no such type");
    REFUSED(describe_decoding(directory_of(0), 4), CLMOE_INVALID_ARGUMENT, "options.decode is 4");
    assert_null(clmoe_checkpoint_coded(NULL, 0));
    test_case("a plain one");
    OK(describe_decoding(TEST_DATA "/checkpoints/mixtral", CLMOE_DECODE_BF16));
}

static int setup(void **state) {
    return files_setup(state) || support_setup(state);
}

static int teardown(void **state) {
    const int both = support_teardown(state);
    return files_teardown(state) || both;
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_code), TEST(outputs),        TEST(decoded_bits), TEST(decoded_rounded),
        TEST(in_pieces),  TEST(contradictions), TEST(wrong_shapes), TEST(only_if_allowed),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
