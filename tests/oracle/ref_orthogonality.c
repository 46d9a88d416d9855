/* Router orthogonality in double precision: see clmoe_router_orthogonality() in balance.h. */
#include "ref_balance.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

static double dot(const double *a, const double *b, size_t dim) {
    double sum = 0.0;
    for (size_t d = 0; d < dim; d++)
        sum += a[d] * b[d];
    return sum;
}

static double norm_of(const double *w, size_t dim) {
    const double norm = sqrt(dot(w, w, dim));
    return norm < (double)FLT_MIN ? 0.0 : norm;
}

static double cosine(const double *a, const double *b, size_t dim) {
    const double norms = norm_of(a, dim) * norm_of(b, dim);
    return norms == 0.0 ? 0.0 : dot(a, b, dim) / norms;
}

double ref_orthogonality(const double *router, size_t rows, size_t dim) {
    double sum = 0.0;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < i; j++) {
            const double c = cosine(router + i * dim, router + j * dim, dim);
            sum += 2.0 * c * c;
        }
    return sum;
}

/* d c_ij^2 / d w_i of one pair. */
static void add_pair(const double *w, const double *other, size_t dim, double *gradient) {
    const double c = cosine(w, other, dim), norm = norm_of(w, dim), length = norm_of(other, dim);
    if (c == 0.0)
        return;
    for (size_t d = 0; d < dim; d++)
        gradient[d] += 2.0 * c * (other[d] / (length * norm) - c * w[d] / (norm * norm));
}

void ref_orthogonality_gradient(const double *router, size_t rows, size_t dim, double *gradient) {
    for (size_t i = 0; i < rows * dim; i++)
        gradient[i] = 0.0;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < rows; j++)
            for (int both = 0; both < (i == j ? 0 : 2); both++) /* c_ij and c_ji */
                add_pair(router + i * dim, router + j * dim, dim, gradient + i * dim);
}
