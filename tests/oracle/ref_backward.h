/*
 * The oracle of the backward pass, in double precision and written from clmoe.h and backward.h
 * alone: gradients by the chain rule, with the choice and the places of a batch held fixed.
 */
#ifndef REF_BACKWARD_H
#define REF_BACKWARD_H

#include "ref.h"

/* Gradients of ref_mlp_weights and ref_weights: same names, same shapes. */
typedef struct ref_mlp_gradients {
    double *gate, *up, *down;
    double *gate_bias, *up_bias, *down_bias;
} ref_mlp_gradients;

typedef struct ref_gradients {
    double *router, *router_bias, *expert_scale;
    ref_mlp_gradients experts, shared;
    double *shared_gate, *output_bias;
    double *group_router;
} ref_gradients;

/* Every array of weights that has a gradient. */
#define REF_GRADIENT_LIST(X)                                                                       \
    X(router)                                                                                      \
    X(router_bias)                                                                                 \
    X(expert_scale)                                                                                \
    X(shared_gate)                                                                                 \
    X(output_bias)                                                                                 \
    X(group_router)                                                                                \
    X(experts.gate)                                                                                \
    X(experts.up)                                                                                  \
    X(experts.down)                                                                                \
    X(experts.gate_bias)                                                                           \
    X(experts.up_bias)                                                                             \
    X(experts.down_bias)                                                                           \
    X(shared.gate)                                                                                 \
    X(shared.up)                                                                                   \
    X(shared.down)                                                                                 \
    X(shared.gate_bias)                                                                            \
    X(shared.up_bias)                                                                              \
    X(shared.down_bias)

enum {
    REF_ROUTER,
    REF_ROUTER_BIAS,
    REF_EXPERT_SCALE,
    REF_SHARED_GATE,
    REF_OUTPUT_BIAS,
    REF_GROUP_ROUTER,
    REF_EXPERTS, /* the first of its six */
    REF_SHARED = REF_EXPERTS + 6,
    REF_GRADIENT_FIELDS = REF_SHARED + 6
};

/* Where a field is in the two structs. */
typedef struct ref_gradient_field {
    const char *name;
    size_t weights, gradient;
} ref_gradient_field;

extern const ref_gradient_field ref_gradient_fields[REF_GRADIENT_FIELDS];

/* Elements of a field; 0 where the layer has none. */
size_t ref_gradient_count(const clmoe_layer_desc *desc, size_t field);
const float *ref_weights_field(const ref_weights *weights, size_t field);
double *ref_gradients_field(const ref_gradients *gradients, size_t field);

/* One batch, as clmoe_backward_args. */
typedef struct ref_backward_in {
    const ref_forward_in *forward;
    const ref_result *result;   /* of ref_forward(): choice, places and weights */
    const float *dy;            /* [T,D] */
    const float *dlogits;       /* optional [T,R] */
    const float *dgroup_logits; /* optional [T,groups.count] */
    /* Optional [pairs,D], with Soft MoE [E*p,D]: on the output row of each pair's expert. */
    const float *dye;
} ref_backward_in;

/* Allocated by ref_backward(). */
typedef struct ref_backward_result {
    double *dx;            /* [T,D] */
    double *dlogits;       /* [T,R] */
    double *dgroup_logits; /* [T,groups.count], with two levels */
    double *dpair_weights; /* [pairs] */
    ref_gradients gradients;
} ref_backward_result;

void ref_backward(const clmoe_layer_desc *desc, const ref_backward_in *in,
                  ref_backward_result *result);
void ref_backward_free(ref_backward_result *result);

/* ---- Its parts ------------------------------------------------------------------------------ */

/* The derivative of ref_activate(); of relu at 0 it is 0. */
double ref_activate_slope(const clmoe_mlp_desc *desc, double v);

/* A layer's MLPs, and where their gradients are added. */
typedef struct ref_backward_layer {
    const clmoe_layer_desc *desc;
    const ref_weights *weights;
    ref_gradients *gradients;
} ref_backward_layer;

/*
 * ref_expert_row() backwards: from dout [D], the gradient of the expert's output, adds to dx [D]
 * and the gradients of its weights, and returns that of the weight, 0 with weight_at output.
 */
double ref_expert_backward(const ref_backward_layer *layer, uint32_t expert, const double *x,
                           const ref_scale *scale, const double *dout, double *dx);

/* The shared expert's MLP backwards, without its gate. */
void ref_shared_backward(const ref_backward_layer *layer, const double *x, const ref_scale *scale,
                         const double *dout, double *dx);

/* dpair_weights -> dlogits, dgroup_logits and the gradient of expert_scale, which are added. */
void ref_backward_weights(const clmoe_layer_desc *desc, const ref_backward_in *in,
                          ref_backward_result *result);

/* In place: the gradient of the rebalanced weights [T,K] -> that of the weights before. */
void ref_backward_rebalance(const clmoe_layer_desc *desc, const ref_backward_in *in,
                            const double *before, double *dw);

/* ref_soft_moe() backwards: dy -> dx and the gradients of router and experts, which are added. */
void ref_backward_soft_moe(const clmoe_layer_desc *desc, const ref_backward_in *in,
                           ref_backward_result *result);

#endif
