/* Checkpoints made by hand: every way one can be wrong, layouts told from shapes, odd places. */
#include "support_files.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* ---- Small checkpoints ---------------------------------------------------------------------- */

/* Two experts, D 4, H 3. */
#define CONFIG                                                                                     \
    "{\"model_type\": \"qwen3_moe\", \"hidden_size\": 4, \"moe_intermediate_size\": 3, "           \
    "\"num_experts\": 2, \"num_experts_per_tok\": 1, \"norm_topk_prob\": true, "                   \
    "\"hidden_act\": \"silu\", \"num_hidden_layers\": 2}"

#define ROUTER    "model.layers.0.mlp.gate.weight F32 2,4;"
#define EXPERT(n) GATE_UP(n) "model.layers.0.mlp.experts." #n ".down_proj.weight F32 4,3;"
#define GATE_UP(n)                                                                                 \
    "model.layers.0.mlp.experts." #n ".gate_proj.weight F32 3,4;"                                  \
    "model.layers.0.mlp.experts." #n ".up_proj.weight F32 3,4;"
#define TENSORS ROUTER EXPERT(0) EXPERT(1) "model.norm.weight F32 4;"
#define SHARED                                                                                     \
    "model.layers.0.mlp.shared_expert.gate_proj.weight F32 5,4;"                                   \
    "model.layers.0.mlp.shared_expert.up_proj.weight F32 5,4;"                                     \
    "model.layers.0.mlp.shared_expert.down_proj.weight F32 4,5;"

/* Appends "NAME TYPE DIMS" to a header whose data ends at *end. */
static void append_tensor(char *header, size_t size, const char *spec, size_t length, size_t *end) {
    char name[160], type[16], dims[48];
    CHECK(length < 220 && sscanf(spec, "%159s %15s %47[0-9,]", name, type, dims) == 3, "%s\n",
          spec);
    size_t bytes = strcmp(type, "U8") == 0 ? 1 : strcmp(type, "BF16") == 0 ? 2 : 4;
    for (const char *dim = dims; dim != NULL; dim = strchr(dim, ',')) {
        dim += *dim == ',';
        bytes *= strtoul(dim, NULL, 10);
    }
    size_t used = strlen(header);
    snprintf(header + used, size - used,
             "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
             used > 1 ? "," : "", name, type, dims, *end, *end + bytes);
    *end += bytes;
}

/*
 * Writes a file of the tensors "NAME TYPE DIMS;NAME TYPE DIMS;..." in `tensors`, but for those
 * whose names end in `drop`, and of those in `add`.
 */
static void write_tensors(const char *path, const char *tensors, const char *drop,
                          const char *add) {
    static char header[65536];
    size_t end = 0, dropped = strlen(drop);
    strcpy(header, "{");
    for (int part = 0; part < 2; part++)
        for (const char *at = part ? add : tensors, *next; (next = strchr(at, ';')) != NULL;
             at = next + 1) {
            size_t name = (size_t)(strchr(at, ' ') - at);
            if (part == 0 && dropped > 0 && name >= dropped &&
                strncmp(at + name - dropped, drop, dropped) == 0)
                continue;
            append_tensor(header, sizeof header, at, (size_t)(next - at), &end);
        }
    strcat(header, "}");
    write_safetensors(path, header, end);
}

static const char *write_checkpoint(const char *name, const char *config, const char *tensors) {
    char file[128];
    const char *directory = temp_directory(name);
    snprintf(file, sizeof file, "%s/config.json", name);
    write_text(temp_path(file), config);
    snprintf(file, sizeof file, "%s/model.safetensors", name);
    write_tensors(temp_path(file), tensors, "", "");
    return directory;
}

/* Opens a directory and describes layer `layer`. */
static clmoe_status describe(const char *directory, uint32_t layer, clmoe_layer_desc *desc) {
    clmoe_checkpoint *checkpoint;
    clmoe_status status = clmoe_checkpoint_open(directory, &checkpoint);
    if (status == CLMOE_SUCCESS)
        status = clmoe_checkpoint_layer(checkpoint, layer, desc);
    clmoe_checkpoint_close(checkpoint);
    return status;
}

/* ---- Bad configs ---------------------------------------------------------------------------- */

/* CONFIG with `find` replaced; all sentences also name config.json unless they are of a tensor. */
typedef struct config_case {
    const char *find, *replace;
    clmoe_status status;
    const char *says[2];
} config_case;

static const config_case config_cases[] = {
    {"\"num_experts\": 2,",
     "",
     CLMOE_BAD_FILE,
     {"num_local_experts, n_routed_experts", "config.json"}},
    {"_experts\": 2", "_experts\": 0", CLMOE_BAD_FILE, {"num_experts is 0", "config.json"}},
    {"_experts\": 2", "_experts\": -2", CLMOE_BAD_FILE, {"num_experts is -2", "config.json"}},
    {"_experts\": 2", "_experts\": 2.5", CLMOE_BAD_FILE, {"num_experts is 2.5", "config.json"}},
    {"_experts\": 2",
     "_experts\": \"two\"",
     CLMOE_BAD_FILE,
     {"num_experts is \"two\"", "config.json"}},
    {"_experts\": 2", "_experts\": {}", CLMOE_BAD_FILE, {"num_experts is {}", "config.json"}},
    {"_experts\": 2", "_experts\": true", CLMOE_BAD_FILE, {"num_experts is true", "config.json"}},
    {"_experts\": 2", "_experts\": 99999999999", CLMOE_BAD_FILE, {"99999999999", "config.json"}},
    {"_experts\": 2",
     "_experts\": 5000",
     CLMOE_UNSUPPORTED,
     {"num_experts is 5000", "at most 4096"}},
    {"_experts\": 2", "_experts\": 1", CLMOE_BAD_FILE, {"experts.1.down_proj", "num_experts is 1"}},
    {"_experts\": 2",
     "_experts\": 3",
     CLMOE_BAD_FILE,
     {"experts.2.gate_proj.weight' is missing", "bad-config"}},
    {"2, \"num_experts_per_tok\": 1",
     "300, \"num_experts_per_tok\": 257",
     CLMOE_UNSUPPORTED,
     {"num_experts_per_tok is 257", "at most 256"}},
    {"\"hidden_act\"",
     "\"moe_norm_min\": 0.5, \"hidden_act\"",
     CLMOE_UNSUPPORTED,
     {"moe_norm_min is 0.5", "config.json"}},
    {"\"hidden_act\"",
     "\"moe_apply_router_weight_on_input\": true, \"hidden_act\"",
     CLMOE_UNSUPPORTED,
     {"moe_apply_router_weight_on_input is true", "config.json"}},
    {"_tok\": 1",
     "_tok\": 3",
     CLMOE_BAD_FILE,
     {"num_experts_per_tok is 3, but num_experts is 2", "config.json"}},
    {"_tok\": 1", "_tok\": 0", CLMOE_BAD_FILE, {"num_experts_per_tok is 0", "positive"}},
    {"_tok\": 1", "_tok\": -1", CLMOE_BAD_FILE, {"num_experts_per_tok is -1", "positive"}},
    {"_tok\": 1", "_tok\": 1.5", CLMOE_BAD_FILE, {"num_experts_per_tok is 1.5", "config.json"}},
    {"_tok\": 1", "_tok\": \"1\"", CLMOE_BAD_FILE, {"num_experts_per_tok is \"1\"", "config.json"}},
    {"_tok\": 1", "_tok\": []", CLMOE_BAD_FILE, {"num_experts_per_tok has 0 entries", "layer 0"}},
    {"_tok\": 1", "_tok\": [[1]]", CLMOE_BAD_FILE, {"num_experts_per_tok is [1]", "config.json"}},
    {"qwen3_moe\"",
     "dots1\", \"x\": 1, \"num_experts_per_tok\": null, \"y\": \"\"",
     CLMOE_BAD_FILE,
     {"duplicate", "config.json"}},
    {"_size\": 4",
     "_size\": 5",
     CLMOE_BAD_FILE,
     {"gate.weight' has shape [2, 4], but hidden_size is 5", "model.safetensors"}},
    {"_size\": 4", "_size\": \"4\"", CLMOE_BAD_FILE, {"hidden_size is \"4\"", "config.json"}},
    {"_size\": 3",
     "_size\": 7",
     CLMOE_BAD_FILE,
     {"has shape [3, 4], but moe_intermediate_size is 7", "model.safetensors"}},
    {"_size\": 3",
     "_size\": [7, 3]",
     CLMOE_BAD_FILE,
     {"has shape [3, 4], but moe_intermediate_size is 7", "model.safetensors"}},
    {"\"silu\"", "\"xielu\"", CLMOE_UNSUPPORTED, {"hidden_act is 'xielu'", "config.json"}},
    {"\"silu\"", "5", CLMOE_BAD_FILE, {"hidden_act is 5", "config.json"}},
    {"prob\": true", "prob\": 1", CLMOE_BAD_FILE, {"norm_topk_prob is 1", "true or false"}},
    {"\"silu\"",
     "\"silu\", \"scoring_func\": \"sigmoid\"",
     CLMOE_UNSUPPORTED,
     {"scoring_func is 'sigmoid'", "qwen3_moe"}},
    {"\"silu\"",
     "\"silu\", \"moe_latent_size\": 16",
     CLMOE_UNSUPPORTED,
     {"moe_latent_size is 16", "latent"}},
    {"\"silu\"",
     "\"silu\", \"moe_router_logit_softcapping\": -1",
     CLMOE_BAD_FILE,
     {"moe_router_logit_softcapping is -1", "config.json"}},
    {"qwen3_moe",
     "qwen2_moe\", \"shared_expert_intermediate_size\": 5, \"x\": \"",
     CLMOE_BAD_FILE,
     {"shared_experts.up_proj.weight", "missing"}},
    {"qwen3_moe", "glm4_moe", CLMOE_BAD_FILE, {"e_score_correction_bias", "missing"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": 3, \"topk_group\": 1, \"x\": \"",
     CLMOE_BAD_FILE,
     {"n_group is 3", "2 experts"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": 2, \"topk_group\": 3, \"x\": \"",
     CLMOE_BAD_FILE,
     {"topk_group is 3", "at most 2"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": 2, \"topk_group\": 0, \"x\": \"",
     CLMOE_BAD_FILE,
     {"topk_group is 0", "config.json"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": -1, \"x\": \"",
     CLMOE_BAD_FILE,
     {"n_group is -1", "config.json"}},
    {"qwen3_moe",
     "deepseek_v2\", \"topk_method\": \"best\", \"x\": \"",
     CLMOE_UNSUPPORTED,
     {"topk_method is 'best'", "config.json"}},
    {"qwen3_moe",
     "deepseek_v2\", \"routed_scaling_factor\": \"2\", \"x\": \"",
     CLMOE_BAD_FILE,
     {"routed_scaling_factor is \"2\"", "config.json"}},
    {"qwen3_moe", "gemma4_text", CLMOE_UNSUPPORTED, {"gemma4_text", "router"}},
    {"qwen3_moe", "switch_transformers", CLMOE_UNSUPPORTED, {"switch_transformers", "encoder"}},
    {"qwen3_moe\", \"hidden",
     "mystery\", \"swiglu_limit\": 7, \"hidden",
     CLMOE_UNSUPPORTED,
     {"swiglu_limit is 7", "mystery"}},
    {"{", "", CLMOE_BAD_FILE, {"not JSON", "config.json"}},
    {CONFIG, "[]", CLMOE_BAD_FILE, {"not a JSON object", "config.json"}},
    {CONFIG, "", CLMOE_BAD_FILE, {"not JSON", "config.json"}},
};

/* `text` with its first `find` replaced; to be freed. */
static char *replaced(const char *text, const char *find, const char *replace) {
    const char *at = strstr(text, find);
    CHECK(at != NULL, "no %s\n", find);
    size_t before = (size_t)(at - text), size = strlen(text) + strlen(replace) + 1;
    char *result = malloc(size);
    assert_non_null(result);
    snprintf(result, size, "%.*s%s%s", (int)before, text, replace, at + strlen(find));
    return result;
}

static void test_bad_configs(void **state) {
    (void)state;
    const char *directory = write_checkpoint("bad-config", CONFIG, TENSORS);
    clmoe_layer_desc desc;
    OK(describe(directory, 0, &desc));
    for (size_t i = 0; i < sizeof config_cases / sizeof config_cases[0]; i++) {
        const config_case *c = &config_cases[i];
        test_case("%s -> %s", c->find, c->replace);
        char *config = replaced(CONFIG, c->find, c->replace);
        write_text(temp_path("bad-config/config.json"), config);
        free(config);
        REFUSED(describe(directory, 0, &desc), c->status, c->says[0], c->says[1]);
    }
}

static void test_unknown_model_type(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    char *known = replaced(CONFIG, "qwen3_moe", "mystery");
    const char *directory = write_checkpoint("mystery", known, TENSORS);
    OK(describe(directory, 0, &desc));
    assert_int_equal(desc.router.renorm, CLMOE_RENORM_SUM);
    assert_int_equal(desc.router.score, CLMOE_SCORE_SOFTMAX);
    char *unclear = replaced(known, "\"norm_topk_prob\": true,", "");
    write_text(temp_path("mystery/config.json"), unclear);
    REFUSED(describe(directory, 0, &desc), CLMOE_UNSUPPORTED, "mystery", "norm_topk_prob",
            "config.json");
    free(unclear);
    char *sigmoid = replaced(known, "\"silu\"", "\"silu\", \"scoring_func\": \"sigmoid\"");
    write_text(temp_path("mystery/config.json"), sigmoid);
    OK(describe(directory, 0, &desc));
    assert_int_equal(desc.router.score, CLMOE_SCORE_SIGMOID);
    free(sigmoid);
    /* A selection bias makes it one like DeepSeek-V3. */
    write_text(temp_path("mystery/config.json"), known);
    write_tensors(temp_path("mystery/model.safetensors"), TENSORS, "",
                  "model.layers.0.mlp.gate.e_score_correction_bias F32 2;");
    OK(describe(directory, 0, &desc));
    assert_int_equal(desc.router.score, CLMOE_SCORE_SIGMOID);
    assert_int_equal(desc.router.select_bias, 1);
    free(known);
}

static void test_deep_config(void **state) {
    (void)state;
    enum { DEPTH = 100000 };
    const char *directory = write_checkpoint("deep", CONFIG, TENSORS);
    clmoe_layer_desc desc;
    char *text = malloc(DEPTH + 1);
    assert_non_null(text);
    memset(text, '[', DEPTH);
    text[DEPTH] = '\0';
    write_text(temp_path("deep/config.json"), text);
    REFUSED(describe(directory, 0, &desc), CLMOE_BAD_FILE, "config.json", "depth");
    free(text);
}

/* ---- Bad tensors ---------------------------------------------------------------------------- */

static const struct {
    const char *drop, *add;
    clmoe_status status;
    const char *says[2];
} tensor_cases[] = {
    {"gate.weight", "", CLMOE_BAD_FILE, {"model.layers.0.mlp.gate.weight", "missing"}},
    {"experts.0.up_proj.weight",
     "",
     CLMOE_BAD_FILE,
     {"'model.layers.0.mlp.experts.0.up_proj.weight' is missing", "bad-tensors"}},
    {"experts.1.down_proj.weight",
     "",
     CLMOE_BAD_FILE,
     {"'model.layers.0.mlp.experts.1.down_proj.weight' is missing", "bad-tensors"}},
    {".down_proj.weight", "", CLMOE_BAD_FILE, {"down_proj.weight", "missing"}},
    {".up_proj.weight", "", CLMOE_BAD_FILE, {"up_proj.weight", "missing"}},
    {".weight", ROUTER, CLMOE_BAD_FILE, {"layer 0 has no MoE block", "qwen3_moe"}},
    {"gate.weight",
     "model.layers.0.mlp.gate.weight F32 3,4;",
     CLMOE_BAD_FILE,
     {"has shape [3, 4], but must have [2, 4]", "gate.weight"}},
    {"gate.weight",
     "model.layers.0.mlp.gate.weight F32 8;",
     CLMOE_BAD_FILE,
     {"has shape [8], but hidden_size is 4", "gate.weight"}},
    {"gate.weight",
     "model.layers.0.mlp.gate.weight I32 2,4;",
     CLMOE_UNSUPPORTED,
     {"gate.weight", "I32"}},
    {"experts.1.up_proj.weight",
     "model.layers.0.mlp.experts.1.up_proj.weight F32 4,3;",
     CLMOE_BAD_FILE,
     {"experts.1.up_proj.weight' has shape [4, 3], but must have [3, 4]", "model.safetensors"}},
    {"experts.0.down_proj.weight",
     "model.layers.0.mlp.experts.0.down_proj.weight F32 4,3,1;",
     CLMOE_BAD_FILE,
     {"experts.0.down_proj.weight' has shape [4, 3, 1]", "model.safetensors"}},
    {"experts.0.up_proj.weight",
     "model.layers.0.mlp.experts.0.up_proj.weight F32 0,4;",
     CLMOE_BAD_FILE,
     {"experts.0.up_proj.weight' has shape [0, 4]", "model.safetensors"}},
    {".up_proj.weight",
     "model.layers.0.mlp.experts.up_proj F32 2,3,4;",
     CLMOE_BAD_FILE,
     {"gate and up matrices of different forms", "bad-tensors"}},
    {"",
     "model.layers.0.mlp.experts.0.up_proj.bias F32 3;model.layers.0.mlp.experts.1.up_proj.bias F32 "
     "3;",
     CLMOE_BAD_FILE,
     {"gate_proj.bias', or one that does its work, is missing", "bad-tensors"}},
    {"",
     "model.layers.0.mlp.extra.weight F32 4;",
     CLMOE_BAD_FILE,
     {"extra.weight' is under the MoE block", "no use"}},
    {"",
     "model.layers.0.mlp.experts.0.extra F32 4;",
     CLMOE_BAD_FILE,
     {"experts.0.extra", "no use"}},
    {"",
     "model.layers.0.mlp.experts.2.up_proj.weight F32 3,4;",
     CLMOE_BAD_FILE,
     {"experts.2.up_proj.weight' is of expert 2", "num_experts is 2"}},
    {"",
     "model.layers.0.mlp.experts.4294967296.up_proj.weight F32 3,4;",
     CLMOE_BAD_FILE,
     {"experts.4294967296", "no use"}},
    {"",
     "model.layers.0.mlp.experts.-1.up_proj.weight F32 3,4;",
     CLMOE_BAD_FILE,
     {"experts.-1", "no use"}},
    {"",
     "model.layers.0.mlp.experts.00.up_proj.weight F32 3,4;",
     CLMOE_BAD_FILE,
     {"experts.00.up_proj", "no use"}},
    {"", "model.layers.0.mlp.router.weight F32 2,4;", CLMOE_BAD_FILE, {"router.weight", "already"}},
    {"",
     "model.layers.0.mlp.experts.gate_up_proj F32 2,6,4;",
     CLMOE_BAD_FILE,
     {"fused and separate", "model.layers.0.mlp."}},
    {"",
     "model.layers.0.mlp.experts.0.up_proj.bias F32 3;",
     CLMOE_BAD_FILE,
     {"experts.1.up_proj.bias", "missing"}},
    {"",
     "model.layers.0.mlp.experts.gate_up_proj_blocks U8 2,4;",
     CLMOE_UNSUPPORTED,
     {"gate_up_proj_blocks", "MXFP4"}},
    {"",
     "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv F32 1,1;",
     CLMOE_UNSUPPORTED,
     {"weight_scale_inv", "FP8"}},
    {"",
     "model.layers.0.mlp.gate.tid2eid I32 9,1;",
     CLMOE_UNSUPPORTED,
     {"tid2eid", "hash routing"}},
    {"",
     "model.layers.0.mlp.gate.e_score_correction_bias F32 3;",
     CLMOE_BAD_FILE,
     {"e_score_correction_bias' has shape [3], but must have [2]", "model.safetensors"}},
    {"",
     "model.layers.0.mlp.shared_expert_gate.weight F32 1,4;",
     CLMOE_BAD_FILE,
     {"shared", "missing"}},
    {"",
     "model.layers.0.mlp.shared_expert.up_proj.weight F32 3,4;",
     CLMOE_BAD_FILE,
     {"shared", "missing"}},
    {"", SHARED, CLMOE_BAD_FILE, {"n_shared_experts is 0", "5 rows"}},
    {"",
     "decoder.layers.0.mlp.experts.0.up_proj.weight F32 3,4;",
     CLMOE_UNSUPPORTED,
     {"two MoE blocks", "decoder.layers.0.mlp."}},
};

static void test_bad_tensors(void **state) {
    (void)state;
    const char *directory = write_checkpoint("bad-tensors", CONFIG, TENSORS);
    clmoe_layer_desc desc;
    for (size_t i = 0; i < sizeof tensor_cases / sizeof tensor_cases[0]; i++) {
        test_case("without %s, with %s", tensor_cases[i].drop, tensor_cases[i].add);
        write_tensors(temp_path("bad-tensors/model.safetensors"), TENSORS, tensor_cases[i].drop,
                      tensor_cases[i].add);
        REFUSED(describe(directory, 0, &desc), tensor_cases[i].status, tensor_cases[i].says[0],
                tensor_cases[i].says[1]);
    }
}

/* ---- Bad directories ------------------------------------------------------------------------ */

static void test_bad_directories(void **state) {
    (void)state;
    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc;
    REFUSED(clmoe_checkpoint_open(temp_path("nowhere"), &checkpoint), CLMOE_IO,
            "nowhere/config.json", "No such");
    assert_null(checkpoint);
    const char *directory = write_checkpoint("bare", CONFIG, TENSORS);
    assert_int_equal(unlink(temp_path("bare/model.safetensors")), 0);
    REFUSED(clmoe_checkpoint_open(directory, &checkpoint), CLMOE_IO, "bare", "model.safetensors");
    write_text(temp_path("bare/model.safetensors"), "");
    REFUSED(clmoe_checkpoint_open(directory, &checkpoint), CLMOE_BAD_FILE, "bare/model.safetensors",
            "0 bytes");
    temp_directory("bare2");
    assert_int_equal(mkfifo(temp_path("bare2/config.json"), 0666), 0);
    REFUSED(clmoe_checkpoint_open(temp_path("bare2"), &checkpoint), CLMOE_IO, "config.json",
            "not a regular file");
    REFUSED(clmoe_checkpoint_open(NULL, &checkpoint), CLMOE_INVALID_ARGUMENT, "directory");
    REFUSED(clmoe_checkpoint_open(directory, NULL), CLMOE_INVALID_ARGUMENT, "out");
    REFUSED(clmoe_checkpoint_layer(NULL, 0, &desc), CLMOE_INVALID_ARGUMENT, "checkpoint");
    clmoe_checkpoint_close(NULL);
    assert_string_equal(clmoe_checkpoint_model_type(NULL), "");
}

#define INDEX(tensor, file) "{\"weight_map\": {\"" tensor "\": \"" file "\"}}"

static const struct {
    const char *index;
    clmoe_status status;
    const char *says[2];
} index_cases[] = {
    {"", CLMOE_BAD_FILE, {"not JSON", "model.safetensors.index.json"}},
    {"[]", CLMOE_BAD_FILE, {"not a JSON object", "model.safetensors.index.json"}},
    {"{\"weight_map\": []}", CLMOE_BAD_FILE, {"no weight_map", "model.safetensors.index.json"}},
    {"{\"weight_map\": {}}", CLMOE_BAD_FILE, {"no weight_map", "model.safetensors.index.json"}},
    {"{\"weight_map\": {\"x\": 1}}", CLMOE_BAD_FILE, {"'x'", "not a plain name"}},
    {INDEX("x", ""), CLMOE_BAD_FILE, {"'x'", "not a plain name"}},
    {INDEX("x", "../a.safetensors"), CLMOE_BAD_FILE, {"../a.safetensors", "not a plain name"}},
    {INDEX("x", "/etc/passwd"), CLMOE_BAD_FILE, {"/etc/passwd", "not a plain name"}},
    {INDEX("x", "a/b.safetensors"), CLMOE_BAD_FILE, {"a/b.safetensors", "not a plain name"}},
    {INDEX("x", ".."), CLMOE_BAD_FILE, {"'..'", "not a plain name"}},
    {INDEX("x", "none.safetensors"), CLMOE_IO, {"none.safetensors", "No such"}},
    {INDEX("x", "a.safetensors"),
     CLMOE_BAD_FILE,
     {"a.safetensors: tensor 'x' is missing", "index.json"}},
    {"{\"weight_map\": {\"model.norm.weight\": \"a.safetensors\", \"model.norm.weight\": 1}}",
     CLMOE_BAD_FILE,
     {"duplicate", "model.safetensors.index.json"}},
    {"{\"weight_map\": {\"model.norm.weight\": \"a.safetensors\", \"y\": \"b.safetensors\"}}",
     CLMOE_BAD_FILE,
     {"'model.norm.weight' is in both", "b.safetensors"}},
};

static void test_bad_indexes(void **state) {
    (void)state;
    clmoe_checkpoint *checkpoint;
    const char *directory = temp_directory("sharded");
    write_text(temp_path("sharded/config.json"), CONFIG);
    write_tensors(temp_path("sharded/a.safetensors"), TENSORS, "", "");
    write_tensors(temp_path("sharded/b.safetensors"), "model.norm.weight F32 4;y F32 1;", "", "");
    for (size_t i = 0; i < sizeof index_cases / sizeof index_cases[0]; i++) {
        test_case("index %s", index_cases[i].index);
        write_text(temp_path("sharded/model.safetensors.index.json"), index_cases[i].index);
        REFUSED(clmoe_checkpoint_open(directory, &checkpoint), index_cases[i].status,
                index_cases[i].says[0], index_cases[i].says[1]);
    }
    clmoe_layer_desc desc;
    write_text(temp_path("sharded/model.safetensors.index.json"),
               INDEX("model.norm.weight", "a.safetensors"));
    OK(describe(directory, 0, &desc));
}

/* ---- Layouts and places --------------------------------------------------------------------- */

#define TEXT_CONFIG(type, dim, hidden)                                                             \
    "{\"model_type\": \"outer\", \"hidden_size\": 9, \"text_config\": {\"model_type\": \"" type    \
    "\", \"hidden_size\": " #dim ", \"moe_intermediate_size\": " #hidden                           \
    ", \"num_experts\": 2, \"num_experts_per_tok\": 1}}"

static const struct {
    const char *config, *tensors;
    clmoe_gate_layout layout;
    uint32_t dim, hidden, gate_up_transposed, down_transposed;
} layout_cases[] = {
    {TEXT_CONFIG("qwen3_vl_moe_text", 4, 3),
     "language_model.layers.0.mlp.gate.weight BF16 2,4;"
     "language_model.layers.0.mlp.experts.gate_up_proj BF16 2,6,4;"
     "language_model.layers.0.mlp.experts.down_proj BF16 2,4,3;",
     CLMOE_GATE_CONCAT, 4, 3, 0, 0},
    {TEXT_CONFIG("qwen3_vl_moe_text", 4, 3),
     "layers.0.mlp.gate.weight F32 2,4;layers.0.mlp.experts.gate_up_proj F32 2,4,6;"
     "layers.0.mlp.experts.down_proj F32 2,3,4;",
     CLMOE_GATE_CONCAT, 4, 3, 1, 1},
    /* 2H = D: down tells. */
    {TEXT_CONFIG("qwen3_vl_moe_text", 4, 2),
     "layers.0.mlp.gate.weight F32 2,4;layers.0.mlp.experts.gate_up_proj F32 2,4,4;"
     "layers.0.mlp.experts.down_proj F32 2,4,2;",
     CLMOE_GATE_CONCAT, 4, 2, 0, 0},
    {TEXT_CONFIG("qwen3_vl_moe_text", 4, 2),
     "layers.0.mlp.gate.weight F32 2,4;layers.0.mlp.experts.gate_up_proj F32 2,4,4;"
     "layers.0.mlp.experts.down_proj F32 2,2,4;",
     CLMOE_GATE_CONCAT, 4, 2, 1, 1},
    /* H = D: gate_up tells. */
    {TEXT_CONFIG("qwen3_vl_moe_text", 4, 4),
     "layers.0.mlp.gate.weight F32 2,4;layers.0.mlp.experts.gate_up_proj F32 2,8,4;"
     "layers.0.mlp.experts.down_proj F32 2,4,4;",
     CLMOE_GATE_CONCAT, 4, 4, 0, 0},
    {TEXT_CONFIG("qwen3_vl_moe_text", 4, 4),
     "layers.0.mlp.gate.weight F32 2,4;layers.0.mlp.experts.gate_up_proj F32 2,4,8;"
     "layers.0.mlp.experts.down_proj F32 2,4,4;",
     CLMOE_GATE_CONCAT, 4, 4, 1, 1},
    /* DBRX: flat, down exchanged. */
    {"{\"model_type\": \"dbrx\", \"d_model\": 4, \"ffn_config\": {\"ffn_hidden_size\": 3, "
     "\"moe_num_experts\": 2, \"moe_top_k\": 2, \"ffn_act_fn\": {\"name\": \"gelu\"}}}",
     "transformer.blocks.0.ffn.router.layer.weight F32 2,4;"
     "transformer.blocks.0.ffn.experts.mlp.w1 F32 6,4;"
     "transformer.blocks.0.ffn.experts.mlp.v1 F32 6,4;"
     "transformer.blocks.0.ffn.experts.mlp.w2 F32 6,4;",
     CLMOE_GATE_SEPARATE, 4, 3, 0, 1},
    /* Nemotron-H: no gate. */
    {TEXT_CONFIG("nemotron_h", 4, 3),
     "backbone.layers.0.mixer.gate.weight F32 2,4;"
     "backbone.layers.0.mixer.gate.e_score_correction_bias F32 2;"
     "backbone.layers.0.mixer.experts.0.up_proj.weight F32 3,4;"
     "backbone.layers.0.mixer.experts.0.down_proj.weight F32 4,3;"
     "backbone.layers.0.mixer.experts.1.up_proj.weight F32 3,4;"
     "backbone.layers.0.mixer.experts.1.down_proj.weight F32 4,3;",
     CLMOE_GATE_NONE, 4, 3, 0, 0},
};

static void test_layouts(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof layout_cases / sizeof layout_cases[0]; i++) {
        test_case("layout %zu", i);
        clmoe_layer_desc desc;
        OK(describe(write_checkpoint("layout", layout_cases[i].config, layout_cases[i].tensors), 0,
                    &desc));
        assert_int_equal(desc.dim, layout_cases[i].dim);
        assert_int_equal(desc.experts.hidden_dim, layout_cases[i].hidden);
        assert_int_equal(desc.experts.gate_layout, layout_cases[i].layout);
        assert_int_equal(desc.experts.gate_up_transposed, layout_cases[i].gate_up_transposed);
        assert_int_equal(desc.experts.down_transposed, layout_cases[i].down_transposed);
    }
}

/* `count` bytes of data of the file from `from` on, as write_safetensors() makes them. */
static void compare_upload(const char *what, clmoe_buf buf, size_t from, size_t count) {
    unsigned char got[256], want[256];
    buf_read(buf, got, count);
    for (size_t i = 0; i < count; i++)
        want[i] = (unsigned char)(from + i);
    compare_bits(what, got, want, count);
}

/* Gate and up in buffers of their own, and up without a gate. */
static void test_layout_uploads(void **state) {
    (void)state;
    const size_t router = 32, stack = 96, matrix = 48;
    for (size_t i = 0; i < sizeof layout_cases / sizeof layout_cases[0]; i++) {
        clmoe_gate_layout layout = layout_cases[i].layout;
        if (layout != CLMOE_GATE_SEPARATE && layout != CLMOE_GATE_NONE)
            continue;
        clmoe_checkpoint *checkpoint;
        clmoe_layer_desc desc;
        clmoe_weights w;
        test_case("layout %zu", i);
        OK(clmoe_checkpoint_open(
            write_checkpoint("uploads", layout_cases[i].config, layout_cases[i].tensors),
            &checkpoint));
        OK(clmoe_checkpoint_layer(checkpoint, 0, &desc));
        desc.weight_type = CLMOE_F32;
        OK(clmoe_checkpoint_upload(checkpoint, 0, &desc, test.context, test.queue, &w));
        compare_upload("router", w.router, 0, router);
        if (layout == CLMOE_GATE_SEPARATE) {
            compare_upload("gate", w.experts.gate, router, stack);
            compare_upload("up", w.experts.up, router + stack, stack);
            compare_upload("down", w.experts.down, router + 2 * stack, stack);
        } else {
            size_t expert = router + 8; /* behind the selection bias: up, down, up, down */
            clmoe_buf second_up = {w.experts.up.mem, w.experts.up.offset + matrix};
            clmoe_buf second_down = {w.experts.down.mem, w.experts.down.offset + matrix};
            assert_null(w.experts.gate.mem);
            compare_upload("select_bias", w.select_bias, router, 8);
            compare_upload("up", w.experts.up, expert, matrix);
            compare_upload("down", w.experts.down, expert + matrix, matrix);
            compare_upload("up of expert 1", second_up, expert + 2 * matrix, matrix);
            compare_upload("down of expert 1", second_down, expert + 3 * matrix, matrix);
        }
        clmoe_weights_release(&w);
        clmoe_checkpoint_close(checkpoint);
    }
}

/* DBRX names the p of its norm: 1 if it says nothing, none for null. Harmless values of fields. */
static void test_norms(void **state) {
    (void)state;
    static const char *const norms[] = {"", "\"moe_normalize_expert_weights\": 1, ",
                                        "\"moe_apply_router_weight_on_input\": false, ",
                                        "\"moe_normalize_expert_weights\": 2.0, ",
                                        "\"moe_normalize_expert_weights\": null, "};
    const clmoe_renorm want[] = {CLMOE_RENORM_SUM, CLMOE_RENORM_SUM, CLMOE_RENORM_SUM,
                                 CLMOE_RENORM_PNORM, CLMOE_RENORM_NONE};
    for (size_t i = 0; i < sizeof norms / sizeof norms[0]; i++) {
        clmoe_layer_desc desc;
        char text[128];
        test_case("DBRX with %s", norms[i]);
        snprintf(text, sizeof text, "%s\"ffn_hidden_size\"", norms[i]);
        char *config = replaced(layout_cases[6].config, "\"ffn_hidden_size\"", text);
        OK(describe(write_checkpoint("norms", config, layout_cases[6].tensors), 0, &desc));
        free(config);
        assert_int_equal(desc.router.renorm, want[i]);
        assert_true(desc.router.renorm_p == (want[i] == CLMOE_RENORM_PNORM ? 2.0f : 1.0f));
    }
}

/* What lies beside the block, and in other stacks of layers, is not of the block. */
static void test_places(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    const char *directory = write_checkpoint(
        "places", CONFIG,
        TENSORS "model.layers.0.mlps.0.up_proj.weight F32 3,4;"
                "model.layers.0.shared_mlp.input_linear.weight F32 6,4;"
                "model.layers.0.self_attention.experts.input_linear.weight F32 2,6,4;"
                "model.layers.0.self_attention.experts.router.layer.weight F32 2,4;"
                "mtp.layers.0.mlp.experts.0.up_proj.weight F32 3,4;"
                "talker.model.layers.0.mlp.experts.0.up_proj.weight F32 3,4;"
                "model.layers.1.mlp.up_proj.weight F32 3,4;"
                "model.layers.10.mlp.experts.0.up_proj.weight F32 3,4;");
    OK(describe(directory, 0, &desc));
    assert_int_equal(desc.shared.hidden_dim, 0);
    REFUSED(describe(directory, 1, &desc), CLMOE_BAD_FILE, "layer 1 has no MoE block");
    REFUSED(describe(directory, 2, &desc), CLMOE_BAD_FILE, "layer 2 has no MoE block",
            "num_hidden_layers is 2");
    REFUSED(describe(directory, 10, &desc), CLMOE_BAD_FILE, "model.layers.10.mlp");
}

/* ---- Uploads that fail ---------------------------------------------------------------------- */

static void test_bad_uploads(void **state) {
    (void)state;
    const char *directory = write_checkpoint("upload", CONFIG, TENSORS);
    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc, other;
    clmoe_weights weights;
    const clmoe_weights none = {0};
    OK(clmoe_checkpoint_open(directory, &checkpoint));
    OK(clmoe_checkpoint_layer(checkpoint, 0, &desc));
    other = desc;
    other.experts.hidden_dim = 4;
    REFUSED(clmoe_checkpoint_upload(checkpoint, 0, &other, test.context, test.queue, &weights),
            CLMOE_INVALID_ARGUMENT, "experts.hidden_dim is 4", "3");
    REFUSED(clmoe_checkpoint_upload(checkpoint, 1, &desc, test.context, test.queue, &weights),
            CLMOE_BAD_FILE, "layer 1");
    REFUSED(clmoe_checkpoint_upload(checkpoint, 0, NULL, test.context, test.queue, &weights),
            CLMOE_INVALID_ARGUMENT, "desc");
    /* The tensors at the end of the file are gone once some buffers are there. */
    struct stat info;
    assert_int_equal(stat(temp_path("upload/model.safetensors"), &info), 0);
    assert_int_equal(truncate(temp_path("upload/model.safetensors"), info.st_size - 40), 0);
    memset(&weights, 1, sizeof weights);
    REFUSED(clmoe_checkpoint_upload(checkpoint, 0, &desc, test.context, test.queue, &weights),
            CLMOE_BAD_FILE, "upload/model.safetensors", "when it was opened");
    assert_memory_equal(&weights, &none, sizeof none);
    clmoe_checkpoint_close(checkpoint);
}

static int setup(void **state) {
    return files_setup(state) || support_setup(state);
}

static int teardown(void **state) {
    return files_teardown(state) | support_teardown(state);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_bad_configs),     TEST(test_unknown_model_type),
        TEST(test_deep_config),     TEST(test_bad_tensors),
        TEST(test_bad_directories), TEST(test_bad_indexes),
        TEST(test_layouts),         TEST(test_places),
        TEST(test_layout_uploads),  TEST(test_norms),
        TEST(test_bad_uploads),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
