#include "ref_quantile.h"

#include <math.h>
#include <stdlib.h>

static int descending(const void *a, const void *b) {
    const double left = *(const double *)a, right = *(const double *)b;
    return (left < right) - (left > right);
}

/* The (K+1)-th largest of s + b; -infinity where there is none. */
static double cutoff(const clmoe_layer_desc *desc, const double *row, const float *bias) {
    double sorted[4096];
    for (uint32_t e = 0; e < desc->num_experts; e++)
        sorted[e] = row[e] + (double)bias[e];
    qsort(sorted, desc->num_experts, sizeof *sorted, descending);
    return sorted[desc->top_k];
}

void ref_quantile_distances(const clmoe_layer_desc *desc, uint32_t tokens, const double *scores,
                            const float *bias, const uint8_t *token_mask, double *r) {
    const uint32_t E = desc->num_experts;
    for (uint32_t t = 0; t < tokens; t++) {
        const double *row = scores + (size_t)t * E;
        const double at = cutoff(desc, row, bias);
        const bool counted = isfinite(at) && (!token_mask || token_mask[t]);
        for (uint32_t e = 0; e < E; e++)
            r[(size_t)e * tokens + t] = counted ? at - row[e] : (double)NAN;
    }
}

void ref_quantile_bins(const clmoe_layer_desc *desc, const float *bias, double *low,
                       double *width) {
    double least = INFINITY, most = -(double)INFINITY;
    for (uint32_t e = 0; e < desc->num_experts; e++) {
        least = fmin(least, (double)bias[e]);
        most = fmax(most, (double)bias[e]);
    }
    *low = least - 1.0;
    *width = (most - least + 2.0) / CLMOE_BIAS_BINS;
}

/* Where K/E of the counts lie below. */
static double quantile(const uint32_t *counts, double share, double low, double width) {
    double n = 0.0, below = 0.0;
    uint32_t bin = 0;
    for (uint32_t i = 0; i < CLMOE_BIAS_BINS; i++)
        n += counts[i];
    const double rank = ceil(n * share - 1e-9);
    while (below + counts[bin] < rank)
        below += counts[bin++];
    return low + width * (bin + (rank - below) / counts[bin]);
}

void ref_quantile_bias(const clmoe_layer_desc *desc, const uint32_t *counts, const float *bias,
                       double *next) {
    const uint32_t E = desc->num_experts;
    double low, width, mean = 0.0;
    ref_quantile_bins(desc, bias, &low, &width);
    for (uint32_t e = 0; e < E; e++) {
        next[e] =
            quantile(counts + (size_t)e * CLMOE_BIAS_BINS, (double)desc->top_k / E, low, width);
        mean += next[e] / E;
    }
    for (uint32_t e = 0; e < E; e++)
        next[e] -= mean;
}
