/* Statistics, losses and controllers on the host, from the formulas of balance.h. */
#include "host.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum { MOST_EXPERTS = 16 }; /* of a layer with a state */

/* ---- What all of it counts ------------------------------------------------------------------- */

/* Finite logits of a token. */
static size_t live_logits(const trial *t, const host_room *room, size_t token) {
    const size_t E = t->desc.num_experts;
    size_t live = 0;
    for (size_t e = 0; e < E; e++)
        live += !isinf(room->noisy[token * E + e]);
    return live;
}

static double used_tokens(const trial *t) {
    double used = 0;
    for (size_t i = 0; i < t->tokens; i++)
        used += !host_masked(t, i);
    return used;
}

static bool is_pair(const host_room *room, size_t pair) {
    return !isnan(room->chosen[pair]) && room->chosen[pair] >= 0;
}

/* c [E] */
static void count_load(const trial *t, const host_room *room, double *load) {
    memset(load, 0, t->desc.num_experts * sizeof *load);
    for (size_t p = 0; p < t->pairs; p++)
        if (is_pair(room, p))
            load[(size_t)room->chosen[p]]++;
}

static double sum_of(const double *v, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += v[i];
    return sum;
}

static double largest(const double *v, size_t n) {
    double top = v[0];
    for (size_t i = 1; i < n; i++)
        top = fmax(top, v[i]);
    return top;
}

static double variance(const double *v, size_t n) {
    const double mean = sum_of(v, n) / (double)n;
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += (v[i] - mean) * (v[i] - mean);
    return sum / (double)n;
}

/* Variance over the squared mean. */
static double cv2(const double *v, size_t n, double eps) {
    const double mean = sum_of(v, n) / (double)n;
    return mean * mean + eps > 0 ? variance(v, n) / (mean * mean + eps) : 0;
}

/* p of a token. */
static void probabilities(const trial *t, const host_room *room, size_t token,
                          clmoe_p_source source, double *p) {
    const size_t E = t->desc.num_experts;
    const double *logits = room->logits + token * E;
    const bool softmax = t->desc.router.score == CLMOE_SCORE_SOFTMAX;
    memcpy(p, logits, E * sizeof *p);
    if (source == CLMOE_P_SOFTMAX || (softmax && source == CLMOE_P_NORMALISED)) {
        host_softmax(p, E, 1);
        return;
    }
    for (size_t e = 0; e < E; e++)
        p[e] = isinf(logits[e]) ? 0 : (softmax ? logits[e] : host_sigmoid(logits[e]));
    const double sum = sum_of(p, E);
    for (size_t e = 0; e < E && source == CLMOE_P_NORMALISED; e++)
        p[e] = sum > 0 ? p[e] / sum : 0;
}

/* Sum over the tokens. */
static void add_probabilities(const trial *t, const host_room *room, clmoe_p_source source,
                              double *sums) {
    double p[MOST_EXPERTS];
    memset(sums, 0, t->desc.num_experts * sizeof *sums);
    for (size_t i = 0; i < t->tokens; i++) {
        if (host_masked(t, i))
            continue;
        probabilities(t, room, i, source, p);
        for (size_t e = 0; e < t->desc.num_experts; e++)
            sums[e] += p[e];
    }
}

static double logsumexp(const trial *t, const host_room *room, size_t token) {
    const size_t E = t->desc.num_experts;
    const double *noisy = room->noisy + token * E, top = largest(noisy, E);
    double sum = 0;
    for (size_t e = 0; e < E; e++)
        sum += exp(noisy[e] - top);
    return isinf(top) ? 0 : top + log(sum);
}

/* sum p log p */
static double negative_entropy(const double *p, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += p[i] > 0 ? p[i] * log(p[i]) : 0;
    return sum;
}

/* Distinct tokens of each device group. */
static void count_devices(const trial *t, const host_room *room, const trial_values *out,
                          double *tokens) {
    const size_t groups = t->desc.balance.device_groups, size = t->desc.num_experts / groups;
    for (size_t d = 0; d < groups; d++) {
        tokens[d] = 0;
        for (size_t i = 0; i < t->tokens; i++) {
            bool seen = false;
            for (size_t p = host_pairs_begin(t, out, i); p < host_pairs_begin(t, out, i + 1); p++)
                seen = seen || (is_pair(room, p) && (size_t)room->chosen[p] / size == d);
            tokens[d] += seen;
        }
    }
}

/* ---- Statistics ------------------------------------------------------------------------------ */

/* Words of clmoe_stats. */
#define COUNT(name) out->of[TRIAL_COUNTS][offsetof(clmoe_stats, name) / 4]
#define STAT(name)  out->of[TRIAL_STATS][offsetof(clmoe_stats, name) / 4]

/* The arrays behind the header. */
enum { LOAD, KEPT, DROPPED, REROUTED, IMPORTANCE, WEIGHT_SUMS, EMA, IDLE, DEVICES };

static double *stats_array(const trial *t, const trial_values *out, trial_array kind,
                           size_t array) {
    return out->of[kind] + sizeof(clmoe_stats) / 4 + array * t->desc.num_experts;
}

/* Which words are which; all are 0. */
static void begin_stats(const trial *t, trial_values *out) {
    uint32_t is_float = 0;
    size_t at = 0;
    for (size_t i = 0; i < t->counts[TRIAL_STATS]; i++)
        out->of[TRIAL_STATS][i] = NAN;
    for (uint32_t i = 0; clmoe_stats_field(i, &at, &is_float); i++)
        if (is_float)
            out->of[TRIAL_STATS][at / 4] = 0;
    for (size_t array = IMPORTANCE; array <= EMA; array++)
        memset(stats_array(t, out, TRIAL_STATS, array), 0, t->desc.num_experts * sizeof(double));
    for (size_t i = 0; i < t->counts[TRIAL_STATS]; i++)
        out->of[TRIAL_COUNTS][i] = isnan(out->of[TRIAL_STATS][i]) ? 0 : NAN;
}

static void count_pairs(const trial *t, const host_room *room, trial_values *out) {
    double *load = stats_array(t, out, TRIAL_COUNTS, LOAD);
    double *kept = stats_array(t, out, TRIAL_COUNTS, KEPT);
    double *dropped = stats_array(t, out, TRIAL_COUNTS, DROPPED);
    double *rerouted = stats_array(t, out, TRIAL_COUNTS, REROUTED);
    const size_t E = t->desc.num_experts;
    for (size_t p = 0; p < t->pairs; p++) {
        const double was = room->chosen[p], is = out->of[TRIAL_IDS][p];
        if (!is_pair(room, p))
            continue;
        load[(size_t)was]++;
        kept[(size_t)is] += room->placed[p];
        rerouted[(size_t)is] += was != is;
        dropped[(size_t)was] += room->placed[p] == 0;
    }
    COUNT(pairs) = sum_of(load, E);
    COUNT(kept) = sum_of(kept, E);
    COUNT(dropped) = sum_of(dropped, E);
    COUNT(rerouted) = sum_of(rerouted, E);
}

/* Of tokens and experts; the numbers of load but F. */
static void count_experts(const trial *t, const host_room *room, trial_values *out) {
    const size_t E = t->desc.num_experts, groups = t->desc.balance.device_groups;
    const double *load = stats_array(t, out, TRIAL_COUNTS, LOAD), capacity = host_capacity(t);
    double *idle = stats_array(t, out, TRIAL_COUNTS, IDLE);
    double *devices = stats_array(t, out, TRIAL_COUNTS, DEVICES), least = INFINITY;
    COUNT(version) = 1;
    COUNT(tokens) = used_tokens(t);
    COUNT(columns) = (double)E;
    COUNT(device_groups) = (double)groups;
    COUNT(nonfinite_tokens) = trial_lists_pairs(t) ? NAN : 0;
    for (size_t i = 0; i < t->tokens; i++)
        COUNT(nonfinite_tokens) += !host_masked(t, i) && live_logits(t, room, i) < t->desc.top_k;
    for (size_t e = 0; e < E; e++) {
        idle[e] = load[e] > 0 ? 0 : t->given.of[TRIAL_STATE][3 * E + e] + COUNT(tokens);
        COUNT(idle_experts) += load[e] == 0;
        COUNT(dead_experts) += idle[e] >= t->desc.balance.dead_window;
        COUNT(used_capacity) += capacity > 0 ? fmin(load[e], capacity) : load[e];
        least = fmin(least, load[e]);
    }
    COUNT(max_load) = largest(load, E);
    COUNT(min_load) = least;
    count_devices(t, room, out, devices);
    COUNT(max_device_tokens) = largest(devices, groups);
}

/* What follows from F; Q is uniform. */
static void load_stats(const trial *t, trial_values *out) {
    const size_t E = t->desc.num_experts;
    const double *load = stats_array(t, out, TRIAL_COUNTS, LOAD), pairs = COUNT(pairs);
    const double *previous = t->given.of[TRIAL_STATE] + 2 * E, even = 1 / (double)E;
    double before = 0;
    STAT(drop_rate) = pairs > 0 ? COUNT(dropped) / pairs : 0;
    STAT(dead_parameter_share) = COUNT(dead_experts) / (double)E;
    STAT(load_cv2) = cv2(load, E, 0);
    for (size_t e = 0; e < E && pairs > 0; e++) {
        const double F = load[e] / pairs;
        STAT(load_entropy) -= F > 0 ? F * log(F) : 0;
        STAT(load_divergence) += F > 0 ? F * log(F / even) : 0;
        STAT(load_variance) += (F - even) * (F - even);
        STAT(target_distance) += (F - even) * (F - even) / 2;
        STAT(fluctuation) += fabs(F - previous[e]);
        before += (previous[e] - even) * (previous[e] - even) / 2;
    }
    if (pairs == 0)
        return;
    STAT(target_change) = STAT(target_distance) - before;
    STAT(max_violation) = COUNT(max_load) / (pairs / (double)E) - 1;
}

/* What follows from p and the weights. */
static void probability_stats(const trial *t, const host_room *room, trial_values *out) {
    const size_t E = t->desc.num_experts;
    const double T = COUNT(tokens);
    double *importance = stats_array(t, out, TRIAL_STATS, IMPORTANCE), p[MOST_EXPERTS];
    add_probabilities(t, room, CLMOE_P_NORMALISED, importance);
    for (size_t i = 0; i < t->tokens; i++) {
        if (host_masked(t, i))
            continue;
        probabilities(t, room, i, CLMOE_P_NORMALISED, p);
        STAT(token_entropy) -= negative_entropy(p, E) / T;
        STAT(confidence) += largest(p, E) / T;
        STAT(mean_logsumexp) += logsumexp(t, room, i) / T;
    }
    const double sum = sum_of(importance, E);
    STAT(importance_cv2) = cv2(importance, E, 0);
    STAT(importance_variance) = sum > 0 ? variance(importance, E) * (double)E / sum / sum : 0;
    STAT(weights_cv2) = cv2(room->weight_sums, E, 0);
    memcpy(stats_array(t, out, TRIAL_STATS, WEIGHT_SUMS), room->weight_sums, E * sizeof *p);
    memcpy(stats_array(t, out, TRIAL_STATS, EMA), t->given.of[TRIAL_STATE] + E, E * sizeof *p);
}

/* ---- Losses ---------------------------------------------------------------------------------- */

/* n experts or device groups. */
typedef struct loss_units {
    size_t n;
    double count[MOST_EXPERTS], F[MOST_EXPERTS], P[MOST_EXPERTS], g[MOST_EXPERTS];
    double pairs, tokens, eps;
} loss_units;

static bool is_smooth(clmoe_loss_kind kind) {
    return kind == CLMOE_LOSS_Z || kind == CLMOE_LOSS_TOKEN_ENTROPY ||
           kind == CLMOE_LOSS_SMOOTH_LOAD;
}

static void set_units(const trial *t, const host_room *room, const clmoe_loss_desc *loss,
                      loss_units *u) {
    const size_t E = t->desc.num_experts;
    double load[MOST_EXPERTS], sums[MOST_EXPERTS];
    *u = (loss_units){.n = loss->per_device ? t->desc.balance.device_groups : E};
    count_load(t, room, load);
    add_probabilities(t, room, loss->p_source, sums);
    u->pairs = sum_of(load, E);
    u->tokens = used_tokens(t);
    u->eps = 1 / (2 * u->tokens * t->desc.top_k);
    for (size_t e = 0; e < E; e++) {
        u->count[e * u->n / E] += load[e];
        u->P[e * u->n / E] += sums[e] / u->tokens;
    }
    for (size_t i = 0; i < u->n && u->pairs > 0; i++)
        u->F[i] = u->count[i] / u->pairs;
}

/* g of CV^2: its derivative. */
static void cv2_slopes(const double *v, size_t n, double eps, double *g) {
    const double mean = sum_of(v, n) / (double)n, by = mean * mean + eps, above = variance(v, n);
    for (size_t i = 0; i < n; i++)
        g[i] = 2 * ((v[i] - mean) / by - above * mean / (by * by)) / (double)n;
}

/* Losses that are a sum over the units: their term, and g. */
static double loss_term(clmoe_loss_kind kind, loss_units *u, size_t i) {
    const double n = (double)u->n, F = u->F[i], away = n * u->count[i] - u->pairs;
    switch (kind) {
    case CLMOE_LOSS_SWITCH:
        u->g[i] = n * F;
        return n * F * u->P[i];
    case CLMOE_LOSS_SQUARED:
        u->g[i] = F - 1 / n;
        return (F - 1 / n) * (F - 1 / n) / 2;
    case CLMOE_LOSS_ENTROPY:
        u->g[i] = log(fmax(F, u->eps) * n) + 1;
        return F > 0 ? F * log(F) : 0;
    default: /* L1 */
        u->g[i] = (away > 0) - (away < 0);
        return fabs(F - 1 / n);
    }
}

static double loss_of_units(clmoe_loss_kind kind, loss_units *u) {
    const double top = largest(u->F, u->n), beta = 10 * (double)u->n;
    double value = 0;
    if (u->pairs == 0 && kind != CLMOE_LOSS_IMPORTANCE_VARIANCE &&
        kind != CLMOE_LOSS_IMPORTANCE_CV2)
        return 0;
    switch (kind) {
    case CLMOE_LOSS_IMPORTANCE_VARIANCE:
        for (size_t i = 0; i < u->n; i++)
            u->g[i] = 2 * (u->P[i] - sum_of(u->P, u->n) / (double)u->n) / (double)u->n;
        return variance(u->P, u->n);
    case CLMOE_LOSS_IMPORTANCE_CV2:
        cv2_slopes(u->P, u->n, 1e-10, u->g);
        return cv2(u->P, u->n, 1e-10);
    case CLMOE_LOSS_LOAD_CV2:
        cv2_slopes(u->F, u->n, 0, u->g);
        return cv2(u->F, u->n, 0);
    case CLMOE_LOSS_MAX:
        for (size_t i = u->n; i-- > 0;)
            if (u->F[i] >= top) {
                memset(u->g, 0, sizeof u->g);
                u->g[i] = 1;
            }
        return top;
    case CLMOE_LOSS_MINIMAX:
        for (size_t i = 0; i < u->n; i++)
            u->g[i] = beta * u->F[i];
        host_softmax(u->g, u->n, 1);
        for (size_t i = 0; i < u->n; i++)
            value += exp(beta * (u->F[i] - top));
        return top + log(value) / beta;
    default:
        for (size_t i = 0; i < u->n; i++)
            value += loss_term(kind, u, i);
        return value;
    }
}

static double loss_of_capacity(const trial *t, loss_units *u) {
    double value = 0;
    for (size_t e = 0; e < u->n; e++) {
        u->g[e] = u->count[e] > host_capacity(t);
        value += fmax(u->count[e] - host_capacity(t), 0) * 2 * u->eps;
    }
    return value;
}

static double loss_of_devices(const trial *t, const host_room *room, const trial_values *out,
                              loss_units *u) {
    double tokens[MOST_EXPERTS], value = 0;
    count_devices(t, room, out, tokens);
    for (size_t e = 0; e < u->n; e++) {
        u->g[e] = tokens[e * t->desc.balance.device_groups / u->n] / u->tokens;
        value += u->g[e] * u->P[e];
    }
    return value;
}

/* The n-th largest noisy logit of the token. */
static double nth_logit(const trial *t, const host_room *room, size_t token, size_t n) {
    const size_t E = t->desc.num_experts;
    double keys[MOST_EXPERTS], ids[MOST_EXPERTS];
    memcpy(keys, room->noisy + token * E, E * sizeof *keys);
    host_best(keys, E, n, ids);
    return isnan(ids[n - 1]) ? -INFINITY : room->noisy[token * E + (size_t)ids[n - 1]];
}

static void set_thresholds(const trial *t, const host_room *room) {
    const size_t E = t->desc.num_experts, K = t->desc.top_k;
    for (size_t i = 0; i < t->tokens * E; i++)
        room->threshold[i] = nth_logit(t, room, i / E, K);
    for (size_t p = 0; p < t->pairs; p++)
        if (is_pair(room, p))
            room->threshold[p / K * E + (size_t)room->chosen[p]] = nth_logit(t, room, p / K, K + 1);
}

static double smooth_load(const trial *t, const host_room *room) {
    const size_t E = t->desc.num_experts;
    double load[MOST_EXPERTS] = {0};
    for (size_t i = 0; i < t->tokens * E; i++)
        if (!host_masked(t, i / E) && !isinf(room->noisy[i]))
            load[i % E] +=
                erfc((room->threshold[i] - room->clean[i]) / room->deviation[i] / sqrt(2)) / 2;
    return cv2(load, E, 1e-10);
}

static double smooth_loss(const trial *t, const host_room *room, clmoe_loss_kind kind) {
    double p[MOST_EXPERTS], value = 0;
    if (kind == CLMOE_LOSS_SMOOTH_LOAD)
        return smooth_load(t, room);
    for (size_t i = 0; i < t->tokens; i++) {
        if (host_masked(t, i))
            continue;
        probabilities(t, room, i, CLMOE_P_NORMALISED, p);
        value += kind == CLMOE_LOSS_Z ? logsumexp(t, room, i) * logsumexp(t, room, i)
                                      : negative_entropy(p, t->desc.num_experts);
    }
    return value / used_tokens(t);
}

static double loss_value(const trial *t, const host_room *room, const trial_values *out,
                         size_t loss) {
    const clmoe_loss_kind kind = t->losses[loss].kind;
    const size_t E = t->desc.num_experts;
    loss_units u;
    double value;
    if (is_smooth(kind))
        return smooth_loss(t, room, kind);
    set_units(t, room, &t->losses[loss], &u);
    if (kind == CLMOE_LOSS_OVERFLOW)
        value = loss_of_capacity(t, &u);
    else if (kind == CLMOE_LOSS_COMMUNICATION)
        value = loss_of_devices(t, room, out, &u);
    else
        value = loss_of_units(kind, &u);
    for (size_t e = 0; e < E; e++)
        room->slopes[loss * E + e] = u.g[e * u.n / E];
    return value;
}

double host_loss(const trial *t, const host_room *room) {
    const size_t E = t->desc.num_experts;
    double sum = 0;
    for (size_t i = 0; i < t->counts[TRIAL_LOSSES]; i++) {
        const clmoe_loss_desc *loss = &t->losses[i];
        double P[MOST_EXPERTS];
        const double weight =
            (double)loss->weight * (loss->controlled ? (double)trial_state.loss_weight : 1);
        add_probabilities(t, room, loss->p_source, P);
        sum += weight * (is_smooth(loss->kind)
                             ? smooth_loss(t, room, loss->kind)
                             : host_dot(room->slopes + i * E, P, E) / used_tokens(t));
    }
    return sum;
}

/* ---- The rule by quantiles ------------------------------------------------------------------- */

enum { HALF_BINS = CLMOE_BIAS_BINS / 2, PER_OCTAVE = 25, LEAST_EXPONENT = -18 };

/* Where bin HALF_BINS + i begins, as CLMOE_BIAS_BINS has it. */
static double bin_edge(int i) {
    if (i == 0)
        return 0;
    return ldexp(1 + (double)(i % PER_OCTAVE) / PER_OCTAVE, i / PER_OCTAVE + LEAST_EXPONENT);
}

static size_t bin_of(double way) {
    int side = 0;
    while (side < HALF_BINS - 1 && fabs(way) >= bin_edge(side + 1))
        side++;
    return (size_t)(way < 0 ? HALF_BINS - 1 - side : HALF_BINS + side);
}

/* One token's way in the bins of an expert; where rounding could put it is marked if asked for. */
static void count_way(double way, double *counts, bool marks) {
    const double off = 1e-6 + 1e-6 * fabs(way);
    const size_t low = bin_of(way - off), high = bin_of(way + off);
    if (!marks)
        counts[bin_of(way)]++;
    for (size_t bin = low; marks && low != high && bin <= high; bin++)
        counts[bin] = NAN;
}

static void count_biases(const trial *t, const host_room *room, trial_values *out, bool marks) {
    const size_t E = t->desc.num_experts, K = t->desc.top_k;
    const double *bias = t->given.of[TRIAL_STATE];
    double scores[MOST_EXPERTS], keys[MOST_EXPERTS], ids[MOST_EXPERTS];
    for (size_t i = 0; i < t->tokens; i++) {
        if (host_masked(t, i) || live_logits(t, room, i) <= K)
            continue;
        host_score(t, room->logits + i * E, scores, E);
        for (size_t e = 0; e < E; e++)
            keys[e] = isinf(room->logits[i * E + e]) ? -INFINITY : scores[e] + bias[e];
        host_best(keys, E, K + 1, ids);
        const size_t last = (size_t)ids[K];
        for (size_t e = 0; e < E; e++) {
            const bool finite = !isinf(room->logits[i * E + e]);
            const double way = scores[last] + bias[last] - scores[e] - bias[e];
            count_way(finite ? way : INFINITY, out->of[TRIAL_BIAS_COUNTS] + e * CLMOE_BIAS_BINS,
                      marks);
        }
    }
}

/* From the bias, linear inside the bin of rank ceil(n K / E). */
static double quantile(const trial *t, const double *counts, double bias) {
    const double n = sum_of(counts, CLMOE_BIAS_BINS);
    double rank = ceil(n * t->desc.top_k / t->desc.num_experts);
    size_t bin = 0;
    for (; bin < CLMOE_BIAS_BINS - 1 && counts[bin] < rank; bin++)
        rank -= counts[bin];
    const double inside = rank / counts[bin];
    const int side = (int)bin - HALF_BINS;
    if (side >= 0)
        return bias + bin_edge(side) + inside * (bin_edge(side + 1) - bin_edge(side));
    return bias - bin_edge(-side) + inside * (bin_edge(-side) - bin_edge(-side - 1));
}

/* ---- The update ------------------------------------------------------------------------------ */

/* The mean load minus that of the expert, or of its device group, by the mean. */
static double under_mean(const trial *t, const double *load, size_t e) {
    const size_t E = t->desc.num_experts;
    const bool devices = t->batch->rule == CLMOE_BIAS_DEVICE;
    const size_t n = devices ? t->desc.balance.device_groups : E, first = e * n / E * (E / n);
    const double mean = sum_of(load, E) / (double)n;
    return (mean - sum_of(load + first, E / n)) / mean;
}

static void move_biases(const trial *t, const clmoe_balance_args *args, const double *load,
                        trial_values *out) {
    const size_t E = t->desc.num_experts;
    double *bias = out->of[TRIAL_NEXT_STATE] + sizeof(clmoe_state) / 4, *momentum = bias + 4 * E;
    const double rate = (double)args->bias_rate, beta = (double)args->bias_beta;
    double delta[MOST_EXPERTS];
    for (size_t e = 0; e < E; e++) {
        const double under = under_mean(t, load, e);
        delta[e] = rate * ((under > 0) - (under < 0));
        if (args->bias_rule == CLMOE_BIAS_PROPORTIONAL)
            delta[e] = rate * under;
        else if (args->bias_rule == CLMOE_BIAS_SMEBU)
            delta[e] = rate * tanh((double)args->bias_kappa * under);
        else if (args->bias_rule == CLMOE_BIAS_QUANTILE)
            delta[e] = quantile(t, out->of[TRIAL_BIAS_COUNTS] + e * CLMOE_BIAS_BINS, bias[e]);
    }
    const double mean = sum_of(delta, E) / (double)E;
    for (size_t e = 0; e < E; e++) {
        if (args->bias_rule == CLMOE_BIAS_QUANTILE) {
            momentum[e] = delta[e];
            bias[e] = delta[e] - mean;
        } else if (args->bias_rule == CLMOE_BIAS_SMEBU) {
            momentum[e] = beta * momentum[e] + (1 - beta) * (delta[e] - mean);
            bias[e] += momentum[e];
        } else if (args->bias_rule != CLMOE_BIAS_NONE) {
            bias[e] += delta[e];
        }
    }
}

/* Words of clmoe_state. */
#define NEXT_COUNT(name) out->of[TRIAL_NEXT_COUNTS][offsetof(clmoe_state, name) / 4]
#define NEXT(name)       out->of[TRIAL_NEXT_STATE][offsetof(clmoe_state, name) / 4]

/* The state as it was. */
static void begin_state(const trial *t, trial_values *out) {
    const size_t E = t->desc.num_experts, header = sizeof(clmoe_state) / 4;
    for (size_t i = 0; i < header + 5 * E; i++) {
        const bool idle = i >= header + 3 * E && i < header + 4 * E;
        const double value = i < header ? 0 : t->given.of[TRIAL_STATE][i - header];
        const bool is_float = i >= header && !idle;
        out->of[TRIAL_NEXT_COUNTS][i] = is_float ? NAN : value;
        out->of[TRIAL_NEXT_STATE][i] = is_float ? value : NAN;
    }
    NEXT_COUNT(version) = trial_state.version;
    NEXT_COUNT(columns) = (double)E;
    NEXT_COUNT(seed[0]) = trial_state.seed[0];
    NEXT_COUNT(seed[1]) = trial_state.seed[1];
    NEXT_COUNT(noise_scale) = NEXT_COUNT(temperature_scale) = NAN;
    NEXT_COUNT(loss_weight) = NEXT_COUNT(capacity_scale) = NAN;
}

/* Up where what is seen is above the target. */
static double adapted(double value, double seen, double target, double rate) {
    return value * exp(rate * ((seen > target) - (seen < target)));
}

static void update(const trial *t, trial_values *out) {
    const size_t E = t->desc.num_experts, header = sizeof(clmoe_state) / 4;
    const double *load = stats_array(t, out, TRIAL_COUNTS, LOAD), pairs = COUNT(pairs);
    double *arrays = out->of[TRIAL_NEXT_STATE] + header, *ema = arrays + E;
    clmoe_balance_args args;
    trial_update_args(t, &args);
    begin_state(t, out);
    memcpy(out->of[TRIAL_NEXT_COUNTS] + header + 3 * E, stats_array(t, out, TRIAL_COUNTS, IDLE),
           E * sizeof(double));
    NEXT_COUNT(step) = trial_state.step + 1;
    NEXT_COUNT(updates) = trial_state.updates + (pairs > 0);
    NEXT(temperature_scale) = (double)trial_state.temperature_scale;
    NEXT(loss_weight) = (double)trial_state.loss_weight;
    NEXT(capacity_scale) = (double)trial_state.capacity_scale;
    NEXT(noise_scale) = (double)args.noise.start + (double)(args.noise.end - args.noise.start) *
                                                       (NEXT_COUNT(step) - args.noise.first) /
                                                       args.noise.steps;
    if (pairs == 0)
        return;
    NEXT(loss_weight) = adapted(NEXT(loss_weight), STAT(max_violation),
                                (double)args.target_violation, (double)args.loss_rate);
    NEXT(capacity_scale) = fmin(adapted(NEXT(capacity_scale), STAT(drop_rate),
                                        (double)args.target_drop_rate, (double)args.capacity_rate),
                                1);
    for (size_t e = 0; e < E; e++) {
        ema[e] += (1 - (double)args.ema_decay) * (load[e] / pairs - ema[e]);
        ema[E + e] = load[e] / pairs;
    }
    move_biases(t, &args, load, out);
}

void host_balance(const trial *t, const host_room *room, trial_values *out) {
    begin_stats(t, out);
    count_pairs(t, room, out);
    count_experts(t, room, out);
    load_stats(t, out);
    probability_stats(t, room, out);
    if (t->desc.router.noise.kind != CLMOE_NOISE_NONE)
        set_thresholds(t, room);
    for (size_t i = 0; i < t->counts[TRIAL_LOSSES]; i++)
        out->of[TRIAL_LOSSES][i] = loss_value(t, room, out, i);
    if (t->desc.router.select_bias)
        count_biases(t, room, out, false);
    update(t, out);
    if (t->desc.router.select_bias)
        count_biases(t, room, out, true);
}
