#include "device_list.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* PoCL keeps programs itself, and compiles all kernels a second time to hand out a binary. */
static bool keeps_programs(cl_platform_id platform) {
    char name[256];
    platform_text(platform, CL_PLATFORM_NAME, name, sizeof name);
    return strcmp(name, "Portable Computing Language") == 0;
}

const char *user_cache_dir(cl_platform_id platform, char path[CACHE_PATH_SIZE]) {
    const char *base = getenv("XDG_CACHE_HOME"), *below = "";
    if (keeps_programs(platform))
        return NULL;
    if (base == NULL || base[0] != '/') { /* the rule for XDG_CACHE_HOME: relative is not set */
        base = getenv("HOME");
        below = "/.cache";
    }
    if (base == NULL || base[0] != '/')
        return NULL;
    int length = snprintf(path, CACHE_PATH_SIZE, "%s%s/clmoe", base, below);
    if (length < 0 || length >= CACHE_PATH_SIZE)
        return NULL;
    /* The library makes the last directory; a new home lacks the one above it too. */
    char *last = strrchr(path, '/');
    *last = '\0';
    mkdir(path, 0700);
    *last = '/';
    return path;
}
