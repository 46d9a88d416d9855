/* Checkpoints made by hand: every way one can be wrong, layouts told from shapes, odd places. */
#include "support_checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

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
     CLMOE_BAD_FILE,
     {"gate_up_proj_blocks' has dtype U8, as MXFP4 weights", "(..._scales) are missing"}},
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
     {"shared_expert_gate.weight' has no use", "qwen3_moe"}},
    {"",
     "model.layers.0.mlp.shared_expert.up_proj.weight F32 3,4;",
     CLMOE_BAD_FILE,
     {"shared_expert.up_proj.weight' has no use", "no shared expert"}},
    {"", SHARED, CLMOE_BAD_FILE, {"shared_expert.gate_proj.weight' has no use", "qwen3_moe"}},
    {"",
     "model.layers.0.mlp.router.bias F32 2;",
     CLMOE_BAD_FILE,
     {"router.bias' has no use", "qwen3_moe"}},
    {"", "model.layers.0.mlp.bias F32 4;", CLMOE_BAD_FILE, {"mlp.bias' has no use", "qwen3_moe"}},
    {"",
     "model.layers.0.mlp.gate.e_score_correction_bias F32 2;",
     CLMOE_BAD_FILE,
     {"e_score_correction_bias' has no use", "qwen3_moe"}},
    {"",
     "model.layers.0.mlp.experts.0.up_proj.bias F32 3;model.layers.0.mlp.experts.0.gate_proj.bias "
     "F32 3;model.layers.0.mlp.experts.1.up_proj.bias F32 3;model.layers.0.mlp.experts.1.gate_proj."
     "bias F32 3;model.layers.0.mlp.experts.0.down_proj.bias F32 4;"
     "model.layers.0.mlp.experts.1.down_proj.bias F32 4;",
     CLMOE_BAD_FILE,
     {"gate_proj.bias' has no use", "qwen3_moe"}},
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

/* ---- Shared experts -------------------------------------------------------------------------- */

#define SHARED_GATE "model.layers.0.mlp.shared_expert_gate.weight F32 1,4;"
#define SHARED_BIASES                                                                              \
    "model.layers.0.mlp.shared_expert.gate_proj.bias F32 5;"                                       \
    "model.layers.0.mlp.shared_expert.up_proj.bias F32 5;"                                         \
    "model.layers.0.mlp.shared_expert.down_proj.bias F32 4;"

/* What stands in the config for "qwen3_moe", and the tensors besides TENSORS; no text: right. */
static const struct {
    const char *replace, *add, *says;
} shared_cases[] = {
    {"qwen2_moe\", \"shared_expert_intermediate_size\": 5, \"x\": \"", SHARED SHARED_GATE, NULL},
    {"qwen2_moe", SHARED SHARED_GATE, NULL},
    {"hunyuan_v1_moe", SHARED, NULL},
    {"qwen2_moe\", \"shared_expert_intermediate_size\": 0, \"x\": \"", "", NULL},
    {"hunyuan_v1_moe\", \"num_shared_expert\": null, \"x\": \"", "", NULL},
    {"hunyuan_v1_moe\", \"mlp_bias\": true, \"x\": \"", SHARED SHARED_BIASES, NULL},
    {"qwen2_moe\", \"shared_expert_intermediate_size\": 0, \"x\": \"", SHARED SHARED_GATE,
     "shared_expert_intermediate_size gives no shared expert"},
    {"qwen2_moe\", \"shared_expert_intermediate_size\": 6, \"x\": \"", SHARED SHARED_GATE,
     "shared_expert_intermediate_size is 6"},
    {"qwen2_moe", SHARED, "shared_expert_gate.weight', or one that does its work, is missing"},
    {"hunyuan_v1_moe\", \"num_shared_expert\": 0, \"x\": \"", SHARED,
     "num_shared_expert gives no shared expert"},
    {"hunyuan_v1_moe\", \"num_shared_expert\": null, \"x\": \"", SHARED,
     "num_shared_expert gives no shared expert"},
    {"hunyuan_v1_moe\", \"num_shared_expert\": 1, \"x\": \"", SHARED, "num_shared_expert is 1"},
    {"hunyuan_v1_moe", SHARED SHARED_GATE, "shared_expert_gate.weight' has no use"},
    {"hunyuan_v1_moe", SHARED SHARED_BIASES, "gate_proj.bias' has no use"},
    {"qwen3_moe\", \"n_shared_experts\": 1, \"x\": \"", "", "n_shared_experts is 1"},
    {"mixtral", SHARED, "gate_proj.weight' has no use"},
    {"olmoe", SHARED, "gate_proj.weight' has no use"},
};

/* A shared expert is there if family, config and tensors all say so; else the file is refused. */
static void test_shared_experts(void **state) {
    (void)state;
    const char *directory = write_checkpoint("shared", CONFIG, TENSORS);
    for (size_t i = 0; i < sizeof shared_cases / sizeof shared_cases[0]; i++) {
        clmoe_layer_desc desc;
        test_case("%s with %s", shared_cases[i].replace, shared_cases[i].add);
        char *config = replaced(CONFIG, "qwen3_moe", shared_cases[i].replace);
        write_text(temp_path("shared/config.json"), config);
        write_tensors(temp_path("shared/model.safetensors"), TENSORS, "", shared_cases[i].add);
        clmoe_status status = describe(directory, 0, &desc);
        if (shared_cases[i].says == NULL)
            OK(status);
        else
            CHECK(status != CLMOE_SUCCESS && strstr(clmoe_last_error(), shared_cases[i].says),
                  "%d %s\n", (int)status, clmoe_last_error());
        if (status == CLMOE_SUCCESS)
            assert_int_equal(desc.shared.hidden_dim, shared_cases[i].add[0] ? 5 : 0);
        free(config);
    }
}

/* ---- Bad directories ------------------------------------------------------------------------ */

static void test_bad_directories(void **state) {
    (void)state;
    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc;
    REFUSED(clmoe_checkpoint_open(temp_path("nowhere"), NULL, &checkpoint), CLMOE_IO,
            "nowhere/config.json", "No such");
    assert_null(checkpoint);
    const char *directory = write_checkpoint("bare", CONFIG, TENSORS);
    assert_int_equal(unlink(temp_path("bare/model.safetensors")), 0);
    REFUSED(clmoe_checkpoint_open(directory, NULL, &checkpoint), CLMOE_IO, "bare",
            "model.safetensors");
    write_text(temp_path("bare/model.safetensors"), "");
    REFUSED(clmoe_checkpoint_open(directory, NULL, &checkpoint), CLMOE_BAD_FILE,
            "bare/model.safetensors", "0 bytes");
    temp_directory("bare2");
    assert_int_equal(mkfifo(temp_path("bare2/config.json"), 0666), 0);
    REFUSED(clmoe_checkpoint_open(temp_path("bare2"), NULL, &checkpoint), CLMOE_IO, "config.json",
            "not a regular file");
    REFUSED(clmoe_checkpoint_open("", NULL, &checkpoint), CLMOE_INVALID_ARGUMENT,
            "directory is ''");
    REFUSED(clmoe_checkpoint_open(NULL, NULL, &checkpoint), CLMOE_INVALID_ARGUMENT, "directory");
    REFUSED(clmoe_checkpoint_open(directory, NULL, NULL), CLMOE_INVALID_ARGUMENT, "out");
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
    {"{\"weight_map\": {\"model.norm.weight\": \"a.safetensors\"}, \"weight_map\": {}}",
     CLMOE_BAD_FILE,
     {"weight_map twice", "model.safetensors.index.json"}},
    {"{\"weight_map\": []}", CLMOE_BAD_FILE, {"no weight_map", "model.safetensors.index.json"}},
    {"{\"weight_map\": {}}", CLMOE_BAD_FILE, {"no weight_map", "model.safetensors.index.json"}},
    {"{\"weight_map\": {\"x\": 1}}", CLMOE_BAD_FILE, {"'x'", "not a name inside"}},
    {INDEX("x", ""), CLMOE_BAD_FILE, {"'x'", "not a name inside"}},
    {INDEX("x", "../a.safetensors"), CLMOE_BAD_FILE, {"../a.safetensors", "not a name inside"}},
    {INDEX("x", "/etc/passwd"), CLMOE_BAD_FILE, {"/etc/passwd", "not a name inside"}},
    {INDEX("x", "a/b.safetensors"), CLMOE_IO, {"sharded/a/b.safetensors", "No such"}},
    {INDEX("x", "a/../a.safetensors"), CLMOE_BAD_FILE, {"a/../a", "not a name inside"}},
    {INDEX("x", "a//b"), CLMOE_BAD_FILE, {"a//b", "not a name inside"}},
    {INDEX("x", "a/.."), CLMOE_BAD_FILE, {"a/..", "not a name inside"}},
    {INDEX("x", ".."), CLMOE_BAD_FILE, {"'..'", "not a name inside"}},
    {INDEX("x", "none.safetensors"), CLMOE_IO, {"none.safetensors", "No such"}},
    {INDEX("x", "a.safetensors"),
     CLMOE_BAD_FILE,
     {"a.safetensors: tensor 'x' is missing", "index.json"}},
    {"{\"weight_map\": {\"model.norm.weight\": \"a.safetensors\", \"model.norm.weight\": 1}}",
     CLMOE_BAD_FILE,
     {"'model.norm.weight' twice", "model.safetensors.index.json"}},
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
        REFUSED(clmoe_checkpoint_open(directory, NULL, &checkpoint), index_cases[i].status,
                index_cases[i].says[0], index_cases[i].says[1]);
    }
}

#define EXPERT_OF_5                                                                                \
    "model.layers.0.mlp.experts.0.gate_proj.weight F32 5,4;"                                       \
    "model.layers.0.mlp.experts.0.up_proj.weight F32 5,4;"                                         \
    "model.layers.0.mlp.experts.0.down_proj.weight F32 4,5;"                                       \
    "model.layers.0.mlp.experts.1.gate_proj.weight F32 5,4;"                                       \
    "model.layers.0.mlp.experts.1.up_proj.weight F32 5,4;"                                         \
    "model.layers.0.mlp.experts.1.down_proj.weight F32 4,5;"

/* The index alone says which tensors there are, and where; names may lead below the directory. */
static void test_indexes(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    const char *directory = temp_directory("indexed"), *ninth = EXPERT(9);
    const char *index = temp_path("indexed/model.safetensors.index.json");
    char *wide = replaced(CONFIG, "_size\": 3", "_size\": 5");
    temp_directory("indexed/sub");
    write_text(temp_path("indexed/config.json"), CONFIG);
    write_tensors(temp_path("indexed/a.safetensors"), TENSORS SHARED, "", ninth);
    write_tensors(temp_path("indexed/sub/b.safetensors"), EXPERT_OF_5 "lm_head.weight F32 4;", "",
                  "model.norm.weight F32 4;");
    write_index(index, TENSORS, "a.safetensors", "lm_head.weight ;", "sub/b.safetensors");
    OK(describe(directory, 0, &desc));
    assert_int_equal(desc.shared.hidden_dim, 0);
    assert_int_equal(desc.experts.hidden_dim, 3);
    write_text(temp_path("indexed/config.json"), wide);
    write_index(index, EXPERT_OF_5, "./sub/b.safetensors", ROUTER, "././a.safetensors");
    OK(describe(directory, 0, &desc));
    assert_int_equal(desc.experts.hidden_dim, 5);
    write_index(index, "model.norm.weight ;", "a.safetensors", "", "");
    REFUSED(describe(directory, 0, &desc), CLMOE_BAD_FILE, "layer 0 has no MoE block");
    free(wide);
}

/* model.safetensors beside an index is an error, unless the index leads to it. */
static void test_two_models(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    const char *directory = write_checkpoint("both", CONFIG, TENSORS);
    const char *index = temp_path("both/model.safetensors.index.json");
    write_tensors(temp_path("both/a.safetensors"), TENSORS, "", "");
    write_index(index, TENSORS, "a.safetensors", "", "");
    REFUSED(describe(directory, 0, &desc), CLMOE_BAD_FILE, "both model.safetensors and",
            "model.safetensors.index.json");
    write_index(index, TENSORS, "model.safetensors", "", "");
    OK(describe(directory, 0, &desc));
}

/* More files than a process may open. */
static void test_many_shards(void **state) {
    (void)state;
    enum { SHARDS = 60, FILES = 40 };
    static char map[16384];
    char path[64];
    struct rlimit old, few;
    clmoe_layer_desc desc;
    const char *directory = temp_directory("many");
    size_t used = (size_t)snprintf(map, sizeof map, "{\"weight_map\": {");
    for (int i = 0; i < SHARDS; i++) {
        char tensor[32];
        snprintf(path, sizeof path, "many/s%d.safetensors", i);
        snprintf(tensor, sizeof tensor, "x%d F32 1;", i);
        write_tensors(temp_path(path), tensor, "", "");
        used += (size_t)snprintf(map + used, sizeof map - used, "%s\"x%d\": \"s%d.safetensors\"",
                                 i ? ", " : "", i, i);
    }
    snprintf(map + used, sizeof map - used, "}}");
    write_text(temp_path("many/config.json"), CONFIG);
    write_text(temp_path("many/model.safetensors.index.json"), map);
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &old), 0);
    few = (struct rlimit){FILES, old.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &few), 0);
    clmoe_status status = describe(directory, 0, &desc);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &old), 0);
    REFUSED(status, CLMOE_BAD_FILE, "layer 0 has no MoE block");
}

/* Git LFS pointers stand where the files should. */
static void test_lfs_pointers(void **state) {
    (void)state;
    static const char *const names[] = {"lfs/model.safetensors", "lfs/config.json"};
    clmoe_layer_desc desc;
    const char *directory = write_checkpoint("lfs", CONFIG, TENSORS);
    for (size_t i = 0; i < 2; i++) {
        write_text(temp_path(names[i]), "version https://git-lfs.github.com/spec/v1\n"
                                        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b125\n"
                                        "size 12345\n");
        REFUSED(describe(directory, 0, &desc), CLMOE_BAD_FILE, names[i], "Git LFS pointer");
    }
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
            write_checkpoint("uploads", layout_cases[i].config, layout_cases[i].tensors), NULL,
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
        assert_int_equal(desc.router.renorm.kind, want[i]);
        assert_true(desc.router.renorm.p == (want[i] == CLMOE_RENORM_PNORM ? 2.0f : 1.0f));
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

/* Buffers of one context cannot be written through a queue of another one. */
static void test_foreign_queue(void **state) {
    (void)state;
    const char *directory = write_checkpoint("foreign", CONFIG, TENSORS);
    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc;
    clmoe_weights weights;
    const clmoe_weights none = {0};
    cl_int code;
    cl_context other = clCreateContext(NULL, 1, &test.device, NULL, NULL, &code);
    CL_OK(code);
    OK(clmoe_checkpoint_open(directory, NULL, &checkpoint));
    OK(clmoe_checkpoint_layer(checkpoint, 0, &desc));
    memset(&weights, 1, sizeof weights);
    REFUSED(clmoe_checkpoint_upload(checkpoint, 0, &desc, other, test.queue, &weights),
            CLMOE_INVALID_ARGUMENT, "queue", "another cl_context");
    assert_memory_equal(&weights, &none, sizeof none);
    clmoe_checkpoint_close(checkpoint);
    clReleaseContext(other);
}

/* Each field that decides a buffer, with another value than the file's. */
static void test_other_descs(void **state) {
    (void)state;
#define FIELD(name, value)                                                                         \
    { "desc." #name " is", offsetof(clmoe_layer_desc, name), value }
    static const struct {
        const char *says;
        size_t offset;
        uint32_t value;
    } cases[] = {
        FIELD(weight_type, 9),
        FIELD(router.weight_type, 7),
        FIELD(router.reserved[3], 1),
        FIELD(router.groups.reserved[0], 1),
        FIELD(capacity.reserved[7], 1),
        FIELD(experts.reserved[2], 1),
        FIELD(balance.reserved[0], 1),
        FIELD(dim, 5),
        FIELD(num_experts, 3),
        FIELD(num_identity_experts, 1),
        FIELD(router.bias, 1),
        FIELD(shared_gate, 1),
        FIELD(output_bias, 1),
        FIELD(experts.hidden_dim, 4),
        FIELD(experts.gate_layout, CLMOE_GATE_SEPARATE),
        FIELD(experts.gate_up_transposed, 1),
        FIELD(experts.down_transposed, 1),
        FIELD(experts.gate_up_bias, 1),
        FIELD(experts.down_bias, 1),
        FIELD(shared.hidden_dim, 0),
        FIELD(shared.gate_layout, CLMOE_GATE_INTERLEAVED),
        FIELD(shared.gate_up_transposed, 1),
        FIELD(shared.down_transposed, 1),
        FIELD(shared.gate_up_bias, 1),
        FIELD(shared.down_bias, 1),
    };
#undef FIELD
    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc, other;
    clmoe_weights weights;
    char *config = replaced(CONFIG, "qwen3_moe", "flint");
    OK(clmoe_checkpoint_open(write_checkpoint("other", config, TENSORS SHARED), NULL, &checkpoint));
    OK(clmoe_checkpoint_layer(checkpoint, 0, &desc));
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        test_case("%s %u", cases[i].says, cases[i].value);
        other = desc;
        memcpy((char *)&other + cases[i].offset, &cases[i].value, sizeof cases[i].value);
        REFUSED(clmoe_checkpoint_upload(checkpoint, 0, &other, test.context, test.queue, &weights),
                i < 7 ? CLMOE_INVALID_DESC : CLMOE_INVALID_ARGUMENT, cases[i].says);
    }
    other = desc;
    other.router.select_bias = 1; /* may be the state's */
    OK(clmoe_checkpoint_upload(checkpoint, 0, &other, test.context, test.queue, &weights));
    clmoe_weights_release(&weights);
    clmoe_checkpoint_close(checkpoint);
    free(config);
}

static void test_bad_uploads(void **state) {
    (void)state;
    const char *directory = write_checkpoint("upload", CONFIG, TENSORS);
    clmoe_checkpoint *checkpoint;
    clmoe_layer_desc desc, other;
    clmoe_weights weights;
    const clmoe_weights none = {0};
    OK(clmoe_checkpoint_open(directory, NULL, &checkpoint));
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
        TEST(test_bad_tensors), TEST(test_shared_experts), TEST(test_bad_directories),
        TEST(test_bad_indexes), TEST(test_indexes),        TEST(test_two_models),
        TEST(test_many_shards), TEST(test_lfs_pointers),   TEST(test_layouts),
        TEST(test_places),      TEST(test_layout_uploads), TEST(test_norms),
        TEST(test_bad_uploads), TEST(test_foreign_queue),  TEST(test_other_descs),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
