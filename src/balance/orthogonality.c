/* The router's weights -> how far its rows are from orthogonal, and the gradient on them. */
#include "check/check.h"
#include "runtime/program.h"
#include "runtime/structs.h"
#include "steps.h"

#include <stdio.h>

clmoe_status orthogonality_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_ORTHOGONALITY_UNITS, "orthogonality_units"},
        {KERNEL_ORTHOGONALITY_COSINES, "orthogonality_cosines"},
        {KERNEL_ORTHOGONALITY_VALUE, "orthogonality_value"},
        {KERNEL_ORTHOGONALITY_GRADIENT, "orthogonality_gradient"},
    };
    const clmoe_type router = layer->desc.router.weight_type;
    char options[64];
    if (!layer->desc.balance.router_orthogonality)
        return CLMOE_SUCCESS;
    snprintf(options, sizeof options, "-DGROUP=%u -DX=%s -DC=%s", layer->group, type_name(router),
             type_name(layer_gradient_type(layer, router)));
    return layer_kernels(layer, "balance/orthogonality", options, kernels,
                         sizeof kernels / sizeof kernels[0]);
}

/* weights.router -> units, cosines and the sums of their squares. */
static clmoe_status find_cosines(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    const uint32_t count = layer_router_rows(layer), dim = layer->desc.dim;
    const clmoe_buf units = region(b, REGION_ROUTER_UNITS);
    const dense_map products = {.rows = count,
                                .n = count,
                                .k = dim,
                                .a = units,
                                .weight = units,
                                .out = region(b, REGION_COSINES)};
    TRY(KERNEL_SET(kernels[KERNEL_ORTHOGONALITY_UNITS],
                   ARG_TYPE(b->weights->router, layer->desc.router.weight_type),
                   ARG_F32(region(b, REGION_ROUTER_NORMS)), ARG_F32(units), ARG_UINT(dim)));
    TRY(launch_1d(chain, kernels[KERNEL_ORTHOGONALITY_UNITS], count, layer->group));
    TRY(gemm_dense(&layer->cosines, chain, &products));
    TRY(KERNEL_SET(kernels[KERNEL_ORTHOGONALITY_COSINES], ARG_F32(region(b, REGION_COSINES)),
                   ARG_F32(region(b, REGION_COSINE_SQUARES)), ARG_UINT(count)));
    TRY(launch_1d(chain, kernels[KERNEL_ORTHOGONALITY_COSINES], count, layer->group));
done:
    return status;
}

static clmoe_status add_gradient(const batch *b, launch *chain, float weight, clmoe_buf drouter) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_ORTHOGONALITY_GRADIENT];
    const clmoe_type type = layer_gradient_type(layer, layer->desc.router.weight_type);
    const uint32_t count = layer_router_rows(layer), dim = layer->desc.dim;
    const clmoe_buf units = region(b, REGION_ROUTER_UNITS);
    const clmoe_buf rows = region(b, REGION_COSINE_ROWS);
    const dense_map mix = {.rows = count,
                           .n = dim,
                           .k = count,
                           .a = region(b, REGION_COSINES),
                           .weight = units,
                           .out = rows};
    TRY(gemm_dense(&layer->cosine_rows, chain, &mix));
    TRY(KERNEL_SET(kernel, ARG_F32(region(b, REGION_ROUTER_NORMS)), ARG_F32(units),
                   ARG_F32(region(b, REGION_COSINE_SQUARES)), ARG_F32(rows),
                   ARG_TYPE(drouter, type), ARG_UINT(dim), ARG_FLOAT(weight)));
    TRY(launch_1d(chain, kernel, count, layer->group));
done:
    return status;
}

static clmoe_status step_orthogonality(const batch *b, launch *chain,
                                       const clmoe_router_orthogonality_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = b->layer->kernels[KERNEL_ORTHOGONALITY_VALUE];
    TRY(find_cosines(b, chain));
    if (args->value.mem) {
        TRY(KERNEL_SET(kernel, ARG_F32(region(b, REGION_COSINE_SQUARES)), ARG_F32(args->value),
                       ARG_AS(count, ARG_UINT(layer_router_rows(b->layer)))));
        TRY(launch_1d(chain, kernel, 1, b->layer->group));
    }
    if (args->drouter.mem)
        TRY(add_gradient(b, chain, args->weight, args->drouter));
done:
    return status;
}

clmoe_status clmoe_router_orthogonality(clmoe_layer *layer, cl_command_queue queue,
                                        const clmoe_router_orthogonality_args *args,
                                        cl_uint num_wait, const cl_event *wait, cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    batch b = {.layer = layer};
    clmoe_router_orthogonality_args own = {0};
    TRY(STRUCT_TAKE_ARGS(args, &own));
    TRY(check_router_orthogonality(layer, &own));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(workspace_layout_get(layer, 0, &b.ws));
    b.weights = own.weights;
    b.scratch = own.scratch;
    TRY(step_orthogonality(&b, &chain, &own));
done:
    return launch_end(&chain, status, event);
}
