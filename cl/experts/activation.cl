/*
 * Purpose: back through the activation of an MLP: from the gradient on what goes into down to that
 *          on gate and up, and what else needs the activation, which was not kept.
 * Formula: with h the activation of z, see act.clh, and w the row's weight: dot = sum of dh h;
 *          dz = w dh dh/dz; dh becomes w h, the rows that the gradient of down is made of. With
 *          DROPOUT h is times its factors, see dropout.clh.
 * Arrays: z (rows of slots, or of pairs), dh [S,H] in place, pair_of [S] or NULL, pair_weights
 *          [pairs] or NULL (w = 1), token_mask [S] or NULL -> dz [S,H or 2H], dots [S] f32 or NULL.
 *          state is read with DROPOUT. With `gates` w is the sigmoid of what pair_weights has. Rows
 *          of padding, pair_of -1, are left alone, masked ones become 0. z, dh and dz are X.
 * NDRange: one group per GROUP / LANES slots; LANES work-items along H of each, V columns at a
 *          time.
 * Limits: GROUP and LANES powers of two; V columns are 16 bytes, or 16; ACTIVATION is one of
 *         act.clh; GATED, INTERLEAVED and DROPOUT are 0 or 1; X is a storage type.
 * Repeatability: dots are summed in lane order, then by a tree.
 */
#define FLOATV JOIN(float, V)
#define ACT_T FLOATV
/* The slope has that reciprocal. */
#define ACT_EXP(v)       exp(v)
#define ACT_DIVIDE(a, b) ((a) * (1.0f / (b)))
#include "experts/dropout.clh"
#include "experts/gemm/act.clh"
#include "experts/gemm/z.clh"

TEAM_TREE(team_sum, float, LANES, ADD)

/* `aligned` is ALIGNED() of the row. */
DEFINE_LOAD_SOME(load_some, X, V)

static inline void store_some(bool aligned, FLOATV v, __global STORAGE(X) *to, int count) {
    float part[V];
    if (aligned && count >= V) {
        STOREA(X, V, v, to);
        return;
    }
    JOIN(vstore, V)(v, 0, part);
    UNROLL for (int i = 0; i < V; ++i)
        if (i < count)
            STORE(X, part[i], to + i);
}

static inline float sum_lanes(FLOATV v) {
    float lanes[V], sum = 0.0f;
    JOIN(vstore, V)(v, 0, lanes);
    UNROLL for (uint i = 0; i < V; ++i)
        sum += lanes[i];
    return sum;
}

/* Both of V columns that take turns in memory: 2 count elements from `from` on. */
static inline FLOATV load_turns(bool aligned, __global const STORAGE(X) *from, int count,
                                FLOATV *odd) {
    float part[2 * V], evens[V], odds[V];
    JOIN(vstore, V)(load_some(aligned, from, 2 * count), 0, part);
    JOIN(vstore, V)(load_some(aligned, from + V, 2 * count - V), 1, part);
    UNROLL for (uint i = 0; i < V; ++i) {
        evens[i] = part[2 * i];
        odds[i] = part[2 * i + 1];
    }
    *odd = JOIN(vload, V)(0, odds);
    return JOIN(vload, V)(0, evens);
}

static inline void store_turns(bool aligned, FLOATV even, FLOATV odd, __global STORAGE(X) *to,
                               int count) {
    float part[2 * V];
    UNROLL for (uint i = 0; i < V; ++i) {
        float lanes[V];
        JOIN(vstore, V)(even, 0, lanes);
        part[2 * i] = lanes[i];
        JOIN(vstore, V)(odd, 0, lanes);
        part[2 * i + 1] = lanes[i];
    }
    store_some(aligned, JOIN(vload, V)(0, part), to, 2 * count);
    store_some(aligned, JOIN(vload, V)(1, part), to + V, 2 * count - V);
}

#if DROPOUT
/* The factors of V columns from j on. */
static inline FLOATV factors_of(__global const state_header *state, uint row, uint j, uint use,
                                float p) {
    float factors[V];
    UNROLL for (uint i = 0; i < V; i += 4)
        vstore4(dropout_factors(state, row, (j + i) / 4, use, p), 0, factors + i);
    return JOIN(vload, V)(0, factors);
}
#endif

KERNEL(GROUP, 1, 1)
void activation_backward(IN(STORAGE(X), z), OUT(STORAGE(X), dh), IN(int, pair_of),
                         IN(float, pair_weights), IN(uchar, token_mask), OUT(STORAGE(X), dz),
                         OUT(float, dots), IN(uint, state), z_place z_at, z_place dz_at,
                         uint slots, uint hidden_dim, uint gates, float limit, float alpha,
                         float up_shift, uint use, float p) {
    __local float tmp[GROUP];
    const uint lane = get_local_id(0) % LANES;
    const ulong slot = get_group_id(0) * (GROUP / LANES) + get_local_id(0) / LANES;
    const bool is_slot = slot < slots; /* the last group may have more rows */
    const int pair = !is_slot ? -1 : pair_of ? AT(pair_of)[slot] : (int)slot;
    const bool masked = is_slot && token_mask && !AT(token_mask)[slot];
    const uint columns = pair < 0 ? 0 : hidden_dim;
    const FLOATV none = (FLOATV)(0.0f);
    const float given = pair_weights && pair >= 0 ? AT(pair_weights)[pair] : 1.0f;
    const float weight = gates ? SIGMOID(given) : given;
    FLOATV products = none;
    z = AT(z) + (ulong)(z_at.by_pair ? (uint)max(pair, 0) : slot) * z_at.row;
    dz = AT(dz) + slot * dz_at.row;
    dh = AT(dh) + slot * hidden_dim;
    const bool aligned = ALIGNED(X, V, dh) && ALIGNED(X, V, z) && ALIGNED(X, V, z + z_up(&z_at)) &&
                         ALIGNED(X, V, dz) && ALIGNED(X, V, dz + z_up(&dz_at));
    for (uint j = lane * V; j < columns; j += LANES * V) {
        const int count = (int)min((uint)V, columns - j);
        FLOATV d_up = none, h = none;
#if GATED
        FLOATV d_gate = none;
#endif
        if (!masked) {
            const FLOATV d = load_some(aligned, dh + j, count);
            FLOATV up, factors = (FLOATV)(1.0f);
#if DROPOUT
            factors = factors_of(STATE_OF(state), (uint)pair, j, use, p);
#endif
#if GATED
            FLOATV gate;
#if INTERLEAVED
            gate = load_turns(aligned, z + 2 * j, count, &up);
#else
            gate = load_some(aligned, z + j, count);
            up = load_some(aligned, z + z_up(&z_at) + j, count);
#endif
            d_gate = act_gated_slope(ACTIVATION, gate, up, limit, alpha, up_shift, &h);
            d_gate = weight * d * factors * d_gate;
            d_up = act_up_slope(h, up, limit);
            h *= clamp_up(up, limit) + up_shift;
#else
            up = load_some(aligned, z + j, count);
            h = act_with_slope(ACTIVATION, up, alpha, &d_up);
#endif
            d_up = weight * d * factors * d_up;
            h *= factors;
            products += d * h;
            h *= weight;
        }
#if GATED && INTERLEAVED
        store_turns(aligned, d_gate, d_up, dz + 2 * j, count);
#elif GATED
        store_some(aligned, d_gate, dz + j, count);
        store_some(aligned, d_up, dz + z_up(&dz_at) + j, count);
#else
        store_some(aligned, d_up, dz + j, count);
#endif
        store_some(aligned, h, dh + j, count);
    }
    const float dot_product = team_sum(sum_lanes(products), tmp);
    if (lane == 0 && dots && columns > 0)
        AT(dots)[slot] = dot_product;
}
