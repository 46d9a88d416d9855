/*
 * The steps one by one give clmoe_forward()'s bits, and in training those backward give
 * clmoe_backward()'s: for every layer of the tables, on every engine, with and without a state, and
 * for another router's logits and ids.
 */
#include "step_rig.h"
#include "support_balance.h"
#include "support_variants.h"

#include <string.h>

static const shape small = {33, 21, 12, 0, 3, 19};

/* ---- The batch ------------------------------------------------------------------------------- */

/* Another router's choice. */
static void add_source(batch *b, source from) {
    const uint32_t R = ref_columns(&b->desc);
    const size_t pairs = (size_t)b->in.tokens * b->desc.top_k;
    int32_t *ids = HOST(int32_t, pairs);
    for (size_t p = 0; p < pairs; p++)
        ids[p] = (int32_t)random_below(R + 2) - 1;
    if (from == LOGITS_IN)
        b->in.logits_in = random_floats((size_t)b->in.tokens * R, 2.0);
    if (from != IDS_IN)
        return;
    b->in.ids_in = ids;
    b->in.pair_weights_in = random_floats(pairs, 1.0);
}

/* One with every scale off 1. */
static clmoe_buf some_state(const clmoe_layer_desc *desc, clmoe_layer *layer) {
    size_t bytes = 0;
    clmoe_state *state = random_state_of(desc);
    OK(clmoe_state_size(layer, &bytes));
    state->noise_scale = 0.75f;
    state->temperature_scale = 1.25f;
    state->loss_weight = 2.0f;
    state->capacity_scale = 0.75f;
    return buf_of(state, bytes);
}

#define LOSS(of, ...)                                                                              \
    r->losses[r->num_losses++] = (clmoe_loss_desc) {                                               \
        .kind = CLMOE_LOSS_##of, .weight = 0.5f, __VA_ARGS__                                       \
    }

/* As many kinds and sources as the layer has. */
static void add_losses(rig *r, bool has_state) {
    const clmoe_router_desc *router = &r->desc->router;
    const clmoe_capacity_desc *capacity = &r->desc->capacity;
    LOSS(SWITCH, .f_source = CLMOE_F_FRESH);
    LOSS(MINIMAX, .p_source = CLMOE_P_SOFTMAX);
    LOSS(SQUARED, .p_source = CLMOE_P_RAW, .f_source = CLMOE_F_SUPPLIED);
    LOSS(ENTROPY, .f_source = CLMOE_F_FIRST);
    LOSS(Z, .beta = 0.0f);
    LOSS(TOKEN_ENTROPY, .beta = 0.0f);
    if (has_state)
        LOSS(L1, .f_source = CLMOE_F_EMA, .controlled = 1);
    if (router->score != CLMOE_SCORE_SPARSEMIXER && !router->groups.two_level &&
        router->rebalance.iterations == 0)
        LOSS(IMPORTANCE_CV2, .p_source = CLMOE_P_WEIGHTS);
    if (capacity->rows > 0 || capacity->factor > 0)
        LOSS(OVERFLOW, .beta = 0.0f);
    if (capacity->tokens_per_sequence > 0)
        LOSS(MAX, .per_sequence = 1);
    if (router->noise.kind == CLMOE_NOISE_LEARNED && has_state)
        LOSS(SMOOTH_LOAD, .beta = 0.0f);
    if (r->desc->balance.device_groups > 0)
        LOSS(COMMUNICATION, .beta = 0.0f);
}

static clmoe_buf zeros(size_t bytes) {
    return buf_of(HOST(char, bytes), bytes);
}

static void forward_losses(rig *r, bool has_state) {
    clmoe_forward_args *a = &r->d.args;
    const size_t logits = (size_t)a->tokens * ref_columns(r->desc) * 4;
    float *supplied = random_floats(r->desc->num_experts, 1.0);
    for (size_t e = 0; e < r->desc->num_experts; e++)
        supplied[e] = supplied[e] < 0 ? -supplied[e] : supplied[e];
    add_losses(r, has_state);
    a->losses = r->losses;
    a->num_losses = r->num_losses;
    a->load_supplied = buf_of(supplied, r->desc->num_experts * 4);
    a->loss_values = buf_new(r->num_losses * 4);
    a->dlogits = zeros(logits);
    a->dnoise = zeros(logits);
    if (r->desc->router.groups.two_level)
        a->dgroup_logits = zeros((size_t)a->tokens * r->desc->router.groups.count * 4);
}

/* ---- The steps' arguments -------------------------------------------------------------------- */

#define STEP(type, ...)                                                                            \
    (type) {                                                                                       \
        .struct_size = sizeof(type), .tokens = a->tokens, __VA_ARGS__                              \
    }

static void routing_steps(rig *r) {
    const clmoe_forward_args *a = &r->d.args;
    const clmoe_buf none = {NULL, 0};
    const size_t T = a->tokens, logits = T * ref_columns(r->desc) * 4, pairs = r->ws.plan.pairs * 4;
    const bool choice = ref_lists_pairs(r->desc);
    const bool chosen = a->ids_in.mem != NULL;
    r->score = STEP(clmoe_score_args, .weights = a->weights, .x = a->x, .logits_in = a->logits_in,
                    .logits = a->logits_in.mem ? none : buf_new(logits), .scores = buf_new(logits),
                    .state = a->state, .scratch = a->scratch, .experts_jittered = 1);
    r->topk = STEP(clmoe_topk_args, .weights = a->weights, .scores = r->score.scores,
                   .ids = chosen ? a->ids_in : buf_new(pairs),
                   .pair_weights = chosen ? a->pair_weights_in : buf_new(pairs),
                   .live = chosen   ? none
                           : choice ? buf_of(HOST(int32_t, T), T * 4) /* not read */
                                    : buf_new(T * 4),
                   .token_offsets = choice ? buf_new((T + 1) * 4) : none,
                   .token_mask = a->token_mask, .state = a->state, .scratch = a->scratch);
    r->plan = STEP(clmoe_plan_args, .weights = a->weights, .ids = r->topk.ids,
                   .pair_weights = r->topk.pair_weights, .live = r->topk.live,
                   .token_mask = a->token_mask, .token_offsets = r->topk.token_offsets,
                   .state = a->state, .scores = chosen ? none : r->score.scores,
                   .scratch = a->scratch, .plan = buf_new(r->ws.plan.bytes));
    r->renorm = STEP(clmoe_renorm_after_drop_args, .weights = a->weights, .ids = r->topk.ids,
                     .pair_weights = r->topk.pair_weights, .plan = r->plan.plan);
    r->renorms =
        r->desc->router.renorm.after_drop && !chosen && r->desc->capacity.keep != CLMOE_KEEP_ROUND;
}

/* Where the way back does not make it again. */
static clmoe_buf z_of(const rig *r, clmoe_mlp mlp) {
    size_t bytes = 0;
    if (!r->desc->training || r->desc->recompute || (mlp == CLMOE_MLP_SHARED && !r->shares))
        return (clmoe_buf){NULL, 0};
    OK(clmoe_z_size(r->layer, r->d.args.tokens, mlp, &bytes));
    return buf_new(bytes);
}

static void expert_steps(rig *r) {
    const clmoe_forward_args *a = &r->d.args;
    const clmoe_buf none = {NULL, 0};
    const size_t D = r->desc->dim, T = a->tokens, rows = r->ws.plan.slots * D;
    const clmoe_type type = r->desc->type;
    r->jitters = a->state.mem && r->desc->router.noise.jitter_experts;
    r->shares = r->desc->shared.hidden_dim > 0;
    const clmoe_buf x = r->jitters ? buf_new_type(type, T * D) : a->x;
    const clmoe_buf gate = r->desc->shared_gate ? buf_new(T * 4) : none;
    const clmoe_buf shared = r->shares ? buf_new_type(type, T * D) : none;
    r->jitter = STEP(clmoe_jitter_args, .x = a->x, .state = a->state, .jittered = x);
    r->dispatch =
        STEP(clmoe_dispatch_args, .x = x, .plan = r->plan.plan, .xe = buf_new_type(type, rows));
    r->experts = STEP(clmoe_experts_args, .weights = a->weights, .xe = r->dispatch.xe,
                      .pair_weights = r->topk.pair_weights, .plan = r->plan.plan,
                      .scratch = a->scratch, .ye = buf_new_type(type, rows), .final_weights = 1,
                      .z = z_of(r, CLMOE_MLP_EXPERTS), .state = a->state);
    r->shared = STEP(clmoe_shared_expert_args, .weights = a->weights, .x = x, .scratch = a->scratch,
                     .shared = shared, .shared_gate = gate, .z = z_of(r, CLMOE_MLP_SHARED),
                     .state = a->state);
    r->combine = STEP(clmoe_combine_args, .weights = a->weights, .x = x, .ye = r->experts.ye,
                      .pair_weights = r->topk.pair_weights, .plan = r->plan.plan,
                      .token_mask = a->token_mask, .token_offsets = r->topk.token_offsets,
                      .shared = shared, .shared_gate = gate, .residual = a->residual,
                      .y = buf_new_type(type, T * D), .final_weights = 1);
}

static void balance_steps(rig *r) {
    const clmoe_forward_args *a = &r->d.args;
    const clmoe_buf none = {NULL, 0};
    const size_t gradient = (size_t)a->tokens * ref_columns(r->desc) * 4;
    const clmoe_buf logits = a->ids_in.mem      ? none
                             : a->logits_in.mem ? a->logits_in
                                                : r->score.logits;
#define BATCH                                                                                      \
    .weights = a->weights, .x = a->x, .logits = logits, .ids = r->topk.ids,                        \
    .pair_weights = r->topk.pair_weights, .plan = r->plan.plan, .live = r->topk.live,              \
    .token_mask = a->token_mask, .token_offsets = r->topk.token_offsets, .state = a->state,        \
    .scratch = a->scratch
    r->stats = STEP(clmoe_stats_args, BATCH, .stats = buf_new(stats_size(r->layer)));
    if (r->num_losses == 0)
        return;
    r->loss = STEP(clmoe_loss_args, BATCH, .losses = r->losses, .num_losses = r->num_losses,
                   .load_supplied = a->load_supplied, .values = buf_new(r->num_losses * 4),
                   .dlogits = zeros(gradient), .dnoise = zeros(gradient));
    if (r->desc->router.groups.two_level)
        r->loss.dgroup_logits = zeros((size_t)a->tokens * r->desc->router.groups.count * 4);
#undef BATCH
}

/* Soft MoE: the same buffers, filled by other steps. */
static void soft_steps(rig *r) {
    const clmoe_forward_args *a = &r->d.args;
    const size_t T = a->tokens;
    const clmoe_buf mix = buf_new(T * r->ws.plan.slots * 4);
    r->soft_dispatch =
        STEP(clmoe_soft_dispatch_args, .weights = a->weights, .x = a->x,
             .token_mask = a->token_mask, .scratch = a->scratch, .plan = r->plan.plan,
             .pair_weights = r->topk.pair_weights, .mix = mix, .xe = r->dispatch.xe);
    r->soft_combine = STEP(clmoe_soft_combine_args, .ye = r->experts.ye, .mix = mix,
                           .mixed = buf_new_type(r->desc->type, T * r->desc->dim));
    r->combine.ye = r->soft_combine.mixed;
}

/* ---- Running and comparing ------------------------------------------------------------------- */

#define CALL(function, args) OK(function(r->layer, test.queue, &r->args, 0, NULL, NULL))

static void run_soft_steps(rig *r) {
    CALL(clmoe_soft_dispatch, soft_dispatch);
    CALL(clmoe_experts, experts);
    CALL(clmoe_soft_combine, soft_combine);
    if (r->shares)
        CALL(clmoe_shared_expert, shared);
    CALL(clmoe_combine, combine);
}

static void run_steps(rig *r, bool dispatches) {
    if (!r->d.args.ids_in.mem) {
        CALL(clmoe_score, score);
        CALL(clmoe_topk, topk);
    }
    CALL(clmoe_plan, plan);
    if (r->renorms)
        CALL(clmoe_renorm_after_drop, renorm);
    if (r->jitters)
        CALL(clmoe_jitter, jitter);
    if (dispatches) {
        CALL(clmoe_dispatch, dispatch);
    } else {
        r->experts.x = r->dispatch.x;
        r->experts.xe = (clmoe_buf){NULL, 0};
    }
    CALL(clmoe_experts, experts);
    if (r->shares)
        CALL(clmoe_shared_expert, shared);
    CALL(clmoe_combine, combine);
    CALL(clmoe_stats_compute, stats);
    if (r->num_losses > 0)
        CALL(clmoe_loss, loss);
}

/* Of what the forward has. */
static void same_bits(const char *what, clmoe_buf step, clmoe_buf forward, size_t bytes) {
    if (forward.mem && bytes > 0)
        compare_bits(what, buf_get(step), buf_get(forward), bytes);
}

/* Bytes of a region of the forward, which the steps may write over. */
static void *forward_region(const rig *r, region_id id) {
    const clmoe_buf saved = r->d.args.saved, scratch = r->d.args.scratch;
    const clmoe_buf at = workspace_region(&r->ws, id, saved, scratch);
    const clmoe_buf of = r->ws.saved[id] ? saved : scratch;
    return at.mem ? (char *)buf_get(of) + (at.offset - of.offset) : NULL;
}

static void compare_plan(const rig *r) {
    const clmoe_plan_layout *plan = &r->ws.plan;
    const size_t R = ref_columns(r->desc);
    const struct {
        const char *name;
        size_t offset, count;
    } arrays[] = {
        {"plan.load", plan->load, R},
        {"plan.kept", plan->kept, R},
        {"plan.rerouted_in", plan->rerouted_in, R},
        {"plan.rerouted_out", plan->rerouted_out, R},
        {"plan.offsets", plan->offsets, r->desc->num_experts + 1},
        {"plan.slot_of", plan->slot_of, plan->pairs},
        {"plan.pair_of", plan->pair_of, plan->slots},
        {"plan.token_of", plan->token_of, plan->slots},
        {"plan.tile_expert", plan->tile_expert, plan->slots / plan->row_tile},
    };
    const char *got = buf_get(r->plan.plan), *want = r->forward_plan;
    for (size_t i = 0; i < COUNT_OF(arrays); i++)
        compare_bits(arrays[i].name, got + arrays[i].offset, want + arrays[i].offset,
                     arrays[i].count * 4);
}

static void compare_steps(const rig *r) {
    const clmoe_forward_args *a = &r->d.args;
    const size_t T = a->tokens, logits = T * ref_columns(r->desc) * 4, pairs = r->ws.plan.pairs * 4;
    const size_t y = T * r->desc->dim * type_size(r->desc->type);
    compare_plan(r);
    if (!r->d.args.ids_in.mem && !is_soft(r->desc))
        compare_bits("scores", buf_get(r->score.scores), r->forward_scores, logits);
    same_bits("logits", r->score.logits, a->logits, logits);
    same_bits("ids", r->topk.ids, a->ids, pairs);
    same_bits("pair_weights", r->topk.pair_weights, a->pair_weights, pairs);
    same_bits("token_offsets", r->topk.token_offsets, a->token_offsets, (T + 1) * 4);
    same_bits("y", r->combine.y, a->y, y);
    same_bits("stats", r->stats.stats, a->stats, stats_size(r->layer));
    same_bits("loss values", r->loss.values, a->loss_values, r->num_losses * 4);
    same_bits("dlogits", r->loss.dlogits, a->dlogits, logits);
    same_bits("dnoise", r->loss.dnoise, a->dnoise, logits);
    same_bits("dgroup_logits", r->loss.dgroup_logits, a->dgroup_logits,
              T * r->desc->router.groups.count * 4);
}

static void run_all(rig *r) {
    if (is_soft(r->desc)) {
        soft_steps(r);
        run_soft_steps(r);
        return;
    }
    balance_steps(r);
    run_steps(r, clmoe_layer_dispatches(r->layer));
}

static void check_steps(const clmoe_layer_desc *desc, bool has_state, source from) {
    rig r;
    memset(&r, 0, sizeof r);
    r.desc = desc;
    r.layer = test_layer(0, desc);
    seed_set(3);
    batch_make(&r.b, desc, small.tokens);
    r.b.in.token_mask = random_mask(small.tokens);
    r.b.in.residual = random_floats((size_t)small.tokens * desc->dim, 1.0);
    add_source(&r.b, from);
    batch_upload(r.layer, &r.b, &r.d);
    assert_int_equal(workspace_layout_get(r.layer, small.tokens, &r.ws), CLMOE_SUCCESS);
    r.d.weights.noise_router = r.d.weights.router;
    if (has_state) {
        r.d.args.state = some_state(desc, r.layer);
        r.d.weights.select_bias = (clmoe_buf){NULL, 0}; /* the state's, then */
    }
    if (from != IDS_IN && !is_soft(desc))
        forward_losses(&r, has_state);
    routing_steps(&r);
    expert_steps(&r);
    OK(clmoe_forward(r.layer, test.queue, &r.d.args, 0, NULL, NULL));
    r.forward_plan = forward_region(&r, REGION_PLAN);
    r.forward_scores = forward_region(&r, REGION_SCORES);
    run_all(&r);
    CL_OK(clFinish(test.queue));
    compare_steps(&r);
    if (desc->training && !is_soft(desc))
        check_back_steps(&r);
}

/* ---- Tests ----------------------------------------------------------------------------------- */

/* Whether the layer takes such a batch. */
static bool allows(const clmoe_layer_desc *desc, bool has_state, source from) {
    if (is_soft(desc) && from != OWN_ROUTER)
        return false;
    if (desc->capacity.keep == CLMOE_KEEP_RANDOM && !has_state)
        return false;
    return !ref_lists_pairs(desc) || from != IDS_IN;
}

typedef enum training { NONE, KEPT, COMPUTED_AGAIN, TRAININGS } training;

static void set_training(clmoe_layer_desc *desc, training kind) {
    desc->training = kind != NONE;
    desc->recompute = desc->dye = kind == COMPUTED_AGAIN;
    desc->gradient_type = kind == COMPUTED_AGAIN ? CLMOE_GRADIENT_OF_WEIGHT : CLMOE_GRADIENT_F32;
}

/* Every batch that the layer takes. */
static void check_batches(const clmoe_layer_desc *desc, const char *name) {
    for (int has_state = 0; has_state < 2; has_state++)
        for (int from = OWN_ROUTER; from < SOURCES; from++) {
            test_case("engine %s, %s, training %u, recompute %u, state %d, source %d", desc->engine,
                      name, desc->training, desc->recompute, has_state, from);
            if (allows(desc, has_state, (source)from))
                check_steps(desc, has_state, (source)from);
        }
}

/* Of every kind, or of 16 bits the last. */
static void check_variants(const layer_variant *variants, size_t count, const char *engine,
                           clmoe_type type) {
    for (size_t i = 0; i < count; i++)
        for (int kind = type == CLMOE_F32 ? NONE : COMPUTED_AGAIN; kind < TRAININGS; kind++) {
            clmoe_layer_desc desc = desc_of(&small);
            variants[i].set(&desc);
            desc.engine = engine;
            desc.type = desc.weight_type = type;
            set_training(&desc, (training)kind);
            check_batches(&desc, variants[i].name);
        }
}

static void check_all(clmoe_type type) {
    const char *const *engines = test_engines_of(type, type);
    for (size_t n = 0; engines[n] != NULL; n++) {
        check_variants(layer_variants, num_layer_variants, engines[n], type);
        check_variants(routing_variants, num_routing_variants, engines[n], type);
        check_variants(backward_variants, num_backward_variants, engines[n], type);
    }
}

static void steps_of_f32(void **state) {
    (void)state;
    check_all(CLMOE_F32);
}

static void steps_of_bf16(void **state) {
    (void)state;
    check_all(CLMOE_BF16);
}

/* The usual steps are not those of Soft MoE. */
static void steps_of_soft_moe(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    desc.router.policy = CLMOE_POLICY_SOFT_MOE;
    desc.top_k = 1;
    const clmoe_dispatch_args usual = {.struct_size = sizeof usual, .tokens = small.tokens};
    check_error(clmoe_dispatch(test_layer(0, &desc), test.queue, &usual, 0, NULL, NULL),
                CLMOE_UNSUPPORTED, "Soft MoE", "no such step");
}

/* A step of a switch that the layer does not have. */
static void steps_of_other_layers(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    clmoe_layer *layer = test_layer(0, &desc);
    const clmoe_renorm_after_drop_args renorm = {.struct_size = sizeof renorm, .tokens = 1};
    const clmoe_jitter_args jitter = {.struct_size = sizeof jitter, .tokens = 1};
    const clmoe_shared_expert_args shared = {.struct_size = sizeof shared, .tokens = 1};
    const clmoe_soft_dispatch_args soft = {.struct_size = sizeof soft, .tokens = 1};
#define REFUSED(call, says)                                                                        \
    CHECK((call) == CLMOE_INVALID_ARGUMENT && strstr(clmoe_last_error(), says), "it says: %s\n",   \
          clmoe_last_error())
    REFUSED(clmoe_renorm_after_drop(layer, test.queue, &renorm, 0, NULL, NULL),
            "router.renorm.after_drop is 0");
    REFUSED(clmoe_jitter(layer, test.queue, &jitter, 0, NULL, NULL), "router.noise.jitter is 0");
    REFUSED(clmoe_shared_expert(layer, test.queue, &shared, 0, NULL, NULL),
            "shared.hidden_dim is 0");
    REFUSED(clmoe_soft_dispatch(layer, test.queue, &soft, 0, NULL, NULL), "not Soft MoE");
#undef REFUSED
}

/* Steps that a caller of single steps may forget, and that others cannot see. */
static void forgotten_steps(void **state) {
    (void)state;
    clmoe_layer_desc desc = desc_of(&small);
    desc.capacity.rows = 2;
    desc.router.renorm.kind = CLMOE_RENORM_SUM;
    desc.router.renorm.after_drop = 1;
    desc.router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    desc.router.noise.jitter = 0.1F;
    desc.router.noise.jitter_experts = 1;
    clmoe_layer *layer = test_layer(0, &desc);
    const clmoe_score_args score = {
        .struct_size = sizeof score, .tokens = small.tokens, .state = buf_new(4096)};
    const clmoe_experts_args experts = {.struct_size = sizeof experts, .tokens = small.tokens};
    const clmoe_combine_args combine = {.struct_size = sizeof combine, .tokens = small.tokens};
    check_error(clmoe_score(layer, test.queue, &score, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                "experts_jittered is 0", "clmoe_jitter()");
    check_error(clmoe_experts(layer, test.queue, &experts, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                "final_weights is 0", "clmoe_renorm_after_drop()");
    check_error(clmoe_combine(layer, test.queue, &combine, 0, NULL, NULL), CLMOE_INVALID_ARGUMENT,
                "final_weights is 0", "clmoe_renorm_after_drop()");
    CHECK(all_untouched(), "something was written\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(steps_of_f32),          TEST(steps_of_bf16),   TEST(steps_of_soft_moe),
        TEST(steps_of_other_layers), TEST(forgotten_steps),
    };
    return RUN(tests);
}
