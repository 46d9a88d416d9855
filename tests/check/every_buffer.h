/* Every buffer of every call: in which layers, and how it is used. */
#ifndef EVERY_BUFFER_H
#define EVERY_BUFFER_H

#include "support.h"

typedef struct all_args {
    clmoe_forward_args forward;
    clmoe_score_args score;
    clmoe_topk_args topk;
    clmoe_plan_args plan;
    clmoe_renorm_after_drop_args renorm;
    clmoe_replicate_args replicate;
    clmoe_jitter_args jitter;
    clmoe_dispatch_args dispatch;
    clmoe_soft_dispatch_args soft_dispatch;
    clmoe_soft_combine_args soft_combine;
    clmoe_experts_args experts;
    clmoe_shared_expert_args shared;
    clmoe_combine_args combine;
    clmoe_stats_args stats;
    clmoe_loss_args loss;
    clmoe_bias_counts_args counts;
    clmoe_backward_args backward;
    clmoe_experts_backward_args experts_back;
    clmoe_combine_backward_args combine_back;
    clmoe_shared_expert_backward_args shared_back;
    clmoe_topk_backward_args topk_back;
    clmoe_score_backward_args score_back;
    clmoe_dispatch_backward_args dispatch_back;
    struct {
        clmoe_mlp_weights raw;
        clmoe_buf packed;
    } pack;
    struct {
        clmoe_buf state;
    } first_state;
    clmoe_balance_args start, update;
    clmoe_router_orthogonality_args orthogonality;
    clmoe_weights weights; /* of all calls; as the next */
    clmoe_gradients gradients;
} all_args;

/* The calls whose args have a size and tokens. */
#define BATCH_CALLS(X)                                                                             \
    X(forward, clmoe_forward)                                                                      \
    X(score, clmoe_score)                                                                          \
    X(topk, clmoe_topk)                                                                            \
    X(plan, clmoe_plan)                                                                            \
    X(renorm, clmoe_renorm_after_drop)                                                             \
    X(replicate, clmoe_replicate)                                                                  \
    X(jitter, clmoe_jitter)                                                                        \
    X(dispatch, clmoe_dispatch)                                                                    \
    X(soft_dispatch, clmoe_soft_dispatch)                                                          \
    X(experts, clmoe_experts)                                                                      \
    X(soft_combine, clmoe_soft_combine)                                                            \
    X(shared, clmoe_shared_expert)                                                                 \
    X(combine, clmoe_combine)                                                                      \
    X(stats, clmoe_stats_compute)                                                                  \
    X(loss, clmoe_loss)                                                                            \
    X(counts, clmoe_bias_counts)                                                                   \
    X(backward, clmoe_backward)                                                                    \
    X(experts_back, clmoe_experts_backward)                                                        \
    X(combine_back, clmoe_combine_backward)                                                        \
    X(shared_back, clmoe_shared_expert_backward)                                                   \
    X(topk_back, clmoe_topk_backward)                                                              \
    X(score_back, clmoe_score_backward)                                                            \
    X(dispatch_back, clmoe_dispatch_backward)
#define CALL_ID(id, function)   CALL_##id,
#define CALL_NAME(id, function) #id,
typedef enum call_id {
    BATCH_CALLS(CALL_ID) CALL_pack,
    CALL_first_state,
    CALL_start,
    CALL_update,
    CALL_orthogonality,
    CALLS
} call_id;
static const char *const call_names[CALLS] = {BATCH_CALLS(CALL_NAME) "pack", "first_state", "start",
                                              "update", "orthogonality"};

/* Layers that between them read every field, all in training. */
enum {
    USUAL = 1,     /* token choice with reroute */
    TWO_LEVEL = 2, /* with external logits */
    CHOICE = 4,    /* experts choose */
    EXTERNAL = 8,  /* external ids */
    SOFT = 16,     /* Soft MoE: no choice at all */
    PACKED = 32,   /* EXTERNAL, where the device has an engine that packs */
    UNPACKED = 64, /* EXTERNAL elsewhere */
    KINDS = 5,
    AT_INPUT = CHOICE, /* weight_at input */
    ROUTED = USUAL | TWO_LEVEL | CHOICE,
    ANY = ROUTED | EXTERNAL, /* all that choose */
    EVERY = ANY | SOFT,
};
static const char *const kind_names[KINDS] = {"token choice", "two levels", "expert choice",
                                              "external ids", "Soft MoE"};

typedef enum use { READ, WRITE, BOTH } use;

/* A buffer of a call, where the layer is one of `kinds`. */
typedef struct field {
    call_id call;
    int kinds;
    use use;
    const char *name;
    const char *asked; /* for, where it is not given; NULL: nothing */
    size_t offset;     /* in all_args */
} field;

#define FIELD(call, kinds, use, name, asked, field)                                                \
    { CALL_##call, kinds, use, name, asked, offsetof(all_args, field) }
#define ARG(call, kinds, use, field)      FIELD(call, kinds, use, #field, #field, call.field)
#define OPTIONAL(call, kinds, use, field) FIELD(call, kinds, use, #field, NULL, call.field)
#define LOGITS_IN(call, asked)            FIELD(call, TWO_LEVEL, READ, "logits_in", asked, call.logits_in)
#define WEIGHT(call, kinds, field)                                                                 \
    FIELD(call, kinds, READ, "weights." #field, "weights." #field, weights.field)
/* A state has one, too. */
#define SELECT_BIAS(call)                                                                          \
    FIELD(call, USUAL | TWO_LEVEL, READ, "weights.select_bias", NULL, weights.select_bias)
/* Of an MLP whose layout may be separate; matrices for the way back lie beside packed ones. */
#define PACKED_MLP(call, mlp)                                                                      \
    FIELD(call, PACKED, READ, "weights." #mlp ".packed", NULL, weights.mlp.packed)
#define MLP(call, mlp)                                                                             \
    WEIGHT(call, ROUTED | SOFT | UNPACKED, mlp.gate), WEIGHT(call, TWO_LEVEL | UNPACKED, mlp.up),  \
        WEIGHT(call, ROUTED | SOFT | UNPACKED, mlp.down), PACKED_MLP(call, mlp),                   \
        WEIGHT(call, EVERY, mlp.gate_bias), WEIGHT(call, TWO_LEVEL | EXTERNAL, mlp.up_bias),       \
        WEIGHT(call, EVERY, mlp.down_bias)

/* Matrices as they lie in memory, whatever is packed. */
#define RAW_MLP(call, kinds, mlp)                                                                  \
    WEIGHT(call, kinds, mlp.gate), WEIGHT(call, (kinds) & (TWO_LEVEL | EXTERNAL), mlp.up),         \
        WEIGHT(call, kinds, mlp.down), WEIGHT(call, kinds, mlp.gate_bias),                         \
        WEIGHT(call, (kinds) & (TWO_LEVEL | EXTERNAL), mlp.up_bias),                               \
        WEIGHT(call, kinds, mlp.down_bias)
#define GRADIENT(call, kinds, field)                                                               \
    FIELD(call, kinds, WRITE, "gradients." #field, NULL, gradients.field)
#define MLP_GRADIENTS(call, kinds, mlp)                                                            \
    GRADIENT(call, kinds, mlp.gate), GRADIENT(call, (kinds) & (TWO_LEVEL | EXTERNAL), mlp.up),     \
        GRADIENT(call, kinds, mlp.down), GRADIENT(call, kinds, mlp.gate_bias),                     \
        GRADIENT(call, (kinds) & (TWO_LEVEL | EXTERNAL), mlp.up_bias),                             \
        GRADIENT(call, kinds, mlp.down_bias)

static const field fields[] = {
    ARG(forward, EVERY, READ, x),
    OPTIONAL(forward, EVERY, READ, token_mask),
    OPTIONAL(forward, EVERY, READ, residual),
    LOGITS_IN(forward, "weights.router"),
    ARG(forward, EXTERNAL, READ, ids_in),
    ARG(forward, EXTERNAL, READ, pair_weights_in),
    OPTIONAL(forward, ROUTED, READ, state),
    OPTIONAL(forward, ROUTED, READ, load_target),
    OPTIONAL(forward, ROUTED, READ, load_supplied),
    ARG(forward, EVERY, BOTH, saved),
    ARG(forward, EVERY, BOTH, scratch),
    ARG(forward, EVERY, WRITE, y),
    OPTIONAL(forward, ROUTED, WRITE, logits),
    OPTIONAL(forward, ANY, WRITE, ids),
    OPTIONAL(forward, ANY, WRITE, pair_weights),
    OPTIONAL(forward, CHOICE, WRITE, token_offsets),
    OPTIONAL(forward, ANY, WRITE, stats),
    OPTIONAL(forward, ROUTED, WRITE, loss_values),
    OPTIONAL(forward, ROUTED, BOTH, dlogits),
    OPTIONAL(forward, ROUTED, BOTH, dnoise),
    OPTIONAL(forward, TWO_LEVEL, BOTH, dgroup_logits),
    WEIGHT(forward, USUAL | CHOICE | SOFT, router),
    WEIGHT(forward, USUAL | CHOICE, router_bias),
    SELECT_BIAS(forward),
    WEIGHT(forward, ROUTED, expert_scale),
    WEIGHT(forward, ROUTED, noise_router),
    WEIGHT(forward, TWO_LEVEL, group_router),
    MLP(forward, experts),
    MLP(forward, shared),
    WEIGHT(forward, EVERY, shared_gate),
    WEIGHT(forward, EVERY, output_bias),

    ARG(score, ROUTED, READ, x),
    LOGITS_IN(score, "logits"),
    ARG(score, USUAL | CHOICE, WRITE, logits),
    ARG(score, ROUTED, BOTH, scores),
    OPTIONAL(score, ROUTED, READ, state),
    ARG(score, ROUTED, BOTH, scratch),
    WEIGHT(score, USUAL | CHOICE, router),
    WEIGHT(score, USUAL | CHOICE, router_bias),
    WEIGHT(score, ROUTED, noise_router),
    WEIGHT(score, TWO_LEVEL, group_router),

    ARG(topk, ROUTED, READ, scores),
    ARG(topk, ROUTED, BOTH, ids),
    ARG(topk, ROUTED, BOTH, pair_weights),
    ARG(topk, USUAL | TWO_LEVEL, WRITE, live),
    ARG(topk, CHOICE, BOTH, token_offsets),
    OPTIONAL(topk, ROUTED, READ, token_mask),
    OPTIONAL(topk, ROUTED, READ, state),
    ARG(topk, CHOICE, BOTH, scratch),
    SELECT_BIAS(topk),
    WEIGHT(topk, ROUTED, expert_scale),

    ARG(plan, USUAL, BOTH, ids),
    ARG(plan, USUAL, BOTH, pair_weights),
    OPTIONAL(plan, USUAL, READ, scores),
    ARG(plan, TWO_LEVEL | CHOICE | EXTERNAL, READ, ids),
    OPTIONAL(plan, TWO_LEVEL | CHOICE | EXTERNAL, READ, pair_weights),
    OPTIONAL(plan, USUAL | TWO_LEVEL, READ, live),
    OPTIONAL(plan, ANY, READ, token_mask),
    ARG(plan, CHOICE, READ, token_offsets),
    OPTIONAL(plan, EXTERNAL, READ, token_offsets),
    OPTIONAL(plan, ROUTED, READ, state),
    ARG(plan, ANY, BOTH, scratch),
    ARG(plan, ANY, BOTH, plan),
    WEIGHT(plan, USUAL, expert_scale),

    ARG(renorm, TWO_LEVEL, READ, ids),
    ARG(renorm, TWO_LEVEL, BOTH, pair_weights),
    ARG(renorm, TWO_LEVEL, READ, plan),
    WEIGHT(renorm, TWO_LEVEL, expert_scale),

    ARG(replicate, ANY, READ, ids),
    ARG(replicate, ANY, READ, plan),
    ARG(replicate, ANY, READ, copies),
    ARG(replicate, ANY, READ, logical_to_physical),
    ARG(replicate, ANY, WRITE, physical_ids),

    ARG(jitter, USUAL, READ, x),
    ARG(jitter, USUAL, READ, state),
    ARG(jitter, USUAL, WRITE, jittered),

    ARG(dispatch, ANY, READ, x),
    ARG(dispatch, ANY, READ, plan),
    ARG(dispatch, ANY, WRITE, xe),

    ARG(soft_dispatch, SOFT, READ, x),
    OPTIONAL(soft_dispatch, SOFT, READ, token_mask),
    ARG(soft_dispatch, SOFT, BOTH, scratch),
    ARG(soft_dispatch, SOFT, BOTH, plan),
    ARG(soft_dispatch, SOFT, WRITE, pair_weights),
    ARG(soft_dispatch, SOFT, BOTH, mix),
    ARG(soft_dispatch, SOFT, BOTH, xe),
    WEIGHT(soft_dispatch, SOFT, router),

    ARG(soft_combine, SOFT, BOTH, ye),
    ARG(soft_combine, SOFT, READ, mix),
    ARG(soft_combine, SOFT, BOTH, mixed),

    /* One of both. */
    OPTIONAL(experts, USUAL, READ, x),
    OPTIONAL(experts, USUAL, READ, xe),
    FIELD(experts, TWO_LEVEL | CHOICE | EXTERNAL | SOFT, READ, "xe", "x", experts.xe),
    ARG(experts, AT_INPUT, READ, pair_weights),
    OPTIONAL(experts, EVERY & ~AT_INPUT, READ, pair_weights),
    ARG(experts, EVERY, READ, plan),
    ARG(experts, EVERY, BOTH, scratch),
    ARG(experts, EVERY, BOTH, ye),
    OPTIONAL(experts, EVERY, WRITE, z),
    OPTIONAL(experts, EVERY, READ, state),
    MLP(experts, experts),

    ARG(shared, EVERY, READ, x),
    ARG(shared, EVERY, BOTH, scratch),
    ARG(shared, EVERY, BOTH, shared),
    ARG(shared, EVERY, WRITE, shared_gate),
    OPTIONAL(shared, EVERY, WRITE, z),
    OPTIONAL(shared, EVERY, READ, state),
    MLP(shared, shared),
    WEIGHT(shared, EVERY, shared_gate),

    OPTIONAL(combine, EVERY, READ, x),
    ARG(combine, EVERY, READ, ye),
    ARG(combine, EVERY, READ, pair_weights),
    ARG(combine, EVERY, READ, plan),
    OPTIONAL(combine, EVERY, READ, token_mask),
    ARG(combine, CHOICE, READ, token_offsets),
    OPTIONAL(combine, EXTERNAL, READ, token_offsets),
    ARG(combine, EVERY, READ, shared),
    ARG(combine, EVERY, READ, shared_gate),
    OPTIONAL(combine, EVERY, READ, residual),
    ARG(combine, EVERY, WRITE, y),
    WEIGHT(combine, EVERY, output_bias),

    ARG(stats, ROUTED, READ, x),
    OPTIONAL(stats, ROUTED, READ, logits),
    ARG(stats, ANY, READ, ids),
    OPTIONAL(stats, ANY, READ, pair_weights),
    ARG(stats, ANY, READ, plan),
    OPTIONAL(stats, USUAL | TWO_LEVEL, READ, live),
    OPTIONAL(stats, ANY, READ, token_mask),
    ARG(stats, CHOICE, READ, token_offsets),
    OPTIONAL(stats, EXTERNAL, READ, token_offsets),
    OPTIONAL(stats, ROUTED, READ, state),
    OPTIONAL(stats, ANY, READ, load_target),
    ARG(stats, ANY, BOTH, scratch),
    ARG(stats, ANY, WRITE, stats),
    WEIGHT(stats, ROUTED, noise_router),
    WEIGHT(stats, TWO_LEVEL, group_router),

    ARG(loss, ROUTED, READ, x),
    ARG(loss, ROUTED, READ, logits),
    ARG(loss, ROUTED, READ, ids),
    ARG(loss, USUAL | CHOICE, READ, pair_weights),
    OPTIONAL(loss, TWO_LEVEL, READ, pair_weights),
    ARG(loss, ROUTED, READ, plan),
    OPTIONAL(loss, USUAL | TWO_LEVEL, READ, live),
    OPTIONAL(loss, ROUTED, READ, token_mask),
    ARG(loss, CHOICE, READ, token_offsets),
    OPTIONAL(loss, ROUTED, READ, state),
    OPTIONAL(loss, ROUTED, READ, load_target),
    OPTIONAL(loss, ROUTED, READ, load_supplied),
    ARG(loss, ROUTED, BOTH, scratch),
    OPTIONAL(loss, ROUTED, WRITE, values),
    OPTIONAL(loss, ROUTED, BOTH, dlogits),
    OPTIONAL(loss, ROUTED, BOTH, dnoise),
    OPTIONAL(loss, TWO_LEVEL, BOTH, dgroup_logits),
    WEIGHT(loss, ROUTED, noise_router),
    WEIGHT(loss, TWO_LEVEL, group_router),
    WEIGHT(loss, USUAL | CHOICE, expert_scale),

    ARG(counts, USUAL, READ, x),
    ARG(counts, USUAL, READ, logits),
    OPTIONAL(counts, USUAL, READ, token_mask),
    ARG(counts, USUAL, READ, state),
    ARG(counts, USUAL, BOTH, scratch),
    ARG(counts, USUAL, BOTH, bias_counts),
    WEIGHT(counts, USUAL, noise_router),

    ARG(backward, EVERY, READ, x),
    OPTIONAL(backward, EVERY, READ, token_mask),
    LOGITS_IN(backward, "weights.router"),
    ARG(backward, EXTERNAL, READ, ids_in),
    ARG(backward, EXTERNAL, READ, pair_weights_in),
    OPTIONAL(backward, EVERY, READ, state),
    ARG(backward, EVERY, READ, saved),
    ARG(backward, EVERY, BOTH, scratch),
    ARG(backward, EVERY, READ, dy),
    OPTIONAL(backward, ROUTED, READ, dlogits),
    OPTIONAL(backward, ROUTED, READ, dnoise),
    OPTIONAL(backward, TWO_LEVEL, READ, dgroup_logits),
    OPTIONAL(backward, EVERY, READ, dye),
    OPTIONAL(backward, EVERY, WRITE, dx),
    OPTIONAL(backward, ROUTED, BOTH, dlogits_out),
    OPTIONAL(backward, ANY, BOTH, dpair_weights),
    WEIGHT(backward, USUAL | CHOICE | SOFT, router),
    WEIGHT(backward, USUAL | CHOICE, router_bias),
    SELECT_BIAS(backward),
    WEIGHT(backward, ROUTED, expert_scale),
    WEIGHT(backward, ROUTED, noise_router),
    WEIGHT(backward, TWO_LEVEL, group_router),
    RAW_MLP(backward, EVERY, experts),
    RAW_MLP(backward, EVERY, shared),
    WEIGHT(backward, EVERY, shared_gate),
    WEIGHT(backward, EVERY, output_bias),
    GRADIENT(backward, EVERY, router),
    GRADIENT(backward, ANY, router_bias),
    GRADIENT(backward, ANY, expert_scale),
    GRADIENT(backward, ROUTED, noise_router),
    GRADIENT(backward, TWO_LEVEL, group_router),
    MLP_GRADIENTS(backward, EVERY, experts),
    MLP_GRADIENTS(backward, EVERY, shared),
    GRADIENT(backward, EVERY, shared_gate),
    GRADIENT(backward, EVERY, output_bias),

    ARG(experts_back, ANY, READ, x),
    ARG(experts_back, ANY, READ, pair_weights),
    ARG(experts_back, ANY, READ, plan),
    ARG(experts_back, ANY, READ, z),
    OPTIONAL(experts_back, ANY, READ, state),
    ARG(experts_back, ANY, READ, dy),
    OPTIONAL(experts_back, ANY, READ, dye),
    ARG(experts_back, ANY, BOTH, scratch),
    ARG(experts_back, ANY, BOTH, dxe),
    ARG(experts_back, ANY, BOTH, dots),
    RAW_MLP(experts_back, ANY, experts),
    MLP_GRADIENTS(experts_back, ANY, experts),

    ARG(combine_back, AT_INPUT, READ, x),
    OPTIONAL(combine_back, ANY & ~AT_INPUT, READ, x),
    ARG(combine_back, ANY, READ, ids),
    ARG(combine_back, ANY, READ, plan),
    OPTIONAL(combine_back, ANY, READ, token_mask),
    ARG(combine_back, CHOICE, READ, token_offsets),
    OPTIONAL(combine_back, ANY & ~CHOICE, READ, token_offsets),
    ARG(combine_back, ANY, READ, dy),
    OPTIONAL(combine_back, ANY, READ, dye),
    ARG(combine_back, AT_INPUT, READ, dxe),
    OPTIONAL(combine_back, ANY & ~AT_INPUT, READ, dxe),
    ARG(combine_back, ANY, READ, dots),
    ARG(combine_back, ANY, WRITE, dpair_weights),
    WEIGHT(combine_back, ANY, experts.down_bias),
    GRADIENT(combine_back, ANY, output_bias),

    ARG(shared_back, EVERY, READ, x),
    OPTIONAL(shared_back, EVERY, READ, token_mask),
    ARG(shared_back, EVERY, READ, shared_gate),
    ARG(shared_back, EVERY, READ, z),
    OPTIONAL(shared_back, EVERY, READ, state),
    ARG(shared_back, EVERY, READ, dy),
    ARG(shared_back, EVERY, BOTH, scratch),
    ARG(shared_back, EVERY, BOTH, shared_dx),
    RAW_MLP(shared_back, EVERY, shared),
    WEIGHT(shared_back, EVERY, shared_gate),
    MLP_GRADIENTS(shared_back, EVERY, shared),
    GRADIENT(shared_back, EVERY, shared_gate),

    ARG(topk_back, ROUTED, READ, x),
    ARG(topk_back, ROUTED, READ, logits),
    ARG(topk_back, ROUTED, READ, ids),
    ARG(topk_back, USUAL | TWO_LEVEL, READ, live),
    OPTIONAL(topk_back, CHOICE, READ, live),
    ARG(topk_back, ROUTED, READ, plan),
    OPTIONAL(topk_back, ROUTED, READ, token_mask),
    ARG(topk_back, CHOICE, READ, token_offsets),
    OPTIONAL(topk_back, USUAL | TWO_LEVEL, READ, token_offsets),
    OPTIONAL(topk_back, ROUTED, READ, state),
    ARG(topk_back, ROUTED, READ, dpair_weights),
    OPTIONAL(topk_back, ROUTED, READ, dlogits),
    OPTIONAL(topk_back, ROUTED, READ, dnoise),
    OPTIONAL(topk_back, TWO_LEVEL, READ, dgroup_logits),
    ARG(topk_back, ROUTED, BOTH, scratch),
    ARG(topk_back, ROUTED, BOTH, dlogits_out),
    ARG(topk_back, ROUTED, BOTH, dnoise_out),
    ARG(topk_back, TWO_LEVEL, BOTH, dgroup_logits_out),
    WEIGHT(topk_back, ROUTED, expert_scale),
    WEIGHT(topk_back, ROUTED, noise_router),
    WEIGHT(topk_back, TWO_LEVEL, group_router),
    GRADIENT(topk_back, ROUTED, expert_scale),

    ARG(score_back, ROUTED, READ, x),
    OPTIONAL(score_back, ROUTED, READ, token_mask),
    OPTIONAL(score_back, ROUTED, READ, state),
    ARG(score_back, USUAL | CHOICE, READ, dlogits),
    OPTIONAL(score_back, TWO_LEVEL, READ, dlogits),
    ARG(score_back, ROUTED, READ, dnoise),
    ARG(score_back, TWO_LEVEL, READ, dgroup_logits),
    ARG(score_back, ROUTED, BOTH, scratch),
    ARG(score_back, ROUTED, BOTH, router_dx),
    WEIGHT(score_back, USUAL | CHOICE, router),
    WEIGHT(score_back, USUAL | CHOICE, router_bias),
    WEIGHT(score_back, ROUTED, noise_router),
    WEIGHT(score_back, TWO_LEVEL, group_router),
    GRADIENT(score_back, ROUTED, router),
    GRADIENT(score_back, ROUTED, router_bias),
    GRADIENT(score_back, ROUTED, noise_router),
    GRADIENT(score_back, TWO_LEVEL, group_router),

    ARG(dispatch_back, AT_INPUT, READ, pair_weights),
    OPTIONAL(dispatch_back, ANY & ~AT_INPUT, READ, pair_weights),
    ARG(dispatch_back, ANY, READ, plan),
    OPTIONAL(dispatch_back, ANY, READ, token_mask),
    ARG(dispatch_back, CHOICE, READ, token_offsets),
    OPTIONAL(dispatch_back, ANY & ~CHOICE, READ, token_offsets),
    OPTIONAL(dispatch_back, ANY, READ, state),
    OPTIONAL(dispatch_back, ANY, READ, dy),
    ARG(dispatch_back, ANY, READ, dxe),
    OPTIONAL(dispatch_back, ANY, READ, shared_dx),
    OPTIONAL(dispatch_back, ANY, READ, router_dx),
    ARG(dispatch_back, ANY, BOTH, dx),

    ARG(pack, PACKED, READ, raw.gate),
    ARG(pack, PACKED, READ, raw.up),
    ARG(pack, PACKED, READ, raw.down),
    ARG(pack, PACKED, WRITE, packed),

    ARG(first_state, EVERY, WRITE, state),
    ARG(start, EVERY, BOTH, state),
    ARG(update, ANY, BOTH, state),
    ARG(update, ANY, READ, stats),
    OPTIONAL(update, ANY, READ, load),
    ARG(update, USUAL, READ, bias_counts),

    WEIGHT(orthogonality, USUAL | CHOICE | SOFT, router),
    ARG(orthogonality, USUAL | CHOICE | SOFT, BOTH, scratch),
    OPTIONAL(orthogonality, USUAL | CHOICE | SOFT, WRITE, value),
    OPTIONAL(orthogonality, USUAL | CHOICE | SOFT, BOTH, drouter),
};

#endif
