/*
 * The oracle of balance.h: statistics, losses and their gradients in double precision, written from
 * the header alone and as plain as possible. Nothing is released by hand but what *_free() names.
 */
#ifndef REF_BALANCE_H
#define REF_BALANCE_H

#include "ref.h"

/* One batch; optional arrays are NULL. */
typedef struct ref_balance_in {
    uint32_t tokens;
    const double *logits;       /* [T,R], the clean ones; NULL with external ids */
    const double *noise;        /* optional [T,R]: what is added to them; -INFINITY: dropped out */
    const double *noise_input;  /* [T,R] x Wn^T, with learned noise */
    const double *group_logits; /* [T,groups.count] x Wg^T, with two levels */
    const int32_t *ids;         /* [pairs] */
    const float *pair_weights;  /* optional [pairs] */
    const int32_t *live;        /* optional [T] */
    const uint8_t *token_mask;  /* optional [T] */
    const int32_t *token_offsets;             /* optional [T+1] */
    const int32_t *slot_of;                   /* [pairs], of the plan; for renorm.after_drop */
    const uint32_t *kept;                     /* [R], of the plan; statistics only */
    const uint32_t *rerouted_in;              /* optional [R], of the plan */
    const uint32_t *rerouted_out;             /* optional [R], of the plan */
    const clmoe_state *state;                 /* optional, its arrays behind it */
    const float *load_target, *load_supplied; /* optional [E] */
    const float *expert_scale;                /* [R], for p_source weights */
} ref_balance_in;

/* The fields of clmoe_stats that are f32. */
#define REF_STATS_FLOATS(X)                                                                        \
    X(max_violation)                                                                               \
    X(load_entropy)                                                                                \
    X(drop_rate)                                                                                   \
    X(load_variance)                                                                               \
    X(load_cv2)                                                                                    \
    X(importance_variance)                                                                         \
    X(importance_cv2)                                                                              \
    X(weights_cv2)                                                                                 \
    X(load_divergence)                                                                             \
    X(target_distance)                                                                             \
    X(target_change)                                                                               \
    X(fluctuation)                                                                                 \
    X(token_entropy)                                                                               \
    X(confidence)                                                                                  \
    X(mean_logsumexp)                                                                              \
    X(dead_parameter_share)

/* The others, u32. */
#define REF_STATS_INTS(X)                                                                          \
    X(tokens)                                                                                      \
    X(columns)                                                                                     \
    X(pairs)                                                                                       \
    X(kept)                                                                                        \
    X(dropped)                                                                                     \
    X(identity_pairs)                                                                              \
    X(nonfinite_tokens)                                                                            \
    X(idle_experts)                                                                                \
    X(max_load)                                                                                    \
    X(min_load)                                                                                    \
    X(rerouted)                                                                                    \
    X(used_capacity)                                                                               \
    X(dead_experts)                                                                                \
    X(device_groups)                                                                               \
    X(max_device_tokens)                                                                           \
    X(invalid_ids)

typedef struct ref_statistics {
#define FIELD(name) double name;
    REF_STATS_FLOATS(FIELD)
#undef FIELD
#define FIELD(name) uint32_t name;
    REF_STATS_INTS(FIELD)
#undef FIELD
    struct {
        uint32_t *load, *kept, *dropped, *rerouted, *idle_tokens; /* [R] */
        double *importance, *weight_sums, *ema;                   /* [R] */
        uint32_t *device_tokens;                                  /* [device_groups] */
    } of;
} ref_statistics;

void ref_statistics_make(const clmoe_layer_desc *desc, const ref_balance_in *in,
                         ref_statistics *stats);
void ref_statistics_free(ref_statistics *stats);

/*
 * What the gradient of a loss holds fixed. A loss has one scope, or one per sequence; `share` is
 * what a scope counts for in the whole, 0 where all tokens are masked.
 */
typedef struct ref_scope {
    size_t first, end; /* tokens */
    double tokens;     /* unmasked ones: T */
    double share;
    double value;
    double *g; /* [R], 0 for identity experts */
} ref_scope;

typedef struct ref_loss {
    size_t num_scopes;
    ref_scope *scopes;
    double *threshold; /* [T,R], of smooth load */
    double value;      /* without weight */
} ref_loss;

void ref_loss_make(const clmoe_layer_desc *desc, const ref_balance_in *in,
                   const clmoe_loss_desc *loss, ref_loss *fixed);
void ref_loss_free(ref_loss *fixed);

/*
 * The smooth function whose gradient the loss has: mean over the scopes of sum_e g_e P_e with g as
 * in `fixed`, or the loss itself where that is smooth. Without weight.
 */
double ref_loss_surrogate(const clmoe_layer_desc *desc, const ref_balance_in *in,
                          const clmoe_loss_desc *loss, const ref_loss *fixed);

/* Adds weight times the gradient by the formulas. dnoise and dgroup_logits may be NULL. */
void ref_loss_gradient(const clmoe_layer_desc *desc, const ref_balance_in *in,
                       const clmoe_loss_desc *loss, const ref_loss *fixed, double *dlogits,
                       double *dnoise, double *dgroup_logits);

/* ---- Router orthogonality ------------------------------------------------------------------- */

/* The value, and its gradient [rows,dim], which is written. */
double ref_orthogonality(const double *router, size_t rows, size_t dim);
void ref_orthogonality_gradient(const double *router, size_t rows, size_t dim, double *gradient);

/* ---- Shared by both files ------------------------------------------------------------------ */

/*
 * A token's row after softcap and temperature, its scores and probabilities. With two levels l is
 * the logarithm of the product of both gates, and chain that of l before.
 */
typedef struct ref_row {
    double *noisy; /* [R] logits with noise, -INFINITY where not finite */
    double *l;     /* [R] after softcap and temperature */
    double *chain; /* [R] dl / dnoisy, 0 where not finite */
    double *q;     /* [R] with two levels: softmax within the group */
    double *gate;  /* [groups.count] likewise: softmax of the group logits */
    double *s;     /* [R] s(l), 0 where not finite */
    double *ds;    /* [R] ds / dl */
    double *p;     /* [R] s / sum of s */
    double sum;
} ref_row;

void ref_row_make(const clmoe_layer_desc *desc, const ref_balance_in *in, clmoe_p_source source,
                  size_t token, ref_row *row);
void ref_row_free(ref_row *row);

/* sum over the pairs of a token of g_e w, and its gradient on the noisy logits: dl [R]. */
double ref_weights_surrogate(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
                             const double *g);
void ref_weights_gradient(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t t,
                          const double *g, double *dl);

bool ref_is_masked(const ref_balance_in *in, size_t token);
/* The pairs of a token that count: [*first, return value). */
size_t ref_pairs_of(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t token,
                    size_t *first);
/* Whether the pair chose one of the R columns; *e is which. */
bool ref_pair_column(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t pair,
                     size_t *e);
/* The first array behind the state's header, then the others: select_bias, ema, previous. */
const float *ref_state_array(const ref_balance_in *in, const clmoe_layer_desc *desc, size_t index);
/* Q [E]. */
void ref_target(const clmoe_layer_desc *desc, const ref_balance_in *in, double *q);
/* C as the state has it, 0 when dropless. */
uint32_t ref_capacity_in_use(const clmoe_layer_desc *desc, const ref_balance_in *in);
/* log sum exp of a token's noisy logits; 0 where none is finite. */
double ref_logsumexp(const ref_row *row, size_t columns);
/* Distinct tokens of [first, end) with a pair in each device group: [device_groups]. */
void ref_device_tokens(const clmoe_layer_desc *desc, const ref_balance_in *in, size_t first,
                       size_t end, uint32_t *tokens);

#endif
