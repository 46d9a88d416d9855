/*
 * Purpose: dropout of the activations between gate and up, and down.
 * Formula: h_j becomes h_j times the factor of dropout.clh.
 * Arrays: hidden [S,H] X in place, pair_of [S] i32 or NULL (row s itself); state. Rows of padding
 *          are left alone.
 * NDRange: one group per row; its work-items take four columns at a time.
 * Limits: GROUP a power of two; X is a storage type.
 * Repeatability: each factor follows from seed, step, row and column alone.
 */
#include "experts/dropout.clh"

KERNEL(GROUP, 1, 1)
void hidden_dropout(OUT(STORAGE(X), hidden), IN(int, pair_of), IN(uint, state), uint hidden_dim,
                    uint use, float p) {
    const ulong row = get_group_id(0);
    const int pair = pair_of ? AT(pair_of)[row] : (int)row;
    const uint columns = pair < 0 ? 0 : hidden_dim;
    hidden = AT(hidden) + row * hidden_dim;
    for (uint j = get_local_id(0) * 4; j < columns; j += GROUP * 4) {
        float factors[4];
        vstore4(dropout_factors(STATE_OF(state), (uint)pair, j / 4, use, p), 0, factors);
        UNROLL for (uint i = 0; i < 4; ++i)
            if (j + i < columns)
                STORE(X, LOAD(X, hidden + j + i) * factors[i], hidden + j + i);
    }
}
