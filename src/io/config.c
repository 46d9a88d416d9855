#include "config.h"

#include "json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_NAMES  12
#define MAX_SCOPES 4

/* Names by meaning, the more specific first: "top_k" is also a sampling parameter of old files. */
static const char *const field_names[FIELD_COUNT][MAX_NAMES] = {
    [FIELD_DIM] = {"hidden_size", "d_model", "model_dim", "n_embd"},
    [FIELD_LAYERS] = {"num_layers", "num_hidden_layers", "n_layers", "n_layer"},
    [FIELD_EXPERTS] = {"num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts",
                       "num_moe_experts", "num_routed_experts", "n_experts"},
    [FIELD_IDENTITY_EXPERTS] = {"zero_expert_num"},
    [FIELD_TOP_K] = {"num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k",
                     "moe_k", "num_selected_experts", "top_k_experts", "num_experts_per_topk",
                     "top_k"},
    [FIELD_HIDDEN] = {"moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size",
                      "moe_ffn_hidden_size", "expert_hidden_size", "intermediate_size"},
    [FIELD_SHARED_HIDDEN] = {"shared_expert_intermediate_size",
                             "moe_shared_expert_intermediate_size", "moe_shared_intermediate_size",
                             "shared_intermediate_size"},
    [FIELD_SHARED_COUNT] = {"n_shared_experts", "num_shared_experts", "moe_num_shared_experts",
                            "num_shared_expert"},
    [FIELD_SCORE] = {"scoring_func", "score_func", "moe_router_activation_func",
                     "moe_router_score_function", "expert_selection_fn"},
    [FIELD_NUM_GROUPS] = {"n_group", "num_expert_group"},
    [FIELD_TOPK_GROUPS] = {"topk_group"},
    [FIELD_TOPK_METHOD] = {"topk_method"},
    [FIELD_RENORM] = {"norm_topk_prob", "moe_renormalize", "route_norm"},
    [FIELD_RENORM_P] = {"moe_normalize_expert_weights"},
    [FIELD_RENORM_MIN] = {"moe_norm_min"},
    [FIELD_SCALE] = {"routed_scaling_factor", "route_scale", "router_scaling_factor",
                     "moe_routed_scaling_factor"},
    [FIELD_SOFTCAP] = {"moe_router_logit_softcapping"},
    [FIELD_SPARSEMIXER_EPS] = {"router_jitter_noise"},
    [FIELD_SELECT_BIAS] = {"use_expert_bias"},
    [FIELD_ACTIVATION] = {"mlp_hidden_act", "ffn_act_fn", "hidden_act", "hidden_activation",
                          "activation_function"},
    [FIELD_LIMIT] = {"swiglu_limit"},
};

/* Where a file may keep the fields of its text model; the first path that exists is used. */
static const char *const text_paths[][2] = {
    {"text_config", NULL},
    {"thinker_config", "text_config"},
    {"language_config", NULL},
    {"llm_config", NULL},
};

/* Fields that turn on what clmoe lacks, unless they have the `harmless` value. */
static const struct {
    const char *name, *harmless, *feature;
} unsupported[] = {
    {"moe_latent_size", NULL, "experts behind a latent projection"},
    {"moe_apply_router_weight_on_input", "false", "weights on the experts' input"},
    {"shared_expert_combination_strategy", "\"sum\"", "this combination with the shared expert"},
    {"zero_expert_type", "\"identity\"", "zero experts other than identity"},
};

struct config {
    char *path;
    json_t *root;
    const json_t *scopes[MAX_SCOPES]; /* innermost first; the last is root */
    size_t num_scopes;
    const json_t *text; /* the text model's object, root if not nested */
};

/* ---- Looking up ---------------------------------------------------------------------------- */

/* The nth value of a field, over scopes and names; NULL when there are fewer. */
static const json_t *find_nth(const config *c, config_field field, size_t nth, const char **name) {
    for (size_t s = 0; s < c->num_scopes; s++)
        for (size_t i = 0; i < MAX_NAMES && field_names[field][i] != NULL; i++) {
            const json_t *value = json_object_get(c->scopes[s], field_names[field][i]);
            if (value == NULL || json_is_null(value) || nth-- > 0)
                continue;
            *name = field_names[field][i];
            return value;
        }
    return NULL;
}

bool config_has(const config *c, config_field field) {
    for (size_t s = 0; s < c->num_scopes; s++)
        for (size_t i = 0; i < MAX_NAMES && field_names[field][i] != NULL; i++)
            if (json_object_get(c->scopes[s], field_names[field][i]) != NULL)
                return true;
    return false;
}

bool config_has_name(const config *c, const char *name) {
    for (size_t s = 0; s < c->num_scopes; s++) {
        const json_t *value = json_object_get(c->scopes[s], name);
        if (value != NULL && !json_is_null(value))
            return true;
    }
    return false;
}

const char *config_name(const config *c, config_field field) {
    const char *name = field_names[field][0];
    find_nth(c, field, 0, &name);
    return name;
}

/* CLMOE_BAD_FILE: "FILE: NAME is VALUE, but WHAT". */
static clmoe_status fail_value(const config *c, const char *name, const json_t *value,
                               const char *what) {
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    fail(CLMOE_BAD_FILE, "%s: %s is %.60s, but %s", c->path, name, text ? text : "?", what);
    free(text);
    return CLMOE_BAD_FILE;
}

clmoe_status config_missing(const config *c, config_field field) {
    char names[256] = "";
    for (size_t i = 0; i < MAX_NAMES && field_names[field][i] != NULL; i++) {
        size_t used = strlen(names);
        snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", field_names[field][i]);
    }
    return fail(CLMOE_BAD_FILE, "%s: has none of the fields %s", c->path, names);
}

/* ---- Values -------------------------------------------------------------------------------- */

clmoe_status config_uint(const config *c, config_field field, uint32_t layer, uint32_t min,
                         uint32_t *value) {
    const char *name;
    const json_t *found = find_nth(c, field, 0, &name);
    if (json_is_array(found) && json_array_size(found) <= layer)
        return fail(CLMOE_BAD_FILE, "%s: %s has %zu entries, none for layer %u", c->path, name,
                    json_array_size(found), layer);
    if (json_is_array(found))
        found = json_array_get(found, layer);
    if (found == NULL)
        return CLMOE_SUCCESS;
    if (!json_is_integer(found) || json_integer_value(found) < min ||
        json_integer_value(found) > INT32_MAX)
        return fail_value(c, name, found,
                          min > 0 ? "must be a positive integer" : "must be a natural number");
    *value = (uint32_t)json_integer_value(found);
    return CLMOE_SUCCESS;
}

clmoe_status config_number(const config *c, config_field field, double *value) {
    const char *name;
    const json_t *found = find_nth(c, field, 0, &name);
    if (found == NULL)
        return CLMOE_SUCCESS;
    if (!json_is_number(found) || json_number_value(found) < 0)
        return fail_value(c, name, found, "must be a number, not negative");
    *value = json_number_value(found);
    return CLMOE_SUCCESS;
}

clmoe_status config_flag(const config *c, config_field field, bool *value) {
    const char *name;
    const json_t *found = find_nth(c, field, 0, &name);
    if (found == NULL)
        return CLMOE_SUCCESS;
    if (!json_is_boolean(found))
        return fail_value(c, name, found, "must be true or false");
    *value = json_is_true(found);
    return CLMOE_SUCCESS;
}

clmoe_status config_string(const config *c, config_field field, const char **value) {
    const char *name;
    const json_t *found = find_nth(c, field, 0, &name);
    if (json_is_object(found)) /* {"name": "silu"} */
        found = json_object_get(found, "name");
    if (found == NULL)
        return CLMOE_SUCCESS;
    if (!json_is_string(found))
        return fail_value(c, name, found, "must be a string");
    *value = json_string_value(found);
    return CLMOE_SUCCESS;
}

bool config_allows(const config *c, config_field field, uint32_t layer, uint64_t value) {
    const char *name;
    const json_t *found;
    size_t nth = 0;
    while ((found = find_nth(c, field, nth, &name)) != NULL) {
        if (json_is_array(found))
            found = json_array_get(found, layer);
        if (json_is_integer(found) && json_integer_value(found) >= 0 &&
            (uint64_t)json_integer_value(found) == value)
            return true;
        nth++;
    }
    return nth == 0;
}

clmoe_status config_check_features(const config *c) {
    for (size_t i = 0; i < sizeof unsupported / sizeof unsupported[0]; i++)
        for (size_t s = 0; s < c->num_scopes; s++) {
            const json_t *value = json_object_get(c->scopes[s], unsupported[i].name);
            if (value == NULL || json_is_null(value))
                continue;
            char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
            bool harmless = text != NULL && unsupported[i].harmless != NULL &&
                            strcmp(text, unsupported[i].harmless) == 0;
            if (!harmless)
                fail(CLMOE_UNSUPPORTED, "%s: %s is %.60s, but clmoe does not have %s", c->path,
                     unsupported[i].name, text ? text : "?", unsupported[i].feature);
            free(text);
            if (!harmless)
                return CLMOE_UNSUPPORTED;
        }
    return CLMOE_SUCCESS;
}

/* ---- Opening ------------------------------------------------------------------------------- */

/* Lists the objects to look in: the text model's nested FFN fields, the text model, the root. */
static void list_scopes(config *c) {
    c->text = c->root;
    for (size_t i = 0; i < sizeof text_paths / sizeof text_paths[0] && c->text == c->root; i++) {
        const json_t *at = json_object_get(c->root, text_paths[i][0]);
        if (text_paths[i][1] != NULL)
            at = json_object_get(at, text_paths[i][1]);
        if (json_is_object(at))
            c->text = at;
    }
    const json_t *ffn = json_object_get(c->text, "ffn_config");
    if (json_is_object(ffn))
        c->scopes[c->num_scopes++] = ffn;
    c->scopes[c->num_scopes++] = c->text;
    if (c->text != c->root)
        c->scopes[c->num_scopes++] = c->root;
}

clmoe_status config_open(const char *path, config **out) {
    clmoe_status status = CLMOE_SUCCESS;
    *out = NULL;
    config *c = calloc(1, sizeof *c);
    if (c == NULL || (c->path = malloc(strlen(path) + 1)) == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to open it", path));
    strcpy(c->path, path);
    TRY(json_read(path, &c->root));
    list_scopes(c);
    *out = c;
    c = NULL;
done:
    config_close(c);
    return status;
}

void config_close(config *c) {
    if (c == NULL)
        return;
    json_decref(c->root);
    free(c->path);
    free(c);
}

const char *config_path(const config *c) {
    return c->path;
}

const char *config_model_type(const config *c) {
    const char *type = json_string_value(json_object_get(c->root, "model_type"));
    return type ? type : "";
}

const char *config_text_type(const config *c) {
    const char *type = json_string_value(json_object_get(c->text, "model_type"));
    return type ? type : config_model_type(c);
}
