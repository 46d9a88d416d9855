/* Combine weights of the fixed choice -> weights that load the experts more evenly; backward. */
#include "steps.h"

clmoe_status rebalance_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_REBALANCE_BEGIN, "rebalance_begin"},
        {KERNEL_REBALANCE_COLUMNS, "rebalance_columns"},
        {KERNEL_REBALANCE_TARGET, "rebalance_target"},
        {KERNEL_REBALANCE_ROWS, "rebalance_rows"},
    };
    static const kernel_entry backward[] = {
        {KERNEL_REBALANCE_BACK_ROWS, "rebalance_back_rows"},
        {KERNEL_REBALANCE_BACK_END, "rebalance_back_end"},
    };
    clmoe_status status = CLMOE_SUCCESS;
    if (!layer_rebalances(layer))
        return CLMOE_SUCCESS;
    TRY(GROUP_KERNELS(layer, "routing/rebalance", kernels));
    if (layer->desc.training)
        TRY(GROUP_KERNELS(layer, "routing/rebalance", backward));
done:
    return status;
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
#define REBALANCE_ARGS(b, scratch, pair_weights)                                                   \
    ARG_F32((b)->ids), ARG_F32((b)->live), ARG_U8((b)->token_mask), ARG_F32(pair_weights),         \
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

static clmoe_status begin(const batch *b, launch *chain, const rebalance_scratch *scratch,
                          clmoe_buf pair_weights) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    uint32_t experts = layer->desc.num_experts, blocks = scratch->blocks.count;
    TRY(KERNEL_SET(kernels[KERNEL_REBALANCE_BEGIN], REBALANCE_ARGS(b, scratch, pair_weights),
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

/* One array of bits for every BITS iterations, if any. */
enum { BITS = 32 };

static clmoe_buf bits_of(const batch *b, clmoe_buf stays, uint32_t iteration) {
    return stays.mem ? buf_at(stays, iteration / BITS * (size_t)b->ws.plan.pairs * sizeof(cl_uint))
                     : stays;
}

/* pair_weights in place; stays, if given: which of them each iteration leaves above 0. */
static clmoe_status iterate(const batch *b, launch *chain, clmoe_buf pair_weights,
                            clmoe_buf stays) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel rows = layer->kernels[KERNEL_REBALANCE_ROWS];
    const rebalance_scratch scratch = scratch_of(b);
    TRY(begin(b, chain, &scratch, pair_weights));
    for (uint32_t i = 0; i < router->rebalance.iterations; i++) {
        if (i > 0)
            TRY(launch_columns(b, chain));
        TRY(KERNEL_SET(rows, REBALANCE_ARGS(b, &scratch, pair_weights), ARG_F32(scratch.columns),
                       ARG_F32(scratch.target), ARG_AS(stays, ARG_F32(bits_of(b, stays, i))),
                       ARG_AS(bit, ARG_UINT(i % BITS)), ARG_FLOAT(router->rebalance.mu)));
        TRY(launch_1d(chain, rows, scratch.blocks.count, layer->group));
    }
done:
    return status;
}

clmoe_status step_rebalance(const batch *b, launch *chain) {
    const clmoe_buf none = {0};
    return b->tokens > 0 ? iterate(b, chain, b->pair_weights, none) : CLMOE_SUCCESS;
}

/* Kernels of the way back: the gradient takes the place of the weights, dbefore that of `before`.
 */
#define BACK_ARGS(b, scratch, gradient)                                                            \
    REBALANCE_ARGS(b, scratch, gradient), ARG_F32((scratch)->columns), ARG_F32((scratch)->target), \
        ARG_FLOAT((b)->layer->desc.router.rebalance.mu)

/* The last iteration first. */
static clmoe_status iterate_back(const batch *b, launch *chain, clmoe_buf pair_weights,
                                 clmoe_buf stays) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const uint32_t iterations = layer->desc.router.rebalance.iterations;
    cl_kernel rows = layer->kernels[KERNEL_REBALANCE_BACK_ROWS];
    cl_kernel end = layer->kernels[KERNEL_REBALANCE_BACK_END];
    const rebalance_scratch scratch = scratch_of(b);
    for (uint32_t i = iterations; i-- > 0;) {
        TRY(KERNEL_SET(rows, BACK_ARGS(b, &scratch, pair_weights),
                       ARG_AS(stays, ARG_F32(bits_of(b, stays, i))), ARG_F32(b->dpair_weights),
                       ARG_AS(bit, ARG_UINT(i % BITS)),
                       ARG_AS(first, ARG_UINT(i + 1 == iterations))));
        TRY(launch_1d(chain, rows, scratch.blocks.count, layer->group));
        TRY(launch_columns(b, chain));
    }
    TRY(KERNEL_SET(end, BACK_ARGS(b, &scratch, pair_weights)));
    TRY(launch_1d(chain, end, scratch.blocks.count, layer->group));
done:
    return status;
}

clmoe_status step_rebalance_backward(batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t pairs_bytes = b->ws.plan.pairs * sizeof(cl_float);
    const clmoe_buf weights = region(b, REGION_REBALANCE_BACK);
    const clmoe_buf stays = buf_at(weights, pairs_bytes);
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(step_chosen_weights(b, chain, weights));
    TRY(iterate(b, chain, weights, stays));
    TRY(iterate_back(b, chain, weights, stays));
    b->dpair_weights = weights;
done:
    return status;
}
