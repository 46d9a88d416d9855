/*
 * Purpose: two levels as one softmax, for statistics and losses, and the way back from it.
 * Formula: joint_te = log G_g(e) + l_te - log sum exp of l over the group of e, G = softmax of the
 *          group logits u: softmax over R of joint is p, the product of both gates. With d on joint
 *          and D_g = sum of d over the group g: dl_e = d_e - q_e D_g, q = softmax within the group,
 *          du_g = D_g - G_g sum of D.
 * Arrays: logits [T,R] noisy, group_logits [T,groups], state or NULL -> joint [T,R], -infinity
 *          where one of the two is not finite, d [T,R] = 0; then d, rows [T] token_row, clean
 *          [T,R], noise_raw [T,R] or NULL -> dlogits, dnoise [T,R], dgroup_logits [T,groups] or
 *          NULL, added to. All f32.
 * NDRange: a work-item per token.
 * Limits: none.
 * Repeatability: one work-item does a token, in the order of columns.
 */
#include "balance/gradient.clh"
#include "routing/two_level.clh"

/* A sum of logarithms: finite unless one of them is not. */
static inline float add_logs(float a, float b) {
    bool both = a > -INFINITY && b > -INFINITY;
    return both ? fmax(a + b, -FLT_MAX) : -INFINITY;
}

KERNEL(GROUP, 1, 1)
void joint_rows(IN(float, logits), IN(float, group_logits), IN(uint, state), OUT(float, joint),
                OUT(float, d), uint tokens, uint groups, router_switches r) {
    float temperature = temperature_of(&r, STATE_OF(state));
    uint token = get_global_id(0), size = (uint)r.columns / groups;
    ulong row = (ulong)token * r.columns;
    if (token >= tokens)
        return;
    group_logits = AT(group_logits) + (ulong)token * groups;
    logits = AT(logits) + row;
    joint = AT(joint) + row;
    d = AT(d) + row;
    float all = finite_logsumexp(group_logits, groups);
    for (uint g = 0; g < groups; g++) {
        float u = isfinite(group_logits[g]) ? group_logits[g] - all : -INFINITY;
        float within = prepared_logsumexp(&r, temperature, logits + g * size, size);
        for (uint e = g * size; e < (g + 1) * size; e++) {
            float l = prepared_logit(&r, temperature, logits[e]);
            joint[e] = l > -INFINITY ? add_logs(u, l - within) : -INFINITY;
            d[e] = 0.0f;
        }
    }
}

/* From d of one group to its logits. */
static inline void add_within(const gradient_row *row, const router_switches *r, float temperature,
                              __global const float *d, uint begin, uint end) {
    float total = sum_values(d + begin, end - begin);
    float within = prepared_logsumexp(r, temperature, row->logits + begin, end - begin);
    for (uint e = begin; e < end; e++)
        if (isfinite(row->logits[e])) {
            float q = exp(prepared_logit(r, temperature, row->logits[e]) - within);
            add_one(row, r, temperature, e, d[e] - q * total);
        }
}

KERNEL(GROUP, 1, 1)
void joint_gradient(IN(float, logits), IN(float, clean), IN(float, noise_raw),
                    IN(float, group_logits), IN(uint, state), IN(float, rows), IN(float, d),
                    OUT(float, dlogits), OUT(float, dnoise), OUT(float, dgroup_logits), uint tokens,
                    uint groups, router_switches r) {
    float temperature = temperature_of(&r, STATE_OF(state));
    uint token = get_global_id(0), R = (uint)r.columns, size = R / groups;
    if (token >= tokens)
        return;
    token_row t = ((__global const token_row *)AT(rows))[token];
    if (!(t.flags & TOKEN_UNMASKED) || t.best == -INFINITY)
        return;
    gradient_row row;
    row_at(AT(logits), AT(clean), GIVEN(noise_raw), GIVEN(dlogits), GIVEN(dnoise), token, R, &row);
    d = AT(d) + (ulong)token * R;
    for (uint g = 0; g < groups; g++)
        add_within(&row, &r, temperature, d, g * size, (g + 1) * size);
    if (!dgroup_logits)
        return;
    group_logits = AT(group_logits) + (ulong)token * groups;
    dgroup_logits = AT(dgroup_logits) + (ulong)token * groups;
    float all = finite_logsumexp(group_logits, groups), total = sum_values(d, R);
    for (uint g = 0; g < groups; g++)
        if (isfinite(group_logits[g]))
            dgroup_logits[g] +=
                sum_values(d + g * size, size) - exp(group_logits[g] - all) * total;
}
