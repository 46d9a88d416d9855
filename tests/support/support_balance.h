/* Batches for statistics and losses: host arrays, their device buffers, and the worst errors. */
#ifndef SUPPORT_BALANCE_H
#define SUPPORT_BALANCE_H

#include "ref_balance.h"
#include "support.h"

/* What a batch has besides its logits. */
typedef struct balance_options {
    pattern kind;
    bool mask, state, target, supplied;
    bool external; /* ids alone: no logits, no live */
    bool offsets;  /* token_offsets, with 0 to K pairs a token, instead of live */
    double spread; /* of the logits; 0: 1 */
    bool positive; /* logits above 0 */
} balance_options;

typedef struct balance_batch {
    clmoe_layer_desc desc;
    uint32_t tokens;
    ref_balance_in in;        /* its arrays are the host's */
    float *logits;            /* [T,R] */
    const float *select_bias; /* [R] or NULL */
    clmoe_layer *layer;
    clmoe_weights weights;
    clmoe_plan_layout layout;
    struct {
        clmoe_buf x, logits, ids, pair_weights, live, token_mask, token_offsets, state;
        clmoe_buf load_target, load_supplied, plan, scratch;
    } dev;
} balance_batch;

/* Random arrays: logits, the choice they lead to, and what the options ask for. */
void balance_make(balance_batch *b, const clmoe_layer_desc *desc, uint32_t tokens,
                  const balance_options *options);
/* Puts other logits in their place; the choice stays. */
void balance_set_logits(balance_batch *b, float *logits);
/* Makes the choice anew: ids, weights and live by the oracle's router, from the noisy logits. */
void balance_choose(balance_batch *b);
/* Makes the layer, the buffers and the plan, and reads the plan's counts. */
void balance_upload(balance_batch *b, uint32_t group_size);

/* clmoe_stats_compute() of an uploaded batch: the buffer. */
clmoe_buf balance_stats(balance_batch *b);
/* Compares it with the oracle's statistics. */
void balance_compare_stats(const balance_batch *b, clmoe_buf got);

/* A state with random arrays, its scales 1: sizeof(clmoe_state) + 20 R bytes. */
clmoe_state *random_state_of(const clmoe_layer_desc *desc);

#define STATS_TOLERANCE 1e-5

/* Remembers the largest error of `name`; a table is printed when the program ends. */
void worst_note(const char *name, double error);

#endif
