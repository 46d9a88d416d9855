/*
 * Purpose: the gradient of a bias.
 * Formula: C_e[n] = sum over the slots s of expert e of w_s Q[s,n], or that added to C_e.
 * Arrays: as in gradient.clh, whose P, m and c_row are not used; pair_of [S] or NULL, pair_weights
 *          [pairs] or NULL (w = 1; with `gates` the sigmoid of it), token_mask [S] or NULL.
 * NDRange: (ceil(n / COLUMNS), E): a group per COLUMNS columns of an expert, V a work-item; DOWN
 *          work-items share its rows.
 * Limits: GROUP a power of two; V columns are 16 bytes, or 16; Q and C are storage types.
 * Repeatability: a work-item adds every DOWN-th row of the expert, then they are added in order.
 */
#define P f32
#include "experts/gemm/gradient.clh"

#define FLOATV JOIN(float, V)

#define ACROSS  (GROUP < 4 ? GROUP : 4)
#define COLUMNS (ACROSS * V)
#define DOWN    (GROUP / ACROSS)
/* Rows that a work-item waits for at once. */
#define TURNS (GROUP == 1 ? 1 : 8)

DEFINE_LOAD_SOME(load_some, Q, V)

typedef struct weighted_slots {
    uint first, end; /* every DOWN-th of them */
    __global const int *pair_of;
    __global const float *pair_weights;
    __global const uchar *token_mask;
    uint gates;
} weighted_slots;

/* Weights [TURNS] of every DOWN-th slot from `first` on; counts: the slot counts. */
static inline void load_weights(const weighted_slots *s, uint first, float *weights, bool *counts) {
    uint pairs[TURNS];
    UNROLL for (uint i = 0; i < TURNS; ++i) {
        const uint slot = min(first + i * DOWN, s->end - 1);
        pairs[i] = s->pair_of ? (uint)s->pair_of[slot] : slot;
        counts[i] = first + i * DOWN < s->end && (!s->token_mask || s->token_mask[slot]);
    }
    UNROLL for (uint i = 0; i < TURNS; ++i)
        weights[i] = s->pair_weights ? s->pair_weights[pairs[i]] : 1.0f;
    UNROLL for (uint i = 0; i < TURNS; ++i)
        weights[i] = s->gates ? SIGMOID(weights[i]) : weights[i];
}

/* V columns, of which `count` are in the row, of every DOWN-th slot; `whole`: all, and aligned. */
static inline FLOATV sum_slots(const gradient *g, const weighted_slots *s, uint column, int count,
                               bool whole) {
    FLOATV sum = (FLOATV)(0.0f);
    for (uint first = s->first; first < s->end; first += DOWN * TURNS) {
        FLOATV rows[TURNS];
        float weights[TURNS];
        bool counts[TURNS];
        UNROLL for (uint i = 0; i < TURNS; ++i) {
            const uint slot = min(first + i * DOWN, s->end - 1);
            rows[i] = load_some(whole, row_of_q(g, slot) + column, count);
        }
        load_weights(s, first, weights, counts);
        UNROLL for (uint i = 0; i < TURNS; ++i)
            if (counts[i])
                sum += weights[i] * rows[i];
    }
    return sum;
}

KERNEL(GROUP, 1, 1)
void bias_gradient(GRADIENT_PARAMETERS, IN(int, pair_of), IN(float, pair_weights),
                   IN(uchar, token_mask), uint gates) {
    __local float sums[DOWN][COLUMNS + 1]; /* one more: rows begin in other banks */
    const gradient g = GRADIENT_PROBLEM;
    const uint expert = (uint)get_group_id(1), first = (uint)get_group_id(0) * COLUMNS;
    const uint across = (uint)get_local_id(0) % ACROSS, down = (uint)get_local_id(0) / ACROSS;
    const uint column = first + across * V;
    const int count = (int)n - (int)column;
    const uint2 in_use = slots_of(&g, expert);
    const weighted_slots slots_down = {in_use.x + down,     in_use.y,          GIVEN(pair_of),
                                       GIVEN(pair_weights), GIVEN(token_mask), gates};
    const bool whole = count >= V && ALIGNED(Q, V, g.q + column) &&
                       ALIGNED(Q, V, g.q + q_row + column);
    const FLOATV sum = whole ? sum_slots(&g, &slots_down, column, V, true)
                             : sum_slots(&g, &slots_down, column, count, false);
    JOIN(vstore, V)(sum, 0, sums[down] + across * V);
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = get_local_id(0); i < COLUMNS && first + i < n; i += GROUP) {
        float total = 0.0f;
        for (uint other = 0; other < DOWN; other++)
            total += sums[other][i];
        gradient_store(&g, expert, 0, first + i, total);
    }
}
