/* The chain backwards: forward.c from its end. A step reads and writes the batch's buffers. */
#include "back.h"
#include "check/check.h"
#include "runtime/structs.h"

/* Soft MoE: dy -> dxe, and the gradient on the combine weights, which needs ye. */
static clmoe_status soft_moe_experts(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool normalizes = b->layer->desc.normalize_experts != 0;
    const clmoe_buf ye = b->dxe; /* its place, until dxe is made */
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(step_soft_moe_dispatch_again(b, chain));
    TRY(step_soft_moe_combine_backward(b, chain));
    TRY(step_experts_again(b, chain));
    if (normalizes || b->dye.mem)
        TRY(step_output_backward(b, chain, ye, region(b, REGION_DY_ROWS)));
    if (normalizes)
        TRY(step_normalize(b, chain, ye));
    TRY(step_soft_moe_weights_backward(b, chain, ye));
    TRY(step_experts_backward(b, chain));
done:
    return status;
}

/* dy -> dxe and the gradient on the weights of the pairs. */
static clmoe_status routed_experts(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(back_experts(b, chain));
    launch_step(chain, "combine");
    TRY(step_combine_backward(b, chain));
done:
    return status;
}

/* The same, and shared_dx. */
static clmoe_status experts(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    launch_step(chain, "experts");
    TRY(layer_is_soft_moe(b->layer) ? soft_moe_experts(b, chain) : routed_experts(b, chain));
    launch_step(chain, "shared");
    if (b->layer->desc.shared.hidden_dim)
        TRY(step_shared_backward(b, chain));
done:
    return status;
}

/* Soft MoE: dxe -> dlogits, and the tokens' part of dx, one row each, in the place of dxe. */
static clmoe_status soft_moe_route(batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    launch_step(chain, "score");
    TRY(step_soft_moe_dispatch_backward(b, chain));
    b->dxe = b->router_dx;
done:
    return status;
}

/* The gradient on the weights of the pairs -> dlogits -> router_dx. */
static clmoe_status route(batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!b->routed)
        return CLMOE_SUCCESS;
    if (layer_is_soft_moe(b->layer))
        return soft_moe_route(b, chain);
    launch_step(chain, "topk");
    TRY(step_topk_backward(b, chain));
    launch_step(chain, "score");
    TRY(step_score_backward(b, chain));
done:
    return status;
}

static clmoe_status data(batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(experts(b, chain));
    TRY(route(b, chain));
    launch_step(chain, "dispatch");
    if (b->dx.mem)
        TRY(back_dispatch(b, chain));
done:
    return status;
}

static clmoe_status weights(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    launch_step(chain, "experts gradients");
    TRY(back_experts_gradients(b, chain));
    launch_step(chain, "shared gradients");
    if (b->layer->desc.shared.hidden_dim)
        TRY(step_shared_gradients(b, chain));
    launch_step(chain, "other gradients");
    if (b->layer->desc.output_bias)
        TRY(step_output_bias_gradient(b, chain));
    if (layer_is_soft_moe(b->layer))
        TRY(step_soft_moe_gradients(b, chain));
    else
        TRY(back_routers_gradients(b, chain));
    if (b->layer->desc.router.expert_scale)
        TRY(step_expert_scale_gradient(b, chain));
done:
    return status;
}

clmoe_status clmoe_backward(clmoe_layer *layer, cl_command_queue queue,
                            const clmoe_backward_args *args, cl_uint num_wait, const cl_event *wait,
                            cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    batch b;
    clmoe_backward_args own = {0};
    TRY(STRUCT_TAKE_ARGS(args, &own));
    TRY(check_backward(layer, &own));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(launch_profile(&chain, own.profile));
    TRY(bind_backward(&b, layer, &own));
    launch_step(&chain, "prepare");
    TRY(back_prepare(&b, &chain));
    if (back_has_data(own.parts))
        TRY(data(&b, &chain));
    if (back_has_weights(own.parts, own.gradients))
        TRY(weights(&b, &chain));
done:
    return launch_end(&chain, status, event);
}
