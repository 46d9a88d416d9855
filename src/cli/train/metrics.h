/* What is measured while a model trains, and metrics.csv. */
#ifndef CLMOE_CLI_TRAIN_METRICS_H
#define CLMOE_CLI_TRAIN_METRICS_H

#include "model.h"

#include <stdio.h>

/* One line of metrics.csv. Start from {0} and metrics_create(). */
typedef struct metrics {
    uint32_t step; /* steps done */
    double loss, validation_loss, validation_violation;
    bool validated;                      /* the two of validation are of this step */
    double tokens_per_second, moe_share; /* of the step's time on the device */
    double balance_gradient;             /* norm of what the losses add to all layers' logits */
    uint32_t layers, experts, losses;
    bool counted;               /* there are statistics */
    clmoe_stats *stats;         /* [layers] of the step's batch */
    uint32_t *loads;            /* [layers, experts] of it */
    uint32_t *validation_loads; /* [layers, experts] of what is held out */
    float *loss_values;         /* [losses]: means over the layers */
    unsigned char *bytes;       /* of a layer's statistics */
} metrics;

clmoe_status metrics_create(metrics *r, const train_model *m);
void metrics_free(metrics *r);

/* Reads what the last forward in training, at `step`, left; all but validation and the time. */
clmoe_status metrics_gather(metrics *r, train_model *m, uint32_t step);

/* Validation loss and MaxVio over what is held out, with the layers of a step. */
clmoe_status metrics_validate(metrics *r, train_model *m, const corpus *text, uint32_t step);

/* The largest, or with `mean` the mean, of a number over the layers. */
double metrics_violation(const metrics *r);
double metrics_drop_rate(const metrics *r);
double metrics_entropy(const metrics *r);
uint32_t metrics_dead(const metrics *r);

/*
 * metrics.csv of a folder, to append to: of a run that goes on after `steps` steps, without the
 * lines behind them.
 */
clmoe_status metrics_open(const char *folder, const train_model *m, uint32_t steps, FILE **file);
clmoe_status metrics_append(const metrics *r, FILE *file);
/* On the disk, before a state that stands behind its lines is. */
clmoe_status metrics_sync(FILE *file);

#endif
