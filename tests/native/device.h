/*
 * An OpenCL device for tests, loaded by the ICD loader through OCL_ICD_VENDORS. Its kernels are
 * native code, so that sanitizers and coverage see them; or they are not run at all, so that
 * nothing but the library's own calls takes time or locks.
 *
 * Commands are done when a call returns, whatever they were to wait for. Buffers begin with junk.
 *
 * Environment:
 *   CLMOE_NATIVE_RUN      a directory for compiled kernels; without it launches do nothing
 *   CLMOE_NATIVE_COMPILE  the command that compiles: COMMAND SOURCE.cl LIBRARY.so OPTIONS
 *   CLMOE_NATIVE_SOURCES  a directory that gets the source of every program that is compiled
 *   CLMOE_NATIVE_TYPE     "gpu" or "cpu" (default): what the device says it is
 *   CLMOE_NATIVE_NVIDIA   the device says it is NVIDIA's, and passes the probes of tensor cores;
 *                         "9.0": of compute capability 9.0, else 8.0
 */
#ifndef NATIVE_DEVICE_H
#define NATIVE_DEVICE_H

#include <stddef.h>

enum { MAX_ARGUMENTS = 96, MAX_ARGUMENT = 1024 };

/* Options of a program come as the first line of its source: SOURCE_OPTIONS "-DGROUP=1". */
#define SOURCE_OPTIONS "// options: "

typedef struct native_program native_program;

/*
 * Writes and compiles as the environment says; NULL and a log on failure. `loaded`: from a binary,
 * whose source CLMOE_NATIVE_SOURCES has already.
 */
native_program *native_build(const char *source, const char *options, int loaded, char *log,
                             size_t log_bytes);
void native_free(native_program *program);

/* Whether the program has the kernel; any name is right where nothing is compiled. */
int native_has_kernel(const native_program *program, const char *name);

/* Runs all groups in order, work-items in turn; arguments are where their values lie. */
void native_launch(const native_program *program, const char *name, void **arguments,
                   const size_t groups[3], const size_t local[3], const size_t offset[3]);

/* The compute capability's first number, 0: the device is none of NVIDIA's. */
int nvidia_major(void);

/* The line of a binary that names its target, where there is one; and how long it is in a text. */
const char *nvidia_target(void);
size_t nvidia_head(const char *text);

/* Computes a probe, cl/experts/gemm/nv_probe.cl or nv_wgmma_probe.cl, of f16 unless `bf16`. */
void nvidia_probe(const char *kernel, void **arguments, int bf16);

#endif
