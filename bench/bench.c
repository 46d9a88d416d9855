#include "bench.h"
#include "../src/cli/interrupt.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static char sentence[1024];

clmoe_status bench_fail(clmoe_status status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(sentence, sizeof sentence, format, list);
    va_end(list);
    return status;
}

clmoe_status bench_cl(cl_int code, const char *call) {
    if (code == CL_SUCCESS)
        return CLMOE_SUCCESS;
    return bench_fail(code, "%.*s failed: %s", (int)strcspn(call, "("), call,
                      clmoe_status_string(code));
}

clmoe_status bench_lib(clmoe_status status) {
    return status == CLMOE_SUCCESS ? status : bench_fail(status, "%s", clmoe_last_error());
}

clmoe_status bench_no_memory(const char *what) {
    return bench_fail(CLMOE_OUT_OF_MEMORY, "no memory for %s", what);
}

clmoe_status bench_checked(bool right, const problem *why) {
    return right ? CLMOE_SUCCESS : bench_fail(CLMOE_INVALID_ARGUMENT, "%s", why->text);
}

clmoe_status bench_go_on(void) {
    problem why;
    if (interrupt_signal() == 0)
        return CLMOE_SUCCESS;
    interrupt_problem(&why, "the results until then are written");
    return bench_fail(CLMOE_IO, "%s", why.text);
}

const char *bench_error(void) {
    return sentence;
}
