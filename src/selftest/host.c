/*
 * The layer on the host in double precision, from the formulas of clmoe.h. Nothing is shared with
 * the kernels, and nothing is fast.
 */
#include "host.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Gradients: elements of each array that are found by differences, of batches that are small. */
enum { SAMPLES = 10, MOST_TOKENS = 32 };

static size_t slots_of(const trial *t) {
    return t->desc.num_experts * (size_t)t->desc.router.soft_moe.slots;
}

bool host_masked(const trial *t, size_t token) {
    return t->given.of[TRIAL_MASK] && t->given.of[TRIAL_MASK][token] == 0;
}

double host_dot(const double *a, const double *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += a[i] * b[i];
    return sum;
}

double host_sigmoid(double v) {
    return 1 / (1 + exp(-v));
}

void host_softmax(double *values, size_t count, size_t stride) {
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

void host_score(const trial *t, const double *logits, double *scores, size_t count) {
    memcpy(scores, logits, count * sizeof *scores);
    if (t->desc.router.score == CLMOE_SCORE_SOFTMAX)
        host_softmax(scores, count, 1);
    else
        for (size_t i = 0; i < count; i++)
            scores[i] = host_sigmoid(scores[i]);
}

void host_best(double *keys, size_t n, size_t k, double *ids) {
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
        used += !host_masked(t, i);
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
            d0[i] = host_masked(t, i) ? 0 : 1 / used / (host_dot(room->keys + i * E, d1, E) + 1e-8);
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
            host_dot(t->given.of[TRIAL_X] + token * D, t->given.of[TRIAL_GROUP_ROUTER] + g * D, D);
    host_best(gates, groups->count, groups->topk, chosen);
    for (size_t g = 0; g < groups->count; g++)
        for (size_t i = 0; i < groups->topk; i++) {
            if (chosen[i] != (double)g)
                continue;
            host_best(room->keys + token * t->desc.num_experts + g * size, size, each, ids);
            for (size_t k = 0; k < each; k++)
                ids[k] += (double)(g * size);
            ids += each;
        }
}

/* Each expert its C best tokens: keys become 1 where a token has it. */
static void choose_by_expert(const trial *t, const host_room *room) {
    const size_t T = t->tokens, E = t->desc.num_experts, C = t->pairs / E;
    double *keys = room->row, *chosen = room->row + T;
    for (size_t e = 0; e < E; e++) {
        for (size_t i = 0; i < T; i++)
            keys[i] = host_masked(t, i) ? -INFINITY : room->logits[i * E + e];
        host_best(keys, T, C, chosen);
        for (size_t i = 0; i < T; i++)
            room->keys[i * E + e] = 0;
        for (size_t c = 0; c < C; c++)
            if (!isnan(chosen[c]))
                room->keys[(size_t)chosen[c] * E + e] = 1;
    }
}

/* The pairs of a token in ascending id, from keys. */
static void list_pairs(const trial *t, const host_room *room, trial_values *out) {
    const size_t T = t->tokens, E = t->desc.num_experts;
    double *ids = out->of[TRIAL_IDS];
    size_t pair = 0;
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

/* keys = s(l) + b, the state's. */
static void add_select_bias(const trial *t, const host_room *room) {
    const size_t E = t->desc.num_experts;
    for (size_t i = 0; i < t->tokens; i++) {
        host_score(t, room->logits + i * E, room->row, E);
        for (size_t e = 0; e < E; e++)
            if (!isinf(room->keys[i * E + e]))
                room->keys[i * E + e] = room->row[e] + t->given.of[TRIAL_STATE][e];
    }
}

static void choose(const trial *t, const host_room *room, trial_values *out) {
    const size_t E = t->desc.num_experts, K = t->desc.top_k;
    memcpy(room->keys, room->logits, t->tokens * E * sizeof *room->keys);
    if (t->desc.router.select_bias)
        add_select_bias(t, room);
    if (trial_lists_pairs(t)) {
        if (t->desc.capacity.keep == CLMOE_KEEP_ROUND)
            host_round(t, room);
        else
            choose_by_expert(t, room);
        list_pairs(t, room, out);
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
            host_best(keys, E, K, ids);
        for (size_t k = 0; k < K && host_masked(t, i); k++)
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
        gates[g] = host_dot(x, t->given.of[TRIAL_GROUP_ROUTER] + g * D, D);
    host_softmax(gates, G, 1);
    for (size_t g = 0; g < G; g++) {
        host_softmax(scores + g * size, size, 1);
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
        host_score(t, logits, room->row, E);
    for (size_t k = 0; k < count; k++) {
        weights[k] =
            isnan(ids[k]) ? (late ? -INFINITY : 0) : (late ? logits : room->row)[(size_t)ids[k]];
    }
    if (late)
        host_score(t, weights, weights, count);
    for (size_t k = 0; k < count; k++)
        sum += weights[k];
    for (size_t k = 0; k < count; k++) {
        if (router->renorm.kind == CLMOE_RENORM_SUM)
            weights[k] = sum > 0 ? weights[k] / (sum + (double)router->renorm.eps) : 0;
        weights[k] *= (double)router->scale;
    }
}

size_t host_pairs_begin(const trial *t, const trial_values *out, size_t token) {
    return out->of[TRIAL_OFFSETS] ? (size_t)out->of[TRIAL_OFFSETS][token] : token * t->desc.top_k;
}

void host_weigh(const trial *t, const host_room *room, trial_values *out) {
    double *weights = out->of[TRIAL_WEIGHTS];
    for (size_t p = 0; p < t->pairs; p++)
        weights[p] = NAN; /* of masked tokens, and of pairs that no token has */
    for (size_t i = 0; i < t->tokens; i++) {
        const size_t begin = host_pairs_begin(t, out, i), end = host_pairs_begin(t, out, i + 1);
        if (!host_masked(t, i))
            weigh(t, room, i, out->of[TRIAL_IDS] + begin, end - begin, weights + begin);
    }
}

/* ---- Experts --------------------------------------------------------------------------------- */

/* An MLP's matrices. */
typedef struct host_mlp {
    const double *up, *down; /* [2H,D], [D,H] */
    size_t hidden;
} host_mlp;

/* room->expert = down(silu(gate x) * up x). */
static void run_mlp(const trial *t, const host_room *room, const host_mlp *mlp, const double *x) {
    const size_t D = t->desc.dim, H = mlp->hidden;
    for (size_t h = 0; h < H; h++) {
        const double v = host_dot(mlp->up + h * D, x, D);
        room->hidden[h] = v * host_sigmoid(v) * host_dot(mlp->up + (H + h) * D, x, D);
    }
    for (size_t d = 0; d < D; d++)
        room->expert[d] = host_dot(mlp->down + d * H, room->hidden, H);
}

/* y += weight * expert e of x. */
static void add_expert(const trial *t, const host_room *room, size_t e, const double *x,
                       double weight, double *y) {
    const size_t D = t->desc.dim, H = t->desc.experts.hidden_dim;
    const host_mlp mlp = {t->given.of[TRIAL_GATE] + e * 2 * H * D,
                          t->given.of[TRIAL_DOWN] + e * D * H, H};
    run_mlp(t, room, &mlp, x);
    if (t->desc.normalize_experts)
        weight /= sqrt(host_dot(room->expert, room->expert, D));
    for (size_t d = 0; d < D; d++)
        y[d] += weight * room->expert[d];
}

static void add_shared(const trial *t, const host_room *room, const double *x, double *y) {
    const size_t D = t->desc.dim;
    const host_mlp mlp = {t->given.of[TRIAL_SHARED_UP], t->given.of[TRIAL_SHARED_DOWN],
                          t->desc.shared.hidden_dim};
    const double gate = host_sigmoid(host_dot(t->given.of[TRIAL_SHARED_GATE], x, D));
    run_mlp(t, room, &mlp, x);
    for (size_t d = 0; d < D; d++)
        y[d] += gate * room->expert[d];
}

static void run_pairs(const trial *t, const host_room *room, trial_values *out) {
    const size_t D = t->desc.dim;
    const double *ids = out->of[TRIAL_IDS], *weights = out->of[TRIAL_WEIGHTS];
    for (size_t i = 0; i < t->tokens; i++) {
        const double *x = t->given.of[TRIAL_X] + i * D;
        double *y = out->of[TRIAL_Y] + i * D;
        for (size_t p = host_pairs_begin(t, out, i); p < host_pairs_begin(t, out, i + 1); p++)
            if (room->placed[p] > 0)
                add_expert(t, room, (size_t)ids[p], x, weights[p], y);
        if (t->desc.shared.hidden_dim > 0 && !host_masked(t, i))
            add_shared(t, room, x, y);
    }
}

/* ---- Soft MoE -------------------------------------------------------------------------------- */

static void run_slots(const trial *t, const host_room *room, trial_values *out) {
    const size_t T = t->tokens, D = t->desc.dim, N = slots_of(t);
    const double *x = t->given.of[TRIAL_X], *router = t->given.of[TRIAL_ROUTER];
    double *dispatch = room->keys, *combine = room->logits, *ys = room->mixed + N * D;
    memset(room->mixed, 0, 2 * N * D * sizeof *room->mixed);
    for (size_t i = 0; i < T * N; i++) {
        const double *a = x + i / N * D, *b = router + i % N * D;
        const double norms = sqrt(host_dot(a, a, D) * host_dot(b, b, D));
        combine[i] =
            norms > 0 ? (double)t->desc.router.soft_moe.scale * host_dot(a, b, D) / norms : 0;
        dispatch[i] = host_masked(t, i / N) ? -INFINITY : combine[i];
    }
    for (size_t s = 0; s < N; s++) {
        host_softmax(dispatch + s, T, N);
        for (size_t i = 0; i < T; i++)
            for (size_t d = 0; d < D; d++)
                room->mixed[s * D + d] += dispatch[i * N + s] * x[i * D + d];
        add_expert(t, room, s / t->desc.router.soft_moe.slots, room->mixed + s * D, 1, ys + s * D);
    }
    for (size_t i = 0; i < T; i++) {
        host_softmax(combine + i * N, N, 1);
        for (size_t s = 0; s < N && !host_masked(t, i); s++)
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
    host_logits(t, room);
    if (!fixed)
        choose(t, room, out);
    host_weigh(t, room, out);
    if (!fixed)
        host_place(t, room, out);
    run_pairs(t, room, out);
}

/* d(<dy, y> + losses) / d(element), y by way of `out`, which is written over. */
static double difference(const trial *t, const host_room *room, double *element,
                         trial_values *out) {
    static const double step = 1e-4;
    const double at = *element;
    double loss[2];
    for (int side = 0; side < 2; side++) {
        *element = at + (side ? step : -step);
        forward(t, room, true, out);
        loss[side] = host_dot(t->given.of[TRIAL_DY], out->of[TRIAL_Y], t->counts[TRIAL_Y]);
        if (t->state)
            loss[side] += host_loss(t, room);
    }
    *element = at;
    return (loss[1] - loss[0]) / (2 * step);
}

static void find_gradients(const trial *t, const host_room *room, trial_values *out,
                           trial_values *spare) {
    static const trial_array of[][2] = {{TRIAL_DX, TRIAL_X},
                                        {TRIAL_DLOGITS, TRIAL_LOGITS},
                                        {TRIAL_DNOISE, TRIAL_DNOISE}, /* any value */
                                        {TRIAL_DROUTER, TRIAL_ROUTER},
                                        {TRIAL_DGROUP_ROUTER, TRIAL_GROUP_ROUTER},
                                        {TRIAL_DNOISE_ROUTER, TRIAL_NOISE_ROUTER},
                                        {TRIAL_DROUTER_BIAS, TRIAL_ROUTER_BIAS},
                                        {TRIAL_DGATE, TRIAL_GATE},
                                        {TRIAL_DDOWN, TRIAL_DOWN},
                                        {TRIAL_DSHARED_UP, TRIAL_SHARED_UP},
                                        {TRIAL_DSHARED_DOWN, TRIAL_SHARED_DOWN},
                                        {TRIAL_DSHARED_GATE, TRIAL_SHARED_GATE}};
    uint64_t seed = t->tokens;
    for (size_t i = 0; i < sizeof of / sizeof of[0]; i++) {
        double *gradient = out->of[of[i][0]];
        const size_t count = t->counts[of[i][0]];
        const bool is_given = t->given.of[of[i][1]] != NULL;
        const int samples = count > 0 && is_given && t->tokens <= MOST_TOKENS ? SAMPLES : 0;
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

static double *take(host_room *room, size_t count) {
    double *block = calloc(count + 1, sizeof *block);
    room->is_short = room->is_short || !block;
    room->blocks[room->num_blocks++] = block;
    return block;
}

static clmoe_status room_create(const trial *t, host_room *room) {
    const size_t T = t->tokens, E = t->desc.num_experts, D = t->desc.dim, N = slots_of(t);
    double **const of_tokens[] = {&room->clean,  &room->deviation, &room->noisy,
                                  &room->logits, &room->keys,      &room->threshold};
    for (size_t i = 0; i < sizeof of_tokens / sizeof of_tokens[0]; i++)
        *of_tokens[i] = take(room, T * N);
    room->row = take(room, 2 * most(T, N));
    room->hidden = take(room, most(t->desc.experts.hidden_dim, t->desc.shared.hidden_dim));
    room->expert = take(room, D);
    room->sums = take(room, T + E);
    room->mixed = take(room, 2 * N * D);
    room->chosen = take(room, t->pairs);
    room->placed = take(room, t->pairs);
    room->weight_sums = take(room, E);
    room->slopes = take(room, TRIAL_MOST_LOSSES * E);
    if (room->is_short)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the self-test");
    return CLMOE_SUCCESS;
}

static void room_release(host_room *room) {
    for (size_t i = 0; i < room->num_blocks; i++)
        free(room->blocks[i]);
}

clmoe_status host_run(trial *t, trial_values *out) {
    clmoe_status status = CLMOE_SUCCESS;
    host_room room = {0};
    trial_values spare = {0};
    TRY(room_create(t, &room));
    forward(t, &room, false, out);
    if (t->state)
        host_balance(t, &room, out);
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
