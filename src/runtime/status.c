#include "status.h"

#include <locale.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define STRINGIFY(x) #x
#define TO_STRING(x) STRINGIFY(x)
#define NAME_OF(code)                                                                              \
    { code, #code }

static _Thread_local error_sentence last_error;

const char *clmoe_last_error(void) {
    return last_error.text;
}

const char *clmoe_version(void) {
    return TO_STRING(CLMOE_VERSION_MAJOR) "." TO_STRING(CLMOE_VERSION_MINOR) "." TO_STRING(
        CLMOE_VERSION_PATCH);
}

static const struct {
    clmoe_status code;
    const char *name;
} names[] = {
    NAME_OF(CLMOE_SUCCESS),
    NAME_OF(CLMOE_INVALID_ARGUMENT),
    NAME_OF(CLMOE_INVALID_DESC),
    NAME_OF(CLMOE_UNSUPPORTED),
    NAME_OF(CLMOE_OUT_OF_MEMORY),
    NAME_OF(CLMOE_BUILD_FAILED),
    NAME_OF(CLMOE_ENGINE_FAILED),
    NAME_OF(CLMOE_IO),
    NAME_OF(CLMOE_BAD_FILE),
    NAME_OF(CL_DEVICE_NOT_FOUND),
    NAME_OF(CL_DEVICE_NOT_AVAILABLE),
    NAME_OF(CL_COMPILER_NOT_AVAILABLE),
    NAME_OF(CL_MEM_OBJECT_ALLOCATION_FAILURE),
    NAME_OF(CL_OUT_OF_RESOURCES),
    NAME_OF(CL_OUT_OF_HOST_MEMORY),
    NAME_OF(CL_PROFILING_INFO_NOT_AVAILABLE),
    NAME_OF(CL_MEM_COPY_OVERLAP),
    NAME_OF(CL_BUILD_PROGRAM_FAILURE),
    NAME_OF(CL_MISALIGNED_SUB_BUFFER_OFFSET),
    NAME_OF(CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST),
    NAME_OF(CL_INVALID_VALUE),
    NAME_OF(CL_INVALID_DEVICE_TYPE),
    NAME_OF(CL_INVALID_PLATFORM),
    NAME_OF(CL_INVALID_DEVICE),
    NAME_OF(CL_INVALID_CONTEXT),
    NAME_OF(CL_INVALID_QUEUE_PROPERTIES),
    NAME_OF(CL_INVALID_COMMAND_QUEUE),
    NAME_OF(CL_INVALID_HOST_PTR),
    NAME_OF(CL_INVALID_MEM_OBJECT),
    NAME_OF(CL_INVALID_BINARY),
    NAME_OF(CL_INVALID_BUILD_OPTIONS),
    NAME_OF(CL_INVALID_PROGRAM),
    NAME_OF(CL_INVALID_PROGRAM_EXECUTABLE),
    NAME_OF(CL_INVALID_KERNEL_NAME),
    NAME_OF(CL_INVALID_KERNEL),
    NAME_OF(CL_INVALID_ARG_INDEX),
    NAME_OF(CL_INVALID_ARG_VALUE),
    NAME_OF(CL_INVALID_ARG_SIZE),
    NAME_OF(CL_INVALID_KERNEL_ARGS),
    NAME_OF(CL_INVALID_WORK_DIMENSION),
    NAME_OF(CL_INVALID_WORK_GROUP_SIZE),
    NAME_OF(CL_INVALID_WORK_ITEM_SIZE),
    NAME_OF(CL_INVALID_GLOBAL_OFFSET),
    NAME_OF(CL_INVALID_EVENT_WAIT_LIST),
    NAME_OF(CL_INVALID_EVENT),
    NAME_OF(CL_INVALID_OPERATION),
    NAME_OF(CL_INVALID_BUFFER_SIZE),
    NAME_OF(CL_INVALID_GLOBAL_WORK_SIZE),
    NAME_OF(CL_INVALID_PROPERTY),
    {-1001, "CL_PLATFORM_NOT_FOUND_KHR"},
};

const char *clmoe_status_string(clmoe_status status) {
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (names[i].code == status)
            return names[i].name;
    return "unknown status";
}

static locale_t plain_numbers;

static void open_locale(void) {
    plain_numbers = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
}

clmoe_status fail(clmoe_status status, const char *format, ...) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    char text[sizeof last_error.text];
    va_list args;
    pthread_once(&once, open_locale);
    /* 0.5 in every language; without memory for the locale, the caller's. */
    locale_t caller = plain_numbers ? uselocale(plain_numbers) : (locale_t)0;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (plain_numbers)
        uselocale(caller);
    clmoe_printable(text, last_error.text, sizeof last_error.text);
    return status;
}

error_sentence error_keep(void) {
    return last_error;
}

void error_put_back(const error_sentence *kept) {
    last_error = *kept;
}

clmoe_status clmoe_cl_check(cl_int code, const char *call) {
    if (code == CL_SUCCESS)
        return CLMOE_SUCCESS;
    return fail(code, "%.*s failed: %s (%d)", (int)strcspn(call, "("), call,
                clmoe_status_string(code), (int)code);
}

int size_mul(size_t a, size_t b, size_t *product) {
    if (b != 0 && a > SIZE_MAX / b)
        return 0;
    *product = a * b;
    return 1;
}

int size_add(size_t a, size_t b, size_t *sum) {
    if (a > SIZE_MAX - b)
        return 0;
    *sum = a + b;
    return 1;
}
