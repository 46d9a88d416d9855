/* Statistics and losses of a batch: the part of the chain that forward and single calls share. */
#ifndef CLMOE_MEASURE_H
#define CLMOE_MEASURE_H

#include "steps.h"

/* Statistics where there is a buffer for them, the losses of the batch's list. */
clmoe_status measure(const batch *b, launch *chain);

#endif
