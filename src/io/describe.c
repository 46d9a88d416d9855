/* clmoe_checkpoint_layer(): the block's fields and shapes -> a layer descriptor. */
#include "checkpoint.h"
#include "runtime/structs.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define MAX_EXPERTS   4096
#define MAX_TOP_K     256
#define MAX_NORM_MIN  1e-6
#define MAX_DIMENSION INT32_MAX

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

/* ---- Counts --------------------------------------------------------------------------------- */

/* E, Z and K, checked against each other. */
static clmoe_status read_counts(block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    desc->num_experts = b->family->experts;
    desc->top_k = b->family->top_k;
    TRY(config_uint(&b->config, FIELD_EXPERTS, 1, &desc->num_experts));
    if (b->family->identity_experts)
        TRY(config_uint(&b->config, FIELD_IDENTITY_EXPERTS, 0, &desc->num_identity_experts));
    TRY(config_uint(&b->config, FIELD_TOP_K, 1, &desc->top_k));
    if (desc->num_experts == 0)
        TRY(config_missing(c, FIELD_EXPERTS));
    if (desc->top_k == 0)
        TRY(config_missing(c, FIELD_TOP_K));
    uint64_t columns = (uint64_t)desc->num_experts + desc->num_identity_experts;
    if (columns > MAX_EXPERTS)
        TRY(fail(CLMOE_UNSUPPORTED, "%s: %s is %u, but clmoe takes at most %d experts",
                 config_path(c), config_name(c, FIELD_EXPERTS), desc->num_experts, MAX_EXPERTS));
    if (desc->top_k > columns)
        TRY(fail(CLMOE_BAD_FILE, "%s: %s is %u, but %s is %u", config_path(c),
                 config_name(c, FIELD_TOP_K), desc->top_k, config_name(c, FIELD_EXPERTS),
                 desc->num_experts));
    if (b->family->only_top_k > 0 && desc->top_k != b->family->only_top_k)
        TRY(config_refuse(&b->config, FIELD_TOP_K, "its family has another number fixed"));
    if (desc->top_k > MAX_TOP_K)
        TRY(fail(CLMOE_UNSUPPORTED, "%s: %s is %u, but clmoe takes at most %d", config_path(c),
                 config_name(c, FIELD_TOP_K), desc->top_k, MAX_TOP_K));
    b->experts = desc->num_experts;
    b->identity_experts = desc->num_identity_experts;
done:
    return status;
}

/* ---- Shapes --------------------------------------------------------------------------------- */

static bool same_shape(const st_tensor *t, uint32_t rank, const uint64_t *shape) {
    return t->rank == rank && memcmp(t->shape, shape, rank * sizeof shape[0]) == 0;
}

static clmoe_status fail_shape(const file_tensor *t, uint32_t rank, const uint64_t *shape) {
    char is[192], should[192];
    safetensors_print_shape(t->tensor->rank, t->tensor->shape, is, sizeof is);
    safetensors_print_shape(rank, shape, should, sizeof should);
    return fail(CLMOE_BAD_FILE, "%s: tensor '%s' has shape [%s], but must have [%s]",
                safetensors_path(t->file), t->tensor->name, is, should);
}

/* A vector of `length`, in whatever rank. */
static clmoe_status check_vector(const block *b, int role, uint64_t length) {
    const file_tensor *t = b->roles[role].tensors;
    if (!block_has(b, role) || t->tensor->elements == length)
        return CLMOE_SUCCESS;
    return fail_shape(t, 1, &length);
}

/* CLMOE_BAD_FILE: no tensor has the role. Says which the block has, besides experts' by number. */
static clmoe_status fail_missing(const block *b, int role) {
    char names[200] = "";
    const char *separator = "";
    for (int r = 0; r < ROLE_COUNT; r++) {
        size_t used = strlen(names);
        if (!block_has(b, r))
            continue;
        snprintf(names + used, sizeof names - used, "%s%s", separator, b->roles[r].pattern->name);
        separator = ", ";
    }
    return fail(CLMOE_BAD_FILE,
                "%s: tensor '%s%s', or one that does its work, is missing; there are %s",
                b->checkpoint->directory, b->prefix, role_example(role), names);
}

/* A dimension read from a tensor must be one of the config's values of the field. */
static clmoe_status check_dimension(block *b, const file_tensor *t, config_field field,
                                    uint64_t value) {
    const config *c = b->checkpoint->config;
    uint32_t said = 0;
    if (value > 0 && value <= MAX_DIMENSION && config_allows(&b->config, field, value))
        return CLMOE_SUCCESS;
    clmoe_status status = config_uint(&b->config, field, 1, &said);
    if (status != CLMOE_SUCCESS)
        return status;
    char is[192];
    safetensors_print_shape(t->tensor->rank, t->tensor->shape, is, sizeof is);
    return fail(CLMOE_BAD_FILE, "%s: tensor '%s' has shape [%s], but %s is %u",
                safetensors_path(t->file), t->tensor->name, is, config_name(c, field), said);
}

/* The router's matrix gives D; its rows must be R. */
static clmoe_status read_router(block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const file_tensor *router = b->roles[ROLE_ROUTER].tensors;
    if (!block_has(b, ROLE_ROUTER))
        return fail_missing(b, ROLE_ROUTER);
    const st_tensor *t = router->tensor;
    uint64_t columns = b->experts + b->identity_experts, dim = t->rank == 2 ? t->shape[1] : 0;
    TRY(check_dimension(b, router, FIELD_DIM, dim));
    if (t->shape[0] != columns)
        TRY(fail_shape(router, 2, (const uint64_t[]){columns, dim}));
    desc->dim = (uint32_t)dim;
    TRY(check_vector(b, ROLE_ROUTER_BIAS, columns));
    TRY(check_vector(b, ROLE_SELECT_BIAS, columns));
    TRY(check_vector(b, ROLE_SHARED_GATE, dim));
    TRY(check_vector(b, ROLE_OUTPUT_BIAS, dim));
done:
    return status;
}

/* ---- MLPs ----------------------------------------------------------------------------------- */

/* An MLP of the block: the experts, or the shared expert. */
typedef struct mlp {
    block *block;
    int base;         /* ROLE_EXPERTS or ROLE_SHARED */
    uint64_t experts; /* 1 for the shared expert */
    uint64_t dim, hidden;
    bool transposed; /* what FORM_STACK_ANY is here */
} mlp;

static const st_tensor *mlp_tensor(const mlp *m, mlp_part part) {
    return block_has(m->block, m->base + (int)part)
               ? m->block->roles[m->base + (int)part].tensors[0].tensor
               : NULL;
}

/* Whether the part is stored with its rows and columns exchanged. */
static bool part_transposed(const mlp *m, mlp_part part) {
    const name_pattern *pattern = m->block->roles[m->base + (int)part].pattern;
    if (pattern == NULL)
        return false;
    return pattern->form == FORM_STACK_T || pattern->form == FORM_FLAT_T ||
           (pattern->form == FORM_STACK_ANY && m->transposed);
}

/*
 * Tells the two orders of a stack apart: the first matrix is [N,D] or [D,N], down is [D,H] or
 * [H,D]. A square one leaves it to the other; both can be square only in a plain MLP with H = D,
 * which then counts as not transposed.
 */
static bool find_order(const mlp *m, const st_tensor *first, const st_tensor *down) {
    if (first->rank != 3 || down->rank != 3)
        return false;
    if (first->shape[1] != first->shape[2])
        return first->shape[1] == m->dim;
    return down->shape[1] != down->shape[2] && down->shape[2] == m->dim;
}

/* H from the first matrix, as far as its shape makes sense; the shapes are checked afterwards. */
static uint64_t find_hidden(const mlp *m, mlp_part part, const st_tensor *t) {
    tensor_form form = m->block->roles[m->base + (int)part].pattern->form;
    uint64_t rows = 0;
    if (form == FORM_MATRIX && t->rank == 2)
        rows = t->shape[0];
    else if (form == FORM_FLAT && t->rank == 2)
        rows = t->shape[0] / m->experts;
    else if (t->rank == 3)
        rows = t->shape[part_transposed(m, part) ? 2 : 1];
    return part == PART_GATE_UP ? rows / 2 : rows;
}

/* The shape that a part's tensors must have; returns the rank. */
static uint32_t part_shape(const mlp *m, mlp_part part, uint64_t *shape) {
    bool bias = part >= PART_GATE_BIAS;
    mlp_part matrix = bias ? part - PART_GATE_BIAS : part;
    uint64_t rows = matrix == PART_DOWN      ? m->dim
                    : matrix == PART_GATE_UP ? 2 * m->hidden
                                             : m->hidden;
    uint64_t cols = matrix == PART_DOWN ? m->hidden : m->dim;
    tensor_form form = m->block->roles[m->base + (int)part].pattern->form;
    bool transposed = !bias && part_transposed(m, part);
    bool flat = form == FORM_FLAT || form == FORM_FLAT_T;
    uint32_t rank = 0;
    if (form != FORM_MATRIX && !flat)
        shape[rank++] = m->experts;
    shape[rank++] = (transposed ? cols : rows) * (flat ? m->experts : 1);
    if (!bias)
        shape[rank++] = transposed ? rows : cols;
    return rank;
}

static clmoe_status check_shapes(const mlp *m) {
    uint64_t shape[3];
    for (mlp_part part = 0; part < PART_COUNT; part++) {
        const block_role *role = &m->block->roles[m->base + (int)part];
        uint32_t rank = role->pattern ? part_shape(m, part, shape) : 0;
        for (uint32_t e = 0; e < role->count; e++)
            if (!same_shape(role->tensors[e].tensor, rank, shape))
                return fail_shape(&role->tensors[e], rank, shape);
    }
    return CLMOE_SUCCESS;
}

/* Which matrices and biases there are; CLMOE_BAD_FILE if they do not belong together. */
static clmoe_status check_parts(const mlp *m) {
    const block *b = m->block;
    bool has[PART_COUNT];
    for (int part = 0; part < PART_COUNT; part++)
        has[part] = block_has(b, m->base + part);
    if (!has[PART_UP] && !has[PART_GATE_UP])
        return fail_missing(b, m->base + PART_UP);
    if (!has[PART_DOWN])
        return fail_missing(b, m->base + PART_DOWN);
    if (has[PART_GATE_UP] && (has[PART_UP] || has[PART_GATE]))
        return fail(CLMOE_BAD_FILE, "%s: '%s' holds both fused and separate matrices of an MLP",
                    b->checkpoint->directory, b->prefix);
    if (has[PART_GATE] &&
        b->roles[m->base + PART_GATE].pattern->form != b->roles[m->base + PART_UP].pattern->form)
        return fail(CLMOE_BAD_FILE, "%s: '%s' holds gate and up matrices of different forms",
                    b->checkpoint->directory, b->prefix);
    for (int part = PART_GATE; part <= PART_GATE_UP; part++)
        if (has[part] != has[part + PART_GATE_BIAS] &&
            (has[PART_GATE_BIAS] || has[PART_UP_BIAS] || has[PART_GATE_UP_BIAS]))
            return fail_missing(b, m->base + part + (has[part] ? PART_GATE_BIAS : 0));
    return CLMOE_SUCCESS;
}

/* Matrices of each expert by itself are put together, gate before up; stacks stay as they are. */
static clmoe_gate_layout find_layout(const mlp *m) {
    bool fused = mlp_tensor(m, PART_GATE_UP) != NULL;
    if (fused && m->base == ROLE_EXPERTS && m->block->family->interleaved)
        return CLMOE_GATE_INTERLEAVED;
    if (fused)
        return CLMOE_GATE_CONCAT;
    if (mlp_tensor(m, PART_GATE) == NULL)
        return CLMOE_GATE_NONE;
    bool stacked = m->block->roles[m->base + PART_UP].pattern->form != FORM_MATRIX;
    return stacked ? CLMOE_GATE_SEPARATE : CLMOE_GATE_CONCAT;
}

/* Fills the sizes and the layout of an MLP from its tensors. */
static clmoe_status describe_mlp(mlp *m, clmoe_mlp_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(check_parts(m));
    mlp_part first = mlp_tensor(m, PART_GATE_UP) ? PART_GATE_UP : PART_UP;
    const st_tensor *matrix = mlp_tensor(m, first);
    m->transposed = find_order(m, matrix, mlp_tensor(m, PART_DOWN));
    m->hidden = find_hidden(m, first, matrix);
    if (m->base == ROLE_EXPERTS)
        TRY(check_dimension(m->block, &m->block->roles[m->base + (int)first].tensors[0],
                            FIELD_HIDDEN, m->hidden));
    TRY(check_shapes(m));
    desc->hidden_dim = (uint32_t)m->hidden;
    desc->gate_layout = find_layout(m);
    desc->gate_up_transposed = part_transposed(m, first);
    desc->down_transposed = part_transposed(m, PART_DOWN);
    desc->gate_up_bias = mlp_tensor(m, first == PART_UP ? PART_UP_BIAS : PART_GATE_UP_BIAS) != NULL;
    desc->down_bias = mlp_tensor(m, PART_DOWN_BIAS) != NULL;
done:
    return status;
}

/* What the config says of the shared expert. */
typedef struct shared_fields {
    uint32_t width, count;    /* 0 also if absent */
    bool given;               /* one of them is positive */
    const char *given_name;   /* its name, the width's before the count's; or NULL */
    const char *refused_name; /* of one that is there and 0 or null, or NULL */
} shared_fields;

static clmoe_status read_shared(block *b, shared_fields *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    const config_field fields[] = {FIELD_SHARED_HIDDEN, FIELD_SHARED_COUNT};
    uint32_t values[2] = {0, 0};
    *s = (shared_fields){0};
    for (size_t i = 0; i < 2; i++) {
        TRY(config_uint(&b->config, fields[i], 0, &values[i]));
        if (values[i] > 0 && s->given_name == NULL)
            s->given_name = config_name(c, fields[i]);
        else if (values[i] == 0 && config_has(c, fields[i]))
            s->refused_name = config_name(c, fields[i]);
    }
    s->width = values[0];
    s->count = values[1];
    s->given = s->given_name != NULL && !b->family->shared_beside;
done:
    return status;
}

/* The shared expert is as wide as a field of its own says, or as so many experts. */
static clmoe_status check_shared_width(const block *b, const shared_fields *s,
                                       const clmoe_layer_desc *desc) {
    uint32_t is = desc->shared.hidden_dim;
    uint64_t width = s->width > 0 ? s->width : desc->experts.hidden_dim;
    if (!s->given || is == s->width || (s->count > 0 && is == s->count * width))
        return CLMOE_SUCCESS;
    return fail(CLMOE_BAD_FILE, "%s: %s is %u, but the shared expert's tensors have %u rows",
                config_path(b->checkpoint->config), s->given_name,
                s->width > 0 ? s->width : s->count, is);
}

/* Whether the block has a shared expert; an error if family, config and tensors disagree. */
static clmoe_status wants_shared(block *b, const shared_fields *s, bool *wants) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *path = config_path(b->checkpoint->config), *combine = "sum";
    const file_tensor *found = NULL;
    for (int part = 0; part < PART_COUNT && found == NULL; part++)
        if (block_has(b, ROLE_SHARED + part))
            found = b->roles[ROLE_SHARED + part].tensors;
    if (s->given && !b->family->shared)
        TRY(fail(CLMOE_UNSUPPORTED, "%s: %s is %u, but model_type '%s' has no shared expert", path,
                 s->given_name, s->width > 0 ? s->width : s->count,
                 config_text_type(b->checkpoint->config)));
    if (found != NULL && !b->family->shared)
        TRY(block_refuse(b, found, "the model_type has no shared expert"));
    if (found != NULL && s->refused_name != NULL)
        TRY(fail(CLMOE_BAD_FILE, "%s: %s gives no shared expert, but tensor '%s' is one's", path,
                 s->refused_name, found->tensor->name));
    *wants = s->given || found != NULL;
    TRY(config_string(&b->config, FIELD_SHARED_COMBINE, &combine));
    if (*wants && strcmp(combine, "sum") != 0)
        TRY(config_refuse(&b->config, FIELD_SHARED_COMBINE, "clmoe only adds the shared expert"));
done:
    return status;
}

/* CLMOE_BAD_FILE for biases of an MLP that the family, or the config, does not have. */
static clmoe_status check_biases(block *b) {
    clmoe_status status = CLMOE_SUCCESS;
    bool mlp_bias = b->family->expert_biases;
    TRY(config_flag(&b->config, FIELD_MLP_BIAS, &mlp_bias));
    for (int part = PART_GATE_BIAS; part <= PART_DOWN_BIAS; part++) {
        if (block_has(b, ROLE_EXPERTS + part) && !b->family->expert_biases)
            TRY(block_refuse(b, b->roles[ROLE_EXPERTS + part].tensors,
                             "the model_type's experts have no biases"));
        if (block_has(b, ROLE_SHARED + part) && !mlp_bias)
            TRY(block_refuse(b, b->roles[ROLE_SHARED + part].tensors,
                             "no field of config.json turns on biases"));
    }
done:
    return status;
}

static clmoe_status describe_mlps(block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    mlp experts = {.block = b, .base = ROLE_EXPERTS, .experts = b->experts, .dim = desc->dim};
    mlp shared = {.block = b, .base = ROLE_SHARED, .experts = 1, .dim = desc->dim};
    bool has_shared = false;
    shared_fields fields;
    TRY(describe_mlp(&experts, &desc->experts));
    TRY(read_shared(b, &fields));
    TRY(wants_shared(b, &fields, &has_shared));
    TRY(check_biases(b));
    if (has_shared) {
        TRY(describe_mlp(&shared, &desc->shared));
        TRY(check_shared_width(b, &fields, desc));
    }
    config_take(&b->config, FIELD_SHARED_HIDDEN, desc->shared.hidden_dim);
    if (desc->shared.hidden_dim % desc->experts.hidden_dim == 0)
        config_take(&b->config, FIELD_SHARED_COUNT,
                    desc->shared.hidden_dim / desc->experts.hidden_dim);
    desc->shared_gate = block_has(b, ROLE_SHARED_GATE);
    if (b->family->shared_gate && !b->family->deduced && has_shared && !desc->shared_gate)
        TRY(fail_missing(b, ROLE_SHARED_GATE));
    if (desc->shared_gate && !has_shared)
        TRY(fail_missing(b, ROLE_SHARED + PART_UP));
    desc->output_bias = block_has(b, ROLE_OUTPUT_BIAS);
done:
    return status;
}

/* ---- Switches ------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    clmoe_activation activation;
    float alpha;
} activations[] = {
    {"silu", CLMOE_ACT_SILU, 1},
    {"swish", CLMOE_ACT_SILU, 1},
    {"quick_gelu", CLMOE_ACT_SILU, 1.702f},
    {"gelu", CLMOE_ACT_GELU_ERF, 1},
    {"gelu_python", CLMOE_ACT_GELU_ERF, 1},
    {"gelu_new", CLMOE_ACT_GELU_TANH, 1},
    {"gelu_fast", CLMOE_ACT_GELU_TANH, 1},
    {"gelu_pytorch_tanh", CLMOE_ACT_GELU_TANH, 1},
    {"gelu_python_tanh", CLMOE_ACT_GELU_TANH, 1},
    {"relu", CLMOE_ACT_RELU, 1},
    {"relu2", CLMOE_ACT_RELU2, 1},
};

/* The row of an activation by its name; CLMOE_UNSUPPORTED if there is none. */
static clmoe_status find_activation(const block *b, const char *name, size_t *index) {
    for (*index = 0; *index < COUNT(activations); ++*index)
        if (strcmp(activations[*index].name, name) == 0)
            return CLMOE_SUCCESS;
    return config_refuse(&b->config, FIELD_ACTIVATION, "clmoe does not have this activation");
}

static void set_activation(size_t index, clmoe_mlp_desc *desc) {
    desc->activation = activations[index].activation;
    desc->alpha = activations[index].alpha;
}

/* Clamps and alpha of gated experts: a family's own, or the file's where it may say. */
static clmoe_status read_clamps(block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const family *f = b->family;
    double limit = f->limit, alpha = f->alpha;
    if (!f->clamp_by_field)
        return CLMOE_SUCCESS;
    TRY(config_number(&b->config, FIELD_LIMIT, &limit));
    if (limit == 0)
        TRY(config_refuse(&b->config, FIELD_LIMIT, "must be positive"));
    desc->experts.limit = (float)limit;
    desc->experts.up_shift = f->up_shift;
    if (f->alpha > 0) {
        TRY(config_number(&b->config, FIELD_ALPHA, &alpha));
        if (alpha == 0)
            TRY(config_refuse(&b->config, FIELD_ALPHA, "must be positive"));
        desc->experts.alpha = (float)alpha;
    }
    if (desc->shared.hidden_dim > 0)
        desc->shared.limit = (float)limit;
done:
    return status;
}

/* The file's activation, or the one that its family takes without; an error where nothing tells. */
static clmoe_status read_activation_name(block *b, const char **name) {
    clmoe_status status = CLMOE_SUCCESS;
    const family *f = b->family;
    const config *c = b->checkpoint->config;
    const char *fallback = f->default_activation ? f->default_activation : "silu";
    *name = f->activation ? f->activation : f->deduced ? NULL : fallback;
    TRY(config_string(&b->config, FIELD_ACTIVATION, name));
    if (*name == NULL)
        TRY(fail(CLMOE_UNSUPPORTED,
                 "%s: without %s, the activation of model_type '%s' cannot be deduced",
                 config_path(c), config_name(c, FIELD_ACTIVATION), config_model_type(c)));
done:
    return status;
}

/* Of both MLPs. What a family fixes for its experts, its shared expert may have from the file. */
static clmoe_status read_activation(block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const char *own = b->family->activation, *name;
    size_t of_file, of_experts;
    TRY(read_activation_name(b, &name));
    TRY(find_activation(b, name, &of_file));
    TRY(find_activation(b, own ? own : name, &of_experts));
    bool differs = activations[of_file].activation != activations[of_experts].activation ||
                   activations[of_file].alpha != activations[of_experts].alpha;
    if (differs && desc->shared.hidden_dim == 0)
        TRY(config_refuse(&b->config, FIELD_ACTIVATION, "the model_type has another one fixed"));
    set_activation(of_experts, &desc->experts);
    if (desc->shared.hidden_dim > 0)
        set_activation(of_file, &desc->shared);
    TRY(read_clamps(b, desc));
done:
    return status;
}

static clmoe_status read_score(block *b, clmoe_router_desc *router) {
    static const char *const names[] = {"softmax", "sigmoid", "sqrtsoftplus"};
    const config *c = b->checkpoint->config;
    router->score = b->family->score;
    router->order = b->family->order;
    const char *name = router->score < COUNT(names) ? names[router->score] : NULL;
    clmoe_status status = config_string(&b->config, FIELD_SCORE, &name);
    if (status != CLMOE_SUCCESS || name == NULL)
        return status;
    if (strcmp(name, "noaux_tc") == 0) /* dots1's files name the method of its sigmoid */
        name = names[CLMOE_SCORE_SIGMOID];
    for (int i = 0; i <= CLMOE_SCORE_SQRT_SOFTPLUS; i++)
        if (strcmp(names[i], name) == 0 && (b->family->score_by_field || (int)router->score == i)) {
            router->score = (clmoe_score_function)i;
            return CLMOE_SUCCESS;
        }
    return fail(CLMOE_UNSUPPORTED, "%s: %s is '%s', which clmoe does not have for model_type '%s'",
                config_path(c), config_name(c, FIELD_SCORE), name, config_model_type(c));
}

static clmoe_status read_renorm(block *b, clmoe_router_desc *router) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    renorm_rule rule = b->family->renorm;
    double p = 1, least = 0;
    bool on = rule == RENORM_ALWAYS || rule == RENORM_DEFAULT_ON;
    TRY(config_number(&b->config, FIELD_RENORM_MIN, &least));
    if (least > MAX_NORM_MIN)
        TRY(config_refuse(&b->config, FIELD_RENORM_MIN, "clmoe has no bound that large"));
    if (rule == RENORM_NORM) {
        TRY(config_number(&b->config, FIELD_RENORM_P, &p));
        bool off =
            config_has(c, FIELD_RENORM_P) && !config_has_name(c, config_name(c, FIELD_RENORM_P));
        if (off)
            p = 1;
        router->renorm.kind = off      ? CLMOE_RENORM_NONE
                              : p == 1 ? CLMOE_RENORM_SUM
                                       : CLMOE_RENORM_PNORM;
        router->renorm.p = (float)p;
        return CLMOE_SUCCESS;
    }
    if (rule == RENORM_BY_FLAG && !config_has(c, FIELD_RENORM))
        TRY(fail(CLMOE_UNSUPPORTED,
                 "%s: without %s, how model_type '%s' weighs its experts cannot be deduced",
                 config_path(c), config_name(c, FIELD_RENORM), config_model_type(c)));
    bool fixed = on;
    TRY(config_flag(&b->config, FIELD_RENORM, &on));
    if ((rule == RENORM_NEVER || rule == RENORM_ALWAYS) && on != fixed)
        TRY(config_refuse(&b->config, FIELD_RENORM, "the model_type does the contrary, always"));
    router->renorm.kind = on ? CLMOE_RENORM_SUM : CLMOE_RENORM_NONE;
    router->renorm.eps = on ? b->family->renorm_eps : 0;
done:
    return status;
}

/* Whether the file's way to choose is the family's; "noaux_tc" is DeepSeek-V3's. */
static clmoe_status check_method(const block *b, const char *method) {
    const family *f = b->family;
    bool greedy = strcmp(method, "greedy") == 0;
    bool right = f->groups == GROUPS_MAX ? greedy || strcmp(method, "group_limited_greedy") == 0
                 : f->select_bias        ? strcmp(method, "noaux_tc") == 0
                                         : greedy;
    if (right || !config_has(b->checkpoint->config, FIELD_TOPK_METHOD))
        return CLMOE_SUCCESS;
    return config_refuse(&b->config, FIELD_TOPK_METHOD, "clmoe does not have this");
}

/* Groups, once counts and the rule are known. */
static clmoe_status read_groups(block *b, const clmoe_layer_desc *desc, clmoe_router_desc *router) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    const char *method = b->family->select_bias ? "noaux_tc" : "greedy";
    uint32_t groups = b->family->num_groups, kept = b->family->topk_groups;
    uint32_t columns = b->experts + b->identity_experts;
    char what[128];
    TRY(config_string(&b->config, FIELD_TOPK_METHOD, &method));
    TRY(check_method(b, method));
    if (b->family->groups == GROUPS_NONE)
        return CLMOE_SUCCESS;
    TRY(config_uint(&b->config, FIELD_NUM_GROUPS, 0, &groups));
    TRY(config_uint(&b->config, FIELD_TOPK_GROUPS, 0, &kept));
    if (b->family->groups == GROUPS_MAX && strcmp(method, "greedy") == 0)
        return CLMOE_SUCCESS;
    const bool none_left = groups == 1 && kept == 0 && config_has(c, FIELD_TOPK_GROUPS);
    if (groups <= 1 && kept <= 1 && !none_left)
        return CLMOE_SUCCESS;
    if (groups == 0 || columns % groups != 0) {
        snprintf(what, sizeof what, "must divide the %u experts", columns);
        TRY(config_wrong(&b->config, FIELD_NUM_GROUPS, what));
    }
    if (kept == 0 || kept > groups || (uint64_t)kept * (columns / groups) < desc->top_k) {
        snprintf(what, sizeof what, "%s is %u, and at least %u experts must be left",
                 config_name(c, FIELD_NUM_GROUPS), groups, desc->top_k);
        TRY(config_wrong(&b->config, FIELD_TOPK_GROUPS, what));
    }
    router->groups.count = groups;
    router->groups.topk = kept;
    router->groups.score = b->family->groups == GROUPS_MAX ? CLMOE_GROUP_MAX : CLMOE_GROUP_TOP2_SUM;
done:
    return status;
}

static clmoe_status read_scales(block *b, clmoe_router_desc *router) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    double scale = b->family->scale, softcap = 0, eps = router->sparsemixer_eps;
    if (scale > 0) {
        TRY(config_number(&b->config, FIELD_SCALE, &scale));
        if (b->family->null_scale && !config_has_name(c, config_name(c, FIELD_SCALE)))
            scale = (double)b->family->scale;
        if (scale == 0 && config_has(c, FIELD_SCALE))
            TRY(config_refuse(&b->config, FIELD_SCALE, "must be positive"));
        router->scale = (float)scale;
    }
    if (b->family->softcap)
        TRY(config_number(&b->config, FIELD_SOFTCAP, &softcap));
    router->softcap = (float)softcap;
    if (router->score == CLMOE_SCORE_SPARSEMIXER)
        TRY(config_number(&b->config, FIELD_SPARSEMIXER_EPS, &eps));
    router->sparsemixer_eps = (float)eps;
done:
    return status;
}

/* CLMOE_BAD_FILE for a tensor of the block's own that the family does not have. */
static clmoe_status check_tensors(const block *b) {
    const struct {
        int role;
        bool allowed;
    } own[] = {
        {ROLE_ROUTER_BIAS, b->family->router_bias},
        {ROLE_SELECT_BIAS, b->family->select_bias},
        {ROLE_SHARED_GATE, b->family->shared_gate},
        {ROLE_OUTPUT_BIAS, b->family->output_bias},
    };
    for (size_t i = 0; i < COUNT(own); i++)
        if (block_has(b, own[i].role) && !own[i].allowed)
            return block_refuse(b, b->roles[own[i].role].tensors, "the model_type has none such");
    return CLMOE_SUCCESS;
}

static clmoe_status read_router_switches(block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_router_desc *router = &desc->router;
    bool wants_bias = b->family->select_bias;
    TRY(read_score(b, router));
    TRY(read_renorm(b, router));
    TRY(read_groups(b, desc, router));
    TRY(read_scales(b, router));
    router->weight_at = b->family->weight_at;
    router->bias = block_has(b, ROLE_ROUTER_BIAS);
    router->select_bias = block_has(b, ROLE_SELECT_BIAS);
    if (wants_bias)
        TRY(config_flag(&b->config, FIELD_SELECT_BIAS, &wants_bias));
    if (wants_bias && !router->select_bias)
        TRY(fail_missing(b, ROLE_SELECT_BIAS));
    if (!wants_bias && router->select_bias)
        TRY(config_refuse(&b->config, FIELD_SELECT_BIAS, "the block has a selection bias"));
done:
    return status;
}

clmoe_status checkpoint_describe(const clmoe_checkpoint *c, uint32_t layer, clmoe_layer_desc *desc,
                                 block *b) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc_init(desc);
    TRY(block_find(c, layer, b));
    TRY(read_counts(b, desc));
    TRY(block_collect(b));
    TRY(read_router(b, desc));
    TRY(check_tensors(b));
    TRY(describe_mlps(b, desc));
    TRY(read_activation(b, desc));
    TRY(read_router_switches(b, desc));
    TRY(config_check_unread(&b->config));
    if (b->coded != NULL)
        desc->weight_type = c->decode - 1; /* clmoe_decode counts from clmoe_type + 1 */
done:
    return status;
}

const char *clmoe_checkpoint_coded(const clmoe_checkpoint *checkpoint, uint32_t layer) {
    clmoe_layer_desc desc;
    block b;
    if (checkpoint == NULL)
        return NULL;
    const error_sentence kept = error_keep();
    clmoe_status status = checkpoint_describe(checkpoint, layer, &desc, &b);
    const char *name = status == CLMOE_SUCCESS ? b.coded : NULL;
    error_put_back(&kept);
    block_release(&b);
    return name;
}

clmoe_status clmoe_checkpoint_layer_sized(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                          clmoe_layer_desc *desc, size_t struct_size) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc own, defaults;
    block b;
    if (checkpoint == NULL || desc == NULL)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", desc ? "checkpoint" : "desc");
    TRY(checkpoint_describe(checkpoint, layer, &own, &b));
    clmoe_layer_desc_init(&defaults);
    for (size_t i = struct_size; i < sizeof own; i++)
        if (((const char *)&own)[i] != ((const char *)&defaults)[i])
            TRY(fail(CLMOE_UNSUPPORTED,
                     "struct_size is %zu, but the block of layer %u needs a field past it",
                     struct_size, layer));
    struct_give(&own, sizeof own, desc, struct_size);
done:
    block_release(&b);
    return status;
}
