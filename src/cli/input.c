#include "input.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static clmoe_status copy_all(int from, const char *name, FILE *to) {
    char block[65536];
    ssize_t bytes;
    while ((bytes = read(from, block, sizeof block)) != 0) {
        if (bytes < 0 && errno == EINTR)
            continue;
        if (bytes < 0)
            return cli_fail(CLMOE_IO, "%s: cannot be read: %s", name, strerror(errno));
        if (fwrite(block, 1, (size_t)bytes, to) != (size_t)bytes)
            return cli_fail(CLMOE_IO, "%s: cannot be kept in a temporary file: %s", name,
                            strerror(errno));
    }
    if (fflush(to) != 0)
        return cli_fail(CLMOE_IO, "%s: cannot be kept in a temporary file: %s", name,
                        strerror(errno));
    return CLMOE_SUCCESS;
}

/*
 * Tensors are read in any order, which a stream does not allow. The temporary file has no name but
 * that of its descriptor, which stays open for later reads until the process ends.
 */
static clmoe_status open_stream(int from, const char *name, clmoe_tensors **out) {
    clmoe_status status = CLMOE_SUCCESS;
    char path[64];
    FILE *file = tmpfile();
    int fd = file != NULL ? fcntl(fileno(file), F_DUPFD_CLOEXEC, 0) : -1;
    if (fd < 0)
        TRY(cli_fail(CLMOE_IO, "%s: no temporary file: %s", name, strerror(errno)));
    TRY(copy_all(from, name, file));
    snprintf(path, sizeof path, "/dev/fd/%d", fd);
    status = LIB(clmoe_tensors_open(path, out));
    if (status != CLMOE_SUCCESS) {
        TRY(cli_fail(status, "%s, kept as %s", name, cli_error()));
    }
done:
    if (file != NULL)
        fclose(file);
    return status;
}

clmoe_status input_open(const char *path, clmoe_tensors **out) {
    struct stat info;
    if (path[0] == '\0')
        return cli_fail(CLMOE_INVALID_ARGUMENT, "--input is '', which names no file");
    if (strcmp(path, "-") == 0)
        return open_stream(STDIN_FILENO, "standard input", out);
    if (stat(path, &info) != 0 || !S_ISFIFO(info.st_mode))
        return LIB(clmoe_tensors_open(path, out));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return cli_fail(CLMOE_IO, "%s: cannot be opened: %s", path, strerror(errno));
    clmoe_status status = open_stream(fd, path, out);
    close(fd);
    return status;
}
