/* scores -> ids, weights. */
#include "runtime/program.h"
#include "steps.h"

#include <stdio.h>
#include <string.h>

enum {
    MAX_TOPK_CHUNK = 1024,
    MAX_SELECT_COLUMNS = 1 << 30,
    MAX_TOPK_BYTES = 12288,
    MAX_TOPK_TOKENS = 64,
    MAX_REGISTER_KEYS = 16,
    MAX_TOPK_KEYS = 2048, /* in registers of a group */
};

/* How a group of topk.cl shares its work-items among tokens. */
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

/* A program of topk.cl that keeps the best of each token. */
typedef struct topk_program {
    char options[128];
    uint32_t tokens; /* per group */
    size_t local_bytes;
} topk_program;

static topk_program bitonic_program(const clmoe_layer *layer, uint32_t best) {
    topk_program program;
    const uint32_t group = layer->group, groups = (uint32_t)layer->router.num_groups;
    const uint32_t keep = power_of_two(best, MAX_TOPK_CHUNK);
    const topk_split split = split_topk(group, layer->columns, keep, groups);
    program.tokens = split.tokens;
    program.local_bytes = topk_bytes(&split, keep, groups);
    snprintf(program.options, sizeof program.options,
             "-DBITONIC -DGROUP=%u -DKEEP=%u -DGROUPS=%u -DTOKENS=%u -D%s=%u", group, keep, groups,
             split.tokens, split.lanes ? "LANES" : "CHUNK",
             split.lanes ? split.lanes : split.chunk);
    return program;
}

/* Powers of two and three quarters of them: layers of similar sizes share a program. */
static uint32_t select_columns(uint32_t columns) {
    const uint32_t power = power_of_two(columns > 16 ? columns : 16, MAX_SELECT_COLUMNS);
    const uint32_t less = power / 4 * 3;
    return less % 16 == 0 && columns <= less ? less : power;
}

static topk_program select_program(const clmoe_layer *layer, uint32_t best) {
    topk_program program = {.tokens = 1};
    snprintf(program.options, sizeof program.options, "-DGROUP=1 -DKEEP=%u -DCOLUMNS=%u",
             power_of_two(best > 4 ? best : 4, MAX_TOPK_CHUNK), select_columns(layer->columns));
    return program;
}

size_t topk_options(const clmoe_layer *layer, char *options, size_t size) {
    const topk_program program = bitonic_program(layer, layer->desc.top_k);
    snprintf(options, size, "%s", program.options);
    return program.local_bytes;
}

clmoe_status topk_create(clmoe_layer *layer) {
    const bool select = layer->group == 1;
    const topk_program program =
        (select ? select_program : bitonic_program)(layer, layer->desc.top_k);
    layer->topk_tokens = program.tokens;
    return program_kernel(layer->context, "routing/topk", program.options,
                          select ? "topk_select" : "topk_bitonic", &layer->kernels[KERNEL_TOPK]);
}

clmoe_status cutoff_create(clmoe_layer *layer) {
    const bool select = layer->group == 1;
    topk_program program =
        (select ? select_program : bitonic_program)(layer, layer->desc.top_k + 1);
    layer->cutoff_tokens = program.tokens;
    strcat(program.options, " -DCUTOFF");
    return program_kernel(layer->context, "routing/topk", program.options,
                          select ? "cutoff_select" : "cutoff_bitonic",
                          &layer->kernels[KERNEL_CUTOFF]);
}

/* The one that the controllers keep. */
static clmoe_buf state_select_bias(clmoe_buf state) {
    return (clmoe_buf){state.mem, state.offset + sizeof(clmoe_state)};
}

clmoe_buf select_bias_of(const batch *b) {
    const clmoe_layer *layer = b->layer;
    clmoe_buf none = {0};
    if (!layer->desc.router.select_bias)
        return none;
    if (b->weights && b->weights->select_bias.mem)
        return b->weights->select_bias;
    return state_select_bias(b->state);
}

clmoe_status step_topk_scores(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_TOPK];
    uint32_t group_tokens = layer->topk_tokens;
    TRY(KERNEL_SET(kernel, ARG_F32(b->scores), ARG_F32(select_bias_of(b)),
                   ARG_F32(expert_scale_of(b)), ARG_F32(b->ids), ARG_F32(b->pair_weights),
                   ARG_F32(b->live), ARG_AS(num_tokens, ARG_UINT(b->tokens)),
                   ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, group_tokens), layer->group));
done:
    return status;
}

clmoe_status step_cutoffs(const batch *b, launch *chain, clmoe_buf scores, clmoe_buf cutoffs) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf select_bias = state_select_bias(b->state);
    const clmoe_layer *layer = b->layer;
    cl_kernel kernel = layer->kernels[KERNEL_CUTOFF];
    TRY(KERNEL_SET(kernel, ARG_F32(scores), ARG_F32(select_bias), ARG_F32(cutoffs),
                   ARG_AS(num_tokens, ARG_UINT(b->tokens)), ARG_STRUCT(layer->router)));
    TRY(launch_1d(chain, kernel, divide_up(b->tokens, layer->cutoff_tokens), layer->group));
done:
    return status;
}

const routing_policy token_choice_policy = {
    .create = topk_create, .step = step_topk_scores, .best_first = true};

clmoe_status step_topk(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_layer *layer = b->layer;
    TRY(layer->policy->step(b, chain));
    if (layer_rebalances(layer))
        TRY(step_rebalance(b, chain));
done:
    return status;
}
