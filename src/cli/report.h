/* What a run prints. */
#ifndef CLMOE_CLI_REPORT_H
#define CLMOE_CLI_REPORT_H

#include "batch.h"
#include "gradients.h"

typedef struct run_report {
    const char *model_type;
    const char *assumed; /* what it was taken for, or NULL */
    const char *coded;   /* how the experts' weights are coded in the files, or NULL */
    uint32_t layer;
    char device[256];
    const char *engine;
    const clmoe_layer_desc *desc;
    uint32_t tokens;
    uint32_t capacity; /* C, 0 when dropless */
    forced_routing forced;
    const clmoe_stats *stats; /* with its arrays load, kept, dropped [R] behind it */
    size_t stats_bytes;
    bool all_stats; /* print every statistic */
    const clmoe_loss_desc *losses;
    uint32_t num_losses;
    const float *loss_values; /* [num_losses] */
    batch_times times;
    bool checked; /* there was an expected tensor; the three below hold */
    double relative_error, tolerance;
    bool pass;
    bool backward; /* there was a backward pass */
    backward_times backward_times;
    bool gradients_checked; /* the three below hold */
    gradient_errors gradient_errors;
    double gradient_tolerance;
    bool gradients_pass;
} run_report;

/* $COLUMNS, 40 to 240, or the columns of the terminal, 40 to 120, or 80. */
int terminal_width(void);

clmoe_status report_text(const run_report *report);
clmoe_status report_json(const run_report *report);

#endif
