/* buffers: what a memory object given to a call must be: a buffer, of the right flags, apart. */
#include "every_buffer.h"

#include <stdio.h>
#include <string.h>

static const shape small = {6, 5, 8, 0, 2, 3};

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
    const bool separate = kind == TWO_LEVEL || kind == EXTERNAL;
    d.router.bias = d.router.expert_scale = kind != SOFT;
    d.router.noise.kind = kind & ROUTED ? CLMOE_NOISE_LEARNED : CLMOE_NOISE_NONE;
    d.router.select_bias = kind != CHOICE && kind != SOFT;
    d.shared_gate = d.output_bias = 1;
    lay_out(&d.experts, separate ? CLMOE_GATE_SEPARATE : CLMOE_GATE_CONCAT);
    d.shared = d.experts;
    d.training = d.dye = 1;
    d.balance.router_orthogonality = 1;
    d.capacity.factor = kind == USUAL || kind == CHOICE ? 1.0 : 0.0;
    d.router.noise.jitter = kind == USUAL ? 0.1f : 0.0f;
    d.router.renorm.after_drop = kind == TWO_LEVEL;
    if (kind == USUAL)
        d.capacity.overflow = CLMOE_OVERFLOW_REROUTE;
    if (kind == CHOICE)
        d.router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    if (kind & AT_INPUT)
        d.router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    if (kind == SOFT) {
        d.router.policy = CLMOE_POLICY_SOFT_MOE;
        d.top_k = 1;
    }
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

static size_t most_bytes(const clmoe_layer *layer, int kind) {
    size_t saved = 0, scratch = 0, state = 0, stats = kind == SOFT ? 0 : stats_size(layer);
    clmoe_plan_layout plan;
    OK(clmoe_layer_memory(layer, small.tokens, &saved, &scratch));
    OK(clmoe_state_size(layer, &state));
    OK(clmoe_plan_layout_get(layer, small.tokens, &plan));
    const size_t rows = plan.slots * larger(small.dim, small.tokens) * sizeof(float);
    const size_t matrices = 32 * 32 * small.experts * sizeof(float); /* packed ones, too */
    const size_t most = larger(larger(saved, scratch), larger(plan.bytes, rows));
    return larger(larger(most, matrices), larger(state, stats));
}

/* All that is no buffer. */
static void begin(all_args *a, int kind) {
    const uint32_t num_losses = kind == TWO_LEVEL ? 1 : 2;
    memset(a, 0, sizeof *a);
    a->experts.final_weights = a->combine.final_weights = 1;
#define BEGIN(id, function)                                                                        \
    a->id.struct_size = sizeof a->id;                                                              \
    a->id.tokens = small.tokens;
    BATCH_CALLS(BEGIN)
#undef BEGIN
    a->replicate.replicas = 2 * small.experts;
    a->replicate.max_copies = 2;
    clmoe_balance_args_init(&a->start);
    clmoe_balance_args_init(&a->update);
    a->orthogonality.struct_size = sizeof a->orthogonality;
    a->orthogonality.weights = &a->weights;
    a->forward.weights = a->score.weights = a->topk.weights = a->plan.weights = &a->weights;
    a->experts.weights = a->combine.weights = a->stats.weights = a->loss.weights = &a->weights;
    a->renorm.weights = a->shared.weights = a->soft_dispatch.weights = &a->weights;
    a->backward.weights = a->experts_back.weights = a->combine_back.weights = &a->weights;
    a->shared_back.weights = a->topk_back.weights = a->score_back.weights = &a->weights;
    a->score_back.logits_given = kind == TWO_LEVEL;
    a->backward.gradients = a->experts_back.gradients = &a->gradients;
    a->combine_back.gradients = a->shared_back.gradients = &a->gradients;
    a->topk_back.gradients = a->score_back.gradients = &a->gradients;
    a->counts.weights = &a->weights;
    a->update.bias_rule = kind == USUAL ? CLMOE_BIAS_QUANTILE : CLMOE_BIAS_NONE;
    a->loss.losses = losses;
    a->loss.num_losses = num_losses;
    a->forward.losses = kind & ROUTED ? losses : NULL;
    a->forward.num_losses = kind & ROUTED ? num_losses : 0;
}

static void fixture_of(fixture *f, int kind, const clmoe_layer_desc *desc) {
    f->layer = test_layer(0, desc);
    f->kinds = kind;
    if (kind == EXTERNAL)
        f->kinds |= strcmp(desc->engine, "cpu") == 0 ? PACKED : UNPACKED;
    f->bytes = most_bytes(f->layer, kind);
    begin(&f->args, kind);
    for (int call = 0; call < CALLS; call++)
        for (const field *at = NULL; (at = next_field(f, (call_id)call, at));)
            if (!buf_at(f, at)->mem)
                *buf_at(f, at) = (clmoe_buf){new_mem(test.context, CL_MEM_READ_WRITE, f->bytes), 0};
}

static void fixture_make(fixture *f, int kind) {
    const clmoe_layer_desc desc = desc_of_kind(kind);
    fixture_of(f, kind, &desc);
}

static clmoe_status run_pack(fixture *f) {
    const clmoe_pack_args args = {.struct_size = sizeof args,
                                  .mlp = CLMOE_MLP_EXPERTS,
                                  .raw = &f->args.pack.raw,
                                  .packed = f->args.pack.packed};
    return clmoe_pack_weights(f->layer, test.queue, &args, 0, NULL, NULL);
}

static clmoe_status run_first_state(fixture *f) {
    return clmoe_state_init(f->layer, test.queue, f->args.first_state.state, 1, 0, NULL, NULL);
}

#define RUN_CALL(id, function)                                                                     \
    case CALL_##id:                                                                                \
        status = function(f->layer, test.queue, &f->args.id, 0, NULL, NULL);                       \
        break;

static clmoe_status run(fixture *f, call_id call) {
    clmoe_status status = CLMOE_SUCCESS;
    switch (call) {
        BATCH_CALLS(RUN_CALL)
        RUN_CALL(start, clmoe_balance_start)
        RUN_CALL(update, clmoe_balance_update)
        RUN_CALL(orthogonality, clmoe_router_orthogonality)
    case CALL_pack:
        status = run_pack(f);
        break;
    case CALL_first_state:
        status = run_first_state(f);
        break;
    case CALLS:
        break;
    }
    CL_OK(clFinish(test.queue));
    return status;
}

static void refused_for(fixture *f, call_id call, const char *name, const char *why) {
    clmoe_status status = run(f, call);
    CHECK(status == CLMOE_INVALID_ARGUMENT, "%s, %s, %s: %s\n", call_names[call], name, why,
          clmoe_status_string(status));
    CHECK(strstr(clmoe_last_error(), name) && strstr(clmoe_last_error(), why),
          "\"%s\" does not say %s and %s\n", clmoe_last_error(), name, why);
}

static void refused(fixture *f, const field *of, const char *why) {
    refused_for(f, of->call, of->name, why);
}

static void taken(fixture *f, const field *of, const char *what) {
    clmoe_status status = run(f, of->call);
    CHECK(status == CLMOE_SUCCESS, "%s, %s, %s: %s\n", call_names[of->call], of->name, what,
          clmoe_last_error());
}

/* Calls check(f, field) of every field of every call. */
static void each_field(fixture *f, void (*check)(fixture *f, const field *of)) {
    for (int call = 0; call < CALLS; call++)
        for (const field *at = NULL; (at = next_field(f, (call_id)call, at));) {
            const clmoe_buf right = *buf_at(f, at);
            check(f, at);
            *buf_at(f, at) = right;
        }
}

/* The same of every layer. */
static void every_field(const char *what, void (*check)(fixture *f, const field *of)) {
    for (int kind = 0; kind < KINDS; kind++) {
        fixture f;
        test_case("%s, %s", what, kind_names[kind]);
        fixture_make(&f, 1 << kind);
        each_field(&f, check);
    }
}

/* ---- Tests ----------------------------------------------------------------------------------- */

static const unsigned char poison = 0xa5;

static void write_poison(fixture *f, const field *of) {
    CL_OK(clEnqueueFillBuffer(test.queue, buf_at(f, of)->mem, &poison, sizeof poison, 0, f->bytes,
                              0, NULL, NULL));
}

static void check_poison(fixture *f, const field *of) {
    unsigned char *got = HOST(unsigned char, f->bytes);
    CL_OK(clEnqueueReadBuffer(test.queue, buf_at(f, of)->mem, CL_TRUE, 0, f->bytes, got, 0, NULL,
                              NULL));
    for (size_t i = 0; i < f->bytes; i++)
        CHECK(got[i] == poison, "%s, %s was written\n", call_names[of->call], of->name);
}

/* With no room behind its offset, and, where it is needed, not given. */
static void check_size(fixture *f, const field *of) {
    clmoe_buf *buf = buf_at(f, of);
    buf->offset = f->bytes / 4 * 4;
    refused(f, of, "needs ");
    *buf = (clmoe_buf){NULL, 0};
    if (of->asked)
        refused_for(f, of->call, of->asked, "given");
}

/* Each buffer is asked for by its name, before anything is enqueued. */
static void too_small_or_missing(void **state) {
    (void)state;
    for (int kind = 0; kind < KINDS; kind++) {
        fixture f;
        test_case("sizes, %s", kind_names[kind]);
        fixture_make(&f, 1 << kind);
        each_field(&f, write_poison);
        each_field(&f, check_size);
        each_field(&f, check_poison);
    }
}

static void check_optional(fixture *f, const field *of) {
    if (of->asked)
        return;
    *buf_at(f, of) = (clmoe_buf){NULL, 0};
    taken(f, of, "not given");
}

static void optional_buffers(void **state) {
    (void)state;
    every_field("optional", check_optional);
}

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

/* y may be residual, and dlogits_out dlogits. */
static bool may_be_same(const field *a, const field *b) {
    return (strcmp(a->name, "y") == 0 && strcmp(b->name, "residual") == 0) ||
           (strcmp(a->name, "dlogits_out") == 0 && strcmp(b->name, "dlogits") == 0);
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
    test_note("%s over %s, %s, layer %d", a->name, b->name, call_names[a->call], f->kinds);
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
            test_case("overlaps, %s, %s", kind_names[kind], call_names[call]);
            fixture_make(&f, 1 << kind);
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
    fixture_make(&f, USUAL);
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
                scratch = ARG(forward, EVERY, BOTH, scratch);
    const field plan = ARG(experts, EVERY, READ, plan),
                plan_back = ARG(experts_back, ANY, READ, plan),
                saved_back = ARG(backward, EVERY, READ, saved);
    for (size_t n = 0; engines[n]; n++) {
        const bool reads = strcmp(engines[n], "clblast") == 0;
        clmoe_layer_desc desc = desc_of_kind(USUAL);
        fixture f;
        test_case("engine %s", engines[n]);
        desc.engine = engines[n];
        fixture_of(&f, USUAL, &desc);
        check_host_access(&f, &saved, reads);
        check_host_access(&f, &scratch, false);
        check_host_access(&f, &plan, reads);
        check_host_access(&f, &plan_back, reads);
        check_host_access(&f, &saved_back, reads);
        desc.training = desc.dye = 0;
        fixture_of(&f, USUAL, &desc);
        check_host_access(&f, &scratch, reads);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(too_small_or_missing),
                                       TEST(optional_buffers),
                                       TEST(flags_of_buffers),
                                       TEST(images),
                                       TEST(buffers_of_other_contexts),
                                       TEST(overlaps),
                                       TEST(sub_buffers),
                                       TEST(host_access)};
    return RUN(tests);
}
