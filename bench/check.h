/* Whether the outputs of a step are right, so that nothing wrong is timed. */
#ifndef BENCH_CHECK_H
#define BENCH_CHECK_H

#include "subject.h"

/* `wrong` is a sentence, or empty if all is right. */
typedef struct check_result {
    char wrong[256];
} check_result;

/* Runs `step` and checks what it wrote. */
clmoe_status check_step(subject *s, const reference *ref, bench_step step, check_result *result);

/* Checks what the last run of `step` wrote. */
clmoe_status check_outputs(const subject *s, const reference *ref, bench_step step,
                           check_result *result);

/* Rows of `got`, for which ||got - want|| / ||want|| must be within the tolerance. */
void check_row(const char *what, const float *got, const double *want, size_t n, double tolerance,
               check_result *result);

/* Tokens per expert [E] of the choices ids [pairs]; `touched` is how many have any. */
uint32_t count_load(const int32_t *ids, size_t pairs, uint32_t experts, uint32_t *load);

#endif
