/*
 * A fuzz target without a fuzzer: its seeds, every beginning of a seed, and every seed with one
 * byte changed. usage: TARGET FILE_OR_DIRECTORY...
 */
#include "fuzz.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned long runs;

static void run(const uint8_t *data, size_t size) {
    /* A block of its own, for AddressSanitizer. */
    uint8_t *copy = malloc(size + !size);
    if (!copy)
        abort();
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
    runs++;
}

static void run_around(uint8_t *data, size_t size) {
    static const uint8_t changes[] = {0x01, 0x80, 0xFF};
    run(data, size);
    for (size_t i = 0; i < size; i++) {
        uint8_t kept = data[i];
        run(data, i);
        data[i] = (uint8_t)(kept ^ changes[i % sizeof changes]);
        run(data, size);
        data[i] = kept;
    }
}

static void run_file(const char *path) {
    static uint8_t content[1 << 16];
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(1);
    }
    size_t size = fread(content, 1, sizeof content, file);
    fclose(file);
    run_around(content, size);
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        char path[1024];
        DIR *list = opendir(argv[i]);
        if (!list) {
            run_file(argv[i]);
            continue;
        }
        for (struct dirent *entry; (entry = readdir(list)) != NULL;) {
            snprintf(path, sizeof path, "%s/%s", argv[i], entry->d_name);
            if (entry->d_name[0] != '.')
                run_file(path);
        }
        closedir(list);
    }
    printf("%lu inputs\n", runs);
    return runs == 0;
}
