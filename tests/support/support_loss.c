/* Losses on the device against the oracle's. */
#include "support_loss.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- Running ------------------------------------------------------------------------------- */

loss_result loss_run(balance_batch *b, const clmoe_loss_desc *losses, uint32_t count,
                     const float *start) {
    size_t n = (size_t)b->tokens * ref_columns(&b->desc);
    bool learned = b->in.noise_input != NULL;
    const float *before = start ? start : HOST(float, n);
    clmoe_loss_args args = {
        .struct_size = sizeof args,
        .tokens = b->tokens,
        .losses = losses,
        .num_losses = count,
        .weights = &b->weights,
        .x = b->dev.x,
        .logits = b->dev.logits,
        .ids = b->dev.ids,
        .pair_weights = b->dev.pair_weights,
        .plan = b->dev.plan,
        .live = b->dev.live,
        .token_mask = b->dev.token_mask,
        .token_offsets = b->dev.token_offsets,
        .state = b->dev.state,
        .load_target = b->dev.load_target,
        .load_supplied = b->dev.load_supplied,
        .scratch = b->dev.scratch,
        .values = buf_new(count * 4),
        .dlogits = buf_of(before, n * 4),
        .dnoise = learned ? buf_of(before, n * 4) : (clmoe_buf){NULL, 0},
    };
    OK(clmoe_loss(b->layer, test.queue, &args, 0, NULL, NULL));
    return (loss_result){.values = buf_get(args.values),
                         .dlogits = buf_get(args.dlogits),
                         .dnoise = learned ? buf_get(args.dnoise) : NULL};
}

const char *loss_label(const clmoe_loss_desc *loss) {
    static const char *const sources[] = {"", " raw", " softmax", " weights"};
    static const char *const loads[] = {"", " fresh", " first", " ema", " supplied"};
    static char label[64];
    snprintf(label, sizeof label, "%.20s%s%s%s%s", clmoe_loss_name(loss->kind),
             sources[loss->p_source], loads[loss->f_source], loss->per_sequence ? " seq" : "",
             loss->per_device ? " dev" : "");
    return label;
}

bool loss_is_defined(const clmoe_layer_desc *desc, const clmoe_loss_desc *loss) {
    clmoe_loss_kind kind = loss->kind;
    bool importance = kind == CLMOE_LOSS_IMPORTANCE_VARIANCE || kind == CLMOE_LOSS_IMPORTANCE_CV2;
    bool of_load = kind <= CLMOE_LOSS_MINIMAX || kind == CLMOE_LOSS_LOAD_CV2;
    bool has_p =
        of_load || importance || kind == CLMOE_LOSS_COMMUNICATION || kind == CLMOE_LOSS_OVERFLOW;
    bool batch_load = loss->f_source == CLMOE_F_EMA || loss->f_source == CLMOE_F_SUPPLIED;
    if (loss->p_source == CLMOE_P_WEIGHTS && !importance)
        return false;
    if (loss->p_source != CLMOE_P_NORMALISED && !has_p)
        return false;
    if (loss->p_source == CLMOE_P_RAW && kind == CLMOE_LOSS_TOKEN_ENTROPY)
        return false;
    if (loss->f_source != CLMOE_F_ASSIGNED && !of_load)
        return false;
    if (loss->per_sequence && (batch_load || desc->capacity.tokens_per_sequence == 0))
        return false;
    if (loss->per_device && (!(of_load || importance) || desc->balance.device_groups == 0))
        return false;
    if (kind == CLMOE_LOSS_OVERFLOW && desc->capacity.rows == 0 && desc->capacity.factor == 0.0)
        return false;
    if (kind == CLMOE_LOSS_SMOOTH_LOAD)
        return desc->router.noise.kind == CLMOE_NOISE_GAUSSIAN ||
               desc->router.noise.kind == CLMOE_NOISE_LEARNED;
    return kind != CLMOE_LOSS_COMMUNICATION || desc->balance.device_groups > 0;
}

/* ---- Noise --------------------------------------------------------------------------------- */

/* x [T,D] times a router [R,D]. */
static double *products(const balance_batch *b, const float *x, const float *matrix) {
    size_t R = ref_columns(&b->desc), D = b->desc.dim, T = b->tokens;
    double *to = HOST(double, T *R);
    for (size_t t = 0; t < T; t++)
        for (size_t e = 0; e < R; e++)
            for (size_t d = 0; d < D; d++)
                to[t * R + e] += (double)x[t * D + d] * (double)matrix[e * D + d];
    return to;
}

/* The noisy logits: a layer whose scores are the logits themselves gives them. */
static float *noisy_logits(balance_batch *b, float *logits) {
    size_t n = (size_t)b->tokens * ref_columns(&b->desc);
    clmoe_layer_desc plain = b->desc;
    plain.router.score = CLMOE_SCORE_IDENTITY;
    plain.router.softcap = 0.0f;
    plain.router.temperature = 1.0f;
    clmoe_layer *layer = test_layer(0, &plain);
    clmoe_state *state = host_alloc(1, sizeof *state + 20 * ref_columns(&b->desc));
    memcpy(state, b->in.state, sizeof *state);
    state->temperature_scale = 1.0f;
    clmoe_score_args args = {.struct_size = sizeof args,
                             .tokens = b->tokens,
                             .weights = &b->weights,
                             .x = b->dev.x,
                             .logits = buf_new(n * 4),
                             .scores = buf_new(n * 4),
                             .state = buf_of(state, sizeof *state + 20 * ref_columns(&b->desc)),
                             .scratch = scratch_of(layer, b->tokens)};
    OK(clmoe_score(layer, test.queue, &args, 0, NULL, NULL));
    buf_read(args.logits, logits, n * 4);
    return buf_get(args.scores);
}

void loss_draw_noise(balance_batch *b) {
    size_t R = ref_columns(&b->desc), D = b->desc.dim, T = b->tokens;
    float *x = random_eighths(T * D, 1.0);
    float *router = random_eighths(R * D, 0.5), *noise_router = random_eighths(R * D, 0.5);
    float *logits = HOST(float, T *R);
    double *noise = HOST(double, T *R);
    b->dev.x = buf_of(x, T * D * 4);
    b->weights.router = buf_of(router, R * D * 4);
    b->weights.noise_router = buf_of(noise_router, R * D * 4);
    const float *noisy = noisy_logits(b, logits);
    balance_set_logits(b, logits);
    if (b->desc.router.noise.kind == CLMOE_NOISE_LEARNED)
        b->in.noise_input = products(b, x, noise_router);
    for (size_t i = 0; i < T * R; i++)
        noise[i] = (double)noisy[i] - (double)logits[i];
    b->in.noise = noise;
    balance_choose(b);
}

/* ---- Dropping ------------------------------------------------------------------------------ */

void loss_renorm_after_drop(balance_batch *b) {
    size_t pairs = (size_t)b->tokens * b->desc.top_k;
    const unsigned char *plan = buf_get(b->dev.plan);
    ref_weights weights = {.expert_scale = b->in.expert_scale};
    double *wide = HOST(double, pairs);
    float *narrow = HOST(float, pairs);
    b->in.slot_of = (const int32_t *)(const void *)(plan + b->layout.slot_of);
    for (size_t p = 0; p < pairs; p++)
        wide[p] = (double)b->in.pair_weights[p];
    ref_renorm_after_drop(&b->desc, b->tokens, b->in.ids, b->in.slot_of, &weights, wide);
    for (size_t p = 0; p < pairs; p++)
        narrow[p] = (float)wide[p];
    b->in.pair_weights = narrow;
    b->dev.pair_weights = buf_of(narrow, pairs * 4);
}

/* ---- Comparing ----------------------------------------------------------------------------- */

/* The relative distance of two gradients by norm. */
static double distance(const double *a, const double *b, size_t n) {
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        difference += (a[i] - b[i]) * (a[i] - b[i]);
        norm += b[i] * b[i];
    }
    return norm > 0.0 ? sqrt(difference / norm) : sqrt(difference);
}

static double *widen(const float *values, size_t n) {
    double *wide = HOST(double, n);
    for (size_t i = 0; i < n; i++)
        wide[i] = (double)values[i];
    return wide;
}

/* weight * d surrogate / d logits by central differences, where the logits are finite. */
static double *differences(const balance_batch *b, const clmoe_loss_desc *loss,
                           const ref_loss *fixed) {
    const double step = 1e-5;
    size_t n = (size_t)b->tokens * ref_columns(&b->desc);
    double *logits = HOST(double, n), *to = HOST(double, n), weight = (double)loss->weight;
    ref_balance_in in = b->in;
    memcpy(logits, b->in.logits, n * sizeof *logits);
    in.logits = logits;
    weight *= loss->controlled ? (double)in.state->loss_weight : 1.0;
    for (size_t i = 0; i < n; i++) {
        double l = logits[i];
        if (!isfinite(l))
            continue;
        logits[i] = l + step;
        double above = ref_loss_surrogate(&b->desc, &in, loss, fixed);
        logits[i] = l - step;
        double below = ref_loss_surrogate(&b->desc, &in, loss, fixed);
        logits[i] = l;
        to[i] = weight * (above - below) / (2.0 * step);
    }
    return to;
}

/* The same by x Wn^T: the random numbers stay, the deviation moves. */
static double *noise_differences(const balance_batch *b, const clmoe_loss_desc *loss,
                                 const ref_loss *fixed) {
    const double step = 1e-5;
    size_t n = (size_t)b->tokens * ref_columns(&b->desc);
    double *input = HOST(double, n), *noise = HOST(double, n), *to = HOST(double, n);
    ref_balance_in in = b->in;
    memcpy(input, in.noise_input, n * sizeof *input);
    memcpy(noise, in.noise, n * sizeof *noise);
    in.noise_input = input;
    in.noise = noise;
    for (size_t i = 0; i < n; i++) {
        double u = input[i], was = noise[i], side[2];
        double unit = was / (log1p(exp(u)) + 0.01);
        for (int s = 0; s < 2; s++) {
            input[i] = u + (s ? step : -step);
            noise[i] = unit * (log1p(exp(input[i])) + 0.01);
            side[s] = ref_loss_surrogate(&b->desc, &in, loss, fixed);
        }
        input[i] = u;
        noise[i] = was;
        to[i] = (double)loss->weight * (side[1] - side[0]) / (2.0 * step);
    }
    return to;
}

/* The worst errors are kept by kind and source of P. */
static void note_error(const char *what, const clmoe_loss_desc *loss, double error) {
    clmoe_loss_desc plain = {.kind = loss->kind, .p_source = loss->p_source};
    char name[80];
    snprintf(name, sizeof name, "%s %s", what, loss_label(&plain));
    worst_note(name, error);
}

double loss_floor(const clmoe_loss_desc *loss) {
    return loss->kind == CLMOE_LOSS_L1 ? 1e-2 : 1e-6;
}

static void check_value(const clmoe_loss_desc *loss, float got, double want) {
    double error = fabs((double)got - want) / fmax(fabs(want), loss_floor(loss));
    note_error("value", loss, error);
    CHECK(error <= LOSS_TOLERANCE, "%s: the value is %.9g, not %.9g\n", loss_label(loss),
          (double)got, want);
}

static void check_gradient(const char *what, const clmoe_loss_desc *loss, const float *got,
                           const double *want, const double *numeric, size_t n) {
    double *wide = widen(got, n);
    for (size_t i = 0; i < n; i++)
        CHECK(isfinite(got[i]), "%s %s[%zu] is %g\n", what, loss_label(loss), i, (double)got[i]);
    double error = distance(wide, want, n), numeric_error = distance(wide, numeric, n);
    double oracle_error = distance(want, numeric, n);
    note_error(what, loss, error);
    const char *label = loss_label(loss);
    worst_note("all gradients, central differences", numeric_error);
    CHECK(oracle_error <= 1e-6, "%s %s: the oracle is off by %g\n", what, label, oracle_error);
    CHECK(error <= LOSS_TOLERANCE, "%s %s is off by %g\n", what, label, error);
    CHECK(numeric_error <= DIFFERENCE_TOLERANCE, "%s %s is off by %g from differences\n", what,
          label, numeric_error);
}

void loss_check(balance_batch *b, const clmoe_loss_desc *loss) {
    size_t n = (size_t)b->tokens * ref_columns(&b->desc);
    double *dlogits = HOST(double, n), *dnoise = b->in.noise_input ? HOST(double, n) : NULL;
    ref_loss fixed;
    loss_result got = loss_run(b, loss, 1, NULL);
    ref_loss_make(&b->desc, &b->in, loss, &fixed);
    ref_loss_gradient(&b->desc, &b->in, loss, &fixed, dlogits, dnoise, NULL);
    check_value(loss, got.values[0], fixed.value);
    check_gradient("dlogits", loss, got.dlogits, dlogits, differences(b, loss, &fixed), n);
    if (dnoise)
        check_gradient("dnoise", loss, got.dnoise, dnoise, noise_differences(b, loss, &fixed), n);
    ref_loss_free(&fixed);
}
