/* The promises at the top of clmoe.h, beyond right results. */
#include "support_balance.h"

#include <math.h>
#include <pthread.h>
#include <string.h>

static const shape small = {65, 21, 12, 2, 3, 19};

/* A layer with something of everything. */
static clmoe_layer_desc rich_desc(const char *engine) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.engine = engine;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.router.select_bias = 1;
    desc.capacity.factor = 0.9;
    desc.capacity.keep = CLMOE_KEEP_PRIORITY;
    desc.experts.down_bias = 1;
    desc.shared.hidden_dim = 9;
    desc.shared_gate = 1;
    desc.output_bias = 1;
    return desc;
}

static bool blocks(const char *engine) {
    return strcmp(engine, "clblast") == 0;
}

/* A batch of the rich layer with residual and mask; small ones have no near ties. */
static void rich_batch(batch *b, const char *engine, uint32_t tokens, uint64_t seed) {
    clmoe_layer_desc desc = rich_desc(engine);
    for (;; seed += 100) {
        seed_set(seed);
        batch_make(b, &desc, tokens);
        b->in.residual = random_floats((size_t)tokens * desc.dim, 1.0);
        b->in.token_mask = random_mask(tokens);
        const ref_result *r = tokens > 100 ? NULL : batch_reference(b);
        if (r == NULL || (r->choice_gap > 1e-5 && r->order_gap > 1e-5))
            return;
    }
}

/* ---- Events and queues ----------------------------------------------------------------------- */

static void check_complete(cl_event event) {
    cl_int status = -1;
    CHECK(event != NULL, "no event\n");
    CL_OK(clWaitForEvents(1, &event));
    CL_OK(clGetEventInfo(event, CL_EVENT_COMMAND_EXECUTION_STATUS, sizeof status, &status, NULL));
    CHECK(status == CL_COMPLETE, "the event's status is %d\n", status);
    clReleaseEvent(event);
}

/* The event is valid on both kinds of queue, also for 0 tokens, and completes with the results. */
static void events_are_valid(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const uint32_t tokens[] = {0, 1, 65};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(tokens); i++)
            for (int q = 0; q < 2; q++) {
                batch b;
                device_batch d;
                cl_event event = NULL;
                test_case("engine %s, T %u, queue %d", engines[n], tokens[i], q);
                rich_batch(&b, engines[n], tokens[i], 1);
                const ref_result *want = batch_reference(&b);
                clmoe_layer *layer = test_layer(0, &b.desc);
                batch_upload(layer, &b, &d);
                cl_command_queue queue = q ? test.out_of_order : test.queue;
                OK(clmoe_forward(layer, queue, &d.args, 0, NULL, &event));
                CL_OK(clFlush(queue));
                check_complete(event);
                batch_compare(&b, &d, want);
            }
}

/* For 0 tokens, arrays with a dimension T need not be given; the statistics are those of nothing.
 */
static void no_tokens_need_no_arrays(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        batch b;
        device_batch d;
        cl_event event = NULL;
        test_case("engine %s", engines[n]);
        rich_batch(&b, engines[n], 0, 1);
        const ref_result *want = batch_reference(&b);
        clmoe_layer *layer = test_layer(0, &b.desc);
        batch_upload(layer, &b, &d);
        const clmoe_buf none = {NULL, 0};
        d.args.x = d.args.y = d.args.residual = d.args.token_mask = none;
        d.args.logits = d.args.ids = d.args.pair_weights = none;
        OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, &event));
        check_complete(event);
        compare_stats(buf_get(d.args.stats), &want->stats, &want->plan);
    }
}

/* What the steps hand to one another. */
typedef struct step_buffers {
    clmoe_buf scores, live, plan, xe, ye;
} step_buffers;

/* score, topk, plan; each waits for the event of the one before. */
static void route_by_events(clmoe_layer *layer, const clmoe_forward_args *f, const step_buffers *at,
                            cl_event e[3]) {
    clmoe_score_args score = {.struct_size = sizeof score,
                              .tokens = f->tokens,
                              .weights = f->weights,
                              .x = f->x,
                              .logits = f->logits,
                              .scores = at->scores};
    OK(clmoe_score(layer, test.out_of_order, &score, 0, NULL, &e[0]));
    clmoe_topk_args topk = {.struct_size = sizeof topk,
                            .tokens = f->tokens,
                            .weights = f->weights,
                            .scores = at->scores,
                            .ids = f->ids,
                            .pair_weights = f->pair_weights,
                            .live = at->live};
    OK(clmoe_topk(layer, test.out_of_order, &topk, 1, &e[0], &e[1]));
    clmoe_plan_args plan = {.struct_size = sizeof plan,
                            .tokens = f->tokens,
                            .ids = f->ids,
                            .pair_weights = f->pair_weights,
                            .live = at->live,
                            .token_mask = f->token_mask,
                            .scratch = f->scratch,
                            .plan = at->plan};
    OK(clmoe_plan(layer, test.out_of_order, &plan, 1, &e[1], &e[2]));
}

/* dispatch, experts, combine after `planned`; stats beside them. */
static void compute_by_events(clmoe_layer *layer, const clmoe_forward_args *f,
                              const step_buffers *at, const cl_event *planned, cl_event e[4]) {
    clmoe_dispatch_args dispatch = {sizeof dispatch, f->tokens, f->x, at->plan, at->xe};
    OK(clmoe_dispatch(layer, test.out_of_order, &dispatch, 1, planned, &e[0]));
    clmoe_experts_args experts = {.struct_size = sizeof experts,
                                  .tokens = f->tokens,
                                  .weights = f->weights,
                                  .xe = at->xe,
                                  .pair_weights = f->pair_weights,
                                  .plan = at->plan,
                                  .scratch = f->scratch,
                                  .ye = at->ye};
    OK(clmoe_experts(layer, test.out_of_order, &experts, 1, &e[0], &e[1]));
    clmoe_combine_args combine = {.struct_size = sizeof combine,
                                  .tokens = f->tokens,
                                  .weights = f->weights,
                                  .x = f->x,
                                  .ye = at->ye,
                                  .pair_weights = f->pair_weights,
                                  .plan = at->plan,
                                  .token_mask = f->token_mask,
                                  .residual = f->residual,
                                  .y = f->y};
    OK(clmoe_combine(layer, test.out_of_order, &combine, 1, &e[1], &e[2]));
    clmoe_stats_args stats = {.struct_size = sizeof stats,
                              .tokens = f->tokens,
                              .logits = f->logits,
                              .ids = f->ids,
                              .pair_weights = f->pair_weights,
                              .plan = at->plan,
                              .live = at->live,
                              .token_mask = f->token_mask,
                              .scratch = f->scratch,
                              .stats = f->stats};
    OK(clmoe_stats_compute(layer, test.out_of_order, &stats, 1, planned, &e[3]));
}

/* The steps one by one on an out-of-order queue. */
static void steps_by_events(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        batch b;
        device_batch d;
        test_case("engine %s", engines[n]);
        rich_batch(&b, engines[n], small.tokens, 1);
        b.desc.shared.hidden_dim = 0;
        b.desc.shared_gate = 0;
        const ref_result *want = batch_reference(&b);
        clmoe_layer *layer = test_layer(0, &b.desc);
        batch_upload(layer, &b, &d);
        clmoe_plan_layout layout;
        OK(clmoe_plan_layout_get(layer, small.tokens, &layout));
        size_t T = small.tokens, R = ref_columns(&b.desc), rows = (size_t)layout.slots * small.dim;
        step_buffers at = {.scores = buf_new(T * R * 4),
                           .live = buf_new(T * 4),
                           .plan = buf_new(layout.bytes),
                           .xe = buf_new(rows * 4),
                           .ye = buf_new(rows * 4)};
        cl_event e[7] = {NULL};
        route_by_events(layer, &d.args, &at, e);
        compute_by_events(layer, &d.args, &at, &e[2], e + 3);
        CL_OK(clFlush(test.out_of_order));
        for (size_t i = 0; i < COUNT_OF(e); i++)
            check_complete(e[i]);
        batch_compare(&b, &d, want);
    }
}

/*
 * With a wait list that cannot complete before the call has returned, a call that blocked would
 * never return; and nothing may have run when it does.
 */
static void never_blocks(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (int q = 0; q < 2 && !blocks(engines[n]); q++) {
            batch b;
            device_batch d;
            cl_int code = CL_SUCCESS, status = -1;
            cl_event event = NULL, gate;
            test_case("engine %s, queue %d", engines[n], q);
            rich_batch(&b, engines[n], small.tokens, 1);
            const ref_result *want = batch_reference(&b);
            clmoe_layer *layer = test_layer(0, &b.desc);
            batch_upload(layer, &b, &d);
            gate = clCreateUserEvent(test.context, &code);
            CL_OK(code);
            cl_command_queue queue = q ? test.out_of_order : test.queue;
            OK(clmoe_forward(layer, queue, &d.args, 1, &gate, &event));
            CL_OK(clFlush(queue));
            CL_OK(clGetEventInfo(event, CL_EVENT_COMMAND_EXECUTION_STATUS, sizeof status, &status,
                                 NULL));
            bool waits = status == CL_QUEUED || status == CL_SUBMITTED;
            CL_OK(clSetUserEventStatus(gate, CL_COMPLETE));
            CHECK(waits, "the event's status is %d before its wait list\n", status);
            check_complete(event);
            clReleaseEvent(gate);
            batch_compare(&b, &d, want);
        }
}

/* ---- Memory -------------------------------------------------------------------------------- */

/* Inputs are not written, and what scratch and the outputs held before does not matter. */
static void inputs_stay_and_scratch_is_free(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        batch b;
        device_batch d;
        test_case("engine %s", engines[n]);
        rich_batch(&b, engines[n], small.tokens, 1);
        clmoe_layer *layer = test_layer(0, &b.desc);
        batch_run(layer, &b, &d);
        size_t rows = (size_t)small.tokens * small.dim * 4;
        void *y = buf_get(d.args.y);
        compare_bits("x", buf_get(d.args.x), b.in.x, rows);
        compare_bits("residual", buf_get(d.args.residual), b.in.residual, rows);
        compare_bits("token_mask", buf_get(d.args.token_mask), b.in.token_mask, small.tokens);
        compare_bits("weights.router", buf_get(d.weights.router), b.weights.router,
                     (size_t)ref_columns(&b.desc) * small.dim * 4);
        compare_bits("weights.experts.down", buf_get(d.weights.experts.down),
                     b.weights.experts.down,
                     (size_t)small.experts * small.dim * small.hidden_dim * 4);
        size_t saved, bytes;
        OK(clmoe_layer_memory(layer, small.tokens, &saved, &bytes));
        unsigned char *junk = HOST(unsigned char, bytes);
        for (size_t i = 0; i < bytes; i++)
            junk[i] = (unsigned char)random_below(256);
        buf_write(d.args.scratch, junk, bytes);
        buf_poison(d.args.y);
        OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
        compare_bits("y", buf_get(d.args.y), y, rows);
    }
}

/* y may be residual. */
static void y_is_residual(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        batch b;
        device_batch d;
        test_case("engine %s", engines[n]);
        rich_batch(&b, engines[n], small.tokens, 1);
        const ref_result *want = batch_reference(&b);
        clmoe_layer *layer = test_layer(0, &b.desc);
        batch_upload(layer, &b, &d);
        d.args.y = d.args.residual;
        OK(clmoe_forward(layer, test.queue, &d.args, 0, NULL, NULL));
        batch_compare(&b, &d, want);
    }
}

/* A place for `bytes` in one common buffer, behind the others and at an odd multiple of 4. */
static clmoe_buf place(cl_mem mem, size_t *used, clmoe_buf from) {
    size_t bytes = 0;
    if (from.mem == NULL)
        return from;
    CL_OK(clGetMemObjectInfo(from.mem, CL_MEM_SIZE, sizeof bytes, &bytes, NULL));
    bytes -= from.offset;
    clmoe_buf to = {mem, *used};
    *used += (bytes + 7) / 8 * 8;
    if (mem != NULL)
        CL_OK(clEnqueueCopyBuffer(test.queue, from.mem, mem, from.offset, to.offset, bytes, 0, NULL,
                                  NULL));
    return to;
}

/* Puts every buffer of the arguments into `mem` from `base` on; with NULL, only counts. */
static size_t place_all(cl_mem mem, size_t base, clmoe_forward_args *args, clmoe_weights *weights) {
    clmoe_buf *bufs[] = {&args->x,
                         &args->token_mask,
                         &args->residual,
                         &args->scratch,
                         &args->y,
                         &args->logits,
                         &args->ids,
                         &args->pair_weights,
                         &args->stats,
                         &weights->router,
                         &weights->select_bias,
                         &weights->experts.gate,
                         &weights->experts.down,
                         &weights->experts.down_bias,
                         &weights->shared.gate,
                         &weights->shared.down,
                         &weights->shared_gate,
                         &weights->output_bias};
    size_t used = base;
    for (size_t i = 0; i < COUNT_OF(bufs); i++)
        *bufs[i] = place(mem, &used, *bufs[i]);
    return used;
}

/* All arrays in one buffer, told apart by their offsets. */
static void one_buffer_for_all(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        batch b;
        device_batch d;
        test_case("engine %s", engines[n]);
        rich_batch(&b, engines[n], small.tokens, 1);
        clmoe_layer *layer = test_layer(0, &b.desc);
        batch_run(layer, &b, &d);
        clmoe_weights weights = d.weights;
        clmoe_forward_args args = d.args;
        size_t bytes = place_all(NULL, 0, &args, &weights);
        weights = d.weights;
        args = d.args;
        clmoe_buf all = buf_new(bytes);
        place_all(all.mem, all.offset, &args, &weights);
        args.weights = &weights;
        size_t rows = (size_t)small.tokens * small.dim;
        float *y = HOST(float, rows);
        OK(clmoe_forward(layer, test.queue, &args, 0, NULL, NULL));
        buf_read(args.y, y, rows * 4);
        compare_bits("y", y, buf_get(d.args.y), rows * 4);
    }
}

/* ---- Same bits ----------------------------------------------------------------------------- */

/* Everything a forward yields, for comparing bits. */
typedef struct outputs {
    void *y, *logits, *ids, *weights, *stats;
} outputs;

static outputs outputs_of(const device_batch *d) {
    return (outputs){buf_get(d->args.y), buf_get(d->args.logits), buf_get(d->args.ids),
                     buf_get(d->args.pair_weights), buf_get(d->args.stats)};
}

static void compare_routing(const batch *b, const outputs *got, const outputs *want) {
    size_t T = b->in.tokens, R = ref_columns(&b->desc), pairs = T * b->desc.top_k;
    compare_bits("logits", got->logits, want->logits, T * R * 4);
    compare_bits("ids", got->ids, want->ids, pairs * 4);
    compare_bits("weights", got->weights, want->weights, pairs * 4);
    compare_bits("stats", got->stats, want->stats, sizeof(clmoe_stats) + 8 * R * 4);
}

static void twenty_runs(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const uint32_t tokens[] = {1, 65, 700};
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t i = 0; i < COUNT_OF(tokens); i++) {
            batch b;
            device_batch d;
            const uint32_t T = tokens[i], group_size = group_sizes[(i + 1) % COUNT_OF(group_sizes)];
            test_case("engine %s, group size %u, T %u", engines[n], group_size, T);
            rich_batch(&b, engines[n], T, 1);
            clmoe_layer *layer = test_layer(group_size, &b.desc);
            batch_run(layer, &b, &d);
            outputs first = outputs_of(&d);
            for (int run = 1; run < 20; run++) {
                buf_poison(d.args.y);
                buf_poison(d.args.scratch);
                cl_command_queue queue = run % 2 ? test.out_of_order : test.queue;
                OK(clmoe_forward(layer, queue, &d.args, 0, NULL, NULL));
                CL_OK(clFinish(queue));
                outputs again = outputs_of(&d);
                compare_routing(&b, &again, &first);
                compare_bits("y", again.y, first.y, (size_t)T * b.desc.dim * 4);
            }
        }
}

/* A batch of training: noise from a state, places by priority, losses and their gradients, in bf16.
 */
static void training_batch(batch *b, const char *engine, bool reroute) {
    const shape s = {65, 21, 12, 0, 3, 19};
    clmoe_layer_desc desc = desc_of(&s);
    desc.engine = engine;
    desc.type = desc.weight_type = CLMOE_BF16;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.router.noise.kind = CLMOE_NOISE_LEARNED;
    desc.router.noise.jitter = 0.01f;
    desc.capacity.factor = 0.8;
    desc.capacity.keep = CLMOE_KEEP_PRIORITY;
    desc.capacity.overflow = reroute ? CLMOE_OVERFLOW_REROUTE : CLMOE_OVERFLOW_DROP;
    seed_set(1);
    batch_make(b, &desc, s.tokens);
    b->in.token_mask = random_mask(s.tokens);
}

static const clmoe_loss_desc training_losses[] = {
    {.kind = CLMOE_LOSS_SWITCH, .weight = 0.5f, .f_source = CLMOE_F_FRESH, .controlled = 1},
    {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS},
    {.kind = CLMOE_LOSS_SMOOTH_LOAD, .weight = 1.0f},
};

static void training_upload(clmoe_layer *layer, const batch *b, device_batch *d) {
    size_t R = ref_columns(&b->desc), logits = (size_t)b->in.tokens * R * 4;
    batch_upload(layer, b, d);
    d->weights.noise_router = buf_of(random_floats(R * b->desc.dim, 0.4), R * b->desc.dim * 4);
    d->args.state = buf_of(random_state_of(&b->desc), sizeof(clmoe_state) + 20 * R);
    d->args.losses = training_losses;
    d->args.num_losses = COUNT_OF(training_losses);
    d->args.loss_values = buf_new(sizeof training_losses / sizeof training_losses[0] * 4);
    d->args.dlogits = buf_new(logits);
    d->args.dnoise = buf_new(logits);
}

enum { TRAINING_OUTPUTS = 8 };

/* Runs it from poison, and from gradients of zeros; the bits of all that comes out. */
static void training_run(clmoe_layer *layer, const batch *b, device_batch *d,
                         cl_command_queue queue, void *out[TRAINING_OUTPUTS]) {
    const clmoe_forward_args *a = &d->args;
    const clmoe_buf bufs[TRAINING_OUTPUTS] = {a->y,     a->logits,      a->ids,     a->pair_weights,
                                              a->stats, a->loss_values, a->dlogits, a->dnoise};
    const size_t logits = (size_t)b->in.tokens * ref_columns(&b->desc);
    for (size_t i = 0; i < TRAINING_OUTPUTS; i++)
        buf_poison(bufs[i]);
    buf_poison(a->scratch);
    buf_write(a->dlogits, HOST(float, logits), logits * 4);
    buf_write(a->dnoise, HOST(float, logits), logits * 4);
    OK(clmoe_forward(layer, queue, a, 0, NULL, NULL));
    CL_OK(clFinish(queue));
    for (size_t i = 0; i < TRAINING_OUTPUTS; i++)
        out[i] = buf_get(bufs[i]);
}

static void twenty_training_runs(void **state) {
    (void)state;
    static const char *const names[TRAINING_OUTPUTS] = {
        "y", "logits", "ids", "weights", "stats", "loss_values", "dlogits", "dnoise"};
    const char *const *engines = test_engines_of(CLMOE_BF16, CLMOE_BF16);
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
            batch b;
            device_batch d;
            void *first[TRAINING_OUTPUTS], *again[TRAINING_OUTPUTS];
            test_case("engine %s, group size %u", engines[n], group_sizes[g]);
            training_batch(&b, engines[n], (n + g) % 2 == 1);
            clmoe_layer *layer = test_layer(group_sizes[g], &b.desc);
            training_upload(layer, &b, &d);
            const size_t T = b.in.tokens, logits = T * ref_columns(&b.desc) * 4;
            const size_t pairs = T * b.desc.top_k * 4;
            const size_t bytes[TRAINING_OUTPUTS] = {T * b.desc.dim * 2, logits, pairs,  pairs,
                                                    stats_size(layer),  12,     logits, logits};
            training_run(layer, &b, &d, test.queue, first);
            for (int run = 1; run < 20; run++) {
                training_run(layer, &b, &d, run % 2 ? test.out_of_order : test.queue, again);
                for (size_t i = 0; i < TRAINING_OUTPUTS; i++)
                    compare_bits(names[i], again[i], first[i], bytes[i]);
            }
            const float *values = first[5], *dlogits = first[6], *dnoise = first[7];
            double sizes[2] = {0.0, 0.0};
            for (size_t i = 0; i < logits / 4; i++) {
                sizes[0] += fabs((double)dlogits[i]);
                sizes[1] += fabs((double)dnoise[i]);
            }
            CHECK(values[0] > 0 && sizes[0] > 0 && sizes[1] > 0, "no losses, or no gradients\n");
        }
}

/* The choice does not depend on the engine that runs the experts. */
static void same_choice_for_every_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    test_case("all engines");
    outputs first = {0};
    for (size_t n = 0; engines[n] != NULL; n++) {
        batch b;
        device_batch d;
        clmoe_layer_desc desc = rich_desc(engines[n]);
        seed_set(1);
        batch_make(&b, &desc, 333);
        b.in.x = random_floats(333 * (size_t)desc.dim, 1.0);
        batch_run(test_layer(0, &desc), &b, &d);
        outputs got = outputs_of(&d);
        if (n == 0)
            first = got;
        compare_routing(&b, &got, &first);
    }
}

/* Nor on the group size of the routing kernels; weights may differ in their last bits. */
static void same_choice_for_every_group_size(void **state) {
    (void)state;
    test_case("all group sizes");
    outputs first = {0};
    for (size_t g = 0; g < COUNT_OF(group_sizes); g++) {
        batch b;
        device_batch d;
        rich_batch(&b, "ref", 333, 1);
        CHECK(batch_reference(&b)->choice_gap > 1e-5, "near ties\n");
        batch_run(test_layer(group_sizes[g], &b.desc), &b, &d);
        outputs got = outputs_of(&d);
        if (g == 0)
            first = got;
        compare_bits("ids", got.ids, first.ids, 333 * (size_t)b.desc.top_k * 4);
    }
}

/* ---- Threads ------------------------------------------------------------------------------- */

enum { THREADS = 2, ROUNDS = 6 };

typedef struct worker {
    clmoe_context *context;
    clmoe_layer_desc desc;
    device_batch d;
    clmoe_status status;
    char error[256];
} worker;

/* Creates a layer and runs it on a queue of its own. */
static void *work(void *argument) {
    worker *w = argument;
    clmoe_layer *layer = NULL;
    cl_int code = CL_SUCCESS;
    cl_command_queue queue = clCreateCommandQueue(test.context, test.device, 0, &code);
    w->status = code;
    if (w->status == CLMOE_SUCCESS)
        w->status = clmoe_layer_create(w->context, &w->desc, &layer);
    if (w->status == CLMOE_SUCCESS)
        w->status = clmoe_forward(layer, queue, &w->d.args, 0, NULL, NULL);
    if (w->status == CLMOE_SUCCESS)
        w->status = clFinish(queue);
    strncpy(w->error, clmoe_last_error(), sizeof w->error - 1);
    clmoe_layer_destroy(layer);
    if (queue != NULL)
        clReleaseCommandQueue(queue);
    return NULL;
}

/* One round: threads that start cold on one new context, on the same layer or on different ones. */
static void check_threads(const char *engine, bool same) {
    batch b[THREADS];
    worker w[THREADS];
    pthread_t threads[THREADS];
    const ref_result *want[THREADS];
    clmoe_context *context = NULL;
    OK(clmoe_context_create(test.context, test.device, NULL, &context));
    memset(w, 0, sizeof w);
    for (size_t i = 0; i < THREADS; i++) {
        rich_batch(&b[i], engine, small.tokens, i + 1);
        if (i > 0 && !same)
            b[i].desc.capacity.keep = CLMOE_KEEP_CHOICE_MAJOR;
        want[i] = batch_reference(&b[i]);
        batch_upload(test_layer(0, &b[i].desc), &b[i], &w[i].d);
        w[i].context = context;
        w[i].desc = b[i].desc;
    }
    for (size_t i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, work, &w[i]), 0);
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    clmoe_context_destroy(context);
    for (size_t i = 0; i < THREADS; i++) {
        CHECK(w[i].status == CLMOE_SUCCESS, "thread %zu: %s\n", i, w[i].error);
        batch_compare(&b[i], &w[i].d, want[i]);
    }
}

static void two_threads_cold(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++)
        for (int round = 0; round < ROUNDS; round++) {
            test_case("engine %s, round %d", engines[n], round);
            check_threads(engines[n], round % 2 == 0);
        }
}

/* Each thread has its own sentence. */
static void *fail_elsewhere(void *text) {
    clmoe_layer *layer = NULL;
    clmoe_layer_create(NULL, NULL, &layer);
    strncpy(text, clmoe_last_error(), 255);
    return NULL;
}

static void last_error_is_per_thread(void **state) {
    (void)state;
    char other[256] = "";
    pthread_t thread;
    clmoe_layer_desc desc = desc_of(&small);
    clmoe_layer *layer = NULL;
    desc.top_k = 99;
    assert_int_equal(clmoe_layer_create(test_context(0), &desc, &layer), CLMOE_INVALID_DESC);
    assert_int_equal(pthread_create(&thread, NULL, fail_elsewhere, other), 0);
    pthread_join(thread, NULL);
    assert_non_null(strstr(clmoe_last_error(), "99"));
    assert_null(strstr(other, "99"));
    assert_true(strlen(other) > 0);
}

/* A context and whether its engines run, a layer and a batch. */
static void *succeed(void *argument) {
    worker *w = argument;
    clmoe_context *context = NULL;
    uint32_t supported = 0;
    w->status = clmoe_context_create(test.context, test.device, NULL, &context);
    for (uint32_t i = 0; clmoe_engine_name(context, i, &supported) != NULL;)
        i++;
    w->context = context;
    if (w->status == CLMOE_SUCCESS)
        work(w);
    clmoe_context_destroy(context);
    return NULL;
}

/* A thread whose calls all succeed has no sentence, though an engine was passed over. */
static void success_leaves_no_error(void **state) {
    (void)state;
    batch b;
    worker w;
    pthread_t thread;
    test_case("any engine");
    memset(&w, 0, sizeof w);
    rich_batch(&b, NULL, small.tokens, 1);
    w.desc = b.desc;
    batch_upload(test_layer(0, &b.desc), &b, &w.d);
    assert_int_equal(pthread_create(&thread, NULL, succeed, &w), 0);
    pthread_join(thread, NULL);
    assert_int_equal(w.status, CLMOE_SUCCESS);
    CHECK(w.error[0] == '\0', "it says: %s\n", w.error);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(events_are_valid),
        TEST(no_tokens_need_no_arrays),
        TEST(steps_by_events),
        TEST(never_blocks),
        TEST(inputs_stay_and_scratch_is_free),
        TEST(y_is_residual),
        TEST(one_buffer_for_all),
        TEST(twenty_runs),
        TEST(twenty_training_runs),
        TEST(same_choice_for_every_engine),
        TEST(same_choice_for_every_group_size),
        TEST(two_threads_cold),
        TEST(last_error_is_per_thread),
        TEST(success_leaves_no_error),
    };
    return RUN(tests);
}
