#include "error.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static problem last;

clmoe_status cli_fail(clmoe_status status, const char *format, ...) {
    problem raw;
    va_list list;
    va_start(list, format);
    vsnprintf(raw.text, sizeof raw.text, format, list);
    va_end(list);
    clmoe_printable(raw.text, last.text, sizeof last.text);
    return status;
}

clmoe_status cli_cl(cl_int code, const char *call) {
    if (code == CL_SUCCESS)
        return CLMOE_SUCCESS;
    return cli_fail(code, "%.*s failed: %s (%d)", (int)strcspn(call, "("), call,
                    clmoe_status_string(code), (int)code);
}

clmoe_status cli_lib(clmoe_status status) {
    return status == CLMOE_SUCCESS ? status : cli_fail(status, "%s", clmoe_last_error());
}

clmoe_status checked(bool right, const problem *why) {
    return right ? CLMOE_SUCCESS : cli_fail(CLMOE_INVALID_ARGUMENT, "%s", why->text);
}

const char *cli_error(void) {
    return last.text;
}
