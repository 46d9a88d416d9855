/* Groups first, experts within them then: logits -> scores -> ids, weights. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

clmoe_status two_level_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    char options[32];
    if (!layer->desc.router.two_level)
        return CLMOE_SUCCESS;
    snprintf(options, sizeof options, "-DGROUP=%u", layer->group);
    TRY(program_kernel(layer->context, "routing/two_level", options, "two_level_scores",
                       &layer->kernels[KERNEL_TWO_LEVEL_SCORES]));
    TRY(program_kernel(layer->context, "routing/two_level", options, "two_level_topk",
                       &layer->kernels[KERNEL_TWO_LEVEL_TOPK]));
done:
    return status;
}

clmoe_status step_group_logits(const clmoe_layer *layer, launch *chain, uint32_t tokens,
                               const clmoe_weights *weights, clmoe_buf x, clmoe_buf state,
                               clmoe_buf scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf none = {0};
    workspace_layout ws;
    TRY(workspace_layout_get(layer, tokens, &ws));
    TRY(router_input(layer, chain, tokens, &x, state, scratch));
    TRY(gemm_dense(&layer->dense, chain, tokens, x, weights->group_router, none,
                   layer->desc.router.num_groups, layer->desc.dim,
                   workspace_region(&ws, REGION_GROUP_LOGITS, none, scratch)));
done:
    return status;
}

clmoe_status step_two_level_scores(const clmoe_layer *layer, launch *chain,
                                   const clmoe_score_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_TWO_LEVEL_SCORES];
    uint32_t group = layer->group, groups = layer->desc.router.num_groups;
    clmoe_buf none = {0};
    workspace_layout ws;
    if (args->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    clmoe_buf logits = workspace_region(&ws, REGION_GROUP_LOGITS, none, args->scratch);
    TRY(step_group_logits(layer, chain, args->tokens, args->weights, args->x, args->state,
                          args->scratch));
    TRY(KERNEL_SET(kernel, ARG_F32(logits), ARG_F32(args->scores), arg_u32(args->tokens),
                   arg_u32(groups), arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(args->tokens, group), group));
done:
    return status;
}

clmoe_status step_two_level_topk(const clmoe_layer *layer, launch *chain,
                                 const clmoe_topk_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel kernel = layer->kernels[KERNEL_TWO_LEVEL_TOPK];
    uint32_t group = layer->group;
    clmoe_buf none = {0};
    TRY(KERNEL_SET(kernel, ARG_F32(args->scores), ARG_F32(select_bias_of(layer, args)),
                   ARG_F32(router->expert_scale ? args->weights->expert_scale : none),
                   ARG_F32(args->ids), ARG_F32(args->weights_out), ARG_F32(args->live),
                   arg_u32(args->tokens), arg_u32(router->num_groups),
                   arg_struct(&layer->router, sizeof layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(args->tokens, group), group));
done:
    return status;
}
