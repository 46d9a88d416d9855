/* Who gets what, in a run's report: the trace that its folder keeps. */
#ifndef CLMOE_CLI_TRAIN_REPORT_TRACE_H
#define CLMOE_CLI_TRAIN_REPORT_TRACE_H

#include "html.h"
#include "runs.h"

/* Nothing without a trace; of one that cannot be read, or is not the run's, a sentence. */
clmoe_status report_trace(html_page *page, const run_record *run);

#endif
