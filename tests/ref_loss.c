/* The oracle's losses: values, what their gradients hold fixed, and the gradients. */
#include "ref_balance.h"

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

/* ---- F ------------------------------------------------------------------------------------- */

/* A top-k of the scores without bias and groups: adds the choices of token t to count [E]. */
static void count_fresh(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
                        double *count) {
    size_t R = ref_columns(desc);
    ref_row row;
    ref_row_make(desc, in, CLMOE_P_NORMALISED, t, &row);
    for (size_t k = 0; k < desc->top_k; k++) {
        size_t best = R;
        for (size_t j = 0; j < R; j++)
            if (row.l[j] > -INFINITY && (best == R || row.l[j] > row.l[best]))
                best = j;
        if (best == R)
            break;
        if (best < desc->num_experts)
            count[best] += 1.0;
        row.l[best] = -INFINITY;
    }
    ref_row_free(&row);
}

/* c [E] of the tokens of a scope. */
static void count_scope(const clmoe_layer_desc *desc, const ref_balance_in *in,
                        clmoe_f_source source, const ref_scope *scope, double *count) {
    for (size_t t = scope->first; t < scope->end; t++) {
        size_t p, e, end = ref_pairs_of(desc, in, t, &p);
        if (ref_is_masked(in, t))
            continue;
        if (source == CLMOE_F_FRESH) {
            count_fresh(desc, in, t, count);
            continue;
        }
        if (source == CLMOE_F_FIRST && p < end)
            end = p + 1;
        for (; p < end; p++)
            if (ref_pair_column(desc, in, p, &e) && e < desc->num_experts)
                count[e] += 1.0;
    }
}

/* What F is made of, not yet divided by its sum. */
static void load_of(const clmoe_layer_desc *desc, const ref_balance_in *in,
                    const clmoe_loss_desc *loss, const ref_scope *scope, double *count) {
    size_t E = desc->num_experts;
    if (loss->f_source == CLMOE_F_EMA)
        for (size_t e = 0; e < E; e++)
            count[e] = (double)ref_state_array(in, desc, 1)[e];
    else if (loss->f_source == CLMOE_F_SUPPLIED)
        for (size_t e = 0; e < E; e++)
            count[e] = (double)in->load_supplied[e];
    else
        count_scope(desc, in, loss->f_source, scope, count);
}

/* ---- P, or what stands in its place --------------------------------------------------------- */

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
            list[n].dropped = desc->router.renorm_after_drop && in->slot_of[p] == -1;
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
    double p = (double)router->renorm_p, sum = 0.0;
    for (size_t k = 0; k < n; k++) {
        if (list[k].dropped)
            continue;
        derivative[k] = router->renorm == CLMOE_RENORM_SUM ? 1.0 : 0.0;
        sum += router->renorm == CLMOE_RENORM_PNORM ? pow(fabs(list[k].r), p) : list[k].r;
    }
    if (router->renorm == CLMOE_RENORM_SUM)
        return sum == 0.0 ? INFINITY : sum + (double)router->renorm_eps;
    if (router->renorm == CLMOE_RENORM_NONE)
        return 1.0;
    double norm = pow(sum, 1.0 / p);
    for (size_t k = 0; k < n && sum > 0.0; k++)
        derivative[k] =
            list[k].dropped ? 0.0 : copysign(pow(fabs(list[k].r) / norm, p - 1.0), list[k].r);
    return sum == 0.0 ? INFINITY : norm;
}

/* sum over the pairs of token t of g_e w, the weights recomputed from the logits. */
static double weights_surrogate(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
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
static void weights_gradient(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
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

/* P [E] of a scope: means of p, of s, or of the combine weights as given. */
static void probabilities(const clmoe_layer_desc *desc, const ref_balance_in *in,
                          clmoe_p_source source, const ref_scope *scope, double *P) {
    for (size_t t = scope->first; t < scope->end; t++) {
        if (ref_is_masked(in, t))
            continue;
        if (source == CLMOE_P_WEIGHTS) {
            size_t p, e, end = ref_pairs_of(desc, in, t, &p);
            for (; p < end; p++)
                if (ref_pair_column(desc, in, p, &e) && e < desc->num_experts)
                    P[e] += (double)in->pair_weights[p] / scope->tokens;
            continue;
        }
        ref_row row;
        ref_row_make(desc, in, source, t, &row);
        for (size_t e = 0; e < desc->num_experts; e++)
            P[e] += (source == CLMOE_P_RAW ? row.s[e] : row.p[e]) / scope->tokens;
        ref_row_free(&row);
    }
}

/* ---- Values and g of the losses of F and P --------------------------------------------------- */

/* A distribution of the load over n units: experts or device groups. */
typedef struct units {
    size_t n;
    double *count, *F, *P, *Q; /* [n] */
    double sum;                /* of count */
    bool uniform;              /* Q is */
    double *g;                 /* [n]: the result */
} units;

static void load_variance(const double *v, size_t n, double *mean, double *variance) {
    *mean = *variance = 0.0;
    for (size_t i = 0; i < n; i++)
        *mean += v[i] / (double)n;
    for (size_t i = 0; i < n; i++)
        *variance += (v[i] - *mean) * (v[i] - *mean) / (double)n;
}

/* CV^2 of v with `eps` added to the squared mean, and its derivatives. */
static double cv2(const double *v, size_t n, double eps, double *g) {
    double m, variance;
    load_variance(v, n, &m, &variance);
    double by = m * m + eps;
    for (size_t i = 0; i < n; i++)
        g[i] = by > 0.0 ? 2.0 * (v[i] - m) / ((double)n * by) -
                              2.0 * variance * m / ((double)n * by * by)
                        : 0.0;
    return by > 0.0 ? variance / by : 0.0;
}

static double sign_of(const units *u, size_t i) {
    double away = u->uniform ? (double)u->n * u->count[i] - u->sum : u->F[i] - u->Q[i];
    return (away > 0.0) - (away < 0.0);
}

static double loss_minimax(const units *u, double beta) {
    double best = 0.0, sum = 0.0;
    beta = beta == 0.0 ? 10.0 * (double)u->n : beta;
    for (size_t i = 0; i < u->n; i++)
        best = fmax(best, u->F[i]);
    for (size_t i = 0; i < u->n; i++)
        sum += exp(beta * (u->F[i] - best));
    for (size_t i = 0; i < u->n; i++)
        u->g[i] = exp(beta * (u->F[i] - best)) / sum;
    return best + log(sum) / beta;
}

static double loss_max(const units *u) {
    size_t best = 0;
    for (size_t i = 1; i < u->n; i++)
        if (u->F[i] > u->F[best])
            best = i;
    u->g[best] = 1.0;
    return u->F[best];
}

/* The losses that are a sum over the units. `eps` is 1 / (2 T K). */
static double loss_sum(clmoe_loss_kind kind, const units *u, double eps) {
    double value = 0.0;
    for (size_t i = 0; i < u->n; i++) {
        double F = u->F[i], Q = u->Q[i], n = (double)u->n;
        switch (kind) {
        case CLMOE_LOSS_SWITCH:
            value += n * F * u->P[i];
            u->g[i] = n * F;
            break;
        case CLMOE_LOSS_SQUARED:
            value += (F - Q) * (F - Q) / 2.0;
            u->g[i] = F - Q;
            break;
        case CLMOE_LOSS_ENTROPY:
            /* For uniform Q the value leaves out log n; the gradient does not see a constant. */
            value += F > 0.0 ? F * log(u->uniform ? F : F / Q) : 0.0;
            u->g[i] = log(fmax(F, eps) / Q) + 1.0;
            break;
        default: /* L1 */
            value += fabs(F - Q);
            u->g[i] = sign_of(u, i);
            break;
        }
    }
    return value;
}

static double loss_of_units(const clmoe_loss_desc *loss, const units *u, double eps) {
    double mean, variance;
    switch (loss->kind) {
    case CLMOE_LOSS_MAX:
        return loss_max(u);
    case CLMOE_LOSS_MINIMAX:
        return loss_minimax(u, (double)loss->beta);
    case CLMOE_LOSS_LOAD_CV2:
        return cv2(u->F, u->n, 0.0, u->g);
    case CLMOE_LOSS_IMPORTANCE_CV2:
        return cv2(u->P, u->n, 1e-10, u->g);
    case CLMOE_LOSS_IMPORTANCE_VARIANCE:
        load_variance(u->P, u->n, &mean, &variance);
        for (size_t i = 0; i < u->n; i++)
            u->g[i] = 2.0 * (u->P[i] - mean) / (double)u->n;
        return variance;
    default:
        return loss_sum(loss->kind, u, eps);
    }
}

/* sum max(c_e - C, 0) / (T K), with C places per sequence. */
static double loss_overflow(const clmoe_layer_desc *desc, const ref_balance_in *in,
                            const ref_scope *scope, const double *count, double *g) {
    double C = ref_capacity_in_use(desc, in), value = 0.0;
    for (size_t e = 0; e < desc->num_experts && C > 0.0; e++) {
        g[e] = count[e] > C ? 1.0 : 0.0;
        value += fmax(count[e] - C, 0.0) / (scope->tokens * desc->top_k);
    }
    return value;
}

static double loss_communication(const clmoe_layer_desc *desc, const ref_balance_in *in,
                                 const ref_scope *scope, const double *P, double *g) {
    size_t E = desc->num_experts, D = desc->balance.device_groups;
    uint32_t *tokens = make(D, sizeof *tokens);
    double M = desc->router.num_groups > 1 ? desc->router.topk_groups : (double)D, value = 0.0;
    ref_device_tokens(desc, in, scope->first, scope->end, tokens);
    for (size_t e = 0; e < E; e++) {
        g[e] = (double)D / (M * scope->tokens) * tokens[e / (E / D)];
        value += g[e] * P[e];
    }
    free(tokens);
    return value;
}

/* Sums over the experts of each unit. */
static void gather(const double *v, size_t E, size_t n, double *to) {
    for (size_t e = 0; e < E; e++)
        to[e / (E / n)] += v[e];
}

static bool of_importance(clmoe_loss_kind kind) {
    return kind == CLMOE_LOSS_IMPORTANCE_VARIANCE || kind == CLMOE_LOSS_IMPORTANCE_CV2;
}

/* The value and g of a scope, for losses of F and P. */
static void fix_scope(const clmoe_layer_desc *desc, const ref_balance_in *in,
                      const clmoe_loss_desc *loss, ref_scope *scope) {
    size_t E = desc->num_experts, n = loss->per_device ? desc->balance.device_groups : E;
    double *count = make(E, sizeof *count), *P = make(E, sizeof *P), *Q = make(E, sizeof *Q);
    units u = {.n = n, .uniform = in->load_target == NULL};
    double **arrays[] = {&u.count, &u.F, &u.P, &u.Q, &u.g};
    for (size_t i = 0; i < 5; i++)
        *arrays[i] = make(n, sizeof(double));
    load_of(desc, in, loss, scope, count);
    if (in->logits)
        probabilities(desc, in, loss->p_source, scope, P);
    ref_target(desc, in, Q);
    gather(count, E, n, u.count);
    gather(P, E, n, u.P);
    gather(Q, E, n, u.Q);
    for (size_t i = 0; i < n; i++)
        u.sum += u.count[i];
    for (size_t i = 0; i < n && u.sum > 0.0; i++)
        u.F[i] = u.count[i] / u.sum;
    if (loss->kind == CLMOE_LOSS_OVERFLOW)
        scope->value = loss_overflow(desc, in, scope, count, scope->g);
    else if (loss->kind == CLMOE_LOSS_COMMUNICATION)
        scope->value = loss_communication(desc, in, scope, P, scope->g);
    else if (u.sum > 0.0 || of_importance(loss->kind)) { /* without load, nothing is known */
        scope->value = loss_of_units(loss, &u, 1.0 / (2.0 * scope->tokens * desc->top_k));
        for (size_t e = 0; e < E; e++)
            scope->g[e] = u.g[e / (E / n)];
    }
    for (size_t i = 0; i < 5; i++)
        free(*arrays[i]);
    free(count);
    free(P);
    free(Q);
}

/* ---- Losses that are smooth by themselves ---------------------------------------------------- */

static double sigmoid(double v) {
    return 1.0 / (1.0 + exp(-v));
}

/* log(1 + exp(v)) without overflow. */
static double softplus(double v) {
    return v > 0.0 ? v + log1p(exp(-v)) : log1p(exp(v));
}

/* The deviation of the noise on logit i of [T,R], and its derivative by x Wn^T. */
static double deviation(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t i,
                        double *derivative) {
    double scale = (double)desc->router.noise_scale * (double)in->state->noise_scale;
    *derivative = 0.0;
    if (desc->router.noise != CLMOE_NOISE_LEARNED)
        return scale;
    *derivative = scale * sigmoid(in->noise_input[i]);
    return scale * (softplus(in->noise_input[i]) + 0.01);
}

/* The n-th largest noisy logit, n from 1. */
static double nth_largest(const ref_row *row, size_t R, size_t n) {
    for (size_t j = 0; j < R; j++) {
        size_t above = 0;
        for (size_t i = 0; i < R; i++)
            above += row->noisy[i] > row->noisy[j] || (row->noisy[i] == row->noisy[j] && i < j);
        if (above == n - 1)
            return row->noisy[j];
    }
    return NAN;
}

static void fix_thresholds(const clmoe_layer_desc *desc, const ref_balance_in *in,
                           double *threshold) {
    size_t R = ref_columns(desc), K = desc->top_k;
    for (size_t t = 0; t < in->tokens; t++) {
        ref_row row;
        ref_row_make(desc, in, CLMOE_P_NORMALISED, t, &row);
        for (size_t j = 0; j < R; j++)
            threshold[t * R + j] = nth_largest(&row, R, K);
        size_t p, e, end = ref_pairs_of(desc, in, t, &p);
        for (; p < end; p++)
            if (ref_pair_column(desc, in, p, &e))
                threshold[t * R + e] = nth_largest(&row, R, K + 1);
        ref_row_free(&row);
    }
}

/* Whether the pair of a token and a column has a place in Load, and its z. */
static bool smooth_z(const clmoe_layer_desc *desc, const ref_balance_in *in, const ref_loss *fixed,
                     size_t i, double *z) {
    double slope, noisy = in->logits[i] + (in->noise ? in->noise[i] : 0.0);
    *z = (in->logits[i] - fixed->threshold[i]) / deviation(desc, in, i, &slope);
    return isfinite(noisy) && !isnan(*z);
}

/* Load [E] of a scope. */
static void smooth_load(const clmoe_layer_desc *desc, const ref_balance_in *in,
                        const ref_loss *fixed, const ref_scope *scope, double *load) {
    size_t R = ref_columns(desc);
    double z;
    for (size_t t = scope->first; t < scope->end; t++)
        for (size_t e = 0; e < desc->num_experts && !ref_is_masked(in, t); e++)
            if (smooth_z(desc, in, fixed, t * R + e, &z))
                load[e] += erfc(-z / sqrt(2.0)) / 2.0;
}

/* The value of z, token entropy or smooth load over a scope. */
static double smooth_value(const clmoe_layer_desc *desc, const ref_balance_in *in,
                           const clmoe_loss_desc *loss, const ref_loss *fixed,
                           const ref_scope *scope) {
    size_t R = ref_columns(desc);
    double value = 0.0;
    if (loss->kind == CLMOE_LOSS_SMOOTH_LOAD) {
        double *load = make(R, sizeof *load), *g = make(R, sizeof *g);
        smooth_load(desc, in, fixed, scope, load);
        value = cv2(load, desc->num_experts, 1e-10, g);
        free(load);
        free(g);
        return value;
    }
    for (size_t t = scope->first; t < scope->end; t++) {
        if (ref_is_masked(in, t))
            continue;
        ref_row row;
        ref_row_make(desc, in, loss->p_source, t, &row);
        double lse = ref_logsumexp(&row, R);
        if (loss->kind == CLMOE_LOSS_Z)
            value += lse * lse / scope->tokens;
        else
            for (size_t j = 0; j < R; j++)
                value += row.p[j] > 0.0 ? row.p[j] * log(row.p[j]) / scope->tokens : 0.0;
        ref_row_free(&row);
    }
    return value;
}

/* ---- Whole losses ---------------------------------------------------------------------------- */

static bool is_smooth(clmoe_loss_kind kind) {
    return kind == CLMOE_LOSS_Z || kind == CLMOE_LOSS_TOKEN_ENTROPY ||
           kind == CLMOE_LOSS_SMOOTH_LOAD;
}

static void make_scopes(const clmoe_layer_desc *desc, const ref_balance_in *in,
                        const clmoe_loss_desc *loss, ref_loss *fixed) {
    size_t T = in->tokens, length = loss->per_sequence ? desc->capacity.tokens_per_sequence : T;
    fixed->num_scopes = T ? (T + length - 1) / length : 0;
    fixed->scopes = make(fixed->num_scopes, sizeof *fixed->scopes);
    double used = 0.0;
    for (size_t i = 0; i < fixed->num_scopes; i++) {
        ref_scope *scope = &fixed->scopes[i];
        scope->first = i * length;
        scope->end = scope->first + length < T ? scope->first + length : T;
        scope->g = make(ref_columns(desc), sizeof *scope->g);
        for (size_t t = scope->first; t < scope->end; t++)
            scope->tokens += !ref_is_masked(in, t);
        used += scope->tokens > 0.0;
    }
    for (size_t i = 0; i < fixed->num_scopes; i++)
        fixed->scopes[i].share = fixed->scopes[i].tokens > 0.0 ? 1.0 / used : 0.0;
}

void ref_loss_make(const clmoe_layer_desc *desc, const ref_balance_in *in,
                   const clmoe_loss_desc *loss, ref_loss *fixed) {
    memset(fixed, 0, sizeof *fixed);
    make_scopes(desc, in, loss, fixed);
    if (loss->kind == CLMOE_LOSS_SMOOTH_LOAD) {
        fixed->threshold = make((size_t)in->tokens * ref_columns(desc), sizeof(double));
        fix_thresholds(desc, in, fixed->threshold);
    }
    for (size_t i = 0; i < fixed->num_scopes; i++) {
        ref_scope *scope = &fixed->scopes[i];
        if (scope->share == 0.0)
            continue;
        if (is_smooth(loss->kind))
            scope->value = smooth_value(desc, in, loss, fixed, scope);
        else
            fix_scope(desc, in, loss, scope);
        fixed->value += scope->share * scope->value;
    }
}

void ref_loss_free(ref_loss *fixed) {
    for (size_t i = 0; i < fixed->num_scopes; i++)
        free(fixed->scopes[i].g);
    free(fixed->scopes);
    free(fixed->threshold);
}

/* sum_e g_e P_e of one token, not divided by T. */
static double token_surrogate(const clmoe_layer_desc *desc, const ref_balance_in *in,
                              clmoe_p_source source, size_t t, const double *g) {
    double sum = 0.0;
    if (source == CLMOE_P_WEIGHTS)
        return weights_surrogate(desc, in, t, g);
    ref_row row;
    ref_row_make(desc, in, source, t, &row);
    for (size_t e = 0; e < desc->num_experts; e++)
        sum += g[e] * (source == CLMOE_P_RAW ? row.s[e] : row.p[e]);
    ref_row_free(&row);
    return sum;
}

double ref_loss_surrogate(const clmoe_layer_desc *desc, const ref_balance_in *in,
                          const clmoe_loss_desc *loss, const ref_loss *fixed) {
    double total = 0.0;
    for (size_t i = 0; i < fixed->num_scopes; i++) {
        const ref_scope *scope = &fixed->scopes[i];
        if (scope->share > 0.0 && is_smooth(loss->kind))
            total += scope->share * smooth_value(desc, in, loss, fixed, scope);
        for (size_t t = scope->first; t < scope->end && !is_smooth(loss->kind); t++)
            if (!ref_is_masked(in, t))
                total += scope->share / scope->tokens *
                         token_surrogate(desc, in, loss->p_source, t, scope->g);
    }
    return total;
}

/* The gradient of a token on its noisy logits: dl [R], not divided by T. */
static void token_gradient(const clmoe_layer_desc *desc, const ref_balance_in *in,
                           const clmoe_loss_desc *loss, size_t t, const double *g, double *dl) {
    size_t R = ref_columns(desc);
    if (loss->p_source == CLMOE_P_WEIGHTS && !is_smooth(loss->kind)) {
        weights_gradient(desc, in, t, g, dl);
        return;
    }
    ref_row row;
    ref_row_make(desc, in, loss->p_source, t, &row);
    double mean = 0.0, own = 0.0, lse = ref_logsumexp(&row, R);
    for (size_t j = 0; j < R; j++) {
        mean += row.p[j] * g[j];
        own += row.p[j] > 0.0 ? row.p[j] * (log(row.p[j]) + 1.0) : 0.0;
    }
    for (size_t j = 0; j < R; j++) {
        double slope = row.p[j] > 0.0 ? log(row.p[j]) + 1.0 : 0.0;
        if (row.chain[j] == 0.0)
            continue;
        if (loss->kind == CLMOE_LOSS_Z)
            dl[j] = 2.0 * lse * exp(row.noisy[j] - lse);
        else if (loss->kind == CLMOE_LOSS_TOKEN_ENTROPY)
            dl[j] = row.sum != 0.0 ? row.chain[j] * row.ds[j] * (slope - own) / row.sum : 0.0;
        else if (loss->p_source == CLMOE_P_RAW)
            dl[j] = row.chain[j] * row.ds[j] * g[j];
        else if (row.sum != 0.0)
            dl[j] = row.chain[j] * row.ds[j] * (g[j] - mean) / row.sum;
    }
    ref_row_free(&row);
}

/* Smooth load: through the clean logits, and with learned noise through the deviation. */
static void smooth_load_gradient(const clmoe_layer_desc *desc, const ref_balance_in *in,
                                 const ref_loss *fixed, const ref_scope *scope, double weight,
                                 double *dlogits, double *dnoise) {
    const double pi = 3.14159265358979323846;
    size_t R = ref_columns(desc), E = desc->num_experts;
    double *load = make(R, sizeof *load), *g = make(R, sizeof *g), z, slope;
    smooth_load(desc, in, fixed, scope, load);
    cv2(load, E, 1e-10, g);
    for (size_t t = scope->first; t < scope->end; t++)
        for (size_t e = 0; e < E && !ref_is_masked(in, t); e++) {
            size_t i = t * R + e;
            if (!smooth_z(desc, in, fixed, i, &z))
                continue;
            double sigma = deviation(desc, in, i, &slope);
            double density = isfinite(z) ? exp(-z * z / 2.0) / sqrt(2.0 * pi) : 0.0;
            dlogits[i] += weight * g[e] * density / sigma;
            if (dnoise && density > 0.0)
                dnoise[i] -= weight * g[e] * density * z / sigma * slope;
        }
    free(load);
    free(g);
}

void ref_loss_gradient(const clmoe_layer_desc *desc, const ref_balance_in *in,
                       const clmoe_loss_desc *loss, const ref_loss *fixed, double *dlogits,
                       double *dnoise) {
    size_t R = ref_columns(desc);
    double *dl = make(R, sizeof *dl), slope;
    double weight = (double)loss->weight;
    if (loss->controlled)
        weight *= (double)in->state->loss_weight;
    for (size_t i = 0; i < fixed->num_scopes; i++) {
        const ref_scope *scope = &fixed->scopes[i];
        if (scope->share == 0.0)
            continue;
        if (loss->kind == CLMOE_LOSS_SMOOTH_LOAD) {
            smooth_load_gradient(desc, in, fixed, scope, weight * scope->share, dlogits, dnoise);
            continue;
        }
        for (size_t t = scope->first; t < scope->end; t++) {
            if (ref_is_masked(in, t))
                continue;
            memset(dl, 0, R * sizeof *dl);
            token_gradient(desc, in, loss, t, scope->g, dl);
            for (size_t j = 0; j < R; j++) {
                double d = weight * scope->share / scope->tokens * dl[j];
                dlogits[t * R + j] += d;
                if (!dnoise || d == 0.0 || desc->router.noise != CLMOE_NOISE_LEARNED)
                    continue;
                /* The noise is a fixed random number times the deviation. */
                double sigma = deviation(desc, in, t * R + j, &slope);
                dnoise[t * R + j] += d * in->noise[t * R + j] / sigma * slope;
            }
        }
    }
    free(dl);
}
