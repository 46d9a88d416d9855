/* Weights, plans and whole batches: the device's and the oracle's. */
#include "ref_places.h"
#include "support.h"

#include <stdlib.h>
#include <string.h>

#define F32 sizeof(float)

clmoe_layer_desc desc_of(const shape *s) {
    clmoe_layer_desc desc;
    clmoe_layer_desc_init(&desc);
    desc.dim = s->dim;
    desc.num_experts = s->experts;
    desc.num_identity_experts = s->identity;
    desc.top_k = s->top_k;
    desc.experts.hidden_dim = s->hidden_dim;
    desc.engine = "ref";
    desc.balance.enabled = 1;
    return desc;
}

/* ---- Weights ------------------------------------------------------------------------------- */

/* Element counts of an MLP's arrays; 0 where the descriptor asks for none. */
typedef struct mlp_sizes {
    size_t gate, up, down, gate_bias, up_bias, down_bias;
} mlp_sizes;

static mlp_sizes sizes_of(const clmoe_mlp_desc *mlp, size_t experts, size_t dim) {
    size_t H = mlp->hidden_dim;
    bool fused =
        mlp->gate_layout == CLMOE_GATE_CONCAT || mlp->gate_layout == CLMOE_GATE_INTERLEAVED;
    size_t gate_rows = fused ? 2 * H : mlp->gate_layout == CLMOE_GATE_SEPARATE ? H : 0;
    size_t up_rows = fused ? 0 : H;
    size_t bias = mlp->gate_up_bias ? experts : 0;
    return (mlp_sizes){.gate = experts * gate_rows * dim,
                       .up = experts * up_rows * dim,
                       .down = experts * dim * H,
                       .gate_bias = bias * gate_rows,
                       .up_bias = bias * up_rows,
                       .down_bias = mlp->down_bias ? experts * dim : 0};
}

/* Random values that `type` can hold. */
static const float *some(clmoe_type type, size_t n, double deviation) {
    if (n == 0)
        return NULL;
    float *values = random_floats(n, deviation);
    round_all(type, values, n);
    return values;
}

static ref_mlp_weights mlp_make(clmoe_type type, const clmoe_mlp_desc *mlp, size_t experts,
                                size_t dim) {
    if (mlp->hidden_dim == 0)
        return (ref_mlp_weights){0};
    mlp_sizes n = sizes_of(mlp, experts, dim);
    return (ref_mlp_weights){.gate = some(type, n.gate, 0.3),
                             .up = some(type, n.up, 0.3),
                             .down = some(type, n.down, 0.3),
                             .gate_bias = some(type, n.gate_bias, 0.5),
                             .up_bias = some(type, n.up_bias, 0.5),
                             .down_bias = some(type, n.down_bias, 0.5)};
}

ref_weights weights_make(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
    size_t R = ref_columns(desc), D = desc->dim;
    ref_weights w = {0};
    size_t rows = ref_router_rows(desc);
    float *matrix = random_eighths(rows * D, 0.4);
    round_all(router->weight_type, matrix, rows * D);
    w.router = matrix;
    w.router_bias = router->bias ? random_eighths(R, 0.5) : NULL;
    w.select_bias = some(CLMOE_F32, router->select_bias ? R : 0, 0.3);
    w.expert_scale = some(CLMOE_F32, router->expert_scale ? R : 0, 1.0);
    w.experts = mlp_make(desc->weight_type, &desc->experts, desc->num_experts, D);
    w.shared = mlp_make(desc->weight_type, &desc->shared, 1, D);
    w.shared_gate = some(router->weight_type, desc->shared_gate ? D : 0, 0.3);
    w.output_bias = some(desc->weight_type, desc->output_bias ? D : 0, 0.5);
    w.group_router =
        some(router->weight_type, router->groups.two_level ? router->groups.count * D : 0, 0.4);
    return w;
}

static clmoe_mlp_weights mlp_upload(clmoe_type type, const clmoe_mlp_desc *mlp, size_t experts,
                                    size_t dim, const ref_mlp_weights *w) {
    mlp_sizes n = sizes_of(mlp, experts, dim);
    return (clmoe_mlp_weights){.gate = buf_of_type(type, w->gate, n.gate),
                               .up = buf_of_type(type, w->up, n.up),
                               .down = buf_of_type(type, w->down, n.down),
                               .gate_bias = buf_of_type(type, w->gate_bias, n.gate_bias),
                               .up_bias = buf_of_type(type, w->up_bias, n.up_bias),
                               .down_bias = buf_of_type(type, w->down_bias, n.down_bias)};
}

clmoe_weights weights_upload(const clmoe_layer_desc *desc, const ref_weights *w) {
    size_t R = ref_columns(desc), D = desc->dim;
    return (clmoe_weights){
        .router =
            buf_of_type(desc->router.weight_type, w->router, (size_t)ref_router_rows(desc) * D),
        .router_bias = buf_of(w->router_bias, R * F32),
        .select_bias = buf_of(w->select_bias, R * F32),
        .expert_scale = buf_of(w->expert_scale, R * F32),
        .experts = mlp_upload(desc->weight_type, &desc->experts, desc->num_experts, D, &w->experts),
        .shared = mlp_upload(desc->weight_type, &desc->shared, 1, D, &w->shared),
        .shared_gate = buf_of_type(desc->router.weight_type, w->shared_gate, D),
        .output_bias = buf_of_type(desc->weight_type, w->output_bias, D),
        .group_router = buf_of_type(desc->router.weight_type, w->group_router,
                                    (size_t)desc->router.groups.count * D),
    };
}

/* ---- Plans --------------------------------------------------------------------------------- */

clmoe_buf scratch_of(clmoe_layer *layer, uint32_t tokens) {
    size_t saved = 0, scratch = 0;
    OK(clmoe_layer_memory(layer, tokens, &saved, &scratch));
    return scratch ? buf_new(scratch) : (clmoe_buf){NULL, 0};
}

clmoe_buf plan_run(clmoe_layer *layer, const clmoe_layer_desc *desc, ref_plan_in *in,
                   clmoe_plan_layout *layout) {
    size_t T = in->tokens, pairs = ref_pairs(desc, in->tokens);
    OK(clmoe_plan_layout_get(layer, in->tokens, layout));
    in->slots = layout->slots;
    in->row_tile = layout->row_tile;
    clmoe_plan_args args = {
        .struct_size = sizeof args,
        .tokens = in->tokens,
        .ids = buf_of(in->ids, pairs * 4),
        .pair_weights = buf_of(in->pair_weights, pairs * F32),
        .live = buf_of(in->live, T * 4),
        .token_mask = buf_of(in->token_mask, T),
        .token_offsets = buf_of(in->token_offsets, (T + 1) * 4),
        .scratch = scratch_of(layer, in->tokens),
        .plan = buf_new(layout->bytes),
    };
    OK(clmoe_plan(layer, test.queue, &args, 0, NULL, NULL));
    return args.plan;
}

static void free_plan(void *plan) {
    ref_plan_free(plan);
}

const ref_plan *plan_reference(const clmoe_layer_desc *desc, const ref_plan_in *in) {
    ref_plan *plan = HOST(ref_plan, 1);
    clean_later(free_plan, plan);
    ref_plan_places(desc, in, plan);
    return plan;
}

void route_random(const clmoe_layer_desc *desc, uint32_t tokens, pattern kind, ref_plan_in *in) {
    size_t pairs = (size_t)tokens * desc->top_k;
    float *scores = pattern_scores(kind, tokens, ref_columns(desc));
    int32_t *ids = HOST(int32_t, pairs), *live = HOST(int32_t, tokens);
    double *wide = HOST(double, pairs);
    float *weights = HOST(float, pairs);
    clmoe_layer_desc plain = *desc;
    plain.router = (clmoe_router_desc){.scale = 1.0f, .renorm.after_drop = 1};
    ref_topk(&plain, tokens, scores, NULL, ids, wide, live);
    for (size_t p = 0; p < pairs; p++)
        weights[p] = (float)wide[p];
    *in = (ref_plan_in){.tokens = tokens, .ids = ids, .pair_weights = weights, .live = live};
}

/* ---- Whole batches ------------------------------------------------------------------------- */

void batch_make(batch *b, const clmoe_layer_desc *desc, uint32_t tokens) {
    memset(b, 0, sizeof *b);
    b->desc = *desc;
    b->weights = weights_make(desc);
    float *x = random_eighths((size_t)tokens * desc->dim, 1.0);
    round_all(desc->type, x, (size_t)tokens * desc->dim);
    b->in = (ref_forward_in){.tokens = tokens, .weights = &b->weights, .x = x};
}

static void free_result(void *result) {
    ref_result_free(result);
}

const ref_result *batch_reference(const batch *b) {
    ref_result *result = HOST(ref_result, 1);
    clean_later(free_result, result);
    ref_forward(&b->desc, &b->in, result);
    return result;
}

void batch_upload(clmoe_layer *layer, const batch *b, device_batch *d) {
    const ref_forward_in *in = &b->in;
    size_t T = in->tokens, D = b->desc.dim, R = ref_columns(&b->desc);
    size_t pairs = ref_pairs(&b->desc, in->tokens);
    clmoe_type type = b->desc.type;
    bool all = !b->no_outputs && b->desc.router.policy != CLMOE_POLICY_SOFT_MOE;
    size_t saved = 0, scratch = 0;
    OK(clmoe_layer_memory(layer, in->tokens, &saved, &scratch));
    d->weights = weights_upload(&b->desc, &b->weights);
    clmoe_forward_args_init(&d->args);
    clmoe_forward_args *args = &d->args;
    args->tokens = in->tokens;
    args->weights = &d->weights;
    args->x = buf_of_type(type, in->x, T * D);
    args->token_mask = buf_of(in->token_mask, T);
    args->residual = buf_of_type(type, in->residual, T * D);
    args->logits_in = buf_of(in->logits_in, T * R * F32);
    args->ids_in = buf_of(in->ids_in, pairs * 4);
    args->pair_weights_in = buf_of(in->pair_weights_in, pairs * F32);
    args->saved = saved ? buf_new(saved) : (clmoe_buf){NULL, 0};
    args->scratch = scratch ? buf_new(scratch) : (clmoe_buf){NULL, 0};
    args->y = buf_new_type(type, T * D);
    if (all && !in->ids_in && !in->logits_in)
        args->logits = buf_new(T * R * F32);
    if (all && !in->ids_in) {
        args->ids = buf_new(pairs * 4);
        args->pair_weights = buf_new(pairs * F32);
        if (ref_lists_pairs(&b->desc))
            args->token_offsets = buf_new((T + 1) * 4);
    }
    if (all)
        args->stats = buf_new(stats_size(layer));
}

void compare_stats(const uint32_t *got, const clmoe_stats *want, const ref_plan *plan) {
    size_t R = want->columns, header = sizeof *want / 4;
    clmoe_stats stats;
    memcpy(&stats, got, sizeof stats);
    compare_ints("stats", &stats.tokens, &want->tokens,
                 (offsetof(clmoe_stats, max_violation) - offsetof(clmoe_stats, tokens)) / 4);
    double floats[] = {(double)want->max_violation, (double)want->load_entropy};
    compare_floats("stats.max_violation", &stats.max_violation, &floats[0], 1, STEP_TOLERANCE);
    compare_floats("stats.load_entropy", &stats.load_entropy, &floats[1], 1, STEP_TOLERANCE);
    compare_ints("stats load", got + header, plan->load, R);
    compare_ints("stats kept", got + header + R, plan->kept, R);
    for (size_t e = 0; e < R; e++) {
        uint32_t in = plan->rerouted_in ? plan->rerouted_in[e] : 0;
        uint32_t out = plan->rerouted_out ? plan->rerouted_out[e] : 0;
        CHECK(got[header + 2 * R + e] == plan->load[e] - (plan->kept[e] - in) - out,
              "dropped[%zu] is %u\n", e, got[header + 2 * R + e]);
        CHECK(got[header + 3 * R + e] == in, "rerouted[%zu] is %u\n", e, got[header + 3 * R + e]);
    }
}

void batch_compare(const batch *b, const device_batch *d, const ref_result *want) {
    size_t T = b->in.tokens, pairs = ref_pairs(&b->desc, b->in.tokens);
    const clmoe_forward_args *args = &d->args;
    if (args->logits.mem)
        compare_floats("logits", buf_get(args->logits), want->logits, T * want->stats.columns,
                       STEP_TOLERANCE);
    if (args->token_offsets.mem) {
        compare_ints("token_offsets", buf_get(args->token_offsets), want->token_offsets, T + 1);
        compare_ints("ids", buf_get(args->ids), want->ids, pairs);
    } else if (args->ids.mem)
        compare_ids(&b->desc, b->in.tokens, buf_get(args->ids), want->ids, want->live);
    if (args->pair_weights.mem)
        compare_floats("weights", buf_get(args->pair_weights), want->pair_weights, pairs,
                       FORWARD_TOLERANCE);
    if (args->stats.mem)
        compare_stats(buf_get(args->stats), &want->stats, &want->plan);
    size_t elements = T * b->desc.dim;
    compare_floats("y", buf_get_type(args->y, b->desc.type, elements), want->y, elements,
                   type_tolerance(b->desc.type));
}

void batch_run(clmoe_layer *layer, const batch *b, device_batch *d) {
    batch_upload(layer, b, d);
    OK(clmoe_forward(layer, test.queue, &d->args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
}

void weights_pack(clmoe_layer *layer, clmoe_mlp mlp, clmoe_mlp_weights *weights) {
    size_t bytes = 0;
    OK(clmoe_packed_size(layer, mlp, &bytes));
    support_aligned =
        true; /* nv_wgmma wants multiples of 16; test_gemm has the others' elsewhere */
    clmoe_buf packed = buf_new(bytes);
    support_aligned = false;
    const clmoe_pack_args args = {
        .struct_size = sizeof args, .mlp = mlp, .raw = weights, .packed = packed};
    OK(clmoe_pack_weights(layer, test.queue, &args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    weights->gate = weights->up = weights->down = (clmoe_buf){NULL, 0};
    weights->packed = packed;
}
