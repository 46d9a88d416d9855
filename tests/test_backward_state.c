/*
 * clmoe_backward() with a state: what it makes random is a constant. The oracle is that of the same
 * batch with the noisy logits as another router's, whose gradient then goes on to x. Dropout of
 * activations is the oracle's own.
 */
#include "ref_random.h"
#include "support.h"
#include "support_backward.h"
#include "support_variants.h"

#include <math.h>
#include <string.h>

/* Below this relative distance f32 may choose otherwise than the oracle. */
#define MIN_GAP 1e-5

#define TOLERANCE 1e-5

static const shape small = {33, 21, 12, 0, 3, 19};

/* What the state makes of a batch. */
typedef struct rig {
    training_batch *t;
    batch plain;    /* without randomness: x as the experts see it, noisy logits */
    double *jitter; /* [T,D], the factors of x; all 1 without */
    float *x;       /* [T,D], as the router sees it */
    double *raw;    /* [T,R]: x Wn^T */
    double *draw;   /* [T,R], its gradient */
    float *dnoise;  /* [T,R], more of it */
    double *dnoise_router;
} rig;

/* ---- The batch ---------------------------------------------------------------------------------
 */

/* With expert choice capacity_scale is 1: the oracle's arrays of pairs have the places of C. */
static const clmoe_state *some_state(const clmoe_layer_desc *desc) {
    const uint32_t columns = ref_columns(desc);
    const bool choice = desc->router.policy == CLMOE_POLICY_EXPERT_CHOICE;
    clmoe_state *s = host_alloc(sizeof *s + 20 * (size_t)columns, 1);
    *s = (clmoe_state){.version = 2,
                       .columns = columns,
                       .seed = {random_below(1u << 31), random_below(1u << 31)},
                       .step = random_below(1000),
                       .noise_scale = 0.75f,
                       .temperature_scale = 1.25f,
                       .loss_weight = 1,
                       .capacity_scale = choice ? 1.0f : 0.75f};
    return s;
}

static void make_jitter(rig *r) {
    const batch *b = &r->t->b;
    size_t T = b->in.tokens, D = b->desc.dim;
    r->jitter = HOST(double, T *D);
    r->x = HOST(float, T *D);
    for (size_t i = 0; i < T * D; i++) {
        r->jitter[i] = 1.0;
        if (b->desc.router.noise.jitter > 0.0f)
            r->jitter[i] = ref_jitter(&b->desc, r->t->state, (uint32_t)(i / D), (uint32_t)(i % D));
        r->x[i] = (float)((double)b->in.x[i] * r->jitter[i]);
    }
}

/* The noisy logits, as the router of the jittered x gives them. */
static const float *noisy_logits(rig *r) {
    const batch *b = &r->t->b;
    size_t n = (size_t)b->in.tokens * ref_columns(&b->desc);
    float *logits = HOST(float, n);
    double *exact = HOST(double, n);
    const ref_weights noise = {.router = r->t->noise_router};
    clmoe_layer_desc unbiased = b->desc;
    unbiased.router.bias = 0;
    r->raw = HOST(double, n);
    ref_logits(&b->desc, b->in.tokens, r->x, &b->weights, exact);
    for (size_t i = 0; i < n; i++)
        logits[i] = (float)exact[i];
    if (noise.router)
        ref_logits(&unbiased, b->in.tokens, r->x, &noise, r->raw);
    ref_noisy(&b->desc, r->t->state, b->in.tokens, logits, r->raw, exact);
    for (size_t i = 0; i < n; i++)
        logits[i] = (float)exact[i];
    return logits;
}

/* The same batch without randomness. */
static void make_plain(rig *r) {
    const clmoe_state *state = r->t->state;
    r->plain = r->t->b;
    clmoe_router_desc *router = &r->plain.desc.router;
    r->plain.in.weights = &r->t->b.weights;
    r->plain.in.logits_in = noisy_logits(r);
    if (router->noise.jitter_experts)
        r->plain.in.x = r->x;
    r->plain.in.state = state;
    router->temperature *= state->temperature_scale;
    router->noise = (clmoe_noise_desc){.scale = 1.0f};
    router->dropout = (clmoe_dropout_desc){0};
    const uint32_t C = ref_capacity(&r->plain.desc, r->plain.in.tokens);
    r->plain.desc.capacity.factor = 0.0;
    r->plain.desc.capacity.rows = C ? ref_effective_capacity(state, C) : 0;
}

/* Gradients of losses: none where a logit or a token is masked. */
static float *loss_gradients(const rig *r) {
    size_t R = ref_columns(&r->plain.desc), n = r->plain.in.tokens * R;
    float *values = random_floats(n, 0.1);
    const uint8_t *mask = r->plain.in.token_mask;
    for (size_t i = 0; i < n; i++)
        if (!isfinite(r->plain.in.logits_in[i]) || (mask && mask[i / R] == 0))
            values[i] = 0.0f;
    return values;
}

static void free_backward(void *result) {
    ref_backward_free(result);
}

static void rig_make(rig *r, const clmoe_layer_desc *desc) {
    training_batch *t = r->t = HOST(training_batch, 1);
    const bool learned = desc->router.noise.kind == CLMOE_NOISE_LEARNED;
    for (uint64_t seed = 1; seed < 200 && t->forward == NULL; seed++) {
        seed_set(seed);
        batch_make(&t->b, desc, small.tokens);
        t->b.in.token_mask = random_mask(small.tokens);
        t->state = some_state(desc);
        if (learned)
            t->noise_router = random_floats((size_t)ref_columns(desc) * desc->dim, 0.3);
        make_jitter(r);
        make_plain(r);
        const ref_result *forward = batch_reference(&r->plain);
        if (forward->choice_gap > MIN_GAP && forward->order_gap > MIN_GAP)
            t->forward = forward;
    }
    CHECK(t->forward != NULL, "no seed without near ties\n");
    t->dy = random_floats((size_t)small.tokens * small.dim, 1.0);
    t->dlogits = loss_gradients(r);
    r->dnoise = learned ? loss_gradients(r) : NULL;
    const ref_backward_in in = {&r->plain.in, t->forward, t->dy, t->dlogits, NULL, NULL};
    ref_backward(&r->plain.desc, &in, &t->want);
    clean_later(free_backward, &t->want);
}

/* ---- From the noisy logits on
 * -------------------------------------------------------------------- */

/*
 * The gradient of x Wn^T, from that of logits to which z (softplus(x Wn^T) + 0.01) was added. What
 * the losses give passes by: they have one of their own on x Wn^T.
 */
static void noise_backward(rig *r) {
    const clmoe_layer_desc *desc = &r->t->b.desc;
    size_t R = ref_columns(desc), n = r->t->b.in.tokens * R;
    double scale = (double)desc->router.noise.scale * (double)r->t->state->noise_scale;
    r->draw = HOST(double, n);
    for (size_t i = 0; i < n && r->t->noise_router; i++) {
        uint32_t bits[2];
        ref_random_bits(r->t->state, (uint32_t)(i / R), (uint32_t)(i % R), REF_NOISE, bits);
        double routed = r->t->want.dlogits[i] - (double)r->t->dlogits[i];
        r->draw[i] = routed * scale * ref_normal(bits) * ref_sigmoid(r->raw[i]);
        r->draw[i] += (double)r->dnoise[i];
    }
}

/* dlogits and draw -> dx and the gradients of both routers. */
static void routers_backward(rig *r) {
    training_batch *t = r->t;
    const clmoe_layer_desc *desc = &t->b.desc;
    size_t R = ref_columns(desc), D = desc->dim;
    bool of_experts = desc->router.noise.jitter_experts != 0;
    r->dnoise_router = HOST(double, R *D);
    for (size_t i = 0; i < t->b.in.tokens * D && of_experts; i++)
        t->want.dx[i] *= r->jitter[i];
    for (size_t i = 0; i < t->b.in.tokens * R; i++) {
        size_t first = i / R * D, row = i % R * D;
        double dl = t->want.dlogits[i], dn = r->draw[i];
        for (size_t d = 0; d < D; d++) {
            double through = dl * (double)t->b.weights.router[row + d];
            if (t->noise_router)
                through += dn * (double)t->noise_router[row + d];
            t->want.dx[first + d] += through * r->jitter[first + d];
            t->want.gradients.router[row + d] += dl * (double)r->x[first + d];
            r->dnoise_router[row + d] += dn * (double)r->x[first + d];
        }
        if (desc->router.bias)
            t->want.gradients.router_bias[i % R] += dl;
    }
}

/* Data, then weights, from the same state: the bits of both at once. */
static void check_parts(training_batch *t) {
    const training_outputs both = training_read(t);
    training_new_outputs(t);
    buf_poison(t->args.scratch);
    t->args.parts = CLMOE_BACKWARD_DATA;
    training_backward(t);
    t->args.parts = CLMOE_BACKWARD_WEIGHTS;
    training_backward(t);
    const training_outputs got = training_read(t);
    compare_outputs(&got, &both);
}

static void check_state(const char *engine, const layer_variant *variant) {
    clmoe_layer_desc desc = desc_of(&small);
    variant->set(&desc);
    desc.engine = engine;
    desc.training = 1;
    test_case("engine %s, %s", engine, variant->name);
    rig *r = HOST(rig, 1);
    rig_make(r, &desc);
    noise_backward(r);
    routers_backward(r);
    training_batch *t = r->t;
    size_t n = (size_t)ref_columns(&desc) * desc.dim;
    training_forward(t, 0);
    if (t->noise_router) {
        t->gradients.noise_router = buf_new(n * sizeof(float));
        t->args.dnoise = buf_of(r->dnoise, t->b.in.tokens * (size_t)ref_columns(&desc) * 4);
    }
    training_backward(t);
    training_compare(t, variant->name);
    if (t->noise_router)
        compare_floats("noise_router", buf_get(t->gradients.noise_router), r->dnoise_router, n,
                       TOLERANCE);
    check_parts(t);
}

/* ---- Tests
 * --------------------------------------------------------------------------------------- */

static void learned_noise(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_LEARNED;
    d->router.noise.scale = 0.5f;
    d->router.noise.jitter = 0.2f;
    d->router.dropout.experts = d->router.dropout.logits = 0.1f;
    d->router.score = CLMOE_SCORE_SIGMOID;
    d->router.renorm.kind = CLMOE_RENORM_SUM;
    d->router.softcap = 3.0f;
    d->router.bias = d->router.expert_scale = 1;
}

static void gaussian_noise(clmoe_layer_desc *d) {
    d->router.noise.kind = CLMOE_NOISE_GAUSSIAN;
    d->router.policy = CLMOE_POLICY_EXPERT_CHOICE;
    d->capacity.factor = 1.5;
}

static void jitter_at_input(clmoe_layer_desc *d) {
    d->router.noise.jitter = 0.3f;
    d->router.noise.jitter_experts = 1;
    d->router.weight_at = CLMOE_WEIGHT_AT_INPUT;
    d->num_identity_experts = 2;
    d->shared.hidden_dim = 5;
    d->shared_gate = 1;
    d->experts.hidden_dropout = 0.25f;
    d->shared.hidden_dropout = 0.5f;
}

static const layer_variant state_variants[] = {
    {"learned noise, sigmoid", learned_noise},
    {"expert choice, gaussian noise", gaussian_noise},
    {"jitter, dropout of activations", jitter_at_input},
};

static bool has_noise(const clmoe_layer_desc *desc) {
    return desc->router.noise.kind != CLMOE_NOISE_NONE || desc->router.noise.jitter > 0.0f ||
           desc->router.dropout.experts > 0.0f || desc->router.dropout.logits > 0.0f;
}

static void every_switch_and_engine(void **state) {
    (void)state;
    const char *const *engines = test_engines();
    for (size_t n = 0; engines[n] != NULL; n++) {
        for (size_t i = 0; i < COUNT_OF(state_variants); i++)
            check_state(engines[n], &state_variants[i]);
        for (size_t i = 0; i < num_routing_variants; i++) {
            clmoe_layer_desc desc = desc_of(&small);
            routing_variants[i].set(&desc);
            if (has_noise(&desc))
                check_state(engines[n], &routing_variants[i]);
        }
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        TEST(every_switch_and_engine),
    };
    return RUN(tests);
}
