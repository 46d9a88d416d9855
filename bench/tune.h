/* Tile sizes for the library's engines, found by measurement. */
#ifndef BENCH_TUNE_H
#define BENCH_TUNE_H

#include "options.h"

/*
 * Tries the sizes of every chosen engine on the first chosen case, prints what was measured, and
 * writes the best into options->file, a tuning file of clmoe_context_options: entries of other
 * devices and engines stay in it.
 */
clmoe_status tune(bench_options *options);

#endif
