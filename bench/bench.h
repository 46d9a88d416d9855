/* What the files of clmoe-bench share. It uses the library's public API alone. */
#ifndef BENCH_H
#define BENCH_H

#include "../src/cli/error.h"

#include <stdbool.h>
#include <stdio.h>

#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

clmoe_status bench_no_memory(const char *what);

/* An error once a signal came: what is done by then is kept. */
clmoe_status bench_go_on(void);

#endif
