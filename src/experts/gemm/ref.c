/* The naive engine: one work-item per element of the output, on any device. */
#include "kernel.h"
#include "runtime/program.h"

#include <stdlib.h>

typedef struct ref_state {
    size_t group; /* work-items per group, columns of C */
    cl_kernel kernels[GEMM_VARIANTS];
} ref_state;

static clmoe_status ref_supports(clmoe_context *context) {
    (void)context;
    return CLMOE_SUCCESS;
}

static void ref_destroy(void *opaque) {
    ref_state *state = opaque;
    if (!state)
        return;
    for (int i = 0; i < GEMM_VARIANTS; i++)
        kernel_release(&state->kernels[i]);
    free(state);
}

static clmoe_status ref_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    ref_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the ref engine");
    TRY(gemm_kernels_by_column(context, shape, "experts/gemm/ref", "gemm_ref", state->kernels,
                               &state->group));
    *out = state;
    state = NULL;
done:
    ref_destroy(state);
    return status;
}

static uint32_t ref_row_tile(const clmoe_context *context, uint32_t rows_per_expert) {
    (void)context;
    (void)rows_per_expert;
    return 1;
}

static clmoe_status ref_run(void *opaque, launch *chain, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const ref_state *state = opaque;
    cl_kernel kernel = state->kernels[gemm_variant_of(problem->form)];
    const size_t groups[] = {problem->slots, gemm_tiles(problem->n, state->group)};
    const size_t local[] = {1, state->group};
    TRY(gemm_kernel_set(kernel, problem, problem->row_tile));
    TRY(launch_bounded(chain, kernel, 2, groups, local, gemm_work(problem, 1, state->group)));
done:
    return status;
}

typedef struct ref_gradient {
    size_t group;
    cl_kernel kernel;
} ref_gradient;

static void gradient_destroy(void *opaque) {
    ref_gradient *state = opaque;
    if (!state)
        return;
    kernel_release(&state->kernel);
    free(state);
}

static clmoe_status gradient_create(clmoe_context *context, const gemm_gradient_shape *shape,
                                    void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    ref_gradient *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the ref engine");
    TRY(gemm_gradient_by_column(context, shape, "experts/gemm/ref_gradient", "gradient_ref",
                                &state->kernel, &state->group));
    *out = state;
    state = NULL;
done:
    gradient_destroy(state);
    return status;
}

static clmoe_status gradient_run(void *opaque, launch *chain, const gemm_gradient *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const ref_gradient *state = opaque;
    const size_t groups[] = {problem->m, gemm_tiles(problem->n, state->group), problem->experts};
    const size_t local[] = {1, state->group, 1};
    TRY(gemm_gradient_set(state->kernel, problem));
    TRY(launch_bounded(chain, state->kernel, 3, groups, local,
                       (uint64_t)problem->slots * state->group));
done:
    return status;
}

static const gemm_gradient_engine ref_gradient_engine = {
    .gathers = true,
    .create = gradient_create,
    .destroy = gradient_destroy,
    .scratch = gemm_gradient_no_scratch,
    .run = gradient_run,
};

const gemm_engine gemm_ref = {
    .name = "ref",
    .gathers = true,
    .supports = ref_supports,
    .create = ref_create,
    .destroy = ref_destroy,
    .row_tile = ref_row_tile,
    .scratch = gemm_no_scratch,
    .run = ref_run,
    .gradient = &ref_gradient_engine,
};
