/* Sizes of all memory regions, their places, and which of them live until the backward pass. */
#include "workspace.h"
#include "lifetimes.h"
#include "routing/token_rounding.clh"

#include <math.h>
#include <stdint.h>

enum { MAX_BLOCKS = 256, SERIAL_BLOCK = 1024, SORT_BINS = 256 };
enum { MIN_SUM_BLOCK = 16, SUM_BLOCKS = 128 };

enum { MAX_STEPS = 1 << 16 }; /* of most_slots() */

/* Tokens that workspace_token_blocks() are multiples of, on CPUs and elsewhere. */
enum { SERIAL_ROWS = 256, ROWS = 32 };

/* Sizes that must fit the plan's 31-bit integers. */
#define MAX_PAIRS ((size_t)1 << 30)
#define MAX_SLOTS ((size_t)INT32_MAX)

/* The sizes every region is made of: those of a batch, or the largest of it and all smaller ones.
 */
typedef struct batch {
    const clmoe_layer *layer;
    size_t tokens, pairs, slots, row_tiles;
    size_t z_rows;                       /* of z */
    size_t walk_blocks, sort_blocks;     /* of the plan */
    size_t token_blocks, balance_blocks; /* of Sinkhorn and Soft MoE; of rebalancing */
    size_t sequences, sum_blocks;        /* of the balance pass */
} batch;

static size_t round_up(size_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

static uint32_t block_unit(uint32_t group) {
    return group == 1 ? SERIAL_BLOCK : group;
}

static uint32_t token_unit(uint32_t group) {
    return group == 1 ? SERIAL_ROWS : ROWS;
}

static block_split split(uint32_t group, uint32_t count, uint32_t max_blocks) {
    uint32_t unit = block_unit(group);
    uint32_t units = divide_up(count, unit);
    uint32_t per_block = divide_up(units, max_blocks);
    if (count == 0)
        return (block_split){.size = unit, .count = 1};
    block_split split = {.size = unit * per_block};
    split.count = divide_up(count, split.size);
    return split;
}

static uint32_t row_tile(const clmoe_layer *layer, size_t rows) {
    return layer->experts.engine->row_tile(layer->context, (uint32_t)rows);
}

uint32_t workspace_multiple(const clmoe_layer *layer, uint32_t tokens) {
    const clmoe_layer_desc *desc = &layer->desc;
    if (desc->capacity.multiple > 0)
        return desc->capacity.multiple;
    return row_tile(layer, (size_t)tokens * desc->top_k / desc->num_experts);
}

/* The bound of token rounding: half a multiple more per expert, at most every pair there is. */
static size_t rounded_pairs(const clmoe_layer *layer, uint32_t tokens, uint32_t multiple) {
    const size_t experts = layer->desc.num_experts, all = tokens * experts;
    const size_t more = multiple / 2 < tokens ? multiple / 2 : tokens;
    const size_t bound = (size_t)tokens * layer->desc.top_k + experts * more;
    return bound < all ? bound : all;
}

/* Pairs of a batch, or the bound of a list of pairs: what the plan walks over. */
static size_t batch_pairs(const clmoe_layer *layer, uint32_t tokens) {
    if (layer_is_expert_choice(layer))
        return (size_t)layer->desc.num_experts * layer_capacity(layer, tokens);
    if (layer_rounds(layer))
        return rounded_pairs(layer, tokens, workspace_multiple(layer, tokens));
    return (size_t)tokens * layer->desc.top_k;
}

/* The largest batch of `tokens` or fewer that chooses each expert `rows` times on average. */
static uint32_t tokens_of_rows(const clmoe_layer *layer, uint32_t tokens, size_t rows) {
    const size_t most = ((rows + 1) * layer->desc.num_experts - 1) / layer->desc.top_k;
    return most < tokens ? (uint32_t)most : tokens;
}

/*
 * The most pairs of a batch of `tokens` or fewer. With token rounding a smaller one may have more,
 * by a larger tile: looks at them, the largest first, until none that is left can.
 */
static size_t most_pairs(const clmoe_layer *layer, uint32_t tokens) {
    size_t most = batch_pairs(layer, tokens);
    if (!layer_rounds(layer))
        return most;
    for (size_t rows = (size_t)tokens * layer->desc.top_k / layer->desc.num_experts; rows > 0;
         rows--) {
        const uint32_t fewer = tokens_of_rows(layer, tokens, rows - 1);
        if (rounded_pairs(layer, fewer, GEMM_MAX_ROW_TILE) <= most)
            break;
        most = larger(most, batch_pairs(layer, fewer));
    }
    return most;
}

sums_shape workspace_sums(const clmoe_layer *layer, uint32_t tokens, uint32_t asked) {
    const clmoe_layer_desc *desc = &layer->desc;
    uint32_t sequence = desc->capacity.tokens_per_sequence;
    uint32_t block = divide_up(tokens, SUM_BLOCKS);
    const clmoe_score_function score = desc->router.score;
    const bool raw_is_logits = score_is_of_row((int)score) || score == CLMOE_SCORE_IDENTITY;
    if (sequence == 0 || sequence > tokens)
        sequence = tokens;
    block = block > MIN_SUM_BLOCK ? block : MIN_SUM_BLOCK;
    return (sums_shape){
        .tokens = tokens,
        .columns = layer->columns,
        .experts = desc->num_experts,
        .top_k = desc->top_k,
        .device_groups = desc->balance.device_groups,
        .pairs = (uint32_t)batch_pairs(layer, tokens),
        .token_pairs = layer_token_pairs(layer),
        .sequence = sequence,
        .sequences = tokens > 0 ? divide_up(tokens, sequence) : 1,
        .block = block,
        .blocks_each = divide_up(sequence, block),
        .asked = asked,
        .noise_scale = desc->router.noise.scale,
        .raw_scale = raw_is_logits ? ldexpf(1.0F, -LOGIT_POWER) : 1.0F,
    };
}

block_split workspace_token_blocks(uint32_t group, uint32_t tokens) {
    uint32_t unit = token_unit(group);
    uint32_t units = divide_up(tokens, unit);
    block_split split = {.size = unit * divide_up(units, MAX_BLOCKS)};
    split.count = tokens ? divide_up(tokens, split.size) : 0;
    return split;
}

block_split workspace_blocks(uint32_t group, uint32_t count) {
    return split(group, count, MAX_BLOCKS);
}

walk_split workspace_walk(const clmoe_layer *layer, uint32_t tokens) {
    uint32_t sequences = layer_sequences(layer, tokens);
    uint32_t sequence = tokens > 0 ? layer_sequence_tokens(layer, tokens) : 0;
    uint32_t most = sequences < MAX_BLOCKS ? MAX_BLOCKS / sequences : 1;
    /* A sequence alone; expert choice has none. */
    uint32_t entries = (uint32_t)batch_pairs(layer, sequence);
    walk_split walk = {.blocks = split(layer->group, entries, most)};
    walk.sequence_blocks = walk.blocks.count;
    walk.blocks.count *= sequences;
    return walk;
}

/* Rows an expert gets on average, before they are rounded: they decide the tile. */
static uint32_t average_rows(const clmoe_layer *layer, uint32_t tokens) {
    size_t rows = (size_t)tokens * layer->desc.top_k;
    if (layer_is_soft_moe(layer))
        rows = layer_router_rows(layer);
    else if (!layer_rounds(layer))
        rows = batch_pairs(layer, tokens);
    return (uint32_t)(rows / layer->desc.num_experts);
}

/* Whether buckets have no row of padding. */
static bool fills_tiles(const clmoe_layer *layer, size_t tile) {
    return layer_rounds(layer) && layer->desc.capacity.multiple % tile == 0;
}

/* Rows of the largest bucket, without a tile; not of dropless layers. */
static size_t bucket_rows(const clmoe_layer *layer, uint32_t tokens) {
    if (layer_is_soft_moe(layer))
        return layer->desc.router.soft_moe.slots;
    return (size_t)layer_sequences(layer, tokens) * layer_capacity(layer, tokens);
}

/* The bound of slots follows from the tile. */
static size_t slots_of(const clmoe_layer *layer, uint32_t tokens, size_t pairs, size_t tile) {
    size_t experts = layer->desc.num_experts;
    if (fills_tiles(layer, tile))
        return round_up(pairs, tile);
    if (!layer_is_soft_moe(layer) && layer_is_dropless(layer))
        return round_up(pairs + (experts < pairs ? experts : pairs) * (tile - 1), tile);
    size_t rows = bucket_rows(layer, tokens);
    return rows > MAX_SLOTS ? rows : experts * round_up(rows, tile);
}

static clmoe_status plan_sizes(const clmoe_layer *layer, uint32_t tokens, clmoe_plan_layout *plan) {
    size_t pairs = batch_pairs(layer, tokens), slots;
    if (pairs > MAX_PAIRS)
        return fail(CLMOE_UNSUPPORTED, "tokens is %u: %zu pairs are more than 2^30", tokens, pairs);
    plan->pairs = (uint32_t)pairs;
    plan->row_tile = row_tile(layer, average_rows(layer, tokens));
    if (layer_is_soft_moe(layer))
        plan->capacity = layer->desc.router.soft_moe.slots;
    else
        plan->capacity = layer_is_dropless(layer) ? 0 : layer_capacity(layer, tokens);
    slots = slots_of(layer, tokens, pairs, plan->row_tile);
    if (slots > MAX_SLOTS)
        return fail(CLMOE_UNSUPPORTED,
                    "tokens is %u and capacity %u: %zu slots are more than 2^31-1", tokens,
                    plan->capacity, slots);
    plan->slots = (uint32_t)slots;
    return CLMOE_SUCCESS;
}

/* The bound of slots of the largest batch of `tokens` or fewer with `rows` rows on average. */
static size_t slots_of_rows(const clmoe_layer *layer, uint32_t tokens, size_t rows, size_t tile) {
    size_t experts = layer->desc.num_experts;
    if (layer_is_expert_choice(layer))
        return experts * round_up(rows, tile);
    tokens = tokens_of_rows(layer, tokens, rows);
    return slots_of(layer, tokens, batch_pairs(layer, tokens), tile);
}

/*
 * The largest bound of slots of a batch of `tokens` or fewer, which may be that of a smaller batch:
 * tiles come and go with the rows of an expert. Looks at all numbers of rows, the largest first,
 * until none that is left can have more, or at MAX_STEPS of them.
 */
static size_t most_slots(const clmoe_layer *layer, uint32_t tokens) {
    const size_t padding = ((size_t)layer->desc.num_experts + 1) * (GEMM_MAX_ROW_TILE - 1);
    size_t rows = average_rows(layer, tokens), most = 0;
    if (layer_is_soft_moe(layer))
        return slots_of(layer, tokens, 0, row_tile(layer, rows));
    for (size_t left = rows + 1; left > 0; left--) {
        size_t at = left - 1, tile = row_tile(layer, at);
        size_t bound = slots_of_rows(layer, tokens, at, 1) + padding;
        if (rows - at == MAX_STEPS)
            most = larger(most, bound);
        if (bound <= most)
            break;
        most = larger(most, slots_of_rows(layer, tokens, at, tile));
    }
    return most < MAX_SLOTS ? most : MAX_SLOTS;
}

/* Where the plan's arrays lie. */
static void place_arrays(const batch *b, clmoe_plan_layout *plan) {
    const size_t columns = b->layer->columns, experts = b->layer->desc.num_experts;
    size_t place = 0;
    const struct {
        size_t *offset;
        size_t count;
    } arrays[] = {
        {&plan->load, columns},
        {&plan->kept, columns},
        {&plan->rerouted_in, columns},
        {&plan->rerouted_out, columns},
        {&plan->offsets, experts + 1},
        {&plan->slot_of, b->pairs},
        {&plan->pair_of, b->slots},
        {&plan->token_of, b->slots},
        {&plan->tile_expert, b->row_tiles},
        {&plan->chosen_ids, layer_reroutes(b->layer) ? b->pairs : 0},
        {&plan->chosen_weights, layer_reroutes(b->layer) ? b->pairs : 0},
    };
    for (size_t i = 0; i < sizeof arrays / sizeof arrays[0]; i++) {
        *arrays[i].offset = place;
        place = round_up(place + arrays[i].count * sizeof(cl_int), REGION_ALIGNMENT);
    }
    plan->bytes = place;
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

static size_t engine_bytes(const gemm_use *use, size_t rows) {
    if (!use->engine)
        return 0;
    const gemm_shape *shape = &use->shape;
    return larger(use->engine->scratch(shape, rows, shape->hidden_dim, shape->form),
                  use->engine->scratch(shape, rows, shape->dim, GEMM_LINEAR));
}

/* Two arrays per block and column, one per column, one per pair and per token, two numbers. */
static size_t rebalance_bytes(const batch *b) {
    size_t columns = matrix(2 * b->balance_blocks + 1, b->layer->desc.num_experts);
    size_t rows = matrix(b->pairs + b->tokens + 2, 1), bytes;
    return size_add(columns, rows, &bytes) ? bytes : SIZE_MAX;
}

/* Words of a pair: a number, and a bit per iteration. */
static size_t rebalance_back_words(const clmoe_layer *layer) {
    return 1 + (size_t)divide_up(layer->desc.router.rebalance.iterations, 32);
}

/* Words of a record of sums.cl. */
static size_t record_words(const clmoe_layer *layer) {
    return (size_t)(SUM_SOURCES + COUNT_SOURCES) * layer->columns +
           layer->desc.balance.device_groups + SCALAR_COUNT;
}

/* Elements of a region and the bytes of one; no rows where the layer does not need it. */
typedef struct region_shape {
    size_t rows, columns, element;
} region_shape;

static region_shape elements(size_t rows, size_t columns, size_t element) {
    return (region_shape){rows, columns, element};
}

static region_shape words(size_t rows, size_t columns) {
    return elements(rows, columns, sizeof(cl_float));
}

static size_t rows_if(bool needed, size_t rows) {
    return needed ? rows : 0;
}

/* Of the largest matrices that a gradient engine is asked for. */
static size_t gradient_bytes(const batch *b) {
    const clmoe_layer *layer = b->layer;
    const clmoe_layer_desc *desc = &layer->desc;
    const gemm_gradient_use *mlp = &layer->mlp_gradient, *dense = &layer->dense_gradient;
    const uint32_t hidden = 2 * desc->experts.hidden_dim, shared = 2 * desc->shared.hidden_dim;
    const uint32_t experts = desc->num_experts, D = desc->dim;
    const size_t of_experts = mlp->engine->scratch(mlp->state, experts, b->slots, hidden, D);
    const gemm_gradient_use *of_one = &layer->shared_gradient;
    const size_t of_shared = of_one->engine->scratch(of_one->state, 1, b->tokens, shared, D);
    const size_t of_router =
        dense->engine->scratch(dense->state, 1, b->tokens, layer_router_rows(layer), D);
    return larger(of_experts, larger(of_shared, of_router));
}

/* The regions of score, top-k and plan. */
static void routing_shapes(const batch *b, region_shape *shapes) {
    const clmoe_layer *layer = b->layer;
    const clmoe_router_desc *router = &layer->desc.router;
    const bool soft_moe = layer_is_soft_moe(layer), sorts = layer_sorts(layer);
    const bool sinkhorn = router->policy == CLMOE_POLICY_SINKHORN;
    const bool choice = layer_lists_pairs(layer), rounds = layer_rounds(layer);
    const bool has_sequences = layer_has_sequences(layer);
    const size_t T = b->tokens, R = layer->columns, N = layer_router_rows(layer);
    const size_t blocks = b->token_blocks;
    const size_t sequences = (size_t)layer_sequences(layer, (uint32_t)T) + 1;
    const size_t histogram = larger(matrix(b->walk_blocks, R), matrix(b->sort_blocks, SORT_BINS));
    const size_t x = type_bytes(layer->desc.type), D = layer->desc.dim;
    const region_shape sort = words(rows_if(sorts, b->pairs), 1);
    shapes[REGION_LOGITS] = words(T, N);
    shapes[REGION_SCORES] = words(T, R);
    shapes[REGION_NOISY] = words(rows_if(layer_is_noisy(layer), T), R);
    shapes[REGION_NOISE_RAW] = words(rows_if(router->noise.kind == CLMOE_NOISE_LEARNED, T), R);
    shapes[REGION_DROPOUT] = words(rows_if(router->dropout.experts > 0, 2), R);
    shapes[REGION_JITTERED] = elements(rows_if(router->noise.jitter > 0, T), D, x);
    shapes[REGION_IDS] = shapes[REGION_WEIGHTS] = words(b->pairs, 1);
    shapes[REGION_LIVE] = words(T, 1);
    shapes[REGION_TOKEN_OFFSETS] = words(rows_if(choice, T + 1), 1);
    shapes[REGION_CHOICE_THRESHOLDS] = words(rows_if(choice, R), 2);
    shapes[REGION_CHOICE_KEYS] = words(rows_if(choice, R), T);
    shapes[REGION_ROUNDING_IDS] = words(rows_if(rounds, T), layer->desc.top_k);
    shapes[REGION_ROUNDING_WEIGHTS] = shapes[REGION_ROUNDING_IDS];
    shapes[REGION_ROUNDING_CHOSEN] = words(rows_if(rounds, R), CHOSEN_WORDS(T));
    shapes[REGION_TOPS] = words(rows_if(sinkhorn || soft_moe, T), 2);
    shapes[REGION_SINKHORN_CHOICES] = words(rows_if(sinkhorn, T), R);
    shapes[REGION_SINKHORN_D1] = words(rows_if(sinkhorn, blocks), R + 2);
    shapes[REGION_SINKHORN_PARTIALS] = words(rows_if(sinkhorn, 2 * blocks), R);
    shapes[REGION_SOFT_MOE_X] = shapes[REGION_MIXED] = elements(rows_if(soft_moe, T), D, x);
    shapes[REGION_TOKEN_NORMS] = words(rows_if(soft_moe, T), 1);
    shapes[REGION_SLOT_NORMS] = words(rows_if(soft_moe, N), 1);
    shapes[REGION_SOFT_MOE_PARTIALS] = words(rows_if(soft_moe, blocks), 2 * N);
    shapes[REGION_SOFT_MOE_COLUMNS] = words(rows_if(soft_moe, N), 2);
    shapes[REGION_SOFT_MOE_DISPATCH] = words(rows_if(soft_moe, b->slots), T);
    shapes[REGION_SOFT_MOE_COMBINE] = words(rows_if(soft_moe, T), b->slots);
    shapes[REGION_GROUP_LOGITS] = words(rows_if(router->groups.two_level, T), router->groups.count);
    shapes[REGION_HISTOGRAM] = elements(1, histogram, 1);
    shapes[REGION_SEQUENCES] = words(rows_if(has_sequences, sequences), R);
    shapes[REGION_SORT_KEYS] = shapes[REGION_SORT_KEYS_2] = sort;
    shapes[REGION_SORT_ORDER] = shapes[REGION_SORT_ORDER_2] = sort;
    shapes[REGION_REBALANCE] = elements(rows_if(layer_rebalances(layer), 1), rebalance_bytes(b), 1);
    shapes[REGION_REROUTE] = words(rows_if(layer_reroutes(layer), T), REROUTE_WORDS);
    shapes[REGION_REROUTE_COUNT] = words(rows_if(layer_reroutes(layer), 1), 1);
}

/* The regions of experts and combine. */
static void expert_shapes(const batch *b, region_shape *shapes) {
    const clmoe_layer *layer = b->layer;
    const clmoe_layer_desc *desc = &layer->desc;
    const bool has_shared = desc->shared.hidden_dim > 0;
    const size_t T = b->tokens, S = b->slots, D = desc->dim;
    const size_t x = type_bytes(desc->type);
    const size_t engine = larger(engine_bytes(&layer->experts, S), engine_bytes(&layer->shared, T));
    shapes[REGION_XE] = elements(rows_if(layer_dispatches(layer), S), D, x);
    shapes[REGION_HIDDEN] =
        elements(1, gemm_mlp_hidden_bytes(&layer->experts, &desc->experts, S), 1);
    shapes[REGION_YE] = elements(S, D, x);
    shapes[REGION_ENGINE] = elements(1, engine, 1);
    shapes[REGION_SHARED_HIDDEN] =
        elements(1, gemm_mlp_hidden_bytes(&layer->shared, &desc->shared, T), 1);
    shapes[REGION_SHARED_Y] = elements(rows_if(has_shared, T), D, x);
    shapes[REGION_SHARED_GATE] = words(rows_if(desc->shared_gate, T), 1);
}

/* The regions of statistics and losses. */
static void balance_shapes(const batch *b, region_shape *shapes) {
    const clmoe_layer *layer = b->layer;
    const bool measures = layer_measures(layer);
    const size_t T = rows_if(measures, b->tokens), Q = rows_if(measures, b->sequences);
    const size_t record = record_words(layer);
    shapes[REGION_SUMS_ROWS] = words(T, sizeof(token_row) / 4);
    shapes[REGION_SUMS_PARTIAL] = words(rows_if(measures, b->sum_blocks), record);
    shapes[REGION_SUMS] = words(rows_if(measures, Q + 1), record);
    shapes[REGION_LOSS_GRADS] = words(Q, (size_t)layer->columns * GRAD_SOURCES);
    shapes[REGION_LOSS_VALUES] = words(Q, MAX_LOSSES);
    shapes[REGION_LOSS_PARTS] = words(Q, (size_t)layer->columns * MAX_LOSSES);
    shapes[REGION_JOINT] = words(rows_if(layer->desc.router.groups.two_level, T), layer->columns);
    shapes[REGION_JOINT_GRADIENT] = shapes[REGION_JOINT];
}

/* What a backward pass reads again; the rest is computed anew or not needed. */
static bool region_is_saved(const clmoe_layer *layer, region_id id) {
    switch (id) {
    case REGION_LOGITS:
    case REGION_NOISY:
    case REGION_NOISE_RAW:
    case REGION_GROUP_LOGITS:
    case REGION_IDS:
    case REGION_WEIGHTS:
    case REGION_LIVE:
    case REGION_TOKEN_OFFSETS:
    case REGION_PLAN:
    case REGION_SOFT_MOE_COLUMNS:
    case REGION_SHARED_GATE:
        return true;
    case REGION_TOPS:
        return layer_is_soft_moe(layer);
    case REGION_Z:
    case REGION_SHARED_Z:
        return !layer->desc.recompute;
    default:
        return false;
    }
}

/* The regions of the backward pass of Soft MoE, and of weight rebalancing. */
static void policy_back_shapes(const batch *b, region_shape *shapes) {
    const clmoe_layer *layer = b->layer;
    const bool soft_moe = layer_is_soft_moe(layer), rebalances = layer_rebalances(layer);
    const size_t T = rows_if(soft_moe, b->tokens), D = layer->desc.dim;
    shapes[REGION_REBALANCE_BACK] =
        words(rows_if(rebalances, b->pairs), rebalance_back_words(layer));
    shapes[REGION_SOFT_MOE_DY] = elements(T, D, type_bytes(layer->desc.type));
    shapes[REGION_DCOMBINE] = shapes[REGION_DDISPATCH] = words(T, b->slots);
    shapes[REGION_SOFT_MOE_ALONG] = words(T, 1);
    shapes[REGION_SOFT_MOE_SUMS] = words(rows_if(soft_moe, layer_router_rows(layer)), 1);
}

/* The regions of the backward pass. */
static void back_shapes(const batch *b, region_shape *shapes) {
    const clmoe_layer *layer = b->layer;
    const clmoe_layer_desc *desc = &layer->desc;
    const size_t T = rows_if(desc->training, b->tokens), S = rows_if(desc->training, b->slots);
    const size_t D = desc->dim, R = layer->columns, x = type_bytes(desc->type);
    const size_t shared = rows_if(desc->shared.hidden_dim > 0, T);
    const bool weighted = desc->router.weight_at == CLMOE_WEIGHT_AT_INPUT;
    const bool learned = desc->router.noise.kind == CLMOE_NOISE_LEARNED;
    const bool two_level = desc->router.groups.two_level, soft_moe = layer_is_soft_moe(layer);
    const bool rows = layer_has_output_rows(layer) || soft_moe;
    const gemm_gradient_engine *engine = layer->mlp_gradient.engine;
    const size_t pairs = rows_if(desc->training, b->pairs);
    const size_t z = mlp_z(&desc->experts, 0, false).row,
                 shared_z = mlp_z(&desc->shared, 0, false).row;
    const size_t z_row = x * (desc->experts.gate_layout == CLMOE_GATE_SEPARATE ? 2 : 1);
    const size_t shared_z_row = x * (desc->shared.gate_layout == CLMOE_GATE_SEPARATE ? 2 : 1);
    if (!desc->training)
        return;
    shapes[REGION_Z] = elements(b->z_rows, z, z_row);
    shapes[REGION_SHARED_Z] = elements(shared, shared_z, shared_z_row);
    shapes[REGION_X_ROWS] = elements(rows_if(weighted || soft_moe || !engine->gathers, S), D, x);
    shapes[REGION_DY_ROWS] =
        elements(rows_if(rows || !layer->experts.engine->gathers || !engine->gathers, S), D, x);
    shapes[REGION_DH] = elements(1, gemm_mlp_hidden_bytes(&layer->experts, &desc->experts, S), 1);
    shapes[REGION_DZ] = elements(S, z, z_row);
    shapes[REGION_DOTS] = words(S, 1);
    shapes[REGION_DXE] = elements(S, D, x);
    shapes[REGION_SHARED_DH] =
        elements(1, gemm_mlp_hidden_bytes(&layer->shared, &desc->shared, shared), 1);
    shapes[REGION_SHARED_DZ] = elements(shared, shared_z, shared_z_row);
    shapes[REGION_SHARED_DOTS] = shapes[REGION_DGATE] = words(shared, 1);
    shapes[REGION_SHARED_DX] = elements(shared, D, x);
    shapes[REGION_DPAIR_WEIGHTS] = words(pairs, 1);
    shapes[REGION_DSCALE] = words(rows_if(desc->router.expert_scale, pairs), 1);
    shapes[REGION_DLOGITS] = words(T, layer_router_rows(layer));
    shapes[REGION_DNOISE] = words(rows_if(learned, T), R);
    shapes[REGION_DGROUP_LOGITS] = words(rows_if(two_level, T), desc->router.groups.count);
    shapes[REGION_RAW_WEIGHTS] = words(pairs, 1);
    shapes[REGION_DJOINT] = words(rows_if(two_level, T), R);
    shapes[REGION_ROUTER_DX] = elements(T, D, x);
    shapes[REGION_UNMASKED] = words(T + 3, 1);
    shapes[REGION_GRADIENT] = elements(1, gradient_bytes(b), 1);
    policy_back_shapes(b, shapes);
}

/* The regions of router orthogonality: for no batch. */
static void orthogonality_shapes(const clmoe_layer *layer, region_shape *shapes) {
    const bool has = layer->desc.balance.router_orthogonality != 0;
    const size_t N = rows_if(has, layer_router_rows(layer)), D = layer->desc.dim;
    shapes[REGION_ROUTER_NORMS] = shapes[REGION_COSINE_SQUARES] = words(N, 1);
    shapes[REGION_ROUTER_UNITS] = shapes[REGION_COSINE_ROWS] = words(N, D);
    shapes[REGION_COSINES] = words(N, N);
}

static batch exact_batch(const clmoe_layer *layer, uint32_t tokens, const clmoe_plan_layout *plan) {
    const sums_shape sums = workspace_sums(layer, tokens, 0);
    return (batch){
        .layer = layer,
        .tokens = tokens,
        .pairs = plan->pairs,
        .slots = plan->slots,
        .z_rows = layer_z_rows(layer, plan),
        .row_tiles = plan->slots / plan->row_tile,
        .walk_blocks = workspace_walk(layer, tokens).blocks.count,
        .sort_blocks = workspace_blocks(layer->group, plan->pairs).count,
        .token_blocks = workspace_token_blocks(layer->group, tokens).count,
        .balance_blocks = workspace_blocks(layer->group, tokens).count,
        .sequences = sums.sequences,
        .sum_blocks = (size_t)sums.sequences * sums.blocks_each,
    };
}

/* The most blocks of up to `count` entries, however they are cut; at least 1. */
static size_t most_blocks(size_t count, size_t unit, size_t max_blocks) {
    size_t units = larger(count / unit + (count % unit != 0), 1);
    return units < max_blocks ? units : max_blocks;
}

/* Each size the largest of all batches of `tokens` or fewer, or a little more. */
static batch largest_batch(const clmoe_layer *layer, uint32_t tokens) {
    const sums_shape sums = workspace_sums(layer, tokens, 0);
    const size_t unit = block_unit(layer->group), slots = most_slots(layer, tokens);
    const size_t sequences = layer_sequences(layer, tokens), Q = sums.sequences;
    const size_t sequence = most_pairs(layer, layer_sequence_tokens(layer, tokens));
    const size_t pairs = most_pairs(layer, tokens);
    const size_t walk = sequences * most_blocks(sequence, unit, SIZE_MAX);
    return (batch){
        .layer = layer,
        .tokens = tokens,
        .pairs = pairs,
        .slots = slots,
        .z_rows = layer_is_soft_moe(layer) || slots < pairs ? slots : pairs,
        .row_tiles = slots / row_tile(layer, 0),
        .walk_blocks = most_blocks(walk, 1, larger(sequences, MAX_BLOCKS)),
        .sort_blocks = most_blocks(pairs, unit, MAX_BLOCKS),
        .token_blocks = most_blocks(tokens, token_unit(layer->group), MAX_BLOCKS),
        .balance_blocks = most_blocks(tokens, unit, MAX_BLOCKS),
        .sequences = Q,
        .sum_blocks = most_blocks(Q * most_blocks(sums.sequence, MIN_SUM_BLOCK, SIZE_MAX), 1,
                                  2 * SUM_BLOCKS + Q),
    };
}

/* The regions of `saved` one after another; those of scratch where their lifetimes let them. */
static clmoe_status place_regions(const batch *b, workspace_layout *layout) {
    bool fits = true;
    for (int id = 0; id < REGION_COUNT && fits; id++) {
        if (!layout->saved[id])
            continue;
        layout->offset[id] = layout->saved_bytes;
        fits = layout->bytes[id] <= SIZE_MAX - REGION_ALIGNMENT &&
               size_add(layout->saved_bytes, round_up(layout->bytes[id], REGION_ALIGNMENT),
                        &layout->saved_bytes);
    }
    if (fits && lifetimes_place(layout))
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED, "tokens is %zu: the memory for it exceeds size_t", b->tokens);
}

/* The plan, and all regions. */
static clmoe_status lay_out(const batch *b, workspace_layout *layout) {
    place_arrays(b, &layout->plan);
    region_shape shapes[REGION_COUNT] = {[REGION_PLAN] = {1, layout->plan.bytes, 1}};
    routing_shapes(b, shapes);
    expert_shapes(b, shapes);
    balance_shapes(b, shapes);
    back_shapes(b, shapes);
    orthogonality_shapes(b->layer, shapes);
    for (int id = 0; id < REGION_COUNT; id++) {
        layout->saved[id] = b->layer->desc.training && region_is_saved(b->layer, (region_id)id);
        layout->bytes[id] = matrix_of(shapes[id].rows, shapes[id].columns, shapes[id].element);
    }
    return place_regions(b, layout);
}

clmoe_status workspace_layout_get(const clmoe_layer *layer, uint32_t tokens,
                                  workspace_layout *layout) {
    clmoe_status status = CLMOE_SUCCESS;
    *layout = (workspace_layout){0};
    TRY(plan_sizes(layer, tokens, &layout->plan));
    const batch b = exact_batch(layer, tokens, &layout->plan);
    TRY(lay_out(&b, layout));
done:
    return status;
}

clmoe_status workspace_most(const clmoe_layer *layer, uint32_t tokens, workspace_layout *layout) {
    clmoe_status status = CLMOE_SUCCESS;
    *layout = (workspace_layout){0};
    TRY(plan_sizes(layer, tokens, &layout->plan));
    const batch b = largest_batch(layer, tokens);
    layout->plan.slots = (uint32_t)b.slots;
    TRY(lay_out(&b, layout));
done:
    return status;
}

clmoe_buf workspace_region(const workspace_layout *layout, region_id id, clmoe_buf saved,
                           clmoe_buf scratch) {
    clmoe_buf base = layout->saved[id] ? saved : scratch;
    if (layout->bytes[id] == 0)
        return (clmoe_buf){0};
    if (layout->saved[id] && !saved.mem)
        return (clmoe_buf){scratch.mem, scratch.offset + layout->scratch_offset[id]};
    return (clmoe_buf){base.mem, base.offset + layout->offset[id]};
}
