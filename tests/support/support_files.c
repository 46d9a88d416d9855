#define _XOPEN_SOURCE 700 /* nftw */
#include "support_files.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_PATHS 1024

static char directory[256];
static char *paths[MAX_PATHS];
static size_t num_paths;

int files_setup(void **state) {
    (void)state;
    const char *base = getenv("TMPDIR");
    snprintf(directory, sizeof directory, "%s/clmoe-test-XXXXXX", base ? base : "/tmp");
    return mkdtemp(directory) ? 0 : -1;
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *walk) {
    (void)info;
    (void)kind;
    (void)walk;
    return remove(path);
}

int files_teardown(void **state) {
    (void)state;
    while (num_paths > 0)
        free(paths[--num_paths]);
    return nftw(directory, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

const char *temp_path(const char *name) {
    size_t bytes = strlen(directory) + strlen(name) + 2;
    char *path = malloc(bytes);
    CHECK(path != NULL && num_paths < MAX_PATHS, "too many paths\n");
    snprintf(path, bytes, "%s/%s", directory, name);
    paths[num_paths++] = path;
    return path;
}

const char *temp_directory(const char *name) {
    const char *path = temp_path(name);
    mkdir(path, 0777);
    return path;
}

void write_bytes(const char *path, const void *data, size_t bytes) {
    FILE *file = fopen(path, "wb");
    CHECK(file != NULL, "%s cannot be created\n", path);
    CHECK(fwrite(data, 1, bytes, file) == bytes, "%s cannot be written\n", path);
    fclose(file);
}

void write_text(const char *path, const char *text) {
    write_bytes(path, text, strlen(text));
}

char *read_text(const char *path) {
    FILE *file = fopen(path, "rb");
    CHECK(file != NULL, "%s cannot be opened\n", path);
    fseek(file, 0, SEEK_END);
    size_t bytes = (size_t)ftell(file);
    rewind(file);
    char *text = malloc(bytes + 1);
    CHECK(text != NULL && fread(text, 1, bytes, file) == bytes, "%s cannot be read\n", path);
    text[bytes] = '\0';
    fclose(file);
    return text;
}

void write_safetensors(const char *path, const char *header, size_t data_bytes) {
    size_t length = strlen(header), bytes = 8 + length + data_bytes;
    unsigned char *file = malloc(bytes);
    CHECK(file != NULL, "no memory\n");
    for (size_t i = 0; i < 8; i++)
        file[i] = (unsigned char)((uint64_t)length >> (8 * i) & 255);
    memcpy(file + 8, header, length);
    for (size_t i = 0; i < data_bytes; i++)
        file[8 + length + i] = (unsigned char)i;
    write_bytes(path, file, bytes);
    free(file);
}

void check_refused(clmoe_status status, clmoe_status want, const char *const *texts) {
    CHECK(status == want, "%s instead of %s; it says: %s\n", clmoe_status_string(status),
          clmoe_status_string(want), status ? clmoe_last_error() : "");
    for (; *texts != NULL; texts++)
        CHECK(strstr(clmoe_last_error(), *texts) != NULL, "'%s' is not in: %s\n", *texts,
              clmoe_last_error());
}
