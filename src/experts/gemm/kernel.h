/* What the engines share that run kernels of their own. */
#ifndef CLMOE_GEMM_KERNEL_H
#define CLMOE_GEMM_KERNEL_H

#include "experts/gemm/gemm.clh"
#include "gemm.h"
#include "runtime/program.h"

/* Kernels of one engine by form; the variants of both are compiled as the shape asks. */
typedef enum gemm_variant { GEMM_UNGATED, GEMM_GATE_AND_UP, GEMM_VARIANTS } gemm_variant;

static inline gemm_variant gemm_variant_of(gemm_form form) {
    return form == GEMM_GATED ? GEMM_GATE_AND_UP : GEMM_UNGATED;
}

/* Creates kernel `name` of cl/STEP.cl for a variant, with `options` and the shape's storage types.
 */
clmoe_status gemm_kernel_create(clmoe_context *context, const gemm_shape *shape,
                                gemm_variant variant, const char *step, const char *options,
                                const char *name, cl_kernel *kernel);

/* With `options` and the shape's storage types alone; of an edited program, NULL: not edited. */
clmoe_status gemm_kernel_create_edited(clmoe_context *context, const gemm_shape *shape,
                                       const char *step, const char *options,
                                       const program_edit *edit, const char *name,
                                       cl_kernel *kernel);

/*
 * Kernels with a work-item per element of C, by form: groups of *group columns, as many as the
 * device takes.
 */
clmoe_status gemm_kernels_by_column(clmoe_context *context, const gemm_shape *shape,
                                    const char *step, const char *name,
                                    cl_kernel kernels[GEMM_VARIANTS], size_t *group);

/* Kernels by form, by whether W lies transposed, and by tile; NULL: the shape asks for none. */
enum { GEMM_TILES = 3 };
typedef struct gemm_tile_kernels {
    cl_kernel of[GEMM_VARIANTS][2][GEMM_TILES];
} gemm_tile_kernels;

void gemm_tile_kernels_release(gemm_tile_kernels *kernels);

/* The one for a problem; where W has one element along a dimension, either order may be there. */
cl_kernel gemm_tile_kernel(const gemm_tile_kernels *kernels, const gemm_problem *problem, int tile);

/* As kernels take it. */
z_place gemm_z_place(const gemm_z *z);

/* Sets the parameters GEMM_PARAMETERS of cl/experts/gemm/gemm.clh, with `row_tile` as the
 * problem's. */
clmoe_status gemm_kernel_set(cl_kernel kernel, const gemm_problem *problem, uint32_t row_tile);

/* The same, and behind them `count` arguments, up to GEMM_MORE_ARGS, of the kernel's own. */
enum { GEMM_MORE_ARGS = 6 };
clmoe_status gemm_kernel_set_more(cl_kernel kernel, const gemm_problem *problem, uint32_t row_tile,
                                  size_t count, const kernel_arg *more);

/* Multiply-adds of a work-group that computes `rows` by `columns` of C. */
static inline uint64_t gemm_work(const gemm_problem *problem, uint32_t rows, size_t columns) {
    return (uint64_t)rows * columns * problem->k * (problem->form == GEMM_GATED ? 2 : 1);
}

/* How many tiles cover `count`. */
static inline size_t gemm_tiles(size_t count, size_t tile) {
    return count / tile + (count % tile != 0);
}

/* The same for gradients of weights: cl/experts/gemm/gradient.clh. */
clmoe_status gemm_gradient_kernel_edited(clmoe_context *context, const gemm_gradient_shape *shape,
                                         const char *step, const char *options,
                                         const program_edit *edit, const char *name,
                                         cl_kernel *kernel);
clmoe_status gemm_gradient_kernel(clmoe_context *context, const gemm_gradient_shape *shape,
                                  const char *step, const char *options, const char *name,
                                  cl_kernel *kernel);
clmoe_status gemm_gradient_by_column(clmoe_context *context, const gemm_gradient_shape *shape,
                                     const char *step, const char *name, cl_kernel *kernel,
                                     size_t *group);
clmoe_status gemm_gradient_set(cl_kernel kernel, const gemm_gradient *problem);
size_t gemm_gradient_no_scratch(const void *state, uint32_t experts, size_t slots, uint32_t m,
                                uint32_t n);

/* gemm_engine.scratch of an engine that needs none. */
size_t gemm_no_scratch(const gemm_shape *shape, size_t slots, uint32_t n, gemm_form form);

#endif
