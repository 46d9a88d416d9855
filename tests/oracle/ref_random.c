#include "ref_random.h"

#include <math.h>

#define PI 3.14159265358979323846

void ref_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k[2] = {key[0], key[1]};
    for (int round = 0; round < 10; round++) {
        uint64_t first = (uint64_t)0xD2511F53u * c[0], second = (uint64_t)0xCD9E8D57u * c[2];
        uint32_t next[4] = {(uint32_t)(second >> 32) ^ c[1] ^ k[0], (uint32_t)second,
                            (uint32_t)(first >> 32) ^ c[3] ^ k[1], (uint32_t)first};
        for (int i = 0; i < 4; i++)
            c[i] = next[i];
        k[0] += 0x9E3779B9u;
        k[1] += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++)
        out[i] = c[i];
}

void ref_random_bits(const clmoe_state *state, uint32_t token, uint32_t column, uint32_t use,
                     uint32_t bits[2]) {
    const uint32_t counter[4] = {token, column, state->step, use};
    uint32_t out[4];
    ref_philox(counter, state->seed, out);
    bits[0] = out[0];
    bits[1] = out[1];
}

double ref_uniform(uint32_t bits) {
    return ((double)(bits / 512) + 0.5) / 8388608.0;
}

double ref_normal(const uint32_t bits[2]) {
    return sqrt(-2.0 * log(ref_uniform(bits[0]))) * cos(2.0 * PI * ref_uniform(bits[1]));
}

double ref_gumbel(uint32_t bits) {
    return -log(-log(ref_uniform(bits)));
}

static double draw(const clmoe_state *state, uint32_t token, uint32_t column, uint32_t use) {
    uint32_t bits[2];
    ref_random_bits(state, token, column, use, bits);
    return ref_uniform(bits[0]);
}

static uint32_t columns_of(const clmoe_layer_desc *desc) {
    return desc->num_experts + desc->num_identity_experts;
}

void ref_masked_experts(const clmoe_layer_desc *desc, const clmoe_state *state, bool *masked) {
    uint32_t R = columns_of(desc);
    for (uint32_t e = 0; e < R; e++) {
        double mine = draw(state, 0, e, REF_EXPERT_DROPOUT);
        uint32_t ahead = 0;
        for (uint32_t o = 0; o < R; o++) {
            double other = draw(state, 0, o, REF_EXPERT_DROPOUT);
            ahead += other > mine || (other == mine && o < e);
        }
        masked[e] = mine < (double)desc->router.dropout.experts && ahead >= desc->top_k;
    }
}

static double noise_of(const clmoe_layer_desc *desc, const uint32_t bits[2], double raw) {
    switch (desc->router.noise.kind) {
    case CLMOE_NOISE_GAUSSIAN:
        return ref_normal(bits);
    case CLMOE_NOISE_LEARNED:
        return ref_normal(bits) * ((raw > 30.0 ? raw : log(1.0 + exp(raw))) + 0.01);
    case CLMOE_NOISE_GUMBEL:
        return ref_gumbel(bits[0]);
    case CLMOE_NOISE_NONE:
        break;
    }
    return 0.0;
}

void ref_noisy(const clmoe_layer_desc *desc, const clmoe_state *state, uint32_t tokens,
               const float *logits, const double *raw, double *noisy) {
    uint32_t R = columns_of(desc);
    bool masked[4096] = {false};
    double scale = (double)desc->router.noise.scale * (double)state->noise_scale;
    if (desc->router.dropout.experts > 0)
        ref_masked_experts(desc, state, masked);
    for (uint32_t t = 0; t < tokens; t++)
        for (uint32_t e = 0; e < R; e++) {
            size_t i = (size_t)t * R + e;
            uint32_t bits[2];
            ref_random_bits(state, t, e, REF_NOISE, bits);
            bool out = masked[e] ||
                       draw(state, t, e, REF_LOGIT_DROPOUT) < (double)desc->router.dropout.logits;
            double n = noise_of(desc, bits, raw ? raw[i] : 0.0);
            noisy[i] = out ? -(double)INFINITY : (double)logits[i] + scale * n;
        }
}

double ref_jitter(const clmoe_layer_desc *desc, const clmoe_state *state, uint32_t t, uint32_t d) {
    double width = (double)desc->router.noise.jitter * (double)state->noise_scale;
    return 1.0 - width + 2.0 * width * draw(state, t, d, REF_JITTER);
}

double ref_dropout_factor(const clmoe_mlp_desc *desc, const ref_scale *scale, size_t j) {
    double p = (double)desc->hidden_dropout;
    if (scale->state == NULL)
        return 1.0;
    const uint32_t counter[4] = {scale->row, (uint32_t)(j / 4), scale->state->step, scale->use};
    uint32_t words[4];
    ref_philox(counter, scale->state->seed, words);
    return ref_uniform(words[j % 4]) < p ? 0.0 : 1.0 / (1.0 - p);
}

uint32_t ref_effective_capacity(const clmoe_state *state, uint32_t capacity) {
    float rows = ceilf(state->capacity_scale * (float)capacity);
    return rows < 1.0f ? 1 : rows < (float)capacity ? (uint32_t)rows : capacity;
}

static double schedule(const clmoe_schedule *s, uint32_t step, double now) {
    double start = (double)s->start, end = (double)s->end;
    double way = ((double)step - s->first) / s->steps;
    way = way < 0.0 ? 0.0 : way > 1.0 ? 1.0 : way;
    switch (s->shape) {
    case CLMOE_SCHEDULE_LINEAR:
        return start * (1.0 - way) + end * way;
    case CLMOE_SCHEDULE_COSINE:
        return end + (start - end) * (1.0 + cos(PI * way)) / 2.0;
    case CLMOE_SCHEDULE_EXPONENTIAL:
        return exp(log(start) * (1.0 - way) + log(end) * way);
    case CLMOE_SCHEDULE_NONE:
        break;
    }
    return now;
}

static double toward(double value, double seen, double target, double rate, double low,
                     double high) {
    value *= seen > target ? exp(rate) : seen < target ? exp(-rate) : 1.0;
    return value < low ? low : value > high ? high : value;
}

static double sign(double v) {
    return (v > 0) - (v < 0);
}

/* What a rule adds to the bias of expert e, before its mean is taken off. */
static double rule_step(const clmoe_layer_desc *desc, const clmoe_balance_args *args,
                        const uint32_t *load, double total, uint32_t e) {
    const uint32_t E = desc->num_experts, D = desc->balance.device_groups;
    const double rate = (double)args->bias_rate, mean = total / E;
    double group = 0.0;
    switch (args->bias_rule) {
    case CLMOE_BIAS_SIGN:
        return rate * sign(total - (double)load[e] * E);
    case CLMOE_BIAS_PROPORTIONAL:
        return rate * (mean - load[e]) / mean;
    case CLMOE_BIAS_SMEBU:
        return rate * tanh((double)args->bias_kappa * (mean - load[e]) / mean);
    case CLMOE_BIAS_DEVICE:
        for (uint32_t o = 0; o < E; o++)
            group += o / (E / D) == e / (E / D) ? load[o] : 0.0;
        return rate * sign(total - group * D);
    default:
        return 0.0;
    }
}

static void move_bias(const clmoe_layer_desc *desc, const clmoe_balance_args *args,
                      const uint32_t *load, double total, ref_state *s) {
    const uint32_t E = desc->num_experts;
    const bool smebu = args->bias_rule == CLMOE_BIAS_SMEBU;
    const double beta = (double)args->bias_beta;
    double off = 0.0, mean = 0.0;
    if (smebu || args->bias_centred == CLMOE_CENTRED_DELTA)
        for (uint32_t e = 0; e < E; e++)
            off += rule_step(desc, args, load, total, e) / E;
    for (uint32_t e = 0; e < E; e++) {
        double step = rule_step(desc, args, load, total, e) - off;
        if (smebu)
            step = s->momentum[e] = beta * s->momentum[e] + (1.0 - beta) * step;
        s->select_bias[e] += step;
        mean += s->select_bias[e] / E;
    }
    for (uint32_t e = 0; e < E && args->bias_centred == CLMOE_CENTRED_BIAS; e++)
        s->select_bias[e] -= mean;
}

static void move_experts(const clmoe_layer_desc *desc, const clmoe_balance_args *args,
                         const uint32_t *load, double total, ref_state *s) {
    const double decay = (double)args->ema_decay;
    for (uint32_t e = 0; e < desc->num_experts; e++) {
        const double share = load[e] / total;
        s->ema[e] = s->updates == 0 ? share : decay * s->ema[e] + (1.0 - decay) * share;
        s->previous[e] = share;
    }
    if (args->bias_rule != CLMOE_BIAS_NONE)
        move_bias(desc, args, load, total, s);
}

void ref_balance_update(const clmoe_layer_desc *desc, const clmoe_balance_args *args,
                        const clmoe_stats *stats, const uint32_t *load, ref_state *s) {
    uint32_t E = desc->num_experts, R = columns_of(desc);
    double total = 0.0, largest = 0.0;
    for (uint32_t e = 0; e < E; e++) {
        total += load[e];
        largest = load[e] > largest ? load[e] : largest;
    }
    for (uint32_t e = 0; e < R; e++)
        s->idle_tokens[e] = load[e] ? 0 : s->idle_tokens[e] + stats->tokens;
    if (total > 0.0) {
        move_experts(desc, args, load, total, s);
        if (args->target_violation > 0)
            s->loss_weight =
                toward(s->loss_weight, largest * E / total - 1.0, (double)args->target_violation,
                       (double)args->loss_rate, (double)args->loss_min, (double)args->loss_max);
        if (args->target_drop_rate >= 0 && stats->pairs > 0)
            s->capacity_scale = toward(s->capacity_scale, (double)stats->dropped / stats->pairs,
                                       (double)args->target_drop_rate, (double)args->capacity_rate,
                                       (double)args->capacity_min, 1.0);
        s->updates++;
    }
    s->step++;
    s->noise_scale = schedule(&args->noise, s->step, s->noise_scale);
    s->temperature_scale = schedule(&args->temperature, s->step, s->temperature_scale);
}
