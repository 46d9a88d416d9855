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

static const struct {
    void (*set)(clmoe_layer_desc *desc, uint32_t i);
    uint32_t count;
} variants[] = {{keep_rules, 4}, {groups, 2}, {sizes, 5},
                {layouts, 4},    {types, 4},  {weights_alone, 2}};

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
