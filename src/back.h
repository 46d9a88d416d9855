/* What clmoe_backward() and its single steps are both made of: steps of several rooms. */
#ifndef CLMOE_BACK_H
#define CLMOE_BACK_H

#include "steps.h"

/* Which parts a call is asked for. */
static inline bool back_has_data(clmoe_backward_parts parts) {
    return parts != CLMOE_BACKWARD_WEIGHTS;
}

static inline bool back_has_weights(clmoe_backward_parts parts, const clmoe_gradients *gradients) {
    return parts != CLMOE_BACKWARD_DATA && gradients;
}

/* The list of tokens that are not masked, with a mask; and x as forward jittered it. */
clmoe_status back_unmasked(const batch *b, launch *chain);
clmoe_status back_prepare(const batch *b, launch *chain);

/* dy -> dxe, dots; and the gradients of the experts' weights. Not with Soft MoE. */
clmoe_status back_experts(const batch *b, launch *chain);
clmoe_status back_experts_gradients(const batch *b, launch *chain);
/* The gradients of all routers, from dlogits_out and what stands beside it. */
clmoe_status back_routers_gradients(const batch *b, launch *chain);
/* dxe, shared_dx, router_dx -> dx. */
clmoe_status back_dispatch(const batch *b, launch *chain);

#endif
