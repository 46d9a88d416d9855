/*
 * Purpose: the routing plan: a row in a bucket for every pair, by a stable counting sort.
 * Formula: the pairs are walked in keep order; the rank of a pair among its expert's pairs decides:
 *          rank < capacity keeps the slot offsets[e] + rank, the others have no place. With
 *          sequences the walk, the ranks and the capacity are those of each sequence, and the rows
 *          of an expert come sequence by sequence. A state scales the capacity, not the buckets.
 * Arrays: ids [pairs], live [T] or NULL, token_mask [T] or NULL, token_offsets [T+1] or NULL, order
 *          [T] or [T*K] by the keep rule -> load [R], kept [R], offsets [E+1], slot_of [pairs],
 *          pair_of [S], token_of [S], tile_expert [S/row_tile], rerouted_in, rerouted_out [R] (0);
 *          histogram [blocks, R], sequence_base [sequences + 1, R] u32.
 *          plan_replicate: ids [pairs], slot_of [pairs], offsets [E+1], copies [E],
 *          logical_to_physical [E, max_copies] -> physical_ids [pairs].
 * NDRange: plan_histogram, plan_scatter: a group per block of block_size grid entries (t, k).
 *          plan_scan, plan_scan_sequences: a group per column. plan_offsets, plan_few: one
 *          group. plan_renorm: a work-item per token. plan_replicate: a work-item per pair.
 * Limits: T*K <= 2^30; KEEP_RULE is a KEEP_. With PAIR_GRID, for expert choice, the grid entries
 *          are the pairs themselves, and token_offsets says whose they are: KEEP_POSITION only, no
 *          SEQUENCES.
 * Repeatability: integers only, no atomics; each counter is moved by one lane at a time.
 */
#include "dispatch/plan.clh"

/* The arguments that both walks share. */
#define WALK_ARGS                                                                                  \
    IN(int, ids), IN(int, live), IN(uchar, token_mask), IN(int, token_offsets), IN(uint, order),   \
        OUT(uint, histogram), uint tokens, int top_k, int columns, uint block_size, uint pairs,    \
        uint sequence_tokens, uint sequence_blocks

typedef struct walk_block {
    uint sequence, begin, end; /* entries */
} walk_block;

/* The entries of this group's block, and the block's sequence in the walk. */
static inline walk_block block_of(pair_walk *w, uint count, uint block_size, uint sequence_tokens,
                                  uint sequence_blocks) {
    uint block = get_group_id(0), top_k = (uint)w->owner.top_k, end = count;
    walk_block of = {0, block * block_size, 0};
    if (SEQUENCES) {
        of.sequence = block / sequence_blocks;
        w->first = of.sequence * sequence_tokens;
        w->tokens = min(sequence_tokens, w->tokens - w->first);
        of.begin = w->first * top_k + (block - of.sequence * sequence_blocks) * block_size;
        end = (w->first + w->tokens) * top_k;
    }
    of.end = min(of.begin + block_size, end);
    return of;
}

/* Also clears what plan_scatter fills only in part, and what reroute.cl counts. */
KERNEL(GROUP, 1, 1)
void plan_histogram(WALK_ARGS, OUT(int, slot_of), OUT(int, pair_of), OUT(int, token_of),
                    OUT(int, tile_expert), OUT(uint, rerouted_in), OUT(uint, rerouted_out),
                    uint slots, uint tiles) {
    __local int tmp[GROUP];
    pair_walk w = WALK_INIT;
    uint count = PAIR_GRID ? pairs : tokens * (uint)top_k;
    walk_block block = block_of(&w, count, block_size, sequence_tokens, sequence_blocks);
    histogram = AT(histogram) + (ulong)get_group_id(0) * columns;
    for (uint i = get_global_id(0); i < slots; i += get_global_size(0)) {
        AT(pair_of)[i] = -1;
        AT(token_of)[i] = -1;
    }
    for (uint i = get_global_id(0); i < tiles; i += get_global_size(0))
        AT(tile_expert)[i] = -1;
    for (uint i = get_global_id(0); i < count; i += get_global_size(0))
        AT(slot_of)[i] = SLOT_NONE;
    for (uint e = get_global_id(0); e < (uint)columns; e += get_global_size(0)) {
        AT(rerouted_in)[e] = 0;
        AT(rerouted_out)[e] = 0;
    }
    for (int e = get_local_id(0); e < columns; e += GROUP)
        histogram[e] = 0;
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint chunk = block.begin; chunk < block.end; chunk += GROUP) {
        uint i = chunk + get_local_id(0);
        int expert = i < block.end ? walk(&w, i).expert : -1;
        bool last;
        uint rank = group_rank(expert, &last, tmp);
        if (expert >= 0 && last)
            histogram[expert] += rank + 1;
        group_barrier(CLK_GLOBAL_MEM_FENCE);
    }
}

/* histogram: counts -> pairs of the same expert in earlier blocks. */
KERNEL(GROUP, 1, 1)
void plan_scan(OUT(uint, histogram), OUT(uint, load), OUT(uint, kept), IN(uint, state), uint blocks,
               uint columns, uint experts, int dropless, uint capacity) {
    uint e = get_group_id(0), each = divide_up(blocks, GROUP), sum = 0;
    uint begin = min((uint)get_local_id(0) * each, blocks), end = min(begin + each, blocks);
    histogram = AT(histogram) + e;
#if GROUP > 1
    __local uint tmp[GROUP];
    uint mine = 0, all;
    for (uint block = begin; block < end; block++)
        mine += histogram[(ulong)block * columns];
    sum = group_scan(mine, &all, tmp);
#endif
    for (uint block = begin; block < end; block++) {
        uint size = histogram[(ulong)block * columns];
        histogram[(ulong)block * columns] = sum;
        sum += size;
    }
    capacity = effective_capacity(STATE_OF(state), capacity);
    if (get_local_id(0) == GROUP - 1) {
        AT(load)[e] = sum;
        AT(kept)[e] = dropless || e >= experts ? sum : min(sum, capacity);
    }
}

/*
 * The same with `capacity` places in each sequence: histogram gets the pairs of the same expert in
 * earlier blocks of the same sequence, sequence_base [sequences + 1, R] the rows kept in earlier
 * sequences. Each lane takes a range of sequences.
 */
KERNEL(GROUP, 1, 1)
void plan_scan_sequences(OUT(uint, histogram), OUT(uint, load), OUT(uint, kept),
                         OUT(uint, sequence_base), IN(uint, state), uint sequences,
                         uint sequence_blocks, uint columns, uint experts, uint capacity) {
    __local uint tmp[GROUP];
    uint e = get_group_id(0), each = divide_up(sequences, GROUP);
    uint begin = min((uint)get_local_id(0) * each, sequences), end = min(begin + each, sequences);
    uint pairs = 0, rows = 0, all_pairs, all_rows, room = UINT_MAX;
    if (e < experts)
        room = effective_capacity(STATE_OF(state), capacity);
    histogram = AT(histogram) + e;
    sequence_base = AT(sequence_base) + e;
    for (uint sequence = begin; sequence < end; sequence++) {
        uint sum = 0;
        for (uint b = 0; b < sequence_blocks; b++) {
            ulong cell = ((ulong)sequence * sequence_blocks + b) * columns;
            uint size = histogram[cell];
            histogram[cell] = sum;
            sum += size;
        }
        sequence_base[(ulong)sequence * columns] = rows;
        pairs += sum;
        rows += min(sum, room);
    }
    uint base = group_scan(rows, &all_rows, tmp);
    group_scan(pairs, &all_pairs, tmp);
    for (uint sequence = begin; sequence < end; sequence++)
        sequence_base[(ulong)sequence * columns] += base;
    if (get_local_id(0) == 0) {
        sequence_base[(ulong)sequences * columns] = all_rows;
        AT(load)[e] = all_pairs;
        AT(kept)[e] = all_rows;
    }
}

KERNEL(GROUP, 1, 1)
void plan_offsets(IN(uint, load), OUT(uint, offsets), uint experts, int dropless, uint capacity,
                  uint row_tile) {
    __local uint tmp[GROUP];
    uint each = divide_up(experts, GROUP);
    uint begin = min(get_local_id(0) * each, (size_t)experts), end = min(begin + each, experts);
    uint rows = 0, all;
    load = AT(load);
    offsets = AT(offsets);
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
void plan_scatter(WALK_ARGS, IN(uint, kept), IN(uint, offsets), IN(uint, sequence_base),
                  OUT(int, slot_of), OUT(int, pair_of), OUT(int, token_of), OUT(int, tile_expert),
                  int experts, uint row_tile) {
    __local int tmp[GROUP];
    pair_walk w = WALK_INIT;
    uint count = PAIR_GRID ? pairs : tokens * (uint)top_k;
    walk_block block = block_of(&w, count, block_size, sequence_tokens, sequence_blocks);
    histogram = AT(histogram) + (ulong)get_group_id(0) * columns;
    kept = AT(kept);
    offsets = AT(offsets);
    __global const uint *bases =
        AT(sequence_base) + (ulong)block.sequence * columns;
    slot_of = AT(slot_of);
    pair_of = AT(pair_of);
    token_of = AT(token_of);
    tile_expert = AT(tile_expert);
    for (uint chunk = block.begin; chunk < block.end; chunk += GROUP) {
        uint i = chunk + get_local_id(0), place = 0;
        walked_pair at = {-1, 0, -1};
        if (i < block.end)
            at = walk(&w, i);
        bool last;
        uint rank = group_rank(at.expert, &last, tmp);
        if (at.expert >= experts) {
            place = histogram[at.expert] + rank;
            slot_of[at.pair] = SLOT_IDENTITY;
        } else if (at.expert >= 0) {
            place = histogram[at.expert] + rank;
            uint base = SEQUENCES ? bases[at.expert] : 0;
            uint room = SEQUENCES ? bases[columns + at.expert] - base : kept[at.expert];
            if (place < room) {
                uint slot = offsets[at.expert] + base + place;
                slot_of[at.pair] = (int)slot;
                pair_of[slot] = (int)at.pair;
                token_of[slot] = (int)at.token;
                uint tile = slot / row_tile;
                if (tile * row_tile == slot)
                    tile_expert[tile] = at.expert;
            }
        }
        group_barrier(CLK_GLOBAL_MEM_FENCE);
        if (at.expert >= 0 && last)
            histogram[at.expert] = place + 1;
        group_barrier(CLK_GLOBAL_MEM_FENCE);
    }
}

/* All of it by one group, without SEQUENCES. */
KERNEL(GROUP, 1, 1)
void plan_few(IN(int, ids), IN(int, live), IN(uchar, token_mask), IN(int, token_offsets),
              IN(uint, order), IN(uint, state), PLAN_ARRAYS, uint tokens, int top_k, int columns,
              uint pairs, int experts, int dropless, uint capacity, uint bucket, uint slots,
              uint row_tile) {
    __local uint counts[FEW_COLUMNS], places[FEW_PAIRS], tmp[GROUP];
    const pair_walk w = WALK_INIT;
    const plan_arrays to = PLAN_ARRAYS_INIT;
    const uint room = effective_capacity(STATE_OF(state), capacity);
    const plan_sizes s = {columns, experts, dropless, dropless ? UINT_MAX : room,
                          bucket,  slots,   row_tile};
    plan_in_group(&w, PAIR_GRID ? pairs : tokens * (uint)top_k, &to, &s, counts, places, tmp);
}

/* pair_weights [T,K]: dropped pairs become 0, the rest are renormalised among them and scaled. */
KERNEL(GROUP, 1, 1)
void plan_renorm(IN(int, ids), IN(int, slot_of), IN(float, expert_scale), OUT(float, pair_weights),
                 uint tokens, router_switches r) {
    uint token = get_global_id(0);
    ulong pair = (ulong)token * r.top_k;
    if (token >= tokens)
        return;
    ids = AT(ids) + pair;
    slot_of = AT(slot_of) + pair;
    pair_weights = AT(pair_weights) + pair;
    for (int k = 0; k < r.top_k; k++)
        if (slot_of[k] == SLOT_NONE)
            pair_weights[k] = 0.0f;
    renorm_and_scale(&r, GIVEN(expert_scale), ids, pair_weights, r.top_k);
}

/* A pair of expert e goes to the copy of its row in the bucket, modulo the copies: place.h. */
KERNEL(GROUP, 1, 1)
void plan_replicate(IN(int, ids), IN(int, slot_of), IN(uint, offsets), IN(int, copies),
                    IN(int, logical_to_physical), OUT(int, physical_ids), uint pairs, int experts,
                    int columns, int max_copies, int replicas) {
    uint pair = get_global_id(0);
    if (pair >= pairs)
        return;
    int slot = AT(slot_of)[pair], to = -1;
    int id = slot == SLOT_NONE ? -1 : AT(ids)[pair]; /* of a real pair: the others may be unset */
    if (id >= experts && id < columns) {
        to = replicas + (id - experts);
    } else if (id >= 0 && id < experts && slot >= 0) {
        int count = min(AT(copies)[id], max_copies);
        uint row = (uint)slot - AT(offsets)[id];
        if (count > 0)
            to = AT(logical_to_physical)[(ulong)id * max_copies + row % (uint)count];
        to = to < replicas ? max(to, -1) : -1;
    }
    AT(physical_ids)[pair] = to;
}
