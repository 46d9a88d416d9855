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

/* out [rows,n] = a [rows,k] weight [n,k]^T + bias [n], bias optional, of use->shape.bias_type. */
clmoe_status gemm_dense(const gemm_use *use, launch *chain, uint32_t rows, clmoe_buf a,
                        clmoe_buf weight, clmoe_buf bias, uint32_t n, uint32_t k, clmoe_buf out);

/* out [rows,n] = a [rows,k] weight [k,n]: for a use created with gate_up_transposed. */
clmoe_status gemm_dense_transposed(const gemm_use *use, launch *chain, uint32_t rows, clmoe_buf a,
                                   clmoe_buf weight, uint32_t n, uint32_t k, clmoe_buf out);

/*
 * out [slots,dim] = down(h), h [slots,H] = activation of gate and up. `rows` describes the buckets,
 * A and the row weights: the first part of a gemm_problem; hidden and engine are scratch.
 */
clmoe_status gemm_mlp(const gemm_use *use, launch *chain, const clmoe_mlp_desc *mlp,
                      const clmoe_mlp_weights *weights, uint32_t dim, const gemm_problem *rows,
                      clmoe_buf hidden, clmoe_buf engine, clmoe_buf out);

/* Whether the engine can address gemm_mlp()'s problems; to be asked before anything is enqueued. */
clmoe_status gemm_mlp_check(const gemm_use *use, const clmoe_mlp_desc *mlp,
                            const clmoe_mlp_weights *weights, uint32_t dim,
                            const gemm_problem *rows, clmoe_buf hidden, clmoe_buf engine,
                            clmoe_buf out);

/* Size of an MLP's weights in the engine's packed form. Errors: CLMOE_UNSUPPORTED without one. */
clmoe_status gemm_mlp_packed_bytes(const gemm_use *use, const clmoe_mlp_desc *mlp, uint32_t dim,
                                   size_t *bytes);

/* Packs raw weights into a buffer of that size; weights.packed of gemm_mlp(). */
clmoe_status gemm_mlp_pack(const gemm_use *use, launch *chain, const clmoe_mlp_desc *mlp,
                           const clmoe_mlp_weights *raw, uint32_t dim, clmoe_buf packed);

#endif
