/* Pairs or tokens -> the order in which they compete for places. */
#include "steps.h"

enum { SORT_DIGIT_BITS = 8, SORT_KEY_BITS = 32 };

clmoe_status sort_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_SORT_KEYS, "sort_keys"},           {KERNEL_SORT_HISTOGRAM, "sort_histogram"},
        {KERNEL_SORT_SCAN, "sort_scan"},           {KERNEL_SORT_SCATTER, "sort_scatter"},
        {KERNEL_SORT_SEQUENCES, "sort_sequences"},
    };
    return layer_sorts(layer) ? GROUP_KERNELS(layer, "dispatch/sort", kernels) : CLMOE_SUCCESS;
}

/* The sort's double buffers; after an even number of passes the result is in the first. */
typedef struct sort_buffers {
    clmoe_buf keys[2], order[2], histogram;
} sort_buffers;

static clmoe_status sort_pass(const batch *b, launch *chain, const sort_buffers *buffers,
                              uint32_t count, int shift, int from) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->group;
    block_split blocks = workspace_blocks(layer->group, count);
    clmoe_buf keys = buffers->keys[from], order = buffers->order[from];
    TRY(KERNEL_SET(kernels[KERNEL_SORT_HISTOGRAM], ARG_F32(keys), ARG_F32(buffers->histogram),
                   ARG_UINT(count), ARG_AS(block_size, ARG_UINT(blocks.size)),
                   ARG_UINT((uint32_t)shift)));
    TRY(launch_1d(chain, kernels[KERNEL_SORT_HISTOGRAM], blocks.count, group));
    TRY(KERNEL_SET(kernels[KERNEL_SORT_SCAN], ARG_F32(buffers->histogram),
                   ARG_AS(blocks, ARG_UINT(blocks.count))));
    TRY(launch_1d(chain, kernels[KERNEL_SORT_SCAN], 1, group));
    TRY(KERNEL_SET(kernels[KERNEL_SORT_SCATTER], ARG_F32(keys), ARG_F32(order),
                   ARG_F32(buffers->histogram), ARG_AS(keys_out, ARG_F32(buffers->keys[!from])),
                   ARG_AS(order_out, ARG_F32(buffers->order[!from])), ARG_UINT(count),
                   ARG_AS(block_size, ARG_UINT(blocks.size)), ARG_UINT((uint32_t)shift)));
    TRY(launch_1d(chain, kernels[KERNEL_SORT_SCATTER], blocks.count, group));
done:
    return status;
}

/* Sorts buffers[0], which is in keep order, by sequence; *in gets where the result is. */
static clmoe_status sort_by_sequence(const batch *b, launch *chain, const sort_buffers *buffers,
                                     uint32_t count, uint32_t sequence, int *in) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_SORT_SEQUENCES];
    uint32_t group = layer->group, last = (count - 1) / sequence;
    *in = 0;
    if (last == 0)
        return CLMOE_SUCCESS;
    TRY(KERNEL_SET(kernel, ARG_F32(buffers->keys[0]), ARG_F32(buffers->order[0]), ARG_UINT(count),
                   ARG_UINT(sequence)));
    TRY(launch_1d(chain, kernel, divide_up(count, group), group));
    for (int shift = 0; shift < SORT_KEY_BITS && last >> shift > 0; shift += SORT_DIGIT_BITS) {
        TRY(sort_pass(b, chain, buffers, count, shift, *in));
        *in = !*in;
    }
done:
    return status;
}

/*
 * Tokens by descending best weight (priority), or grid entries by descending weight (weight) or in
 * a random order (random), in each sequence; *in gets in which of the buffers.
 */
static clmoe_status sort_walk(const batch *b, launch *chain, const sort_buffers *buffers, int *in) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_SORT_KEYS];
    uint32_t keep = layer_keep(layer), top_k = layer->desc.top_k, group = layer->group;
    uint32_t count = keep == CLMOE_KEEP_PRIORITY ? b->tokens : b->tokens * top_k;
    TRY(KERNEL_SET(kernel, ARG_F32(b->pair_weights), ARG_F32(b->live), ARG_U8(b->token_mask),
                   ARG_F32(b->token_offsets), ARG_F32(buffers->keys[0]), ARG_F32(buffers->order[0]),
                   ARG_F32(b->state), ARG_UINT(count), ARG_AS(pairs, ARG_UINT(b->tokens * top_k)),
                   ARG_UINT(keep), ARG_UINT(top_k)));
    TRY(launch_1d(chain, kernel, divide_up(count, group), group));
    for (int shift = 0, from = 0; shift < SORT_KEY_BITS; shift += SORT_DIGIT_BITS, from = !from)
        TRY(sort_pass(b, chain, buffers, count, shift, from));
    uint32_t sequence = layer_sequence_tokens(layer, b->tokens);
    TRY(sort_by_sequence(b, chain, buffers, count,
                         keep == CLMOE_KEEP_PRIORITY ? sequence : sequence * top_k, in));
done:
    return status;
}

clmoe_status step_sort(const batch *b, launch *chain, clmoe_buf *order) {
    clmoe_status status = CLMOE_SUCCESS;
    int in = 0;
    sort_buffers buffers = {
        .keys = {region(b, REGION_SORT_KEYS), region(b, REGION_SORT_KEYS_2)},
        .order = {region(b, REGION_SORT_ORDER), region(b, REGION_SORT_ORDER_2)},
        .histogram = region(b, REGION_HISTOGRAM),
    };
    TRY(sort_walk(b, chain, &buffers, &in));
    *order = buffers.order[in];
done:
    return status;
}
