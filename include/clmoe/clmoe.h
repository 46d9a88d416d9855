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
 *
 * examples/forward.c is that program in full. clmoe_checkpoint_open() does steps 2 and 3 from a
 * model directory.
 *
 * Words. T tokens, D model dim, E experts with weights, Z identity experts, R = E + Z columns of
 * the router, K experts per token (top_k), H hidden dim of an expert, C capacity (rows per expert),
 * S slots (rows of all buckets together). Arrays are row-major, the last dimension is contiguous.
 *
 * A layer is a chain of steps; each is also a call of its own (see "The steps"):
 *
 *   score     x [T,D], router [R,D]   -> logits [T,R], scores [T,R]
 *   topk      scores                  -> ids [T,K], weights [T,K], live [T]
 *   plan      ids                     -> the plan: which row of which bucket each pair gets
 *   dispatch  x, plan                 -> xe [S,D]   (inside the first GEMM where an engine can)
 *   experts   xe, weights             -> ye [S,D]
 *   combine   ye, weights, plan       -> y [T,D]
 *   stats     plan                    -> clmoe_stats and its arrays
 *
 * Promises.
 *   - Nothing blocks and nothing is read back: a call enqueues work on your queue and returns. It
 *     allocates no memory and compiles nothing. The engine "clblast" is the one exception: it reads
 *     the rows per expert back to the host, and CLBlast allocates and compiles inside its calls.
 *   - Same device, same inputs, same bits, on every run. Ties go to the lower expert id.
 *   - You own the OpenCL context, the queues and all buffers. Sizes are asked for up front.
 *   - Bad input is an error before anything is enqueued; clmoe_last_error() names field and value.
 *   - Bad data never yields an id out of range: a NaN or infinite logit counts as -infinity.
 *   - In-order and out-of-order queues both work. On success the event is valid, even for 0 tokens.
 *   - A context is thread-safe; a layer is used by one thread at a time.
 *   - Nothing is printed, nothing exits, no environment variable changes what is computed.
 *
 * Limits. 1 <= E, E + Z <= 4096, 1 <= K <= min(E + Z, 256), T*K <= 2^30.
 */
#ifndef CLMOE_CLMOE_H
#define CLMOE_CLMOE_H

#ifndef CL_TARGET_OPENCL_VERSION
#define CL_TARGET_OPENCL_VERSION 120
#endif
#include <CL/cl.h>
#include <stddef.h>
#include <stdint.h>

#define CLMOE_VERSION_MAJOR 0
#define CLMOE_VERSION_MINOR 1
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

#define CLMOE_SUCCESS 0
#define CLMOE_INVALID_ARGUMENT                                                                     \
    1                         /* an argument of the call: NULL, too small a buffer, wrong offset */
#define CLMOE_INVALID_DESC  2 /* a field of a descriptor, or two that contradict each other */
#define CLMOE_UNSUPPORTED   3 /* right, but not something this device, engine or version can do */
#define CLMOE_OUT_OF_MEMORY 4 /* host memory; the device's own shortage is an OpenCL code */
#define CLMOE_BUILD_FAILED                                                                         \
    5                         /* a kernel did not compile; the log went to the context's callback  \
                               */
#define CLMOE_ENGINE_FAILED 6 /* an engine's own library refused; the sentence has its code */
#define CLMOE_IO            7 /* a file could not be opened or read */
#define CLMOE_BAD_FILE      8 /* a file was read and is not what it should be */

/* The name of a status, of clmoe's or OpenCL's: "CLMOE_INVALID_DESC", "CL_OUT_OF_RESOURCES". */
CLMOE_API const char *clmoe_status_string(clmoe_status status);

/*
 * The sentence about the calling thread's last failed call: "top_k is 9, but num_experts is 8".
 * Never NULL; empty if nothing failed yet. Valid until the thread's next call.
 */
CLMOE_API const char *clmoe_last_error(void);

/* "0.1.0": the library's version at run time. */
CLMOE_API const char *clmoe_version(void);

/* ---- Buffers and types --------------------------------------------------------------------- */

/*
 * A place in device memory: a buffer and a byte offset into it, a multiple of the element size.
 * {NULL, 0} means "not given" wherever a field is optional.
 */
typedef struct clmoe_buf {
    cl_mem mem;
    size_t offset;
} clmoe_buf;

/* Storage types. All arithmetic is f32; stores round to nearest even. */
typedef enum clmoe_type {
    CLMOE_F32 = 0,
    CLMOE_F16 = 1,
    CLMOE_BF16 = 2,
} clmoe_type;

/* ---- Context ------------------------------------------------------------------------------- */

typedef struct clmoe_context clmoe_context;

typedef struct clmoe_context_options {
    size_t struct_size; /* set by clmoe_context_options_init() */
    /*
     * Receives kernel build logs and warnings, or NULL. Called on the thread that builds, with no
     * lock of the library's that another clmoe call would need.
     */
    void (*log)(const char *message, void *user);
    void *log_user;
    /*
     * Work-items per group of the routing kernels: 0 lets the library choose (1 on CPUs, where
     * barriers are slow, 256 or the device's limit elsewhere), else a power of two up to 256.
     * Integer results do not depend on it; sums of scores may differ in the last bits.
     */
    uint32_t group_size;
    /*
     * Directory that keeps compiled programs for later runs, or NULL: none. Copied; created with
     * mode 0700 if its parent exists. A program is found by its sources, its options, the device,
     * the driver and the platform. What is damaged, or was written by others, or the driver
     * refuses, is compiled and written anew. No trouble with the cache is an error: programs are
     * then compiled as without it, and `log` gets one warning per context. Threads and processes
     * may share a directory; nothing in it is ever deleted, but you may delete it at any time.
     * Leave it NULL on PoCL, which keeps compiled kernels itself, and compiles every kernel once
     * more to hand out a binary.
     */
    const char *cache_dir;
    /*
     * JSON file with tile sizes, or NULL: those built into the library alone. Read once, at
     * creation; `clmoe-bench --tune FILE` writes one. An entry with the device's name goes before
     * one with its type alone ("cpu", "gpu", "other"), and the file before the library.
     *   {"tuning": [{"device": NAME, "type": "cpu", "engine": "cpu", "rows": 160, "depth": 256}]}
     * cpu: rows 40, 80, 160, 320; depth 128, 256, 512, which is part of the order of sums. tiled:
     * rows 32, 64, 128; columns 32, 64; depth 8, 16, 32. Errors: CLMOE_IO, CLMOE_BAD_FILE.
     */
    const char *tuning_file;
} clmoe_context_options;

/* Fills `options` with defaults. */
CLMOE_API void clmoe_context_options_init(clmoe_context_options *options);

/*
 * Binds `device` of `context`, which is retained. `options` may be NULL. Compiles nothing yet.
 * Errors: CLMOE_INVALID_ARGUMENT if the device is not of the context or has no OpenCL C compiler;
 * CLMOE_IO and CLMOE_BAD_FILE of options->tuning_file.
 */
CLMOE_API clmoe_status clmoe_context_create(cl_context context, cl_device_id device,
                                            const clmoe_context_options *options,
                                            clmoe_context **out);

/* Destroys the context after all its layers. NULL is allowed. */
CLMOE_API void clmoe_context_destroy(clmoe_context *context);

/* ---- Layer descriptor ---------------------------------------------------------------------- */

/*
 * The score function s(l) of the router. Order of operations on the logits of a token:
 *   l = x Wr^T + router_bias; l = softcap * tanh(l / softcap); l = l / temperature; s(l).
 */
typedef enum clmoe_score_function {
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
} clmoe_score_function;

typedef enum clmoe_order {
    CLMOE_ORDER_SCORE_THEN_TOPK = 0, /* choose by s(l); weights are s(l) of the chosen */
    CLMOE_ORDER_TOPK_THEN_SCORE = 1, /* choose by l; weights are s over the K chosen logits */
} clmoe_order;

/* How a group of experts is scored when only topk_groups of num_groups take part. */
typedef enum clmoe_group_score {
    CLMOE_GROUP_MAX = 0,      /* its best (biased) score: DeepSeek-V2 */
    CLMOE_GROUP_TOP2_SUM = 1, /* the sum of its two best (biased) scores: DeepSeek-V3 */
} clmoe_group_score;

typedef enum clmoe_renorm {
    CLMOE_RENORM_NONE = 0,
    CLMOE_RENORM_SUM = 1,   /* w / (sum of w + renorm_eps) */
    CLMOE_RENORM_PNORM = 2, /* w / (sum of |w|^p)^(1/p), p = renorm_p: DBRX */
} clmoe_renorm;

/* Where a pair's weight multiplies. */
typedef enum clmoe_weight_at {
    CLMOE_WEIGHT_AT_OUTPUT = 0,     /* the expert's output, its bias included */
    CLMOE_WEIGHT_AT_INPUT = 1,      /* the expert's input x: Llama 4 */
    CLMOE_WEIGHT_AT_ACTIVATION = 2, /* the hidden activation, before down: Megatron-Core */
} clmoe_weight_at;

typedef struct clmoe_router_desc {
    clmoe_score_function score;
    clmoe_order order;
    float temperature; /* > 0; default 1 */
    float softcap;     /* 0 (default): off; else > 0 */
    uint32_t bias;     /* 1: weights.router_bias [R] is added to the logits */
    /* 1: weights.select_bias [R] is added to the scores for choosing only; weights stay unbiased.
     */
    uint32_t select_bias;
    /*
     * Group-limited choice: the R columns are num_groups equal groups, and only the topk_groups
     * best may be chosen from (ties to the lower group). 0 or 1: off. num_groups <= 256 divides R,
     * and topk_groups * R / num_groups >= K.
     */
    uint32_t num_groups, topk_groups;
    clmoe_group_score group_score;
    clmoe_renorm renorm;
    float renorm_eps;           /* >= 0; default 0. A sum of 0 gives weights of 0, never NaN. */
    float renorm_p;             /* >= 1; default 1 */
    uint32_t renorm_after_drop; /* 1: renormalise over the pairs that kept a place (NLLB) */
    float scale;                /* multiplies every weight, after renorm; default 1 */
    uint32_t expert_scale;      /* 1: weights.expert_scale [R] multiplies too */
    float sparsemixer_eps;      /* >= 0; default 0.01 */
    clmoe_weight_at weight_at;
    clmoe_type weight_type; /* of weights.router and weights.shared_gate: f32, or `type` */
} clmoe_router_desc;

/* Which pairs keep their place when an expert has more than C. The others are dropped. */
typedef enum clmoe_keep {
    CLMOE_KEEP_POSITION = 0,     /* in token order */
    CLMOE_KEEP_CHOICE_MAJOR = 1, /* all first choices before any second: GShard */
    CLMOE_KEEP_PRIORITY = 2,     /* choice-major, tokens by descending best weight: V-MoE's BPR */
    CLMOE_KEEP_WEIGHT = 3,       /* the C largest weights of each expert: Megatron-Core "probs" */
} clmoe_keep;

typedef enum clmoe_rounding {
    CLMOE_ROUND_UP = 0,
    CLMOE_ROUND_DOWN = 1,
    CLMOE_ROUND_NEAREST = 2, /* halves away from zero */
} clmoe_rounding;

/*
 * Capacity C: rows per expert. `rows` if given; else round(T * K * factor / E) in double; then at
 * least min_rows, up to a multiple of `multiple`, at most T. rows = 0 and factor = 0 (defaults):
 * dropless, every pair has a place. A dropped pair contributes zero to y.
 */
typedef struct clmoe_capacity_desc {
    uint32_t rows;
    double factor; /* >= 0, finite */
    clmoe_rounding rounding;
    uint32_t min_rows;
    uint32_t multiple; /* 0 and 1: any */
    clmoe_keep keep;
} clmoe_capacity_desc;

typedef enum clmoe_activation {
    CLMOE_ACT_SILU = 0,      /* v * sigmoid(alpha * v) */
    CLMOE_ACT_GELU_ERF = 1,  /* v/2 * (1 + erf(v / sqrt 2)) */
    CLMOE_ACT_GELU_TANH = 2, /* v/2 * (1 + tanh(sqrt(2/pi) * (v + 0.044715 v^3))) */
    CLMOE_ACT_RELU = 3,
    CLMOE_ACT_RELU2 = 4, /* max(v, 0)^2 */
} clmoe_activation;

/* How the gate and up matrices lie in memory; "none" for a plain MLP without a gate. */
typedef enum clmoe_gate_layout {
    CLMOE_GATE_CONCAT = 0,      /* `gate` is [E,2H,D]: H gate rows, then H up rows */
    CLMOE_GATE_INTERLEAVED = 1, /* `gate` is [E,2H,D]: gate row, up row, gate row, ... (gpt-oss) */
    CLMOE_GATE_SEPARATE = 2,    /* `gate` is [E,H,D], `up` is [E,H,D] */
    CLMOE_GATE_NONE = 3,        /* plain: down(act(up x)); only `up` [E,H,D] */
} clmoe_gate_layout;

/*
 * The MLP of the experts, or of the shared expert:
 *   gated:  h = act(min(gate, limit)) * (clamp(up, -limit, limit) + up_shift);  out = h Wdown^T
 *   plain:  h = act(up);  out = h Wdown^T
 */
typedef struct clmoe_mlp_desc {
    uint32_t hidden_dim; /* H; for `shared`, 0 (default) means there is none */
    clmoe_activation activation;
    clmoe_gate_layout gate_layout;
    /* 1: stored as [E,D,2H] (or [E,D,H]); with an interleaved layout the last dim is interleaved.
     */
    uint32_t gate_up_transposed;
    uint32_t down_transposed; /* 1: stored as [E,H,D] instead of [E,D,H] */
    uint32_t gate_up_bias;    /* 1: gate_bias (and up_bias) in the same layout, without the D */
    uint32_t down_bias;       /* 1: down_bias [E,D] */
    float limit;              /* clamp of gate (above) and up (both sides), 0 (default): none */
    float alpha;              /* of silu; default 1; gpt-oss 1.702 */
    float up_shift;           /* default 0; gpt-oss 1 */
} clmoe_mlp_desc;

typedef struct clmoe_layer_desc {
    size_t struct_size; /* set by clmoe_layer_desc_init() */
    uint32_t dim;       /* D */
    uint32_t num_experts;
    uint32_t num_identity_experts; /* Z: ids in [E, E+Z) add w * x, without a GEMM (LongCat) */
    uint32_t top_k;                /* K */
    clmoe_type type;               /* of x, y, residual, and of rows between the steps (xe, ye) */
    clmoe_type weight_type;        /* of expert and shared weights, their biases, output_bias */
    uint32_t training;             /* 1: `saved` keeps what a backward pass needs */
    const char *engine;            /* NULL: by device; or a name of clmoe_engine_name() */
    clmoe_router_desc router;
    clmoe_capacity_desc capacity;
    clmoe_mlp_desc experts;
    uint32_t normalize_experts; /* 1: each expert's output row v becomes v / |v| (geometric MoE) */
    clmoe_mlp_desc shared;      /* a dense MLP every token passes; its E is 1 */
    uint32_t shared_gate; /* 1: its output is multiplied by sigmoid(x . weights.shared_gate) */
    uint32_t output_bias; /* 1: weights.output_bias [D] is added to y (JetMoE) */
} clmoe_layer_desc;

/* Zeroes, sets struct_size and the defaults named above. Sizes stay 0 and must be set. */
CLMOE_API void clmoe_layer_desc_init(clmoe_layer_desc *desc);

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

/* Destroys the layer once the events of its calls are complete. NULL is allowed. */
CLMOE_API void clmoe_layer_destroy(clmoe_layer *layer);

/* The engine the layer uses: "cpu", "tiled", ... Valid as long as the layer. */
CLMOE_API const char *clmoe_layer_engine(const clmoe_layer *layer);

/*
 * Names of the engines in this build: index 0, 1, ... until NULL. `supported`, if not NULL, says
 * whether the engine runs on the context's device.
 */
CLMOE_API const char *clmoe_engine_name(const clmoe_context *context, uint32_t index,
                                        uint32_t *supported);

/*
 * Bytes of device memory for a batch of `tokens`: `saved` lives until the backward pass (0 unless
 * desc.training), `scratch` is free again after the event. Both are never 0 for a buffer's sake:
 * a size of 0 means the buffer need not be given.
 */
CLMOE_API clmoe_status clmoe_layer_memory(const clmoe_layer *layer, uint32_t tokens, size_t *saved,
                                          size_t *scratch);

/* ---- Weights ------------------------------------------------------------------------------- */

/* Weights of an MLP; shapes in clmoe_mlp_desc. Fields its switches do not ask for are ignored. */
typedef struct clmoe_mlp_weights {
    clmoe_buf gate, up, down;
    clmoe_buf gate_bias, up_bias, down_bias;
    /*
     * Optional: gate, up and down as clmoe_pack_weights() made them. When given, it is read instead
     * of the three, which may then be {NULL, 0}; the biases stay as they are.
     */
    clmoe_buf packed;
} clmoe_mlp_weights;

typedef struct clmoe_weights {
    clmoe_buf router;       /* [R,D]; not needed with external logits or ids */
    clmoe_buf router_bias;  /* [R] f32, if router.bias */
    clmoe_buf select_bias;  /* [R] f32, if router.select_bias */
    clmoe_buf expert_scale; /* [R] f32, if router.expert_scale */
    clmoe_mlp_weights experts;
    clmoe_mlp_weights shared; /* if shared.hidden_dim */
    clmoe_buf shared_gate;    /* [D], if shared_gate */
    clmoe_buf output_bias;    /* [D], if output_bias */
} clmoe_weights;

/* Releases every buffer of `weights` and clears it: for weights that clmoe_checkpoint_upload()
 * made. */
CLMOE_API void clmoe_weights_release(clmoe_weights *weights);

/*
 * Packing: weights that change rarely, in the order in which the layer's engine reads them fastest.
 * Today the engine "cpu" has such a form. It pays where many tokens share weights that never
 * change, and when few tokens do: memory is then read in one stream. Raw weights that change every
 * step are better used as they are.
 *
 *   clmoe_packed_size(layer, CLMOE_MLP_EXPERTS, &bytes);
 *   packed.mem = clCreateBuffer(context, CL_MEM_READ_WRITE, bytes, NULL, &code);
 *   clmoe_pack_weights(layer, queue, CLMOE_MLP_EXPERTS, &weights.experts, packed, 0, NULL, NULL);
 *   weights.experts.packed = packed;
 *
 * The content is opaque: it is good for layers with the same sizes, weight_type and engine on the
 * same device with the same version of the library, and for nothing else. It holds the values of
 * the raw weights unchanged, padded to whole vectors, so that it is hardly larger than they are
 * where hidden_dim and dim are multiples of 32.
 */
typedef enum clmoe_mlp {
    CLMOE_MLP_EXPERTS = 0,
    CLMOE_MLP_SHARED = 1,
} clmoe_mlp;

/*
 * Bytes of the packed weights of one of the layer's MLPs. Errors: CLMOE_UNSUPPORTED, and 0 bytes,
 * where the engine has no packed form; CLMOE_INVALID_ARGUMENT if the layer has no such MLP.
 */
CLMOE_API clmoe_status clmoe_packed_size(const clmoe_layer *layer, clmoe_mlp mlp, size_t *bytes);

/*
 * Enqueues the packing of raw->gate, up and down into `packed`, a buffer of clmoe_packed_size()
 * bytes that must not overlap them; raw->packed and the biases are not read. Wait list and event as
 * in clmoe_forward(). Once the event is complete, the raw buffers may be released.
 */
CLMOE_API clmoe_status clmoe_pack_weights(clmoe_layer *layer, cl_command_queue queue, clmoe_mlp mlp,
                                          const clmoe_mlp_weights *raw, clmoe_buf packed,
                                          cl_uint num_wait, const cl_event *wait, cl_event *event);

/* ---- Forward ------------------------------------------------------------------------------- */

/*
 * One batch. Start from {0}-initialised or clmoe_forward_args_init() and set what is there.
 * Buffers must not overlap, except that y may be residual.
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
     * Another router's choice instead of all of the above: optional [T,K] i32 and [T,K] f32, both
     * or neither. Weights are used as they are, without renorm and scale. An id out of range has no
     * place and contributes nothing.
     */
    clmoe_buf ids_in, weights_in;
    clmoe_buf saved, scratch; /* as clmoe_layer_memory() says; undefined contents */
    /* Outputs. */
    clmoe_buf y;           /* [T,D] */
    clmoe_buf logits;      /* optional [T,R] f32: x Wr^T + router_bias, before softcap */
    clmoe_buf ids;         /* optional [T,K] i32, best first */
    clmoe_buf weights_out; /* optional [T,K] f32: the combine weights, after renorm and scale */
    clmoe_buf stats;       /* optional, clmoe_stats_size() bytes */
} clmoe_forward_args;

CLMOE_API void clmoe_forward_args_init(clmoe_forward_args *args);

/*
 * Enqueues the layer on `queue` after the `num_wait` events of `wait`. `event` may be NULL. On a
 * driver's error midway *event is NULL and what was enqueued may still run: finish the queue before
 * the buffers are used again; the outputs are undefined.
 */
CLMOE_API clmoe_status clmoe_forward(clmoe_layer *layer, cl_command_queue queue,
                                     const clmoe_forward_args *args, cl_uint num_wait,
                                     const cl_event *wait, cl_event *event);

/* ---- Statistics ---------------------------------------------------------------------------- */

/*
 * What a batch did to the load, on the device: this header, then three arrays of R u32, in this
 * order: load c (pairs that chose the expert, before dropping), kept, dropped. Every field has four
 * bytes, so the struct is also the host's mirror. Pairs of masked tokens and surplus pairs count
 * nowhere. pairs = kept + dropped. Identity experts keep all their pairs.
 */
typedef struct clmoe_stats {
    uint32_t tokens;           /* unmasked tokens */
    uint32_t columns;          /* R: length of each array */
    uint32_t pairs;            /* sum of load over R */
    uint32_t kept;             /* sum of kept over R */
    uint32_t dropped;          /* sum of dropped over R */
    uint32_t identity_pairs;   /* sum of load over the identity experts */
    uint32_t nonfinite_tokens; /* unmasked tokens with fewer than K finite logits */
    uint32_t idle_experts;     /* of the E experts with weights, those with load 0 */
    uint32_t max_load;         /* over the E experts with weights */
    uint32_t min_load;
    float max_violation; /* MaxVio = max_load / mean load - 1 over the E experts; 0 without load */
    float load_entropy; /* -sum F log F in nats, F = load / sum over the E experts; at most log E */
    uint32_t reserved[4];
} clmoe_stats;

/* Bytes of the statistics of a layer: sizeof(clmoe_stats) + 3 * R * 4. 0 for a NULL layer. */
CLMOE_API size_t clmoe_stats_size(const clmoe_layer *layer);

/* ---- The steps ------------------------------------------------------------------------------ */

/*
 * The steps of clmoe_forward() one by one, for applications that replace one. Each takes the layer,
 * a queue, its arguments, a wait list and an event, with the promises of clmoe_forward(). `scratch`
 * is a buffer of the size clmoe_layer_memory() gives.
 */

/* score: x [T,D] -> logits [T,R] f32 and scores [T,R] f32. */
typedef struct clmoe_score_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* router, router_bias */
    clmoe_buf x;                  /* [T,D]; not read with logits_in */
    clmoe_buf logits_in;          /* optional [T,R] */
    clmoe_buf logits;             /* [T,R]; not written with logits_in */
    /*
     * [T,R]: what topk chooses by, without the selection bias: s(l), or with topk-then-score order
     * l itself after softcap and temperature. -infinity where the logit was not finite.
     */
    clmoe_buf scores;
} clmoe_score_args;

/* topk: scores [T,R] -> ids [T,K], weights [T,K], live [T]. */
typedef struct clmoe_topk_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* select_bias, expert_scale */
    clmoe_buf scores;             /* [T,R] f32 */
    clmoe_buf ids;                /* [T,K] i32 */
    /* [T,K] f32, after renorm and scale; before both with renorm_after_drop. */
    clmoe_buf weights_out;
    clmoe_buf live; /* [T] i32: how many leading pairs of the token are real, K or fewer */
} clmoe_topk_args;

/*
 * The routing plan is one buffer; this says where its arrays lie, in bytes from its start. A pair
 * is (token, choice k), pair = token * K + k, or token_offsets[token] + k with token_offsets. The
 * rows of expert e are the slots [offsets[e], offsets[e] + kept[e]), offsets are multiples of
 * row_tile; with a capacity, offsets[e] = e * (C rounded up to row_tile).
 */
typedef struct clmoe_plan_layout {
    size_t bytes;       /* of the whole plan */
    uint32_t pairs;     /* T*K */
    uint32_t slots;     /* S: bound of the slots in use, a multiple of row_tile */
    uint32_t capacity;  /* C, or 0 when dropless */
    uint32_t row_tile;  /* rows an engine computes together */
    size_t load;        /* [R] u32: pairs per expert before dropping */
    size_t kept;        /* [R] u32 */
    size_t offsets;     /* [E+1] u32: first slot of each bucket */
    size_t slot_of;     /* [T*K] i32: slot of a pair; -1 no place, -2 identity expert */
    size_t row_of;      /* [S] i32: pair of a slot, -1 padding */
    size_t token_of;    /* [S] i32: token of a slot, -1 padding */
    size_t tile_expert; /* [S/row_tile] i32: expert of a tile of rows, -1 no rows */
} clmoe_plan_layout;

CLMOE_API clmoe_status clmoe_plan_layout_get(const clmoe_layer *layer, uint32_t tokens,
                                             clmoe_plan_layout *layout);

/* plan: ids -> plan. */
typedef struct clmoe_plan_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_buf ids;          /* [pairs] i32 */
    clmoe_buf pair_weights; /* [pairs] f32; needed by the keep rules priority and weight */
    clmoe_buf live;         /* optional [T] i32 */
    clmoe_buf token_mask;   /* optional [T] u8 */
    /*
     * Optional [T+1] i32, ascending from 0: token t owns the pairs [token_offsets[t],
     * token_offsets[t+1]), at most K of them. Without it, pairs [t*K, t*K + K).
     */
    clmoe_buf token_offsets;
    clmoe_buf scratch;
    clmoe_buf plan;
} clmoe_plan_args;

/* dispatch: x [T,D] -> xe [S,D]; rows of padding become 0. */
typedef struct clmoe_dispatch_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_buf x;
    clmoe_buf plan;
    clmoe_buf xe;
} clmoe_dispatch_args;

/* experts: xe [S,D], or x [T,D] gathered through the plan -> ye [S,D]. */
typedef struct clmoe_experts_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* experts */
    clmoe_buf x;                  /* [T,D], if xe is not given */
    clmoe_buf xe;                 /* [S,D], as dispatch made it */
    clmoe_buf pair_weights;       /* [pairs] f32, needed unless weight_at is output */
    clmoe_buf plan;
    clmoe_buf scratch;
    clmoe_buf ye; /* [S,D]; rows of padding are undefined */
} clmoe_experts_args;

/* combine: y = residual + output_bias + sum over the pairs of a token of w * ye[slot], k ascending.
 */
typedef struct clmoe_combine_args {
    size_t struct_size;
    uint32_t tokens;
    const clmoe_weights *weights; /* output_bias */
    clmoe_buf x;                  /* [T,D], needed with identity experts */
    clmoe_buf ye;                 /* [S,D] */
    clmoe_buf pair_weights;       /* [pairs] f32 */
    clmoe_buf plan;
    clmoe_buf token_mask;    /* optional [T] u8 */
    clmoe_buf token_offsets; /* optional [T+1] i32, as in plan */
    clmoe_buf shared;        /* optional [T,D]: output of the shared expert */
    clmoe_buf shared_gate;   /* optional [T] f32: x . weights.shared_gate, before the sigmoid */
    clmoe_buf residual;      /* optional [T,D] */
    clmoe_buf y;             /* [T,D] */
} clmoe_combine_args;

/* stats: plan -> clmoe_stats. */
typedef struct clmoe_stats_args {
    size_t struct_size;
    uint32_t tokens;
    clmoe_buf plan;
    clmoe_buf live;       /* optional [T] i32 */
    clmoe_buf token_mask; /* optional [T] u8 */
    clmoe_buf stats;
} clmoe_stats_args;

CLMOE_API clmoe_status clmoe_score(clmoe_layer *layer, cl_command_queue queue,
                                   const clmoe_score_args *args, cl_uint num_wait,
                                   const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_topk(clmoe_layer *layer, cl_command_queue queue,
                                  const clmoe_topk_args *args, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_plan(clmoe_layer *layer, cl_command_queue queue,
                                  const clmoe_plan_args *args, cl_uint num_wait,
                                  const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_dispatch(clmoe_layer *layer, cl_command_queue queue,
                                      const clmoe_dispatch_args *args, cl_uint num_wait,
                                      const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_experts(clmoe_layer *layer, cl_command_queue queue,
                                     const clmoe_experts_args *args, cl_uint num_wait,
                                     const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_combine(clmoe_layer *layer, cl_command_queue queue,
                                     const clmoe_combine_args *args, cl_uint num_wait,
                                     const cl_event *wait, cl_event *event);
CLMOE_API clmoe_status clmoe_stats_compute(clmoe_layer *layer, cl_command_queue queue,
                                           const clmoe_stats_args *args, cl_uint num_wait,
                                           const cl_event *wait, cl_event *event);

/* ---- Checkpoints --------------------------------------------------------------------------- */

/*
 * A model directory: config.json and model.safetensors, or model.safetensors.index.json and its
 * shards. Families are recognised by a table of config fields and tensor names, not by code each; a
 * model_type outside the table works if its fields and tensors fit a known pattern. Nothing is
 * guessed silently: a tensor under the block that nothing consumed is an error that names it.
 */
typedef struct clmoe_checkpoint clmoe_checkpoint;

/*
 * Opens a directory; reads config.json and all headers, no tensor data. Errors: CLMOE_IO,
 * CLMOE_BAD_FILE, with a sentence that names the file and the field.
 */
CLMOE_API clmoe_status clmoe_checkpoint_open(const char *directory, clmoe_checkpoint **out);

CLMOE_API void clmoe_checkpoint_close(clmoe_checkpoint *checkpoint);

/* config.json's model_type. Valid as long as the checkpoint. */
CLMOE_API const char *clmoe_checkpoint_model_type(const clmoe_checkpoint *checkpoint);

/*
 * Fills `desc` with the MoE block of layer `layer` (0-based). Callers may then set engine,
 * capacity, training and the storage types. Errors: CLMOE_BAD_FILE, CLMOE_UNSUPPORTED for a feature
 * clmoe lacks, by name.
 */
CLMOE_API clmoe_status clmoe_checkpoint_layer(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                              clmoe_layer_desc *desc);

/*
 * Creates the weight buffers of the block in `context` and writes them through `queue`; returns
 * when they are written, rounded to desc's types. `desc` is what clmoe_checkpoint_layer() filled.
 * The buffers are yours: release them with clmoe_weights_release(). On error nothing is left
 * allocated.
 */
CLMOE_API clmoe_status clmoe_checkpoint_upload(const clmoe_checkpoint *checkpoint, uint32_t layer,
                                               const clmoe_layer_desc *desc, cl_context context,
                                               cl_command_queue queue, clmoe_weights *weights);

#ifdef __cplusplus
}
#endif

#endif
