#include "report_trace.h"
#include "trace_read.h"

#include <math.h>
#include <stdlib.h>

_Static_assert((int)MAP_COLUMNS >= 1 + (int)BYTE_CLASSES + (int)MOST_TEXTS,
               "the load, the classes and the texts are columns");

/* ---- A heat map ------------------------------------------------------------------------------ */

/* Neighbours that share a row: an expert alone, where the rows are enough. */
typedef struct band {
    uint32_t begin, end;
    uint64_t pairs;
} band;

static band band_of(const trace *t, const plot_map *m, uint32_t layer, uint32_t row) {
    band b = {.begin = (uint32_t)((uint64_t)t->experts * row / m->rows),
              .end = (uint32_t)((uint64_t)t->experts * (row + 1) / m->rows)};
    for (uint32_t e = b.begin; e < b.end; e++)
        b.pairs += trace_expert_pairs(t, layer, e);
    return b;
}

/* As trace_shares(), of all pairs of the band. */
static void band_shares(const trace *t, trace_label label, uint32_t layer, const band *b,
                        double *shares) {
    double part[MOST_KINDS];
    for (uint32_t k = 0; k < t->by[label].kinds; k++)
        shares[k] = 0;
    for (uint32_t e = b->begin; e < b->end; e++) {
        const double pairs = (double)trace_expert_pairs(t, layer, e);
        trace_shares(t, label, layer, e, part);
        for (uint32_t k = 0; k < t->by[label].kinds && b->pairs > 0; k++)
            shares[k] += part[k] * pairs / (double)b->pairs;
    }
}

/* A share beside what it is of all; NAN: there is none. */
static void set_cell(plot_map *m, uint32_t row, uint32_t column, double share, double of_all) {
    m->values[row][column] = of_all > 0 ? log2(share / of_all) : (double)NAN;
    m->shown[row][column] = 100 * share;
}

static void set_cells(const trace *t, trace_label label, uint32_t layer, uint32_t first,
                      plot_map *m) {
    double all[MOST_KINDS], shares[MOST_KINDS];
    trace_shares(t, label, layer, t->experts, all);
    for (uint32_t row = 0; row < m->rows; row++) {
        const band b = band_of(t, m, layer, row);
        band_shares(t, label, layer, &b, shares);
        for (uint32_t k = 0; k < t->by[label].kinds; k++)
            set_cell(m, row, first + k, b.pairs > 0 ? shares[k] : (double)NAN, all[k]);
    }
}

static void set_loads(const trace *t, uint32_t layer, plot_map *m) {
    const double all = (double)trace_layer_pairs(t, layer);
    for (uint32_t row = 0; row < m->rows; row++) {
        const band b = band_of(t, m, layer, row);
        set_cell(m, row, 0, all > 0 ? (double)b.pairs / all : (double)NAN,
                 (double)(b.end - b.begin) / t->experts);
        if (b.end - b.begin == 1)
            snprintf(m->row_names[row], MAP_NAME, "%u", (unsigned)b.begin);
        else
            snprintf(m->row_names[row], MAP_NAME, "%u-%u", (unsigned)b.begin, (unsigned)b.end - 1);
    }
}

/* The load, the classes, and the texts where there are several, each set apart. */
static void set_columns(const trace *t, plot_map *m) {
    static const char *const heads[BYTE_CLASSES] = {
        [CLASS_LOWER] = "lower",       [CLASS_UPPER] = "upper", [CLASS_DIGIT] = "digit",
        [CLASS_PUNCTUATION] = "punct", [CLASS_SPACE] = "space", [CLASS_NEWLINE] = "line",
        [CLASS_OTHER] = "other",
    };
    const uint32_t texts = t->by[TRACE_SOURCE].kinds;
    m->columns = 1 + BYTE_CLASSES + (texts > 1 ? texts : 0);
    snprintf(m->names[0], MAP_NAME, "load");
    for (uint32_t c = 1; c < m->columns; c++) {
        const uint32_t k = c - 1;
        m->at[c] = c + (k < BYTE_CLASSES ? 0.3 : 0.6);
        if (k < BYTE_CLASSES)
            snprintf(m->names[c], MAP_NAME, "%s", heads[k]);
        else
            snprintf(m->names[c], MAP_NAME, "text %u", (unsigned)(k - BYTE_CLASSES));
    }
}

static clmoe_status write_map(html_page *page, const trace *t, uint32_t layer) {
    char title[48];
    plot_map *m = calloc(1, sizeof *m);
    const plot_figure f = {.title = title, .map = m};
    if (m == NULL)
        return cli_fail(CLMOE_OUT_OF_MEMORY, "no memory for a picture");
    snprintf(title, sizeof title, "What the experts of layer %u get", (unsigned)layer);
    m->rows = t->experts < MAP_ROWS ? t->experts : MAP_ROWS;
    set_columns(t, m);
    set_loads(t, layer, m);
    set_cells(t, TRACE_CLASS, layer, 1, m);
    if (t->by[TRACE_SOURCE].kinds > 1)
        set_cells(t, TRACE_SOURCE, layer, 1 + BYTE_CLASSES, m);
    html_figure(page, &f,
                "A row is an expert, or neighbours where there are more than 64. load: its share "
                "of the layer's pairs, in %. Behind it, of its own pairs those of each class of "
                "byte, and of each text, in %. The colour is that share against the mean over "
                "experts; grey is an expert without pairs, or a class without tokens.");
    free(m);
    return CLMOE_SUCCESS;
}

/* ---- Tables ---------------------------------------------------------------------------------- */

static void write_title(const html_page *page, const trace_record *r) {
    fprintf(page->file,
            "<h2>Who gets what</h2>\n<p>By clmoe trace after step %u, of %u tokens:</p>",
            (unsigned)r->steps, (unsigned)r->trace.tokens);
    fputs("\n<table>\n", page->file);
    for (uint32_t i = 0; i < r->num_texts; i++) {
        fprintf(page->file, "<tr><td>text %u</td><td>", (unsigned)i);
        html_text(page, r->texts[i]);
        fputs("</td></tr>\n", page->file);
    }
    fputs("</table>\n", page->file);
}

static void write_information(const html_page *page, uint32_t layer, const char *label,
                              const information *about) {
    fprintf(page->file,
            "<tr><td class=\"n\">%u</td><td>%s</td><td class=\"n\">%.5f</td><td class=\"n\">%.3f"
            "</td><td class=\"n\">%.1f</td><td class=\"n\">%.5f</td><td class=\"n\">%.5f</td>"
            "</tr>\n",
            (unsigned)layer, label, about->mutual, about->label_entropy, 100 * about->normalised,
            about->shuffled, about->deviation);
}

static void write_table(const html_page *page, const trace *t) {
    fputs("<h2>Mutual information</h2>\n<p>What the expert tells about the token, in bits; by "
          "chance: with the labels shuffled among the tokens.</p>\n<table>\n<tr>"
          "<th class=\"n\">layer</th><th>expert and</th><th class=\"n\">bits</th>"
          "<th class=\"n\">of at most</th><th class=\"n\">%</th><th class=\"n\">by chance</th>"
          "<th class=\"n\">deviation</th></tr>\n",
          page->file);
    for (uint32_t l = 0; l < t->layers; l++) {
        write_information(page, l, "class", &t->by[TRACE_CLASS].about[l]);
        if (t->by[TRACE_SOURCE].kinds > 1)
            write_information(page, l, "text", &t->by[TRACE_SOURCE].about[l]);
    }
    fputs("</table>\n", page->file);
}

clmoe_status report_trace(html_page *page, const run_record *run) {
    clmoe_status status = CLMOE_SUCCESS;
    trace_record r = {0};
    problem why;
    if (!trace_read(run->folder, &run->settings, &r, &why)) {
        fputs("<p class=\"missing\">The trace is left out. " TRACE_FILE ": ", page->file);
        html_text(page, why.text);
        fputs(".</p>\n", page->file);
    } else if (r.num_texts > 0) {
        write_title(page, &r);
        for (uint32_t l = 0; l < r.trace.layers; l++)
            TRY(write_map(page, &r.trace, l));
        write_table(page, &r.trace);
    }
done:
    trace_record_free(&r);
    return status;
}
