/*
 * Purpose: The partial sums of a gradient of weights, as an engine made them of slices of the
 *          slots, become the gradient.
 * Formula: C[m,n] = (slice 0 + slice 1) + ..., or that added to C.
 * Arrays: partials [slices,m,n] of gradient_slice(slots) slots each -> C, rows of c_row elements.
 * NDRange: (m, ceil(n / GROUP) * GROUP): one work-item per element of C.
 * Limits: none.
 * Repeatability: one work-item adds the slices in ascending order.
 */
#include "experts/gemm/slices.clh"

KERNEL(1, GROUP, 1)
void add_slices(IN(float, partials), uint slots, uint m, uint n, OUT(STORAGE(C), c), ulong c_row,
                uint accumulate) {
    const uint row = (uint)get_global_id(0), column = (uint)get_global_id(1);
    const uint slices = divide_up(slots, gradient_slice(slots));
    __global STORAGE(C) *const to = AT(c) + row * c_row + column;
    float sum = 0.0f;
    if (column >= n)
        return;
    for (uint slice = 0; slice < slices; ++slice)
        sum += AT(partials)[((ulong)slice * m + row) * n + column];
    STORE(C, accumulate ? LOAD(C, to) + sum : sum, to);
}
