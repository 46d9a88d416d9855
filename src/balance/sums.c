/* The batch -> what it adds up to: shared by statistics and losses. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

/* TEAM_COLUMNS: of a work-item of a team, see cl/balance/balance.clh. */
enum { MAX_SUM_GROUP = 64, SERIAL_COLUMNS = 16, TEAM_COLUMNS = 4 };

/* Columns a group of the balance kernels takes at once. */
static uint32_t columns_at_once(const clmoe_layer *layer) {
    return layer->balance_group == 1 ? SERIAL_COLUMNS : layer->balance_group;
}

clmoe_status balance_kernel(clmoe_layer *layer, kernel_id id, const char *step, const char *name) {
    char options[32];
    snprintf(options, sizeof options, "-DGROUP=%u", layer->balance_group);
    return program_kernel(layer->context, step, options, name, &layer->kernels[id]);
}

/* Whether several tokens share a group: a team of fewer work-items has as many columns. */
static bool has_teams(const clmoe_layer *layer) {
    return layer->balance_group == MAX_SUM_GROUP;
}

clmoe_status balance_team_kernel(clmoe_layer *layer, kernel_id id, const char *step,
                                 const char *name) {
    char options[64];
    if (!has_teams(layer))
        return balance_kernel(layer, id, step, name);
    snprintf(options, sizeof options, "-DGROUP=%u -DTEAM=%d", layer->group,
             MAX_SUM_GROUP / TEAM_COLUMNS);
    return program_kernel(layer->context, step, options, name, &layer->kernels[id]);
}

clmoe_status launch_teams(launch *chain, const clmoe_layer *layer, kernel_id id, uint32_t tokens) {
    const uint32_t group = has_teams(layer) ? layer->group : layer->balance_group;
    const uint32_t teams = has_teams(layer) ? group * TEAM_COLUMNS / MAX_SUM_GROUP : 1;
    return launch_1d(chain, layer->kernels[id], divide_up(tokens, teams), group);
}

clmoe_status sums_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t group = layer->group;
    layer->balance_group = group < MAX_SUM_GROUP ? group : MAX_SUM_GROUP;
    TRY(balance_team_kernel(layer, KERNEL_SUMS_ROWS, "balance/sums_rows", "sums_rows"));
    TRY(balance_kernel(layer, KERNEL_SUMS_BLOCKS, "balance/sums", "sums_blocks"));
    TRY(balance_kernel(layer, KERNEL_SUMS_REDUCE, "balance/sums", "sums_reduce"));
done:
    return status;
}

static size_t record_words(const sums_shape *shape) {
    return (size_t)(SUM_SOURCES + COUNT_SOURCES) * shape->columns + shape->device_groups +
           SCALAR_COUNT;
}

router_switches p_switches(const clmoe_layer *layer) {
    router_switches switches = layer->router;
    if (layer->desc.router.groups.two_level) {
        switches.softcap = 0;
        switches.temperature = 1;
    }
    return switches;
}

/* The choice as it was before overflow reroute. */
static clmoe_buf chosen_ids(const batch *b) {
    return layer_reroutes(b->layer) ? PLAN_ARRAY(b, chosen_ids) : b->ids;
}

static clmoe_status sum_rows(const batch *b, launch *chain, const sums *in, clmoe_buf rows) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const sums_shape *shape = &in->shape;
    const router_switches router = p_switches(layer);
    const clmoe_buf state = p_state(b);
    cl_kernel kernel = layer->kernels[KERNEL_SUMS_ROWS];
    TRY(KERNEL_SET(kernel, ARG_F32(in->p_logits), ARG_F32(in->noisy),
                   ARG_AS(ranks, ARG_F32(in->scores)), ARG_F32(chosen_ids(b)), ARG_F32(b->live),
                   ARG_U8(b->token_mask), ARG_F32(b->token_offsets), ARG_F32(state), ARG_F32(rows),
                   ARG_STRUCT(*shape), ARG_STRUCT(router), ARG_UINT(layer->policy->best_first)));
    TRY(launch_teams(chain, layer, KERNEL_SUMS_ROWS, b->tokens));
done:
    return status;
}

/* The sums of the blocks, of what is asked for. */
static clmoe_status sum_blocks(const batch *b, launch *chain, const sums *in, clmoe_buf rows,
                               clmoe_buf partial) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const sums_shape *shape = &in->shape;
    const router_switches router = p_switches(layer);
    const clmoe_buf state = p_state(b), ids = chosen_ids(b);
    cl_kernel kernel = layer->kernels[KERNEL_SUMS_BLOCKS];
    const uint32_t by_pair =
        SUM_BIT(SUM_WEIGHTS) | COUNT_BIT(COUNT_ASSIGNED) | COUNT_BIT(COUNT_FIRST);
    const uint32_t along = divide_up(layer->columns, columns_at_once(layer));
    const uint32_t column_groups = shape->asked & LOGIT_BITS ? along : 0;
    const uint32_t pair_groups = shape->asked & by_pair ? along : 0;
    const uint32_t devices = shape->asked & DEVICE_BIT ? shape->device_groups : 0;
    const size_t groups[2] = {(size_t)column_groups + pair_groups + devices + 2,
                              (size_t)shape->sequences * shape->blocks_each};
    const size_t local[2] = {layer->balance_group, 1};
    const bool keeps = layer_keeps_chosen_weights(layer);
    clmoe_buf pair_weights = b->pair_weights;
    if (keeps && pair_weights.mem)
        pair_weights = PLAN_ARRAY(b, chosen_weights);
    TRY(KERNEL_SET(kernel, ARG_F32(in->p_logits), ARG_F32(in->noisy),
                   ARG_AS(clean, ARG_F32(b->logits)), ARG_F32(in->noise_raw),
                   ARG_AS(ranks, ARG_F32(in->scores)), ARG_F32(ids),
                   ARG_AS(weight_ids, ARG_F32(keeps ? ids : b->ids)), ARG_F32(pair_weights),
                   ARG_F32(b->live), ARG_U8(b->token_mask), ARG_F32(b->token_offsets),
                   ARG_F32(state), ARG_F32(rows), ARG_F32(partial), ARG_STRUCT(*shape),
                   ARG_STRUCT(router), ARG_UINT(column_groups), ARG_UINT(pair_groups)));
    TRY(launch_kernel(chain, kernel, 2, groups, local));
done:
    return status;
}

clmoe_status step_sums(const batch *b, launch *chain, sums *in) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel reduce = layer->kernels[KERNEL_SUMS_REDUCE];
    clmoe_buf rows = region(b, REGION_SUMS_ROWS);
    clmoe_buf partial = region(b, REGION_SUMS_PARTIAL);
    clmoe_buf records = region(b, REGION_SUMS);
    in->shape = workspace_sums(layer, b->tokens, in->asked);
    const sums_shape *shape = &in->shape;
    size_t local[2] = {layer->balance_group, 1};
    size_t groups[2] = {record_words(shape) / local[0] + 1,
                        shape->sequences > 1 ? shape->sequences + 1 : 1};
    if (b->tokens > 0) {
        TRY(sum_rows(b, chain, in, rows));
        TRY(sum_blocks(b, chain, in, rows, partial));
    }
    TRY(KERNEL_SET(reduce, ARG_F32(partial), ARG_AS(sums, ARG_F32(records)), ARG_STRUCT(*shape)));
    TRY(launch_kernel(chain, reduce, 2, groups, local));
done:
    return status;
}
