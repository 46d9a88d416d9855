#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

/* The first line of a pointer, which has some 130 bytes in all. */
#define LFS_LINE "version https://git-lfs.github.com/"

static bool is_lfs_pointer(int fd) {
    char begin[sizeof LFS_LINE - 1];
    return pread(fd, begin, sizeof begin, 0) == (ssize_t)sizeof begin &&
           memcmp(begin, LFS_LINE, sizeof begin) == 0;
}

clmoe_status file_open(const char *path, int *fd, struct stat *info) {
    clmoe_status status = CLMOE_SUCCESS;
    /* O_NONBLOCK: a FIFO must not make us wait for a writer. */
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (*fd < 0 || fstat(*fd, info) != 0)
        TRY(fail(CLMOE_IO, "%s: cannot be opened: %s", path, strerror(errno)));
    if (!S_ISREG(info->st_mode))
        TRY(fail(CLMOE_IO, "%s: is not a regular file", path));
    if (is_lfs_pointer(*fd))
        TRY(fail(CLMOE_BAD_FILE,
                 "%s: is a Git LFS pointer, not the file it stands for; get that by git lfs pull",
                 path));
done:
    if (status != CLMOE_SUCCESS && *fd >= 0) {
        close(*fd);
        *fd = -1;
    }
    return status;
}
