#include "coded.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The family ----------------------------------------------------------------------------- */

/* CLMOE_UNSUPPORTED for a family that clmoe lacks. */
static clmoe_status check_supported(const config *c) {
    const char *types[] = {config_text_type(c), config_model_type(c)};
    for (size_t i = 0; i < 2; i++) {
        const char *feature = family_unsupported(types[i]);
        if (feature != NULL)
            return fail(CLMOE_UNSUPPORTED, "%s: model_type '%s' has %s, which clmoe does not have",
                        config_path(c), types[i], feature);
    }
    return CLMOE_SUCCESS;
}

/* `known`: the family of config.json's own model_type, or NULL. */
static clmoe_status check_assumption(const config *c, const family *known, const char *assume) {
    const char *type = config_model_type(c)[0] ? config_model_type(c) : config_text_type(c);
    char model[128] = "has no model_type";
    if (type[0] != '\0')
        snprintf(model, sizeof model, "model_type '%.60s' is not known", type);
    if (assume == NULL && known == NULL)
        return fail(CLMOE_UNSUPPORTED,
                    "%s: %s; if it computes what a known one does, say "
                    "which by options.assume (clmoe --assume), or 'pattern' to go by its tensors",
                    config_path(c), model);
    if (assume == NULL || (known != NULL && family_find(assume) == known))
        return CLMOE_SUCCESS;
    if (known != NULL)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "assume is '%s', but %s has model_type '%s', which is known and needs none",
                    assume, config_path(c), type);
    if (family_find(assume) == NULL && strcmp(assume, FAMILY_PATTERN) != 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "assume is '%s', which is neither a model_type that "
                    "clmoe knows nor '%s'",
                    assume, FAMILY_PATTERN);
    return CLMOE_SUCCESS;
}

clmoe_status checkpoint_choose_family(clmoe_checkpoint *c, const char *assume) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_supported(c->config));
    c->family = family_find(config_text_type(c->config));
    if (c->family == NULL)
        c->family = family_find(config_model_type(c->config));
    TRY(check_assumption(c->config, c->family, assume));
    c->assumed = c->family == NULL;
    if (c->assumed)
        c->family = family_find(assume);
done:
    return status;
}

/* ---- Finding -------------------------------------------------------------------------------- */

/* Finds the one prefix "...layers.N.mlp." under which there are experts. */
static clmoe_status find_prefix(const clmoe_checkpoint *c, block *b) {
    uint32_t layers = 0;
    for (size_t i = 0; i < c->num_tensors; i++) {
        const char *name = c->tensors[i].tensor->name;
        size_t length = block_prefix_length(name, b->layer);
        if (length == 0 || length >= MAX_PREFIX)
            continue;
        if (b->prefix[0] == '\0')
            memcpy(b->prefix, name, length); /* zeroed before */
        else if (strncmp(b->prefix, name, length) != 0 || b->prefix[length] != '\0')
            return fail(CLMOE_UNSUPPORTED, "%s: layer %u has two MoE blocks, %s and %.*s",
                        c->directory, b->layer, b->prefix, (int)length, name);
    }
    if (b->prefix[0] != '\0')
        return CLMOE_SUCCESS;
    clmoe_status status = config_uint(&b->config, FIELD_LAYERS, 0, &layers);
    if (status == CLMOE_SUCCESS && layers > 0 && b->layer >= layers)
        return fail(CLMOE_BAD_FILE, "%s: layer %u has no MoE block; %s is %u", c->directory,
                    b->layer, config_name(c->config, FIELD_LAYERS), layers);
    return fail(CLMOE_BAD_FILE, "%s: layer %u has no MoE block (model_type is '%s')", c->directory,
                b->layer, config_model_type(c->config));
}

/* Whether the block has a tensor of that name and the config a field; NULL: always. */
static bool bears_mark(const void *context, const char *tensor, const char *field) {
    const block *b = context;
    char name[2 * MAX_PREFIX];
    if (field != NULL && !config_has_name(b->checkpoint->config, field))
        return false;
    if (tensor == NULL)
        return true;
    snprintf(name, sizeof name, "%s%s", b->prefix, tensor);
    return checkpoint_find(b->checkpoint, name) != NULL;
}

/* The next tensor under the block's prefix: its name without the prefix, or NULL after the last. */
static const char *name_below(const block *b, size_t index) {
    const clmoe_checkpoint *c = b->checkpoint;
    size_t length = strlen(b->prefix);
    if (index >= c->num_tensors || strncmp(c->tensors[index].tensor->name, b->prefix, length) != 0)
        return NULL;
    return c->tensors[index].tensor->name + length;
}

static bool has_select_bias(const block *b) {
    uint32_t expert;
    const char *name;
    for (size_t i = checkpoint_lower_bound(b->checkpoint, b->prefix);
         (name = name_below(b, i)) != NULL; i++) {
        const name_pattern *pattern = pattern_find(name, "", &expert);
        if (pattern != NULL && pattern->role == ROLE_SELECT_BIAS)
            return true;
    }
    return false;
}

/* Whose rules hold where the tensors and fields tell. */
static const family *deduce_family(const block *b) {
    return family_deduce(bears_mark, b, has_select_bias(b),
                         config_has(b->checkpoint->config, FIELD_TOPK_METHOD));
}

clmoe_status block_find(const clmoe_checkpoint *c, uint32_t layer, block *b) {
    clmoe_status status = CLMOE_SUCCESS;
    memset(b, 0, sizeof *b);
    b->checkpoint = c;
    b->layer = layer;
    b->config = (config_reader){.config = c->config, .layer = layer};
    TRY(find_prefix(c, b));
    b->family = c->family ? c->family : deduce_family(b);
done:
    return status;
}

const char *clmoe_checkpoint_assumed(const clmoe_checkpoint *checkpoint, uint32_t layer) {
    block b;
    if (checkpoint == NULL || !checkpoint->assumed)
        return NULL;
    const error_sentence kept = error_keep();
    clmoe_status status = block_find(checkpoint, layer, &b);
    error_put_back(&kept);
    if (status != CLMOE_SUCCESS)
        return NULL;
    return b.family->deduced ? FAMILY_PATTERN : b.family->model_type;
}

/* ---- Collecting ----------------------------------------------------------------------------- */

static clmoe_status fail_unused(const block *b, const file_tensor *t, const char *name) {
    const char *feature = tensor_unsupported(name), *path = safetensors_path(t->file);
    if (feature != NULL)
        return fail(CLMOE_UNSUPPORTED, "%s: tensor '%s' means %s, which clmoe does not have", path,
                    t->tensor->name, feature);
    return fail(
        CLMOE_BAD_FILE,
        "%s: tensor '%s' is under the MoE block, but clmoe has no use for it (model_type '%s')",
        path, t->tensor->name, config_model_type(b->checkpoint->config));
}

/* Makes room for the role's tensors: one, or one for each expert if the pattern has a number. */
static clmoe_status begin_role(const block *b, block_role *role, const name_pattern *pattern) {
    role->pattern = pattern;
    role->count = strchr(pattern->name, '#') ? b->experts : 1;
    role->tensors = calloc(role->count, sizeof role->tensors[0]);
    if (role->tensors == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "no memory for the list of %u experts", b->experts);
    return CLMOE_SUCCESS;
}

/* Whether a role is of a matrix of the experts or the shared expert, which may be coded. */
static bool may_be_coded(int role) {
    return role >= ROLE_EXPERTS && (role - ROLE_EXPERTS) % PART_COUNT < PART_GATE_BIAS;
}

/* Makes the block's own entry of a matrix of codes. */
static clmoe_status accept_coded(block *b, const file_tensor *t, int role, coded *matrix,
                                 file_tensor *entry) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!may_be_coded(role))
        return fail(CLMOE_UNSUPPORTED, "%s: tensor '%s' is %s; clmoe takes only experts so coded",
                    safetensors_path(t->file), t->tensor->name, matrix->format->name);
    TRY(coded_accept(b->checkpoint, matrix));
    entry->coded = malloc(sizeof *matrix);
    if (entry->coded == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "no memory for tensor '%s'", t->tensor->name);
    *entry->coded = *matrix;
    entry->tensor = &entry->coded->plain;
    b->coded = b->coded ? b->coded : matrix->format->name;
done:
    return status;
}

/* Enters one tensor of the block, as the role of `pattern`; `matrix` NULL: it is not coded. */
static clmoe_status enter(block *b, const file_tensor *t, const name_pattern *pattern,
                          uint32_t expert, coded *matrix) {
    clmoe_status status = CLMOE_SUCCESS;
    block_role *role = &b->roles[pattern->role];
    bool numbered = strchr(pattern->name, '#') != NULL;
    /* Some frameworks also store matrices for identity experts, which nothing reads. */
    if (numbered && expert >= b->experts && expert < b->experts + b->identity_experts)
        return CLMOE_SUCCESS;
    if (numbered && expert >= b->experts)
        return fail(CLMOE_BAD_FILE, "%s: tensor '%s' is of expert %u, but %s is %u",
                    safetensors_path(t->file), t->tensor->name, expert,
                    config_name(b->checkpoint->config, FIELD_EXPERTS), b->experts);
    if (matrix == NULL && t->tensor->type > ST_BF16)
        return fail(CLMOE_UNSUPPORTED,
                    "%s: tensor '%s' has dtype %s; clmoe takes F32, F16, BF16 and F64",
                    safetensors_path(t->file), t->tensor->name, t->tensor->type_name);
    if (role->pattern != NULL && (role->pattern != pattern || role->tensors[expert].tensor != NULL))
        return fail(CLMOE_BAD_FILE, "%s: tensor '%s' has the role that '%s' has already",
                    safetensors_path(t->file), t->tensor->name, role->pattern->name);
    if (role->pattern == NULL)
        TRY(begin_role(b, role, pattern));
    role->tensors[expert] = *t;
    if (matrix != NULL)
        TRY(accept_coded(b, t, pattern->role, matrix, &role->tensors[expert]));
done:
    return status;
}

/* Finds what one tensor of the block is for; `name` is its name below the prefix. */
static clmoe_status collect(block *b, const file_tensor *t, const char *name) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t prefix = (size_t)(name - t->tensor->name);
    char plain[2 * MAX_PREFIX];
    coded_kind kind;
    coded matrix;
    uint32_t expert;
    TRY(coded_find(b->checkpoint, t, &kind, &matrix, plain));
    if (kind == CODED_BESIDE)
        return CLMOE_SUCCESS;
    const bool is_coded = kind == CODED_MATRIX;
    const name_pattern *pattern =
        pattern_find(is_coded ? plain + prefix : name, b->family->model_type, &expert);
    if (pattern == NULL)
        return fail_unused(b, t, name);
    TRY(enter(b, t, pattern, expert, is_coded ? &matrix : NULL));
done:
    return status;
}

/* CLMOE_BAD_FILE if a role has tensors of some experts, but not of all. */
static clmoe_status check_complete(const block *b, const block_role *role) {
    for (uint32_t e = 0; e < role->count; e++)
        if (role->tensors[e].tensor == NULL) {
            const char *number = strchr(role->pattern->name, '#');
            return fail(CLMOE_BAD_FILE, "%s: tensor '%s%.*s%u%s' is missing",
                        b->checkpoint->directory, b->prefix, (int)(number - role->pattern->name),
                        role->pattern->name, e, number + 1);
        }
    return CLMOE_SUCCESS;
}

clmoe_status block_collect(block *b) {
    const clmoe_checkpoint *c = b->checkpoint;
    const char *name;
    for (size_t i = checkpoint_lower_bound(c, b->prefix); (name = name_below(b, i)) != NULL; i++) {
        clmoe_status status = collect(b, &c->tensors[i], name);
        if (status != CLMOE_SUCCESS)
            return status;
    }
    for (int r = 0; r < ROLE_COUNT; r++) {
        clmoe_status status = check_complete(b, &b->roles[r]);
        if (status != CLMOE_SUCCESS)
            return status;
    }
    return b->coded ? CLMOE_SUCCESS : coded_check_none(b);
}

clmoe_status block_read_f32(const file_tensor *t, uint64_t first, size_t count, float *out) {
    if (t->coded != NULL)
        return coded_read_f32(t->coded, first, count, out);
    return safetensors_read_f32(t->file, t->tensor, first, count, out);
}

clmoe_status block_refuse(const block *b, const file_tensor *t, const char *why) {
    return fail(CLMOE_BAD_FILE, "%s: tensor '%s' has no use: %s (model_type '%s')",
                safetensors_path(t->file), t->tensor->name, why,
                config_text_type(b->checkpoint->config));
}

void block_release(block *b) {
    for (int r = 0; r < ROLE_COUNT; r++) {
        for (uint32_t e = 0; e < b->roles[r].count && b->roles[r].tensors != NULL; e++)
            free(b->roles[r].tensors[e].coded);
        free(b->roles[r].tensors);
    }
    memset(b, 0, sizeof *b);
}
