/* The chain: read this first. A step reads and writes the batch's buffers; see batch.h. */
#include "check/check.h"
#include "measure.h"
#include "runtime/structs.h"

/* x -> ids and weights, unless the caller brought them. */
static clmoe_status route(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    if (!b->routed)
        return CLMOE_SUCCESS;
    launch_step(chain, "score");
    TRY(step_score(b, chain));
    launch_step(chain, "topk");
    TRY(step_topk(b, chain));
done:
    return status;
}

/* ids -> a place for each pair. */
static clmoe_status place(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    launch_step(chain, "plan");
    TRY(step_plan(b, chain));
    if (layer_renorms_late(b->layer) && b->routed)
        TRY(step_plan_renorm(b, chain));
done:
    return status;
}

/* x -> ye. */
static clmoe_status run_experts(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    launch_step(chain, "dispatch"); /* jitter included */
    if (batch_jitters_experts(b) && (b->logits_given || !b->routed))
        TRY(step_jitter(b, chain));
    if (b->xe.mem)
        TRY(step_dispatch(b, chain));
    launch_step(chain, "experts");
    TRY(step_experts(b, chain));
done:
    return status;
}

/* Soft MoE instead of routing and experts: afterwards each token has one pair, ye's row of its own.
 */
static clmoe_status run_soft_moe(batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    if (b->tokens == 0 && !b->layer->desc.training) /* backward reads the plan */
        return CLMOE_SUCCESS;
    launch_step(chain, "dispatch");
    TRY(step_soft_moe_dispatch(b, chain));
    if (b->tokens == 0)
        return CLMOE_SUCCESS;
    launch_step(chain, "experts");
    TRY(step_experts(b, chain));
    launch_step(chain, "mix");
    TRY(step_soft_moe_combine(b, chain));
    b->ye = b->mixed;
done:
    return status;
}

/* Both in one launch behind the logits; its time is the choice's. */
static clmoe_status route_and_place_few(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_buf noisy;
    launch_step(chain, "score");
    TRY(step_logits(b, chain, &noisy));
    launch_step(chain, "topk");
    TRY(step_few(b, chain, noisy));
done:
    return status;
}

static clmoe_status run_routed(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    if (few_takes(b)) {
        TRY(route_and_place_few(b, chain));
    } else {
        TRY(route(b, chain));
        TRY(place(b, chain));
    }
    TRY(run_experts(b, chain));
done:
    return status;
}

/* ye -> y. */
static clmoe_status combine(const batch *b, launch *chain) {
    clmoe_status status = CLMOE_SUCCESS;
    launch_step(chain, "shared");
    if (b->layer->desc.shared.hidden_dim)
        TRY(step_shared(b, chain));
    launch_step(chain, "combine");
    TRY(step_combine(b, chain));
done:
    return status;
}

/* Copies the intermediate results that the caller asked for. */
static clmoe_status report(const batch *b, launch *chain, const clmoe_forward_args *args) {
    clmoe_status status = CLMOE_SUCCESS;
    const size_t pairs_bytes = b->ws.plan.pairs * sizeof(cl_int);
    const size_t logits_bytes = (size_t)b->tokens * b->layer->columns * sizeof(cl_float);
    const size_t offsets_bytes = ((size_t)b->tokens + 1) * sizeof(cl_int);
    launch_step(chain, "copy");
    if (b->routed)
        TRY(launch_copy(chain, b->logits, args->logits, logits_bytes));
    TRY(launch_copy(chain, b->ids, args->ids, pairs_bytes));
    TRY(launch_copy(chain, b->pair_weights, args->pair_weights, pairs_bytes));
    TRY(launch_copy(chain, b->token_offsets, args->token_offsets, offsets_bytes));
done:
    return status;
}

clmoe_status clmoe_forward(clmoe_layer *layer, cl_command_queue queue,
                           const clmoe_forward_args *args, cl_uint num_wait, const cl_event *wait,
                           cl_event *event) {
    clmoe_status status = CLMOE_SUCCESS;
    launch chain = {0};
    batch b;
    clmoe_forward_args own = {0};
    TRY(STRUCT_TAKE_ARGS(args, &own));
    TRY(check_forward(layer, &own));
    TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));
    TRY(launch_profile(&chain, own.profile));
    TRY(bind_forward(&b, layer, &own));
    TRY(layer_is_soft_moe(layer) ? run_soft_moe(&b, &chain) : run_routed(&b, &chain));
    TRY(combine(&b, &chain));
    TRY(report(&b, &chain, &own));
    launch_step(&chain, "measure");
    TRY(measure(&b, &chain));
done:
    return launch_end(&chain, status, event);
}
