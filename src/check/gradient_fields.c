#include "gradient_fields.h"

#include <string.h>

#define FIELD(of) "gradients." #of, offsetof(clmoe_gradients, of)

enum { MLP_FIELDS = 6 };

/* Those of an MLP; a layer without a shared expert has one of hidden_dim 0. */
#define MLP_GRADIENTS(of)                                                                          \
    {                                                                                              \
        {FIELD(of.gate), rows.gate * dim, element}, {FIELD(of.up), rows.up * dim, element},        \
            {FIELD(of.down), matrix * experts, element},                                           \
            {FIELD(of.gate_bias), biases * rows.gate, element},                                    \
            {FIELD(of.up_bias), biases * rows.up, element},                                        \
            {FIELD(of.down_bias), down_biases * dim, element},                                     \
    }

static void mlp_fields(const clmoe_layer *layer, clmoe_mlp which,
                       gradient_field fields[MLP_FIELDS]) {
    const clmoe_mlp_desc *mlp = layer_mlp(layer, which);
    const bool shared = which == CLMOE_MLP_SHARED;
    const size_t experts = shared ? 1 : layer->desc.num_experts, dim = layer->desc.dim;
    const size_t element = type_bytes(layer_gradient_type(layer, layer->desc.weight_type));
    const size_t matrix = mlp->hidden_dim * dim;
    const mlp_rows rows = check_mlp_rows(mlp, experts);
    const size_t biases = mlp->gate_up_bias && mlp->hidden_dim > 0 ? 1 : 0;
    const size_t down_biases = mlp->down_bias && mlp->hidden_dim > 0 ? experts : 0;
    const gradient_field of_experts[] = MLP_GRADIENTS(experts);
    const gradient_field of_shared[] = MLP_GRADIENTS(shared);
    memcpy(fields, shared ? of_shared : of_experts, sizeof of_experts);
}

size_t gradient_fields(const clmoe_layer *layer, gradient_field fields[GRADIENT_FIELDS]) {
    const clmoe_layer_desc *desc = &layer->desc;
    const clmoe_router_desc *r = &desc->router;
    const size_t dim = desc->dim, R = layer->columns;
    const size_t router = type_bytes(layer_gradient_type(layer, r->weight_type));
    const size_t weight = type_bytes(layer_gradient_type(layer, desc->weight_type));
    const bool learned = r->noise.kind == CLMOE_NOISE_LEARNED;
    const size_t groups = r->groups.two_level ? r->groups.count : 0;
    const gradient_field own[] = {
        {FIELD(router), layer_router_rows(layer) * dim, router},
        {FIELD(router_bias), r->bias ? R : 0, sizeof(float)},
        {FIELD(expert_scale), r->expert_scale ? R : 0, sizeof(float)},
        {FIELD(shared_gate), desc->shared_gate ? dim : 0, router},
        {FIELD(output_bias), desc->output_bias ? dim : 0, weight},
        {FIELD(group_router), groups * dim, router},
        {FIELD(noise_router), learned ? R * dim : 0, router},
    };
    enum { OWN = sizeof own / sizeof own[0] };
    _Static_assert(OWN + 2 * MLP_FIELDS == GRADIENT_FIELDS, "a list of another length");
    memcpy(fields, own, sizeof own);
    mlp_fields(layer, CLMOE_MLP_EXPERTS, fields + OWN);
    mlp_fields(layer, CLMOE_MLP_SHARED, fields + OWN + MLP_FIELDS);
    return GRADIENT_FIELDS;
}
