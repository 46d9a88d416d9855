/*
 * The oracle: the layer in double precision on the host, written from clmoe.h alone. It shares no
 * code with the library and is as plain as possible. Arrays are the caller's unless said otherwise.
 */
#ifndef REF_H
#define REF_H

#include "clmoe/clmoe.h"

#include <stdbool.h>

/* Host mirrors of clmoe_mlp_weights and clmoe_weights: same names, same shapes, f32. */
typedef struct ref_mlp_weights {
    const float *gate, *up, *down;
    const float *gate_bias, *up_bias, *down_bias;
} ref_mlp_weights;

typedef struct ref_weights {
    const float *router, *router_bias, *select_bias, *expert_scale;
    ref_mlp_weights experts, shared;
    const float *shared_gate, *output_bias;
    const float *group_router;
} ref_weights;

static inline uint32_t ref_columns(const clmoe_layer_desc *desc) {
    return desc->num_experts + desc->num_identity_experts;
}

/* Rows of weights.router: R, or with Soft MoE one per slot. */
static inline uint32_t ref_router_rows(const clmoe_layer_desc *desc) {
    return desc->router.policy == CLMOE_POLICY_SOFT_MOE
               ? desc->num_experts * desc->router.soft_moe.slots
               : ref_columns(desc);
}

/* Whether a token has any number of pairs, as token_offsets say. */
static inline bool ref_lists_pairs(const clmoe_layer_desc *desc) {
    return desc->router.policy == CLMOE_POLICY_EXPERT_CHOICE ||
           desc->capacity.keep == CLMOE_KEEP_ROUND;
}

/* x [T,D] -> logits [T,R]. */
void ref_logits(const clmoe_layer_desc *desc, uint32_t tokens, const float *x,
                const ref_weights *weights, double *logits);

double ref_sigmoid(double v);
/* log(1 + exp(v)) without overflow. */
double ref_softplus(double v);
/* s(l) of one logit and its derivative; of softmax exp(l), which its sum over the row divides. */
double ref_score(clmoe_score_function score, double l, double *slope);

/* logits [T,R] -> scores [T,R]. */
void ref_scores(const clmoe_layer_desc *desc, uint32_t tokens, const double *logits,
                double *scores);

/*
 * scores [T,R] f32 -> ids [T,K], weights [T,K], live [T]. The choice is made on f32 values, so that
 * integers can be compared exactly; the weights are computed in double.
 */
void ref_topk(const clmoe_layer_desc *desc, uint32_t tokens, const float *scores,
              const ref_weights *weights, int32_t *ids, double *pair_weights, int32_t *live);

/*
 * The weights w [K] of one token whose `live` choices are ids [K], from its scores row [R]; before
 * renorm and scale with renorm.after_drop.
 */
void ref_token_weights(const clmoe_layer_desc *desc, const double *row, const int32_t *ids,
                       int32_t live, const ref_weights *weights, double *w);

/*
 * The smallest relative distance between different neighbours among the K+1 best choices of a
 * token, and between different group scores. Above some 1e-5 an f32 implementation must choose the
 * same.
 */
double ref_choice_gap(const clmoe_layer_desc *desc, uint32_t tokens, const double *scores,
                      const ref_weights *weights);

/* C, of each sequence if there are several; 0 when dropless. */
uint32_t ref_capacity(const clmoe_layer_desc *desc, uint32_t tokens);

/* Pairs of a batch: T*K, with expert choice E*C, with token rounding to `multiple` its bound. */
size_t ref_pairs(const clmoe_layer_desc *desc, uint32_t tokens);

typedef struct ref_plan_in {
    uint32_t tokens;
    uint32_t slots, row_tile;     /* as clmoe_plan_layout_get() says */
    const int32_t *ids;           /* [pairs] */
    const float *pair_weights;    /* [pairs], for the keep rules priority and weight */
    const int32_t *live;          /* optional [T] */
    const uint8_t *token_mask;    /* optional [T] */
    const int32_t *token_offsets; /* optional [T+1] */
} ref_plan_in;

/* The arrays of clmoe_plan_layout, allocated by ref_plan_make(). */
typedef struct ref_plan {
    uint32_t pairs, slots, row_tile, capacity;
    uint32_t *load, *kept;                /* [R] */
    uint32_t *rerouted_in, *rerouted_out; /* [R], NULL without rerouting */
    uint32_t *offsets;                    /* [E+1] */
    int32_t *slot_of;                     /* [T*K] */
    int32_t *pair_of;                     /* [S] */
    int32_t *token_of;                    /* [S] */
    int32_t *tile_expert;                 /* [S/row_tile] */
} ref_plan;

/* For a batch of one sequence; see ref_plan_places(). */
void ref_plan_make(const clmoe_layer_desc *desc, const ref_plan_in *in, ref_plan *plan);
void ref_plan_free(ref_plan *plan);

/* Renormalises and scales pair_weights [T,K] over the pairs that kept a place. */
void ref_renorm_after_drop(const clmoe_layer_desc *desc, uint32_t tokens, const int32_t *ids,
                           const int32_t *slot_of, const ref_weights *weights,
                           double *pair_weights);

/* What a row of an MLP is multiplied by. Without a state there is no dropout. */
typedef struct ref_scale {
    double weight;
    const clmoe_state *state;
    uint32_t use, row; /* of the random numbers of dropout */
} ref_scale;

/*
 * Expert `expert` of the routed experts on the row x [D]: out [D], with normalize_experts, with
 * dropout and, for weight_at input and activation, with the weight.
 */
void ref_expert(const clmoe_layer_desc *desc, const ref_weights *weights, uint32_t expert,
                const float *x, const ref_scale *scale, double *out);
void ref_expert_row(const clmoe_layer_desc *desc, const ref_weights *weights, uint32_t expert,
                    const double *x, const ref_scale *scale, double *out);

/* The activation of `desc`. */
double ref_activate(const clmoe_mlp_desc *desc, double v);

/* An MLP of `desc` on the row x [dim], its hidden values scaled: out [dim]. */
void ref_mlp(const clmoe_mlp_desc *desc, const ref_mlp_weights *weights, uint32_t expert,
             uint32_t dim, const double *x, const ref_scale *scale, double *out);

/* plan, live and mask -> the header of the statistics. */
void ref_stats(const clmoe_layer_desc *desc, uint32_t tokens, const ref_plan *plan,
               const int32_t *live, const uint8_t *token_mask, clmoe_stats *stats);

/* One batch, as clmoe_forward_args. */
typedef struct ref_forward_in {
    uint32_t tokens;
    const ref_weights *weights;
    const float *x;
    const uint8_t *token_mask;
    const float *residual, *logits_in;
    const int32_t *ids_in;
    const float *pair_weights_in;
    const clmoe_state *state; /* optional; of all that is random only dropout of activations */
} ref_forward_in;

/* Everything a batch yields, allocated by ref_forward(). */
typedef struct ref_result {
    double *logits, *scores; /* [T,R] */
    int32_t *ids;            /* [pairs] */
    double *pair_weights;    /* [pairs] */
    int32_t *live;           /* [T], NULL with ids_in and where pairs are listed */
    int32_t *token_offsets;  /* [T+1], where pairs are listed */
    ref_plan plan;           /* of row_tile 1 */
    clmoe_stats stats;
    double *y;         /* [T,D] */
    double *mixed;     /* [T,D], with Soft MoE only, which has y and nothing else */
    double choice_gap; /* infinite with ids_in */
    double order_gap;  /* the like for the keep rules that order pairs by weight, else infinite */
} ref_result;

void ref_forward(const clmoe_layer_desc *desc, const ref_forward_in *in, ref_result *result);
void ref_result_free(ref_result *result);

#endif
