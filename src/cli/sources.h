/*
 * Kernels that are part of a program, in arrays that embed_kernels() of cmake/kernels.cmake makes,
 * ended by a NULL name.
 */
#ifndef CLMOE_CLI_SOURCES_H
#define CLMOE_CLI_SOURCES_H

typedef struct kernel_source {
    const char *name; /* "fill.cl" */
    const char *text;
} kernel_source;

extern const kernel_source force_sources[]; /* random.clh, force.cl */
extern const kernel_source train_sources[]; /* train/types.clh and the kernels beside it */
extern const kernel_source bench_sources[]; /* clmoe-bench's */

#endif
