/* What clmoe_backward() and its single steps are both made of: steps of several rooms. */
#ifndef CLMOE_BACK_H
#define CLMOE_BACK_H

#include "steps.h"

/* dy -> dxe, dots; and the gradients of the experts' weights. Not with Soft MoE. */
clmoe_status back_experts(const batch *b, launch *chain);
clmoe_status back_experts_gradients(const batch *b, launch *chain);
/* The gradients of all routers, from dlogits_out and what stands beside it. */
clmoe_status back_routers_gradients(const batch *b, launch *chain);
/* dxe, shared_dx, router_dx -> dx. */
clmoe_status back_dispatch(const batch *b, launch *chain);

#endif
