/* The MLPs of the oracle backwards, one row at a time. */
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

/* ---- Activations ---------------------------------------------------------------------------- */

static double gelu_tanh_slope(double v) {
    const double c = sqrt(2.0 / 3.14159265358979323846);
    double t = tanh(c * (v + 0.044715 * v * v * v));
    return (1.0 + t) / 2.0 + v / 2.0 * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * v * v);
}

double ref_activate_slope(const clmoe_mlp_desc *desc, double v) {
    const double pi = 3.14159265358979323846;
    double alpha = (double)desc->alpha, s = ref_sigmoid(alpha * v);
    switch (desc->activation) {
    case CLMOE_ACT_SILU:
        return s + alpha * v * s * (1.0 - s);
    case CLMOE_ACT_GELU_ERF:
        return (1.0 + erf(v / sqrt(2.0))) / 2.0 + v * exp(-v * v / 2.0) / sqrt(2.0 * pi);
    case CLMOE_ACT_GELU_TANH:
        return gelu_tanh_slope(v);
    case CLMOE_ACT_RELU:
        return v > 0.0 ? 1.0 : 0.0;
    case CLMOE_ACT_RELU2:
        return v > 0.0 ? 2.0 * v : 0.0;
    }
    return NAN;
}

/* ---- Rows of matrices ------------------------------------------------------------------------ */

typedef struct mlp {
    const clmoe_mlp_desc *desc;
    const ref_mlp_weights *weights;
    ref_mlp_gradients *gradients;
    size_t expert, dim;
} mlp;

/* One row of a matrix with `stride` from element to element, and of its gradient. */
typedef struct line {
    const float *w;
    double *dw;
    size_t n, stride;
    const float *bias; /* one element, or NULL */
    double *dbias;
} line;

/* Row `row` of the expert's [rows,cols]; stored [cols,rows] if transposed. */
static line line_of(const float *matrix, double *gradient, size_t expert, size_t rows, size_t cols,
                    bool transposed, size_t row) {
    size_t first = expert * rows * cols + (transposed ? row : row * cols);
    return (line){matrix + first, gradient + first, cols, transposed ? rows : 1, NULL, NULL};
}

/* Row j of the gate or, if `is_up`, of up. */
static line hidden_line(const mlp *m, size_t j, bool is_up) {
    const clmoe_mlp_desc *desc = m->desc;
    const ref_mlp_weights *w = m->weights;
    ref_mlp_gradients *d = m->gradients;
    bool in_gate = !is_up || desc->gate_layout == CLMOE_GATE_CONCAT ||
                   desc->gate_layout == CLMOE_GATE_INTERLEAVED;
    size_t H = desc->hidden_dim, rows = H, row = j;
    if (desc->gate_layout == CLMOE_GATE_CONCAT) {
        rows = 2 * H;
        row = is_up ? H + j : j;
    } else if (desc->gate_layout == CLMOE_GATE_INTERLEAVED) {
        rows = 2 * H;
        row = 2 * j + is_up;
    }
    line l = line_of(in_gate ? w->gate : w->up, in_gate ? d->gate : d->up, m->expert, rows, m->dim,
                     desc->gate_up_transposed, row);
    if (desc->gate_up_bias) {
        l.bias = (in_gate ? w->gate_bias : w->up_bias) + m->expert * rows + row;
        l.dbias = (in_gate ? d->gate_bias : d->up_bias) + m->expert * rows + row;
    }
    return l;
}

static line down_line(const mlp *m, size_t d) {
    line l = line_of(m->weights->down, m->gradients->down, m->expert, m->dim, m->desc->hidden_dim,
                     m->desc->down_transposed, d);
    if (m->desc->down_bias) {
        l.bias = m->weights->down_bias + m->expert * m->dim + d;
        l.dbias = m->gradients->down_bias + m->expert * m->dim + d;
    }
    return l;
}

static double line_dot(const line *l, const double *x) {
    double sum = l->bias ? (double)*l->bias : 0.0;
    for (size_t k = 0; k < l->n; k++)
        sum += x[k] * (double)l->w[k * l->stride];
    return sum;
}

/* From the gradient of line_dot(), adds to dx and to the gradient of the row. */
static void line_backward(const line *l, const double *x, double dvalue, double *dx) {
    for (size_t k = 0; k < l->n; k++) {
        dx[k] += dvalue * (double)l->w[k * l->stride];
        l->dw[k * l->stride] += dvalue * x[k];
    }
    if (l->dbias)
        *l->dbias += dvalue;
}

/* ---- The MLP --------------------------------------------------------------------------------- */

/* A hidden value and its derivatives by gate and up. */
typedef struct hidden {
    double h, by_gate, by_up;
} hidden;

static hidden hidden_of(const clmoe_mlp_desc *desc, double gate, double up) {
    double limit = desc->limit > 0.0f ? (double)desc->limit : INFINITY;
    if (desc->gate_layout == CLMOE_GATE_NONE)
        return (hidden){ref_activate(desc, up), 0.0, ref_activate_slope(desc, up)};
    double low = fmin(gate, limit), shifted = fmin(fmax(up, -limit), limit);
    shifted += (double)desc->up_shift;
    hidden value = {ref_activate(desc, low) * shifted, 0.0, 0.0};
    if (gate <= limit)
        value.by_gate = ref_activate_slope(desc, low) * shifted;
    if (fabs(up) <= limit)
        value.by_up = ref_activate(desc, low);
    return value;
}

/* ref_mlp() backwards: adds to dx [dim]; returns the gradient of the weight. */
static double mlp_backward(const mlp *m, const double *x, const ref_scale *scale,
                           const double *dout, double *dx) {
    size_t H = m->desc->hidden_dim;
    bool gated = m->desc->gate_layout != CLMOE_GATE_NONE;
    hidden *values = make(H, sizeof *values);
    double *weighted = make(H, sizeof *weighted), *dweighted = make(H, sizeof *dweighted);
    double dweight = 0.0;
    for (size_t j = 0; j < H; j++) {
        line gate = {0}, up = hidden_line(m, j, true);
        if (gated)
            gate = hidden_line(m, j, false);
        values[j] = hidden_of(m->desc, line_dot(&gate, x), line_dot(&up, x));
        weighted[j] = values[j].h * scale->weight * ref_dropout_factor(m->desc, scale, j);
    }
    for (size_t d = 0; d < m->dim; d++) {
        line down = down_line(m, d);
        line_backward(&down, weighted, dout[d], dweighted);
    }
    for (size_t j = 0; j < H; j++) {
        line up = hidden_line(m, j, true);
        double factor = ref_dropout_factor(m->desc, scale, j);
        double dh = dweighted[j] * factor * scale->weight;
        dweight += dweighted[j] * factor * values[j].h;
        line_backward(&up, x, dh * values[j].by_up, dx);
        if (!gated)
            continue;
        line gate = hidden_line(m, j, false);
        line_backward(&gate, x, dh * values[j].by_gate, dx);
    }
    free(values);
    free(weighted);
    free(dweighted);
    return dweight;
}

/* From the gradient d of v / |v| to that of v, in place; 0 for a zero row. */
static void normalize_backward(const double *v, size_t n, double *d) {
    double square = 0.0, dot = 0.0;
    for (size_t i = 0; i < n; i++) {
        square += v[i] * v[i];
        dot += v[i] * d[i];
    }
    for (size_t i = 0; i < n; i++)
        d[i] = square > 0.0 ? (d[i] - v[i] * dot / square) / sqrt(square) : 0.0;
}

double ref_expert_backward(const ref_backward_layer *layer, uint32_t expert, const double *x,
                           const ref_scale *scale, const double *dout, double *dx) {
    const clmoe_layer_desc *desc = layer->desc;
    size_t D = desc->dim;
    bool at_input = desc->router.weight_at == CLMOE_WEIGHT_AT_INPUT;
    bool at_activation = desc->router.weight_at == CLMOE_WEIGHT_AT_ACTIVATION;
    double *in = make(D, sizeof *in), *din = make(D, sizeof *din);
    double *dv = make(D, sizeof *dv), *v = make(D, sizeof *v), dweight = 0.0;
    double weight = scale->weight;
    ref_scale of_hidden = *scale;
    if (!at_activation)
        of_hidden.weight = 1.0;
    for (size_t d = 0; d < D; d++) {
        in[d] = x[d] * (at_input ? weight : 1.0);
        dv[d] = dout[d];
    }
    if (desc->normalize_experts) {
        ref_mlp(&desc->experts, &layer->weights->experts, expert, desc->dim, in, &of_hidden, v);
        normalize_backward(v, D, dv);
    }
    mlp m = {&desc->experts, &layer->weights->experts, &layer->gradients->experts, expert, D};
    double dactivation = mlp_backward(&m, in, &of_hidden, dv, din);
    for (size_t d = 0; d < D; d++) {
        dx[d] += din[d] * (at_input ? weight : 1.0);
        dweight += at_input ? din[d] * x[d] : 0.0;
    }
    free(in);
    free(din);
    free(dv);
    free(v);
    return at_activation ? dactivation : dweight;
}

void ref_shared_backward(const ref_backward_layer *layer, const double *x, const ref_scale *scale,
                         const double *dout, double *dx) {
    mlp m = {&layer->desc->shared, &layer->weights->shared, &layer->gradients->shared, 0,
             layer->desc->dim};
    mlp_backward(&m, x, scale, dout, dx);
}
