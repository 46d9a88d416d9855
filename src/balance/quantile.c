/* The quantile rule of the selection bias: the scores of a batch -> counts, counts -> the bias. */
#include "balance/state.clh"
#include "check/check.h"
#include "steps.h"

_Static_assert((int)CLMOE_BIAS_BINS == (int)BIAS_BINS, "cl/balance/state.clh has other bins");

enum {
    OWNED_EXPERTS = 16, /* of a work-item that is a group: a line of scores */
    TOKENS_PER_GROUP = 16,
};

const char *layer_lacks_quantile(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
    if (router->policy != CLMOE_POLICY_TOKEN_CHOICE)
        return "router.policy is not token choice";
    if (!router->select_bias)
        return "router.select_bias is 0";
    if (router->groups.count > 1)
        return "router.groups.count is more than 1";
    if (router->score != CLMOE_SCORE_SOFTMAX && router->score != CLMOE_SCORE_SIGMOID)
        return "router.score is neither softmax nor sigmoid";
    if (router->order != CLMOE_ORDER_SCORE_THEN_TOPK)
        return "router.order is top-k then score";
    if (desc->num_identity_experts > 0)
        return "num_identity_experts is not 0";
    return desc->top_k < desc->num_experts ? NULL : "top_k is not less than num_experts";
}

clmoe_status clmoe_bias_counts_size(const clmoe_layer *layer, size_t *bytes) {
    if (!layer || !bytes)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", layer ? "bytes" : "layer");
    *bytes = layer_bias_counts_bytes(layer);
    return CLMOE_SUCCESS;
}

clmoe_status quantile_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_BIAS_COUNTS, "quantile_count"},
        {KERNEL_BIAS_QUANTILE, "quantile_bias"},
    };
    clmoe_status status = CLMOE_SUCCESS;
    if (layer_lacks_quantile(&layer->desc))
        return CLMOE_SUCCESS;
    TRY(cutoff_create(layer));
    TRY(GROUP_KERNELS(layer, "balance/quantile", kernels));
done:
    return status;
}

clmoe_status step_bias_counts(const batch *b, launch *chain, clmoe_buf scores, clmoe_buf cutoffs) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const uint32_t E = layer->desc.num_experts;
    const uint32_t each = layer->group == 1 ? OWNED_EXPERTS : TOKENS_PER_GROUP;
    const uint32_t groups = divide_up(layer->group == 1 ? E : b->tokens, each);
    cl_kernel kernel = layer->kernels[KERNEL_BIAS_COUNTS];
    if (!b->counts_added)
        TRY(launch_zero(chain, b->bias_counts, layer_bias_counts_bytes(layer)));
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(KERNEL_SET(kernel, ARG_F32(scores), ARG_F32(cutoffs), ARG_U8(b->token_mask),
                   ARG_F32(b->state), ARG_F32(b->bias_counts), ARG_UINT(b->tokens),
                   ARG_AS(experts, ARG_UINT(E)), ARG_UINT(each)));
    TRY(launch_1d(chain, kernel, groups, layer->group));
done:
    return status;
}

clmoe_status step_bias_quantile(const clmoe_layer *layer, launch *chain,
                                const clmoe_balance_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t experts = layer->desc.num_experts;
    cl_kernel kernel = layer->kernels[KERNEL_BIAS_QUANTILE];
    TRY(KERNEL_SET(kernel, ARG_F32(args->state), ARG_F32(args->bias_counts), ARG_F32(args->stats),
                   ARG_F32(args->load), ARG_UINT(layer->columns), ARG_UINT(experts),
                   ARG_AS(top_k, ARG_UINT(layer->desc.top_k))));
    TRY(launch_1d(chain, kernel, experts, layer->group));
done:
    return status;
}
