#include "fuzz.h"
#include "clmoe/clmoe.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LAYERS = 2 };

static char directory[256];

static void path_of(const char *name, char *path, size_t bytes) {
    snprintf(path, bytes, "%s/%s", fuzz_directory(), name);
}

static void remove_directory(void) {
    char path[1024];
    DIR *list = opendir(directory);
    if (!list)
        return;
    for (struct dirent *entry; (entry = readdir(list)) != NULL;) {
        path_of(entry->d_name, path, sizeof path);
        unlink(path);
    }
    closedir(list);
    rmdir(directory);
}

const char *fuzz_directory(void) {
    if (directory[0] == '\0') {
        const char *base = getenv("TMPDIR");
        snprintf(directory, sizeof directory, "%s/clmoe-fuzz-XXXXXX", base ? base : "/tmp");
        if (!mkdtemp(directory))
            abort();
        atexit(remove_directory);
    }
    return directory;
}

/* Cut to size at last: emptying it first would make some file systems write to disk. */
void fuzz_write(const char *name, const void *data, size_t size) {
    char path[1024];
    path_of(name, path, sizeof path);
    int file = open(path, O_WRONLY | O_CREAT, 0600);
    if (file < 0 || pwrite(file, data, size, 0) != (ssize_t)size ||
        ftruncate(file, (off_t)size) != 0 || close(file) != 0)
        abort();
}

void fuzz_copy(const char *seed, const char *name) {
    static char content[1 << 16];
    char path[1024];
    path_of(name, path, sizeof path);
    if (access(path, F_OK) == 0)
        return;
    snprintf(path, sizeof path, "%s/%s", FUZZ_SEEDS, seed);
    FILE *file = fopen(path, "rb");
    if (!file)
        abort();
    size_t size = fread(content, 1, sizeof content, file);
    fclose(file);
    fuzz_write(name, content, size);
}

static void describe(const char *assume) {
    clmoe_checkpoint *checkpoint = NULL;
    clmoe_layer_desc desc;
    const clmoe_checkpoint_options options = {
        .struct_size = sizeof options, .assume = assume, .decode = CLMOE_DECODE_F32};
    if (clmoe_checkpoint_open(fuzz_directory(), &options, &checkpoint) != CLMOE_SUCCESS)
        return;
    for (uint32_t layer = 0; layer < LAYERS; layer++)
        clmoe_checkpoint_layer(checkpoint, layer, &desc);
    clmoe_checkpoint_close(checkpoint);
}

void fuzz_checkpoint(void) {
    describe(NULL);
    describe("pattern");
}
