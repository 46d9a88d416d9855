/* scores -> the tokens each expert takes, as pairs in the order of tokens. */
#include "routing/expert_choice.clh"
#include "steps.h"

enum {
    KERNEL_KEYS = KERNEL_POLICY,
    KERNEL_THRESHOLDS,
    KERNEL_PAIRS,
};

static clmoe_status create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_KEYS, "choice_keys"},
        {KERNEL_THRESHOLDS, "choice_thresholds"},
        {KERNEL_SELECT_COUNTS, "select_counts"},
        {KERNEL_SELECT_OFFSETS, "select_offsets"},
        {KERNEL_PAIRS, "choice_pairs"},
    };
    return GROUP_KERNELS(layer, "routing/expert_choice", kernels);
}

static clmoe_status find_thresholds(const batch *b, launch *chain, uint32_t capacity,
                                    clmoe_buf keys, clmoe_buf thresholds) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->group, columns = layer->columns, tokens = b->tokens;
    size_t tiles[] = {divide_up(tokens, CHOICE_SIDE), divide_up(columns, CHOICE_SIDE)};
    TRY(KERNEL_SET(kernels[KERNEL_KEYS], ARG_F32(b->scores), ARG_U8(b->token_mask), ARG_F32(keys),
                   ARG_UINT(tokens), ARG_UINT(columns)));
    TRY(launch_kernel(chain, kernels[KERNEL_KEYS], 2, tiles, (size_t[]){group, 1}));
    TRY(KERNEL_SET(kernels[KERNEL_THRESHOLDS], ARG_F32(keys), ARG_F32(thresholds),
                   ARG_F32(b->state), ARG_UINT(tokens), ARG_UINT(capacity)));
    TRY(launch_1d(chain, kernels[KERNEL_THRESHOLDS], columns, group));
done:
    return status;
}

uint32_t select_groups(const batch *b) {
    const uint32_t group = b->layer->group;
    return divide_up(b->tokens, group == 1 ? CHOICE_SERIAL_SPAN : group);
}

clmoe_status step_select_offsets(const batch *b, launch *chain, clmoe_buf keys,
                                 clmoe_buf thresholds) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    TRY(KERNEL_SET(kernels[KERNEL_SELECT_COUNTS], ARG_F32(keys), ARG_F32(thresholds),
                   ARG_AS(counts, ARG_F32(b->token_offsets)), ARG_UINT(b->tokens),
                   ARG_AS(columns, ARG_UINT(layer->columns))));
    TRY(launch_1d(chain, kernels[KERNEL_SELECT_COUNTS], select_groups(b), layer->group));
    TRY(KERNEL_SET(kernels[KERNEL_SELECT_OFFSETS], ARG_AS(offsets, ARG_F32(b->token_offsets)),
                   ARG_UINT(b->tokens)));
    TRY(launch_1d(chain, kernels[KERNEL_SELECT_OFFSETS], 1, layer->group));
done:
    return status;
}

static clmoe_status choose(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    const cl_kernel *kernels = layer->kernels;
    uint32_t columns = layer->columns, tokens = b->tokens;
    clmoe_buf keys = region(b, REGION_CHOICE_KEYS);
    clmoe_buf thresholds = region(b, REGION_CHOICE_THRESHOLDS);
    if (tokens > 0)
        TRY(find_thresholds(b, chain, b->ws.plan.capacity, keys, thresholds));
    TRY(step_select_offsets(b, chain, keys, thresholds));
    TRY(KERNEL_SET(kernels[KERNEL_PAIRS], ARG_F32(keys), ARG_F32(thresholds),
                   ARG_F32(b->token_offsets), ARG_F32(expert_scale_of(b)), ARG_F32(b->ids),
                   ARG_F32(b->pair_weights), ARG_UINT(tokens), ARG_UINT(columns),
                   ARG_UINT(b->ws.plan.pairs), ARG_FLOAT(router->scale)));
    TRY(launch_1d(chain, kernels[KERNEL_PAIRS], select_groups(b), layer->group));
done:
    return status;
}

const routing_policy expert_choice_policy = {.create = create, .step = choose};
