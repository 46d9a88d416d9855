/*
 * Purpose: what a state makes random before the choice: jitter of x, noise and dropout of logits.
 * Formula: jitter_rows: x (1 + a (2u - 1)), a = jitter * state.noise_scale. noise_experts: draws u
 *          [R]; an expert is masked if u < p, but not the K with the largest u, ties to the lower
 *          id. noise_rows: l + a n, a = noise_scale * state.noise_scale, n by the kind of noise;
 *          -infinity if the expert is masked or u < logit_dropout.
 * Arrays: x [T,D] X -> out [T,D] X. draws [2,R] f32: u, then 1 where masked. logits [T,R] f32, raw
 *          [T,R] f32 (x Wn^T) or NULL, draws or NULL -> noisy [T,R] f32.
 * NDRange: jitter_rows, noise_rows: one group per token; its lanes stride over the columns.
 *          noise_experts: one group.
 * Limits: GROUP a power of two.
 * Repeatability: each number follows from seed, step, token and column alone; dropout is in exact
 *          arithmetic, the same on every device.
 */
#include "routing/router.clh"
#include "runtime/random.clh"

KERNEL(GROUP, 1, 1)
void jitter_rows(IN(STORAGE(X), x), OUT(STORAGE(X), out), IN(uint, state), uint dim, float jitter) {
    __global const state_header *s = STATE_OF(state);
    uint token = get_group_id(0);
    float width = jitter * s->noise_scale;
    x = AT(x) + (ulong)token * dim;
    out = AT(out) + (ulong)token * dim;
    for (uint d = get_local_id(0); d < dim; d += GROUP) {
        float u = random_uniform(random_bits(s, token, d, RANDOM_JITTER).x);
        float value = LOAD(X, x + d) * (1.0f + width * (2.0f * u - 1.0f));
        STORE(X, value, out + d);
    }
}

KERNEL(GROUP, 1, 1)
void noise_experts(OUT(float, draws), IN(uint, state), uint columns, uint top_k,
                   float probability) {
    __local uint tmp[GROUP];
    __global const state_header *s = STATE_OF(state);
    uint mine = 0, unmasked;
    draws = AT(draws);
    for (uint e = get_local_id(0); e < columns; e += GROUP) {
        float u = random_uniform(random_bits(s, 0, e, RANDOM_EXPERT_DROPOUT).x);
        draws[e] = u;
        mine += u >= probability;
    }
    group_scan(mine, &unmasked, tmp);
    group_barrier(CLK_GLOBAL_MEM_FENCE);
    for (uint e = get_local_id(0); e < columns; e += GROUP) {
        float u = draws[e];
        uint better = unmasked;
        /* With K unmasked experts, those are ahead of every masked one. */
        if (u < probability && unmasked < top_k) {
            better = 0;
            for (uint other = 0; other < columns; other++)
                better += draws[other] > u || (draws[other] == u && other < e);
        }
        draws[columns + e] = u < probability && better >= top_k ? 1.0f : 0.0f;
    }
}

/* Finite as long as both are; else it is not, and counts as -infinity. */
static inline float with_noise(float logit, float n) {
    float noisy = logit + n;
    return isfinite(logit) && isfinite(n) ? fmin(fmax(noisy, -FLT_MAX), FLT_MAX) : noisy;
}

KERNEL(GROUP, 1, 1)
void noise_rows(IN(float, logits), IN(float, raw), IN(float, draws), IN(uint, state),
                OUT(float, noisy), uint columns, int noise, float noise_scale,
                float logit_dropout) {
    __global const state_header *s = STATE_OF(state);
    uint token = get_group_id(0);
    ulong row = (ulong)token * columns;
    float scale = noise_scale * s->noise_scale;
    logits = AT(logits) + row;
    noisy = AT(noisy) + row;
    for (uint e = get_local_id(0); e < columns; e += GROUP) {
        float logit = logits[e], n = 0.0f;
        bool masked = draws && AT(draws)[columns + e] != 0.0f;
        if (logit_dropout > 0.0f) {
            float u = random_uniform(random_bits(s, token, e, RANDOM_LOGIT_DROPOUT).x);
            masked = masked || u < logit_dropout;
        }
        if (noise != NOISE_NONE) {
            uint4 bits = random_bits(s, token, e, RANDOM_NOISE);
            n = noise == NOISE_GUMBEL ? random_gumbel(bits) : random_normal(bits);
        }
        if (noise == NOISE_LEARNED) {
            float learned = AT(raw)[row + e];
            n *= NOISE_DEVIATION(learned);
        }
        noisy[e] = masked ? -INFINITY : with_noise(logit, scale > 0.0f ? scale * n : 0.0f);
    }
}
