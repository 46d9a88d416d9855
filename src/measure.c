/*
 * Statistics and losses of a batch, from one pass over it. What a call that routed left behind, the
 * noise and the group logits, others make again.
 */
#include "measure.h"
#include "check/check.h"

/* logits -> noisy logits, with a state, where the layer has noise. */
static clmoe_status noisy_logits(const batch *b, launch *chain, sums *in) {
    clmoe_status status = CLMOE_SUCCESS;
    in->noisy = b->logits;
    if (!b->logits.mem || !b->state.mem || !layer_is_noisy(b->layer))
        return CLMOE_SUCCESS;
    if (!b->routed)
        TRY(step_noise(b, chain, false));
    in->noisy = region(b, REGION_NOISY);
    in->noise_raw = region(b, REGION_NOISE_RAW);
done:
    return status;
}

/* What p is made of, and what first and fresh choices are the best of. */
static clmoe_status inputs(const batch *b, launch *chain, sums *in) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t ranked = COUNT_BIT(COUNT_FRESH) | COUNT_BIT(COUNT_FIRST);
    TRY(noisy_logits(b, chain, in));
    in->p_logits = in->noisy;
    in->scores = b->scores;
    if (!b->logits.mem || b->tokens == 0)
        return CLMOE_SUCCESS;
    if (b->layer->desc.router.groups.two_level) {
        if (!b->routed)
            TRY(step_group_logits(b, chain));
        in->p_logits = region(b, REGION_JOINT);
        TRY(step_joint(b, chain, in));
        in->scores = in->p_logits;
    } else if (!b->routed && ((in->asked & ranked) || b->bias_counts.mem)) {
        in->scores = region(b, REGION_LOGITS);
        TRY(step_score_rows(b, chain, in->noisy, in->scores));
    }
done:
    return status;
}

/* Before the sums: the cutoffs lie where their rows will. */
static clmoe_status count_biases(const batch *b, launch *chain, clmoe_buf scores) {
    clmoe_status status = CLMOE_SUCCESS;
    const clmoe_buf cutoffs = region(b, REGION_SUMS_ROWS);
    if (b->tokens > 0)
        TRY(step_cutoffs(b, chain, scores, cutoffs));
    TRY(step_bias_counts(b, chain, scores, cutoffs));
done:
    return status;
}

clmoe_status measure(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    sums in = {0};
    if (!b->stats.mem && b->num_losses == 0 && !b->bias_counts.mem)
        return CLMOE_SUCCESS;
    if (b->stats.mem)
        in.asked |= stats_asks(b);
    if (b->num_losses > 0)
        in.asked |= loss_asks(b);
    TRY(inputs(b, chain, &in));
    if (b->bias_counts.mem)
        TRY(count_biases(b, chain, in.scores));
    if (!b->stats.mem && b->num_losses == 0)
        return CLMOE_SUCCESS;
    TRY(step_sums(b, chain, &in));
    if (b->stats.mem)
        TRY(stats_finish(b, chain, &in));
    if (b->num_losses > 0)
        TRY(loss_finish(b, chain, &in));
done:
    return status;
}
