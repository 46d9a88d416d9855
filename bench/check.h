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
clmoe_status check_outputs(subject *s, const reference *ref, bench_step step, check_result *result);

/* Parts of check_outputs(): a policy's results, and the steps of the layer as it is trained. */
clmoe_status check_policy(const bench_policy *p, check_result *result);
clmoe_status check_train(const bench_train *t, const reference *ref, bench_step step,
                         check_result *result);

clmoe_status check_counts(const bench_counts *c, check_result *result);

clmoe_status check_backward(subject *s, const reference *ref, bench_step step,
                            check_result *result);

/* Rows of gate and up and the column of down of sample i, each [dim]; `what` begins the sentence.
 */
void check_sample(const char *what, size_t dim, const gradient_samples *samples, uint32_t i,
                  const float *const rows[3], double tolerance, check_result *result);

/* What measured the balance of a batch, and what came of it. */
typedef struct measured {
    const bench_device *device;
    const bench_case *of;
    clmoe_layer_desc desc;
    cl_mem logits, ids, weights; /* [T,E], [T,K], [T,K] */
    cl_mem state;                /* optional */
    size_t state_bytes;
    cl_mem stats;
    size_t stats_bytes;
    cl_mem values, dlogits; /* of train_losses(): [losses], [T,E]; optional */
} measured;

/* Statistics, values and gradient by the oracle. */
clmoe_status check_balance(const measured *m, check_result *result);

/* Keeps the first complaint. */
void complain(check_result *result, const char *format, ...) CLI_PRINTF(2);

/* f16 or bf16 to floats. */
void check_widen(clmoe_type type, const uint16_t *halves, size_t n, float *to);

/* Row `row` of [.., n] elements of `type`, as floats. */
clmoe_status check_read_row(const bench_device *device, clmoe_type type, cl_mem buffer, size_t row,
                            size_t n, float *to);

/* Rows of `got`, for which ||got - want|| / ||want|| must be within the tolerance. */
void check_row(const char *what, const float *got, const double *want, size_t n, double tolerance,
               check_result *result);

/* Arrays of words, which must be the same. */
void check_words(const char *what, const void *got, const void *want, size_t n,
                 check_result *result);

/* Tokens per expert [E] of the choices ids [pairs]; `touched` is how many have any. */
uint32_t count_load(const int32_t *ids, size_t pairs, uint32_t experts, uint32_t *load);

/* Pairs by expert in the order of tokens: pair_of [pairs], load and offset [E], of ids [T,K]. */
void sort_pairs(const int32_t *ids, const bench_case *c, uint32_t *load, uint32_t *offset,
                uint32_t *pair_of);

/* Outputs of the experts [pairs,D], in the order of pair_of. */
void check_pairs(const char *what, const bench_case *c, const reference *ref,
                 const uint32_t *pair_of, const float *out, check_result *result);

#endif
