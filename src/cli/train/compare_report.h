/* The report of runs side by side. */
#ifndef CLMOE_CLI_TRAIN_COMPARE_REPORT_H
#define CLMOE_CLI_TRAIN_COMPARE_REPORT_H

#include "groups.h"

#include <stdio.h>

/*
 * Settings in which the groups differ, without seed and balance: "top-k 1, dim 64"; empty where
 * they do not.
 */
enum { DIFFERENCES_TEXT = 512 };
void group_differences(const comparison *c, uint32_t group, char text[DIFFERENCES_TEXT]);

clmoe_status compare_report_write(const comparison *c, FILE *file);

#endif
