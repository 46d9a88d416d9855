/* A batch by single steps, for test_steps.c and back_steps.c. */
#ifndef STEP_RIG_H
#define STEP_RIG_H

#include "workspace.h" /* before cmocka.h, which has a macro fail */

#include "support.h"

/* Whose choice it is. */
typedef enum source { OWN_ROUTER, LOGITS_IN, IDS_IN, SOURCES } source;

enum { MAX_BATCH_LOSSES = 16 };

/* A batch by clmoe_forward(), and the arguments of its steps with outputs of their own. */
typedef struct rig {
    const clmoe_layer_desc *desc;
    clmoe_layer *layer;
    workspace_layout ws;
    batch b;
    device_batch d; /* of the forward */
    const void *forward_plan, *forward_scores;
    clmoe_loss_desc losses[MAX_BATCH_LOSSES];
    uint32_t num_losses;
    bool renorms, jitters, shares;
    clmoe_score_args score;
    clmoe_topk_args topk;
    clmoe_plan_args plan;
    clmoe_renorm_after_drop_args renorm;
    clmoe_jitter_args jitter;
    clmoe_dispatch_args dispatch;
    clmoe_soft_dispatch_args soft_dispatch;
    clmoe_soft_combine_args soft_combine;
    clmoe_experts_args experts;
    clmoe_shared_expert_args shared;
    clmoe_combine_args combine;
    clmoe_stats_args stats;
    clmoe_loss_args loss;
} rig;

static inline bool is_soft(const clmoe_layer_desc *desc) {
    return desc->router.policy == CLMOE_POLICY_SOFT_MOE;
}

/*
 * After the steps forward of a training layer: those backward give clmoe_backward()'s bits, both
 * parts together and one after the other.
 */
void check_back_steps(const rig *r);

#endif
