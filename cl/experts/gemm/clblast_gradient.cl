/*
 * Purpose: What the gradients of weights by a library leave to do: those of experts without rows.
 * Formula: C_e[m,n] = 0 where expert e has no slots.
 * Arrays: as in gradient.clh; P and Q are not read.
 * NDRange: (m, ceil(n / GROUP) * GROUP, E): one work-item per element of C.
 * Limits: none.
 * Repeatability: nothing is summed.
 */
#include "experts/gemm/gradient.clh"

KERNEL(1, GROUP, 1)
void gradient_zeros(GRADIENT_PARAMETERS) {
    const gradient g = GRADIENT_PROBLEM;
    const uint expert = (uint)get_global_id(2), column = (uint)get_global_id(1);
    const uint2 slots_in_use = slots_of(&g, expert);
    if (column < n && slots_in_use.x == slots_in_use.y)
        gradient_store(&g, expert, (uint)get_global_id(0), column, 0.0f);
}
