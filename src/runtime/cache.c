/*
 * A file holds a header, the key and the binary. Drivers crash on damaged binaries, so no byte goes
 * to one unchecked: the header must be the one that cache_write() makes for this key and this
 * binary, and the key must be equal. The checksum is against damage, not against an author: a file
 * that others could have written is not read at all. Files appear by rename, so readers and writers
 * need no lock.
 */
#include "cache.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_FILE_SIZE ((size_t)64 << 20)
#define MAX_PATH_SIZE 4096

typedef struct hash128 {
    uint64_t high, low;
} hash128;

typedef struct file_header {
    char magic[8];
    uint64_t format, key_size, binary_size;
    hash128 checksum; /* of the binary */
} file_header;

/* A bijection of words for every state: one changed word always shows. */
static uint64_t mix(uint64_t state, uint64_t word) {
    const uint64_t product = (state ^ word) * 0x9e3779b97f4a7c15u; /* 2^64 by the golden ratio */
    return product << 29 | product >> 35;
}

static hash128 hash_of(const void *data, size_t size) {
    const unsigned char *bytes = data;
    hash128 h = {size, ~(uint64_t)size};
    for (size_t i = 0; i < size; i += sizeof h) {
        uint64_t words[2] = {0, 0};
        memcpy(words, bytes + i, size - i < sizeof words ? size - i : sizeof words);
        h.high = mix(h.high, words[0]);
        h.low = mix(h.low, words[1]);
    }
    h.high = mix(h.high, h.low);
    h.low = mix(h.low, h.high);
    return h;
}

static file_header header_of(size_t key_size, const void *binary, size_t binary_size) {
    return (file_header){.magic = "clmoe",
                         .format = CACHE_FORMAT,
                         .key_size = key_size,
                         .binary_size = binary_size,
                         .checksum = hash_of(binary, binary_size)};
}

void cache_complain(char problem[CACHE_PROBLEM_SIZE], const char *path, const char *format, ...) {
    char words[160];
    va_list args;
    if (problem[0] != '\0')
        return;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    snprintf(problem, CACHE_PROBLEM_SIZE, "program cache: %.*s %s", 320, path, words);
}

static void complain_errno(char problem[CACHE_PROBLEM_SIZE], const char *path, const char *what) {
    cache_complain(problem, path, "cannot be %s: %s", what, strerror(errno));
}

/* DIRECTORY/HASH SUFFIX; two keys of one hash only replace each other's file. */
static bool file_path(char path[MAX_PATH_SIZE], const char *directory, const char *key,
                      size_t key_size, const char *suffix) {
    hash128 name = hash_of(key, key_size);
    int length = snprintf(path, MAX_PATH_SIZE, "%s/%016llx%016llx%s", directory,
                          (unsigned long long)name.high, (unsigned long long)name.low, suffix);
    return length > 0 && length < MAX_PATH_SIZE;
}

/* Whether the directory is there and is one, not a link to one. */
static bool directory_usable(const char *directory, char problem[CACHE_PROBLEM_SIZE]) {
    struct stat info;
    if (lstat(directory, &info) != 0) {
        if (errno != ENOENT)
            complain_errno(problem, directory, "used");
        return false;
    }
    if (!S_ISDIR(info.st_mode)) {
        cache_complain(problem, directory, "is not a directory");
        return false;
    }
    return true;
}

/* A regular file of a sensible size that nobody but its trusted owner can have written. */
static bool file_acceptable(int file, size_t *size) {
    struct stat info;
    if (fstat(file, &info) != 0 || !S_ISREG(info.st_mode))
        return false;
    if ((info.st_uid != geteuid() && info.st_uid != 0) || info.st_mode & (S_IWGRP | S_IWOTH))
        return false;
    if (info.st_size <= 0 || (uintmax_t)info.st_size > MAX_FILE_SIZE)
        return false;
    *size = (size_t)info.st_size;
    return true;
}

static bool read_all(int file, unsigned char *to, size_t size) {
    while (size > 0) {
        ssize_t n = read(file, to, size);
        if (n <= 0)
            return false;
        to += n;
        size -= (size_t)n;
    }
    return true;
}

static bool write_all(int file, const void *from, size_t size) {
    const unsigned char *bytes = from;
    while (size > 0) {
        ssize_t n = write(file, bytes, size);
        if (n <= 0)
            return false;
        bytes += n;
        size -= (size_t)n;
    }
    return true;
}

/* The binary in an open file, or NULL. Sizes come from the file system and the key alone. */
static void *read_binary(int file, const char *key, size_t key_size, size_t *binary_size) {
    size_t file_size = 0, front = sizeof(file_header) + key_size;
    unsigned char *content = NULL;
    bool good = false;
    if (!file_acceptable(file, &file_size) || file_size <= front)
        return NULL;
    content = malloc(file_size);
    if (content && read_all(file, content, file_size)) {
        file_header want = header_of(key_size, content + front, file_size - front);
        good = memcmp(content, &want, sizeof want) == 0 &&
               memcmp(content + sizeof want, key, key_size) == 0;
    }
    if (!good) {
        free(content);
        return NULL;
    }
    *binary_size = file_size - front;
    memmove(content, content + front, *binary_size);
    return content;
}

void *cache_read(const char *directory, const char *key, size_t key_size, size_t *binary_size,
                 char problem[CACHE_PROBLEM_SIZE]) {
    char path[MAX_PATH_SIZE];
    if (!file_path(path, directory, key, key_size, "") || !directory_usable(directory, problem))
        return NULL;
    /* O_NONBLOCK: a FIFO must not keep us waiting for its writer. */
    int file = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) {
        if (errno != ENOENT)
            complain_errno(problem, path, "read");
        return NULL;
    }
    void *binary = read_binary(file, key, key_size, binary_size);
    if (!binary)
        cache_complain(problem, path, "is damaged or foreign and is replaced");
    close(file);
    return binary;
}

/* A new file of mode 0600, written and closed; false leaves nothing behind. */
static bool write_file(char *path, const file_header *header, const char *key, const void *binary) {
    int file = mkstemp(path);
    if (file < 0)
        return false;
    fcntl(file, F_SETFD, FD_CLOEXEC);
    bool good = write_all(file, header, sizeof *header) && write_all(file, key, header->key_size) &&
                write_all(file, binary, header->binary_size);
    int code = good ? 0 : errno;
    if (close(file) != 0 && good) {
        good = false;
        code = errno;
    }
    if (!good)
        unlink(path);
    errno = code;
    return good;
}

void cache_write(const char *directory, const char *key, size_t key_size, const void *binary,
                 size_t binary_size, char problem[CACHE_PROBLEM_SIZE]) {
    char path[MAX_PATH_SIZE], temporary[MAX_PATH_SIZE];
    const size_t front = sizeof(file_header) + key_size;
    if (front >= MAX_FILE_SIZE || binary_size > MAX_FILE_SIZE - front) {
        cache_complain(problem, directory, "does not take a program of %zu bytes", binary_size);
        return;
    }
    if (!file_path(path, directory, key, key_size, "") ||
        !file_path(temporary, directory, key, key_size, ".XXXXXX")) {
        cache_complain(problem, directory, "is too long a name");
        return;
    }
    if (mkdir(directory, 0700) != 0 && errno != EEXIST) {
        complain_errno(problem, directory, "created");
        return;
    }
    if (!directory_usable(directory, problem))
        return;
    file_header header = header_of(key_size, binary, binary_size);
    if (!write_file(temporary, &header, key, binary)) {
        complain_errno(problem, directory, "written to");
    } else if (rename(temporary, path) != 0) {
        complain_errno(problem, path, "replaced");
        unlink(temporary);
    }
}
