/* Errors of the tool and the bench: a status, a sentence, and the macro that leaves a function. */
#ifndef CLMOE_CLI_ERROR_H
#define CLMOE_CLI_ERROR_H

#include "problem.h"

#include "clmoe/clmoe.h"

/* Leaves for the function's label `done:`; it has a `clmoe_status status`. */
#define TRY(expr)                                                                                  \
    do {                                                                                           \
        status = (expr);                                                                           \
        if (status != CLMOE_SUCCESS)                                                               \
            goto done;                                                                             \
    } while (0)

#if defined(__GNUC__)
#define CLI_PRINTF(format_index) __attribute__((format(printf, format_index, format_index + 1)))
#else
#define CLI_PRINTF(format_index)
#endif

/* Keeps the sentence, made printable, for cli_error() and returns `status`. */
clmoe_status cli_fail(clmoe_status status, const char *format, ...) CLI_PRINTF(2);

/* The sentence about an OpenCL call that failed; TRY(CL(clFoo(...))). */
#define CL(call) cli_cl((call), #call)
clmoe_status cli_cl(cl_int code, const char *call);

/* Takes over the library's sentence: TRY(LIB(clmoe_foo(...))). */
#define LIB(call) cli_lib(call)
clmoe_status cli_lib(clmoe_status status);

/* Success, or the sentence of `why` kept: TRY(checked(cli_u32(...), &why)). */
clmoe_status checked(bool right, const problem *why);

/* The sentence about the last failure. */
const char *cli_error(void);

#endif
