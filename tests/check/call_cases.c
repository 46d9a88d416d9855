/* The arguments of every call. */
#include "call_cases.h"

#include <string.h>

#define DEFINE_CALL(function)                                                                      \
    static clmoe_status call_##function(clmoe_layer *layer, cl_command_queue queue,                \
                                        const void *args, cl_uint num_wait, const cl_event *wait,  \
                                        cl_event *event) {                                         \
        return function(layer, queue, args, num_wait, wait, event);                                \
    }

DEFINE_CALL(clmoe_forward)
DEFINE_CALL(clmoe_score)
DEFINE_CALL(clmoe_topk)
DEFINE_CALL(clmoe_plan)
DEFINE_CALL(clmoe_renorm_after_drop)
DEFINE_CALL(clmoe_jitter)
DEFINE_CALL(clmoe_replicate)
DEFINE_CALL(clmoe_dispatch)
DEFINE_CALL(clmoe_experts)
DEFINE_CALL(clmoe_shared_expert)
DEFINE_CALL(clmoe_combine)
DEFINE_CALL(clmoe_stats_compute)
DEFINE_CALL(clmoe_backward)
DEFINE_CALL(clmoe_experts_backward)
DEFINE_CALL(clmoe_combine_backward)
DEFINE_CALL(clmoe_shared_expert_backward)
DEFINE_CALL(clmoe_topk_backward)
DEFINE_CALL(clmoe_score_backward)
DEFINE_CALL(clmoe_dispatch_backward)

#define B(type, field, required)                                                                   \
    { #field, offsetof(type, field), required, 4 }
#define M(type, field)                                                                             \
    { #field, offsetof(type, field), false, 1 }

static const buf_field forward_fields[] = {
    B(clmoe_forward_args, x, true),
    M(clmoe_forward_args, token_mask),
    B(clmoe_forward_args, residual, false),
    B(clmoe_forward_args, saved, true),
    B(clmoe_forward_args, scratch, true),
    B(clmoe_forward_args, y, true),
    B(clmoe_forward_args, logits, false),
    B(clmoe_forward_args, ids, false),
    B(clmoe_forward_args, pair_weights, false),
    B(clmoe_forward_args, stats, false),
};
static const buf_field score_fields[] = {
    B(clmoe_score_args, x, true),
    B(clmoe_score_args, logits, true),
    B(clmoe_score_args, scores, true),
};
static const buf_field topk_fields[] = {
    B(clmoe_topk_args, scores, true),
    B(clmoe_topk_args, ids, true),
    B(clmoe_topk_args, pair_weights, true),
    B(clmoe_topk_args, live, true),
};
static const buf_field plan_fields[] = {
    B(clmoe_plan_args, ids, true),   B(clmoe_plan_args, pair_weights, true),
    B(clmoe_plan_args, live, false), M(clmoe_plan_args, token_mask),
    B(clmoe_plan_args, plan, true),  B(clmoe_plan_args, scratch, true),
};
static const buf_field renorm_fields[] = {
    B(clmoe_renorm_after_drop_args, ids, true),
    B(clmoe_renorm_after_drop_args, pair_weights, true),
    B(clmoe_renorm_after_drop_args, plan, true),
};
static const buf_field jitter_fields[] = {
    B(clmoe_jitter_args, x, true),
    B(clmoe_jitter_args, state, true),
    B(clmoe_jitter_args, jittered, true),
};
static const buf_field replicate_fields[] = {
    B(clmoe_replicate_args, ids, true),          B(clmoe_replicate_args, plan, true),
    B(clmoe_replicate_args, copies, true),       B(clmoe_replicate_args, logical_to_physical, true),
    B(clmoe_replicate_args, physical_ids, true),
};
static const buf_field dispatch_fields[] = {
    B(clmoe_dispatch_args, x, true),
    B(clmoe_dispatch_args, plan, true),
    B(clmoe_dispatch_args, xe, true),
};
static const buf_field experts_fields[] = {
    B(clmoe_experts_args, x, true),    B(clmoe_experts_args, pair_weights, true),
    B(clmoe_experts_args, plan, true), B(clmoe_experts_args, scratch, true),
    B(clmoe_experts_args, ye, true),   B(clmoe_experts_args, z, false),
};
static const buf_field shared_fields[] = {
    B(clmoe_shared_expert_args, x, true),      B(clmoe_shared_expert_args, scratch, true),
    B(clmoe_shared_expert_args, shared, true), B(clmoe_shared_expert_args, shared_gate, true),
    B(clmoe_shared_expert_args, z, false),
};
static const buf_field combine_fields[] = {
    B(clmoe_combine_args, x, true),
    B(clmoe_combine_args, ye, true),
    B(clmoe_combine_args, pair_weights, true),
    B(clmoe_combine_args, plan, true),
    M(clmoe_combine_args, token_mask),
    B(clmoe_combine_args, shared, true),
    B(clmoe_combine_args, shared_gate, true),
    B(clmoe_combine_args, residual, false),
    B(clmoe_combine_args, y, true),
};
static const buf_field stats_fields[] = {
    B(clmoe_stats_args, logits, false),       B(clmoe_stats_args, ids, true),
    B(clmoe_stats_args, pair_weights, false), B(clmoe_stats_args, scratch, true),
    B(clmoe_stats_args, plan, true),          B(clmoe_stats_args, live, false),
    M(clmoe_stats_args, token_mask),          B(clmoe_stats_args, stats, true),
};
static const buf_field backward_fields[] = {
    B(clmoe_backward_args, x, true),
    M(clmoe_backward_args, token_mask),
    B(clmoe_backward_args, saved, true),
    B(clmoe_backward_args, scratch, true),
    B(clmoe_backward_args, dy, true),
    B(clmoe_backward_args, dlogits, false),
    B(clmoe_backward_args, dye, false),
    B(clmoe_backward_args, dx, false),
    B(clmoe_backward_args, dlogits_out, false),
    B(clmoe_backward_args, dpair_weights, false),
};
static const buf_field experts_back_fields[] = {
    B(clmoe_experts_backward_args, x, true),
    B(clmoe_experts_backward_args, pair_weights, true),
    B(clmoe_experts_backward_args, plan, true),
    B(clmoe_experts_backward_args, z, true),
    B(clmoe_experts_backward_args, dy, true),
    B(clmoe_experts_backward_args, dye, false),
    B(clmoe_experts_backward_args, scratch, true),
    B(clmoe_experts_backward_args, dxe, true),
    B(clmoe_experts_backward_args, dots, true),
};
static const buf_field combine_back_fields[] = {
    B(clmoe_combine_backward_args, x, true),
    B(clmoe_combine_backward_args, ids, true),
    B(clmoe_combine_backward_args, plan, true),
    M(clmoe_combine_backward_args, token_mask),
    B(clmoe_combine_backward_args, dy, true),
    B(clmoe_combine_backward_args, dye, false),
    B(clmoe_combine_backward_args, dxe, true),
    B(clmoe_combine_backward_args, dots, true),
    B(clmoe_combine_backward_args, dpair_weights, true),
};
static const buf_field shared_back_fields[] = {
    B(clmoe_shared_expert_backward_args, x, true),
    M(clmoe_shared_expert_backward_args, token_mask),
    B(clmoe_shared_expert_backward_args, shared_gate, true),
    B(clmoe_shared_expert_backward_args, z, true),
    B(clmoe_shared_expert_backward_args, dy, true),
    B(clmoe_shared_expert_backward_args, scratch, true),
    B(clmoe_shared_expert_backward_args, shared_dx, true),
};
static const buf_field topk_back_fields[] = {
    B(clmoe_topk_backward_args, logits, true),
    B(clmoe_topk_backward_args, ids, true),
    B(clmoe_topk_backward_args, live, true),
    B(clmoe_topk_backward_args, plan, true),
    M(clmoe_topk_backward_args, token_mask),
    B(clmoe_topk_backward_args, dpair_weights, true),
    B(clmoe_topk_backward_args, dlogits, false),
    B(clmoe_topk_backward_args, scratch, true),
    B(clmoe_topk_backward_args, dlogits_out, true),
};
static const buf_field score_back_fields[] = {
    B(clmoe_score_backward_args, x, true),         M(clmoe_score_backward_args, token_mask),
    B(clmoe_score_backward_args, dlogits, true),   B(clmoe_score_backward_args, scratch, true),
    B(clmoe_score_backward_args, router_dx, true),
};
static const buf_field dispatch_back_fields[] = {
    B(clmoe_dispatch_backward_args, pair_weights, true),
    B(clmoe_dispatch_backward_args, plan, true),
    M(clmoe_dispatch_backward_args, token_mask),
    B(clmoe_dispatch_backward_args, dy, true),
    B(clmoe_dispatch_backward_args, dxe, true),
    B(clmoe_dispatch_backward_args, shared_dx, false),
    B(clmoe_dispatch_backward_args, router_dx, false),
    B(clmoe_dispatch_backward_args, dx, true),
};
/* Each call needs a run of these. */
static const buf_field all_weights[] = {
    B(clmoe_weights, router, true),           B(clmoe_weights, router_bias, true),
    B(clmoe_weights, select_bias, true),      B(clmoe_weights, expert_scale, true),
    B(clmoe_weights, experts.gate, true),     B(clmoe_weights, experts.up, true),
    B(clmoe_weights, experts.down, true),     B(clmoe_weights, experts.gate_bias, true),
    B(clmoe_weights, experts.up_bias, true),  B(clmoe_weights, experts.down_bias, true),
    B(clmoe_weights, shared.gate, true),      B(clmoe_weights, shared.down, true),
    B(clmoe_weights, shared.gate_bias, true), B(clmoe_weights, shared.down_bias, true),
    B(clmoe_weights, shared_gate, true),      B(clmoe_weights, output_bias, true),
};

/* A layer that needs every buffer there is. */
static clmoe_layer_desc full_desc(void) {
    clmoe_layer_desc desc = desc_of(&small);
    desc.num_identity_experts = 2;
    desc.training = desc.dye = 1;
    desc.router.bias = desc.router.select_bias = desc.router.expert_scale = 1;
    desc.router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    desc.router.renorm.after_drop = 1;
    desc.router.noise.jitter = 0.1f;
    desc.capacity.factor = 1.0;
    desc.capacity.keep = CLMOE_KEEP_WEIGHT;
    desc.experts.gate_layout = CLMOE_GATE_SEPARATE;
    desc.experts.gate_up_bias = desc.experts.down_bias = 1;
    desc.shared.hidden_dim = 3;
    desc.shared.gate_up_bias = desc.shared.down_bias = 1;
    desc.shared_gate = desc.output_bias = 1;
    return desc;
}

static clmoe_buf z_of(const call_fixture *f, clmoe_mlp mlp) {
    size_t bytes = 0;
    OK(clmoe_z_size(f->layer, small.tokens, mlp, &bytes));
    return buf_new(bytes);
}

static void replicate_arguments(call_fixture *f) {
    const clmoe_forward_args *a = &f->d.args;
    f->replicate = (clmoe_replicate_args){.struct_size = sizeof f->replicate,
                                          .tokens = small.tokens,
                                          .replicas = 10,
                                          .max_copies = 3,
                                          .ids = a->ids,
                                          .plan = f->plan.plan,
                                          .copies = buf_new(small.experts * 4),
                                          .logical_to_physical = buf_new(small.experts * 12),
                                          .physical_ids = buf_new(small.tokens * small.top_k * 4)};
}

static void step_arguments(call_fixture *f) {
    const clmoe_forward_args *a = &f->d.args;
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(f->layer, small.tokens, &layout));
    size_t T = small.tokens, R = ref_columns(&f->desc), D = small.dim, state = 0;
    OK(clmoe_state_size(f->layer, &state));
    clmoe_buf scores = buf_new(T * R * 4), live = buf_new(T * 4), plan = buf_new(layout.bytes);
    clmoe_buf xe = buf_new(layout.slots * D * 4), ye = buf_new(layout.slots * D * 4);
    clmoe_buf none = {NULL, 0};
    f->score = (clmoe_score_args){.struct_size = sizeof f->score,
                                  .tokens = small.tokens,
                                  .weights = &f->weights,
                                  .x = a->x,
                                  .logits = a->logits,
                                  .scores = scores};
    f->topk = (clmoe_topk_args){.struct_size = sizeof f->topk,
                                .tokens = small.tokens,
                                .weights = &f->weights,
                                .scores = scores,
                                .ids = a->ids,
                                .pair_weights = a->pair_weights,
                                .live = live};
    f->plan = (clmoe_plan_args){.struct_size = sizeof f->plan,
                                .tokens = small.tokens,
                                .ids = a->ids,
                                .pair_weights = a->pair_weights,
                                .live = live,
                                .token_mask = a->token_mask,
                                .scratch = a->scratch,
                                .plan = plan};
    f->renorm = (clmoe_renorm_after_drop_args){sizeof f->renorm, small.tokens,    &f->weights,
                                               a->ids,           a->pair_weights, plan};
    f->jitter = (clmoe_jitter_args){sizeof f->jitter, small.tokens, a->x, buf_new(state),
                                    buf_new(T * D * 4)};
    replicate_arguments(f);
    f->dispatch = (clmoe_dispatch_args){sizeof f->dispatch, small.tokens, a->x, plan, xe};
    f->experts = (clmoe_experts_args){.struct_size = sizeof f->experts,
                                      .tokens = small.tokens,
                                      .weights = &f->weights,
                                      .x = a->x,
                                      .pair_weights = a->pair_weights,
                                      .plan = plan,
                                      .scratch = a->scratch,
                                      .ye = ye,
                                      .final_weights = 1,
                                      .z = z_of(f, CLMOE_MLP_EXPERTS)};
    f->shared = (clmoe_shared_expert_args){.struct_size = sizeof f->shared,
                                           .tokens = small.tokens,
                                           .weights = &f->weights,
                                           .x = a->x,
                                           .scratch = a->scratch,
                                           .shared = buf_new(T * D * 4),
                                           .shared_gate = buf_new(T * 4),
                                           .z = z_of(f, CLMOE_MLP_SHARED)};
    f->combine = (clmoe_combine_args){
        sizeof f->combine, small.tokens, &f->weights,   a->x, ye,
        a->pair_weights,   plan,         a->token_mask, none, buf_new(T * D * 4),
        buf_new(T * 4),    a->residual,  a->y,          1,    0};
    f->stats = (clmoe_stats_args){.struct_size = sizeof f->stats,
                                  .tokens = small.tokens,
                                  .logits = a->logits,
                                  .ids = a->ids,
                                  .pair_weights = a->pair_weights,
                                  .plan = plan,
                                  .live = live,
                                  .token_mask = a->token_mask,
                                  .scratch = a->scratch,
                                  .stats = a->stats};
}

static void backward_arguments(call_fixture *f) {
    const clmoe_forward_args *a = &f->d.args;
    const size_t rows = (size_t)small.tokens * small.dim;
    const size_t columns = (size_t)small.tokens * ref_columns(&f->desc) * 4;
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(f->layer, small.tokens, &layout));
    f->gradients.experts.down = buf_new((size_t)small.experts * small.dim * small.hidden_dim * 4);
    clmoe_backward_args_init(&f->backward);
    f->backward.tokens = small.tokens;
    f->backward.weights = &f->weights;
    f->backward.x = a->x;
    f->backward.token_mask = a->token_mask;
    f->backward.saved = a->saved;
    f->backward.scratch = a->scratch;
    f->backward.dy = buf_of(random_floats(rows, 1.0), rows * 4);
    f->backward.dlogits = buf_of(HOST(char, columns), columns);
    f->backward.dye = buf_new(layout.slots * small.dim * 4);
    f->backward.dx = buf_new(rows * 4);
    f->backward.dlogits_out = buf_new(columns);
    f->backward.dpair_weights = buf_new((size_t)small.tokens * small.top_k * 4);
    f->backward.gradients = &f->gradients;
}

#define STEP(type, ...)                                                                            \
    (type) {                                                                                       \
        .struct_size = sizeof(type), .tokens = small.tokens, __VA_ARGS__                           \
    }

static void back_step_arguments(call_fixture *f) {
    const clmoe_backward_args *a = &f->backward;
    const size_t rows = (size_t)small.tokens * small.dim * 4;
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(f->layer, small.tokens, &layout));
    const clmoe_buf dxe = buf_new(layout.slots * small.dim * 4), dots = buf_new(layout.slots * 4);
    f->experts_back = STEP(clmoe_experts_backward_args, .weights = &f->weights, .x = a->x,
                           .pair_weights = f->experts.pair_weights, .plan = f->plan.plan,
                           .z = f->experts.z, .dy = a->dy, .dye = a->dye, .scratch = a->scratch,
                           .dxe = dxe, .dots = dots, .gradients = &f->gradients);
    f->combine_back = STEP(clmoe_combine_backward_args, .weights = &f->weights, .x = a->x,
                           .ids = f->topk.ids, .plan = f->plan.plan, .token_mask = a->token_mask,
                           .dy = a->dy, .dye = a->dye, .dxe = dxe, .dots = dots,
                           .dpair_weights = a->dpair_weights, .gradients = &f->gradients);
    f->shared_back = STEP(clmoe_shared_expert_backward_args, .weights = &f->weights, .x = a->x,
                          .token_mask = a->token_mask, .shared_gate = f->shared.shared_gate,
                          .z = f->shared.z, .dy = a->dy, .scratch = a->scratch,
                          .shared_dx = buf_new(rows), .gradients = &f->gradients);
    f->topk_back =
        STEP(clmoe_topk_backward_args, .weights = &f->weights, .logits = f->score.logits,
             .ids = f->topk.ids, .live = f->topk.live, .plan = f->plan.plan,
             .token_mask = a->token_mask, .dpair_weights = a->dpair_weights, .dlogits = a->dlogits,
             .scratch = a->scratch, .dlogits_out = a->dlogits_out, .gradients = &f->gradients);
    f->score_back =
        STEP(clmoe_score_backward_args, .weights = &f->weights, .x = a->x,
             .token_mask = a->token_mask, .dlogits = a->dlogits_out, .scratch = a->scratch,
             .router_dx = buf_new(rows), .gradients = &f->gradients);
    f->dispatch_back = STEP(clmoe_dispatch_backward_args, .pair_weights = f->experts.pair_weights,
                            .plan = f->plan.plan, .token_mask = a->token_mask, .dy = a->dy,
                            .dxe = dxe, .shared_dx = f->shared_back.shared_dx,
                            .router_dx = f->score_back.router_dx, .dx = a->dx);
}

void call_fixture_make(call_fixture *f) {
    f->desc = full_desc();
    f->layer = test_layer(0, &f->desc);
    seed_set(1);
    batch_make(&f->b, &f->desc, small.tokens);
    f->b.in.token_mask = random_mask(small.tokens);
    f->b.in.residual = random_floats((size_t)small.tokens * small.dim, 1.0);
    batch_upload(f->layer, &f->b, &f->d);
    f->weights = f->d.weights;
    f->d.args.weights = &f->weights;
    memset(&f->gradients, 0, sizeof f->gradients);
    step_arguments(f);
    backward_arguments(f);
    back_step_arguments(f);
}

#define CASE(function, arguments, fields)                                                          \
#function, call_##function, &(arguments), fields, COUNT_OF(fields)

void calls_of(call_fixture *f, call_case calls[CALLS]) {
    const call_case all[CALLS] = {
        {CASE(clmoe_forward, f->d.args, forward_fields), &f->d.args.weights, all_weights, 16},
        {CASE(clmoe_score, f->score, score_fields), &f->score.weights, all_weights, 2},
        {CASE(clmoe_topk, f->topk, topk_fields), &f->topk.weights, all_weights + 2, 2},
        {CASE(clmoe_plan, f->plan, plan_fields), NULL, NULL, 0},
        {CASE(clmoe_renorm_after_drop, f->renorm, renorm_fields), &f->renorm.weights,
         all_weights + 3, 1},
        {CASE(clmoe_jitter, f->jitter, jitter_fields), NULL, NULL, 0},
        {CASE(clmoe_dispatch, f->dispatch, dispatch_fields), NULL, NULL, 0},
        {CASE(clmoe_experts, f->experts, experts_fields), &f->experts.weights, all_weights + 4, 6},
        {CASE(clmoe_shared_expert, f->shared, shared_fields), &f->shared.weights, all_weights + 10,
         5},
        {CASE(clmoe_combine, f->combine, combine_fields), &f->combine.weights, all_weights + 15, 1},
        {CASE(clmoe_stats_compute, f->stats, stats_fields), NULL, NULL, 0},
        {CASE(clmoe_backward, f->backward, backward_fields), &f->backward.weights, all_weights, 16},
        {CASE(clmoe_experts_backward, f->experts_back, experts_back_fields),
         &f->experts_back.weights, all_weights + 4, 6},
        {CASE(clmoe_combine_backward, f->combine_back, combine_back_fields),
         &f->combine_back.weights, all_weights + 9, 1},
        {CASE(clmoe_shared_expert_backward, f->shared_back, shared_back_fields),
         &f->shared_back.weights, all_weights + 10, 5},
        {CASE(clmoe_topk_backward, f->topk_back, topk_back_fields), &f->topk_back.weights,
         all_weights + 3, 1},
        {CASE(clmoe_score_backward, f->score_back, score_back_fields), &f->score_back.weights,
         all_weights, 2},
        {CASE(clmoe_dispatch_backward, f->dispatch_back, dispatch_back_fields), NULL, NULL, 0},
        {CASE(clmoe_replicate, f->replicate, replicate_fields), NULL, NULL, 0},
    };
    memcpy(calls, all, sizeof all);
}

void expect_refusal(const call_fixture *f, const call_case *c, const char *field,
                    const char *value) {
    cl_event event = (cl_event)f;
    clmoe_status status = c->call(f->layer, test.queue, c->args, 0, NULL, &event);
    check_error(status, CLMOE_INVALID_ARGUMENT, field, value);
    CHECK(event == NULL, "%s, %s: the event is not NULL\n", c->name, field);
}
