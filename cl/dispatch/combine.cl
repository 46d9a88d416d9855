/*
 * Purpose: the output of each token; and backward the gradient of the weights of its pairs.
 * Formula: y = residual + output_bias + sigmoid(gate) * shared + sum over the token's pairs, in the
 *          order of k, of w * ye[slot] (w = 1 when the expert applied it), or w * x for identity
 *          experts. A masked token gets its residual, or 0.
 * Arrays: ye [S,D], pair_weights [pairs], slot_of [pairs], x [T,D] or NULL, token_mask [T] or NULL,
 *          token_offsets [T+1] or NULL, shared [T,D] or NULL, shared_gate [T] or NULL, output_bias
 *          [D] or NULL, residual [T,D] or NULL -> y [T,D]. weights and shared_gate are f32,
 *          output_bias is W, the others X.
 * NDRange: (segments of SEGMENT columns, T); GROUP work-items along D, V columns each at a time.
 * Limits: V columns of X are 16 bytes, or 16; X and W are storage types. token_offsets may hold
 *         anything: no pair lies past `pairs`, and a token has no more than `most`.
 * Repeatability: one work-item adds an element's terms, in the order above.
 */
#include "dispatch/pairs.clh"

#define FLOATV JOIN(float, V)

typedef struct token_row {
    __global const STORAGE(X) *ye, *x, *shared, *residual;
    __global const STORAGE(W) *output_bias;
    __global const float *weights;
    __global const int *slot_of;
    int pairs, weight_in_expert;
    uint dim;
    float gate;
} token_row;

/* Pairs that a work-item waits for at once. */
#define TURNS (GROUP == 1 ? 1 : 4)

/* The row of choice k and its weight; NULL: it has none. */
static inline __global const STORAGE(X) *row_of_choice(const token_row *row, int k, float *weight) {
    const int slot = k < row->pairs ? row->slot_of[k] : SLOT_NONE;
    *weight = 1.0f;
    if (slot == SLOT_IDENTITY || (slot >= 0 && !row->weight_in_expert))
        *weight = row->weights[k];
    return slot >= 0 ? row->ye + (ulong)slot * row->dim : slot == SLOT_IDENTITY ? row->x : 0;
}

/* V, or one, columns from d on. */
#define DEFINE_COMBINE(name, type, load, load_bias)                                                \
    static inline type name(const token_row *row, uint d) {                                        \
        type sum = row->residual ? load(X, row->residual + d) : (type)(0.0f);                      \
        if (row->output_bias)                                                                      \
            sum += load_bias(W, row->output_bias + d);                                             \
        if (row->shared)                                                                           \
            sum += row->gate * load(X, row->shared + d);                                           \
        for (int first = 0; first < row->pairs; first += TURNS) {                                  \
            __global const STORAGE(X) *from[TURNS];                                                \
            float weights[TURNS];                                                                  \
            type parts[TURNS];                                                                     \
            UNROLL for (int i = 0; i < TURNS; i++)                                                 \
                from[i] = row_of_choice(row, first + i, &weights[i]);                              \
            UNROLL for (int i = 0; i < TURNS; i++)                                                 \
                parts[i] = from[i] ? load(X, from[i] + d) : (type)(0.0f);                          \
            UNROLL for (int i = 0; i < TURNS; i++)                                                 \
                if (from[i])                                                                       \
                    sum += weights[i] * parts[i];                                                  \
        }                                                                                          \
        return sum;                                                                                \
    }

#define LOAD_V(type, p)      LOADA(type, V, p)
#define LOAD_BIAS_V(type, p) LOADN(type, V, p)
DEFINE_COMBINE(combine_columns, FLOATV, LOAD_V, LOAD_BIAS_V)
DEFINE_COMBINE(combine_column, float, LOAD, LOAD)

KERNEL(GROUP, 1, 1)
void combine_rows(IN(STORAGE(X), ye), IN(float, pair_weights), IN(int, slot_of), IN(STORAGE(X), x),
                  IN(uchar, token_mask), IN(int, token_offsets), IN(STORAGE(X), shared),
                  IN(float, shared_gate), IN(STORAGE(W), output_bias), IN(STORAGE(X), residual),
                  OUT(STORAGE(X), y), uint dim, int top_k, int pairs, int most,
                  int weight_in_expert) {
    __global const int *live = 0;
    const ulong live_off = 0;
    token_owner owner = OWNER_INIT(top_k, pairs, most);
    ulong token = get_group_id(1);
    pair_range range = owned_pairs(&owner, (uint)token);
    int count = (int)(range.end - range.begin);
    token_row row = {AT(ye), 0, 0, 0, 0, 0, 0, count, weight_in_expert, dim, 1.0f};
    uint begin = get_group_id(0) * SEGMENT, end = min(begin + SEGMENT, dim);
    row.weights = AT(pair_weights) + range.begin;
    row.slot_of = AT(slot_of) + range.begin;
    if (x)
        row.x = AT(x) + token * dim;
    if (shared)
        row.shared = AT(shared) + token * dim;
    if (shared_gate)
        row.gate = SIGMOID(AT(shared_gate)[token]);
    if (output_bias)
        row.output_bias = AT(output_bias);
    if (residual)
        row.residual = AT(residual) + token * dim;
    if (token_mask && !AT(token_mask)[token]) {
        row.shared = 0;
        row.output_bias = 0;
    }
    y = AT(y) + token * dim;

    const bool aligned = ALIGNED(X, V, row.ye) && ALIGNED(X, V, row.ye + dim) &&
                         ALIGNED(X, V, row.x) && ALIGNED(X, V, row.shared) &&
                         ALIGNED(X, V, row.residual) && ALIGNED(X, V, y);
    uint whole = aligned ? begin + (end - begin) / V * V : begin;
    for (uint d = begin + get_local_id(0) * V; d < whole; d += GROUP * V)
        STOREA(X, V, combine_columns(&row, d), y + d);
    for (uint d = whole + get_local_id(0); d < end; d += GROUP)
        STORE(X, combine_column(&row, d), y + d);
}

/* <a, b> of two rows of X, of which `columns` are looked at; 0 of none. */
float group_dot(__global const STORAGE(X) *a, __global const STORAGE(X) *b, uint columns,
                __local float *tmp) {
    FLOATV products = (FLOATV)(0.0f);
    float lanes[V], sum = 0.0f;
    uint whole = ALIGNED(X, V, a) && ALIGNED(X, V, b) ? columns / V * V : 0;
    for (uint d = get_local_id(0) * V; d < whole; d += GROUP * V)
        products += LOADA(X, V, a + d) * LOADA(X, V, b + d);
    JOIN(vstore, V)(products, 0, lanes);
    UNROLL for (uint i = 0; i < V; i++)
        sum += lanes[i];
    for (uint d = whole + get_local_id(0); d < columns; d += GROUP)
        sum += LOAD(X, a + d) * LOAD(X, b + d);
    return group_sum(sum, tmp);
}

/* The same with a row of W. */
float group_dot_bias(__global const STORAGE(X) *a, __global const STORAGE(W) *b, uint columns,
                     __local float *tmp) {
    float sum = 0.0f;
    for (uint d = get_local_id(0); d < columns; d += GROUP)
        sum += LOAD(X, a + d) * LOAD(W, b + d);
    return group_sum(sum, tmp);
}

/*
 * The gradient of the combine weights: of an expert's pair dots[slot], the gradient without the
 * bias of down, plus <dy, down_bias>; with a weight at the input <x, dxe[slot]>; of an identity
 * expert's <dy, x>; else 0. `products`: there are others than dots. One group per token, the last
 * one for the pairs that no token has.
 */
KERNEL(GROUP, 1, 1)
void combine_backward(IN(STORAGE(X), dy), IN(STORAGE(X), x), IN(STORAGE(X), dxe), IN(float, dots),
                      IN(STORAGE(W), down_bias), IN(int, ids), IN(int, slot_of),
                      IN(uchar, token_mask), IN(int, token_offsets), OUT(float, dpair_weights),
                      uint dim, uint tokens, int top_k, int pairs, int most, uint products) {
    __local float tmp[GROUP];
    __global const int *live = 0;
    const ulong live_off = 0;
    token_owner owner = OWNER_INIT(top_k, pairs, most);
    const uint token = get_group_id(0);
    pair_range range = {0, 0};
    uint2 all = (uint2)((uint)pairs, (uint)pairs);
    if (token < tokens) {
        range = owned_pairs(&owner, token);
        all = token_pairs(&owner, token);
    } else if (token_offsets && tokens > 0) {
        all.x = min((uint)max(AT(token_offsets)[tokens], 0), (uint)pairs);
    }
    for (uint pair = all.x + get_local_id(0); pair < all.y; pair += GROUP) {
        const int slot = pair < range.end ? AT(slot_of)[pair] : SLOT_NONE;
        AT(dpair_weights)[pair] = slot >= 0 && !dxe ? AT(dots)[slot] : 0.0f;
    }
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    dy = AT(dy) + (ulong)token * dim;
    x = AT(x) + (ulong)token * dim;
    for (uint pair = all.x; pair < (products ? range.end : all.x); pair++) {
        const int slot = AT(slot_of)[pair];
        const bool placed = slot >= 0;
        const uint through_x = (placed && dxe) || slot == SLOT_IDENTITY ? dim : 0;
        const uint through_bias = placed && down_bias ? dim : 0;
        __global const STORAGE(X) *row = placed && dxe ? AT(dxe) + (ulong)slot * dim : dy;
        __global const STORAGE(W) *bias =
            through_bias ? AT(down_bias) + (ulong)AT(ids)[pair] * dim : 0;
        const float sum = group_dot(row, x, through_x, tmp);
        const float of_bias = group_dot_bias(dy, bias, through_bias, tmp);
        if (get_local_id(0) == 0)
            AT(dpair_weights)[pair] += sum + of_bias;
    }
}
