/*
 * Each bundled checkpoint with one field of its config added or changed at a time: the descriptor
 * is what the field means for the family, or the field is refused by its name.
 */
#include "support_files.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *const models[] = {
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe",   "glm4_moe",    "gpt_oss",  "granitemoe",
    "jamba",       "lfm2_moe",    "hunyuan_v1_moe", "llama4_text", "mixtral",  "longcat_flash",
    "minimax_m2",  "olmoe",       "phimoe",         "qwen2_moe",   "qwen3_moe"};

/* What a value does to the descriptor. */
typedef enum effect {
    NONE,  /* nothing, whatever the value: it is of training, of execution, of another part */
    NEVER, /* it is refused, whatever the value, unless null */
    SCALE,
    TOP_K,
    RENORM,
    ACTIVATION,
    LIMIT,
    ALPHA,
    TOPK_GROUPS,
    JITTER, /* sparsemixer's eps, else of training */
    SCORE,
    SOFTCAP,
    SELECT_BIAS,
    SHARED,
    IDENTITY,
} effect;

#define ALL_SCALES "[1.0, 2.5, 0, null, \"2\", -1, [1.5, 2.5]]"

static const struct {
    const char *name, *values;
    effect effect;
} fields[] = {
    {"routed_scaling_factor", ALL_SCALES, SCALE},
    {"route_scale", ALL_SCALES, SCALE},
    {"router_scaling_factor", ALL_SCALES, SCALE},
    {"moe_routed_scaling_factor", ALL_SCALES, SCALE},
    {"moe_router_scaling_factor", ALL_SCALES, SCALE},
    {"moe_router_topk_scaling_factor", ALL_SCALES, SCALE},
    {"router_scale", ALL_SCALES, SCALE},
    {"expert_weights_scale", ALL_SCALES, SCALE},
    {"num_experts_per_tok", "[1, 2, 3, 0, null, 2.5]", TOP_K},
    {"num_experts_per_token", "[1, 2, 3]", TOP_K},
    {"moe_topk", "[1, 2, 3, [1, 1], [2, 3]]", TOP_K},
    {"moe_k", "[1, 2, 3]", TOP_K},
    {"moe_top_k", "[1, 2, 3]", TOP_K},
    {"norm_topk_prob", "[true, false, 1]", RENORM},
    {"moe_renormalize", "[true, false]", RENORM},
    {"route_norm", "[true, false]", RENORM},
    {"hidden_act", "[\"silu\", \"gelu\", \"relu\", \"swiglu\", null, 1]", ACTIVATION},
    {"hidden_activation", "[\"silu\", \"gelu_pytorch_tanh\"]", ACTIVATION},
    {"mlp_hidden_act", "[\"silu\", \"relu2\"]", ACTIVATION},
    {"ffn_act_fn", "[{\"name\": \"gelu\"}, {\"name\": \"silu\", \"beta\": 2}]", ACTIVATION},
    {"swiglu_limit", "[7, 5.5, 0]", LIMIT},
    {"swiglu_alpha", "[1.702, 1.3, 0]", ALPHA},
    {"swiglu_limits", "[[7, 7], 7]", NEVER},
    {"n_group", "[1, 2, 4]", TOPK_GROUPS},
    {"topk_group", "[1, 2, 4]", TOPK_GROUPS},
    {"num_expert_groups", "[1, 2]", TOPK_GROUPS},
    {"num_limited_groups", "[1, 2]", TOPK_GROUPS},
    {"topk_method", "[\"greedy\", \"noaux_tc\", \"group_limited_greedy\", \"best\"]", TOPK_GROUPS},
    {"scoring_func", "[\"softmax\", \"sigmoid\", \"tanh\"]", SCORE},
    {"score_func", "[\"softmax\", \"sigmoid\"]", SCORE},
    {"score_function", "[\"softmax\", \"sigmoid\"]", SCORE},
    {"moe_router_score_function", "[\"softmax\", \"sigmoid\"]", SCORE},
    {"expert_selection_fn", "[\"softmax\", \"sigmoid\"]", SCORE},
    {"moe_router_logit_softcapping", "[0, 30.0]", SOFTCAP},
    {"router_logit_softcapping", "[0.0, 30.0]", SOFTCAP},
    {"use_expert_bias", "[true, false]", SELECT_BIAS},
    {"n_shared_experts", "[0, 1, 2, 3, null]", SHARED},
    {"num_shared_experts", "[0, 3]", SHARED},
    {"shared_expert_intermediate_size", "[0, 40, 41]", SHARED},
    {"moe_shared_expert_intermediate_size", "[0, 41]", SHARED},
    {"shared_expert_combination_strategy", "[\"sum\"]", NONE},
    {"shared_expert_combination_strategy", "[\"average\"]", SHARED},
    {"router_jitter_noise", "[0.0, 0.1]", JITTER},
    {"moe_normalize_expert_weights", "[1, 2.0]", NEVER},
    {"moe_norm_min", "[0.5]", NEVER},
    {"moe_latent_size", "[16]", NEVER},
    {"moe_apply_router_weight_on_input", "[true]", NEVER},
    {"zero_expert_type", "[\"copy\"]", NEVER},
    {"zero_expert_num", "[4]", IDENTITY},
    {"moe_layers", "[[0], [0, 2, 4, 6, 8], 3]", NONE},
    {"expert_capacity", "[64]", NEVER},
    {"moe_capacity_factor", "[1.25]", NEVER},
    {"router_temperature", "[0.5]", NEVER},
    {"moe_router_temperature", "[2]", NEVER},
    {"moe_router_pre_softmax", "[true]", NEVER},
    {"use_router_bias", "[true, false]", NEVER},
    {"expert_gating_func", "[2]", NEVER},
    {"gating_func", "[\"sigmoid\"]", NEVER},
    {"num_redundant_experts", "[4]", NEVER},
    {"n_hash_experts", "[1]", NEVER},
    {"moe_config", "[{\"scale\": 2}]", NEVER},
    {"ffn_args", "[{\"router_gain\": 2}]", NEVER},
    {"per_layer_config", "[{\"0\": {\"router_gain\": 2}}]", NEVER},
    {"per_layer_config", "[{\"1\": {\"router_gain\": 2}}, {\"0\": {\"head_dim\": 8}}]", NONE},
    {"score_scale", "[2]", NEVER},
    {"activation_clamp", "[7.0]", NEVER},
    {"glu_linear_offset", "[1.0, 0]", NEVER},
    {"mlp_multipliers", "[[0.5, 2.0]]", NEVER},
    {"normalize_weights", "[true, false]", NEVER},
    {"quantization_config", "[{\"quant_method\": \"fp8\"}, {}]", NEVER},
    {"rms_norm_eps", "[0.1]", NONE},
    {"attention_bias", "[true]", NONE},
    {"rope_scaling", "[{\"factor\": 4.0, \"type\": \"yarn\"}]", NONE},
    {"attention_multiplier", "[2.0]", NONE},
    {"final_logit_softcapping", "[30.0]", NONE},
    {"router_aux_loss_coef", "[0.5]", NONE},
    {"output_router_logits", "[true]", NONE},
    {"first_k_dense_replace", "[1]", NONE},
    {"partial_rotary_factor", "[0.25]", NONE},
    {"o_groups", "[8]", NONE},
    {"lora_alpha", "[16]", NONE},
    {"num_key_value_groups", "[2]", NONE},
    {"time_step_limit", "[[0.0, 1.0]]", NONE},
    {"vision_config", "[{\"hidden_act\": \"gelu\", \"num_experts\": 3}]", NONE},
};

/* ---- What a value should do ----------------------------------------------------------------- */

/* The value for layer 0. */
static const json_t *first(const json_t *value) {
    return json_is_array(value) ? json_array_get(value, 0) : value;
}

/* Sets what a string names; false for an activation that the descriptor has not. */
static bool set_activation(const json_t *value, clmoe_layer_desc *want) {
    static const struct {
        const char *name;
        clmoe_activation activation;
    } known[] = {{"silu", CLMOE_ACT_SILU},
                 {"gelu", CLMOE_ACT_GELU_ERF},
                 {"gelu_pytorch_tanh", CLMOE_ACT_GELU_TANH},
                 {"relu", CLMOE_ACT_RELU},
                 {"relu2", CLMOE_ACT_RELU2}};
    const json_t *named = json_object_size(value) == 1 ? json_object_get(value, "name") : value;
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (json_is_string(named) && strcmp(json_string_value(named), known[i].name) == 0) {
            want->experts.activation = known[i].activation;
            if (want->shared.hidden_dim > 0)
                want->shared.activation = known[i].activation;
            return true;
        }
    return json_is_null(value);
}

static bool set_groups(const json_t *config, const char *name, const json_t *value,
                       clmoe_layer_desc *want) {
    uint32_t number = (uint32_t)json_integer_value(value), *field = &want->router.groups.topk;
    bool grouped = want->router.groups.count > 1;
    const char *method = json_string_value(json_object_get(config, "topk_method"));
    if (json_is_string(value) || (method && strcmp(method, "greedy") == 0))
        return true; /* the same descriptor, or refused */
    if (strcmp(name, "n_group") == 0 || strcmp(name, "num_expert_groups") == 0)
        field = &want->router.groups.count;
    bool same = number == (*field > 0 ? *field : 1);
    if (strcmp(name, "n_group") == 0 && !grouped && !same) { /* of which one is kept, then */
        want->router.groups.topk = 1;
        want->router.groups.score = CLMOE_GROUP_TOP2_SUM;
    }
    if (!same)
        *field = number;
    return same || number > 1 || grouped;
}

/* The tensors are what they are: the field must say the same. */
static bool fits_shared(const char *name, const json_t *value, const clmoe_layer_desc *desc) {
    uint32_t number = (uint32_t)json_integer_value(value), width = desc->shared.hidden_dim;
    if (json_is_string(value))
        return width == 0;
    if (desc->shared_gate && !strstr(name, "size")) /* Qwen2's width has a field of its own */
        return number > 0;
    return strstr(name, "size") ? number == width : number * desc->experts.hidden_dim == width;
}

/*
 * Makes `want`, the descriptor without the field, that with it. False: there is none, for the
 * value has no meaning for any family that computes what `want` says.
 */
static bool apply(const json_t *config, size_t field, const json_t *whole, clmoe_layer_desc *want) {
    const json_t *value = first(whole);
    double number = json_number_value(value);
    static const char *const scores[] = {"softmax", "sigmoid"};
    switch (fields[field].effect) {
    case NONE:
        return true;
    case NEVER:
        return false;
    case SCALE:
        want->router.scale = (float)number;
        return json_is_number(value) && number > 0;
    case TOP_K:
        want->top_k = (uint32_t)number;
        return json_is_integer(value) && number > 0;
    case RENORM:
        want->router.renorm.kind = json_is_true(value) ? CLMOE_RENORM_SUM : CLMOE_RENORM_NONE;
        return json_is_boolean(value);
    case ACTIVATION:
        return set_activation(value, want);
    case LIMIT:
        want->experts.limit = (float)number;
        return number > 0;
    case ALPHA:
        want->experts.alpha = (float)number;
        return number > 0;
    case TOPK_GROUPS:
        return set_groups(config, fields[field].name, value, want);
    case JITTER:
        if (want->router.score == CLMOE_SCORE_SPARSEMIXER)
            want->router.sparsemixer_eps = (float)number;
        return true;
    case SCORE:
        return want->router.score <= CLMOE_SCORE_SIGMOID &&
               strcmp(scores[want->router.score], json_string_value(value)) == 0;
    case SOFTCAP:
        want->router.softcap = (float)number;
        return true;
    case SELECT_BIAS:
        return want->router.select_bias == (json_is_true(value) ? 1u : 0u);
    case IDENTITY:
        return want->num_identity_experts == (uint32_t)number;
    case SHARED:
        return fits_shared(fields[field].name, value, want);
    }
    return false;
}

/* ---- Trying it ------------------------------------------------------------------------------ */

static void data_path(const char *model, const char *file, char *path, size_t size) {
    snprintf(path, size, "%s/checkpoints/%s/%s", TEST_DATA, model, file);
}

/* A directory with links to a model's tensors; its config.json is written for each case. */
typedef struct place {
    const char *model, *directory, *config;
} place;

static place link_model(const char *model) {
    static const char *const files[] = {"model.safetensors", "model.safetensors.index.json",
                                        "model-00001-of-00002.safetensors",
                                        "model-00002-of-00002.safetensors"};
    const char *directory = temp_directory(model);
    for (size_t i = 0; i < sizeof files / sizeof files[0]; i++) {
        char path[512], name[128];
        data_path(model, files[i], path, sizeof path);
        snprintf(name, sizeof name, "%s/%s", model, files[i]);
        if (access(path, F_OK) == 0 && access(temp_path(name), F_OK) != 0)
            assert_int_equal(symlink(path, temp_path(name)), 0);
    }
    char config[128];
    snprintf(config, sizeof config, "%s/config.json", model);
    return (place){model, directory, temp_path(config)};
}

static clmoe_status describe_config(const place *at, const json_t *config, clmoe_layer_desc *desc) {
    clmoe_checkpoint *checkpoint;
    char *text = json_dumps(config, 0);
    unlink(at->config); /* overwriting it would make some file systems write to disk */
    write_text(at->config, text);
    free(text);
    clmoe_status status = clmoe_checkpoint_open(at->directory, NULL, &checkpoint);
    if (status == CLMOE_SUCCESS)
        status = clmoe_checkpoint_layer(checkpoint, 0, desc);
    clmoe_checkpoint_close(checkpoint);
    return status;
}

static void check_case(const place *at, const json_t *config, size_t field, json_t *value,
                       const clmoe_layer_desc *plain) {
    clmoe_layer_desc got, want = *plain;
    char *text = json_dumps(value, JSON_ENCODE_ANY);
    json_t *changed = json_copy((json_t *)config);
    test_case("%s with %s %s", at->model, fields[field].name, text);
    json_object_set(changed, fields[field].name, value);
    clmoe_status status = describe_config(at, changed, &got);
    if (status != CLMOE_SUCCESS) {
        const char *nested = json_is_object(value) ? "router_gain" : fields[field].name;
        CHECK(strstr(clmoe_last_error(), fields[field].name) || strstr(clmoe_last_error(), nested),
              "it says: %s\n", clmoe_last_error());
        CHECK(fields[field].effect != NONE, "it says: %s\n", clmoe_last_error());
    } else {
        bool off = json_is_null(value) &&
                   (fields[field].effect != SHARED || !json_object_get(config, fields[field].name));
        CHECK(off || apply(config, field, value, &want), "accepted\n");
        if (want.router.renorm.kind != plain->router.renorm.kind)
            want.router.renorm.eps = got.router.renorm.eps; /* a family's own */
        compare_bits("descriptor", &got, &want, sizeof got);
    }
    json_decref(changed);
    free(text);
}

static void test_fields(void **state) {
    (void)state;
    for (size_t m = 0; m < sizeof models / sizeof models[0]; m++) {
        char path[512];
        clmoe_layer_desc plain;
        data_path(models[m], "config.json", path, sizeof path);
        json_t *config = json_load_file(path, 0, NULL), *value;
        const place at = link_model(models[m]);
        test_case("%s as it is", models[m]);
        OK(describe_config(&at, config, &plain));
        for (size_t f = 0; f < sizeof fields / sizeof fields[0]; f++) {
            json_t *values = json_loads(fields[f].values, 0, NULL);
            CHECK(values != NULL, "%s\n", fields[f].values);
            size_t i;
            json_array_foreach(values, i, value) {
                check_case(&at, config, f, value, &plain);
            }
            json_decref(values);
        }
        json_decref(config);
    }
}

/* ---- What published files have ----------------------------------------------------------------
 */

/* Fields that a family's files have and its model does not read; with `refused`, of another value.
 */
static const struct {
    const char *model, *fields, *refused;
} published[] = {
    {"gpt_oss", "{\"experts_per_token\": 2, \"initial_context_length\": 4096}", NULL},
    {"gpt_oss", "{\"experts_per_token\": 5}", "experts_per_token"},
    {"hunyuan_v1_moe",
     "{\"use_mixed_mlp_moe\": true, \"moe_drop_tokens\": false, \"capacity_factor\": 1.0,"
     " \"moe_random_routing_dropped_token\": false, \"group_limited_greedy\": false,"
     " \"moe_layer_num_skipped\": 0, \"cla_share_factor\": 2, \"norm_type\": \"rms\"}",
     NULL},
    {"hunyuan_v1_moe", "{\"use_mixed_mlp_moe\": false}", "use_mixed_mlp_moe"},
    {"hunyuan_v1_moe", "{\"moe_drop_tokens\": true}", "moe_drop_tokens"},
    {"mixtral", "{\"capacity_factor\": 1.0}", "capacity_factor"},
    {"ernie4_5_moe",
     "{\"moe_gate\": \"topk\", \"moe_capacity\": [64, 64, 64], \"moe_use_aux_free\": true,"
     " \"moe_aux_loss_lambda\": 0.01, \"moe_group\": \"world\", \"moe_dropout_prob\": 0.0}",
     NULL},
    {"ernie4_5_moe", "{\"moe_gate\": \"top2\"}", "moe_gate"},
    {"ernie4_5_moe", "{\"moe_use_aux_free\": false}", "moe_use_aux_free"},
    {"minimax_m2",
     "{\"shared_moe_mode\": \"sigmoid\", \"shared_intermediate_size\": 0,"
     " \"use_routing_bias\": true, \"layernorm_mlp_beta\": 1.0}",
     NULL},
    {"minimax_m2", "{\"use_routing_bias\": false}", "use_routing_bias"},
    {"mixtral", "{\"shared_moe_mode\": \"sigmoid\"}", "shared_moe_mode"},
    {"lfm2_moe",
     "{\"block_ff_dim\": 40, \"block_ffn_dim_multiplier\": 1.0, \"block_use_swiglu\": true,"
     " \"block_mlp_init_scale\": 1.0}",
     NULL},
    {"longcat_flash", "{\"router_bias\": false, \"zero_expert_type\": \"identity\"}", NULL},
    {"longcat_flash", "{\"router_bias\": true}", "router_bias"},
    {"mixtral", "{\"_moe_implementation\": \"eager\", \"use_moe\": true}", NULL},
    {"deepseek_v3", "{\"scoring_func\": \"noaux_tc\"}", NULL},
    {"qwen3_moe", "{\"scoring_func\": \"noaux_tc\"}", "scoring_func"},
};

static void test_published(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof published / sizeof published[0]; i++) {
        char path[512];
        clmoe_layer_desc plain, got;
        data_path(published[i].model, "config.json", path, sizeof path);
        json_t *config = json_load_file(path, 0, NULL);
        json_t *more = json_loads(published[i].fields, 0, NULL);
        const place at = link_model(published[i].model);
        test_case("%s with %s", published[i].model, published[i].fields);
        CHECK(more != NULL, "%s\n", published[i].fields);
        OK(describe_config(&at, config, &plain));
        json_object_update(config, more);
        const clmoe_status status = describe_config(&at, config, &got);
        if (published[i].refused) {
            CHECK(status != CLMOE_SUCCESS && strstr(clmoe_last_error(), published[i].refused),
                  "status %d, it says: %s\n", (int)status, clmoe_last_error());
        } else {
            OK(status);
            compare_bits("descriptor", &got, &plain, sizeof got);
        }
        json_decref(more);
        json_decref(config);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(test_fields),
        TEST(test_published),
    };
    return cmocka_run_group_tests(tests, files_setup, files_teardown);
}
