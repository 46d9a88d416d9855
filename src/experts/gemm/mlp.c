/* Problems for the engines, from the descriptor of an MLP. */
#include "mlp.h"
#include "experts/pack.clh"

enum { PACKED_ALIGNMENT = 256 };

clmoe_status gemm_dense(const gemm_use *use, launch *chain, const dense_map *map) {
    const bool transposed = use->shape.gate_up_transposed;
    const gemm_problem problem = {
        .a_type = use->shape.a_type,
        .w_type = use->shape.w_type,
        .bias_type = use->shape.bias_type,
        .c_type = use->shape.c_type,
        .slots = map->rows,
        .row_tile = 1,
        .experts = 1,
        .a = map->a,
        .form = GEMM_LINEAR,
        .n = map->n,
        .k = map->k,
        .up = {.buf = map->weight,
               .row = transposed ? 1 : map->k,
               .col = transposed ? map->n : 1,
               .bias = map->bias,
               .bias_row = 1},
        .c = map->out,
    };
    return use->engine->run(use->state, chain, &problem);
}

/* The two problems of an MLP: gate and up, or up alone, and down. */
typedef struct mlp_problems {
    gemm_problem first, second;
} mlp_problems;

/* `rows` is what both have in common; A, scratch and C are set by the caller. */
static mlp_problems problems_of(const gemm_use *use, const clmoe_mlp_desc *mlp,
                                const clmoe_mlp_weights *weights, uint32_t dim,
                                const gemm_problem *rows) {
    mlp_problems p = {.first = *rows};
    p.first.a_type = use->shape.a_type;
    p.first.w_type = use->shape.w_type;
    p.first.bias_type = use->shape.bias_type;
    p.first.c_type = use->shape.c_type;
    p.first.packed = weights->packed.mem != NULL;
    p.second = p.first;
    gemm_mlp_weights(mlp, weights, dim, use->shape.w_type, &p.first.gate, &p.first.up,
                     &p.second.up);

    p.first.form = mlp->gate_layout == CLMOE_GATE_NONE ? GEMM_PLAIN : GEMM_GATED;
    p.first.n = mlp->hidden_dim;
    p.first.k = dim;
    p.first.activation = mlp->activation;
    p.first.limit = mlp->limit;
    p.first.alpha = mlp->alpha;
    p.first.up_shift = mlp->up_shift;

    p.second.form = GEMM_LINEAR;
    p.second.row_weight = GEMM_ROW_WEIGHT_NONE;
    p.second.n = dim;
    p.second.k = mlp->hidden_dim;
    return p;
}

/* Bytes of the packed weights of each problem, the first rounded up to the start of the second. */
static bool packed_sizes(const gemm_use *use, const mlp_problems *p, size_t *first,
                         size_t *second) {
    const size_t element = type_bytes(use->shape.w_type);
    const size_t elements[] = {use->engine->packed_elements(use->state, &p->first),
                               use->engine->packed_elements(use->state, &p->second)};
    if (!size_mul(elements[0], element, first) || !size_mul(elements[1], element, second) ||
        !size_add(*first, PACKED_ALIGNMENT - 1, first))
        return false;
    *first = *first / PACKED_ALIGNMENT * PACKED_ALIGNMENT;
    return true;
}

/* Problems of packed weights: in `packed` the header, the first matrix, and where it ends the
 * other.
 */
static void set_packed(const gemm_use *use, mlp_problems *p, clmoe_buf packed) {
    size_t first = 0, second = 0;
    packed_sizes(use, p, &first, &second);
    packed.offset += PACKED_HEADER_BYTES;
    p->first.up.buf = packed;
    p->second.up.buf = (clmoe_buf){packed.mem, packed.offset + first};
}

/* The same with all their buffers. */
static mlp_problems bound_problems(const mlp_call *call) {
    mlp_problems p = problems_of(call->use, call->mlp, call->weights, call->dim, &call->rows);
    if (p.first.packed)
        set_packed(call->use, &p, call->weights->packed);
    p.first.c = call->hidden;
    p.first.scratch = call->engine;
    p.second.a = call->hidden;
    p.second.token_of = (clmoe_buf){0};
    p.second.c = call->out;
    p.second.scratch = call->engine;
    return p;
}

clmoe_status gemm_mlp(const mlp_call *call, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_use *use = call->use;
    const mlp_problems p = bound_problems(call);
    TRY(use->engine->run(use->state, chain, &p.first));
    TRY(use->engine->run(use->state, chain, &p.second));
done:
    return status;
}

clmoe_status gemm_mlp_check(const mlp_call *call) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_use *use = call->use;
    if (!use->engine->check || call->rows.slots == 0)
        return CLMOE_SUCCESS;
    const mlp_problems p = bound_problems(call);
    TRY(use->engine->check(use->state, &p.first));
    TRY(use->engine->check(use->state, &p.second));
done:
    return status;
}

clmoe_status gemm_mlp_packed_bytes(const gemm_use *use, const clmoe_mlp_desc *mlp, uint32_t dim,
                                   size_t *bytes) {
    const clmoe_mlp_weights none = {0};
    const gemm_problem rows = {.experts = use->shape.experts};
    const mlp_problems p = problems_of(use, mlp, &none, dim, &rows);
    size_t first = 0, second = 0;
    *bytes = 0;
    if (!use->engine->pack)
        return fail(CLMOE_UNSUPPORTED, "engine %s has no packed form of weights",
                    use->engine->name);
    if (packed_sizes(use, &p, &first, &second) && size_add(first, second, bytes) &&
        size_add(*bytes, PACKED_HEADER_BYTES, bytes))
        return CLMOE_SUCCESS;
    *bytes = 0;
    return fail(CLMOE_UNSUPPORTED, "the packed weights of %u experts exceed size_t",
                use->shape.experts);
}

clmoe_status gemm_mlp_pack(const gemm_use *use, launch *chain, const clmoe_mlp_desc *mlp,
                           const clmoe_mlp_weights *raw, uint32_t dim, clmoe_buf packed) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_problem rows = {.experts = use->shape.experts};
    const mlp_problems from = problems_of(use, mlp, raw, dim, &rows);
    mlp_problems to = from;
    set_packed(use, &to, packed);
    TRY(use->engine->pack(use->state, chain, &from.first, to.first.up.buf));
    TRY(use->engine->pack(use->state, chain, &from.second, to.second.up.buf));
done:
    return status;
}
