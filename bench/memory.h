/* The device memory of cases, as the library asks for it. */
#ifndef BENCH_MEMORY_H
#define BENCH_MEMORY_H

#include "options.h"

/* Prints a table of every chosen case and engine, peers left out. Allocates no device memory. */
clmoe_status memory_print(const bench_options *options);

#endif
