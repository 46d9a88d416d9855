/*
 * Purpose: the gradient of a bias.
 * Formula: C_e[n] = sum over the slots s of expert e of w_s Q[s,n], or that added to C_e.
 * Arrays: as in gradient.clh, whose P, m and c_row are not used; pair_of [S] or NULL, pair_weights
 *          [pairs] or NULL (w = 1; with `gates` the sigmoid of it), token_mask [S] or NULL.
 * NDRange: (ceil(n / COLUMNS), E): a group per COLUMNS columns of an expert; DOWN work-items share
 *          its rows.
 * Limits: GROUP a power of two; Q and C are storage types.
 * Repeatability: a work-item adds every DOWN-th row of the expert, then they are added in order.
 */
#define P f32
#include "experts/gemm/gradient.clh"

/* Columns of a work-item: of one that is a group by itself, enough to read rows in long pieces. */
#define WIDTH   (GROUP == 1 ? 16 : 1)
#define ACROSS  (GROUP < 16 ? GROUP : 16)
#define COLUMNS (ACROSS * WIDTH)
#define DOWN    (GROUP / ACROSS)

KERNEL(GROUP, 1, 1)
void bias_gradient(GRADIENT_PARAMETERS, IN(int, pair_of), IN(float, pair_weights),
                   IN(uchar, token_mask), uint gates) {
    __local float sums[DOWN][COLUMNS];
    const gradient g = GRADIENT_PROBLEM;
    const uint expert = (uint)get_group_id(1), first = (uint)get_group_id(0) * COLUMNS;
    const uint across = (uint)get_local_id(0) % ACROSS, down = (uint)get_local_id(0) / ACROSS;
    const uint column = first + across * WIDTH;
    const uint2 in_use = slots_of(&g, expert);
    float sum[WIDTH];
    UNROLL for (uint i = 0; i < WIDTH; ++i)
        sum[i] = 0.0f;
    for (uint slot = in_use.x + down; slot < in_use.y; slot += DOWN) {
        const uint pair = pair_of ? (uint)AT(pair_of)[slot] : slot;
        const float given = pair_weights ? AT(pair_weights)[pair] : 1.0f;
        const float weight = gates ? SIGMOID(given) : given;
        if (token_mask && !AT(token_mask)[slot])
            continue;
        UNROLL for (uint i = 0; i < WIDTH; ++i)
            if (column + i < n)
                sum[i] += weight * LOAD(Q, row_of_q(&g, slot) + column + i);
    }
    UNROLL for (uint i = 0; i < WIDTH; ++i)
        sums[down][across * WIDTH + i] = sum[i];
    group_barrier(CLK_LOCAL_MEM_FENCE);
    for (uint i = get_local_id(0); i < COLUMNS && first + i < n; i += GROUP) {
        float total = 0.0f;
        for (uint other = 0; other < DOWN; other++)
            total += sums[other][i];
        gradient_store(&g, expert, 0, first + i, total);
    }
}
