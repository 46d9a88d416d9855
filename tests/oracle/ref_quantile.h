/* The oracle of the quantile rule, in double precision, written from balance.h alone. */
#ifndef REF_QUANTILE_H
#define REF_QUANTILE_H

#include "ref.h"

/*
 * scores [T,E], -infinity where there is none, bias [E] -> d [E,T], NaN where the token is not
 * counted. token_mask [T] may be NULL.
 */
void ref_quantile_distances(const clmoe_layer_desc *desc, uint32_t tokens, const double *scores,
                            const float *bias, const uint8_t *token_mask, double *d);

/* Where a bin begins, and the one before ends; bin CLMOE_BIAS_BINS too. */
double ref_quantile_edge(uint32_t bin);

/* counts [E,CLMOE_BIAS_BINS] by `bias` [E] -> the new bias [E]. */
void ref_quantile_bias(const clmoe_layer_desc *desc, const uint32_t *counts, const float *bias,
                       double *next);

#endif
