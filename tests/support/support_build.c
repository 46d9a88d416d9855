/* Between the library and the driver, by --wrap: programs are built as build_quickly() says. */
#include "support.h"

#include <stdio.h>

enum { MAX_OPTIONS = 1024 };

cl_int __real_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user), void *user);
cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user), void *user);

cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user),
                             void *user) {
    char all[MAX_OPTIONS];
    const int length =
        snprintf(all, sizeof all, "%s%s", options ? options : "", build_quickly(options));
    CHECK(length < MAX_OPTIONS, "options too long: %s\n", options);
    return __real_clBuildProgram(program, count, devices, all, notify, user);
}
