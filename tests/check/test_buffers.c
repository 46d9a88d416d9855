/* buffers: what a memory object given to a call must be: a buffer, of the right flags, apart. */
#include "support.h"

#include <stdio.h>
#include <string.h>

static const shape small = {6, 5, 8, 0, 2, 3};

/* ---- Every buffer of every call -------------------------------------------------------------- */

typedef struct all_args {
    clmoe_forward_args forward;
    clmoe_score_args score;
    clmoe_topk_args topk;
    clmoe_plan_args plan;
    clmoe_renorm_after_drop_args renorm;
    clmoe_jitter_args jitter;
    clmoe_dispatch_args dispatch;
    clmoe_experts_args experts;
    clmoe_shared_expert_args shared;
    clmoe_combine_args combine;
    clmoe_stats_args stats;
    clmoe_loss_args loss;
    struct {
        clmoe_mlp_weights raw;
        clmoe_buf packed;
    } pack;
    struct {
        clmoe_buf state;
    } first_state;
    clmoe_balance_args start, update;
    clmoe_weights weights; /* of all calls */
} all_args;

typedef enum call_id {
    CALL_forward,
    CALL_score,
    CALL_topk,
    CALL_plan,
    CALL_renorm,
    CALL_jitter,
    CALL_dispatch,
    CALL_experts,
    CALL_shared,
    CALL_combine,
    CALL_stats,
    CALL_loss,
    CALL_pack,
    CALL_first_state,
    CALL_start,
    CALL_update,
    CALLS
} call_id;

/* Layers that between them read every field. */
enum {
    USUAL = 1,     /* token choice with reroute, training */
    TWO_LEVEL = 2, /* with external logits */
    CHOICE = 4,    /* experts choose */
    EXTERNAL = 8,  /* external ids */
    PACKED = 16,   /* EXTERNAL, where the device has an engine that packs */
    UNPACKED = 32, /* EXTERNAL elsewhere */
    KINDS = 4,
    ROUTED = USUAL | TWO_LEVEL | CHOICE,
    ANY = ROUTED | EXTERNAL,
};

typedef enum use { READ, WRITE, BOTH } use;

/* A buffer of a call, where the layer is one of `kinds`. */
typedef struct field {
    call_id call;
    int kinds;
    use use;
    const char *name;
    size_t offset; /* in all_args */
} field;

#define ARG(call, kinds, use, field)                                                               \
    { CALL_##call, kinds, use, #field, offsetof(all_args, call.field) }
#define WEIGHT(call, kinds, field)                                                                 \
    { CALL_##call, kinds, READ, "weights." #field, offsetof(all_args, weights.field) }
/* Of an MLP whose layout may be separate. */
#define MLP(call, mlp)                                                                             \
    WEIGHT(call, ROUTED | UNPACKED, mlp.gate), WEIGHT(call, TWO_LEVEL | UNPACKED, mlp.up),         \
        WEIGHT(call, ROUTED | UNPACKED, mlp.down), WEIGHT(call, PACKED, mlp.packed),               \
        WEIGHT(call, ANY, mlp.gate_bias), WEIGHT(call, TWO_LEVEL | EXTERNAL, mlp.up_bias),         \
        WEIGHT(call, ANY, mlp.down_bias)

static const field fields[] = {
    ARG(forward, ANY, READ, x),
    ARG(forward, ANY, READ, token_mask),
    ARG(forward, ANY, READ, residual),
    ARG(forward, TWO_LEVEL, READ, logits_in),
    ARG(forward, EXTERNAL, READ, ids_in),
    ARG(forward, EXTERNAL, READ, pair_weights_in),
    ARG(forward, ROUTED, READ, state),
    ARG(forward, ROUTED, READ, load_target),
    ARG(forward, ROUTED, READ, load_supplied),
    ARG(forward, USUAL, BOTH, saved),
    ARG(forward, ANY, BOTH, scratch),
    ARG(forward, ANY, WRITE, y),
    ARG(forward, ROUTED, WRITE, logits),
    ARG(forward, ANY, WRITE, ids),
    ARG(forward, ANY, WRITE, pair_weights),
    ARG(forward, CHOICE, WRITE, token_offsets),
    ARG(forward, ANY, WRITE, stats),
    ARG(forward, ROUTED, WRITE, loss_values),
    ARG(forward, ROUTED, BOTH, dlogits),
    ARG(forward, ROUTED, BOTH, dnoise),
    ARG(forward, TWO_LEVEL, BOTH, dgroup_logits),
    WEIGHT(forward, USUAL | CHOICE, router),
    WEIGHT(forward, USUAL | CHOICE, router_bias),
    WEIGHT(forward, USUAL | TWO_LEVEL, select_bias),
    WEIGHT(forward, ROUTED, expert_scale),
    WEIGHT(forward, ROUTED, noise_router),
    WEIGHT(forward, TWO_LEVEL, group_router),
    MLP(forward, experts),
    MLP(forward, shared),
    WEIGHT(forward, ANY, shared_gate),
    WEIGHT(forward, ANY, output_bias),

    ARG(score, ROUTED, READ, x),
    ARG(score, TWO_LEVEL, READ, logits_in),
    ARG(score, USUAL | CHOICE, WRITE, logits),
    ARG(score, ROUTED, BOTH, scores),
    ARG(score, ROUTED, READ, state),
    ARG(score, ROUTED, BOTH, scratch),
    WEIGHT(score, USUAL | CHOICE, router),
    WEIGHT(score, USUAL | CHOICE, router_bias),
    WEIGHT(score, ROUTED, noise_router),
    WEIGHT(score, TWO_LEVEL, group_router),

    ARG(topk, ROUTED, READ, scores),
    ARG(topk, ROUTED, BOTH, ids),
    ARG(topk, ROUTED, BOTH, pair_weights),
    ARG(topk, USUAL | TWO_LEVEL, WRITE, live),
    ARG(topk, CHOICE, BOTH, token_offsets),
    ARG(topk, ROUTED, READ, token_mask),
    ARG(topk, ROUTED, READ, state),
    ARG(topk, CHOICE, BOTH, scratch),
    WEIGHT(topk, USUAL | TWO_LEVEL, select_bias),
    WEIGHT(topk, ROUTED, expert_scale),

    ARG(plan, USUAL, BOTH, ids),
    ARG(plan, USUAL, BOTH, pair_weights),
    ARG(plan, USUAL, READ, scores),
    ARG(plan, TWO_LEVEL | CHOICE | EXTERNAL, READ, ids),
    ARG(plan, TWO_LEVEL | CHOICE | EXTERNAL, READ, pair_weights),
    ARG(plan, USUAL | TWO_LEVEL, READ, live),
    ARG(plan, ANY, READ, token_mask),
    ARG(plan, CHOICE | EXTERNAL, READ, token_offsets),
    ARG(plan, ROUTED, READ, state),
    ARG(plan, ANY, BOTH, scratch),
    ARG(plan, ANY, BOTH, plan),
    WEIGHT(plan, USUAL, expert_scale),

    ARG(renorm, TWO_LEVEL, READ, ids),
    ARG(renorm, TWO_LEVEL, BOTH, pair_weights),
    ARG(renorm, TWO_LEVEL, READ, plan),
    WEIGHT(renorm, TWO_LEVEL, expert_scale),

    ARG(jitter, USUAL, READ, x),
    ARG(jitter, USUAL, READ, state),
    ARG(jitter, USUAL, WRITE, jittered),

    ARG(dispatch, ANY, READ, x),
    ARG(dispatch, ANY, READ, plan),
    ARG(dispatch, ANY, WRITE, xe),

    ARG(experts, USUAL, READ, x),
    ARG(experts, ANY, READ, xe),
    ARG(experts, ANY, READ, pair_weights),
    ARG(experts, ANY, READ, plan),
    ARG(experts, ANY, BOTH, scratch),
    ARG(experts, ANY, BOTH, ye),
    MLP(experts, experts),

    ARG(shared, ANY, READ, x),
    ARG(shared, ANY, BOTH, scratch),
    ARG(shared, ANY, BOTH, shared),
    ARG(shared, ANY, WRITE, shared_gate),
    MLP(shared, shared),
    WEIGHT(shared, ANY, shared_gate),

    ARG(combine, ANY, READ, x),
    ARG(combine, ANY, READ, ye),
    ARG(combine, ANY, READ, pair_weights),
    ARG(combine, ANY, READ, plan),
    ARG(combine, ANY, READ, token_mask),
    ARG(combine, CHOICE | EXTERNAL, READ, token_offsets),
    ARG(combine, ANY, READ, shared),
    ARG(combine, ANY, READ, shared_gate),
    ARG(combine, ANY, READ, residual),
    ARG(combine, ANY, WRITE, y),
    WEIGHT(combine, ANY, output_bias),

    ARG(stats, ROUTED, READ, x),
    ARG(stats, ROUTED, READ, logits),
    ARG(stats, ANY, READ, ids),
    ARG(stats, ANY, READ, pair_weights),
    ARG(stats, ANY, READ, plan),
    ARG(stats, USUAL | TWO_LEVEL, READ, live),
    ARG(stats, ANY, READ, token_mask),
    ARG(stats, CHOICE | EXTERNAL, READ, token_offsets),
    ARG(stats, ROUTED, READ, state),
    ARG(stats, ANY, READ, load_target),
    ARG(stats, ANY, BOTH, scratch),
    ARG(stats, ANY, WRITE, stats),
    WEIGHT(stats, ROUTED, noise_router),
    WEIGHT(stats, TWO_LEVEL, group_router),

    ARG(loss, ROUTED, READ, x),
    ARG(loss, ROUTED, READ, logits),
    ARG(loss, ROUTED, READ, ids),
    ARG(loss, ROUTED, READ, pair_weights),
    ARG(loss, ROUTED, READ, plan),
    ARG(loss, USUAL | TWO_LEVEL, READ, live),
    ARG(loss, ROUTED, READ, token_mask),
    ARG(loss, CHOICE, READ, token_offsets),
    ARG(loss, ROUTED, READ, state),
    ARG(loss, ROUTED, READ, load_target),
    ARG(loss, ROUTED, READ, load_supplied),
    ARG(loss, ROUTED, BOTH, scratch),
    ARG(loss, ROUTED, WRITE, values),
    ARG(loss, ROUTED, BOTH, dlogits),
    ARG(loss, ROUTED, BOTH, dnoise),
    ARG(loss, TWO_LEVEL, BOTH, dgroup_logits),
    WEIGHT(loss, ROUTED, noise_router),
    WEIGHT(loss, TWO_LEVEL, group_router),
    WEIGHT(loss, USUAL | CHOICE, expert_scale),

    ARG(pack, PACKED, READ, raw.gate),
    ARG(pack, PACKED, READ, raw.up),
    ARG(pack, PACKED, READ, raw.down),
    ARG(pack, PACKED, WRITE, packed),

    ARG(first_state, ANY, WRITE, state),
    ARG(start, ANY, BOTH, state),
    ARG(update, ANY, BOTH, state),
    ARG(update, ANY, READ, stats),
    ARG(update, ANY, READ, load),
};

/* ---- A layer and its arguments --------------------------------------------------------------- */

typedef struct fixture {
    clmoe_layer *layer;
    int kinds;
    size_t bytes; /* more than any field needs */
    all_args args;
} fixture;

static const clmoe_loss_desc losses[] = {
    {.kind = CLMOE_LOSS_SWITCH, .weight = 1.0f},
    {.kind = CLMOE_LOSS_IMPORTANCE_CV2, .weight = 1.0f, .p_source = CLMOE_P_WEIGHTS},
};

static void lay_out(clmoe_mlp_desc *mlp, clmoe_gate_layout layout) {
    mlp->hidden_dim = small.hidden_dim;
    mlp->gate_layout = layout;
    mlp->gate_up_bias = mlp->down_bias = 1;
}

static bool has_engine(const char *name) {
    const char *const *engines = test_engines();
    while (*engines && strcmp(*engines, name) != 0)
        engines++;
    return *engines != NULL;
}

static clmoe_layer_desc desc_of_kind(int kind) {
    clmoe_layer_desc d = desc_of(&small);
    d.router.bias = d.router.expert_scale = 1;
    d.router.noise.kind = kind == EXTERNAL ? CLMOE_NOISE_NONE : CLMOE_NOISE_LEARNED;
    d.router.select_bias = kind != CHOICE;
    d.shared_gate = d.output_bias = 1;
    lay_out(&d.experts, kind == USUAL || kind == CHOICE ? CLMOE_GATE_CONCAT : CLMOE_GATE_SEPARATE);
    d.shared = d.experts;
    d.training = kind == USUAL;
    d.capacity.factor = kind == USUAL || kind == CHOICE ? 1.0 : 0.0;
    d.router.noise.jitter = kind == USUAL ? 0.1f : 0.0f;
    d.router.renorm.after_drop = kind == TWO_LEVEL;
    if (kind == USUAL)
        d.capacity.overflow = CLMOE_OVERFLOW_REROUTE;
    if (kind == CHOICE)
        d.router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    if (kind == TWO_LEVEL) {
        d.router.groups.two_level = 1;
        d.router.groups.count = 4;
        d.router.groups.topk = 2;
    }
    if (kind == EXTERNAL && has_engine("cpu"))
        d.engine = "cpu";
    return d;
}

static void release(void *mem) {
    clReleaseMemObject(mem);
}

/* Of zeros: ids, offsets and plans that lead nowhere out of range. */
static cl_mem new_mem(cl_context context, cl_mem_flags flags, size_t bytes) {
    cl_int code = CL_SUCCESS;
    cl_mem mem =
        clCreateBuffer(context, flags | CL_MEM_COPY_HOST_PTR, bytes, HOST(char, bytes), &code);
    CL_OK(code);
    clean_later(release, mem);
    return mem;
}

static clmoe_buf *buf_at(fixture *f, const field *of) {
    return (clmoe_buf *)((char *)&f->args + of->offset);
}

/* Another field of the call `after` this one in the table, or NULL. */
static const field *next_field(const fixture *f, call_id call, const field *after) {
    for (const field *at = after ? after + 1 : fields; at < fields + COUNT_OF(fields); at++)
        if (at->call == call && (at->kinds & f->kinds))
            return at;
    return NULL;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t most_bytes(const clmoe_layer *layer) {
    size_t saved = 0, scratch = 0, state = 0;
    clmoe_plan_layout plan;
    OK(clmoe_layer_memory(layer, small.tokens, &saved, &scratch));
    OK(clmoe_state_size(layer, &state));
    OK(clmoe_plan_layout_get(layer, small.tokens, &plan));
    const size_t rows = (size_t)plan.slots * small.dim * 4;
    const size_t matrices = 32 * 32 * small.experts * sizeof(float); /* packed ones, too */
    const size_t most = larger(larger(saved, scratch), larger(plan.bytes, rows));
    return larger(larger(most, matrices), larger(state, stats_size(layer)));
}

#define BEGIN(args, call)                                                                          \
    do {                                                                                           \
        (args)->call.struct_size = sizeof(args)->call;                                             \
        (args)->call.tokens = small.tokens;                                                        \
    } while (0)

/* All that is no buffer. */
static void begin(all_args *a, int kind) {
    const uint32_t num_losses = kind == TWO_LEVEL ? 1 : 2;
    memset(a, 0, sizeof *a);
    a->experts.final_weights = a->combine.final_weights = 1;
    BEGIN(a, forward);
    BEGIN(a, score);
    BEGIN(a, topk);
    BEGIN(a, plan);
    BEGIN(a, renorm);
    BEGIN(a, jitter);
    BEGIN(a, dispatch);
    BEGIN(a, experts);
    BEGIN(a, shared);
    BEGIN(a, combine);
    BEGIN(a, stats);
    BEGIN(a, loss);
    clmoe_balance_args_init(&a->start);
    clmoe_balance_args_init(&a->update);
    a->forward.weights = a->score.weights = a->topk.weights = a->plan.weights = &a->weights;
    a->experts.weights = a->combine.weights = a->stats.weights = a->loss.weights = &a->weights;
    a->renorm.weights = a->shared.weights = &a->weights;
    a->loss.losses = losses;
    a->loss.num_losses = num_losses;
    a->forward.losses = kind == EXTERNAL ? NULL : losses;
    a->forward.num_losses = kind == EXTERNAL ? 0 : num_losses;
}

static void fixture_make(fixture *f, int kind, const char *engine) {
    clmoe_layer_desc desc = desc_of_kind(kind);
    if (engine)
        desc.engine = engine;
    f->layer = test_layer(0, &desc);
    f->kinds = kind;
    if (kind == EXTERNAL)
        f->kinds |= strcmp(desc.engine, "cpu") == 0 ? PACKED : UNPACKED;
    f->bytes = most_bytes(f->layer);
    begin(&f->args, kind);
    for (int call = 0; call < CALLS; call++)
        for (const field *at = NULL; (at = next_field(f, (call_id)call, at));)
            if (!buf_at(f, at)->mem)
                *buf_at(f, at) = (clmoe_buf){new_mem(test.context, CL_MEM_READ_WRITE, f->bytes), 0};
}

#define RUN_CALL(id, function)                                                                     \
    case CALL_##id:                                                                                \
        status = function(f->layer, test.queue, &f->args.id, 0, NULL, NULL);                       \
        break

static clmoe_status run_pack(fixture *f) {
    const clmoe_pack_args args = {.struct_size = sizeof args,
                                  .mlp = CLMOE_MLP_EXPERTS,
                                  .raw = &f->args.pack.raw,
                                  .packed = f->args.pack.packed};
    return clmoe_pack_weights(f->layer, test.queue, &args, 0, NULL, NULL);
}

static clmoe_status run(fixture *f, call_id call) {
    clmoe_status status = CLMOE_SUCCESS;
    switch (call) {
        RUN_CALL(forward, clmoe_forward);
        RUN_CALL(score, clmoe_score);
        RUN_CALL(topk, clmoe_topk);
        RUN_CALL(plan, clmoe_plan);
        RUN_CALL(renorm, clmoe_renorm_after_drop);
        RUN_CALL(jitter, clmoe_jitter);
        RUN_CALL(dispatch, clmoe_dispatch);
        RUN_CALL(experts, clmoe_experts);
        RUN_CALL(shared, clmoe_shared_expert);
        RUN_CALL(combine, clmoe_combine);
        RUN_CALL(stats, clmoe_stats_compute);
        RUN_CALL(loss, clmoe_loss);
        RUN_CALL(start, clmoe_balance_start);
        RUN_CALL(update, clmoe_balance_update);
    case CALL_pack:
        status = run_pack(f);
        break;
    case CALL_first_state:
        status =
            clmoe_state_init(f->layer, test.queue, f->args.first_state.state, 1, 0, NULL, NULL);
        break;
    case CALLS:
        break;
    }
    CL_OK(clFinish(test.queue));
    return status;
}

static void refused(fixture *f, const field *of, const char *why) {
    clmoe_status status = run(f, of->call);
    CHECK(status == CLMOE_INVALID_ARGUMENT, "call %d, %s, %s: %s\n", (int)of->call, of->name, why,
          clmoe_status_string(status));
    CHECK(strstr(clmoe_last_error(), of->name) && strstr(clmoe_last_error(), why),
          "\"%s\" does not say %s and %s\n", clmoe_last_error(), of->name, why);
}

static void taken(fixture *f, const field *of, const char *what) {
    clmoe_status status = run(f, of->call);
    CHECK(status == CLMOE_SUCCESS, "call %d, %s, %s: %s\n", (int)of->call, of->name, what,
          clmoe_last_error());
}

/* Calls check(f, field) of every field of every call of every layer. */
static void every_field(const char *what, void (*check)(fixture *f, const field *of)) {
    for (int kind = 0; kind < KINDS; kind++) {
        fixture f;
        test_case("%s, layer %d", what, kind);
        fixture_make(&f, 1 << kind, NULL);
        for (int call = 0; call < CALLS; call++)
            for (const field *at = NULL; (at = next_field(&f, (call_id)call, at));) {
                const clmoe_buf right = *buf_at(&f, at);
                check(&f, at);
                *buf_at(&f, at) = right;
            }
    }
}

/* ---- Tests ----------------------------------------------------------------------------------- */

static void check_flags(fixture *f, const field *of) {
    clmoe_buf *buf = buf_at(f, of);
    buf->mem = new_mem(test.context, CL_MEM_READ_ONLY, f->bytes);
    if (of->use != READ)
        refused(f, of, "CL_MEM_READ_ONLY");
    else
        taken(f, of, "CL_MEM_READ_ONLY");
    buf->mem = new_mem(test.context, CL_MEM_WRITE_ONLY, f->bytes);
    if (of->use != WRITE)
        refused(f, of, "CL_MEM_WRITE_ONLY");
    else
        taken(f, of, "CL_MEM_WRITE_ONLY");
}

static void flags_of_buffers(void **state) {
    (void)state;
    every_field("flags", check_flags);
}

static cl_mem image;

static void check_image(fixture *f, const field *of) {
    *buf_at(f, of) = (clmoe_buf){image, 0};
    refused(f, of, "no buffer");
}

static void images(void **state) {
    (void)state;
    const cl_image_format format = {CL_RGBA, CL_FLOAT};
    const cl_image_desc desc = {
        .image_type = CL_MEM_OBJECT_IMAGE2D, .image_width = 256, .image_height = 256};
    cl_int code = CL_SUCCESS;
    image = clCreateImage(test.context, CL_MEM_READ_WRITE, &format, &desc, NULL, &code);
    if (code != CL_SUCCESS)
        return; /* the device has none */
    every_field("images", check_image);
    clReleaseMemObject(image);
}

static cl_mem foreign;

static void check_foreign(fixture *f, const field *of) {
    buf_at(f, of)->mem = foreign;
    refused(f, of, "another OpenCL context");
}

static void buffers_of_other_contexts(void **state) {
    (void)state;
    cl_int code = CL_SUCCESS;
    cl_context context = clCreateContext(NULL, 1, &test.device, NULL, NULL, &code);
    CL_OK(code);
    foreign = clCreateBuffer(context, CL_MEM_READ_WRITE, 1 << 20, NULL, &code);
    CL_OK(code);
    every_field("other contexts", check_foreign);
    clReleaseMemObject(foreign);
    clReleaseContext(context);
}

/* y may be residual. */
static bool may_be_same(const field *a, const field *b) {
    return strcmp(a->name, "y") == 0 && strcmp(b->name, "residual") == 0;
}

/* `a` at the place of `b`, in one buffer. */
static void check_overlap(fixture *f, const field *a, const field *b) {
    clmoe_buf *moved = buf_at(f, a);
    const clmoe_buf right = *moved;
    moved->offset = buf_at(f, b)->offset;
    if (may_be_same(a, b)) {
        taken(f, a, "in place");
        moved->offset += 4;
    }
    test_note("%s over %s, call %d, layer %d", a->name, b->name, (int)a->call, f->kinds);
    refused(f, a, "overlaps");
    CHECK(strstr(clmoe_last_error(), b->name), "\"%s\" does not say %s\n", clmoe_last_error(),
          b->name);
    *moved = right;
}

/* Moves all buffers of a call into one, apart. */
static void move_together(fixture *f, call_id call) {
    size_t count = 0;
    for (const field *at = NULL; (at = next_field(f, call, at));)
        buf_at(f, at)->offset = count++ * f->bytes;
    cl_mem one = new_mem(test.context, CL_MEM_READ_WRITE, (count + 1) * f->bytes);
    for (const field *at = NULL; (at = next_field(f, call, at));)
        buf_at(f, at)->mem = one;
}

/* What is read twice may be one place; what is written is apart from all else. */
static void check_call_overlaps(fixture *f, call_id call) {
    const field *before = NULL;
    for (const field *a = NULL; (a = next_field(f, call, a));) {
        const clmoe_buf right = *buf_at(f, a);
        if (before && a->use == READ) {
            *buf_at(f, a) = *buf_at(f, before);
            taken(f, a, "read twice");
            *buf_at(f, a) = right;
        }
        before = a->use == READ ? a : before;
        for (const field *b = NULL; a->use != READ && (b = next_field(f, call, b));)
            if (b != a)
                check_overlap(f, a, b);
    }
}

static void overlaps(void **state) {
    (void)state;
    for (int kind = 0; kind < KINDS; kind++)
        for (int call = 0; call < CALLS; call++) {
            fixture f;
            test_case("overlaps, layer %d, call %d", kind, call);
            fixture_make(&f, 1 << kind, NULL);
            if (!next_field(&f, (call_id)call, NULL))
                continue;
            move_together(&f, (call_id)call);
            OK(run(&f, (call_id)call));
            check_call_overlaps(&f, (call_id)call);
        }
}

/* A part of a buffer is that buffer. */
static void sub_buffers(void **state) {
    (void)state;
    fixture f;
    cl_int code = CL_SUCCESS;
    cl_mem parts[2];
    test_case("sub-buffers");
    fixture_make(&f, USUAL, NULL);
    const field x = ARG(forward, USUAL, READ, x), y = ARG(forward, USUAL, WRITE, y);
    const size_t part = (f.bytes + 4095) / 4096 * 4096;
    cl_mem one = new_mem(test.context, CL_MEM_READ_WRITE, 2 * part);
    for (size_t i = 0; i < COUNT_OF(parts); i++) {
        cl_buffer_region region = {i * part, part};
        parts[i] =
            clCreateSubBuffer(one, CL_MEM_READ_WRITE, CL_BUFFER_CREATE_TYPE_REGION, &region, &code);
        CL_OK(code);
        clean_later(release, parts[i]);
    }
    f.args.forward.x = (clmoe_buf){one, 0};
    f.args.forward.y = (clmoe_buf){parts[0], 0};
    refused(&f, &y, "overlaps x");
    f.args.forward.y = (clmoe_buf){parts[1], 0};
    taken(&f, &y, "behind x");
    f.args.forward.x = (clmoe_buf){parts[0], 0};
    taken(&f, &x, "before y");
    f.args.forward.x = (clmoe_buf){parts[1], 0};
    refused(&f, &y, "overlaps x");
}

/* An engine that reads sizes on the host needs to be allowed to; the others do not. */
static void check_host_access(fixture *f, const field *of, bool reads) {
    const cl_mem_flags flags[] = {CL_MEM_HOST_NO_ACCESS, CL_MEM_HOST_WRITE_ONLY};
    for (size_t i = 0; i < COUNT_OF(flags); i++) {
        cl_int code = CL_SUCCESS;
        clmoe_buf *buf = buf_at(f, of), right = *buf;
        buf->mem = clCreateBuffer(test.context, flags[i], f->bytes, NULL, &code);
        CL_OK(code);
        clean_later(release, buf->mem);
        if (reads)
            refused(f, of, i ? "HOST_WRITE_ONLY" : "HOST_NO_ACCESS");
        else if (of->use != READ) /* of what nobody wrote there is nothing to read */
            taken(f, of, "no access");
        *buf = right;
    }
}

static void host_access(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    const field saved = ARG(forward, USUAL, BOTH, saved),
                scratch = ARG(forward, ANY, BOTH, scratch);
    const field plan = ARG(experts, ANY, READ, plan);
    for (size_t n = 0; engines[n]; n++) {
        const bool reads = strcmp(engines[n], "clblast") == 0;
        fixture f;
        test_case("engine %s", engines[n]);
        fixture_make(&f, USUAL, engines[n]);
        check_host_access(&f, &saved, reads);
        check_host_access(&f, &scratch, false);
        check_host_access(&f, &plan, reads);
        fixture_make(&f, CHOICE, engines[n]);
        check_host_access(&f, &scratch, reads);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(flags_of_buffers), TEST(images),      TEST(buffers_of_other_contexts),
        TEST(overlaps),         TEST(sub_buffers), TEST(host_access)};
    return RUN(tests);
}
