/* Runs side by side: those that differ in the seed alone as one, and sweeps of one weight. */
#ifndef CLMOE_CLI_TRAIN_GROUPS_H
#define CLMOE_CLI_TRAIN_GROUPS_H

#include "runs.h"

#define NO_SWEEP UINT32_MAX

/* Runs of one kind: the same settings, steps done, and --balance; different seeds. */
typedef struct run_group {
    const run_record *lead; /* the first of them */
    uint32_t count;
    double mean[RUN_FIGURES];
    double spread[RUN_FIGURES]; /* standard deviation with n - 1; NAN of one run */
    uint32_t sweep;             /* its number, or NO_SWEEP */
    uint32_t method;            /* of --balance: whose number the sweep changes */
    double weight;              /* that number */
    bool pareto;                /* none of the sweep is better in both loss and MaxVio */
} run_group;

/* Start from {0}, the runs, and their number. */
typedef struct comparison {
    run_record *runs;
    uint32_t num_runs;
    uint32_t *group_of; /* [num_runs] */
    run_group *groups;  /* [num_groups] in the order of their first runs */
    uint32_t num_groups, num_sweeps;
} comparison;

clmoe_status comparison_make(comparison *c);
/* Frees all but the runs themselves. */
void comparison_free(comparison *c);

#endif
