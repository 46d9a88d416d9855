/* From the combine weights of a batch to its logits, backwards. */
#include "ref_backward.h"

#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static void *make(size_t count, size_t size) {
    void *block = calloc(count ? count : 1, size);
    if (block == NULL) {
        fprintf(stderr, "ref: out of memory\n");
        abort();
    }
    return block;
}

/* ---- Forward values -------------------------------------------------------------------------- */

/* A batch and one of its tokens: its `n` real pairs, from `first` on. */
typedef struct token {
    const clmoe_layer_desc *desc;
    const ref_backward_in *in;
    size_t t, first, n;
} token;

static token token_of(const clmoe_layer_desc *desc, const ref_backward_in *in, size_t t) {
    const ref_result *r = in->result;
    const uint8_t *mask = in->forward->token_mask;
    token of = {desc, in, t, t * desc->top_k, desc->top_k};
    if (r->token_offsets) {
        of.first = (size_t)r->token_offsets[t];
        of.n = (size_t)r->token_offsets[t + 1] - of.first;
    } else if (r->live && (size_t)r->live[t] < of.n)
        of.n = (size_t)r->live[t];
    if (mask && mask[t] == 0)
        of.n = 0;
    return of;
}

static size_t column_of(const token *of, size_t k) {
    return (size_t)of->in->result->ids[of->first + k];
}

/* Whether its pair lost its weight with its place. */
static bool is_dropped(const token *of, size_t k) {
    return of->desc->router.renorm.after_drop && of->in->result->plan.slot_of[of->first + k] == -1;
}

/* Whether the score function sees the chosen logits alone. */
static bool scores_the_chosen(const clmoe_router_desc *router) {
    return router->policy == CLMOE_POLICY_TOKEN_CHOICE && !router->groups.two_level &&
           router->order == CLMOE_ORDER_TOPK_THEN_SCORE;
}

/* l, what the score function is given, and its derivative by the logit. */
static double prepared(const clmoe_router_desc *router, double logit, double *slope) {
    double c = (double)router->softcap, temperature = (double)router->temperature;
    double capped = c > 0.0 ? c * tanh(logit / c) : logit;
    double l = capped / temperature;
    *slope = (c > 0.0 ? 1.0 - capped / c * (capped / c) : 1.0) / temperature;
    if (fabs(l) > FLT_MAX)
        *slope = 0.0;
    return fmin(fmax(l, -FLT_MAX), FLT_MAX);
}

/* Sparsemixer: p [R], the share of each logit that counts for choice k; its weight is p of it. */
static void sparsemixer_shares(const token *of, size_t k, double *p) {
    size_t R = ref_columns(of->desc);
    const double *row = of->in->result->scores + of->t * R;
    double limit = 2.0 * (double)of->desc->router.sparsemixer_eps, m = row[column_of(of, k)];
    double sum = 0.0;
    for (size_t e = 0; e < R; e++) {
        bool counts = isfinite(row[e]) && m - row[e] <= limit * fmax(fabs(row[e]), m);
        for (size_t before = 0; before < k; before++)
            counts = counts && column_of(of, before) != e;
        p[e] = counts ? exp(row[e] - m) : 0.0;
        sum += p[e];
    }
    for (size_t e = 0; e < R; e++)
        p[e] /= sum;
}

static void sparsemixer_weights(const token *of, double *raw) {
    double *p = make(ref_columns(of->desc), sizeof *p);
    for (size_t k = 0; k < of->n; k++) {
        sparsemixer_shares(of, k, p);
        raw[k] = p[column_of(of, k)];
    }
    free(p);
}

/* raw [n]: the weights before renorm and scale. */
static void raw_weights(const token *of, double *raw) {
    const clmoe_router_desc *router = &of->desc->router;
    const double *row = of->in->result->scores + of->t * ref_columns(of->desc);
    double best = -INFINITY, sum = 0.0, slope;
    if (router->score == CLMOE_SCORE_SPARSEMIXER) {
        sparsemixer_weights(of, raw);
        return;
    }
    for (size_t k = 0; k < of->n; k++) {
        raw[k] = row[column_of(of, k)];
        best = fmax(best, raw[k]);
    }
    if (!scores_the_chosen(router))
        return;
    for (size_t k = 0; k < of->n; k++)
        sum += exp(raw[k] - best);
    for (size_t k = 0; k < of->n; k++)
        raw[k] = router->score == CLMOE_SCORE_SOFTMAX ? exp(raw[k] - best) / sum
                                                      : ref_score(router->score, raw[k], &slope);
}

/* What divides the raw weights, and its derivative by each; infinite where their sum is 0. */
static double divisor(const token *of, const double *raw, double *slope) {
    const clmoe_renorm_desc *renorm = &of->desc->router.renorm;
    double p = (double)renorm->p, sum = 0.0;
    bool by_sum = renorm->kind == CLMOE_RENORM_SUM;
    for (size_t k = 0; k < of->n; k++)
        if (!is_dropped(of, k))
            sum += by_sum ? raw[k] : pow(fabs(raw[k]), p);
    for (size_t k = 0; k < of->n; k++) {
        slope[k] = by_sum ? 1.0 : 0.0;
        if (renorm->kind == CLMOE_RENORM_PNORM && raw[k] != 0.0 && sum > 0.0)
            slope[k] = copysign(pow(fabs(raw[k]), p - 1.0) * pow(sum, 1.0 / p - 1.0), raw[k]);
    }
    if (renorm->kind == CLMOE_RENORM_NONE)
        return 1.0;
    if (sum == 0.0)
        return INFINITY;
    return by_sum ? sum + (double)renorm->eps : pow(sum, 1.0 / p);
}

static double scale_of(const token *of, size_t k) {
    const float *expert_scale = of->in->forward->weights->expert_scale;
    double scale = (double)of->desc->router.scale;
    return of->desc->router.expert_scale ? scale * (double)expert_scale[column_of(of, k)] : scale;
}

/* ---- Backward -------------------------------------------------------------------------------- */

/* dw [n], of the weights after renorm and scale -> of those before, in place. */
static void finish_backward(const token *of, const double *raw, double *dw, double *dscale) {
    double *slope = make(of->n, sizeof *slope), dby = 0.0;
    double by = divisor(of, raw, slope);
    for (size_t k = 0; k < of->n; k++) {
        if (is_dropped(of, k))
            dw[k] = 0.0;
        if (of->desc->router.expert_scale)
            dscale[column_of(of, k)] += dw[k] * raw[k] / by * (double)of->desc->router.scale;
        dw[k] *= scale_of(of, k);
        dby -= dw[k] * raw[k] / by / by;
    }
    for (size_t k = 0; k < of->n; k++)
        dw[k] = is_dropped(of, k) ? 0.0 : dw[k] / by + dby * slope[k];
    free(slope);
}

/* p [n] of a softmax and the gradient d of p -> that of what it was taken of, in place. */
static void softmax_backward(const double *p, size_t n, double *d) {
    double mean = 0.0;
    for (size_t i = 0; i < n; i++)
        mean += p[i] > 0.0 ? p[i] * d[i] : 0.0;
    for (size_t i = 0; i < n; i++)
        d[i] = p[i] > 0.0 ? p[i] * (d[i] - mean) : 0.0;
}

/* values [n] -> softmax of the finite ones, the others 0. */
static void softmax(const double *values, size_t n, double *p) {
    double best = -INFINITY, sum = 0.0;
    for (size_t i = 0; i < n; i++)
        best = isfinite(values[i]) ? fmax(best, values[i]) : best;
    for (size_t i = 0; i < n; i++) {
        p[i] = isfinite(values[i]) ? exp(values[i] - best) : 0.0;
        sum += p[i];
    }
    for (size_t i = 0; i < n && sum > 0.0; i++)
        p[i] /= sum;
}

/* Group logits of token t: x Wg^T. */
static void group_logits(const token *of, double *logits) {
    const ref_forward_in *forward = of->in->forward;
    size_t D = of->desc->dim;
    for (size_t g = 0; g < of->desc->router.groups.count; g++) {
        logits[g] = 0.0;
        for (size_t d = 0; d < D; d++)
            logits[g] += (double)forward->x[of->t * D + d] *
                         (double)forward->weights->group_router[g * D + d];
    }
}

/* d [R], of the scores of two levels -> of l, in place; that of the group logits is added. */
static void two_level_backward(const token *of, const double *l, double *d, double *dgroups) {
    size_t R = ref_columns(of->desc), G = of->desc->router.groups.count, n = R / G;
    double *gate = make(G, sizeof *gate), *dgate = make(G, sizeof *dgate);
    double *within = make(n, sizeof *within);
    group_logits(of, gate);
    softmax(gate, G, gate);
    for (size_t g = 0; g < G; g++) {
        softmax(l + g * n, n, within);
        for (size_t i = 0; i < n; i++) {
            dgate[g] += within[i] * d[g * n + i];
            d[g * n + i] *= gate[g];
        }
        softmax_backward(within, n, d + g * n);
    }
    softmax_backward(gate, G, dgate);
    for (size_t g = 0; g < G; g++)
        dgroups[g] += dgate[g];
    free(gate);
    free(dgate);
    free(within);
}

/* d [R], of the raw weights by column -> of l, in place. */
static void sparsemixer_backward(const token *of, double *d) {
    size_t R = ref_columns(of->desc);
    double *p = make(R, sizeof *p), *sum = make(R, sizeof *sum);
    for (size_t k = 0; k < of->n; k++) {
        size_t chosen = column_of(of, k);
        sparsemixer_shares(of, k, p);
        for (size_t e = 0; e < R; e++)
            sum[e] += d[chosen] * p[chosen] * ((e == chosen ? 1.0 : 0.0) - p[e]);
    }
    for (size_t e = 0; e < R; e++)
        d[e] = sum[e];
    free(p);
    free(sum);
}

/* The same of the other score functions; raw [n] are the weights. */
static void score_backward(const token *of, const double *raw, const double *l, double *d) {
    const clmoe_router_desc *router = &of->desc->router;
    size_t R = ref_columns(of->desc);
    double *p = make(R, sizeof *p), slope;
    if (router->score != CLMOE_SCORE_SOFTMAX) {
        for (size_t e = 0; e < R; e++) {
            ref_score(router->score, l[e], &slope);
            d[e] *= d[e] != 0.0 ? slope : 1.0;
        }
    } else if (scores_the_chosen(router)) {
        for (size_t k = 0; k < of->n; k++)
            p[column_of(of, k)] = raw[k];
        softmax_backward(p, R, d);
    } else {
        softmax(l, R, p);
        softmax_backward(p, R, d);
    }
    free(p);
}

/* dw [n], of the token's weights -> what is added to its row of dlogits and dgroup_logits. */
static void token_backward(const token *of, double *dw, ref_backward_result *r) {
    const clmoe_router_desc *router = &of->desc->router;
    size_t R = ref_columns(of->desc);
    const double *logits = of->in->result->logits + of->t * R;
    double *raw = make(of->n, sizeof *raw), *d = make(R, sizeof *d);
    double *l = make(R, sizeof *l), *slope = make(R, sizeof *slope);
    raw_weights(of, raw);
    finish_backward(of, raw, dw, r->gradients.expert_scale);
    for (size_t k = 0; k < of->n; k++)
        d[column_of(of, k)] = dw[k];
    for (size_t e = 0; e < R; e++)
        l[e] = isfinite(logits[e]) ? prepared(router, logits[e], &slope[e]) : -INFINITY;
    if (router->groups.two_level)
        two_level_backward(of, l, d, r->dgroup_logits + of->t * router->groups.count);
    else if (router->score == CLMOE_SCORE_SPARSEMIXER)
        sparsemixer_backward(of, d);
    else
        score_backward(of, raw, l, d);
    for (size_t e = 0; e < R; e++)
        if (isfinite(logits[e]))
            r->dlogits[of->t * R + e] += d[e] * slope[e];
    free(raw);
    free(d);
    free(l);
    free(slope);
}

/* The weights [pairs] before they were rebalanced. */
static void weights_before(const clmoe_layer_desc *desc, const ref_backward_in *in, double *w) {
    for (size_t t = 0; t < in->forward->tokens; t++) {
        token of = token_of(desc, in, t);
        double *slope = make(of.n, sizeof *slope);
        raw_weights(&of, w + of.first);
        double by = divisor(&of, w + of.first, slope);
        for (size_t k = 0; k < of.n; k++)
            w[of.first + k] = w[of.first + k] / by * scale_of(&of, k);
        free(slope);
    }
}

void ref_backward_weights(const clmoe_layer_desc *desc, const ref_backward_in *in,
                          ref_backward_result *result) {
    size_t pairs = ref_pairs(desc, in->forward->tokens);
    double *dw = make(pairs, sizeof *dw), *before = make(pairs, sizeof *before);
    for (size_t p = 0; p < pairs; p++)
        dw[p] = result->dpair_weights[p];
    if (desc->router.rebalance.iterations && desc->top_k > 1) {
        weights_before(desc, in, before);
        ref_backward_rebalance(desc, in, before, dw);
    }
    for (size_t t = 0; t < in->forward->tokens; t++) {
        token of = token_of(desc, in, t);
        if (of.n > 0)
            token_backward(&of, dw + of.first, result);
    }
    free(dw);
    free(before);
}
