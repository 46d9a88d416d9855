/* Soft MoE backwards: through both softmaxes, the experts, and both norms. */
#include "ref_backward.h"
#include "ref_random.h"

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

/* Values of the forward and their gradients; N slots. */
typedef struct soft {
    size_t T, N, D;
    bool *is_in;                       /* [T]: the token enters slots */
    double *x, *r, *x_norm, *r_norm;   /* [T,D], [N,D], [T], [N] */
    double *l, *to_slot, *to_token;    /* [T,N]: logits, softmax over tokens, over slots */
    double *rows, *outs;               /* [N,D]: what enters an expert and what leaves it */
    double *dl, *dto_slot, *dto_token; /* [T,N] */
    double *drows, *douts;             /* [N,D] */
} soft;

static double norm_of(const double *v, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += v[i] * v[i];
    return sqrt(sum);
}

static double dot(const double *a, const double *b, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static void soft_alloc(const clmoe_layer_desc *desc, const ref_forward_in *in, soft *s) {
    size_t T = in->tokens, N = ref_router_rows(desc), D = desc->dim;
    *s = (soft){.T = T, .N = N, .D = D};
    s->is_in = make(T, sizeof *s->is_in);
    double **of_tokens[] = {&s->l, &s->to_slot, &s->to_token, &s->dl, &s->dto_slot, &s->dto_token};
    double **of_slots[] = {&s->r, &s->rows, &s->outs, &s->drows, &s->douts};
    for (size_t i = 0; i < sizeof of_tokens / sizeof of_tokens[0]; i++)
        *of_tokens[i] = make(T * N, sizeof(double));
    for (size_t i = 0; i < sizeof of_slots / sizeof of_slots[0]; i++)
        *of_slots[i] = make(N * D, sizeof(double));
    s->x = make(T * D, sizeof *s->x);
    s->x_norm = make(T, sizeof *s->x_norm);
    s->r_norm = make(N, sizeof *s->r_norm);
}

static void soft_free(soft *s) {
    double *all[] = {s->x,    s->r,    s->x_norm, s->r_norm, s->l,     s->to_slot,  s->to_token,
                     s->rows, s->outs, s->dl,     s->drows,  s->douts, s->dto_slot, s->dto_token};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
    free(s->is_in);
}

/* The logits, of tokens that are not masked and finite. */
static void soft_logits(const clmoe_layer_desc *desc, const ref_forward_in *in, soft *s) {
    for (size_t i = 0; i < s->N * s->D; i++)
        s->r[i] = (double)in->weights->router[i];
    for (size_t n = 0; n < s->N; n++)
        s->r_norm[n] = norm_of(s->r + n * s->D, s->D);
    for (size_t t = 0; t < s->T; t++) {
        double *x = s->x + t * s->D;
        for (size_t d = 0; d < s->D; d++)
            x[d] = (double)in->x[t * s->D + d];
        s->x_norm[t] = norm_of(x, s->D);
        s->is_in[t] = isfinite(s->x_norm[t]) && !(in->token_mask && in->token_mask[t] == 0);
        for (size_t n = 0; n < s->N && s->is_in[t]; n++) {
            double norms = s->x_norm[t] * s->r_norm[n];
            if (norms > 0.0)
                s->l[t * s->N + n] =
                    (double)desc->router.soft_moe.scale * dot(x, s->r + n * s->D, s->D) / norms;
        }
    }
}

/* Both softmaxes. */
static void soft_shares(soft *s) {
    size_t T = s->T, N = s->N;
    for (size_t t = 0; t < T; t++)
        for (size_t n = 0; n < N && s->is_in[t]; n++) {
            double column = 0.0, row = 0.0, l = s->l[t * N + n];
            for (size_t o = 0; o < T; o++)
                column += s->is_in[o] ? exp(s->l[o * N + n] - l) : 0.0;
            for (size_t o = 0; o < N; o++)
                row += exp(s->l[t * N + o] - l);
            s->to_slot[t * N + n] = 1.0 / column;
            s->to_token[t * N + n] = 1.0 / row;
        }
}

static void soft_rows(const clmoe_layer_desc *desc, const ref_forward_in *in, soft *s) {
    for (size_t n = 0; n < s->N; n++) {
        double *row = s->rows + n * s->D;
        for (size_t t = 0; t < s->T; t++)
            for (size_t d = 0; d < s->D && s->is_in[t]; d++)
                row[d] += s->to_slot[t * s->N + n] * s->x[t * s->D + d];
        const ref_scale scale = {1.0, in->state, REF_HIDDEN, (uint32_t)n};
        ref_expert_row(desc, in->weights, (uint32_t)(n / desc->router.soft_moe.slots), row, &scale,
                       s->outs + n * s->D);
    }
}

/* dy -> douts and dto_token. */
static void mix_backward(const ref_backward_in *in, soft *s) {
    for (size_t t = 0; t < s->T; t++)
        for (size_t n = 0; n < s->N && s->is_in[t]; n++)
            for (size_t d = 0; d < s->D; d++) {
                double dy = (double)in->dy[t * s->D + d];
                s->dto_token[t * s->N + n] += dy * s->outs[n * s->D + d];
                s->douts[n * s->D + d] += dy * s->to_token[t * s->N + n];
            }
    for (size_t i = 0; i < s->N * s->D && in->dye; i++)
        s->douts[i] += (double)in->dye[i];
}

/* drows -> dto_slot and, as the rows are means of x, dx. */
static void rows_backward(soft *s, double *dx) {
    for (size_t t = 0; t < s->T; t++)
        for (size_t n = 0; n < s->N && s->is_in[t]; n++) {
            const double *drow = s->drows + n * s->D;
            s->dto_slot[t * s->N + n] = dot(drow, s->x + t * s->D, s->D);
            for (size_t d = 0; d < s->D; d++)
                dx[t * s->D + d] += s->to_slot[t * s->N + n] * drow[d];
        }
}

/* Both softmaxes: dto_slot and dto_token -> dl. */
static void shares_backward(soft *s) {
    size_t T = s->T, N = s->N;
    for (size_t t = 0; t < T; t++)
        for (size_t n = 0; n < N && s->is_in[t]; n++) {
            double column = 0.0, row = 0.0;
            for (size_t o = 0; o < T; o++)
                column += s->to_slot[o * N + n] * s->dto_slot[o * N + n];
            for (size_t o = 0; o < N; o++)
                row += s->to_token[t * N + o] * s->dto_token[t * N + o];
            s->dl[t * N + n] = s->to_slot[t * N + n] * (s->dto_slot[t * N + n] - column) +
                               s->to_token[t * N + n] * (s->dto_token[t * N + n] - row);
        }
}

/* l = scale * x/|x| . r/|r|: dl -> dx and the router's gradient. */
static void logits_backward(const clmoe_layer_desc *desc, const soft *s, double *dx,
                            double *drouter) {
    for (size_t t = 0; t < s->T; t++)
        for (size_t n = 0; n < s->N && s->is_in[t]; n++) {
            double xn = s->x_norm[t], rn = s->r_norm[n], dl = s->dl[t * s->N + n];
            double cosine_scale = (double)desc->router.soft_moe.scale, l = s->l[t * s->N + n];
            const double *x = s->x + t * s->D, *r = s->r + n * s->D;
            for (size_t d = 0; d < s->D && xn > 0.0 && rn > 0.0; d++) {
                dx[t * s->D + d] += dl * (cosine_scale * r[d] / rn - l * x[d] / xn) / xn;
                drouter[n * s->D + d] += dl * (cosine_scale * x[d] / xn - l * r[d] / rn) / rn;
            }
        }
}

void ref_backward_soft_moe(const clmoe_layer_desc *desc, const ref_backward_in *in,
                           ref_backward_result *result) {
    soft s;
    ref_backward_layer layer = {desc, in->forward->weights, &result->gradients};
    soft_alloc(desc, in->forward, &s);
    soft_logits(desc, in->forward, &s);
    soft_shares(&s);
    soft_rows(desc, in->forward, &s);
    mix_backward(in, &s);
    for (size_t n = 0; n < s.N; n++) {
        const ref_scale scale = {1.0, in->forward->state, REF_HIDDEN, (uint32_t)n};
        ref_expert_backward(&layer, (uint32_t)(n / desc->router.soft_moe.slots), s.rows + n * s.D,
                            &scale, s.douts + n * s.D, s.drows + n * s.D);
    }
    rows_backward(&s, result->dx);
    shares_backward(&s);
    logits_backward(desc, &s, result->dx, result->gradients.router);
    soft_free(&s);
}
