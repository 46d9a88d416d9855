/*
 * Every call the library makes to OpenCL, and every block of host memory it asks for, made to fail:
 * once and lastingly. The status is right, nothing is left behind, and the same call then works and
 * gives the same bits. With the argument "all" every call of every phase and layer fails, on both
 * kinds of queue, and codes take turns: for a device that costs nothing; with "codes", each with
 * every code. With a number, one OpenCL call in so many fails; without one, few enough for a driver
 * that compiles and computes.
 *
 * Two exemptions. CLBlast: its first calls in a context, which fill its caches, are not swept, and
 * its failures are CLMOE_ENGINE_FAILED. jansson: it takes some of its own shortages of memory for a
 * mistake in the text, and where it has none for an array it goes on without; there only leaks
 * count.
 */
#include "support_files.h"
#include "sweep.h"

#include <dirent.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FEW = 61, FEWER = 4 * FEW, SKIPPED = 77 };

/* ---- What is done --------------------------------------------------------------------------- */

static clmoe_status run_open(rig *r) {
    char path[1024];
    snprintf(path, sizeof path, TEST_DATA "/checkpoints/%s", r->model);
    clmoe_status status = clmoe_checkpoint_open(path, NULL, &r->checkpoint);
    CHECK((status == CLMOE_SUCCESS) == (r->checkpoint != NULL), "a handle of a failed open\n");
    return status;
}

static void undo_open(rig *r) {
    clmoe_checkpoint_close(r->checkpoint);
    r->checkpoint = NULL;
}

/* Every routing kernel takes part: a capacity by weight sorts, and expert outputs are normalised.
 */
static clmoe_status run_describe(rig *r) {
    clmoe_status status = clmoe_checkpoint_layer(r->checkpoint, r->number, &r->desc);
    r->desc.engine = r->engine;
    r->desc.capacity.factor = 1.0;
    r->desc.capacity.keep = CLMOE_KEEP_WEIGHT;
    r->desc.normalize_experts = 1;
    r->desc.training = 1;
    return status;
}

static const char *cache_path;

/* The test's own files and blocks are not to be counted. */
static void empty_cache(void) {
    bool watched = memory_watch(false);
    assert_int_equal(files_teardown(NULL), 0);
    assert_int_equal(files_setup(NULL), 0);
    cache_path = temp_path("programs");
    memory_watch(watched);
}

/* The same with the disk cache of programs, empty or as the run before left it. */
static clmoe_status run_context_with_cache(rig *r) {
    clmoe_context_options options;
    clmoe_context_options_init(&options);
    options.cache_dir = cache_path;
    return clmoe_context_create(test.context, test.device, &options, &r->context);
}

static void context_with_cache(rig *r) {
    OK(run_context_with_cache(r));
}

static void context_with_empty_cache(rig *r) {
    empty_cache();
    context_with_cache(r);
}

static clmoe_status run_upload(rig *r) {
    clmoe_status status = clmoe_checkpoint_upload(r->checkpoint, r->number, &r->desc, test.context,
                                                  test.queue, &r->weights);
    static const clmoe_weights none;
    CHECK(status == CLMOE_SUCCESS || memcmp(&r->weights, &none, sizeof none) == 0,
          "buffers of a failed upload\n");
    return status;
}

static void undo_upload(rig *r) {
    clmoe_weights_release(&r->weights);
}

static clmoe_status run_pack(rig *r) {
    cl_event event = (cl_event)(void *)r; /* anything but NULL */
    if (!r->packed.mem)
        return CLMOE_SUCCESS;
    const clmoe_pack_args args = {.struct_size = sizeof args,
                                  .mlp = CLMOE_MLP_EXPERTS,
                                  .raw = &r->weights.experts,
                                  .packed = r->packed};
    clmoe_status status = clmoe_pack_weights(r->layer, r->queue, &args, 0, NULL, &event);
    return event_is_right(status, event);
}

static clmoe_status run_forward(rig *r) {
    cl_event event = (cl_event)(void *)r;
    clmoe_status status = clmoe_forward(r->layer, r->queue, &r->args, 0, NULL, &event);
    return event_is_right(status, event);
}

/* On a queue with profiling; an error leaves no events in the profile. */
static clmoe_status run_profiled_forward(rig *r) {
    cl_event event = (cl_event)(void *)r;
    clmoe_profile profile = {.struct_size = sizeof profile};
    r->args.profile = &profile;
    clmoe_status status = clmoe_forward(r->layer, r->queue, &r->args, 0, NULL, &event);
    r->args.profile = NULL;
    CHECK((status == CLMOE_SUCCESS) == (profile.num_steps > 0),
          "%u steps of a call that gives %s\n", profile.num_steps, clmoe_status_string(status));
    clmoe_profile_release(&profile);
    return event_is_right(status, event);
}

static clmoe_status run_gradients(rig *r) {
    static const clmoe_gradients none;
    clmoe_status status = clmoe_gradients_create(r->layer, &r->gradients);
    CHECK(status == CLMOE_SUCCESS || memcmp(&r->gradients, &none, sizeof none) == 0,
          "gradients of a failed create\n");
    return status;
}

static void undo_gradients(rig *r) {
    clmoe_gradients_release(&r->gradients);
}

static clmoe_status run_backward(rig *r) {
    cl_event event = (cl_event)(void *)r;
    clmoe_status status = clmoe_backward(r->layer, r->queue, &r->back, 0, NULL, &event);
    return event_is_right(status, event);
}

static clmoe_status run_profiled_backward(rig *r) {
    cl_event event = (cl_event)(void *)r;
    clmoe_profile profile = {.struct_size = sizeof profile};
    r->back.profile = &profile;
    clmoe_status status = clmoe_backward(r->layer, r->queue, &r->back, 0, NULL, &event);
    r->back.profile = NULL;
    CHECK((status == CLMOE_SUCCESS) == (profile.num_steps > 0),
          "%u steps of a call that gives %s\n", profile.num_steps, clmoe_status_string(status));
    clmoe_profile_release(&profile);
    return event_is_right(status, event);
}

static clmoe_status run_back_steps(rig *r) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event last = NULL;
    STEP(clmoe_experts_backward, &r->back_steps.experts);
    STEP(clmoe_combine_backward, &r->back_steps.combine);
    STEP(clmoe_shared_expert_backward, &r->back_steps.shared);
    STEP(clmoe_topk_backward, &r->back_steps.topk);
    STEP(clmoe_score_backward, &r->back_steps.score);
    STEP(clmoe_dispatch_backward, &r->back_steps.dispatch);
    clReleaseEvent(last);
    return status;
}

static clmoe_status run_steps(rig *r) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_event last = NULL;
    STEP(clmoe_score, &r->steps.score);
    STEP(clmoe_topk, &r->steps.topk);
    STEP(clmoe_plan, &r->steps.plan);
    STEP(clmoe_replicate, &r->steps.replicate);
    STEP(clmoe_dispatch, &r->steps.dispatch);
    STEP(clmoe_experts, &r->steps.experts);
    STEP(clmoe_shared_expert, &r->steps.shared);
    STEP(clmoe_combine, &r->steps.combine);
    STEP(clmoe_stats_compute, &r->steps.stats);
    clReleaseEvent(last);
    return status;
}

static clmoe_status run_packed_forward(rig *r) {
    if (!r->packed.mem)
        return CLMOE_SUCCESS;
    r->weights.experts.packed = r->packed;
    clmoe_status status = run_forward(r);
    r->weights.experts.packed = (clmoe_buf){NULL, 0};
    return status;
}

/* A call that fails is a batch that fails, and the others are run. */
static clmoe_selftest_summary tested;

static clmoe_status run_selftest(rig *r) {
    clmoe_selftest_options options;
    clmoe_selftest_options_init(&options);
    options.engine = r->engine;
    options.layer = "two levels";
    tested = (clmoe_selftest_summary){.struct_size = sizeof tested};
    return clmoe_selftest(r->context, &options, &tested);
}

/* Nothing of the fault is left; a device that runs no kernels gives other numbers. */
static void compare_selftest(rig *r) {
    (void)r;
    CHECK(tested.passed + tested.differs > 0 && tested.failed == 0, "%u batches failed\n",
          tested.failed);
}

static void poison_outputs(rig *r) {
    const clmoe_buf outputs[] = {r->args.y, r->args.stats, r->args.ids, r->args.logits,
                                 r->args.scratch};
    for (size_t i = 0; i < COUNT_OF(outputs); i++)
        buf_poison(outputs[i]);
}

/* No single step makes the shared expert's rows: combine gets any, so y is another. */
static void compare_steps(rig *r) {
    size_t bytes = (size_t)TOKENS * r->desc.top_k * 4;
    compare_bits("ids", buf_get(r->steps.topk.ids), r->ids, bytes);
}

static void compare_outputs(rig *r) {
    size_t T = TOKENS, R = r->desc.num_experts;
    void *y = malloc(T * r->desc.dim * 4 + T * R * 4);
    assert_non_null(y);
    buf_read(r->args.y, y, T * r->desc.dim * 4);
    compare_bits("y", y, r->y, T * r->desc.dim * 4);
    buf_read(r->args.logits, y, T * R * 4);
    compare_bits("logits", y, r->logits, T * R * 4);
    buf_read(r->args.ids, y, T * r->desc.top_k * 4);
    compare_bits("ids", y, r->ids, T * r->desc.top_k * 4);
    buf_read(r->args.stats, y, stats_size(r->layer));
    compare_bits("stats", y, r->stats, stats_size(r->layer));
    free(y);
}

static void poison_back_outputs(rig *r) {
    buf_poison(r->back.dx);
    buf_poison(r->back.scratch);
}

static void compare_backward(rig *r) {
    const size_t rows = (size_t)TOKENS * r->desc.dim * 4;
    const size_t down = (size_t)r->desc.num_experts * r->desc.dim * r->desc.experts.hidden_dim * 4;
    void *got = malloc(rows + down);
    assert_non_null(got);
    buf_read(r->back.dx, got, rows);
    compare_bits("dx", got, r->dx, rows);
    CL_OK(clEnqueueReadBuffer(test.queue, r->gradients.experts.down.mem, CL_TRUE, 0, down, got, 0,
                              NULL, NULL));
    compare_bits("gradients.experts.down", got, r->down, down);
    free(got);
}

static const phase phases[] = {
    {"open", NO_QUEUE, NULL, run_open, NULL, undo_open, NULL},
    {"describe", NO_QUEUE, NULL, run_describe, NULL, NULL, NULL},
    {"context", NO_QUEUE, NULL, run_context, NULL, undo_context, NULL},
    {"context with cache", NO_QUEUE, NULL, run_context_with_cache, NULL, undo_context, NULL},
    {"layer", NO_QUEUE, fresh_context, run_layer, NULL, undo_layer, NULL},
    {"layer, empty cache", MAY_SUCCEED | NO_QUEUE, context_with_empty_cache, run_layer, NULL,
     undo_layer, NULL},
    {"layer, cache", MAY_SUCCEED | NO_QUEUE, context_with_cache, run_layer, NULL, undo_layer, NULL},
    {"upload", NO_QUEUE, NULL, run_upload, NULL, undo_upload, NULL},
    {"pack", 0, NULL, run_pack, NULL, NULL, NULL},
    {"forward", NO_BLOCKS | LIGHT, poison_outputs, run_forward, compare_outputs, NULL, NULL},
    {"forward, profile", NO_BLOCKS | LIGHT, poison_outputs, run_profiled_forward, compare_outputs,
     NULL, NULL},
    {"steps", NO_BLOCKS | LIGHT, poison_outputs, run_steps, compare_steps, NULL, NULL},
    {"gradients", NO_BLOCKS | NO_QUEUE, NULL, run_gradients, NULL, undo_gradients, NULL},
    {"backward", NO_BLOCKS | LIGHT, poison_back_outputs, run_backward, compare_backward, NULL,
     NULL},
    {"backward, profile", NO_BLOCKS | LIGHT, poison_back_outputs, run_profiled_backward,
     compare_backward, NULL, NULL},
    {"steps backward", NO_BLOCKS | LIGHT, poison_back_outputs, run_back_steps, compare_backward,
     NULL, NULL},
    {"forward, packed", NO_BLOCKS | LIGHT, poison_outputs, run_packed_forward, NULL, NULL, NULL},
    {"selftest", MAY_SUCCEED | NO_QUEUE, fresh_context, run_selftest, compare_selftest,
     undo_context, NULL},
};

static void make_arguments(rig *r) {
    size_t T = TOKENS, D = r->desc.dim, saved = 0, scratch = 0;
    OK(clmoe_layer_memory(r->layer, TOKENS, &saved, &scratch));
    clmoe_forward_args_init(&r->args);
    r->args.tokens = TOKENS;
    seed_set(5);
    r->args.x = buf_of(random_floats(T * D, 1.0), T * D * 4);
    r->args.residual = buf_of(random_floats(T * D, 1.0), T * D * 4);
    r->args.token_mask = buf_of(random_mask(TOKENS), T);
    r->args.saved = buf_new(saved);
    r->args.scratch = buf_new(scratch);
    r->args.y = buf_new(T * D * 4);
    r->args.logits = buf_new(T * r->desc.num_experts * 4);
    r->args.ids = buf_new(T * r->desc.top_k * 4);
    r->args.stats = buf_new(stats_size(r->layer));
}

static clmoe_buf z_of(const rig *r, clmoe_mlp mlp) {
    size_t bytes = 0;
    OK(clmoe_z_size(r->layer, TOKENS, mlp, &bytes));
    return buf_new(bytes);
}

/* Each expert has one copy, in its own slot. */
static clmoe_replicate_args replicate_of(const rig *r) {
    const uint32_t E = r->desc.num_experts;
    const size_t pairs = (size_t)TOKENS * r->desc.top_k;
    int32_t *copies = HOST(int32_t, E), *slots = HOST(int32_t, E);
    for (uint32_t e = 0; e < E; e++) {
        copies[e] = 1;
        slots[e] = (int32_t)e;
    }
    return (clmoe_replicate_args){.struct_size = sizeof(clmoe_replicate_args),
                                  .tokens = TOKENS,
                                  .replicas = E,
                                  .max_copies = 1,
                                  .ids = r->steps.plan.ids,
                                  .plan = r->steps.plan.plan,
                                  .copies = buf_of(copies, E * 4),
                                  .logical_to_physical = buf_of(slots, E * 4),
                                  .physical_ids = buf_new(pairs * 4)};
}

/* The steps, each on what the one before made, and with its own buffers between them. */
static void make_steps(rig *r) {
    const size_t T = TOKENS, D = r->desc.dim, R = r->desc.num_experts, K = r->desc.top_k;
    const clmoe_buf x = r->args.x, scratch = r->args.scratch, weights = buf_new(T * K * 4);
    const clmoe_buf scores = buf_new(T * R * 4), ids = buf_new(T * K * 4), live = buf_new(T * 4);
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(r->layer, TOKENS, &layout));
    const clmoe_buf plan = buf_new(layout.bytes), xe = buf_new(layout.slots * D * 4);
    const clmoe_buf ye = buf_new(layout.slots * D * 4);
#define HEAD(type) .struct_size = sizeof(type), .tokens = TOKENS
    r->steps.score = (clmoe_score_args){HEAD(clmoe_score_args), .x = x, .logits = r->args.logits,
                                        .scores = scores};
    r->steps.topk = (clmoe_topk_args){HEAD(clmoe_topk_args), .scores = scores, .ids = ids,
                                      .pair_weights = weights, .live = live};
    r->steps.plan = (clmoe_plan_args){HEAD(clmoe_plan_args),
                                      .ids = ids,
                                      .pair_weights = weights,
                                      .live = live,
                                      .token_mask = r->args.token_mask,
                                      .scratch = scratch,
                                      .plan = plan};
    r->steps.replicate = replicate_of(r);
    r->steps.dispatch =
        (clmoe_dispatch_args){HEAD(clmoe_dispatch_args), .x = x, .plan = plan, .xe = xe};
    r->steps.experts = (clmoe_experts_args){
        HEAD(clmoe_experts_args), .xe = xe, .pair_weights = weights,        .plan = plan,
        .scratch = scratch,       .ye = ye, .z = z_of(r, CLMOE_MLP_EXPERTS)};
    r->steps.shared = (clmoe_shared_expert_args){HEAD(clmoe_shared_expert_args),
                                                 .x = x,
                                                 .scratch = scratch,
                                                 .shared = buf_new(T * D * 4),
                                                 .shared_gate = buf_new(T * 4),
                                                 .z = z_of(r, CLMOE_MLP_SHARED)};
    r->steps.combine = (clmoe_combine_args){
        HEAD(clmoe_combine_args),         .ye = ye,
        .pair_weights = weights,          .plan = plan,
        .shared = r->steps.shared.shared, .shared_gate = r->steps.shared.shared_gate,
        .residual = r->args.residual,     .y = r->args.y};
    r->steps.stats =
        (clmoe_stats_args){HEAD(clmoe_stats_args), .ids = ids,         .plan = plan,
                           .live = live,           .scratch = scratch, .stats = r->args.stats};
}

static void make_backward(rig *r) {
    const size_t T = TOKENS, D = r->desc.dim;
    clmoe_backward_args_init(&r->back);
    r->back.tokens = TOKENS;
    r->back.x = r->args.x;
    r->back.token_mask = r->args.token_mask;
    r->back.saved = r->args.saved;
    r->back.scratch = r->args.scratch;
    r->back.dy = buf_of(random_floats(T * D, 1.0), T * D * 4);
    r->back.dx = buf_new(T * D * 4);
}

/* The same by steps, on what the steps forward left. */
static void make_back_steps(rig *r) {
    const size_t T = TOKENS, D = r->desc.dim, R = r->desc.num_experts;
    const clmoe_backward_args *a = &r->back;
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(r->layer, TOKENS, &layout));
    const clmoe_buf dxe = buf_new(layout.slots * D * 4), dots = buf_new(layout.slots * 4);
    const clmoe_buf weights = buf_new(layout.pairs * 4), dlogits = buf_new(T * R * 4);
    const clmoe_buf shared_dx = buf_new(T * D * 4), router_dx = buf_new(T * D * 4);
    const clmoe_buf ids = r->steps.topk.ids, plan = r->steps.plan.plan;
#define BACK(type, ...) (type){HEAD(type), __VA_ARGS__}
    r->back_steps.experts =
        BACK(clmoe_experts_backward_args, .x = a->x, .pair_weights = r->steps.topk.pair_weights,
             .plan = plan, .z = r->steps.experts.z, .dy = a->dy, .scratch = a->scratch, .dxe = dxe,
             .dots = dots);
    r->back_steps.combine =
        BACK(clmoe_combine_backward_args, .ids = ids, .plan = plan, .token_mask = a->token_mask,
             .dy = a->dy, .dots = dots, .dpair_weights = weights);
    r->back_steps.shared =
        BACK(clmoe_shared_expert_backward_args, .x = a->x, .token_mask = a->token_mask,
             .shared_gate = r->steps.shared.shared_gate, .z = r->steps.shared.z, .dy = a->dy,
             .scratch = a->scratch, .shared_dx = shared_dx);
    r->back_steps.topk =
        BACK(clmoe_topk_backward_args, .logits = r->steps.score.logits, .ids = ids,
             .live = r->steps.topk.live, .plan = plan, .token_mask = a->token_mask,
             .dpair_weights = weights, .scratch = a->scratch, .dlogits_out = dlogits);
    r->back_steps.score = BACK(clmoe_score_backward_args, .x = a->x, .token_mask = a->token_mask,
                               .dlogits = dlogits, .scratch = a->scratch, .router_dx = router_dx);
    r->back_steps.dispatch =
        BACK(clmoe_dispatch_backward_args, .plan = plan, .token_mask = a->token_mask, .dxe = dxe,
             .shared_dx = shared_dx, .router_dx = router_dx, .dx = a->dx);
}

/* Copies of a rig have weights and gradients of their own. */
static void point_at_weights(rig *r) {
    r->args.weights = r->steps.score.weights = r->steps.topk.weights = &r->weights;
    r->steps.experts.weights = r->steps.combine.weights = r->steps.shared.weights = &r->weights;
    r->back.weights = r->back_steps.experts.weights = r->back_steps.shared.weights = &r->weights;
    r->back_steps.topk.weights = r->back_steps.score.weights = &r->weights;
    r->back.gradients = r->back_steps.experts.gradients = &r->gradients;
    r->back_steps.shared.gradients = r->back_steps.score.gradients = &r->gradients;
}

static void *down_gradient(const rig *r) {
    const size_t n = (size_t)r->desc.num_experts * r->desc.dim * r->desc.experts.hidden_dim;
    float *values = HOST(float, n);
    CL_OK(clEnqueueReadBuffer(test.queue, r->gradients.experts.down.mem, CL_TRUE, 0,
                              n * sizeof *values, values, 0, NULL, NULL));
    return values;
}

/* Does everything once without a fault, which also fills the caches of driver and CLBlast. */
static void rig_make(rig *r, const char *engine, cl_command_queue queue) {
    size_t packed = 0;
    *r = (rig){.engine = engine, .model = "qwen2_moe", .queue = queue};
    OK(run_open(r));
    OK(run_describe(r));
    OK(run_context(r));
    OK(run_layer(r));
    OK(run_upload(r));
    if (clmoe_packed_size(r->layer, CLMOE_MLP_EXPERTS, &packed) == CLMOE_SUCCESS)
        r->packed = buf_new(packed);
    make_arguments(r);
    make_steps(r);
    make_backward(r);
    make_back_steps(r);
    OK(run_gradients(r));
    point_at_weights(r);
    OK(run_pack(r));
    OK(run_forward(r));
    OK(run_steps(r));
    OK(run_forward(r));
    OK(run_backward(r));
    CL_OK(clFinish(queue));
    r->dx = buf_get(r->back.dx);
    r->down = down_gradient(r);
    r->y = buf_get(r->args.y);
    r->stats = buf_get(r->args.stats);
    r->ids = buf_get(r->args.ids);
    r->logits = buf_get(r->args.logits);
}

static void rig_release(rig *r) {
    undo_gradients(r);
    undo_layer(r);
    undo_upload(r);
    undo_open(r);
}

/* Of the same kind as `queue`, with profiling. */
static cl_command_queue profiling_queue(cl_command_queue queue) {
    cl_int code = CL_SUCCESS;
    cl_command_queue_properties properties = 0;
    CL_OK(clGetCommandQueueInfo(queue, CL_QUEUE_PROPERTIES, sizeof properties, &properties, NULL));
    properties |= CL_QUEUE_PROFILING_ENABLE;
    queue = clCreateCommandQueue(test.context, test.device, properties, &code);
    CL_OK(code);
    return queue;
}

/* What a phase makes is swept after it was undone, and made again for the phases after it. */
static void sweep_phases(rig *r, const source *from) {
    for (size_t i = 0; i < COUNT_OF(phases); i++) {
        const phase *p = &phases[i];
        /*
         * Weights, contexts and checkpoints do not depend on the engine; nor does the cache, which
         * is below program_kernel(), all that an engine sees of it.
         */
        bool packs = p->run == run_pack || p->run == run_packed_forward;
        bool profiles = p->run == run_profiled_forward || p->run == run_profiled_backward;
        bool back = p->run == run_backward || p->run == run_back_steps;
        bool layers = p->run == run_layer && (p->before == fresh_context || every_code);
        bool by_engine =
            packs || profiles || back || layers || p->run == run_forward || p->run == run_steps;
        if ((packs && !r->packed.mem) || (p->traits & MAY_SUCCEED && !everything) ||
            !phase_has_queue(r, p) || (!by_engine && strcmp(r->engine, "ref") != 0))
            continue;
        rig own = *r;
        point_at_weights(&own);
        if (p->undo == undo_open)
            own.checkpoint = NULL;
        if (p->undo == undo_upload)
            own.weights = (clmoe_weights){0};
        if (p->undo == undo_gradients)
            own.gradients = (clmoe_gradients){0};
        if (p->undo == undo_context || p->undo == undo_layer)
            own.context = NULL;
        if (p->undo == undo_layer)
            own.layer = NULL;
        if (profiles)
            own.queue = profiling_queue(r->queue);
        const unsigned kept = one_in;
        if (p->run == run_selftest)
            one_in = FEW; /* its thousands of calls are alike */
        else if (p->run == run_layer && one_in == FEW)
            one_in = FEWER; /* each builds a layer's programs twice, and fault_all has every call */
        sweep(&own, p, from);
        one_in = kept;
        if (profiles)
            clReleaseCommandQueue(own.queue);
    }
}

static void sweep_engines(const source *from, cl_command_queue queue) {
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        rig r;
        test_case("engine %s without faults", engines[n]);
        rig_make(&r, engines[n], queue);
        sweep_phases(&r, from);
        rig_release(&r);
    }
}

/* The other checkpoints: opened, described and uploaded. */
static void sweep_checkpoint(const source *from, const char *model) {
    rig r = {.engine = "ref", .model = model, .queue = test.queue};
    OK(run_open(&r));
    while (run_describe(&r) != CLMOE_SUCCESS && r.number < 8)
        r.number++; /* the first layers may have no experts */
    OK(run_describe(&r));
    for (size_t i = 0; i < COUNT_OF(phases); i++) {
        const phase *p = &phases[i];
        rig own = r;
        if (p->undo == undo_open)
            own.checkpoint = NULL;
        if (p->run == run_open || p->run == run_describe || p->run == run_upload)
            sweep(&own, p, from);
    }
    undo_open(&r);
}

static void sweep_checkpoints(const source *from) {
    bool watched = memory_watch(false);
    DIR *models = opendir(TEST_DATA "/checkpoints");
    assert_non_null(models);
    for (struct dirent *entry; (entry = readdir(models)) != NULL;)
        if (entry->d_name[0] != '.' && !strchr(entry->d_name, '.')) {
            test_case("model %s without faults", entry->d_name);
            memory_watch(watched);
            sweep_checkpoint(from, entry->d_name);
            memory_watch(false);
        }
    closedir(models);
    memory_watch(watched);
}

static void opencl_calls(void **state) {
    (void)state;
    const source calls = {"OpenCL", opencl->arm, opencl->calls, opencl->failed};
    sweep_engines(&calls, test.queue);
    sweep_balance(&calls, test.queue);
    if (everything) {
        sweep_balance(&calls, test.out_of_order);
        sweep_engines(&calls, test.out_of_order);
        sweep_checkpoints(&calls);
    }
}

/* Placement needs no device, but memory. */
static clmoe_status run_place(rig *r) {
    double load[12];
    int32_t previous[16], slots[16];
    (void)r;
    for (int32_t i = 0; i < 16; i++)
        previous[i] = i % 12;
    for (int e = 0; e < 12; e++)
        load[e] = 1000.0 / (e + 1);
    const clmoe_place_args args = {.struct_size = sizeof args,
                                   .layers = 1,
                                   .experts = 12,
                                   .replicas = 16,
                                   .devices = 8,
                                   .load = load,
                                   .previous = previous,
                                   .physical_to_logical = slots};
    return clmoe_place(&args);
}

static void sweep_place(const source *from) {
    const phase place = {"place", LIGHT, NULL, run_place, NULL, NULL, NULL};
    rig r = {.engine = "none", .model = "no model", .queue = test.queue};
    sweep(&r, &place, from);
}

static void host_blocks(void **state) {
    (void)state;
    memory_watch(true);
    sweep_place(&host_memory);
    sweep_engines(&host_memory, test.queue);
    sweep_balance(&host_memory, test.queue);
    sweep_checkpoints(&host_memory);
    memory_watch(false);
}

/* ---- Without faults: nothing stays of contexts that come and go -------------------------------
 */

static void one_context(const char *engine) {
    const shape s = {TOKENS, 16, 8, 0, 2, 12};
    clmoe_context *context = NULL;
    clmoe_layer *layer = NULL;
    clmoe_layer_desc desc = desc_of(&s);
    batch b;
    device_batch d;
    desc.engine = engine;
    OK(clmoe_context_create(test.context, test.device, NULL, &context));
    OK(clmoe_layer_create(context, &desc, &layer));
    seed_set(5);
    batch_make(&b, &desc, TOKENS);
    batch_run(layer, &b, &d);
    clmoe_layer_destroy(layer);
    clmoe_context_destroy(context);
}

static void contexts_come_and_go(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        test_case("contexts with engine %s", engines[n]);
        const long before = opencl->live();
        for (int i = 0; i < 2; i++) {
            one_context(engines[n]);
            test_case("contexts with engine %s, %d of them gone", engines[n], i + 1);
            CHECK(opencl->live() == before, "%ld objects, not %ld\n", opencl->live(), before);
        }
    }
}

/* ---- Running -------------------------------------------------------------------------------- */

int main(int argc, char **argv) {
    const struct CMUnitTest all[] = {TEST(contexts_come_and_go), TEST(opencl_calls),
                                     TEST(host_blocks)};
    const struct CMUnitTest some[] = {TEST(contexts_come_and_go), TEST(opencl_calls)};
    one_in = FEW;
    every_code = argc > 1 && strcmp(argv[1], "codes") == 0;
    everything = every_code || (argc > 1 && strcmp(argv[1], "all") == 0);
    if (everything)
        one_in = 1;
    else if (argc > 1 && atoi(argv[1]) > 0)
        one_in = (unsigned)atoi(argv[1]);
    if (!load_layer()) {
        printf("skipped: this OpenCL loader takes no layers\n");
        return SKIPPED;
    }
    json_set_alloc_funcs(jansson_malloc, free);
    files_setup(NULL);
    cache_path = temp_path("programs");
    int failed = everything ? RUN(all) : RUN(some);
    files_teardown(NULL);
    printf("%u faults tried\n", tried);
    return failed;
}
