/* control: the state's first values, and every rule that moves it. */
#include "ref_random.h"
#include "support.h"

#include <math.h>
#include <string.h>

static const shape small = {64, 5, 60, 3, 4, 3};

/* A layer, its state and the statistics that the tests write themselves. */
typedef struct control {
    clmoe_layer_desc desc;
    clmoe_layer *layer;
    clmoe_balance_args args;
    ref_state want;
    size_t state_bytes;
} control;

static void control_make(control *c, uint32_t group_size) {
    size_t R = small.experts + small.identity;
    *c = (control){.desc = desc_of(&small)};
    c->desc.balance.device_groups = 6;
    c->layer = test_layer(group_size, &c->desc);
    clmoe_balance_args_init(&c->args);
    OK(clmoe_state_size(c->layer, &c->state_bytes));
    c->args.state = buf_new(c->state_bytes);
    c->args.stats = buf_new(stats_size(c->layer));
    OK(clmoe_state_init(c->layer, test.queue, c->args.state, 0x1122334455667788u, 0, NULL, NULL));
    c->want = (ref_state){.noise_scale = 1,
                          .temperature_scale = 1,
                          .loss_weight = 1,
                          .capacity_scale = 1,
                          .select_bias = HOST(double, R),
                          .ema = HOST(double, R),
                          .previous = HOST(double, R),
                          .idle_tokens = HOST(uint32_t, R),
                          .momentum = HOST(double, R)};
}

/* Statistics of a batch with that load. */
static clmoe_stats stats_write(control *c, const uint32_t *load, uint32_t dropped) {
    size_t R = small.experts + small.identity, bytes = stats_size(c->layer);
    uint32_t *words = HOST(uint32_t, bytes / 4);
    clmoe_stats stats = {.version = 1, .tokens = 100, .columns = (uint32_t)R, .dropped = dropped};
    for (size_t e = 0; e < R; e++)
        stats.pairs += load[e];
    memcpy(words, &stats, sizeof stats);
    memcpy(words + sizeof stats / 4, load, R * 4);
    buf_write(c->args.stats, words, bytes);
    return stats;
}

static void compare_state(const control *c) {
    size_t R = small.experts + small.identity;
    const char *bytes = buf_get(c->args.state);
    const float *arrays = (const float *)(const void *)(bytes + sizeof(clmoe_state));
    clmoe_state got;
    memcpy(&got, bytes, sizeof got);
    CHECK(got.version == 2 && got.columns == R, "version %u, columns %u\n", got.version,
          got.columns);
    CHECK(got.seed[0] == 0x55667788u && got.seed[1] == 0x11223344u, "the seed is %x %x\n",
          got.seed[0], got.seed[1]);
    CHECK(got.step == c->want.step && got.updates == c->want.updates, "step %u, updates %u\n",
          got.step, got.updates);
    compare_floats("noise_scale", &got.noise_scale, &c->want.noise_scale, 1, 1e-5);
    compare_floats("temperature_scale", &got.temperature_scale, &c->want.temperature_scale, 1,
                   1e-5);
    compare_floats("loss_weight", &got.loss_weight, &c->want.loss_weight, 1, 1e-5);
    compare_floats("capacity_scale", &got.capacity_scale, &c->want.capacity_scale, 1, 1e-5);
    compare_floats("select_bias", arrays, c->want.select_bias, R, 1e-5);
    compare_floats("ema", arrays + R, c->want.ema, R, 1e-5);
    compare_floats("previous", arrays + 2 * R, c->want.previous, R, 1e-5);
    compare_ints("idle_tokens", arrays + 3 * R, c->want.idle_tokens, R);
    compare_floats("momentum", arrays + 4 * R, c->want.momentum, R, 1e-5);
}

static uint32_t *random_load(uint32_t largest) {
    uint32_t *load = HOST(uint32_t, small.experts + small.identity);
    for (size_t e = 0; e < small.experts + small.identity; e++)
        load[e] = random_below(4) ? random_below(largest + 1) : 0;
    return load;
}

static void update(control *c) {
    OK(clmoe_balance_update(c->layer, test.queue, &c->args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
}

static void first_state(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        control c;
        test_case("group size %u", group_sizes[g]);
        control_make(&c, group_sizes[g]);
        CHECK(c.state_bytes == 64 + 20 * 63, "%zu bytes\n", c.state_bytes);
        compare_state(&c);
    }
}

/* What the controllers see in turn: batches without load among them, and loads of all ranks. */
typedef enum batch_kind { USUAL, EMPTY, ALL_RANKS } batch_kind;

static const batch_kind batches[] = {USUAL,     USUAL, ALL_RANKS, EMPTY, USUAL,     USUAL,
                                     ALL_RANKS, USUAL, EMPTY,     USUAL, ALL_RANKS, USUAL};

static void see_batches(control *c) {
    for (size_t i = 0; i < COUNT_OF(batches); i++) {
        uint32_t *load = random_load(batches[i] == EMPTY ? 0 : 40);
        uint32_t *all = batches[i] == ALL_RANKS ? random_load(4000000000u) : load;
        clmoe_stats stats = stats_write(c, load, random_below(200));
        c->args.load = all == load ? (clmoe_buf){NULL, 0} : buf_of(all, 63 * 4);
        update(c);
        ref_balance_update(&c->desc, &c->args, &stats, all, &c->want);
        compare_state(c);
    }
}

static const struct {
    const char *name;
    clmoe_bias_rule rule;
    uint32_t centred;
} bias_rules[] = {
    {"no rule", CLMOE_BIAS_NONE, 0},
    {"no rule, centred", CLMOE_BIAS_NONE, 1},
    {"sign", CLMOE_BIAS_SIGN, 0},
    {"sign, centred", CLMOE_BIAS_SIGN, 1},
    {"proportional", CLMOE_BIAS_PROPORTIONAL, 0},
    {"proportional, centred", CLMOE_BIAS_PROPORTIONAL, 1},
    {"sign, step centred", CLMOE_BIAS_SIGN, 2},
    {"proportional, step centred", CLMOE_BIAS_PROPORTIONAL, 2},
    {"SMEBU", CLMOE_BIAS_SMEBU, 0},
    {"SMEBU, centred", CLMOE_BIAS_SMEBU, 1},
    {"SMEBU, step centred", CLMOE_BIAS_SMEBU, 2},
    {"device", CLMOE_BIAS_DEVICE, 0},
    {"device, centred", CLMOE_BIAS_DEVICE, 1},
    {"device, step centred", CLMOE_BIAS_DEVICE, 2},
};

/* Beside the controllers of the losses' weight and of the capacity. */
static void every_bias_rule(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(bias_rules); i++) {
            control c;
            test_case("group size %u, %s", group_sizes[g], bias_rules[i].name);
            seed_set(i + 1);
            control_make(&c, group_sizes[g]);
            c.args.bias_rule = bias_rules[i].rule;
            c.args.bias_rate = 0.01f;
            c.args.bias_centred = bias_rules[i].centred;
            c.args.bias_kappa = 0.7f;
            c.args.bias_beta = 0.3f;
            c.args.target_violation = 1.5f;
            c.args.loss_rate = 0.3f;
            c.args.loss_max = 1.5f;
            c.args.target_drop_rate = 0.1f;
            c.args.capacity_rate = 0.2f;
            c.args.capacity_min = 0.4f;
            see_batches(&c);
        }
}

/* The sign is taken in integers: one pair off the mean of a huge load counts, none does not. */
static void exact_sign(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        control c;
        test_case("group size %u", group_sizes[g]);
        control_make(&c, group_sizes[g]);
        c.args.bias_rule = CLMOE_BIAS_SIGN;
        uint32_t load[63];
        for (size_t e = 0; e < 63; e++)
            load[e] = 4000000000u;
        load[7]++;
        load[9]--;
        stats_write(&c, load, 0);
        update(&c);
        const float *bias = (const float *)buf_get(c.args.state) + 16;
        for (size_t e = 0; e < 63; e++)
            CHECK(bias[e] == (e == 7   ? -1e-3f
                              : e == 9 ? 1e-3f
                                       : 0.0f),
                  "select_bias[%zu] is %g\n", e, (double)bias[e]);
    }
}

static clmoe_schedule schedule_of(clmoe_schedule_shape form, float start, float end, uint32_t first,
                                  uint32_t steps) {
    return (clmoe_schedule){
        .shape = form, .start = start, .end = end, .first = first, .steps = steps};
}

static void schedules(void **state) {
    (void)state;
    static const char *const names[] = {"none", "linear", "cosine", "exponential"};
    for (int form = 0; form <= CLMOE_SCHEDULE_EXPONENTIAL; form++) {
        control c;
        test_case("shape %s", names[form]);
        seed_set(1);
        control_make(&c, 0);
        c.args.noise = schedule_of((clmoe_schedule_shape)form, 2.0f, 0.125f, 3, 7);
        c.args.temperature = schedule_of((clmoe_schedule_shape)form, 0.5f, 1.5f, 0, 1);
        see_batches(&c);
        const float *header = buf_get(c.args.state);
        CHECK(form == 0 || header[6] == 0.125f, "noise_scale ends at %g\n", (double)header[6]);
        CHECK(form == 0 || header[7] == 1.5f, "temperature_scale ends at %g\n", (double)header[7]);
    }
}

/* Ends whose quotient no float can hold. */
static void schedules_far_apart(void **state) {
    (void)state;
    for (int up = 0; up < 2; up++) {
        control c;
        test_case("up %d", up);
        seed_set(1);
        control_make(&c, 0);
        c.args.temperature = (clmoe_schedule){.shape = CLMOE_SCHEDULE_EXPONENTIAL,
                                              .start = up ? 1e-20f : 1e20f,
                                              .end = up ? 1e20f : 1e-20f,
                                              .steps = 4};
        for (uint32_t step = 0; step < 5; step++) {
            uint32_t *load = random_load(9);
            clmoe_stats stats = stats_write(&c, load, 0);
            update(&c);
            ref_balance_update(&c.desc, &c.args, &stats, load, &c.want);
            compare_state(&c);
        }
    }
}

/* Batches of identity experts alone: no load, but tokens that no expert was chosen by. */
static void idle_without_load(void **state) {
    (void)state;
    control c;
    const size_t R = small.experts + small.identity;
    test_case("idle");
    seed_set(1);
    control_make(&c, 0);
    for (uint32_t step = 1; step <= 4; step++) {
        uint32_t *load = HOST(uint32_t, R);
        load[small.experts] = 100;
        stats_write(&c, load, 0);
        update(&c);
        const clmoe_state *got = buf_get(c.args.state);
        const uint32_t *idle = (const uint32_t *)(got + 1) + 3 * R;
        CHECK(got->step == step && got->updates == 0, "step %u, updates %u\n", got->step,
              got->updates);
        for (size_t e = 0; e < R; e++)
            CHECK(idle[e] == (e == small.experts ? 0 : 100 * step), "idle_tokens[%zu] is %u\n", e,
                  idle[e]);
    }
}

/* A copy of the state, restored, goes on bit for bit. */
static void resumed_bit_for_bit(void **state) {
    (void)state;
    control c;
    test_case("resumed");
    seed_set(1);
    control_make(&c, 0);
    c.args.bias_rule = CLMOE_BIAS_PROPORTIONAL;
    c.args.bias_centred = 1;
    c.args.target_violation = 0.5f;
    c.args.noise = schedule_of(CLMOE_SCHEDULE_COSINE, 1.0f, 0.1f, 2, 6);
    uint32_t *loads[10];
    void *copy = NULL, *end = NULL;
    for (int i = 0; i < 10; i++)
        loads[i] = random_load(50);
    for (int i = 0; i < 10; i++) {
        stats_write(&c, loads[i], 0);
        update(&c);
        copy = i == 4 ? buf_get(c.args.state) : copy;
    }
    end = buf_get(c.args.state);
    c.args.state = buf_of(copy, c.state_bytes);
    for (int i = 5; i < 10; i++) {
        stats_write(&c, loads[i], 0);
        update(&c);
    }
    compare_bits("state", buf_get(c.args.state), end, c.state_bytes);
}

/* ---- Activation checkpointing ---------------------------------------------------------------- */

/* y and statistics of one more forward; its first bytes are y's. */
static void *computed(clmoe_layer *layer, const device_batch *d) {
    const size_t y = (size_t)small.tokens * small.dim * 4, stats = stats_size(layer);
    char *both = HOST(char, y + stats);
    buf_poison(d->args.y);
    buf_poison(d->args.stats);
    OK(clmoe_forward(layer, test.queue, &d->args, 0, NULL, NULL));
    buf_read(d->args.y, both, y);
    buf_read(d->args.stats, both + y, stats);
    return both;
}

/* A batch computed again is the same to the bit, noise included, and is counted once. */
static void a_batch_computed_again(void **state) {
    (void)state;
    batch b;
    device_batch d;
    control c = {.desc = desc_of(&small)};
    test_case("computed again");
    seed_set(6);
    c.desc.router.select_bias = 1;
    c.desc.router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    c.layer = test_layer(0, &c.desc);
    batch_make(&b, &c.desc, small.tokens);
    batch_upload(c.layer, &b, &d);
    d.weights.select_bias = (clmoe_buf){NULL, 0};
    const size_t bytes = (size_t)small.tokens * small.dim * 4 + stats_size(c.layer);
    OK(clmoe_state_size(c.layer, &c.state_bytes));
    clmoe_balance_args_init(&c.args);
    c.args.state = d.args.state = buf_new(c.state_bytes);
    c.args.stats = d.args.stats;
    c.args.bias_rule = CLMOE_BIAS_SMEBU;
    void *ends[2] = {NULL, NULL};
    for (int again = 0; again < 2; again++) {
        OK(clmoe_state_init(c.layer, test.queue, c.args.state, 1, 0, NULL, NULL));
        for (int step = 0; step < 3; step++) {
            const void *before = buf_get(c.args.state), *first = computed(c.layer, &d);
            if (again)
                compare_bits("y and stats", computed(c.layer, &d), first, bytes);
            compare_bits("state", buf_get(c.args.state), before, c.state_bytes);
            update(&c);
        }
        ends[again] = buf_get(c.args.state);
    }
    compare_bits("state, at the end", ends[1], ends[0], c.state_bytes);
}

/* ---- Loss-free balancing ------------------------------------------------------------------- */

enum { TOKENS = 4096, EXPERTS = 64, TOP_K = 8, STEPS = 400 };

/* Logits of a router that prefers some experts. */
static float *skewed_logits(void) {
    float *logits = HOST(float, TOKENS *EXPERTS), lean[EXPERTS];
    for (size_t e = 0; e < EXPERTS; e++)
        lean[e] = (float)(0.4 * random_normal());
    for (size_t i = 0; i < (size_t)TOKENS * EXPERTS; i++)
        logits[i] = lean[i % EXPERTS] + (float)random_normal();
    return logits;
}

/* The sign rule on a fixed sigmoid router brings the largest load to the mean. */
static void the_sign_rule_balances(void **state) {
    (void)state;
    test_case("E 64, K 8, T 4096, gamma 1e-3");
    seed_set(1);
    clmoe_layer_desc desc = desc_of(&(shape){TOKENS, 1, EXPERTS, 0, TOP_K, 1});
    desc.router.score = CLMOE_SCORE_SIGMOID;
    desc.router.select_bias = 1;
    clmoe_layer *layer = test_layer(0, &desc);
    clmoe_plan_layout layout;
    clmoe_balance_args args;
    size_t pairs = TOKENS * TOP_K, bytes = 0;
    OK(clmoe_state_size(layer, &bytes));
    OK(clmoe_plan_layout_get(layer, TOKENS, &layout));
    clmoe_balance_args_init(&args);
    args.bias_rule = CLMOE_BIAS_SIGN;
    args.state = buf_new(bytes);
    args.stats = buf_new(stats_size(layer));
    clmoe_score_args score = {.struct_size = sizeof score, .tokens = TOKENS};
    score.logits_in = buf_of(skewed_logits(), (size_t)TOKENS * EXPERTS * 4);
    score.scores = buf_new((size_t)TOKENS * EXPERTS * 4);
    clmoe_topk_args topk = {.struct_size = sizeof topk,
                            .tokens = TOKENS,
                            .scores = score.scores,
                            .ids = buf_new(pairs * 4),
                            .pair_weights = buf_new(pairs * 4),
                            .live = buf_new(TOKENS * 4),
                            .state = args.state};
    clmoe_plan_args plan = {.struct_size = sizeof plan,
                            .tokens = TOKENS,
                            .ids = topk.ids,
                            .scratch = scratch_of(layer, TOKENS),
                            .plan = buf_new(layout.bytes)};
    clmoe_stats_args stats = {.struct_size = sizeof stats,
                              .tokens = TOKENS,
                              .ids = topk.ids,
                              .plan = plan.plan,
                              .live = topk.live,
                              .scratch = plan.scratch,
                              .stats = args.stats};
    clmoe_stats seen;
    float first = 0;
    int step = 0;
    OK(clmoe_state_init(layer, test.queue, args.state, 1, 0, NULL, NULL));
    OK(clmoe_score(layer, test.queue, &score, 0, NULL, NULL));
    for (; step < STEPS; step++) {
        OK(clmoe_topk(layer, test.queue, &topk, 0, NULL, NULL));
        OK(clmoe_plan(layer, test.queue, &plan, 0, NULL, NULL));
        OK(clmoe_stats_compute(layer, test.queue, &stats, 0, NULL, NULL));
        OK(clmoe_balance_update(layer, test.queue, &args, 0, NULL, NULL));
        memcpy(&seen, buf_get(args.stats), sizeof seen);
        first = step ? first : seen.max_violation;
        if (seen.max_violation < 0.1f)
            break;
    }
    print_message("MaxVio %.3f at first, %.3f after %d steps\n", (double)first,
                  (double)seen.max_violation, step);
    CHECK(first > 0.5f, "MaxVio is %g at first\n", (double)first);
    CHECK(step < STEPS, "MaxVio is %g after %d steps\n", (double)seen.max_violation, step);
}

/* ---- Arguments ------------------------------------------------------------------------------- */

static void check_bad(const control *c, const clmoe_balance_args *args, const char *field,
                      const char *value) {
    check_error(clmoe_balance_update(c->layer, test.queue, args, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, field, value);
}

#define BAD(field, v, text)                                                                        \
    do {                                                                                           \
        clmoe_balance_args args = c.args;                                                          \
        args.field = v;                                                                            \
        check_bad(&c, &args, #field, text);                                                        \
    } while (0)

static void bad_arguments(void **state) {
    (void)state;
    control c;
    clmoe_buf none = {NULL, 0};
    size_t bytes = 0;
    test_case("arguments");
    control_make(&c, 0);
    BAD(struct_size, 3, "3");
    BAD(noise.reserved[1], 3, "3");
    BAD(temperature.reserved[0], 4, "4");
    BAD(state, none, "not given");
    BAD(stats, none, "not given");
    BAD(bias_rule, (clmoe_bias_rule)6, "6");
    BAD(bias_rate, -1.0f, "-1");
    BAD(bias_rate, (float)NAN, "nan");
    BAD(bias_centred, 3, "3");
    BAD(bias_kappa, 0.0f, "0");
    BAD(bias_kappa, (float)NAN, "nan");
    BAD(bias_beta, 1.0f, "1");
    BAD(bias_beta, -0.5f, "-0.5");
    BAD(bias_beta, (float)NAN, "nan");
    BAD(ema_decay, 1.0f, "1");
    BAD(ema_decay, -0.5f, "-0.5");
    BAD(target_violation, -1.0f, "-1");
    BAD(loss_rate, (float)INFINITY, "inf");
    BAD(loss_min, 0.0f, "0");
    BAD(loss_max, 1e-4f, "0.0001");
    BAD(target_drop_rate, 1.0f, "1");
    BAD(target_drop_rate, (float)NAN, "nan");
    BAD(capacity_rate, -2.0f, "-2");
    BAD(capacity_min, 0.0f, "0");
    BAD(capacity_min, 1.5f, "1.5");
    c.args.noise = c.args.temperature = schedule_of(CLMOE_SCHEDULE_LINEAR, 1.0f, 0.5f, 0, 1);
    BAD(noise.shape, (clmoe_schedule_shape)4, "4");
    BAD(noise.steps, 0, "0");
    BAD(noise.start, -1.0f, "-1");
    BAD(noise.end, (float)NAN, "nan");
    BAD(temperature.end, 0.0f, "0");
    BAD(reserved, 7, "7");
    c.args.noise.shape = CLMOE_SCHEDULE_EXPONENTIAL;
    BAD(noise.end, 0.0f, "0");
    check_bad(&c, NULL, "args", "NULL");
    /* An older program's end before target_drop_rate: the rest has its defaults, which are right.
     */
    clmoe_balance_args older = c.args;
    memset(&older.target_drop_rate, 0xa5,
           sizeof older - offsetof(clmoe_balance_args, target_drop_rate));
    older.struct_size = offsetof(clmoe_balance_args, target_drop_rate);
    OK(clmoe_balance_update(c.layer, test.queue, &older, 0, NULL, NULL));
    OK(clmoe_balance_start(c.layer, test.queue, &older, 0, NULL, NULL));
    c.layer = NULL;
    check_bad(&c, &c.args, "layer", "NULL");

    control_make(&c, 0);
    clmoe_buf small_state = buf_short(c.state_bytes);
    BAD(state, small_state, "1323");
    check_error(clmoe_state_init(c.layer, test.queue, small_state, 1, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "state", "1323");
    check_error(clmoe_state_init(c.layer, test.queue, none, 1, 0, NULL, NULL),
                CLMOE_INVALID_ARGUMENT, "state", "not given");
    CHECK(clmoe_state_size(NULL, &bytes) == CLMOE_INVALID_ARGUMENT, "no layer\n");
    CHECK(clmoe_state_size(c.layer, NULL) == CLMOE_INVALID_ARGUMENT, "no bytes\n");
}

/* A state of another version or layer is not touched, nor is one by such statistics. */
static void check_foreign(uint32_t group_size, bool of_stats, size_t offset) {
    control c;
    seed_set(1);
    control_make(&c, group_size);
    c.args.bias_rule = CLMOE_BIAS_SIGN;
    c.args.target_violation = 1.5f;
    stats_write(&c, random_load(40), 0);
    const clmoe_buf buf = of_stats ? c.args.stats : c.args.state;
    char *bytes = buf_get(buf);
    bytes[offset]++;
    buf_write(buf, bytes, of_stats ? stats_size(c.layer) : c.state_bytes);
    const void *before = buf_get(c.args.state);
    c.args.noise = schedule_of(CLMOE_SCHEDULE_LINEAR, 0.25f, 0.5f, 0, 10);
    if (!of_stats)
        OK(clmoe_balance_start(c.layer, test.queue, &c.args, 0, NULL, NULL));
    update(&c);
    compare_bits("state", buf_get(c.args.state), before, c.state_bytes);
}

static void foreign_states(void **state) {
    (void)state;
    static const struct {
        const char *name;
        bool of_stats;
        size_t offset;
    } fields[] = {{"version", false, offsetof(clmoe_state, version)},
                  {"columns", false, offsetof(clmoe_state, columns)},
                  {"version of stats", true, offsetof(clmoe_stats, version)},
                  {"columns of stats", true, offsetof(clmoe_stats, columns)}};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t f = 0; f < COUNT_OF(fields); f++) {
            test_case("group size %u, other %s", group_sizes[g], fields[f].name);
            check_foreign(group_sizes[g], fields[f].of_stats, fields[f].offset);
        }
}

/* Bytes on the host that are no state of the layer: version 1 was of four arrays. */
static void states_from_elsewhere(void **state) {
    (void)state;
    control c;
    test_case("state check");
    control_make(&c, 0);
    clmoe_state *bytes = buf_get(c.args.state);
    OK(clmoe_state_check(c.layer, bytes, c.state_bytes));
    check_error(clmoe_state_check(c.layer, bytes, 63), CLMOE_INVALID_ARGUMENT, "bytes", "63");
    check_error(clmoe_state_check(c.layer, bytes, c.state_bytes - 4), CLMOE_INVALID_ARGUMENT,
                "bytes", "1320");
    check_error(clmoe_state_check(c.layer, NULL, 64), CLMOE_INVALID_ARGUMENT, "state", "NULL");
    check_error(clmoe_state_check(NULL, bytes, 64), CLMOE_INVALID_ARGUMENT, "layer", "NULL");
    bytes->columns = 62;
    check_error(clmoe_state_check(c.layer, bytes, c.state_bytes), CLMOE_INVALID_ARGUMENT,
                "state.columns", "62");
    bytes->version = 1;
    check_error(clmoe_state_check(c.layer, bytes, 64 + 16 * 63), CLMOE_INVALID_ARGUMENT,
                "state.version", "1");
    clmoe_buf older = {NULL, 0};
    cl_int code;
    older.mem = clCreateBuffer(test.context, CL_MEM_READ_WRITE, 64 + 16 * 63, NULL, &code);
    CL_OK(code);
    BAD(state, older, "version 1");
    clReleaseMemObject(older.mem);
}

/* The schedules hold from the first batch on, and at any step of a state. */
static void schedules_start(void **state) {
    (void)state;
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (uint32_t step = 0; step < 10; step += 3) {
            control c;
            test_case("group size %u, step %u", group_sizes[g], step);
            seed_set(1);
            control_make(&c, group_sizes[g]);
            c.args.stats = (clmoe_buf){NULL, 0};
            c.args.noise = schedule_of(CLMOE_SCHEDULE_LINEAR, 0.25f, 1.0f, 0, 10);
            c.args.temperature = schedule_of(CLMOE_SCHEDULE_LINEAR, 4.0f, 2.0f, 2, 8);
            clmoe_state *bytes = buf_get(c.args.state);
            bytes->step = c.want.step = step;
            buf_write(c.args.state, bytes, c.state_bytes);
            OK(clmoe_balance_start(c.layer, test.queue, &c.args, 0, NULL, NULL));
            c.want.noise_scale = 0.25 + 0.075 * step;
            c.want.temperature_scale = step <= 2 ? 4.0 : 4.0 - 0.25 * (step - 2.0);
            compare_state(&c);
        }
}

/* Counters stop at the largest number. */
static void counters_end(void **state) {
    (void)state;
    control c;
    seed_set(1);
    control_make(&c, 0);
    stats_write(&c, random_load(40), 0);
    for (int i = 0; i < 2; i++) {
        clmoe_state *bytes = buf_get(c.args.state);
        bytes->step = bytes->updates = UINT32_MAX;
        buf_write(c.args.state, bytes, c.state_bytes);
        update(&c);
    }
    clmoe_state *got = buf_get(c.args.state);
    assert_true(got->step == UINT32_MAX && got->updates == UINT32_MAX);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(first_state),         TEST(every_bias_rule),        TEST(exact_sign),
        TEST(schedules),           TEST(schedules_far_apart),    TEST(idle_without_load),
        TEST(resumed_bit_for_bit), TEST(the_sign_rule_balances), TEST(bad_arguments),
        TEST(foreign_states),      TEST(states_from_elsewhere),  TEST(counters_end),
        TEST(schedules_start),     TEST(a_batch_computed_again),
    };
    return RUN(tests);
}
