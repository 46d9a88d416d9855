/* The plan and the sums of the batch -> balancing losses and their gradient on the logits. */
#include "steps.h"

#define LOSS_ASSERT(NAME, name, reads_load, term, value, gradient)                                 \
    _Static_assert((int)CLMOE_LOSS_##NAME == (int)LOSS_##NAME, "loss " name " has another number");
LOSS_LIST(LOSS_ASSERT)
#define SAME_SOURCE(name, source)                                                                  \
    _Static_assert((int)CLMOE_##name == (int)source, #name " has another number")
SAME_SOURCE(P_NORMALISED, SUM_NORMALISED);
SAME_SOURCE(P_RAW, SUM_RAW);
SAME_SOURCE(P_SOFTMAX, SUM_SOFTMAX);
SAME_SOURCE(P_WEIGHTS, SUM_WEIGHTS);
SAME_SOURCE(F_ASSIGNED, COUNT_ASSIGNED);
SAME_SOURCE(F_FRESH, COUNT_FRESH);
SAME_SOURCE(F_FIRST, COUNT_FIRST);
SAME_SOURCE(F_EMA, LOAD_EMA);
SAME_SOURCE(F_SUPPLIED, LOAD_SUPPLIED);

#define LOSS_NAME(NAME, name, reads_load, term, value, gradient) name,
static const char *const loss_names[] = {LOSS_LIST(LOSS_NAME)};

const char *clmoe_loss_name(clmoe_loss_kind kind) {
    return kind < LOSS_KINDS ? loss_names[kind] : NULL;
}

clmoe_status loss_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(balance_kernel(layer, KERNEL_LOSS_VALUES, "balance/loss_values", "loss_values"));
    TRY(balance_kernel(layer, KERNEL_LOSS_GATHER, "balance/loss_values", "loss_gather"));
    TRY(balance_team_kernel(layer, KERNEL_LOSS_GRADIENT, "balance/loss_gradient", "loss_gradient"));
    TRY(balance_kernel(layer, KERNEL_LOSS_WEIGHTS, "balance/loss_weights", "loss_weights"));
done:
    return status;
}

/* Where the gradient of a loss starts: P, or terms of each token. */
static int source_of(const clmoe_layer *layer, const clmoe_loss_desc *loss) {
    switch (loss->kind) {
    case CLMOE_LOSS_SMOOTH_LOAD:
        return SUM_SMOOTH;
    case CLMOE_LOSS_Z:
        return GRAD_Z;
    case CLMOE_LOSS_TOKEN_ENTROPY:
        return loss->p_source == CLMOE_P_SOFTMAX && !score_is_of_row(layer->router.score)
                   ? GRAD_SOFT_ENTROPY
                   : GRAD_ENTROPY;
    default:
        break;
    }
    if (loss->p_source == CLMOE_P_SOFTMAX && score_is_of_row(layer->router.score))
        return SUM_NORMALISED;
    return (int)loss->p_source;
}

/*
 * A fresh choice is the one made, unless a bias, groups, a policy or rounding had a say in it, or
 * the ids did not come from these logits. A sum over the scores as they are ranks alike: see
 * sums.cl.
 */
static int load_of(const clmoe_layer *layer, const clmoe_loss_desc *loss, bool routed) {
    const clmoe_router_desc *router = &layer->desc.router;
    bool other = !routed || router->select_bias || router->groups.count > 1 ||
                 router->groups.two_level || router->policy != CLMOE_POLICY_TOKEN_CHOICE ||
                 layer_rounds(layer);
    if (!loss_reads_load(loss->kind))
        return COUNT_ASSIGNED;
    if (loss->f_source == CLMOE_F_FRESH && !other)
        return COUNT_ASSIGNED;
    return (int)loss->f_source;
}

uint32_t loss_asks(const batch *b) {
    const clmoe_layer *layer = b->layer;
    uint32_t asked = 0;
    for (uint32_t i = 0; i < b->num_losses; i++) {
        const clmoe_loss_desc *loss = &b->losses[i];
        int source = source_of(layer, loss), load = load_of(layer, loss, b->routed);
        if (source < SUM_SOURCES)
            asked |= SUM_BIT(source);
        if (loss->kind == CLMOE_LOSS_COMMUNICATION)
            asked |= DEVICE_BIT;
        if (loss_reads_load(loss->kind) && load < COUNT_SOURCES &&
            (load != COUNT_ASSIGNED || loss->per_sequence || loss->kind == CLMOE_LOSS_OVERFLOW))
            asked |= COUNT_BIT(load);
    }
    return asked;
}

/* M: the most device groups that a token can reach. */
static uint32_t device_reach(const clmoe_layer *layer) {
    const clmoe_router_desc *router = &layer->desc.router;
    uint32_t devices = layer->desc.balance.device_groups;
    bool limited = router->groups.count > 1 && router->groups.count == devices &&
                   layer->desc.num_identity_experts == 0;
    return limited ? router->groups.topk : devices;
}

/* `sources`: a bit per GRAD_ source of the losses before this one. */
static loss_item item_of(const clmoe_layer *layer, const clmoe_loss_desc *loss, uint32_t capacity,
                         uint32_t sources, bool routed) {
    int source = source_of(layer, loss);
    return (loss_item){.kind = (int)loss->kind,
                       .source = source,
                       .load = load_of(layer, loss, routed),
                       .by_device = (int)loss->per_device,
                       .per_sequence = (int)loss->per_sequence,
                       .controlled = (int)loss->controlled,
                       .adds = (sources >> source) & 1,
                       .weight = loss->weight,
                       .beta = loss->beta,
                       .capacity = capacity,
                       .reach = device_reach(layer)};
}

/* Through the combine weights of the chosen. */
static clmoe_status weights_gradient(const batch *b, launch *chain, const sums *in) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const sums_shape *shape = &in->shape;
    cl_kernel kernel = layer->kernels[KERNEL_LOSS_WEIGHTS];
    clmoe_buf none = {0};
    clmoe_buf rows = region(b, REGION_SUMS_ROWS);
    clmoe_buf grads = region(b, REGION_LOSS_GRADS), ids = b->ids;
    if (layer_keeps_chosen_weights(layer))
        ids = PLAN_ARRAY(b, chosen_ids);
    TRY(KERNEL_SET(kernel, ARG_AS(logits, ARG_F32(in->noisy)), ARG_AS(clean, ARG_F32(b->logits)),
                   ARG_F32(in->noise_raw), ARG_F32(b->state), ARG_F32(rows), ARG_F32(grads),
                   ARG_F32(b->dlogits), ARG_F32(in->noise_raw.mem ? b->dnoise : none), ARG_F32(ids),
                   ARG_F32(b->live), ARG_U8(b->token_mask), ARG_F32(b->token_offsets),
                   ARG_F32(PLAN_ARRAY(b, slot_of)), ARG_F32(expert_scale_of(b)), ARG_STRUCT(*shape),
                   ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, b->tokens, layer->balance_group));
done:
    return status;
}

/* Where a pass of loss_gradient reads logits, and adds to. */
typedef struct gradient_pass {
    clmoe_buf logits, state, dlogits, dnoise;
    router_switches router;
    uint32_t sources;
} gradient_pass;

static clmoe_status pass(const batch *b, launch *chain, const sums *in, const gradient_pass *p) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const sums_shape *shape = &in->shape;
    cl_kernel kernel = layer->kernels[KERNEL_LOSS_GRADIENT];
    clmoe_buf rows = region(b, REGION_SUMS_ROWS);
    clmoe_buf grads = region(b, REGION_LOSS_GRADS);
    if (p->sources == 0)
        return CLMOE_SUCCESS;
    TRY(KERNEL_SET(kernel, ARG_F32(p->logits), ARG_AS(clean, ARG_F32(b->logits)),
                   ARG_F32(in->noise_raw), ARG_F32(p->state), ARG_F32(rows), ARG_F32(grads),
                   ARG_F32(p->dlogits), ARG_F32(p->dnoise), ARG_STRUCT(*shape),
                   ARG_STRUCT(p->router), ARG_UINT(p->sources)));
    TRY(launch_teams(chain, layer, KERNEL_LOSS_GRADIENT, b->tokens));
done:
    return status;
}

static clmoe_status gradient(const batch *b, launch *chain, const sums *in, uint32_t sources) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const bool two_level = layer->desc.router.groups.two_level;
    clmoe_buf none = {0}, dnoise = in->noise_raw.mem ? b->dnoise : none;
    /* Those of p go through the joint logits of two levels. */
    uint32_t joint = two_level ? sources & ~(1U << GRAD_Z) : 0;
    gradient_pass plain = {.logits = in->noisy,
                           .state = b->state,
                           .dlogits = b->dlogits,
                           .dnoise = dnoise,
                           .router = layer->router,
                           .sources = sources & ~SUM_BIT(SUM_WEIGHTS) & ~joint};
    gradient_pass through_joint = {.logits = in->p_logits,
                                   .dlogits = region(b, REGION_JOINT_GRADIENT),
                                   .router = p_switches(layer),
                                   .sources = joint};
    if (!b->dlogits.mem && !dnoise.mem && !b->dgroup_logits.mem)
        return CLMOE_SUCCESS;
    if (sources & SUM_BIT(SUM_WEIGHTS))
        TRY(weights_gradient(b, chain, in));
    TRY(pass(b, chain, in, &plain));
    TRY(pass(b, chain, in, &through_joint));
    if (joint && b->tokens > 0)
        TRY(step_joint_gradient(b, chain, in, dnoise));
done:
    return status;
}

/* Each loss by itself, then all of them: values, and where gradients start. */
static clmoe_status values(const batch *b, launch *chain, const sums *in, const loss_table *table) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const sums_shape *shape = &in->shape;
    cl_kernel kernel = layer->kernels[KERNEL_LOSS_VALUES];
    const clmoe_buf records = region(b, REGION_SUMS), of = region(b, REGION_LOSS_VALUES);
    const clmoe_buf parts = region(b, REGION_LOSS_PARTS), grads = region(b, REGION_LOSS_GRADS);
    const size_t groups[2] = {shape->sequences, b->num_losses};
    const size_t local[2] = {layer->balance_group, 1};
    uint32_t per_sequence = 0, summed = 0;
    for (uint32_t i = 0; i < b->num_losses; i++) {
        per_sequence |= (uint32_t)(table->items[i].per_sequence != 0) << i;
        summed |= (uint32_t)(table->items[i].kind == LOSS_OVERFLOW) << i;
    }
    TRY(KERNEL_SET(kernel, ARG_AS(sums, ARG_F32(records)), ARG_F32(PLAN_ARRAY(b, load)),
                   ARG_F32(b->state), ARG_F32(b->load_target), ARG_F32(b->load_supplied),
                   ARG_AS(values, ARG_F32(of)), ARG_F32(parts), ARG_STRUCT(*shape),
                   ARG_STRUCT(*table)));
    TRY(launch_kernel(chain, kernel, 2, groups, local));
    kernel = layer->kernels[KERNEL_LOSS_GATHER];
    TRY(KERNEL_SET(kernel, ARG_AS(values, ARG_F32(of)), ARG_F32(parts),
                   ARG_AS(sums, ARG_F32(records)), ARG_F32(grads),
                   ARG_AS(out, ARG_F32(b->loss_values)), ARG_STRUCT(*shape), ARG_STRUCT(*table),
                   ARG_AS(count, ARG_UINT(b->num_losses)), ARG_UINT(per_sequence),
                   ARG_UINT(summed)));
    TRY(launch_1d(chain, kernel, (size_t)shape->sequences + 1, layer->balance_group));
done:
    return status;
}

clmoe_status loss_finish(const batch *b, launch *chain, const sums *in) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t sources = 0;
    loss_table table = {0};
    for (uint32_t i = 0; i < b->num_losses; i++) {
        table.items[i] = item_of(b->layer, &b->losses[i], b->ws.plan.capacity, sources, b->routed);
        sources |= 1U << table.items[i].source;
    }
    TRY(values(b, chain, in, &table));
    TRY(gradient(b, chain, in, sources));
done:
    return status;
}
