/* Expert choice, Sinkhorn, all experts and two-level routing in double precision. */
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

static bool is_in(const uint8_t *token_mask, size_t t) {
    return token_mask == NULL || token_mask[t] != 0;
}

static double distance(double a, double b) {
    return fabs(a - b) / fmax(fabs(a), fabs(b));
}

/* l: the logits after softcap and temperature. */
static void prepared_logits(const clmoe_layer_desc *desc, uint32_t tokens, const double *logits,
                            double *l) {
    clmoe_layer_desc plain = *desc;
    plain.router.order = CLMOE_ORDER_TOPK_THEN_SCORE;
    ref_scores(&plain, tokens, logits, l);
}

/* Renormalises and scales, unless that waits for the plan. */
static void finish(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *ids,
                   const ref_weights *weights, double *w) {
    if (desc->router.renorm.after_drop)
        return;
    int32_t *placed = make((size_t)tokens * desc->top_k, sizeof *placed);
    ref_renorm_after_drop(desc, tokens, ids, placed, weights, w);
    free(placed);
}

/* ---- Expert choice -------------------------------------------------------------------------- */

typedef struct candidate {
    double score;
    size_t token;
} candidate;

static int by_score(const void *a, const void *b) {
    const candidate *p = a, *q = b;
    if (p->score != q->score)
        return p->score > q->score ? -1 : 1;
    return p->token < q->token ? -1 : p->token > q->token;
}

/* Marks the tokens expert e takes in taken [T,R]. */
static double take_best(const clmoe_layer_desc *desc, uint32_t tokens, const double *scores,
                        const uint8_t *token_mask, size_t e, bool *taken) {
    size_t R = ref_columns(desc), C = ref_capacity(desc, tokens), n = 0;
    candidate *list = make(tokens, sizeof *list);
    for (size_t t = 0; t < tokens; t++)
        if (is_in(token_mask, t) && isfinite(scores[t * R + e]))
            list[n++] = (candidate){scores[t * R + e], t};
    qsort(list, n, sizeof *list, by_score);
    for (size_t i = 0; i < n && i < C; i++)
        taken[list[i].token * R + e] = true;
    double gap = INFINITY;
    if (C > 0 && n > C && list[C - 1].score != list[C].score)
        gap = distance(list[C - 1].score, list[C].score);
    free(list);
    return gap;
}

double ref_expert_choice(const clmoe_layer_desc *desc, uint32_t tokens, const double *scores,
                         const uint8_t *token_mask, const ref_weights *weights,
                         int32_t *token_offsets, int32_t *ids, double *pair_weights) {
    size_t R = ref_columns(desc), pairs = ref_pairs(desc, tokens), n = 0;
    bool *taken = make(tokens * R, sizeof *taken);
    double gap = INFINITY;
    for (size_t e = 0; e < R; e++)
        gap = fmin(gap, take_best(desc, tokens, scores, token_mask, e, taken));
    for (size_t t = 0; t < tokens; t++) {
        token_offsets[t] = (int32_t)n;
        for (size_t e = 0; e < R; e++) {
            if (!taken[t * R + e])
                continue;
            ids[n] = (int32_t)e;
            pair_weights[n] = scores[t * R + e] * (double)desc->router.scale;
            if (desc->router.expert_scale)
                pair_weights[n] *= (double)weights->expert_scale[e];
            n++;
        }
    }
    token_offsets[tokens] = (int32_t)n;
    for (; n < pairs; n++) {
        ids[n] = -1;
        pair_weights[n] = 0.0;
    }
    free(taken);
    return gap;
}

/* ---- Token rounding ------------------------------------------------------------------------- */

/* Marks the `keep` best of list [n] in taken [T,R], column e. */
static double mark_best(candidate *list, size_t n, size_t keep, size_t R, size_t e, bool *taken) {
    qsort(list, n, sizeof *list, by_score);
    for (size_t i = 0; i < keep; i++)
        taken[list[i].token * R + e] = true;
    if (keep == 0 || keep >= n || list[keep - 1].score == list[keep].score)
        return INFINITY;
    return distance(list[keep - 1].score, list[keep].score);
}

/* Who chose expert e, and who may be added. */
static double round_expert(const clmoe_layer_desc *desc, const ref_rounding_in *in, size_t e,
                           bool *taken) {
    size_t R = ref_columns(desc), K = desc->top_k, M = desc->capacity.multiple, c = 0, others = 0;
    candidate *chose = make(in->tokens, sizeof *chose), *rest = make(in->tokens, sizeof *rest);
    for (size_t t = 0; t < in->tokens; t++) {
        bool chosen = false;
        for (size_t k = 0; k < (size_t)in->live[t] && is_in(in->token_mask, t); k++)
            if ((size_t)in->ids[t * K + k] == e) {
                chose[c++] = (candidate){in->top_weights[t * K + k], t};
                chosen = true;
            }
        double score = in->scores[t * R + e];
        if (!chosen && is_in(in->token_mask, t) && isfinite(score))
            rest[others++] = (candidate){score, t};
    }
    size_t m = c - c % M;
    if (2 * (c % M) >= M && m + M <= c + others)
        m += M;
    double gap = mark_best(chose, c, m < c ? m : c, R, e, taken);
    gap = fmin(gap, mark_best(rest, others, m > c ? m - c : 0, R, e, taken));
    free(chose);
    free(rest);
    return gap;
}

double ref_token_rounding(const clmoe_layer_desc *desc, const ref_rounding_in *in,
                          int32_t *token_offsets, int32_t *ids, double *pair_weights) {
    size_t R = ref_columns(desc), pairs = ref_pairs(desc, in->tokens), n = 0;
    bool *taken = make(in->tokens * R, sizeof *taken);
    double gap = INFINITY;
    for (size_t e = 0; e < R; e++)
        gap = fmin(gap, round_expert(desc, in, e, taken));
    clmoe_layer_desc own = *desc; /* of a token: as many choices as it ends with */
    own.router.renorm.after_drop = 0;
    for (size_t t = 0; t < in->tokens; t++) {
        size_t first = n;
        token_offsets[t] = (int32_t)n;
        for (size_t e = 0; e < R; e++)
            if (taken[t * R + e])
                ids[n++] = (int32_t)e;
        own.top_k = (uint32_t)(n - first);
        if (n > first)
            ref_token_weights(&own, in->scores + t * R, ids + first, (int32_t)(n - first),
                              in->weights, pair_weights + first);
    }
    token_offsets[in->tokens] = (int32_t)n;
    for (; n < pairs; n++) {
        ids[n] = -1;
        pair_weights[n] = 0.0;
    }
    free(taken);
    return gap;
}

/* Plain token choice, then rounding. */
static void rounded_choice(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *r) {
    size_t T = in->tokens, R = ref_columns(desc), K = desc->top_k;
    float *f32 = make(T * R, sizeof *f32);
    int32_t *ids = make(T * K, sizeof *ids), *live = make(T, sizeof *live);
    double *w = make(T * K, sizeof *w);
    ref_scores(desc, in->tokens, r->logits, r->scores);
    for (size_t i = 0; i < T * R; i++)
        f32[i] = (float)r->scores[i];
    ref_topk(desc, in->tokens, f32, in->weights, ids, w, live);
    for (size_t t = 0; t < T; t++)
        ref_token_weights(desc, r->scores + t * R, ids + t * K, live[t], in->weights, w + t * K);
    r->token_offsets = make(T + 1, sizeof *r->token_offsets);
    const ref_rounding_in of = {in->tokens, r->scores, ids, live, w, in->token_mask, in->weights};
    r->choice_gap = fmin(ref_choice_gap(desc, in->tokens, r->scores, in->weights),
                         ref_token_rounding(desc, &of, r->token_offsets, r->ids, r->pair_weights));
    free(f32);
    free(ids);
    free(live);
    free(w);
}

/* ---- Sinkhorn ------------------------------------------------------------------------------- */

/* C [T,R] of l. */
static void exponentials(size_t tokens, size_t R, const double *l, double *c) {
    for (size_t t = 0; t < tokens; t++) {
        double best = -INFINITY;
        for (size_t e = 0; e < R; e++)
            best = fmax(best, l[t * R + e]);
        for (size_t e = 0; e < R; e++)
            c[t * R + e] = l[t * R + e] > -INFINITY ? exp(l[t * R + e] - best) : 0.0;
    }
}

/* One round: d1 -> the next d1; returns the mean change. */
static double sinkhorn_round(size_t tokens, size_t R, const double *c, const uint8_t *token_mask,
                             double *d1) {
    const double eps = 1e-8;
    double *columns = make(R, sizeof *columns), change = 0.0;
    size_t T = 0;
    for (size_t t = 0; t < tokens; t++)
        T += is_in(token_mask, t);
    for (size_t t = 0; t < tokens; t++) {
        double sum = 0.0;
        if (!is_in(token_mask, t))
            continue;
        for (size_t e = 0; e < R; e++)
            sum += c[t * R + e] * d1[e];
        for (size_t e = 0; e < R; e++)
            columns[e] += c[t * R + e] / (double)T / (sum + eps);
    }
    for (size_t e = 0; e < R; e++) {
        double next = 1.0 / (double)R / (columns[e] + eps);
        change += fabs(next - d1[e]);
        d1[e] = next;
    }
    free(columns);
    return change / (double)R;
}

void ref_sinkhorn(const clmoe_layer_desc *desc, uint32_t tokens, const double *l,
                  const uint8_t *token_mask, double *choices, double *margin) {
    const clmoe_router_desc *router = &desc->router;
    size_t R = ref_columns(desc);
    double tolerance = (double)router->sinkhorn.tolerance, nearest = INFINITY;
    double *d1 = make(R, sizeof *d1);
    exponentials(tokens, R, l, choices);
    for (size_t e = 0; e < R; e++)
        d1[e] = 1.0;
    for (uint32_t i = 0; i < router->sinkhorn.iterations; i++) {
        double change = sinkhorn_round(tokens, R, choices, token_mask, d1);
        nearest = fmin(nearest, tolerance > 0.0 ? fabs(change / tolerance - 1.0) : INFINITY);
        if (change <= tolerance)
            break;
    }
    size_t unmasked = 0;
    for (size_t t = 0; t < tokens; t++)
        unmasked += is_in(token_mask, t);
    for (size_t i = 0; i < tokens * R; i++)
        choices[i] = unmasked > 1 && l[i] > -INFINITY ? choices[i] * d1[i % R] : l[i];
    if (margin)
        *margin = nearest;
    free(d1);
}

double ref_sinkhorn_topk(const clmoe_layer_desc *desc, uint32_t tokens, const double *l,
                         const double *scores, const uint8_t *token_mask,
                         const ref_weights *weights, int32_t *ids, double *w, int32_t *live) {
    size_t R = ref_columns(desc), K = desc->top_k, n = tokens * R;
    double *choices = make(n, sizeof *choices), margin;
    float *f32 = make(n, sizeof *f32);
    clmoe_layer_desc plain = *desc;
    plain.router.renorm.kind = CLMOE_RENORM_NONE;
    plain.router.expert_scale = 0;
    ref_sinkhorn(desc, tokens, l, token_mask, choices, &margin);
    for (size_t i = 0; i < n; i++)
        f32[i] = (float)choices[i];
    ref_topk(&plain, tokens, f32, weights, ids, w, live);
    for (size_t t = 0; t < tokens; t++)
        for (size_t k = 0; k < K; k++)
            w[t * K + k] = (int32_t)k < live[t] ? scores[t * R + (size_t)ids[t * K + k]] : 0.0;
    finish(desc, tokens, ids, weights, w);
    double gap = ref_choice_gap(&plain, tokens, choices, weights);
    free(choices);
    free(f32);
    return margin > 1e-2 ? gap : 0.0;
}

/* ---- Soft ----------------------------------------------------------------------------------- */

static void all_experts(const clmoe_layer_desc *desc, uint32_t tokens, const double *scores,
                        const ref_weights *weights, int32_t *ids, double *w, int32_t *live) {
    size_t R = ref_columns(desc);
    for (size_t t = 0; t < tokens; t++) {
        size_t n = 0;
        for (int pass = 0; pass < 2; pass++) {
            for (size_t e = 0; e < R; e++) {
                bool finite = scores[t * R + e] > -INFINITY;
                if (finite != (pass == 0))
                    continue;
                ids[t * R + n] = (int32_t)e;
                w[t * R + n++] = finite ? scores[t * R + e] : 0.0;
            }
            live[t] = pass == 0 ? (int32_t)n : live[t];
        }
    }
    finish(desc, tokens, ids, weights, w);
}

/* ---- Two levels ------------------------------------------------------------------------------ */

/* values [n] -> softmax over those that are finite, the others 0. */
static void softmax(const double *values, size_t n, double *out) {
    double best = -INFINITY, sum = 0.0;
    for (size_t i = 0; i < n; i++)
        best = isfinite(values[i]) ? fmax(best, values[i]) : best;
    for (size_t i = 0; i < n; i++) {
        out[i] = isfinite(values[i]) ? exp(values[i] - best) : 0.0;
        sum += out[i];
    }
    for (size_t i = 0; i < n && sum > 0.0; i++)
        out[i] /= sum;
}

/* How many of values [n] come before value i: the larger ones, and equal ones of lower index. */
static size_t place_of(const double *values, size_t n, size_t i) {
    size_t before = 0;
    for (size_t j = 0; j < n; j++)
        before += values[j] > values[i] || (values[j] == values[i] && j < i);
    return before;
}

void ref_two_level_scores(const clmoe_layer_desc *desc, uint32_t tokens, const double *l,
                          const double *group_logits, double *scores) {
    const clmoe_router_desc *router = &desc->router;
    size_t R = ref_columns(desc), G = router->groups.count, n = R / G;
    double *gate = make(G, sizeof *gate), *clean = make(G, sizeof *clean);
    for (size_t t = 0; t < tokens; t++) {
        const double *groups = group_logits + t * G;
        softmax(groups, G, gate);
        for (size_t g = 0; g < G; g++)
            clean[g] = isfinite(groups[g]) ? groups[g] : -INFINITY;
        for (size_t g = 0; g < G; g++) {
            const double *in = l + t * R + g * n;
            double *out = scores + t * R + g * n;
            bool picked = isfinite(groups[g]) && place_of(clean, G, g) < router->groups.topk;
            softmax(in, n, out);
            for (size_t e = 0; e < n; e++)
                out[e] = picked && isfinite(in[e]) ? gate[g] * out[e] : -INFINITY;
        }
    }
    free(gate);
    free(clean);
}

/* Scores of two levels -> ids, group by group, and weights of one token. */
static int32_t two_level_token(const clmoe_layer_desc *desc, const double *scores,
                               const ref_weights *weights, int32_t *ids, double *w, double *gap) {
    size_t R = ref_columns(desc), G = desc->router.groups.count, n = R / G;
    size_t K = desc->top_k, keep = K / desc->router.groups.topk, count = 0;
    double *choice = make(R, sizeof *choice);
    bool *chosen = make(R, sizeof *chosen);
    for (size_t e = 0; e < R; e++)
        choice[e] = scores[e] + (desc->router.select_bias ? (double)weights->select_bias[e] : 0.0);
    for (size_t g = 0; g < G; g++)
        for (size_t k = 0; k < keep; k++)
            for (size_t e = g * n; e < (g + 1) * n; e++) {
                if (place_of(choice + g * n, n, e - g * n) != k || !(choice[e] > -INFINITY))
                    continue;
                for (size_t o = g * n; o < (g + 1) * n; o++)
                    if (o != e && choice[o] > -INFINITY && choice[o] != choice[e])
                        *gap = fmin(*gap, distance(choice[o], choice[e]));
                chosen[e] = true;
                w[count] = scores[e];
                ids[count++] = (int32_t)e;
            }
    int32_t live = (int32_t)count;
    for (size_t e = 0; e < R && count < K; e++)
        if (!chosen[e]) {
            w[count] = 0.0;
            ids[count++] = (int32_t)e;
        }
    free(choice);
    free(chosen);
    return live;
}

static double two_level(const clmoe_layer_desc *desc, const ref_forward_in *in, const double *l,
                        ref_result *r) {
    size_t R = ref_columns(desc), G = desc->router.groups.count, K = desc->top_k;
    double *group_logits = make(in->tokens * G, sizeof *group_logits), gap = INFINITY;
    for (size_t t = 0; t < in->tokens; t++)
        for (size_t g = 0; g < G; g++)
            for (size_t d = 0; d < desc->dim; d++)
                group_logits[t * G + g] += (double)in->x[t * desc->dim + d] *
                                           (double)in->weights->group_router[g * desc->dim + d];
    ref_two_level_scores(desc, in->tokens, l, group_logits, r->scores);
    for (size_t t = 0; t < in->tokens; t++) {
        r->live[t] = two_level_token(desc, r->scores + t * R, in->weights, r->ids + t * K,
                                     r->pair_weights + t * K, &gap);
        for (size_t i = 0; i < G * G; i++) {
            double a = group_logits[t * G + i / G], b = group_logits[t * G + i % G];
            gap = a != b ? fmin(gap, fabs(a - b)) : gap;
        }
    }
    finish(desc, in->tokens, r->ids, in->weights, r->pair_weights);
    free(group_logits);
    return gap;
}

/* ---- Soft MoE -------------------------------------------------------------------------------- */

static double norm_of(const float *row, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += (double)row[i] * (double)row[i];
    return sqrt(sum);
}

/* l [T,N], NaN where a token or a slot takes no part. */
static void soft_moe_logits(const clmoe_layer_desc *desc, const ref_forward_in *in, double *l) {
    size_t N = ref_router_rows(desc), D = desc->dim;
    for (size_t t = 0; t < in->tokens; t++)
        for (size_t s = 0; s < N; s++) {
            const float *x = in->x + t * D, *r = in->weights->router + s * D;
            double dot = 0.0, norms = norm_of(x, D) * norm_of(r, D);
            for (size_t d = 0; d < D; d++)
                dot += (double)x[d] * (double)r[d];
            l[t * N + s] = norms == 0.0 ? 0.0 : (double)desc->router.soft_moe.scale * dot / norms;
            if (!is_in(in->token_mask, t))
                l[t * N + s] = NAN;
        }
}

/* The output of slot s: its expert on the mean of the tokens. */
static void slot_output(const clmoe_layer_desc *desc, const ref_forward_in *in, const double *l,
                        size_t s, double *out) {
    size_t N = ref_router_rows(desc), D = desc->dim, T = in->tokens;
    double *column = make(T, sizeof *column), *share = make(T, sizeof *share);
    double *row = make(D, sizeof *row);
    for (size_t t = 0; t < T; t++)
        column[t] = l[t * N + s];
    softmax(column, T, share);
    for (size_t t = 0; t < T; t++)
        for (size_t d = 0; d < D && share[t] > 0.0; d++)
            row[d] += share[t] * (double)in->x[t * D + d];
    const ref_scale scale = {1.0, in->state, REF_HIDDEN, (uint32_t)s};
    ref_expert_row(desc, in->weights, (uint32_t)(s / desc->router.soft_moe.slots), row, &scale,
                   out);
    free(column);
    free(share);
    free(row);
}

void ref_soft_moe(const clmoe_layer_desc *desc, const ref_forward_in *in, double *mixed) {
    size_t N = ref_router_rows(desc), D = desc->dim, T = in->tokens;
    double *l = make(T * N, sizeof *l), *out = make(N * D, sizeof *out);
    double *share = make(N, sizeof *share);
    soft_moe_logits(desc, in, l);
    for (size_t s = 0; s < N; s++)
        slot_output(desc, in, l, s, out + s * D);
    for (size_t t = 0; t < T; t++) {
        softmax(l + t * N, N, share);
        for (size_t s = 0; s < N; s++)
            for (size_t d = 0; d < D; d++)
                mixed[t * D + d] += share[s] * out[s * D + d];
    }
    free(l);
    free(out);
    free(share);
}

/* ---- The route of a batch -------------------------------------------------------------------- */

bool ref_policy_route(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *r) {
    clmoe_policy policy = desc->router.policy;
    if (desc->capacity.keep == CLMOE_KEEP_ROUND) {
        rounded_choice(desc, in, r);
        return true;
    }
    if (policy == CLMOE_POLICY_TOKEN_CHOICE && !desc->router.groups.two_level)
        return false;
    double *l = make(in->tokens * (size_t)ref_columns(desc), sizeof *l);
    prepared_logits(desc, in->tokens, r->logits, l);
    clmoe_layer_desc by_score = *desc;
    by_score.router.order = CLMOE_ORDER_SCORE_THEN_TOPK;
    ref_scores(&by_score, in->tokens, r->logits, r->scores);
    if (policy == CLMOE_POLICY_EXPERT_CHOICE) {
        r->token_offsets = make((size_t)in->tokens + 1, sizeof *r->token_offsets);
        r->choice_gap = ref_expert_choice(desc, in->tokens, r->scores, in->token_mask, in->weights,
                                          r->token_offsets, r->ids, r->pair_weights);
        free(l);
        return true;
    }
    r->live = make(in->tokens, sizeof *r->live);
    if (policy == CLMOE_POLICY_SINKHORN)
        r->choice_gap = ref_sinkhorn_topk(desc, in->tokens, l, r->scores, in->token_mask,
                                          in->weights, r->ids, r->pair_weights, r->live);
    else if (policy == CLMOE_POLICY_ALL_EXPERTS)
        all_experts(desc, in->tokens, r->scores, in->weights, r->ids, r->pair_weights, r->live);
    else
        r->choice_gap = two_level(desc, in, l, r);
    free(l);
    return true;
}
