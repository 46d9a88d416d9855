/* Marks in a queue: how much of a step's time on the device is spent between some of them. */
#ifndef CLMOE_CLI_TRAIN_MARKS_H
#define CLMOE_CLI_TRAIN_MARKS_H

#include "../error.h"

/* Start from {0}. */
typedef struct queue_marks {
    cl_event *events;
    uint32_t count, room;
} queue_marks;

/* Room for so many marks; free with marks_free(). */
clmoe_status marks_create(queue_marks *marks, uint32_t room);
void marks_free(queue_marks *marks);

/* Forgets all marks. */
void marks_clear(queue_marks *marks);

/* One more, behind what was enqueued on a queue with profiling. */
clmoe_status marks_add(queue_marks *marks, cl_command_queue queue);

/*
 * The time from mark 1 to 2, from 3 to 4 and so on, as a share of that from the first to the last.
 * Waits.
 */
clmoe_status marks_share(const queue_marks *marks, double *share);

#endif
