/* Argument checks of the public calls: everything that can be known before anything is enqueued. */
#ifndef CLMOE_CHECK_H
#define CLMOE_CHECK_H

#include "layer.h"

enum { MAX_COLUMNS = 4096 }; /* the most of R */

/* The descriptor alone; context and device are not asked. */
clmoe_status check_layer_desc(const clmoe_layer_desc *desc);
/* Its part about the policy of choice, once sizes and groups are known to be right. */
clmoe_status check_policy(const clmoe_layer_desc *desc);

clmoe_status check_forward(const clmoe_layer *layer, const clmoe_forward_args *args);
clmoe_status check_backward(const clmoe_layer *layer, const clmoe_backward_args *args);
clmoe_status check_experts_backward(const clmoe_layer *layer,
                                    const clmoe_experts_backward_args *args);
clmoe_status check_combine_backward(const clmoe_layer *layer,
                                    const clmoe_combine_backward_args *args);
clmoe_status check_shared_expert_backward(const clmoe_layer *layer,
                                          const clmoe_shared_expert_backward_args *args);
clmoe_status check_topk_backward(const clmoe_layer *layer, const clmoe_topk_backward_args *args);
clmoe_status check_score_backward(const clmoe_layer *layer, const clmoe_score_backward_args *args);
clmoe_status check_dispatch_backward(const clmoe_layer *layer,
                                     const clmoe_dispatch_backward_args *args);
clmoe_status check_score(const clmoe_layer *layer, const clmoe_score_args *args);
clmoe_status check_topk(const clmoe_layer *layer, const clmoe_topk_args *args);
clmoe_status check_plan(const clmoe_layer *layer, const clmoe_plan_args *args);
clmoe_status check_renorm_after_drop(const clmoe_layer *layer,
                                     const clmoe_renorm_after_drop_args *args);
clmoe_status check_replicate(const clmoe_layer *layer, const clmoe_replicate_args *args);
clmoe_status check_jitter(const clmoe_layer *layer, const clmoe_jitter_args *args);
clmoe_status check_dispatch(const clmoe_layer *layer, const clmoe_dispatch_args *args);
clmoe_status check_soft_dispatch(const clmoe_layer *layer, const clmoe_soft_dispatch_args *args);
clmoe_status check_soft_combine(const clmoe_layer *layer, const clmoe_soft_combine_args *args);
clmoe_status check_experts(const clmoe_layer *layer, const clmoe_experts_args *args);
clmoe_status check_shared_expert(const clmoe_layer *layer, const clmoe_shared_expert_args *args);
clmoe_status check_combine(const clmoe_layer *layer, const clmoe_combine_args *args);
/* Number i of losses that are `loss_size` bytes apart, as this library has it. */
clmoe_loss_desc loss_at(const clmoe_loss_desc *losses, size_t loss_size, uint32_t i);
clmoe_status check_loss(const clmoe_layer *layer, const clmoe_loss_args *args);
clmoe_status check_router_orthogonality(const clmoe_layer *layer,
                                        const clmoe_router_orthogonality_args *args);
clmoe_status check_stats(const clmoe_layer *layer, const clmoe_stats_args *args);
clmoe_status check_bias_counts(const clmoe_layer *layer, const clmoe_bias_counts_args *args);
clmoe_status check_state_init(const clmoe_layer *layer, clmoe_buf state);
clmoe_status check_balance(const clmoe_layer *layer, const clmoe_balance_args *args);
clmoe_status check_balance_start(const clmoe_layer *layer, const clmoe_balance_args *args);
/* That the layer has this MLP. */
clmoe_status check_mlp_exists(const clmoe_layer *layer, clmoe_mlp mlp);
clmoe_status check_pack(const clmoe_layer *layer, const clmoe_pack_args *args);
/* Packed weights whose header the host will read. */
clmoe_status check_packed_read(const clmoe_layer *layer, clmoe_mlp mlp, clmoe_buf packed);

#endif
