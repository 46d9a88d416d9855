/* ids -> the routing plan. */
#include "steps.h"

#include <stdio.h>

clmoe_status plan_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_PLAN_HISTOGRAM, "plan_histogram"},
        {KERNEL_PLAN_SCAN, "plan_scan"},
        {KERNEL_PLAN_OFFSETS, "plan_offsets"},
        {KERNEL_PLAN_SCATTER, "plan_scatter"},
        {KERNEL_PLAN_RENORM, "plan_renorm"},
        {KERNEL_PLAN_SCAN_SEQUENCES, "plan_scan_sequences"},
    };
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DKEEP=%d -DPAIR_GRID=%d -DSEQUENCES=%d",
             layer->group, (int)layer_keep(layer), layer_is_expert_choice(layer),
             layer_has_sequences(layer));
    return layer_kernels(layer, "dispatch/plan", options, kernels,
                         sizeof kernels / sizeof kernels[0]);
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

    if (layer_sorts(layer) && args->tokens > 0)
        TRY(step_sort(layer, chain, args, &order));
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
