/* How far what came out is from what should. */
#include "trial.h"

#include <math.h>
#include <string.h>

/* Of an element: so many times what the norm may be off. */
enum { WORST = 32 };

/* Below this, the size of values is noise: as of gradients that are 0. */
#define LEAST_SIZE 1e-4

/* Relative norm allowed; choices are exact, arithmetic is f32, and rows are stored as `type`. */
static double tolerance(const trial *t, trial_array array) {
    static const double of_type[] = {[CLMOE_F32] = 2e-5, [CLMOE_F16] = 2e-3, [CLMOE_BF16] = 1.6e-2};
    if (t->types[array] == TRIAL_I32 || t->types[array] == TRIAL_U32)
        return 0;
    if (array == TRIAL_WEIGHTS)
        return of_type[CLMOE_F32];
    return of_type[t->desc.type] * (array > TRIAL_Y ? 2 : 1);
}

/* Errors of one array. */
typedef struct errors {
    double norm, worst;
    size_t at;
} errors;

/* Without those that may be anything. */
static double mean_size(const double *want, size_t count) {
    double sum = 0, used = 0;
    for (size_t i = 0; i < count; i++)
        if (!isnan(want[i])) {
            sum += fabs(want[i]);
            used++;
        }
    return fmax(used > 0 ? sum / used : 0, LEAST_SIZE);
}

static errors find_errors(const double *got, const double *want, size_t count) {
    const double mean = mean_size(want, count);
    double off = 0, size = 0, used = 0;
    errors e = {0};
    for (size_t i = 0; i < count; i++) {
        if (isnan(want[i]))
            continue;
        const double apart = isnan(got[i]) ? INFINITY : fabs(got[i] - want[i]);
        off += apart * apart;
        size += want[i] * want[i];
        used++;
        if (apart / (fabs(want[i]) + mean) > e.worst) {
            e.worst = apart / (fabs(want[i]) + mean);
            e.at = i;
        }
    }
    e.norm = sqrt(off / fmax(size, used * LEAST_SIZE * LEAST_SIZE + 1e-300));
    return e;
}

/* Of what is allowed; an error where nothing is allowed is infinite. */
static double share(double error, double allowed) {
    return error == 0 ? 0 : error / allowed;
}

static double verdict_share(const trial_verdict *v) {
    return fmax(share(v->norm, v->norm_tolerance), share(v->worst, v->worst_tolerance));
}

bool trial_differs(const trial_verdict *verdict) {
    return verdict_share(verdict) > 1;
}

/* Of those that differ the first array, for the others follow from it. */
static void keep_worse(const trial_verdict *v, trial_verdict *worst) {
    const bool differ = trial_differs(v) && trial_differs(worst);
    if (!worst->compared || (differ && v->array < worst->array) ||
        (!differ && verdict_share(v) > verdict_share(worst)))
        *worst = *v;
}

void trial_compare(const trial *t, const char *against, const trial_values *got,
                   const trial_values *want, trial_verdict *worst) {
    for (int i = TRIAL_GIVEN; i < TRIAL_ARRAYS; i++) {
        if (!got->of[i])
            continue;
        const errors e = find_errors(got->of[i], want->of[i], t->counts[i]);
        const double allowed = tolerance(t, (trial_array)i);
        const trial_verdict v = {.compared = true,
                                 .array = (trial_array)i,
                                 .against = against,
                                 .norm = e.norm,
                                 .norm_tolerance = allowed,
                                 .worst = e.worst,
                                 .worst_tolerance = WORST * allowed,
                                 .at = e.at,
                                 .got = got->of[i][e.at],
                                 .want = want->of[i][e.at]};
        keep_worse(&v, worst);
    }
}

void trial_compare_bits(const trial *t, const trial_values *got, const trial_values *want,
                        trial_verdict *worst) {
    for (int i = TRIAL_GIVEN; i < TRIAL_ARRAYS; i++) {
        for (size_t at = 0; at < t->counts[i]; at++) {
            const double *a = &got->of[i][at], *b = &want->of[i][at];
            if (memcmp(a, b, sizeof *a) == 0)
                continue;
            const errors e = find_errors(a, b, 1);
            const trial_verdict v = {.compared = true,
                                     .array = (trial_array)i,
                                     .against = "repeat",
                                     .norm = fmax(e.norm, 1e-300), /* also of a sign or NaN */
                                     .worst = e.worst,
                                     .at = at,
                                     .got = *a,
                                     .want = *b};
            keep_worse(&v, worst);
            break;
        }
    }
}
