/* Start times: context and layer created in fresh processes, without and with caches. */
#ifndef BENCH_COLD_H
#define BENCH_COLD_H

#include "options.h"
#include "rows.h"

/*
 * Adds rows of every engine for the first chosen case: create_cold with all caches empty,
 * create_warm with what that left in the driver's caches, create_cached with clmoe's program cache
 * alone. To be called before anything of OpenCL: it forks, and moves the drivers' caches.
 */
clmoe_status cold_measure(const bench_options *options, bench_rows *rows);

#endif
