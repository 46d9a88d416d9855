/* Batches for statistics and losses. */
#include "support_balance.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Worst errors ---------------------------------------------------------------------------- */

static struct {
    char name[64];
    double error;
    size_t checks;
} worst[128];

static void worst_print(void) {
    for (size_t i = 0; i < COUNT_OF(worst) && worst[i].checks; i++)
        printf("worst error  %-36s %.2e  in %zu checks\n", worst[i].name, worst[i].error,
               worst[i].checks);
}

void worst_note(const char *name, double error) {
    size_t i = 0;
    if (worst[0].checks == 0)
        atexit(worst_print);
    while (i + 1 < COUNT_OF(worst) && worst[i].checks && strcmp(worst[i].name, name) != 0)
        i++;
    snprintf(worst[i].name, sizeof worst[i].name, "%s", name);
    worst[i].checks++;
    worst[i].error = fmax(worst[i].error, error);
}

/* ---- Making a batch -------------------------------------------------------------------------- */

/* n positive shares that sum to 1; about every fourth is 0 if `zeros`. */
static void random_shares(float *to, size_t n, bool zeros) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) {
        to[i] = zeros && i > 0 && random_below(4) == 0 ? 0.0f : (float)(0.1 + random_unit());
        sum += (double)to[i];
    }
    for (size_t i = 0; i < n; i++)
        to[i] = (float)((double)to[i] / sum);
}

clmoe_state *random_state_of(const clmoe_layer_desc *desc) {
    size_t R = ref_columns(desc), E = desc->num_experts;
    clmoe_state *state = host_alloc(1, sizeof *state + 20 * R);
    *state = (clmoe_state){.version = 2,
                           .columns = (uint32_t)R,
                           .seed = {7, 11},
                           .step = 5,
                           .updates = 3,
                           .noise_scale = 1.0f,
                           .temperature_scale = 1.0f,
                           .loss_weight = 1.0f,
                           .capacity_scale = 1.0f};
    float *arrays = (float *)(state + 1);
    uint32_t *idle = (uint32_t *)(arrays + 3 * R);
    random_shares(arrays + R, E, true);
    random_shares(arrays + 2 * R, E, true);
    for (size_t e = 0; e < R; e++)
        idle[e] = random_below(3) == 0 ? 40000 + random_below(100) : random_below(32000);
    return state;
}

void balance_set_logits(balance_batch *b, float *logits) {
    size_t n = (size_t)b->tokens * ref_columns(&b->desc);
    double *wide = HOST(double, n);
    for (size_t i = 0; i < n; i++)
        wide[i] = (double)logits[i];
    b->logits = logits;
    b->in.logits = wide;
}

/* Gives each token the first 0 to K of its live pairs, without gaps. */
static void pack_pairs(balance_batch *b) {
    size_t K = b->desc.top_k, pairs = b->tokens * K, end = 0;
    int32_t *offsets = HOST(int32_t, b->tokens + 1), *ids = HOST(int32_t, pairs);
    float *weights = HOST(float, pairs);
    for (size_t t = 0; t < b->tokens; t++) {
        for (size_t k = 0; k < (size_t)b->in.live[t] && random_below(8) != 0; k++, end++) {
            ids[end] = b->in.ids[t * K + k];
            weights[end] = b->in.pair_weights[t * K + k];
        }
        offsets[t + 1] = (int32_t)end;
    }
    b->in.ids = ids;
    b->in.pair_weights = weights;
    b->in.live = NULL;
    b->in.token_offsets = offsets;
}

void balance_choose(balance_batch *b) {
    size_t n = (size_t)b->tokens * ref_columns(&b->desc), pairs = (size_t)b->tokens * b->desc.top_k;
    double *scores = HOST(double, n), *wide = HOST(double, pairs);
    float *narrow = HOST(float, n), *pair_weights = HOST(float, pairs);
    int32_t *ids = HOST(int32_t, pairs), *live = HOST(int32_t, b->tokens);
    ref_weights weights = {.select_bias = b->select_bias, .expert_scale = b->in.expert_scale};
    for (size_t i = 0; i < n; i++)
        scores[i] = b->in.logits[i] + (b->in.noise ? b->in.noise[i] : 0.0);
    ref_scores(&b->desc, b->tokens, scores, scores);
    for (size_t i = 0; i < n; i++)
        narrow[i] = (float)scores[i];
    ref_topk(&b->desc, b->tokens, narrow, &weights, ids, wide, live);
    for (size_t p = 0; p < pairs; p++)
        pair_weights[p] = (float)wide[p];
    b->in.ids = ids;
    b->in.pair_weights = pair_weights;
    b->in.live = live;
    if (b->in.token_offsets)
        pack_pairs(b);
}

void balance_make(balance_batch *b, const clmoe_layer_desc *desc, uint32_t tokens,
                  const balance_options *options) {
    size_t R = ref_columns(desc), E = desc->num_experts;
    double spread = options->spread > 0.0 ? options->spread : 1.0;
    memset(b, 0, sizeof *b);
    b->desc = *desc;
    b->tokens = b->in.tokens = tokens;
    float *logits = pattern_logits(options->kind, tokens, (uint32_t)R);
    for (size_t i = 0; i < tokens * R; i++) {
        logits[i] = (float)(spread * (double)logits[i]);
        if (options->positive)
            logits[i] = fabsf(logits[i]) + 0.1f;
    }
    balance_set_logits(b, logits);
    b->select_bias = desc->router.select_bias ? random_floats(R, 0.3) : NULL;
    b->in.expert_scale = desc->router.expert_scale ? random_floats(R, 1.0) : NULL;
    balance_choose(b);
    b->in.token_mask = options->mask ? random_mask(tokens) : NULL;
    b->in.state = options->state ? random_state_of(desc) : NULL;
    float *target = HOST(float, E), *supplied = HOST(float, E);
    for (size_t e = 0; e < E; e++) {
        target[e] = (float)(0.2 + 3.0 * random_unit());
        supplied[e] = (float)random_below(1000);
    }
    supplied[0] += 1.0f;
    b->in.load_target = options->target ? target : NULL;
    b->in.load_supplied = options->supplied ? supplied : NULL;
    if (options->offsets)
        pack_pairs(b);
    if (options->external) {
        b->in.logits = NULL;
        b->in.live = NULL;
        b->logits = NULL;
    }
}

/* ---- The device's side ----------------------------------------------------------------------- */

void balance_upload(balance_batch *b, uint32_t group_size) {
    const clmoe_layer_desc *desc = &b->desc;
    size_t T = b->tokens, R = ref_columns(desc), E = desc->num_experts;
    size_t pairs = ref_pairs(desc, b->tokens);
    b->layer = test_layer(group_size, desc);
    ref_plan_in plan = {.tokens = b->tokens,
                        .ids = b->in.ids,
                        .pair_weights = b->in.pair_weights,
                        .live = b->in.live,
                        .token_mask = b->in.token_mask,
                        .token_offsets = b->in.token_offsets};
    b->dev.plan = plan_run(b->layer, desc, &plan, &b->layout);
    const unsigned char *bytes = buf_get(b->dev.plan);
    b->in.kept = (const uint32_t *)(const void *)(bytes + b->layout.kept);
    b->weights.expert_scale = buf_of(b->in.expert_scale, R * 4);
    b->dev.logits = buf_of(b->logits, T * R * 4);
    b->dev.ids = buf_of(b->in.ids, pairs * 4);
    b->dev.pair_weights = buf_of(b->in.pair_weights, pairs * 4);
    b->dev.live = buf_of(b->in.live, T * 4);
    b->dev.token_mask = buf_of(b->in.token_mask, T);
    b->dev.token_offsets = buf_of(b->in.token_offsets, (T + 1) * 4);
    b->dev.state = buf_of(b->in.state, sizeof(clmoe_state) + 20 * R);
    b->dev.load_target = buf_of(b->in.load_target, E * 4);
    b->dev.load_supplied = buf_of(b->in.load_supplied, E * 4);
    b->dev.scratch = scratch_of(b->layer, b->tokens);
}

clmoe_buf balance_stats(balance_batch *b) {
    clmoe_stats_args args = {
        .struct_size = sizeof args,
        .tokens = b->tokens,
        .weights = &b->weights,
        .x = b->dev.x,
        .logits = b->dev.logits,
        .ids = b->dev.ids,
        .pair_weights = b->dev.pair_weights,
        .plan = b->dev.plan,
        .live = b->dev.live,
        .token_mask = b->dev.token_mask,
        .token_offsets = b->dev.token_offsets,
        .state = b->dev.state,
        .load_target = b->dev.load_target,
        .scratch = b->dev.scratch,
        .stats = buf_new(stats_size(b->layer)),
    };
    OK(clmoe_stats_compute(b->layer, test.queue, &args, 0, NULL, NULL));
    return args.stats;
}

/* A scalar against the oracle's: relative to its size, or to `floor` where that is larger. */
static void compare_field(const char *name, float got, double want, double floor) {
    double error = fabs((double)got - want) / fmax(fabs(want), floor);
    CHECK(isfinite(got), "stats.%s is %g, not %g\n", name, (double)got, want);
    worst_note(name, error);
    CHECK(error <= STATS_TOLERANCE, "stats.%s is %.9g, not %.9g\n", name, (double)got, want);
}

static void compare_array(const char *name, const float *got, const double *want, size_t n) {
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        norm += want[i] * want[i];
    }
    if (norm > 0.0)
        worst_note(name, sqrt(difference / norm));
    compare_floats(name, got, want, n, STATS_TOLERANCE);
}

static void compare_arrays(const uint32_t *words, const ref_statistics *want) {
    size_t R = want->columns;
    const float *floats = (const float *)words;
    compare_ints("load", words, want->of.load, R);
    compare_ints("kept", words + R, want->of.kept, R);
    compare_ints("dropped", words + 2 * R, want->of.dropped, R);
    compare_ints("rerouted", words + 3 * R, want->of.rerouted, R);
    compare_array("importance", floats + 4 * R, want->of.importance, R);
    compare_array("weight_sums", floats + 5 * R, want->of.weight_sums, R);
    compare_array("ema", floats + 6 * R, want->of.ema, R);
    compare_ints("idle_tokens", words + 7 * R, want->of.idle_tokens, R);
    compare_ints("device_tokens", words + 8 * R, want->of.device_tokens, want->device_groups);
}

void balance_compare_stats(const balance_batch *b, clmoe_buf buf) {
    const uint32_t *words = buf_get(buf);
    clmoe_stats got;
    ref_statistics want;
    memcpy(&got, words, sizeof got);
    ref_statistics_make(&b->desc, &b->in, &want);
#define FIELD(name)                                                                                \
    CHECK(got.name == want.name, "stats." #name " is %u, not %u\n", got.name, want.name);
    REF_STATS_INTS(FIELD)
#undef FIELD
    CHECK(got.version == 1, "stats.version is %u\n", got.version);
    for (size_t i = 0; i < COUNT_OF(got.reserved); i++)
        CHECK(got.reserved[i] == 0, "stats.reserved[%zu] is %u\n", i, got.reserved[i]);
    compare_arrays(words + sizeof got / 4, &want);
    /*
     * target_change is a difference of numbers of size 1; fluctuation a sum of differences of
     * shares, whose quotients OpenCL may round by 2.5 units.
     */
#define FIELD(name)                                                                                \
    compare_field(#name, got.name, want.name, strcmp(#name, "fluctuation") == 0 ? 1e-2 : 1e-3);
    REF_STATS_FLOATS(FIELD)
#undef FIELD
    ref_statistics_free(&want);
}
