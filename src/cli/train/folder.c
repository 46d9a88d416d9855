#include "folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

clmoe_status folder_path(const char *folder, const char *name, char path[PATH_MAX]) {
    const int bytes = snprintf(path, PATH_MAX, "%s/%s", folder, name);
    if (bytes > 0 && bytes < PATH_MAX)
        return CLMOE_SUCCESS;
    return cli_fail(CLMOE_IO, "%s: %s", folder, strerror(ENAMETOOLONG));
}

/* A run that was killed before it had its run.json leaves less than can be resumed. */
static bool is_empty(const char *folder) {
    DIR *stream = opendir(folder);
    bool empty = stream != NULL;
    for (const struct dirent *entry; empty && (entry = readdir(stream)) != NULL;)
        empty = strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0 ||
                strcmp(entry->d_name, "run.json.tmp") == 0;
    if (stream != NULL)
        closedir(stream);
    return empty;
}

/* Whether a folder can be made in the one above, before a long start. */
static clmoe_status check_parent(const char *folder) {
    clmoe_status status = CLMOE_SUCCESS;
    char path[PATH_MAX];
    TRY(folder_path(folder, "..", path)); /* for its length; the folder is not there yet */
    size_t length = strlen(folder);
    while (length > 1 && folder[length - 1] == '/')
        length--;
    while (length > 0 && folder[length - 1] != '/')
        length--;
    memcpy(path, folder, length);
    snprintf(path + length, sizeof path - length, ".");
    if (folder[0] == '\0' || access(path, W_OK | X_OK) != 0)
        return cli_fail(CLMOE_IO, "--out '%s' cannot be made: %s", folder,
                        strerror(folder[0] == '\0' ? ENOENT : errno));
done:
    return status;
}

clmoe_status folder_check(const char *folder) {
    struct stat info;
    if (stat(folder, &info) != 0 && errno == ENOENT)
        return check_parent(folder);
    if (stat(folder, &info) != 0 || !S_ISDIR(info.st_mode))
        return cli_fail(CLMOE_IO, "--out '%s' exists and is no folder", folder);
    if (!is_empty(folder))
        return cli_fail(
            CLMOE_IO, "--out '%s' is not empty; --resume goes on with the run of a folder", folder);
    return CLMOE_SUCCESS;
}

clmoe_status folder_lock(const char *folder, folder_guard *guard) {
    const int fd = open(folder, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return cli_fail(CLMOE_IO, "'%s' cannot be opened: %s", folder, strerror(errno));
    guard->fd = fd + 1;
    if (flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
        return cli_fail(CLMOE_IO, "another clmoe train is at work in '%s'", folder);
    return CLMOE_SUCCESS;
}

void folder_unlock(folder_guard *guard) {
    if (guard->fd > 0)
        close(guard->fd - 1);
    *guard = (folder_guard){0};
}

clmoe_status folder_make(const char *folder, folder_guard *guard) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(folder_check(folder));
    if (mkdir(folder, 0777) != 0 && errno != EEXIST)
        return cli_fail(CLMOE_IO, "--out '%s' cannot be made: %s", folder, strerror(errno));
    TRY(folder_lock(folder, guard));
    TRY(folder_check(folder));
done:
    return status;
}

static clmoe_status failed(const folder_file *file) {
    return cli_fail(CLMOE_IO, "%s cannot be written: %s", file->path, strerror(errno));
}

clmoe_status folder_begin(folder_file *file, const char *folder, const char *name) {
    clmoe_status status = CLMOE_SUCCESS;
    char temporary[NAME_MAX + 1];
    snprintf(temporary, sizeof temporary, "%.200s.tmp", name);
    TRY(folder_path(folder, name, file->path));
    TRY(folder_path(folder, temporary, file->temporary));
    file->stream = fopen(file->temporary, "wb");
    if (file->stream == NULL)
        return failed(file);
done:
    return status;
}

/* The entry of the folder, too. */
static bool sync_folder(const char *path) {
    char folder[PATH_MAX];
    strcpy(folder, path);
    *strrchr(folder, '/') = '\0';
    const int fd = open(folder[0] == '\0' ? "/" : folder, O_RDONLY | O_CLOEXEC);
    const bool right = fd >= 0 && fsync(fd) == 0;
    if (fd >= 0)
        close(fd);
    return right;
}

clmoe_status folder_end(folder_file *file) {
    clmoe_status status = CLMOE_SUCCESS;
    bool written =
        fflush(file->stream) == 0 && ferror(file->stream) == 0 && fsync(fileno(file->stream)) == 0;
    const int code = errno; /* of what failed first */
    if (fclose(file->stream) != 0)
        written = false;
    else
        errno = code;
    file->stream = NULL;
    if (!written || rename(file->temporary, file->path) != 0 || !sync_folder(file->path))
        status = failed(file);
    if (status == CLMOE_SUCCESS)
        file->temporary[0] = '\0';
    folder_drop(file);
    return status;
}

void folder_drop(folder_file *file) {
    if (file->stream != NULL)
        fclose(file->stream);
    file->stream = NULL;
    if (file->temporary[0] != '\0')
        unlink(file->temporary);
    file->temporary[0] = '\0';
}
