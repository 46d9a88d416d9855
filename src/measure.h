/* Statistics and losses of a batch: the part of the chain that forward and single calls share. */
#ifndef CLMOE_MEASURE_H
#define CLMOE_MEASURE_H

#include "steps.h"

/*
 * Either may be NULL. `scores`: of a call that chose the ids by them, so that noise and group
 * logits of the batch are in their regions; else {NULL, 0}.
 */
clmoe_status measure(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *stats,
                     const clmoe_loss_args *losses, clmoe_buf scores);

/* One of the two, of a call that routed nothing. */
clmoe_status measure_stats(const clmoe_layer *layer, launch *chain, const clmoe_stats_args *args);
clmoe_status measure_losses(const clmoe_layer *layer, launch *chain, const clmoe_loss_args *args);

#endif
