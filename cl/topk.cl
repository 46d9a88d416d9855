/*
 * Purpose: the K best experts of each token, and their combine weights.
 * Formula: choice = score + select_bias; a key is (choice as ordered bits, inverted id), so that the
 *          order is by choice, ties to the lower id. With group limits, only experts of the best
 *          topk_groups groups keep their choice; the others count as -infinity. Weights come from the
 *          unbiased scores, see router.clh.
 * Arrays: scores [T,R], select_bias [R] or NULL, expert_scale [R] or NULL -> ids [T,K], weights
 *         [T,K], live [T] (leading pairs with a finite choice; the rest have weight 0).
 * NDRange: topk_bitonic: TOKENS tokens per group of GROUP work-items, each token a bitonic sort of
 *          CHUNK keys in local memory; more columns than CHUNK come in rounds that keep the best
 *          KEEP. topk_select: one work-item per token, an insertion into the K best; for CPUs.
 * Limits: CHUNK, KEEP powers of two, K <= KEEP <= CHUNK, KEEP < CHUNK if R > CHUNK; GROUPS is the
 *         number of groups, 0 without group limits. At most 12 KiB of local memory.
 * Repeatability: integer keys; weights are summed in the order of choice by one work-item.
 */
#include "router.clh"

#define FINITE_CHOICE 0x00800000u /* ordered_bits(-INFINITY) + 1 */

static inline ulong choice_key(float choice, uint id) {
    uint bits = isnan(choice) ? ordered_bits(-INFINITY) : ordered_bits(choice);
    return ((ulong)bits << 32) | (0xFFFFFFFFu - id);
}

static inline uint key_id(ulong key) {
    return 0xFFFFFFFFu - (uint)key;
}

static inline bool key_is_live(ulong key) {
    return (uint)(key >> 32) >= FINITE_CHOICE;
}

static inline float choice_of(__global const float *scores, __global const float *select_bias, int e) {
    return select_bias ? scores[e] + select_bias[e] : scores[e];
}

/* Best, or sum of the two best, choices of group g of one token. */
static inline float group_choice(const router_switches *r, __global const float *scores,
                          __global const float *select_bias, int g) {
    int size = r->columns / r->num_groups;
    float first = -INFINITY, second = -INFINITY;
    for (int e = g * size; e < (g + 1) * size; e++) {
        float choice = choice_of(scores, select_bias, e);
        if (choice > first) {
            second = first;
            first = choice;
        } else if (choice > second) {
            second = choice;
        }
    }
    return r->group_top2 && size > 1 ? first + second : first;
}

/* Whether group g is among the topk_groups best of choices [num_groups]; ties to the lower group. */
#define DEFINE_GROUP_IS_IN(name, space)                                                            \
    static inline bool name(const router_switches *r, space const float *choices, int g) {                \
        int better = 0;                                                                            \
        for (int other = 0; other < r->num_groups; other++)                                        \
            better += choices[other] > choices[g] || (choices[other] == choices[g] && other < g);  \
        return better < r->topk_groups;                                                            \
    }

/* Writes choice k of a token. */
static inline void write_choice(__global const float *scores, __global int *ids, __global float *weights,
                         int k, ulong key) {
    int id = (int)key_id(key);
    ids[k] = id;
    weights[k] = key_is_live(key) ? scores[id] : 0.0f;
}

#ifdef BITONIC

DEFINE_GROUP_IS_IN(group_is_in, __local)

/* Sorts TOKENS independent runs of CHUNK keys, descending. */
void sort_keys(__local ulong *keys) {
    for (int size = 2; size <= CHUNK; size *= 2)
        for (int stride = size / 2; stride > 0; stride /= 2) {
            for (int i = get_local_id(0); i < TOKENS * CHUNK / 2; i += GROUP) {
                int low = 2 * i - (i & (stride - 1));
                ulong a = keys[low], b = keys[low + stride];
                bool descending = ((low & (CHUNK - 1)) & size) == 0;
                if (descending ? a < b : a > b) {
                    keys[low] = b;
                    keys[low + stride] = a;
                }
            }
            barrier(CLK_LOCAL_MEM_FENCE);
        }
}

#if GROUPS > 0
/* Fills chosen [TOKENS, GROUPS] with whether a group takes part; choices is scratch of that size. */
void choose_groups(const router_switches *r, __global const float *scores,
                                 __global const float *select_bias, int tokens,
                                 __local float *choices, __local uchar *chosen) {
    for (int token = 0; token < tokens; token++)
        for (int g = get_local_id(0); g < GROUPS; g += GROUP)
            choices[token * GROUPS + g] =
                group_choice(r, scores + (ulong)token * r->columns, select_bias, g);
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int token = 0; token < tokens; token++)
        for (int g = get_local_id(0); g < GROUPS; g += GROUP)
            chosen[token * GROUPS + g] = group_is_in(r, choices + token * GROUPS, g);
    barrier(CLK_LOCAL_MEM_FENCE);
}
#endif

KERNEL(GROUP, 1, 1)
void topk_bitonic(__global const float *scores, ulong scores_off,
                  __global const float *select_bias, ulong select_bias_off,
                  __global const float *expert_scale, ulong expert_scale_off, __global int *ids,
                  ulong ids_off, __global float *weights, ulong weights_off, __global int *live,
                  ulong live_off, uint num_tokens, router_switches r) {
    __local ulong keys[TOKENS * CHUNK];
    uint first = get_group_id(0) * TOKENS;
    int tokens = (int)min((uint)TOKENS, num_tokens - first);
    scores += scores_off + (ulong)first * r.columns;
    select_bias += select_bias_off;
    expert_scale += expert_scale_off;
    ids += ids_off + (ulong)first * r.top_k;
    weights += weights_off + (ulong)first * r.top_k;
    live += live_off + first;

#if GROUPS > 0
    __local float choices[TOKENS * GROUPS];
    __local uchar chosen[TOKENS * GROUPS];
    choose_groups(&r, scores, select_bias, tokens, choices, chosen);
#endif

    for (int next = 0, kept = 0; next < r.columns; next += CHUNK - kept, kept = KEEP) {
        for (uint i = get_local_id(0); i < TOKENS * CHUNK; i += GROUP) {
            int token = i / CHUNK, slot = i % CHUNK, e = next + slot - kept;
            if (slot < kept)
                continue;
            ulong key = 0;
            if (token < tokens && e < r.columns) {
                float choice = choice_of(scores + (ulong)token * r.columns, select_bias, e);
#if GROUPS > 0
                if (!chosen[token * GROUPS + e / (r.columns / GROUPS)])
                    choice = -INFINITY;
#endif
                key = choice_key(choice, (uint)e);
            }
            keys[i] = key;
        }
        barrier(CLK_LOCAL_MEM_FENCE);
        sort_keys(keys);
    }

    for (int token = 0; token < tokens; token++)
        for (int k = get_local_id(0); k < r.top_k; k += GROUP)
            write_choice(scores + (ulong)token * r.columns, ids + token * r.top_k,
                         weights + token * r.top_k, k, keys[token * CHUNK + k]);
    barrier(CLK_GLOBAL_MEM_FENCE);
    for (int token = get_local_id(0); token < tokens; token += GROUP) {
        int count = 0;
        while (count < r.top_k && key_is_live(keys[token * CHUNK + count]))
            count++;
        live[token] = count;
        token_weights(&r, scores + (ulong)token * r.columns, expert_scale, ids + token * r.top_k,
                      weights + token * r.top_k, count);
    }
}

#else

DEFINE_GROUP_IS_IN(group_is_in, __private)

KERNEL(1, 1, 1)
void topk_select(__global const float *scores, ulong scores_off,
                 __global const float *select_bias, ulong select_bias_off,
                 __global const float *expert_scale, ulong expert_scale_off, __global int *ids,
                 ulong ids_off, __global float *weights, ulong weights_off, __global int *live,
                 ulong live_off, uint num_tokens, router_switches r) {
    ulong best[KEEP];
    float choices[GROUPS + 1];
    ulong token = get_group_id(0);
    scores += scores_off + token * r.columns;
    select_bias += select_bias_off;
    expert_scale += expert_scale_off;
    ids += ids_off + token * r.top_k;
    weights += weights_off + token * r.top_k;

    for (int g = 0; g < r.num_groups; g++)
        choices[g] = group_choice(&r, scores, select_bias, g);

    int group_size = r.num_groups > 0 ? r.columns / r.num_groups : r.columns;
    for (int k = 0; k < r.top_k; k++)
        best[k] = 0;
    for (int start = 0, g = 0; start < r.columns; start += group_size, g++) {
        bool in = r.num_groups == 0 || group_is_in(&r, choices, g);
        for (int e = start; e < start + group_size; e++) {
            float choice = in ? choice_of(scores, select_bias, e) : -INFINITY;
            ulong key = choice_key(choice, (uint)e);
            if (key <= best[r.top_k - 1])
                continue;
            int k = r.top_k - 1;
            for (; k > 0 && best[k - 1] < key; k--)
                best[k] = best[k - 1];
            best[k] = key;
        }
    }

    int count = 0;
    for (int k = 0; k < r.top_k; k++) {
        write_choice(scores, ids, weights, k, best[k]);
        count += key_is_live(best[k]);
    }
    live[live_off + token] = count;
    token_weights(&r, scores, expert_scale, ids, weights, count);
}

#endif
