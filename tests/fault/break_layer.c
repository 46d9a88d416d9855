/*
 * An OpenCL layer that breaks kernels: in every source that is compiled, the text CLMOE_BREAK of
 * the environment becomes CLMOE_BROKEN. CLMOE_BREAK_LOG: a file that says that it was loaded.
 * CLMOE_BREAK_SIGNAL: the first build gets that signal, for which the compiler has a handler.
 */
#include "layer.h"

#include <CL/cl_icd.h>
#include <CL/cl_layer.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const cl_icd_dispatch *next;
static cl_icd_dispatch table;

/* To be freed; NULL: the text is not in there. */
static char *replace_first(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    const size_t bytes = strlen(text) + strlen(to) + 1;
    char *result = at ? malloc(bytes) : NULL;
    if (result)
        snprintf(result, bytes, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return result;
}

static cl_program CL_API_CALL create_program(cl_context context, cl_uint count,
                                             const char **strings, const size_t *lengths,
                                             cl_int *code) {
    const char *from = getenv("CLMOE_BREAK"), *to = getenv("CLMOE_BROKEN");
    char *source =
        from && to && count == 1 && !lengths ? replace_first(strings[0], from, to) : NULL;
    const char *used = source ? source : strings[0];
    cl_program program =
        next->clCreateProgramWithSource(context, count, source ? &used : strings, lengths, code);
    free(source);
    return program;
}

/* As LLVM's, which PoCL compiles with: the process ends without a word. */
static void leave(int number) {
    _exit(number);
}

static cl_int CL_API_CALL build_program(cl_program program, cl_uint count,
                                        const cl_device_id *devices, const char *options,
                                        void(CL_CALLBACK *notify)(cl_program, void *), void *data) {
    static bool sent;
    const char *number = getenv("CLMOE_BREAK_SIGNAL");
    if (number != NULL && !sent) {
        signal(atoi(number), leave);
        kill(getpid(), atoi(number));
        sent = true;
    }
    return next->clBuildProgram(program, count, devices, options, notify, data);
}

CL_API_ENTRY cl_int CL_API_CALL clGetLayerInfo(cl_layer_info name, size_t size, void *value,
                                               size_t *bytes) {
    const cl_layer_api_version version = CL_LAYER_API_VERSION_100;
    static const char layer_name[] = "clmoe breaks kernels";
    const void *from = name == CL_LAYER_API_VERSION ? (const void *)&version : layer_name;
    const size_t need = name == CL_LAYER_API_VERSION ? sizeof version : sizeof layer_name;
    if ((name != CL_LAYER_API_VERSION && name != CL_LAYER_NAME) || (value && size < need))
        return CL_INVALID_VALUE;
    if (value)
        memcpy(value, from, need);
    if (bytes)
        *bytes = need;
    return CL_SUCCESS;
}

CL_API_ENTRY cl_int CL_API_CALL clInitLayer(cl_uint num_entries, const cl_icd_dispatch *target,
                                            cl_uint *num_entries_ret,
                                            const cl_icd_dispatch **table_ret) {
    const cl_uint known = sizeof table / sizeof table.clGetPlatformIDs;
    const char *log = getenv("CLMOE_BREAK_LOG");
    FILE *file = log ? fopen(log, "w") : NULL;
    if (file)
        fclose(file);
    if (!target || !num_entries_ret || !table_ret || num_entries < known)
        return CL_INVALID_VALUE;
    next = target;
    table = *target;
    table.clCreateProgramWithSource = create_program;
    table.clBuildProgram = build_program;
    *num_entries_ret = known;
    *table_ret = &table;
    return CL_SUCCESS;
}
