/* The trace that a run's folder keeps. */
#ifndef CLMOE_CLI_TRAIN_TRACE_READ_H
#define CLMOE_CLI_TRAIN_TRACE_READ_H

#include "trace.h"

/* JSON lines, as `clmoe trace --json` writes them. */
#define TRACE_FILE "trace.jsonl"

/* Start from {0}. */
typedef struct trace_record {
    trace trace;
    uint32_t steps; /* after which it was made */
    char *texts[MOST_TEXTS];
    uint32_t num_texts;
} trace_record;

/*
 * Reads it for a run of so many layers and experts. Where there is none num_texts stays 0. After an
 * error trace_record_free(), too.
 */
bool trace_read(const char *folder, const train_settings *run, trace_record *record, problem *why);
void trace_record_free(trace_record *record);

#endif
