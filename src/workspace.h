/* The regions of device memory that steps share, and how a batch is cut into blocks. */
#ifndef CLMOE_WORKSPACE_H
#define CLMOE_WORKSPACE_H

#include "balance/balance.clh"
#include "dispatch/reroute.clh"
#include "layer.h"

/* X: the storage type of x and y. */
typedef enum region_id {
    REGION_LOGITS,            /* [T,R] f32 */
    REGION_SCORES,            /* [T,R] f32 */
    REGION_NOISY,             /* [T,R] f32, for noisy layers */
    REGION_NOISE_RAW,         /* [T,R] f32: x Wn^T, with learned noise */
    REGION_DROPOUT,           /* [2,R] f32, with expert dropout: draws, then 1 where masked */
    REGION_JITTERED,          /* [T,D] X, with noise.jitter */
    REGION_IDS,               /* [pairs] i32 */
    REGION_WEIGHTS,           /* [pairs] f32 */
    REGION_LIVE,              /* [T] i32 */
    REGION_TOKEN_OFFSETS,     /* [T+1] i32, where layer_lists_pairs(); as the next two */
    REGION_CHOICE_THRESHOLDS, /* [R,2] u32 */
    REGION_CHOICE_KEYS,       /* [R,T] u32 */
    REGION_ROUNDING_IDS,     /* [T*K] i32, with token rounding: what top-k chose; as the next two */
    REGION_ROUNDING_WEIGHTS, /* [T*K] f32 */
    REGION_ROUNDING_CHOSEN,  /* [R,T/32] u32 */
    REGION_TOPS,             /* [T,2] f32, with Sinkhorn or Soft MoE */
    REGION_SINKHORN_CHOICES, /* [T,R] f32, with Sinkhorn; as the next two */
    REGION_SINKHORN_D1,      /* [blocks,R+2] f32 */
    REGION_SINKHORN_PARTIALS, /* [2,blocks,R] f32 */
    REGION_SOFT_MOE_X,        /* [T,D] X, with Soft MoE; as the next seven; N = E p */
    REGION_TOKEN_NORMS,       /* [T] f32 */
    REGION_SLOT_NORMS,        /* [N] f32 */
    REGION_SOFT_MOE_PARTIALS, /* [blocks,N,2] f32 */
    REGION_SOFT_MOE_COLUMNS,  /* [N,2] f32 */
    REGION_SOFT_MOE_DISPATCH, /* [S,T] f32 */
    REGION_SOFT_MOE_COMBINE,  /* [T,S] f32 */
    REGION_MIXED,             /* [T,D] X */
    REGION_GROUP_LOGITS,      /* [T,groups.count] f32, with two levels */
    REGION_PLAN,              /* clmoe_plan_layout */
    REGION_HISTOGRAM,         /* [blocks, R] or, while sorting, [blocks, 256] u32 */
    REGION_SEQUENCES,         /* [sequences + 1, R] u32, with a capacity per sequence */
    REGION_SORT_KEYS,         /* [T*K] u32, where layer_sorts(); as the next three */
    REGION_SORT_KEYS_2,
    REGION_SORT_ORDER,
    REGION_SORT_ORDER_2,
    REGION_REBALANCE,      /* see rebalance.c, with weight rebalancing */
    REGION_REROUTE,        /* [REROUTE_WORDS,T] i32, with overflow reroute */
    REGION_REROUTE_COUNT,  /* [1] u32, likewise */
    REGION_XE,             /* [S,D] X, for engines that do not gather */
    REGION_HIDDEN,         /* [S,H] X */
    REGION_Z,              /* [min(S,pairs),H or 2H] X, in training; [S,..] with Soft MoE */
    REGION_YE,             /* [S,D] X */
    REGION_ENGINE,         /* the engine's own */
    REGION_SHARED_HIDDEN,  /* [T,Hs] X */
    REGION_SHARED_Z,       /* [T,Hs or 2Hs] X, in training */
    REGION_SHARED_Y,       /* [T,D] X */
    REGION_SHARED_GATE,    /* [T] f32 */
    REGION_SUMS_ROWS,      /* [T] token_row of balance.clh; this and the next, of sums.cl */
    REGION_SUMS_PARTIAL,   /* [blocks] records */
    REGION_SUMS,           /* [Q + 1] records: sequences, batch */
    REGION_LOSS_GRADS,     /* [GRAD_SOURCES, Q, R] f32 */
    REGION_LOSS_VALUES,    /* [MAX_LOSSES, Q] f32 */
    REGION_LOSS_PARTS,     /* [MAX_LOSSES, Q, R] f32: the gradient's starts by loss */
    REGION_JOINT,          /* [T,R] f32, with two levels; as the next */
    REGION_JOINT_GRADIENT, /* [T,R] f32 */
    /* Of the backward pass. */
    REGION_X_ROWS,        /* [S,D] X: x of slots, where the gradient cannot gather or has weights */
    REGION_DY_ROWS,       /* [S,D] X: dy of slots, for engines that do not gather */
    REGION_DH,            /* [S,H] X: the gradient on the activation, then w times the activation */
    REGION_DZ,            /* [S,H or 2H] X */
    REGION_DOTS,          /* [S] f32: of a row, gradient on the activation times activation */
    REGION_DXE,           /* [S,D] X */
    REGION_SHARED_DH,     /* [T,Hs] X; as the next three, with a shared expert */
    REGION_SHARED_DZ,     /* [T,Hs or 2Hs] X */
    REGION_SHARED_DOTS,   /* [T] f32 */
    REGION_SHARED_DX,     /* [T,D] X */
    REGION_DGATE,         /* [T] f32: on the shared gate before its sigmoid */
    REGION_DPAIR_WEIGHTS, /* [pairs] f32 */
    REGION_DSCALE,        /* [pairs] f32, with expert_scale */
    REGION_DLOGITS,       /* [T,R] f32 */
    REGION_DNOISE,        /* [T,R] f32, with learned noise */
    REGION_DGROUP_LOGITS, /* [T,groups.count] f32, with two levels */
    REGION_RAW_WEIGHTS,   /* [pairs] f32 */
    REGION_DJOINT,        /* [T,R] f32, with two levels */
    REGION_REBALANCE_BACK, /* see rebalance.c, with weight rebalancing */
    REGION_SOFT_MOE_DY,    /* [T,D] X, with Soft MoE; as the next four */
    REGION_DCOMBINE,       /* [T,S] f32 */
    REGION_DDISPATCH,      /* [T,S] f32 */
    REGION_SOFT_MOE_ALONG, /* [T] f32 */
    REGION_SOFT_MOE_SUMS,  /* [N] f32 */
    REGION_ROUTER_DX,      /* [T,D] X */
    REGION_UNMASKED,       /* [T+3] i32: see unmasked.c */
    REGION_GRADIENT,       /* the gradient engines' own */
    /* Of router orthogonality, f32; N rows of the router. */
    REGION_ROUTER_NORMS,   /* [N] */
    REGION_ROUTER_UNITS,   /* [N,D]: rows of norm 1 */
    REGION_COSINES,        /* [N,N], 0 on the diagonal */
    REGION_COSINE_SQUARES, /* [N]: their sums of squares */
    REGION_COSINE_ROWS,    /* [N,D]: cosines times units */
    REGION_COUNT
} region_id;

/* Byte offsets of all regions, in saved or scratch. */
typedef struct workspace_layout {
    size_t offset[REGION_COUNT];
    size_t bytes[REGION_COUNT];
    bool saved[REGION_COUNT];
    size_t
        scratch_offset[REGION_COUNT]; /* of a saved one, for single steps, which have no `saved` */
    size_t saved_bytes, scratch_bytes;
    clmoe_plan_layout plan;
} workspace_layout;

/* Errors: CLMOE_UNSUPPORTED when a size does not fit size_t or the plan's 31 bits. */
clmoe_status workspace_layout_get(const clmoe_layer *layer, uint32_t tokens,
                                  workspace_layout *layout);

/*
 * The same with sizes that serve a batch of `tokens` and every smaller one: bytes and plan.slots;
 * nothing lies at its offsets.
 */
clmoe_status workspace_most(const clmoe_layer *layer, uint32_t tokens, workspace_layout *layout);

/* The place of a region; {NULL, 0} for an empty one. */
clmoe_buf workspace_region(const workspace_layout *layout, region_id id, clmoe_buf saved,
                           clmoe_buf scratch);

/* With token rounding: what the pairs of an expert of a batch are a multiple of. */
uint32_t workspace_multiple(const clmoe_layer *layer, uint32_t tokens);

/* How the plan and the sort cut `count` entries into blocks, one group each. */
typedef struct block_split {
    uint32_t size, count;
} block_split;

block_split workspace_blocks(uint32_t group, uint32_t count);

/*
 * How the balance pass cuts the batch: in the sequences of the descriptor, whether a loss looks at
 * them or not, so that no value depends on what else is asked for.
 */
sums_shape workspace_sums(const clmoe_layer *layer, uint32_t tokens, uint32_t asked);

/* How Sinkhorn's and Soft MoE's sums over tokens are cut into blocks. */
block_split workspace_token_blocks(uint32_t group, uint32_t tokens);

/* The blocks of the plan's walk, and how many of them each sequence has; none spans two. */
typedef struct walk_split {
    block_split blocks;
    uint32_t sequence_blocks;
} walk_split;

walk_split workspace_walk(const clmoe_layer *layer, uint32_t tokens);

/* The place `bytes` behind another: an array of the plan, or of a region. */
static inline clmoe_buf buf_at(clmoe_buf buf, size_t bytes) {
    return (clmoe_buf){buf.mem, buf.offset + bytes};
}

#endif
