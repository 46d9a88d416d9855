#include "device_name.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static bool starts_with(const char *text, const char *part) {
    while (*part != '\0' && tolower((unsigned char)*text) == tolower((unsigned char)*part)) {
        text++;
        part++;
    }
    return *part == '\0';
}

static bool contains(const char *text, const char *part) {
    while (*text != '\0' && !starts_with(text, part))
        text++;
    return *text != '\0';
}

static bool device_contains(cl_device_id device, const char *part) {
    size_t bytes = 0;
    clGetDeviceInfo(device, CL_DEVICE_NAME, 0, NULL, &bytes);
    char *name = calloc(bytes + 1, 1);
    bool found = name != NULL &&
                 clGetDeviceInfo(device, CL_DEVICE_NAME, bytes, name, NULL) == CL_SUCCESS &&
                 contains(name, part);
    free(name);
    return found;
}

static bool platform_contains(cl_device_id device, const char *part) {
    cl_platform_id platform = NULL;
    char name[256] = "";
    return clGetDeviceInfo(device, CL_DEVICE_PLATFORM, sizeof platform, (void *)&platform, NULL) ==
               CL_SUCCESS &&
           clGetPlatformInfo(platform, CL_PLATFORM_NAME, sizeof name, name, NULL) == CL_SUCCESS &&
           contains(name, part);
}

static bool is_number(const char *text) {
    return text[0] != '\0' && strspn(text, "0123456789") == strlen(text);
}

bool device_not_found(const char *text, uint32_t count, problem *why) {
    if (is_number(text))
        return problem_set(why, "--device is %s, but clmoe devices lists %u, from 0", text,
                           (unsigned)count);
    return problem_set(why,
                       "--device is '%s', which is part of no name of a device or platform; see "
                       "clmoe devices",
                       text);
}

bool device_is_meant(cl_device_id device, uint32_t index, const char *text) {
    char *end = NULL;
    if (text[0] == '\0')
        return false;
    if (!is_number(text))
        return device_contains(device, text) || platform_contains(device, text);
    errno = 0;
    return strtoull(text, &end, 10) == index && errno == 0;
}
