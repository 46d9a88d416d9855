#include "ref_places.h"

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

/* ---- sequences ----------------------------------------------------------------------------- */

static bool has_sequences(const clmoe_layer_desc *desc) {
    const clmoe_capacity_desc *capacity = &desc->capacity;
    return capacity->tokens_per_sequence > 0 && (capacity->rows > 0 || capacity->factor > 0.0);
}

uint32_t ref_sequences(const clmoe_layer_desc *desc, uint32_t tokens) {
    uint32_t count = 0;
    if (!has_sequences(desc))
        return 1;
    for (uint64_t t = 0; t < tokens; t += desc->capacity.tokens_per_sequence)
        count++;
    return count > 0 ? count : 1;
}

/* The layer for one sequence alone, with C rows. */
static clmoe_layer_desc desc_of_one(const clmoe_layer_desc *desc, uint32_t capacity) {
    clmoe_layer_desc one = *desc;
    one.capacity = (clmoe_capacity_desc){.rows = capacity, .keep = desc->capacity.keep};
    return one;
}

/* Puts the plan of a sequence, whose first pair and token are given, behind those in `plan`. */
static void append_sequence(const clmoe_layer_desc *desc, const ref_plan *one, const int32_t *ids,
                            size_t pair, size_t token, size_t pairs, ref_plan *plan) {
    for (size_t p = 0; p < pairs; p++) {
        int32_t slot = one->slot_of[p];
        plan->slot_of[pair + p] = slot;
        if (slot < 0)
            continue;
        uint32_t e = (uint32_t)ids[pair + p];
        uint32_t to = plan->offsets[e] + plan->kept[e] + (uint32_t)slot - one->offsets[e];
        plan->slot_of[pair + p] = (int32_t)to;
        plan->pair_of[to] = (int32_t)(pair + p);
        plan->token_of[to] = (int32_t)token + one->token_of[slot];
        plan->tile_expert[to / plan->row_tile] = (int32_t)e;
    }
    for (uint32_t e = 0; e < ref_columns(desc); e++) {
        plan->load[e] += one->load[e];
        plan->kept[e] += one->kept[e];
    }
}

static void sequence_places(const clmoe_layer_desc *one, const ref_plan_in *in, size_t token,
                            uint32_t tokens, ref_plan *plan) {
    size_t K = one->top_k, first = token * K, pairs = tokens * K;
    int32_t *offsets = make((size_t)tokens + 1, sizeof *offsets);
    if (in->token_offsets) {
        first = (size_t)in->token_offsets[token];
        for (uint32_t t = 0; t <= tokens; t++)
            offsets[t] = in->token_offsets[token + t] - (int32_t)first;
        pairs = (size_t)offsets[tokens];
    }
    ref_plan_in of = {.tokens = tokens,
                      .slots = one->num_experts * plan->capacity,
                      .row_tile = 1,
                      .ids = in->ids + first,
                      .pair_weights = in->pair_weights ? in->pair_weights + first : NULL,
                      .live = in->live ? in->live + token : NULL,
                      .token_mask = in->token_mask ? in->token_mask + token : NULL,
                      .token_offsets = in->token_offsets ? offsets : NULL};
    ref_plan alone;
    ref_plan_make(one, &of, &alone);
    append_sequence(one, &alone, in->ids, first, token, pairs, plan);
    ref_plan_free(&alone);
    free(offsets);
}

void ref_plan_places(const clmoe_layer_desc *desc, const ref_plan_in *in, ref_plan *plan) {
    if (!has_sequences(desc)) {
        ref_plan_make(desc, in, plan);
        return;
    }
    uint32_t length = desc->capacity.tokens_per_sequence;
    uint32_t C = ref_capacity(desc, in->tokens), E = desc->num_experts;
    clmoe_layer_desc one = desc_of_one(desc, C);
    uint8_t *nobody = make(in->tokens, sizeof *nobody);
    ref_plan_in empty = *in;
    empty.token_mask = nobody;
    ref_plan_make(&one, &empty, plan);
    plan->capacity = C;
    uint32_t rows = ref_sequences(desc, in->tokens) * C;
    for (uint32_t e = 0; e < E; e++)
        plan->offsets[e + 1] =
            plan->offsets[e] + (rows + in->row_tile - 1) / in->row_tile * in->row_tile;
    for (uint64_t t = 0; t < in->tokens; t += length) {
        uint64_t left = in->tokens - t;
        sequence_places(&one, in, (size_t)t, left < length ? (uint32_t)left : length, plan);
    }
    free(nobody);
}

/* ---- reroute ------------------------------------------------------------------------------- */

/* The pairs of a token: [first, end) all of them, [first, live) the real ones. */
typedef struct span {
    size_t first, live, end;
} span;

static span pairs_of(const clmoe_layer_desc *desc, const ref_reroute_in *in, size_t t) {
    span s = {t * desc->top_k, 0, (t + 1) * desc->top_k};
    if (in->token_offsets)
        s = (span){(size_t)in->token_offsets[t], 0, (size_t)in->token_offsets[t + 1]};
    s.live = s.end;
    if (in->live && s.first + (size_t)in->live[t] < s.end)
        s.live = s.first + (size_t)in->live[t];
    if (in->token_mask && in->token_mask[t] == 0)
        s.live = s.first;
    return s;
}

int32_t ref_roomy_expert(const clmoe_layer_desc *desc, const ref_reroute_in *in, size_t token,
                         const int32_t *ids, const uint32_t *kept, uint32_t capacity) {
    span s = pairs_of(desc, in, token);
    const float *row = in->scores + token * desc->num_experts;
    int32_t best = -1;
    for (uint32_t e = 0; e < desc->num_experts; e++) {
        bool wanted = isfinite(row[e]) && kept[e] < capacity;
        for (size_t p = s.first; p < s.end; p++)
            wanted = wanted && ids[p] != (int32_t)e;
        if (wanted && (best < 0 || row[e] > row[best]))
            best = (int32_t)e;
    }
    return best;
}

/* The first dropped pair of a token, or SIZE_MAX; also if an id of it is out of range. */
static size_t first_dropped(const clmoe_layer_desc *desc, const ref_reroute_in *in, size_t t,
                            const int32_t *ids, const ref_plan *plan) {
    span s = pairs_of(desc, in, t);
    size_t found = SIZE_MAX;
    for (size_t p = s.first; p < s.live; p++) {
        if (ids[p] < 0 || (uint32_t)ids[p] >= desc->num_experts)
            return SIZE_MAX;
        if (plan->slot_of[p] == -1 && found == SIZE_MAX)
            found = p;
    }
    return found;
}

static void move_pair(size_t token, size_t pair, int32_t to, int32_t *ids, ref_plan *plan,
                      ref_rerouted *counts) {
    uint32_t slot = plan->offsets[to] + plan->kept[to]++;
    counts->out[ids[pair]]++;
    counts->in[to]++;
    ids[pair] = to;
    plan->slot_of[pair] = (int32_t)slot;
    plan->pair_of[slot] = (int32_t)pair;
    plan->token_of[slot] = (int32_t)token;
    plan->tile_expert[slot / plan->row_tile] = to;
}

static void new_weights(const clmoe_layer_desc *desc, const ref_reroute_in *in, size_t t,
                        const int32_t *ids, double *pair_weights) {
    span s = pairs_of(desc, in, t);
    size_t E = desc->num_experts, K = desc->top_k;
    double *row = make(E, sizeof *row), *w = make(K, sizeof *w);
    int32_t *of = make(K, sizeof *of);
    for (size_t e = 0; e < E; e++)
        row[e] = in->exact ? in->exact[t * E + e] : (double)in->scores[t * E + e];
    for (size_t p = s.first; p < s.live; p++)
        of[p - s.first] = ids[p];
    ref_token_weights(desc, row, of, (int32_t)(s.live - s.first), in->weights, w);
    for (size_t p = s.first; p < s.live; p++)
        pair_weights[p] = w[p - s.first];
    free(row);
    free(w);
    free(of);
}

void ref_reroute(const clmoe_layer_desc *desc, uint32_t tokens, const ref_reroute_in *in,
                 int32_t *ids, double *pair_weights, ref_plan *plan, ref_rerouted *counts) {
    int32_t *wish = make(tokens, sizeof *wish);
    bool *changed = make(tokens, sizeof *changed);
    for (bool asked = true; asked; counts->rounds += asked) {
        asked = false;
        for (size_t t = 0; t < tokens; t++) {
            wish[t] = -1;
            if (first_dropped(desc, in, t, ids, plan) != SIZE_MAX)
                wish[t] = ref_roomy_expert(desc, in, t, ids, plan->kept, plan->capacity);
            asked = asked || wish[t] >= 0;
        }
        for (size_t t = 0; t < tokens; t++) {
            if (wish[t] < 0 || plan->kept[wish[t]] >= plan->capacity)
                continue;
            size_t pair = first_dropped(desc, in, t, ids, plan);
            move_pair(t, pair, wish[t], ids, plan, counts);
            changed[t] = true;
        }
    }
    for (size_t t = 0; t < tokens; t++)
        if (changed[t])
            new_weights(desc, in, t, ids, pair_weights);
    free(wish);
    free(changed);
}

/* ---- rebalance ----------------------------------------------------------------------------- */

/* part [T,K]: the pair's expert, -1 if it takes no part. */
static int32_t *parts_of(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *ids,
                         const int32_t *live, const uint8_t *token_mask, const double *before) {
    size_t K = desc->top_k;
    int32_t *part = make(tokens * K, sizeof *part);
    for (size_t t = 0; t < tokens; t++) {
        double sum = 0.0;
        size_t real = live ? (size_t)live[t] : K;
        for (size_t k = 0; k < K; k++) {
            size_t p = t * K + k;
            bool in = k < real && !(token_mask && token_mask[t] == 0) && ids[p] >= 0 &&
                      (uint32_t)ids[p] < desc->num_experts;
            part[p] = in ? ids[p] : -1;
            sum += in ? before[p] : 0.0;
        }
        for (size_t k = 0; k < K && !(sum > 0.0 && isfinite(sum)); k++)
            part[t * K + k] = -1;
    }
    return part;
}

/* column [E]: what each expert gets of the weights w; returns the sum. */
static double column_sums(const clmoe_layer_desc *desc, size_t pairs, const int32_t *part,
                          const double *w, double *column) {
    double sum = 0.0;
    for (uint32_t e = 0; e < desc->num_experts; e++)
        column[e] = 0.0;
    for (size_t p = 0; p < pairs; p++)
        if (part[p] >= 0) {
            column[part[p]] += w[p];
            sum += w[p];
        }
    return sum;
}

double ref_rebalance_objective(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *ids,
                               const int32_t *live, const uint8_t *token_mask, const double *before,
                               const double *now) {
    size_t pairs = (size_t)tokens * desc->top_k, E = desc->num_experts;
    int32_t *part = parts_of(desc, tokens, ids, live, token_mask, before);
    double *column = make(E, sizeof *column), value = 0.0;
    double mean = column_sums(desc, pairs, part, before, column) / (double)E;
    column_sums(desc, pairs, part, now, column);
    for (size_t e = 0; e < E; e++)
        value += 0.5 * (column[e] - mean) * (column[e] - mean);
    for (size_t p = 0; p < pairs; p++)
        if (part[p] >= 0)
            value += 0.5 * (double)desc->router.rebalance.mu * (now[p] - before[p]) *
                     (now[p] - before[p]);
    free(part);
    free(column);
    return value;
}

static int descending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x < y) - (x > y);
}

/* v [n] -> the nearest point of the simplex with the sum, by sorting (Held et al. 1974). */
static void project(double *v, size_t n, double sum) {
    double *sorted = make(n, sizeof *sorted), partial = 0.0, tau = 0.0;
    for (size_t i = 0; i < n; i++)
        sorted[i] = v[i];
    qsort(sorted, n, sizeof *sorted, descending);
    for (size_t i = 0; i < n; i++) {
        partial += sorted[i];
        double t = (partial - sum) / (double)(i + 1);
        if (sorted[i] > t)
            tau = t;
    }
    for (size_t i = 0; i < n; i++)
        v[i] = fmax(v[i] - tau, 0.0);
    free(sorted);
}

/* Projects the parts of each row of w to the sum they had before. */
static void project_rows(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *part,
                         const double *before, double *w) {
    size_t K = desc->top_k;
    double *row = make(K, sizeof *row);
    for (size_t t = 0; t < tokens; t++) {
        size_t n = 0;
        double sum = 0.0;
        for (size_t p = t * K; p < t * K + K; p++)
            if (part[p] >= 0) {
                row[n++] = w[p];
                sum += before[p];
            }
        if (n > 0)
            project(row, n, sum);
        n = 0;
        for (size_t p = t * K; p < t * K + K; p++)
            if (part[p] >= 0)
                w[p] = row[n++];
    }
    free(row);
}

void ref_rebalance(const clmoe_layer_desc *desc, uint32_t tokens, uint32_t iterations,
                   const int32_t *ids, const int32_t *live, const uint8_t *token_mask,
                   double *pair_weights) {
    size_t pairs = (size_t)tokens * desc->top_k, E = desc->num_experts;
    double mu = (double)desc->router.rebalance.mu, most = 0.0;
    double *before = make(pairs, sizeof *before), *column = make(E, sizeof *column);
    double *count = make(E, sizeof *count);
    for (size_t p = 0; p < pairs; p++)
        before[p] = pair_weights[p];
    int32_t *part = parts_of(desc, tokens, ids, live, token_mask, before);
    for (size_t p = 0; p < pairs; p++)
        if (part[p] >= 0)
            most = fmax(most, ++count[part[p]]);
    double mean = column_sums(desc, pairs, part, before, column) / (double)E;
    for (uint32_t i = 0; i < iterations; i++) {
        column_sums(desc, pairs, part, pair_weights, column);
        for (size_t p = 0; p < pairs; p++)
            if (part[p] >= 0)
                pair_weights[p] -=
                    (column[part[p]] - mean + mu * (pair_weights[p] - before[p])) / (mu + most);
        project_rows(desc, tokens, part, before, pair_weights);
    }
    free(before);
    free(column);
    free(count);
    free(part);
}
