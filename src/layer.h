/* An immutable layer: the checked descriptor, derived sizes, the engine, compiled kernels. */
#ifndef CLMOE_LAYER_H
#define CLMOE_LAYER_H

#include "balance/balance.clh"
#include "balance/state.clh"
#include "experts/gemm/mlp.h"
#include "routing/router.clh"
#include "runtime/launch.h"

/* That a number of the API is that of a .clh. */
#define SAME_NUMBER(name)                                                                          \
    _Static_assert((int)CLMOE_##name == (int)name, #name " has another number")

/* Every kernel but the engines', by index; the step's file creates it. */
typedef enum kernel_id {
    KERNEL_SCORE,
    KERNEL_JITTER,
    KERNEL_NOISE_EXPERTS,
    KERNEL_NOISE,
    KERNEL_TOPK,
    KERNEL_FEW,
    KERNEL_POLICY, /* those of the layer's policy, named in its file */
    KERNEL_POLICY_LAST = KERNEL_POLICY + 14,
    KERNEL_SELECT_COUNTS, /* of policies that list pairs by expert */
    KERNEL_SELECT_OFFSETS,
    KERNEL_SORT_KEYS,
    KERNEL_SORT_HISTOGRAM,
    KERNEL_SORT_SCAN,
    KERNEL_SORT_SCATTER,
    KERNEL_SORT_SEQUENCES,
    KERNEL_PLAN_HISTOGRAM,
    KERNEL_PLAN_SCAN,
    KERNEL_PLAN_SCAN_SEQUENCES,
    KERNEL_PLAN_OFFSETS,
    KERNEL_PLAN_SCATTER,
    KERNEL_PLAN_FEW,
    KERNEL_PLAN_RENORM,
    KERNEL_PLAN_REPLICATE,
    KERNEL_REBALANCE_BEGIN,
    KERNEL_REBALANCE_COLUMNS,
    KERNEL_REBALANCE_TARGET,
    KERNEL_REBALANCE_ROWS,
    KERNEL_REBALANCE_BACK_ROWS,
    KERNEL_REBALANCE_BACK_END,
    KERNEL_REROUTE_BEGIN,
    KERNEL_REROUTE_ASK,
    KERNEL_REROUTE_ACCEPT,
    KERNEL_REROUTE_FINISH,
    KERNEL_REROUTE_WEIGHTS,
    KERNEL_WEIGHTS_BACKWARD,
    KERNEL_EXPERT_SCALE_BACKWARD,
    KERNEL_CHOSEN_WEIGHTS,
    KERNEL_DISPATCH,
    KERNEL_WEIGHTED_ROWS,
    KERNEL_NORMALIZE,
    KERNEL_OUTPUT_BACKWARD,
    KERNEL_HIDDEN_DROPOUT,
    KERNEL_ACTIVATION_BACKWARD,
    KERNEL_DROPOUT_ACTIVATION_BACKWARD,
    KERNEL_SHARED_ACTIVATION_BACKWARD,
    KERNEL_SHARED_DROPOUT_ACTIVATION_BACKWARD,
    KERNEL_SHARED_GATE_BACKWARD,
    KERNEL_UNMASKED,
    KERNEL_BIAS_GRADIENT,        /* of rows of X */
    KERNEL_ROUTER_BIAS_GRADIENT, /* of rows of f32 */
    KERNEL_PACK_HEADER,
    KERNEL_COMBINE,
    KERNEL_COMBINE_BACKWARD,
    KERNEL_SUMS_ROWS,
    KERNEL_SUMS_BLOCKS,
    KERNEL_SUMS_REDUCE,
    KERNEL_STATS,
    KERNEL_LOSS_VALUES,
    KERNEL_LOSS_GATHER,
    KERNEL_LOSS_GRADIENT,
    KERNEL_LOSS_WEIGHTS,
    KERNEL_JOINT_ROWS,
    KERNEL_JOINT_GRADIENT,
    KERNEL_ORTHOGONALITY_UNITS,
    KERNEL_ORTHOGONALITY_COSINES,
    KERNEL_ORTHOGONALITY_VALUE,
    KERNEL_ORTHOGONALITY_GRADIENT,
    KERNEL_STATE_INIT,
    KERNEL_CONTROL,
    KERNEL_CONTROL_START,
    KERNEL_CUTOFF,
    KERNEL_BIAS_COUNTS,
    KERNEL_BIAS_QUANTILE,
    KERNEL_COUNT
} kernel_id;

/* Creates a step's kernels where the switches need them; in the step's file. */
typedef clmoe_status step_constructor(clmoe_layer *layer);
step_constructor score_create, few_create, noise_create, topk_create, rebalance_create, sort_create,
    plan_create, reroute_create, dispatch_create, normalize_create, pack_create, combine_create,
    dropout_create, weights_create, activation_create, bias_create, shared_create, unmasked_create,
    sums_create, stats_create, loss_create, joint_create, orthogonality_create, state_create,
    control_create, quantile_create, cutoff_create;

struct batch; /* batch.h */

/* Who chooses whom, in src/routing/NAME.c. */
typedef struct routing_policy {
    step_constructor *create;
    /* scores -> ids, pair_weights, live; none of Soft MoE, which does not choose. */
    clmoe_status (*step)(const struct batch *b, launch *chain);
    /* dpair_weights -> dlogits_out; NULL: weights are of scores over the row or the chosen. */
    clmoe_status (*backward)(const struct batch *b, launch *chain);
    /* The weights of the choice again, before they were rebalanced; NULL likewise. */
    clmoe_status (*weights)(const struct batch *b, launch *chain, clmoe_buf to);
    bool by_logit;   /* scores are l, after softcap and temperature: it makes its own of them */
    bool best_first; /* the pairs of a token */
} routing_policy;

/* By clmoe_policy. Two levels and token rounding are policies in the place of token choice. */
#define POLICY_LIST(X)                                                                             \
    X(TOKEN_CHOICE, token_choice)                                                                  \
    X(EXPERT_CHOICE, expert_choice)                                                                \
    X(SINKHORN, sinkhorn)                                                                          \
    X(ALL_EXPERTS, all_experts)                                                                    \
    X(SOFT_MOE, soft_moe)

#define POLICY_DECLARE(NAME, name) extern const routing_policy name##_policy;
POLICY_LIST(POLICY_DECLARE)
extern const routing_policy two_level_policy, token_rounding_policy;

struct clmoe_layer {
    clmoe_context *context;
    clmoe_layer_desc desc; /* desc.engine is NULL here; see experts.engine */
    uint32_t columns;      /* R = E + Z */
    const routing_policy *policy;
    router_switches router;
    uint32_t group;         /* work-items per group of the routing kernels: 1, or a power of two */
    uint32_t score_group;   /* work-items per token in score.cl */
    uint32_t topk_tokens;   /* tokens per group in topk.cl */
    uint32_t cutoff_tokens; /* the same of its cutoffs */
    uint32_t combine_segment; /* columns per group in combine.cl */
    uint32_t balance_group;   /* work-items per group in sums.cl, stats.cl and loss_*.cl */
    gemm_use experts, shared;
    gemm_use dense; /* router and shared gate: by device, so that ids do not depend on the engine */
    gemm_use mix;   /* of Soft MoE: f32 weights times rows of x or ye, by device */
    /* In training, by device too but for the first: */
    gemm_gradient_use mlp_gradient;    /* of the experts' matrices */
    gemm_gradient_use shared_gradient; /* of the shared expert's; gathers */
    gemm_gradient_use dense_gradient; /* of routers and of shared_gate, from rows of f32 and of X */
    gemm_use dense_back;              /* rows of f32 times those -> rows of X */
    gemm_use products;                /* of Soft MoE: rows of X times rows of X -> f32 */
    /* Of router orthogonality, f32: rows times rows, and [R,R] times rows. */
    gemm_use cosines, cosine_rows;
    cl_kernel kernels[KERNEL_COUNT]; /* NULL where the switches do not need one */
};

/* Where the router's weights multiply in the experts' first GEMM, if there. */
gemm_row_weight layer_row_weight(const clmoe_layer_desc *desc);

/* A kernel's place and its name. */
typedef struct kernel_entry {
    int id; /* kernel_id */
    const char *name;
} kernel_entry;

/* Creates `count` kernels of cl/STEP.cl, with the options of program_kernel(). */
clmoe_status layer_kernels(clmoe_layer *layer, const char *step, const char *options,
                           const kernel_entry *kernels, size_t count);

/* The same with the routing group size alone: GROUP_KERNELS(layer, "routing/all_experts", kernels).
 */
clmoe_status layer_group_kernels(clmoe_layer *layer, const char *step, const kernel_entry *kernels,
                                 size_t count);
#define GROUP_KERNELS(layer, step, kernels)                                                        \
    layer_group_kernels((layer), (step), (kernels), sizeof(kernels) / sizeof((kernels)[0]))

/* One of cl/STEP.cl, with the routing group size and the type of x. */
clmoe_status layer_kernel(clmoe_layer *layer, kernel_id id, const char *step, const char *name);

/* One of the layer's MLPs; its hidden_dim is 0 if the layer has none. */
static inline const clmoe_mlp_desc *layer_mlp(const clmoe_layer *layer, clmoe_mlp mlp) {
    return mlp == CLMOE_MLP_SHARED ? &layer->desc.shared : &layer->desc.experts;
}

static inline const gemm_use *layer_mlp_use(const clmoe_layer *layer, clmoe_mlp mlp) {
    return mlp == CLMOE_MLP_SHARED ? &layer->shared : &layer->experts;
}

/* C for a batch of T tokens, or for each of its sequences; only for layers with a capacity. */
uint32_t layer_capacity(const clmoe_layer *layer, uint32_t tokens);

static inline bool layer_is_dropless(const clmoe_layer *layer) {
    return layer->desc.capacity.rows == 0 && layer->desc.capacity.factor == 0;
}

/* Whether each sequence of the batch has a capacity of its own. */
static inline bool layer_has_sequences(const clmoe_layer *layer) {
    return !layer_is_dropless(layer) && layer->desc.capacity.tokens_per_sequence > 0;
}

/* Tokens of a sequence, all of them without sequences; at least 1. */
static inline uint32_t layer_sequence_tokens(const clmoe_layer *layer, uint32_t tokens) {
    uint32_t count = layer_has_sequences(layer) ? layer->desc.capacity.tokens_per_sequence : tokens;
    count = count < tokens ? count : tokens;
    return count > 0 ? count : 1;
}

/* At least 1. */
static inline uint32_t layer_sequences(const clmoe_layer *layer, uint32_t tokens) {
    return tokens > 0 ? divide_up(tokens, layer_sequence_tokens(layer, tokens)) : 1;
}

/* The order in which pairs compete for places: KEEP_POSITION when none can lose. */
static inline clmoe_keep layer_keep(const clmoe_layer *layer) {
    return layer_is_dropless(layer) ? CLMOE_KEEP_POSITION : layer->desc.capacity.keep;
}

/* Whether dropped pairs go to other experts. */
static inline bool layer_reroutes(const clmoe_layer *layer) {
    return !layer_is_dropless(layer) && layer->desc.capacity.overflow == CLMOE_OVERFLOW_REROUTE;
}

/*
 * Whether statistics and losses take the weights before overflow reroute. Those that are known
 * after dropping alone belong to the experts that have them.
 */
static inline bool layer_keeps_chosen_weights(const clmoe_layer *layer) {
    return layer_reroutes(layer) && !layer->desc.router.renorm.after_drop;
}

/* Whether weights are rebalanced; a token's only weight cannot be. */
static inline bool layer_rebalances(const clmoe_layer *layer) {
    return layer->desc.router.rebalance.iterations > 0 && layer->desc.top_k > 1;
}

/* Whether plan.cl walks in an order that sort.cl makes. */
static inline bool layer_sorts(const clmoe_layer *layer) {
    clmoe_keep keep = layer_keep(layer);
    return keep == CLMOE_KEEP_PRIORITY || keep == CLMOE_KEEP_WEIGHT || keep == CLMOE_KEEP_RANDOM;
}

/* Whether logits change when a state is given: by noise, expert dropout or logit dropout. */
static inline bool layer_is_noisy(const clmoe_layer *layer) {
    const clmoe_router_desc *router = &layer->desc.router;
    return router->noise.kind != CLMOE_NOISE_NONE || router->dropout.experts > 0 ||
           router->dropout.logits > 0;
}

/* Storage type of the gradient of a weight of `type`. */
static inline clmoe_type layer_gradient_type(const clmoe_layer *layer, clmoe_type type) {
    return layer->desc.gradient_type == CLMOE_GRADIENT_OF_WEIGHT ? type : CLMOE_F32;
}

/* Whether there are statistics, losses and controllers. */
static inline bool layer_measures(const clmoe_layer *layer) {
    return layer->desc.training || layer->desc.balance.enabled;
}

/* Whether a loss of this kind looks at F. */
static inline bool loss_reads_load(clmoe_loss_kind kind) {
#define LOSS_READS_LOAD(NAME, name, reads_load, term, value, gradient) reads_load,
    static const bool reads_load[] = {LOSS_LIST(LOSS_READS_LOAD)};
    return reads_load[kind];
}

static inline size_t layer_state_bytes(const clmoe_layer *layer) {
    return sizeof(clmoe_state) + STATE_ARRAY_COUNT * sizeof(cl_uint) * (size_t)layer->columns;
}

/* The counts of the quantile rule, [E, BIAS_BINS] u32. */
static inline size_t layer_bias_counts_bytes(const clmoe_layer *layer) {
    return BIAS_BINS * sizeof(cl_uint) * (size_t)layer->desc.num_experts;
}

/* What of a layer the quantile rule does not have, "top_k of num_experts"; NULL: it has the rule.
 */
const char *layer_lacks_quantile(const clmoe_layer_desc *desc);

static inline size_t layer_stats_bytes(const clmoe_layer *layer) {
    const size_t words = STATS_ARRAY_COUNT * (size_t)layer->columns;
    return sizeof(clmoe_stats) + (words + layer->desc.balance.device_groups) * sizeof(cl_uint);
}

static inline bool layer_is_expert_choice(const clmoe_layer *layer) {
    return layer->desc.router.policy == CLMOE_POLICY_EXPERT_CHOICE;
}

/* Whether the pairs of an expert are rounded to a multiple. */
static inline bool layer_rounds(const clmoe_layer *layer) {
    return layer->desc.capacity.keep == CLMOE_KEEP_ROUND;
}

/* Whether pairs are a list with token_offsets, in which a token has any number of them. */
static inline bool layer_lists_pairs(const clmoe_layer *layer) {
    return layer_is_expert_choice(layer) || layer_rounds(layer);
}

/* Whether the weights of the choice wait for the plan. */
static inline bool layer_renorms_late(const clmoe_layer *layer) {
    return layer->desc.router.renorm.after_drop && !layer_rounds(layer);
}

/* `live` as it is read: where pairs are a list all of a token's are real, and nothing wrote it. */
static inline clmoe_buf layer_live(const clmoe_layer *layer, clmoe_buf live) {
    return layer_lists_pairs(layer) ? (clmoe_buf){0} : live;
}

/* The most pairs of a token. */
static inline uint32_t layer_token_pairs(const clmoe_layer *layer) {
    return layer_lists_pairs(layer) ? layer->columns : layer->desc.top_k;
}

static inline bool layer_is_soft_moe(const clmoe_layer *layer) {
    return layer->desc.router.policy == CLMOE_POLICY_SOFT_MOE;
}

/* Whether xe is a region of its own: the engine does not gather, or the rows are mixed. */
static inline bool layer_dispatches(const clmoe_layer *layer) {
    return !layer->experts.engine->gathers || layer_is_soft_moe(layer);
}

/*
 * Rows of z: of slots, or of pairs where they are fewer, as buckets have rows of padding.
 */
static inline bool layer_z_by_pair(const clmoe_layer *layer, const clmoe_plan_layout *plan) {
    return !layer_is_soft_moe(layer) && plan->pairs < plan->slots;
}

static inline size_t layer_z_rows(const clmoe_layer *layer, const clmoe_plan_layout *plan) {
    return layer_z_by_pair(layer, plan) ? plan->pairs : plan->slots;
}

/* Whether backward may need rows of the gradient on the experts' outputs. */
static inline bool layer_has_output_rows(const clmoe_layer *layer) {
    return layer->desc.training && (layer->desc.normalize_experts || layer->desc.dye);
}

/* Rows of weights.router. */
static inline uint32_t layer_router_rows(const clmoe_layer *layer) {
    return layer_is_soft_moe(layer) ? layer->columns * layer->desc.router.soft_moe.slots
                                    : layer->columns;
}

/* A kernel of sums.cl, stats.cl or loss_*.cl: built with balance_group. */
clmoe_status balance_kernel(clmoe_layer *layer, kernel_id id, const char *step, const char *name);
/* One with teams for tokens, see balance.clh; and its launch for `tokens` of them. */
clmoe_status balance_team_kernel(clmoe_layer *layer, kernel_id id, const char *step,
                                 const char *name);
clmoe_status launch_teams(launch *chain, const clmoe_layer *layer, kernel_id id, uint32_t tokens);

#endif
