/* x -> logits -> noisy logits -> scores; and from the gradient on logits back to x. */
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

clmoe_status step_logits(const batch *b, launch *chain, clmoe_buf *noisy) {
    clmoe_status status = CLMOE_SUCCESS;
    *noisy = b->logits;
    if (!b->logits_given)
        TRY(make_logits(b, chain));
    if (b->state.mem && layer_is_noisy(b->layer)) {
        TRY(step_noise(b, chain, !b->logits_given));
        *noisy = region(b, REGION_NOISY);
    }
done:
    return status;
}

clmoe_status step_score(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf noisy;
    TRY(step_logits(b, chain, &noisy));
    TRY(step_score_rows(b, chain, noisy, b->scores));
    if (b->layer->desc.router.groups.two_level)
        TRY(step_two_level_scores(b, chain));
done:
    return status;
}

/* Rows dlogits [T,n] through weights [n,D]: added to router_dx, whose first part is written. */
static clmoe_status add_router_dx(batch *b, launch *chain, clmoe_buf dlogits, uint32_t n,
                                  clmoe_buf weights) {
    clmoe_status status = CLMOE_SUCCESS;
    const dense_map map = {.rows = b->tokens,
                           .n = b->layer->desc.dim,
                           .k = n,
                           .a = dlogits,
                           .weight = weights,
                           .out = b->router_dx,
                           .accumulate = b->router_dx_begun};
    TRY(gemm_dense(&b->layer->dense_back, chain, &map));
    b->router_dx_begun = true;
done:
    return status;
}

/* Whether x Wn^T had a part in the logits. */
static bool noise_is_learned(const batch *b) {
    return b->state.mem && b->layer->desc.router.noise.kind == CLMOE_NOISE_LEARNED;
}

clmoe_status step_score_backward(batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &b->layer->desc.router;
    const uint32_t columns = b->layer->columns;
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    if (!b->logits_given)
        TRY(add_router_dx(b, chain, b->dlogits_out, columns, b->weights->router));
    if (noise_is_learned(b))
        TRY(add_router_dx(b, chain, b->dnoise_out, columns, b->weights->noise_router));
    if (router->groups.two_level)
        TRY(add_router_dx(b, chain, b->dgroup_out, router->groups.count, b->weights->group_router));
    if (b->router_dx_begun && b->state.mem && router->noise.jitter > 0 && !batch_jitters_experts(b))
        TRY(step_jitter_rows(b, chain, b->router_dx, b->router_dx));
done:
    return status;
}

/* Of a router that had no part in the choice: 0. */
static clmoe_status router_gradient(const batch *b, launch *chain, bool used,
                                    const dense_gradient *map) {
    const gemm_gradient_use *use = &b->layer->dense_gradient;
    const gemm_gradient rows = batch_rows(b);
    const size_t bytes = (size_t)map->m * map->n * type_bytes(use->shape.c_type);
    if (used)
        return gemm_dense_gradient(use, chain, &rows, map);
    return map->to.mem && !b->accumulate ? launch_zero(chain, map->to, bytes) : CLMOE_SUCCESS;
}

clmoe_status step_score_gradients(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &b->layer->desc.router;
    const uint32_t R = b->layer->columns, D = b->layer->desc.dim;
    const clmoe_buf x = b->state.mem && router->noise.jitter > 0 ? b->jittered : b->x;
    const dense_gradient clean = {R, D, b->dlogits_out, x, b->gradients.router};
    const dense_gradient noise = {R, D, b->dnoise_out, x, b->gradients.noise_router};
    const dense_gradient groups = {router->groups.count, D, b->dgroup_out, x,
                                   b->gradients.group_router};
    TRY(router_gradient(b, chain, b->routed && !b->logits_given, &clean));
    if (router->noise.kind == CLMOE_NOISE_LEARNED)
        TRY(router_gradient(b, chain, b->routed && noise_is_learned(b), &noise));
    if (router->groups.two_level)
        TRY(router_gradient(b, chain, b->routed, &groups));
done:
    return status;
}
