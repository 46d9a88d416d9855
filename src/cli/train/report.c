#include "report.h"
#include "describe.h"
#include "folder.h"
#include "report_trace.h"

#include <math.h>
#include <string.h>

enum { MOST_BANDS = 64, AREA_POINTS = 200 };

static const char report_name[] = "report.html";

const char *const figure_names[RUN_FIGURES] = {
    [FIGURE_FINAL] = "final loss", [FIGURE_BEST] = "best loss", [FIGURE_VIOLATION] = "MaxVio",
    [FIGURE_BELOW] = "starved",    [FIGURE_DEAD] = "dead",      [FIGURE_DROPS] = "drops %",
    [FIGURE_SPEED] = "tokens/s",
};

void figure_text(run_figure figure, double value, char text[FIGURE_TEXT]) {
    static const char *const formats[RUN_FIGURES] = {
        [FIGURE_FINAL] = "%.4f", [FIGURE_BEST] = "%.4f", [FIGURE_VIOLATION] = "%.3f",
        [FIGURE_BELOW] = "%.1f", [FIGURE_DEAD] = "%.1f", [FIGURE_DROPS] = "%.2f",
        [FIGURE_SPEED] = "%.0f",
    };
    const double shown = figure == FIGURE_DROPS ? 100 * value : value;
    const bool counts = figure == FIGURE_BELOW || figure == FIGURE_DEAD;
    if (isnan(value))
        snprintf(text, FIGURE_TEXT, "-");
    else if (fabs(shown) < 1e12)
        snprintf(text, FIGURE_TEXT, counts && shown == floor(shown) ? "%.0f" : formats[figure],
                 shown);
    else
        snprintf(text, FIGURE_TEXT, "%g", shown);
}

/* ---- Curves ---------------------------------------------------------------------------------- */

/* The mean of the lines [begin, end) that have a value, to point i, at the last one's step. */
static void set_point(plot_curve *c, uint32_t i, const run_record *run, uint32_t column,
                      uint32_t begin, uint32_t end) {
    double sum = 0;
    uint32_t count = 0;
    c->x[i] = record_value(run, end - 1, run->columns[COLUMN_STEP]);
    for (uint32_t row = begin; row < end; row++) {
        const double value = record_value(run, row, column);
        if (isnan(value))
            continue;
        sum += value;
        count++;
        c->x[i] = record_value(run, row, run->columns[COLUMN_STEP]);
    }
    c->y[i] = count > 0 ? sum / count : NAN;
}

plot_curve *report_curve(plot_figure *f, const run_record *run, uint32_t column, double scale,
                         uint32_t most) {
    const uint64_t rows = run->table.rows;
    const uint32_t points = rows < most ? (uint32_t)rows : most;
    plot_curve *c = plot_add(f, points);
    if (c == NULL)
        return NULL;
    c->count = points;
    for (uint32_t i = 0; i < points; i++) {
        set_point(c, i, run, column, (uint32_t)(rows * i / points),
                  (uint32_t)(rows * (i + 1) / points));
        c->y[i] *= scale;
    }
    return c;
}

static clmoe_status no_memory(void) {
    return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for a picture");
}

static clmoe_status add_curve(plot_figure *f, const run_record *run, uint32_t column, double scale,
                              const char *name, plot_style style) {
    plot_curve *c = report_curve(f, run, column, scale, PLOT_POINTS);
    if (c == NULL)
        return no_memory();
    c->name = name;
    c->style = style;
    return CLMOE_SUCCESS;
}

/* One of each layer, numbered. */
static clmoe_status add_layers(plot_figure *f, const run_record *run) {
    for (uint32_t l = 0; l < run->settings.layers; l++) {
        plot_curve *c = report_curve(f, run, run->violation[l], 1, PLOT_POINTS);
        if (c == NULL)
            return no_memory();
        snprintf(c->number, sizeof c->number, "layer %u", (unsigned)l);
        c->style = PLOT_THIN;
    }
    return CLMOE_SUCCESS;
}

/* A level line over all steps. */
static clmoe_status add_level(plot_figure *f, const run_record *run, double level,
                              const char *name) {
    plot_curve *c = plot_add(f, 2);
    if (c == NULL)
        return no_memory();
    *c = (plot_curve){.name = name, .colour = "#888888", .count = 2, .x = c->x, .y = c->y};
    c->style = PLOT_THIN;
    c->x[0] = run->table.rows > 0 ? record_value(run, 0, run->columns[COLUMN_STEP]) : 0;
    c->x[1] = run->steps;
    c->y[0] = c->y[1] = level;
    return CLMOE_SUCCESS;
}

/* ---- Figures --------------------------------------------------------------------------------- */

/* The experts [begin, end) on what there is, in %. */
static clmoe_status add_band(plot_figure *f, const run_record *run, uint32_t layer, uint32_t begin,
                             uint32_t end) {
    clmoe_status status = CLMOE_SUCCESS;
    plot_figure parts = {0};
    plot_curve *sum = report_curve(f, run, run->columns[COLUMN_STEP], 0, AREA_POINTS);
    if (sum == NULL)
        return no_memory();
    sum->style = PLOT_AREA;
    if (end - begin == 1)
        snprintf(sum->number, sizeof sum->number, "%u", (unsigned)begin);
    else
        snprintf(sum->number, sizeof sum->number, "%u-%u", (unsigned)begin, (unsigned)end - 1);
    for (uint32_t i = 0; i < sum->count; i++)
        sum->y[i] = f->count > 1 ? f->curves[f->count - 2].y[i] : 0;
    for (uint32_t e = begin; e < end; e++) {
        const uint32_t column = run->shares[(size_t)layer * run->settings.experts + e];
        const plot_curve *part = report_curve(&parts, run, column, 100, AREA_POINTS);
        if (part == NULL)
            TRY(no_memory());
        for (uint32_t i = 0; i < sum->count; i++)
            sum->y[i] += isnan(part->y[i]) ? 0 : part->y[i];
        plot_free(&parts);
    }
done:
    plot_free(&parts);
    return status;
}

static clmoe_status write_shares(html_page *page, const run_record *run, uint32_t layer) {
    clmoe_status status = CLMOE_SUCCESS;
    const uint32_t experts = run->settings.experts;
    const uint32_t bands = experts < MOST_BANDS ? experts : MOST_BANDS;
    char title[40], below[160];
    snprintf(title, sizeof title, "Experts of layer %u", (unsigned)layer);
    snprintf(below, sizeof below,
             "Each colour is an expert's share of the batch's token-expert pairs; in balance each "
             "has %.3g %%.",
             100.0 / experts);
    plot_figure f = {
        .title = title, .x_name = "step", .y_name = "share of the pairs, %", .over_steps = true};
    f.y_most = 100;
    for (uint32_t b = 0; b < bands; b++)
        TRY(add_band(&f, run, layer, (uint32_t)((uint64_t)experts * b / bands),
                     (uint32_t)((uint64_t)experts * (b + 1) / bands)));
    html_figure(page, &f, below);
done:
    plot_free(&f);
    return status;
}

static clmoe_status write_violation(html_page *page, const run_record *run) {
    clmoe_status status = CLMOE_SUCCESS;
    plot_figure f = {.title = "MaxVio",
                     .x_name = "step",
                     .y_name = "MaxVio",
                     .over_steps = true,
                     .y_from_0 = true};
    TRY(add_layers(&f, run));
    TRY(add_curve(&f, run, run->columns[COLUMN_VALIDATION_VIOLATION], 1,
                  "validation, the largest of the layers", PLOT_DOTTED));
    strcpy(f.curves[f.count - 1].colour, "#222222");
    html_figure(page, &f,
                "Largest load / mean load - 1: 0 is balance, E - 1 is one expert for all tokens.");
done:
    plot_free(&f);
    return status;
}

/* log E, the most there can be. */
static clmoe_status entropy_level(plot_figure *f, const run_record *run) {
    return add_level(f, run, log(run->settings.experts), "log E, the most there can be");
}

/* Few drops are not drawn as if they were many. */
static clmoe_status drops_most(plot_figure *f, const run_record *run) {
    if (run->figures[FIGURE_DROPS] < 0.01)
        f->y_most = 10;
    for (uint32_t i = 0; i < f->curves[0].count; i++)
        f->y_most = f->curves[0].y[i] > f->y_most ? 0 : f->y_most;
    return CLMOE_SUCCESS;
}

static clmoe_status dead_most(plot_figure *f, const run_record *run) {
    f->y_most = (double)run->settings.layers * run->settings.experts;
    return CLMOE_SUCCESS;
}

/* A picture of columns over the steps, and what it has besides, or NULL. */
typedef struct picture {
    const char *title, *axis;
    double scale;
    struct {
        run_column column;
        const char *name; /* NULL: no curve */
        plot_style style;
    } curves[2];
    clmoe_status (*add)(plot_figure *f, const run_record *run);
} picture;

enum { PICTURE_LOSS, PICTURE_ENTROPY, PICTURE_DROPS, PICTURE_DEAD };

static const picture pictures[] = {
    [PICTURE_LOSS] = {"Loss",
                      "nats per byte",
                      1,
                      {{COLUMN_LOSS, "training, of the batch", PLOT_THIN},
                       {COLUMN_VALIDATION, "validation, of what is held out", PLOT_DOTTED}},
                      NULL},
    [PICTURE_ENTROPY] = {"Entropy of the load",
                         "nats",
                         1,
                         {{COLUMN_ENTROPY, "mean of the layers", PLOT_LINE}},
                         entropy_level},
    [PICTURE_DROPS] = {"Drops",
                       "dropped pairs, %",
                       100,
                       {{COLUMN_DROPS, "mean of the layers", PLOT_LINE}},
                       drops_most},
    [PICTURE_DEAD] =
        {"Dead experts", "experts", 1, {{COLUMN_DEAD, "of all layers", PLOT_LINE}}, dead_most},
};

static clmoe_status write_picture(html_page *page, const run_record *run, const picture *of) {
    clmoe_status status = CLMOE_SUCCESS;
    plot_figure f = {.title = of->title, .x_name = "step", .y_name = of->axis, .over_steps = true};
    for (size_t i = 0; i < 2 && of->curves[i].name != NULL; i++)
        TRY(add_curve(&f, run, run->columns[of->curves[i].column], of->scale, of->curves[i].name,
                      of->curves[i].style));
    if (of->add != NULL)
        TRY(of->add(&f, run));
    html_figure(page, &f, NULL);
done:
    plot_free(&f);
    return status;
}

/* The balance losses, which columns loss_NAME have. */
static clmoe_status write_losses(html_page *page, const run_record *run) {
    clmoe_status status = CLMOE_SUCCESS;
    plot_figure f = {.title = "Balance losses",
                     .x_name = "step",
                     .y_name = "value before the weight",
                     .over_steps = true};
    for (uint32_t i = 0; i < run->table.columns; i++)
        if (strncmp(run->table.names[i], "loss_", 5) == 0)
            TRY(add_curve(&f, run, i, 1, run->table.names[i] + 5, PLOT_LINE));
    if (f.count > 0)
        html_figure(page, &f, NULL);
done:
    plot_free(&f);
    return status;
}

static clmoe_status write_pictures(html_page *page, const run_record *run) {
    clmoe_status status = CLMOE_SUCCESS;
    TRY(write_picture(page, run, &pictures[PICTURE_LOSS]));
    if (!run->counted)
        return status;
    for (uint32_t l = 0; l < run->settings.layers; l++)
        TRY(write_shares(page, run, l));
    TRY(write_violation(page, run));
    for (int i = PICTURE_ENTROPY; i <= PICTURE_DEAD; i++)
        TRY(write_picture(page, run, &pictures[i]));
    TRY(write_losses(page, run));
done:
    return status;
}

/* ---- Tables ---------------------------------------------------------------------------------- */

static void write_figures(const html_page *page, run_record *run) {
    static const char *const words[RUN_FIGURES] = {
        [FIGURE_FINAL] = "Validation loss at the end, nats per byte",
        [FIGURE_BEST] = "Best validation loss, nats per byte",
        [FIGURE_VIOLATION] = "MaxVio of validation at the end",
        [FIGURE_BELOW] = "Starved experts at the end: with less than 0.16 of their fair share",
        [FIGURE_DEAD] = "Dead experts at the end",
        [FIGURE_DROPS] = "Dropped pairs at the end, %",
        [FIGURE_SPEED] = "Tokens per second, median",
    };
    const train_settings *s = &run->settings;
    const uint32_t moe = csv_column(&run->table, "moe_share");
    fputs("<table>\n", page->file);
    fprintf(page->file, "<tr><td>Steps</td><td class=\"n\">%u of %u</td></tr>\n",
            (unsigned)run->steps, (unsigned)s->steps);
    if (run->counted)
        fprintf(page->file, "<tr><td>Experts of all layers</td><td class=\"n\">%u</td></tr>\n",
                (unsigned)(s->layers * s->experts));
    for (run_figure i = 0; i < RUN_FIGURES; i++) {
        char text[FIGURE_TEXT];
        figure_text(i, run->figures[i], text);
        fprintf(page->file, "<tr><td>%s</td><td class=\"n\">%s</td></tr>\n", words[i], text);
    }
    if (moe != CSV_NONE)
        fprintf(page->file,
                "<tr><td>Share of a step that is the MoE layers, at the end, %%</td><td "
                "class=\"n\">%.1f</td></tr>\n",
                100 * record_end(run, moe));
    fputs("</table>\n", page->file);
}

/* The command, and all settings that are not off. */
static void write_settings(const html_page *page, const run_record *run) {
    fputs("<h2>Settings</h2>\n<p><code>clmoe", page->file);
    for (int i = 0; i < run->words.count; i++) {
        fputc(' ', page->file);
        html_text(page, run->words.words[i]);
    }
    fputs("</code></p>\n<table>\n", page->file);
    for (uint32_t i = 0; setting_name(i) != NULL; i++) {
        char text[SETTING_TEXT];
        setting_text(&run->settings, i, text);
        if (strcmp(text, "-") == 0 || strcmp(text, "0") == 0)
            continue;
        fprintf(page->file, "<tr><td>%s</td><td>", setting_name(i));
        html_text(page, text);
        fputs("</td></tr>\n", page->file);
    }
    fputs("</table>\n", page->file);
}

clmoe_status report_write(const char *folder) {
    clmoe_status status = CLMOE_SUCCESS;
    folder_file file = {0};
    run_record run = {0};
    char title[PATH_MAX + 20];
    TRY(record_read(folder, &run));
    TRY(folder_begin(&file, folder, report_name));
    html_page page = {.file = file.stream};
    snprintf(title, sizeof title, "Run %s", folder);
    html_begin(&page, title);
    write_figures(&page, &run);
    TRY(write_pictures(&page, &run));
    TRY(report_trace(&page, &run));
    write_settings(&page, &run);
    html_end(&page);
    TRY(folder_end(&file));
done:
    folder_drop(&file);
    record_free(&run);
    return status;
}
