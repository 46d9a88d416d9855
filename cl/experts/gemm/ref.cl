/*
 * Purpose: The naive engine: the definition of a grouped GEMM, for any device.
 * Formula: C[s,j] = output(sum_k A[s,k] Wgate[e,j,k], sum_k A[s,k] Wup[e,j,k]); see gemm.clh.
 * Arrays: as in gemm.clh.
 * NDRange: (slots, ceil(n / GROUP) * GROUP): one work-item per element of C.
 * Limits: none.
 * Repeatability: one work-item sums over k in ascending order.
 */
#include "experts/gemm/act.clh"
#include "experts/gemm/gemm.clh"

static inline float dot_product(const problem *p, __global const STORAGE(A) *a,
                                __global const STORAGE(W) *w) {
    float sum = 0.0f;
    for (uint i = 0; i < p->k; ++i)
        sum = fma(LOAD(A, a + i), LOAD(W, w + i * p->w_col), sum);
    return sum;
}

KERNEL(1, GROUP, 1)
void gemm_ref(GEMM_PARAMETERS) {
    const problem p = GEMM_PROBLEM;
    const rows r = rows_in_use(&p, (uint)get_global_id(0), 1);
    const uint column = (uint)get_global_id(1);
    if (r.first >= r.end || column >= n)
        return;

    __global const STORAGE(A) *row = row_of_a(&p, r.first);
    float gate_sum = 0.0f;
#if GATED
    gate_sum = dot_product(&p, row, weight_at(&p, p.gate, r.expert, column));
#endif
    const float up_sum = dot_product(&p, row, weight_at(&p, p.up, r.expert, column));
    gemm_store(&p, r.expert, r.first, column, gate_sum, up_sum);
}
