/*
 * Purpose: overflow reroute: pairs that found no place go to another expert of their token's
 *          liking.
 * Formula: in rounds: a token with a dropped pair asks for its best expert by score (finite, ties
 *          to the lower id) that has room and is none of its ids; an expert takes in token order as
 *          many as it has room for; the pair takes the expert's id and its next slot. The rest ask
 *          again; a token that can ask nobody is done. At most R + K rounds: in each an expert
 *          becomes full or every token that asked is served.
 * Arrays: scores [T,E], live [T] or NULL, token_mask [T] or NULL, token_offsets [T+1] or NULL, the
 *          plan -> ids, pair_weights [pairs], kept, rerouted_in, rerouted_out [E], slot_of,
 *          pair_of, token_of, tile_expert, all in place; scratch: asked [T] (expert, -1: done),
 *          changed [T], waiting [T] and how many of it, waiting_count [1], wishes
 *          [T,REROUTE_WISHES+1] (the next experts to ask, and which is the next).
 *          chosen_ids, chosen_weights [pairs]: ids and pair_weights as they were.
 * NDRange: reroute_begin, reroute_ask, reroute_weights: a work-item per token. reroute_accept: a
 *          group per expert. reroute_finish: one group, `rounds` rounds or those that are left.
 * Limits: no identity experts.
 * Repeatability: integers; places follow from ordered counts. The one atomic only counts.
 */
#include "routing/router.clh"
#include "dispatch/pairs.clh"
#include "dispatch/reroute.clh"
#include "balance/state.clh"

#define DONE   (-1)

typedef struct rerouting {
    token_owner owner;
    __global const float *scores;
    __global int *ids;
    __global uint *kept;
    __global uint *rerouted_in;
    __global uint *rerouted_out;
    __global const uint *offsets;
    __global int *slot_of;
    __global int *pair_of;
    __global int *token_of;
    __global int *tile_expert;
    __global int *asked;
    __global int *changed;
    __global uint *waiting;
    __global int *wishes;
    uint tokens;
    int experts;
    uint capacity;
    uint row_tile;
} rerouting;

/* The arguments that the rounds share. */
#define REROUTE_ARGS                                                                               \
    IN(float, scores), IN(int, live), IN(uchar, token_mask), IN(int, token_offsets),               \
        OUT(int, ids), OUT(uint, kept), OUT(uint, rerouted_in), OUT(uint, rerouted_out),           \
        IN(uint, offsets), OUT(int, slot_of), OUT(int, pair_of), OUT(int, token_of),               \
        OUT(int, tile_expert), OUT(int, asked), OUT(int, changed), OUT(uint, waiting),             \
        OUT(int, wishes), IN(uint, state), uint tokens, int top_k, int experts, uint capacity,     \
        uint row_tile

#define REROUTE_INIT                                                                               \
    {OWNER_INIT(top_k, tokens * (uint)top_k, top_k),                                               \
     AT(scores),                                                                                   \
     AT(ids),                                                                                      \
     AT(kept),                                                                                     \
     AT(rerouted_in),                                                                              \
     AT(rerouted_out),                                                                             \
     AT(offsets),                                                                                  \
     AT(slot_of),                                                                                  \
     AT(pair_of),                                                                                  \
     AT(token_of),                                                                                 \
     AT(tile_expert),                                                                              \
     AT(asked),                                                                                    \
     AT(changed),                                                                                  \
     AT(waiting),                                                                                  \
     AT(wishes),                                                                                   \
     tokens,                                                                                       \
     experts,                                                                                      \
     effective_capacity(STATE_OF(state), capacity),                                                \
     row_tile}

/* The token's first pair without a place, -1: none. Ids out of range leave a token as it is. */
static inline long dropped_pair(const rerouting *r, uint token) {
    long dropped = -1;
    for (int k = r->owner.top_k - 1; k >= 0; k--) {
        long pair = owned_pair(&r->owner, token, k);
        if (pair >= 0 && (r->ids[pair] < 0 || r->ids[pair] >= r->experts))
            return -1;
        if (pair >= 0 && r->slot_of[pair] == SLOT_NONE)
            dropped = pair;
    }
    return dropped;
}

/* Whether an id of the token, surplus ones included, is e. */
static inline bool token_has(const rerouting *r, uint token, int e) {
    uint2 pairs = token_pairs(&r->owner, token);
    bool found = false;
    for (uint pair = pairs.x; pair < pairs.y; pair++)
        found = found || r->ids[pair] == e;
    return found;
}

static inline bool has_room(const rerouting *r, int e) {
    return r->kept[e] < r->capacity;
}

/* row [REROUTE_WISHES]: the token's best experts with room, best first; DONE behind the last. */
static inline void make_wishes(const rerouting *r, uint token, __global int *row) {
    __global const float *scores = r->scores + (ulong)token * r->experts;
    float best[REROUTE_WISHES];
    for (int i = 0; i < REROUTE_WISHES; i++) {
        best[i] = -INFINITY;
        row[i] = DONE;
    }
    for (int e = 0; e < r->experts; e++) {
        float score = scores[e];
        if (!(score > best[REROUTE_WISHES - 1]) || score == INFINITY || !has_room(r, e) ||
            token_has(r, token, e))
            continue;
        UNROLL for (int i = REROUTE_WISHES - 1; i >= 0; i--) {
            const bool moves = i > 0 && best[max(i - 1, 0)] < score, fits = best[i] < score;
            if (fits) {
                best[i] = moves ? best[max(i - 1, 0)] : score;
                row[i] = moves ? row[max(i - 1, 0)] : e;
            }
        }
    }
}

/*
 * Whom the token asks, DONE: nobody. Reads `kept` as the last round left it. Nobody is asked twice:
 * an expert takes the pair or is full from then on. So wishes last until all of them are full.
 */
static inline int expert_to_ask(const rerouting *r, uint token) {
    __global int *row = r->wishes + (ulong)token * (REROUTE_WISHES + 1);
    int next = row[REROUTE_WISHES];
    if (dropped_pair(r, token) < 0)
        return DONE;
    while (next < REROUTE_WISHES && row[next] != DONE && !has_room(r, row[next]))
        next++;
    if (next == REROUTE_WISHES) {
        make_wishes(r, token, row);
        next = 0;
    }
    row[REROUTE_WISHES] = next + 1;
    return row[next];
}

/* Before the first round. */
static inline void begin_token(const rerouting *r, uint token) {
    r->changed[token] = 0;
    r->wishes[(ulong)token * (REROUTE_WISHES + 1) + REROUTE_WISHES] = REROUTE_WISHES;
}

/*
 * Gives the token's first dropped pair place number `place` of the expert. There is none if
 * token_offsets gives it to two tokens and the other was first: then the token's first pair moves,
 * so that every row in use is a token's.
 */
static inline void settle(const rerouting *r, uint token, int expert, uint place) {
    long pair = dropped_pair(r, token);
    uint slot = r->offsets[expert] + place;
    uint tile = slot / r->row_tile;
    if (pair < 0)
        pair = token_pairs(&r->owner, token).x;
    atomic_inc(&r->rerouted_out[r->ids[pair]]);
    r->ids[pair] = expert;
    r->slot_of[pair] = (int)slot;
    r->pair_of[slot] = (int)pair;
    r->token_of[slot] = (int)token;
    if (tile * r->row_tile == slot)
        r->tile_expert[tile] = expert;
    r->changed[token] = 1;
}

/* Keeps the choice as it was. */
KERNEL(GROUP, 1, 1)
void reroute_begin(IN(int, ids), IN(float, pair_weights), IN(int, live), IN(uchar, token_mask),
                   IN(int, token_offsets), OUT(int, chosen_ids), OUT(float, chosen_weights),
                   uint tokens, int top_k) {
    token_owner owner = OWNER_INIT(top_k, tokens * (uint)top_k, top_k);
    uint token = get_global_id(0);
    if (token >= tokens)
        return;
    pair_range pairs = owned_pairs(&owner, token);
    for (uint pair = pairs.begin; pair < pairs.end; pair++) {
        AT(chosen_ids)[pair] = AT(ids)[pair];
        AT(chosen_weights)[pair] = AT(pair_weights)[pair];
    }
}

KERNEL(GROUP, 1, 1)
void reroute_ask(REROUTE_ARGS, int fresh) {
    rerouting r = REROUTE_INIT;
    uint token = get_global_id(0);
    if (token >= tokens)
        return;
    if (fresh)
        begin_token(&r, token);
    if (fresh || r.asked[token] != DONE)
        r.asked[token] = expert_to_ask(&r, token);
}

/* Each lane takes a range of tokens, so that places follow the order of tokens. */
KERNEL(GROUP, 1, 1)
void reroute_accept(REROUTE_ARGS) {
    __local uint tmp[GROUP];
    rerouting r = REROUTE_INIT;
    int expert = (int)get_group_id(0);
    uint each = divide_up(tokens, GROUP);
    uint begin = min((uint)get_local_id(0) * each, tokens), end = min(begin + each, tokens);
    uint mine = 0, all, before = READ_ONCE(__global uint, r.kept[expert]);
    for (uint token = begin; token < end; token++)
        mine += r.asked[token] == expert;
    uint place = before + group_scan(mine, &all, tmp);
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint token = begin; token < end && place < r.capacity; token++)
        if (r.asked[token] == expert)
            settle(&r, token, expert, place++);
    if (get_local_id(0) == 0) {
        uint after = min(before + all, r.capacity);
        r.kept[expert] = after;
        r.rerouted_in[expert] += after - before;
    }
}

/*
 * The tokens that wait, in order, are a list that each round shortens in place; a launch without
 * makes_list goes on with that of the launch before.
 */
KERNEL(GROUP, 1, 1)
void reroute_finish(REROUTE_ARGS, OUT(uint, waiting_count), int makes_list, int fresh,
                    uint rounds) {
    __local uint tmp[GROUP];
    __local int bins[GROUP];
    rerouting r = REROUTE_INIT;
    waiting_count = AT(waiting_count);
    uint lane = get_local_id(0), all;
    uint count = makes_list ? 0 : *waiting_count, listed = makes_list ? tokens : 0;
    for (uint chunk = 0; chunk < listed; chunk += GROUP) {
        uint token = chunk + lane, waits = 0;
        if (token < tokens) {
            if (fresh)
                begin_token(&r, token);
            waits = (fresh || r.asked[token] != DONE) && dropped_pair(&r, token) >= 0;
        }
        uint place = count + group_scan(waits, &all, tmp);
        if (waits)
            r.waiting[place] = token;
        count += all;
    }
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint round = 0; round < rounds && count > 0; round++) {
        for (uint i = lane; i < count; i += GROUP)
            r.asked[r.waiting[i]] = expert_to_ask(&r, r.waiting[i]);
        group_barrier(CLK_GLOBAL_MEM_FENCE);
        uint left = 0;
        for (uint chunk = 0; chunk < count; chunk += GROUP) {
            uint token = 0, place = 0;
            int expert = DONE;
            bool last;
            if (chunk + lane < count) {
                token = READ_ONCE(__global uint, r.waiting[chunk + lane]);
                expert = READ_ONCE(__global int, r.asked[token]);
            }
            uint rank = group_rank_of(expert, (int)min((uint)GROUP, count - chunk), &last, bins);
            if (expert != DONE)
                place = READ_ONCE(__global uint, r.kept[expert]) + rank;
            group_barrier(CLK_GLOBAL_MEM_FENCE);
            if (expert != DONE && place < r.capacity)
                settle(&r, token, expert, place);
            if (expert != DONE && last) {
                uint after = min(place + 1, r.capacity);
                r.rerouted_in[expert] += after - (place - rank);
                r.kept[expert] = after;
            }
            uint waits = expert != DONE && dropped_pair(&r, token) >= 0;
            uint to = left + group_scan(waits, &all, tmp);
            if (waits)
                r.waiting[to] = token;
            left += all;
            group_barrier(CLK_GLOBAL_MEM_FENCE);
        }
        count = left;
    }
    if (lane == 0)
        *waiting_count = count;
}

/* The weights of changed tokens, anew: those of topk.cl for the new choice. */
KERNEL(GROUP, 1, 1)
void reroute_weights(IN(float, scores), IN(int, live), IN(int, token_offsets),
                     IN(float, expert_scale), IN(int, ids), OUT(float, pair_weights),
                     IN(int, changed), uint tokens, router_switches r) {
    __global const uchar *token_mask = 0;
    const ulong token_mask_off = 0;
    token_owner owner = OWNER_INIT(r.top_k, tokens * (uint)r.top_k, r.top_k);
    uint token = get_global_id(0);
    if (token >= tokens || !AT(changed)[token])
        return;
    uint first = token_pairs(&owner, token).x;
    scores = AT(scores) + (ulong)token * r.columns;
    ids = AT(ids) + first;
    pair_weights = AT(pair_weights) + first;
    int count = 0;
    for (; count < r.top_k && owned_pair(&owner, token, count) >= 0; count++)
        pair_weights[count] = scores[ids[count]];
    token_weights(&r, scores, GIVEN(expert_scale), ids, pair_weights,
                  count);
}
