/* The host's side of cl/experts/gemm/gemm.clh. */
#include "kernel.h"
#include "experts/gemm/act.clh"
#include "runtime/program.h"

#include <stdio.h>
#include <string.h>

_Static_assert((int)CLMOE_ACT_SILU == ACT_SILU, "silu has another number");
_Static_assert((int)CLMOE_ACT_GELU_ERF == ACT_GELU_ERF, "gelu by erf has another number");
_Static_assert((int)CLMOE_ACT_GELU_TANH == ACT_GELU_TANH, "gelu by tanh has another number");
_Static_assert((int)CLMOE_ACT_RELU == ACT_RELU, "relu has another number");
_Static_assert((int)CLMOE_ACT_RELU2 == ACT_RELU2, "relu2 has another number");
_Static_assert((int)GEMM_ROW_WEIGHT_INPUT == ROW_WEIGHT_INPUT, "row weights differ");
_Static_assert((int)GEMM_ROW_WEIGHT_OUTPUT == ROW_WEIGHT_OUTPUT, "row weights differ");

enum { MAX_COLUMN_GROUP = 64 };

/* z is of the first product of an MLP: the second shares a program with layers that keep none. */
static bool keeps_z(const gemm_shape *shape, gemm_variant variant) {
    return shape->training && shape->form != GEMM_LINEAR && variant == gemm_variant_of(shape->form);
}

clmoe_status gemm_kernel_create(clmoe_context *context, const gemm_shape *shape,
                                gemm_variant variant, const char *step, const char *options,
                                const char *name, cl_kernel *kernel) {
    char more[128];
    snprintf(more, sizeof more, "%s -DGATED=%d -DKEEP_Z=%d", options, variant == GEMM_GATE_AND_UP,
             keeps_z(shape, variant));
    return gemm_kernel_create_edited(context, shape, step, more, NULL, name, kernel);
}

clmoe_status gemm_kernel_create_edited(clmoe_context *context, const gemm_shape *shape,
                                       const char *step, const char *options,
                                       const program_edit *edit, const char *name,
                                       cl_kernel *kernel) {
    char all[320];
    snprintf(all, sizeof all, "%s -DA=%s -DW=%s -DBIAS=%s -DC=%s", options,
             type_name(shape->a_type), type_name(shape->w_type), type_name(shape->bias_type),
             type_name(shape->c_type));
    return program_kernel_edited(context, step, all, edit, name, kernel);
}

static clmoe_status by_column(clmoe_context *context, const gemm_shape *shape, const char *step,
                              const char *name, cl_kernel kernels[GEMM_VARIANTS], size_t group) {
    clmoe_status status = CLMOE_SUCCESS;
    const int last = shape->form == GEMM_GATED ? GEMM_GATE_AND_UP : GEMM_UNGATED;
    for (int variant = GEMM_UNGATED; variant <= last; variant++) {
        char options[64];
        snprintf(options, sizeof options, "-DGROUP=%zu", group);
        kernel_release(&kernels[variant]);
        TRY(gemm_kernel_create(context, shape, (gemm_variant)variant, step, options, name,
                               &kernels[variant]));
    }
done:
    return status;
}

clmoe_status gemm_kernels_by_column(clmoe_context *context, const gemm_shape *shape,
                                    const char *step, const char *name,
                                    cl_kernel kernels[GEMM_VARIANTS], size_t *group) {
    const error_sentence kept = error_keep();
    clmoe_status status = CLMOE_SUCCESS;
    size_t most = MAX_COLUMN_GROUP;
    while (!device_takes_group(&context->info, 1, most))
        most /= 2;
    do {
        *group = most;
        status = by_column(context, shape, step, name, kernels, most);
        most /= 2;
    } while (status == CLMOE_UNSUPPORTED && most > 0);
    if (status == CLMOE_SUCCESS)
        error_put_back(&kept);
    return status;
}

void gemm_tile_kernels_release(gemm_tile_kernels *kernels) {
    for (int variant = 0; variant < GEMM_VARIANTS; variant++)
        for (int tile = 0; tile < GEMM_TILES; tile++) {
            kernel_release(&kernels->of[variant][0][tile]);
            kernel_release(&kernels->of[variant][1][tile]);
        }
}

cl_kernel gemm_tile_kernel(const gemm_tile_kernels *kernels, const gemm_problem *problem,
                           int tile) {
    const bool transposed = problem->up.col != 1;
    const gemm_variant variant = gemm_variant_of(problem->form);
    cl_kernel kernel = kernels->of[variant][transposed][tile];
    return kernel ? kernel : kernels->of[variant][!transposed][tile];
}

z_place gemm_z_place(const gemm_z *z) {
    return (z_place){.row = z->row,
                     .step = z->step,
                     .by_pair = z->by_pair,
                     .up_low = (uint32_t)z->up,
                     .up_high = (uint32_t)(z->up >> 32)};
}

clmoe_status gemm_kernel_set_more(cl_kernel kernel, const gemm_problem *problem, uint32_t row_tile,
                                  size_t count, const kernel_arg *more) {
    const gemm_weight *up = &problem->up;
    const gemm_weight none = {.row = up->row, .col = up->col, .expert = up->expert};
    const gemm_weight *gate = problem->form == GEMM_GATED ? &problem->gate : &none;
    const int activation = problem->form == GEMM_LINEAR ? ACT_NONE : (int)problem->activation;

    if (gate->row != up->row || gate->col != up->col || gate->expert != up->expert)
        return fail(CLMOE_UNSUPPORTED, "gate and up have different strides");
    const z_place z_at = gemm_z_place(&problem->z_at);
    const kernel_arg shared[] = {ARG_F32(problem->tile_expert),
                                 ARG_F32(problem->offsets),
                                 ARG_F32(problem->kept),
                                 ARG_UINT(problem->slots),
                                 ARG_UINT(row_tile),
                                 ARG_TYPE(problem->a, problem->a_type),
                                 ARG_F32(problem->token_of),
                                 ARG_AS(gate, ARG_TYPE(gate->buf, problem->w_type)),
                                 ARG_AS(up, ARG_TYPE(up->buf, problem->w_type)),
                                 ARG_TYPE(gate->bias, problem->bias_type),
                                 ARG_TYPE(up->bias, problem->bias_type),
                                 ARG_AS(w_expert, ARG_ULONG(up->expert)),
                                 ARG_AS(w_row, ARG_ULONG(up->row)),
                                 ARG_AS(w_col, ARG_ULONG(up->col)),
                                 ARG_ULONG(up->bias_expert),
                                 ARG_ULONG(up->bias_row),
                                 ARG_UINT(problem->n),
                                 ARG_UINT(problem->k),
                                 ARG_UINT((uint32_t)activation),
                                 ARG_FLOAT(problem->limit),
                                 ARG_FLOAT(problem->alpha),
                                 ARG_FLOAT(problem->up_shift),
                                 ARG_UINT((uint32_t)problem->row_weight),
                                 ARG_F32(problem->pair_of),
                                 ARG_F32(problem->pair_weights),
                                 ARG_TYPE(problem->c, problem->c_type),
                                 ARG_UINT(problem->accumulate),
                                 ARG_TYPE(problem->z, problem->c_type),
                                 ARG_STRUCT(z_at)};
    kernel_arg all[sizeof shared / sizeof shared[0] + GEMM_MORE_ARGS];
    memcpy(all, shared, sizeof shared);
    for (size_t i = 0; i < count; i++)
        all[sizeof shared / sizeof shared[0] + i] = more[i];
    return kernel_set(kernel, sizeof shared / sizeof shared[0] + count, all);
}

clmoe_status gemm_kernel_set(cl_kernel kernel, const gemm_problem *problem, uint32_t row_tile) {
    return gemm_kernel_set_more(kernel, problem, row_tile, 0, NULL);
}

clmoe_status gemm_gradient_kernel_edited(clmoe_context *context, const gemm_gradient_shape *shape,
                                         const char *step, const char *options,
                                         const program_edit *edit, const char *name,
                                         cl_kernel *kernel) {
    char all[192];
    snprintf(all, sizeof all, "%s -DP=%s -DQ=%s -DC=%s", options, type_name(shape->p_type),
             type_name(shape->q_type), type_name(shape->c_type));
    return program_kernel_edited(context, step, all, edit, name, kernel);
}

clmoe_status gemm_gradient_kernel(clmoe_context *context, const gemm_gradient_shape *shape,
                                  const char *step, const char *options, const char *name,
                                  cl_kernel *kernel) {
    return gemm_gradient_kernel_edited(context, shape, step, options, NULL, name, kernel);
}

clmoe_status gemm_gradient_by_column(clmoe_context *context, const gemm_gradient_shape *shape,
                                     const char *step, const char *name, cl_kernel *kernel,
                                     size_t *group) {
    const error_sentence kept = error_keep();
    clmoe_status status = CLMOE_UNSUPPORTED;
    for (size_t most = MAX_COLUMN_GROUP; status == CLMOE_UNSUPPORTED && most > 0; most /= 2) {
        char options[32];
        if (!device_takes_group(&context->info, 1, most))
            continue;
        *group = most;
        snprintf(options, sizeof options, "-DGROUP=%zu", most);
        status = gemm_gradient_kernel(context, shape, step, options, name, kernel);
    }
    if (status == CLMOE_SUCCESS)
        error_put_back(&kept);
    return status;
}

clmoe_status gemm_gradient_set(cl_kernel kernel, const gemm_gradient *problem) {
    const gemm_gradient_shape *types = &problem->types;
    const gemm_rows *p = &problem->p, *q = &problem->q;
    return KERNEL_SET(
        kernel, ARG_F32(problem->offsets), ARG_F32(problem->kept), ARG_F32(problem->token_of),
        ARG_UINT(problem->slots), ARG_AS(p, ARG_TYPE(p->buf, types->p_type)),
        ARG_AS(q, ARG_TYPE(q->buf, types->q_type)), ARG_AS(p_row, ARG_UINT(p->row)),
        ARG_AS(q_row, ARG_UINT(q->row)), ARG_AS(p_gathered, ARG_UINT(p->gathered)),
        ARG_AS(q_gathered, ARG_UINT(q->gathered)), ARG_UINT(problem->m), ARG_UINT(problem->n),
        ARG_TYPE(problem->c, types->c_type), ARG_AS(c_expert, ARG_ULONG(problem->expert)),
        ARG_AS(c_row, ARG_ULONG(problem->row)), ARG_UINT(problem->accumulate));
}

size_t gemm_gradient_no_scratch(const void *state, uint32_t experts, size_t slots, uint32_t m,
                                uint32_t n) {
    (void)state;
    (void)experts;
    (void)slots;
    (void)m;
    (void)n;
    return 0;
}

size_t gemm_no_scratch(const gemm_shape *shape, size_t slots, uint32_t n, gemm_form form) {
    (void)shape;
    (void)slots;
    (void)n;
    (void)form;
    return 0;
}
