/*
 * The auxiliary losses of Hugging Face and Megatron-Core on the checkpoints of 17 families, by a
 * plain program in double and by the layer's losses and statistics.
 */
#include "io/safetensors.h"
#include "support_balance.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const char *const families[] = {
    "deepseek_v2",    "deepseek_v3", "ernie4_5_moe", "glm4_moe",    "gpt_oss",       "granitemoe",
    "hunyuan_v1_moe", "jamba",       "lfm2_moe",     "llama4_text", "longcat_flash", "minimax_m2",
    "mixtral",        "olmoe",       "phimoe",       "qwen2_moe",   "qwen3_moe",
};

/* The recorded input x [T,D] of the block. */
static float *recorded_x(const char *directory, uint32_t *tokens) {
    char path[600];
    safetensors *file;
    float *x = NULL;
    snprintf(path, sizeof path, "%s/activations.safetensors", directory);
    OK(safetensors_open(path, &file));
    for (size_t i = 0; i < safetensors_count(file); i++) {
        const st_tensor *t = safetensors_at(file, i);
        if (strcmp(t->name + strlen(t->name) - 2, ".x") != 0)
            continue;
        x = HOST(float, (size_t)t->elements);
        OK(safetensors_read_f32(file, t, 0, (size_t)t->elements, x));
        *tokens = (uint32_t)t->shape[0];
    }
    safetensors_close(file);
    assert_non_null(x);
    return x;
}

static float *read_floats(clmoe_buf buf, size_t n) {
    float *values = HOST(float, n);
    buf_read(buf, values, n * sizeof *values);
    return values;
}

/* ---- The two formulas, from router logits g [T,R] ---------------------------------------------
 */

typedef struct problem {
    size_t tokens, columns, experts, top_k;
    clmoe_score_function score;
    const double *logits;
    const uint8_t *mask; /* the attention mask, or NULL */
} problem;

static size_t tokens_in(const problem *q) {
    size_t n = 0;
    for (size_t t = 0; t < q->tokens; t++)
        n += q->mask == NULL || q->mask[t] != 0;
    return n;
}

static void softmax_row(const problem *q, size_t t, double *p) {
    double best = -INFINITY, sum = 0.0;
    for (size_t e = 0; e < q->columns; e++)
        best = fmax(best, q->logits[t * q->columns + e]);
    for (size_t e = 0; e < q->columns; e++)
        sum += p[e] = exp(q->logits[t * q->columns + e] - best);
    for (size_t e = 0; e < q->columns; e++)
        p[e] /= sum;
}

/* The column of the j-th largest value of p, j from 0. */
static size_t choice(const problem *q, const double *p, size_t j) {
    for (size_t e = 0; e < q->columns; e++) {
        size_t above = 0;
        for (size_t i = 0; i < q->columns; i++)
            above += p[i] > p[e] || (p[i] == p[e] && i < e);
        if (above == j)
            return e;
    }
    return q->columns;
}

/*
 * load_balancing_loss_func: P = softmax(g), f[j,e] the share of tokens whose j-th choice is e,
 * E * sum_j sum_e f[j,e] * mean P[e].
 */
static double hugging_face(const problem *q) {
    double *p = HOST(double, q->columns), *f = HOST(double, q->top_k * q->columns);
    double *mean = HOST(double, q->columns), T = (double)tokens_in(q), loss = 0.0;
    for (size_t t = 0; t < q->tokens; t++) {
        if (q->mask && q->mask[t] == 0)
            continue;
        softmax_row(q, t, p);
        for (size_t j = 0; j < q->top_k; j++)
            f[j * q->columns + choice(q, p, j)] += 1.0 / T;
        for (size_t e = 0; e < q->columns; e++)
            mean[e] += p[e] / T;
    }
    for (size_t j = 0; j < q->top_k; j++)
        for (size_t e = 0; e < q->experts; e++)
            loss += f[j * q->columns + e] * mean[e];
    return loss * (double)q->experts;
}

/*
 * switch_load_balancing_loss_func with coefficient 1: sum_e (sum_t p * tokens_e) * E / (k T^2);
 * p is softmax, or sigmoid over its sum + 1e-20; tokens_e counts a top-k of p.
 */
static double megatron(const problem *q) {
    double *p = HOST(double, q->columns), *sum_p = HOST(double, q->columns);
    double *tokens = HOST(double, q->columns), T = (double)tokens_in(q), loss = 0.0;
    for (size_t t = 0; t < q->tokens; t++) {
        double sum = 1e-20;
        if (q->mask && q->mask[t] == 0)
            continue;
        softmax_row(q, t, p);
        if (q->score == CLMOE_SCORE_SIGMOID) {
            for (size_t e = 0; e < q->columns; e++)
                sum += p[e] = 1.0 / (1.0 + exp(-q->logits[t * q->columns + e]));
            for (size_t e = 0; e < q->columns; e++)
                p[e] /= sum;
        }
        for (size_t j = 0; j < q->top_k; j++)
            tokens[choice(q, p, j)] += 1.0;
        for (size_t e = 0; e < q->columns; e++)
            sum_p[e] += p[e];
    }
    for (size_t e = 0; e < q->experts; e++)
        loss += sum_p[e] * tokens[e];
    return loss * (double)q->experts / ((double)q->top_k * T * T);
}

/* ---- The layer --------------------------------------------------------------------------------
 */

/* A family's layer with its weights, and its router's logits in double. */
typedef struct family {
    clmoe_layer_desc desc;
    clmoe_weights weights;
    uint32_t tokens;
    float *x;
    double *logits;
} family;

static void close_checkpoint(void *checkpoint) {
    clmoe_checkpoint_close(checkpoint);
}

static void release_weights(void *weights) {
    clmoe_weights_release(weights);
}

static family *open_family(const char *name) {
    char directory[512];
    clmoe_checkpoint *checkpoint;
    family *f = HOST(family, 1);
    snprintf(directory, sizeof directory, "%s/checkpoints/%s", TEST_DATA, name);
    OK(clmoe_checkpoint_open(directory, NULL, &checkpoint));
    clean_later(close_checkpoint, checkpoint);
    OK(clmoe_checkpoint_layer(checkpoint, 0, &f->desc));
    f->desc.engine = "ref";
    f->desc.balance.enabled = 1;
    OK(clmoe_checkpoint_upload(checkpoint, 0, &f->desc, test.context, test.queue, &f->weights));
    clean_later(release_weights, &f->weights);
    f->x = recorded_x(directory, &f->tokens);
    size_t R = ref_columns(&f->desc), D = f->desc.dim;
    ref_weights router = {.router = read_floats(f->weights.router, R * D)};
    if (f->desc.router.bias)
        router.router_bias = read_floats(f->weights.router_bias, R);
    f->logits = HOST(double, f->tokens *R);
    ref_logits(&f->desc, f->tokens, f->x, &router, f->logits);
    return f;
}

/* clmoe_forward() with two losses; their values and the statistics. */
static const uint32_t *forward(const family *f, const uint8_t *mask, float *values) {
    const clmoe_loss_desc losses[] = {
        {.kind = CLMOE_LOSS_SWITCH,
         .weight = 0.001f,
         .p_source = CLMOE_P_SOFTMAX,
         .f_source = CLMOE_F_FRESH},
        {.kind = CLMOE_LOSS_SWITCH, .weight = 0.001f, .f_source = CLMOE_F_FRESH},
    };
    clmoe_layer *layer = test_layer(0, &f->desc);
    clmoe_forward_args args;
    clmoe_forward_args_init(&args);
    args.tokens = f->tokens;
    args.weights = &f->weights;
    args.x = buf_of(f->x, (size_t)f->tokens * f->desc.dim * 4);
    args.token_mask = buf_of(mask, f->tokens);
    args.scratch = scratch_of(layer, f->tokens);
    args.y = buf_new((size_t)f->tokens * f->desc.dim * 4);
    args.stats = buf_new(stats_size(layer));
    args.losses = losses;
    args.num_losses = 2;
    args.loss_values = buf_new(8);
    OK(clmoe_forward(layer, test.queue, &args, 0, NULL, NULL));
    buf_read(args.loss_values, values, 8);
    return buf_get(args.stats);
}

static void check(const char *what, double got, double want) {
    double error = fabs(got - want) / want;
    worst_note(what, error);
    CHECK(error <= 1e-6, "%s: %.9g, not %.9g\n", what, got, want);
}

/* The mean number of choices per token that are experts with weights: K but for identity experts.
 */
static double choices_per_token(const problem *q) {
    double *p = HOST(double, q->columns), count = 0.0;
    for (size_t t = 0; t < q->tokens; t++) {
        if (q->mask && q->mask[t] == 0)
            continue;
        softmax_row(q, t, p);
        for (size_t j = 0; j < q->top_k; j++)
            count += choice(q, p, j) < q->experts;
    }
    return count / (double)tokens_in(q);
}

/* E / (K T^2) sum_e load * importance: Megatron's loss where the choice has no bias and groups. */
static double from_statistics(const problem *q, const uint32_t *words) {
    const uint32_t *load = words + sizeof(clmoe_stats) / 4;
    const float *importance = (const float *)(load + 4 * q->columns);
    double sum = 0.0, T = (double)tokens_in(q);
    for (size_t e = 0; e < q->experts; e++)
        sum += load[e] * (double)importance[e];
    return sum * (double)q->experts / ((double)q->top_k * T * T);
}

static void check_family(const char *name, bool masked) {
    const family *f = open_family(name);
    const clmoe_router_desc *router = &f->desc.router;
    problem q = {.tokens = f->tokens,
                 .columns = ref_columns(&f->desc),
                 .experts = f->desc.num_experts,
                 .top_k = f->desc.top_k,
                 .score = router->score,
                 .logits = f->logits,
                 .mask = masked ? random_mask(f->tokens) : NULL};
    float values[2];
    const uint32_t *stats = forward(f, q.mask, values);
    /* F is over the experts with weights; without identity experts this is K. */
    double k = choices_per_token(&q);
    check("switch softmax fresh, times K: Hugging Face", k * (double)values[0], hugging_face(&q));
    check("switch fresh: Megatron-Core", k / (double)q.top_k * (double)values[1], megatron(&q));
    if (router->select_bias == 0 && router->groups.count <= 1)
        check("load and importance: Megatron-Core", from_statistics(&q, stats), megatron(&q));
}

static void every_family(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(families); i++)
        for (int masked = 0; masked < 2; masked++) {
            test_case("%s%s", families[i], masked ? ", masked" : "");
            seed_set(i + 1);
            check_family(families[i], masked);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_family)};
    return RUN(tests);
}
