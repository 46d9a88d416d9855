#include "json.h"
#include "file.h"
#include "tidy.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX_BYTES 100000000

/* jansson gives up without a word where an allocation inside a value failed. */
bool json_out_of_memory(const json_error_t *error) {
    return error->text[0] == '\0' || json_error_code(error) == json_error_out_of_memory;
}

bool json_is_repeated(const char *key) {
    size_t length = strlen(key), end = strlen(JSON_REPEATED);
    return length > end && strcmp(key + length - end, JSON_REPEATED) == 0;
}

clmoe_status json_parse(const char *path, const char *text, size_t length, json_t **root) {
    clmoe_status status = CLMOE_SUCCESS;
    json_error_t error;
    tidy_text tidied;
    *root = NULL;
    if (!json_tidy(text, length, &tidied))
        TRY(fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to read it", path));
    *root = json_loadb(tidied.text, tidied.length, 0, &error);
    if (*root == NULL)
        TRY(json_out_of_memory(&error) ? fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to read it", path)
                                       : fail(CLMOE_BAD_FILE, "%s: line %d is not JSON: %s", path,
                                              error.line, error.text));
done:
    free(tidied.text);
    return status;
}

/* All of a file of `bytes` bytes; the caller frees *text. */
static clmoe_status read_all(const char *path, int fd, size_t bytes, char **text) {
    *text = malloc(bytes + 1);
    if (*text == NULL)
        return fail(CLMOE_OUT_OF_MEMORY, "%s: no memory for its %zu bytes", path, bytes);
    for (size_t at = 0; at < bytes;) {
        ssize_t got = pread(fd, *text + at, bytes - at, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return fail(CLMOE_IO, "%s: cannot be read: %s", path, strerror(errno));
        if (got == 0)
            return fail(CLMOE_IO, "%s: became shorter while it was read", path);
        at += (size_t)got;
    }
    return CLMOE_SUCCESS;
}

clmoe_status json_read(const char *path, json_t **root) {
    clmoe_status status = CLMOE_SUCCESS;
    char *text = NULL;
    struct stat info;
    int fd;
    *root = NULL;
    TRY(file_open(path, &fd, &info));
    if (info.st_size > MAX_BYTES)
        TRY(fail(CLMOE_BAD_FILE, "%s: has %lld bytes, over the limit of %d", path,
                 (long long)info.st_size, MAX_BYTES));
    TRY(read_all(path, fd, (size_t)info.st_size, &text));
    TRY(json_parse(path, text, (size_t)info.st_size, root));
    if (!json_is_object(*root))
        TRY(fail(CLMOE_BAD_FILE, "%s: is not a JSON object", path));
done:
    free(text);
    if (fd >= 0)
        close(fd);
    if (status != CLMOE_SUCCESS) {
        json_decref(*root);
        *root = NULL;
    }
    return status;
}
