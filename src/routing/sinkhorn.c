/* scores -> balanced choices -> ids, weights. */
#include "steps.h"

enum {
    KERNEL_START = KERNEL_POLICY,
    KERNEL_EXP,
    KERNEL_ROWS,
    KERNEL_COLUMNS,
    KERNEL_ROUNDS,
    KERNEL_CHOICES,
    KERNEL_WEIGHTS,
};

static clmoe_status create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    static const kernel_entry kernels[] = {
        {KERNEL_START, "sinkhorn_start"},     {KERNEL_EXP, "sinkhorn_exp"},
        {KERNEL_ROWS, "sinkhorn_rows"},       {KERNEL_COLUMNS, "sinkhorn_columns"},
        {KERNEL_ROUNDS, "sinkhorn_rounds"},   {KERNEL_CHOICES, "sinkhorn_choices"},
        {KERNEL_WEIGHTS, "sinkhorn_weights"},
    };
    TRY(GROUP_KERNELS(layer, "routing/sinkhorn", kernels));
    TRY(topk_create(layer));
done:
    return status;
}

/* Regions of one call. */
typedef struct sinkhorn_buffers {
    clmoe_buf choices, tops, d1, partials;
} sinkhorn_buffers;

/* By serial groups: each would make d1 for itself at the cost of all. */
static clmoe_status iterate_serially(const batch *b, launch *chain, const sinkhorn_buffers *at) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel rows = layer->kernels[KERNEL_ROWS];
    cl_kernel columns = layer->kernels[KERNEL_COLUMNS];
    block_split blocks = workspace_token_blocks(layer->group, b->tokens);
    TRY(KERNEL_SET(rows, ARG_AS(c, ARG_F32(at->choices)), ARG_U8(b->token_mask), ARG_F32(at->d1),
                   ARG_F32(at->partials), ARG_UINT(b->tokens), ARG_UINT(layer->columns),
                   ARG_AS(block_size, ARG_UINT(blocks.size))));
    TRY(KERNEL_SET(columns, ARG_F32(at->partials), ARG_F32(at->d1),
                   ARG_AS(blocks, ARG_UINT(blocks.count)), ARG_UINT(layer->columns),
                   ARG_FLOAT(router->sinkhorn.tolerance)));
    for (uint32_t i = 0; i < router->sinkhorn.iterations; i++) {
        TRY(launch_1d(chain, rows, blocks.count, layer->group));
        TRY(launch_1d(chain, columns, 1, layer->group));
    }
done:
    return status;
}

/* Rounds `first` and behind, over the first `tokens`. */
static clmoe_status launch_rounds(const batch *b, launch *chain, const sinkhorn_buffers *at,
                                  uint32_t tokens, uint32_t first, uint32_t rounds) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_ROUNDS];
    const block_split blocks = workspace_token_blocks(layer->group, b->tokens);
    TRY(KERNEL_SET(
        kernel, ARG_AS(c, ARG_F32(at->choices)), ARG_U8(b->token_mask), ARG_F32(at->d1),
        ARG_F32(at->partials), ARG_UINT(tokens), ARG_UINT(layer->columns),
        ARG_AS(block_size, ARG_UINT(blocks.size)), ARG_AS(blocks, ARG_UINT(blocks.count)),
        ARG_FLOAT(layer->desc.router.sinkhorn.tolerance), ARG_UINT(first), ARG_UINT(rounds)));
    TRY(launch_1d(chain, kernel, tokens > 0 ? blocks.count : 1, layer->group));
done:
    return status;
}

/* The end of the last round is the beginning of one without tokens. */
static clmoe_status iterate(const batch *b, launch *chain, const sinkhorn_buffers *at) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t iterations = b->layer->desc.router.sinkhorn.iterations;
    const bool alone = workspace_token_blocks(b->layer->group, b->tokens).count == 1;
    const uint32_t each = alone ? iterations : 1;
    if (b->layer->group == 1)
        return iterate_serially(b, chain, at);
    for (uint32_t i = 0; i < iterations; i += each)
        TRY(launch_rounds(b, chain, at, b->tokens, i, each));
    TRY(launch_rounds(b, chain, at, 0, iterations, 1));
done:
    return status;
}

static clmoe_status find_d1(const batch *b, launch *chain, const sinkhorn_buffers *at) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    uint32_t group = layer->group, columns = layer->columns;
    TRY(KERNEL_SET(kernels[KERNEL_START], ARG_U8(b->token_mask), ARG_F32(at->d1),
                   ARG_UINT(b->tokens), ARG_UINT(columns),
                   ARG_AS(copies, ARG_UINT(workspace_token_blocks(group, b->tokens).count))));
    TRY(launch_1d(chain, kernels[KERNEL_START], 1, group));
    TRY(KERNEL_SET(kernels[KERNEL_EXP], ARG_AS(logits, ARG_F32(b->scores)), ARG_F32(at->choices),
                   ARG_F32(at->tops), ARG_UINT(columns)));
    TRY(launch_1d(chain, kernels[KERNEL_EXP], b->tokens, group));
    TRY(iterate(b, chain, at));
    TRY(KERNEL_SET(kernels[KERNEL_CHOICES], ARG_AS(logits, ARG_F32(b->scores)), ARG_F32(at->d1),
                   ARG_F32(at->choices), ARG_UINT(columns)));
    TRY(launch_1d(chain, kernels[KERNEL_CHOICES], b->tokens, group));
done:
    return status;
}

static clmoe_status choose(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_WEIGHTS];
    uint32_t group = layer->group;
    batch by_choices = *b;
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    const sinkhorn_buffers at = {
        .choices = region(b, REGION_SINKHORN_CHOICES),
        .tops = region(b, REGION_TOPS),
        .d1 = region(b, REGION_SINKHORN_D1),
        .partials = region(b, REGION_SINKHORN_PARTIALS),
    };
    TRY(find_d1(b, chain, &at));
    by_choices.scores = at.choices;
    TRY(step_topk_scores(&by_choices, chain));
    TRY(KERNEL_SET(kernel, ARG_AS(logits, ARG_F32(b->scores)), ARG_F32(at.tops),
                   ARG_F32(expert_scale_of(b)), ARG_F32(b->ids), ARG_F32(b->live),
                   ARG_F32(b->pair_weights), ARG_UINT(b->tokens), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group), group));
done:
    return status;
}

const routing_policy sinkhorn_policy = {
    .create = create, .step = choose, .by_logit = true, .best_first = true};
