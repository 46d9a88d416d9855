#include "places.h"
#include "runtime/structs.h"

#include <string.h>

const char *place_name(const clmoe_weights *w, const clmoe_buf *buf) {
#define WEIGHT(field)                                                                              \
    { #field, offsetof(clmoe_weights, field) }
#define WEIGHTS_OF_MLP(mlp)                                                                        \
    WEIGHT(mlp.gate), WEIGHT(mlp.up), WEIGHT(mlp.down), WEIGHT(mlp.gate_bias),                     \
        WEIGHT(mlp.up_bias), WEIGHT(mlp.down_bias)
    static const struct {
        const char *name;
        size_t offset;
    } names[] = {WEIGHT(router),        WEIGHT(router_bias), WEIGHT(select_bias),
                 WEIGHT(shared_gate),   WEIGHT(output_bias), WEIGHTS_OF_MLP(experts),
                 WEIGHTS_OF_MLP(shared)};
#undef WEIGHTS_OF_MLP
#undef WEIGHT
    const size_t offset = (size_t)((const char *)buf - (const char *)w);
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (names[i].offset == offset)
            return names[i].name;
    return "a weight";
}

/* ---- The walk -------------------------------------------------------------------------------- */

/* A role with one tensor, in a buffer of its own; nothing if the block has no such tensor. */
static clmoe_status visit_single(const block *b, const place_visitor *v, clmoe_type type, int role,
                                 clmoe_buf *buf) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!block_has(b, role))
        return CLMOE_SUCCESS;
    const tensor_place place = {.tensor = b->roles[role].tensors, .type = type, .buf = buf};
    TRY(v->buffer(v->user, type, place.tensor->tensor->elements, buf));
    TRY(v->tensor(v->user, &place));
done:
    return status;
}

/*
 * Two roles in one buffer: for each of their tensors, first's elements and then second's. With
 * second -1, or absent, first alone.
 */
static clmoe_status visit_pair(const block *b, const place_visitor *v, clmoe_type type,
                               const int roles[2], clmoe_buf *buf) {
    clmoe_status status = CLMOE_SUCCESS;
    const block_role *first = &b->roles[roles[0]];
    const block_role *second = roles[1] >= 0 && block_has(b, roles[1]) ? &b->roles[roles[1]] : NULL;
    if (first->pattern == NULL)
        return CLMOE_SUCCESS;
    const uint64_t size = first->tensors[0].tensor->elements, stride = second ? 2 * size : size;
    tensor_place place = {.type = type, .buf = buf};
    TRY(v->buffer(v->user, type, first->count * stride, buf));
    for (uint32_t e = 0; e < first->count; e++) {
        place.tensor = &first->tensors[e];
        place.at = e * stride;
        TRY(v->tensor(v->user, &place));
        if (second == NULL)
            continue;
        place.tensor = &second->tensors[e];
        place.at += size;
        TRY(v->tensor(v->user, &place));
    }
done:
    return status;
}

static clmoe_status visit_mlp(const block *b, const place_visitor *v, clmoe_type type, int base,
                              const clmoe_mlp_desc *desc, clmoe_mlp_weights *w) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool together = block_has(b, base + PART_GATE_UP);
    const bool joined = !together && desc->gate_layout == CLMOE_GATE_CONCAT;
    const int gate = base + (together ? PART_GATE_UP : PART_GATE);
    const int gate_bias = base + (together ? PART_GATE_UP_BIAS : PART_GATE_BIAS);
    const int up = base + PART_UP, up_bias = base + PART_UP_BIAS;
    const struct {
        int roles[2];
        clmoe_buf *buf;
    } parts[] = {
        {{gate, joined ? up : -1}, &w->gate},
        {{gate_bias, joined ? up_bias : -1}, &w->gate_bias},
        {{up, -1}, together || joined ? NULL : &w->up},
        {{up_bias, -1}, together || joined ? NULL : &w->up_bias},
        {{base + PART_DOWN, -1}, &w->down},
        {{base + PART_DOWN_BIAS, -1}, &w->down_bias},
    };
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        if (parts[i].buf != NULL)
            TRY(visit_pair(b, v, type, parts[i].roles, parts[i].buf));
done:
    return status;
}

clmoe_status block_places(const block *b, const clmoe_layer_desc *desc, clmoe_weights *w,
                          const place_visitor *v) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_type type = desc->weight_type, router = desc->router.weight_type;
    TRY(visit_single(b, v, router, ROLE_ROUTER, &w->router));
    TRY(visit_single(b, v, CLMOE_F32, ROLE_ROUTER_BIAS, &w->router_bias));
    TRY(visit_single(b, v, CLMOE_F32, ROLE_SELECT_BIAS, &w->select_bias));
    TRY(visit_single(b, v, router, ROLE_SHARED_GATE, &w->shared_gate));
    TRY(visit_single(b, v, type, ROLE_OUTPUT_BIAS, &w->output_bias));
    TRY(visit_mlp(b, v, type, ROLE_EXPERTS, &desc->experts, &w->experts));
    if (desc->shared.hidden_dim > 0)
        TRY(visit_mlp(b, v, type, ROLE_SHARED, &desc->shared, &w->shared));
done:
    return status;
}

/* ---- The caller's descriptor ----------------------------------------------------------------- */

/* CLMOE_INVALID_DESC for types that weights are not stored in. */
static clmoe_status check_types(const clmoe_layer_desc *desc) {
    if (desc->weight_type > CLMOE_BF16)
        return fail(CLMOE_INVALID_DESC, "desc.weight_type is %u, which is no clmoe_type",
                    desc->weight_type);
    if (desc->router.weight_type > CLMOE_BF16)
        return fail(CLMOE_INVALID_DESC, "desc.router.weight_type is %u, which is no clmoe_type",
                    desc->router.weight_type);
    return CLMOE_SUCCESS;
}

/*
 * CLMOE_INVALID_ARGUMENT if the caller's descriptor is of other buffers than the file's. A
 * router.select_bias may be the state's, and is not compared.
 */
static clmoe_status check_desc(const clmoe_layer_desc *given, const clmoe_layer_desc *file) {
#define SAME(field)                                                                                \
    { #field, given->field, file->field }
#define SAME_MLP(mlp)                                                                              \
    SAME(mlp.hidden_dim), SAME(mlp.gate_layout), SAME(mlp.gate_up_transposed),                     \
        SAME(mlp.down_transposed), SAME(mlp.gate_up_bias), SAME(mlp.down_bias)
    const struct {
        const char *field;
        uint32_t given, file;
    } same[] = {
        SAME(dim),         SAME(num_experts), SAME(num_identity_experts), SAME(router.bias),
        SAME_MLP(experts), SAME_MLP(shared),  SAME(shared_gate),          SAME(output_bias),
    };
#undef SAME_MLP
#undef SAME
    for (size_t i = 0; i < sizeof same / sizeof same[0]; i++)
        if (same[i].given != same[i].file)
            return fail(CLMOE_INVALID_ARGUMENT,
                        "desc.%s is %u, but clmoe_checkpoint_layer() fills %u", same[i].field,
                        same[i].given, same[i].file);
    return CLMOE_SUCCESS;
}

clmoe_status block_open(const clmoe_checkpoint *checkpoint, uint32_t layer,
                        const clmoe_layer_desc *desc, clmoe_layer_desc *own, block *b) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_layer_desc file_desc;
    memset(b, 0, sizeof *b);
    clmoe_layer_desc_init(own);
    TRY(struct_take(CLMOE_INVALID_DESC, "desc", desc, own, sizeof *own));
    TRY(struct_desc_unused(own, "desc."));
    TRY(check_types(own));
    TRY(checkpoint_describe(checkpoint, layer, &file_desc, b));
    TRY(check_desc(own, &file_desc));
done:
    return status;
}
