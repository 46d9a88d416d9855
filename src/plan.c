/* ids -> the routing plan. */
#include "steps.h"

enum { SORT_DIGIT_BITS = 8, SORT_KEY_BITS = 32 };

/* The sort's double buffers; after an even number of passes the result is in the first. */
typedef struct sort_buffers {
    clmoe_buf keys[2], order[2], histogram;
} sort_buffers;

static clmoe_status sort_pass(const clmoe_layer *layer, launch *chain, const sort_buffers *buffers,
                              uint32_t count, int shift, int from) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->context->group;
    block_split blocks = workspace_blocks(layer->context, count);
    clmoe_buf keys = buffers->keys[from], order = buffers->order[from];
    TRY(KERNEL_SET(kernels[KERNEL_SORT_HISTOGRAM], ARG_F32(keys), ARG_F32(buffers->histogram),
                   arg_u32(count), arg_u32(blocks.size), arg_u32((uint32_t)shift)));
    TRY(launch_1d(chain, kernels[KERNEL_SORT_HISTOGRAM], blocks.count, group));
    TRY(KERNEL_SET(kernels[KERNEL_SORT_SCAN], ARG_F32(buffers->histogram), arg_u32(blocks.count)));
    TRY(launch_1d(chain, kernels[KERNEL_SORT_SCAN], 1, group));
    TRY(KERNEL_SET(kernels[KERNEL_SORT_SCATTER], ARG_F32(keys), ARG_F32(order),
                   ARG_F32(buffers->histogram), ARG_F32(buffers->keys[!from]),
                   ARG_F32(buffers->order[!from]), arg_u32(count), arg_u32(blocks.size),
                   arg_u32((uint32_t)shift)));
    TRY(launch_1d(chain, kernels[KERNEL_SORT_SCATTER], blocks.count, group));
done:
    return status;
}

/* Tokens by descending best weight (priority), or grid entries by descending weight (weight) or in
   a random order (random). */
static clmoe_status sort_walk(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args,
                              const sort_buffers *buffers) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_SORT_KEYS];
    uint32_t keep = layer_keep(layer), top_k = layer->desc.top_k, group = layer->context->group;
    uint32_t count = keep == CLMOE_KEEP_PRIORITY ? args->tokens : args->tokens * top_k;
    TRY(KERNEL_SET(kernel, ARG_F32(args->pair_weights), ARG_F32(args->live),
                   ARG_U8(args->token_mask), ARG_F32(args->token_offsets),
                   ARG_F32(buffers->keys[0]), ARG_F32(buffers->order[0]), ARG_F32(args->state),
                   arg_u32(count), arg_u32(keep), arg_u32(top_k)));
    TRY(launch_1d(chain, kernel, count / group + (count % group != 0), group));
    for (int shift = 0, from = 0; shift < SORT_KEY_BITS; shift += SORT_DIGIT_BITS, from = !from)
        TRY(sort_pass(layer, chain, buffers, count, shift, from));
done:
    return status;
}

/* The arguments plan_histogram and plan_scatter share, in the order of plan.cl's WALK_ARGS. */
#define WALK_ARGS(layer, args, order, histogram, block_size, pairs)                                \
    ARG_F32((args)->ids), ARG_F32((args)->live), ARG_U8((args)->token_mask),                       \
        ARG_F32((args)->token_offsets), ARG_F32(order), ARG_F32(histogram),                        \
        arg_u32((args)->tokens), arg_u32((layer)->desc.top_k), arg_u32((layer)->columns),          \
        arg_u32(block_size), arg_u32(pairs)

clmoe_status step_plan(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->context->group, experts = layer->desc.num_experts;
    uint32_t columns = layer->columns, dropless = layer_is_dropless(layer);
    workspace_layout ws;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    const clmoe_plan_layout *plan = &ws.plan;
    clmoe_buf none = {0}, order = {0};
    clmoe_buf histogram = workspace_region(&ws, REGION_HISTOGRAM, none, args->scratch);
    clmoe_buf load = plan_array(args->plan, plan->load), kept = plan_array(args->plan, plan->kept);
    clmoe_buf offsets = plan_array(args->plan, plan->offsets);
    clmoe_buf slot_of = plan_array(args->plan, plan->slot_of);
    clmoe_buf row_of = plan_array(args->plan, plan->row_of);
    clmoe_buf token_of = plan_array(args->plan, plan->token_of);
    clmoe_buf tile_expert = plan_array(args->plan, plan->tile_expert);
    block_split blocks = workspace_blocks(layer->context, plan->pairs);

    if (layer_sorts(layer) && args->tokens > 0) {
        sort_buffers buffers = {
            .keys = {workspace_region(&ws, REGION_SORT_KEYS, none, args->scratch),
                     workspace_region(&ws, REGION_SORT_KEYS_2, none, args->scratch)},
            .order = {workspace_region(&ws, REGION_SORT_ORDER, none, args->scratch),
                      workspace_region(&ws, REGION_SORT_ORDER_2, none, args->scratch)},
            .histogram = histogram,
        };
        TRY(sort_walk(layer, chain, args, &buffers));
        order = buffers.order[0];
    }
    TRY(KERNEL_SET(kernels[KERNEL_PLAN_HISTOGRAM],
                   WALK_ARGS(layer, args, order, histogram, blocks.size, plan->pairs),
                   ARG_F32(slot_of), ARG_F32(row_of), ARG_F32(token_of), ARG_F32(tile_expert),
                   arg_u32(plan->slots), arg_u32(plan->slots / plan->row_tile)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_HISTOGRAM], blocks.count, group));
    TRY(KERNEL_SET(kernels[KERNEL_PLAN_SCAN], ARG_F32(histogram), ARG_F32(load), ARG_F32(kept),
                   ARG_F32(args->state), arg_u32(blocks.count), arg_u32(columns), arg_u32(experts),
                   arg_u32(dropless), arg_u32(plan->capacity)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_SCAN], columns / group + (columns % group != 0),
                  group));
    TRY(KERNEL_SET(kernels[KERNEL_PLAN_OFFSETS], ARG_F32(load), ARG_F32(offsets), arg_u32(experts),
                   arg_u32(dropless), arg_u32(plan->capacity), arg_u32(plan->row_tile)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_OFFSETS], 1, group));
    TRY(KERNEL_SET(kernels[KERNEL_PLAN_SCATTER],
                   WALK_ARGS(layer, args, order, histogram, blocks.size, plan->pairs),
                   ARG_F32(kept), ARG_F32(offsets), ARG_F32(slot_of), ARG_F32(row_of),
                   ARG_F32(token_of), ARG_F32(tile_expert), arg_u32(experts),
                   arg_u32(plan->row_tile)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_SCATTER], blocks.count, group));
done:
    return status;
}

clmoe_status step_plan_renorm(const clmoe_layer *layer, launch *chain, uint32_t tokens,
                              const clmoe_weights *weights, clmoe_buf ids, clmoe_buf plan,
                              clmoe_buf pair_weights) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_PLAN_RENORM];
    uint32_t group = layer->context->group;
    workspace_layout ws;
    clmoe_buf none = {0};
    TRY(workspace_layout_get(layer, tokens, &ws));
    TRY(KERNEL_SET(kernel, ARG_F32(ids), ARG_F32(plan_array(plan, ws.plan.slot_of)),
                   ARG_F32(layer->desc.router.expert_scale ? weights->expert_scale : none),
                   ARG_F32(pair_weights), arg_u32(tokens),
                   arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, tokens / group + (tokens % group != 0), group));
done:
    return status;
}
