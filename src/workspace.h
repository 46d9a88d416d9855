/* ONE table of memory regions: what each step reads and writes, how large, and how long it lives.
 */
#ifndef CLMOE_WORKSPACE_H
#define CLMOE_WORKSPACE_H

#include "layer.h"

/* X: the storage type of x and y. */
typedef enum region_id {
    REGION_LOGITS,    /* [T,R] f32 */
    REGION_SCORES,    /* [T,R] f32 */
    REGION_IDS,       /* [T,K] i32 */
    REGION_WEIGHTS,   /* [T,K] f32 */
    REGION_LIVE,      /* [T] i32 */
    REGION_PLAN,      /* clmoe_plan_layout */
    REGION_HISTOGRAM, /* [blocks, R] or, while sorting, [blocks, 256] u32 */
    REGION_SEQUENCES, /* [sequences + 1, R] u32, with a capacity per sequence */
    REGION_SORT_KEYS, /* [T*K] u32, for the keep rules priority and weight; as the next three */
    REGION_SORT_KEYS_2,
    REGION_SORT_ORDER,
    REGION_SORT_ORDER_2,
    REGION_REBALANCE,     /* see rebalance.c, with weight rebalancing */
    REGION_REROUTE,       /* [REROUTE_WORDS,T] i32, with overflow reroute */
    REGION_XE,            /* [S,D] X, for engines that do not gather */
    REGION_HIDDEN,        /* [S,H] X */
    REGION_YE,            /* [S,D] X */
    REGION_ENGINE,        /* the engine's own */
    REGION_SHARED_HIDDEN, /* [T,Hs] X */
    REGION_SHARED_Y,      /* [T,D] X */
    REGION_SHARED_GATE,   /* [T] f32 */
    REGION_COUNT
} region_id;

/* Words per token that reroute.cl works with. */
enum { REROUTE_WORDS = 19 };

/* Byte offsets of all regions, in saved or scratch. */
typedef struct workspace_layout {
    size_t offset[REGION_COUNT];
    size_t bytes[REGION_COUNT];
    bool saved[REGION_COUNT];
    size_t saved_bytes, scratch_bytes;
    clmoe_plan_layout plan;
} workspace_layout;

/* Errors: CLMOE_UNSUPPORTED when a size does not fit size_t or the plan's 31 bits. */
clmoe_status workspace_layout_get(const clmoe_layer *layer, uint32_t tokens,
                                  workspace_layout *layout);

/* The place of a region; {NULL, 0} for an empty one. */
clmoe_buf workspace_region(const workspace_layout *layout, region_id id, clmoe_buf saved,
                           clmoe_buf scratch);

/* How the plan and the sort cut `count` entries into blocks, one group each. */
typedef struct block_split {
    uint32_t size, count;
} block_split;

block_split workspace_blocks(const clmoe_context *context, uint32_t count);

/* The blocks of the plan's walk, and how many of them each sequence has; none spans two. */
typedef struct walk_split {
    block_split blocks;
    uint32_t sequence_blocks;
} walk_split;

walk_split workspace_walk(const clmoe_layer *layer, uint32_t tokens);

/* The place of an array of the plan. */
static inline clmoe_buf plan_array(clmoe_buf plan, size_t byte_offset) {
    return (clmoe_buf){plan.mem, plan.offset + byte_offset};
}

#endif
