/* What the files of the layer on the host share. */
#ifndef CLMOE_SELFTEST_HOST_H
#define CLMOE_SELFTEST_HOST_H

#include "trial.h"

enum { HOST_BLOCKS = 24 };

/* Room for one forward pass. */
typedef struct host_room {
    double *clean;     /* [T,E], as given or x Wr^T + bias */
    double *deviation; /* [T,E], of the noise */
    double *noisy;     /* [T,E], with it; -infinity: not finite, or masked */
    double *logits;    /* [T,E], by the temperature; of Soft MoE [T,N] */
    double *keys;      /* [T,E], what the choice is by */
    double *row;       /* [max(E, N, T, D) * 2] */
    double *hidden;    /* [max(H, H')] */
    double *expert;    /* [D], of one expert */
    double *sums;      /* [T + E], Sinkhorn's */
    double *mixed;     /* [N,D] and [N,D], of Soft MoE */
    /* What differences hold fixed. */
    double *chosen;      /* [pairs], ids before they are rerouted */
    double *placed;      /* [pairs], 1: it has a row */
    double *weight_sums; /* [E], of the pairs that chose it */
    double *threshold;   /* [T,E], of smooth load */
    double *slopes;      /* [losses,E], g */
    void *blocks[HOST_BLOCKS];
    size_t num_blocks;
    bool is_short; /* of memory */
} host_room;

bool host_masked(const trial *t, size_t token);
double host_dot(const double *a, const double *b, size_t n);
double host_sigmoid(double v);
/* softmax of `count` values that are `stride` apart; -infinity has no part. */
void host_softmax(double *values, size_t count, size_t stride);
/* s(l) of a row. */
void host_score(const trial *t, const double *logits, double *scores, size_t count);
/* The k largest of n keys, ties to the lower index; NaN for those that are -infinity. */
void host_best(double *keys, size_t n, size_t k, double *ids);
/* Where the pairs of a token begin. */
size_t host_pairs_begin(const trial *t, const trial_values *out, size_t token);
/* The weights of all pairs. */
void host_weigh(const trial *t, const host_room *room, trial_values *out);

/* ---- host_router.c --------------------------------------------------------------------------- */

/* The four words of the counter {token, column, step, use} with the state's key. */
void host_random(size_t token, size_t column, uint32_t use, uint32_t words[4]);
/* clean, deviation, noisy and logits. */
void host_logits(const trial *t, const host_room *room);
/* Each expert a multiple of tokens: keys [T,E], 1 where a token has it, from K choices by keys. */
void host_round(const trial *t, const host_room *room);
/* C as the state has it; 0 when dropless. */
double host_capacity(const trial *t);
/* placed; with overflow reroute, ids and weights move. */
void host_place(const trial *t, const host_room *room, trial_values *out);

/* ---- host_balance.c -------------------------------------------------------------------------- */

/* Statistics, losses, counts and the state after the update; and what the losses hold fixed. */
void host_balance(const trial *t, const host_room *room, trial_values *out);
/* The sum of the losses as differences need it, times their weights. */
double host_loss(const trial *t, const host_room *room);

#endif
