/* scores -> what top-k chooses -> the pairs that rounding keeps and adds, in the order of tokens.
 */
#include "routing/token_rounding.clh"
#include "routing/expert_choice.clh"
#include "steps.h"

_Static_assert((int)CHOICE_SIDE == (int)CHOSEN_BITS, "a tile of keys has a word of bits");

enum {
    KERNEL_KEYS = KERNEL_POLICY,
    KERNEL_THRESHOLDS,
    KERNEL_PAIRS,
};

static clmoe_status create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    static const kernel_entry kernels[] = {
        {KERNEL_KEYS, "rounding_keys"},          {KERNEL_THRESHOLDS, "rounding_thresholds"},
        {KERNEL_SELECT_COUNTS, "select_counts"}, {KERNEL_SELECT_OFFSETS, "select_offsets"},
        {KERNEL_PAIRS, "rounding_pairs"},
    };
    TRY(topk_create(layer));
    TRY(GROUP_KERNELS(layer, "routing/token_rounding", kernels));
done:
    return status;
}

/* What top-k chose, and what follows from it for each expert. */
typedef struct rounding {
    batch top;
    clmoe_buf keys, chosen, thresholds;
} rounding;

static rounding rounding_of(const batch *b) {
    rounding of = {.top = *b,
                   .keys = region(b, REGION_CHOICE_KEYS),
                   .chosen = region(b, REGION_ROUNDING_CHOSEN),
                   .thresholds = region(b, REGION_CHOICE_THRESHOLDS)};
    of.top.ids = region(b, REGION_ROUNDING_IDS);
    of.top.pair_weights = region(b, REGION_ROUNDING_WEIGHTS);
    of.top.live = region(b, REGION_LIVE);
    return of;
}

static clmoe_status find_thresholds(const rounding *of, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const batch *top = &of->top;
    const clmoe_layer *layer = top->layer;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->group, columns = layer->columns, tokens = top->tokens;
    size_t tiles[] = {divide_up(tokens, CHOICE_SIDE), divide_up(columns, CHOICE_SIDE)};
    TRY(KERNEL_SET(kernels[KERNEL_KEYS], ARG_F32(top->scores), ARG_U8(top->token_mask),
                   ARG_AS(top_ids, ARG_F32(top->ids)),
                   ARG_AS(top_weights, ARG_F32(top->pair_weights)),
                   ARG_AS(top_live, ARG_F32(top->live)), ARG_F32(of->keys), ARG_F32(of->chosen),
                   ARG_UINT(tokens), ARG_UINT(columns), ARG_UINT(layer->desc.top_k)));
    TRY(launch_kernel(chain, kernels[KERNEL_KEYS], 2, tiles, (size_t[]){group, 1}));
    TRY(KERNEL_SET(kernels[KERNEL_THRESHOLDS], ARG_F32(of->keys), ARG_F32(of->chosen),
                   ARG_F32(of->thresholds), ARG_UINT(tokens),
                   ARG_AS(multiple, ARG_UINT(workspace_multiple(layer, tokens)))));
    TRY(launch_1d(chain, kernels[KERNEL_THRESHOLDS], columns, group));
done:
    return status;
}

static clmoe_status list_pairs(const batch *b, const rounding *of, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel pairs = layer->kernels[KERNEL_PAIRS];
    TRY(step_select_offsets(b, chain, of->keys, of->thresholds));
    TRY(KERNEL_SET(pairs, ARG_F32(of->keys), ARG_F32(of->thresholds),
                   ARG_AS(offsets, ARG_F32(b->token_offsets)), ARG_F32(b->scores),
                   ARG_F32(expert_scale_of(b)), ARG_F32(b->ids), ARG_F32(b->pair_weights),
                   ARG_UINT(b->tokens), ARG_UINT(b->ws.plan.pairs), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, pairs, select_groups(b), layer->group));
done:
    return status;
}

static clmoe_status choose(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const rounding of = rounding_of(b);
    if (b->tokens > 0) {
        TRY(step_topk_scores(&of.top, chain));
        TRY(find_thresholds(&of, chain));
    }
    TRY(list_pairs(b, &of, chain));
done:
    return status;
}

const routing_policy token_rounding_policy = {.create = create, .step = choose};
