/* The tokens that are not masked, for gradients of dense weights. */
#include "steps.h"

clmoe_status unmasked_create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {{KERNEL_UNMASKED, "unmasked_tokens"}};
    return GROUP_KERNELS(layer, "dispatch/unmasked", kernels);
}

clmoe_status step_unmasked(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_UNMASKED];
    TRY(KERNEL_SET(kernel, ARG_U8(b->token_mask),
                   ARG_AS(list, ARG_F32(unmasked_at(b, UNMASKED_LIST))),
                   ARG_AS(offsets, ARG_F32(unmasked_at(b, UNMASKED_OFFSETS))),
                   ARG_AS(kept, ARG_F32(unmasked_at(b, UNMASKED_KEPT))), ARG_UINT(b->tokens)));
    TRY(launch_1d(chain, kernel, 1, layer->group));
done:
    return status;
}
