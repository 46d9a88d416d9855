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
    uint32_t group = layer->group;
    block_split blocks = workspace_blocks(layer->group, count);
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

/* Sorts buffers[0], which is in keep order, by sequence; *in gets where the result is. */
static clmoe_status sort_by_sequence(const clmoe_layer *layer, launch *chain,
                                     const sort_buffers *buffers, uint32_t count, uint32_t each,
                                     int *in) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_SORT_SEQUENCES];
    uint32_t group = layer->group, last = (count - 1) / each;
    *in = 0;
    if (last == 0)
        return CLMOE_SUCCESS;
    TRY(KERNEL_SET(kernel, ARG_F32(buffers->keys[0]), ARG_F32(buffers->order[0]), arg_u32(count),
                   arg_u32(each)));
    TRY(launch_1d(chain, kernel, divide_up(count, group), group));
    for (int shift = 0; shift < SORT_KEY_BITS && last >> shift > 0; shift += SORT_DIGIT_BITS) {
        TRY(sort_pass(layer, chain, buffers, count, shift, *in));
        *in = !*in;
    }
done:
    return status;
}

/*
 * Tokens by descending best weight (priority), or grid entries by descending weight (weight) or in
 * a random order (random), in each sequence; *in gets in which of the buffers.
 */
static clmoe_status sort_walk(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args,
                              const sort_buffers *buffers, int *in) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_SORT_KEYS];
    uint32_t keep = layer_keep(layer), top_k = layer->desc.top_k, group = layer->group;
    uint32_t count = keep == CLMOE_KEEP_PRIORITY ? args->tokens : args->tokens * top_k;
    TRY(KERNEL_SET(kernel, ARG_F32(args->pair_weights), ARG_F32(args->live),
                   ARG_U8(args->token_mask), ARG_F32(args->token_offsets),
                   ARG_F32(buffers->keys[0]), ARG_F32(buffers->order[0]), ARG_F32(args->state),
                   arg_u32(count), arg_u32(args->tokens * top_k), arg_u32(keep), arg_u32(top_k)));
    TRY(launch_1d(chain, kernel, divide_up(count, group), group));
    for (int shift = 0, from = 0; shift < SORT_KEY_BITS; shift += SORT_DIGIT_BITS, from = !from)
        TRY(sort_pass(layer, chain, buffers, count, shift, from));
    uint32_t each = layer_sequence_tokens(layer, args->tokens);
    TRY(sort_by_sequence(layer, chain, buffers, count,
                         keep == CLMOE_KEEP_PRIORITY ? each : each * top_k, in));
done:
    return status;
}

/* The arguments plan_histogram and plan_scatter share, in the order of plan.cl's WALK_ARGS. */
#define WALK_ARGS(layer, args, order, histogram, walk, pairs)                                      \
    ARG_F32((args)->ids), ARG_F32((args)->live), ARG_U8((args)->token_mask),                       \
        ARG_F32((args)->token_offsets), ARG_F32(order), ARG_F32(histogram),                        \
        arg_u32((args)->tokens), arg_u32((layer)->desc.top_k), arg_u32((layer)->columns),          \
        arg_u32((walk).blocks.size), arg_u32(pairs),                                               \
        arg_u32(layer_sequence_tokens((layer), (args)->tokens)), arg_u32((walk).sequence_blocks)

/* Ranks at the blocks' starts, and what follows from them: load, kept, the sequences' bases. */
static clmoe_status scan(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args,
                         const workspace_layout *ws, const walk_split *walk) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_plan_layout *plan = &ws->plan;
    uint32_t group = layer->group, experts = layer->desc.num_experts;
    uint32_t columns = layer->columns;
    clmoe_buf none = {0};
    clmoe_buf histogram = workspace_region(ws, REGION_HISTOGRAM, none, args->scratch);
    clmoe_buf bases = workspace_region(ws, REGION_SEQUENCES, none, args->scratch);
    clmoe_buf load = plan_array(args->plan, plan->load), kept = plan_array(args->plan, plan->kept);
    if (layer_has_sequences(layer)) {
        cl_kernel kernel = layer->kernels[KERNEL_PLAN_SCAN_SEQUENCES];
        TRY(KERNEL_SET(kernel, ARG_F32(histogram), ARG_F32(load), ARG_F32(kept), ARG_F32(bases),
                       ARG_F32(args->state), arg_u32(layer_sequences(layer, args->tokens)),
                       arg_u32(walk->sequence_blocks), arg_u32(columns), arg_u32(experts),
                       arg_u32(plan->capacity)));
        TRY(launch_1d(chain, kernel, columns, group));
        return CLMOE_SUCCESS;
    }
    cl_kernel kernel = layer->kernels[KERNEL_PLAN_SCAN];
    TRY(KERNEL_SET(kernel, ARG_F32(histogram), ARG_F32(load), ARG_F32(kept), ARG_F32(args->state),
                   arg_u32(walk->blocks.count), arg_u32(columns), arg_u32(experts),
                   arg_u32(layer_is_dropless(layer)), arg_u32(plan->capacity)));
    TRY(launch_1d(chain, kernel, columns, group));
done:
    return status;
}

clmoe_status step_plan(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->group, experts = layer->desc.num_experts;
    uint32_t dropless = layer_is_dropless(layer);
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
    clmoe_buf bases = workspace_region(&ws, REGION_SEQUENCES, none, args->scratch);
    uint32_t bucket = layer_sequences(layer, args->tokens) * plan->capacity;
    walk_split walk = workspace_walk(layer, args->tokens);

    if (layer_sorts(layer) && args->tokens > 0) {
        sort_buffers buffers = {
            .keys = {workspace_region(&ws, REGION_SORT_KEYS, none, args->scratch),
                     workspace_region(&ws, REGION_SORT_KEYS_2, none, args->scratch)},
            .order = {workspace_region(&ws, REGION_SORT_ORDER, none, args->scratch),
                      workspace_region(&ws, REGION_SORT_ORDER_2, none, args->scratch)},
            .histogram = histogram,
        };
        int in = 0;
        TRY(sort_walk(layer, chain, args, &buffers, &in));
        order = buffers.order[in];
    }
    TRY(KERNEL_SET(kernels[KERNEL_PLAN_HISTOGRAM],
                   WALK_ARGS(layer, args, order, histogram, walk, plan->pairs), ARG_F32(slot_of),
                   ARG_F32(row_of), ARG_F32(token_of), ARG_F32(tile_expert),
                   ARG_F32(plan_array(args->plan, plan->rerouted_in)),
                   ARG_F32(plan_array(args->plan, plan->rerouted_out)), arg_u32(plan->slots),
                   arg_u32(plan->slots / plan->row_tile)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_HISTOGRAM], walk.blocks.count, group));
    TRY(scan(layer, chain, args, &ws, &walk));
    TRY(KERNEL_SET(kernels[KERNEL_PLAN_OFFSETS], ARG_F32(load), ARG_F32(offsets), arg_u32(experts),
                   arg_u32(dropless), arg_u32(bucket), arg_u32(plan->row_tile)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_OFFSETS], 1, group));
    TRY(KERNEL_SET(
        kernels[KERNEL_PLAN_SCATTER], WALK_ARGS(layer, args, order, histogram, walk, plan->pairs),
        ARG_F32(kept), ARG_F32(offsets), ARG_F32(bases), ARG_F32(slot_of), ARG_F32(row_of),
        ARG_F32(token_of), ARG_F32(tile_expert), arg_u32(experts), arg_u32(plan->row_tile)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_SCATTER], walk.blocks.count, group));
    if (layer_reroutes(layer))
        TRY(step_reroute_begin(layer, chain, args, plan));
    if (layer_reroutes(layer) && args->scores.mem)
        TRY(step_reroute(layer, chain, args));
done:
    return status;
}

clmoe_status step_plan_renorm(const clmoe_layer *layer, launch *chain, uint32_t tokens,
                              const clmoe_weights *weights, clmoe_buf ids, clmoe_buf plan,
                              clmoe_buf pair_weights) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_PLAN_RENORM];
    uint32_t group = layer->group;
    workspace_layout ws;
    clmoe_buf none = {0};
    TRY(workspace_layout_get(layer, tokens, &ws));
    TRY(KERNEL_SET(kernel, ARG_F32(ids), ARG_F32(plan_array(plan, ws.plan.slot_of)),
                   ARG_F32(layer->desc.router.expert_scale ? weights->expert_scale : none),
                   ARG_F32(pair_weights), arg_u32(tokens),
                   arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(tokens, group), group));
done:
    return status;
}
