/* Statistics and losses of a batch, from one pass over it. */
#include "steps.h"

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

clmoe_status step_balance(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *stats,
                          const clmoe_loss_args *loss, clmoe_buf scores) {
    clmoe_status status = CLMOE_SUCCESS;
    sums_args sums = {0};
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
    TRY(step_sums(layer, chain, &sums));
    if (stats)
        TRY(stats_finish(layer, chain, stats, &sums.shape));
    if (loss)
        TRY(loss_finish(layer, chain, loss, &sums));
done:
    return status;
}
