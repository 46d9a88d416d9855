/* A finished or stopped run, read from its folder: run.json and metrics.csv. */
#ifndef CLMOE_CLI_TRAIN_RUNS_H
#define CLMOE_CLI_TRAIN_RUNS_H

#include "csv.h"
#include "save.h"

/* Columns of metrics.csv that each has. */
typedef enum run_column {
    COLUMN_STEP,
    COLUMN_LOSS,
    COLUMN_VALIDATION,
    COLUMN_VALIDATION_VIOLATION,
    COLUMN_VIOLATION,
    COLUMN_ENTROPY,
    COLUMN_DROPS,
    COLUMN_DEAD,
    COLUMN_SPEED,
    RUN_COLUMNS
} run_column;

/* What a run comes to; NAN: it has no such value. */
typedef enum run_figure {
    FIGURE_FINAL,     /* last validation loss, nats per byte */
    FIGURE_BEST,      /* least validation loss */
    FIGURE_VIOLATION, /* last MaxVio of validation */
    FIGURE_BELOW,     /* experts of all layers with a share below STARVED / E at the end */
    FIGURE_DEAD,      /* experts of all layers that count as dead at the end */
    FIGURE_DROPS,     /* share of dropped pairs at the end */
    FIGURE_SPEED,     /* tokens/s, median */
    RUN_FIGURES
} run_figure;

/* 2 % of the pairs where there are 8 experts. */
#define STARVED 0.16

/* Start from {0}. */
typedef struct run_record {
    const char *folder;
    run_words words;
    train_settings settings; /* points into the words */
    csv_table table;
    uint32_t columns[RUN_COLUMNS];
    bool counted;        /* there are statistics: the two below hold */
    uint32_t *violation; /* [layers]: columns */
    uint32_t *shares;    /* [layers, experts]: columns */
    uint32_t steps;      /* of the last line, 0 without any */
    double figures[RUN_FIGURES];
} run_record;

/* `folder` stays the caller's. "The end" is the mean of the last tenth of the lines. */
clmoe_status record_read(const char *folder, run_record *run);
/* Allowed on {0} and after an error. */
void record_free(run_record *run);

double record_value(const run_record *run, uint32_t row, uint32_t column);
/* The mean of a column at the end. */
double record_end(const run_record *run, uint32_t column);
/* An expert's share of its layer's pairs at the end. */
double record_share(const run_record *run, uint32_t layer, uint32_t expert);

#endif
