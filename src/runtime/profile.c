/* The events of a call by step, for the caller who asks where the time goes. */
#include "profile.h"

enum { ONE_STEP = offsetof(clmoe_profile, steps) + sizeof(clmoe_profile_step) };

clmoe_status profile_check(const clmoe_profile *profile, cl_command_queue_properties properties) {
    if (profile->struct_size < ONE_STEP)
        return fail(CLMOE_INVALID_ARGUMENT, "profile.struct_size is %zu, but must be at least %d",
                    profile->struct_size, (int)ONE_STEP);
    if (profile->num_steps != 0)
        return fail(CLMOE_INVALID_ARGUMENT,
                    "profile has %u steps of an earlier call: clmoe_profile_release() it first",
                    profile->num_steps);
    if (!(properties & CL_QUEUE_PROFILING_ENABLE))
        return fail(CLMOE_INVALID_ARGUMENT,
                    "profile is given, but queue has no CL_QUEUE_PROFILING_ENABLE");
    return CLMOE_SUCCESS;
}

static bool is_full(const clmoe_profile *profile) {
    const size_t room = profile->struct_size - offsetof(clmoe_profile, steps);
    return profile->num_steps == room / sizeof(clmoe_profile_step);
}

void profile_add(clmoe_profile *profile, const char *name, bool first, cl_event event) {
    clmoe_profile_step *step = &profile->steps[profile->num_steps];
    clRetainEvent(event);
    if (first && !is_full(profile)) {
        clRetainEvent(event);
        *step = (clmoe_profile_step){.name = name, .first = event, .last = event};
        profile->num_steps++;
        return;
    }
    step--;
    clReleaseEvent(step->last);
    step->last = event;
}

static clmoe_status event_time(cl_event event, cl_profiling_info what, cl_ulong *time) {
    return CL(clGetEventProfilingInfo(event, what, sizeof *time, time, NULL));
}

clmoe_status clmoe_profile_time(const clmoe_profile *profile, uint32_t step, double *ms) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_ulong begin = 0, end = 0;
    if (!profile || !ms)
        return fail(CLMOE_INVALID_ARGUMENT, "%s is NULL", profile ? "ms" : "profile");
    if (step >= profile->num_steps)
        return fail(CLMOE_INVALID_ARGUMENT, "step is %u, but the profile has %u steps", step,
                    profile->num_steps);
    const clmoe_profile_step *steps = profile->steps;
    if (step == 0)
        TRY(event_time(steps[0].first, CL_PROFILING_COMMAND_START, &begin));
    else
        TRY(event_time(steps[step - 1].last, CL_PROFILING_COMMAND_END, &begin));
    TRY(event_time(steps[step].last, CL_PROFILING_COMMAND_END, &end));
    *ms = ((double)end - (double)begin) * 1e-6;
done:
    return status;
}

void clmoe_profile_release(clmoe_profile *profile) {
    if (!profile)
        return;
    for (uint32_t i = 0; i < profile->num_steps; i++) {
        clReleaseEvent(profile->steps[i].first);
        clReleaseEvent(profile->steps[i].last);
        profile->steps[i] = (clmoe_profile_step){0};
    }
    profile->num_steps = 0;
}
