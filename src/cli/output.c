#define _XOPEN_SOURCE 700 /* realpath */
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MAX_LINKS = 40, MAX_NAMES = 1000 };

void output_guard_streams(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) == -1)
            open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

/* ---- Checks ---------------------------------------------------------------------------------- */

/* Whether two names are of one file; what is written to /dev/null never meets. */
static bool same_file(const struct stat *a, const struct stat *b) {
    return a->st_dev == b->st_dev && a->st_ino == b->st_ino &&
           (!S_ISCHR(a->st_mode) || isatty(STDOUT_FILENO));
}

static bool is_stdout(const char *path) {
    struct stat file, standard;
    if (strcmp(path, "-") == 0)
        return true;
    return stat(path, &file) == 0 && fstat(STDOUT_FILENO, &standard) == 0 &&
           same_file(&file, &standard);
}

/* The folder of `path`, cut off in place: "." without one. */
static const char *folder_of(char *path) {
    char *slash = strrchr(path, '/');
    if (slash == NULL)
        return ".";
    slash[slash == path] = '\0';
    return path;
}

/* One symbolic link of o->target: *more while it is one. */
static bool follow_link(output *o, bool *more) {
    char link[PATH_MAX], folder[PATH_MAX];
    ssize_t length = readlink(o->target, link, sizeof link - 1);
    *more = length >= 0;
    if (!*more)
        return true;
    link[length] = '\0';
    memcpy(folder, o->target, sizeof folder);
    int bytes = link[0] == '/'
                    ? snprintf(o->target, sizeof o->target, "%s", link)
                    : snprintf(o->target, sizeof o->target, "%s/%s", folder_of(folder), link);
    return bytes > 0 && bytes < (int)sizeof o->target;
}

/* o->target: what a path leads to, which need not exist. */
static bool follow_links(output *o) {
    bool more = true;
    if (strlen(o->path) >= sizeof o->target)
        return false;
    strcpy(o->target, o->path);
    for (int i = 0; i < MAX_LINKS && more; i++)
        if (!follow_link(o, &more))
            return false;
    return !more;
}

/* Root may write to anything, but what is marked as read-only was meant to stay. */
static bool check_permission(const char *what, const char *path, problem *why) {
    struct stat info;
    if (stat(path, &info) != 0)
        return problem_set(why, "%s: %s: %s", what, path, strerror(errno));
    if ((info.st_mode & (S_IWUSR | S_IWGRP | S_IWOTH)) == 0)
        return problem_set(why, "%s: %s is read-only", what, path);
    if (access(path, W_OK) != 0)
        return problem_set(why, "%s: %s cannot be written to: %s", what, path, strerror(errno));
    return true;
}

static bool check_folder(const char *what, const output *o, problem *why) {
    char path[PATH_MAX];
    struct stat info;
    memcpy(path, o->target, sizeof path);
    const char *folder = folder_of(path);
    const char *name = strrchr(o->target, '/');
    if (stat(folder, &info) != 0)
        return problem_set(why, "%s: folder %s: %s", what, folder, strerror(errno));
    if (!S_ISDIR(info.st_mode))
        return problem_set(why, "%s: %s is no folder", what, folder);
    if (name != NULL && name[1] == '\0')
        return problem_set(why, "%s names a folder, not a file", what);
    return check_permission(what, folder, why);
}

/* What exists at the path, behind links. */
static bool check_existing(output *o, const char *what, bool force, problem *why) {
    const mode_t mode = o->replaced.st_mode;
    if (S_ISDIR(mode))
        return problem_set(why, "%s is a folder", what);
    if (S_ISSOCK(mode))
        return problem_set(why, "%s is a socket, which cannot be written to by its name", what);
    o->direct = !S_ISREG(mode);
    if (o->direct)
        return check_permission(what, o->path, why);
    o->exists = o->identified = true;
    if (realpath(o->path, o->target) == NULL)
        return problem_set(why, "%s: %s", what, strerror(errno));
    if (!check_permission(what, o->target, why))
        return false;
    if (!force)
        return problem_set(why, "%s exists already; --force overwrites it", what);
    return check_folder(what, o, why);
}

bool output_check(output *o, const char *option, const char *path, bool force, problem *why) {
    char what[PATH_MAX];
    *o = (output){.path = path};
    snprintf(what, sizeof what, "%s '%.900s'", option, path);
    if (path[0] == '\0')
        return problem_set(why, "%s names no file", what);
    o->to_stdout = is_stdout(path);
    if (o->to_stdout) {
        o->identified = fstat(STDOUT_FILENO, &o->replaced) == 0 && S_ISREG(o->replaced.st_mode);
        return true;
    }
    if (stat(path, &o->replaced) == 0)
        return check_existing(o, what, force, why);
    if (errno != ENOENT)
        return problem_set(why, "%s: %s", what, strerror(errno));
    if (!follow_links(o))
        return problem_set(why, "%s: %s", what, strerror(ENAMETOOLONG));
    return check_folder(what, o, why);
}

/* Whether a file that is not there yet, at o->target, would have the name `path`. */
static bool is_same_name(const output *o, const char *path) {
    char own[PATH_MAX], other[PATH_MAX];
    struct stat a, b;
    if (o->target[0] == '\0' || strlen(path) >= sizeof other)
        return false;
    strcpy(own, o->target);
    strcpy(other, path);
    const char *own_name = strrchr(o->target, '/'), *other_name = strrchr(path, '/');
    own_name = own_name ? own_name + 1 : o->target;
    other_name = other_name ? other_name + 1 : path;
    return strcmp(own_name, other_name) == 0 && stat(folder_of(own), &a) == 0 &&
           stat(folder_of(other), &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

bool output_is_file(const output *o, const char *path) {
    struct stat file;
    if (o->path == NULL || o->direct)
        return false;
    const bool standard = strcmp(path, "-") == 0;
    const bool there = standard ? fstat(STDIN_FILENO, &file) == 0 : stat(path, &file) == 0;
    if (o->identified)
        return there && file.st_dev == o->replaced.st_dev && file.st_ino == o->replaced.st_ino;
    return !there && !standard && is_same_name(o, path);
}

/* ---- Writing --------------------------------------------------------------------------------- */

/* A new file in the folder of the target. */
static int open_temporary(output *o) {
    char path[PATH_MAX];
    int fd = -1;
    memcpy(path, o->target, sizeof path);
    const char *folder = folder_of(path);
    for (unsigned i = 0; i < MAX_NAMES && fd < 0; i++) {
        int bytes = snprintf(o->temporary, sizeof o->temporary, "%s/.clmoe-%ld-%u", folder,
                             (long)getpid(), i);
        if (bytes < 0 || bytes >= (int)sizeof o->temporary)
            errno = ENAMETOOLONG;
        else
            fd = open(o->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (fd < 0 && errno != EEXIST)
            break;
    }
    if (fd < 0)
        o->temporary[0] = '\0';
    return fd;
}

/* Mode and owner of the file that is replaced, as far as this user may give them. */
static bool keep_owner(const output *o, int fd) {
    struct stat info;
    if (!o->exists)
        return true;
    bool others = fstat(fd, &info) == 0 &&
                  (info.st_uid != o->replaced.st_uid || info.st_gid != o->replaced.st_gid);
    mode_t mode = o->replaced.st_mode & 07777;
    if (others && fchown(fd, o->replaced.st_uid, o->replaced.st_gid) != 0)
        mode &= 0777; /* not as another user */
    return fchmod(fd, mode) == 0;
}

FILE *output_open(output *o, problem *why) {
    if (o->to_stdout) {
        o->stream = stdout;
        return o->stream;
    }
    int fd = o->direct ? open(o->path, O_WRONLY | O_NOCTTY | O_CLOEXEC) : open_temporary(o);
    if (fd >= 0 && (o->direct || keep_owner(o, fd)))
        o->stream = fdopen(fd, "wb");
    if (o->stream != NULL)
        return o->stream;
    problem_set(why, "%s cannot be opened for writing: %s", o->path, strerror(errno));
    if (fd >= 0)
        close(fd);
    output_drop(o);
    return NULL;
}

/* A new name is never taken over another file, which may have come since the check. */
static bool rename_temporary(output *o) {
    if (!o->exists && link(o->temporary, o->target) == 0) {
        unlink(o->temporary);
        return true;
    }
    if (!o->exists && errno == EEXIST)
        return false;
    return rename(o->temporary, o->target) == 0;
}

bool output_close(output *o, problem *why) {
    const char *name = o->to_stdout ? "standard output" : o->path;
    bool written = fflush(o->stream) == 0 && ferror(o->stream) == 0;
    int code = errno;
    if (!o->to_stdout && fclose(o->stream) != 0 && written) {
        written = false;
        code = errno;
    }
    o->stream = NULL;
    if (!written)
        problem_set(why, "%s cannot be written: %s", name, strerror(code));
    if (written && o->temporary[0] != '\0' && !rename_temporary(o)) {
        problem_set(why, "%s cannot be put in its place: %s; what was written is %s", name,
                    strerror(errno), o->temporary);
        o->temporary[0] = '\0';
        return false;
    }
    if (written)
        o->temporary[0] = '\0';
    output_drop(o);
    return written;
}

void output_drop(output *o) {
    if (o->stream != NULL && !o->to_stdout)
        fclose(o->stream);
    o->stream = NULL;
    if (o->temporary[0] != '\0')
        unlink(o->temporary);
    o->temporary[0] = '\0';
}
