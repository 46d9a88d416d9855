/* The backward pass of a whole batch; its parts are in ref_backward_*.c. */
#include "ref_backward.h"
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

/* ---- Fields ---------------------------------------------------------------------------------- */

#define FIELD(name) {#name, offsetof(ref_weights, name), offsetof(ref_gradients, name)},

const ref_gradient_field ref_gradient_fields[REF_GRADIENT_FIELDS] = {REF_GRADIENT_LIST(FIELD)};

/* Elements of array 0 to 5 of an MLP. */
static size_t mlp_count(const clmoe_mlp_desc *mlp, size_t experts, size_t dim, size_t array) {
    size_t H = mlp->hidden_dim;
    bool fused =
        mlp->gate_layout == CLMOE_GATE_CONCAT || mlp->gate_layout == CLMOE_GATE_INTERLEAVED;
    size_t gate_rows = fused ? 2 * H : mlp->gate_layout == CLMOE_GATE_SEPARATE ? H : 0;
    size_t up_rows = fused ? 0 : H;
    size_t bias = H > 0 && mlp->gate_up_bias ? experts : 0;
    const size_t counts[] = {experts * gate_rows * dim,
                             experts * up_rows * dim,
                             experts * H * dim,
                             bias * gate_rows,
                             bias * up_rows,
                             H > 0 && mlp->down_bias ? experts * dim : 0};
    return counts[array];
}

size_t ref_gradient_count(const clmoe_layer_desc *desc, size_t field) {
    const clmoe_router_desc *router = &desc->router;
    size_t R = ref_columns(desc), D = desc->dim;
    if (field >= REF_SHARED)
        return mlp_count(&desc->shared, 1, D, field - REF_SHARED);
    if (field >= REF_EXPERTS)
        return mlp_count(&desc->experts, desc->num_experts, D, field - REF_EXPERTS);
    const size_t counts[] = {[REF_ROUTER] = ref_router_rows(desc) * D,
                             [REF_ROUTER_BIAS] = router->bias ? R : 0,
                             [REF_EXPERT_SCALE] = router->expert_scale ? R : 0,
                             [REF_SHARED_GATE] = desc->shared_gate ? D : 0,
                             [REF_OUTPUT_BIAS] = desc->output_bias ? D : 0,
                             [REF_GROUP_ROUTER] =
                                 router->groups.two_level ? router->groups.count * D : 0};
    return counts[field];
}

const float *ref_weights_field(const ref_weights *weights, size_t field) {
    const float *values;
    memcpy(&values, (const char *)weights + ref_gradient_fields[field].weights, sizeof values);
    return values;
}

double *ref_gradients_field(const ref_gradients *gradients, size_t field) {
    double *values;
    memcpy(&values, (const char *)gradients + ref_gradient_fields[field].gradient, sizeof values);
    return values;
}

/* ---- Pairs ----------------------------------------------------------------------------------- */

static bool is_masked(const ref_forward_in *in, size_t t) {
    return in->token_mask && in->token_mask[t] == 0;
}

/* Pair p of a token: from dy [D] to dx [D], the weights of its expert, and dpair_weights. */
static void pair_backward(const ref_backward_layer *layer, const ref_backward_in *in, size_t p,
                          const double *x, const double *dy, ref_backward_result *r, double *dx) {
    size_t D = layer->desc->dim;
    double w = in->result->pair_weights[p], dw = 0.0;
    if (in->result->plan.slot_of[p] == -1)
        return;
    if (in->result->plan.slot_of[p] == -2) {
        for (size_t d = 0; d < D; d++) {
            dx[d] += w * dy[d];
            r->dpair_weights[p] += x[d] * dy[d];
        }
        return;
    }
    uint32_t expert = (uint32_t)in->result->ids[p];
    bool at_output = layer->desc->router.weight_at == CLMOE_WEIGHT_AT_OUTPUT;
    double *out = make(D, sizeof *out), *dout = make(D, sizeof *dout);
    const ref_scale scale = {w, in->forward->state, REF_HIDDEN, (uint32_t)p};
    ref_expert_row(layer->desc, layer->weights, expert, x, &scale, out);
    for (size_t d = 0; d < D; d++) {
        dw += at_output ? dy[d] * out[d] : 0.0;
        dout[d] = (at_output ? w : 1.0) * dy[d];
        dout[d] += in->dye ? (double)in->dye[p * D + d] : 0.0;
    }
    r->dpair_weights[p] = dw + ref_expert_backward(layer, expert, x, &scale, dout, dx);
    free(out);
    free(dout);
}

static void pairs_backward(const ref_backward_layer *layer, const ref_backward_in *in,
                           ref_backward_result *r) {
    size_t D = layer->desc->dim, K = layer->desc->top_k;
    double *x = make(D, sizeof *x), *dy = make(D, sizeof *dy);
    const int32_t *offsets = in->result->token_offsets;
    for (size_t t = 0; t < in->forward->tokens; t++) {
        size_t first = offsets ? (size_t)offsets[t] : t * K;
        size_t end = offsets ? (size_t)offsets[t + 1] : t * K + K;
        for (size_t d = 0; d < D; d++) {
            x[d] = (double)in->forward->x[t * D + d];
            dy[d] = (double)in->dy[t * D + d];
        }
        for (size_t p = first; p < end; p++)
            pair_backward(layer, in, p, x, dy, r, r->dx + t * D);
    }
    free(x);
    free(dy);
}

/* ---- Routers --------------------------------------------------------------------------------- */

/* logits = x W^T: the gradient d of one of them, to dx [D] and to the row's gradient [D]. */
static void logit_backward(size_t D, const float *x, const float *w, double d, double *dx,
                           double *dw) {
    for (size_t i = 0; i < D; i++) {
        dx[i] += d * (double)w[i];
        dw[i] += d * (double)x[i];
    }
}

/* dlogits and dgroup_logits, to which those of the losses are added, -> dx and the routers. */
static void routers_backward(const clmoe_layer_desc *desc, const ref_backward_in *in,
                             ref_backward_result *r) {
    const ref_weights *w = in->forward->weights;
    size_t R = ref_columns(desc), D = desc->dim;
    size_t G = desc->router.groups.two_level ? desc->router.groups.count : 0;
    for (size_t t = 0; t < in->forward->tokens; t++) {
        const float *x = in->forward->x + t * D;
        double *dx = r->dx + t * D;
        if (is_masked(in->forward, t))
            continue;
        for (size_t i = t * R; i < (t + 1) * R; i++) {
            if (!isfinite(in->result->logits[i]))
                continue;
            r->dlogits[i] += in->dlogits ? (double)in->dlogits[i] : 0.0;
            if (in->forward->logits_in)
                continue;
            logit_backward(D, x, w->router + i % R * D, r->dlogits[i], dx,
                           r->gradients.router + i % R * D);
            if (desc->router.bias)
                r->gradients.router_bias[i % R] += r->dlogits[i];
        }
        for (size_t g = 0; g < G; g++) {
            double *d = r->dgroup_logits + t * G + g;
            *d += in->dgroup_logits ? (double)in->dgroup_logits[t * G + g] : 0.0;
            logit_backward(D, x, w->group_router + g * D, *d, dx,
                           r->gradients.group_router + g * D);
        }
    }
}

/* ---- What every token passes ----------------------------------------------------------------- */

/* The shared expert on the token's row x [D]. */
static void shared_backward(const ref_backward_layer *layer, const double *x,
                            const ref_scale *scale, const double *dy, double *dx) {
    const clmoe_layer_desc *desc = layer->desc;
    size_t D = desc->dim;
    double *out = make(D, sizeof *out), *dout = make(D, sizeof *dout), gate = 0.0, dgate = 0.0;
    for (size_t d = 0; d < D; d++)
        gate += desc->shared_gate ? x[d] * (double)layer->weights->shared_gate[d] : 0.0;
    double share = desc->shared_gate ? ref_sigmoid(gate) : 1.0;
    ref_mlp(&desc->shared, &layer->weights->shared, 0, desc->dim, x, scale, out);
    for (size_t d = 0; d < D; d++) {
        dout[d] = share * dy[d];
        dgate += dy[d] * out[d] * share * (1.0 - share);
    }
    for (size_t d = 0; d < D && desc->shared_gate; d++) {
        dx[d] += dgate * (double)layer->weights->shared_gate[d];
        layer->gradients->shared_gate[d] += dgate * x[d];
    }
    ref_shared_backward(layer, x, scale, dout, dx);
    free(out);
    free(dout);
}

static void rest_backward(const ref_backward_layer *layer, const ref_backward_in *in,
                          ref_backward_result *r) {
    size_t D = layer->desc->dim;
    double *x = make(D, sizeof *x), *dy = make(D, sizeof *dy);
    for (size_t t = 0; t < in->forward->tokens; t++) {
        if (is_masked(in->forward, t))
            continue;
        for (size_t d = 0; d < D; d++) {
            x[d] = (double)in->forward->x[t * D + d];
            dy[d] = (double)in->dy[t * D + d];
            if (layer->desc->output_bias)
                r->gradients.output_bias[d] += dy[d];
        }
        const ref_scale scale = {1.0, in->forward->state, REF_SHARED_HIDDEN, (uint32_t)t};
        if (layer->desc->shared.hidden_dim)
            shared_backward(layer, x, &scale, dy, r->dx + t * D);
    }
    free(x);
    free(dy);
}

/* ---- All of it ------------------------------------------------------------------------------- */

void ref_backward(const clmoe_layer_desc *desc, const ref_backward_in *in,
                  ref_backward_result *result) {
    ref_backward_result *r = result;
    size_t T = in->forward->tokens;
    memset(r, 0, sizeof *r);
    r->dx = make(T * desc->dim, sizeof *r->dx);
    r->dlogits = make(T * ref_columns(desc), sizeof *r->dlogits);
    r->dgroup_logits = make(T * desc->router.groups.count, sizeof *r->dgroup_logits);
    r->dpair_weights = make(ref_pairs(desc, in->forward->tokens), sizeof *r->dpair_weights);
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++) {
        double *values = make(ref_gradient_count(desc, i), sizeof *values);
        memcpy((char *)&r->gradients + ref_gradient_fields[i].gradient, &values, sizeof values);
    }
    ref_backward_layer layer = {desc, in->forward->weights, &r->gradients};
    rest_backward(&layer, in, r);
    if (desc->router.policy == CLMOE_POLICY_SOFT_MOE) {
        ref_backward_soft_moe(desc, in, r);
        return;
    }
    pairs_backward(&layer, in, r);
    if (in->forward->ids_in)
        return;
    ref_backward_weights(desc, in, r);
    routers_backward(desc, in, r);
}

void ref_backward_free(ref_backward_result *result) {
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++)
        free(ref_gradients_field(&result->gradients, i));
    free(result->dx);
    free(result->dlogits);
    free(result->dgroup_logits);
    free(result->dpair_weights);
    memset(result, 0, sizeof *result);
}
