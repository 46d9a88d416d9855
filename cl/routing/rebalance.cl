/*
 * Purpose: weight rebalancing: combine weights of the fixed choice that load the experts more
 *          evenly.
 * Formula: minimises 1/2 sum_e (L'_e - L*)^2 + mu/2 |W' - W|^2, L'_e = sum_t W'_te, L* = sum W / E,
 *          by projected gradient: v = w' - step ((L'_e - L*) + mu (w' - w)), step = 1 / (mu + max_e
 *          pairs of e); a row of W' is then v's nearest point with the row's sum and no negative
 *          element: max(v - tau, 0), tau from the elements above it (Michelot).
 *          Backward, an iteration of which a set of a row stays above 0: dv = dW' - mean of it over
 *          that set, 0 outside of it; that mean goes to each W, as a part of the row's sum; step mu
 *          dv goes to W; dw' = dv (1 - step mu) - step sum_t dv. Through L* nothing goes: the dv of
 *          a row add up to 0.
 * Arrays: ids, live [T], token_mask [T] or NULL, pair_weights [T,K] in place; before [T,K] (W),
 *          sums [T], partial [blocks,E], pairs [blocks,E] u32, columns [E] (L'), target [2] (L*,
 *          step).
 *          stays [T,K] u32 or NULL: bit `bit` is set where an iteration leaves more than 0.
 *          Backward, pair_weights is the gradient in place, at first dpair_weights [T,K]; `before`
 *          that on W, added at the end.
 *          A row's pairs are its live ones of experts with weights. Rows whose sum is not positive
 *          and finite, and masked ones, take no part: sum 0. Rows of one pair stay, but load their
 *          expert.
 * NDRange: rebalance_begin, rebalance_rows, rebalance_back_rows, rebalance_back_end: a group per
 *          block of block_size tokens.
 *          rebalance_columns: a work-item per expert. rebalance_target: one group.
 * Limits: none.
 * Repeatability: each column of a block is summed by one lane in token order, then block by block.
 */
#include "dispatch/pairs.clh"

typedef struct rebalancing {
    token_owner owner;
    __global const int *ids;
    __global float *pair_weights;
    __global float *before;
    __global float *sums;
    __global float *partial; /* of this block */
    uint begin, end;         /* tokens of this block */
    int experts;
} rebalancing;

#define REBALANCE_ARGS                                                                             \
    IN(int, ids), IN(int, live), IN(uchar, token_mask), OUT(float, pair_weights),                  \
        OUT(float, before), OUT(float, sums), OUT(float, partial), uint tokens, int top_k,         \
        int experts, uint block_size

#define REBALANCE_INIT                                                                             \
    {{0, AT(live), GIVEN(token_mask), top_k},                                                      \
     AT(ids),                                                                                      \
     AT(pair_weights),                                                                             \
     AT(before),                                                                                   \
     AT(sums),                                                                                     \
     AT(partial) + (ulong)get_group_id(0) * experts,                                               \
     get_group_id(0) * block_size,                                                                 \
     min((uint)get_group_id(0) * block_size + block_size, tokens),                                 \
     experts}

/* *sum += value; *lost carries what rounding took: K elements must not cost K roundings. */
static inline void add_to(float *sum, float *lost, float value) {
    float term = value - *lost, next = *sum + term;
    *lost = (next - *sum) - term;
    *sum = next;
}

/* The pair's expert, -1 if the pair takes no part. */
static inline int part_of(const rebalancing *r, uint token, int k) {
    long pair = owned_pair(&r->owner, token, k);
    int id = pair >= 0 ? r->ids[pair] : -1;
    return id < r->experts ? id : -1;
}

/* partial [E] of the block: each lane adds up its own columns. */
static inline void add_columns(const rebalancing *r, __global uint *pairs) {
    int lane = get_local_id(0);
    for (int e = lane; e < r->experts; e += GROUP) {
        r->partial[e] = 0.0f;
        if (pairs)
            pairs[e] = 0;
    }
    for (uint token = r->begin; token < r->end; token++) {
        int top_k = r->sums[token] > 0.0f ? r->owner.top_k : 0;
        for (int k = 0; k < top_k; k++) {
            int e = part_of(r, token, k);
            if (e < 0 || (e & (GROUP - 1)) != lane)
                continue;
            r->partial[e] += r->pair_weights[(ulong)token * top_k + k];
            if (pairs)
                pairs[e]++;
        }
    }
}

KERNEL(GROUP, 1, 1)
void rebalance_begin(REBALANCE_ARGS, OUT(uint, pairs)) {
    rebalancing r = REBALANCE_INIT;
    for (uint token = r.begin + get_local_id(0); token < r.end; token += GROUP) {
        float sum = 0.0f, lost = 0.0f;
        for (int k = 0; k < top_k; k++) {
            ulong pair = (ulong)token * top_k + k;
            r.before[pair] = r.pair_weights[pair];
            add_to(&sum, &lost, part_of(&r, token, k) >= 0 ? r.pair_weights[pair] : 0.0f);
        }
        r.sums[token] = sum > 0.0f && sum < INFINITY ? sum : 0.0f;
    }
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    add_columns(&r, AT(pairs) + (ulong)get_group_id(0) * experts);
}

KERNEL(GROUP, 1, 1)
void rebalance_columns(IN(float, partial), OUT(float, columns), uint experts, uint blocks) {
    uint e = get_global_id(0);
    float sum = 0.0f;
    if (e >= experts)
        return;
    for (uint block = 0; block < blocks; block++)
        sum += AT(partial)[(ulong)block * experts + e];
    AT(columns)[e] = sum;
}

KERNEL(GROUP, 1, 1)
void rebalance_target(IN(float, columns), IN(uint, pairs), OUT(float, target), uint experts,
                      uint blocks, float mu) {
    __local float tmp[GROUP];
    float sum = 0.0f, most = 0.0f;
    for (uint e = get_local_id(0); e < experts; e += GROUP) {
        uint count = 0;
        for (uint block = 0; block < blocks; block++)
            count += AT(pairs)[(ulong)block * experts + e];
        sum += AT(columns)[e];
        most = fmax(most, (float)count);
    }
    sum = group_sum(sum, tmp);
    most = group_max(most, tmp);
    if (get_local_id(0) == 0) {
        AT(target)[0] = sum / (float)experts;
        AT(target)[1] = 1.0f / (mu + most);
    }
}

/*
 * The row's v -> its nearest point with the sum. Measured from the largest v, so that all that
 * stays above tau is of the size of the sum. The loop ends where tau rises no more: rounding may
 * lower it.
 */
static inline void project(const rebalancing *r, uint token, float largest) {
    __global float *v = r->pair_weights + (ulong)token * r->owner.top_k;
    float goal = r->sums[token], tau = -INFINITY;
    bool rises = true;
    while (rises) {
        float sum = 0.0f, lost = 0.0f;
        int above = 0;
        for (int k = 0; k < r->owner.top_k; k++)
            if (part_of(r, token, k) >= 0 && v[k] - largest > tau) {
                add_to(&sum, &lost, v[k] - largest);
                above++;
            }
        float next = (sum - goal) / (float)above;
        rises = next > tau;
        tau = rises ? next : tau;
    }
    for (int k = 0; k < r->owner.top_k; k++)
        if (part_of(r, token, k) >= 0)
            v[k] = fmax((v[k] - largest) - tau, 0.0f);
}

static inline void step_row(const rebalancing *r, uint token, __global const float *columns,
                            float mean, float step, float mu) {
    __global float *w = r->pair_weights + (ulong)token * r->owner.top_k;
    __global const float *before = r->before + (ulong)token * r->owner.top_k;
    float largest = -INFINITY;
    int parts = 0;
    for (int k = 0; k < r->owner.top_k; k++)
        parts += part_of(r, token, k) >= 0;
    if (parts < 2 || r->sums[token] == 0.0f)
        return;
    for (int k = 0; k < r->owner.top_k; k++) {
        int e = part_of(r, token, k);
        if (e < 0)
            continue;
        w[k] -= step * ((columns[e] - mean) + mu * (w[k] - before[k]));
        largest = fmax(largest, w[k]);
    }
    project(r, token, largest);
}

/* Bit 0 of a word starts it. */
static inline void note_stays(const rebalancing *r, uint token, __global uint *stays, uint bit) {
    for (int k = 0; k < r->owner.top_k; k++) {
        ulong pair = (ulong)token * r->owner.top_k + k;
        stays[pair] = (bit ? stays[pair] : 0) | (uint)(r->pair_weights[pair] > 0.0f) << bit;
    }
}

KERNEL(GROUP, 1, 1)
void rebalance_rows(REBALANCE_ARGS, IN(float, columns), IN(float, target), OUT(uint, stays),
                    uint bit, float mu) {
    rebalancing r = REBALANCE_INIT;
    float mean = AT(target)[0], step = AT(target)[1];
    for (uint token = r.begin + get_local_id(0); token < r.end; token += GROUP) {
        step_row(&r, token, AT(columns), mean, step, mu);
        if (stays)
            note_stays(&r, token, AT(stays), bit);
    }
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    add_columns(&r, 0);
}

/* dv and its sums over the tokens -> the gradient on what the iteration began with. */
static inline void pass_step(const rebalancing *r, uint token, __global const float *columns,
                             float step, float mu) {
    __global float *d = r->pair_weights + (ulong)token * r->owner.top_k;
    for (int k = 0; k < r->owner.top_k; k++) {
        int e = part_of(r, token, k);
        if (e >= 0)
            d[k] -= step * (columns[e] + mu * d[k]);
    }
}

/* The gradient -> dv, and what goes to W. */
static inline void pass_projection(const rebalancing *r, uint token, __global const uint *stays,
                                   uint bit, float step, float mu) {
    __global float *d = r->pair_weights + (ulong)token * r->owner.top_k;
    __global float *dbefore = r->before + (ulong)token * r->owner.top_k;
    float sum = 0.0f;
    int count = 0;
    stays += (ulong)token * r->owner.top_k;
    for (int k = 0; k < r->owner.top_k; k++)
        if (part_of(r, token, k) >= 0 && (stays[k] >> bit & 1)) {
            sum += d[k];
            count++;
        }
    float mean = count > 0 ? sum / (float)count : 0.0f;
    for (int k = 0; k < r->owner.top_k; k++)
        if (part_of(r, token, k) >= 0) {
            d[k] = stays[k] >> bit & 1 ? d[k] - mean : 0.0f;
            dbefore[k] += mean + step * mu * d[k];
        }
}

KERNEL(GROUP, 1, 1)
void rebalance_back_rows(REBALANCE_ARGS, IN(float, columns), IN(float, target), float mu,
                         IN(uint, stays), IN(float, dpair_weights), uint bit, uint first) {
    rebalancing r = REBALANCE_INIT;
    float step = AT(target)[1];
    for (uint token = r.begin + get_local_id(0); token < r.end; token += GROUP) {
        for (int k = 0; first && k < top_k; k++) {
            const ulong pair = (ulong)token * top_k + k;
            r.before[pair] = 0.0f;
            r.pair_weights[pair] = AT(dpair_weights)[pair];
        }
        if (r.sums[token] == 0.0f)
            continue;
        if (!first)
            pass_step(&r, token, AT(columns), step, mu);
        pass_projection(&r, token, AT(stays), bit, step, mu);
    }
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    add_columns(&r, 0);
}

KERNEL(GROUP, 1, 1)
void rebalance_back_end(REBALANCE_ARGS, IN(float, columns), IN(float, target), float mu) {
    rebalancing r = REBALANCE_INIT;
    for (uint token = r.begin + get_local_id(0); token < r.end; token += GROUP) {
        if (r.sums[token] == 0.0f)
            continue;
        pass_step(&r, token, AT(columns), AT(target)[1], mu);
        for (int k = 0; k < top_k; k++) {
            ulong pair = (ulong)token * top_k + k;
            r.pair_weights[pair] += r.before[pair];
        }
    }
}
