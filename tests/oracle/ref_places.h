/* The oracle of what happens to places and weights after the choice; see ref.h. */
#ifndef REF_PLACES_H
#define REF_PLACES_H

#include "ref.h"

/* How many sequences with a capacity of their own the batch is: 1 without tokens_per_sequence. */
uint32_t ref_sequences(const clmoe_layer_desc *desc, uint32_t tokens);

/* ref_plan_make(), or with tokens_per_sequence one plan per sequence, put behind one another. */
void ref_plan_places(const clmoe_layer_desc *desc, const ref_plan_in *in, ref_plan *plan);

typedef struct ref_reroute_in {
    const float *scores; /* [T,E] */
    const int32_t *live; /* optional [T] */
    const uint8_t *token_mask;
    const int32_t *token_offsets;
    const ref_weights *weights; /* expert_scale */
    const double *exact;        /* optional [T,E]: scores that are not rounded, for the weights */
} ref_reroute_in;

/* Changes ids and pair_weights [pairs] and the plan of a layer with overflow reroute. */
typedef struct ref_rerouted {
    uint32_t rounds; /* in which somebody asked */
    uint32_t *in;    /* [E], the caller's */
    uint32_t *out;   /* [E], the caller's */
} ref_rerouted;

void ref_reroute(const clmoe_layer_desc *desc, uint32_t tokens, const ref_reroute_in *in,
                 int32_t *ids, double *pair_weights, ref_plan *plan, ref_rerouted *counts);

/* The best expert outside the token's ids with a finite score and room, -1: none. */
int32_t ref_roomy_expert(const clmoe_layer_desc *desc, const ref_reroute_in *in, size_t token,
                         const int32_t *ids, const uint32_t *kept, uint32_t capacity);

/*
 * Weight rebalancing of pair_weights [T,K] in place, `iterations` steps; live and token_mask are
 * optional.
 */
void ref_rebalance(const clmoe_layer_desc *desc, uint32_t tokens, uint32_t iterations,
                   const int32_t *ids, const int32_t *live, const uint8_t *token_mask,
                   double *pair_weights);

/* What it minimises, at `now`, of weights that were `before`. */
double ref_rebalance_objective(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *ids,
                               const int32_t *live, const uint8_t *token_mask, const double *before,
                               const double *now);

#endif
