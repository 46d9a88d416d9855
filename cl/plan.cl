/*
 * Purpose: the routing plan: a row in a bucket for every pair, by a stable counting sort.
 * Formula: the pairs are walked in keep order; the rank of a pair among its expert's pairs decides:
 *          rank < capacity keeps the slot offsets[e] + rank, the others have no place. A state scales
 *          the capacity of plan_scan, not the buckets.
 * Arrays: ids [pairs], live [T] or NULL, token_mask [T] or NULL, token_offsets [T+1] or NULL, order
 *         [T] or [T*K] by the keep rule -> load [R], kept [R], offsets [E+1], slot_of [pairs],
 *         row_of [S], token_of [S], tile_expert [S/row_tile]; histogram [blocks, R] u32.
 * NDRange: plan_histogram, plan_scatter: a group per block of block_size grid entries (t, k).
 *          plan_scan: a work-item per column. plan_offsets: one group. plan_renorm: a work-item per
 *          token.
 * Limits: T*K <= 2^30; KEEP is the keep rule. With PAIR_GRID, for expert choice, the grid entries
 *         are the pairs themselves, and token_offsets says whose they are: KEEP_POSITION only.
 * Repeatability: integers only, no atomics; each counter is moved by one lane at a time.
 */
#include "router.clh"
#include "pairs.clh"
#include "state.clh"

/* The grid of (token, choice) and the order in which it is walked. */
typedef struct pair_walk {
    token_owner owner;
    __global const int *ids;
    __global const uint *order;
    uint tokens;
    int columns;
} pair_walk;

typedef struct walked_pair {
    long pair; /* -1: none */
    uint token;
    int expert; /* -1: takes no place and is no load */
} walked_pair;

static inline walked_pair walk(const pair_walk *w, uint i) {
    bool choice_major = (KEEP == KEEP_CHOICE_MAJOR) | (KEEP == KEEP_PRIORITY);
    uint entry = ((KEEP == KEEP_WEIGHT) | (KEEP == KEEP_RANDOM)) ? w->order[i] : i;
    uint row = choice_major ? w->tokens : (uint)w->owner.top_k;
    uint high = entry / row, low = entry - high * row;
    uint token = choice_major ? low : high;
    int k = (int)(choice_major ? high : low);
    if (KEEP == KEEP_PRIORITY)
        token = w->order[token];
    if (PAIR_GRID) {
        token = pair_owner(&w->owner, w->tokens, i);
        k = (int)i - w->owner.token_offsets[token];
    }
    walked_pair at = {owned_pair(&w->owner, token, k), token, -1};
    if (at.pair >= 0) {
        int id = w->ids[at.pair];
        at.expert = id >= 0 && id < w->columns ? id : -1;
    }
    return at;
}

/* The arguments that both walks share. */
#define WALK_ARGS                                                                                  \
    __global const int *ids, ulong ids_off, __global const int *live, ulong live_off,              \
        __global const uchar *token_mask, ulong token_mask_off,                                    \
        __global const int *token_offsets, ulong token_offsets_off, __global const uint *order,    \
        ulong order_off, __global uint *histogram, ulong histogram_off, uint tokens, int top_k,    \
        int columns, uint block_size, uint pairs

#define WALK_INIT                                                                                  \
    {{token_offsets ? token_offsets + token_offsets_off : 0, live ? live + live_off : 0,           \
      token_mask ? token_mask + token_mask_off : 0, top_k},                                        \
     ids + ids_off,                                                                                \
     order ? order + order_off : 0,                                                                \
     tokens,                                                                                       \
     columns}

/* Also clears what plan_scatter fills only in part. */
KERNEL(GROUP, 1, 1)
void plan_histogram(WALK_ARGS, __global int *slot_of, ulong slot_of_off, __global int *row_of,
                    ulong row_of_off, __global int *token_of, ulong token_of_off,
                    __global int *tile_expert, ulong tile_expert_off, uint slots, uint tiles) {
    __local int tmp[GROUP];
    pair_walk w = WALK_INIT;
    uint count = PAIR_GRID ? pairs : tokens * (uint)top_k;
    uint begin = get_group_id(0) * block_size, end = min(begin + block_size, count);
    histogram += histogram_off + (ulong)get_group_id(0) * columns;
    for (uint i = get_global_id(0); i < slots; i += get_global_size(0)) {
        row_of[row_of_off + i] = -1;
        token_of[token_of_off + i] = -1;
    }
    for (uint i = get_global_id(0); i < tiles; i += get_global_size(0))
        tile_expert[tile_expert_off + i] = -1;
    for (uint i = get_global_id(0); i < count; i += get_global_size(0))
        slot_of[slot_of_off + i] = SLOT_NONE;
    for (int e = get_local_id(0); e < columns; e += GROUP)
        histogram[e] = 0;
    barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint chunk = begin; chunk < end; chunk += GROUP) {
        uint i = chunk + get_local_id(0);
        int expert = i < end ? walk(&w, i).expert : -1;
        bool last;
        uint rank = group_rank(expert, &last, tmp);
        if (expert >= 0 && last)
            histogram[expert] += rank + 1;
        barrier(CLK_GLOBAL_MEM_FENCE);
    }
}

/* histogram: counts -> pairs of the same expert in earlier blocks. */
KERNEL(GROUP, 1, 1)
void plan_scan(__global uint *histogram, ulong histogram_off, __global uint *load, ulong load_off,
               __global uint *kept, ulong kept_off, __global const uint *state, ulong state_off,
               uint blocks, uint columns, uint experts, int dropless, uint capacity) {
    uint e = get_global_id(0), sum = 0;
    if (e >= columns)
        return;
    histogram += histogram_off;
    for (uint block = 0; block < blocks; block++) {
        ulong cell = (ulong)block * columns + e;
        uint size = histogram[cell];
        histogram[cell] = sum;
        sum += size;
    }
    capacity = effective_capacity(state_of(state, state_off), capacity);
    load[load_off + e] = sum;
    kept[kept_off + e] = dropless || e >= experts ? sum : min(sum, capacity);
}

static inline uint round_up(uint rows, uint tile) {
    return (rows + tile - 1) / tile * tile;
}

KERNEL(GROUP, 1, 1)
void plan_offsets(__global const uint *load, ulong load_off, __global uint *offsets,
                  ulong offsets_off, uint experts, int dropless, uint capacity, uint row_tile) {
    __local uint tmp[GROUP];
    uint each = (experts + GROUP - 1) / GROUP;
    uint begin = min(get_local_id(0) * each, (size_t)experts), end = min(begin + each, experts);
    uint rows = 0, all;
    load += load_off;
    offsets += offsets_off;
    for (uint e = begin; e < end; e++)
        rows += round_up(dropless ? load[e] : capacity, row_tile);
    uint offset = group_scan(rows, &all, tmp);
    for (uint e = begin; e < end; e++) {
        offsets[e] = offset;
        offset += round_up(dropless ? load[e] : capacity, row_tile);
    }
    if (get_local_id(0) == 0)
        offsets[experts] = all;
}

KERNEL(GROUP, 1, 1)
void plan_scatter(WALK_ARGS, __global const uint *kept, ulong kept_off,
                  __global const uint *offsets, ulong offsets_off, __global int *slot_of,
                  ulong slot_of_off, __global int *row_of, ulong row_of_off,
                  __global int *token_of, ulong token_of_off, __global int *tile_expert,
                  ulong tile_expert_off, int experts, uint row_tile) {
    __local int tmp[GROUP];
    pair_walk w = WALK_INIT;
    uint count = PAIR_GRID ? pairs : tokens * (uint)top_k;
    uint begin = get_group_id(0) * block_size, end = min(begin + block_size, count);
    histogram += histogram_off + (ulong)get_group_id(0) * columns;
    kept += kept_off;
    offsets += offsets_off;
    slot_of += slot_of_off;
    row_of += row_of_off;
    token_of += token_of_off;
    tile_expert += tile_expert_off;
    for (uint chunk = begin; chunk < end; chunk += GROUP) {
        uint i = chunk + get_local_id(0), place = 0;
        walked_pair at = {-1, 0, -1};
        if (i < end)
            at = walk(&w, i);
        bool last;
        uint rank = group_rank(at.expert, &last, tmp);
        if (at.expert >= experts) {
            place = histogram[at.expert] + rank;
            slot_of[at.pair] = SLOT_IDENTITY;
        } else if (at.expert >= 0) {
            place = histogram[at.expert] + rank;
            if (place < kept[at.expert]) {
                uint slot = offsets[at.expert] + place;
                slot_of[at.pair] = (int)slot;
                row_of[slot] = (int)at.pair;
                token_of[slot] = (int)at.token;
                uint tile = slot / row_tile;
                if (tile * row_tile == slot)
                    tile_expert[tile] = at.expert;
            }
        }
        barrier(CLK_GLOBAL_MEM_FENCE);
        if (at.expert >= 0 && last)
            histogram[at.expert] = place + 1;
        barrier(CLK_GLOBAL_MEM_FENCE);
    }
}

/* weights [T,K]: dropped pairs become 0, the others are renormalised among themselves and scaled. */
KERNEL(GROUP, 1, 1)
void plan_renorm(__global const int *ids, ulong ids_off, __global const int *slot_of,
                 ulong slot_of_off, __global const float *expert_scale, ulong expert_scale_off,
                 __global float *weights, ulong weights_off, uint tokens, router_switches r) {
    uint token = get_global_id(0);
    ulong pair = (ulong)token * r.top_k;
    if (token >= tokens)
        return;
    ids += ids_off + pair;
    slot_of += slot_of_off + pair;
    weights += weights_off + pair;
    for (int k = 0; k < r.top_k; k++)
        if (slot_of[k] == SLOT_NONE)
            weights[k] = 0.0f;
    renorm_and_scale(&r, expert_scale ? expert_scale + expert_scale_off : 0, ids, weights, r.top_k);
}
