#include "html.h"

#include <limits.h>
#include <string.h>

static const char style[] =
    "body{font:15px/1.45 sans-serif;color:#222;background:#fff;max-width:72rem;margin:2rem auto;"
    "padding:0 1rem}"
    "h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:1.6rem 0 .4rem}"
    "figure,p{max-width:48rem}figure{margin:0}svg{width:100%;height:auto;display:block}"
    ".legend{display:flex;flex-wrap:wrap;gap:.15rem .9rem;font-size:13px;overflow-wrap:anywhere}"
    "i{display:inline-block;width:.9em;height:.9em;margin-right:.35em;"
    "vertical-align:-.1em}"
    "figcaption{font-size:14px;color:#444}code{font-size:13px;overflow-wrap:anywhere}"
    "table{border-collapse:collapse;font-size:14px;margin:.5rem 0}"
    "th,td{text-align:left;padding:.15rem .9rem .15rem 0;border-bottom:1px solid #ddd;"
    "vertical-align:top}td{overflow-wrap:anywhere}"
    ".wide{overflow-x:auto}"
    ".wide td,.wide th{white-space:nowrap}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}";

void html_text(const html_page *page, const char *text) {
    char printable[PATH_MAX];
    clmoe_printable(text, printable, sizeof printable);
    for (const char *c = printable; *c != '\0'; c++)
        switch (*c) {
        case '&':
            fputs("&amp;", page->file);
            break;
        case '<':
            fputs("&lt;", page->file);
            break;
        case '>':
            fputs("&gt;", page->file);
            break;
        case '"':
            fputs("&quot;", page->file);
            break;
        case '\'':
            fputs("&#39;", page->file);
            break;
        default:
            fputc(*c, page->file);
        }
}

/* What the head says of the content holds for whatever would slip into it. */
void html_begin(const html_page *page, const char *title) {
    fprintf(page->file,
            "<!DOCTYPE html>\n<html xmlns=\"http://www.w3.org/1999/xhtml\" lang=\"en\">\n<head>\n"
            "<meta charset=\"utf-8\"/>\n"
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; "
            "style-src 'unsafe-inline'\"/>\n"
            "<meta name=\"viewport\" content=\"width=device-width\"/>\n<title>");
    html_text(page, title);
    fprintf(page->file, "</title>\n<style>%s</style>\n</head>\n<body>\n<h1>", style);
    html_text(page, title);
    fputs("</h1>\n", page->file);
}

void html_end(const html_page *page) {
    fprintf(page->file, "<p>Written by clmoe %s.</p>\n</body>\n</html>\n", clmoe_version());
}

static void write_legend(const html_page *page, const plot_figure *f) {
    fputs("<div class=\"legend\">", page->file);
    for (uint32_t i = 0; i < f->count; i++) {
        const plot_curve *c = &f->curves[i];
        if (c->unnamed)
            continue;
        fprintf(page->file, "<span><i style=\"background:%s\"></i>", c->colour);
        html_text(page, c->name != NULL ? c->name : "");
        fputs(c->name != NULL && c->number[0] != '\0' ? ", " : "", page->file);
        html_text(page, c->number);
        fputs("</span>\n", page->file);
    }
    fputs("</div>\n", page->file);
}

/* What stands where there is no picture. */
static void write_missing(const html_page *page, plot_result result, const problem *why) {
    fputs("<p class=\"missing\">", page->file);
    if (result == PLOT_EMPTY)
        fputs("There is nothing to draw: the run has no such values.", page->file);
    else if (result == PLOT_NO_GNUPLOT)
        fputs("The picture is missing: gnuplot draws it, which is not installed (Debian and "
              "Ubuntu: package gnuplot-nox).",
              page->file);
    else {
        fputs("The picture is missing: ", page->file);
        html_text(page, why->text);
    }
    fputs("</p>\n", page->file);
}

void html_figure(html_page *page, const plot_figure *f, const char *below) {
    problem why;
    fprintf(page->file, "<h2>%s</h2>\n<figure>\n", f->title);
    const plot_result result = plot_draw(f, ++page->pictures, page->file, &why);
    if (result == PLOT_DRAWN && f->map == NULL)
        write_legend(page, f);
    else if (result != PLOT_DRAWN)
        write_missing(page, result, &why);
    if (below != NULL && result == PLOT_DRAWN)
        fprintf(page->file, "<figcaption>%s</figcaption>\n", below);
    fputs("</figure>\n", page->file);
}
