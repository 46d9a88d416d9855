/*
 * Queues and events, and where the time of one clmoe_forward() or clmoe_backward() goes.
 *
 *   - `queue` is any queue of the context's device. As with OpenCL's own commands it is not
 *     flushed: call clFlush() before you poll the event or wait for it on another queue. Only the
 *     engine "clblast" flushes, by itself.
 *   - A call copies its arguments: the structs may go when it returns. OpenCL keeps the buffers of
 *     commands until they are done, so you may release yours when the call returns, too.
 *   - Several batches of one layer may be in flight, on one queue or on several, each with its own
 *     saved, scratch and outputs; weights may be shared.
 *   - A layer holds no weights: one layer serves all blocks of a model with the same descriptor,
 *     with other weights in each call.
 *   - The event belongs to the last command of the call, on an in-order queue a marker behind the
 *     others, so its profiling info does not cover the whole call. A profile has the events of
 *     every step:
 *
 *   clmoe_profile profile = {.struct_size = sizeof profile};
 *   args.profile = &profile;
 *   clmoe_forward(layer, queue, &args, 0, NULL, &event);
 *   clWaitForEvents(1, &event);
 *   for (uint32_t i = 0; i < profile.num_steps; i++) {
 *       double ms;
 *       clmoe_profile_time(&profile, i, &ms);
 *       printf("%s %.3f ms\n", profile.steps[i].name, ms);
 *   }
 *   clmoe_profile_release(&profile);
 *
 * The queue needs CL_QUEUE_PROFILING_ENABLE, and may be in-order or out-of-order.
 */
#ifndef CLMOE_PROFILE_H
#define CLMOE_PROFILE_H

#include "clmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

#define CLMOE_PROFILE_STEPS 12 /* at least as many as a call of this version can have */

/* A step that enqueued something; its first and its last command may be the same one. */
typedef struct clmoe_profile_step {
    /*
     * In this order: "score", "topk", "plan", "dispatch", "experts", "mix" (the end of Soft MoE),
     * "shared", "combine", "copy" (of logits, ids and weights that were asked for), "measure"
     * (statistics and losses, from one pass). A few tokens may be chosen and planned in one
     * command, of "topk"; there is no "plan" then. Of clmoe_backward(): "prepare", "experts",
     * "combine", "shared", "topk", "score", "dispatch", and of the weights "experts gradients",
     * "shared gradients", "other gradients". A static string.
     */
    const char *name;
    cl_event first, last; /* owned by the profile */
} clmoe_profile_step;

/* Yours; written by the call, and no longer used by the library when the call returns. */
typedef struct clmoe_profile {
    /*
     * sizeof(clmoe_profile), or less for fewer steps, but at least one: if a call has more than
     * there is room for, the last one has the rest.
     */
    size_t struct_size;
    /* 0 before the call, which is refused otherwise, and after one that failed. */
    uint32_t num_steps;
    clmoe_profile_step steps[CLMOE_PROFILE_STEPS];
} clmoe_profile;

/*
 * Milliseconds of a step on the device's clock, once the call's event is complete: from the end of
 * the step before, for the first one from its own start, to its end. So the steps add up to the
 * call, the device's waiting for the host included. Errors: CLMOE_INVALID_ARGUMENT for a step that
 * does not exist; CL_PROFILING_INFO_NOT_AVAILABLE before the event is complete.
 */
CLMOE_API clmoe_status clmoe_profile_time(const clmoe_profile *profile, uint32_t step, double *ms);

/* Releases the events; the profile can then be used again. */
CLMOE_API void clmoe_profile_release(clmoe_profile *profile);

#ifdef __cplusplus
}
#endif

#endif
