/*
 * What the gradients of some experts' weights must be: of a few hidden units, by the oracle, in
 * double precision. A unit's rows of gate and up and its column of down need nothing of the others.
 */
#ifndef BENCH_SAMPLES_H
#define BENCH_SAMPLES_H

#include "inputs.h"

/* The expert of the first pair, the one with most pairs, and the one with fewest, which may be 0.
 */
enum { GRADIENT_SAMPLES = 3 };

typedef struct gradient_samples {
    bool made;
    uint32_t expert[GRADIENT_SAMPLES], unit[GRADIENT_SAMPLES];
    /* What may be lost besides: f16 has no weighted rows of dy that are smaller than 2^-24. */
    double blur[GRADIENT_SAMPLES];
    double *gate_up; /* [samples,2,D] */
    double *down;    /* [samples,D] */
} gradient_samples;

/* From the choice ids [T,K] and its weights [T,K]. Start from {0}. */
clmoe_status gradient_samples_make(const inputs *in, const int32_t *ids, const float *weights,
                                   gradient_samples *samples);
void gradient_samples_free(gradient_samples *samples);

#endif
