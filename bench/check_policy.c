/* What every right result of a policy has in common; the choice itself is the tests' affair. */
#include "check.h"

#include "ref_places.h"

#include <stdlib.h>
#include <string.h>

/* A policy's results on the host. */
typedef struct routed {
    const bench_policy *policy;
    int32_t *ids;    /* [pairs] */
    uint32_t *first; /* [T+1]: the pairs of token t are first[t] to first[t+1] - 1 */
    float *scores;   /* [T,E] */
    char *plan;
    uint32_t *chosen; /* [E]: t + 1 for the choices of token t, which is looked at */
    uint32_t *places; /* [E]: pairs with a slot in the expert's bucket */
} routed;

static const uint32_t *kept_of(const routed *r) {
    return (const uint32_t *)(r->plan + r->policy->plan.kept);
}

static bool has_slot(const routed *r, uint32_t pair) {
    return ((const int32_t *)(r->plan + r->policy->plan.slot_of))[pair] >= 0;
}

/* The slot of a pair lies in its expert's bucket, and leads back to the pair. */
static bool is_placed_right(const routed *r, uint32_t token, uint32_t pair) {
    const clmoe_plan_layout *layout = &r->policy->plan;
    const uint32_t *offsets = (const uint32_t *)(r->plan + layout->offsets);
    const int32_t *pair_of = (const int32_t *)(r->plan + layout->pair_of);
    const int32_t *token_of = (const int32_t *)(r->plan + layout->token_of);
    const int32_t slot = ((const int32_t *)(r->plan + layout->slot_of))[pair], id = r->ids[pair];
    return (uint32_t)slot >= offsets[id] && (uint32_t)slot < offsets[id] + kept_of(r)[id] &&
           (uint32_t)slot < layout->slots && pair_of[slot] == (int32_t)pair &&
           token_of[slot] == (int32_t)token;
}

/* The ids of a token are in range and distinct, and what has a slot has the right one. */
static void check_token(const routed *r, uint32_t token, check_result *result) {
    for (uint32_t pair = r->first[token]; pair < r->first[token + 1]; pair++) {
        const int32_t id = r->ids[pair];
        if (id < 0 || (uint32_t)id >= r->policy->in->of.experts) {
            complain(result, "the id of pair %u is %d", (unsigned)pair, (int)id);
            return;
        }
        if (r->chosen[id] == token + 1)
            complain(result, "token %u has expert %d twice", (unsigned)token, (int)id);
        r->chosen[id] = token + 1;
        if (!has_slot(r, pair))
            continue;
        r->places[id]++;
        if (!is_placed_right(r, token, pair))
            complain(result, "pair %u of expert %d has a wrong slot", (unsigned)pair, (int)id);
    }
}

/* Next to a dropped pair no expert has room but those that the token has. */
static void check_dropped(const routed *r, uint32_t token, check_result *result) {
    const clmoe_layer_desc desc = inputs_desc(r->policy->in, NULL);
    const ref_reroute_in in = {.scores = r->scores};
    bool dropped = false;
    for (uint32_t pair = r->first[token]; pair < r->first[token + 1]; pair++)
        dropped = dropped || !has_slot(r, pair);
    const int32_t roomy = !dropped ? -1
                                   : ref_roomy_expert(&desc, &in, token, r->ids, kept_of(r),
                                                      r->policy->plan.capacity);
    if (roomy >= 0)
        complain(result, "a pair of token %u is dropped, but expert %d has room", (unsigned)token,
                 (int)roomy);
}

static void check_buckets(const routed *r, check_result *result) {
    const clmoe_plan_layout *layout = &r->policy->plan;
    const uint32_t *kept = kept_of(r);
    uint32_t total = 0;
    for (uint32_t e = 0; e < r->policy->in->of.experts; e++) {
        if (kept[e] != r->places[e] || (layout->capacity > 0 && kept[e] > layout->capacity))
            complain(result, "expert %u keeps %u rows of %u pairs", (unsigned)e, (unsigned)kept[e],
                     (unsigned)r->places[e]);
        if (r->policy->kind == POLICY_EXPERT_CHOICE && kept[e] != layout->capacity)
            complain(result, "the bucket of expert %u has %u rows, but must have %u", (unsigned)e,
                     (unsigned)kept[e], (unsigned)layout->capacity);
        total += kept[e];
    }
    if (r->policy->kind != POLICY_REROUTE && total != layout->pairs)
        complain(result, "%u pairs of %u are kept", (unsigned)total, (unsigned)layout->pairs);
}

/* Ascending from 0 to all pairs. */
static bool are_offsets(const routed *r, check_result *result) {
    const uint32_t tokens = r->policy->in->of.tokens;
    bool right = r->first[0] == 0 && r->first[tokens] == r->policy->plan.pairs;
    for (uint32_t t = 0; t < tokens; t++)
        right = right && r->first[t] <= r->first[t + 1];
    if (!right)
        complain(result, "token_offsets do not ascend from 0 to %u",
                 (unsigned)r->policy->plan.pairs);
    return right;
}

static void check_routed(const routed *r, check_result *result) {
    const uint32_t tokens = r->policy->in->of.tokens;
    if (!are_offsets(r, result))
        return;
    for (uint32_t t = 0; t < tokens && result->wrong[0] == '\0'; t++) {
        check_token(r, t, result);
        if (r->policy->kind == POLICY_REROUTE && result->wrong[0] == '\0')
            check_dropped(r, t, result);
    }
    if (result->wrong[0] == '\0')
        check_buckets(r, result);
}

static clmoe_status read_back(const bench_policy *p, policy_buffer which, size_t bytes, void *to) {
    return CL(clEnqueueReadBuffer(p->device->queue, p->buffers[which], CL_TRUE, 0, bytes, to, 0,
                                  NULL, NULL));
}

static clmoe_status read_routed(const bench_policy *p, routed *r) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t tokens = p->in->of.tokens, scores = tokens * p->in->of.experts;
    TRY(read_back(p, POLICY_IDS, p->plan.pairs * sizeof *r->ids, r->ids));
    TRY(read_back(p, POLICY_SCORES, scores * sizeof *r->scores, r->scores));
    TRY(read_back(p, POLICY_PLAN, p->plan.bytes, r->plan));
    for (uint32_t t = 0; t <= tokens; t++)
        r->first[t] = t * p->in->of.top_k;
    if (p->kind == POLICY_EXPERT_CHOICE)
        TRY(read_back(p, POLICY_OFFSETS, (tokens + 1) * sizeof *r->first, r->first));
done:
    return status;
}

clmoe_status check_policy(const bench_policy *p, check_result *result) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t tokens = p->in->of.tokens, experts = p->in->of.experts;
    routed r = {.policy = p,
                .ids = calloc(p->plan.pairs, sizeof *r.ids),
                .first = calloc(tokens + 1, sizeof *r.first),
                .scores = calloc(tokens * experts, sizeof *r.scores),
                .plan = calloc(p->plan.bytes, 1),
                .chosen = calloc(experts, sizeof *r.chosen),
                .places = calloc(experts, sizeof *r.places)};
    if (!r.ids || !r.first || !r.scores || !r.plan || !r.chosen || !r.places)
        TRY(bench_no_memory("the results of a policy"));
    TRY(read_routed(p, &r));
    check_routed(&r, result);
done:
    free(r.ids);
    free(r.first);
    free(r.scores);
    free(r.plan);
    free(r.chosen);
    free(r.places);
    return status;
}
