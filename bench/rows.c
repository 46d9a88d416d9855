#include "rows.h"
#include "commit.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

clmoe_status rows_add(bench_rows *rows, const bench_row *row) {
    bench_row *grown = realloc(rows->rows, (rows->count + 1) * sizeof *grown);
    if (!grown)
        return bench_no_memory("the results");
    rows->rows = grown;
    rows->rows[rows->count++] = *row;
    rows->wrong += !row->checked;
    return CLMOE_SUCCESS;
}

void rows_free(bench_rows *rows) {
    free(rows->rows);
    *rows = (bench_rows){0};
}

/* ---- Times --------------------------------------------------------------------------------- */

static int compare_double(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Between the two samples next to the place. */
static double percentile(const double *sorted, uint32_t count, double share) {
    const double place = share * (count - 1);
    const uint32_t low = (uint32_t)place, high = low + 1 < count ? low + 1 : low;
    return sorted[low] + (place - low) * (sorted[high] - sorted[low]);
}

void row_set_times(bench_row *row, double *samples, uint32_t count) {
    qsort(samples, count, sizeof *samples, compare_double);
    row->repeat = count;
    row->min_ms = samples[0];
    row->p10_ms = percentile(samples, count, 0.1);
    row->median_ms = percentile(samples, count, 0.5);
    row->p90_ms = percentile(samples, count, 0.9);
}

/* ---- JSON ---------------------------------------------------------------------------------- */

static void set_string(json_t *object, const char *name, const char *value) {
    json_object_set_new(object, name, json_string(value));
}

static void set_real(json_t *object, const char *name, double value) {
    json_object_set_new(object, name, json_real(value));
}

/* null where it does not apply */
static void set_share(json_t *object, const char *name, double value) {
    json_object_set_new(object, name, isnan(value) ? json_null() : json_real(value));
}

static void set_count(json_t *object, const char *name, uint32_t value) {
    json_object_set_new(object, name, json_integer(value));
}

static void set_shape(json_t *object, const bench_row *row) {
    set_count(object, "tokens", row->tokens);
    set_count(object, "dim", row->dim);
    set_count(object, "hidden_dim", row->hidden_dim);
    set_count(object, "experts", row->experts);
    set_count(object, "top_k", row->top_k);
}

static void set_results(json_t *object, const bench_row *row) {
    set_count(object, "repeat", row->repeat);
    set_real(object, "median_ms", row->median_ms);
    set_real(object, "min_ms", row->min_ms);
    set_real(object, "p10_ms", row->p10_ms);
    set_real(object, "p90_ms", row->p90_ms);
    set_real(object, "gbytes_per_s", row->gbytes_per_s);
    set_real(object, "gflops", row->gflops);
    set_share(object, "percent_of_peak", row->percent_of_peak);
}

static json_t *row_json(const bench_row *row, const char *date) {
    json_t *object = json_object();
    set_string(object, "case", row->case_name);
    set_string(object, "engine", row->engine);
    set_string(object, "device", row->device);
    set_string(object, "driver", row->driver);
    set_string(object, "dtype", row->dtype);
    if (row->gradient_type)
        set_string(object, "gradient_type", row->gradient_type);
    set_shape(object, row);
    set_string(object, "pattern", row->pattern);
    set_string(object, "step", row->step);
    if (row->checked)
        set_results(object, row);
    else
        set_string(object, "error", row->error);
    json_object_set_new(object, "checked", json_boolean(row->checked));
    set_string(object, "clmoe", clmoe_version());
    set_string(object, "commit", CLMOE_COMMIT);
    set_string(object, "date", date);
    return object;
}

static void format_now(const char *format, char *text, size_t size) {
    const time_t now = time(NULL);
    struct tm utc;
    text[0] = '\0';
    if (gmtime_r(&now, &utc))
        strftime(text, size, format, &utc);
}

clmoe_status write_json(const json_t *root, output *file) {
    problem why;
    FILE *stream = output_open(file, &why);
    if (!stream)
        return cli_fail(CLMOE_IO, "%s", why.text);
    /* What fails here is seen by output_close(). */
    json_dumpf(root, stream, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
    fputc('\n', stream);
    return output_close(file, &why) ? CLMOE_SUCCESS : cli_fail(CLMOE_IO, "%s", why.text);
}

clmoe_status rows_write_json(const bench_rows *rows, output *file) {
    json_t *array = json_array();
    char date[32];
    format_now("%Y-%m-%dT%H:%M:%SZ", date, sizeof date);
    for (size_t i = 0; i < rows->count; i++)
        json_array_append_new(array, row_json(&rows->rows[i], date));
    clmoe_status status = write_json(array, file);
    json_decref(array);
    return status;
}

/* ---- The table ------------------------------------------------------------------------------- */

/* Rows of one table: the same device, types and routing. */
static bool same_table(const bench_row *a, const bench_row *b) {
    return strcmp(a->device, b->device) == 0 && strcmp(a->dtype, b->dtype) == 0 &&
           strcmp(a->pattern, b->pattern) == 0;
}

static void print_head(const bench_row *row) {
    printf("\n%s routing, %s\n", row->pattern, row->dtype);
    printf("%-16s %6s %4s %-21s %-14s %10s %10s %20s %8s %9s %6s\n", "case", "tokens", "E", "step",
           "engine", "median ms", "min ms", "p10 .. p90 ms", "GB/s", "GFLOP/s", "% peak");
}

/* "12.3", or "-" where it does not apply. */
static const char *share_text(double value, char text[16]) {
    snprintf(text, 16, isnan(value) ? "-" : "%.1f", value);
    return text;
}

static void print_row(const bench_row *row) {
    char share[16];
    printf("%-16s %6u %4u %-21s %-14s ", row->case_name, (unsigned)row->tokens,
           (unsigned)row->experts, row->step, row->engine);
    if (row->checked)
        printf("%10.3f %10.3f %8.3f .. %8.3f %8.1f %9.1f %6s\n", row->median_ms, row->min_ms,
               row->p10_ms, row->p90_ms, row->gbytes_per_s, row->gflops,
               share_text(row->percent_of_peak, share));
    else
        printf("WRONG: %s\n", row->error);
}

/* Each driver with the first engine that uses it: the device's, and those of peers. */
static void print_drivers(const bench_rows *rows) {
    for (size_t i = 0; i < rows->count; i++) {
        const bench_row *row = &rows->rows[i];
        bool known = false;
        for (size_t j = 0; j < i; j++)
            known = known || strcmp(rows->rows[j].driver, row->driver) == 0;
        if (!known && i == 0)
            printf("%s, driver %s\n", row->device, row->driver);
        else if (!known)
            printf("%s: %s\n", row->engine, row->driver);
    }
}

static bool is_roofline(const bench_row *row) {
    return strcmp(row->case_name, ROOFLINE_CASE) == 0;
}

void rows_print(const bench_rows *rows) {
    const bench_row *last = NULL;
    print_drivers(rows);
    for (size_t i = 0; i < rows->count; i++) {
        const bench_row *row = &rows->rows[i];
        if (is_roofline(row)) {
            printf("measured %-5s %8.1f %s\n", row->step,
                   row->gflops > 0 ? row->gflops : row->gbytes_per_s,
                   row->gflops > 0 ? "GFLOP/s" : "GB/s");
            continue;
        }
        if (!last || !same_table(last, row))
            print_head(row);
        print_row(row);
        last = row;
    }
}

/* ---- Markdown -------------------------------------------------------------------------------- */

static void print_markdown_head(const bench_row *row) {
    printf("\n%s routing, %s:\n\n", row->pattern, row->dtype);
    puts("| case | T | E | step | engine | median ms | p10 .. p90 | GB/s | GFLOP/s | % of peak |");
    puts("|---|--:|--:|---|---|--:|--:|--:|--:|--:|");
}

static void print_markdown_row(const bench_row *row) {
    char share[16];
    printf("| %s | %u | %u | %s | %s | ", row->case_name, (unsigned)row->tokens,
           (unsigned)row->experts, row->step, row->engine);
    if (row->checked)
        printf("%.3f | %.3f .. %.3f | %.1f | %.1f | %s |\n", row->median_ms, row->p10_ms,
               row->p90_ms, row->gbytes_per_s, row->gflops,
               share_text(row->percent_of_peak, share));
    else
        printf("wrong | | | | |\n");
}

/* Drivers and the roofline. */
static void print_markdown_device(const bench_rows *rows) {
    print_drivers(rows);
    printf("clmoe %s, commit %s; measured", clmoe_version(), CLMOE_COMMIT);
    for (size_t i = 0; i < rows->count; i++) {
        const bench_row *row = &rows->rows[i];
        if (is_roofline(row))
            printf("%s %s %.1f %s", i ? "," : "", row->step,
                   row->gflops > 0 ? row->gflops : row->gbytes_per_s,
                   row->gflops > 0 ? "GFLOP/s" : "GB/s");
    }
    puts(".");
}

void rows_print_markdown(const bench_rows *rows, const char *command) {
    const bench_row *last = NULL;
    char date[16];
    format_now("%Y-%m-%d", date, sizeof date);
    printf("\n## %s, %s\n\n    %s\n\n", rows->count ? rows->rows[0].device : "?", date, command);
    print_markdown_device(rows);
    for (size_t i = 0; i < rows->count; i++) {
        const bench_row *row = &rows->rows[i];
        if (is_roofline(row))
            continue;
        if (!last || !same_table(last, row))
            print_markdown_head(row);
        print_markdown_row(row);
        last = row;
    }
}
