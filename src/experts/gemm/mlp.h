/* What the layer makes of an engine: a dense linear map, and a whole MLP over buckets. */
#ifndef CLMOE_MLP_H
#define CLMOE_MLP_H

#include "gemm.h"

/* An engine and what it compiled for one use. */
typedef struct gemm_use {
    const gemm_engine *engine;
    gemm_shape shape;
    void *state;
} gemm_use;

/* The same for gradients of weights. */
typedef struct gemm_gradient_use {
    const gemm_gradient_engine *engine;
    gemm_gradient_shape shape;
    void *state;
} gemm_gradient_use;

/* A dense linear map: out [rows,n] = a [rows,k] weight^T + bias. */
typedef struct dense_map {
    uint32_t rows, n, k;
    clmoe_buf a;
    clmoe_buf weight; /* [n,k]; [k,n] for a use created with gate_up_transposed */
    clmoe_buf bias;   /* optional [n], of use->shape.bias_type */
    clmoe_buf out;
    bool accumulate; /* added to out */
} dense_map;

clmoe_status gemm_dense(const gemm_use *use, launch *chain, const dense_map *map);

/*
 * to [m,n] = sum over rows of p [.,m] f32 times q [.,n]; nothing where `to` is none. `rows`: which,
 * found through its token_of where that is given.
 */
typedef struct dense_gradient {
    uint32_t m, n;
    clmoe_buf p, q, to;
} dense_gradient;

clmoe_status gemm_dense_gradient(const gemm_gradient_use *use, launch *chain,
                                 const gemm_gradient *rows, const dense_gradient *map);

/* A whole MLP: out [slots,dim] = down(h), h [slots,H] = activation of gate and up. */
typedef struct mlp_call {
    const gemm_use *use;
    const clmoe_mlp_desc *mlp;
    const clmoe_mlp_weights *weights;
    uint32_t dim;
    gemm_problem rows;        /* the buckets, A and the row weights: its first part alone */
    clmoe_buf hidden, engine; /* scratch */
    clmoe_buf z;              /* optional, in training: gate and up of each row, see mlp_z() */
    size_t z_rows;            /* of z */
    bool z_by_pair;
    clmoe_buf out;
} mlp_call;

/* Bytes of call->hidden for that many slots; SIZE_MAX: more than size_t holds. */
size_t gemm_mlp_hidden_bytes(const gemm_use *use, const clmoe_mlp_desc *mlp, size_t slots);

/* How z of an MLP lies in `rows` rows: as its weights; gate and up apart where those are. */
gemm_z mlp_z(const clmoe_mlp_desc *mlp, size_t rows, bool by_pair);

/* Its halves: call->hidden, and z where it is given; and from there call->out. */
clmoe_status gemm_mlp_first(const mlp_call *call, launch *chain);
clmoe_status gemm_mlp_second(const mlp_call *call, launch *chain);

/* Back through down: rows of dy, which are call->rows.a, -> those on what goes in: call->hidden. */
clmoe_status gemm_mlp_back_down(const mlp_call *call, launch *chain);

/* Back through gate and up: rows dz of slots, laid out as z -> call->out [slots,dim]. */
clmoe_status gemm_mlp_back_up(const mlp_call *call, launch *chain, clmoe_buf dz);

/* The gradients of an MLP's matrices. A gradient that is not given is not computed. */
typedef struct mlp_gradient_call {
    const gemm_gradient_use *use;
    const clmoe_mlp_desc *mlp;
    const clmoe_mlp_gradients *gradients;
    uint32_t dim;
    gemm_gradient rows; /* the buckets alone */
    gemm_rows x, dy;    /* [.,dim]: what went into gate and up, and the gradient on what came out */
    clmoe_buf dz, hidden; /* of slots: the gradient on z, and what went into down */
    bool listed;          /* rows of dz and hidden are found through token_of too */
} mlp_gradient_call;

clmoe_status gemm_mlp_gradients(const mlp_gradient_call *call, launch *chain);

/* Whether the engine can address the problems of both; to be asked before anything is enqueued. */
clmoe_status gemm_mlp_check(const mlp_call *call);

/* Size of an MLP's weights in the engine's packed form, the header included. Errors:
 * CLMOE_UNSUPPORTED without one. */
clmoe_status gemm_mlp_packed_bytes(const gemm_use *use, const clmoe_mlp_desc *mlp, uint32_t dim,
                                   size_t *bytes);

/* Packs raw weights into a buffer of that size, behind the header; weights.packed of a call. */
clmoe_status gemm_mlp_pack(const gemm_use *use, launch *chain, const clmoe_mlp_desc *mlp,
                           const clmoe_mlp_weights *raw, uint32_t dim, clmoe_buf packed);

#endif
