/*
 * Between the library and PoCL, by --wrap: programs for groups of more than one work-item are built
 * without optimization. On a CPU the library makes no such groups by itself: they stand for other
 * devices, which have compilers of their own.
 */
#include "support.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_OPTIONS = 1024 };

cl_int __real_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user), void *user);
cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user), void *user);

static bool is_pocl(void) {
    char name[64] = "";
    return clGetPlatformInfo(test.platform, CL_PLATFORM_NAME, sizeof name, name, NULL) ==
               CL_SUCCESS &&
           strcmp(name, "Portable Computing Language") == 0;
}

/* Whether the options ask for groups of more than one. */
static bool has_groups(const char *options) {
    static const char group[] = "-DGROUP=";
    const char *at = strstr(options, group);
    return at && atoi(at + sizeof group - 1) > 1;
}

cl_int __wrap_clBuildProgram(cl_program program, cl_uint count, const cl_device_id *devices,
                             const char *options,
                             void(CL_CALLBACK *notify)(cl_program program, void *user),
                             void *user) {
    char all[MAX_OPTIONS];
    const char *more = options && has_groups(options) && is_pocl() ? " -cl-opt-disable" : "";
    const int length = snprintf(all, sizeof all, "%s%s", options ? options : "", more);
    CHECK(length < MAX_OPTIONS, "options too long: %s\n", options);
    return __real_clBuildProgram(program, count, devices, all, notify, user);
}
