/* A bar on standard error, where that is a terminal. */
#ifndef BENCH_PROGRESS_H
#define BENCH_PROGRESS_H

#include <stddef.h>

typedef struct progress {
    size_t total, done;
} progress;

/* Shows what comes next; `done` of `total` is finished. */
void progress_show(const progress *p, const char *case_name, unsigned tokens, const char *what);

/* Clears the line, for other output. */
void progress_clear(void);

#endif
