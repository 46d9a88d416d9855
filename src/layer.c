/* From a descriptor to an immutable layer. */
#include "layer.h"
#include "check/check.h"
#include "runtime/program.h"
#include "runtime/structs.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* cl/routing/router.clh has the same numbers; types.clh's device code relies on them. */
#define SCORE_SAME(NAME, of_row, value, slope) SAME_NUMBER(SCORE_##NAME);
SCORE_LIST(SCORE_SAME)
SAME_NUMBER(NOISE_NONE);
SAME_NUMBER(NOISE_GAUSSIAN);
SAME_NUMBER(NOISE_LEARNED);
SAME_NUMBER(NOISE_GUMBEL);
SAME_NUMBER(RENORM_NONE);
SAME_NUMBER(RENORM_SUM);
SAME_NUMBER(RENORM_PNORM);
SAME_NUMBER(KEEP_POSITION);
SAME_NUMBER(KEEP_CHOICE_MAJOR);
SAME_NUMBER(KEEP_PRIORITY);
SAME_NUMBER(KEEP_WEIGHT);
SAME_NUMBER(KEEP_RANDOM);
SAME_NUMBER(KEEP_ROUND);

/* All bytes are set: clmoe_checkpoint_layer_sized() compares them. */
static void set_defaults(clmoe_layer_desc *desc) {
    memset(desc, 0, sizeof *desc);
    desc->struct_size = sizeof *desc;
    desc->router.temperature = 1;
    desc->router.renorm.p = 1;
    desc->router.scale = 1;
    desc->router.sparsemixer_eps = 0.01F;
    desc->router.sinkhorn.iterations = 100;
    desc->router.sinkhorn.tolerance = 1e-4F;
    desc->router.soft_moe.slots = 1;
    desc->router.soft_moe.scale = 1;
    desc->router.noise.scale = 1;
    desc->router.rebalance.mu = 1;
    desc->experts.alpha = 1;
    desc->shared.alpha = 1;
    desc->balance.dead_window = 32768;
}

void clmoe_layer_desc_init_sized(clmoe_layer_desc *desc, size_t struct_size) {
    clmoe_layer_desc own;
    set_defaults(&own);
    struct_give(&own, sizeof own, desc, struct_size);
}

static double round_capacity(double rows, clmoe_rounding rounding) {
    switch (rounding) {
    case CLMOE_ROUND_DOWN:
        return floor(rows);
    case CLMOE_ROUND_NEAREST:
        return round(rows);
    case CLMOE_ROUND_UP:
        break;
    }
    return ceil(rows);
}

uint32_t layer_capacity(const clmoe_layer *layer, uint32_t tokens) {
    const clmoe_capacity_desc *capacity = &layer->desc.capacity;
    double rows = capacity->rows;
    if (layer_has_sequences(layer))
        tokens = capacity->tokens_per_sequence;
    if (capacity->rows == 0)
        rows = round_capacity((double)tokens * layer->desc.top_k * capacity->factor /
                                  layer->desc.num_experts,
                              capacity->rounding);
    rows = fmax(rows, fmax(capacity->min_rows, 1));
    if (capacity->multiple > 1)
        rows = ceil(rows / capacity->multiple) * capacity->multiple;
    return rows < tokens ? (uint32_t)rows : tokens;
}

static router_switches switches_of(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
    return (router_switches){
        .columns = (int)(desc->num_experts + desc->num_identity_experts),
        .top_k = (int)desc->top_k,
        .score = (int)router->score,
        .topk_first = router->order == CLMOE_ORDER_TOPK_THEN_SCORE,
        .num_groups = router->groups.count > 1 ? (int)router->groups.count : 0,
        .topk_groups = (int)router->groups.topk,
        .group_top2 = router->groups.score == CLMOE_GROUP_TOP2_SUM,
        .renorm = (int)router->renorm.kind,
        .renorm_late = (int)router->renorm.after_drop,
        .temperature = router->temperature,
        .softcap = router->softcap,
        .renorm_eps = router->renorm.eps,
        .renorm_p = router->renorm.p,
        .scale = router->scale,
        .sparsemixer_eps = router->sparsemixer_eps,
    };
}

static const routing_policy *policy_of(const clmoe_layer_desc *desc) {
    const clmoe_router_desc *router = &desc->router;
#define POLICY_ROW(NAME, name) [CLMOE_POLICY_##NAME] = &name##_policy,
    static const routing_policy *const policies[] = {POLICY_LIST(POLICY_ROW)};
    if (desc->capacity.keep == CLMOE_KEEP_ROUND)
        return &token_rounding_policy;
    return router->groups.two_level ? &two_level_policy : policies[router->policy];
}

gemm_row_weight layer_row_weight(const clmoe_layer_desc *desc) {
    switch (desc->router.weight_at) {
    case CLMOE_WEIGHT_AT_INPUT:
        return GEMM_ROW_WEIGHT_INPUT;
    case CLMOE_WEIGHT_AT_ACTIVATION:
        return GEMM_ROW_WEIGHT_OUTPUT;
    case CLMOE_WEIGHT_AT_OUTPUT:
        break;
    }
    return GEMM_ROW_WEIGHT_NONE;
}

static gemm_shape shape_of(const clmoe_layer_desc *desc, const clmoe_mlp_desc *mlp,
                           uint32_t experts) {
    return (gemm_shape){
        .a_type = desc->type,
        .w_type = desc->weight_type,
        .bias_type = desc->weight_type,
        .c_type = desc->type,
        .experts = experts,
        .dim = desc->dim,
        .hidden_dim = mlp->hidden_dim,
        .form = mlp->gate_layout == CLMOE_GATE_NONE ? GEMM_PLAIN : GEMM_GATED,
        .gate_up_transposed = mlp->gate_up_transposed != 0,
        .down_transposed = mlp->down_transposed != 0,
        .interleaved = mlp->gate_layout == CLMOE_GATE_INTERLEAVED,
        .separate = mlp->gate_layout == CLMOE_GATE_SEPARATE,
        .biased = {mlp->gate_up_bias != 0, mlp->down_bias != 0},
        .activation = mlp->activation,
        .row_weight = mlp == &desc->experts ? layer_row_weight(desc) : GEMM_ROW_WEIGHT_NONE,
        .rows_between = desc->training != 0 && mlp->hidden_dropout > 0,
        .training = desc->training != 0,
    };
}

static clmoe_status use_engine(clmoe_context *context, const char *name, gemm_shape shape,
                               gemm_use *use) {
    use->shape = shape;
    return gemm_engine_create(context, name, &shape, &use->engine, &use->state);
}

static clmoe_status create_engines(clmoe_layer *layer, const char *name) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_context *context = layer->context;
    const clmoe_layer_desc *desc = &layer->desc;
    gemm_shape dense = {.a_type = desc->type,
                        .w_type = desc->router.weight_type,
                        .bias_type = CLMOE_F32, /* weights.router_bias */
                        .c_type = CLMOE_F32,
                        .experts = 1,
                        .dim = desc->dim,
                        .hidden_dim = layer->columns,
                        .form = GEMM_LINEAR};
    /* Its k is not known before the batch is. */
    gemm_shape mix = {.a_type = CLMOE_F32,
                      .w_type = desc->type,
                      .c_type = desc->type,
                      .experts = 1,
                      .hidden_dim = desc->dim,
                      .form = GEMM_LINEAR,
                      .gate_up_transposed = true};
    TRY(use_engine(context, NULL, dense, &layer->dense));
    TRY(use_engine(context, name, shape_of(desc, &desc->experts, desc->num_experts),
                   &layer->experts));
    if (desc->shared.hidden_dim)
        TRY(use_engine(context, name, shape_of(desc, &desc->shared, 1), &layer->shared));
    if (desc->router.policy == CLMOE_POLICY_SOFT_MOE)
        TRY(use_engine(context, NULL, mix, &layer->mix));
done:
    return status;
}

static clmoe_status create_cosine_engines(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_shape cosines = {.a_type = CLMOE_F32,
                                .w_type = CLMOE_F32,
                                .c_type = CLMOE_F32,
                                .experts = 1,
                                .dim = layer->desc.dim,
                                .hidden_dim = layer_router_rows(layer),
                                .form = GEMM_LINEAR};
    gemm_shape rows = cosines;
    rows.dim = cosines.hidden_dim;
    rows.hidden_dim = cosines.dim;
    rows.gate_up_transposed = true;
    TRY(use_engine(layer->context, NULL, cosines, &layer->cosines));
    TRY(use_engine(layer->context, NULL, rows, &layer->cosine_rows));
done:
    return status;
}

static clmoe_status use_gradient(clmoe_layer *layer, const char *name, gemm_gradient_shape shape,
                                 gemm_gradient_use *use) {
    use->shape = shape;
    return gemm_gradient_create(layer->context, name, &shape, &use->engine, &use->state);
}

/* The routers' gradients are by device, as the routers are. */
static clmoe_status create_back_engines(clmoe_layer *layer, const char *name) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer_desc *desc = &layer->desc;
    const clmoe_type router = desc->router.weight_type;
    const gemm_gradient_shape mlp = {.p_type = desc->type,
                                     .q_type = desc->type,
                                     .c_type = layer_gradient_type(layer, desc->weight_type)};
    const gemm_gradient_shape dense = {
        .p_type = CLMOE_F32, .q_type = desc->type, .c_type = layer_gradient_type(layer, router)};
    const gemm_shape back = {.a_type = CLMOE_F32,
                             .w_type = router,
                             .c_type = desc->type,
                             .experts = 1,
                             .dim = layer_router_rows(layer),
                             .hidden_dim = desc->dim,
                             .form = GEMM_LINEAR,
                             .gate_up_transposed = true};
    /* Its n is not known before the batch is. */
    const gemm_shape products = {.a_type = desc->type,
                                 .w_type = desc->type,
                                 .c_type = CLMOE_F32,
                                 .experts = 1,
                                 .dim = desc->dim,
                                 .form = GEMM_LINEAR};
    TRY(use_gradient(layer, name, mlp, &layer->mlp_gradient));
    TRY(use_gradient(layer, layer->mlp_gradient.engine->gathers ? name : NULL, mlp,
                     &layer->shared_gradient));
    TRY(use_gradient(layer, NULL, dense, &layer->dense_gradient));
    TRY(use_engine(layer->context, NULL, back, &layer->dense_back));
    if (layer_is_soft_moe(layer))
        TRY(use_engine(layer->context, NULL, products, &layer->products));
done:
    return status;
}

clmoe_status layer_kernels(clmoe_layer *layer, const char *step, const char *options,
                           const kernel_entry *kernels, size_t count) {
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t i = 0; i < count; i++)
        TRY(program_kernel(layer->context, step, options, kernels[i].name,
                           &layer->kernels[kernels[i].id]));
done:
    return status;
}

clmoe_status layer_group_kernels(clmoe_layer *layer, const char *step, const kernel_entry *kernels,
                                 size_t count) {
    char options[32];
    snprintf(options, sizeof options, "-DGROUP=%u", layer->group);
    return layer_kernels(layer, step, options, kernels, count);
}

clmoe_status layer_kernel(clmoe_layer *layer, kernel_id id, const char *step, const char *name) {
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DX=%s", layer->group,
             type_name(layer->desc.type));
    return program_kernel(layer->context, step, options, name, &layer->kernels[id]);
}

static void release_kernels(clmoe_layer *layer) {
    for (int id = 0; id < KERNEL_COUNT; id++)
        kernel_release(&layer->kernels[id]);
}

/* Each has its kernels made, where the switches need them; the policy's is its own. */
static step_constructor *const constructors[] = {
    score_create,   few_create,     noise_create,    rebalance_create,    sort_create,
    plan_create,    reroute_create, dispatch_create, normalize_create,    pack_create,
    combine_create, state_create,   dropout_create,  orthogonality_create};

/* ... of layers that go backward. */
static step_constructor *const training[] = {weights_create, activation_create, bias_create,
                                             shared_create, unmasked_create};

/* ... of layers that measure. */
static step_constructor *const measuring[] = {sums_create,  stats_create,   loss_create,
                                              joint_create, control_create, quantile_create};

static clmoe_status create_kernels_of_group(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(layer->policy->create(layer));
    for (size_t i = 0; i < sizeof constructors / sizeof constructors[0]; i++)
        TRY(constructors[i](layer));
    for (size_t i = 0; layer->desc.training && i < sizeof training / sizeof training[0]; i++)
        TRY(training[i](layer));
    for (size_t i = 0; layer_measures(layer) && i < sizeof measuring / sizeof measuring[0]; i++)
        TRY(measuring[i](layer));
done:
    return status;
}

/* In the largest group that every kernel can have, up to the context's. */
static clmoe_status create_kernels(clmoe_layer *layer) {
    const error_sentence kept = error_keep();
    layer->group = layer->context->largest_group;
    clmoe_status status = create_kernels_of_group(layer);
    while (status == CLMOE_UNSUPPORTED && layer->group > 1) {
        release_kernels(layer);
        layer->group /= 2;
        status = create_kernels_of_group(layer);
        if (status == CLMOE_SUCCESS)
            error_put_back(&kept);
    }
    return status;
}

clmoe_status clmoe_layer_create(clmoe_context *context, const clmoe_layer_desc *desc,
                                clmoe_layer **out) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer *layer = NULL;
    clmoe_layer_desc own;
    if (!out)
        return fail(CLMOE_INVALID_ARGUMENT, "out is NULL");
    *out = NULL;
    if (!context)
        return fail(CLMOE_INVALID_ARGUMENT, "context is NULL");
    set_defaults(&own);
    TRY(struct_take(CLMOE_INVALID_DESC, "desc", desc, &own, sizeof own));
    TRY(check_layer_desc(&own));
    layer = calloc(1, sizeof *layer);
    if (!layer)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the layer");
    layer->context = context;
    layer->desc = own;
    layer->desc.engine = NULL;
    layer->columns = own.num_experts + own.num_identity_experts;
    layer->policy = policy_of(&own);
    layer->router = switches_of(&own);
    TRY(create_engines(layer, own.engine));
    if (own.training)
        TRY(create_back_engines(layer, own.engine));
    if (own.balance.router_orthogonality)
        TRY(create_cosine_engines(layer));
    TRY(create_kernels(layer));
    *out = layer;
done:
    if (status != CLMOE_SUCCESS)
        clmoe_layer_destroy(layer);
    return status;
}

static void release_use(gemm_use *use) {
    if (use->engine)
        use->engine->destroy(use->state);
}

static void release_gradient(gemm_gradient_use *use) {
    if (use->engine)
        use->engine->destroy(use->state);
}

void clmoe_layer_destroy(clmoe_layer *layer) {
    if (!layer)
        return;
    release_kernels(layer);
    release_use(&layer->experts);
    release_use(&layer->shared);
    release_use(&layer->dense);
    release_use(&layer->mix);
    release_use(&layer->dense_back);
    release_use(&layer->products);
    release_use(&layer->cosines);
    release_use(&layer->cosine_rows);
    release_gradient(&layer->mlp_gradient);
    release_gradient(&layer->shared_gradient);
    release_gradient(&layer->dense_gradient);
    free(layer);
}

const char *clmoe_layer_engine(const clmoe_layer *layer) {
    return layer ? layer->experts.engine->name : NULL;
}

uint32_t clmoe_layer_columns(const clmoe_layer *layer) {
    return layer ? layer->columns : 0;
}

uint32_t clmoe_layer_dispatches(const clmoe_layer *layer) {
    return layer && layer_dispatches(layer);
}

const char *clmoe_engine_name(clmoe_context *context, uint32_t index, uint32_t *supported) {
    const gemm_engine *engine = NULL;
    for (uint32_t i = 0; i <= index; i++) {
        engine = gemm_engines[i];
        if (!engine)
            return NULL;
    }
    if (supported) {
        const error_sentence kept = error_keep();
        *supported = context && engine->supports(context) == CLMOE_SUCCESS;
        error_put_back(&kept);
    }
    return engine->name;
}
