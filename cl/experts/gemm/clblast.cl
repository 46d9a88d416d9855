/*
 * Purpose: What a GEMM of a library leaves to do: bias, row weight and activation.
 * Formula: C[s,j] = output(sums of gate and up); see gemm.clh. Ungated, C may hold the sums.
 * Arrays: as in gemm.clh, but A holds the sums over k, [slots,k], and no weights are given: k is n;
 *          gated 2n: gate's columns, then up's, or, if w_row is 2, taking turns.
 * NDRange: (slots, ceil(n / GROUP) * GROUP): one work-item per element of C.
 * Limits: none.
 * Repeatability: nothing is summed.
 */
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"

KERNEL(1, GROUP, 1)
void act_rows(GEMM_PARAMETERS) {
    const problem p = GEMM_PROBLEM;
    const rows r = rows_in_use(&p, (uint)get_global_id(0), 1);
    const uint column = (uint)get_global_id(1);
    if (r.first >= r.end || column >= n)
        return;

    __global const STORAGE(A) *sums = row_of_a(&p, r.first) + column * p.w_row;
    float gate_sum = 0.0f, up_sum = LOAD(A, sums);
#if GATED
    gate_sum = up_sum;
    up_sum = LOAD(A, sums + (p.w_row == 2 ? 1 : n));
#endif
    gemm_store(&p, r.expert, r.first, column, gate_sum, up_sum);
}
