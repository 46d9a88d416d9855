/* Cases of the engines' tests: what is computed, on which random data, and what should come out. */
#ifndef GEMM_CASE_H
#define GEMM_CASE_H

#include "experts/gemm/gemm.h" /* before support.h: cmocka has a macro fail() */

#include "support.h"

/* Which matrices: gate and up (n = H, k = D), or down (n = D, k = H). */
typedef struct storage {
    const char *name;
    clmoe_gate_layout layout;
    bool transposed, down;
} storage;

/* How rows are spread over the experts. */
typedef enum spread { SPREAD_RANDOM, SPREAD_ONE_EXPERT, SPREAD_NONE, SPREAD_DENSE } spread;

/* Whether and where the linear outputs are kept, of a shape in training. */
typedef enum z_kept { Z_NOT_KEPT, Z_BY_SLOT, Z_BY_PAIR } z_kept;

typedef struct gemm_case {
    const gemm_engine *engine;
    const storage *store;
    clmoe_type type; /* of A, W, biases and C; a router's bias is f32 */
    spread spread;
    uint32_t experts, rows, n, k; /* rows: of the fullest expert */
    clmoe_activation activation;
    float limit, alpha, up_shift;
    bool bias, gather, exact, packed;
    gemm_row_weight row_weight;
    bool training;
    z_kept z;
    bool accumulate;   /* down alone */
    bool for_gradient; /* down alone: the layer's matrices have the other order */
} gemm_case;

/* The host's side of a case. Arrays of slots as in clmoe_plan_layout. */
typedef struct gemm_data {
    uint32_t row_tile, slots, tokens, pairs;
    uint32_t *offsets, *kept;
    int32_t *tile_expert, *token_of, *pair_of;
    float *a, *pair_weights;
    float *c;                       /* before the run, where the case accumulates */
    float *matrices[2], *biases[2]; /* gate (or both) and up, or down in [1] */
} gemm_data;

typedef struct gemm_run {
    void *state;
    gemm_problem problem;
    clmoe_buf before; /* C, where the case accumulates */
} gemm_run;

/* Every layout of the weights, gated and plain, and down last. */
enum { GEMM_STORAGES = 10 };
extern const storage gemm_storages[GEMM_STORAGES];

bool gemm_runs_here(const gemm_engine *engine);

/* The engine is one for devices with NVIDIA's matrix instructions: no f32. */
bool gemm_is_nv(const gemm_engine *engine);

/* False of a router's problem where the engine is nv_wgmma, which is for MLPs alone. */
bool gemm_is_taken(const gemm_case *c);

/* Random data for a case, from the current seed. */
void gemm_make_data(const gemm_case *c, gemm_data *d);

/* The problem on the device, and the engine's state for it. */
void gemm_prepare(const gemm_case *c, const gemm_data *d, gemm_run *run);

/* Runs it; C as floats. z is poisoned before. */
float *gemm_run_on(const gemm_case *c, gemm_run *run, cl_command_queue queue);

/*
 * All of it: C against sums in double, and the padding. Nothing where the engine has no kernels for
 * the layer's shape.
 */
void gemm_check_case(const gemm_case *c, uint64_t seed);

#endif
