#include "cases.h"

#include "clmoe/clmoe.h"

#include <math.h>

/* clang-format off */

/* A model's layer at five batch sizes. */
#define MODEL(name, dim, hidden, experts, top_k)                        \
    {name, CASE_GPU, 8192, dim, hidden, experts, top_k, false},         \
    {name, CASE_GPU, 1024, dim, hidden, experts, top_k, false},         \
    {name, CASE_GPU, 64,   dim, hidden, experts, top_k, false},         \
    {name, CASE_GPU, 8,    dim, hidden, experts, top_k, false},         \
    {name, CASE_GPU, 1,    dim, hidden, experts, top_k, false}

/* Finer and finer experts: 128 rows each, the same work and the same weights in all. */
#define FINE(experts) \
    {"scaling-experts", CASE_BY_NAME, 1024, 256, 65536 / (experts), experts, (experts) / 8, false}

#define BATCH(tokens) {"scaling-tokens", CASE_BY_NAME, tokens, 512, 128, 32, 4, false}

const bench_case bench_cases[] = {
    /*               home      T      D     H      E    K */
    {"olmoe-cpu",    CASE_CPU, 512,   1024, 512,   64,  8,  false},
    {"mixtral-cpu",  CASE_CPU, 256,   1024, 3584,  8,   2,  false},
    {"decode-cpu",   CASE_CPU, 1,     1024, 512,   64,  8,  false},
    {"decode-cpu",   CASE_CPU, 8,     1024, 512,   64,  8,  false},
    {"router-wide",  CASE_ANY, 16384, 32,   16,    512, 10, true},
    {"router-256",   CASE_GPU, 8192,  32,   16,    256, 8,  true},

    MODEL("mixtral-8x7b",    4096, 14336, 8,   2),
    MODEL("qwen3-30b-a3b",   2048, 768,   128, 8),
    MODEL("olmoe",           2048, 1024,  64,  8),
    MODEL("deepseek-v3",     7168, 2048,  256, 8),
    MODEL("gpt-oss-20b",     2880, 2880,  32,  4),
    MODEL("glm-4.5-air",     4096, 1408,  128, 8),

    BATCH(1024), BATCH(2048), BATCH(4096), BATCH(8192), BATCH(16384), BATCH(32768), BATCH(65536),
    FINE(8), FINE(16), FINE(32), FINE(64), FINE(128), FINE(256), FINE(512),

    /* For the tests: multiples of nothing. */
    {"tiny",         CASE_BY_NAME, 37, 45, 29,  6,  2, false},
    {"tiny",         CASE_BY_NAME, 1,  45, 29,  6,  2, false},
    {"tiny-router",  CASE_BY_NAME, 70, 9,  5,   33, 5, true},
    {NULL, CASE_ANY, 0, 0, 0, 0, 0, false},
};

/* clang-format on */

const char *const step_names[STEP_COUNT] = {
    "layer",
    "score",
    "topk",
    "plan",
    "routing",
    "routing:expert-choice",
    "routing:sinkhorn",
    "routing:reroute",
    "topk_to_plan",
    "dispatch",
    "experts",
    "combine",
    "stats",
    "layer:train",
    "layer:train+balance",
    "balance",
    "bias_counts",
    "backward",
    "backward:data",
    "backward:weights",
    "train",
};

const char *const pattern_names[ROUTE_PATTERNS] = {"uniform", "zipf", "one-expert", "round-robin"};

bool case_has_step(const bench_case *c, bench_step step) {
    switch (step) {
    case STEP_EXPERT_CHOICE:
    case STEP_SINKHORN:
    case STEP_REROUTE:
        return c->routing_only;
    case STEP_LAYER:
    case STEP_DISPATCH:
    case STEP_EXPERTS:
    case STEP_COMBINE:
    case STEP_TRAIN:
    case STEP_TRAIN_BALANCE:
    case STEP_BACKWARD:
    case STEP_BACKWARD_DATA:
    case STEP_BACKWARD_WEIGHTS:
    case STEP_FORWARD_BACKWARD:
        return !c->routing_only;
    default:
        return true;
    }
}

bool step_is_backward(bench_step step) {
    return step >= STEP_BACKWARD && step <= STEP_FORWARD_BACKWARD;
}

bool step_is_by_name(bench_step step) {
    return step == STEP_TRAIN || step == STEP_TRAIN_BALANCE || step == STEP_BALANCE ||
           step == STEP_BIAS_COUNTS || step_is_backward(step);
}

bool step_makes_gradients(bench_step step) {
    return step == STEP_BACKWARD || step == STEP_BACKWARD_WEIGHTS || step == STEP_FORWARD_BACKWARD;
}

bool step_runs_experts(bench_step step) {
    return step == STEP_LAYER || step == STEP_EXPERTS || step == STEP_TRAIN ||
           step == STEP_TRAIN_BALANCE || step_is_backward(step);
}

float pattern_bias(case_pattern pattern, uint32_t expert) {
    if (pattern == ROUTE_ZIPF)
        return -logf((float)expert + 1);
    return pattern == ROUTE_ONE_EXPERT && expert == 0 ? 20 : 0;
}

bool pattern_is_forced(case_pattern pattern) {
    return pattern == ROUTE_ROUND_ROBIN;
}

bool pattern_has_step(case_pattern pattern, bench_step step) {
    return !pattern_is_forced(pattern) || step == STEP_LAYER || step == STEP_PLAN ||
           step == STEP_DISPATCH || step == STEP_EXPERTS || step == STEP_COMBINE ||
           step == STEP_STATS;
}

static double pairs_of(const bench_case *c) {
    return (double)c->tokens * c->top_k;
}

double case_flops(const bench_case *c, bench_step step) {
    const double tokens = c->tokens, pairs = pairs_of(c), dim = c->dim;
    const double score = 2 * tokens * c->experts * dim;
    const double experts = 2 * pairs * 3 * c->hidden_dim * dim;
    const double combine = 2 * pairs * dim;
    switch (step) {
    case STEP_LAYER:
    case STEP_TRAIN:
    case STEP_TRAIN_BALANCE:
        return score + experts + combine;
    case STEP_SCORE:
        return score;
    case STEP_EXPERTS:
        return experts;
    case STEP_COMBINE:
        return combine;
    case STEP_BACKWARD_DATA: /* as many as forward, through the matrices the other way */
    case STEP_BACKWARD_WEIGHTS:
        return score + experts;
    case STEP_BACKWARD:
        return 2 * (score + experts);
    case STEP_FORWARD_BACKWARD:
        return 3 * (score + experts) + combine;
    default:
        return 0;
    }
}

double case_weight_bytes(const bench_case *c, size_t weight) {
    return 3.0 * c->experts * c->hidden_dim * c->dim * (double)weight;
}

double case_bytes(const bench_case *c, bench_step step, const case_sizes *sizes) {
    const double pairs = pairs_of(c), word = 4; /* bytes of ids, routing weights, scores */
    const double rows = (double)c->tokens * c->dim * (double)sizes->element;
    const double pair_rows = pairs * c->dim * (double)sizes->element;
    const double scores = (double)c->tokens * c->experts * word;
    const double router = (double)c->experts * c->dim * word;
    const double choice = 2 * pairs * word + c->tokens * word; /* ids, weights, live */
    const double plan = 3 * pairs * word;                      /* slot, pair and token of each */
    const double weights = case_weight_bytes(c, sizes->weight) / c->experts * sizes->touched;
    const double layer = rows + router + weights + rows;
    const double counts = (double)c->experts * CLMOE_BIAS_BINS * word;
    const double stats = 8.0 * c->experts * word;                        /* its arrays */
    const double z = pairs * 2 * c->hidden_dim * (double)sizes->element; /* what was saved */
    const double gradients = case_weight_bytes(c, sizes->gradient) + router;
    switch (step) {
    case STEP_LAYER:
    case STEP_TRAIN:
        return layer;
    case STEP_TRAIN_BALANCE:
        return layer + stats + scores; /* dlogits */
    case STEP_BALANCE:
        return scores + 2 * pairs * word + stats + scores;
    case STEP_BIAS_COUNTS:
        return scores + counts;
    case STEP_SCORE:
        return rows + router + 2 * scores;
    case STEP_TOPK:
        return scores + choice;
    case STEP_PLAN:
        return pairs * word + plan;
    case STEP_ROUTING:
    case STEP_EXPERT_CHOICE:
    case STEP_SINKHORN:
    case STEP_REROUTE:
    case STEP_TOPK_TO_PLAN:
        return scores + choice + plan;
    case STEP_DISPATCH:
        return rows + pair_rows;
    case STEP_EXPERTS:
        return rows + weights + pair_rows;
    case STEP_COMBINE:
        return pair_rows + pairs * word + rows;
    case STEP_BACKWARD:
        return rows + z + weights + router + rows + rows + gradients;
    case STEP_BACKWARD_DATA:
        return z + weights + router + rows + rows;
    case STEP_BACKWARD_WEIGHTS:
        return rows + z + rows + gradients;
    case STEP_FORWARD_BACKWARD:
        return layer + rows + rows + gradients;
    case STEP_STATS:
        return scores + 2 * pairs * word + stats;
    case STEP_COUNT:
        break;
    }
    return 0;
}
