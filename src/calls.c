/* The steps as public calls: check, launch one step, end. */
#include "check/check.h"
#include "measure.h"

#define DEFINE_CALL(call, args_type, check, step)                                                  \
    clmoe_status call(clmoe_layer *layer, cl_command_queue queue, const args_type *args,           \
                      cl_uint num_wait, const cl_event *wait, cl_event *event) {                   \
        clmoe_status status = CLMOE_SUCCESS;                                                       \
        launch chain = {0};                                                                        \
        TRY(check(layer, args));                                                                   \
        TRY(launch_begin(&chain, layer->context, queue, num_wait, wait));                          \
        TRY(step(layer, &chain, args));                                                            \
    done:                                                                                          \
        return launch_end(&chain, status, event);                                                  \
    }

DEFINE_CALL(clmoe_score, clmoe_score_args, check_score, step_score)
DEFINE_CALL(clmoe_topk, clmoe_topk_args, check_topk, step_topk)
DEFINE_CALL(clmoe_plan, clmoe_plan_args, check_plan, step_plan)
DEFINE_CALL(clmoe_dispatch, clmoe_dispatch_args, check_dispatch, step_dispatch)
DEFINE_CALL(clmoe_experts, clmoe_experts_args, check_experts, step_experts)
DEFINE_CALL(clmoe_combine, clmoe_combine_args, check_combine, step_combine)
DEFINE_CALL(clmoe_stats_compute, clmoe_stats_args, check_stats, measure_stats)
DEFINE_CALL(clmoe_loss, clmoe_loss_args, check_loss, measure_losses)

clmoe_status clmoe_plan_layout_get(const clmoe_layer *layer, uint32_t tokens,
                                   clmoe_plan_layout *layout) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout ws, most;
    if (!layer || !layout)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", layer ? "layout" : "layer");
    TRY(workspace_layout_get(layer, tokens, &ws));
    TRY(workspace_most(layer, tokens, &most));
    *layout = ws.plan;
    layout->bytes = most.plan.bytes;
    layout->most_slots = most.plan.slots;
done:
    return status;
}

static clmoe_status check_one_buffer(const clmoe_layer *layer, const char *what, uint32_t tokens,
                                     size_t bytes) {
    const device_info *device = &layer->context->info;
    if (bytes <= device->max_buffer_bytes)
        return CLMOE_SUCCESS;
    return fail(CLMOE_UNSUPPORTED,
                "tokens is %u: %s needs %zu bytes, but device %.64s allows %llu per buffer", tokens,
                what, bytes, device->name, (unsigned long long)device->max_buffer_bytes);
}

clmoe_status clmoe_layer_memory(const clmoe_layer *layer, uint32_t tokens, size_t *saved,
                                size_t *scratch) {
    clmoe_status status = CLMOE_SUCCESS;
    workspace_layout most;
    if (!layer)
        return fail(CLMOE_INVALID_ARGUMENT, "layer is NULL");
    TRY(workspace_most(layer, tokens, &most));
    if (saved)
        *saved = most.saved_bytes;
    if (scratch)
        *scratch = most.scratch_bytes;
    TRY(check_one_buffer(layer, "saved", tokens, most.saved_bytes));
    TRY(check_one_buffer(layer, "scratch", tokens, most.scratch_bytes));
done:
    return status;
}
