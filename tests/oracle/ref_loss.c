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

/* What a choice goes by, as a float: scores that are the same float tie. -infinity: no choice. */
static void ranks_of(const clmoe_layer_desc *desc, const ref_row *row, double *ranks) {
    const clmoe_router_desc *router = &desc->router;
    bool by_score =
        router->order == CLMOE_ORDER_SCORE_THEN_TOPK && router->policy != CLMOE_POLICY_SINKHORN;
    for (size_t j = 0; j < ref_columns(desc); j++) {
        bool softmax = router->score == CLMOE_SCORE_SOFTMAX;
        double score = softmax ? row->p[j] : row->s[j];
        ranks[j] =
            row->l[j] > -INFINITY ? (double)(float)(by_score ? score : row->l[j]) : -INFINITY;
    }
}

/* A top-k of the scores without bias and groups: adds the choices of token t to count [E]. */
static void count_fresh(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
                        double *count) {
    size_t R = ref_columns(desc);
    double *ranks = make(R, sizeof *ranks);
    ref_row row;
    ref_row_make(desc, in, CLMOE_P_NORMALISED, t, &row);
    ranks_of(desc, &row, ranks);
    for (size_t k = 0; k < desc->top_k; k++) {
        size_t best = R;
        for (size_t j = 0; j < R; j++)
            if (ranks[j] > -INFINITY && (best == R || ranks[j] > ranks[best]))
                best = j;
        if (best == R)
            break;
        if (best < desc->num_experts)
            count[best] += 1.0;
        ranks[best] = -INFINITY;
    }
    ref_row_free(&row);
    free(ranks);
}

/*
 * The token's first choice, R if it has none: the best by score where the pairs come in another
 * order, ties to the lower id.
 */
static size_t first_choice(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t) {
    const clmoe_router_desc *router = &desc->router;
    size_t R = ref_columns(desc), best = R, p, e, end = ref_pairs_of(desc, in, t, &p);
    bool ordered = router->policy != CLMOE_POLICY_ALL_EXPERTS && !ref_lists_pairs(desc) &&
                   !router->groups.two_level;
    ref_row row;
    if (ordered)
        return p < end && ref_pair_column(desc, in, p, &e) ? e : R;
    double *ranks = make(R, sizeof *ranks);
    ref_row_make(desc, in, CLMOE_P_NORMALISED, t, &row);
    ranks_of(desc, &row, ranks);
    for (; p < end; p++)
        if (ref_pair_column(desc, in, p, &e) &&
            (best == R || ranks[e] > ranks[best] || (ranks[e] == ranks[best] && e < best)))
            best = e;
    ref_row_free(&row);
    free(ranks);
    return best;
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
        if (source == CLMOE_F_FIRST) {
            size_t first = first_choice(desc, in, t);
            if (first < desc->num_experts)
                count[first] += 1.0;
            continue;
        }
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

/* sum max(c_e - C, 0) / (T K) of a scope, which is no longer than what C is for. */
static double loss_overflow(const clmoe_layer_desc *desc, const ref_balance_in *in,
                            const ref_scope *scope, const double *count, double *g) {
    double C = ref_capacity_in_use(desc, in), value = 0.0;
    for (size_t e = 0; e < desc->num_experts && C > 0.0; e++) {
        g[e] = count[e] > C ? 1.0 : 0.0;
        value += fmax(count[e] - C, 0.0) / (scope->tokens * desc->top_k);
    }
    return value;
}

/* How many device groups a token can reach: fewer than all only by group limits over just them. */
static double reachable_devices(const clmoe_layer_desc *desc) {
    uint32_t D = desc->balance.device_groups, groups = desc->router.groups.count;
    if (groups > 1 && groups == D && desc->num_identity_experts == 0)
        return desc->router.groups.topk;
    return D;
}

static double loss_communication(const clmoe_layer_desc *desc, const ref_balance_in *in,
                                 const ref_scope *scope, const double *P, double *g) {
    size_t E = desc->num_experts, D = desc->balance.device_groups;
    uint32_t *tokens = make(D, sizeof *tokens);
    double M = reachable_devices(desc), value = 0.0;
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

/* The deviation of the noise on logit i of [T,R], and its derivative by x Wn^T. */
static double deviation(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t i,
                        double *derivative) {
    double scale = (double)desc->router.noise.scale * (double)in->state->noise_scale;
    *derivative = 0.0;
    if (desc->router.noise.kind != CLMOE_NOISE_LEARNED)
        return scale;
    *derivative = scale * ref_sigmoid(in->noise_input[i]);
    return scale * (ref_softplus(in->noise_input[i]) + 0.01);
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
        double last = nth_largest(&row, R, K), next = nth_largest(&row, R, K + 1);
        for (size_t j = 0; j < R; j++)
            threshold[t * R + j] = last;
        size_t p, e, end = ref_pairs_of(desc, in, t, &p);
        for (; p < end; p++)
            if (ref_pair_column(desc, in, p, &e))
                threshold[t * R + e] = next;
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
    /* A sequence has a capacity of its own: its overflow is a scope even of the batch's loss. */
    uint32_t each = desc->capacity.tokens_per_sequence;
    bool parts = loss->per_sequence || (loss->kind == CLMOE_LOSS_OVERFLOW && each > 0);
    size_t T = in->tokens, length = parts ? each : T;
    fixed->num_scopes = T ? (T + length - 1) / length : 0;
    fixed->scopes = make(fixed->num_scopes, sizeof *fixed->scopes);
    double used = 0.0, tokens = 0.0;
    for (size_t i = 0; i < fixed->num_scopes; i++) {
        ref_scope *scope = &fixed->scopes[i];
        scope->first = i * length;
        scope->end = scope->first + length < T ? scope->first + length : T;
        scope->g = make(ref_columns(desc), sizeof *scope->g);
        for (size_t t = scope->first; t < scope->end; t++)
            scope->tokens += !ref_is_masked(in, t);
        used += scope->tokens > 0.0;
        tokens += scope->tokens;
    }
    for (size_t i = 0; i < fixed->num_scopes; i++) {
        ref_scope *scope = &fixed->scopes[i];
        if (scope->tokens > 0.0)
            scope->share = loss->per_sequence ? 1.0 / used : scope->tokens / tokens;
    }
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
        return ref_weights_surrogate(desc, in, t, g);
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

/* From the gradient on l, with two levels the joint one, to the noisy and the group logits. */
static void row_back(const clmoe_layer_desc *desc, const ref_row *row, const double *d, double *dl,
                     double *du) {
    size_t R = ref_columns(desc), G = desc->router.groups.two_level ? desc->router.groups.count : 1;
    double all = 0.0;
    for (size_t j = 0; j < R; j++)
        all += d[j];
    for (size_t g = 0; g < G; g++) {
        double within = 0.0;
        for (size_t j = g * (R / G); j < (g + 1) * (R / G); j++)
            within += d[j];
        if (du != NULL && desc->router.groups.two_level)
            du[g] = within - row->gate[g] * all;
        for (size_t j = g * (R / G); j < (g + 1) * (R / G); j++)
            dl[j] =
                row->chain[j] * (d[j] - (desc->router.groups.two_level ? row->q[j] * within : 0.0));
    }
}

/* The gradient of a token on its noisy logits, dl [R], and group logits, du: not divided by T. */
static void token_gradient(const clmoe_layer_desc *desc, const ref_balance_in *in,
                           const clmoe_loss_desc *loss, size_t t, const double *g, double *dl,
                           double *du) {
    size_t R = ref_columns(desc);
    if (loss->p_source == CLMOE_P_WEIGHTS && !is_smooth(loss->kind)) {
        ref_weights_gradient(desc, in, t, g, dl);
        return;
    }
    ref_row row;
    ref_row_make(desc, in, loss->p_source, t, &row);
    double mean = 0.0, own = 0.0, lse = ref_logsumexp(&row, R), *d = make(R, sizeof *d);
    for (size_t j = 0; j < R; j++) {
        mean += row.p[j] * g[j];
        own += row.p[j] > 0.0 ? row.p[j] * (log(row.p[j]) + 1.0) : 0.0;
    }
    for (size_t j = 0; j < R; j++) {
        double slope = row.p[j] > 0.0 ? log(row.p[j]) + 1.0 : 0.0;
        if (row.l[j] == -INFINITY)
            continue;
        if (loss->kind == CLMOE_LOSS_TOKEN_ENTROPY)
            d[j] = row.sum != 0.0 ? row.ds[j] * (slope - own) / row.sum : 0.0;
        else if (loss->p_source == CLMOE_P_RAW)
            d[j] = row.ds[j] * g[j];
        else if (row.sum != 0.0)
            d[j] = row.ds[j] * (g[j] - mean) / row.sum;
    }
    if (loss->kind != CLMOE_LOSS_Z)
        row_back(desc, &row, d, dl, du);
    for (size_t j = 0; j < R && loss->kind == CLMOE_LOSS_Z; j++)
        dl[j] = row.noisy[j] > -INFINITY ? 2.0 * lse * exp(row.noisy[j] - lse) : 0.0;
    ref_row_free(&row);
    free(d);
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
                       double *dnoise, double *dgroup_logits) {
    size_t R = ref_columns(desc), G = desc->router.groups.count;
    double *dl = make(R, sizeof *dl), *du = make(G, sizeof *du), slope;
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
            memset(du, 0, G * sizeof *du);
            token_gradient(desc, in, loss, t, scope->g, dl, du);
            for (size_t u = 0; u < G && dgroup_logits != NULL; u++)
                dgroup_logits[t * G + u] += weight * scope->share / scope->tokens * du[u];
            for (size_t j = 0; j < R; j++) {
                double d = weight * scope->share / scope->tokens * dl[j];
                dlogits[t * R + j] += d;
                if (!dnoise || d == 0.0 || desc->router.noise.kind != CLMOE_NOISE_LEARNED)
                    continue;
                /* The noise is a fixed random number times the deviation. */
                double sigma = deviation(desc, in, t * R + j, &slope);
                dnoise[t * R + j] += d * in->noise[t * R + j] / sigma * slope;
            }
        }
    }
    free(dl);
    free(du);
}
