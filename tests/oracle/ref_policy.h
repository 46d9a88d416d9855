/* The oracle's policies of choice beside plain token choice; see ref.h. */
#ifndef REF_POLICY_H
#define REF_POLICY_H

#include "ref.h"

/*
 * logits -> scores, ids, pair_weights, live or token_offsets, and choice_gap of a result whose
 * logits are there and whose other arrays are allocated. False: plain token choice, nothing done.
 */
bool ref_policy_route(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *r);

/*
 * scores [T,R] -> the tokens each expert takes: token_offsets [T+1], ids [pairs], -1 past the last,
 * weights [pairs]. Returns the smallest relative distance between the last token an expert takes
 * and the first it does not.
 */
double ref_expert_choice(const clmoe_layer_desc *desc, uint32_t tokens, const double *scores,
                         const uint8_t *token_mask, const ref_weights *weights,
                         int32_t *token_offsets, int32_t *ids, double *pair_weights);

/* A choice that is rounded: that of ref_topk(). */
typedef struct ref_rounding_in {
    uint32_t tokens;
    const double *scores;      /* [T,R] */
    const int32_t *ids, *live; /* [T,K], [T] */
    const double *top_weights; /* [T,K] */
    const uint8_t *token_mask; /* optional [T] */
    const ref_weights *weights;
} ref_rounding_in;

/*
 * A choice -> the pairs after rounding to capacity.multiple: token_offsets [T+1], ids [pairs], -1
 * past the last, weights [pairs]. Returns the smallest relative distance between the last token
 * that an expert keeps or adds and the first it does not.
 */
double ref_token_rounding(const clmoe_layer_desc *desc, const ref_rounding_in *in,
                          int32_t *token_offsets, int32_t *ids, double *pair_weights);

/*
 * l [T,R], -infinity where not finite -> what Sinkhorn chooses by, [T,R]. *margin, if asked for:
 * the smallest relative distance of a change of d1 from the tolerance.
 */
void ref_sinkhorn(const clmoe_layer_desc *desc, uint32_t tokens, const double *l,
                  const uint8_t *token_mask, double *choices, double *margin);

/* The same l and s(l) -> ids, weights and live. Returns the gap of the choices. */
double ref_sinkhorn_topk(const clmoe_layer_desc *desc, uint32_t tokens, const double *l,
                         const double *scores, const uint8_t *token_mask,
                         const ref_weights *weights, int32_t *ids, double *pair_weights,
                         int32_t *live);

/* l [T,R] and group logits [T,groups] -> scores of two levels. */
void ref_two_level_scores(const clmoe_layer_desc *desc, uint32_t tokens, const double *l,
                          const double *group_logits, double *scores);

/* x -> the mean of the slots' outputs of every token, [T,D]; 0 where a token takes no part. */
void ref_soft_moe(const clmoe_layer_desc *desc, const ref_forward_in *in, double *mixed);

#endif
