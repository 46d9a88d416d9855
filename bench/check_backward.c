/* Gradients: dx and dlogits of some tokens, and some rows and columns of those of the weights. */
#include "check.h"

#include <stdio.h>
#include <stdlib.h>

/* Of sums of f32 over the tokens. */
#define ROUTER_TOLERANCE 1e-5

/* What dlogits come from is rounded twice: rows between the steps, and the products of two. */
static clmoe_status check_rows(const bench_backward *b, const reference *ref,
                               check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &b->in->of;
    float *row = calloc(c->dim > c->experts ? c->dim : c->experts, sizeof *row);
    if (!row)
        TRY(bench_no_memory("a row"));
    for (uint32_t n = 0; n < ref->count; n++) {
        TRY(check_read_row(b->device, b->in->type, b->buffers[BACKWARD_DX], ref->token[n], c->dim,
                           row));
        check_row("dx", row, ref->dx + (size_t)n * c->dim, c->dim, ref->tolerance, result);
        TRY(check_read_row(b->device, CLMOE_F32, b->buffers[BACKWARD_DLOGITS], ref->token[n],
                           c->experts, row));
        check_row("dlogits", row, ref->dlogits + (size_t)n * c->experts, c->experts,
                  2 * ref->tolerance * ref->dlogits_blur[n], result);
    }
done:
    free(row);
    return status;
}

static clmoe_status check_y(const bench_backward *b, const reference *ref, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t dim = b->in->of.dim;
    float *row = calloc(dim, sizeof *row);
    if (!row)
        TRY(bench_no_memory("a row"));
    for (uint32_t n = 0; n < ref->count; n++) {
        TRY(check_read_row(b->device, b->in->type, b->buffers[BACKWARD_Y], ref->token[n], dim,
                           row));
        check_row("y", row, ref->y + n * dim, dim, ref->tolerance, result);
    }
done:
    free(row);
    return status;
}

/* ---- The experts' weights -------------------------------------------------------------------- */

/* The samples, from the choice that the steps score and topk left. */
static clmoe_status make_samples(subject *s) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &s->in->of;
    const size_t pairs = (size_t)c->tokens * c->top_k;
    int32_t *ids = malloc(pairs * sizeof *ids);
    float *weights = malloc(pairs * sizeof *weights);
    if (s->backward.samples.made)
        goto done;
    if (!ids || !weights)
        TRY(bench_no_memory("the choices"));
    TRY(subject_read(s, SUBJECT_IDS, 0, pairs * sizeof *ids, ids));
    TRY(subject_read(s, SUBJECT_WEIGHTS, 0, pairs * sizeof *weights, weights));
    TRY(gradient_samples_make(s->in, ids, weights, &s->backward.samples));
done:
    free(ids);
    free(weights);
    return status;
}

/* Column `unit` of the expert's [D,H]. */
static clmoe_status read_column(const bench_backward *b, uint32_t expert, uint32_t unit,
                                float *to) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_type type = inputs_gradient_type(b->in);
    const size_t dim = b->in->of.dim, bytes = type_bytes(type);
    const size_t from[3] = {unit * bytes, expert * dim, 0}, origin[3] = {0};
    const size_t region[3] = {bytes, dim, 1}, pitch = b->in->of.hidden_dim * bytes;
    uint16_t *halves = calloc(dim, sizeof *halves);
    if (!halves)
        TRY(bench_no_memory("a column"));
    TRY(CL(clEnqueueReadBufferRect(b->device->queue, b->gradients.experts.down.mem, CL_TRUE, from,
                                   origin, region, pitch, 0, bytes, 0,
                                   type == CLMOE_F32 ? (void *)to : halves, 0, NULL, NULL)));
    if (type != CLMOE_F32)
        check_widen(type, halves, dim, to);
done:
    free(halves);
    return status;
}

void check_sample(const char *what, size_t dim, const gradient_samples *samples, uint32_t i,
                  const float *const rows[3], double tolerance, check_result *result) {
    const double *want[] = {samples->gate_up + i * 2 * dim, samples->gate_up + (i * 2 + 1) * dim,
                            samples->down + i * dim};
    static const char *const names[] = {"gate", "up", "down"};
    char name[64];
    for (int part = 0; part < 3; part++) {
        snprintf(name, sizeof name, "%sgradient of %s, expert %u", what, names[part],
                 (unsigned)samples->expert[i]);
        check_row(name, rows[part], want[part], dim, tolerance, result);
    }
}

static clmoe_status check_samples(const bench_backward *b, const reference *ref,
                                  check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t dim = b->in->of.dim, hidden = b->in->of.hidden_dim;
    const cl_mem gate = b->gradients.experts.gate.mem;
    const clmoe_type type = inputs_gradient_type(b->in);
    float *rows = calloc(3 * dim, sizeof *rows);
    if (!rows)
        TRY(bench_no_memory("rows of gradients"));
    for (uint32_t i = 0; i < GRADIENT_SAMPLES; i++) {
        const uint32_t expert = b->samples.expert[i], unit = b->samples.unit[i];
        const size_t row = expert * 2 * hidden + unit;
        const float *const parts[3] = {rows, rows + dim, rows + 2 * dim};
        TRY(check_read_row(b->device, type, gate, row, dim, rows));
        TRY(check_read_row(b->device, type, gate, row + hidden, dim, rows + dim));
        TRY(read_column(b, expert, unit, rows + 2 * dim));
        check_sample("", dim, &b->samples, i, parts, ref->tolerance + b->samples.blur[i], result);
    }
done:
    free(rows);
    return status;
}

/* ---- The router's ---------------------------------------------------------------------------- */

/* From dlogits [T,E], which check_rows() looked at: the row of expert e is sum_t dlogits_te x_t. */
static void want_router(const inputs *in, const float *dlogits, uint32_t expert, float *x,
                        double *want) {
    const bench_case *c = &in->of;
    for (uint32_t t = 0; t < c->tokens; t++) {
        const double dlogit = (double)dlogits[(size_t)t * c->experts + expert];
        if (dlogit == 0)
            continue;
        values_fill(&in->x, (uint64_t)t * c->dim, c->dim, x);
        for (uint32_t d = 0; d < c->dim; d++)
            want[d] += dlogit * (double)x[d];
    }
}

static void want_bias(const bench_case *c, const float *dlogits, double *want) {
    for (size_t i = 0; i < (size_t)c->tokens * c->experts; i++)
        want[i % c->experts] += (double)dlogits[i];
}

/* The arrays of the check. */
typedef struct router_check {
    float *dlogits, *got, *x;     /* [T,E], [D or E], [D] */
    double *want_row, *want_bias; /* [D], [E] */
} router_check;

static clmoe_status compare_router(const bench_backward *b, router_check *r, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &b->in->of;
    const uint32_t expert = b->samples.expert[1];
    TRY(check_read_row(b->device, CLMOE_F32, b->buffers[BACKWARD_DLOGITS], 0,
                       (size_t)c->tokens * c->experts, r->dlogits));
    want_router(b->in, r->dlogits, expert, r->x, r->want_row);
    TRY(check_read_row(b->device, CLMOE_F32, b->gradients.router.mem, expert, c->dim, r->got));
    check_row("gradient of the router", r->got, r->want_row, c->dim, ROUTER_TOLERANCE, result);
    want_bias(c, r->dlogits, r->want_bias);
    TRY(check_read_row(b->device, CLMOE_F32, b->gradients.router_bias.mem, 0, c->experts, r->got));
    check_row("gradient of the router's bias", r->got, r->want_bias, c->experts, ROUTER_TOLERANCE,
              result);
done:
    return status;
}

static clmoe_status check_router(const bench_backward *b, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_case *c = &b->in->of;
    const size_t longest = c->dim > c->experts ? c->dim : c->experts;
    router_check r = {.dlogits = malloc((size_t)c->tokens * c->experts * sizeof *r.dlogits),
                      .got = malloc(longest * sizeof *r.got),
                      .x = malloc(c->dim * sizeof *r.x),
                      .want_row = calloc(c->dim, sizeof *r.want_row),
                      .want_bias = calloc(c->experts, sizeof *r.want_bias)};
    if (!r.dlogits || !r.got || !r.x || !r.want_row || !r.want_bias)
        TRY(bench_no_memory("the router's gradient"));
    TRY(compare_router(b, &r, result));
done:
    free(r.dlogits);
    free(r.got);
    free(r.x);
    free(r.want_row);
    free(r.want_bias);
    return status;
}

clmoe_status check_backward(subject *s, const reference *ref, bench_step step,
                            check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const bench_backward *b = &s->backward;
    if (step == STEP_FORWARD_BACKWARD)
        TRY(check_y(b, ref, result));
    if (step != STEP_BACKWARD_WEIGHTS)
        TRY(check_rows(b, ref, result));
    if (step == STEP_BACKWARD_DATA)
        return CLMOE_SUCCESS;
    TRY(make_samples(s));
    TRY(check_samples(b, ref, result));
    TRY(check_router(b, result));
done:
    return status;
}
