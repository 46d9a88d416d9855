#include "runs.h"
#include "folder.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAST_STEP = 1 << 24 };

static const char *const column_names[RUN_COLUMNS] = {
    [COLUMN_STEP] = "step",
    [COLUMN_LOSS] = "loss",
    [COLUMN_VALIDATION] = "validation_loss",
    [COLUMN_VALIDATION_VIOLATION] = "validation_max_vio",
    [COLUMN_VIOLATION] = "max_vio",
    [COLUMN_ENTROPY] = "entropy",
    [COLUMN_DROPS] = "drop_rate",
    [COLUMN_DEAD] = "dead_experts",
    [COLUMN_SPEED] = "tokens_per_s",
};

double record_value(const run_record *run, uint32_t row, uint32_t column) {
    return run->table.values[(size_t)row * run->table.columns + column];
}

/* ---- Columns --------------------------------------------------------------------------------- */

static clmoe_status find_column(run_record *run, const char *name, uint32_t *column) {
    *column = csv_column(&run->table, name);
    if (*column != CSV_NONE)
        return CLMOE_SUCCESS;
    return cli_fail(CLMOE_BAD_FILE, "%s/metrics.csv has no column '%s'", run->folder, name);
}

/* Those of each layer and expert: all of them, or none where nothing is counted. */
static clmoe_status find_layers(run_record *run) {
    clmoe_status status = CLMOE_SUCCESS;
    const train_settings *s = &run->settings;
    char name[40];
    run->counted = csv_column(&run->table, "share_0_0") != CSV_NONE;
    if (!run->counted)
        return status;
    run->violation = calloc(s->layers, sizeof *run->violation);
    run->shares = calloc((size_t)s->layers * s->experts, sizeof *run->shares);
    if (run->violation == NULL || run->shares == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the run of '%s'", run->folder);
    for (uint32_t l = 0; l < s->layers; l++) {
        snprintf(name, sizeof name, "max_vio_%u", (unsigned)l);
        TRY(find_column(run, name, &run->violation[l]));
    }
    for (uint32_t i = 0; i < s->layers * s->experts; i++) {
        snprintf(name, sizeof name, "share_%u_%u", (unsigned)(i / s->experts),
                 (unsigned)(i % s->experts));
        TRY(find_column(run, name, &run->shares[i]));
    }
done:
    return status;
}

/* Steps are whole numbers, each above the one before. */
static clmoe_status check_steps(run_record *run) {
    for (uint32_t row = 0; row < run->table.rows; row++) {
        const double step = record_value(run, row, run->columns[COLUMN_STEP]);
        if (!(step > run->steps && step <= LAST_STEP && step == floor(step)))
            return cli_fail(CLMOE_BAD_FILE, "%s/metrics.csv: line %u has the step %g after %u",
                            run->folder, (unsigned)row + 2, step, (unsigned)run->steps);
        run->steps = (uint32_t)step;
    }
    return CLMOE_SUCCESS;
}

/* ---- Figures --------------------------------------------------------------------------------- */

static double last_of(const run_record *run, uint32_t column) {
    for (uint32_t row = run->table.rows; row-- > 0;)
        if (!isnan(record_value(run, row, column)))
            return record_value(run, row, column);
    return NAN;
}

static double least_of(const run_record *run, uint32_t column) {
    double least = NAN;
    for (uint32_t row = 0; row < run->table.rows; row++)
        least = fmin(least, record_value(run, row, column));
    return least;
}

/* Over the last tenth of the lines, at least one. */
double record_end(const run_record *run, uint32_t column) {
    const uint32_t rows = run->table.rows, tenth = rows < 10 ? 1 : rows / 10;
    double sum = 0;
    uint32_t count = 0;
    for (uint32_t row = rows > tenth ? rows - tenth : 0; row < rows; row++) {
        const double value = record_value(run, row, column);
        if (isnan(value))
            continue;
        sum += value;
        count++;
    }
    return count > 0 ? sum / count : NAN;
}

static int by_size(const void *a, const void *b) {
    const double one = *(const double *)a, other = *(const double *)b;
    return (one > other) - (one < other);
}

/* The upper median of a column, without its first line, in which programs are compiled. */
static clmoe_status median_of(const run_record *run, uint32_t column, double *median) {
    double *sorted = malloc((run->table.rows + 1) * sizeof *sorted);
    uint32_t count = 0;
    if (sorted == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the run of '%s'", run->folder);
    for (uint32_t row = run->table.rows > 1; row < run->table.rows; row++)
        if (!isnan(record_value(run, row, column)))
            sorted[count++] = record_value(run, row, column);
    qsort(sorted, count, sizeof *sorted, by_size);
    *median = count > 0 ? sorted[count / 2] : NAN;
    free(sorted);
    return CLMOE_SUCCESS;
}

double record_share(const run_record *run, uint32_t layer, uint32_t expert) {
    return record_end(run, run->shares[(size_t)layer * run->settings.experts + expert]);
}

static double starved(const run_record *run) {
    const train_settings *s = &run->settings;
    uint32_t count = 0;
    if (!run->counted || run->table.rows == 0)
        return NAN;
    for (uint32_t l = 0; l < s->layers; l++)
        for (uint32_t e = 0; e < s->experts; e++)
            count += record_share(run, l, e) < STARVED / s->experts;
    return count;
}

/* Each line has a loss, but one that is no number any more. */
static bool diverged(const run_record *run) {
    return run->table.rows > 0 &&
           isnan(record_value(run, run->table.rows - 1, run->columns[COLUMN_LOSS]));
}

static clmoe_status set_figures(run_record *run) {
    double *figures = run->figures;
    figures[FIGURE_FINAL] =
        diverged(run) ? (double)NAN : last_of(run, run->columns[COLUMN_VALIDATION]);
    figures[FIGURE_BEST] = least_of(run, run->columns[COLUMN_VALIDATION]);
    figures[FIGURE_VIOLATION] = last_of(run, run->columns[COLUMN_VALIDATION_VIOLATION]);
    figures[FIGURE_BELOW] = starved(run);
    figures[FIGURE_DEAD] = last_of(run, run->columns[COLUMN_DEAD]);
    figures[FIGURE_DROPS] = record_end(run, run->columns[COLUMN_DROPS]);
    return median_of(run, run->columns[COLUMN_SPEED], &figures[FIGURE_SPEED]);
}

/* ---- A run ----------------------------------------------------------------------------------- */

clmoe_status record_read(const char *folder, run_record *run) {
    clmoe_status status = CLMOE_SUCCESS;
    char path[PATH_MAX];
    run->folder = folder;
    TRY(run_load(folder, &run->words, &run->settings));
    TRY(folder_path(folder, "metrics.csv", path));
    TRY(csv_read(path, &run->table));
    for (uint32_t i = 0; i < RUN_COLUMNS; i++)
        TRY(find_column(run, column_names[i], &run->columns[i]));
    TRY(find_layers(run));
    TRY(check_steps(run));
    TRY(set_figures(run));
done:
    return status;
}

void record_free(run_record *run) {
    csv_free(&run->table);
    run_words_free(&run->words);
    free(run->violation);
    free(run->shares);
    *run = (run_record){0};
}
