/*
 * Between the library and its kernels, by --wrap: every program is built with the names of its
 * arguments, and every launch's arguments are compared with them. Two buffers in the wrong order
 * are noticed here, whatever they hold.
 */
#include "runtime/launch.h" /* before cmocka, whose fail is a macro */

#include "support.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

enum { MAX_OPTIONS = 1024, MAX_NAME = 64, MAX_TEXT = 256 };

cl_int __real_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user), void *user);
cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user), void *user);
clmoe_status __real_kernel_set(cl_kernel kernel, size_t count, const kernel_arg *args);
clmoe_status __wrap_kernel_set(cl_kernel kernel, size_t count, const kernel_arg *args);

cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user),
                             void *user) {
    char all[MAX_OPTIONS];
    int length = snprintf(all, sizeof all, "%s -cl-kernel-arg-info%s", options ? options : "",
                          build_quickly(options));
    CHECK(length < MAX_OPTIONS, "options too long: %s\n", options);
    return __real_clBuildProgram(program, count, devices, all, notify, user);
}

static bool is_word(char c) {
    return isalnum((unsigned char)c) || c == '_';
}

/* `text` in small letters, and members joined to their struct by _. */
static void plain_text(const char *text, char plain[MAX_TEXT]) {
    size_t n = 0;
    for (; *text && n < MAX_TEXT - 1; text++) {
        bool arrow = text[0] == '-' && text[1] == '>';
        plain[n++] = arrow || *text == '.' ? '_' : (char)tolower((unsigned char)*text);
        text += arrow;
    }
    plain[n] = '\0';
}

/* Whether a word of the host's `text` is `name`, or ends in _name; name_of() is a name too. */
static bool says(const char *text, const char *name) {
    char plain[MAX_TEXT];
    plain_text(text, plain);
    for (const char *at = strstr(plain, name); at; at = strstr(at + 1, name)) {
        bool begins = at == plain || at[-1] == '_' || !is_word(at[-1]);
        const char *end = at + strlen(name);
        if (begins && (!is_word(*end) || strncmp(end, "_of(", 4) == 0))
            return true;
    }
    return false;
}

/* The name of an argument; false where the device does not tell. */
static bool argument_name(cl_kernel kernel, cl_uint index, char name[MAX_NAME]) {
    cl_int code = clGetKernelArgInfo(kernel, index, CL_KERNEL_ARG_NAME, MAX_NAME, name, NULL);
    CHECK(code == CL_SUCCESS || code == CL_KERNEL_ARG_INFO_NOT_AVAILABLE, "argument %u: %d\n",
          index, code);
    return code == CL_SUCCESS;
}

clmoe_status __wrap_kernel_set(cl_kernel kernel, size_t count, const kernel_arg *args) {
    char function[MAX_NAME], name[MAX_NAME], offset[MAX_NAME], expected[MAX_NAME + 4];
    cl_uint index = 0, expects;
    if (clGetKernelInfo(kernel, CL_KERNEL_NUM_ARGS, sizeof expects, &expects, NULL) != CL_SUCCESS)
        return __real_kernel_set(kernel, count, args); /* the native device of the tests */
    CL_OK(clGetKernelInfo(kernel, CL_KERNEL_FUNCTION_NAME, sizeof function, function, NULL));
    for (size_t i = 0; i < count && argument_name(kernel, index, name); i++) {
        CHECK(args[i].bytes || says(args[i].text, name), "%s: argument %s is set to %s\n", function,
              name, args[i].text);
        index++;
        if (!args[i].is_buffer)
            continue;
        snprintf(expected, sizeof expected, "%s_off", name);
        CHECK(argument_name(kernel, index, offset) && strcmp(offset, expected) == 0,
              "%s: behind %s comes %s\n", function, name, offset);
        index++;
    }
    CHECK(index == 0 || index == expects, "%s: %u of %u arguments\n", function, index, expects);
    return __real_kernel_set(kernel, count, args);
}
