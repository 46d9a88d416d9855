/*
 * The layer on the host in double precision, from the formulas of clmoe.h. Nothing is shared with
 * the kernels, and nothing is fast.
 */
#include "trial.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Gradients: elements of each array that are found by differences, of batches that are small. */
enum { SAMPLES = 10, MOST_TOKENS = 32 };

/* Room for one forward pass. */
typedef struct host_room {
    double *logits; /* [T,E], of Soft MoE [T,N] */
    double *keys;   /* [T,E], what the choice is by */
    double *row;    /* [max(E, N, T, D) * 2] */
    double *hidden; /* [H] */
    double *sums;   /* [T + E], Sinkhorn's and of rows that are kept */
    double *mixed;  /* [N,D] and [N,D], of Soft MoE */
} host_room;

static size_t slots_of(const trial *t) {
    return t->desc.num_experts * (size_t)t->desc.router.soft_moe.slots;
}

static bool masked(const trial *t, size_t token) {
    return t->given.of[TRIAL_MASK] && t->given.of[TRIAL_MASK][token] == 0;
}

static double dot(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

static double sigmoid(double v) {
    return 1 / (1 + exp(-v));
}

/* softmax of `count` values that are `stride` apart; -infinity has no part. */
static void softmax(double *values, size_t count, size_t stride) {
    double top = -INFINITY, sum = 0;
    for (size_t i = 0; i < count; i++)
        top = fmax(top, values[i * stride]);
    for (size_t i = 0; i < count; i++) {
        const double v = values[i * stride];
        values[i * stride] = isinf(v) ? 0 : exp(v - top);
        sum += values[i * stride];
    }
    for (size_t i = 0; i < count && sum > 0; i++)
        values[i * stride] /= sum;
}

/* ---- Router ---------------------------------------------------------------------------------- */

static void find_logits(const trial *t, double *logits) {
    const size_t D = t->desc.dim, E = t->desc.num_experts;
    const double *given = t->given.of[TRIAL_LOGITS];
    for (size_t i = 0; i < t->tokens * E; i++) {
        logits[i] =
            given ? given[i]
                  : dot(t->given.of[TRIAL_X] + i / E * D, t->given.of[TRIAL_ROUTER] + i % E * D, D);
        if (!isfinite(logits[i]))
            logits[i] = -INFINITY;
    }
}

/* s(l) of a row. */
static void score(const trial *t, const double *logits, double *scores, size_t count) {
    memcpy(scores, logits, count * sizeof *scores);
    if (t->desc.router.score == CLMOE_SCORE_SOFTMAX)
        softmax(scores, count, 1);
    else
        for (size_t i = 0; i < count; i++)
            scores[i] = sigmoid(scores[i]);
}

/* The k largest of n keys, ties to the lower index; NaN for those that are -infinity. */
static void best(double *keys, size_t n, size_t k, double *ids) {
    for (size_t i = 0; i < k; i++) {
        size_t at = 0;
        for (size_t e = 1; e < n; e++)
            if (keys[e] > keys[at])
                at = e;
        ids[i] = isinf(keys[at]) ? NAN : (double)at;
        keys[at] = -INFINITY;
    }
}

/* keys = d1 exp(l), with one token l. */
static void balance(const trial *t, const host_room *room) {
    const size_t T = t->tokens, E = t->desc.num_experts;
    double *d1 = room->sums, *d0 = room->sums + E, used = 0;
    for (size_t i = 0; i < T; i++)
        used += !masked(t, i);
    for (size_t i = 0; i < T; i++) {
        double top = -INFINITY;
        for (size_t e = 0; e < E; e++)
            top = fmax(top, room->logits[i * E + e]);
        for (size_t e = 0; e < E; e++)
            room->keys[i * E + e] =
                isinf(room->logits[i * E + e]) ? 0 : exp(room->logits[i * E + e] - top);
    }
    for (size_t e = 0; e < E; e++)
        d1[e] = 1;
    for (uint32_t round = 0; used > 1 && round < t->desc.router.sinkhorn.iterations; round++) {
        for (size_t i = 0; i < T; i++)
            d0[i] = masked(t, i) ? 0 : 1 / used / (dot(room->keys + i * E, d1, E) + 1e-8);
        for (size_t e = 0; e < E; e++) {
            double sum = 0;
            for (size_t i = 0; i < T; i++)
                sum += d0[i] * room->keys[i * E + e];
            d1[e] = 1.0 / (double)E / (sum + 1e-8);
        }
    }
    for (size_t i = 0; i < T * E; i++)
        room->keys[i] = isinf(room->logits[i]) ? -INFINITY : room->keys[i] * d1[i % E];
}

/* Groups by their gate, then the best of each, group by group. */
static void choose_two_levels(const trial *t, const host_room *room, size_t token, double *ids) {
    const clmoe_groups_desc *groups = &t->desc.router.groups;
    const size_t D = t->desc.dim, size = t->desc.num_experts / groups->count;
    const size_t each = t->desc.top_k / groups->topk;
    double *gates = room->row, *chosen = room->row + groups->count;
    for (size_t g = 0; g < groups->count; g++)
        gates[g] =
            dot(t->given.of[TRIAL_X] + token * D, t->given.of[TRIAL_GROUP_ROUTER] + g * D, D);
    best(gates, groups->count, groups->topk, chosen);
    for (size_t g = 0; g < groups->count; g++)
        for (size_t i = 0; i < groups->topk; i++) {
            if (chosen[i] != (double)g)
                continue;
            best(room->keys + token * t->desc.num_experts + g * size, size, each, ids);
            for (size_t k = 0; k < each; k++)
                ids[k] += (double)(g * size);
            ids += each;
        }
}

/* Each expert its C best tokens; the pairs of a token in ascending id. */
static void choose_by_expert(const trial *t, const host_room *room, trial_values *out) {
    const size_t T = t->tokens, E = t->desc.num_experts, C = t->pairs / E;
    double *keys = room->row, *chosen = room->row + T, *ids = out->of[TRIAL_IDS];
    size_t pair = 0;
    for (size_t e = 0; e < E; e++) {
        for (size_t i = 0; i < T; i++)
            keys[i] = masked(t, i) ? -INFINITY : room->logits[i * E + e];
        best(keys, T, C, chosen);
        for (size_t i = 0; i < T; i++)
            room->keys[i * E + e] = 0;
        for (size_t c = 0; c < C; c++)
            if (!isnan(chosen[c]))
                room->keys[(size_t)chosen[c] * E + e] = 1;
    }
    for (size_t i = 0; i < T * E; i++) {
        if (i % E == 0)
            out->of[TRIAL_OFFSETS][i / E] = (double)pair;
        if (room->keys[i] > 0)
            ids[pair++] = (double)(i % E);
    }
    out->of[TRIAL_OFFSETS][T] = (double)pair;
    for (; pair < t->pairs; pair++)
        ids[pair] = -1;
}

/* Those with a finite key in ascending id, then any. */
static void list_all(const double *keys, size_t n, double *ids) {
    size_t live = 0;
    for (size_t e = 0; e < n; e++)
        if (!isinf(keys[e]))
            ids[live++] = (double)e;
    for (; live < n; live++)
        ids[live] = NAN;
}

static void choose(const trial *t, const host_room *room, trial_values *out) {
    const size_t E = t->desc.num_experts, K = t->desc.top_k;
    memcpy(room->keys, room->logits, t->tokens * E * sizeof *room->keys);
    if (t->desc.router.policy == CLMOE_POLICY_EXPERT_CHOICE) {
        choose_by_expert(t, room, out);
        return;
    }
    if (t->desc.router.policy == CLMOE_POLICY_SINKHORN)
        balance(t, room);
    for (size_t i = 0; i < t->tokens; i++) {
        double *ids = out->of[TRIAL_IDS] + i * K, *keys = room->keys + i * E;
        if (t->desc.router.groups.two_level)
            choose_two_levels(t, room, i, ids);
        else if (t->desc.router.policy == CLMOE_POLICY_ALL_EXPERTS)
            list_all(keys, E, ids);
        else
            best(keys, E, K, ids);
        for (size_t k = 0; k < K && masked(t, i); k++)
            ids[k] = NAN;
    }
}

/* ---- Weights --------------------------------------------------------------------------------- */

/* The gate of each expert's group times softmax within the group. */
static void two_level_scores(const trial *t, const double *x, const double *logits,
                             double *scores) {
    const size_t D = t->desc.dim, G = t->desc.router.groups.count, E = t->desc.num_experts;
    const size_t size = E / G;
    double *gates = scores + E;
    memcpy(scores, logits, E * sizeof *scores);
    for (size_t g = 0; g < G; g++)
        gates[g] = dot(x, t->given.of[TRIAL_GROUP_ROUTER] + g * D, D);
    softmax(gates, G, 1);
    for (size_t g = 0; g < G; g++) {
        softmax(scores + g * size, size, 1);
        for (size_t e = 0; e < size; e++)
            scores[g * size + e] *= gates[g];
    }
}

/* Of `count` pairs of a token; 0 for those without an id. */
static void weigh(const trial *t, const host_room *room, size_t token, const double *ids,
                  size_t count, double *weights) {
    const clmoe_router_desc *router = &t->desc.router;
    const size_t E = t->desc.num_experts;
    const double *logits = room->logits + token * E;
    const bool late = router->order == CLMOE_ORDER_TOPK_THEN_SCORE;
    double sum = 0;
    if (router->groups.two_level)
        two_level_scores(t, t->given.of[TRIAL_X] + token * t->desc.dim, logits, room->row);
    else
        score(t, logits, room->row, E);
    for (size_t k = 0; k < count; k++) {
        weights[k] =
            isnan(ids[k]) ? (late ? -INFINITY : 0) : (late ? logits : room->row)[(size_t)ids[k]];
    }
    if (late)
        score(t, weights, weights, count);
    for (size_t k = 0; k < count; k++)
        sum += weights[k];
    for (size_t k = 0; k < count; k++) {
        if (router->renorm.kind == CLMOE_RENORM_SUM)
            weights[k] = sum > 0 ? weights[k] / (sum + (double)router->renorm.eps) : 0;
        weights[k] *= (double)router->scale;
    }
}

/* ---- Experts --------------------------------------------------------------------------------- */

/* y += weight * down(silu(gate x) * up x) of expert e. */
static void add_expert(const trial *t, size_t e, const double *x, double weight, double *hidden,
                       double *y) {
    const size_t D = t->desc.dim, H = t->desc.experts.hidden_dim;
    const double *gate = t->given.of[TRIAL_GATE] + e * 2 * H * D;
    const double *down = t->given.of[TRIAL_DOWN] + e * D * H;
    for (size_t h = 0; h < H; h++) {
        const double v = dot(gate + h * D, x, D);
        hidden[h] = v * sigmoid(v) * dot(gate + (H + h) * D, x, D);
    }
    for (size_t d = 0; d < D; d++)
        y[d] += weight * dot(down + d * H, hidden, H);
}

/* Where the pairs of a token begin. */
static size_t pairs_begin(const trial *t, const trial_values *out, size_t token) {
    return out->of[TRIAL_OFFSETS] ? (size_t)out->of[TRIAL_OFFSETS][token] : token * t->desc.top_k;
}

static void run_pairs(const trial *t, const host_room *room, trial_values *out) {
    const size_t D = t->desc.dim;
    const bool by_expert = out->of[TRIAL_OFFSETS] != NULL;
    const double places =
        t->desc.capacity.rows && !by_expert ? (double)t->desc.capacity.rows : (double)INFINITY;
    double *kept = room->sums; /* rows of each expert so far, in token order */
    memset(kept, 0, t->desc.num_experts * sizeof *kept);
    for (size_t i = 0; i < t->tokens; i++) {
        const size_t begin = pairs_begin(t, out, i), end = pairs_begin(t, out, i + 1);
        const double *ids = out->of[TRIAL_IDS];
        double *weights = out->of[TRIAL_WEIGHTS];
        weigh(t, room, i, ids + begin, end - begin, weights + begin);
        for (size_t p = begin; p < end; p++)
            if (!isnan(ids[p]) && kept[(size_t)ids[p]]++ < places)
                add_expert(t, (size_t)ids[p], t->given.of[TRIAL_X] + i * D, weights[p],
                           room->hidden, out->of[TRIAL_Y] + i * D);
        for (size_t p = begin; p < end && masked(t, i); p++)
            weights[p] = NAN;
    }
    for (size_t p = by_expert ? pairs_begin(t, out, t->tokens) : t->pairs; p < t->pairs; p++)
        out->of[TRIAL_WEIGHTS][p] = NAN;
}

/* ---- Soft MoE -------------------------------------------------------------------------------- */

static void run_slots(const trial *t, const host_room *room, trial_values *out) {
    const size_t T = t->tokens, D = t->desc.dim, N = slots_of(t);
    const double *x = t->given.of[TRIAL_X], *router = t->given.of[TRIAL_ROUTER];
    double *dispatch = room->keys, *combine = room->logits, *ys = room->mixed + N * D;
    memset(room->mixed, 0, 2 * N * D * sizeof *room->mixed);
    for (size_t i = 0; i < T * N; i++) {
        const double *a = x + i / N * D, *b = router + i % N * D;
        const double norms = sqrt(dot(a, a, D) * dot(b, b, D));
        combine[i] = norms > 0 ? (double)t->desc.router.soft_moe.scale * dot(a, b, D) / norms : 0;
        dispatch[i] = masked(t, i / N) ? -INFINITY : combine[i];
    }
    for (size_t s = 0; s < N; s++) {
        softmax(dispatch + s, T, N);
        for (size_t i = 0; i < T; i++)
            for (size_t d = 0; d < D; d++)
                room->mixed[s * D + d] += dispatch[i * N + s] * x[i * D + d];
        add_expert(t, s / t->desc.router.soft_moe.slots, room->mixed + s * D, 1, room->hidden,
                   ys + s * D);
    }
    for (size_t i = 0; i < T; i++) {
        softmax(combine + i * N, N, 1);
        for (size_t s = 0; s < N && !masked(t, i); s++)
            for (size_t d = 0; d < D; d++)
                out->of[TRIAL_Y][i * D + d] += combine[i * N + s] * ys[s * D + d];
    }
}

/* ---- All of it ------------------------------------------------------------------------------- */

/* `fixed`: with the choice that is in `out`. */
static void forward(const trial *t, const host_room *room, bool fixed, trial_values *out) {
    memset(out->of[TRIAL_Y], 0, t->counts[TRIAL_Y] * sizeof(double));
    if (t->desc.router.policy == CLMOE_POLICY_SOFT_MOE) {
        run_slots(t, room, out);
        return;
    }
    find_logits(t, room->logits);
    if (!fixed)
        choose(t, room, out);
    run_pairs(t, room, out);
}

/* d<dy, y> / d(element), y by way of `out`, which is written over. */
static double difference(const trial *t, const host_room *room, double *element,
                         trial_values *out) {
    static const double step = 1e-4;
    const double at = *element;
    double loss[2];
    for (int side = 0; side < 2; side++) {
        *element = at + (side ? step : -step);
        forward(t, room, true, out);
        loss[side] = dot(t->given.of[TRIAL_DY], out->of[TRIAL_Y], t->counts[TRIAL_Y]);
    }
    *element = at;
    return (loss[1] - loss[0]) / (2 * step);
}

static void find_gradients(const trial *t, const host_room *room, trial_values *out,
                           trial_values *spare) {
    static const trial_array of[][2] = {{TRIAL_DX, TRIAL_X},
                                        {TRIAL_DROUTER, TRIAL_ROUTER},
                                        {TRIAL_DGROUP_ROUTER, TRIAL_GROUP_ROUTER},
                                        {TRIAL_DGATE, TRIAL_GATE},
                                        {TRIAL_DDOWN, TRIAL_DOWN}};
    uint64_t seed = t->tokens;
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++) {
        double *gradient = out->of[of[i][0]];
        const size_t count = t->counts[of[i][0]];
        const int samples = count > 0 && t->tokens <= MOST_TOKENS ? SAMPLES : 0;
        for (size_t at = 0; at < count; at++)
            gradient[at] = NAN;
        for (int sample = 0; sample < samples; sample++) {
            const size_t at = (size_t)(trial_random(&seed) * (double)count);
            gradient[at] = difference(t, room, t->given.of[of[i][1]] + at, spare);
        }
    }
}

static size_t most(size_t a, size_t b) {
    return a > b ? a : b;
}

static clmoe_status room_create(const trial *t, host_room *room) {
    const size_t T = t->tokens, E = t->desc.num_experts, D = t->desc.dim, N = slots_of(t);
    room->logits = calloc(T * N, sizeof(double));
    room->keys = calloc(T * N, sizeof(double));
    room->row = calloc(2 * most(T, N), sizeof(double));
    room->hidden = calloc(t->desc.experts.hidden_dim, sizeof(double));
    room->sums = calloc(T + E, sizeof(double));
    room->mixed = calloc(2 * N * D, sizeof(double));
    if (!room->logits || !room->keys || !room->row || !room->hidden || !room->sums || !room->mixed)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the self-test");
    return CLMOE_SUCCESS;
}

static void room_release(host_room *room) {
    free(room->logits);
    free(room->keys);
    free(room->row);
    free(room->hidden);
    free(room->sums);
    free(room->mixed);
}

clmoe_status host_run(trial *t, trial_values *out) {
    clmoe_status status = CLMOE_SUCCESS;
    host_room room = {0};
    trial_values spare = {0};
    TRY(room_create(t, &room));
    forward(t, &room, false, out);
    if (t->desc.training) {
        TRY(trial_values_create(t, &spare));
        for (int i = TRIAL_IDS; i <= TRIAL_OFFSETS; i++)
            if (spare.of[i])
                memcpy(spare.of[i], out->of[i], t->counts[i] * sizeof(double));
        find_gradients(t, &room, out, &spare);
    }
done:
    trial_values_release(&spare);
    room_release(&room);
    return status;
}
