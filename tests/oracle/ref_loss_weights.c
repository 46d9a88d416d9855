/* The oracle's combine weights as a source of P: recomputed from the logits, and their gradient. */
#include "ref_balance.h"

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

static double scale_of(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t column) {
    double scale = (double)desc->router.scale;
    return desc->router.expert_scale ? scale * (double)in->expert_scale[column] : scale;
}

/* A pair's score before renorm; without a place it has no weight after it. */
typedef struct choice {
    size_t column;
    double r;
    bool dropped;
} choice;

/* The raw weights of a token's pairs; returns how many. */
static size_t raw_weights(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
                          const ref_row *row, choice *list) {
    size_t p, n = 0, end = ref_pairs_of(desc, in, t, &p);
    double sum = 0.0;
    for (; p < end; p++)
        if (ref_pair_column(desc, in, p, &list[n].column)) {
            sum += row->s[list[n].column];
            list[n].dropped = desc->router.renorm.after_drop && in->slot_of[p] == -1;
            n++;
        }
    bool over_chosen = desc->router.order == CLMOE_ORDER_TOPK_THEN_SCORE;
    for (size_t k = 0; k < n; k++) {
        double s = row->s[list[k].column];
        if (desc->router.score == CLMOE_SCORE_SOFTMAX)
            s /= over_chosen ? sum : row->sum;
        list[k].r = s;
    }
    return n;
}

/* What divides the raw weights, and its derivatives. */
static double divisor(const clmoe_router_desc *router, const choice *list, size_t n,
                      double *derivative) {
    double p = (double)router->renorm.p, sum = 0.0, largest = 0.0;
    for (size_t k = 0; k < n; k++)
        largest = list[k].dropped ? largest : fmax(largest, fabs(list[k].r));
    for (size_t k = 0; k < n; k++) {
        if (list[k].dropped || largest == 0.0)
            continue;
        derivative[k] = router->renorm.kind == CLMOE_RENORM_SUM ? 1.0 : 0.0;
        sum += router->renorm.kind == CLMOE_RENORM_PNORM ? pow(fabs(list[k].r) / largest, p)
                                                         : list[k].r;
    }
    if (router->renorm.kind == CLMOE_RENORM_SUM)
        return sum == 0.0 ? INFINITY : sum + (double)router->renorm.eps;
    if (router->renorm.kind == CLMOE_RENORM_NONE)
        return 1.0;
    double norm = largest * pow(sum, 1.0 / p);
    for (size_t k = 0; k < n && sum > 0.0; k++)
        derivative[k] =
            list[k].dropped ? 0.0 : copysign(pow(fabs(list[k].r) / norm, p - 1.0), list[k].r);
    return sum == 0.0 ? INFINITY : norm;
}

/* sum over the pairs of token t of g_e w, the weights recomputed from the logits. */
double ref_weights_surrogate(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
                             const double *g) {
    size_t R = ref_columns(desc);
    choice *list = make(R + desc->top_k, sizeof *list);
    double *derivative = make(R + desc->top_k, sizeof *derivative), total = 0.0;
    ref_row row;
    ref_row_make(desc, in, CLMOE_P_NORMALISED, t, &row);
    size_t n = raw_weights(desc, in, t, &row, list);
    double by = divisor(&desc->router, list, n, derivative);
    for (size_t k = 0; k < n; k++)
        total += list[k].dropped
                     ? 0.0
                     : g[list[k].column] * list[k].r / by * scale_of(desc, in, list[k].column);
    ref_row_free(&row);
    free(list);
    free(derivative);
    return total;
}

/* Its gradient on the noisy logits of the token: dl [R]. */
void ref_weights_gradient(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
                          const double *g, double *dl) {
    size_t R = ref_columns(desc);
    choice *list = make(R + desc->top_k, sizeof *list);
    double *derivative = make(R + desc->top_k, sizeof *derivative);
    double *dr = make(R, sizeof *dr), through = 0.0, mean = 0.0;
    bool *chosen = make(R, sizeof *chosen);
    ref_row row;
    ref_row_make(desc, in, CLMOE_P_NORMALISED, t, &row);
    size_t n = raw_weights(desc, in, t, &row, list);
    double by = divisor(&desc->router, list, n, derivative);
    for (size_t k = 0; k < n; k++)
        through += list[k].dropped ? 0.0
                                   : g[list[k].column] * scale_of(desc, in, list[k].column) *
                                         list[k].r / by / by;
    for (size_t k = 0; k < n; k++) {
        size_t e = list[k].column;
        dr[e] = list[k].dropped ? 0.0 : g[e] * scale_of(desc, in, e) / by - through * derivative[k];
        chosen[e] = true;
        mean += dr[e] * list[k].r;
    }
    bool softmax = desc->router.score == CLMOE_SCORE_SOFTMAX;
    bool over_chosen = desc->router.order == CLMOE_ORDER_TOPK_THEN_SCORE;
    for (size_t j = 0; j < R; j++)
        if (!softmax)
            dl[j] = dr[j] * row.ds[j] * row.chain[j];
        else if (!over_chosen)
            dl[j] = row.p[j] * (dr[j] - mean) * row.chain[j];
    for (size_t k = 0; k < n && softmax && over_chosen; k++)
        dl[list[k].column] = list[k].r * (dr[list[k].column] - mean) * row.chain[list[k].column];
    ref_row_free(&row);
    free(list);
    free(derivative);
    free(dr);
    free(chosen);
}
