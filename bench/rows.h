/* Results: rows, gathered during the run and written at its end as JSON or as a table. */
#ifndef BENCH_ROWS_H
#define BENCH_ROWS_H

#include "../src/cli/output.h"
#include "bench.h"

#include <jansson.h>
#include <stdio.h>

/* The case of the rows that say what the device can do at most. */
#define ROOFLINE_CASE "roofline"

typedef struct bench_row {
    const char *case_name, *pattern, *dtype, *step;
    const char *gradient_type; /* gradient_names, of a step that makes some; else NULL */
    char engine[32], device[128], driver[128];
    uint32_t tokens, dim, hidden_dim, experts, top_k; /* T D H E K */
    uint32_t repeat;
    double median_ms, min_ms, p10_ms, p90_ms;
    double gbytes_per_s, gflops; /* of the median */
    /* Of the roofline. NaN where the engine's matrix units pass its f32 multiply-add rate. */
    double percent_of_peak;
    bool checked; /* false: wrong, and no times */
    char error[256];
} bench_row;

typedef struct bench_rows {
    bench_row *rows;
    size_t count;
    size_t wrong; /* rows that are not checked */
} bench_rows;

clmoe_status rows_add(bench_rows *rows, const bench_row *row);
void rows_free(bench_rows *rows);

/* median, min, p10 and p90 of the samples, which get sorted. */
void row_set_times(bench_row *row, double *samples, uint32_t count);

/* Indented, with a line's end behind it. */
clmoe_status write_json(const json_t *root, output *file);

/* An array of objects. */
clmoe_status rows_write_json(const bench_rows *rows, output *file);

void rows_print(const bench_rows *rows);

/* A dated section for bench/RESULTS.md, with the command that made it. */
void rows_print_markdown(const bench_rows *rows, const char *command);

#endif
