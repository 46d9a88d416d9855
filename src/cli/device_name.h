/* Which device the user means; shared with clmoe-bench. */
#ifndef CLMOE_CLI_DEVICE_NAME_H
#define CLMOE_CLI_DEVICE_NAME_H

#include "problem.h"

#include <clmoe/clmoe.h>

/*
 * Whether `text` means device number `index`: it is that number, or part of the name of the device
 * or its platform, in upper or lower case. Digits alone are a number.
 */
bool device_is_meant(cl_device_id device, uint32_t index, const char *text);

/* The sentence for a text that means none of `count` devices; false. */
bool device_not_found(const char *text, uint32_t count, problem *why);

#endif
