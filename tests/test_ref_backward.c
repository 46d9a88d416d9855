/*
 * The oracle of the backward pass against central differences of the oracle of the forward, both
 * in double precision: every element of every input of every layer of the table.
 */
#include "ref_backward.h"
#include "ref_random.h"
#include "support.h"
#include "support_backward.h"
#include "support_balance.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

/* Below these relative distances a step of an input may change the choice, or the order of pairs.
 */
#define MIN_GAP       3e-3
#define MIN_ORDER_GAP 2e-4

/* Of an element's gradient, plus the mean size of its array's; and where no smaller step is tried.
 */
#define TOLERANCE   1e-8
#define GOOD_ENOUGH 1e-9

/* Every input is a multiple of this, so that steps of it are exact. */
#define GRID 0x1p-16

/* Ever smaller steps: a larger one may cross a kink or change the choice. */
static const double steps[] = {0x1p-8, 0x1p-11, 0x1p-14, 0x1p-16};

static const shape tiny = {11, 4, 12, 0, 3, 3};

/* Whose choice it is. */
typedef enum source { OWN_ROUTER, LOGITS_IN, IDS_IN, SOURCES } source;
static const char *const source_names[] = {"own router", "logits_in", "ids_in"};

/* A batch, the gradients that come in, and the oracle's results. */
typedef struct rig {
    batch b;
    const ref_result *base;
    float *dy, *dlogits, *dgroup_logits, *dye;
    ref_backward_result got;
    double worst;
} rig;

/* ---- Batches --------------------------------------------------------------------------------- */

static float *on_grid(const float *values, size_t n) {
    float *copy = HOST(float, n);
    for (size_t i = 0; i < n; i++)
        copy[i] = (float)(round((double)values[i] / GRID) * GRID);
    return copy;
}

static bool is_soft(const clmoe_layer_desc *desc) {
    return desc->router.policy == CLMOE_POLICY_SOFT_MOE;
}

/* batch_make() with inputs on the grid; x and the router are no eighths, which would tie logits. */
static void make_inputs(rig *r, source from, bool mask) {
    batch *b = &r->b;
    size_t T = b->in.tokens, R = ref_columns(&b->desc), pairs = ref_pairs(&b->desc, b->in.tokens);
    b->in.x = on_grid(random_floats(T * b->desc.dim, 1.0), T * b->desc.dim);
    b->weights.router = random_floats(ref_gradient_count(&b->desc, REF_ROUTER), 0.4);
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++) {
        const size_t n = ref_gradient_count(&b->desc, i);
        const float *values = n > 0 ? on_grid(ref_weights_field(&b->weights, i), n) : NULL;
        memcpy((char *)&b->weights + ref_gradient_fields[i].weights, &values, sizeof values);
    }
    b->in.token_mask = mask ? random_mask(b->in.tokens) : NULL;
    b->in.state = drops_out(&b->desc) ? random_state_of(&b->desc) : NULL;
    if (from == LOGITS_IN)
        b->in.logits_in = on_grid(random_floats(T * R, 2.0), T * R);
    if (from != IDS_IN)
        return;
    int32_t *ids = HOST(int32_t, pairs);
    for (size_t p = 0; p < pairs; p++)
        ids[p] = (int32_t)random_below((uint32_t)R + 2) - 1;
    b->in.ids_in = ids;
    b->in.pair_weights_in = on_grid(random_floats(pairs, 1.0), pairs);
}

static void make_gradients(rig *r) {
    const clmoe_layer_desc *desc = &r->b.desc;
    size_t T = r->b.in.tokens, D = desc->dim, pairs = ref_pairs(desc, r->b.in.tokens);
    r->dy = random_floats(T * D, 1.0);
    r->dlogits = is_soft(desc) ? NULL : random_floats(T * ref_columns(desc), 0.5);
    r->dye = is_soft(desc) ? NULL : random_floats(pairs * D, 0.5);
    if (desc->router.groups.two_level)
        r->dgroup_logits = random_floats(T * desc->router.groups.count, 0.5);
}

static void free_backward(void *result) {
    ref_backward_free(result);
}

/* A batch whose choice is clear, and its gradients. */
static void rig_make(rig *r, const clmoe_layer_desc *desc, source from, bool mask) {
    for (uint64_t seed = 1; seed < 200 && r->base == NULL; seed++) {
        seed_set(seed);
        batch_make(&r->b, desc, tiny.tokens);
        make_inputs(r, from, mask);
        const ref_result *base = batch_reference(&r->b);
        if (is_soft(desc) || (base->choice_gap > MIN_GAP && base->order_gap > MIN_ORDER_GAP))
            r->base = base;
    }
    CHECK(r->base != NULL, "no seed without near ties\n");
    make_gradients(r);
    ref_backward_in in = {&r->b.in, r->base, r->dy, r->dlogits, r->dgroup_logits, r->dye};
    ref_backward(desc, &in, &r->got);
    clean_later(free_backward, &r->got);
}

/* ---- The loss whose gradients dy, dlogits, dgroup_logits and dye are ---------------------------
 */

static bool same_choice(const rig *r, const ref_result *now) {
    size_t T = r->b.in.tokens, pairs = ref_pairs(&r->b.desc, r->b.in.tokens);
    const ref_result *base = r->base;
    if (is_soft(&r->b.desc))
        return true;
    if (base->live && memcmp(base->live, now->live, T * sizeof *base->live) != 0)
        return false;
    if (base->token_offsets && memcmp(base->token_offsets, now->token_offsets, (T + 1) * 4) != 0)
        return false;
    return memcmp(base->ids, now->ids, pairs * sizeof *base->ids) == 0 &&
           memcmp(base->plan.slot_of, now->plan.slot_of, pairs * sizeof(int32_t)) == 0;
}

static double rows_loss(const rig *r, const ref_result *now, size_t t) {
    const clmoe_layer_desc *desc = &r->b.desc;
    const ref_forward_in *in = &r->b.in;
    size_t D = desc->dim, K = desc->top_k;
    double loss = 0.0, *row = HOST(double, D);
    size_t first = now->token_offsets ? (size_t)now->token_offsets[t] : t * K;
    size_t end = now->token_offsets ? (size_t)now->token_offsets[t + 1] : t * K + K;
    for (size_t p = first; p < end; p++) {
        if (now->plan.slot_of[p] < 0)
            continue;
        const ref_scale scale = {now->pair_weights[p], in->state, REF_HIDDEN, (uint32_t)p};
        ref_expert(desc, in->weights, (uint32_t)now->ids[p], in->x + t * D, &scale, row);
        for (size_t d = 0; d < D; d++)
            loss += row[d] * (double)r->dye[p * D + d];
    }
    return loss;
}

static double logits_loss(const rig *r, const ref_result *now, size_t t) {
    const ref_forward_in *in = &r->b.in;
    size_t R = ref_columns(&r->b.desc), D = r->b.desc.dim, G = r->b.desc.router.groups.count;
    double loss = 0.0;
    for (size_t i = t * R; i < (t + 1) * R; i++)
        loss += now->logits[i] * (double)r->dlogits[i];
    for (size_t g = 0; g < G && r->dgroup_logits; g++)
        for (size_t d = 0; d < D; d++)
            loss += (double)r->dgroup_logits[t * G + g] * (double)in->x[t * D + d] *
                    (double)in->weights->group_router[g * D + d];
    return loss;
}

/* False: the choice is another. */
static bool loss_now(const rig *r, double *loss) {
    const ref_forward_in *in = &r->b.in;
    size_t D = r->b.desc.dim;
    ref_result now;
    ref_forward(&r->b.desc, in, &now);
    *loss = 0.0;
    for (size_t t = 0; t < in->tokens; t++) {
        if (in->token_mask && in->token_mask[t] == 0)
            continue;
        for (size_t d = 0; d < D; d++)
            *loss += now.y[t * D + d] * (double)r->dy[t * D + d];
        if (!is_soft(&r->b.desc))
            *loss += rows_loss(r, &now, t);
        if (!is_soft(&r->b.desc) && !in->ids_in)
            *loss += logits_loss(r, &now, t);
    }
    bool same = same_choice(r, &now);
    ref_result_free(&now);
    return same;
}

/* ---- Differences ------------------------------------------------------------------------------
 */

/* The derivative by *value, of fourth order. False: a step changed the choice. */
static bool difference(const rig *r, float *value, double step, double *slope) {
    static const double by[] = {1.0, -1.0, 2.0, -2.0};
    const float before = *value;
    double loss[COUNT_OF(by)];
    bool same = true;
    for (size_t i = 0; i < COUNT_OF(by) && same; i++) {
        *value = (float)((double)before + by[i] * step);
        same = loss_now(r, &loss[i]);
    }
    *value = before;
    if (same)
        *slope = (8.0 * (loss[0] - loss[1]) - (loss[2] - loss[3])) / (12.0 * step);
    return same;
}

static void check_element(rig *r, const char *what, size_t i, float *value, double got,
                          double mean) {
    double best = INFINITY, slope = NAN;
    for (size_t s = 0; s < COUNT_OF(steps) && best > GOOD_ENOUGH; s++)
        if (difference(r, value, steps[s], &slope))
            best = fmin(best, fabs(slope - got) / (fabs(got) + mean));
    CHECK(best <= TOLERANCE, "d%s[%zu] is %.12g, the difference %.12g\n", what, i, got, slope);
    r->worst = fmax(r->worst, best);
}

/* Every element of values [n] against its gradient. */
static void check_array(rig *r, const char *what, const float *values, const double *got,
                        size_t n) {
    double mean = 1e-3;
    for (size_t i = 0; i < n; i++)
        mean += fabs(got[i]) / (double)n;
    for (size_t i = 0; i < n; i++)
        check_element(r, what, i, (float *)(uintptr_t)(values + i), got[i], mean);
}

static void check_case(const layer_variant *variant, source from, bool mask) {
    clmoe_layer_desc desc = desc_of(&tiny);
    variant->set(&desc);
    test_case("%s, %s, %s", variant->name, source_names[from], mask ? "mask" : "no mask");
    rig *r = HOST(rig, 1);
    rig_make(r, &desc, from, mask);
    const ref_forward_in *in = &r->b.in;
    size_t T = in->tokens, R = ref_columns(&desc), pairs = ref_pairs(&desc, in->tokens);
    check_array(r, "x", in->x, r->got.dx, T * desc.dim);
    if (in->logits_in)
        check_array(r, "logits", in->logits_in, r->got.dlogits, T * R);
    if (in->ids_in)
        check_array(r, "pair_weights", in->pair_weights_in, r->got.dpair_weights, pairs);
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++)
        check_array(r, ref_gradient_fields[i].name, ref_weights_field(&r->b.weights, i),
                    ref_gradients_field(&r->got.gradients, i), ref_gradient_count(&desc, i));
    worst_note(variant->name, r->worst);
}

/* ---- Tests ------------------------------------------------------------------------------------
 */

static void check_variant(const layer_variant *variant) {
    clmoe_layer_desc desc = desc_of(&tiny);
    variant->set(&desc);
    const bool choice = ref_lists_pairs(&desc);
    if (needs_a_state(&desc))
        return;
    for (source from = OWN_ROUTER; from < SOURCES; from++)
        for (int mask = 0; mask < 2; mask++)
            if (from == OWN_ROUTER || (!is_soft(&desc) && !(choice && from == IDS_IN)))
                check_case(variant, from, mask);
}

static void every_variant(void **state) {
    (void)state;
    for (size_t i = 0; i < num_layer_variants; i++)
        check_variant(&layer_variants[i]);
}

static void every_policy(void **state) {
    (void)state;
    for (size_t i = 0; i < num_routing_variants; i++)
        check_variant(&routing_variants[i]);
}

static void every_backward_variant(void **state) {
    (void)state;
    for (size_t i = 0; i < num_backward_variants; i++)
        check_variant(&backward_variants[i]);
}

/* ---- What differences do not tell ---------------------------------------------------------------
 */

static void relu_at_zero(void **state) {
    (void)state;
    static const clmoe_activation kinked[] = {CLMOE_ACT_RELU, CLMOE_ACT_RELU2};
    for (size_t i = 0; i < COUNT_OF(kinked); i++) {
        const clmoe_mlp_desc desc = {.activation = kinked[i]};
        assert_true(ref_activate_slope(&desc, 0.0) == 0.0);
        assert_true(ref_activate_slope(&desc, 1.0) > 0.0);
    }
}

/* Gate and up of one expert, whose values are those of x: above, below and at the limit. */
static void clamps(void **state) {
    (void)state;
    static const float rows[][2] = {{2.5f, 1.0f}, {3.0f, 1.0f},  {1.0f, 2.5f}, {1.0f, -2.5f},
                                    {2.0f, 1.0f}, {-9.0f, 1.0f}, {1.0f, 2.0f}, {1.0f, -2.0f}};
    static const bool passes[][2] = {{false, true}, {false, true}, {true, false}, {true, false},
                                     {true, true},  {true, true},  {true, true},  {true, true}};
    static const float one[] = {1.0f, 0.0f, 0.0f, 1.0f}, down[] = {1.0f, 1.0f};
    clmoe_layer_desc desc = desc_of(&(shape){1, 2, 1, 0, 1, 1});
    desc.experts.limit = 2.0f;
    desc.experts.up_shift = 3.0f;
    const ref_weights weights = {.experts = {.gate = one, .down = down}};
    for (size_t i = 0; i < COUNT_OF(rows); i++) {
        double dgate[4] = {0}, ddown[2] = {0}, dx[2] = {0};
        ref_gradients gradients = {.experts = {.gate = dgate, .down = ddown}};
        const ref_backward_layer layer = {&desc, &weights, &gradients};
        const double x[] = {(double)rows[i][0], (double)rows[i][1]}, dout[] = {1.0, 0.5};
        test_case("gate %g, up %g", x[0], x[1]);
        ref_expert_backward(&layer, 0, x, &(ref_scale){.weight = 1.0}, dout, dx);
        for (size_t d = 0; d < 2; d++)
            CHECK((dx[d] != 0.0) == passes[i][d], "dx[%zu] is %g\n", d, dx[d]);
    }
}

static void compare_doubles(const char *what, const double *got, const double *want, size_t n) {
    for (size_t i = 0; i < n; i++)
        CHECK(got[i] == want[i], "%s[%zu] is %g, not %g\n", what, i, got[i], want[i]);
}

/* The same batch with rows of NaN where the mask is 0 gives the same gradients, and 0 there. */
static void check_masked(const layer_variant *variant) {
    clmoe_layer_desc desc = desc_of(&tiny);
    variant->set(&desc);
    if (needs_a_state(&desc))
        return;
    test_case("%s", variant->name);
    rig *r = HOST(rig, 1);
    rig_make(r, &desc, OWN_ROUTER, true);
    ref_forward_in in = r->b.in;
    size_t T = in.tokens, D = desc.dim;
    float *x = HOST(float, T *D);
    memcpy(x, in.x, sizeof(float) * T * D);
    for (size_t i = 0; i < T * D; i++)
        if (in.token_mask[i / D] == 0) {
            x[i] = r->dy[i] = NAN;
            CHECK(r->got.dx[i] == 0.0, "dx[%zu] is %g\n", i, r->got.dx[i]);
        }
    in.x = x;
    ref_result base;
    ref_forward(&desc, &in, &base);
    ref_backward_in backward = {&in, &base, r->dy, r->dlogits, r->dgroup_logits, r->dye};
    ref_backward_result now;
    ref_backward(&desc, &backward, &now);
    compare_doubles("dx", now.dx, r->got.dx, T * D);
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++)
        compare_doubles(ref_gradient_fields[i].name, ref_gradients_field(&now.gradients, i),
                        ref_gradients_field(&r->got.gradients, i), ref_gradient_count(&desc, i));
    ref_result_free(&base);
    ref_backward_free(&now);
}

/* What is not finite in a masked row reaches nothing. */
static void masked_rows(void **state) {
    (void)state;
    const layer_variant *tables[] = {layer_variants, routing_variants, backward_variants};
    const size_t counts[] = {num_layer_variants, num_routing_variants, num_backward_variants};
    for (size_t n = 0; n < COUNT_OF(tables); n++)
        for (size_t i = 0; i < counts[n]; i++)
            check_masked(&tables[n][i]);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_variant), TEST(every_policy), TEST(every_backward_variant),
        TEST(relu_at_zero),  TEST(clamps),       TEST(masked_rows),
    };
    return RUN(tests);
}
