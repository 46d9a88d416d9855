/*
 * Purpose: what happens to the state between two batches.
 * Formula: see clmoe_balance_args in balance.h.
 * Arrays: state: state_header, then select_bias [R] f32, ema [R] f32, previous [R] f32, idle_tokens
 *          [R] u32, momentum [R] f32; stats: clmoe_stats, then load [R] u32; load [R] u32 or NULL
 *          replaces it. If state or stats are of another version or R, the state stays as it is.
 * NDRange: one group each; its lanes stride over the columns.
 * Limits: GROUP a power of two.
 * Repeatability: signs and shares are compared in integers; the mean of the biases is summed in
 *          lane order, then a tree; the same for the same GROUP.
 */
#include "balance/state.clh"

GROUP_TREE(group_sum_long, ulong, ADD)
GROUP_TREE(group_max_long, ulong, max)

/* `over` = n c - sum c of an expert, or with the device rule of its device group, n of them. */
static inline long over_mean(const control_rules *r, __global const uint *c, uint e, ulong total) {
    if (r->bias_rule != BIAS_DEVICE)
        return (long)((ulong)c[e] * r->experts) - (long)total;
    const uint size = r->experts / r->device_groups, first = e - e % size;
    ulong sum = 0;
    for (uint other = first; other < first + size; other++)
        sum += c[other];
    return (long)(sum * r->device_groups) - (long)total;
}

/* The change of a bias, before its mean is taken off; in integers, so that the sign is exact. */
static inline float bias_delta(const control_rules *r, long over, ulong total) {
    if (r->bias_rule == BIAS_SIGN || r->bias_rule == BIAS_DEVICE)
        return over < 0 ? r->bias_rate : (over > 0 ? -r->bias_rate : 0.0f);
    const float violation = (float)-over / (float)total;
    if (r->bias_rule == BIAS_PROPORTIONAL)
        return r->bias_rate * violation;
    return r->bias_rule == BIAS_SMEBU ? r->bias_rate * tanh(r->bias_kappa * violation) : 0.0f;
}

/* One bias by its change; `momentum` has what quantile_bias left. */
static inline float moved_bias(const control_rules *r, float bias, float delta,
                               __global float *momentum) {
    if (r->bias_rule == BIAS_QUANTILE)
        return *momentum;
    if (r->bias_rule != BIAS_SMEBU)
        return bias + delta;
    *momentum = r->bias_beta * *momentum + (1.0f - r->bias_beta) * delta;
    return bias + *momentum;
}

/* select_bias, by the rule; `moving` is E, or 0 for none. All lanes call it. */
void move_biases(__global float *arrays, const control_rules *r, __global const uint *c,
                 ulong total, uint moving, __local float *tmp) {
    __global float *momentum = arrays + STATE_MOMENTUM * r->columns;
    const bool deltas = r->bias_centred == CENTRED_DELTA || r->bias_rule == BIAS_SMEBU;
    const bool biases = r->bias_centred == CENTRED_BIAS || r->bias_rule == BIAS_QUANTILE;
    const uint lane = get_local_id(0);
    float sum = 0.0f;
    for (uint e = lane; deltas && e < moving; e += GROUP)
        sum += bias_delta(r, over_mean(r, c, e, total), total);
    const float off = group_sum(sum, tmp) / (float)r->experts;
    sum = 0.0f;
    for (uint e = lane; e < moving; e += GROUP) {
        const float delta = bias_delta(r, over_mean(r, c, e, total), total) - off;
        arrays[e] = moved_bias(r, arrays[e], delta, momentum + e);
        sum += arrays[e];
    }
    const float mean = group_sum(sum, tmp) / (float)r->experts;
    for (uint e = lane; e < moving; e += GROUP)
        arrays[e] -= biases ? mean : 0.0f;
}

static inline float schedule_value(schedule_rule r, uint step, float value) {
    if (r.shape == SCHEDULE_NONE)
        return value;
    if (step <= r.first)
        return r.start;
    if (step - r.first >= r.steps)
        return r.end;
    float way = (float)(step - r.first) / (float)r.steps;
    if (r.shape == SCHEDULE_LINEAR)
        return r.start + (r.end - r.start) * way;
    if (r.shape == SCHEDULE_COSINE)
        return r.end + (r.start - r.end) * 0.5f * (1.0f + cospi(way));
    /* end / start may be too large or too small for a float. */
    return pow(r.start, 1.0f - way) * pow(r.end, way);
}

/* Toward a target from either side. */
static inline float adapted(float value, float seen, float target, float above, float below,
                            float low, float high) {
    float factor = seen > target ? above : (seen < target ? below : 1.0f);
    return clamp(value * factor, low, high);
}

/* The numbers that a batch with load moves; `over` = E max c - sum c. */
static inline void adapt_scales(__global state_header *s, __global const stats_header *seen,
                                const control_rules *r, ulong over, ulong total) {
    uint pairs = seen->pairs, dropped = seen->dropped;
    if (r->target_violation > 0.0f)
        s->loss_weight = adapted(s->loss_weight, (float)over / (float)total, r->target_violation,
                                 r->loss_up, r->loss_down, r->loss_min, r->loss_max);
    if (r->target_drop_rate >= 0.0f && pairs > 0)
        s->capacity_scale =
            adapted(s->capacity_scale, (float)dropped / (float)pairs, r->target_drop_rate,
                    r->capacity_up, r->capacity_down, r->capacity_min, 1.0f);
}

/* The schedules at the state's step. */
static inline void apply_schedules(__global state_header *s, const control_rules *r) {
    s->noise_scale = schedule_value(r->noise, s->step, s->noise_scale);
    s->temperature_scale = schedule_value(r->temperature, s->step, s->temperature_scale);
}

KERNEL(GROUP, 1, 1)
void control_start(OUT(uint, state), control_rules r) {
    __global state_header *s = (__global state_header *)AT(state);
    bool known = state_is_known(s, r.columns);
    if (get_local_id(0) == 0 && known)
        apply_schedules(s, &r);
}

KERNEL(GROUP, 1, 1)
void control_update(OUT(uint, state), IN(uint, stats), IN(uint, load), control_rules r) {
    __local ulong tmp[GROUP];
    __local float float_tmp[GROUP];
    __global state_header *s = (__global state_header *)AT(state);
    __global float *arrays = (__global float *)(s + 1);
    __global float *ema = arrays + STATE_EMA * r.columns;
    __global float *previous = arrays + STATE_PREVIOUS * r.columns;
    __global uint *idle = (__global uint *)(arrays + STATE_IDLE_TOKENS * r.columns);
    uint lane = get_local_id(0);
    __global const stats_header *seen = (__global const stats_header *)AT(stats);
    __global const uint *c = load_of(AT(stats), GIVEN(load));

    bool known = state_is_known(s, r.columns) && stats_are_known(seen, r.columns);
    bool first = READ_ONCE(__global uint, s->updates) == 0;
    group_barrier(CLK_GLOBAL_MEM_FENCE); /* lane 0 moves it below */
    ulong total = 0, largest = 0;
    for (uint e = lane; e < r.experts; e += GROUP) {
        total += c[e];
        largest = max(largest, (ulong)c[e]);
    }
    total = group_sum_long(total, tmp);
    largest = group_max_long(largest, tmp);

    uint moving = known && total > 0 ? r.experts : 0;
    for (uint e = lane; e < moving; e += GROUP) {
        float share = (float)c[e] / (float)total;
        ema[e] = first ? share : r.ema_decay * ema[e] + (1.0f - r.ema_decay) * share;
        previous[e] = share;
    }
    move_biases(arrays, &r, c, total, r.bias_rule == BIAS_NONE ? 0 : moving, float_tmp);
    for (uint e = lane; e < r.columns; e += GROUP)
        if (known)
            idle[e] = c[e] > 0 ? 0 : add_sat(idle[e], seen->tokens);
    if (lane != 0 || !known)
        return;
    if (total > 0) {
        adapt_scales(s, seen, &r, largest * r.experts - total, total);
        s->updates = add_sat(s->updates, 1u);
    }
    s->step = add_sat(s->step, 1u);
    apply_schedules(s, &r);
}
