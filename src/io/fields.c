#include "fields.h"

#include <ctype.h>
#include <string.h>

#define COUNT(array) (sizeof(array) / sizeof(array)[0])
#define MAX_NAMES    12

static const struct {
    const char *names[MAX_NAMES];
    const char *neutral; /* NULL: no value is */
} fields[FIELD_COUNT] = {
    [FIELD_DIM] = {{"hidden_size", "d_model", "model_dim", "n_embd"}, "*"},
    [FIELD_LAYERS] = {{"num_layers", "num_hidden_layers", "n_layers", "n_layer"}, "*"},
    [FIELD_EXPERTS] = {{"num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts",
                        "num_moe_experts", "num_routed_experts", "n_experts"},
                       NULL},
    [FIELD_IDENTITY_EXPERTS] = {{"zero_expert_num"}, "0"},
    [FIELD_TOP_K] = {{"num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k",
                      "moe_k", "num_selected_experts", "top_k_experts", "num_experts_per_topk",
                      "experts_per_token", "top_k"},
                     NULL},
    [FIELD_HIDDEN] = {{"moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size",
                       "moe_ffn_hidden_size", "expert_hidden_size", "intermediate_size"},
                      NULL},
    [FIELD_SHARED_HIDDEN] = {{"shared_expert_intermediate_size",
                              "moe_shared_expert_intermediate_size", "moe_shared_intermediate_size",
                              "shared_intermediate_size", "shared_experts_intermediate_size",
                              "share_expert_dim"},
                             "0"},
    [FIELD_SHARED_COUNT] = {{"n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
                             "num_shared_expert"},
                            "0"},
    [FIELD_SHARED_COMBINE] = {{"shared_expert_combination_strategy"}, NULL},
    [FIELD_SCORE] = {{"scoring_func", "score_func", "moe_router_activation_func",
                      "moe_router_score_function", "expert_selection_fn", "score_function",
                      "moe_score_function", "router_score_func", "moe_router_activation"},
                     NULL},
    [FIELD_NUM_GROUPS] = {{"n_group", "num_expert_group", "num_expert_groups", "n_expert_groups",
                           "moe_router_num_groups"},
                          "0 1"},
    [FIELD_TOPK_GROUPS] = {{"topk_group", "num_limited_groups", "n_limited_groups",
                            "moe_router_group_topk"},
                           "0 1"},
    [FIELD_TOPK_METHOD] = {{"topk_method"}, NULL},
    [FIELD_RENORM] = {{"norm_topk_prob", "moe_renormalize", "route_norm"}, NULL},
    [FIELD_RENORM_P] = {{"moe_normalize_expert_weights"}, NULL},
    [FIELD_RENORM_MIN] = {{"moe_norm_min"}, NULL},
    [FIELD_SCALE] = {{"routed_scaling_factor", "route_scale", "router_scaling_factor",
                      "moe_routed_scaling_factor", "moe_router_scaling_factor",
                      "moe_router_topk_scaling_factor", "router_scale", "expert_weights_scale"},
                     "1 1.0"},
    [FIELD_SOFTCAP] = {{"moe_router_logit_softcapping", "router_logit_softcapping"}, "0 0.0"},
    [FIELD_SPARSEMIXER_EPS] = {{"router_jitter_noise"}, "*"}, /* else of training alone */
    [FIELD_SELECT_BIAS] = {{"use_expert_bias", "moe_router_enable_expert_bias"}, "false"},
    [FIELD_MLP_BIAS] = {{"mlp_bias", "use_bias"}, "false"},
    [FIELD_ACTIVATION] = {{"mlp_hidden_act", "ffn_act_fn", "hidden_act", "hidden_activation",
                           "activation_function"},
                          NULL},
    [FIELD_LIMIT] = {{"swiglu_limit"}, NULL},
    [FIELD_ALPHA] = {{"swiglu_alpha"}, NULL},
};

static const char *const weak_names[] = {"top_k", "intermediate_size", "ffn_hidden_size",
                                         "num_hidden_layers"};

/* Which layers have experts is told by their tensors; what trains or places them changes nothing.
 */
#define WHICH_LAYERS "*", NULL
#define TRAINING     "*", NULL
#define EXECUTION    "*", NULL
#define ELSEWHERE    "*", NULL

static const other_field others[] = {
    {"moe_layers", NULL, WHICH_LAYERS},
    {"moe_layer_freq", NULL, WHICH_LAYERS},
    {"moe_layer_interval", NULL, WHICH_LAYERS},
    {"moe_layer_start_index", NULL, WHICH_LAYERS},
    {"moe_layer_end_index", NULL, WHICH_LAYERS},
    {"moe_layers_enum", NULL, WHICH_LAYERS},
    {"interleave_moe_layer_step", NULL, WHICH_LAYERS},
    {"expert_layer_period", NULL, WHICH_LAYERS},
    {"expert_layer_offset", NULL, WHICH_LAYERS},
    {"enable_moe_block", NULL, WHICH_LAYERS},
    {"is_moe_layer", NULL, WHICH_LAYERS},
    {"moe_layer_num_skipped", NULL, WHICH_LAYERS},

    {"output_router_logits", NULL, TRAINING},
    {"router_aux_loss_coef", NULL, TRAINING},
    {"router_aux_loss_type", NULL, TRAINING},
    {"router_z_loss_coef", NULL, TRAINING},
    {"aux_loss_alpha", NULL, TRAINING},
    {"moe_aux_loss_coeff", NULL, TRAINING},
    {"moe_z_loss_coeff", NULL, TRAINING},
    {"moe_loss_weight", NULL, TRAINING},
    {"moe_jitter_eps", NULL, TRAINING},
    {"input_jitter_noise", NULL, TRAINING},
    {"moe_token_dropout", NULL, TRAINING},
    {"moe_dropout_prob", NULL, TRAINING},
    {"moe_aux_loss_lambda", NULL, TRAINING},
    {"load_balance_coeff", NULL, TRAINING},
    {"moe_capacity", "ernie4_5_moe", TRAINING},
    {"capacity_factor", "hunyuan_v1_moe", TRAINING},
    {"moe_random_routing_dropped_token", NULL, TRAINING},
    {"activation_dropout", NULL, TRAINING},
    {"gradient_clipping", NULL, TRAINING},

    {"ep_size", NULL, EXECUTION},
    {"experts_implementation", NULL, EXECUTION},
    {"_experts_implementation", NULL, EXECUTION},
    {"moe_implementation", NULL, EXECUTION},
    {"_moe_implementation", NULL, EXECUTION},
    {"use_grouped_mm", NULL, EXECUTION},
    {"moe_group", NULL, EXECUTION},
    {"moe_shared_expert_overlap", NULL, EXECUTION},
    {"enable_moe_fp32_combine", NULL, EXECUTION},
    {"router_dtype", NULL, "\"float32\" \"fp32\"", NULL},
    {"moe_router_dtype", NULL, "\"float32\" \"fp32\"", NULL},

    {"expert_dtype", NULL, "\"fp4\" \"fp8\"", NULL}, /* the tensors tell */

    {"temperature", NULL, "1 1.0", NULL}, /* of sampling, in old files */
    {"norm_eps", NULL, ELSEWHERE},
    {"norm_epsilon", NULL, ELSEWHERE},
    {"norm_type", NULL, ELSEWHERE},
    {"floor_scale", NULL, ELSEWHERE}, /* of the temperature of attention */
    {"attn_scale", NULL, ELSEWHERE},
    {"clip_qkv", NULL, ELSEWHERE},
    {"normalization_function", NULL, ELSEWHERE},
    {"cla_share_factor", NULL, ELSEWHERE}, /* of attention's keys */
    {"gating", "laguna", ELSEWHERE},       /* of attention's output */
    {"n_groups", "nemotron_h", ELSEWHERE}, /* of Mamba */
    {"o_groups", NULL, ELSEWHERE},         /* of attention's output */
    {"mamba_n_groups", NULL, ELSEWHERE},
    {"mlp_alpha_factor", "minimax", ELSEWHERE}, /* of the sum behind the block */
    {"mlp_beta_factor", "minimax", ELSEWHERE},
    {"layernorm_mlp_alpha", "minimax", ELSEWHERE},
    {"layernorm_mlp_beta", NULL, ELSEWHERE},
    {"block_ff_dim", "lfm2_moe", ELSEWHERE}, /* of dense layers */
    {"block_ffn_dim_multiplier", "lfm2_moe", ELSEWHERE},
    {"block_norm_eps", "lfm2_moe", ELSEWHERE},
    {"block_use_swiglu", "lfm2_moe", ELSEWHERE},
    {"block_mlp_init_scale", "lfm2_moe", ELSEWHERE},
    {"block_out_init_scale", "lfm2_moe", ELSEWHERE},
    {"shared_moe_mode", "minimax", ELSEWHERE}, /* of a shared expert that there is not */
    {"shared_moe_mode", "minimax_m2", ELSEWHERE},

    /* What a family always is. */
    {"use_mixed_mlp_moe", "hunyuan_v1_moe", "true", "a block without a shared expert"},
    {"moe_drop_tokens", NULL, "false", "a capacity that a config gives"},
    {"group_limited_greedy", NULL, "false", "groups of another rule"},
    {"moe_gate", "ernie4_5_moe", "\"topk\"", "another rule of choice"},
    {"moe_use_aux_free", "ernie4_5_moe", "true", "a choice without a selection bias"},
    {"router_bias", "longcat_flash", "false", "a bias of the router"},
    {"use_grouped_topk", "kimi_linear", "true", "a choice without groups"},
    {"use_routing_bias", "minimax_m2", "true", "a choice without a selection bias"},
    {"moe_router_use_sigmoid", "hy_v3", "true", "another score"},
    {"moe_router_use_sigmoid", "laguna", "true", "another score"},
    {"use_gated_activation", "cohere2_moe", "true", "experts without a gate"},
    {"use_moe", NULL, "true", "layers without experts"},
    {"uniform_expert_assignment", NULL, "false", "a choice that is not the router's"},

    {"moe_latent_size", NULL, "", "experts behind a latent projection"},
    {"moe_apply_router_weight_on_input", NULL, "false", "weights on the experts' input"},
    {"zero_expert_type", NULL, "\"identity\"", "zero experts other than identity"},
    {"swiglu_limits", NULL, "0 0.0", "clamps behind the activation"},
    {"swiglu_limits_shared", NULL, "0 0.0", "clamps behind the activation"},
    {"expert_capacity", NULL, "", "a capacity that a config gives"},
};

/*
 * Words, which stand at the beginning of a part of the name between underscores: of the block;
 * perhaps of the block; of something else.
 */
static const char *const certain_words[] = {"expert", "moe", "rout", "gating"};
static const char *const perhaps_words[] = {
    "gate", "act",     "activ", "norm",  "renorm",  "scal",    "limit",      "scor",
    "glu",  "swiglu",  "geglu", "alpha", "group",   "capac",   "jitter",     "share",
    "bias", "softcap", "clamp", "clip",  "latent",  "topk",    "multiplier", "temperature",
    "gelu", "silu",    "swish", "relu",  "softmax", "sigmoid", "sinkhorn"};
static const char *const elsewhere_words[] = {
    "attn",  "attention", "rope",   "rotary",    "q",           "k",        "v",      "qk",
    "kv",    "qkv",       "query",  "key",       "value",       "lora",     "ssm",    "mamba",
    "conv",  "time",      "vision", "image",     "audio",       "video",    "vocab",  "embed",
    "lm",    "head",      "logit",  "final",     "initializer", "residual", "rms",    "layer",
    "index", "position",  "hc",     "projector", "multimodal",  "mtp",      "tie",    "dropout",
    "kda",   "codec",     "code",   "encoder",   "dense",       "mup",      "sliding"};

/* Of names of objects. */
static const char *const block_objects[] = {"layer", "block", "ffn", "mlp"};
static const char *const outside_objects[] = {
    "attn",  "attention", "vision",  "visual",  "image",  "audio",     "video",    "speech",
    "codec", "code",      "encoder", "decoder", "talker", "projector", "label2id", "mtp"};

/* ---- Names ---------------------------------------------------------------------------------- */

const char *field_alias(config_field field, size_t index) {
    return index < MAX_NAMES ? fields[field].names[index] : NULL;
}

config_field field_of(const char *name) {
    for (config_field f = 0; f < FIELD_COUNT; f++)
        for (size_t i = 0; i < MAX_NAMES && fields[f].names[i] != NULL; i++)
            if (strcmp(fields[f].names[i], name) == 0)
                return f;
    return FIELD_COUNT;
}

bool field_name_is_weak(const char *name) {
    for (size_t i = 0; i < COUNT(weak_names); i++)
        if (strcmp(weak_names[i], name) == 0)
            return true;
    return false;
}

const char *field_neutral(config_field field) {
    return fields[field].neutral ? fields[field].neutral : "";
}

const other_field *field_other(const char *name, const char *model_type) {
    for (size_t i = 0; i < COUNT(others); i++)
        if (strcmp(others[i].name, name) == 0 &&
            (others[i].model_type == NULL || strcmp(others[i].model_type, model_type) == 0))
            return &others[i];
    return NULL;
}

/* ---- Words ---------------------------------------------------------------------------------- */

/* Whether a word of `name` begins with `start`, or is it. Short ones, as "q" and "act", must be
 * the whole word: "partial" and "factor" are not "act". */
static bool has_word(const char *name, const char *start) {
    size_t length = strlen(start);
    for (const char *at = name; *at != '\0';) {
        size_t word = strcspn(at, "_-. "), i = 0;
        while (i < length && i < word && tolower((unsigned char)at[i]) == start[i])
            i++;
        if (i == length && (length > 3 || word == length))
            return true;
        at += word;
        at += strspn(at, "_-. ");
    }
    return false;
}

static bool has_any_word(const char *name, const char *const *words, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (has_word(name, words[i]))
            return true;
    return false;
}

bool field_is_suspicious(const char *name, bool certain) {
    if (has_any_word(name, certain_words, COUNT(certain_words)))
        return true;
    return !certain && has_any_word(name, perhaps_words, COUNT(perhaps_words)) &&
           !has_any_word(name, elsewhere_words, COUNT(elsewhere_words));
}

bool field_is_general(const char *name) {
    config_field field = field_of(name);
    return field_name_is_weak(name) || field == FIELD_ACTIVATION || field == FIELD_MLP_BIAS;
}

field_place field_place_inside(const char *name, field_place around) {
    size_t length = strlen(name), end = strlen("_config");
    if (has_any_word(name, outside_objects, COUNT(outside_objects)))
        return PLACE_OUTSIDE;
    if (has_any_word(name, block_objects, COUNT(block_objects)) || field_is_suspicious(name, true))
        return PLACE_BLOCK;
    if (length > end && strcmp(name + length - end, "_config") == 0)
        return PLACE_OUTSIDE;
    return around == PLACE_BLOCK ? PLACE_BLOCK : PLACE_UNKNOWN;
}
