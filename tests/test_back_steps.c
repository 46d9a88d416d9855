/*
 * The steps of the backward pass one by one give clmoe_backward()'s bits: for every layer of the
 * tables, on every engine, with and without a state, and for another router's logits and ids.
 */
#include "support.h"
#include "support_backward.h"
#include "support_balance.h"
#include "support_variants.h"

#include <string.h>

static const shape small = {33, 21, 12, 0, 3, 19};

/* Two backward passes of one batch: by clmoe_backward(), and by its steps. */
typedef struct rig {
    training_batch *whole, steps;
    const clmoe_layer_desc *desc;
    clmoe_plan_layout layout;
    /* What the steps of the forward leave. */
    clmoe_buf logits, scores, ids, pair_weights, live, token_offsets, plan;
    clmoe_buf x; /* as the experts see it */
    clmoe_buf z, shared_z, shared_gate;
    /* What the steps pass on. */
    clmoe_buf dxe, dots, dpair_weights, shared_dx, router_dx;
    clmoe_buf dlogits, dnoise, dgroup_logits;
} rig;

static const clmoe_buf none = {NULL, 0};

static clmoe_buf if_any(bool any, size_t bytes) {
    return any ? buf_new(bytes) : none;
}

/* A call of a step with its arguments; T and the layer are those of the batch. */
#define STEP(function, type, ...)                                                                  \
    do {                                                                                           \
        const type args = {                                                                        \
            .struct_size = sizeof args, .tokens = r->whole->args.tokens, __VA_ARGS__};             \
        OK(function(r->whole->layer, test.queue, &args, 0, NULL, NULL));                           \
    } while (0)

/* ---- Forward -----------------------------------------------------------------------------------
 */

static void route(rig *r) {
    const clmoe_forward_args *a = &r->whole->d.args;
    const bool choice = ref_lists_pairs(r->desc);
    const bool chosen = a->ids_in.mem != NULL;
    const size_t T = a->tokens, logits = T * ref_columns(r->desc) * 4, pairs = r->layout.pairs * 4;
    r->logits = a->logits_in.mem ? a->logits_in : if_any(!chosen, logits);
    r->scores = if_any(!chosen, logits);
    r->ids = chosen ? a->ids_in : buf_new(pairs);
    r->pair_weights = chosen ? a->pair_weights_in : buf_new(pairs);
    r->live = if_any(!chosen && !choice, T * 4);
    r->token_offsets = if_any(choice, (T + 1) * 4);
    r->plan = buf_new(r->layout.bytes);
    if (!chosen) {
        STEP(clmoe_score, clmoe_score_args, .weights = a->weights, .x = a->x,
             .logits_in = a->logits_in, .logits = a->logits_in.mem ? none : r->logits,
             .scores = r->scores, .state = a->state, .scratch = a->scratch, .experts_jittered = 1);
        STEP(clmoe_topk, clmoe_topk_args, .weights = a->weights, .scores = r->scores, .ids = r->ids,
             .pair_weights = r->pair_weights, .live = r->live, .token_offsets = r->token_offsets,
             .token_mask = a->token_mask, .state = a->state, .scratch = a->scratch);
    }
    STEP(clmoe_plan, clmoe_plan_args, .weights = a->weights, .ids = r->ids,
         .pair_weights = r->pair_weights, .live = r->live, .token_mask = a->token_mask,
         .token_offsets = r->token_offsets, .state = a->state, .scores = r->scores,
         .scratch = a->scratch, .plan = r->plan);
    if (r->desc->router.renorm.after_drop && !chosen && r->desc->capacity.keep != CLMOE_KEEP_ROUND)
        STEP(clmoe_renorm_after_drop, clmoe_renorm_after_drop_args, .weights = a->weights,
             .ids = r->ids, .pair_weights = r->pair_weights, .plan = r->plan);
}

static clmoe_buf new_z(const rig *r, clmoe_mlp mlp) {
    size_t bytes = 0;
    OK(clmoe_z_size(r->whole->layer, r->whole->args.tokens, mlp, &bytes));
    return buf_new(bytes);
}

static void run_experts(rig *r) {
    const clmoe_forward_args *a = &r->whole->d.args;
    const size_t D = r->desc->dim, rows = r->layout.slots * D, tokens = a->tokens * D;
    const clmoe_type type = r->desc->type;
    const bool dispatches = clmoe_layer_dispatches(r->whole->layer);
    const clmoe_buf xe = dispatches ? buf_new_type(type, rows) : none;
    r->x = a->x;
    if (a->state.mem && r->desc->router.noise.jitter_experts) {
        r->x = buf_new_type(type, tokens);
        STEP(clmoe_jitter, clmoe_jitter_args, .x = a->x, .state = a->state, .jittered = r->x);
    }
    if (dispatches)
        STEP(clmoe_dispatch, clmoe_dispatch_args, .x = r->x, .plan = r->plan, .xe = xe);
    r->z = new_z(r, CLMOE_MLP_EXPERTS);
    STEP(clmoe_experts, clmoe_experts_args, .weights = a->weights, .x = dispatches ? none : r->x,
         .xe = xe, .pair_weights = r->pair_weights, .plan = r->plan, .scratch = a->scratch,
         .ye = buf_new_type(type, rows), .final_weights = 1, .z = r->z, .state = a->state);
    if (!r->desc->shared.hidden_dim)
        return;
    r->shared_z = new_z(r, CLMOE_MLP_SHARED);
    r->shared_gate = if_any(r->desc->shared_gate, a->tokens * 4);
    STEP(clmoe_shared_expert, clmoe_shared_expert_args, .weights = a->weights, .x = r->x,
         .scratch = a->scratch, .shared = buf_new_type(type, tokens), .shared_gate = r->shared_gate,
         .z = r->shared_z, .state = a->state);
}

/* ---- Backward ----------------------------------------------------------------------------------
 */

static void experts_back(rig *r) {
    const clmoe_backward_args *a = &r->whole->args;
    const clmoe_type type = r->desc->type;
    const size_t D = r->desc->dim;
    r->dxe = buf_new_type(type, r->layout.slots * D);
    r->dots = buf_new(r->layout.slots * 4);
    r->dpair_weights = r->steps.args.dpair_weights;
    STEP(clmoe_experts_backward, clmoe_experts_backward_args, .weights = a->weights, .x = r->x,
         .pair_weights = r->pair_weights, .plan = r->plan, .z = r->z, .state = a->state,
         .dy = a->dy, .dye = a->dye, .scratch = a->scratch, .dxe = r->dxe, .dots = r->dots,
         .gradients = &r->steps.gradients);
    STEP(clmoe_combine_backward, clmoe_combine_backward_args, .weights = a->weights, .x = r->x,
         .ids = r->ids, .plan = r->plan, .token_mask = a->token_mask,
         .token_offsets = r->token_offsets, .dy = a->dy, .dye = a->dye, .dxe = r->dxe,
         .dots = r->dots, .dpair_weights = r->dpair_weights, .gradients = &r->steps.gradients);
    if (!r->desc->shared.hidden_dim)
        return;
    r->shared_dx = buf_new_type(type, a->tokens * D);
    STEP(clmoe_shared_expert_backward, clmoe_shared_expert_backward_args, .weights = a->weights,
         .x = r->x, .token_mask = a->token_mask, .shared_gate = r->shared_gate, .z = r->shared_z,
         .state = a->state, .dy = a->dy, .scratch = a->scratch, .shared_dx = r->shared_dx,
         .gradients = &r->steps.gradients);
}

static void route_back(rig *r) {
    const clmoe_backward_args *a = &r->whole->args;
    const size_t T = a->tokens, G = r->desc->router.groups.count;
    const size_t logits = T * ref_columns(r->desc) * 4;
    r->dlogits = r->steps.args.dlogits_out;
    r->dnoise = if_any(a->state.mem && r->whole->noise_router, logits);
    r->dgroup_logits = if_any(r->desc->router.groups.two_level, T * G * 4);
    r->router_dx = buf_new_type(r->desc->type, T * r->desc->dim);
    STEP(clmoe_topk_backward, clmoe_topk_backward_args, .weights = a->weights, .x = a->x,
         .logits = r->logits, .ids = r->ids, .live = r->live, .plan = r->plan,
         .token_mask = a->token_mask, .token_offsets = r->token_offsets, .state = a->state,
         .dpair_weights = r->dpair_weights, .dlogits = a->dlogits, .dnoise = a->dnoise,
         .dgroup_logits = a->dgroup_logits, .scratch = a->scratch, .dlogits_out = r->dlogits,
         .dnoise_out = r->dnoise, .dgroup_logits_out = r->dgroup_logits,
         .gradients = &r->steps.gradients);
    STEP(clmoe_score_backward, clmoe_score_backward_args, .weights = a->weights, .x = a->x,
         .token_mask = a->token_mask, .state = a->state, .dlogits = r->dlogits, .dnoise = r->dnoise,
         .dgroup_logits = r->dgroup_logits, .scratch = a->scratch, .router_dx = r->router_dx,
         .gradients = &r->steps.gradients, .logits_given = a->logits_in.mem != NULL);
    if (a->logits_in.mem && !r->dnoise.mem && !r->dgroup_logits.mem)
        r->router_dx = none; /* nothing goes through a router */
}

static void run_steps(rig *r) {
    const clmoe_backward_args *a = &r->whole->args;
    route(r);
    run_experts(r);
    experts_back(r);
    if (!a->ids_in.mem)
        route_back(r);
    STEP(clmoe_dispatch_backward, clmoe_dispatch_backward_args, .pair_weights = r->pair_weights,
         .plan = r->plan, .token_mask = a->token_mask, .token_offsets = r->token_offsets,
         .state = a->state, .dy = a->dy, .dxe = r->dxe, .shared_dx = r->shared_dx,
         .router_dx = r->router_dx, .dx = r->steps.args.dx);
    CL_OK(clFinish(test.queue));
}

/* ---- Batches -----------------------------------------------------------------------------------
 */

static void add_state(training_batch *t) {
    clmoe_state *state = random_state_of(&t->b.desc);
    const size_t R = ref_columns(&t->b.desc);
    state->noise_scale = 0.75f;
    state->temperature_scale = 1.25f;
    state->capacity_scale = 0.75f;
    t->state = state;
    if (t->b.desc.router.noise.kind == CLMOE_NOISE_LEARNED)
        t->noise_router = random_floats(R * t->b.desc.dim, 0.3);
}

/* Outputs of their own for the two. */
static void add_noise_gradients(rig *r) {
    const size_t R = ref_columns(r->desc), D = r->desc->dim, T = r->whole->args.tokens;
    if (!r->whole->noise_router || r->whole->b.in.ids_in)
        return;
    r->whole->gradients.noise_router = buf_new(R * D * 4);
    r->steps.gradients.noise_router = buf_new(R * D * 4);
    r->whole->args.dnoise = buf_of(random_floats(T * R, 0.1), T * R * 4);
}

static void check_steps(const clmoe_layer_desc *desc, uint32_t inputs, bool has_state) {
    rig *r = HOST(rig, 1);
    training_batch *t = r->whole = training_make(desc, small.tokens, inputs);
    r->desc = &t->b.desc;
    if (has_state)
        add_state(t);
    training_forward(t, 0);
    OK(clmoe_plan_layout_get(t->layer, t->args.tokens, &r->layout));
    r->steps = *t;
    training_new_outputs(&r->steps);
    add_noise_gradients(r);
    training_backward(t);
    buf_poison(t->args.scratch);
    run_steps(r);
    const training_outputs whole = training_read(t), steps = training_read(&r->steps);
    compare_outputs(&steps, &whole);
    if (t->gradients.noise_router.mem)
        compare_bits("noise_router", buf_get(r->steps.gradients.noise_router),
                     buf_get(t->gradients.noise_router), (size_t)ref_columns(desc) * desc->dim * 4);
}

/* ---- Tests -------------------------------------------------------------------------------------
 */

static const struct {
    const layer_variant *variants;
    const size_t *count;
} tables[] = {{layer_variants, &num_layer_variants},
              {routing_variants, &num_routing_variants},
              {backward_variants, &num_backward_variants}};

static const struct {
    const char *name;
    uint32_t inputs;
} input_sets[] = {{"from x", WITH_MASK | WITH_DLOGITS | WITH_DYE},
                  {"logits_in", WITH_MASK | WITH_LOGITS_IN | WITH_DLOGITS},
                  {"ids_in", WITH_MASK | WITH_IDS_IN}};

static bool allows(const clmoe_layer_desc *desc, uint32_t inputs, bool has_state) {
    if (desc->router.policy == CLMOE_POLICY_SOFT_MOE || (needs_a_state(desc) && !has_state))
        return false;
    return !ref_lists_pairs(desc) || !(inputs & WITH_IDS_IN);
}

static void check_variant(const char *engine, clmoe_type type, const layer_variant *variant) {
    for (size_t i = 0; i < COUNT_OF(input_sets); i++)
        for (int has_state = 0; has_state < 2; has_state++) {
            clmoe_layer_desc desc = desc_of(&small);
            variant->set(&desc);
            desc.engine = engine;
            desc.type = desc.weight_type = type;
            if (!allows(&desc, input_sets[i].inputs, has_state))
                continue;
            test_case("engine %s, %s, %s, state %d", engine, variant->name, input_sets[i].name,
                      has_state);
            check_steps(&desc, input_sets[i].inputs, has_state);
        }
}

static void check_all(clmoe_type type) {
    const char *const *engines = test_engines_of(type, type);
    for (size_t n = 0; engines[n] != NULL; n++)
        for (size_t table = 0; table < COUNT_OF(tables); table++)
            for (size_t i = 0; i < *tables[table].count; i++)
                check_variant(engines[n], type, &tables[table].variants[i]);
}

static void steps_of_f32(void **state) {
    (void)state;
    check_all(CLMOE_F32);
}

static void steps_of_bf16(void **state) {
    (void)state;
    check_all(CLMOE_BF16);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(steps_of_f32),
        TEST(steps_of_bf16),
    };
    return RUN(tests);
}
