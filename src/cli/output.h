/*
 * The one rule for whatever a tool writes, shared with clmoe-bench. "-" is standard output. What is
 * not a regular file (a device, a FIFO, /dev/stdout) is written to as it is. Symbolic links are
 * followed, and stay. A regular file is written beside and renamed, so that it is whole or as it
 * was; one that exists needs `force`, and keeps its mode and owner; one that nobody may write to is
 * refused, also for root.
 */
#ifndef CLMOE_CLI_OUTPUT_H
#define CLMOE_CLI_OUTPUT_H

#include "problem.h"

#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>

/* Start from {0}. */
typedef struct output {
    const char *path; /* as given; NULL: there is no such output */
    bool to_stdout;
    bool direct;           /* not a regular file */
    bool exists;           /* a regular file, to be replaced */
    bool identified;       /* `replaced` is of a regular file, standard output's too */
    struct stat replaced;  /* of it */
    char target[PATH_MAX]; /* a regular file: what links lead to */
    char temporary[PATH_MAX];
    FILE *stream;
} output;

/* Called first: no file that is opened becomes a standard stream that the caller has closed. */
void output_guard_streams(void);

/*
 * Whether `path` can be written as far as can be told, before work whose result would be lost.
 * `option` begins the sentence: "--output PATH exists already ...". Changes nothing.
 */
bool output_check(output *o, const char *option, const char *path, bool force, problem *why);

/*
 * Whether that is the file `path`, by whatever name, or would become it; "-" is standard input.
 * Only after output_check().
 */
bool output_is_file(const output *o, const char *path);

/* The stream to write to, or NULL. */
FILE *output_open(output *o, problem *why);

/*
 * Puts what was written in its place. False if any of it failed: a regular file is then as it was
 * before.
 */
bool output_close(output *o, problem *why);

/* After an error: what was begun goes. Allowed on {0} and after output_close(). */
void output_drop(output *o);

#endif
