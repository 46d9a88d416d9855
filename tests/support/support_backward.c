/* Batches that go forward and backward. */
#include "support_backward.h"
#include "support_balance.h"

#include <math.h>
#include <string.h>

#define F32 sizeof(float)

/* Below this relative distance f32 may choose otherwise than the oracle. */
#define MIN_GAP 1e-5

/* Relative norm allowed for gradients of f32 layers. */
#define BACKWARD_TOLERANCE 1e-5

bool needs_a_state(const clmoe_layer_desc *desc) {
    return desc->capacity.keep == CLMOE_KEEP_RANDOM;
}

bool drops_out(const clmoe_layer_desc *desc) {
    return desc->experts.hidden_dropout > 0.0f || desc->shared.hidden_dropout > 0.0f;
}

static bool is_soft(const clmoe_layer_desc *desc) {
    return desc->router.policy == CLMOE_POLICY_SOFT_MOE;
}

/* ---- Inputs ---------------------------------------------------------------------------------- */

static float *random_of_type(clmoe_type type, size_t n, double deviation) {
    float *values = random_floats(n, deviation);
    round_all(type, values, n);
    return values;
}

static bool is_masked(const training_batch *t, size_t token) {
    return t->b.in.token_mask && t->b.in.token_mask[token] == 0;
}

static void make_router_inputs(batch *b, uint32_t inputs) {
    size_t T = b->in.tokens, R = ref_columns(&b->desc), pairs = T * b->desc.top_k;
    if (inputs & WITH_MASK)
        b->in.token_mask = random_mask(b->in.tokens);
    if (inputs & WITH_LOGITS_IN)
        b->in.logits_in = random_eighths(T * R, 2.0);
    if (!(inputs & WITH_IDS_IN))
        return;
    int32_t *ids = HOST(int32_t, pairs);
    for (size_t p = 0; p < pairs; p++)
        ids[p] = (int32_t)random_below((uint32_t)R + 2) - 1;
    b->in.ids_in = ids;
    b->in.pair_weights_in = random_floats(pairs, 1.0);
}

/* As ref_backward_in has them. */
static size_t dye_rows(const clmoe_layer_desc *desc, uint32_t tokens) {
    return is_soft(desc) ? ref_router_rows(desc) : ref_pairs(desc, tokens);
}

static void make_gradients(training_batch *t, uint32_t inputs) {
    const clmoe_layer_desc *desc = &t->b.desc;
    size_t T = t->b.in.tokens, R = ref_columns(desc), D = desc->dim, G = desc->router.groups.count;
    t->dy = random_of_type(desc->type, T * D, 1.0);
    if ((inputs & WITH_DLOGITS) && !is_soft(desc))
        t->dlogits = random_floats(T * R, 0.1);
    if ((inputs & WITH_DLOGITS) && desc->router.groups.two_level)
        t->dgroup_logits = random_floats(T * G, 0.1);
    if (inputs & WITH_DYE)
        t->dye = random_of_type(desc->type, dye_rows(desc, t->b.in.tokens) * D, 0.5);
    /* Losses give a masked token no gradient. */
    for (size_t i = 0; i < T * R && t->dlogits; i++)
        t->dlogits[i] *= is_masked(t, i / R) ? 0.0f : 1.0f;
    for (size_t i = 0; i < T * G && t->dgroup_logits; i++)
        t->dgroup_logits[i] *= is_masked(t, i / G) ? 0.0f : 1.0f;
}

static void poison_masked_rows(training_batch *t) {
    size_t n = (size_t)t->b.in.tokens * t->b.desc.dim;
    float *x = HOST(float, n);
    for (size_t i = 0; i < n; i++) {
        bool masked = is_masked(t, i / t->b.desc.dim);
        x[i] = masked ? NAN : t->b.in.x[i];
        t->dy[i] = masked ? NAN : t->dy[i];
    }
    t->b.in.x = x;
}

static void free_backward(void *result) {
    ref_backward_free(result);
}

static void make_want(training_batch *t) {
    const ref_backward_in in = {&t->b.in, t->forward, t->dy, t->dlogits, t->dgroup_logits, t->dye};
    ref_backward_result *want = HOST(ref_backward_result, 1);
    ref_backward(&t->b.desc, &in, want);
    clean_later(free_backward, want);
    t->want = *want;
}

training_batch *training_make(const clmoe_layer_desc *desc, uint32_t tokens, uint32_t inputs) {
    training_batch *t = HOST(training_batch, 1);
    clmoe_layer_desc training = *desc;
    training.training = 1;
    training.dye = (inputs & WITH_DYE) != 0;
    for (uint64_t seed = 1; seed < 200 && t->forward == NULL; seed++) {
        seed_set(seed);
        batch_make(&t->b, &training, tokens);
        make_router_inputs(&t->b, inputs);
        const ref_result *forward = batch_reference(&t->b);
        if (is_soft(desc) || (forward->choice_gap > MIN_GAP && forward->order_gap > MIN_GAP))
            t->forward = forward;
    }
    CHECK(t->forward != NULL, "no seed without near ties\n");
    make_gradients(t, inputs);
    if (inputs & WITH_NAN_ROWS)
        poison_masked_rows(t);
    make_want(t);
    return t;
}

void training_update(training_batch *t) {
    t->forward = batch_reference(&t->b);
    make_want(t);
}

/* ---- The device ------------------------------------------------------------------------------ */

static const size_t buffer_offsets[REF_GRADIENT_FIELDS] = {
#define FIELD(name) offsetof(clmoe_gradients, name),
    REF_GRADIENT_LIST(FIELD)
#undef FIELD
};

clmoe_buf *gradients_field(clmoe_gradients *gradients, size_t field) {
    return (clmoe_buf *)((char *)gradients + buffer_offsets[field]);
}

clmoe_type gradient_type_of(const clmoe_layer_desc *desc, size_t field) {
    if (desc->gradient_type == CLMOE_GRADIENT_F32 || field == REF_ROUTER_BIAS ||
        field == REF_EXPERT_SCALE)
        return CLMOE_F32;
    bool of_router = field == REF_ROUTER || field == REF_SHARED_GATE || field == REF_GROUP_ROUTER;
    return of_router ? desc->router.weight_type : desc->weight_type;
}

/* Soft MoE: the first rows of each expert's bucket. */
static void place_soft_dye(const training_batch *t, uint32_t slots, float *rows) {
    const clmoe_layer_desc *desc = &t->b.desc;
    const size_t p = desc->router.soft_moe.slots, E = desc->num_experts, D = desc->dim;
    for (size_t e = 0; e < E; e++)
        memcpy(rows + e * (slots / E) * D, t->dye + e * p * D, p * D * F32);
}

/* Slots of the layer's buckets, whose sizes are multiples of a tile; the oracle's have no padding.
 */
static clmoe_buf upload_dye(const training_batch *t) {
    const clmoe_layer_desc *desc = &t->b.desc;
    const ref_plan *plan = &t->forward->plan;
    clmoe_plan_layout layout;
    OK(clmoe_plan_layout_get(t->layer, t->b.in.tokens, &layout));
    size_t D = desc->dim, first = 0;
    float *rows = HOST(float, layout.slots *D);
    for (size_t i = 0; i < layout.slots * D; i++)
        rows[i] = NAN;
    if (is_soft(desc))
        place_soft_dye(t, layout.slots, rows);
    for (uint32_t e = 0; e < desc->num_experts && !is_soft(desc); e++) {
        const size_t n = plan->offsets[e + 1] - plan->offsets[e];
        for (size_t s = 0; s < n; s++) {
            const int32_t pair = plan->pair_of[plan->offsets[e] + s];
            if (pair >= 0)
                memcpy(rows + (first + s) * D, t->dye + (size_t)pair * D, D * F32);
        }
        first += (n + layout.row_tile - 1) / layout.row_tile * layout.row_tile;
    }
    return buf_of_type(desc->type, rows, layout.slots * D);
}

void training_new_outputs(training_batch *t) {
    const clmoe_layer_desc *desc = &t->b.desc;
    size_t T = t->b.in.tokens;
    t->args.dx = buf_new_type(desc->type, T * desc->dim);
    if (!is_soft(desc)) {
        t->args.dpair_weights = buf_new(ref_pairs(desc, t->b.in.tokens) * F32);
        if (!t->b.in.ids_in)
            t->args.dlogits_out = buf_new(T * ref_columns(desc) * F32);
    }
    for (size_t i = 0; i < REF_GRADIENT_FIELDS; i++) {
        const size_t n = ref_gradient_count(desc, i);
        const bool of_router = i <= REF_EXPERT_SCALE || i == REF_GROUP_ROUTER;
        if (n > 0 && !(of_router && t->b.in.ids_in) && !(t->b.in.logits_in && i <= REF_ROUTER_BIAS))
            *gradients_field(&t->gradients, i) = buf_new_type(gradient_type_of(desc, i), n);
    }
}

static void make_args(training_batch *t) {
    const clmoe_layer_desc *desc = &t->b.desc;
    const clmoe_forward_args *forward = &t->d.args;
    size_t T = t->b.in.tokens;
    clmoe_backward_args *args = &t->args;
    clmoe_backward_args_init(args);
    args->tokens = forward->tokens;
    args->weights = forward->weights;
    args->x = forward->x;
    args->token_mask = forward->token_mask;
    args->logits_in = forward->logits_in;
    args->ids_in = forward->ids_in;
    args->pair_weights_in = forward->pair_weights_in;
    args->state = forward->state;
    args->saved = forward->saved;
    args->scratch = forward->scratch;
    args->dy = buf_of_type(desc->type, t->dy, T * desc->dim);
    args->dlogits = buf_of(t->dlogits, T * ref_columns(desc) * F32);
    args->dgroup_logits = buf_of(t->dgroup_logits, T * desc->router.groups.count * F32);
    if (t->dye)
        args->dye = upload_dye(t);
    args->gradients = &t->gradients;
}

void training_forward(training_batch *t, uint32_t group_size) {
    size_t R = ref_columns(&t->b.desc);
    t->layer = test_layer(group_size, &t->b.desc);
    batch_upload(t->layer, &t->b, &t->d);
    t->d.weights.noise_router = buf_of(t->noise_router, R * t->b.desc.dim * F32);
    t->d.args.state = buf_of(t->state, sizeof *t->state + 20 * R);
    OK(clmoe_forward(t->layer, test.queue, &t->d.args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
    make_args(t);
    if (t->args.scratch.mem && !support_bare)
        buf_poison(t->args.scratch);
    training_new_outputs(t);
}

void training_backward(training_batch *t) {
    OK(clmoe_backward(t->layer, test.queue, &t->args, 0, NULL, NULL));
    CL_OK(clFinish(test.queue));
}

/* ---- Comparisons ----------------------------------------------------------------------------- */

/* There are more roundings between steps than on the way to y. */
static double tolerance_of(clmoe_type type) {
    return type == CLMOE_F32 ? BACKWARD_TOLERANCE : 3.0 * type_tolerance(type);
}

/* The loosest of the types that a gradient comes through. */
static clmoe_type roughest(const clmoe_layer_desc *desc, clmoe_type type) {
    return tolerance_of(desc->type) > tolerance_of(type) ? desc->type : type;
}

/* One output and what it should be. */
typedef struct output {
    const char *name;
    clmoe_buf buf; /* {NULL, 0}: not asked for */
    clmoe_type type;
    const double *want;
    size_t n;
} output;

/* Output i of TRAINING_OUTPUTS. */
static output output_of(const training_batch *t, size_t i) {
    const clmoe_layer_desc *desc = &t->b.desc;
    const clmoe_backward_args *args = &t->args;
    size_t T = t->b.in.tokens, field = i - 3;
    if (i == 0)
        return (output){"dx", args->dx, desc->type, t->want.dx, T * desc->dim};
    if (i == 1)
        return (output){"dlogits", args->dlogits_out, CLMOE_F32, t->want.dlogits,
                        T * ref_columns(desc)};
    if (i == 2)
        return (output){"dpair_weights", args->dpair_weights, CLMOE_F32, t->want.dpair_weights,
                        ref_pairs(desc, t->b.in.tokens)};
    clmoe_gradients gradients = t->gradients;
    return (output){ref_gradient_fields[field].name, *gradients_field(&gradients, field),
                    gradient_type_of(desc, field), ref_gradients_field(&t->want.gradients, field),
                    ref_gradient_count(desc, field)};
}

static void compare_output(const training_batch *t, const output *o, const char *name) {
    const float *got = buf_get_type(o->buf, o->type, o->n);
    double error = 0.0, norm = 0.0;
    for (size_t i = 0; i < o->n; i++) {
        error += ((double)got[i] - o->want[i]) * ((double)got[i] - o->want[i]);
        norm += o->want[i] * o->want[i];
    }
    if (name && norm > 0.0)
        worst_note(name, sqrt(error / norm));
    compare_floats(o->name, got, o->want, o->n, tolerance_of(roughest(&t->b.desc, o->type)));
}

/* Masked tokens and pairs without a place give exactly 0. */
static void compare_zeros(const training_batch *t) {
    size_t n = (size_t)t->b.in.tokens * t->b.desc.dim,
           pairs = ref_pairs(&t->b.desc, t->b.in.tokens);
    const float *dx = t->args.dx.mem ? buf_get_type(t->args.dx, t->b.desc.type, n) : NULL;
    const float *dw = t->args.dpair_weights.mem ? buf_get(t->args.dpair_weights) : NULL;
    for (size_t i = 0; i < n && dx; i++)
        CHECK(!is_masked(t, i / t->b.desc.dim) || dx[i] == 0.0f, "dx[%zu] is %g\n", i,
              (double)dx[i]);
    for (size_t p = 0; p < pairs && dw; p++)
        CHECK(t->forward->plan.slot_of[p] != -1 || dw[p] == 0.0f, "dpair_weights[%zu] is %g\n", p,
              (double)dw[p]);
}

void training_compare(const training_batch *t, const char *name) {
    for (size_t i = 0; i < TRAINING_OUTPUTS; i++) {
        const output o = output_of(t, i);
        if (o.buf.mem)
            compare_output(t, &o, name);
    }
    compare_zeros(t);
}

training_outputs training_read(const training_batch *t) {
    training_outputs all = {0};
    for (size_t i = 0; i < TRAINING_OUTPUTS; i++) {
        const output o = output_of(t, i);
        all.name[i] = o.name;
        all.bytes[i] = o.n * type_size(o.type);
        all.data[i] = o.buf.mem ? buf_get(o.buf) : NULL;
    }
    return all;
}

void compare_outputs(const training_outputs *got, const training_outputs *want) {
    for (size_t i = 0; i < TRAINING_OUTPUTS; i++)
        if (got->data[i])
            compare_bits(got->name[i], got->data[i], want->data[i], got->bytes[i]);
}
