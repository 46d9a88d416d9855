/* The engine for CPU devices: a register tile per work-item, weights as they lie in memory. */
#include "../program.h"
#include "kernel.h"

#include <stdio.h>
#include <stdlib.h>

enum { COLUMNS = 32, MAX_ROW_TILE = 32, MIN_ROW_TILE = 4 }; /* COLUMNS: of cl/gemm_cpu.cl */

typedef struct cpu_state {
    cl_kernel kernels[GEMM_VARIANTS][2]; /* by form, and by TRANSPOSED; NULL where not asked for */
} cpu_state;

static clmoe_status cpu_supports(const clmoe_context *context) {
    if (device_is_cpu(&context->info))
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED, "engine cpu needs a CPU device, but %s is none",
                context->info.name);
}

static void cpu_destroy(void *opaque) {
    cpu_state *state = opaque;
    if (!state)
        return;
    for (int i = 0; i < GEMM_VARIANTS; i++)
        for (int j = 0; j < 2; j++)
            kernel_release(&state->kernels[i][j]);
    free(state);
}

static unsigned vector_width(const clmoe_context *context) {
    const cl_uint native = context->info.vector_width;
    return native >= 16 ? 16 : native >= 8 ? 8 : 4;
}

/*
 * Whether some problem of `shape` needs a variant. Ungated with weights along k: the router. Where
 * a matrix has one row or column, both orders are the same; then every order is compiled.
 */
static bool needs(const gemm_shape *shape, gemm_variant variant, bool transposed) {
    const bool first = variant == gemm_variant_of(shape->form);
    const bool any_order = shape->dim == 1 || shape->hidden_dim == 1;
    if (variant == GEMM_GATE_AND_UP)
        return first && (any_order || transposed == shape->gate_up_transposed);
    return !transposed || any_order || shape->down_transposed ||
           (first && shape->gate_up_transposed);
}

static clmoe_status compile(clmoe_context *context, const gemm_shape *shape, cpu_state *state,
                            gemm_variant variant, bool transposed) {
    char options[64];
    snprintf(options, sizeof options, "-DGATED=%d -DTRANSPOSED=%d -DWIDTH=%u",
             variant == GEMM_GATE_AND_UP, transposed, vector_width(context));
    return gemm_kernel_create(context, shape, "gemm_cpu", options, "gemm_cpu",
                              &state->kernels[variant][transposed]);
}

static clmoe_status cpu_create(clmoe_context *context, const gemm_shape *shape, void **out) {
    clmoe_status status = CLMOE_SUCCESS;
    cpu_state *state = calloc(1, sizeof *state);
    if (!state)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the cpu engine");
    for (int variant = 0; variant < GEMM_VARIANTS; variant++)
        for (int transposed = 0; transposed < 2; transposed++)
            if (needs(shape, (gemm_variant)variant, transposed))
                TRY(compile(context, shape, state, (gemm_variant)variant, transposed));
    *out = state;
    state = NULL;
done:
    cpu_destroy(state);
    return status;
}

/* Longer tiles read each weight less often; shorter ones pad less. */
static uint32_t cpu_row_tile(const clmoe_context *context, uint32_t rows_per_expert) {
    uint32_t tile = MIN_ROW_TILE;
    (void)context;
    while (tile < rows_per_expert && tile < MAX_ROW_TILE)
        tile *= 2;
    return tile;
}

static clmoe_status cpu_run(void *opaque, launch *chain, const gemm_problem *problem) {
    clmoe_status status = CLMOE_SUCCESS;
    const cpu_state *state = opaque;
    const bool transposed = problem->up.col != 1;
    const uint32_t row_tile =
        problem->tile_expert.mem ? problem->row_tile : cpu_row_tile(NULL, problem->slots);
    const size_t groups[] = {gemm_tiles(problem->slots, row_tile), gemm_tiles(problem->n, COLUMNS)};
    const size_t local[] = {1, 1};
    cl_kernel kernel = state->kernels[gemm_variant_of(problem->form)][transposed];
    if (!kernel || (transposed && problem->up.row > (problem->form == GEMM_GATED ? 2 : 1)))
        return fail(CLMOE_UNSUPPORTED,
                    "engine cpu was not created for weights of stride %llu, %llu",
                    (unsigned long long)problem->up.row, (unsigned long long)problem->up.col);
    TRY(gemm_kernel_set(kernel, problem, row_tile));
    TRY(launch_kernel(chain, kernel, 2, groups, local));
done:
    return status;
}

const gemm_engine gemm_cpu = {
    .name = "cpu",
    .gathers = true,
    .supports = cpu_supports,
    .create = cpu_create,
    .destroy = cpu_destroy,
    .row_tile = cpu_row_tile,
    .scratch = gemm_no_scratch,
    .run = cpu_run,
};
