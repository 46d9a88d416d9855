/* x -> logits -> noisy logits -> scores. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

enum { MIN_SCORE_GROUP = 32, SCORE_COLUMNS = 8 /* per work-item */ };

clmoe_status score_create(clmoe_layer *layer) {
    char options[64];
    uint32_t wanted = layer->columns / SCORE_COLUMNS;
    if (wanted < MIN_SCORE_GROUP)
        wanted = MIN_SCORE_GROUP;
    layer->score_group = power_of_two(wanted, layer->group);
    snprintf(options, sizeof options, "-DGROUP=%u", layer->score_group);
    return program_kernel(layer->context, "routing/score", options, "score_rows",
                          &layer->kernels[KERNEL_SCORE]);
}

clmoe_status router_input(const clmoe_layer *layer, launch *chain, uint32_t tokens, clmoe_buf *x,
                          clmoe_buf state, clmoe_buf scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf none = {0};
    workspace_layout ws;
    if (!state.mem || layer->desc.router.jitter <= 0)
        return CLMOE_SUCCESS;
    TRY(workspace_layout_get(layer, tokens, &ws));
    TRY(step_jitter(layer, chain, tokens, *x, state, scratch));
    *x = workspace_region(&ws, REGION_JITTERED, none, scratch);
done:
    return status;
}

clmoe_status step_score_rows(const clmoe_layer *layer, launch *chain, uint32_t tokens,
                             clmoe_buf noisy, clmoe_buf state, clmoe_buf scores) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_SCORE];
    router_switches switches = layer->router;
    switches.topk_first |= layer_chooses_by_logit(layer);
    TRY(KERNEL_SET(kernel, ARG_F32(noisy), ARG_F32(scores), ARG_F32(state),
                   arg_struct(&switches, sizeof switches)));
    TRY(launch_1d(chain, kernel, tokens, layer->score_group));
done:
    return status;
}

clmoe_status step_score(const clmoe_layer *layer, launch *chain, const clmoe_score_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    bool external = args->logits_in.mem != NULL;
    clmoe_buf none = {0}, x = args->x, logits = external ? args->logits_in : args->logits;
    workspace_layout ws;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    if (!external) {
        clmoe_buf bias = layer->desc.router.bias ? args->weights->router_bias : none;
        TRY(router_input(layer, chain, args->tokens, &x, args->state, args->scratch));
        TRY(gemm_dense(&layer->dense, chain, args->tokens, x, args->weights->router, bias,
                       layer->columns, layer->desc.dim, logits));
    }
    if (args->state.mem && layer_is_noisy(layer)) {
        noise_args noise = {.tokens = args->tokens,
                            .weights = args->weights,
                            .x = x,
                            .x_is_jittered = !external,
                            .logits = logits,
                            .state = args->state,
                            .scratch = args->scratch};
        TRY(step_noise(layer, chain, &noise));
        logits = workspace_region(&ws, REGION_NOISY, none, args->scratch);
    }
    TRY(step_score_rows(layer, chain, args->tokens, logits, args->state, args->scores));
    if (layer->desc.router.two_level)
        TRY(step_two_level_scores(layer, chain, args));
done:
    return status;
}
