/* Weight rebalancing backwards: its steps one by one, the last first. */
#include "ref_backward.h"

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

/* What stays the same from step to step. */
typedef struct fixed {
    size_t tokens, K, E;
    int32_t *part;        /* [T,K]: the pair's expert, -1 if it takes no part */
    const double *before; /* [T,K] */
    double mean, mu, step;
} fixed;

static bool takes_part(const clmoe_layer_desc *desc, const ref_backward_in *in, size_t t,
                       size_t k) {
    const ref_result *r = in->result;
    const uint8_t *mask = in->forward->token_mask;
    int32_t id = r->ids[t * desc->top_k + k];
    bool real = r->live == NULL || (int32_t)k < r->live[t];
    return real && !(mask && mask[t] == 0) && id >= 0 && (uint32_t)id < desc->num_experts;
}

static fixed fixed_of(const clmoe_layer_desc *desc, const ref_backward_in *in,
                      const double *before) {
    fixed f = {in->forward->tokens, desc->top_k, desc->num_experts, NULL, before, 0.0, 0.0, 0.0};
    double *count = make(f.E, sizeof *count), most = 0.0;
    f.part = make(f.tokens * f.K, sizeof *f.part);
    for (size_t t = 0; t < f.tokens; t++) {
        double sum = 0.0;
        for (size_t k = 0; k < f.K; k++)
            sum += takes_part(desc, in, t, k) ? before[t * f.K + k] : 0.0;
        bool positive = sum > 0.0 && isfinite(sum);
        f.mean += positive ? sum / (double)f.E : 0.0;
        for (size_t k = 0; k < f.K; k++) {
            bool is_in = positive && takes_part(desc, in, t, k);
            int32_t id = in->result->ids[t * f.K + k];
            f.part[t * f.K + k] = is_in ? id : -1;
            most = is_in ? fmax(most, ++count[id]) : most;
        }
    }
    f.mu = (double)desc->router.rebalance.mu;
    f.step = 1.0 / (f.mu + most);
    free(count);
    return f;
}

/* w [T,K] -> column [E], the sum of each expert. */
static void column_sums(const fixed *f, const double *w, double *column) {
    for (size_t e = 0; e < f->E; e++)
        column[e] = 0.0;
    for (size_t p = 0; p < f->tokens * f->K; p++)
        if (f->part[p] >= 0)
            column[f->part[p]] += w[p];
}

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* What is taken from each value of v [n] that stays above 0, so that they have the sum. */
static double threshold(const double *v, size_t n, double sum) {
    double *sorted = make(n, sizeof *sorted), partial = 0.0, tau = 0.0;
    for (size_t i = 0; i < n; i++)
        sorted[i] = v[i];
    qsort(sorted, n, sizeof *sorted, descending);
    for (size_t i = 0; i < n; i++) {
        partial += sorted[i];
        double t = (partial - sum) / (double)(i + 1);
        tau = sorted[i] > t ? t : tau;
    }
    free(sorted);
    return tau;
}

/* One step: w -> next [T,K]. */
static void step_forward(const fixed *f, const double *w, double *next) {
    double *column = make(f->E, sizeof *column), *row = make(f->K, sizeof *row);
    column_sums(f, w, column);
    for (size_t t = 0; t < f->tokens; t++) {
        size_t n = 0;
        double sum = 0.0;
        for (size_t p = t * f->K; p < (t + 1) * f->K; p++) {
            next[p] = w[p];
            if (f->part[p] < 0)
                continue;
            double slope = column[f->part[p]] - f->mean + f->mu * (w[p] - f->before[p]);
            row[n++] = next[p] = w[p] - f->step * slope;
            sum += f->before[p];
        }
        double tau = threshold(row, n, sum);
        for (size_t p = t * f->K; p < (t + 1) * f->K; p++)
            if (f->part[p] >= 0)
                next[p] = fmax(next[p] - tau, 0.0);
    }
    free(column);
    free(row);
}

/* The projection of the rows to `next` backwards: d in place, dbefore is added. */
static void project_backward(const fixed *f, const double *next, double *d, double *dbefore) {
    for (size_t t = 0; t < f->tokens; t++) {
        double mean = 0.0, n = 0.0;
        for (size_t p = t * f->K; p < (t + 1) * f->K; p++)
            if (f->part[p] >= 0 && next[p] > 0.0) {
                mean += d[p];
                n += 1.0;
            }
        mean = n > 0.0 ? mean / n : 0.0;
        for (size_t p = t * f->K; p < (t + 1) * f->K; p++) {
            if (f->part[p] < 0)
                continue;
            dbefore[p] += mean;
            d[p] = next[p] > 0.0 ? d[p] - mean : 0.0;
        }
    }
}

/*
 * One step that gave `next`, backwards: d [T,K] in place, dbefore [T,K] is added. Through L*, which
 * moves a whole row, nothing passes: the projection takes it back.
 */
static void step_backward(const fixed *f, const double *next, double *d, double *dbefore) {
    double *column = make(f->E, sizeof *column);
    project_backward(f, next, d, dbefore);
    column_sums(f, d, column);
    for (size_t p = 0; p < f->tokens * f->K; p++) {
        if (f->part[p] < 0)
            continue;
        dbefore[p] += f->step * f->mu * d[p];
        d[p] -= f->step * (column[f->part[p]] + f->mu * d[p]);
    }
    free(column);
}

void ref_backward_rebalance(const clmoe_layer_desc *desc, const ref_backward_in *in,
                            const double *before, double *dw) {
    size_t steps = desc->router.rebalance.iterations;
    fixed f = fixed_of(desc, in, before);
    size_t pairs = f.tokens * f.K;
    double *w = make((steps + 1) * pairs, sizeof *w), *dbefore = make(pairs, sizeof *dbefore);
    for (size_t p = 0; p < pairs; p++)
        w[p] = before[p];
    for (size_t i = 0; i < steps; i++)
        step_forward(&f, w + i * pairs, w + (i + 1) * pairs);
    for (size_t i = steps; i > 0; i--)
        step_backward(&f, w + i * pairs, dw, dbefore);
    for (size_t p = 0; p < pairs; p++)
        dw[p] += dbefore[p];
    free(w);
    free(dbefore);
    free(f.part);
}
