/*
 * The host side of one step each: sets arguments and launches. Nothing here checks its input; the
 * public calls (calls.c) and forward.c do.
 */
#ifndef CLMOE_STEPS_H
#define CLMOE_STEPS_H

#include "batch.h"
#include "runtime/launch.h"

/* ---- routing --------------------------------------------------------------------------------- */

/* x -> logits, unless they are given -> scores. */
clmoe_status step_score(const batch *b, launch *chain);
/* Its first part: *noisy gets the logits that scores are made of. */
clmoe_status step_logits(const batch *b, launch *chain, clmoe_buf *noisy);
/* Noisy logits [T,R] -> scores [T,R], as topk chooses by them; of two levels l. */
clmoe_status step_score_rows(const batch *b, launch *chain, clmoe_buf noisy, clmoe_buf scores);
/* *x: what the router sees, jittered where the layer has jitter and there is a state. */
clmoe_status router_input(const batch *b, launch *chain, clmoe_buf *x);

/* x -> jittered, for layers with jitter, with a state. */
clmoe_status step_jitter(const batch *b, launch *chain);
/* Rows x [T,D] -> out, which may be x, by the same factors: backward, gradients. */
clmoe_status step_jitter_rows(const batch *b, launch *chain, clmoe_buf x, clmoe_buf out);
/*
 * For noisy layers (layer_is_noisy()), with a state: leaves the noisy logits [T,R] in REGION_NOISY,
 * -infinity where dropout masked one, and with learned noise x Wn^T [T,R] in REGION_NOISE_RAW.
 * Everything random follows from the state, so that the same clean logits and the same state give
 * the same noisy logits again: in score, stats and loss. `jittered`: b->jittered is made.
 */
clmoe_status step_noise(const batch *b, launch *chain, bool jittered);

/* scores -> ids, pair_weights, live: by the step of the layer's policy, then rebalanced. */
clmoe_status step_topk(const batch *b, launch *chain);
/* The options of topk_bitonic, for other kernels with its choice; its bytes of local memory. */
size_t topk_options(const clmoe_layer *layer, char *options, size_t size);
/* Whether few.cl does for the batch what score, top-k and plan do; and that, from the logits. */
bool few_takes(const batch *b);
clmoe_status step_few(const batch *b, launch *chain, clmoe_buf noisy);
/* The K largest of scores [T,R]. */
clmoe_status step_topk_scores(const batch *b, launch *chain);
/* The (K+1)-th largest of scores [T,E] + the state's bias of each token -> cutoffs [T] f32. */
clmoe_status step_cutoffs(const batch *b, launch *chain, clmoe_buf scores, clmoe_buf cutoffs);
/* What experts take, of keys [R,T] by thresholds [R,2] -> token_offsets. */
clmoe_status step_select_offsets(const batch *b, launch *chain, clmoe_buf keys,
                                 clmoe_buf thresholds);
/* The work-groups of kernels that list those pairs. */
uint32_t select_groups(const batch *b);
/* Weight rebalancing: the end of step_topk(), on its weights. */
clmoe_status step_rebalance(const batch *b, launch *chain);
/* What is added for the choice: the caller's bias, or the one the controllers keep in the state. */
clmoe_buf select_bias_of(const batch *b);

/* x [T,D] -> x Wg^T [T,groups.count] in REGION_GROUP_LOGITS. */
clmoe_status step_group_logits(const batch *b, launch *chain);
/* scores, l at first, become those of two levels; the group logits stay in their region. */
clmoe_status step_two_level_scores(const batch *b, launch *chain);

/* Soft MoE, N = E p columns: x -> xe, mix, pair_weights and a plan of constant buckets. */
clmoe_status step_soft_moe_dispatch(const batch *b, launch *chain);
/* ye -> mixed: what step_combine() takes as one pair per token, of weight 1. */
clmoe_status step_soft_moe_combine(const batch *b, launch *chain);
/* Backward. x -> rows of slots again, without the logits, which are saved. */
clmoe_status step_soft_moe_dispatch_again(const batch *b, launch *chain);
/* dy -> rows of slots: the gradient on ye. */
clmoe_status step_soft_moe_combine_backward(const batch *b, launch *chain);
/* dy, ye -> the gradient on the combine weights. */
clmoe_status step_soft_moe_weights_backward(const batch *b, launch *chain, clmoe_buf ye);
/* dxe, and that gradient -> dlogits, and router_dx, all of dx but the shared expert's part: what
 * step_dispatch_backward() takes as dxe, one pair per token, of weight 1. */
clmoe_status step_soft_moe_dispatch_backward(const batch *b, launch *chain);
clmoe_status step_soft_moe_gradients(const batch *b, launch *chain);

/* ---- dispatch -------------------------------------------------------------------------------- */

/* ids -> plan; with overflow reroute and scores, ids and pair_weights are changed. */
clmoe_status step_plan(const batch *b, launch *chain);
/* The arguments of kernels that make a plan in one group, as PLAN_ARRAYS and behind, of plan.clh.
 */
#define PLAN_ARRAYS(b)                                                                             \
    ARG_F32(PLAN_ARRAY(b, load)), ARG_F32(PLAN_ARRAY(b, kept)), ARG_F32(PLAN_ARRAY(b, offsets)),   \
        ARG_F32(PLAN_ARRAY(b, rerouted_in)), ARG_F32(PLAN_ARRAY(b, rerouted_out)),                 \
        ARG_F32(PLAN_ARRAY(b, slot_of)), ARG_F32(PLAN_ARRAY(b, pair_of)),                          \
        ARG_F32(PLAN_ARRAY(b, token_of)), ARG_F32(PLAN_ARRAY(b, tile_expert))
#define PLAN_SIZES(b)                                                                              \
    ARG_AS(experts, ARG_UINT((b)->layer->desc.num_experts)),                                       \
        ARG_UINT(layer_is_dropless((b)->layer)), ARG_UINT((b)->ws.plan.capacity),                  \
        ARG_AS(bucket, ARG_UINT(plan_bucket(b))), ARG_UINT((b)->ws.plan.slots),                    \
        ARG_UINT((b)->ws.plan.row_tile)
/* Rows of a bucket before they are rounded; of dropless layers 0. */
static inline uint32_t plan_bucket(const batch *b) {
    return layer_sequences(b->layer, b->tokens) * b->ws.plan.capacity;
}
/* For layers that sort (layer_sorts()): the order of plan.cl's walk, in a region of scratch. */
clmoe_status step_sort(const batch *b, launch *chain, clmoe_buf *order);
/* Overflow reroute: the end of step_plan(). The choice is kept; where there are scores, moved. */
clmoe_status step_reroute_begin(const batch *b, launch *chain);
clmoe_status step_reroute(const batch *b, launch *chain);
/* pair_weights in place, after the plan: what renorm.after_drop asks for. */
clmoe_status step_plan_renorm(const batch *b, launch *chain);
/* ids, plan -> physical_ids: of the copies of experts that placement made. */
clmoe_status step_plan_replicate(const batch *b, launch *chain);
/* experts_x -> xe. */
clmoe_status step_dispatch(const batch *b, launch *chain);
/* ye, shared_y, residual -> y. */
clmoe_status step_combine(const batch *b, launch *chain);

/* ---- experts --------------------------------------------------------------------------------- */

/* xe, or experts_x gathered through the plan -> ye. */
clmoe_status step_experts(const batch *b, launch *chain);
/* Whether the activations of an MLP are dropped out: with a state; and its random stream. */
bool mlp_drops_out(const batch *b, clmoe_mlp which);
uint32_t dropout_use(clmoe_mlp which);
/* Activations in place, where they are. */
clmoe_status step_hidden_dropout(const batch *b, launch *chain, clmoe_mlp which, clmoe_buf hidden);
/* ye [S,D] in place; rows of padding are left alone. */
clmoe_status step_normalize(const batch *b, launch *chain, clmoe_buf ye);
/* experts_x -> shared_y, and shared_gate [T] if the layer has one. */
clmoe_status step_shared(const batch *b, launch *chain);

/* ---- backward -------------------------------------------------------------------------------- */

/*
 * Whether the gradient on the experts' outputs is more than a row of dy times a weight: then its
 * rows are made of the outputs, which are computed again.
 */
bool experts_have_output_rows(const batch *b);
/* dy, gathered; or rows of slots, where an engine does not gather, or of the outputs' gradient. */
gemm_rows experts_dy_rows(const batch *b);
/* x as the gradient of gate and up takes it: gathered, or rows of slots. */
gemm_rows experts_x_rows(const batch *b);
/*
 * x, or its rows of slots where the engine does not gather -> z, where it was not kept, and ye, as
 * down gives it, in the place of dxe, where there are output rows.
 */
clmoe_status step_experts_again(const batch *b, launch *chain);
/* dy, or its rows -> dh, dz, dots of the experts' slots, then dxe. */
clmoe_status step_experts_backward(const batch *b, launch *chain);
/* dy, x, and what step_experts_backward() left -> the gradients of the experts' weights. */
clmoe_status step_experts_gradients(const batch *b, launch *chain);
/* The same of the shared expert and its gate: shared_dx, and the gradients. */
clmoe_status step_shared_backward(const batch *b, launch *chain);
clmoe_status step_shared_gradients(const batch *b, launch *chain);
/* dy, dots -> dpair_weights. */
clmoe_status step_combine_backward(const batch *b, launch *chain);
/* dpair_weights, dlogits -> dlogits_out, dnoise_out; of the choices that were made, by whom ever.
 */
clmoe_status step_topk_backward(batch *b, launch *chain);
/* The weights [pairs] f32 of those choices before they were rebalanced, from the logits. */
clmoe_status step_chosen_weights(const batch *b, launch *chain, clmoe_buf to);
/* dpair_weights, whose place is in scratch afterwards: on the weights before. */
clmoe_status step_rebalance_backward(batch *b, launch *chain);
/* The logits the choice was made of, and with learned noise the ones before, x Wn^T and its
 * gradient, given and made.
 */
typedef struct chosen_logits {
    clmoe_buf noisy, clean, noise_raw, dnoise, dnoise_out;
} chosen_logits;

chosen_logits chosen_logits_of(const batch *b);
clmoe_status step_expert_scale_gradient(const batch *b, launch *chain);
/* dlogits_out -> router_dx; and the gradients of the router. */
clmoe_status step_score_backward(batch *b, launch *chain);
clmoe_status step_score_gradients(const batch *b, launch *chain);
/* dxe, shared_dx, router_dx -> dx. */
clmoe_status step_dispatch_backward(const batch *b, launch *chain);

/* With a mask: the list of tokens that are not masked. */
clmoe_status step_unmasked(const batch *b, launch *chain);
/* x -> rows of slots. */
clmoe_status step_dispatch_rows(const batch *b, launch *chain, clmoe_buf x, clmoe_buf xe);
/* x -> rows of slots times the weights of their pairs. */
clmoe_status step_weighted_rows(const batch *b, launch *chain, clmoe_buf xe);

/*
 * dy, dye, and ye as down gave it -> the gradient on ye, rows of slots, and dots: with
 * normalize_experts, or dye.
 */
clmoe_status step_output_backward(const batch *b, launch *chain, clmoe_buf ye, clmoe_buf rows);

/* Rows that go back through an activation, and what else goes in and out: activation.cl. */
typedef struct activation_rows {
    clmoe_buf z, dh, dz, dots;
    gemm_z z_at, dz_at;
    clmoe_buf pair_of, pair_weights, token_mask;
    bool gates; /* pair_weights are logits of gates, and their sigmoid counts */
} activation_rows;

clmoe_status step_activation_backward(const batch *b, launch *chain, clmoe_mlp which,
                                      const activation_rows *rows);

/* to [experts,n] = sum of rows of an expert's bucket, times weights if given. */
typedef struct bias_call {
    clmoe_buf offsets, kept, token_of; /* not given: one expert, all rows */
    uint32_t slots, experts, n;
    gemm_rows rows;
    clmoe_buf pair_of, pair_weights, token_mask;
    bool gates; /* pair_weights are logits of gates, and their sigmoid counts */
    clmoe_buf to;
} bias_call;

clmoe_status step_bias_gradient(const batch *b, launch *chain, kernel_id id, const bias_call *call);
/* Those of an MLP, from rows dz, and from rows dy as `down` has them. */
clmoe_status step_mlp_bias_gradients(const batch *b, launch *chain, clmoe_mlp which,
                                     const bias_call *down, clmoe_buf dz);

/* The gradients of output_bias, from dy, and of router_bias, from dlogits_out. */
clmoe_status step_output_bias_gradient(const batch *b, launch *chain);
clmoe_status step_router_bias_gradient(const batch *b, launch *chain);

/* ---- balance --------------------------------------------------------------------------------- */

/*
 * The balance pass: what the tokens, the sequences or the batch add up to, in REGION_SUMS.
 * Statistics and losses of one batch share one pass.
 */
typedef struct sums {
    uint32_t asked;             /* SUM_BIT, COUNT_BIT, DEVICE_BIT, INVALID_BIT of balance.clh */
    clmoe_buf noisy, noise_raw; /* [T,R] f32; noisy: the clean logits where there is no noise */
    clmoe_buf p_logits; /* [T,R] f32: p is made of them; noisy, or with two levels the joint ones */
    clmoe_buf scores;   /* [T,R] f32: what first and fresh choices are the best of */
    sums_shape shape;   /* written by step_sums() */
} sums;

/* The softcap and temperature from p_logits to l': those of two levels are l' already. */
router_switches p_switches(const clmoe_layer *layer);
static inline clmoe_buf p_state(const batch *b) {
    return b->layer->desc.router.groups.two_level ? (clmoe_buf){0} : b->state;
}

clmoe_status step_sums(const batch *b, launch *chain, sums *in);

/* Two levels: the noisy logits and the group logits -> p_logits, and a gradient on them of 0. */
clmoe_status step_joint(const batch *b, launch *chain, const sums *in);
/* The gradient in REGION_JOINT_GRADIENT is added to dlogits, dnoise and dgroup_logits. */
clmoe_status step_joint_gradient(const batch *b, launch *chain, const sums *in, clmoe_buf dnoise);

/* What statistics and losses ask of the sums, and do with them. */
uint32_t stats_asks(const batch *b);
clmoe_status stats_finish(const batch *b, launch *chain, const sums *in);
uint32_t loss_asks(const batch *b);
clmoe_status loss_finish(const batch *b, launch *chain, const sums *in);

/* The quantile rule: scores [T,E], cutoffs -> bias_counts; those -> the momentum of the state. */
clmoe_status step_bias_counts(const batch *b, launch *chain, clmoe_buf scores, clmoe_buf cutoffs);
clmoe_status step_bias_quantile(const clmoe_layer *layer, launch *chain,
                                const clmoe_balance_args *args);

#endif
