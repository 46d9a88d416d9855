/* Cases of the tests of weight gradients: which operands, on which random rows, and what should
 * come out. */
#ifndef GRADIENT_CASE_H
#define GRADIENT_CASE_H

#include "gemm_case.h"

typedef struct gradient_case {
    const gemm_engine *engine;
    gemm_gradient_shape types;
    spread spread;
    uint32_t experts, rows, m, n; /* rows: of the fullest expert */
    uint32_t row_tile;            /* buckets begin at multiples of it */
    bool gather_p, gather_q;
    bool parts; /* rows of P, Q and C are parts of wider ones */
    bool accumulate, exact;
} gradient_case;

/* The host's side of a case. Arrays of slots as in clmoe_plan_layout. */
typedef struct gradient_data {
    uint32_t slots, tokens;
    uint32_t *offsets, *kept;
    int32_t *token_of;
    uint32_t p_row, q_row, c_row; /* elements between rows */
    size_t c_expert, c_elements;
    float *p, *q, *c; /* c: before the run */
} gradient_data;

typedef struct gradient_run {
    void *state;
    gemm_gradient problem;
    clmoe_buf before; /* C as it was */
    size_t elements;  /* of C */
} gradient_run;

/* Random data for a case, from the current seed: what no product may read is NaN. */
void gradient_make_data(const gradient_case *c, gradient_data *d);

/* Whether the engine has kernels for the types; ref, cpu and tiled have them for all. */
bool gradient_takes(const gemm_engine *engine, const gemm_gradient_shape *types);

/* The problem on the device, and the engine's state for it. */
void gradient_prepare(const gradient_case *c, const gradient_data *d, gradient_run *run);

/* Runs it; all of C, as stored. */
void *gradient_run_on(const gradient_case *c, gradient_run *run, cl_command_queue queue);

/* All of it: C against sums in double, and what lies between its rows. */
void gradient_check_case(const gradient_case *c, uint64_t seed);

#endif
