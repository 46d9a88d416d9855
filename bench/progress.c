#include "progress.h"

#include <stdio.h>
#include <unistd.h>

enum { BAR = 24 };

void progress_show(const progress *p, const char *case_name, unsigned tokens, const char *what) {
    static const char marks[] = "########################";
    const size_t filled = p->total > 0 ? BAR * p->done / p->total : 0;
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r\033[K[%-*.*s] %zu/%zu %s T=%u %s", BAR, (int)filled, marks, p->done,
                p->total, case_name, tokens, what);
}

void progress_clear(void) {
    if (isatty(STDERR_FILENO))
        fprintf(stderr, "\r\033[K");
}
