/* config.json of checkpoints: wrong values, model types that are not known, assumptions. */
#include "runtime/status.h" /* before cmocka, which has a macro fail() */

#include "support_checkpoint.h"

#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
    {"_tok\": 1", "_tok\": [1]", CLMOE_BAD_FILE, {"num_experts_per_tok has 1 entries", "layer 0"}},
    {"_tok\": 1",
     "_tok\": [[1], [2]]",
     CLMOE_BAD_FILE,
     {"num_experts_per_tok is [1]", "config.json"}},
    {"qwen3_moe\"",
     "dots1\", \"x\": 1, \"num_experts_per_tok\": null, \"y\": \"\"",
     CLMOE_BAD_FILE,
     {"num_experts_per_tok is 1, but the file has it twice", "config.json"}},
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
    {"\"silu\"", "\"xielu\"", CLMOE_UNSUPPORTED, {"hidden_act is \"xielu\"", "config.json"}},
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
     CLMOE_UNSUPPORTED,
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
     {"topk_group is 3", "n_group is 2"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": 2, \"topk_group\": 0, \"x\": \"",
     CLMOE_BAD_FILE,
     {"topk_group is 0", "config.json"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": 1, \"topk_group\": 0, \"x\": \"",
     CLMOE_BAD_FILE,
     {"topk_group is 0, but n_group is 1", "config.json"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": null, \"topk_group\": 4, \"x\": \"",
     CLMOE_BAD_FILE,
     {"n_group is null, but must divide the 2 experts", "config.json"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": 2, \"topk_group\": null, \"x\": \"",
     CLMOE_BAD_FILE,
     {"topk_group is null, but n_group is 2", "config.json"}},
    {"qwen3_moe",
     "mistral4\", \"n_group\": -1, \"x\": \"",
     CLMOE_BAD_FILE,
     {"n_group is -1", "config.json"}},
    {"qwen3_moe",
     "mistral4\", \"topk_method\": \"best\", \"x\": \"",
     CLMOE_UNSUPPORTED,
     {"topk_method is \"best\"", "config.json"}},
    {"qwen3_moe",
     "mistral4\", \"routed_scaling_factor\": \"2\", \"x\": \"",
     CLMOE_BAD_FILE,
     {"routed_scaling_factor is \"2\"", "config.json"}},
    {"qwen3_moe",
     "mistral4\", \"routed_scaling_factor\": 1e-50, \"x\": \"",
     CLMOE_BAD_FILE,
     {"routed_scaling_factor is 1e-50", "as a float"}},
    {"qwen3_moe",
     "mistral4\", \"routed_scaling_factor\": 1e-40, \"x\": \"",
     CLMOE_BAD_FILE,
     {"routed_scaling_factor is 1", "as a float"}},
    {"qwen3_moe",
     "mistral4\", \"routed_scaling_factor\": 1e39, \"x\": \"",
     CLMOE_BAD_FILE,
     {"routed_scaling_factor is 1", "as a float"}},
    {"qwen3_moe",
     "deepseek_v4\", \"swiglu_limit\": 1e-50, \"x\": \"",
     CLMOE_BAD_FILE,
     {"swiglu_limit is 1e-50", "as a float"}},
    {"qwen3_moe",
     "laguna\", \"router_logit_softcapping\": 1e39, \"x\": \"",
     CLMOE_BAD_FILE,
     {"router_logit_softcapping is 1", "as a float"}},
    {"qwen3_moe",
     "dbrx\", \"moe_normalize_expert_weights\": 1e-50, \"x\": \"",
     CLMOE_BAD_FILE,
     {"moe_normalize_expert_weights is 1e-50", "as a float"}},
    {"\"qwen3_moe\"",
     "[\"qwen3_moe\"]",
     CLMOE_BAD_FILE,
     {"model_type is [\"qwen3_moe\"], but must be a string", "config.json"}},
    {"\"qwen3_moe\"",
     "\"qwen3_moe\", \"text_config\": {\"model_type\": 3}",
     CLMOE_BAD_FILE,
     {"model_type is 3, but must be a string", "config.json"}},
    {"\"qwen3_moe\"", "null", CLMOE_UNSUPPORTED, {"has no model_type", "--assume"}},
    {"\"model_type\": \"qwen3_moe\"",
     "\"text_config\": {\"model_type\": \"mystery\"}",
     CLMOE_UNSUPPORTED,
     {"model_type 'mystery' is not known", "--assume"}},
    {"qwen3_moe", "gemma4_text", CLMOE_UNSUPPORTED, {"gemma4_text", "router"}},
    {"qwen3_moe", "switch_transformers", CLMOE_UNSUPPORTED, {"switch_transformers", "encoder"}},
    {"qwen3_moe\", \"hidden",
     "mystery\", \"hidden",
     CLMOE_UNSUPPORTED,
     {"model_type 'mystery' is not known", "--assume"}},
    {"_experts\": 2", "_experts\": NaN", CLMOE_BAD_FILE, {"num_experts is \"NaN\"", "config.json"}},
    {"_experts\": 2",
     "_experts\": 1e400",
     CLMOE_BAD_FILE,
     {"num_experts is \"1e400\"", "config.json"}},
    {"_experts\": 2",
     "_experts\": 99999999999999999999",
     CLMOE_BAD_FILE,
     {"num_experts is \"99999999999999999999\"", "config.json"}},
    {"\"silu\"", "\"\\ud800\"", CLMOE_UNSUPPORTED, {"hidden_act is ", "config.json"}},
    {"\"silu\"", "Infinite", CLMOE_BAD_FILE, {"not JSON", "config.json"}},
    {"\"silu\"", "01", CLMOE_BAD_FILE, {"not JSON", "config.json"}},
    {"\"silu\"", "\"a", CLMOE_BAD_FILE, {"not JSON", "config.json"}},
    {"{", "", CLMOE_BAD_FILE, {"not JSON", "config.json"}},
    {CONFIG, "[]", CLMOE_BAD_FILE, {"not a JSON object", "config.json"}},
    {CONFIG, "", CLMOE_BAD_FILE, {"not JSON", "config.json"}},
};

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
    OK(describe_as("pattern", directory, 0, &desc));
    assert_int_equal(desc.router.renorm.kind, CLMOE_RENORM_SUM);
    assert_int_equal(desc.router.score, CLMOE_SCORE_SOFTMAX);
    char *unclear = replaced(known, "\"norm_topk_prob\": true,", "");
    write_text(temp_path("mystery/config.json"), unclear);
    REFUSED(describe_as("pattern", directory, 0, &desc), CLMOE_UNSUPPORTED, "mystery",
            "norm_topk_prob", "config.json");
    free(unclear);
    char *sigmoid = replaced(known, "\"silu\"", "\"silu\", \"scoring_func\": \"sigmoid\"");
    write_text(temp_path("mystery/config.json"), sigmoid);
    OK(describe_as("pattern", directory, 0, &desc));
    assert_int_equal(desc.router.score, CLMOE_SCORE_SIGMOID);
    free(sigmoid);
    /* A selection bias makes it one like DeepSeek-V3. */
    write_text(temp_path("mystery/config.json"), known);
    write_tensors(temp_path("mystery/model.safetensors"), TENSORS, "",
                  "model.layers.0.mlp.gate.e_score_correction_bias F32 2;");
    OK(describe_as("pattern", directory, 0, &desc));
    assert_int_equal(desc.router.score, CLMOE_SCORE_SIGMOID);
    assert_int_equal(desc.router.select_bias, 1);
    free(known);
}

/* What a checkpoint of model_type `type` is taken for under an assumption; "" for nothing. */
static void check_assumed(const char *type, const char *assume, const char *want) {
    clmoe_checkpoint *checkpoint;
    const clmoe_checkpoint_options options = {.struct_size = sizeof options, .assume = assume};
    char *config = replaced(CONFIG, "qwen3_moe", type);
    const char *directory = write_checkpoint("assumed", config, TENSORS);
    test_case("%s assumed to be %s", type, assume ? assume : "itself");
    OK(clmoe_checkpoint_open(directory, &options, &checkpoint));
    const char *got = clmoe_checkpoint_assumed(checkpoint, 0);
    assert_string_equal(got ? got : "", want);
    assert_null(clmoe_checkpoint_assumed(checkpoint, 1));
    clmoe_checkpoint_close(checkpoint);
    free(config);
}

static void test_assumptions(void **state) {
    (void)state;
    clmoe_checkpoint *checkpoint;
    clmoe_checkpoint_options options = {.struct_size = sizeof options};
    check_assumed("qwen3_moe", NULL, "");
    check_assumed("qwen3_moe", "qwen3_moe", "");
    check_assumed("mystery", "pattern", "pattern");
    check_assumed("mystery", "mixtral", "mixtral");
    assert_null(clmoe_checkpoint_assumed(NULL, 0));
    const char *directory = write_checkpoint("assumed", CONFIG, TENSORS);
    options.assume = "mixtral";
    REFUSED(clmoe_checkpoint_open(directory, &options, &checkpoint), CLMOE_INVALID_ARGUMENT,
            "assume is 'mixtral'", "'qwen3_moe'");
    char *config = replaced(CONFIG, "qwen3_moe", "mystery");
    write_text(temp_path("assumed/config.json"), config);
    options.assume = "qwen9";
    REFUSED(clmoe_checkpoint_open(directory, &options, &checkpoint), CLMOE_INVALID_ARGUMENT,
            "assume is 'qwen9'", "'pattern'");
    options.struct_size = 0;
    REFUSED(clmoe_checkpoint_open(directory, &options, &checkpoint), CLMOE_INVALID_ARGUMENT,
            "options.struct_size is 0");
    free(config);
}

/* Programs of other versions: options and descriptors are shorter or longer. */
static void test_other_versions(void **state) {
    (void)state;
    struct {
        clmoe_checkpoint_options known;
        uint64_t more;
    } options = {.known.struct_size = sizeof options};
    clmoe_layer_desc desc, whole, wild;
    clmoe_checkpoint *checkpoint;
    const char *directory = write_checkpoint("versions", CONFIG, TENSORS);
    OK(clmoe_checkpoint_open(directory, &options.known, &checkpoint));
    OK(clmoe_checkpoint_layer(checkpoint, 0, &whole));
    memset(&wild, 0xa5, sizeof wild);
    desc = wild;
    const size_t size = offsetof(clmoe_layer_desc, shared);
    OK(clmoe_checkpoint_layer_sized(checkpoint, 0, &desc, size));
    assert_int_equal(desc.struct_size, size);
    assert_memory_equal(&desc.dim, &whole.dim, size - offsetof(clmoe_layer_desc, dim));
    assert_memory_equal(&desc.shared, &wild.shared, sizeof desc - size);
    REFUSED(clmoe_checkpoint_layer_sized(checkpoint, 0, &desc, offsetof(clmoe_layer_desc, experts)),
            CLMOE_UNSUPPORTED, "struct_size is");
    clmoe_checkpoint_close(checkpoint);
    options.more = 1;
    REFUSED(clmoe_checkpoint_open(directory, &options.known, &checkpoint), CLMOE_INVALID_ARGUMENT,
            "options.struct_size is", "not 0");
}

/* What Python writes into fields that nobody needs. */
static void test_python_json(void **state) {
    (void)state;
    static const char *const harmless[] = {
        "\"time_step_limit\": [0.0, Infinity]",
        "\"x\": NaN",
        "\"x\": [-Infinity,NaN , {\"y\":Infinity}]",
        "\"x\": 123456789012345678901234567890",
        "\"x\": [1e400, -1.5e+999]",
        "\"x\": 1, \"x\": 2, \"x\": {\"y\": 1, \"y\": 2}",
        "\"x\": \"a\\ud800b\\udc00\\u0000\\ud83d\\ude00\\\"\"",
        "\"\\u0000\": \"NaN\"",
    };
    clmoe_layer_desc plain, desc;
    OK(describe(write_checkpoint("python", CONFIG, TENSORS), 0, &plain));
    for (size_t i = 0; i < sizeof harmless / sizeof harmless[0]; i++) {
        char text[256];
        test_case("%s", harmless[i]);
        snprintf(text, sizeof text, "{%s, ", harmless[i]);
        char *config = replaced(CONFIG, "{", text);
        write_text(temp_path("python/config.json"), config);
        OK(describe(temp_path("python"), 0, &desc));
        compare_bits("descriptor", &desc, &plain, sizeof desc);
        free(config);
    }
}

/* Families whose rules have fields of their own names. */
static void test_rules(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    char *flint = replaced(CONFIG, "qwen3_moe", "flint");
    const char *directory = write_checkpoint("rules", flint, TENSORS SHARED);
    OK(describe(directory, 0, &desc));
    assert_int_equal(desc.router.score, CLMOE_SCORE_SIGMOID);
    assert_int_equal(desc.router.renorm.kind, CLMOE_RENORM_SUM);
    assert_int_equal(desc.shared.hidden_dim, 5);
    char *step = replaced(CONFIG, "qwen3_moe",
                          "step3p5\", \"moe_router_scaling_factor\": 1.75, "
                          "\"swiglu_limits\": [0.0, 7.0], \"x\": \"");
    write_text(temp_path("rules/config.json"), step);
    write_tensors(temp_path("rules/model.safetensors"), TENSORS, "",
                  "model.layers.0.mlp.gate.e_score_correction_bias F32 2;");
    OK(describe(directory, 0, &desc));
    assert_true(desc.router.scale == 1.75f);
    char *clamped = replaced(step, "[0.0, 7.0]", "[7.0, 0.0]");
    write_text(temp_path("rules/config.json"), clamped);
    REFUSED(describe(directory, 0, &desc), CLMOE_UNSUPPORTED, "swiglu_limits is [7.0,0.0]",
            "clamps");
    free(clamped);
    free(step);
    free(flint);
}

/* A field of CONFIG twice, whose second value Python would take; the name that a refusal says. */
static const struct {
    const char *field, *name;
} repeated_cases[] = {
    {"\"text_config\": " CONFIG ", \"text_config\": " CONFIG, "text_config"},
    {"\"text_config\": null, \"text_config\": " CONFIG, "text_config"},
    {"\"thinker_config\": {}, \"thinker_config\": {\"text_config\": " CONFIG "}", "thinker_config"},
    {"\"thinker_config\": {\"text_config\": " CONFIG ", \"text_config\": {}}", "text_config"},
    {"\"llm_config\": {}, \"llm_config\": 0", "llm_config"},
    {"\"ffn_config\": {}, \"ffn_config\": {\"num_experts_per_tok\": 2}", "ffn_config"},
    {"\"text_config\": {\"ffn_config\": {}, \"ffn_config\": 0}", "ffn_config"},
    {"\"ffn_config\": {\"moe_top_k\": 1, \"moe_top_k\": 2}", "moe_top_k"},
    {"\"model_type\": \"mixtral\"", "model_type"},
    {"\"text_config\": " CONFIG ", \"model_type\": \"mixtral\"", "model_type"},
    {"\"text_config\": {\"model_type\": 0, \"model_type\": \"mixtral\"}", "model_type"},
    {"\"quantization_config\": null, \"quantization_config\": {\"quant_method\": \"fp8\"}",
     "quantization_config"},
    {"\"text_config\": " CONFIG ", \"quantization\": null, \"quantization\": {}", "quantization"},
    {"\"text_config\": " CONFIG ", \"routed_scaling_factor\": 1, \"routed_scaling_factor\": 2",
     "routed_scaling_factor"},
    {"\"other\": {\"n_group\": 1, \"n_group\": 2}", "n_group"},
    {"\"per_layer_config\": {\"0\": {\"top_k\": 1, \"top_k\": 2}}", "top_k"},
    {"\"block_configs\": [{\"hidden_act\": \"silu\", \"hidden_act\": \"gelu\"}, {}]", "hidden_act"},
};

static void test_repeated(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    const char *directory = write_checkpoint("repeated", CONFIG, TENSORS);
    for (size_t i = 0; i < sizeof repeated_cases / sizeof repeated_cases[0]; i++) {
        char text[1024], says[128];
        test_case("%s", repeated_cases[i].field);
        snprintf(text, sizeof text, "{%s, ", repeated_cases[i].field);
        snprintf(says, sizeof says, "config.json: %s is", repeated_cases[i].name);
        char *config = replaced(CONFIG, "{", text);
        write_text(temp_path("repeated/config.json"), config);
        REFUSED(describe(directory, 0, &desc), CLMOE_BAD_FILE, says, "the file has it twice");
        free(config);
    }
}

/* The activation of `directory` with config `config` and what stands for its "hidden_act". */
static clmoe_status activation_of(const char *assume, const char *config, const char *field,
                                  clmoe_activation *activation) {
    clmoe_layer_desc desc;
    char *changed = replaced(config, "\"hidden_act\": \"silu\"", field);
    const char *directory = write_checkpoint("activation", changed, TENSORS);
    write_tensors(temp_path("activation/model.safetensors"), TENSORS, "",
                  "model.layers.0.mlp.gate.e_score_correction_bias F32 2;");
    clmoe_status status = describe_as(assume, directory, 0, &desc);
    *activation = (clmoe_activation)desc.experts.activation;
    free(changed);
    return status;
}

/* Without the field, or with null, a family takes its own activation; unknown ones have none. */
static void test_default_activation(void **state) {
    (void)state;
    static const char *const none[] = {"\"x\": 1", "\"mlp_hidden_act\": null",
                                       "\"hidden_act\": null"};
    char *nemotron = replaced(CONFIG, "qwen3_moe", "nemotron_h");
    char *glm = replaced(CONFIG, "qwen3_moe", "glm4_moe");
    char *mystery = replaced(CONFIG, "qwen3_moe", "mystery");
    clmoe_activation got;
    for (size_t i = 0; i < sizeof none / sizeof none[0]; i++) {
        test_case("%s", none[i]);
        OK(activation_of(NULL, nemotron, none[i], &got));
        assert_int_equal(got, CLMOE_ACT_RELU2);
        OK(activation_of(NULL, glm, none[i], &got));
        assert_int_equal(got, CLMOE_ACT_SILU);
        OK(activation_of("nemotron_h", mystery, none[i], &got));
        assert_int_equal(got, CLMOE_ACT_RELU2);
        REFUSED(activation_of("pattern", mystery, none[i], &got), CLMOE_UNSUPPORTED, "hidden_act",
                "'mystery' cannot be deduced");
    }
    OK(activation_of(NULL, nemotron, "\"mlp_hidden_act\": \"silu\"", &got));
    assert_int_equal(got, CLMOE_ACT_SILU);
    free(nemotron);
    free(glm);
    free(mystery);
}

/* Flint's own number of experts, more than this block has. */
static void test_default_top_k(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    char *flint = replaced(CONFIG, "qwen3_moe", "flint");
    char *silent = replaced(flint, "\"num_experts_per_tok\": 1", "\"x\": 0");
    const char *directory = write_checkpoint("top_k", silent, TENSORS);
    REFUSED(describe(directory, 0, &desc), CLMOE_BAD_FILE, "num_experts_per_tok is 6",
            "num_experts is 2");
    free(flint);
    free(silent);
}

/* ---- Objects in the config ------------------------------------------------------------------ */

/* A field of CONFIG, and what a refusal must say; NULL: the descriptor stays as it is. */
static const struct {
    const char *field, *says;
} object_cases[] = {
    {"\"per_layer_config\": {\"0\": {\"num_experts_per_tok\": 2}}", "num_experts_per_tok is 2"},
    {"\"per_layer_config\": {\"0\": {\"hidden_act\": \"gelu\"}}", "hidden_act is \"gelu\""},
    {"\"per_layer_config\": [{\"norm_topk_prob\": false}, {}]", "norm_topk_prob is false"},
    {"\"per_layer_config\": {\"0\": {\"score_scale\": 2}}", "score_scale is 2"},
    {"\"per_layer_config\": {\"0\": {\"swiglu_limit\": 7}}", "swiglu_limit is 7"},
    {"\"layer_overrides\": {\"all\": {\"routed_scaling_factor\": 2.5}}",
     "routed_scaling_factor is 2.5"},
    {"\"block_configs\": [{\"ffn\": {\"x\": {\"num_experts_per_tok\": 2}}}, 0]",
     "num_experts_per_tok is 2"},
    {"\"block_configs\": [0, {\"x\": 1}, {\"scoring_func\": \"sigmoid\"}]",
     "scoring_func is \"sigmoid\""},
    {"\"moe\": {\"num_experts_per_tok\": 2}", "moe is {"},
    {"\"ffn_args\": {\"num_experts_per_tok\": 2}", "num_experts_per_tok is 2"},
    {"\"mlp\": {\"activation_function\": \"relu\"}", "activation_function is \"relu\""},
    {"\"mlp_config\": {\"extra\": [{\"output_scale\": 2}]}", "output_scale is 2"},
    {"\"other\": {\"deeper\": {\"norm_topk_prob\": false}}", "norm_topk_prob is false"},
    {"\"other\": {\"deeper\": {\"router_gain\": 2}}", "router_gain is 2"},

    {"\"per_layer_config\": {\"1\": {\"num_experts_per_tok\": 2}}", NULL},
    {"\"per_layer_config\": [{}, {\"num_experts_per_tok\": 2}]", NULL},
    {"\"per_layer_config\": {\"0\": {\"num_experts_per_tok\": 1, \"hidden_size\": 4}}", NULL},
    {"\"per_layer_config\": {\"0\": {\"num_attention_heads\": 2, \"rope_theta\": 1e4}}", NULL},
    {"\"per_layer_config\": {}, \"ffn_args\": {}, \"block_configs\": []", NULL},
    {"\"mtp_per_layer_config\": {\"0\": {\"num_experts_per_tok\": 2}}", NULL},
    {"\"vision_config\": {\"num_experts_per_tok\": 2, \"x\": {\"router_gain\": 2}}", NULL},
    {"\"visual\": {\"hidden_act\": \"gelu\", \"mlp_ratio\": 4, \"layers\": 3}", NULL},
    {"\"task_specific_params\": {\"text-generation\": {\"top_k\": 50}}", NULL},
    {"\"rope_scaling\": {\"factor\": 2.0, \"type\": \"yarn\"}", NULL},
};

/* A field counts wherever the config keeps it, unless it is another layer's or another part's. */
static void test_objects(void **state) {
    (void)state;
    clmoe_layer_desc plain, desc;
    const char *directory = write_checkpoint("objects", CONFIG, TENSORS);
    OK(describe(directory, 0, &plain));
    for (size_t i = 0; i < sizeof object_cases / sizeof object_cases[0]; i++) {
        char text[256];
        test_case("%s", object_cases[i].field);
        snprintf(text, sizeof text, "{%s, ", object_cases[i].field);
        char *config = replaced(CONFIG, "{", text);
        write_text(temp_path("objects/config.json"), config);
        free(config);
        if (object_cases[i].says != NULL) {
            REFUSED(describe(directory, 0, &desc), CLMOE_UNSUPPORTED, object_cases[i].says,
                    "config.json");
            continue;
        }
        OK(describe(directory, 0, &desc));
        compare_bits("descriptor", &desc, &plain, sizeof desc);
    }
}

/* Numbers in sentences have a point in every language. */
static void test_locale(void **state) {
    (void)state;
    static const char *const commas[] = {"de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8"};
    bool found = false;
    for (size_t i = 0; i < 3 && !found; i++)
        found = setlocale(LC_NUMERIC, commas[i]) != NULL;
    if (!found)
        skip(); /* no such language is installed */
    (fail)(CLMOE_BAD_FILE, "%g", 0.5);
    setlocale(LC_NUMERIC, "C");
    assert_string_equal(clmoe_last_error(), "0.5");
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

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_bad_configs),   TEST(test_unknown_model_type),
        TEST(test_assumptions),   TEST(test_other_versions),
        TEST(test_python_json),   TEST(test_rules),
        TEST(test_locale),        TEST(test_deep_config),
        TEST(test_objects),       TEST(test_default_activation),
        TEST(test_default_top_k), TEST(test_repeated),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
