/* clmoe compare: runs of clmoe train side by side. */
#include "../cli.h"
#include "../output.h"
#include "compare_report.h"
#include "describe.h"
#include "report.h"

#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "Usage: clmoe compare DIR... [OPTION]...\n"
    "Puts runs of clmoe train side by side: the last and the best validation loss, MaxVio, starved\n"
    "and dead experts, drops, and speed. Runs that differ in --seed alone are one row, mean and\n"
    "standard deviation. Runs that differ in one number of --balance alone are a sweep: * marks\n"
    "those that none of it beats in both loss and MaxVio.\n"
    "\n"
    "  DIR            a folder that clmoe train wrote, finished or not\n"
    "\n"
    "Options:\n"
    "  --csv FILE     writes the table to a file as CSV; - is standard output, instead of the table\n"
    "  --report FILE  writes the table and pictures to an HTML file, which gnuplot draws; - is\n"
    "                 standard output, instead of the table\n"
    "  --force        overwrites the files of --csv and --report if there are\n"
    "  --json         prints one JSON object instead of the table\n"
    "  --help         this text\n"
    "  --version      the version\n"
    "\n"
    "Losses and MaxVio are of validation. Starved is an expert with less than 0.16 of its fair\n"
    "share of the pairs, 2 % of 8 experts, and drops are the pairs that found no room, both in the\n"
    "mean of the last tenth of the lines of metrics.csv. Tokens/s is the median of the lines.\n"
    "\n"
    "Exit status: 0 success, 2 bad input.\n";

enum { OPT_CSV, OPT_REPORT, OPT_FORCE, OPT_JSON };

static const cli_option table[] = {
    [OPT_CSV] = {.name = "csv", .has_value = true},
    [OPT_REPORT] = {.name = "report", .has_value = true},
    [OPT_FORCE] = {.name = "force", .needs = "csv report"},
    [OPT_JSON] = {.name = "json"},
};

typedef struct compare_options {
    const char *csv_path, *report_path;
    output csv, report;
    bool json;
    char **folders;
    uint32_t num_folders;
} compare_options;

/* ---- Table ----------------------------------------------------------------------------------- */

enum { FIXED = 5, COLUMNS = FIXED + RUN_FIGURES + 2, CELL = 1024 };

/* The texts of a row of the table; the folder's name is made printable. */
static void fill_row(const comparison *c, uint32_t group, char cells[COLUMNS][CELL]) {
    const run_group *g = &c->groups[group];
    char names[SETTING_TEXT], numbers[SETTING_TEXT], settings[DIFFERENCES_TEXT];
    balance_names(&g->lead->settings.methods, names);
    balance_numbers(&g->lead->settings.methods, numbers);
    group_differences(c, group, settings);
    clmoe_printable(g->lead->folder, cells[0], CELL);
    snprintf(cells[1], CELL, "%s", names);
    snprintf(cells[2], CELL, "%s", numbers);
    snprintf(cells[3], CELL, "%u", (unsigned)g->count);
    snprintf(cells[4], CELL, "%u", (unsigned)g->lead->steps);
    for (run_figure i = 0; i < RUN_FIGURES; i++) {
        char mean[FIGURE_TEXT], spread[FIGURE_TEXT];
        figure_text(i, g->mean[i], mean);
        figure_text(i, g->spread[i], spread);
        snprintf(cells[FIXED + i], CELL, strcmp(spread, "-") == 0 ? "%s" : "%s+-%s", mean, spread);
    }
    snprintf(cells[FIXED + RUN_FIGURES], CELL, "%s", g->pareto ? "*" : "");
    clmoe_printable(settings, cells[FIXED + RUN_FIGURES + 1], CELL);
}

static const char *heading(uint32_t column) {
    static const char *const fixed[] = {"run", "balance", "weight", "seeds", "steps"};
    return column < FIXED                  ? fixed[column]
           : column < FIXED + RUN_FIGURES  ? figure_names[column - FIXED]
           : column == FIXED + RUN_FIGURES ? "Pareto"
                                           : "settings";
}

static void print_cell(const char *text, uint32_t column, int width) {
    const bool left = column < 3;
    if (column + 1 == COLUMNS)
        printf("%s\n", text);
    else
        printf(left ? "%-*s  " : "%*s  ", width, text);
}

static clmoe_status print_table(const comparison *c) {
    char(*cells)[COLUMNS][CELL] = calloc(c->num_groups, sizeof *cells);
    if (cells == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for the table");
    size_t widths[COLUMNS];
    for (uint32_t i = 0; i < COLUMNS; i++)
        widths[i] = strlen(heading(i));
    for (uint32_t g = 0; g < c->num_groups; g++) {
        fill_row(c, g, cells[g]);
        for (uint32_t i = 0; i < COLUMNS; i++)
            widths[i] = strlen(cells[g][i]) > widths[i] ? strlen(cells[g][i]) : widths[i];
    }
    for (uint32_t i = 0; i < COLUMNS; i++)
        print_cell(heading(i), i, (int)widths[i]);
    for (uint32_t g = 0; g < c->num_groups; g++)
        for (uint32_t i = 0; i < COLUMNS; i++)
            print_cell(cells[g][i], i, (int)widths[i]);
    free(cells);
    return CLMOE_SUCCESS;
}

/* ---- CSV and JSON ---------------------------------------------------------------------------- */

static const char *const keys[RUN_FIGURES] = {
    [FIGURE_FINAL] = "final_validation_loss",
    [FIGURE_BEST] = "best_validation_loss",
    [FIGURE_VIOLATION] = "validation_max_vio",
    [FIGURE_BELOW] = "starved_experts",
    [FIGURE_DEAD] = "dead_experts",
    [FIGURE_DROPS] = "drop_rate",
    [FIGURE_SPEED] = "tokens_per_s",
};

static void write_quoted(const char *text, FILE *file) {
    fputc('"', file);
    for (; *text != '\0'; text++)
        fprintf(file, *text == '"' ? "\"\"" : "%c", *text);
    fputc('"', file);
}

static void write_number(double value, FILE *file) {
    if (isnan(value))
        fputc(',', file);
    else
        fprintf(file, ",%.9g", value);
}

static void write_csv(const comparison *c, FILE *file) {
    char text[SETTING_TEXT];
    fputs("run,balance,weight,seeds,steps", file);
    for (run_figure i = 0; i < RUN_FIGURES; i++)
        fprintf(file, ",%s,%s_spread", keys[i], keys[i]);
    fputs(",sweep,pareto\n", file);
    for (const run_group *g = c->groups; g < c->groups + c->num_groups; g++) {
        write_quoted(g->lead->folder, file);
        balance_names(&g->lead->settings.methods, text);
        fprintf(file, ",%s,", text);
        balance_numbers(&g->lead->settings.methods, text);
        fprintf(file, "%s,%u,%u", text, (unsigned)g->count, (unsigned)g->lead->steps);
        for (run_figure i = 0; i < RUN_FIGURES; i++) {
            write_number(g->mean[i], file);
            write_number(g->spread[i], file);
        }
        write_number(g->sweep == NO_SWEEP ? (double)NAN : g->sweep, file);
        fprintf(file, ",%d\n", g->pareto);
    }
}

/* null: there is none, or it is infinite. */
static json_t *number_json(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

/* A name that is no UTF-8 is written as clmoe_printable() has it. */
static json_t *folders_json(const comparison *c, uint32_t group) {
    json_t *array = json_array();
    for (uint32_t i = 0; i < c->num_runs; i++) {
        char name[PATH_MAX];
        clmoe_printable(c->runs[i].folder, name, sizeof name);
        if (c->group_of[i] == group)
            json_array_append_new(array, json_string(name));
    }
    return array;
}

static json_t *sweep_json(const run_group *g) {
    if (g->sweep == NO_SWEEP)
        return json_null();
    return json_pack("{sI ss sf}", "number", (json_int_t)g->sweep, "method",
                     g->lead->settings.methods.rows[g->method].row->name, "weight", g->weight);
}

static json_t *group_json(const comparison *c, uint32_t group) {
    const run_group *g = &c->groups[group];
    char text[SETTING_TEXT];
    json_t *object = json_object();
    json_object_set_new(object, "runs", folders_json(c, group));
    balance_names(&g->lead->settings.methods, text);
    json_object_set_new(object, "balance", json_string(text));
    balance_numbers(&g->lead->settings.methods, text);
    json_object_set_new(object, "weight", json_string(text));
    json_object_set_new(object, "seeds", json_integer(g->count));
    json_object_set_new(object, "steps", json_integer(g->lead->steps));
    for (run_figure i = 0; i < RUN_FIGURES; i++)
        json_object_set_new(object, keys[i],
                            json_pack("{so so}", "mean", number_json(g->mean[i]), "spread",
                                      number_json(g->spread[i])));
    json_object_set_new(object, "sweep", sweep_json(g));
    json_object_set_new(object, "pareto", json_boolean(g->pareto));
    return object;
}

static void print_json(const comparison *c) {
    json_t *rows = json_array();
    for (uint32_t group = 0; group < c->num_groups; group++)
        json_array_append_new(rows, group_json(c, group));
    json_t *root = json_pack("{so}", "rows", rows);
    json_dumpf(root, stdout, JSON_INDENT(1) | JSON_ENSURE_ASCII);
    putchar('\n');
    json_decref(root);
}

/* ---- The command ----------------------------------------------------------------------------- */

static bool check_files(compare_options *o, bool force, problem *why) {
    if (o->csv_path != NULL && !output_check(&o->csv, "--csv", o->csv_path, force, why))
        return false;
    if (o->report_path != NULL && !output_check(&o->report, "--report", o->report_path, force, why))
        return false;
    if (o->csv.to_stdout && o->report.to_stdout)
        return problem_set(why, "--csv and --report both write to standard output");
    if ((o->csv.to_stdout || o->report.to_stdout) && o->json)
        return problem_set(why, "--%s and --json both write to standard output",
                           o->csv.to_stdout ? "csv" : "report");
    if (o->csv_path != NULL && o->report_path != NULL && !o->csv.to_stdout &&
        output_is_file(&o->report, o->csv_path))
        return problem_set(why, "--report %s is the same file as --csv", o->report_path);
    return true;
}

static bool set_value(void *to, int option, const char *value, problem *why) {
    compare_options *o = to;
    (void)why;
    *(option == OPT_CSV ? &o->csv_path : &o->report_path) = value;
    return true;
}

static clmoe_status parse_options(compare_options *o, int argc, char **argv, bool *stop) {
    clmoe_status status = CLMOE_SUCCESS;
    cli_parser parser = {.options = table,
                         .count = sizeof table / sizeof table[0],
                         .set_value = set_value,
                         .words = argc};
    problem why;
    TRY(parse_command(&parser, argc, argv, o, usage, stop));
    if (*stop)
        return status;
    o->json = parser.given[OPT_JSON] > 0;
    TRY(checked(check_files(o, parser.given[OPT_FORCE] > 0, &why), &why));
    o->folders = argv + optind;
    o->num_folders = (uint32_t)(argc - optind);
    if (o->num_folders == 0)
        TRY(cli_fail(CLMOE_INVALID_ARGUMENT, "DIR is needed: a folder that clmoe train wrote"));
done:
    return status;
}

static clmoe_status write_file(output *file, const comparison *c, bool html) {
    clmoe_status status = CLMOE_SUCCESS;
    problem why;
    FILE *stream = output_open(file, &why);
    if (stream == NULL)
        TRY(cli_fail(CLMOE_IO, "%s", why.text));
    if (html)
        TRY(compare_report_write(c, stream));
    else
        write_csv(c, stream);
    if (!output_close(file, &why))
        TRY(cli_fail(CLMOE_IO, "%s", why.text));
done:
    output_drop(file);
    return status;
}

static clmoe_status write_all(compare_options *o, const comparison *c) {
    clmoe_status status = CLMOE_SUCCESS;
    if (o->json)
        print_json(c);
    else if (!o->csv.to_stdout && !o->report.to_stdout)
        TRY(print_table(c));
    if (o->csv_path != NULL)
        TRY(write_file(&o->csv, c, false));
    if (o->report_path != NULL)
        TRY(write_file(&o->report, c, true));
done:
    return status;
}

/* No output is a file of a run. */
static clmoe_status spare_run(const compare_options *o, const char *folder) {
    static const char *const names[] = {"run.json", "metrics.csv", "state.safetensors",
                                        "model.safetensors", "config.json"};
    const output *files[] = {&o->csv, &o->report};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        for (size_t k = 0; k < 2; k++) {
            char path[PATH_MAX];
            const int bytes = snprintf(path, sizeof path, "%s/%s", folder, names[i]);
            if (bytes < (int)sizeof path && output_is_file(files[k], path))
                return cli_fail(CLMOE_INVALID_ARGUMENT, "--%s %s is a file of the run '%s'",
                                k == 0 ? "csv" : "report", files[k]->path, folder);
        }
    return CLMOE_SUCCESS;
}

static clmoe_status compare(compare_options *o, comparison *c) {
    clmoe_status status = CLMOE_SUCCESS;
    c->runs = calloc(o->num_folders, sizeof *c->runs);
    if (c->runs == NULL)
        TRY(cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for %u runs", (unsigned)o->num_folders));
    for (uint32_t i = 0; i < o->num_folders; i++)
        TRY(spare_run(o, o->folders[i]));
    while (c->num_runs < o->num_folders) {
        c->num_runs++;
        TRY(record_read(o->folders[c->num_runs - 1], &c->runs[c->num_runs - 1]));
    }
    TRY(comparison_make(c));
    TRY(write_all(o, c));
done:
    return status;
}

int compare_main(int argc, char **argv) {
    clmoe_status status = CLMOE_SUCCESS;
    compare_options options = {0};
    comparison runs = {0};
    bool stop = false;
    TRY(parse_options(&options, argc, argv, &stop));
    if (!stop)
        TRY(compare(&options, &runs));
done:
    for (uint32_t i = 0; i < runs.num_runs; i++)
        record_free(&runs.runs[i]);
    free(runs.runs);
    comparison_free(&runs);
    return status == CLMOE_SUCCESS ? EXIT_OK : exit_with_error("compare");
}
