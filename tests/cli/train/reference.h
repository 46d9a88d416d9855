/*
 * The model of `clmoe train` in double precision, from its description in docs/laboratory.md: a
 * sum of tables over the last n bytes, blocks x + MoE(norm(x)), norm, head. Choices are made here.
 */
#ifndef TEST_TRAIN_REFERENCE_H
#define TEST_TRAIN_REFERENCE_H

#include <stdint.h>

enum {
    REF_CONTEXT = 3,
    REF_LAYERS = 2,
    REF_DIM = 16,
    REF_HIDDEN = 8,
    REF_EXPERTS = 4,
    REF_TOP_K = 2
};

/* Matrices, the last dimension contiguous. */
typedef struct ref_model {
    double *table;                /* [n,256,D] */
    double *gain[REF_LAYERS + 1]; /* [D] */
    double *router[REF_LAYERS];   /* [E,D] */
    double *gate_up[REF_LAYERS];  /* [E,2H,D] */
    double *down[REF_LAYERS];     /* [E,D,H] */
    double *head;                 /* [256,D] */
} ref_model;

/* What a batch did: shares of the experts, F, and mean scores, P. */
typedef struct ref_balance {
    double share[REF_LAYERS][REF_EXPERTS], score[REF_LAYERS][REF_EXPERTS];
} ref_balance;

/* Mean -log p of the byte behind each position. */
double ref_loss(const ref_model *m, const unsigned char *text, const uint32_t *positions,
                uint32_t tokens, ref_balance *balance);

#endif
