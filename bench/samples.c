#include "samples.h"

#include "ref_backward.h"

#include <stdlib.h>

/* The oracle's arrays of one unit: an expert of H 1. */
typedef struct unit_bench {
    clmoe_layer_desc desc;
    float *gate_up, *down;       /* [2,D], [D] */
    float *row;                  /* [D] */
    double *x, *dout, *dx;       /* [D] */
    ref_mlp_gradients gradients; /* where they are added */
} unit_bench;

static void unit_bench_free(unit_bench *u) {
    free(u->gate_up);
    free(u->down);
    free(u->row);
    free(u->x);
    free(u->dout);
    free(u->dx);
}

static clmoe_status unit_bench_make(const inputs *in, unit_bench *u) {
    const size_t dim = in->of.dim;
    *u = (unit_bench){.desc = inputs_desc(in, NULL),
                      .gate_up = malloc(2 * dim * sizeof *u->gate_up),
                      .down = malloc(dim * sizeof *u->down),
                      .row = malloc(dim * sizeof *u->row),
                      .x = malloc(dim * sizeof *u->x),
                      .dout = malloc(dim * sizeof *u->dout),
                      .dx = calloc(dim, sizeof *u->dx)};
    u->desc.experts.hidden_dim = 1;
    const bool ready = u->gate_up && u->down && u->row && u->x && u->dout && u->dx;
    return ready ? CLMOE_SUCCESS : bench_no_memory("samples of gradients");
}

static void fill_unit(const inputs *in, uint32_t expert, uint32_t unit, unit_bench *u) {
    const size_t dim = in->of.dim, hidden = in->of.hidden_dim;
    const uint64_t rows = (uint64_t)expert * 2 * hidden, matrix = (uint64_t)expert * hidden * dim;
    values_fill(&in->gate, (rows + unit) * dim, dim, u->gate_up);
    values_fill(&in->gate, (rows + hidden + unit) * dim, dim, u->gate_up + dim);
    for (size_t d = 0; d < dim; d++)
        u->down[d] = value_at(&in->down, matrix + d * hidden + unit);
}

/* A row of x or dy, times `scale`. */
static void fill_row(const values *v, size_t token, size_t dim, double scale, unit_bench *u,
                     double *to) {
    values_fill(v, (uint64_t)token * dim, dim, u->row);
    for (size_t d = 0; d < dim; d++)
        to[d] = scale * (double)u->row[d];
}

/* Adds what each pair of the expert gives. */
static void add_pairs(const inputs *in, uint32_t expert, const int32_t *ids, const float *weights,
                      unit_bench *u) {
    const bench_case *c = &in->of;
    const ref_weights of_unit = {.experts = {.gate = u->gate_up, .down = u->down}};
    ref_gradients gradients = {.experts = u->gradients};
    const ref_backward_layer layer = {&u->desc, &of_unit, &gradients};
    for (size_t p = 0; p < (size_t)c->tokens * c->top_k; p++) {
        if (ids[p] != (int32_t)expert)
            continue;
        fill_row(&in->x, p / c->top_k, c->dim, 1, u, u->x);
        fill_row(&in->dy, p / c->top_k, c->dim, (double)weights[p], u, u->dout);
        ref_expert_backward(&layer, 0, u->x, &(ref_scale){.weight = 1.0}, u->dout, u->dx);
    }
}

/* Half of the least f16 over the mean weight of the expert's pairs, as rows of dy are about 1. */
static double blur_of(const inputs *in, uint32_t expert, const int32_t *ids, const float *weights) {
    const size_t pairs = (size_t)in->of.tokens * in->of.top_k;
    double sum = 0, count = 0;
    for (size_t p = 0; p < pairs; p++)
        if (ids[p] == (int32_t)expert) {
            sum += (double)weights[p];
            count++;
        }
    return in->type == CLMOE_F16 && sum > 0 ? 0x1p-25 * count / sum : 0;
}

/* Which units are looked at. */
static clmoe_status choose(const inputs *in, const int32_t *ids, gradient_samples *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &in->of;
    const size_t pairs = (size_t)c->tokens * c->top_k;
    uint32_t *load = calloc(c->experts, sizeof *load), most = 0, least = 0;
    if (!load)
        TRY(bench_no_memory("samples of gradients"));
    for (size_t p = 0; p < pairs; p++)
        if (ids[p] < 0 || (uint32_t)ids[p] >= c->experts)
            TRY(cli_fail(CLMOE_ENGINE_FAILED, "a choice is expert %d", (int)ids[p]));
        else
            load[ids[p]]++;
    for (uint32_t e = 0; e < c->experts; e++) {
        most = load[e] > load[most] ? e : most;
        least = load[e] < load[least] ? e : least;
    }
    const uint32_t experts[GRADIENT_SAMPLES] = {(uint32_t)ids[0], most, least};
    for (uint32_t i = 0; i < GRADIENT_SAMPLES; i++) {
        s->expert[i] = experts[i];
        s->unit[i] = random_mix(i + 1) % c->hidden_dim;
    }
done:
    free(load);
    return status;
}

clmoe_status gradient_samples_make(const inputs *in, const int32_t *ids, const float *weights,
                                   gradient_samples *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t dim = in->of.dim;
    unit_bench u = {.gate_up = NULL};
    TRY(choose(in, ids, s));
    TRY(unit_bench_make(in, &u));
    s->gate_up = calloc(GRADIENT_SAMPLES * 2 * dim, sizeof *s->gate_up);
    s->down = calloc(GRADIENT_SAMPLES * dim, sizeof *s->down);
    if (!s->gate_up || !s->down)
        TRY(bench_no_memory("samples of gradients"));
    for (uint32_t i = 0; i < GRADIENT_SAMPLES; i++) {
        u.gradients =
            (ref_mlp_gradients){.gate = s->gate_up + i * 2 * dim, .down = s->down + i * dim};
        fill_unit(in, s->expert[i], s->unit[i], &u);
        s->blur[i] = blur_of(in, s->expert[i], ids, weights);
        add_pairs(in, s->expert[i], ids, weights, &u);
    }
    s->made = true;
done:
    unit_bench_free(&u);
    if (status != CLMOE_SUCCESS)
        gradient_samples_free(s);
    return status;
}

void gradient_samples_free(gradient_samples *s) {
    free(s->gate_up);
    free(s->down);
    *s = (gradient_samples){0};
}
