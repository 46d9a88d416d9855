/*
 * Builds programs from the embedded kernel sources, once per (step, options) and context, or loads
 * them from the context's disk cache.
 */
#ifndef CLMOE_PROGRAM_H
#define CLMOE_PROGRAM_H

#include "context.h"

/*
 * Creates kernel `name` of cl/STEP.cl ("routing/topk") built with `options` ("-DGATED=1 -DROWS=4";
 * NULL: none). The source list is runtime/types.clh, runtime/group.clh, then the step with #line
 * "cl/step.cl". A step includes further headers of cl/ by a line `#include "experts/gemm/act.clh"`,
 * resolved from the embedded sources. Thread-safe; the kernel is the caller's alone. Errors:
 * CLMOE_UNSUPPORTED if the device cannot run a group of the kernel's size: a smaller one may do.
 */
clmoe_status program_kernel(clmoe_context *context, const char *step, const char *options,
                            const char *name, cl_kernel *kernel);

/*
 * Turns the text of a compiled program, what the driver gives as its binary, into another that the
 * driver loads instead, to be freed; NULL: it is no text that the edit knows. The one error is
 * CLMOE_OUT_OF_MEMORY. `version` stands in the key of the disk cache, which holds the edited text.
 */
typedef struct program_edit {
    const char *version;
    clmoe_status (*apply)(const char *text, char **edited);
} program_edit;

/*
 * The same of an edited program. Errors: CLMOE_BUILD_FAILED too where it cannot be edited, or the
 * driver refuses what came out.
 */
clmoe_status program_kernel_edited(clmoe_context *context, const char *step, const char *options,
                                   const program_edit *edit, const char *name, cl_kernel *kernel);

/* Releases all programs of the context. */
void programs_release(clmoe_context *context);

/* clReleaseKernel that allows NULL and clears the handle. */
void kernel_release(cl_kernel *kernel);

#endif
