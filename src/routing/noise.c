/* What a state makes random before the choice: jitter of x, noise and dropout of the logits. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

static clmoe_status create(clmoe_layer *layer, kernel_id id, const char *name) {
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DX=%s", layer->score_group,
             type_name(layer->desc.type));
    return program_kernel(layer->context, "routing/noise", options, name, &layer->kernels[id]);
}

clmoe_status noise_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    if (layer->desc.router.noise.jitter > 0)
        TRY(create(layer, KERNEL_JITTER, "jitter_rows"));
    if (layer->desc.router.dropout.experts > 0)
        TRY(create(layer, KERNEL_NOISE_EXPERTS, "noise_experts"));
    if (layer_is_noisy(layer))
        TRY(create(layer, KERNEL_NOISE, "noise_rows"));
done:
    return status;
}

clmoe_status step_jitter_rows(const batch *b, launch *chain, clmoe_buf x, clmoe_buf out) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_JITTER];
    clmoe_type type = layer->desc.type;
    TRY(KERNEL_SET(kernel, ARG_TYPE(x, type), ARG_TYPE(out, type), ARG_F32(b->state),
                   ARG_UINT(layer->desc.dim), ARG_FLOAT(layer->desc.router.noise.jitter)));
    TRY(launch_1d(chain, kernel, b->tokens, layer->score_group));
done:
    return status;
}

clmoe_status step_jitter(const batch *b, launch *chain) {
    return step_jitter_rows(b, chain, b->x, b->jittered);
}

/* x Wn^T, of the x the router sees. */
static clmoe_status raw_noise(const batch *b, launch *chain, bool jittered, clmoe_buf raw) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    clmoe_buf x = b->x;
    if (layer->desc.router.noise.jitter > 0) {
        if (!jittered)
            TRY(step_jitter(b, chain));
        x = b->jittered;
    }
    const dense_map map = {.rows = b->tokens,
                           .n = layer->columns,
                           .k = layer->desc.dim,
                           .a = x,
                           .weight = b->weights->noise_router,
                           .out = raw};
    TRY(gemm_dense(&layer->dense, chain, &map));
done:
    return status;
}

clmoe_status step_noise(const batch *b, launch *chain, bool jittered) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel experts = layer->kernels[KERNEL_NOISE_EXPERTS];
    cl_kernel rows = layer->kernels[KERNEL_NOISE];
    clmoe_buf raw = region(b, REGION_NOISE_RAW);
    clmoe_buf draws = region(b, REGION_DROPOUT);
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    if (router->noise.kind == CLMOE_NOISE_LEARNED)
        TRY(raw_noise(b, chain, jittered, raw));
    if (router->dropout.experts > 0) {
        TRY(KERNEL_SET(experts, ARG_F32(draws), ARG_F32(b->state), ARG_UINT(layer->columns),
                       ARG_UINT(layer->desc.top_k),
                       ARG_AS(probability, ARG_FLOAT(router->dropout.experts))));
        TRY(launch_1d(chain, experts, 1, layer->score_group));
    }
    TRY(KERNEL_SET(rows, ARG_F32(b->logits), ARG_F32(raw), ARG_F32(draws), ARG_F32(b->state),
                   ARG_F32(region(b, REGION_NOISY)), ARG_UINT(layer->columns),
                   ARG_AS(noise, ARG_UINT((uint32_t)router->noise.kind)),
                   ARG_FLOAT(router->noise.scale),
                   ARG_AS(logit_dropout, ARG_FLOAT(router->dropout.logits))));
    TRY(launch_1d(chain, rows, b->tokens, layer->score_group));
done:
    return status;
}
