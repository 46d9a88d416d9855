/* From a logit to its score, each function beside its derivative. */
#include "ref.h"

#include <math.h>

double ref_sigmoid(double v) {
    return 1.0 / (1.0 + exp(-v));
}

double ref_softplus(double v) {
    return v > 0.0 ? v + log1p(exp(-v)) : log1p(exp(v));
}

double ref_score(clmoe_score_function score, double l, double *slope) {
    double s = l;
    *slope = 1.0;
    switch (score) {
    case CLMOE_SCORE_SIGMOID:
        s = ref_sigmoid(l);
        *slope = s * (1.0 - s);
        break;
    case CLMOE_SCORE_SQRT_SOFTPLUS:
        s = sqrt(ref_softplus(l));
        *slope = ref_sigmoid(l) / (2.0 * s);
        break;
    case CLMOE_SCORE_SOFTMAX:
    case CLMOE_SCORE_SPARSEMIXER: /* which has no other probabilities */
        *slope = s = exp(l);
        break;
    case CLMOE_SCORE_IDENTITY:
        break;
    }
    return s;
}
