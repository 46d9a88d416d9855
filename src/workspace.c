/* Sizes of all memory regions, their places, and which of them live until the backward pass. */
#include "workspace.h"

#include <stdint.h>

enum { REGION_ALIGNMENT = 256, MAX_BLOCKS = 256, SERIAL_BLOCK = 1024, SORT_BINS = 256 };
enum { MIN_SUM_BLOCK = 16, SUM_BLOCKS = 128 };

/* Tokens that workspace_token_blocks() are multiples of, on CPUs and elsewhere. */
enum { SERIAL_ROWS = 256, ROWS = 32 };

/* Sizes that must fit the plan's 31-bit integers. */
#define MAX_PAIRS ((size_t)1 << 30)
#define MAX_SLOTS ((size_t)INT32_MAX)

/* The sizes every region is made of. */
typedef struct batch {
    const clmoe_layer *layer;
    size_t tokens, pairs, slots, blocks, sort_blocks;
} batch;

static size_t round_up(size_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

static block_split split(const clmoe_context *context, uint32_t count, uint32_t max_blocks) {
    uint32_t unit = context->group == 1 ? SERIAL_BLOCK : context->group;
    uint32_t units = count / unit + (count % unit != 0);
    uint32_t per_block = units / max_blocks + (units % max_blocks != 0);
    if (count == 0)
        return (block_split){.size = unit, .count = 1};
    block_split split = {.size = unit * per_block};
    split.count = count / split.size + (count % split.size != 0);
    return split;
}

sums_shape workspace_sums(const clmoe_layer *layer, uint32_t tokens, uint32_t asked) {
    const clmoe_layer_desc *desc = &layer->desc;
    uint32_t sequence = desc->capacity.tokens_per_sequence;
    uint32_t block = tokens / SUM_BLOCKS + (tokens % SUM_BLOCKS != 0);
    if (sequence == 0 || sequence > tokens)
        sequence = tokens;
    block = block > MIN_SUM_BLOCK ? block : MIN_SUM_BLOCK;
    return (sums_shape){
        .tokens = tokens,
        .columns = layer->columns,
        .experts = desc->num_experts,
        .top_k = desc->top_k,
        .device_groups = desc->balance.device_groups,
        .sequence = sequence,
        .sequences = tokens > 0 ? tokens / sequence + (tokens % sequence != 0) : 1,
        .block = block,
        .blocks_each = sequence / block + (sequence % block != 0),
        .asked = asked,
        .noise_scale = desc->router.noise_scale,
    };
}

block_split workspace_token_blocks(const clmoe_context *context, uint32_t tokens) {
    uint32_t unit = context->group == 1 ? SERIAL_ROWS : ROWS;
    uint32_t units = tokens / unit + (tokens % unit != 0);
    block_split split = {.size = unit * (units / MAX_BLOCKS + (units % MAX_BLOCKS != 0))};
    split.count = tokens ? tokens / split.size + (tokens % split.size != 0) : 0;
    return split;
}

block_split workspace_blocks(const clmoe_context *context, uint32_t count) {
    return split(context, count, MAX_BLOCKS);
}

/* Pairs of a batch, or the bound of expert choice: what the plan walks over. */
static size_t batch_pairs(const clmoe_layer *layer, uint32_t tokens) {
    if (layer_is_expert_choice(layer))
        return (size_t)layer->desc.num_experts * layer_capacity(layer, tokens);
    return (size_t)tokens * layer->desc.top_k;
}

walk_split workspace_walk(const clmoe_layer *layer, uint32_t tokens) {
    uint32_t sequences = layer_sequences(layer, tokens);
    uint32_t each = tokens > 0 ? layer_sequence_tokens(layer, tokens) : 0;
    uint32_t most = sequences < MAX_BLOCKS ? MAX_BLOCKS / sequences : 1;
    /* A sequence alone; expert choice has none. */
    uint32_t entries = (uint32_t)batch_pairs(layer, each);
    walk_split walk = {.blocks = split(layer->context, entries, most)};
    walk.sequence_blocks = walk.blocks.count;
    walk.blocks.count *= sequences;
    return walk;
}

/* Rows an expert gets on average decide the tile; the bound of slots follows from it. */
static clmoe_status plan_sizes(const clmoe_layer *layer, uint32_t tokens, clmoe_plan_layout *plan) {
    size_t pairs = batch_pairs(layer, tokens), experts = layer->desc.num_experts, slots;
    if (pairs > MAX_PAIRS)
        return fail(CLMOE_UNSUPPORTED, "tokens is %u: %zu pairs are more than 2^30", tokens, pairs);
    plan->pairs = (uint32_t)pairs;
    size_t rows = layer_is_soft_moe(layer) ? layer_router_rows(layer) : pairs;
    plan->row_tile = layer->experts.engine->row_tile(layer->context, (uint32_t)(rows / experts));
    plan->capacity = 0;
    if (layer_is_soft_moe(layer)) {
        plan->capacity = layer->desc.router.slots_per_expert;
        slots = experts * round_up(plan->capacity, plan->row_tile);
    } else if (layer_is_dropless(layer)) {
        slots = round_up(pairs + (experts < pairs ? experts : pairs) * (plan->row_tile - 1),
                         plan->row_tile);
    } else {
        plan->capacity = layer_capacity(layer, tokens);
        size_t places = (size_t)layer_sequences(layer, tokens) * plan->capacity;
        slots = places > MAX_SLOTS ? places : experts * round_up(places, plan->row_tile);
    }
    if (slots > MAX_SLOTS)
        return fail(CLMOE_UNSUPPORTED,
                    "tokens is %u and capacity %u: %zu slots are more than 2^31-1", tokens,
                    plan->capacity, slots);
    plan->slots = (uint32_t)slots;
    return CLMOE_SUCCESS;
}

static clmoe_status plan_layout(const clmoe_layer *layer, uint32_t tokens,
                                clmoe_plan_layout *plan) {
    clmoe_status status = CLMOE_SUCCESS;
    size_t place = 0;
    TRY(plan_sizes(layer, tokens, plan));
    const struct {
        size_t *offset;
        size_t count;
    } arrays[] = {
        {&plan->load, layer->columns},
        {&plan->kept, layer->columns},
        {&plan->rerouted_in, layer->columns},
        {&plan->rerouted_out, layer->columns},
        {&plan->offsets, (size_t)layer->desc.num_experts + 1},
        {&plan->slot_of, plan->pairs},
        {&plan->row_of, plan->slots},
        {&plan->token_of, plan->slots},
        {&plan->tile_expert, plan->slots / plan->row_tile},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        *arrays[i].offset = place;
        place = round_up(place + arrays[i].count * sizeof(cl_int), REGION_ALIGNMENT);
    }
    plan->bytes = place;
done:
    return status;
}

/* Bytes of [rows, columns]; saturates, so that an overflow is caught once below. */
static size_t matrix_of(size_t rows, size_t columns, size_t element) {
    size_t elements, bytes;
    return size_mul(rows, columns, &elements) && size_mul(elements, element, &bytes) ? bytes
                                                                                     : SIZE_MAX;
}

static size_t matrix(size_t rows, size_t columns) {
    return matrix_of(rows, columns, sizeof(cl_float));
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static size_t engine_bytes(const gemm_use *use, size_t rows) {
    if (!use->engine)
        return 0;
    const gemm_shape *shape = &use->shape;
    return larger(use->engine->scratch(shape, rows, shape->hidden_dim, shape->form),
                  use->engine->scratch(shape, rows, shape->dim, GEMM_LINEAR));
}

/* Regions of statistics and losses. */
static size_t balance_bytes(region_id id, const batch *b) {
    sums_shape shape = workspace_sums(b->layer, (uint32_t)b->tokens, 0);
    size_t columns = b->layer->columns, sequences = shape.sequences;
    size_t record =
        (SUM_SOURCES + COUNT_SOURCES) * columns + shape.device_groups + (size_t)SCALAR_COUNT;
    switch (id) {
    case REGION_SUMS_PARTIAL:
        return matrix(sequences * shape.blocks_each, record);
    case REGION_SUMS:
        return matrix(sequences + 1, record);
    case REGION_LOSS_GRADS:
        return matrix(sequences, columns * GRAD_SOURCES);
    default:
        return matrix(sequences, MAX_LOSSES);
    }
}

/* What the policies need beside the scores; nothing for plain token choice. */
static size_t policy_bytes(region_id id, const batch *b) {
    const clmoe_router_desc *router = &b->layer->desc.router;
    size_t columns = b->layer->columns;
    bool expert_choice = layer_is_expert_choice(b->layer);
    bool sinkhorn = router->policy == CLMOE_POLICY_SINKHORN;
    switch ((int)id) {
    case REGION_TOKEN_OFFSETS:
        return expert_choice ? matrix(b->tokens + 1, 1) : 0;
    case REGION_CHOICE_THRESHOLDS:
        return expert_choice ? matrix(columns, 2) : 0;
    case REGION_CHOICE_KEYS:
        return expert_choice ? matrix(columns, b->tokens) : 0;
    case REGION_CHOICES:
        return sinkhorn ? matrix(b->tokens, columns) : 0;
    case REGION_TOPS:
        return sinkhorn || layer_is_soft_moe(b->layer) ? matrix(b->tokens, 2) : 0;
    case REGION_SINKHORN_BALANCE:
        return sinkhorn ? matrix(columns + 2, 1) : 0;
    case REGION_SINKHORN_PARTIALS:
        return sinkhorn
                   ? matrix(workspace_token_blocks(b->layer->context, (uint32_t)b->tokens).count,
                            columns)
                   : 0;
    case REGION_GROUP_LOGITS:
        return router->two_level ? matrix(b->tokens, router->num_groups) : 0;
    }
    return 0;
}

static size_t soft_moe_bytes(region_id id, const batch *b) {
    const clmoe_layer_desc *desc = &b->layer->desc;
    size_t columns = layer_router_rows(b->layer);
    switch ((int)id) {
    case REGION_SOFT_X:
    case REGION_MIXED:
        return matrix_of(b->tokens, desc->dim, type_bytes(desc->type));
    case REGION_TOKEN_NORMS:
        return matrix(b->tokens, 1);
    case REGION_SLOT_NORMS:
        return matrix(columns, 1);
    case REGION_SOFT_PARTIALS:
        return matrix(workspace_token_blocks(b->layer->context, (uint32_t)b->tokens).count,
                      2 * columns);
    case REGION_SOFT_COLUMNS:
        return matrix(columns, 2);
    case REGION_SOFT_DISPATCH:
    case REGION_SOFT_COMBINE:
        return matrix(b->slots, b->tokens);
    }
    return 0;
}

/* Two arrays per block and column, one per column, one per pair and per token, two numbers. */
static size_t rebalance_bytes(const batch *b) {
    size_t blocks = workspace_blocks(b->layer->context, (uint32_t)b->tokens).count;
    size_t columns = matrix(2 * blocks + 1, b->layer->desc.num_experts);
    size_t rows = matrix(b->pairs + b->tokens + 2, 1), bytes;
    return size_add(columns, rows, &bytes) ? bytes : SIZE_MAX;
}

static size_t region_bytes(region_id id, const batch *b) {
    const clmoe_layer *layer = b->layer;
    const clmoe_layer_desc *desc = &layer->desc;
    bool has_shared = desc->shared.hidden_dim > 0;
    size_t x = type_bytes(desc->type);
    switch (id) {
    case REGION_LOGITS:
        return matrix(b->tokens, layer_router_rows(layer));
    case REGION_SCORES:
        return matrix(b->tokens, layer->columns);
    case REGION_NOISY:
        return layer_is_noisy(layer) ? matrix(b->tokens, layer->columns) : 0;
    case REGION_NOISE_RAW:
        return desc->router.noise == CLMOE_NOISE_LEARNED ? matrix(b->tokens, layer->columns) : 0;
    case REGION_DROPOUT:
        return desc->router.expert_dropout > 0 ? matrix(2, layer->columns) : 0;
    case REGION_JITTERED:
        return desc->router.jitter > 0 ? matrix_of(b->tokens, desc->dim, x) : 0;
    case REGION_IDS:
    case REGION_WEIGHTS:
        return matrix(b->pairs, 1);
    case REGION_LIVE:
        return matrix(b->tokens, 1);
    case REGION_TOKEN_OFFSETS:
    case REGION_CHOICE_THRESHOLDS:
    case REGION_CHOICE_KEYS:
    case REGION_CHOICES:
    case REGION_TOPS:
    case REGION_SINKHORN_BALANCE:
    case REGION_SINKHORN_PARTIALS:
    case REGION_GROUP_LOGITS:
        return policy_bytes(id, b);
    case REGION_SOFT_X:
    case REGION_TOKEN_NORMS:
    case REGION_SLOT_NORMS:
    case REGION_SOFT_PARTIALS:
    case REGION_SOFT_COLUMNS:
    case REGION_SOFT_DISPATCH:
    case REGION_SOFT_COMBINE:
    case REGION_MIXED:
        return layer_is_soft_moe(layer) ? soft_moe_bytes(id, b) : 0;
    case REGION_HISTOGRAM:
        return larger(matrix(b->blocks, layer->columns), matrix(b->sort_blocks, SORT_BINS));
    case REGION_SEQUENCES:
        return layer_has_sequences(layer)
                   ? matrix(layer_sequences(layer, (uint32_t)b->tokens) + (size_t)1, layer->columns)
                   : 0;
    case REGION_SORT_KEYS:
    case REGION_SORT_KEYS_2:
    case REGION_SORT_ORDER:
    case REGION_SORT_ORDER_2:
        return layer_sorts(layer) ? matrix(b->pairs, 1) : 0;
    case REGION_REBALANCE:
        return layer_rebalances(layer) ? rebalance_bytes(b) : 0;
    case REGION_REROUTE:
        return layer_reroutes(layer) ? matrix(b->tokens, REROUTE_WORDS) : 0;
    case REGION_XE:
        return layer->experts.engine->gathers && !layer_is_soft_moe(layer)
                   ? 0
                   : matrix_of(b->slots, desc->dim, x);
    case REGION_HIDDEN:
        return matrix_of(b->slots, desc->experts.hidden_dim, x);
    case REGION_YE:
        return matrix_of(b->slots, desc->dim, x);
    case REGION_ENGINE:
        return larger(engine_bytes(&layer->experts, b->slots),
                      engine_bytes(&layer->shared, b->tokens));
    case REGION_SHARED_HIDDEN:
        return matrix_of(b->tokens, desc->shared.hidden_dim, x);
    case REGION_SHARED_Y:
        return has_shared ? matrix_of(b->tokens, desc->dim, x) : 0;
    case REGION_SHARED_GATE:
        return desc->shared_gate ? matrix(b->tokens, 1) : 0;
    case REGION_SUMS_ROWS:
        return matrix(b->tokens, TOKEN_ROW_WORDS);
    case REGION_SUMS_PARTIAL:
    case REGION_SUMS:
    case REGION_LOSS_GRADS:
    case REGION_LOSS_VALUES:
        return balance_bytes(id, b);
    case REGION_PLAN:
    case REGION_COUNT:
        break;
    }
    return 0;
}

/* What a backward pass reads again; the rest is computed anew or not needed. */
static bool region_is_saved(region_id id) {
    return id == REGION_SCORES || id == REGION_IDS || id == REGION_WEIGHTS || id == REGION_LIVE ||
           id == REGION_TOKEN_OFFSETS || id == REGION_PLAN || id == REGION_YE;
}

clmoe_status workspace_layout_get(const clmoe_layer *layer, uint32_t tokens,
                                  workspace_layout *layout) {
    clmoe_status status = CLMOE_SUCCESS;
    *layout = (workspace_layout){0};
    TRY(plan_layout(layer, tokens, &layout->plan));
    batch b = {.layer = layer,
               .tokens = tokens,
               .pairs = layout->plan.pairs,
               .slots = layout->plan.slots,
               .blocks = workspace_walk(layer, tokens).blocks.count,
               .sort_blocks = workspace_blocks(layer->context, layout->plan.pairs).count};
    for (int id = 0; id < REGION_COUNT; id++) {
        bool saved = layer->desc.training && region_is_saved((region_id)id);
        size_t *total = saved ? &layout->saved_bytes : &layout->scratch_bytes;
        size_t bytes = id == REGION_PLAN ? layout->plan.bytes : region_bytes((region_id)id, &b);
        layout->saved[id] = saved;
        layout->bytes[id] = bytes;
        layout->offset[id] = *total;
        if (bytes > SIZE_MAX - REGION_ALIGNMENT ||
            !size_add(*total, round_up(bytes, REGION_ALIGNMENT), total)) {
            status =
                fail(CLMOE_UNSUPPORTED, "tokens is %u: the memory for it exceeds size_t", tokens);
            goto done;
        }
    }
done:
    return status;
}

clmoe_buf workspace_region(const workspace_layout *layout, region_id id, clmoe_buf saved,
                           clmoe_buf scratch) {
    clmoe_buf base = layout->saved[id] ? saved : scratch;
    if (layout->bytes[id] == 0)
        return (clmoe_buf){0};
    return (clmoe_buf){base.mem, base.offset + layout->offset[id]};
}
