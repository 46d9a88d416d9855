/* Errors: a status, a sentence per thread, and the one macro that leaves a function. */
#ifndef CLMOE_STATUS_H
#define CLMOE_STATUS_H

#include "clmoe/clmoe.h"

/*
 * Leaves for the function's one cleanup label. The function declares `clmoe_status status =
 * CLMOE_SUCCESS;` and ends with `done:`, releases (all NULL-safe), `return status;`.
 */
#define TRY(expr)                                                                                  \
    do {                                                                                           \
        status = (expr);                                                                           \
        if (status != CLMOE_SUCCESS)                                                               \
            goto done;                                                                             \
    } while (0)

/* Wraps an OpenCL call that returns its code: TRY(CL(clSetKernelArg(...))). */
#define CL(call) clmoe_cl_check((call), #call)

#if defined(__GNUC__)
#define CLMOE_PRINTF(format_index) __attribute__((format(printf, format_index, format_index + 1)))
#else
#define CLMOE_PRINTF(format_index)
#endif

/*
 * Stores the sentence for clmoe_last_error() and returns `status`: return fail(...). Names from
 * files may be in it as they are: the sentence is made printable.
 */
clmoe_status fail(clmoe_status status, const char *format, ...) CLMOE_PRINTF(2);

/*
 * The calling thread's sentence, put back after a try whose failure is no failure of the call: what
 * clmoe_last_error() gives is always about a call that failed.
 */
typedef struct error_sentence {
    char text[512];
} error_sentence;
error_sentence error_keep(void);
void error_put_back(const error_sentence *kept);

/* CL_SUCCESS passes; else the sentence "clFoo failed: CL_NAME". `call` may be a whole call's text.
 */
clmoe_status clmoe_cl_check(cl_int code, const char *call);

/* Size arithmetic that cannot wrap: false when the result does not fit. */
int size_mul(size_t a, size_t b, size_t *product);
int size_add(size_t a, size_t b, size_t *sum);

#endif
