/* Numbers that the files of the model share. */
#ifndef CLMOE_CLI_TRAIN_SIZES_H
#define CLMOE_CLI_TRAIN_SIZES_H

#include <stddef.h>

enum { BYTE_VALUES = 256, GAIN_SLICES = 64, SUM_STAGES = 3 };

/* Work-items of each stage of a sum over all parameters. */
static const size_t sum_items[SUM_STAGES] = {65536, 256, 1};

#endif
