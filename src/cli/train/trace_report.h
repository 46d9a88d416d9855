/* What `clmoe trace` writes: tables, JSON lines, CSV. */
#ifndef CLMOE_CLI_TRAIN_TRACE_REPORT_H
#define CLMOE_CLI_TRAIN_TRACE_REPORT_H

#include "../output.h"
#include "trace.h"

/* What the trace is of. */
typedef struct trace_title {
    const char *folder, *device;
    uint32_t done, steps;
    const corpus *text;
} trace_title;

void trace_print(const trace *t, const trace_title *title);

/* One object per layer, and one for each of its experts. */
clmoe_status trace_write_json(const trace *t, const trace_title *title, output *to);
/* The same to DIR/trace.jsonl, which takes the place of the trace before. */
clmoe_status trace_keep(const trace *t, const trace_title *title);
/* One line per layer and expert. */
clmoe_status trace_write_csv(const trace *t, output *to);

#endif
