/* What `clmoe train` says while it runs: one line that changes on a terminal, else plain lines. */
#ifndef CLMOE_CLI_TRAIN_PROGRESS_H
#define CLMOE_CLI_TRAIN_PROGRESS_H

#include "metrics.h"

/* Start from {0}. */
typedef struct progress {
    const train_settings *settings;
    bool terminal, shown;
    uint32_t first;             /* steps done before */
    double begin, last, paused; /* seconds */
    uint32_t last_step;
} progress;

void progress_begin(progress *p, const train_settings *s, uint32_t done);
/* Tokens per second since the last call, without the pauses. */
double progress_speed(progress *p, uint32_t steps);
/* Around what is no step; the device is idle. */
void progress_pause(progress *p);
void progress_go_on(progress *p);
void progress_show(progress *p, const metrics *r);
void progress_end(progress *p);

/* The run in two lines, at its end. */
void progress_summary(const train_settings *s, const metrics *r, const char *folder);

#endif
