/* Bad fields of a descriptor: the status, and a sentence with the field's name and its value. */
#include "layer.h"
#include "support.h"

#include <math.h>
#include <string.h>

typedef enum field_type { NONE, U32, FLOAT, DOUBLE, SIZE } field_type;

typedef struct field_value {
    const char *name;
    size_t offset;
    field_type type;
    double value;
} field_value;

#define F(field, type, value)                                                                      \
    { #field, offsetof(clmoe_layer_desc, field), type, value }

static void set_field(clmoe_layer_desc *desc, const field_value *f) {
    char *at = (char *)desc + f->offset;
    if (f->type == U32) {
        uint32_t u32 = (uint32_t)(int64_t)f->value;
        memcpy(at, &u32, sizeof u32);
    } else if (f->type == FLOAT) {
        float f32 = (float)f->value;
        memcpy(at, &f32, sizeof f32);
    } else if (f->type == DOUBLE) {
        memcpy(at, &f->value, sizeof f->value);
    } else if (f->type == SIZE) {
        size_t size = (size_t)f->value;
        memcpy(at, &size, sizeof size);
    }
}

/* One bad field, after up to two others that make it so; the text of its value. */
typedef struct desc_error {
    field_value bad;
    const char *text;
    clmoe_status status;
    field_value with[2];
} desc_error;

#define BAD_DESC    CLMOE_INVALID_DESC
#define UNSUPPORTED CLMOE_UNSUPPORTED

/* On a layer of dim 5, 8 experts, top_k 2, hidden_dim 3, shared.hidden_dim 3. */
static const desc_error desc_errors[] = {
    {F(struct_size, SIZE, 0), "0", BAD_DESC, {{0}}},
    {F(struct_size, SIZE, 7), "7", BAD_DESC, {{0}}},
    {F(struct_size, SIZE, 100000), "100000", BAD_DESC, {{0}}},
    {F(dim, U32, 0), "0", BAD_DESC, {{0}}},
    {F(num_experts, U32, 0), "0", BAD_DESC, {{0}}},
    {F(num_experts, U32, 4097), "4097", BAD_DESC, {{0}}},
    {F(num_experts, U32, 4294967295.0), "4294967295", BAD_DESC, {{0}}},
    {F(num_identity_experts, U32, 4089), "4089", BAD_DESC, {{0}}},
    {F(num_identity_experts, U32, 4294967295.0), "4294967295", BAD_DESC, {{0}}},
    {F(top_k, U32, 0), "0", BAD_DESC, {{0}}},
    {F(top_k, U32, 9), "9", BAD_DESC, {{0}}},
    {F(top_k, U32, 13),
     "num_experts + num_identity_experts is 12",
     BAD_DESC,
     {F(num_identity_experts, U32, 4)}},
    {F(top_k, U32, 257), "257", BAD_DESC, {F(num_experts, U32, 300)}},
    {F(top_k, U32, 4294967295.0), "4294967295", BAD_DESC, {{0}}},
    {F(type, U32, 3), "3", BAD_DESC, {{0}}},
    {F(weight_type, U32, -1), "4294967295", BAD_DESC, {{0}}},
    {F(training, U32, 2), "2", BAD_DESC, {{0}}},
    {F(gradient_type, U32, 2), "2", BAD_DESC, {{0}}},
    {F(gradient_type, U32, -1), "4294967295", BAD_DESC, {{0}}},
    {F(recompute, U32, 2), "2", BAD_DESC, {{0}}},
    {F(dye, U32, 2), "2", BAD_DESC, {{0}}},
    {F(reserved, U32, 7), "7", BAD_DESC, {{0}}},
    {F(normalize_experts, U32, 2), "2", BAD_DESC, {{0}}},
    {F(shared_gate, U32, 2), "2", BAD_DESC, {{0}}},
    {F(shared_gate, U32, 1), "1", BAD_DESC, {F(shared.hidden_dim, U32, 0)}},
    {F(output_bias, U32, 7), "7", BAD_DESC, {{0}}},
    {F(router.score, U32, 5), "5", BAD_DESC, {{0}}},
    {F(router.score, U32, -1), "4294967295", BAD_DESC, {{0}}},
    {F(router.order, U32, 2), "2", BAD_DESC, {{0}}},
    {F(router.order, U32, 0), "0", BAD_DESC, {F(router.score, U32, CLMOE_SCORE_SPARSEMIXER)}},
    {F(router.temperature, FLOAT, 0), "0", BAD_DESC, {{0}}},
    {F(router.temperature, FLOAT, -1), "-1", BAD_DESC, {{0}}},
    {F(router.temperature, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(router.temperature, FLOAT, (double)INFINITY), "inf", BAD_DESC, {{0}}},
    {F(router.softcap, FLOAT, -2), "-2", BAD_DESC, {{0}}},
    {F(router.softcap, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(router.bias, U32, 2), "2", BAD_DESC, {{0}}},
    {F(router.select_bias, U32, 3), "3", BAD_DESC, {{0}}},
    {F(router.groups.count, U32, 3), "3", BAD_DESC, {F(router.groups.topk, U32, 2)}},
    {F(router.groups.count, U32, 257), "257", BAD_DESC, {F(num_experts, U32, 514)}},
    {F(router.groups.topk, U32, 0), "0", BAD_DESC, {F(router.groups.count, U32, 4)}},
    {F(router.groups.topk, U32, 5), "5", BAD_DESC, {F(router.groups.count, U32, 4)}},
    {F(router.groups.topk, U32, 1),
     "1",
     BAD_DESC,
     {F(router.groups.count, U32, 4), F(top_k, U32, 3)}},
    {F(router.groups.score, U32, 2), "2", BAD_DESC, {{0}}},
    {F(router.renorm.kind, U32, 3), "3", BAD_DESC, {{0}}},
    {F(router.renorm.eps, FLOAT, -1), "-1", BAD_DESC, {{0}}},
    {F(router.renorm.eps, FLOAT, (double)INFINITY), "inf", BAD_DESC, {{0}}},
    {F(router.renorm.p, FLOAT, 0.5), "0.5", BAD_DESC, {{0}}},
    {F(router.renorm.p, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(router.renorm.after_drop, U32, 2), "2", BAD_DESC, {{0}}},
    {F(router.scale, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(router.scale, FLOAT, (double)INFINITY), "inf", BAD_DESC, {{0}}},
    {F(router.expert_scale, U32, 2), "2", BAD_DESC, {{0}}},
    {F(router.sparsemixer_eps, FLOAT, -1), "-1", BAD_DESC, {{0}}},
    {F(router.weight_at, U32, 3), "3", BAD_DESC, {{0}}},
    {F(router.weight_type, U32, 2), "bf16", BAD_DESC, {{0}}},
    {F(router.weight_type, U32, 9), "9", BAD_DESC, {{0}}},
    {F(router.noise.kind, U32, 4), "4", BAD_DESC, {{0}}},
    {F(router.noise.kind, U32, -1), "4294967295", BAD_DESC, {{0}}},
    {F(router.noise.scale, FLOAT, -1), "-1", BAD_DESC, {{0}}},
    {F(router.noise.scale, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(router.noise.jitter, FLOAT, 1), "1", BAD_DESC, {{0}}},
    {F(router.noise.jitter, FLOAT, -0.5), "-0.5", BAD_DESC, {{0}}},
    {F(router.noise.jitter_experts, U32, 2), "2", BAD_DESC, {{0}}},
    {F(router.noise.jitter_experts, U32, 1), "1", BAD_DESC, {{0}}},
    {F(router.dropout.experts, FLOAT, 1), "1", BAD_DESC, {{0}}},
    {F(router.dropout.experts, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(router.dropout.logits, FLOAT, 1.5), "1.5", BAD_DESC, {{0}}},
    {F(router.dropout.logits, FLOAT, -1), "-1", BAD_DESC, {{0}}},
    {F(capacity.factor, DOUBLE, -0.5), "-0.5", BAD_DESC, {{0}}},
    {F(capacity.factor, DOUBLE, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(capacity.factor, DOUBLE, (double)INFINITY), "inf", BAD_DESC, {{0}}},
    {F(capacity.factor, DOUBLE, 1), "capacity.rows", BAD_DESC, {F(capacity.rows, U32, 2)}},
    {F(capacity.rounding, U32, 3), "3", BAD_DESC, {{0}}},
    {F(balance.enabled, U32, 2), "2", BAD_DESC, {{0}}},
    {F(balance.router_orthogonality, U32, 2), "2", BAD_DESC, {{0}}},
    {F(balance.device_groups, U32, 3), "3", BAD_DESC, {{0}}},
    {F(balance.device_groups, U32, 4294967295.0), "4294967295", BAD_DESC, {{0}}},
    {F(capacity.keep, U32, 6), "6", BAD_DESC, {{0}}},
    {F(capacity.keep, U32, -1), "4294967295", BAD_DESC, {{0}}},
    {F(capacity.overflow, U32, 2), "2", BAD_DESC, {{0}}},
    {F(capacity.overflow, U32, 1), "no capacity", BAD_DESC, {{0}}},
    {F(capacity.overflow, U32, 1),
     "identity experts",
     BAD_DESC,
     {F(capacity.rows, U32, 2), F(num_identity_experts, U32, 1)}},
    {F(capacity.overflow, U32, 1),
     "tokens_per_sequence",
     BAD_DESC,
     {F(capacity.rows, U32, 2), F(capacity.tokens_per_sequence, U32, 3)}},
    {F(router.rebalance.iterations, U32, 1001), "1001", BAD_DESC, {{0}}},
    {F(router.rebalance.mu, FLOAT, -1), "-1", BAD_DESC, {{0}}},
    {F(router.rebalance.mu, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(router.rebalance.iterations, U32, 3),
     "renorm.after_drop",
     BAD_DESC,
     {F(router.renorm.after_drop, U32, 1)}},
    {F(router.rebalance.iterations, U32, 3),
     "reroute",
     BAD_DESC,
     {F(capacity.rows, U32, 2), F(capacity.overflow, U32, 1)}},
    {F(experts.hidden_dim, U32, 0), "0", BAD_DESC, {{0}}},
    {F(experts.activation, U32, 5), "5", BAD_DESC, {{0}}},
    {F(experts.gate_layout, U32, 4), "4", BAD_DESC, {{0}}},
    {F(experts.gate_up_transposed, U32, 2), "2", BAD_DESC, {{0}}},
    {F(experts.down_transposed, U32, 2), "2", BAD_DESC, {{0}}},
    {F(experts.gate_up_bias, U32, 2), "2", BAD_DESC, {{0}}},
    {F(experts.down_bias, U32, 2), "2", BAD_DESC, {{0}}},
    {F(experts.limit, FLOAT, -1), "-1", BAD_DESC, {{0}}},
    {F(experts.limit, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(experts.alpha, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(experts.up_shift, FLOAT, (double)INFINITY), "inf", BAD_DESC, {{0}}},
    {F(experts.hidden_dropout, FLOAT, 1), "1", BAD_DESC, {{0}}},
    {F(experts.hidden_dropout, FLOAT, -0.5), "-0.5", BAD_DESC, {{0}}},
    {F(shared.hidden_dropout, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(shared.activation, U32, 5), "5", BAD_DESC, {{0}}},
    {F(shared.gate_layout, U32, 4), "4", BAD_DESC, {{0}}},
    {F(shared.gate_up_transposed, U32, 2), "2", BAD_DESC, {{0}}},
    {F(shared.down_transposed, U32, 2), "2", BAD_DESC, {{0}}},
    {F(shared.gate_up_bias, U32, 2), "2", BAD_DESC, {{0}}},
    {F(shared.down_bias, U32, 2), "2", BAD_DESC, {{0}}},
    {F(shared.limit, FLOAT, -1), "-1", BAD_DESC, {{0}}},
    {F(shared.alpha, FLOAT, (double)INFINITY), "inf", BAD_DESC, {{0}}},
    {F(shared.up_shift, FLOAT, (double)NAN), "nan", BAD_DESC, {{0}}},
    {F(router.reserved[15], U32, 7), "7", BAD_DESC, {{0}}},
    {F(router.groups.reserved[3], U32, 7), "7", BAD_DESC, {{0}}},
    {F(router.renorm.reserved[0], U32, 7), "7", BAD_DESC, {{0}}},
    {F(router.sinkhorn.reserved[1], U32, 7), "7", BAD_DESC, {{0}}},
    {F(router.soft_moe.reserved[1], U32, 7), "7", BAD_DESC, {{0}}},
    {F(router.noise.reserved[3], U32, 7), "7", BAD_DESC, {{0}}},
    {F(router.dropout.reserved[0], U32, 7), "7", BAD_DESC, {{0}}},
    {F(router.rebalance.reserved[1], U32, 7), "7", BAD_DESC, {{0}}},
    {F(capacity.reserved[7], U32, 7), "7", BAD_DESC, {{0}}},
    {F(experts.reserved[2], U32, 7), "7", BAD_DESC, {{0}}},
    {F(shared.reserved[6], U32, 7), "7", BAD_DESC, {{0}}},
    {F(balance.reserved[0], U32, 7), "7", BAD_DESC, {{0}}},
};

static const shape small = {6, 5, 8, 0, 2, 3};

static void every_bad_field(void **state) {
    (void)state;
    for (size_t i = 0; i < COUNT_OF(desc_errors); i++) {
        const desc_error *e = &desc_errors[i];
        clmoe_layer_desc desc = desc_of(&small);
        clmoe_layer *layer = (clmoe_layer *)&desc;
        desc.shared.hidden_dim = 3;
        test_case("%s = %s", e->bad.name, e->text);
        for (size_t w = 0; w < COUNT_OF(e->with); w++)
            set_field(&desc, &e->with[w]);
        set_field(&desc, &e->bad);
        clmoe_status status = clmoe_layer_create(test_context(0), &desc, &layer);
        check_error(status, e->status, e->bad.name, e->text);
        CHECK(layer == NULL, "the layer is not NULL\n");
    }
}

/* An older program's ends before a later field; what follows it in memory is no field. */
static void check_older(size_t size) {
    clmoe_layer_desc desc = desc_of(&small), wild, defaults;
    clmoe_layer *layer;
    test_case("a descriptor of %zu bytes", size);
    clmoe_layer_desc_init(&defaults);
    memset(&wild, 0xa5, sizeof wild);
    memcpy((char *)&desc + size, &wild, sizeof desc - size);
    desc.struct_size = size;
    OK(clmoe_layer_create(test_context(0), &desc, &layer));
    assert_int_equal(layer->desc.struct_size, sizeof desc);
    assert_memory_equal((char *)&layer->desc + size, (char *)&defaults + size, sizeof desc - size);
    clmoe_layer_destroy(layer);
    desc = wild;
    clmoe_layer_desc_init_sized(&desc, size);
    assert_int_equal(desc.struct_size, size);
    assert_memory_equal(&desc.dim, &defaults.dim, size - offsetof(clmoe_layer_desc, dim));
    assert_memory_equal((char *)&desc + size, &wild, sizeof desc - size);
}

static void older_desc(void **state) {
    (void)state;
    check_older(offsetof(clmoe_layer_desc, balance));
    check_older(offsetof(clmoe_layer_desc, gradient_type));
}

/* A newer program's has more, which must be 0. */
static void newer_desc(void **state) {
    (void)state;
    struct {
        clmoe_layer_desc known;
        uint32_t more[6];
    } desc;
    clmoe_layer *layer;
    test_case("a longer descriptor");
    memset(&desc, 0xa5, sizeof desc);
    clmoe_layer_desc_init_sized(&desc.known, sizeof desc);
    for (size_t i = 0; i < COUNT_OF(desc.more); i++)
        assert_int_equal(desc.more[i], 0);
    desc.known = desc_of(&small);
    desc.known.struct_size = sizeof desc;
    OK(clmoe_layer_create(test_context(0), &desc.known, &layer));
    clmoe_layer_destroy(layer);
    desc.more[5] = 1;
    check_error(clmoe_layer_create(test_context(0), &desc.known, &layer), BAD_DESC,
                "desc.struct_size", "not 0");
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(every_bad_field), TEST(older_desc), TEST(newer_desc)};
    return RUN(tests);
}
