/* Losses on the device against the oracle's: values, gradients, central differences. */
#ifndef SUPPORT_LOSS_H
#define SUPPORT_LOSS_H

#include "support_balance.h"

#define LOSS_TOLERANCE       1e-5
#define DIFFERENCE_TOLERANCE 1e-4

/* What clmoe_loss() gave; host arrays. dnoise is NULL without learned noise. */
typedef struct loss_result {
    float *values, *dlogits, *dnoise;
} loss_result;

/*
 * Runs clmoe_loss() on an uploaded batch. `start` [T,R] is what dlogits and dnoise hold before, or
 * NULL: zeros.
 */
loss_result loss_run(balance_batch *b, const clmoe_loss_desc *losses, uint32_t count,
                     const float *start);

/*
 * What a value's error is relative to at least: tiny, but for l1, a sum of differences of shares,
 * whose quotients OpenCL may round by 2.5 units.
 */
double loss_floor(const clmoe_loss_desc *loss);

/* The name under which a loss's worst error is kept. */
const char *loss_label(const clmoe_loss_desc *loss);

/*
 * Runs one loss alone and compares its value, its gradient with the oracle's, and with central
 * differences of the oracle's surrogate.
 */
void loss_check(balance_batch *b, const clmoe_loss_desc *loss);

/* Whether the header gives the combination a meaning in a layer with these switches. */
bool loss_is_defined(const clmoe_layer_desc *desc, const clmoe_loss_desc *loss);

/*
 * Draws the noise of the batch on the device: x and the routers are made, the logits are x Wr^T,
 * and the choice follows the noisy ones. Between balance_make() and balance_upload(); the batch has
 * a state.
 */
void loss_draw_noise(balance_batch *b);

/*
 * The combine weights of an uploaded batch whose layer has renorm.after_drop: renormalised over the
 * pairs that the plan kept.
 */
void loss_renorm_after_drop(balance_batch *b);

#endif
