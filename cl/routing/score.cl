/*
 * Purpose: router logits to scores.
 * Formula: l' and s(l'), see score_function.clh; softmax over the row without its non-finite
 *          logits. With topk-then-score order, l' itself.
 * Arrays: logits [T,R] f32, state or NULL (its scale multiplies the temperature) -> scores [T,R]
 *          f32, -infinity where the logit is not finite.
 * NDRange: one group per token; its lanes stride over the R columns. A group of one work-item, the
 *          form for CPUs, takes a vector of columns at a time.
 * Limits: GROUP a power of two.
 * Repeatability: sums in lane order, then a tree; the same for the same GROUP.
 */
#include "routing/router.clh"

#if GROUP == 1
#define STEP 16
typedef float16 floats;

/* STEP columns; those past the last are -infinity. */
static inline floats load_columns(__global const float *p, int count) {
    float part[STEP];
    if (count >= STEP)
        return vload16(0, p);
    for (int i = 0; i < STEP; i++)
        part[i] = i < count ? p[i] : -INFINITY;
    return vload16(0, part);
}

static inline void store_columns(floats v, __global float *p, int count) {
    float part[STEP];
    if (count >= STEP) {
        vstore16(v, 0, p);
        return;
    }
    vstore16(v, 0, part);
    for (int i = 0; i < count; i++)
        p[i] = part[i];
}

static inline float largest(floats v) {
    float lanes[STEP], best = -INFINITY;
    vstore16(v, 0, lanes);
    for (int i = 0; i < STEP; i++)
        best = fmax(best, lanes[i]);
    return best;
}

static inline float total(floats v) {
    float lanes[STEP], sum = 0.0f;
    vstore16(v, 0, lanes);
    for (int i = 0; i < STEP; i++)
        sum += lanes[i];
    return sum;
}
#else
#define STEP                       1
typedef float floats;
#define load_columns(p, count)     (*(p))
#define store_columns(v, p, count) (*(p) = (v))
#define largest(v)                 (v)
#define total(v)                   (v)
#endif

DEFINE_PREPARED(prepared_logits, prepared_logits_slope, floats)

KERNEL(GROUP, 1, 1)
void score_rows(IN(float, logits), OUT(float, scores), IN(uint, state), router_switches r) {
    __local float tmp[GROUP];
    /* Not written back to r: PoCL shares a struct argument among the work-items of a group. */
    const float temperature = temperature_of(&r, STATE_OF(state));
    const int columns = r.columns, first = get_local_id(0) * STEP, step = GROUP * STEP;
    const ulong row = (ulong)get_group_id(0) * columns;
    logits = AT(logits) + row;
    scores = AT(scores) + row;

    const bool as_is = r.topk_first || r.score == SCORE_SPARSEMIXER;
    const bool softmax = !as_is && r.score == SCORE_SOFTMAX;
    const floats none = -INFINITY;
    floats highest = none, sums = 0.0f;
    for (int e = first; e < columns; e += step) {
        const floats l = prepared_logits(&r, temperature, load_columns(logits + e, columns - e));
        store_columns(l, scores + e, columns - e);
        highest = fmax(highest, l);
    }
    for (int e = get_local_id(0); !as_is && !softmax && e < columns; e += GROUP)
        if (scores[e] != -INFINITY)
            scores[e] = score_of(r.score, scores[e]);
    const float best = group_max(largest(highest), tmp);
    for (int e = first; softmax && e < columns; e += step) {
        const floats l = load_columns(scores + e, columns - e);
        const floats p = exp(l - best);
        store_columns(l > none ? p : none, scores + e, columns - e);
        sums += l > none ? p : (floats)(0.0f);
    }
    const float sum = group_sum(total(sums), tmp);
    for (int e = first; softmax && e < columns; e += step) {
        const floats p = load_columns(scores + e, columns - e);
        store_columns(p > none ? p / sum : none, scores + e, columns - e);
    }
}
