#include "export.h"
#include "../tensors.h"
#include "folder.h"
#include "sizes.h"

#include <errno.h>
#include <jansson.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char model_name[] = "model.safetensors", config_name[] = "config.json";

/* Of the attention that there is not, and of positions that nothing asks for. */
enum { HEAD_DIM = 16, POSITIONS = 32768 };

#define RMS_EPS 1e-5 /* NORM_EPS of norm.cl */

/* ---- Families
 * ------------------------------------------------------------------------------------ */

/* A family of Hugging Face's: its names, and which layers are its. */
typedef struct export_family {
    const char *model_type, *architecture;
    const char *block, *gate, *up, *down; /* below a layer; below an expert */
    const char *shared, *bias;            /* below the block; NULL: none such */
    bool shared_gate;                     /* a sigmoid, which halves; any width, else n H */
    bool undivided;                       /* weights that are not divided by their sum, too */
    bool head_norms;                      /* of queries and keys */
} export_family;

static const export_family families[] = {
    {.model_type = "mixtral",
     .architecture = "MixtralForCausalLM",
     .block = "block_sparse_moe",
     .gate = "w1",
     .up = "w3",
     .down = "w2"},
    {.model_type = "qwen3_moe",
     .architecture = "Qwen3MoeForCausalLM",
     .block = "mlp",
     .gate = "gate_proj",
     .up = "up_proj",
     .down = "down_proj",
     .undivided = true,
     .head_norms = true},
    {.model_type = "qwen2_moe",
     .architecture = "Qwen2MoeForCausalLM",
     .block = "mlp",
     .gate = "gate_proj",
     .up = "up_proj",
     .down = "down_proj",
     .undivided = true,
     .shared = "shared_expert",
     .shared_gate = true},
    {.model_type = "ernie4_5_moe",
     .architecture = "Ernie4_5_MoeForCausalLM",
     .block = "mlp",
     .gate = "gate_proj",
     .up = "up_proj",
     .down = "down_proj",
     .shared = "shared_experts",
     .bias = "moe_statics.e_score_correction_bias"},
    {.model_type = "clmoe_train",
     .block = "block_sparse_moe",
     .gate = "w1",
     .up = "w3",
     .down = "w2",
     .shared = "shared_experts",
     .bias = "e_score_correction_bias",
     .undivided = true},
};

enum { FAMILIES = sizeof families / sizeof families[0] };

static bool all_experts(const clmoe_layer_desc *desc) {
    return desc->router.policy == CLMOE_POLICY_ALL_EXPERTS;
}

/* The weights of a token sum to 1. */
static bool divided(const clmoe_layer_desc *desc) {
    return desc->router.renorm.kind == CLMOE_RENORM_SUM || all_experts(desc);
}

/* A top-k of each token by itself, or all experts. */
static bool chosen_by_top_k(const clmoe_layer_desc *desc) {
    return (desc->router.policy == CLMOE_POLICY_TOKEN_CHOICE || all_experts(desc)) &&
           desc->router.rebalance.iterations == 0;
}

static bool fits(const export_family *family, const clmoe_layer_desc *desc) {
    const uint32_t shared = desc->shared.hidden_dim;
    return chosen_by_top_k(desc) && (desc->router.select_bias != 0) == (family->bias != NULL) &&
           (shared == 0 || family->shared != NULL) &&
           (family->shared_gate || shared % desc->experts.hidden_dim == 0) &&
           (family->undivided || divided(desc));
}

/* The last one has what no other has. */
static const export_family *family_of(const clmoe_layer_desc *desc) {
    uint32_t i = 0;
    while (i + 1 < FAMILIES && !fits(&families[i], desc))
        i++;
    return &families[i];
}

/* ---- Tensors
 * ------------------------------------------------------------------------------------- */

typedef struct export_tensor {
    char name[96];
    tensor_shape shape;
    const float *values;
} export_tensor;

/* Start from {model}. */
typedef struct export_file {
    train_model *model;
    clmoe_layer_desc desc;
    const export_family *family;
    float *values;       /* of all parameters */
    float *biases;       /* [L,E], where there are any */
    float *zeros, *ones; /* [D,D], [D] */
    export_tensor *tensors;
    uint32_t count;
} export_file;

static void add(export_file *f, tensor_shape shape, const float *values, const char *format, ...)
    CLI_PRINTF(4);

static void add(export_file *f, tensor_shape shape, const float *values, const char *format, ...) {
    export_tensor *tensor = &f->tensors[f->count++];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(tensor->name, sizeof tensor->name, format, arguments);
    va_end(arguments);
    tensor->shape = shape;
    tensor->values = values;
}

static tensor_shape vector(uint64_t length) {
    return (tensor_shape){.rank = 1, .dims = {length}};
}

static tensor_shape matrix(uint64_t rows, uint64_t cols) {
    return (tensor_shape){.rank = 2, .dims = {rows, cols}};
}

static float *place(const export_file *f, parameter_kind kind, uint32_t block) {
    return f->values + parameters_find(&f->model->parameters, kind, block)->first;
}

/* An MLP: gate_up [2H,D], down [D,H]. */
static void add_mlp(export_file *f, const char *prefix, const float *gate_up, const float *down,
                    uint32_t hidden) {
    const uint32_t dim = f->desc.dim;
    add(f, matrix(hidden, dim), gate_up, "%s.%s.weight", prefix, f->family->gate);
    add(f, matrix(hidden, dim), gate_up + (size_t)hidden * dim, "%s.%s.weight", prefix,
        f->family->up);
    add(f, matrix(dim, hidden), down, "%s.%s.weight", prefix, f->family->down);
}

static void add_shared(export_file *f, const char *block, uint32_t layer) {
    char prefix[80];
    const uint32_t hidden = f->desc.shared.hidden_dim, dim = f->desc.dim;
    float *down = place(f, PARAMETER_SHARED_DOWN, layer);
    for (size_t i = 0; f->family->shared_gate && i < (size_t)dim * hidden; i++)
        down[i] *= 2;
    snprintf(prefix, sizeof prefix, "%s.%s", block, f->family->shared);
    add_mlp(f, prefix, place(f, PARAMETER_SHARED_GATE_UP, layer), down, hidden);
    if (f->family->shared_gate)
        add(f, matrix(1, dim), f->zeros, "%s.shared_expert_gate.weight", block);
}

static void add_block(export_file *f, uint32_t layer) {
    char block[48], expert[80];
    const uint32_t dim = f->desc.dim, hidden = f->desc.experts.hidden_dim;
    const float *gate_up = place(f, PARAMETER_GATE_UP, layer);
    const float *down = place(f, PARAMETER_DOWN, layer);
    snprintf(block, sizeof block, "model.layers.%u.%s", (unsigned)layer, f->family->block);
    add(f, matrix(router_rows(f->model->settings), dim), place(f, PARAMETER_ROUTER, layer),
        "%s.gate.weight", block);
    for (uint32_t e = 0; e < f->desc.num_experts; e++) {
        const size_t elements = (size_t)hidden * dim;
        snprintf(expert, sizeof expert, "%s.experts.%u", block, (unsigned)e);
        add_mlp(f, expert, gate_up + 2 * elements * e, down + elements * e, hidden);
    }
    if (f->desc.shared.hidden_dim > 0)
        add_shared(f, block, layer);
    if (f->biases != NULL)
        add(f, matrix(1, f->desc.num_experts), f->biases + (size_t)layer * f->desc.num_experts,
            "%s.%s", block, f->family->bias);
}

/* The attention that there is not. */
static void add_attention(export_file *f, uint32_t layer) {
    const uint32_t dim = f->desc.dim;
    static const char *const wide[] = {"q_proj", "o_proj"}, *const narrow[] = {"k_proj", "v_proj"};
    static const char *const norms[] = {"q_norm", "k_norm"};
    char prefix[40];
    snprintf(prefix, sizeof prefix, "model.layers.%u.self_attn", (unsigned)layer);
    for (int i = 0; i < 2; i++) {
        add(f, matrix(dim, dim), f->zeros, "%s.%s.weight", prefix, wide[i]);
        add(f, matrix(HEAD_DIM, dim), f->zeros, "%s.%s.weight", prefix, narrow[i]);
        if (f->family->head_norms)
            add(f, vector(HEAD_DIM), f->ones, "%s.%s.weight", prefix, norms[i]);
    }
}

static void add_all(export_file *f) {
    const uint32_t dim = f->desc.dim, layers = f->model->settings->layers;
    const uint32_t further = f->model->settings->context - 1;
    const float *tables = place(f, PARAMETER_TABLE, 0);
    add(f, matrix(BYTE_VALUES, dim), tables, "model.embed_tokens.weight");
    for (uint32_t l = 0; l < layers; l++) {
        add(f, vector(dim), f->ones, "model.layers.%u.input_layernorm.weight", (unsigned)l);
        add_attention(f, l);
        add(f, vector(dim), place(f, PARAMETER_GAIN, l),
            "model.layers.%u.post_attention_layernorm.weight", (unsigned)l);
        add_block(f, l);
    }
    add(f, vector(dim), place(f, PARAMETER_GAIN, layers), "model.norm.weight");
    add(f, matrix(BYTE_VALUES, dim), place(f, PARAMETER_HEAD, 0), "lm_head.weight");
    if (further > 0)
        add(f, (tensor_shape){.rank = 3, .dims = {further, BYTE_VALUES, dim}},
            tables + (size_t)BYTE_VALUES * dim, "clmoe.context_tables");
}

/* ---- Reading the model
 * --------------------------------------------------------------------------- */

/* A state is clmoe_state, then its biases [E]. */
static clmoe_status read_biases(export_file *f) {
    clmoe_status status = CLMOE_SUCCESS;
    train_model *m = f->model;
    const uint32_t experts = f->desc.num_experts;
    unsigned char *state = malloc(m->state_bytes);
    f->biases = calloc((size_t)m->settings->layers * experts, sizeof *f->biases);
    if (state == NULL || f->biases == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", model_name));
    for (uint32_t l = 0; l < m->settings->layers; l++) {
        TRY(model_read(m, m->blocks[l].state, m->state_bytes, state));
        memcpy(f->biases + (size_t)l * experts, state + sizeof(clmoe_state),
               experts * sizeof *f->biases);
    }
done:
    free(state);
    return status;
}

static clmoe_status export_file_read(export_file *f) {
    clmoe_status status = CLMOE_SUCCESS;
    train_model *m = f->model;
    const size_t dim = f->desc.dim, elements = m->parameters.elements;
    /* Of a layer: its experts', the shared expert's, and 12 of router, bias, norms, attention. */
    const size_t most = (size_t)m->settings->layers * (3 * (f->desc.num_experts + 1) + 12) + 4;
    f->values = malloc(elements * sizeof *f->values);
    f->zeros = calloc(dim * dim, sizeof *f->zeros);
    f->ones = malloc(dim * sizeof *f->ones);
    f->tensors = calloc(most, sizeof *f->tensors);
    if (f->values == NULL || f->zeros == NULL || f->ones == NULL || f->tensors == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", model_name));
    for (size_t i = 0; i < dim; i++)
        f->ones[i] = 1;
    TRY(model_read(m, m->values, elements * sizeof *f->values, f->values));
    if (f->desc.router.select_bias)
        TRY(read_biases(f));
    add_all(f);
done:
    return status;
}

static void export_file_free(export_file *f) {
    free(f->values);
    free(f->biases);
    free(f->zeros);
    free(f->ones);
    free(f->tensors);
}

/* ---- config.json
 * --------------------------------------------------------------------------------- */

/* What this layer does and no field of a model_type says; NULL: nothing. */
static json_t *methods_json(const export_file *f) {
    const balance_method *policy = methods_find(&f->model->settings->methods, METHOD_POLICY);
    json_t *names;
    if (chosen_by_top_k(&f->desc))
        return NULL;
    names = json_array();
    if (f->desc.router.policy != CLMOE_POLICY_TOKEN_CHOICE)
        json_array_append_new(names, json_string(policy->row->name));
    if (f->desc.router.rebalance.iterations > 0)
        json_array_append_new(names, json_string("rebalance"));
    return names;
}

/* Fields of the model_type's own; absent where they are null. */
static json_t *family_json(const export_file *f) {
    const clmoe_layer_desc *d = &f->desc;
    const json_int_t experts = d->num_experts, top_k = d->top_k, hidden = d->experts.hidden_dim;
    const json_int_t shared = d->shared.hidden_dim;
    const char *type = f->family->model_type;
    if (strcmp(type, "mixtral") == 0)
        return json_pack("{s:I, s:I, s:n}", "num_local_experts", experts, "num_experts_per_tok",
                         top_k, "sliding_window");
    if (strcmp(type, "ernie4_5_moe") == 0)
        return json_pack("{s:I, s:I, s:I, s:I, s:i, s:b}", "moe_num_experts", experts, "moe_k",
                         top_k, "moe_intermediate_size", hidden, "moe_num_shared_experts",
                         shared / hidden, "moe_layer_start_index", 0, "use_bias", 0);
    json_t *fields =
        json_pack("{s:I, s:I, s:I, s:b}", "num_experts", experts, "num_experts_per_tok", top_k,
                  "moe_intermediate_size", hidden, "norm_topk_prob", (int)divided(d));
    if (shared > 0)
        json_object_set_new(fields, "shared_expert_intermediate_size", json_integer(shared));
    if (strcmp(type, "qwen2_moe") == 0)
        json_object_set_new(fields, "qkv_bias", json_false());
    if (f->family->architecture == NULL)
        json_object_set_new(fields, "scoring_func", json_string("softmax"));
    return fields;
}

static char *config_text(const export_file *f) {
    const train_settings *s = f->model->settings;
    const char *architecture = f->family->architecture;
    json_t *root = json_pack(
        "{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:f, s:I, s:b, s:n, s:n, s:s, s:I}",
        "model_type", f->family->model_type, "vocab_size", (json_int_t)BYTE_VALUES, "hidden_size",
        (json_int_t)s->dim, "intermediate_size", (json_int_t)s->hidden, "num_hidden_layers",
        (json_int_t)s->layers, "num_attention_heads", (json_int_t)s->dim / HEAD_DIM,
        "num_key_value_heads", (json_int_t)1, "head_dim", (json_int_t)HEAD_DIM, "hidden_act",
        "silu", "rms_norm_eps", RMS_EPS, "max_position_embeddings", (json_int_t)POSITIONS,
        "tie_word_embeddings", 0, "bos_token_id", "eos_token_id", "torch_dtype", "float32",
        "clmoe_context", (json_int_t)s->context);
    json_t *fields = family_json(f), *methods = methods_json(f);
    char *text = NULL;
    if (architecture != NULL)
        json_object_set_new(root, "architectures", json_pack("[s]", architecture));
    if (methods != NULL)
        json_object_set_new(root, "router_methods", methods);
    if (json_object_update(root, fields) == 0)
        text = json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    json_decref(fields);
    json_decref(root);
    return text;
}

/* ---- Writing
 * ------------------------------------------------------------------------------------- */

static clmoe_status write_tensors(const export_file *f, const char *folder) {
    clmoe_status status = CLMOE_SUCCESS;
    folder_file file = {0};
    tensor_entry *entries = malloc(f->count * sizeof *entries);
    if (entries == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", model_name));
    for (uint32_t i = 0; i < f->count; i++)
        entries[i] = (tensor_entry){f->tensors[i].name, f->tensors[i].shape};
    TRY(folder_begin(&file, folder, model_name));
    TRY(tensors_begin(file.stream, file.path, entries, f->count));
    for (uint32_t i = 0; i < f->count; i++) {
        const export_tensor *tensor = &f->tensors[i];
        TRY(tensors_append(file.stream, file.path, tensor->values, shape_elements(&tensor->shape)));
    }
    TRY(folder_end(&file));
done:
    folder_drop(&file);
    free(entries);
    return status;
}

static clmoe_status write_config(const char *folder, const char *text) {
    clmoe_status status = CLMOE_SUCCESS;
    folder_file file = {0};
    TRY(folder_begin(&file, folder, config_name));
    fprintf(file.stream, "%s\n", text);
    TRY(folder_end(&file));
done:
    folder_drop(&file);
    return status;
}

static bool same_text(FILE *stream, const char *text) {
    for (int c; (c = fgetc(stream)) != EOF && *text != '\0'; text++)
        if ((unsigned char)*text != c)
            return false;
    return *text == '\0';
}

/* A config.json of another model_type, or K, goes before the tensors that it was written for. */
static clmoe_status drop_other_config(const char *folder, const char *text) {
    clmoe_status status = CLMOE_SUCCESS;
    char path[PATH_MAX];
    FILE *stream;
    bool same;
    TRY(folder_path(folder, config_name, path));
    stream = fopen(path, "rb");
    if (stream == NULL)
        return status;
    same = same_text(stream, text);
    fclose(stream);
    if (!same && unlink(path) != 0)
        TRY(cli_fail(CLMOE_IO, "%s cannot be replaced: %s", path, strerror(errno)));
done:
    return status;
}

clmoe_status model_export(train_model *m, const char *folder, uint32_t step) {
    clmoe_status status = CLMOE_SUCCESS;
    export_file f = {.model = m};
    char *text = NULL;
    phases_describe(m->settings, step, &f.desc);
    f.family = family_of(&f.desc);
    TRY(export_file_read(&f));
    text = config_text(&f);
    if (text == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", config_name));
    TRY(drop_other_config(folder, text));
    TRY(write_tensors(&f, folder));
    TRY(write_config(folder, text));
done:
    free(text);
    export_file_free(&f);
    return status;
}
