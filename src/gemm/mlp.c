/* Problems for the engines, from the descriptor of an MLP. */
#include "mlp.h"

clmoe_status gemm_dense(const gemm_use *use, launch *chain, uint32_t rows, clmoe_buf a,
                        clmoe_buf weight, clmoe_buf bias, uint32_t n, uint32_t k, clmoe_buf out) {
    gemm_problem problem = {
        .a_type = use->shape.a_type,
        .w_type = use->shape.w_type,
        .c_type = use->shape.c_type,
        .slots = rows,
        .row_tile = 1,
        .experts = 1,
        .a = a,
        .form = GEMM_LINEAR,
        .n = n,
        .k = k,
        .up = {.buf = weight, .row = k, .col = 1, .bias = bias, .bias_row = 1},
        .c = out,
    };
    return use->engine->run(use->state, chain, &problem);
}

clmoe_status gemm_mlp(const gemm_use *use, launch *chain, const clmoe_mlp_desc *mlp,
                      const clmoe_mlp_weights *weights, uint32_t dim, const gemm_problem *rows,
                      clmoe_buf hidden, clmoe_buf engine, clmoe_buf out) {
    clmoe_status status = CLMOE_SUCCESS;
    gemm_problem first = *rows, second;
    first.a_type = use->shape.a_type;
    first.w_type = use->shape.w_type;
    first.c_type = use->shape.c_type;
    second = first;
    gemm_mlp_weights(mlp, weights, dim, first.w_type, &first.gate, &first.up, &second.up);

    first.form = mlp->gate_layout == CLMOE_GATE_NONE ? GEMM_PLAIN : GEMM_GATED;
    first.n = mlp->hidden_dim;
    first.k = dim;
    first.activation = mlp->activation;
    first.limit = mlp->limit;
    first.alpha = mlp->alpha;
    first.up_shift = mlp->up_shift;
    first.c = hidden;
    first.scratch = engine;
    TRY(use->engine->run(use->state, chain, &first));

    second.form = GEMM_LINEAR;
    second.row_weight = GEMM_ROW_WEIGHT_NONE;
    second.n = dim;
    second.k = mlp->hidden_dim;
    second.a = hidden;
    second.token_of = (clmoe_buf){0};
    second.c = out;
    second.scratch = engine;
    TRY(use->engine->run(use->state, chain, &second));
done:
    return status;
}
