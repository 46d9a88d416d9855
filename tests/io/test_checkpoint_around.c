/*
 * Fields of the block beside the text model's object: they say what that object says, or what it
 * comes to without, or are refused with both values.
 */
#include "support_checkpoint.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BIAS "model.layers.0.mlp.gate.e_score_correction_bias F32 2;"
#define PLAIN_SHARED                                                                               \
    "model.layers.0.mlp.shared_experts.gate_proj.weight F32 3,4;"                                  \
    "model.layers.0.mlp.shared_experts.up_proj.weight F32 3,4;"                                    \
    "model.layers.0.mlp.shared_experts.down_proj.weight F32 4,3;"

/* A field around the model's object, and one more inside; what a refusal says, or NULL. */
typedef struct around_case {
    const char *around, *inside, *says;
} around_case;

static const around_case cases[] = {
    {"\"routed_scaling_factor\": 2.5", "\"routed_scaling_factor\": 2.5", NULL},
    {"\"routed_scaling_factor\": 2", "\"routed_scaling_factor\": 2.0", NULL},
    {"\"routed_scaling_factor\": [2, 3]", "\"routed_scaling_factor\": 2", NULL},
    {"\"routed_scaling_factor\": 2", "\"routed_scaling_factor\": [2, 3]", NULL},
    {"\"routed_scaling_factor\": null", "\"routed_scaling_factor\": 2.5", NULL},
    {"\"routed_scaling_factor\": 2.5", "\"x\": 0", NULL},
    {"\"routed_scaling_factor\": 1.0", "\"x\": 0",
     "routed_scaling_factor is 1.0, but text_config, which counts, has none, which means 2.5"},
    {"\"routed_scaling_factor\": 7.0", "\"routed_scaling_factor\": 2.0",
     "routed_scaling_factor is 7.0, but text_config, which counts, has routed_scaling_factor 2.0"},
    {"\"routed_scaling_factor\": 1", "\"routed_scaling_factor\": 2.0", "has routed_scaling_factor"},
    {"\"routed_scaling_factor\": [3, 2]", "\"routed_scaling_factor\": 2",
     "has routed_scaling_factor 2"},
    {"\"route_scale\": 7.0", "\"routed_scaling_factor\": 2.0",
     "route_scale is 7.0, but text_config, which counts, has routed_scaling_factor 2.0"},
    {"\"num_experts_per_tok\": 1", "\"x\": 0", NULL},
    {"\"num_experts_per_tok\": 2", "\"x\": 0", "has num_experts_per_tok 1"},
    {"\"top_k\": 50", "\"x\": 0", NULL},
    {"\"num_experts\": 3", "\"x\": 0", "has num_experts 2"},
    {"\"n_routed_experts\": 2", "\"x\": 0", NULL},
    {"\"moe_intermediate_size\": 3, \"intermediate_size\": 9", "\"intermediate_size\": 8", NULL},
    {"\"moe_intermediate_size\": 4", "\"x\": 0", "has moe_intermediate_size 3"},
    {"\"hidden_size\": 5, \"num_hidden_layers\": 7", "\"x\": 0", NULL},
    {"\"norm_topk_prob\": true", "\"x\": 0", NULL},
    {"\"norm_topk_prob\": false", "\"x\": 0", "has norm_topk_prob true"},
    {"\"n_group\": 2", "\"n_group\": 1, \"topk_group\": 1", "has n_group 1"},
    {"\"n_group\": 0", "\"n_group\": 1, \"topk_group\": 1", "has n_group 1"},
    {"\"n_group\": 1", "\"n_group\": null, \"topk_group\": null", NULL},
    {"\"n_group\": 2", "\"n_group\": null, \"topk_group\": null", "has none, which means 0"},
    {"\"topk_method\": \"noaux_tc\"", "\"x\": 0", NULL},
    {"\"topk_method\": \"greedy\"", "\"x\": 0", "has none, which means \"noaux_tc\""},
    {"\"scoring_func\": \"sigmoid\"", "\"x\": 0", NULL},
    {"\"scoring_func\": \"softmax\"", "\"x\": 0", "has none, which means \"sigmoid\""},
    {"\"hidden_act\": \"silu\"", "\"x\": 0", NULL},
    {"\"hidden_act\": {\"name\": \"silu\"}", "\"x\": 0", NULL},
    {"\"hidden_act\": \"gelu\"", "\"x\": 0", "has hidden_act \"silu\""},
    {"\"n_shared_experts\": 1", "\"x\": 0", NULL},
    {"\"n_shared_experts\": 2", "\"x\": 0", "has none, which means 1"},
    {"\"n_shared_experts\": 0", "\"x\": 0", "has none, which means 1"},
    {"\"shared_expert_intermediate_size\": 4", "\"x\": 0", "has none, which means 3"},
    {"\"mlp_bias\": false", "\"x\": 0", NULL},
    {"\"mlp_bias\": true", "\"x\": 0", "has none, which means false"},
    {"\"zero_expert_num\": 0", "\"x\": 0", NULL},
    {"\"zero_expert_num\": 2", "\"x\": 0", "zero_expert_num is 2"},
    {"\"router_gain\": 2", "\"x\": 0", "router_gain is 2"},
    {"\"ffn_config\": {\"moe_top_k\": 1}", "\"x\": 0", NULL},
    {"\"ffn_config\": {\"moe_top_k\": 2}", "\"x\": 0", "moe_top_k is 2"},
    {"\"per_layer_config\": {\"0\": {\"router_gain\": 2}}", "\"x\": 0", "router_gain is 2"},
    {"\"per_layer_config\": {\"1\": {\"router_gain\": 2}}", "\"x\": 0", NULL},
    {"\"projector_hidden_act\": \"gelu\", \"vision_config\": {\"hidden_act\": \"gelu\"}",
     "\"x\": 0", NULL},
};

/* One case in a config of that form: "%s" is the case's field, then the model's object. */
static void check_case(const around_case *c, const char *form) {
    char text[2048], inside[256];
    clmoe_layer_desc desc;
    test_case("%s around %s", c->around, c->inside);
    snprintf(inside, sizeof inside, "{%s, ", c->inside);
    char *model = replaced(CONFIG, "qwen3_moe",
                           "deepseek_v3\", \"n_group\": 1, \"topk_group\": 1, \"y\": \"");
    if (strstr(inside, "n_group") != NULL) {
        free(model);
        model = replaced(CONFIG, "qwen3_moe", "deepseek_v3");
    }
    char *whole = replaced(model, "{", inside);
    snprintf(text, sizeof text, form, c->around, whole);
    write_text(temp_path("around/config.json"), text);
    if (c->says == NULL)
        OK(describe(temp_path("around"), 0, &desc));
    else if (describe(temp_path("around"), 0, &desc) == CLMOE_SUCCESS)
        CHECK(false, "accepted\n");
    else
        CHECK(strstr(clmoe_last_error(), c->says) && strstr(clmoe_last_error(), "config.json"),
              "it says: %s\n", clmoe_last_error());
    free(whole);
    free(model);
}

static void test_around(void **state) {
    (void)state;
    write_checkpoint("around", CONFIG, TENSORS BIAS PLAIN_SHARED);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        check_case(&cases[i], "{%s, \"text_config\": %s}");
        check_case(&cases[i], "{\"thinker_config\": {%s, \"text_config\": %s}}");
    }
}

/* A family's own number is a float, and the file's a decimal. */
static void test_float_default(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    write_checkpoint("float", CONFIG, TENSORS BIAS PLAIN_SHARED);
    char *model = replaced(CONFIG, "qwen3_moe", "hy_v3");
    char text[1024];
    snprintf(text, sizeof text, "{\"router_scaling_factor\": 2.826, \"text_config\": %s}", model);
    write_text(temp_path("float/config.json"), text);
    OK(describe(temp_path("float"), 0, &desc));
    snprintf(text, sizeof text, "{\"router_scaling_factor\": 2.8, \"text_config\": %s}", model);
    write_text(temp_path("float/config.json"), text);
    REFUSED(describe(temp_path("float"), 0, &desc), CLMOE_BAD_FILE, "router_scaling_factor is 2.8",
            "means 2.826");
    free(model);
}

/* Two objects that may be the text model's. */
static void test_two_models(void **state) {
    (void)state;
    clmoe_layer_desc desc;
    const char *directory = write_checkpoint(
        "two", "{\"text_config\": " CONFIG ", \"llm_config\": " CONFIG "}", TENSORS);
    OK(describe(directory, 0, &desc));
    write_text(temp_path("two/config.json"),
               "{\"llm_config\": {\"top_k\": 2}, \"text_config\": " CONFIG "}");
    REFUSED(describe(directory, 0, &desc), CLMOE_UNSUPPORTED, "both text_config and llm_config",
            "config.json");
    write_text(temp_path("two/config.json"),
               "{\"text_config\": " CONFIG ", \"thinker_config\": {\"text_config\": {}}}");
    REFUSED(describe(directory, 0, &desc), CLMOE_UNSUPPORTED, "both text_config and thinker_config",
            "config.json");
    write_text(temp_path("two/config.json"),
               "{\"thinker_config\": {\"quantization_config\": {\"quant_method\": \"awq\"}, "
               "\"text_config\": " CONFIG "}}");
    REFUSED(describe(directory, 0, &desc), CLMOE_UNSUPPORTED, "quant_method 'awq'", "config.json");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_around),
        TEST(test_float_default),
        TEST(test_two_models),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
