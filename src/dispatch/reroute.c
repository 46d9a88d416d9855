/* Dropped pairs -> experts that have room. */
#include "steps.h"

#include <stdio.h>

/*
 * Rounds that spread over the device; one group does what they leave. Nothing comes back to the
 * host, so a round costs its launches even when nobody asks any more.
 */
enum { WIDE_ROUNDS = 16 };

_Static_assert(REROUTE_WORDS == 3 + 15 + 1, "reroute.cl has three words and WISHES + 1 per token");

clmoe_status reroute_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_REROUTE_BEGIN, "reroute_begin"},     {KERNEL_REROUTE_ASK, "reroute_ask"},
        {KERNEL_REROUTE_ACCEPT, "reroute_accept"},   {KERNEL_REROUTE_FINISH, "reroute_finish"},
        {KERNEL_REROUTE_WEIGHTS, "reroute_weights"},
    };
    char options[64];
    if (!layer_reroutes(layer))
        return CLMOE_SUCCESS;
    snprintf(options, sizeof options, "-DGROUP=%u", layer->group);
    return layer_kernels(layer, "dispatch/reroute", options, kernels,
                         sizeof kernels / sizeof kernels[0]);
}

/* The scratch arrays, [T] each, [T, WISHES + 1], and how many tokens are in `waiting`. */
typedef struct reroute_scratch {
    clmoe_buf asked, changed, waiting, wishes, waiting_count;
} reroute_scratch;

static reroute_scratch scratch_of(const workspace_layout *ws, const clmoe_plan_args *args) {
    clmoe_buf none = {0}, all = workspace_region(ws, REGION_REROUTE, none, args->scratch);
    size_t bytes = args->tokens * sizeof(cl_int);
    return (reroute_scratch){all, plan_array(all, bytes), plan_array(all, 2 * bytes),
                             plan_array(all, 3 * bytes),
                             workspace_region(ws, REGION_REROUTE_COUNT, none, args->scratch)};
}

/* The arguments the rounds share, in the order of reroute.cl's REROUTE_ARGS. */
#define REROUTE_ARGS(layer, args, plan, scratch)                                                   \
    ARG_F32((args)->scores), ARG_F32((args)->live), ARG_U8((args)->token_mask),                    \
        ARG_F32((args)->token_offsets), ARG_F32((args)->ids),                                      \
        ARG_F32(plan_array((args)->plan, (plan)->kept)),                                           \
        ARG_F32(plan_array((args)->plan, (plan)->rerouted_in)),                                    \
        ARG_F32(plan_array((args)->plan, (plan)->rerouted_out)),                                   \
        ARG_F32(plan_array((args)->plan, (plan)->offsets)),                                        \
        ARG_F32(plan_array((args)->plan, (plan)->slot_of)),                                        \
        ARG_F32(plan_array((args)->plan, (plan)->row_of)),                                         \
        ARG_F32(plan_array((args)->plan, (plan)->token_of)),                                       \
        ARG_F32(plan_array((args)->plan, (plan)->tile_expert)), ARG_F32((scratch).asked),          \
        ARG_F32((scratch).changed), ARG_F32((scratch).waiting), ARG_F32((scratch).wishes),         \
        ARG_F32((args)->state), arg_u32((args)->tokens), arg_u32((layer)->desc.top_k),             \
        arg_u32((layer)->desc.num_experts), arg_u32((plan)->capacity), arg_u32((plan)->row_tile)

/* In each round an expert becomes full or every token that asks is served. */
static uint32_t most_rounds(const clmoe_layer *layer) {
    return layer->desc.num_experts + layer->desc.top_k;
}

/* Work-groups of one work-item run serially: one group of them needs no help. */
static uint32_t wide_rounds(const clmoe_layer *layer) {
    uint32_t bound = most_rounds(layer);
    if (layer->group == 1)
        return 0;
    return bound < WIDE_ROUNDS ? bound : WIDE_ROUNDS;
}

/* The rounds that are left, by one group: a round may look at every expert for every token. */
static clmoe_status finish_pairs(const clmoe_layer *layer, launch *chain,
                                 const clmoe_plan_args *args, const clmoe_plan_layout *plan,
                                 const reroute_scratch *scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel finish = layer->kernels[KERNEL_REROUTE_FINISH];
    const uint32_t begin = wide_rounds(layer), end = most_rounds(layer);
    const uint64_t share = launch_share(chain, (uint64_t)args->tokens * layer->desc.num_experts);
    const uint32_t most = share < end ? (uint32_t)share : end;
    for (uint32_t round = begin; round < end; round += most) {
        TRY(KERNEL_SET(finish, REROUTE_ARGS(layer, args, plan, *scratch),
                       ARG_F32(scratch->waiting_count), arg_u32(round == begin),
                       arg_u32(round == 0), arg_u32(most)));
        TRY(launch_1d(chain, finish, 1, layer->group));
    }
done:
    return status;
}

static clmoe_status reroute_pairs(const clmoe_layer *layer, launch *chain,
                                  const clmoe_plan_args *args, const clmoe_plan_layout *plan,
                                  const reroute_scratch *scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel ask = layer->kernels[KERNEL_REROUTE_ASK];
    cl_kernel accept = layer->kernels[KERNEL_REROUTE_ACCEPT];
    uint32_t group = layer->group, tokens = args->tokens, rounds = wide_rounds(layer);
    uint32_t groups = divide_up(tokens, group);
    if (rounds > 0)
        TRY(KERNEL_SET(accept, REROUTE_ARGS(layer, args, plan, *scratch)));
    for (uint32_t round = 0; round < rounds; round++) {
        TRY(KERNEL_SET(ask, REROUTE_ARGS(layer, args, plan, *scratch), arg_u32(round == 0)));
        TRY(launch_1d(chain, ask, groups, group));
        TRY(launch_1d(chain, accept, layer->desc.num_experts, group));
    }
    TRY(finish_pairs(layer, chain, args, plan, scratch));
done:
    return status;
}

clmoe_status step_reroute_begin(const clmoe_layer *layer, launch *chain,
                                const clmoe_plan_args *args, const clmoe_plan_layout *plan) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_REROUTE_BEGIN];
    uint32_t group = layer->group;
    TRY(KERNEL_SET(kernel, ARG_F32(args->ids), ARG_F32(args->pair_weights), ARG_F32(args->live),
                   ARG_U8(args->token_mask), ARG_F32(args->token_offsets),
                   ARG_F32(plan_array(args->plan, plan->chosen_ids)),
                   ARG_F32(plan_array(args->plan, plan->chosen_weights)), arg_u32(args->tokens),
                   arg_u32(layer->desc.top_k)));
    TRY(launch_1d(chain, kernel, divide_up(args->tokens, group), group));
done:
    return status;
}

clmoe_status step_reroute(const clmoe_layer *layer, launch *chain, const clmoe_plan_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_REROUTE_WEIGHTS];
    uint32_t group = layer->group, tokens = args->tokens;
    clmoe_buf none = {0};
    workspace_layout ws;
    if (tokens == 0)
        return CLMOE_SUCCESS;
    TRY(workspace_layout_get(layer, tokens, &ws));
    reroute_scratch scratch = scratch_of(&ws, args);
    TRY(reroute_pairs(layer, chain, args, &ws.plan, &scratch));
    TRY(KERNEL_SET(kernel, ARG_F32(args->scores), ARG_F32(args->live), ARG_F32(args->token_offsets),
                   ARG_F32(layer->desc.router.expert_scale ? args->weights->expert_scale : none),
                   ARG_F32(args->ids), ARG_F32(args->pair_weights), ARG_F32(scratch.changed),
                   arg_u32(tokens), arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(tokens, group), group));
done:
    return status;
}
