/* Soft MoE: tokens mixed into the experts' slots, and the slots' outputs into tokens. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

enum {
    KERNEL_NORMS = KERNEL_POLICY,
    KERNEL_SLOT_NORMS,
    KERNEL_LOGITS,
    KERNEL_PARTIALS,
    KERNEL_COLUMNS,
    KERNEL_MIX,
    KERNEL_UNMIX,
    KERNEL_PLAN,
    KERNEL_CLEAR = KERNEL_POLICY_LAST,
};

static clmoe_status create_kernel(clmoe_layer *layer, int id, clmoe_type type, const char *name) {
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DX=%s", layer->group, type_name(type));
    return program_kernel(layer->context, "routing/soft_moe", options, name, &layer->kernels[id]);
}

static clmoe_status create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_NORMS, "soft_moe_norms"},       {KERNEL_LOGITS, "soft_moe_logits"},
        {KERNEL_PARTIALS, "soft_moe_partials"}, {KERNEL_COLUMNS, "soft_moe_columns"},
        {KERNEL_MIX, "soft_moe_dispatch"},      {KERNEL_UNMIX, "soft_moe_combine"},
        {KERNEL_PLAN, "soft_moe_plan"},         {KERNEL_CLEAR, "soft_moe_clear"},
    };
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++)
        TRY(create_kernel(layer, kernels[i].id, layer->desc.type, kernels[i].name));
    TRY(create_kernel(layer, KERNEL_SLOT_NORMS, layer->desc.router.weight_type, "soft_moe_norms"));
done:
    return status;
}

/* Buckets of p rows, the same for every batch. */
static clmoe_status set_plan(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_plan_layout *plan = &b->ws.plan;
    cl_kernel kernel = layer->kernels[KERNEL_PLAN];
    uint32_t group = layer->group, experts = layer->desc.num_experts;
    uint32_t count = b->tokens > plan->slots ? b->tokens : plan->slots + 1;
    TRY(KERNEL_SET(kernel, ARG_F32(PLAN_ARRAY(b, load)), ARG_F32(PLAN_ARRAY(b, kept)),
                   ARG_F32(PLAN_ARRAY(b, offsets)), ARG_F32(PLAN_ARRAY(b, slot_of)),
                   ARG_F32(PLAN_ARRAY(b, pair_of)), ARG_F32(PLAN_ARRAY(b, token_of)),
                   ARG_F32(PLAN_ARRAY(b, tile_expert)), ARG_F32(b->pair_weights),
                   ARG_UINT(b->tokens), ARG_UINT(experts),
                   ARG_AS(per_expert, ARG_UINT(plan->capacity)),
                   ARG_AS(stride, ARG_UINT(plan->slots / experts)), ARG_UINT(plan->row_tile)));
    TRY(launch_1d(chain, kernel, divide_up(count, group), group));
done:
    return status;
}

/* x -> logits and the sums of both softmaxes. */
static clmoe_status set_logits(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    const clmoe_layer_desc *desc = &layer->desc;
    uint32_t group = layer->group, count = layer_router_rows(layer), T = b->tokens;
    block_split blocks = workspace_token_blocks(layer->group, T);
    clmoe_buf none = {0}, router = b->weights->router;
    const dense_map map = {.rows = T,
                           .n = count,
                           .k = desc->dim,
                           .a = region(b, REGION_SOFT_MOE_X),
                           .weight = router,
                           .out = b->logits};
    TRY(KERNEL_SET(kernels[KERNEL_NORMS], ARG_AS(rows, ARG_TYPE(b->x, desc->type)),
                   ARG_U8(b->token_mask), ARG_F32(region(b, REGION_TOKEN_NORMS)),
                   ARG_AS(clean, ARG_TYPE(region(b, REGION_SOFT_MOE_X), desc->type)),
                   ARG_UINT(desc->dim)));
    TRY(launch_1d(chain, kernels[KERNEL_NORMS], T, group));
    TRY(KERNEL_SET(kernels[KERNEL_SLOT_NORMS],
                   ARG_AS(rows, ARG_TYPE(router, desc->router.weight_type)),
                   ARG_AS(token_mask, ARG_U8(none)), ARG_F32(region(b, REGION_SLOT_NORMS)),
                   ARG_AS(clean, ARG_TYPE(none, desc->router.weight_type)), ARG_UINT(desc->dim)));
    TRY(launch_1d(chain, kernels[KERNEL_SLOT_NORMS], count, group));
    TRY(gemm_dense(&layer->dense, chain, &map));
    TRY(KERNEL_SET(kernels[KERNEL_LOGITS], ARG_F32(region(b, REGION_TOKEN_NORMS)),
                   ARG_F32(region(b, REGION_SLOT_NORMS)), ARG_F32(b->logits),
                   ARG_F32(region(b, REGION_TOPS)), ARG_UINT(count),
                   ARG_FLOAT(desc->router.soft_moe.scale)));
    TRY(launch_1d(chain, kernels[KERNEL_LOGITS], T, group));
    TRY(KERNEL_SET(kernels[KERNEL_PARTIALS], ARG_F32(b->logits),
                   ARG_F32(region(b, REGION_SOFT_MOE_PARTIALS)), ARG_AS(tokens, ARG_UINT(T)),
                   ARG_UINT(count), ARG_AS(block_size, ARG_UINT(blocks.size))));
    TRY(launch_1d(chain, kernels[KERNEL_PARTIALS], blocks.count, group));
    TRY(KERNEL_SET(kernels[KERNEL_COLUMNS], ARG_F32(region(b, REGION_SOFT_MOE_PARTIALS)),
                   ARG_F32(region(b, REGION_SOFT_MOE_COLUMNS)),
                   ARG_AS(blocks, ARG_UINT(blocks.count)), ARG_UINT(count)));
    TRY(launch_1d(chain, kernels[KERNEL_COLUMNS], divide_up(count, group), group));
done:
    return status;
}

clmoe_status step_soft_moe_dispatch(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel dispatch = layer->kernels[KERNEL_MIX];
    cl_kernel combine = layer->kernels[KERNEL_UNMIX];
    uint32_t experts = layer->desc.num_experts, count = layer_router_rows(layer);
    uint32_t group = layer->group, tokens = b->tokens;
    uint32_t slots = b->ws.plan.slots, stride = slots / experts, per_expert = b->ws.plan.capacity;
    TRY(set_plan(b, chain));
    if (tokens == 0)
        return CLMOE_SUCCESS;
    TRY(set_logits(b, chain));
    TRY(KERNEL_SET(dispatch, ARG_F32(b->logits), ARG_F32(region(b, REGION_SOFT_MOE_COLUMNS)),
                   ARG_F32(region(b, REGION_SOFT_MOE_DISPATCH)), ARG_UINT(tokens), ARG_UINT(count),
                   ARG_UINT(per_expert)));
    TRY(launch_kernel(chain, dispatch, 2, (size_t[]){stride, experts}, (size_t[]){group, 1}));
    TRY(KERNEL_SET(combine, ARG_F32(b->logits), ARG_F32(region(b, REGION_TOPS)),
                   ARG_AS(combine, ARG_F32(b->mix)), ARG_UINT(count), ARG_UINT(experts),
                   ARG_UINT(per_expert), ARG_UINT(stride)));
    TRY(launch_1d(chain, combine, tokens, group));
    const dense_map mix = {.rows = slots,
                           .n = layer->desc.dim,
                           .k = tokens,
                           .a = region(b, REGION_SOFT_MOE_DISPATCH),
                           .weight = region(b, REGION_SOFT_MOE_X),
                           .out = b->xe};
    TRY(gemm_dense(&layer->mix, chain, &mix));
done:
    return status;
}

clmoe_status step_soft_moe_combine(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel clear = layer->kernels[KERNEL_CLEAR];
    uint32_t experts = layer->desc.num_experts;
    uint32_t slots = b->ws.plan.slots, stride = slots / experts, per_expert = b->ws.plan.capacity;
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(KERNEL_SET(clear, ARG_TYPE(b->ye, layer->desc.type), ARG_UINT(layer->desc.dim),
                   ARG_UINT(per_expert), ARG_UINT(stride)));
    TRY(launch_kernel(chain, clear, 2, (size_t[]){stride - per_expert, experts},
                      (size_t[]){layer->group, 1}));
    const dense_map mix = {.rows = b->tokens,
                           .n = layer->desc.dim,
                           .k = slots,
                           .a = b->mix,
                           .weight = b->ye,
                           .out = b->mixed};
    TRY(gemm_dense(&layer->mix, chain, &mix));
done:
    return status;
}

const routing_policy soft_moe_policy = {.create = create, .best_first = true};
