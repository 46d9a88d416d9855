/* What the files of clmoe-bench share: errors with a sentence. The library's public API alone. */
#ifndef BENCH_H
#define BENCH_H

#include "../src/cli/problem.h"

#include <clmoe/clmoe.h>
#include <stdbool.h>

/* Leaves for the function's label `done:`; it has a `clmoe_status status`. */
#define TRY(expr)                                                                                  \
    do {                                                                                           \
        status = (expr);                                                                           \
        if (status != CLMOE_SUCCESS)                                                               \
            goto done;                                                                             \
    } while (0)

#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

#if defined(__GNUC__)
#define BENCH_PRINTF(format_index) __attribute__((format(printf, format_index, format_index + 1)))
#else
#define BENCH_PRINTF(format_index)
#endif

/* Keeps the sentence for bench_error() and returns `status`. */
clmoe_status bench_fail(clmoe_status status, const char *format, ...) BENCH_PRINTF(2);

/* The sentence about an OpenCL call that failed; TRY(CL(clFoo(...))). */
#define CL(call) bench_cl((call), #call)
clmoe_status bench_cl(cl_int code, const char *call);

/* Takes over the library's sentence: TRY(LIB(clmoe_foo(...))). */
#define LIB(call) bench_lib(call)
clmoe_status bench_lib(clmoe_status status);

clmoe_status bench_no_memory(const char *what);

/* Success, or the sentence of `why` kept: TRY(bench_checked(cli_next(...), &why)). */
clmoe_status bench_checked(bool right, const problem *why);

/* An error once a signal came: what is done by then is kept. */
clmoe_status bench_go_on(void);

/* The sentence about the last failure. */
const char *bench_error(void);

#endif
