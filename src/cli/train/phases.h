/*
 * The layers of a run. A layer is immutable, so a run whose settings change with the step
 * (--soft-steps, --top-k-schedule, --balance-from) has one for each phase; all blocks share it.
 */
#ifndef CLMOE_CLI_TRAIN_PHASES_H
#define CLMOE_CLI_TRAIN_PHASES_H

#include "settings.h"

typedef struct train_phase {
    uint32_t first; /* step */
    clmoe_policy policy;
    clmoe_layer *layer;
    clmoe_layer *validation; /* without noise, dropout and rounding; no state */
} train_phase;

enum { MOST_LAYER_PHASES = MOST_PHASES + 2 };

/* Start from {0}. */
typedef struct train_phases {
    train_phase rows[MOST_LAYER_PHASES];
    uint32_t count;
    bool counted; /* the layers give statistics and have controllers: all but Soft MoE */
    bool biased;  /* a selection bias, which a rule moves */
    size_t saved, scratch;
} train_phases;

/* What a validation layer is made from. */
void phases_describe(const train_settings *s, uint32_t step, clmoe_layer_desc *desc);

clmoe_status phases_create(train_phases *p, const train_settings *s, clmoe_context *context);
void phases_destroy(train_phases *p);

/* The phase of a step. */
const train_phase *phases_at(const train_phases *p, uint32_t step);

#endif
