/* f16 and bf16 storage: the same layer on rounded inputs, against the oracle on the same inputs. */
#include "runtime/types.h"
#include "support.h"
#include "support_variants.h"

#include <string.h>

static const shape small = {65, 45, 12, 2, 3, 29};
static const shape wide = {33, 160, 8, 0, 2, 96};

static void plain(clmoe_layer_desc *d) {
    d->router.renorm.kind = CLMOE_RENORM_SUM;
}

static void everything(clmoe_layer_desc *d) {
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.select_bias = 1;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->experts.gate_up_bias = d->experts.down_bias = 1;
    d->shared.hidden_dim = 13;
    d->shared_gate = 1;
    d->output_bias = 1;
}

static void transposed(clmoe_layer_desc *d) {
    d->router.weight_at = CLMOE_WEIGHT_AT_ACTIVATION;
    d->experts.gate_layout = CLMOE_GATE_INTERLEAVED;
    d->experts.gate_up_transposed = d->experts.down_transposed = 1;
    d->capacity.factor = 1.0;
}

static void ungated(clmoe_layer_desc *d) {
    d->experts.gate_layout = CLMOE_GATE_NONE;
    d->experts.activation = CLMOE_ACT_GELU_ERF;
    d->normalize_experts = 1;
}

static const layer_variant switches[] = {
    {"renorm", plain},
    {"sigmoid, biases, shared", everything},
    {"transposed, weight at activation", transposed},
    {"no gate, normalized", ungated},
};

static void run(const char *engine, const shape *s, size_t which, clmoe_type type,
                clmoe_type weight_type, clmoe_type router_type) {
    batch b;
    device_batch d;
    clmoe_layer_desc desc = desc_of(s);
    switches[which].set(&desc);
    desc.engine = engine;
    desc.type = type;
    desc.weight_type = weight_type;
    desc.router.weight_type = router_type;
    test_case("engine %s, %s, dim %u, types %d %d %d", engine, switches[which].name, s->dim, type,
              weight_type, router_type);
    seed_set(11 + which);
    batch_make(&b, &desc, s->tokens);
    float *residual = random_floats((size_t)s->tokens * s->dim, 1.0);
    round_all(type, residual, (size_t)s->tokens * s->dim);
    b.in.residual = residual;
    batch_run(test_layer(0, &desc), &b, &d);
    batch_compare(&b, &d, batch_reference(&b));
}

static void every_type_and_engine(void **state) {
    (void)state;
    static const struct {
        const shape *s;
        clmoe_type type, weight_type, router_type;
    } kinds[] = {
        {&small, CLMOE_BF16, CLMOE_BF16, CLMOE_F32}, {&wide, CLMOE_BF16, CLMOE_BF16, CLMOE_BF16},
        {&small, CLMOE_F16, CLMOE_F16, CLMOE_F32},   {&wide, CLMOE_F16, CLMOE_F16, CLMOE_F32},
        {&small, CLMOE_F32, CLMOE_BF16, CLMOE_F32},  {&wide, CLMOE_F16, CLMOE_F32, CLMOE_F16},
    };
    for (size_t i = 0; i < COUNT_OF(kinds); i++) {
        const char *const *engines = test_engines_of(kinds[i].type, kinds[i].weight_type);
        for (size_t n = 0; engines[n] != NULL; n++)
            for (size_t which = 0; which < COUNT_OF(switches); which++)
                for (int aligned = 0; aligned < 2; aligned++) {
                    support_aligned = aligned;
                    run(engines[n], kinds[i].s, which, kinds[i].type, kinds[i].weight_type,
                        kinds[i].router_type);
                }
    }
    support_aligned = false;
}

/* Rows at every place that the types allow, some of them empty: of masked tokens, or dropped. */
static void run_rows(const char *engine, clmoe_type type, uint32_t group, uint32_t dim,
                     bool masked) {
    const shape s = {16, dim, 3, 0, 1, dim + 2};
    batch b;
    device_batch d;
    clmoe_layer_desc desc = desc_of(&s);
    desc.engine = engine;
    desc.type = desc.weight_type = type;
    desc.capacity.rows = masked ? 0 : 2;
    test_case("engine %s, group %u, dim %u, type %d, %s", engine, group, dim, type,
              masked ? "masked" : "dropped");
    seed_set(dim + group);
    batch_make(&b, &desc, s.tokens);
    if (masked)
        b.in.token_mask = random_mask(s.tokens);
    batch_run(test_layer(group, &desc), &b, &d);
    batch_compare(&b, &d, batch_reference(&b));
}

/* In groups of one every engine; another group size makes no other GEMM, and one will do. */
static void rows_at_every_place(void **state) {
    (void)state;
    static const uint32_t dims[] = {1, 20, 63, 64};
    static const struct {
        clmoe_type type;
        uint32_t group;
    } kinds[] = {{CLMOE_F16, 0},   {CLMOE_F16, 16},   {CLMOE_F16, 64}, {CLMOE_F16, 256},
                 {CLMOE_BF16, 16}, {CLMOE_BF16, 256}, {CLMOE_F32, 16}, {CLMOE_F32, 256}};
    for (size_t k = 0; k < COUNT_OF(kinds); k++) {
        const char *const *engines = test_engines_of(kinds[k].type, kinds[k].type);
        for (size_t n = 0; engines[n] != NULL && (n == 0 || kinds[k].group == 0); n++)
            for (size_t i = 0; i < COUNT_OF(dims); i++)
                for (int masked = 0; masked < 2; masked++)
                    run_rows(engines[n], kinds[k].type, kinds[k].group, dims[i], masked);
    }
}

static void clblast_refuses(void **state) {
    (void)state;
    clmoe_layer *layer = NULL;
    clmoe_layer_desc desc = desc_of(&small);
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        if (strcmp(engines[n], "clblast") != 0)
            continue;
        desc.engine = engines[n];
        desc.type = CLMOE_BF16;
        CHECK(clmoe_layer_create(test_context(0), &desc, &layer) == CLMOE_UNSUPPORTED, "bf16\n");
        CHECK(strstr(clmoe_last_error(), "bf16") != NULL, "%s\n", clmoe_last_error());
    }
}

static void matrix_units_refuse(void **state) {
    (void)state;
    static const char *const engines[] = {"nv_mma", "nv_wgmma"};
    for (size_t i = 0; i < COUNT_OF(engines); i++) {
        clmoe_layer *layer = NULL;
        clmoe_layer_desc desc = desc_of(&small);
        test_case("%s and f32", engines[i]);
        desc.engine = engines[i];
        desc.type = CLMOE_BF16;
        CHECK(clmoe_layer_create(test_context(0), &desc, &layer) == CLMOE_UNSUPPORTED,
              "weights f32\n");
        CHECK(strstr(clmoe_last_error(), engines[i]) != NULL, "%s\n", clmoe_last_error());
        CHECK(strstr(clmoe_last_error(), "f32") != NULL, "%s\n", clmoe_last_error());
    }
}

/* Every code of both types there and back, and the floats half-way between neighbours. */
static void host_conversions(void **state) {
    (void)state;
    const clmoe_type types[] = {CLMOE_F16, CLMOE_BF16};
    for (size_t t = 0; t < COUNT_OF(types); t++)
        for (uint32_t i = 0; i < 65535; i++) {
            uint16_t codes[2] = {(uint16_t)i, (uint16_t)(i + 1)}, back[3];
            float values[3];
            clmoe_type_decode(types[t], codes, 2, values);
            CHECK(values[0] == type_value(types[t], codes[0]) || values[0] != values[0],
                  "code %x is %g\n", i, (double)values[0]);
            values[2] = (values[0] + values[1]) / 2;
            clmoe_type_encode(types[t], values, 3, back);
            CHECK(back[0] == codes[0] || values[0] != values[0], "%x became %x\n", i, back[0]);
            float middle = type_round(types[t], values[2]);
            CHECK(type_value(types[t], back[2]) == middle || middle != middle ||
                      middle - middle != 0.0F,
                  "%g became %x\n", (double)values[2], back[2]);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {TEST(host_conversions), TEST(every_type_and_engine),
                                       TEST(rows_at_every_place), TEST(clblast_refuses),
                                       TEST(matrix_units_refuse)};
    return RUN(tests);
}
