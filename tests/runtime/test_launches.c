/* The bound of a launch's work: the same bits in more launches, each within it, and none where
 * there is no bound. */
#include "layer.h" /* before cmocka, whose fail is a macro */
#include "workspace.h"

#include "gemm_case.h"
#include "support.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

/* ---- What is enqueued ------------------------------------------------------------------------ */

enum { MAX_LAUNCHES = 1 << 14 };

typedef struct seen_launch {
    char kernel[64];
    size_t groups;
    cl_event event; /* kept, so that no other one has its address */
} seen_launch;

static struct {
    seen_launch launches[MAX_LAUNCHES];
    size_t count, events; /* that were asked for */
} seen;

cl_int __real_clEnqueueNDRangeKernel(cl_command_queue queue, cl_kernel kernel, cl_uint dims,
                                     const size_t *offset, const size_t *global,
                                     const size_t *local, cl_uint num_wait, const cl_event *wait,
                                     cl_event *event);
cl_int __wrap_clEnqueueNDRangeKernel(cl_command_queue queue, cl_kernel kernel, cl_uint dims,
                                     const size_t *offset, const size_t *global,
                                     const size_t *local, cl_uint num_wait, const cl_event *wait,
                                     cl_event *event);

cl_int __wrap_clEnqueueNDRangeKernel(cl_command_queue queue, cl_kernel kernel, cl_uint dims,
                                     const size_t *offset, const size_t *global,
                                     const size_t *local, cl_uint num_wait, const cl_event *wait,
                                     cl_event *event) {
    cl_event own = NULL;
    const cl_int code = __real_clEnqueueNDRangeKernel(queue, kernel, dims, offset, global, local,
                                                      num_wait, wait, event ? event : &own);
    CHECK(seen.count < MAX_LAUNCHES, "too many launches\n");
    seen_launch *l = &seen.launches[seen.count++];
    CL_OK(clGetKernelInfo(kernel, CL_KERNEL_FUNCTION_NAME, sizeof l->kernel, l->kernel, NULL));
    l->groups = 1;
    for (cl_uint i = 0; i < dims; i++)
        l->groups *= global[i] / local[i];
    l->event = event ? *event : own;
    if (event)
        CL_OK(clRetainEvent(l->event));
    seen.events += event != NULL;
    return code;
}

static void forget_launches(void) {
    while (seen.count > 0)
        clReleaseEvent(seen.launches[--seen.count].event);
    seen.events = 0;
}

/* Of the kernels that begin with `prefix`, the next launch from *at on; NULL: no more. */
static const seen_launch *next_of(const char *prefix, size_t *at) {
    while (*at < seen.count) {
        const seen_launch *l = &seen.launches[(*at)++];
        if (strncmp(l->kernel, prefix, strlen(prefix)) == 0)
            return l;
    }
    return NULL;
}

static size_t launches_of(const char *prefix) {
    size_t at = 0, count = 0;
    while (next_of(prefix, &at))
        count++;
    return count;
}

static size_t groups_of(const char *prefix) {
    size_t at = 0, count = 0;
    for (const seen_launch *l = next_of(prefix, &at); l; l = next_of(prefix, &at))
        count += l->groups;
    return count;
}

/* ---- Batches under a bound ------------------------------------------------------------------- */

/* The outputs of a forward; arrays that a layer does not have are NULL. */
typedef struct outputs {
    void *y, *ids, *weights, *stats;
    size_t y_bytes, id_bytes, stats_bytes;
} outputs;

static void *get(clmoe_buf buf) {
    return buf.mem ? buf_get(buf) : NULL;
}

/* Runs `b` with launches of at most `work`, 0: any. */
static outputs run(clmoe_layer *layer, const batch *b, device_batch *d, uint64_t work) {
    layer->context->options.max_launch_work = work;
    forget_launches();
    batch_run(layer, b, d);
    layer->context->options.max_launch_work = 0;
    const size_t tokens = b->in.tokens;
    return (outputs){
        .y = get(d->args.y),
        .ids = get(d->args.ids),
        .weights = get(d->args.pair_weights),
        .stats = get(d->args.stats),
        .y_bytes = tokens * b->desc.dim * type_size(b->desc.type),
        .id_bytes = ref_pairs(&b->desc, b->in.tokens) * 4,
        .stats_bytes = stats_size(layer),
    };
}

static void compare_outputs(const outputs *got, const outputs *want) {
    compare_bits("y", got->y, want->y, want->y_bytes);
    if (want->ids) {
        compare_bits("ids", got->ids, want->ids, want->id_bytes);
        compare_bits("weights", got->weights, want->weights, want->id_bytes);
        compare_bits("stats", got->stats, want->stats, want->stats_bytes);
    }
}

/* CLBlast makes its launches itself. */
static bool is_cut(const char *engine) {
    return strcmp(engine, "clblast") != 0;
}

/* ---- GEMMs ----------------------------------------------------------------------------------- */

/* Two tiles of columns, of any engine, in each matrix of the experts. */
static const shape sizes = {130, 150, 12, 0, 3, 70};
enum { SHARED_DIM = 9, GEMMS = 5 };

/* What each GEMM of the layer below multiplies: router, experts, shared expert. */
static void work_of(clmoe_layer *layer, double work[GEMMS]) {
    clmoe_plan_layout plan;
    OK(clmoe_plan_layout_get(layer, sizes.tokens, &plan));
    const double T = sizes.tokens, D = sizes.dim, E = sizes.experts, H = sizes.hidden_dim;
    const double all[GEMMS] = {T * E * D, plan.slots * H * D * 2, plan.slots * D * H,
                               T * SHARED_DIM * D * 2, T * D * SHARED_DIM};
    memcpy(work, all, sizeof all);
}

/*
 * A bounded run's launches against the groups that an unbounded one gave each GEMM: all of them,
 * and no launch over the bound but one of a single group.
 */
static void check_parts(const size_t groups[GEMMS], const double work[GEMMS], uint64_t bound) {
    size_t at = 0;
    for (int i = 0; i < GEMMS; i++) {
        for (size_t done = 0; done < groups[i];) {
            const seen_launch *l = next_of("gemm_", &at);
            CHECK(l && done + l->groups <= groups[i], "GEMM %d has other groups\n", i);
            CHECK(l->groups == 1 ||
                      (double)l->groups * work[i] <= (double)bound * (double)groups[i],
                  "GEMM %d has a launch of %zu of %zu groups\n", i, l->groups, groups[i]);
            done += l->groups;
        }
    }
    CHECK(next_of("gemm_", &at) == NULL, "more launches than groups\n");
}

/* From a group per launch to one launch per GEMM. */
static void check_bounds(const char *engine, clmoe_layer *layer, const batch *b,
                         const outputs *want) {
    size_t groups[GEMMS], at = 0, before = groups_of("gemm_"), between = 0;
    const size_t all = before;
    double work[GEMMS];
    work_of(layer, work);
    CHECK(launches_of("gemm_") == GEMMS, "%zu launches without a bound\n", launches_of("gemm_"));
    for (int i = 0; i < GEMMS; i++)
        groups[i] = next_of("gemm_", &at)->groups;
    for (int bits = 0; bits <= 40; bits += 4) {
        device_batch d;
        test_note("%s, type %d, a bound of 2^%d", engine, (int)b->desc.type, bits);
        const outputs got = run(layer, b, &d, (uint64_t)1 << bits);
        const size_t launches = launches_of("gemm_");
        compare_outputs(&got, want);
        check_parts(groups, work, (uint64_t)1 << bits);
        CHECK(bits > 0 || launches == all, "%zu launches for %zu groups\n", launches, all);
        CHECK(launches <= before, "%zu launches, %zu with a smaller bound\n", launches, before);
        between += launches > GEMMS && launches < all;
        before = launches;
    }
    CHECK(before == GEMMS, "%zu launches with a large bound\n", before);
    CHECK(between > 0, "a launch has all groups or one\n");
}

static void gemms_in_parts(void **state) {
    (void)state;
    const clmoe_type types[] = {CLMOE_F32, CLMOE_BF16};
    for (size_t i = 0; i < COUNT_OF(types); i++) {
        const clmoe_type type = types[i];
        const char *const *engines = test_engines_of(type, type);
        for (size_t n = 0; engines[n] != NULL; n++) {
            batch b;
            device_batch d;
            test_case("%s, type %d", engines[n], (int)type);
            clmoe_layer_desc desc = desc_of(&sizes);
            desc.engine = engines[n];
            desc.type = desc.weight_type = type;
            desc.shared.hidden_dim = SHARED_DIM;
            seed_set(7);
            batch_make(&b, &desc, sizes.tokens);
            clmoe_layer *layer = test_layer(0, &desc);
            const outputs want = run(layer, &b, &d, 0);
            batch_compare(&b, &d, batch_reference(&b));
            if (is_cut(engines[n])) {
                check_bounds(engines[n], layer, &b, &want);
            } else {
                const outputs got = run(layer, &b, &d, 1);
                compare_outputs(&got, &want);
            }
        }
    }
}

/* A dense linear GEMM, as a router's, by every engine and not only by the one that routers have. */
static void check_dense(const gemm_engine *engine, uint32_t rows, uint32_t n) {
    static const storage down = {"down", CLMOE_GATE_NONE, false, true};
    const gemm_case c = {.engine = engine,
                         .store = &down,
                         .spread = SPREAD_DENSE,
                         .experts = 1,
                         .rows = rows,
                         .n = n,
                         .k = 300};
    clmoe_context *context = test_context(0);
    gemm_data d;
    gemm_run r;
    test_case("%s, %u rows, %u columns", engine->name, rows, n);
    seed_set(5);
    gemm_make_data(&c, &d);
    gemm_prepare(&c, &d, &r);
    forget_launches();
    const float *want = gemm_run_on(&c, &r, test.queue);
    const size_t groups = groups_of("gemm_");
    const uint64_t bounds[] = {1, 100000, 400000};
    for (size_t i = 0; i < COUNT_OF(bounds); i++) {
        forget_launches();
        context->options.max_launch_work = bounds[i];
        const float *got = gemm_run_on(&c, &r, test.out_of_order);
        context->options.max_launch_work = 0;
        compare_bits("C", got, want, sizeof(float) * c.rows * c.n);
        CHECK(i > 0 || launches_of("gemm_") == groups, "%zu launches for %zu groups\n",
              launches_of("gemm_"), groups);
    }
}

/* With one compute unit tiled takes small groups, large ones and tiles for these sizes. */
static void dense_in_parts(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    static const uint32_t dense[][2] = {{9, 67}, {140, 67}, {192, 67}, {192, 300}}; /* rows, n */
    device_info *info = &test_context(0)->info;
    const device_info real = *info;
    info->compute_units = 1;
    for (size_t i = 0; gemm_engines[i]; i++)
        for (size_t n = 0; engines[n] != NULL; n++)
            if (strcmp(gemm_engines[i]->name, engines[n]) == 0 && is_cut(engines[n]))
                for (size_t r = 0; r < COUNT_OF(dense); r++)
                    check_dense(gemm_engines[i], dense[r][0], dense[r][1]);
    *info = real;
}

/* ---- Policies -------------------------------------------------------------------------------- */

static const char *const policies[] = {"reroute",  "two levels",  "expert choice", "token rounding",
                                       "Sinkhorn", "all experts", "Soft MoE"};

/* A group per launch, and some. */
static void check_policy(const char *engine, const char *policy, uint64_t seed) {
    batch b;
    device_batch d;
    test_case("%s, %s", engine, policy);
    clmoe_layer_desc desc = desc_of(&sizes);
    variant_set(&desc, policy, NULL);
    desc.engine = engine;
    seed_set(seed);
    batch_make(&b, &desc, 40);
    clmoe_layer *layer = test_layer(0, &desc);
    const outputs want = run(layer, &b, &d, 0);
    const size_t groups = groups_of("gemm_"), gemms = launches_of("gemm_");
    const outputs one = run(layer, &b, &d, 1);
    CHECK(!is_cut(engine) || launches_of("gemm_") == groups, "%zu launches for %zu groups\n",
          launches_of("gemm_"), groups);
    compare_outputs(&one, &want);
    const outputs some = run(layer, &b, &d, 20000);
    CHECK(!is_cut(engine) || launches_of("gemm_") > gemms, "a bound of 20000 cuts nothing\n");
    compare_outputs(&some, &want);
}

static void every_policy(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(policies); i++)
            check_policy(engines[n], policies[i], i + 1);
}

/* ---- Overflow reroute ------------------------------------------------------------------------ */

/* All tokens want the same experts in the same order: each round fills one. */
static void same_wishes(uint32_t tokens, batch *b) {
    const shape s = {tokens, 5, 40, 0, 2, 3};
    clmoe_layer_desc desc = desc_of(&s);
    desc.capacity.factor = 1.0;
    desc.capacity.overflow = CLMOE_OVERFLOW_REROUTE;
    batch_make(b, &desc, s.tokens);
    float *logits = HOST(float, (size_t)s.tokens *s.experts);
    for (uint32_t i = 0; i < s.tokens * s.experts; i++)
        logits[i] = -0.1f * (float)(i % s.experts);
    b->in.logits_in = logits;
}

/* Launches of the one group, for `rounds` rounds in each. */
static void check_rounds(clmoe_layer *layer, const batch *b, const outputs *want, uint32_t rounds) {
    device_batch d;
    const uint32_t all = b->desc.num_experts + b->desc.top_k;
    const bool alone = layer->group == 1 || b->in.tokens <= 1024;
    const uint32_t wide = alone ? 0 : 16; /* rounds of all groups, before */
    const uint64_t each = (uint64_t)b->in.tokens * b->desc.num_experts;
    test_note("group %u, %u rounds in a launch", layer->group, rounds);
    const outputs got = run(layer, b, &d, rounds ? rounds * each + each / 2 : 1);
    const uint32_t most = rounds ? rounds : 1, launches = (all - wide + most - 1) / most;
    CHECK(launches_of("reroute_finish") == launches, "%zu launches, not %u\n",
          launches_of("reroute_finish"), launches);
    compare_outputs(&got, want);
}

static void reroute_in_parts(void **state) {
    (void)state;
    static const uint32_t groups[] = {0, 64, 64}, tokens[] = {80, 80, 1030};
    for (size_t g = 0; g < COUNT_OF(groups); g++) {
        batch b;
        device_batch d;
        test_case("group size %u, %u tokens", groups[g], tokens[g]);
        seed_set(11);
        same_wishes(tokens[g], &b);
        clmoe_layer *layer = test_layer(groups[g], &b.desc);
        const outputs want = run(layer, &b, &d, 0);
        batch_compare(&b, &d, batch_reference(&b));
        CHECK(launches_of("reroute_finish") == 1, "%zu launches without a bound\n",
              launches_of("reroute_finish"));
        for (uint32_t rounds = 0; rounds < 6; rounds++)
            check_rounds(layer, &b, &want, rounds);
    }
}

/* ---- Sinkhorn -----------------------------------------------------------------------------------
 */

/* A launch a round and one for the end; all rounds of one block in one. */
static void sinkhorn_rounds(void **state) {
    (void)state;
    static const uint32_t tokens[] = {1, 32, 33, 300};
    for (size_t i = 0; i < COUNT_OF(tokens); i++) {
        const shape s = {tokens[i], 5, 12, 0, 3, 3};
        clmoe_layer_desc desc = desc_of(&s);
        batch b;
        device_batch d;
        test_case("%u tokens", tokens[i]);
        desc.router.policy = CLMOE_POLICY_SINKHORN;
        desc.router.sinkhorn.iterations = 7;
        desc.router.sinkhorn.tolerance = 0;
        seed_set(13);
        batch_make(&b, &desc, s.tokens);
        clmoe_layer *layer = test_layer(64, &desc);
        run(layer, &b, &d, 0);
        const size_t rounds = layer->group == 1 ? 0 : (s.tokens <= 32 ? 2 : 8);
        CHECK(launches_of("sinkhorn_rounds") == rounds, "%zu launches\n",
              launches_of("sinkhorn_rounds"));
    }
}

/* ---- Few tokens --------------------------------------------------------------------------------
 */

/* Every way to score, choose and keep that few.cl has. */
static const struct {
    const char *variant;
    uint32_t experts, top_k, group;
} few_layers[] = {{"softmax, renorm, separate", 128, 8, 256},
                  {"softmax", 12, 3, 64},
                  {"sigmoid, groups, shared", 24, 3, 64},
                  {"top-k then softmax, interleaved, biases", 12, 3, 64},
                  {"sparsemixer", 12, 3, 64},
                  {"p-norm, expert scale", 12, 3, 64},
                  {"keep choice-major", 12, 3, 64},
                  {"no room at all", 12, 3, 64},
                  {"identity experts", 12, 3, 64},
                  {"learned noise", 300, 5, 64}};

/* Routing's arrays, where they lie in scratch. */
typedef struct routed {
    char *bytes[5];
    size_t sizes[5];
} routed;

static routed run_routed(clmoe_layer *layer, const batch *b, device_batch *d) {
    static const region_id ids[] = {REGION_SCORES, REGION_IDS, REGION_WEIGHTS, REGION_LIVE,
                                    REGION_PLAN};
    workspace_layout ws;
    routed r;
    buf_poison(d->args.scratch);
    forget_launches();
    OK(clmoe_forward(layer, test.queue, &d->args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    OK(workspace_layout_get(layer, b->in.tokens, &ws));
    char *all = buf_get(d->args.scratch);
    for (size_t i = 0; i < COUNT_OF(ids); i++) {
        r.bytes[i] = all + ws.offset[ids[i]];
        r.sizes[i] = ws.bytes[ids[i]];
    }
    return r;
}

/* One launch for three steps, and the same bits without it. */
static void check_few(clmoe_layer *layer, const batch *b, bool takes) {
    static const char *const names[] = {"scores", "ids", "weights", "live", "plan"};
    device_batch d;
    batch_upload(layer, b, &d);
    const cl_kernel few = layer->kernels[KERNEL_FEW];
    const routed got = run_routed(layer, b, &d);
    batch_compare(b, &d, batch_reference(b));
    CHECK(seen.events == 0, "%zu events that nobody asked for\n", seen.events);
    CHECK(launches_of("route_few") == takes, "few.cl %s\n", takes ? "is not used" : "is used");
    CHECK(launches_of("score_rows") == !takes && launches_of("topk_") == !takes &&
              launches_of("plan_") == !takes,
          "other launches than for %s\n", takes ? "few tokens" : "some");
    layer->kernels[KERNEL_FEW] = NULL;
    const routed want = run_routed(layer, b, &d);
    layer->kernels[KERNEL_FEW] = few;
    for (size_t i = 0; i < COUNT_OF(names); i++)
        compare_bits(names[i], got.bytes[i], want.bytes[i], want.sizes[i]);
}

static void few_tokens(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(few_layers); i++)
        for (uint32_t n = 0; n < 3; n++) {
            const shape s = {1, 20, few_layers[i].experts, 0, few_layers[i].top_k, 9};
            batch b;
            test_case("%s, %s", few_layers[i].variant,
                      n == 0 ? "a token" : (n == 1 ? "the most" : "more"));
            clmoe_layer_desc desc = desc_of(&s);
            variant_set(&desc, few_layers[i].variant, NULL);
            clmoe_layer *layer = test_layer(few_layers[i].group, &desc);
            const uint32_t most = layer->kernels[KERNEL_FEW] ? layer->topk_tokens : 0;
            CHECK(most > 0 || layer->group == 1, "there is no few.cl\n");
            seed_set(i + 1);
            batch_make(&b, &desc, n == 0 ? 1 : most + n - 1);
            if (n > 0)
                b.in.token_mask = random_mask(b.in.tokens);
            check_few(layer, &b, b.in.tokens > 0 && b.in.tokens <= most);
        }
}

/* ---- The option and the profile -------------------------------------------------------------- */

static void destroy_context(void *context) {
    clmoe_context_destroy(context);
}

static void destroy_layer(void *layer) {
    clmoe_layer_destroy(layer);
}

static clmoe_layer *bounded_layer(const clmoe_layer_desc *desc, uint64_t work) {
    clmoe_context *context = NULL;
    clmoe_layer *layer = NULL;
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    assert_true(options.max_launch_work == 0);
    options.max_launch_work = work;
    OK(clmoe_context_create(test.context, test.device, &options, &context));
    clean_later(destroy_context, context);
    OK(clmoe_layer_create(context, desc, &layer));
    clean_later(destroy_layer, layer);
    return layer;
}

/* A step begins with its first launch and ends with its last one. */
static void check_profile(const clmoe_profile *profile) {
    size_t at = 0;
    const seen_launch *l = next_of("gemm_", &at);
    assert_string_equal(profile->steps[0].name, "score");
    CHECK(l->event == profile->steps[0].first, "score begins elsewhere\n");
    for (uint32_t i = 0; i < profile->num_steps; i++)
        if (strcmp(profile->steps[i].name, "experts") == 0) {
            while (l && l->event != profile->steps[i].first)
                l = next_of("gemm_", &at);
            const cl_event first = l ? l->event : NULL, last = profile->steps[i].last;
            while (l && l->event != last)
                l = next_of("gemm_", &at);
            CHECK(first && l && first != last, "the experts' events are no launches of theirs\n");
        }
    CHECK(next_of("gemm_", &at) == NULL, "launches after the experts\n");
}

static void option_and_profile(void **state) {
    (void)state;
    batch b;
    device_batch d;
    cl_int code = CL_SUCCESS;
    const shape s = {20, 33, 5, 0, 2, 19};
    test_case("a context's option");
    const clmoe_layer_desc desc = desc_of(&s);
    seed_set(3);
    batch_make(&b, &desc, s.tokens);
    clmoe_layer *layer = bounded_layer(&desc, 5000);
    cl_command_queue queue =
        clCreateCommandQueue(test.context, test.device, CL_QUEUE_PROFILING_ENABLE, &code);
    CL_OK(code);
    batch_upload(layer, &b, &d);
    clmoe_profile profile = {.struct_size = sizeof profile};
    d.args.profile = &profile;
    forget_launches();
    OK(clmoe_forward(layer, queue, &d.args, 0, NULL, NULL));
    CL_OK(clFinish(queue));
    batch_compare(&b, &d, batch_reference(&b));
    CHECK(launches_of("gemm_") > 3, "only %zu launches\n", launches_of("gemm_"));
    CHECK(seen.events == seen.count, "%zu launches have no event\n", seen.count - seen.events);
    check_profile(&profile);
    clmoe_profile_release(&profile);
    forget_launches();
    clReleaseCommandQueue(queue);
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(gemms_in_parts),    TEST(dense_in_parts),
                                       TEST(every_policy),      TEST(reroute_in_parts),
                                       TEST(few_tokens),        TEST(sinkhorn_rounds),
                                       TEST(option_and_profile)};
    return RUN(tests);
}
