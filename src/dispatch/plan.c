/* ids -> the routing plan. */
#include "dispatch/plan.clh"
#include "steps.h"

#include <stdio.h>

clmoe_status plan_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_PLAN_HISTOGRAM, "plan_histogram"},
        {KERNEL_PLAN_SCAN, "plan_scan"},
        {KERNEL_PLAN_OFFSETS, "plan_offsets"},
        {KERNEL_PLAN_SCATTER, "plan_scatter"},
        {KERNEL_PLAN_FEW, "plan_few"},
        {KERNEL_PLAN_RENORM, "plan_renorm"},
        {KERNEL_PLAN_REPLICATE, "plan_replicate"},
        {KERNEL_PLAN_SCAN_SEQUENCES, "plan_scan_sequences"},
    };
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DKEEP_RULE=%d -DPAIR_GRID=%d -DSEQUENCES=%d",
             layer->group, (int)layer_keep(layer), layer_lists_pairs(layer),
             layer_has_sequences(layer));
    return layer_kernels(layer, "dispatch/plan", options, kernels,
                         sizeof kernels / sizeof kernels[0]);
}

/* The arguments plan_histogram and plan_scatter share, in the order of plan.cl's WALK_ARGS. */
#define WALK_ARGS(b, order, histogram, walk)                                                       \
    ARG_F32((b)->ids), ARG_F32((b)->live), ARG_U8((b)->token_mask), ARG_F32((b)->token_offsets),   \
        ARG_F32(order), ARG_F32(histogram), ARG_UINT((b)->tokens),                                 \
        ARG_UINT((b)->layer->desc.top_k), ARG_UINT((b)->layer->columns),                           \
        ARG_AS(block_size, ARG_UINT((walk).blocks.size)), ARG_UINT((b)->ws.plan.pairs),            \
        ARG_UINT(layer_sequence_tokens((b)->layer, (b)->tokens)), ARG_UINT((walk).sequence_blocks)

/* Ranks at the blocks' starts, and what follows from them: load, kept, the sequences' bases. */
static clmoe_status scan(const batch *b, launch *chain, const walk_split *walk) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_plan_layout *plan = &b->ws.plan;
    uint32_t group = layer->group, experts = layer->desc.num_experts;
    uint32_t columns = layer->columns;
    clmoe_buf histogram = region(b, REGION_HISTOGRAM);
    clmoe_buf bases = region(b, REGION_SEQUENCES);
    clmoe_buf load = PLAN_ARRAY(b, load), kept = PLAN_ARRAY(b, kept);
    if (layer_has_sequences(layer)) {
        cl_kernel kernel = layer->kernels[KERNEL_PLAN_SCAN_SEQUENCES];
        TRY(KERNEL_SET(kernel, ARG_F32(histogram), ARG_F32(load), ARG_F32(kept),
                       ARG_AS(sequence_base, ARG_F32(bases)), ARG_F32(b->state),
                       ARG_UINT(layer_sequences(layer, b->tokens)), ARG_UINT(walk->sequence_blocks),
                       ARG_UINT(columns), ARG_UINT(experts), ARG_UINT(plan->capacity)));
        TRY(launch_1d(chain, kernel, columns, group));
        return CLMOE_SUCCESS;
    }
    cl_kernel kernel = layer->kernels[KERNEL_PLAN_SCAN];
    TRY(KERNEL_SET(kernel, ARG_F32(histogram), ARG_F32(load), ARG_F32(kept), ARG_F32(b->state),
                   ARG_AS(blocks, ARG_UINT(walk->blocks.count)), ARG_UINT(columns),
                   ARG_UINT(experts), ARG_UINT(layer_is_dropless(layer)),
                   ARG_UINT(plan->capacity)));
    TRY(launch_1d(chain, kernel, columns, group));
done:
    return status;
}

/* Entries of the grid that plan.cl walks. */
static uint32_t grid_entries(const batch *b) {
    return layer_lists_pairs(b->layer) ? b->ws.plan.pairs : b->tokens * b->layer->desc.top_k;
}

/* Whether one group makes the plan in one launch. */
static bool is_few(const batch *b) {
    return !layer_has_sequences(b->layer) && b->layer->columns <= FEW_COLUMNS &&
           grid_entries(b) <= FEW_PAIRS && b->ws.plan.slots <= FEW_SLOTS;
}

static clmoe_status plan_few(const batch *b, launch *chain, clmoe_buf order) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_PLAN_FEW];
    TRY(KERNEL_SET(kernel, ARG_F32(b->ids), ARG_F32(b->live), ARG_U8(b->token_mask),
                   ARG_F32(b->token_offsets), ARG_F32(order), ARG_F32(b->state), PLAN_ARRAYS(b),
                   ARG_UINT(b->tokens), ARG_UINT(layer->desc.top_k), ARG_UINT(layer->columns),
                   ARG_UINT(b->ws.plan.pairs), PLAN_SIZES(b)));
    TRY(launch_1d(chain, kernel, 1, layer->group));
done:
    return status;
}

/* The same by blocks, each step of the counting sort a launch. */
static clmoe_status plan_many(const batch *b, launch *chain, clmoe_buf order) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->group, experts = layer->desc.num_experts;
    const clmoe_plan_layout *plan = &b->ws.plan;
    clmoe_buf histogram = region(b, REGION_HISTOGRAM);
    clmoe_buf load = PLAN_ARRAY(b, load), kept = PLAN_ARRAY(b, kept);
    clmoe_buf offsets = PLAN_ARRAY(b, offsets);
    clmoe_buf slot_of = PLAN_ARRAY(b, slot_of);
    clmoe_buf pair_of = PLAN_ARRAY(b, pair_of);
    clmoe_buf token_of = PLAN_ARRAY(b, token_of);
    clmoe_buf tile_expert = PLAN_ARRAY(b, tile_expert);
    clmoe_buf bases = region(b, REGION_SEQUENCES);
    walk_split walk = workspace_walk(layer, b->tokens);

    TRY(KERNEL_SET(kernels[KERNEL_PLAN_HISTOGRAM], WALK_ARGS(b, order, histogram, walk),
                   ARG_F32(slot_of), ARG_F32(pair_of), ARG_F32(token_of), ARG_F32(tile_expert),
                   ARG_F32(PLAN_ARRAY(b, rerouted_in)), ARG_F32(PLAN_ARRAY(b, rerouted_out)),
                   ARG_UINT(plan->slots), ARG_AS(tiles, ARG_UINT(plan->slots / plan->row_tile))));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_HISTOGRAM], walk.blocks.count, group));
    TRY(scan(b, chain, &walk));
    TRY(KERNEL_SET(kernels[KERNEL_PLAN_OFFSETS], ARG_F32(load), ARG_F32(offsets), ARG_UINT(experts),
                   ARG_UINT(layer_is_dropless(layer)), ARG_AS(capacity, ARG_UINT(plan_bucket(b))),
                   ARG_UINT(plan->row_tile)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_OFFSETS], 1, group));
    TRY(KERNEL_SET(kernels[KERNEL_PLAN_SCATTER], WALK_ARGS(b, order, histogram, walk),
                   ARG_F32(kept), ARG_F32(offsets), ARG_AS(sequence_base, ARG_F32(bases)),
                   ARG_F32(slot_of), ARG_F32(pair_of), ARG_F32(token_of), ARG_F32(tile_expert),
                   ARG_UINT(experts), ARG_UINT(plan->row_tile)));
    TRY(launch_1d(chain, kernels[KERNEL_PLAN_SCATTER], walk.blocks.count, group));
done:
    return status;
}

clmoe_status step_plan(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    clmoe_buf order = {0};
    if (layer_sorts(layer) && b->tokens > 0)
        TRY(step_sort(b, chain, &order));
    TRY((is_few(b) ? plan_few : plan_many)(b, chain, order));
    if (layer_reroutes(layer))
        TRY(step_reroute_begin(b, chain));
    if (layer_reroutes(layer) && b->scores.mem)
        TRY(step_reroute(b, chain));
done:
    return status;
}

clmoe_status step_plan_renorm(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_PLAN_RENORM];
    uint32_t group = layer->group;
    TRY(KERNEL_SET(kernel, ARG_F32(b->ids), ARG_F32(PLAN_ARRAY(b, slot_of)),
                   ARG_F32(expert_scale_of(b)), ARG_F32(b->pair_weights), ARG_UINT(b->tokens),
                   ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}

clmoe_status step_plan_replicate(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_PLAN_REPLICATE];
    uint32_t group = layer->group, pairs = b->ws.plan.pairs;
    TRY(KERNEL_SET(kernel, ARG_F32(b->ids), ARG_F32(PLAN_ARRAY(b, slot_of)),
                   ARG_F32(PLAN_ARRAY(b, offsets)), ARG_F32(b->copies),
                   ARG_F32(b->logical_to_physical), ARG_F32(b->physical_ids), ARG_UINT(pairs),
                   ARG_AS(experts, ARG_UINT(layer->desc.num_experts)), ARG_UINT(layer->columns),
                   ARG_UINT(b->max_copies), ARG_UINT(b->replicas)));
    TRY(launch_1d(chain, kernel, divide_up(pairs, group), group));
done:
    return status;
}
