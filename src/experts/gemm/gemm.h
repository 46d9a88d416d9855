/*
 * Expert GEMM engines behind one table.
 *
 * A problem is a grouped NT GEMM over buckets whose row counts live on the device:
 *   linear:  C[s, n] = bias[e, n] + sum_k A[s, k] * W[e, n, k]
 *   gated:   C[s, j] = act(gate[s, j]) * up[s, j], gate and up being linear outputs
 *   plain:   C[s, n] = act(linear)
 * for the rows s of expert e's bucket, [offsets[e], offsets[e] + kept[e]). Rows of padding may be
 * written with anything finite or not at all; nothing outside [0, slots) is touched.
 *
 * In training the gated and plain forms also keep z, the linear outputs before the activation, and
 * linear problems come with W of both orders: dX = dY W is C = A W'^T of the W' that W is along its
 * other dimension. The third form, gradients of weights, is a gemm_gradient:
 *   C_e[m, n] = sum over the rows s of expert e's bucket of P[s, m] * Q[s, n], s ascending
 *
 * To add an engine: one file here, one kernel file in cl/experts/gemm/, a declaration
 * here and a line in gemm.c's table.
 */
#ifndef CLMOE_GEMM_H
#define CLMOE_GEMM_H

#include "runtime/launch.h"

/* One stored matrix per expert, addressed as W[e*expert + n*row + k*col], in elements. */
typedef struct gemm_weight {
    clmoe_buf buf;
    uint64_t expert, row, col; /* strides */
    clmoe_buf bias;            /* not given: none; element [e*bias_expert + n*bias_row] */
    uint64_t bias_expert, bias_row;
} gemm_weight;

/* What happens to the linear outputs; see clmoe_mlp_desc. */
typedef enum gemm_form { GEMM_LINEAR, GEMM_PLAIN, GEMM_GATED } gemm_form;

/* Where the row weight multiplies, if anywhere. */
typedef enum gemm_row_weight {
    GEMM_ROW_WEIGHT_NONE,
    GEMM_ROW_WEIGHT_INPUT,  /* the sum over k, before the bias: same as scaling A's row */
    GEMM_ROW_WEIGHT_OUTPUT, /* C's row, after the activation */
} gemm_row_weight;

/*
 * Where z lies, in elements of c_type: gate of row s and column j in element s * row + j * step, up
 * `up` elements further. Rows are those of slots, or of pairs: without padding.
 */
typedef struct gemm_z {
    uint64_t up;
    uint32_t row, step;
    bool by_pair;
} gemm_z;

typedef struct gemm_problem {
    clmoe_type a_type, w_type, bias_type, c_type; /* of A, weights, biases, C; as in the shape */
    /* Buckets. For a dense problem (one expert, all rows) tile_expert.mem is NULL, slots = rows. */
    clmoe_buf tile_expert; /* [slots/row_tile] i32: expert of a tile of rows, -1 none */
    clmoe_buf offsets;     /* [E+1] u32 */
    clmoe_buf kept;        /* [E] u32 */
    uint32_t slots;        /* bound of rows, a multiple of row_tile unless dense */
    uint32_t row_tile;     /* of the plan; what engine->row_tile() said for this batch */
    uint32_t experts;      /* E; 1 for dense */
    /* A */
    clmoe_buf a;        /* rows of k */
    clmoe_buf token_of; /* [slots] i32: row of A for slot s, -1 padding; not given: row s itself */
    /* W and the output */
    gemm_form form;
    uint32_t n; /* columns of C: H for gate/up, D for down, R for the router */
    uint32_t k;
    gemm_weight gate; /* form GATED only */
    gemm_weight up;   /* or the only matrix */
    bool between;     /* C is A of an MLP's second problem, in the engine's own form: joins() */
    bool packed;      /* up.buf holds gate and up, or the only matrix, as pack() made it */
    clmoe_activation activation;
    float limit, alpha, up_shift;
    /* Row weights: pair_weights[pair_of[s]] */
    gemm_row_weight row_weight;
    clmoe_buf pair_of;      /* [slots] i32 */
    clmoe_buf pair_weights; /* [pairs] f32 */
    clmoe_buf c;            /* [slots, n] */
    bool accumulate;        /* form LINEAR: added to C */
    clmoe_buf z;            /* form GATED or PLAIN, of a shape in training: optional */
    gemm_z z_at;
    clmoe_buf scratch; /* engine->scratch() bytes */
} gemm_problem;

/* What a layer will ask of an engine, known when the layer is created. */
typedef struct gemm_shape {
    uint32_t experts, dim, hidden_dim;
    gemm_form form;                               /* of the first GEMM */
    clmoe_type a_type, w_type, bias_type, c_type; /* of A, of weights, of biases, of C */
    bool gate_up_transposed, down_transposed, interleaved;
    bool separate;  /* gate and up are two matrices */
    bool biased[2]; /* whether the first GEMM, and the second, may have biases */
    clmoe_activation activation;
    gemm_row_weight row_weight; /* of the first GEMM */
    bool rows_between; /* what is between an MLP's GEMMs must be rows: others change it there */
    bool training;     /* z is kept, and LINEAR problems have W of either order */
} gemm_shape;

/* Rows of an operand of a weight gradient. */
typedef struct gemm_rows {
    clmoe_buf buf;
    uint32_t row;  /* elements between rows */
    bool gathered; /* the row of slot s is row token_of[s]; else row s itself */
} gemm_rows;

/* The storage types of a weight gradient, known when the layer is created. */
typedef struct gemm_gradient_shape {
    clmoe_type p_type, q_type, c_type;
} gemm_gradient_shape;

typedef struct gemm_gradient {
    gemm_gradient_shape types; /* as in the use */
    /* Buckets; of a dense problem, of one expert, offsets.mem is NULL and rows = slots. */
    clmoe_buf offsets, kept;
    clmoe_buf token_of; /* [slots] i32; where an operand is gathered */
    uint32_t slots, experts;
    gemm_rows p, q;
    uint32_t m, n; /* columns of P and of Q */
    clmoe_buf c;   /* C_e[m, n] is element e * expert + m * row + n */
    uint64_t expert, row;
    bool accumulate;   /* added to C; else an expert without rows gets 0 */
    clmoe_buf scratch; /* engine->scratch() bytes */
} gemm_gradient;

/*
 * How an engine makes gradients of weights. It has no check() as gemm_engine has: what it cannot
 * address it says in run(), where the gradients of data are on their way already. Only clblast has
 * such a bound, INT_MAX elements, for the operands in scratch too; and there CLBlast may fail
 * midway whatever was checked.
 */
typedef struct gemm_gradient_engine {
    bool gathers;
    bool blocks;
    /* Compiles; an error with a sentence if it has no kernels for these types or on this device. */
    clmoe_status (*create)(clmoe_context *context, const gemm_gradient_shape *shape, void **state);
    void (*destroy)(void *state); /* NULL allowed */
    /*
     * Bytes of scratch for matrices of up to m x n of that many experts, from up to that many slots
     * together.
     */
    size_t (*scratch)(const void *state, uint32_t experts, size_t slots, uint32_t m, uint32_t n);
    /* The bits of an expert's gradient depend on its rows alone, not on slots or other experts. */
    clmoe_status (*run)(void *state, launch *chain, const gemm_gradient *problem);
} gemm_gradient_engine;

enum { GEMM_MAX_ROW_TILE = 320 };

typedef struct gemm_engine {
    const char *name;
    bool gathers; /* reads A through token_of itself; else the caller dispatches first */
    bool blocks;  /* reads sizes back to the host */
    /*
     * An error with a sentence (fail()) if the engine cannot run on this device. May compile, run
     * and wait for a probe, whose answer the context keeps.
     */
    clmoe_status (*supports)(clmoe_context *context);
    /* An error with a sentence if it has no kernels for `shape`; NULL: it has for all. */
    clmoe_status (*takes)(const gemm_shape *shape);
    /* Compiles what `shape` needs; *state goes to the calls below. */
    clmoe_status (*create)(clmoe_context *context, const gemm_shape *shape, void **state);
    void (*destroy)(void *state); /* NULL allowed */
    /*
     * Rows per tile for about `rows_per_expert` rows in each bucket; 1 where none are needed. Never
     * fewer than for 0 rows, nor more than GEMM_MAX_ROW_TILE.
     */
    uint32_t (*row_tile)(const clmoe_context *context, uint32_t rows_per_expert);
    /*
     * Bytes of what goes from an MLP's first problem to its second in the engine's own form, and
     * whether that of these two does. NULL: it goes in rows of H.
     */
    size_t (*between)(const gemm_shape *shape, size_t slots);
    bool (*joins)(const void *state, const gemm_problem *first, const gemm_problem *second);
    /* Bytes of scratch for a problem with that many slots, columns and form. */
    size_t (*scratch)(const gemm_shape *shape, size_t slots, uint32_t n, gemm_form form);
    /*
     * An error with a sentence if the engine cannot address `problem`; asked before anything of its
     * batch is enqueued. NULL: it can address all.
     */
    clmoe_status (*check)(const void *state, const gemm_problem *problem);
    clmoe_status (*run)(void *state, launch *chain, const gemm_problem *problem);
    /*
     * The engine's own form of weights; all NULL where it has none. Of a problem only experts,
     * form, n, k, gate and up are read. Elements are of w_type; SIZE_MAX: more than size_t holds.
     * packed_layout: what their order follows from besides the shape, as a number.
     */
    size_t (*packed_elements)(const void *state, const gemm_problem *problem);
    uint32_t (*packed_layout)(const void *state);
    clmoe_status (*pack)(void *state, launch *chain, const gemm_problem *problem, clmoe_buf packed);
    const gemm_gradient_engine *gradient;
} gemm_engine;

/* The table, ended by NULL, in order of preference where several would do. */
extern const gemm_engine *const gemm_engines[];

/*
 * Picks by name and creates; NULL name: the first of the table that runs `shape` on the device and
 * whose kernels fit it. *engine is NULL on an error.
 */
clmoe_status gemm_engine_create(clmoe_context *context, const char *name, const gemm_shape *shape,
                                const gemm_engine **engine, void **state);

/*
 * The same for gradients of weights: the named engine's own kernels, or where it has none for
 * `shape`, those of the first engine of the table that has some.
 */
clmoe_status gemm_gradient_create(clmoe_context *context, const char *name,
                                  const gemm_gradient_shape *shape,
                                  const gemm_gradient_engine **engine, void **state);

extern const gemm_engine gemm_ref, gemm_tiled, gemm_cpu, gemm_nv_mma, gemm_nv_wgmma, gemm_nv_split;
#ifdef CLMOE_WITH_CLBLAST
extern const gemm_engine gemm_clblast;
#endif

/*
 * The strides of an MLP's matrices from its descriptor, as gemm_weight; gate is untouched for a
 * plain MLP. `in` is D, the MLP's H is desc->hidden_dim; `type` is the weights' type.
 */
void gemm_mlp_weights(const clmoe_mlp_desc *desc, const clmoe_mlp_weights *weights, uint32_t in,
                      clmoe_type type, gemm_weight *gate, gemm_weight *up, gemm_weight *down);

#endif
