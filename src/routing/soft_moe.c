/* Soft MoE: tokens mixed into the experts' slots, and the slots' outputs into tokens; backward. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

enum {
    KERNEL_NORMS = KERNEL_POLICY,
    KERNEL_SLOT_NORMS,
    KERNEL_LOGITS,
    KERNEL_PARTIALS,
    KERNEL_COLUMNS,
    KERNEL_MIX,
    KERNEL_UNMIX,
    KERNEL_PLAN,
    KERNEL_CLEAR,
    KERNEL_NORMS_BACKWARD, /* of tokens */
    KERNEL_SLOT_NORMS_BACKWARD,
    KERNEL_CLEAN,
    KERNEL_COLUMN_PARTIALS,
    KERNEL_COLUMN_SUMS,
    KERNEL_DLOGITS = KERNEL_POLICY_LAST,
};

/* Of rows of `type`, and backward of their gradient. */
static clmoe_status create_kernel(clmoe_layer *layer, int id, const clmoe_type types[2],
                                  const char *name) {
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DX=%s -DC=%s", layer->group, type_name(types[0]),
             type_name(types[1]));
    return program_kernel(layer->context, "routing/soft_moe", options, name, &layer->kernels[id]);
}

static clmoe_status create_all(clmoe_layer *layer, const kernel_entry *kernels, size_t count) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_type types[] = {layer->desc.type, layer->desc.type};
    for (size_t i = 0; i < count; i++)
        TRY(create_kernel(layer, kernels[i].id, types, kernels[i].name));
done:
    return status;
}

static clmoe_status create(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_NORMS, "soft_moe_norms"},       {KERNEL_LOGITS, "soft_moe_logits"},
        {KERNEL_PARTIALS, "soft_moe_partials"}, {KERNEL_COLUMNS, "soft_moe_columns"},
        {KERNEL_MIX, "soft_moe_dispatch"},      {KERNEL_UNMIX, "soft_moe_combine"},
        {KERNEL_PLAN, "soft_moe_plan"},         {KERNEL_CLEAR, "soft_moe_clear"},
    };
    static const kernel_entry backward[] = {
        {KERNEL_NORMS_BACKWARD, "soft_moe_norms_backward"},
        {KERNEL_CLEAN, "soft_moe_clean"},
        {KERNEL_COLUMN_PARTIALS, "soft_moe_column_partials"},
        {KERNEL_COLUMN_SUMS, "soft_moe_column_sums"},
        {KERNEL_DLOGITS, "soft_moe_dlogits"},
    };
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_type router = layer->desc.router.weight_type;
    const clmoe_type slots[] = {router, layer_gradient_type(layer, router)};
    TRY(create_all(layer, kernels, sizeof kernels / sizeof kernels[0]));
    TRY(create_kernel(layer, KERNEL_SLOT_NORMS, slots, "soft_moe_norms"));
    if (!layer->desc.training)
        return CLMOE_SUCCESS;
    TRY(create_all(layer, backward, sizeof backward / sizeof backward[0]));
    TRY(create_kernel(layer, KERNEL_SLOT_NORMS_BACKWARD, slots, "soft_moe_norms_backward"));
done:
    return status;
}

/* Buckets of p rows, the same for every batch; empty ones without tokens. */
static clmoe_status set_plan(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_plan_layout *plan = &b->ws.plan;
    cl_kernel kernel = layer->kernels[KERNEL_PLAN];
    uint32_t group = layer->group, experts = layer->desc.num_experts;
    uint32_t count = b->tokens > plan->slots ? b->tokens : plan->slots + 1;
    uint32_t per_expert = b->tokens > 0 ? plan->capacity : 0;
    TRY(KERNEL_SET(kernel, ARG_F32(PLAN_ARRAY(b, load)), ARG_F32(PLAN_ARRAY(b, kept)),
                   ARG_F32(PLAN_ARRAY(b, offsets)), ARG_F32(PLAN_ARRAY(b, slot_of)),
                   ARG_F32(PLAN_ARRAY(b, pair_of)), ARG_F32(PLAN_ARRAY(b, token_of)),
                   ARG_F32(PLAN_ARRAY(b, tile_expert)), ARG_F32(b->pair_weights),
                   ARG_UINT(b->tokens), ARG_UINT(experts), ARG_UINT(per_expert),
                   ARG_AS(stride, ARG_UINT(plan->slots / experts)), ARG_UINT(plan->row_tile)));
    TRY(launch_1d(chain, kernel, divide_up(count, group), group));
done:
    return status;
}

/* x -> norms of tokens and slots, and x without what takes no part. */
static clmoe_status set_norms(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    const clmoe_layer_desc *desc = &layer->desc;
    const clmoe_buf none = {0}, router = b->weights->router;
    TRY(KERNEL_SET(kernels[KERNEL_NORMS], ARG_AS(rows, ARG_TYPE(b->x, desc->type)),
                   ARG_U8(b->token_mask), ARG_F32(region(b, REGION_TOKEN_NORMS)),
                   ARG_AS(clean, ARG_TYPE(region(b, REGION_SOFT_MOE_X), desc->type)),
                   ARG_UINT(desc->dim)));
    TRY(launch_1d(chain, kernels[KERNEL_NORMS], b->tokens, layer->group));
    TRY(KERNEL_SET(kernels[KERNEL_SLOT_NORMS],
                   ARG_AS(rows, ARG_TYPE(router, desc->router.weight_type)),
                   ARG_AS(token_mask, ARG_U8(none)), ARG_F32(region(b, REGION_SLOT_NORMS)),
                   ARG_AS(clean, ARG_TYPE(none, desc->router.weight_type)), ARG_UINT(desc->dim)));
    TRY(launch_1d(chain, kernels[KERNEL_SLOT_NORMS], layer_router_rows(layer), layer->group));
done:
    return status;
}

/* x -> logits and the sums of both softmaxes. */
static clmoe_status set_logits(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const cl_kernel *kernels = layer->kernels;
    const clmoe_layer_desc *desc = &layer->desc;
    uint32_t group = layer->group, count = layer_router_rows(layer), T = b->tokens;
    block_split blocks = workspace_token_blocks(layer->group, T);
    const dense_map map = {.rows = T,
                           .n = count,
                           .k = desc->dim,
                           .a = region(b, REGION_SOFT_MOE_X),
                           .weight = b->weights->router,
                           .out = b->logits};
    TRY(set_norms(b, chain));
    TRY(gemm_dense(&layer->dense, chain, &map));
    TRY(KERNEL_SET(kernels[KERNEL_LOGITS], ARG_F32(region(b, REGION_TOKEN_NORMS)),
                   ARG_F32(region(b, REGION_SLOT_NORMS)), ARG_F32(b->logits),
                   ARG_F32(region(b, REGION_TOPS)), ARG_UINT(count),
                   ARG_FLOAT(desc->router.soft_moe.scale)));
    TRY(launch_1d(chain, kernels[KERNEL_LOGITS], T, group));
    TRY(KERNEL_SET(kernels[KERNEL_PARTIALS], ARG_F32(b->logits),
                   ARG_F32(region(b, REGION_SOFT_MOE_PARTIALS)), ARG_AS(tokens, ARG_UINT(T)),
                   ARG_UINT(count), ARG_AS(block_size, ARG_UINT(blocks.size))));
    TRY(launch_1d(chain, kernels[KERNEL_PARTIALS], blocks.count, group));
    TRY(KERNEL_SET(kernels[KERNEL_COLUMNS], ARG_F32(region(b, REGION_SOFT_MOE_PARTIALS)),
                   ARG_F32(region(b, REGION_SOFT_MOE_COLUMNS)),
                   ARG_AS(blocks, ARG_UINT(blocks.count)), ARG_UINT(count)));
    TRY(launch_1d(chain, kernels[KERNEL_COLUMNS], divide_up(count, group), group));
done:
    return status;
}

/* The softmax over tokens, or over slots -> its weights [S,T]. */
static clmoe_status set_slot_weights(const batch *b, launch *chain, bool over_slots) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const uint32_t experts = layer->desc.num_experts;
    const clmoe_buf all = region(b, over_slots ? REGION_TOPS : REGION_SOFT_MOE_COLUMNS);
    cl_kernel kernel = layer->kernels[KERNEL_MIX];
    TRY(KERNEL_SET(kernel, ARG_F32(b->logits), ARG_AS(sums, ARG_F32(all)),
                   ARG_F32(region(b, REGION_SOFT_MOE_DISPATCH)), ARG_UINT(b->tokens),
                   ARG_AS(count, ARG_UINT(layer_router_rows(layer))),
                   ARG_AS(per_expert, ARG_UINT(b->ws.plan.capacity)),
                   ARG_AS(by_token, ARG_UINT(over_slots))));
    const size_t groups[] = {b->ws.plan.slots / experts, experts};
    TRY(launch_kernel(chain, kernel, 2, groups, (size_t[]){layer->group, 1}));
done:
    return status;
}

/* The same [T,S]. */
static clmoe_status set_token_weights(const batch *b, launch *chain, bool over_slots,
                                      clmoe_buf to) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const uint32_t experts = layer->desc.num_experts;
    const clmoe_buf all = region(b, over_slots ? REGION_TOPS : REGION_SOFT_MOE_COLUMNS);
    cl_kernel kernel = layer->kernels[KERNEL_UNMIX];
    TRY(KERNEL_SET(kernel, ARG_F32(b->logits), ARG_AS(sums, ARG_F32(all)),
                   ARG_AS(combine, ARG_F32(to)), ARG_AS(count, ARG_UINT(layer_router_rows(layer))),
                   ARG_UINT(experts), ARG_AS(per_expert, ARG_UINT(b->ws.plan.capacity)),
                   ARG_AS(stride, ARG_UINT(b->ws.plan.slots / experts)),
                   ARG_AS(by_slot, ARG_UINT(!over_slots))));
    TRY(launch_1d(chain, kernel, b->tokens, layer->group));
done:
    return status;
}

/* Rows x [T,D] -> rows of slots, by the weights [S,T]. */
static clmoe_status mix_into_slots(const batch *b, launch *chain, clmoe_buf x, clmoe_buf to) {
    const dense_map mix = {.rows = b->ws.plan.slots,
                           .n = b->layer->desc.dim,
                           .k = b->tokens,
                           .a = region(b, REGION_SOFT_MOE_DISPATCH),
                           .weight = x,
                           .out = to};
    return gemm_dense(&b->layer->mix, chain, &mix);
}

clmoe_status step_soft_moe_dispatch(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(set_plan(b, chain));
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(set_logits(b, chain));
    TRY(set_slot_weights(b, chain, false));
    TRY(set_token_weights(b, chain, true, b->mix));
    TRY(mix_into_slots(b, chain, region(b, REGION_SOFT_MOE_X), b->xe));
done:
    return status;
}

clmoe_status step_soft_moe_dispatch_again(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(set_norms(b, chain));
    TRY(set_slot_weights(b, chain, false));
    TRY(mix_into_slots(b, chain, region(b, REGION_SOFT_MOE_X), region(b, REGION_X_ROWS)));
done:
    return status;
}

/* Rows of padding become 0. */
static clmoe_status clear_padding(const batch *b, launch *chain, clmoe_buf ye) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel clear = layer->kernels[KERNEL_CLEAR];
    const uint32_t experts = layer->desc.num_experts, per_expert = b->ws.plan.capacity;
    const uint32_t stride = b->ws.plan.slots / experts;
    TRY(KERNEL_SET(clear, ARG_TYPE(ye, layer->desc.type), ARG_UINT(layer->desc.dim),
                   ARG_UINT(per_expert), ARG_UINT(stride)));
    TRY(launch_kernel(chain, clear, 2, (size_t[]){stride - per_expert, experts},
                      (size_t[]){layer->group, 1}));
done:
    return status;
}

clmoe_status step_soft_moe_combine(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const dense_map mix = {.rows = b->tokens,
                           .n = b->layer->desc.dim,
                           .k = b->ws.plan.slots,
                           .a = b->mix,
                           .weight = b->ye,
                           .out = b->mixed};
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(clear_padding(b, chain, b->ye));
    TRY(gemm_dense(&b->layer->mix, chain, &mix));
done:
    return status;
}

/* Rows of tokens times rows of slots -> [T,S] f32. */
static clmoe_status set_products(const batch *b, launch *chain, clmoe_buf tokens, clmoe_buf slots,
                                 clmoe_buf to) {
    const dense_map map = {.rows = b->tokens,
                           .n = b->ws.plan.slots,
                           .k = b->layer->desc.dim,
                           .a = tokens,
                           .weight = slots,
                           .out = to};
    return gemm_dense(&b->layer->products, chain, &map);
}

static clmoe_status clean_dy(const batch *b, launch *chain, clmoe_buf clean) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_type type = layer->desc.type;
    cl_kernel kernel = layer->kernels[KERNEL_CLEAN];
    TRY(KERNEL_SET(kernel, ARG_AS(rows, ARG_TYPE(b->dy, type)),
                   ARG_F32(region(b, REGION_TOKEN_NORMS)), ARG_TYPE(clean, type),
                   ARG_UINT(layer->desc.dim)));
    TRY(launch_1d(chain, kernel, b->tokens, layer->group));
done:
    return status;
}

clmoe_status step_soft_moe_combine_backward(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf dy = region(b, REGION_SOFT_MOE_DY);
    TRY(clean_dy(b, chain, dy));
    TRY(set_slot_weights(b, chain, true));
    TRY(mix_into_slots(b, chain, dy, region(b, REGION_DY_ROWS)));
done:
    return status;
}

clmoe_status step_soft_moe_weights_backward(const batch *b, launch *chain, clmoe_buf ye) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(clear_padding(b, chain, ye));
    TRY(set_products(b, chain, region(b, REGION_SOFT_MOE_DY), ye, region(b, REGION_DCOMBINE)));
done:
    return status;
}

/* Sums over tokens of the values [T,S], times the shares [T,S] if given. */
static clmoe_status set_column_sums(const batch *b, launch *chain, clmoe_buf shares) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel first = layer->kernels[KERNEL_COLUMN_PARTIALS];
    cl_kernel second = layer->kernels[KERNEL_COLUMN_SUMS];
    const clmoe_plan_layout *plan = &b->ws.plan;
    const uint32_t group = layer->group, count = layer_router_rows(layer);
    const block_split blocks = workspace_token_blocks(group, b->tokens);
    const clmoe_buf partials = region(b, REGION_SOFT_MOE_PARTIALS);
    TRY(KERNEL_SET(first, ARG_F32(shares), ARG_AS(values, ARG_F32(region(b, REGION_DDISPATCH))),
                   ARG_F32(partials), ARG_UINT(b->tokens), ARG_UINT(plan->slots), ARG_UINT(count),
                   ARG_AS(per_expert, ARG_UINT(plan->capacity)),
                   ARG_AS(stride, ARG_UINT(plan->slots / layer->desc.num_experts)),
                   ARG_AS(block_size, ARG_UINT(blocks.size))));
    TRY(launch_1d(chain, first, blocks.count, group));
    TRY(KERNEL_SET(second, ARG_F32(partials),
                   ARG_AS(column_sums, ARG_F32(region(b, REGION_SOFT_MOE_SUMS))),
                   ARG_AS(blocks, ARG_UINT(blocks.count)), ARG_UINT(count)));
    TRY(launch_1d(chain, second, divide_up(count, group), group));
done:
    return status;
}

/* The gradients on both weights -> dlogits, before the norms. */
static clmoe_status set_dlogits(const batch *b, launch *chain, clmoe_buf dispatch) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_plan_layout *plan = &b->ws.plan;
    cl_kernel kernel = layer->kernels[KERNEL_DLOGITS];
    TRY(set_column_sums(b, chain, dispatch));
    TRY(KERNEL_SET(kernel, ARG_F32(b->logits), ARG_F32(region(b, REGION_TOPS)),
                   ARG_F32(region(b, REGION_TOKEN_NORMS)), ARG_F32(region(b, REGION_SLOT_NORMS)),
                   ARG_F32(dispatch), ARG_F32(region(b, REGION_DCOMBINE)),
                   ARG_AS(column_sums, ARG_F32(region(b, REGION_SOFT_MOE_SUMS))),
                   ARG_F32(region(b, REGION_DDISPATCH)), ARG_F32(region(b, REGION_DLOGITS)),
                   ARG_F32(region(b, REGION_SOFT_MOE_ALONG)), ARG_UINT(plan->slots),
                   ARG_AS(count, ARG_UINT(layer_router_rows(layer))),
                   ARG_AS(per_expert, ARG_UINT(plan->capacity)),
                   ARG_AS(stride, ARG_UINT(plan->slots / layer->desc.num_experts)),
                   ARG_FLOAT(layer->desc.router.soft_moe.scale)));
    TRY(launch_1d(chain, kernel, b->tokens, layer->group));
done:
    return status;
}

/* dlogits through the slots' rows and x's norm, and dxe by the dispatch weights [T,S]. */
static clmoe_status set_dx(const batch *b, launch *chain, clmoe_buf dispatch, clmoe_buf dx) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const uint32_t T = b->tokens, D = layer->desc.dim;
    const clmoe_type type = layer->desc.type;
    cl_kernel norms = layer->kernels[KERNEL_NORMS_BACKWARD];
    const dense_map by_logits = {.rows = T,
                                 .n = D,
                                 .k = layer_router_rows(layer),
                                 .a = region(b, REGION_DLOGITS),
                                 .weight = b->weights->router,
                                 .out = dx};
    const dense_map by_rows = {.rows = T,
                               .n = D,
                               .k = b->ws.plan.slots,
                               .a = dispatch,
                               .weight = b->dxe,
                               .out = dx,
                               .accumulate = true};
    TRY(gemm_dense(&layer->dense_back, chain, &by_logits));
    TRY(KERNEL_SET(norms, ARG_AS(rows, ARG_TYPE(region(b, REGION_SOFT_MOE_X), type)),
                   ARG_F32(region(b, REGION_TOKEN_NORMS)),
                   ARG_F32(region(b, REGION_SOFT_MOE_ALONG)), ARG_AS(gradient, ARG_TYPE(dx, type)),
                   ARG_AS(dim, ARG_UINT(D))));
    TRY(launch_1d(chain, norms, T, layer->group));
    TRY(gemm_dense(&layer->mix, chain, &by_rows));
done:
    return status;
}

clmoe_status step_soft_moe_dispatch_backward(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf dxe = b->dxe, dispatch = region(b, REGION_SOFT_MOE_COMBINE);
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(clear_padding(b, chain, dxe));
    TRY(set_token_weights(b, chain, false, dispatch));
    TRY(set_products(b, chain, region(b, REGION_SOFT_MOE_X), dxe, region(b, REGION_DDISPATCH)));
    TRY(set_dlogits(b, chain, dispatch));
    if (b->dx.mem)
        TRY(set_dx(b, chain, dispatch, b->router_dx));
done:
    return status;
}

clmoe_status step_soft_moe_gradients(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const clmoe_type type = layer->desc.router.weight_type;
    const uint32_t count = layer_router_rows(layer);
    const clmoe_buf none = {0}, gradient = b->gradients.router;
    cl_kernel norms = layer->kernels[KERNEL_SLOT_NORMS_BACKWARD];
    const dense_gradient router = {count, layer->desc.dim, region(b, REGION_DLOGITS),
                                   region(b, REGION_SOFT_MOE_X), gradient};
    const gemm_gradient rows = batch_rows(b);
    TRY(gemm_dense_gradient(&b->layer->dense_gradient, chain, &rows, &router));
    if (!gradient.mem || b->tokens == 0)
        return CLMOE_SUCCESS;
    TRY(set_column_sums(b, chain, none));
    TRY(KERNEL_SET(norms, ARG_AS(rows, ARG_TYPE(b->weights->router, type)),
                   ARG_F32(region(b, REGION_SLOT_NORMS)),
                   ARG_AS(along, ARG_F32(region(b, REGION_SOFT_MOE_SUMS))),
                   ARG_TYPE(gradient, layer_gradient_type(layer, type)),
                   ARG_UINT(layer->desc.dim)));
    TRY(launch_1d(chain, norms, count, layer->group));
done:
    return status;
}

const routing_policy soft_moe_policy = {.create = create, .best_first = true};
