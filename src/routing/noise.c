/* What a state makes random before the choice: jitter of x, noise and dropout of the logits. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

static clmoe_buf scratch_region(const workspace_layout *ws, region_id id, clmoe_buf scratch) {
    return workspace_region(ws, id, (clmoe_buf){0}, scratch);
}

static clmoe_status create(clmoe_layer *layer, kernel_id id, const char *name) {
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DX=%s", layer->score_group,
             type_name(layer->desc.type));
    return program_kernel(layer->context, "routing/noise", options, name, &layer->kernels[id]);
}

clmoe_status noise_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    if (layer->desc.router.jitter > 0)
        TRY(create(layer, KERNEL_JITTER, "jitter_rows"));
    if (layer->desc.router.expert_dropout > 0)
        TRY(create(layer, KERNEL_NOISE_EXPERTS, "noise_experts"));
    if (layer_is_noisy(layer))
        TRY(create(layer, KERNEL_NOISE, "noise_rows"));
done:
    return status;
}

clmoe_status step_jitter(const clmoe_layer *layer, launch *chain, uint32_t tokens, clmoe_buf x,
                         clmoe_buf state, clmoe_buf scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_kernel kernel = layer->kernels[KERNEL_JITTER];
    clmoe_type type = layer->desc.type;
    workspace_layout ws;
    TRY(workspace_layout_get(layer, tokens, &ws));
    TRY(KERNEL_SET(kernel, ARG_TYPE(x, type),
                   ARG_TYPE(scratch_region(&ws, REGION_JITTERED, scratch), type), ARG_F32(state),
                   arg_u32(layer->desc.dim), arg_f32(layer->desc.router.jitter)));
    TRY(launch_1d(chain, kernel, tokens, layer->score_group));
done:
    return status;
}

/* x Wn^T, of the x the router sees. */
static clmoe_status raw_noise(const clmoe_layer *layer, launch *chain, const noise_args *args,
                              const workspace_layout *ws, clmoe_buf raw) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf none = {0}, x = args->x;
    if (layer->desc.router.jitter > 0 && !args->x_is_jittered) {
        TRY(step_jitter(layer, chain, args->tokens, x, args->state, args->scratch));
        x = scratch_region(ws, REGION_JITTERED, args->scratch);
    }
    TRY(gemm_dense(&layer->dense, chain, args->tokens, x, args->weights->noise_router, none,
                   layer->columns, layer->desc.dim, raw));
done:
    return status;
}

clmoe_status step_noise(const clmoe_layer *layer, launch *chain, const noise_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_router_desc *router = &layer->desc.router;
    cl_kernel experts = layer->kernels[KERNEL_NOISE_EXPERTS];
    cl_kernel rows = layer->kernels[KERNEL_NOISE];
    workspace_layout ws;
    TRY(workspace_layout_get(layer, args->tokens, &ws));
    clmoe_buf raw = scratch_region(&ws, REGION_NOISE_RAW, args->scratch);
    clmoe_buf draws = scratch_region(&ws, REGION_DROPOUT, args->scratch);
    if (args->tokens == 0)
        return CLMOE_SUCCESS;
    if (router->noise == CLMOE_NOISE_LEARNED)
        TRY(raw_noise(layer, chain, args, &ws, raw));
    if (router->expert_dropout > 0) {
        TRY(KERNEL_SET(experts, ARG_F32(draws), ARG_F32(args->state), arg_u32(layer->columns),
                       arg_u32(layer->desc.top_k), arg_f32(router->expert_dropout)));
        TRY(launch_1d(chain, experts, 1, layer->score_group));
    }
    TRY(KERNEL_SET(rows, ARG_F32(args->logits), ARG_F32(raw), ARG_F32(draws), ARG_F32(args->state),
                   ARG_F32(scratch_region(&ws, REGION_NOISY, args->scratch)),
                   arg_u32(layer->columns), arg_u32((uint32_t)router->noise),
                   arg_f32(router->noise_scale), arg_f32(router->logit_dropout)));
    TRY(launch_1d(chain, rows, args->tokens, layer->score_group));
done:
    return status;
}
