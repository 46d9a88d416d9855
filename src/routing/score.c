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

clmoe_status router_input(const batch *b, launch *chain, clmoe_buf *x) {
    clmoe_status status = CLMOE_SUCCESS;
    *x = b->x;
    if (!b->state.mem || b->layer->desc.router.noise.jitter <= 0)
        return CLMOE_SUCCESS;
    TRY(step_jitter(b, chain));
    *x = b->jittered;
done:
    return status;
}

clmoe_status step_score_rows(const batch *b, launch *chain, clmoe_buf noisy, clmoe_buf scores) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_SCORE];
    router_switches switches = layer->router;
    switches.topk_first |= layer->policy->by_logit;
    TRY(KERNEL_SET(kernel, ARG_AS(logits, ARG_F32(noisy)), ARG_F32(scores), ARG_F32(b->state),
                   ARG_STRUCT(switches)));
    TRY(launch_1d(chain, kernel, b->tokens, layer->score_group));
done:
    return status;
}

static clmoe_status make_logits(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    dense_map map = {.rows = b->tokens,
                     .n = layer->columns,
                     .k = layer->desc.dim,
                     .weight = b->weights->router,
                     .out = b->logits};
    if (layer->desc.router.bias)
        map.bias = b->weights->router_bias;
    TRY(router_input(b, chain, &map.a));
    TRY(gemm_dense(&layer->dense, chain, &map));
done:
    return status;
}

clmoe_status step_score(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf noisy = b->logits;
    if (!b->logits_given)
        TRY(make_logits(b, chain));
    if (b->state.mem && layer_is_noisy(b->layer)) {
        TRY(step_noise(b, chain, !b->logits_given));
        noisy = region(b, REGION_NOISY);
    }
    TRY(step_score_rows(b, chain, noisy, b->scores));
    if (b->layer->desc.router.groups.two_level)
        TRY(step_two_level_scores(b, chain));
done:
    return status;
}
