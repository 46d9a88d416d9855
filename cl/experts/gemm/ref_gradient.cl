/*
 * Purpose: The naive gradient of weights: its definition, for any device.
 * Formula: C_e[m,n] = sum over the slots s of expert e of P[s,m] Q[s,n], or that added to C_e.
 * Arrays: as in gradient.clh.
 * NDRange: (m, ceil(n / GROUP) * GROUP, E): one work-item per element of C.
 * Limits: none.
 * Repeatability: one work-item sums over the slots in ascending order.
 */
#include "experts/gemm/gradient.clh"

KERNEL(1, GROUP, 1)
void gradient_ref(GRADIENT_PARAMETERS) {
    const gradient g = GRADIENT_PROBLEM;
    const uint row = (uint)get_global_id(0), column = (uint)get_global_id(1);
    const uint expert = (uint)get_global_id(2);
    const uint2 slots_in_use = slots_of(&g, expert);
    float sum = 0.0f;
    if (column >= n)
        return;
    for (uint slot = slots_in_use.x; slot < slots_in_use.y; ++slot)
        sum = fma(LOAD(P, row_of_p(&g, slot) + row), LOAD(Q, row_of_q(&g, slot) + column), sum);
    gradient_store(&g, expert, row, column, sum);
}
