/* The disk cache of compiled programs: one file per key in the caller's directory. */
#ifndef CLMOE_CACHE_H
#define CLMOE_CACHE_H

#include "status.h"

/* Changes whenever files written before must not be used any more. */
#define CACHE_FORMAT 2

/* Room for a sentence that says why the cache was of no use. */
#define CACHE_PROBLEM_SIZE 512

/* Makes `problem` the sentence "program cache: PATH ...", if it was empty. */
void cache_complain(char problem[CACHE_PROBLEM_SIZE], const char *path, const char *format, ...)
    CLMOE_PRINTF(3);

/*
 * The binary stored under `key`, to be freed, and its size; NULL if there is none. A file that is
 * not exactly what cache_write() writes for this key is not used: `problem` then gets a sentence,
 * if it was empty.
 */
void *cache_read(const char *directory, const char *key, size_t key_size, size_t *binary_size,
                 char problem[CACHE_PROBLEM_SIZE]);

/*
 * Stores a binary in place of what is there. Creates the directory, but not its parents. `problem`
 * gets a sentence if that failed and it was empty.
 */
void cache_write(const char *directory, const char *key, size_t key_size, const void *binary,
                 size_t binary_size, char problem[CACHE_PROBLEM_SIZE]);

#endif
