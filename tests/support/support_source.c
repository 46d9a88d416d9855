/* Between the library and the driver, by --wrap: which programs are worth optimizing. */
#include "support.h"

#include <string.h>

cl_program __real_clCreateProgramWithSource(cl_context context, cl_uint count, const char **texts,
                                            const size_t *lengths, cl_int *code);
cl_program __wrap_clCreateProgramWithSource(cl_context context, cl_uint count, const char **texts,
                                            const size_t *lengths, cl_int *code);

/* The library's programs: one text, with a zero behind it. */
cl_program __wrap_clCreateProgramWithSource(cl_context context, cl_uint count, const char **texts,
                                            const size_t *lengths, cl_int *code) {
    static const char *const long_steps[] = {
        "#line 1 \"cl/experts/gemm/ref.cl\"",      "#line 1 \"cl/experts/gemm/ref_gradient.cl\"",
        "#line 1 \"cl/experts/activation.cl\"",    "#line 1 \"cl/routing/rebalance.cl\"",
        "#line 1 \"cl/routing/expert_choice.cl\"",
    };
    program_runs_long = false;
    for (size_t i = 0; i < COUNT_OF(long_steps); i++)
        program_runs_long = program_runs_long || strstr(texts[0], long_steps[i]) != NULL;
    return __real_clCreateProgramWithSource(context, count, texts, lengths, code);
}
