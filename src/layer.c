/* From a descriptor to an immutable layer. */
#include "layer.h"
#include "check.h"
#include "program.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum {
    MAX_TOPK_CHUNK = 1024,
    MAX_SELECT_COLUMNS = 1 << 30,
    MAX_TOPK_BYTES = 12288,
    MAX_TOPK_TOKENS = 64,
    MAX_REGISTER_KEYS = 16,
    MAX_TOPK_KEYS = 2048, /* in registers of a group */
    MIN_SCORE_GROUP = 32,
    SCORE_COLUMNS = 8, /* per work-item */
    SERIAL_SEGMENT = 1024,
};

/* cl/router.clh has the same numbers; types.clh's device code relies on them. */
_Static_assert((int)CLMOE_SCORE_SPARSEMIXER == (int)SCORE_SPARSEMIXER, "scores differ");
_Static_assert((int)CLMOE_RENORM_PNORM == (int)RENORM_PNORM, "renorms differ");
_Static_assert((int)CLMOE_KEEP_RANDOM == (int)KEEP_RANDOM, "keep rules differ");

void clmoe_layer_desc_init(clmoe_layer_desc *desc) {
    *desc = (clmoe_layer_desc){
        .struct_size = sizeof *desc,
        .router = {.temperature = 1,
                   .renorm_p = 1,
                   .scale = 1,
                   .sparsemixer_eps = 0.01F,
                   .sinkhorn_iterations = 100,
                   .sinkhorn_tolerance = 1e-4F,
                   .slots_per_expert = 1,
                   .soft_scale = 1,
                   .noise_scale = 1,
                   .rebalance_mu = 1},
        .experts = {.alpha = 1},
        .shared = {.alpha = 1},
        .balance = {.dead_window = 32768},
    };
}

void clmoe_forward_args_init(clmoe_forward_args *args) {
    *args = (clmoe_forward_args){.struct_size = sizeof *args};
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
        .num_groups = router->num_groups > 1 ? (int)router->num_groups : 0,
        .topk_groups = (int)router->topk_groups,
        .group_top2 = router->group_score == CLMOE_GROUP_TOP2_SUM,
        .renorm = (int)router->renorm,
        .renorm_late = (int)router->renorm_after_drop,
        .temperature = router->temperature,
        .softcap = router->softcap,
        .renorm_eps = router->renorm_eps,
        .renorm_p = router->renorm_p,
        .scale = router->scale,
        .sparsemixer_eps = router->sparsemixer_eps,
    };
}

static uint32_t power_of_two(uint32_t at_least, uint32_t at_most) {
    uint32_t power = 1;
    while (power < at_least && power < at_most)
        power *= 2;
    return power;
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

clmoe_status layer_kernels(clmoe_layer *layer, const char *step, const char *options,
                           const kernel_entry *kernels, size_t count) {
    clmoe_status status = CLMOE_SUCCESS;
    for (size_t i = 0; i < count; i++)
        TRY(program_kernel(layer->context, step, options, kernels[i].name,
                           &layer->kernels[kernels[i].id]));
done:
    return status;
}

/* A kernel of cl/STEP.cl, with the routing group size and the storage types. */
static clmoe_status create_kernel(clmoe_layer *layer, kernel_id id, const char *step,
                                  const char *name) {
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DX=%s", layer->group,
             type_name(layer->desc.type));
    return program_kernel(layer->context, step, options, name, &layer->kernels[id]);
}

static clmoe_status create_score(clmoe_layer *layer) {
    char options[64];
    uint32_t wanted = layer->columns / SCORE_COLUMNS;
    if (wanted < MIN_SCORE_GROUP)
        wanted = MIN_SCORE_GROUP;
    layer->score_group = power_of_two(wanted, layer->group);
    snprintf(options, sizeof options, "-DGROUP=%u", layer->score_group);
    return program_kernel(layer->context, "score", options, "score_rows",
                          &layer->kernels[KERNEL_SCORE]);
}

/* How topk.cl's group shares its work-items among tokens. */
typedef struct topk_split {
    uint32_t lanes; /* per token, in registers; 0: in local memory */
    uint32_t chunk, tokens;
} topk_split;

/* Local memory of a group. */
static uint32_t topk_bytes(const topk_split *split, uint32_t keep, uint32_t groups) {
    const uint32_t keys = split->lanes ? split->lanes * keep / 2 : split->chunk;
    return split->tokens * (8 * keys + 16 * keep + 5 * groups);
}

static topk_split split_topk(uint32_t group, uint32_t columns, uint32_t keep, uint32_t groups) {
    topk_split split = {.chunk = power_of_two(columns > 2 ? columns : 2, MAX_TOPK_CHUNK),
                        .tokens = 1};
    if (keep <= MAX_REGISTER_KEYS) {
        const uint32_t most = MAX_TOPK_KEYS / keep < group ? MAX_TOPK_KEYS / keep : group;
        split.lanes = power_of_two((columns + keep - 1) / keep, most);
    }
    const uint32_t items = split.lanes ? split.lanes : split.chunk / 2;
    topk_split twice = split;
    while (twice.tokens *= 2, twice.tokens * items <= group && twice.tokens <= MAX_TOPK_TOKENS &&
                                  topk_bytes(&twice, keep, groups) <= MAX_TOPK_BYTES)
        split = twice;
    return split;
}

static void bitonic_options(clmoe_layer *layer, char *options, size_t size) {
    const uint32_t group = layer->group, groups = (uint32_t)layer->router.num_groups;
    const uint32_t keep = power_of_two(layer->desc.top_k, MAX_TOPK_CHUNK);
    const topk_split split = split_topk(group, layer->columns, keep, groups);
    layer->topk_tokens = split.tokens;
    snprintf(options, size, "-DBITONIC -DGROUP=%u -DKEEP=%u -DGROUPS=%u -DTOKENS=%u -D%s=%u", group,
             keep, groups, split.tokens, split.lanes ? "LANES" : "CHUNK",
             split.lanes ? split.lanes : split.chunk);
}

/* Powers of two and three quarters of them: layers of similar sizes share a program. */
static uint32_t select_columns(uint32_t columns) {
    const uint32_t power = power_of_two(columns > 16 ? columns : 16, MAX_SELECT_COLUMNS);
    const uint32_t less = power / 4 * 3;
    return less % 16 == 0 && columns <= less ? less : power;
}

static void select_options(clmoe_layer *layer, char *options, size_t size) {
    layer->topk_tokens = 1;
    snprintf(options, size, "-DGROUP=1 -DKEEP=%u -DCOLUMNS=%u",
             power_of_two(layer->desc.top_k > 4 ? layer->desc.top_k : 4, MAX_TOPK_CHUNK),
             select_columns(layer->columns));
}

static clmoe_status create_topk(clmoe_layer *layer) {
    char options[128];
    const bool select = layer->group == 1;
    (select ? select_options : bitonic_options)(layer, options, sizeof options);
    return program_kernel(layer->context, "topk", options, select ? "topk_select" : "topk_bitonic",
                          &layer->kernels[KERNEL_TOPK]);
}

/* Work-items that walk a row alone take wide vectors; lanes side by side, 16 bytes each. */
static clmoe_status create_combine(clmoe_layer *layer) {
    char options[64];
    uint32_t group = layer->group;
    uint32_t width = group == 1 ? 16 : 16 / (uint32_t)type_bytes(layer->desc.type);
    layer->combine_segment = group == 1 ? SERIAL_SEGMENT : group * width;
    snprintf(options, sizeof options, "-DGROUP=%u -DSEGMENT=%u -DV=%u -DX=%s -DW=%s", group,
             layer->combine_segment, width, type_name(layer->desc.type),
             type_name(layer->desc.weight_type));
    return program_kernel(layer->context, "combine", options, "combine_rows",
                          &layer->kernels[KERNEL_COMBINE]);
}

static clmoe_status create_plan(clmoe_layer *layer) {
    static const kernel_entry kernels[] = {
        {KERNEL_PLAN_HISTOGRAM, "plan_histogram"},
        {KERNEL_PLAN_SCAN, "plan_scan"},
        {KERNEL_PLAN_OFFSETS, "plan_offsets"},
        {KERNEL_PLAN_SCATTER, "plan_scatter"},
        {KERNEL_PLAN_RENORM, "plan_renorm"},
        {KERNEL_PLAN_SCAN_SEQUENCES, "plan_scan_sequences"},
    };
    char options[64];
    snprintf(options, sizeof options, "-DGROUP=%u -DKEEP=%d -DPAIR_GRID=%d -DSEQUENCES=%d",
             layer->group, (int)layer_keep(layer), layer_is_expert_choice(layer),
             layer_has_sequences(layer));
    return layer_kernels(layer, "plan", options, kernels, sizeof kernels / sizeof kernels[0]);
}

static clmoe_status create_sort(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(create_kernel(layer, KERNEL_SORT_KEYS, "sort", "sort_keys"));
    TRY(create_kernel(layer, KERNEL_SORT_HISTOGRAM, "sort", "sort_histogram"));
    TRY(create_kernel(layer, KERNEL_SORT_SCAN, "sort", "sort_scan"));
    TRY(create_kernel(layer, KERNEL_SORT_SCATTER, "sort", "sort_scatter"));
    TRY(create_kernel(layer, KERNEL_SORT_SEQUENCES, "sort", "sort_sequences"));
done:
    return status;
}

static clmoe_status create_policy(clmoe_layer *layer) {
    switch (layer->desc.router.policy) {
    case CLMOE_POLICY_EXPERT_CHOICE:
        return expert_choice_kernels_create(layer);
    case CLMOE_POLICY_SINKHORN:
        return sinkhorn_kernels_create(layer);
    case CLMOE_POLICY_SOFT:
        return soft_kernels_create(layer);
    case CLMOE_POLICY_SOFT_MOE:
        return soft_moe_kernels_create(layer);
    case CLMOE_POLICY_TOKEN_CHOICE:
        break;
    }
    return layer->desc.router.two_level ? two_level_kernels_create(layer) : CLMOE_SUCCESS;
}

static void release_kernels(clmoe_layer *layer) {
    for (int id = 0; id < KERNEL_COUNT; id++)
        kernel_release(&layer->kernels[id]);
}

static clmoe_status create_kernels_of_group(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(create_score(layer));
    TRY(noise_kernels_create(layer));
    if (layer_has_topk(layer))
        TRY(create_topk(layer));
    TRY(create_policy(layer));
    TRY(create_plan(layer));
    if (layer_sorts(layer))
        TRY(create_sort(layer));
    TRY(rebalance_kernels_create(layer));
    TRY(reroute_kernels_create(layer));
    TRY(create_kernel(layer, KERNEL_DISPATCH, "dispatch", "dispatch_rows"));
    if (layer->desc.normalize_experts)
        TRY(create_kernel(layer, KERNEL_NORMALIZE, "normalize", "normalize_rows"));
    TRY(create_combine(layer));
    TRY(sums_kernels_create(layer));
    TRY(stats_kernels_create(layer));
    TRY(loss_kernels_create(layer));
    TRY(joint_kernels_create(layer));
    TRY(state_kernels_create(layer));
    TRY(control_kernels_create(layer));
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
    if (!out)
        return fail(CLMOE_INVALID_ARGUMENT, "out is NULL");
    *out = NULL;
    if (!context || !desc)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", context ? "desc" : "context");
    TRY(check_layer_desc(desc));
    layer = calloc(1, sizeof *layer);
    if (!layer)
        return fail(CLMOE_OUT_OF_MEMORY, "out of memory for the layer");
    layer->context = context;
    layer->desc = *desc;
    layer->desc.engine = NULL;
    layer->columns = desc->num_experts + desc->num_identity_experts;
    layer->router = switches_of(desc);
    TRY(create_engines(layer, desc->engine));
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

void clmoe_layer_destroy(clmoe_layer *layer) {
    if (!layer)
        return;
    release_kernels(layer);
    release_use(&layer->experts);
    release_use(&layer->shared);
    release_use(&layer->dense);
    release_use(&layer->mix);
    free(layer);
}

const char *clmoe_layer_engine(const clmoe_layer *layer) {
    return layer ? layer->experts.engine->name : NULL;
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
