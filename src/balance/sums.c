/* The batch -> what it adds up to: shared by statistics and losses. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>

enum { MAX_SUM_GROUP = 64, SERIAL_COLUMNS = 16 };

/* Columns a group of the balance kernels takes at once. */
static uint32_t columns_at_once(const clmoe_layer *layer) {
    return layer->balance_group == 1 ? SERIAL_COLUMNS : layer->balance_group;
}

clmoe_status balance_kernel(clmoe_layer *layer, kernel_id id, const char *step, const char *name) {
    char options[32];
    snprintf(options, sizeof options, "-DGROUP=%u", layer->balance_group);
    return program_kernel(layer->context, step, options, name, &layer->kernels[id]);
}

clmoe_status sums_create(clmoe_layer *layer) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t group = layer->group;
    layer->balance_group = group < MAX_SUM_GROUP ? group : MAX_SUM_GROUP;
    TRY(balance_kernel(layer, KERNEL_SUMS_ROWS, "balance/sums", "sums_rows"));
    TRY(balance_kernel(layer, KERNEL_SUMS_COLUMNS, "balance/sums", "sums_columns"));
    TRY(balance_kernel(layer, KERNEL_SUMS_PAIRS, "balance/sums", "sums_pairs"));
    TRY(balance_kernel(layer, KERNEL_SUMS_TOKENS, "balance/sums", "sums_tokens"));
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

/* Each token's row, then the sums of the blocks over the columns. */
static clmoe_status sum_logits(const batch *b, launch *chain, const sums *in, clmoe_buf rows,
                               clmoe_buf partial) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    const sums_shape *shape = &in->shape;
    const router_switches router = p_switches(layer);
    const clmoe_buf state = p_state(b);
    cl_kernel kernel = layer->kernels[KERNEL_SUMS_ROWS];
    size_t local[2] = {layer->balance_group, 1};
    size_t blocks[2] = {divide_up(layer->columns, columns_at_once(layer)),
                        (size_t)shape->sequences * shape->blocks_each};
    TRY(KERNEL_SET(kernel, ARG_F32(in->p_logits), ARG_F32(in->noisy),
                   ARG_AS(ranks, ARG_F32(in->scores)), ARG_F32(chosen_ids(b)), ARG_F32(b->live),
                   ARG_U8(b->token_mask), ARG_F32(b->token_offsets), ARG_F32(state), ARG_F32(rows),
                   ARG_STRUCT(*shape), ARG_STRUCT(router), ARG_UINT(layer->policy->best_first)));
    TRY(launch_1d(chain, kernel, b->tokens, local[0]));
    if (!(shape->asked & LOGIT_BITS))
        return CLMOE_SUCCESS;
    kernel = layer->kernels[KERNEL_SUMS_COLUMNS];
    TRY(KERNEL_SET(kernel, ARG_F32(in->p_logits), ARG_F32(in->noisy),
                   ARG_AS(clean, ARG_F32(b->logits)), ARG_F32(in->noise_raw),
                   ARG_AS(ranks, ARG_F32(in->scores)), ARG_F32(state), ARG_F32(rows),
                   ARG_F32(partial), ARG_STRUCT(*shape), ARG_STRUCT(router)));
    TRY(launch_kernel(chain, kernel, 2, blocks, local));
done:
    return status;
}

/* The sums of the blocks over pairs and tokens. */
static clmoe_status sum_pairs(const batch *b, launch *chain, const sums_shape *shape,
                              clmoe_buf rows, clmoe_buf partial) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_SUMS_PAIRS];
    const uint32_t by_pair =
        SUM_BIT(SUM_WEIGHTS) | COUNT_BIT(COUNT_ASSIGNED) | COUNT_BIT(COUNT_FIRST);
    const uint32_t groups = shape->asked & DEVICE_BIT ? shape->device_groups : 0;
    const size_t all_blocks = (size_t)shape->sequences * shape->blocks_each;
    size_t local[2] = {layer->balance_group, 1};
    size_t columns[2] = {divide_up(layer->columns, columns_at_once(layer)), all_blocks};
    size_t tokens[2] = {groups + 2, all_blocks};
    bool keeps = layer_keeps_chosen_weights(layer);
    clmoe_buf ids = chosen_ids(b), pair_weights = b->pair_weights;
    if (keeps && pair_weights.mem)
        pair_weights = PLAN_ARRAY(b, chosen_weights);
    if (shape->asked & by_pair) {
        TRY(KERNEL_SET(kernel, ARG_F32(ids), ARG_AS(weight_ids, ARG_F32(keeps ? ids : b->ids)),
                       ARG_F32(pair_weights), ARG_F32(b->live), ARG_U8(b->token_mask),
                       ARG_F32(b->token_offsets), ARG_F32(rows), ARG_F32(partial),
                       ARG_STRUCT(*shape)));
        TRY(launch_kernel(chain, kernel, 2, columns, local));
    }
    kernel = layer->kernels[KERNEL_SUMS_TOKENS];
    TRY(KERNEL_SET(kernel, ARG_F32(ids), ARG_F32(b->live), ARG_U8(b->token_mask),
                   ARG_F32(b->token_offsets), ARG_F32(rows), ARG_F32(partial), ARG_STRUCT(*shape)));
    TRY(launch_kernel(chain, kernel, 2, tokens, local));
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
        TRY(sum_logits(b, chain, in, rows, partial));
        TRY(sum_pairs(b, chain, shape, rows, partial));
    }
    TRY(KERNEL_SET(reduce, ARG_F32(partial), ARG_AS(sums, ARG_F32(records)), ARG_STRUCT(*shape)));
    TRY(launch_kernel(chain, reduce, 2, groups, local));
done:
    return status;
}
