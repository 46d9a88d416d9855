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
    clmoe_jitter_args jitter;
    clmoe_dispatch_args dispatch;
    clmoe_soft_dispatch_args soft_dispatch;
    clmoe_soft_combine_args soft_combine;
    clmoe_experts_args experts;
    clmoe_shared_expert_args shared;
    clmoe_combine_args combine;
    clmoe_stats_args stats;
    clmoe_loss_args loss;
    struct {
        clmoe_mlp_weights raw;
        clmoe_buf packed;
    } pack;
    struct {
        clmoe_buf state;
    } first_state;
    clmoe_balance_args start, update;
    clmoe_weights weights; /* of all calls */
} all_args;

/* The calls whose args have a size and tokens. */
#define BATCH_CALLS(X)                                                                             \
    X(forward, clmoe_forward)                                                                      \
    X(score, clmoe_score)                                                                          \
    X(topk, clmoe_topk)                                                                            \
    X(plan, clmoe_plan)                                                                            \
    X(renorm, clmoe_renorm_after_drop)                                                             \
    X(jitter, clmoe_jitter)                                                                        \
    X(dispatch, clmoe_dispatch)                                                                    \
    X(soft_dispatch, clmoe_soft_dispatch)                                                          \
    X(experts, clmoe_experts)                                                                      \
    X(soft_combine, clmoe_soft_combine)                                                            \
    X(shared, clmoe_shared_expert)                                                                 \
    X(combine, clmoe_combine)                                                                      \
    X(stats, clmoe_stats_compute)                                                                  \
    X(loss, clmoe_loss)
#define CALL_ID(id, function)   CALL_##id,
#define CALL_NAME(id, function) #id,
typedef enum call_id {
    BATCH_CALLS(CALL_ID) CALL_pack,
    CALL_first_state,
    CALL_start,
    CALL_update,
    CALLS
} call_id;
static const char *const call_names[CALLS] = {BATCH_CALLS(CALL_NAME) "pack", "first_state", "start",
                                              "update"};

/* Layers that between them read every field. */
enum {
    USUAL = 1,     /* token choice with reroute, training */
    TWO_LEVEL = 2, /* with external logits */
    CHOICE = 4,    /* experts choose */
    EXTERNAL = 8,  /* external ids */
    SOFT = 16,     /* Soft MoE: no choice at all */
    PACKED = 32,   /* EXTERNAL, where the device has an engine that packs */
    UNPACKED = 64, /* EXTERNAL elsewhere */
    KINDS = 5,
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
/* Of an MLP whose layout may be separate. */
#define PACKED_MLP(call, mlp)                                                                      \
    FIELD(call, PACKED, READ, "weights." #mlp ".packed", "weights." #mlp ".gate",                  \
          weights.mlp.packed)
#define MLP(call, mlp)                                                                             \
    WEIGHT(call, ROUTED | SOFT | UNPACKED, mlp.gate), WEIGHT(call, TWO_LEVEL | UNPACKED, mlp.up),  \
        WEIGHT(call, ROUTED | SOFT | UNPACKED, mlp.down), PACKED_MLP(call, mlp),                   \
        WEIGHT(call, EVERY, mlp.gate_bias), WEIGHT(call, TWO_LEVEL | EXTERNAL, mlp.up_bias),       \
        WEIGHT(call, EVERY, mlp.down_bias)

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
    ARG(forward, USUAL, BOTH, saved),
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
    OPTIONAL(experts, EVERY, READ, pair_weights),
    ARG(experts, EVERY, READ, plan),
    ARG(experts, EVERY, BOTH, scratch),
    ARG(experts, EVERY, BOTH, ye),
    MLP(experts, experts),

    ARG(shared, EVERY, READ, x),
    ARG(shared, EVERY, BOTH, scratch),
    ARG(shared, EVERY, BOTH, shared),
    ARG(shared, EVERY, WRITE, shared_gate),
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

    ARG(pack, PACKED, READ, raw.gate),
    ARG(pack, PACKED, READ, raw.up),
    ARG(pack, PACKED, READ, raw.down),
    ARG(pack, PACKED, WRITE, packed),

    ARG(first_state, EVERY, WRITE, state),
    ARG(start, EVERY, BOTH, state),
    ARG(update, ANY, BOTH, state),
    ARG(update, ANY, READ, stats),
    OPTIONAL(update, ANY, READ, load),
};

#endif
