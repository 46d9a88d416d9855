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
                            const float *bias, const uint8_t *token_mask, double *d) {
    const uint32_t E = desc->num_experts;
    for (uint32_t t = 0; t < tokens; t++) {
        const double *row = scores + (size_t)t * E;
        const double at = cutoff(desc, row, bias);
        const bool counted = isfinite(at) && (!token_mask || token_mask[t]);
        for (uint32_t e = 0; e < E; e++)
            d[(size_t)e * tokens + t] = counted ? at - row[e] - (double)bias[e] : (double)NAN;
    }
}

double ref_quantile_edge(uint32_t bin) {
    const int from_middle = (int)bin - CLMOE_BIAS_BINS / 2, i = abs(from_middle);
    const double distance = i > 0 ? pow(2, i / 25 - 18) * (1 + (i % 25) / 25.0) : 0;
    return from_middle < 0 ? -distance : distance;
}

/* Where K/E of the counts lie below. */
static double quantile(const uint32_t *counts, double share) {
    double n = 0.0, below = 0.0;
    uint32_t bin = 0;
    for (uint32_t i = 0; i < CLMOE_BIAS_BINS; i++)
        n += counts[i];
    const double rank = ceil(n * share - 1e-9);
    while (below + counts[bin] < rank)
        below += counts[bin++];
    const double low = ref_quantile_edge(bin), high = ref_quantile_edge(bin + 1);
    return low + (high - low) * (rank - below) / counts[bin];
}

void ref_quantile_bias(const clmoe_layer_desc *desc, const uint32_t *counts, const float *bias,
                       double *next) {
    const uint32_t E = desc->num_experts;
    double mean = 0.0;
    for (uint32_t e = 0; e < E; e++) {
        next[e] = (double)bias[e] +
                  quantile(counts + (size_t)e * CLMOE_BIAS_BINS, (double)desc->top_k / E);
        mean += next[e] / E;
    }
    for (uint32_t e = 0; e < E; e++)
        next[e] -= mean;
}
