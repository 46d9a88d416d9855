/* scores -> balanced choices -> ids, weights. */
#include "steps.h"

#include <stdio.h>

clmoe_status sinkhorn_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_SINKHORN_START, "sinkhorn_start"},
        {KERNEL_SINKHORN_EXP, "sinkhorn_exp"},
        {KERNEL_SINKHORN_ROWS, "sinkhorn_rows"},
        {KERNEL_SINKHORN_COLUMNS, "sinkhorn_columns"},
        {KERNEL_SINKHORN_CHOICES, "sinkhorn_choices"},
        {KERNEL_SINKHORN_WEIGHTS, "sinkhorn_weights"},
    };
    char options[32];
    if (layer->desc.router.policy != CLMOE_POLICY_SINKHORN)
        return CLMOE_SUCCESS;
    snprintf(options, sizeof options, "-DGROUP=%u", layer->group);
    return layer_kernels(layer, "routing/sinkhorn", options, kernels,
                         sizeof kernels / sizeof kernels[0]);
}

/* Regions of one call. */
typedef struct sinkhorn_buffers {
    clmoe_buf choices, tops, balance, partials;
} sinkhorn_buffers;

static clmoe_status iterate(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args,
                            const sinkhorn_buffers *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel rows = layer->kernels[KERNEL_SINKHORN_ROWS];
    cl_kernel columns = layer->kernels[KERNEL_SINKHORN_COLUMNS];
    block_split blocks = workspace_token_blocks(layer->group, args->tokens);
    TRY(KERNEL_SET(rows, ARG_F32(b->choices), ARG_U8(args->token_mask), ARG_F32(b->balance),
                   ARG_F32(b->partials), arg_u32(args->tokens), arg_u32(layer->columns),
                   arg_u32(blocks.size)));
    TRY(KERNEL_SET(columns, ARG_F32(b->partials), ARG_F32(b->balance), arg_u32(blocks.count),
                   arg_u32(layer->columns), arg_f32(router->sinkhorn_tolerance)));
    for (uint32_t i = 0; i < router->sinkhorn_iterations; i++) {
        TRY(launch_1d(chain, rows, blocks.count, layer->group));
        TRY(launch_1d(chain, columns, 1, layer->group));
    }
done:
    return status;
}

static clmoe_status balance(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args,
                            const sinkhorn_buffers *b) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->group, columns = layer->columns;
    TRY(KERNEL_SET(kernels[KERNEL_SINKHORN_START], ARG_U8(args->token_mask), ARG_F32(b->balance),
                   arg_u32(args->tokens), arg_u32(columns)));
    TRY(launch_1d(chain, kernels[KERNEL_SINKHORN_START], 1, group));
    TRY(KERNEL_SET(kernels[KERNEL_SINKHORN_EXP], ARG_F32(args->scores), ARG_F32(b->choices),
                   ARG_F32(b->tops), arg_u32(columns)));
    TRY(launch_1d(chain, kernels[KERNEL_SINKHORN_EXP], args->tokens, group));
    TRY(iterate(layer, chain, args, b));
    TRY(KERNEL_SET(kernels[KERNEL_SINKHORN_CHOICES], ARG_F32(args->scores), ARG_F32(b->balance),
                   ARG_F32(b->choices), arg_u32(columns)));
    TRY(launch_1d(chain, kernels[KERNEL_SINKHORN_CHOICES], args->tokens, group));
done:
    return status;
}

clmoe_status step_sinkhorn(const clmoe_layer *layer, launch *chain, const clmoe_topk_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_SINKHORN_WEIGHTS];
    uint32_t group = layer->group;
    clmoe_buf none = {0};
    clmoe_topk_args by_choices = *args;
    workspace_layout ws;
    if (args->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    const sinkhorn_buffers b = {
        .choices = workspace_region(&ws, REGION_CHOICES, none, args->scratch),
        .tops = workspace_region(&ws, REGION_TOPS, none, args->scratch),
        .balance = workspace_region(&ws, REGION_SINKHORN_BALANCE, none, args->scratch),
        .partials = workspace_region(&ws, REGION_SINKHORN_PARTIALS, none, args->scratch),
    };
    TRY(balance(layer, chain, args, &b));
    by_choices.scores = b.choices;
    TRY(step_token_choice(layer, chain, &by_choices));
    TRY(KERNEL_SET(kernel, ARG_F32(args->scores), ARG_F32(b.tops),
                   ARG_F32(layer->desc.router.expert_scale ? args->weights->expert_scale : none),
                   ARG_F32(args->ids), ARG_F32(args->live), ARG_F32(args->weights_out),
                   arg_u32(args->tokens), arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(args->tokens, group), group));
done:
    return status;
}
