/* Sizes at their limits: 31-bit slots, SIZE_MAX, and what lies just past each. */
#include "layer.h"
#include "support.h"
#include "support_variants.h"
#include "workspace.h"

#include <stdio.h>
#include <string.h>

#define MAX_PAIRS ((uint32_t)1 << 30)
enum { MOST_EXPERTS = 4096, MOST_DIM = 1 << 24, ALIGNMENT = 256 };

static const shape small = {6, 5, 8, 0, 2, 3};
static const shape largest = {1, MOST_DIM, MOST_EXPERTS, 0, 1, MOST_DIM};

/* Of sizes that may be more than the device allows in a buffer, and are told all the same. */
static void sized(clmoe_status status) {
    if (status == CLMOE_UNSUPPORTED && strstr(clmoe_last_error(), "per buffer"))
        return;
    check_ok(status, "clmoe_layer_memory()", __FILE__, __LINE__);
}

static void refused(clmoe_status status, const char *words) {
    CHECK(status == CLMOE_UNSUPPORTED, "status is %s: %s\n", clmoe_status_string(status),
          clmoe_last_error());
    CHECK(strstr(clmoe_last_error(), words) != NULL, "\"%s\" does not say \"%s\"\n",
          clmoe_last_error(), words);
}

static void sums_and_products(void **state) {
    (void)state;
    size_t result = 7;
    test_case("sums and products");
    assert_true(size_mul(SIZE_MAX, 1, &result) && result == SIZE_MAX);
    assert_true(size_mul(1, SIZE_MAX, &result) && result == SIZE_MAX);
    assert_true(size_mul(SIZE_MAX, 0, &result) && result == 0);
    assert_true(size_mul(0, SIZE_MAX, &result) && result == 0);
    assert_true(size_mul(SIZE_MAX / 3, 3, &result) && result == SIZE_MAX / 3 * 3);
    assert_false(size_mul(SIZE_MAX / 2 + 1, 2, &result));
    assert_false(size_mul(2, SIZE_MAX / 2 + 1, &result));
    assert_false(size_mul(SIZE_MAX, SIZE_MAX, &result));
    assert_true(size_add(SIZE_MAX, 0, &result) && result == SIZE_MAX);
    assert_true(size_add(1, SIZE_MAX - 1, &result) && result == SIZE_MAX);
    assert_false(size_add(SIZE_MAX, 1, &result));
    assert_false(size_add(1, SIZE_MAX, &result));
}

/* Every entry is in a block, no block is empty, and there are few. */
static void blocks_of_a_plan(void **state) {
    (void)state;
    const uint32_t counts[] = {0,        1,        255,       256, 257, 1u << 18, (1u << 18) + 1,
                               1u << 30, 1u << 31, UINT32_MAX};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++)
        for (size_t i = 0; i < COUNT_OF(counts); i++) {
            uint64_t count = counts[i];
            test_case("%u entries, group size %u", counts[i], group_sizes[g]);
            block_split split =
                workspace_blocks(test_context(group_sizes[g])->largest_group, counts[i]);
            CHECK((uint64_t)split.size * split.count >= count, "%u blocks of %u\n", split.count,
                  split.size);
            CHECK(count == 0 || (uint64_t)split.size * (split.count - 1) < count,
                  "%u blocks of %u\n", split.count, split.size);
            CHECK(split.count >= 1 && split.count <= 256, "%u blocks\n", split.count);
        }
}

/* Arrays one after another, each with room for its elements. */
static void check_layout(const clmoe_layer *layer, uint32_t tokens, const clmoe_plan_layout *plan) {
    workspace_layout exact;
    OK(workspace_layout_get(layer, tokens, &exact));
    assert_true(exact.plan.bytes <= plan->bytes);
    const size_t columns = layer->columns, experts = layer->desc.num_experts;
    const struct {
        const char *name;
        size_t at, count, next;
    } arrays[] = {
        {"load", plan->load, columns, plan->kept},
        {"kept", plan->kept, columns, plan->rerouted_in},
        {"rerouted_in", plan->rerouted_in, columns, plan->rerouted_out},
        {"rerouted_out", plan->rerouted_out, columns, plan->offsets},
        {"offsets", plan->offsets, experts + 1, plan->slot_of},
        {"slot_of", plan->slot_of, plan->pairs, plan->pair_of},
        {"pair_of", plan->pair_of, plan->slots, plan->token_of},
        {"token_of", plan->token_of, plan->slots, plan->tile_expert},
        {"tile_expert", plan->tile_expert, plan->slots / plan->row_tile, exact.plan.bytes},
    };
    for (size_t i = 0; i < COUNT_OF(arrays); i++)
        CHECK(arrays[i].next - arrays[i].at >= 4 * arrays[i].count &&
                  arrays[i].next - arrays[i].at < 4 * arrays[i].count + ALIGNMENT,
              "%s of %zu elements lies at [%zu, %zu)\n", arrays[i].name, arrays[i].count,
              arrays[i].at, arrays[i].next);
}

static void plans_of_31_bits(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        clmoe_plan_layout plan;
        clmoe_layer_desc desc = desc_of(&small);
        desc.engine = engines[n];
        test_case("engine %s", engines[n]);
        clmoe_layer *layer = test_layer(0, &desc);
        OK(clmoe_plan_layout_get(layer, MAX_PAIRS / 2, &plan));
        assert_int_equal(plan.pairs, MAX_PAIRS);
        assert_true(plan.slots >= plan.pairs && plan.slots <= INT32_MAX);
        check_layout(layer, MAX_PAIRS / 2, &plan);
        refused(clmoe_plan_layout_get(layer, MAX_PAIRS / 2 + 1, &plan), "2^30");
        refused(clmoe_plan_layout_get(layer, UINT32_MAX, &plan), "4294967295");
    }
}

/* E * C passes 2^31 - 1 where E * (C - tile) does not; whatever asks for more than T gets T. */
static void capacities_of_31_bits(void **state) {
    (void)state;
    enum { EXPERTS = 2048, ROWS = 1 << 20 };
    clmoe_plan_layout plan;
    clmoe_layer_desc desc = desc_of(&small);
    desc.num_experts = EXPERTS;
    desc.top_k = 1;
    desc.capacity.rows = ROWS;
    test_case("capacity 2^20");
    clmoe_layer *layer = test_layer(0, &desc);
    refused(clmoe_plan_layout_get(layer, ROWS, &plan), "2^31-1");
    OK(clmoe_plan_layout_get(layer, 1, &plan));
    uint32_t fewer = ROWS - plan.row_tile;
    OK(clmoe_plan_layout_get(layer, fewer, &plan));
    assert_int_equal(plan.capacity, fewer);
    assert_true(plan.slots == EXPERTS * fewer);
    check_layout(layer, fewer, &plan);

    const clmoe_capacity_desc huge[] = {
        {.rows = UINT32_MAX},
        {.factor = 1e300},
        {.factor = 1e-300, .min_rows = UINT32_MAX},
        {.rows = 3, .multiple = UINT32_MAX},
        {.rows = UINT32_MAX, .min_rows = UINT32_MAX, .multiple = UINT32_MAX},
    };
    for (size_t i = 0; i < COUNT_OF(huge); i++) {
        desc.capacity = huge[i];
        test_case("capacity %zu", i);
        layer = test_layer(0, &desc);
        OK(clmoe_plan_layout_get(layer, 1000, &plan));
        assert_int_equal(plan.capacity, 1000);
        refused(clmoe_plan_layout_get(layer, MAX_PAIRS, &plan), "2^31-1");
    }
}

static void dropless(clmoe_layer_desc *d) {
    d->router.expert_scale = 1;
}
static void fixed_rows(clmoe_layer_desc *d) {
    d->capacity.rows = 100;
    d->capacity.keep = CLMOE_KEEP_PRIORITY;
}
static void by_factor(clmoe_layer_desc *d) {
    d->capacity.factor = 1.25;
    d->capacity.multiple = 7;
    d->shared.hidden_dim = 5;
    d->capacity.overflow = CLMOE_OVERFLOW_REROUTE;
}
static void by_small_factor(clmoe_layer_desc *d) {
    d->capacity.factor = 0.1;
    d->router.rebalance.iterations = 3;
}
static void in_sequences(clmoe_layer_desc *d) {
    d->capacity.factor = 1.0;
    d->capacity.tokens_per_sequence = 37;
}
static void in_long_sequences(clmoe_layer_desc *d) {
    d->capacity.rows = 11;
    d->capacity.tokens_per_sequence = 700;
    d->balance.device_groups = 4;
}
static void by_tile(clmoe_layer_desc *d) {
    d->capacity.keep = CLMOE_KEEP_ROUND;
}
static void one_expert(clmoe_layer_desc *d) {
    d->num_experts = d->top_k = 1;
}

static const layer_variant forms[] = {
    {"dropless", dropless},
    {"a number of rows, by priority", fixed_rows},
    {"a factor, reroute, shared", by_factor},
    {"a small factor, rebalance", by_small_factor},
    {"sequences", in_sequences},
    {"long sequences, device groups", in_long_sequences},
    {"expert choice", NULL},
    {"token rounding", NULL},
    {"token rounding, by the tile", by_tile},
    {"Sinkhorn", NULL},
    {"all experts", NULL},
    {"Soft MoE", NULL},
    {"one expert", one_expert},
};

/* What batches of 0, 1, ... tokens need, and what is said of them. */
typedef struct memory_walk {
    size_t saved, scratch, plan, z; /* the most that a batch so far needs */
    uint32_t slots;
    size_t saved_said, scratch_said, plan_said; /* of the last batch */
} memory_walk;

static size_t most(size_t a, size_t b) {
    return a > b ? a : b;
}

/* One size serves every smaller batch, too. */
static void check_z(const clmoe_layer *layer, uint32_t tokens, size_t need) {
    size_t z = 0;
    OK(clmoe_z_size(layer, tokens, CLMOE_MLP_EXPERTS, &z));
    CHECK(z >= need && z <= need + need / 4 + (1 << 20), "%u tokens: z is %zu for %zu\n", tokens, z,
          need);
}

static void next_batch(const clmoe_layer *layer, uint32_t tokens, memory_walk *w) {
    size_t saved = 0, scratch = 0;
    workspace_layout need;
    clmoe_plan_layout plan;
    OK(workspace_layout_get(layer, tokens, &need));
    OK(clmoe_layer_memory(layer, tokens, &saved, &scratch));
    OK(clmoe_plan_layout_get(layer, tokens, &plan));
    w->saved = most(w->saved, need.saved_bytes);
    w->scratch = most(w->scratch, need.scratch_bytes);
    w->plan = most(w->plan, need.plan.bytes);
    w->slots = (uint32_t)most(w->slots, plan.slots);
    CHECK(saved >= w->saved && scratch >= w->scratch && plan.bytes >= w->plan,
          "%u tokens: %zu, %zu, %zu are not enough: %zu, %zu, %zu\n", tokens, saved, scratch,
          plan.bytes, w->saved, w->scratch, w->plan);
    CHECK(saved >= w->saved_said && scratch >= w->scratch_said && plan.bytes >= w->plan_said,
          "%u tokens: less than with fewer\n", tokens);
    CHECK(plan.most_slots >= w->slots && plan.most_slots <= w->slots + w->slots / 8 + 64,
          "%u tokens: most_slots is %u, but a batch has %u\n", tokens, plan.most_slots, w->slots);
    CHECK(scratch <= w->scratch + w->scratch / 4 + (1 << 20), "%u tokens: %zu for %zu\n", tokens,
          scratch, w->scratch);
    w->z = most(w->z, need.bytes[REGION_Z]);
    if (layer->desc.training)
        check_z(layer, tokens, w->z);
    w->saved_said = saved;
    w->scratch_said = scratch;
    w->plan_said = plan.bytes;
}

/* In training, kept in full or in part. */
static void walk_form(const layer_variant *form, const char *engine, uint32_t group) {
    for (uint32_t kind = 0; kind < 3; kind++) {
        memory_walk walk = {0};
        clmoe_layer_desc desc = desc_of(&small);
        desc.engine = engine;
        variant_set(&desc, form->name, form->set);
        desc.training = kind > 0;
        desc.recompute = desc.dye = kind > 1;
        test_case("engine %s, %s, training %u, group size %u", engine, form->name, kind, group);
        const clmoe_layer *layer = test_layer(group, &desc);
        for (uint32_t tokens = 0; tokens <= 4096; tokens++)
            next_batch(layer, tokens, &walk);
    }
}

static void memory_serves_smaller_batches(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t f = 0; f < COUNT_OF(forms); f++)
            for (uint32_t group = 0; group <= (n == 0 ? 64 : 0); group += 64)
                walk_form(&forms[f], engines[n], group);
}

/* Buffers for the largest batch, and every smaller one runs in them, forward and backward. */
static void smaller_batches_run(void **state) {
    (void)state;
    enum { MOST = 132 };
    batch b;
    device_batch d;
    clmoe_backward_args back;
    clmoe_layer_desc desc = desc_of(&small);
    const char *const *engines = test_engines();
    desc.training = 1;
    for (size_t n = 0; engines[n] != NULL; n++) {
        test_case("engine %s", engines[n]);
        desc.engine = engines[n];
        clmoe_layer *layer = test_layer(0, &desc);
        batch_make(&b, &desc, MOST);
        batch_upload(layer, &b, &d);
        clmoe_backward_args_init(&back);
        back.weights = &d.weights;
        back.x = back.dy = d.args.x;
        back.saved = d.args.saved;
        back.scratch = d.args.scratch;
        back.dx = buf_new((size_t)MOST * desc.dim * sizeof(float));
        for (uint32_t tokens = MOST; tokens > 0; tokens--) {
            d.args.tokens = back.tokens = tokens;
            OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
            OK(clmoe_backward(layer, test.queue, &back, 0, NULL, NULL));
        }
        CL_OK(clFinish(test.queue));
    }
}

/* Every matrix has more than 2^31 elements; the arrays of ye and hidden rows alone are known. */
static void memory_of_large_rows(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        size_t saved = 0, scratch = 0;
        clmoe_layer *layer = NULL;
        clmoe_plan_layout plan;
        clmoe_layer_desc desc = desc_of(&largest);
        desc.engine = engines[n];
        desc.training = 1;
        desc.shared.hidden_dim = MOST_DIM;
        test_case("engine %s", engines[n]);
        clmoe_status status = clmoe_layer_create(test_context(0), &desc, &layer);
        if (strcmp(engines[n], "clblast") == 0) {
            refused(status, "2147483647");
            continue;
        }
        OK(status);
        clean_later((void (*)(void *))clmoe_layer_destroy, layer);
        OK(clmoe_plan_layout_get(layer, MAX_PAIRS, &plan));
        sized(clmoe_layer_memory(layer, MAX_PAIRS, &saved, &scratch));
        const uint64_t row = (uint64_t)4 * MOST_DIM, pairs = MAX_PAIRS;
        /* z of gate and up, by pair and by token. */
        CHECK(saved >= 4 * pairs * row && saved < 5 * pairs * row, "saved is %zu\n", saved);
        /* Of the experts dh, dz, dxe, and rows of x and dy where an engine wants them gathered; of
         * the shared expert dh, dz and its part of dx; the router's part. */
        CHECK(scratch >= (4 * (uint64_t)plan.slots + 5 * pairs) * row, "scratch is %zu\n", scratch);
        CHECK(scratch < (7 * (uint64_t)plan.slots + 6 * pairs) * row, "scratch is %zu\n", scratch);
    }
}

/* A descriptor's limits keep sums below SIZE_MAX; without them they are refused. */
static void memory_past_size_max(void **state) {
    (void)state;
    size_t saved = 0, scratch = 0;
    clmoe_layer_desc desc = desc_of(&small);
    test_case("past SIZE_MAX");
    desc.top_k = 1;
    clmoe_layer *layer = test_layer(0, &desc);
    layer->desc.dim = UINT32_MAX; /* ye alone just fits */
    refused(clmoe_layer_memory(layer, MAX_PAIRS, &saved, &scratch), "exceeds size_t");
    sized(clmoe_layer_memory(layer, MAX_PAIRS / 4, &saved, &scratch));
    layer->desc.experts.hidden_dim = UINT32_MAX;
    refused(clmoe_layer_memory(layer, MAX_PAIRS / 2, &saved, &scratch), "exceeds size_t");
    sized(clmoe_layer_memory(layer, MAX_PAIRS / 16, &saved, &scratch));
    CHECK(scratch >= (uint64_t)4 * (MAX_PAIRS / 16) * 2 * UINT32_MAX, "scratch is %zu\n", scratch);
    layer->desc.dim = small.dim;
    layer->desc.experts.hidden_dim = small.hidden_dim;
    /* Nearly 2^31 slots: one product alone is too large, and the rest would fit. */
    desc.capacity.rows = MAX_PAIRS / 4 - 1;
    layer = test_layer(0, &desc);
    sized(clmoe_layer_memory(layer, MAX_PAIRS / 4, &saved, &scratch));
    layer->desc.dim = UINT32_MAX;
    refused(clmoe_layer_memory(layer, MAX_PAIRS / 4, &saved, &scratch), "exceeds size_t");
    layer->desc.dim = small.dim;
}

static void packed_weights(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        size_t bytes = 0;
        clmoe_layer *layer = NULL;
        clmoe_layer_desc desc = desc_of(&largest);
        desc.engine = engines[n];
        test_case("engine %s", engines[n]);
        if (clmoe_layer_create(test_context(0), &desc, &layer) != CLMOE_SUCCESS)
            continue;
        clean_later((void (*)(void *))clmoe_layer_destroy, layer);
        clmoe_status status = clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes);
        if (status == CLMOE_UNSUPPORTED) {
            refused(status, "packed form");
            continue;
        }
        /* The header; gate, up and down of whole vectors: 3 * 2^12 * 2^24 * 2^24 * 4 bytes. */
        OK(status);
        CHECK(bytes == ((uint64_t)3 << 62) + 256, "%zu bytes\n", bytes);
        layer->desc.dim *= 2;
        refused(clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes), "exceed size_t");
        assert_int_equal(bytes, 0);
        layer->desc.dim = UINT32_MAX;
        layer->desc.experts.hidden_dim = UINT32_MAX;
        refused(clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes), "exceed size_t");
        assert_int_equal(bytes, 0);
    }
}

/* Buffers of a few bytes where 2^57 to SIZE_MAX are needed: refused, with that number. */
static void buffers_far_too_small(void **state) {
    (void)state;
    batch b;
    device_batch d;
    char number[32];
    clmoe_layer_desc desc = desc_of(&small);
    test_case("buffers");
    seed_set(3);
    batch_make(&b, &desc, small.tokens);
    clmoe_layer *layer = test_layer(0, &desc);
    batch_upload(layer, &b, &d);
    d.args.scratch = buf_new(1 << 20);
    const struct {
        uint32_t tokens, experts, dim;
        const char *name;
        size_t bytes;
    } cases[] = {
        {MAX_PAIRS / 2, 8, MOST_DIM, "x ", (size_t)1 << 55},
        {0, MOST_EXPERTS, MOST_DIM, "weights.experts", (size_t)MOST_EXPERTS * MOST_DIM * 6 * 4},
        {0, MOST_EXPERTS, UINT32_MAX, "weights.experts", (size_t)MOST_EXPERTS * UINT32_MAX * 6 * 4},
        {0, 8, MOST_DIM, "weights.router", (size_t)8 * MOST_DIM * 4},
    };
    for (size_t i = 0; i < COUNT_OF(cases); i++) {
        layer->desc.num_experts = layer->experts.shape.experts = cases[i].experts;
        layer->desc.dim = cases[i].dim;
        d.args.tokens = cases[i].tokens;
        d.args.logits_in = strstr(cases[i].name, "router") ? (clmoe_buf){0} : d.args.x;
        snprintf(number, sizeof number, "%zu", cases[i].bytes);
        clmoe_status status = clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL);
        CHECK(status == CLMOE_INVALID_ARGUMENT, "case %zu: %s\n", i, clmoe_last_error());
        CHECK(strstr(clmoe_last_error(), cases[i].name) && strstr(clmoe_last_error(), number),
              "case %zu: \"%s\" does not name %s and %s\n", i, clmoe_last_error(), cases[i].name,
              number);
    }
    layer->desc.num_experts = layer->experts.shape.experts = small.experts;
    layer->desc.dim = small.dim;
}

/* A layer that does not measure has no such kernels, and asks for less scratch. */
static void not_enabled(void **state) {
    (void)state;
    static const kernel_id measuring[] = {KERNEL_SUMS_ROWS, KERNEL_STATS, KERNEL_LOSS_VALUES,
                                          KERNEL_LOSS_GRADIENT, KERNEL_CONTROL};
    clmoe_layer_desc desc = desc_of(&small);
    size_t with, without;
    test_case("balance.enabled");
    clmoe_layer *measures = test_layer(0, &desc);
    desc.balance.enabled = 0;
    clmoe_layer *plain = test_layer(0, &desc);
    desc.training = 1;
    clmoe_layer *trains = test_layer(0, &desc);
    for (size_t i = 0; i < COUNT_OF(measuring); i++) {
        CHECK(measures->kernels[measuring[i]] != NULL, "kernel %zu is not there\n", i);
        CHECK(trains->kernels[measuring[i]] != NULL, "kernel %zu is not there in training\n", i);
        CHECK(plain->kernels[measuring[i]] == NULL, "kernel %zu was made unasked\n", i);
    }
    OK(clmoe_layer_memory(measures, small.tokens, NULL, &with));
    OK(clmoe_layer_memory(plain, small.tokens, NULL, &without));
    CHECK(without < with, "scratch is %zu, with statistics %zu\n", without, with);
}

static void unsupported(clmoe_status status, const char *asked) {
    refused(status, "balance.enabled 0");
    refused(status, asked);
}

/* Every call that asks such a layer; the checks come before those of other arguments. */
static void calls_not_enabled(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    const clmoe_loss_desc loss = {.kind = CLMOE_LOSS_SWITCH, .weight = 1};
    const clmoe_stats_args stats = {.struct_size = sizeof stats, .tokens = small.tokens};
    const clmoe_loss_args losses = {.struct_size = sizeof losses, .tokens = small.tokens};
    clmoe_balance_args balance;
    batch b;
    device_batch d;
    test_case("balance.enabled 0");
    desc.balance.enabled = 0;
    clmoe_layer *layer = test_layer(0, &desc);
    batch_make(&b, &desc, small.tokens);
    batch_upload(layer, &b, &d);
    clmoe_balance_args_init(&balance);
    unsupported(clmoe_stats_compute(layer, test.queue, &stats, 0, NULL, NULL), "stats");
    unsupported(clmoe_loss(layer, test.queue, &losses, 0, NULL, NULL), "loss");
    unsupported(clmoe_balance_start(layer, test.queue, &balance, 0, NULL, NULL), "balance");
    unsupported(clmoe_balance_update(layer, test.queue, &balance, 0, NULL, NULL), "balance");
    unsupported(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL), "stats");
    d.args.stats = (clmoe_buf){NULL, 0};
    d.args.losses = &loss;
    d.args.num_losses = 1;
    d.args.loss_values = buf_new(4);
    unsupported(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL), "loss");
    CL_OK(clFinish(test.queue));
    CHECK(all_untouched(), "something was enqueued\n");
    d.args.losses = NULL;
    d.args.num_losses = 0;
    d.args.loss_values = (clmoe_buf){NULL, 0};
    OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
}

/*
 * A later field must make its struct larger, or libraries and programs of both versions would not
 * see it: there is no padding behind the last one.
 */
static void no_padding_at_the_end(void **state) {
    (void)state;
#define ENDS_WITH(type, last)                                                                      \
    CHECK(offsetof(type, last) + sizeof((type){0}.last) == sizeof(type),                           \
          "%s is larger than "                                                                     \
          "its fields\n",                                                                          \
          #type)
    test_case("padding");
    ENDS_WITH(clmoe_context_options, max_launch_work);
    ENDS_WITH(clmoe_checkpoint_options, reserved);
    ENDS_WITH(clmoe_layer_desc, reserved);
    ENDS_WITH(clmoe_forward_args, bias_counts);
    ENDS_WITH(clmoe_score_args, reserved);
    ENDS_WITH(clmoe_topk_args, scratch);
    ENDS_WITH(clmoe_plan_args, plan);
    ENDS_WITH(clmoe_plan_layout, reserved);
    ENDS_WITH(clmoe_renorm_after_drop_args, plan);
    ENDS_WITH(clmoe_jitter_args, jittered);
    ENDS_WITH(clmoe_dispatch_args, xe);
    ENDS_WITH(clmoe_soft_dispatch_args, xe);
    ENDS_WITH(clmoe_soft_combine_args, mixed);
    ENDS_WITH(clmoe_experts_args, state);
    ENDS_WITH(clmoe_shared_expert_args, state);
    ENDS_WITH(clmoe_combine_args, reserved);
    ENDS_WITH(clmoe_stats_args, stats);
    ENDS_WITH(clmoe_loss_args, dgroup_logits);
    ENDS_WITH(clmoe_balance_args, bias_counts);
    ENDS_WITH(clmoe_bias_counts_args, bias_counts);
    ENDS_WITH(clmoe_pack_args, packed);
    ENDS_WITH(clmoe_place_args, doubles);
    ENDS_WITH(clmoe_replicate_args, physical_ids);
    ENDS_WITH(clmoe_backward_args, profile);
    ENDS_WITH(clmoe_experts_backward_args, reserved);
    ENDS_WITH(clmoe_combine_backward_args, gradients);
    ENDS_WITH(clmoe_shared_expert_backward_args, reserved);
    ENDS_WITH(clmoe_topk_backward_args, gradients);
    ENDS_WITH(clmoe_score_backward_args, logits_given);
    ENDS_WITH(clmoe_dispatch_backward_args, dx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(sums_and_products),
        TEST(blocks_of_a_plan),
        TEST(plans_of_31_bits),
        TEST(capacities_of_31_bits),
        TEST(memory_serves_smaller_batches),
        TEST(smaller_batches_run),
        TEST(memory_of_large_rows),
        TEST(memory_past_size_max),
        TEST(packed_weights),
        TEST(buffers_far_too_small),
        TEST(not_enabled),
        TEST(calls_not_enabled),
        TEST(no_padding_at_the_end),
    };
    return RUN(tests);
}
