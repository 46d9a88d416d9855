/* The table of engines, the choice among them, and the strides of an MLP's matrices. */
#include "gemm.h"

#include <stdio.h>
#include <string.h>

const gemm_engine *const gemm_engines[] = {
    &gemm_cpu,     &gemm_nv_wgmma, &gemm_nv_mma, &gemm_nv_split, &gemm_tiled, &gemm_ref,
#ifdef CLMOE_WITH_CLBLAST
    &gemm_clblast,
#endif
    NULL,
};

static const gemm_engine *find_engine(const char *name) {
    for (size_t i = 0; gemm_engines[i]; i++)
        if (strcmp(gemm_engines[i]->name, name) == 0)
            return gemm_engines[i];
    return NULL;
}

static clmoe_status unknown_engine(const char *name) {
    char list[128] = "";
    for (size_t i = 0, used = 0; gemm_engines[i] && used < sizeof list; i++)
        used += (size_t)snprintf(list + used, sizeof list - used, "%s%s", i ? ", " : "",
                                 gemm_engines[i]->name);
    return fail(CLMOE_INVALID_DESC, "engine is \"%.64s\", but must be one of: %s", name, list);
}

static clmoe_status can_run(const gemm_engine *engine, clmoe_context *context,
                            const gemm_shape *shape) {
    clmoe_status status = CLMOE_SUCCESS;
    if (engine->takes)
        TRY(engine->takes(shape));
    TRY(engine->supports(context));
done:
    return status;
}

static clmoe_status try_engine(const gemm_engine *engine, clmoe_context *context,
                               const gemm_shape *shape, const gemm_engine **chosen, void **state) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(can_run(engine, context, shape));
    TRY(engine->create(context, shape, state));
    *chosen = engine;
done:
    return status;
}

/* ref runs everything everywhere. */
static clmoe_status create_first(clmoe_context *context, const gemm_shape *shape,
                                 const gemm_engine **engine, void **state) {
    clmoe_status status = CLMOE_UNSUPPORTED;
    const error_sentence kept = error_keep();
    for (size_t i = 0; status == CLMOE_UNSUPPORTED && gemm_engines[i]; i++) {
        status = try_engine(gemm_engines[i], context, shape, engine, state);
    }
    if (status == CLMOE_SUCCESS)
        error_put_back(&kept);
    return status;
}

clmoe_status gemm_engine_create(clmoe_context *context, const char *name, const gemm_shape *shape,
                                const gemm_engine **engine, void **state) {
    *engine = NULL;
    if (!name)
        return create_first(context, shape, engine, state);
    const gemm_engine *found = find_engine(name);
    if (!found)
        return unknown_engine(name);
    return try_engine(found, context, shape, engine, state);
}

clmoe_status gemm_gradient_create(clmoe_context *context, const char *name,
                                  const gemm_gradient_shape *shape,
                                  const gemm_gradient_engine **engine, void **state) {
    clmoe_status status = CLMOE_UNSUPPORTED;
    const error_sentence kept = error_keep();
    *engine = NULL;
    for (size_t i = 0; status == CLMOE_UNSUPPORTED && gemm_engines[i]; i++) {
        const gemm_gradient_engine *next = gemm_engines[i]->gradient;
        if (!next || (name && strcmp(name, gemm_engines[i]->name) != 0) ||
            gemm_engines[i]->supports(context) != CLMOE_SUCCESS)
            continue;
        status = next->create(context, shape, state);
        if (status == CLMOE_SUCCESS)
            *engine = next;
    }
    if (status == CLMOE_UNSUPPORTED && name)
        status = gemm_gradient_create(context, NULL, shape, engine, state);
    if (status == CLMOE_SUCCESS)
        error_put_back(&kept);
    return status;
}

static clmoe_buf buf_at(clmoe_buf buf, clmoe_type type, uint64_t element) {
    return (clmoe_buf){buf.mem, buf.mem ? buf.offset + (size_t)element * type_bytes(type) : 0};
}

/* `count` rows of `in` elements per expert, the first at element `first` and then every `step`-th.
 */
static gemm_weight rows_of(clmoe_buf buf, clmoe_type type, uint64_t count, uint64_t in,
                           bool transposed, uint64_t first, uint64_t step) {
    gemm_weight w = {.expert = count * in};
    w.row = transposed ? step : step * in;
    w.col = transposed ? count : 1;
    w.buf = buf_at(buf, type, transposed ? first : first * in);
    return w;
}

static void set_bias(gemm_weight *w, clmoe_buf bias, clmoe_type type, uint64_t count,
                     uint64_t first, uint64_t step) {
    w->bias = buf_at(bias, type, first);
    w->bias_expert = count;
    w->bias_row = step;
}

void gemm_mlp_weights(const clmoe_mlp_desc *desc, const clmoe_mlp_weights *weights, uint32_t in,
                      clmoe_type type, gemm_weight *gate, gemm_weight *up, gemm_weight *down) {
    const uint64_t hidden = desc->hidden_dim;
    const bool transposed = desc->gate_up_transposed != 0;
    const bool interleaved = desc->gate_layout == CLMOE_GATE_INTERLEAVED;
    const bool together = interleaved || desc->gate_layout == CLMOE_GATE_CONCAT;
    /* Rows per expert in one buffer, up's first row there, and the distance between rows. */
    const uint64_t count = together ? 2 * hidden : hidden;
    const uint64_t up_first = interleaved ? 1 : together ? hidden : 0;
    const uint64_t step = interleaved ? 2 : 1;

    *up = rows_of(together ? weights->gate : weights->up, type, count, in, transposed, up_first,
                  step);
    if (desc->gate_up_bias)
        set_bias(up, together ? weights->gate_bias : weights->up_bias, type, count, up_first, step);
    if (desc->gate_layout != CLMOE_GATE_NONE) {
        *gate = rows_of(weights->gate, type, count, in, transposed, 0, step);
        if (desc->gate_up_bias)
            set_bias(gate, weights->gate_bias, type, count, 0, step);
    }
    *down = rows_of(weights->down, type, in, hidden, desc->down_transposed != 0, 0, 1);
    if (desc->down_bias)
        set_bias(down, weights->down_bias, type, in, 0, 1);
}
