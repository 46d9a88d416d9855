/* The router on the host: what a state makes random, token rounding, and which pairs get a row. */
#include "host.h"

#include <math.h>
#include <string.h>

enum { USE_NOISE = 1, USE_LOGITS, USE_EXPERTS, USE_KEEP };

/* ---- Noise ----------------------------------------------------------------------------------- */

/* Philox4x32-10. */
void host_random(size_t token, size_t column, uint32_t use, uint32_t words[4]) {
    uint32_t c[4] = {(uint32_t)token, (uint32_t)column, trial_state.step, use};
    uint32_t k[2] = {trial_state.seed[0], trial_state.seed[1]};
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)c[0] * 0xD2511F53U, b = (uint64_t)c[2] * 0xCD9E8D57U;
        const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k[0], (uint32_t)b,
                                  (uint32_t)(a >> 32) ^ c[3] ^ k[1], (uint32_t)a};
        memcpy(c, next, sizeof c);
        k[0] += 0x9E3779B9U;
        k[1] += 0xBB67AE85U;
    }
    memcpy(words, c, sizeof c);
}

static double uniform(uint32_t word) {
    return ((double)(word >> 9) + 0.5) / 8388608;
}

static double draw(size_t token, size_t column, uint32_t use) {
    uint32_t words[4];
    host_random(token, column, use, words);
    return uniform(words[0]);
}

/* N(0,1) by Box and Muller. */
static double draw_normal(size_t token, size_t column) {
    static const double turn = 6.283185307179586;
    uint32_t words[4];
    host_random(token, column, USE_NOISE, words);
    return sqrt(-2 * log(uniform(words[0]))) * cos(turn * uniform(words[1]));
}

static double deviation(const trial *t, size_t token, size_t e) {
    const clmoe_noise_desc *noise = &t->desc.router.noise;
    const size_t D = t->desc.dim;
    const double scale = (double)noise->scale * (double)trial_state.noise_scale;
    if (!t->state || noise->kind == CLMOE_NOISE_NONE)
        return 0;
    if (noise->kind != CLMOE_NOISE_LEARNED)
        return scale;
    const double l =
        host_dot(t->given.of[TRIAL_X] + token * D, t->given.of[TRIAL_NOISE_ROUTER] + e * D, D);
    return scale * (log1p(exp(l)) + 0.01);
}

/* Masked for all tokens: below the probability, but not the K with the largest numbers. */
static bool expert_masked(const trial *t, size_t e) {
    const double u = draw(0, e, USE_EXPERTS);
    size_t better = 0;
    for (size_t other = 0; other < t->desc.num_experts; other++)
        better += draw(0, other, USE_EXPERTS) > u;
    return u < (double)t->desc.router.dropout.experts && better >= t->desc.top_k;
}

static double clean_logit(const trial *t, size_t token, size_t e) {
    const size_t D = t->desc.dim;
    if (t->given.of[TRIAL_LOGITS])
        return t->given.of[TRIAL_LOGITS][token * t->desc.num_experts + e];
    return host_dot(t->given.of[TRIAL_X] + token * D, t->given.of[TRIAL_ROUTER] + e * D, D) +
           (t->desc.router.bias ? t->given.of[TRIAL_ROUTER_BIAS][e] : 0);
}

static bool logit_masked(const trial *t, size_t token, size_t e) {
    const clmoe_dropout_desc *dropout = &t->desc.router.dropout;
    return t->state &&
           ((dropout->experts > 0 && expert_masked(t, e)) ||
            (dropout->logits > 0 && draw(token, e, USE_LOGITS) < (double)dropout->logits));
}

void host_logits(const trial *t, const host_room *room) {
    const size_t E = t->desc.num_experts;
    const double scale = t->state ? (double)trial_state.temperature_scale : 1;
    for (size_t i = 0; i < t->tokens * E; i++) {
        const size_t token = i / E, e = i % E;
        room->clean[i] = clean_logit(t, token, e);
        room->deviation[i] = deviation(t, token, e);
        room->noisy[i] = room->clean[i];
        if (room->deviation[i] > 0)
            room->noisy[i] += room->deviation[i] * draw_normal(token, e);
        if (!isfinite(room->noisy[i]) || logit_masked(t, token, e))
            room->noisy[i] = -INFINITY;
        room->logits[i] = room->noisy[i] / scale;
    }
}

/* ---- Token rounding -------------------------------------------------------------------------- */

/* The token of the least key that has it, or of the largest that may; ties as balance.h says. */
static size_t next_token(const trial *t, const host_room *room, size_t e, bool has) {
    const size_t T = t->tokens, E = t->desc.num_experts;
    size_t found = T;
    for (size_t i = 0; i < T; i++) {
        const double l = room->logits[i * E + e];
        if ((room->keys[i * E + e] > 0) != has || host_masked(t, i) || isinf(l))
            continue;
        if (found == T ||
            (has ? l <= room->logits[found * E + e] : l > room->logits[found * E + e]))
            found = i;
    }
    return found;
}

static void round_expert(const trial *t, const host_room *room, size_t e) {
    const size_t E = t->desc.num_experts, M = t->desc.capacity.multiple;
    size_t count = 0, most = 0;
    for (size_t i = 0; i < t->tokens; i++) {
        count += room->keys[i * E + e] > 0;
        most += !host_masked(t, i) && !isinf(room->logits[i * E + e]);
    }
    size_t wanted = (count + M / 2) / M * M;
    if (wanted > most)
        wanted = count / M * M;
    for (; count > wanted; count--)
        room->keys[next_token(t, room, e, true) * E + e] = 0;
    for (; count < wanted; count++)
        room->keys[next_token(t, room, e, false) * E + e] = 1;
}

void host_round(const trial *t, const host_room *room) {
    const size_t E = t->desc.num_experts, K = t->desc.top_k;
    for (size_t i = 0; i < t->tokens; i++) {
        double *keys = room->keys + i * E;
        host_best(keys, E, K, room->row);
        for (size_t e = 0; e < E; e++)
            keys[e] = 0;
        for (size_t k = 0; k < K && !host_masked(t, i); k++)
            if (!isnan(room->row[k]))
                keys[(size_t)room->row[k]] = 1;
    }
    for (size_t e = 0; e < E; e++)
        round_expert(t, room, e);
}

/* ---- Places ---------------------------------------------------------------------------------- */

double host_capacity(const trial *t) {
    const double rows = fmin(t->desc.capacity.rows, t->tokens);
    if (t->desc.capacity.rows == 0 || t->desc.router.policy == CLMOE_POLICY_EXPERT_CHOICE)
        return 0;
    return t->state ? fmax(ceil((double)trial_state.capacity_scale * rows), 1) : rows;
}

/* How many tokens come before this one by their best weight. */
static size_t rank_of(const trial *t, const double *weights, size_t token) {
    const size_t K = t->desc.top_k;
    size_t before = 0;
    for (size_t i = 0; i < t->tokens; i++)
        before += weights[i * K] > weights[token * K] ||
                  (i < token && weights[i * K] >= weights[token * K]);
    return before;
}

/* The largest keys get the places, ties to the first pair. */
static double keep_key(const trial *t, const double *weights, size_t pair) {
    const size_t K = t->desc.top_k, token = pair / K, k = pair % K;
    uint32_t words[4];
    switch (t->desc.capacity.keep) {
    case CLMOE_KEEP_CHOICE_MAJOR:
        return -(double)(k * t->tokens + token);
    case CLMOE_KEEP_PRIORITY:
        return -(double)(k * t->tokens + rank_of(t, weights, token));
    case CLMOE_KEEP_WEIGHT:
        return weights[pair];
    case CLMOE_KEEP_RANDOM:
        host_random(token, k, USE_KEEP, words);
        return words[0];
    default:
        return 0;
    }
}

/* Whether fewer than C pairs of the expert come before this one. */
static bool has_place(const trial *t, const trial_values *out, double capacity, size_t pair) {
    const double *ids = out->of[TRIAL_IDS], *weights = out->of[TRIAL_WEIGHTS];
    const double key = keep_key(t, weights, pair);
    double before = 0;
    for (size_t p = 0; p < t->pairs; p++) {
        if (ids[p] != ids[pair] || p == pair)
            continue;
        const double other = keep_key(t, weights, p);
        before += other > key || (p < pair && other >= key);
    }
    return before < capacity;
}

/* The best expert that the token does not have and that has room; E: none. */
static size_t roomy_expert(const trial *t, const host_room *room, const double *ids, size_t token,
                           const double *kept) {
    const size_t E = t->desc.num_experts, K = t->desc.top_k;
    const double *logits = room->logits + token * E;
    size_t found = E;
    for (size_t e = 0; e < E; e++) {
        bool fits = !isinf(logits[e]) && kept[e] < host_capacity(t);
        for (size_t k = 0; k < K; k++)
            fits = fits && ids[token * K + k] != (double)e;
        if (fits && (found == E || logits[e] > logits[found]))
            found = e;
    }
    return found;
}

/* The token's first pair without a row; `pairs`: none. */
static size_t homeless_pair(const trial *t, const host_room *room, const double *ids,
                            size_t token) {
    const size_t K = t->desc.top_k;
    for (size_t p = token * K; p < (token + 1) * K; p++)
        if (!isnan(ids[p]) && room->placed[p] == 0)
            return p;
    return t->pairs;
}

/* One round: all ask by the same numbers, then the places go in token order. */
static bool reroute_round(const trial *t, const host_room *room, double *ids, double *kept) {
    const size_t T = t->tokens, E = t->desc.num_experts;
    double *wishes = room->row;
    bool asked = false;
    for (size_t i = 0; i < T; i++) {
        const bool homeless = homeless_pair(t, room, ids, i) < t->pairs;
        wishes[i] = homeless ? (double)roomy_expert(t, room, ids, i, kept) : (double)E;
        asked = asked || wishes[i] < (double)E;
    }
    for (size_t i = 0; i < T; i++) {
        const size_t e = (size_t)wishes[i], p = homeless_pair(t, room, ids, i);
        if (e == E || kept[e] >= host_capacity(t))
            continue;
        ids[p] = (double)e;
        room->placed[p] = 1;
        kept[e]++;
    }
    return asked;
}

static void reroute(const trial *t, const host_room *room, trial_values *out) {
    double *kept = room->sums, *ids = out->of[TRIAL_IDS];
    memset(kept, 0, t->desc.num_experts * sizeof *kept);
    for (size_t p = 0; p < t->pairs; p++)
        if (room->placed[p] > 0)
            kept[(size_t)ids[p]]++;
    while (reroute_round(t, room, ids, kept))
        continue;
    host_weigh(t, room, out);
}

void host_place(const trial *t, const host_room *room, trial_values *out) {
    const double capacity = host_capacity(t), *ids = out->of[TRIAL_IDS];
    memset(room->weight_sums, 0, t->desc.num_experts * sizeof(double));
    for (size_t p = 0; p < t->pairs; p++) {
        const bool is_pair = !isnan(ids[p]) && ids[p] >= 0;
        room->chosen[p] = ids[p];
        room->placed[p] = is_pair && (capacity == 0 || has_place(t, out, capacity, p));
        if (is_pair)
            room->weight_sums[(size_t)ids[p]] += out->of[TRIAL_WEIGHTS][p];
    }
    if (t->desc.capacity.overflow == CLMOE_OVERFLOW_REROUTE)
        reroute(t, room, out);
}
