/* The same tokens backward: dx and dlogits. */
#include "reference.h"

#include "ref_backward.h"

#include <math.h>
#include <stdlib.h>

/* The oracle's arrays, one expert at a time. */
typedef struct workbench {
    clmoe_layer_desc desc;
    float *row;                  /* [D] */
    double *x, *dy;              /* [N,D] */
    double *dout;                /* [D] */
    float *gate, *down;          /* [2H,D], [D,H] of one expert */
    ref_mlp_gradients gradients; /* of these; not looked at */
} workbench;

static void workbench_free(workbench *w) {
    free(w->row);
    free(w->x);
    free(w->dy);
    free(w->dout);
    free(w->gate);
    free(w->down);
    free(w->gradients.gate);
    free(w->gradients.down);
}

static clmoe_status workbench_make(const inputs *in, const reference *ref, workbench *w) {
    const size_t dim = in->of.dim, matrix = in->of.hidden_dim * dim, rows = ref->count * dim;
    *w = (workbench){.desc = inputs_desc(in, NULL),
                     .row = malloc(dim * sizeof *w->row),
                     .x = malloc(rows * sizeof *w->x),
                     .dy = malloc(rows * sizeof *w->dy),
                     .dout = malloc(dim * sizeof *w->dout),
                     .gate = malloc(2 * matrix * sizeof *w->gate),
                     .down = malloc(matrix * sizeof *w->down),
                     .gradients = {.gate = calloc(2 * matrix, sizeof(double)),
                                   .down = calloc(matrix, sizeof(double))}};
    const bool ready = w->row && w->x && w->dy && w->dout && w->gate && w->down &&
                       w->gradients.gate && w->gradients.down;
    return ready ? CLMOE_SUCCESS : bench_no_memory("the reference");
}

/* The tokens' rows of x or dy. */
static void fill_rows(const inputs *in, const values *v, const reference *ref, workbench *w,
                      double *to) {
    const size_t dim = in->of.dim;
    for (uint32_t n = 0; n < ref->count; n++) {
        values_fill(v, (uint64_t)ref->token[n] * dim, dim, w->row);
        for (size_t d = 0; d < dim; d++)
            to[n * dim + d] = (double)w->row[d];
    }
}

/* The pairs of one expert: what they add to dx. */
static void run_expert(const inputs *in, workbench *w, uint32_t expert, reference *ref) {
    const bench_case *c = &in->of;
    const size_t dim = c->dim, matrix = (size_t)c->hidden_dim * dim;
    const ref_weights weights = {.experts = {.gate = w->gate, .down = w->down}};
    ref_gradients gradients = {.experts = w->gradients};
    const ref_backward_layer layer = {&w->desc, &weights, &gradients};
    bool filled = false;
    for (size_t p = 0; p < (size_t)ref->count * c->top_k; p++) {
        const size_t n = p / c->top_k;
        if (ref->ids[p] != (int32_t)expert)
            continue;
        if (!filled) {
            values_fill(&in->gate, 2 * matrix * expert, 2 * matrix, w->gate);
            values_fill(&in->down, matrix * expert, matrix, w->down);
            filled = true;
        }
        for (size_t d = 0; d < dim; d++)
            w->dout[d] = ref->weights[p] * w->dy[n * dim + d];
        ref_expert_backward(&layer, 0, w->x + n * dim, &(ref_scale){.weight = 1.0}, w->dout,
                            ref->experts_dx + n * dim);
    }
}

/* <a, b>, and its square as it would be on average, were the directions random. */
static double dot(const double *a, const double *b, size_t n, double *square) {
    double sum = 0, of_a = 0, of_b = 0;
    for (size_t i = 0; i < n; i++) {
        sum += a[i] * b[i];
        of_a += a[i] * a[i];
        of_b += b[i] * b[i];
    }
    *square = of_a * of_b / (double)n;
    return sum;
}

/*
 * Weights that are softmax, renormalised, are softmax over the chosen: dl = w (dw - sum of w dw),
 * where dw = <dy, output of the expert>.
 */
static void run_router(const inputs *in, const workbench *w, uint32_t n, reference *ref) {
    const bench_case *c = &in->of;
    const size_t dim = c->dim, first = (size_t)n * c->top_k;
    const double *weights = ref->weights + first;
    const int32_t *ids = ref->ids + first;
    double *dlogits = ref->dlogits + (size_t)n * c->experts, mean = 0, terms = 0, size = 0;
    for (uint32_t k = 0; k < c->top_k; k++) {
        double square;
        dlogits[ids[k]] = dot(w->dy + n * dim, ref->experts + (first + k) * dim, dim, &square);
        mean += weights[k] * dlogits[ids[k]];
        terms += weights[k] * weights[k] * fmax(square, dlogits[ids[k]] * dlogits[ids[k]]);
    }
    for (uint32_t k = 0; k < c->top_k; k++) {
        dlogits[ids[k]] = weights[k] * (dlogits[ids[k]] - mean);
        size += dlogits[ids[k]] * dlogits[ids[k]];
    }
    ref->dlogits_blur[n] = size > 0 ? fmax(1, sqrt(terms / size)) : 1;
}

/* What comes through the experts and through the router. */
static void sum_dx(const inputs *in, uint32_t n, reference *ref) {
    const bench_case *c = &in->of;
    const size_t dim = c->dim;
    const double *dlogits = ref->dlogits + (size_t)n * c->experts;
    for (size_t d = 0; d < dim; d++) {
        double *dx = &ref->dx[n * dim + d];
        *dx = ref->experts_dx[n * dim + d];
        for (uint32_t k = 0; k < c->top_k; k++) {
            const uint64_t expert = (uint64_t)ref->ids[n * c->top_k + k];
            *dx += dlogits[expert] * (double)value_at(&in->router, expert * dim + d);
        }
    }
}

clmoe_status reference_backward(const inputs *in, reference *ref) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t rows = (size_t)ref->count * in->of.dim;
    workbench w = {.row = NULL};
    if (ref->dx || in->of.routing_only)
        return CLMOE_SUCCESS;
    ref->experts_dx = calloc(rows, sizeof *ref->experts_dx);
    ref->dx = calloc(rows, sizeof *ref->dx);
    ref->dlogits = calloc((size_t)ref->count * in->of.experts, sizeof *ref->dlogits);
    ref->dlogits_blur = calloc(ref->count, sizeof *ref->dlogits_blur);
    if (!ref->experts_dx || !ref->dx || !ref->dlogits || !ref->dlogits_blur)
        TRY(bench_no_memory("the reference"));
    TRY(workbench_make(in, ref, &w));
    fill_rows(in, &in->x, ref, &w, w.x);
    fill_rows(in, &in->dy, ref, &w, w.dy);
    for (uint32_t e = 0; e < in->of.experts; e++)
        run_expert(in, &w, e, ref);
    for (uint32_t n = 0; n < ref->count; n++)
        run_router(in, &w, n, ref);
    for (uint32_t n = 0; n < ref->count; n++)
        sum_dx(in, n, ref);
done:
    workbench_free(&w);
    return status;
}
