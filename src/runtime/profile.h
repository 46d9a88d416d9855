/* The events of a call by step: what launch.c records for the caller's clmoe_profile. */
#ifndef CLMOE_SRC_PROFILE_H
#define CLMOE_SRC_PROFILE_H

#include "status.h"

#include <stdbool.h>

/* Whether it can be filled by commands of a queue with these properties. */
clmoe_status profile_check(const clmoe_profile *profile, cl_command_queue_properties properties);

/* Adds a command, the first one of step `name` or one more of the newest step. */
void profile_add(clmoe_profile *profile, const char *name, bool first, cl_event event);

#endif
