#include "json.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_BYTES 100000000

/* jansson gives up without a word where an allocation inside a value failed. */
bool json_out_of_memory(const json_error_t *error) {
    return error->text[0] == '\0' || json_error_code(error) == json_error_out_of_memory;
}

clmoe_status json_read(const char *path, json_t **root) {
    clmoe_status status = CLMOE_SUCCESS;
    struct stat info;
    json_error_t error;
    FILE *stream = NULL;
    *root = NULL;
    /* O_NONBLOCK: a FIFO must not make us wait for a writer. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &info) != 0)
        TRY(fail(CLMOE_IO, "%s: cannot be opened: %s", path, strerror(errno)));
    if (!S_ISREG(info.st_mode))
        TRY(fail(CLMOE_IO, "%s: is not a regular file", path));
    if (info.st_size > MAX_BYTES)
        TRY(fail(CLMOE_BAD_FILE, "%s: has %lld bytes, over the limit of %d", path,
                 (long long)info.st_size, MAX_BYTES));
    /* json_loadfd() would read byte by byte. */
    stream = fdopen(fd, "rb");
    if (stream == NULL)
        TRY(fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to read it", path));
    *root = json_loadf(stream, JSON_REJECT_DUPLICATES, &error);
    if (*root == NULL)
        TRY(json_out_of_memory(&error) ? fail(CLMOE_OUT_OF_MEMORY, "%s: no memory to read it", path)
                                       : fail(CLMOE_BAD_FILE, "%s: line %d is not JSON: %s", path,
                                              error.line, error.text));
    if (!json_is_object(*root))
        TRY(fail(CLMOE_BAD_FILE, "%s: is not a JSON object", path));
done:
    if (stream != NULL)
        fclose(stream);
    else if (fd >= 0)
        close(fd);
    if (status != CLMOE_SUCCESS) {
        json_decref(*root);
        *root = NULL;
    }
    return status;
}
