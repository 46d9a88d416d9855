#include "ref.h"

#include <float.h>
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

/* ---- score --------------------------------------------------------------------------------- */

void ref_logits(const clmoe_layer_desc *desc, uint32_t tokens, const float *x,
                const ref_weights *weights, double *logits) {
    size_t R = ref_columns(desc), D = desc->dim;
    for (size_t t = 0; t < tokens; t++)
        for (size_t e = 0; e < R; e++) {
            double sum = desc->router.bias ? (double)weights->router_bias[e] : 0.0;
            for (size_t d = 0; d < D; d++)
                sum += (double)x[t * D + d] * (double)weights->router[e * D + d];
            logits[t * R + e] = sum;
        }
}

/* values [n] -> softmax over those above -infinity; the others become `rest`. */
static void softmax(double *values, size_t n, double rest) {
    double best = -INFINITY, sum = 0.0;
    for (size_t i = 0; i < n; i++)
        best = fmax(best, values[i]);
    for (size_t i = 0; i < n; i++)
        if (values[i] > -INFINITY)
            sum += exp(values[i] - best);
    for (size_t i = 0; i < n; i++)
        values[i] = values[i] > -INFINITY ? exp(values[i] - best) / sum : rest;
}

void ref_scores(const clmoe_layer_desc *desc, uint32_t tokens, const double *logits,
                double *scores) {
    const clmoe_router_desc *router = &desc->router;
    size_t R = ref_columns(desc);
    bool choose_by_logit =
        router->order == CLMOE_ORDER_TOPK_THEN_SCORE || router->score == CLMOE_SCORE_SPARSEMIXER;
    bool softmax_row = !choose_by_logit && router->score == CLMOE_SCORE_SOFTMAX;
    double slope;
    for (size_t t = 0; t < tokens; t++) {
        double *row = scores + t * R;
        for (size_t e = 0; e < R; e++) {
            double l = logits[t * R + e];
            bool finite = isfinite(l);
            if (router->softcap > 0.0f)
                l = (double)router->softcap * tanh(l / (double)router->softcap);
            l = fmin(fmax(l / (double)router->temperature, -FLT_MAX), FLT_MAX);
            if (!choose_by_logit && !softmax_row)
                l = ref_score(router->score, l, &slope);
            row[e] = finite ? l : -INFINITY;
        }
        if (softmax_row)
            softmax(row, R, -INFINITY);
    }
}

/* ---- topk ---------------------------------------------------------------------------------- */

/* A key and what it belongs to; sorted by descending key, then ascending index. */
typedef struct ranked {
    double key;
    size_t index;
} ranked;

static int by_key(const void *a, const void *b) {
    const ranked *p = a, *q = b;
    if (p->key != q->key)
        return p->key > q->key ? -1 : 1;
    return p->index < q->index ? -1 : p->index > q->index;
}

/* Sorts, and lowers *gap to the smallest relative distance of different neighbours up to `upto`. */
static void rank(ranked *list, size_t n, size_t upto, double *gap) {
    qsort(list, n, sizeof *list, by_key);
    for (size_t i = 0; i + 1 < n && i < upto; i++) {
        double a = list[i].key, b = list[i + 1].key;
        if (a != b && isfinite(a) && isfinite(b))
            *gap = fmin(*gap, (a - b) / fmax(fabs(a), fabs(b)));
    }
}

/* The score of the group whose choices are group [n]. */
static double group_score(clmoe_group_score kind, const double *group, size_t n, bool f32) {
    double best = -INFINITY, second = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        if (group[i] > best) {
            second = best;
            best = group[i];
        } else if (group[i] > second)
            second = group[i];
    }
    if (kind == CLMOE_GROUP_MAX || n == 1)
        return best;
    return f32 ? (double)(float)(best + second) : best + second;
}

/* Sets the choices outside the best groups to -infinity. */
static void mask_groups(const clmoe_layer_desc *desc, double *choice, bool f32, double *gap) {
    const clmoe_router_desc *router = &desc->router;
    size_t groups = router->groups.count;
    if (groups <= 1)
        return;
    size_t n = ref_columns(desc) / groups;
    ranked *list = make(groups, sizeof *list);
    for (size_t g = 0; g < groups; g++)
        list[g] = (ranked){group_score(router->groups.score, choice + g * n, n, f32), g};
    rank(list, groups, groups, gap);
    for (size_t i = router->groups.topk; i < groups; i++)
        for (size_t e = 0; e < n; e++)
            choice[list[i].index * n + e] = -INFINITY;
    free(list);
}

/* choice [R] (destroyed) -> ids [K]; returns how many are live. `f32`: sums are rounded to f32. */
static int32_t choose(const clmoe_layer_desc *desc, double *choice, bool f32, int32_t *ids,
                      double *gap) {
    size_t R = ref_columns(desc), K = desc->top_k;
    mask_groups(desc, choice, f32, gap);
    ranked *list = make(R, sizeof *list);
    for (size_t e = 0; e < R; e++)
        list[e] = (ranked){choice[e], e};
    rank(list, R, K, gap);
    int32_t live = 0;
    for (size_t k = 0; k < K; k++) {
        ids[k] = (int32_t)list[k].index;
        live += list[k].key > -INFINITY;
    }
    free(list);
    return live;
}

/* What a token chooses by, [R]: score plus bias, NaN as -infinity. */
static void choices(const clmoe_layer_desc *desc, const double *scores, const ref_weights *weights,
                    bool f32, double *choice) {
    for (size_t e = 0; e < ref_columns(desc); e++) {
        double c = scores[e];
        if (desc->router.select_bias)
            c += (double)weights->select_bias[e];
        if (f32)
            c = (double)(float)c;
        choice[e] = isnan(c) ? -INFINITY : c;
    }
}

double ref_choice_gap(const clmoe_layer_desc *desc, uint32_t tokens, const double *scores,
                      const ref_weights *weights) {
    size_t R = ref_columns(desc);
    double gap = INFINITY;
    double *choice = make(R, sizeof *choice);
    int32_t *ids = make(desc->top_k, sizeof *ids);
    for (size_t t = 0; t < tokens; t++) {
        choices(desc, scores + t * R, weights, false, choice);
        choose(desc, choice, false, ids, &gap);
    }
    free(choice);
    free(ids);
    return gap;
}

/* Sparsemixer: the weight of each choice from the logits row [R]; see clmoe_score. */
static void sparsemixer(const clmoe_layer_desc *desc, const double *row, const int32_t *ids,
                        int32_t live, double *w) {
    size_t R = ref_columns(desc);
    double limit = 2.0 * (double)desc->router.sparsemixer_eps;
    for (int32_t k = 0; k < live; k++) {
        double m = row[ids[k]], sum = 0.0;
        for (size_t e = 0; e < R; e++) {
            bool gone = !(row[e] > -INFINITY);
            for (int32_t j = 0; j < k; j++)
                gone = gone || (size_t)ids[j] == e;
            if (!gone && m - row[e] <= limit * fmax(fabs(row[e]), m))
                sum += exp(row[e] - m);
        }
        w[k] = 1.0 / sum;
    }
}

/* The weights of a token before renorm and scale. */
static void raw_weights(const clmoe_layer_desc *desc, const double *row, const int32_t *ids,
                        int32_t live, double *w) {
    const clmoe_router_desc *router = &desc->router;
    size_t K = desc->top_k;
    bool after = router->order == CLMOE_ORDER_TOPK_THEN_SCORE;
    double slope;
    for (size_t k = 0; k < K; k++)
        w[k] = (int32_t)k < live ? row[ids[k]] : -INFINITY;
    if (router->score == CLMOE_SCORE_SPARSEMIXER)
        sparsemixer(desc, row, ids, live, w);
    else if (after && router->score == CLMOE_SCORE_SOFTMAX)
        softmax(w, K, 0.0);
    else if (after)
        for (int32_t k = 0; k < live; k++)
            w[k] = ref_score(router->score, w[k], &slope);
    for (size_t k = (size_t)live; k < K; k++)
        w[k] = 0.0;
}

/* Renormalises and scales the weights of a token; ids may be out of range where w is 0. */
static void finish_weights(const clmoe_layer_desc *desc, const int32_t *ids,
                           const ref_weights *weights, double *w) {
    const clmoe_router_desc *router = &desc->router;
    size_t K = desc->top_k;
    /* |a w| = a |w|: relative to the largest, no power leaves the range of a double. */
    double p = (double)router->renorm.p, sum = 0.0, largest = 0.0;
    for (size_t k = 0; k < K; k++)
        largest = fmax(largest, fabs(w[k]));
    for (size_t k = 0; k < K && largest > 0.0; k++)
        sum += router->renorm.kind == CLMOE_RENORM_PNORM ? pow(fabs(w[k]) / largest, p) : w[k];
    double by = 1.0;
    if (router->renorm.kind == CLMOE_RENORM_SUM)
        by = sum + (double)router->renorm.eps;
    else if (router->renorm.kind == CLMOE_RENORM_PNORM)
        by = largest * pow(sum, 1.0 / p);
    bool zero = router->renorm.kind != CLMOE_RENORM_NONE && sum == 0.0;
    for (size_t k = 0; k < K; k++) {
        w[k] = zero ? 0.0 : w[k] / by * (double)router->scale;
        if (router->expert_scale && w[k] != 0.0)
            w[k] *= (double)weights->expert_scale[ids[k]];
    }
}

void ref_token_weights(const clmoe_layer_desc *desc, const double *row, const int32_t *ids,
                       int32_t live, const ref_weights *weights, double *w) {
    raw_weights(desc, row, ids, live, w);
    if (!desc->router.renorm.after_drop)
        finish_weights(desc, ids, weights, w);
}

void ref_topk(const clmoe_layer_desc *desc, uint32_t tokens, const float *scores,
              const ref_weights *weights, int32_t *ids, double *pair_weights, int32_t *live) {
    size_t R = ref_columns(desc), K = desc->top_k;
    double *row = make(R, sizeof *row), *choice = make(R, sizeof *choice), gap = 0.0;
    for (size_t t = 0; t < tokens; t++) {
        for (size_t e = 0; e < R; e++)
            row[e] = (double)scores[t * R + e];
        choices(desc, row, weights, true, choice);
        live[t] = choose(desc, choice, true, ids + t * K, &gap);
        ref_token_weights(desc, row, ids + t * K, live[t], weights, pair_weights + t * K);
    }
    free(row);
    free(choice);
}

/* ---- plan ---------------------------------------------------------------------------------- */

uint32_t ref_capacity(const clmoe_layer_desc *desc, uint32_t tokens) {
    const clmoe_capacity_desc *capacity = &desc->capacity;
    if (capacity->rows == 0 && capacity->factor == 0.0)
        return 0;
    double rows = capacity->rows;
    if (capacity->tokens_per_sequence > 0)
        tokens = capacity->tokens_per_sequence;
    if (capacity->rows == 0) {
        rows = (double)tokens * desc->top_k * capacity->factor / desc->num_experts;
        if (capacity->rounding == CLMOE_ROUND_UP)
            rows = ceil(rows);
        else if (capacity->rounding == CLMOE_ROUND_DOWN)
            rows = floor(rows);
        else
            rows = round(rows);
    }
    if (rows < capacity->min_rows)
        rows = capacity->min_rows;
    if (rows < 1.0)
        rows = 1.0;
    if (capacity->multiple > 1)
        rows = ceil(rows / capacity->multiple) * capacity->multiple;
    return (uint32_t)fmin(rows, tokens);
}

size_t ref_pairs(const clmoe_layer_desc *desc, uint32_t tokens) {
    if (desc->router.policy == CLMOE_POLICY_EXPERT_CHOICE)
        return (size_t)desc->num_experts * ref_capacity(desc, tokens);
    if (desc->capacity.keep == CLMOE_KEEP_ROUND) {
        size_t half = desc->capacity.multiple / 2, all = (size_t)tokens * desc->num_experts;
        size_t bound =
            (size_t)tokens * desc->top_k + desc->num_experts * (half < tokens ? half : tokens);
        return bound < all ? bound : all;
    }
    return (size_t)tokens * desc->top_k;
}

static uint32_t round_up(uint32_t n, uint32_t to) {
    return (n + to - 1) / to * to;
}

/* A pair that takes part, with what the keep rules order by. */
typedef struct entry {
    size_t pair, token, choice;
    double weight, best; /* its own, and the best of its token */
    clmoe_keep keep;
} entry;

static int by_size(size_t a, size_t b) {
    return a < b ? -1 : a > b;
}

static int by_keep(const void *a, const void *b) {
    const entry *p = a, *q = b;
    int order = 0;
    if (p->keep == CLMOE_KEEP_CHOICE_MAJOR || p->keep == CLMOE_KEEP_PRIORITY)
        order = by_size(p->choice, q->choice);
    if (order == 0 && p->keep == CLMOE_KEEP_PRIORITY)
        order = (p->best < q->best) - (p->best > q->best);
    if (order == 0 && p->keep == CLMOE_KEEP_WEIGHT)
        order = (p->weight < q->weight) - (p->weight > q->weight);
    return order != 0 ? order : by_size(p->pair, q->pair);
}

/* The first pair of token t, or the number of pairs for t = T. */
static size_t first_pair(const clmoe_layer_desc *desc, const ref_plan_in *in, size_t t) {
    return in->token_offsets ? (size_t)in->token_offsets[t] : t * desc->top_k;
}

/* Collects the pairs that take part, in pair order. */
static size_t collect(const clmoe_layer_desc *desc, const ref_plan_in *in, entry *list) {
    size_t n = 0;
    for (size_t t = 0; t < in->tokens; t++) {
        size_t first = first_pair(desc, in, t), end = first_pair(desc, in, t + 1);
        if (in->live && first + (size_t)in->live[t] < end)
            end = first + (size_t)in->live[t];
        if (in->token_mask && in->token_mask[t] == 0)
            end = first;
        double best = -INFINITY;
        for (size_t p = first; p < end && in->pair_weights; p++)
            best = fmax(best, (double)in->pair_weights[p]);
        for (size_t p = first; p < end; p++) {
            if (in->ids[p] < 0 || (uint32_t)in->ids[p] >= ref_columns(desc))
                continue;
            double weight = in->pair_weights ? (double)in->pair_weights[p] : 0.0;
            list[n++] = (entry){p, t, p - first, weight, best, desc->capacity.keep};
        }
    }
    return n;
}

static void fill_i32(int32_t *list, size_t n, int32_t value) {
    for (size_t i = 0; i < n; i++)
        list[i] = value;
}

static void plan_alloc(const clmoe_layer_desc *desc, const ref_plan_in *in, ref_plan *plan) {
    size_t R = ref_columns(desc), pairs = ref_pairs(desc, in->tokens);
    memset(plan, 0, sizeof *plan);
    plan->pairs = (uint32_t)pairs;
    plan->slots = in->slots;
    plan->row_tile = in->row_tile;
    plan->capacity = ref_capacity(desc, in->tokens);
    plan->load = make(R, sizeof *plan->load);
    plan->kept = make(R, sizeof *plan->kept);
    plan->offsets = make((size_t)desc->num_experts + 1, sizeof *plan->offsets);
    plan->slot_of = make(pairs, sizeof *plan->slot_of);
    plan->pair_of = make(in->slots, sizeof *plan->pair_of);
    plan->token_of = make(in->slots, sizeof *plan->token_of);
    plan->tile_expert = make(in->slots / in->row_tile, sizeof *plan->tile_expert);
    fill_i32(plan->slot_of, pairs, -1);
    fill_i32(plan->pair_of, in->slots, -1);
    fill_i32(plan->token_of, in->slots, -1);
    fill_i32(plan->tile_expert, in->slots / in->row_tile, -1);
}

static bool has_capacity(const clmoe_layer_desc *desc) {
    return desc->capacity.rows != 0 || desc->capacity.factor != 0.0;
}

static void plan_offsets(const clmoe_layer_desc *desc, ref_plan *plan) {
    for (uint32_t e = 0; e < desc->num_experts; e++) {
        uint32_t rows = has_capacity(desc) ? plan->capacity : plan->load[e];
        plan->offsets[e + 1] = plan->offsets[e] + round_up(rows, plan->row_tile);
    }
}

/* Gives the pair a place, if its expert has one left. */
static void place(const clmoe_layer_desc *desc, const ref_plan_in *in, const entry *pair,
                  ref_plan *plan) {
    uint32_t e = (uint32_t)in->ids[pair->pair];
    if (e >= desc->num_experts) {
        plan->kept[e]++;
        plan->slot_of[pair->pair] = -2;
        return;
    }
    if (has_capacity(desc) && plan->kept[e] >= plan->capacity)
        return;
    uint32_t slot = plan->offsets[e] + plan->kept[e]++;
    plan->slot_of[pair->pair] = (int32_t)slot;
    if (slot >= plan->slots)
        return;
    plan->pair_of[slot] = (int32_t)pair->pair;
    plan->token_of[slot] = (int32_t)pair->token;
    plan->tile_expert[slot / plan->row_tile] = (int32_t)e;
}

void ref_plan_make(const clmoe_layer_desc *desc, const ref_plan_in *in, ref_plan *plan) {
    plan_alloc(desc, in, plan);
    entry *list = make(plan->pairs, sizeof *list);
    size_t n = collect(desc, in, list);
    for (size_t i = 0; i < n; i++)
        plan->load[in->ids[list[i].pair]]++;
    plan_offsets(desc, plan);
    qsort(list, n, sizeof *list, by_keep);
    for (size_t i = 0; i < n; i++)
        place(desc, in, &list[i], plan);
    free(list);
}

void ref_plan_free(ref_plan *plan) {
    free(plan->load);
    free(plan->kept);
    free(plan->rerouted_in);
    free(plan->rerouted_out);
    free(plan->offsets);
    free(plan->slot_of);
    free(plan->pair_of);
    free(plan->token_of);
    free(plan->tile_expert);
    memset(plan, 0, sizeof *plan);
}

void ref_renorm_after_drop(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *ids,
                           const int32_t *slot_of, const ref_weights *weights,
                           double *pair_weights) {
    size_t K = desc->top_k;
    for (size_t p = 0; p < tokens * K; p++)
        if (slot_of[p] == -1)
            pair_weights[p] = 0.0;
    for (size_t t = 0; t < tokens; t++)
        finish_weights(desc, ids + t * K, weights, pair_weights + t * K);
}
