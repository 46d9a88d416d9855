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
        .accumulate = map->accumulate,
    };
    return use->engine->run(use->state, chain, &problem);
}

static clmoe_buf buf_at(clmoe_buf buf, clmoe_type type, uint64_t element) {
    return (clmoe_buf){buf.mem, buf.mem ? buf.offset + (size_t)element * type_bytes(type) : 0};
}

clmoe_status gemm_dense_gradient(const gemm_gradient_use *use, launch *chain,
                                 const gemm_gradient *rows, const dense_gradient *map) {
    const bool listed = rows->token_of.mem != NULL;
    gemm_gradient problem = *rows;
    if (!map->to.mem)
        return CLMOE_SUCCESS;
    problem.types = use->shape;
    problem.p = (gemm_rows){map->p, map->m, listed};
    problem.q = (gemm_rows){map->q, map->n, listed};
    problem.m = map->m;
    problem.n = map->n;
    problem.c = map->to;
    problem.row = map->n;
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
    p.first.z = call->z;
    p.first.z_at = mlp_z(call->mlp, call->z_rows, call->z_by_pair);
    p.second.a = call->hidden;
    p.second.token_of = (clmoe_buf){0};
    p.second.c = call->out;
    p.second.scratch = call->engine;
    if (call->use->engine->joins && !call->use->shape.rows_between)
        p.first.between = p.second.between =
            call->use->engine->joins(call->use->state, &p.first, &p.second);
    return p;
}

gemm_z mlp_z(const clmoe_mlp_desc *mlp, size_t rows, bool by_pair) {
    const uint32_t hidden = mlp->hidden_dim;
    gemm_z z = {.row = 2 * hidden, .up = hidden, .step = 1, .by_pair = by_pair};
    switch (mlp->gate_layout) {
    case CLMOE_GATE_CONCAT:
        break;
    case CLMOE_GATE_INTERLEAVED:
        z.up = 1;
        z.step = 2;
        break;
    case CLMOE_GATE_SEPARATE:
        z.row = hidden;
        z.up = (uint64_t)rows * hidden;
        break;
    case CLMOE_GATE_NONE:
        z.row = hidden;
        z.up = 0;
        break;
    }
    return z;
}

/* A linear problem over the same buckets: c = a w^T, `n` columns from `k`. */
static gemm_problem back_problem(const mlp_call *call, const gemm_weight *w, uint32_t n,
                                 uint32_t k) {
    mlp_problems p = bound_problems(call);
    gemm_problem back = p.second;
    back.up = (gemm_weight){.buf = w->buf, .expert = w->expert, .row = w->col, .col = w->row};
    back.n = n;
    back.k = k;
    back.between = false;
    return back;
}

clmoe_status gemm_mlp_back_down(const mlp_call *call, launch *chain) {
    const mlp_problems p = bound_problems(call);
    gemm_problem back = back_problem(call, &p.second.up, call->mlp->hidden_dim, call->dim);
    back.a = call->rows.a;
    back.token_of = call->rows.token_of;
    back.c = call->hidden;
    return call->use->engine->run(call->use->state, chain, &back);
}

/* The matrices of gate and up, as problems over the rows of dz see them: one, or two. */
static size_t back_weights(const clmoe_mlp_desc *mlp, const mlp_problems *p, gemm_weight *weights) {
    weights[0] = p->first.gate;
    weights[1] = p->first.up;
    switch (mlp->gate_layout) {
    case CLMOE_GATE_SEPARATE:
        return 2;
    case CLMOE_GATE_NONE:
        weights[0] = p->first.up;
        return 1;
    case CLMOE_GATE_INTERLEAVED: /* rows of both take turns */
        weights[0].row /= 2;
        return 1;
    case CLMOE_GATE_CONCAT:
        break;
    }
    return 1;
}

clmoe_status gemm_mlp_back_up(const mlp_call *call, launch *chain, clmoe_buf dz) {
    clmoe_status status = CLMOE_SUCCESS;
    const gemm_use *use = call->use;
    const mlp_problems p = bound_problems(call);
    const gemm_z at = mlp_z(call->mlp, call->rows.slots, false);
    gemm_weight weights[2];
    const size_t count = back_weights(call->mlp, &p, weights);
    for (size_t i = 0; i < count; i++) {
        gemm_problem back = back_problem(call, &weights[i], call->dim, at.row);
        back.a = buf_at(dz, use->shape.c_type, i * at.up);
        back.accumulate = i > 0;
        TRY(use->engine->run(use->state, chain, &back));
    }
done:
    return status;
}

/* The gradient of a matrix of `rows` x `in` per expert; transposed, it lies as [in,rows]. */
typedef struct gradient_place {
    clmoe_buf buf;
    uint32_t rows, in;
    bool transposed;
} gradient_place;

/* dW = sum of out^T in: `out` has the columns that are rows of W. */
static clmoe_status matrix_gradient(const mlp_gradient_call *call, launch *chain,
                                    const gradient_place *place, gemm_rows out, gemm_rows in) {
    gemm_gradient problem = call->rows;
    if (!place->buf.mem)
        return CLMOE_SUCCESS;
    problem.types = call->use->shape;
    problem.p = place->transposed ? in : out;
    problem.q = place->transposed ? out : in;
    problem.m = place->transposed ? place->in : place->rows;
    problem.n = place->transposed ? place->rows : place->in;
    problem.c = place->buf;
    problem.row = problem.n;
    problem.expert = (uint64_t)problem.m * problem.n;
    return call->use->engine->run(call->use->state, chain, &problem);
}

clmoe_status gemm_mlp_gradients(const mlp_gradient_call *call, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_mlp_desc *mlp = call->mlp;
    const clmoe_mlp_gradients *to = call->gradients;
    const gemm_z at = mlp_z(mlp, call->rows.slots, false);
    const bool transposed = mlp->gate_up_transposed != 0;
    const gemm_rows hidden = {call->hidden, mlp->hidden_dim, call->listed};
    const gemm_rows dz = {call->dz, at.row, call->listed};
    const gemm_rows dup = {buf_at(call->dz, call->use->shape.p_type, at.up), at.row, call->listed};
    const gradient_place gate = {to->gate, at.row, call->dim, transposed};
    const gradient_place up = {to->up, at.row, call->dim, transposed};
    const gradient_place down = {to->down, call->dim, mlp->hidden_dim, mlp->down_transposed != 0};
    if (mlp->gate_layout != CLMOE_GATE_NONE)
        TRY(matrix_gradient(call, chain, &gate, dz, call->x));
    if (mlp->gate_layout == CLMOE_GATE_SEPARATE || mlp->gate_layout == CLMOE_GATE_NONE)
        TRY(matrix_gradient(call, chain, &up, dup, call->x));
    TRY(matrix_gradient(call, chain, &down, call->dy, hidden));
done:
    return status;
}

size_t gemm_mlp_hidden_bytes(const gemm_use *use, const clmoe_mlp_desc *mlp, size_t slots) {
    size_t rows = 0, own = 0;
    if (!size_mul(slots, mlp->hidden_dim, &rows) ||
        !size_mul(rows, type_bytes(use->shape.c_type), &rows))
        return SIZE_MAX;
    if (use->engine && use->engine->between && !use->shape.rows_between)
        own = use->engine->between(&use->shape, slots);
    return own > rows ? own : rows;
}

clmoe_status gemm_mlp_first(const mlp_call *call, launch *chain) {
    const mlp_problems p = bound_problems(call);
    return call->use->engine->run(call->use->state, chain, &p.first);
}

clmoe_status gemm_mlp_second(const mlp_call *call, launch *chain) {
    const mlp_problems p = bound_problems(call);
    return call->use->engine->run(call->use->state, chain, &p.second);
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
