/*
 * What a case must give, for a few of its tokens: by the oracle of the tests, in double precision.
 * Computed once per case, however many engines.
 */
#ifndef BENCH_REFERENCE_H
#define BENCH_REFERENCE_H

#include "inputs.h"

typedef struct reference {
    uint32_t count;  /* N tokens looked at */
    uint32_t *token; /* [N] */
    double *logits;  /* [N,E] */
    double *scores;  /* [N,E] */
    int32_t *ids;    /* [N,K], best first */
    double *weights; /* [N,K] */
    double *experts; /* [N,K,D]: outputs of the chosen; NULL with routing_only */
    double *y;       /* [N,D]; NULL with routing_only */
    /* Of reference_backward(), else NULL: */
    double *experts_dx; /* [N,D]: dx without what comes through the router */
    double *dx;         /* [N,D] */
    double *dlogits;    /* [N,E] */
    /* [N]: the size of w dw, as it is or would be on average, over |dlogits|: they are small sums
     */
    double *dlogits_blur;
    double tolerance; /* of ||got - want|| / ||want|| */
} reference;

/* Looks at tokens whose choice rounding cannot change. */
clmoe_status reference_make(const inputs *in, reference *ref);

/* Adds the gradients of sum(dy * y), once; nothing with routing_only. */
clmoe_status reference_backward(const inputs *in, reference *ref);

void reference_free(reference *ref);

#endif
