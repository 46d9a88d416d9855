/* quantile: the counts, the bias they make, and that it balances. */
#include "ref_quantile.h"
#include "support.h"

#include <math.h>
#include <string.h>

enum { BINS = CLMOE_BIAS_BINS };

/* A layer with the rule, and a batch of logits. */
typedef struct rig {
    clmoe_layer_desc desc;
    clmoe_layer *layer;
    size_t state_bytes;
    float *logits; /* [T,E] */
    clmoe_bias_counts_args counts;
    clmoe_balance_args update;
} rig;

static const shape small = {37, 5, 60, 0, 4, 3};

static const struct {
    const char *name;
    clmoe_score_function score;
    float softcap, temperature;
} scores[] = {{"sigmoid", CLMOE_SCORE_SIGMOID, 0.0f, 1.0f},
              {"softmax, softcap", CLMOE_SCORE_SOFTMAX, 3.0f, 0.25f}};

static size_t counts_bytes(const rig *r) {
    return (size_t)r->desc.num_experts * BINS * 4;
}

/* Statistics with any load: the rule does not look at it. */
static clmoe_buf any_stats(const rig *r) {
    const size_t bytes = stats_size(r->layer);
    uint32_t *words = HOST(uint32_t, bytes / 4);
    const clmoe_stats stats = {.version = 1, .columns = r->desc.num_experts};
    memcpy(words, &stats, sizeof stats);
    for (size_t e = 0; e < r->desc.num_experts; e++)
        words[sizeof(clmoe_stats) / 4 + e] = 1 + random_below(9);
    return buf_of(words, bytes);
}

static void write_bias(const rig *r, const float *bias) {
    char *bytes = buf_get(r->counts.state);
    memcpy(bytes + sizeof(clmoe_state), bias, r->desc.num_experts * sizeof *bias);
    buf_write(r->counts.state, bytes, r->state_bytes);
}

static float *read_bias(const rig *r) {
    return (float *)(void *)((char *)buf_get(r->counts.state) + sizeof(clmoe_state));
}

static void rig_make(rig *r, uint32_t group_size, const shape *s, size_t which) {
    const size_t values = (size_t)s->tokens * s->experts;
    size_t bytes = 0;
    *r = (rig){.desc = desc_of(s)};
    r->desc.router.score = scores[which].score;
    r->desc.router.softcap = scores[which].softcap;
    r->desc.router.temperature = scores[which].temperature;
    r->desc.router.select_bias = 1;
    r->layer = test_layer(group_size, &r->desc);
    OK(clmoe_state_size(r->layer, &r->state_bytes));
    OK(clmoe_bias_counts_size(r->layer, &bytes));
    CHECK(bytes == counts_bytes(r), "%zu bytes\n", bytes);
    r->logits = random_floats(values, 1.0);
    r->counts = (clmoe_bias_counts_args){.struct_size = sizeof r->counts,
                                         .tokens = s->tokens,
                                         .logits = buf_of(r->logits, values * 4),
                                         .state = buf_new(r->state_bytes),
                                         .scratch = scratch_of(r->layer, s->tokens),
                                         .bias_counts = buf_new(bytes)};
    OK(clmoe_state_init(r->layer, test.queue, r->counts.state, 1, 0, NULL, NULL));
    clmoe_balance_args_init(&r->update);
    r->update.state = r->counts.state;
    r->update.stats = any_stats(r);
    r->update.bias_rule = CLMOE_BIAS_QUANTILE;
    r->update.bias_counts = r->counts.bias_counts;
}

static void count(const rig *r) {
    OK(clmoe_bias_counts(r->layer, test.queue, &r->counts, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
}

/* ---- The counts ------------------------------------------------------------------------------ */

/* That as many counts lie below each edge as distances do, but for those too near to it. */
static void compare_counts(const rig *r, const uint32_t *counts, const uint8_t *mask,
                           const float *bias) {
    const uint32_t T = r->counts.tokens, E = r->desc.num_experts;
    const size_t values = (size_t)T * E;
    double *clean = HOST(double, values), *s = HOST(double, values), *d = HOST(double, values);
    for (size_t i = 0; i < values; i++)
        clean[i] = (double)r->logits[i];
    ref_scores(&r->desc, T, clean, s);
    for (size_t i = 0; i < values; i++)
        s[i] = isfinite(r->logits[i]) ? s[i] : -(double)INFINITY;
    ref_quantile_distances(&r->desc, T, s, bias, mask, d);
    for (uint32_t e = 0; e < E; e++) {
        uint32_t got = 0;
        for (uint32_t bin = 0; bin < BINS; bin++) {
            const double edge = bin + 1 < BINS ? ref_quantile_edge(bin + 1) : (double)INFINITY;
            uint32_t surely = 0, maybe = 0;
            for (uint32_t t = 0; t < T; t++) {
                surely += d[(size_t)e * T + t] < edge - 2e-6;
                maybe += d[(size_t)e * T + t] <= edge + 2e-6;
            }
            got += counts[(size_t)e * BINS + bin];
            CHECK(got >= surely && got <= maybe, "expert %u, to bin %u: %u, not %u to %u\n", e, bin,
                  got, surely, maybe);
        }
    }
}

/* Tokens without scores, with too few, and experts that some tokens cannot choose. */
static void spoil(rig *r) {
    const uint32_t E = r->desc.num_experts;
    for (uint32_t e = 0; e < E; e++) {
        r->logits[3 * E + e] = NAN;
        if (e >= r->desc.top_k)
            r->logits[5 * E + e] = -INFINITY;
        if (e > r->desc.top_k)
            r->logits[7 * E + e] = INFINITY;
    }
    for (uint32_t t = 8; t < 20; t++)
        r->logits[t * E + 11] = -INFINITY;
    buf_write(r->counts.logits, r->logits, (size_t)r->counts.tokens * E * 4);
}

static void counts_are_of_the_distances(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(scores); i++)
            for (int masked = 0; masked < 2; masked++) {
                rig r;
                test_case("group size %u, %s, mask %d", group_sizes[g], scores[i].name, masked);
                seed_set(i + 1);
                rig_make(&r, group_sizes[g], &small, i);
                spoil(&r);
                uint8_t *mask = masked ? random_mask(small.tokens) : NULL;
                float *bias = random_floats(small.experts, 0.3);
                r.counts.token_mask = buf_of(mask, small.tokens);
                write_bias(&r, bias);
                count(&r);
                const uint32_t *once = buf_get(r.counts.bias_counts);
                compare_counts(&r, once, mask, bias);
                r.counts.accumulate = 1;
                count(&r);
                const uint32_t *twice = buf_get(r.counts.bias_counts);
                for (size_t n = 0; n < (size_t)small.experts * BINS; n++)
                    CHECK(twice[n] == 2 * once[n], "count %zu is %u, %u\n", n, once[n], twice[n]);
            }
}

/* No tokens: zeros, or what was there. */
static void counts_of_no_tokens(void **state) {
    (void)state;
    rig r;
    test_case("no tokens");
    seed_set(1);
    rig_make(&r, 0, &small, 0);
    count(&r);
    const void *before = buf_get(r.counts.bias_counts);
    r.counts.tokens = 0;
    r.counts.accumulate = 1;
    count(&r);
    compare_bits("counts", buf_get(r.counts.bias_counts), before, counts_bytes(&r));
    r.counts.accumulate = 0;
    count(&r);
    compare_bits("zeros", buf_get(r.counts.bias_counts), HOST(char, counts_bytes(&r)),
                 counts_bytes(&r));
}

/* ---- The bias -------------------------------------------------------------------------------- */

static void compare_update(const rig *r, const uint32_t *counts, const float *bias) {
    const uint32_t E = r->desc.num_experts;
    double *want = HOST(double, E);
    ref_quantile_bias(&r->desc, counts, bias, want);
    OK(clmoe_balance_update(r->layer, test.queue, &r->update, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    compare_floats("select_bias", read_bias(r), want, E, 1e-5);
}

/* Of a batch, and of counts that no batch gives. */
static void the_bias_is_the_quantile(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        rig r;
        test_case("group size %u", group_sizes[g]);
        seed_set(2);
        rig_make(&r, group_sizes[g], &small, 0);
        float *bias = random_floats(small.experts, 0.3);
        write_bias(&r, bias);
        count(&r);
        compare_update(&r, buf_get(r.counts.bias_counts), bias);
        uint32_t *counts = HOST(uint32_t, small.experts * BINS);
        for (uint32_t e = 0; e < small.experts; e++) { /* 60000000 tokens each */
            uint32_t left = 60000000, bins = 1 + random_below(8);
            for (uint32_t i = 1; i < bins; i++) {
                const uint32_t some = random_below(left + 1);
                counts[e * BINS + random_below(BINS)] += some;
                left -= some;
            }
            counts[e * BINS + (e % 3 == 0   ? 0
                               : e % 3 == 1 ? BINS - 1
                                            : random_below(BINS))] += left;
        }
        bias = read_bias(&r);
        buf_write(r.counts.bias_counts, counts, counts_bytes(&r));
        compare_update(&r, counts, bias);
    }
}

/* Nothing counted: the bias keeps its differences; without load the arrays keep their bits. */
static void nothing_counted(void **state) {
    (void)state;
    rig r;
    test_case("nothing counted");
    seed_set(1);
    rig_make(&r, 0, &small, 0);
    const uint32_t E = small.experts;
    float *bias = random_floats(E, 0.3);
    double *want = HOST(double, E), mean = 0;
    for (uint32_t e = 0; e < E; e++)
        mean += (double)bias[e] / E;
    for (uint32_t e = 0; e < E; e++)
        want[e] = (double)bias[e] - mean;
    write_bias(&r, bias);
    buf_write(r.counts.bias_counts, HOST(char, counts_bytes(&r)), counts_bytes(&r));
    OK(clmoe_balance_update(r.layer, test.queue, &r.update, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    bias = read_bias(&r);
    compare_floats("select_bias", bias, want, E, 1e-5);
    clmoe_stats *no_load = (clmoe_stats *)host_alloc(1, stats_size(r.layer));
    no_load->version = 1;
    no_load->columns = E;
    r.update.stats = buf_of(no_load, stats_size(r.layer));
    r.counts.accumulate = 1;
    count(&r);
    OK(clmoe_balance_update(r.layer, test.queue, &r.update, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    float *now = read_bias(&r);
    compare_bits("select_bias, ema, previous", now, bias, (size_t)3 * E * 4);
    compare_bits("momentum", now + (size_t)4 * E, bias + (size_t)4 * E, (size_t)E * 4);
    no_load->version++;
    buf_write(r.update.stats, no_load, stats_size(r.layer));
    write_bias(&r, random_floats(E, 0.3));
    const void *before = buf_get(r.update.state);
    OK(clmoe_balance_update(r.layer, test.queue, &r.update, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    compare_bits("state beside other statistics", buf_get(r.update.state), before, r.state_bytes);
}

/* ---- Many experts ---------------------------------------------------------------------------- */

/* Largest load / mean load - 1 of the K best of scores [T,E] + bias. */
static double violation_of(const rig *r, const double *s, const float *bias) {
    const uint32_t E = r->desc.num_experts, K = r->desc.top_k, T = r->counts.tokens;
    uint32_t *load = HOST(uint32_t, E), most = 0;
    double *row = HOST(double, E);
    for (uint32_t t = 0; t < T; t++) {
        for (uint32_t e = 0; e < E; e++)
            row[e] = s[(size_t)t * E + e] + (double)bias[e];
        for (uint32_t k = 0; k < K; k++) {
            uint32_t best = 0;
            for (uint32_t e = 1; e < E; e++)
                best = row[e] > row[best] ? e : best;
            row[best] = -(double)INFINITY;
            load[best]++;
        }
    }
    for (uint32_t e = 0; e < E; e++)
        most = load[e] > most ? load[e] : most;
    return (double)most * E / ((double)T * K) - 1;
}

/* A softmax over 512 experts, whose scores are of the size 1/512; 32 pairs each. */
static void small_scores_balance(void **state) {
    (void)state;
    static const shape many = {2048, 5, 512, 0, 8, 3};
    rig r;
    test_case("softmax, 512 experts");
    seed_set(7);
    rig_make(&r, 0, &many, 1);
    const size_t values = (size_t)many.tokens * many.experts;
    const float *lean = random_floats(many.experts, 0.4);
    double *clean = HOST(double, values), *s = HOST(double, values);
    for (size_t i = 0; i < values; i++)
        clean[i] = (double)(r.logits[i] = (r.logits[i] + lean[i % many.experts]) / 4);
    buf_write(r.counts.logits, r.logits, values * 4);
    ref_scores(&r.desc, many.tokens, clean, s);
    const double first = violation_of(&r, s, read_bias(&r));
    for (int i = 0; i < 12; i++) {
        count(&r);
        OK(clmoe_balance_update(r.layer, test.queue, &r.update, 0, NULL, NULL));
    }
    CL_OK(clFinish(test.queue));
    const double last = violation_of(&r, s, read_bias(&r));
    print_message("MaxVio %.3f at first, %.3f after 12 steps\n", first, last);
    CHECK(first > 1 && last < 0.13, "MaxVio %g ends at %g\n", first, last);
}

/* ---- Repeatability --------------------------------------------------------------------------- */

/* From one state: the counts of a batch and the state that they make. */
static void count_and_update(const rig *r, const void *start, const void *poison) {
    buf_write(r->counts.state, start, r->state_bytes);
    buf_write(r->counts.bias_counts, poison, counts_bytes(r));
    count(r);
    OK(clmoe_balance_update(r->layer, test.queue, &r->update, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
}

/*
 * 50 runs give the same bits, with cutoffs by one work-item per token, or by a sorting network in
 * registers or in local memory, and with experts that many tokens count in the same bins.
 */
static void runs_are_the_same(void **state) {
    static const shape shapes[] = {{400, 5, 60, 0, 4, 3}, {3000, 5, 48, 0, 20, 3}};
    (void)state;
    for (size_t g = 0; g < 2; g++)
        for (size_t i = 0; i < COUNT_OF(shapes); i++) {
            rig r;
            test_case("group size %u, K %u", group_sizes[g], shapes[i].top_k);
            seed_set(6 + i);
            rig_make(&r, group_sizes[g], &shapes[i], i);
            write_bias(&r, random_floats(shapes[i].experts, 0.01));
            const void *start = buf_get(r.counts.state), *poison = buf_get(r.counts.bias_counts);
            count_and_update(&r, start, poison);
            const void *counts = buf_get(r.counts.bias_counts), *end = buf_get(r.counts.state);
            CHECK(memcmp(start, end, r.state_bytes) != 0, "the state does not move\n");
            for (int run = 1; run < 50; run++) {
                count_and_update(&r, start, poison);
                compare_bits("counts", buf_get(r.counts.bias_counts), counts, counts_bytes(&r));
                compare_bits("state", buf_get(r.counts.state), end, r.state_bytes);
            }
        }
}

/* ---- Micro-batches --------------------------------------------------------------------------- */

/* Four parts of a batch, added up by the device or by the host, are the whole. */
static void parts_add_up(void **state) {
    (void)state;
    static const shape whole = {400, 5, 60, 0, 4, 3};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        rig r;
        test_case("group size %u", group_sizes[g]);
        seed_set(4);
        rig_make(&r, group_sizes[g], &whole, 0);
        uint8_t *mask = random_mask(whole.tokens);
        r.counts.token_mask = buf_of(mask, whole.tokens);
        write_bias(&r, random_floats(whole.experts, 0.3));
        count(&r);
        const uint32_t *all = buf_get(r.counts.bias_counts);
        uint32_t *sum = HOST(uint32_t, whole.experts * BINS);
        const clmoe_buf logits = r.counts.logits, masks = r.counts.token_mask;
        for (int added = 0; added < 2; added++)
            for (uint32_t part = 0, begin = 0; part < 4; part++, begin += r.counts.tokens) {
                r.counts.tokens = part < 3 ? 90 : 130;
                r.counts.accumulate = added && part > 0;
                r.counts.logits = (clmoe_buf){logits.mem, logits.offset + begin * 60 * 4};
                r.counts.token_mask = (clmoe_buf){masks.mem, masks.offset + begin};
                count(&r);
                const uint32_t *some = buf_get(r.counts.bias_counts);
                for (size_t i = 0; !added && i < (size_t)whole.experts * BINS; i++)
                    sum[i] += some[i];
            }
        compare_bits("added by the host", sum, all, counts_bytes(&r));
        compare_bits("added by the device", buf_get(r.counts.bias_counts), all, counts_bytes(&r));
    }
}

/* What forward adds is what the call counts; it only adds, and only where asked. */
static void forward_counts(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        batch b;
        device_batch d;
        test_case("group size %u", group_sizes[g]);
        seed_set(5);
        clmoe_layer_desc desc = desc_of(&small);
        desc.router.score = CLMOE_SCORE_SIGMOID;
        desc.router.select_bias = 1;
        desc.router.noise.kind = CLMOE_NOISE_LEARNED;
        desc.router.dropout.experts = 0.1f;
        desc.capacity.factor = 1.0;
        desc.capacity.overflow = CLMOE_OVERFLOW_REROUTE;
        batch_make(&b, &desc, small.tokens);
        b.in.token_mask = random_mask(small.tokens);
        rig r = {.desc = desc, .layer = test_layer(group_sizes[g], &desc)};
        batch_upload(r.layer, &b, &d);
        d.weights.noise_router = d.weights.router;
        d.weights.select_bias = (clmoe_buf){NULL, 0};
        OK(clmoe_state_size(r.layer, &r.state_bytes));
        r.counts = (clmoe_bias_counts_args){.struct_size = sizeof r.counts,
                                            .tokens = small.tokens,
                                            .weights = &d.weights,
                                            .x = d.args.x,
                                            .logits = d.args.logits,
                                            .token_mask = d.args.token_mask,
                                            .state = buf_new(r.state_bytes),
                                            .scratch = scratch_of(r.layer, small.tokens),
                                            .bias_counts = buf_new(counts_bytes(&r))};
        OK(clmoe_state_init(r.layer, test.queue, r.counts.state, 1, 0, NULL, NULL));
        write_bias(&r, random_floats(small.experts, 0.3));
        d.args.state = r.counts.state;
        const clmoe_buf added = buf_of(HOST(char, counts_bytes(&r)), counts_bytes(&r));
        d.args.bias_counts = added;
        OK(clmoe_forward(r.layer, test.queue, &d.args, 0, NULL, NULL));
        count(&r);
        const uint32_t *once = buf_get(added);
        compare_bits("counts", once, buf_get(r.counts.bias_counts), counts_bytes(&r));
        CHECK(memcmp(once, HOST(char, counts_bytes(&r)), counts_bytes(&r)) != 0, "no counts\n");
        d.args.bias_counts = (clmoe_buf){NULL, 0}; /* a batch computed again */
        OK(clmoe_forward(r.layer, test.queue, &d.args, 0, NULL, NULL));
        compare_bits("counts, again", buf_get(added), once, counts_bytes(&r));
        d.args.bias_counts = added;
        OK(clmoe_forward(r.layer, test.queue, &d.args, 0, NULL, NULL));
        const uint32_t *twice = buf_get(added);
        for (size_t i = 0; i < counts_bytes(&r) / 4; i++)
            CHECK(twice[i] == 2 * once[i], "count %zu is %u, %u\n", i, once[i], twice[i]);
    }
}

/* ---- Arguments ------------------------------------------------------------------------------- */

static void refuse_count(const rig *r, const clmoe_bias_counts_args *args, const char *field,
                         const char *value) {
    cl_event event = NULL;
    check_error(clmoe_bias_counts(r->layer, test.queue, args, 0, NULL, &event),
                CLMOE_INVALID_ARGUMENT, field, value);
}

#define BAD(field, v, text)                                                                        \
    do {                                                                                           \
        clmoe_bias_counts_args args = r.counts;                                                    \
        args.field = v;                                                                            \
        refuse_count(&r, &args, #field, text);                                                     \
    } while (0)

static void bad_arguments(void **state) {
    (void)state;
    const clmoe_buf none = {NULL, 0};
    size_t bytes;
    rig r;
    test_case("arguments");
    seed_set(1);
    rig_make(&r, 0, &small, 0);
    BAD(struct_size, 3, "3");
    BAD(accumulate, 2, "2");
    BAD(logits, none, "not given");
    BAD(state, none, "not given");
    BAD(scratch, none, "not given");
    BAD(bias_counts, none, "not given");
    BAD(bias_counts, buf_short(counts_bytes(&r)), "240000");
    BAD(scratch, r.counts.bias_counts, "overlaps");
    refuse_count(&r, NULL, "args", "NULL");
    clmoe_balance_args update = r.update;
    update.bias_counts = none;
    check_error(clmoe_balance_update(r.layer, test.queue, &update, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "bias_counts", "not given");
    update = r.update;
    update.bias_rule = CLMOE_BIAS_SIGN;
    check_error(clmoe_balance_update(r.layer, test.queue, &update, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "bias_counts", "bias_rule is 1");
    check_error(clmoe_bias_counts_size(NULL, &bytes), CLMOE_INVALID_ARGUMENT, "layer", "NULL");
    check_error(clmoe_bias_counts_size(r.layer, NULL), CLMOE_INVALID_ARGUMENT, "bytes", "NULL");
}

static void no_bias(clmoe_layer_desc *d) {
    d->router.select_bias = 0;
}

static void groups(clmoe_layer_desc *d) {
    d->router.groups.count = 4;
    d->router.groups.topk = 2;
}

static void identity(clmoe_layer_desc *d) {
    d->num_identity_experts = 1;
}

static void other_score(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SQRT_SOFTPLUS;
}

static void other_order(clmoe_layer_desc *d) {
    d->router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
}

static void other_policy(clmoe_layer_desc *d) {
    d->router.policy = CLMOE_POLICY_ALL_EXPERTS;
    d->router.select_bias = 0;
    d->top_k = d->num_experts;
}

static void all_chosen(clmoe_layer_desc *d) {
    d->top_k = d->num_experts;
}

/* Layers without the rule name what is otherwise. */
static void layers_without_the_rule(void **state) {
    (void)state;
    static const struct {
        void (*set)(clmoe_layer_desc *desc);
        const char *field;
    } lacks[] = {{no_bias, "router.select_bias"},
                 {groups, "router.groups.count"},
                 {identity, "num_identity_experts"},
                 {other_score, "router.score"},
                 {other_order, "router.order"},
                 {other_policy, "router.policy"},
                 {all_chosen, "top_k"}};
    for (size_t i = 0; i < COUNT_OF(lacks); i++) {
        clmoe_layer_desc desc = desc_of(&(shape){9, 4, 8, 0, 2, 3});
        clmoe_balance_args update;
        test_case("%s", lacks[i].field);
        desc.router.score = CLMOE_SCORE_SIGMOID;
        desc.router.select_bias = 1;
        lacks[i].set(&desc);
        clmoe_layer *layer = test_layer(0, &desc);
        const clmoe_bias_counts_args args = {.struct_size = sizeof args, .tokens = 9};
        check_error(clmoe_bias_counts(layer, test.queue, &args, 0, NULL, NULL), CLMOE_UNSUPPORTED,
                    "bias_counts", lacks[i].field);
        clmoe_balance_args_init(&update);
        update.bias_rule = CLMOE_BIAS_QUANTILE;
        check_error(clmoe_balance_update(layer, test.queue, &update, 0, NULL, NULL),
                    CLMOE_UNSUPPORTED, "bias_rule", lacks[i].field);
    }
}

/* One group is none. */
static void one_group(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&(shape){9, 4, 8, 0, 2, 3});
    test_case("one group");
    desc.router.score = CLMOE_SCORE_SIGMOID;
    desc.router.select_bias = 1;
    desc.router.groups.count = desc.router.groups.topk = 1;
    const clmoe_bias_counts_args args = {.struct_size = sizeof args, .tokens = 9};
    check_error(clmoe_bias_counts(test_layer(0, &desc), test.queue, &args, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "logits", "not given");
}

/* Of forward: what the counts cannot be of. */
static void bad_forward_arguments(void **state) {
    (void)state;
    batch b;
    device_batch d;
    test_case("forward");
    seed_set(1);
    clmoe_layer_desc desc = desc_of(&(shape){9, 4, 8, 0, 2, 3});
    desc.router.select_bias = 1;
    batch_make(&b, &desc, 9);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_upload(layer, &b, &d);
    size_t bytes = 0;
    OK(clmoe_state_size(layer, &bytes));
    d.args.bias_counts = buf_new(8 * BINS * 4);
#define FORWARD_BAD(value)                                                                         \
    check_error(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,  \
                "bias_counts", value)
    FORWARD_BAD("without state");
    d.args.state = buf_new(bytes);
    FORWARD_BAD("weights.select_bias");
    d.args.ids_in = d.args.ids;
    d.args.pair_weights_in = d.args.pair_weights;
    d.args.logits = (clmoe_buf){NULL, 0};
    FORWARD_BAD("ids_in");
    d.args.bias_counts = buf_short(8 * BINS * 4);
    FORWARD_BAD("32000");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(counts_are_of_the_distances),
        TEST(counts_of_no_tokens),
        TEST(the_bias_is_the_quantile),
        TEST(nothing_counted),
        TEST(small_scores_balance),
        TEST(runs_are_the_same),
        TEST(parts_add_up),
        TEST(forward_counts),
        TEST(bad_arguments),
        TEST(layers_without_the_rule),
        TEST(one_group),
        TEST(bad_forward_arguments),
    };
    return RUN(tests);
}
