/*
 * The oracle of everything random and of the controllers, in double precision, written from
 * balance.h and clmoe.h alone.
 */
#ifndef REF_RANDOM_H
#define REF_RANDOM_H

#include "ref.h"

#include <stdbool.h>

/* Philox4x32-10. */
void ref_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* The streams, as the fourth word of the counter. */
enum {
    REF_NOISE = 1,
    REF_LOGIT_DROPOUT,
    REF_EXPERT_DROPOUT,
    REF_KEEP,
    REF_JITTER,
    REF_HIDDEN,
    REF_SHARED_HIDDEN
};

/* The first two words for {token, column, state->step, use}. */
void ref_random_bits(const clmoe_state *state, uint32_t token, uint32_t column, uint32_t use,
                     uint32_t bits[2]);
double ref_uniform(uint32_t bits); /* in (0,1) */
double ref_normal(const uint32_t bits[2]);
double ref_gumbel(uint32_t bits);

/* masked [R]: the experts that expert dropout leaves out in this step. */
void ref_masked_experts(const clmoe_layer_desc *desc, const clmoe_state *state, bool *masked);

/* logits [T,R], raw [T,R] (x Wn^T, only read with learned noise) -> noisy [T,R]. */
void ref_noisy(const clmoe_layer_desc *desc, const clmoe_state *state, uint32_t tokens,
               const float *logits, const double *raw, double *noisy);

/* The factor of element d of token t's x. */
double ref_jitter(const clmoe_layer_desc *desc, const clmoe_state *state, uint32_t t, uint32_t d);

/* What dropout multiplies hidden value j of an MLP by; 1 without a state. */
double ref_dropout_factor(const clmoe_mlp_desc *desc, const ref_scale *scale, size_t j);

/* C_eff. */
uint32_t ref_effective_capacity(const clmoe_state *state, uint32_t capacity);

/* A state in double. */
typedef struct ref_state {
    uint32_t step, updates;
    double noise_scale, temperature_scale, loss_weight, capacity_scale;
    double *select_bias, *ema, *previous, *momentum; /* [R], the caller's */
    uint32_t *idle_tokens;                           /* [R] */
} ref_state;

/* One clmoe_balance_update(); args' buffers are not read. load [R]. */
void ref_balance_update(const clmoe_layer_desc *desc, const clmoe_balance_args *args,
                        const clmoe_stats *stats, const uint32_t *load, ref_state *state);

#endif
