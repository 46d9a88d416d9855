/* Dropped pairs -> experts that have room. */
#include "steps.h"

/*
 * Rounds that spread over the device; one group does what they leave. Nothing comes back to the
 * host, so a round costs its launches even when nobody asks any more.
 */
enum { WIDE_ROUNDS = 16 };

/* The largest batch that one group does from the beginning: so few tokens are faster than launches.
 */
enum { ALONE_TOKENS = 1024, ALONE_EXPERTS = 1024 };

clmoe_status reroute_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_REROUTE_BEGIN, "reroute_begin"},     {KERNEL_REROUTE_ASK, "reroute_ask"},
        {KERNEL_REROUTE_ACCEPT, "reroute_accept"},   {KERNEL_REROUTE_FINISH, "reroute_finish"},
        {KERNEL_REROUTE_WEIGHTS, "reroute_weights"},
    };
    if (!layer_reroutes(layer))
        return CLMOE_SUCCESS;
    return GROUP_KERNELS(layer, "dispatch/reroute", kernels);
}

/* The scratch arrays, [T] each, [T, REROUTE_WISHES + 1], and how many tokens are in `waiting`. */
typedef struct reroute_scratch {
    clmoe_buf asked, changed, waiting, wishes, waiting_count;
} reroute_scratch;

static reroute_scratch scratch_of(const batch *b) {
    clmoe_buf all = region(b, REGION_REROUTE);
    size_t bytes = b->tokens * sizeof(cl_int);
    return (reroute_scratch){all, buf_at(all, bytes), buf_at(all, 2 * bytes),
                             buf_at(all, 3 * bytes), region(b, REGION_REROUTE_COUNT)};
}

/* The arguments the rounds share, in the order of reroute.cl's REROUTE_ARGS. */
#define REROUTE_ARGS(b, scratch)                                                                   \
    ARG_F32((b)->scores), ARG_F32((b)->live), ARG_U8((b)->token_mask),                             \
        ARG_F32((b)->token_offsets), ARG_F32((b)->ids), ARG_F32(PLAN_ARRAY(b, kept)),              \
        ARG_F32(PLAN_ARRAY(b, rerouted_in)), ARG_F32(PLAN_ARRAY(b, rerouted_out)),                 \
        ARG_F32(PLAN_ARRAY(b, offsets)), ARG_F32(PLAN_ARRAY(b, slot_of)),                          \
        ARG_F32(PLAN_ARRAY(b, pair_of)), ARG_F32(PLAN_ARRAY(b, token_of)),                         \
        ARG_F32(PLAN_ARRAY(b, tile_expert)), ARG_F32((scratch).asked), ARG_F32((scratch).changed), \
        ARG_F32((scratch).waiting), ARG_F32((scratch).wishes), ARG_F32((b)->state),                \
        ARG_UINT((b)->tokens), ARG_UINT((b)->layer->desc.top_k),                                   \
        ARG_UINT((b)->layer->desc.num_experts), ARG_UINT((b)->ws.plan.capacity),                   \
        ARG_UINT((b)->ws.plan.row_tile)

/* In each round an expert becomes full or every token that asks is served. */
static uint32_t most_rounds(const clmoe_layer *layer) {
    return layer->desc.num_experts + layer->desc.top_k;
}

/* Work-groups of one work-item run serially: one group of them needs no help. */
static uint32_t wide_rounds(const batch *b) {
    const clmoe_layer *layer = b->layer;
    uint32_t bound = most_rounds(layer);
    if (layer->group == 1 ||
        (b->tokens <= ALONE_TOKENS && layer->desc.num_experts <= ALONE_EXPERTS))
        return 0;
    return bound < WIDE_ROUNDS ? bound : WIDE_ROUNDS;
}

/* The rounds that are left, by one group: a round may look at every expert for every token. */
static clmoe_status finish_pairs(const batch *b, launch *chain, const reroute_scratch *scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel finish = layer->kernels[KERNEL_REROUTE_FINISH];
    const uint32_t begin = wide_rounds(b), end = most_rounds(layer);
    const uint64_t share = launch_share(chain, (uint64_t)b->tokens * layer->desc.num_experts);
    const uint32_t most = share < end ? (uint32_t)share : end;
    for (uint32_t round = begin; round < end; round += most) {
        TRY(KERNEL_SET(finish, REROUTE_ARGS(b, *scratch), ARG_F32(scratch->waiting_count),
                       ARG_AS(makes_list, ARG_UINT(round == begin)),
                       ARG_AS(fresh, ARG_UINT(round == 0)), ARG_AS(rounds, ARG_UINT(most))));
        TRY(launch_1d(chain, finish, 1, layer->group));
    }
done:
    return status;
}

static clmoe_status reroute_pairs(const batch *b, launch *chain, const reroute_scratch *scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel ask = layer->kernels[KERNEL_REROUTE_ASK];
    cl_kernel accept = layer->kernels[KERNEL_REROUTE_ACCEPT];
    uint32_t group = layer->group, tokens = b->tokens, rounds = wide_rounds(b);
    uint32_t groups = divide_up(tokens, group);
    if (rounds > 0)
        TRY(KERNEL_SET(accept, REROUTE_ARGS(b, *scratch)));
    for (uint32_t round = 0; round < rounds; round++) {
        TRY(KERNEL_SET(ask, REROUTE_ARGS(b, *scratch), ARG_AS(fresh, ARG_UINT(round == 0))));
        TRY(launch_1d(chain, ask, groups, group));
        TRY(launch_1d(chain, accept, layer->desc.num_experts, group));
    }
    TRY(finish_pairs(b, chain, scratch));
done:
    return status;
}

clmoe_status step_reroute_begin(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_REROUTE_BEGIN];
    uint32_t group = layer->group;
    TRY(KERNEL_SET(kernel, ARG_F32(b->ids), ARG_F32(b->pair_weights), ARG_F32(b->live),
                   ARG_U8(b->token_mask), ARG_F32(b->token_offsets),
                   ARG_F32(PLAN_ARRAY(b, chosen_ids)), ARG_F32(PLAN_ARRAY(b, chosen_weights)),
                   ARG_UINT(b->tokens), ARG_UINT(layer->desc.top_k)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}

clmoe_status step_reroute(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_REROUTE_WEIGHTS];
    uint32_t group = layer->group, tokens = b->tokens;
    if (tokens == 0)
        return CLMOE_SUCCESS;
    reroute_scratch scratch = scratch_of(b);
    TRY(reroute_pairs(b, chain, &scratch));
    TRY(KERNEL_SET(kernel, ARG_F32(b->scores), ARG_F32(b->live), ARG_F32(b->token_offsets),
                   ARG_F32(expert_scale_of(b)), ARG_F32(b->ids), ARG_F32(b->pair_weights),
                   ARG_F32(scratch.changed), ARG_UINT(tokens), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(tokens, group), group));
done:
    return status;
}
