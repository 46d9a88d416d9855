#include "marks.h"

#include <stdlib.h>

clmoe_status marks_create(queue_marks *marks, uint32_t room) {
    *marks = (queue_marks){.events = calloc(room, sizeof(cl_event)), .room = room};
    return marks->events ? CLMOE_SUCCESS
                         : cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u marks", (unsigned)room);
}

void marks_clear(queue_marks *marks) {
    while (marks->count > 0)
        clReleaseEvent(marks->events[--marks->count]);
}

void marks_free(queue_marks *marks) {
    marks_clear(marks);
    free(marks->events);
    *marks = (queue_marks){0};
}

clmoe_status marks_add(queue_marks *marks, cl_command_queue queue) {
    clmoe_status status = CLMOE_SUCCESS;
    if (marks->count == marks->room)
        return cli_fail(CLMOE_INVALID_ARGUMENT, "more than %u marks", (unsigned)marks->room);
    TRY(CL(clEnqueueMarkerWithWaitList(queue, 0, NULL, &marks->events[marks->count])));
    marks->count++;
done:
    return status;
}

static clmoe_status time_of(const queue_marks *marks, uint32_t index, double *time) {
    clmoe_status status = CLMOE_SUCCESS;
    cl_ulong value = 0;
    TRY(CL(clGetEventProfilingInfo(marks->events[index], CL_PROFILING_COMMAND_END, sizeof value,
                                   &value, NULL)));
    *time = (double)value;
done:
    return status;
}

clmoe_status marks_share(const queue_marks *marks, double *share) {
    clmoe_status status = CLMOE_SUCCESS;
    double first = 0, before = 0, time = 0, between = 0;
    *share = 0;
    if (marks->count == 0)
        return status;
    TRY(CL(clWaitForEvents(1, &marks->events[marks->count - 1])));
    TRY(time_of(marks, 0, &first));
    for (uint32_t i = 1; i < marks->count; i++) {
        before = time;
        TRY(time_of(marks, i, &time));
        if (i % 2 == 0)
            between += time - before;
    }
    *share = time > first ? between / (time - first) : 0;
done:
    return status;
}
