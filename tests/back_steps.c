/* The steps of the backward pass against clmoe_backward(). */
#include "step_rig.h"

#include <stdio.h>

enum { GRADIENTS = sizeof(clmoe_gradients) / sizeof(clmoe_buf) };

/* What one way of going back gives. */
typedef struct back_outputs {
    clmoe_buf dx, dlogits, dpair_weights;
    clmoe_gradients gradients;
} back_outputs;

/* The arguments of the steps backward; `out` and what they hand to one another are their own. */
typedef struct back_rig {
    const rig *of;
    back_outputs out;
    clmoe_experts_backward_args experts;
    clmoe_combine_backward_args combine;
    clmoe_shared_expert_backward_args shared;
    clmoe_topk_backward_args topk;
    clmoe_score_backward_args score;
    clmoe_dispatch_backward_args dispatch;
} back_rig;

static const clmoe_buf none = {NULL, 0};

static clmoe_buf *gradient_at(clmoe_gradients *gradients, size_t i) {
    return (clmoe_buf *)(void *)gradients + i;
}

static size_t bytes_behind(clmoe_buf buf) {
    size_t bytes = 0;
    CL_OK(clGetMemObjectInfo(buf.mem, CL_MEM_SIZE, sizeof bytes, &bytes, NULL));
    return bytes - buf.offset;
}

static void release_gradients(void *gradients) {
    clmoe_gradients_release(gradients);
}

/* One of everything the layer has, all gradients of one small number. */
static back_outputs new_outputs(const rig *r) {
    static const unsigned char small_number = 0x3d;
    const size_t T = r->d.args.tokens;
    clmoe_gradients *own = HOST(clmoe_gradients, 1);
    back_outputs out = {.dx = buf_new_type(r->desc->type, T * r->desc->dim),
                        .dpair_weights = buf_new(r->ws.plan.pairs * 4)};
    if (!r->d.args.ids_in.mem)
        out.dlogits = buf_new(T * ref_columns(r->desc) * 4);
    OK(clmoe_gradients_create(r->layer, own));
    clean_later(release_gradients, own);
    out.gradients = *own;
    for (size_t i = 0; i < GRADIENTS; i++) {
        const clmoe_buf to = *gradient_at(own, i);
        if (to.mem)
            CL_OK(clEnqueueFillBuffer(test.queue, to.mem, &small_number, 1, to.offset,
                                      bytes_behind(to), 0, NULL, NULL));
    }
    return out;
}

/* ---- The whole ------------------------------------------------------------------------------- */

static clmoe_buf random_rows(const rig *r, size_t rows) {
    const size_t n = rows * r->desc->dim;
    float *values = random_floats(n, 1.0);
    round_all(r->desc->type, values, n);
    return buf_of_type(r->desc->type, values, n);
}

/* With a state, gradients are added to what is there. */
static clmoe_backward_args whole_args(const rig *r, back_outputs *out) {
    const clmoe_forward_args *a = &r->d.args;
    clmoe_backward_args args;
    clmoe_backward_args_init(&args);
    args.tokens = a->tokens;
    args.weights = a->weights;
    args.x = a->x;
    args.token_mask = a->token_mask;
    args.logits_in = a->logits_in;
    args.ids_in = a->ids_in;
    args.pair_weights_in = a->pair_weights_in;
    args.state = a->state;
    args.saved = a->saved;
    args.scratch = a->scratch;
    args.dy = random_rows(r, a->tokens);
    args.dlogits = a->dlogits;
    args.dnoise = a->dnoise;
    args.dgroup_logits = a->dgroup_logits;
    args.dye = r->desc->dye ? random_rows(r, r->ws.plan.slots) : none;
    args.dx = out->dx;
    args.dlogits_out = out->dlogits;
    args.dpair_weights = out->dpair_weights;
    args.gradients = &out->gradients;
    args.accumulate = a->state.mem != NULL;
    return args;
}

/* ---- The steps ------------------------------------------------------------------------------- */

#define STEP(type, ...)                                                                            \
    (type) {                                                                                       \
        .struct_size = sizeof(type), .tokens = a->tokens, __VA_ARGS__                              \
    }

static void expert_steps(back_rig *b, const clmoe_backward_args *a) {
    const rig *r = b->of;
    const size_t T = a->tokens, D = r->desc->dim, slots = r->ws.plan.slots;
    const clmoe_type type = r->desc->type;
    const clmoe_buf dxe = buf_new_type(type, slots * D), dots = buf_new(slots * 4);
    const clmoe_buf x = r->jitters ? r->jitter.jittered : a->x, offsets = r->topk.token_offsets;
    b->experts =
        STEP(clmoe_experts_backward_args, .weights = a->weights, .x = x,
             .pair_weights = r->topk.pair_weights, .plan = r->plan.plan, .z = r->experts.z,
             .state = a->state, .dy = a->dy, .dye = a->dye, .scratch = a->scratch, .dxe = dxe,
             .dots = dots, .gradients = &b->out.gradients, .accumulate = a->accumulate);
    b->combine =
        STEP(clmoe_combine_backward_args, .accumulate = a->accumulate, .weights = a->weights,
             .x = x, .ids = r->topk.ids, .plan = r->plan.plan, .token_mask = a->token_mask,
             .token_offsets = offsets, .dy = a->dy, .dye = a->dye, .dxe = dxe, .dots = dots,
             .dpair_weights = b->out.dpair_weights, .gradients = &b->out.gradients);
    b->shared = STEP(clmoe_shared_expert_backward_args, .weights = a->weights, .x = x,
                     .token_mask = a->token_mask, .shared_gate = r->shared.shared_gate,
                     .z = r->shared.z, .state = a->state, .dy = a->dy, .scratch = a->scratch,
                     .shared_dx = r->shares ? buf_new_type(type, T * D) : none,
                     .gradients = &b->out.gradients, .accumulate = a->accumulate);
    b->dispatch = STEP(clmoe_dispatch_backward_args, .pair_weights = r->topk.pair_weights,
                       .plan = r->plan.plan, .token_mask = a->token_mask, .token_offsets = offsets,
                       .state = a->state, .dy = a->dy, .dxe = dxe, .shared_dx = b->shared.shared_dx,
                       .dx = b->out.dx);
}

static void routing_steps(back_rig *b, const clmoe_backward_args *a) {
    const rig *r = b->of;
    const clmoe_router_desc *router = &r->desc->router;
    const size_t T = a->tokens, columns = T * ref_columns(r->desc) * 4;
    const bool learned = a->state.mem && router->noise.kind == CLMOE_NOISE_LEARNED;
    const bool two_level = router->groups.two_level, given = a->logits_in.mem != NULL;
    if (a->ids_in.mem)
        return;
    b->topk = STEP(clmoe_topk_backward_args, .accumulate = a->accumulate, .weights = a->weights,
                   .x = a->x, .logits = given ? a->logits_in : r->score.logits, .ids = r->topk.ids,
                   .live = r->topk.live, .plan = r->plan.plan, .token_mask = a->token_mask,
                   .token_offsets = r->topk.token_offsets, .state = a->state,
                   .dpair_weights = b->out.dpair_weights, .dlogits = a->dlogits,
                   .dnoise = a->dnoise, .dgroup_logits = a->dgroup_logits, .scratch = a->scratch,
                   .dlogits_out = b->out.dlogits, .dnoise_out = learned ? buf_new(columns) : none,
                   .dgroup_logits_out = two_level ? buf_new(T * router->groups.count * 4) : none,
                   .gradients = &b->out.gradients);
    b->score =
        STEP(clmoe_score_backward_args, .weights = a->weights, .x = a->x,
             .token_mask = a->token_mask, .state = a->state, .dlogits = b->out.dlogits,
             .dnoise = b->topk.dnoise_out, .dgroup_logits = b->topk.dgroup_logits_out,
             .scratch = a->scratch, .router_dx = buf_new_type(r->desc->type, T * r->desc->dim),
             .gradients = &b->out.gradients, .accumulate = a->accumulate, .logits_given = given);
    if (!given || learned || two_level)
        b->dispatch.router_dx = b->score.router_dx;
}

#define CALL(function, args) OK(function(b->of->layer, test.queue, &b->args, 0, NULL, NULL))

static void run_data(back_rig *b) {
    const bool routed = !b->of->d.args.ids_in.mem;
    CALL(clmoe_experts_backward, experts);
    CALL(clmoe_combine_backward, combine);
    if (b->of->shares)
        CALL(clmoe_shared_expert_backward, shared);
    if (routed)
        CALL(clmoe_topk_backward, topk);
    if (routed)
        CALL(clmoe_score_backward, score);
    CALL(clmoe_dispatch_backward, dispatch);
}

static void set_parts(back_rig *b, clmoe_backward_parts parts) {
    b->experts.parts = b->shared.parts = b->score.parts = parts;
}

/* The weights' gradients after all that passes dx on. */
static void run_weights(back_rig *b) {
    set_parts(b, CLMOE_BACKWARD_WEIGHTS);
    CALL(clmoe_experts_backward, experts);
    if (b->of->shares)
        CALL(clmoe_shared_expert_backward, shared);
    if (!b->of->d.args.ids_in.mem)
        CALL(clmoe_score_backward, score);
}

/* ---- Comparing ------------------------------------------------------------------------------- */

/* Of routers and their scales, whose steps are left out with ids of another router. */
static bool is_of_routing(const clmoe_gradients *of, const clmoe_buf *gradient) {
    return gradient == &of->router || gradient == &of->router_bias ||
           gradient == &of->expert_scale || gradient == &of->group_router ||
           gradient == &of->noise_router;
}

static void compare_gradients(const back_outputs *got, const back_outputs *want, bool routed) {
    back_outputs a = *got, b = *want;
    for (size_t i = 0; i < GRADIENTS; i++) {
        const clmoe_buf is = *gradient_at(&a.gradients, i), was = *gradient_at(&b.gradients, i);
        char name[32];
        if (!is.mem || (!routed && is_of_routing(&a.gradients, gradient_at(&a.gradients, i))))
            continue;
        const size_t bytes = bytes_behind(is);
        void *values[] = {HOST(char, bytes), HOST(char, bytes)};
        CL_OK(clEnqueueReadBuffer(test.queue, is.mem, CL_TRUE, is.offset, bytes, values[0], 0, NULL,
                                  NULL));
        CL_OK(clEnqueueReadBuffer(test.queue, was.mem, CL_TRUE, was.offset, bytes, values[1], 0,
                                  NULL, NULL));
        snprintf(name, sizeof name, "gradient %zu", i);
        compare_bits(name, values[0], values[1], bytes);
    }
}

static void compare_outputs(const rig *r, const back_outputs *got, const back_outputs *want) {
    const size_t T = r->d.args.tokens;
    compare_bits("dx", buf_get(got->dx), buf_get(want->dx),
                 T * r->desc->dim * type_size(r->desc->type));
    compare_bits("dpair_weights", buf_get(got->dpair_weights), buf_get(want->dpair_weights),
                 r->ws.plan.pairs * 4);
    if (got->dlogits.mem)
        compare_bits("dlogits", buf_get(got->dlogits), buf_get(want->dlogits),
                     T * ref_columns(r->desc) * 4);
    compare_gradients(got, want, !r->d.args.ids_in.mem);
}

static void check_parts(const rig *r, const clmoe_backward_args *args, const back_outputs *want,
                        bool apart) {
    back_rig b = {.of = r, .out = new_outputs(r)};
    expert_steps(&b, args);
    routing_steps(&b, args);
    if (apart)
        set_parts(&b, CLMOE_BACKWARD_DATA);
    run_data(&b);
    if (apart)
        run_weights(&b);
    CL_OK(clFinish(test.queue));
    compare_outputs(r, &b.out, want);
}

void check_back_steps(const rig *r) {
    back_outputs want = new_outputs(r);
    const clmoe_backward_args args = whole_args(r, &want);
    OK(clmoe_backward(r->layer, test.queue, &args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    check_parts(r, &args, &want, false);
    check_parts(r, &args, &want, true);
}
