/*
 * clmoe: a Mixture-of-Experts layer on any OpenCL device.
 *
 * SPDX-License-Identifier: Apache-2.0
 *
 * This header is the manual. In five minutes:
 *
 *   1. clmoe_context_create()  binds an OpenCL context and one of its devices.
 *   2. clmoe_layer_desc_init() fills a descriptor with defaults; set the sizes and the switches.
 *   3. clmoe_layer_create()    checks the descriptor, picks an engine, compiles the kernels.
 *   4. clmoe_layer_memory()    tells how much device memory a batch of T tokens needs.
 *   5. clmoe_forward()         enqueues the whole layer on your queue and gives you an event.
 *   6. clmoe_backward()        in training, the gradients of x and of all weights: backward.h.
 *
 * examples/00_forward.c is that program in full, and more stand beside it. From a model directory,
 * clmoe_checkpoint_open() and clmoe_checkpoint_layer() do step 2, and clmoe_checkpoint_upload()
 * makes the weights.
 *
 * Words. T tokens, D model dim, E experts with weights, Z identity experts, R = E + Z columns of
 * the router, K experts per token (top_k), H hidden dim of an expert, C capacity (rows per expert),
 * S slots (rows of all buckets together). Arrays are row-major, the last dimension is contiguous.
 *
 * A layer is a chain of steps; each is also a call of its own, see steps.h:
 *
 *   score     x [T,D], router [R,D]   -> logits [T,R], scores [T,R]
 *   topk      scores                  -> ids [T,K], weights [T,K], live [T]
 *   plan      ids                     -> the plan: which row of which bucket each pair gets
 *   dispatch  x, plan                 -> xe [S,D]   (inside the first GEMM where an engine can)
 *   experts   xe, weights             -> ye [S,D]
 *   combine   ye, weights, plan       -> y [T,D]
 *   stats     logits, plan            -> clmoe_stats and its arrays
 *   loss      logits, plan            -> values of balancing losses, dlogits [T,R]
 *
 * checkpoint.h reads model directories. balance.h has statistics, losses, the state and the
 * controllers, place.h the placement of experts on devices; docs/balancing.md tells which model or
 * paper uses what. selftest.h tells whether a device computes what it should.
 *
 * Promises.
 *   - Nothing blocks and nothing is read back: a call enqueues work on your queue and returns. It
 *     allocates no memory and compiles nothing. The engine "clblast" is the one exception: it reads
 *     the rows per expert back to the host, and CLBlast allocates and compiles inside its calls.
 *   - Same device, same inputs, same bits, on every run. Ties go to the lower expert id.
 *   - You own the OpenCL context, the queues and all buffers. Sizes are asked for up front.
 *   - Bad input is an error before anything is enqueued; clmoe_last_error() names field and value.
 *   - Bad data never yields an id out of range: a NaN or infinite logit counts as -infinity.
 *   - In-order and out-of-order queues both work: see profile.h. Also a call with no
 *     tokens gives a valid event.
 *   - A context is thread-safe; a layer is used by one thread at a time.
 *   - Programs run with later libraries of the same ABI, and with earlier ones if they use nothing
 *     newer. A struct that begins with struct_size grows at its end: what an older one lacks has
 *     its default, and what only a newer one has must be 0. clmoe_loss_desc grows by loss_size. In
 *     all other structs `reserved` is room for later fields and must be 0, as {0} makes it;
 *     clmoe_buf and clmoe_profile_step never change. Named numbers are stored as uint32_t, as the
 *     size of an enum is up to the compiler.
 *   - Nothing is printed, nothing exits, no environment variable changes what is computed.
 *
 * Limits. 1 <= E, E + Z <= 4096, 1 <= K <= min(E + Z, 256) (all experts: K = E + Z), T*K <= 2^30.
 */
#ifndef CLMOE_CLMOE_H
#define CLMOE_CLMOE_H

/*
 * Declares all of OpenCL, as <CL/cl.h> does by itself, unless the application says which version it
 * is written for. The library itself calls nothing newer than 1.2.
 */
#ifndef CL_TARGET_OPENCL_VERSION
#define CL_TARGET_OPENCL_VERSION 300
#endif
#include <CL/cl.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* Before 1.0 a new minor version may break the ABI; the name of the shared library has both. */
#define CLMOE_VERSION_MAJOR 0
#define CLMOE_VERSION_MINOR 2
#define CLMOE_VERSION_PATCH 0

#if defined(_WIN32)
#define CLMOE_API
#else
#define CLMOE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- Status -------------------------------------------------------------------------------- */

/*
 * What every call returns. 0 is success; positive values are clmoe's; negative values are OpenCL's
 * own codes, unchanged (CL_OUT_OF_RESOURCES is -5 here too). On anything but success the outputs of
 * the call are NULL or undefined, and clmoe_last_error() has a sentence.
 */
typedef int32_t clmoe_status;
enum {
    CLMOE_SUCCESS = 0,
    CLMOE_INVALID_ARGUMENT = 1, /* an argument: NULL, too small a buffer, wrong offset */
    CLMOE_INVALID_DESC = 2,     /* a field of a descriptor, or two that contradict each other */
    CLMOE_UNSUPPORTED = 3,      /* right, but not something this device, engine or version can do */
    CLMOE_OUT_OF_MEMORY = 4,    /* host memory; the device's own shortage is an OpenCL code */
    CLMOE_BUILD_FAILED = 5,     /* a kernel did not compile; the context's callback has the log */
    CLMOE_ENGINE_FAILED = 6,    /* an engine's own library refused; the sentence has its code */
    CLMOE_IO = 7,               /* a file could not be opened or read */
    CLMOE_BAD_FILE = 8,         /* a file was read and is not what it should be */
};

/* The name of a status, of clmoe's or OpenCL's: "CLMOE_INVALID_DESC", "CL_OUT_OF_RESOURCES". */
CLMOE_API const char *clmoe_status_string(clmoe_status status);

/*
 * The sentence about the calling thread's last failed call: "top_k is 9, but num_experts is 8".
 * Never NULL; empty if nothing failed yet. Valid until the thread's next call.
 */
CLMOE_API const char *clmoe_last_error(void);

/* "0.2.0": the library's version at run time. */
CLMOE_API const char *clmoe_version(void);

/* ---- Buffers and types --------------------------------------------------------------------- */

/*
 * A place in device memory: a buffer and a byte offset into it, a multiple of the element size.
 * {NULL, 0} means "not given" wherever a field is optional. steps.h says which buffers may be used.
 */
typedef struct clmoe_buf {
    cl_mem mem;
    size_t offset;
} clmoe_buf;

/* Storage types. All arithmetic is f32; stores round to nearest even. */
typedef uint32_t clmoe_type;
enum {
    CLMOE_F32 = 0,
    CLMOE_F16 = 1,
    CLMOE_BF16 = 2,
};

typedef struct clmoe_context clmoe_context; /* see context.h */

/* ---- Layer descriptor ---------------------------------------------------------------------- */

/*
 * The score function s(l) of the router. Order of operations on the logits of a token:
 *   l = x Wr^T + router_bias; l = softcap * tanh(l / softcap); l = l / temperature; s(l).
 * A quotient past the largest float counts as that float: a finite logit stays one.
 */
typedef uint32_t clmoe_score_function;
enum {
    CLMOE_SCORE_SOFTMAX = 0,
    CLMOE_SCORE_SIGMOID = 1,
    CLMOE_SCORE_SQRT_SOFTPLUS = 2, /* sqrt(log(1 + exp(l))): DeepSeek-V4 */
    CLMOE_SCORE_IDENTITY = 3,      /* the logit itself, unnormalised: geometric MoE */
    /*
     * Sparsemixer in evaluation (Phi-3.5-MoE): chooses by the logits; the weight of choice k is
     * softmax over the logits not chosen before and with (m - l) / max(|l|, m) <= 2 *
     * sparsemixer_eps, m the logit of choice k. Weights of a token need not sum to 1. Needs
     * topk-then-score order.
     */
    CLMOE_SCORE_SPARSEMIXER = 4,
};

typedef uint32_t clmoe_order;
enum {
    CLMOE_ORDER_SCORE_THEN_TOPK = 0, /* choose by s(l); weights are s(l) of the chosen */
    CLMOE_ORDER_TOPK_THEN_SCORE = 1, /* choose by l; weights are s over the K chosen logits */
};

/* How a group of experts is scored when only groups.topk of groups.count take part. */
typedef uint32_t clmoe_group_score;
enum {
    CLMOE_GROUP_MAX = 0,      /* its best (biased) score: DeepSeek-V2 */
    CLMOE_GROUP_TOP2_SUM = 1, /* the sum of its two best (biased) scores: DeepSeek-V3 */
};

typedef uint32_t clmoe_renorm;
enum {
    CLMOE_RENORM_NONE = 0,
    CLMOE_RENORM_SUM = 1,   /* w / (sum of w + eps) */
    CLMOE_RENORM_PNORM = 2, /* w / (sum of |w|^p)^(1/p): DBRX */
};

/* Where a pair's weight multiplies. */
typedef uint32_t clmoe_weight_at;
enum {
    CLMOE_WEIGHT_AT_OUTPUT = 0,     /* the expert's output, its bias included */
    CLMOE_WEIGHT_AT_INPUT = 1,      /* the expert's input x: Llama 4 */
    CLMOE_WEIGHT_AT_ACTIVATION = 2, /* the hidden activation, before down: Megatron-Core */
};

/* Who chooses whom. */
typedef uint32_t clmoe_policy;
enum {
    CLMOE_POLICY_TOKEN_CHOICE = 0, /* each token its K best experts */
    /*
     * Each expert takes its C best tokens (Zhou et al. 2022, arXiv 2202.09368), ties to the lower
     * token; needs a capacity. A token gets 0 to E experts, in ascending id. Weights are the scores
     * as they are, times scale and expert_scale. The plan's pairs are E * C, and token_offsets say
     * which are whose; pairs that no token owns have id -1. Masked tokens and logits that are not
     * finite are never taken. Needs score-then-topk order and keep rule position; not with groups,
     * selection bias, renorm, rebalancing, identity experts, tokens_per_sequence or external ids.
     */
    CLMOE_POLICY_EXPERT_CHOICE = 1,
    /*
     * Token choice by balanced scores (S-BASE, Clark et al. 2022, arXiv 2202.01169; Megatron-Core):
     * C = exp(l), rows scaled by their largest; d1 = 1; repeat d0_t = 1/T / (sum_e C d1 + 1e-8),
     * d1_e = 1/R / (sum_t d0 C + 1e-8) until the mean |change of d1| <= sinkhorn.tolerance, or
     * sinkhorn.iterations times. Masked tokens take no part in T and the sums, logits that are not
     * finite have C = 0. Choice is by d1 * C, with one token by l, as there is nothing to balance;
     * weights are the unbalanced scores s(l). Needs score-then-topk order; not with groups,
     * selection bias or reroute, nor score sparsemixer.
     */
    CLMOE_POLICY_SINKHORN = 2,
    /*
     * Every token passes all experts, weighted by its scores; top_k must be R, and may pass 256.
     * The pairs of a token come in ascending id. Not with what Sinkhorn is not with.
     */
    CLMOE_POLICY_ALL_EXPERTS = 3,
    /*
     * Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951): each expert has soft_moe.slots slots p,
     * weights.router is [E*p,D]; l = soft_moe.scale * x/|x| . r/|r|; a slot's row is the mean of
     * the tokens weighted by softmax of l over the tokens, a token's output the mean of the slots'
     * outputs weighted by softmax of l over all slots; l is 0 where a norm is 0. No pairs, no
     * top-k; top_k must be 1. Masked tokens and rows that are not finite enter no slot and get
     * nothing from one. Of the outputs of clmoe_forward() there is only y, and it has single steps
     * of its own, see steps.h. Scores are softmax; not with what weighs or places pairs: biases,
     * renorm, scales, noise, capacity, identity experts. N = E*p is at most 2^20, and needs scratch
     * for two [T,N] matrices more, in training for five.
     */
    CLMOE_POLICY_SOFT_MOE = 4,
};

/*
 * Noise n added to the logits, times router.noise.scale and the state's noise_scale. It acts when a
 * state is given, and is left out without one: one layer serves training and evaluation.
 */
typedef uint32_t clmoe_noise;
enum {
    CLMOE_NOISE_NONE = 0,
    CLMOE_NOISE_GAUSSIAN = 1, /* N(0,1): V-MoE with scale 1/E */
    /* N(0,1) * (softplus(x Wn^T) + 0.01), Wn = weights.noise_router: Shazeer et al. 2017 */
    CLMOE_NOISE_LEARNED = 2,
    CLMOE_NOISE_GUMBEL = 3, /* -log(-log u) */
};

/*
 * Group-limited choice: the R columns are `count` equal groups, and only the `topk` best may be
 * chosen from (ties to the lower group). count 0 or 1: off. count <= 256 divides R, and topk * R /
 * count >= K. With one group per device this is DeepSeek-V2's device-limited routing: at most topk
 * devices per token.
 */
typedef struct clmoe_groups_desc {
    uint32_t count, topk;
    clmoe_group_score score;
    /*
     * 1: two levels. Group gate softmax(x Wg^T), Wg = weights.group_router [count,D], picks topk
     * groups (ties to the lower); softmax of l within each picks its K / topk best, which must
     * divide; a weight is the product of both. Needs score softmax, score-then-topk order and token
     * choice; groups.score is not used. The pairs of a token come group by group, in the order of
     * group ids, the best of each group first. The select_bias acts within the groups.
     */
    uint32_t two_level;
    uint32_t reserved[4];
} clmoe_groups_desc;

/* What the weights of a token's choices are divided by. */
typedef struct clmoe_renorm_desc {
    clmoe_renorm kind;
    float eps;           /* >= 0; default 0. A sum of 0 gives weights of 0, never NaN. */
    float p;             /* >= 1; default 1 */
    uint32_t after_drop; /* 1: renormalise over the pairs that kept a place (NLLB) */
    uint32_t reserved[4];
} clmoe_renorm_desc;

/* Of CLMOE_POLICY_SINKHORN. */
typedef struct clmoe_sinkhorn_desc {
    uint32_t iterations; /* 1 to 1000; default 100 */
    float tolerance;     /* >= 0; default 1e-4 */
    uint32_t reserved[2];
} clmoe_sinkhorn_desc;

/* Of CLMOE_POLICY_SOFT_MOE. */
typedef struct clmoe_soft_moe_desc {
    uint32_t slots; /* p, of each expert; default 1 */
    float scale;    /* default 1 */
    uint32_t reserved[2];
} clmoe_soft_moe_desc;

/* What a state makes random in x and the logits. Acts when a state is given. */
typedef struct clmoe_noise_desc {
    clmoe_noise kind;
    float scale; /* >= 0; default 1 */
    /*
     * x is multiplied by U(1 - jitter, 1 + jitter), times the state's noise_scale, before the
     * router (Switch), or with jitter_experts before all experts too, identity and shared ones
     * included (Mixtral). 0 <= jitter < 1; 0 (default): off.
     */
    float jitter;
    uint32_t jitter_experts;
    uint32_t reserved[4];
} clmoe_noise_desc;

/*
 * Probabilities, 0 (default) to less than 1, that an expert is masked for all tokens of a step, and
 * that one logit of one token is. A masked logit counts as -infinity. Of the R experts, the K with
 * the largest random numbers (ties to the lower id) are never masked as experts; a token left with
 * fewer than K experts gets surplus pairs. Act when a state is given.
 */
typedef struct clmoe_dropout_desc {
    float experts, logits;
    uint32_t reserved[2];
} clmoe_dropout_desc;

/*
 * Weight rebalancing on the fixed choice (0 iterations: off): minimises 1/2 sum_e (L'_e - L*)^2 +
 * mu/2 |W' - W|^2, L'_e = sum_t W'_te, L* = (sum of W) / E, rows of W' non-negative with the sum
 * they had, by projected gradient with the step 1 / (mu + max_e pairs of e). Dropped pairs are not
 * known yet and take part. Pairs of identity experts and tokens whose weights do not have a
 * positive sum keep their weights and are not in L. Not with renorm.after_drop, overflow reroute or
 * policy all experts.
 */
typedef struct clmoe_rebalance_desc {
    uint32_t iterations; /* 0 (default) to 1000 */
    float mu;            /* >= 0; default 1 */
    uint32_t reserved[2];
} clmoe_rebalance_desc;

typedef struct clmoe_router_desc { /* random numbers: see clmoe_state */
    clmoe_score_function score;
    clmoe_order order;
    clmoe_policy policy;
    float temperature; /* > 0; default 1 */
    float softcap;     /* 0 (default): off; else > 0 */
    uint32_t bias;     /* 1: weights.router_bias [R] is added to the logits */
    /* 1: weights.select_bias [R] is added to the scores for choosing only, not to the weights. */
    uint32_t select_bias;
    float scale;           /* multiplies every weight, after renorm; default 1 */
    uint32_t expert_scale; /* 1: weights.expert_scale [R] multiplies too */
    float sparsemixer_eps; /* >= 0; default 0.01 */
    clmoe_weight_at weight_at;
    /* of weights.router, shared_gate, group_router and noise_router: f32, or `type` */
    clmoe_type weight_type;
    clmoe_groups_desc groups;
    clmoe_renorm_desc renorm;
    clmoe_sinkhorn_desc sinkhorn;
    clmoe_soft_moe_desc soft_moe;
    clmoe_noise_desc noise;
    clmoe_dropout_desc dropout;
    clmoe_rebalance_desc rebalance;
    uint32_t reserved[16];
} clmoe_router_desc;

/* Which pairs keep their place when an expert has more than C. The others are dropped. */
typedef uint32_t clmoe_keep;
enum {
    CLMOE_KEEP_POSITION = 0,     /* in token order */
    CLMOE_KEEP_CHOICE_MAJOR = 1, /* all first choices before any second: GShard */
    CLMOE_KEEP_PRIORITY = 2,     /* choice-major, tokens by descending best weight: V-MoE's BPR */
    CLMOE_KEEP_WEIGHT = 3,       /* the C largest weights of each expert: Megatron-Core "probs" */
    CLMOE_KEEP_RANDOM = 4,       /* in a random order of the pairs: DeepSpeed; needs a state */
    /*
     * Token rounding (SonicMoE, arXiv 2512.14080), for training: the pairs of each expert become a
     * multiple of M, which is `multiple`, or where that is 0 the row_tile of the batch's plan
     * (clmoe_plan_layout). With M a multiple of row_tile buckets have no rows of padding. Where c
     * pairs chose the expert, m is the multiple nearest to c, halves up; or the one below c, where
     * fewer than m unmasked tokens have a finite score for it.
     *   m < c: the pairs of the c - m smallest weights are dropped, ties from the higher token on.
     *          Weights are those of clmoe_topk() without rounding: of the K choices, and with
     *          renorm.after_drop before renorm and scales.
     *   m > c: the m - c unmasked tokens of the largest scores (clmoe_score_args.scores, without
     *          selection bias) that did not choose the expert are added, ties to the lower token.
     * Experts chosen by fewer than M/2 tokens get none: batches should have T*K/E of a few M.
     * Afterwards a token has 0 to E pairs, in ascending id, listed as with expert choice: `pairs`
     * is the bound min(T*K + E * min(M/2, T), T*E) with M/2 rounded down, token_offsets say which
     * are whose, and the rest have id -1 and weight 0. Weights are of the experts that a token ends
     * with, added ones like the others: renorm, and with topk-then-score order the score, are over
     * these. So are gradients, with the pairs held fixed. clmoe_topk() gives all of this; there is
     * no clmoe_renorm_after_drop(). Statistics and losses are of the pairs after rounding: load is
     * kept, a multiple of M, and dropped is 0; CLMOE_F_FRESH is the choice before, without bias.
     * Needs token choice, and renorm.after_drop where there is a renorm.kind. Not with `rows` or
     * `factor` (there is no C), groups, two levels, sparsemixer, rebalancing, identity experts,
     * tokens_per_sequence or external ids.
     */
    CLMOE_KEEP_ROUND = 5,
};

/* What happens to the pairs that found no place. */
typedef uint32_t clmoe_overflow;
enum {
    CLMOE_OVERFLOW_DROP = 0, /* they contribute zero */
    /*
     * Each goes to the best expert (by score, ties to the lower id) outside its token's choice that
     * has room. In rounds: every token with such a pair asks for one place, and an expert gives its
     * places in token order; at most R + K rounds. Afterwards no dropped pair is left of which an
     * expert outside the token's choice has room. Weights are those of the new choice. A finite
     * score is needed, groups are not respected. External ids come without scores: their pairs are
     * dropped.
     */
    CLMOE_OVERFLOW_REROUTE = 1,
};

typedef uint32_t clmoe_rounding;
enum {
    CLMOE_ROUND_UP = 0,
    CLMOE_ROUND_DOWN = 1,
    CLMOE_ROUND_NEAREST = 2, /* halves away from zero */
};

/*
 * Capacity C: rows per expert. `rows` if given; else round(T * K * factor / E) in double; then at
 * least min_rows and at least 1, up to a multiple of `multiple`, at most T. Give one of rows and
 * factor; with none (default) the layer is dropless, every pair has a place. A dropped pair
 * contributes zero to y.
 */
typedef struct clmoe_capacity_desc {
    uint32_t rows;
    double factor; /* >= 0, finite */
    clmoe_rounding rounding;
    uint32_t min_rows;
    uint32_t multiple; /* 0 and 1: any; but see CLMOE_KEEP_ROUND */
    clmoe_keep keep;
    /*
     * Reroute: token choice with a capacity, without two levels, identity experts and
     * tokens_per_sequence.
     */
    clmoe_overflow overflow;
    /*
     * 0 (default): the batch is one. Else the batch is sequences of that many tokens, the last one
     * may be shorter; C is computed with T = tokens_per_sequence, and each sequence has its own C
     * places at each expert. Losses per_sequence use it too.
     */
    uint32_t tokens_per_sequence;
    uint32_t reserved[8];
} clmoe_capacity_desc;

/* What statistics and losses need to know. */
typedef struct clmoe_balance_desc {
    /*
     * 1: the layer can be asked for statistics and losses, and its state be updated. 0 (default):
     * in layers for training alone. What is not enabled is not compiled and needs no scratch, and a
     * call that asks for it is refused.
     */
    uint32_t enabled;
    /* The E experts are that many equal groups, one per device: a divisor of E up to 256; 0: none.
     */
    uint32_t device_groups;
    uint32_t dead_window; /* an expert is dead after so many tokens without it; default 32768 */
    /* 1: clmoe_router_orthogonality() can be called, whatever `enabled` and training are. */
    uint32_t router_orthogonality;
    uint32_t reserved[7];
} clmoe_balance_desc;

typedef uint32_t clmoe_activation;
enum {
    CLMOE_ACT_SILU = 0,      /* v * sigmoid(alpha * v) */
    CLMOE_ACT_GELU_ERF = 1,  /* v/2 * (1 + erf(v / sqrt 2)) */
    CLMOE_ACT_GELU_TANH = 2, /* v/2 * (1 + tanh(sqrt(2/pi) * (v + 0.044715 v^3))) */
    CLMOE_ACT_RELU = 3,
    CLMOE_ACT_RELU2 = 4, /* max(v, 0)^2 */
};

/* How the gate and up matrices lie in memory; "none" for a plain MLP without a gate. */
typedef uint32_t clmoe_gate_layout;
enum {
    CLMOE_GATE_CONCAT = 0,      /* `gate` is [E,2H,D]: H gate rows, then H up rows */
    CLMOE_GATE_INTERLEAVED = 1, /* `gate` is [E,2H,D]: gate row, up row, gate row, ... (gpt-oss) */
    CLMOE_GATE_SEPARATE = 2,    /* `gate` is [E,H,D], `up` is [E,H,D] */
    CLMOE_GATE_NONE = 3,        /* plain: down(act(up x)); only `up` [E,H,D] */
};

/*
 * The MLP of the experts, or of the shared expert:
 *   gated:  h = act(min(gate, limit)) * (clamp(up, -limit, limit) + up_shift);  out = h Wdown^T
 *   plain:  h = act(up);  out = h Wdown^T
 */
typedef struct clmoe_mlp_desc {
    uint32_t hidden_dim; /* H, 1 to 2^24; for `shared`, 0 (default) means there is none */
    clmoe_activation activation;
    clmoe_gate_layout gate_layout;
    /* 1: stored as [E,D,2H] (or [E,D,H]); with an interleaved layout the last dim is, too. */
    uint32_t gate_up_transposed;
    uint32_t down_transposed; /* 1: stored as [E,H,D] instead of [E,D,H] */
    uint32_t gate_up_bias;    /* 1: gate_bias (and up_bias) in the same layout, without the D */
    uint32_t down_bias;       /* 1: down_bias [E,D] */
    float limit;              /* clamp of gate (above) and up (both sides), 0 (default): none */
    float alpha;              /* of silu; default 1; gpt-oss 1.702 */
    float up_shift;           /* default 0; gpt-oss 1 */
    /*
     * Probability, 0 (default) to less than 1, that an element of h becomes 0; the others are
     * divided by 1 - hidden_dropout. Acts when a state is given.
     */
    float hidden_dropout;
    uint32_t reserved[7];
} clmoe_mlp_desc;

/* Element type of the gradients of matrices and their biases; sums are f32 either way. */
typedef uint32_t clmoe_gradient_type;
enum {
    CLMOE_GRADIENT_F32 = 0,
    CLMOE_GRADIENT_OF_WEIGHT = 1, /* the type of the weight itself */
};

typedef struct clmoe_layer_desc {
    size_t struct_size; /* set by clmoe_layer_desc_init() */
    uint32_t dim;       /* D, 1 to 2^24 */
    uint32_t num_experts;
    uint32_t num_identity_experts; /* Z: ids in [E, E+Z) add w * x, without a GEMM (LongCat) */
    uint32_t top_k;                /* K */
    clmoe_type type;               /* of x, y, residual, and of rows between the steps (xe, ye) */
    clmoe_type weight_type;        /* of expert and shared weights, their biases, output_bias */
    uint32_t training;             /* 1: clmoe_backward() can follow; `saved` keeps what it reads */
    const char *engine;            /* NULL: by device and types; or a name of clmoe_engine_name() */
    clmoe_router_desc router;
    clmoe_capacity_desc capacity;
    clmoe_mlp_desc experts;
    uint32_t normalize_experts; /* 1: each expert's output row v becomes v / |v| (geometric MoE) */
    clmoe_mlp_desc shared;      /* a dense MLP every token passes; its E is 1 */
    uint32_t shared_gate; /* 1: its output is multiplied by sigmoid(x . weights.shared_gate) */
    uint32_t output_bias; /* 1: weights.output_bias [D] is added to y (JetMoE) */
    clmoe_balance_desc balance;
    clmoe_gradient_type gradient_type; /* of the weights' gradients, with training */
    /* 1: `saved` is without z, the largest part; backward computes it again from x. */
    uint32_t recompute;
    uint32_t dye;      /* 1: clmoe_backward() may be given dye, for which it needs more scratch */
    uint32_t reserved; /* 0 */
} clmoe_layer_desc;

/* The same for a struct of `struct_size` bytes, from another language or another version. */
CLMOE_API void clmoe_layer_desc_init_sized(clmoe_layer_desc *desc, size_t struct_size);

/* Zeroes, sets struct_size and the defaults named above. Sizes stay 0 and must be set. */
static inline void clmoe_layer_desc_init(clmoe_layer_desc *desc) {
    clmoe_layer_desc_init_sized(desc, sizeof *desc);
}

/* ---- Layer --------------------------------------------------------------------------------- */

/*
 * An immutable layer: checked sizes and switches, an engine and compiled kernels. It holds no
 * weights and no batch memory.
 */
typedef struct clmoe_layer clmoe_layer;

/*
 * Creates a layer; this compiles kernels and may take seconds on a cold driver. `desc` is copied.
 * Errors: CLMOE_INVALID_DESC names the field; CLMOE_UNSUPPORTED names what is missing.
 */
CLMOE_API clmoe_status clmoe_layer_create(clmoe_context *context, const clmoe_layer_desc *desc,
                                          clmoe_layer **out);

/* Destroys the layer; the events of its calls must be complete. NULL is allowed. */
CLMOE_API void clmoe_layer_destroy(clmoe_layer *layer);

/* The engine the layer uses: "cpu", "tiled", ... Valid as long as the layer. */
CLMOE_API const char *clmoe_layer_engine(const clmoe_layer *layer);

/* R = E + Z: the length of a row of logits and of the arrays of statistics. 0 for NULL. */
CLMOE_API uint32_t clmoe_layer_columns(const clmoe_layer *layer);

/*
 * 1 if clmoe_forward() gathers xe in a step of its own, as clmoe_experts() then needs it; 0 if the
 * engine gathers x inside its first GEMM, and for NULL.
 */
CLMOE_API uint32_t clmoe_layer_dispatches(const clmoe_layer *layer);

/*
 * Names of the engines in this build: index 0, 1, ... until NULL. `supported`, if not NULL, says
 * whether the engine runs on the context's device. On an NVIDIA GPU the first such question about
 * "nv_mma" compiles a small kernel, runs it on a queue of its own and waits; the context keeps the
 * answer.
 */
CLMOE_API const char *clmoe_engine_name(clmoe_context *context, uint32_t index,
                                        uint32_t *supported);

/*
 * Bytes of device memory for a batch of `tokens` and for every smaller one: `saved` is what
 * clmoe_backward() reads (0 unless desc.training), `scratch` is free again after the event. A
 * buffer of size 0 need not be given. Either pointer may be NULL. Each is one buffer: if one is
 * larger than the device allows (CL_DEVICE_MAX_MEM_ALLOC_SIZE), the sizes are written and the
 * status is CLMOE_UNSUPPORTED.
 */
CLMOE_API clmoe_status clmoe_layer_memory(const clmoe_layer *layer, uint32_t tokens, size_t *saved,
                                          size_t *scratch);

/* ---- Weights ------------------------------------------------------------------------------- */

/* Weights of an MLP; shapes in clmoe_mlp_desc. Fields its switches do not ask for are ignored. */
typedef struct clmoe_mlp_weights {
    clmoe_buf gate, up, down;
    clmoe_buf gate_bias, up_bias, down_bias;
    /*
     * Optional: gate, up and down as clmoe_pack_weights() made them, see pack.h. When given, it is
     * read instead of the three, which may then be {NULL, 0}; the biases stay as they are.
     */
    clmoe_buf packed;
    clmoe_buf reserved[12];
} clmoe_mlp_weights;

typedef struct clmoe_weights {
    clmoe_buf router;       /* [R,D], Soft MoE [E*p,D]; not needed with external logits or ids */
    clmoe_buf router_bias;  /* [R] f32, if router.bias */
    clmoe_buf select_bias;  /* [R] f32, if router.select_bias; not given: the state's */
    clmoe_buf expert_scale; /* [R] f32, if router.expert_scale */
    clmoe_mlp_weights experts;
    clmoe_mlp_weights shared; /* if shared.hidden_dim */
    clmoe_buf shared_gate;    /* [D], if shared_gate */
    clmoe_buf output_bias;    /* [D], if output_bias */
    clmoe_buf group_router;   /* [groups.count,D], if router.groups.two_level */
    clmoe_buf noise_router;   /* [R,D], if router.noise.kind is learned; not read without a state */
    clmoe_buf reserved[8];
} clmoe_weights;

/* Releases every buffer of `weights` and clears it: for those of clmoe_checkpoint_upload(). */
CLMOE_API void clmoe_weights_release(clmoe_weights *weights);

/* ---- Forward ------------------------------------------------------------------------------- */

/*
 * One batch. Start with clmoe_forward_args_init(), or {.struct_size = sizeof args}, and set what
 * you have; a field left 0 is not given. Buffers must not overlap, but y may be residual.
 *
 * A masked token (token_mask 0) is padding: it takes no place, counts nowhere, and its row of y is
 * its residual, or 0. A token with fewer than K finite logits still gets K distinct ids in range;
 * the surplus pairs have weight 0 and no place.
 */
typedef struct clmoe_forward_args {
    size_t struct_size; /* set by clmoe_forward_args_init() */
    uint32_t tokens;    /* T, 0 allowed */
    const clmoe_weights *weights;
    clmoe_buf x;          /* [T,D] */
    clmoe_buf token_mask; /* optional [T] u8: 0 is padding */
    clmoe_buf residual;   /* optional [T,D], added to y */
    /* Another router's logits instead of x Wr^T + bias: optional [T,R] f32. */
    clmoe_buf logits_in;
    /*
     * Another router's choice instead of logits, scores and top-k: optional [T,K] i32 and [T,K]
     * f32, both or neither. Weights are used as they are, without renorm and scale. An id out of
     * range has no place and contributes nothing. Losses and the output `logits` then cannot be
     * asked for.
     */
    clmoe_buf ids_in, pair_weights_in;
    clmoe_buf state;       /* optional, see clmoe_state in balance.h; read only */
    clmoe_buf load_target; /* optional [E] f32: Q of statistics and losses; uniform if not given */
    /* Optional [E] f32, needed by losses with f_source supplied: see clmoe_loss_args. */
    clmoe_buf load_supplied;
    clmoe_buf saved, scratch; /* as clmoe_layer_memory() says; undefined contents */
    /* Outputs. */
    clmoe_buf y;            /* [T,D] */
    clmoe_buf logits;       /* optional [T,R] f32: x Wr^T + router_bias, before noise and softcap */
    clmoe_buf ids;          /* optional [pairs] i32, best first; pairs is T*K, see clmoe_policy */
    clmoe_buf pair_weights; /* optional [pairs] f32: the combine weights, after renorm and scale */
    clmoe_buf token_offsets; /* optional [T+1] i32, with expert choice and keep rule round only */
    clmoe_buf stats; /* optional, clmoe_stats_size() bytes; needs balance.enabled or training */
    /* Balancing losses, see clmoe_loss_args: 0 to 16 of them. */
    const struct clmoe_loss_desc *losses;
    uint32_t num_losses;
    size_t loss_size;        /* sizeof(clmoe_loss_desc); 0: that of version 0.2 */
    clmoe_buf loss_values;   /* optional [num_losses] f32 */
    clmoe_buf dlogits;       /* optional [T,R] f32: their gradient is added */
    clmoe_buf dnoise;        /* optional [T,R] f32: theirs on x Wn^T is added, with learned noise */
    clmoe_buf dgroup_logits; /* optional [T,groups.count] f32: on x Wg^T, with two levels */
    struct clmoe_profile *profile; /* optional, see profile.h: the events of each step */
    /* Optional, clmoe_bias_counts_size() bytes: the batch's counts are added; needs a state. */
    clmoe_buf bias_counts;
} clmoe_forward_args;

static inline void clmoe_forward_args_init(clmoe_forward_args *args) {
    memset(args, 0, sizeof *args);
    args->struct_size = sizeof *args;
}

/*
 * Enqueues the layer on `queue` after the `num_wait` events of `wait`. `event` may be NULL. On a
 * driver's error midway *event is NULL and what was enqueued may still run: finish the queue before
 * the buffers are used again; the outputs are undefined.
 */
CLMOE_API clmoe_status clmoe_forward(clmoe_layer *layer, cl_command_queue queue,
                                     const clmoe_forward_args *args, cl_uint num_wait,
                                     const cl_event *wait, cl_event *event);

#ifdef __cplusplus
}
#endif

#include "backward.h"
#include "balance.h"
#include "checkpoint.h"
#include "context.h"
#include "host.h"
#include "pack.h"
#include "place.h"
#include "profile.h"
#include "selftest.h"
#include "steps.h"

#endif
