/*
 * Purpose: Gradients of weights of experts without slots: zeros.
 * Formula: C_e = 0 where kept_e = 0.
 * Arrays: kept [E] u32 or NULL: one expert of `slots` -> C_e[m,n] at element e * c_expert +
 *         m * c_row + n.
 * NDRange: (rows in parts, E) groups of 256: a group has every get_num_groups(0)-th row.
 * Limits: none.
 * Repeatability: zeros.
 */
#define GROUP_ITEMS 256

KERNEL(GROUP_ITEMS, 1, 1)
void nv_wgmma_empty(IN(uint, kept), uint slots, uint m, uint n, OUT(STORAGE(C), c),
                       ulong c_expert, ulong c_row) {
    const uint expert = (uint)get_group_id(1);
    if ((kept ? AT(kept)[expert] : slots) > 0)
        return;
    for (uint row = (uint)get_group_id(0); row < m; row += (uint)get_num_groups(0))
        for (uint column = (uint)get_local_id(0); column < n; column += GROUP_ITEMS)
            STORE(C, 0.0f, AT(c) + expert * c_expert + row * c_row + column);
}
