/*
 * Purpose: Weights into the panels that cpu.cl reads fastest.
 * Formula: packed[e][panel][i][j] = column j of the panel at k = i: WIDTH columns of gate and the
 *          same of up, or ungated 2 * WIDTH columns. Zeros past the last column.
 * Arrays: gate, up as in gemm.clh, gate NULL if ungated -> packed [E, panels, k, 2 * WIDTH] W.
 * NDRange: (panels, E), one work-item per group.
 * Limits: W is the storage type.
 * Repeatability: a copy.
 */
#define PANEL (2 * WIDTH)
#define BLOCK 16 /* of k: its lines of W and of the panel stay in the first cache */

KERNEL(1, 1, 1)
void pack_panels(IN(STORAGE(W), gate), IN(STORAGE(W), up), ulong w_expert, ulong w_row, ulong w_col,
                 uint n, uint k, OUT(STORAGE(W), packed)) {
    const bool gated = gate != 0;
    const uint columns = gated ? WIDTH : PANEL;
    const uint first = (uint)get_group_id(0) * columns;
    const ulong expert = get_group_id(1);
    packed = AT(packed) + (expert * get_num_groups(0) + get_group_id(0)) * k * PANEL;
    gate = AT(gate) + expert * w_expert;
    up = AT(up) + expert * w_expert;
    for (uint begin = 0; begin < k; begin += BLOCK) {
        const uint end = min(begin + BLOCK, k);
        for (uint j = 0; j < PANEL; ++j) {
            const uint column = first + (j < columns ? j : j - columns);
            __global const STORAGE(W) *w = (gated && j < WIDTH ? gate : up) + column * w_row;
            for (uint i = begin; i < end; ++i)
                packed[(ulong)i * PANEL + j] = column < n ? w[i * w_col] : 0;
        }
    }
}
