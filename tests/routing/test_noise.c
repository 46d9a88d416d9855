/* noise: what a state makes random: noise and dropout of the logits, jitter, the keep rule. */
#include "ref_random.h"
#include "support.h"

#include <math.h>
#include <string.h>

static const shape small = {65, 21, 60, 3, 4, 7};

/* A state as the host writes it; its select_bias is 0. */
static clmoe_state some_state(uint32_t columns) {
    clmoe_state s = {.version = 2,
                     .columns = columns,
                     .seed = {random_below(1u << 31), random_below(1u << 31)},
                     .step = random_below(1000),
                     .noise_scale = 1,
                     .temperature_scale = 1,
                     .loss_weight = 1,
                     .capacity_scale = 1};
    return s;
}

static clmoe_buf state_upload(const clmoe_state *state, const float *select_bias) {
    size_t R = state->columns;
    char *bytes = host_alloc(sizeof *state + 20 * R, 1);
    memcpy(bytes, state, sizeof *state);
    if (select_bias)
        memcpy(bytes + sizeof *state, select_bias, R * 4);
    return buf_of(bytes, sizeof *state + 20 * R);
}

static const float *noise_router(const clmoe_layer_desc *desc) {
    return random_eighths((size_t)ref_columns(desc) * desc->dim, 0.3);
}

/* One call of clmoe_score(). */
typedef struct score_run {
    clmoe_layer *layer;
    clmoe_weights weights;
    clmoe_score_args args;
    size_t logits; /* T * R */
} score_run;

static void score(score_run *run, uint32_t group_size, const clmoe_layer_desc *desc,
                  uint32_t tokens, const float *x, const float *logits_in, clmoe_buf state) {
    run->layer = test_layer(group_size, desc);
    run->logits = (size_t)tokens * ref_columns(desc);
    run->args = (clmoe_score_args){
        .struct_size = sizeof run->args,
        .tokens = tokens,
        .weights = &run->weights,
        .x = buf_of_type(desc->type, x, (size_t)tokens * desc->dim),
        .logits_in = buf_of(logits_in, run->logits * 4),
        .logits = logits_in ? (clmoe_buf){NULL, 0} : buf_new(run->logits * 4),
        .scores = buf_new(run->logits * 4),
        .state = state,
        .scratch = scratch_of(run->layer, tokens),
    };
    OK(clmoe_score(run->layer, test.queue, &run->args, 0, NULL, NULL));
}

/* x Wn^T. */
static double *raw_of(const clmoe_layer_desc *desc, uint32_t tokens, const float *x,
                      const float *noise_weights) {
    ref_weights w = {.router = noise_weights};
    clmoe_layer_desc plain = *desc;
    plain.router.bias = 0;
    double *raw = HOST(double, (size_t)tokens *ref_columns(desc));
    ref_logits(&plain, tokens, x, &w, raw);
    return raw;
}

/* With the identity as score, the scores are the noisy logits. */
static void check_noisy(const clmoe_layer_desc *desc, uint32_t tokens, const clmoe_state *state) {
    size_t n = (size_t)tokens * ref_columns(desc);
    const float *x = random_eighths((size_t)tokens * desc->dim, 1.0), *wn = noise_router(desc);
    const float *logits = random_floats(n, 1.0);
    double *want = HOST(double, n);
    ref_noisy(desc, state, tokens, logits, raw_of(desc, tokens, x, wn), want);
    const float *first = NULL;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        score_run run = {
            .weights = {.noise_router = buf_of(wn, ref_columns(desc) * desc->dim * 4)}};
        score(&run, group_sizes[g], desc, tokens, x, logits, state_upload(state, NULL));
        const float *got = buf_get(run.args.scores);
        for (size_t i = 0; i < n; i++)
            CHECK((got[i] == -INFINITY) == (want[i] == -(double)INFINITY),
                  "noisy[%zu] is %g, not %g\n", i, (double)got[i], want[i]);
        compare_floats("noisy", got, want, n, 1e-5);
        first = g == 0 ? got : first;
        compare_bits("noisy, another group size", got, first, n * 4);
    }
}

static const struct {
    uint32_t experts, identity, top_k, tokens;
    float noise_scale;
} sizes[] = {{60, 3, 4, 65, 0.25f},
             {1, 0, 1, 7, 1.0f},
             {512, 256, 12, 33, 0.25f},
             {8, 0, 8, 100, 1.0f},
             {64, 0, 6, 0, 0.25f}};

static const struct {
    const char *name;
    float experts, logits;
} dropouts[] = {{"no dropout", 0.0f, 0.0f},
                {"dropout of experts", 0.4f, 0.0f},
                {"dropout of logits", 0.0f, 0.2f},
                {"both dropouts", 0.4f, 0.2f}};

static void noisy_logits(void **state) {
    (void)state;
    for (clmoe_noise noise = 0; noise <= CLMOE_NOISE_GUMBEL; noise++)
        for (size_t i = 0; i < COUNT_OF(sizes); i++)
            for (size_t n = 0; n < COUNT_OF(dropouts); n++) {
                clmoe_layer_desc desc = desc_of(&small);
                test_case("noise %d, T %u, E %u, Z %u, K %u, %s", noise, sizes[i].tokens,
                          sizes[i].experts, sizes[i].identity, sizes[i].top_k, dropouts[n].name);
                seed_set(100 * i + n + 1);
                desc.num_experts = sizes[i].experts;
                desc.num_identity_experts = sizes[i].identity;
                desc.top_k = sizes[i].top_k;
                desc.router.score = CLMOE_SCORE_IDENTITY;
                desc.router.noise.kind = noise;
                desc.router.noise.scale = 0.7f;
                desc.router.dropout.experts = dropouts[n].experts;
                desc.router.dropout.logits = dropouts[n].logits;
                clmoe_state s = some_state(ref_columns(&desc));
                s.noise_scale = sizes[i].noise_scale;
                check_noisy(&desc, sizes[i].tokens, &s);
            }
}

/*
 * Learned noise whose deviation is not finite, on finite logits: of a token with a NaN, and of one
 * too large for x Wn^T. Such a logit is not finite; without any noise every logit stays as it is.
 */
static void noise_that_is_not_finite(void **state) {
    (void)state;
    enum { TOKENS = 6, BROKEN = 2, LARGE = 4 };
    const clmoe_loss_desc losses[] = {
        {.kind = CLMOE_LOSS_Z, .weight = 1.0f},
        {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f},
        {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (int noisy = 0; noisy < 2; noisy++) {
            clmoe_layer_desc desc = desc_of(&small);
            batch b;
            device_batch d;
            test_case("group size %u, noise %d", group_sizes[g], noisy);
            seed_set(1);
            desc.router.noise.kind = CLMOE_NOISE_LEARNED;
            batch_make(&b, &desc, TOKENS);
            const size_t D = desc.dim, R = ref_columns(&desc), n = TOKENS * R;
            float *x = random_floats(TOKENS * D, 1.0), *wn = random_floats(R * D, 1.0);
            x[BROKEN * D] = (float)NAN;
            x[LARGE * D] = 3e38f;
            for (size_t e = 0; e < R; e++)
                wn[e * D] = 8.0f;
            b.in.x = x;
            b.in.logits_in = random_floats(n, 1.0);
            clmoe_layer *layer = test_layer(group_sizes[g], &desc);
            clmoe_state s = some_state((uint32_t)R);
            s.noise_scale = noisy ? 1.0f : 0.0f;
            batch_upload(layer, &b, &d);
            d.weights.noise_router = buf_of(wn, R * D * 4);
            d.args.state = state_upload(&s, NULL);
            d.args.losses = losses;
            d.args.num_losses = COUNT_OF(losses);
            d.args.loss_values = buf_new(sizeof losses / sizeof losses[0] * 4);
            d.args.dlogits = buf_of(HOST(float, n), n * 4);
            d.args.dnoise = buf_of(HOST(float, n), n * 4);
            OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
            const clmoe_stats *stats = buf_get(d.args.stats);
            CHECK(stats->nonfinite_tokens == (noisy ? 2 : 0), "%u tokens are not finite\n",
                  stats->nonfinite_tokens);
            const float *values = buf_get(d.args.loss_values);
            for (size_t i = 0; i < COUNT_OF(losses); i++)
                CHECK(isfinite(values[i]), "loss_values[%zu] is %g\n", i, (double)values[i]);
            const float *dlogits = buf_get(d.args.dlogits), *dnoise = buf_get(d.args.dnoise);
            for (size_t i = 0; i < n; i++) {
                const bool lost = noisy && (i / R == BROKEN || i / R == LARGE);
                CHECK(isfinite(dlogits[i]) && isfinite(dnoise[i]), "dlogits %g, dnoise %g\n",
                      (double)dlogits[i], (double)dnoise[i]);
                CHECK((dlogits[i] == 0) == lost, "dlogits[%zu] is %g\n", i, (double)dlogits[i]);
            }
        }
}

/* With a probability near 1, the K experts with the largest draws are left, whatever the step. */
static void k_experts_stay(void **state) {
    (void)state;
    for (uint32_t step = 0; step < 20; step++) {
        clmoe_layer_desc desc = desc_of(&small);
        test_case("step %u", step);
        desc.router.score = CLMOE_SCORE_IDENTITY;
        desc.router.dropout.experts = 0.999f;
        clmoe_state s = some_state(ref_columns(&desc));
        s.step = step;
        check_noisy(&desc, 9, &s);
        bool masked[63];
        uint32_t left = 0;
        ref_masked_experts(&desc, &s, masked);
        for (size_t e = 0; e < COUNT_OF(masked); e++)
            left += !masked[e];
        CHECK(left >= desc.top_k, "%u experts are left\n", left);
    }
}

/* Without a state the layer is the one without noise, bit for bit. */
static void nothing_without_a_state(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc noisy = desc_of(&small), plain = noisy;
        test_case("group size %u", group_sizes[g]);
        noisy.router.noise.kind = CLMOE_NOISE_LEARNED;
        noisy.router.noise.jitter = 0.5f;
        noisy.router.noise.jitter_experts = 1;
        noisy.router.dropout.experts = noisy.router.dropout.logits = 0.5f;
        batch a, b;
        device_batch with, without;
        seed_set(1);
        batch_make(&a, &noisy, small.tokens);
        b = a;
        b.desc = plain;
        batch_run(test_layer(group_sizes[g], &noisy), &a, &with);
        batch_run(test_layer(group_sizes[g], &plain), &b, &without);
        compare_bits("y", buf_get(with.args.y), buf_get(without.args.y),
                     (size_t)small.tokens * small.dim * 4);
        compare_bits("logits", buf_get(with.args.logits), buf_get(without.args.logits),
                     (size_t)small.tokens * 63 * 4);
    }
}

/* Everything that is random, at once. */
static clmoe_layer_desc wild_desc(void) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.router.noise.kind = CLMOE_NOISE_LEARNED;
    desc.router.noise.jitter = 0.1f;
    desc.router.noise.jitter_experts = 1;
    desc.router.dropout.experts = 0.5f;
    desc.router.dropout.logits = 0.1f;
    desc.router.select_bias = 1;
    desc.capacity.factor = 0.8;
    desc.capacity.keep = CLMOE_KEEP_RANDOM;
    return desc;
}

static void wild_upload(clmoe_layer *layer, const batch *b, const clmoe_state *s, device_batch *d) {
    batch_upload(layer, b, d);
    d->weights.noise_router = buf_of(noise_router(&b->desc), (size_t)63 * small.dim * 4);
    d->weights.select_bias = (clmoe_buf){NULL, 0};
    d->args.state = state_upload(s, b->weights.select_bias);
}

static void masked_experts_get_nothing(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = wild_desc();
        batch b;
        device_batch d;
        bool masked[63];
        test_case("group size %u", group_sizes[g]);
        seed_set(2);
        batch_make(&b, &desc, small.tokens);
        clmoe_state s = some_state(63);
        clmoe_layer *layer = test_layer(group_sizes[g], &desc);
        wild_upload(layer, &b, &s, &d);
        OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
        ref_masked_experts(&desc, &s, masked);
        const clmoe_stats *stats = buf_get(d.args.stats);
        const uint32_t *load = (const uint32_t *)(stats + 1);
        uint32_t out = 0;
        for (size_t e = 0; e < COUNT_OF(masked); e++) {
            CHECK(!masked[e] || load[e] == 0, "%u pairs of %zu\n", load[e], e);
            out += masked[e];
        }
        CHECK(out > 10 && out < 50, "%u experts are masked\n", out);
    }
}

static void twenty_runs(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = wild_desc();
        batch b;
        device_batch d;
        void *y = NULL, *ids = NULL, *weights = NULL, *stats = NULL;
        size_t pairs = (size_t)small.tokens * small.top_k;
        test_case("group size %u", group_sizes[g]);
        seed_set(3);
        batch_make(&b, &desc, small.tokens);
        clmoe_state s = some_state(63);
        clmoe_layer *layer = test_layer(group_sizes[g], &desc);
        wild_upload(layer, &b, &s, &d);
        for (int i = 0; i < 20; i++) {
            buf_poison(d.args.scratch);
            OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
            y = i ? y : buf_get(d.args.y);
            ids = i ? ids : buf_get(d.args.ids);
            weights = i ? weights : buf_get(d.args.pair_weights);
            stats = i ? stats : buf_get(d.args.stats);
            compare_bits("y", buf_get(d.args.y), y, (size_t)small.tokens * small.dim * 4);
            compare_bits("ids", buf_get(d.args.ids), ids, pairs * 4);
            compare_bits("weights", buf_get(d.args.pair_weights), weights, pairs * 4);
            compare_bits("stats", buf_get(d.args.stats), stats, stats_size(layer));
        }
    }
}

/* ---- Jitter -------------------------------------------------------------------------------- */

/* x as the device jitters it; the same operations in float. */
static float *jittered(const clmoe_layer_desc *desc, const clmoe_state *s, uint32_t tokens,
                       const float *x) {
    float *out = HOST(float, (size_t)tokens * desc->dim);
    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t d = 0; d < desc->dim; d++) {
            size_t i = (size_t)t * desc->dim + d;
            out[i] = type_round(desc->type, (float)((double)x[i] * ref_jitter(desc, s, t, d)));
        }
    return out;
}

static void jitter_of_the_router(void **state) {
    (void)state;
    static const struct {
        const char *name;
        clmoe_type type;
        clmoe_noise noise;
    } cases[] = {{"f32", CLMOE_F32, CLMOE_NOISE_NONE},
                 {"f32, learned noise", CLMOE_F32, CLMOE_NOISE_LEARNED},
                 {"f16", CLMOE_F16, CLMOE_NOISE_NONE},
                 {"f16, learned noise", CLMOE_F16, CLMOE_NOISE_LEARNED},
                 {"bf16", CLMOE_BF16, CLMOE_NOISE_NONE},
                 {"bf16, learned noise", CLMOE_BF16, CLMOE_NOISE_LEARNED}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(cases); i++) {
            clmoe_layer_desc desc = desc_of(&small);
            test_case("group size %u, %s", group_sizes[g], cases[i].name);
            seed_set(4);
            desc.type = cases[i].type;
            double tolerance = type_tolerance(desc.type);
            desc.router.score = CLMOE_SCORE_IDENTITY;
            desc.router.noise.jitter = 0.3f;
            desc.router.noise.kind = cases[i].noise;
            ref_weights w = weights_make(&desc);
            const float *wn = noise_router(&desc);
            clmoe_state s = some_state(63);
            s.noise_scale = 0.5f;
            size_t n = (size_t)small.tokens * 63;
            float *x = random_floats((size_t)small.tokens * small.dim, 1.0);
            round_all(desc.type, x, (size_t)small.tokens * small.dim);
            score_run run = {.weights = weights_upload(&desc, &w)};
            run.weights.noise_router = buf_of(wn, (size_t)63 * small.dim * 4);
            score(&run, group_sizes[g], &desc, small.tokens, x, NULL, state_upload(&s, NULL));
            const float *moved = jittered(&desc, &s, small.tokens, x);
            double *want = HOST(double, n);
            ref_logits(&desc, small.tokens, moved, &w, want);
            compare_floats("logits", buf_get(run.args.logits), want, n, tolerance);
            ref_noisy(&desc, &s, small.tokens, buf_get(run.args.logits),
                      raw_of(&desc, small.tokens, moved, wn), want);
            compare_floats("noisy", buf_get(run.args.scores), want, n, tolerance);
        }
}

/* With noise.jitter_experts the layer is the one without jitter on the jittered x, residual apart.
 */
static void jitter_of_the_experts(void **state) {
    (void)state;
    for (int external = 0; external < 2; external++) {
        clmoe_layer_desc desc = desc_of(&small), plain = desc;
        test_case("external ids %d", external);
        seed_set(5);
        desc.router.noise.jitter = plain.router.noise.jitter = 0.2f;
        desc.router.noise.jitter_experts = 1;
        desc.shared.hidden_dim = plain.shared.hidden_dim = 5;
        clmoe_state s = some_state(63);
        batch a, b;
        device_batch got;
        batch_make(&a, &desc, small.tokens);
        a.in.residual = random_floats((size_t)small.tokens * small.dim, 1.0);
        b = a;
        plain.router.noise.jitter = 0;
        b.desc = plain;
        b.in.x = jittered(&desc, &s, small.tokens, a.in.x);
        const ref_result *want = batch_reference(&b);
        if (external) {
            size_t pairs = (size_t)small.tokens * small.top_k;
            float *weights = HOST(float, pairs);
            for (size_t p = 0; p < pairs; p++)
                weights[p] = (float)want->pair_weights[p];
            a.in.ids_in = want->ids;
            a.in.pair_weights_in = weights;
        }
        clmoe_layer *layer = test_layer(0, &desc);
        batch_upload(layer, &a, &got);
        got.args.state = state_upload(&s, NULL);
        OK(clmoe_forward(layer, test.queue, &got.args, 0, NULL, NULL));
        CHECK(want->choice_gap > 1e-5, "a near tie: %g\n", want->choice_gap);
        batch_compare(&b, &got, want);
    }
}

/* ---- Other fields of the state --------------------------------------------------------------- */

static void temperature_scale(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        clmoe_layer_desc desc = desc_of(&small), warm = desc;
        test_case("group size %u", group_sizes[g]);
        seed_set(6);
        desc.router.temperature = 0.5f;
        warm.router.temperature = 2.0f;
        clmoe_state s = some_state(63);
        s.temperature_scale = 4.0f;
        const float *logits = random_floats((size_t)small.tokens * 63, 1.0);
        score_run a = {0}, b = {0};
        score(&a, group_sizes[g], &desc, small.tokens, NULL, logits, state_upload(&s, NULL));
        score(&b, group_sizes[g], &warm, small.tokens, NULL, logits, (clmoe_buf){NULL, 0});
        compare_bits("scores", buf_get(a.args.scores), buf_get(b.args.scores),
                     (size_t)small.tokens * 63 * 4);
    }
}

/* The bias of weights goes before that of the state. */
static void select_bias_of_the_state(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    test_case("select_bias");
    seed_set(7);
    desc.router.select_bias = 1;
    batch b;
    device_batch d;
    batch_make(&b, &desc, small.tokens);
    const ref_result *want = batch_reference(&b);
    clmoe_layer *layer = test_layer(0, &desc);
    for (int given = 0; given < 2; given++) {
        clmoe_state s = some_state(63);
        batch_upload(layer, &b, &d);
        d.args.state = state_upload(&s, given ? NULL : b.weights.select_bias);
        if (!given)
            d.weights.select_bias = (clmoe_buf){NULL, 0};
        OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
        batch_compare(&b, &d, want);
    }
}

/* ---- The keep rule random, and the scale of the capacity ------------------------------------- */

/* Rank of the real pair `pair` among those of its expert, by descending random bits. */
static uint32_t random_rank(const ref_plan_in *in, const clmoe_state *s, uint32_t top_k,
                            uint32_t pair) {
    uint32_t mine[2], other[2], rank = 0;
    ref_random_bits(s, pair / top_k, pair % top_k, REF_KEEP, mine);
    for (uint32_t p = 0; p < in->tokens * top_k; p++) {
        if (in->ids[p] != in->ids[pair] || (int32_t)(p % top_k) >= in->live[p / top_k])
            continue;
        ref_random_bits(s, p / top_k, p % top_k, REF_KEEP, other);
        rank += other[0] > mine[0] || (other[0] == mine[0] && p < pair);
    }
    return rank;
}

static void check_places(uint32_t group_size, const clmoe_layer_desc *desc, uint32_t tokens,
                         const clmoe_state *s, bool random) {
    clmoe_layer *layer = test_layer(group_size, desc);
    clmoe_plan_layout layout;
    ref_plan_in in;
    uint32_t K = desc->top_k, pairs = tokens * K;
    route_random(desc, tokens, PATTERN_ZIPF, &in);
    OK(clmoe_plan_layout_get(layer, tokens, &layout));
    clmoe_plan_args args = {.struct_size = sizeof args,
                            .tokens = tokens,
                            .ids = buf_of(in.ids, pairs * 4),
                            .live = buf_of(in.live, tokens * 4),
                            .state = state_upload(s, NULL),
                            .scratch = scratch_of(layer, tokens),
                            .plan = buf_new(layout.bytes)};
    OK(clmoe_plan(layer, test.queue, &args, 0, NULL, NULL));
    const char *plan = buf_get(args.plan);
    const int32_t *slot_of = (const int32_t *)(const void *)(plan + layout.slot_of);
    const uint32_t *offsets = (const uint32_t *)(const void *)(plan + layout.offsets);
    uint32_t places = ref_effective_capacity(s, ref_capacity(desc, tokens));
    uint32_t dropped = 0, position[4096] = {0};
    for (uint32_t p = 0; p < pairs; p++) {
        int32_t id = in.ids[p];
        bool real = (int32_t)(p % K) < in.live[p / K], identity = id >= (int32_t)desc->num_experts;
        uint32_t rank = !real ? 0 : random ? random_rank(&in, s, K, p) : position[id]++;
        int32_t want = !real           ? -1
                       : identity      ? -2
                       : rank < places ? (int32_t)(offsets[id] + rank)
                                       : -1;
        CHECK(slot_of[p] == want, "slot_of[%u] is %d, not %d\n", p, slot_of[p], want);
        dropped += want == -1;
    }
    CHECK(tokens < 10 || dropped > 0, "nothing was dropped\n");
}

static void places_of_pairs(void **state) {
    (void)state;
    const float scales[] = {1.0f, 0.999f, 0.5f, 0.3f, 1e-6f};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(scales); i++)
            for (int random = 0; random < 2; random++) {
                clmoe_layer_desc desc = desc_of(&small);
                test_case("group size %u, scale %g, random %d", group_sizes[g], (double)scales[i],
                          random);
                seed_set(8 + i);
                desc.capacity.factor = 1.1;
                desc.capacity.keep = random ? CLMOE_KEEP_RANDOM : CLMOE_KEEP_POSITION;
                clmoe_state s = some_state(63);
                s.capacity_scale = scales[i];
                check_places(group_sizes[g], &desc, 300, &s, random);
            }
}

/* ---- Arguments ------------------------------------------------------------------------------- */

static void check_bad(clmoe_status status, const char *field, const char *text) {
    CHECK(status == CLMOE_INVALID_ARGUMENT, "%s: status %s\n", field, clmoe_status_string(status));
    CHECK(strstr(clmoe_last_error(), field) && strstr(clmoe_last_error(), text), "\"%s\"\n",
          clmoe_last_error());
}

/* What a layer needs from its state, or with it. */
static void bad_arguments(void **state) {
    (void)state;
    clmoe_layer_desc desc = wild_desc();
    const clmoe_buf none = {NULL, 0};
    batch b;
    device_batch d;
    test_case("arguments");
    seed_set(9);
    batch_make(&b, &desc, small.tokens);
    clmoe_state s = some_state(63);
    clmoe_layer *layer = test_layer(0, &desc);
    wild_upload(layer, &b, &s, &d);
    clmoe_forward_args args = d.args;
    args.state = none;
    check_bad(clmoe_forward(layer, test.queue, &args, 0, NULL, NULL), "state", "random");
    cl_int code;
    cl_mem one_short = clCreateBuffer(test.context, CL_MEM_READ_WRITE, 1071, NULL, &code);
    CL_OK(code);
    args.state.mem = one_short;
    check_bad(clmoe_forward(layer, test.queue, &args, 0, NULL, NULL), "state", "1071");
    clReleaseMemObject(one_short);
    args = d.args;
    d.weights.noise_router = none;
    check_bad(clmoe_forward(layer, test.queue, &args, 0, NULL, NULL), "weights.noise_router",
              "not given");

    /* The steps refuse a layer that jitters the experts' x too. */
    desc.router.noise.jitter_experts = 0;
    layer = test_layer(0, &desc);
    size_t n = (size_t)small.tokens * 63;
    clmoe_score_args score_args = {.struct_size = sizeof score_args,
                                   .tokens = small.tokens,
                                   .weights = &d.weights,
                                   .logits_in = buf_new(n * 4),
                                   .scores = buf_new(n * 4),
                                   .state = d.args.state};
    check_bad(clmoe_score(layer, test.queue, &score_args, 0, NULL, NULL), "x", "not given");
    score_args.x = d.args.x;
    check_bad(clmoe_score(layer, test.queue, &score_args, 0, NULL, NULL), "scratch", "not given");

    clmoe_topk_args topk = {.struct_size = sizeof topk,
                            .tokens = small.tokens,
                            .weights = &d.weights,
                            .scores = score_args.scores,
                            .ids = d.args.ids,
                            .pair_weights = d.args.pair_weights,
                            .live = buf_new(small.tokens * 4)};
    check_bad(clmoe_topk(layer, test.queue, &topk, 0, NULL, NULL), "weights.select_bias", "state");
    topk.weights = NULL;
    check_bad(clmoe_topk(layer, test.queue, &topk, 0, NULL, NULL), "weights", "NULL");
    topk.state = d.args.state;
    OK(clmoe_topk(layer, test.queue, &topk, 0, NULL, NULL));
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(noisy_logits),
        TEST(noise_that_is_not_finite),
        TEST(k_experts_stay),
        TEST(nothing_without_a_state),
        TEST(masked_experts_get_nothing),
        TEST(twenty_runs),
        TEST(jitter_of_the_router),
        TEST(jitter_of_the_experts),
        TEST(temperature_scale),
        TEST(select_bias_of_the_state),
        TEST(places_of_pairs),
        TEST(bad_arguments),
    };
    return RUN(tests);
}
