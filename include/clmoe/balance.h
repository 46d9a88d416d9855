/*
 * clmoe, the balance of the load: statistics, losses, the state and its controllers. Part of
 * clmoe.h, which includes it.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * Words. n = E, the experts with weights; c_e = pairs that chose expert e, before dropping and
 * rerouting; F_e = c_e / sum of c over E; p_t = the scores s(l) of token t divided by their sum
 * over the R columns; P_e = mean of p_te over the unmasked tokens; Q = the target distribution,
 * uniform unless load_target is given; T counts unmasked tokens. Masked tokens and surplus pairs
 * count nowhere; identity experts have no F and no P. A logit that is not finite has p = 0. The
 * scores of sparsemixer are those of softmax here. A quotient whose divisor is 0 is 0.
 *
 * The choice is the router's, before overflow reroute, in all statistics and losses: load,
 * weight_sums, device_tokens, F. Only kept, dropped and rerouted tell what became of it.
 *
 * With two levels p_te = G_tg q_te, the router's own product before groups are picked: G = softmax
 * of the group logits u = x Wg^T, q = softmax of l within the group g of e. Then, for d_e = dL /
 * dlog p_e as softmax has it and D_g = its sum over the group, dL/dl_e = d_e - q_e D_g and dL/du_g
 * = D_g - G_g sum D. P_RAW is log p there, and P_SOFTMAX is p.
 *
 * All but sizes, names, clmoe_state_init() and clmoe_router_orthogonality() needs a layer with
 * balance.enabled or training, and is CLMOE_UNSUPPORTED in others. Every args struct begins with
 * its size, as in steps.h; clmoe_balance_args alone has defaults that are not 0.
 */
#ifndef CLMOE_BALANCE_H
#define CLMOE_BALANCE_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Statistics ---------------------------------------------------------------------------- */

/*
 * What a batch did to the load, on the device: this header, then nine arrays in this order, of four
 * bytes an element:
 *
 *   load        [R] u32  c
 *   kept        [R] u32  rows of the expert's bucket in use, rerouted ones included
 *   dropped     [R] u32  pairs that chose the expert and found no place anywhere
 *   rerouted    [R] u32  rows of the bucket that came from another choice
 *   importance  [R] f32  sum over tokens of p = T P
 *   weight_sums [R] f32  sum of the combine weights of the pairs that chose it, before dropping;
 *                        with renorm.after_drop, of the pairs that ended there
 *   ema         [R] f32  the state's average of F as clmoe_balance_update() left it; 0 without one
 *   idle_tokens [R] u32  unmasked tokens since a batch in which the expert was chosen, this batch
 *                        included, at most 2^32 - 1; without a state, of this batch
 *   device_tokens [device_groups] u32  distinct tokens that chose an expert of the group
 *
 * Every field has four bytes, so the host reads the same struct. pairs = kept + dropped.
 * Identity experts keep all their pairs. With external ids and no logits, p is not known: its
 * fields are 0.
 */
typedef struct clmoe_stats {
    uint32_t version;        /* 1: of this layout; compare it before old statistics are read */
    uint32_t tokens;         /* unmasked tokens */
    uint32_t columns;        /* R: length of each array */
    uint32_t pairs;          /* sum of load over R */
    uint32_t kept;           /* sum of kept over R */
    uint32_t dropped;        /* sum of dropped over R */
    uint32_t identity_pairs; /* sum of load over the identity experts */
    /*
     * unmasked tokens with fewer than K experts to choose from; 0 with expert choice and keep rule
     * round, where tokens have no K pairs
     */
    uint32_t nonfinite_tokens;
    uint32_t idle_experts; /* of the E experts with weights, those with load 0 */
    uint32_t max_load;     /* over the E experts with weights */
    uint32_t min_load;
    float max_violation; /* MaxVio = max_load / mean load - 1 over the E experts; 0 without load */
    float load_entropy;  /* -sum F log F in nats; at most log E */
    uint32_t rerouted;   /* sum of rerouted over R */
    /* sum over E, and sequences, of min(c_e, C), the state's C_eff; sum of c when dropless */
    uint32_t used_capacity;
    float drop_rate;            /* dropped / pairs; 0 without pairs */
    float load_variance;        /* sum (F_e - 1/n)^2 */
    float load_cv2;             /* squared coefficient of variation of c, population variance */
    float importance_variance;  /* sum (P_e / sum P - 1/n)^2 */
    float importance_cv2;       /* CV^2 of the importance over E */
    float weights_cv2;          /* CV^2 of weight_sums over E */
    float load_divergence;      /* KL(F||Q) = sum F log(F / Q) in nats */
    float target_distance;      /* 1/2 sum (F_e - Q_e)^2 */
    float target_change;        /* target_distance - that of the state's previous F; 0 without */
    float fluctuation;          /* sum |F_e - previous F_e|; 0 without one */
    float token_entropy;        /* mean over tokens of -sum p log p, in nats */
    float confidence;           /* mean over tokens of max p */
    float mean_logsumexp;       /* mean over tokens of log sum exp of the noisy logits over R */
    uint32_t dead_experts;      /* of the E, those with idle_tokens >= balance.dead_window */
    float dead_parameter_share; /* dead_experts / E: of the experts' parameters */
    uint32_t device_groups;     /* length of device_tokens */
    uint32_t max_device_tokens; /* largest of device_tokens */
    /* external ids outside [0,R) of unmasked tokens: no pairs, they count nowhere else */
    uint32_t invalid_ids;
    uint32_t reserved[15]; /* 0 */
} clmoe_stats;

/* Bytes of a layer's statistics: sizeof(clmoe_stats) + (8 R + device_groups) * 4. */
CLMOE_API clmoe_status clmoe_stats_size(const clmoe_layer *layer, size_t *bytes);

/*
 * Host statistics, a copy of the device's bytes, as text for people: every field with its name,
 * then a table with a row per expert. As snprintf() does, it writes as much as `text` of `size`
 * bytes holds, with a 0 at the end, and gives the length of the whole text without it; text NULL
 * and size 0 ask for that alone, and length may be NULL. Errors: CLMOE_INVALID_ARGUMENT if `bytes`
 * do not fit the header's columns and device_groups.
 */
CLMOE_API clmoe_status clmoe_stats_format(const void *stats, size_t bytes, char *text, size_t size,
                                          size_t *length);

/*
 * Their names, for programs that log them: field `index` of the header, which lies at *offset, and
 * array `index` of the [R] ones behind it; NULL past the last. *is_float: 1 f32, 0 u32. Pointers
 * may be NULL.
 */
CLMOE_API const char *clmoe_stats_field(uint32_t index, size_t *offset, uint32_t *is_float);
CLMOE_API const char *clmoe_stats_array(uint32_t index, uint32_t *is_float);

/* stats: what forward computes if asked for stats. */
typedef struct clmoe_stats_args {
    size_t struct_size;
    uint32_t tokens;
    /* noise_router, with learned noise and a state; group_router, with two levels; for logits */
    const clmoe_weights *weights;
    clmoe_buf x;            /* [T,D], likewise */
    clmoe_buf logits;       /* optional [T,R] f32, as clmoe_score() gives them */
    clmoe_buf ids;          /* [pairs] i32 */
    clmoe_buf pair_weights; /* optional [pairs] f32 */
    clmoe_buf plan;
    clmoe_buf live;          /* optional [T] i32, as in plan */
    clmoe_buf token_mask;    /* optional [T] u8 */
    clmoe_buf token_offsets; /* [T+1] i32, as in plan: optional, or needed */
    clmoe_buf state;         /* optional */
    clmoe_buf load_target;   /* optional [E] f32, as in clmoe_loss_args */
    clmoe_buf scratch;
    clmoe_buf stats;
} clmoe_stats_args;

CLMOE_API clmoe_status clmoe_stats_compute(clmoe_layer *layer, cl_command_queue queue,
                                           const clmoe_stats_args *args, cl_uint num_wait,
                                           const cl_event *wait, cl_event *event);

/* ---- Losses -------------------------------------------------------------------------------- */

/*
 * A loss L(F) of the load has no gradient: F counts. The straight-through recipe puts the smooth P
 * beside it: g_e = dL/dF_e, taken at F and held fixed, is the gradient on P_e, and
 *
 *   dlogits_tj += weight * s'(l_j) * (g_j - sum_i p_i g_i) / (T * S_t),   S_t = sum_i s(l_i),
 *
 * through temperature (1 / tau) and softcap (1 - (l'/c)^2). Below, eps = 1 / (2 T K). With
 * per_device, F, P, Q and n are those of the device groups: sums over the experts of each, n = D.
 */
typedef uint32_t clmoe_loss_kind;
enum {
    /* n sum F_e P_e; g = n F. GShard, Switch Transformer (arXiv 2101.03961); HF's is K times it. */
    CLMOE_LOSS_SWITCH = 0,
    CLMOE_LOSS_SQUARED = 1, /* 1/2 sum (F_e - Q_e)^2; g = F - Q */
    /* sum F_e log(F_e / Q_e), for uniform Q sum F_e log F_e; g = log(max(F_e, eps) / Q_e) + 1 */
    CLMOE_LOSS_ENTROPY = 2,
    CLMOE_LOSS_L1 = 3,      /* sum |F_e - Q_e|; g = sign(F_e - Q_e), in integers if Q is uniform */
    CLMOE_LOSS_MAX = 4,     /* max F; g = 1 at the first largest */
    CLMOE_LOSS_MINIMAX = 5, /* logsumexp(beta F) / beta; g = softmax(beta F); beta 0: 10 n */
    /*
     * v = mean (I_e - m)^2, m = mean I, I = P, or with p_source weights the sums of the weights / T
     */
    CLMOE_LOSS_IMPORTANCE_VARIANCE = 6,
    /* v / (m^2 + 1e-10): Shazeer et al. 2017, arXiv 1701.06538 */
    CLMOE_LOSS_IMPORTANCE_CV2 = 7,
    CLMOE_LOSS_LOAD_CV2 = 8, /* CV^2 of F, straight-through */
    /*
     * CV^2 of Load_e = sum_t Phi((l_te - thr_te) / sigma_te): Shazeer et al. 2017, V-MoE. l the
     * clean logits, sigma the deviation of the noise, thr = the (K+1)-th largest noisy logit if e
     * is chosen, else the K-th, held fixed. Through l and, with learned noise, sigma. An expert
     * that dropout masked is left out of Load. Needs token choice, gaussian or learned noise, a
     * state, K < E, and no groups or selection bias.
     */
    CLMOE_LOSS_SMOOTH_LOAD = 9,
    /*
     * sum_d f_d P_d, f_d = D / (M T) * distinct tokens sent to device group d; g = f of e's group.
     * M is how many device groups a token can reach: groups.topk if the router's groups
     * are the device groups (groups.count = device_groups, no identity experts), else D.
     * DeepSeek-V2, arXiv 2405.04434. Needs device_groups, and f_source assigned.
     */
    CLMOE_LOSS_COMMUNICATION = 10,
    /*
     * sum over the E experts of max(c_e - C, 0) / (T K), C the state's C_eff: the share of the
     * pairs that C has no place for. With tokens_per_sequence, c_e is that of one sequence, over
     * the batch the sum is over all sequences too, and T is the batch's: 0 where nothing drops.
     * g = 1 for the tokens of a sequence with c_e > C. Needs a capacity, and an f_source that
     * counts the batch: not ema, not supplied.
     */
    CLMOE_LOSS_OVERFLOW = 11,
    /* mean logsumexp(l)^2 over R, l the noisy logits before softcap: ST-MoE, arXiv 2202.08906 */
    CLMOE_LOSS_Z = 12,
    /* -mean over tokens of H(p_t), p_source normalised or softmax: minimising it raises entropy */
    CLMOE_LOSS_TOKEN_ENTROPY = 13,
};

/* What P is. */
typedef uint32_t clmoe_p_source;
enum {
    CLMOE_P_NORMALISED = 0, /* s(l) over its row's sum */
    /* s(l) itself: dlogits += weight * s'(l_j) g_j / T. For score softmax, l. No token entropy. */
    CLMOE_P_RAW = 1,
    CLMOE_P_SOFTMAX = 2, /* softmax of l after softcap and temperature, whatever the score: HF */
    /*
     * The combine weights of the chosen; importance kinds only. CLMOE_UNSUPPORTED with sparsemixer,
     * two levels and rebalancing.
     */
    CLMOE_P_WEIGHTS = 3,
};

/* What F counts. */
typedef uint32_t clmoe_f_source;
enum {
    CLMOE_F_ASSIGNED = 0, /* the ids of the batch */
    /*
     * A top-k of the scores, as clmoe_score() gives them, without select_bias and groups, ties to
     * the lower id: Megatron-Core. With two levels, of p.
     */
    CLMOE_F_FRESH = 1,
    /*
     * First choices only: GShard. A token's first pair; with all experts, expert choice, two levels
     * and keep rule round, whose pairs come in another order, the one of its pairs with the largest
     * score, or p, ties to the lower id.
     */
    CLMOE_F_FIRST = 2,
    CLMOE_F_EMA = 3, /* the state's average; not per_sequence */
    /* args.load_supplied, all-reduced over ranks or batches; not per_sequence */
    CLMOE_F_SUPPLIED = 4,
};

/*
 * One loss. {.kind = ..., .weight = ...} is a useful start: everything else may be 0. It grows at
 * its end, see loss_size.
 */
typedef struct clmoe_loss_desc {
    clmoe_loss_kind kind;
    float weight;
    clmoe_p_source p_source;
    clmoe_f_source f_source;
    /*
     * 1: computed for each sequence of capacity.tokens_per_sequence tokens, the value and the
     * gradient being the mean over the sequences that have an unmasked token (DeepSeek-V3).
     */
    uint32_t per_sequence;
    /* 1: over the balance.device_groups (DeepSeek-V2); not overflow, z and token entropy. */
    uint32_t per_device;
    uint32_t controlled; /* 1: weight is multiplied by the state's loss_weight */
    float beta;          /* of minimax */
} clmoe_loss_desc;

/* loss: what forward computes if asked for losses. */
typedef struct clmoe_loss_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_loss_desc *losses; /* 1 to 16, added up in this order */
    uint32_t num_losses;
    /*
     * Bytes from one of them to the next, sizeof(clmoe_loss_desc); 0: that of version 0.2. Set it
     * where you use fields that came later.
     */
    size_t loss_size;
    /*
     * noise_router, with learned noise and a state; group_router, with two levels; expert_scale,
     * for dlogits by p_source weights
     */
    const clmoe_weights *weights;
    clmoe_buf x;            /* [T,D], with learned noise and a state, or two levels */
    clmoe_buf logits;       /* [T,R] f32, as clmoe_score() gives them: the clean ones */
    clmoe_buf ids;          /* [pairs] i32 */
    clmoe_buf pair_weights; /* [pairs] f32; needed by p_source weights */
    clmoe_buf plan;
    clmoe_buf live;          /* optional [T] i32, as in plan */
    clmoe_buf token_mask;    /* optional [T] u8 */
    clmoe_buf token_offsets; /* [T+1] i32, as in plan: optional, or needed */
    clmoe_buf state;         /* optional; needed by F_EMA, `controlled` and SMOOTH_LOAD */
    /*
     * Optional [E] f32, positive: Q, divided by its sum. Where that is not positive and finite, Q
     * is uniform.
     */
    clmoe_buf load_target;
    clmoe_buf load_supplied; /* [E] f32, counts or shares by their sum; needed by F_SUPPLIED */
    clmoe_buf scratch;
    clmoe_buf values;  /* [num_losses] f32, without weight; of this and the next two at least one */
    clmoe_buf dlogits; /* optional [T,R] f32: the gradient of sum weight * loss is added */
    clmoe_buf dnoise;  /* optional [T,R] f32: the same for x Wn^T */
    /* optional [T,groups.count] f32: the same for x Wg^T, with two levels */
    clmoe_buf dgroup_logits;
} clmoe_loss_args;

CLMOE_API clmoe_status clmoe_loss(clmoe_layer *layer, cl_command_queue queue,
                                  const clmoe_loss_args *args, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event);

/* "switch", "squared", ...: the name of a kind, NULL past the last. */
CLMOE_API const char *clmoe_loss_name(clmoe_loss_kind kind);

/*
 * A loss of the router's weights alone, without tokens: that its rows are orthogonal, so that
 * experts are chosen by different directions of x. With w_i the rows of weights.router, all of
 * them, those of identity experts and, with Soft MoE, of slots too, and c_ij the cosine of w_i and
 * w_j,
 *
 *   value       = sum over i and j != i of c_ij^2
 *   drouter_i  += weight * 4 sum over j != i of c_ij (w_j / |w_j| - c_ij w_i / |w_i|) / |w_i|
 *
 * The sum of (c_ij - delta_ij)^2 of ERNIE 4.5, each pair counted twice. Baidu's training code takes
 * the mean over the matrix of cosines: weight / rows^2 here. The gradient is orthogonal to its row
 * and as large as 1 / |w_i|. A row of norm 0, or below 2^-126, has cosines 0 and gradient 0; one
 * with a value that is not finite makes value and gradients NaN. Sums are f32, in an order that is
 * the same for every call.
 *
 * Enqueue it once per step of the optimizer, after the last clmoe_backward() of the step has
 * written or added to gradients.router: it adds, whatever `accumulate` is there. `scratch` holds
 * nothing afterwards that CLMOE_BACKWARD_WEIGHTS could read.
 *
 * Errors: CLMOE_UNSUPPORTED for a layer with balance.router_orthogonality 0.
 */
typedef struct clmoe_router_orthogonality_args {
    size_t struct_size;
    const clmoe_weights *weights; /* router */
    float weight;                 /* finite */
    uint32_t reserved;            /* 0 */
    clmoe_buf scratch;            /* of any number of tokens */
    clmoe_buf value;              /* [1] f32, without weight; of this and the next at least one */
    /* [R,D] as gradients.router, of desc.gradient_type: the gradient of weight * value is added */
    clmoe_buf drouter;
} clmoe_router_orthogonality_args;

CLMOE_API clmoe_status clmoe_router_orthogonality(clmoe_layer *layer, cl_command_queue queue,
                                                  const clmoe_router_orthogonality_args *args,
                                                  cl_uint num_wait, const cl_event *wait,
                                                  cl_event *event);

/* ---- State --------------------------------------------------------------------------------- */

/*
 * What lives from batch to batch, in a device buffer of the caller's: this header, then five arrays
 * [R]: select_bias f32, ema f32 (average of F), previous f32 (F of the last batch), idle_tokens
 * u32, momentum f32 (m of CLMOE_BIAS_SMEBU; CLMOE_BIAS_QUANTILE leaves the quantiles there). A copy
 * of the bytes is a checkpoint: restored, the run continues bit for bit. clmoe_forward() and the
 * steps only read it; clmoe_balance_update() writes it. Every field has four bytes.
 *
 * A state is for layers of its R. Calls check the size of the buffer, but not what is in it: before
 * you restore one, compare its version and columns. A state of more columns than the layer's gives
 * wrong numbers, but no access out of bounds; clmoe_balance_update() leaves a state with another
 * version or columns as it is. Version 1 had no momentum, and is too short for these calls;
 * clmoe_state_check() tells what is wrong with bytes on the host.
 *
 * Random numbers are Philox4x32-10 with the key `seed` and the counter {token, column, step, use},
 * use = 1 noise, 2 logit dropout, 3 expert dropout (token 0), 4 the keep rule random (the choice k
 * as column; the largest bits come first), 5 jitter (the element of x as column), 6 dropout of the
 * experts' activations (the pair as token, with Soft MoE the row of weights.router; column c and
 * word i: element 4 c + i), 7 the same of the shared expert (the token itself): the same on every
 * device, whatever the group size. Dropped is what has a uniform number below the probability. A
 * uniform number is (first word / 2^9 + 1/2) / 2^23, the division whole; a normal one comes from
 * the first two words by Box and Muller.
 */
typedef struct clmoe_state {
    uint32_t version; /* 2 */
    uint32_t columns; /* R */
    uint32_t seed[2];
    uint32_t step;           /* batches so far; as updates and idle_tokens at most 2^32 - 1 */
    uint32_t updates;        /* batches with load, of which ema and previous know */
    float noise_scale;       /* multiplies the noise and the jitter; 1 at first */
    float temperature_scale; /* multiplies router.temperature; 1 at first */
    float loss_weight;       /* multiplies the controlled losses; 1 at first */
    float capacity_scale;    /* C_eff = max(1, ceil(capacity_scale * C)); 1 at first */
    uint32_t reserved[6];
} clmoe_state;

/* Bytes of the state of a layer: sizeof(clmoe_state) + 20 R. */
CLMOE_API clmoe_status clmoe_state_size(const clmoe_layer *layer, size_t *bytes);

/* Enqueues the first state: step 0, scales 1 (see clmoe_balance_start()), arrays 0. */
CLMOE_API clmoe_status clmoe_state_init(clmoe_layer *layer, cl_command_queue queue, clmoe_buf state,
                                        uint64_t seed, cl_uint num_wait, const cl_event *wait,
                                        cl_event *event);

/*
 * Whether `bytes` of host memory, a copy of a state, are one for this layer: before it is restored.
 * CLMOE_INVALID_ARGUMENT names the version, the columns or the size that is not.
 */
CLMOE_API clmoe_status clmoe_state_check(const clmoe_layer *layer, const void *state, size_t bytes);

/* ---- Controllers --------------------------------------------------------------------------- */

typedef uint32_t clmoe_bias_rule;
enum {
    CLMOE_BIAS_NONE = 0,
    /* b_e += rate * sign(mean c - c_e), in integers: loss-free balancing, arXiv 2408.15664 */
    CLMOE_BIAS_SIGN = 1,
    CLMOE_BIAS_PROPORTIONAL = 2, /* b_e += rate * (mean c - c_e) / mean c */
    /*
     * Without a rate: b_e = the K/E quantile over the tokens of r_te = cutoff_t - s_te, the bias
     * with which K/E of them would have chosen e, minus the mean over E. cutoff_t is the (K+1)-th
     * largest of s + b over token t, s the scores of the router, b the state's bias. Su Jianlin's
     * series on MoE, part 6; Kimi K3, torchtitan. r comes as counts, see clmoe_bias_counts().
     */
    CLMOE_BIAS_QUANTILE = 3,
    /*
     * v = (mean c - c)/mean c; d = rate * tanh(kappa v), minus its mean over E;
     * m = beta m + (1 - beta) d; b += m: Arcee Trinity Large
     */
    CLMOE_BIAS_SMEBU = 4,
    /* The sign rule on the sums of c over balance.device_groups: one change per group of experts */
    CLMOE_BIAS_DEVICE = 5,
};

/* What is brought to a mean of 0 over E. */
enum {
    CLMOE_CENTRED_NONE = 0,
    CLMOE_CENTRED_BIAS = 1,  /* the bias, after the step */
    CLMOE_CENTRED_DELTA = 2, /* the step: torchtitan; SMEBU always */
};

/*
 * The counts of CLMOE_BIAS_QUANTILE, [E, CLMOE_BIAS_BINS] u32: how many tokens have d_te = r_te -
 * b_e, the way that b_e would go for them, in each of the bins. These are the narrower the nearer
 * to 0, where b_e comes to rest: 25 to each power of two, of one width, from 2^-18 to 4.
 * Bin 500 + i is of d >= 0, from 2^(i div 25 - 18) (1 + (i mod 25) / 25) on, bin 500 from 0 on; bin
 * 499 - i of d < 0 with the same |d|; the first and the last take what is beyond. Masked tokens,
 * and those with no more than K finite scores, are not counted; a score that is not finite is in
 * the last bin. Counts of micro-batches and ranks add up, to at most 2^32 - 1 tokens, as long as b
 * is the same for all of them and when clmoe_balance_update() reads them: count with the state as
 * the last update left it. The new bias is b_e + d of rank ceil(n K / E) among the n tokens
 * counted, linear inside its bin, so within 4 % of the way it goes, or 2^-18; with none counted the
 * bias is only centred.
 *
 * Needs token choice with select_bias, score softmax or sigmoid and K < E, order score then top-k,
 * no groups, no identity experts; CLMOE_UNSUPPORTED names what a layer has otherwise.
 */
enum { CLMOE_BIAS_BINS = 1000 };

/* Bytes of a layer's counts: 4 E CLMOE_BIAS_BINS. */
CLMOE_API clmoe_status clmoe_bias_counts_size(const clmoe_layer *layer, size_t *bytes);

/* bias_counts: what forward adds to them if they are given. */
typedef struct clmoe_bias_counts_args {
    size_t struct_size;
    uint32_t tokens;
    uint32_t accumulate;          /* 0: the counts of this batch; 1: added to what is there */
    const clmoe_weights *weights; /* noise_router, with learned noise */
    clmoe_buf x;                  /* [T,D], likewise */
    clmoe_buf logits;             /* [T,E] f32, as clmoe_score() gives them */
    clmoe_buf token_mask;         /* optional [T] u8 */
    clmoe_buf state;
    clmoe_buf scratch;
    clmoe_buf bias_counts;
} clmoe_bias_counts_args;

CLMOE_API clmoe_status clmoe_bias_counts(clmoe_layer *layer, cl_command_queue queue,
                                         const clmoe_bias_counts_args *args, cl_uint num_wait,
                                         const cl_event *wait, cl_event *event);

typedef uint32_t clmoe_schedule_shape;
enum {
    CLMOE_SCHEDULE_NONE = 0, /* the state's value stays */
    CLMOE_SCHEDULE_LINEAR = 1,
    CLMOE_SCHEDULE_COSINE = 2,
    CLMOE_SCHEDULE_EXPONENTIAL = 3, /* start (end / start)^way; start and end > 0 */
};

/* From `start` at step `first` to `end` at step first + steps, constant before and after. */
typedef struct clmoe_schedule {
    clmoe_schedule_shape shape;
    float start, end;
    uint32_t first, steps; /* steps >= 1 */
    uint32_t reserved[3];
} clmoe_schedule;

/* What happens between two batches. clmoe_balance_args_init() sets the defaults. */
typedef struct clmoe_balance_args {
    size_t struct_size;
    clmoe_buf state;
    /*
     * Of the batch, from clmoe_forward() or clmoe_stats_compute(). They lie on the device, where
     * the update compares their version and columns: of others it leaves the state as it is, its
     * step too.
     */
    clmoe_buf stats;
    /*
     * The batch's load instead of that of stats: optional [R] u32, summed over ranks. MaxVio and F
     * follow from it; tokens and the drop rate stay those of stats.
     */
    clmoe_buf load;
    clmoe_bias_rule bias_rule;
    float bias_rate;        /* gamma, >= 0; default 1e-3; quantile has none */
    uint32_t bias_centred;  /* CLMOE_CENTRED_...; default 0 */
    float ema_decay;        /* b in [0,1): ema = b ema + (1 - b) F, the first F as it is; 0.9 */
    float target_violation; /* > 0: loss_weight *= exp(+-loss_rate) toward this MaxVio; default 0 */
    float loss_rate;        /* default 0.01 */
    float loss_min, loss_max; /* bounds of loss_weight; default 1e-3, 1e3 */
    /*
     * In [0,1): capacity_scale *= exp(+-capacity_rate), up where the drop rate is above it, down
     * where it is below; negative (default): off.
     */
    float target_drop_rate;
    float capacity_rate;  /* default 0.01 */
    float capacity_min;   /* lower bound of capacity_scale, in (0,1]; default 0.1; the upper is 1 */
    clmoe_schedule noise; /* of noise_scale; start and end >= 0 */
    clmoe_schedule temperature;  /* of temperature_scale; start and end > 0 */
    float bias_kappa, bias_beta; /* of SMEBU: > 0, default 2; in [0,1), default 0.5 */
    uint32_t reserved;           /* 0 */
    clmoe_buf bias_counts;       /* [E, CLMOE_BIAS_BINS] u32: needed by quantile, and only by it */
} clmoe_balance_args;

/* The same for a struct of `struct_size` bytes, from another language or another version. */
CLMOE_API void clmoe_balance_args_init_sized(clmoe_balance_args *args, size_t struct_size);

static inline void clmoe_balance_args_init(clmoe_balance_args *args) {
    clmoe_balance_args_init_sized(args, sizeof *args);
}

/*
 * Enqueues what the schedules say at the state's step, so that they hold for the first batch too:
 * after clmoe_state_init(), and where a run goes on with other schedules. Of args, state and the
 * schedules are read.
 */
CLMOE_API clmoe_status clmoe_balance_start(clmoe_layer *layer, cl_command_queue queue,
                                           const clmoe_balance_args *args, cl_uint num_wait,
                                           const cl_event *wait, cl_event *event);

/*
 * Enqueues the end of a step: select_bias, ema, previous, idle_tokens, the scales, then step + 1
 * (schedules are evaluated at the new step). A batch without load leaves all but idle_tokens, step
 * and the schedules alone. The identity experts' bias does not move. Nothing else advances a state:
 * a batch that is computed again (activation checkpointing), with the same state, gives the same
 * bits and counts once. Only what is added to, as dlogits and bias_counts, must be given to one of
 * the two. With external ids the layer needs no state, but for keep rule random. On an error midway
 * the state is undefined: keep a copy if that matters.
 */
CLMOE_API clmoe_status clmoe_balance_update(clmoe_layer *layer, cl_command_queue queue,
                                            const clmoe_balance_args *args, cl_uint num_wait,
                                            const cl_event *wait, cl_event *event);

#ifdef __cplusplus
}
#endif

#endif
