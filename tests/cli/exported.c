/*
 * What `clmoe train` left, computed by itself in double precision as Hugging Face's model of that
 * model_type does, from config.json and model.safetensors alone:
 *   exported DIR TEXT BATCH SEQUENCE ROWS
 * prints the mean loss over what is held out of TEXT, and writes to ROWS for each layer L what goes
 * into its MoE block and what comes out, x.L and y.L [SEQUENCE,D], of the first sequence. Fails
 * where a tensor is missing, has another shape, is not F32, or is one too many.
 */
#include "cli/tensors.h"
#include "cli/train/text.h"

#include <jansson.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { VALIDATION_BATCHES = 8, VOCABULARY = 256, HEAD = 16, MOST_LAYERS = 4 };

static clmoe_tensors *file;
static uint32_t taken; /* tensors */
static const char *folder;

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", folder);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(1);
}

static void *memory(size_t bytes) {
    void *room = calloc(1, bytes);
    if (room == NULL)
        fail("no memory");
    return room;
}

/* ---- The files -------------------------------------------------------------------------------
 */

typedef struct model_config {
    json_t *json;
    const char *type;
    uint32_t layers, dim, hidden, experts, top_k, shared, context;
    bool divided, biased;
} model_config;

static uint32_t field(const model_config *c, const char *name) {
    const json_t *value = json_object_get(c->json, name);
    if (!json_is_integer(value))
        fail("config.json has no number %s", name);
    return (uint32_t)json_integer_value(value);
}

static bool is_type(const model_config *c, const char *type) {
    return strcmp(c->type, type) == 0;
}

/* The fields by the names that each family has for them. */
static void read_family(model_config *c) {
    const bool ernie = is_type(c, "ernie4_5_moe"), mixtral = is_type(c, "mixtral");
    const bool others = is_type(c, "qwen2_moe") || is_type(c, "clmoe_train");
    if (!ernie && !mixtral && !others && !is_type(c, "qwen3_moe"))
        fail("model_type %s", c->type);
    c->experts = field(c, mixtral ? "num_local_experts"
                          : ernie ? "moe_num_experts"
                                  : "num_experts");
    c->top_k = field(c, ernie ? "moe_k" : "num_experts_per_tok");
    c->hidden = field(c, mixtral ? "intermediate_size" : "moe_intermediate_size");
    c->divided = ernie || mixtral || json_is_true(json_object_get(c->json, "norm_topk_prob"));
    c->biased = ernie || is_type(c, "clmoe_train");
    if (ernie)
        c->shared = c->hidden * field(c, "moe_num_shared_experts");
    else if (others && json_object_get(c->json, "shared_expert_intermediate_size") != NULL)
        c->shared = field(c, "shared_expert_intermediate_size");
}

static void read_config(model_config *c) {
    char path[4096];
    snprintf(path, sizeof path, "%s/config.json", folder);
    c->json = json_load_file(path, 0, NULL);
    c->type = json_string_value(json_object_get(c->json, "model_type"));
    if (c->type == NULL)
        fail("config.json has no model_type");
    c->dim = field(c, "hidden_size");
    c->layers = field(c, "num_hidden_layers");
    c->context = field(c, "clmoe_context");
    if (field(c, "vocab_size") != VOCABULARY || c->layers > MOST_LAYERS ||
        field(c, "num_attention_heads") * HEAD != c->dim || field(c, "head_dim") != HEAD ||
        field(c, "num_key_value_heads") != 1 ||
        fabs(json_real_value(json_object_get(c->json, "rms_norm_eps")) - 1e-5) > 1e-11)
        fail("config.json has another vocabulary, norm or attention");
    read_family(c);
}

/* The values of a tensor [a,b,c], of which 0 stands for none. */
static float *take(uint64_t a, uint64_t b, uint64_t c, const char *format, ...) {
    char name[120];
    bool has = false;
    const tensor_shape shape = {.rank = 1U + (b > 0) + (c > 0), .dims = {a, b, c}};
    const size_t count = shape_elements(&shape);
    float *values = memory(count * sizeof *values);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    if (tensor_find(file, name, &shape, &has) != CLMOE_SUCCESS)
        fail("%s", cli_error());
    if (!has)
        fail("no tensor %s", name);
    if (clmoe_tensors_read(file, name, 0, count, values) != CLMOE_SUCCESS)
        fail("%s", clmoe_last_error());
    taken++;
    return values;
}

/* All tensors of the file are F32 and were taken. */
static void check_header(const char *path) {
    unsigned char length[8];
    FILE *stream = fopen(path, "rb");
    const char *name;
    json_t *value;
    if (stream == NULL || fread(length, 1, sizeof length, stream) != sizeof length)
        fail("%s cannot be read", path);
    const size_t bytes = length[0] + 256U * length[1] + 65536U * length[2];
    char *text = memory(bytes + 1);
    if (fread(text, 1, bytes, stream) != bytes)
        fail("%s has no header", path);
    json_t *header = json_loads(text, 0, NULL);
    json_object_foreach(header, name, value) {
        if (strcmp(json_string_value(json_object_get(value, "dtype")), "F32") != 0)
            fail("%s is not F32", name);
    }
    if (json_object_size(header) != taken)
        fail("%zu tensors instead of %u", json_object_size(header), (unsigned)taken);
    json_decref(header);
    free(text);
    fclose(stream);
}

/* ---- The model -------------------------------------------------------------------------------
 */

typedef struct mlp {
    float *gate, *up, *down; /* [H,D], [H,D], [D,H] */
    uint32_t hidden;
} mlp;

typedef struct layer {
    float *norm, *router, *bias; /* [D], [E,D], [E] or NULL */
    mlp *experts, shared;
    float *shared_gate; /* [D] or NULL */
} layer;

typedef struct model {
    model_config config;
    layer layers[MOST_LAYERS];
    float *embed, *tables, *norm, *head;
} model;

static mlp take_mlp(const model_config *c, uint32_t hidden, const char *prefix) {
    const bool short_names = is_type(c, "mixtral") || is_type(c, "clmoe_train");
    return (mlp){take(hidden, c->dim, 0, "%s.%s.weight", prefix, short_names ? "w1" : "gate_proj"),
                 take(hidden, c->dim, 0, "%s.%s.weight", prefix, short_names ? "w3" : "up_proj"),
                 take(c->dim, hidden, 0, "%s.%s.weight", prefix, short_names ? "w2" : "down_proj"),
                 hidden};
}

static void take_zeros(uint32_t rows, uint32_t cols, const char *prefix, const char *name) {
    float *values = take(rows, cols, 0, "%s.self_attn.%s.weight", prefix, name);
    for (size_t i = 0; i < (size_t)rows * cols; i++)
        if (values[i] != 0)
            fail("%s of %s is not 0", name, prefix);
    free(values);
}

/* It adds 0; so what its norms are is all the same. */
static void take_attention(const model_config *c, const char *prefix) {
    take_zeros(c->dim, c->dim, prefix, "q_proj");
    take_zeros(HEAD, c->dim, prefix, "k_proj");
    take_zeros(HEAD, c->dim, prefix, "v_proj");
    take_zeros(c->dim, c->dim, prefix, "o_proj");
    free(take(c->dim, 0, 0, "%s.input_layernorm.weight", prefix));
    if (is_type(c, "qwen3_moe")) {
        free(take(HEAD, 0, 0, "%s.self_attn.q_norm.weight", prefix));
        free(take(HEAD, 0, 0, "%s.self_attn.k_norm.weight", prefix));
    }
}

static void take_layer(const model_config *c, uint32_t index, layer *l) {
    const bool mixtral = is_type(c, "mixtral") || is_type(c, "clmoe_train");
    const bool qwen2 = is_type(c, "qwen2_moe"), ernie = is_type(c, "ernie4_5_moe");
    char prefix[40], block[80], expert[120];
    snprintf(prefix, sizeof prefix, "model.layers.%u", (unsigned)index);
    snprintf(block, sizeof block, "%s.%s", prefix, mixtral ? "block_sparse_moe" : "mlp");
    take_attention(c, prefix);
    l->norm = take(c->dim, 0, 0, "%s.post_attention_layernorm.weight", prefix);
    l->router = take(c->experts, c->dim, 0, "%s.gate.weight", block);
    l->experts = memory(c->experts * sizeof *l->experts);
    for (uint32_t e = 0; e < c->experts; e++) {
        snprintf(expert, sizeof expert, "%s.experts.%u", block, (unsigned)e);
        l->experts[e] = take_mlp(c, c->hidden, expert);
    }
    snprintf(expert, sizeof expert, "%s.shared_expert%s", block, qwen2 ? "" : "s");
    if (c->shared > 0)
        l->shared = take_mlp(c, c->shared, expert);
    if (qwen2)
        l->shared_gate = take(1, c->dim, 0, "%s.shared_expert_gate.weight", block);
    if (c->biased)
        l->bias = take(1, c->experts, 0, "%s.%se_score_correction_bias", block,
                       ernie ? "moe_statics." : "");
}

static void take_model(model *m) {
    const model_config *c = &m->config;
    char path[4096];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    if (clmoe_tensors_open(path, &file) != CLMOE_SUCCESS)
        fail("%s", clmoe_last_error());
    m->embed = take(VOCABULARY, c->dim, 0, "model.embed_tokens.weight");
    if (c->context > 1)
        m->tables = take(c->context - 1, VOCABULARY, c->dim, "clmoe.context_tables");
    for (uint32_t l = 0; l < c->layers; l++)
        take_layer(c, l, &m->layers[l]);
    m->norm = take(c->dim, 0, 0, "model.norm.weight");
    m->head = take(VOCABULARY, c->dim, 0, "lm_head.weight");
    check_header(path);
    clmoe_tensors_close(file);
}

static double dot(const float *weights, const double *x, uint32_t count) {
    double sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += (double)weights[i] * x[i];
    return sum;
}

static void normalize(const float *gain, const double *x, uint32_t dim, double *h) {
    double squares = 0;
    for (uint32_t d = 0; d < dim; d++)
        squares += x[d] * x[d];
    for (uint32_t d = 0; d < dim; d++)
        h[d] = (double)gain[d] * x[d] / sqrt(squares / dim + 1e-5);
}

/* y += scale down (silu(gate h) up h) */
static void add_mlp(const mlp *f, double scale, const double *h, uint32_t dim, double *y) {
    double *a = memory(f->hidden * sizeof *a);
    for (uint32_t i = 0; i < f->hidden; i++) {
        const double gate = dot(f->gate + (size_t)i * dim, h, dim);
        a[i] = gate / (1 + exp(-gate)) * dot(f->up + (size_t)i * dim, h, dim);
    }
    for (uint32_t d = 0; d < dim; d++)
        y[d] += scale * dot(f->down + (size_t)d * f->hidden, a, f->hidden);
    free(a);
}

static void softmax(double *values, uint32_t count) {
    double sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += values[i] = exp(values[i]);
    for (uint32_t i = 0; i < count; i++)
        values[i] /= sum;
}

/* The weight of each expert, 0 for those not chosen. */
static void route(const model_config *c, const layer *l, const double *h, double *weights) {
    double *p = memory(c->experts * sizeof *p), sum = 0;
    memset(weights, 0, c->experts * sizeof *weights);
    for (uint32_t e = 0; e < c->experts; e++)
        p[e] = dot(l->router + (size_t)e * c->dim, h, c->dim);
    softmax(p, c->experts);
    for (uint32_t k = 0; k < c->top_k; k++) {
        uint32_t best = 0;
        double most = -INFINITY;
        for (uint32_t e = 0; e < c->experts; e++) {
            const double score = p[e] + (l->bias ? (double)l->bias[e] : 0);
            if (weights[e] == 0 && score > most) {
                best = e;
                most = score;
            }
        }
        weights[best] = p[best];
        sum += p[best];
    }
    for (uint32_t e = 0; e < c->experts && c->divided; e++)
        weights[e] /= sum;
    free(p);
}

static void block(const model_config *c, const layer *l, const double *h, double *y) {
    double *weights = memory(c->experts * sizeof *weights);
    memset(y, 0, c->dim * sizeof *y);
    route(c, l, h, weights);
    for (uint32_t e = 0; e < c->experts; e++)
        if (weights[e] != 0)
            add_mlp(&l->experts[e], weights[e], h, c->dim, y);
    if (c->shared > 0)
        add_mlp(&l->shared, l->shared_gate ? 1 / (1 + exp(-dot(l->shared_gate, h, c->dim))) : 1, h,
                c->dim, y);
    free(weights);
}

/* -log p of the byte behind `last`; to rows[L], where there are any, x and y of each layer. */
static double token(const model *m, const unsigned char *last, float **x_rows, float **y_rows) {
    const model_config *c = &m->config;
    const uint32_t dim = c->dim;
    double *x = memory(3 * dim * sizeof *x), *h = x + dim, *y = h + dim, p[VOCABULARY];
    for (uint32_t d = 0; d < dim; d++) {
        x[d] = (double)m->embed[last[0] * dim + d];
        for (uint32_t j = 1; j < c->context; j++)
            x[d] += (double)m->tables[((j - 1) * VOCABULARY + *(last - j)) * dim + d];
    }
    for (uint32_t l = 0; l < c->layers; l++) {
        normalize(m->layers[l].norm, x, dim, h);
        block(c, &m->layers[l], h, y);
        for (uint32_t d = 0; d < dim; d++) {
            x[d] += y[d];
            if (x_rows != NULL) {
                *x_rows[l]++ = (float)h[d];
                *y_rows[l]++ = (float)y[d];
            }
        }
    }
    normalize(m->norm, x, dim, h);
    for (uint32_t b = 0; b < VOCABULARY; b++)
        p[b] = dot(m->head + (size_t)b * dim, h, dim);
    softmax(p, VOCABULARY);
    free(x);
    return -log(p[last[1]]);
}

/* ---- Both together ---------------------------------------------------------------------------
 */

static void write_rows(const model *m, const corpus *text, const uint32_t *positions,
                       const char *path) {
    const model_config *c = &m->config;
    const size_t elements = (size_t)text->sequence * c->dim;
    float *rows = memory(2 * c->layers * elements * sizeof *rows);
    float *x[MOST_LAYERS], *y[MOST_LAYERS];
    char names[2 * MOST_LAYERS][8];
    tensor_entry entries[2 * MOST_LAYERS];
    for (uint32_t l = 0; l < c->layers; l++) {
        x[l] = rows + 2 * l * elements;
        y[l] = x[l] + elements;
        for (uint32_t i = 0; i < 2; i++) {
            snprintf(names[2 * l + i], sizeof names[0], "%c.%u", "xy"[i], (unsigned)l % 10);
            entries[2 * l + i] =
                (tensor_entry){names[2 * l + i], {.rank = 2, .dims = {text->sequence, c->dim}}};
        }
    }
    for (uint32_t t = 0; t < text->sequence; t++)
        token(m, text->bytes + positions[t], x, y);
    FILE *stream = fopen(path, "wb");
    if (stream == NULL || tensors_begin(stream, path, entries, 2 * c->layers) != CLMOE_SUCCESS ||
        tensors_append(stream, path, rows, 2 * c->layers * elements) != CLMOE_SUCCESS ||
        fclose(stream) != 0)
        fail("%s cannot be written", path);
    free(rows);
}

int main(int argc, char **argv) {
    static model m;
    corpus text = {0};
    double sum = 0;
    if (argc != 6)
        return 2;
    folder = argv[1];
    read_config(&m.config);
    take_model(&m);
    const uint32_t batch = (uint32_t)atoi(argv[3]), sequence = (uint32_t)atoi(argv[4]);
    const uint32_t tokens = VALIDATION_BATCHES * batch, sequences = tokens / sequence;
    text.context = m.config.context;
    text.sequence = sequence;
    if (corpus_read(&text, (const char *const *)&argv[2], 1) != CLMOE_SUCCESS)
        fail("%s", cli_error());
    uint32_t *positions = memory(tokens * sizeof *positions);
    corpus_held_out(&text, 0, sequences, sequences, positions);
    for (uint32_t t = 0; t < tokens; t++)
        sum += token(&m, text.bytes + positions[t], NULL, NULL);
    write_rows(&m, &text, positions, argv[5]);
    printf("%s %.7f\n", m.config.type, sum / tokens);
    return 0;
}
