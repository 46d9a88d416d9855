/* One case: the inputs, the engines on them, and the steps, checked and timed in turns. */
#ifndef BENCH_MEASURE_H
#define BENCH_MEASURE_H

#include "engines.h"
#include "progress.h"
#include "rows.h"

typedef struct measurement {
    const bench_options *options;
    bench_device *device;
    engine_list engines;
    inputs inputs;
    bench_rows rows;
    progress progress;
} measurement;

/* Adds the case's rows. What cannot run here is skipped with a sentence on standard error. */
clmoe_status measure_case(measurement *m, const bench_case *c);

/* Steps of a case that the options choose. */
size_t measure_steps(const measurement *m, const bench_case *c);

#endif
