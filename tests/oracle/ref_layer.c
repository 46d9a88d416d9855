/* The oracle's experts, combine, statistics and the whole layer; routing is in ref.c. */
#include "ref_places.h"
#include "ref_policy.h"
#include "ref_random.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *make(size_t count, size_t size) {
    void *block = calloc(count ? count : 1, size);
    if (block == NULL) {
        fprintf(stderr, "ref: out of memory\n");
        abort();
    }
    return block;
}

/* ---- experts ------------------------------------------------------------------------------- */

double ref_activate(const clmoe_mlp_desc *desc, double v) {
    const double pi = 3.14159265358979323846;
    switch (desc->activation) {
    case CLMOE_ACT_SILU:
        return v / (1.0 + exp(-(double)desc->alpha * v));
    case CLMOE_ACT_GELU_ERF:
        return v / 2.0 * (1.0 + erf(v / sqrt(2.0)));
    case CLMOE_ACT_GELU_TANH:
        return v / 2.0 * (1.0 + tanh(sqrt(2.0 / pi) * (v + 0.044715 * v * v * v)));
    case CLMOE_ACT_RELU:
        return fmax(v, 0.0);
    case CLMOE_ACT_RELU2:
        return fmax(v, 0.0) * fmax(v, 0.0);
    }
    return NAN;
}

/* Row n of the matrix [rows,cols] of an expert, times x; stored [cols,rows] if transposed. */
static double row_dot(const float *matrix, size_t expert, size_t rows, size_t cols, bool transposed,
                      size_t n, const double *x) {
    const float *m = matrix + expert * rows * cols;
    double sum = 0.0;
    for (size_t k = 0; k < cols; k++)
        sum += x[k] * (double)(transposed ? m[k * rows + n] : m[n * cols + k]);
    return sum;
}

/* Hidden value j before the activation: the gate (or 0 for plain) and up. */
static void gate_and_up(const clmoe_mlp_desc *desc, const ref_mlp_weights *w, size_t expert,
                        size_t dim, const double *x, size_t j, double *gate, double *up) {
    size_t H = desc->hidden_dim;
    bool transposed = desc->gate_up_transposed, bias = desc->gate_up_bias;
    bool fused =
        desc->gate_layout == CLMOE_GATE_CONCAT || desc->gate_layout == CLMOE_GATE_INTERLEAVED;
    if (fused) {
        bool concat = desc->gate_layout == CLMOE_GATE_CONCAT;
        size_t g = concat ? j : 2 * j, u = concat ? H + j : 2 * j + 1;
        *gate = row_dot(w->gate, expert, 2 * H, dim, transposed, g, x);
        *up = row_dot(w->gate, expert, 2 * H, dim, transposed, u, x);
        *gate += bias ? (double)w->gate_bias[expert * 2 * H + g] : 0.0;
        *up += bias ? (double)w->gate_bias[expert * 2 * H + u] : 0.0;
        return;
    }
    *gate = 0.0;
    if (desc->gate_layout == CLMOE_GATE_SEPARATE) {
        *gate = row_dot(w->gate, expert, H, dim, transposed, j, x);
        *gate += bias ? (double)w->gate_bias[expert * H + j] : 0.0;
    }
    *up = row_dot(w->up, expert, H, dim, transposed, j, x);
    *up += bias ? (double)w->up_bias[expert * H + j] : 0.0;
}

static double hidden(const clmoe_mlp_desc *desc, double gate, double up) {
    double limit = desc->limit > 0.0f ? (double)desc->limit : INFINITY;
    if (desc->gate_layout == CLMOE_GATE_NONE)
        return ref_activate(desc, up);
    double clamped = fmin(fmax(up, -limit), limit);
    return ref_activate(desc, fmin(gate, limit)) * (clamped + (double)desc->up_shift);
}

void ref_mlp(const clmoe_mlp_desc *desc, const ref_mlp_weights *weights, uint32_t expert,
             uint32_t dim, const double *x, const ref_scale *scale, double *out) {
    size_t H = desc->hidden_dim;
    double *h = make(H, sizeof *h);
    for (size_t j = 0; j < H; j++) {
        double gate, up;
        gate_and_up(desc, weights, expert, dim, x, j, &gate, &up);
        h[j] = hidden(desc, gate, up) * scale->weight * ref_dropout_factor(desc, scale, j);
    }
    for (size_t d = 0; d < dim; d++) {
        out[d] = row_dot(weights->down, expert, dim, H, desc->down_transposed, d, h);
        if (desc->down_bias)
            out[d] += (double)weights->down_bias[(size_t)expert * dim + d];
    }
    free(h);
}

/* v / |v|; a zero row stays zero. */
static void normalize(double *v, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += v[i] * v[i];
    for (size_t i = 0; i < n && sum > 0.0; i++)
        v[i] /= sqrt(sum);
}

void ref_expert_row(const clmoe_layer_desc *desc, const ref_weights *weights, uint32_t expert,
                    const double *x, const ref_scale *scale, double *out) {
    size_t D = desc->dim;
    clmoe_weight_at at = desc->router.weight_at;
    double *in = make(D, sizeof *in);
    ref_scale of_hidden = *scale;
    for (size_t d = 0; d < D; d++)
        in[d] = x[d] * (at == CLMOE_WEIGHT_AT_INPUT ? scale->weight : 1.0);
    if (at != CLMOE_WEIGHT_AT_ACTIVATION)
        of_hidden.weight = 1.0;
    ref_mlp(&desc->experts, &weights->experts, expert, desc->dim, in, &of_hidden, out);
    if (desc->normalize_experts)
        normalize(out, D);
    free(in);
}

void ref_expert(const clmoe_layer_desc *desc, const ref_weights *weights, uint32_t expert,
                const float *x, const ref_scale *scale, double *out) {
    double *in = make(desc->dim, sizeof *in);
    for (size_t d = 0; d < desc->dim; d++)
        in[d] = (double)x[d];
    ref_expert_row(desc, weights, expert, in, scale, out);
    free(in);
}

/* ---- stats --------------------------------------------------------------------------------- */

/* The fields over the E experts with weights. */
static void expert_stats(const clmoe_layer_desc *desc, const uint32_t *load, clmoe_stats *stats) {
    uint32_t E = desc->num_experts;
    double sum = 0.0, entropy = 0.0;
    stats->min_load = UINT32_MAX;
    for (uint32_t e = 0; e < E; e++) {
        sum += load[e];
        stats->idle_experts += load[e] == 0;
        stats->max_load = load[e] > stats->max_load ? load[e] : stats->max_load;
        stats->min_load = load[e] < stats->min_load ? load[e] : stats->min_load;
    }
    for (uint32_t e = 0; e < E; e++)
        if (load[e] > 0)
            entropy -= load[e] / sum * log(load[e] / sum);
    if (sum > 0.0)
        stats->max_violation = (float)(stats->max_load / (sum / E) - 1.0);
    stats->load_entropy = (float)entropy;
}

void ref_stats(const clmoe_layer_desc *desc, uint32_t tokens, const ref_plan *plan,
               const int32_t *live, const uint8_t *token_mask, clmoe_stats *stats) {
    uint32_t R = ref_columns(desc);
    memset(stats, 0, sizeof *stats);
    stats->version = 1;
    stats->columns = R;
    for (uint32_t t = 0; t < tokens; t++) {
        if (token_mask && token_mask[t] == 0)
            continue;
        stats->tokens++;
        stats->nonfinite_tokens += live && live[t] < (int32_t)desc->top_k;
    }
    for (uint32_t e = 0; e < R; e++) {
        stats->pairs += plan->load[e];
        stats->kept += plan->kept[e];
        stats->identity_pairs += e >= desc->num_experts ? plan->load[e] : 0;
    }
    stats->dropped = stats->pairs - stats->kept;
    expert_stats(desc, plan->load, stats);
}

/* ---- forward ------------------------------------------------------------------------------- */

/* Adds the shared expert's output for token t to y. */
static void add_shared(const clmoe_layer_desc *desc, const ref_forward_in *forward, size_t t,
                       double *y) {
    size_t D = desc->dim;
    const ref_weights *weights = forward->weights;
    const float *x = forward->x + t * D;
    const ref_scale scale = {1.0, forward->state, REF_SHARED_HIDDEN, (uint32_t)t};
    double *in = make(D, sizeof *in), *out = make(D, sizeof *out), gate = 0.0;
    for (size_t d = 0; d < D; d++) {
        in[d] = (double)x[d];
        gate += desc->shared_gate ? in[d] * (double)weights->shared_gate[d] : 0.0;
    }
    ref_mlp(&desc->shared, &weights->shared, 0, desc->dim, in, &scale, out);
    for (size_t d = 0; d < D; d++)
        y[d] += desc->shared_gate ? out[d] / (1.0 + exp(-gate)) : out[d];
    free(in);
    free(out);
}

/* Adds the routed experts' outputs for token t to y. */
static void add_routed(const clmoe_layer_desc *desc, const ref_forward_in *in, size_t t,
                       const ref_result *r, double *y) {
    size_t D = desc->dim, K = desc->top_k;
    const float *x = in->x + t * D;
    for (size_t d = 0; d < D && r->mixed; d++)
        y[d] += r->mixed[t * D + d];
    if (r->mixed)
        return;
    double *out = make(D, sizeof *out);
    size_t first = r->token_offsets ? (size_t)r->token_offsets[t] : t * K;
    size_t end = r->token_offsets ? (size_t)r->token_offsets[t + 1] : t * K + K;
    for (size_t p = first; p < end; p++) {
        double w = r->pair_weights[p];
        const ref_scale scaling = {w, in->state, REF_HIDDEN, (uint32_t)p};
        if (r->plan.slot_of[p] == -1)
            continue;
        bool identity = r->plan.slot_of[p] == -2;
        if (!identity)
            ref_expert(desc, in->weights, (uint32_t)r->ids[p], x, &scaling, out);
        bool scale = identity || desc->router.weight_at == CLMOE_WEIGHT_AT_OUTPUT;
        for (size_t d = 0; d < D; d++)
            y[d] += (scale ? w : 1.0) * (identity ? (double)x[d] : out[d]);
    }
    free(out);
}

static void outputs(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *r) {
    size_t D = desc->dim;
    for (size_t t = 0; t < in->tokens; t++) {
        double *y = r->y + t * D;
        for (size_t d = 0; d < D; d++)
            y[d] = in->residual ? (double)in->residual[t * D + d] : 0.0;
        if (in->token_mask && in->token_mask[t] == 0)
            continue;
        for (size_t d = 0; d < D && desc->output_bias; d++)
            y[d] += (double)in->weights->output_bias[d];
        add_routed(desc, in, t, r, y);
        if (desc->shared.hidden_dim)
            add_shared(desc, in, t, y);
    }
}

/* Plain token choice by the logits; the weights are of scores that are not rounded. */
static void choose(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *r) {
    size_t R = ref_columns(desc), K = desc->top_k, n = (size_t)in->tokens * R;
    float *f32 = make(n, sizeof *f32);
    ref_scores(desc, in->tokens, r->logits, r->scores);
    for (size_t i = 0; i < n; i++)
        f32[i] = (float)r->scores[i];
    r->live = make(in->tokens, sizeof *r->live);
    ref_topk(desc, in->tokens, f32, in->weights, r->ids, r->pair_weights, r->live);
    for (size_t t = 0; t < in->tokens; t++)
        ref_token_weights(desc, r->scores + t * R, r->ids + t * K, r->live[t], in->weights,
                          r->pair_weights + t * K);
    r->choice_gap = ref_choice_gap(desc, in->tokens, r->scores, in->weights);
    free(f32);
}

/* logits, scores, ids, pair_weights and live of a batch that is routed here. */
static void route(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *r) {
    size_t n = (size_t)in->tokens * ref_columns(desc);
    if (in->logits_in)
        for (size_t i = 0; i < n; i++)
            r->logits[i] = (double)in->logits_in[i];
    else
        ref_logits(desc, in->tokens, in->x, in->weights, r->logits);
    if (!ref_policy_route(desc, in, r))
        choose(desc, in, r);
    if (desc->router.rebalance.iterations && desc->top_k > 1)
        ref_rebalance(desc, in->tokens, desc->router.rebalance.iterations, r->ids, r->live,
                      in->token_mask, r->pair_weights);
}

/* The smallest relative distance of different pair weights, for rules that order by them. */
static double order_gap(const clmoe_layer_desc *desc, const double *w, size_t n) {
    double gap = INFINITY;
    if (desc->capacity.keep != CLMOE_KEEP_PRIORITY && desc->capacity.keep != CLMOE_KEEP_WEIGHT)
        return gap;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < i; j++)
            if (w[i] != w[j])
                gap = fmin(gap, fabs(w[i] - w[j]) / fmax(fabs(w[i]), fabs(w[j])));
    return gap;
}

static void forward_reroute(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *r) {
    size_t n = (size_t)in->tokens * ref_columns(desc);
    float *f32 = make(n, sizeof *f32);
    r->plan.rerouted_in = make(ref_columns(desc), sizeof *r->plan.rerouted_in);
    r->plan.rerouted_out = make(ref_columns(desc), sizeof *r->plan.rerouted_out);
    for (size_t i = 0; i < n; i++)
        f32[i] = (float)r->scores[i];
    ref_reroute_in args = {f32, r->live, in->token_mask, NULL, in->weights, r->scores};
    ref_rerouted rerouted = {0, r->plan.rerouted_in, r->plan.rerouted_out};
    ref_reroute(desc, in->tokens, &args, r->ids, r->pair_weights, &r->plan, &rerouted);
    free(f32);
}

static void forward_plan(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *r) {
    size_t pairs = ref_pairs(desc, in->tokens);
    uint32_t capacity = ref_capacity(desc, in->tokens);
    float *f32 = make(pairs, sizeof *f32);
    for (size_t p = 0; p < pairs; p++)
        f32[p] = (float)r->pair_weights[p];
    uint32_t rows = capacity * ref_sequences(desc, in->tokens);
    uint32_t slots = capacity ? desc->num_experts * rows : (uint32_t)pairs;
    ref_plan_in plan = {in->tokens,     slots,           1, r->ids, f32, r->live,
                        in->token_mask, r->token_offsets};
    ref_plan_places(desc, &plan, &r->plan);
    if (desc->capacity.overflow == CLMOE_OVERFLOW_REROUTE && !in->ids_in)
        forward_reroute(desc, in, r);
    r->order_gap = order_gap(desc, r->pair_weights, pairs);
    free(f32);
}

void ref_forward(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *result) {
    size_t T = in->tokens, R = ref_columns(desc), pairs = ref_pairs(desc, in->tokens);
    ref_result *r = result;
    memset(r, 0, sizeof *r);
    r->logits = make(T * R, sizeof *r->logits);
    r->scores = make(T * R, sizeof *r->scores);
    r->ids = make(pairs, sizeof *r->ids);
    r->pair_weights = make(pairs, sizeof *r->pair_weights);
    r->y = make(T * desc->dim, sizeof *r->y);
    r->choice_gap = INFINITY;
    if (desc->router.policy == CLMOE_POLICY_SOFT_MOE) {
        r->mixed = make(T * desc->dim, sizeof *r->mixed);
        ref_soft_moe(desc, in, r->mixed);
        outputs(desc, in, r);
        return;
    }
    if (in->ids_in)
        for (size_t p = 0; p < pairs; p++) {
            r->ids[p] = in->ids_in[p];
            r->pair_weights[p] = (double)in->pair_weights_in[p];
        }
    else
        route(desc, in, r);
    forward_plan(desc, in, r);
    if (desc->router.renorm.after_drop && !in->ids_in && !r->token_offsets)
        ref_renorm_after_drop(desc, in->tokens, r->ids, r->plan.slot_of, in->weights,
                              r->pair_weights);
    outputs(desc, in, r);
    ref_stats(desc, in->tokens, &r->plan, r->live, in->token_mask, &r->stats);
}

void ref_result_free(ref_result *result) {
    free(result->logits);
    free(result->scores);
    free(result->ids);
    free(result->pair_weights);
    free(result->live);
    free(result->token_offsets);
    free(result->mixed);
    free(result->y);
    ref_plan_free(&result->plan);
    memset(result, 0, sizeof *result);
}
