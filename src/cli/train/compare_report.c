#include "compare_report.h"
#include "describe.h"
#include "html.h"
#include "report.h"

#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Share of the steps that the picture of the loss leaves out. */
#define START 0.1

void group_differences(const comparison *c, uint32_t group, char text[DIFFERENCES_TEXT]) {
    const train_settings *first = &c->groups[0].lead->settings;
    text[0] = '\0';
    for (uint32_t i = 0; setting_name(i) != NULL; i++) {
        char value[SETTING_TEXT];
        bool differs = false;
        if (strcmp(setting_name(i), "seed") == 0 || strcmp(setting_name(i), "balance") == 0)
            continue;
        for (uint32_t g = 1; g < c->num_groups && !differs; g++)
            differs = !setting_same(first, &c->groups[g].lead->settings, i);
        if (!differs)
            continue;
        setting_text(&c->groups[group].lead->settings, i, value);
        const size_t used = strlen(text);
        snprintf(text + used, DIFFERENCES_TEXT - used, "%s%s %s", used > 0 ? ", " : "",
                 setting_name(i), value);
    }
}

/* ---- Table ----------------------------------------------------------------------------------- */

static void write_value(const html_page *page, const run_group *g, run_figure figure) {
    char mean[FIGURE_TEXT], spread[FIGURE_TEXT];
    figure_text(figure, g->mean[figure], mean);
    figure_text(figure, g->spread[figure], spread);
    if (g->count > 1 && strcmp(spread, "-") != 0)
        fprintf(page->file, "<td class=\"n\">%s &#177; %s</td>", mean, spread);
    else
        fprintf(page->file, "<td class=\"n\">%s</td>", mean);
}

static void write_cell(const html_page *page, const char *text) {
    fputs("<td>", page->file);
    html_text(page, text);
    fputs("</td>", page->file);
}

static void write_row(const html_page *page, const comparison *c, uint32_t group) {
    const run_group *g = &c->groups[group];
    char text[DIFFERENCES_TEXT];
    char colour[PLOT_COLOUR];
    plot_colour(group, colour);
    fprintf(page->file, "<tr><td><i style=\"background:%s\"></i>", colour);
    html_text(page, g->lead->folder);
    fputs("</td>", page->file);
    balance_names(&g->lead->settings.methods, text);
    write_cell(page, text);
    balance_numbers(&g->lead->settings.methods, text);
    write_cell(page, text);
    fprintf(page->file, "<td class=\"n\">%u</td><td class=\"n\">%u</td>", (unsigned)g->count,
            (unsigned)g->lead->steps);
    for (run_figure i = 0; i < RUN_FIGURES; i++)
        write_value(page, g, i);
    write_cell(page, g->pareto ? "*" : "");
    group_differences(c, group, text);
    write_cell(page, text);
    fputs("</tr>\n", page->file);
}

static void write_table(const html_page *page, const comparison *c) {
    fputs("<div class=\"wide\"><table>\n<tr><th>run</th><th>balance</th>"
          "<th>weight</th><th class=\"n\">seeds</th><th class=\"n\">steps</th>",
          page->file);
    for (run_figure i = 0; i < RUN_FIGURES; i++)
        fprintf(page->file, "<th class=\"n\">%s</th>", figure_names[i]);
    fputs("<th>Pareto</th><th>settings</th></tr>\n", page->file);
    for (uint32_t group = 0; group < c->num_groups; group++)
        write_row(page, c, group);
    fputs("</table></div>\n<p>Losses, in nats per byte, and MaxVio are of validation. Starved: "
          "experts of all layers with less than 0.16 of their fair share (2 % of 8 experts) at "
          "the end, which is the mean of the last tenth of the lines of metrics.csv; dead: as the "
          "layer counts them. Of several seeds: mean &#177; standard deviation. Pareto: no run of "
          "the same sweep is better in both loss and MaxVio.</p>\n",
          page->file);
}

/* ---- Pictures -------------------------------------------------------------------------------- */

static clmoe_status no_memory(void) {
    return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for a picture");
}

/* What falls at first, and would hide how the runs differ. */
static void leave_out_begin(plot_curve *curve, uint32_t steps) {
    for (uint32_t i = 0; i < curve->count; i++)
        if (curve->x[i] < START * steps)
            curve->y[i] = NAN;
}

/* A column of all runs over steps; the runs of a group have one colour and one name. */
static clmoe_status write_curves(html_page *page, const comparison *c, run_column column) {
    clmoe_status status = CLMOE_SUCCESS;
    const bool loss = column == COLUMN_VALIDATION;
    plot_figure f = {.title = loss ? "Validation loss" : "MaxVio of validation",
                     .x_name = "step",
                     .y_name = loss ? "nats per byte" : "MaxVio",
                     .over_steps = true,
                     .y_from_0 = !loss};
    for (uint32_t i = 0; i < c->num_runs; i++) {
        const run_record *run = &c->runs[i];
        plot_curve *curve = report_curve(&f, run, run->columns[column], 1, PLOT_POINTS);
        if (curve == NULL)
            TRY(no_memory());
        if (loss)
            leave_out_begin(curve, run->steps);
        curve->style = PLOT_DOTTED;
        curve->name = run->folder;
        if (c->groups[c->group_of[i]].count > 1)
            snprintf(curve->number, sizeof curve->number, "%u seeds",
                     (unsigned)c->groups[c->group_of[i]].count);
        curve->unnamed = c->groups[c->group_of[i]].lead != run;
        plot_colour(c->group_of[i], curve->colour);
    }
    html_figure(page, &f, loss ? "Without the first tenth of the steps." : NULL);
done:
    plot_free(&f);
    return status;
}

static const run_group *group_at(const comparison *c, uint32_t sweep, uint32_t *from) {
    for (; *from < c->num_groups; ++*from)
        if (c->groups[*from].sweep == sweep)
            return &c->groups[(*from)++];
    return NULL;
}

/* From lower to higher `x`, which is the first number of a point. */
static int by_x(const void *a, const void *b) {
    const double one = *(const double *)a, other = *(const double *)b;
    return (one > other) - (one < other);
}

/* A line through the points of a sweep: all in the order of their numbers, or Pareto's by MaxVio.
 */
static clmoe_status add_line(plot_figure *f, const comparison *c, uint32_t sweep, bool pareto) {
    plot_curve *line = plot_add(f, c->num_groups);
    double(*points)[3] = calloc(c->num_groups, sizeof *points);
    uint32_t from = 0;
    if (line == NULL || points == NULL) {
        free(points);
        return no_memory();
    }
    for (const run_group *g; (g = group_at(c, sweep, &from)) != NULL;)
        if (g->pareto || !pareto) {
            double *point = points[line->count++];
            point[0] = pareto ? g->mean[FIGURE_VIOLATION] : g->weight;
            point[1] = g->mean[FIGURE_VIOLATION];
            point[2] = g->mean[FIGURE_FINAL];
        }
    qsort(points, line->count, sizeof *points, by_x);
    for (uint32_t i = 0; i < line->count; i++) {
        line->x[i] = points[i][1];
        line->y[i] = points[i][2];
    }
    line->style = pareto ? PLOT_LINE : PLOT_THIN;
    line->name = pareto ? "Pareto points" : "in the order of the numbers";
    strcpy(line->colour, pareto ? "#222222" : "#aaaaaa");
    free(points);
    return CLMOE_SUCCESS;
}

static clmoe_status add_point(plot_figure *f, const comparison *c, const run_group *g) {
    plot_curve *point = plot_add(f, 1);
    if (point == NULL)
        return no_memory();
    point->count = 1;
    point->x[0] = g->mean[FIGURE_VIOLATION];
    point->y[0] = g->mean[FIGURE_FINAL];
    point->style = g->pareto ? PLOT_MARKED : PLOT_DOTS;
    snprintf(point->number, sizeof point->number, "%.7g", g->weight);
    plot_colour((uint32_t)(g - c->groups), point->colour);
    f->x_log = f->x_log && !(point->x[0] <= 0);
    return CLMOE_SUCCESS;
}

static clmoe_status write_sweep(html_page *page, const comparison *c, uint32_t sweep) {
    clmoe_status status = CLMOE_SUCCESS;
    uint32_t from = 0;
    char title[100];
    const run_group *g = group_at(c, sweep, &from);
    snprintf(title, sizeof title, "Quality against balance: the number of %s",
             g->lead->settings.methods.rows[g->method].row->name);
    plot_figure f = {.title = title,
                     .x_name = "MaxVio of validation at the end",
                     .y_name = "loss, nats per byte",
                     .x_log = true};
    TRY(add_line(&f, c, sweep, false));
    TRY(add_line(&f, c, sweep, true));
    for (from = 0; (g = group_at(c, sweep, &from)) != NULL;)
        TRY(add_point(&f, c, g));
    html_figure(page, &f,
                "Each point is a number of the method, lower left is better; none of the sweep is "
                "better in both than a Pareto point.");
done:
    plot_free(&f);
    return status;
}

clmoe_status compare_report_write(const comparison *c, FILE *file) {
    clmoe_status status = CLMOE_SUCCESS;
    html_page page = {.file = file};
    html_begin(&page, "Runs side by side");
    write_table(&page, c);
    TRY(write_curves(&page, c, COLUMN_VALIDATION));
    TRY(write_curves(&page, c, COLUMN_VALIDATION_VIOLATION));
    for (uint32_t sweep = 0; sweep < c->num_sweeps; sweep++)
        TRY(write_sweep(&page, c, sweep));
    html_end(&page);
done:
    return status;
}
