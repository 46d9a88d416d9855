/* A hostile file in the cache of programs: a binary comes out only as it was put in. */
#include "runtime/cache.h"
#include "fuzz.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char key[] = "the key";
static char problem[CACHE_PROBLEM_SIZE];

/* Stores something under the key, to learn the file's name. */
static const char *file_name(void) {
    static char name[256];
    if (name[0] != '\0')
        return name;
    cache_write(fuzz_directory(), key, sizeof key, "a binary", 8, problem);
    DIR *list = opendir(fuzz_directory());
    if (!list)
        abort();
    for (struct dirent *entry; (entry = readdir(list)) != NULL;)
        if (entry->d_name[0] != '.')
            snprintf(name, sizeof name, "%s", entry->d_name);
    closedir(list);
    return name;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t binary_size = 0;
    fuzz_write(file_name(), data, size);
    problem[0] = '\0';
    unsigned char *binary = cache_read(fuzz_directory(), key, sizeof key, &binary_size, problem);
    if (binary &&
        (binary_size > size || memcmp(binary, data + size - binary_size, binary_size) != 0))
        abort();
    free(binary);
    return 0;
}
