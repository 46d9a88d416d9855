/* report.html of a run's folder: its settings, what it came to, and pictures over its steps. */
#ifndef CLMOE_CLI_TRAIN_REPORT_H
#define CLMOE_CLI_TRAIN_REPORT_H

#include "plot.h"
#include "runs.h"

/* Writes it from the folder's run.json and metrics.csv, and its trace.jsonl if there is one. */
clmoe_status report_write(const char *folder);

/*
 * A curve of a column over steps, times `scale`: of more lines than `most` the means of neighbours.
 * NULL: no memory.
 */
plot_curve *report_curve(plot_figure *figure, const run_record *run, uint32_t column, double scale,
                         uint32_t most);

/* What the figures of a run are called, their unit in brackets, and as a text; "-" without one. */
extern const char *const figure_names[RUN_FIGURES];
enum { FIGURE_TEXT = 48 };
void figure_text(run_figure figure, double value, char text[FIGURE_TEXT]);

#endif
