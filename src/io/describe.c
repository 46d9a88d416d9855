/* clmoe_checkpoint_layer(): the block's fields and shapes -> a layer descriptor. */
#include "checkpoint.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define MAX_EXPERTS   4096
#define MAX_TOP_K     256
#define MAX_NORM_MIN  1e-6
#define MAX_DIMENSION INT32_MAX

/* ---- Counts --------------------------------------------------------------------------------- */

/* E, Z and K, checked against each other. */
static clmoe_status read_counts(block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    desc->num_experts = b->family->experts;
    desc->top_k = b->family->top_k;
    TRY(config_uint(c, FIELD_EXPERTS, b->layer, 1, &desc->num_experts));
    TRY(config_uint(c, FIELD_IDENTITY_EXPERTS, b->layer, 0, &desc->num_identity_experts));
    TRY(config_uint(c, FIELD_TOP_K, b->layer, 1, &desc->top_k));
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
    if (desc->top_k > MAX_TOP_K)
        TRY(fail(CLMOE_UNSUPPORTED, "%s: %s is %u, but clmoe takes at most %d", config_path(c),
                 config_name(c, FIELD_TOP_K), desc->top_k, MAX_TOP_K));
    b->experts = desc->num_experts;
    b->identity_experts = desc->num_identity_experts;
done:
    return status;
}

/* ---- Shapes --------------------------------------------------------------------------------- */

static void print_shape(uint32_t rank, const uint64_t *shape, char *text, size_t size) {
    size_t used = 0;
    text[0] = '\0';
    for (uint32_t i = 0; i < rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRIu64, i ? ", " : "", shape[i]);
}

static bool same_shape(const st_tensor *t, uint32_t rank, const uint64_t *shape) {
    return t->rank == rank && memcmp(t->shape, shape, rank * sizeof shape[0]) == 0;
}

static clmoe_status fail_shape(const file_tensor *t, uint32_t rank, const uint64_t *shape) {
    char is[192], should[192];
    print_shape(t->tensor->rank, t->tensor->shape, is, sizeof is);
    print_shape(rank, shape, should, sizeof should);
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

/* CLMOE_BAD_FILE: no tensor has the role. */
static clmoe_status fail_missing(const block *b, int role) {
    return fail(CLMOE_BAD_FILE, "%s: tensor '%s%s', or one that does its work, is missing",
                b->checkpoint->directory, b->prefix, role_example(role));
}

/* A dimension read from a tensor must be one of the config's values of the field. */
static clmoe_status check_dimension(const block *b, const file_tensor *t, config_field field,
                                    uint64_t value) {
    const config *c = b->checkpoint->config;
    uint32_t said = 0;
    if (value > 0 && value <= MAX_DIMENSION && config_allows(c, field, b->layer, value))
        return CLMOE_SUCCESS;
    clmoe_status status = config_uint(c, field, b->layer, 1, &said);
    if (status != CLMOE_SUCCESS)
        return status;
    char is[192];
    print_shape(t->tensor->rank, t->tensor->shape, is, sizeof is);
    return fail(CLMOE_BAD_FILE, "%s: tensor '%s' has shape [%s], but %s is %u",
                safetensors_path(t->file), t->tensor->name, is, config_name(c, field), said);
}

/* The router's matrix gives D; its rows must be R. */
static clmoe_status read_router(const block *b, clmoe_layer_desc *desc) {
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
    const block *block;
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

/* The shared expert is as wide as a field of its own says, or as one or more experts. */
static clmoe_status check_shared_width(const block *b, const clmoe_layer_desc *desc) {
    const config *c = b->checkpoint->config;
    uint32_t width = 0, count = 0, is = desc->shared.hidden_dim;
    clmoe_status status = config_uint(c, FIELD_SHARED_HIDDEN, b->layer, 0, &width);
    if (status == CLMOE_SUCCESS)
        status = config_uint(c, FIELD_SHARED_COUNT, b->layer, 0, &count);
    if (status != CLMOE_SUCCESS || is == width || is == desc->experts.hidden_dim ||
        is == (uint64_t)count * desc->experts.hidden_dim)
        return status;
    if (width > 0)
        return fail(CLMOE_BAD_FILE, "%s: %s is %u, but the shared expert's tensors have %u rows",
                    config_path(c), config_name(c, FIELD_SHARED_HIDDEN), width, is);
    return fail(CLMOE_BAD_FILE, "%s: %s is %u, but the shared expert's tensors have %u rows",
                config_path(c), config_name(c, FIELD_SHARED_COUNT), count, is);
}

/* Whether the config gives the block a shared expert. */
static clmoe_status wants_shared(const block *b, bool *wants) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t width = 0, count = 0;
    TRY(config_uint(b->checkpoint->config, FIELD_SHARED_HIDDEN, b->layer, 0, &width));
    TRY(config_uint(b->checkpoint->config, FIELD_SHARED_COUNT, b->layer, 0, &count));
    *wants = b->family->shared && (width > 0 || count > 0);
done:
    return status;
}

static clmoe_status describe_mlps(const block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    mlp experts = {.block = b, .base = ROLE_EXPERTS, .experts = b->experts, .dim = desc->dim};
    mlp shared = {.block = b, .base = ROLE_SHARED, .experts = 1, .dim = desc->dim};
    bool has_shared = false;
    TRY(describe_mlp(&experts, &desc->experts));
    TRY(wants_shared(b, &has_shared));
    for (int part = 0; part < PART_COUNT; part++)
        has_shared = has_shared || block_has(b, ROLE_SHARED + part);
    if (has_shared) {
        TRY(describe_mlp(&shared, &desc->shared));
        TRY(check_shared_width(b, desc));
    }
    desc->shared_gate = block_has(b, ROLE_SHARED_GATE);
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

/* Sets the activation of both MLPs; a family's own alpha and shift are the experts' alone. */
static void set_activation(const family *f, size_t index, double limit, clmoe_layer_desc *desc) {
    desc->experts.activation = activations[index].activation;
    desc->experts.alpha = f->alpha > 0 ? f->alpha : activations[index].alpha;
    desc->experts.limit = (float)limit;
    desc->experts.up_shift = f->up_shift;
    if (desc->shared.hidden_dim == 0)
        return;
    desc->shared.activation = activations[index].activation;
    desc->shared.alpha = activations[index].alpha;
    desc->shared.limit = (float)limit;
}

static clmoe_status read_activation(const block *b, clmoe_layer_desc *desc) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    const family *f = b->family;
    const char *name = "silu";
    double limit = f->limit;
    TRY(config_string(c, FIELD_ACTIVATION, &name));
    if (f->limit_by_field || f->deduced)
        TRY(config_number(c, FIELD_LIMIT, &limit));
    if (f->deduced && limit > 0)
        TRY(fail(CLMOE_UNSUPPORTED, "%s: %s is %g, but model_type '%s' is not known",
                 config_path(c), config_name(c, FIELD_LIMIT), limit, config_model_type(c)));
    if (f->activation != NULL)
        name = f->activation;
    for (size_t i = 0; i < sizeof activations / sizeof activations[0]; i++)
        if (strcmp(activations[i].name, name) == 0) {
            set_activation(f, i, limit, desc);
            return CLMOE_SUCCESS;
        }
    TRY(fail(CLMOE_UNSUPPORTED, "%s: %s is '%s', an activation clmoe does not have", config_path(c),
             config_name(c, FIELD_ACTIVATION), name));
done:
    return status;
}

static clmoe_status read_score(const block *b, clmoe_router_desc *router) {
    static const char *const names[] = {"softmax", "sigmoid", "sqrtsoftplus"};
    const config *c = b->checkpoint->config;
    const char *name = NULL;
    clmoe_status status = config_string(c, FIELD_SCORE, &name);
    router->score = b->family->score;
    router->order = b->family->order;
    if (status != CLMOE_SUCCESS || name == NULL)
        return status;
    for (int i = 0; i <= CLMOE_SCORE_SQRT_SOFTPLUS; i++)
        if (strcmp(names[i], name) == 0 && (b->family->score_by_field || (int)router->score == i)) {
            router->score = (clmoe_score_function)i;
            return CLMOE_SUCCESS;
        }
    return fail(CLMOE_UNSUPPORTED, "%s: %s is '%s', which clmoe does not have for model_type '%s'",
                config_path(c), config_name(c, FIELD_SCORE), name, config_model_type(c));
}

static clmoe_status read_renorm(const block *b, clmoe_router_desc *router) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    renorm_rule rule = b->family->renorm;
    double p = 1, least = 0;
    bool on = rule == RENORM_ALWAYS || rule == RENORM_DEFAULT_ON;
    TRY(config_number(c, FIELD_RENORM_MIN, &least));
    if (least > MAX_NORM_MIN)
        TRY(fail(CLMOE_UNSUPPORTED, "%s: %s is %g, but clmoe has no bound that large",
                 config_path(c), config_name(c, FIELD_RENORM_MIN), least));
    if (rule == RENORM_NORM) {
        TRY(config_number(c, FIELD_RENORM_P, &p));
        bool off =
            config_has(c, FIELD_RENORM_P) && !config_has_name(c, config_name(c, FIELD_RENORM_P));
        router->renorm = off ? CLMOE_RENORM_NONE : p == 1 ? CLMOE_RENORM_SUM : CLMOE_RENORM_PNORM;
        router->renorm_p = (float)p;
        return CLMOE_SUCCESS;
    }
    if (rule == RENORM_BY_FLAG && !config_has(c, FIELD_RENORM))
        TRY(fail(CLMOE_UNSUPPORTED,
                 "%s: model_type '%s' is not known, and without %s its weights cannot be deduced",
                 config_path(c), config_model_type(c), config_name(c, FIELD_RENORM)));
    if (rule != RENORM_NEVER && rule != RENORM_ALWAYS)
        TRY(config_flag(c, FIELD_RENORM, &on));
    router->renorm = on ? CLMOE_RENORM_SUM : CLMOE_RENORM_NONE;
    router->renorm_eps = on ? b->family->renorm_eps : 0;
done:
    return status;
}

/* Groups, once counts and the rule are known. */
static clmoe_status read_groups(const block *b, const clmoe_layer_desc *desc,
                                clmoe_router_desc *router) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    const char *method = "greedy";
    uint32_t groups = b->family->num_groups, kept = b->family->topk_groups;
    uint32_t columns = b->experts + b->identity_experts;
    if (b->family->groups == GROUPS_NONE)
        return CLMOE_SUCCESS;
    TRY(config_string(c, FIELD_TOPK_METHOD, &method));
    if (b->family->groups == GROUPS_MAX && strcmp(method, "greedy") == 0)
        return CLMOE_SUCCESS;
    if (b->family->groups == GROUPS_MAX && strcmp(method, "group_limited_greedy") != 0)
        TRY(fail(CLMOE_UNSUPPORTED, "%s: topk_method is '%s', which clmoe does not have",
                 config_path(c), method));
    TRY(config_uint(c, FIELD_NUM_GROUPS, b->layer, 0, &groups));
    TRY(config_uint(c, FIELD_TOPK_GROUPS, b->layer, 0, &kept));
    if (groups <= 1)
        return CLMOE_SUCCESS;
    if (columns % groups != 0)
        TRY(fail(CLMOE_BAD_FILE, "%s: %s is %u, which does not divide the %u experts",
                 config_path(c), config_name(c, FIELD_NUM_GROUPS), groups, columns));
    if (kept == 0 || kept > groups || (uint64_t)kept * (columns / groups) < desc->top_k)
        TRY(fail(CLMOE_BAD_FILE,
                 "%s: %s is %u, but must be at most %u and leave at least %u experts",
                 config_path(c), config_name(c, FIELD_TOPK_GROUPS), kept, groups, desc->top_k));
    router->num_groups = groups;
    router->topk_groups = kept;
    router->group_score = b->family->groups == GROUPS_MAX ? CLMOE_GROUP_MAX : CLMOE_GROUP_TOP2_SUM;
done:
    return status;
}

static clmoe_status read_scales(const block *b, clmoe_router_desc *router) {
    clmoe_status status = CLMOE_SUCCESS;
    const config *c = b->checkpoint->config;
    double scale = b->family->scale, softcap = 0, eps = router->sparsemixer_eps;
    if (scale > 0) {
        TRY(config_number(c, FIELD_SCALE, &scale));
        router->scale = (float)scale;
    }
    TRY(config_number(c, FIELD_SOFTCAP, &softcap));
    router->softcap = (float)softcap;
    if (router->score == CLMOE_SCORE_SPARSEMIXER)
        TRY(config_number(c, FIELD_SPARSEMIXER_EPS, &eps));
    router->sparsemixer_eps = (float)eps;
done:
    return status;
}

static clmoe_status read_router_switches(const block *b, clmoe_layer_desc *desc) {
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
        TRY(config_flag(b->checkpoint->config, FIELD_SELECT_BIAS, &wants_bias));
    if (wants_bias && !router->select_bias)
        TRY(fail_missing(b, ROLE_SELECT_BIAS));
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
    TRY(describe_mlps(b, desc));
    TRY(read_activation(b, desc));
    TRY(read_router_switches(b, desc));
done:
    return status;
}

clmoe_status clmoe_checkpoint_layer(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                    clmoe_layer_desc *desc) {
    block b;
    if (checkpoint == NULL || desc == NULL)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", desc ? "checkpoint" : "desc");
    clmoe_status status = checkpoint_describe(checkpoint, layer, desc, &b);
    block_release(&b);
    return status;
}
