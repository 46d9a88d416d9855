/* The oracle's statistics, and what its losses share with them. */
#include "ref_balance.h"

#include <float.h>
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

/* ---- A token's row -------------------------------------------------------------------------- */

static clmoe_score_function score_for(const clmoe_layer_desc *desc, clmoe_p_source source) {
    if (source == CLMOE_P_SOFTMAX)
        return CLMOE_SCORE_SOFTMAX;
    clmoe_score_function score = desc->router.score;
    if (score == CLMOE_SCORE_SPARSEMIXER)
        score = CLMOE_SCORE_SOFTMAX;
    return source == CLMOE_P_RAW && score == CLMOE_SCORE_SOFTMAX ? CLMOE_SCORE_IDENTITY : score;
}

/* log sum exp of what is finite of v [n]. */
static double finite_logsumexp(const double *v, size_t n) {
    double best = -INFINITY, sum = 0.0;
    for (size_t i = 0; i < n; i++)
        best = isfinite(v[i]) ? fmax(best, v[i]) : best;
    for (size_t i = 0; i < n; i++)
        sum += isfinite(v[i]) ? exp(v[i] - best) : 0.0;
    return best + log(sum);
}

/* Two levels: l -> log(gate of the group) + log(softmax of l within it), u the group logits. */
static void join_levels(const clmoe_layer_desc *desc, const double *u, ref_row *row) {
    size_t R = ref_columns(desc), G = desc->router.groups.count, n = R / G;
    for (size_t g = 0; g < G; g++) {
        double within = finite_logsumexp(row->l + g * n, n);
        double gate = isfinite(u[g]) ? u[g] - finite_logsumexp(u, G) : -INFINITY;
        row->gate[g] = exp(gate);
        for (size_t j = g * n; j < (g + 1) * n; j++) {
            if (row->l[j] == -INFINITY)
                continue;
            row->q[j] = exp(row->l[j] - within);
            row->l[j] = gate + row->l[j] - within;
        }
    }
}

void ref_row_make(const clmoe_layer_desc *desc, const ref_balance_in *in, clmoe_p_source source,
                  size_t token, ref_row *row) {
    size_t R = ref_columns(desc);
    const clmoe_score_function score = score_for(desc, source);
    const bool softmax = score == CLMOE_SCORE_SOFTMAX;
    double cap = (double)desc->router.softcap, best = -INFINITY;
    double temperature = (double)desc->router.temperature;
    if (in->state)
        temperature *= (double)in->state->temperature_scale;
    double **arrays[] = {&row->noisy, &row->l, &row->chain, &row->s,
                         &row->ds,    &row->p, &row->q,     &row->gate};
    for (size_t i = 0; i < 8; i++)
        *arrays[i] = make(R, sizeof(double));
    for (size_t j = 0; j < R; j++) {
        double l = in->logits[token * R + j] + (in->noise ? in->noise[token * R + j] : 0.0);
        row->noisy[j] = isfinite(l) ? l : -INFINITY;
        double capped = cap > 0.0 ? cap * tanh(l / cap) : l;
        double quotient = fmin(fmax(capped / temperature, -(double)FLT_MAX), (double)FLT_MAX);
        row->l[j] = isfinite(l) ? quotient : -INFINITY;
        double slope = cap > 0.0 ? 1.0 - (capped / cap) * (capped / cap) : 1.0;
        bool moves = isfinite(l) && fabs(quotient) < (double)FLT_MAX;
        row->chain[j] = moves ? slope / temperature : 0.0;
    }
    if (desc->router.groups.two_level)
        join_levels(desc, in->group_logits + token * desc->router.groups.count, row);
    for (size_t j = 0; j < R; j++)
        best = fmax(best, row->l[j]);
    row->sum = 0.0;
    for (size_t j = 0; j < R; j++)
        if (row->l[j] > -INFINITY) {
            row->s[j] = ref_score(score, softmax ? row->l[j] - best : row->l[j], &row->ds[j]);
            row->sum += row->s[j];
        }
    for (size_t j = 0; j < R; j++)
        row->p[j] = row->sum != 0.0 ? row->s[j] / row->sum : 0.0;
}

void ref_row_free(ref_row *row) {
    double *arrays[] = {row->noisy, row->l, row->chain, row->s, row->ds, row->p, row->q, row->gate};
    for (size_t i = 0; i < 8; i++)
        free(arrays[i]);
}

double ref_logsumexp(const ref_row *row, size_t columns) {
    double best = -INFINITY, sum = 0.0;
    for (size_t j = 0; j < columns; j++)
        best = fmax(best, row->noisy[j]);
    if (best == -INFINITY)
        return 0.0;
    for (size_t j = 0; j < columns; j++)
        sum += exp(row->noisy[j] - best);
    return best + log(sum);
}

/* ---- Pairs and other inputs ------------------------------------------------------------------ */

bool ref_is_masked(const ref_balance_in *in, size_t token) {
    return in->token_mask != NULL && in->token_mask[token] == 0;
}

size_t ref_pairs_of(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t token,
                    size_t *first) {
    size_t K = desc->top_k, end;
    *first = in->token_offsets ? (size_t)in->token_offsets[token] : token * K;
    end = in->token_offsets ? (size_t)in->token_offsets[token + 1] : *first + K;
    if (in->live && *first + (size_t)in->live[token] < end)
        end = *first + (size_t)in->live[token];
    return ref_is_masked(in, token) ? *first : end;
}

bool ref_pair_column(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t pair,
                     size_t *e) {
    int32_t id = in->ids[pair];
    *e = (size_t)id;
    return id >= 0 && (uint32_t)id < ref_columns(desc);
}

const float *ref_state_array(const ref_balance_in *in, const clmoe_layer_desc *desc, size_t index) {
    return (const float *)(in->state + 1) + index * ref_columns(desc);
}

void ref_target(const clmoe_layer_desc *desc, const ref_balance_in *in, double *q) {
    size_t E = desc->num_experts;
    double sum = 0.0;
    for (size_t e = 0; e < E; e++) {
        q[e] = in->load_target ? (double)in->load_target[e] : 1.0;
        sum += q[e];
    }
    for (size_t e = 0; e < E; e++)
        q[e] /= sum;
}

uint32_t ref_capacity_in_use(const clmoe_layer_desc *desc, const ref_balance_in *in) {
    uint32_t sequence = desc->capacity.tokens_per_sequence;
    uint32_t capacity = ref_capacity(desc, sequence ? sequence : in->tokens);
    if (capacity == 0 || in->state == NULL)
        return capacity;
    double scaled = ceil((double)in->state->capacity_scale * capacity);
    return scaled < 1.0 ? 1 : (uint32_t)scaled;
}

void ref_device_tokens(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t first,
                       size_t end, uint32_t *tokens) {
    size_t groups = desc->balance.device_groups, E = desc->num_experts;
    bool *seen = make(groups, sizeof *seen);
    for (size_t t = first; t < end; t++) {
        size_t p, e, last = ref_pairs_of(desc, in, t, &p);
        memset(seen, 0, groups * sizeof *seen);
        for (; p < last; p++)
            if (ref_pair_column(desc, in, p, &e) && e < E)
                seen[e / (E / groups)] = true;
        for (size_t d = 0; d < groups; d++)
            tokens[d] += seen[d];
    }
    free(seen);
}

/* ---- Statistics ------------------------------------------------------------------------------ */

/* sum v log v in the sense of entropy: 0 for v = 0. */
static double xlogx(double v, double by) {
    return v > 0.0 ? v * log(v / by) : 0.0;
}

/* Population variance over the squared mean; 0 for a mean of 0. */
static double cv2(const double *v, size_t n) {
    double mean = 0.0, variance = 0.0;
    for (size_t i = 0; i < n; i++)
        mean += v[i] / (double)n;
    for (size_t i = 0; i < n; i++)
        variance += (v[i] - mean) * (v[i] - mean) / (double)n;
    return mean != 0.0 ? variance / (mean * mean) : 0.0;
}

static void count_pairs(const clmoe_layer_desc *desc, const ref_balance_in *in,
                        ref_statistics *stats) {
    for (size_t t = 0; t < in->tokens; t++) {
        if (ref_is_masked(in, t))
            continue;
        stats->tokens++;
        stats->nonfinite_tokens += in->live && in->live[t] < (int32_t)desc->top_k;
        size_t p, e, end = ref_pairs_of(desc, in, t, &p);
        for (; p < end; p++)
            if (ref_pair_column(desc, in, p, &e)) {
                stats->of.load[e]++;
                stats->of.weight_sums[e] += in->pair_weights ? (double)in->pair_weights[p] : 0.0;
            } else {
                stats->invalid_ids++;
            }
    }
}

static void count_columns(const clmoe_layer_desc *desc, const ref_balance_in *in,
                          ref_statistics *stats) {
    for (size_t e = 0; e < stats->columns; e++) {
        uint32_t load = stats->of.load[e];
        bool identity = e >= desc->num_experts;
        uint32_t came = in->rerouted_in ? in->rerouted_in[e] : 0;
        uint32_t went = in->rerouted_out ? in->rerouted_out[e] : 0;
        stats->of.kept[e] = identity ? load : in->kept[e];
        stats->of.rerouted[e] = came;
        stats->of.dropped[e] = load - went - (stats->of.kept[e] - came);
        stats->pairs += load;
        stats->kept += stats->of.kept[e];
        stats->dropped += stats->of.dropped[e];
        stats->rerouted += came;
        stats->identity_pairs += identity ? load : 0;
        uint32_t before = 0;
        if (in->state) {
            before = ((const uint32_t *)ref_state_array(in, desc, 3))[e];
            stats->of.ema[e] = (double)ref_state_array(in, desc, 1)[e];
        }
        uint64_t idle = (uint64_t)before + stats->tokens;
        stats->of.idle_tokens[e] = idle < UINT32_MAX ? (uint32_t)idle : UINT32_MAX;
        if (load > 0)
            stats->of.idle_tokens[e] = 0;
        if (identity)
            continue;
        stats->idle_experts += load == 0;
        stats->max_load = load > stats->max_load ? load : stats->max_load;
        stats->min_load = load < stats->min_load ? load : stats->min_load;
        stats->dead_experts += stats->of.idle_tokens[e] >= desc->balance.dead_window;
    }
    stats->dead_parameter_share = (double)stats->dead_experts / desc->num_experts;
    stats->drop_rate = stats->pairs ? (double)stats->dropped / stats->pairs : 0.0;
}

/* The pairs that the C places of each expert, in each sequence, can take. */
static uint32_t used_capacity(const clmoe_layer_desc *desc, const ref_balance_in *in) {
    size_t T = in->tokens, E = desc->num_experts, sequence = desc->capacity.tokens_per_sequence;
    uint32_t capacity = ref_capacity_in_use(desc, in), used = 0;
    sequence = sequence ? sequence : T;
    for (size_t first = 0; first < T; first += sequence)
        for (size_t wanted = 0; wanted < E; wanted++) {
            uint32_t count = 0;
            for (size_t t = first; t < first + sequence && t < T; t++) {
                size_t p, e, end = ref_pairs_of(desc, in, t, &p);
                for (; p < end; p++)
                    count += ref_pair_column(desc, in, p, &e) && e == wanted;
            }
            used += capacity > 0 && count > capacity ? capacity : count;
        }
    return used;
}

/* What follows from F. */
static void load_fields(const clmoe_layer_desc *desc, const ref_balance_in *in,
                        ref_statistics *stats) {
    size_t E = desc->num_experts;
    double *c = make(E, sizeof *c), *q = make(E, sizeof *q), sum = 0.0, before = 0.0;
    const float *previous = in->state && in->state->updates ? ref_state_array(in, desc, 2) : NULL;
    ref_target(desc, in, q);
    for (size_t e = 0; e < E; e++) {
        c[e] = stats->of.load[e];
        sum += c[e];
    }
    for (size_t e = 0; e < E && sum > 0.0; e++) {
        double f = c[e] / sum, n = (double)E;
        stats->load_entropy -= xlogx(f, 1.0);
        stats->load_variance += (f - 1.0 / n) * (f - 1.0 / n);
        stats->load_divergence += xlogx(f, q[e]);
        stats->target_distance += (f - q[e]) * (f - q[e]) / 2.0;
        if (previous == NULL)
            continue;
        double was = (double)previous[e];
        stats->fluctuation += fabs(f - was);
        before += (was - q[e]) * (was - q[e]) / 2.0;
    }
    stats->target_change = previous && sum > 0.0 ? stats->target_distance - before : 0.0;
    stats->load_cv2 = cv2(c, E);
    stats->max_violation = sum > 0.0 ? stats->max_load / (sum / (double)E) - 1.0 : 0.0;
    free(c);
    free(q);
}

/* What follows from p. */
static void probability_fields(const clmoe_layer_desc *desc, const ref_balance_in *in,
                               ref_statistics *stats) {
    size_t R = stats->columns, E = desc->num_experts;
    double sum = 0.0, T = stats->tokens;
    for (size_t t = 0; t < in->tokens; t++) {
        if (ref_is_masked(in, t))
            continue;
        ref_row row;
        ref_row_make(desc, in, CLMOE_P_NORMALISED, t, &row);
        double best = -INFINITY;
        for (size_t j = 0; j < R; j++) {
            stats->of.importance[j] += row.p[j];
            stats->token_entropy -= xlogx(row.p[j], 1.0) / T;
            best = fmax(best, row.p[j]);
        }
        stats->confidence += best / T;
        stats->mean_logsumexp += ref_logsumexp(&row, R) / T;
        ref_row_free(&row);
    }
    for (size_t e = 0; e < E; e++)
        sum += stats->of.importance[e];
    for (size_t e = 0; e < E && sum != 0.0; e++) {
        double away = stats->of.importance[e] / sum - 1.0 / (double)E;
        stats->importance_variance += away * away;
    }
    stats->importance_cv2 = cv2(stats->of.importance, E);
}

void ref_statistics_make(const clmoe_layer_desc *desc, const ref_balance_in *in,
                         ref_statistics *stats) {
    size_t R = ref_columns(desc), groups = desc->balance.device_groups;
    memset(stats, 0, sizeof *stats);
    uint32_t **counts[] = {&stats->of.load, &stats->of.kept, &stats->of.dropped,
                           &stats->of.rerouted, &stats->of.idle_tokens};
    for (size_t i = 0; i < 5; i++)
        *counts[i] = make(R, sizeof(uint32_t));
    stats->of.importance = make(R, sizeof(double));
    stats->of.weight_sums = make(R, sizeof(double));
    stats->of.ema = make(R, sizeof(double));
    stats->of.device_tokens = make(groups, sizeof(uint32_t));
    stats->columns = (uint32_t)R;
    stats->device_groups = (uint32_t)groups;
    stats->min_load = UINT32_MAX;
    count_pairs(desc, in, stats);
    count_columns(desc, in, stats);
    load_fields(desc, in, stats);
    stats->used_capacity = used_capacity(desc, in);
    stats->weights_cv2 = cv2(stats->of.weight_sums, desc->num_experts);
    if (in->logits)
        probability_fields(desc, in, stats);
    if (groups > 0)
        ref_device_tokens(desc, in, 0, in->tokens, stats->of.device_tokens);
    for (size_t d = 0; d < groups; d++)
        if (stats->of.device_tokens[d] > stats->max_device_tokens)
            stats->max_device_tokens = stats->of.device_tokens[d];
}

void ref_statistics_free(ref_statistics *stats) {
    uint32_t *counts[] = {stats->of.load, stats->of.kept, stats->of.dropped, stats->of.rerouted,
                          stats->of.idle_tokens};
    for (size_t i = 0; i < 5; i++)
        free(counts[i]);
    free(stats->of.importance);
    free(stats->of.weight_sums);
    free(stats->of.ema);
    free(stats->of.device_tokens);
}
