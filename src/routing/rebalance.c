/* Combine weights of the fixed choice -> weights that load the experts more evenly. */
#include "steps.h"

clmoe_status rebalance_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_REBALANCE_BEGIN, "rebalance_begin"},
        {KERNEL_REBALANCE_COLUMNS, "rebalance_columns"},
        {KERNEL_REBALANCE_TARGET, "rebalance_target"},
        {KERNEL_REBALANCE_ROWS, "rebalance_rows"},
    };
    if (!layer_rebalances(layer))
        return CLMOE_SUCCESS;
    return GROUP_KERNELS(layer, "routing/rebalance", kernels);
}

/* The parts of the region, one behind the other; see rebalance_bytes() in workspace.c. */
typedef struct rebalance_scratch {
    clmoe_buf before, sums, partial, pairs, columns, target;
    block_split blocks;
} rebalance_scratch;

static rebalance_scratch scratch_of(const batch *b) {
    const size_t word = sizeof(cl_float), experts = b->layer->desc.num_experts;
    rebalance_scratch scratch = {.blocks = workspace_blocks(b->layer->group, b->tokens)};
    const size_t block_bytes = scratch.blocks.count * experts * word;
    scratch.before = region(b, REGION_REBALANCE);
    scratch.sums = buf_at(scratch.before, b->ws.plan.pairs * word);
    scratch.partial = buf_at(scratch.sums, b->tokens * word);
    scratch.pairs = buf_at(scratch.partial, block_bytes);
    scratch.columns = buf_at(scratch.pairs, block_bytes);
    scratch.target = buf_at(scratch.columns, experts * word);
    return scratch;
}

/* The arguments in the order of rebalance.cl's REBALANCE_ARGS. */
#define REBALANCE_ARGS(b, scratch)                                                                 \
    ARG_F32((b)->ids), ARG_F32((b)->live), ARG_U8((b)->token_mask), ARG_F32((b)->pair_weights),    \
        ARG_F32((scratch)->before), ARG_F32((scratch)->sums), ARG_F32((scratch)->partial),         \
        ARG_UINT((b)->tokens), ARG_UINT((b)->layer->desc.top_k),                                   \
        ARG_UINT((b)->layer->desc.num_experts),                                                    \
        ARG_AS(block_size, ARG_UINT((scratch)->blocks.size))

static clmoe_status launch_columns(const batch *b, launch *chain) {
    const clmoe_layer *layer = b->layer;
    uint32_t group = layer->group, experts = layer->desc.num_experts;
    return launch_1d(chain, layer->kernels[KERNEL_REBALANCE_COLUMNS], divide_up(experts, group),
                     group);
}

static clmoe_status begin(const batch *b, launch *chain, const rebalance_scratch *scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    uint32_t experts = layer->desc.num_experts, blocks = scratch->blocks.count;
    TRY(KERNEL_SET(kernels[KERNEL_REBALANCE_BEGIN], REBALANCE_ARGS(b, scratch),
                   ARG_F32(scratch->pairs)));
    TRY(launch_1d(chain, kernels[KERNEL_REBALANCE_BEGIN], blocks, layer->group));
    TRY(KERNEL_SET(kernels[KERNEL_REBALANCE_COLUMNS], ARG_F32(scratch->partial),
                   ARG_F32(scratch->columns), ARG_UINT(experts), ARG_UINT(blocks)));
    TRY(launch_columns(b, chain));
    TRY(KERNEL_SET(kernels[KERNEL_REBALANCE_TARGET], ARG_F32(scratch->columns),
                   ARG_F32(scratch->pairs), ARG_F32(scratch->target), ARG_UINT(experts),
                   ARG_UINT(blocks), ARG_FLOAT(layer->desc.router.rebalance.mu)));
    TRY(launch_1d(chain, kernels[KERNEL_REBALANCE_TARGET], 1, layer->group));
done:
    return status;
}

clmoe_status step_rebalance(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel rows = layer->kernels[KERNEL_REBALANCE_ROWS];
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    const rebalance_scratch scratch = scratch_of(b);
    TRY(begin(b, chain, &scratch));
    TRY(KERNEL_SET(rows, REBALANCE_ARGS(b, &scratch), ARG_F32(scratch.columns),
                   ARG_F32(scratch.target), ARG_FLOAT(router->rebalance.mu)));
    for (uint32_t i = 0; i < router->rebalance.iterations; i++) {
        if (i > 0)
            TRY(launch_columns(b, chain));
        TRY(launch_1d(chain, rows, scratch.blocks.count, layer->group));
    }
done:
    return status;
}
