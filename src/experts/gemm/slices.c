/* Dense gradients of weights in slices. */
#include "slices.h"
#include "experts/gemm/slices.clh"

clmoe_status slices_create(clmoe_context *context, const gemm_gradient_shape *shape,
                           gradient_slices *slices) {
    return gemm_gradient_by_column(context, shape, "experts/gemm/slices_add", "add_slices",
                                   &slices->add, &slices->group);
}

void slices_release(gradient_slices *slices) {
    kernel_release(&slices->add);
}

size_t slices_scratch(const void *state, uint32_t experts, size_t slots, uint32_t m, uint32_t n) {
    (void)state;
    const uint64_t elements = (uint64_t)m * n;
    if (experts > 1 || slots <= GRADIENT_MIN_SLICE)
        return 0;
    return sizeof(float) * GRADIENT_SLICES *
           (size_t)(elements < GRADIENT_MAX_SPLIT ? elements : GRADIENT_MAX_SPLIT);
}

bool slices_take(const gemm_gradient *g) {
    return !g->offsets.mem && (uint64_t)g->m * g->n <= GRADIENT_MAX_SPLIT &&
           g->slots > GRADIENT_MIN_SLICE;
}

gemm_gradient slices_of(const gemm_gradient *g) {
    gemm_gradient partial = *g;
    partial.experts = (uint32_t)gemm_tiles(g->slots, gradient_slice(g->slots));
    partial.c = g->scratch;
    partial.types.c_type = CLMOE_F32;
    partial.expert = (uint64_t)g->m * g->n;
    partial.row = g->n;
    partial.accumulate = false;
    return partial;
}

clmoe_status slices_add(const gradient_slices *slices, launch *chain, const gemm_gradient *g) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t groups[] = {g->m, gemm_tiles(g->n, slices->group)};
    const size_t local[] = {1, slices->group};
    TRY(KERNEL_SET(slices->add, ARG_AS(partials, ARG_F32(g->scratch)), ARG_UINT(g->slots),
                   ARG_UINT(g->m), ARG_UINT(g->n), ARG_TYPE(g->c, g->types.c_type),
                   ARG_AS(c_row, ARG_ULONG(g->row)), ARG_UINT(g->accumulate)));
    TRY(launch_kernel(chain, slices->add, 2, groups, local));
done:
    return status;
}
