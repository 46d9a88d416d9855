#include "families.h"

#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* ---- Families ------------------------------------------------------------------------------- */

/* Softmax over all, then top-k. */
#define SOFTMAX(rule) .score = CLMOE_SCORE_SOFTMAX, .renorm = rule
/* Softmax over the chosen logits. */
#define TOPK_SOFTMAX .score = CLMOE_SCORE_SOFTMAX, .order = CLMOE_ORDER_TOPK_THEN_SCORE
/* Sigmoid; chosen with a selection bias. */
#define SIGMOID(rule, eps)                                                                         \
    .score = CLMOE_SCORE_SIGMOID, .renorm = rule, .renorm_eps = eps, .select_bias = true
/* DeepSeek-V3's: of `n` groups, those `k` with the largest sum of their two best. */
#define V3(rule, factor, n, k)                                                                     \
    SIGMOID(rule, 1e-20f), .scale = factor, .groups = GROUPS_TOP2, .num_groups = n,                \
                           .topk_groups = k, .shared = true

static const family families[] = {
    {"mixtral", SOFTMAX(RENORM_ALWAYS), .top_k = 2},
    {"minimax", SOFTMAX(RENORM_ALWAYS), .top_k = 2},
    {"qwen2_moe", SOFTMAX(RENORM_DEFAULT_OFF), .shared = true, .shared_gate = true, .top_k = 4},
    {"flint", .score = CLMOE_SCORE_SIGMOID, .renorm = RENORM_DEFAULT_ON, .shared = true,
     .top_k = 6},
    {"mellum", SOFTMAX(RENORM_BY_FLAG), .top_k = 8},
    {"lara_mini", SOFTMAX(RENORM_BY_FLAG), .shared = true},
    {"qwen3_moe", SOFTMAX(RENORM_DEFAULT_OFF), .top_k = 8},
    {"olmoe", SOFTMAX(RENORM_DEFAULT_OFF), .top_k = 8},
    {"flex_olmo", SOFTMAX(RENORM_DEFAULT_OFF), .top_k = 5},
    {"qwen3_next", SOFTMAX(RENORM_DEFAULT_ON), .shared = true, .shared_gate = true, .top_k = 10},
    {"qwen3_5_moe", SOFTMAX(RENORM_ALWAYS), .shared = true, .shared_gate = true, .experts = 256,
     .top_k = 8},
    {"qwen3_vl_moe", SOFTMAX(RENORM_ALWAYS), .experts = 60, .top_k = 4},
    {"qwen3_omni_moe", SOFTMAX(RENORM_DEFAULT_ON), .experts = 128, .top_k = 8},
    {"jamba", SOFTMAX(RENORM_NEVER), .top_k = 2},
    {"hunyuan_v1_moe", SOFTMAX(RENORM_ALWAYS), .shared = true},
    {"dbrx", SOFTMAX(RENORM_NORM), .experts = 4, .top_k = 1},
    {"ernie4_5_moe", SOFTMAX(RENORM_ALWAYS), .select_bias = true, .shared = true, .top_k = 6},
    {"longcat_flash", SOFTMAX(RENORM_NEVER), .scale = 6, .select_bias = true,
     .identity_experts = true, .top_k = 12},
    {"deepseek_v2", SOFTMAX(RENORM_NEVER), .scale = 1, .groups = GROUPS_MAX, .shared = true},
    {"mistral4", SOFTMAX(RENORM_DEFAULT_ON), .renorm_eps = 1e-20f, .scale = 1,
     .groups = GROUPS_TOP2, .num_groups = 1, .topk_groups = 1, .shared = true, .top_k = 4},

    {"granitemoe", TOPK_SOFTMAX, .top_k = 2},
    {"granitemoeshared", TOPK_SOFTMAX, .shared_beside = true, .top_k = 2},
    {"granitemoehybrid", TOPK_SOFTMAX, .shared_beside = true, .top_k = 2},
    {"granitemoe_swa", TOPK_SOFTMAX, .shared_beside = true, .top_k = 2},
    {"jetmoe", TOPK_SOFTMAX, .output_bias = true, .top_k = 2},
    {"aria", TOPK_SOFTMAX, .activation = "silu", .shared = true, .experts = 8, .top_k = 2},
    {"gpt_oss", TOPK_SOFTMAX, .router_bias = true, .expert_biases = true, .activation = "silu",
     .interleaved = true, .limit = 7, .clamp_by_field = true, .alpha = 1.702f, .up_shift = 1,
     .top_k = 4},
    {"cohere2_moe", TOPK_SOFTMAX, .score_by_field = true, .renorm = RENORM_BY_FLAG, .shared = true},
    {"llama4", .score = CLMOE_SCORE_SIGMOID, .order = CLMOE_ORDER_TOPK_THEN_SCORE,
     .weight_at = CLMOE_WEIGHT_AT_INPUT, .shared = true, .experts = 16, .top_k = 1},
    {"phimoe", .score = CLMOE_SCORE_SPARSEMIXER, .order = CLMOE_ORDER_TOPK_THEN_SCORE, .top_k = 2,
     .only_top_k = 2},

    {"deepseek_v3", V3(RENORM_DEFAULT_ON, 2.5f, 8, 4), .top_k = 8},
    {"deepseek_v32", V3(RENORM_DEFAULT_ON, 2.5f, 8, 4), .top_k = 8},
    {"kimi_linear", V3(RENORM_DEFAULT_ON, 2.446f, 1, 1), .top_k = 8},
    {"sarvam_mla", V3(RENORM_DEFAULT_ON, 2.5f, 1, 1), .top_k = 8},
    {"sarvam_moe", V3(RENORM_DEFAULT_ON, 2.5f, 1, 1), .top_k = 6},
    {"glm4_moe", V3(RENORM_DEFAULT_ON, 1, 1, 1), .top_k = 8},
    {"glm4v_moe", V3(RENORM_DEFAULT_ON, 1, 1, 1), .experts = 128, .top_k = 8},
    {"glm4_moe_lite", V3(RENORM_DEFAULT_ON, 1.8f, 1, 1), .top_k = 4},
    {"glm_moe_dsa", V3(RENORM_DEFAULT_ON, 2.5f, 1, 1), .top_k = 8},
    {"dots1", V3(RENORM_DEFAULT_OFF, 1, 1, 1)},
    {"exaone_moe", V3(RENORM_DEFAULT_ON, 2.5f, 1, 1), .top_k = 8},
    {"solar_open", V3(RENORM_DEFAULT_ON, 1, 1, 1), .top_k = 8},
    {"nemotron_h", V3(RENORM_DEFAULT_ON, 1, 1, 1), .default_activation = "relu2", .top_k = 2},
    {"step3p5", SIGMOID(RENORM_ALWAYS, 0), .scale = 1, .shared = true},
    {"mimo_v2_flash", SIGMOID(RENORM_BY_FLAG, 1e-20f), .scale = 1, .null_scale = true,
     .groups = GROUPS_TOP2, .num_groups = 1, .topk_groups = 1},
    {"minimax_m2", SIGMOID(RENORM_ALWAYS, 0), .top_k = 8},
    {"afmoe", SIGMOID(RENORM_ALWAYS, 1e-20f), .scale = 1, .shared = true, .top_k = 6},
    {"hy_v3", SIGMOID(RENORM_ALWAYS, 1e-20f), .scale = 2.826f, .shared = true, .top_k = 8},
    {"lfm2_moe", SIGMOID(RENORM_DEFAULT_ON, 1e-6f), .scale = 1, .activation = "silu", .top_k = 4},
    {"laguna", SIGMOID(RENORM_ALWAYS, 0), .scale = 1, .shared = true, .softcap = true, .top_k = 8},
    {"deepseek_v4", .score = CLMOE_SCORE_SQRT_SOFTPLUS, .score_by_field = true,
     .renorm = RENORM_ALWAYS, .renorm_eps = 1e-20f, .scale = 1.5f, .select_bias = true,
     .shared = true, .limit = 10, .clamp_by_field = true, .top_k = 6},
};

/* Marks of families, for model types outside the table; the first one that a block has decides. */
static const struct {
    const char *tensor, *field, *model_type;
} marks[] = {
    {"experts.mlp.v1", NULL, "dbrx"},
    {"experts.gate_up_proj_bias", NULL, "gpt_oss"},
    {"experts.fc1.weight", NULL, "aria"},
    {"input_linear.weight", NULL, "granitemoe"},
    {"gate.wg.weight", NULL, "hunyuan_v1_moe"},
    {"router.classifier.weight", "zero_expert_num", "longcat_flash"},
    {"moe_statics.e_score_correction_bias", NULL, "ernie4_5_moe"},
    {"router.weight", "interleave_moe_layer_step", "llama4"},
    {"router.weight", "expert_layer_period", "jamba"},
    {"expert_bias", "use_expert_bias", "lfm2_moe"},
    {"expert_bias", "router_scaling_factor", "hy_v3"},
    {"expert_bias", "route_scale", "afmoe"},
    {"experts.e_score_correction_bias", NULL, "laguna"},
    {"experts.0.w1.weight", "input_jitter_noise", "phimoe"},
    {"experts.0.w1.weight", "router_jitter_noise", NULL}, /* see family_deduce() */
};

/* What a file says alone, without a name; see family_deduce(). */
#define ANY_TENSORS                                                                                \
    .router_bias = true, .expert_biases = true, .shared_gate = true, .output_bias = true,          \
    .softcap = true
#define BY_FIELDS                                                                                  \
    .deduced = true, .score = CLMOE_SCORE_SOFTMAX, .score_by_field = true,                         \
    .renorm = RENORM_BY_FLAG, .renorm_eps = 1e-20f, .scale = 1, .shared = true, ANY_TENSORS
static const family by_bias = {"", .deduced = true, .score_by_field = true, ANY_TENSORS,
                               V3(RENORM_DEFAULT_ON, 1, 1, 1)};
static const family by_fields = {"", BY_FIELDS, .groups = GROUPS_TOP2};
static const family by_fields_max = {"", BY_FIELDS, .groups = GROUPS_MAX};

static const struct {
    const char *model_type, *feature;
} unsupported_families[] = {
    {"switch_transformers", "two stacks of layers, an encoder and a decoder"},
    {"nllb_moe", "two stacks of layers, an encoder and a decoder"},
    {"nllb-moe", "two stacks of layers, an encoder and a decoder"},
    {"gemma4", "a norm and a scale before the router"},
    {"diffusion_gemma", "a norm and a scale before the router"},
    {"openai_privacy_filter", "weights divided by top_k"},
    {"kolibri1", "a selection bias on logits, not on scores"},
    {"axk1", "a norm after the experts"},
    {"ernie4_5_vl_moe", "experts apart for text and images"},
    {"ernie4_5_moe_vl", "experts apart for text and images"},
};

/* Whether `type` is `name`, "_text" at its end ignored. */
static bool same_type(const char *name, const char *type) {
    size_t length = strlen(name);
    return strncmp(name, type, length) == 0 &&
           (type[length] == '\0' || strcmp(type + length, "_text") == 0);
}

const family *family_find(const char *model_type) {
    for (size_t i = 0; i < COUNT(families); i++)
        if (same_type(families[i].model_type, model_type))
            return &families[i];
    return NULL;
}

const family *family_deduce(mark_test bears, const void *context, bool has_select_bias,
                            bool has_topk_method) {
    for (size_t i = 0; i < COUNT(marks); i++)
        if (bears(context, marks[i].tensor, marks[i].field)) {
            const char *mixtral = has_select_bias ? "minimax_m2" : "mixtral";
            return family_find(marks[i].model_type ? marks[i].model_type : mixtral);
        }
    if (has_select_bias)
        return &by_bias;
    return has_topk_method ? &by_fields_max : &by_fields;
}

const char *family_unsupported(const char *model_type) {
    for (size_t i = 0; i < COUNT(unsupported_families); i++)
        if (same_type(unsupported_families[i].model_type, model_type))
            return unsupported_families[i].feature;
    return NULL;
}

/* ---- Tensor names --------------------------------------------------------------------------- */

/* Linear layers of an MLP by the names of gate, up and down. */
#define MLP(prefix, base, gate, up, down)                                                          \
    {prefix gate ".weight", base + PART_GATE, FORM_MATRIX, NULL},                                  \
        {prefix up ".weight", base + PART_UP, FORM_MATRIX, NULL},                                  \
        {prefix down ".weight", base + PART_DOWN, FORM_MATRIX, NULL},                              \
        {prefix gate ".bias", base + PART_GATE_BIAS, FORM_MATRIX, NULL},                           \
        {prefix up ".bias", base + PART_UP_BIAS, FORM_MATRIX, NULL}, {                             \
        prefix down ".bias", base + PART_DOWN_BIAS, FORM_MATRIX, NULL                              \
    }
#define FUSED(prefix, base, gate_up, down)                                                         \
    {prefix gate_up ".weight", base + PART_GATE_UP, FORM_MATRIX, NULL}, {                          \
        prefix down ".weight", base + PART_DOWN, FORM_MATRIX, NULL                                 \
    }

static const name_pattern patterns[] = {
    {"gate.weight", ROLE_ROUTER, FORM_MATRIX, NULL},
    {"router.weight", ROLE_ROUTER, FORM_MATRIX, NULL},
    {"router.layer.weight", ROLE_ROUTER, FORM_MATRIX, NULL},
    {"router.gate.weight", ROLE_ROUTER, FORM_MATRIX, NULL},
    {"router.classifier.weight", ROLE_ROUTER, FORM_MATRIX, NULL},
    {"gate.wg.weight", ROLE_ROUTER, FORM_MATRIX, NULL},
    {"router.bias", ROLE_ROUTER_BIAS, FORM_MATRIX, NULL},
    {"gate.e_score_correction_bias", ROLE_SELECT_BIAS, FORM_MATRIX, NULL},
    {"gate.bias", ROLE_SELECT_BIAS, FORM_MATRIX, "deepseek_v4"},
    {"e_score_correction_bias", ROLE_SELECT_BIAS, FORM_MATRIX, NULL},
    {"router.e_score_correction_bias", ROLE_SELECT_BIAS, FORM_MATRIX, NULL},
    {"experts.e_score_correction_bias", ROLE_SELECT_BIAS, FORM_MATRIX, NULL},
    {"moe_statics.e_score_correction_bias", ROLE_SELECT_BIAS, FORM_MATRIX, NULL},
    {"gate.moe_statics.e_score_correction_bias", ROLE_SELECT_BIAS, FORM_MATRIX, NULL},
    {"expert_bias", ROLE_SELECT_BIAS, FORM_MATRIX, NULL},
    {"gate.expert_bias", ROLE_SELECT_BIAS, FORM_MATRIX, NULL},
    {"bias", ROLE_OUTPUT_BIAS, FORM_MATRIX, NULL},
    {"shared_expert_gate.weight", ROLE_SHARED_GATE, FORM_MATRIX, NULL},

    MLP("experts.#.", ROLE_EXPERTS, "gate_proj", "up_proj", "down_proj"),
    MLP("experts.#.", ROLE_EXPERTS, "w1", "w3", "w2"),
    {"input_linear.weight", ROLE_EXPERTS + PART_GATE_UP, FORM_STACK, NULL},
    {"output_linear.weight", ROLE_EXPERTS + PART_DOWN, FORM_STACK, NULL},
    {"experts.gate_up_proj", ROLE_EXPERTS + PART_GATE_UP, FORM_STACK_ANY, NULL},
    {"experts.up_proj", ROLE_EXPERTS + PART_UP, FORM_STACK_ANY, NULL},
    {"experts.down_proj", ROLE_EXPERTS + PART_DOWN, FORM_STACK_ANY, NULL},
    {"experts.gate_up_proj_bias", ROLE_EXPERTS + PART_GATE_UP_BIAS, FORM_STACK_ANY, NULL},
    {"experts.down_proj_bias", ROLE_EXPERTS + PART_DOWN_BIAS, FORM_STACK_ANY, NULL},
    {"experts.fc1.weight", ROLE_EXPERTS + PART_GATE_UP, FORM_STACK_T, NULL},
    {"experts.fc2.weight", ROLE_EXPERTS + PART_DOWN, FORM_STACK_T, NULL},
    {"experts.mlp.w1", ROLE_EXPERTS + PART_GATE, FORM_FLAT, NULL},
    {"experts.mlp.v1", ROLE_EXPERTS + PART_UP, FORM_FLAT, NULL},
    {"experts.mlp.w2", ROLE_EXPERTS + PART_DOWN, FORM_FLAT_T, NULL},

    MLP("shared_experts.", ROLE_SHARED, "gate_proj", "up_proj", "down_proj"),
    MLP("shared_expert.", ROLE_SHARED, "gate_proj", "up_proj", "down_proj"),
    MLP("shared_mlp.", ROLE_SHARED, "gate_proj", "up_proj", "down_proj"),
    MLP("shared_experts.", ROLE_SHARED, "w1", "w3", "w2"),
    FUSED("shared_mlp.", ROLE_SHARED, "input_linear", "output_linear"),
    {"shared_experts.gate_up_proj.weight", ROLE_SHARED + PART_GATE_UP, FORM_MATRIX, NULL},
};

/* Ends of names that tell of a feature clmoe lacks. */
static const struct {
    const char *end, *feature;
} unsupported_tensors[] = {
    {"_blocks", "MXFP4 weights of another dtype"},
    {"_scales", "MXFP4 weights that are not beside it"},
    {"_scale_inv", "FP8 weights that are not beside it"},
    {"weight_scale", "coded weights that are not beside it"},
    {"input_scale", "coded weights that are not beside it"},
    {"weight_packed", "quantised weights of another dtype than U8"},
    {"qweight", "quantised weights"},
    {"qzeros", "quantised weights"},
    {"scales", "quantised weights"},
    {"g_idx", "quantised weights"},
    {"_latent_proj.weight", "experts behind a latent projection"},
    {"tid2eid", "hash routing"},
    {"per_expert_scale", "a norm and a scale before the router"},
    {"gate.weight_1", "experts apart for text and images"},
};

/* Whether `name` fits `pattern`, '#' standing for a number, which goes to *expert. */
static bool fits(const char *pattern, const char *name, uint32_t *expert) {
    *expert = 0;
    for (; *pattern != '\0'; pattern++) {
        if (*pattern != '#') {
            if (*name++ != *pattern)
                return false;
            continue;
        }
        size_t digits = strspn(name, "0123456789");
        if (digits == 0 || digits > 6 || (digits > 1 && name[0] == '0'))
            return false;
        *expert = (uint32_t)strtoul(name, NULL, 10);
        name += digits;
    }
    return *name == '\0';
}

const name_pattern *pattern_find(const char *name, const char *model_type, uint32_t *expert) {
    for (size_t i = 0; i < COUNT(patterns); i++)
        if ((patterns[i].model_type == NULL || same_type(patterns[i].model_type, model_type)) &&
            fits(patterns[i].name, name, expert))
            return &patterns[i];
    return NULL;
}

const char *tensor_unsupported(const char *name) {
    size_t length = strlen(name);
    for (size_t i = 0; i < COUNT(unsupported_tensors); i++) {
        size_t end = strlen(unsupported_tensors[i].end);
        if (length >= end && strcmp(name + length - end, unsupported_tensors[i].end) == 0)
            return unsupported_tensors[i].feature;
    }
    return NULL;
}

const char *role_example(int role) {
    for (size_t i = 0; i < COUNT(patterns); i++)
        if (patterns[i].role == role)
            return patterns[i].name;
    return "?";
}

/* ---- The block's place ---------------------------------------------------------------------- */

static const char *const layer_lists[] = {"layers.", "blocks.", "h."};
static const char *const block_names[] = {
    "mlp.", "block_sparse_moe.", "feed_forward.", "ffn.", "mixer.", "moe."};
static const char *const expert_names[] = {"experts.", "input_linear.weight"};

/* Other stacks of layers in the same files: multi-token prediction, speech, images. */
static const char *const other_stacks[] = {"mtp.", "talker.", "visual.", "vision_", "audio_"};

static bool is_other_stack(const char *name, const char *end) {
    for (size_t i = 0; i < COUNT(other_stacks); i++) {
        const char *at = strstr(name, other_stacks[i]);
        if (at != NULL && at < end && (at == name || at[-1] == '.'))
            return true;
    }
    return false;
}

/* The length of whichever of `names` text begins with, or 0. */
static size_t begins_with(const char *text, const char *const *names, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (strncmp(text, names[i], strlen(names[i])) == 0)
            return strlen(names[i]);
    return 0;
}

size_t block_prefix_length(const char *name, uint32_t layer) {
    for (const char *at = name; at != NULL; at = strchr(at, '.')) {
        at += *at == '.';
        size_t list = begins_with(at, layer_lists, COUNT(layer_lists));
        if (list == 0 || !isdigit((unsigned char)at[list]))
            continue;
        char *rest;
        if (strtoul(at + list, &rest, 10) != layer || *rest++ != '.')
            continue;
        size_t block = begins_with(rest, block_names, COUNT(block_names));
        if (block == 0 || begins_with(rest + block, expert_names, COUNT(expert_names)) == 0)
            continue;
        if (!is_other_stack(name, at))
            return (size_t)(rest - name) + block;
    }
    return 0;
}
