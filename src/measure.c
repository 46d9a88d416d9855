/*
 * Statistics and losses of a batch, from one pass over it. What a call that routed left behind, the
 * noise and the group logits, others make again.
 */
#include "measure.h"

/* What clmoe_stats_args and clmoe_loss_args have in common. */
#define SUMS_OF(args)                                                                              \
    ((sums_args){.tokens = (args)->tokens,                                                         \
                 .weights = (args)->weights,                                                       \
                 .x = (args)->x,                                                                   \
                 .logits = (args)->logits,                                                         \
                 .ids = (args)->ids,                                                               \
                 .pair_weights = (args)->pair_weights,                                             \
                 .plan = (args)->plan,                                                             \
                 .live = (args)->live,                                                             \
                 .token_mask = (args)->token_mask,                                                 \
                 .token_offsets = (args)->token_offsets,                                           \
                 .state = (args)->state,                                                           \
                 .scratch = (args)->scratch})

/* logits -> noisy logits, with a state, where the layer has noise. */
static clmoe_status noisy_logits(const clmoe_layer *layer, launch *chain, sums_args *args,
                                 const workspace_layout *ws) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf none = {0};
    args->noisy = args->logits;
    if (!args->logits.mem || !args->state.mem || !layer_is_noisy(layer))
        return CLMOE_SUCCESS;
    noise_args noise = {.tokens = args->tokens,
                        .weights = args->weights,
                        .x = args->x,
                        .logits = args->logits,
                        .state = args->state,
                        .scratch = args->scratch};
    if (!args->routed)
        TRY(step_noise(layer, chain, &noise));
    args->noisy = workspace_region(ws, REGION_NOISY, none, args->scratch);
    args->noise_raw = workspace_region(ws, REGION_NOISE_RAW, none, args->scratch);
done:
    return status;
}

/* What p is made of, and what first and fresh choices are the best of. */
static clmoe_status inputs(const clmoe_layer *layer, launch *chain, sums_args *args,
                           const workspace_layout *ws) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf none = {0};
    const uint32_t ranked = COUNT_BIT(COUNT_FRESH) | COUNT_BIT(COUNT_FIRST);
    TRY(noisy_logits(layer, chain, args, ws));
    args->p_logits = args->noisy;
    if (!args->logits.mem || args->tokens == 0)
        return CLMOE_SUCCESS;
    if (layer->desc.router.two_level) {
        args->p_logits = workspace_region(ws, REGION_JOINT, none, args->scratch);
        if (!args->routed)
            TRY(step_group_logits(layer, chain, args->tokens, args->weights, args->x, args->state,
                                  args->scratch));
        TRY(step_joint(layer, chain, args, args->p_logits));
        args->scores = args->p_logits;
    } else if (!args->scores.mem && (args->asked & ranked)) {
        args->scores = workspace_region(ws, REGION_LOGITS, none, args->scratch);
        TRY(step_score_rows(layer, chain, args->tokens, args->noisy, args->state, args->scores));
    }
done:
    return status;
}

clmoe_status measure(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *stats,
                     const clmoe_loss_args *loss, clmoe_buf scores) {
    clmoe_status status = CLMOE_SUCCESS;
    sums_args sums = {0};
    workspace_layout ws;
    bool routed = scores.mem != NULL;
    if (!stats && !loss)
        return CLMOE_SUCCESS;
    sums = loss ? SUMS_OF(loss) : SUMS_OF(stats);
    sums.routed = routed;
    sums.scores = scores;
    if (stats)
        sums.asked |= stats_asks(layer, stats, routed);
    if (loss)
        sums.asked |= loss_asks(layer, loss, routed);
    TRY(workspace_layout_get(layer, sums.tokens, &ws));
    TRY(inputs(layer, chain, &sums, &ws));
    TRY(step_sums(layer, chain, &sums));
    if (stats)
        TRY(stats_finish(layer, chain, stats, &sums.shape));
    if (loss)
        TRY(loss_finish(layer, chain, loss, &sums));
done:
    return status;
}

clmoe_status measure_stats(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *args) {
    return measure(layer, chain, args, NULL, (clmoe_buf){0});
}

clmoe_status measure_losses(const clmoe_layer *layer, launch *chain, const clmoe_loss_args *args) {
    return measure(layer, chain, NULL, args, (clmoe_buf){0});
}
