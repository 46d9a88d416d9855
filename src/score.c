/* x -> logits -> scores. */
#include "steps.h"

clmoe_status step_score(const clmoe_layer *layer, launch *chain, const clmoe_score_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf logits = args->logits_in;
    router_switches switches = layer->router;
    cl_kernel kernel = layer->kernels[KERNEL_SCORE];
    if (!logits.mem) {
        clmoe_buf none = {0};
        clmoe_buf bias = layer->desc.router.bias ? args->weights->router_bias : none;
        TRY(gemm_dense(&layer->dense, chain, args->tokens, args->x, args->weights->router, bias,
                       layer->columns, layer->desc.dim, args->logits));
        logits = args->logits;
    }
    switches.topk_first |= layer_chooses_by_logit(layer);
    TRY(KERNEL_SET(kernel, ARG_F32(logits), ARG_F32(args->scores),
                   arg_struct(&switches, sizeof switches)));
    TRY(launch_1d(chain, kernel, args->tokens, layer->score_group));
    if (layer->desc.router.two_level)
        TRY(step_two_level_scores(layer, chain, args));
done:
    return status;
}
