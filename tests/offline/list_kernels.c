/*
 * Builds every kernel with every set of options that matters, without running one: on the native
 * device, which writes the sources and options it is given to CLMOE_NATIVE_SOURCES.
 */
#include "support.h"

static const shape small = {64, 96, 16, 2, 4, 64};

static void keep_rules(clmoe_layer_desc *d, uint32_t i) {
    d->capacity.factor = 1.0;
    d->capacity.keep = (clmoe_keep)i;
}

static void groups(clmoe_layer_desc *d, uint32_t i) {
    d->num_identity_experts = 0;
    d->router.groups.count = 4u << i;
    d->router.groups.topk = 2;
}

static void sizes(clmoe_layer_desc *d, uint32_t i) {
    static const uint32_t experts[] = {8, 64, 256, 512, 1030};
    static const uint32_t top_k[] = {2, 8, 8, 10, 16};
    d->num_experts = experts[i];
    d->top_k = top_k[i];
}

static void layouts(clmoe_layer_desc *d, uint32_t i) {
    d->experts.gate_layout = i / 2 ? CLMOE_GATE_NONE : CLMOE_GATE_CONCAT;
    d->experts.gate_up_transposed = d->experts.down_transposed = i % 2;
    d->normalize_experts = 1;
    d->shared.hidden_dim = 32;
}

static void types(clmoe_layer_desc *d, uint32_t i) {
    const clmoe_type type = i / 2 ? CLMOE_BF16 : CLMOE_F16;
    layouts(d, i % 2);
    d->type = d->weight_type = type;
}

static void weights_alone(clmoe_layer_desc *d, uint32_t i) {
    d->weight_type = i ? CLMOE_BF16 : CLMOE_F16;
}

/*
 * Sizes of models, which are compiled into kernels of the engine nv_wgmma: from 4 to 32 steps
 * unrolled, tokens gathered and in tiles; activations and row weights take turns.
 */
static void models(clmoe_layer_desc *d, uint32_t i) {
    static const uint32_t dims[] = {2048, 4096, 2880, 7168, 1032, 640};
    static const uint32_t hidden[] = {768, 14336, 2880, 2048, 1500, 1408};
    d->type = d->weight_type = i % 2 ? CLMOE_F16 : CLMOE_BF16;
    d->dim = dims[i];
    d->experts.hidden_dim = hidden[i];
    d->experts.activation = (clmoe_activation)(i % (CLMOE_ACT_RELU2 + 1));
    d->experts.gate_layout = i == 4 ? CLMOE_GATE_NONE : CLMOE_GATE_CONCAT;
    d->router.weight_at = (clmoe_weight_at)(i % 3);
    d->training = i >= 4;
}

/* Of every layout and of every storage type. */
static void training(clmoe_layer_desc *d, uint32_t i) {
    static const clmoe_type types[] = {CLMOE_F32, CLMOE_F16, CLMOE_BF16, CLMOE_F32};
    static const clmoe_gate_layout gates[] = {CLMOE_GATE_CONCAT, CLMOE_GATE_INTERLEAVED,
                                              CLMOE_GATE_SEPARATE, CLMOE_GATE_NONE};
    d->training = d->dye = 1;
    d->balance.router_orthogonality = 1;
    d->gradient_type = i % 2;
    d->type = d->weight_type = d->router.weight_type = types[i];
    d->experts.gate_layout = gates[i];
    d->experts.hidden_dropout = 0.1f;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->shared = d->experts;
    d->shared.hidden_dim = 32;
    d->shared_gate = d->output_bias = 1;
    d->router.expert_scale = 1;
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
    d->router.noise.jitter = 0.1f;
}

static void training_policies(clmoe_layer_desc *d, uint32_t i) {
    d->training = 1;
    d->num_identity_experts = 0;
    if (i == 0)
        d->router.rebalance.iterations = 3;
    if (i == 1) {
        d->router.groups.two_level = 1;
        d->router.groups.count = 4;
        d->router.groups.topk = 2;
    }
    if (i == 2) {
        d->router.policy = CLMOE_POLICY_SOFT_MOE;
        d->top_k = 1;
    }
}

static const struct {
    void (*set)(clmoe_layer_desc *desc, uint32_t i);
    uint32_t count;
} variants[] = {{keep_rules, 4}, {groups, 2},        {sizes, 5},    {layouts, 4},
                {types, 4},      {weights_alone, 2}, {training, 4}, {training_policies, 3},
                {models, 6}};

static void every_kernel(void **state) {
    (void)state;
    uint32_t built = 0;
    for (size_t v = 0; v < COUNT_OF(variants); v++)
        for (uint32_t i = 0; i < variants[v].count; i++) {
            clmoe_layer_desc desc = desc_of(&small);
            variants[v].set(&desc, i);
            const char *const *engines = test_engines_of(desc.type, desc.weight_type);
            for (size_t n = 0; engines[n] != NULL; n++) {
                clmoe_layer *layer = NULL;
                desc.engine = engines[n];
                test_case("engine %s, variant %zu, %u", engines[n], v, i);
                clmoe_status status = clmoe_layer_create(test_context(0), &desc, &layer);
                clmoe_layer_destroy(layer);
                if (status != CLMOE_UNSUPPORTED)
                    OK(status);
                built += status == CLMOE_SUCCESS;
            }
        }
    CHECK(built > 0, "no layer at all\n");
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_kernel)};
    return RUN(tests);
}
