/* The tokens that are not masked, for gradients of dense weights. */
#include "steps.h"

clmoe_status unmasked_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {{KERNEL_UNMASKED, "unmasked_tokens"}};
    return GROUP_KERNELS(layer, "dispatch/unmasked", kernels);
}

/* In REGION_UNMASKED: the list [T], then offsets [2] and kept [1]. */
static clmoe_buf word_at(const batch *b, size_t word) {
    return buf_at(region(b, REGION_UNMASKED), word * sizeof(cl_uint));
}

clmoe_status step_unmasked(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_UNMASKED];
    TRY(KERNEL_SET(kernel, ARG_U8(b->token_mask), ARG_AS(list, ARG_F32(word_at(b, 0))),
                   ARG_AS(offsets, ARG_F32(word_at(b, b->tokens))),
                   ARG_AS(kept, ARG_F32(word_at(b, (size_t)b->tokens + 2))), ARG_UINT(b->tokens)));
    TRY(launch_1d(chain, kernel, 1, layer->group));
done:
    return status;
}

gemm_gradient batch_rows(const batch *b) {
    gemm_gradient rows = {.slots = b->tokens,
                          .experts = 1,
                          .accumulate = b->accumulate,
                          .scratch = region(b, REGION_GRADIENT)};
    if (!b->token_mask.mem)
        return rows;
    rows.token_of = word_at(b, 0);
    rows.offsets = word_at(b, b->tokens);
    rows.kept = word_at(b, (size_t)b->tokens + 2);
    return rows;
}

clmoe_status step_dense_gradient(const batch *b, launch *chain, const dense_gradient *map) {
    const gemm_gradient_use *use = &b->layer->dense_gradient;
    const bool listed = b->token_mask.mem != NULL;
    gemm_gradient problem = batch_rows(b);
    if (!map->to.mem)
        return CLMOE_SUCCESS;
    problem.types = use->shape;
    problem.p = (gemm_rows){map->p, map->m, listed};
    problem.q = (gemm_rows){map->q, map->n, listed};
    problem.m = map->m;
    problem.n = map->n;
    problem.c = map->to;
    problem.row = map->n;
    return use->engine->run(use->state, chain, &problem);
}
